{% snapshot snap_accounts %}

{{ config(
    unique_key='account_id',
    strategy='check',
    check_cols=['tx_lsn'],
    indexes=[{'columns': ['dbt_valid_to', 'account_id']}, {'columns': ['tx_lsn']}],
) }}

{{ state_at_cut('stg_bank__accounts', 'account_id', [
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

{% endsnapshot %}
