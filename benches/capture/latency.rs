//! From a commit on the source to the broker's acknowledgement, while `pgbench` commits 1,000 times a second.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use ledgerline::cdc::{self, Step};

use crate::house::{Broker, Database, Engine};

const NAME: &str = "cdc_bench_latency";
const RATE: u64 = 1000;
const SCHEMA: &str = "
    create sequence ids;
    create table transactions (id bigint primary key, account_id bigint not null, amount numeric(18,2) not null, created_at timestamptz not null);
    create table accounts (id bigint primary key, balance numeric(18,2) not null, updated_at timestamptz not null);
    alter table accounts replica identity full;
    insert into accounts select id, 100.00, now() from generate_series(0, 999) id;";
const SCRIPT: &str = "
    \\set account random(0, 999)
    begin;
    insert into transactions values (nextval('ids'), :account, 12.34, now());
    update accounts set balance = balance + 0.01, updated_at = now() where id = :account;
    commit;";

pub(crate) async fn measure(seconds: u64) -> anyhow::Result<()> {
    let database = Database::create(NAME, SCHEMA).await?;
    let broker = Broker::start()?;
    let engine = Engine::start(&database, &broker.address, database.config(&["transactions", "accounts"]));
    engine.until(|it| it.step == Step::Streaming).await?;
    let written = committed(&database, seconds)?;
    let end = cdc::wal_position(&database.url).await?;
    let stats = engine.until(|it| it.confirmed_lsn >= end).await?;
    let latency = stats.latency;
    println!("latency, {:.0} transactions/s: commit → acknowledged {latency:?}", crate::house::per_second(stats.transactions, written));
    engine.stop().await?;
    drop(broker);
    database.remove().await
}

/// How long it took.
fn committed(database: &Database, seconds: u64) -> anyhow::Result<std::time::Duration> {
    let program = std::env::var("PGBENCH").unwrap_or_else(|_| "pgbench".to_owned());
    let start = std::time::Instant::now();
    let mut child = Command::new(program)
        .args(["--no-vacuum", "--client=4", "--jobs=1", "--protocol=prepared", "--file=-"])
        .args([format!("--rate={RATE}"), format!("--time={seconds}"), database.url.reveal().to_owned()])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    if let Some(mut script) = child.stdin.take() {
        script.write_all(SCRIPT.as_bytes())?;
    }
    anyhow::ensure!(child.wait()?.success(), "pgbench failed");
    Ok(start.elapsed())
}
