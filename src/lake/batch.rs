//! Open batches, one per lane, sealed by rows, bytes, age, or a new UTC date. Pure: the time comes in as an argument.

use std::{collections::BTreeMap, time::Duration};

use chrono::NaiveDate;
use tokio::time::Instant;

use super::object::date_of;
use crate::stream::{Lane, records::Records};

/// When a batch is complete, whichever comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub rows_max: usize,
    /// Keys and values before compression. One larger record makes a batch of its own.
    pub bytes_max: u64,
    /// All open batches together; beyond it the largest is sealed early, so that many lanes share a bounded memory.
    pub open_bytes_max: u64,
    /// Wall-clock time since the first record came in, so that a quiet lane lands too.
    pub age_max: Duration,
}

/// Runs smaller than this are joined with the run before them.
const SMALL_RUN_BYTES: u64 = 256 * 1024;

/// A batch that takes no more records: the next object of its lane.
#[derive(Debug)]
pub struct Sealed {
    pub lane: Lane,
    /// Continues the batch before it, also where the log has a hole there.
    pub first_offset: i64,
    pub last_offset: i64,
    pub date: NaiveDate,
    pub rows: usize,
    pub runs: Vec<Records>,
}

impl Sealed {
    /// Kafka's timestamps lie in this range, milliseconds.
    pub fn timestamps_ms(&self) -> (i64, i64) {
        let all = || self.runs.iter().flat_map(|it| it.timestamps_ms.iter().copied());
        (all().min().unwrap_or_default(), all().max().unwrap_or_default())
    }
}

#[derive(Debug)]
struct Open {
    opened_at: Instant,
    date: NaiveDate,
    rows: usize,
    bytes: u64,
    runs: Vec<Records>,
}

#[derive(Debug)]
struct Filling {
    /// Where the next batch of the lane begins.
    next_offset: i64,
    open: Option<Open>,
}

/// All open batches. A record that comes in leaves in exactly one sealed batch, or with [`Batches::forget`].
#[derive(Debug)]
pub struct Batches {
    limits: Limits,
    lanes: BTreeMap<Lane, Filling>,
}

impl Batches {
    pub fn new(limits: Limits) -> Self {
        Self { limits, lanes: BTreeMap::new() }
    }

    /// The lane's next batch begins at this offset; an open batch of it is dropped.
    pub fn begin(&mut self, lane: Lane, next_offset: i64) {
        self.lanes.insert(lane, Filling { next_offset, open: None });
    }

    /// Drops what is open of a lane that is ours no more: it will be read again.
    pub fn forget(&mut self, lane: &Lane) {
        self.lanes.remove(lane);
    }

    /// Takes records of a lane that has begun (others are dropped) and returns the batches they complete.
    pub fn push(&mut self, lane: &Lane, records: Records, now: Instant) -> Vec<Sealed> {
        let mut sealed = Vec::new();
        let Some(filling) = self.lanes.get_mut(lane) else { return sealed };
        let mut rest = records;
        while !rest.is_empty() {
            let n_rows = filling.fits(&rest, &self.limits);
            if n_rows == 0 {
                sealed.extend(filling.seal(lane));
                continue;
            }
            let behind = rest.split_off_if_needed(n_rows);
            filling.take(rest, now);
            if filling.is_complete(&self.limits) {
                sealed.extend(filling.seal(lane));
            }
            rest = behind;
        }
        sealed.extend(self.seal_largest());
        sealed
    }

    fn seal_largest(&mut self) -> Option<Sealed> {
        let open_bytes = |it: &Filling| it.open.as_ref().map_or(0, |open| open.bytes);
        let total: u64 = self.lanes.values().map(open_bytes).sum();
        let (lane, largest) = self.lanes.iter_mut().max_by_key(|(_, it)| open_bytes(it))?;
        if total > self.limits.open_bytes_max { largest.seal(lane) } else { None }
    }

