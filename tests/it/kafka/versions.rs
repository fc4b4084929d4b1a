//! Every request we serve, in its lowest and its highest version, answered in full.

use kafka_protocol::{
    messages::{
        AlterConfigsRequest, ApiKey, ApiVersionsRequest, CreatePartitionsRequest, CreateTopicsRequest, DeleteGroupsRequest, DeleteRecordsRequest,
        DeleteTopicsRequest, DescribeConfigsRequest, DescribeGroupsRequest, FindCoordinatorRequest, GroupId, HeartbeatRequest, IncrementalAlterConfigsRequest,
        InitProducerIdRequest, JoinGroupRequest, LeaveGroupRequest, ListGroupsRequest, ListOffsetsRequest, MetadataRequest, OffsetCommitRequest,
        OffsetFetchRequest, SyncGroupRequest, alter_configs_request,
        create_partitions_request::CreatePartitionsTopic,
        create_topics_request::{CreatableTopic, CreatableTopicConfig},
        delete_records_request::{DeleteRecordsPartition, DeleteRecordsTopic},
        describe_configs_request::DescribeConfigsResource,
        incremental_alter_configs_request,
        join_group_request::JoinGroupRequestProtocol,
        leave_group_request::MemberIdentity,
        list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic},
        metadata_request::MetadataRequestTopic,
        offset_commit_request::{OffsetCommitRequestPartition, OffsetCommitRequestTopic},
        offset_fetch_request::OffsetFetchRequestTopic,
        sync_group_request::SyncGroupRequestAssignment,
    },
    protocol::StrBytes,
};

use super::{
    House,
    raw::{ANYBODY, Client, batch, fetch_request, fetched, outcome, produce_request, text, topic},
};

const UNKNOWN_TOPIC: i16 = 3;
const UNSUPPORTED_VERSION: i16 = 35;
const MEMBER_ID_REQUIRED: i16 = 79;
const NO_TRANSACTIONS: i16 = 53;

fn group(name: &str) -> GroupId {
    GroupId(text(name))
}

#[test]
fn api_versions_are_told_in_every_version_and_to_clients_that_are_too_new() {
    let house = House::new();
    let mut client = house.client();
    for version in [0, 3] {
        let response = client.ask(version, &ApiVersionsRequest::default().with_client_software_name(text("x")).with_client_software_version(text("1")));
        assert_eq!(response.error_code, 0);
        let range = |key: ApiKey| response.api_keys.iter().find(|it| it.api_key == key as i16).map(|it| (it.min_version, it.max_version));
        assert_eq!(range(ApiKey::Produce), Some((0, 9)));
        assert_eq!(range(ApiKey::Fetch), Some((4, 11)));
        assert_eq!(range(ApiKey::EndTxn), None);
    }
    // Version 4 is asked with the flexible header, and answered in version 0 with header 0.
    let correlation_id = client.send(4, &ApiVersionsRequest::default().with_client_software_name(text("x")).with_client_software_version(text("1")));
    let response = client.answer::<ApiVersionsRequest>(0, correlation_id);
    assert_eq!(response.error_code, UNSUPPORTED_VERSION);
    assert!(!response.api_keys.is_empty());
}

