{{ config(indexes=[{'columns': ['tx_lsn']}, {'columns': ['ledger_entry_id', 'tx_lsn', 'lsn']}]) }}

with changes as (
    {{ changes('ledger_entries') }}
)

select
    tx_lsn,
    committed_at,
    tx_id,
    lsn,
    op,
    {{ json_field('image', 'id', 'integer') }} as ledger_entry_id,
    {{ json_field('image', 'transaction_id', 'integer') }} as transaction_id,
    {{ json_field('image', 'account_id', 'integer') }} as account_id,
    {{ json_field('image', 'entry_type') }} as entry_type,
    {{ json_field('image', 'amount', 'money') }} as amount,
    {{ json_field('image', 'created_at', 'time') }} as created_at
from changes
