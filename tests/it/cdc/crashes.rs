//! The capture in a process of its own, killed without warning at moments that a seed chooses; and PostgreSQL killed under it.

use std::{
    collections::{BTreeSet, HashMap},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use ledgerline::{
    cdc::{self, Config, Stats, Step},
    embedded::{Progress, postgres, python::Venv},
    secret::Secret,
    stage::{self, Phase},
    stream::{self, topics::Topics},
};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    days::{PAYMENTS, finish, held, parsed, replayed, write_payments},
    house::{Capture, Database, PATIENCE, Read, Reader, config},
    networks::until_read,
};
use crate::lane::Stream;

const SOURCE: &str = "LEDGERLINE_TEST_CAPTURE_SOURCE";
const BROKER: &str = "LEDGERLINE_TEST_CAPTURE_BROKER";
const CONFIG: &str = "LEDGERLINE_TEST_CAPTURE_CONFIG";
const BEGUN: &str = "the capture has begun";

/// Not a test by itself: this very binary, started once more by [`Process::start`], is the capture.
#[test]
fn a_capture_in_a_process_of_its_own() {
    let Ok(source) = std::env::var(SOURCE) else { return };
    let source = Secret::new(source);
    let (broker, config) = (std::env::var(BROKER).expect("an address"), std::env::var(CONFIG).expect("settings"));
    let config: Config = serde_json::from_str(&config).expect("settings");
    std::thread::spawn(|| {
        // Until the test that started us lets go, or is gone itself.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::abort();
    });
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let ended = runtime.block_on(async {
        let (handle, control) = stage::control(Stats::default(), Phase::Running, &CancellationToken::new());
        println!("\n{BEGUN}");
        tokio::spawn(tell(handle.stats));
        cdc::run(source.clone(), source, broker, stream::Config::default(), config, control).await
    });
    ended.expect("it runs until it is killed");
}

/// Says what the capture waits for, one line for each.
async fn tell(mut stats: watch::Receiver<Stats>) {
    let mut told = None;
    while stats.changed().await.is_ok() {
        let waiting_for = stats.borrow_and_update().waiting_for.clone();
        if let Some(waiting_for) = waiting_for.filter(|it| told.as_ref() != Some(it)) {
            // Nobody may listen.
            let _ = writeln!(std::io::stdout(), "{waiting_for}");
            told = Some(waiting_for);
        }
    }
}

pub(super) struct Process {
    child: Child,
    /// What it said that it waits for.
    #[cfg_attr(not(feature = "stack"), expect(dead_code, reason = "only what the real broker refuses is told so"))]
    lines: mpsc::Receiver<String>,
}

impl Process {
    fn start(database: &Database, broker: &str, config: &Config) -> Self {
        Self::start_with(database, broker, config, &[])
    }

