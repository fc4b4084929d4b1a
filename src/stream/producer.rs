//! Keyed, ordered sending. Idempotent, acknowledged by all replicas, lz4; never blocks, and tells when the broker has it.
//!
//! Order holds per lane. A message waits for the broker as long as it takes (minutes of absence are ordinary); the queue is
//! bounded, and a full one is told to the sender, who waits. What can never be delivered fails the whole producer: its
//! owner makes a new one and starts again from what was acknowledged.

use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use rdkafka::{
    ClientConfig, ClientContext, Message,
    config::RDKafkaLogLevel,
    error::{KafkaError, RDKafkaErrorCode},
    message::{DeliveryResult, Header, Headers as _, OwnedHeaders},
    producer::{BaseRecord, Producer as _, ProducerContext, PurgeConfig, ThreadedProducer},
};
use tokio::sync::Notify;

use super::{Access, Hearing, access};
use crate::fault::{Diagnose, Fault};

/// Bytes that may wait for the broker: room for the largest message. With what else a message takes it stays below 64 MiB of memory.
const QUEUE_KIB: usize = 24 * 1024;
const _: () = assert!(QUEUE_KIB * 1024 > MESSAGE_BYTES_MAX, "a message that the queue never has room for would wait for ever");
/// Messages that may wait for the broker; librdkafka keeps more than 500 bytes for each beside its payload. More of them are not faster
/// (measured), and a broker that is away fills any queue.
pub const QUEUE_MESSAGES: u64 = 10_000;
/// The largest message we send: a row before and after, as JSON. What is larger needs a person.
pub const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Bytes of one batch before it is compressed, where the topics take that much; those that we make take a multiple of it.
const BATCH_BYTES: usize = 2 * 1024 * 1024;
/// A broker that has not answered a request for so long is asked again on a new connection, as Java's producer has it: half of
/// librdkafka's own limit, and still enough for a full batch at 70 kB/s.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Without any acknowledgement for so long, messages that wait are worth a word.
const SILENCE_TOLD: Duration = Duration::from_secs(15);
/// Acknowledgements after which a full queue is worth another look.
const ROOM: u64 = 512;
/// How long a full queue is waited for before looking again, should its wake-up be missed.
const FULL_QUEUE_WAIT: Duration = Duration::from_millis(50);

/// One message to send. Borrowed: the queue takes a copy.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    pub topic: &'a str,
    /// None: chosen by the key's hash as Java's default partitioner does.
    pub partition: Option<i32>,
    pub key: Option<&'a [u8]>,
    /// None is a tombstone.
    pub value: Option<&'a [u8]>,
    pub headers: Option<&'a Headers>,
    /// When it was made, in milliseconds since 1970: whoever sends many at once looks at the clock once.
    pub timestamp_ms: i64,
}

/// Headers of messages, in their order: made once, copied into each message that has them.
#[derive(Debug, Clone)]
pub struct Headers(OwnedHeaders);

impl Headers {
    pub fn of(key: &str, value: &[u8]) -> Self {
        Self(OwnedHeaders::new()).and(key, value)
    }

    pub fn and(self, key: &str, value: &[u8]) -> Self {
        Self(self.0.insert(Header { key, value: Some(value) }))
    }

    /// With all of the others behind these.
    pub fn and_all(self, others: Option<&Self>) -> Self {
        let others = others.iter().flat_map(|it| it.0.iter());
        others.fold(self, |all, header| all.and(header.key, header.value.unwrap_or_default()))
    }
}

/// Counts the messages of one batch (a transaction, say) down to the last acknowledgement.
#[derive(Debug)]
pub struct Receipt {
    /// Messages not yet acknowledged, and one while the batch is open.
    missing: AtomicUsize,
}

impl Receipt {
    /// Of an open batch. Shared from the start: the queue holds it until its last message is acknowledged.
    pub fn open() -> Arc<Self> {
        Arc::new(Self { missing: AtomicUsize::new(1) })
    }

    /// Whether every message is acknowledged, and no more will come.
    pub fn is_acked(&self) -> bool {
        self.missing.load(Ordering::Acquire) == 0
    }

    fn add(&self) {
        self.missing.fetch_add(1, Ordering::Relaxed);
    }

    /// True when nothing is missing any more.
    fn settle_one(&self) -> bool {
        self.missing.fetch_sub(1, Ordering::AcqRel) == 1
    }
}

