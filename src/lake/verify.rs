//! The proof of the lake: walks every lane's chain and every data object, and reports all that is wrong.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
};

use futures_util::{StreamExt as _, stream};
use sha2::{Digest as _, Sha256};

use super::{
    encode::{Decoded, origins, rows},
    error::Error,
    list::read,
    log::{self, CommitRecord, READ_AHEAD, Stored},
    object::{DATA_PREFIX, DataKey, LogKey, date_of},
    store::Store,
};
use crate::{change::Topics, fault::chain, stream::Lane};

/// What `lake verify` does beyond walking the chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Read every data object: hash, rows, offsets. Without it only the chains and the existence of objects are proven.
    pub read_objects: bool,
    /// Delete orphans: data objects without a commit record whose offsets are all behind their lane's tail.
    pub sweep: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { read_objects: true, sweep: false }
    }
}

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// Key of the commit record or data object.
    pub key: String,
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.key, self.what)
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct LaneProof {
    pub topic: String,
    pub partition: i32,
    pub objects: u64,
    pub rows: u64,
    pub bytes: u64,
    pub first_offset: Option<i64>,
    pub last_offset: Option<i64>,
    /// Offsets without a record: holes of the log itself. Where the objects were not read, dead letters are among them.
    pub holes: u64,
    /// Offsets whose record is in the dead-letter topic, as the objects say.
    pub dead_letters: u64,
}

/// Everything that was walked. The lake is proven where `findings` is empty; orphans are harmless.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Proof {
    pub lanes: Vec<LaneProof>,
    pub findings: Vec<Finding>,
    /// Data objects of a crash or a lost race: no commit record names them, and none ever will.
    pub orphans: Vec<String>,
    pub swept: u64,
    /// Data objects ahead of their lane's tail: their commit record may be under way.
    pub pending: u64,
}

impl Proof {
    pub fn ok(&self) -> bool {
        self.findings.is_empty()
    }

    fn finds(&mut self, key: impl Into<String>, what: impl Into<String>) {
        self.findings.push(Finding { key: key.into(), what: what.into() });
    }
}

/// Data objects read at once; each is a few megabytes.
const OBJECTS_AT_ONCE: usize = 4;

/// Walks the lake. Fails only where the store does; whatever is wrong with the data is a finding, and all are found.
/// Memory grows by 16 bytes per object.
pub async fn verify(store: &Store, topics: &Topics, options: Options) -> Result<Proof, Error> {
    let mut proof = Proof::default();
    let mut walk = Walk { store, topics, options, named: HashSet::new(), tails: BTreeMap::new() };
    for lane in log::lanes(store).await? {
        if topics.lake_name(&lane.topic).is_some() {
            walk.lane(&lane, &mut proof).await?;
        }
    }
    walk.orphans(&mut proof).await?;
    Ok(proof)
}

struct Walk<'a> {
    store: &'a Store,
    topics: &'a Topics,
    options: Options,
    /// Hashes of the keys that some commit record names.
    named: HashSet<u128>,
    /// Last offset of each chain, by table and partition.
    tails: BTreeMap<(String, i32), i64>,
}

/// What the chain says about the record that comes next.
enum Tail {
    /// It is the first one.
    Beginning,
    Known {
        next_offset: i64,
        sha256: String,
    },
    /// The one before it cannot be read, which is a finding already.
    Unreadable,
}

