//! The lake on a real store and a real Kafka protocol: exactly once, under kills, races, rebalances and outages.

mod dead_letters;
mod groups;
mod house;
#[cfg(feature = "stack")]
mod secured;
mod store;

use std::sync::atomic::Ordering;

use ledgerline::{
    fault::{Diagnose as _, Fault},
    lake::{self, Access, Config, Error, Options, Store},
    secret::Secret,
    stage::Phase,
    units::{Size, Span},
};
use rdkafka::producer::FutureRecord;

use self::house::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_land_by_rows_and_by_age_and_the_group_follows() {
    let house = House::open().await;
    house.create(&house.customers, 2).await;
    produce(&house.kafka(), &house.customers, 0, 0..250).await;
    produce(&house.kafka(), &house.customers, 1, 250..260).await;

    let mut sink = house.sink(house.cut(100)).await;
    sink.landed(&house.customers, 0, 250).await;
    let stats = sink.landed(&house.customers, 1, 10).await;
    sink.stop().await.expect("a clean stop");
    assert_eq!(committed(&house.kafka(), &house.config().group, &house.customers, 0).await, Some(250), "a hint for the next start");

    let proof = house.proof().await;
    assert_eq!(proof.findings, []);
    assert_eq!(proof.lanes.iter().map(|it| (it.partition, it.rows, it.last_offset)).collect::<Vec<_>>(), [(0, 250, Some(249)), (1, 10, Some(9))]);
    assert!(proof.lanes[0].objects >= 3, "100 rows are an object: {}", proof.lanes[0].objects);
    assert_eq!((stats.tables["customers"].records, stats.landing.count()), (260, 260));
    assert_eq!(values_of(&house.landed().await), expected(0..260));
    let listing = lake::list(&house.store().await, &house.topics(), 1).await.expect("a listing");
    assert_eq!(listing.iter().map(|it| (it.table.as_str(), it.records, it.lanes.len())).collect::<Vec<_>>(), [("customers", 260, 2)]);
    assert_eq!(listing[0].lanes[0].newest[0].last_offset, 249);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_way_from_commit_to_landed_is_measured_by_what_the_records_say_also_after_a_restart() {
    let house = House::open().await;
    house.create(&house.customers, 1).await;
    let an_hour_ago = chrono::Utc::now().timestamp_micros() - 3_600_000_000;
    let producer = producer(&house.kafka());
    for n in 0..20 {
        let value = match n {
            0 => r#"{"op":"r","source":{"ts_us":1,"snapshot":"first"}}"#.to_owned(),
            _ => format!(r#"{{"op":"c","source":{{"ts_us":{}}}}}"#, an_hour_ago + n),
        };
        producer.send(FutureRecord::<[u8], str>::to(&house.customers).partition(0).payload(&value), WAIT).await.expect("sent");
    }
    // Nobody was there when they were sent.
    let mut sink = house.sink(house.config()).await;
    let stats = sink.landed(&house.customers, 0, 20).await;
    assert_eq!(stats.commit_to_landed.count(), 19, "the snapshot's row was committed long before");
    let hours = 3_600_000..3_600_000 * 2;
    assert!(hours.contains(&stats.commit_to_landed.percentile_ms(1).expect("measured")), "{:?}", stats.commit_to_landed);
    assert!(stats.landing.percentile_ms(99).is_some_and(|it| it < 3_600_000), "the sink's own share is short");
    sink.stop().await.expect("a clean stop");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_goes_on_behind_the_newest_commit_record() {
    let house = House::open().await;
    house.create(&house.customers, 1).await;
    for round in 0..3 {
        produce(&house.kafka(), &house.customers, 0, round * 40..round * 40 + 40).await;
        // Another group each time: the position comes from the lake alone.
        let mut sink = house.sink(Config { group: house.group(&round.to_string()), ..house.cut(15) }).await;
        sink.landed(&house.customers, 0, round * 40 + 40).await;
        if round == 1 { sink.kill().await } else { sink.stop().await.expect("a clean stop") }
    }
    assert_eq!(house.proof().await.findings, []);
    assert_eq!(values_of(&house.landed().await), expected(0..120));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_between_put_and_commit_record_leaves_an_orphan_and_no_duplicate() {
    let house = House::open().await;
    house.create(&house.customers, 1).await;
    produce(&house.kafka(), &house.customers, 0, 0..10).await;
    let gate = Gate::open(&house).await;
    let store = Store::connect(&Access { endpoint: Some(gate.endpoint.clone()), ..house.access() }).await.expect("through the gate");
    gate.shut.store(true, Ordering::SeqCst);

    let sink = Sink::start(store, &house, house.config());
    tokio::time::timeout(WAIT, gate.knocked.notified()).await.expect("a commit record is tried");
    sink.kill().await;
    let proof = house.proof().await;
    assert_eq!((proof.findings.len(), proof.pending, proof.lanes.len()), (0, 1, 0), "the object is put, its records do not exist yet");

    // More has come in meanwhile, so the next start cuts differently.
    produce(&house.kafka(), &house.customers, 0, 10..25).await;
    let mut sink = house.sink(Config { group: house.group("next"), ..house.config() }).await;
    sink.landed(&house.customers, 0, 25).await;
    sink.stop().await.expect("a clean stop");

    assert_eq!(values_of(&house.landed().await), expected(0..25));
    let proof = lake::verify(&house.store().await, &house.topics(), Options { sweep: true, ..Options::default() }).await.expect("the store answers");
    assert_eq!((proof.findings.len(), proof.orphans.len(), proof.swept), (0, 1, 1));
    assert_eq!((house.proof().await.orphans.len(), house.landed().await.len()), (0, 25));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_that_do_not_know_of_each_other_land_every_record_once() {
    let house = House::open().await;
    house.create(&house.customers, 1).await;
    // Zombies: same lane, other groups, other cuts.
    let mut sinks = Vec::new();
    for (group, rows_max) in [("one", 7), ("two", 11), ("three", 13)] {
        sinks.push(house.sink(Config { group: house.group(group), age_max: Span::from_millis(20), ..house.cut(rows_max) }).await);
    }
    for first in (0..400).step_by(20) {
        produce(&house.kafka(), &house.customers, 0, first..first + 20).await;
    }
    let mut races = 0;
    for mut sink in sinks {
        races += sink.landed(&house.customers, 0, 400).await.races;
        sink.stop().await.expect("a clean stop");
    }
    assert!(races > 0, "they met");
    assert_eq!(house.proof().await.findings, []);
    assert_eq!(values_of(&house.landed().await), expected(0..400));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoked_partitions_are_read_again_without_duplicates() {
    let house = House::open().await;
    house.create(&house.customers, 4).await;
    let mut first = house.sink(house.cut(9)).await;
    for partition in 0..4 {
        produce(&house.kafka(), &house.customers, partition, 0..50).await;
        first.landed(&house.customers, partition, 50).await;
    }
    // The second takes over half of the lanes while more comes in.
    let mut second = house.sink(house.cut(9)).await;
    for partition in 0..4 {
        produce(&house.kafka(), &house.customers, partition, 50..100).await;
    }
    second.until("has lanes", |it| !it.lanes.is_empty()).await;
    first.stop().await.expect("a clean stop");
    second.until("has all lanes", |it| it.lanes.len() == 4 && it.lanes.iter().all(|it| it.landed_offset >= Some(100))).await;
    second.stop().await.expect("a clean stop");

    assert_eq!(house.proof().await.findings, []);
    assert_eq!(house.landed().await.len(), 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_ends_before_the_position_stops_the_lane_loudly() {
    let mut house = House::own().await;
    house.create(&house.customers, 1).await;
    produce(&house.kafka(), &house.customers, 0, 0..20).await;
    let mut sink = house.sink(house.config()).await;
    sink.landed(&house.customers, 0, 20).await;
    sink.stop().await.expect("a clean stop");

    // The topic is made anew, with fewer records.
    house.renew_broker().await;
    let accounts = house.topic("public.accounts");
    house.create(&house.customers, 1).await;
    house.create(&accounts, 1).await;
    produce(&house.kafka(), &house.customers, 0, 0..5).await;
    produce(&house.kafka(), &accounts, 0, 0..5).await;
    let mut sink = house.sink(house.config()).await;
    let stats = sink.until("stopped", |it| it.lanes.iter().any(|it| it.trouble.is_some())).await;
    let trouble = stats.lanes.iter().find_map(|it| it.trouble.clone()).expect("trouble");
    assert!(trouble.contains("created anew") && trouble.contains("cdc.topic_prefix"), "{trouble}");
    sink.landed(&accounts, 0, 5).await;

    let error = sink.stop().await.expect_err("the lane's error comes back");
    assert!(matches!(&error, Error::LaneStopped { lane, .. } if *lane == format!("{}[0]", house.customers)), "{error}");
    assert!(matches!(error.fault(), Fault::Operator(_)));
    assert_eq!(house.proof().await.findings, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_away_is_waited_for_and_nothing_is_lost() {
    let mut house = House::own().await;
    house.create(&house.customers, 1).await;
    // A small budget: the lanes are held while nothing lands.
    let small = Config { memory_max: Size(64 * 1024), bytes_max: Size(16 * 1024), ..house.config() };
    let mut sink = house.sink(small).await;
    produce(&house.kafka(), &house.customers, 0, 0..10).await;
    sink.landed(&house.customers, 0, 10).await;

    house.lake.leave().await;
    produce(&house.kafka(), &house.customers, 0, 10..3_000).await;
    let stats = sink.until("waiting", |it| it.store_trouble.is_some() && it.open_bytes > 32 * 1024).await;
    assert_eq!(stats.lanes[0].landed_offset, Some(10));
    assert!(stats.open_bytes < 2 * 1024 * 1024, "memory is bounded: {}", stats.open_bytes);

    house.lake.come_back().await;
    let stats = sink.landed(&house.customers, 0, 3_000).await;
    assert_eq!(stats.store_trouble, None);
    sink.stop().await.expect("a clean stop");
    assert_eq!(house.proof().await.findings, []);
    assert_eq!(values_of(&house.landed().await), expected(0..3_000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_ends_while_the_broker_is_away() {
    let mut house = House::own().await;
    house.create(&house.customers, 1).await;
    produce(&house.kafka(), &house.customers, 0, 0..10).await;
    let mut sink = house.sink(house.config()).await;
    sink.landed(&house.customers, 0, 10).await;

    house.stream.leave().await;
    sink.until("noticed", |it| it.kafka_trouble.is_some()).await;

    sink.stop().await.expect("nothing is lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_sink_reads_nothing_until_it_is_resumed() {
    let house = House::open().await;
    house.create(&house.customers, 1).await;
    let mut sink = house.sink(house.config()).await;
    produce(&house.kafka(), &house.customers, 0, 0..10).await;
    sink.landed(&house.customers, 0, 10).await;

    sink.handle.wanted.send_replace(Phase::Paused);
    sink.until("paused", |it| it.phase == Phase::Paused).await;
    produce(&house.kafka(), &house.customers, 0, 10..30).await;
    // Two looks at the log's end prove that it had the time to read.
    let seen = sink.until("saw the end", |it| it.lanes[0].end_offset == Some(30)).await.lanes[0].end_seen_ms;
    let stats = sink.until("saw it again", |it| it.lanes[0].end_seen_ms > seen).await;
    assert_eq!((stats.lanes[0].landed_offset, stats.lag()), (Some(10), Some(20)));

    sink.handle.wanted.send_replace(Phase::Running);
    sink.landed(&house.customers, 0, 30).await;
    sink.stop().await.expect("a clean stop");
    assert_eq!(values_of(&house.landed().await), expected(0..30));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_that_come_later_are_taken_up_and_foreign_ones_are_not() {
    let house = House::open().await;
    let mut sink = house.sink(house.config()).await;
    let foreign = [format!("other.{}", house.customers), house.topic("dead_letters"), format!("x{}", house.customers)];
    for topic in [house.customers.clone(), house.topic("transaction")].iter().chain(&foreign) {
        house.create(topic, 1).await;
        produce(&house.kafka(), topic, 0, 0..3).await;
    }
    sink.landed(&house.customers, 0, 3).await;
    sink.landed(&house.topic("transaction"), 0, 3).await;
    house.create(&house.topic("audit.events"), 1).await;
    produce(&house.kafka(), &house.topic("audit.events"), 0, 0..3).await;
    let stats = sink.landed(&house.topic("audit.events"), 0, 3).await;
    sink.stop().await.expect("a clean stop");
    assert_eq!(stats.tables.keys().collect::<Vec<_>>(), ["audit.events", "boundaries", "customers"]);
    assert_eq!(house.proof().await.findings, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_text_becomes_a_dead_letter_and_is_counted() {
    let house = House::open().await;
    for topic in [&house.customers, &house.topic("dead_letters")] {
        house.create(topic, 1).await;
    }
    produce(&house.kafka(), &house.customers, 0, 0..3).await;
    let garbage: [u8; 4] = [0xFF, 0x00, 0xC3, 0x28];
    producer(&house.kafka()).send(FutureRecord::<[u8], [u8]>::to(&house.customers).payload(&garbage), WAIT).await.expect("the broker takes it");

    let mut sink = house.sink(house.config()).await;
    let stats = sink.landed(&house.customers, 0, 4).await;
    sink.stop().await.expect("a clean stop");

    assert_eq!((stats.tables["customers"].records, stats.tables["customers"].dead_letters), (3, 1));
    let proof = house.proof().await;
    let lane = &proof.lanes[0];
    assert_eq!((proof.findings.len(), lane.rows, lane.holes, lane.dead_letters), (0, 3, 0, 1), "it is no hole of the log");
    let letter = first_message(&house.kafka(), &house.topic("dead_letters")).await;
    assert_eq!(
        letter,
        (
            Some(garbage.to_vec()),
            vec![
                ("reason".into(), "the value is not UTF-8".into()),
                ("topic".into(), house.customers.clone()),
                ("partition".into(), "0".into()),
                ("offset".into(), "3".into())
            ]
        )
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_finds_every_damage_and_goes_on() {
    let house = House::open().await;
    house.create(&house.customers, 1).await;
    produce(&house.kafka(), &house.customers, 0, 0..60).await;
    let mut sink = house.sink(house.cut(10)).await;
    sink.landed(&house.customers, 0, 60).await;
    sink.stop().await.expect("a clean stop");
    let store = house.store().await;
    let records = lake::log::after(&store, &house.customers, 0, None, usize::MAX).await.expect("records");
    assert!(records.len() >= 6);
    let findings = async || {
        let proof = lake::verify(&store, &house.topics(), Options::default()).await.expect("the store answers");
        proof.findings.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(findings().await, Vec::<String>::new());

    // A bit flips in one object, another is gone, a commit record is gone, another is rewritten.
    let mut damaged = store.get(&records[0].data).await.expect("answers").expect("there").to_vec();
    damaged[200] ^= 1;
    store.put(&records[0].data, damaged.into()).await.expect("put");
    store.delete(&records[1].data).await.expect("deleted");
    store.delete(&records[3].key()).await.expect("deleted");
    let mut forged = records[5].clone();
    forged.previous = Some("0".repeat(64));
    store.put(&forged.key(), forged.to_bytes()).await.expect("put");

    let found = findings().await;
    let about = |key: &str, what: &str| found.iter().filter(|it| it.starts_with(key) && it.contains(what)).count();
    assert_eq!(about(&records[0].data, "SHA-256"), 1, "{found:#?}");
    assert_eq!(about(&records[1].data, "missing"), 1, "{found:#?}");
    assert_eq!(about(&records[4].key(), "gap: the offsets 30 to 39"), 1, "{found:#?}");
    assert_eq!(about(&records[5].key(), "previous"), 1, "{found:#?}");
    let error = lake::log::after(&store, &house.customers, 0, Some(9), usize::MAX).await.expect_err("a loader does not step over a gap");
    assert!(matches!(error.fault(), Fault::Data(_)), "{error}");
    assert!(matches!(lake::read(&store, &records[0]).await, Err(Error::Damaged { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_keys_and_a_missing_store_are_told_apart() {
    let mut house = House::own().await;
    let wrong = Access { secret_access_key: Secret::new("wrong"), ..house.access() };
    let error = Store::connect(&wrong).await.expect_err("refused");
    assert!(matches!(error.fault(), Fault::Operator(_)), "{error:?}");

    house.lake.leave().await;
    let error = Store::connect(&house.access()).await.expect_err("nobody listens");
    assert!(matches!(error.fault(), Fault::Transient), "{error:?}");
}
