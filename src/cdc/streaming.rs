//! Replication events → messages on their way to the broker, and acknowledgements → positions for the slot.
//!
//! Owns everything that exists only while the stream flows: the transaction being received, the tables as the stream
//! described them, and the ledger of what is not yet acknowledged.

mod filter;
mod window;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use chrono::DateTime;
use pgwire_replication::ReplicationEvent;
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;

pub(super) use self::filter::Filter;
use self::window::{Passed, Window};
use super::{
    boundaries::{self, Transaction},
    catalog::{self, KeyNames},
    dead_letter,
    envelope::{Envelope, Origin, Table, Update},
    error::{Error, Poison},
    heartbeat::{self, Position, Server},
    incremental::{self, Line, Settled},
    ledger::{Ledger, Meaning},
    pgoutput::{self, Message, Old, Relation, Tuple},
    prepare,
    sending::{Flow, Sent, Wire, micros, millis, send},
    source::Source,
    stats::{Stats, TableStats},
};
use crate::{
    change::{Lsn, TableId, Topics},
    latency::Histogram,
    stream::{
        self,
        producer::{Headers, Outgoing, Producer, Receipt},
    },
};

/// PostgreSQL counts microseconds from 2000, the rest of the world from 1970.
const EPOCH_2000_US: i64 = 946_684_800_000_000;
/// While changes flow, a position is written down this often: a crash repeats at most about this much.
const POSITION_INTERVAL: Duration = Duration::from_secs(1);
/// How long the catalog may take to answer about one table.
const DESCRIBED_MAX: Duration = Duration::from_secs(30);
/// When all is acknowledged and only other tables' WAL moves, the slot follows this fast.
const POSITION_INTERVAL_IDLE: Duration = Duration::from_millis(250);

/// What the streaming is told once.
pub(super) struct Setup {
    pub(super) source: Source,
    pub(super) topics: Topics,
    pub(super) filter: Filter,
    /// Topics of tables that are there.
    pub(super) made: HashSet<String>,
    pub(super) stream: stream::Config,
    pub(super) asking: stream::topics::Topics,
    /// To the reader of incremental snapshots.
    pub(super) line: Line,
    pub(super) transaction_metadata: bool,
    pub(super) skips_truncate: bool,
    /// Rows that cannot become events are set aside; otherwise the first one is the end.
    pub(super) tolerates_errors: bool,
    /// On every event of a table.
    pub(super) context: Option<Headers>,
    pub(super) heartbeat: Duration,
    /// Where the slot began.
    pub(super) snapshot: Lsn,
    /// Where it stands now.
    pub(super) confirmed: Lsn,
    pub(super) last_commit: Option<Lsn>,
    pub(super) server: Server,
}

/// A table of the stream, its key for the day it is dropped, and its count.
struct Described {
    table: Table,
    key: KeyNames,
    counted: TableStats,
}

pub(super) struct Streaming {
    setup: Setup,
    envelope: Envelope,
    producer: Arc<Producer>,
    stop: CancellationToken,
    catalog: Option<PgConnection>,
    tables: HashMap<u32, Described>,
    /// Relations of which nothing becomes an event.
    foreign: HashSet<u32>,
    window: Option<Window>,
    passed: Passed,
    /// Rows read again, by table.
    reread: BTreeMap<String, u64>,
    transaction: Option<Transaction>,
    /// Of the batch being filled.
    receipt: Arc<Receipt>,
    ledger: Ledger,
    boundaries_topic: String,
    heartbeat_topic: String,
    heartbeat_key: Vec<u8>,
    messages_topic: String,
    dead_letters_topic: String,
    last_commit: Option<Lsn>,
    last_commit_at_us: i64,
    /// The furthest position at which no transaction is open, and the last one written down.
    position: Lsn,
    written: Lsn,
    written_at: Instant,
    latency: Histogram,
    scratch: (Vec<u8>, Vec<u8>),
    /// The time of the events being taken: a look at the clock for each row costs more than its JSON on some machines.
    now: SystemTime,
}

