//! The rows from before, read by several readers at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use ledgerline::{
    cdc::{self, Config, ErrorsTolerance, Stats, Step},
    fault::{Diagnose as _, Fault},
    secret::Secret,
    units::Span,
};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _};

use super::{
    days::{PAYMENTS, finish, held, holds_each_change_once, parsed, write_payments},
    house::{Broker, Capture, Database, PATIENCE, config},
    network::Network,
    networks::{port, until_read},
};

/// Payments that fill so many blocks that they are read in ranges.
const LARGE: &str = "alter table payments set (fillfactor = 10);
    insert into payments select id, 7.00, repeat('x', 40) from generate_series(5000001, 5060000) id;";
const LARGE_ROWS: usize = 60_000;

fn with_readers(readers: i64, config: Config) -> Config {
    Config { snapshot_max_threads: readers.try_into().expect("so many may be"), ..config }
}

async fn read_whole(capture: &Capture, database: &Database, config: &Config) -> Stats {
    until_read(database, config).await;
    capture.until("streaming", |it| it.step == Step::Streaming).await
}

/// The markers of a topic's reads, in their order.
fn markers(broker: &mut Broker, table: &str) -> Vec<String> {
    let reads = broker.read(table).into_iter().filter_map(|it| parsed(&it)).filter(|it| it["op"] == "r");
    reads.map(|it| it["source"]["snapshot"].as_str().expect("a marker").to_owned()).collect()
}

