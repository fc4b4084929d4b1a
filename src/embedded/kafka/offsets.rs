//! Committed offsets of consumer groups: an append-only log of lines, each with its checksum, rewritten when mostly stale.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use super::segment::{replace, wide};

/// Kafka's own figure: offsets of a group that nobody has committed to for a week are forgotten.
const FORGOTTEN_AFTER_MS: i64 = 7 * 24 * 3_600_000;
/// Rewriting pays once most lines are stale, and not before the file has this size.
const COMPACT_FROM_BYTES: u64 = 1 << 20;

/// A position a group has reached.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Position {
    #[serde(rename = "o")]
    pub(super) offset: i64,
    #[serde(rename = "e")]
    pub(super) leader_epoch: i32,
    #[serde(rename = "m", default, skip_serializing_if = "String::is_empty")]
    pub(super) metadata: String,
    #[serde(rename = "t")]
    pub(super) committed_ms: i64,
}

/// One line of the log. No position: forget the topic's partition, or the whole group.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Line {
    #[serde(rename = "g")]
    group: String,
    #[serde(rename = "l", default, skip_serializing_if = "Option::is_none")]
    lane: Option<(String, i32)>,
    #[serde(rename = "p", default, skip_serializing_if = "Option::is_none")]
    position: Option<Position>,
}

/// A group's positions by topic and partition.
pub(super) type Positions = BTreeMap<(String, i32), Position>;

/// Every group's positions, and the file that keeps them.
#[derive(Debug)]
pub(super) struct Offsets {
    path: PathBuf,
    log: File,
    bytes: u64,
    flushed_bytes: u64,
    /// What a fresh file of all that lives would take, roughly: the size after the last rewriting.
    compact_bytes: u64,
    /// A part of a line that could not be written is still at the end.
    torn: bool,
    groups: BTreeMap<String, Positions>,
}

impl Offsets {
    /// Reads the log, cuts a torn tail, rewrites it if that is due.
    pub(super) fn open(dir: &Path, now_ms: i64) -> io::Result<Self> {
        let path = dir.join("offsets.log");
        let mut log = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        let mut text = Vec::new();
        log.read_to_end(&mut text)?;
        let mut groups = BTreeMap::new();
        let mut whole = 0;
        for line in text.split_inclusive(|it| *it == b'\n') {
            let Some(line_read) = decode(line) else { break };
            apply(&mut groups, line_read);
            whole += line.len();
        }
        let bytes = wide(whole);
        if whole < text.len() {
            tracing::warn!(path = %path.display(), cut = text.len() - whole, "cut the torn end of the offsets log");
            log.set_len(bytes)?;
        }
        log.seek(SeekFrom::Start(bytes))?;
        log.sync_data()?;
        let mut offsets = Self { path, log, bytes, flushed_bytes: bytes, compact_bytes: 0, torn: false, groups };
        offsets.upkeep(now_ms)?;
        Ok(offsets)
    }

    pub(super) fn of_group(&self, group: &str) -> Option<&Positions> {
        self.groups.get(group)
    }

    pub(super) fn groups(&self) -> impl Iterator<Item = &String> {
        self.groups.keys()
    }

    /// Remembers positions; durable after the next [`flush`](Self::flush).
    pub(super) fn commit(&mut self, group: &str, positions: &[((String, i32), Position)]) -> io::Result<()> {
        let lines = positions.iter().map(|(lane, position)| Line { group: group.to_owned(), lane: Some(lane.clone()), position: Some(position.clone()) });
        self.write(lines.collect())
    }

    /// Forgets a group.
    pub(super) fn forget_group(&mut self, group: &str) -> io::Result<()> {
        self.write(vec![Line { group: group.to_owned(), lane: None, position: None }])
    }