impl Streaming {
    pub(super) fn new(setup: Setup, envelope: Envelope, producer: Arc<Producer>, stop: CancellationToken) -> Self {
        let topics = &setup.topics;
        Self {
            boundaries_topic: topics.boundaries(),
            heartbeat_topic: topics.heartbeat(),
            heartbeat_key: heartbeat::key(topics.prefix()),
            messages_topic: format!("{}.message", topics.prefix()),
            dead_letters_topic: topics.dead_letters(),
            last_commit: setup.last_commit,
            last_commit_at_us: 0,
            position: setup.confirmed,
            written: setup.confirmed,
            // The first is due at once: it tells which server this is, should another stand behind the address next time.
            written_at: Instant::now().checked_sub(setup.heartbeat).unwrap_or_else(Instant::now),
            setup,
            envelope,
            producer,
            stop,
            catalog: None,
            tables: HashMap::new(),
            foreign: HashSet::new(),
            window: None,
            passed: Passed::default(),
            reread: BTreeMap::new(),
            transaction: None,
            receipt: Receipt::open(),
            ledger: Ledger::default(),
            latency: Histogram::default(),
            scratch: (Vec::new(), Vec::new()),
            now: SystemTime::now(),
        }
    }

    pub(super) fn producer(&self) -> Arc<Producer> {
        Arc::clone(&self.producer)
    }

    /// Whether more may be taken from the slot.
    pub(super) fn has_room(&self) -> bool {
        !self.ledger.is_full()
    }

    /// Whether everything sent is acknowledged and every position written down.
    pub(super) fn is_settled(&self) -> bool {
        self.ledger.is_empty() && self.position <= self.written
    }

    /// These tables turned out to have rows from before they could be captured.
    pub(super) fn leave_out(&mut self, tables: &[String]) {
        self.setup.filter.leave_out(tables);
    }

    /// The events that follow came now.
    pub(super) fn look_at_clock(&mut self) {
        self.now = SystemTime::now();
    }

    /// Takes one event. Not cancel-safe: an event is either wholly sent or the stream is given up.
    pub(super) async fn take(&mut self, event: ReplicationEvent, stats: &mut Stats) -> Result<Flow, Error> {
        match event {
            ReplicationEvent::XLogData { wal_start, data, .. } => {
                let lsn = Lsn(wal_start.as_u64());
                stats.received_lsn = stats.received_lsn.max(lsn);
                self.row_message(lsn, &data, stats).await
            }
            ReplicationEvent::Begin { xid, commit_time_micros, .. } => {
                self.transaction = Some(Transaction::new(xid, commit_time_micros + EPOCH_2000_US));
                Ok(Flow::On)
            }
            ReplicationEvent::Commit { end_lsn, .. } => self.commit(Lsn(end_lsn.as_u64()), stats).await,
            ReplicationEvent::Message { transactional, lsn, prefix, content } => {
                let lsn = Lsn(lsn.as_u64());
                if prefix == incremental::MARK {
                    self.mark(lsn, &content, stats).await
                } else {
                    self.logical_message(transactional, lsn, &prefix, &content).await
                }
            }
            ReplicationEvent::KeepAlive { wal_end, .. } => {
                let lsn = Lsn(wal_end.as_u64());
                stats.received_lsn = stats.received_lsn.max(lsn);
                // Nothing of ours lies before it, unless a transaction is just being received.
                if self.transaction.is_none() {
                    self.position = self.position.max(lsn);
                }
                Ok(Flow::On)
            }
            ReplicationEvent::StoppedAt { .. } => Err(Error::Ended),
        }
    }

    async fn row_message(&mut self, lsn: Lsn, data: &[u8], stats: &mut Stats) -> Result<Flow, Error> {
        match pgoutput::decode(data) {
            Ok(Message::Insert { relation, new }) => self.row(lsn, data, relation, Row::Insert(new), stats).await,
            Ok(Message::Update { relation, old, new }) => self.row(lsn, data, relation, Row::Update(old, new), stats).await,
            Ok(Message::Delete { relation, old }) => self.row(lsn, data, relation, Row::Delete(old), stats).await,
            Ok(Message::Relation(relation)) => {
                self.describe(&relation).await?;
                Ok(Flow::On)
            }
            Ok(Message::Truncate { mut relations }) => {
                relations.retain(|id| !self.foreign.contains(id));
                if relations.is_empty() {
                    return Ok(Flow::On);
                }
                stats.truncates += 1;
                if let Some(window) = self.window.as_mut().filter(|it| relations.contains(&it.relation)) {
                    window.empty();
                }
                if !self.setup.skips_truncate {
                    return self.truncate(lsn, &relations).await;
                }
                let tables: Vec<String> = relations.iter().filter_map(|id| Some(self.tables.get(id)?.table.id.to_string())).collect();
                tracing::warn!(?tables, %lsn, "a table was truncated; as with Debezium's defaults, no event tells so");
                self.begin(lsn).await
            }
            Ok(Message::Other) => Ok(Flow::On),
            // A row that cannot even be taken apart is set aside; a relation that cannot makes all rows after it unreadable.
            Err(malformed) => match pgoutput::relation_of(data) {
                Some(relation) => self.row(lsn, data, relation, Row::Malformed(malformed), stats).await,
                None => Err(Error::Decode { lsn, source: malformed }),
            },
        }
    }

