//! The index: which object lies where. A redb file, so memory stays flat with millions of keys.
//!
//! Only [`super::commit`] writes it; everyone may read. An object exists from the moment its row is committed.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock},
};

use redb::{Database, ReadTransaction, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// redb's page cache. Its default of 1 GiB is more than the whole pipeline may use.
const CACHE_BYTES: usize = 16 << 20;

/// Bucket → creation time in ms.
pub(super) const BUCKETS: TableDefinition<&str, i64> = TableDefinition::new("buckets");
/// (bucket, key) → [`Object`] as JSON. Keys are bytes, so that "the first key after this prefix" can be written down.
pub(super) const OBJECTS: TableDefinition<(&str, &[u8]), &[u8]> = TableDefinition::new("objects");
/// Bodies too small to deserve a file, by blob id; apart from the objects so that lists do not read them.
pub(super) const SMALL: TableDefinition<u64, &[u8]> = TableDefinition::new("small");
/// Blob files that something refers to. A file that is not here is an orphan.
pub(super) const FILES: TableDefinition<u64, ()> = TableDefinition::new("files");
/// Upload id → [`Upload`] as JSON.
pub(super) const UPLOADS: TableDefinition<&str, &[u8]> = TableDefinition::new("uploads");
/// (upload id, part number) → [`Part`] as JSON.
pub(super) const PARTS: TableDefinition<(&str, u16), &[u8]> = TableDefinition::new("parts");
/// Facts about the store itself.
pub(super) const STORE: TableDefinition<&str, u64> = TableDefinition::new("store");

/// What this version writes under `format` in [`STORE`]; another number is another layout.
const FORMAT: u64 = 1;

/// What is kept of an object besides its bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Object {
    pub(super) size: u64,
    pub(super) etag: String,
    pub(super) modified_ms: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) content_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) content_encoding: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) metadata: BTreeMap<String, String>,
    /// Algorithm → base64, as the client sent and we verified them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) checksums: BTreeMap<String, String>,
    pub(super) place: Place,
}

/// Where the bytes lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Place {
    /// In the index itself.
    Small(u64),
    /// In blob files, one after the other: one of a plain put, several of a multipart upload.
    Files(Vec<Segment>),
}

