//! The dead letters, as an operator lists, reads and replays them.

use ledgerline::{
    dlq::{self, Filter, Letter, Origin, Outcome, Replay, Report, Which},
    fault::{Diagnose as _, Fault},
    stream::{self, range},
};
use rdkafka::{
    message::{Header, OwnedHeaders},
    producer::FutureRecord,
};

use super::house::*;

const GARBAGE: [u8; 4] = [0xFF, 0x00, 0xC3, 0x28];
/// What an earlier sink might have refused and today's takes.
const ENVELOPE: &str = r#"{"op":"c","before":null,"after":{"id":8,"last_name":"Russ"},"source":{"txId":6,"lsn":10}}"#;
const BY_CAPTURE: &str = r#"{"reason":"column lasts: not an interval","schema":"public","table":"accounts","op":"u","txId":99,"lsn":4660,"bytes":"VQAB/w=="}"#;

/// A letter of a real sink at 0, one of the capture at 1, one that can be taken today at 2, and that one again at 3.
async fn house_with_letters() -> House {
    let house = House::open().await;
    let dead = house.topic("dead_letters");
    for topic in [&house.customers, &dead] {
        house.create(topic, 1).await;
    }
    produce(&house.kafka(), &house.customers, 0, 0..3).await;
    let producer = producer(&house.kafka());
    producer.send(FutureRecord::<[u8], [u8]>::to(&house.customers).key(b"k").payload(&GARBAGE), WAIT).await.expect("sent");
    let mut sink = house.sink(house.config()).await;
    sink.landed(&house.customers, 0, 4).await;
    sink.stop().await.expect("a clean stop");
    producer.send(FutureRecord::<[u8], str>::to(&dead).payload(BY_CAPTURE), WAIT).await.expect("sent");
    for _ in 0..2 {
        let headers = [("reason", "too new"), ("topic", &*house.customers), ("partition", "0"), ("offset", "1"), ("timestamp_ms", "1799999999000")];
        let headers = headers.iter().fold(OwnedHeaders::new(), |all, (key, value)| all.insert(Header { key, value: Some(*value) }));
        producer.send(FutureRecord::<str, str>::to(&dead).key("{\"id\":8}").payload(ENVELOPE).headers(headers), WAIT).await.expect("sent");
    }
    house
}

async fn records(house: &House, topic: &str) -> Vec<range::Kept> {
    let (mut range, _) = range::Range::open(&house.kafka(), topic, range::From::Last(i64::MAX)).await.expect("the broker answers");
    let mut all = Vec::new();
    while let Some(record) = range.next().await {
        all.push(record.expect("a record"));
    }
    all
}

async fn replayed(house: &House, which: Which, force: bool, dry_run: bool) -> Report {
    dlq::replay(&house.kafka(), &house.topics(), &Replay { which, force, dry_run }).await.expect("the broker answers")
}

