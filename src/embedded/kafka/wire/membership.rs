//! Consumer groups on the wire: joining, syncing, beating, leaving, committing, and looking at them.

use std::{collections::BTreeMap, time::Duration};

use kafka_protocol::{
    ResponseError,
    messages::{
        DeleteGroupsRequest, DeleteGroupsResponse, DescribeGroupsRequest, DescribeGroupsResponse, HeartbeatRequest, HeartbeatResponse, JoinGroupRequest,
        JoinGroupResponse, LeaveGroupRequest, LeaveGroupResponse, ListGroupsRequest, ListGroupsResponse, OffsetCommitRequest, OffsetCommitResponse,
        OffsetFetchRequest, OffsetFetchResponse, SyncGroupRequest, SyncGroupResponse,
        delete_groups_response::DeletableGroupResult,
        describe_groups_response::{DescribedGroup, DescribedGroupMember},
        join_group_response::JoinGroupResponseMember,
        leave_group_response::MemberResponse,
        list_groups_response::ListedGroup,
        offset_commit_response::{OffsetCommitResponsePartition, OffsetCommitResponseTopic},
        offset_fetch_response::{OffsetFetchResponsePartition, OffsetFetchResponseTopic},
    },
    protocol::StrBytes,
};

use super::{Server, code, connection::Broken, group_id, text, topic_name};
use crate::embedded::kafka::{
    coordinator::{Described, Identity},
    group::{Join, State},
    offsets::Position,
    store::now_ms,
};

/// Kafka's limit on what a client may attach to a commit.
const METADATA_BYTES_MAX: usize = 4_096;

fn identity(member_id: &StrBytes, instance_id: Option<&StrBytes>, generation: i32) -> Identity {
    Identity { member_id: member_id.to_string(), instance_id: instance_id.map(StrBytes::to_string), generation }
}

fn milliseconds(milliseconds: i32) -> Duration {
    Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0))
}

pub(super) async fn join(server: &Server, request: JoinGroupRequest, version: i16, client_id: &str) -> Result<JoinGroupResponse, Broken> {
    if request.group_id.is_empty() {
        return Ok(JoinGroupResponse::default().with_error_code(ResponseError::InvalidGroupId.code()).with_generation_id(-1));
    }
    let session = milliseconds(request.session_timeout_ms);
    let join = Join {
        member_id: request.member_id.to_string(),
        instance_id: request.group_instance_id.as_ref().map(StrBytes::to_string),
        client_id: client_id.to_owned(),
        session,
        // Version 0 does not say; a member then has its session's time.
        rebalance: if request.rebalance_timeout_ms > 0 { milliseconds(request.rebalance_timeout_ms) } else { session },
        protocol_type: request.protocol_type.to_string(),
        protocols: request.protocols.into_iter().map(|it| (it.name.to_string(), it.metadata)).collect(),
        id_required: version >= 4,
    };
    let joined = server.groups.join(request.group_id.to_string(), join).await.ok_or(Broken::Stopping)?;
    let member = |(id, instance_id, metadata): (String, Option<String>, bytes::Bytes)| {
        let member = JoinGroupResponseMember::default().with_member_id(text(id)).with_metadata(metadata);
        if version >= 5 { member.with_group_instance_id(instance_id.map(text)) } else { member }
    };
    let response = JoinGroupResponse::default()
        .with_error_code(joined.error.map_or(0, |it| it.code()))
        .with_generation_id(joined.generation)
        .with_protocol_name(Some(text(joined.protocol)))
        .with_leader(text(joined.leader))
        .with_member_id(text(joined.member_id))
        .with_members(joined.members.into_iter().map(member).collect());
    Ok(if version >= 7 { response.with_protocol_type(Some(text(joined.protocol_type))) } else { response })
}

pub(super) async fn sync(server: &Server, request: SyncGroupRequest) -> Result<SyncGroupResponse, Broken> {
    let who = identity(&request.member_id, request.group_instance_id.as_ref(), request.generation_id);
    let assignments = request.assignments.into_iter().map(|it| (it.member_id.to_string(), it.assignment)).collect();
    let synced = server.groups.sync(request.group_id.to_string(), who, assignments).await.ok_or(Broken::Stopping)?;
    let response = SyncGroupResponse::default().with_error_code(synced.error.map_or(0, |it| it.code())).with_assignment(synced.assignment);
    Ok(response.with_protocol_type(Some(text(synced.protocol_type))).with_protocol_name(Some(text(synced.protocol))))
}

