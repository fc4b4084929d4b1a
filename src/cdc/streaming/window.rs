//! The stream's part of an incremental snapshot: between two marks it remembers what changed, at the second it sends the rows that did not.

use std::{
    collections::{HashSet, VecDeque},
    time::Duration,
};

use super::Streaming;
use crate::{
    cdc::{
        copy_text::CopyRow,
        envelope::{INCREMENTAL, Origin},
        error::Error,
        incremental::{Chunk, Line, Mark, Settled, Unseen},
        ledger::Meaning,
        sending::{Flow, Wire, micros},
        stats::Stats,
    },
    change::Lsn,
};

/// How long the rows of a chunk may take from the reader to here once their second mark is met; they are sent right behind it.
const CHUNK_MAX: Duration = Duration::from_secs(10);
/// Keys remembered of one window. Where more change, its chunk is read again.
const CHANGED_MAX: usize = 200_000;
const PASSED_MAX: usize = 16_384;

/// What changed since the first mark.
#[derive(Debug)]
pub(super) struct Window {
    number: u64,
    pub(super) relation: u32,
    changed: HashSet<Vec<u8>>,
    /// TRUNCATE took all rows.
    emptied: bool,
    /// A row changed of which the stream does not tell the key.
    is_blind: bool,
    /// What was committed before it.
    passed: Passed,
}

impl Window {
    pub(super) fn note(&mut self, key: &[u8]) {
        // REPLICA IDENTITY USING INDEX: a deleted row does not say which it was.
        self.is_blind |= key.is_empty();
        if self.changed.len() < CHANGED_MAX && !self.changed.contains(key) {
            self.changed.insert(key.to_vec());
        }
    }

    pub(super) fn empty(&mut self) {
        self.emptied = true;
    }

    fn is_overrun(&self) -> bool {
        self.is_blind || self.changed.len() >= CHANGED_MAX
    }
}

/// The commits passed last, by their xids. Commits that others do not see yet are at most as many as the server has connections.
#[derive(Debug, Default)]
pub(super) struct Passed(VecDeque<u32>);

impl Passed {
    pub(super) fn push(&mut self, xid: u32) {
        if self.0.len() == PASSED_MAX {
            self.0.pop_front();
        }
        self.0.push_back(xid);
    }

    fn has_unseen(&self, unseen: &Unseen) -> bool {
        self.0.iter().any(|xid| unseen.holds(*xid))
    }
}

impl Streaming {
    /// A mark of the reader's. Those of earlier runs mean nothing any more.
    pub(super) async fn mark(&mut self, lsn: Lsn, content: &[u8], stats: &mut Stats) -> Result<Flow, Error> {
        let Some(mark) = Mark::read(content).filter(|it| it.run == self.setup.line.run) else { return Ok(Flow::On) };
        if mark.opens {
            // What was left out for its rows from before is captured from here on: these rows come now.
            self.setup.filter.admit(mark.table);
            self.foreign.remove(&mark.relation);
            self.close_window();
            let passed = std::mem::take(&mut self.passed);
            self.window = Some(Window { number: mark.chunk, relation: mark.relation, changed: HashSet::new(), emptied: false, is_blind: false, passed });
            return Ok(Flow::On);
        }
        if self.window.as_ref().is_none_or(|it| it.number != mark.chunk) {
            return Ok(Flow::On);
        }
        let chunk = tokio::time::timeout(CHUNK_MAX, next_chunk(&mut self.setup.line, mark.chunk)).await.ok().flatten();
        let whole = |window: &Window, chunk: &Chunk| !window.is_overrun() && !window.passed.has_unseen(&chunk.unseen);
        let flow = match self.window.take().zip(chunk) {
            Some((window, chunk)) if whole(&window, &chunk) => {
                let flow = self.send_chunk(lsn, &window, &chunk, stats).await?;
                self.window = Some(window);
                flow
            }
            taken => {
                self.window = taken.map(|it| it.0);
                // The reader may be gone.
                let _ = self.setup.line.settled.send(Settled { number: mark.chunk, acked: false });
                Flow::On
            }
        };
        self.close_window();
        Ok(flow)
    }

    /// The commits from before it are still the last but for those within it.
    fn close_window(&mut self) {
        let Some(window) = self.window.take() else { return };
        let within = std::mem::replace(&mut self.passed, window.passed);
        within.0.into_iter().for_each(|xid| self.passed.push(xid));
    }

    async fn send_chunk(&mut self, lsn: Lsn, window: &Window, chunk: &Chunk, stats: &mut Stats) -> Result<Flow, Error> {
        let now = self.now;
        let previous_commit = self.last_commit.map(|it| it.0);
        let origin = Origin { lsn: lsn.0, at_us: micros(now), xid: None, previous_commit, snapshot: Some(INCREMENTAL), order: None };
        let lines = if window.emptied { &[][..] } else { &chunk.lines[..] };
        let mut row = CopyRow::default();
        let mut rows = 0;
        for line in lines {
            let written = row.read(line).and_then(|()| self.envelope.write_new(&chunk.table, b'r', row.values(), &origin, now));
            let flow = match written {
                Err(poison) => self.set_aside(lsn, "r", line, Some(&chunk.table.id), &poison, stats).await?,
                Ok(()) if window.changed.contains(&self.envelope.key) => Flow::On,
                Ok(()) => {
                    let wire = Wire { producer: &self.producer, stop: &self.stop, receipt: &self.receipt, now, context: self.setup.context.as_ref() };
                    rows += 1;
                    wire.event(&chunk.table, &self.envelope).await?
                }
            };
            if let Flow::Stopped = flow {
                return Ok(Flow::Stopped);
            }
        }
        *self.reread.entry(chunk.table.id.to_string()).or_default() += rows;
        self.seal(Meaning::Chunk(chunk.number));
        Ok(Flow::On)
    }
}

/// The chunk of that number; older ones were given up.
async fn next_chunk(line: &mut Line, number: u64) -> Option<Chunk> {
    loop {
        let chunk = line.chunks.recv().await?;
        if chunk.number == number {
            return Some(chunk);
        }
    }
}
