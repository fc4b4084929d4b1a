//! A stream that was damaged on its way: what cannot be read is set aside or is the end, and is never skipped in silence.

use ledgerline::{
    cdc::{Config, ErrorsTolerance, Step},
    dlq::{Letter, Origin},
    fault::{Diagnose as _, Fault, chain},
    stream::range::Kept,
};

use super::{
    days::{PAYMENTS, parsed},
    house::{Broker, Capture, Database, Read, config},
    network::Network,
    stops::stops,
};

/// A value of a row, and what becomes of it: of a kind that PostgreSQL does not have.
const DAMAGE: (&[u8], &[u8]) = (b"t\0\0\0\x07damaged", b"?\0\0\0\x07damaged");
/// How many columns the description of a table says it has: one more than follow.
const UNKNOWN: (&[u8], &[u8]) = (b"public\0payments\0f\0\x03", b"public\0payments\0f\0\x04");

/// A capture that streams through a network which can do damage.
async fn behind_a_network(test: &str, errors_tolerance: ErrorsTolerance) -> (Database, Broker, Network, Config) {
    let database = Database::create(test).await;
    database.run(PAYMENTS).await;
    let broker = Broker::start(&database, &["public.payments"], 1);
    let port = url::Url::parse(database.url.reveal()).expect("an address").port().unwrap_or(5432);
    let config = Config { errors_tolerance, ..config(&database) };
    (database, broker, Network::to(port).await, config)
}

fn ids(records: &[Read]) -> Vec<i64> {
    records.iter().filter_map(parsed).filter_map(|it| it["after"]["id"].as_i64()).collect()
}

const ROWS: &str = "begin; insert into payments values (1, 1.00, 'before'), (2, 1.00, 'damaged'), (3, 1.00, 'behind'); commit;";

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_arrives_damaged_goes_to_the_dead_letters_with_its_place_and_its_bytes() {
    let (database, mut broker, network, config) = behind_a_network("damaged", ErrorsTolerance::All).await;
    let capture = Capture::start_as(&network.url(&database.url), &database, broker.address(), config);
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    network.alter(Some(DAMAGE));
    database.run(ROWS).await;
    let stats = capture.drain(&database).await;
    assert_eq!((stats.dead_letters, stats.reconnects), (1, 0));
    assert_eq!(ids(&broker.read("public.payments")), [1, 3]);
    let letters = broker.read("dead_letters");
    let letter = parsed(&letters[0]).expect("a letter");
    assert!(letter["reason"].as_str().is_some_and(|it| it.contains("unknown tag")) && letter["lsn"].as_u64() > Some(0), "{letter}");
    let record = Kept { partition: 0, offset: 0, timestamp_ms: None, key: None, value: letters[0].value.clone().map(Into::into), headers: Vec::new() };
    let Letter { origin: Origin::Capture { table: Some(table), op, bytes, .. }, .. } = Letter::read(&record) else { panic!("{letter}") };
    assert_eq!((table.to_string().as_str(), op.as_str()), ("public.payments", "c"));
    assert!(bytes.ends_with(DAMAGE.1), "as they came: {bytes:?}");
    // Whoever waits for the whole transaction is not owed what is with the dead letters.
    let end = broker.read("transaction").iter().filter_map(parsed).find(|it| it["status"] == "END").expect("an END");
    assert_eq!(end["event_count"], 2);
    capture.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_no_tolerance_a_damaged_row_stops_the_capture_and_what_is_read_again_whole_arrives() {
    let (database, mut broker, network, config) = behind_a_network("undamaged", ErrorsTolerance::None).await;
    let start = || Capture::start_as(&network.url(&database.url), &database, broker.address.clone(), config.clone());
    let capture = start();
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    network.alter(Some(DAMAGE));
    database.run(ROWS).await;
    let told = ["public.payments", " at ", "unknown tag", "errors_tolerance"];
    stops(capture, &told).await;
    stops(start(), &told).await;
    network.alter(None);
    let capture = start();
    let stats = capture.drain(&database).await;
    assert_eq!(stats.dead_letters, 0);
    let mut arrived = ids(&broker.read("public.payments"));
    arrived.sort_unstable();
    arrived.dedup();
    assert_eq!(arrived, [1, 2, 3]);
    capture.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_description_of_a_table_that_cannot_be_read_is_the_end_whatever_is_tolerated() {
    let (database, mut broker, network, config) = behind_a_network("undescribed", ErrorsTolerance::All).await;
    let start = || Capture::start_as(&network.url(&database.url), &database, broker.address.clone(), config.clone());
    let capture = start();
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    network.alter(Some(UNKNOWN));
    database.run("insert into payments values (1, 1.00, 'x');").await;
    let error = capture.ended().await.expect_err("all rows after it would be misread");
    let Fault::Operator(remedy) = error.fault() else { panic!("no remedy for: {}", chain(&error)) };
    assert!(chain(&error).contains("cannot be read") && remedy.contains("read again"), "{}: {remedy}", chain(&error));
    network.alter(None);
    let capture = start();
    capture.drain(&database).await;
    assert_eq!((ids(&broker.read("public.payments")), broker.read("dead_letters")), (vec![1], vec![]));
    capture.stop().await;
}
