//! A Kafka consumer whose position somebody else owns: assign and revoke are events, and a lane is read only once its
//! owner has said from where.
//!
//! librdkafka is polled on a thread of its own, which hands over runs of records by a bounded channel. What the owner wishes
//! (read from here, leave, hold still, commit) is kept as state, newest wish per lane, so neither side ever waits for the other
//! to read its orders. Every start of a lane has a number; records carry it, so that what was on its way when a lane was
//! started again is recognised and dropped. After a crash the group's committed offset is a hint and no more.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, ClientContext, Message as _, Offset, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext, RebalanceProtocol},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
    types::RDKafkaRespErr,
};
use tokio::sync::mpsc;

use super::{
    Lane,
    records::{Budget, Records},
};

/// How long a poll may wait; also how long a wish may lie.
const POLL: Duration = Duration::from_millis(20);
/// A run is handed over when it has this many rows or bytes, or when nothing more is at hand.
const RUN_ROWS: usize = 4_096;
const RUN_BYTES: u64 = 1024 * 1024;
/// Events under way to the owner; each carries at most one run.
const EVENTS: usize = 32;
/// How long a full budget is waited for before the lanes are paused at the broker, which drops what is prefetched.
const PATIENCE: Duration = Duration::from_millis(500);
/// Questions to the broker (watermarks, committed offsets) are given up after this.
const ASK: Duration = Duration::from_secs(5);
/// Young pipelines create their topics after we have subscribed: look often at first.
const QUICK_LOOKS: (Duration, u32) = (Duration::from_millis(500), 60);

/// What a consumer is made from.
#[derive(Debug, Clone)]
pub struct Settings {
    pub bootstrap_servers: String,
    pub group: String,
    /// Topics by name or, with a leading `^`, by regular expression.
    pub topics: Vec<String>,
    /// Records handed over and not dropped yet may take this much memory; then the lanes are held.
    pub bytes_max: u64,
}

/// What happened, in the order in which it happened.
#[derive(Debug)]
pub enum Event {
    /// These lanes are ours. Nothing is read of them until [`Consumer::read_from`].
    Assigned(Vec<Lane>),
    /// These lanes are ours no more; nothing of them follows.
    Revoked(Vec<Lane>),
    /// What follows in a lane, read since the start with this number.
    Records { lane: Lane, start: u64, records: Box<Records> },
    /// Whether all lanes are held still, after [`Consumer::hold`].
    Held(bool),
    /// Some lane's position is outside the broker's log; Kafka's client does not say which.
    OutOfRange,
    /// The broker does not answer, or answers with an error; the client keeps trying.
    Trouble(String),
}

/// What the broker knows about a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// The group's committed offset: the next one to read, as far as it knows.
    pub committed: Option<i64>,
    /// The first offset that the log still has.
    pub log_start: i64,
    /// The offset that the next record will get.
    pub log_end: i64,
}

/// One consumer of a group, on its own thread.
pub struct Consumer {
    client: Arc<Client>,
    shared: Arc<Shared>,
    events: mpsc::Receiver<Event>,
    starts: u64,
    thread: Option<JoinHandle<()>>,
}

type Client = BaseConsumer<Callbacks>;

/// The consumer's thread has ended; only a bug does that.
#[derive(Debug, thiserror::Error)]
#[error("the Kafka consumer's thread ended")]
pub struct Ended;

impl Consumer {
    /// Subscribes. Does not wait for the broker: being away is an event.
    pub fn start(settings: &Settings) -> KafkaResult<Self> {
        let client: Client = client_config(settings).create_with_context(Callbacks::default())?;
        client.subscribe(&settings.topics.iter().map(String::as_str).collect::<Vec<_>>())?;
        let client = Arc::new(client);
        let shared = Arc::new(Shared { wishes: Mutex::default(), budget: Budget::new(settings.bytes_max) });
        let (events_in, events) = mpsc::channel(EVENTS);
        let worker = Worker::new(Arc::clone(&client), Arc::clone(&shared), events_in);
        let thread = std::thread::Builder::new().name("kafka-consumer".to_owned()).spawn(move || worker.run());
        let thread = thread.map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        Ok(Self { client, shared, events, starts: 0, thread: Some(thread) })
    }

