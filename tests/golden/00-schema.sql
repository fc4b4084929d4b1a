CREATE EXTENSION IF NOT EXISTS hstore;
CREATE EXTENSION IF NOT EXISTS citext;
CREATE EXTENSION IF NOT EXISTS ltree;
CREATE TYPE txn_status AS ENUM ('pending','posted','reversed');
CREATE DOMAIN iban AS varchar(34) CHECK (length(VALUE) >= 5);
CREATE TABLE customers (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  first_name text NOT NULL, last_name text NOT NULL, email text UNIQUE,
  date_of_birth date, is_active boolean NOT NULL DEFAULT true,
  profile jsonb, created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamp);
CREATE TABLE accounts (
  id bigint PRIMARY KEY, customer_id bigint NOT NULL REFERENCES customers(id),
  account_no uuid NOT NULL, type varchar(20) NOT NULL, currency char(3) NOT NULL,
  balance numeric(18,2) NOT NULL DEFAULT 0, opened_on date, updated_at timestamptz);
CREATE TABLE transactions (
  id bigint PRIMARY KEY, account_id bigint NOT NULL, amount numeric(18,2) NOT NULL,
  status txn_status NOT NULL DEFAULT 'pending', kind text, reference uuid, description text,
  tags text[], metadata jsonb, created_at timestamptz NOT NULL, posted_at timestamp);
ALTER TABLE transactions REPLICA IDENTITY FULL;
CREATE TABLE ledger_entries (
  transaction_id bigint NOT NULL, line_no smallint NOT NULL, account_id bigint NOT NULL,
  debit numeric(18,2), credit numeric(18,2), PRIMARY KEY (transaction_id, line_no));
CREATE TABLE all_types (
  id int PRIMARY KEY,
  c_smallint smallint, c_int int, c_bigint bigint, c_real real, c_double double precision,
  c_numeric numeric, c_numeric_18_2 numeric(18,2), c_numeric_10_0 numeric(10,0), c_numeric_38_10 numeric(38,10), c_money money,
  c_char char(5), c_varchar varchar(20), c_text text, c_citext citext, c_bytea bytea, c_boolean boolean,
  c_date date, c_time time, c_time3 time(3), c_timetz timetz,
  c_timestamp timestamp, c_timestamp0 timestamp(0), c_timestamp3 timestamp(3), c_timestamptz timestamptz, c_interval interval,
  c_uuid uuid, c_json json, c_jsonb jsonb, c_inet inet, c_cidr cidr, c_macaddr macaddr, c_point point,
  c_bit1 bit(1), c_bit5 bit(5), c_varbit varbit, c_int4range int4range, c_tstzrange tstzrange,
  c_enum txn_status, c_domain iban, c_hstore hstore, c_ltree ltree, c_tsvector tsvector, c_oid oid,
  c_int_arr int[], c_text_arr text[], c_numeric_arr numeric(10,2)[], c_bool_arr boolean[], c_uuid_arr uuid[], c_ts_arr timestamptz[], c_date_arr date[], c_jsonb_arr jsonb[], c_enum_arr txn_status[], c_bigint_arr bigint[], c_double_arr double precision[], c_varchar_arr varchar(10)[],
  c_gen int GENERATED ALWAYS AS (c_smallint * 2) STORED,
  c_def int DEFAULT 42, c_notnull text NOT NULL DEFAULT 'dflt');
CREATE TABLE no_pk (a int, b text);
CREATE TABLE no_pk_full (a int, b text);
ALTER TABLE no_pk_full REPLICA IDENTITY FULL;
CREATE TABLE ri_index (a int NOT NULL, b int NOT NULL, c text, PRIMARY KEY (a));
CREATE UNIQUE INDEX ri_index_b ON ri_index(b);
ALTER TABLE ri_index REPLICA IDENTITY USING INDEX ri_index_b;
CREATE TABLE "Mixed Case" ("Id" int PRIMARY KEY, "weird.col-name" text, "select" int);
CREATE TABLE evolve (id int PRIMARY KEY, a int, b text);
CREATE TABLE trunc_me (id int PRIMARY KEY, v text);
