//! Record batches, version 2, as they lie on the wire and on disk (pure).
//!
//! The broker never looks into a batch further than its header: it checks magic, length and checksum, and writes the
//! bytes as they came. Only base offset and leader epoch are ours, and both lie outside the checksum.

use std::ops::Range;

use bytes::Bytes;
use kafka_protocol::ResponseError;

/// Bytes before the first record.
pub(super) const HEADER_BYTES: usize = 61;
/// Base offset and length, which the length does not count.
const PREFIX_BYTES: usize = 12;
/// What the checksum covers: everything behind it.
const CHECKED_FROM: usize = 21;

const CODEC: i16 = 0x0007;
const TRANSACTIONAL: i16 = 0x0010;
const CONTROL: i16 = 0x0020;
/// none, gzip, snappy, lz4, zstd.
const N_CODECS: i16 = 5;

/// What a batch says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) base_offset: i64,
    /// Of the whole batch, prefix included.
    pub(super) length: usize,
    pub(super) attributes: i16,
    pub(super) last_offset_delta: i32,
    pub(super) base_timestamp: i64,
    pub(super) max_timestamp: i64,
    pub(super) producer_id: i64,
    pub(super) producer_epoch: i16,
    pub(super) base_sequence: i32,
    pub(super) n_records: i32,
}

impl Header {
    /// None where these bytes cannot begin a batch: too few, another magic, an impossible length.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let length = usize::try_from(i32::from_be_bytes(field(bytes, 8)?)).ok()? + PREFIX_BYTES;
        if bytes.len() < HEADER_BYTES || bytes[16] != 2 || length < HEADER_BYTES {
            return None;
        }
        Some(Self {
            base_offset: i64::from_be_bytes(field(bytes, 0)?),
            length,
            attributes: i16::from_be_bytes(field(bytes, 21)?),
            last_offset_delta: i32::from_be_bytes(field(bytes, 23)?),
            base_timestamp: i64::from_be_bytes(field(bytes, 27)?),
            max_timestamp: i64::from_be_bytes(field(bytes, 35)?),
            producer_id: i64::from_be_bytes(field(bytes, 43)?),
            producer_epoch: i16::from_be_bytes(field(bytes, 51)?),
            base_sequence: i32::from_be_bytes(field(bytes, 53)?),
            n_records: i32::from_be_bytes(field(bytes, 57)?),
        })
    }

    pub(super) fn last_offset(&self) -> i64 {
        self.base_offset + i64::from(self.last_offset_delta)
    }

    pub(super) fn compressed(&self) -> bool {
        self.attributes & CODEC != 0
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// Whether the checksum of exactly one batch is right.
pub(super) fn intact(batch: &[u8]) -> bool {
    batch.len() > CHECKED_FROM && field(batch, 17).map(u32::from_be_bytes) == Some(crc32c::crc32c(&batch[CHECKED_FROM..]))
}

/// A batch that a producer may append: whole, intact, and of a kind we serve.
#[derive(Debug, Clone)]
pub(super) struct Batch {
    pub(super) header: Header,
    bytes: Bytes,
}

impl Batch {
    /// Checks what came in a produce request for one partition: exactly one batch, as Kafka demands since magic 2.
    pub(super) fn from_producer(bytes: Bytes, bytes_max: usize) -> Result<Self, ResponseError> {
        if bytes.len() > bytes_max {
            return Err(ResponseError::MessageTooLarge);
        }
        if bytes.get(16).is_some_and(|magic| *magic < 2) {
            return Err(ResponseError::UnsupportedForMessageFormat);
        }
        let header = Header::read(&bytes).ok_or(ResponseError::CorruptMessage)?;
        if bytes.len() > header.length {
            return Err(ResponseError::InvalidRecord);
        }
        if bytes.len() < header.length || !intact(&bytes) {
            return Err(ResponseError::CorruptMessage);
        }
        if header.attributes & TRANSACTIONAL != 0 {
            return Err(ResponseError::InvalidTxnState);
        }
        if header.attributes & CODEC >= N_CODECS {
            return Err(ResponseError::UnsupportedCompressionType);
        }
        let numbered = header.producer_id < 0 || (header.producer_epoch >= 0 && header.base_sequence >= 0);
        if header.attributes & CONTROL != 0 || header.n_records < 1 || header.last_offset_delta != header.n_records - 1 || !numbered {
            return Err(ResponseError::InvalidRecord);
        }
        Ok(Self { header, bytes })
    }

    /// The two parts to write, one behind the other, when the batch takes its place in the log.
    pub(super) fn placed_at(&self, base_offset: i64) -> ([u8; 16], &[u8]) {
        let mut head = [0; 16];
        head[..8].copy_from_slice(&base_offset.to_be_bytes());
        head[8..12].copy_from_slice(&self.bytes[8..12]);
        // The leader epoch: there is one leader, and it never changes.
        head[12..].copy_from_slice(&0_i32.to_be_bytes());
        (head, &self.bytes[16..])
    }
}

/// The part of `log` that answers a fetch: whole batches from the one that holds `offset`, at most `bytes_max` of them,
/// but never less than one. None when the first batch wanted does not lie in `log` as a whole; then the second value
/// says where it starts and how many bytes it takes.
pub(super) fn wanted(log: &[u8], offset: i64, bytes_max: usize) -> Wanted {
    let mut at = 0;
    let mut first = None;
    while let Some(header) = Header::read(&log[at..]) {
        if header.last_offset() >= offset {
            let end = at + header.length;
            let from = *first.get_or_insert(at);
            if end > log.len() {
                return if from == at { Wanted::More { position: at, length: header.length } } else { Wanted::Here(from..at) };
            }
            if end - from > bytes_max && from != at {
                return Wanted::Here(from..at);
            }
        }
        at += header.length;
        if at >= log.len() {
            break;
        }
    }
    match first {
        Some(from) => Wanted::Here(from..at.min(log.len())),
        None => Wanted::Beyond { position: at },
    }
}

/// What [`wanted`] found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// These bytes.
    Here(Range<usize>),
    /// The batch begins at `position` and needs `length` bytes from there.
    More { position: usize, length: usize },
    /// Every batch that begins here ends before the offset; go on at `position`, which may lie behind these bytes.
    Beyond { position: usize },
}

