//! Ordinary and bad days: whatever happens, every change arrives, in order, and what cannot arrive is told.

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroU32,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ledgerline::{
    cdc::{self, Config, SnapshotMode, Step},
    dlq::{Letter, Origin},
    secret::Secret,
    stage::Phase,
    stream::{producer::QUEUE_MESSAGES, range::Kept, topics::Topics},
};
use serde_json::Value;
use sqlx::{Connection as _, PgConnection};
use tokio::task::JoinHandle;

use super::{
    house::{Broker, Capture, Database, HEARTBEAT, PATIENCE, Read, config, without_times},
    refusals::refuses,
};
use crate::lane::Stream;

pub(super) const PAYMENTS: &str =
    "create table payments (id bigint primary key, amount numeric(18,2) not null, note text); alter table payments replica identity full;";

/// Inserts, updates and deletes until told to stop, or all of `ids` are used; several may run, each on ids of its own.
pub(super) fn write_payments(url: Secret, mut ids: Range<i64>) -> (Arc<AtomicBool>, JoinHandle<()>) {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let writing = tokio::spawn(async move {
        let mut connection = PgConnection::connect(url.reveal()).await.expect("the test's database");
        for id in ids.by_ref().take_while(|_| !stopped.load(Ordering::Relaxed)) {
            let mut transaction = connection.begin().await.expect("begin");
            for statement in [
                "insert into payments values ($1, 1.00, 'new')",
                "update payments set amount = 2.50 where id = $1 - 1",
                "delete from payments where id = $1 - 3 and $1 % 2 = 0",
            ] {
                sqlx::query(statement).bind(id).execute(&mut *transaction).await.expect("written");
            }
            transaction.commit().await.expect("commit");
        }
    });
    (stop, writing)
}

pub(super) async fn finish((stop, writing): (Arc<AtomicBool>, JoinHandle<()>)) {
    stop.store(true, Ordering::Relaxed);
    writing.await.expect("the writer ends well");
}

/// What the table holds: id → amount.
pub(super) async fn held(database: &Database) -> BTreeMap<i64, String> {
    let rows: Vec<(i64, String)> = sqlx::query_as("select id, amount::text from payments").fetch_all(&mut database.connect().await).await.expect("rows");
    rows.into_iter().collect()
}

pub(super) fn parsed(record: &Read) -> Option<Value> {
    record.value.as_ref().map(|it| serde_json::from_str(it).expect("JSON"))
}

/// What a reader of the topic holds after all its events, and how many distinct changes it saw. A change that comes again
/// must be the same bytes but for the times.
pub(super) fn replayed(records: &[Read]) -> (BTreeMap<i64, String>, usize) {
    let mut rows = BTreeMap::new();
    let mut seen: HashMap<(String, String, String, String), String> = HashMap::new();
    for record in records {
        let Some(event) = parsed(record) else { continue };
        let (key, raw) = (record.key.clone().expect("a key"), record.value.clone().expect("a value"));
        let identity = (event["source"]["txId"].to_string(), event["source"]["lsn"].to_string(), key, event["op"].to_string());
        match seen.get(&identity) {
            Some(before) => {
                assert_eq!(without_times(before), without_times(&raw), "a repeated event differs");
                continue;
            }
            None => drop(seen.insert(identity, raw)),
        }
        if event["op"] == "d" {
            let id = event["before"]["id"].as_i64().expect("an id");
            assert!(rows.remove(&id).is_some(), "{id} is deleted, but was never there");
        } else {
            let after = &event["after"];
            let id = after["id"].as_i64().expect("an id");
            let before = rows.insert(id, after["amount"].as_str().expect("a string").to_owned());
            assert_eq!(before.is_some(), event["op"] == "u", "{id}: {}", event["op"]);
        }
    }
    (rows, seen.len())
}

