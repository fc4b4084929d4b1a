//! Broken clients, repeated and misplaced batches, old segments: what must not hurt anybody.

use std::time::{Duration, Instant};

use bytes::Bytes;
use kafka_protocol::messages::{InitProducerIdRequest, MetadataRequest, ProduceRequest};
use ledgerline::{
    embedded::{
        Health,
        kafka::{Config, Retention},
    },
    units::{Size, Span},
};

use super::{
    House,
    raw::{ANYBODY, Client, batch, fetch_request, fetched, frame, outcome, produce_request},
};

const CORRUPT: i16 = 2;
const TOO_LARGE: i16 = 10;
const OUT_OF_ORDER: i16 = 45;
const OLD_EPOCH: i16 = 47;
const STORAGE: i16 = 56;
const INVALID_RECORD: i16 = 87;

#[test]
fn what_cannot_be_understood_ends_its_own_connection_and_nothing_else() {
    let house = House::new();
    house.client().create("t", 1);
    let honest = frame(1, 1, &MetadataRequest::default().with_topics(None));
    let mut promises_too_much = honest.clone();
    let at = promises_too_much.len() - 4;
    promises_too_much[at..].copy_from_slice(&i32::MAX.to_be_bytes());
    let mut unknown_api = honest.clone();
    unknown_api[4..6].copy_from_slice(&999_i16.to_be_bytes());
    let mut too_new = honest.clone();
    too_new[6..8].copy_from_slice(&99_i16.to_be_bytes());
    let never_ends = [i32::MAX.to_be_bytes().as_slice(), &honest[4..]].concat();
    for bytes in [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), promises_too_much, unknown_api, too_new, never_ends, vec![0; 4], vec![0xFF; 64]] {
        let mut client = house.client();
        client.send_bytes(&bytes);
        assert!(client.read_frame().is_none(), "{bytes:?}");
    }
    assert_eq!(house.client().produce("t", 0, batch(&[b"a"], 0, ANYBODY)), (0, 0));
}

#[test]
fn a_client_that_stops_in_the_middle_of_a_frame_or_never_reads_holds_up_nobody() {
    let house = House::new();
    let mut good = house.client();
    good.create("t", 1);
    let value = vec![b'x'; 500_000];
    good.produce("t", 0, batch(&[&value], 0, ANYBODY));
    let request = frame(1, 11, &fetch_request("t", 0, 0));
    let stuck: Vec<Client> = (0..20)
        .map(|n| {
            let mut client = house.client();
            if n % 2 == 0 {
                client.send_bytes(&request[..request.len() / 2]);
            } else {
                (0..20).for_each(|_| client.send_bytes(&request));
            }
            client
        })
        .collect();
    let started = Instant::now();
    for n in 1..50 {
        assert_eq!(good.produce("t", 0, batch(&[b"a"], 0, ANYBODY)), (0, n));
        assert_eq!(good.fetch("t", 0, n).1, n + 1);
    }
    assert!(started.elapsed() < Duration::from_secs(10));
    drop(stuck);
}

#[test]
fn requests_sent_one_behind_the_other_are_answered_in_order() {
    let house = House::new();
    let mut client = house.client();
    client.create("t", 1);
    let sent: Vec<i32> = (0..40)
        .map(|n| {
            if n % 4 == 3 {
                client.send(11, &fetch_request("t", 0, 0).with_max_wait_ms(50).with_min_bytes(1 << 20))
            } else {
                client.send(9, &produce_request("t", 0, -1, batch(&[b"a"], 0, ANYBODY)))
            }
        })
        .collect();
    let mut next = 0;
    for (n, correlation_id) in sent.into_iter().enumerate() {
        if n % 4 == 3 {
            assert!(fetched(&client.answer::<kafka_protocol::messages::FetchRequest>(11, correlation_id)).1 >= next);
        } else {
            assert_eq!(outcome(&client.answer::<ProduceRequest>(9, correlation_id)), (0, next));
            next += 1;
        }
    }
}

