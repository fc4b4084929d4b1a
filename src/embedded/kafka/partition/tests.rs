use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::embedded::kafka::{
    batch::{
        Header,
        sample::{self, ANYBODY},
    },
    read,
};

const LIMITS: Limits = Limits { segment_bytes: u64::MAX, retention_bytes: None, retention_ms: None };
const ME: i64 = 7;

fn open(dir: &TempDir) -> Partition {
    Partition::open(dir.path(), 0).unwrap()
}

fn append(partition: &mut Partition, batch: &Batch, limits: &Limits) -> i64 {
    partition.append(batch, limits, 0).unwrap()
}

fn end(partition: &Partition) -> i64 {
    partition.view().borrow().high_watermark
}

/// The first offsets of all batches from `offset` on, read as a client reads.
fn bases(partition: &Partition, mut offset: i64, bytes_max: usize) -> Vec<i64> {
    let view = partition.view().borrow().clone();
    let mut bases = Vec::new();
    while offset < view.high_watermark {
        let records = read::fetch(&view, offset, bytes_max).unwrap();
        let mut at = 0;
        while let Some(header) = Header::read(&records[at..]) {
            assert!(crate::embedded::kafka::batch::intact(&records[at..at + header.length]));
            bases.push(header.base_offset);
            offset = header.last_offset() + 1;
            at += header.length;
        }
        assert_eq!(at, records.len(), "whole batches only");
    }
    bases
}

#[test]
fn nothing_is_seen_before_it_is_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let mut partition = open(&dir);
    append(&mut partition, &sample::batch(3, b"x", 0, ANYBODY), &LIMITS);
    assert_eq!(end(&partition), 0);
    partition.settle().unwrap();
    assert_eq!((end(&partition), bases(&partition, 0, 1_000)), (3, vec![0]));
}