/// Why the stream did not take something.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("could not set up a producer for the stream")]
    Setup(#[source] KafkaError),
    #[error("could not send to topic {topic}")]
    Refused {
        topic: String,
        #[source]
        source: KafkaError,
    },
    #[error(
        "the broker does not take the time of our messages to topic {topic}: this machine's clock says {}, which is too far from the broker's. \
         Set the clock that is wrong (the topic's message.timestamp.after.max.ms is how far ahead ours may be); it is tried again meanwhile",
        clock.format("%F %T UTC")
    )]
    Clock { topic: String, clock: DateTime<Utc> },
    #[error(
        "the broker takes no such message in topic {topic}: a compacted topic takes none without a key (set cleanup.policy = delete), and none takes \
         one from far ahead (message.timestamp.after.max.ms). Set the clock, if it is wrong: this machine's clock says {}",
        clock.format("%F %T UTC")
    )]
    Invalid { topic: String, clock: DateTime<Utc> },
    #[error("the producer broke: {0}")]
    Broken(String),
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::Setup(_) => Fault::Operator("correct stream.bootstrap_servers".to_owned()),
            // Clocks and topics are set right while we run.
            Self::Broken(_) | Self::Clock { .. } | Self::Invalid { .. } => Fault::Transient,
            Self::Refused { topic, source } => match source.rdkafka_error_code() {
                Some(RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::InvalidMessageSize) => {
                    Fault::Operator(format!("a row is larger than topic {topic} takes: raise max.message.bytes of the topic (and of the broker)"))
                }
                Some(RDKafkaErrorCode::TopicAuthorizationFailed | RDKafkaErrorCode::ClusterAuthorizationFailed) => {
                    Fault::Operator(format!("allow this client to write topic {topic} (and idempotent writes)"))
                }
                _ => Fault::Transient,
            },
        }
    }
}

/// What the delivery thread tells the owner.
#[derive(Debug, Default)]
struct Shared {
    /// Rings whenever a receipt is complete, or the producer broke.
    bell: Notify,
    /// Rings, for all who wait, when the queue has room again after it was full.
    room: Notify,
    full: AtomicBool,
    failure: Mutex<Option<Error>>,
    failed: AtomicBool,
    acked: AtomicU64,
    reach: Arc<Reach>,
}

/// How the broker stands, for all producers that are beside each other: what happens to one is told once.
#[derive(Debug, Default)]
struct Reach {
    /// Whether it could not be reached when we last heard of it.
    away: AtomicBool,
    /// Whether it is there and refuses us.
    hearing: Hearing,
}

impl Shared {
    fn fail(&self, error: Error) {
        let mut failure = self.failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // The first failure is the cause, what follows are its consequences.
        failure.get_or_insert(error);
        self.failed.store(true, Ordering::Release);
        self.bell.notify_one();
        self.room.notify_waiters();
    }
}

struct Deliveries(Arc<Shared>);

impl ClientContext for Deliveries {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.0.reach.hearing.hear(message);
        access::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.reach.hearing.hear(reason);
        if let Some(RDKafkaErrorCode::Fatal) = error.rdkafka_error_code() {
            self.0.fail(Error::Broken(reason.to_owned()));
        } else if let Some(RDKafkaErrorCode::AllBrokersDown) = error.rdkafka_error_code()
            && !self.0.reach.away.swap(true, Ordering::Relaxed)
        {
            match self.0.reach.hearing.take() {
                Some(refusal) => tracing::warn!(remedy = refusal.remedy, "{}; messages wait", refusal.why),
                None => tracing::warn!(reason, "the broker is away, messages wait"),
            }
        }
    }
}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = Arc<Receipt>;

    fn delivery(&self, result: &DeliveryResult<'_>, receipt: Arc<Receipt>) {
        match result {
            Ok(_) => {
                let acked = self.0.acked.fetch_add(1, Ordering::Relaxed);
                // A batch's messages come one after the other: who waits is woken for a good part of them.
                if acked.is_multiple_of(ROOM) && self.0.full.swap(false, Ordering::Relaxed) {
                    self.0.room.notify_waiters();
                }
                let away = &self.0.reach.away;
                if away.load(Ordering::Relaxed) && away.swap(false, Ordering::Relaxed) {
                    tracing::info!("the broker is back");
                }
                if receipt.settle_one() {
                    self.0.bell.notify_one();
                }
            }
            Err((source, message)) => {
                let (topic, clock) = (message.topic().to_owned(), Utc::now());
                self.0.fail(match source.rdkafka_error_code() {
                    Some(RDKafkaErrorCode::InvalidTimestamp) => Error::Clock { topic, clock },
                    // What the broker says of a batch's other messages, too, where it refuses one for its time.
                    Some(RDKafkaErrorCode::InvalidRecord) => Error::Invalid { topic, clock },
                    _ => Error::Refused { topic, source: source.clone() },
                });
            }
        }
    }
}

