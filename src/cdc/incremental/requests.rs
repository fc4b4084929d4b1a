//! Which tables are to be read again, and how far that came: rows of the state database.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{Connection as _, PgConnection, Row as _, postgres::PgRow, types::Json};

use crate::{
    cdc::{
        error::Error,
        progress::Store,
        source::{self, answer},
    },
    secret::Secret,
};

/// A table that is to be read again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Request {
    pub id: i64,
    /// `public.accounts`.
    pub table: String,
    pub requested_at: DateTime<Utc>,
    /// Rows read so far.
    pub rows: u64,
    /// Why it was given up.
    pub failure: Option<String>,
    /// The key of the last of them, as PostgreSQL prints it.
    #[serde(skip)]
    pub(super) after_key: Option<Vec<String>>,
}

/// The table of requests, for one topic prefix.
#[derive(Debug)]
pub(in crate::cdc) struct Requests {
    connection: PgConnection,
    topic_prefix: String,
}

const OPEN: &str = "select id, table_name, requested_at, rows, after_key, failure from ledgerline.cdc_incremental_snapshot
    where topic_prefix = $1 and finished_at is null and failure is null order by id";
/// A failure is told until the table is asked for again.
const TOLD: &str = "select id, table_name, requested_at, rows, after_key, failure from ledgerline.cdc_incremental_snapshot it
    where topic_prefix = $1 and finished_at is null and (failure is null or not exists (select from ledgerline.cdc_incremental_snapshot later
        where later.topic_prefix = $1 and later.table_name = it.table_name and later.id > it.id)) order by id";

impl Requests {
    /// Makes the table if it is missing.
    pub(in crate::cdc) async fn open(state: &Secret, topic_prefix: &str) -> Result<Self, Error> {
        const TABLE: &str = "create table if not exists ledgerline.cdc_incremental_snapshot (
                id bigint generated always as identity primary key, topic_prefix text not null, table_name text not null,
                requested_at timestamptz not null default now(), after_key jsonb, rows bigint not null default 0,
                finished_at timestamptz, failure text)";
        // The schema is made where the first snapshot is written down.
        Store::open(state, topic_prefix).await?.close().await;
        let mut connection = source::connect_state(state).await?;
        answer(sqlx::raw_sql(TABLE).execute(&mut connection)).await.map_err(failed)?;
        Ok(Self { connection, topic_prefix: topic_prefix.to_owned() })
    }

    /// Makes nothing: without the table there are no requests.
    pub(in crate::cdc) async fn look(state: &Secret, topic_prefix: &str) -> Result<Option<Self>, Error> {
        let mut connection = source::connect_state(state).await?;
        let known: bool = answer(sqlx::query_scalar("select to_regclass('ledgerline.cdc_incremental_snapshot') is not null").fetch_one(&mut connection))
            .await
            .map_err(failed)?;
        Ok(known.then(|| Self { connection, topic_prefix: topic_prefix.to_owned() }))
    }

    /// Asks for a table, unless it is asked for already.
    pub(in crate::cdc) async fn ask(&mut self, table: &str) -> Result<Request, Error> {
        const ASK: &str = "insert into ledgerline.cdc_incremental_snapshot (topic_prefix, table_name)
            select $1, $2 where not exists (select from ledgerline.cdc_incremental_snapshot
                where topic_prefix = $1 and table_name = $2 and finished_at is null and failure is null)";
        answer(sqlx::query(ASK).bind(&self.topic_prefix).bind(table).execute(&mut self.connection)).await.map_err(failed)?;
        self.waiting().await?.into_iter().find(|it| it.table == table).ok_or(Error::Progress { reason: "a request that was just written is gone" })
    }

    /// All that is not finished, oldest first.
    pub(in crate::cdc) async fn waiting(&mut self) -> Result<Vec<Request>, Error> {
        self.select(OPEN).await
    }

    /// And what was given up.
    pub(in crate::cdc) async fn told(&mut self) -> Result<Vec<Request>, Error> {
        self.select(TOLD).await
    }

    async fn select(&mut self, statement: &'static str) -> Result<Vec<Request>, Error> {
        let rows = answer(sqlx::query(statement).bind(&self.topic_prefix).fetch_all(&mut self.connection)).await.map_err(failed)?;
        rows.iter().map(request).collect()
    }

    pub(super) async fn next(&mut self) -> Result<Option<Request>, Error> {
        Ok(self.waiting().await?.into_iter().next())
    }

    /// Up to this key the broker has the rows.
    pub(super) async fn note(&mut self, id: i64, key: &[String], rows: u64) -> Result<(), Error> {
        const NOTE: &str = "update ledgerline.cdc_incremental_snapshot set after_key = $2, rows = $3 where id = $1";
        let noted = sqlx::query(NOTE).bind(id).bind(Json(key)).bind(i64::try_from(rows).unwrap_or(i64::MAX));
        answer(noted.execute(&mut self.connection)).await.map_err(failed).map(drop)
    }

    pub(super) async fn finish(&mut self, id: i64, rows: u64) -> Result<(), Error> {
        const FINISH: &str = "update ledgerline.cdc_incremental_snapshot set finished_at = now(), rows = $2 where id = $1";
        answer(sqlx::query(FINISH).bind(id).bind(i64::try_from(rows).unwrap_or(i64::MAX)).execute(&mut self.connection)).await.map_err(failed).map(drop)
    }

    pub(super) async fn fail(&mut self, id: i64, reason: &str) -> Result<(), Error> {
        const FAIL: &str = "update ledgerline.cdc_incremental_snapshot set failure = $2 where id = $1";
        answer(sqlx::query(FAIL).bind(id).bind(reason).execute(&mut self.connection)).await.map_err(failed).map(drop)
    }

    pub(in crate::cdc) async fn close(self) {
        let _ = self.connection.close().await;
    }
}

fn request(row: &PgRow) -> Result<Request, Error> {
    let rows: i64 = row.try_get("rows").map_err(failed)?;
    let after_key: Option<Json<Vec<String>>> = row.try_get("after_key").map_err(failed)?;
    Ok(Request {
        id: row.try_get("id").map_err(failed)?,
        table: row.try_get("table_name").map_err(failed)?,
        requested_at: row.try_get("requested_at").map_err(failed)?,
        rows: u64::try_from(rows).unwrap_or(0),
        failure: row.try_get("failure").map_err(failed)?,
        after_key: after_key.map(|it| it.0),
    })
}

fn failed(source: sqlx::Error) -> Error {
    Error::Sql { what: "keep the requests for incremental snapshots in the state database", source }
}
