//! What librdkafka, the client of this project and of kcat and confluent-kafka, makes of the broker.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use ledgerline::units::Size;
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, AlterConfig, NewPartitions, NewTopic, ResourceSpecifier, TopicReplication, TopicResult},
    client::DefaultClientContext,
    config::FromClientConfig,
    consumer::{BaseConsumer, CommitMode, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{Header, Headers, OwnedHeaders, OwnedMessage},
    producer::{BaseProducer, FutureProducer, FutureRecord, Producer},
};

use super::House;

const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn client(address: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", address).set("log_level", "3");
    config
}

fn producer(address: &str, codec: &str) -> FutureProducer {
    client(address).set("enable.idempotence", "true").set("compression.type", codec).set("linger.ms", "5").create().unwrap()
}

fn consumer(address: &str, group: &str) -> BaseConsumer {
    let mut config = client(address);
    config.set("group.id", group).set("enable.auto.commit", "false").set("auto.offset.reset", "earliest").set("session.timeout.ms", "10000");
    config.set("heartbeat.interval.ms", "300").create().unwrap()
}

pub(super) fn reader(address: &str, topic: &str, partition: i32, from: Offset) -> BaseConsumer {
    let reader = consumer(address, "reader");
    let mut lanes = TopicPartitionList::new();
    lanes.add_partition_offset(topic, partition, from).unwrap();
    reader.assign(&lanes).unwrap();
    reader
}

/// The next `n` records, or as many as come in time.
pub(super) fn take(consumer: &BaseConsumer, n: usize) -> Vec<OwnedMessage> {
    let (mut taken, until) = (Vec::new(), Instant::now() + PATIENCE);
    while taken.len() < n && Instant::now() < until {
        taken.extend(consumer.poll(Duration::from_millis(50)).and_then(Result::ok).map(|it| it.detach()));
    }
    taken
}

fn poll_until(consumers: &[&BaseConsumer], what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "in vain: {what}");
        consumers.iter().for_each(|it| drop(it.poll(Duration::from_millis(20))));
    }
}

impl House {
    fn admin(&self) -> (AdminClient<DefaultClientContext>, AdminOptions) {
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE)).request_timeout(Some(PATIENCE));
        (AdminClient::from_config(&client(&self.address())).unwrap(), options)
    }

    /// Sends all values to partition 0 and waits for the acknowledgements; their offsets.
    fn send(&self, producer: &FutureProducer, topic: &str, values: &[String]) -> Vec<i64> {
        let queued = values.iter().map(|it| producer.send_result(FutureRecord::to(topic).payload(it).key("k").partition(0)).unwrap());
        let queued: Vec<_> = queued.collect();
        self.runtime.block_on(async {
            let mut offsets = Vec::new();
            for delivery in queued {
                offsets.push(delivery.await.unwrap().unwrap().offset);
            }
            offsets
        })
    }
}

pub(super) fn numbered(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|n| format!("{{\"n\":{n},\"padding\":\"{}\"}}", "x".repeat(n % 700))).collect()
}

#[test]
fn records_come_back_as_they_were_sent_with_every_codec() {
    let house = House::new();
    house.client().create("t", 1);
    let mut all = Vec::new();
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        let values = numbered(0..300);
        let offsets = house.send(&producer(&house.address(), codec), "t", &values);
        assert_eq!(offsets.last(), Some(&i64::try_from(all.len() + 299).unwrap()));
        all.extend(values);
    }
    let read = take(&reader(&house.address(), "t", 0, Offset::Beginning), all.len());
    assert_eq!(read.iter().map(Message::offset).collect::<Vec<_>>(), (0..1_500).collect::<Vec<_>>());
    assert!(read.iter().zip(&all).all(|(read, sent)| read.payload() == Some(sent.as_bytes()) && read.key() == Some(b"k")));
    let watermarks = consumer(&house.address(), "w").fetch_watermarks("t", 0, PATIENCE).unwrap();
    assert_eq!(watermarks, (0, 1_500));
}

