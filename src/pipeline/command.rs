//! What an operator may ask of a running pipeline, and what it answers. A closed set: console, socket and command line share it.

use std::num::NonZeroU32;

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
}

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
    /// End the pipeline as ^C would.
    Shutdown,
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
}

impl Reply {
    pub fn done(text: impl Into<String>) -> Self {
        Self { ok: true, text: text.into(), tasks: Vec::new(), run_id: None }
    }

    pub fn refused(text: impl Into<String>) -> Self {
        Self { ok: false, ..Self::done(text) }
    }
}