/// The queue to the broker, with one owner.
pub struct Producer {
    /// None only while it is dropped.
    inner: Option<ThreadedProducer<Deliveries>>,
    settings: ClientConfig,
    shared: Arc<Shared>,
    silence: Mutex<Silence>,
}

/// Whether a broker says nothing though messages wait for it: a network that was cut without a word looks like a slow broker.
#[derive(Debug)]
struct Silence {
    acked: u64,
    since: Instant,
    told: bool,
}

impl Silence {
    fn new(now: Instant) -> Self {
        Self { acked: 0, since: now, told: false }
    }

    /// Whether it has been silent for long; told once.
    fn lasts(&mut self, acked: u64, n_waiting: u64, now: Instant) -> bool {
        if n_waiting == 0 || acked != self.acked {
            if self.told {
                tracing::info!("the broker acknowledges again");
            }
            *self = Self { acked, ..Self::new(now) };
        }
        let silent = now.saturating_duration_since(self.since) >= SILENCE_TOLD;
        if silent && !self.told {
            self.told = true;
            tracing::warn!(
                "the broker has acknowledged nothing for {} s, messages wait; a connection that a network forgot is given up after {} s",
                SILENCE_TOLD.as_secs(),
                SILENCE_MAX.as_secs()
            );
        }
        silent
    }
}

impl fmt::Debug for Producer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Producer").field("shared", &self.shared).finish_non_exhaustive()
    }
}

impl Producer {
    /// Sets the producer up; connects in the background.
    ///
    /// `topic_bytes_max` is the largest batch that every topic it will send to takes: librdkafka does not split what a
    /// broker refused, so one larger batch of ordinary rows would end it for good.
    pub fn new(access: impl Into<Access>, topic_bytes_max: usize) -> Result<Self, Error> {
        Self::set_up(settings(&access.into(), topic_bytes_max), Arc::default())
    }

    /// So many like this, each with a queue of its own: for senders whose messages need no order among each other's. Senders that share a
    /// queue wait for each other's locks, and librdkafka has one round of batches of a partition under way at a time (measured: two senders
    /// with a producer each send twice as much as with one).
    pub fn beside(&self, count: usize) -> Result<Vec<Self>, Error> {
        (0..count).map(|_| Self::set_up(self.settings.clone(), Arc::clone(&self.shared.reach))).collect()
    }

    fn set_up(settings: ClientConfig, reach: Arc<Reach>) -> Result<Self, Error> {
        let shared = Arc::new(Shared { reach, ..Shared::default() });
        let inner = settings.create_with_context(Deliveries(Arc::clone(&shared))).map_err(Error::Setup)?;
        Ok(Self { inner: Some(inner), settings, shared, silence: Mutex::new(Silence::new(Instant::now())) })
    }

    /// Puts a message into the queue, as part of an open batch. False: the queue is full, try again later.
    pub fn try_send(&self, outgoing: Outgoing<'_>, receipt: &Arc<Receipt>) -> Result<bool, Error> {
        let mut record = BaseRecord::<[u8], [u8], _>::with_opaque_to(outgoing.topic, Arc::clone(receipt));
        record.partition = outgoing.partition;
        record.key = outgoing.key;
        record.payload = outgoing.value;
        record.timestamp = Some(outgoing.timestamp_ms);
        record.headers = outgoing.headers.map(|it| it.0.clone());
        receipt.add();
        match self.inner().send(record) {
            Ok(()) => Ok(true),
            Err((error, _)) => {
                receipt.settle_one();
                match error.rdkafka_error_code() {
                    Some(RDKafkaErrorCode::QueueFull) => {
                        self.shared.full.store(true, Ordering::Relaxed);
                        Ok(false)
                    }
                    Some(RDKafkaErrorCode::Fatal) => Err(Error::Broken(self.inner().client().fatal_error().map(|it| it.1).unwrap_or_default())),
                    _ => Err(Error::Refused { topic: outgoing.topic.to_owned(), source: error }),
                }
            }
        }
    }

