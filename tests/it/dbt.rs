//! dbt on a real PostgreSQL: the worker in good and bad days, and the project against a simulated bank.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use ledgerline::{
    dbt::{Command, Config, Error, Invocation, Kind, NodeEvent, RunResults, Status, TASKS, Target, Worker},
    fault::{self, Diagnose as _, Fault},
};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _, PgConnection};
use tokio::{io::AsyncWriteExt as _, sync::mpsc};
use tokio_util::sync::CancellationToken;

use crate::{cdc::encrypted::Guarded, house::Database};

/// Far beyond what anything here takes; a test that hangs says so.
const PATIENCE: Duration = Duration::from_secs(120);

const RAW: &str = r#"
    create schema raw;
    create table raw._loads (topic text, partition integer, first_offset bigint, last_offset bigint, object text, rows bigint, loaded_at timestamptz);
    create table raw._snapshot_ends (topic text, partition integer, end_offset bigint, lsn bigint);
    create table raw._rejected (topic text, partition integer, "offset" bigint, reason text, tx_id bigint, lsn bigint, op text, key text);
"#;

fn python() -> PathBuf {
    crate::house::python()
}

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("dbt")
}

/// A warehouse of its own for one test, with the tables the loader makes.
struct Warehouse {
    database: Database,
    sql: PgConnection,
}

impl Warehouse {
    async fn create(name: &str) -> Self {
        let database = Database::create(&format!("dbt_{name}")).await;
        let mut sql = database.connect().await;
        sql.execute(RAW).await.unwrap();
        for table in ["customers", "accounts", "transactions", "ledger_entries", "boundaries"] {
            let columns = "v jsonb, _topic text, _partition integer, _offset bigint, _object text, _loaded_at timestamptz, primary key (_partition, _offset)";
            sql.execute(sqlx::AssertSqlSafe(format!("create table raw.{table} ({columns})"))).await.unwrap();
        }
        Self { database, sql }
    }

    /// Lands a record at the end of its lane, as the loader does.
    async fn land(&mut self, table: &str, value: Value) {
        let topic = if table == "boundaries" { "bank.transaction".to_owned() } else { format!("bank.public.{table}") };
        let insert = format!(
            "with it as (insert into raw.{table} (v, _topic, _partition, _offset) select $1, $2, 0, coalesce(max(_offset) + 1, 0) from raw.{table} returning _offset)
             insert into raw._loads (topic, partition, first_offset, last_offset, rows) select $2, 0, _offset, _offset, 1 from it"
        );
        sqlx::query(sqlx::AssertSqlSafe(insert)).bind(value).bind(topic).execute(&mut self.sql).await.unwrap();
    }

    /// One commit: its changes `(table, op, row)` and its END.
    async fn commit(&mut self, xid: i64, changes: &[(&str, &str, Value)]) {
        let lsn = xid * 1000;
        let mut owed = serde_json::Map::new();
        for (order, (table, op, row)) in changes.iter().enumerate() {
            let place = lsn + i64::try_from(order).unwrap();
            let source = json!({"txId": xid, "lsn": place, "ts_us": 1_790_000_000_000_000_i64 + lsn, "table": table});
            self.land(table, json!({"before": null, "after": row, "source": source, "op": op})).await;
            let count = owed.get(*table).and_then(Value::as_i64).unwrap_or(0) + 1;
            owed.insert((*table).to_owned(), count.into());
        }
        let collections: Vec<Value> = owed.iter().map(|(table, count)| json!({"data_collection": format!("public.{table}"), "event_count": count})).collect();
        let end = json!({"status": "END", "id": format!("{xid}:{}", lsn + 500), "event_count": changes.len(), "data_collections": collections, "ts_ms": 1_790_000_000_000_i64 + lsn});
        self.land("boundaries", end).await;
    }

    /// A customer with an account, and 100.00 paid in; `credited` is what the outside world is booked for it.
    async fn open_account(&mut self, credited: &str) {
        let now = "2026-03-01T12:34:56.123456Z";
        let account = |balance: &str| json!({"id": 7, "account_number": "DE07", "customer_id": 1, "account_type": "SAVINGS", "status": "ACTIVE", "currency": "EUR", "balance": balance, "interest_rate": "1.2500", "opened_at": now, "closed_at": null, "created_at": now, "updated_at": now});
        let payment = json!({"id": 3, "account_id": 7, "related_account_id": null, "txn_type": "DEPOSIT", "direction": "CREDIT", "amount": "100.00", "balance_after": "100.00", "status": "COMPLETED", "reference": "R3", "description": null, "created_at": now, "posted_at": now});
        let entry = |id: i64, account: Value, kind: &str, amount: &str| json!({"id": id, "transaction_id": 3, "account_id": account, "entry_type": kind, "amount": amount, "created_at": now});
        self.commit(700, &[("customers", "c", customer("1 Main Street"))]).await;
        self.commit(701, &[("accounts", "c", account("0.00"))]).await;
        let entries = (entry(11, json!(7), "DEBIT", "100.00"), entry(12, Value::Null, "CREDIT", credited));
        self.commit(
            702,
            &[("transactions", "c", payment), ("ledger_entries", "c", entries.0), ("ledger_entries", "c", entries.1), ("accounts", "u", account("100.00"))],
        )
        .await;
    }

