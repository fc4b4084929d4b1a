//! What the topics tell of a connector's work: commits and events from the ENDs, heartbeats, and the snapshot's rows while it is
//! read. Rows that stream are never read here: they do not pass us.

use std::time::Duration;

use rdkafka::{Message as _, message::BorrowedMessage};
use serde::Deserialize;

use crate::{
    change::{Lsn, Topics},
    stream::{Lane, follow::lane_of},
};

/// Something a record told.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Told {
    End(End),
    Heartbeat,
    /// A row of a table's topic; `lsn` if it is one that the snapshot read.
    Row {
        lane: Lane,
        next_offset: i64,
        lsn: Option<Lsn>,
    },
}

/// A commit, as Debezium's transaction metadata tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct End {
    pub(super) lsn: Lsn,
    /// Milliseconds since 1970 UTC.
    pub(super) committed_at_ms: i64,
    /// Events by table, `public.customers`.
    pub(super) events: Vec<(String, u64)>,
    /// Where the transaction topic goes on behind it.
    pub(super) next_offset: i64,
}

#[derive(Deserialize)]
struct Boundary<'a> {
    status: &'a str,
    id: &'a str,
    ts_ms: i64,
    #[serde(borrow)]
    data_collections: Option<Vec<Owed<'a>>>,
}

#[derive(Deserialize)]
struct Owed<'a> {
    #[serde(borrow)]
    data_collection: std::borrow::Cow<'a, str>,
    event_count: u64,
}

#[derive(Deserialize)]
struct Event {
    op: Op,
    source: Origin,
}

#[derive(Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Op {
    R,
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Origin {
    lsn: Option<u64>,
}

/// Reads a record of one of the connector's topics.
pub(super) fn told(topics: &Topics, message: &BorrowedMessage<'_>) -> Option<Told> {
    let topic = message.topic();
    if topic == topics.heartbeat() {
        return Some(Told::Heartbeat);
    }
    let next_offset = message.offset() + 1;
    if topic == topics.boundaries() {
        return end_of(message.payload()?, next_offset).map(Told::End);
    }
    Some(Told::Row { lane: lane_of(message), next_offset, lsn: message.payload().and_then(read_at) })
}

fn end_of(value: &[u8], next_offset: i64) -> Option<End> {
    let boundary: Boundary<'_> = serde_json::from_slice(value).ok()?;
    let lsn = boundary.id.rsplit_once(':')?.1.parse().ok()?;
    let owed = boundary.data_collections.unwrap_or_default();
    let events = owed.into_iter().map(|it| (it.data_collection.into_owned(), it.event_count)).collect();
    (boundary.status == "END").then_some(End { lsn: Lsn(lsn), committed_at_ms: boundary.ts_ms, events, next_offset })
}

/// Where in the WAL the snapshot stood that read this row; None for a row that streamed.
fn read_at(value: &[u8]) -> Option<Lsn> {
    let event: Event = serde_json::from_slice(value).ok()?;
    (event.op == Op::R).then_some(Lsn(event.source.lsn?))
}

/// How long ago a commit was; a clock that is ahead of ours makes it none.
pub(super) fn age(committed_at_ms: i64, now_ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(now_ms - committed_at_ms).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_counts_what_a_commit_changed() {
        let value = br#"{"status":"END","id":"201093:629724488","event_count":3,"data_collections":[{"data_collection":"public.customers","event_count":1},{"data_collection":"public.accounts","event_count":2}],"ts_ms":1795332210639}"#;
        let end = end_of(value, 8).expect("an END");
        assert_eq!((end.lsn, end.committed_at_ms, end.next_offset), (Lsn(629_724_488), 1_795_332_210_639, 8));
        assert_eq!(end.events, [("public.customers".to_owned(), 1), ("public.accounts".to_owned(), 2)]);
        assert_eq!(end_of(br#"{"status":"BEGIN","id":"1:2","event_count":null,"data_collections":null,"ts_ms":1}"#, 1), None);
        assert_eq!(end_of(b"{", 1), None);
    }

    #[test]
    fn a_row_of_the_snapshot_is_told_from_one_that_streamed() {
        let row = |op| format!(r#"{{"before":null,"after":{{"op":"r"}},"source":{{"snapshot":"true","lsn":160086376}},"op":"{op}","ts_ms":1}}"#);
        assert_eq!(read_at(row("r").as_bytes()), Some(Lsn(160_086_376)));
        assert_eq!(read_at(row("c").as_bytes()), None);
    }
}
