//! What the pipeline may rely on, whichever engine captures: one test, run on each.

use std::collections::{BTreeMap, BTreeSet};

use ledgerline::{
    cdc::{self, Config, SnapshotState, Step},
    secret::Secret,
    stage::Phase,
};

use super::{
    days::{PAYMENTS, held, parsed, replayed},
    house::{Broker, Capture, Database, Read, Reader, config},
};

const TOPIC: &str = "public.payments";

#[tokio::test(flavor = "multi_thread")]
async fn the_native_engine_keeps_the_contract_of_a_capture() {
    let database = Database::create("contract").await;
    let broker = Broker::start(&database, &[TOPIC], 1);
    let config = config(&database);
    keeps_the_contract(&database, broker.address(), config).await;
}

#[cfg(feature = "stack")]
#[tokio::test(flavor = "multi_thread")]
async fn debezium_on_kafka_connect_keeps_the_contract_of_a_capture() {
    let database = Database::create("contract").await;
    let broker = Broker::start(&database, &[TOPIC], 1);
    let config = super::house::on_connect(&database);
    keeps_the_contract(&database, broker.address(), config).await;
}

async fn keeps_the_contract(database: &Database, bootstrap_servers: String, config: Config) {
    let (state, topic): (&Secret, String) = (&database.url, format!("{}.{TOPIC}", config.topic_prefix));
    #[cfg(feature = "stack")]
    let _worker = super::debezium::WORKER.read().await;
    database.run(PAYMENTS).await;
    database.run("insert into payments select id, 7.00, 'old' from generate_series(1, 500) id;").await;
    let mut reader = Reader::start(&bootstrap_servers);

    let capture = Capture::start(database, bootstrap_servers.clone(), config.clone());
    capture.until("streaming", |it| it.step == Step::Streaming && it.snapshot.as_ref().is_some_and(|it| it.finished)).await;
    let ends = cdc::snapshot_ends(state, &config.topic_prefix).await.expect("asked").expect("a finished snapshot");
    assert_eq!(ends.ends.iter().map(|it| (it.topic.as_str(), it.end_offset)).collect::<Vec<_>>(), [(topic.as_str(), 500)]);
    let read_at: BTreeSet<u64> = reader.read_on(&topic).iter().filter_map(parsed).filter_map(|it| it["source"]["lsn"].as_u64()).collect();
    assert_eq!(read_at, BTreeSet::from([ends.lsn.0]), "the rows of the snapshot say where it stood");

    database.run("insert into payments select id, 1.00, 'new' from generate_series(501, 520) id;").await;
    database.run("update payments set amount = 2.50 where id % 100 = 0; delete from payments where id <= 3;").await;
    database.run("begin; update payments set id = 9000 where id = 10; update payments set amount = 3.00 where id = 9000; commit;").await;
    let stats = capture.drain(database).await;
    holds_what_the_source_holds(&mut reader, database, &config).await;
    assert!(stats.slot.as_ref().is_some_and(|it| it.active) && stats.n_events() >= 527, "{:?}", stats.tables);

    capture.handle.wanted.send_replace(Phase::Paused);
    capture.until("paused", |it| it.phase == Phase::Paused).await;
    let before = reader.read(&topic).len();
    database.run("insert into payments values (10001, 1.00, 'while it is paused');").await;
    assert_eq!(reader.read(&topic).len(), before);
    capture.handle.wanted.send_replace(Phase::Running);
    capture.until("going on", |it| it.phase == Phase::Running).await;
    capture.drain(database).await;
    holds_what_the_source_holds(&mut reader, database, &config).await;

    capture.stop().await;
    database.run("insert into payments values (10002, 1.00, 'while nobody looks');").await;
    let capture = Capture::start(database, bootstrap_servers, config.clone());
    capture.drain(database).await;
    holds_what_the_source_holds(&mut reader, database, &config).await;
    assert_eq!(cdc::snapshot_ends(state, &config.topic_prefix).await.expect("asked"), Some(ends), "the snapshot is taken once");
    capture.stop().await;

    let standing = cdc::standing(&database.url, state, &config).await.expect("a standing");
    assert!(standing.publication_exists && standing.health.is_some() && matches!(standing.snapshot, SnapshotState::Finished { .. }), "{standing:?}");
    assert_eq!(standing.connector.is_some(), config.engine == cdc::Engine::Debezium, "{standing:?}");
    let removal = cdc::remove(&database.url, &config, false).await.expect("removed");
    assert_eq!((removal.slot.as_ref(), removal.publication.as_ref()), (Some(&config.slot), Some(&config.publication)));
    let standing = cdc::standing(&database.url, state, &config).await.expect("a standing");
    assert!(!standing.publication_exists && standing.health.is_none() && standing.connector.is_none(), "{standing:?}");
    // Whoever starts it again hears that changes are missing.
    let refused = Capture::start(database, "127.0.0.1:1".to_owned(), config).ended().await;
    assert!(matches!(refused, Err(cdc::Error::SlotMissing { .. })), "{refused:?}");
}

/// Every row by its events, and every commit as large as its END says, however often it was told.
pub(super) async fn holds_what_the_source_holds(reader: &mut Reader, database: &Database, config: &Config) {
    let events = reader.read(&format!("{}.{TOPIC}", config.topic_prefix));
    let (rows, _) = replayed(&events);
    assert_eq!(rows, held(database).await);
    let mut arrived: BTreeMap<u64, BTreeSet<(u64, String, String)>> = BTreeMap::new();
    for (record, event) in events.iter().filter_map(|it| Some((it, parsed(it)?))).filter(|(_, it)| it["op"] != "r") {
        let identity = (event["source"]["lsn"].as_u64().expect("an LSN"), record.key.clone().expect("a key"), event["op"].to_string());
        arrived.entry(event["source"]["txId"].as_u64().expect("an id")).or_default().insert(identity);
    }
    let boundaries = reader.read(&format!("{}.transaction", config.topic_prefix));
    let owed: BTreeMap<u64, usize> = boundaries.iter().filter_map(parsed_end).collect();
    let arrived: BTreeMap<u64, usize> = arrived.into_iter().map(|(id, events)| (id, events.len())).collect();
    assert_eq!(arrived, owed);
}

/// Transaction and number of events; None where it owes our table nothing.
fn parsed_end(record: &Read) -> Option<(u64, usize)> {
    let boundary = parsed(record).filter(|it| it["status"] == "END")?;
    let id = boundary["id"].as_str()?.split(':').next()?.parse().ok()?;
    let collections = boundary["data_collections"].as_array()?;
    let events = collections.iter().find(|it| it["data_collection"] == TOPIC)?["event_count"].as_u64()?;
    Some((id, usize::try_from(events).ok()?))
}
