//! What no snapshot carries, read when somebody wants to see it: messages, commit records, the proof, a task's log, SQL.
//!
//! Every look is bounded in what it reads and in what it answers, and changes nothing. Customers stay masked here, on this
//! side of the socket, unless the operator asked to see them.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::Path,
    sync::Arc,
};

use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{
    change::Topics,
    dag::{History, RunRef, TaskState},
    fault::chain,
    lake,
    secret::Secret,
    stream::{self, range},
    units::{bytes_for_people, grouped},
};

use super::{
    command::{Look, Reply},
    services::Addresses,
    snapshot::Snapshot,
};

/// Messages shown of a topic.
const MESSAGES_MAX: usize = 20;

/// Of one message; a larger one is cut, and says so.
const MESSAGE_LINES_MAX: usize = 80;

/// Lines of one try's log.
const LOG_LINES_MAX: u32 = 1_000;

/// The end of the log that is read.
const LOG_BYTES_MAX: u64 = 64 * 1024;

/// Lines of a page, whatever it is of.
const PAGE_LINES_MAX: usize = 2_000;

/// Damage is listed so far; there is a command for all of it.
const FINDINGS_MAX: usize = 50;

/// Where the looks are taken. Cheap to clone.
#[derive(Clone)]
pub(super) struct Eyes {
    kafka: stream::Access,
    lake: lake::Access,
    state: Secret,
    topics: Topics,
    /// The folder of the log files.
    log: Arc<Path>,
    /// The pipeline ends, and its services with it.
    stop: CancellationToken,
}

impl Eyes {
    pub(super) fn new(addresses: &Addresses, topics: &Topics, log: &Path, stop: CancellationToken) -> Self {
        let Addresses { kafka, lake, state, .. } = addresses.clone();
        Self { kafka, lake, state, topics: topics.clone(), log: log.into(), stop }
    }

    /// Looks, and says in words what is in the way. A long look ends where the pipeline does.
    pub(super) async fn look(&self, at: Look, now: &Snapshot) -> Reply {
        tokio::select! {
            () = self.stop.cancelled() => Reply::refused("the pipeline is ending"),
            reply = self.taken(at, now) => reply,
        }
    }

    async fn taken(&self, at: Look, now: &Snapshot) -> Reply {
        let seen = match &at {
            Look::Messages { table, revealed } => self.messages(table, *revealed, now).await,
            Look::CommitRecord { data } => self.commit_record(data, now).await,
            Look::Proof => self.proof().await,
            Look::TaskLog { dag_id, run_id, task_id } => self.task_log(&RunRef { dag_id: dag_id.clone(), run_id: run_id.clone() }, task_id).await,
            Look::Log => log(&self.log),
            Look::Sql { unique_id } => sql(unique_id, now).await,
        };
        let mut reply = seen.unwrap_or_else(Reply::refused);
        if reply.page.len() > PAGE_LINES_MAX {
            let hidden = reply.page.len() - PAGE_LINES_MAX;
            reply.page.truncate(PAGE_LINES_MAX);
            reply.page.push(format!("… and {} lines more", grouped(hidden as u64)));
        }
        reply
    }

    async fn messages(&self, table: &str, revealed: bool, now: &Snapshot) -> Result<Reply, String> {
        let topic = self.topic_of(table, now)?;
        if revealed {
            // Whoever looks at customers leaves a trace.
            info!(topic, "messages are shown unmasked to an operator");
        }
        let found = range::newest(&self.kafka, &topic, MESSAGES_MAX).await.map_err(|error| chain(&error))?;
        if found.is_empty() {
            return Ok(Reply::done(format!("{topic} holds no message yet")));
        }
        let page = found.iter().flat_map(|it| message(it, revealed)).collect();
        Ok(Reply { page, ..Reply::done(format!("the newest {} of {topic}", found.len())) })
    }

    fn topic_of(&self, table: &str, now: &Snapshot) -> Result<String, String> {
        let lane = now.lake.lanes.iter().find(|it| it.table == table).map(|it| it.topic.clone());
        lane.ok_or_else(|| format!("no topic of that name is read here: {table}"))
    }

