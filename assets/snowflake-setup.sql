-- What an administrator runs once for ledgerline on Snowflake; nothing of it is needed at run time, and running it again is harmless.
-- Replace the names where yours differ, and the public key:
--
--   openssl genrsa 2048 | openssl pkcs8 -topk8 -nocrypt -out ledgerline.p8       -- LEDGERLINE__WAREHOUSE__PRIVATE_KEY names this file
--   openssl rsa -in ledgerline.p8 -pubout | grep -v -- ----- | tr -d '\n'        -- goes into RSA_PUBLIC_KEY below
--
-- Then: warehouse.url = "snowflake://ACCOUNT/BANK?warehouse=LEDGERLINE_WH&role=LEDGERLINE&user=LEDGERLINE_SERVICE"
--
-- Two roles: LEDGERLINE loads and transforms, LEDGERLINE_READER looks (Power BI, notebooks). Neither can create users, roles,
-- warehouses or databases, and neither owns the database.

use role sysadmin;

create database if not exists bank data_retention_time_in_days = 1;

create warehouse if not exists ledgerline_wh
    warehouse_size = 'XSMALL'
    auto_suspend = 60
    auto_resume = true
    initially_suspended = true
    statement_timeout_in_seconds = 3600;

use role useradmin;

create role if not exists ledgerline;
create role if not exists ledgerline_reader;

-- A service signs in by key pair only: it has no password that could leak, and needs no second factor.
create user if not exists ledgerline_service
    type = service
    default_role = ledgerline
    default_warehouse = ledgerline_wh
    default_namespace = 'BANK.RAW'
    rsa_public_key = '<the public key>';

use role securityadmin;

grant role ledgerline to user ledgerline_service;
-- Administrators see what the roles own.
grant role ledgerline to role sysadmin;
grant role ledgerline_reader to role sysadmin;

grant usage on warehouse ledgerline_wh to role ledgerline;
grant usage on warehouse ledgerline_wh to role ledgerline_reader;

-- In these schemas ledgerline makes its tables and its stage, and owns them; it has no right on anything else.
grant usage on database bank to role ledgerline;
grant usage on database bank to role ledgerline_reader;

use role sysadmin;
create schema if not exists bank.raw;
create schema if not exists bank.staging;
create schema if not exists bank.snapshots;
create schema if not exists bank.analytics;

use role securityadmin;
grant usage, create table, create stage on schema bank.raw to role ledgerline;
grant usage, create table, create view on schema bank.staging to role ledgerline;
grant usage, create table, create view on schema bank.snapshots to role ledgerline;
grant usage, create table, create view on schema bank.analytics to role ledgerline;

-- Readers see staging and analytics, not raw: that holds every envelope as it came.
grant usage on schema bank.staging to role ledgerline_reader;
grant usage on schema bank.analytics to role ledgerline_reader;
grant select on future tables in schema bank.staging to role ledgerline_reader;
grant select on future tables in schema bank.analytics to role ledgerline_reader;
grant select on all tables in schema bank.staging to role ledgerline_reader;
grant select on all tables in schema bank.analytics to role ledgerline_reader;

-- Only where the lake lies in a bucket that Snowflake can reach, and COPY is to read the objects there instead of having them
-- uploaded: `warehouse.stage = "RAW.LAKE"`. The integration is the account's, so its administrator makes it; what its
-- `desc integration ledgerline_lake` answers goes into the trust of the cloud's role. The stage begins where the bucket does.
--
--   use role accountadmin
--   create storage integration if not exists ledgerline_lake type = external_stage storage_provider = 'S3' enabled = true
--       storage_aws_role_arn = 'arn:aws:iam::…:role/…' storage_allowed_locations = ('s3://<bucket>/')
--   grant usage on integration ledgerline_lake to role sysadmin
--   use role sysadmin
--   create stage if not exists bank.raw.lake url = 's3://<bucket>/' storage_integration = ledgerline_lake
--   grant usage on stage bank.raw.lake to role ledgerline
