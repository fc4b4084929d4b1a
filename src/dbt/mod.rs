//! Runs the dbt project: an invocation in, each node's state while it runs, typed results out. Knows no SQL of the bank's.
//!
//! dbt needs seconds to import and to parse and a fraction of one to run, so one Python process stays (`worker.py`): it parses the
//! project once, again when a file of it changes, and runs one invocation at a time. A task of ours owns that process; a
//! [`Worker`] is a handle to it.
//!
//! After a crash (of the worker, of us, of the machine) nothing here has to be repaired. dbt's models remember in the warehouse how
//! far they have come, in the same transaction as their rows. The worker ends when its stdin closes; a new one first ends
//! whatever queries its predecessor has left running, so that no two write at once.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::fault::{Diagnose, Fault};

mod process;
mod results;
mod target;

pub use results::{FailingRows, Kind, Node, NodeEvent, NodeResult, RunResults, Status, TestCounts};
pub use target::{Account, Server, Target};

/// Settings of dbt, `[dbt]` in `config.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The dbt project, beside `config.toml`. Yours to extend: it is read again whenever a file of it changes.
    pub project_dir: PathBuf,
    /// Nodes that run at once, each on a connection of its own.
    pub threads: NonZeroUsize,
}

impl Default for Config {
    fn default() -> Self {
        Self { project_dir: PathBuf::from("dbt"), threads: const { NonZeroUsize::new(4).expect("four is not zero") } }
    }
}

/// What dbt is asked to do: one task of the DAG.
#[derive(Debug, Clone, PartialEq)]
pub struct Invocation {
    pub command: Command,
    /// Selectors as on dbt's command line, together: `tag:staging`, a model's name. None selects everything.
    pub select: Vec<String>,
    /// Values for the project's `vars`: `topic_prefix`, `snapshot`, `full_audit`.
    pub vars: serde_json::Map<String, serde_json::Value>,
    /// The invocation is cancelled after this long, from the moment it is asked for.
    pub timeout: Option<Duration>,
    /// Whose queries these are, where the warehouse keeps a history of them.
    pub tag: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    Run,
    Test,
    Snapshot,
    Build,
}

/// The DAG's tasks that are dbt's, in order, and what each asks of dbt.
pub const TASKS: [(&str, Command, &str); 5] = [
    ("dbt_staging", Command::Run, "tag:staging"),
    ("dbt_test_staging", Command::Test, "tag:staging"),
    ("dbt_snapshot", Command::Snapshot, "tag:snapshot"),
    ("dbt_analytics", Command::Run, "tag:analytics"),
    ("dbt_test_analytics", Command::Test, "tag:analytics"),
];

impl Invocation {
    pub fn new(command: Command, select: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { command, select: select.into_iter().map(Into::into).collect(), vars: serde_json::Map::new(), timeout: None, tag: None }
    }

    /// What a task of the DAG asks of dbt; None where the task is not dbt's.
    pub fn of_task(task_id: &str) -> Option<Self> {
        let (_, command, selector) = TASKS.iter().find(|(name, ..)| *name == task_id)?;
        Some(Self::new(*command, [*selector]))
    }

    pub fn with_var(mut self, name: &str, value: impl Into<serde_json::Value>) -> Self {
        self.vars.insert(name.to_owned(), value.into());
        self
    }

    pub fn with_tag(mut self, tag: String) -> Self {
        self.tag = Some(tag);
        self
    }

    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }
}

/// What an operator may see of the worker.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// The project is parsed and the process waits or works.
    pub ready: bool,
    /// The worker process, while there is one.
    pub pid: Option<u32>,
    /// Worker processes started so far; more than one means that some died or were killed to cancel a run.
    pub starts: u64,
    /// Invocations finished so far, whatever their outcome.
    pub invocations: u64,
    /// Every node of the project, each after what it depends on.
    pub nodes: Arc<[Node]>,
}

