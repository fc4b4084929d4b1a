{# A living row refers to a living row. It can break from both ends: by children that changed, and by children, however old, of
   parents that died. #}
{% test refers_to(model, key, to, parent_key, own_key, alive='deleted_at is null', parent_alive='deleted_at is null', parent_died='tx_lsn') %}
    {% set mark = audit_mark('analytics') %}

    with children as (
        select {{ own_key }}, {{ key }}, tx_lsn from {{ model }}
        where {{ alive }} and tx_lsn > {{ mark }}
        union all
        select {{ own_key }}, {{ key }}, tx_lsn from {{ model }}
        where
            {{ alive }}
            and tx_lsn <= {{ mark }}
            and {{ key }} in (select {{ parent_key }} from {{ to }} where {{ parent_died }} > {{ mark }} and deleted_at is not null)
    ),

    parents as (
        select {{ parent_key }} as parent from {{ to }}
        where {{ parent_alive }}
    )

    select children.* from children
    left join parents on children.{{ key }} = parents.parent
    where children.{{ key }} is not null and parents.parent is null
{% endtest %}
