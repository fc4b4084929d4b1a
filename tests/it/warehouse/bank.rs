//! A small bank on a real PostgreSQL, and its changes as the stream would carry them.

use std::{collections::BTreeMap, fmt::Write as _};

use sqlx::{Connection, PgConnection, Row};

use super::ground::{Database, Ground};

/// The bank's tables as far as the warehouse cares, and a notebook of every change for [`Bank::commit`].
const SCHEMA: &str = r#"
create table customers(id bigint primary key, first_name text not null, last_name text not null);
create table accounts(id bigint primary key, customer_id bigint not null, account_type text not null, balance numeric(18,2) not null);
create table transactions(id bigint primary key, account_id bigint not null, txn_type text not null, amount numeric(18,2) not null, status text not null, created_at timestamptz not null);
create table ledger_entries(id bigint primary key, transaction_id bigint not null, account_id bigint, entry_type text not null, amount numeric(18,2) not null);
create table notebook(n bigserial primary key, xid bigint not null, lsn bigint not null, op text not null, tbl text not null, before jsonb, after jsonb);
create function wire(r jsonb) returns jsonb language sql immutable as $$
  select r || coalesce(jsonb_object_agg(key, to_jsonb(value)) filter (where key in ('amount', 'balance')), '{}') from jsonb_each_text(r) $$;
create function noted() returns trigger language plpgsql as $$ begin
  insert into notebook(xid, lsn, op, tbl, before, after) values (pg_current_xact_id()::xid::text::bigint, pg_current_wal_insert_lsn() - '0/0', lower(left(replace(tg_op, 'INSERT', 'c'), 1)), tg_table_name,
    case when tg_op <> 'INSERT' then wire(to_jsonb(old)) end, case when tg_op <> 'DELETE' then wire(to_jsonb(new)) end);
  return null; end $$;
create trigger noted after insert or update or delete on customers for each row execute function noted();
create trigger noted after insert or update or delete on accounts for each row execute function noted();
create trigger noted after insert or update or delete on transactions for each row execute function noted();
create trigger noted after insert or update or delete on ledger_entries for each row execute function noted();
"#;

/// A transaction of the bank that is still open.
pub(super) struct Open {
    connection: PgConnection,
    xid: i64,
}

impl Open {
    pub(super) async fn run(&mut self, sql: &str) {
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(&mut self.connection).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
}

/// What has been committed and not yet been landed, by topic.
pub(super) struct Bank {
    pub(super) source: Database,
    said: BTreeMap<String, Vec<Option<Vec<u8>>>>,
}

impl Bank {
    pub(super) async fn new() -> Self {
        let source = Database::create().await;
        source.run(SCHEMA).await;
        Self { source, said: BTreeMap::new() }
    }

    pub(super) async fn begin(&self) -> Open {
        let mut connection = PgConnection::connect(self.source.url.reveal()).await.expect("connects");
        sqlx::raw_sql("begin").execute(&mut connection).await.expect("begins");
        let xid = sqlx::query_scalar("select pg_current_xact_id()::xid::text::bigint").fetch_one(&mut connection).await.expect("has a number");
        Open { connection, xid }
    }

