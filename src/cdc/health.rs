//! Looks at slot, publication and WAL from outside, on its own connection, every two seconds.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use sqlx::PgConnection;
use tokio::sync::watch;

use super::{
    admin,
    error::Error,
    slot::{self, Slot},
    source::{self, Source},
};
use crate::change::Lsn;

const INTERVAL: Duration = Duration::from_secs(2);
/// A server that does not answer is not waited for: the stream itself will notice.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// The rate at which a slot comes into danger is that of so long.
const TREND: Duration = Duration::from_secs(60);
/// A rate needs at least so long.
const TREND_MIN: Duration = Duration::from_secs(10);

/// What was seen last.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Health {
    pub(super) slot: Option<Slot>,
    pub(super) source_lsn: Lsn,
    pub(super) publication_exists: bool,
}

/// Samples until the receiver is gone; a failed sample is left out.
pub(super) async fn watch(source: Source, slot: String, publication: String, seen: watch::Sender<Option<Health>>) {
    let mut connection = None;
    let mut trend = Trend::default();
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = seen.closed() => return,
            _ = ticks.tick() => {}
        }
        let sampled = tokio::time::timeout(ANSWER_MAX, sample(&source, &slot, &publication, connection.take())).await;
        match sampled {
            Ok(Ok((mut health, open))) => {
                connection = Some(open);
                if let Some(slot) = &mut health.slot {
                    slot.health.seconds_left = trend.seconds_left(Instant::now(), slot.health.safe_wal_bytes);
                }
                seen.send_replace(Some(health));
            }
            Ok(Err(error)) => tracing::debug!(%error, "the slot's health is not known"),
            Err(_) => tracing::debug!("the slot's health is not known: no answer"),
        }
    }
}

async fn sample(source: &Source, slot: &str, publication: &str, open: Option<PgConnection>) -> Result<(Health, PgConnection), Error> {
    let mut connection = match open {
        Some(open) => open,
        None => source.connect().await?,
    };
    let slot = slot::find(&mut connection, slot).await?;
    let source_lsn = source::flushed_wal(&mut connection).await?;
    let publication_exists = admin::publication_exists(&mut connection, publication).await?;
    Ok((Health { slot, source_lsn, publication_exists }, connection))
}

/// How fast the WAL that may still be written becomes less.
#[derive(Debug, Default)]
struct Trend(VecDeque<(Instant, i64)>);

impl Trend {
    /// Takes a sample. The time until nothing is left, if it becomes less.
    fn seconds_left(&mut self, now: Instant, safe_bytes: Option<i64>) -> Option<u64> {
        let Some(safe_bytes) = safe_bytes else {
            self.0.clear();
            return None;
        };
        self.0.push_back((now, safe_bytes));
        while self.0.front().is_some_and(|(at, _)| now.duration_since(*at) > TREND) {
            self.0.pop_front();
        }
        let (since, before) = *self.0.front()?;
        let passed = now.duration_since(since);
        let lost = u128::try_from(before - safe_bytes).ok().filter(|it| *it > 0 && passed >= TREND_MIN)?;
        let left = u128::try_from(safe_bytes.max(0)).unwrap_or(0);
        u64::try_from(left * passed.as_millis() / lost / 1000).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_the_rate_of_the_last_minute() {
        let start = Instant::now();
        let mut trend = Trend::default();
        let mut after = |seconds, safe_bytes| trend.seconds_left(start + Duration::from_secs(seconds), safe_bytes);
        assert_eq!(after(0, Some(10_000)), None);
        assert_eq!(after(2, Some(9_800)), None, "too short for a rate");
        assert_eq!(after(10, Some(9_000)), Some(90));
        assert_eq!(after(40, Some(10_000)), None, "the slot has caught up");
        // What is older than a minute does not count any more.
        assert_eq!(after(100, Some(4_000)), Some(40));
        assert_eq!(after(110, Some(-5)), Some(0));
        assert_eq!(after(112, None), None, "the server sets no limit");
    }
}
