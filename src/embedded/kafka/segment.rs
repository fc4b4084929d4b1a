//! One file of a partition's log, and the sparse index beside it.
//!
//! `<base offset>.log` holds record batches one behind the other. `<base offset>.index` holds 24 bytes for every
//! 32 KiB of log: a batch's base offset, its position, and the largest timestamp before it; so memory stays flat however
//! long the history is. The index is a hint: a reader checks that a batch begins where it points, and a start that finds
//! it wanting writes it anew.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSlice, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::batch::{Header, intact};

/// One index entry per this much log: a look-up reads at most this much too much.
const INDEX_EVERY: u64 = 32 * 1024;
const ENTRY_BYTES: usize = 24;
/// How much a scan reads at once.
const SCAN_BYTES: usize = 1 << 20;

/// A batch that the index knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) offset: i64,
    pub(super) position: u64,
    /// The largest timestamp of all batches before `position` in this segment.
    pub(super) timestamp_before: i64,
}

impl Entry {
    const START: Self = Self { offset: i64::MIN, position: 0, timestamp_before: i64::MIN };

    fn encode(self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..8].copy_from_slice(&self.offset.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.position.to_be_bytes());
        bytes[16..].copy_from_slice(&self.timestamp_before.to_be_bytes());
        bytes
    }

    fn decode(bytes: &[u8; ENTRY_BYTES]) -> Self {
        let word = |at: usize| bytes[at..at + 8].try_into().expect("eight of 24 bytes");
        Self { offset: i64::from_be_bytes(word(0)), position: u64::from_be_bytes(word(8)), timestamp_before: i64::from_be_bytes(word(16)) }
    }
}

/// What a finished segment is known by; its files are opened when somebody reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sealed {
    pub(super) base_offset: i64,
    pub(super) next_offset: i64,
    pub(super) bytes: u64,
    pub(super) max_timestamp: i64,
}

/// The segment that is written to.
#[derive(Debug)]
pub(super) struct Segment {
    log: File,
    index: File,
    pub(super) base_offset: i64,
    pub(super) next_offset: i64,
    pub(super) bytes: u64,
    pub(super) max_timestamp: i64,
    n_entries: u64,
    indexed_to: u64,
}

/// A batch that could not be written.
#[derive(Debug)]
pub(super) struct Unwritten {
    pub(super) error: io::Error,
    /// A part of it is left at the end of the file, because not even that could be cut; the segment must be recovered.
    pub(super) torn: bool,
}

pub(super) fn log_path(dir: &Path, base_offset: i64) -> PathBuf {
    dir.join(format!("{base_offset:020}.log"))
}

pub(super) fn index_path(dir: &Path, base_offset: i64) -> PathBuf {
    dir.join(format!("{base_offset:020}.index"))
}

impl Segment {
    /// Opens or creates the segment, cuts what is torn at its end, writes its index anew, and makes it durable.
    ///
    /// `each` sees every batch that is whole, in order.
    pub(super) fn recover(dir: &Path, base_offset: i64, mut each: impl FnMut(&Header)) -> io::Result<Self> {
        let open = |path: PathBuf| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let log = open(log_path(dir, base_offset))?;
        let index = open(index_path(dir, base_offset))?;
        index.set_len(0)?;
        let found = log.metadata()?.len();
        let mut segment = Self { log, index, base_offset, next_offset: base_offset, bytes: 0, max_timestamp: i64::MIN, n_entries: 0, indexed_to: 0 };
        let scanned = segment.log.try_clone()?;
        scan(&scanned, found, base_offset, |header| {
            segment.note(header)?;
            each(header);
            Ok(())
        })?;
        if segment.bytes < found {
            let path = log_path(dir, base_offset);
            tracing::warn!(path = %path.display(), kept = segment.bytes, cut = found - segment.bytes, "cut the torn end of a log");
            segment.log.set_len(segment.bytes)?;
        }
        segment.log.seek(SeekFrom::Start(segment.bytes))?;
        // What a killed process wrote may still be only in the page cache; nothing is served before it is on disk.
        segment.log.sync_data()?;
        Ok(segment)
    }

    /// Writes one batch, given in two parts, behind the others.
    pub(super) fn append(&mut self, header: &Header, head: &[u8], body: &[u8]) -> Result<(), Unwritten> {
        if let Err(error) = write_both(&mut self.log, head, body) {
            let cut = self.log.set_len(self.bytes).and_then(|()| self.log.seek(SeekFrom::Start(self.bytes)));
            return Err(Unwritten { error, torn: cut.is_err() });
        }
        // An index that misses an entry is only slower.
        if let Err(error) = self.note(header) {
            tracing::debug!(%error, "index entry not written");
        }
        Ok(())
    }

    /// Takes account of a batch that lies at the end.
    fn note(&mut self, header: &Header) -> io::Result<()> {
        let entry = Entry { offset: header.base_offset, position: self.bytes, timestamp_before: self.max_timestamp };
        let due = self.n_entries == 0 || self.bytes - self.indexed_to >= INDEX_EVERY;
        self.bytes += wide(header.length);
        self.next_offset = header.last_offset() + 1;
        self.max_timestamp = self.max_timestamp.max(header.max_timestamp);
        if due { self.write_entry(entry) } else { Ok(()) }
    }

