//! What an operator may ask of a running pipeline, and what it answers. A closed set: console, socket and command line share it.

use std::{num::NonZeroU32, time::Duration};

use serde::{Deserialize, Serialize};

/// The long-lived tasks an operator may hold still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StageName {
    Bank,
    Cdc,
    Lake,
    Scheduler,
    /// Delivers the letters that the DAGs write.
    Mail,
}

impl StageName {
    pub const ALL: [Self; 5] = [Self::Bank, Self::Cdc, Self::Lake, Self::Scheduler, Self::Mail];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bank => "bank",
            Self::Cdc => "cdc",
            Self::Lake => "lake",
            Self::Scheduler => "scheduler",
            Self::Mail => "mail",
        }
    }

    /// A stage that has not reported for this long is drawn stale. The mail looks into its outbox every other second, and
    /// waits there for a database that others keep busy; flow depends on the rest.
    pub const fn silence_max(self) -> Duration {
        match self {
            Self::Bank | Self::Cdc | Self::Lake | Self::Scheduler => STALE_AFTER,
            Self::Mail => Duration::from_secs(30),
        }
    }
}

/// A stage in the flow that has not reported for this long is drawn stale.
pub const STALE_AFTER: Duration = Duration::from_secs(3);

impl std::fmt::Display for StageName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(self.as_str())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    Pause {
        stage: StageName,
    },
    Resume {
        stage: StageName,
    },
    /// Business transactions per second from now on.
    Rate {
        per_second: NonZeroU32,
    },
    /// One business event while the bank is paused.
    Step,
    Trigger {
        dag_id: String,
        dry_run: bool,
    },
    Retry {
        dag_id: String,
        run_id: Option<String>,
        task_id: String,
        dry_run: bool,
    },
    Clear {
        dag_id: String,
        run_id: Option<String>,
        task_id: String,
        dry_run: bool,
    },
    Cancel {
        dag_id: String,
        dry_run: bool,
    },
    /// Try a stage again that holds for the operator, now.
    Restart {
        stage: StageName,
    },
    /// Look at what no snapshot carries. Changes nothing; what was found is the page of the reply.
    Look {
        at: Look,
    },
    /// End the pipeline as ^C would.
    Shutdown,
}

/// What is read only when somebody wants to see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Look {
    /// The newest messages of a topic, by its name in the lake. What is a customer's is masked unless `revealed`.
    Messages { table: String, revealed: bool },
    /// The commit record behind a data object, and whether it is true.
    CommitRecord { data: String },
    /// Every chain and every object of the lake.
    Proof,
    /// What a task said, try by try.
    TaskLog { dag_id: String, run_id: String, task_id: String },
    /// The end of the pipeline's own log, for whoever is attached from outside.
    Log,
    /// The SQL of a dbt node as it ran.
    Sql { unique_id: String },
}

impl Look {
    /// What is looked at may change from one second to the next, by itself.
    pub const fn moves(&self) -> bool {
        matches!(self, Self::TaskLog { .. } | Self::Log)
    }
}

/// What became of a command. Asked in vain, it says why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    pub ok: bool,
    /// One sentence for the operator.
    pub text: String,
    /// What will run (or would, in a dry run), in order; empty where that makes no sense.
    pub tasks: Vec<String>,
    /// The run that was started or changed.
    pub run_id: Option<String>,
    /// What a look found, line by line.
    #[serde(default)]
    pub page: Vec<String>,
}

impl Reply {
    pub fn done(text: impl Into<String>) -> Self {
        Self { ok: true, text: text.into(), tasks: Vec::new(), run_id: None, page: Vec::new() }
    }

    pub fn refused(text: impl Into<String>) -> Self {
        Self { ok: false, ..Self::done(text) }
    }
}