    /// Learns a table's shape. The catalog is asked each time: a key may have changed together with the columns.
    async fn describe(&mut self, relation: &Relation<'_>) -> Result<(), Error> {
        let id = TableId { schema: relation.schema.to_owned(), table: relation.table.to_owned() };
        let filter = &self.setup.filter;
        match filter.names(&id) && !filter.leaves_out(&id) {
            true => self.foreign.remove(&relation.id),
            false => self.foreign.insert(relation.id),
        };
        // The server describes a table once: one that is left out may be admitted yet.
        if !filter.names(&id) {
            return Ok(());
        }
        let topic = self.setup.topics.table(&id);
        if !self.setup.made.contains(&topic) {
            prepare::ensure_topics(&self.setup.asking, &self.setup.topics, &BTreeSet::from([id]), &self.setup.stream).await?;
            self.setup.made.insert(topic);
        }
        let mut connection = match self.catalog.take() {
            Some(open) => open,
            None => self.setup.source.connect().await?,
        };
        let before = self.tables.get(&relation.id);
        let counted = before.map(|it| it.counted).unwrap_or_default();
        let xid = self.transaction.as_ref().map(|it| it.xid);
        let describing = async {
            if let Some(xid) = xid {
                catalog::wait_until_seen(&mut connection, xid).await?;
            }
            catalog::describe_relation(&mut connection, relation, before.map(|it| &it.key), &self.setup.topics).await
        };
        // The connection has been idle since the last one, and a network may have forgotten it without a word.
        let described = tokio::time::timeout(DESCRIBED_MAX, describing).await.unwrap_or(Err(Error::Silent(DESCRIBED_MAX)));
        // Where the description failed the connection is not kept: it may be what failed.
        let (table, key) = described?;
        self.catalog = Some(connection);
        tracing::debug!(table = %table.id, columns = table.n_columns(), "table described");
        self.tables.insert(relation.id, Described { table, key, counted });
        Ok(())
    }

    /// Sends BEGIN before the first event of a transaction: only then is the LSN known that Debezium gives it.
    async fn begin(&mut self, lsn: Lsn) -> Result<Flow, Error> {
        let Some(transaction) = self.transaction.as_mut().filter(|it| !it.begun) else { return Ok(Flow::On) };
        transaction.begun = true;
        if !self.setup.transaction_metadata {
            return Ok(Flow::On);
        }
        let (key, value) = &mut self.scratch;
        boundaries::write_key(key, transaction, lsn.0);
        boundaries::write_begin(value, transaction, lsn.0);
        let outgoing =
            Outgoing { topic: &self.boundaries_topic, partition: Some(0), key: Some(key), value: Some(value), headers: None, timestamp_ms: millis(self.now) };
        send(&self.producer, &self.stop, outgoing, &self.receipt).await
    }

    /// One event for each table, without a key: it is about all rows.
    async fn truncate(&mut self, lsn: Lsn, relations: &[u32]) -> Result<Flow, Error> {
        let mut flow = self.begin(lsn).await?;
        for relation in relations {
            let Some(Described { table, .. }) = self.tables.get(relation) else { continue };
            if let Flow::Stopped = flow {
                break;
            }
            let order = self.transaction.as_mut().map(|it| it.count(*relation)).filter(|_| self.setup.transaction_metadata);
            let (xid, at_us) = self.transaction.as_ref().map_or((None, 0), |it| (Some(it.xid), it.committed_at_us));
            let origin = Origin { lsn: lsn.0, at_us, xid, previous_commit: self.last_commit.map(|it| it.0), snapshot: None, order };
            self.envelope.write_truncate(table, &origin, self.now);
            let wire = Wire { producer: &self.producer, stop: &self.stop, receipt: &self.receipt, now: self.now, context: self.setup.context.as_ref() };
            flow = wire.event(table, &self.envelope).await?;
        }
        Ok(flow)
    }