#[test]
fn a_batch_that_is_not_whole_is_refused() {
    let house = House::with(|it| Config { batch_bytes_max: Size(10_000), ..it });
    let mut client = house.client();
    client.create("t", 1);
    let good = batch(&[b"money"], 0, ANYBODY);
    let mut flipped = good.to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    let control = {
        let mut it = good.to_vec();
        it[22] |= 0x20;
        reseal(it)
    };
    let large = vec![b'x'; 20_000];
    for (records, error) in [
        (Bytes::new(), CORRUPT),
        (good.slice(..good.len() - 1), CORRUPT),
        (flipped.into(), CORRUPT),
        ([good.clone(), good.clone()].concat().into(), INVALID_RECORD),
        (control, INVALID_RECORD),
        (batch(&[&large], 0, ANYBODY), TOO_LARGE),
    ] {
        assert_eq!(client.produce("t", 0, records), (error, -1));
    }
    assert_eq!(client.produce("t", 0, good), (0, 0));
}

fn reseal(mut batch: Vec<u8>) -> Bytes {
    let checksum = crc32c::crc32c(&batch[21..]);
    batch[17..21].copy_from_slice(&checksum.to_be_bytes());
    batch.into()
}

#[test]
fn unheard_batches_are_stored_and_a_refused_one_closes_the_connection() {
    let house = House::new();
    let mut client = house.client();
    client.create("t", 1);
    client.send(9, &produce_request("t", 0, 0, batch(&[b"a"], 0, ANYBODY)));
    assert_eq!(client.fetch("t", 0, 0).1, 1, "the next answer is the next request's");
    client.send(9, &produce_request("t", 0, 0, Bytes::from_static(b"nonsense")));
    assert!(client.read_frame().is_none());
}

#[test]
fn sequences_hold_over_a_restart_and_over_segments() {
    let mut house = House::with(|it| Config { segment_bytes: Size(200), ..it });
    let mut client = house.client();
    client.create("t", 1);
    let id = client.ask(4, &InitProducerIdRequest::default().with_transactional_id(None)).producer_id.0;
    for n in 0..8 {
        assert_eq!(client.produce("t", 0, batch(&[b"a", b"b"], 0, (id, 0, n * 2))), (0, i64::from(n) * 2));
    }
    for _ in 0..2 {
        for n in 3..8 {
            assert_eq!(client.produce("t", 0, batch(&[b"a", b"b"], 0, (id, 0, n * 2))), (0, i64::from(n) * 2), "a repeat is answered with its offset");
        }
        assert_eq!(client.produce("t", 0, batch(&[b"a"], 0, (id, 0, 20))), (OUT_OF_ORDER, -1));
        assert_eq!(client.fetch("t", 0, 0).1, 16);
        house.stop();
        house.start();
        client = house.client();
    }
    assert_eq!(client.produce("t", 0, batch(&[b"a"], 0, (id, 1, 0))), (0, 16));
    assert_eq!(client.produce("t", 0, batch(&[b"a"], 0, (id, 0, 16))), (OLD_EPOCH, -1));
    let next = client.ask(4, &InitProducerIdRequest::default().with_transactional_id(None)).producer_id.0;
    assert!(next > id, "{next} was given before");
}

#[test]
fn retention_goes_by_bytes_and_never_past_what_is_held() {
    let retention = Retention { bytes: Size(4_000), age: Span::from_secs(3_600) };
    let mut house = House::with(|it| Config { segment_bytes: Size(1_000), retention, ..it });
    let mut client = house.client();
    client.create("t", 1);
    house.broker().hold_retention("t", 0, 10);
    let now = 1_000 * i64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()).unwrap();
    for _ in 0..100 {
        client.produce("t", 0, batch(&[&[b'x'; 100]], now, ANYBODY));
    }
    let start = wait_for(|| Some(earliest(&mut house.client(), "t")).filter(|it| *it > 0));
    assert!(start <= 10, "{start}");
    assert_eq!(house.client().fetch("t", 0, 10).0, 0);

    // The hold is remembered: a broker that starts before its reader deletes nothing the reader needs. That retention
    // has been at work is seen on a topic that nobody holds, and that comes later in its rounds.
    house.stop();
    house.start();
    let mut client = house.client();
    client.create("unheld", 1);
    for _ in 0..100 {
        client.produce("unheld", 0, batch(&[&[b'x'; 100]], now, ANYBODY));
    }
    wait_for(|| (earliest(&mut house.client(), "unheld") > 0).then_some(()));
    assert!(earliest(&mut house.client(), "t") <= 10);

    house.broker().hold_retention("t", 0, 100);
    let start = wait_for(|| Some(earliest(&mut house.client(), "t")).filter(|it| *it > 10));
    assert!((60..100).contains(&start), "{start}");
    let (error, high_watermark, records) = house.client().fetch("t", 0, start);
    assert_eq!((error, high_watermark, records.is_empty()), (0, 100, false));
}

