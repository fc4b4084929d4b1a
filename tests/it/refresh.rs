//! Both DAGs on real services: a small bank whose changes lie in a lake, a warehouse, dbt, and letters.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use ledgerline::{
    change::Topics,
    dag::{self, Handle, History, Matter, RunState, TaskState},
    dbt, kpi,
    lake::{
        Store,
        batch::Sealed,
        encode::encode,
        log::{self, CommitRecord, SCHEMA, append, sha256_hex},
        object::{DataKey, date_of},
    },
    notify::{self, Carrier, Outbox},
    refresh::{self, LOADING, Rooms},
    stage::{self, Phase},
    stream::{Lane, records::Records},
    warehouse::Warehouse,
};
use sqlx::{AssertSqlSafe, Executor as _, PgConnection, Row};
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{house::Database, lane::Lake};

const PATIENCE: Duration = Duration::from_secs(300);

/// The bank's tables without its constraints (so that a test can break the books), and a notebook of every change.
const SCHEMA_OF_THE_BANK: &str = r#"
create table customers(id bigint primary key, first_name text, last_name text, email text, phone text, date_of_birth integer, address text, status text,
  created_at timestamptz default now(), updated_at timestamptz default now());
create table accounts(id bigint primary key, account_number text, customer_id bigint, account_type text, status text default 'ACTIVE', currency text default 'EUR',
  balance numeric(18,2) default 0, interest_rate numeric(6,4) default 0, opened_at timestamptz default now(), closed_at timestamptz,
  created_at timestamptz default now(), updated_at timestamptz default now());
create table transactions(id bigint primary key, account_id bigint, related_account_id bigint, txn_type text, direction text, amount numeric(18,2),
  balance_after numeric(18,2), status text default 'COMPLETED', reference text, description text, created_at timestamptz default now(), posted_at timestamptz default now());
create table ledger_entries(id bigint primary key, transaction_id bigint, account_id bigint, entry_type text, amount numeric(18,2), created_at timestamptz default now());
create table notebook(n bigserial primary key, xid bigint, lsn bigint, op text, tbl text, before jsonb, after jsonb);
create function wire(r jsonb) returns jsonb language sql immutable as $$
  select r || coalesce((select jsonb_object_agg(key, to_jsonb(value)) from jsonb_each_text(r) where key in ('amount', 'balance', 'balance_after', 'interest_rate') and value is not null), '{}') $$;
create function noted() returns trigger language plpgsql as $$ begin
  insert into notebook(xid, lsn, op, tbl, before, after) values (pg_current_xact_id()::xid::text::bigint, pg_current_wal_insert_lsn() - '0/0',
    lower(left(replace(tg_op, 'INSERT', 'c'), 1)), tg_table_name, case when tg_op <> 'INSERT' then wire(to_jsonb(old)) end, case when tg_op <> 'DELETE' then wire(to_jsonb(new)) end);
  return null; end $$;
create trigger noted after insert or update or delete on customers for each row execute function noted();
create trigger noted after insert or update or delete on accounts for each row execute function noted();
create trigger noted after insert or update or delete on transactions for each row execute function noted();
create trigger noted after insert or update or delete on ledger_entries for each row execute function noted();
"#;

const OPENING: &str = "
insert into customers(id, first_name, last_name, email, status) values (1, 'Zoë', 'Berg', 'zoe@example.com', 'ACTIVE');
insert into accounts(id, account_number, customer_id, account_type) values (7, 'DE07', 1, 'SAVINGS');
insert into transactions(id, account_id, txn_type, direction, amount, balance_after) values (3, 7, 'DEPOSIT', 'CREDIT', 100.10, 100.10);
insert into ledger_entries(id, transaction_id, account_id, entry_type, amount) values (11, 3, 7, 'DEBIT', 100.10), (12, 3, null, 'CREDIT', 100.10);
update accounts set balance = 100.10 where id = 7;
";

