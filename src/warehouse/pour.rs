//! Objects of the lake → one COPY: the next objects are fetched and the current one is encoded while the server still parses
//! what came before. What is fetched ahead shares a [`Room`], however many objects there are and however many loads run.

use std::sync::Arc;

use arrow_array::RecordBatch;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use sqlx::{PgConnection, postgres::PgCopyIn};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::{Error, While};
use crate::lake::{self, Dead, Decoded, Store, log::CommitRecord};

/// Objects fetched ahead of the one that is being sent, so that a thousand small ones are not a thousand round trips.
const AHEAD: usize = 8;

/// Memory for objects that are fetched and not yet sent, decoded, over all loads of a warehouse.
const ROOM_KIB: u32 = 64 * 1024;

/// How much larger an object is decoded than in the bucket: JSON shrinks to a tenth and less.
const SWELLS: u64 = 16;

/// How much is handed to the server at once: large enough that a chunk's overhead vanishes, small enough to keep in flight.
const CHUNK_BYTES: usize = 512 * 1024;

/// Encoded chunks waiting for the server.
const CHUNKS_AHEAD: usize = 2;

/// The memory that fetched objects take up, shared by all loads of a warehouse. An object larger than all of it has it alone.
#[derive(Debug, Clone)]
pub(crate) struct Room(Arc<Semaphore>);

impl Room {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Semaphore::new(ROOM_KIB as usize)))
    }

    /// Waits in line, so the object that is sent next is never behind one that is sent later.
    pub(crate) async fn take(&self, bytes: u64) -> Result<OwnedSemaphorePermit, Error> {
        let kib = u32::try_from(bytes.saturating_mul(SWELLS) / 1024 + 1).unwrap_or(ROOM_KIB).min(ROOM_KIB);
        Arc::clone(&self.0).acquire_many_owned(kib).await.map_err(|_| Error::Interrupted)
    }
}

/// How one batch of records becomes rows of a binary COPY.
pub(super) trait Encode: Clone + Send + 'static {
    fn encode(&self, record: &CommitRecord, batch: &RecordBatch, rows: &mut Rows);
}

/// The body of a binary COPY, growing.
#[derive(Debug, Default)]
pub(super) struct Rows {
    bytes: Vec<u8>,
}

impl Rows {
    /// What opens every binary COPY: signature, no flags, no extension.
    const HEADER: &'static [u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
    const TRAILER: &'static [u8] = &(-1_i16).to_be_bytes();

    pub(super) fn begin(&mut self, columns: i16) {
        self.bytes.extend_from_slice(&columns.to_be_bytes());
    }

    pub(super) fn null(&mut self) {
        self.bytes.extend_from_slice(&(-1_i32).to_be_bytes());
    }

    pub(super) fn field(&mut self, parts: [&[u8]; 2]) {
        let length = i32::try_from(parts[0].len() + parts[1].len()).expect("a Kafka message is far smaller than 2 GiB");
        self.bytes.extend_from_slice(&length.to_be_bytes());
        self.bytes.extend_from_slice(parts[0]);
        self.bytes.extend_from_slice(parts[1]);
    }

    pub(super) fn text(&mut self, text: &[u8]) {
        self.field([text, &[]]);
    }

    pub(super) fn integer(&mut self, number: i32) {
        self.text(&number.to_be_bytes());
    }

    pub(super) fn bigint(&mut self, number: i64) {
        self.text(&number.to_be_bytes());
    }
}

/// A COPY that has begun on a connection.
pub(super) struct Pour<'a> {
    copy: PgCopyIn<&'a mut PgConnection>,
    rows: Rows,
}

impl<'a> Pour<'a> {
    pub(super) async fn begin(connection: &'a mut PgConnection, into: &str) -> Result<Self, sqlx::Error> {
        let copy = connection.copy_in_raw(&format!("copy {into} from stdin (format binary)")).await?;
        Ok(Self { copy, rows: Rows { bytes: Rows::HEADER.to_vec() } })
    }

    /// Sends the rows of one batch that is already in memory.
    pub(super) async fn batch(&mut self, encode: &impl Encode, record: &CommitRecord, batch: &RecordBatch) -> Result<(), sqlx::Error> {
        encode.encode(record, batch, &mut self.rows);
        self.send().await
    }

    /// Sends all records of these objects, in order, each checked against its hash and its number of rows. Returns what each
    /// says of records that it does not hold.
    pub(super) async fn objects(&mut self, store: &Store, room: &Room, records: &[CommitRecord], encode: impl Encode) -> Result<Vec<Vec<Dead>>, Error> {
        let fetch = |record: CommitRecord| async move {
            let place = room.take(record.bytes).await?;
            let decoded = lake::read(store, &record).await.map_err(Error::Lake)?;
            Ok::<_, Error>((place, record, decoded))
        };
        let mut fetched = stream::iter(records.iter().cloned()).map(fetch).buffered(AHEAD);
        let mut all_dead = Vec::with_capacity(records.len());
        while let Some((_place, record, Decoded { batches, dead })) = fetched.try_next().await? {
            all_dead.push(dead);
            let (chunks, mut encoded) = mpsc::channel::<Bytes>(CHUNKS_AHEAD);
            let encode = encode.clone();
            let encoding = tokio::task::spawn_blocking(move || encode_all(&encode, &record, &batches, &chunks));
            while let Some(chunk) = encoded.recv().await {
                self.rows.bytes.extend_from_slice(&chunk);
                self.send().await.during("copy rows")?;
            }
            encoding.await.map_err(|_| Error::Interrupted)?;
        }
        Ok(all_dead)
    }

    async fn send(&mut self) -> Result<(), sqlx::Error> {
        if !self.rows.bytes.is_empty() {
            self.copy.send(self.rows.bytes.as_slice()).await?;
            self.rows.bytes.clear();
        }
        Ok(())
    }

    /// The server's word that it took every row.
    pub(super) async fn finish(mut self) -> Result<u64, sqlx::Error> {
        self.rows.bytes.extend_from_slice(Rows::TRAILER);
        self.send().await?;
        self.copy.finish().await
    }
}

/// A receiver that is gone means the COPY failed; its error is the one that counts.
fn encode_all(encode: &impl Encode, record: &CommitRecord, batches: &[RecordBatch], chunks: &mpsc::Sender<Bytes>) {
    const ROWS_AT_ONCE: usize = 256;
    let mut rows = Rows::default();
    for batch in batches {
        for first in (0..batch.num_rows()).step_by(ROWS_AT_ONCE) {
            encode.encode(record, &batch.slice(first, ROWS_AT_ONCE.min(batch.num_rows() - first)), &mut rows);
            if rows.bytes.len() >= CHUNK_BYTES && chunks.blocking_send(std::mem::take(&mut rows.bytes).into()).is_err() {
                return;
            }
        }
    }
    let _ = chunks.blocking_send(rows.bytes.into());
}
