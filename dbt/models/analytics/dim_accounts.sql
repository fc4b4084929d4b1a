{{ config(
    unique_key=['account_id', 'tx_lsn'],
    indexes=[
        {'columns': ['account_id', 'tx_lsn'], 'unique': true},
        {'columns': ['is_current', 'account_id']},
        {'columns': ['tx_lsn']},
        {'columns': ['closed_lsn']},
    ],
) }}

{{ versions('stg_bank__accounts', 'account_id', [
    'account_id',
    'account_number',
    'customer_id',
    'account_type',
    'status',
    'currency',
    'balance',
    'interest_rate',
    'opened_at',
    'closed_at',
    'created_at',
    'updated_at',
]) }}
