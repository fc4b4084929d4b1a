//! How old a record is when it exists in the lake, measured from its commit on the source.
//!
//! Only the envelope knows the commit time (Kafka's timestamp is the producer's clock), so this is the one place that looks
//! into a payload: into a few of each object, evenly spread, each standing for its neighbours. Nothing depends on what is found
//! there, what is no envelope is passed over, and the cost of an object is bounded. Rows of an initial snapshot were committed
//! long before anybody read them and are left out; so are tombstones and BEGINs, which say nothing about a time.

use std::{borrow::Cow, time::Duration};

use serde::Deserialize;

use crate::{latency::Histogram, stream::records::Records};

/// Records looked into, an object: a small one is measured whole, a large one by a sample that costs half a millisecond.
const SAMPLES_MAX: usize = 256;

/// When records were committed on the source, microseconds since 1970, and for how many each of them stands.
#[derive(Debug, Default)]
pub(super) struct Commits {
    sampled_us: Vec<i64>,
    weight: u64,
}

impl Commits {
    /// Parses for a while: call it off the runtime threads.
    pub(super) fn of(runs: &[Records]) -> Self {
        let n_rows: usize = runs.iter().map(Records::len).sum();
        let step = n_rows.div_ceil(SAMPLES_MAX).max(1);
        let values = runs.iter().flat_map(|it| it.values.rows());
        // From the middle of the first step, so that neither end of the object is favoured.
        let sampled = values.skip(step / 2).step_by(step).flatten();
        Self { sampled_us: sampled.filter_map(committed_us).collect(), weight: step as u64 }
    }

    /// How old they are at this moment. A clock of the source that is ahead of ours makes no negative age.
    pub(super) fn ages(&self, now_us: i64) -> Histogram {
        let mut ages = Histogram::default();
        for committed_us in &self.sampled_us {
            ages.record_many(Duration::from_micros(u64::try_from(now_us - committed_us).unwrap_or_default()), self.weight);
        }
        ages
    }
}

/// A change, or the END of a transaction; all else that stands there is skipped unread.
#[derive(Deserialize)]
struct Glance<'a> {
    #[serde(borrow)]
    op: Option<Cow<'a, str>>,
    source: Option<Origin>,
    #[serde(borrow)]
    status: Option<Cow<'a, str>>,
    ts_ms: Option<i64>,
}

#[derive(Deserialize)]
struct Origin {
    ts_us: Option<i64>,
    ts_ms: Option<i64>,
}

fn committed_us(value: &[u8]) -> Option<i64> {
    let glance: Glance<'_> = serde_json::from_slice(value).ok()?;
    let from_ms = |it: i64| it.checked_mul(1000);
    match (glance.op.as_deref(), glance.status.as_deref()) {
        (Some("c" | "u" | "d"), _) => glance.source.and_then(|it| it.ts_us.or(it.ts_ms.and_then(from_ms))),
        (None, Some("END")) => glance.ts_ms.and_then(from_ms),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(values: &[Option<&str>]) -> Records {
        let mut records = Records::default();
        values.iter().zip(0..).for_each(|(value, offset)| records.push(offset, 0, None, value.map(str::as_bytes)));
        records
    }

    #[test]
    fn only_what_was_committed_now_has_an_age() {
        let values = [
            Some(r#"{"before":null,"after":{"id":1},"source":{"ts_ms":1000,"ts_us":1000400},"op":"c","ts_ms":7}"#),
            Some(r#"{"before":{"id":1},"after":null,"source":{"ts_ms":2000},"op":"d"}"#),
            Some(r#"{"before":null,"after":{"id":1},"source":{"ts_ms":1,"snapshot":"true"},"op":"r"}"#),
            Some(r#"{"status":"END","id":"7:9","event_count":1,"data_collections":[],"ts_ms":3000}"#),
            Some(r#"{"status":"BEGIN","id":"7:8","event_count":null,"data_collections":null,"ts_ms":1}"#),
            Some("no envelope"),
            Some("[]"),
            None,
        ];
        assert_eq!(Commits::of(&[run(&values)]).sampled_us, [1_000_400, 2_000_000, 3_000_000]);
    }

    #[test]
    fn a_large_object_is_measured_by_a_few_that_stand_for_all() {
        let value = |at: usize| format!(r#"{{"source":{{"ts_us":{at}}},"op":"u"}}"#);
        let values: Vec<String> = (0..10_000).map(value).collect();
        let runs: Vec<Records> = values.chunks(999).map(|chunk| run(&chunk.iter().map(|it| Some(it.as_str())).collect::<Vec<_>>())).collect();
        let commits = Commits::of(&runs);
        assert_eq!((commits.sampled_us.len(), commits.weight), (250, 40));
        let ages = commits.ages(10_000);
        assert_eq!(ages.count(), 10_000);
        let median = ages.percentile(50).expect("measured").as_micros();
        assert!((5_000..5_400).contains(&median), "{median}");
        assert_eq!(commits.ages(-5).percentile(99), Some(Duration::ZERO), "a clock that is ahead");
    }
}