    async fn row(&mut self, lsn: Lsn, data: &[u8], relation: u32, row: Row<'_>, stats: &mut Stats) -> Result<Flow, Error> {
        if self.foreign.contains(&relation) {
            return Ok(Flow::On);
        }
        if let Flow::Stopped = self.begin(lsn).await? {
            return Ok(Flow::Stopped);
        }
        let metadata = self.setup.transaction_metadata;
        let order = self.transaction.as_mut().map(|it| it.count(relation));
        let (xid, at_us) = self.transaction.as_ref().map_or((None, 0), |it| (Some(it.xid), it.committed_at_us));
        let previous_commit = self.last_commit.map(|it| it.0);
        let origin = Origin { lsn: lsn.0, at_us, xid, previous_commit, snapshot: None, order: order.filter(|_| metadata) };
        let Some(Described { table, counted, .. }) = self.tables.get_mut(&relation) else {
            return self.dead_letter(lsn, data, Some(relation), &Poison::UnknownRelation { relation }, stats).await;
        };
        let now = self.now;
        let wire = Wire { producer: &self.producer, stop: &self.stop, receipt: &self.receipt, now, context: self.setup.context.as_ref() };
        let sent = match row {
            Row::Insert(new) => match self.envelope.write_new(table, b'c', new.values(), &origin, now) {
                Ok(()) => wire.event(table, &self.envelope).await.map(|flow| (flow, Counted::Insert)),
                Err(poison) => return self.dead_letter(lsn, data, Some(relation), &poison, stats).await,
            },
            Row::Delete(old) => match self.envelope.write_delete(table, &old, &origin, now) {
                Ok(()) => wire.deletion(table, &self.envelope).await.map(|flow| (flow, Counted::Delete)),
                Err(poison) => return self.dead_letter(lsn, data, Some(relation), &poison, stats).await,
            },
            Row::Update(old, new) => match self.envelope.write_update(table, old.as_ref(), new, &origin, now) {
                Ok(Update::Same) => wire.event(table, &self.envelope).await.map(|flow| (flow, Counted::Update)),
                Ok(Update::Moved) => {
                    let Some(old) = old else { return Ok(Flow::On) };
                    let order = self.transaction.as_mut().map(|it| it.count(relation)).filter(|_| metadata);
                    let created = Origin { order, ..origin };
                    match wire.moved(table, &mut self.envelope, &old, new, (&origin, &created)).await? {
                        Ok(flow) => Ok((flow, Counted::Moved)),
                        Err((poison, sent)) => {
                            if let (Sent::Nothing, Some(transaction)) = (sent, self.transaction.as_mut()) {
                                transaction.uncount(relation);
                            }
                            return self.dead_letter(lsn, data, Some(relation), &poison, stats).await;
                        }
                    }
                }
                Err(poison) => return self.dead_letter(lsn, data, Some(relation), &poison, stats).await,
            },
            Row::Malformed(malformed) => return self.dead_letter(lsn, data, Some(relation), &Poison::Malformed(malformed), stats).await,
        };
        let (flow, what) = sent?;
        if let Some(window) = self.window.as_mut().filter(|it| it.relation == relation) {
            window.note(&self.envelope.key);
            if matches!(what, Counted::Moved) {
                window.note(&self.envelope.old_key);
            }
        }
        match what {
            Counted::Insert => counted.inserts += 1,
            Counted::Update => counted.updates += 1,
            Counted::Delete => counted.deletes += 1,
            Counted::Moved => (counted.deletes, counted.inserts) = (counted.deletes + 1, counted.inserts + 1),
        }
        Ok(flow)
    }

