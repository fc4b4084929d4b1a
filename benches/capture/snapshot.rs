//! The first reading of a table, against a bare `COPY` of it.

use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;

use crate::house::{Broker, Database, Engine, forget_peak_memory, micros_a_row, peak_memory_mib, per_second, process_cpu};

const NAME: &str = "cdc_bench_snapshot";
const ROUNDS: usize = 2;

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
    println!(
        "snapshot, {rows} rows of {}: COPY {:.0} rows/s · ours {:.0} rows/s · ratio {:.2} · CPU {:.2} µs/row · peak memory {} MiB",
        shape.table,
        per_second(rows, copied),
        per_second(rows, read),
        copied.as_secs_f64() / read.as_secs_f64(),
        micros_a_row(cpu, rows),
        peak_memory_mib(),
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
