{# How far whole transactions go: just before the first that is short. A row each time it moves.
   PostgreSQL walks the index on lsn from the last cut and stops at the first short one: a run costs what is short or new.

   A row that could not be decoded counts as arrived. Only while there are dead letters, a short commit is written off
   - where its missing rows are dead letters that still say whose they are,
   - or, since most say nothing, where every lane of the table has already shown a later commit (nothing is under way any more),
   and in all never more rows than there are dead letters (`written_off_<table>` is the running total). A row that is missing
   without a dead letter is never written off: the cut stands still, which is an alarm. #}
{{ config(incremental_strategy='append') }}
{% set tables = var('tables') %}
{% set last = {'lsn': -1} %}
{% if execute and is_incremental() %}
    {% for row in run_query('select * from ' ~ this ~ ' order by lsn desc limit 1').rows %}
        {% do last.update(row.dict()) %}
    {% endfor %}
{% endif %}
{% set letters = dead_letters() %}
{% set spent, dead, passed = {}, {}, {} %}
{% for table in tables %}
    {% do spent.update({table: last.get('written_off_' ~ table, 0)}) %}
    {% if letters.get(table, 0) > spent[table] %}
        {% do dead.update({table: letters[table]}) %}
        {% do passed.update({table: passed_by_every_lane(table)}) %}
    {% endif %}
{% endfor %}

with short as (
    select
        lsn,
        {% for table in tables %}
        greatest(owed_{{ table }} - got_{{ table }}, 0) as missing_{{ table }},
        {{ dead_letters_of_commit(table) if table in dead else 0 }} as dead_{{ table }}{{ ',' if not loop.last }}
        {% endfor %}
    from {{ ref('commits') }} as commits
    where
        lsn > {{ last.lsn }}
        and ({% for table in tables %}got_{{ table }} < owed_{{ table }}{{ ' or ' if not loop.last }}{% endfor %})
    {% if not dead %}
    order by lsn
    limit 1
    {% endif %}
),

added_up as (
    select
        short.*,
        {% for table in tables %}
        {{ spent[table] }} + sum(missing_{{ table }}) over (order by lsn) as due_{{ table }}{{ ',' if not loop.last }}
        {% endfor %}
    from short
),

in_flight as (
    select lsn from added_up
    where
        {% for table in tables %}
        {% if table in dead %}
        (missing_{{ table }} > 0 and due_{{ table }} > {{ dead[table] }})
        or (missing_{{ table }} > dead_{{ table }} and lsn >= {{ passed[table] }})
        {% else %}
        missing_{{ table }} > 0
        {% endif %}
        {{ 'or' if not loop.last }}
        {% endfor %}
    order by lsn
    limit 1
),

whole as (
    select
        lsn,
        committed_micros
    from {{ ref('commits') }}
    where
        lsn > greatest({{ last.lsn }}, 0)
        and lsn < coalesce((select in_flight.lsn from in_flight), 9223372036854775807)
    order by lsn desc
    limit 1
)

select
    lsn,
    {{ timestamp_from_micros('committed_micros') }} as committed_at,
    cast({{ last.lsn }} as bigint) as previous_lsn,
    current_timestamp as advanced_at,
    {% for table in tables %}
    cast(coalesce((select max(due_{{ table }}) from added_up where added_up.lsn <= whole.lsn), {{ spent[table] }}) as bigint) as written_off_{{ table }}
    {{- ',' if not loop.last }}
    {% endfor %}
from whole
{% if var('snapshot') != 'never' %}
where exists (select 1 from {{ ref('commits') }} where end_offset = -1)
{% endif %}
