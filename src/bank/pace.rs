//! How many payments are due: a rate that may change at any moment, turned into permits.

use std::{num::NonZeroU32, time::Duration};

use tokio::time::Instant;

use super::Rate;

/// Time lost beyond this is not made up for: a bank that was away must not return as a flood.
const DEBT_MAX: Duration = Duration::from_secs(2);

/// Permits accrue from `since` at the rate. Takes the time as an argument.
#[derive(Debug)]
pub(super) struct Pace {
    rate: Rate,
    since: Instant,
    used: u64,
}

impl Pace {
    pub(super) fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, since: now, used: 0 }
    }

    /// Starts to count anew: what the old rate owed is forgotten, so that a change is felt at once.
    pub(super) fn change(&mut self, rate: Rate, now: Instant) {
        *self = Self::new(rate, now);
    }

    /// How many payments may be planned now.
    pub(super) fn due(&mut self, now: Instant) -> u64 {
        let Rate::PerSecond(rate) = self.rate else { return u64::MAX };
        let spent = time_of(rate, self.used);
        if now.saturating_duration_since(self.since) > spent + DEBT_MAX {
            self.since = now - DEBT_MAX;
            self.used = 0;
        }
        // One permit is there at once: a bank that is resumed pays immediately.
        let accrued = now.saturating_duration_since(self.since).as_micros() * u128::from(rate.get()) / 1_000_000;
        (u64::try_from(accrued).unwrap_or(u64::MAX) + 1).saturating_sub(self.used)
    }

    pub(super) fn spend(&mut self) {
        self.used += 1;
    }

    /// When the next permit comes; now, if one is there.
    pub(super) fn next(&self) -> Option<Instant> {
        match self.rate {
            Rate::PerSecond(rate) => Some(self.since + time_of(rate, self.used)),
            Rate::Unlimited => None,
        }
    }
}

fn time_of(rate: NonZeroU32, permits: u64) -> Duration {
    let micros = (u128::from(permits) * 1_000_000).div_ceil(u128::from(rate.get()));
    Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn per_second(rate: u32) -> Rate {
        Rate::PerSecond(NonZeroU32::new(rate).expect("not zero"))
    }

    #[test]
    fn permits_come_at_the_rate() {
        let start = Instant::now();
        let mut pace = Pace::new(per_second(300), start);
        let mut spent = 0;
        for millisecond in 0..10_000 {
            let now = start + Duration::from_millis(millisecond);
            for _ in 0..pace.due(now) {
                pace.spend();
                spent += 1;
            }
            assert!(pace.next().expect("a limited rate") > now);
        }
        assert!((2_999..=3_001).contains(&spent), "{spent}");
    }

    #[test]
    fn a_long_silence_does_not_come_back_as_a_flood() {
        let start = Instant::now();
        let mut pace = Pace::new(per_second(100), start);
        assert!(pace.due(start + Duration::from_secs(3_600)) <= 201);
    }

    #[test]
    fn a_new_rate_owes_nothing_of_the_old_one() {
        let start = Instant::now();
        let mut pace = Pace::new(per_second(1_000), start);
        let later = start + Duration::from_secs(1);
        pace.change(per_second(1), later);
        assert_eq!(pace.due(later), 1);
        pace.spend();
        assert_eq!(pace.due(later + Duration::from_millis(900)), 0);
        assert_eq!(pace.next(), Some(later + Duration::from_secs(1)));
    }
}
