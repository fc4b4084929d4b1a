//! What the measurements stand on: a database, a broker in a process of its own, an engine, and meters.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use ledgerline::{
    cdc::{self, Config, Stats},
    embedded::kafka,
    secret::Secret,
    stage::{self, Handle, Phase},
    stream,
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// The argument that makes this program the broker.
pub(crate) const SERVE: &str = "serve-broker";
/// Longer than any measurement, so that one that hangs ends.
const PATIENCE: Duration = Duration::from_secs(1200);

fn server() -> String {
    std::env::var("LEDGERLINE_TEST_POSTGRES").unwrap_or_else(|_| "postgres://postgres@127.0.0.1:5432/postgres".to_owned())
}

/// A database of its own, which also holds the capture's state.
pub(crate) struct Database {
    name: &'static str,
    pub(crate) url: Secret,
    admin: PgConnection,
    pub(crate) source: PgConnection,
}

impl Database {
    pub(crate) async fn create(name: &'static str, schema: &str) -> anyhow::Result<Self> {
        Self::on(&server(), name, schema).await
    }

    pub(crate) async fn on(server: &str, name: &'static str, schema: &str) -> anyhow::Result<Self> {
        let mut admin = PgConnection::connect(server).await?;
        forget(&mut admin, name).await?;
        run(&mut admin, format!("create database {name}")).await?;
        let mut url = url::Url::parse(server)?;
        url.set_path(name);
        let url = Secret::new(url);
        let mut source = PgConnection::connect(url.reveal()).await?;
        run(&mut source, schema.to_owned()).await?;
        Ok(Self { name, url, admin, source })
    }

    pub(crate) async fn run(&mut self, sql: &str) -> anyhow::Result<()> {
        run(&mut self.source, sql.to_owned()).await
    }

    /// Native, with a slot and topics of this database's name.
    pub(crate) fn config(&self, tables: &[&str]) -> Config {
        let tables = tables.iter().map(|it| format!("public.{it}")).collect();
        let name = self.name.to_owned();
        Config { tables, slot: name.clone(), publication: name.clone(), topic_prefix: name, ..Config::default() }
    }

    pub(crate) async fn remove(mut self) -> anyhow::Result<()> {
        self.source.close().await?;
        forget(&mut self.admin, self.name).await
    }
}

async fn run(connection: &mut PgConnection, sql: String) -> anyhow::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await?;
    Ok(())
}

async fn forget(admin: &mut PgConnection, name: &str) -> anyhow::Result<()> {
    // A walsender takes a moment to notice that its reader has left.
    let left = format!(
        "do $$ begin while exists (select from pg_replication_slots where database = '{name}' and active) loop perform pg_sleep(0.05); end loop; end $$"
    );
    run(admin, left).await?;
    run(admin, format!("select pg_drop_replication_slot(slot_name) from pg_replication_slots where database = '{name}'")).await?;
    run(admin, format!("drop database if exists {name} with (force)")).await
}

/// The embedded broker in another process; it ends with this one.
pub(crate) struct Broker {
    child: Child,
    pub(crate) address: String,
    _dir: TempDir,
}

impl Broker {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut child = Command::new(std::env::current_exe()?).arg(SERVE).arg(dir.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut address = String::new();
        let said = child.stdout.take().map(BufReader::new).map(|mut it| it.read_line(&mut address)).transpose()?;
        anyhow::ensure!(said.is_some_and(|it| it > 0), "the broker did not start");
        Ok(Self { child, address: address.trim().to_owned(), _dir: dir })
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Is the broker until stdin ends.
pub(crate) async fn serve(dir: PathBuf) -> anyhow::Result<()> {
    let broker = kafka::Broker::start(kafka::Config { dir, ..kafka::Config::default() }).await?;
    println!("{}", broker.address());
    tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink())).await??;
    broker.stop().await;
    Ok(())
}

pub(crate) struct Engine {
    pub(crate) handle: Handle<Stats>,
    task: JoinHandle<Result<(), cdc::Error>>,
}

impl Engine {
    pub(crate) fn start(database: &Database, bootstrap_servers: &str, config: Config) -> Self {
        let (handle, control) = stage::control(Stats::default(), Phase::Running, &CancellationToken::new());
        let url = database.url.clone();
        let task = tokio::spawn(cdc::run(url.clone(), url, bootstrap_servers.to_owned(), stream::Config::default(), config, control));
        Self { handle, task }
    }

    pub(crate) async fn until(&self, reached: impl FnMut(&Stats) -> bool) -> anyhow::Result<Stats> {
        let mut stats = self.handle.stats.clone();
        Ok(tokio::time::timeout(PATIENCE, stats.wait_for(reached)).await??.clone())
    }

    /// An engine that ended by itself says why when it is stopped.
    pub(crate) fn still_runs(&self) -> anyhow::Result<()> {
        let stats = self.handle.stats.borrow();
        anyhow::ensure!(!self.task.is_finished(), "the engine ended while it was {:?}: {:?}", stats.step, stats.waiting_for);
        Ok(())
    }

    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        self.handle.stop.cancel();
        Ok(self.task.await??)
    }
}

pub(crate) fn per_second(rows: u64, took: Duration) -> f64 {
    as_f64(rows) / took.as_secs_f64()
}

pub(crate) fn micros_a_row(took: Duration, rows: u64) -> f64 {
    took.as_secs_f64() * 1e6 / as_f64(rows)
}

fn as_f64(count: u64) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

/// User and system time, of threads that ended too.
pub(crate) fn process_cpu() -> anyhow::Result<Duration> {
    /// `USER_HZ`, the same on every Linux.
    const TICKS_A_SECOND: u64 = 100;
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // Behind the name, which may hold anything, in parentheses; utime and stime are the 14th and 15th fields.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|it| it.parse::<u64>().ok()).unwrap_or(0);
    Ok(Duration::from_millis((ticks(11) + ticks(12)) * 1000 / TICKS_A_SECOND))
}

/// User and system time of the threads that live, by their names.
pub(crate) fn cpu_by_thread() -> BTreeMap<String, Duration> {
    let mut sums = BTreeMap::<String, Duration>::new();
    for thread in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let read = |file: &str| std::fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        // The first number is the time on a CPU, in nanoseconds.
        let nanos = read("schedstat").split_whitespace().next().and_then(|it| it.parse().ok()).unwrap_or(0);
        *sums.entry(read("comm").trim().to_owned()).or_default() += Duration::from_nanos(nanos);
    }
    sums
}

/// What each thread took since `before`, and all of them.
pub(crate) fn cpu_since(before: &BTreeMap<String, Duration>) -> (Duration, BTreeMap<String, Duration>) {
    let mut cpu = cpu_by_thread();
    cpu.iter_mut().for_each(|(name, it)| *it = it.saturating_sub(before.get(name).copied().unwrap_or_default()));
    cpu.retain(|_, it| *it > Duration::from_millis(1));
    (cpu.values().sum(), cpu)
}

pub(crate) fn shown_by_thread(cpu: &BTreeMap<String, Duration>, rows: u64) -> String {
    let by_thread: Vec<String> = cpu.iter().map(|(name, took)| format!("{name} {:.2}", micros_a_row(*took, rows))).collect();
    by_thread.join(" · ")
}

/// Of this process since [`forget_peak_memory`].
pub(crate) fn peak_memory_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|it| it.strip_prefix("VmHWM:"));
    line.and_then(|it| it.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

pub(crate) fn forget_peak_memory() -> anyhow::Result<()> {
    Ok(std::fs::write("/proc/self/clear_refs", "5")?)
}
