//! The whole binary, as a user runs it: from the first payment to the last KPI, under kill -9, and asked wrongly.

use std::{
    collections::BTreeSet,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use sqlx::{Connection as _, PgConnection};

/// Far longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// A folder with a config of its own, and the binary that works in it.
struct Bank {
    folder: tempfile::TempDir,
}

impl Bank {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("dbt");
        std::fs::write(folder.path().join("config.toml"), format!("[dbt]\nproject_dir = {:?}\n[dag]\nschedule = \"3s\"\n", project.display().to_string()))
            .expect("written");
        Self { folder }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ledgerline"));
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary runs")
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?} ended with {}:\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("one JSON document")
    }

    /// Runs `--once` and returns its summary.
    fn once(&self, transactions: &str) -> Value {
        let output = self.run(&["run", "--no-tui", "--once", "--transactions", transactions, "--summary", "summary.json"]);
        assert!(output.status.success(), "ended with {}:\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        self.summary()
    }

    fn summary(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.folder.path().join("summary.json")).expect("a summary")).expect("JSON")
    }

    /// Processes that have this folder in their command line or environment's working directory: what a run left behind.
    fn left_behind(&self) -> Vec<String> {
        let folder = self.folder.path().display().to_string();
        let mut left = Vec::new();
        for entry in std::fs::read_dir("/proc").expect("procfs").flatten() {
            let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            if command.contains(&folder) {
                left.push(command);
            }
        }
        left
    }
}

#[test]
fn one_payment_goes_all_the_way_and_the_next_run_continues() {
    let bank = Bank::new();
    let first = bank.once("150");
    assert_eq!(first["outcome"], "success");
    assert_eq!(first["reconcile"]["ok"], true, "{}", first["reconcile"]);
    assert_eq!(first["bank"]["transactions"], 150);
    assert_eq!(first["dbt"]["tests"]["fail"], 0);
    assert!(first["dbt"]["tests"]["pass"].as_u64() > Some(0));
    assert!(first["dags"].as_array().expect("runs").iter().all(|run| run["state"] == "success"), "{}", first["dags"]);
    assert_eq!(first["mails"].as_array().map(Vec::len), Some(2), "{}", first["mails"]);
    let days = first["kpis"]["transaction_amount_over_time"].as_array().map(Vec::len);
    assert!(matches!(days, Some(30 | 31)), "{days:?} days");

    let second = bank.once("50");
    assert_eq!(second["bank"]["transactions"], 200);
    assert_eq!(second["reconcile"]["ok"], true);
    assert_eq!(bank.json(&["kpi", "--json"])["kpis"], second["kpis"], "the command reads what the run printed");
    assert_eq!(bank.left_behind(), Vec::<String>::new());
}

#[test]
fn the_same_seed_makes_the_same_numbers() {
    let (one, two) = (Bank::new(), Bank::new());
    let (first, second) = (one.once("120"), two.once("120"));
    assert_eq!(first["kpis"], second["kpis"]);
}

