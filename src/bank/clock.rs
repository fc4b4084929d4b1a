//! The bank's own clock: where in business time the next event happens.
//!
//! A new bank starts `history` before today's midnight (UTC) and catches up; a bank that exists goes on from its newest payment.
//! Time never runs backwards and never ahead of the real clock.

use chrono::{DateTime, NaiveTime, TimeDelta, Utc};

use super::Goal;

/// Without a goal, a whole history is caught up in this many payments: twenty seconds at the default rate.
const CATCH_UP_PAYMENTS: i32 = 1_000;

/// Business time, advanced by payments. What else happens between two payments happens at the time of the former.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Clock {
    at: DateTime<Utc>,
    gait: Gait,
}

#[derive(Debug, Clone, PartialEq)]
enum Gait {
    /// So many payments spread evenly from here on: payment `next` of `count` lies in its own slice of the span.
    Spread { from: DateTime<Utc>, span: TimeDelta, count: u64, next: u64 },
    /// A step a payment until the real time is reached, from then on the real time.
    Live { step: TimeDelta },
}

impl Clock {
    /// For a bank with no payment yet. With a number as goal the times depend on the day alone, not on the second.
    pub(super) fn of_a_new_bank(goal: Goal, history: TimeDelta, now: DateTime<Utc>) -> Self {
        let midnight = now.with_time(NaiveTime::MIN).single().unwrap_or(now);
        let at = midnight.checked_sub_signed(history).unwrap_or(midnight);
        Self { at, gait: Gait::new(goal, at, midnight, history) }
    }

    /// For a bank whose newest payment lies at `newest`.
    pub(super) fn of_an_old_bank(goal: Goal, history: TimeDelta, newest: DateTime<Utc>, now: DateTime<Utc>) -> Self {
        // A payment entered by hand with a time to come must not push the bank into the future.
        let at = newest.min(now);
        Self { at, gait: Gait::new(goal, at, now, history) }
    }

    pub(super) fn at(&self) -> DateTime<Utc> {
        self.at
    }

    /// Whether business time is still behind the real one on purpose.
    pub(super) fn is_catching_up(&self, now: DateTime<Utc>) -> bool {
        match &self.gait {
            Gait::Spread { count, next, .. } => next < count,
            Gait::Live { step } => now - self.at > *step && *step > TimeDelta::zero(),
        }
    }

    /// The time of the next payment. `lot` is random, 0 to 65,535.
    pub(super) fn advance(&mut self, now: DateTime<Utc>, lot: u16) -> DateTime<Utc> {
        let goal = match &mut self.gait {
            Gait::Spread { from, span, count, next } if *next < *count => {
                let slices = i128::from(*count) << 16;
                let place = (i128::from(*next) << 16) + i128::from(lot);
                *next += 1;
                let micros = i128::from(span.num_microseconds().unwrap_or(i64::MAX)) * place / slices;
                *from + TimeDelta::microseconds(i64::try_from(micros).expect("a part of the span"))
            }
            Gait::Spread { .. } => now,
            Gait::Live { step } if now - self.at > *step && *step > TimeDelta::zero() => {
                // Twice the step at most, the step on average; the last one stays behind the real clock.
                let micros = step.num_microseconds().unwrap_or(i64::MAX) / 32_768 * i64::from(lot);
                self.at + TimeDelta::microseconds(micros)
            }
            Gait::Live { step } => {
                // Arrived. A bank that pauses from now on does not invent what happened meanwhile.
                *step = TimeDelta::zero();
                now
            }
        };
        self.at = goal.min(truncated(now)).max(self.at);
        self.at
    }
}

impl Gait {
    fn new(goal: Goal, from: DateTime<Utc>, to: DateTime<Utc>, history: TimeDelta) -> Self {
        match goal {
            Goal::Forever => Self::Live { step: history / CATCH_UP_PAYMENTS },
            Goal::Transactions(count) => Self::Spread { from, span: (to - from).max(TimeDelta::zero()), count, next: 0 },
        }
    }
}

/// PostgreSQL keeps microseconds; rounding up would lie in the future.
fn truncated(now: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(now.timestamp_micros()).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const MONTH: TimeDelta = TimeDelta::days(30);

    fn moment(text: &str) -> DateTime<Utc> {
        text.parse().expect("a time")
    }

    proptest! {
        #[test]
        fn time_never_runs_backwards_nor_ahead_of_the_real_clock(
            lots in prop::collection::vec((any::<u16>(), 0_i64..100_000_000), 1..200),
            count in prop::option::of(1_u64..150),
        ) {
            let mut now = moment("2026-11-22T15:50:00.123456789Z");
            let goal = count.map_or(Goal::Forever, Goal::Transactions);
            let mut clock = Clock::of_a_new_bank(goal, MONTH, now);
            let mut last = clock.at();
            for (lot, passed) in lots {
                now += TimeDelta::microseconds(passed);
                let at = clock.advance(now, lot);
                prop_assert!(last <= at && at <= now);
                last = at;
            }
        }
    }

    #[test]
    fn a_goal_is_spread_over_thirty_dates_whatever_the_second() {
        let mut morning = Clock::of_a_new_bank(Goal::Transactions(60), MONTH, moment("2026-11-22T00:00:01Z"));
        let mut evening = Clock::of_a_new_bank(Goal::Transactions(60), MONTH, moment("2026-11-22T23:59:59Z"));
        let mut dates = BTreeSet::new();
        for lot in 0..60 {
            let at = morning.advance(moment("2026-11-22T00:00:02Z"), lot * 1_000);
            assert_eq!(at, evening.advance(moment("2026-11-23T00:00:02Z"), lot * 1_000));
            dates.insert(at.date_naive());
        }
        assert_eq!(dates.len(), 30);
        assert_eq!(dates.first().map(ToString::to_string).as_deref(), Some("2026-10-23"));
        assert_eq!(dates.last().map(ToString::to_string).as_deref(), Some("2026-11-21"));
    }

    #[test]
    fn without_a_goal_the_bank_catches_up_and_then_runs_live() {
        let now = moment("2026-11-22T15:50:00Z");
        let mut clock = Clock::of_a_new_bank(Goal::Forever, MONTH, now);
        let payments = (1..5_000).find(|_| clock.advance(now, 32_768) == now).expect("it catches up");
        assert!((1_000..1_060).contains(&payments), "{payments}");
        let later = now + TimeDelta::seconds(7);
        assert_eq!(clock.advance(later, 0), later);
    }
}