#[test]
fn a_tail_torn_at_any_byte_costs_only_the_batch_it_was_in() {
    let batches: Vec<Batch> = (0..3).map(|n| sample::batch(2, &[b'x'; 40], 0, (ME, 0, n * 2))).collect();
    let whole = batches[0].header.length;
    for cut in 0..=3 * whole {
        let dir = tempfile::tempdir().unwrap();
        let mut partition = open(&dir);
        for batch in &batches {
            append(&mut partition, batch, &LIMITS);
        }
        partition.settle().unwrap();
        drop(partition);
        let log = std::fs::OpenOptions::new().write(true).open(log_path(dir.path(), 0)).unwrap();
        log.set_len(segment::wide(cut)).unwrap();

        let mut partition = open(&dir);
        let survivors = cut / whole;
        assert_eq!(end(&partition), 2 * i64::try_from(survivors).unwrap(), "cut at {cut}");
        // The producer tries all of them again: what is there is found, what is not goes in behind it.
        let offsets: Vec<i64> = batches.iter().map(|it| append(&mut partition, it, &LIMITS)).collect();
        assert_eq!(offsets, [0, 2, 4], "cut at {cut}");
        partition.settle().unwrap();
        assert_eq!(bases(&partition, 0, 1_000), [0, 2, 4]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Batches of any size over segments of any size, a crash that tears or spoils the end of the last file, a
    /// start: what was before the tear is all there, in place, and the log goes on.
    #[test]
    fn a_log_survives_any_tear_of_its_newest_segment(
        sizes in prop::collection::vec((1_i32..5, 0_usize..9_000), 1..30),
        segment_bytes in 200_u64..60_000,
        torn_permille in 0_u64..1_000,
        spoil: bool,
    ) {
        let limits = Limits { segment_bytes, ..LIMITS };
        let dir = tempfile::tempdir().unwrap();
        let mut partition = open(&dir);
        let mut sequence = 0;
        let mut sent = Vec::new();
        for (n_records, size) in sizes {
            let batch = sample::batch(n_records, &vec![b'x'; size], 0, (ME, 0, sequence));
            let base = append(&mut partition, &batch, &limits);
            sequence += n_records;
            sent.push((batch, base));
        }
        partition.settle().unwrap();
        let (active, total) = (partition.active.base_offset, partition.active.bytes);
        drop(partition);

        let cut = total * torn_permille / 1_000;
        let path = log_path(dir.path(), active);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = usize::try_from(cut).unwrap();
        if spoil && at < bytes.len() { bytes[at] ^= 0x55 } else { bytes.truncate(at) }
        std::fs::write(&path, &bytes).unwrap();

        let mut position = 0;
        let survivors = sent.iter().filter(|(batch, base)| {
            position += if *base >= active { segment::wide(batch.header.length) } else { 0 };
            // A flip of the leader epoch is not noticed and harms nobody; nobody reads it.
            position <= cut
        }).count();
        let mut partition = open(&dir);
        let expected: Vec<i64> = sent.iter().map(|it| it.1).collect();
        let found = bases(&partition, 0, 20_000);
        prop_assert!(found.len() >= survivors, "{} of {survivors}", found.len());
        prop_assert!(expected.starts_with(&found));
        // What the producer still has in flight: the last five that are there, and all that are not.
        for (batch, base) in sent.iter().skip(found.len().saturating_sub(5)) {
            prop_assert_eq!(append(&mut partition, batch, &limits), *base);
        }
    }

    #[test]
    fn every_offset_is_found_whatever_the_fetch_size(sizes in prop::collection::vec((1_i32..4, 0_usize..30_000), 1..25), bytes_max in 1_usize..100_000) {
        let limits = Limits { segment_bytes: 100_000, ..LIMITS };
        let dir = tempfile::tempdir().unwrap();
        let mut partition = open(&dir);
        let mut expected = Vec::new();
        for (n, (n_records, size)) in (0..).zip(sizes) {
            let base = append(&mut partition, &sample::batch(n_records, &vec![b'x'; size], n, ANYBODY), &limits);
            expected.extend((0..n_records).map(|_| base));
        }
        partition.settle().unwrap();
        for (offset, base) in (0..).zip(&expected) {
            let mut wanted: Vec<i64> = expected.iter().copied().filter(|it| it >= base).collect();
            wanted.dedup();
            prop_assert_eq!(bases(&partition, offset, bytes_max), wanted);
        }
    }
}

#[test]
fn lost_and_spoilt_helper_files_are_made_again() {
    let limits = Limits { segment_bytes: 300, ..LIMITS };
    let dir = tempfile::tempdir().unwrap();
    let mut partition = open(&dir);
    let batches: Vec<Batch> = (0..20).map(|n| sample::batch(1, &[b'x'; 100], i64::from(n), (ME, 0, n))).collect();
    for batch in &batches {
        append(&mut partition, batch, &limits);
    }
    partition.settle().unwrap();
    drop(partition);
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        match path.extension().and_then(|it| it.to_str()) {
            Some("producers") => std::fs::remove_file(path).unwrap(),
            Some("index") => std::fs::write(path, [0xAB; 48]).unwrap(),
            _ => {}
        }
    }
    let mut partition = open(&dir);
    assert_eq!(bases(&partition, 0, 1_000), (0..20).collect::<Vec<_>>());
    assert_eq!(append(&mut partition, &batches[17], &limits), 17, "its producer is remembered");
    let view = partition.view().borrow().clone();
    assert_eq!(read::since(&view, 11).unwrap(), Some((11, 11)));
    assert_eq!(read::newest(&view).unwrap(), Some((19, 19)));
    assert_eq!(read::since(&view, 20).unwrap(), None);
}

#[test]
fn an_index_that_points_astray_only_costs_time() {
    let dir = tempfile::tempdir().unwrap();
    let mut partition = open(&dir);
    for n in 0..20 {
        append(&mut partition, &sample::batch(1, &[b'x'; 10_000], n, ANYBODY), &LIMITS);
    }
    partition.settle().unwrap();
    let path = segment::index_path(dir.path(), 0);
    let mut index = std::fs::read(&path).unwrap();
    assert!(index.len() > 48, "there is an index to spoil");
    for entry in index.chunks_mut(24) {
        entry[15] ^= 0x11;
    }
    std::fs::write(&path, index).unwrap();
    assert_eq!(bases(&partition, 13, 1_000), (13..20).collect::<Vec<_>>());
    assert_eq!(read::since(&partition.view().borrow(), 13).unwrap(), Some((13, 13)));
}

#[test]
fn old_segments_go_by_bytes_and_age_but_not_what_is_held() {
    let limits = Limits { segment_bytes: 300, retention_bytes: Some(1_000), retention_ms: Some(50) };
    let dir = tempfile::tempdir().unwrap();
    let mut partition = open(&dir);
    for n in 0..20 {
        append(&mut partition, &sample::batch(1, &[b'x'; 100], n, ANYBODY), &limits);
    }
    partition.settle().unwrap();
    assert_eq!(partition.retain(&limits, Some(0), 20).unwrap(), 0);
    partition.retain(&limits, Some(5), 20).unwrap();
    assert!((1..=5).contains(&partition.start()), "{}", partition.start());
    partition.retain(&limits, None, 20).unwrap();
    assert!(partition.view().borrow().bytes() <= 1_000);
    partition.retain(&limits, Some(20), 1_000).unwrap();
    assert_eq!((partition.start(), end(&partition)), (20, 20));
    drop(partition);
    let mut partition = open(&dir);
    assert_eq!((partition.start(), append(&mut partition, &sample::batch(1, b"x", 0, ANYBODY), &limits)), (20, 20));
}

#[test]
fn records_deleted_on_request_stay_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let mut partition = open(&dir);
    for n in 0..10 {
        append(&mut partition, &sample::batch(1, b"x", n, ANYBODY), &LIMITS);
    }
    assert_eq!(partition.delete_before(4, 0).unwrap(), 4);
    assert_eq!(partition.delete_before(2, 0).unwrap(), 4);
    drop(partition);
    let mut partition = open(&dir);
    assert_eq!((partition.start(), end(&partition)), (4, 10));
    assert_eq!(partition.delete_before(10, 0).unwrap(), 10);
    drop(partition);
    assert_eq!((open(&dir).start(), end(&open(&dir))), (10, 10));
}

