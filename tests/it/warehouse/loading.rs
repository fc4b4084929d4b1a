//! Each object once, whatever happens.

use std::time::Duration;

use ledgerline::{
    change::Lsn,
    fault::{Diagnose, Fault},
    lake,
    warehouse::{Cut, Error, SnapshotEnds, load},
};
use sqlx::Row;

use super::ground::{Ground, LANDED_MS, envelope, envelopes};

const CUSTOMERS: &str = "bank.public.customers";

/// Every offset once, in the object that holds it, and `_loads` in step.
async fn assert_whole(ground: &Ground, table: &str, rows: i64) {
    let database = &ground.database;
    assert_eq!(database.number(&format!("select count(*) from raw.{table}")).await, rows);
    assert_eq!(database.number(&format!("select count(distinct (_partition, _offset)) from raw.{table}")).await, rows);
    assert_eq!(database.number(&format!("select coalesce(sum(rows), 0)::bigint from raw._loads where object like 'raw/{table}/%'")).await, rows);
}

#[tokio::test]
async fn objects_are_loaded_once_and_bytes_arrive_as_they_were() {
    let ground = Ground::new().await;
    ground.land(CUSTOMERS, 0, &[envelope(1), None, envelope(2)]).await;
    ground.land(CUSTOMERS, 1, &[envelope(3)]).await;

    let pending = load::discover(&ground.store, &ground.warehouse, &ground.topics).await.expect("discovers");
    assert_eq!((pending.len(), pending[0].table.as_str(), pending[0].files, pending[0].rows), (1, "customers", 2, 4));

    let first = ground.load("customers").await;
    let again = ground.load("customers").await;

    assert_eq!((first.files, first.rows, first.rejected), (2, 4, 0));
    assert_eq!(again, load::Loaded::default());
    assert_whole(&ground, "customers", 4).await;
    let row = sqlx::query("select v #>> '{after,first_name}', _topic, _object from raw.customers where _partition = 0 and _offset = 2")
        .fetch_one(&ground.database.pool)
        .await
        .expect("it is there");
    assert_eq!((row.get::<&str, _>(0), row.get::<&str, _>(1)), ("Zoë \"Ada\" \\", CUSTOMERS));
    assert!(row.get::<&str, _>(2).starts_with("raw/customers/dt="));
    assert_eq!(ground.database.number("select _offset from raw.customers where v is null").await, 1);
    let pending = load::discover(&ground.store, &ground.warehouse, &ground.topics).await.expect("discovers");
    assert_eq!((pending[0].files, pending[0].oldest_ms), (0, None));
    let stats = ground.warehouse.stats(&ground.topics).await.expect("counts");
    assert_eq!((stats.files_loaded["customers"], stats.rows_loaded["customers"], stats.rows_rejected["customers"]), (2, 4, 0));
    ground.end().await;
}

#[tokio::test]
async fn more_than_a_thousand_small_objects_are_loaded_in_order() {
    let ground = Ground::new().await;
    let objects: Vec<_> = (0..1_010).map(|id| envelopes(id * 3..id * 3 + 3)).collect();
    ground.land_on(LANDED_MS, CUSTOMERS, 0, &objects).await;
    let mut transactions = 0;
    let loaded = load::load(&ground.store, &ground.warehouse, &ground.topics, "customers", |_| transactions += 1).await.expect("loads");
    assert_eq!((loaded.files, loaded.rows), (1_010, 3_030));
    assert!(transactions < 10, "objects share a transaction: {transactions}");
    assert_whole(&ground, "customers", 3_030).await;
    ground.end().await;
}

#[tokio::test]
async fn a_day_that_lands_late_is_loaded_when_it_lands() {
    const DAY_MS: i64 = 86_400_000;
    let ground = Ground::new().await;
    ground.land(CUSTOMERS, 0, &envelopes(0..10)).await;
    ground.load("customers").await;
    let late = ground.land_on(LANDED_MS - 3 * DAY_MS, CUSTOMERS, 0, &[envelopes(10..20)]).await;
    assert!(late[0].data.contains("dt=2026-11-19"), "{}", late[0].data);

    assert_eq!(ground.load("customers").await.rows, 10);
    assert_whole(&ground, "customers", 20).await;
    ground.end().await;
}

#[tokio::test]
async fn any_captured_table_gets_a_raw_table_whatever_its_name() {
    let ground = Ground::new().await;
    for table in ["audit.odd \"name\"", "public._loads", "public.Straße"] {
        ground.land(&format!("bank.{table}"), 0, &envelopes(0..5)).await;
    }
    assert_eq!(ground.load("audit.odd \"name\"").await.rows, 5);
    assert_eq!(ground.load("_loads").await.rows, 5);
    assert_eq!(ground.load("Straße").await.rows, 5);
    assert_eq!(ground.load("nobody_knows").await.rows, 0);
    for table in ["\"audit.odd \"\"name\"\"\"", "\"public._loads\"", "\"Straße\""] {
        assert_eq!(ground.database.number(&format!("select count(*) from raw.{table}")).await, 5);
    }
    ground.end().await;
}

