//! A topic read once, up to the end it had when the reading began: no group, no position, nothing kept.

use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::{Message as _, Offset, TopicPartitionList, consumer::Consumer as _, error::KafkaError, message::Headers as _, types::RDKafkaErrorCode};
use tokio::sync::mpsc;

use super::{
    Access, Refusal,
    access::Reader,
    topics::{ANSWER_MAX, Error, Topics, Watermarks, reader},
};

/// A record with its headers, as it lies in the topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub partition: i32,
    pub offset: i64,
    /// Milliseconds since 1970 UTC; None where the broker has none.
    pub timestamp_ms: Option<i64>,
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
    /// In order; a header without a value is empty.
    pub headers: Vec<(String, Bytes)>,
}

/// Where a reading begins. It ends where each partition ended when it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// So many offsets before the end of each partition.
    Last(i64),
    /// One record.
    At { partition: i32, offset: i64 },
}

/// Records between the reading thread and whoever takes them.
const WAITING_MAX: usize = 64;
/// How soon the thread sees that nobody listens any more.
const LOOK_UP: Duration = Duration::from_millis(250);

/// A reading on a thread that may wait. Dropped, it ends.
#[derive(Debug)]
pub struct Range {
    access: Access,
    told: mpsc::Receiver<Told>,
}

#[derive(Debug)]
enum Told {
    Record(Kept),
    Failed(KafkaError, Option<Refusal>),
}

impl Range {
    /// Begins to read, and tells how far the partitions reach: none where there is no such topic.
    pub async fn open(access: impl Into<Access>, topic: &str, from: From) -> Result<(Self, Reach), Error> {
        let access = access.into();
        let marks: Reach = Topics::connect(&access)?.marks(topic.to_owned()).await?;
        let (reader, ends) = assign(&access, topic, from, &marks).map_err(|source| Error::new(&access, source, None))?;
        let (tell, told) = mpsc::channel(WAITING_MAX);
        // A task of the blocking pool would hold up the end of the process; this thread holds up nothing.
        let spawned = std::thread::Builder::new().name("kafka-range".to_owned()).spawn(move || {
            if let Err(error) = read(&reader, ends, &tell) {
                // Nobody listens any more, or will hear it next.
                let _ = tell.blocking_send(Told::Failed(error, reader.context().take()));
            }
        });
        spawned.map_err(|error| Error::new(&access, KafkaError::ClientCreation(error.to_string()), None))?;
        Ok((Self { access, told }, marks))
    }

    /// The next record, partitions mixed, each in order; None at the end. Cancel-safe. A broker that is silent for ten
    /// seconds is an error.
    pub async fn next(&mut self) -> Option<Result<Kept, Error>> {
        match self.told.recv().await? {
            Told::Record(record) => Some(Ok(record)),
            Told::Failed(source, refusal) => Some(Err(Error::new(&self.access, source, refusal))),
        }
    }
}

/// Partitions with the offset behind their last record.
type Ends = Vec<(i32, i64)>;
/// Partitions with how far they reach.
pub type Reach = Vec<(i32, Watermarks)>;

/// The newest records of all partitions, newest first, at most `count`; an empty or unknown topic has none.
pub async fn newest(access: impl Into<Access>, topic: &str, count: usize) -> Result<Vec<Kept>, Error> {
    let (mut range, _) = Range::open(access, topic, From::Last(i64::try_from(count).unwrap_or(i64::MAX))).await?;
    let mut found = Vec::new();
    while let Some(record) = range.next().await {
        found.push(record?);
    }
    found.sort_by_key(|it| std::cmp::Reverse((it.timestamp_ms, it.offset)));
    found.truncate(count);
    Ok(found)
}

fn assign(access: &Access, topic: &str, from: From, marks: &[(i32, Watermarks)]) -> Result<(Reader, Ends), KafkaError> {
    let reader = reader(access)?;
    let (mut assignment, mut ends) = (TopicPartitionList::new(), Vec::new());
    for (partition, Watermarks { first, end }) in marks.iter().copied() {
        let (start, end) = match from {
            From::Last(offsets) => (first.max(end.saturating_sub(offsets)), end),
            From::At { partition: wanted, offset } if wanted == partition && offset >= first => (offset, end.min(offset + 1)),
            From::At { .. } => (end, end),
        };
        if start < end {
            assignment.add_partition_offset(topic, partition, Offset::Offset(start))?;
            ends.push((partition, end));
        }
    }
    reader.assign(&assignment)?;
    Ok((reader, ends))
}

fn read(reader: &Reader, mut open: Ends, tell: &mpsc::Sender<Told>) -> Result<(), KafkaError> {
    let mut heard = Instant::now();
    while !open.is_empty() && !tell.is_closed() {
        let Some(message) = reader.poll(LOOK_UP) else {
            if heard.elapsed() >= ANSWER_MAX {
                return Err(KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut));
            }
            continue;
        };
        match message {
            Ok(message) => {
                let (partition, offset) = (message.partition(), message.offset());
                let Some(end) = open.iter().find(|it| it.0 == partition).map(|it| it.1) else { continue };
                if offset < end {
                    let headers = message.headers().into_iter().flat_map(|it| it.iter());
                    let kept = Kept {
                        partition,
                        offset,
                        timestamp_ms: message.timestamp().to_millis(),
                        key: message.key().map(Bytes::copy_from_slice),
                        value: message.payload().map(Bytes::copy_from_slice),
                        headers: headers.map(|it| (it.key.to_owned(), it.value.map(Bytes::copy_from_slice).unwrap_or_default())).collect(),
                    };
                    if tell.blocking_send(Told::Record(kept)).is_err() {
                        return Ok(());
                    }
                }
                if offset + 1 >= end {
                    open.retain(|it| it.0 != partition);
                }
            }
            // The last offsets were no records (transaction markers).
            Err(KafkaError::PartitionEOF(partition)) => open.retain(|it| it.0 != partition),
            // Trouble that passes is not an answer: whoever is silent for too long is away.
            Err(KafkaError::MessageConsumption(RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::AllBrokersDown)) => continue,
            Err(error) => return Err(error),
        }
        heard = Instant::now();
    }
    Ok(())
}
