//! A table read again while the stream goes on, chunk by chunk, as Debezium's incremental snapshot does it (after Netflix's DBLog).
//!
//! A chunk is read between two marks in the WAL. Where the stream meets the second, the rows of the chunk follow as read events,
//! but for those that changed between the marks: of these the stream has told something newer. So nothing has to be locked, and
//! a row read never hides a change. What is to be read, and how far that came, is a row of `ledgerline.cdc_incremental_snapshot`
//! in the state database: it survives this process, and a table is read on where it was left.

mod requests;

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::TryStreamExt as _;
use sqlx::{Connection as _, PgConnection};
use tokio::sync::{mpsc, watch};

pub use self::requests::Request;
pub(super) use self::requests::Requests;
use super::{
    Config, catalog,
    copy_text::CopyRow,
    envelope::Table,
    error::Error,
    pgoutput::Value,
    progress::{LaneEnd, Store},
    source::{Source, quoted},
    stats::{IncrementalSnapshot, seconds_left},
};
use crate::{
    change::{TableId, Topics},
    fault::{Backoff, chain},
    secret::Secret,
    stream::topics,
};

/// The prefix of the marks. They reach no topic.
pub(super) const MARK: &str = "ledgerline.window";

/// How often new requests are looked for.
const INTERVAL: Duration = Duration::from_secs(2);
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Rows of a chunk: the first, and at most. Between them its bytes decide.
const ROWS_FIRST: usize = 512;
const ROWS_MAX: usize = 8192;
/// A chunk is held in memory until the stream has met its second mark.
const BYTES_WANTED: usize = 4 * 1024 * 1024;
const BYTES_MAX: usize = 32 * 1024 * 1024;

/// A place in the WAL, as the content of a mark tells it: `open <run> <chunk> <relation> <table>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark<'a> {
    pub(super) opens: bool,
    /// Marks of an earlier run may still lie in the WAL.
    pub(super) run: u64,
    pub(super) chunk: u64,
    pub(super) relation: u32,
    /// `public.accounts`.
    pub(super) table: &'a str,
}

impl<'a> Mark<'a> {
    fn written(self) -> String {
        format!("{} {} {} {} {}", if self.opens { "open" } else { "close" }, self.run, self.chunk, self.relation, self.table)
    }

    pub(super) fn read(content: &'a [u8]) -> Option<Self> {
        // A name may hold spaces, so it is the last.
        let mut words = std::str::from_utf8(content).ok()?.splitn(5, ' ');
        let opens = match words.next()? {
            "open" => true,
            "close" => false,
            _ => return None,
        };
        let (run, chunk, relation) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Self { opens, run, chunk, relation, table: words.next()? })
    }
}

/// Which transactions a chunk's reading could not see.
///
/// A commit lies in the WAL a moment before others see it (and long before with a slow synchronous standby). So one may lie before
/// the first mark and its rows not be in the chunk: the stream looks for such commits among those it has just passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unseen {
    /// This one and all after it.
    next: u32,
    open: Vec<u32>,
}

impl Unseen {
    /// From PostgreSQL's `xmin:xmax:xip,xip`. Of the ids the low half, as the stream has them.
    fn read(snapshot: &str) -> Option<Self> {
        let low = |text: &str| text.parse::<u64>().ok().and_then(|it| u32::try_from(it & u64::from(u32::MAX)).ok());
        let mut parts = snapshot.split(':').skip(1);
        let next = low(parts.next()?)?;
        let open = parts.next()?.split(',').filter(|it| !it.is_empty()).map(low).collect::<Option<_>>()?;
        Some(Self { next, open })
    }

    pub(super) fn holds(&self, xid: u32) -> bool {
        // Ids wrap round: what lies less than half of the circle ahead is later.
        xid.wrapping_sub(self.next) < 1 << 31 || self.open.contains(&xid)
    }
}

/// The rows between two marks, as COPY wrote them.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) number: u64,
    pub(super) table: Arc<Table>,
    pub(super) unseen: Unseen,
    pub(super) lines: Vec<Vec<u8>>,
}

/// What became of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Settled {
    pub(super) number: u64,
    /// The broker has every row of it. Otherwise it is to be read again.
    pub(super) acked: bool,
}

/// The stream's end of the talk with the reader.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) run: u64,
    pub(super) chunks: mpsc::Receiver<Chunk>,
    pub(super) settled: mpsc::UnboundedSender<Settled>,
}

