//! Heartbeats, and the positions they carry.
//!
//! Every position is written here, as a header of Debezium's heartbeat record, before the slot is told of it. So after a
//! restart we know three things the slot does not: whether somebody else moved it, whether the server is still the one we
//! captured (and not a backup of it), and which commit came before it (the first half of `source.sequence`, which a repeated
//! event must have again).

use std::time::SystemTime;

use super::{envelope::since_1970, json};
use crate::change::Lsn;

/// The header that holds a [`Position`].
pub(super) const HEADER: &str = "ledgerline.position";

/// A server and one of its histories: a backup that is brought back, and a standby that takes over, begin a new timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Server {
    pub(super) system_id: u64,
    pub(super) timeline: u32,
}

/// A position the slot was, or is about to be, told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    /// Where the snapshot of this slot was taken: positions of another life of the slot do not count.
    pub(super) snapshot: Lsn,
    pub(super) confirmed: Lsn,
    pub(super) last_commit: Option<Lsn>,
    /// None: written by a version that did not say.
    pub(super) server: Option<Server>,
}

impl Position {
    pub(super) fn to_header(self) -> Vec<u8> {
        let last_commit = self.last_commit.map(|it| it.to_string()).unwrap_or_default();
        let server = self.server.map(|it| format!(";{};{}", it.system_id, it.timeline)).unwrap_or_default();
        format!("{};{};{last_commit}{server}", self.snapshot, self.confirmed).into_bytes()
    }

    pub(super) fn from_header(header: &[u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(header).ok()?.split(';');
        let (snapshot, confirmed, last_commit) = (parts.next()?, parts.next()?, parts.next()?);
        let last_commit = if last_commit.is_empty() { None } else { Some(last_commit.parse().ok()?) };
        let server = match (parts.next(), parts.next()) {
            (Some(system_id), Some(timeline)) => Some(Server { system_id: system_id.parse().ok()?, timeline: timeline.parse().ok()? }),
            _ => None,
        };
        Some(Self { snapshot: snapshot.parse().ok()?, confirmed: confirmed.parse().ok()?, last_commit, server })
    }
}

/// What the heartbeat topic tells about a slot that stands at `confirmed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    /// The slot stands where we left it.
    Known { last_commit: Option<Lsn> },
    /// The slot is further than we ever were.
    Moved { furthest: Lsn },
    /// The history we captured ended on this server before we did: what came after it is another.
    Restored { furthest: Lsn, end: Lsn },
    /// The positions are of another server.
    Elsewhere { before: u64 },
    /// The topic holds nothing of this slot (its records expired), so nothing can be said.
    Blank,
}

/// The server that was captured last, as far as the positions tell.
pub(super) fn last_server(positions: &[Position], snapshot: Lsn) -> Option<Server> {
    positions.iter().filter(|it| it.snapshot == snapshot).max_by_key(|it| it.confirmed)?.server
}

/// Where a history (the text of PostgreSQL's history file) left a timeline; None where that is no part of it.
pub(super) fn left_at(history: &str, timeline: u32) -> Option<Lsn> {
    history.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let found: u32 = words.next()?.parse().ok()?;
        words.next()?.parse().ok().filter(|_| found == timeline)
    })
}

/// Compares the slot with the positions written before. `snapshot` is where the slot began, `end` how far the history in which
/// they were written reaches on this server.
pub(super) fn recall(positions: &[Position], snapshot: Lsn, confirmed: Lsn, server: Server, end: Lsn) -> Memory {
    let ours: Vec<Position> = positions.iter().filter(|it| it.snapshot == snapshot).copied().collect();
    if let Some(before) = ours.iter().filter_map(|it| it.server).map(|it| it.system_id).find(|it| *it != server.system_id) {
        return Memory::Elsewhere { before };
    }
    let Some(furthest) = ours.iter().map(|it| it.confirmed).max() else {
        return if confirmed <= snapshot { Memory::Known { last_commit: None } } else { Memory::Blank };
    };
    if furthest > end {
        return Memory::Restored { furthest, end };
    }
    if confirmed > furthest.max(snapshot) {
        return Memory::Moved { furthest };
    }
    // The server may have forgotten the last positions it was told (it writes them down at checkpoints).
    let last_commit = ours.iter().filter(|it| it.confirmed <= confirmed).max_by_key(|it| it.confirmed).and_then(|it| it.last_commit);
    Memory::Known { last_commit }
}