#[test]
fn records_go_in_and_come_out_in_every_version() {
    let house = House::new();
    let mut client = house.client();
    client.create("t", 1);
    for (n, version) in [(0, 3), (1, 9)] {
        assert_eq!(outcome(&client.ask(version, &produce_request("t", 0, 1, batch(&[b"a"], 1_000 + n, ANYBODY)))), (0, n));
        assert_eq!(outcome(&client.ask(version, &produce_request("nowhere", 0, 1, batch(&[b"a"], 0, ANYBODY)))), (UNKNOWN_TOPIC, -1));
    }
    for version in [4, 11] {
        let (error, high_watermark, records) = fetched(&client.ask(version, &fetch_request("t", 0, 1)));
        assert_eq!((error, high_watermark), (0, 2));
        // Base offset and leader epoch are ours; the rest is as it was sent.
        assert_eq!(records[..8], 1_i64.to_be_bytes());
        assert_eq!(records[16..], batch(&[b"a"], 1_001, ANYBODY)[16..]);
        assert_eq!(fetched(&client.ask(version, &fetch_request("t", 0, 3))).0, 1, "beyond the end is out of range");
        assert_eq!(fetched(&client.ask(version, &fetch_request("t", 1, 0))).0, UNKNOWN_TOPIC);
    }
    for (version, timestamp, expected) in
        [(1, -1, (-1, 2)), (1, -2, (-1, 0)), (1, 1_001, (1_001, 1)), (7, -1, (-1, 2)), (7, -2, (-1, 0)), (7, -3, (1_001, 1)), (7, 5_000, (-1, -1))]
    {
        let part = ListOffsetsPartition::default().with_partition_index(0).with_timestamp(timestamp);
        let asked = ListOffsetsTopic::default().with_name(topic("t")).with_partitions(vec![part]);
        let response = client.ask(version, &ListOffsetsRequest::default().with_replica_id((-1).into()).with_topics(vec![asked]));
        let part = &response.topics[0].partitions[0];
        assert_eq!((part.error_code, (part.timestamp, part.offset)), (0, expected), "timestamp {timestamp} in version {version}");
    }
}

#[test]
fn topics_are_made_shown_grown_trimmed_and_deleted_in_every_version() {
    let house = House::new();
    let mut client = house.client();
    for (name, lowest) in [("low", true), ("high", false)] {
        let pick = |low: i16, high: i16| if lowest { low } else { high };
        let setting = CreatableTopicConfig::default().with_name(text("retention.ms")).with_value(Some(text("60000")));
        let wanted = CreatableTopic::default().with_name(topic(name)).with_num_partitions(1).with_replication_factor(1).with_configs(vec![setting]);
        let create = CreateTopicsRequest::default().with_topics(vec![wanted]).with_timeout_ms(1_000);
        assert_eq!(client.ask(pick(2, 5), &create).topics[0].error_code, 0);
        assert_eq!(client.ask(pick(2, 5), &create).topics[0].error_code, 36);

        let asked = |name: &str| MetadataRequestTopic::default().with_name(Some(topic(name)));
        let metadata = MetadataRequest::default().with_topics(Some(vec![asked(name), asked("missing")])).with_allow_auto_topic_creation(true);
        let response = client.ask(pick(0, 9), &metadata);
        assert_eq!(response.brokers[0].port, i32::from(house.broker().port()));
        assert_eq!((response.topics[0].error_code, response.topics[0].partitions.len()), (0, 1));
        assert_eq!(response.topics[1].error_code, UNKNOWN_TOPIC, "asking for a topic does not create it");

        let grown = CreatePartitionsTopic::default().with_name(topic(name)).with_count(3).with_assignments(None);
        let response = client.ask(pick(0, 3), &CreatePartitionsRequest::default().with_topics(vec![grown]));
        assert_eq!(response.results[0].error_code, 0);

        assert_eq!(client.produce(name, 2, batch(&[b"a", b"b"], 0, ANYBODY)), (0, 0));
        let part = DeleteRecordsPartition::default().with_partition_index(2).with_offset(1);
        let trimmed = DeleteRecordsTopic::default().with_name(topic(name)).with_partitions(vec![part]);
        let response = client.ask(pick(0, 2), &DeleteRecordsRequest::default().with_topics(vec![trimmed]));
        assert_eq!((response.topics[0].partitions[0].error_code, response.topics[0].partitions[0].low_watermark), (0, 1));
        assert_eq!(client.fetch(name, 2, 0).0, 1);

        let response = client.ask(pick(1, 5), &DeleteTopicsRequest::default().with_topic_names(vec![topic(name), topic("missing")]));
        assert_eq!(response.responses.iter().map(|it| it.error_code).collect::<Vec<_>>(), [0, UNKNOWN_TOPIC]);
    }
    // Version 0 has no null: no names stand for all topics; from version 1 on they stand for none.
    client.create("left", 1);
    assert_eq!(client.ask(0, &MetadataRequest::default().with_topics(Some(vec![]))).topics.len(), 1);
    assert_eq!(client.ask(1, &MetadataRequest::default().with_topics(None)).topics.len(), 1);
    assert_eq!(client.ask(1, &MetadataRequest::default().with_topics(Some(vec![]))).topics.len(), 0);
}

