//! Debezium and our own engine: the same rows, the same backlog, the same broker, one after the other.
//!
//! Timed from outside, by the ends of the topics: from the first message that is there until the last one is. So neither the start
//! of a connector nor that of ours counts.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use ledgerline::{
    cdc::{self, Config, Step},
    stage::Phase,
};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
};

use crate::{
    house::{Database, Engine, micros_a_row, per_second, process_cpu},
    snapshot::NARROW,
    streaming::{self, ROWS_PER_TRANSACTION},
};

const NAME: &str = "cdc_bench_debezium";
const ROUNDS: usize = 2;
const LOOK_EVERY: Duration = Duration::from_millis(20);
const ASK: Duration = Duration::from_secs(10);

struct Runner {
    engine: Engine,
    config: Config,
}

pub(crate) async fn compare(rows: u64) -> anyhow::Result<()> {
    let variable = |name: &str| std::env::var(name).with_context(|| format!("{name}: eval \"$(tests/stack/up postgres kafka connect)\" sets it"));
    let broker = variable("LEDGERLINE__STREAM__BOOTSTRAP_SERVERS")?;
    let connect_url = variable("LEDGERLINE__CDC__CONNECT_URL")?;
    let ends: BaseConsumer = ClientConfig::new().set("bootstrap.servers", &broker).create()?;
    let mut database = Database::create(NAME, streaming::SCHEMA).await?;
    for statement in NARROW.statements(rows) {
        database.run(&statement).await?;
    }
    let tables: Vec<&str> = streaming::TABLES.into_iter().chain([NARROW.table]).collect();
    let base = Config { connect_url, database_password: cdc::CLEAR_PASSWORD.to_owned(), ..database.config(&tables) };

    let mut runners = Vec::new();
    let mut took = Vec::new();
    for engine in [cdc::Engine::Debezium, cdc::Engine::Native] {
        let name = format!("{NAME}_{}_{}", engine.as_str(), std::process::id());
        let config = Config { engine, slot: name.clone(), publication: name.clone(), topic_prefix: name, ..base.clone() };
        make_topics(&broker, &config, &tables).await?;
        let before = process_cpu()?;
        let runner = Runner { engine: Engine::start(&database, &broker, config.clone()), config };
        let rate = watched(&ends, &runner, &[NARROW.table], rows).await?;
        println!(
            "snapshot of {rows} rows, {}: {rate:.0} rows/s · CPU of this process {:.2} µs/row",
            engine.as_str(),
            micros_a_row(process_cpu()?.saturating_sub(before), rows)
        );
        took.push(rate);
        runner.engine.until(|it| it.step == Step::Streaming).await?;
        paused(&runner).await?;
        runners.push(runner);
    }
    println!("snapshot of {rows} rows: ratio {:.2}", ratio(&took));
    let transactions = rows / ROWS_PER_TRANSACTION;
    for _ in 0..ROUNDS {
        streaming::write(&mut database, &streaming::payments(transactions)).await?;
        let mut took = Vec::new();
        for runner in &runners {
            runner.engine.handle.wanted.send_replace(Phase::Running);
            took.push(watched(&ends, runner, &streaming::TABLES, rows).await?);
            paused(runner).await?;
        }
        let rates: Vec<String> = took.iter().map(|it| format!("{it:.0} rows/s")).collect();
        println!("streaming, {transactions} transactions of {ROWS_PER_TRANSACTION} rows: Debezium, ours {} · ratio {:.2}", rates.join(", "), ratio(&took));
    }
    for Runner { engine, config } in runners {
        engine.stop().await?;
        cdc::remove(&database.url, &config, true).await?;
    }
    database.remove().await
}

/// The ends of a topic can be asked only once it is there.
async fn make_topics(broker: &str, config: &Config, tables: &[&str]) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new().set("bootstrap.servers", broker).create()?;
    let names: Vec<String> = tables.iter().map(|it| topic(config, it)).collect();
    let topics: Vec<NewTopic<'_>> = names.iter().map(|it| NewTopic::new(it, 1, TopicReplication::Fixed(1))).collect();
    for made in admin.create_topics(&topics, &AdminOptions::new()).await? {
        made.map_err(|(topic, error)| anyhow::anyhow!("topic {topic}: {error}"))?;
    }
    Ok(())
}

fn topic(config: &Config, table: &str) -> String {
    format!("{}.public.{table}", config.topic_prefix)
}

async fn paused(runner: &Runner) -> anyhow::Result<()> {
    runner.engine.handle.wanted.send_replace(Phase::Paused);
    runner.engine.until(|it| it.phase == Phase::Paused).await.map(drop)
}

fn ratio(took: &[f64]) -> f64 {
    took.last().zip(took.first()).map_or(0.0, |(ours, theirs)| ours / theirs)
}

/// Rows a second, once so many more are in the topics than now.
async fn watched(ends: &BaseConsumer, runner: &Runner, tables: &[&str], rows: u64) -> anyhow::Result<f64> {
    let config = &runner.config;
    let before = told(ends, config, tables);
    let mut first = None;
    loop {
        let arrived = told(ends, config, tables).saturating_sub(before);
        let (start, already) = match (first, arrived) {
            (_, 0) => (Instant::now(), 0),
            (None, _) => *first.insert((Instant::now(), arrived)),
            (Some(it), _) => it,
        };
        if arrived >= rows {
            return Ok(per_second(rows - already, start.elapsed()));
        }
        runner.engine.still_runs()?;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Messages in the topics.
fn told(ends: &BaseConsumer, config: &Config, tables: &[&str]) -> u64 {
    let end = |table: &&str| ends.fetch_watermarks(&topic(config, table), 0, ASK).map_or(0, |it| u64::try_from(it.1).unwrap_or(0));
    tables.iter().map(end).sum()
}
