//! Exit codes, and what an error prints on its way out.

use std::process::ExitCode;

use crate::fault::{Diagnose, Fault, chain};

/// What the shell is told. `run` and every single command end with one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done and right.
    Right,
    /// A bug of ours.
    Bug,
    /// Usage or configuration.
    Usage,
    /// A service is away or refuses.
    Away,
    /// The data is wrong: a test failed, reconciliation differs, the lake's proof is broken.
    Data,
    /// The deadline passed.
    Deadline,
    /// Interrupted by ^C or SIGTERM.
    Interrupted,
}

impl Exit {
    pub const fn code(self) -> u8 {
        match self {
            Self::Right => 0,
            Self::Bug => 1,
            Self::Usage => 2,
            Self::Away => 3,
            Self::Data => 4,
            Self::Deadline => 5,
            Self::Interrupted => 130,
        }
    }

    /// The word for it in a summary.
    pub const fn outcome(self) -> &'static str {
        match self {
            Self::Right => "success",
            Self::Bug => "bug",
            Self::Usage => "usage",
            Self::Away => "service_away",
            Self::Data => "data_wrong",
            Self::Deadline => "deadline",
            Self::Interrupted => "interrupted",
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// An error that ends the invocation: what failed and why, the remedy, and the exit code.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub text: String,
    pub remedy: Option<String>,
}

impl Failure {
    pub fn new(exit: Exit, text: impl Into<String>) -> Self {
        Self { exit, text: text.into(), remedy: None }
    }

    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// A mistake in flags or configuration.
    pub fn usage(error: &impl Diagnose) -> Self {
        Self { exit: Exit::Usage, ..Self::from_error(error) }
    }

    /// A failure of a room, by what the room says it means.
    pub fn from_error(error: &impl Diagnose) -> Self {
        let (exit, remedy) = match error.fault() {
            Fault::Transient => (Exit::Away, None),
            Fault::Operator(remedy) => (Exit::Away, Some(remedy)),
            Fault::Data(remedy) => (Exit::Data, Some(remedy)),
            Fault::Bug => (Exit::Bug, None),
        };
        Self { exit, text: chain(error), remedy }
    }
}

impl std::fmt::Display for Failure {
    /// `error: what: why` and, on a line of its own, what to do.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "error: {}", self.text)?;
        match &self.remedy {
            Some(remedy) => write!(formatter, "\n  → {remedy}"),
            None => Ok(()),
        }
    }
}
