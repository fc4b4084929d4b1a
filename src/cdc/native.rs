//! The stage: prepare → snapshot → stream, for as long as it is wanted.
//!
//! Trouble that passes (PostgreSQL restarts, a producer breaks) is waited out here once the stream has flowed; the first
//! connection must succeed, so that a wrong address is told at the start.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use sqlx::PgConnection;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Interval,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    Config, ErrorsTolerance, SkippedOperations, SnapshotMode, catalog, context,
    envelope::Envelope,
    error::Error,
    health::{self, Health, Pulse},
    history::History,
    incremental::{self, Finishing, Requests},
    joining::{self, Joined},
    patience::Patience,
    prepare,
    progress::{LaneEnd, Progress, Store},
    sending::Flow,
    slot::{self, Replication, Slot, Start},
    snapshot,
    source::Source,
    stats::{IncrementalSnapshot, Stats, Step},
    streaming::{Filter, Setup, Streaming},
};
use crate::{
    change::{Lsn, TableId, Topics},
    fault::chain,
    secret::Secret,
    stage::{Control, Phase},
    stream::{
        self,
        producer::{Headers, Producer},
        topics,
    },
};

const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);
const LOCKED_POLL: Duration = Duration::from_millis(500);
/// How often stats are published, acknowledgements are looked for, and heartbeats considered, at least.
const TICK: Duration = Duration::from_millis(100);
/// Events taken in a row before anything else is looked at.
const EVENTS_IN_A_ROW: usize = 512;
/// Events that share one look at the clock; it bounds how old their time may be after a wait for the broker.
const EVENTS_BY_CLOCK: usize = 64;
/// How long a stop waits for the broker to acknowledge what was sent; what it does not is sent again next time.
const STOP_MAX: Duration = Duration::from_secs(10);

/// Captures until stopped. Cancel-safe like a crash: what was not confirmed is read again.
///
/// It runs on a thread of its own: transport and decoder hand over a hundred thousand rows a second, and on one thread that
/// costs no wake-ups (measured: half of the CPU went into switching between the runtime's threads).
pub(super) async fn run(
    source: Secret,
    state: Secret,
    kafka: stream::Access,
    stream: stream::Config,
    config: Config,
    mut control: Control<Stats>,
) -> Result<(), Error> {
    let mut capture = Capture {
        source: Source::new(&source)?,
        state,
        kafka,
        stream,
        topics: Topics::new(&config.topic_prefix),
        config,
        streamed: false,
        served_by: None,
        readers: None,
        stats: control.stats.borrow().clone(),
    };
    let abandoned = CancellationToken::new();
    let _abandon_when_dropped = abandoned.clone().drop_guard();
    let (told, ended) = oneshot::channel();
    let mut work = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Thread)?;
        let result = runtime.block_on(async {
            tokio::select! {
                () = abandoned.cancelled() => Ok(()),
                result = until_stopped(&mut capture, &mut control) => result,
            }
        });
        // A question to the broker may still wait for its answer; nobody wants it any more.
        runtime.shutdown_background();
        result
    };
    // Nobody hears the end of a capture that was abandoned.
    let spawned = std::thread::Builder::new().name("cdc".to_owned()).spawn(move || drop(told.send(work())));
    spawned.map_err(Error::Thread)?;
    ended.await.map_err(|_| Error::Panicked)?
}

async fn until_stopped(capture: &mut Capture, control: &mut Control<Stats>) -> Result<(), Error> {
    let mut patience = Patience::new(RETRY_FIRST, RETRY_MAX);
    loop {
        let Err(error) = capture.session(control).await else { return Ok(()) };
        let Some(delay) = patience.after(std::mem::take(&mut capture.streamed), &error) else { return Err(error) };
        tracing::warn!(error = chain(&error), ?delay, "the capture was interrupted, trying again");
        capture.stats.reconnects += 1;
        capture.tell(control, Step::Connecting, Some(chain(&error)));
        tokio::select! {
            () = control.stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(delay) => {}
        }
    }
}

struct Capture {
    source: Source,
    state: Secret,
    kafka: stream::Access,
    stream: stream::Config,
    topics: Topics,
    config: Config,
    /// Whether the stream flows, or flowed when the session broke.
    streamed: bool,
    /// The server's process of the last replication connection.
    served_by: Option<i32>,
    /// Closed once no reader of the last snapshot is left.
    readers: Option<mpsc::Receiver<()>>,
    stats: Stats,
}

