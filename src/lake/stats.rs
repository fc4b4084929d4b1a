//! What the console may know about the lake: plain data, cheap to clone.

use std::collections::{BTreeMap, VecDeque};

use crate::{latency::Histogram, stage::Phase};

/// Counts since this stage started; positions as they are.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Stats {
    pub phase: Phase,
    /// By the table's name in the lake.
    pub tables: BTreeMap<String, TableStats>,
    /// Assigned lanes, ordered by topic and partition.
    pub lanes: Vec<LaneStats>,
    /// The newest objects, newest first.
    pub newest: VecDeque<NewObject>,
    /// Kafka's timestamp → commit record written, per record: this stage's own share of the way.
    pub landing: Histogram,
    /// Commit on the source → commit record written: the way so far, sampled over the records (`age.rs`).
    pub commit_to_landed: Histogram,
    /// Keys and values in memory, from the consumer to the encoder.
    pub open_bytes: u64,
    /// Commit records that another writer had written first.
    pub races: u64,
    /// What the store answers while objects wait for it; None where all is well.
    pub store_trouble: Option<String>,
    pub kafka_trouble: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TableStats {
    pub objects: u64,
    pub records: u64,
    /// Of the data objects, compressed.
    pub bytes: u64,
    pub dead_letters: u64,
    /// Read and not landed yet.
    pub open_records: u64,
    /// Kafka's timestamp of the oldest record read and not landed, milliseconds: its age is now minus this.
    pub oldest_unlanded_ms: Option<i64>,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LaneStats {
    pub topic: String,
    pub partition: i32,
    pub table: String,
    /// The lake has every record before this offset; None until the position is found.
    pub landed_offset: Option<i64>,
    /// The log's end when it was last asked for, and when that was (milliseconds since 1970 UTC).
    pub end_offset: Option<i64>,
    pub end_seen_ms: Option<i64>,
    /// Why the lane is stopped, and what to do.
    pub trouble: Option<String>,
}

impl LaneStats {
    /// Offsets between what has landed and the log's end, as of `end_seen_ms`.
    pub fn lag(&self) -> Option<u64> {
        Some(u64::try_from(self.end_offset? - self.landed_offset?).unwrap_or_default())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct NewObject {
    pub table: String,
    pub key: String,
    pub rows: u64,
    pub bytes: u64,
    pub landed_at_ms: i64,
}

impl Stats {
    /// Newest objects kept for the screen.
    pub(super) const NEWEST: usize = 20;

    pub(super) fn trouble(&mut self, at_store: bool) -> &mut Option<String> {
        if at_store { &mut self.store_trouble } else { &mut self.kafka_trouble }
    }

    /// Offsets not landed yet in all lanes. None until every lane's position and end are known.
    pub fn lag(&self) -> Option<u64> {
        self.lanes.iter().map(LaneStats::lag).sum()
    }
}