    /// When the oldest open batch has to be sealed.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.lanes.values().filter_map(|it| it.open.as_ref()).map(|it| it.opened_at + self.limits.age_max).min()
    }

    pub fn take_due(&mut self, now: Instant) -> Vec<Sealed> {
        let age_max = self.limits.age_max;
        self.take_where(|open| open.opened_at + age_max <= now)
    }

    pub fn take_all(&mut self) -> Vec<Sealed> {
        self.take_where(|_| true)
    }

    fn take_where(&mut self, wanted: impl Fn(&Open) -> bool) -> Vec<Sealed> {
        let due = self.lanes.iter_mut().filter(|(_, it)| it.open.as_ref().is_some_and(&wanted));
        due.filter_map(|(lane, it)| it.seal(lane)).collect()
    }

    /// Rows of the lane's open batch and Kafka's timestamp of the first of them.
    pub fn open(&self, lane: &Lane) -> Option<(usize, i64)> {
        let open = self.lanes.get(lane)?.open.as_ref()?;
        Some((open.rows, *open.runs.first()?.timestamps_ms.first()?))
    }
}

impl Filling {
    /// How many rows of the run belong into the open batch (or a new one).
    fn fits(&self, run: &Records, limits: &Limits) -> usize {
        let (date, rows, bytes) = match &self.open {
            Some(open) => (open.date, open.rows, open.bytes),
            None => (date_of(run.timestamps_ms[0]), 0, 0),
        };
        let mut filled = bytes;
        for row in 0..run.len() {
            filled += run.row_bytes(row);
            let first = rows + row == 0;
            if !first && (rows + row >= limits.rows_max || filled > limits.bytes_max || date_of(run.timestamps_ms[row]) != date) {
                return row;
            }
        }
        run.len()
    }

    fn take(&mut self, run: Records, now: Instant) {
        let date = date_of(run.timestamps_ms[0]);
        let open = self.open.get_or_insert_with(|| Open { opened_at: now, date, rows: 0, bytes: 0, runs: Vec::new() });
        open.rows += run.len();
        open.bytes += run.bytes();
        match open.runs.last_mut() {
            Some(last) if last.bytes() + run.bytes() <= SMALL_RUN_BYTES => last.append(run),
            _ => open.runs.push(run),
        }
    }

    fn is_complete(&self, limits: &Limits) -> bool {
        self.open.as_ref().is_some_and(|it| it.rows >= limits.rows_max || it.bytes >= limits.bytes_max)
    }

    fn seal(&mut self, lane: &Lane) -> Option<Sealed> {
        let Open { date, rows, runs, .. } = self.open.take()?;
        let last_offset = *runs.last()?.offsets.last()?;
        let first_offset = std::mem::replace(&mut self.next_offset, last_offset + 1);
        Some(Sealed { lane: lane.clone(), first_offset, last_offset, date, rows, runs })
    }
}

