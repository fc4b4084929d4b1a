{# What a version of a row is made of, in the order of the source's columns: the same in the dimension and in the snapshot.
   The first is the key. #}
{% macro versioned_columns(table) -%}
    {{ return({
        'customers': [
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
        ],
        'accounts': [
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
        ],
    }[table]) }}
{%- endmacro %}