/// Everything that flows: ended by being dropped.
struct Open {
    client: Replication,
    streaming: Streaming,
    joined: watch::Receiver<Joined>,
    rereading: watch::Receiver<Option<IncrementalSnapshot>>,
    _beside: [AbortOnDropHandle<()>; 2],
}

impl Capture {
    /// One connection's life: Ok when stopped.
    async fn session(&mut self, control: &mut Control<Stats>) -> Result<(), Error> {
        self.tell(control, Step::Connecting, None);
        let stop = control.stop.clone();
        // While it opens only answers to questions show that the source lives: a snapshot's connection may hang for ever.
        let (before, answers) = self.watched();
        let opened = tokio::select! {
            () = stop.cancelled() => Ok(None),
            silent = health::silence(answers) => Err(silent),
            opened = self.open(control) => opened.map(Some),
        };
        if let Some(mut readers) = self.readers.take() {
            // One that is not quite gone could send a row behind what the next try sends of it.
            let _ = readers.recv().await;
        }
        let Some(opened) = opened? else { return Ok(()) };
        drop(before);
        let (_watching, health) = self.watched();
        self.streamed = true;
        self.served_by = Some(opened.client.pid);
        self.tell(control, Step::Streaming, None);
        tracing::info!(confirmed = %self.stats.confirmed_lsn, "streaming");
        self.stream(opened, health, control).await
    }

    /// Looks at the slot from outside, from now on.
    fn watched(&self) -> (AbortOnDropHandle<()>, watch::Receiver<Option<Health>>) {
        let (seen, health) = watch::channel(None);
        let watching = health::watch(self.source.clone(), self.config.slot.clone(), self.config.publication.clone(), seen);
        (AbortOnDropHandle::new(tokio::spawn(watching)), health)
    }

    async fn open(&mut self, control: &Control<Stats>) -> Result<Open, Error> {
        let mut connection = self.source.connect().await?;
        catalog::check_server(&mut connection).await?;
        let mut store = Store::open(&self.state, &self.config.topic_prefix).await?;
        let progress = store.read().await?;
        let name = self.config.slot.clone();
        if let Some(pid) = self.served_by.take() {
            slot::let_go(&mut connection, &name, pid).await?;
        }
        let found = slot::wait_until_free(&mut connection, &name, |text| self.tell(control, Step::Connecting, Some(text))).await?;
        // Before anything that another server would lack as well.
        let start = match self.decide(found.as_ref(), progress.as_ref()).await? {
            // What the slot keeps is of no use, so it need not fill the disk for as long as what follows has to wait.
            Start::Over if progress.as_ref().is_none_or(|it| it.tables_read.is_empty()) => self.start_over(&mut connection).await?,
            start => start,
        };
        let wanted = catalog::wanted_tables(&mut connection, &self.config).await?;
        self.wait_until_unlocked(&mut connection, &wanted, control).await?;
        let published = prepare::publish(&mut connection, &self.config, &wanted, matches!(start, Start::Resume { .. }), false).await?;
        self.stats.uncaptured = published.uncaptured;
        let tables = published.captured;
        let (start, finishing) = match start {
            Start::Over => self.go_on(&mut connection, (found.as_ref(), progress.as_ref()), &tables).await?,
            start => (start, None),
        };
        let asking = topics::Topics::connect(&self.kafka)?;
        let bytes_max = prepare::ensure_topics(&asking, &self.topics, &tables, &self.stream).await?;
        let producer = Arc::new(Producer::new(&self.kafka, bytes_max)?);
        let envelope = Envelope::new(&self.config.topic_prefix, &self.source.database);
        let (told, rereading) = watch::channel(None);
        let reader = incremental::Setup { source: self.source.clone(), state: self.state.clone(), config: self.config.clone(), finishing };
        let (line, reading) = incremental::reader(reader, told);
        let context = self.config.extended_headers.then(|| context::headers(&self.config.topic_prefix));
        let (client, snapshot, confirmed, last_commit) = match start {
            Start::Resume { snapshot, confirmed } => {
                let mut client = slot::connect(&self.source, &name, &self.config.publication).await?;
                let last_commit = History::read(&asking, &self.topics, snapshot).await?.recall(&mut client, &name, confirmed).await?;
                (client, snapshot, confirmed, last_commit)
            }
            Start::Fresh | Start::Over => {
                let (client, snapshot) = self.begin(&mut store, &asking, (&mut connection, &*producer, context.as_ref()), &tables, control).await?;
                (client, snapshot, snapshot, None)
            }
        };
        store.close().await;
        let client = slot::start(client, &name).await?;
        self.stats.confirmed_lsn = confirmed;
        let setup = Setup {
            source: self.source.clone(),
            topics: self.topics.clone(),
            transaction_metadata: self.config.transaction_metadata,
            filter: Filter::new(&self.config, &self.stats.uncaptured),
            made: tables.iter().map(|it| self.topics.table(it)).collect(),
            stream: self.stream.clone(),
            asking,
            line,
            skips_truncate: self.config.skipped_operations == SkippedOperations::T,
            tolerates_errors: self.config.errors_tolerance == ErrorsTolerance::All,
            context,
            heartbeat: *self.config.heartbeat,
            snapshot,
            confirmed,
            last_commit,
            server: client.server,
        };
        let (joins, joined) = watch::channel(Joined { tables: wanted, uncaptured: self.stats.uncaptured.clone() });
        let joining = AbortOnDropHandle::new(tokio::spawn(joining::watch(self.source.clone(), self.config.clone(), joins)));
        let streaming = Streaming::new(setup, envelope, producer, control.stop.clone());
        let reading = AbortOnDropHandle::new(tokio::spawn(reading));
        Ok(Open { client, streaming, joined, rereading, _beside: [joining, reading] })
    }

