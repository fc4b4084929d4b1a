{# Every change that has landed, once: who committed it, what it is, where it lies. Narrow and append-only; a run costs the rows
   that landed since the last batch.

   - A lane is read up to what the loader had committed when the run began, and that limit is written by the same statement
     (op '#', one row a lane and batch): position and rows cannot part.
   - A repeat has the same (xid, lsn, key, op). The lsn also tells a wrapped xid from its predecessor.
   - Reads of one attempt at the initial snapshot are a transaction of their own, numbered -lsn: an attempt that died is a
     transaction that never ends.
   - Reads of an incremental snapshot tell neither: those of one batch are a transaction of their own, numbered -batch, each at
     lsn 1. No LSN is as small as a batch's number. #}
{{ config(
    incremental_strategy='append',
    indexes=[{'columns': ['xid', 'lsn', 'key']}, {'columns': ['batch']}],
    pre_hook='{{ create_positions() }}',
    post_hook='{{ analyze_when_grown() }}',
) }}
{% set batch, lanes = landed_lanes() %}
{% set news = lanes | selectattr('has_news') | list %}

with envelopes as (
    {% for lane in news if lane.table in var('tables') %}
    select
        '{{ lane.table }}' as source_table,
        v,
        {{ json_field('v', 'op') }} as op,
        {{ json_field('v', 'source.txId', 'integer') }} as tx_id,
        {{ json_field('v', 'source.lsn', 'integer') }} as lsn,
        _partition,
        _offset
    from {{ source('raw', lane.table) }}
    where _partition = {{ lane.partition }} and _offset > {{ lane.since }} and _offset <= {{ lane.upto }} and v is not null
    union all
    {% endfor %}
    select
        'none' as source_table,
        v,
        '#' as op,
        0 as tx_id,
        0 as lsn,
        _partition,
        _offset
    from {{ source('raw', var('tables')[0]) }}
    where false
),

changes as (
    select
        source_table,
        case when op = 'r' then coalesce(-lsn, -{{ batch }}) else tx_id end as xid,
        case when op = 'r' then coalesce(lsn, 1) else lsn end as lsn,
        coalesce({{ json_field(row_image('v', 'op'), 'id', 'integer') }}, 0) as key,
        op,
        _partition,
        _offset
    from envelopes
),

once as (
    select
        source_table,
        xid,
        lsn,
        key,
        op,
        min(_partition) as _partition,
        min(_offset) as _offset
    from changes
    group by source_table, xid, lsn, key, op
)

select
    source_table,
    xid,
    lsn,
    key,
    op,
    _partition,
    _offset,
    cast({{ batch }} as bigint) as batch
from once
{% if is_incremental() %}
where not exists (
    select 1 from {{ this }} as known
    where
        known.xid = once.xid
        and known.lsn = once.lsn
        and known.key = once.key
        and known.op = once.op
        and known.source_table = once.source_table
)
{% endif %}
{% for lane in lanes if news %}
union all
select
    '{{ lane.table }}' as source_table,
    null as xid,
    null as lsn,
    null as key,
    '#' as op,
    {{ lane.partition }} as _partition,
    {{ lane.upto }} as _offset,
    {{ batch }} as batch
{% endfor %}
