//! The first reading of a table, against a bare `COPY` of it, and against a Kafka client that has nothing to do but to send.

use std::{
    num::NonZeroU32,
    time::{Duration, Instant},
};

use futures_util::TryStreamExt as _;
use ledgerline::stream::{
    producer::{Headers, Outgoing, Producer, Receipt},
    topics::{Topics, Wanted},
};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    message::{Headers as _, OwnedMessage},
};

use crate::house::{Broker, Database, Engine, forget_peak_memory, micros_a_row, peak_memory_mib, per_second, process_cpu};

const NAME: &str = "cdc_bench_snapshot";
const ROUNDS: usize = 2;
/// Producers that send at once where nothing else is done: as many as readers on two cores.
const SENDERS: usize = 2;

/// A table, and what is in row number `i` of it.
pub(crate) struct Shape {
    pub(crate) table: &'static str,
    columns: &'static str,
    row: &'static str,
}

/// A key, a reference, an amount: PostgreSQL has next to nothing to do for such a row.
pub(crate) const NARROW: Shape =
    Shape { table: "entries", columns: "id bigint primary key, account_id bigint not null, amount numeric(18,2) not null", row: "i, i % 1000, 12.34" };

/// The bank's narrowest table.
const LEDGER_ENTRIES: Shape = Shape {
    table: "ledger_entries",
    columns: "id bigint primary key, transaction_id bigint not null, account_id bigint, entry_type text not null, amount numeric(18,2) not null,
        created_at timestamptz not null",
    row: "i, i / 2, i % 1000, 'DEBIT', 12.34, now()",
};

impl Shape {
    /// Statements, each of which has to be alone.
    pub(crate) fn statements(&self, rows: u64) -> [String; 3] {
        let Self { table, columns, row } = self;
        [
            format!("create table {table} ({columns})"),
            format!("insert into {table} select {row} from generate_series(1, {rows}) i"),
            format!("vacuum analyze {table}"),
        ]
    }
}

pub(crate) async fn compare(rows: u64) -> anyhow::Result<()> {
    for shape in [NARROW, LEDGER_ENTRIES] {
        for _ in 0..ROUNDS {
            once(&shape, rows).await?;
        }
    }
    Ok(())
}

async fn once(shape: &Shape, rows: u64) -> anyhow::Result<()> {
    let mut database = Database::create(NAME, "").await?;
    for statement in shape.statements(rows) {
        database.run(&statement).await?;
    }
    let broker = Broker::start()?;
    let copied = copied(&mut database, shape.table).await?;
    let (read, cpu) = read(&database, &broker, shape.table, rows).await?;
    let memory = peak_memory_mib();
    let sent = sent(&broker, shape.table, rows).await?;
    println!(
        "snapshot, {rows} rows of {}: COPY {:.0} rows/s · only sending {:.0} rows/s · ours {:.0} rows/s · ratios {:.2} and {:.2} · CPU {:.2} µs/row · peak memory {memory} MiB",
        shape.table,
        per_second(rows, copied),
        per_second(rows, sent),
        per_second(rows, read),
        copied.as_secs_f64() / read.as_secs_f64(),
        sent.as_secs_f64() / read.as_secs_f64(),
        micros_a_row(cpu, rows),
    );
    drop(broker);
    database.remove().await
}

async fn copied(database: &mut Database, table: &str) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let mut lines = database.source.copy_out_raw(&format!("copy {table} to stdout")).await?;
    while lines.try_next().await?.is_some() {}
    Ok(start.elapsed())
}

/// From the start of the engine until the broker has every row; and its CPU.
async fn read(database: &Database, broker: &Broker, table: &str, rows: u64) -> anyhow::Result<(Duration, Duration)> {
    forget_peak_memory()?;
    let (start, before) = (Instant::now(), process_cpu()?);
    let engine = Engine::start(database, &broker.address, database.config(&[table]));
    let stats = engine.until(|it| it.snapshot.as_ref().is_some_and(|it| it.finished)).await?;
    let (took, cpu) = (start.elapsed(), process_cpu()?.saturating_sub(before));
    anyhow::ensure!(stats.snapshot.is_some_and(|it| it.rows == rows), "not every row was read");
    engine.stop().await?;
    Ok((took, cpu))
}

/// As many messages like the first one of the table's topic, until the broker has them: no database, no decoding, no JSON.
async fn sent(broker: &Broker, table: &str, rows: u64) -> anyhow::Result<Duration> {
    let topic = "only_sent";
    let wanted = Wanted { topic: topic.to_owned(), partitions: NonZeroU32::MIN, replication_factor: 0 };
    let topics = Topics::connect(broker.address.as_str())?;
    topics.ensure(vec![wanted]).await?;
    let bytes_max = topics.bytes_max(&[topic.to_owned()]).await?;
    let message = first_message(broker, &format!("{NAME}.public.{table}"))?;
    let producers = Producer::new(broker.address.as_str(), bytes_max)?.beside(SENDERS)?;
    let start = Instant::now();
    std::thread::scope(|scope| {
        let send = |producer, rows| tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(send(producer, topic, &message, rows));
        let rows = rows / u64::try_from(SENDERS)?;
        let senders: Vec<_> = producers.iter().map(|producer| scope.spawn(move || send(producer, rows))).collect();
        senders.into_iter().try_for_each(|it| it.join().map_err(|_| anyhow::anyhow!("a sender panicked"))?)
    })?;
    Ok(start.elapsed())
}

async fn send(producer: &Producer, topic: &str, message: &OwnedMessage, rows: u64) -> anyhow::Result<()> {
    let headers = message.headers().into_iter().flat_map(|it| it.iter()).fold(None, |all: Option<Headers>, it| {
        let value = it.value.unwrap_or_default();
        Some(all.map_or_else(|| Headers::of(it.key, value), |all| all.and(it.key, value)))
    });
    let timestamp_ms = message.timestamp().to_millis().unwrap_or_default();
    let outgoing = Outgoing { topic, partition: None, key: message.key(), value: message.payload(), headers: headers.as_ref(), timestamp_ms };
    let receipt = Receipt::open();
    for _ in 0..rows {
        producer.send(outgoing, &receipt).await?;
    }
    producer.seal(&receipt);
    Ok(producer.acked(&receipt).await?)
}

fn first_message(broker: &Broker, topic: &str) -> anyhow::Result<OwnedMessage> {
    let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", &broker.address).set("group.id", NAME).create()?;
    let mut first = TopicPartitionList::new();
    first.add_partition_offset(topic, 0, Offset::Beginning)?;
    consumer.assign(&first)?;
    let message = consumer.poll(Duration::from_secs(10)).ok_or_else(|| anyhow::anyhow!("no message in {topic}"))??;
    Ok(message.detach())
}
