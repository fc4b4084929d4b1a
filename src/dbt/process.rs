//! The task that owns the dbt process: starts it when there is work, speaks with it, cancels, buries and replaces it.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStderr, ChildStdin, ChildStdout},
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    Config, Error, Invocation, NodeEvent, RunResults, Stats, Target,
    results::{Message, Refusal, RefusalKind},
    target::application_name,
};

/// The worker's program, written to the work dir at each start.
const PROGRAM: &str = include_str!("worker.py");

/// How long dbt may take to cancel its queries before it is killed. Milliseconds as a rule, seconds on a machine that is busy.
const CANCEL_MAX: Duration = Duration::from_secs(10);

/// How long the process may take to end once its stdin is closed. Longer than the worker gives dbt.
const FAREWELL_MAX: Duration = Duration::from_secs(6);

/// What is kept of stderr for the case that the worker dies.
const LAST_LINES_MAX: usize = 20;

/// One invocation, and where its events and results go.
pub(super) struct Ask {
    pub(super) invocation: Invocation,
    pub(super) events: mpsc::Sender<NodeEvent>,
    pub(super) cancel: CancellationToken,
    pub(super) reply: oneshot::Sender<Result<RunResults, Error>>,
}

/// Everything needed to start a worker process, checked once.
pub(super) struct Setup {
    python: PathBuf,
    project_dir: PathBuf,
    program: PathBuf,
    target_dir: PathBuf,
    target: Target,
    application: String,
    threads: usize,
}

impl Setup {
    pub(super) async fn prepare(python: &Path, config: &Config, target: Target, work_dir: &Path) -> Result<Self, Error> {
        let no_project = |_| Error::NoProject(config.project_dir.clone());
        let unusable = |source| Error::WorkDir { path: work_dir.to_owned(), source };
        let project_dir = tokio::fs::canonicalize(&config.project_dir).await.map_err(no_project)?;
        tokio::fs::metadata(project_dir.join("dbt_project.yml")).await.map_err(no_project)?;
        let target_dir = work_dir.join("target");
        tokio::fs::create_dir_all(&target_dir).await.map_err(unusable)?;
        let work_dir = tokio::fs::canonicalize(work_dir).await.map_err(unusable)?;
        let program = work_dir.join("worker.py");
        tokio::fs::write(&program, PROGRAM).await.map_err(unusable)?;
        Ok(Self {
            python: python.to_owned(),
            project_dir,
            program,
            target_dir: work_dir.join("target"),
            target,
            application: application_name(&work_dir),
            threads: config.threads.get(),
        })
    }

    fn spawn(&self) -> Result<Process, Error> {
        let mut child = tokio::process::Command::new(&self.python)
            // Isolated: neither PYTHONPATH nor a file beside the program can stand in for a module of dbt's.
            .arg("-I")
            .arg(&self.program)
            .arg(&self.project_dir)
            .arg(&self.target_dir)
            .envs(self.target.environment(&self.application, self.threads))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // ^C is for us; the worker ends when we close its stdin.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| Error::Start { python: self.python.clone(), source })?;
        let piped = "the pipe was asked for above";
        Ok(Process {
            stdin: child.stdin.take().expect(piped),
            lines: BufReader::new(child.stdout.take().expect(piped)).lines(),
            stderr: tokio::spawn(last_lines(child.stderr.take().expect(piped))),
            child,
            swept: false,
        })
    }
}

/// One running worker.
struct Process {
    child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    stderr: JoinHandle<String>,
    /// The queries of a predecessor have been ended.
    swept: bool,
}

async fn last_lines(stderr: ChildStderr) -> String {
    let mut lines = BufReader::new(stderr).lines();
    let mut kept = VecDeque::with_capacity(LAST_LINES_MAX);
    while let Ok(Some(line)) = lines.next_line().await {
        debug!(target: "ledgerline::dbt", "{line}");
        if kept.len() == LAST_LINES_MAX {
            kept.pop_front();
        }
        kept.push_back(line);
    }
    Vec::from(kept).join("\n")
}

