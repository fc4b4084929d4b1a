//! Which requests we serve, in which versions, and who carries them out.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use kafka_protocol::{
    ResponseError,
    messages::{
        ApiKey, ApiVersionsResponse, FindCoordinatorRequest, FindCoordinatorResponse, InitProducerIdRequest, InitProducerIdResponse, ProducerId, RequestHeader,
        RequestKind, ResponseHeader, ResponseKind, api_versions_response::ApiVersion,
    },
    protocol::{Decodable, Encodable, StrBytes, VersionRange},
};

use super::{NODE, Server, code, configs, connection::Broken, fetch, membership, produce, shape, text, topics};

/// Key, version, correlation id.
pub(super) const HEADER_BYTES_MIN: usize = 8;
/// What an answer without records needs at most, mostly.
const ANSWER_BYTES: usize = 512;
const NO_TRANSACTIONS: &str = "the embedded broker serves no transactions; use an idempotent producer, or Apache Kafka";

/// An answer on its way: the frame to write, or none where the client wants none. Nothing but produce requests begins
/// before it is awaited.
pub(super) type Answer = BoxFuture<'static, Result<Option<Bytes>, Broken>>;

/// A request we serve: its highest version here (FETCH 12 and METADATA 10 bring topic ids, JOIN 8 reasons; no client
/// needs them from us), and its [`shape`].
struct Served {
    key: ApiKey,
    highest: i16,
    shape: &'static str,
}

const fn served(key: ApiKey, highest: i16, shape: &'static str) -> Served {
    Served { key, highest, shape }
}

const SERVED: [Served; 23] = [
    served(ApiKey::Produce, 9, "s 2 4 [s [4 b]]"),
    served(ApiKey::Fetch, 11, "4 4 4 4 1 (7+ 4 4) [s [4 (9+ 4) 8 (5+ 8) 4]] (7+ [s <4>]) (11+ s)"),
    served(ApiKey::ListOffsets, 7, "4 (2+ 1) [s [4 (4+ 4) 8]]"),
    served(ApiKey::Metadata, 9, "[s] (4+ 1) (8+ 1 1)"),
    served(ApiKey::OffsetCommit, 8, "s 4 s (7+ s) (4- 8) [s [4 8 (6+ 4) s]]"),
    served(ApiKey::OffsetFetch, 7, "s [s <4>] (7+ 1)"),
    served(ApiKey::FindCoordinator, 3, "s (1+ 1)"),
    served(ApiKey::JoinGroup, 7, "s 4 (1+ 4) s (5+ s) s [s b]"),
    served(ApiKey::Heartbeat, 4, "s 4 s (3+ s)"),
    served(ApiKey::LeaveGroup, 4, "s (2- s) (3+ [s s])"),
    served(ApiKey::SyncGroup, 5, "s 4 s (3+ s) (5+ s s) [s b]"),
    served(ApiKey::DescribeGroups, 5, "<s> (3+ 1)"),
    served(ApiKey::ListGroups, 4, "(4+ <s>)"),
    served(ApiKey::ApiVersions, 3, "(3+ s s)"),
    served(ApiKey::CreateTopics, 5, "[s 4 2 [4 <4>] [s s]] 4 1"),
    served(ApiKey::DeleteTopics, 5, "<s> 4"),
    served(ApiKey::DeleteRecords, 2, "[s [4 8]] 4"),
    served(ApiKey::InitProducerId, 4, "s 4 (3+ 8 2)"),
    served(ApiKey::DescribeConfigs, 4, "[1 s <s>] 1 (3+ 1)"),
    served(ApiKey::AlterConfigs, 2, "[1 s [s s]] 1"),
    served(ApiKey::CreatePartitions, 3, "[s 4 [<4>]] 4 1"),
    served(ApiKey::DeleteGroups, 2, "<s>"),
    served(ApiKey::IncrementalAlterConfigs, 1, "[1 s [s 1 s]] 1"),
];

impl Served {
    fn versions(&self) -> VersionRange {
        VersionRange { min: self.key.valid_versions().min, max: self.highest }
    }
}

