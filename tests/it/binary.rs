//! The whole binary, as a user runs it: a folder with a config of its own, and the processes that work in it.

use std::{
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use sqlx::{Connection as _, PgConnection};

use crate::lane::{Ground, stack};

/// Far longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A folder with a config of its own, and the binary that works in it.
pub(crate) struct Bank {
    folder: PathBuf,
    /// None: somebody else made it, and sweeps it.
    _swept: Option<tempfile::TempDir>,
    /// None: it is on the embedded services.
    ground: Option<Ground>,
}

impl Bank {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        // PostgreSQL of root runs as nobody: its cluster stays in the data dir where nobody may pass through.
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o711)).expect("ours");
        let bank = Self { folder: folder.path().to_owned(), _swept: Some(folder), ground: None };
        bank.configure("");
        bank
    }

    /// On the servers of this run: with `--features stack` the real ones.
    pub(crate) fn on_servers() -> Self {
        Self { ground: stack().map(Ground::open), ..Self::new() }
    }

    /// On all of them at once: Debezium, Kafka, MinIO, the Snowflake double, the mail server.
    #[cfg(feature = "stack")]
    pub(crate) fn on_the_whole_stack() -> Self {
        Self { ground: stack().map(Ground::whole), ..Self::new() }
    }

    pub(crate) fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), _swept: None, ground: None }
    }

    /// Writes `config.toml` anew, with more than what every test needs.
    pub(crate) fn configure(&self, more: &str) {
        let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("dbt");
        let text = format!("{more}\n[dbt]\nproject_dir = {:?}\n[dag]\nschedule = \"3s\"\n", project.display().to_string());
        std::fs::write(self.path("config.toml"), text).expect("written");
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ledgerline"));
        command.args(arguments).current_dir(&self.folder).stdin(Stdio::null());
        // Nothing of the shell's own: it may have been told about other servers.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("LEDGERLINE__")) {
            command.env_remove(name);
        }
        command.envs(self.ground.iter().flat_map(|it| &it.environment).map(|(name, value)| (format!("LEDGERLINE__{name}"), value)));
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary runs")
    }

    /// What a command that ends with `code` says on stderr.
    pub(crate) fn refusal(&self, arguments: &[&str], code: i32) -> String {
        said_with(&self.run(arguments), code, arguments)
    }

    /// Runs a command that must succeed.
    pub(crate) fn succeeds(&self, arguments: &[&str]) {
        self.refusal(arguments, 0);
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(arguments);
        said_with(&output, 0, arguments);
        serde_json::from_slice(&output.stdout).expect("one JSON document")
    }

    /// Runs `--once` and returns its summary.
    pub(crate) fn once(&self, transactions: &str) -> Value {
        self.succeeds(&["run", "--no-tui", "--once", "--transactions", transactions, "--summary", "summary.json"]);
        self.summary()
    }

    pub(crate) fn summary(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.path("summary.json")).expect("a summary")).expect("JSON")
    }

    /// Processes that name this folder or stand in it: what a run left behind.
    pub(crate) fn left_behind(&self) -> Vec<String> {
        let folder = self.folder.display().to_string();
        let mut left = Vec::new();
        for entry in std::fs::read_dir("/proc").expect("procfs").flatten() {
            let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let stands_here = std::fs::read_link(entry.path().join("cwd")).is_ok_and(|it| it.starts_with(&self.folder));
            if command.contains(&folder) || stands_here {
                left.push(format!("{} {command}", entry.file_name().display()));
            }
        }
        left
    }
}