impl Walk<'_> {
    async fn lane(&mut self, lane: &Lane, proof: &mut Proof) -> Result<(), Error> {
        let mut lane_proof = LaneProof { topic: lane.topic.to_string(), partition: lane.partition, ..LaneProof::default() };
        let (mut tail, mut from_offset) = (Tail::Beginning, 0);
        loop {
            let keys = log::keys_from(self.store, &lane.topic, lane.partition, from_offset, 1_000).await?;
            let mut fetched = stream::iter(&keys).map(|it| async { (it.key.as_str(), log::fetch(self.store, &it.key).await) }).buffered(READ_AHEAD);
            let mut records = Vec::new();
            while let Some((key, stored)) = fetched.next().await {
                let stored = match stored {
                    Ok(stored) => stored,
                    Err(error @ (Error::StoreAway { .. } | Error::StoreRefuses { .. } | Error::BucketGone { .. })) => return Err(error),
                    Err(error) => {
                        proof.finds(key, chain(&error));
                        tail = Tail::Unreadable;
                        continue;
                    }
                };
                check_link(key, lane, &stored, &mut tail, proof);
                lane_proof.count(&stored.record);
                self.check_name(key, lane, &stored.record, proof);
                records.push(stored.record);
            }
            drop(fetched);
            let dead_letters = self.check_objects(&records, proof).await?;
            lane_proof.dead_letters += dead_letters;
            lane_proof.holes = lane_proof.holes.saturating_sub(dead_letters);
            match keys.last().map(|it| it.key.parse::<LogKey>()) {
                Some(Ok(last)) if keys.len() >= 1_000 => from_offset = last.first_offset + 1,
                Some(Err(foreign)) => {
                    proof.finds(foreign.0.clone(), foreign.to_string());
                    break;
                }
                _ => break,
            }
        }
        if let (Some(table), Some(last_offset)) = (self.topics.lake_name(&lane.topic), lane_proof.last_offset) {
            self.tails.insert((table, lane.partition), last_offset);
        }
        proof.lanes.push(lane_proof);
        Ok(())
    }

    /// The data object's name says what the commit record says.
    fn check_name(&mut self, key: &str, lane: &Lane, record: &CommitRecord, proof: &mut Proof) {
        self.named.insert(digest(&record.data));
        let expected = DataKey {
            table: self.topics.lake_name(&lane.topic).unwrap_or_default(),
            date: date_of(record.timestamp_min),
            partition: record.partition,
            first_offset: record.first_offset,
            last_offset: record.last_offset,
            hash: DataKey::hash_of(&record.sha256),
        };
        if expected.to_string() != record.data {
            proof.finds(key, format!("it names {}, not {expected}", record.data));
        }
        if date_of(record.timestamp_max) != expected.date {
            proof.finds(key, "its timestamps are of several days".to_owned());
        }
    }

    /// Reads the objects, if that was asked for; the number of dead letters they name.
    async fn check_objects(&self, records: &[CommitRecord], proof: &mut Proof) -> Result<u64, Error> {
        let mut dead_letters = 0;
        if !self.options.read_objects {
            return Ok(dead_letters);
        }
        let mut checked = stream::iter(records).map(|it| async move { (it, check_object(self.store, it).await) }).buffered(OBJECTS_AT_ONCE);
        while let Some((record, checked)) = checked.next().await {
            match checked {
                Ok(Inside { wrong, dead }) => {
                    dead_letters += dead;
                    wrong.into_iter().for_each(|what| proof.finds(&record.data, what));
                }
                Err(Error::Missing(_)) => proof.finds(&record.data, format!("it is missing, though {} names it", record.key())),
                Err(Error::Damaged { key, what }) => proof.finds(key, what),
                Err(error) => return Err(error),
            }
        }
        Ok(dead_letters)
    }

    /// Looks at every data object once: named by a commit record, an orphan behind the tail, or ahead of it.
    async fn orphans(&self, proof: &mut Proof) -> Result<(), Error> {
        let mut start_after = None::<String>;
        let mut seen = 0;
        loop {
            let page = self.store.list(DATA_PREFIX, start_after.as_deref(), usize::MAX).await?;
            for object in &page.objects {
                if self.named.contains(&digest(&object.key)) {
                    seen += 1;
                    continue;
                }
                match object.key.parse::<DataKey>() {
                    Err(foreign) => proof.finds(&object.key, foreign.to_string()),
                    Ok(key) => match self.tails.get(&(key.table, key.partition)) {
                        Some(last_offset) if *last_offset >= key.first_offset => proof.orphans.push(object.key.clone()),
                        _ => proof.pending += 1,
                    },
                }
            }
            match page.objects.last() {
                Some(last) if page.truncated => start_after = Some(last.key.clone()),
                _ => break,
            }
        }
        if !self.options.read_objects && seen < self.named.len() {
            proof.finds(DATA_PREFIX, format!("{} objects are missing that commit records name; read the objects to learn which", self.named.len() - seen));
        }
        if self.options.sweep {
            for orphan in &proof.orphans {
                self.store.delete(orphan).await?;
                proof.swept += 1;
            }
        }
        Ok(())
    }
}

