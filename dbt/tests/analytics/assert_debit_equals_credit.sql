{# Σ debit = Σ credit for every transaction. Read are the transactions that an entry changed after the mark belongs to now, or ever
   belonged to. #}
{% set mark = audit_mark('analytics') %}
{% set history = ref('stg_bank__ledger_entries') %}

with entries as (
    select * from {{ ref('fct_ledger_entries') }}
    where
        deleted_at is null
        and (
            {{ mark }} < 0
            or transaction_id in (
                select staged.transaction_id from {{ history }} as staged
                inner join {{ history }} as changed on staged.ledger_entry_id = changed.ledger_entry_id
                where changed.tx_lsn > {{ mark }}
            )
        )
)

select
    transaction_id,
    sum(case entry_type when 'DEBIT' then amount else 0 end) as debit,
    sum(case entry_type when 'CREDIT' then amount else 0 end) as credit
from entries
group by transaction_id
having sum(case entry_type when 'DEBIT' then amount else -amount end) <> 0
