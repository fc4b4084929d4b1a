//! The tables as they are when the slot begins → read events, in Debezium's order and with its markers.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use futures_util::TryStreamExt as _;
use sqlx::{AssertSqlSafe, PgConnection};

use super::{
    catalog,
    copy_text::CopyRow,
    envelope::{Envelope, Origin, Table},
    error::Error,
    progress::Store,
    sending::{micros, millis},
    source::{Source, quoted},
    stats::{SnapshotProgress, seconds_left},
};
use crate::{
    change::{Lsn, TableId, Topics},
    stream::producer::{Headers, Outgoing, Producer, Receipt},
};

/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// Rows that share one look at the clock.
const ROWS_BY_CLOCK: u32 = 64;

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
}

/// Reads every table and sends its rows; returns once the broker has them all.
///
/// `tell` hears the progress, the table being read, and its rows so far. What the broker has of whole tables is written down as it goes.
pub(super) async fn take(
    plan: &Plan<'_>,
    envelope: &mut Envelope,
    producer: &Producer,
    store: &mut Store,
    mut tell: impl FnMut(&SnapshotProgress, &str, u64),
) -> Result<(), Error> {
    let sql = |source| Error::Sql { what: "read the tables under the slot's snapshot", source };
    let mut connection = plan.source.connect().await?;
    // The name comes from the server; it holds digits and dashes only.
    let begin = format!("begin isolation level repeatable read read only; set transaction snapshot '{}'", plan.snapshot.replace('\'', ""));
    sqlx::raw_sql(AssertSqlSafe(begin)).execute(&mut connection).await.map_err(sql)?;
    let xid: i64 = sqlx::query_scalar("select txid_snapshot_xmax(txid_current_snapshot())").fetch_one(&mut connection).await.map_err(sql)?;
    let mut progress = SnapshotProgress {
        tables: u64::try_from(plan.tables.len()).unwrap_or(0),
        rows_estimated: catalog::estimate(&mut connection, plan.tables).await?,
        ..Default::default()
    };
    let began = Instant::now();
    let at_us = micros(SystemTime::now());
    // The low half, as the WAL has it.
    let xid = u32::try_from(xid & i64::from(u32::MAX)).ok();
    let origin = Origin { lsn: plan.consistent_point.0, at_us, xid, previous_commit: None, snapshot: None, order: None };
    let mut reader = Reader {
        envelope,
        producer,
        store,
        whole: Vec::new(),
        context: plan.context,
        origin,
        receipt: Receipt::open(),
        held: None,
        now: SystemTime::UNIX_EPOCH,
        rows_by_clock: 0,
    };
    for (place, id) in plan.tables.iter().enumerate() {
        let table = catalog::describe(&mut connection, id, plan.topics).await?;
        progress.table = Some(id.to_string());
        tell(&progress, &id.to_string(), 0);
        let rows_before = progress.rows;
        let counted = |rows| {
            progress.rows = rows_before + rows;
            progress.seconds_left = seconds_left(began.elapsed(), progress.rows, progress.rows_estimated.saturating_sub(progress.rows));
            tell(&progress, &id.to_string(), rows);
        };
        reader.read_table(&mut connection, Arc::new(table), place == 0, counted).await?;
        reader.whole.push(id.to_string());
        progress.tables_done += 1;
    }
    reader.finish().await?;
    (progress.table, progress.seconds_left) = (None, None);
    tell(&progress, "", 0);
    sqlx::raw_sql("commit").execute(&mut connection).await.map_err(sql)?;
    Ok(())
}

/// A row that waits until it is known whether another follows: the last one is marked as such.
struct Held {
    table: Arc<Table>,
    line: Vec<u8>,
    first_in_table: bool,
    first_table: bool,
}

struct Reader<'a> {
    envelope: &'a mut Envelope,
    producer: &'a Producer,
    store: &'a mut Store,
    /// Tables of which nothing is left but a row that is held.
    whole: Vec<String>,
    context: Option<&'a Headers>,
    origin: Origin,
    receipt: Arc<Receipt>,
    held: Option<Held>,
    now: SystemTime,
    /// Rows until the clock is looked at again.
    rows_by_clock: u32,
}

