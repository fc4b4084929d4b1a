//! What Debezium loses, or what makes its task fail, and what the native engine writes instead (`assets/cdc-types.md`).
//!
//! `differential` leaves these out, as there is nothing to be equal to.

use serde_json::{Value, json};

use super::house::{Broker, Capture, Database, config};

/// In one transaction with changes of their table, so that it is already another one when they are read.
const BEFORE_DDL: &str = "begin;
insert into kept values (1, '1 day', array[true, null], 'f');
alter table kept alter column span type text using span::text;
alter table kept alter column flags type text using flags::text;
alter table kept alter column flag type integer using flag::integer;
insert into kept values (2, 'two', 'flags', 2);
commit;";

/// A commit is in the WAL, and may be read, before others see what it did to the catalog: often enough to be seen among these.
#[tokio::test]
async fn a_key_that_is_made_with_the_first_row_is_that_rows_key() {
    const TABLES: u32 = 40;
    let database = Database::create("made_keys").await;
    let names: Vec<String> = (0..TABLES).map(|it| format!("t{it}")).collect();
    let tables: String = names.iter().map(|it| format!("create table {it} (n integer not null);")).collect();
    database.run(&tables).await;
    let topics: Vec<String> = names.iter().map(|it| format!("public.{it}")).collect();
    let mut broker = Broker::start(&database, &topics.iter().map(String::as_str).collect::<Vec<_>>(), 1);
    let capture = Capture::start(&database, broker.address(), config(&database));
    capture.drain(&database).await;
    let made = names.iter().map(|it| format!("begin; insert into {it} values (1); alter table {it} add primary key (n); insert into {it} values (2); commit;"));
    database.run(&made.collect::<String>()).await;
    capture.drain(&database).await;
    capture.stop().await;
    for topic in topics {
        let last = broker.read(&topic).pop().and_then(|it| it.key);
        assert_eq!(last.as_deref(), Some("{\"n\":2}"), "{topic}");
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