    /// The next event. Cancel-safe.
    pub async fn next(&mut self) -> Result<Event, Ended> {
        self.events.recv().await.ok_or(Ended)
    }

    /// Reads an assigned lane from this offset on, also if it is being read elsewhere in its log. Returns the start's number.
    pub fn read_from(&mut self, lane: &Lane, offset: i64) -> u64 {
        self.starts += 1;
        self.shared.wishes().lanes.insert(lane.clone(), LaneWish::ReadFrom { offset, start: self.starts });
        self.starts
    }

    /// Reads no more of a lane; it stays assigned.
    pub fn leave(&self, lane: &Lane) {
        self.shared.wishes().lanes.insert(lane.clone(), LaneWish::Leave);
    }

    /// Holds all lanes still, or lets them go on. [`Event::Held`] says when it is so.
    pub fn hold(&self, hold: bool) {
        self.shared.wishes().hold = hold;
    }

    /// Tells the group the next offset to read. For lag displays and as a hint; a lost commit is no loss.
    pub fn commit(&self, lane: &Lane, next_offset: i64) {
        self.shared.wishes().commits.insert(lane.clone(), next_offset);
    }

    /// Bytes of records handed over and not dropped yet.
    pub fn bytes_in_memory(&self) -> u64 {
        self.shared.budget.used()
    }

    /// For questions to the broker while the consumer works.
    pub fn probe(&self) -> Probe {
        Probe { client: Arc::clone(&self.client) }
    }

    /// Commits what is to be committed and leaves the group, so that its lanes go to others at once.
    pub async fn close(mut self) {
        self.shared.wishes().closing = true;
        self.events.close();
        let (thread, client) = (self.thread.take(), Arc::clone(&self.client));
        drop(self);
        let joined = tokio::task::spawn_blocking(move || {
            // The thread drops its share first; the last share leaves the group, which may take a round trip.
            let joined = thread.map(JoinHandle::join);
            drop(client);
            joined
        });
        if matches!(joined.await, Err(_) | Ok(Some(Err(_)))) {
            tracing::error!("the Kafka consumer's thread panicked");
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.shared.wishes().closing = true;
    }
}

/// Asks the broker; each question blocks a thread of the blocking pool for [`ASK`] at most.
#[derive(Clone)]
pub struct Probe {
    client: Arc<Client>,
}

impl Probe {
    pub async fn facts(&self, lane: &Lane) -> KafkaResult<Facts> {
        let (client, lane) = (Arc::clone(&self.client), lane.clone());
        blocking(move || {
            let committed = client.committed_offsets(partitions([(&lane, Offset::Invalid)])?, ASK)?;
            let committed = committed.elements().first().and_then(|it| if let Offset::Offset(offset) = it.offset() { Some(offset) } else { None });
            let (log_start, log_end) = client.fetch_watermarks(&lane.topic, lane.partition, ASK)?;
            Ok(Facts { committed, log_start, log_end })
        })
        .await
    }

