#!/bin/bash
# The official image's contract as far as it is used: POSTGRES_USER, POSTGRES_PASSWORD, /docker-entrypoint-initdb.d on the
# first start only, by a server that listens on its socket alone; further arguments are the server's.
set -e
[ "$1" = postgres ] || exec "$@"
as_postgres() { setpriv --reuid postgres --regid postgres --init-groups "$@"; }
install -d -o postgres -g postgres -m 3777 /var/run/postgresql
export POSTGRES_USER=${POSTGRES_USER:-postgres}
export PGHOST=/var/run/postgresql
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  [ -n "$POSTGRES_PASSWORD" ] || { echo "Error: Database is uninitialized and superuser password is not specified." >&2; exit 1; }
  install -d -o postgres -g postgres -m 0700 "$(dirname "$PGDATA")" "$PGDATA"
  install -o postgres -m 0600 /dev/null /tmp/password
  printf '%s\n' "$POSTGRES_PASSWORD" >/tmp/password
  as_postgres initdb --username="$POSTGRES_USER" --pwfile=/tmp/password --auth-local=trust >/dev/null
  rm /tmp/password
  echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
  { echo "listen_addresses = '*'"; echo "unix_socket_directories = '/var/run/postgresql'"; } >>"$PGDATA/postgresql.conf"
  as_postgres pg_ctl -w -o "-c listen_addresses=''" start >/dev/null
  for file in /docker-entrypoint-initdb.d/*; do
    case $file in
      *.sh) if [ -x "$file" ]; then "$file"; else . "$file"; fi ;;
      *.sql) psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres --file "$file" ;;
    esac
  done
  as_postgres pg_ctl -w -m fast stop >/dev/null
fi
unset PGHOST
exec setpriv --reuid postgres --regid postgres --init-groups "$@"
