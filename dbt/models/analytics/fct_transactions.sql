{{ config(
    unique_key='transaction_id',
    indexes=[
        {'columns': ['transaction_id'], 'unique': true},
        {'columns': ['tx_lsn']},
        {'columns': ['account_id']},
    ],
) }}

with changes as (
    select * from {{ ref('stg_bank__transactions') }}
    where {{ window() }}
),

ranked as (
    {{ newest_per('changes', 'transaction_id', 'tx_lsn desc, lsn desc') }}
)

select
    transaction_id,
    account_id,
    related_account_id,
    txn_type,
    direction,
    amount,
    balance_after,
    status,
    reference,
    description,
    created_at,
    posted_at,
    case when op = 'd' then committed_at end as deleted_at,
    tx_lsn
from ranked
where place = 1