impl Process {
    /// Cancel-safe. An error means that the process is of no further use.
    async fn next_message(&mut self) -> Result<Message, Error> {
        match self.lines.next_line().await {
            Ok(Some(line)) => serde_json::from_str(&line).map_err(Error::Protocol),
            // Nothing more can come: it has died, or is about to.
            Ok(None) | Err(_) => Err(self.epitaph().await),
        }
    }

    async fn tell(&mut self, request: &serde_json::Value) -> Result<(), Error> {
        let line = format!("{request}\n");
        match self.stdin.write_all(line.as_bytes()).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.epitaph().await),
        }
    }

    async fn epitaph(&mut self) -> Error {
        let status = match tokio::time::timeout(FAREWELL_MAX, self.child.wait()).await {
            Ok(Ok(status)) => status.to_string(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it closed its output and stayed".to_owned(),
        };
        // Grandchildren may hold stderr open; what was said until now must do then.
        let stderr = tokio::time::timeout(Duration::from_secs(1), &mut self.stderr).await;
        Error::Died { status, stderr: stderr.ok().and_then(Result::ok).unwrap_or_default() }
    }

    async fn kill(mut self) {
        // An error means that it is gone already.
        let _ = self.child.kill().await;
    }

    async fn end(mut self) {
        drop(self.stdin);
        if tokio::time::timeout(FAREWELL_MAX, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }
}

/// Serves asks one after the other until told to stop or nobody can ask any more.
pub(super) async fn run(setup: Setup, mut asks: mpsc::Receiver<Ask>, stats: watch::Sender<Stats>, stop: CancellationToken) {
    let mut room = Room { setup, process: None, asked: 0, stats, stop: stop.clone() };
    // Parsed ahead of the first invocation. If it cannot start, the first invocation says so.
    if let Err(error) = room.process() {
        warn!(error = %error, "dbt did not start");
    }
    loop {
        tokio::select! { biased;
            () = stop.cancelled() => break,
            ask = asks.recv() => match ask {
                Some(ask) => room.serve(ask).await,
                None => break,
            },
            () = room.listen() => {}
        }
    }
    if let Some(process) = room.process.take() {
        process.end().await;
    }
}

struct Room {
    setup: Setup,
    process: Option<Process>,
    asked: u64,
    stats: watch::Sender<Stats>,
    stop: CancellationToken,
}

/// Why a running invocation is being ended.
enum Ending {
    Cancelled,
    TimedOut(Duration),
}

impl Room {
    fn process(&mut self) -> Result<&mut Process, Error> {
        if self.process.is_none() {
            let process = self.process.insert(self.setup.spawn()?);
            let pid = process.child.id();
            self.stats.send_modify(|it| (it.pid, it.starts) = (pid, it.starts + 1));
        }
        Ok(self.process.as_mut().expect("it was started just now"))
    }

    /// Between invocations: hears that the project is parsed, or that the process has died. Cancel-safe.
    async fn listen(&mut self) {
        let Some(process) = self.process.as_mut() else {
            return std::future::pending().await;
        };
        match process.next_message().await {
            Ok(message) => self.note(message),
            Err(error) => {
                warn!(error = %error, "the dbt worker is started again by the next run");
                self.bury();
            }
        }
    }

    fn note(&self, message: Message) {
        if let Message::Ready { nodes } = message {
            debug!(nodes = nodes.len(), "dbt has parsed the project");
            self.stats.send_modify(|it| (it.ready, it.nodes) = (true, nodes.into()));
        }
    }

    fn bury(&mut self) {
        self.process = None;
        self.stats.send_modify(|it| (it.ready, it.pid) = (false, None));
    }

    async fn serve(&mut self, mut ask: Ask) {
        let outcome = self.converse(&mut ask).await;
        if matches!(outcome, Err(Error::Died { .. } | Error::Protocol(_) | Error::Sweep(_))) {
            self.bury();
        }
        self.stats.send_modify(|it| it.invocations += 1);
        // The asker may have gone; that was taken for a cancellation.
        let _ = ask.reply.send(outcome);
    }

    async fn converse(&mut self, ask: &mut Ask) -> Result<RunResults, Error> {
        let began = Instant::now();
        let stop = self.stop.clone();
        self.asked += 1;
        let id = self.asked;
        self.process()?;
        self.sweep().await?;
        let Invocation { command, select, vars, timeout, tag } = &ask.invocation;
        // Tests are chosen by their own tags, not by those of the models they read.
        let args: &[&str] = if *command == super::Command::Test { &["--indirect-selection", "empty"] } else { &[] };
        let request = serde_json::json!({"id": id, "command": command, "select": select, "args": args, "vars": vars, "tag": tag});
        self.process()?.tell(&request).await?;

        let mut ending: Option<Ending> = None;
        let mut kill_at: Option<Instant> = None;
        let time_up = timeout.map(|timeout| began + timeout);
        loop {
            let process = self.process()?;
            let message = tokio::select! { biased;
                () = stop.cancelled(), if ending.is_none() => Err(Ending::Cancelled),
                () = ask.cancel.cancelled(), if ending.is_none() => Err(Ending::Cancelled),
                () = ask.reply.closed(), if ending.is_none() => Err(Ending::Cancelled),
                () = until(time_up), if ending.is_none() => Err(Ending::TimedOut(timeout.unwrap_or_default())),
                () = until(kill_at) => {
                    self.kill(id).await;
                    return Err(ending.map_or(Error::Cancelled, Ending::into_error));
                }
                message = process.next_message() => Ok(message?),
            };
            match message {
                Err(why) => {
                    self.process()?.tell(&serde_json::json!({ "cancel": id })).await?;
                    (ending, kill_at) = (Some(why), Some(Instant::now() + CANCEL_MAX));
                }
                Ok(Message::Node { id: of, node }) if of == id => {
                    // A full channel costs a live event, never a result.
                    let _ = ask.events.try_send(node);
                }
                Ok(Message::Done { id: of, nodes, error }) if of == id => {
                    return match (error, ending) {
                        (None, _) => Ok(RunResults { nodes, took: began.elapsed() }),
                        (Some(_), Some(ending)) => Err(ending.into_error()),
                        (Some(refusal), None) => Err(refusal.into_error()),
                    };
                }
                Ok(message) => self.note(message),
            }
        }
    }

    /// Before the first invocation of a new process: ends what its predecessor may have left running.
    async fn sweep(&mut self) -> Result<(), Error> {
        let (target, application) = (self.setup.target.clone(), self.setup.application.clone());
        let process = self.process()?;
        if !process.swept {
            target.end_queries_of(&application).await.map_err(Error::Sweep)?;
            process.swept = true;
        }
        Ok(())
    }

    async fn kill(&mut self, id: u64) {
        info!(id, "dbt did not let itself be cancelled; killing it");
        if let Some(process) = self.process.take() {
            process.kill().await;
        }
        self.bury();
        if let Err(error) = self.setup.target.end_queries_of(&self.setup.application).await {
            warn!(error = %error, "queries of the killed dbt run may go on; the next run ends them first");
        }
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

impl Ending {
    fn into_error(self) -> Error {
        match self {
            Self::Cancelled => Error::Cancelled,
            Self::TimedOut(timeout) => Error::TimedOut(timeout),
        }
    }
}

impl Refusal {
    fn into_error(self) -> Error {
        match self.kind {
            RefusalKind::Project => Error::Project(self.message),
            RefusalKind::Warehouse => Error::Warehouse(self.message),
            RefusalKind::Dbt => Error::Refused(self.message),
            RefusalKind::Cancelled => Error::Cancelled,
        }
    }
}
