//! Watching a registered connector: what is seen becomes stats, what failed is restarted, what cannot go on is told.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::{
    Capture, connector_of,
    failure::{self, Verdict},
    opening::{Open, Reading},
    reading::{self, End, Told},
    rest::{Offset, Status},
    settings,
    watching::Seen,
};
use crate::{
    cdc::{
        SnapshotProgress,
        error::Error,
        health::Health,
        progress::{LaneEnd, Store},
        slot,
        stats::{Stats, Step},
    },
    change::Lsn,
    fault::Backoff,
    stage::{Control, Phase},
    stream::follow::Followed,
};

const TICK: Duration = Duration::from_millis(100);
/// Things followed that are taken at once.
const FOLLOWED_AT_ONCE: usize = 1024;
/// Restarts of failed tasks in a row, before a person is asked.
const RESTARTS_MAX: u32 = 5;
const RESTART_FIRST: Duration = Duration::from_secs(1);
const RESTART_MAX: Duration = Duration::from_secs(30);
/// A connector that ran so long has recovered.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);
/// A connector that Connect does not know for so long is gone.
const GONE_AFTER: Duration = Duration::from_secs(30);
/// Slot and source are sampled every two seconds.
const SOURCE_SILENT_AFTER: Duration = Duration::from_secs(8);
/// Debezium takes a moment to the slot, and lets go of it for one when it reconnects.
const SLOT_IDLE_AFTER: Duration = Duration::from_secs(5);
/// Debezium repeats a snapshot that fails for ever, and Connect calls that RUNNING. Connect writes offsets once a minute or oftener.
const SNAPSHOT_SILENT_AFTER: Duration = Duration::from_secs(20);
/// So long a commit may be on its way before the source is asked for one more, behind which the slot can be confirmed.
const NUDGE_AFTER: Duration = Duration::from_secs(2);

/// What the supervision remembers between two looks.
struct Watch {
    restarts: Backoff,
    restarts_left: u32,
    restart_at: Option<Instant>,
    /// Since when nothing has failed.
    healthy_since: Option<Instant>,
    /// Since when Connect knows no such connector.
    unknown_since: Option<Instant>,
    connect_away: Option<String>,
    status: Option<Status>,
    source_seen: Instant,
    slot_read: Instant,
    heartbeat_seen: Instant,
    row_seen: Instant,
    end_seen: Instant,
    nudged: Instant,
    nudging: Option<AbortOnDropHandle<()>>,
}

impl Watch {
    fn begin(now: Instant) -> Self {
        Self {
            restarts: Backoff::new(RESTART_FIRST, RESTART_MAX),
            restarts_left: RESTARTS_MAX,
            restart_at: None,
            healthy_since: None,
            unknown_since: None,
            connect_away: None,
            status: None,
            source_seen: now,
            slot_read: now,
            heartbeat_seen: now,
            row_seen: now,
            end_seen: now,
            nudged: now,
            nudging: None,
        }
    }

    fn state(&self) -> Option<&str> {
        self.status.as_ref().map(|it| it.connector.state.as_str())
    }
}

impl Capture {
    /// Watches until an error; a stop drops it.
    pub(super) async fn supervise(&mut self, mut open: Open, control: &mut Control<Stats>) -> Result<(), Error> {
        let mut watch = Watch::begin(Instant::now());
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut followed = Vec::new();
        loop {
            tokio::select! { biased;
                _ = ticks.tick() => {
                    self.restart_if_due(&mut watch).await?;
                    self.describe(&open, &mut watch);
                    self.publish(control);
                }
                Some(health) = next(&mut open.health) => self.see_source(health, &mut open, &mut watch)?,
                Some(seen) = next(&mut open.seen) => {
                    let wanted = *control.wanted.borrow();
                    self.see_connect(seen, &mut open, &mut watch, wanted).await?;
                }
                wish = control.next_wish() => self.obey(wish, &watch).await?,
                () = open.follower.next(&mut followed, FOLLOWED_AT_ONCE) => {
                    for told in followed.drain(..) {
                        self.take(told, &mut open, &mut watch);
                    }
                }
            }
        }
    }

