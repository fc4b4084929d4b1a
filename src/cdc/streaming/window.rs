//! The stream's part of an incremental snapshot: between two marks it remembers what changed, at the second it sends the rows that did not.

use std::{collections::HashSet, time::Duration};

use super::Streaming;
use crate::{
    cdc::{
        copy_text::CopyRow,
        envelope::{INCREMENTAL, Origin},
        error::Error,
        incremental::{Chunk, Line, Mark, Settled},
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

/// What changed since the first mark.
#[derive(Debug)]
pub(super) struct Window {
    number: u64,
    pub(super) relation: u32,
    changed: HashSet<Vec<u8>>,
    /// TRUNCATE took all rows.
    emptied: bool,
}

impl Window {
    pub(super) fn note(&mut self, key: &[u8]) {
        if self.changed.len() < CHANGED_MAX && !self.changed.contains(key) {
            self.changed.insert(key.to_vec());
        }
    }

    pub(super) fn empty(&mut self) {
        self.emptied = true;
    }

    fn is_overrun(&self) -> bool {
        self.changed.len() >= CHANGED_MAX
    }
}

impl Streaming {
    /// A mark of the reader's. Those of earlier runs mean nothing any more.
    pub(super) async fn mark(&mut self, lsn: Lsn, content: &[u8], stats: &mut Stats) -> Result<Flow, Error> {
        let Some(mark) = Mark::read(content).filter(|it| it.run == self.setup.line.run) else { return Ok(Flow::On) };
        if mark.opens {
            self.window = Some(Window { number: mark.chunk, relation: mark.relation, changed: HashSet::new(), emptied: false });
            return Ok(Flow::On);
        }
        let Some(window) = self.window.take().filter(|it| it.number == mark.chunk) else { return Ok(Flow::On) };
        let chunk = tokio::time::timeout(CHUNK_MAX, next_chunk(&mut self.setup.line, mark.chunk)).await.ok().flatten();
        match chunk.filter(|_| !window.is_overrun()) {
            Some(chunk) => self.send_chunk(lsn, &window, &chunk, stats).await,
            None => {
                // The reader may be gone.
                let _ = self.setup.line.settled.send(Settled { number: mark.chunk, acked: false });
                Ok(Flow::On)
            }
        }
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