    async fn one(&mut self, query: &'static str) -> String {
        sqlx::query_scalar(query).fetch_one(&mut self.sql).await.unwrap()
    }

    async fn drop(self) {
        self.sql.close().await.unwrap();
        self.database.drop().await;
    }
}

async fn start(warehouse: &Warehouse, project_dir: &Path, work_dir: &Path) -> Worker {
    let config = Config { project_dir: project_dir.to_owned(), ..Config::default() };
    Worker::start(&python(), &config, Target::from_url(&warehouse.database.url.clone()).unwrap(), work_dir).await.unwrap()
}

fn quiet() -> mpsc::Sender<NodeEvent> {
    mpsc::channel(1).0
}

fn without_snapshot(invocation: Invocation) -> Invocation {
    invocation.with_var("snapshot", "never").with_timeout(PATIENCE)
}

async fn invoke(worker: &Worker, invocation: Invocation) -> Result<RunResults, Error> {
    worker.invoke(without_snapshot(invocation), quiet(), CancellationToken::new()).await
}

/// All five tasks, one after the other, whatever their outcome.
async fn tasks(worker: &Worker) -> Vec<RunResults> {
    let mut outcomes = Vec::new();
    for (task, ..) in TASKS {
        outcomes.push(invoke(worker, Invocation::of_task(task).unwrap()).await.unwrap());
    }
    outcomes
}

/// A copy of the project, to be broken.
fn copy_of_project() -> tempfile::TempDir {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let target = to.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() { copy(&entry.path(), &target) } else { std::fs::copy(entry.path(), target).map(drop).unwrap() }
        }
    }
    let copied = tempfile::tempdir().unwrap();
    copy(&project(), copied.path());
    copied
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warehouse_that_wants_tls_gets_it_from_dbt() {
    let (mut warehouse, work_dir) = (Warehouse::create("tls").await, tempfile::tempdir().unwrap());
    warehouse.open_account("100.00").await;
    let guarded = Guarded::before(&warehouse.database.url, &["localhost"]).await;
    let run = async |query: &str| {
        let target = Target::from_url(&guarded.url(&warehouse.database.url, "localhost", query)).unwrap();
        let config = Config { project_dir: project(), ..Config::default() };
        let worker = Worker::start(&python(), &config, target, work_dir.path()).await.unwrap();
        invoke(&worker, Invocation::of_task("dbt_staging").unwrap()).await.map(|it| it.explain())
    };
    let verified = run(&format!("sslmode=verify-full&{}", guarded.authority())).await;
    assert!(matches!(verified, Ok(None)), "{verified:?}");
    let refused = run("sslmode=disable").await;
    let said = match &refused {
        Ok(outcome) => outcome.clone().unwrap_or_default(),
        Err(error) => fault::chain(error),
    };
    assert!(said.contains("no encryption"), "{refused:?}");
    warehouse.drop().await;
}

#[tokio::test]
async fn landed_envelopes_become_facts_and_every_node_tells_its_state_live() {
    let (mut warehouse, work_dir) = (Warehouse::create("facts").await, tempfile::tempdir().unwrap());
    warehouse.open_account("100.00").await;
    let worker = start(&warehouse, &project(), work_dir.path()).await;

    let (events, mut heard) = mpsc::channel(100);
    let staging = worker.invoke(without_snapshot(Invocation::of_task("dbt_staging").unwrap()), events, CancellationToken::new()).await.unwrap();
    let outcomes = tasks(&worker).await;

    let cut = staging.nodes.iter().find(|it| it.node.name == "cut").unwrap();
    assert_eq!((cut.node.kind, cut.node.status, cut.node.rows), (Kind::Model, Status::Success, Some(1)));
    let mut states: Vec<Status> = Vec::new();
    while let Some(event) = heard.recv().await {
        states.extend((event.name == "cut").then_some(event.status));
    }
    assert_eq!(states, [Status::Running, Status::Success]);
    assert_eq!(outcomes.iter().filter_map(RunResults::explain).collect::<Vec<_>>(), Vec::<String>::new());
    assert!(outcomes[4].tests().pass > 10);
    let account = warehouse.one("select concat_ws(' ', account_id, balance, opened_at, is_current) from analytics.dim_accounts where is_current").await;
    assert_eq!(account, "7 100.00 2026-03-01 12:34:56.123456 t");
    assert_eq!(warehouse.one("select concat_ws(' ', first_name, last_name, date_of_birth) from analytics.dim_customers").await, "Zoë O'Neil 1960-01-01");
    assert_eq!(warehouse.one("select concat_ws(' ', transaction_id, amount, status) from analytics.fct_transactions").await, "3 100.00 COMPLETED");
    let nodes = worker.nodes();
    for (place, node) in nodes.iter().enumerate() {
        for parent in &node.depends_on {
            assert!(nodes[..place].iter().any(|it| it.unique_id == *parent), "{} stands before {parent}", node.name);
        }
    }
    assert_eq!(nodes.iter().filter(|it| it.kind == Kind::Snapshot).count(), 2);
    assert!(!project().join("target").exists(), "dbt writes to its work dir, never into the project");

    worker.stop().await;
    warehouse.drop().await;
}

