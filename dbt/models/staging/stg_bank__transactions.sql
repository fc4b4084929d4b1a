{{ config(indexes=[{'columns': ['tx_lsn']}, {'columns': ['transaction_id', 'tx_lsn', 'lsn']}]) }}

with changes as (
    {{ changes('transactions') }}
)

select
    tx_lsn,
    committed_at,
    tx_id,
    lsn,
    op,
    {{ json_field('image', 'id', 'integer') }} as transaction_id,
    {{ json_field('image', 'account_id', 'integer') }} as account_id,
    {{ json_field('image', 'related_account_id', 'integer') }} as related_account_id,
    {{ json_field('image', 'txn_type') }} as txn_type,
    {{ json_field('image', 'direction') }} as direction,
    {{ json_field('image', 'amount', 'money') }} as amount,
    {{ json_field('image', 'balance_after', 'money') }} as balance_after,
    {{ json_field('image', 'status') }} as status,
    {{ json_field('image', 'reference') }} as reference,
    {{ json_field('image', 'description') }} as description,
    {{ json_field('image', 'created_at', 'time') }} as created_at,
    {{ json_field('image', 'posted_at', 'time') }} as posted_at
from changes