    async fn commit_record(&self, data: &str, now: &Snapshot) -> Result<Reply, String> {
        let key: lake::object::DataKey = data.parse().map_err(|error: lake::object::ForeignKey| error.to_string())?;
        let topic = self.topic_of(&key.table, now)?;
        let store = lake::Store::open(&self.lake).await.map_err(|error| chain(&error))?;
        let name = lake::object::LogKey { topic: topic.clone(), partition: key.partition, first_offset: key.first_offset }.to_string();
        let bytes = store.get(&name).await.map_err(|error| chain(&error))?;
        let bytes = bytes.ok_or_else(|| format!("no commit record {name}: the object is an orphan, or its record is on its way"))?;
        let stored = lake::log::Stored::read(&name, &bytes).map_err(|error| chain(&error))?;
        let object = store.get(&stored.record.data).await.map_err(|error| chain(&error))?;
        let next = lake::log::after(&store, &topic, key.partition, Some(stored.record.last_offset), 1).await.map_err(|error| chain(&error))?;
        let (proven, proof) = proof_of(&stored, object.as_deref(), next.first());
        let mut page = vec![name];
        page.extend(record_lines(&stored.record));
        page.push(String::new());
        page.extend(proof);
        Ok(Reply { ok: true, page, ..Reply::done(if proven { "proven" } else { "the proof is broken" }) })
    }

    async fn proof(&self) -> Result<Reply, String> {
        let store = lake::Store::open(&self.lake).await.map_err(|error| chain(&error))?;
        let proof = lake::verify(&store, &self.topics, lake::Options::default()).await.map_err(|error| chain(&error))?;
        Ok(verdict_of(&proof, Utc::now()))
    }

    async fn task_log(&self, run: &RunRef, task_id: &str) -> Result<Reply, String> {
        let history = History::new(&self.state);
        let tries = history.tries(run).await.map_err(|error| chain(&error))?;
        let mut page = Vec::new();
        for tried in tries.iter().filter(|it| it.task_id == task_id) {
            let took = tried
                .finished_at
                .map_or_else(|| "running".to_owned(), |end| format!("{}, {:.2} s", tried.state.as_str(), (end - tried.started_at).as_seconds_f64()));
            page.push(format!("try {} at {} · {took}", tried.try_number, tried.started_at.format("%H:%M:%S")));
            let lines = history.log(run, task_id, tried.try_number, 0, LOG_LINES_MAX).await.map_err(|error| chain(&error))?;
            page.extend(lines.iter().map(|it| format!("  {} {}", it.at.format("%H:%M:%S%.3f"), it.line)));
            if tried.state == TaskState::Failed
                && let Some(error) = &tried.error
            {
                page.extend(error.lines().map(|it| format!("  ✗ {it}")));
            }
        }
        let said = if page.is_empty() { "not tried yet" } else { "what it said, try by try" };
        Ok(Reply { page, ..Reply::done(said) })
    }
}

/// The end of the log. It is read by a thread that may wait.
fn log(path: &Path) -> Result<Reply, String> {
    let why = |error: std::io::Error| format!("could not read the log {}: {error}", path.display());
    let mut file = File::open(path).map_err(why)?;
    let start = file.metadata().map_err(why)?.len().saturating_sub(LOG_BYTES_MAX);
    let mut end = Vec::new();
    file.seek(SeekFrom::Start(start)).and_then(|_| file.read_to_end(&mut end)).map_err(why)?;
    let text = String::from_utf8_lossy(&end);
    // The first line is cut where the file is longer.
    let page = text.lines().skip(usize::from(start > 0)).map(short).collect();
    Ok(Reply { page, ..Reply::done(path.display().to_string()) })
}

/// `12:03:04 INFO  lake: object put rows=44059` of a line that begins with its date and ends its target in a colon.
fn short(line: &str) -> String {
    let mut words = line.split_whitespace();
    let parts = (words.next().and_then(|it| it.get(11..19)), words.next(), words.next().and_then(|it| it.strip_suffix(':')));
    let (Some(at), Some(level), Some(target)) = parts else { return line.to_owned() };
    let room = target.strip_prefix("ledgerline::").unwrap_or(target).split("::").next().unwrap_or_default();
    format!("{at} {level:<5} {room}: {}", words.collect::<Vec<_>>().join(" "))
}

/// Only what dbt itself named as the file of a node: a path is never taken from whoever asks.
async fn sql(unique_id: &str, now: &Snapshot) -> Result<Reply, String> {
    let node = now.refresh.dbt.nodes.iter().find(|it| it.unique_id == unique_id).ok_or("dbt has no such node in this run")?;
    let path = node.compiled.clone().ok_or("dbt keeps the SQL of nodes that failed or warned; this one did not")?;
    let text = tokio::fs::read_to_string(&path).await.map_err(|error| format!("could not read {path}: {error}"))?;
    let page = text.trim().lines().map(str::to_owned).collect();
    Ok(Reply { page, ..Reply::done(path) })
}

fn at(milliseconds: i64) -> String {
    DateTime::from_timestamp_millis(milliseconds).map_or_else(|| "–".to_owned(), |it| it.format("%F %H:%M:%S%.3f").to_string())
}