    /// First offset and end offset of each lane's log.
    pub async fn log_ranges(&self, lanes: Vec<Lane>) -> KafkaResult<Vec<(Lane, i64, i64)>> {
        let client = Arc::clone(&self.client);
        blocking(move || {
            let range = |lane: Lane| client.fetch_watermarks(&lane.topic, lane.partition, ASK).map(|(start, end)| (lane, start, end));
            lanes.into_iter().map(range).collect()
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(ask: impl FnOnce() -> KafkaResult<T> + Send + 'static) -> KafkaResult<T> {
    tokio::task::spawn_blocking(ask).await.unwrap_or(Err(KafkaError::Canceled))
}

fn client_config(settings: &Settings) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &settings.bootstrap_servers)
        .set("group.id", &settings.group)
        .set("client.id", "ledgerline-lake")
        .set("group.protocol", "classic")
        .set("partition.assignment.strategy", "cooperative-sticky")
        // A sink that was killed holds up the others no longer than this.
        .set("session.timeout.ms", "10000")
        .set("heartbeat.interval.ms", "2000")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "error")
        .set("allow.auto.create.topics", "false")
        .set("topic.metadata.refresh.interval.ms", "5000")
        // The default back-off of a second cuts the throughput to a third.
        .set("fetch.queue.backoff.ms", "5")
        // The prefetch: enough to keep the encoder busy, small enough for a process of a few hundred megabytes.
        .set("queued.min.messages", "100000")
        .set("queued.max.messages.kbytes", "16384")
        .set("fetch.message.max.bytes", "2097152")
        .set("check.crcs", "true");
    config
}

fn partitions<'a>(lanes: impl IntoIterator<Item = (&'a Lane, Offset)>) -> KafkaResult<TopicPartitionList> {
    let mut list = TopicPartitionList::new();
    for (lane, offset) in lanes {
        list.add_partition_offset(&lane.topic, lane.partition, offset)?;
    }
    Ok(list)
}

/// What the owner wishes: the newest wish per lane, so the size is bounded by the number of lanes.
#[derive(Default)]
struct Wishes {
    lanes: BTreeMap<Lane, LaneWish>,
    commits: BTreeMap<Lane, i64>,
    hold: bool,
    closing: bool,
}

enum LaneWish {
    ReadFrom { offset: i64, start: u64 },
    Leave,
}

struct Shared {
    wishes: Mutex<Wishes>,
    budget: Arc<Budget>,
}

impl Shared {
    fn wishes(&self) -> MutexGuard<'_, Wishes> {
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Called by librdkafka while the thread polls. Takes part in rebalances, but starts no lane: their owner will.
#[derive(Default)]
struct Callbacks {
    /// Lanes that librdkafka fetches by our order; only these can be unassigned.
    fetching: Mutex<BTreeSet<Lane>>,
    rebalances: Mutex<Vec<Event>>,
}

impl Callbacks {
    fn fetching(&self) -> MutexGuard<'_, BTreeSet<Lane>> {
        self.fetching.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rebalances(&self) -> MutexGuard<'_, Vec<Event>> {
        self.rebalances.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientContext for Callbacks {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => tracing::error!(facility, "kafka client: {message}"),
            RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning => tracing::warn!(facility, "kafka client: {message}"),
            _ => tracing::debug!(facility, "kafka client: {message}"),
        }
    }

    // Errors also come out of `poll`, where they become events.
    fn error(&self, _error: KafkaError, _reason: &str) {}
}

impl ConsumerContext for Callbacks {
    fn rebalance(&self, client: &Client, error: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let elements = list.elements();
        let lanes: Vec<Lane> = elements.iter().map(|it| Lane { topic: it.topic().into(), partition: it.partition() }).collect();
        let cooperative = matches!(client.rebalance_protocol(), RebalanceProtocol::Cooperative);
        let assigned = error == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        let answered = if assigned {
            // Agrees to the rebalance with an empty list: fetching begins when the owner has found the position.
            if cooperative { client.incremental_assign(&TopicPartitionList::new()) } else { client.assign(&TopicPartitionList::new()) }
        } else if cooperative {
            let mut fetching = self.fetching();
            let stop: Vec<&Lane> = lanes.iter().filter(|it| fetching.remove(*it)).collect();
            partitions(stop.into_iter().map(|it| (it, Offset::Invalid))).and_then(|it| client.incremental_unassign(&it))
        } else {
            self.fetching().clear();
            client.unassign()
        };
        if let Err(error) = answered {
            self.rebalances().push(Event::Trouble(format!("could not take part in a rebalance: {error}")));
        }
        self.rebalances().push(if assigned { Event::Assigned(lanes) } else { Event::Revoked(lanes) });
    }
}

/// A lane that is being read, and what has come in since the last hand-over.
struct Reading {
    lane: Lane,
    start: u64,
    next_offset: i64,
    run: Records,
}

