//! Kafka → S3: turns the records of each lane into Parquet objects that exist exactly once.
//!
//! The stage owns its consumer, its open batches and the position. An object is put under a name that carries its hash; then
//! its commit record is written with `If-None-Match: *`, and that is the moment its records exist. Commit records of a lane are
//! named by their first offset and chained by hash, so of two writers one is refused, reads what the other wrote, and goes on
//! behind it. The group's committed offset follows: a hint for the next start, never the truth.
//!
//! After a crash the newest commit record says where to go on; what was put without one is an orphan, is encoded again, and
//! may be swept by [`verify()`]. While the store is away batches wait, the lanes are held, and memory stays flat.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroUsize,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use tracing::{debug, error, info, warn};

mod age;
pub mod batch;
mod dead;
pub mod encode;
mod error;
mod lane;
mod letters;
mod list;
pub mod log;
mod multipart;
pub mod object;
mod ship;
mod stats;
mod store;
mod verify;

pub use batch::Limits;
pub use dead::{Dead, DeadLetter, Identity};
pub use encode::{Decoded, Row, refusal, rows};
pub use error::Error;
pub use list::{LaneListing, TableListing, list, read};
pub use stats::{LaneStats, NewObject, Stats, TableStats};
pub use store::{Access, Addressing, Listed, Page, Put, Store};
pub use verify::{Finding, LaneProof, Options, Proof, verify};

use self::{
    batch::{Batches, Sealed},
    lane::{Found, LaneState, State, Stopped, in_log},
    letters::DeadLetters,
    ship::{Ages, Flight, Landing, News, Ship, now_ms},
};
use crate::{
    change::Topics,
    fault::chain,
    stage::{Control, Phase},
    stream::{
        self, Lane,
        consumer::{Consumer, Event, Probe, Settings},
        records::Records,
    },
    units::{Size, Span},
};

/// Settings of the lake, `[lake]` in `config.toml`. The keys come from `LEDGERLINE__LAKE__ACCESS_KEY_ID` and `…__SECRET_ACCESS_KEY`;
/// on AWS also from wherever its SDK looks.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `"embedded"` starts our own store; `"aws"` is AWS; anything else is the URL of an S3 store.
    pub endpoint: String,
    /// Created if it is absent.
    pub bucket: String,
    /// Where the bucket's name stands in an address: `auto` (as AWS wants it there, in the path elsewhere), `path`, `virtual`.
    pub addressing: Addressing,
    /// Signatures name it; MinIO takes any.
    pub region: String,
    /// Seal an object after this many rows: what a warehouse loads well.
    pub rows_max: NonZeroUsize,
    /// Seal an object after this many bytes of keys and values, before compression: an object is held in memory until it has landed.
    pub bytes_max: Size,
    /// Seal an object this long after its first record came in: how late a quiet lane may be.
    pub age_max: Span,
    /// Records in memory at once, over all lanes, from the consumer to the encoder; then the lanes are held.
    pub memory_max: Size,
    /// Consumer group: sinks that share the work have the same one.
    pub group: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            endpoint: "embedded".to_owned(),
            bucket: "lake".to_owned(),
            addressing: Addressing::Auto,
            region: "us-east-1".to_owned(),
            rows_max: NonZeroUsize::new(50_000).expect("not zero"),
            bytes_max: Size(16 << 20),
            age_max: Span::from_secs(2),
            memory_max: Size(64 << 20),
            group: "ledgerline-lake".to_owned(),
        }
    }
}

impl Config {
    /// Half of the memory may be open; the other half is on its way.
    pub fn limits(&self) -> Limits {
        let open_bytes_max = self.memory_max.0 / 2;
        Limits { rows_max: self.rows_max.get(), bytes_max: self.bytes_max.0.min(open_bytes_max), open_bytes_max, age_max: *self.age_max }
    }
}

/// How often open batches and lags are told; objects are told when they land.
const TELL_EVERY: Duration = Duration::from_millis(200);
/// How often the broker is asked for the ends of the lanes' logs.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// How long a stop waits for what is read to land. What does not is read again by the next start.
const DRAIN_MAX: Duration = Duration::from_secs(20);