/// `{"serverName":"bank"}`.
pub(super) fn key(topic_prefix: &str) -> Vec<u8> {
    let mut key = b"{\"serverName\":".to_vec();
    json::string(&mut key, topic_prefix);
    key.push(b'}');
    key
}

/// `{"ts_ms":1795332312533}`.
pub(super) fn value(now: SystemTime) -> Vec<u8> {
    format!("{{\"ts_ms\":{}}}", since_1970(now).as_millis()).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SNAPSHOT: Lsn = Lsn(100);

    const SERVER: Server = Server { system_id: 7_575_000_000_000_000_001, timeline: 1 };
    const FAR: Lsn = Lsn(10_000);

    fn position(confirmed: u64, last_commit: u64) -> Position {
        Position { snapshot: SNAPSHOT, confirmed: Lsn(confirmed), last_commit: Some(Lsn(last_commit)), server: Some(SERVER) }
    }

    fn recalled(positions: &[Position], confirmed: u64) -> Memory {
        recall(positions, SNAPSHOT, Lsn(confirmed), SERVER, FAR)
    }

    #[test]
    fn a_header_reads_as_it_was_written() {
        for it in [position(7 << 40, 3), Position { last_commit: None, ..position(5, 0) }, Position { server: None, ..position(5, 3) }] {
            assert_eq!(Position::from_header(&it.to_header()), Some(it));
        }
        assert_eq!(Position::from_header(b"0/1;0/2"), None);
    }

    #[test]
    fn a_slot_is_known_where_we_left_it_and_where_the_server_fell_back_to() {
        let written = [position(110, 110), position(140, 130), position(150, 130)];
        let last_commit = |lsn| Memory::Known { last_commit: Some(Lsn(lsn)) };
        assert_eq!(recalled(&written, 150), last_commit(130));
        assert_eq!(recalled(&written, 110), last_commit(110));
        assert_eq!(recalled(&written, 100), Memory::Known { last_commit: None });
    }

    #[test]
    fn a_slot_that_is_further_than_we_were_was_moved_by_somebody_else() {
        assert_eq!(recalled(&[position(110, 110)], 111), Memory::Moved { furthest: Lsn(110) });
        let other_life = Position { snapshot: Lsn(7), ..position(900, 900) };
        assert_eq!(recalled(&[other_life], 111), Memory::Blank);
    }

    #[test]
    fn a_server_that_knows_less_than_we_do_or_is_another_is_recognised() {
        let written = [position(110, 110), position(150, 130)];
        assert_eq!(recall(&written, SNAPSHOT, Lsn(110), SERVER, Lsn(149)), Memory::Restored { furthest: Lsn(150), end: Lsn(149) });
        let heir = Server { timeline: 2, ..SERVER };
        assert_eq!(recall(&written, SNAPSHOT, Lsn(150), heir, Lsn(150)), Memory::Known { last_commit: Some(Lsn(130)) });
        let other = Server { system_id: 1, ..SERVER };
        assert_eq!(recall(&written, SNAPSHOT, Lsn(110), other, FAR), Memory::Elsewhere { before: SERVER.system_id });
        let unsaid = written.map(|it| Position { server: None, ..it });
        assert_eq!(recall(&unsaid, SNAPSHOT, Lsn(110), other, FAR), Memory::Known { last_commit: Some(Lsn(110)) });
        assert_eq!((last_server(&written, SNAPSHOT), last_server(&unsaid, SNAPSHOT)), (Some(SERVER), None));
    }

    #[test]
    fn a_history_tells_where_it_left_each_timeline() {
        let history = "1\t0/3000148\tno recovery target specified\n\n2\t0/50000A0\tbefore 2026-11-01 00:00:00+00\n";
        assert_eq!([1, 2, 3].map(|it| left_at(history, it)), [Some(Lsn(0x300_0148)), Some(Lsn(0x500_00A0)), None]);
    }

    #[test]
    fn key_and_value_are_debeziums() {
        assert_eq!(key("bank"), b"{\"serverName\":\"bank\"}");
        assert_eq!(value(SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(1_795_332_312_533)), b"{\"ts_ms\":1795332312533}");
    }
}
