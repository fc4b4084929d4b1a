{# Two readings of a table's changes: every version it ever had (valid time), and its state now (for dbt's snapshots). #}


{# SCD2 from the change history. A version is what a transaction left behind: several changes of a row in one transaction are one
   version, for nobody ever saw the others; a row born and deleted in one transaction is none. Only keys that changed are read:
   their open version is taken back, the new ones follow it, and the merge closes what is no longer open. #}
{% macro versions(staging_model, columns) -%}
    {%- set key = columns[0] -%}
    with changes as (
        select * from {{ ref(staging_model) }}
        where {{ window() }}
    ),

    ranked as (
        {{ newest_per('changes', key ~ ', tx_lsn', 'lsn desc') }}
    ),

    left_behind as (
        select * from ranked
        where place = 1
    ),

    line as (
        select
            {{ columns | join(', ') }},
            tx_lsn,
            committed_at as valid_from,
            op
        from left_behind
        {% if is_incremental() %}
        union all
        select
            {{ columns | join(', ') }},
            tx_lsn,
            valid_from,
            'open' as op
        from {{ this }}
        where is_current and {{ key }} in (select {{ key }} from left_behind)
        {% endif %}
    ),

    linked as (
        select
            line.*,
            lead(valid_from) over (partition by {{ key }} order by tx_lsn) as valid_to,
            lead(tx_lsn) over (partition by {{ key }} order by tx_lsn) as closed_lsn,
            lead(op) over (partition by {{ key }} order by tx_lsn) as next_op
        from line
    )

    select
        {{ columns | join(', ') }},
        valid_from,
        valid_to,
        valid_to is null as is_current,
        case when next_op = 'd' then valid_to end as deleted_at,
        tx_lsn,
        closed_lsn
    from linked
    where op <> 'd'
{%- endmacro %}


{# The state at the cut of the keys that changed. A deleted row is a state too, with its `deleted_at` (dbt's own hard deletes need
   the whole table to compare with); a row that was never seen alive is none. #}
{% macro state_at_cut(staging_model, columns) -%}
    {%- set key = columns[0] -%}
    with history as (
        select * from {{ ref(staging_model) }}
    ),

    changes as (
        select * from history
        where {{ window() }}
    ),

    ranked as (
        {{ newest_per('changes', key, 'tx_lsn desc, lsn desc') }}
    )

    select
        {{ columns | join(', ') }},
        case when op = 'd' then committed_at end as deleted_at,
        tx_lsn
    from ranked
    where
        place = 1
        and (
            op <> 'd'
            or exists (
                select 1 from history
                where history.{{ key }} = ranked.{{ key }} and history.tx_lsn < ranked.tx_lsn
            )
        )
{%- endmacro %}
