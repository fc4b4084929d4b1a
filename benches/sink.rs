//! Messages per second from the embedded broker to the embedded store, beside consuming alone, all in this process.
//!
//! `cargo bench --bench sink`; `SINK_RECORDS` and `SINK_ROUNDS` change the size.

use std::time::{Duration, Instant};

use ledgerline::{
    change::Topics,
    embedded::{
        kafka::{self, Broker},
        s3::{self, Server},
    },
    lake::{self, Access, Addressing, Config, Options, Stats, Store},
    secret::Secret,
    stage::{self, Phase},
    stream::consumer::{Consumer, Event, Settings},
};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{BaseProducer, BaseRecord, Producer as _},
};
use tokio_util::sync::CancellationToken;

const TOPIC: &str = "bank.public.transactions";
const VALUE_BYTES: usize = 760;

fn main() -> anyhow::Result<()> {
    let from_env = |name: &str, default: i64| std::env::var(name).ok().and_then(|it| it.parse().ok()).unwrap_or(default);
    let (n_records, n_rounds) = (from_env("SINK_RECORDS", 1_000_000), from_env("SINK_ROUNDS", 3));
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(bench(n_records, n_rounds))
}

async fn bench(n_records: i64, n_rounds: i64) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let broker = Broker::start(kafka::Config { dir: dir.path().join("kafka"), ..kafka::Config::default() }).await?;
    let (access_key_id, secret_access_key) = ("bench".to_owned(), Secret::new("bench-secret"));
    let server = Server::start(s3::Config {
        dir: dir.path().join("s3"),
        access_key_id: access_key_id.clone(),
        secret_access_key: secret_access_key.clone(),
        ..s3::Config::default()
    })
    .await?;
    let address = broker.address();
    let started = Instant::now();
    fill(&address, n_records).await?;
    say(format_args!("produced   {n_records} × {VALUE_BYTES} B: {} msg/s; peak {} MB", rate(n_records, started.elapsed()), peak_rss_mb()));

    let mut best = (0, 0);
    for round in 0..n_rounds {
        let alone = consume_alone(&address, n_records, round).await?;
        let access = Access {
            endpoint: Some(server.endpoint()),
            region: "us-east-1".into(),
            bucket: format!("sink-{round}"),
            addressing: Addressing::Auto,
            access_key_id: access_key_id.clone(),
            secret_access_key: secret_access_key.clone(),
        };
        let (landed, cpu_ms, stats) = land(&address, &access, n_records, round).await?;
        let ratio = landed * 100 / alone.max(1);
        let counts = &stats.tables["transactions"];
        say(format_args!(
            "round {round}: alone {alone} msg/s; landed {landed} msg/s ({ratio} % of alone), {} objects, {} MB, {cpu_ms} CPU ms per million of all services; peak {} MB",
            counts.objects,
            counts.bytes >> 20,
            peak_rss_mb()
        ));
        best = best.max((landed, ratio));
        if round + 1 == n_rounds {
            let started = Instant::now();
            let proof = lake::verify(&Store::connect(&access).await?, &Topics::new("bank"), Options::default()).await?;
            anyhow::ensure!(proof.ok() && proof.lanes[0].rows == n_records.unsigned_abs(), "the lake is wrong: {proof:?}");
            say(format_args!("verified   {} rows/s", rate(n_records, started.elapsed())));
        }
    }
    say(format_args!("best       {} msg/s, {} % of consuming alone; peak {} MB for broker, store and sink together", best.0, best.1, peak_rss_mb()));
    server.stop().await;
    broker.stop().await;
    Ok(())
}

async fn fill(address: &str, n_records: i64) -> anyhow::Result<()> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", address)
        .set("compression.type", "lz4")
        .set("enable.idempotence", "true")
        .set("linger.ms", "20")
        .set("queue.buffering.max.kbytes", "32768");
    let admin: AdminClient<DefaultClientContext> = config.create()?;
    admin.create_topics([&NewTopic::new(TOPIC, 1, TopicReplication::Fixed(1))], &AdminOptions::new()).await?;
    let producer: BaseProducer = config.create()?;
    tokio::task::spawn_blocking(move || {
        for n in 0..n_records {
            let (key, value) = (format!("{{\"id\":{n}}}"), envelope(n));
            let mut record = BaseRecord::to(TOPIC).key(&key).payload(&value);
            while let Err((error, back)) = producer.send(record) {
                anyhow::ensure!(error == KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), "{error}");
                record = back;
                producer.poll(Duration::from_millis(5));
            }
        }
        producer.flush(Duration::from_secs(120))?;
        Ok(())
    })
    .await?
}

