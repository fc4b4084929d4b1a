//! Objects of the lake → rows of the warehouse, and the proof that nothing changed on the way.
//!
//! ```text
//!  commit records ──load──► raw.<table> ──dbt──► staging ──dbt──► analytics
//!        └───────────────────── reconcile: the same money in every place ─────┘
//! ```
//!
//! [`postgres`] owns the schemas and what is written into `raw`; [`load`] turns commit records into rows, each object once;
//! [`reconcile`] compares source, lake, raw, staging and analytics at one point in time. What lies in `staging`, `snapshots`
//! and `analytics` belongs to dbt.
//!
//! After a crash: an object's rows and its row in `raw._loads` are one transaction, so an object is loaded or it is not. The
//! next load begins after the newest row in `raw._loads` of each lane. Nothing here keeps state of its own.

use std::{collections::BTreeMap, fmt};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::{
    change::Lsn,
    fault::{Diagnose, Fault},
};

pub mod load;
pub mod postgres;
pub mod reconcile;

mod pour;

/// Settings of the warehouse, `[warehouse]` in `config.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `"embedded"` uses the database `warehouse` of our own PostgreSQL; anything else is an address, `postgres://…`.
    pub url: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { url: "embedded".to_owned() }
    }
}

/// How far whole transactions go: everything that was committed up to here is in staging, nothing of what came later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// End of the last commit record that is covered.
    pub lsn: Lsn,
    /// When the source committed it.
    pub committed_at: DateTime<Utc>,
}

/// What the warehouse holds of the lake, by table, since it was made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    pub files_loaded: BTreeMap<String, u64>,
    /// Records of those files, those that were refused included.
    pub rows_loaded: BTreeMap<String, u64>,
    /// Records that PostgreSQL refuses as `jsonb` or the lake could not take; each is a row in `raw._rejected`.
    pub rows_rejected: BTreeMap<String, u64>,
}

/// Why the warehouse could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not connect to {address}")]
    Connect {
        address: String,
        #[source]
        source: sqlx::Error,
    },
    #[error("could not {doing}")]
    Sql {
        doing: Doing,
        #[source]
        source: sqlx::Error,
    },
    #[error("could not read the lake")]
    Lake(#[source] crate::lake::Error),
    #[error("no commit record continues {lane} after offset {loaded}, and its newest begins at {found}")]
    Gap { lane: String, loaded: i64, found: i64 },
    #[error("the mark of {taken_at} is older than the initial snapshot")]
    StaleMark { taken_at: DateTime<Utc> },
    #[error("the source holds no bank: {table} is not there")]
    NoBank { table: &'static str },
    #[error("the source answered with something that is not a snapshot")]
    NotASnapshot,
    #[error("a sum is beyond what an amount of money can hold")]
    TooLarge,
    #[error("a task of ours ended before its work did")]
    Interrupted,
}

/// What was being done when SQL failed, as the rest of a sentence: `load raw.accounts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doing(String);

impl fmt::Display for Doing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// Names what was being done, so that an SQL error says more than its code.
pub(crate) trait While<T> {
    fn during(self, doing: impl Into<String>) -> Result<T, Error>;
}

impl<T> While<T> for Result<T, sqlx::Error> {
    fn during(self, doing: impl Into<String>) -> Result<T, Error> {
        self.map_err(|source| Error::Sql { doing: Doing(doing.into()), source })
    }
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::Connect { source, address } => connecting(source, address),
            Self::Sql { source, .. } => speaking(source),
            Self::Lake(error) => error.fault(),
            Self::Gap { lane, .. } => Fault::Data(format!(
                "run `ledgerline lake verify`; restore what {lane} lacks from a copy of the bucket, or see whether somebody changed raw._loads"
            )),
            Self::StaleMark { .. } => Fault::Transient,
            Self::NoBank { .. } => {
                Fault::Operator("let a bank open there first: `ledgerline run`, or see whether source.url names the right database".to_owned())
            }
            Self::NotASnapshot => Fault::Operator("reconciliation needs PostgreSQL 15 or newer as its source".to_owned()),
            Self::TooLarge => Fault::Data("look for an impossible amount in raw.transactions and raw.accounts".to_owned()),
            Self::Interrupted => Fault::Bug,
        }
    }
}

fn connecting(error: &sqlx::Error, address: &str) -> Fault {
    match sqlstate(error).as_deref() {
        Some(code) if code.starts_with("28") => Fault::Operator(format!("check the user and the password of {address}")),
        Some("3D000") => Fault::Operator(format!("create the database of {address}, or name another in the configuration")),
        _ => match error {
            sqlx::Error::Configuration(_) => Fault::Operator("write the address as postgres://user:password@host:port/database".to_owned()),
            _ => Fault::Transient,
        },
    }
}

/// What an SQL error means: a server that is away, busy or full recovers; missing rights need a person; all else is our SQL.
fn speaking(error: &sqlx::Error) -> Fault {
    let Some(code) = sqlstate(error) else {
        return match error {
            sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::Tls(_) | sqlx::Error::WorkerCrashed => Fault::Transient,
            // The connection broke in the middle of an answer.
            sqlx::Error::Protocol(_) => Fault::Transient,
            _ => Fault::Bug,
        };
    };
    match code.as_str() {
        "42501" => Fault::Operator("grant the warehouse's user the right to create schemas and to write into raw".to_owned()),
        "53100" => Fault::Operator("free space on the disk of the warehouse".to_owned()),
        code if ["08", "40", "53", "55", "57", "58"].iter().any(|class| code.starts_with(class)) => Fault::Transient,
        _ => Fault::Bug,
    }
}

pub(crate) fn sqlstate(error: &sqlx::Error) -> Option<String> {
    error.as_database_error()?.code().map(|code| code.into_owned())
}
