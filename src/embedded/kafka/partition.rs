//! The log of one partition: segments, what producers it remembers, where it starts, what readers may see.
//!
//! Written by the store's thread alone. Readers get a [`View`] by `watch`, published only after the disk has what it
//! shows: the high watermark *is* the flushed offset.

#[cfg(test)]
mod tests;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use kafka_protocol::ResponseError;
use tokio::sync::watch;

use super::{
    batch::Batch,
    producers::{Place, Producers},
    segment::{self, Sealed, Segment, Unwritten, log_path, replace},
};

/// What readers may see of a partition.
#[derive(Debug, Clone)]
pub(super) struct View {
    pub(super) dir: Arc<Path>,
    /// The first offset that can be read.
    pub(super) start: i64,
    /// The offset after the last that can be read.
    pub(super) high_watermark: i64,
    /// Bytes that have become readable since the broker started; only grows.
    pub(super) bytes_arrived: u64,
    pub(super) sealed: Arc<[Sealed]>,
    /// The part of the active segment that is on disk.
    pub(super) active: Sealed,
}

impl View {
    pub(super) fn segments(&self) -> impl Iterator<Item = &Sealed> {
        self.sealed.iter().chain([&self.active])
    }

    /// The segment that holds `offset`, which must lie between start and high watermark.
    pub(super) fn segment_of(&self, offset: i64) -> &Sealed {
        let sealed = self.sealed.partition_point(|it| it.next_offset <= offset);
        self.sealed.get(sealed).unwrap_or(&self.active)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.segments().map(|it| it.bytes).sum()
    }
}

/// When old segments go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) segment_bytes: u64,
    /// None: any number of bytes.
    pub(super) retention_bytes: Option<u64>,
    /// None: for ever.
    pub(super) retention_ms: Option<i64>,
}

/// The name of the file that holds a start which is not the first segment's.
const START: &str = "start";

pub(super) struct Partition {
    dir: Arc<Path>,
    /// Shared with readers; replaced as a whole when a segment is sealed or deleted.
    sealed: Arc<[Sealed]>,
    active: Segment,
    producers: Producers,
    start: i64,
    /// What the active segment held at the last flush.
    flushed_bytes: u64,
    bytes_arrived: u64,
    /// A write or flush failed half-way; the files know better than we do and must be read again.
    broken: bool,
    /// Appends since the last [`settle`](Partition::settle) are not durable and may be gone.
    lost: bool,
    view: watch::Sender<View>,
}

