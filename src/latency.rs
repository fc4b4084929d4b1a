//! How long things took: counted in buckets, so that memory is bounded, a copy is cheap, and two counts add up to one.

use std::time::Duration;

/// Buckets to each doubling.
const STEPS: u64 = 16;
const STEP_BITS: u32 = STEPS.ilog2();

/// Counts durations, in microseconds, sixteen buckets to each doubling.
///
/// A percentile is the upper end of the bucket it falls into: never less than the true one, and at most a sixteenth more.
/// Eight bytes for each bucket up to the longest duration seen: 3 KiB up to an hour, 8 KiB whatever comes.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Histogram {
    counts: Vec<u64>,
}

impl Histogram {
    pub fn record(&mut self, took: Duration) {
        self.record_many(took, 1);
    }

    /// The same duration so many times: one that stands for others.
    pub fn record_many(&mut self, took: Duration, times: u64) {
        let bucket = bucket(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += times;
    }

    pub fn merge(&mut self, other: &Self) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        self.counts.iter_mut().zip(&other.counts).for_each(|(mine, theirs)| *mine += theirs);
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// What so many percent of the durations do not exceed. None where nothing was recorded.
    pub fn percentile(&self, percent: u64) -> Option<Duration> {
        let rank = (self.count() * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(Duration::from_micros(upper_end(bucket)))
    }

    /// The same in whole milliseconds, rounded up.
    pub fn percentile_ms(&self, percent: u64) -> Option<u64> {
        let micros = self.percentile(percent)?.as_micros();
        Some(u64::try_from(micros.div_ceil(1000)).unwrap_or(u64::MAX))
    }
}

/// Small durations have a bucket each; above, the leading bits choose it.
fn bucket(micros: u64) -> usize {
    if micros < STEPS {
        return usize::try_from(micros).unwrap_or_default();
    }
    let doubling = micros.ilog2() - STEP_BITS;
    let step = (micros >> doubling) - STEPS;
    usize::try_from(u64::from(doubling + 1) * STEPS + step).expect("fewer than a thousand buckets")
}

/// The longest duration a bucket counts, in microseconds.
fn upper_end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < STEPS {
        return bucket;
    }
    let (doubling, step) = (bucket / STEPS - 1, bucket % STEPS);
    ((STEPS + step) << doubling) + ((1 << doubling) - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(micros: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        micros.iter().for_each(|it| histogram.record(Duration::from_micros(*it)));
        histogram
    }

    proptest! {
        #[test]
        fn a_percentile_is_never_less_than_the_true_one_and_at_most_a_sixteenth_more(
            mut micros in prop::collection::vec(0_u64..1 << 45, 1..200), percent in 1_u64..=100,
        ) {
            let shown = u64::try_from(of(&micros).percentile(percent).expect("something was recorded").as_micros()).expect("small");
            micros.sort_unstable();
            let rank = (micros.len() * usize::try_from(percent).expect("small")).div_ceil(100);
            let truth = micros[rank - 1];
            prop_assert!(shown >= truth && shown - truth <= truth / STEPS, "{truth} shows as {shown}");
        }

        #[test]
        fn counted_apart_and_added_up_is_counted_together(left in prop::collection::vec(any::<u64>(), 0..50), right in prop::collection::vec(any::<u64>(), 0..50)) {
            let mut merged = of(&left);
            merged.merge(&of(&right));
            prop_assert_eq!(merged, of(&[left, right].concat()));
        }
    }

    #[test]
    fn one_that_stands_for_others_counts_for_all_of_them() {
        let mut histogram = of(&[5]);
        histogram.record_many(Duration::from_millis(900), 99);
        assert_eq!((histogram.count(), histogram.percentile_ms(1), histogram.percentile_ms(2)), (100, Some(1), Some(918)));
        assert_eq!(Histogram::default().percentile(50), None);
        let longest = of(&[u64::MAX]);
        assert_eq!((longest.percentile(99), longest.counts.len() * 8), (Some(Duration::from_micros(u64::MAX)), 976 * 8));
    }
}
