{{ config(
    unique_key=['account_id', 'tx_lsn'],
    indexes=[
        {'columns': ['account_id', 'tx_lsn'], 'unique': true},
        {'columns': ['is_current', 'account_id']},
        {'columns': ['tx_lsn']},
        {'columns': ['closed_lsn']},
    ],
) }}

{{ versions('stg_bank__accounts', versioned_columns('accounts')) }}