fn message(seen: &range::Kept, revealed: bool) -> Vec<String> {
    let when = seen.timestamp_ms.map_or_else(|| "no time".to_owned(), at);
    let key = seen.key.as_deref().map(|it| String::from_utf8_lossy(it).into_owned());
    let mut lines = vec![format!("p={} offset {} · {when} · key {}", seen.partition, grouped_offset(seen.offset), key.as_deref().unwrap_or("none"))];
    match seen.value.as_deref().map(serde_json::from_slice::<Value>) {
        None => lines.push("  tombstone: the row is gone".to_owned()),
        Some(Err(_)) => lines.push(format!("  not JSON, {} bytes", seen.value.as_ref().map_or(0, |it| it.len()))),
        Some(Ok(mut value)) => {
            if !revealed {
                mask(&mut value);
            }
            let pretty = pretty(&value);
            let hidden = pretty.len().saturating_sub(MESSAGE_LINES_MAX);
            lines.extend(pretty.into_iter().take(MESSAGE_LINES_MAX));
            if hidden > 0 {
                lines.push(format!("  … and {hidden} lines more"));
            }
        }
    }
    lines.push(String::new());
    lines
}

/// What happened comes before where it was read.
fn pretty(value: &Value) -> Vec<String> {
    const FIRST: [&str; 5] = ["op", "before", "after", "status", "id"];
    let Value::Object(fields) = value else { return vec![format!("  {value}")] };
    let mut names: Vec<&String> = fields.keys().collect();
    names.sort_by_key(|name| FIRST.iter().position(|it| it == name).unwrap_or(FIRST.len()));
    let field = |name: &String| {
        let text = serde_json::to_string_pretty(&fields[name.as_str()]).unwrap_or_default();
        text.lines().enumerate().map(|(place, line)| if place == 0 { format!("  {name}: {line}") } else { format!("  {line}") }).collect::<Vec<_>>()
    };
    names.into_iter().flat_map(field).collect()
}

fn grouped_offset(offset: i64) -> String {
    u64::try_from(offset).map_or_else(|_| offset.to_string(), grouped)
}

/// Rows keep what tells about the bank's running: keys, states, kinds and times. All else is a customer's.
fn mask(message: &mut Value) {
    for side in ["before", "after"] {
        if let Some(Value::Object(row)) = message.get_mut(side) {
            for (_, value) in row.iter_mut().filter(|(name, value)| !value.is_null() && !is_open(name)) {
                *value = Value::String("•••".to_owned());
            }
        }
    }
}

/// Columns that say nothing about a person.
fn is_open(column: &str) -> bool {
    const OPEN: [&str; 7] = ["id", "status", "currency", "direction", "reference", "interest_rate", "account_type"];
    OPEN.contains(&column) || column.ends_with("_id") || column.ends_with("_type") || column.ends_with("_at")
}

fn record_lines(record: &lake::log::CommitRecord) -> Vec<String> {
    vec![
        format!("lane      {} p={}", record.topic, record.partition),
        format!("offsets   {} – {}", grouped_offset(record.first_offset), grouped_offset(record.last_offset)),
        format!("rows      {}", grouped(record.rows)),
        format!("bytes     {} ({})", grouped(record.bytes), bytes_for_people(record.bytes)),
        format!("records   {} – {}", at(record.timestamp_min), at(record.timestamp_max)),
        format!("written   {}", record.written_at.format("%F %H:%M:%S%.3f")),
        format!("sha256    {}", record.sha256),
        format!("previous  {}", record.previous.as_deref().unwrap_or("none: the chain begins here")),
    ]
}

/// Whether the object is the one the record speaks of, and the next record chains on this one.
fn proof_of(stored: &lake::log::Stored, object: Option<&[u8]>, next: Option<&lake::log::CommitRecord>) -> (bool, Vec<String>) {
    let record = &stored.record;
    let object_said = match object {
        None => Err("the data object is gone".to_owned()),
        Some(bytes) if lake::log::sha256_hex(bytes) != record.sha256 => Err("the data object is not the one that was written: its hash differs".to_owned()),
        Some(bytes) => Ok(format!("the data object has this hash, {} bytes", grouped(bytes.len() as u64))),
    };
    let chain_said = match next {
        None => Ok("the newest record of its lane: the next one will chain on it".to_owned()),
        Some(next) if next.previous.as_deref() == Some(stored.sha256.as_str()) && next.first_offset == record.last_offset + 1 => {
            Ok(format!("the next record, from offset {}, chains on this one", grouped_offset(next.first_offset)))
        }
        Some(next) => Err(format!("the record from offset {} does not chain on this one", grouped_offset(next.first_offset))),
    };
    let proven = object_said.is_ok() && chain_said.is_ok();
    let line = |said: Result<String, String>| said.map_or_else(|wrong| format!("✗ {wrong}"), |right| format!("✓ {right}"));
    (proven, vec![line(object_said), line(chain_said)])
}

