//! The capture beside its peers: `pg_recvlogical`, a bare `COPY`, and Debezium.
//!
//! `cargo bench --bench capture -- [streaming|bulk|snapshot|latency|debezium] [size]`; without a name the first four. It needs
//! `LEDGERLINE_TEST_POSTGRES`, the address of a server with `wal_level = logical`, and `PG_RECVLOGICAL` and `PGBENCH`, the programs
//! (default: those in PATH). The broker is the embedded one in a process of its own, so that CPU and memory told are the engine's.
//!
//! - `streaming`: rows in small transactions, against `pg_recvlogical` to /dev/null on the same backlog. Size: transactions.
//! - `bulk`: one transaction of so many rows; CPU for each and the peak of the memory.
//! - `snapshot`: so many narrow rows, against a bare `COPY … TO STDOUT` of them by the same client.
//! - `latency`: from a commit to the broker's acknowledgement, at 1,000 transactions a second. Size: seconds.
//! - `debezium`: the same backlog and the same rows by Debezium and by our own engine to the same broker, the one of `tests/stack/up
//!   postgres kafka connect`, whose variables must be set. Size: rows of the snapshot; a quarter of them as transactions.

#![expect(clippy::print_stdout, reason = "a benchmark tells its figures")]

mod debezium;
mod house;
mod latency;
mod snapshot;
mod streaming;

/// Of `latency`, in seconds.
const SECONDS: u64 = 20;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    let runtime = tokio::runtime::Runtime::new()?;
    if let Some(dir) = arguments.iter().position(|it| it == house::SERVE).and_then(|at| arguments.get(at + 1)) {
        return runtime.block_on(house::serve(dir.into()));
    }
    let size = |default: u64| arguments.iter().find_map(|it| it.parse().ok()).unwrap_or(default);
    runtime.block_on(async {
        match arguments.iter().find(|it| it.parse::<u64>().is_err()).map(String::as_str) {
            None => {
                streaming::in_small_transactions(50_000).await?;
                streaming::in_one_transaction(1_000_000).await?;
                snapshot::compare(5_000_000).await?;
                latency::measure(SECONDS).await
            }
            Some("streaming") => streaming::in_small_transactions(size(50_000)).await,
            Some("bulk") => streaming::in_one_transaction(size(1_000_000)).await,
            Some("snapshot") => snapshot::compare(size(5_000_000)).await,
            Some("latency") => latency::measure(size(SECONDS)).await,
            Some("debezium") => debezium::compare(size(1_000_000)).await,
            Some(other) => anyhow::bail!("no benchmark `{other}`: streaming, bulk, snapshot, latency, debezium"),
        }
    })
}
