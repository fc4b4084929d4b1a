//! Objects of the lake → rows of the warehouse, and the proof that nothing changed on the way.
//!
//! ```text
//!  commit records ──load──► raw.<table> ──dbt──► staging ──dbt──► analytics
//!        └───────────────────── reconcile: the same money in every place ─────┘
//! ```
//!
//! [`load`] turns commit records into rows, each object once; [`reconcile`] compares source, lake, raw, staging and analytics at
//! one point in time. What lies in `staging`, `snapshots` and `analytics` belongs to dbt.
//!
//! [`Warehouse`] is the one seam: a closed enum, because there are two and each caller's match is checked. It answers what is
//! known about `raw` and the cut. What is more than a question is written once above it and has two feet below: the loader's
//! walk along a lane ([`load`]) calls a lane loader of either kind; a reconciliation compares ranges and keys, which either
//! kind folds in SQL of its own; the KPIs are one SQL text, read by either. [`postgres`] and [`snowflake`] own their DDL,
//! their transactions and how two loaders keep out of each other's way.
//!
//! After a crash: an object's rows and its row in `raw._loads` are one transaction, so an object is loaded or it is not. The
//! next load begins after the newest row in `raw._loads` of each lane. Nothing here keeps state of its own.

use std::{collections::BTreeMap, fmt};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use url::Url;

use crate::{
    change::{Lsn, Topics},
    fault::{Diagnose, Fault, sqlstate},
    secret::Secret,
    stream::Lane,
};
use load::Loaded;
use postgres::{Postgres, RawTable};

pub mod load;
pub mod postgres;
pub mod reconcile;
#[cfg(feature = "snowflake")]
pub mod snowflake;

mod pour;

/// Settings of the warehouse, `[warehouse]` in `config.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `"embedded"` uses the database `warehouse` of our own PostgreSQL; anything else is an address, `postgres://…`.
    pub url: String,
    /// Where Snowflake's requests go instead of the account's own host: a private link, or a double. Empty: the account's host.
    pub endpoint: String,
    /// Snowflake's external stage over the lake's bucket, `RAW.LAKE`: COPY reads the objects where they lie. Empty: what they
    /// hold is uploaded into a stage of our own.
    pub stage: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { url: "embedded".to_owned(), endpoint: String::new(), stage: String::new() }
    }
}

/// Where the warehouse is, and what opens it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Access {
    /// `postgres://…` with its password, or `snowflake://…`.
    pub url: Secret,
    /// Where Snowflake's requests go instead of the account's own host.
    pub endpoint: Option<Url>,
    /// Snowflake's: a PKCS#8 PEM, or the path of one.
    pub private_key: Option<Secret>,
    /// Snowflake's external stage over the lake's bucket, where there is one.
    pub stage: Option<String>,
}

impl From<Secret> for Access {
    fn from(url: Secret) -> Self {
        Self { url, ..Self::default() }
    }
}

/// Whether an address is one of Snowflake's.
pub fn is_snowflake(url: &str) -> bool {
    url.starts_with("snowflake:")
}

/// The host of an account's address: `snowflake://ACCOUNT/…` lives at `ACCOUNT.snowflakecomputing.com`.
pub fn snowflake_host(url: &str) -> String {
    let account = Url::parse(url).ok().and_then(|it| it.host_str().map(str::to_lowercase)).unwrap_or_default();
    // Certificates do not cover names with an underscore.
    format!("{}.snowflakecomputing.com", account.replace('_', "-"))
}

/// A warehouse of either kind. Clones share their connections.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "one or two live at a time, and a box would be one more thing to read past")]
pub enum Warehouse {
    Postgres(Postgres),
    #[cfg(feature = "snowflake")]
    Snowflake(snowflake::Snowflake),
}

impl From<Postgres> for Warehouse {
    fn from(postgres: Postgres) -> Self {
        Self::Postgres(postgres)
    }
}

impl Warehouse {
    /// Connects and asks one question, so that a wrong address is known at once.
    pub async fn connect(access: &Access) -> Result<Self, Error> {
        #[cfg(feature = "snowflake")]
        if is_snowflake(access.url.reveal()) {
            return Ok(Self::Snowflake(Box::pin(snowflake::Snowflake::connect(access)).await?));
        }
        Postgres::connect(&access.url).await.map(Self::Postgres)
    }

    /// The same warehouse, whose statements say whose they are where it keeps a history of them.
    pub fn tagged(&self, _tag: &str) -> Self {
        match self {
            Self::Postgres(_) => self.clone(),
            #[cfg(feature = "snowflake")]
            Self::Snowflake(snowflake) => Self::Snowflake(snowflake.tagged(_tag)),
        }
    }

    /// Makes the schemas, the raw tables of the bank, and our own; harmless where they exist, also when two do it at once.
    pub async fn prepare(&self) -> Result<(), Error> {
        match self {
            Self::Postgres(postgres) => postgres.prepare().await,
            #[cfg(feature = "snowflake")]
            Self::Snowflake(snowflake) => Ok(snowflake.prepare().await?),
        }
    }

