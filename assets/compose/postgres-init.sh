#!/bin/sh
# First start of an empty volume: three databases, each with an owner who may use no other.
set -eu
# psql reads the passwords from its environment: arguments are for everyone to see.
psql --set ON_ERROR_STOP=1 --quiet --no-psqlrc --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\getenv source_password SOURCE_PASSWORD
\getenv warehouse_password WAREHOUSE_PASSWORD
\getenv state_password STATE_PASSWORD
-- `replication`: change data capture reads the WAL. To own the database lets it make the tables and their publication.
create role bank login replication connection limit 40 password :'source_password';
create role warehouse login connection limit 40 password :'warehouse_password';
create role ledgerline login connection limit 40 password :'state_password';
create database bank owner bank;
create database warehouse owner warehouse;
create database ledgerline owner ledgerline;
revoke all on database bank, warehouse, ledgerline, postgres, template1 from public;
SQL