    /// A table that is locked against everything holds up all questions about it; so says who has locked it.
    async fn wait_until_unlocked(&mut self, connection: &mut PgConnection, tables: &BTreeSet<TableId>, control: &Control<Stats>) -> Result<(), Error> {
        while let Some((table, pid)) = catalog::locked(connection, tables).await? {
            let holder = slot::holder(connection, pid).await?;
            self.tell(control, Step::Connecting, Some(format!("{holder}, who has locked {table}")));
            tokio::time::sleep(LOCKED_POLL).await;
        }
        self.tell(control, Step::Connecting, None);
        Ok(())
    }

    async fn start_over(&self, connection: &mut PgConnection) -> Result<Start, Error> {
        tracing::warn!(slot = self.config.slot, "no snapshot was finished with this slot, starting over");
        slot::drop_slot(connection, &self.config.slot).await?;
        Ok(Start::Fresh)
    }

    /// How a snapshot that was cut short goes on: from the slot as it stands, where that can be, with requests for what was not read.
    async fn go_on(
        &self,
        connection: &mut PgConnection,
        (slot, progress): (Option<&Slot>, Option<&Progress>),
        tables: &BTreeSet<TableId>,
    ) -> Result<(Start, Option<Finishing>), Error> {
        let Some((start, left)) = prepare::left_to_read(connection, slot, progress, tables).await? else {
            return Ok((self.start_over(connection).await?, None));
        };
        tracing::info!(tables = ?left, "going on with the snapshot that was cut short");
        let mut requests = Requests::open(&self.state, &self.config.topic_prefix).await?;
        for table in &left {
            requests.ask(table).await?;
        }
        requests.close().await;
        let topics = tables.iter().map(|it| self.topics.table(it)).collect();
        Ok((start, Some(Finishing { asking: topics::Topics::connect(&self.kafka)?, topics })))
    }

    /// Slot and progress together, and where the slot is missing whether this is the server that had it.
    async fn decide(&self, found: Option<&Slot>, progress: Option<&Progress>) -> Result<Start, Error> {
        let decided = slot::decide(&self.config.slot, &self.source.database, found, progress);
        let (Err(Error::SlotMissing { slot }), Some(snapshot)) = (&decided, progress.and_then(|it| it.lsn)) else { return decided };
        let asking = topics::Topics::connect(&self.kafka)?;
        match History::read(&asking, &self.topics, snapshot).await {
            Ok(history) => Err(history.why_missing(&slot::connect(&self.source, slot, &self.config.publication).await?, slot)),
            // Whatever the reason, changes are missing.
            Err(unknown) => decided.inspect_err(|_| tracing::warn!(error = chain(&unknown), "nobody can say whether this is the server that had the slot")),
        }
    }

