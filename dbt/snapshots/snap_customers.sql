{% snapshot snap_customers %}

{{ config(
    unique_key='customer_id',
    strategy='check',
    check_cols=['tx_lsn'],
    indexes=[{'columns': ['dbt_valid_to', 'customer_id']}, {'columns': ['tx_lsn']}],
) }}

{{ state_at_cut('stg_bank__customers', 'customer_id', [
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

{% endsnapshot %}