#[test]
fn configs_are_described_and_changed_in_every_version() {
    let house = House::new();
    let mut client = house.client();
    client.create("t", 1);
    let described = |client: &mut Client, version: i16| {
        let resource = DescribeConfigsResource::default().with_resource_type(2).with_resource_name(text("t"));
        let resource = resource.with_configuration_keys(Some(vec![text("retention.ms")]));
        let response = client.ask(version, &DescribeConfigsRequest::default().with_resources(vec![resource]));
        assert_eq!(response.results[0].configs.len(), 1);
        response.results[0].configs[0].value.as_ref().map(StrBytes::to_string).unwrap()
    };
    for (n, version) in [(1, 0), (2, 2)] {
        let setting = alter_configs_request::AlterableConfig::default().with_name(text("retention.ms")).with_value(Some(text(&format!("{n}000"))));
        let resource = alter_configs_request::AlterConfigsResource::default().with_resource_type(2).with_resource_name(text("t"));
        let request = AlterConfigsRequest::default().with_resources(vec![resource.with_configs(vec![setting])]);
        assert_eq!(client.ask(version, &request).responses[0].error_code, 0);
        assert_eq!(described(&mut client, 1), format!("{n}000"));
    }
    for (n, version) in [(3, 0), (4, 1)] {
        for (name, error) in [("retention.ms", 0), ("retention.misspelt", 40)] {
            let setting = incremental_alter_configs_request::AlterableConfig::default().with_name(text(name));
            let setting = setting.with_config_operation(0).with_value(Some(text(&format!("{n}000"))));
            let resource = incremental_alter_configs_request::AlterConfigsResource::default().with_resource_type(2).with_resource_name(text("t"));
            let request = IncrementalAlterConfigsRequest::default().with_resources(vec![resource.with_configs(vec![setting])]);
            assert_eq!(client.ask(version, &request).responses[0].error_code, error, "{name}");
        }
        assert_eq!(described(&mut client, 4), format!("{n}000"));
    }
}

#[test]
fn producer_ids_and_coordinators_are_given_and_transactions_refused_in_every_version() {
    let house = House::new();
    let mut client = house.client();
    let mut ids = Vec::new();
    for version in [0, 4] {
        let plain = InitProducerIdRequest::default().with_transactional_id(None).with_transaction_timeout_ms(1_000);
        let response = client.ask(version, &plain);
        assert_eq!((response.error_code, response.producer_epoch), (0, 0));
        ids.push(response.producer_id.0);
        let transactional = plain.with_transactional_id(Some(text("x").into()));
        assert_eq!(client.ask(version, &transactional).error_code, NO_TRANSACTIONS);
    }
    assert_ne!(ids[0], ids[1]);
    for version in [0, 3] {
        let response = client.ask(version, &FindCoordinatorRequest::default().with_key(text("g")));
        assert_eq!((response.error_code, response.port), (0, i32::from(house.broker().port())));
    }
    let response = client.ask(3, &FindCoordinatorRequest::default().with_key(text("x")).with_key_type(1));
    assert_eq!(response.error_code, NO_TRANSACTIONS);
    assert!(response.error_message.unwrap().contains("transactions"));
}

