//! Fetch and ListOffsets: what readers may see, waited for as long as they like.

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::select_all;
use kafka_protocol::{
    ResponseError,
    messages::{
        FetchRequest, FetchResponse, ListOffsetsRequest, ListOffsetsResponse, TopicName,
        fetch_response::{FetchableTopicResponse, PartitionData},
        list_offsets_request::ListOffsetsPartition,
        list_offsets_response::{ListOffsetsPartitionResponse, ListOffsetsTopicResponse},
    },
};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::Server;
use crate::embedded::kafka::{partition::View, read};

/// The most records one answer holds, whatever the client allows: it is built in memory.
const ANSWER_BYTES_MAX: usize = 8 << 20;
/// The longest a fetch waits.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// A partition a client wants to read on from an offset.
struct Wanted {
    topic: TopicName,
    partition: i32,
    offset: i64,
    bytes_max: usize,
    leader_epoch: i32,
    view: Option<watch::Receiver<View>>,
}

/// What one look at a partition gave.
struct Found {
    view: Option<View>,
    records: Result<Bytes, ResponseError>,
}

/// Answers as soon as there are `min_bytes`, an error, or `max_wait_ms` have passed; and how many bytes of records.
pub(super) async fn fetch(server: &Arc<Server>, request: FetchRequest) -> (FetchResponse, usize) {
    if request.session_id != 0 {
        // We keep no fetch sessions; every request names all it wants.
        return (FetchResponse::default().with_error_code(ResponseError::FetchSessionIdNotFound.code()), 0);
    }
    let wait = Duration::from_millis(u64::try_from(request.max_wait_ms).unwrap_or(0)).min(WAIT_MAX);
    let until = Instant::now() + wait;
    let bytes_min = usize::try_from(request.min_bytes).unwrap_or(0);
    let bytes_max = usize::try_from(request.max_bytes).unwrap_or(0).min(ANSWER_BYTES_MAX);
    let committed_only = request.isolation_level == 1;
    let mut wanted = wanted(server, request);
    loop {
        let views: Vec<Option<View>> = wanted.iter_mut().map(Wanted::look).collect();
        let arrived_before: u64 = views.iter().flatten().map(|it| it.bytes_arrived).sum();
        let found = find(&wanted, views, bytes_max).await;
        let bytes: usize = found.iter().filter_map(|it| it.records.as_ref().ok()).map(Bytes::len).sum();
        let refused = found.iter().any(|it| it.records.is_err());
        let enough = |more: u64| bytes.saturating_add(usize::try_from(more).unwrap_or(usize::MAX)) >= bytes_min;
        if refused || enough(0) || !arrive(&mut wanted, arrived_before, until, enough).await {
            server.stats.send_if_modified(|it| {
                it.bytes_out += u64::try_from(bytes).unwrap_or(0);
                bytes > 0
            });
            return (respond(wanted, found, committed_only), bytes);
        }
    }
}

fn wanted(server: &Server, request: FetchRequest) -> Vec<Wanted> {
    let topics = Arc::clone(&server.store.topics.borrow());
    let mut wanted = Vec::new();
    for topic in request.topics {
        let views = topics.get(topic.topic.as_str());
        wanted.extend(topic.partitions.into_iter().map(|it| Wanted {
            topic: topic.topic.clone(),
            partition: it.partition,
            offset: it.fetch_offset,
            bytes_max: usize::try_from(it.partition_max_bytes).unwrap_or(0),
            leader_epoch: it.current_leader_epoch,
            view: views.and_then(|views| views.partitions.get(usize::try_from(it.partition).ok()?).cloned()),
        }));
    }
    wanted
}

impl Wanted {
    /// None where there is no such partition, or no longer.
    fn look(&mut self) -> Option<View> {
        let view = self.view.as_mut()?;
        let gone = view.has_changed().is_err();
        (!gone).then(|| view.borrow_and_update().clone())
    }
}

/// Reads what is there, in the order it was asked for, until the answer is full.
async fn find(wanted: &[Wanted], views: Vec<Option<View>>, bytes_max: usize) -> Vec<Found> {
    let mut plan = Vec::with_capacity(wanted.len());
    let mut something = false;
    for (it, view) in wanted.iter().zip(views) {
        let known = view.ok_or(ResponseError::UnknownTopicOrPartition);
        let checked = known.as_ref().map_err(|error| *error).and_then(|view| match it.offset {
            _ if it.leader_epoch > 0 => Err(ResponseError::UnknownLeaderEpoch),
            offset if (view.start..=view.high_watermark).contains(&offset) => Ok(offset < view.high_watermark),
            _ => Err(ResponseError::OffsetOutOfRange),
        });
        something |= checked == Ok(true);
        plan.push((known.ok(), checked, it.offset, it.bytes_max));
    }
    let nothing = |it: Result<bool, ResponseError>| it.map(|_| Bytes::new());
    if !something {
        return plan.into_iter().map(|(view, checked, ..)| Found { view, records: nothing(checked) }).collect();
    }
    let reading = tokio::task::spawn_blocking(move || {
        let mut bytes = 0_usize;
        let mut read = |(view, checked, offset, most): (Option<View>, Result<bool, ResponseError>, i64, usize)| {
            let room = bytes_max.saturating_sub(bytes);
            let records = match (&view, checked) {
                (Some(view), Ok(true)) if room > 0 || bytes == 0 => read_one(view, offset, room.min(most)),
                _ => nothing(checked),
            };
            // Only the first batch of an answer may be larger than it should be.
            let records = records.map(|it| if bytes > 0 && it.len() > room { Bytes::new() } else { it });
            bytes += records.as_ref().map_or(0, Bytes::len);
            Found { view, records }
        };
        plan.into_iter().map(&mut read).collect()
    });
    reading.await.unwrap_or_default()
}