    /// Puts a message into the queue, waiting while it is full. Cancelled while it waits, nothing was sent.
    pub async fn send(&self, outgoing: Outgoing<'_>, receipt: &Arc<Receipt>) -> Result<(), Error> {
        while !self.try_send(outgoing, receipt)? {
            self.check()?;
            // It may ring before we listen, or too few acknowledgements are left for it to ring at all: the timeout covers both.
            let _ = tokio::time::timeout(FULL_QUEUE_WAIT, self.shared.room.notified()).await;
        }
        Ok(())
    }

    /// Ends a batch: from now on its receipt can become complete.
    pub fn seal(&self, receipt: &Receipt) {
        if receipt.settle_one() {
            self.shared.bell.notify_one();
        }
    }

    fn inner(&self) -> &ThreadedProducer<Deliveries> {
        self.inner.as_ref().expect("the client is taken out only when the producer is dropped")
    }

    /// Something happened: a receipt became complete, or the producer broke. Cancel-safe; for one listener.
    pub async fn rung(&self) {
        self.shared.bell.notified().await;
    }

    /// The failure that ended this producer: the same for all who share it.
    pub fn check(&self) -> Result<(), Error> {
        if !self.shared.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        let failure = self.shared.failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        Err(failure.unwrap_or_else(|| Error::Broken("a message failed before".to_owned())))
    }

    /// Waits until the receipt is complete. Cancel-safe.
    pub async fn acked(&self, receipt: &Receipt) -> Result<(), Error> {
        while !receipt.is_acked() {
            self.check()?;
            let _ = tokio::time::timeout(FULL_QUEUE_WAIT, self.rung()).await;
        }
        Ok(())
    }

    /// Messages that wait for the broker.
    pub fn n_waiting(&self) -> u64 {
        u64::try_from(self.inner().in_flight_count()).unwrap_or(0)
    }

    /// Whether the broker could not be reached when we last heard of it, or we have not heard of it for long.
    pub fn is_broker_away(&self) -> bool {
        let mut silence = self.silence.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let silent = silence.lasts(self.shared.acked.load(Ordering::Relaxed), self.n_waiting(), Instant::now());
        silent || self.shared.reach.away.load(Ordering::Relaxed)
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.take() {
            // What still waits was never acknowledged and will be sent again; its receipts are of no interest any more.
            inner.purge(PurgeConfig::default().queue().inflight());
            drop_elsewhere(inner);
        }
    }
}

/// Drops a client of librdkafka on a thread of its own: its goodbye may take half a second, too long for the runtime.
pub(super) fn drop_elsewhere(client: impl Send + 'static) {
    // Where no thread can be made the closure is dropped here, and the client with it: slower, not wrong.
    drop(std::thread::Builder::new().name("kafka-goodbye".to_owned()).spawn(move || drop(client)));
}

fn settings(access: &Access, topic_bytes_max: usize) -> ClientConfig {
    let mut settings = access.client("ledgerline-cdc");
    settings
        .set("enable.idempotence", "true")
        .set("acks", "all")
        // A message waits for the broker for ever; giving up would be a hole.
        .set("message.timeout.ms", "0")
        .set("compression.type", "lz4")
        // Measured: at 5 ms librdkafka's thread burns twice the CPU on half-empty batches; what follows works in seconds.
        .set("linger.ms", "20")
        .set("batch.num.messages", "10000")
        // librdkafka has one batch a partition under way, and looks in a hot loop whether the next one, once it is older
        // than the linger, may follow. So a batch takes all there is: measured, a quarter of its thread's CPU.
        .set("batch.size", BATCH_BYTES.min(topic_bytes_max).to_string())
        // The same partition as Java's default partitioner chooses, so Debezium can take over and keys keep their order.
        .set("partitioner", "murmur2_random")
        .set("queue.buffering.max.kbytes", QUEUE_KIB.to_string())
        .set("queue.buffering.max.messages", QUEUE_MESSAGES.to_string())
        .set("message.max.bytes", MESSAGE_BYTES_MAX.to_string())
        .set("reconnect.backoff.ms", "50")
        .set("reconnect.backoff.max.ms", "1000")
        .set("retry.backoff.max.ms", "1000")
        .set("socket.timeout.ms", SILENCE_MAX.as_millis().to_string())
        .set("socket.keepalive.enable", "true");
    settings
}
