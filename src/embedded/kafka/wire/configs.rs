//! Topic configs as clients see and change them.

use std::collections::BTreeMap;

use kafka_protocol::{
    ResponseError,
    messages::{
        AlterConfigsRequest, AlterConfigsResponse, DescribeConfigsRequest, DescribeConfigsResponse, IncrementalAlterConfigsRequest,
        IncrementalAlterConfigsResponse, alter_configs_response,
        describe_configs_request::DescribeConfigsResource,
        describe_configs_response::{DescribeConfigsResourceResult, DescribeConfigsResult},
        incremental_alter_configs_response,
    },
    protocol::StrBytes,
};

use super::{NODE, Server, code, connection::Broken, text};
use crate::embedded::kafka::catalog;

const TOPIC: i8 = 2;
const BROKER: i8 = 4;
/// Sources of a value, as the protocol numbers them.
const SET_ON_TOPIC: i8 = 1;
const DEFAULT: i8 = 5;
/// What an incremental change does.
const SET: i8 = 0;
const DELETE: i8 = 1;

pub(super) fn source(set: bool) -> i8 {
    if set { SET_ON_TOPIC } else { DEFAULT }
}

/// A topic's settings: name, value, whether set on the topic. Empty where there is no such topic.
pub(super) fn shown(server: &Server, topic: &str) -> Vec<(String, String, bool)> {
    let topics = server.store.topics.borrow();
    topics.get(topic).map(|it| catalog::described(&it.configs, &it.limits, server.batch_bytes_max())).unwrap_or_default()
}

pub(super) fn describe(server: &Server, request: DescribeConfigsRequest, version: i16) -> DescribeConfigsResponse {
    let results = request.resources.into_iter().map(|it| describe_one(server, it, version));
    DescribeConfigsResponse::default().with_results(results.collect())
}

fn describe_one(server: &Server, resource: DescribeConfigsResource, version: i16) -> DescribeConfigsResult {
    let settings = match resource.resource_type {
        TOPIC if server.store.topics.borrow().contains_key(resource.resource_name.as_str()) => Ok(shown(server, &resource.resource_name)),
        TOPIC => Err(ResponseError::UnknownTopicOrPartition),
        BROKER if resource.resource_name.as_str() == NODE.0.to_string() => {
            let settings = [("auto.create.topics.enable", "false"), ("default.replication.factor", "1"), ("num.partitions", "1")];
            Ok(settings.map(|(name, value)| (name.to_owned(), value.to_owned(), false)).to_vec())
        }
        _ => Err(ResponseError::InvalidRequest),
    };
    let error = code(&settings);
    let asked = |name: &str| resource.configuration_keys.as_ref().is_none_or(|keys| keys.iter().any(|key| key.as_str() == name));
    let result = |(name, value, set): (String, String, bool)| {
        let result = DescribeConfigsResourceResult::default().with_name(text(name)).with_value(Some(text(value))).with_config_source(source(set));
        // A string, from the version on that says what kind of value it is.
        if version >= 3 { result.with_config_type(2) } else { result }
    };
    let configs = settings.unwrap_or_default().into_iter().filter(|(name, ..)| asked(name)).map(result).collect();
    let answer = DescribeConfigsResult::default().with_resource_type(resource.resource_type).with_error_code(error).with_configs(configs);
    answer.with_resource_name(resource.resource_name)
}

/// Replaces all settings of a topic.
pub(super) async fn alter(server: &Server, request: AlterConfigsRequest) -> Result<AlterConfigsResponse, Broken> {
    let mut answers = Vec::with_capacity(request.resources.len());
    for resource in request.resources {
        let fresh: BTreeMap<String, String> = resource.configs.iter().filter_map(|it| Some((it.name.to_string(), it.value.as_ref()?.to_string()))).collect();
        let altered = change(server, resource.resource_type, &resource.resource_name, request.validate_only, move |_| fresh).await?;
        let answer = alter_configs_response::AlterConfigsResourceResponse::default().with_error_code(code(&altered));
        answers.push(answer.with_resource_type(resource.resource_type).with_resource_name(resource.resource_name));
    }
    Ok(AlterConfigsResponse::default().with_responses(answers))
}

/// Changes some settings of a topic. Lists (append, subtract) are not served: no setting of ours is one.
pub(super) async fn alter_some(server: &Server, request: IncrementalAlterConfigsRequest) -> Result<IncrementalAlterConfigsResponse, Broken> {
    let mut answers = Vec::with_capacity(request.resources.len());
    for resource in request.resources {
        let known = resource.configs.iter().all(|it| matches!(it.config_operation, SET | DELETE));
        let changes: Vec<(String, Option<String>)> = resource
            .configs
            .iter()
            .map(|it| (it.name.to_string(), it.value.as_ref().filter(|_| it.config_operation == SET).map(StrBytes::to_string)))
            .collect();
        let merge = move |mut configs: BTreeMap<String, String>| {
            for (name, value) in changes {
                match value {
                    Some(value) => configs.insert(name, value),
                    None => configs.remove(&name),
                };
            }
            configs
        };
        let altered = match known {
            true => change(server, resource.resource_type, &resource.resource_name, request.validate_only, merge).await?,
            false => Err(ResponseError::InvalidConfig),
        };
        let answer = incremental_alter_configs_response::AlterConfigsResourceResponse::default().with_error_code(code(&altered));
        answers.push(answer.with_resource_type(resource.resource_type).with_resource_name(resource.resource_name));
    }
    Ok(IncrementalAlterConfigsResponse::default().with_responses(answers))
}

async fn change(
    server: &Server,
    resource_type: i8,
    name: &StrBytes,
    dry: bool,
    change: impl FnOnce(BTreeMap<String, String>) -> BTreeMap<String, String> + Send + 'static,
) -> Result<Result<(), ResponseError>, Broken> {
    if resource_type != TOPIC {
        return Ok(Err(ResponseError::InvalidRequest));
    }
    let name = name.to_string();
    Ok(server.store.ask(move |store| store.alter_configs(&name, change, dry)).await?)
}
