//! The one writer of the index. Changes that arrive while a commit is being flushed form the next group.
//!
//! One commit of the index makes a whole group durable and visible; only then are its changes answered. Conditions are
//! judged here, inside the transaction, so of many racing writers exactly one wins. Blob files are durable before the index
//! refers to them, and removed after it no longer does: a crash in between leaves an orphan, never a hole.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use redb::{ReadableTable, Table, WriteTransaction};
use s3s::crypto::{Checksum as _, Md5};
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    blob::{Blobs, Draft},
    index::{self, BUCKETS, Broken, FILES, Index, OBJECTS, Object, PARTS, Part, Place, SMALL, STORE, Segment, UPLOADS, Upload},
};
use crate::embedded::Health;

/// Changes in one group. More wait in the channel, and behind it in their connections.
const GROUP_MAX: usize = 256;
/// S3's smallest part but for the last.
const PART_BYTES_MIN: u64 = 5 << 20;

/// What the index is asked to become.
pub(super) enum Change {
    CreateBucket {
        bucket: String,
        now_ms: i64,
    },
    DeleteBucket {
        bucket: String,
    },
    Put {
        bucket: String,
        key: String,
        object: Object,
        body: Body,
        condition: Condition,
    },
    Delete {
        bucket: String,
        key: String,
        condition: Condition,
    },
    BeginUpload {
        id: String,
        upload: Upload,
    },
    PutPart {
        id: String,
        number: u16,
        part: Part,
        draft: Draft,
    },
    AbortUpload {
        id: String,
    },
    CompleteUpload {
        id: String,
        wanted: Vec<(u16, String)>,
        condition: Condition,
        now_ms: i64,
    },
    /// Changes nothing: asks whether writing works again.
    Probe,
}

/// The bytes of a put.
pub(super) enum Body {
    Small(Bytes),
    Files(Vec<Draft>),
}

/// What must hold at the moment of the commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Condition {
    None,
    Absent,
    Present,
    Etag(String),
}

impl Condition {
    /// Whether it holds for what is there now (pure).
    pub(super) fn judge(&self, there: Option<&Object>) -> Result<(), Refusal> {
        match (self, there) {
            (Self::Absent, Some(_)) => Err(Refusal::ConditionFailed),
            (Self::Present | Self::Etag(_), None) => Err(Refusal::NoSuchKey),
            (Self::Etag(wanted), Some(there)) if *wanted != there.etag => Err(Refusal::ConditionFailed),
            _ => Ok(()),
        }
    }
}

/// Why a change was not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    NoSuchBucket,
    NoSuchKey,
    NoSuchUpload,
    BucketExists,
    BucketNotEmpty,
    ConditionFailed,
    InvalidPart,
    PartsOutOfOrder,
    PartTooSmall,
    NoParts,
    Full,
    Broken(String),
}

pub(super) struct Order {
    pub(super) change: Change,
    /// The object that now exists, where the change makes one.
    pub(super) answer: oneshot::Sender<Result<Option<Object>, Refusal>>,
}

/// What the committer and the requests share.
pub(super) struct Base {
    pub(super) dir: PathBuf,
    pub(super) index: Index,
    pub(super) blobs: Blobs,
    pub(super) health: watch::Sender<Health>,
    /// Nothing that grows is taken while the disk has fewer bytes than this left.
    pub(super) reserve_bytes: u64,
}

impl Base {
    /// Whether there is room to grow; says so to the operator where there is not. One system call.
    pub(super) fn has_room(&self) -> bool {
        let roomy = match free_bytes(&self.dir) {
            Ok(free) => free >= self.reserve_bytes,
            // A disk that does not tell is found out by writing.
            Err(_) => true,
        };
        if !roomy {
            self.ail(format!("the disk of {} is nearly full: objects are refused until space is freed", self.dir.display()));
        }
        roomy
    }

    pub(super) fn ail(&self, reason: String) {
        let new = Health::Ailing(reason);
        self.health.send_if_modified(|health| {
            if *health == new {
                return false;
            }
            tracing::error!(reason = ?new, "the embedded object store refuses writes");
            *health = new;
            true
        });
    }