#[tokio::test]
async fn a_failing_test_shows_its_rows_and_its_sql_until_the_bank_is_in_balance_again() {
    let (mut warehouse, work_dir) = (Warehouse::create("failing").await, tempfile::tempdir().unwrap());
    warehouse.open_account("99.99").await;
    let worker = start(&warehouse, &project(), work_dir.path()).await;

    let outcomes = tasks(&worker).await;
    let again = invoke(&worker, Invocation::of_task("dbt_test_analytics").unwrap()).await.unwrap();

    for tests in [&outcomes[4], &again] {
        assert!(!tests.ok());
        let failed: Vec<_> = tests.failed().collect();
        assert_eq!(failed.iter().map(|it| it.node.name.as_str()).collect::<Vec<_>>(), ["assert_debit_equals_credit"]);
        let failing = failed[0].failing.as_ref().unwrap();
        assert_eq!(failing.columns, ["transaction_id", "debit", "credit"]);
        assert_eq!(failing.rows, [["3", "100.00", "99.99"].map(|it| Some(it.to_owned()))]);
        let compiled = std::fs::read_to_string(failed[0].compiled.as_ref().unwrap()).unwrap();
        assert!(compiled.contains("having sum("), "{compiled}");
    }

    let corrected =
        json!({"id": 12, "transaction_id": 3, "account_id": null, "entry_type": "CREDIT", "amount": "100.00", "created_at": "2026-03-01T12:34:56.123456Z"});
    warehouse.commit(703, &[("ledger_entries", "u", corrected)]).await;
    let outcomes = tasks(&worker).await;
    assert_eq!(outcomes.iter().filter_map(RunResults::explain).collect::<Vec<_>>(), Vec::<String>::new());

    worker.stop().await;
    warehouse.drop().await;
}

#[tokio::test]
async fn a_project_broken_by_hand_shows_its_error_and_turns_green_after_the_repair() {
    let (mut warehouse, work_dir, broken) = (Warehouse::create("broken").await, tempfile::tempdir().unwrap(), copy_of_project());
    warehouse.open_account("100.00").await;
    let worker = start(&warehouse, broken.path(), work_dir.path()).await;
    let staging = || Invocation::of_task("dbt_staging").unwrap();
    assert!(invoke(&worker, staging()).await.unwrap().ok());

    let model = broken.path().join("models/staging/stg_bank__accounts.sql");
    let sound = std::fs::read_to_string(&model).unwrap();
    std::fs::write(&model, sound.replace("from changes", "from chnages")).unwrap();
    let wrong_sql = invoke(&worker, staging()).await.unwrap();
    std::fs::write(&model, sound.replace("{{ changes('accounts') }}", "{{ chnages('accounts') }}")).unwrap();
    let wrong_macro = invoke(&worker, staging()).await;
    std::fs::write(&model, sound.replace("{{ changes('accounts') }}", "{{ changes('accounts')")).unwrap();
    let wrong_jinja = invoke(&worker, staging()).await;
    std::fs::write(&model, sound).unwrap();
    let repaired = invoke(&worker, staging()).await.unwrap();

    assert!(!wrong_sql.ok());
    let explained = wrong_sql.explain().unwrap();
    assert!(explained.contains("stg_bank__accounts") && explained.contains("relation \"chnages\" does not exist"), "{explained}");
    let text = match wrong_macro {
        Ok(results) => results.explain().unwrap(),
        Err(error) => error.to_string(),
    };
    assert!(text.contains("'chnages' is undefined"), "{text}");
    match wrong_jinja {
        Err(error @ Error::Project(_)) => {
            assert!(error.to_string().contains("stg_bank__accounts"), "{error}");
            assert!(matches!(error.fault(), Fault::Operator(_)));
        }
        other => panic!("{other:?}"),
    }
    assert!(repaired.ok(), "{:?}", repaired.explain());
    assert_eq!(worker.stats().borrow().starts, 1, "a broken project is no reason to start dbt again");

    worker.stop().await;
    warehouse.drop().await;
}

