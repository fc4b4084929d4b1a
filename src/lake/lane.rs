//! What the sink knows about one lane, and where its reading begins (pure).

use std::collections::VecDeque;

use tokio::task::AbortHandle;

use super::{batch::Sealed, error::Error, log::Stored, ship::Object};
use crate::stream::{Lane, consumer::Facts};

/// A lane's life begins when it is assigned, or found at another place than we thought, and ends the same way.
pub(super) struct LaneState {
    /// The lane's name in the lake.
    pub(super) table: String,
    /// Distinguishes this life of the lane from the ones before: late answers to them are void.
    pub(super) life: u64,
    pub(super) state: State,
    /// Sealed, in order, not yet on their way.
    pub(super) waiting: VecDeque<Sealed>,
    /// On their way, in order: objects may be put at the same time, commit records are chained one by one.
    pub(super) underway: VecDeque<Underway>,
    pub(super) batches: u64,
    /// SHA-256 of the newest commit record.
    pub(super) previous: Option<String>,
    pub(super) landed_offset: Option<i64>,
    /// First offset and end of the broker's log, and when they were asked for.
    pub(super) log: Option<(i64, i64, i64)>,
}

pub(super) enum State {
    /// Its position is being looked for.
    Searching(AbortHandle),
    /// Records with this start number are taken; the next one expected is this.
    Reading { start: u64, next_offset: i64 },
    /// Loudly.
    Stopped(Stopped),
}

/// A batch between being sealed and having landed.
pub(super) struct Underway {
    number: u64,
    rows: usize,
    /// Kafka's timestamp of its first record.
    oldest: i64,
    step: Step,
}

enum Step {
    Preparing,
    Prepared(Box<Object>),
    Committing,
}

/// Objects of one lane that are encoded or put at once: enough to hide the store's answer time, few enough for the memory.
const UNDERWAY_MAX: usize = 3;

/// Why a lane cannot go on without a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stopped {
    pub(super) why: String,
    pub(super) remedy: String,
}

impl Stopped {
    pub(super) fn into_error(self, lane: &Lane) -> Error {
        Error::LaneStopped { lane: lane.to_string(), why: self.why, remedy: self.remedy }
    }
}

impl LaneState {
    pub(super) fn new(table: String, life: u64, search: AbortHandle) -> Self {
        let (state, waiting) = (State::Searching(search), VecDeque::new());
        Self { table, life, state, waiting, underway: VecDeque::new(), batches: 0, previous: None, landed_offset: None, log: None }
    }

    /// The next batch to prepare, and its number, where there is one and one more may be under way.
    pub(super) fn next_to_prepare(&mut self) -> Option<(u64, Sealed)> {
        if self.underway.len() >= UNDERWAY_MAX {
            return None;
        }
        let batch = self.waiting.pop_front()?;
        self.batches += 1;
        self.underway.push_back(Underway { number: self.batches, rows: batch.rows, oldest: oldest(&batch), step: Step::Preparing });
        Some((self.batches, batch))
    }

    pub(super) fn prepared(&mut self, number: u64, object: Box<Object>) {
        if let Some(underway) = self.underway.iter_mut().find(|it| it.number == number) {
            underway.step = Step::Prepared(object);
        }
    }

    /// The oldest batch under way, once it is prepared.
    pub(super) fn next_to_commit(&mut self) -> Option<Box<Object>> {
        let front = self.underway.front_mut()?;
        match std::mem::replace(&mut front.step, Step::Committing) {
            Step::Prepared(object) => Some(object),
            other => {
                front.step = other;
                None
            }
        }
    }

    /// The oldest batch under way has landed.
    pub(super) fn landed(&mut self, stored: Stored) {
        self.underway.pop_front();
        self.landed_offset = Some(stored.record.last_offset + 1);
        self.previous = Some(stored.sha256);
    }

    /// Rows that are sealed and have not landed, batch by batch, with Kafka's timestamp of the first row of each.
    pub(super) fn unlanded(&self) -> impl Iterator<Item = (usize, i64)> {
        self.underway.iter().map(|it| (it.rows, it.oldest)).chain(self.waiting.iter().map(|it| (it.rows, oldest(it))))
    }

