//! The capture beside `pg_recvlogical`, on the same backlog of small transactions.
//!
//! `cargo bench --bench capture -- [transactions]`, with `LEDGERLINE_TEST_POSTGRES` the address of a server with
//! `wal_level = logical` and `PG_RECVLOGICAL` the program (default: the one in PATH). The broker is the embedded one, in this
//! process, as in the pipeline; the CPU is told by threads, so that one sees whose it was.
//!
//! `pg_recvlogical` writes the decoded stream to /dev/null: it is as fast as PostgreSQL's walsender. Ours decodes, writes
//! Debezium's JSON, and waits until the broker has everything on disk and the slot knows.

#![expect(clippy::print_stdout, reason = "a benchmark tells its figures")]

use std::{
    collections::BTreeMap,
    process::Command,
    time::{Duration, Instant},
};

use ledgerline::{
    cdc::{self, Config, Stats, Step},
    embedded::kafka,
    secret::Secret,
    stage::{self, Handle, Phase},
    stream,
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const DATABASE: &str = "cdc_bench";
/// As a payment of the bank: one transaction row, two ledger entries, one balance.
const ROWS_PER_TRANSACTION: u64 = 4;
const SCHEMA: &str = "
    create table accounts (id bigint primary key, account_number text not null, customer_id bigint not null, account_type text not null, status text not null,
        currency char(3) not null, balance numeric(18,2) not null, opened_at timestamptz not null, updated_at timestamptz not null);
    create table transactions (id bigint primary key, account_id bigint not null, txn_type text not null, direction text not null, amount numeric(18,2) not null,
        balance_after numeric(18,2), status text not null, reference text, description text, created_at timestamptz not null, posted_at timestamptz);
    create table ledger_entries (id bigint primary key, transaction_id bigint not null, account_id bigint, entry_type text not null, amount numeric(18,2) not null,
        created_at timestamptz not null);
    alter table accounts replica identity full; alter table transactions replica identity full; alter table ledger_entries replica identity full;
    insert into accounts select id, 'ACC' || id, id, 'CHECKING', 'ACTIVE', 'EUR', 100.00, now(), now() from generate_series(0, 999) id;";

fn server() -> String {
    std::env::var("LEDGERLINE_TEST_POSTGRES").unwrap_or_else(|_| "postgres://postgres@127.0.0.1:5432/postgres".to_owned())
}

fn main() -> anyhow::Result<()> {
    let transactions = std::env::args().find_map(|it| it.parse().ok()).unwrap_or(50_000);
    tokio::runtime::Runtime::new()?.block_on(compare(transactions))
}

async fn compare(transactions: u64) -> anyhow::Result<()> {
    let mut admin = PgConnection::connect(&server()).await?;
    drop_database(&mut admin).await?;
    run(&mut admin, format!("create database {DATABASE}")).await?;
    let mut url = url::Url::parse(&server())?;
    url.set_path(DATABASE);
    let url = Secret::new(url);
    let mut source = PgConnection::connect(url.reveal()).await?;
    run(&mut source, SCHEMA.to_owned()).await?;

    let dir = tempfile::tempdir()?;
    let broker = kafka::Broker::start(kafka::Config { dir: dir.path().to_owned(), ..kafka::Config::default() }).await?;
    let address = broker.address();
    let (handle, task) = start_capture(&url, &address);
    until(&handle, |it| it.step == Step::Streaming).await?;
    handle.stop.cancel();
    task.await??;
    run(&mut source, "select pg_create_logical_replication_slot('cdc_bench_reference', 'pgoutput')".to_owned()).await?;
    write_backlog(&mut source, transactions).await?;
    let rows = transactions * ROWS_PER_TRANSACTION;

    for round in 1..=2 {
        let end = cdc::wal_position(&url).await?;
        let reference = receive(&url, &end.to_string())?;
        let (ours, cpu) = capture(&url, &address).await?;
        println!(
            "round {round}: pg_recvlogical {:.0} rows/s · ours {:.0} rows/s · ratio {:.2} · peak memory {} MiB",
            per_second(rows, reference),
            per_second(rows, ours),
            reference.as_secs_f64() / ours.as_secs_f64(),
            peak_memory_mib(),
        );
        let micros = |it: Duration| it.as_secs_f64() * 1e6 / f64::from(u32::try_from(rows).unwrap_or(u32::MAX));
        let by_thread: Vec<String> = cpu.iter().map(|(name, took)| format!("{name} {:.2}", micros(*took))).collect();
        println!("         CPU {:.2} µs/row: {}", micros(cpu.values().sum()), by_thread.join(" · "));
        if round == 1 {
            write_backlog(&mut source, transactions).await?;
        }
    }
    broker.stop().await;
    source.close().await?;
    drop_database(&mut admin).await
}

fn per_second(rows: u64, took: Duration) -> f64 {
    f64::from(u32::try_from(rows).unwrap_or(u32::MAX)) / took.as_secs_f64()
}

fn start_capture(url: &Secret, address: &str) -> (Handle<Stats>, JoinHandle<Result<(), cdc::Error>>) {
    let (handle, control) = stage::control(Stats::default(), Phase::Running, &CancellationToken::new());
    let tables = ["accounts", "transactions", "ledger_entries"].map(|it| format!("public.{it}")).to_vec();
    let config = Config { tables, slot: DATABASE.to_owned(), publication: DATABASE.to_owned(), ..Config::default() };
    let task = tokio::spawn(cdc::run(url.clone(), url.clone(), address.to_owned(), stream::Config::default(), config, control));
    (handle, task)
}

async fn until(handle: &Handle<Stats>, reached: impl FnMut(&Stats) -> bool) -> anyhow::Result<()> {
    let mut stats = handle.stats.clone();
    tokio::time::timeout(Duration::from_secs(600), stats.wait_for(reached)).await??;
    Ok(())
}

/// From the first received event to the confirmation of the last, and the CPU it took.
async fn capture(url: &Secret, address: &str) -> anyhow::Result<(Duration, BTreeMap<String, Duration>)> {
    let end = cdc::wal_position(url).await?;
    let (handle, task) = start_capture(url, address);
    until(&handle, |it| it.step == Step::Streaming).await?;
    let (start, before) = (Instant::now(), cpu_by_thread());
    until(&handle, |it| it.confirmed_lsn >= end).await?;
    let took = start.elapsed();
    let mut cpu = cpu_by_thread();
    cpu.iter_mut().for_each(|(name, it)| *it = it.saturating_sub(before.get(name).copied().unwrap_or_default()));
    cpu.retain(|_, it| *it > Duration::from_millis(1));
    handle.stop.cancel();
    task.await??;
    Ok((took, cpu))
}

fn receive(url: &Secret, end: &str) -> anyhow::Result<Duration> {
    let program = std::env::var("PG_RECVLOGICAL").unwrap_or_else(|_| "pg_recvlogical".to_owned());
    let publication = format!("publication_names={DATABASE}");
    let start = Instant::now();
    let status = Command::new(program)
        .args([
            "-d",
            url.reveal(),
            "--slot",
            "cdc_bench_reference",
            "--start",
            "--no-loop",
            "-f",
            "/dev/null",
            "-o",
            "proto_version=1",
            "-o",
            &publication,
            "--endpos",
            end,
        ])
        .status()?;
    anyhow::ensure!(status.success(), "pg_recvlogical failed");
    Ok(start.elapsed())
}

async fn write_backlog(source: &mut PgConnection, transactions: u64) -> anyhow::Result<()> {
    let body = format!(
        "do $$ declare base bigint := (select coalesce(max(id), 0) from transactions); begin
            for i in base + 1 .. base + {transactions} loop
                insert into transactions values (i, i % 1000, 'DEPOSIT', 'CREDIT', 12.34, 100.00, 'COMPLETED', 'REF' || i, 'a payment like any other', clock_timestamp(), now());
                insert into ledger_entries values (2 * i, i, i % 1000, 'DEBIT', 12.34, now()), (2 * i + 1, i, null, 'CREDIT', 12.34, now());
                update accounts set balance = balance + 0.01, updated_at = now() where id = i % 1000;
                commit;
            end loop; end $$"
    );
    run(source, "set synchronous_commit = off".to_owned()).await?;
    run(source, body).await?;
    // The last commit flushes what the others left.
    run(source, "set synchronous_commit = on; create table if not exists flushed (); drop table flushed".to_owned()).await
}

async fn run(connection: &mut PgConnection, sql: String) -> anyhow::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await?;
    Ok(())
}

async fn drop_database(admin: &mut PgConnection) -> anyhow::Result<()> {
    // A walsender takes a moment to notice that its reader has left.
    let left = format!(
        "do $$ begin while exists (select from pg_replication_slots where database = '{DATABASE}' and active) loop perform pg_sleep(0.05); end loop; end $$"
    );
    run(admin, left).await?;
    run(admin, format!("select pg_drop_replication_slot(slot_name) from pg_replication_slots where database = '{DATABASE}'")).await?;
    run(admin, format!("drop database if exists {DATABASE} with (force)")).await
}

/// User and system time of the threads that live, by their names.
fn cpu_by_thread() -> BTreeMap<String, Duration> {
    let mut sums = BTreeMap::<String, Duration>::new();
    for thread in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let read = |file: &str| std::fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        // The first number is the time on a CPU, in nanoseconds.
        let nanos = read("schedstat").split_whitespace().next().and_then(|it| it.parse().ok()).unwrap_or(0);
        *sums.entry(read("comm").trim().to_owned()).or_default() += Duration::from_nanos(nanos);
    }
    sums
}

fn peak_memory_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|it| it.strip_prefix("VmHWM:"));
    line.and_then(|it| it.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}
