{# One row a transaction: what its END says each table owes, and how much of that has arrived. Only transactions touched by the
   new batches are written, so one that waits for days costs nothing while it waits.

   - An END at or below the highest END lsn is a repeat: ENDs lie in their topic in the order of their commit records in the WAL.
   - The same xid after 2^32 others is another transaction: it begins behind the END of its predecessor (`after_lsn`).
   - `committed_micros` is END's millisecond, made strictly increasing in commit order by single microseconds: two commits never
     share a moment, and a clock that steps back cannot turn history round. The initial snapshot lies before its first commit.
   - What incremental snapshots read has no END. It is put right behind the newest commit that is known: what it repeats is known
     by then or will be, and of what it does not, nothing older is known. ENDs lie at multiples of 8, so there is room for seven
     before the next; where there is none it waits. (`end_offset` tells them: -2; the initial snapshot has -1.) #}
{{ config(
    incremental_strategy='merge',
    unique_key=['xid', 'after_lsn'],
    indexes=[{'columns': ['xid', 'after_lsn'], 'unique': true}, {'columns': ['lsn']}, {'columns': ['batch']}],
    post_hook='{{ analyze_when_grown() }}',
) }}
{% set tables = var('tables') %}
{% set goes_on = execute and is_incremental() %}
{% set seen = scalar('select coalesce(max(batch), 0) from ' ~ this) if goes_on else 0 %}
{% set batch = scalar('select coalesce(max(batch), 0) from ' ~ ref('arrivals')) or 0 %}
{% set boundaries_read = "select coalesce(max(_offset), -1) from " ~ ref('arrivals') ~ " where op = '#' and source_table = 'boundaries' and batch = " %}
{% set high = {'lsn': -1, 'micros': 0} %}
{% if goes_on %}
    {% for row in run_query('select lsn, committed_micros from ' ~ this ~ ' where lsn is not null order by lsn desc limit 1').rows %}
        {% do high.update({'lsn': row[0], 'micros': row[1]}) %}
    {% endfor %}
{% endif %}
{% set snapshot = finished_snapshot() %}
{% set first_known = scalar('select min(committed_micros) from ' ~ this ~ ' where xid > 0') if goes_on and snapshot else none %}

with ends as (
    select
        cast(split_part({{ json_field('v', 'id') }}, ':', 1) as bigint) as xid,
        cast(split_part({{ json_field('v', 'id') }}, ':', 2) as bigint) as lsn,
        {{ json_field('v', 'ts_ms', 'integer') }} * 1000 as micros,
        {% for table in tables %}
        {{ rows_owed('v', table) }} as owed_{{ table }},
        {% endfor %}
        _offset
    from {{ source('raw', 'boundaries') }}
    where
        _offset > {{ scalar(boundaries_read ~ seen) }}
        and _offset <= {{ scalar(boundaries_read ~ batch) }}
        and {{ json_field('v', 'status') }} = 'END'
),

new_ends as (
    select * from ends
    where lsn > {{ high.lsn }}
),

ranked as (
    {{ newest_per('new_ends', 'lsn', '_offset') }}
),

firsts as (
    select
        ranked.*,
        row_number() over (order by lsn) as n
    from ranked
    where place = 1
),

timed as (
    select
        xid,
        lsn,
        _offset as end_offset,
        {% for table in tables %}
        owed_{{ table }},
        {% endfor %}
        greatest(max(micros - n) over (order by n rows unbounded preceding), {{ high.micros }}) + n as committed_micros
    from firsts
),

{% if snapshot %}
snapshot_read as (
    select
        cast({{ snapshot.xid }} as bigint) as xid,
        cast({{ snapshot.lsn }} as bigint) as lsn,
        cast(-1 as bigint) as end_offset,
        {% for table in tables %}
        cast(0 as bigint) as owed_{{ table }},
        {% endfor %}
        {% if first_known is not none %}
        least({{ snapshot.micros }}, {{ first_known }} - 1) as committed_micros
        {% else %}
        least({{ snapshot.micros }}, coalesce((select min(committed_micros) from timed), {{ snapshot.micros }} + 1) - 1) as committed_micros
        {% endif %}
),
{% endif %}

known_ends as (
    select * from timed
    {% if snapshot %}
    union all
    select * from snapshot_read
    {% endif %}
),

newest_end as (
    select
        greatest(coalesce(max(lsn), -1), {{ high.lsn }}) as lsn,
        greatest(coalesce(max(committed_micros), 0), {{ high.micros }}) as micros
    from known_ends
),

came as (
    select
        xid,
        {% for table in tables %}
        sum(case when source_table = '{{ table }}' then 1 else 0 end) as got_{{ table }},
        {% endfor %}
        min(lsn) as first_lsn
    from {{ ref('arrivals') }}
    where batch > {{ seen }} and batch <= {{ batch }} and op <> '#'
    group by xid
),

reads_without_end as (
    select xid from came
    where xid between -{{ batch }} and -1
    {% if goes_on %}
    union
    select xid from {{ this }}
    where xid between -{{ batch }} and -1 and lsn is null
    {% endif %}
),

numbered_reads as (
    select
        xid,
        row_number() over (order by xid desc) as n
    from reads_without_end
),

ended as (
    select * from known_ends
    union all
    select
        numbered_reads.xid,
        newest_end.lsn + numbered_reads.n as lsn,
        cast(-2 as bigint) as end_offset,
        {% for table in tables %}
        cast(0 as bigint) as owed_{{ table }},
        {% endfor %}
        newest_end.micros + numbered_reads.n as committed_micros
    from numbered_reads
    cross join newest_end
    where newest_end.lsn > 0 and mod(newest_end.lsn, 8) + numbered_reads.n < 8
),

touched as (
    select
        coalesce(came.xid, ended.xid) as xid,
        coalesce(came.first_lsn, ended.lsn) as first_lsn,
        ended.lsn,
        ended.end_offset,
        {% for table in tables %}
        ended.owed_{{ table }},
        coalesce(came.got_{{ table }}, 0) as got_{{ table }},
        {% endfor %}
        ended.committed_micros
    from came
    full outer join ended on came.xid = ended.xid
),

{% if goes_on %}
held as (
    select * from {{ this }}
    where xid in (select xid from touched)
),

held_ranked as (
    {{ newest_per('held', 'xid', 'after_lsn desc') }}
),

merged as (
    select
        touched.*,
        held_ranked.xid is not null as is_known,
        held_ranked.after_lsn as held_after_lsn,
        held_ranked.lsn as held_lsn,
        held_ranked.end_offset as held_end_offset,
        held_ranked.committed_micros as held_committed_micros,
        {% for table in tables %}
        held_ranked.owed_{{ table }} as held_owed_{{ table }},
        held_ranked.got_{{ table }} as held_got_{{ table }},
        {% endfor %}
        coalesce(held_ranked.lsn < touched.first_lsn, false) as is_successor
    from touched
    left join held_ranked
        on touched.xid = held_ranked.xid
        and held_ranked.place = 1
)

select
    xid,
    case when is_successor then held_lsn when is_known then held_after_lsn else 0 end as after_lsn,
    case when is_successor then lsn else coalesce(held_lsn, lsn) end as lsn,
    case when is_successor then end_offset else coalesce(held_end_offset, end_offset) end as end_offset,
    case when is_successor then committed_micros else coalesce(held_committed_micros, committed_micros) end as committed_micros,
    {% for table in tables %}
    case when is_successor then owed_{{ table }} else coalesce(held_owed_{{ table }}, owed_{{ table }}) end as owed_{{ table }},
    case when is_successor then 0 else coalesce(held_got_{{ table }}, 0) end + got_{{ table }} as got_{{ table }},
    {% endfor %}
    cast({{ batch }} as bigint) as batch
from merged
{% else %}
found as (
    select * from touched
)

select
    xid,
    cast(0 as bigint) as after_lsn,
    lsn,
    end_offset,
    committed_micros,
    {% for table in tables %}
    owed_{{ table }},
    got_{{ table }},
    {% endfor %}
    cast({{ batch }} as bigint) as batch
from found
{% endif %}