    pub(super) fn stop(&mut self, stopped: Stopped) {
        self.waiting.clear();
        self.underway.clear();
        self.state = State::Stopped(stopped);
    }
}

/// Kafka's timestamp of the first record.
fn oldest(batch: &Sealed) -> i64 {
    batch.runs.first().and_then(|it| it.timestamps_ms.first()).copied().unwrap_or_default()
}

/// What was found out about a lane's position.
pub(super) struct Found {
    pub(super) newest: Option<Stored>,
    pub(super) facts: Facts,
}

impl Found {
    /// Where the lane continues: behind the newest commit record, or at the beginning of the log.
    pub(super) fn position(&self) -> Result<i64, Stopped> {
        let Facts { committed, log_start, log_end } = self.facts;
        let Some(newest) = &self.newest else {
            return match committed {
                Some(committed) if committed > 0 && log_start > 0 => Err(Stopped {
                    why: format!(
                        "the bucket has no commit record of it, though its group has landed up to offset {committed}, and the log begins at {log_start} only"
                    ),
                    remedy: "point lake.bucket to the bucket that was used before; or, to land what is left as a new lake, set another lake.group".into(),
                }),
                _ => Ok(log_start),
            };
        };
        let next_offset = newest.record.last_offset + 1;
        in_log(next_offset, log_start, log_end)?;
        Ok(next_offset)
    }
}

/// Whether the record at `next_offset` can still come.
pub(super) fn in_log(next_offset: i64, log_start: i64, log_end: i64) -> Result<(), Stopped> {
    if next_offset > log_end {
        return Err(Stopped {
            why: format!(
                "the lake has landed up to offset {next_offset}, but the log ends at {log_end}: the topic was created anew, or the broker has lost data"
            ),
            remedy: "restore the broker's log; or set a new cdc.topic_prefix (and cdc.slot), and a warehouse.url whose database is empty, so that a new snapshot begins new lanes".into(),
        });
    }
    if next_offset < log_start {
        return Err(Stopped {
            why: format!("the lake continues at offset {next_offset}, but the log begins at {log_start}: retention was faster than the lake"),
            remedy: "the records between are gone from Kafka: raise the topic's retention, then set a new cdc.topic_prefix (and cdc.slot), and a warehouse.url whose database is empty, so that a new snapshot begins new lanes".into(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::lake::log::{CommitRecord, SCHEMA};

    fn landed_up_to(last_offset: i64) -> Stored {
        let record = CommitRecord {
            schema: SCHEMA,
            topic: "t".into(),
            partition: 0,
            first_offset: last_offset - 9,
            last_offset,
            rows: 10,
            data: String::new(),
            bytes: 0,
            sha256: String::new(),
            timestamp_min: 0,
            timestamp_max: 0,
            previous: None,
            written_at: DateTime::UNIX_EPOCH,
        };
        Stored { record, sha256: String::new() }
    }

    fn position(newest: Option<i64>, committed: Option<i64>, log: std::ops::Range<i64>) -> Result<i64, String> {
        let facts = Facts { committed, log_start: log.start, log_end: log.end };
        Found { newest: newest.map(landed_up_to), facts }.position().map_err(|it| it.why)
    }

    #[test]
    fn the_lake_owns_the_position_whatever_the_group_says() {
        assert_eq!(position(Some(99), Some(40), 0..500), Ok(100));
        assert_eq!(position(Some(99), None, 100..100), Ok(100));
        assert_eq!(position(None, None, 7..500), Ok(7));
        assert_eq!(position(None, Some(300), 0..500), Ok(0), "an empty bucket is filled again while the log is whole");
    }

    #[test]
    fn a_position_outside_the_log_stops_the_lane() {
        assert!(position(Some(99), Some(100), 0..50).is_err_and(|it| it.contains("created anew")));
        assert!(position(Some(99), Some(100), 101..500).is_err_and(|it| it.contains("retention")));
        assert!(position(None, Some(300), 200..500).is_err_and(|it| it.contains("no commit record")));
    }
}
