//! The consumer's thread: polls librdkafka, does what the owner wishes, hands over what comes in.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientContext, Message as _, Offset, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{CommitMode, Consumer as _, ConsumerContext, RebalanceProtocol},
    error::{KafkaError, RDKafkaErrorCode},
    types::RDKafkaRespErr,
};
use tokio::sync::mpsc;

use super::{Client, Ended, Event, partitions};
use crate::stream::{
    Hearing, Lane, Refusal, access,
    records::{Budget, Records},
};

/// How long a poll may wait; also how long a wish may lie.
const POLL: Duration = Duration::from_millis(20);
/// A run is handed over when it has this many rows or bytes, or when nothing more is at hand.
const RUN_ROWS: usize = 4_096;
const RUN_BYTES: u64 = 1024 * 1024;
/// How long a full budget is waited for before the lanes are paused at the broker, which drops what is prefetched.
const PATIENCE: Duration = Duration::from_millis(500);
/// Young pipelines create their topics after we have subscribed: look often at first.
const QUICK_LOOKS: (Duration, u32) = (Duration::from_millis(500), 60);

/// What the owner wishes: the newest wish per lane, so the size is bounded by the number of lanes.
#[derive(Default)]
pub(super) struct Wishes {
    pub(super) lanes: BTreeMap<Lane, LaneWish>,
    pub(super) commits: BTreeMap<Lane, i64>,
    pub(super) hold: bool,
    pub(super) closing: bool,
}

pub(super) enum LaneWish {
    ReadFrom { offset: i64, start: u64 },
    Leave,
}

pub(super) struct Shared {
    pub(super) wishes: Mutex<Wishes>,
    pub(super) budget: Arc<Budget>,
}

impl Shared {
    pub(super) fn wishes(&self) -> MutexGuard<'_, Wishes> {
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Called by librdkafka while the thread polls. Takes part in rebalances, but starts no lane: their owner will.
#[derive(Default)]
pub(super) struct Callbacks {
    /// Lanes that librdkafka fetches by our order; only these can be unassigned.
    fetching: Mutex<BTreeSet<Lane>>,
    rebalances: Mutex<Vec<Event>>,
    hearing: Hearing,
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
        self.hearing.hear(message);
        // A commit that a rebalance has overtaken: the lake knows the position, and whoever has the lane now commits for it.
        let level = if facility == "COMMITFAIL" { RDKafkaLogLevel::Debug } else { level };
        access::log(level, facility, message);
    }

    // Errors also come out of `poll`, where they become events; there they have no reason any more.
    fn error(&self, _error: KafkaError, reason: &str) {
        self.hearing.hear(reason);
    }
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
pub(super) struct Worker {
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
    pub(super) fn new(client: Arc<Client>, shared: Arc<Shared>, events: mpsc::Sender<Event>) -> Self {
        let (assigned, reading) = (BTreeSet::new(), Vec::new());
        Self { client, shared, events, assigned, reading, held: false, paused: false, full_since: None, next_look: Instant::now(), looks_left: QUICK_LOOKS.1 }
    }

    pub(super) fn run(mut self) {
        // Ends when the owner is gone: then nobody takes events.
        while !self.shared.wishes().closing && self.turn().is_ok() {}
        let commits = std::mem::take(&mut self.shared.wishes().commits);
        // Leaving the group waits for commits under way.
        self.commit(&commits);
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
        self.commit(&commits);
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
            // Tried again with the next turn, unless a rebalance that is in the way takes the lane from us.
            self.shared.wishes().lanes.entry(lane.clone()).or_insert(LaneWish::ReadFrom { offset, start });
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

    fn commit(&self, commits: &BTreeMap<Lane, i64>) {
        if commits.is_empty() {
            return;
        }
        let list = partitions(commits.iter().map(|(lane, offset)| (lane, Offset::Offset(*offset))));
        if let Err(error) = list.and_then(|it| self.client.commit(&it, CommitMode::Async)) {
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
        } else if !self.paused || self.shared.budget.is_roomy() {
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
                // Topics that do not exist yet are waited for, not in trouble.
                Some(Err(KafkaError::MessageConsumption(RDKafkaErrorCode::UnknownTopicOrPartition))) => break,
                Some(Err(error)) => return self.tell(self.told(&error)),
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

    fn told(&self, error: &KafkaError) -> Event {
        if let KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange) = error {
            return Event::OutOfRange;
        }
        if let Some(Refusal { why, remedy, .. }) = self.client.context().hearing.take() {
            return Event::Trouble(format!("{why} ({remedy})"));
        }
        let remedy = match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::GroupAuthorizationFailed) => " (allow this user to read the consumer group of lake.group)",
            Some(RDKafkaErrorCode::TopicAuthorizationFailed) => " (allow this user to describe and read the pipeline's topics)",
            Some(RDKafkaErrorCode::InconsistentGroupProtocol) => " (the group has members that are no sinks: choose another lake.group)",
            _ => "",
        };
        Event::Trouble(error.rdkafka_error_code().map_or_else(|| error.to_string(), |it| format!("{it}{remedy}")))
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
