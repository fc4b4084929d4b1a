//! Looks at slot, publication and WAL from outside, on its own connection, every two seconds.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgConnection;
use tokio::sync::watch;

use super::{
    admin,
    error::Error,
    slot::{self, Slot},
    source::{self, Source},
};
use crate::change::{Lsn, TableId};

const INTERVAL: Duration = Duration::from_secs(2);
/// A server that does not answer is not waited for: the stream itself will notice.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Silence that is borne while the server has not said how long it would bear ours: its own default of `wal_sender_timeout`.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// However short the server's own limit is: a sample may be slow.
const SILENCE_MIN: Duration = Duration::from_secs(5);

/// Clocks that are kept right differ by less, even where an answer takes seconds.
const CLOCKS_APART: TimeDelta = TimeDelta::minutes(1);

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
    /// Tables that were in the publication, still exist, and are not in it any more.
    pub(super) unpublished: Vec<TableId>,
    /// How long the server bears a client that is silent (`wal_sender_timeout`); None: for ever.
    pub(super) silence_max: Option<Duration>,
}

/// Whether the source lives. A network that is cut without a word leaves connections that look open, some of them for ever: so
/// we hang up as the server does, after the same time.
#[derive(Debug)]
pub(super) struct Pulse {
    slot: String,
    /// The server's process of our replication connection.
    pid: i32,
    heard_at: Instant,
    received: Lsn,
    silence_max: Duration,
}

impl Pulse {
    pub(super) fn new(slot: &str, pid: i32, now: Instant) -> Self {
        Self { slot: slot.to_owned(), pid, heard_at: now, received: Lsn::default(), silence_max: SILENCE_MAX }
    }

    /// The server answered a question that was asked since the connection streams: what it said or, with None, that it cannot say.
    pub(super) fn hear(&mut self, seen: Option<&Health>, now: Instant) -> Result<(), Error> {
        self.heard_at = now;
        let Some(seen) = seen else { return Ok(()) };
        self.silence_max = silence_max(seen);
        if seen.slot.as_ref().is_some_and(|it| it.active_pid != Some(self.pid)) {
            return Err(Error::Deserted { slot: self.slot.clone() });
        }
        Ok(())
    }

    /// The stream has come to `received`. An error once all was silent for too long.
    pub(super) fn look(&mut self, received: Lsn, now: Instant) -> Result<(), Error> {
        if received > self.received {
            (self.received, self.heard_at) = (received, now);
        }
        let silent = now.saturating_duration_since(self.heard_at);
        if silent >= self.silence_max { Err(Error::Silent(silent)) } else { Ok(()) }
    }
}

fn silence_max(seen: &Health) -> Duration {
    seen.silence_max.unwrap_or(SILENCE_MAX).max(SILENCE_MIN)
}

/// Waits until the server has answered nothing for too long; for as long as nothing else comes from it. Cancel-safe.
pub(super) async fn silence(mut seen: watch::Receiver<Option<Health>>) -> Error {
    loop {
        let max = seen.borrow_and_update().as_ref().map_or(SILENCE_MAX, silence_max);
        match tokio::time::timeout(max, seen.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Error::Ended,
            Err(_) => return Error::Silent(max),
        }
    }
}

/// Samples until the receiver is gone; a failed sample is left out.
pub(super) async fn watch(source: Source, slot: String, publication: String, seen: watch::Sender<Option<Health>>) {
    let mut connection = None;
    let mut members = Vec::new();
    let (mut trend, mut clocks) = (Trend::default(), Clocks::default());
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = seen.closed() => return,
            _ = ticks.tick() => {}
        }
        let sampled = tokio::time::timeout(ANSWER_MAX, sample(&source, &slot, &publication, &mut members, connection.take())).await;
        match sampled {
            Ok(Ok((mut health, theirs, open))) => {
                connection = Some(open);
                clocks.compare(Utc::now(), theirs);
                if let Some(slot) = &mut health.slot {
                    slot.health.seconds_left = trend.seconds_left(Instant::now(), slot.health.safe_wal_bytes);
                }
                seen.send_replace(Some(health));
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "the slot's health is not known");
                if matches!(error, Error::Sql { source: sqlx::Error::Database(_), .. }) {
                    // A refusal is an answer.
                    seen.send_modify(|_| {});
                }
            }
            Err(_) => tracing::debug!("the slot's health is not known: no answer"),
        }
    }
}

async fn sample(
    source: &Source,
    slot: &str,
    publication: &str,
    members: &mut Vec<i64>,
    open: Option<PgConnection>,
) -> Result<(Health, DateTime<Utc>, PgConnection), Error> {
    let mut connection = match open {
        Some(open) => open,
        None => source.connect().await?,
    };
    let slot = slot::find(&mut connection, slot).await?;
    let source_lsn = source::flushed_wal(&mut connection).await?;
    let publication_exists = admin::publication_exists(&mut connection, publication).await?;
    let unpublished = if publication_exists { taken_out(&mut connection, publication, members).await? } else { Vec::new() };
    let (silence_max, clock) = silence_borne(&mut connection).await?;
    Ok((Health { slot, source_lsn, publication_exists, unpublished, silence_max }, clock, connection))
}