    pub(super) fn start_with(database: &Database, broker: &str, config: &Config, environment: &[(&str, String)]) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        command.args(["--exact", "cdc::crashes::a_capture_in_a_process_of_its_own", "--nocapture"]);
        command.env(SOURCE, database.url.reveal()).env(BROKER, broker).env(CONFIG, serde_json::to_string(config).expect("JSON"));
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
        let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        assert!(lines.any(|line| line.is_ok_and(|it| it == BEGUN)), "it begins");
        let (told, heard) = mpsc::channel();
        // Ends with the process.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(told.send(line))));
        Self { child, lines: heard }
    }

    /// Waits until it says that it waits for something with this in it.
    #[cfg(feature = "stack")]
    pub(super) fn until_told(&self, what: &str) -> String {
        use std::time::Instant;

        let (until, mut told) = (Instant::now() + PATIENCE, Vec::new());
        while let Ok(line) = self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            if line.contains(what) {
                return line;
            }
            told.push(line);
        }
        panic!("{what} is not told: {told:?}")
    }

    pub(super) fn kill(mut self) {
        assert!(self.child.try_wait().expect("a child of ours").is_none(), "it ended before it was killed");
        self.child.kill().expect("killed");
        self.child.wait().expect("a child of ours");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where a topic ends; 0 while nobody has made it, or leads it.
async fn end_of(asking: &Topics, topic: &str) -> i64 {
    if !asking.partitions().await.expect("the broker answers").iter().any(|(name, _)| name == topic) {
        return 0;
    }
    asking.watermarks([topic.to_owned()].into()).await.unwrap_or_default().iter().map(|(_, it)| it.end).sum()
}

pub(super) async fn until_end(asking: &Topics, topic: &str, wanted: i64) {
    let reached = async {
        while end_of(asking, topic).await < wanted {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("{topic} never reaches {wanted}"));
}

/// Every commit's END, however often it was told, says the same, and what it owes is there. How many events that is.
fn owed(boundaries: &[Read]) -> u64 {
    let mut told: HashMap<String, &str> = HashMap::new();
    for record in boundaries {
        let (key, value) = (record.key.as_deref().expect("a key"), record.value.as_deref().expect("a value"));
        let kind = if value.contains("BEGIN") { "BEGIN" } else { "END" };
        assert_eq!(*told.entry(format!("{kind} {key}")).or_insert(value), value, "a repeated boundary differs");
    }
    told.values().filter_map(|it| serde_json::from_str::<Value>(it).expect("JSON")["event_count"].as_u64()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_killed_in_its_snapshot_in_large_transactions_and_under_load_repeats_equal_bytes_and_loses_nothing() {
    const OLD_ROWS: i64 = 20_000;
    let rounds: i64 = std::env::var("LEDGERLINE_TEST_CRASHES").ok().and_then(|it| it.parse().ok()).unwrap_or(4);
    let seed: u64 = std::env::var("LEDGERLINE_TEST_SEED").ok().and_then(|it| it.parse().ok()).unwrap_or(7);
    println!("LEDGERLINE_TEST_SEED={seed} LEDGERLINE_TEST_CRASHES={rounds}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut below = move |limit: i64| random.random_range(1..=limit);
    let database = Database::create("crashed").await;
    database.run(PAYMENTS).await;
    database.run(&format!("insert into payments select id, 7.00, repeat('x', 200) from generate_series(5000001, {}) id;", 5_000_000 + OLD_ROWS)).await;
    let stream = Stream::own().await;
    let config = Config { topic_prefix: stream.prefix.clone(), ..config(&database) };
    let (topic, boundaries) = (format!("{}.public.payments", stream.prefix), format!("{}.transaction", stream.prefix));
    let asking = Topics::connect(&stream.address).expect("a client");
    let start = || Process::start(&database, &stream.address, &config);

    // Somewhere in the snapshot.
    let mut n_unfinished = 0;
    for _ in 0..2 {
        let process = start();
        let end = end_of(&asking, &topic).await;
        until_end(&asking, &topic, end + below(OLD_ROWS / 4)).await;
        process.kill();
        n_unfinished += i64::from(cdc::snapshot_ends(&database.url, &stream.prefix).await.expect("asked").is_none());
    }
    let process = start();
    until_read(&database, &config).await;
    process.kill();
    println!("{n_unfinished} of 2 kills met the snapshot");

    // Under load, and within transactions of many rows.
    for round in 0..rounds {
        let first_id = 1 + round * 200;
        let writer = write_payments(database.url.clone(), first_id..first_id + 200);
        let process = start();
        let many = 6_000_001 + round * 10_000;
        database.run(&format!("insert into payments select id, 1.00, 'many' from generate_series({many}, {}) id;", many + 8_000)).await;
        let end = end_of(&asking, &topic).await;
        until_end(&asking, &topic, end + below(6_000)).await;
        process.kill();
        finish(writer).await;
    }

    let capture = Capture::start(&database, stream.address.clone(), config);
    capture.drain(&database).await;
    let mut reader = Reader::start(&stream.address);
    // Rows that a snapshot read before it was cut short may come again; what the stream tells of is never among them.
    let (reads, changes): (Vec<Read>, Vec<Read>) = reader.read(&topic).into_iter().partition(|it| parsed(it).is_some_and(|event| event["op"] == "r"));
    let read: BTreeSet<i64> = reads.iter().filter_map(parsed).filter_map(|it| it["after"]["id"].as_i64()).collect();
    assert_eq!(read, (5_000_001..=5_000_000 + OLD_ROWS).collect());
    let (rows, n_changes) = replayed(&changes);
    let mut source = held(&database).await;
    source.retain(|id, _| !read.contains(id));
    assert_eq!(rows, source);
    assert_eq!(owed(&reader.read(&boundaries)), u64::try_from(n_changes).expect("few"));
    assert!(changes.iter().filter(|it| it.value.is_some()).count() > n_changes, "a kill repeats something");
    capture.stop().await;
}

/// A server of a test's own, which it may kill.
pub(super) async fn own_server() -> (tempfile::TempDir, postgres::Server) {
    let dir = tempfile::tempdir().expect("a directory");
    // Others may pass through, as the server is not root's.
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("ours");
    let server = postgres::Server::start(server_config(dir.path()).await, &Progress::silent()).await.expect("a server");
    (dir, server)
}

/// To start it once more.
pub(super) async fn server_config(dir: &Path) -> postgres::Config {
    let venv = Venv::ensure(&Progress::silent()).await.expect("PostgreSQL's binaries");
    postgres::Config { bin: venv.postgres_bin().to_owned(), dir: dir.join("postgres"), databases: Vec::new(), ..postgres::Config::default() }
}

/// Commits rows until stopped; a commit that breaks may or may not have taken place, as the table will tell.
pub(super) async fn write_on(url: Secret, stop: CancellationToken) {
    use sqlx::Connection as _;
    let mut first_id = 1;
    while !stop.is_cancelled() {
        let Ok(mut connection) = PgConnection::connect(url.reveal()).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        while !stop.is_cancelled() {
            let last_id = first_id + if first_id % 7 == 0 { 2_000 } else { 20 };
            let statement = format!("insert into payments select id, 1.00, 'new' from generate_series({first_id}, {last_id}) id");
            first_id = last_id + 1;
            if sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await.is_err() {
                break;
            }
            // Not as fast as it can: the capture is to be somewhere in it.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgresql_killed_with_all_its_processes_recovers_and_the_stream_goes_on_without_a_gap() {
    let (_dir, server) = own_server().await;
    let database = Database::create_on(server.url("postgres").reveal(), "recovered").await;
    database.run(PAYMENTS).await;
    let stream = Stream::own().await;
    let config = Config { topic_prefix: stream.prefix.clone(), ..config(&database) };
    let capture = Capture::start(&database, stream.address.clone(), config);
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    let stop = CancellationToken::new();
    let writing = tokio::spawn(write_on(database.url.clone(), stop.clone()));
    for _ in 0..2 {
        let before = capture.handle.stats.borrow().transactions;
        let reconnects = capture.until("transactions", |it| it.step == Step::Streaming && it.transactions > before + 20).await.reconnects;
        let postmaster = server.pid();
        kill_process(Pid::from_raw(postmaster.cast_signed()).expect("a process"), Signal::KILL).expect("killed");
        while server.pid() == postmaster {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        capture.until("streaming again", |it| it.step == Step::Streaming && it.reconnects > reconnects).await;
    }
    stop.cancel();
    writing.await.expect("the writer ends well");
    let stats = capture.drain(&database).await;
    assert_eq!(stats.dead_letters, 0);
    let (rows, _) = replayed(&Reader::start(&stream.address).read(&format!("{}.public.payments", stream.prefix)));
    assert!(!rows.is_empty());
    assert_eq!(rows, held(&database).await);
    capture.stop().await;
    drop(database);
    server.stop().await;
}