    /// Makes the raw table of any captured table, by its name in the lake.
    pub async fn prepare_table(&self, lake_name: &str) -> Result<(), Error> {
        match self {
            Self::Postgres(postgres) => postgres.prepare_table(&RawTable::new(lake_name)).await,
            #[cfg(feature = "snowflake")]
            Self::Snowflake(snowflake) => Ok(snowflake.prepare_table(lake_name).await?),
        }
    }

    /// The last offset that is loaded, by lane.
    pub async fn loaded_positions(&self) -> Result<BTreeMap<Lane, i64>, Error> {
        match self {
            Self::Postgres(postgres) => postgres.loaded_positions().await,
            #[cfg(feature = "snowflake")]
            Self::Snowflake(snowflake) => Ok(snowflake.loaded_positions().await?),
        }
    }

    /// What has been loaded behind these positions, by table: the truth about a run, however often its loads were interrupted.
    pub async fn loaded_since(&self, topics: &Topics, positions: &[Position]) -> Result<BTreeMap<String, Loaded>, Error> {
        match self {
            Self::Postgres(postgres) => postgres.loaded_since(topics, positions).await,
            #[cfg(feature = "snowflake")]
            Self::Snowflake(snowflake) => Ok(snowflake.loaded_since(topics, positions).await?),
        }
    }

    /// What has been loaded so far, by table.
    pub async fn stats(&self, topics: &Topics) -> Result<Stats, Error> {
        match self {
            Self::Postgres(postgres) => postgres.stats(topics).await,
            #[cfg(feature = "snowflake")]
            Self::Snowflake(snowflake) => Ok(snowflake.stats(topics).await?),
        }
    }

    /// Says where the initial snapshot ended in each lane; the cut waits until all of them are loaded.
    ///
    /// Replaces what was said before in one transaction; saying it again is harmless. An empty list means the source had
    /// nothing to read and is not the same as never having been called, so it is refused: name every lane, with offset 0.
    pub async fn set_snapshot_ends(&self, ends: &SnapshotEnds) -> Result<(), Error> {
        match self {
            Self::Postgres(postgres) => postgres.set_snapshot_ends(ends).await,
            #[cfg(feature = "snowflake")]
            Self::Snowflake(snowflake) => Ok(snowflake.set_snapshot_ends(ends).await?),
        }
    }

    /// The newest cut; None before dbt has found one.
    pub async fn cut(&self) -> Result<Option<Cut>, Error> {
        match self {
            Self::Postgres(postgres) => postgres.cut().await,
            #[cfg(feature = "snowflake")]
            Self::Snowflake(snowflake) => Ok(snowflake.cut().await?),
        }
    }
}

/// How far a lane is loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    pub topic: String,
    pub partition: i32,
    pub last_offset: i64,
}

/// Where the initial snapshot ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotEnds {
    /// Where in the WAL it was read: tells its rows from those of an attempt that died. None where nobody knows, then the newest
    /// rows are meant.
    pub lsn: Option<Lsn>,
    /// Topic, partition and end offset of each lane.
    pub lanes: Vec<(String, i32, i64)>,
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
    #[cfg(feature = "snowflake")]
    #[error(transparent)]
    Snowflake(#[from] snowflake::Error),
    #[error("could not read the lake")]
    Lake(#[source] crate::lake::Error),
    #[error("no commit record continues {lane} after offset {loaded}, and its newest begins at {found}")]
    Gap { lane: String, loaded: i64, found: i64 },
    #[error("the warehouse holds what was captured as {found}, which is not of cdc.topic_prefix {prefix}")]
    OtherCapture { found: String, prefix: String },
    #[error("the mark of {taken_at} is older than the initial snapshot")]
    StaleMark { taken_at: DateTime<Utc> },
    #[error("the source holds no bank: {table} is not there")]
    NoBank { table: &'static str },
    #[error("the source answered with something that is not a snapshot")]
    NotASnapshot,
    #[error("a sum is beyond what an amount of money can hold")]
    TooLarge,
    #[cfg(feature = "snowflake")]
    #[error("dbt wrote while the warehouse was compared, again and again")]
    Moved,
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
        // The pool's own words are of the pool; what an operator must look at is the server.
        let of_the_server = |error| match error {
            sqlx::Error::PoolTimedOut => sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "the server gave no connection in time")),
            error => error,
        };
        self.map_err(|source| Error::Sql { doing: Doing(doing.into()), source: of_the_server(source) })
    }
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::Connect { source, address } => connecting(source, address),
            Self::Sql { source, .. } => speaking(source),
            #[cfg(feature = "snowflake")]
            Self::Snowflake(error) => error.fault(),
            Self::Lake(error) => error.fault(),
            Self::Gap { lane, .. } => Fault::Data(format!(
                "run `ledgerline lake verify`; restore what {lane} lacks from a copy of the bucket, or see whether somebody changed raw._loads"
            )),
            Self::OtherCapture { .. } => Fault::Operator(
                "offsets of two captures would meet in one table: set the old cdc.topic_prefix, or name an empty database in warehouse.url".to_owned(),
            ),
            Self::StaleMark { .. } => Fault::Transient,
            Self::NoBank { .. } => {
                Fault::Operator("let a bank open there first: `ledgerline run`, or see whether source.url names the right database".to_owned())
            }
            #[cfg(feature = "snowflake")]
            Self::Moved => Fault::Transient,
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
