//! What the capture refuses and with which words; and how it stands and is removed, asked from outside.

use ledgerline::{
    cdc::{self, Config, SnapshotState, Stats, Step},
    fault::{Diagnose as _, Fault},
    secret::Secret,
};

use super::{
    days::PAYMENTS,
    house::{Broker, Capture, Database, config},
};

/// Starts a capture that must end with instructions for the operator.
pub(super) async fn refuses(database: &Database, broker: &Broker, config: Config, told: &str) {
    let error = Capture::start(database, broker.address(), config).ended().await.expect_err("it refuses");
    let Fault::Operator(remedy) = error.fault() else { panic!("no remedy for: {error}") };
    assert!(error.to_string().contains(told) || remedy.contains(told), "{error}: {remedy}");
}

/// A database with a capture that ran and stopped in good order.
pub(super) async fn captured(test: &str) -> (Database, Broker, Config) {
    let database = Database::create(test).await;
    database.run(PAYMENTS).await;
    let broker = Broker::start(&database, &["public.payments"], 1);
    let config = config(&database);
    let capture = Capture::start(&database, broker.address(), config.clone());
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    database.run("insert into payments values (1, 1.00, 'x');").await;
    capture.drain(&database).await;
    capture.stop().await;
    (database, broker, config)
}

async fn sql(database: &Database, statement: &'static str) {
    sqlx::query(statement).bind(&database.name).execute(&mut database.connect().await).await.expect("done");
}

#[tokio::test]
async fn a_slot_that_was_dropped_is_told() {
    let (database, broker, config) = captured("dropped").await;
    sql(&database, "select pg_drop_replication_slot($1)").await;
    refuses(&database, &broker, config, "missing").await;
}

#[tokio::test]
async fn a_slot_that_somebody_else_moved_is_told() {
    let (database, broker, config) = captured("moved").await;
    database.run("insert into payments values (2, 1.00, 'x');").await;
    sql(&database, "select pg_replication_slot_advance($1, pg_current_wal_flush_lsn())").await;
    refuses(&database, &broker, config, "consumed").await;
}

#[tokio::test]
async fn a_publication_that_was_dropped_is_told_at_the_start_and_while_streaming() {
    let (database, broker, config) = captured("unpublished").await;
    let capture = Capture::start(&database, broker.address(), config.clone());
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    database.run(&format!("drop publication {};", database.name)).await;
    let error = capture.ended().await.expect_err("it notices");
    assert!(matches!(error.fault(), Fault::Operator(_)), "{error}");
    refuses(&database, &broker, config, "publication").await;
}

#[tokio::test]
async fn a_slot_nobody_told_us_of_and_a_foreign_one_are_told() {
    let database = Database::create("foreign").await;
    database.run(PAYMENTS).await;
    let broker = Broker::start(&database, &["public.payments"], 1);
    sql(&database, "select pg_create_logical_replication_slot($1, 'pgoutput')").await;
    refuses(&database, &broker, config(&database), "state database").await;
    sql(&database, "select pg_drop_replication_slot($1)").await;
    sql(&database, "select pg_create_logical_replication_slot($1, 'test_decoding')").await;
    refuses(&database, &broker, config(&database), "test_decoding").await;
}

#[tokio::test]
async fn a_missing_table_a_missing_right_and_a_wrong_address_are_told() {
    let database = Database::create("wrong").await;
    database.run(PAYMENTS).await;
    let broker = Broker::start(&database, &["public.payments"], 1);
    let missing = Config { tables: vec!["public.nothing".into()], ..config(&database) };
    refuses(&database, &broker, missing, "public.nothing").await;

    let role = format!("{}_reader", database.name);
    database
        .run(&format!(
            "create role {role} login password 'reader'; grant create on database {} to {role}; alter table payments owner to {role};",
            database.name
        ))
        .await;
    let mut url = url::Url::parse(database.url.reveal()).expect("an address");
    url.set_username(&role).expect("a name");
    url.set_password(Some("reader")).expect("a password");
    let plain = Capture::start_as(&Secret::new(url.clone()), &database, broker.address(), config(&database));
    let error = plain.ended().await.expect_err("no right to replicate");
    assert!(matches!(error.fault(), Fault::Operator(remedy) if remedy.contains("replication")), "{error}");
    database.run(&format!("reassign owned by {role} to current_user; drop owned by {role}; drop role {role};")).await;

    let mut url = url::Url::parse(database.url.reveal()).expect("an address");
    url.set_path("/no_such_database");
    let nowhere = Capture::start_as(&Secret::new(url), &database, broker.address(), config(&database));
    assert!(matches!(nowhere.ended().await.expect_err("no database").fault(), Fault::Operator(_)));
}

