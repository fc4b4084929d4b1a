{{ config(indexes=[{'columns': ['tx_lsn']}, {'columns': ['customer_id', 'tx_lsn', 'lsn']}]) }}

with changes as (
    {{ changes('customers') }}
)

select
    tx_lsn,
    committed_at,
    tx_id,
    lsn,
    op,
    {{ json_field('image', 'id', 'integer') }} as customer_id,
    {{ json_field('image', 'first_name') }} as first_name,
    {{ json_field('image', 'last_name') }} as last_name,
    {{ json_field('image', 'email') }} as email,
    {{ json_field('image', 'phone') }} as phone,
    {{ json_field('image', 'date_of_birth', 'date') }} as date_of_birth,
    {{ json_field('image', 'address') }} as address,
    {{ json_field('image', 'status') }} as status,
    {{ json_field('image', 'created_at', 'time') }} as created_at,
    {{ json_field('image', 'updated_at', 'time') }} as updated_at
from changes
