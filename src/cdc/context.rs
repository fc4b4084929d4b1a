//! The headers that say which connector an event came through, in Debezium's words: tools that draw lineage read them.

use crate::stream::producer::Headers;

/// Of one run: its id is another one each time the stream is opened.
pub(super) fn headers(topic_prefix: &str) -> Headers {
    let run_id = uuid::Uuid::now_v7().to_string();
    Headers::of("__debezium.context.connectorLogicalName", topic_prefix.as_bytes())
        .and("__debezium.context.taskId", b"0")
        .and("__debezium.context.connectorName", b"postgresql")
        .and("__debezium.context.runId", run_id.as_bytes())
}
