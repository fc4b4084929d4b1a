//! The tables as they are when the slot begins → read events, with Debezium's markers.
//!
//! Several readers share the work, each with a connection that has adopted the snapshot which the slot exported: all see one moment.
//! One more connection, the asker's, sees it too; it plans, and holds every table locked against what a snapshot does not protect from
//! (`access share`, as `pg_dump` does: writers are not held up, but a column cannot be retyped nor the table dropped under the readers).
//! What the broker has of whole tables is written down as it comes: a snapshot that is cut short goes on from there.

mod markers;
mod reader;
mod units;

use std::{
    collections::BTreeSet,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use sqlx::{AssertSqlSafe, PgConnection};
use tokio::{
    sync::{Mutex, mpsc, watch},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;

use self::{
    markers::Markers,
    reader::{Book, News, Reading, ToRead},
    units::Unit,
};
use super::{
    catalog,
    envelope::Origin,
    error::Error,
    progress::Store,
    sending::micros,
    slot,
    source::Source,
    stats::{SnapshotProgress, seconds_left},
};
use crate::{
    change::{Lsn, TableId, Topics},
    fault::sqlstate,
    stream::producer::{Headers, Producer},
};

/// How often progress is told, and what the broker has written down.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// Producers that readers share: each keeps a queue.
const PRODUCERS_MAX: usize = 4;
/// A network forgets connections on which nothing moves, and the locks are worth nothing without theirs: so something does.
const ASK_EVERY: Duration = Duration::from_secs(20);

/// What is read, and under which snapshot.
pub(super) struct Plan<'a> {
    pub(super) source: &'a Source,
    pub(super) tables: &'a BTreeSet<TableId>,
    pub(super) topics: &'a Topics,
    /// Exported by the slot.
    pub(super) snapshot: &'a str,
    pub(super) consistent_point: Lsn,
    /// On every event.
    pub(super) context: Option<&'a Headers>,
    /// Readers at most.
    pub(super) readers: usize,
    /// How long one table may stay locked by somebody else.
    pub(super) lock_timeout: Duration,
    /// Rows that cannot become events are set aside; otherwise the first one is the end.
    pub(super) tolerates_errors: bool,
    /// Closed once no reader is left.
    pub(super) alive: mpsc::Sender<()>,
}

/// How far it is.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) progress: SnapshotProgress,
    /// Rows read of each table.
    pub(super) tables: Vec<(String, u64)>,
    pub(super) dead_letters: u64,
    /// Messages that wait for the broker.
    pub(super) queued: u64,
    pub(super) broker_away: bool,
    pub(super) waiting_for: Option<String>,
}

/// Reads every table and sends its rows; returns once the broker has them all. `connection` is busy until then.
pub(super) async fn take(
    plan: &Plan<'_>,
    connection: &mut PgConnection,
    producer: &Producer,
    store: &mut Store,
    mut tell: impl FnMut(&Told),
) -> Result<(), Error> {
    let sql = |source| Error::Sql { what: "read the tables under the slot's snapshot", source };
    reader::adopt(connection, plan.snapshot).await?;
    let n_tables = u64::try_from(plan.tables.len()).unwrap_or(0);
    let mut told = Told { progress: SnapshotProgress { tables: n_tables, ..Default::default() }, ..Default::default() };
    let mut locked = Vec::new();
    for table in plan.tables {
        let wait = |holder: &str| {
            told.waiting_for = Some(format!("{holder}, who has locked {table}"));
            tell(&told);
        };
        locked.push((table, lock(connection, table, plan.lock_timeout, wait).await?));
    }
    told.waiting_for = None;
    let (reading, rows_estimated) = prepare(plan, locked, connection, producer).await?;
    told.progress.rows_estimated = rows_estimated;
    let mut reading = Watched { reading: Arc::new(reading), began: Instant::now(), noted: BTreeSet::new(), told };
    let mut ask = tokio::time::interval(ASK_EVERY);
    let readers = readers(plan, &reading.reading)?;
    tokio::select! {
        read = reading.until_read(readers, store, &mut tell) => read?,
        error = async {
            loop {
                ask.tick().await;
                if let Err(error) = still_there(connection).await {
                    break error;
                }
            }
        } => return Err(error),
    }
    // The very last row is behind all others.
    reading.until_acked(store, &mut tell).await?;
    reader::finish(&reading.reading).await?;
    reading.until_acked(store, &mut tell).await?;
    sqlx::raw_sql("commit").execute(connection).await.map_err(sql)?;
    Ok(())
}

async fn still_there(connection: &mut PgConnection) -> Result<(), Error> {
    let sql = |source| Error::Sql { what: "hold the locks of the snapshot", source };
    let asked = tokio::time::timeout(ASK_EVERY, sqlx::raw_sql("select 1").execute(connection)).await;
    asked.map_err(|_| Error::Silent(ASK_EVERY))?.map(drop).map_err(sql)
}