fn python() -> PathBuf {
    crate::house::python()
}

/// A row that comes to hold this is no text on the wire.
const NO_TEXT: &str = "(no text)";

fn on_the_wire(value: &serde_json::Value) -> Vec<u8> {
    let text = value.to_string();
    match text.split_once(NO_TEXT).filter(|_| value["after"].to_string().contains(NO_TEXT)) {
        Some((before, after)) => [before.as_bytes(), b"Stra\xDFe", after.as_bytes()].concat(),
        None => text.into_bytes(),
    }
}

/// Everything between the bank and the mail box.
struct House {
    source: Database,
    warehoused: Database,
    state: Database,
    store: Store,
    warehouse: Warehouse,
    _lake: Lake,
    dir: tempfile::TempDir,
}

impl House {
    async fn new(name: &str) -> Self {
        let create = async |part: &str| Database::create(&format!("refresh_{name}_{part}")).await;
        let (source, warehoused, state) = (create("bank").await, create("warehouse").await, create("state").await);
        let dir = tempfile::tempdir().unwrap();
        let lake = Lake::open().await;
        let store = Store::connect(&lake.access).await.unwrap();
        let warehouse = Warehouse::connect(&warehoused.url.clone().into()).await.unwrap();
        let house = Self { source, warehoused, state, store, warehouse, _lake: lake, dir };
        sqlx::raw_sql(SCHEMA_OF_THE_BANK).execute(&mut house.bank().await).await.unwrap();
        house
    }

    async fn bank(&self) -> PgConnection {
        self.source.connect().await
    }

    /// One commit of the bank's, and its changes and END in the lake.
    async fn commit(&self, sql: &str) {
        let mut bank = self.bank().await;
        sqlx::raw_sql(AssertSqlSafe(format!("begin; {sql}; commit"))).execute(&mut bank).await.unwrap();
        let rows = sqlx::query("with it as (delete from notebook returning *) select xid, lsn, op, tbl, before, after from it order by n")
            .fetch_all(&mut bank)
            .await
            .unwrap();
        let mut landed: BTreeMap<String, Vec<serde_json::Value>> = BTreeMap::new();
        let mut owed: BTreeMap<String, i64> = BTreeMap::new();
        let (mut xid, mut lsn) = (0, 0);
        for row in &rows {
            (xid, lsn) = (row.get::<i64, _>(0), row.get::<i64, _>(1));
            let (op, table): (String, String) = (row.get(2), row.get(3));
            let (before, after): (Option<serde_json::Value>, Option<serde_json::Value>) = (row.get(4), row.get(5));
            let source = serde_json::json!({ "txId": xid, "lsn": lsn, "ts_us": chrono::Utc::now().timestamp_micros(), "table": table });
            landed.entry(format!("bank.public.{table}")).or_default().push(serde_json::json!({ "before": before, "after": after, "source": source, "op": op }));
            *owed.entry(table).or_default() += 1;
        }
        let collections: Vec<_> =
            owed.iter().map(|(table, count)| serde_json::json!({ "data_collection": format!("public.{table}"), "event_count": count })).collect();
        let end = serde_json::json!({ "status": "END", "id": format!("{xid}:{}", lsn + 1), "event_count": rows.len(), "data_collections": collections,
            "ts_ms": chrono::Utc::now().timestamp_millis() });
        landed.entry("bank.transaction".to_owned()).or_default().push(end);
        for (topic, values) in landed {
            self.land(&topic, 0, &values).await;
        }
    }

