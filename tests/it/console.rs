//! The console's ways into a pipeline that really runs: looks over the socket, `attach` and leaving it, a terminal that dies.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use ledgerline::pipeline::{
    command::{Command as Order, Look, Reply, StageName},
    data_dir::socket_path,
    snapshot::Snapshot,
    socket::Client,
};
use tokio::sync::watch;

/// Far longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// Holds the terminal of a command: waits for the first text, then types the second, or lets the terminal die where it is empty.
const TERMINAL: &str = r"
import fcntl, os, pty, select, struct, sys, termios, time
wanted, typed, argv = sys.argv[1].encode(), sys.argv[2].encode(), sys.argv[3:]
pid, fd = pty.fork()
if pid == 0:
    os.execvp(argv[0], argv)
fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack('HHHH', 36, 120, 0, 0))
seen, limit = b'', time.time() + 240
def read():
    try:
        return os.read(fd, 65536) if select.select([fd], [], [], 0.2)[0] else b''
    except OSError:
        return None
while wanted not in seen and time.time() < limit:
    more = read()
    if more is None:
        break
    seen += more
if typed:
    os.write(fd, typed)
else:
    os.close(fd)
while time.time() < limit:
    if typed:
        read()
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        print('ended', os.waitstatus_to_exitcode(status), 'seen' if wanted in seen else 'not seen')
        break
    time.sleep(0.05)
else:
    os.kill(pid, 9)
";

/// A folder with a config of its own.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("dbt").display().to_string();
        std::fs::write(folder.path().join("config.toml"), format!("[dbt]\nproject_dir = {project:?}\n[dag]\nschedule = \"3s\"\n")).unwrap();
        Self { folder }
    }

    fn socket(&self) -> PathBuf {
        socket_path(&self.folder.path().canonicalize().unwrap().join(".ledgerline"))
    }

    /// What a command on a terminal ended with.
    fn on_a_terminal(&self, wanted: &str, typed: &str, arguments: &[&str]) -> String {
        let mut command = Command::new("python3");
        command.args(["-c", TERMINAL, wanted, typed, env!("CARGO_BIN_EXE_ledgerline")]).args(arguments);
        let output = command.current_dir(self.folder.path()).env("TERM", "xterm-256color").stdin(Stdio::null()).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned() + &String::from_utf8_lossy(&output.stderr)
    }

    /// Processes that name this folder.
    fn left_behind(&self) -> Vec<String> {
        let folder = self.folder.path().display().to_string();
        let commands = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|it| std::fs::read(it.path().join("cmdline")).ok());
        commands.map(|it| String::from_utf8_lossy(&it).replace('\0', " ")).filter(|it| it.contains(&folder)).collect()
    }
}

/// A pipeline without a console, ended as ^C would.
struct Daemon(Child);

impl Daemon {
    fn start(place: &Place) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ledgerline"));
        command.args(["run", "--no-tui"]).current_dir(place.folder.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }

    fn end(&mut self) -> Option<i32> {
        Command::new("kill").args(["-INT", &self.0.id().to_string()]).status().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        None
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            self.end();
        }
    }
}

