//! How far the snapshot came, in the state database: one row per topic prefix.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{Connection as _, PgConnection, Row as _, types::Json};

use super::{
    error::Error,
    source::{self, answer},
};
use crate::{
    change::Lsn,
    secret::Secret,
    stream::{Lane, topics::Watermarks},
};

/// Other stages make the same schema at the same moment; whoever loses that race finds it made.
const CREATE_TRIES: usize = 5;

/// The row of a capture.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Progress {
    pub(super) slot: String,
    /// Where the slot began. None until it was made.
    pub(super) lsn: Option<Lsn>,
    pub(super) finished_at: Option<DateTime<Utc>>,
    pub(super) ends: Vec<LaneEnd>,
    /// Tables of which the broker has every row.
    pub(super) tables_read: Vec<String>,
}

/// The end of a lane right after the last row of the snapshot was acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneEnd {
    pub topic: String,
    pub partition: i32,
    pub end_offset: i64,
}

impl From<(Lane, Watermarks)> for LaneEnd {
    fn from((lane, marks): (Lane, Watermarks)) -> Self {
        Self { topic: lane.topic.to_string(), partition: lane.partition, end_offset: marks.end }
    }
}

/// A finished snapshot: it is complete in the lake once every lane has landed up to its end.
///
/// Rows read (`op r`) with another `source.lsn` are of a snapshot that was cut short and taken again. Those that tell none are of an
/// incremental snapshot.
#[derive(Debug, Clone, PartialEq)]
pub struct SnapshotEnds {
    pub lsn: Lsn,
    pub finished_at: DateTime<Utc>,
    pub ends: Vec<LaneEnd>,
}

/// The ends of the snapshot of a topic prefix; None while it is not finished (or never began).
pub async fn snapshot_ends(state: &Secret, topic_prefix: &str) -> Result<Option<SnapshotEnds>, Error> {
    let mut store = Store::open(state, topic_prefix).await?;
    let found = store.read().await?;
    store.close().await;
    Ok(found.and_then(|it| Some(SnapshotEnds { lsn: it.lsn?, finished_at: it.finished_at?, ends: it.ends })))
}

/// The table in the state database, for one topic prefix.
#[derive(Debug)]
pub(super) struct Store {
    connection: PgConnection,
    topic_prefix: String,
}

impl Store {
    /// Connects; makes the table if it is missing.
    pub(super) async fn open(state: &Secret, topic_prefix: &str) -> Result<Self, Error> {
        const SCHEMA: &str = "create schema if not exists ledgerline;
            create table if not exists ledgerline.cdc_snapshot (
                topic_prefix text primary key, slot text not null, lsn bigint,
                started_at timestamptz not null, finished_at timestamptz, ends jsonb, tables_read jsonb)";
        let mut connection = source::connect_state(state).await?;
        let mut tries = 0;
        loop {
            let result = answer(sqlx::raw_sql(SCHEMA).execute(&mut connection)).await;
            tries += 1;
            match result {
                Ok(_) => return Ok(Self { connection, topic_prefix: topic_prefix.to_owned() }),
                Err(sqlx::Error::Database(error)) if tries < CREATE_TRIES && matches!(error.code().as_deref(), Some("23505" | "42P06" | "42P07")) => {}
                Err(source) => return Err(Error::Sql { what: "make the table of the snapshot's progress in the state database", source }),
            }
        }
    }

    /// Reads the row, and makes nothing: without the table there is none.
    pub(super) async fn look(state: &Secret, topic_prefix: &str) -> Result<Option<Progress>, Error> {
        let mut store = Self { connection: source::connect_state(state).await?, topic_prefix: topic_prefix.to_owned() };
        let known: bool =
            answer(sqlx::query_scalar("select to_regclass('ledgerline.cdc_snapshot') is not null").fetch_one(&mut store.connection)).await.map_err(failed)?;
        let found = if known { store.read().await? } else { None };
        store.close().await;
        Ok(found)
    }

