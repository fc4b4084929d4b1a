{{ config(
    unique_key='ledger_entry_id',
    indexes=[
        {'columns': ['ledger_entry_id'], 'unique': true},
        {'columns': ['tx_lsn']},
        {'columns': ['account_id']},
        {'columns': ['transaction_id']},
    ],
) }}

with changes as (
    select * from {{ ref('stg_bank__ledger_entries') }}
    where {{ window() }}
),

ranked as (
    {{ newest_per('changes', 'ledger_entry_id', 'tx_lsn desc, lsn desc') }}
)

select
    ledger_entry_id,
    transaction_id,
    account_id,
    entry_type,
    amount,
    created_at,
    case when op = 'd' then committed_at end as deleted_at,
    tx_lsn
from ranked
where place = 1