/// Timestamp and offset of the first record at or after `timestamp` in a batch that has one.
///
/// Exact where the batch is not compressed. A compressed batch answers with its first record: a reader that starts
/// there sees up to one batch too much and misses nothing.
pub(super) fn first_since(batch: &[u8], timestamp: i64) -> Option<(i64, i64)> {
    let header = Header::read(batch)?;
    if header.compressed() {
        return Some((header.base_timestamp.max(timestamp.min(header.max_timestamp)), header.base_offset));
    }
    let mut rest = batch.get(HEADER_BYTES..header.length)?;
    for _ in 0..header.n_records {
        let length = usize::try_from(varint(&mut rest)?).ok()?;
        let mut record = rest.get(..length)?;
        rest = &rest[length..];
        record = record.get(1..)?;
        let at = header.base_timestamp.checked_add(varint(&mut record)?)?;
        let offset = header.base_offset.checked_add(varint(&mut record)?)?;
        if at >= timestamp {
            return Some((at, offset));
        }
    }
    None
}

/// A zigzag varint, as record fields have them.
fn varint(bytes: &mut &[u8]) -> Option<i64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7F) << shift;
        if byte & 0x80 == 0 {
            return Some((value >> 1).cast_signed() ^ -(value & 1).cast_signed());
        }
    }
    None
}

/// Batches for tests: real headers and checksums, bodies of any bytes.
#[cfg(test)]
pub(super) mod sample {
    use super::*;

    /// Who sent it: producer id, epoch, first sequence.
    pub(in crate::embedded::kafka) type Sender = (i64, i16, i32);
    pub(in crate::embedded::kafka) const ANYBODY: Sender = (-1, -1, -1);

    pub(in crate::embedded::kafka) fn bytes(n_records: i32, body: &[u8], timestamp: i64, sender: Sender) -> Vec<u8> {
        let mut checked = Vec::new();
        // Pretends to be compressed: the body is nobody's business.
        checked.extend_from_slice(&3_i16.to_be_bytes());
        checked.extend_from_slice(&(n_records - 1).to_be_bytes());
        checked.extend_from_slice(&timestamp.to_be_bytes());
        checked.extend_from_slice(&timestamp.to_be_bytes());
        checked.extend_from_slice(&sender.0.to_be_bytes());
        checked.extend_from_slice(&sender.1.to_be_bytes());
        checked.extend_from_slice(&sender.2.to_be_bytes());
        checked.extend_from_slice(&n_records.to_be_bytes());
        checked.extend_from_slice(body);
        let length = i32::try_from(checked.len() + 9).expect("a small sample");
        let mut batch = vec![0; 8];
        batch.extend_from_slice(&length.to_be_bytes());
        batch.extend_from_slice(&[0, 0, 0, 0, 2]);
        batch.extend_from_slice(&crc32c::crc32c(&checked).to_be_bytes());
        batch.extend_from_slice(&checked);
        batch
    }

    pub(in crate::embedded::kafka) fn batch(n_records: i32, body: &[u8], timestamp: i64, sender: Sender) -> Batch {
        Batch::from_producer(bytes(n_records, body, timestamp, sender).into(), usize::MAX).expect("a sample is right")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_batch_with_any_bit_flipped_is_refused_unless_the_bit_is_ours_to_set() {
        let good = sample::bytes(3, b"money", 5, sample::ANYBODY);
        for bit in 0..good.len() * 8 {
            let mut flipped = good.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let ours = (0..8).contains(&(bit / 8)) || (12..16).contains(&(bit / 8));
            assert_eq!(Batch::from_producer(flipped.into(), 1_000).is_ok(), ours, "bit {bit}");
        }
    }

    #[test]
    fn a_placed_batch_has_our_offset_and_is_otherwise_as_it_came() {
        let batch = sample::batch(3, b"money", 5, (7, 1, 9));
        let (head, body) = batch.placed_at(41);
        let placed = [&head[..], body].concat();
        assert!(intact(&placed));
        assert_eq!(Header::read(&placed), Some(Header { base_offset: 41, ..batch.header }));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_batch_or_an_error_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), timestamp: i64) {
            let _ = Batch::from_producer(bytes.clone().into(), 1_000);
            let _ = wanted(&bytes, timestamp, 100);
            let _ = first_since(&bytes, timestamp);
        }
    }
}