    fn write_entry(&mut self, entry: Entry) -> io::Result<()> {
        self.index.write_all_at(&entry.encode(), self.n_entries * wide(ENTRY_BYTES))?;
        self.n_entries += 1;
        self.indexed_to = entry.position;
        Ok(())
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        self.log.sync_data()
    }

    /// Drops what lies behind `bytes`: the part of a failed flush that nobody was promised.
    pub(super) fn cut(&self, bytes: u64) -> io::Result<()> {
        self.log.set_len(bytes)
    }

    /// From now on every write, flush and cut fails, as on a disk that is gone; the file keeps what it has.
    #[cfg(test)]
    pub(super) fn spoil(&mut self) {
        self.log = OpenOptions::new().write(true).open("/dev/full").expect("every Linux has it");
    }

    /// Closes the segment for good. The last index entry points at its end: the mark of an index that is complete.
    pub(super) fn seal(&mut self) -> io::Result<Sealed> {
        self.flush()?;
        self.write_entry(Entry { offset: self.next_offset, position: self.bytes, timestamp_before: self.max_timestamp })?;
        Ok(self.sealed())
    }

    pub(super) fn sealed(&self) -> Sealed {
        Sealed { base_offset: self.base_offset, next_offset: self.next_offset, bytes: self.bytes, max_timestamp: self.max_timestamp }
    }
}

impl Sealed {
    /// Reads a sealed segment's mark. None where its index is not complete: then it wants to be recovered.
    pub(super) fn open(dir: &Path, base_offset: i64) -> io::Result<Option<Self>> {
        let bytes = std::fs::metadata(log_path(dir, base_offset))?.len();
        let Ok(index) = File::open(index_path(dir, base_offset)) else { return Ok(None) };
        let n_entries = index.metadata()?.len() / wide(ENTRY_BYTES);
        let Some(last) = n_entries.checked_sub(1) else { return Ok(None) };
        let mark = read_entry(&index, last)?;
        let complete = mark.position == bytes && mark.offset > base_offset;
        Ok(complete.then_some(Self { base_offset, next_offset: mark.offset, bytes, max_timestamp: mark.timestamp_before }))
    }
}

/// The last entry of a segment's index for which `before` holds; it must hold for a prefix of the entries.
/// The segment's start where there is none, or no index.
pub(super) fn look_up(dir: &Path, base_offset: i64, before: impl Fn(&Entry) -> bool) -> io::Result<Entry> {
    let Ok(index) = File::open(index_path(dir, base_offset)) else { return Ok(Entry::START) };
    let (mut low, mut high) = (0, index.metadata()?.len() / wide(ENTRY_BYTES));
    let mut found = Entry::START;
    while low < high {
        let middle = low + (high - low) / 2;
        let entry = read_entry(&index, middle)?;
        if before(&entry) {
            (found, low) = (entry, middle + 1);
        } else {
            high = middle;
        }
    }
    Ok(found)
}

fn read_entry(index: &File, n: u64) -> io::Result<Entry> {
    let mut bytes = [0; ENTRY_BYTES];
    index.read_exact_at(&mut bytes, n * wide(ENTRY_BYTES))?;
    Ok(Entry::decode(&bytes))
}

/// Walks the whole, intact batches at the start of `log` whose offsets follow each other, and stops at the first that
/// is not. Returns where it stopped.
pub(super) fn scan(log: &File, upto: u64, first_offset: i64, mut each: impl FnMut(&Header) -> io::Result<()>) -> io::Result<u64> {
    let (mut position, mut next_offset) = (0, first_offset);
    let mut buffer = vec![0; SCAN_BYTES];
    while position < upto {
        let here = read_up_to(log, &mut buffer, position, upto)?;
        let mut at = 0;
        while let Some(header) = Header::read(&buffer[at..here]) {
            let end = at + header.length;
            if end > here {
                break;
            }
            if header.base_offset != next_offset || header.last_offset_delta < 0 || !intact(&buffer[at..end]) {
                return Ok(position + wide(at));
            }
            each(&header)?;
            next_offset = header.last_offset() + 1;
            at = end;
        }
        if at == 0 {
            // Not one whole batch here: it is larger than the buffer, or torn.
            let length = Header::read(&buffer[..here]).map_or(0, |it| it.length);
            let rest = usize::try_from(upto - position).expect("a segment fits the address space");
            if length <= buffer.len() || length > rest {
                return Ok(position);
            }
            buffer.resize(length, 0);
            continue;
        }
        position += wide(at);
    }
    Ok(position)
}

/// Fills as much of `buffer` as lies between `position` and `upto`; returns how much.
pub(super) fn read_up_to(log: &File, buffer: &mut [u8], position: u64, upto: u64) -> io::Result<usize> {
    let rest = usize::try_from(upto.saturating_sub(position)).expect("a segment fits the address space");
    let wanted = rest.min(buffer.len());
    log.read_exact_at(&mut buffer[..wanted], position)?;
    Ok(wanted)
}

fn write_both(log: &mut File, head: &[u8], body: &[u8]) -> io::Result<()> {
    let mut parts = [IoSlice::new(head), IoSlice::new(body)];
    let mut rest = &mut parts[..];
    while !rest.is_empty() {
        match log.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut rest, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes names in a directory durable: new files, renames, removals.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Replaces a small file as a whole: after a crash it is the old one or the new one.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = File::create(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    sync_dir(path.parent().expect("a file lies in a directory"))
}

pub(super) fn wide(length: usize) -> u64 {
    u64::try_from(length).expect("lengths in memory fit 64 bits")
}
