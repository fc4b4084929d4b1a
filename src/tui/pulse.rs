//! How long keys take to their frame: kept for the newest ones, told in the help.

use std::{collections::VecDeque, time::Duration};

/// Keys that are remembered.
const KEPT: usize = 512;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Pulse(VecDeque<Duration>);

impl Pulse {
    pub(super) fn add(&mut self, took: Duration) {
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(took);
    }

    /// `key → frame p50 1.2 ms, p99 4.0 ms of 100 keys`; nothing where no key was pressed.
    pub(super) fn words(&self) -> Option<String> {
        let mut sorted: Vec<Duration> = self.0.iter().copied().collect();
        sorted.sort_unstable();
        let at = |percent: usize| sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).map(|it| it.as_secs_f64() * 1000.0);
        Some(format!("key → frame p50 {:.1} ms, p99 {:.1} ms of {} keys", at(50)?, at(99)?, sorted.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_keys_are_told() {
        let mut pulse = Pulse::default();
        assert_eq!(pulse.words(), None);
        (1..=1000).for_each(|it| pulse.add(Duration::from_millis(it)));
        assert_eq!(pulse.words().as_deref(), Some("key → frame p50 744.0 ms, p99 995.0 ms of 512 keys"));
    }
}