    async fn land(&self, topic: &str, partition: i32, values: &[serde_json::Value]) {
        let before = log::newest(&self.store, topic, partition, None).await.unwrap();
        let now_ms = chrono::Utc::now().timestamp_millis();
        let first_offset = before.as_ref().map_or(0, |it| it.record.last_offset + 1);
        let last_offset = first_offset + values.len() as i64 - 1;
        let mut records = Records::default();
        for (offset, value) in (first_offset..).zip(values) {
            records.push(offset, now_ms, Some(b"{}"), Some(&on_the_wire(value)));
        }
        let (lane, date) = (Lane { topic: topic.into(), partition }, date_of(now_ms));
        let encoded = encode(Sealed { lane, first_offset, last_offset, date, rows: values.len(), runs: vec![records] }).unwrap();
        let sha256 = sha256_hex(&encoded.parquet);
        let table = Topics::new("bank").lake_name(topic).unwrap();
        let record = CommitRecord {
            schema: SCHEMA,
            topic: topic.to_owned(),
            partition,
            first_offset,
            last_offset,
            rows: encoded.rows,
            data: DataKey { table, date, partition, first_offset, last_offset, hash: DataKey::hash_of(&sha256) }.to_string(),
            bytes: encoded.parquet.len() as u64,
            sha256,
            timestamp_min: now_ms,
            timestamp_max: now_ms,
            previous: before.map(|it| it.sha256),
            written_at: chrono::Utc::now(),
        };
        self.store.put(&record.data, encoded.parquet).await.unwrap();
        append(&self.store, &record).await.unwrap();
    }

    /// What the warehouse answers, as text.
    async fn ask(&self, sql: &'static str) -> String {
        sqlx::query_scalar(sql).fetch_one(&mut self.warehoused.connect().await).await.unwrap()
    }

    fn mails(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.dir.path().join("mail")) else { return Vec::new() };
        let mut paths: Vec<PathBuf> = entries.map(|it| it.unwrap().path()).collect();
        paths.sort();
        paths.iter().map(|it| std::fs::read_to_string(it).unwrap()).collect()
    }

    async fn clean_up(self) {
        for database in [self.source, self.warehoused, self.state] {
            database.drop().await;
        }
    }
}

/// The engine, bound to our tasks, and the postman.
struct Refresh {
    handle: Handle,
    dags: watch::Receiver<dag::Stats>,
    seen: watch::Receiver<refresh::Stats>,
    mails: watch::Receiver<notify::Stats>,
    worker: dbt::Worker,
    stop: CancellationToken,
    engine: JoinHandle<Result<(), dag::Error>>,
    postman: JoinHandle<Result<(), notify::Error>>,
}

impl Refresh {
    async fn start(house: &House) -> Self {
        let mail_config = notify::Config::default();
        let outbox = Outbox::new(&house.state.url, &mail_config);
        let dbt_config = dbt::Config { project_dir: Path::new(env!("CARGO_MANIFEST_DIR")).join("dbt"), ..dbt::Config::default() };
        let target = dbt::Target::from_url(&house.warehoused.url).unwrap();
        let worker = dbt::Worker::start(&python(), &dbt_config, target, &house.dir.path().join("dbt")).await.unwrap();
        let rooms = Rooms {
            store: house.store.clone(),
            warehouse: house.warehouse.clone(),
            topics: Topics::new("bank"),
            dbt: worker.clone(),
            outbox: outbox.clone(),
            source: house.source.url.clone(),
            snapshot: "never".to_owned(),
            snapshot_ends: Arc::new(|| async { Ok(None) }.boxed()),
            drained: watch::channel(true).1,
        };
        let config = dag::Config { schedule: dag::Schedule::Never, ..dag::Config::default() };
        let (deal, seen) = refresh::deal(rooms, &config).unwrap();
        let stop = CancellationToken::new();
        let (orders, inbox) = dag::orders();
        let (dags, control) = stage::control(dag::Stats::default(), Phase::Running, &stop);
        let engine = tokio::spawn(dag::run(deal, History::new(&house.state.url), inbox, control));
        let (mails, control) = stage::control(notify::Stats::default(), Phase::Running, &stop);
        let carrier = Carrier::new(&mail_config, &house.dir.path().join("mail")).unwrap();
        let postman = tokio::spawn(notify::run(outbox, carrier, control));
        let mut ready = dags.stats.clone();
        timeout(PATIENCE, ready.wait_for(|it| !it.dags.is_empty() && it.away.is_none())).await.unwrap().unwrap();
        Self { handle: Handle::new(orders, dags.stats.clone()), dags: dags.stats, seen, mails: mails.stats, worker, stop, engine, postman }
    }

