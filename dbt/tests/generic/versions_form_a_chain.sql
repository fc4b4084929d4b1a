{# SCD2: each version ends where the next begins, at most one is open, nothing overlaps, and a hole only follows a deletion.
   Read are the versions opened or closed after the mark, and whatever is open of their keys: a version that should have been
   closed, and was not, is found that way. #}
{% test versions_form_a_chain(model, key) %}
    {% set mark = audit_mark('analytics') %}

    with touched as (
        select * from {{ model }}
        where tx_lsn > {{ mark }} or closed_lsn > {{ mark }}
    ),

    audited as (
        select * from touched
        union
        select * from {{ model }}
        where is_current and {{ key }} in (select {{ key }} from touched)
    ),

    linked as (
        select
            {{ key }},
            tx_lsn,
            closed_lsn,
            valid_from,
            valid_to,
            is_current,
            deleted_at,
            lead(valid_from) over (partition by {{ key }} order by tx_lsn) as next_from,
            lead(tx_lsn) over (partition by {{ key }} order by tx_lsn) as next_lsn
        from audited
    )

    select * from linked
    where
        valid_to <= valid_from
        or is_current <> (valid_to is null)
        or (valid_to is null) <> (closed_lsn is null)
        or (valid_to is null and next_from is not null)
        or (deleted_at is null and valid_to is not null and (next_from is null or valid_to <> next_from or closed_lsn <> next_lsn))
        or (deleted_at is not null and (valid_to is null or deleted_at <> valid_to or next_from < valid_to))
{% endtest %}
