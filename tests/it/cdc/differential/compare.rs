//! What both engines wrote, beside each other: byte by byte, but for what no two captures have in common.

use serde_json::Value;

use super::run::{Topics, Written, schema};
use crate::cdc::house::{masked, without_times};

/// The first message of a topic that is another one.
#[derive(Debug, Clone)]
pub(super) struct Difference {
    pub(super) topic: String,
    pub(super) what: String,
}

impl Difference {
    /// Debezium itself gave up on it.
    pub(super) fn failure(why: &str) -> Self {
        Self { topic: FAILURE.to_owned(), what: format!("Debezium's task fails: {why}") }
    }

    pub(super) fn is_failure(&self) -> bool {
        self.topic == FAILURE
    }

    /// Whether it is on a topic of that case, or about a transaction that changed its tables.
    pub(super) fn concerns(&self, place: usize) -> bool {
        let head = format!("{}.", schema(place));
        self.topic.starts_with(&head) || self.what.contains(&format!("\"{head}"))
    }
}

const FAILURE: &str = "no topic";

type Comparable = (Option<String>, Option<String>, Vec<(String, String)>);

/// All topics on which the engines differ.
pub(super) fn differences(ours: &Topics, theirs: &Topics) -> Vec<Difference> {
    let mut topics: Vec<&String> = ours.keys().chain(theirs.keys()).collect();
    topics.sort();
    topics.dedup();
    let none = Vec::new();
    let difference = |topic: &String| {
        let ours: Vec<Comparable> = ours.get(topic).unwrap_or(&none).iter().filter(|it| !is_nudge(it)).map(comparable).collect();
        let theirs: Vec<Comparable> = theirs.get(topic).unwrap_or(&none).iter().map(|it| as_we_write(comparable(it))).collect();
        let what = first_difference(&ours, &theirs)?;
        Some(Difference { topic: topic.clone(), what })
    };
    topics.into_iter().filter_map(difference).collect()
}

/// Both read the same WAL, so LSNs, transaction ids and commit times are equal; only a snapshot is each engine's own.
fn comparable(written: &Written) -> Comparable {
    let value = written.value.as_deref().map(|value| {
        let value =
            in_order(without_version(&without_times(value))).replace("\"event_count\":1,\"data_collections\":[]", "\"event_count\":0,\"data_collections\":[]");
        let value = match value.strip_prefix("{\"op\":\"m\",\"ts_ms\":") {
            Some(rest) => rest.trim_start_matches(|it: char| it.is_ascii_digit()).to_owned(),
            None => value,
        };
        if value.contains("\"op\":\"r\"") { masked(&value) } else { value }
    });
    let header = |(name, value): &(String, String)| match name.ends_with(".runId") {
        true => (name.clone(), String::new()),
        false => (name.clone(), value.clone()),
    };
    (written.key.clone(), value, written.headers.iter().map(header).collect())
}

/// What moves the slot of a connector that sees nothing else: of no transaction of ours, and not for Debezium's own topic.
fn is_nudge(written: &Written) -> bool {
    written.key.as_deref() == Some("{\"prefix\":\"ledgerline.heartbeat\"}")
}

/// The tables of an END, which Debezium has in the order of Java's hashes.
fn in_order(value: String) -> String {
    let value = without_messages(value);
    const HEAD: &str = "\"data_collections\":[";
    let Some(at) = value.find(HEAD).map(|it| it + HEAD.len()) else { return value };
    let end = value[at..].find("}]").map_or(at, |it| at + it + 1);
    let mut tables: Vec<&str> = value[at..end].split_inclusive('}').map(|it| it.trim_start_matches(',')).collect();
    tables.sort_unstable();
    format!("{}{}{}", &value[..at], tables.join(","), &value[end..])
}

/// An END of Debezium's counts logical messages under the address of a Java object; ours as events alone.
fn without_messages(value: String) -> String {
    const HEAD: &str = "{\"data_collection\":\"io.debezium.connector.postgresql.LogicalDecodingMessageMonitor";
    let mut left = value;
    while let Some(at) = left.find(HEAD) {
        let end = left[at..].find('}').map_or(left.len(), |it| at + it + 1);
        left = format!("{}{}", &left[..at], &left[end..]).replace(",]", "]").replace("[,", "[").replace(",,", ",");
    }
    left
}

fn without_version(value: &str) -> String {
    const HEAD: &str = "\"source\":{\"version\":\"";
    let Some(at) = value.find(HEAD).map(|it| it + HEAD.len()) else { return value.to_owned() };
    let end = value[at..].find('"').map_or(value.len(), |it| at + it);
    format!("{}{}", &value[..at], &value[end..])
}

/// Debezium's accidents of Java (`tests/golden/README.md`), as we write them.
fn as_we_write((key, value, headers): Comparable) -> Comparable {
    let ours =
        |text: String| text.replace("\"NAN\"", "\"NaN\"").replace("\"POSITIVE_INFINITY\"", "\"Infinity\"").replace("\"NEGATIVE_INFINITY\"", "\"-Infinity\"");
    (key.map(ours), value.map(ours), headers.into_iter().map(|(name, value)| (name, ours(value))).collect())
}

