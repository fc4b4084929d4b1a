{% snapshot snap_customers %}

{{ config(
    unique_key='customer_id',
    strategy='check',
    check_cols=['tx_lsn'],
    indexes=[{'columns': ['dbt_valid_to', 'customer_id']}, {'columns': ['tx_lsn']}],
) }}

{{ state_at_cut('stg_bank__customers', versioned_columns('customers')) }}

{% endsnapshot %}
