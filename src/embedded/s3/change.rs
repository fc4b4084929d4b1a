//! What the index may be asked to become, and how a transaction becomes it.
//!
//! Conditions are judged here, inside the transaction, so of many racing writers exactly one wins; a change that is refused
//! leaves no trace.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use bytes::Bytes;
use redb::{ReadableTable, Table, WriteTransaction};
use s3s::crypto::{Checksum as _, Md5};

use super::{
    blob::{Blobs, Draft},
    index::{self, BUCKETS, Broken, FILES, OBJECTS, Object, PARTS, Part, Place, SMALL, STORE, Segment, UPLOADS, Upload},
};

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

/// The object that now exists, where the change makes one.
pub(super) type Outcome = Result<Option<Object>, Refusal>;

/// What follows a commit, or its failure.
#[derive(Default)]
pub(super) struct Aftermath {
    /// Directories that must know their new files before the index does.
    pub(super) directories: BTreeSet<PathBuf>,
    pub(super) drafts: Vec<Draft>,
    /// Files nothing refers to any more.
    pub(super) doomed: Vec<u64>,
}
impl Change {
    /// Whether it needs room on the disk.
    pub(super) fn grows(&self) -> bool {
        !matches!(self, Self::Delete { .. } | Self::DeleteBucket { .. } | Self::AbortUpload { .. } | Self::Probe)
    }
}
/// The index's tables within one write transaction.
pub(super) struct Tables<'txn> {
    buckets: Table<'txn, &'static str, i64>,
    objects: Table<'txn, (&'static str, &'static [u8]), &'static [u8]>,
    small: Table<'txn, u64, &'static [u8]>,
    files: Table<'txn, u64, ()>,
    uploads: Table<'txn, &'static str, &'static [u8]>,
    parts: Table<'txn, (&'static str, u16), &'static [u8]>,
    store: Table<'txn, &'static str, u64>,
    blobs: &'txn Blobs,
}

impl<'txn> Tables<'txn> {
    pub(super) fn open(writing: &'txn WriteTransaction, blobs: &'txn Blobs) -> Result<Self, Broken> {
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
    pub(super) fn apply(&mut self, change: Change, after: &mut Aftermath) -> Result<Outcome, Broken> {
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
