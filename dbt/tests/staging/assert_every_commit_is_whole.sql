{# Staging holds, of every transaction up to the cut, exactly the rows its END owes: none missing, none twice, and none more than
   owed, which would be somebody else's: those are looked for in every commit that something has arrived for since, however old.
   Rows that a dead letter stands for are the cut's to write off, and only those. Of what incremental snapshots read, staging holds
   the rows of which nothing else is known. #}
{% set mark = audit_mark('staging') %}
{% set marked_batch = audit_mark('staging:batch') %}
{% set keys = {'customers': 'customer_id', 'accounts': 'account_id', 'transactions': 'transaction_id', 'ledger_entries': 'ledger_entry_id'} %}

with staged as (
    {% for table in var('tables') %}
    select
        tx_lsn,
        '{{ table }}' as source_table,
        count(*) as staged_rows,
        count(*) - count(distinct lsn || ':' || {{ keys.get(table, 'id') }} || op) as repeated
    from {{ ref('stg_bank__' ~ table) }}
    where tx_lsn > {{ mark }}
    group by tx_lsn
    {{ 'union all' if not loop.last }}
    {% endfor %}
),

newest_cut as (
    select * from {{ ref('cut') }}
    order by lsn desc
    limit 1
),

due as (
    {% for table in var('tables') %}
    select
        commits.lsn as tx_lsn,
        '{{ table }}' as source_table,
        case
            when commits.xid <= 0 then commits.got_{{ table }}
            when newest_cut.written_off_{{ table }} > 0 then least(commits.owed_{{ table }}, commits.got_{{ table }})
            else commits.owed_{{ table }}
        end as owed,
        commits.got_{{ table }} as arrived,
        commits.end_offset = -2 as is_read_again
    from {{ ref('commits') }} as commits
    inner join newest_cut on commits.lsn <= newest_cut.lsn
    where
        (commits.lsn > {{ mark }} and (commits.got_{{ table }} > 0 or commits.owed_{{ table }} > 0))
        or (commits.batch > {{ marked_batch }} and commits.xid > 0 and commits.got_{{ table }} > commits.owed_{{ table }})
    {{ 'union all' if not loop.last }}
    {% endfor %}
)

select
    coalesce(staged.tx_lsn, due.tx_lsn) as tx_lsn,
    coalesce(staged.source_table, due.source_table) as source_table,
    staged.staged_rows,
    due.owed,
    due.arrived,
    staged.repeated
from staged
full outer join due on staged.tx_lsn = due.tx_lsn and staged.source_table = due.source_table
where
    coalesce(staged.staged_rows, 0) > coalesce(due.owed, 0)
    or (coalesce(staged.staged_rows, 0) < coalesce(due.owed, 0) and not due.is_read_again)
    or staged.repeated > 0
    or due.arrived > due.owed