/// The ten KPIs of the warehouse are those of SQL on the source, and every committed transaction is a fact exactly once.
async fn proof(bank: &Bank) {
    let mut services = Running::start(bank, &["services", "--json"]);
    let addresses: Value = serde_json::from_str(&services.first_line()).expect("one line of JSON");
    let source = addresses["source"].as_str().expect("an address");
    let on_source = ledgerline::kpi::on_source(&ledgerline::secret::Secret::new(source)).await.expect("the source answers");
    let warehouse = ledgerline::warehouse::postgres::Postgres::connect(&ledgerline::secret::Secret::new(addresses["warehouse"].as_str().expect("an address")))
        .await
        .expect("the warehouse answers");
    let on_warehouse = ledgerline::kpi::read(&warehouse).await.expect("the warehouse has numbers");
    assert_eq!(on_warehouse, on_source);

    let ids = async |url: &str, sql: &'static str| {
        let mut connection = PgConnection::connect(url).await.expect("answers");
        sqlx::query_scalar::<_, i64>(sql).fetch_all(&mut connection).await.expect("rows")
    };
    let committed = ids(source, "select id from public.transactions order by id").await;
    let facts =
        ids(addresses["warehouse"].as_str().expect("an address"), "select transaction_id from analytics.fct_transactions order by transaction_id").await;
    assert_eq!(facts, committed, "every committed transaction is a fact exactly once");

    let runs = "select count(*) from ledgerline.dag_run a join ledgerline.dag_run b on a.dag_id = b.dag_id and a.run_id < b.run_id
                and a.started_at < b.finished_at and b.started_at < a.finished_at";
    assert_eq!(ids(addresses["state"].as_str().expect("an address"), runs).await, [0], "no two runs of one DAG at once");
    services.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_at_any_moment_loses_nothing_and_doubles_nothing() {
    let rounds: u32 = std::env::var("LEDGERLINE_TEST_KILLS").ok().and_then(|it| it.parse().ok()).unwrap_or(3);
    let bank = Bank::new();
    // A different moment in each round, the same in each run of the test: from the preparation into the third DAG run.
    let moments = (0..rounds).map(|round| Duration::from_millis(1_500 + u64::from(round) * 7_919 % 11_000));
    for moment in moments {
        let mut pipeline = Running::start(&bank, &["run", "--no-tui", "--rate", "200"]);
        std::thread::sleep(moment);
        pipeline.kill_tree();
    }
    let output = bank.run(&["run", "--no-tui", "--for", "2s", "--rate", "200", "--summary", "summary.json"]);
    assert!(output.status.success(), "ended with {}:\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    assert_eq!(bank.summary()["reconcile"]["ok"], true, "{}", bank.summary()["reconcile"]);
    assert!(bank.run(&["reconcile"]).status.success());
    assert!(bank.run(&["lake", "verify"]).status.success());
    proof(&bank).await;

    let mails: Vec<String> = std::fs::read_dir(bank.folder.path().join(".ledgerline/mail"))
        .expect("mails were written")
        .flatten()
        .filter_map(|file| std::fs::read_to_string(file.path()).ok()?.lines().find(|line| line.starts_with("Message-ID:")).map(str::to_owned))
        .collect();
    assert_eq!(mails.iter().collect::<BTreeSet<_>>().len(), mails.len(), "no mail twice");
    assert_eq!(bank.left_behind(), Vec::<String>::new());
}

#[test]
fn ctrl_c_ends_it_with_130_and_leaves_nothing() {
    let bank = Bank::new();
    let mut pipeline = Running::start(&bank, &["run", "--no-tui"]);
    std::thread::sleep(Duration::from_secs(2));
    pipeline.signal("-INT");
    assert_eq!(pipeline.wait(), Some(130));
    assert_eq!(bank.left_behind(), Vec::<String>::new());
}

#[test]
fn a_data_dir_in_use_is_refused_with_its_owners_pid() {
    let bank = Bank::new();
    let mut services = Running::start(&bank, &["services", "--json"]);
    let printed = services.first_line();
    assert!(printed.starts_with("{\"schema\":1,"), "{printed}");
    let refused = bank.run(&["run", "--no-tui", "--once"]);
    assert_eq!(refused.status.code(), Some(3));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains(&format!("is in use by process {}", services.child.id())), "{said}");
    services.end();
}

#[test]
fn mistakes_are_told_with_their_remedy() {
    let bank = Bank::new();
    let said = |arguments: &[&str], code| {
        let output = bank.run(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(said(&["run", "--frobnicate"], 2).contains("unexpected argument"));
    assert!(said(&["dag", "runs", "nightly"], 2).contains("MinIO_S3_to_Snowflake"));
    assert!(said(&["--config", "missing.toml", "kpi"], 2).contains("missing.toml"));
    assert!(said(&["attach"], 3).contains("no pipeline runs"));
    assert!(said(&["--data-dir", "/proc/nowhere", "kpi"], 2).contains("--data-dir"));
    assert!(said(&["--profile", "moon", "kpi"], 2).contains("known: "));
}

/// A process of ours that is still running; ended when dropped, so that a failing test leaves none.
struct Running {
    child: Child,
}

impl Running {
    fn start(bank: &Bank, arguments: &[&str]) -> Self {
        let mut command = bank.command(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
        Self { child: command.spawn().expect("the binary runs") }
    }

    fn first_line(&mut self) -> String {
        use std::io::BufRead as _;
        let mut line = String::new();
        std::io::BufReader::new(self.child.stdout.as_mut().expect("piped")).read_line(&mut line).expect("a line");
        line
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
    }

    /// kill -9 of the process and of everything it has started, whatever group that is in.
    fn kill_tree(&mut self) {
        let mut tree = vec![self.child.id()];
        let mut next = 0;
        while next < tree.len() {
            let tasks = format!("/proc/{}/task", tree[next]);
            for task in std::fs::read_dir(tasks).into_iter().flatten().flatten() {
                let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
                tree.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
            }
            next += 1;
        }
        let pids: Vec<String> = tree.iter().map(u32::to_string).collect();
        // Some may be gone already.
        let _ = Command::new("kill").arg("-KILL").args(&pids).stderr(Stdio::null()).status();
        self.wait();
    }

    fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().expect("our child") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("did not end within {PATIENCE:?}");
    }

    fn end(&mut self) {
        self.signal("-INT");
        assert_eq!(self.wait(), Some(130));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill_tree();
        }
    }
}
