//! One reader of the snapshot: a thread with a connection of its own, which takes unit after unit until none is left.
//!
//! A thread, as the work is decoding and writing JSON, several times what PostgreSQL itself does for a row. Readers share the producer's
//! queue and, a few times in a unit, the book of markers and receipts; between two rows they share nothing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::sync::{Mutex, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    markers::{BETWEEN, Markers, Released},
    units::{self, Unit},
};
use crate::{
    cdc::{
        copy_text::CopyRow,
        dead_letter,
        envelope::{Envelope, Origin, Table},
        error::{Error, Poison},
        sending::millis,
        source::Source,
    },
    change::Lsn,
    fault::sqlstate,
    stream::producer::{Headers, Outgoing, Producer, Receipt},
};

/// Rows that share one look at the clock, and are counted at once.
const ROWS_BY_CLOCK: u32 = 64;

/// What all readers know.
pub(super) struct Reading {
    pub(super) source: Source,
    /// Exported by the slot.
    pub(super) snapshot: String,
    pub(super) producer: Arc<Producer>,
    /// On every event.
    pub(super) context: Option<Headers>,
    pub(super) topic_prefix: String,
    /// Where rows go that cannot become events; None: the first one is the end.
    pub(super) dead_letters_topic: Option<String>,
    pub(super) dead_letters: AtomicU64,
    pub(super) origin: Origin,
    pub(super) tables: Vec<ToRead>,
    pub(super) units: Vec<Unit>,
    /// The next unit that nobody has taken.
    pub(super) next: AtomicUsize,
    pub(super) book: Mutex<Book>,
    /// Whether rows of other tables than the first may go.
    pub(super) open: watch::Sender<bool>,
}

pub(super) struct ToRead {
    pub(super) table: Table,
    /// What its rows are selected from.
    pub(super) from: String,
    pub(super) rows: AtomicU64,
    pub(super) n_readers: AtomicUsize,
}

/// What has become of the tables.
pub(super) struct Book {
    pub(super) markers: Markers<Bytes>,
    /// By table: what was sent of it and may not be acknowledged yet.
    pub(super) receipts: Vec<Vec<Arc<Receipt>>>,
}

/// What the one who asked for the snapshot hears of a reader.
pub(super) enum News {
    /// It has adopted the snapshot, and reads.
    Reads,
    /// The server has no connection left for it.
    Crowded(Error),
    Ended(Result<(), Error>),
}

/// Sees the tables as the slot's snapshot does, for as long as it takes: none of the limits that an administrator sets for the statements
/// of people is meant for this, as with `pg_dump`. A policy that would hide rows is an error, also as there: the stream knows no policies.
pub(super) async fn adopt(connection: &mut PgConnection, snapshot: &str) -> Result<(), Error> {
    const SETTINGS: &str = "set local statement_timeout = 0; set local lock_timeout = 0; set local idle_in_transaction_session_timeout = 0;
        set local row_security = off; select set_config(name, '0', true) from pg_settings where name = 'transaction_timeout'";
    // The name comes from the server; it holds digits and dashes only.
    let begin = format!("begin isolation level repeatable read read only; set transaction snapshot '{}'; {SETTINGS}", snapshot.replace('\'', ""));
    let adopted = sqlx::raw_sql(AssertSqlSafe(begin)).execute(connection).await;
    adopted.map(drop).map_err(|source| match sqlstate(&source).as_deref() {
        // Whoever exported it is gone.
        Some("22023" | "42704") => Error::SnapshotGone,
        _ => Error::Sql { what: "adopt the slot's snapshot", source },
    })
}

