//! What an operator may ask of the engine, and the handle to ask with.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    progress::RunRef,
    stats::{RunStats, Stats},
};

/// Orders that wait for the engine; whoever asks beyond that waits himself.
const ORDERS_WAITING_MAX: usize = 32;

/// An operator's order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Starts a run; if one waits already, that one is it.
    Trigger {
        dag_id: String,
    },
    /// Runs a failed task again, and what did not run because of it.
    Retry {
        dag_id: String,
        run_id: String,
        task_id: String,
    },
    /// Runs a task and everything after it again, whatever became of them.
    Clear {
        dag_id: String,
        run_id: String,
        task_id: String,
    },
    /// Ends a run: stops what runs, skips what has not started. It counts as failed.
    Cancel {
        dag_id: String,
        run_id: String,
    },
    /// Holds the schedule.
    PauseDag {
        dag_id: String,
    },
    ResumeDag {
        dag_id: String,
    },
}

impl Order {
    pub fn dag_id(&self) -> &str {
        match self {
            Self::Trigger { dag_id }
            | Self::Retry { dag_id, .. }
            | Self::Clear { dag_id, .. }
            | Self::Cancel { dag_id, .. }
            | Self::PauseDag { dag_id }
            | Self::ResumeDag { dag_id } => dag_id,
        }
    }
}

/// What an order does, or with `dry_run` would do.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Answer {
    pub dag_id: String,
    /// The run it is about. None in a dry run of a trigger, and where an order is about no run.
    pub run_id: Option<String>,
    /// The tasks that run (or for a cancel: are stopped or skipped), in order.
    pub tasks: Vec<String>,
    /// One sentence for people.
    pub said: String,
}

/// Why an order is not obeyed; Display is for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Refusal {
    #[error("there is no DAG {dag_id:?}; there are {}", known.join(", "))]
    UnknownDag { dag_id: String, known: Vec<String> },
    #[error("{dag_id} has no run {run_id:?}: `dag runs {dag_id}` lists them")]
    UnknownRun { dag_id: String, run_id: String },
    #[error("{dag_id} has no task {task_id:?}; it has {}", known.join(", "))]
    UnknownTask { dag_id: String, task_id: String, known: Vec<String> },
    #[error("{task_id} has not failed, it is {state}: clear it to run it again")]
    NotFailed { task_id: String, state: String },
    #[error("{task_id} or a task after it is running: cancel the run first, or wait")]
    Busy { task_id: String },
    #[error("the run is over ({state})")]
    Over { state: String },
    #[error("{dag_id} is run by another process on the same state database: ask that one")]
    HeldElsewhere { dag_id: String },
    #[error("the state database is away: {why}")]
    Away { why: String },
    #[error("the DAG engine has ended")]
    Ended,
}

/// An order on its way, with the way back.
#[derive(Debug)]
pub struct Request {
    pub order: Order,
    pub dry_run: bool,
    pub reply: oneshot::Sender<Result<Answer, Refusal>>,
}

/// The way to the engine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    orders: mpsc::Sender<Request>,
    stats: watch::Receiver<Stats>,
}

/// The engine ended, or forgot the run, before it was over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the DAG engine ended before run {0} was over")]
pub struct Gone(pub RunRef);

/// The channel an engine takes orders from.
pub fn orders() -> (mpsc::Sender<Request>, mpsc::Receiver<Request>) {
    mpsc::channel(ORDERS_WAITING_MAX)
}

impl Handle {
    /// `stats` is the engine's own, from its control handle.
    pub fn new(orders: mpsc::Sender<Request>, stats: watch::Receiver<Stats>) -> Self {
        Self { orders, stats }
    }

    /// Gives an order and waits for the answer. With `dry_run` nothing changes; the answer says what would happen.
    pub async fn order(&self, order: Order, dry_run: bool) -> Result<Answer, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.orders.send(Request { order, dry_run, reply }).await.map_err(|_| Refusal::Ended)?;
        answer.await.map_err(|_| Refusal::Ended)?
    }

    /// Starts a run and names it.
    pub async fn trigger(&self, dag_id: &str) -> Result<RunRef, Refusal> {
        let answer = self.order(Order::Trigger { dag_id: dag_id.to_owned() }, false).await?;
        Ok(RunRef { dag_id: answer.dag_id, run_id: answer.run_id.ok_or(Refusal::Ended)? })
    }

    /// Waits until a run is over, and those it triggered, and those they triggered; in that order.
    ///
    /// A run that waits for a retry is not over. Cancel-safe.
    pub async fn finished(&self, run: &RunRef) -> Result<Vec<Arc<RunStats>>, Gone> {
        let mut stats = self.stats.clone();
        let mut over = Vec::new();
        let mut waiting = vec![run.clone()];
        while let Some(next) = waiting.pop() {
            let is_over = |stats: &Stats| stats.away.is_none() && stats.run(&next).is_some_and(|it| it.state.is_final());
            let found = stats.wait_for(is_over).await.map_err(|_| Gone(next.clone()))?.run(&next).map(Arc::clone);
            let found = found.ok_or_else(|| Gone(next.clone()))?;
            waiting.extend(found.triggered.iter().rev().cloned());
            over.push(found);
        }
        Ok(over)
    }
}
