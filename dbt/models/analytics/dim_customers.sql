{{ config(
    unique_key=['customer_id', 'tx_lsn'],
    indexes=[
        {'columns': ['customer_id', 'tx_lsn'], 'unique': true},
        {'columns': ['is_current', 'customer_id']},
        {'columns': ['tx_lsn']},
        {'columns': ['closed_lsn']},
    ],
) }}

{{ versions('stg_bank__customers', 'customer_id', [
    'customer_id',
    'first_name',
    'last_name',
    'email',
    'phone',
    'date_of_birth',
    'address',
    'status',
    'created_at',
    'updated_at',
]) }}
