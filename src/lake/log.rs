//! Commit records: the moment an object's records exist. Written once, chained by hash, one chain per lane.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use sha2::{Digest as _, Sha256};

use super::{
    error::Error,
    object::{LOG_PREFIX, LogKey, log_prefix},
    store::{Listed, Page, Put, Store},
};
use crate::stream::Lane;

/// The commit record of one data object, in the order of its keys in JSON.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CommitRecord {
    pub schema: u32,
    pub topic: String,
    pub partition: i32,
    /// Continues the record before it.
    pub first_offset: i64,
    pub last_offset: i64,
    /// Less than the range holds only where the log has holes, or where records became dead letters.
    pub rows: u64,
    /// Key of the data object.
    pub data: String,
    pub bytes: u64,
    /// Of the data object, in hex.
    pub sha256: String,
    /// Kafka's timestamps, milliseconds since 1970 UTC.
    pub timestamp_min: i64,
    pub timestamp_max: i64,
    /// SHA-256 of the bytes of the commit record before this one; null at the beginning of a chain.
    pub previous: Option<String>,
    pub written_at: DateTime<Utc>,
}

/// Version of the format, in every commit record.
pub const SCHEMA: u32 = 1;

impl CommitRecord {
    pub fn key(&self) -> String {
        LogKey { topic: self.topic.clone(), partition: self.partition, first_offset: self.first_offset }.to_string()
    }

    pub fn to_bytes(&self) -> Bytes {
        serde_json::to_vec(self).expect("plain values always serialise").into()
    }

    /// Offsets of the range that have no row.
    pub fn holes(&self) -> u64 {
        let range = u64::try_from(self.last_offset - self.first_offset + 1).unwrap_or_default();
        range.saturating_sub(self.rows)
    }
}

/// A commit record as it is stored: the next one chains on the hash of these bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub record: CommitRecord,
    /// SHA-256 of the stored bytes in hex.
    pub sha256: String,
}

impl Stored {
    pub fn read(key: &str, bytes: &[u8]) -> Result<Self, Error> {
        let record = serde_json::from_slice(bytes).map_err(|source| Error::UnreadableCommitRecord { key: key.to_owned(), source })?;
        Ok(Self { record, sha256: sha256_hex(bytes) })
    }
}

pub fn sha256_hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// What became of an append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Appended {
    /// Our record is the one that is stored, by this try or an earlier one whose answer was lost.
    Ours(Stored),
    /// Another writer was first: this is its record.
    Another(Stored),
}

/// Writes a commit record, once. The records of its data object exist from here on.
pub async fn append(store: &Store, record: &CommitRecord) -> Result<Appended, Error> {
    let (key, bytes) = (record.key(), record.to_bytes());
    if store.put_if_absent(&key, bytes.clone()).await? == Put::Written {
        return Ok(Appended::Ours(Stored { record: record.clone(), sha256: sha256_hex(&bytes) }));
    }
    let stored_bytes = store.get(&key).await?.ok_or_else(|| Error::Missing(key.clone()))?;
    let stored = Stored::read(&key, &stored_bytes)?;
    Ok(if stored_bytes == bytes { Appended::Ours(stored) } else { Appended::Another(stored) })
}

/// The newest commit record of a lane, or None where nothing has landed.
///
/// `hint` is an offset near which to look (the group's committed offset); right or wrong, the answer is the same. Costs a number
/// of listings that grows with the logarithm of the lane's length at worst: one or two with a good hint.
pub async fn newest(store: &Store, topic: &str, partition: i32, hint: Option<i64>) -> Result<Option<Stored>, Error> {
    let prefix = log_prefix(topic, partition);
    let from = |offset: i64| {
        let (prefix, start_after) = (&prefix, LogKey::just_before(topic, partition, offset));
        async move { store.list(prefix, Some(&start_after), usize::MAX).await }
    };
    match newest_key(from, hint.unwrap_or_default().max(0)).await? {
        Some(key) => fetch(store, &key).await.map(Some),
        None => Ok(None),
    }
}

/// Finds the last of the sorted keys; `from` lists a page of those that start at an offset or later.
async fn newest_key<F>(from: impl Fn(i64) -> F + Send, hint: i64) -> Result<Option<String>, Error>
where
    F: Future<Output = Result<Page, Error>> + Send,
{
    // No record starts at `high` or later. Back from the hint, in growing steps, to where any is.
    let (mut high, mut probe, mut step) = (i64::MAX, hint, 1_i64);
    let mut page = from(probe).await?;
    while page.objects.is_empty() {
        if probe == 0 {
            return Ok(None);
        }
        high = probe;
        probe = probe.saturating_sub(step).max(0);
        step = step.saturating_mul(4);
        page = from(probe).await?;
    }
    // Forward while more lies behind the page: a stale hint, or none.
    let mut step = 1_i64;
    while let Some(last) = page.objects.pop() {
        if !page.truncated {
            return Ok(Some(last.key));
        }
        let low = last.key.parse::<LogKey>()?.first_offset;
        loop {
            step = step.saturating_mul(4).min((high - low) / 2).max(1);
            let next_page = from(low.saturating_add(step)).await?;
            if !next_page.objects.is_empty() || step == 1 {
                page = next_page;
                break;
            }
            high = low + step;
        }
    }
    Ok(None)
}