fn customer(address: &str) -> Value {
    let now = "2026-03-01T12:34:56.123456Z";
    json!({"id": 1, "first_name": "Zoë", "last_name": "O'Neil", "email": "zoe@example.com", "phone": null, "date_of_birth": -3653, "address": address, "status": "ACTIVE", "created_at": now, "updated_at": now})
}

#[tokio::test]
async fn a_missing_row_stops_the_cut_until_it_arrives_or_is_a_dead_letter() {
    let (mut warehouse, work_dir) = (Warehouse::create("cut").await, tempfile::tempdir().unwrap());
    warehouse.open_account("100.00").await;
    let worker = start(&warehouse, &project(), work_dir.path()).await;
    let cut = "select max(lsn)::text from staging.cut";
    let end_of = |xid: i64| json!({"status": "END", "id": format!("{xid}:{}", xid * 1000 + 500), "data_collections": [{"data_collection": "public.customers", "event_count": 1}], "ts_ms": 1_790_000_000_000_i64 + xid});
    assert!(tasks(&worker).await.iter().all(RunResults::ok));
    assert_eq!(warehouse.one(cut).await, "702500");

    // 703 says it changed a customer; nobody has seen the row. Everything after it waits.
    warehouse.land("boundaries", end_of(703)).await;
    warehouse.commit(704, &[("customers", "u", customer("2 Side Street"))]).await;
    assert!(tasks(&worker).await.iter().all(RunResults::ok));
    assert_eq!(warehouse.one(cut).await, "702500");

    // It could not be decoded: counted as arrived, for its lane has shown a later commit.
    let reject = r#"insert into raw._rejected values ('bank.public.customers', 0, (select max(_offset) + 1 from raw.customers), 'not JSON', null, null, null, null);
        insert into raw._loads (topic, partition, first_offset, last_offset, rows) select topic, partition, "offset", "offset", 1 from raw._rejected;
        insert into raw.customers select null, topic, partition, "offset" from raw._rejected"#;
    warehouse.sql.execute(reject).await.unwrap();
    let outcomes = tasks(&worker).await;
    assert_eq!(outcomes.iter().filter_map(RunResults::explain).collect::<Vec<_>>(), Vec::<String>::new());
    assert_eq!(warehouse.one(cut).await, "704500");
    assert_eq!(warehouse.one("select written_off_customers::text from staging.cut order by lsn desc limit 1").await, "1");
    assert_eq!(warehouse.one("select address from analytics.dim_customers where is_current").await, "2 Side Street");

    // One dead letter excuses one row.
    warehouse.land("boundaries", end_of(705)).await;
    warehouse.commit(706, &[("customers", "u", customer("3 Back Street"))]).await;
    assert!(tasks(&worker).await.iter().all(RunResults::ok));
    assert_eq!(warehouse.one(cut).await, "704500");

    // One that says whose it is excuses its own commit, even the very last.
    warehouse.land("boundaries", end_of(707)).await;
    let reject = r#"insert into raw._rejected (topic, partition, "offset", reason, tx_id, lsn, op, key)
            select 'bank.public.customers', 0, max(_offset) + n, 'zero byte', 703 + 2 * n, 703000 + 2000 * n, 'u', '1' from raw.customers, generate_series(1, 2) as n group by n;
        insert into raw._loads (topic, partition, first_offset, last_offset, rows) select topic, partition, "offset", "offset", 1 from raw._rejected where tx_id > 0;
        insert into raw.customers select null, topic, partition, "offset" from raw._rejected where tx_id > 0"#;
    warehouse.sql.execute(reject).await.unwrap();
    let outcomes = tasks(&worker).await;
    assert_eq!(outcomes.iter().filter_map(RunResults::explain).collect::<Vec<_>>(), Vec::<String>::new());
    assert_eq!(warehouse.one(cut).await, "707500");

    worker.stop().await;
    warehouse.drop().await;
}

impl Warehouse {
    /// A customer as an attempt at the initial snapshot read it.
    async fn read(&mut self, lsn: i64, id: i64, address: &str) {
        let mut row = customer(address);
        row["id"] = id.into();
        let source = json!({"txId": 600, "lsn": lsn, "ts_us": 1_780_000_000_000_000_i64 + lsn, "snapshot": "true", "table": "customers"});
        self.land("customers", json!({"before": null, "after": row, "source": source, "op": "r"})).await;
    }

