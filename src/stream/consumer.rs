//! A Kafka consumer whose position somebody else owns: assign and revoke are events, and a lane is read only once its
//! owner has said from where.
//!
//! librdkafka is polled on a thread of its own, which hands over runs of records by a bounded channel. What the owner wishes
//! (read from here, leave, hold still, commit) is kept as state, newest wish per lane, so neither side ever waits for the other
//! to read its orders. Every start of a lane has a number; records carry it, so that what was on its way when a lane was
//! started again is recognised and dropped. After a crash the group's committed offset is a hint and no more.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, KafkaResult},
};
use tokio::sync::{mpsc, oneshot};

mod worker;

use self::worker::{Callbacks, LaneWish, Shared, Worker};
use super::{
    Access, Lane,
    records::{Budget, Records},
};

/// Events under way to the owner; each carries at most one run.
const EVENTS: usize = 32;
/// Questions to the broker (watermarks, committed offsets) are given up after this.
const ASK: Duration = Duration::from_secs(5);
/// How long a stop waits for the group to let us go.
const LEAVE: Duration = Duration::from_secs(5);

/// What a consumer is made from.
#[derive(Debug, Clone)]
pub struct Settings {
    pub access: Access,
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
    /// Resolves when the thread has left the group.
    ended: Option<oneshot::Receiver<()>>,
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
        let (ending, ended) = oneshot::channel::<()>();
        let work = move || {
            worker.run();
            drop(ending);
        };
        let thread = std::thread::Builder::new().name("kafka-consumer".to_owned()).spawn(work);
        thread.map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        Ok(Self { client, shared, events, starts: 0, ended: Some(ended) })
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
    ///
    /// With the broker away that can take for ever: after [`LEAVE`] the thread is left to itself, and the group notices.
    pub async fn close(mut self) {
        self.shared.wishes().closing = true;
        self.events.close();
        let ended = self.ended.take();
        // The thread drops the last share of the client, and that is what leaves the group.
        drop(self);
        if let Some(ended) = ended
            && tokio::time::timeout(LEAVE, ended).await.is_err()
        {
            tracing::warn!("the broker does not answer; its group will notice that we are gone");
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
    let mut config = settings.access.client("ledgerline-lake");
    config
        .set("group.id", &settings.group)
        .set("group.protocol", "classic")
        .set("partition.assignment.strategy", "cooperative-sticky")
        // A sink that was killed holds up the others no longer than this.
        .set("session.timeout.ms", "10000")
        .set("heartbeat.interval.ms", "2000")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "error")
        .set("allow.auto.create.topics", "false")
        // A broker that is back is found within a second, not ten.
        .set("reconnect.backoff.max.ms", "1000")
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