/// Commit records that continue `last_offset` (from the lane's beginning where it is None), in order, at most `limit`.
/// Refuses a chain with a gap rather than skip it.
pub async fn after(store: &Store, topic: &str, partition: i32, last_offset: Option<i64>, limit: usize) -> Result<Vec<CommitRecord>, Error> {
    let first_offset = last_offset.map_or(0, |it| it + 1);
    let keys = keys_from(store, topic, partition, first_offset, limit).await?;
    let records: Vec<CommitRecord> =
        stream::iter(keys).map(|it| async move { fetch(store, &it.key).await.map(|it| it.record) }).buffered(READ_AHEAD).try_collect().await?;
    let mut expected = last_offset.map(|it| it + 1);
    for record in &records {
        if expected.is_some_and(|it| it != record.first_offset) {
            return Err(Error::BrokenChain { key: record.key() });
        }
        expected = Some(record.last_offset + 1);
    }
    Ok(records)
}

/// Requests under way at once where many small objects are read.
pub(super) const READ_AHEAD: usize = 16;

/// Keys of the lane's commit records that start at this offset or later, at most `limit`.
pub(super) async fn keys_from(store: &Store, topic: &str, partition: i32, first_offset: i64, limit: usize) -> Result<Vec<Listed>, Error> {
    let (prefix, mut start_after) = (log_prefix(topic, partition), LogKey::just_before(topic, partition, first_offset));
    let mut keys = Vec::new();
    while keys.len() < limit {
        let page = store.list(&prefix, Some(&start_after), limit - keys.len()).await?;
        let Some(last) = page.objects.last() else { break };
        start_after.clone_from(&last.key);
        keys.extend(page.objects);
        if !page.truncated {
            break;
        }
    }
    Ok(keys)
}

pub(super) async fn fetch(store: &Store, key: &str) -> Result<Stored, Error> {
    let bytes = store.get(key).await?.ok_or_else(|| Error::Missing(key.to_owned()))?;
    Stored::read(key, &bytes)
}

/// Every lane that has a commit record.
pub async fn lanes(store: &Store) -> Result<Vec<Lane>, Error> {
    let mut lanes = Vec::new();
    for topic_prefix in store.list_prefixes(LOG_PREFIX).await? {
        let topic = topic_prefix.trim_start_matches(LOG_PREFIX).trim_end_matches('/');
        for lane_prefix in store.list_prefixes(&topic_prefix).await? {
            let partition = lane_prefix.trim_start_matches(&topic_prefix).trim_end_matches('/').parse();
            let partition = partition.map_err(|_| super::object::ForeignKey(lane_prefix.clone()))?;
            lanes.push(Lane { topic: topic.into(), partition });
        }
    }
    lanes.sort();
    Ok(lanes)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        sync::atomic::{AtomicU32, Ordering},
    };

    use proptest::prelude::*;

    use super::*;

    const PAGE: usize = 3;

    /// The newest key and the number of listings it took.
    fn search(starts: &BTreeSet<i64>, hint: i64) -> (Option<String>, u32) {
        let listings = AtomicU32::new(0);
        let from = |offset: i64| {
            listings.fetch_add(1, Ordering::Relaxed);
            let found: Vec<i64> = starts.range(offset..).take(PAGE + 1).copied().collect();
            let key = |first_offset: &i64| LogKey { topic: "t".into(), partition: 0, first_offset: *first_offset }.to_string();
            let objects = found.iter().take(PAGE).map(|it| Listed { key: key(it), bytes: 1 }).collect();
            std::future::ready(Ok(Page { objects, prefixes: Vec::new(), truncated: found.len() > PAGE }))
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let newest = runtime.block_on(newest_key(from, hint)).expect("no store, no failure");
        (newest, listings.into_inner())
    }

    proptest! {
        #[test]
        fn the_newest_record_is_found_from_any_hint(starts in prop::collection::btree_set(0_i64..100_000, 0..200), hint in 0_i64..200_000) {
            let (newest, _) = search(&starts, hint);
            let expected = starts.last().map(|it| LogKey { topic: "t".into(), partition: 0, first_offset: *it }.to_string());
            prop_assert_eq!(newest, expected);
        }

        #[test]
        fn finding_the_position_does_not_grow_with_history(n_records in 1_000_i64..200_000, rows in 1_i64..5_000) {
            let starts: BTreeSet<i64> = (0..n_records).map(|it| it * rows).collect();
            let (_, with_hint) = search(&starts, n_records * rows);
            prop_assert!(with_hint <= 20, "{} listings with the right hint", with_hint);
            let (_, without_hint) = search(&starts, 0);
            prop_assert!(without_hint <= 80, "{} listings without a hint", without_hint);
        }
    }

    fn record() -> CommitRecord {
        CommitRecord {
            schema: SCHEMA,
            topic: "bank.public.customers".into(),
            partition: 0,
            first_offset: 10,
            last_offset: 19,
            rows: 9,
            data: "raw/customers/dt=2026-11-22/p=0/x.parquet".into(),
            bytes: 4_096,
            sha256: "ab".into(),
            timestamp_min: 1,
            timestamp_max: 2,
            previous: None,
            written_at: DateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn a_commit_record_is_spelt_as_the_contract_says() {
        let bytes = record().to_bytes();
        assert_eq!(
            std::str::from_utf8(&bytes).expect("JSON"),
            "{\"schema\":1,\"topic\":\"bank.public.customers\",\"partition\":0,\"first_offset\":10,\"last_offset\":19,\"rows\":9,\
             \"data\":\"raw/customers/dt=2026-11-22/p=0/x.parquet\",\"bytes\":4096,\"sha256\":\"ab\",\"timestamp_min\":1,\"timestamp_max\":2,\
             \"previous\":null,\"written_at\":\"1970-01-01T00:00:00Z\"}"
        );
        assert_eq!(record().key(), "_log/bank.public.customers/0/00000000000000000010.json");
        assert_eq!(record().holes(), 1);
        assert_eq!(Stored::read("key", &bytes).expect("readable").record, record());
    }
}