    /// Sets a row aside with all that is needed to see what it was. END does not owe it: a consumer that waits for whole transactions
    /// would wait for it forever.
    async fn dead_letter(&mut self, lsn: Lsn, data: &[u8], relation: Option<u32>, poison: &Poison, stats: &mut Stats) -> Result<Flow, Error> {
        if let (Some(transaction), Some(relation)) = (self.transaction.as_mut(), relation) {
            transaction.uncount(relation);
        }
        let table = relation.and_then(|id| self.tables.get(&id)).map(|it| it.table.id.clone());
        self.set_aside(lsn, dead_letter::op_of(data), data, table.as_ref(), poison, stats).await
    }

    async fn set_aside(&mut self, lsn: Lsn, op: &str, data: &[u8], table: Option<&TableId>, poison: &Poison, stats: &mut Stats) -> Result<Flow, Error> {
        if !self.setup.tolerates_errors {
            let table = table.map_or_else(|| "unknown to us".to_owned(), ToString::to_string);
            return Err(Error::Poison { table, lsn, source: poison.clone() });
        }
        tracing::error!(error = %poison, %lsn, table = table.map(ToString::to_string), "a row cannot become an event; it goes to the dead letters");
        stats.dead_letters += 1;
        let out = &mut self.scratch.1;
        dead_letter::write(out, poison, table, op, data, self.transaction.as_ref().map(|it| it.xid), lsn);
        let outgoing =
            Outgoing { topic: &self.dead_letters_topic, partition: Some(0), key: None, value: Some(out), headers: None, timestamp_ms: millis(self.now) };
        send(&self.producer, &self.stop, outgoing, &self.receipt).await
    }

    async fn commit(&mut self, end: Lsn, stats: &mut Stats) -> Result<Flow, Error> {
        let Some(transaction) = self.transaction.take() else { return Ok(Flow::On) };
        self.passed.push(transaction.xid);
        let mut flow = Flow::On;
        if transaction.begun && self.setup.transaction_metadata {
            let (key, value) = &mut self.scratch;
            boundaries::write_key(key, &transaction, end.0);
            let tables = &self.tables;
            boundaries::write_end(value, &transaction, end.0, |relation| Some(&tables.get(&relation)?.table));
            let outgoing = Outgoing {
                topic: &self.boundaries_topic,
                partition: Some(0),
                key: Some(key),
                value: Some(value),
                headers: None,
                timestamp_ms: millis(self.now),
            };
            flow = send(&self.producer, &self.stop, outgoing, &self.receipt).await?;
        }
        if let Flow::Stopped = flow {
            return Ok(Flow::Stopped);
        }
        self.seal(Meaning::Commit { committed_at_us: transaction.committed_at_us });
        self.last_commit = Some(end);
        self.last_commit_at_us = transaction.committed_at_us;
        self.position = self.position.max(end);
        stats.received_lsn = stats.received_lsn.max(end);
        Ok(Flow::On)
    }

    async fn logical_message(&mut self, transactional: bool, lsn: Lsn, prefix: &str, content: &[u8]) -> Result<Flow, Error> {
        /// No relation has this id: messages are counted among a transaction's events, but owed by no table.
        const NO_RELATION: u32 = 0;
        if transactional && matches!(self.begin(lsn).await?, Flow::Stopped) {
            return Ok(Flow::Stopped);
        }
        let metadata = self.setup.transaction_metadata;
        let transaction = self.transaction.as_mut().filter(|_| transactional);
        let (xid, at_us, order) =
            transaction.map_or((None, self.last_commit_at_us, None), |it| (Some(it.xid), it.committed_at_us, Some(it.count(NO_RELATION))));
        // A message outside of transactions takes effect, and so ends, where it stands: to Debezium that is a commit.
        if !transactional {
            self.last_commit = Some(lsn);
        }
        let previous_commit = self.last_commit.map(|it| it.0);
        let origin = Origin { lsn: lsn.0, at_us, xid, previous_commit, snapshot: None, order: order.filter(|_| metadata) };
        self.envelope.write_message(prefix, content, &origin, self.now);
        let outgoing = Outgoing {
            topic: &self.messages_topic,
            partition: None,
            key: Some(&self.envelope.key),
            value: Some(&self.envelope.value),
            headers: None,
            timestamp_ms: millis(self.now),
        };
        let flow = send(&self.producer, &self.stop, outgoing, &self.receipt).await?;
        if !transactional && self.transaction.is_none() {
            self.seal(Meaning::Other);
        }
        Ok(flow)
    }

