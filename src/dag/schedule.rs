//! When a DAG starts by itself (pure): an interval, a cron expression, or never.

use std::{fmt, str::FromStr, time::Duration};

use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::units::Span;

/// In config `"30s"`, `"*/5 * * * *"` (UTC), or `"never"`: then it starts only when triggered.
#[derive(Debug, Clone, PartialEq)]
pub enum Schedule {
    Never,
    Every(Span),
    Cron { text: String, cron: Box<croner::Cron> },
}

/// Shorter than this no run could end before the next one is due.
const INTERVAL_MIN: Duration = Duration::from_millis(10);

impl Schedule {
    /// The start that is due now; however many were missed, they coalesce into the newest one.
    ///
    /// `last` is the start before: an interval without one is due at once, a cron expression needs one to be due.
    pub fn due(&self, last: Option<DateTime<Utc>>, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match (self, last) {
            (Self::Never, _) | (Self::Cron { .. }, None) => None,
            (Self::Every(_), None) => Some(now),
            (Self::Every(interval), Some(last)) => {
                let step = delta(*interval);
                let passed = (now - last).num_microseconds()?.checked_div(step.num_microseconds()?)?;
                (passed > 0).then(|| last + TimeDelta::microseconds(step.num_microseconds().unwrap_or(0) * passed))
            }
            (Self::Cron { cron, .. }, Some(last)) => cron.find_previous_occurrence(&now, true).ok().filter(|newest| *newest > last && *newest <= now),
        }
    }

    /// The next start, seen from now; not later than now where one is due.
    pub fn next(&self, last: Option<DateTime<Utc>>, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match (self, self.due(last, now)) {
            (Self::Never, _) => None,
            (_, Some(due)) => Some(due),
            (Self::Every(interval), None) => Some(last.unwrap_or(now) + delta(*interval)),
            (Self::Cron { cron, .. }, None) => cron.find_next_occurrence(&now, false).ok(),
        }
    }
}

fn delta(interval: Span) -> TimeDelta {
    TimeDelta::from_std(*interval).unwrap_or(TimeDelta::MAX)
}

/// A start as run ids carry it: whole seconds where that is not before `last`, else to the microsecond PostgreSQL keeps.
pub(super) fn tidy(start: DateTime<Utc>, last: Option<DateTime<Utc>>) -> DateTime<Utc> {
    let rounded = |step| start.duration_trunc(step).unwrap_or(start);
    let seconds = rounded(TimeDelta::seconds(1));
    if last.is_none_or(|last| seconds > last) { seconds } else { rounded(TimeDelta::microseconds(1)) }
}

impl fmt::Display for Schedule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => formatter.write_str("never"),
            Self::Every(interval) => write!(formatter, "{interval}"),
            Self::Cron { text, .. } => formatter.write_str(text),
        }
    }
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text == "never" {
            return Ok(Self::Never);
        }
        if let Ok(interval) = text.parse::<Span>() {
            return if *interval >= INTERVAL_MIN { Ok(Self::Every(interval)) } else { Err(format!("{text:?} is too short for a schedule: use 1s or more")) };
        }
        let cron = croner::Cron::from_str(text)
            .map_err(|_| format!("{text:?} is not a schedule: write an interval like 30s, a cron expression like \"*/5 * * * *\" (UTC), or never"))?;
        Ok(Self::Cron { text: text.to_owned(), cron: Box::new(cron) })
    }
}

impl Serialize for Schedule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Schedule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().expect("a time")
    }

    fn schedule(text: &str) -> Schedule {
        text.parse().expect("a schedule")
    }

    #[test]
    fn an_interval_is_due_at_once_and_then_on_its_own_grid() {
        let every = schedule("30s");
        let start = at("2026-11-22T12:00:05Z");
        assert_eq!(every.due(None, start), Some(start));
        assert_eq!(every.due(Some(start), at("2026-11-22T12:00:34Z")), None);
        assert_eq!(every.next(Some(start), at("2026-11-22T12:00:34Z")), Some(at("2026-11-22T12:00:35Z")));
        assert_eq!(every.due(Some(start), at("2026-11-22T12:00:35Z")), Some(at("2026-11-22T12:00:35Z")));
    }

    #[test]
    fn missed_starts_coalesce_into_the_newest() {
        assert_eq!(schedule("30s").due(Some(at("2026-11-22T12:00:00Z")), at("2026-11-22T12:10:10Z")), Some(at("2026-11-22T12:10:00Z")));
        let hourly = schedule("0 * * * *");
        assert_eq!(hourly.due(Some(at("2026-11-22T08:00:00Z")), at("2026-11-22T12:10:10Z")), Some(at("2026-11-22T12:00:00Z")));
        assert_eq!(hourly.due(Some(at("2026-11-22T12:00:00Z")), at("2026-11-22T12:10:10Z")), None);
        assert_eq!(hourly.next(Some(at("2026-11-22T12:00:00Z")), at("2026-11-22T12:10:10Z")), Some(at("2026-11-22T13:00:00Z")));
        assert_eq!(hourly.due(None, at("2026-11-22T12:00:00Z")), None);
    }

    #[test]
    fn never_means_never() {
        assert_eq!(schedule("never").due(None, at("2026-11-22T12:00:00Z")), None);
        assert_eq!(schedule("never").next(None, at("2026-11-22T12:00:00Z")), None);
    }

    #[test]
    fn a_schedule_reads_as_it_is_written_and_nonsense_is_refused_with_examples() {
        for text in ["never", "30s", "2m", "*/5 * * * *", "0 6 * * 1"] {
            assert_eq!(schedule(text).to_string(), text);
        }
        let refusal = "often".parse::<Schedule>().expect_err("nonsense");
        assert!(refusal.contains("30s") && refusal.contains("*/5"), "{refusal}");
        assert!("0s".parse::<Schedule>().is_err());
    }

    #[test]
    fn two_starts_within_a_second_are_told_apart() {
        let start = at("2026-11-22T12:00:00.250123Z");
        assert_eq!(tidy(start, None), at("2026-11-22T12:00:00Z"));
        assert_eq!(tidy(start, Some(at("2026-11-22T12:00:00Z"))), start);
    }

    proptest! {
        #[test]
        fn an_interval_is_never_due_twice_and_never_in_the_future(interval_ms in 10_u64..100_000, gap_ms in 0_i64..10_000_000) {
            let every = Schedule::Every(Span::from_millis(interval_ms));
            let last = at("2026-11-22T12:00:00Z");
            let now = last + TimeDelta::milliseconds(gap_ms);
            match every.due(Some(last), now) {
                Some(due) => {
                    prop_assert!(due > last && due <= now);
                    prop_assert_eq!(every.due(Some(due), now), None);
                }
                None => prop_assert!(every.next(Some(last), now).is_some_and(|next| next > now)),
            }
        }
    }
}
