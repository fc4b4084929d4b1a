//! What Debezium loses, or what makes its task fail, and what the native engine writes instead (`assets/cdc-types.md`).
//!
//! `differential` leaves these out, as there is nothing to be equal to.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgConnection};
use tokio_util::sync::CancellationToken;

use super::{
    crashes::own_server,
    house::{Broker, Capture, Database, PATIENCE, config},
};

/// In one transaction with changes of their table, so that it is already another one when they are read.
const BEFORE_DDL: &str = "begin;
insert into kept values (1, '1 day', array[true, null], 'f');
alter table kept alter column span type text using span::text;
alter table kept alter column flags type text using flags::text;
alter table kept alter column flag type integer using flag::integer;
insert into kept values (2, 'two', 'flags', 2);
commit;";

/// A commit is in the WAL, and may be read, before others see what it did to the catalog. With a synchronous standby that is away this
/// takes as long as one likes.
#[tokio::test]
async fn a_table_is_described_as_the_transaction_left_it_that_others_do_not_see_yet() {
    let (_dir, server) = own_server().await;
    let database = Database::create_on(server.url("postgres").reveal(), "unseen").await;
    database.run("create table made (n integer not null); create schema elsewhere;").await;
    let mut broker = Broker::start(&database, &["public.made"], 1);
    let capture = Capture::start(&database, broker.address(), config(&database));
    capture.drain(&database).await;

    // It has asked about a table before, so that it will ask at once.
    database.run("insert into made values (0);").await;
    capture.drain(&database).await;
    let (mut writer, mut other, mut first) = (database.connect().await, database.connect().await, database.connect().await);
    database.run("alter system set synchronous_standby_names to 'nobody'; select pg_reload_conf();").await;
    // From the first commit that waits on, all do.
    let reset = CancellationToken::new();
    let is_reset = reset.clone();
    let waiting = tokio::spawn(async move {
        for at in (0..).take_while(|_| !is_reset.is_cancelled()) {
            sqlx::raw_sql(AssertSqlSafe(format!("create table elsewhere.t{at} ()"))).execute(&mut first).await.expect("a table");
        }
    });
    until(&mut other, "select exists (select from pg_stat_activity where wait_event = 'SyncRep')").await;
    for statement in ["begin", "alter table made add primary key (n)", "insert into made values (1)"] {
        sqlx::raw_sql(statement).execute(&mut writer).await.expect("done");
    }
    let before = database.wal_position().await.to_string();
    let committing = tokio::spawn(async move { sqlx::raw_sql("commit").execute(&mut writer).await.map(drop) });
    until(&mut other, &format!("select coalesce(bool_or(sent_lsn > '{before}'), false) from pg_stat_replication")).await;
    // The capture has it, and time to ask about the table.
    for _ in 0..1000 {
        until(&mut other, "select true").await;
    }
    assert!(!committing.is_finished(), "nobody has confirmed it");
    reset.cancel();
    for statement in ["alter system reset synchronous_standby_names", "select pg_reload_conf()"] {
        sqlx::raw_sql(statement).execute(&mut other).await.expect("done");
    }
    waiting.await.expect("no panic");
    committing.await.expect("no panic").expect("it is over");
    capture.drain(&database).await;
    capture.stop().await;
    let keys: Vec<Option<String>> = broker.read("public.made").into_iter().map(|it| it.key).collect();
    assert_eq!(keys, [None, Some("{\"n\":1}".to_owned())]);
}

async fn until(connection: &mut PgConnection, question: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !sqlx::query_scalar::<_, bool>(AssertSqlSafe(question.to_owned())).fetch_one(&mut *connection).await.expect("an answer") {
        assert!(Instant::now() < deadline, "still not so: {question}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The rows of a topic, as they are after each change.
fn after(broker: &mut Broker, topic: &str) -> Vec<Value> {
    let values = broker.read(topic).into_iter().filter_map(|it| it.value);
    values.map(|it| serde_json::from_str::<Value>(&it).expect("JSON")["after"].clone()).collect()
}

#[tokio::test]
async fn what_debezium_loses_or_fails_over_is_written_as_it_was() {
    let database = Database::create("accidents").await;
    database
        .run(
            "create type mood as enum ('sad', 'ok');
            create table kept (n integer primary key, span interval not null, flags boolean[], flag boolean not null);
            create table held (n integer primary key, moods mood[] not null, words tsvector[], numbers numeric[] not null, inner_arrays integer[], bits bit varying(1));",
        )
        .await;
    let mut broker = Broker::start(&database, &["public.kept", "public.held"], 1);
    let capture = Capture::start(&database, broker.address(), config(&database));
    capture.drain(&database).await;
    database.run(BEFORE_DDL).await;
    database
        .run(
            "insert into held values
            (1, '{ok,NULL}', '{a,NULL}', '{1.50,NaN}', '{{1,2},{3,NULL}}', ''),
            (2, '{NULL}', '{NULL}', '{Infinity}', '{{{1}},{{2}}}', '1');",
        )
        .await;
    database.run("alter table kept rename to renamed; insert into renamed values (3, 'three', 'flags', 3);").await;
    let stats = capture.drain(&database).await;
    assert_eq!(stats.dead_letters, 0);
    capture.stop().await;

    assert_eq!(
        after(&mut broker, "public.kept"),
        [json!({"n": 1, "span": 86_400_000_000_i64, "flags": [true, null], "flag": false}), json!({"n": 2, "span": "two", "flags": "flags", "flag": 2})]
    );
    assert_eq!(after(&mut broker, "public.renamed"), [json!({"n": 3, "span": "three", "flags": "flags", "flag": 3})]);
    assert_eq!(
        after(&mut broker, "public.held"),
        [
            json!({"n": 1, "moods": ["ok", null], "words": ["'a'", null], "numbers": ["1.50", "NaN"], "inner_arrays": [[1, 2], [3, null]], "bits": null}),
            json!({"n": 2, "moods": [null], "words": [null], "numbers": ["Infinity"], "inner_arrays": [[[1]], [[2]]], "bits": true}),
        ]
    );
}