    fn seal(&mut self, meaning: Meaning) {
        let receipt = std::mem::replace(&mut self.receipt, Receipt::open());
        self.producer.seal(&receipt);
        self.ledger.push(receipt, meaning);
    }

    /// Counts what the broker acknowledged, oldest first. The position the slot may be told, if it moved.
    pub(super) fn settle(&mut self, stats: &mut Stats) -> Result<Option<Lsn>, Error> {
        self.producer.check()?;
        let mut confirmed = None;
        let mut acked_at_us = None;
        while let Some(meaning) = self.ledger.pop_acked() {
            match meaning {
                Meaning::Commit { committed_at_us } => {
                    let acked_at_us = *acked_at_us.get_or_insert_with(|| micros(SystemTime::now()));
                    self.latency.record(Duration::from_micros(u64::try_from(acked_at_us - committed_at_us).unwrap_or_default()));
                    stats.transactions += 1;
                    stats.last_commit_at = DateTime::from_timestamp_micros(committed_at_us);
                }
                Meaning::Position(lsn) => {
                    confirmed = Some(lsn);
                    stats.confirmed_lsn = stats.confirmed_lsn.max(lsn);
                }
                Meaning::Chunk(number) => drop(self.setup.line.settled.send(Settled { number, acked: true })),
                Meaning::Other => {}
            }
        }
        Ok(confirmed)
    }

    /// Sends a heartbeat when one is due: the slot can be moved, or consumers should see that we live.
    pub(super) fn beat(&mut self, now: Instant, stats: &mut Stats) -> Result<(), Error> {
        let since = now.saturating_duration_since(self.written_at);
        let interval = if self.ledger.is_empty() { POSITION_INTERVAL_IDLE } else { POSITION_INTERVAL };
        let due = (self.position > self.written && since >= interval) || since >= self.setup.heartbeat;
        if due { self.write_position(now, stats) } else { Ok(()) }
    }

    /// At the end no interval is kept.
    pub(super) fn write_position_if_behind(&mut self, stats: &mut Stats) -> Result<(), Error> {
        if self.position > self.written { self.write_position(Instant::now(), stats) } else { Ok(()) }
    }

    /// Writes the position down, in a heartbeat. With a full queue nothing happens, the next one will do.
    fn write_position(&mut self, now: Instant, stats: &mut Stats) -> Result<(), Error> {
        let server = Some(self.setup.server);
        let position = Position { snapshot: self.setup.snapshot, confirmed: self.position, last_commit: self.last_commit, server };
        let at = SystemTime::now();
        let value = heartbeat::value(at);
        let receipt = Receipt::open();
        let headers = Headers::of(heartbeat::HEADER, &position.to_header());
        let outgoing = Outgoing {
            topic: &self.heartbeat_topic,
            partition: Some(0),
            key: Some(&self.heartbeat_key),
            value: Some(&value),
            headers: Some(&headers),
            timestamp_ms: millis(at),
        };
        if self.producer.try_send(outgoing, &receipt)? {
            self.producer.seal(&receipt);
            self.ledger.push(receipt, Meaning::Position(self.position));
            self.written = self.position;
            self.written_at = now;
            stats.heartbeats += 1;
        }
        Ok(())
    }

    /// Brings the counters that are kept per relation, and the histogram, into the stats; `before` are the sums of earlier streams.
    pub(super) fn report(&self, stats: &mut Stats, before: &Stats) {
        stats.tables.clone_from(&before.tables);
        for described in self.tables.values() {
            let sum = stats.tables.entry(described.table.id.to_string()).or_default();
            sum.inserts += described.counted.inserts;
            sum.updates += described.counted.updates;
            sum.deletes += described.counted.deletes;
        }
        for (table, rows) in &self.reread {
            stats.tables.entry(table.clone()).or_default().reads += rows;
        }
        stats.latency = (&self.latency).into();
        stats.queued = self.producer.n_waiting();
        stats.broker_away = self.producer.is_broker_away();
        stats.lag_bytes = stats.source_lsn.0.saturating_sub(stats.confirmed_lsn.0);
    }
}

enum Row<'a> {
    Insert(Tuple<'a>),
    Update(Option<Old<'a>>, Tuple<'a>),
    Delete(Old<'a>),
    Malformed(pgoutput::Malformed),
}

enum Counted {
    Insert,
    Update,
    Delete,
    Moved,
}