pub(super) async fn heartbeat(server: &Server, request: HeartbeatRequest) -> Result<HeartbeatResponse, Broken> {
    let who = identity(&request.member_id, request.group_instance_id.as_ref(), request.generation_id);
    let heard = server.groups.heartbeat(request.group_id.to_string(), who).await.ok_or(Broken::Stopping)?;
    Ok(HeartbeatResponse::default().with_error_code(code(&heard)))
}

pub(super) async fn leave(server: &Server, request: LeaveGroupRequest, version: i16) -> Result<LeaveGroupResponse, Broken> {
    let departures = if version < 3 {
        vec![(request.member_id.to_string(), None)]
    } else {
        request.members.iter().map(|it| (it.member_id.to_string(), it.group_instance_id.as_ref().map(StrBytes::to_string))).collect()
    };
    let left = server.groups.leave(request.group_id.to_string(), departures).await.ok_or(Broken::Stopping)?;
    if version < 3 {
        return Ok(LeaveGroupResponse::default().with_error_code(left.first().map_or(0, code)));
    }
    let members = request
        .members
        .into_iter()
        .zip(&left)
        .map(|(it, left)| MemberResponse::default().with_member_id(it.member_id).with_group_instance_id(it.group_instance_id).with_error_code(code(left)));
    Ok(LeaveGroupResponse::default().with_members(members.collect()))
}

pub(super) async fn commit(server: &Server, request: OffsetCommitRequest) -> Result<OffsetCommitResponse, Broken> {
    let (mut positions, committed_ms) = (Vec::new(), now_ms());
    let refused = |topic: &str, partition: i32, metadata: usize| {
        let topics = server.store.topics.borrow();
        let known = topics.get(topic).is_some_and(|it| usize::try_from(partition).is_ok_and(|n| n < it.partitions.len()));
        match known {
            false => Some(ResponseError::UnknownTopicOrPartition),
            true if metadata > METADATA_BYTES_MAX => Some(ResponseError::OffsetMetadataTooLarge),
            true => None,
        }
    };
    let mut answers = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let mut partitions = Vec::with_capacity(topic.partitions.len());
        for it in topic.partitions {
            let metadata = it.committed_metadata.as_ref().map(StrBytes::to_string).unwrap_or_default();
            let refused = refused(&topic.name, it.partition_index, metadata.len());
            if refused.is_none() {
                let position = Position { offset: it.committed_offset, leader_epoch: it.committed_leader_epoch, metadata, committed_ms };
                positions.push(((topic.name.to_string(), it.partition_index), position));
            }
            partitions.push((it.partition_index, refused));
        }
        answers.push((topic.name, partitions));
    }
    let who = identity(&request.member_id, request.group_instance_id.as_ref(), request.generation_id_or_member_epoch);
    let committed = server.groups.commit(request.group_id.to_string(), who, positions).await.ok_or(Broken::Stopping)?;
    let answer = |(index, refused): (i32, Option<ResponseError>)| {
        let error = refused.or(committed.err()).map_or(0, |it| it.code());
        OffsetCommitResponsePartition::default().with_partition_index(index).with_error_code(error)
    };
    let topics = answers
        .into_iter()
        .map(|(name, partitions)| OffsetCommitResponseTopic::default().with_name(name).with_partitions(partitions.into_iter().map(answer).collect()));
    Ok(OffsetCommitResponse::default().with_topics(topics.collect()))
}

