//! The newest records of a topic, read once and for eyes only: no group, no position, nothing kept.

use std::time::Instant;

use bytes::Bytes;
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    types::RDKafkaErrorCode,
};

use super::topics::{ANSWER_MAX, Error, settings};

/// A record as it lies in the topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub partition: i32,
    pub offset: i64,
    /// Milliseconds since 1970 UTC; None where the broker has none.
    pub timestamp_ms: Option<i64>,
    pub key: Option<Bytes>,
    /// None is a tombstone.
    pub value: Option<Bytes>,
}

/// The newest records of all partitions, newest first, at most `count`; an empty or unknown topic has none.
///
/// Takes as long as the broker does, at most a few seconds, on a thread that may wait.
pub async fn newest(bootstrap_servers: &str, topic: &str, count: usize) -> Result<Vec<Seen>, Error> {
    let (servers, name) = (bootstrap_servers.to_owned(), topic.to_owned());
    let read = tokio::task::spawn_blocking(move || read(&servers, &name, count)).await.map_err(Error::Task)?;
    read.map_err(|source| Error::Ask { bootstrap_servers: bootstrap_servers.to_owned(), source })
}

fn read(bootstrap_servers: &str, topic: &str, count: usize) -> Result<Vec<Seen>, KafkaError> {
    let reader: BaseConsumer = settings(bootstrap_servers).create()?;
    let metadata = reader.fetch_metadata(Some(topic), ANSWER_MAX)?;
    let mut assignment = TopicPartitionList::new();
    for partition in metadata.topics().iter().filter(|it| it.error().is_none()).flat_map(|it| it.partitions()) {
        let (first, end) = reader.fetch_watermarks(topic, partition.id(), ANSWER_MAX)?;
        let start = first.max(end.saturating_sub(i64::try_from(count).unwrap_or(i64::MAX)));
        if start < end {
            assignment.add_partition_offset(topic, partition.id(), Offset::Offset(start))?;
        }
    }
    let mut open = assignment.count();
    reader.assign(&assignment)?;
    let mut found = Vec::new();
    let until = Instant::now() + ANSWER_MAX;
    // Each partition is read to its end; what comes in meanwhile is taken along, and the oldest given away.
    while open > 0 {
        match reader.poll(until.saturating_duration_since(Instant::now())) {
            None => return Err(KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut)),
            Some(Ok(message)) => found.push(Seen {
                partition: message.partition(),
                offset: message.offset(),
                timestamp_ms: message.timestamp().to_millis(),
                key: message.key().map(Bytes::copy_from_slice),
                value: message.payload().map(Bytes::copy_from_slice),
            }),
            Some(Err(KafkaError::PartitionEOF(_))) => open -= 1,
            Some(Err(KafkaError::MessageConsumption(RDKafkaErrorCode::BrokerTransportFailure))) => {}
            Some(Err(error)) => return Err(error),
        }
        // A topic that is written faster than we read has no end; then what was read is the newest there was.
        if found.len() >= count.saturating_mul(assignment.count().max(1)).saturating_mul(2) {
            break;
        }
    }
    found.sort_by_key(|it| std::cmp::Reverse((it.timestamp_ms, it.offset)));
    found.truncate(count);
    Ok(found)
}