#[test]
fn tombstones_empty_values_headers_and_timestamps_are_kept_apart() {
    let house = House::new();
    house.client().create("t", 1);
    let producer = producer(&house.address(), "lz4");
    let headers = OwnedHeaders::new().insert(Header { key: "a", value: Some("1") }).insert(Header { key: "none", value: None::<&str> });
    house.runtime.block_on(async {
        producer.send(FutureRecord::<str, str>::to("t").key("gone").headers(headers), PATIENCE).await.unwrap();
        producer.send(FutureRecord::<str, str>::to("t").key("empty").payload(""), PATIENCE).await.unwrap();
        producer.send(FutureRecord::<str, str>::to("t").payload("keyless").timestamp(1_234_567_890_123), PATIENCE).await.unwrap();
        let large = "x".repeat(900_000);
        producer.send(FutureRecord::<str, str>::to("t").payload(&large), PATIENCE).await.unwrap();
    });
    let read = take(&reader(&house.address(), "t", 0, Offset::Beginning), 4);
    assert_eq!(read[0].payload(), None);
    let headers: Vec<_> = read[0].headers().unwrap().iter().map(|it| (it.key.to_owned(), it.value.map(<[u8]>::to_vec))).collect();
    assert_eq!(headers, [("a".to_owned(), Some(b"1".to_vec())), ("none".to_owned(), None)]);
    assert_eq!(read[1].payload(), Some(b"".as_slice()));
    assert_eq!((read[2].key(), read[2].timestamp().to_millis()), (None, Some(1_234_567_890_123)));
    assert_eq!(read[3].payload().map(<[u8]>::len), Some(900_000));
}

#[test]
fn a_timestamp_finds_the_first_record_since() {
    let house = House::with(|it| ledgerline::embedded::kafka::Config { segment_bytes: Size(2_048), ..it });
    house.client().create("t", 1);
    let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
    let producer = producer(&house.address(), "none");
    for n in 0..100 {
        let record = FutureRecord::<str, str>::to("t").payload("x").partition(0).timestamp(now + n * 1_000);
        house.runtime.block_on(producer.send(record, PATIENCE)).unwrap();
    }
    let consumer = consumer(&house.address(), "times");
    let find = |timestamp: i64| {
        let mut asked = TopicPartitionList::new();
        asked.add_partition_offset("t", 0, Offset::Offset(timestamp)).unwrap();
        consumer.offsets_for_times(asked, PATIENCE).unwrap().elements()[0].offset()
    };
    assert_eq!(find(now), Offset::Offset(0));
    assert_eq!(find(now + 50_500), Offset::Offset(51));
    assert_eq!(find(now + 99_000), Offset::Offset(99));
    assert_eq!(find(now + 99_001), Offset::End);
}

#[test]
fn a_waiting_reader_hears_of_a_record_at_once() {
    let house = House::new();
    house.client().create("t", 1);
    let mut config = client(&house.address());
    let reader: BaseConsumer = config.set("group.id", "waiting").set("fetch.wait.max.ms", "20000").create().unwrap();
    let mut lanes = TopicPartitionList::new();
    lanes.add_partition_offset("t", 0, Offset::Beginning).unwrap();
    reader.assign(&lanes).unwrap();
    assert!(reader.poll(Duration::from_millis(500)).is_none(), "the fetch is on its way and waits");
    let sent = Instant::now();
    house.send(&producer(&house.address(), "none"), "t", &numbered(0..1));
    assert_eq!(take(&reader, 1).len(), 1);
    assert!(sent.elapsed() < Duration::from_secs(5), "{:?}", sent.elapsed());
}

#[test]
fn a_group_goes_on_where_it_committed_also_after_a_restart() {
    let mut house = House::new();
    house.client().create("t", 1);
    house.send(&producer(&house.address(), "lz4"), "t", &numbered(0..1_000));
    {
        let first = consumer(&house.address(), "g");
        first.subscribe(&["t"]).unwrap();
        let read = take(&first, 400);
        let mut done = TopicPartitionList::new();
        done.add_partition_offset("t", 0, Offset::Offset(read[399].offset() + 1)).unwrap();
        first.commit(&done, CommitMode::Sync).unwrap();
    }
    house.stop();
    house.start();
    let second = consumer(&house.address(), "g");
    second.subscribe(&["t"]).unwrap();
    assert_eq!(take(&second, 1)[0].offset(), 400);
    let groups = second.fetch_group_list(Some("g"), PATIENCE).unwrap();
    assert_eq!(groups.groups()[0].state(), "Stable");
}