async fn connected(place: &Place) -> Client {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(client) = Client::connect(&place.socket()).await {
            return client;
        }
        assert!(Instant::now() < deadline, "no pipeline on {}", place.socket().display());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn until(snapshots: &mut watch::Receiver<Arc<Snapshot>>, what: &str, holds: impl FnMut(&Arc<Snapshot>) -> bool) -> Arc<Snapshot> {
    let found = tokio::time::timeout(PATIENCE, snapshots.wait_for(holds)).await;
    Arc::clone(&found.unwrap_or_else(|_| panic!("waited in vain for {what}")).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_looks_into_a_running_pipeline_and_leaves_it_running() {
    let place = Place::new();
    let mut daemon = Daemon::start(&place);
    let (mut snapshots, _reading) = connected(&place).await.watch().await.unwrap();
    let landed = until(&mut snapshots, "a landed object", |it| it.lake.newest.iter().any(|it| it.table == "customers")).await;
    let mut client = connected(&place).await;
    let mut look = async |at: Look| -> Reply { client.ask(Order::Look { at }).await.unwrap() };

    let masked = look(Look::Messages { table: "customers".into(), revealed: false }).await;
    let text = masked.page.join("\n");
    assert!(masked.ok && text.contains("op: \"c\"") && text.contains("\"email\": \"•••\""), "{}: {text}", masked.text);
    let open = look(Look::Messages { table: "customers".into(), revealed: true }).await.page.join("\n");
    assert!(open.contains('@') && !open.contains("•••"), "{open}");
    assert!(!look(Look::Messages { table: "nobody".into(), revealed: false }).await.ok);

    let data = landed.lake.newest.iter().find(|it| it.table == "customers").unwrap().key.clone();
    let record = look(Look::CommitRecord { data }).await;
    assert!(record.ok && record.text == "proven", "{}: {:?}", record.text, record.page);
    assert!(!look(Look::CommitRecord { data: "raw/customers/none.parquet".into() }).await.ok);
    let proof = look(Look::Proof).await;
    assert!(proof.ok && proof.text.contains("no gap, no overlap") && proof.page.iter().any(|it| it.contains("proven to offset")), "{}", proof.text);

    let ran = until(&mut snapshots, "a run", |it| it.dag.dags.iter().flat_map(|it| &it.runs).any(|it| it.state.is_final())).await;
    let run = ran.dag.dags.iter().flat_map(|it| &it.runs).find(|it| it.state.is_final()).unwrap();
    let task_log = Look::TaskLog { dag_id: run.dag_id.clone(), run_id: run.run_id.clone(), task_id: run.tasks[0].task_id.clone() };
    let log = look(task_log).await;
    assert!(log.ok && log.page.iter().any(|it| it.starts_with("try 1 at")), "{}: {:?}", log.text, log.page);
    assert!(look(Look::Log).await.page.iter().any(|it| it.contains("pipeline: ") || it.contains("dag: ")));
    assert!(!look(Look::Sql { unique_id: "/etc/passwd".into() }).await.ok);

    // What works is not tried again, and says so.
    let refused = client.ask(Order::Restart { stage: StageName::Bank }).await.unwrap();
    assert!(!refused.ok && refused.text.contains("bank works"), "{}", refused.text);

    // The console on it, and leaving it: the pipeline goes on.
    let ended = tokio::task::block_in_place(|| place.on_a_terminal("quit", "qy", &["attach"]));
    assert_eq!(ended, "ended 0 seen");
    let ended = tokio::task::block_in_place(|| place.on_a_terminal("quit", "\u{3}\u{3}", &["attach"]));
    assert!(ended.starts_with("ended 130 seen"), "{ended}");
    let before = snapshots.borrow_and_update().at;
    until(&mut snapshots, "a later snapshot", |it| it.at > before).await;
    until(&mut snapshots, "KPIs", |it| it.refresh.kpis.is_some()).await;
    assert_eq!(tokio::task::block_in_place(|| daemon.end()), Some(130));

    // The next process finds what this one left, before any run of its own.
    let mut daemon = Daemon::start(&place);
    let (mut snapshots, _reading) = connected(&place).await.watch().await.unwrap();
    let found = until(&mut snapshots, "what was left", |it| it.refresh.earlier.is_some()).await;
    let earlier = found.refresh.earlier.clone().unwrap();
    assert!(earlier.kpis.is_some_and(|it| it.reading.cut.is_some()) && earlier.dbt.is_some_and(|it| it.tests.pass > 0), "{:?}", earlier.unread);
    assert_eq!(tokio::task::block_in_place(|| daemon.end()), Some(130));
}

#[test]
fn what_needs_a_terminal_and_a_filter_that_is_none_are_mistakes_of_usage() {
    let place = Place::new();
    let run = |arguments: &[&str], filter: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ledgerline"));
        let output = command.args(arguments).current_dir(place.folder.path()).env("LEDGERLINE_LOG", filter).stdin(Stdio::null()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = run(&["attach"], "");
    assert!(code == Some(2) && said.contains("needs a terminal"), "{code:?} {said}");
    for filter in ["ledgerline=lod", "debg"] {
        let (code, said) = run(&["config", "show"], filter);
        assert!(code == Some(2) && said.contains("LEDGERLINE_LOG"), "{code:?} {said}");
    }
}

#[test]
fn a_run_whose_terminal_dies_ends_in_order_and_leaves_nothing() {
    let place = Place::new();
    // 130 as after any hangup; what matters is that it is not a panic's 101, and that the services are gone with it.
    assert_eq!(place.on_a_terminal("quit", "", &["run"]), "ended 130 seen");
    assert_eq!(place.left_behind(), Vec::<String>::new());
    let logs = std::fs::read_dir(place.folder.path().join(".ledgerline/logs")).unwrap().flatten();
    let text: String = logs.filter_map(|it| std::fs::read_to_string(it.path()).ok()).collect();
    assert!(text.contains("ledgerline::pipeline: stopped"), "{text}");
}