    /// Makes the slot and takes the snapshot; each step is written down before the next.
    async fn begin(
        &mut self,
        store: &mut Store,
        asking: &topics::Topics,
        (connection, producer, context): (&mut PgConnection, &Producer, Option<&Headers>),
        tables: &BTreeSet<TableId>,
        control: &Control<Stats>,
    ) -> Result<(Replication, Lsn), Error> {
        self.tell(control, Step::Snapshot, Some("the slot is being made; it waits for transactions that are open on the source".to_owned()));
        let made = prepare::make_slot(store, &self.source, &self.config).await?;
        let mut ends = Vec::new();
        if self.config.snapshot == SnapshotMode::Initial {
            tracing::info!(tables = tables.len(), lsn = %made.consistent_point, "taking the snapshot");
            let (source, topics) = (self.source.clone(), self.topics.clone());
            let (alive, readers) = mpsc::channel(1);
            self.readers = Some(readers);
            let plan = snapshot::Plan {
                source: &source,
                tables,
                topics: &topics,
                snapshot: &made.snapshot,
                consistent_point: made.consistent_point,
                context,
                readers: self.config.snapshot_max_threads.readers(),
                lock_timeout: *self.config.snapshot_lock_timeout,
                tolerates_errors: self.config.errors_tolerance == ErrorsTolerance::All,
                alive,
            };
            let dead_letters = self.stats.dead_letters;
            let tell = |told: &snapshot::Told| {
                self.stats.snapshot = Some(told.progress.clone());
                for (table, rows) in &told.tables {
                    self.stats.tables.entry(table.clone()).or_default().reads = *rows;
                }
                self.stats.dead_letters = dead_letters + told.dead_letters;
                (self.stats.queued, self.stats.broker_away) = (told.queued, told.broker_away);
                self.tell(control, Step::Snapshot, told.waiting_for.clone());
            };
            snapshot::take(&plan, connection, producer, store, tell).await?;
            let lanes = asking.watermarks(tables.iter().map(|it| self.topics.table(it)).collect()).await?;
            ends = lanes.into_iter().map(LaneEnd::from).collect();
        }
        store.finish(&ends).await?;
        if let Some(snapshot) = &mut self.stats.snapshot {
            snapshot.finished = true;
            tracing::info!(rows = snapshot.rows, "snapshot taken");
        }
        Ok((made.client, made.consistent_point))
    }

    async fn stream(&mut self, open: Open, mut health: watch::Receiver<Option<Health>>, control: &mut Control<Stats>) -> Result<(), Error> {
        let Open { mut client, mut streaming, mut joined, rereading, _beside } = open;
        let mut pulse = Pulse::new(&self.config.slot, client.pid, Instant::now());
        let before = self.stats.clone();
        let producer = streaming.producer();
        let mut phase = *control.wanted.borrow();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let stop = control.stop.clone();
        loop {
            tokio::select! { biased;
                () = stop.cancelled() => break,
                wish = control.next_wish() => phase = wish,
                Ok(()) = health.changed() => {
                    let seen = health.borrow_and_update().clone();
                    pulse.hear(seen.as_ref(), Instant::now())?;
                    self.see(seen)?;
                }
                Ok(()) = joined.changed() => {
                    self.stats.uncaptured.clone_from(&joined.borrow_and_update().uncaptured);
                    streaming.leave_out(&self.stats.uncaptured);
                }
                _ = ticks.tick() => {
                    pulse.look(self.stats.received_lsn, Instant::now())?;
                    streaming.beat(Instant::now(), &mut self.stats)?;
                    self.stats.phase = phase;
                    self.stats.incremental_snapshot.clone_from(&rereading.borrow());
                    streaming.report(&mut self.stats, &before);
                    control.stats.send_replace(self.stats.clone());
                }
                () = producer.rung() => {}
                event = client.recv(), if phase == Phase::Running && streaming.has_room() => {
                    let failed = |source| slot::start_failed(&self.config.slot, source);
                    let mut next = event.map_err(failed)?.ok_or(Error::Ended)?;
                    // What lies ready is taken at once; waiting is for the select above.
                    for taken in 1.. {
                        if taken % EVENTS_BY_CLOCK == 1 {
                            streaming.look_at_clock();
                        }
                        let taking = streaming.take(next, &mut self.stats);
                        if let Flow::Stopped = heard_of(taking, &producer, &mut ticks, control).await? {
                            break;
                        }
                        next = match (taken < EVENTS_IN_A_ROW).then(|| client.recv().now_or_never()).flatten() {
                            Some(ready) => ready.map_err(failed)?.ok_or(Error::Ended)?,
                            None => break,
                        };
                    }
                }
            }
            if let Some(confirmed) = streaming.settle(&mut self.stats)? {
                client.update_applied_lsn(pgwire_replication::Lsn(confirmed.0));
            }
        }
        self.end(client, streaming, &before, control).await;
        Ok(())
    }