#[test]
fn a_hole_between_segments_is_not_papered_over() {
    let limits = Limits { segment_bytes: 300, ..LIMITS };
    let dir = tempfile::tempdir().unwrap();
    let mut partition = open(&dir);
    for n in 0..10 {
        append(&mut partition, &sample::batch(1, &[b'x'; 100], n, ANYBODY), &limits);
    }
    drop(partition);
    let mut bases = base_offsets(dir.path()).unwrap();
    std::fs::remove_file(log_path(dir.path(), bases.remove(1))).unwrap();
    let error = Partition::open(dir.path(), 0).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
}

#[test]
fn what_a_failed_flush_took_away_is_not_acknowledged_and_can_be_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut partition = open(&dir);
    let batches: Vec<Batch> = (0..3).map(|n| sample::batch(2, b"x", 0, (ME, 0, n * 2))).collect();
    append(&mut partition, &batches[0], &LIMITS);
    partition.settle().unwrap();
    append(&mut partition, &batches[1], &LIMITS);
    partition.active.spoil();
    assert!(partition.settle().is_err());
    assert_eq!(end(&partition), 2);

    assert_eq!((append(&mut partition, &batches[1], &LIMITS), append(&mut partition, &batches[2], &LIMITS)), (2, 4));
    partition.settle().unwrap();
    assert_eq!(bases(&partition, 0, 1_000), [0, 2, 4]);
}

#[test]
fn a_write_that_fails_in_the_middle_of_a_round_takes_the_acknowledgement_of_the_whole_round() {
    let dir = tempfile::tempdir().unwrap();
    let mut partition = open(&dir);
    let batches: Vec<Batch> = (0..3).map(|n| sample::batch(2, b"x", 0, (ME, 0, n * 2))).collect();
    append(&mut partition, &batches[0], &LIMITS);
    partition.active.spoil();
    assert!(matches!(partition.append(&batches[1], &LIMITS, 0), Err(Refusal::Storage(_))));
    // The log is read again and goes on, but nobody has flushed the first batch of this round.
    append(&mut partition, &batches[1], &LIMITS);
    assert!(partition.settle().is_err());
    assert_eq!(batches.iter().map(|it| append(&mut partition, it, &LIMITS)).collect::<Vec<_>>(), [0, 2, 4]);
    partition.settle().unwrap();
    assert_eq!(bases(&partition, 0, 1_000), [0, 2, 4]);
}

#[test]
fn a_sealed_segment_that_is_damaged_is_neither_cut_nor_passed_over() {
    let limits = Limits { segment_bytes: 300, ..LIMITS };
    let dir = tempfile::tempdir().unwrap();
    let mut partition = open(&dir);
    for n in 0..10 {
        append(&mut partition, &sample::batch(1, &[b'x'; 100], n, ANYBODY), &limits);
    }
    drop(partition);
    let path = log_path(dir.path(), 0);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[80] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    std::fs::remove_file(segment::index_path(dir.path(), 0)).unwrap();
    assert_eq!(Partition::open(dir.path(), 0).err().unwrap().kind(), io::ErrorKind::InvalidData);
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}
