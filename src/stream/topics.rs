//! Topics: made if missing, and how far they reach. Calls of librdkafka that wait are made on threads that may.

use std::{
    collections::BTreeSet,
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, ConfigResource, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    consumer::Consumer,
    error::{KafkaError, RDKafkaErrorCode},
    message::{Header, Headers},
};

use super::{
    Access, Hearing, Lane, Refusal,
    access::{Reader, heard},
    producer::{MESSAGE_BYTES_MAX, drop_elsewhere},
};
use crate::fault::{Diagnose, Fault};

/// How long the broker may take for one answer.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(10);

/// How often a question that waits listens for a refusal.
const LISTEN: Duration = Duration::from_millis(50);
/// How long the other brokers have to answer when one has refused us.
const OTHERS_ANSWER: Duration = Duration::from_secs(1);

/// Kafka's `message.max.bytes`, of brokers and topics that were not told otherwise.
const BYTES_MAX_BY_DEFAULT: usize = 1_048_588;

/// A topic somebody needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub topic: String,
    pub partitions: NonZeroU32,
    /// 0: as many as the brokers find right.
    pub replication_factor: u16,
}

/// The offsets a lane spans: `first` is the oldest record's, `end` the next record's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watermarks {
    pub first: i64,
    pub end: i64,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not ask the broker at {bootstrap_servers} about its topics")]
    Ask {
        bootstrap_servers: String,
        #[source]
        source: KafkaError,
    },
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("could not create topic {topic}: {code}")]
    Create { topic: String, code: RDKafkaErrorCode },
    #[error("topic {topic} has {found} partitions, and its order needs exactly one")]
    Partitions { topic: String, found: usize },
    #[error("a task asking the broker ended early")]
    Task(#[source] tokio::task::JoinError),
}

impl Error {
    /// A question without an answer; because of the refusal, where one was heard.
    pub(super) fn new(access: &Access, source: KafkaError, refusal: Option<Refusal>) -> Self {
        let bootstrap_servers = access.to_string();
        match refusal {
            Some(refusal) => Self::Refused(refusal),
            None => Self::Ask { bootstrap_servers, source },
        }
    }
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::Ask { source: KafkaError::ClientCreation(_) | KafkaError::ClientConfig(..), .. } => {
                Fault::Operator("check stream.bootstrap_servers, stream.ca_file, stream.certificate_file and stream.key_file".to_owned())
            }
            Self::Ask { source, .. } => match source.rdkafka_error_code() {
                Some(
                    RDKafkaErrorCode::TopicAuthorizationFailed | RDKafkaErrorCode::GroupAuthorizationFailed | RDKafkaErrorCode::ClusterAuthorizationFailed,
                ) => Fault::Operator("allow this user to describe and read the pipeline's topics (kafka-acls), or sign in as another".to_owned()),
                _ => Fault::Transient,
            },
            Self::Refused(refusal) => refusal.fault(),
            Self::Create { topic, code } => match code {
                RDKafkaErrorCode::TopicAuthorizationFailed | RDKafkaErrorCode::ClusterAuthorizationFailed | RDKafkaErrorCode::PolicyViolation => {
                    Fault::Operator(format!("create topic {topic} by hand, or allow this client to create topics"))
                }
                RDKafkaErrorCode::InvalidTopic => Fault::Operator(format!("{topic} is not a name a topic can have: change cdc.topic_prefix")),
                RDKafkaErrorCode::InvalidReplicationFactor => {
                    Fault::Operator("start as many brokers as stream.replication_factor (0: their default.replication.factor) asks for, or lower it".to_owned())
                }
                _ => Fault::Transient,
            },
            Self::Partitions { topic, .. } => Fault::Operator(format!("delete topic {topic}, or choose another cdc.topic_prefix")),
            Self::Task(_) => Fault::Bug,
        }
    }
}

/// A client that asks the broker about topics. Cheap to clone.
#[derive(Clone)]
pub struct Topics {
    access: Access,
    consumer: Arc<Asking>,
}

/// A consumer that asks and never joins a group.
struct Asking(Option<Reader>);

impl Asking {
    fn consumer(&self) -> &Reader {
        self.0.as_ref().expect("the client is taken out only when it is dropped")
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        drop_elsewhere(self.0.take());
    }
}

impl Topics {
    pub fn connect(access: impl Into<Access>) -> Result<Self, Error> {
        let access = access.into();
        let consumer = reader(&access).map_err(|source| Error::new(&access, source, None))?;
        Ok(Self { access, consumer: Arc::new(Asking(Some(consumer))) })
    }

