//! What the engine tells the console: DAGs, their newest runs, where each task stands.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{
    plan::{Plan, TaskState},
    progress::{CANCELLED, Matter, Run, RunRef, RunState, RunType, TaskInstance, seconds_between},
};
use crate::stage::Phase;

/// Runs shown per DAG; more are in the history.
pub const RUNS_SHOWN: usize = 20;

/// The engine, as an operator may see it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Stats {
    /// Paused: schedules hold; what runs or is ordered goes on.
    pub phase: Phase,
    /// Why nothing starts: the state database is away, in words. None while it is there.
    pub away: Option<String>,
    pub dags: Vec<DagStats>,
}

/// One DAG and its newest runs.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct DagStats {
    pub dag_id: String,
    /// `30s`, a cron expression, or `never`.
    pub schedule: String,
    /// The next start by schedule; in the past where it waits for the run in progress.
    pub next_start: Option<DateTime<Utc>>,
    /// Its schedule was paused by an operator.
    pub paused: bool,
    /// Another process runs this DAG on the same state database.
    pub held_elsewhere: bool,
    /// The plan, in order: task and what it waits for.
    pub tasks: Vec<(String, Vec<String>)>,
    /// Newest first.
    pub runs: Vec<Arc<RunStats>>,
}

/// One run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunStats {
    pub dag_id: String,
    pub run_id: String,
    pub run_type: RunType,
    pub state: RunState,
    pub logical_date: DateTime<Utc>,
    pub queued_at: DateTime<Utc>,
    pub started_at: Option<DateTime<Utc>>,
    pub finished_at: Option<DateTime<Utc>>,
    pub seconds: Option<f64>,
    pub triggered_by: Option<RunRef>,
    /// The runs its tasks triggered.
    pub triggered: Vec<RunRef>,
    /// An operator ended it.
    #[serde(default)]
    pub cancelled: bool,
    pub tasks: Vec<TaskStats>,
}

/// One task of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskStats {
    pub task_id: String,
    pub state: TaskState,
    /// Tries so far, the running one included.
    pub tries: u32,
    pub started_at: Option<DateTime<Utc>>,
    pub finished_at: Option<DateTime<Utc>>,
    /// Of the last try.
    pub seconds: Option<f64>,
    pub retry_at: Option<DateTime<Utc>>,
    /// The first line of what went wrong.
    pub error: Option<String>,
    /// Whose matter that is.
    pub fault: Option<Matter>,
}

impl Stats {
    pub fn dag(&self, dag_id: &str) -> Option<&DagStats> {
        self.dags.iter().find(|it| it.dag_id == dag_id)
    }

    pub fn run(&self, run: &RunRef) -> Option<&Arc<RunStats>> {
        self.dag(&run.dag_id)?.runs.iter().find(|it| it.run_id == run.run_id)
    }

    /// Nothing is queued or running.
    pub fn is_idle(&self) -> bool {
        self.dags.iter().flat_map(|it| &it.runs).all(|run| run.state.is_final())
    }
}

impl DagStats {
    /// The newest run that tells how the DAG is: one that is over, or one that an operator runs again.
    pub fn last_word(&self) -> Option<&Arc<RunStats>> {
        self.runs.iter().find(|run| run.state.is_final() || run.is_repeated())
    }
}

impl RunStats {
    /// It was over, and is run again, wholly or in part.
    pub fn is_repeated(&self) -> bool {
        !self.state.is_final() && self.started_at.is_some_and(|at| at < self.queued_at)
    }

    /// What is red in it was cut short by an operator.
    pub fn cut_short(&self, task: &TaskStats) -> bool {
        self.cancelled && task.state == TaskState::Failed && task.error.as_deref().is_none_or(|it| it.starts_with(CANCELLED))
    }
}

impl From<&Run> for RunStats {
    fn from(run: &Run) -> Self {
        let triggered = run.tasks.iter().filter_map(|it| it.note.get(TRIGGERED)).filter_map(|it| serde_json::from_value(it.clone()).ok());
        Self {
            dag_id: run.dag_id.clone(),
            run_id: run.run_id.clone(),
            run_type: run.run_type,
            state: run.state,
            logical_date: run.logical_date,
            queued_at: run.queued_at,
            started_at: run.started_at,
            finished_at: run.finished_at,
            seconds: seconds_between(run.started_at, run.finished_at),
            triggered_by: run.triggered_by.clone(),
            triggered: triggered.collect(),
            cancelled: run.cancelled,
            tasks: run.tasks.iter().map(TaskStats::from).collect(),
        }
    }
}

/// The key in the note of a task that triggered a run.
pub(super) const TRIGGERED: &str = "triggered";

impl From<&TaskInstance> for TaskStats {
    fn from(task: &TaskInstance) -> Self {
        Self {
            task_id: task.task_id.clone(),
            state: task.state,
            tries: task.try_number,
            started_at: task.started_at,
            finished_at: task.finished_at,
            seconds: task.seconds(),
            retry_at: task.retry_at,
            error: task.error.as_deref().and_then(|it| it.lines().next()).map(str::to_owned),
            fault: task.fault,
        }
    }
}

/// The plan as the console draws it.
pub(super) fn edges(plan: &Plan) -> Vec<(String, Vec<String>)> {
    plan.tasks().iter().map(|task| (task.task_id.clone(), task.upstream.clone())).collect()
}
