//! A run of records of one lane, column by column: what the consumer hands over instead of a million small allocations.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Texts or nulls in one buffer: row `n` is the `lengths[n]` bytes behind those of the rows before it.
#[derive(Debug, Default, PartialEq)]
pub struct Column {
    pub bytes: Vec<u8>,
    pub lengths: Vec<u32>,
    pub present: Vec<bool>,
}

impl Column {
    pub fn push(&mut self, text: Option<&[u8]>) {
        let bytes = text.unwrap_or_default();
        self.bytes.extend_from_slice(bytes);
        self.lengths.push(u32::try_from(bytes.len()).expect("a Kafka message is smaller than 2 GiB"));
        self.present.push(text.is_some());
    }

    /// The rows in order; None for a null.
    pub fn rows(&self) -> impl Iterator<Item = Option<&[u8]>> {
        let mut first_byte = 0;
        self.lengths.iter().zip(&self.present).map(move |(length, present)| {
            let text = &self.bytes[first_byte..first_byte + *length as usize];
            first_byte += text.len();
            present.then_some(text)
        })
    }

    fn append(&mut self, other: &Self) {
        self.bytes.extend_from_slice(&other.bytes);
        self.lengths.extend_from_slice(&other.lengths);
        self.present.extend_from_slice(&other.present);
    }

    fn split_off(&mut self, n_rows: usize) -> Self {
        let n_bytes: usize = self.lengths[..n_rows].iter().map(|it| *it as usize).sum();
        Self { bytes: self.bytes.split_off(n_bytes), lengths: self.lengths.split_off(n_rows), present: self.present.split_off(n_rows) }
    }
}

/// Records of one lane in the order of its log; offsets rise, with holes only where the log has holes.
#[derive(Debug, Default)]
pub struct Records {
    pub offsets: Vec<i64>,
    /// Kafka's timestamps, milliseconds since 1970 UTC.
    pub timestamps_ms: Vec<i64>,
    pub keys: Column,
    /// A null is a tombstone.
    pub values: Column,
    lease: Option<Lease>,
}

impl Records {
    pub fn push(&mut self, offset: i64, timestamp_ms: i64, key: Option<&[u8]>, value: Option<&[u8]>) {
        self.offsets.push(offset);
        self.timestamps_ms.push(timestamp_ms);
        self.keys.push(key);
        self.values.push(value);
    }

    pub fn len(&self) -> usize {
        self.offsets.len()
    }

    pub fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    /// Keys and values together.
    pub fn bytes(&self) -> u64 {
        self.keys.bytes.len() as u64 + self.values.bytes.len() as u64
    }

    /// Bytes of key and value of one row.
    pub fn row_bytes(&self, row: usize) -> u64 {
        u64::from(self.keys.lengths[row]) + u64::from(self.values.lengths[row])
    }

    /// Counts these records against a budget until they are dropped.
    pub fn lease_from(&mut self, budget: &Arc<Budget>) {
        self.lease = Some(budget.lease(self.cost()));
    }

    /// Takes over the rows behind `n_rows`, and their share of what is leased.
    #[must_use]
    pub fn split_off(&mut self, n_rows: usize) -> Self {
        let mut behind = Self {
            offsets: self.offsets.split_off(n_rows),
            timestamps_ms: self.timestamps_ms.split_off(n_rows),
            keys: self.keys.split_off(n_rows),
            values: self.values.split_off(n_rows),
            lease: None,
        };
        let behind_bytes = behind.cost();
        behind.lease = self.lease.as_mut().map(|it| it.split_off(behind_bytes));
        behind
    }

    /// Appends a small run by copying, so that a slow lane does not hold thousands of one-row buffers.
    pub fn append(&mut self, other: Self) {
        self.offsets.extend_from_slice(&other.offsets);
        self.timestamps_ms.extend_from_slice(&other.timestamps_ms);
        self.keys.append(&other.keys);
        self.values.append(&other.values);
        match (&mut self.lease, other.lease) {
            (Some(mine), Some(theirs)) => mine.merge(theirs),
            (mine @ None, theirs) => *mine = theirs,
            (Some(_), None) => {}
        }
    }

    fn cost(&self) -> u64 {
        self.bytes() + ROW_OVERHEAD * self.len() as u64
    }
}

/// Offset, timestamp, lengths and flags of one row.
const ROW_OVERHEAD: u64 = 26;

/// How many bytes of records may be in memory at once, from the consumer to the encoder.
#[derive(Debug)]
pub struct Budget {
    bytes_max: u64,
    used: AtomicU64,
}

impl Budget {
    pub fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Self { bytes_max, used: AtomicU64::new(0) })
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub fn is_full(&self) -> bool {
        self.used() >= self.bytes_max
    }

    /// At least half of it is free.
    pub fn is_roomy(&self) -> bool {
        self.used() <= self.bytes_max / 2
    }

    fn lease(self: &Arc<Self>, bytes: u64) -> Lease {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        Lease { bytes, budget: Arc::clone(self) }
    }
}

/// Bytes counted against a budget until dropped.
#[derive(Debug)]
struct Lease {
    bytes: u64,
    budget: Arc<Budget>,
}

impl Lease {
    fn split_off(&mut self, bytes: u64) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self { bytes, budget: Arc::clone(&self.budget) }
    }

    /// Both are of the one budget that a consumer has.
    fn merge(&mut self, mut other: Self) {
        self.bytes += std::mem::take(&mut other.bytes);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Text = Option<Vec<u8>>;

    fn records(rows: &[(Text, Text)]) -> Records {
        let mut records = Records::default();
        for (offset, (key, value)) in (0..).zip(rows) {
            records.push(offset, 1_000 + offset, key.as_deref(), value.as_deref());
        }
        records
    }

    fn rows(records: &Records) -> Vec<(i64, i64, Text, Text)> {
        let texts = records.keys.rows().zip(records.values.rows());
        let clocks = records.offsets.iter().zip(&records.timestamps_ms);
        clocks.zip(texts).map(|((offset, clock), (key, value))| (*offset, *clock, key.map(Into::into), value.map(Into::into))).collect()
    }

    proptest! {
        #[test]
        fn a_run_split_and_joined_is_the_same_run(
            all in prop::collection::vec(any::<(Text, Text)>(), 1..20), place in any::<prop::sample::Index>(),
        ) {
            let budget = Budget::new(1);
            let mut front = records(&all);
            front.lease_from(&budget);
            let leased = budget.used();
            let back = front.split_off(place.index(all.len()));
            prop_assert_eq!((leased, budget.used()), (front.cost() + back.cost(), leased));

            front.append(back);

            prop_assert_eq!(rows(&front), rows(&records(&all)));
            drop(front);
            prop_assert_eq!(budget.used(), 0);
        }
    }
}
