//! The generator against pgbench's TPC-B-like script: same server, same number of connections, one after the other.
//!
//! `cargo bench --bench generator` with `LEDGERLINE_TEST_POSTGRES` (any server on which databases may be created) and `PGBENCH`
//! (the program). Both run `SECONDS` (10) seconds, in `ROUNDS` (3) turns, so that a machine that is busy with something else
//! is busy for both; the ratio is what counts. Each event of the generator and each script of pgbench is one transaction.

use std::{
    env,
    num::NonZeroU8,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use chrono::Utc;
use ledgerline::{
    bank::{self, Config, Goal, Ground, Rate, Stats, Wish},
    secret::Secret,
    stage,
};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio_util::sync::CancellationToken;

const CONNECTIONS: u8 = 8;

fn setting(name: &str, default: &str) -> String {
    env::var(name).unwrap_or_else(|_| default.to_owned())
}

#[tokio::main]
async fn main() -> Result<()> {
    let server = setting("LEDGERLINE_TEST_POSTGRES", "postgres://postgres@127.0.0.1:5432/postgres");
    let pgbench = setting("PGBENCH", "pgbench");
    let seconds: u64 = setting("SECONDS", "10").parse().context("SECONDS")?;
    let rounds: u32 = setting("ROUNDS", "3").parse().context("ROUNDS")?;
    let mut admin = PgConnection::connect(&server).await.context("LEDGERLINE_TEST_POSTGRES")?;
    let (ours, theirs) = (database(&mut admin, &server, "ledgerline_bench_bank").await?, database(&mut admin, &server, "ledgerline_bench_tpcb").await?);
    // As many branches as connections, at the least: below that pgbench's clients wait for each other's rows.
    let scale = (u32::from(CONNECTIONS) * 2).to_string();
    output(Command::new(&pgbench).args(["-i", "-q", "-s", &scale, &theirs]))?;
    bank::prepare(&Secret::new(&*ours), Ground::Ours).await?;

    let mut ratios = Vec::new();
    for round in 1..=rounds {
        let tpcb = tpcb(&pgbench, &theirs, seconds)?;
        let (events, payments) = generate(&ours, Duration::from_secs(seconds)).await?;
        ratios.push(events / tpcb);
        eprintln!("round {round}: pgbench {tpcb:.0} transactions/s, bank {events:.0} events/s ({payments:.0} payments/s), ratio {:.2}", events / tpcb);
    }
    ratios.sort_by(f64::total_cmp);
    eprintln!("median ratio {:.2} with {CONNECTIONS} connections", ratios[ratios.len() / 2]);
    for name in ["ledgerline_bench_bank", "ledgerline_bench_tpcb"] {
        sqlx::raw_sql(AssertSqlSafe(format!("drop database {name} with (force)"))).execute(&mut admin).await?;
    }
    Ok(())
}

async fn database(admin: &mut PgConnection, server: &str, name: &str) -> Result<String> {
    sqlx::raw_sql(AssertSqlSafe(format!("drop database if exists {name} with (force)"))).execute(&mut *admin).await?;
    sqlx::raw_sql(AssertSqlSafe(format!("create database {name}"))).execute(admin).await?;
    let mut url: url::Url = server.parse()?;
    url.set_path(name);
    Ok(url.into())
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().context("pgbench did not start: name it in PGBENCH")?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn tpcb(pgbench: &str, url: &str, seconds: u64) -> Result<f64> {
    let (clients, seconds) = (CONNECTIONS.to_string(), seconds.to_string());
    let report = output(Command::new(pgbench).args(["-M", "prepared", "-c", &clients, "-j", "2", "-T", &seconds, url]))?;
    let line = report.lines().find_map(|line| line.strip_prefix("tps = ")).context("pgbench reports tps")?;
    line.split(' ').next().context("a number")?.parse().context("a number")
}

/// Events and payments a second.
async fn generate(url: &str, time: Duration) -> Result<(f64, f64)> {
    let wish = Wish { rate: Rate::Unlimited, ..Wish::default() };
    let (mut handle, control) = stage::control(Stats::default(), wish, &CancellationToken::new());
    let config = Config { connections: NonZeroU8::new(CONNECTIONS).context("not zero")?, ..Config::default() };
    let bank = tokio::spawn(bank::run(Secret::new(url), config, Goal::Forever, Utc::now(), control));
    handle.stats.wait_for(|stats| stats.transactions > 0).await?;
    let (from, start) = (handle.stats.borrow().clone(), Instant::now());
    tokio::time::sleep(time).await;
    let (to, took) = (handle.stats.borrow().clone(), start.elapsed().as_secs_f64());
    handle.stop.cancel();
    bank.await??;
    let per_second = |from: u64, to: u64| f64::from(u32::try_from(to - from).unwrap_or(u32::MAX)) / took;
    Ok((per_second(from.events.total(), to.events.total()), per_second(from.transactions, to.transactions)))
}
