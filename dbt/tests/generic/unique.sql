{# One row a key. A new row may collide with an old one, so all rows of the keys that changed are counted; dbt's own would count
   the whole table, and with a `where` only the new rows among themselves. #}
{% test unique(model, column_name) %}
    select
        {{ column_name }},
        count(*) as rows_of_key
    from {{ model }}
    where {{ column_name }} in (select {{ column_name }} from {{ model }} where tx_lsn > {{ audit_mark('analytics') }})
    group by {{ column_name }}
    having count(*) > 1
{% endtest %}