    /// Forgets every group's position in a topic that is gone.
    pub(super) fn forget_topic(&mut self, topic: &str) -> io::Result<()> {
        let lanes = self.groups.iter().flat_map(|(group, positions)| positions.keys().map(move |lane| (group, lane)));
        let lines = lanes.filter(|(_, lane)| lane.0 == topic).map(|(group, lane)| Line { group: group.clone(), lane: Some(lane.clone()), position: None });
        let lines = lines.collect();
        self.write(lines)
    }

    fn write(&mut self, lines: Vec<Line>) -> io::Result<()> {
        let mut text = Vec::new();
        for line in &lines {
            text.extend(encode(line)?);
        }
        if self.torn {
            self.cut()?;
        }
        if let Err(error) = self.log.write_all(&text) {
            self.torn = true;
            self.cut()?;
            return Err(error);
        }
        self.bytes += wide(text.len());
        lines.into_iter().for_each(|line| apply(&mut self.groups, line));
        Ok(())
    }

    pub(super) fn dirty(&self) -> bool {
        self.bytes != self.flushed_bytes
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.dirty() {
            self.log.sync_data()?;
            self.flushed_bytes = self.bytes;
        }
        Ok(())
    }

    /// Takes back a write that failed half-way.
    fn cut(&mut self) -> io::Result<()> {
        self.log.set_len(self.bytes)?;
        self.log.seek(SeekFrom::Start(self.bytes))?;
        self.torn = false;
        Ok(())
    }

    /// Rewrites the log without what is stale or forgotten, when that pays.
    pub(super) fn upkeep(&mut self, now_ms: i64) -> io::Result<()> {
        if self.bytes < COMPACT_FROM_BYTES.max(2 * self.compact_bytes) {
            return Ok(());
        }
        for positions in self.groups.values_mut() {
            positions.retain(|_, it| now_ms - it.committed_ms < FORGOTTEN_AFTER_MS);
        }
        self.groups.retain(|_, positions| !positions.is_empty());
        let mut text = Vec::new();
        for (group, positions) in &self.groups {
            for (lane, position) in positions {
                text.extend(encode(&Line { group: group.clone(), lane: Some(lane.clone()), position: Some(position.clone()) })?);
            }
        }
        replace(&self.path, &text)?;
        self.log = OpenOptions::new().read(true).write(true).open(&self.path)?;
        self.bytes = self.log.seek(SeekFrom::End(0))?;
        (self.flushed_bytes, self.compact_bytes, self.torn) = (self.bytes, self.bytes, false);
        Ok(())
    }
}

fn apply(groups: &mut BTreeMap<String, Positions>, line: Line) {
    match (line.lane, line.position) {
        (Some(lane), Some(position)) => {
            groups.entry(line.group).or_default().insert(lane, position);
        }
        (Some(lane), None) => {
            let empty = groups.get_mut(&line.group).is_some_and(|it| {
                it.remove(&lane);
                it.is_empty()
            });
            if empty {
                groups.remove(&line.group);
            }
        }
        (None, _) => {
            groups.remove(&line.group);
        }
    }
}

/// Checksum in hex, a space, JSON, a line feed.
fn encode(line: &Line) -> io::Result<Vec<u8>> {
    let json = serde_json::to_string(line).map_err(io::Error::other)?;
    Ok(format!("{:08x} {json}\n", crc32c::crc32c(json.as_bytes())).into_bytes())
}

fn decode(line: &[u8]) -> Option<Line> {
    let text = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (checksum, json) = text.split_once(' ')?;
    (u32::from_str_radix(checksum, 16).ok()? == crc32c::crc32c(json.as_bytes())).then_some(())?;
    serde_json::from_str(json).ok()
}

/// Hands out producer ids that were never handed out before, whatever happens in between.
#[derive(Debug)]
pub(super) struct ProducerIds {
    path: PathBuf,
    next: i64,
    reserved: i64,
}

/// Ids reserved on disk at a time; a crash skips what is left of them.
const RESERVED_AT_ONCE: i64 = 1_000;

