//! Whether the server behind the address is the one that was captured, or its heir: asked of the positions in the heartbeat topic,
//! as neither slot nor state database can tell. A standby takes over under the same address, and a backup comes back there.

use super::{
    error::Error,
    heartbeat::{self, Memory, Position},
    slot::{self, Replication},
};
use crate::{
    change::{Lsn, Topics},
    stream::topics,
};

/// Heartbeats that are searched for the slot's position.
const POSITIONS_READ: i64 = 2000;

/// The positions that were written down, and where the slot they belong to began.
pub(super) struct History {
    positions: Vec<Position>,
    snapshot: Lsn,
}

impl History {
    pub(super) async fn read(asking: &topics::Topics, topics: &Topics, snapshot: Lsn) -> Result<Self, Error> {
        let headers = asking.last_headers(&topics.heartbeat(), 0, heartbeat::HEADER, POSITIONS_READ).await?;
        Ok(Self { positions: headers.iter().filter_map(|it| Position::from_header(it)).collect(), snapshot })
    }

    /// Whether the slot stands where we left it, on the server we left it on or one that took over with everything we had; the
    /// commit before its position.
    pub(super) async fn recall(&self, client: &mut Replication, slot: &str, confirmed: Lsn) -> Result<Option<Lsn>, Error> {
        let server = client.server;
        let before = heartbeat::last_server(&self.positions, self.snapshot).filter(|it| it.timeline != server.timeline);
        let end = match before {
            None => client.wal_end,
            Some(before) if before.system_id != server.system_id => return Err(Error::OtherServer { expected: before.system_id, found: server.system_id }),
            Some(before) => {
                let left_at = slot::left_at(client, before.timeline).await?;
                left_at.ok_or(Error::OtherTimeline { before: before.timeline, now: server.timeline })?
            }
        };
        match heartbeat::recall(&self.positions, self.snapshot, confirmed, server, end) {
            Memory::Known { last_commit } => Ok(last_commit),
            Memory::Restored { furthest, end } => Err(match before {
                None => Error::Restored { expected: furthest, found: end },
                Some(before) => Error::LateHeir { before: before.timeline, expected: furthest, found: end },
            }),
            Memory::Elsewhere { before } => Err(Error::OtherServer { expected: before, found: server.system_id }),
            Memory::Moved { furthest } => Err(Error::SlotMoved { slot: slot.to_owned(), expected: furthest, found: confirmed }),
            Memory::Blank => {
                tracing::warn!(%confirmed, "the heartbeat topic has forgotten the slot's position, so nobody can say whether it was moved");
                Ok(None)
            }
        }
    }

    /// A slot that is missing was dropped, or this is another server than the one that had it.
    pub(super) fn why_missing(&self, client: &Replication, slot: &str) -> Error {
        let (slot, now) = (slot.to_owned(), client.server);
        match heartbeat::last_server(&self.positions, self.snapshot) {
            Some(before) if before.system_id != now.system_id => Error::OtherServer { expected: before.system_id, found: now.system_id },
            Some(before) if before.timeline != now.timeline => Error::SlotLeftBehind { slot, before: before.timeline, now: now.timeline },
            _ => Error::SlotMissing { slot },
        }
    }
}
