//! From the WAL to the broker, against `pg_recvlogical`, which decodes to /dev/null: as fast as PostgreSQL's walsender.
//!
//! Ours decodes, writes Debezium's JSON, and waits until the broker has everything on disk and the slot knows.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use ledgerline::{
    cdc::{self, Step},
    secret::Secret,
};

use crate::house::{Broker, Database, Engine, cpu_by_thread, cpu_since, forget_peak_memory, micros_a_row, peak_memory_mib, per_second, shown_by_thread};

const NAME: &str = "cdc_bench";
const REFERENCE_SLOT: &str = "cdc_bench_reference";
pub(crate) const TABLES: [&str; 3] = ["accounts", "transactions", "ledger_entries"];
/// As a payment of the bank: one transaction row, two ledger entries, one balance.
pub(crate) const ROWS_PER_TRANSACTION: u64 = 4;
pub(crate) const SCHEMA: &str = "
    create table accounts (id bigint primary key, account_number text not null, customer_id bigint not null, account_type text not null, status text not null,
        currency char(3) not null, balance numeric(18,2) not null, opened_at timestamptz not null, updated_at timestamptz not null);
    create table transactions (id bigint primary key, account_id bigint not null, txn_type text not null, direction text not null, amount numeric(18,2) not null,
        balance_after numeric(18,2), status text not null, reference text, description text, created_at timestamptz not null, posted_at timestamptz);
    create table ledger_entries (id bigint primary key, transaction_id bigint not null, account_id bigint, entry_type text not null, amount numeric(18,2) not null,
        created_at timestamptz not null);
    alter table accounts replica identity full; alter table transactions replica identity full; alter table ledger_entries replica identity full;
    insert into accounts select id, 'ACC' || id, id, 'CHECKING', 'ACTIVE', 'EUR', 100.00, now(), now() from generate_series(0, 999) id;";
const ROUNDS: usize = 3;

pub(crate) async fn in_small_transactions(transactions: u64) -> anyhow::Result<()> {
    let rows = transactions * ROWS_PER_TRANSACTION;
    compare(&format!("streaming, {transactions} transactions of {ROWS_PER_TRANSACTION} rows"), rows, &payments(transactions)).await
}

pub(crate) async fn in_one_transaction(rows: u64) -> anyhow::Result<()> {
    let base = "(select coalesce(max(id), 0) from ledger_entries)";
    let body = format!(
        "insert into ledger_entries select {base} + i, i / 2, i % 1000, case i % 2 when 0 then 'DEBIT' else 'CREDIT' end, 12.34, now()
            from generate_series(1, {rows}) i"
    );
    compare(&format!("streaming, one transaction of {rows} rows"), rows, &body).await
}

async fn compare(what: &str, rows: u64, backlog: &str) -> anyhow::Result<()> {
    let mut database = Database::create(NAME, SCHEMA).await?;
    let broker = Broker::start()?;
    let engine = Engine::start(&database, &broker.address, database.config(&TABLES));
    engine.until(|it| it.step == Step::Streaming).await?;
    engine.stop().await?;
    database.run(&format!("select pg_create_logical_replication_slot('{REFERENCE_SLOT}', 'pgoutput')")).await?;
    for _ in 0..ROUNDS {
        write(&mut database, backlog).await?;
        let end = cdc::wal_position(&database.url).await?;
        let reference = receive(&database.url, &end.to_string())?;
        let ours = captured(&database, &broker, rows).await?;
        println!(
            "{what}: pg_recvlogical {:.0} rows/s · ours {:.0} rows/s · ratio {:.2}",
            per_second(rows, reference),
            per_second(rows, ours),
            reference.as_secs_f64() / ours.as_secs_f64(),
        );
    }
    drop(broker);
    database.remove().await
}

/// From the first received event to the confirmation of the last; tells what it cost.
async fn captured(database: &Database, broker: &Broker, rows: u64) -> anyhow::Result<Duration> {
    let end = cdc::wal_position(&database.url).await?;
    forget_peak_memory()?;
    let engine = Engine::start(database, &broker.address, database.config(&TABLES));
    engine.until(|it| it.step == Step::Streaming).await?;
    let (start, before) = (Instant::now(), cpu_by_thread());
    engine.until(|it| it.confirmed_lsn >= end).await?;
    let took = start.elapsed();
    let (cpu, by_thread) = cpu_since(&before);
    engine.stop().await?;
    println!("    CPU {:.2} µs/row: {} · peak memory {} MiB", micros_a_row(cpu, rows), shown_by_thread(&by_thread, rows), peak_memory_mib());
    Ok(took)
}

fn receive(url: &Secret, end: &str) -> anyhow::Result<Duration> {
    let program = std::env::var("PG_RECVLOGICAL").unwrap_or_else(|_| "pg_recvlogical".to_owned());
    let publication = format!("publication_names={NAME}");
    let start = Instant::now();
    let status = Command::new(program)
        .args(["-d", url.reveal(), "--slot", REFERENCE_SLOT, "--start", "--no-loop", "-f", "/dev/null"])
        .args(["-o", "proto_version=1", "-o", &publication, "--endpos", end])
        .status()?;
    anyhow::ensure!(status.success(), "pg_recvlogical failed");
    Ok(start.elapsed())
}

pub(crate) fn payments(transactions: u64) -> String {
    format!(
        "do $$ declare base bigint := (select coalesce(max(id), 0) from transactions); begin
            for i in base + 1 .. base + {transactions} loop
                insert into transactions values (i, i % 1000, 'DEPOSIT', 'CREDIT', 12.34, 100.00, 'COMPLETED', 'REF' || i, 'a payment like any other', clock_timestamp(), now());
                insert into ledger_entries values (2 * i, i, i % 1000, 'DEBIT', 12.34, now()), (2 * i + 1, i, null, 'CREDIT', 12.34, now());
                update accounts set balance = balance + 0.01, updated_at = now() where id = i % 1000;
                commit;
            end loop; end $$"
    )
}

pub(crate) async fn write(database: &mut Database, backlog: &str) -> anyhow::Result<()> {
    database.run("set synchronous_commit = off").await?;
    database.run(backlog).await?;
    // The last commit flushes what the others left.
    database.run("set synchronous_commit = on; create table if not exists flushed (); drop table flushed").await
}
