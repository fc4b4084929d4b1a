//! Topics read along, without a group and for a reader's own eyes: what is of interest in each record is handed on, nothing is kept.

use std::{sync::Arc, time::Duration};

use rdkafka::{Message as _, Offset, TopicPartitionList, consumer::Consumer as _, error::KafkaError, message::BorrowedMessage, types::RDKafkaErrorCode};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Access, Hearing, Lane,
    access::Reader,
    topics::{Error, settings},
};

/// Found things under way to the reader; a reader that is slow holds the reading, not the memory.
const UNDER_WAY: usize = 4096;
const POLL: Duration = Duration::from_millis(100);

/// One step of reading along.
#[derive(Debug)]
pub enum Followed<T> {
    Found(T),
    /// The broker does not answer; reading goes on once it does.
    Away(String),
    /// It answers again, or for the first time.
    Back,
}

/// Reads until dropped.
pub struct Follower<T> {
    followed: mpsc::Receiver<Followed<T>>,
    _stop: DropGuard,
}

impl<T: Send + 'static> Follower<T> {
    /// Reads each lane from its offset on. `read` says what of a record is of interest.
    pub fn start(
        access: impl Into<Access>,
        lanes: &[(Lane, i64)],
        mut read: impl FnMut(&BorrowedMessage<'_>) -> Option<T> + Send + 'static,
    ) -> Result<Self, Error> {
        let access = access.into();
        let failed = |source| Error::new(&access, source, None);
        let mut settings = settings(&access);
        settings.set("enable.partition.eof", "false").set("fetch.wait.max.ms", "100");
        let consumer: Reader = settings.create_with_context(Hearing::default()).map_err(failed)?;
        let mut assignment = TopicPartitionList::new();
        for (lane, offset) in lanes {
            assignment.add_partition_offset(&lane.topic, lane.partition, Offset::Offset(*offset)).map_err(failed)?;
        }
        consumer.assign(&assignment).map_err(failed)?;
        let (found, followed) = mpsc::channel(UNDER_WAY);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let work = move || {
            let mut away = true;
            while !stopped.is_cancelled() {
                let step = match consumer.poll(POLL) {
                    None => continue,
                    Some(Ok(message)) => {
                        if std::mem::take(&mut away) && found.blocking_send(Followed::Back).is_err() {
                            return;
                        }
                        read(&message).map(Followed::Found)
                    }
                    Some(Err(KafkaError::MessageConsumption(RDKafkaErrorCode::AllBrokersDown))) if !std::mem::replace(&mut away, true) => {
                        Some(Followed::Away(consumer.context().take().map_or_else(|| "no broker answers".to_owned(), |it| it.to_string())))
                    }
                    Some(Err(_)) => None,
                };
                if let Some(step) = step
                    && found.blocking_send(step).is_err()
                {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("kafka-follower".to_owned()).spawn(work);
        thread.map_err(|error| failed(KafkaError::ClientCreation(error.to_string())))?;
        Ok(Self { followed, _stop: stop.drop_guard() })
    }

    /// What was found next, up to so many at once. Cancel-safe; pending for ever once nothing follows.
    pub async fn next(&mut self, into: &mut Vec<Followed<T>>, limit: usize) {
        if self.followed.recv_many(into, limit).await == 0 {
            std::future::pending::<()>().await;
        }
    }
}

/// The lane a record lies in.
pub fn lane_of(message: &BorrowedMessage<'_>) -> Lane {
    Lane { topic: Arc::from(message.topic()), partition: message.partition() }
}
