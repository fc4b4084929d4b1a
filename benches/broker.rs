//! How fast the embedded broker takes and gives records, beside what the disk gives to a plain file.
//!
//! `cargo bench --bench broker -- [records=1000000]`. Records are as Debezium makes them, 760 bytes; producers are as we
//! run them: lz4, idempotent, acks=all. All figures of one run share one machine and one disk; compare ratios.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program for people: it prints, and stops where it cannot go on")]

use std::{
    fmt::Write as _,
    fs::File,
    io::Write as _,
    time::{Duration, Instant},
};

use ledgerline::embedded::kafka::{Broker, Config};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    config::FromClientConfig,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{BaseRecord, DefaultProducerContext, FutureProducer, FutureRecord, Producer, ThreadedProducer},
};

const TOPIC: &str = "bench";
const N_ACKS: usize = 2_000;
const PATIENCE: Duration = Duration::from_secs(300);

fn main() {
    // `cargo bench` adds a flag of its own.
    let n_records = std::env::args().skip(1).find_map(|it| it.parse().ok()).unwrap_or(1_000_000);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let dir = tempfile::tempdir_in(std::env::var("LEDGERLINE_BENCH_DIR").unwrap_or_else(|_| ".".to_owned())).unwrap();
    let broker = runtime.block_on(Broker::start(Config { dir: dir.path().join("kafka"), ..Config::default() })).unwrap();
    let mut client = ClientConfig::new();
    client.set("bootstrap.servers", broker.address()).set("log_level", "3");
    let admin: AdminClient<DefaultClientContext> = AdminClient::from_config(&client).unwrap();
    let wanted = [NewTopic::new(TOPIC, 1, TopicReplication::Fixed(1)).set("retention.bytes", "-1")];
    runtime.block_on(admin.create_topics(&wanted, &AdminOptions::new())).unwrap().remove(0).unwrap();

    let cpu = cpu_seconds();
    let (produced, payload_bytes) = produce(&client, n_records);
    let produce_cpu = cpu_seconds() - cpu;
    let log_bytes = log_bytes(&broker);
    let cpu = cpu_seconds();
    let consumed = consume(&client, n_records);
    let consume_cpu = cpu_seconds() - cpu;
    let mut acks = acknowledge(&runtime, &client);
    let plain = plain_file(dir.path(), log_bytes);
    runtime.block_on(broker.stop());

    let per_second = |took: Duration| n_records as f64 / took.as_secs_f64();
    let megabytes = |bytes: u64, took: Duration| bytes as f64 / took.as_secs_f64() / 1e6;
    acks.sort_unstable();
    println!("records              {n_records} of {} bytes, {log_bytes} bytes in the log", payload_bytes / n_records);
    println!("produce              {:>9.0} records/s  {:>6.0} MB/s of payload", per_second(produced), megabytes(payload_bytes, produced));
    println!("consume              {:>9.0} records/s  {:>6.0} MB/s of payload", per_second(consumed), megabytes(payload_bytes, consumed));
    let per_million = |seconds: f64| seconds * 1e6 / n_records as f64;
    println!(
        "cpu s per million    produce {:.2}  consume {:.2}  (client and broker; moves less with load)",
        per_million(produce_cpu),
        per_million(consume_cpu)
    );
    println!("ack of one record    p50 {:?}  p99 {:?}", acks[N_ACKS / 2], acks[N_ACKS * 99 / 100]);
    println!("plain write + fsync  {:>9.0} records/s  (the log's bytes, 1 MiB a write, one fdatasync)", per_second(plain));
    println!("produce : plain      {:.3}", plain.as_secs_f64() / produced.as_secs_f64());
}

/// Also how many bytes of payload went out.
fn produce(client: &ClientConfig, n_records: u64) -> (Duration, u64) {
    let mut config = client.clone();
    config.set("enable.idempotence", "true").set("acks", "all").set("compression.type", "lz4").set("linger.ms", "20");
    config.set("batch.size", "1000000").set("batch.num.messages", "10000").set("queue.buffering.max.messages", "500000");
    let producer: ThreadedProducer<DefaultProducerContext> = config.set("queue.buffering.max.kbytes", "524288").create().unwrap();
    let (mut value, mut payload_bytes, started) = (String::new(), 0, Instant::now());
    for n in 0..n_records {
        debezium(n, &mut value);
        payload_bytes += u64::try_from(value.len()).unwrap();
        let key = format!("{{\"id\":{n}}}");
        let mut record = BaseRecord::to(TOPIC).payload(&value).key(&key);
        while let Err((error, back)) = producer.send(record) {
            assert_eq!(error, KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull));
            std::thread::sleep(Duration::from_millis(1));
            record = back;
        }
    }
    producer.flush(PATIENCE).unwrap();
    (started.elapsed(), payload_bytes)
}

