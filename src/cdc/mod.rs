//! PostgreSQL's WAL → Kafka, in Debezium's words.
//!
//! Every committed change of the captured tables becomes one message on the topic of its table, and every commit a BEGIN
//! and an END on the transaction topic. First the tables are read as they are (`op r`), under the snapshot that the
//! replication slot exported when it was made, so that reading and streaming meet without a gap or an overlap.
//!
//! **Who owns what.** The stage owns the replication connection, the producer and the table descriptions. The read position
//! is the slot's; it moves only to ends of commits of which the broker has acknowledged every message. Each position is
//! first written to the heartbeat topic (as a header of Debezium's heartbeat) and only then told to the slot: so a slot that
//! somebody else moved is recognised. How far the snapshot came is a row of `ledgerline.cdc_snapshot` in the state database.
//!
//! **After a crash** it starts again at the slot's position: whole transactions are repeated, with the same bytes but for the
//! top-level times; none is left out. A snapshot that was cut short goes on from its slot, what is left of it chunk by chunk
//! while the stream flows; where no table had been read to its end it is taken anew. A slot that is lost, missing or was moved
//! stops the stage loudly: the changes are gone, and only a person can decide to read everything again.

mod admin;
mod boundaries;
mod catalog;
mod context;
mod copy_text;
mod dead_letter;
mod debezium;
mod defaults;
mod envelope;
mod error;
mod health;
mod heartbeat;
mod history;
mod incremental;
mod joining;
mod json;
mod ledger;
mod moments;
mod native;
mod patience;
mod pgoutput;
mod prepare;
mod progress;
mod sending;
mod shapes;
mod slot;
mod snapshot;
mod source;
mod stats;
mod streaming;
mod values;
mod vectors;

use serde::{Deserialize, Serialize};

pub use self::{
    admin::{Applied, ConnectorStep, Removal, SlotStep, SnapshotState, Standing, has_slot, remove, resnapshot, standing},
    error::{Error, Poison},
    incremental::Request,
    prepare::apply,
    progress::{LaneEnd, SnapshotEnds, snapshot_ends},
    source::wal_position,
    stats::{Connector, ConnectorTask, IncrementalSnapshot, Latency, SlotHealth, SnapshotProgress, Stats, Step, TableStats},
};
use crate::{secret::Secret, stage::Control, stream, units::Span};

/// Settings of the capture, `[cdc]` in `config.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What reads the WAL: our own engine, or Debezium on Kafka Connect.
    pub engine: Engine,
    /// Kafka Connect's REST, with a user where it asks for one; its password is `LEDGERLINE__CDC__CONNECT_PASSWORD`.
    pub connect_url: String,
    /// Where Connect finds the source, as `host:port`; empty: where we find it.
    pub database_address: String,
    /// What Connect is told as the source's password, where there is one: a reference that its config provider resolves.
    /// [`CLEAR_PASSWORD`] hands over the password itself, which Connect keeps in a topic and shows to whoever asks.
    pub database_password: String,
    /// The first part of every topic's name, and Debezium's logical name of this source.
    pub topic_prefix: String,
    /// Tables to capture as `schema.table`; `*` stands for any text, so `public.*` is a whole schema.
    pub tables: Vec<String>,
    /// Tables to leave out of these, same patterns.
    pub tables_exclude: Vec<String>,
    /// The replication slot: the source keeps WAL for it, so a slot nobody reads fills its disk.
    pub slot: String,
    /// The publication; made if missing, and extended when a table is added.
    pub publication: String,
    /// Whether the rows that exist before the first start are read.
    pub snapshot: SnapshotMode,
    /// How many readers share the snapshot. The native engine's alone.
    pub snapshot_max_threads: SnapshotThreads,
    /// How long a table may stay locked by somebody else once the slot is made; then the slot is dropped, and with it the WAL that it keeps,
    /// until the table is free. Debezium's `snapshot.lock.timeout.ms`. The native engine's alone.
    pub snapshot_lock_timeout: Span,
    /// How often a heartbeat is sent at least, so that consumers see the capture is alive though the tables are quiet.
    pub heartbeat: Span,
    /// BEGIN and END of every commit on the transaction topic; the warehouse needs them to show whole payments only.
    pub transaction_metadata: bool,
    /// Which operations leave no event, Debezium's `skipped.operations`.
    pub skipped_operations: SkippedOperations,
    /// What happens to a row that cannot become an event, Kafka Connect's `errors.tolerance`. The native engine's alone.
    pub errors_tolerance: ErrorsTolerance,
    /// Headers that say which connector an event came through, Debezium's `extended.headers.enabled`.
    pub extended_headers: bool,
    /// Of Kafka Connect's user; from the environment only.
    #[serde(skip)]
    pub connect_password: Option<Secret>,
}