/// Starts a reader; it ends with its work, or when it is told to stop.
pub(super) fn start(
    number: usize,
    reading: Arc<Reading>,
    stop: CancellationToken,
    told: mpsc::UnboundedSender<News>,
    alive: mpsc::Sender<()>,
) -> Result<(), Error> {
    let work = move || {
        let ended = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Err(error) => News::Ended(Err(Error::Thread(error))),
            Ok(runtime) => runtime.block_on(async {
                tokio::select! {
                    () = stop.cancelled() => News::Ended(Ok(())),
                    ended = read(reading, &told) => ended,
                }
            }),
        };
        // Nobody hears the end of a snapshot that was abandoned.
        let _ = told.send(ended);
        drop(alive);
    };
    std::thread::Builder::new().name(format!("cdc-read-{number}")).spawn(work).map(drop).map_err(Error::Thread)
}

async fn read(reading: Arc<Reading>, told: &mpsc::UnboundedSender<News>) -> News {
    let mut connection = match reading.source.connect().await {
        Ok(connection) => connection,
        Err(Error::Sql { what, source }) if sqlstate(&source).as_deref() == Some("53300") => return News::Crowded(Error::Sql { what, source }),
        Err(error) => return News::Ended(Err(error)),
    };
    if let Err(error) = adopt(&mut connection, &reading.snapshot).await {
        return News::Ended(Err(error));
    }
    let _ = told.send(News::Reads);
    let mut reader = Reader::new(&reading);
    while let Some(unit) = reading.units.get(reading.next.fetch_add(1, Ordering::Relaxed)) {
        let table = &reading.tables[unit.table];
        table.n_readers.fetch_add(1, Ordering::Relaxed);
        let read = reader.read(&mut connection, *unit).await;
        table.n_readers.fetch_sub(1, Ordering::Relaxed);
        if let Err(error) = read {
            return News::Ended(Err(error));
        }
    }
    let _ = connection.close().await;
    News::Ended(Ok(()))
}

struct Reader<'a> {
    reading: &'a Reading,
    row: CopyRow,
    /// The row before the one that is being written: it goes once that is known to be writable, as a row between others.
    held: Envelope,
    written: Envelope,
    /// A row with another marker: what is held and what was written last are still to be sent.
    marked: Envelope,
    letter: Vec<u8>,
    now: SystemTime,
    /// Rows until the clock is looked at again.
    rows_by_clock: u32,
}

impl<'a> Reader<'a> {
    fn new(reading: &'a Reading) -> Self {
        let envelope = || Envelope::new(&reading.topic_prefix, &reading.source.database);
        Self {
            reading,
            row: CopyRow::default(),
            held: envelope(),
            written: envelope(),
            marked: envelope(),
            letter: Vec::new(),
            now: SystemTime::now(),
            rows_by_clock: ROWS_BY_CLOCK,
        }
    }

    async fn read(&mut self, connection: &mut PgConnection, unit: Unit) -> Result<(), Error> {
        let reading = self.reading;
        let ToRead { table, from, rows, .. } = &reading.tables[unit.table];
        let failed = |source| Error::Unread { table: table.id.to_string(), source };
        let receipt = Receipt::open();
        reading.book.lock().await.receipts[unit.table].push(Arc::clone(&receipt));
        let statement = units::statement(table, from, unit.blocks);
        let mut lines = connection.copy_out_raw(&statement).await.map_err(failed)?;
        self.now = SystemTime::now();
        let mut held: Option<Bytes> = None;
        let mut has_begun = false;
        while let Some(line) = lines.try_next().await.map_err(failed)? {
            self.rows_by_clock -= 1;
            if self.rows_by_clock == 0 {
                (self.now, self.rows_by_clock) = (SystemTime::now(), ROWS_BY_CLOCK);
                rows.fetch_add(u64::from(ROWS_BY_CLOCK), Ordering::Relaxed);
            }
            if let Err(poison) = self.write(table, &line, BETWEEN) {
                self.set_aside(table, &line, poison, &receipt).await?;
                continue;
            }
            if let Some(before) = held.replace(line) {
                if has_begun {
                    self.send(table, &self.held, &receipt).await?;
                } else {
                    self.mark(unit.table, |markers| markers.begins(unit.table, before)).await?;
                    has_begun = true;
                }
            }
            std::mem::swap(&mut self.held, &mut self.written);
        }
        rows.fetch_add(u64::from(ROWS_BY_CLOCK - self.rows_by_clock), Ordering::Relaxed);
        self.rows_by_clock = ROWS_BY_CLOCK;
        reading.producer.seal(&receipt);
        self.mark(unit.table, |markers| markers.ends(unit.table, held)).await
    }

