{# What the warehouse knew at a cut (the dbt snapshot) is a version of the history, with the same values, and the open ones agree. #}
{% test snapshot_is_a_version(model, dimension, key, same) %}
    {% set mark = audit_mark('analytics') %}

    with known as (
        select * from {{ model }}
        where tx_lsn > {{ mark }}
    ),

    versions as (
        select * from {{ dimension }}
        where tx_lsn > {{ mark }}
    )

    select
        known.{{ key }},
        known.tx_lsn,
        known.deleted_at
    from known
    left join versions
        on known.{{ key }} = versions.{{ key }}
        and known.tx_lsn = versions.tx_lsn
    where
        (
            known.deleted_at is null
            and (
                versions.{{ key }} is null
                {% for column in same %}
                or versions.{{ column }} is distinct from known.{{ column }}
                {% endfor %}
                or (known.dbt_valid_to is null) <> versions.is_current
            )
        )
        or (
            known.deleted_at is not null
            and not exists (
                select 1 from {{ dimension }} as closed
                where
                    closed.{{ key }} = known.{{ key }}
                    and closed.closed_lsn = known.tx_lsn
                    and closed.deleted_at = known.deleted_at
            )
        )
{% endtest %}