fn consume(client: &ClientConfig, n_records: u64) -> Duration {
    let mut config = client.clone();
    config.set("group.id", "bench").set("enable.auto.commit", "false").set("fetch.queue.backoff.ms", "5");
    config.set("queued.min.messages", "200000").set("queued.max.messages.kbytes", "131072").set("fetch.message.max.bytes", "4194304");
    let consumer: BaseConsumer = config.create().unwrap();
    let mut lanes = TopicPartitionList::new();
    lanes.add_partition_offset(TOPIC, 0, Offset::Beginning).unwrap();
    let started = Instant::now();
    consumer.assign(&lanes).unwrap();
    let mut next = 0;
    while next < i64::try_from(n_records).unwrap() {
        let record = consumer.poll(PATIENCE).unwrap().unwrap();
        assert_eq!(record.offset(), next);
        next += 1;
    }
    started.elapsed()
}

/// One record at a time, the next after the acknowledgement of the one before.
fn acknowledge(runtime: &tokio::runtime::Runtime, client: &ClientConfig) -> Vec<Duration> {
    let mut config = client.clone();
    let producer: FutureProducer = config.set("enable.idempotence", "true").set("linger.ms", "0").create().unwrap();
    let mut value = String::new();
    let one = |n| {
        debezium(n, &mut value);
        let started = Instant::now();
        runtime.block_on(producer.send(FutureRecord::<str, _>::to(TOPIC).payload(&value), PATIENCE)).unwrap();
        started.elapsed()
    };
    (0..).take(N_ACKS).map(one).collect()
}

/// User and system time of this process so far.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: f64 = fields[11..13].iter().map(|it| it.parse::<f64>().unwrap()).sum();
    ticks / 100.0
}

fn plain_file(dir: &std::path::Path, bytes: u64) -> Duration {
    let chunk = vec![0xA5; 1 << 20];
    let started = Instant::now();
    let mut file = File::create(dir.join("plain")).unwrap();
    let mut rest = bytes;
    while rest > 0 {
        let part = rest.min(1 << 20);
        file.write_all(&chunk[..usize::try_from(part).unwrap()]).unwrap();
        rest -= part;
    }
    file.sync_data().unwrap();
    started.elapsed()
}

/// What the log holds; the broker counts it once a second.
fn log_bytes(broker: &Broker) -> u64 {
    let mut stats = broker.stats();
    let mut look = || stats.borrow_and_update().clone();
    let (mut before, mut now) = (look().log_bytes, 0);
    while before != now || now == 0 {
        std::thread::sleep(Duration::from_millis(1_500));
        (before, now) = (now, look().log_bytes);
    }
    now
}

/// An insert into `transactions` as Debezium writes it.
fn debezium(n: u64, into: &mut String) {
    let mut x = n.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x ^= x >> 29;
    x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^= x >> 32;
    let (account, other, cents, at) = (1_000_000_000 + x % 50_000, 1_000_000_000 + (x >> 24) % 50_000, (x >> 16) % 1_000_000, 1_795_300_000_000 + n * 3);
    let (lsn, kind) = (24_023_128 + n * 144, ["TRANSFER", "DEPOSIT", "WITHDRAWAL"][usize::try_from(x % 3).unwrap()]);
    into.clear();
    write!(
        into,
        r#"{{"before":null,"after":{{"id":{n},"account_id":{account},"related_account_id":{other},"txn_type":"{kind}","direction":"DEBIT","amount":"{}.{:02}","balance_after":"{}.00","status":"COMPLETED","reference":"{x:016x}","created_at":"2026-11-22T10:00:00.{:06}Z","posted_at":"2026-11-22T10:00:00.{:06}Z"}},"source":{{"version":"ledgerline","connector":"postgresql","name":"bank","ts_ms":{at},"snapshot":null,"db":"bank","sequence":"[\"{lsn}\",\"{lsn}\"]","ts_us":{at}000,"ts_ns":{at}000000,"schema":"public","table":"transactions","txId":{},"lsn":{lsn},"xmin":null}},"transaction":{{"id":"{}:{lsn}","total_order":1,"data_collection_order":1}},"op":"c","ts_ms":{at},"ts_us":{at}123,"ts_ns":{at}123456}}"#,
        cents / 100,
        cents % 100,
        x % 100_000,
        n % 1_000_000,
        n % 1_000_000,
        700 + n / 3,
        700 + n / 3,
    )
    .unwrap();
}
