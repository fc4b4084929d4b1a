//! Records that are no text go to the dead-letter topic, with the reason and their position, before the lake moves past them.

use std::{sync::Arc, time::Duration};

use rdkafka::{
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    error::{KafkaError, RDKafkaErrorCode},
    message::{Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tokio::sync::OnceCell;

use super::{dead::DeadLetter, error::Error};
use crate::stream::{Access, Lane};

/// The way to the dead-letter topic; connects with the first letter.
pub(super) struct DeadLetters {
    access: Access,
    topic: String,
    producer: OnceCell<FutureProducer>,
}

/// A letter is tried again by our own retry when the broker has not answered by then.
const ANSWER: Duration = Duration::from_secs(10);

impl DeadLetters {
    pub(super) fn new(access: Access, topic: String) -> Self {
        Self { access, topic, producer: OnceCell::new() }
    }

    /// Resolves when the broker has all letters. A repeat after a crash writes them again: same lane and offset, one letter.
    pub(super) async fn send(&self, lane: &Lane, letters: &[DeadLetter]) -> Result<(), Error> {
        let failed = |source| Error::DeadLetters { topic: self.topic.clone(), source };
        let producer = self.producer.get_or_try_init(|| self.connect()).await.map_err(failed)?;
        for letter in letters {
            let (partition, offset, timestamp) = (lane.partition.to_string(), letter.offset.to_string(), letter.timestamp_ms.to_string());
            let headers = [("reason", letter.reason), ("topic", &*lane.topic), ("partition", &partition), ("offset", &offset), ("timestamp_ms", &timestamp)];
            let headers = headers.iter().fold(OwnedHeaders::new(), |all, (key, value)| all.insert(Header { key, value: Some(*value) }));
            let mut record = FutureRecord::<[u8], [u8]>::to(&self.topic).headers(headers);
            record.key = letter.key.as_deref();
            record.payload = letter.value.as_deref();
            producer.send(record, ANSWER).await.map_err(|(source, _)| failed(source))?;
        }
        Ok(())
    }

    async fn connect(&self) -> Result<FutureProducer, KafkaError> {
        let mut config = self.access.client("ledgerline-lake");
        self.ensure_topic(config.create()?).await?;
        config.set("enable.idempotence", "true").set("acks", "all").set("message.timeout.ms", ANSWER.as_millis().to_string()).create()
    }

    /// Creates the topic only where it is absent: on a cluster of others we may not have the right to create any.
    async fn ensure_topic(&self, admin: AdminClient<DefaultClientContext>) -> Result<(), KafkaError> {
        let (topic, admin) = (self.topic.clone(), Arc::new(admin));
        let asked = Arc::clone(&admin);
        let exists = tokio::task::spawn_blocking(move || {
            let metadata = asked.inner().fetch_metadata(Some(&topic), ANSWER)?;
            Ok(metadata.topics().iter().any(|it| it.error().is_none() && !it.partitions().is_empty()))
        });
        if exists.await.unwrap_or(Err(KafkaError::Canceled))? {
            return Ok(());
        }
        let topic = NewTopic::new(&self.topic, 1, TopicReplication::Fixed(-1));
        let options = AdminOptions::new().operation_timeout(Some(ANSWER)).request_timeout(Some(ANSWER));
        for created in admin.create_topics([&topic], &options).await? {
            match created {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((_, code)) => return Err(KafkaError::AdminOp(code)),
            }
        }
        Ok(())
    }
}
