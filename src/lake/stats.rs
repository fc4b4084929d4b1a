//! What the console may know about the lake: plain data, cheap to clone.

use std::collections::{BTreeMap, VecDeque};

use crate::stage::Phase;

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
    /// Kafka's timestamp → commit record written, per record.
    pub landing: Latency,
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

/// A histogram of milliseconds: four buckets per doubling, so a quantile is right within 19 %.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Latency {
    counts: Vec<u64>,
}

impl Latency {
    /// About two years; what takes longer counts as that.
    const BUCKETS: usize = 4 * 36;

    pub fn add(&mut self, milliseconds: u64) {
        let bucket = Self::bucket(milliseconds);
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
    }

    pub fn merge(&mut self, other: &Self) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        self.counts.iter_mut().zip(&other.counts).for_each(|(mine, theirs)| *mine += theirs);
    }

    /// What was added since an earlier copy of this histogram.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = earlier.counts.iter().copied().chain(std::iter::repeat(0));
        Self { counts: self.counts.iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect() }
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The upper bound of the bucket that holds the given percentile, in milliseconds. None where nothing was added.
    pub fn percentile_ms(&self, percent: u64) -> Option<u64> {
        let rank = (self.count() * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(Self::upper_bound(bucket))
    }

    fn bucket(milliseconds: u64) -> usize {
        if milliseconds < 4 {
            return usize::try_from(milliseconds).unwrap_or_default();
        }
        let doubling = milliseconds.ilog2();
        let quarter = (milliseconds >> (doubling - 2)) & 3;
        usize::try_from(u64::from(doubling - 1) * 4 + quarter).unwrap_or(Self::BUCKETS).min(Self::BUCKETS - 1)
    }

    fn upper_bound(bucket: usize) -> u64 {
        if bucket < 4 {
            return bucket as u64;
        }
        let (doubling, quarter) = (bucket / 4 + 1, bucket as u64 % 4);
        ((4 + quarter + 1) << (doubling - 2)) - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_percentile_is_right_within_a_fifth(milliseconds in 0_u64..100_000_000) {
            let mut latency = Latency::default();
            latency.add(milliseconds);
            let told = latency.percentile_ms(99).expect("one sample");
            prop_assert!(told >= milliseconds && told <= milliseconds + milliseconds / 4, "{} for {}", told, milliseconds);
        }
    }

    #[test]
    fn percentiles_split_the_samples() {
        let mut latency = Latency::default();
        (0..99).for_each(|_| latency.add(2));
        let before = latency.clone();
        latency.add(3_000);
        assert_eq!((latency.percentile_ms(50), latency.percentile_ms(99)), (Some(2), Some(2)));
        assert_eq!(latency.percentile_ms(100), Some(3_071));
        assert_eq!(latency.since(&before).count(), 1);
        assert_eq!(Latency::default().percentile_ms(50), None);
    }
}
