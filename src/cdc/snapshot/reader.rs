//! One reader of the snapshot: a thread with a connection of its own, which takes unit after unit until none is left.
//!
//! A thread, as the work is decoding and writing JSON, several times what PostgreSQL itself does for a row. Each has a producer of its
//! own, so between two rows readers share nothing; a few times in a unit they share the book of markers and receipts. What one producer
//! sends is in order; where the order between two of them counts, for the first and the last row of a table that several readers share,
//! the broker's acknowledgement is waited for.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::{TryStreamExt as _, future::select_all};
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
/// How long acknowledgements are waited for before looking again, should a producer's bell be missed.
const ACKED_WAIT: Duration = Duration::from_millis(100);

/// What all readers know.
pub(super) struct Reading {
    pub(super) source: Source,
    /// Exported by the slot.
    pub(super) snapshot: String,
    /// Of the readers, in turn.
    pub(super) producers: Vec<Producer>,
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
    /// Whether it is read in several units.
    pub(super) is_shared: bool,
    /// Whose producer sends its first row, and then its last.
    pub(super) home: OnceLock<usize>,
    pub(super) rows: AtomicU64,
    pub(super) n_readers: AtomicUsize,
}

impl Reading {
    /// Waits until the broker has all that the receipts count.
    pub(super) async fn acked(&self, receipts: &[Arc<Receipt>]) -> Result<(), Error> {
        while !receipts.iter().all(|it| it.is_acked()) {
            self.rung().await?;
        }
        Ok(())
    }

    /// Something was acknowledged, or a while has passed. For one listener.
    pub(super) async fn rung(&self) -> Result<(), Error> {
        self.producers.iter().try_for_each(Producer::check)?;
        let bells = select_all(self.producers.iter().map(|it| Box::pin(it.rung())));
        let _ = tokio::time::timeout(ACKED_WAIT, bells).await;
        Ok(())
    }
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
                    ended = read(number, reading, &told) => ended,
                }
            }),
        };
        // Nobody hears the end of a snapshot that was abandoned.
        let _ = told.send(ended);
        drop(alive);
    };
    std::thread::Builder::new().name(format!("cdc-read-{}", number + 1)).spawn(work).map(drop).map_err(Error::Thread)
}

async fn read(number: usize, reading: Arc<Reading>, told: &mpsc::UnboundedSender<News>) -> News {
    let mut connection = match reading.source.connect().await {
        Ok(connection) => connection,
        Err(Error::Sql { what, source }) if sqlstate(&source).as_deref() == Some("53300") => return News::Crowded(Error::Sql { what, source }),
        Err(error) => return News::Ended(Err(error)),
    };
    if let Err(error) = adopt(&mut connection, &reading.snapshot).await {
        return News::Ended(Err(error));
    }
    let _ = told.send(News::Reads);
    let mut reader = Reader::new(&reading, number);
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
    /// The place of its producer.
    own: usize,
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
    fn new(reading: &'a Reading, number: usize) -> Self {
        let envelope = || Envelope::new(&reading.topic_prefix, &reading.source.database);
        Self {
            reading,
            own: number % reading.producers.len(),
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
                    self.send(self.own, table, &self.held, &receipt).await?;
                } else {
                    self.mark(unit.table, |markers| markers.begins(unit.table, before)).await?;
                    has_begun = true;
                }
            }
            std::mem::swap(&mut self.held, &mut self.written);
        }
        rows.fetch_add(u64::from(ROWS_BY_CLOCK - self.rows_by_clock), Ordering::Relaxed);
        self.rows_by_clock = ROWS_BY_CLOCK;
        reading.producers[self.own].seal(&receipt);
        self.mark(unit.table, |markers| markers.ends(unit.table, held)).await
    }

    fn write(&mut self, table: &Table, line: &[u8], marker: &'static str) -> Result<(), Poison> {
        self.row.read(line)?;
        let origin = Origin { snapshot: Some(marker), ..self.reading.origin };
        self.written.write_new(table, b'r', self.row.values(), &origin, self.now)
    }

    async fn send(&self, producer: usize, table: &Table, event: &Envelope, receipt: &Arc<Receipt>) -> Result<(), Error> {
        let outgoing = Outgoing {
            topic: &table.topic,
            partition: None,
            key: table.has_key().then_some(&*event.key),
            value: Some(&event.value),
            headers: self.reading.context.as_ref(),
            timestamp_ms: millis(self.now),
        };
        Ok(self.reading.producers[producer].send(outgoing, receipt).await?)
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
            self.send_marked(&released, &mut book.receipts[released.table]).await?;
        }
        let is_open = book.markers.is_open();
        reading.open.send_if_modified(|it| !std::mem::replace(it, is_open) && is_open);
        Ok(())
    }

    /// A first row is before, and a last one behind, what other readers send of its table.
    async fn send_marked(&mut self, released: &Released<Bytes>, receipts: &mut Vec<Arc<Receipt>>) -> Result<(), Error> {
        let reading = self.reading;
        let ToRead { table, is_shared, home, .. } = &reading.tables[released.table];
        let unwritable = |source| Error::Row { table: table.id.to_string(), source };
        if *is_shared && released.is_last() {
            reading.acked(receipts).await?;
        }
        std::mem::swap(&mut self.marked, &mut self.written);
        let written = self.write(table, &released.row, released.marker);
        std::mem::swap(&mut self.marked, &mut self.written);
        written.map_err(unwritable)?;
        let (home, receipt) = (*home.get_or_init(|| self.own), Receipt::open());
        self.send(home, table, &self.marked, &receipt).await?;
        reading.producers[home].seal(&receipt);
        if *is_shared && released.is_first() {
            reading.producers[home].acked(&receipt).await?;
        }
        receipts.retain(|it| !it.is_acked());
        receipts.push(receipt);
        Ok(())
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
        Ok(self.reading.producers[self.own].send(outgoing, receipt).await?)
    }
}

/// Sends the very last row.
pub(super) async fn finish(reading: &Reading) -> Result<(), Error> {
    let mut book = reading.book.lock().await;
    let Some(last) = book.markers.finish() else { return Ok(()) };
    Reader::new(reading, 0).send_marked(&last, &mut book.receipts[last.table]).await
}