    /// Creates the missing ones, and waits until they are served; those that exist stay as they are.
    pub async fn ensure(&self, wanted: Vec<Wanted>) -> Result<(), Error> {
        let existing = self.partitions().await?;
        let missing: Vec<&Wanted> = wanted.iter().filter(|it| !existing.iter().any(|(topic, _)| *topic == it.topic)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let admin: AdminClient<DefaultClientContext> = settings(&self.access).create().map_err(|source| self.failed(source))?;
        let message_bytes_max = MESSAGE_BYTES_MAX.to_string();
        let new_topics: Vec<NewTopic<'_>> = missing
            .iter()
            .map(|it| NewTopic::new(&it.topic, i32::try_from(it.partitions.get()).unwrap_or(i32::MAX), replication(it.replication_factor)))
            .map(|it| it.set("max.message.bytes", &message_bytes_max))
            .collect();
        let options = AdminOptions::new().operation_timeout(Some(ANSWER_MAX)).request_timeout(Some(ANSWER_MAX));
        for result in admin.create_topics(&new_topics, &options).await.map_err(|source| self.failed(source))? {
            match result {
                Ok(topic) => tracing::info!(topic, "topic created"),
                Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((topic, code)) => return Err(Error::Create { topic, code }),
            }
        }
        self.until_served(missing.iter().map(|it| it.topic.clone()).collect()).await
    }

    /// A topic is made before every broker knows it and its leader answers for it: who asked at once how far it reaches would not hear
    /// of it. After a while whoever needs it hears why it is not served.
    async fn until_served(&self, topics: Vec<String>) -> Result<(), Error> {
        let since = Instant::now();
        while !self.are_served(topics.clone()).await? && since.elapsed() < ANSWER_MAX {
            tokio::time::sleep(LISTEN).await;
        }
        Ok(())
    }

    async fn are_served(&self, topics: Vec<String>) -> Result<bool, Error> {
        self.ask(move |consumer| {
            let metadata = consumer.fetch_metadata(None, ANSWER_MAX)?;
            for topic in topics {
                let Some(known) = metadata.topics().iter().find(|it| it.name() == topic && it.error().is_none()) else { return Ok(false) };
                for partition in known.partitions() {
                    match consumer.fetch_watermarks(&topic, partition.id(), ANSWER_MAX).map_err(|error| error.rdkafka_error_code()) {
                        Ok(_) => {}
                        Err(Some(RDKafkaErrorCode::TopicAuthorizationFailed)) => return Ok(true),
                        Err(_) => return Ok(false),
                    }
                }
            }
            Ok(true)
        })
        .await
    }

    /// The largest batch that each of these topics takes. Where the broker does not say, what Kafka takes by default.
    pub async fn bytes_max(&self, topics: &[String]) -> Result<usize, Error> {
        let admin: AdminClient<DefaultClientContext> = settings(&self.access).create().map_err(|source| self.failed(source))?;
        let asked: Vec<ResourceSpecifier<'_>> = topics.iter().map(|it| ResourceSpecifier::Topic(it)).collect();
        let answers = admin.describe_configs(&asked, &AdminOptions::new().request_timeout(Some(ANSWER_MAX))).await;
        let limit = |answer: &Result<ConfigResource, RDKafkaErrorCode>| answer.as_ref().ok()?.get("max.message.bytes")?.value.as_ref()?.parse().ok();
        // Not every client may ask, and not every broker answers.
        let limits = answers.inspect_err(|error| tracing::debug!(%error, "the broker does not say what its topics take")).unwrap_or_default();
        Ok(limits.iter().map(|it| limit(it).unwrap_or(BYTES_MAX_BY_DEFAULT)).min().unwrap_or(BYTES_MAX_BY_DEFAULT))
    }

    /// Refuses a topic whose order would be lost over several partitions.
    pub async fn require_single(&self, topic: &str) -> Result<(), Error> {
        let partitions = self.partitions().await?;
        match partitions.into_iter().find(|(name, _)| name == topic) {
            Some((topic, found)) if found != 1 => Err(Error::Partitions { topic, found }),
            _ => Ok(()),
        }
    }

    /// Every topic with its number of partitions.
    pub async fn partitions(&self) -> Result<Vec<(String, usize)>, Error> {
        self.ask(|consumer| {
            let metadata = consumer.fetch_metadata(None, ANSWER_MAX)?;
            Ok(metadata.topics().iter().map(|it| (it.name().to_owned(), it.partitions().len())).collect())
        })
        .await
    }

    /// How far each lane of the given topics reaches, topics and partitions ascending.
    pub async fn watermarks(&self, topics: BTreeSet<String>) -> Result<Vec<(Lane, Watermarks)>, Error> {
        self.ask(move |consumer| {
            let metadata = consumer.fetch_metadata(None, ANSWER_MAX)?;
            let mut lanes = Vec::new();
            for topic in metadata.topics().iter().filter(|it| topics.contains(it.name())) {
                // Whoever took one that nobody leads yet for one without partitions would never look at them.
                if let Some(error) = topic.error().map(RDKafkaErrorCode::from) {
                    return Err(KafkaError::MetadataFetch(error));
                }
                let name: Arc<str> = topic.name().into();
                for partition in topic.partitions() {
                    let (first, end) = consumer.fetch_watermarks(topic.name(), partition.id(), ANSWER_MAX)?;
                    lanes.push((Lane { topic: Arc::clone(&name), partition: partition.id() }, Watermarks { first, end }));
                }
            }
            lanes.sort_by(|(one, _), (other, _)| one.cmp(other));
            Ok(lanes)
        })
        .await
    }

    /// How far each partition of a topic reaches; none where there is no such topic.
    pub(super) async fn marks(&self, topic: String) -> Result<Vec<(i32, Watermarks)>, Error> {
        self.ask(move |consumer| {
            let metadata = consumer.fetch_metadata(Some(&topic), ANSWER_MAX)?;
            // A topic that we may not see is not one that does not exist.
            let errors = metadata.topics().iter().filter_map(|it| it.error()).map(RDKafkaErrorCode::from);
            if let Some(forbidden) = errors.into_iter().find(|it| *it == RDKafkaErrorCode::TopicAuthorizationFailed) {
                return Err(KafkaError::MetadataFetch(forbidden));
            }
            let partitions = metadata.topics().iter().filter(|it| it.error().is_none()).flat_map(|it| it.partitions());
            let marks = |partition: i32| consumer.fetch_watermarks(&topic, partition, ANSWER_MAX).map(|(first, end)| (partition, Watermarks { first, end }));
            partitions.map(|it| marks(it.id())).collect()
        })
        .await
    }

    /// The given header of the last records of a lane, at most `count` of them, oldest first.
    pub async fn last_headers(&self, topic: &str, partition: i32, header: &'static str, count: i64) -> Result<Vec<Vec<u8>>, Error> {
        let topic = topic.to_owned();
        let access = self.access.clone();
        self.ask(move |asking| {
            let (first, end) = match asking.fetch_watermarks(&topic, partition, ANSWER_MAX) {
                Err(error) if matches!(error.rdkafka_error_code(), Some(RDKafkaErrorCode::UnknownPartition | RDKafkaErrorCode::UnknownTopicOrPartition)) => {
                    (0, 0)
                }
                watermarks => watermarks?,
            };
            let start = first.max(end - count);
            let mut found = Vec::new();
            if start >= end {
                return Ok(found);
            }
            // A reader of its own: assigning is state, and the asking client is shared.
            let reader = reader(&access)?;
            let mut assignment = TopicPartitionList::new();
            assignment.add_partition_offset(&topic, partition, Offset::Offset(start))?;
            reader.assign(&assignment)?;
            loop {
                let Some(message) = reader.poll(ANSWER_MAX) else {
                    return Err(KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut));
                };
                match message {
                    Ok(message) => {
                        let headers = message.headers().into_iter().flat_map(|it| it.iter());
                        found.extend(headers.filter(|it| it.key == header).filter_map(|Header { value, .. }| value.map(<[u8]>::to_vec)));
                        if message.offset() + 1 >= end {
                            return Ok(found);
                        }
                    }
                    // The end of the lane: the last offsets were not records (transaction markers).
                    Err(KafkaError::PartitionEOF(_)) => return Ok(found),
                    Err(KafkaError::MessageConsumption(RDKafkaErrorCode::BrokerTransportFailure)) => {}
                    Err(error) => return Err(error),
                }
            }
        })
        .await
    }