impl Partition {
    /// Opens a partition's log, or begins one. Cuts a torn tail, rebuilds what is missing, and makes all of it durable.
    pub(super) fn open(dir: &Path, now_ms: i64) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let dir: Arc<Path> = dir.into();
        let Recovered { sealed, active, producers, start } = recover(&dir, now_ms)?;
        let view = View { dir: Arc::clone(&dir), start, high_watermark: start, bytes_arrived: 0, sealed: [].into(), active: active.sealed() };
        let mut partition = Self {
            dir,
            sealed,
            flushed_bytes: active.bytes,
            active,
            producers,
            start,
            bytes_arrived: 0,
            broken: false,
            lost: false,
            view: watch::channel(view).0,
        };
        partition.publish();
        Ok(partition)
    }

    pub(super) fn view(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }

    pub(super) fn start(&self) -> i64 {
        self.start
    }

    /// Appends a batch and returns its base offset, or that of the same batch sent before. Not durable before [`flush`](Self::flush).
    pub(super) fn append(&mut self, batch: &Batch, limits: &Limits, now_ms: i64) -> Result<i64, Refusal> {
        if self.broken {
            self.mend(now_ms)?;
        }
        if let Place::Duplicate { base_offset } = self.producers.place(&batch.header)? {
            return Ok(base_offset);
        }
        let length = segment::wide(batch.header.length);
        if self.active.bytes > 0 && self.active.bytes + length > limits.segment_bytes {
            self.roll(now_ms)?;
        }
        let base_offset = self.active.next_offset;
        let (head, body) = batch.placed_at(base_offset);
        let header = super::batch::Header { base_offset, ..batch.header };
        if let Err(Unwritten { error, torn }) = self.active.append(&header, &head, body) {
            if torn {
                self.fail();
            }
            return Err(error.into());
        }
        self.producers.note(&header, base_offset, now_ms);
        Ok(base_offset)
    }

    fn dirty(&self) -> bool {
        !self.broken && self.active.bytes != self.flushed_bytes
    }

    /// Ends a round: makes its appends durable, then visible. After an error none of them may be acknowledged, however
    /// the round went on after what failed.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        let flushed = self.flush();
        let lost = std::mem::take(&mut self.lost);
        flushed?;
        if lost { Err(io::Error::other("records that were not flushed yet had to be given up")) } else { Ok(()) }
    }

    /// From now on only the files know what there is.
    fn fail(&mut self) {
        self.lost |= self.active.bytes != self.flushed_bytes;
        self.broken = true;
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.dirty() {
            return Ok(());
        }
        if let Err(error) = self.active.flush() {
            // After a failed fdatasync the kernel may call lost pages clean: asking again would be answered with a lie.
            self.fail();
            if let Err(error) = self.active.cut(self.flushed_bytes) {
                tracing::warn!(%error, dir = %self.dir.display(), "could not cut what was not flushed");
            }
            return Err(error);
        }
        self.bytes_arrived += self.active.bytes - self.flushed_bytes;
        self.flushed_bytes = self.active.bytes;
        self.publish();
        Ok(())
    }

    /// Deletes whole segments that are too many or too old, but nothing at or after `hold`. Returns the bytes freed.
    pub(super) fn retain(&mut self, limits: &Limits, hold: Option<i64>, now_ms: i64) -> io::Result<u64> {
        if self.broken {
            return Ok(0);
        }
        self.flush()?;
        let too_old = |it: &Sealed| limits.retention_ms.is_some_and(|age| now_ms.saturating_sub(it.max_timestamp) > age);
        if self.active.bytes > 0 && too_old(&self.active.sealed()) && hold.is_none_or(|it| it >= self.active.next_offset) {
            self.roll(now_ms)?;
        }
        let mut bytes = self.view.borrow().bytes();
        let mut gone = 0;
        for it in self.sealed.iter() {
            let too_many = limits.retention_bytes.is_some_and(|most| bytes > most);
            let held = hold.is_some_and(|hold| hold < it.next_offset);
            if held || !(too_many || too_old(it)) {
                break;
            }
            bytes -= it.bytes;
            gone += 1;
        }
        self.drop_oldest(gone)
    }

    /// Moves the start to `offset` (at most the end), and deletes the segments before it.
    pub(super) fn delete_before(&mut self, offset: i64, now_ms: i64) -> io::Result<i64> {
        if self.broken {
            self.mend(now_ms)?;
        }
        self.flush()?;
        if offset > self.start {
            replace(&self.dir.join(START), offset.to_string().as_bytes())?;
            self.start = offset;
            if offset == self.active.next_offset && self.active.bytes > 0 {
                self.roll(now_ms)?;
            }
            let gone = self.sealed.partition_point(|it| it.next_offset <= offset);
            self.drop_oldest(gone)?;
            self.publish();
        }
        Ok(self.start)
    }

    /// Removes the first `gone` sealed segments: first from the view, then from the disk.
    fn drop_oldest(&mut self, gone: usize) -> io::Result<u64> {
        if gone == 0 {
            return Ok(0);
        }
        let (dropped, kept) = self.sealed.split_at(gone);
        let (dropped, kept): (Vec<Sealed>, Arc<[Sealed]>) = (dropped.to_vec(), kept.into());
        self.sealed = kept;
        self.start = self.start.max(dropped.last().map_or(0, |it| it.next_offset));
        self.publish();
        // Oldest first: a crash in between leaves no hole.
        for it in &dropped {
            std::fs::remove_file(log_path(&self.dir, it.base_offset))?;
            remove_if_there(&segment::index_path(&self.dir, it.base_offset))?;
            remove_if_there(&producers_path(&self.dir, it.base_offset))?;
        }
        segment::sync_dir(&self.dir)?;
        Ok(dropped.iter().map(|it| it.bytes).sum())
    }

    /// Seals the active segment and begins the next.
    fn roll(&mut self, now_ms: i64) -> io::Result<()> {
        self.flush()?;
        // Whichever step fails, the files are whole; reading them again tells which segment is the active one.
        self.broken = true;
        let sealed = self.active.seal()?;
        self.producers.forget_idle(now_ms);
        let text = serde_json::to_vec(&self.producers).map_err(io::Error::other)?;
        // Before the segment it belongs to: a segment without its producers would have to read all before it.
        replace(&producers_path(&self.dir, sealed.next_offset), &text)?;
        let active = Segment::recover(&self.dir, sealed.next_offset, |_| {})?;
        segment::sync_dir(&self.dir)?;
        // Only the newest snapshot is ever read.
        remove_if_there(&producers_path(&self.dir, sealed.base_offset))?;
        self.sealed = self.sealed.iter().copied().chain([sealed]).collect();
        self.active = active;
        self.flushed_bytes = 0;
        self.broken = false;
        self.publish();
        Ok(())
    }

    /// Reads everything again from disk after a failure.
    fn mend(&mut self, now_ms: i64) -> io::Result<()> {
        let Recovered { sealed, active, producers, start } = recover(&self.dir, now_ms)?;
        (self.sealed, self.producers, self.start) = (sealed, producers, start);
        self.flushed_bytes = active.bytes;
        self.active = active;
        self.broken = false;
        self.publish();
        Ok(())
    }

    fn publish(&mut self) {
        let view = View {
            dir: Arc::clone(&self.dir),
            start: self.start,
            high_watermark: self.active.next_offset,
            bytes_arrived: self.bytes_arrived,
            sealed: Arc::clone(&self.sealed),
            active: self.active.sealed(),
        };
        self.view.send_replace(view);
    }
}