fn verdict_of(proof: &lake::Proof, now: DateTime<Utc>) -> Reply {
    let objects: u64 = proof.lanes.iter().map(|it| it.objects).sum();
    let mut page: Vec<String> = proof.findings.iter().take(FINDINGS_MAX).map(|it| format!("✗ {}: {}", it.key, it.what)).collect();
    if proof.findings.len() > FINDINGS_MAX {
        page.push(format!("… and {} more: `ledgerline lake verify` lists all", proof.findings.len() - FINDINGS_MAX));
    }
    for lane in &proof.lanes {
        let to = lane.last_offset.map_or_else(|| "empty".to_owned(), |it| format!("proven to offset {}", grouped_offset(it)));
        let holes = if lane.holes > 0 { format!(" · {} holes of the log itself", grouped(lane.holes)) } else { String::new() };
        page.push(format!("{} p={} · {to} · {} objects, {} rows{holes}", lane.topic, lane.partition, grouped(lane.objects), grouped(lane.rows)));
    }
    if !proof.orphans.is_empty() {
        page.push(format!("{} orphans, harmless: `ledgerline lake verify --sweep` removes them", proof.orphans.len()));
    }
    let at = now.format("%H:%M:%S");
    let text = match proof.findings.len() {
        0 => format!("chain proven at {at}: {} objects, no gap, no overlap, every hash right", grouped(objects)),
        damages => format!("the proof is broken at {at}: {damages} findings"),
    };
    Reply { ok: proof.ok(), page, ..Reply::done(text) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn seen(value: Option<&str>) -> range::Kept {
        range::Kept {
            partition: 0,
            offset: 44_059,
            timestamp_ms: Some(1_780_000_000_000),
            key: Some(Bytes::from_static(br#"{"id":17}"#)),
            value: value.map(|it| Bytes::copy_from_slice(it.as_bytes())),
            headers: Vec::new(),
        }
    }

    #[test]
    fn customers_stay_masked_unless_revealed() {
        let value = r#"{"before":null,"after":{"id":17,"first_name":"Ada","email":"ada@example.org","status":"ACTIVE","balance":"12.50"},"op":"c"}"#;
        let masked = message(&seen(Some(value)), false).join("\n");
        for secret in ["Ada", "example.org", "12.50"] {
            assert!(!masked.contains(secret), "{masked}");
        }
        for open in ["44,059", "ACTIVE", "op: \"c\"", "first_name"] {
            assert!(masked.contains(open), "{masked}");
        }
        assert!(message(&seen(Some(value)), true).join("\n").contains("ada@example.org"));
        assert!(message(&seen(None), false).join("\n").contains("tombstone"));
        assert!(message(&seen(Some("{")), false).join("\n").contains("not JSON"));
    }

    #[test]
    fn the_end_of_the_log_is_read_and_its_lines_are_short() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("ledgerline.log");
        assert!(log(&path).is_err());
        let line = "2026-11-22T19:14:57.345292Z  INFO ledgerline::dag::engine: run started dag_id=\"D\"\n";
        std::fs::write(&path, line.repeat(2_000)).expect("written");
        let reply = log(&path).expect("there");
        assert!(reply.text.ends_with("ledgerline.log") && (100..2_000).contains(&reply.page.len()), "{} {}", reply.text, reply.page.len());
        assert!(reply.page.iter().all(|it| it == "19:14:57 INFO  dag: run started dag_id=\"D\""), "{:?}", reply.page[0]);
        assert_eq!(short("  4: core::panicking"), "  4: core::panicking");
    }

    #[test]
    fn a_record_is_proven_by_its_object_and_by_the_next_one() {
        let record = |first: i64, last: i64, data: &[u8], previous: Option<String>| lake::log::CommitRecord {
            schema: 1,
            topic: "bank.public.accounts".into(),
            partition: 0,
            first_offset: first,
            last_offset: last,
            rows: 10,
            data: "raw/accounts/x.parquet".into(),
            bytes: data.len() as u64,
            sha256: lake::log::sha256_hex(data),
            timestamp_min: 0,
            timestamp_max: 0,
            previous,
            written_at: DateTime::UNIX_EPOCH,
        };
        let first = record(0, 9, b"rows", None);
        let stored = lake::log::Stored::read("k", &first.to_bytes()).expect("its own bytes");
        let next = record(10, 19, b"more", Some(stored.sha256.clone()));
        assert!(proof_of(&stored, Some(b"rows"), Some(&next)).0);
        assert!(proof_of(&stored, Some(b"rows"), None).0);
        assert!(!proof_of(&stored, Some(b"rowz"), Some(&next)).0);
        assert!(!proof_of(&stored, None, Some(&next)).0);
        assert!(!proof_of(&stored, Some(b"rows"), Some(&record(10, 19, b"more", Some("0".into())))).0);
    }
}
