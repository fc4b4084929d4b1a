{{ config(
    unique_key=['customer_id', 'tx_lsn'],
    indexes=[
        {'columns': ['customer_id', 'tx_lsn'], 'unique': true},
        {'columns': ['is_current', 'customer_id']},
        {'columns': ['tx_lsn']},
        {'columns': ['closed_lsn']},
    ],
) }}

{{ versions('stg_bank__customers', versioned_columns('customers')) }}