/// Keeps a table as it is, but for its rows, until the snapshot is read. Tells who has it otherwise, and waits for that a while.
/// What its rows are selected from.
async fn lock(connection: &mut PgConnection, table: &TableId, timeout: Duration, mut wait: impl FnMut(&str)) -> Result<String, Error> {
    const POLL: Duration = Duration::from_millis(500);
    let sql = |source| Error::Sql { what: "lock a table for the snapshot", source };
    let gone = |error| match error {
        Error::Sql { source, .. } if sqlstate(&source).as_deref() == Some("42P01") => Error::Dropped { table: table.to_string() },
        error => error,
    };
    let rows = catalog::rows_of(connection, table).await.map_err(gone)?;
    let statement = format!("savepoint unlocked; set local lock_timeout = {}; lock table {rows} in access share mode; release unlocked", POLL.as_millis());
    let deadline = tokio::time::Instant::now() + timeout;
    loop {
        let Err(refused) = sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&mut *connection).await else { break };
        match sqlstate(&refused).as_deref() {
            Some("55P03") => {}
            Some("42501") => return Err(Error::Unreadable { table: table.to_string() }),
            _ => return Err(gone(sql(refused))),
        }
        sqlx::raw_sql("rollback to unlocked").execute(&mut *connection).await.map_err(sql)?;
        let holder = locker(connection, table).await?;
        if tokio::time::Instant::now() >= deadline {
            return Err(Error::Locked { table: table.to_string(), holder });
        }
        wait(&holder);
    }
    sqlx::raw_sql("set local lock_timeout = 0").execute(connection).await.map_err(sql)?;
    Ok(rows)
}

/// Who has locked a table, or waits for that in front of us.
async fn locker(connection: &mut PgConnection, table: &TableId) -> Result<String, Error> {
    const LOCKER: &str = "select pid from pg_locks where relation = to_regclass($1) and mode = 'AccessExclusiveLock' and pid <> pg_backend_pid()
            and database = (select oid from pg_database where datname = current_database()) order by granted desc limit 1";
    let asked = sqlx::query_scalar(LOCKER).bind(catalog::full_name(table)).fetch_optional(&mut *connection).await;
    let pid: Option<i32> = asked.map_err(|source| Error::Sql { what: "ask who has locked a table", source })?;
    match pid {
        Some(pid) => slot::holder(connection, pid).await,
        None => Ok("another transaction".to_owned()),
    }
}

/// All that readers need to know, and how many rows there are about.
async fn prepare(plan: &Plan<'_>, locked: Vec<(&TableId, String)>, connection: &mut PgConnection, producer: &Producer) -> Result<(Reading, u64), Error> {
    let sql = |source| Error::Sql { what: "read the tables under the slot's snapshot", source };
    let xid: i64 = sqlx::query_scalar("select txid_snapshot_xmax(txid_current_snapshot())").fetch_one(&mut *connection).await.map_err(sql)?;
    let (mut tables, mut units, mut n_units, mut rows_estimated) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for (place, (id, from)) in locked.into_iter().enumerate() {
        let size = units::size_of(connection, id).await?;
        rows_estimated += catalog::estimate(connection, id, &from).await?;
        let own = match plan.readers {
            0 | 1 => vec![Unit { table: place, blocks: None }],
            _ => units::of(place, &size),
        };
        n_units.push(own.len());
        let table = catalog::describe(connection, id, plan.topics).await?;
        tables.push(ToRead { table, from, is_shared: own.len() > 1, home: OnceLock::new(), rows: AtomicU64::new(0), n_readers: AtomicUsize::new(0) });
        units.extend(own);
    }
    let producers = producer.beside(n_readers(plan, &units).min(PRODUCERS_MAX))?;
    let book = Book { markers: Markers::new(n_units), receipts: vec![Vec::new(); tables.len()] };
    let origin = Origin {
        lsn: plan.consistent_point.0,
        at_us: micros(SystemTime::now()),
        // The low half, as the WAL has it.
        xid: u32::try_from(xid & i64::from(u32::MAX)).ok(),
        previous_commit: None,
        snapshot: None,
        order: None,
    };
    let reading = Reading {
        source: plan.source.clone(),
        snapshot: plan.snapshot.to_owned(),
        producers,
        context: plan.context.cloned(),
        topic_prefix: plan.topics.prefix().to_owned(),
        dead_letters_topic: plan.tolerates_errors.then(|| plan.topics.dead_letters()),
        dead_letters: AtomicU64::new(0),
        origin,
        tables,
        units,
        next: AtomicUsize::new(0),
        book: Mutex::new(book),
        open: watch::channel(false).0,
    };
    Ok((reading, rows_estimated))
}