/// As `cdc.database_password`: Connect is told the password itself.
pub const CLEAR_PASSWORD: &str = "clear";

/// Captures until stopped, with the engine that is configured.
///
/// Whichever it is: every committed change reaches its topic at least once and with the same bytes, boundaries count them, the slot
/// is confirmed only behind what the broker acknowledged, and a gap stops the stage with an error that names the remedy.
pub async fn run(
    source: Secret,
    state: Secret,
    kafka: impl Into<stream::Access>,
    stream: stream::Config,
    config: Config,
    control: Control<Stats>,
) -> Result<(), Error> {
    match config.engine {
        Engine::Native => native::run(source, state, kafka.into(), stream, config, control).await,
        Engine::Debezium => debezium::run(source, state, kafka.into(), stream, config, control).await,
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    #[default]
    Native,
    Debezium,
}

impl Engine {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Debezium => "debezium",
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotMode {
    /// All rows, once, before the first change.
    #[default]
    Initial,
    /// Changes from the first start on.
    Never,
}

impl SnapshotMode {
    /// As `config.toml` and dbt's `vars` write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Initial => "initial",
            Self::Never => "never",
        }
    }
}

/// Readers of the snapshot, Debezium's `snapshot.max.threads`; 0 chooses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
pub struct SnapshotThreads(u8);

impl SnapshotThreads {
    /// More would take connections of the source from others, and wait for each other in the producer's queue.
    const MAX: u8 = 32;
    /// What is chosen at most: each is a connection, and a process that keeps a core of the source busy.
    const CHOSEN_MAX: usize = 4;

    pub(crate) fn readers(self) -> usize {
        match self.0 {
            // A row costs us more than it costs PostgreSQL, so more readers than cores would only wait.
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(Self::CHOSEN_MAX),
            n => n.into(),
        }
    }
}

impl TryFrom<i64> for SnapshotThreads {
    type Error = String;
    fn try_from(n: i64) -> Result<Self, String> {
        let fits = u8::try_from(n).ok().filter(|it| *it <= Self::MAX);
        fits.map(Self)
            .ok_or_else(|| format!("a snapshot has 1 to {} readers, or 0 for as many as this machine has cores (at most {})", Self::MAX, Self::CHOSEN_MAX))
    }
}

impl From<SnapshotThreads> for i64 {
    fn from(threads: SnapshotThreads) -> Self {
        threads.0.into()
    }
}

/// As Debezium writes them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SkippedOperations {
    /// TRUNCATE leaves no event.
    #[default]
    T,
    /// TRUNCATE is an event (`t`) of each table.
    None,
}

impl SkippedOperations {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::T => "t",
            Self::None => "none",
        }
    }
}

/// As Kafka Connect writes them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorsTolerance {
    /// It goes to the dead letters, with its LSN and its bytes, and the stream goes on.
    #[default]
    All,
    /// The capture stops in front of it.
    None,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            engine: Engine::Native,
            connect_url: "http://localhost:8083".to_owned(),
            database_address: String::new(),
            database_password: "${env:LEDGERLINE_SOURCE_PASSWORD}".to_owned(),
            topic_prefix: "bank".to_owned(),
            tables: crate::change::BANK_TABLES.iter().map(|table| format!("public.{table}")).collect(),
            tables_exclude: Vec::new(),
            slot: "ledgerline".to_owned(),
            publication: "ledgerline".to_owned(),
            snapshot: SnapshotMode::Initial,
            snapshot_max_threads: SnapshotThreads::default(),
            snapshot_lock_timeout: Span::from_secs(60),
            heartbeat: Span::from_secs(10),
            transaction_metadata: true,
            skipped_operations: SkippedOperations::T,
            errors_tolerance: ErrorsTolerance::All,
            extended_headers: true,
            connect_password: None,
        }
    }
}