    fn recover(&self) {
        self.health.send_if_modified(|health| {
            if *health == Health::Well {
                return false;
            }
            tracing::info!("the embedded object store takes writes again");
            *health = Health::Well;
            true
        });
    }
}

/// What follows a commit, or its failure.
#[derive(Default)]
struct Aftermath {
    /// Directories that must know their new files before the index does.
    directories: BTreeSet<PathBuf>,
    drafts: Vec<Draft>,
    /// Files nothing refers to any more.
    doomed: Vec<u64>,
}

/// Takes orders until every sender is gone. Blocks: lives on a thread of its own.
pub(super) fn run(base: &Arc<Base>, mut orders: mpsc::Receiver<Order>) {
    let mut group = Vec::with_capacity(GROUP_MAX);
    while orders.blocking_recv_many(&mut group, GROUP_MAX) > 0 {
        settle(base, group.drain(..));
    }
    base.index.close();
}

fn settle(base: &Base, group: impl Iterator<Item = Order>) {
    let mut answers = Vec::new();
    let mut after = Aftermath::default();
    match commit(base, group, &mut answers, &mut after) {
        Ok(()) => {
            for draft in after.drafts {
                draft.keep();
            }
            // Nobody waits for an answer he no longer wants.
            answers.into_iter().for_each(|(answer, outcome)| drop(answer.send(outcome)));
            for id in after.doomed {
                base.blobs.remove(id);
            }
        }
        Err(error) => {
            let refusal = match &error {
                Broken::Full(_) => Refusal::Full,
                other => Refusal::Broken(crate::fault::chain(other)),
            };
            base.ail(format!("the index in {} cannot be written: {}", base.dir.display(), crate::fault::chain(&error)));
            if let Err(error) = base.index.reopen() {
                tracing::warn!(error = %crate::fault::chain(&error), "the index of the object store could not be opened again yet");
            }
            for draft in after.drafts {
                // A commit that failed may still have reached the disk: only what is surely not referred to is removed.
                if !matches!(base.index.refers_to(draft.id), Ok(false)) {
                    draft.keep();
                }
            }
            answers.into_iter().for_each(|(answer, _)| drop(answer.send(Err(refusal.clone()))));
        }
    }
}

type Answers = Vec<(oneshot::Sender<Result<Option<Object>, Refusal>>, Result<Option<Object>, Refusal>)>;

fn commit(base: &Base, group: impl Iterator<Item = Order>, answers: &mut Answers, after: &mut Aftermath) -> Result<(), Broken> {
    let room = base.has_room();
    let opened = match base.index.begin_write() {
        Err(Broken::Closed) => base.index.reopen().and_then(|()| base.index.begin_write()),
        other => other,
    };
    // Every order of the group is answered, also where the first of them already met the failure.
    let mut failure = None;
    {
        let mut tables = match opened.as_ref() {
            Ok(writing) => Tables::open(writing, &base.blobs).map_err(|error| failure = Some(error)).ok(),
            Err(_) => None,
        };
        for Order { change, answer } in group {
            let outcome = match tables.as_mut().filter(|_| failure.is_none()) {
                None => Err(Refusal::Broken("the index failed earlier in this group".to_owned())),
                Some(_) if !room && change.grows() => Err(Refusal::Full),
                Some(tables) => match tables.apply(change, after) {
                    Ok(outcome) => outcome,
                    Err(error) => {
                        failure = Some(error);
                        Err(Refusal::Broken(String::new()))
                    }
                },
            };
            answers.push((answer, outcome));
        }
    }
    let writing = opened?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    for directory in &after.directories {
        File::open(directory).and_then(|it| it.sync_all()).map_err(redb::Error::Io)?;
    }
    writing.commit()?;
    if room {
        base.recover();
    }
    Ok(())
}

impl Change {
    fn grows(&self) -> bool {
        !matches!(self, Self::Delete { .. } | Self::DeleteBucket { .. } | Self::AbortUpload { .. } | Self::Probe)
    }
}