/// The thread's side.
struct Worker {
    client: Arc<Client>,
    shared: Arc<Shared>,
    events: mpsc::Sender<Event>,
    assigned: BTreeSet<Lane>,
    reading: Vec<Reading>,
    /// The owner wishes that all lanes hold still, and knows that they do.
    held: bool,
    /// The lanes are paused at librdkafka, for whatever reason.
    paused: bool,
    full_since: Option<Instant>,
    next_look: Instant,
    looks_left: u32,
}

impl Worker {
    fn new(client: Arc<Client>, shared: Arc<Shared>, events: mpsc::Sender<Event>) -> Self {
        let (assigned, reading) = (BTreeSet::new(), Vec::new());
        Self { client, shared, events, assigned, reading, held: false, paused: false, full_since: None, next_look: Instant::now(), looks_left: QUICK_LOOKS.1 }
    }

    fn run(mut self) {
        // Ends when the owner is gone: then nobody takes events.
        while !self.shared.wishes().closing && self.turn().is_ok() {}
        let commits = std::mem::take(&mut self.shared.wishes().commits);
        self.commit(&commits, CommitMode::Sync);
    }

    fn turn(&mut self) -> Result<(), Ended> {
        self.obey()?;
        self.look_for_topics();
        if self.may_poll() {
            self.gather()?;
        } else {
            std::thread::sleep(POLL / 4);
        }
        self.pass_on_rebalances()?;
        self.hand_over()
    }

    fn tell(&self, event: Event) -> Result<(), Ended> {
        self.events.blocking_send(event).map_err(|_| Ended)
    }

    /// Does what the owner wishes since the last turn.
    fn obey(&mut self) -> Result<(), Ended> {
        let (lanes, commits, hold) = {
            let mut wishes = self.shared.wishes();
            (std::mem::take(&mut wishes.lanes), std::mem::take(&mut wishes.commits), wishes.hold)
        };
        for (lane, wish) in lanes {
            // A wish for a lane that was revoked meanwhile is void; so is what was read of it before.
            self.stop_reading(&lane);
            if let LaneWish::ReadFrom { offset, start } = wish
                && self.assigned.contains(&lane)
            {
                self.start_reading(lane, offset, start)?;
            }
        }
        self.commit(&commits, CommitMode::Async);
        if hold != self.held {
            self.held = hold;
            self.pause(hold || self.paused);
            self.tell(Event::Held(hold))?;
        }
        Ok(())
    }

    fn start_reading(&mut self, lane: Lane, offset: i64, start: u64) -> Result<(), Ended> {
        let list = partitions([(&lane, Offset::Offset(offset))]);
        if let Err(error) = list.and_then(|it| self.client.incremental_assign(&it)) {
            // A rebalance is in the way; its events will follow and the lane be started anew.
            return self.tell(Event::Trouble(format!("could not read {lane} from offset {offset}: {error}")));
        }
        self.client.context().fetching().insert(lane.clone());
        if self.paused {
            let _ = partitions([(&lane, Offset::Invalid)]).and_then(|it| self.client.pause(&it));
        }
        self.reading.push(Reading { lane, start, next_offset: offset, run: Records::default() });
        Ok(())
    }

    fn stop_reading(&mut self, lane: &Lane) {
        self.reading.retain(|it| it.lane != *lane);
        if self.client.context().fetching().remove(lane)
            && let Err(error) = partitions([(lane, Offset::Invalid)]).and_then(|it| self.client.incremental_unassign(&it))
        {
            tracing::debug!(%lane, %error, "lane was unassigned already");
        }
    }

    fn commit(&self, commits: &BTreeMap<Lane, i64>, mode: CommitMode) {
        if commits.is_empty() {
            return;
        }
        let list = partitions(commits.iter().map(|(lane, offset)| (lane, Offset::Offset(*offset))));
        if let Err(error) = list.and_then(|it| self.client.commit(&it, mode)) {
            tracing::debug!(%error, "offsets were not committed; the lake knows the position");
        }
    }

