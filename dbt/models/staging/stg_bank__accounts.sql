{{ config(indexes=[{'columns': ['tx_lsn']}, {'columns': ['account_id', 'tx_lsn', 'lsn']}]) }}

with changes as (
    {{ changes('accounts') }}
)

select
    tx_lsn,
    committed_at,
    tx_id,
    lsn,
    op,
    {{ json_field('image', 'id', 'integer') }} as account_id,
    {{ json_field('image', 'account_number') }} as account_number,
    {{ json_field('image', 'customer_id', 'integer') }} as customer_id,
    {{ json_field('image', 'account_type') }} as account_type,
    {{ json_field('image', 'status') }} as status,
    {{ json_field('image', 'currency') }} as currency,
    {{ json_field('image', 'balance', 'money') }} as balance,
    {{ json_field('image', 'interest_rate', 'rate') }} as interest_rate,
    {{ json_field('image', 'opened_at', 'time') }} as opened_at,
    {{ json_field('image', 'closed_at', 'time') }} as closed_at,
    {{ json_field('image', 'created_at', 'time') }} as created_at,
    {{ json_field('image', 'updated_at', 'time') }} as updated_at
from changes