struct Tables<'txn> {
    buckets: Table<'txn, &'static str, i64>,
    objects: Table<'txn, (&'static str, &'static [u8]), &'static [u8]>,
    small: Table<'txn, u64, &'static [u8]>,
    files: Table<'txn, u64, ()>,
    uploads: Table<'txn, &'static str, &'static [u8]>,
    parts: Table<'txn, (&'static str, u16), &'static [u8]>,
    store: Table<'txn, &'static str, u64>,
    blobs: &'txn Blobs,
}

type Outcome = Result<Option<Object>, Refusal>;

impl<'txn> Tables<'txn> {
    fn open(writing: &'txn WriteTransaction, blobs: &'txn Blobs) -> Result<Self, Broken> {
        Ok(Self {
            buckets: writing.open_table(BUCKETS)?,
            objects: writing.open_table(OBJECTS)?,
            small: writing.open_table(SMALL)?,
            files: writing.open_table(FILES)?,
            uploads: writing.open_table(UPLOADS)?,
            parts: writing.open_table(PARTS)?,
            store: writing.open_table(STORE)?,
            blobs,
        })
    }

    /// Makes one change, or refuses it without a trace.
    fn apply(&mut self, change: Change, after: &mut Aftermath) -> Result<Outcome, Broken> {
        match change {
            Change::CreateBucket { bucket, now_ms } => self.create_bucket(&bucket, now_ms),
            Change::DeleteBucket { bucket } => self.delete_bucket(&bucket, after),
            Change::Put { bucket, key, object, body, condition } => self.put(&bucket, &key, object, body, &condition, after),
            Change::Delete { bucket, key, condition } => self.delete(&bucket, &key, &condition, after),
            Change::BeginUpload { id, upload } => {
                if self.buckets.get(upload.bucket.as_str())?.is_none() {
                    return Ok(Err(Refusal::NoSuchBucket));
                }
                self.uploads.insert(id.as_str(), index::encode(&upload).as_slice())?;
                Ok(Ok(None))
            }
            Change::PutPart { id, number, part, draft } => self.put_part(&id, number, &part, draft, after),
            Change::AbortUpload { id } => {
                if self.uploads.remove(id.as_str())?.is_none() {
                    return Ok(Err(Refusal::NoSuchUpload));
                }
                for (number, part) in index::parts_in(&self.parts, &id, 0, usize::MAX)? {
                    self.parts.remove((id.as_str(), number))?;
                    self.doom(part.id, after)?;
                }
                Ok(Ok(None))
            }
            Change::CompleteUpload { id, wanted, condition, now_ms } => self.complete(&id, &wanted, &condition, now_ms, after),
            Change::Probe => {
                let probes = self.store.get("probes")?.map_or(0, |it| it.value());
                self.store.insert("probes", probes.wrapping_add(1))?;
                Ok(Ok(None))
            }
        }
    }

    fn create_bucket(&mut self, bucket: &str, now_ms: i64) -> Result<Outcome, Broken> {
        if self.buckets.get(bucket)?.is_some() {
            return Ok(Err(Refusal::BucketExists));
        }
        self.buckets.insert(bucket, now_ms)?;
        Ok(Ok(None))
    }

    fn delete_bucket(&mut self, bucket: &str, after: &mut Aftermath) -> Result<Outcome, Broken> {
        if self.buckets.get(bucket)?.is_none() {
            return Ok(Err(Refusal::NoSuchBucket));
        }
        if self.objects.range((bucket, &b""[..])..)?.next().transpose()?.is_some_and(|(key, _)| key.value().0 == bucket) {
            return Ok(Err(Refusal::BucketNotEmpty));
        }
        let mut open = Vec::new();
        for row in self.uploads.iter()? {
            let (id, upload) = row?;
            if index::decode::<Upload>("uploads", upload.value())?.bucket == bucket {
                open.push(id.value().to_owned());
            }
        }
        for id in open {
            // Refusals cannot happen: the upload was there a line ago, in the same transaction.
            let _ = self.apply(Change::AbortUpload { id }, after)?;
        }
        self.buckets.remove(bucket)?;
        Ok(Ok(None))
    }