    /// A request for all topics also makes librdkafka match them against the subscription.
    fn look_for_topics(&mut self) {
        if self.looks_left > 0 && self.next_look <= Instant::now() {
            self.looks_left -= 1;
            if let Err(error) = self.client.fetch_metadata(None, POLL * 50) {
                tracing::debug!(%error, "no list of topics yet");
            }
            self.next_look = Instant::now() + QUICK_LOOKS.0;
        }
    }

    /// Holds back while the budget is full: first by not polling, then by pausing, so that the group does not lose us.
    fn may_poll(&mut self) -> bool {
        if self.shared.budget.is_full() {
            let full_since = *self.full_since.get_or_insert_with(Instant::now);
            if full_since.elapsed() < PATIENCE {
                return false;
            }
            self.pause(true);
        } else if self.full_since.is_none() || self.shared.budget.is_roomy() {
            // Pausing drops what is prefetched, so it ends only once there is room for more than a run.
            self.full_since = None;
            self.pause(self.held);
        }
        true
    }

    fn pause(&mut self, pause: bool) {
        if pause == self.paused {
            return;
        }
        self.paused = pause;
        let list = partitions(self.reading.iter().map(|it| (&it.lane, Offset::Invalid)));
        if let Err(error) = list.and_then(|it| if pause { self.client.pause(&it) } else { self.client.resume(&it) }) {
            tracing::warn!(%error, pause, "could not pause or resume all lanes");
        }
    }

    /// Polls until a run is complete or nothing more is at hand.
    fn gather(&mut self) -> Result<(), Ended> {
        let client = Arc::clone(&self.client);
        let (mut rows, mut bytes, mut current, mut wait) = (0, 0, 0, POLL);
        while rows < RUN_ROWS && bytes < RUN_BYTES {
            let message = match client.poll(wait) {
                Some(Ok(message)) => message,
                Some(Err(error)) => return self.tell(told(&error)),
                None => break,
            };
            wait = Duration::ZERO;
            let is_at = |it: &Reading| it.lane.partition == message.partition() && *it.lane.topic == *message.topic();
            if !self.reading.get(current).is_some_and(is_at) {
                let Some(found) = self.reading.iter().position(is_at) else { continue };
                current = found;
            }
            let reading = &mut self.reading[current];
            // Below what was read: a fetch that was under way when the lane was started again.
            if message.offset() >= reading.next_offset {
                reading.next_offset = message.offset() + 1;
                reading.run.push(message.offset(), message.timestamp().to_millis().unwrap_or_default(), message.key(), message.payload());
                rows += 1;
                bytes += message.payload_len() as u64 + message.key_len() as u64;
            }
        }
        Ok(())
    }

    fn pass_on_rebalances(&mut self) -> Result<(), Ended> {
        let rebalances = std::mem::take(&mut *self.client.context().rebalances());
        for event in rebalances {
            match &event {
                Event::Assigned(lanes) => self.assigned.extend(lanes.iter().cloned()),
                Event::Revoked(lanes) => {
                    self.assigned.retain(|it| !lanes.contains(it));
                    self.reading.retain(|it| !lanes.contains(&it.lane));
                }
                _ => {}
            }
            self.tell(event)?;
        }
        Ok(())
    }

    fn hand_over(&mut self) -> Result<(), Ended> {
        for reading in self.reading.iter_mut().filter(|it| !it.run.is_empty()) {
            let mut records = Box::new(std::mem::take(&mut reading.run));
            records.lease_from(&self.shared.budget);
            let event = Event::Records { lane: reading.lane.clone(), start: reading.start, records };
            self.events.blocking_send(event).map_err(|_| Ended)?;
        }
        Ok(())
    }
}

fn told(error: &KafkaError) -> Event {
    match error {
        KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange) => Event::OutOfRange,
        other => Event::Trouble(other.rdkafka_error_code().map_or_else(|| other.to_string(), |it| it.to_string())),
    }
}
