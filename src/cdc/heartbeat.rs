//! Heartbeats, and the positions they carry.
//!
//! Every position is written here, as a header of Debezium's heartbeat record, before the slot is told of it. So after a
//! restart we know two things the slot does not: whether somebody else moved it, and which commit came before it (the
//! first half of `source.sequence`, which a repeated event must have again).

use std::time::SystemTime;

use super::{envelope::since_1970, json};
use crate::change::Lsn;

/// The header that holds a [`Position`].
pub(super) const HEADER: &str = "ledgerline.position";

/// A position the slot was, or is about to be, told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    /// Where the snapshot of this slot was taken: positions of another life of the slot do not count.
    pub(super) snapshot: Lsn,
    pub(super) confirmed: Lsn,
    pub(super) last_commit: Option<Lsn>,
}

impl Position {
    pub(super) fn to_header(self) -> Vec<u8> {
        let last_commit = self.last_commit.map(|it| it.to_string()).unwrap_or_default();
        format!("{};{};{last_commit}", self.snapshot, self.confirmed).into_bytes()
    }

    pub(super) fn from_header(header: &[u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(header).ok()?.split(';');
        let (snapshot, confirmed, last_commit) = (parts.next()?, parts.next()?, parts.next()?);
        let last_commit = if last_commit.is_empty() { None } else { Some(last_commit.parse().ok()?) };
        Some(Self { snapshot: snapshot.parse().ok()?, confirmed: confirmed.parse().ok()?, last_commit })
    }
}

/// What the heartbeat topic tells about a slot that stands at `confirmed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    /// The slot stands where we left it.
    Known { last_commit: Option<Lsn> },
    /// The slot is further than we ever were.
    Moved { furthest: Lsn },
    /// The topic holds nothing of this slot (its records expired), so nothing can be said.
    Blank,
}

/// Compares the slot with the positions written before. `snapshot` is where the slot began.
pub(super) fn recall(positions: impl Iterator<Item = Position>, snapshot: Lsn, confirmed: Lsn) -> Memory {
    let ours: Vec<Position> = positions.filter(|it| it.snapshot == snapshot).collect();
    let Some(furthest) = ours.iter().map(|it| it.confirmed).max() else {
        return if confirmed <= snapshot { Memory::Known { last_commit: None } } else { Memory::Blank };
    };
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

    fn position(confirmed: u64, last_commit: u64) -> Position {
        Position { snapshot: SNAPSHOT, confirmed: Lsn(confirmed), last_commit: Some(Lsn(last_commit)) }
    }

    #[test]
    fn a_header_reads_as_it_was_written() {
        for it in [position(7 << 40, 3), Position { last_commit: None, ..position(5, 0) }] {
            assert_eq!(Position::from_header(&it.to_header()), Some(it));
        }
        assert_eq!(Position::from_header(b"0/1;0/2"), None);
    }

    #[test]
    fn a_slot_is_known_where_we_left_it_and_where_the_server_fell_back_to() {
        let written = [position(110, 110), position(140, 130), position(150, 130)];
        let last_commit = |lsn| Memory::Known { last_commit: Some(Lsn(lsn)) };
        assert_eq!(recall(written.into_iter(), SNAPSHOT, Lsn(150)), last_commit(130));
        assert_eq!(recall(written.into_iter(), SNAPSHOT, Lsn(110)), last_commit(110));
        assert_eq!(recall(written.into_iter(), SNAPSHOT, SNAPSHOT), Memory::Known { last_commit: None });
    }

    #[test]
    fn a_slot_that_is_further_than_we_were_was_moved_by_somebody_else() {
        assert_eq!(recall([position(110, 110)].into_iter(), SNAPSHOT, Lsn(111)), Memory::Moved { furthest: Lsn(110) });
        let other_life = Position { snapshot: Lsn(7), ..position(900, 900) };
        assert_eq!(recall([other_life].into_iter(), SNAPSHOT, Lsn(111)), Memory::Blank);
    }

    #[test]
    fn key_and_value_are_debeziums() {
        assert_eq!(key("bank"), b"{\"serverName\":\"bank\"}");
        assert_eq!(value(SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(1_795_332_312_533)), b"{\"ts_ms\":1795332312533}");
    }
}