    fn put(&mut self, bucket: &str, key: &str, mut object: Object, body: Body, condition: &Condition, after: &mut Aftermath) -> Result<Outcome, Broken> {
        let old = match self.judge(bucket, key, condition)? {
            Ok(old) => old,
            Err(refusal) => return Ok(Err(refusal)),
        };
        object.place = match body {
            Body::Small(bytes) => {
                let id = self.blobs.next_id();
                self.small.insert(id, &*bytes)?;
                Place::Small(id)
            }
            Body::Files(drafts) => {
                let place = object.place;
                for draft in drafts {
                    self.adopt(draft, after)?;
                }
                place
            }
        };
        self.objects.insert((bucket, key.as_bytes()), index::encode(&object).as_slice())?;
        self.forget(old, after)?;
        Ok(Ok(Some(object)))
    }

    fn delete(&mut self, bucket: &str, key: &str, condition: &Condition, after: &mut Aftermath) -> Result<Outcome, Broken> {
        match self.judge(bucket, key, condition)? {
            Ok(old) => {
                self.objects.remove((bucket, key.as_bytes()))?;
                self.forget(old, after)?;
                Ok(Ok(None))
            }
            Err(refusal) => Ok(Err(refusal)),
        }
    }

    fn put_part(&mut self, id: &str, number: u16, part: &Part, draft: Draft, after: &mut Aftermath) -> Result<Outcome, Broken> {
        if self.uploads.get(id)?.is_none() {
            return Ok(Err(Refusal::NoSuchUpload));
        }
        let old = match self.parts.insert((id, number), index::encode(part).as_slice())? {
            Some(row) => Some(index::decode::<Part>("parts", row.value())?),
            None => None,
        };
        self.adopt(draft, after)?;
        if let Some(old) = old {
            self.doom(old.id, after)?;
        }
        Ok(Ok(None))
    }