    /// What the topics told.
    fn take(&mut self, told: Followed<Told>, open: &mut Open, watch: &mut Watch) {
        match told {
            Followed::Away(_) => self.stats.broker_away = true,
            Followed::Back => self.stats.broker_away = false,
            Followed::Found(Told::Heartbeat) => {
                self.stats.heartbeats += 1;
                watch.heartbeat_seen = Instant::now();
            }
            Followed::Found(Told::End(end)) => {
                watch.end_seen = Instant::now();
                self.count(&end);
            }
            Followed::Found(Told::Row { lane, next_offset, lsn }) => {
                let Some(snapshot) = &mut open.snapshot else { return };
                watch.row_seen = Instant::now();
                snapshot.read.insert(lane.clone(), next_offset);
                if let Some(lsn) = lsn {
                    *snapshot.attempts.entry(lsn).or_default().entry(lane).or_default() += 1;
                }
            }
        }
    }

    /// Counts a commit once: after a restart Debezium tells it again, with the same position.
    fn count(&mut self, end: &End) {
        if end.lsn <= self.last_end {
            return;
        }
        self.last_end = end.lsn;
        // The heartbeats' own commits change nothing.
        if end.events.is_empty() {
            return;
        }
        self.stats.transactions += 1;
        for (table, events) in &end.events {
            self.stats.tables.entry(table.clone()).or_default().changes += events;
        }
        self.stats.last_commit_at = DateTime::from_timestamp_millis(end.committed_at_ms);
        self.latency.record(reading::age(end.committed_at_ms, Utc::now().timestamp_millis()));
        self.stats.latency = (&self.latency).into();
    }

    /// What slot and source say. A lost slot or publication ends the stage.
    fn see_source(&mut self, seen: Health, open: &mut Open, watch: &mut Watch) -> Result<(), Error> {
        watch.source_seen = Instant::now();
        self.stats.source_lsn = seen.source_lsn;
        if !seen.publication_exists {
            return Err(Error::PublicationMissing { publication: self.config.publication.clone() });
        }
        let Some(slot) = seen.slot else {
            // The connector makes it as its first deed.
            return if open.snapshot.is_some() { Ok(()) } else { Err(Error::SlotMissing { slot: self.config.slot.clone() }) };
        };
        slot::require_alive(&self.config.slot, &slot)?;
        if let Some(snapshot) = &mut open.snapshot
            && !slot.health.active
            && slot.health.confirmed_flush_lsn > snapshot.given_up
        {
            // Until it is read nothing moves it.
            snapshot.slot_began.get_or_insert(slot.health.confirmed_flush_lsn);
        }
        if slot.health.active {
            watch.slot_read = Instant::now();
        }
        let confirmed = slot.health.confirmed_flush_lsn;
        self.stats.lag_bytes = self.stats.source_lsn.0.saturating_sub(confirmed.0);
        // A slot begins beyond the rows that its snapshot has yet to bring to the broker.
        if open.snapshot.is_none() {
            self.stats.confirmed_lsn = confirmed;
        }
        self.stats.slot = Some(slot.health);
        self.nudge_if_quiet(open, watch);
        Ok(())
    }

