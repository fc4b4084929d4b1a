{# The lanes (topic and partition) as the loader left them, and the initial snapshot as one unit. #}


{# The topics we read, as a relation (topic, source_table). Other topics of the lake are not ours to follow. #}
{% macro followed_topics() -%}
    {%- for table in var('tables') %}
    select '{{ var('topic_prefix') }}.public.{{ table }}' as topic, '{{ table }}' as source_table
    union all
    {%- endfor %}
    select '{{ var('topic_prefix') }}.transaction' as topic, 'boundaries' as source_table
{%- endmacro %}


{# → the number of the next batch, and for each lane how far the last batch went (`since`) and what has landed (`upto`). #}
{% macro landed_lanes() -%}
    {% if not execute %}
        {{ return((0, [])) }}
    {% endif %}
    {% set query %}
        with last_batch as (
            {% if is_incremental() %}
            select source_table, _partition, _offset, batch
            from {{ this }}
            where op = '#' and batch = (select max(batch) from {{ this }})
            {% else %}
            select null as source_table, 0 as _partition, 0 as _offset, 0 as batch
            where false
            {% endif %}
        ),

        followed as ({{ followed_topics() }}),

        landed as (
            select followed.source_table, loads.partition, max(loads.last_offset) as upto
            from {{ source('raw', '_loads') }} as loads
            inner join followed on loads.topic = followed.topic
            group by followed.source_table, loads.partition
        )

        select
            coalesce(landed.source_table, last_batch.source_table) as source_table,
            coalesce(landed.partition, last_batch._partition) as lane_partition,
            coalesce(last_batch._offset, -1) as since,
            coalesce(landed.upto, last_batch._offset) as upto,
            coalesce((select max(batch) from last_batch), 0) + 1 as next_batch
        from last_batch
        full outer join landed on last_batch.source_table = landed.source_table and last_batch._partition = landed.partition
    {% endset %}
    {% set rows = run_query(query).rows %}
    {% set lanes = [] %}
    {% for row in rows %}
        {% do lanes.append({'table': row[0], 'partition': row[1], 'since': row[2], 'upto': row[3], 'has_news': row[3] > row[2]}) %}
    {% endfor %}
    {{ return((rows[0][4] if rows | length else 1, lanes)) }}
{%- endmacro %}


{# The initial snapshot as a transaction: {xid, lsn, micros} in the one run in which it turns out to be whole, else none.
   Whole is: every lane has been read past the end offset that was sampled after the snapshot had ended. Of several attempts the
   one that ended is meant (xids of reads are -lsn), also where it found nothing left to read; the others are transactions that
   never end. Where nobody knows which it was, it is the newest. #}
{% macro finished_snapshot() -%}
    {% if not execute or var('snapshot') == 'never' %}
        {{ return(none) }}
    {% endif %}
    {% if is_incremental() and scalar('select max(lsn) from ' ~ this ~ ' where end_offset = -1') is not none %}
        {{ return(none) }}
    {% endif %}
    {% set arrivals = ref('arrivals') %}
    {% set whole %}
        with followed as ({{ followed_topics() }})

        select count(*) > 0 and count(*) = sum(case when coalesce(lanes._offset, -1) >= ends.end_offset - 1 then 1 else 0 end)
        from {{ source('raw', '_snapshot_ends') }} as ends
        inner join followed on ends.topic = followed.topic
        left join {{ arrivals }} as lanes
            on lanes.op = '#'
            and lanes.batch = (select max(batch) from {{ arrivals }})
            and lanes.source_table = followed.source_table
            and lanes._partition = ends.partition
    {% endset %}
    {% if not scalar(whole) %}
        {{ return(none) }}
    {% endif %}
    {% set read_at = scalar('select max(lsn) from ' ~ source('raw', '_snapshot_ends')) %}
    {% set xid = scalar(
        'select coalesce(min(xid), 0) from ' ~ arrivals ~ ' where lsn > 1 and xid ' ~ ('< 0' if read_at is none else '= -' ~ read_at)
    ) %}
    {% set taken = namespace(micros=0) %}
    {% for table in var('tables') if not taken.micros %}
        {% set taken.micros = scalar(
            'select max(' ~ json_field('envelopes.v', 'source.ts_us', 'integer') ~ ') from ' ~ arrivals ~ ' as reads'
            ~ ' inner join ' ~ source('raw', table) ~ ' as envelopes'
            ~ ' on envelopes._partition = reads._partition and envelopes._offset = reads._offset'
            ~ " where reads.source_table = '" ~ table ~ "' and reads.xid = " ~ xid
        ) or 0 %}
    {% endfor %}
    {{ return({'xid': xid, 'lsn': -xid, 'micros': taken.micros}) }}
{%- endmacro %}


{# {table: number of records that could not be decoded}, within what the last batch read. #}
{% macro dead_letters() -%}
    {% set counts = {} %}
    {% if execute %}
        {% set lanes = ref('arrivals') %}
        {% set query %}
            with followed as ({{ followed_topics() }})

            select followed.source_table, count(*) as letters
            from {{ source('raw', '_rejected') }} as rejected
            inner join followed on rejected.topic = followed.topic
            inner join {{ lanes }} as lanes
                on lanes.op = '#'
                and lanes.batch = (select max(batch) from {{ lanes }})
                and lanes.source_table = followed.source_table
                and lanes._partition = rejected.partition
                and lanes._offset >= rejected."offset"
            group by followed.source_table
        {% endset %}
        {% for row in run_query(query).rows %}
            {% do counts.update({row[0]: row[1]}) %}
        {% endfor %}
    {% else %}
        {% do [ref('arrivals'), source('raw', '_rejected')] %}
    {% endif %}
    {{ return(counts) }}
{%- endmacro %}


{# How many dead letters of a table say that they belong to the commit at hand. #}
{% macro dead_letters_of_commit(table) -%}
    (
        select count(distinct rejected.lsn || ':' || rejected.key || rejected.op)
        from {{ source('raw', '_rejected') }} as rejected
        where
            rejected.topic = '{{ var('topic_prefix') }}.public.{{ table }}'
            and rejected.tx_id = commits.xid
            and rejected.lsn > commits.after_lsn
            and rejected.lsn <= commits.lsn
    )
{%- endmacro %}


{# The lsn that every lane of a table has gone beyond: each ends with a change of a later transaction. A lane that has shown
   nothing yet may still have everything under way. #}
{% macro passed_by_every_lane(table) -%}
    {% set lanes = ref('arrivals') %}
    {% set query %}
        select min(coalesce((
            select {{ json_field('envelopes.v', 'source.lsn', 'integer') }}
            from {{ source('raw', table) }} as envelopes
            where
                envelopes._partition = lanes._partition
                and envelopes._offset <= lanes._offset
                and {{ json_field('envelopes.v', 'source.lsn', 'integer') }} is not null
            order by envelopes._offset desc
            limit 1
        ), -1))
        from {{ lanes }} as lanes
        where lanes.op = '#' and lanes.source_table = '{{ table }}' and lanes.batch = (select max(batch) from {{ lanes }})
    {% endset %}
    {% set lsn = scalar(query) %}
    {{ return(-1 if lsn is none else lsn) }}
{%- endmacro %}