    /// The snapshot that was read at `lsn` ended where the lanes end now.
    async fn end_snapshot(&mut self, lsn: i64) {
        let ends = "insert into raw._snapshot_ends
            select 'bank.public.' || name, 0, case name when 'customers' then (select count(*) from raw.customers) else 0 end, $1
            from unnest(array['customers', 'accounts', 'transactions', 'ledger_entries']) as name";
        sqlx::query(ends).bind(lsn).execute(&mut self.sql).await.unwrap();
    }
}

/// All five tasks, of a capture that begins with a snapshot; all of them are green.
async fn tasks_with_snapshot(worker: &Worker) {
    for (task, ..) in TASKS {
        let invocation = Invocation::of_task(task).unwrap().with_var("snapshot", "initial").with_timeout(PATIENCE);
        let outcome = worker.invoke(invocation, quiet(), CancellationToken::new()).await.unwrap();
        assert_eq!(outcome.explain(), None);
    }
}

#[tokio::test]
async fn a_snapshot_taken_again_raises_nobody_who_was_deleted_between_the_attempts() {
    let (mut warehouse, work_dir) = (Warehouse::create("attempts").await, tempfile::tempdir().unwrap());
    let worker = start(&warehouse, &project(), work_dir.path()).await;
    let cut = "select coalesce(max(lsn), -1)::text from staging.cut";
    let staged =
        "select coalesce(string_agg(concat_ws(' ', customer_id, op, tx_lsn, address), ', ' order by tx_lsn, customer_id), '') from staging.stg_bank__customers";

    // The first attempt dies on its way; then 2 is deleted and 1 moves; the second is half through.
    for id in 1..=3 {
        warehouse.read(5_000, id, "Old Street").await;
    }
    warehouse.read(9_000, 1, "New Street").await;
    tasks_with_snapshot(&worker).await;
    assert_eq!((warehouse.one(cut).await.as_str(), warehouse.one(staged).await.as_str()), ("-1", ""));

    // What streams after it waits for it.
    warehouse.read(9_000, 3, "Old Street").await;
    warehouse.end_snapshot(9_000).await;
    warehouse.commit(700, &[("customers", "u", customer("Far Street"))]).await;
    tasks_with_snapshot(&worker).await;
    assert_eq!(warehouse.one(cut).await, "700500");
    assert_eq!(warehouse.one(staged).await, "1 r 9000 New Street, 3 r 9000 Old Street, 1 u 700500 Far Street");
    let current = "select string_agg(concat_ws(' ', customer_id, address), ', ' order by customer_id) from analytics.dim_customers where is_current";
    assert_eq!(warehouse.one(current).await, "1 Far Street, 3 Old Street");

    // A straggler of the first attempt changes nothing, and holds nothing up.
    warehouse.read(5_000, 4, "Old Street").await;
    warehouse.commit(701, &[("customers", "u", customer("Near Street"))]).await;
    tasks_with_snapshot(&worker).await;
    assert_eq!(warehouse.one(cut).await, "701500");
    assert_eq!(warehouse.one(current).await, "1 Near Street, 3 Old Street");

    worker.stop().await;
    warehouse.drop().await;
}

#[tokio::test]
async fn a_snapshot_that_found_nothing_left_is_not_the_attempt_before_it() {
    let (mut warehouse, work_dir) = (Warehouse::create("emptied").await, tempfile::tempdir().unwrap());
    let worker = start(&warehouse, &project(), work_dir.path()).await;
    warehouse.read(5_000, 1, "Old Street").await;
    warehouse.read(5_000, 2, "Old Street").await;
    warehouse.end_snapshot(9_000).await;
    warehouse.commit(700, &[("customers", "c", customer("New Street"))]).await;
    tasks_with_snapshot(&worker).await;
    let staged = "select string_agg(concat_ws(' ', customer_id, op, tx_lsn), ', ') from staging.stg_bank__customers";
    assert_eq!(warehouse.one(staged).await, "1 c 700500");
    assert_eq!(warehouse.one("select string_agg(concat_ws(' ', customer_id, address), ', ') from analytics.dim_customers").await, "1 New Street");

    worker.stop().await;
    warehouse.drop().await;
}

impl Warehouse {
    /// A customer as an incremental snapshot read it: it tells neither LSN nor transaction.
    async fn read_again(&mut self, id: i64, address: &str) {
        let mut row = customer(address);
        row["id"] = id.into();
        let source = json!({"txId": null, "lsn": null, "sequence": "[\"1\",\"1\"]", "ts_us": 1_790_000_000_000_000_i64, "snapshot": "incremental", "table": "customers"});
        self.land("customers", json!({"before": null, "after": row, "source": source, "op": "r", "transaction": null})).await;
    }
}

