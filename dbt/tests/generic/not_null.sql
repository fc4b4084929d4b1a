{# dbt's own, but a failing row says where it came from: a key that is null tells nothing. #}
{% test not_null(model, column_name) %}
    select
        {{ column_name }},
        tx_lsn
    from {{ model }}
    where {{ column_name }} is null
{% endtest %}
