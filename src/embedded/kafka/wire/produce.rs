//! Produce: batches into the store's queue, and an answer once they are durable.

use std::sync::Arc;

use bytes::Bytes;
use kafka_protocol::{
    ResponseError,
    messages::{
        ProduceRequest, ProduceResponse, TopicName,
        produce_response::{PartitionProduceResponse, TopicProduceResponse},
    },
};

use super::{Server, api::Answer, connection::Broken, text};
use crate::embedded::kafka::{
    batch::Batch,
    store::{Append, Appended},
};

/// What becomes of one partition's part: refused here, or an append in the store's queue.
type Part = (i32, Option<ResponseError>);

/// Queues what is right about the request. `encode` makes the answer's frame.
///
/// All acks mean the same here: there is one copy, and it is on disk before it is acknowledged. With `acks=0` nothing
/// is answered; a refusal closes the connection, the only way to say so.
pub(super) async fn begin(
    server: &Arc<Server>,
    request: ProduceRequest,
    encode: impl FnOnce(ProduceResponse) -> Result<Bytes, Broken> + Send + 'static,
) -> Result<Answer, Broken> {
    let refused = match (request.acks, &request.transactional_id) {
        (_, Some(_)) => Some(ResponseError::TransactionalIdAuthorizationFailed),
        (-1..=1, None) => None,
        (_, None) => Some(ResponseError::InvalidRequiredAcks),
    };
    let acks = request.acks;
    let (mut appends, mut topics) = (Vec::new(), Vec::with_capacity(request.topic_data.len()));
    for topic in request.topic_data {
        let mut parts: Vec<Part> = Vec::with_capacity(topic.partition_data.len());
        for part in topic.partition_data {
            let batch = match refused {
                Some(error) => Err(error),
                None => Batch::from_producer(part.records.unwrap_or_default(), server.batch_bytes_max()),
            };
            parts.push((part.index, batch.as_ref().err().copied()));
            appends.extend(batch.ok().map(|batch| Append { topic: topic.name.to_string(), partition: part.index, batch }));
        }
        topics.push((topic.name, parts));
    }
    let appended = server.store.append(appends).await?;
    Ok(Box::pin(async move {
        let results = appended.await.map_err(|_| Broken::Stopping)?;
        let response = respond(topics, results);
        if acks != 0 {
            return encode(response).map(Some);
        }
        let refused = response.responses.iter().flat_map(|it| &it.partition_responses).any(|it| it.error_code != 0);
        if refused { Err(Broken::Unheard) } else { Ok(None) }
    }))
}

fn respond(topics: Vec<(TopicName, Vec<Part>)>, results: Vec<Result<Appended, ResponseError>>) -> ProduceResponse {
    let mut results = results.into_iter();
    let mut part = |(index, refused): Part| {
        let result = refused.map_or_else(|| results.next().unwrap_or(Err(ResponseError::UnknownServerError)), Err);
        let response = PartitionProduceResponse::default().with_index(index).with_log_append_time_ms(-1);
        match result {
            Ok(Appended { base_offset, log_start }) => response.with_base_offset(base_offset).with_log_start_offset(log_start),
            Err(error) => response.with_error_code(error.code()).with_base_offset(-1).with_error_message(Some(text(error.to_string()))),
        }
    };
    let topic = |(name, parts): (TopicName, Vec<Part>)| {
        TopicProduceResponse::default().with_name(name).with_partition_responses(parts.into_iter().map(&mut part).collect())
    };
    ProduceResponse::default().with_responses(topics.into_iter().map(topic).collect())
}
