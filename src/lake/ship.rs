//! One batch on its way: encode, put the object, put its commit record. Tried until it is done; a batch is never given up.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use chrono::Utc;
use tokio::sync::{Semaphore, watch};
use tracing::{info, warn};

use super::{
    age::Commits,
    batch::Sealed,
    dead::DeadLetter,
    encode,
    error::Error,
    letters::DeadLetters,
    log::{self, Appended, CommitRecord, Stored},
    object::DataKey,
    stats::Stats,
    store::Store,
};
use crate::{
    fault::{Backoff, Diagnose, Fault, chain},
    latency::Histogram,
    stream::Lane,
};

/// What every batch needs on its way. Shared by the lanes.
pub(super) struct Ship {
    pub(super) store: Store,
    pub(super) letters: DeadLetters,
    pub(super) stats: watch::Sender<Stats>,
    /// As many encoders as cores: more would only take memory.
    pub(super) encoders: Semaphore,
}

/// How a batch ended.
pub(super) enum Landing {
    /// Its records exist, by our commit record.
    Landed { stored: Box<Stored>, ages: Box<Ages>, dead_letters: u64 },
    /// Another writer has landed records from the same offset on.
    Another,
}

/// How old the records of an object are when they exist.
#[derive(Debug, Default)]
pub(super) struct Ages {
    /// Since Kafka's timestamp, of each.
    pub(super) since_sent: Histogram,
    /// Since the commit on the source, of a sample.
    pub(super) since_committed: Histogram,
}

/// Waits between tries; the store may be away for hours.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);

impl Ship {
    /// Encodes a batch and puts its object: all that may be done before the batches ahead of it have landed. An error is one
    /// that no repetition mends.
    pub(super) async fn prepare(&self, batch: Sealed, table: String) -> Result<Box<Object>, Error> {
        let object = {
            let _encoder = self.encoders.acquire().await.expect("the semaphore is never closed");
            tokio::task::spawn_blocking(move || Object::new(batch, table)).await??
        };
        if !object.dead.is_empty() {
            let lane = Lane { topic: object.record.topic.as_str().into(), partition: object.record.partition };
            warn!(%lane, dead_letters = object.dead.len(), "records that are no text go to the dead-letter topic");
            self.retried(|| self.letters.send(&lane, &object.dead)).await?;
        }
        self.retried(|| self.store.put(&object.record.data, object.parquet.clone())).await?;
        Ok(Box::new(Object { parquet: Bytes::new(), ..object }))
    }

    /// Makes the records of an object exist, behind the commit record whose hash is `previous`.
    pub(super) async fn commit(&self, object: Box<Object>, previous: Option<String>) -> Result<Landing, Error> {
        let Object { record, timestamps_ms, commits, dead, .. } = *object;
        // Built once: whatever was written by a try whose answer was lost is recognised by its bytes.
        let record = CommitRecord { previous, written_at: Utc::now(), ..record };
        match self.retried(|| log::append(&self.store, &record)).await? {
            Appended::Another(_) => Ok(Landing::Another),
            Appended::Ours(stored) => {
                let now = since_1970();
                let now_us = i64::try_from(now.as_micros()).unwrap_or(i64::MAX);
                let mut ages = Ages { since_sent: Histogram::default(), since_committed: commits.ages(now_us) };
                for timestamp_ms in timestamps_ms {
                    let sent = Duration::from_millis(u64::try_from(timestamp_ms).unwrap_or_default());
                    ages.since_sent.record(now.saturating_sub(sent));
                }
                Ok(Landing::Landed { stored: Box::new(stored), ages: Box::new(ages), dead_letters: dead.len() as u64 })
            }
        }
    }

    /// Tries until it succeeds or until trying makes no sense. Says what it waits for, and when the wait is over.
    pub(super) async fn retried<T, F>(&self, attempt: impl Fn() -> F + Send) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
        let mut failed_at_store = None;
        loop {
            let error = match attempt().await {
                Ok(done) => {
                    if let Some(at_store) = failed_at_store {
                        self.stats.send_modify(|it| *it.trouble(at_store) = None);
                        info!("the other side answers again");
                    }
                    return Ok(done);
                }
                Err(error) => error,
            };
            let remedy = match error.fault() {
                Fault::Transient => String::new(),
                Fault::Operator(remedy) => format!(" ({remedy})"),
                Fault::Data(_) | Fault::Bug => return Err(error),
            };
            let trouble = format!("{}{remedy}", chain(&error));
            let at_store = matches!(error, Error::StoreAway { .. } | Error::StoreRefuses { .. } | Error::BucketGone { .. });
            if failed_at_store.replace(at_store).is_none() {
                warn!(error = trouble, "waiting; what has not landed stays in Kafka");
            }
            self.stats.send_modify(|it| *it.trouble(at_store) = Some(trouble));
            tokio::time::sleep(backoff.delay()).await;
        }
    }
}

/// A batch as it lies in the bucket.
pub(super) struct Object {
    /// Complete but for its place in the chain and the time it is written.
    record: CommitRecord,
    timestamps_ms: Vec<i64>,
    commits: Commits,
    parquet: Bytes,
    dead: Vec<DeadLetter>,
}

impl Object {
    fn new(batch: Sealed, table: String) -> Result<Self, Error> {
        let (timestamp_min, timestamp_max) = batch.timestamps_ms();
        let timestamps_ms = batch.runs.iter().flat_map(|it| it.timestamps_ms.iter().copied()).collect();
        let commits = Commits::of(&batch.runs);
        let (lane, first_offset, last_offset, date) = (batch.lane.clone(), batch.first_offset, batch.last_offset, batch.date);
        let encoded = encode::encode(batch).map_err(|error| Error::Encode(error.into()))?;
        let sha256 = log::sha256_hex(&encoded.parquet);
        let data = DataKey { table, date, partition: lane.partition, first_offset, last_offset, hash: DataKey::hash_of(&sha256) };
        let record = CommitRecord {
            schema: log::SCHEMA,
            topic: lane.topic.to_string(),
            partition: lane.partition,
            first_offset,
            last_offset,
            rows: encoded.rows,
            data: data.to_string(),
            bytes: encoded.parquet.len() as u64,
            sha256,
            timestamp_min,
            timestamp_max,
            previous: None,
            written_at: Utc::now(),
        };
        Ok(Self { record, timestamps_ms, commits, parquet: encoded.parquet, dead: encoded.dead })
    }
}

pub(super) fn now_ms() -> i64 {
    i64::try_from(since_1970().as_millis()).unwrap_or(i64::MAX)
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// What a task of a lane gives back to it.
pub(super) struct Flight {
    pub(super) lane: Lane,
    /// The lane's life to which this flight belongs: a lane that was lost and found again has a new one.
    pub(super) life: u64,
    pub(super) news: News,
}

pub(super) enum News {
    /// The object of the batch with this number is put.
    Prepared(u64, Result<Box<Object>, Error>),
    Committed(Result<Landing, Error>),
}
