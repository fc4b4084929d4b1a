{# Every row holds every rule: columns that must be present, accepted values, conditions by name. A failing row names the rules it
   breaks. One test for what would be a dozen, since a dbt node costs more than its scan. Rules look at one row each, so reading
   only what changed (`where: changed`) weakens nothing. #}
{% test rows_hold(model, key, present=[], accepted={}, rules={}) %}
    {% set conditions = {} %}
    {% for column in present %}
        {% do conditions.update({column ~ ' is null': column ~ ' is not null'}) %}
    {% endfor %}
    {% for column, values in accepted.items() %}
        {% do conditions.update({column ~ ' not accepted': column ~ " in ('" ~ values | join("', '") ~ "')"}) %}
    {% endfor %}
    {% do conditions.update(rules) %}

    with judged as (
        select
            {{ key }},
            {% for column in accepted %}
            {{ column }},
            {% endfor %}
            tx_lsn,
            {% for name, condition in conditions.items() %}
            case when {{ condition }} then '' else '{{ name }}; ' end{{ ' ||' if not loop.last }}
            {% endfor %}
            as broken
        from {{ model }}
    )

    select * from judged
    where broken <> ''
{% endtest %}