#[tokio::test]
async fn a_second_capture_waits_for_the_slot_and_says_who_holds_it() {
    let (database, broker, config) = captured("busy").await;
    let first = Capture::start(&database, broker.address(), config.clone());
    first.until("streaming", |it| it.step == Step::Streaming).await;
    let second = Capture::start(&database, broker.address(), config);
    let stats: Stats = second.until("waiting", |it| it.waiting_for.as_ref().is_some_and(|it| it.contains("ledgerline-cdc"))).await;
    assert_eq!(stats.step, Step::Connecting);
    first.kill().await;
    second.until("streaming", |it| it.step == Step::Streaming).await;
    second.stop().await;
}

#[tokio::test]
async fn slot_and_publication_are_shown_as_they_stand_and_dropped_once_nobody_reads_them() {
    let (database, broker, config) = captured("removed").await;
    let capture = Capture::start(&database, broker.address(), config.clone());
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    let running = cdc::standing(&database.url, &database.url, &config).await.expect("the source answers");
    let slot = running.health.expect("the slot exists");
    assert!(slot.active && slot.wal_status == "reserved" && running.publication_exists && running.invalidation.is_none(), "{slot:?}");
    assert!(matches!(running.snapshot, SnapshotState::Finished { .. }));
    let busy = cdc::remove(&database.url, &config, false).await.expect_err("somebody reads it");
    assert!(busy.to_string().contains("ledgerline-cdc"), "{busy}");
    capture.stop().await;
    unread(&database).await;

    // What it holds back grows with what others write.
    let before = cdc::standing(&database.url, &database.url, &config).await.expect("the source answers").wal_kept_bytes.expect("a slot");
    database.run("create table others (t text); insert into others select repeat('x', 1000) from generate_series(1, 1000);").await;
    let after = cdc::standing(&database.url, &database.url, &config).await.expect("the source answers").wal_kept_bytes.expect("a slot");
    assert!(after >= before + 1_000_000, "{before} {after}");

    let would = cdc::remove(&database.url, &config, true).await.expect("said");
    let removed = cdc::remove(&database.url, &config, false).await.expect("dropped");
    assert_eq!((would.slot, would.publication), (removed.slot.clone(), removed.publication));
    assert_eq!(removed.slot.as_ref(), Some(&config.slot));
    assert!(removed.wal_freed_bytes >= after);
    let gone = cdc::standing(&database.url, &database.url, &config).await.expect("the source answers");
    assert_eq!((gone.health, gone.publication_exists, gone.wal_kept_bytes), (None, false, None));
    let nothing = cdc::remove(&database.url, &config, false).await.expect("nothing to do");
    assert_eq!((nothing.slot, nothing.publication, nothing.wal_freed_bytes), (None, None, 0));
    // The topics lack changes from now on, and a capture that would go on says so.
    refuses(&database, &broker, config, "missing").await;
}

/// A walsender takes a moment to notice that its reader has left.
async fn unread(database: &Database) {
    const ACTIVE: &str = "select exists (select from pg_replication_slots where slot_name = $1 and active)";
    let mut connection = database.connect().await;
    while sqlx::query_scalar(ACTIVE).bind(&database.name).fetch_one(&mut connection).await.expect("the server answers") {
        tokio::task::yield_now().await;
    }
}