/// The ten KPIs of the warehouse are those of SQL on the source, and every committed transaction is a fact exactly once.
pub(crate) async fn proof(bank: &Bank) {
    let mut services = Running::start(bank, &["services", "--json"]);
    let addresses: Value = serde_json::from_str(&services.first_line()).expect("one line of JSON");
    let source = addresses["source"].as_str().expect("an address");
    let on_source = ledgerline::kpi::on_source(&ledgerline::secret::Secret::new(source)).await.expect("the source answers");
    let warehouse = ledgerline::warehouse::Warehouse::connect(&ledgerline::secret::Secret::new(addresses["warehouse"].as_str().expect("an address")).into())
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
                and a.start_date < b.end_date and b.start_date < a.end_date";
    assert_eq!(ids(addresses["state"].as_str().expect("an address"), runs).await, [0], "no two runs of one DAG at once");
    services.end();
}

/// What a command said on stderr; it must have ended with `code`.
pub(crate) fn said_with(output: &Output, code: i32, what: &[&str]) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{what:?} ended with {}:\n{said}", output.status);
    said
}

/// A process of ours that is still running; ended when dropped, so that a failing test leaves none.
pub(crate) struct Running {
    child: Child,
    stderr: PathBuf,
}

impl Running {
    pub(crate) fn start(bank: &Bank, arguments: &[&str]) -> Self {
        Self::of(bank, bank.command(arguments))
    }

    pub(crate) fn of(bank: &Bank, mut command: Command) -> Self {
        let stderr = bank.path("stderr.log");
        let file = std::fs::File::create(&stderr).expect("a file for what it says");
        command.stdout(Stdio::piped()).stderr(file).process_group(0);
        Self { child: command.spawn().expect("the binary runs"), stderr }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has said on stderr.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.stderr).expect("a file")).into_owned()
    }

    /// Waits until a line has all these words, and returns it.
    pub(crate) fn until_said(&mut self, words: &[&str]) -> String {
        self.until(&format!("{words:?}"), |it| {
            let said = it.said();
            said.lines().find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned)
        })
    }

    /// Waits until `found` finds something; it must not have ended before.
    pub(crate) fn until<T>(&mut self, what: &str, found: impl Fn(&Self) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Asked before looking: what it said last is seen even if it has ended.
            let ended = self.child.try_wait().expect("our child");
            if let Some(found) = found(self) {
                return found;
            }
            assert!(ended.is_none(), "ended with {ended:?} before {what}:\n{}", self.said());
            assert!(Instant::now() < deadline, "no {what} within {PATIENCE:?}:\n{}", self.said());
            std::thread::sleep(LOOK_EVERY);
        }
    }

    pub(crate) fn first_line(&mut self) -> String {
        use std::io::BufRead as _;
        let mut line = String::new();
        std::io::BufReader::new(self.child.stdout.as_mut().expect("piped")).read_line(&mut line).expect("a line");
        line
    }

    pub(crate) fn signal(&self, signal: &str) {
        kill(signal, self.child.id());
    }

    /// It and everything it has started, whatever group that is in.
    pub(crate) fn tree(&self) -> Vec<u32> {
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
        tree
    }

    /// kill -9 of the whole tree.
    pub(crate) fn kill_tree(&mut self) {
        let pids: Vec<String> = self.tree().iter().map(u32::to_string).collect();
        // Some may be gone already.
        let _ = Command::new("kill").arg("-KILL").args(&pids).stderr(Stdio::null()).status();
        self.wait();
    }

    /// Its exit code; None if a signal ended it.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().expect("our child") {
                return status.code();
            }
            std::thread::sleep(LOOK_EVERY);
        }
        panic!("did not end within {PATIENCE:?}:\n{}", self.said());
    }

    pub(crate) fn ends_with(&mut self, code: i32) {
        let ended = self.wait();
        assert_eq!(ended, Some(code), "it said:\n{}", self.said());
    }

    pub(crate) fn end(&mut self) {
        self.signal("-INT");
        self.ends_with(130);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill_tree();
        }
    }
}

/// Sends a signal to a process that must be there.
pub(crate) fn kill(signal: &str, pid: u32) {
    let sent = Command::new("kill").args([signal, &pid.to_string()]).status();
    assert!(sent.expect("kill runs").success(), "no process {pid}");
}