#[tokio::test]
async fn of_many_loaders_at_once_each_object_is_loaded_by_one() {
    let ground = Ground::new().await;
    for partition in 0..2 {
        let objects: Vec<_> = (0..30).map(|id| envelopes(id * 50..id * 50 + 50)).collect();
        ground.land_on(LANDED_MS, CUSTOMERS, partition, &objects).await;
    }
    let loads = (0..6).map(|_| ground.load("customers"));
    let loaded: u64 = futures_util::future::join_all(loads).await.iter().map(|it| it.rows).sum();
    assert_eq!(loaded, 3_000);
    assert_whole(&ground, "customers", 3_000).await;
    ground.end().await;
}

/// The server loses the loader at each of its steps in turn: before the copy, in it, after it, at `_loads`, at the commit.
#[tokio::test]
async fn a_loader_that_dies_between_any_two_steps_leaves_nothing_and_the_next_one_loads_it_once() {
    let ground = Ground::new().await;
    for id in 0..3 {
        ground.land(CUSTOMERS, 0, &envelopes(id * 2_000..id * 2_000 + 2_000)).await;
    }
    let dies = |event: &str, table: &str, deferred: &str| {
        format!(
            "create or replace function die() returns trigger language plpgsql as $$ begin perform pg_terminate_backend(pg_backend_pid()); return null; end $$;
             create constraint trigger dies after {event} on {table} {deferred} for each row execute function die()"
        )
    };
    let row = "before insert on raw.customers for each row when (new._offset = 3000)";
    let steps = [
        (
            "the first rows of the copy",
            format!(
                "create or replace function die() returns trigger language plpgsql as $$ begin perform pg_terminate_backend(pg_backend_pid()); perform pg_sleep(10); return new; end $$; create trigger dies {row} execute function die()"
            ),
            "raw.customers",
        ),
        ("the end of the copy", dies("insert", "raw.customers", ""), "raw.customers"),
        ("the rows of _loads", dies("insert", "raw._loads", ""), "raw._loads"),
        ("the commit", dies("insert", "raw._loads", "deferrable initially deferred"), "raw._loads"),
    ];
    for (step, sql, table) in steps {
        ground.database.run(&sql).await;
        let died = load::load(&ground.store, &ground.warehouse, &ground.topics, "customers", |_| {}).await;
        assert!(died.is_err(), "the loader lost its connection at {step}");
        assert_whole(&ground, "customers", 0).await;
        ground.database.run(&format!("drop trigger dies on {table}")).await;
    }
    assert_eq!(ground.load("customers").await.rows, 6_000);
    assert_whole(&ground, "customers", 6_000).await;
    ground.end().await;
}

#[tokio::test]
async fn a_load_that_is_dropped_in_the_middle_frees_its_lane() {
    let ground = Ground::new().await;
    let objects: Vec<_> = (0..40).map(|id| envelopes(id * 500..id * 500 + 500)).collect();
    ground.land_on(LANDED_MS, CUSTOMERS, 0, &objects).await;
    for microseconds in [1_000, 5_000, 20_000, 50_000] {
        // Cut off wherever it happens to be; the next one must not wait for it.
        let _ = tokio::time::timeout(Duration::from_micros(microseconds), ground.load("customers")).await;
    }
    ground.load("customers").await;
    assert_whole(&ground, "customers", 20_000).await;
    ground.end().await;
}