    /// Commits, and says BEGIN, the changes and END as capture would.
    pub(super) async fn commit(&mut self, mut open: Open) {
        open.run("commit").await;
        let lsn: i64 = sqlx::query_scalar("select (pg_current_wal_insert_lsn() - '0/0')::bigint").fetch_one(&mut open.connection).await.expect("answers");
        let changes = sqlx::query("select op, tbl, before::text, after::text, lsn from notebook where xid = $1 order by n")
            .bind(open.xid)
            .fetch_all(&mut open.connection)
            .await
            .expect("reads");
        open.connection.close().await.expect("closes");
        let mut owed: BTreeMap<String, i64> = BTreeMap::new();
        for change in &changes {
            let (op, table): (&str, &str) = (change.get(0), change.get(1));
            let text = |column: usize| change.get::<Option<String>, _>(column).unwrap_or_else(|| "null".to_owned());
            self.say(table, op, &text(2), &text(3), open.xid, change.get(4));
            *owed.entry(table.to_owned()).or_default() += 1;
        }
        let mut collections = String::new();
        for (table, count) in &owed {
            let comma = if collections.is_empty() { "" } else { "," };
            let _ = write!(collections, r#"{comma}{{"data_collection":"public.{table}","event_count":{count}}}"#);
        }
        let xid = open.xid;
        let end = format!(r#"{{"status":"END","id":"{xid}:{lsn}","event_count":{},"data_collections":[{collections}],"ts_ms":1790000000000}}"#, changes.len());
        let begin = format!(r#"{{"status":"BEGIN","id":"{xid}:{lsn}","event_count":null,"data_collections":null,"ts_ms":1790000000000}}"#);
        self.said.entry("bank.transaction".to_owned()).or_default().extend([Some(begin.into_bytes()), Some(end.into_bytes())]);
    }

    fn say(&mut self, table: &str, op: &str, before: &str, after: &str, xid: i64, lsn: i64) {
        let source = format!(
            r#"{{"version":"x","connector":"postgresql","name":"bank","ts_us":1790000000000000,"schema":"public","table":"{table}","txId":{xid},"lsn":{lsn}}}"#
        );
        let value = format!(r#"{{"before":{before},"after":{after},"source":{source},"transaction":null,"op":"{op}","ts_ms":1790000000001}}"#);
        let said = self.said.entry(format!("bank.public.{table}")).or_default();
        said.push(Some(value.into_bytes()));
        if op == "d" {
            said.push(None);
        }
    }

    /// One transaction.
    pub(super) async fn pay(&mut self, sql: &str) {
        let mut open = self.begin().await;
        open.run(sql).await;
        self.commit(open).await;
    }

    /// Reads every row as the initial snapshot does. Doing so again is another attempt.
    pub(super) async fn snapshot(&mut self) {
        let lsn = self.source.number("select (pg_current_wal_insert_lsn() - '0/0')::bigint").await;
        for table in ["customers", "accounts", "transactions", "ledger_entries"] {
            let sql = format!("select wire(to_jsonb(t))::text from {table} t order by id");
            let rows: Vec<String> = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_all(&self.source.pool).await.expect("reads");
            rows.iter().for_each(|row| self.say(table, "r", "null", row, 1, lsn));
        }
    }

    /// The last `count` records of a topic are said again, as after a crash of the capture.
    pub(super) fn repeat(&mut self, topic: &str, count: usize) {
        let said = self.said.get_mut(topic).expect("it has said something");
        let again = said[said.len().saturating_sub(count)..].to_vec();
        said.extend(again);
    }

    /// Lands what has been said since.
    pub(super) async fn land(&mut self, ground: &Ground) {
        for (topic, values) in std::mem::take(&mut self.said) {
            ground.land(&topic, 0, &values).await;
        }
    }

    /// Lands what has been said since, loads it, and does dbt's part.
    pub(super) async fn arrive(&mut self, ground: &Ground) {
        self.land(ground).await;
        ground.load_all().await;
        ground.database.run(&models()).await;
    }
}

/// dbt's part in the plainest SQL: all that is in raw, in the tables and columns that dbt makes. The real models have their own
/// tests; here they only have to be right.
pub(super) fn models() -> String {
    let tables = [
        ("customers", "customer", "dim_customers", "first_name, last_name"),
        ("accounts", "account", "dim_accounts", "customer_id, account_type, balance"),
        ("transactions", "transaction", "fct_transactions", "account_id, txn_type, amount, status, created_at"),
        ("ledger_entries", "ledger_entry", "fct_ledger_entries", "transaction_id, account_id, entry_type, amount"),
    ];
    let mut sql = String::from(
        "drop schema staging cascade; drop schema analytics cascade; create schema staging; create schema analytics;
         create table staging.commits as select distinct split_part(v ->> 'id', ':', 1)::bigint as xid, split_part(v ->> 'id', ':', 2)::bigint as lsn, (v ->> 'ts_ms')::bigint * 1000 as committed_micros
           from raw.boundaries where v ->> 'status' = 'END';
         create table staging.cut as select max(lsn) as lsn, timestamp '2026-11-22 10:00:00' as committed_at from (select lsn from staging.commits union all select (v #>> '{source,lsn}')::bigint from raw.customers where v ->> 'op' = 'r') it;",
    );
    for (table, one, model, columns) in tables {
        let typed: Vec<String> = columns.split(", ").map(|column| format!("(image ->> '{column}'){} as {column}", kind(column))).collect();
        let alive = if model.starts_with("dim") { "op <> 'd' as is_current" } else { "case when op = 'd' then now() end as deleted_at" };
        let _ = write!(
            sql,
            "create table staging.stg_bank__{table} as
               with change as (select distinct on (xid, lsn, key, op) * from (
                 select v ->> 'op' as op, (v #>> '{{source,txId}}')::bigint as xid, (v #>> '{{source,lsn}}')::bigint as lsn, v -> case v ->> 'op' when 'd' then 'before' else 'after' end as image,
                   (v -> case v ->> 'op' when 'd' then 'before' else 'after' end ->> 'id')::bigint as key from raw.{table} where v is not null) e
                 where op <> 'r' or lsn = (select max((v #>> '{{source,lsn}}')::bigint) from raw.customers where v ->> 'op' = 'r'))
               select coalesce(c.lsn, e.lsn) as tx_lsn, e.xid as tx_id, e.lsn, e.op, e.key as {one}_id, {} from change e left join staging.commits c on c.xid = e.xid and e.op <> 'r';
             create table analytics.{model} as select *, {alive} from (select distinct on ({one}_id) * from staging.stg_bank__{table} order by {one}_id, tx_lsn desc, lsn desc) latest;",
            typed.join(", ")
        );
    }
    sql
}

fn kind(column: &str) -> &'static str {
    match column {
        "balance" | "amount" => "::numeric(18,2)",
        "created_at" => "::timestamp",
        column if column.ends_with("_id") => "::bigint",
        _ => "",
    }
}
