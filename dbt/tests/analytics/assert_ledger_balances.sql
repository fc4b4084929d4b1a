{# Balance = Σ debit − Σ credit for every account.
   It held at the mark, so it holds now exactly if both sides have moved by the same since. The ledger: entries changed after the mark
   at what they are worth now, less what the same entries were worth at the mark. The balance: versions opened or closed after it
   likewise. With the mark at -1 (first run, full audit) these are the whole sums. #}
{% set mark = audit_mark('analytics') %}
{% set history = ref('stg_bank__ledger_entries') %}

with entries_now as (
    select
        account_id,
        case entry_type when 'DEBIT' then amount else -amount end as amount
    from {{ ref('fct_ledger_entries') }}
    where tx_lsn > {{ mark }} and deleted_at is null
),

entries_of_then as (
    select * from {{ history }}
    where
        tx_lsn <= {{ mark }}
        and ledger_entry_id in (
            select changed.ledger_entry_id from {{ history }} as changed
            where changed.tx_lsn > {{ mark }}
        )
),

ranked as (
    {{ newest_per('entries_of_then', 'ledger_entry_id', 'tx_lsn desc, lsn desc') }}
),

moved as (
    select * from entries_now
    union all
    select
        account_id,
        case entry_type when 'DEBIT' then -amount else amount end as amount
    from ranked
    where place = 1 and op <> 'd'
),

ledger as (
    select
        account_id,
        cast(sum(amount) as numeric(38, 2)) as amount
    from moved
    where account_id is not null
    group by account_id
),

balances as (
    select
        account_id,
        cast(
            sum(case when is_current then balance else 0 end) - sum(case when tx_lsn <= {{ mark }} then balance else 0 end) as numeric(38, 2)
        ) as amount
    from {{ ref('dim_accounts') }}
    where tx_lsn > {{ mark }} or closed_lsn > {{ mark }}
    group by account_id
)

select
    coalesce(ledger.account_id, balances.account_id) as account_id,
    coalesce(ledger.amount, 0) as ledger_moved,
    coalesce(balances.amount, 0) as balance_moved
from ledger
full outer join balances on ledger.account_id = balances.account_id
where coalesce(ledger.amount, 0) <> coalesce(balances.amount, 0)