fn read_one(view: &View, offset: i64, bytes_max: usize) -> Result<Bytes, ResponseError> {
    read::fetch(view, offset, bytes_max).map_err(|error| match error.kind() {
        // Retention or an administrator was faster; the next request will hear where the log begins.
        io::ErrorKind::NotFound => ResponseError::NotLeaderOrFollower,
        _ => {
            tracing::error!(%error, "could not read the log");
            ResponseError::KafkaStorageError
        }
    })
}

/// Waits until enough has arrived since; false when time is up.
async fn arrive(wanted: &mut [Wanted], arrived_before: u64, until: Instant, enough: impl Fn(u64) -> bool) -> bool {
    loop {
        let changes = wanted.iter_mut().filter_map(|it| it.view.as_mut()).map(|it| Box::pin(it.changed()));
        let changes: Vec<_> = changes.collect();
        if changes.is_empty() {
            tokio::time::sleep_until(until).await;
            return false;
        }
        match timeout_at(until, select_all(changes)).await {
            Err(_) => return false,
            // The topic is gone.
            Ok((Err(_), ..)) => return true,
            Ok((Ok(()), ..)) => {}
        }
        let arrived: u64 = wanted.iter_mut().filter_map(|it| it.view.as_mut()).map(|it| it.borrow_and_update().bytes_arrived).sum();
        if enough(arrived.saturating_sub(arrived_before)) {
            return true;
        }
    }
}

fn respond(wanted: Vec<Wanted>, found: Vec<Found>, committed_only: bool) -> FetchResponse {
    let mut topics: Vec<FetchableTopicResponse> = Vec::new();
    for (it, Found { view, records }) in wanted.into_iter().zip(found) {
        let mut data = PartitionData::default().with_partition_index(it.partition).with_error_code(super::code(&records));
        data.high_watermark = -1;
        if let Some(view) = view {
            data.high_watermark = view.high_watermark;
            data.last_stable_offset = view.high_watermark;
            data.log_start_offset = view.start;
        }
        data.aborted_transactions = committed_only.then(Vec::new);
        data.records = Some(records.unwrap_or_default());
        match topics.last_mut().filter(|last| last.topic == it.topic) {
            Some(last) => last.partitions.push(data),
            None => topics.push(FetchableTopicResponse::default().with_topic(it.topic).with_partitions(vec![data])),
        }
    }
    FetchResponse::default().with_responses(topics)
}

const LATEST: i64 = -1;
const EARLIEST: i64 = -2;
const NEWEST: i64 = -3;

pub(super) async fn list_offsets(server: &Arc<Server>, request: ListOffsetsRequest, version: i16) -> ListOffsetsResponse {
    let topics = Arc::clone(&server.store.topics.borrow());
    let mut answers = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let views = topics.get(topic.name.as_str());
        let mut partitions = Vec::with_capacity(topic.partitions.len());
        for it in topic.partitions {
            let view = views.and_then(|views| views.partitions.get(usize::try_from(it.partition_index).ok()?));
            let view = view.map(|it| it.borrow().clone());
            partitions.push(position(view, &it, version).await);
        }
        answers.push(ListOffsetsTopicResponse::default().with_name(topic.name).with_partitions(partitions));
    }
    ListOffsetsResponse::default().with_topics(answers)
}

async fn position(view: Option<View>, asked: &ListOffsetsPartition, version: i16) -> ListOffsetsPartitionResponse {
    let answer = ListOffsetsPartitionResponse::default().with_partition_index(asked.partition_index).with_timestamp(-1).with_offset(-1);
    let Some(view) = view else { return answer.with_error_code(ResponseError::UnknownTopicOrPartition.code()) };
    let timestamp = asked.timestamp;
    let found = match timestamp {
        LATEST => Ok(Some((-1, view.high_watermark))),
        EARLIEST => Ok(Some((-1, view.start))),
        NEWEST => look_up(move || read::newest(&view)).await,
        _ if timestamp < 0 => return answer.with_error_code(ResponseError::UnsupportedVersion.code()),
        _ => look_up(move || read::since(&view, timestamp)).await,
    };
    let answer = if version >= 4 { answer.with_leader_epoch(0) } else { answer };
    match found {
        Ok(Some((timestamp, offset))) => answer.with_timestamp(timestamp).with_offset(offset),
        Ok(None) => answer,
        Err(error) => {
            tracing::error!(%error, "could not look up a timestamp");
            answer.with_error_code(ResponseError::KafkaStorageError.code())
        }
    }
}

async fn look_up(work: impl FnOnce() -> io::Result<Option<(i64, i64)>> + Send + 'static) -> io::Result<Option<(i64, i64)>> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}