/// Why a batch was not appended.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The producer must hear this.
    Protocol(ResponseError),
    /// The disk would not take it.
    Storage(io::Error),
}

impl From<ResponseError> for Refusal {
    fn from(error: ResponseError) -> Self {
        Self::Protocol(error)
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Storage(error)
    }
}

struct Recovered {
    sealed: Arc<[Sealed]>,
    active: Segment,
    producers: Producers,
    start: i64,
}

fn recover(dir: &Path, now_ms: i64) -> io::Result<Recovered> {
    let start = match std::fs::read_to_string(dir.join(START)) {
        Ok(text) => text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the file `start` holds no offset"))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let mut bases = base_offsets(dir)?;
    let last = bases.pop().unwrap_or(start);
    let mut sealed = Vec::with_capacity(bases.len());
    for (n, base_offset) in bases.iter().enumerate() {
        let next = bases.get(n + 1).copied().unwrap_or(last);
        let it = match Sealed::open(dir, *base_offset)? {
            Some(it) => it,
            None => reseal(dir, *base_offset)?,
        };
        if it.next_offset != next {
            let text = format!("{} ends at offset {}, the next segment begins at {next}", log_path(dir, *base_offset).display(), it.next_offset);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        sealed.push(it);
    }
    let mut producers = match std::fs::read(producers_path(dir, last)).ok().and_then(|text| serde_json::from_slice(&text).ok()) {
        Some(producers) => producers,
        None => producers_of(dir, &sealed, now_ms)?,
    };
    let active = Segment::recover(dir, last, |header| producers.note(header, header.base_offset, now_ms))?;
    segment::sync_dir(dir)?;
    let first = sealed.first().map_or(active.base_offset, |it| it.base_offset);
    Ok(Recovered { sealed: sealed.into(), start: start.clamp(first, active.next_offset), active, producers })
}

/// Makes a sealed segment's index anew. Sealed segments were flushed whole: one that is not whole any more is damaged,
/// and is neither cut nor passed over.
fn reseal(dir: &Path, base_offset: i64) -> io::Result<Sealed> {
    let path = log_path(dir, base_offset);
    let log = std::fs::File::open(&path)?;
    let bytes = log.metadata()?.len();
    let whole = segment::scan(&log, bytes, base_offset, |_| Ok(()))?;
    if whole < bytes {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} is damaged at byte {whole}", path.display())));
    }
    Segment::recover(dir, base_offset, |_| {})?.seal()
}

/// Reads the producers out of all earlier segments: only where their snapshot is missing.
fn producers_of(dir: &Path, sealed: &[Sealed], now_ms: i64) -> io::Result<Producers> {
    let mut producers = Producers::default();
    for it in sealed {
        let log = std::fs::File::open(log_path(dir, it.base_offset))?;
        segment::scan(&log, it.bytes, it.base_offset, |header| {
            producers.note(header, header.base_offset, now_ms);
            Ok(())
        })?;
    }
    Ok(producers)
}

fn producers_path(dir: &Path, base_offset: i64) -> PathBuf {
    dir.join(format!("{base_offset:020}.producers"))
}

fn base_offsets(dir: &Path) -> io::Result<Vec<i64>> {
    let mut bases = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        bases.extend(name.to_str().and_then(|it| it.strip_suffix(".log")).and_then(|it| it.parse::<i64>().ok()));
    }
    bases.sort_unstable();
    Ok(bases)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