/// Why an invocation has no results. A node that fails is no error: it is in the results.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the warehouse address is not postgres://user@host/database")]
    Address,
    #[error("there is no dbt project in {}", .0.display())]
    NoProject(PathBuf),
    #[error("could not prepare {} for dbt", path.display())]
    WorkDir {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("could not start {} for dbt", python.display())]
    Start {
        python: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The worker died; the text is what it said last.
    #[error("the dbt worker died ({status}){}", last_words(.stderr))]
    Died { status: String, stderr: String },
    #[error("the worker spoke out of turn")]
    Protocol(#[source] serde_json::Error),
    #[error("dbt cannot read the project: {0}")]
    Project(String),
    #[error("dbt cannot reach the warehouse: {0}")]
    Warehouse(String),
    #[error("dbt refused: {0}")]
    Refused(String),
    #[error("could not end the queries of an earlier dbt run")]
    Sweep(#[source] sqlx::Error),
    #[error("dbt did not finish within {}", humantime::format_duration(*.0))]
    TimedOut(Duration),
    #[error("the dbt run was cancelled")]
    Cancelled,
    #[error("the dbt worker has been stopped")]
    Stopped,
}

fn last_words(stderr: &str) -> String {
    if stderr.is_empty() { String::new() } else { format!(", saying last:\n{stderr}") }
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::Address => Fault::Operator("write warehouse.url as postgres://user@host:port/database".to_owned()),
            Self::NoProject(path) => Fault::Operator(format!("set dbt.project_dir to the folder that holds dbt_project.yml; {} does not", path.display())),
            Self::WorkDir { path, .. } => Fault::Operator(format!("make {} writable", path.display())),
            Self::Start { python, .. } => Fault::Operator(format!("check that {} runs; removing its folder builds the environment anew", python.display())),
            Self::Project(_) => Fault::Operator("repair the file of the dbt project that the message names; it is read again by the next try".to_owned()),
            Self::Refused(_) => Fault::Operator("see what dbt says; `dbt debug` in the project folder tries the same connection".to_owned()),
            Self::Died { .. } | Self::Warehouse(_) | Self::Sweep(_) | Self::TimedOut(_) | Self::Cancelled | Self::Stopped => Fault::Transient,
            Self::Protocol(_) => Fault::Bug,
        }
    }
}

/// A handle to the task that owns the dbt process. Cheap to clone; the process ends after the last one is gone.
#[derive(Debug, Clone)]
pub struct Worker {
    asks: mpsc::Sender<process::Ask>,
    stats: watch::Receiver<Stats>,
    stop: CancellationToken,
}

/// One invocation runs; so many more may wait for it.
const ASKS_WAITING_MAX: usize = 16;

impl Worker {
    /// Starts the process and lets it import and parse while the caller goes on; the first invocation waits for it.
    ///
    /// `python` is an interpreter with dbt. Everything dbt writes goes to `work_dir`, never into the project. The warehouse need
    /// not be up yet.
    pub async fn start(python: &Path, config: &Config, target: Target, work_dir: &Path) -> Result<Self, Error> {
        let setup = process::Setup::prepare(python, config, target, work_dir).await?;
        let (asks, inbox) = mpsc::channel(ASKS_WAITING_MAX);
        let (stats_in, stats) = watch::channel(Stats::default());
        let stop = CancellationToken::new();
        tokio::spawn(process::run(setup, inbox, stats_in, stop.clone()));
        Ok(Self { asks, stats, stop })
    }

    /// Runs one invocation; others wait their turn.
    ///
    /// `events` gets each node when it starts and when it ends, as long as there is room; the results hold all of them. Dropping the
    /// future cancels as `cancel` does: dbt cancels its queries, or is killed and its queries are ended.
    pub async fn invoke(&self, invocation: Invocation, events: mpsc::Sender<NodeEvent>, cancel: CancellationToken) -> Result<RunResults, Error> {
        let (reply, answer) = oneshot::channel();
        let ask = process::Ask { invocation, events, cancel, reply };
        self.asks.send(ask).await.map_err(|_| Error::Stopped)?;
        answer.await.map_err(|_| Error::Stopped)?
    }

    /// What the worker does now, and again whenever that changes.
    pub fn stats(&self) -> watch::Receiver<Stats> {
        self.stats.clone()
    }

    /// Every node of the project as last parsed, each after what it depends on. Empty until it has been parsed.
    pub fn nodes(&self) -> Arc<[Node]> {
        Arc::clone(&self.stats.borrow().nodes)
    }

    /// Ends the process, and returns when it is gone. An invocation that still runs is cancelled.
    pub async fn stop(mut self) {
        self.stop.cancel();
        // The owner drops its end as the last thing it does.
        while self.stats.changed().await.is_ok() {}
    }
}
