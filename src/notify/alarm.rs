//! At most how often a failing task is written about (pure).
//!
//! The first failure is; after that at most one letter per `repeat_after` until the task succeeds; then one that it has
//! recovered. A schedule of thirty seconds that fails all night costs eight letters, not a thousand.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

/// A task that fails, as long as it does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alarm {
    pub failing_since: DateTime<Utc>,
    pub last_mail_at: DateTime<Utc>,
    /// Failures since then, the first one included.
    pub failures: u32,
    /// Failures nobody was written about since the last letter.
    pub held: u32,
    /// Which failure was heard last, so that hearing it again changes nothing.
    pub last_heard: String,
}

/// What a failure or a success is worth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// Write; so many failures went unmentioned since the last letter.
    Failure { held: u32 },
    /// Do not write again so soon.
    Hold,
    /// Write that it is over.
    Recovery { failing_since: DateTime<Utc>, failures: u32 },
    /// Nothing has happened.
    Nothing,
}

/// A task has failed for good. `heard` names the failure (run and try).
pub fn failed(alarm: Option<Alarm>, heard: &str, now: DateTime<Utc>, repeat_after: Duration) -> (Alarm, Word) {
    let Some(alarm) = alarm else {
        let first = Alarm { failing_since: now, last_mail_at: now, failures: 1, held: 0, last_heard: heard.to_owned() };
        return (first, Word::Failure { held: 0 });
    };
    if alarm.last_heard == heard {
        return (alarm, Word::Nothing);
    }
    let again = Alarm { failures: alarm.failures.saturating_add(1), last_heard: heard.to_owned(), ..alarm.clone() };
    if now - alarm.last_mail_at >= TimeDelta::from_std(repeat_after).unwrap_or(TimeDelta::MAX) {
        (Alarm { last_mail_at: now, held: 0, ..again }, Word::Failure { held: alarm.held })
    } else {
        (Alarm { held: alarm.held.saturating_add(1), ..again }, Word::Hold)
    }
}

/// A task has succeeded; its alarm, if there was one, is over.
pub fn succeeded(alarm: Option<&Alarm>) -> Word {
    alarm.map_or(Word::Nothing, |alarm| Word::Recovery { failing_since: alarm.failing_since, failures: alarm.failures })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + seconds, 0).expect("in range")
    }

    #[test]
    fn a_schedule_that_fails_all_night_is_written_about_once_an_hour() {
        let mut alarm = None;
        let mut letters = Vec::new();
        for fire in 0..960 {
            let (next, word) = failed(alarm, &format!("run {fire}"), at(fire * 30), HOUR);
            if let Word::Failure { held } = word {
                letters.push(held);
            }
            alarm = Some(next);
        }
        assert_eq!(letters, [0, 119, 119, 119, 119, 119, 119, 119]);
        assert_eq!(succeeded(alarm.as_ref()), Word::Recovery { failing_since: at(0), failures: 960 });
        assert_eq!(succeeded(None), Word::Nothing);
    }

    #[test]
    fn hearing_a_failure_twice_changes_nothing() {
        let (alarm, _) = failed(None, "run 1", at(0), HOUR);
        assert_eq!(failed(Some(alarm.clone()), "run 1", at(7200), HOUR), (alarm, Word::Nothing));
    }

    proptest! {
        #[test]
        fn no_two_letters_about_one_alarm_are_closer_than_the_limit_and_no_failure_is_uncounted(gaps in proptest::collection::vec(0_i64..9000, 1..60)) {
            let (mut alarm, mut now, mut mailed, mut told) = (None, 0, Vec::new(), 0);
            for (number, gap) in gaps.iter().enumerate() {
                now += gap;
                let (next, word) = failed(alarm, &number.to_string(), at(now), HOUR);
                if let Word::Failure { held } = word {
                    mailed.push(now);
                    told += held + 1;
                }
                alarm = Some(next);
            }
            prop_assert!(mailed.windows(2).all(|pair| pair[1] - pair[0] >= 3600));
            let alarm = alarm.expect("something failed");
            prop_assert_eq!(told + alarm.held, alarm.failures);
        }
    }
}