/// What a request says before its body.
#[derive(Debug, Clone)]
struct Head {
    key: ApiKey,
    version: i16,
    correlation_id: i32,
}

/// Reads a request; a produce request is put into the store's queue at once.
pub(super) async fn begin(server: &Arc<Server>, frame: Bytes) -> Result<Answer, Broken> {
    let (key, version, correlation_id) = (i16_at(&frame, 0), i16_at(&frame, 2), i32::from_be_bytes([frame[4], frame[5], frame[6], frame[7]]));
    let unserved = Broken::Unserved { key, version };
    let Some(served) = SERVED.iter().find(|it| it.key as i16 == key) else { return Err(unserved) };
    let mut head = Head { key: served.key, version, correlation_id };
    let versions = served.versions();
    if !(versions.min..=versions.max).contains(&version) {
        if !matches!(served.key, ApiKey::ApiVersions) {
            return Err(unserved);
        }
        // A client newer than us is told which versions there are, in the version every client understands.
        head.version = 0;
        return Ok(ready(encode(&head, &ResponseKind::ApiVersions(api_versions().with_error_code(ResponseError::UnsupportedVersion.code())), ANSWER_BYTES)));
    }
    let (client_id, body) = read(served, version, frame)?;
    if let RequestKind::Produce(request) = body {
        return produce::begin(server, request, move |response| encode(&head, &ResponseKind::Produce(response), ANSWER_BYTES)).await;
    }
    let server = Arc::clone(server);
    Ok(Box::pin(async move {
        let (response, bytes) = carry_out(&server, body, head.version, &client_id).await?;
        encode(&head, &response, bytes + ANSWER_BYTES).map(Some)
    }))
}

/// The client's name for itself, and the request.
fn read(served: &Served, version: i16, mut frame: Bytes) -> Result<(String, RequestKind), Broken> {
    let header_version = served.key.request_header_version(version);
    let header = RequestHeader::decode(&mut frame, header_version).map_err(|_| Broken::Malformed)?;
    // The second header version came with the flexible encoding; so did the body's.
    if !shape::fits(served.shape, &frame, version, header_version >= 2) {
        return Err(Broken::Malformed);
    }
    let body = RequestKind::decode(served.key, &mut frame, version).map_err(|_| Broken::Malformed)?;
    Ok((header.client_id.as_ref().map(StrBytes::to_string).unwrap_or_default(), body))
}

/// The response, and how many bytes of records it holds.
async fn carry_out(server: &Arc<Server>, body: RequestKind, version: i16, client_id: &str) -> Result<(ResponseKind, usize), Broken> {
    let response = match body {
        RequestKind::Fetch(it) => {
            let (response, bytes) = fetch::fetch(server, it).await;
            return Ok((ResponseKind::Fetch(response), bytes));
        }
        RequestKind::ListOffsets(it) => ResponseKind::ListOffsets(fetch::list_offsets(server, it, version).await),
        RequestKind::Metadata(it) => ResponseKind::Metadata(topics::metadata(server, it, version)),
        RequestKind::CreateTopics(it) => ResponseKind::CreateTopics(topics::create(server, it).await?),
        RequestKind::DeleteTopics(it) => ResponseKind::DeleteTopics(topics::delete(server, it).await?),
        RequestKind::CreatePartitions(it) => ResponseKind::CreatePartitions(topics::create_partitions(server, it).await?),
        RequestKind::DeleteRecords(it) => ResponseKind::DeleteRecords(topics::delete_records(server, it).await?),
        RequestKind::DescribeConfigs(it) => ResponseKind::DescribeConfigs(configs::describe(server, it, version)),
        RequestKind::AlterConfigs(it) => ResponseKind::AlterConfigs(configs::alter(server, it).await?),
        RequestKind::IncrementalAlterConfigs(it) => ResponseKind::IncrementalAlterConfigs(configs::alter_some(server, it).await?),
        RequestKind::OffsetCommit(it) => ResponseKind::OffsetCommit(membership::commit(server, it).await?),
        RequestKind::OffsetFetch(it) => ResponseKind::OffsetFetch(membership::positions(server, it).await?),
        RequestKind::JoinGroup(it) => ResponseKind::JoinGroup(membership::join(server, it, version, client_id).await?),
        RequestKind::SyncGroup(it) => ResponseKind::SyncGroup(membership::sync(server, it).await?),
        RequestKind::Heartbeat(it) => ResponseKind::Heartbeat(membership::heartbeat(server, it).await?),
        RequestKind::LeaveGroup(it) => ResponseKind::LeaveGroup(membership::leave(server, it, version).await?),
        RequestKind::ListGroups(it) => ResponseKind::ListGroups(membership::list(server, it, version).await?),
        RequestKind::DescribeGroups(it) => ResponseKind::DescribeGroups(membership::describe(server, it, version).await?),
        RequestKind::DeleteGroups(it) => ResponseKind::DeleteGroups(membership::delete(server, it).await?),
        RequestKind::ApiVersions(_) => ResponseKind::ApiVersions(api_versions()),
        RequestKind::FindCoordinator(it) => ResponseKind::FindCoordinator(find_coordinator(server, &it, version)),
        RequestKind::InitProducerId(it) => ResponseKind::InitProducerId(init_producer_id(server, it).await?),
        _ => return Err(Broken::Malformed),
    };
    Ok((response, 0))
}