impl LaneProof {
    fn count(&mut self, record: &CommitRecord) {
        self.objects += 1;
        self.rows += record.rows;
        self.bytes += record.bytes;
        self.holes += record.holes();
        self.first_offset.get_or_insert(record.first_offset);
        self.last_offset = Some(record.last_offset);
    }
}

/// Whether a commit record continues the one before it.
fn check_link(key: &str, lane: &Lane, Stored { record, sha256 }: &Stored, tail: &mut Tail, proof: &mut Proof) {
    if record.schema != log::SCHEMA {
        proof.finds(key, format!("its schema is {}, not {}", record.schema, log::SCHEMA));
    }
    if record.key() != key || *record.topic != *lane.topic {
        proof.finds(key, format!("its content belongs to {}", record.key()));
    }
    let range = record.last_offset - record.first_offset + 1;
    if range < 1 || i64::try_from(record.rows).is_ok_and(|it| it > range) {
        proof.finds(key, format!("{} rows do not fit the offsets {} to {}", record.rows, record.first_offset, record.last_offset));
    }
    match tail {
        Tail::Known { next_offset, .. } if record.first_offset > *next_offset => {
            proof.finds(key, format!("gap: the offsets {next_offset} to {} have no commit record", record.first_offset - 1));
        }
        Tail::Known { next_offset, .. } if record.first_offset < *next_offset => {
            proof.finds(key, format!("overlap: the offsets {} to {} are in the record before it too", record.first_offset, *next_offset - 1));
        }
        Tail::Known { sha256, .. } if record.previous.as_ref() != Some(sha256) => {
            proof.finds(key, "previous is not the hash of the commit record before it");
        }
        Tail::Beginning if record.previous.is_some() => proof.finds(key, "the chain does not begin here: the commit records before it are missing"),
        Tail::Known { .. } | Tail::Beginning | Tail::Unreadable => {}
    }
    *tail = Tail::Known { next_offset: record.last_offset + 1, sha256: sha256.clone() };
}

/// What was found inside a data object whose hash is right.
struct Inside {
    wrong: Vec<String>,
    dead: u64,
}

async fn check_object(store: &Store, record: &CommitRecord) -> Result<Inside, Error> {
    let Decoded { batches, dead } = read(store, record).await?;
    let record = record.clone();
    let checked = tokio::task::spawn_blocking(move || {
        let mut wrong = Vec::new();
        let mut next_offset = record.first_offset;
        for row in batches.iter().flat_map(rows) {
            if row.offset < next_offset || row.offset > record.last_offset {
                wrong.push(format!("offset {} comes where {next_offset} to {} are expected", row.offset, record.last_offset));
                break;
            }
            next_offset = row.offset + 1;
        }
        if batches.iter().flat_map(rows).any(|it| !(record.timestamp_min..=record.timestamp_max).contains(&it.timestamp_ms)) {
            wrong.push("a timestamp is outside the range of its commit record".to_owned());
        }
        if batches.iter().flat_map(origins).any(|it| it != (record.topic.as_str(), record.partition)) {
            wrong.push("it holds rows of another lane".to_owned());
        }
        if dead.len() as u64 > record.holes() || dead.iter().any(|it| !(record.first_offset..=record.last_offset).contains(&it.offset)) {
            wrong.push("its footer names dead letters that are not of its range".to_owned());
        }
        Inside { wrong, dead: dead.len() as u64 }
    });
    Ok(checked.await?)
}

fn digest(key: &str) -> u128 {
    let hash = Sha256::digest(key.as_bytes());
    u128::from_be_bytes(hash[..16].try_into().expect("SHA-256 has 32 bytes"))
}
