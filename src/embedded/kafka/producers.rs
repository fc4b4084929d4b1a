//! What a partition remembers of its idempotent producers: their last five batches (pure).
//!
//! A batch sent twice is stored once, a batch that skips one is refused, and a producer with an old epoch is fenced.

use std::collections::{BTreeMap, VecDeque};

use kafka_protocol::ResponseError;

use super::batch::Header;

/// Kafka's own figure: a client may have up to five batches in flight and still be told duplicates apart.
const REMEMBERED_BATCHES: usize = 5;
/// Producers remembered per partition; beyond it the one idle longest is forgotten, as Kafka forgets after a day.
const REMEMBERED_PRODUCERS: usize = 10_000;
/// Idle producers are left out of snapshots after a day.
const FORGOTTEN_AFTER_MS: i64 = 24 * 3_600_000;

/// Where a batch belongs, seen from its producer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Next,
    /// It is here already, from this offset on.
    Duplicate {
        base_offset: i64,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Producer {
    epoch: i16,
    /// First sequence, last sequence, base offset; oldest first.
    batches: VecDeque<(i32, i32, i64)>,
    used_ms: i64,
}

/// The producers of one partition by id.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub(super) struct Producers(BTreeMap<i64, Producer>);

impl Producers {
    /// Whether this batch may be appended now.
    pub(super) fn place(&self, header: &Header) -> Result<Place, ResponseError> {
        if header.producer_id < 0 {
            return Ok(Place::Next);
        }
        // Unknown, or forgotten because it was idle or its batches fell to retention: any sequence may begin.
        let Some(producer) = self.0.get(&header.producer_id) else { return Ok(Place::Next) };
        if header.producer_epoch < producer.epoch {
            return Err(ResponseError::InvalidProducerEpoch);
        }
        if header.producer_epoch > producer.epoch {
            return if header.base_sequence == 0 { Ok(Place::Next) } else { Err(ResponseError::OutOfOrderSequenceNumber) };
        }
        let last_sequence = sequence_after(header.base_sequence, header.last_offset_delta);
        let same = producer.batches.iter().find(|(first, last, _)| (*first, *last) == (header.base_sequence, last_sequence));
        if let Some((_, _, base_offset)) = same {
            return Ok(Place::Duplicate { base_offset: *base_offset });
        }
        match producer.batches.back() {
            Some((_, last, _)) if sequence_after(*last, 1) != header.base_sequence => Err(ResponseError::OutOfOrderSequenceNumber),
            _ => Ok(Place::Next),
        }
    }

    /// Remembers a batch that is in the log at `base_offset`.
    pub(super) fn note(&mut self, header: &Header, base_offset: i64, now_ms: i64) {
        if header.producer_id < 0 {
            return;
        }
        if self.0.len() >= REMEMBERED_PRODUCERS && !self.0.contains_key(&header.producer_id) {
            let idlest = self.0.iter().min_by_key(|(_, it)| it.used_ms).map(|(id, _)| *id);
            idlest.and_then(|id| self.0.remove(&id));
        }
        let fresh = || Producer { epoch: header.producer_epoch, batches: VecDeque::new(), used_ms: now_ms };
        let producer = self.0.entry(header.producer_id).or_insert_with(fresh);
        if producer.epoch != header.producer_epoch {
            *producer = fresh();
        }
        producer.used_ms = now_ms;
        producer.batches.push_back((header.base_sequence, sequence_after(header.base_sequence, header.last_offset_delta), base_offset));
        if producer.batches.len() > REMEMBERED_BATCHES {
            producer.batches.pop_front();
        }
    }

    pub(super) fn forget_idle(&mut self, now_ms: i64) {
        self.0.retain(|_, it| now_ms - it.used_ms < FORGOTTEN_AFTER_MS);
    }
}

/// Sequences count to 2³¹ − 1 and begin again at 0.
fn sequence_after(sequence: i32, by: i32) -> i32 {
    let next = (i64::from(sequence) + i64::from(by)) % (i64::from(i32::MAX) + 1);
    i32::try_from(next).expect("a remainder of 2^31 fits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(epoch: i16, base_sequence: i32, n_records: i32) -> Header {
        Header {
            base_offset: 0,
            length: 100,
            attributes: 0,
            last_offset_delta: n_records - 1,
            base_timestamp: 0,
            max_timestamp: 0,
            producer_id: 7,
            producer_epoch: epoch,
            base_sequence,
            n_records,
        }
    }

    #[test]
    fn a_repeat_of_the_last_five_is_answered_with_its_offset_and_an_older_one_is_out_of_order() {
        let mut producers = Producers::default();
        for n in 0..6 {
            let next = header(0, n * 10, 10);
            assert_eq!(producers.place(&next), Ok(Place::Next));
            producers.note(&next, i64::from(n) * 10, 0);
        }
        for n in 1..6 {
            assert_eq!(producers.place(&header(0, n * 10, 10)), Ok(Place::Duplicate { base_offset: i64::from(n) * 10 }));
        }
        assert_eq!(producers.place(&header(0, 0, 10)), Err(ResponseError::OutOfOrderSequenceNumber));
        assert_eq!(producers.place(&header(0, 61, 1)), Err(ResponseError::OutOfOrderSequenceNumber));
    }

    #[test]
    fn a_new_epoch_begins_at_zero_and_fences_the_old_one() {
        let mut producers = Producers::default();
        producers.note(&header(3, 0, 5), 0, 0);
        assert_eq!(producers.place(&header(4, 5, 1)), Err(ResponseError::OutOfOrderSequenceNumber));
        let first = header(4, 0, 1);
        assert_eq!(producers.place(&first), Ok(Place::Next));
        producers.note(&first, 5, 0);
        assert_eq!(producers.place(&header(3, 5, 1)), Err(ResponseError::InvalidProducerEpoch));
    }

    #[test]
    fn sequences_begin_again_after_the_largest() {
        let mut producers = Producers::default();
        producers.note(&header(0, i32::MAX - 1, 2), 0, 0);
        assert_eq!(producers.place(&header(0, 0, 1)), Ok(Place::Next));
        let wrapping = header(0, 0, 1);
        producers.note(&wrapping, 2, 0);
        assert_eq!(sequence_after(i32::MAX, 1), 0);
        assert_eq!(sequence_after(i32::MAX - 1, 3), 1);
    }

    #[test]
    fn producers_idle_for_a_day_are_forgotten() {
        let mut producers = Producers::default();
        producers.note(&header(0, 0, 1), 0, 1_000);
        producers.forget_idle(1_000 + FORGOTTEN_AFTER_MS - 1);
        assert_ne!(producers, Producers::default());
        producers.forget_idle(1_000 + FORGOTTEN_AFTER_MS);
        assert_eq!(producers, Producers::default());
    }

    proptest! {
        /// Whatever a network repeats, each batch has one place, and the places follow each other.
        #[test]
        fn batches_repeated_within_the_window_are_stored_once(repeats in prop::collection::vec((1_i32..20, 0_usize..5), 1..60)) {
            let (mut producers, mut sent, mut end, mut sequence) = (Producers::default(), Vec::new(), 0_i64, i32::MAX - 100);
            for (n_records, back) in repeats {
                let next = header(0, sequence, n_records);
                prop_assert_eq!(producers.place(&next), Ok(Place::Next));
                producers.note(&next, end, 0);
                sent.push((next, end));
                end += i64::from(n_records);
                sequence = sequence_after(sequence, n_records);
                if let Some((again, base_offset)) = sent.iter().rev().nth(back) {
                    prop_assert_eq!(producers.place(again), Ok(Place::Duplicate { base_offset: *base_offset }));
                }
            }
        }
    }
}