fn encode(head: &Head, response: &ResponseKind, bytes: usize) -> Result<Bytes, Broken> {
    let unanswerable = |_| Broken::Unanswerable { key: head.key as i16, version: head.version };
    let mut frame = BytesMut::with_capacity(bytes);
    frame.extend_from_slice(&[0; 4]);
    let header = ResponseHeader::default().with_correlation_id(head.correlation_id);
    header.encode(&mut frame, head.key.response_header_version(head.version)).map_err(unanswerable)?;
    response.encode(&mut frame, head.version).map_err(unanswerable)?;
    let length = i32::try_from(frame.len() - 4).map_err(|_| Broken::Unanswerable { key: head.key as i16, version: head.version })?;
    frame[..4].copy_from_slice(&length.to_be_bytes());
    Ok(frame.freeze())
}

fn ready(answer: Result<Bytes, Broken>) -> Answer {
    Box::pin(std::future::ready(answer.map(Some)))
}

fn api_versions() -> ApiVersionsResponse {
    let version = |served: &Served| {
        let versions = served.versions();
        // Older librdkafkas take a broker whose oldest produce version is not 0 for one that knows no compression.
        let lowest = if matches!(served.key, ApiKey::Produce) { 0 } else { versions.min };
        ApiVersion::default().with_api_key(served.key as i16).with_min_version(lowest).with_max_version(versions.max)
    };
    ApiVersionsResponse::default().with_api_keys(SERVED.iter().map(version).collect())
}

fn find_coordinator(server: &Server, request: &FindCoordinatorRequest, version: i16) -> FindCoordinatorResponse {
    if request.key_type == 0 {
        return FindCoordinatorResponse::default().with_node_id(NODE).with_host(server.host()).with_port(i32::from(server.port));
    }
    // Clients give up at once on this error, and show the text.
    let refused = FindCoordinatorResponse::default().with_error_code(ResponseError::TransactionalIdAuthorizationFailed.code()).with_node_id((-1).into());
    let refused = refused.with_port(-1);
    if version == 0 { refused } else { refused.with_error_message(Some(text(NO_TRANSACTIONS))) }
}

async fn init_producer_id(server: &Server, request: InitProducerIdRequest) -> Result<InitProducerIdResponse, Broken> {
    let id = match request.transactional_id {
        Some(_) => Err(ResponseError::TransactionalIdAuthorizationFailed),
        None => server.store.ask(|store| store.new_producer_id()).await?,
    };
    let response = InitProducerIdResponse::default().with_error_code(code(&id));
    Ok(match id {
        Ok(id) => response.with_producer_id(ProducerId(id)).with_producer_epoch(0),
        Err(_) => response.with_producer_id(ProducerId(-1)).with_producer_epoch(-1),
    })
}

fn i16_at(frame: &Bytes, at: usize) -> i16 {
    i16::from_be_bytes([frame[at], frame[at + 1]])
}
