{# What differs between PostgreSQL and Snowflake, and nothing else. #}


{# A field of a JSON column, typed: json_field('v', 'source.txId', 'integer').
   Money stays decimal, times are UTC without a zone, dates arrive as days since 1970. #}
{% macro json_field(column, path, type='text') -%}
    {{ return(adapter.dispatch('json_field')(column, path, type)) }}
{%- endmacro %}

{% macro postgres__json_field(column, path, type) -%}
    {%- set types = {'text': 'text', 'integer': 'bigint', 'money': 'numeric(18, 2)', 'rate': 'numeric(9, 4)', 'time': 'timestamp'} -%}
    {%- set steps = path.split('.') -%}
    {%- set text = '(' ~ column ~ (" ->> '" ~ path ~ "'" if steps | length == 1 else " #>> '{" ~ steps | join(', ') ~ "}'") ~ ')' -%}
    {{ "(date '1970-01-01' + " ~ text ~ '::integer)' if type == 'date' else text ~ '::' ~ types[type] }}
{%- endmacro %}

{% macro snowflake__json_field(column, path, type) -%}
    {%- set types = {'text': 'varchar', 'integer': 'number(38, 0)', 'money': 'number(18, 2)', 'rate': 'number(9, 4)', 'time': 'timestamp_ntz'} -%}
    {%- set value = column ~ ':' ~ path -%}
    {{ 'dateadd(day, ' ~ value ~ "::integer, '1970-01-01'::date)" if type == 'date' else value ~ '::' ~ types[type] }}
{%- endmacro %}


{# The row an event is about: `after`, or `before` where it was deleted. Not a coalesce: on Snowflake a JSON null is not NULL. #}
{% macro row_image(envelope, op) -%}
    {{ return(adapter.dispatch('row_image')(envelope, op)) }}
{%- endmacro %}

{% macro postgres__row_image(envelope, op) -%}
    ({{ envelope }} -> case when {{ op }} = 'd' then 'before' else 'after' end)
{%- endmacro %}

{% macro snowflake__row_image(envelope, op) -%}
    get({{ envelope }}, iff({{ op }} = 'd', 'before', 'after'))
{%- endmacro %}


{# How many rows of a table an END says its transaction changed. Its list has no particular order and leaves untouched tables out. #}
{% macro rows_owed(boundary, table) -%}
    {{ return(adapter.dispatch('rows_owed')(boundary, table)) }}
{%- endmacro %}

{% macro postgres__rows_owed(boundary, table) -%}
    coalesce(jsonb_path_query_first({{ boundary }}, '$.data_collections[*] ? (@.data_collection == "public.{{ table }}").event_count')::bigint, 0)
{%- endmacro %}

{# Snowflake unfolds no array within a scalar subquery. It writes a variant's fields in the order of their names, without spaces. #}
{% macro snowflake__rows_owed(boundary, table) -%}
    coalesce(
        nullif(
            regexp_substr(
                {{ boundary }}:data_collections::varchar, '"data_collection":"public[.]{{ table }}","event_count":([0-9]+)', 1, 1, 'e', 1
            ), ''
        )::integer, 0
    )
{%- endmacro %}


{% macro timestamp_from_micros(microseconds) -%}
    {{ return(adapter.dispatch('timestamp_from_micros')(microseconds)) }}
{%- endmacro %}

{% macro postgres__timestamp_from_micros(microseconds) -%}
    (timestamp '1970-01-01' + ({{ microseconds }}) * interval '1 microsecond')
{%- endmacro %}

{% macro snowflake__timestamp_from_micros(microseconds) -%}
    to_timestamp_ntz({{ microseconds }}, 6)
{%- endmacro %}


{# Statistics are taken again whenever a table has grown by a fifth since: autovacuum comes round once a minute, and the next model
   and its tests join the table now. Merges that touch little of a large table take none. #}
{% macro analyze_when_grown() -%}
    {{ return(adapter.dispatch('analyze_when_grown')()) }}
{%- endmacro %}

{% macro default__analyze_when_grown() -%}{%- endmacro %}

{% macro postgres__analyze_when_grown() -%}
    do $$ begin
        if (
            select pg_relation_size(oid) > 1.2 * relpages * current_setting('block_size')::bigint
            from pg_class where oid = '{{ this }}'::regclass
        ) then
            analyze {{ this }};
        end if;
    end $$
{%- endmacro %}