/// What a reader is told once.
pub(super) struct Setup {
    pub(super) source: Source,
    pub(super) state: Secret,
    pub(super) config: Config,
    /// The snapshot that was cut short, where the requests are what is left of it.
    pub(super) finishing: Option<Finishing>,
}

/// What it takes to end the snapshot once all its tables are read.
pub(super) struct Finishing {
    pub(super) asking: topics::Topics,
    /// Of all captured tables.
    pub(super) topics: BTreeSet<String>,
}

/// A reader and the stream's end of it. The reader works until the other end is gone.
pub(super) fn reader(setup: Setup, told: watch::Sender<Option<IncrementalSnapshot>>) -> (Line, impl Future<Output = ()> + Send) {
    let (chunks_in, chunks) = mpsc::channel(1);
    let (settled, settled_out) = mpsc::unbounded_channel();
    let run = rand::random();
    let topics = Topics::new(&setup.config.topic_prefix);
    let mut reader = Reader { setup, topics, run, chunk: 0, rows_max: ROWS_FIRST, chunks: chunks_in, settled: settled_out, told };
    let work = async move { reader.work().await };
    (Line { run, chunks, settled }, work)
}

impl Finishing {
    async fn finish(&self, setup: &Setup) -> Result<(), Error> {
        let lanes = self.asking.watermarks(self.topics.clone()).await?;
        let ends: Vec<LaneEnd> = lanes.into_iter().map(LaneEnd::from).collect();
        let mut store = Store::open(&setup.state, &setup.config.topic_prefix).await?;
        store.finish(&ends).await?;
        store.close().await;
        tracing::info!("the snapshot that was cut short is whole");
        Ok(())
    }
}

struct Reader {
    setup: Setup,
    topics: Topics,
    run: u64,
    chunk: u64,
    rows_max: usize,
    chunks: mpsc::Sender<Chunk>,
    settled: mpsc::UnboundedReceiver<Settled>,
    told: watch::Sender<Option<IncrementalSnapshot>>,
}

/// The stream has ended; nobody waits for rows any more.
struct Gone;

