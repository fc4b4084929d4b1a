{# A repeated END says what the first one said. Read are the ENDs behind that of the mark. #}
{% set marked_offset = scalar(
    'select max(end_offset) from ' ~ ref('commits') ~ ' where lsn = (select max(lsn) from ' ~ ref('commits')
    ~ ' where end_offset >= -1 and lsn <= ' ~ audit_mark('staging') ~ ')'
) %}

with later_ends as (
    select
        cast(split_part({{ json_field('v', 'id') }}, ':', 2) as bigint) as lsn,
        {% for table in var('tables') %}
        {{ rows_owed('v', table) }} as owed_{{ table }},
        {% endfor %}
        _offset
    from {{ source('raw', 'boundaries') }}
    where
        _offset > {{ -1 if marked_offset is none else marked_offset }}
        and {{ json_field('v', 'status') }} = 'END'
)

select
    later_ends.*,
    {% for table in var('tables') %}
    commits.owed_{{ table }} as first_owed_{{ table }}{{ ',' if not loop.last }}
    {% endfor %}
from later_ends
inner join {{ ref('commits') }} as commits on later_ends.lsn = commits.lsn
where
    {% for table in var('tables') %}
    later_ends.owed_{{ table }} <> commits.owed_{{ table }}{{ ' or' if not loop.last }}
    {% endfor %}