    fn write(&mut self, table: &Table, line: &[u8], marker: &'static str) -> Result<(), Poison> {
        self.row.read(line)?;
        let origin = Origin { snapshot: Some(marker), ..self.reading.origin };
        self.written.write_new(table, b'r', self.row.values(), &origin, self.now)
    }

    async fn send(&self, table: &Table, event: &Envelope, receipt: &Arc<Receipt>) -> Result<(), Error> {
        let outgoing = Outgoing {
            topic: &table.topic,
            partition: None,
            key: table.has_key().then_some(&*event.key),
            value: Some(&event.value),
            headers: self.reading.context.as_ref(),
            timestamp_ms: millis(self.now),
        };
        Ok(self.reading.producer.send(outgoing, receipt).await?)
    }

    /// Sends what may go now that a unit of `table` has begun or ended, under the book's lock: nothing comes between.
    async fn mark(&mut self, table: usize, change: impl FnOnce(&mut Markers<Bytes>) -> Vec<Released<Bytes>>) -> Result<(), Error> {
        let reading = self.reading;
        if table > 0 {
            // An error means that the snapshot was given up.
            let _ = reading.open.subscribe().wait_for(|it| *it).await;
        }
        let mut book = reading.book.lock().await;
        for released in change(&mut book.markers) {
            let receipt = self.send_marked(released.table, &released.row, released.marker).await?;
            book.receipts[released.table].retain(|it| !it.is_acked());
            book.receipts[released.table].push(receipt);
        }
        let is_open = book.markers.is_open();
        reading.open.send_if_modified(|it| !std::mem::replace(it, is_open) && is_open);
        Ok(())
    }

    async fn send_marked(&mut self, table: usize, line: &[u8], marker: &'static str) -> Result<Arc<Receipt>, Error> {
        let table = &self.reading.tables[table].table;
        let unwritable = |source| Error::Row { table: table.id.to_string(), source };
        let receipt = Receipt::open();
        std::mem::swap(&mut self.marked, &mut self.written);
        let written = self.write(table, line, marker);
        std::mem::swap(&mut self.marked, &mut self.written);
        written.map_err(unwritable)?;
        self.send(table, &self.marked, &receipt).await?;
        self.reading.producer.seal(&receipt);
        Ok(receipt)
    }

    async fn set_aside(&mut self, table: &Table, line: &[u8], poison: Poison, receipt: &Arc<Receipt>) -> Result<(), Error> {
        let lsn = Lsn(self.reading.origin.lsn);
        let Some(topic) = &self.reading.dead_letters_topic else {
            return Err(Error::Poison { table: table.id.to_string(), lsn, source: poison });
        };
        tracing::error!(error = %poison, table = %table.id, "a row of the snapshot cannot become an event; it goes to the dead letters");
        self.reading.dead_letters.fetch_add(1, Ordering::Relaxed);
        dead_letter::write(&mut self.letter, &poison, Some(&table.id), "r", line, self.reading.origin.xid, lsn);
        let outgoing = Outgoing { topic, partition: Some(0), key: None, value: Some(&self.letter), headers: None, timestamp_ms: millis(self.now) };
        Ok(self.reading.producer.send(outgoing, receipt).await?)
    }
}

/// Sends the very last row.
pub(super) async fn finish(reading: &Reading) -> Result<(), Error> {
    let last = reading.book.lock().await.markers.finish();
    let Some(last) = last else { return Ok(()) };
    let receipt = Reader::new(reading).send_marked(last.table, &last.row, last.marker).await?;
    reading.book.lock().await.receipts[last.table].push(receipt);
    Ok(())
}