fn counts(report: &Report) -> (u64, u64, u64, u64) {
    (report.replayed, report.still_undecodable, report.repeats, report.not_replayable)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_are_listed_newest_first_counted_by_reason_and_show_no_customer() {
    let house = house_with_letters().await;
    let listing = dlq::list(&house.kafka(), &house.topics(), &Filter::default(), 3, false).await.expect("the broker answers");
    assert_eq!((listing.held, listing.looked_at, listing.wanted), (4, 4, 4));
    assert_eq!(listing.letters.iter().map(|it| it.offset).collect::<Vec<_>>(), [3, 2, 1]);
    let reasons: Vec<(&str, &str, u64)> = listing.reasons.iter().map(|it| (it.written_by, it.reason.as_str(), it.letters)).collect();
    assert_eq!(reasons[0], ("sink", "too new", 2));
    assert!(reasons.contains(&("sink", "the value is not UTF-8", 1)) && reasons.contains(&("capture", "column lasts: not an interval", 1)), "{reasons:?}");
    let told = serde_json::to_string(&listing).expect("JSON");
    assert!(!told.contains("Russ") && !told.contains("ff00c328"), "{told}");

    let accounts = Filter { table: Some("accounts".to_owned()), topic: None };
    let listing = dlq::list(&house.kafka(), &house.topics(), &accounts, 20, true).await.expect("the broker answers");
    assert_eq!((listing.held, listing.wanted, listing.letters.len()), (4, 1, 1));
    assert!(listing.letters[0].revealed.as_ref().is_some_and(|it| it.value.as_ref().is_some_and(|it| it.hex == "550001ff")), "{listing:?}");

    let letter = dlq::find(&house.kafka(), &house.topics(), 0, 0).await.expect("a letter");
    assert!(
        matches!(&letter, Letter { origin: Origin::Sink { topic, partition: 0, offset: 3, at: Some(_), .. }, .. } if *topic == house.customers),
        "{letter:?}"
    );
    let revealed = letter.shown(&house.topics(), true).revealed.and_then(|it| it.value).expect("bytes");
    assert_eq!((revealed.hex.as_str(), revealed.is_utf8), ("ff00c328", false));
    assert!(matches!(dlq::find(&house.kafka(), &house.topics(), 0, 4).await, Err(dlq::Error::NoLetter { offset: 4, .. })));
    let other = ledgerline::change::Topics::new("nobody");
    assert_eq!(dlq::list(&house.kafka(), &other, &Filter::default(), 3, false).await.expect("no topic, no letters").held, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_puts_back_what_the_sink_takes_today_and_says_why_the_rest_stays() {
    let house = house_with_letters().await;
    let all = || Which::All(Filter::default());
    let would = replayed(&house, all(), false, true).await;
    assert_eq!((counts(&would), records(&house, &house.customers).await.len()), ((1, 1, 1, 1), 4), "a rehearsal changes nothing");

    let done = replayed(&house, all(), false, false).await;
    assert_eq!(counts(&done), counts(&would));
    let outcome = |offset: i64| &done.handled.iter().find(|it| it.offset == offset).expect("handled").outcome;
    assert_eq!(outcome(0), &Outcome::StillUndecodable { why: "the value is not UTF-8" });
    assert!(matches!(outcome(1), Outcome::NotReplayable { remedy, .. } if remedy.contains("update public.accounts set id = id")), "{done:?}");
    assert_eq!(outcome(2), &Outcome::Replayed { topic: house.customers.clone(), partition: 0, again_a_letter: false });
    assert_eq!(outcome(3), &Outcome::Repeat);

    let back = records(&house, &house.customers).await;
    let last = back.last().expect("a record");
    assert_eq!((back.len(), last.key.as_deref(), last.value.as_deref()), (5, Some(br#"{"id":8}"#.as_slice()), Some(ENVELOPE.as_bytes())));
    assert_eq!(last.headers, [("ledgerline.replayed_from".to_owned(), format!("{}[0]@2", house.topic("dead_letters")).into_bytes().into())]);
    let mut sink = house.sink(house.config()).await;
    let stats = sink.landed(&house.customers, 0, 5).await;
    sink.stop().await.expect("a clean stop");
    assert_eq!(stats.tables["customers"].records, 1, "it lands like any other");
    assert_eq!(house.proof().await.findings, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forced_replay_of_what_is_no_text_becomes_a_letter_again_and_a_wrong_offset_changes_nothing() {
    let house = house_with_letters().await;
    let wrong = Replay { which: Which::Offsets { partition: 0, offsets: vec![2, 77] }, force: false, dry_run: false };
    let error = dlq::replay(&house.kafka(), &house.topics(), &wrong).await.expect_err("there is no such letter");
    assert!(error.to_string().contains("offset 77") && matches!(error.fault(), Fault::Operator(_)), "{error}");
    assert_eq!(records(&house, &house.customers).await.len(), 4);

    let forced = replayed(&house, Which::Offsets { partition: 0, offsets: vec![0] }, true, false).await;
    assert_eq!(forced.handled[0].outcome, Outcome::Replayed { topic: house.customers.clone(), partition: 0, again_a_letter: true });
    let mut sink = house.sink(house.config()).await;
    sink.landed(&house.customers, 0, 5).await;
    sink.stop().await.expect("a clean stop");
    let again = dlq::find(&house.kafka(), &house.topics(), 0, 4).await.expect("another letter");
    assert!(matches!(again.origin, Origin::Sink { offset: 4, .. }), "{again:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_away_is_told_and_not_waited_for() {
    let error = dlq::list("127.0.0.1:1", &ledgerline::change::Topics::new("bank"), &Filter::default(), 3, false).await.expect_err("nobody listens");
    assert!(matches!(&error, dlq::Error::Topics(stream::topics::Error::Ask { .. })) && matches!(error.fault(), Fault::Transient), "{error}");
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
}
