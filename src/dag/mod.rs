//! A small workflow engine: plans in, runs out. It knows nothing about banks; `refresh` binds our tasks to it.
//!
//! [`run`] is the stage. It owns every run in progress and writes each result to PostgreSQL *before* it starts what
//! follows, over one connection that also holds an advisory lock per DAG. So of each DAG one run is in progress at a time,
//! whoever else runs an engine on the same state database.
//!
//! After a crash the next engine finds the run as it was written: finished tasks stay finished, the try that was running
//! counts as failed (`interrupted`) and is repeated. A task must therefore be harmless to repeat; its result is booked once.
//! When the connection goes, the locks go with it: running tasks are stopped, their results kept in memory until the
//! connection is back, and booked if nobody else has taken the run over meanwhile. A graceful stop is a crash with manners.
//!
//! Decided here, as in Airflow: a task that triggers another DAG does not wait for it. Runs of a DAG queue; of those that
//! have not started at most one waits, so triggers coalesce, and so do missed starts of a schedule. Unlike Airflow, a run is
//! green only if *every* task of it is, not just the last ones, and a paused DAG still runs what an operator orders.

use std::{collections::BTreeMap, num::NonZeroU32};

use serde::{Deserialize, Serialize};

mod attempt;
mod engine;
mod history;
mod obey;
mod order;
mod plan;
mod progress;
mod run;
mod schedule;
mod stats;
mod task;

pub use history::{History, Line, Try};
pub use order::{Answer, Gone, Handle, Order, Refusal, Request, orders};
pub use plan::{BadPlan, Plan, Task, TaskState, TriggerRule};
pub use progress::{INTERRUPTED, Matter, Run, RunRef, RunState, RunType, TaskInstance};
pub use run::{Deal, Report, run};
pub use schedule::Schedule;
pub use stats::{DagStats, RUNS_SHOWN, RunStats, Stats, TaskStats};
pub use task::{Executor, NOTE_BYTES_MAX, TaskContext, TaskError, TaskLog, TaskOutcome};

use crate::units::Span;

/// Settings of the DAGs, `[dag]` in `config.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// When loading starts by itself: an interval, a cron expression (UTC), or `"never"`. Transformation follows loading.
    pub schedule: Schedule,
    /// Tasks of one DAG that run at the same time; the five loads fit.
    pub concurrency: NonZeroU32,
    /// Finished runs kept per DAG; older ones are forgotten with their tries and logs.
    pub runs_kept: NonZeroU32,
    /// Log lines kept per try.
    pub log_lines_max: NonZeroU32,
    /// Tries after the first one, for failures that may pass by themselves.
    pub retries: u32,
    /// Waiting time before the second try; doubles with each further one.
    pub backoff: Span,
    /// The longest waiting time between two tries.
    pub backoff_max: Span,
    /// A try that takes longer is cancelled and counts as failed.
    pub timeout: Span,
    /// Exceptions by task, as `[dag.tasks.dbt_analytics]`.
    pub tasks: BTreeMap<String, TaskConfig>,
}

/// What one task does differently.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TaskConfig {
    /// Tries after the first one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
    /// Waiting time before the second try.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff: Option<Span>,
    /// A try that takes longer is cancelled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
}

impl Default for Config {
    fn default() -> Self {
        let number = |it| NonZeroU32::new(it).expect("the default is not zero");
        Self {
            schedule: Schedule::Every(Span::from_secs(30)),
            concurrency: number(5),
            runs_kept: number(200),
            log_lines_max: number(1000),
            retries: 2,
            backoff: Span::from_secs(2),
            backoff_max: Span::from_secs(60),
            timeout: Span::from_secs(600),
            tasks: BTreeMap::new(),
        }
    }
}

impl Config {
    /// A task with its settings: the exception where there is one, else the common ones.
    pub fn task(&self, task_id: &str) -> Task {
        let exception = self.tasks.get(task_id).cloned().unwrap_or_default();
        Task {
            retries: exception.retries.unwrap_or(self.retries),
            backoff: *exception.backoff.unwrap_or(self.backoff),
            backoff_max: *self.backoff_max,
            timeout: *exception.timeout.unwrap_or(self.timeout),
            ..Task::new(task_id)
        }
    }
}

/// What ends the engine, or is waited out by it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not {doing}")]
    Database {
        doing: &'static str,
        #[source]
        source: sqlx::Error,
    },
    #[error("could not {doing}: the state database does not answer")]
    Silent { doing: &'static str },
    #[error("the run history is of a later version ({version})")]
    NewerHistory { version: i64 },
    #[error("the plans are not DAGs")]
    BadPlan(#[from] BadPlan),
}

impl Error {
    fn failed(doing: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |source| Self::Database { doing, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_takes_the_common_settings_except_where_it_has_its_own() {
        let config: Config = toml::from_str("retries = 1\n[tasks.dbt_analytics]\ntimeout = \"30m\"\n").expect("valid");
        assert_eq!(config.task("dbt_analytics").timeout.as_secs(), 1800);
        assert_eq!(config.task("dbt_analytics").retries, 1);
        assert_eq!(config.task("dbt_staging").timeout.as_secs(), 600);
    }

    #[test]
    fn the_config_reads_what_it_writes() {
        let config = Config { tasks: [("a".to_owned(), TaskConfig { retries: Some(7), ..TaskConfig::default() })].into(), ..Config::default() };
        let text = toml::to_string(&config).expect("TOML");
        assert_eq!(toml::from_str::<Config>(&text).expect("valid"), config);
    }
}