/// Of an array of arrays Debezium writes `[null,null]`, or the addresses of Java's objects.
fn without_inner_arrays((key, value, headers): &Comparable) -> Comparable {
    let value = value.as_ref().map(|value| {
        let (mut out, mut depth, mut in_text, mut escaped) = (String::with_capacity(value.len()), 0, false, false);
        for character in value.chars() {
            match character {
                _ if in_text => {
                    in_text = character != '"' || escaped;
                    escaped = character == '\\' && !escaped;
                }
                '"' => in_text = true,
                '[' => depth += 1,
                ']' => depth -= 1,
                _ => {}
            }
            match (character, depth) {
                ('[', 2) if !in_text => out += "null",
                (_, 2..) => {}
                (']', 1) if !in_text => {}
                _ => out.push(character),
            }
        }
        out
    });
    (key.clone(), value, headers.clone())
}

fn without_objects((key, value, headers): &Comparable) -> Comparable {
    const HEAD: &str = "\"[Ljava.";
    let value = value.clone().map(|mut value| {
        while let Some(at) = value.find(HEAD) {
            let end = value[at + 1..].find('"').map_or(value.len(), |it| at + it + 2);
            value.replace_range(at..end, "null");
        }
        value
    });
    (key.clone(), value, headers.clone())
}

fn first_difference(ours: &[Comparable], theirs: &[Comparable]) -> Option<String> {
    let is_same = |ours: &Comparable, theirs: &Comparable| ours == theirs || without_inner_arrays(ours) == without_inner_arrays(&without_objects(theirs));
    let at = ours.iter().zip(theirs).position(|(ours, theirs)| !is_same(ours, theirs)).unwrap_or(ours.len().min(theirs.len()));
    let counts = format!("message {} of {} and {}", at + 1, ours.len(), theirs.len());
    match (ours.get(at), theirs.get(at)) {
        (None, None) => None,
        (Some(ours), Some(theirs)) => Some(format!("{counts}\n{}", told(ours, theirs))),
        (Some(ours), None) => Some(format!("{counts}\n  only ours: {}", short(&format!("{ours:?}")))),
        (None, Some(theirs)) => Some(format!("{counts}\n  only Debezium's: {}", short(&format!("{theirs:?}")))),
    }
}

/// Where two messages differ: the fields, or where the fields are equal the bytes.
fn told(ours: &Comparable, theirs: &Comparable) -> String {
    let mut told = String::new();
    if ours.2 != theirs.2 {
        told += &format!("  headers: ours {:?}, Debezium's {:?}\n", ours.2, theirs.2);
    }
    for (name, ours, theirs) in [("key", &ours.0, &theirs.0), ("value", &ours.1, &theirs.1)] {
        if ours == theirs {
            continue;
        }
        let (Some(ours), Some(theirs)) = (ours, theirs) else {
            told += &format!("  {name}: ours {}, Debezium's {}\n", short(&format!("{ours:?}")), short(&format!("{theirs:?}")));
            continue;
        };
        let mut fields = Vec::new();
        // Without its times a value has no end.
        let read = |text: &str| serde_json::from_str(text).or_else(|_| serde_json::from_str(&format!("{text}}}")));
        if let (Ok(ours), Ok(theirs)) = (read(ours), read(theirs)) {
            fields_that_differ(name, &ours, &theirs, &mut fields);
        }
        if fields.is_empty() {
            let at = ours.bytes().zip(theirs.bytes()).position(|(ours, theirs)| ours != theirs).unwrap_or(0);
            let around = |text: &str| text.chars().skip(text[..floor(text, at)].chars().count().saturating_sub(40)).take(120).collect::<String>();
            fields.push(format!("{name}: ours …{}…, Debezium's …{}…", around(ours), around(theirs)));
        }
        fields.iter().for_each(|it| told += &format!("  {it}\n"));
    }
    told
}

fn floor(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|it| text.is_char_boundary(*it)).unwrap_or(0)
}

fn fields_that_differ(path: &str, ours: &Value, theirs: &Value, found: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            let mut names: Vec<&String> = a.keys().chain(b.keys()).collect();
            names.sort();
            names.dedup();
            for name in names {
                match (a.get(name), b.get(name)) {
                    (Some(ours), Some(theirs)) => fields_that_differ(&format!("{path}.{name}"), ours, theirs, found),
                    (ours, theirs) => found.push(format!("{path}.{name}: ours {}, Debezium's {}", maybe(ours), maybe(theirs))),
                }
            }
        }
        (ours, theirs) if ours != theirs => found.push(format!("{path}: ours {}, Debezium's {}", maybe(Some(ours)), maybe(Some(theirs)))),
        _ => {}
    }
}

fn maybe(value: Option<&Value>) -> String {
    value.map_or_else(|| "absent".to_owned(), |it| short(&it.to_string()))
}

fn short(text: &str) -> String {
    match text.char_indices().nth(600) {
        None => text.to_owned(),
        Some((at, _)) => format!("{}… ({} bytes)", &text[..at], text.len()),
    }
}