    /// WAL that no captured table wrote is confirmed behind the next commit only. The heartbeat makes one; where somebody waits for
    /// the slot, that is late.
    fn nudge_if_quiet(&self, open: &Open, watch: &mut Watch) {
        let reached = self.last_end.max(self.stats.confirmed_lsn);
        let quiet = watch.end_seen.elapsed() >= NUDGE_AFTER && watch.nudged.elapsed() >= NUDGE_AFTER;
        let streaming = open.snapshot.is_none() && self.stats.slot.as_ref().is_some_and(|it| it.active);
        if !(streaming && quiet && self.stats.source_lsn > reached) {
            return;
        }
        watch.nudged = Instant::now();
        let source = self.source.clone();
        watch.nudging = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            let nudged = async {
                let mut connection = source.connect().await?;
                let statement = sqlx::raw_sql(sqlx::AssertSqlSafe(settings::heartbeat_statement()));
                statement.execute(&mut connection).await.map_err(|source| Error::Sql { what: "write a heartbeat into the WAL", source })
            };
            if let Err(error) = nudged.await {
                tracing::debug!(%error, "the slot was not helped on");
            }
        })));
    }

    /// What Connect says.
    async fn see_connect(&mut self, seen: Seen, open: &mut Open, watch: &mut Watch, wanted: Phase) -> Result<(), Error> {
        let (status, offset) = match seen {
            Seen::Away(why) => {
                watch.connect_away = Some(why);
                return Ok(());
            }
            Seen::Answered { status, offset } => (status, offset),
        };
        watch.connect_away = None;
        let Some(status) = status else {
            let since = *watch.unknown_since.get_or_insert_with(Instant::now);
            if since.elapsed() > GONE_AFTER {
                return Err(Error::ConnectorGone { connector: self.name().to_owned() });
            }
            return Ok(());
        };
        watch.unknown_since = None;
        self.stats.connector = Some(connector_of(&self.rest, self.name(), &status));
        self.stats.phase = if status.stands_still() { Phase::Paused } else { Phase::Running };
        self.judge(&status, watch)?;
        watch.status = Some(status);
        if let Some(offset) = offset {
            self.stats.received_lsn = offset.lsn.map_or(self.stats.received_lsn, Lsn);
            self.see_snapshot(offset, open).await?;
        }
        // Our wish holds, whoever paused or resumed it meanwhile.
        self.obey(wanted, watch).await
    }

    /// Failed parts are restarted a while later, and again, but not for ever.
    fn judge(&mut self, status: &Status, watch: &mut Watch) -> Result<(), Error> {
        let Some(failed) = status.failed() else {
            let since = *watch.healthy_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= HEALTHY_AFTER {
                watch.restarts.reset();
                watch.restarts_left = RESTARTS_MAX;
            }
            watch.restart_at = None;
            return Ok(());
        };
        watch.healthy_since = None;
        let trace = failed.trace.as_deref().unwrap_or("it does not say why");
        match failure::verdict(&self.rest, self.name(), &self.config.slot, trace) {
            Verdict::Told(error) => Err(error),
            Verdict::Restart if watch.restart_at.is_some() => Ok(()),
            Verdict::Restart if watch.restarts_left == 0 => Err(failure::gave_up(&self.rest, self.name(), trace)),
            Verdict::Restart => {
                let delay = watch.restarts.delay();
                tracing::warn!(connector = self.name(), trace = failure::summary(&self.rest, trace), ?delay, "a task failed and will be restarted");
                watch.restart_at = Some(Instant::now() + delay);
                Ok(())
            }
        }
    }

    async fn restart_if_due(&mut self, watch: &mut Watch) -> Result<(), Error> {
        if watch.restart_at.is_none_or(|it| Instant::now() < it) {
            return Ok(());
        }
        watch.restart_at = None;
        watch.restarts_left -= 1;
        self.stats.reconnects += 1;
        self.rest.restart_failed(self.name()).await
    }

    async fn obey(&self, wish: Phase, watch: &Watch) -> Result<(), Error> {
        match (wish, watch.state()) {
            (Phase::Paused, Some("RUNNING" | "UNASSIGNED" | "RESTARTING")) => self.rest.pause(self.name()).await,
            (Phase::Running, Some(state @ ("PAUSED" | "STOPPED"))) => {
                tracing::info!(connector = self.name(), state, "the connector stands still and is to run: it is resumed");
                self.rest.resume(self.name()).await
            }
            _ => Ok(()),
        }
    }

    /// Follows the snapshot to its end: once Connect has an offset behind it, every row of it is with the broker. The lanes' ends are
    /// sampled then, and what lies before them is read along to the last row, which tells where in the WAL the snapshot stood.
    async fn see_snapshot(&mut self, offset: Offset, open: &mut Open) -> Result<(), Error> {
        let Some(snapshot) = &mut open.snapshot else { return Ok(()) };
        if !offset.is_past_snapshot() {
            return Ok(());
        }
        let ends = match &snapshot.ends {
            Some(ends) => ends,
            None if !self.takes_snapshot() => snapshot.ends.insert(Vec::new()),
            None => {
                let topics = open.tables.iter().map(|it| self.topics.table(it)).collect();
                let lanes = open.asking.watermarks(topics).await?;
                let read = lanes.iter().filter(|(_, marks)| marks.end == marks.first).map(|(lane, marks)| (lane.clone(), marks.end));
                snapshot.read.extend(read.collect::<Vec<_>>());
                snapshot.ends.insert(lanes.into_iter().map(|(lane, marks)| (lane, marks.end)).collect())
            }
        };
        if !ends.iter().all(|(lane, end)| snapshot.read.get(lane).is_some_and(|read| read >= end)) {
            return Ok(());
        }
        let attempts: Vec<Lsn> = snapshot.attempts.keys().copied().filter(|it| *it > snapshot.given_up).collect();
        let (newest, began) = (attempts.last().copied(), snapshot.slot_began);
        // Debezium reads a snapshot that was cut short once more, and no longer the one which its slot exported.
        let beside_its_slot = attempts.len() > 1 || newest.zip(began).is_some_and(|(newest, began)| began < newest);
        if let Some(newest) = newest.filter(|_| beside_its_slot) {
            self.begin_over().await?;
            let before = open.snapshot.take().unwrap_or_default();
            open.snapshot = Some(Reading { attempts: before.attempts, read: before.read, given_up: newest, ..Reading::default() });
            return Ok(());
        }
        let lsn = newest.or(began).or(offset.lsn.map(Lsn)).unwrap_or_default();
        let ends: Vec<LaneEnd> =
            ends.iter().map(|(lane, end)| LaneEnd { topic: lane.topic.to_string(), partition: lane.partition, end_offset: *end }).collect();
        let mut store = Store::open(&self.state, &self.config.topic_prefix).await?;
        store.made(lsn).await?;
        store.finish(&ends).await?;
        store.close().await;
        self.tell_rows(open);
        if let Some(progress) = &mut self.stats.snapshot {
            (progress.finished, progress.tables_done) = (true, progress.tables);
            tracing::info!(rows = progress.rows, %lsn, "snapshot taken");
        }
        open.snapshot = None;
        Ok(())
    }

    /// The snapshot's rows so far, by table.
    fn tell_rows(&mut self, open: &Open) {
        let Some(snapshot) = open.snapshot.as_ref().filter(|_| self.takes_snapshot()) else { return };
        let newest = snapshot.attempts.values().next_back();
        let mut progress = SnapshotProgress { tables: open.tables.len() as u64, ..SnapshotProgress::default() };
        for table in &open.tables {
            let topic = self.topics.table(table);
            let rows = newest.map_or(0, |lanes| lanes.iter().filter(|(lane, _)| *lane.topic == *topic).map(|(_, rows)| rows).sum());
            progress.rows += rows;
            self.stats.tables.entry(table.to_string()).or_default().reads = rows;
        }
        self.stats.snapshot = Some(progress);
    }

    /// In what step it is, and what is waited for: Connect's RUNNING alone says neither.
    fn describe(&mut self, open: &Open, watch: &mut Watch) {
        self.tell_rows(open);
        let name = self.name();
        let running = self.stats.phase == Phase::Running;
        let heartbeat_max = *self.config.heartbeat * 3 + Duration::from_secs(20);
        let slot = self.stats.slot.as_ref();
        let waiting_for = if let Some(why) = &watch.connect_away {
            Some(format!("an answer: {why}"))
        } else if watch.source_seen.elapsed() > SOURCE_SILENT_AFTER {
            Some("the source, which does not answer; the connector tries again by itself".to_owned())
        } else if watch.restart_at.is_some() {
            self.stats.connector.as_ref().map(|it| format!("the restart of connector {name}: {}", it.shown()))
        } else if watch.unknown_since.is_some() && watch.status.is_some() {
            Some(format!("connector {name}: Kafka Connect does not know it any more; if it does not show up soon, it is made anew"))
        } else if watch.status.is_none() {
            Some(format!("connector {name} to start"))
        } else if running && watch.status.as_ref().is_some_and(|it| it.tasks.is_empty() || it.tasks.iter().any(|task| task.state == "UNASSIGNED")) {
            Some(format!("a worker that takes connector {name}"))
        } else if running && open.snapshot.is_some() && watch.row_seen.elapsed() > SNAPSHOT_SILENT_AFTER {
            let silent = watch.row_seen.elapsed().as_secs();
            Some(format!("the snapshot: no row and no offset for {silent} s, whatever Connect says; the log of its worker tells more"))
        } else if running && open.snapshot.is_none() && watch.slot_read.elapsed() > SLOT_IDLE_AFTER {
            Some(format!("the connector to read slot {}: nobody does, whatever Connect says", self.config.slot))
        } else if running && open.snapshot.is_none() && watch.heartbeat_seen.elapsed() > heartbeat_max {
            Some(format!("a heartbeat of connector {name}: none for {} s", watch.heartbeat_seen.elapsed().as_secs()))
        } else {
            None
        };
        let reads = slot.is_some_and(|it| it.active) && watch.slot_read.elapsed() <= SLOT_IDLE_AFTER;
        self.stats.step = match (&open.snapshot, &waiting_for) {
            (_, Some(_)) => Step::Connecting,
            (Some(_), None) => Step::Snapshot,
            (None, None) if reads || !running => Step::Streaming,
            (None, None) => Step::Connecting,
        };
        self.stats.waiting_for = waiting_for;
    }
}

/// The next value that is not empty. Cancel-safe; None once the watcher ended.
async fn next<T: Clone>(watched: &mut watch::Receiver<Option<T>>) -> Option<T> {
    loop {
        if watched.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        if let Some(value) = watched.borrow_and_update().clone() {
            return Some(value);
        }
    }
}