/// Lands the records of all topics under the prefix until stopped, then lands what is read and leaves the group.
///
/// Topics that appear later are taken up. A lane whose position is outside the log is stopped and told in [`Stats`], the others
/// go on; the error comes back when the stage is stopped. Needs a multi-threaded runtime (or at least its blocking pool).
pub async fn run(store: Store, kafka: impl Into<stream::Access>, topics: Topics, config: Config, mut control: Control<Stats>) -> Result<(), Error> {
    let kafka = kafka.into();
    let settings = Settings { access: kafka.clone(), group: config.group.clone(), topics: subscription(&topics), bytes_max: config.memory_max.0 };
    let letters = DeadLetters::new(kafka, topics.dead_letters());
    let encoders = Semaphore::new(std::thread::available_parallelism().map_or(1, NonZeroUsize::get));
    let ship = Arc::new(Ship { store, letters, stats: control.stats.clone(), encoders });
    let mut sink = Sink::new(Consumer::start(&settings)?, ship, topics, config.limits());
    sink.consumer.hold(*control.wanted.borrow_and_update() == Phase::Paused);
    let stop = control.stop.clone();
    let mut tell = tokio::time::interval(TELL_EVERY);
    tell.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ask = tokio::time::interval(ASK_EVERY);
    ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! { biased;
            () = stop.cancelled() => break,
            wish = control.next_wish() => sink.consumer.hold(wish == Phase::Paused),
            Some(flight) = sink.flights.join_next() => sink.arrived(flight?)?,
            Some(search) = sink.searches.join_next() => if let Ok(search) = search { sink.found(search) },
            Some(answer) = sink.questions.join_next() => sink.heard(answer?),
            _ = tell.tick() => sink.tell(),
            _ = ask.tick() => sink.ask(),
            () = sleep_until(sink.batches.next_deadline()) => {
                let due = sink.batches.take_due(Instant::now());
                sink.launch(due);
            }
            event = sink.consumer.next() => sink.take(event?),
        }
    }
    sink.drain().await
}