impl Records {
    /// Splitting copies, so a run that goes whole is not split.
    fn split_off_if_needed(&mut self, n_rows: usize) -> Self {
        if n_rows == self.len() { Self::default() } else { self.split_off(n_rows) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DAY_MS: i64 = 86_400_000;

    fn lane() -> Lane {
        Lane { topic: "bank.public.transactions".into(), partition: 0 }
    }

    fn limits(rows_max: usize, bytes_max: u64) -> Limits {
        Limits { rows_max, bytes_max, open_bytes_max: u64::MAX, age_max: Duration::from_secs(5) }
    }

    fn run(offsets: &[i64], timestamp_ms: impl Fn(i64) -> i64) -> Records {
        let mut records = Records::default();
        for offset in offsets {
            records.push(*offset, timestamp_ms(*offset), Some(b"key"), Some(b"value"));
        }
        records
    }

    proptest! {
        #[test]
        fn every_offset_lands_in_exactly_one_object(
            steps in prop::collection::vec((1_i64..4, 0_i64..2 * DAY_MS), 0..300),
            run_rows in 1_usize..40, rows_max in 1_usize..50, bytes_max in 1_u64..400,
        ) {
            // Steps above 1 are holes in the log; timestamps jump to and fro over midnights.
            let mut offset = 9;
            let log: Vec<(i64, i64)> = steps.iter().map(|(step, clock)| { offset += step; (offset, *clock) }).collect();
            let mut batches = Batches::new(limits(rows_max, bytes_max));
            batches.begin(lane(), 10);
            let mut sealed = Vec::new();
            for records in log.chunks(run_rows) {
                let mut run = Records::default();
                records.iter().for_each(|(offset, clock)| run.push(*offset, *clock, None, Some(b"0123456789")));
                sealed.extend(batches.push(&lane(), run, Instant::now()));
            }
            sealed.extend(batches.take_all());

            let mut next_offset = 10;
            for batch in &sealed {
                prop_assert_eq!(batch.first_offset, next_offset, "ranges continue each other");
                next_offset = batch.last_offset + 1;
                prop_assert!(batch.rows <= rows_max);
                let bytes: u64 = batch.runs.iter().map(Records::bytes).sum();
                prop_assert!(bytes <= bytes_max || batch.rows == 1);
                prop_assert!(batch.runs.iter().flat_map(|it| &it.timestamps_ms).all(|it| date_of(*it) == batch.date));
                prop_assert_eq!(batch.runs.iter().map(Records::len).sum::<usize>(), batch.rows);
            }
            let landed: Vec<i64> = sealed.iter().flat_map(|it| it.runs.iter().flat_map(|run| run.offsets.clone())).collect();
            prop_assert_eq!(landed, log.iter().map(|it| it.0).collect::<Vec<_>>());
            prop_assert_eq!(batches.next_deadline(), None);
        }
    }

    #[test]
    fn a_quiet_lane_is_sealed_by_age() {
        let mut batches = Batches::new(limits(1_000, 1_000_000));
        batches.begin(lane(), 0);
        let opened_at = Instant::now();
        assert!(batches.push(&lane(), run(&[0, 1], |_| 0), opened_at).is_empty());
        assert!(batches.push(&lane(), run(&[2], |_| 0), opened_at + Duration::from_secs(4)).is_empty());
        assert_eq!(batches.open(&lane()), Some((3, 0)));

        let due_at = batches.next_deadline().expect("a batch is open");
        assert_eq!(due_at, opened_at + Duration::from_secs(5));
        assert!(batches.take_due(due_at - Duration::from_millis(1)).is_empty());
        let sealed = batches.take_due(due_at);

        assert_eq!((sealed.len(), sealed[0].first_offset, sealed[0].last_offset), (1, 0, 2));
    }

    #[test]
    fn many_lanes_share_a_bounded_memory() {
        let mut batches = Batches::new(Limits { open_bytes_max: 100, ..limits(1_000, 1_000_000) });
        let lanes: Vec<Lane> = (0..10).map(|partition| Lane { partition, ..lane() }).collect();
        lanes.iter().for_each(|it| batches.begin(it.clone(), 0));
        let mut sealed = Vec::new();
        for offset in 0..10 {
            for lane in &lanes {
                sealed.extend(batches.push(lane, run(&[offset], |_| 0), Instant::now()));
                let open: usize = lanes.iter().filter_map(|it| batches.open(it)).map(|(rows, _)| rows).sum();
                assert!(open * 8 <= 100, "{open} rows of 8 bytes are open");
            }
        }
        sealed.extend(batches.take_all());
        assert_eq!(sealed.iter().map(|it| it.rows).sum::<usize>(), 100);
    }

    #[test]
    fn a_new_date_begins_a_new_object() {
        let mut batches = Batches::new(limits(1_000, 1_000_000));
        batches.begin(lane(), 0);
        let sealed = batches.push(&lane(), run(&[0, 1, 2], |offset| if offset < 2 { DAY_MS - 1 } else { DAY_MS }), Instant::now());
        assert_eq!(sealed.iter().map(|it| (it.first_offset, it.last_offset, it.date.to_string())).collect::<Vec<_>>(), [(0, 1, "1970-01-01".to_owned())]);
    }

    #[test]
    fn a_revoked_lane_drops_its_open_batch() {
        let mut batches = Batches::new(limits(1_000, 1_000_000));
        batches.begin(lane(), 0);
        batches.push(&lane(), run(&[0, 1], |_| 0), Instant::now());

        batches.forget(&lane());
        assert!(batches.push(&lane(), run(&[2], |_| 0), Instant::now()).is_empty());

        assert!(batches.take_all().is_empty());
    }
}