/// Compares the tables that were put into the publication by name with those of the last time. A table that was dropped leaves it, too.
async fn taken_out(connection: &mut PgConnection, publication: &str, members: &mut Vec<i64>) -> Result<Vec<TableId>, Error> {
    const MEMBERS: &str = "select r.prrelid::bigint from pg_publication_rel r join pg_publication p on p.oid = r.prpubid where p.pubname = $1 order by 1";
    const LEFT: &str = "select n.nspname::text, c.relname::text from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.oid::bigint = any($1) order by 1, 2";
    let failed = |source| Error::Sql { what: "read the publication", source };
    let now: Vec<i64> = sqlx::query_scalar(MEMBERS).bind(publication).fetch_all(&mut *connection).await.map_err(failed)?;
    let gone: Vec<i64> = members.iter().filter(|it| now.binary_search(it).is_err()).copied().collect();
    if gone.is_empty() {
        *members = now;
        return Ok(Vec::new());
    }
    // What is gone stays remembered as long as the table is there: whoever reads this may be busy.
    let left: Vec<(String, String)> = sqlx::query_as(LEFT).bind(&gone).fetch_all(connection).await.map_err(failed)?;
    if left.is_empty() {
        *members = now;
    }
    Ok(left.into_iter().map(|(schema, table)| TableId { schema, table }).collect())
}

/// How long the server bears silence, and what time it is there.
async fn silence_borne(connection: &mut PgConnection) -> Result<(Option<Duration>, DateTime<Utc>), Error> {
    const ASK: &str = "select setting::bigint, clock_timestamp() from pg_settings where name = 'wal_sender_timeout'";
    let asked = sqlx::query_as(ASK).fetch_one(connection).await;
    let (milliseconds, clock): (i64, _) = asked.map_err(|source| Error::Sql { what: "ask the source for wal_sender_timeout", source })?;
    Ok((u64::try_from(milliseconds).ok().filter(|it| *it > 0).map(Duration::from_millis), clock))
}

/// Ours and the source's. Events tell both times, and Kafka goes by ours.
#[derive(Debug, Default)]
struct Clocks {
    /// Whether it was told that they are apart.
    told: bool,
}

impl Clocks {
    /// Tells once when they part, and when they are together again. Whether they are apart.
    fn compare(&mut self, ours: DateTime<Utc>, theirs: DateTime<Utc>) -> bool {
        let apart = (ours - theirs).abs() > CLOCKS_APART;
        if apart && !self.told {
            tracing::warn!(
                %ours,
                %theirs,
                remedy = "set the one that is wrong",
                "this machine's clock and the source's are far apart; Kafka refuses messages from more than an hour ahead, and topics lose early by \
                 their retention what seems old"
            );
        } else if self.told && !apart {
            tracing::info!("this machine's clock and the source's agree again");
        }
        self.told = apart;
        apart
    }
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
    fn silence_ends_a_connection_as_it_would_on_the_server_and_any_word_counts() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut pulse = Pulse::new("slot", 7, start);
        assert!(pulse.look(Lsn(1), after(50)).is_ok() && pulse.look(Lsn(1), after(100)).is_ok());
        pulse.hear(None, after(105)).expect("an answer of any kind");
        assert!(pulse.look(Lsn(1), after(164)).is_ok());
        assert!(matches!(pulse.look(Lsn(1), after(165)), Err(Error::Silent(_))));
        let brisk = Health { silence_max: Some(Duration::from_secs(8)), ..Health::default() };
        pulse.hear(Some(&brisk), after(166)).expect("no slot was seen");
        assert!(pulse.look(Lsn(1), after(173)).is_ok() && pulse.look(Lsn(1), after(174)).is_err());
    }

    #[test]
    fn a_slot_that_is_with_somebody_else_or_nobody_is_not_ours_any_more() {
        let seen = |active_pid| Health { slot: Some(Slot { active_pid, ..Slot::default() }), ..Health::default() };
        let mut pulse = Pulse::new("slot", 7, Instant::now());
        let mut hear = |active_pid| pulse.hear(Some(&seen(active_pid)), Instant::now());
        assert!(hear(Some(7)).is_ok());
        assert!([None, Some(8)].into_iter().all(|pid| matches!(hear(pid), Err(Error::Deserted { .. }))));
    }

    #[test]
    fn clocks_that_part_are_told_once_and_again_when_they_agree() {
        let mut clocks = Clocks::default();
        let at = |seconds: i64| DateTime::from_timestamp(1_795_000_000 + seconds, 0).expect("a time");
        let apart = [(0, 30), (0, 61), (61, 0), (40, 0)].map(|(ours, theirs)| (clocks.compare(at(ours), at(theirs)), clocks.told));
        assert_eq!(apart, [(false, false), (true, true), (true, true), (false, false)]);
    }

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
