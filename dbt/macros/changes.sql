{# The changes of one table whose END lies in this model's window, each once. `image`, the row they are about, is still JSON. #}
{% macro changes(table) -%}
    select
        events.tx_lsn,
        events.committed_at,
        events.tx_id,
        events.lsn,
        events.op,
        {{ row_image('events.v', 'events.op') }} as image
    from (
        select
            commits.lsn as tx_lsn,
            {{ timestamp_from_micros('commits.committed_micros') }} as committed_at,
            commits.xid as tx_id,
            arrivals.lsn,
            arrivals.op,
            envelopes.v
        from {{ ref('commits') }} as commits
        inner join {{ ref('arrivals') }} as arrivals
            on commits.xid = arrivals.xid
            and arrivals.lsn > commits.after_lsn
            and arrivals.lsn <= commits.lsn
            and arrivals.source_table = '{{ table }}'
        inner join {{ source('raw', table) }} as envelopes
            on arrivals._partition = envelopes._partition
            and arrivals._offset = envelopes._offset
        where {{ window('commits.lsn') }}
    ) as events
{%- endmacro %}