    /// The parts become one object without a byte being copied.
    fn complete(&mut self, id: &str, wanted: &[(u16, String)], condition: &Condition, now_ms: i64, after: &mut Aftermath) -> Result<Outcome, Broken> {
        let upload: Upload = match self.uploads.get(id)? {
            Some(row) => index::decode("uploads", row.value())?,
            None => return Ok(Err(Refusal::NoSuchUpload)),
        };
        let old = match self.judge(&upload.bucket, &upload.key, condition)? {
            Ok(old) => old,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let parts: BTreeMap<u16, Part> = index::parts_in(&self.parts, id, 0, usize::MAX)?.into_iter().collect();
        let object = match assemble(upload, &parts, wanted, now_ms) {
            Ok(object) => object,
            Err(refusal) => return Ok(Err(refusal)),
        };
        for (number, part) in &parts {
            self.parts.remove((id, *number))?;
            if !wanted.iter().any(|(it, _)| it == number) {
                self.doom(part.id, after)?;
            }
        }
        let (bucket, key) = match self.uploads.remove(id)? {
            Some(row) => index::decode::<Upload>("uploads", row.value()).map(|it| (it.bucket, it.key))?,
            None => return Ok(Err(Refusal::NoSuchUpload)),
        };
        self.objects.insert((bucket.as_str(), key.as_bytes()), index::encode(&object).as_slice())?;
        self.forget(old, after)?;
        Ok(Ok(Some(object)))
    }

    /// The object there is now, if the condition holds for it.
    fn judge(&self, bucket: &str, key: &str, condition: &Condition) -> Result<Result<Option<Object>, Refusal>, Broken> {
        if self.buckets.get(bucket)?.is_none() {
            return Ok(Err(Refusal::NoSuchBucket));
        }
        let old: Option<Object> = match self.objects.get((bucket, key.as_bytes()))? {
            Some(row) => Some(index::decode("objects", row.value())?),
            None => None,
        };
        Ok(condition.judge(old.as_ref()).map(|()| old))
    }

    fn adopt(&mut self, draft: Draft, after: &mut Aftermath) -> Result<(), Broken> {
        self.files.insert(draft.id, ())?;
        after.directories.insert(draft.directory().to_owned());
        after.drafts.push(draft);
        Ok(())
    }

    fn forget(&mut self, old: Option<Object>, after: &mut Aftermath) -> Result<(), Broken> {
        match old.map(|it| it.place) {
            Some(Place::Small(id)) => drop(self.small.remove(id)?),
            Some(Place::Files(segments)) => {
                for segment in segments {
                    self.doom(segment.id, after)?;
                }
            }
            None => {}
        }
        Ok(())
    }

    fn doom(&mut self, id: u64, after: &mut Aftermath) -> Result<(), Broken> {
        self.files.remove(id)?;
        after.doomed.push(id);
        Ok(())
    }
}

/// The object that the wanted parts make, in their order (pure).
fn assemble(upload: Upload, parts: &BTreeMap<u16, Part>, wanted: &[(u16, String)], now_ms: i64) -> Result<Object, Refusal> {
    if wanted.is_empty() {
        return Err(Refusal::NoParts);
    }
    if wanted.windows(2).any(|pair| pair[0].0 >= pair[1].0) {
        return Err(Refusal::PartsOutOfOrder);
    }
    let mut md5 = Md5::new();
    let (mut size, mut segments) = (0, Vec::with_capacity(wanted.len()));
    for (place, (number, etag)) in wanted.iter().enumerate() {
        let part = parts.get(number).filter(|part| part.etag == *etag).ok_or(Refusal::InvalidPart)?;
        if part.size < PART_BYTES_MIN && place + 1 < wanted.len() {
            return Err(Refusal::PartTooSmall);
        }
        md5.update(&hex::decode(&part.etag).map_err(|_| Refusal::InvalidPart)?);
        size += part.size;
        segments.push(Segment { id: part.id, size: part.size });
    }
    Ok(Object {
        size,
        etag: format!("{}-{}", hex::encode(md5.finalize()), wanted.len()),
        modified_ms: now_ms,
        content_type: upload.content_type,
        content_encoding: upload.content_encoding,
        metadata: upload.metadata,
        checksums: BTreeMap::new(),
        place: Place::Files(segments),
    })
}

fn free_bytes(dir: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(dir)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upload() -> Upload {
        Upload { bucket: "lake".into(), key: "a".into(), started_ms: 0, content_type: None, content_encoding: None, metadata: BTreeMap::new() }
    }

    fn part(id: u64, size: u64) -> Part {
        Part { etag: hex::encode(Md5::checksum(&id.to_be_bytes())), size, id, modified_ms: 0, checksums: BTreeMap::new() }
    }

    #[test]
    fn parts_become_one_object_only_whole_and_in_order() {
        let parts = BTreeMap::from([(1, part(10, PART_BYTES_MIN)), (2, part(20, 7)), (3, part(30, 9))]);
        let wanted = |numbers: &[u16]| numbers.iter().map(|it| (*it, parts[it].etag.clone())).collect::<Vec<_>>();

        let object = assemble(upload(), &parts, &wanted(&[1, 3]), 5).unwrap();

        assert_eq!(object.size, PART_BYTES_MIN + 9);
        assert!(object.etag.ends_with("-2"));
        assert_eq!(object.place, Place::Files(vec![Segment { id: 10, size: PART_BYTES_MIN }, Segment { id: 30, size: 9 }]));
        assert_eq!(assemble(upload(), &parts, &wanted(&[3, 1]), 5), Err(Refusal::PartsOutOfOrder));
        assert_eq!(assemble(upload(), &parts, &wanted(&[2, 3]), 5), Err(Refusal::PartTooSmall));
        assert_eq!(assemble(upload(), &parts, &[(1, "other".into())], 5), Err(Refusal::InvalidPart));
        assert_eq!(assemble(upload(), &parts, &[(4, parts[&3].etag.clone())], 5), Err(Refusal::InvalidPart));
        assert_eq!(assemble(upload(), &parts, &[], 5), Err(Refusal::NoParts));
    }
}