/// The topic tells what the table holds, and each change once.
pub(super) async fn holds_each_change_once(records: &[Read], database: &Database) {
    let (rows, n_changes) = replayed(records);
    assert_eq!(rows, held(database).await);
    assert_eq!(n_changes, records.iter().filter(|it| it.value.is_some()).count(), "nothing came twice");
}

async fn until_written(database: &Database, n_rows: i64) {
    let mut connection = database.connect().await;
    loop {
        let highest: Option<i64> = sqlx::query_scalar("select max(id % 1000000) from payments").fetch_one(&mut connection).await.expect("a number");
        if highest.unwrap_or(0) >= n_rows {
            return;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_and_streaming_meet_without_a_gap_or_a_duplicate_while_writers_write() {
    let database = Database::create("handover").await;
    database.run(PAYMENTS).await;
    database.run("insert into payments select id, 7.00, 'old' from generate_series(500000, 503000) id;").await;
    let mut broker = Broker::start(&database, &["public.payments"], 1);
    let writers = [1, 1_000_001].map(|first_id| write_payments(database.url.clone(), first_id..first_id + 999_999));
    until_written(&database, 50).await;

    let capture = Capture::start(&database, broker.address(), config(&database));
    let stats = capture.until("streaming", |it| it.step == Step::Streaming && it.transactions > 50).await;

    for writer in writers {
        finish(writer).await;
    }
    capture.drain(&database).await;
    let records = broker.read("public.payments");
    holds_each_change_once(&records, &database).await;
    let n_events = records.iter().filter(|it| it.value.is_some()).count();
    let reads = records.iter().filter_map(parsed).filter(|it| it["op"] == "r").count();
    assert!(reads >= 3001 && n_events > reads, "{reads} of {n_events} were reads");
    assert_eq!(stats.tables["public.payments"].reads, u64::try_from(reads).expect("few"));

    let ends = cdc::snapshot_ends(&database.url, &database.name).await.expect("the state").expect("finished");
    assert_eq!(ends.ends.len(), 1);
    assert_eq!(ends.ends[0].end_offset, i64::try_from(reads).expect("few"), "the ends are those of the reads");
    let first: Value = parsed(&records[0]).expect("an event");
    assert_eq!(first["source"]["lsn"], ends.lsn.0, "reads carry the LSN where the slot began");
    capture.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_killed_again_and_again_repeats_equal_bytes_and_loses_nothing() {
    let database = Database::create("killed").await;
    database.run(PAYMENTS).await;
    let mut broker = Broker::start(&database, &["public.payments"], 1);
    let config = config(&database);
    let capture = Capture::start(&database, broker.address(), config.clone());
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    capture.kill().await;
    // So many a round, however long a start takes: the broker of the test keeps no more than some megabytes.
    for round in 0..5 {
        let writer = write_payments(database.url.clone(), 1 + round * 300..1 + (round + 1) * 300);
        let capture = Capture::start(&database, broker.address(), config.clone());
        capture.until("transactions", |it| it.transactions > 100 + round.unsigned_abs() * 23).await;
        capture.kill().await;
        writer.1.await.expect("the writer ends well");
    }
    let capture = Capture::start(&database, broker.address(), config);
    capture.drain(&database).await;
    let records = broker.read("public.payments");
    let (rows, n_changes) = replayed(&records);
    assert_eq!(rows, held(&database).await);
    assert!(records.iter().filter(|it| it.value.is_some()).count() > n_changes, "a kill repeats something");

    // Each transaction's END, first or repeated, says the same, and each event it owes is there.
    let mut owed: HashMap<String, String> = HashMap::new();
    for record in broker.read("transaction") {
        let (key, value) = (record.key.expect("a key"), record.value.expect("a value"));
        let kind = if value.contains("BEGIN") { "BEGIN" } else { "END" };
        let before = owed.entry(format!("{kind} {key}")).or_insert_with(|| value.clone());
        assert_eq!(*before, value);
    }
    let n_owed: u64 = owed.values().filter_map(|it| serde_json::from_str::<Value>(it).expect("JSON")["event_count"].as_u64()).sum();
    assert_eq!(n_owed, u64::try_from(n_changes).expect("few"));
    capture.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_away_is_waited_for_and_nothing_is_lost() {
    let database = Database::create("away").await;
    database.run(PAYMENTS).await;
    let mut broker = Broker::in_memory(&database, &["public.payments"], 1);
    let capture = Capture::start(&database, broker.address(), config(&database));
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    database.run("insert into payments values (1, 1.00, 'before');").await;
    capture.drain(&database).await;

    broker.mock().broker_down(1).expect("down");
    // More than the queue takes: the stream must stand still, not grow.
    database.run("insert into payments select id, 1.00, 'x' from generate_series(2, 30000) id;").await;
    let waiting = capture.until("a full queue", |it| it.queued >= QUEUE_MESSAGES * 4 / 5 && it.broker_away).await;
    assert!(waiting.confirmed_lsn < database.wal_position().await);
    broker.mock().broker_up(1).expect("up");

    capture.drain(&database).await;
    let ids: Vec<i64> = broker.read("public.payments").iter().filter_map(parsed).filter_map(|it| it["after"]["id"].as_i64()).collect();
    assert_eq!(ids, (1..=30_000).collect::<Vec<_>>(), "each once, in order");
    capture.stop().await;
}

#[tokio::test]
async fn a_connection_that_postgresql_cuts_is_made_again() {
    let database = Database::create("cut").await;
    database.run(PAYMENTS).await;
    let mut broker = Broker::start(&database, &["public.payments"], 1);
    let capture = Capture::start(&database, broker.address(), config(&database));
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    for id in 1..=3 {
        sqlx::query("select pg_terminate_backend(active_pid, 5000) from pg_replication_slots where slot_name = $1")
            .bind(&database.name)
            .execute(&mut database.connect().await)
            .await
            .expect("cut");
        database.run(&format!("insert into payments values ({id}, 1.00, 'x');")).await;
        capture.until("reconnected", |it| it.reconnects >= id && it.step == Step::Streaming).await;
    }
    capture.drain(&database).await;
    assert_eq!(replayed(&broker.read("public.payments")).0.len(), 3);
    capture.stop().await;
}

#[tokio::test]
async fn the_slot_follows_though_the_captured_tables_are_quiet() {
    let database = Database::create("quiet").await;
    database.run(PAYMENTS).await;
    database.run("create table noise (id bigint, text text);").await;
    let mut broker = Broker::start(&database, &["public.payments"], 1);
    let config = Config { tables_exclude: vec!["*.noise".into()], ..config(&database) };
    let capture = Capture::start(&database, broker.address(), config);
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    database.run("insert into noise select id, repeat('x', 500) from generate_series(1, 20000) id;").await;
    let stats = capture.drain(&database).await;
    assert_eq!(stats.n_events(), 0);
    let slot = capture.until("the slot was told", |it| it.slot.as_ref().is_some_and(|slot| slot.confirmed_flush_lsn >= stats.confirmed_lsn)).await;
    assert!(slot.heartbeats > 0);
    let key = format!("{{\"serverName\":\"{}\"}}", broker.prefix);
    assert!(broker.read(HEARTBEAT).iter().all(|it| it.key.as_deref() == Some(&key)));
    capture.stop().await;
}

#[tokio::test]
async fn a_paused_capture_takes_nothing_and_goes_on_where_it_was() {
    let database = Database::create("paused").await;
    database.run(PAYMENTS).await;
    let mut broker = Broker::start(&database, &["public.payments"], 1);
    let capture = Capture::start(&database, broker.address(), config(&database));
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    capture.handle.wanted.send(Phase::Paused).expect("it listens");
    capture.until("paused", |it| it.phase == Phase::Paused).await;
    database.run("insert into payments values (1, 1.00, 'x');").await;
    let before = capture.until("health is seen", |it| it.source_lsn > it.confirmed_lsn).await;
    assert_eq!(before.n_events(), 0);
    capture.handle.wanted.send(Phase::Running).expect("it listens");
    assert_eq!(capture.drain(&database).await.n_events(), 1);
    assert_eq!(broker.read("public.payments").len(), 1);
    capture.stop().await;
}

#[tokio::test]
async fn a_value_that_cannot_be_written_goes_to_the_dead_letters_and_nobody_waits_for_it() {
    let database = Database::create("poison").await;
    database.run("create table terms (id int primary key, lasts interval);").await;
    let mut broker = Broker::start(&database, &["public.terms"], 1);
    let capture = Capture::start(&database, broker.address(), config(&database));
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    database.run("begin; insert into terms values (1, '1 day'), (2, 'infinity'), (3, '2 days'); commit;").await;
    let stats = capture.drain(&database).await;
    assert_eq!(stats.dead_letters, 1);
    let letters = broker.read("dead_letters");
    let letter = parsed(&letters[0]).expect("a letter");
    assert_eq!((letter["table"].as_str(), letter["op"].as_str()), (Some("terms"), Some("c")));
    assert!(letter["reason"].as_str().is_some_and(|it| it.contains("lasts")) && letter["lsn"].is_u64() && letter["bytes"].is_string());
    // As `dlq` reads it: the bytes are those PostgreSQL sent for the row, an Insert.
    let record = Kept { partition: 0, offset: 0, timestamp_ms: None, key: None, value: letters[0].value.clone().map(Into::into), headers: Vec::new() };
    let Letter { origin: Origin::Capture { table: Some(table), op, bytes, .. }, .. } = Letter::read(&record) else { panic!("{letter}") };
    assert_eq!((table.to_string().as_str(), op.as_str(), bytes[0]), ("public.terms", "c", b'I'));
    assert!(bytes.windows(8).any(|it| it == b"infinity"), "{bytes:?}");
    let arrived: Vec<i64> = broker.read("public.terms").iter().filter_map(parsed).filter_map(|it| it["after"]["id"].as_i64()).collect();
    assert_eq!(arrived, [1, 3]);
    let end = broker.read("transaction").iter().filter_map(parsed).find(|it| it["status"] == "END").expect("an END");
    assert_eq!((&end["event_count"], &end["data_collections"][0]["event_count"]), (&2.into(), &2.into()));
    let orders: Vec<i64> = broker.read("public.terms").iter().filter_map(parsed).filter_map(|it| it["transaction"]["total_order"].as_i64()).collect();
    assert_eq!(orders, [1, 2]);
    capture.stop().await;
}

#[tokio::test]
async fn keys_lie_in_the_partition_java_would_choose() {
    let database = Database::create("partitions").await;
    database.run(PAYMENTS).await;
    database.run("insert into payments select id, 1.00, null from generate_series(1, 40) id;").await;
    let mut broker = Broker::start(&database, &["public.payments"], 3);
    let capture = Capture::start(&database, broker.address(), config(&database));
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    database.run("insert into payments select id, 1.00, null from generate_series(41, 80) id; delete from payments where id % 2 = 0;").await;
    capture.drain(&database).await;
    let records = broker.read("public.payments");
    assert_eq!(records.len(), 80 + 2 * 40);
    for record in records {
        let key = record.key.expect("a key");
        assert_eq!(record.partition, (murmur2(key.as_bytes()) & 0x7FFF_FFFF) % 3, "{key}");
    }
    capture.stop().await;
}

/// Kafka's own hash, as its Java client has it.
fn murmur2(bytes: &[u8]) -> i32 {
    const M: u32 = 0x5BD1_E995;
    let length = u32::try_from(bytes.len()).expect("short");
    let mut hash = 0x9747_B28C_u32 ^ length;
    let mut chunks = bytes.chunks_exact(4);
    for chunk in &mut chunks {
        let mut word = u32::from_le_bytes(chunk.try_into().expect("four")).wrapping_mul(M);
        word = (word ^ word >> 24).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ word;
    }
    let rest = chunks.remainder();
    for (place, byte) in rest.iter().enumerate() {
        hash ^= u32::from(*byte) << (8 * place);
    }
    if !rest.is_empty() {
        hash = hash.wrapping_mul(M);
    }
    hash = (hash ^ hash >> 13).wrapping_mul(M);
    i32::from_ne_bytes((hash ^ hash >> 15).to_ne_bytes())
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_that_are_missing_are_made_and_the_snapshots_ends_are_those_of_every_lane() {
    let database = Database::create("topics").await;
    database.run(PAYMENTS).await;
    database.run("insert into payments select id, 1.00, null from generate_series(1, 100) id;").await;
    let stream = Stream::open().await;
    let config = Config { topic_prefix: stream.prefix.clone(), ..config(&database) };
    let three = NonZeroU32::new(3).expect("not zero");
    let capture = Capture::start_with(three, &database, stream.address.clone(), config.clone());
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    let ends = cdc::snapshot_ends(&database.url, &stream.prefix).await.expect("the state").expect("finished").ends;
    assert_eq!(ends.iter().map(|it| it.partition).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(ends.iter().map(|it| it.end_offset).sum::<i64>(), 100);

    let mut partitions = Topics::connect(&stream.address).expect("a client").partitions().await.expect("topics");
    partitions.retain(|(topic, _)| topic.contains(&stream.prefix));
    partitions.sort();
    let names = ["dead_letters", "message", "public.payments", "transaction"].map(|it| format!("{}.{it}", stream.prefix));
    let names = [format!("{HEARTBEAT}.{}", stream.prefix)].into_iter().chain(names);
    assert_eq!(partitions, names.map(|name| (name.clone(), if name.contains("payments") { 3 } else { 1 })).collect::<Vec<_>>());
    capture.stop().await;

    // The same again finds everything made.
    let again = Capture::start_with(three, &database, stream.address.clone(), config);
    again.until("streaming", |it| it.step == Step::Streaming).await;
    again.drain(&database).await;
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_fit_into_a_topic_that_takes_less_than_ours() {
    let database = Database::create("narrow").await;
    database.run(PAYMENTS).await;
    let noise = "select string_agg(md5(random()::text || part), '') from generate_series(1, 10) part where id > 0";
    database.run(&format!("insert into payments select id, 1.00, ({noise}) from generate_series(1, 5000) id;")).await;
    let stream = Stream::open().await;
    let topic = format!("{}.public.payments", stream.prefix);
    stream.create(&topic, 1, &[("max.message.bytes", "50000")]).await;
    let config = Config { topic_prefix: stream.prefix.clone(), ..config(&database) };
    let capture = Capture::start(&database, stream.address.clone(), config);
    capture.drain(&database).await;
    let lanes = Topics::connect(&stream.address).expect("a client").watermarks([topic].into()).await.expect("the broker answers");
    assert_eq!(lanes.iter().map(|(_, it)| it.end).collect::<Vec<_>>(), [5_000]);
    capture.stop().await;
}

#[tokio::test]
async fn a_table_made_later_joins_while_it_is_empty_and_is_told_otherwise() {
    let database = Database::create("later").await;
    database.run(PAYMENTS).await;
    let mut broker = Broker::start(&database, &["public.payments", "public.fees", "public.loans"], 1);
    let config = config(&database);
    let capture = Capture::start(&database, broker.address(), config.clone());
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    capture.stop().await;
    database.run("create table public.fees (id int primary key); create table public.loans (id int primary key); insert into public.loans values (1);").await;

    let capture = Capture::start(&database, broker.address(), config.clone());
    let stats = capture.until("streaming", |it| it.step == Step::Streaming).await;
    assert_eq!(stats.uncaptured, ["public.loans"]);
    database.run("insert into public.fees values (1); insert into public.loans values (2);").await;
    capture.drain(&database).await;
    assert_eq!((broker.read("public.fees").len(), broker.read("public.loans").len()), (1, 0));
    capture.stop().await;

    let named = Config { tables: vec!["public.payments".into(), "public.loans".into()], ..config };
    refuses(&database, &broker, named, "loans").await;
}

#[tokio::test]
async fn a_table_made_while_the_stream_flows_joins_by_itself_and_a_foreign_one_stays_out() {
    let database = Database::create("joins").await;
    database.run(PAYMENTS).await;
    let mut broker = Broker::start(&database, &["public.payments", "public.fees"], 1);
    // A publication of somebody's own, which holds more than we capture.
    database.run(&format!("create table public.private (id int primary key); create publication {} for table payments, private;", database.name)).await;
    let config = Config { tables_exclude: vec!["public.private".to_owned()], ..config(&database) };
    let capture = Capture::start(&database, broker.address(), config);
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    database.run("create table public.fees (id int primary key); insert into public.private values (1);").await;
    let published = format!("select count(*) from pg_publication_tables where pubname = '{}' and tablename = 'fees'", database.name);
    let joined = async {
        let mut connection = database.connect().await;
        while sqlx::query_scalar::<_, i64>(sqlx::AssertSqlSafe(published.clone())).fetch_one(&mut connection).await.expect("a count") == 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, joined).await.expect("it joins");
    database.run("insert into public.fees values (1); insert into public.private values (2); insert into payments values (1, 1.00, 'x');").await;
    let stats = capture.drain(&database).await;
    assert_eq!((broker.read("public.fees").len(), broker.read("public.payments").len()), (1, 1));
    assert!(!stats.tables.contains_key("public.private"), "{:?}", stats.tables);
    // Transactions of foreign tables alone owe nothing to anybody.
    assert_eq!(broker.read("transaction").len(), 4);
    capture.stop().await;
}

#[tokio::test]
async fn without_a_snapshot_only_changes_arrive() {
    let database = Database::create("never").await;
    database.run(PAYMENTS).await;
    database.run("insert into payments values (1, 1.00, 'old');").await;
    let mut broker = Broker::start(&database, &["public.payments"], 1);
    let config = Config { snapshot: SnapshotMode::Never, transaction_metadata: false, ..config(&database) };
    let capture = Capture::start(&database, broker.address(), config);
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    database.run("insert into payments values (2, 1.00, 'new');").await;
    capture.drain(&database).await;
    let records = broker.read("public.payments");
    assert_eq!(records.len(), 1);
    assert_eq!(parsed(&records[0]).expect("an event")["transaction"], Value::Null);
    assert_eq!(broker.read("transaction"), []);
    capture.stop().await;
}

#[tokio::test]
async fn a_snapshot_that_was_cut_short_is_taken_again() {
    let database = Database::create("again").await;
    database.run(PAYMENTS).await;
    database.run("insert into payments select id, 1.00, repeat('x', 50) from generate_series(1, 30000) id;").await;
    let mut broker = Broker::in_memory(&database, &["public.payments"], 1);
    let first = Capture::start(&database, broker.address(), config(&database));
    broker.mock().broker_round_trip_time(1, Duration::from_millis(200)).expect("slow");
    first.until("reading", |it| it.step == Step::Snapshot && it.snapshot.as_ref().is_some_and(|it| it.rows > 0)).await;
    first.kill().await;
    assert_eq!(cdc::snapshot_ends(&database.url, &database.name).await.expect("the state"), None);
    broker.mock().broker_round_trip_time(1, Duration::ZERO).expect("fast");

    let second = Capture::start(&database, broker.address(), config(&database));
    second.drain(&database).await;
    let ends = cdc::snapshot_ends(&database.url, &database.name).await.expect("the state").expect("finished");
    let whole = broker.read("public.payments").iter().filter_map(parsed).filter(|it| it["source"]["lsn"] == ends.lsn.0).count();
    assert_eq!(whole, 30_000);
    second.stop().await;
}