fn members_share_and_take_over(assignor: &str) {
    let house = House::new();
    house.client().create("t", 3);
    let join = || -> BaseConsumer {
        let mut config = client(&house.address());
        config.set("group.id", "g").set("partition.assignment.strategy", assignor).set("session.timeout.ms", "10000");
        let member: BaseConsumer = config.set("heartbeat.interval.ms", "200").create().unwrap();
        member.subscribe(&["t"]).unwrap();
        member
    };
    let share = |member: &BaseConsumer| member.assignment().unwrap().count();
    let first = join();
    poll_until(&[&first], "the first member gets everything", || share(&first) == 3);
    let second = join();
    poll_until(&[&first, &second], "both get a share", || share(&first) + share(&second) == 3 && share(&first) > 0 && share(&second) > 0);
    drop(second);
    poll_until(&[&first], "the one that stays takes over", || share(&first) == 3);
}

#[test]
fn two_members_share_and_the_one_that_stays_takes_over() {
    members_share_and_take_over("range");
}

#[test]
fn two_members_share_cooperatively_and_the_one_that_stays_takes_over() {
    members_share_and_take_over("cooperative-sticky");
}

#[test]
fn an_idempotent_producer_goes_on_over_restarts_without_loss_or_repeat() {
    let mut house = House::with(|it| ledgerline::embedded::kafka::Config { segment_bytes: Size(64 << 10), ..it });
    house.client().create("t", 1);
    let mut config = client(&house.address());
    config.set("enable.idempotence", "true").set("linger.ms", "1").set("batch.num.messages", "50").set("reconnect.backoff.max.ms", "200");
    let producer: FutureProducer = config.create().unwrap();
    let values = numbered(0..3_000);
    let mut queued = Vec::new();
    for (n, value) in values.iter().enumerate() {
        if n % 1_000 == 500 {
            // With batches in flight, some of them appended but not acknowledged.
            house.stop();
            house.start();
        }
        queued.push(producer.send_result(FutureRecord::to("t").payload(value).key("k").partition(0)).unwrap());
    }
    let acknowledged = house.runtime.block_on(async {
        let mut offsets = Vec::new();
        for delivery in queued {
            offsets.push(delivery.await.unwrap().unwrap().offset);
        }
        offsets
    });
    assert_eq!(acknowledged, (0..3_000).collect::<Vec<_>>());
    let read = take(&reader(&house.address(), "t", 0, Offset::Beginning), 3_000);
    assert!(read.iter().map(|it| it.payload().unwrap()).eq(values.iter().map(String::as_bytes)));
    assert_eq!(consumer(&house.address(), "w").fetch_watermarks("t", 0, PATIENCE).unwrap(), (0, 3_000));
}

#[test]
fn keys_keep_their_order_over_partitions() {
    let house = House::new();
    house.client().create("t", 3);
    let producer = producer(&house.address(), "zstd");
    let queued = (0..3_000).map(|n| producer.send_result(FutureRecord::to("t").payload(&n.to_string()).key(&format!("account {}", n % 50))).unwrap());
    let queued: Vec<_> = queued.collect();
    house.runtime.block_on(async {
        for delivery in queued {
            delivery.await.unwrap().unwrap();
        }
    });
    let consumer = consumer(&house.address(), "g");
    consumer.subscribe(&["t"]).unwrap();
    let mut newest: BTreeMap<Vec<u8>, (u32, i32)> = BTreeMap::new();
    for record in take(&consumer, 3_000) {
        let n: u32 = std::str::from_utf8(record.payload().unwrap()).unwrap().parse().unwrap();
        let before = newest.insert(record.key().unwrap().to_vec(), (n, record.partition()));
        assert!(before.is_none_or(|(before, partition)| before < n && partition == record.partition()));
    }
    assert_eq!(newest.len(), 50);
}