    async fn ask<T: Send + 'static>(&self, question: impl FnOnce(&Reader) -> Result<T, KafkaError> + Send + 'static) -> Result<T, Error> {
        let consumer = Arc::clone(&self.consumer);
        let mut answer = tokio::task::spawn_blocking(move || question(consumer.consumer()));
        let mut refusal: Option<Refusal> = None;
        let mut refused_since = None;
        loop {
            tokio::select! { biased;
                answer = &mut answer => {
                    let refusal = refusal.or_else(|| heard(self.consumer.consumer()));
                    return answer.map_err(Error::Task)?.map_err(|source| Error::new(&self.access, source, refusal));
                }
                () = tokio::time::sleep(LISTEN) => {}
            }
            refusal = heard(self.consumer.consumer()).or(refusal);
            // Kafka's client would try until the time is up.
            if let Some(certain) = refusal.as_ref().filter(|it| it.is_certain)
                && refused_since.get_or_insert_with(Instant::now).elapsed() >= OTHERS_ANSWER
            {
                return Err(certain.clone().into());
            }
        }
    }

    fn failed(&self, source: KafkaError) -> Error {
        Error::new(&self.access, source, None)
    }
}

fn replication(factor: u16) -> TopicReplication<'static> {
    // Minus one is Kafka's word for its own default.
    TopicReplication::Fixed(if factor == 0 { -1 } else { i32::from(factor) })
}

/// A client for questions and for reading without a group.
pub(super) fn reader(access: &Access) -> Result<Reader, KafkaError> {
    settings(access).create_with_context(Hearing::default())
}

pub(super) fn settings(access: &Access) -> ClientConfig {
    let mut settings = access.client("ledgerline-topics");
    settings
        // Never joined: librdkafka asks for a group before it lets anyone assign.
        .set("group.id", "ledgerline-topics")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("allow.auto.create.topics", "false")
        .set("auto.offset.reset", "earliest")
        .set("isolation.level", "read_uncommitted")
        .set("reconnect.backoff.max.ms", "1000")
        // A handful of small records are read, nothing is kept.
        .set("queued.max.messages.kbytes", "4096");
    settings
}