/// Readers at work: told to stop when dropped.
struct Readers {
    news: mpsc::UnboundedReceiver<News>,
    n: usize,
    _stop: tokio_util::sync::DropGuard,
}

fn n_readers(plan: &Plan<'_>, units: &[Unit]) -> usize {
    plan.readers.clamp(1, units.len().max(1))
}

fn readers(plan: &Plan<'_>, reading: &Arc<Reading>) -> Result<Readers, Error> {
    let n = n_readers(plan, &reading.units);
    let (told, news) = mpsc::unbounded_channel();
    let stop = CancellationToken::new();
    let readers = Readers { news, n, _stop: stop.clone().drop_guard() };
    for number in 0..n {
        reader::start(number, Arc::clone(reading), stop.clone(), told.clone(), plan.alive.clone())?;
    }
    tracing::info!(readers = n, units = reading.units.len(), "the tables are being read");
    Ok(readers)
}

struct Watched {
    reading: Arc<Reading>,
    began: Instant,
    /// Tables that are written down as read.
    noted: BTreeSet<usize>,
    told: Told,
}

impl Watched {
    async fn until_read(&mut self, mut readers: Readers, store: &mut Store, tell: &mut impl FnMut(&Told)) -> Result<(), Error> {
        let mut ticks = tokio::time::interval(TELL_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut n_reading, mut n_crowded, mut n_ended, mut is_said) = (0, 0, 0, false);
        while n_crowded + n_ended < readers.n {
            tokio::select! {
                _ = ticks.tick() => {
                    self.look();
                    tell(&self.told);
                    self.note(store).await?;
                }
                news = readers.news.recv() => match news.ok_or(Error::Panicked)? {
                    News::Reads => n_reading += 1,
                    News::Crowded(error) if n_crowded + 1 == readers.n => return Err(error),
                    News::Crowded(_) => n_crowded += 1,
                    News::Ended(ended) => {
                        ended?;
                        n_ended += 1;
                    }
                }
            }
            if n_crowded > 0 && n_reading + n_crowded == readers.n && !std::mem::replace(&mut is_said, true) {
                tracing::warn!(
                    readers = n_reading,
                    wanted = readers.n,
                    "the source has no connection left for more readers of the snapshot (max_connections, or the role's limit); these read it all"
                );
            }
        }
        Ok(())
    }

    /// Waits until the broker has everything that was sent. Readers have ended, so nobody else has the book.
    async fn until_acked(&mut self, store: &mut Store, tell: &mut impl FnMut(&Told)) -> Result<(), Error> {
        loop {
            let is_acked = self.reading.book.lock().await.receipts.iter().flatten().all(|it| it.is_acked());
            self.look();
            if is_acked {
                self.told.progress.seconds_left = None;
            }
            tell(&self.told);
            self.note(store).await?;
            if is_acked {
                return Ok(());
            }
            self.reading.rung().await?;
        }
    }

    /// Brings what is told up to date. The book may lie with a reader that waits for the broker: then it says what it said before.
    fn look(&mut self) {
        let reading = &self.reading;
        let progress = &mut self.told.progress;
        self.told.tables = reading.tables.iter().map(|it| (it.table.id.to_string(), it.rows.load(Ordering::Relaxed))).collect();
        self.told.dead_letters = reading.dead_letters.load(Ordering::Relaxed);
        self.told.queued = reading.producers.iter().map(Producer::n_waiting).sum();
        self.told.broker_away = reading.producers.iter().any(Producer::is_broker_away);
        progress.rows = self.told.tables.iter().map(|it| it.1).sum();
        progress.seconds_left = seconds_left(self.began.elapsed(), progress.rows, progress.rows_estimated.saturating_sub(progress.rows));
        let being_read = reading.tables.iter().filter(|it| it.n_readers.load(Ordering::Relaxed) > 0);
        progress.reading = being_read.map(|it| it.table.id.to_string()).collect();
        if let Ok(book) = reading.book.try_lock() {
            progress.tables_done = u64::try_from(book.markers.n_ended()).unwrap_or(0);
        }
    }

    /// Writes down which tables the broker has as a whole.
    async fn note(&mut self, store: &mut Store) -> Result<(), Error> {
        let reading = &self.reading;
        let whole: Vec<usize> = match reading.book.try_lock() {
            Ok(book) => {
                let is_whole = |table: &usize| book.markers.is_over(*table) && book.receipts[*table].iter().all(|it| it.is_acked());
                (0..reading.tables.len()).filter(|it| !self.noted.contains(it)).filter(is_whole).collect()
            }
            Err(_) => return Ok(()),
        };
        if !whole.is_empty() {
            let names: Vec<String> = whole.iter().map(|it| reading.tables[*it].table.id.to_string()).collect();
            store.note_read(&names).await?;
            self.noted.extend(whole);
        }
        Ok(())
    }
}
