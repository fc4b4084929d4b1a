//! Topics: what there is, and what an administrator does to it.

use std::{collections::BTreeMap, sync::Arc};

use kafka_protocol::{
    ResponseError,
    messages::{
        CreatePartitionsRequest, CreatePartitionsResponse, CreateTopicsRequest, CreateTopicsResponse, DeleteRecordsRequest, DeleteRecordsResponse,
        DeleteTopicsRequest, DeleteTopicsResponse, MetadataRequest, MetadataResponse,
        create_partitions_response::CreatePartitionsTopicResult,
        create_topics_request::CreatableTopic,
        create_topics_response::{CreatableTopicConfigs, CreatableTopicResult},
        delete_records_response::{DeleteRecordsPartitionResult, DeleteRecordsTopicResult},
        delete_topics_response::DeletableTopicResult,
        metadata_response::{MetadataResponseBroker, MetadataResponsePartition, MetadataResponseTopic},
    },
};

use super::{NODE, Server, code, configs, connection::Broken, text, topic_name};

/// A topic that is not there is not created by asking for it, whatever the client allows: a misspelt name would
/// otherwise swallow records.
pub(super) fn metadata(server: &Server, request: MetadataRequest, version: i16) -> MetadataResponse {
    let known = Arc::clone(&server.store.topics.borrow());
    let topic = |name: &str| {
        let answer = MetadataResponseTopic::default().with_name(Some(topic_name(name)));
        match known.get(name) {
            Some(views) => answer.with_partitions((0..).take(views.partitions.len()).map(partition).collect()),
            None => answer.with_error_code(ResponseError::UnknownTopicOrPartition.code()),
        }
    };
    let topics = match request.topics {
        // Version 0 has no null: there, none means all.
        Some(asked) if version > 0 || !asked.is_empty() => asked.iter().map(|it| topic(it.name.as_ref().map_or("", |it| it.as_str()))).collect(),
        _ => known.keys().map(|it| topic(it)).collect(),
    };
    let broker = MetadataResponseBroker::default().with_node_id(NODE).with_host(server.host()).with_port(i32::from(server.port));
    let response = MetadataResponse::default().with_brokers(vec![broker]).with_controller_id(NODE).with_topics(topics);
    response.with_cluster_id(Some(text(server.cluster_id.clone())))
}

fn partition(index: i32) -> MetadataResponsePartition {
    let alone = MetadataResponsePartition::default().with_partition_index(index).with_leader_id(NODE).with_leader_epoch(0);
    alone.with_replica_nodes(vec![NODE]).with_isr_nodes(vec![NODE])
}

pub(super) async fn create(server: &Server, request: CreateTopicsRequest) -> Result<CreateTopicsResponse, Broken> {
    let mut answers = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        answers.push(create_one(server, topic, request.validate_only).await?);
    }
    Ok(CreateTopicsResponse::default().with_topics(answers))
}

async fn create_one(server: &Server, topic: CreatableTopic, dry: bool) -> Result<CreatableTopicResult, Broken> {
    let asked = if topic.assignments.is_empty() { Some(topic.num_partitions) } else { i32::try_from(topic.assignments.len()).ok() };
    let partitions = asked.filter(|it| *it != -1).unwrap_or(1);
    let name = topic.name.to_string();
    let settings: BTreeMap<String, String> = topic.configs.iter().filter_map(|it| Some((it.name.to_string(), it.value.as_ref()?.to_string()))).collect();
    let created = if topic.replication_factor > 1 {
        Err(ResponseError::InvalidReplicationFactor)
    } else {
        server.store.ask(move |store| store.create_topic(&name, partitions, settings, dry)).await?
    };
    let answer = CreatableTopicResult::default().with_name(topic.name.clone()).with_error_code(code(&created));
    Ok(match created {
        Err(error) => answer.with_error_message(Some(text(error.to_string()))).with_num_partitions(-1).with_replication_factor(-1),
        Ok(()) => {
            let shown = configs::shown(server, &topic.name).into_iter().map(|(name, value, set)| {
                let source = configs::source(set);
                CreatableTopicConfigs::default().with_name(text(name)).with_value(Some(text(value))).with_config_source(source)
            });
            answer.with_num_partitions(partitions).with_replication_factor(1).with_configs(Some(shown.collect()))
        }
    })
}

pub(super) async fn delete(server: &Server, request: DeleteTopicsRequest) -> Result<DeleteTopicsResponse, Broken> {
    let mut answers = Vec::with_capacity(request.topic_names.len());
    for topic in request.topic_names {
        let name = topic.to_string();
        let deleted = server.store.ask(move |store| store.delete_topic(&name)).await?;
        answers.push(DeletableTopicResult::default().with_name(Some(topic)).with_error_code(code(&deleted)));
    }
    Ok(DeleteTopicsResponse::default().with_responses(answers))
}

pub(super) async fn create_partitions(server: &Server, request: CreatePartitionsRequest) -> Result<CreatePartitionsResponse, Broken> {
    let mut answers = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let (name, dry) = (topic.name.to_string(), request.validate_only);
        let grown = server.store.ask(move |store| store.create_partitions(&name, topic.count, dry)).await?;
        answers.push(CreatePartitionsTopicResult::default().with_name(topic.name).with_error_code(code(&grown)));
    }
    Ok(CreatePartitionsResponse::default().with_results(answers))
}

pub(super) async fn delete_records(server: &Server, request: DeleteRecordsRequest) -> Result<DeleteRecordsResponse, Broken> {
    let mut answers = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let mut partitions = Vec::with_capacity(topic.partitions.len());
        for it in topic.partitions {
            let name = topic.name.to_string();
            let start = server.store.ask(move |store| store.delete_records(&name, it.partition_index, it.offset)).await?;
            let answer = DeleteRecordsPartitionResult::default().with_partition_index(it.partition_index);
            partitions.push(answer.with_error_code(code(&start)).with_low_watermark(start.unwrap_or(-1)));
        }
        answers.push(DeleteRecordsTopicResult::default().with_name(topic.name).with_partitions(partitions));
    }
    Ok(DeleteRecordsResponse::default().with_topics(answers))
}
