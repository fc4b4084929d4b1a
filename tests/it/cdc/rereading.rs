//! A table read again while the stream goes on.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use ledgerline::{
    cdc::{self, Config, Step},
    fault::{Diagnose as _, Fault},
    secret::Secret,
};
use sqlx::{Connection as _, PgConnection};
use tokio::task::JoinHandle;

use super::{
    days::{PAYMENTS, finish, held, parsed},
    house::{Broker, Capture, Database, Read, config},
    networks::until_read,
};

const ROWS: i64 = 20_000;
/// Ids that writers leave alone.
const UNTOUCHED: i64 = 10_000;

struct House {
    database: Database,
    broker: Broker,
    config: Config,
}

impl House {
    async fn new(test: &str) -> Self {
        let database = Database::create(test).await;
        database.run(PAYMENTS).await;
        database.run(&format!("insert into payments select id, 1.00, repeat('x', 50) from generate_series(1, {ROWS}) id;")).await;
        let broker = Broker::start(&database, &["public.payments", "public.fees"], 1);
        let config = config(&database);
        Self { database, broker, config }
    }

    fn start(&self) -> Capture {
        Capture::start(&self.database, self.broker.address(), self.config.clone())
    }

    async fn ask(&self) -> Result<Option<cdc::Request>, cdc::Error> {
        cdc::resnapshot(&self.database.url, &self.database.url, &self.config, "public.payments", false).await
    }

    async fn waiting(&self) -> Vec<cdc::Request> {
        cdc::standing(&self.database.url, &self.database.url, &self.config).await.expect("the source answers").incremental_snapshots
    }