    /// Triggers loading and waits for the end of both DAGs.
    async fn refresh(&self) -> Vec<Arc<dag::RunStats>> {
        let run = self.handle.trigger(LOADING).await.unwrap();
        timeout(PATIENCE, self.handle.finished(&run)).await.unwrap_or_else(|_| panic!("not over: {:#?}", self.dags.borrow())).unwrap()
    }

    async fn until_mails(&self, count: u64) {
        let mut mails = self.mails.clone();
        timeout(PATIENCE, mails.wait_for(|it| it.sent >= count)).await.unwrap().unwrap();
    }

    async fn stop(self) {
        self.stop.cancel();
        self.engine.await.unwrap().unwrap();
        self.postman.await.unwrap().unwrap();
        self.worker.stop().await;
    }
}

#[tokio::test]
async fn what_lies_in_the_lake_becomes_equal_books_exact_numbers_and_two_letters() {
    let house = House::new("green").await;
    house.commit(OPENING).await;
    let refresh = Refresh::start(&house).await;
    let over = refresh.refresh().await;
    assert!(over.len() == 2 && over.iter().all(|it| it.state == RunState::Success), "{over:#?}");

    let seen = refresh.seen.borrow().clone();
    assert_eq!((seen.loads["ledger_entries"].rows, seen.loads["boundaries"].files_last), (2, 1));
    assert!(seen.dbt.tests().pass > 0 && seen.dbt.tests() == seen.dbt.tests_in_all, "{:?}", seen.dbt.tests());
    let reconcile = seen.reconcile.unwrap();
    assert!(reconcile.report.ok && !reconcile.report.checks.is_empty());
    let kpis = seen.kpis.unwrap();
    assert_eq!(kpis.reading.kpis, kpi::on_source(&house.source.url).await.unwrap());
    assert_eq!(kpis.reading.kpis.total_balance.to_string(), "100.10");
    assert_eq!(seen.commit_to_kpi.count(), 1, "the one transaction");

    refresh.until_mails(2).await;
    let mails = house.mails();
    assert_eq!(mails.len(), 2);
    assert!(mails[0].contains("Message-ID: <load_report.MinIO_S3_to_Snowflake.manual__"), "{}", mails[0]);
    assert!(mails[1].contains("transformation_report") && mails[1].contains("total_balance"), "{}", mails[1]);

    // With nothing new a second run is as green.
    let again = refresh.refresh().await;
    assert!(again.iter().all(|it| it.state == RunState::Success), "{again:#?}");
    refresh.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn books_that_do_not_balance_turn_the_dag_red_with_the_rows_in_a_letter_until_they_do() {
    let house = House::new("red").await;
    house.commit(OPENING).await;
    house.commit("insert into ledger_entries(id, transaction_id, account_id, entry_type, amount) values (13, 3, null, 'CREDIT', 0.01)").await;
    let refresh = Refresh::start(&house).await;
    let over = refresh.refresh().await;
    assert_eq!(over.iter().map(|it| it.state).collect::<Vec<_>>(), [RunState::Success, RunState::Failed]);
    let failed: Vec<&dag::TaskStats> = over[1].tasks.iter().filter(|it| it.state == TaskState::Failed).collect();
    assert!(failed.len() == 1 && failed[0].task_id.starts_with("dbt_test_") && failed[0].fault == Some(Matter::Data) && failed[0].tries == 1, "{failed:?}");
    assert!(refresh.seen.borrow().dbt.nodes.iter().any(|it| it.failing.is_some()));
    refresh.until_mails(2).await;
    let letter = house.mails().pop().unwrap();
    assert!(letter.contains("Message-ID: <failure.DBT_Bank_Data_Transformation_Pipeline.") && letter.contains("100.11"), "{letter}");

    house.commit("delete from ledger_entries where id = 13").await;
    let over = refresh.refresh().await;
    assert!(over.iter().all(|it| it.state == RunState::Success), "{over:#?}");
    refresh.until_mails(5).await;
    assert!(house.mails().iter().any(|it| it.contains("Message-ID: <recovery.")));
    refresh.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn a_record_that_is_no_text_counts_as_arrived_and_holds_nobody_up() {
    let house = House::new("dead").await;
    house.commit(OPENING).await;
    let refresh = Refresh::start(&house).await;
    let whole = "select case when (select max(lsn) from staging.commits) = (select max(lsn) from staging.cut) then 'whole' else 'waits' end";

    // In the middle, with something behind it; its row is made good by the next change of it.
    house.commit("update customers set address = '(no text)' where id = 1").await;
    house.commit("update customers set address = 'Main Street' where id = 1").await;
    let over = refresh.refresh().await;
    assert!(over.iter().all(|it| it.state == RunState::Success), "{over:#?}");
    assert_eq!(house.ask(whole).await, "whole");
    assert_eq!(house.ask("select address from analytics.dim_customers where is_current").await, "Main Street");
    let letter = "select concat_ws(' ', r.topic, r.\"offset\", r.reason, r.op, r.key, r.landed, r.tx_id = c.xid, r.lsn <= c.lsn) from raw._rejected r join staging.commits c on c.xid = r.tx_id";
    assert_eq!(house.ask(letter).await, "bank.public.customers 1 the value is not UTF-8 u 1 f t t");
    let seen = refresh.seen.borrow().clone();
    assert!(seen.reconcile.is_some_and(|it| it.report.ok), "what the lake does not hold is not missed in raw");
    assert_eq!(seen.loads["customers"].rejected, 1);

    // The very last: nothing comes behind it to show that its lane has passed.
    house.commit("update customers set phone = '(no text)' where id = 1").await;
    let over = refresh.refresh().await;
    assert!(over.iter().all(|it| it.state == RunState::Success), "{over:#?}");
    assert_eq!(house.ask(whole).await, "whole");
    assert_eq!(house.ask("select count(*)::text from raw._rejected").await, "2");
    refresh.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn the_load_report_counts_what_tries_that_were_killed_had_loaded() {
    let house = House::new("tries").await;
    house.commit(OPENING).await;
    house.warehouse.prepare().await.unwrap();
    // One lane is loaded by the first try, the other one breaks it.
    let stray = serde_json::json!({ "before": null, "after": { "id": 1 }, "source": { "txId": 1, "lsn": 1 }, "op": "u" });
    house.land("bank.public.customers", 1, &[stray]).await;
    let trap = "create sequence tries;
        create function trap() returns trigger language plpgsql as $$ begin if nextval('tries') = 1 then raise exception using errcode = '57014'; end if; return new; end $$;
        create trigger trap before insert on raw.customers for each row when (new._partition = 1) execute function trap(); select 'set'";
    house.warehoused.connect().await.execute(trap).await.unwrap();

    let refresh = Refresh::start(&house).await;
    let over = refresh.refresh().await;
    let loading = over[0].tasks.iter().find(|it| it.task_id == "load_customers").unwrap();
    assert_eq!((over[0].state, loading.tries), (RunState::Success, 2));
    refresh.until_mails(1).await;
    let letter = house.mails().remove(0);
    let words: Vec<&str> = letter.split_whitespace().collect();
    assert!(words.windows(4).any(|it| it == ["all", "tables", "6", "8"]), "{letter}");
    refresh.stop().await;
    house.clean_up().await;
}