#[tokio::test]
async fn what_is_read_again_repeats_a_state_and_hides_no_newer_one() {
    let (mut warehouse, work_dir) = (Warehouse::create("reread").await, tempfile::tempdir().unwrap());
    let worker = start(&warehouse, &project(), work_dir.path()).await;
    let cut = "select max(lsn)::text from staging.cut";
    let versions = "select string_agg(concat_ws(' ', customer_id, address, case when is_current then 'now' end), ', ' order by customer_id, valid_from) from analytics.dim_customers";
    let states = "select string_agg(concat_ws(' ', customer_id, address), ', ' order by customer_id, dbt_valid_from) from snapshots.snap_customers where dbt_valid_to is null";
    let green = async |worker: &Worker| {
        let outcomes = tasks(worker).await;
        assert_eq!(outcomes.iter().filter_map(RunResults::explain).collect::<Vec<_>>(), Vec::<String>::new());
    };

    // 1 was captured all along, and moved before its old state, read earlier, arrives. Of 2 nothing is known.
    warehouse.open_account("100.00").await;
    warehouse.commit(703, &[("customers", "u", customer("2 Side Street"))]).await;
    warehouse.read_again(1, "1 Main Street").await;
    warehouse.read_again(2, "Old Street").await;
    green(&worker).await;
    assert_eq!(warehouse.one(cut).await, "703501");
    assert_eq!(warehouse.one(versions).await, "1 1 Main Street, 1 2 Side Street now, 2 Old Street now");

    // Read once more, and while nobody commits; then its newer state is owed, and comes after the read.
    warehouse.read_again(2, "Old Street").await;
    warehouse.read_again(3, "Old Street").await;
    let end = json!({"status": "END", "id": "704:704500", "data_collections": [{"data_collection": "public.customers", "event_count": 1}], "ts_ms": 1_790_000_704_000_i64});
    green(&worker).await;
    assert_eq!(warehouse.one(cut).await, "703502");
    warehouse.land("boundaries", end).await;
    warehouse.read_again(4, "Old Street").await;
    green(&worker).await;
    assert_eq!(warehouse.one(cut).await, "703502");
    let mut moved = customer("New Street");
    moved["id"] = 4.into();
    let source = json!({"txId": 704, "lsn": 704_000, "ts_us": 1_790_000_704_000_000_i64, "table": "customers"});
    warehouse.land("customers", json!({"before": null, "after": moved, "source": source, "op": "u"})).await;
    green(&worker).await;
    assert_eq!(warehouse.one(cut).await, "704501");
    assert_eq!(warehouse.one(versions).await, "1 1 Main Street, 1 2 Side Street now, 2 Old Street now, 3 Old Street now, 4 New Street now");
    assert_eq!(warehouse.one(states).await, "1 2 Side Street, 2 Old Street, 3 Old Street, 4 New Street");

    // There is room for seven between two commits; what finds none waits for the next.
    for id in [5, 6, 7] {
        warehouse.read_again(id, "Old Street").await;
        green(&worker).await;
    }
    assert_eq!(warehouse.one(cut).await, "704503");
    assert_eq!(warehouse.one("select max(customer_id)::text from analytics.dim_customers").await, "6");
    warehouse.commit(705, &[("customers", "u", customer("3 Back Street"))]).await;
    green(&worker).await;
    assert_eq!(warehouse.one(cut).await, "705501");
    assert_eq!(
        warehouse.one("select string_agg(customer_id::text, ' ' order by customer_id) from analytics.dim_customers where is_current").await,
        "1 2 3 4 5 6 7"
    );

    worker.stop().await;
    warehouse.drop().await;
}

#[tokio::test]
async fn a_row_too_many_and_an_end_that_differs_are_alarms_however_late_they_come() {
    let (mut warehouse, work_dir) = (Warehouse::create("alarms").await, tempfile::tempdir().unwrap());
    warehouse.open_account("100.00").await;
    let worker = start(&warehouse, &project(), work_dir.path()).await;
    assert!(tasks(&worker).await.iter().all(RunResults::ok));

    let source = json!({"txId": 702, "lsn": 702_099, "ts_us": 1_790_000_000_000_000_i64});
    warehouse.land("customers", json!({"before": null, "after": customer("Nowhere"), "source": source, "op": "u"})).await;
    warehouse.land("boundaries", json!({"status": "END", "id": "702:702500", "data_collections": [{"data_collection": "public.accounts", "event_count": 9}], "ts_ms": 1_790_000_000_000_i64})).await;
    warehouse.commit(703, &[("customers", "u", customer("2 Side Street"))]).await;
    let outcomes = tasks(&worker).await;

    let failed: Vec<&str> = outcomes[1].failed().map(|it| it.node.name.as_str()).collect();
    assert_eq!(failed.len(), 2, "{failed:?}");
    assert!(failed.contains(&"assert_every_commit_is_whole") && failed.contains(&"assert_repeated_ends_agree"), "{failed:?}");

    worker.stop().await;
    warehouse.drop().await;
}