/// What one reader writes for a table of so many rows that is neither the first nor the last.
fn between(rows: usize) -> Vec<String> {
    let marker = |row: usize| match row {
        _ if row + 1 == rows => "last_in_data_collection",
        0 => "first_in_data_collection",
        _ => "true",
    };
    (0..rows).map(|row| marker(row).to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_read_every_row_once_as_it_was_and_the_stream_goes_on_from_there() {
    let database = Database::create("at_once").await;
    database.run(PAYMENTS).await;
    database.run(LARGE).await;
    database.run("create table fees (id bigint primary key, amount text); insert into fees select id, '1.00' from generate_series(1, 500) id;").await;
    let mut broker = Broker::start(&database, &["public.payments", "public.fees"], 3);
    let writers = [1, 1_000_001].map(|first_id| write_payments(database.url.clone(), first_id..first_id + 999_999));
    // Old rows change too, whichever range they lie in: a read that saw more than the snapshot would make a change come twice.
    let (url, mut changing) = (database.url.clone(), tokio::task::JoinSet::new());
    changing.spawn(async move {
        let mut connection = sqlx::PgConnection::connect(url.reveal()).await.expect("the test's database");
        for id in (5_000_001_i64..=5_060_000).step_by(37) {
            sqlx::query("update payments set amount = amount + 1 where id = $1").bind(id).execute(&mut connection).await.expect("written");
            sqlx::query("delete from payments where id = $1 + 5").bind(id).execute(&mut connection).await.expect("written");
        }
    });

    let settings = with_readers(4, config(&database));
    let capture = Capture::start(&database, broker.address(), settings.clone());
    let stats = read_whole(&capture, &database, &settings).await;
    capture.until("transactions", |it| it.transactions > 50).await;
    while changing.join_next().await.is_some() {}
    for writer in writers {
        finish(writer).await;
    }
    capture.drain(&database).await;

    let records = broker.read("public.payments");
    holds_each_change_once(&records, &database).await;
    let reads: Vec<Value> = records.iter().filter_map(parsed).filter(|it| it["op"] == "r").collect();
    assert_eq!(stats.tables["public.payments"].reads, u64::try_from(reads.len()).expect("few"));
    assert!(reads.len() > LARGE_ROWS - 5_000, "{}", reads.len());
    let origins: BTreeSet<(String, String)> = reads.iter().map(|it| (it["source"]["lsn"].to_string(), it["source"]["txId"].to_string())).collect();
    assert_eq!(origins.len(), 1, "all of one moment: {origins:?}");
    // A change tells the row before it: of a row that was read it is what was read, or what the stream told since.
    let mut told: BTreeMap<i64, Value> = BTreeMap::new();
    for event in records.iter().filter_map(parsed) {
        let (before, after) = (&event["before"], &event["after"]);
        if let Some(id) = before["id"].as_i64() {
            assert_eq!(told.remove(&id).as_ref(), Some(before), "the row before a change is the one that was told last");
        }
        if let Some(id) = after["id"].as_i64() {
            told.insert(id, after.clone());
        }
    }
    let progress = capture.handle.stats.borrow().snapshot.clone().expect("a snapshot");
    assert!(progress.finished && progress.reading.is_empty() && progress.tables_done == 2, "{progress:?}");
    assert_eq!(progress.rows, u64::try_from(reads.len()).expect("few") + 500);
    capture.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn markers_are_those_of_one_reader_however_many_read() {
    let database = Database::create("marked").await;
    database.run(PAYMENTS).await;
    database.run(LARGE).await;
    database
        .run(
            "create table a_first (id int primary key); insert into a_first values (1), (2), (3);
            create table b_single (id int primary key); insert into b_single values (1);
            create table c_empty (id int primary key);
            create table z_last (id int primary key); insert into z_last values (1), (2);
            create table zz_empty (id int primary key);",
        )
        .await;
    let tables = ["public.a_first", "public.b_single", "public.c_empty", "public.payments", "public.z_last", "public.zz_empty"];
    for readers in [1, 4] {
        let name = format!("{}_{readers}", database.name);
        let mut broker = Broker::with_prefix(&name, &tables, 1);
        let settings = Config { topic_prefix: name.clone(), slot: name.clone(), publication: name, ..with_readers(readers, config(&database)) };
        let capture = Capture::start(&database, broker.address(), settings.clone());
        read_whole(&capture, &database, &settings).await;
        capture.stop().await;
        assert_eq!(markers(&mut broker, "public.a_first"), ["first", "true", "last_in_data_collection"], "{readers} readers");
        assert_eq!(markers(&mut broker, "public.b_single"), ["last_in_data_collection"], "{readers} readers");
        assert_eq!(markers(&mut broker, "public.c_empty"), Vec::<String>::new());
        assert!(markers(&mut broker, "public.payments") == between(LARGE_ROWS), "{readers} readers");
        assert_eq!(markers(&mut broker, "public.z_last"), ["first_in_data_collection", "last"], "{readers} readers");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_table_is_read_whole_by_many_readers() {
    let database = Database::create("kinds").await;
    database
        .run(
            "create table composite (a int, b text, note text, primary key (b, a)) with (fillfactor = 10);
            insert into composite select id, 'k' || id % 7, repeat('x', 40) from generate_series(1, 40000) id;
            create table \"Mixed Case\" (\"The Id\" int primary key, \"say \"\"so\"\"\" text);
            insert into \"Mixed Case\" values (1, 'a'), (2, 'b');
            create table keyless (id int, note text) with (fillfactor = 10);
            insert into keyless select id, repeat('x', 40) from generate_series(1, 40000) id;
            create table nothing (id int primary key);
            create table parted (id int primary key, note text) partition by range (id);
            create table parted_1 partition of parted for values from (0) to (30001) with (fillfactor = 10);
            create table parted_2 partition of parted for values from (30001) to (60001) partition by range (id);
            create table parted_2_low partition of parted_2 for values from (30001) to (30011);
            create table parted_2_high partition of parted_2 for values from (30011) to (60001) with (fillfactor = 10);
            insert into parted select id, repeat('x', 40) from generate_series(1, 60000) id;
            create table parent (id int primary key);
            create table heir (more text) inherits (parent);
            insert into parent values (1); insert into heir values (2, 'x');
            create table wide (id int primary key, note text);
            alter table wide alter note set storage external;
            insert into wide select id, repeat('y', 200000) from generate_series(1, 120) id;",
        )
        .await;
    let tables = ["composite", "Mixed Case", "keyless", "nothing", "parted", "parent", "wide"];
    let topics = ["composite", "Mixed_Case", "keyless", "nothing", "parted", "parent", "wide"];
    let names: Vec<String> = topics.iter().map(|it| format!("public.{it}")).collect();
    let mut broker = Broker::start(&database, &names.iter().map(String::as_str).collect::<Vec<_>>(), 1);
    let settings = Config { tables: tables.iter().map(|it| format!("public.{it}")).collect(), ..with_readers(3, config(&database)) };
    let capture = Capture::start(&database, broker.address(), settings.clone());
    read_whole(&capture, &database, &settings).await;
    capture.stop().await;

    let mut connection = database.connect().await;
    for (table, topic) in tables.into_iter().zip(&names) {
        let only = if table == "parted" { "" } else { "only" };
        let wanted: Vec<(Value,)> =
            sqlx::query_as(AssertSqlSafe(format!("select to_jsonb(it) from {only} \"{table}\" it"))).fetch_all(&mut connection).await.expect("rows");
        let sorted = |rows: Vec<Value>| {
            let mut rows: Vec<String> = rows.into_iter().map(|it| it.to_string()).collect();
            rows.sort_unstable();
            rows
        };
        let found = broker.read(topic).iter().filter_map(parsed).map(|it| it["after"].clone()).collect();
        assert!(sorted(found) == sorted(wanted.into_iter().map(|it| it.0).collect()), "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_killed_at_any_moment_goes_on_with_nothing_missing() {
    const TABLES: [&str; 4] = ["public.a", "public.b", "public.keyless", "public.payments"];
    let seed: u64 = std::env::var("LEDGERLINE_TEST_SEED").ok().and_then(|it| it.parse().ok()).unwrap_or(11);
    println!("LEDGERLINE_TEST_SEED={seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let database = Database::create("killed_reading").await;
    database.run(PAYMENTS).await;
    database.run(LARGE).await;
    database
        .run(
            "create table a (id int primary key); insert into a select generate_series(1, 3000);
            create table b (id int primary key); insert into b select generate_series(1, 3000);
            create table keyless (id int); insert into keyless select generate_series(1, 3000);",
        )
        .await;
    let mut broker = Broker::start(&database, &TABLES, 2);
    let settings = with_readers(3, config(&database));
    let writer = write_payments(database.url.clone(), 1..1_000_000);
    for _ in 0..4 {
        let capture = Capture::start(&database, broker.address(), settings.clone());
        let rows = random.random_range(1..u64::try_from(LARGE_ROWS).expect("few"));
        let reached = |it: &Stats| {
            it.snapshot.as_ref().is_some_and(|it| it.rows >= rows || it.finished)
                || it.incremental_snapshot.as_ref().is_some_and(|it| it.rows >= rows)
                || it.step == Step::Streaming
        };
        capture.until("somewhere in the snapshot", reached).await;
        capture.kill().await;
    }
    let capture = Capture::start(&database, broker.address(), settings.clone());
    until_read(&database, &settings).await;
    finish(writer).await;
    capture.drain(&database).await;
    capture.stop().await;
    let mut rows: BTreeMap<i64, String> = BTreeMap::new();
    for event in broker.read("public.payments").iter().filter_map(parsed) {
        let row = if event["op"] == "d" { &event["before"] } else { &event["after"] };
        let id = row["id"].as_i64().expect("an id");
        match event["op"].as_str() {
            Some("d") => drop(rows.remove(&id)),
            _ => drop(rows.insert(id, row["amount"].as_str().expect("an amount").to_owned())),
        }
    }
    assert!(rows == held(&database).await, "what the topic tells is what the table holds");
    for table in ["public.a", "public.b", "public.keyless"] {
        let ids: BTreeSet<i64> = broker.read(table).iter().filter_map(parsed).filter_map(|it| it["after"]["id"].as_i64()).collect();
        assert!(ids == (1..=3000).collect(), "{table}");
    }
}

#[tokio::test]
async fn a_row_that_cannot_be_written_is_set_aside_or_stops_the_snapshot_as_the_settings_say() {
    let database = Database::create("unwritable").await;
    database
        .run("create table terms (id int primary key, lasts interval); insert into terms values (1, 'infinity'), (2, '1 day'), (3, '-infinity'), (4, '2 days'), (5, 'infinity');")
        .await;
    let mut broker = Broker::start(&database, &["public.terms"], 1);
    let strict = Config { errors_tolerance: ErrorsTolerance::None, ..config(&database) };
    let error = Capture::start(&database, broker.address(), strict).ended().await.expect_err("it stops");
    assert!(error.to_string().contains("public.terms"), "{error}");
    assert!(matches!(error.fault(), Fault::Operator(remedy) if remedy.contains("cdc.errors_tolerance")), "{error}");

    let settings = config(&database);
    let capture = Capture::start(&database, broker.address(), settings.clone());
    let stats = read_whole(&capture, &database, &settings).await;
    capture.stop().await;
    assert_eq!(stats.dead_letters, 3);
    let letters: Vec<Value> = broker.read("dead_letters").iter().filter_map(parsed).collect();
    assert_eq!(letters.len(), 3);
    assert!(letters.iter().all(|it| it["table"] == "terms" && it["op"] == "r" && it["lsn"].is_u64() && it["bytes"].is_string()), "{letters:?}");
    let reads: Vec<Value> = broker.read("public.terms").iter().filter_map(parsed).collect();
    let told: Vec<(i64, &str)> =
        reads.iter().filter_map(|it| Some((it["after"]["id"].as_i64()?, it["source"]["snapshot"].as_str()?))).skip(reads.len() - 2).collect();
    assert_eq!(told, [(2, "first"), (4, "last")], "the markers are on rows that arrive");
}

#[tokio::test]
async fn a_table_that_somebody_has_locked_is_waited_for_and_the_holder_named() {
    let database = Database::create("locked").await;
    database.run(PAYMENTS).await;
    database.run("insert into payments values (1, 1.00, 'old'); create table fees (id int primary key);").await;
    let mut broker = Broker::start(&database, &["public.payments", "public.fees"], 1);
    let settings = config(&database);
    let mut connection = database.connect().await;
    let mut holding = connection.begin().await.expect("begin");
    holding.execute("lock table payments in access exclusive mode").await.expect("locked");
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *holding).await.expect("a pid");
    let capture = Capture::start(&database, broker.address(), settings.clone());
    let named = format!("pid {pid} ");
    capture.until("it waits", |it| it.waiting_for.as_ref().is_some_and(|it| it.contains(&named) && it.contains("public.payments"))).await;
    holding.rollback().await.expect("let go");
    read_whole(&capture, &database, &settings).await;
    assert_eq!(broker.read("public.payments").len(), 1);
    capture.stop().await;
}

/// A capture whose slot is made while nothing passes through its network: whatever happens now happens behind the slot's snapshot, and
/// before it is read.
async fn begun_behind(network: &Network, database: &Database, broker: &Broker, settings: &Config, meanwhile: impl AsyncFnOnce()) -> Capture {
    let mut connection = database.connect().await;
    let mut open = connection.begin().await.expect("begin");
    open.execute("select pg_current_xact_id()").await.expect("an id");
    let capture = Capture::start_as(&network.url(&database.url), database, broker.address(), settings.clone());
    capture.until("the slot is being made", |it| it.waiting_for.as_ref().is_some_and(|it| it.contains("slot is being made"))).await;
    let mut looking = database.connect().await;
    let is = async |looking: &mut sqlx::PgConnection, state: &str| -> bool {
        let statement = format!("select exists (select from pg_replication_slots where slot_name = '{}' and {state})", settings.slot);
        sqlx::query_scalar(AssertSqlSafe(statement)).fetch_one(looking).await.expect("an answer")
    };
    let made = async {
        while !is(&mut looking, "true").await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        network.still();
        open.commit().await.expect("commit");
        while !is(&mut looking, "confirmed_flush_lsn is not null").await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, made).await.expect("the slot is made");
    meanwhile().await;
    network.flow();
    capture
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_rewritten_dropped_or_locked_before_it_is_read_is_told_and_no_row_lost() {
    let database = Database::create("rewritten").await;
    database.run(PAYMENTS).await;
    database.run("insert into payments values (1, 1.00, 'old'); create table fees (id int primary key);").await;
    let mut broker = Broker::start(&database, &["public.payments", "public.fees"], 1);
    let network = Network::to(port(&database)).await;
    let settings = config(&database);

    let rewrite = async || database.run("alter table payments alter amount type numeric(20,3);").await;
    let error = begun_behind(&network, &database, &broker, &settings, rewrite).await.ended().await.expect_err("it cannot be seen");
    assert!(matches!(&error, cdc::Error::Rewritten { table } if table == "public.payments") && error.fault() == Fault::Transient, "{error}");

    let drop = async || database.run("drop table fees;").await;
    let error = begun_behind(&network, &database, &broker, &settings, drop).await.ended().await.expect_err("it is gone");
    assert!(matches!(&error, cdc::Error::Dropped { table } if table == "public.fees") && error.fault() == Fault::Transient, "{error}");

    let mut locking = database.connect().await;
    let lock = async || {
        locking.execute("begin; lock table payments in access exclusive mode").await.expect("locked");
    };
    let capture = begun_behind(&network, &database, &broker, &settings, lock).await;
    let locked = |it: &Stats| it.step == Step::Snapshot && it.waiting_for.as_ref().is_some_and(|it| it.contains("has locked public.payments"));
    capture.until("it waits", locked).await;
    locking.execute("rollback").await.expect("let go");
    read_whole(&capture, &database, &settings).await;
    capture.stop().await;
    let rows: Vec<Value> = broker.read("public.payments").iter().filter_map(parsed).map(|it| it["after"]["amount"].clone()).collect();
    assert_eq!(rows, ["1.000"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_stays_locked_costs_the_source_no_wal() {
    let database = Database::create("long_locked").await;
    database.run(PAYMENTS).await;
    database.run("insert into payments values (1, 1.00, 'old');").await;
    let mut broker = Broker::start(&database, &["public.payments"], 1);
    let network = Network::to(port(&database)).await;
    let settings = Config { snapshot_lock_timeout: Span::from_millis(700), ..config(&database) };

    let mut locking = database.connect().await;
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut locking).await.expect("a pid");
    let lock = async || {
        locking.execute("begin; lock table payments in access exclusive mode").await.expect("locked");
    };
    let error = begun_behind(&network, &database, &broker, &settings, lock).await.ended().await.expect_err("it stays locked");
    let named = format!("pid {pid} ");
    assert!(matches!(&error, cdc::Error::Locked { table, holder } if table == "public.payments" && holder.starts_with(&named)), "{error}");
    assert_eq!(error.fault(), Fault::Transient);

    // The next try waits without a slot.
    let capture = Capture::start(&database, broker.address(), settings.clone());
    let waits = |it: &Stats| it.waiting_for.as_ref().is_some_and(|it| it.contains(&named) && it.contains("public.payments"));
    capture.until("it waits", waits).await;
    let mut looking = database.connect().await;
    let slots = "select count(*) from pg_replication_slots where database = current_database()";
    assert_eq!(sqlx::query_scalar::<_, i64>(slots).fetch_one(&mut looking).await.expect("an answer"), 0);
    locking.execute("rollback").await.expect("let go");
    read_whole(&capture, &database, &settings).await;
    assert_eq!(markers(&mut broker, "public.payments"), ["last"]);
    capture.stop().await;
}

/// A user of the source with these rights, as which the publication is only read.
async fn of_user(database: &Database, broker: &Broker, settings: &Config, rights: &str) -> (String, Secret) {
    cdc::apply(&database.url, &database.url, broker.address(), &Default::default(), settings, false).await.expect("prepared");
    let role = format!("{}_user", database.name);
    database.run(&format!("create role {role} login password 'reader' replication {rights}; grant select on all tables in schema public to {role};")).await;
    let mut url = url::Url::parse(database.url.reveal()).expect("an address");
    url.set_username(&role).expect("a name");
    url.set_password(Some("reader")).expect("a password");
    (role, Secret::new(url))
}

#[tokio::test(flavor = "multi_thread")]
async fn with_few_connections_left_the_readers_that_have_one_read_it_all() {
    let database = Database::create("crowded").await;
    database.run(PAYMENTS).await;
    database.run(LARGE).await;
    let mut broker = Broker::start(&database, &["public.payments"], 1);
    let settings = with_readers(4, config(&database));
    // One that asks, one that looks at the slot, the stream's own, and one or two that read.
    let (role, user) = of_user(&database, &broker, &settings, "connection limit 4").await;
    let capture = Capture::start_as(&user, &database, broker.address(), settings.clone());
    until_read(&database, &settings).await;
    capture.kill().await;
    let ids: BTreeSet<i64> = broker.read("public.payments").iter().filter_map(parsed).filter_map(|it| it["after"]["id"].as_i64()).collect();
    assert_eq!(ids.len(), LARGE_ROWS);
    drop_role(&database, &role).await;
}

#[tokio::test]
async fn a_policy_that_would_hide_rows_is_told_not_obeyed_in_silence() {
    let database = Database::create("policy").await;
    database.run(PAYMENTS).await;
    database.run("insert into payments values (1, 1.00, 'mine'), (2, 2.00, 'theirs');").await;
    database.run("alter table payments enable row level security; create policy mine on payments using (note = 'mine');").await;
    let broker = Broker::start(&database, &["public.payments"], 1);
    let settings = config(&database);
    let (role, user) = of_user(&database, &broker, &settings, "").await;
    let error = Capture::start_as(&user, &database, broker.address(), settings).ended().await.expect_err("it stops");
    assert!(error.to_string().contains("public.payments"), "{error}");
    assert!(matches!(error.fault(), Fault::Operator(remedy) if remedy.contains("bypassrls")), "{error}");
    drop_role(&database, &role).await;
}

async fn drop_role(database: &Database, role: &str) {
    let mut connection = database.connect().await;
    // Connections of a capture that was killed are let go of a moment later.
    let free = async {
        while sqlx::query_scalar::<_, i64>("select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity where usename = $1")
            .bind(role)
            .fetch_one(&mut connection)
            .await
            .expect("a number")
            > 0
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, free).await.expect("its connections end");
    database.run(&format!("drop owned by {role}; drop role {role};")).await;
}