#[test]
fn a_member_joins_syncs_beats_commits_and_leaves_in_every_version() {
    let house = House::new();
    house.client().create("t", 1);
    for (name, lowest) in [("low", true), ("high", false)] {
        let mut client = house.client();
        let pick = |low: i16, high: i16| if lowest { low } else { high };
        let protocol = JoinGroupRequestProtocol::default().with_name(text("range")).with_metadata(b"meta".as_slice().into());
        let join = JoinGroupRequest::default().with_group_id(group(name)).with_session_timeout_ms(10_000).with_protocol_type(text("consumer"));
        let join = join.with_protocols(vec![protocol]);
        let join = if lowest { join } else { join.with_rebalance_timeout_ms(10_000) };
        let mut joined = client.ask(pick(0, 7), &join);
        if joined.error_code == MEMBER_ID_REQUIRED {
            joined = client.ask(pick(0, 7), &join.with_member_id(joined.member_id));
        }
        assert_eq!((joined.error_code, joined.generation_id, joined.members.len()), (0, 1, 1));
        assert_eq!(joined.leader, joined.member_id);
        let member = joined.member_id.clone();

        let part = SyncGroupRequestAssignment::default().with_member_id(member.clone()).with_assignment(b"all of it".as_slice().into());
        let sync = SyncGroupRequest::default().with_group_id(group(name)).with_generation_id(1).with_member_id(member.clone());
        let sync = if lowest { sync } else { sync.with_protocol_type(Some(text("consumer"))).with_protocol_name(Some(text("range"))) };
        let synced = client.ask(pick(0, 5), &sync.with_assignments(vec![part]));
        assert_eq!((synced.error_code, synced.assignment.as_ref()), (0, b"all of it".as_slice()));

        let beat = HeartbeatRequest::default().with_group_id(group(name)).with_generation_id(1).with_member_id(member.clone());
        assert_eq!(client.ask(pick(0, 4), &beat).error_code, 0);
        assert_eq!(client.ask(pick(0, 4), &beat.with_generation_id(7)).error_code, 22);

        commit_and_look(&mut client, name, &member, lowest);
        let leave = LeaveGroupRequest::default().with_group_id(group(name));
        let response = if lowest {
            client.ask(0, &leave.with_member_id(member))
        } else {
            client.ask(4, &leave.with_members(vec![MemberIdentity::default().with_member_id(member)]))
        };
        assert_eq!((response.error_code, response.members.first().map_or(0, |it| it.error_code)), (0, 0));
        let response = client.ask(pick(0, 2), &DeleteGroupsRequest::default().with_groups_names(vec![group(name), group("nobody")]));
        assert_eq!(response.results.iter().map(|it| it.error_code).collect::<Vec<_>>(), [0, 69]);
    }
}

fn commit_and_look(client: &mut Client, name: &str, member: &StrBytes, lowest: bool) {
    let pick = |low: i16, high: i16| if lowest { low } else { high };
    let at = |partition: i32| OffsetCommitRequestPartition::default().with_partition_index(partition).with_committed_offset(42);
    let at = |partition: i32| at(partition).with_committed_metadata(Some(text("note")));
    let lanes = OffsetCommitRequestTopic::default().with_name(topic("t")).with_partitions(vec![at(0), at(9)]);
    let commit = OffsetCommitRequest::default().with_group_id(group(name)).with_generation_id_or_member_epoch(1).with_member_id(member.clone());
    let response = client.ask(pick(2, 8), &commit.with_topics(vec![lanes]));
    assert_eq!(response.topics[0].partitions.iter().map(|it| it.error_code).collect::<Vec<_>>(), [0, UNKNOWN_TOPIC]);

    let wanted = OffsetFetchRequestTopic::default().with_name(topic("t")).with_partition_indexes(vec![0, 1]);
    let response = client.ask(pick(1, 7), &OffsetFetchRequest::default().with_group_id(group(name)).with_topics(Some(vec![wanted])));
    let positions: Vec<i64> = response.topics[0].partitions.iter().map(|it| it.committed_offset).collect();
    assert_eq!(positions, [42, -1]);
    assert_eq!(response.topics[0].partitions[0].metadata, Some(text("note")));
    if !lowest {
        let all = client.ask(7, &OffsetFetchRequest::default().with_group_id(group(name)).with_topics(None));
        assert_eq!(all.topics[0].partitions.len(), 1);
    }

    let response = client.ask(pick(0, 4), &ListGroupsRequest::default());
    assert!(response.groups.iter().any(|it| it.group_id == group(name) && it.protocol_type == text("consumer")));
    let response = client.ask(pick(0, 5), &DescribeGroupsRequest::default().with_groups(vec![group(name), group("nobody")]));
    assert_eq!(response.groups[0].group_state, text("Stable"));
    assert_eq!(response.groups[0].members[0].member_metadata.as_ref(), b"meta");
    assert_eq!(response.groups[1].group_state, text("Dead"));
}