impl ProducerIds {
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let path = dir.join("producer-ids");
        let next = match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        Ok(Self { path, next, reserved: next })
    }

    pub(super) fn take(&mut self) -> io::Result<i64> {
        if self.next == self.reserved {
            replace(&self.path, (self.reserved + RESERVED_AT_ONCE).to_string().as_bytes())?;
            self.reserved += RESERVED_AT_ONCE;
        }
        self.next += 1;
        Ok(self.next - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: i64) -> Position {
        Position { offset, leader_epoch: -1, metadata: "note".to_owned(), committed_ms: 0 }
    }

    fn lane(topic: &str, partition: i32) -> (String, i32) {
        (topic.to_owned(), partition)
    }

    #[test]
    fn positions_survive_a_tail_torn_at_any_byte() {
        let dir = tempfile::tempdir().unwrap();
        let mut offsets = Offsets::open(dir.path(), 0).unwrap();
        let mut ends = vec![0];
        for n in 0..4 {
            offsets.commit("g", &[(lane("t", 0), at(n))]).unwrap();
            ends.push(offsets.bytes);
        }
        drop(offsets);
        let path = dir.path().join("offsets.log");
        let whole = fs::read(&path).unwrap();
        for cut in (0..=whole.len()).rev() {
            fs::write(&path, &whole[..cut]).unwrap();
            let mut offsets = Offsets::open(dir.path(), 0).unwrap();
            let survivors = ends.iter().filter(|it| **it <= wide(cut)).count();
            let newest = offsets.of_group("g").and_then(|it| it.get(&lane("t", 0))).map(|it| it.offset);
            assert_eq!(newest, i64::try_from(survivors).unwrap().checked_sub(2).filter(|it| *it >= 0), "cut at {cut}");
            offsets.commit("g", &[(lane("t", 0), at(99))]).unwrap();
            drop(offsets);
            assert_eq!(Offsets::open(dir.path(), 0).unwrap().of_group("g").unwrap()[&lane("t", 0)], at(99));
        }
    }

    #[test]
    fn the_log_stays_small_however_often_groups_commit() {
        let dir = tempfile::tempdir().unwrap();
        let mut offsets = Offsets::open(dir.path(), 0).unwrap();
        for n in 0..50_000 {
            offsets.commit("g", &[(lane("t", 0), at(n))]).unwrap();
            offsets.upkeep(0).unwrap();
        }
        offsets.flush().unwrap();
        assert!(offsets.bytes <= COMPACT_FROM_BYTES + 200, "{}", offsets.bytes);
        drop(offsets);
        assert_eq!(Offsets::open(dir.path(), 0).unwrap().of_group("g").unwrap()[&lane("t", 0)], at(49_999));
    }

    #[test]
    fn groups_and_topics_are_forgotten_for_good() {
        let dir = tempfile::tempdir().unwrap();
        let mut offsets = Offsets::open(dir.path(), 0).unwrap();
        offsets.commit("g", &[(lane("t", 0), at(1)), (lane("u", 0), at(2))]).unwrap();
        offsets.commit("h", &[(lane("t", 0), at(3))]).unwrap();
        offsets.forget_topic("t").unwrap();
        assert_eq!(offsets.groups().collect::<Vec<_>>(), ["g"]);
        offsets.forget_group("g").unwrap();
        drop(offsets);
        assert_eq!(Offsets::open(dir.path(), 0).unwrap().groups().count(), 0);
    }

    #[test]
    fn no_producer_id_is_given_twice_however_often_the_broker_starts() {
        let dir = tempfile::tempdir().unwrap();
        let mut given = std::collections::BTreeSet::new();
        for _ in 0..3 {
            let mut ids = ProducerIds::open(dir.path()).unwrap();
            for _ in 0..1_500 {
                assert!(given.insert(ids.take().unwrap()));
            }
        }
    }
}