/// A model that takes for ever, so that a run can be met in the middle.
fn with_endless_model(project: &Path) {
    std::fs::write(
        project.join("models/staging/endless.sql"),
        "{{ config(materialized='table', tags=['endless'], post_hook=[]) }} select 1 as id from pg_sleep(3600)",
    )
    .unwrap();
}

fn pid(raw: u32) -> Pid {
    Pid::from_raw(raw.cast_signed()).unwrap()
}

fn signal(process: u32, signal: Signal) {
    rustix::process::kill_process(pid(process), signal).unwrap();
}

fn lives(process: u32) -> bool {
    rustix::process::test_kill_process(pid(process)).is_ok()
}

async fn until_asleep(warehouse: &mut Warehouse, sleepers: i64) {
    // Polled, since pg_stat_activity tells nobody when it changes.
    let query =
        "select count(*) from pg_stat_activity where datname = current_database() and application_name like 'ledgerline dbt%' and wait_event = 'PgSleep'";
    let waited = async {
        while sqlx::query_scalar::<_, i64>(query).fetch_one(&mut warehouse.sql).await.unwrap() != sleepers {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waited).await.expect("the number of sleeping queries is reached");
}

#[tokio::test]
async fn a_run_is_cancelled_with_its_queries_and_a_killed_worker_is_replaced() {
    let (mut warehouse, work_dir, project) = (Warehouse::create("cancel").await, tempfile::tempdir().unwrap(), copy_of_project());
    warehouse.open_account("100.00").await;
    with_endless_model(project.path());
    let worker = start(&warehouse, project.path(), work_dir.path()).await;
    let endless = || Invocation::new(Command::Run, ["endless"]);
    let staging = || Invocation::new(Command::Run, ["arrivals"]);

    // Cancelled: dbt ends its own queries, and the process stays.
    let cancel = CancellationToken::new();
    let (outcome, ()) = tokio::join!(worker.invoke(without_snapshot(endless()), quiet(), cancel.clone()), async {
        until_asleep(&mut warehouse, 1).await;
        cancel.cancel();
    });
    assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
    until_asleep(&mut warehouse, 0).await;
    assert!(invoke(&worker, staging()).await.unwrap().ok());
    assert_eq!(worker.stats().borrow().starts, 1);

    // Too slow.
    let outcome = worker.invoke(endless().with_timeout(Duration::from_millis(800)), quiet(), CancellationToken::new()).await;
    assert!(matches!(outcome, Err(Error::TimedOut(_))), "{outcome:?}");
    until_asleep(&mut warehouse, 0).await;
    assert!(invoke(&worker, staging()).await.unwrap().ok());

    // Killed: the run fails, its query sleeps on, and the next run ends it first.
    let (pid, starts) = (worker.stats().borrow().pid.unwrap(), worker.stats().borrow().starts);
    let (outcome, ()) = tokio::join!(invoke(&worker, endless()), async {
        until_asleep(&mut warehouse, 1).await;
        signal(pid, Signal::KILL);
    });
    match outcome {
        Err(error @ Error::Died { .. }) => assert!(error.to_string().contains("signal: 9") && error.fault() == Fault::Transient, "{error}"),
        other => panic!("{other:?}"),
    }
    assert!(invoke(&worker, staging()).await.unwrap().ok());
    until_asleep(&mut warehouse, 0).await;
    assert_eq!(worker.stats().borrow().starts, starts + 1);

    // Deaf: it does not hear that it is cancelled, and is killed.
    let pid = worker.stats().borrow().pid.unwrap();
    let cancel = CancellationToken::new();
    let (outcome, ()) = tokio::join!(worker.invoke(without_snapshot(endless()), quiet(), cancel.clone()), async {
        until_asleep(&mut warehouse, 1).await;
        signal(pid, Signal::STOP);
        cancel.cancel();
    });
    assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
    until_asleep(&mut warehouse, 0).await;
    assert!(invoke(&worker, staging()).await.unwrap().ok());
    assert_eq!(worker.stats().borrow().starts, starts + 2);

    // Stopped in the middle: nothing is left, neither process nor query.
    let pid = worker.stats().borrow().pid.unwrap();
    let (outcome, ()) = tokio::join!(invoke(&worker, endless()), async {
        until_asleep(&mut warehouse, 1).await;
        worker.clone().stop().await;
    });
    assert!(outcome.is_err(), "{outcome:?}");
    until_asleep(&mut warehouse, 0).await;
    assert!(!lives(pid));
    assert!(matches!(invoke(&worker, staging()).await, Err(Error::Stopped)));
    warehouse.drop().await;
}

#[tokio::test]
async fn the_worker_ends_with_its_queries_when_nobody_listens_any_more() {
    let (mut warehouse, work_dir, project) = (Warehouse::create("orphan").await, tempfile::tempdir().unwrap(), copy_of_project());
    with_endless_model(project.path());
    let address = url::Url::parse(warehouse.database.url.reveal()).unwrap();
    // As in the background of a script, where interruptions are ignored.
    let mut orphan = tokio::process::Command::new("sh")
        .args(["-c", "trap '' INT; exec \"$0\" \"$@\""])
        .arg(python())
        .args(["-I", concat!(env!("CARGO_MANIFEST_DIR"), "/src/dbt/worker.py")])
        .arg(project.path())
        .arg(work_dir.path())
        .env("LEDGERLINE_DBT_HOST", address.host_str().unwrap())
        .env("LEDGERLINE_DBT_PORT", address.port().unwrap_or(5432).to_string())
        .env("LEDGERLINE_DBT_USER", address.username())
        .env("DBT_ENV_SECRET_LEDGERLINE_PASSWORD", address.password().unwrap_or_default())
        .env("LEDGERLINE_DBT_DATABASE", &warehouse.database.name)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut stdin = orphan.stdin.take().unwrap();
    let request = json!({"id": 1, "command": "run", "select": ["endless"], "vars": {"snapshot": "never"}});
    stdin.write_all(format!("{request}\n").as_bytes()).await.unwrap();
    until_asleep(&mut warehouse, 1).await;

    drop(stdin);

    tokio::time::timeout(PATIENCE, orphan.wait()).await.expect("it ends").unwrap();
    until_asleep(&mut warehouse, 0).await;
    warehouse.drop().await;
}

#[tokio::test]
async fn a_dbt_that_cannot_start_says_what_to_do() {
    let (warehouse, work_dir) = (Warehouse::create("start").await, tempfile::tempdir().unwrap());
    let target = Target::from_url(&warehouse.database.url.clone()).unwrap();

    let config = Config { project_dir: work_dir.path().join("nowhere"), ..Config::default() };
    let nowhere = Worker::start(&python(), &config, target.clone(), work_dir.path()).await;
    assert!(matches!(nowhere, Err(Error::NoProject(_))), "{nowhere:?}");

    let config = Config { project_dir: project(), ..Config::default() };
    let missing = Worker::start(Path::new("/nowhere/python"), &config, target.clone(), work_dir.path()).await.unwrap();
    let outcome = invoke(&missing, Invocation::new(Command::Run, ["cut"])).await;
    assert!(matches!(&outcome, Err(error @ Error::Start { .. }) if matches!(error.fault(), Fault::Operator(_))), "{outcome:?}");

    // A python without dbt: it dies, and its last words say why.
    let bare = work_dir.path().join("bare.sh");
    std::fs::write(&bare, "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'dbt'\" >&2\nexit 1\n").unwrap();
    std::fs::set_permissions(&bare, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let bare = Worker::start(&bare, &config, target, work_dir.path()).await.unwrap();
    let outcome = invoke(&bare, Invocation::new(Command::Run, ["cut"])).await;
    assert!(matches!(&outcome, Err(Error::Died { stderr, .. }) if stderr.contains("No module named 'dbt'")), "{outcome:?}");
    warehouse.drop().await;
}

/// A handful of landing states by default; `LEDGERLINE_TEST_LANDING_STATES=110 LEDGERLINE_TEST_SEEDS=1,2,3,4,5` for a night.
#[tokio::test]
async fn analytics_is_the_bank_as_it_was_at_the_cut_at_every_landing_state() {
    let (warehouse, work_dir) = (Warehouse::create("states").await, tempfile::tempdir().unwrap());
    let states = std::env::var("LEDGERLINE_TEST_LANDING_STATES").unwrap_or_else(|_| "4".to_owned());
    let seeds = crate::house::seeds("2,5,3").iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    let transactions = if states.parse::<u32>().unwrap() > 20 { "1800" } else { "300" };

    let output = tokio::process::Command::new(python())
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dbt/landing_states.py"))
        .args(["--database", warehouse.database.url.reveal(), "--seeds", &seeds, "--states", &states, "--transactions", transactions, "--big", "100"])
        .arg("--work-dir")
        .arg(work_dir.path())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();

    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    println!("{said}");
    warehouse.drop().await;
}