    pub(super) async fn read(&mut self) -> Result<Option<Progress>, Error> {
        // An earlier version made the table without `tables_read`.
        const READ: &str = "select slot, lsn, finished_at, ends, nullif(to_jsonb(it) -> 'tables_read', 'null') as tables_read
            from ledgerline.cdc_snapshot it where topic_prefix = $1";
        let row = answer(sqlx::query(READ).bind(&self.topic_prefix).fetch_optional(&mut self.connection)).await.map_err(failed)?;
        let Some(row) = row else { return Ok(None) };
        let lsn: Option<i64> = row.try_get("lsn").map_err(failed)?;
        let ends: Option<Json<Vec<LaneEnd>>> = row.try_get("ends").map_err(failed)?;
        let tables_read: Option<Json<Vec<String>>> = row.try_get("tables_read").map_err(failed)?;
        Ok(Some(Progress {
            slot: row.try_get("slot").map_err(failed)?,
            lsn: lsn.map(u64::try_from).transpose().map_err(|_| Error::Progress { reason: "its LSN is negative" })?.map(Lsn),
            finished_at: row.try_get("finished_at").map_err(failed)?,
            ends: ends.map(|it| it.0).unwrap_or_default(),
            tables_read: tables_read.map(|it| it.0).unwrap_or_default(),
        }))
    }

    /// Notes that a slot is about to be made: from now on it is ours, and unfinished.
    pub(super) async fn begin(&mut self, slot: &str) -> Result<(), Error> {
        const BEGIN: &str = "insert into ledgerline.cdc_snapshot (topic_prefix, slot, started_at) values ($1, $2, now())
            on conflict (topic_prefix) do update set slot = excluded.slot, lsn = null, started_at = now(), finished_at = null, ends = null, tables_read = null";
        const ADD: &str = "alter table ledgerline.cdc_snapshot add column if not exists tables_read jsonb";
        answer(sqlx::raw_sql(ADD).execute(&mut self.connection)).await.map_err(failed)?;
        self.write(sqlx::query(BEGIN).bind(&self.topic_prefix).bind(slot)).await
    }

    /// Notes where the slot began.
    pub(super) async fn made(&mut self, lsn: Lsn) -> Result<(), Error> {
        let lsn = i64::try_from(lsn.0).map_err(|_| Error::Progress { reason: "an LSN is beyond the range of bigint" })?;
        self.write(sqlx::query("update ledgerline.cdc_snapshot set lsn = $2 where topic_prefix = $1").bind(&self.topic_prefix).bind(lsn)).await
    }

    /// Notes that the broker has every row of these tables.
    pub(super) async fn note_read(&mut self, tables: &[String]) -> Result<(), Error> {
        const NOTE: &str = "update ledgerline.cdc_snapshot
            set tables_read = coalesce(tables_read, '[]') || $2 where topic_prefix = $1";
        self.write(sqlx::query(NOTE).bind(&self.topic_prefix).bind(Json(tables))).await
    }

    /// Notes that the snapshot is with the broker.
    pub(super) async fn finish(&mut self, ends: &[LaneEnd]) -> Result<(), Error> {
        const FINISH: &str = "update ledgerline.cdc_snapshot set finished_at = now(), ends = $2 where topic_prefix = $1";
        self.write(sqlx::query(FINISH).bind(&self.topic_prefix).bind(Json(ends.to_vec()))).await
    }

    pub(super) async fn close(self) {
        // The server notices either way; a goodbye only saves it a log line.
        let _ = self.connection.close().await;
    }

    async fn write(&mut self, statement: sqlx::query::Query<'_, sqlx::Postgres, sqlx::postgres::PgArguments>) -> Result<(), Error> {
        answer(statement.execute(&mut self.connection)).await.map_err(failed).map(drop)
    }
}

fn failed(source: sqlx::Error) -> Error {
    Error::Sql { what: "keep the snapshot's progress in the state database", source }
}