impl Reader<'_> {
    async fn read_table(&mut self, connection: &mut PgConnection, table: Arc<Table>, first_table: bool, mut tell: impl FnMut(u64)) -> Result<(), Error> {
        let sql = |source| Error::Sql { what: "copy a table out of the source", source };
        let columns: Vec<String> = table.column_names().map(quoted).collect();
        let rows = catalog::rows_of(connection, &table.id).await?;
        let statement = format!("copy (select {} from {rows}) to stdout", columns.join(", "));
        let mut lines = connection.copy_out_raw(&statement).await.map_err(sql)?;
        let mut row = CopyRow::default();
        let mut rows = 0_u64;
        let mut told = Instant::now();
        while let Some(line) = lines.try_next().await.map_err(sql)? {
            let marker = self.held.as_ref().map(|held| held.marker(rows == 0));
            if let Some(marker) = marker {
                self.send_held(&mut row, marker).await?;
                if rows == 0 {
                    self.acked().await?;
                    self.store.note_read(&std::mem::take(&mut self.whole)).await?;
                }
            }
            let mut buffer = self.held.take().map(|it| it.line).unwrap_or_default();
            buffer.clear();
            buffer.extend_from_slice(&line);
            self.held = Some(Held { table: Arc::clone(&table), line: buffer, first_in_table: rows == 0, first_table });
            rows += 1;
            if self.rows_by_clock == 0 && told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                tell(rows);
            }
        }
        tell(rows);
        Ok(())
    }

    /// Sends the very last row, and waits until the broker has everything.
    async fn finish(&mut self) -> Result<(), Error> {
        self.send_held(&mut CopyRow::default(), "last").await?;
        self.acked().await
    }

    /// The broker has everything that was sent.
    async fn acked(&mut self) -> Result<(), Error> {
        let receipt = std::mem::replace(&mut self.receipt, Receipt::open());
        self.producer.seal(&receipt);
        Ok(self.producer.acked(&receipt).await?)
    }

    async fn send_held(&mut self, row: &mut CopyRow, marker: &'static str) -> Result<(), Error> {
        let Some(held) = &self.held else { return Ok(()) };
        let table = &*held.table;
        let unreadable = |source| Error::Row { table: table.id.to_string(), source };
        let origin = Origin { snapshot: Some(marker), ..self.origin };
        row.read(&held.line).map_err(unreadable)?;
        if self.rows_by_clock == 0 {
            (self.now, self.rows_by_clock) = (SystemTime::now(), ROWS_BY_CLOCK);
        }
        self.rows_by_clock -= 1;
        self.envelope.write_new(table, b'r', row.values(), &origin, self.now).map_err(unreadable)?;
        let key = table.has_key().then_some(&*self.envelope.key);
        let outgoing =
            Outgoing { topic: &table.topic, partition: None, key, value: Some(&self.envelope.value), headers: self.context, timestamp_ms: millis(self.now) };
        Ok(self.producer.send(outgoing, &self.receipt).await?)
    }
}

impl Held {
    /// Debezium's marker of a row that is not the very last; `last_in_table` when the next row is another table's.
    fn marker(&self, last_in_table: bool) -> &'static str {
        match (self.first_in_table && self.first_table, last_in_table, self.first_in_table) {
            (true, ..) => "first",
            (_, true, _) => "last_in_data_collection",
            (.., true) => "first_in_data_collection",
            _ => "true",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_those_of_debezium() {
        let table = Arc::new(Table::new(TableId { schema: "public".into(), table: "accounts".into() }, String::new(), Vec::new()));
        let held = |first_in_table, first_table| Held { table: Arc::clone(&table), line: Vec::new(), first_in_table, first_table };
        assert_eq!([held(true, true).marker(true), held(true, true).marker(false)], ["first", "first"]);
        assert_eq!([held(true, false).marker(true), held(true, false).marker(false)], ["last_in_data_collection", "first_in_data_collection"]);
        assert_eq!([held(false, true).marker(true), held(false, false).marker(false)], ["last_in_data_collection", "true"]);
    }
}
