{% snapshot snap_accounts %}

{{ config(
    unique_key='account_id',
    strategy='check',
    check_cols=['tx_lsn'],
    indexes=[{'columns': ['dbt_valid_to', 'account_id']}, {'columns': ['tx_lsn']}],
) }}

{{ state_at_cut('stg_bank__accounts', versioned_columns('accounts')) }}

{% endsnapshot %}
