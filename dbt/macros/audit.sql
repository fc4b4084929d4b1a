{# What a test reads: everything that changed after the audit mark, the newest cut at which *every* test of its layer passed.
   Not "what this run changed": a bad row would leave the tests' sight with the next run and be forgotten.
   `--vars '{full_audit: true}'` reads everything. #}
{% macro audit_mark(layer) -%}
    {% if not execute or var('full_audit') %}
        {{ return(-1) }}
    {% endif %}
    {{ return(scalar('select coalesce(max(lsn), -1) from ' ~ positions() ~ " where name = 'passed:" ~ layer ~ "'")) }}
{%- endmacro %}


{# on-run-end: moves the mark of a layer whose every test was in this run and passed, to where the layer's models are. #}
{% macro remember_passed_layers(results) -%}
    {% if not execute %}
        {{ return('') }}
    {% endif %}
    {% set commits = api.Relation.create(database=target.database, schema='staging', identifier='commits') %}
    {% set notes = [] %}
    {% for layer in ['staging', 'analytics'] %}
        {% set names = [] %}
        {% set tests = [] %}
        {% for node in graph.nodes.values() %}
            {% if node.resource_type == 'test' and layer in node.tags %}
                {% do tests.append(node.unique_id) %}
            {% elif node.resource_type == 'model' and node.fqn[1] == layer %}
                {% do names.append(node.name) %}
            {% elif node.resource_type == 'snapshot' and layer == 'analytics' %}
                {% do names.append(node.name) %}
            {% endif %}
        {% endfor %}
        {% set passed = [] %}
        {% for result in results if result.node.unique_id in tests and result.status | string in ['pass', 'warn'] %}
            {% do passed.append(result.node.unique_id) %}
        {% endfor %}
        {% if tests and passed | length == tests | length %}
            {% do notes.append(
                "select 'passed:" ~ layer ~ "' as name, min(lsn) as lsn from " ~ positions() ~ " where name in ('" ~ names | join("', '") ~ "')"
            ) %}
            {% if layer == 'staging' %}
                {# Old commits are looked at again when something arrives for them: batches, too, have been seen up to here. #}
                {% do notes.append("select 'passed:staging:batch' as name, coalesce(max(batch), 0) as lsn from " ~ commits) %}
            {% endif %}
        {% endif %}
    {% endfor %}
    {{ return(merge_positions(notes) if notes else '') }}
{%- endmacro %}


{# Lets a test in a .yml say `where: changed` (rows written after the mark) or `where: touched` (versions opened or closed after it). #}
{% macro get_where_subquery(relation) -%}
    {% set where = config.get('where', '') %}
    {% if not where %}
        {{ return(relation) }}
    {% endif %}
    {% if where in ['changed', 'touched'] %}
        {% set mark = audit_mark('staging' if relation.schema == 'staging' else 'analytics') %}
        {% set where = 'tx_lsn > ' ~ mark ~ (' or closed_lsn > ' ~ mark if where == 'touched' else '') %}
    {% endif %}
    {{ return('(select * from ' ~ relation ~ ' where ' ~ where ~ ') as audited') }}
{%- endmacro %}
