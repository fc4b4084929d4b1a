{# The changes of one table whose END lies in this model's window, each once. `image`, the row they are about, is still JSON.

   What an incremental snapshot read is a change only where nothing else is known of the row: it was there before the capture. Of
   all other rows the changes have told every state, and newer ones than a read that arrives late. #}
{% macro changes(table) -%}
    {% set commits, arrivals = ref('commits'), ref('arrivals') %}
    {% set reads = scalar('select count(*) from ' ~ commits ~ ' where end_offset = -2 and ' ~ window('lsn')) if execute else 0 %}
    select
        events.tx_lsn,
        events.committed_at,
        events.tx_id,
        events.lsn,
        events.op,
        {{ row_image('events.v', 'events.op') }} as image
    from (
        select
            commits.lsn as tx_lsn,
            {{ timestamp_from_micros('commits.committed_micros') }} as committed_at,
            commits.xid as tx_id,
            arrivals.lsn,
            arrivals.op,
            envelopes.v
        from {{ ref('commits') }} as commits
        inner join {{ ref('arrivals') }} as arrivals
            on commits.xid = arrivals.xid
            and arrivals.lsn > commits.after_lsn
            and arrivals.lsn <= commits.lsn
            and arrivals.source_table = '{{ table }}'
        inner join {{ source('raw', table) }} as envelopes
            on arrivals._partition = envelopes._partition
            and arrivals._offset = envelopes._offset
        {% if reads %}
        left join (
            select
                known.key,
                min(case when known_commits.end_offset = -2 then known_commits.lsn else 0 end) as lsn
            from {{ arrivals }} as known
            inner join {{ commits }} as known_commits
                on known.xid = known_commits.xid
                and known.lsn > known_commits.after_lsn
                and known.lsn <= known_commits.lsn
            where known.source_table = '{{ table }}' and known_commits.lsn <= {{ upto() }}
            group by known.key
        ) as first_known on arrivals.key = first_known.key
        {% endif %}
        where
            {{ window('commits.lsn') }}
            {% if reads %}
            and (commits.end_offset <> -2 or commits.lsn = first_known.lsn)
            {% endif %}
    ) as events
{%- endmacro %}