impl Default for Place {
    fn default() -> Self {
        Self::Files(Vec::new())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Segment {
    pub(super) id: u64,
    pub(super) size: u64,
}

/// An object, and its bytes if they lie in the index.
pub(super) type Found = (Object, Option<Vec<u8>>);

/// A multipart upload that is neither completed nor aborted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Upload {
    pub(super) bucket: String,
    pub(super) key: String,
    pub(super) started_ms: i64,
    pub(super) content_type: Option<String>,
    pub(super) content_encoding: Option<String>,
    pub(super) metadata: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Part {
    /// MD5 in hex.
    pub(super) etag: String,
    pub(super) size: u64,
    pub(super) id: u64,
    pub(super) modified_ms: i64,
    pub(super) checksums: BTreeMap<String, String>,
}

/// The index cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("the disk is full")]
    Full(#[source] Box<redb::Error>),
    #[error("the index cannot be read or written")]
    Index(#[source] Box<redb::Error>),
    #[error("the index holds a row of {table} that is not ours")]
    Row { table: &'static str, source: serde_json::Error },
    #[error("the index has format {found}, this version writes {FORMAT}")]
    Format { found: u64 },
    #[error("the index is closed")]
    Closed,
}

impl<E: Into<redb::Error>> From<E> for Broken {
    fn from(error: E) -> Self {
        let error = Box::new(error.into());
        match &*error {
            redb::Error::Io(cause) if crate::embedded::is_disk_full(cause) => Self::Full(error),
            _ => Self::Index(error),
        }
    }
}

pub(super) struct Index {
    path: PathBuf,
    /// After a failed write redb wants to be opened anew; readers hold this lock only while they begin.
    database: RwLock<Option<Database>>,
}

impl Index {
    /// Opens or creates the index and begins a new session, whose number no earlier one had.
    pub(super) fn open(path: &Path) -> Result<(Self, u64), Broken> {
        let index = Self { path: path.to_owned(), database: RwLock::new(Some(open_file(path)?)) };
        let writing = index.begin_write()?;
        let session = {
            let mut store = writing.open_table(STORE)?;
            let format = store.get("format")?.map_or(FORMAT, |it| it.value());
            if format != FORMAT {
                return Err(Broken::Format { found: format });
            }
            let session = store.get("session")?.map_or(0, |it| it.value()) + 1;
            store.insert("format", FORMAT)?;
            store.insert("session", session)?;
            session
        };
        // Readers refuse a table that does not exist.
        writing.open_table(BUCKETS)?;
        writing.open_table(OBJECTS)?;
        writing.open_table(SMALL)?;
        writing.open_table(FILES)?;
        writing.open_table(UPLOADS)?;
        writing.open_table(PARTS)?;
        writing.commit()?;
        Ok((index, session))
    }

    pub(super) fn begin_read(&self) -> Result<ReadTransaction, Broken> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        Ok(redb::ReadableDatabase::begin_read(database.as_ref().ok_or(Broken::Closed)?)?)
    }

    pub(super) fn begin_write(&self) -> Result<WriteTransaction, Broken> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        Ok(database.as_ref().ok_or(Broken::Closed)?.begin_write()?)
    }

    /// Opens the file anew: after an I/O error redb refuses everything until then.
    pub(super) fn reopen(&self) -> Result<(), Broken> {
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        *database = None;
        *database = Some(open_file(&self.path)?);
        Ok(())
    }

    /// Releases the file; everything answers [`Broken::Closed`] from here on.
    pub(super) fn close(&self) {
        *self.database.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn has_bucket(&self, bucket: &str) -> Result<bool, Broken> {
        Ok(self.begin_read()?.open_table(BUCKETS)?.get(bucket)?.is_some())
    }

    pub(super) fn buckets(&self) -> Result<Vec<(String, i64)>, Broken> {
        let reading = self.begin_read()?;
        let table = reading.open_table(BUCKETS)?;
        let mut buckets = Vec::new();
        for row in table.iter()? {
            let (name, created) = row?;
            buckets.push((name.value().to_owned(), created.value()));
        }
        Ok(buckets)
    }

    /// The object and its bytes where it is small, both from one moment.
    pub(super) fn object(&self, bucket: &str, key: &str) -> Result<Option<Found>, Broken> {
        let reading = self.begin_read()?;
        let Some(row) = reading.open_table(OBJECTS)?.get((bucket, key.as_bytes()))? else { return Ok(None) };
        let object: Object = decode("objects", row.value())?;
        let body = match object.place {
            Place::Small(id) => reading.open_table(SMALL)?.get(id)?.map(|it| it.value().to_vec()),
            Place::Files(_) => None,
        };
        Ok(Some((object, body)))
    }

    pub(super) fn upload(&self, id: &str) -> Result<Option<Upload>, Broken> {
        match self.begin_read()?.open_table(UPLOADS)?.get(id)? {
            Some(row) => decode("uploads", row.value()).map(Some),
            None => Ok(None),
        }
    }

    /// Every open upload with its id.
    pub(super) fn uploads(&self) -> Result<Vec<(String, Upload)>, Broken> {
        let reading = self.begin_read()?;
        let table = reading.open_table(UPLOADS)?;
        let mut uploads = Vec::new();
        for row in table.iter()? {
            let (id, upload) = row?;
            uploads.push((id.value().to_owned(), decode("uploads", upload.value())?));
        }
        Ok(uploads)
    }

    /// The parts of an upload behind part `after`, by number, at most `limit`.
    pub(super) fn parts(&self, id: &str, after: u16, limit: usize) -> Result<Vec<(u16, Part)>, Broken> {
        parts_in(&self.begin_read()?.open_table(PARTS)?, id, after, limit)
    }

    pub(super) fn refers_to(&self, id: u64) -> Result<bool, Broken> {
        Ok(self.begin_read()?.open_table(FILES)?.get(id)?.is_some())
    }
}

pub(super) fn parts_in(table: &impl ReadableTable<(&'static str, u16), &'static [u8]>, id: &str, after: u16, limit: usize) -> Result<Vec<(u16, Part)>, Broken> {
    let mut parts = Vec::new();
    for row in table.range((id, after.saturating_add(1))..=(id, u16::MAX))?.take(limit) {
        let (key, part) = row?;
        parts.push((key.value().1, decode("parts", part.value())?));
    }
    Ok(parts)
}

pub(super) fn decode<T: DeserializeOwned>(table: &'static str, row: &[u8]) -> Result<T, Broken> {
    serde_json::from_slice(row).map_err(|source| Broken::Row { table, source })
}

pub(super) fn encode(row: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(row).expect("plain structs with string keys always encode")
}

fn open_file(path: &Path) -> Result<Database, Broken> {
    let created = !path.exists();
    let database = Database::builder().set_cache_size(CACHE_BYTES).create(path)?;
    if created {
        crate::embedded::sync_parent(path).map_err(|error: io::Error| redb::Error::Io(error))?;
    }
    Ok(database)
}