#[test]
fn a_topic_that_is_awaited_keeps_everything_until_its_reader_was_heard_of() {
    let retention = Retention { bytes: Size(4_000), age: Span::from_secs(60) };
    let mut house = House::with(|it| Config { segment_bytes: Size(1_000), retention, ..it });
    house.stop();
    house.awaited = |topic| topic.starts_with("bank.");
    house.start();
    let mut client = house.client();
    client.create("bank.t", 1);
    // Longer ago than the retention, and more than it; the second topic comes later in its rounds.
    for topic in ["bank.t", "unheld"] {
        if topic == "unheld" {
            client.create(topic, 1);
        }
        for _ in 0..100 {
            client.produce(topic, 0, batch(&[&[b'x'; 100]], 1_000, ANYBODY));
        }
    }
    wait_for(|| (earliest(&mut house.client(), "unheld") == 100).then_some(()));
    assert_eq!(earliest(&mut house.client(), "bank.t"), 0);

    house.stop();
    house.start();
    let mut client = house.client();
    client.create("unheld.too", 1);
    client.produce("unheld.too", 0, batch(&[b"a"], 1_000, ANYBODY));
    wait_for(|| (earliest(&mut house.client(), "unheld.too") == 1).then_some(()));
    assert_eq!(earliest(&mut house.client(), "bank.t"), 0);

    house.broker().hold_retention("bank.t", 0, 100);
    wait_for(|| (earliest(&mut house.client(), "bank.t") == 100).then_some(()));
}

#[test]
fn retention_goes_by_age_and_leaves_the_end_where_it_was() {
    let retention = Retention { bytes: Size(1 << 30), age: Span::from_secs(60) };
    let house = House::with(|it| Config { retention, ..it });
    let mut client = house.client();
    client.create("t", 1);
    // A timestamp of long ago.
    client.produce("t", 0, batch(&[b"a", b"b"], 1_000, ANYBODY));
    wait_for(|| (earliest(&mut house.client(), "t") == 2).then_some(()));
    assert_eq!(client.fetch("t", 0, 2).1, 2);
    assert_eq!(client.produce("t", 0, batch(&[b"c"], 1_000, ANYBODY)), (0, 2));
}

fn earliest(client: &mut Client, name: &str) -> i64 {
    use kafka_protocol::messages::{
        ListOffsetsRequest,
        list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic},
    };
    let part = ListOffsetsPartition::default().with_partition_index(0).with_timestamp(-2);
    let asked = ListOffsetsTopic::default().with_name(super::raw::topic(name)).with_partitions(vec![part]);
    client.ask(7, &ListOffsetsRequest::default().with_topics(vec![asked])).topics[0].partitions[0].offset
}

fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "in vain");
        std::thread::yield_now();
    }
}

#[test]
fn a_broker_that_must_leave_room_refuses_records_says_so_and_serves_what_it_has() {
    let mut house = House::new();
    house.client().create("t", 1);
    house.client().produce("t", 0, batch(&[b"a"], 0, ANYBODY));
    house.stop();
    house.config.free_min = Size(u64::MAX);
    house.start();
    let health = house.broker().health();
    assert_eq!(house.client().produce("t", 0, batch(&[b"b"], 0, ANYBODY)), (STORAGE, -1));
    assert!(matches!(&*health.borrow(), Health::Ailing(reason) if reason.contains("full")));
    assert_eq!(house.client().fetch("t", 0, 0).1, 1);
}
