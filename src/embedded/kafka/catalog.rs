//! Which topics there are, how many partitions they have and what was configured: one small file, replaced as a whole.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use kafka_protocol::ResponseError;

use super::{partition::Limits, segment::replace};

/// Kafka's limit on the length of a topic's name.
const NAME_MAX: usize = 249;
/// Partitions of one topic; each costs two open files.
const PARTITIONS_MAX: i32 = 1_000;

/// A topic as the catalogue keeps it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Entry {
    /// Names the topic's directory. A topic deleted and created again gets another, so that nothing of the old one comes back.
    pub(super) incarnation: u64,
    pub(super) partitions: i32,
    /// As the client gave it: `retention.ms` = `604800000`.
    #[serde(default)]
    pub(super) configs: BTreeMap<String, String>,
}

/// All topics by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Catalog {
    pub(super) cluster_id: String,
    next_incarnation: u64,
    pub(super) topics: BTreeMap<String, Entry>,
}

impl Catalog {
    /// Reads the catalogue, or begins one named `cluster_id`.
    pub(super) fn open(dir: &Path, cluster_id: String) -> io::Result<Self> {
        match fs::read(file(dir)) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let fresh = Self { cluster_id, next_incarnation: 1, topics: BTreeMap::new() };
                fresh.save(dir)?;
                Ok(fresh)
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn save(&self, dir: &Path) -> io::Result<()> {
        replace(&file(dir), &serde_json::to_vec_pretty(self).map_err(io::Error::other)?)
    }

    pub(super) fn next_incarnation(&mut self) -> u64 {
        self.next_incarnation += 1;
        self.next_incarnation - 1
    }
}

fn file(dir: &Path) -> PathBuf {
    dir.join("topics.json")
}

/// Where a topic's partitions lie.
pub(super) fn topic_dir(dir: &Path, name: &str, incarnation: u64) -> PathBuf {
    dir.join("logs").join(format!("{incarnation}-{name}"))
}

/// Whether this may be a topic's name, by Kafka's rule.
pub(super) fn check_name(name: &str) -> Result<(), ResponseError> {
    let legal = |it: char| it.is_ascii_alphanumeric() || matches!(it, '.' | '_' | '-');
    let right = !name.is_empty() && name.len() <= NAME_MAX && name != "." && name != ".." && name.chars().all(legal);
    if right { Ok(()) } else { Err(ResponseError::InvalidTopicException) }
}

pub(super) fn check_partitions(count: i32) -> Result<(), ResponseError> {
    if (1..=PARTITIONS_MAX).contains(&count) { Ok(()) } else { Err(ResponseError::InvalidPartitions) }
}

/// What a topic's configs mean here, over the broker's own limits.
///
/// A compacted topic is kept whole: its newest value per key is what its reader relies on, and we do not compact.
pub(super) fn limits(configs: &BTreeMap<String, String>, broker: &Limits) -> Result<Limits, ResponseError> {
    let mut limits = *broker;
    for (name, value) in configs {
        check_config(name, value)?;
        let number = || value.trim().parse::<i64>().map_err(|_| ResponseError::InvalidConfig);
        match name.as_str() {
            "segment.bytes" => limits.segment_bytes = number()?.cast_unsigned(),
            "retention.bytes" => limits.retention_bytes = u64::try_from(number()?).ok(),
            "retention.ms" => limits.retention_ms = Some(number()?).filter(|it| *it >= 0),
            _ => {}
        }
    }
    if configs.get("cleanup.policy").is_some_and(|it| it.contains("compact")) {
        (limits.retention_bytes, limits.retention_ms) = (None, None);
    }
    Ok(limits)
}

/// Configs that Kafka knows and that change nothing here: accepted, kept and shown.
const WITHOUT_EFFECT: [&str; 16] = [
    "delete.retention.ms",
    "file.delete.delay.ms",
    "flush.messages",
    "flush.ms",
    "index.interval.bytes",
    "max.compaction.lag.ms",
    "max.message.bytes",
    "message.timestamp.after.max.ms",
    "message.timestamp.before.max.ms",
    "min.cleanable.dirty.ratio",
    "min.compaction.lag.ms",
    "min.insync.replicas",
    "preallocate",
    "segment.index.bytes",
    "segment.jitter.ms",
    "segment.ms",
];

fn check_config(name: &str, value: &str) -> Result<(), ResponseError> {
    let number_from = |least: i64| value.trim().parse::<i64>().is_ok_and(|it| it >= least);
    let right = match name {
        "cleanup.policy" => value.split(',').all(|it| matches!(it.trim(), "delete" | "compact")),
        // Batches are stored as they come: neither recompressed nor stamped.
        "compression.type" => value == "producer",
        "message.timestamp.type" => value == "CreateTime",
        "unclean.leader.election.enable" => value == "true" || value == "false",
        "retention.bytes" | "retention.ms" => number_from(-1),
        "segment.bytes" => number_from(1_024),
        other => WITHOUT_EFFECT.contains(&other),
    };
    if right { Ok(()) } else { Err(ResponseError::InvalidConfig) }
}

/// A topic's settings as a client sees them: name, value, whether it was set on the topic.
pub(super) fn described(configs: &BTreeMap<String, String>, limits: &Limits, batch_bytes_max: usize) -> Vec<(String, String, bool)> {
    let or_unlimited = |it: Option<String>| it.unwrap_or_else(|| "-1".to_owned());
    let ours = [
        ("cleanup.policy", "delete".to_owned()),
        ("compression.type", "producer".to_owned()),
        ("max.message.bytes", batch_bytes_max.to_string()),
        ("message.timestamp.type", "CreateTime".to_owned()),
        ("min.insync.replicas", "1".to_owned()),
        ("retention.bytes", or_unlimited(limits.retention_bytes.map(|it| it.to_string()))),
        ("retention.ms", or_unlimited(limits.retention_ms.map(|it| it.to_string()))),
        ("segment.bytes", limits.segment_bytes.to_string()),
    ];
    let mut all: BTreeMap<String, (String, bool)> = ours.into_iter().map(|(name, value)| (name.to_owned(), (value, false))).collect();
    all.extend(configs.iter().map(|(name, value)| (name.clone(), (value.clone(), true))));
    all.into_iter().map(|(name, (value, set))| (name, value, set)).collect()
}