#[tokio::test]
async fn a_record_that_is_no_json_is_kept_out_counted_and_named() {
    let ground = Ground::new().await;
    let mut values = envelopes(0..500);
    values[7] = Some(b"{\"not\": json".to_vec());
    values[100] = Some(br#"{"op":"c","before":null,"after":{"id":100,"first_name":"\u0000"},"source":{"txId":800,"lsn":10100}}"#.to_vec());
    values[101] = Some(br#"{"a":"\ud800"}"#.to_vec());
    values[499] = Some(b"[".repeat(100_000));
    ground.land(CUSTOMERS, 0, &envelopes(0..10)).await;
    ground.land(CUSTOMERS, 0, &values).await;
    ground.land(CUSTOMERS, 0, &envelopes(510..520)).await;

    let loaded = ground.load("customers").await;

    assert_eq!((loaded.files, loaded.rows, loaded.rejected), (3, 520, 4));
    assert_eq!(ground.database.number("select count(*) from raw.customers").await, 516);
    assert_eq!(ground.database.number("select sum(rows)::bigint from raw._loads").await, 520);
    let rows = sqlx::query("select \"offset\", reason, tx_id, lsn, op, key from raw._rejected order by 1")
        .fetch_all(&ground.database.pool)
        .await
        .expect("it is there");
    let offsets: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(offsets, [17, 110, 111, 509]);
    assert!(rows.iter().all(|row| !row.get::<&str, _>("reason").is_empty()));
    let known = &rows[1];
    assert_eq!((known.get("tx_id"), known.get("lsn"), known.get("op"), known.get("key")), (Some(800_i64), Some(10_100_i64), Some("c"), Some("100")));
    assert_eq!(rows[0].get::<Option<i64>, _>("tx_id"), None);
    assert_eq!(ground.warehouse.stats(&ground.topics).await.expect("counts").rows_rejected["customers"], 4);
    ground.end().await;
}

#[tokio::test]
async fn a_hole_in_the_chain_stops_the_load_loudly() {
    let ground = Ground::new().await;
    ground.land(CUSTOMERS, 0, &envelopes(0..10)).await;
    ground.load("customers").await;
    let lost = ground.land(CUSTOMERS, 0, &envelopes(10..20)).await;
    ground.land(CUSTOMERS, 0, &envelopes(20..30)).await;
    ground.lose(&lost).await;

    let error = load::load(&ground.store, &ground.warehouse, &ground.topics, "customers", |_| {}).await;

    let error = error.expect_err("offsets 10 to 19 are missing");
    assert!(matches!(&error, Error::Lake(lake::Error::BrokenChain { .. })) && matches!(error.fault(), Fault::Data(_)), "{error:?}");
    assert_whole(&ground, "customers", 10).await;
    ground.end().await;
}

#[tokio::test]
async fn the_cut_and_the_ends_of_the_snapshot_are_what_was_written() {
    let ground = Ground::new().await;
    assert_eq!(ground.warehouse.cut().await.expect("no cut is no error"), None);
    ground.database.run("create table staging.cut(lsn bigint, committed_at timestamp, previous_lsn bigint); insert into staging.cut values (10, '2026-11-01 00:00:01', -1), (500, '2026-11-01 00:00:02.5', 10)").await;
    let cut = ground.warehouse.cut().await.expect("reads").expect("there is one");
    assert_eq!(cut, Cut { lsn: Lsn(500), committed_at: "2026-11-01T00:00:02.5Z".parse().expect("a time") });

    let ends = |offset| SnapshotEnds { lsn: Some(Lsn(40)), lanes: vec![(CUSTOMERS.to_owned(), 0, offset), (CUSTOMERS.to_owned(), 1, 0)] };
    ground.warehouse.set_snapshot_ends(&ends(5)).await.expect("writes");
    let (left, right) = (ends(7), ends(7));
    let (left, right) = tokio::join!(ground.warehouse.set_snapshot_ends(&left), ground.warehouse.set_snapshot_ends(&right));
    assert!(left.is_ok() && right.is_ok());
    assert_eq!(ground.database.number("select sum(end_offset)::bigint * 10 + count(*) + max(lsn) from raw._snapshot_ends").await, 112);
    ground.end().await;
}

#[tokio::test]
async fn two_may_prepare_at_once() {
    let ground = Ground::new().await;
    ground.database.run("drop schema raw cascade; drop schema staging cascade").await;
    let prepared = futures_util::future::join_all((0..4).map(|_| ground.warehouse.prepare())).await;
    assert!(prepared.iter().all(Result::is_ok), "{prepared:?}");
    ground.end().await;
}

#[tokio::test]
async fn an_object_that_is_not_what_its_commit_record_says_stops_the_load_and_loads_nothing_of_it() {
    let ground = Ground::new().await;
    ground.land(CUSTOMERS, 0, &envelopes(0..10)).await;
    let record = ground.land(CUSTOMERS, 0, &envelopes(10..20)).await;
    let mut bytes = ground.store.get(&record.data).await.expect("the lake answers").expect("it is there").to_vec();
    bytes[40] ^= 1;
    ground.store.put(&record.data, bytes.into()).await.expect("puts");

    let error = load::load(&ground.store, &ground.warehouse, &ground.topics, "customers", |_| {}).await.expect_err("a bit has turned");

    assert!(matches!(&error, Error::Lake(lake::Error::Damaged { key, .. }) if *key == record.data) && matches!(error.fault(), Fault::Data(_)), "{error:?}");
    assert_whole(&ground, "customers", 0).await;
    ground.end().await;
}