/// Patterns as librdkafka reads them: extended regular expressions.
fn subscription(topics: &Topics) -> Vec<String> {
    let escaped: String =
        topics.prefix().chars().flat_map(|it| (!it.is_alphanumeric() && it != '_' && it != '-').then_some('\\').into_iter().chain([it])).collect();
    vec![format!("^{escaped}\\.[^.]+\\.[^.]+$"), format!("^{escaped}\\.transaction$")]
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// The stage's state. Nothing in it is shared.
struct Sink {
    consumer: Consumer,
    ship: Arc<Ship>,
    topics: Topics,
    batches: Batches,
    lanes: BTreeMap<Lane, LaneState>,
    lives: u64,
    flights: JoinSet<Flight>,
    searches: JoinSet<(Lane, u64, Result<Found, Error>)>,
    questions: JoinSet<Answer>,
    /// Some lane's position was refused by the broker; the next answer tells which.
    suspicious: bool,
}

/// Where each lane was when the broker was asked, and what it answered.
struct Answer {
    asked: BTreeMap<Lane, (u64, i64)>,
    suspicious: bool,
    ranges: Result<Vec<(Lane, i64, i64)>, Error>,
}

impl Sink {
    fn new(consumer: Consumer, ship: Arc<Ship>, topics: Topics, limits: Limits) -> Self {
        let (flights, searches, questions) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
        Self { consumer, ship, topics, batches: Batches::new(limits), lanes: BTreeMap::new(), lives: 0, flights, searches, questions, suspicious: false }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Records { lane, start, records } => self.push(&lane, start, *records),
            Event::Assigned(lanes) => {
                let held_before = self.lanes.len();
                info!(lanes = lanes.len(), held_before, "lanes assigned");
                lanes.into_iter().for_each(|it| self.search(it));
            }
            Event::Revoked(lanes) => {
                info!(lanes = lanes.len(), "lanes revoked");
                lanes.iter().for_each(|it| self.lose(it));
            }
            Event::Held(held) => {
                info!(held, "the lake was told to pause or to go on");
                self.ship.stats.send_modify(|it| it.phase = if held { Phase::Paused } else { Phase::Running });
            }
            Event::OutOfRange => {
                self.suspicious = true;
                self.ask();
            }
            Event::Trouble(trouble) => {
                debug!(trouble, "kafka");
                self.ship.stats.send_modify(|it| it.kafka_trouble = Some(trouble));
            }
        }
    }

    fn push(&mut self, lane: &Lane, start: u64, records: Records) {
        let Some(LaneState { state: State::Reading { start: current, next_offset }, .. }) = self.lanes.get_mut(lane) else { return };
        // Records of an earlier start were read at another place of the log.
        if *current == start
            && let Some(last_offset) = records.offsets.last()
        {
            *next_offset = last_offset + 1;
            let sealed = self.batches.push(lane, records, Instant::now());
            self.launch(sealed);
        }
    }

    /// A lane is ours, or turned out to be elsewhere: finds its position, however long the store is away.
    fn search(&mut self, lane: Lane) {
        let Some(table) = self.topics.lake_name(&lane.topic) else { return };
        self.lose(&lane);
        self.lives += 1;
        let (life, ship, probe, key) = (self.lives, Arc::clone(&self.ship), self.consumer.probe(), lane.clone());
        let search = self.searches.spawn(async move {
            let found = ship.retried(|| find(&ship.store, &probe, &lane)).await;
            (lane, life, found)
        });
        self.lanes.insert(key, LaneState::new(table, life, search));
        self.tell();
    }

    fn lose(&mut self, lane: &Lane) {
        self.batches.forget(lane);
        // A batch on its way may land: whoever has the lane now meets its commit record.
        if let Some(LaneState { state: State::Searching(search), .. }) = self.lanes.remove(lane) {
            search.abort();
        }
    }

    fn found(&mut self, (lane, life, found): (Lane, u64, Result<Found, Error>)) {
        let Some(state) = self.lanes.get_mut(&lane).filter(|it| it.life == life) else { return };
        let found = match found {
            Ok(found) => found,
            Err(error) => return self.stop_lane(&lane, Stopped { why: chain(&error), remedy: remedy(&error) }),
        };
        state.landed_offset = found.newest.as_ref().map(|it| it.record.last_offset + 1);
        state.log = Some((found.facts.log_start, found.facts.log_end, now_ms()));
        match found.position() {
            Err(stopped) => self.stop_lane(&lane, stopped),
            Ok(position) => {
                info!(%lane, position, first_time = found.newest.is_none(), "lane is read");
                state.landed_offset = Some(position);
                state.previous = found.newest.map(|it| it.sha256);
                let start = self.consumer.read_from(&lane, position);
                state.state = State::Reading { start, next_offset: position };
                self.batches.begin(lane, position);
            }
        }
    }

    /// Loudly: the operator has to act. The other lanes go on.
    fn stop_lane(&mut self, lane: &Lane, stopped: Stopped) {
        error!(%lane, why = stopped.why, remedy = stopped.remedy, "lane stopped");
        self.consumer.leave(lane);
        self.batches.forget(lane);
        if let Some(state) = self.lanes.get_mut(lane) {
            state.stop(stopped);
        }
        self.tell();
    }

    /// Sends sealed batches on their way.
    fn launch(&mut self, sealed: Vec<Sealed>) {
        let mut ready = BTreeSet::new();
        for batch in sealed {
            if let Some(state) = self.lanes.get_mut(&batch.lane) {
                ready.insert(batch.lane.clone());
                state.waiting.push_back(batch);
            }
        }
        ready.iter().for_each(|it| self.launch_next(it));
    }

    /// Starts whatever the lane may start: objects several at a time, commit records one by one.
    fn launch_next(&mut self, lane: &Lane) {
        let Some(state) = self.lanes.get_mut(lane) else { return };
        let life = state.life;
        while let Some((number, batch)) = state.next_to_prepare() {
            let (ship, lane, table) = (Arc::clone(&self.ship), lane.clone(), state.table.clone());
            self.flights.spawn(async move { Flight { lane, life, news: News::Prepared(number, ship.prepare(batch, table).await) } });
        }
        if let Some(object) = state.next_to_commit() {
            let (ship, lane, previous) = (Arc::clone(&self.ship), lane.clone(), state.previous.clone());
            self.flights.spawn(async move { Flight { lane, life, news: News::Committed(ship.commit(object, previous).await) } });
        }
    }

    fn arrived(&mut self, Flight { lane, life, news }: Flight) -> Result<(), Error> {
        if let News::Committed(Ok(Landing::Landed { stored, ages, dead_letters })) = &news {
            debug!(object = stored.record.data, rows = stored.record.rows, "landed");
            self.count(&lane, &stored.record, ages, *dead_letters);
        }
        // What belongs to an earlier life of the lane has no say in this one.
        let Some(state) = self.lanes.get_mut(&lane).filter(|it| it.life == life) else { return Ok(()) };
        match news {
            News::Prepared(number, Ok(object)) => {
                state.prepared(number, object);
                self.launch_next(&lane);
            }
            News::Committed(Ok(Landing::Landed { stored, .. })) => {
                self.consumer.commit(&lane, stored.record.last_offset + 1);
                state.landed(*stored);
                self.launch_next(&lane);
                self.tell();
            }
            News::Committed(Ok(Landing::Another)) => {
                warn!(%lane, "another writer was first; going on behind what it has landed");
                self.ship.stats.send_modify(|it| it.races += 1);
                self.search(lane);
            }
            News::Prepared(_, Err(error @ (Error::Encode(_) | Error::TaskEnded(_)))) => return Err(error),
            News::Prepared(_, Err(error)) | News::Committed(Err(error)) => {
                self.stop_lane(&lane, Stopped { why: chain(&error), remedy: remedy(&error) });
            }
        }
        Ok(())
    }

    fn count(&self, lane: &Lane, record: &log::CommitRecord, ages: &Ages, dead_letters: u64) {
        let Some(table) = self.topics.lake_name(&lane.topic) else { return };
        self.ship.stats.send_modify(|it| {
            let counts = it.tables.entry(table.clone()).or_default();
            counts.objects += 1;
            counts.records += record.rows;
            counts.bytes += record.bytes;
            counts.dead_letters += dead_letters;
            it.landing.merge(&ages.since_sent);
            it.commit_to_landed.merge(&ages.since_committed);
            it.newest.truncate(Stats::NEWEST - 1);
            it.newest.push_front(NewObject { table, key: record.data.clone(), rows: record.rows, bytes: record.bytes, landed_at_ms: now_ms() });
        });
    }

    /// Asks for the ends of all lanes' logs, one question at a time.
    fn ask(&mut self) {
        let position = |state: &LaneState| match state.state {
            State::Reading { next_offset, .. } => Some((state.life, next_offset)),
            State::Searching(_) | State::Stopped(_) => None,
        };
        let asked: BTreeMap<_, _> = self.lanes.iter().filter_map(|(lane, state)| Some((lane.clone(), position(state)?))).collect();
        if !self.questions.is_empty() || asked.is_empty() {
            return;
        }
        let (probe, suspicious) = (self.consumer.probe(), std::mem::take(&mut self.suspicious));
        self.questions.spawn(async move {
            let ranges = probe.log_ranges(asked.keys().cloned().collect()).await.map_err(Error::from);
            Answer { asked, suspicious, ranges }
        });
    }

    fn heard(&mut self, Answer { asked, suspicious, ranges }: Answer) {
        let ranges = match ranges {
            Ok(ranges) => ranges,
            Err(error) => {
                self.suspicious |= suspicious;
                return self.ship.stats.send_modify(|it| it.kafka_trouble = Some(chain(&error)));
            }
        };
        self.ship.stats.send_if_modified(|it| it.kafka_trouble.take().is_some());
        for (lane, log_start, log_end) in ranges {
            let Some((life, asked_at)) = asked.get(&lane).copied() else { continue };
            let Some(state) = self.lanes.get_mut(&lane).filter(|it| it.life == life) else { continue };
            state.log = Some((log_start, log_end, now_ms()));
            // The prefetch may lie before the log's start; only where the broker has refused is that a loss.
            let log_start = if suspicious { log_start } else { asked_at.min(log_start) };
            if let Err(stopped) = in_log(asked_at, log_start, log_end) {
                self.stop_lane(&lane, stopped);
            }
        }
    }

    /// Tells what changes without anything landing: positions, ends, what is open.
    fn tell(&self) {
        let mut lanes = Vec::with_capacity(self.lanes.len());
        let mut open: BTreeMap<&str, (u64, Option<i64>)> = BTreeMap::new();
        for (lane, state) in &self.lanes {
            for (rows, oldest) in state.unlanded().chain(self.batches.open(lane)) {
                let table = open.entry(&state.table).or_default();
                table.0 += rows as u64;
                table.1 = Some(table.1.map_or(oldest, |it| it.min(oldest)));
            }
            lanes.push(LaneStats {
                topic: lane.topic.to_string(),
                partition: lane.partition,
                table: state.table.clone(),
                landed_offset: state.landed_offset,
                end_offset: state.log.map(|it| it.1),
                end_seen_ms: state.log.map(|it| it.2),
                trouble: if let State::Stopped(Stopped { why, remedy }) = &state.state { Some(format!("{why}; {remedy}")) } else { None },
            });
        }
        self.ship.stats.send_modify(|it| {
            for table in lanes.iter().map(|it| &it.table) {
                it.tables.entry(table.clone()).or_default();
            }
            for (name, table) in &mut it.tables {
                (table.open_records, table.oldest_unlanded_ms) = open.get(name.as_str()).copied().unwrap_or_default();
            }
            it.lanes = lanes;
            it.open_bytes = self.consumer.bytes_in_memory();
        });
    }

    /// Lands what is read, as far as the store lets it, and leaves the group.
    async fn drain(mut self) -> Result<(), Error> {
        self.searches.abort_all();
        self.questions.abort_all();
        let open = self.batches.take_all();
        self.launch(open);
        let landing = async {
            while let Some(flight) = self.flights.join_next().await {
                // Lanes that would have to be found again are left to the next start.
                self.arrived(flight?)?;
            }
            Ok::<_, Error>(())
        };
        let landed = tokio::time::timeout(DRAIN_MAX, landing).await;
        self.flights.abort_all();
        if landed.is_err() {
            warn!("stopped while the store was away; what is not in the lake is read again by the next start");
        }
        self.tell();
        let stopped = self.lanes.iter().find_map(|(lane, it)| if let State::Stopped(it) = &it.state { Some(it.clone().into_error(lane)) } else { None });
        self.consumer.close().await;
        landed.unwrap_or(Ok(()))?;
        stopped.map_or(Ok(()), Err)
    }
}

fn remedy(error: &Error) -> String {
    use crate::fault::{Diagnose as _, Fault};
    match error.fault() {
        Fault::Operator(remedy) | Fault::Data(remedy) => remedy,
        Fault::Transient => "it is tried again at the next start".to_owned(),
        Fault::Bug => "this is a bug of ours: please report it".to_owned(),
    }
}

/// Asks the broker first: its log may only grow afterwards, so a position is never judged by an older end.
async fn find(store: &Store, probe: &Probe, lane: &Lane) -> Result<Found, Error> {
    let hint = probe.facts(lane).await?;
    let newest = log::newest(store, &lane.topic, lane.partition, hint.committed).await?;
    // Another writer may have landed what came in between: the end is asked again behind it.
    let facts = probe.facts(lane).await?;
    Ok(Found { newest, facts })
}