/// What stands in the way of a table.
enum Trouble {
    Gone(Gone),
    Failed(Error),
    /// It will not pass by itself.
    Refused(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Gone> for Trouble {
    fn from(gone: Gone) -> Self {
        Self::Gone(gone)
    }
}

impl Reader {
    async fn work(&mut self) {
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
        loop {
            let wait = match self.read_what_is_asked_for().await {
                Ok(()) => {
                    backoff.reset();
                    INTERVAL
                }
                Err(Trouble::Gone(Gone)) => return,
                Err(Trouble::Refused(reason)) => {
                    // A snapshot without that table is not whole; the next start looks at it again.
                    self.setup.finishing = None;
                    tracing::error!(reason, "the incremental snapshot was given up");
                    INTERVAL
                }
                Err(Trouble::Failed(error)) => {
                    let delay = backoff.delay();
                    tracing::warn!(error = chain(&error), ?delay, "the incremental snapshot waits");
                    delay
                }
            };
            self.told.send_replace(None);
            tokio::select! {
                () = self.told.closed() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    async fn read_what_is_asked_for(&mut self) -> Result<(), Trouble> {
        let Some(mut requests) = Requests::look(&self.setup.state, &self.setup.config.topic_prefix).await? else { return Ok(()) };
        while let Some(request) = requests.next().await? {
            match self.read_table(&mut requests, &request).await {
                Ok(()) => {}
                Err(Trouble::Refused(reason)) => {
                    requests.fail(request.id, &reason).await?;
                    return Err(Trouble::Refused(reason));
                }
                Err(trouble) => return Err(trouble),
            }
        }
        requests.close().await;
        if let Some(finishing) = &self.setup.finishing {
            finishing.finish(&self.setup).await?;
            self.setup.finishing = None;
        }
        Ok(())
    }

    async fn read_table(&mut self, requests: &mut Requests, request: &Request) -> Result<(), Trouble> {
        let mut connection = self.setup.source.connect().await?;
        let wanted = catalog::wanted_tables(&mut connection, &self.setup.config).await?;
        let Some(id) = wanted.into_iter().find(|it| it.to_string() == request.table) else {
            return Err(Trouble::Refused(format!("{} is not among cdc.tables any more", request.table)));
        };
        let mut after = request.after_key.clone();
        let rows = catalog::rows_of(&mut connection, &id).await?;
        let rows_estimated = catalog::estimate(&mut connection, &id, &rows).await?;
        let mut progress = IncrementalSnapshot { table: request.table.clone(), rows: request.rows, rows_estimated, seconds_left: None };
        let began = Instant::now();
        tracing::info!(table = request.table, rows = request.rows, "reading the table again while the stream goes on");
        loop {
            self.told.send_replace(Some(progress.clone()));
            let read = self.read_chunk(&mut connection, &id, after.as_deref()).await?;
            progress.rows += u64::try_from(read.rows).unwrap_or(0);
            progress.seconds_left = seconds_left(began.elapsed(), progress.rows - request.rows, rows_estimated.saturating_sub(progress.rows));
            if !read.goes_on {
                break;
            }
            if let Some(key) = read.last_key {
                requests.note(request.id, &key, progress.rows).await?;
                after = Some(key);
            }
        }
        if self.setup.finishing.is_some() {
            let mut store = Store::open(&self.setup.state, &self.setup.config.topic_prefix).await?;
            store.note_read(std::slice::from_ref(&request.table)).await?;
            store.close().await;
        }
        requests.finish(request.id, progress.rows).await?;
        tracing::info!(table = request.table, rows = progress.rows, "the table was read again");
        let _ = connection.close().await;
        Ok(())
    }

    /// The chunk was too much, or too much changed under it: less of it next time.
    fn again(&mut self, after: Option<&[String]>) -> Read {
        self.rows_max = (self.rows_max / 8).max(1);
        Read { rows: 0, last_key: after.map(<[String]>::to_vec), goes_on: true }
    }

    /// Reads one chunk and waits until the broker has it.
    async fn read_chunk(&mut self, connection: &mut PgConnection, id: &TableId, after: Option<&[String]>) -> Result<Read, Trouble> {
        let (relation, key) = catalog::primary_key(connection, id).await?;
        if key.is_empty() {
            return Err(Trouble::Refused(Error::NoKey { table: id.to_string() }.to_string()));
        }
        let table = Arc::new(catalog::describe(connection, id, &self.topics).await?);
        let rows = catalog::rows_of(connection, id).await?;
        let statement = statement(&table, &key, &rows, after, self.rows_max);
        let name = id.to_string();
        self.chunk += 1;
        let mark = Mark { opens: true, run: self.run, chunk: self.chunk, relation, table: &name };
        emit(connection, mark).await?;
        let began = Instant::now();
        let (unseen, lines) = match copy(connection, &statement).await? {
            Some(read) => read,
            None => {
                // The rest of the answer is not wanted, so neither is the connection. The mark stays alone, and opens nothing.
                *connection = self.setup.source.connect().await?;
                return Ok(self.again(after));
            }
        };
        emit(connection, Mark { opens: false, ..mark }).await?;
        let bytes: usize = lines.iter().map(Vec::len).sum();
        let read = Read { rows: lines.len(), last_key: last_key(&table, &key, &lines)?, goes_on: lines.len() >= self.rows_max };
        self.rows_max = (BYTES_WANTED * lines.len().max(1) / bytes.max(1)).clamp(1, ROWS_MAX);
        let number = self.chunk;
        tracing::debug!(table = %id, rows = read.rows, bytes, took = ?began.elapsed(), "chunk read");
        self.chunks.send(Chunk { number, table, unseen, lines }).await.map_err(|_| Gone)?;
        let settled = loop {
            let settled = self.settled.recv().await.ok_or(Gone)?;
            if settled.number == number {
                break settled;
            }
        };
        if settled.acked { Ok(read) } else { Ok(self.again(after)) }
    }
}

/// How far a chunk came.
struct Read {
    rows: usize,
    last_key: Option<Vec<String>>,
    goes_on: bool,
}

/// A transaction of its own with nothing but the mark in it.
async fn emit(connection: &mut PgConnection, mark: Mark<'_>) -> Result<(), Error> {
    sqlx::query("select pg_logical_emit_message(true, $1, $2)")
        .bind(MARK)
        .bind(mark.written())
        .execute(connection)
        .await
        .map_err(|source| Error::Sql { what: "mark a window in the WAL", source })?;
    Ok(())
}

/// The rows that follow a key, in its order.
fn statement(table: &Table, key: &[catalog::KeyColumn], rows: &str, after: Option<&[String]>, rows_max: usize) -> String {
    let columns: Vec<String> = table.column_names().map(quoted).collect();
    let names: Vec<String> = key.iter().map(|it| quoted(&it.name)).collect();
    let follows = after.map_or_else(String::new, |values| {
        let values: Vec<String> = key.iter().zip(values).map(|(column, value)| format!("{}::{}", literal(value), column.type_name)).collect();
        format!(" where ({}) > ({})", names.join(", "), values.join(", "))
    });
    format!("copy (select {} from {rows}{follows} order by {} limit {rows_max}) to stdout", columns.join(", "), names.join(", "))
}

fn literal(text: &str) -> String {
    format!(" E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// The lines of a COPY, and which transactions it did not see; None where they are more than may be held.
async fn copy(connection: &mut PgConnection, statement: &str) -> Result<Option<(Unseen, Vec<Vec<u8>>)>, Error> {
    let sql = |source| Error::Sql { what: "copy a chunk out of the source", source };
    // A policy that would hide rows is an error: the stream knows no policies.
    sqlx::raw_sql("begin isolation level repeatable read read only; set local row_security = off").execute(&mut *connection).await.map_err(sql)?;
    let seen: String = sqlx::query_scalar("select pg_current_snapshot()::text").fetch_one(&mut *connection).await.map_err(sql)?;
    let unseen = Unseen::read(&seen).ok_or(Error::Progress { reason: "a snapshot is not one" })?;
    let mut answer = connection.copy_out_raw(statement).await.map_err(sql)?;
    let mut lines = Vec::new();
    let mut bytes = 0;
    while let Some(line) = answer.try_next().await.map_err(sql)? {
        bytes += line.len();
        // One row always may: what is larger than the broker takes is told there.
        if bytes > BYTES_MAX && !lines.is_empty() {
            return Ok(None);
        }
        lines.push(line.to_vec());
    }
    drop(answer);
    sqlx::raw_sql("commit").execute(connection).await.map_err(sql)?;
    Ok(Some((unseen, lines)))
}

/// The key of the last row, as PostgreSQL prints it.
fn last_key(table: &Table, key: &[catalog::KeyColumn], lines: &[Vec<u8>]) -> Result<Option<Vec<String>>, Error> {
    let Some(line) = lines.last() else { return Ok(None) };
    let unreadable = |source| Error::Row { table: table.id.to_string(), source };
    let mut row = CopyRow::default();
    row.read(line).map_err(unreadable)?;
    let values = row.values().collect::<Result<Vec<_>, _>>().map_err(|source| unreadable(source.into()))?;
    let text = |at: usize| match values.get(at) {
        Some(Value::Text(text)) => (*text).to_owned(),
        _ => String::new(),
    };
    let place = |column: &catalog::KeyColumn| table.column_names().position(|name| name == column.name).unwrap_or(usize::MAX);
    Ok(Some(key.iter().map(|column| text(place(column))).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_written() {
        let mark = Mark { opens: true, run: u64::MAX, chunk: 7, relation: 16_385, table: "public.with a space" };
        for mark in [mark, Mark { opens: false, ..mark }] {
            assert_eq!(Mark::read(mark.written().as_bytes()), Some(mark));
        }
        for content in [&b""[..], b"open 1 2 3", b"shut 1 2 3 t", b"open x 2 3 t", b"\xff"] {
            assert_eq!(Mark::read(content), None);
        }
    }

    #[test]
    fn a_commit_that_others_do_not_see_yet_is_found() {
        let unseen = Unseen::read("100:110:103,105").expect("a snapshot");
        let told: Vec<u32> = (99..113).filter(|it| unseen.holds(*it)).collect();
        assert_eq!(told, [103, 105, 110, 111, 112]);
        // The second time round: 2^32 + 2.
        let unseen = Unseen::read("4294967290:4294967298:").expect("a snapshot");
        assert!(unseen.holds(2) && unseen.holds(7) && !unseen.holds(1) && !unseen.holds(u32::MAX));
        assert_eq!([Unseen::read(""), Unseen::read("1:x:"), Unseen::read("1:2:x")], [None, None, None]);
    }

    #[test]
    fn text_stays_text_whatever_is_in_it() {
        assert_eq!(literal("it's a \\ back"), " E'it''s a \\\\ back'");
    }
}