pub(super) async fn positions(server: &Server, request: OffsetFetchRequest) -> Result<OffsetFetchResponse, Broken> {
    let group = request.group_id.to_string();
    let positions = server.store.ask(move |store| store.positions(&group)).await?;
    let asked: Vec<(String, Vec<i32>)> = match request.topics {
        Some(topics) => topics.into_iter().map(|it| (it.name.to_string(), it.partition_indexes)).collect(),
        None => {
            let mut all: BTreeMap<String, Vec<i32>> = BTreeMap::new();
            positions.keys().for_each(|(topic, partition)| all.entry(topic.clone()).or_default().push(*partition));
            all.into_iter().collect()
        }
    };
    let topics = asked.into_iter().map(|(name, partitions)| {
        let partition = |index: i32| {
            let answer = OffsetFetchResponsePartition::default().with_partition_index(index);
            match positions.get(&(name.clone(), index)) {
                Some(it) => {
                    let answer = answer.with_committed_offset(it.offset).with_committed_leader_epoch(it.leader_epoch);
                    answer.with_metadata(Some(text(it.metadata.clone())))
                }
                None => answer.with_committed_offset(-1).with_committed_leader_epoch(-1).with_metadata(Some(text(""))),
            }
        };
        OffsetFetchResponseTopic::default().with_name(topic_name(&name)).with_partitions(partitions.into_iter().map(partition).collect())
    });
    Ok(OffsetFetchResponse::default().with_topics(topics.collect()))
}

/// Groups with members, and those that only have positions.
pub(super) async fn list(server: &Server, request: ListGroupsRequest, version: i16) -> Result<ListGroupsResponse, Broken> {
    let with_positions = server.store.ask(|store| store.groups_with_positions()).await?;
    let mut groups: BTreeMap<String, (String, &str)> = with_positions.into_iter().map(|name| (name, ("consumer".to_owned(), State::Empty.name()))).collect();
    let with_members = server.groups.list().await.ok_or(Broken::Stopping)?;
    groups.extend(with_members.into_iter().map(|(name, protocol_type, state)| (name, (protocol_type, state))));
    let asked = |state: &str| request.states_filter.is_empty() || request.states_filter.iter().any(|it| it.eq_ignore_ascii_case(state));
    let listed = groups.into_iter().filter(|(_, (_, state))| asked(state)).map(|(name, (protocol_type, state))| {
        let group = ListedGroup::default().with_group_id(group_id(&name)).with_protocol_type(text(protocol_type));
        if version >= 4 { group.with_group_state(text(state)) } else { group }
    });
    Ok(ListGroupsResponse::default().with_groups(listed.collect()))
}

pub(super) async fn describe(server: &Server, request: DescribeGroupsRequest, version: i16) -> Result<DescribeGroupsResponse, Broken> {
    let mut answers = Vec::with_capacity(request.groups.len());
    for id in request.groups {
        let name = id.to_string();
        let answer = DescribedGroup::default().with_group_id(id);
        let described = server.groups.describe(name.clone()).await.ok_or(Broken::Stopping)?;
        answers.push(match described {
            Some(described) => fill(answer, described, version),
            None if server.store.ask(move |store| !store.positions(&name).is_empty()).await? => {
                answer.with_group_state(text(State::Empty.name())).with_protocol_type(text("consumer"))
            }
            None => answer.with_group_state(text("Dead")),
        });
    }
    Ok(DescribeGroupsResponse::default().with_groups(answers))
}

fn fill(answer: DescribedGroup, described: Described, version: i16) -> DescribedGroup {
    let members = described.members.into_iter().map(|it| {
        let member = DescribedGroupMember::default().with_member_id(text(it.member_id)).with_client_id(text(it.client_id));
        let member = member.with_client_host(text("/127.0.0.1")).with_member_metadata(it.metadata).with_member_assignment(it.assignment);
        if version >= 4 { member.with_group_instance_id(it.instance_id.map(text)) } else { member }
    });
    let answer = answer.with_members(members.collect()).with_group_state(text(described.state));
    answer.with_protocol_type(text(described.protocol_type)).with_protocol_data(text(described.protocol))
}

pub(super) async fn delete(server: &Server, request: DeleteGroupsRequest) -> Result<DeleteGroupsResponse, Broken> {
    let mut answers = Vec::with_capacity(request.groups_names.len());
    for id in request.groups_names {
        let name = id.to_string();
        let described = server.groups.describe(name.clone()).await.ok_or(Broken::Stopping)?;
        let deleted = match described {
            Some(described) if !described.members.is_empty() => Err(ResponseError::NonEmptyGroup),
            _ => match server.store.ask(move |store| store.forget_group(&name)).await? {
                Ok(false) => Err(ResponseError::GroupIdNotFound),
                Ok(true) => Ok(()),
                Err(error) => Err(error),
            },
        };
        answers.push(DeletableGroupResult::default().with_group_id(id).with_error_code(code(&deleted)));
    }
    Ok(DeleteGroupsResponse::default().with_results(answers))
}