#[test]
fn administrators_find_make_change_and_delete_topics() {
    let house = House::new();
    let (admin, options) = house.admin();
    let wanted = [NewTopic::new("t", 1, TopicReplication::Fixed(1)).set("retention.ms", "604800000")];
    let run = |result: Result<Vec<TopicResult>, KafkaError>| result.unwrap().remove(0);
    run(house.runtime.block_on(admin.create_topics(&wanted, &options))).unwrap();
    assert_eq!(run(house.runtime.block_on(admin.create_topics(&wanted, &options))).unwrap_err().1, RDKafkaErrorCode::TopicAlreadyExists);
    let misspelt = [NewTopic::new("u", 1, TopicReplication::Fixed(1)).set("retention.millis", "1")];
    assert_eq!(run(house.runtime.block_on(admin.create_topics(&misspelt, &options))).unwrap_err().1, RDKafkaErrorCode::InvalidConfig);

    let altered = [AlterConfig::new(ResourceSpecifier::Topic("t")).set("retention.ms", "1000000")];
    house.runtime.block_on(admin.alter_configs(&altered, &options)).unwrap().remove(0).unwrap();
    let described = house.runtime.block_on(admin.describe_configs([&ResourceSpecifier::Topic("t")], &options)).unwrap().remove(0).unwrap();
    assert_eq!(described.get("retention.ms").and_then(|it| it.value.clone()).as_deref(), Some("1000000"));

    run(house.runtime.block_on(admin.create_partitions(&[NewPartitions::new("t", 2)], &options))).unwrap();
    house.send(&producer(&house.address(), "none"), "t", &numbered(0..10));
    let mut before = TopicPartitionList::new();
    before.add_partition_offset("t", 0, Offset::Offset(4)).unwrap();
    house.runtime.block_on(admin.delete_records(&before, &options)).unwrap();
    let looker = consumer(&house.address(), "w");
    assert_eq!(looker.fetch_watermarks("t", 0, PATIENCE).unwrap(), (4, 10));
    assert_eq!(take(&reader(&house.address(), "t", 0, Offset::Beginning), 6)[0].offset(), 4);

    run(house.runtime.block_on(admin.delete_topics(&["t"], &options))).unwrap();
    assert!(looker.fetch_metadata(None, PATIENCE).unwrap().topics().is_empty());
    house.client().create("t", 1);
    assert_eq!(looker.fetch_watermarks("t", 0, PATIENCE).unwrap(), (0, 0), "nothing of the deleted topic comes back");
}

#[test]
fn partitions_grow_while_records_arrive() {
    let house = House::new();
    house.client().create("t", 1);
    let producer = producer(&house.address(), "lz4");
    let (admin, options) = house.admin();
    for count in 2..8 {
        let values = numbered(0..200);
        let queued: Vec<_> = values.iter().map(|it| producer.send_result(FutureRecord::to("t").payload(it).key("k").partition(0)).unwrap()).collect();
        house.runtime.block_on(admin.create_partitions(&[NewPartitions::new("t", count)], &options)).unwrap().remove(0).unwrap();
        house.runtime.block_on(async {
            for delivery in queued {
                delivery.await.unwrap().unwrap();
            }
        });
    }
    assert_eq!(consumer(&house.address(), "w").fetch_watermarks("t", 0, PATIENCE).unwrap(), (0, 1_200));
}

#[test]
fn a_topic_that_is_not_there_is_not_made_by_producing_to_it() {
    let house = House::new();
    let mut config = client(&house.address());
    let producer: FutureProducer = config.set("message.timeout.ms", "3000").set("topic.metadata.propagation.max.ms", "500").create().unwrap();
    let sent = house.runtime.block_on(producer.send(FutureRecord::<str, str>::to("nowhere").payload("x"), PATIENCE));
    assert_eq!(sent.unwrap_err().0, KafkaError::MessageProduction(RDKafkaErrorCode::UnknownTopicOrPartition));
    assert!(consumer(&house.address(), "w").fetch_metadata(None, PATIENCE).unwrap().topics().is_empty());
}

#[test]
fn a_transactional_producer_is_told_at_once_that_there_are_none() {
    let house = House::new();
    let producer: BaseProducer = client(&house.address()).set("transactional.id", "x").create().unwrap();
    let asked = Instant::now();
    let refused = producer.init_transactions(PATIENCE).unwrap_err();
    assert!(asked.elapsed() < PATIENCE / 2, "{:?}: {refused}", asked.elapsed());
}
