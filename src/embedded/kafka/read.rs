//! Reading a partition's log through its view. Blocking; readers and the writer share nothing but files and a copy.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use bytes::{Bytes, BytesMut};

use super::{
    batch::{self, HEADER_BYTES, Header, Wanted},
    partition::View,
    segment::{self, Entry, Sealed, log_path, look_up, wide},
};

/// The least a read takes at once: an index entry's worth of log, so that the batch looked for is surely in it.
const READ_BYTES_MIN: usize = 64 * 1024;

/// Whole batches from the one that holds `offset`: at most `bytes_max`, but at least one batch; none at the end.
/// They may begin before `offset`, as Kafka's do.
///
/// `NotFound` says that retention was faster: look at a newer view.
pub(super) fn fetch(view: &View, offset: i64, bytes_max: usize) -> io::Result<Bytes> {
    if offset >= view.high_watermark {
        return Ok(Bytes::new());
    }
    let segment = view.segment_of(offset);
    let log = File::open(log_path(&view.dir, segment.base_offset))?;
    let entry = look_up(&view.dir, segment.base_offset, |it| it.offset <= offset)?;
    let mut position = trusted(&log, segment, entry)?;
    let mut length = bytes_max.max(READ_BYTES_MIN);
    while position < segment.bytes {
        let rest = usize::try_from(segment.bytes - position).map_err(io::Error::other)?;
        let mut buffer = BytesMut::zeroed(length.min(rest));
        log.read_exact_at(&mut buffer, position)?;
        match batch::wanted(&buffer, offset, bytes_max) {
            Wanted::Here(range) => return Ok(buffer.freeze().slice(range)),
            Wanted::More { position: at, length: whole } if whole <= rest - at => {
                position += wide(at);
                length = whole;
            }
            Wanted::Beyond { position: at } if at > 0 => position += wide(at),
            Wanted::More { .. } | Wanted::Beyond { .. } => return Err(damaged(&view.dir, segment, position)),
        }
    }
    Ok(Bytes::new())
}

/// Timestamp and offset of the first record at or after `timestamp`.
pub(super) fn since(view: &View, timestamp: i64) -> io::Result<Option<(i64, i64)>> {
    for segment in view.segments().filter(|it| it.max_timestamp >= timestamp) {
        if let Some(batch) = batch_since(view, segment, timestamp)? {
            return Ok(batch::first_since(&batch, timestamp).map(|(at, offset)| (at, offset.max(view.start))));
        }
    }
    Ok(None)
}

/// Timestamp and offset of the record with the largest timestamp.
pub(super) fn newest(view: &View) -> io::Result<Option<(i64, i64)>> {
    let Some(segment) = view.segments().filter(|it| it.bytes > 0).max_by_key(|it| it.max_timestamp) else { return Ok(None) };
    let Some(batch) = batch_since(view, segment, segment.max_timestamp)? else { return Ok(None) };
    let Some(header) = Header::read(&batch) else { return Ok(None) };
    // Which record of a compressed batch it was is not known; its last one is, as older Kafkas answered.
    let offset = if header.compressed() { Some(header.last_offset()) } else { batch::first_since(&batch, header.max_timestamp).map(|it| it.1) };
    Ok(offset.map(|offset| (header.max_timestamp, offset.max(view.start))))
}

/// The first batch of a segment that has a record at or after `timestamp`.
fn batch_since(view: &View, segment: &Sealed, timestamp: i64) -> io::Result<Option<Vec<u8>>> {
    let log = File::open(log_path(&view.dir, segment.base_offset))?;
    let entry = look_up(&view.dir, segment.base_offset, |it| it.timestamp_before < timestamp)?;
    let mut position = trusted(&log, segment, entry)?;
    while position < segment.bytes {
        let header = header_at(&log, position, segment.bytes)?.ok_or_else(|| damaged(&view.dir, segment, position))?;
        if header.max_timestamp >= timestamp && header.last_offset() >= view.start {
            let mut batch = vec![0; header.length];
            log.read_exact_at(&mut batch, position)?;
            return Ok(Some(batch));
        }
        position += wide(header.length);
    }
    Ok(None)
}

/// Where to begin: the entry's position if its batch is really there, else the segment's start.
fn trusted(log: &File, segment: &Sealed, entry: Entry) -> io::Result<u64> {
    let header = header_at(log, entry.position, segment.bytes)?;
    Ok(if header.is_some_and(|it| it.base_offset == entry.offset) { entry.position } else { 0 })
}

fn header_at(log: &File, position: u64, upto: u64) -> io::Result<Option<Header>> {
    let mut bytes = [0; HEADER_BYTES];
    let read = segment::read_up_to(log, &mut bytes, position, upto)?;
    Ok(Header::read(&bytes[..read]))
}

fn damaged(dir: &Path, segment: &Sealed, position: u64) -> io::Error {
    let text = format!("{} is damaged at byte {position}", log_path(dir, segment.base_offset).display());
    io::Error::new(io::ErrorKind::InvalidData, text)
}
