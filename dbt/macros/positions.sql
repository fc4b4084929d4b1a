{# Where each model is, as the LSN of a commit. This is why a run costs what is new, not what is old.

   Positions are read first and written into the SQL as literals: a planner estimates `tx_lsn > 123` from its histogram, and
   Snowflake prunes partitions with it. A subquery in that place gets the default guess, a third of the table, and reads history.

   A position belongs to one model, never to "the previous run": where one model of a run fails, the next run still owes it
   that window. A run that dies anywhere is made good by the next. #}


{# One row a model (how far it has come) and one row a tested layer (`passed:…`, see audit.sql). #}
{% macro positions() -%}
    {{ return(api.Relation.create(database=target.database, schema='staging', identifier='positions')) }}
{%- endmacro %}

{% macro create_positions() -%}
    create table if not exists {{ positions() }} (name varchar, lsn bigint)
{%- endmacro %}


{# How far this model has come: its newest row (one statement wrote its whole window, so that is exact), or its note where the
   window held nothing for it. #}
{% macro since() -%}
    {% if not execute or load_relation(this) is none or (model.resource_type == 'model' and not is_incremental()) %}
        {{ return(-1) }}
    {% endif %}
    {{ return(scalar(
        'select greatest('
        ~ 'coalesce((select max(tx_lsn) from ' ~ this ~ '), -1), '
        ~ 'coalesce((select max(lsn) from ' ~ positions() ~ " where name = '" ~ this.name ~ "'), -1))"
    )) }}
{%- endmacro %}


{# How far it may go. Staging: to the cut. All else: to where every staging model is, so that analytics is never torn, even when
   it runs alone after a staging model has failed. The `ref`s also tell dbt the order. #}
{% macro upto() -%}
    {% if 'staging' in model.fqn %}
        {% set cut = ref('cut') %}
        {{ return((scalar('select coalesce(max(lsn), -1) from ' ~ cut) if execute else -1)) }}
    {% endif %}
    {% set names = [] %}
    {% for table in var('tables') %}
        {% do names.append(ref('stg_bank__' ~ table).identifier) %}
    {% endfor %}
    {{ return((scalar(
        'select case when count(*) = ' ~ names | length ~ ' then min(lsn) else -1 end from ' ~ positions()
        ~ " where name in ('" ~ names | join("', '") ~ "')"
    ) if execute else -1)) }}
{%- endmacro %}


{# What this run adds to the model. #}
{% macro window(column='tx_lsn') -%}
    {{ column }} > {{ since() }} and {{ column }} <= {{ upto() }}
{%- endmacro %}


{# Post-hook. On PostgreSQL it commits with the model's rows; elsewhere after them, which only means that a window may be seen
   twice: models that append ask their newest row, models that merge repeat. #}
{% macro note_position() -%}
    {% if execute %}
        {{ merge_positions(["select '" ~ this.name ~ "' as name, cast(" ~ upto() ~ ' as bigint) as lsn']) }}
    {% endif %}
{%- endmacro %}

{% macro merge_positions(notes) -%}
    merge into {{ positions() }} as held
    using ({{ notes | join(' union all ') }}) as told
        on held.name = told.name
    when matched then update set lsn = told.lsn
    when not matched then insert (name, lsn) values (told.name, told.lsn)
{%- endmacro %}