    /// Reads what the health task saw. A lost slot or publication ends the stage.
    fn see(&mut self, seen: Option<Health>) -> Result<(), Error> {
        let Some(seen) = seen else { return Ok(()) };
        // Somebody dropped it, or the address leads to another server by now: opened again, the capture can tell which.
        let Some(slot) = seen.slot else { return Err(Error::Deserted { slot: self.config.slot.clone() }) };
        self.stats.source_lsn = seen.source_lsn;
        if !seen.publication_exists {
            return Err(Error::PublicationMissing { publication: self.config.publication.clone() });
        }
        // A publication of somebody's own may hold more than we capture.
        let captured = |it: &&TableId| catalog::is_wanted(&self.config.tables, &self.config.tables_exclude, it);
        if let Some(table) = seen.unpublished.iter().find(captured) {
            return Err(Error::Unpublished { table: table.to_string(), publication: self.config.publication.clone() });
        }
        slot::require_alive(&self.config.slot, &slot)?;
        self.stats.slot = Some(slot.health);
        Ok(())
    }

    /// Leaves in good order: what was sent gets its acknowledgement, the slot the last position. Best effort, by a deadline.
    async fn end(&mut self, mut client: Replication, mut streaming: Streaming, before: &Stats, control: &Control<Stats>) {
        let deadline = tokio::time::Instant::now() + STOP_MAX;
        let producer = streaming.producer();
        let settled = async {
            while !streaming.is_settled() {
                streaming.write_position_if_behind(&mut self.stats)?;
                let _ = tokio::time::timeout(TICK, producer.rung()).await;
                if let Some(confirmed) = streaming.settle(&mut self.stats)? {
                    client.update_applied_lsn(pgwire_replication::Lsn(confirmed.0));
                }
            }
            // The transport tells the server on its next round; leaving earlier would only repeat a few commits.
            let confirmed = pgwire_replication::Lsn(self.stats.confirmed_lsn.0);
            while client.metrics().last_applied_lsn() < confirmed && client.is_running() {
                tokio::time::sleep(TICK / 10).await;
            }
            Ok::<(), Error>(())
        };
        match tokio::time::timeout_at(deadline, settled).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error = chain(&error), "the last messages were not acknowledged; they will be sent again"),
            Err(_) => tracing::warn!("the broker did not acknowledge the last messages in time; they will be sent again"),
        }
        let _ = tokio::time::timeout(TICK * 10, client.shutdown()).await;
        streaming.report(&mut self.stats, before);
        self.tell(control, Step::Stopped, None);
    }

    fn tell(&mut self, control: &Control<Stats>, step: Step, waiting_for: Option<String>) {
        self.stats.step = step;
        self.stats.waiting_for = waiting_for;
        control.stats.send_replace(self.stats.clone());
    }
}

/// Takes an event to its end. While it waits for room in the producer's queue, others hear how that stands.
async fn heard_of<T>(taking: impl Future<Output = T>, producer: &Producer, ticks: &mut Interval, control: &Control<Stats>) -> T {
    let mut taking = std::pin::pin!(taking);
    loop {
        tokio::select! { biased;
            taken = &mut taking => return taken,
            _ = ticks.tick() => control.stats.send_modify(|stats| {
                stats.queued = producer.n_waiting();
                stats.broker_away = producer.is_broker_away();
            }),
        }
    }
}
