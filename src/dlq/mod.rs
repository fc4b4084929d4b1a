//! The dead-letter topic, as an operator reads it, and the way back of a record that lies there.
//!
//! `<prefix>.dead_letters` holds letters of two writers. The **capture** writes a row that could not become an event: JSON
//! with the reason, where it stood in the WAL, and the bytes PostgreSQL sent. The **sink** writes a record that is no text: its
//! own key and value, with reason, topic, partition, offset and time as headers. Reading is bounded: up to the end the topic
//! had when the reading began, a fixed number of offsets back, a fixed number of letters in memory.
//!
//! **What a replay does to exactness.** It appends the original record to its own lane, with a header that names the letter.
//! - A record is replayed only when the sink takes it today, judged by the sink's own rule. One that it still would not take
//!   would become a second letter of the same record, and the cut counts letters as rows that will never come: with one
//!   letter too many a row that is really missing could be written off. So it stays where it is, unless forced.
//! - What is taken is a repeat like any other: staging keeps one row per (txId, lsn, key, op), whether the first copy, the
//!   replay, or a second replay brought it. Nothing is doubled.
//! - Nothing is waited for: the first letter counted as arrived, so the cut may long have passed the record's commit. Then the
//!   record lands in the lake and in `raw`, and the models, which do not look behind the cut, take it at their next full refresh.
//! - Letters stay: the topic is a log, and its retention forgets them. Whoever replays twice repeats, and harms nothing.
//!
//! A letter of the capture cannot be replayed: there is no envelope, and never was. Its END owes nothing for it, so nobody
//! waits either; a later change of the same row carries the whole row again.

mod letter;
mod read;
mod replay;

pub use self::{
    letter::{Filter, Letter, Origin, Shown},
    read::{Listing, ReasonCount, find, list},
    replay::{HEADER, Outcome, Replay, Report, Which, replay},
};

use crate::{
    fault::{Diagnose, Fault},
    stream::{producer, topics},
};

/// What keeps an operator from reading or replaying.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Topics(#[from] topics::Error),
    #[error(transparent)]
    Producer(#[from] producer::Error),
    #[error("there is no letter at offset {offset} of {topic}[{partition}]")]
    NoLetter { topic: String, partition: i32, offset: i64 },
    #[error("the broker at {bootstrap_servers} did not acknowledge the replayed records in time")]
    Unacknowledged { bootstrap_servers: String },
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::Topics(error) => error.fault(),
            Self::Producer(error) => error.fault(),
            Self::NoLetter { .. } => Fault::Operator("`ledgerline dlq list` names them with their offsets".to_owned()),
            Self::Unacknowledged { .. } => Fault::Operator("some may have arrived: replaying again is harmless, a repeat is taken once".to_owned()),
        }
    }
}