/// An envelope of the real shape and size, with numbers that do not repeat.
fn envelope(n: i64) -> String {
    let hash = n.unsigned_abs().wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let amount = format!("{}.{:02}", hash % 100_000, hash % 97);
    let mut text = format!(
        "{{\"before\":null,\"after\":{{\"id\":{n},\"account_id\":{},\"related_account_id\":{},\"txn_type\":\"TRANSFER\",\"direction\":\"DEBIT\",\"amount\":\"{amount}\",\"balance_after\":\"{}.10\",\"status\":\"COMPLETED\",\"reference\":\"{hash:016x}\",\"created_at\":\"2026-11-22T10:{:02}:{:02}.{:06}Z\"}},\"source\":{{\"version\":\"3.7.0.Final\",\"connector\":\"postgresql\",\"name\":\"bank\",\"ts_ms\":17959{:08},\"snapshot\":null,\"db\":\"bank\",\"sequence\":\"[\\\"{}\\\",\\\"{}\\\"]\",\"schema\":\"public\",\"table\":\"transactions\",\"txId\":{n},\"lsn\":{}}},\"op\":\"c\",\"description\":\"",
        hash % 5_000,
        hash % 4_999,
        hash % 1_000_000,
        n / 60 % 60,
        n % 60,
        hash % 1_000_000,
        n % 100_000_000,
        n * 200,
        n * 200 + 56,
        n * 200 + 56
    );
    while text.len() + 2 < VALUE_BYTES {
        text.push(char::from(b'a' + u8::try_from((hash >> (text.len() % 58)) % 26).unwrap_or_default()));
    }
    text.truncate(VALUE_BYTES - 2);
    text + "\"}"
}

async fn consume_alone(address: &str, n_records: i64, round: i64) -> anyhow::Result<u64> {
    let settings = Settings { access: address.into(), group: format!("alone-{round}"), topics: vec![TOPIC.to_owned()], bytes_max: 64 << 20 };
    let mut consumer = Consumer::start(&settings)?;
    let (mut started, mut seen) = (Instant::now(), 0);
    while seen < n_records {
        match consumer.next().await? {
            Event::Assigned(lanes) => {
                started = Instant::now();
                for lane in lanes {
                    consumer.read_from(&lane, 0);
                }
            }
            Event::Records { records, .. } => seen += i64::try_from(records.len())?,
            _ => {}
        }
    }
    let took = started.elapsed();
    consumer.close().await;
    Ok(rate(n_records, took))
}

async fn land(address: &str, access: &Access, n_records: i64, round: i64) -> anyhow::Result<(u64, u64, Stats)> {
    let store = Store::connect(access).await?;
    let (mut handle, control) = stage::control(Stats::default(), Phase::Running, &CancellationToken::new());
    let config = Config { group: format!("sink-{round}"), ..Config::default() };
    let running = tokio::spawn(lake::run(store, address.to_owned(), Topics::new("bank"), config, control));
    let reached = |offset: i64| move |it: &Stats| it.lanes.iter().any(|it| it.landed_offset >= Some(offset));
    handle.stats.wait_for(reached(0)).await?;
    let (started, cpu_before) = (Instant::now(), cpu_ms());
    // The last object is sealed by age, not by work: the rate is taken where 95 of 100 have landed.
    let most = handle.stats.wait_for(reached(n_records * 95 / 100)).await?.lanes[0].landed_offset.unwrap_or_default();
    let (took, cpu) = (started.elapsed(), cpu_ms() - cpu_before);
    let stats = handle.stats.wait_for(reached(n_records)).await?.clone();
    handle.stop.cancel();
    running.await??;
    Ok((rate(most, took), cpu * 1_000_000 / most.unsigned_abs().max(1), stats))
}

fn rate(n_records: i64, took: Duration) -> u64 {
    n_records.unsigned_abs() * 1_000 / u64::try_from(took.as_millis()).unwrap_or(u64::MAX).max(1)
}

fn peak_rss_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|it| it.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    peak.unwrap_or_default() / 1_024
}

/// User and system time of this process; a tick is 10 ms.
fn cpu_ms() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    fields.get(11..13).map_or(0, |it| it.iter().filter_map(|it| it.parse::<u64>().ok()).sum::<u64>() * 10)
}

#[allow(clippy::print_stdout, reason = "a bench reports on stdout")]
fn say(line: std::fmt::Arguments<'_>) {
    println!("{line}");
}