    async fn until_read(&self) {
        let read = async {
            while !self.waiting().await.is_empty() {
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(super::house::PATIENCE, read).await.expect("it is read");
    }
}

/// Changes, deletes and brings back all rows but those that are to be left alone, again and again, until told to stop.
fn change_payments(url: Secret) -> (Arc<AtomicBool>, JoinHandle<()>) {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let writing = tokio::spawn(async move {
        let mut connection = PgConnection::connect(url.reveal()).await.expect("the test's database");
        for id in (UNTOUCHED + 1..=ROWS).cycle().take_while(|_| !stopped.load(Ordering::Relaxed)) {
            for statement in [
                "update payments set amount = amount + 1 where id = $1",
                "delete from payments where id = $1 and $1 % 7 = 0",
                "insert into payments select $1 - 70, 5.00, 'back' where $1 % 7 = 0 and $1 > 10100 on conflict do nothing",
            ] {
                sqlx::query(statement).bind(id).execute(&mut connection).await.expect("written");
            }
        }
    });
    (stop, writing)
}

/// What a reader of the topic holds after all its events, whatever repeats, and how often each row was read again.
fn read_along(records: &[Read]) -> (BTreeMap<i64, String>, HashMap<i64, usize>) {
    let (mut rows, mut again) = (BTreeMap::new(), HashMap::new());
    for event in records.iter().filter_map(parsed) {
        if event["op"] == "d" {
            rows.remove(&event["before"]["id"].as_i64().expect("an id"));
            continue;
        }
        let id = event["after"]["id"].as_i64().expect("an id");
        rows.insert(id, event["after"]["amount"].as_str().expect("a string").to_owned());
        if event["source"]["snapshot"] == "incremental" {
            assert!(event["op"] == "r" && event["source"]["lsn"].is_null() && event["source"]["txId"].is_null() && event["transaction"].is_null(), "{event}");
            *again.entry(id).or_default() += 1;
        }
    }
    (rows, again)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_row_that_is_read_again_hides_a_newer_change() {
    let mut house = House::new("reread").await;
    let capture = house.start();
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    let writing = change_payments(house.database.url.clone());
    let asked = house.ask().await.expect("it may be read").expect("asked for");
    assert_eq!(house.ask().await.expect("it may be read"), Some(asked), "asked for once");
    house.until_read().await;
    finish(writing).await;
    capture.drain(&house.database).await;
    let (rows, again) = read_along(&house.broker.read("public.payments"));
    assert_eq!(rows, held(&house.database).await);
    assert!((1..=UNTOUCHED).all(|id| again.get(&id) == Some(&1)), "every row that nobody changed is read once");
    capture.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_is_read_on_where_a_killed_capture_left_it() {
    let mut house = House::new("reread_killed").await;
    let capture = house.start();
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    house.ask().await.expect("it may be read");
    capture.until("some chunks", |it| it.incremental_snapshot.as_ref().is_some_and(|it| it.rows > 0)).await;
    capture.kill().await;
    let left = house.waiting().await.pop().expect("it is not finished");
    assert!(left.rows > 0, "{left:?}");

    let capture = house.start();
    house.until_read().await;
    capture.drain(&house.database).await;
    let (rows, again) = read_along(&house.broker.read("public.payments"));
    assert_eq!(rows, held(&house.database).await);
    assert!((1..=ROWS).all(|id| again.contains_key(&id)), "every row");
    assert_eq!(again[&1], 1, "the first chunk is not read twice");
    capture.stop().await;
}

#[tokio::test]
async fn what_cannot_be_read_again_is_refused_with_the_remedy() {
    let house = House::new("reread_refused").await;
    house.database.run("create table public.notes (text text);").await;
    let ask = async |table: &str| cdc::resnapshot(&house.database.url, &house.database.url, &house.config, table, true).await;
    for (table, told) in [("public.nothing", "not among those"), ("public.notes", "no primary key"), ("public.payments", "publication")] {
        let error = ask(table).await.expect_err("it cannot");
        assert!(error.to_string().contains(told) && matches!(error.fault(), Fault::Operator(_)), "{error}");
    }
    let mistyped = ask("paymnts").await.expect_err("it cannot");
    assert!(matches!(mistyped.fault(), Fault::Operator(remedy) if remedy == "name one of them: public.payments, public.notes"), "{mistyped}");
}

#[tokio::test]
async fn a_table_that_cannot_be_read_any_more_is_given_up_and_told() {
    let house = House::new("reread_given_up").await;
    let capture = house.start();
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    capture.stop().await;
    house.ask().await.expect("it may be read");
    house.database.run("alter table payments drop constraint payments_pkey;").await;
    let capture = house.start();
    let given_up = async {
        loop {
            match house.waiting().await.pop().expect("it is told").failure {
                Some(why) => return why,
                None => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
            }
        }
    };
    let why = tokio::time::timeout(super::house::PATIENCE, given_up).await.expect("it is given up");
    assert!(why.contains("no primary key"), "{why}");
    capture.stop().await;
}

#[tokio::test]
async fn a_table_with_rows_from_before_is_captured_after_it_was_read() {
    let mut house = House::new("reread_joins").await;
    let capture = house.start();
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    house.database.run("create table public.fees (id bigint primary key, amount text); insert into public.fees values (1, '1.00');").await;
    capture.until("left out", |it| it.uncaptured == ["public.fees"]).await;
    cdc::resnapshot(&house.database.url, &house.database.url, &house.config, "public.fees", false).await.expect("it may be read");
    house.until_read().await;
    house.database.run("insert into public.fees values (2, '2.00');").await;
    capture.drain(&house.database).await;
    assert_eq!(read_along(&house.broker.read("public.fees")).0.len(), 2);
    capture.until("captured", |it| it.uncaptured.is_empty()).await;
    capture.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_was_cut_short_goes_on_without_losing_the_streams_place() {
    let database = Database::create("goes_on").await;
    database
        .run("create table public.fees (id bigint primary key, amount text); insert into public.fees select id, '1.00' from generate_series(1, 100) id;")
        .await;
    database.run(PAYMENTS).await;
    database.run(&format!("insert into payments select id, 1.00, repeat('x', 50) from generate_series(1, {ROWS}) id;")).await;
    let mut broker = Broker::in_memory(&database, &["public.fees", "public.payments"], 1);
    // The broker takes long for each answer: once it has the fees, the payments are still on their way.
    broker.mock().broker_round_trip_time(1, std::time::Duration::from_millis(300)).expect("slow");
    let first = Capture::start(&database, broker.address(), config(&database));
    first.until("reading", |it| it.snapshot.as_ref().is_some_and(|it| it.tables_done == 1)).await;
    broker.mock().broker_round_trip_time(1, std::time::Duration::from_secs(3)).expect("slower");
    let mut state = database.connect().await;
    let read = async {
        while sqlx::query_scalar::<_, i64>("select coalesce(jsonb_array_length(tables_read), 0)::bigint from ledgerline.cdc_snapshot")
            .fetch_one(&mut state)
            .await
            .expect("a row")
            == 0
        {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(super::house::PATIENCE, read).await.expect("the fees are read");
    first.kill().await;
    assert_eq!(cdc::snapshot_ends(&database.url, &database.name).await.expect("the state"), None);
    let began: i64 = sqlx::query_scalar("select lsn from ledgerline.cdc_snapshot").fetch_one(&mut state).await.expect("where the slot began");
    broker.mock().broker_round_trip_time(1, std::time::Duration::ZERO).expect("fast");
    database.run("update payments set amount = 2 where id = 5; delete from payments where id = 6; update public.fees set amount = '3.00' where id = 1;").await;

    let second = Capture::start(&database, broker.address(), config(&database));
    let ends = until_read(&database, &config(&database)).await;
    assert_eq!(i64::try_from(ends.lsn.0), Ok(began), "the same slot");
    second.drain(&database).await;
    second.stop().await;
    assert_eq!(read_along(&broker.read("public.payments")).0, held(&database).await);
    let (fees, again) = read_along(&broker.read("public.fees"));
    assert_eq!((fees.len(), fees[&1].as_str(), again.len()), (100, "3.00", 0), "what was read is not read again");
    assert!(ends.ends.iter().any(|it| it.topic.ends_with("payments") && it.end_offset >= ROWS), "{ends:?}");
}
