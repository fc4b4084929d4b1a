{# The first value of the first row, or none. #}
{% macro scalar(query) -%}
    {% if execute %}
        {% set found = run_query(query).rows %}
        {{ return(found[0][0] if found | length else none) }}
    {% endif %}
{%- endmacro %}


{# A relation with its rows numbered within each key: `place = 1` is the newest. #}
{% macro newest_per(relation, key, newest_first) -%}
    select
        numbered.*,
        row_number() over (partition by {{ key }} order by {{ newest_first }}) as place
    from {{ relation }} as numbered
{%- endmacro %}
