//! What the capture tells about itself.

use std::{collections::BTreeMap, time::Duration};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::{change::Lsn, latency::Histogram, stage::Phase};

/// Where the capture stands. Plain data, published about ten times a second.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    pub phase: Phase,
    pub step: Step,
    /// What is being waited for, in words for the operator; None while things move.
    pub waiting_for: Option<String>,
    /// By table, `public.customers`.
    pub tables: BTreeMap<String, TableStats>,
    /// Commits whose every message the broker has acknowledged.
    pub transactions: u64,
    /// Rows that could not become events and lie in the dead-letter topic.
    pub dead_letters: u64,
    /// TRUNCATEs seen; Debezium's default, and so ours, is to leave them out.
    pub truncates: u64,
    pub heartbeats: u64,
    /// The end of what PostgreSQL has sent us.
    pub received_lsn: Lsn,
    /// Up to here everything is with the broker, and the slot may forget it.
    pub confirmed_lsn: Lsn,
    /// The end of the source's flushed WAL, sampled every two seconds.
    pub source_lsn: Lsn,
    /// `source_lsn - confirmed_lsn`: what a crash would read again, and the source has to keep.
    pub lag_bytes: u64,
    pub last_commit_at: Option<DateTime<Utc>>,
    /// From commit on the source to the broker's acknowledgement of its last message.
    pub latency: Latency,
    pub slot: Option<SlotHealth>,
    pub snapshot: Option<SnapshotProgress>,
    /// A table that is read again while the stream goes on.
    #[serde(default)]
    pub incremental_snapshot: Option<IncrementalSnapshot>,
    /// Messages that wait for the broker.
    pub queued: u64,
    pub broker_away: bool,
    /// Tables that match a pattern of `cdc.tables` but hold rows from before they were captured, so they are left out.
    pub uncaptured: Vec<String>,
    /// How often the connection to the source or the producer had to be made anew, or a failed task of the connector restarted.
    pub reconnects: u64,
    /// The connector in Kafka Connect; None with the native engine, and while Connect has not answered.
    #[serde(default)]
    pub connector: Option<Connector>,
}

impl Stats {
    /// Events of all tables, without tombstones and boundaries.
    pub fn n_events(&self) -> u64 {
        self.tables.values().map(TableStats::n_events).sum()
    }
}

/// What the capture is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    #[default]
    Connecting,
    Snapshot,
    Streaming,
    Stopped,
}

impl Step {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Snapshot => "snapshot",
            Self::Streaming => "streaming",
            Self::Stopped => "stopped",
        }
    }
}

/// Events of one table since this process started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableStats {
    pub reads: u64,
    pub inserts: u64,
    pub updates: u64,
    pub deletes: u64,
    /// Changes of which only the number is known: Debezium's END does not say what they were.
    #[serde(default)]
    pub changes: u64,
}

impl TableStats {
    pub fn n_events(&self) -> u64 {
        self.reads + self.inserts + self.updates + self.deletes + self.changes
    }
}

/// A connector as Kafka Connect tells of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connector {
    pub name: String,
    /// `RUNNING`, `PAUSED`, `STOPPED`, `FAILED`, `UNASSIGNED` or `RESTARTING`.
    pub state: String,
    /// Why it failed.
    pub trace: Option<String>,
    pub tasks: Vec<ConnectorTask>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectorTask {
    pub id: u32,
    /// As a connector's.
    pub state: String,
    pub worker: String,
    /// The first line of its stack trace, and what that was caused by.
    pub trace: Option<String>,
}

impl Connector {
    /// `RUNNING · task 0 FAILED on 10.0.0.7:8083: …`, one line.
    pub fn shown(&self) -> String {
        let mut text = self.state.clone();
        if let Some(trace) = &self.trace {
            text += &format!(": {trace}");
        }
        for task in &self.tasks {
            text += &format!(" · task {} {} on {}", task.id, task.state, task.worker);
            if let Some(trace) = &task.trace {
                text += &format!(": {trace}");
            }
        }
        if self.tasks.is_empty() { text + " · no task" } else { text }
    }
}

/// The slot as `pg_replication_slots` shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotHealth {
    pub active: bool,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: String,
    pub confirmed_flush_lsn: Lsn,
    pub restart_lsn: Lsn,
    /// WAL that may still be written before the slot is in danger; None where the server sets no limit.
    pub safe_wal_bytes: Option<i64>,
    /// Seconds until then, at the rate of the last minute; None where there is no limit, or while the slot keeps up.
    #[serde(default)]
    pub seconds_left: Option<u64>,
}

impl SlotHealth {
    /// Whether somebody should hear of it: WAL that is not safe any more, or will not be within the hour.
    pub fn in_danger(&self) -> bool {
        const WITHIN: u64 = 3600;
        self.wal_status == "unreserved" || self.seconds_left.is_some_and(|it| it < WITHIN)
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotProgress {
    pub tables: u64,
    pub tables_done: u64,
    pub rows: u64,
    /// What the planner thinks there is.
    pub rows_estimated: u64,
    /// The tables that are being read: with several readers, several.
    #[serde(default)]
    pub reading: Vec<String>,
    pub finished: bool,
    /// At the pace so far; None while that, or how much there is, is not known.
    #[serde(default)]
    pub seconds_left: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncrementalSnapshot {
    /// `public.accounts`.
    pub table: String,
    pub rows: u64,
    /// What the planner thinks there is.
    pub rows_estimated: u64,
    /// As of a snapshot.
    #[serde(default)]
    pub seconds_left: Option<u64>,
}

/// How long it goes on at the pace so far.
pub(super) fn seconds_left(passed: Duration, rows_read: u64, rows_to_read: u64) -> Option<u64> {
    /// The first rows come slower than the rest.
    const PASSED_MIN: Duration = Duration::from_secs(2);
    if passed < PASSED_MIN || rows_read == 0 || rows_to_read == 0 {
        return None;
    }
    let left = passed.as_millis() * u128::from(rows_to_read) / u128::from(rows_read) / 1000;
    u64::try_from(left).ok()
}

/// Milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    pub count: u64,
    pub p50_ms: f64,
    pub p99_ms: f64,
}

impl From<&Histogram> for Latency {
    fn from(histogram: &Histogram) -> Self {
        let milliseconds = |percent| histogram.percentile(percent).map_or(0.0, |it| it.as_secs_f64() * 1000.0);
        Self { count: histogram.count(), p50_ms: milliseconds(50), p99_ms: milliseconds(99) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_is_told_once_there_is_a_pace() {
        let left = |seconds, read, to_read| seconds_left(Duration::from_secs(seconds), read, to_read);
        assert_eq!(left(10, 1_000_000, 4_000_000), Some(40));
        assert_eq!([left(1, 100, 100), left(10, 0, 100), left(10, 100, 0)], [None, None, None]);
    }
}
