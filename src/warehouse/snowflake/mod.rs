//! The warehouse in a Snowflake account.
//!
//! Differs from PostgreSQL where Snowflake does: no key is enforced, so a lane's row in `raw._positions` is moved by a
//! conditional UPDATE in the transaction of its load, and of two loaders one moves nothing and rolls back; names are folded to
//! upper case, as dbt writes them; a transaction belongs to a session, so a load signs in for itself.
//!
//! DDL asks for no more than the schemas and what lies in them; the database, the virtual warehouse and the role are the
//! administrator's (`assets/snowflake-setup.sql`).

use std::{collections::BTreeMap, fmt, fmt::Write as _, sync::Arc, time::Duration};

use tokio::sync::Mutex;

use super::{Access, Cut, Position, SnapshotEnds, Stats, load::Loaded, pour::Room};
use crate::{
    change::{BANK_TABLES, BOUNDARIES, Lsn, Topics},
    stream::Lane,
};

mod address;
mod error;
mod load;
mod session;
mod stage;
mod upload;
mod wire;

pub use address::Settings;
pub use error::{Asker, Error, Refused};
pub(super) use load::Loader;
pub use session::Row;
pub(crate) use session::Session;
pub(crate) use stage::File;

/// A warehouse on Snowflake. Clones share their session for short questions.
#[derive(Clone)]
pub struct Snowflake {
    settings: Arc<Settings>,
    http: reqwest::Client,
    questions: Arc<Mutex<Option<Arc<Session>>>>,
    tag: Arc<str>,
    room: Room,
}

impl fmt::Debug for Snowflake {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.settings.fmt(formatter)
    }
}

impl Snowflake {
    /// Signs in and asks one question, so that a wrong account, key, role or database is known at once.
    pub async fn connect(access: &Access) -> Result<Self, Error> {
        Self::connect_within(access, wire::REQUEST_MAX).await
    }

    /// The same, with a limit for one request.
    async fn connect_within(access: &Access, request_max: Duration) -> Result<Self, Error> {
        let settings = Arc::new(Settings::new(access)?);
        let this = Self { settings, http: session::http(request_max)?, questions: Arc::default(), tag: Arc::from("ledgerline"), room: Room::new() };
        // A database that may not be used is no error of the sign-in: the session only has none.
        this.rows(&format!("select count(*)::varchar from {}.information_schema.schemata", this.settings.database)).await?;
        Ok(this)
    }

    /// The same warehouse, whose statements say whose they are: `ledgerline/<dag>/<run>/<task>` in Snowflake's query history.
    pub fn tagged(&self, tag: &str) -> Self {
        Self { questions: Arc::default(), tag: Arc::from(tag), ..self.clone() }
    }

    pub(crate) fn room(&self) -> &Room {
        &self.room
    }

    /// The external stage over the lake's bucket, where there is one.
    fn stage(&self) -> Option<&str> {
        self.settings.stage.as_deref()
    }

    /// A session of its own, for a transaction or temporary tables.
    pub(crate) fn session(&self) -> Result<Session, Error> {
        Session::new(&self.settings, &self.http, &self.tag)
    }

    /// A question outside any transaction. Where the session is gone (it was idle for hours), it is asked once more in a new one.
    pub async fn rows(&self, sql: &str) -> Result<Vec<Row>, Error> {
        let asked = self.questioner().await?;
        match asked.rows(sql).await {
            Err(Error::Refused(refused)) if refused.is_session_gone() => {
                self.forget(&asked).await;
                self.questioner().await?.rows(sql).await
            }
            done => done,
        }
    }

    async fn questioner(&self) -> Result<Arc<Session>, Error> {
        let mut held = self.questions.lock().await;
        if let Some(session) = held.as_ref() {
            return Ok(Arc::clone(session));
        }
        let session = Arc::new(self.session()?);
        *held = Some(Arc::clone(&session));
        Ok(session)
    }

    /// Unless somebody else has already signed in again.
    async fn forget(&self, gone: &Arc<Session>) {
        let mut held = self.questions.lock().await;
        if held.as_ref().is_some_and(|it| Arc::ptr_eq(it, gone)) {
            *held = None;
        }
    }

    /// Makes the schemas, the raw tables of the bank, our own and the stage; harmless where they exist.
    pub async fn prepare(&self) -> Result<(), Error> {
        for schema in ["raw", "staging", "analytics", "snapshots"] {
            if !self.has_schema(schema).await? {
                self.rows(&format!("create schema if not exists {schema}")).await?;
            }
        }
        for sql in OURS {
            self.rows(sql).await?;
        }
        for table in BANK_TABLES.into_iter().chain([BOUNDARIES]) {
            self.prepare_table(table).await?;
        }
        Ok(())
    }

    /// Without the right to make schemas nothing is made where the administrator has made them.
    async fn has_schema(&self, name: &str) -> Result<bool, Error> {
        let sql = format!("select count(*)::varchar from information_schema.schemata where upper(schema_name) = {}", text(&name.to_uppercase()));
        Ok(number(&self.rows(&sql).await?, 0) > 0)
    }

    /// Makes the raw table of any captured table, by its name in the lake.
    pub async fn prepare_table(&self, lake_name: &str) -> Result<(), Error> {
        let sql = format!(
            "create table if not exists {}(v variant, _topic varchar not null, _partition number(10, 0) not null, _offset number(19, 0) not null, \
             _object varchar not null, _loaded_at timestamp_ntz not null default sysdate())",
            raw_table(lake_name)
        );
        self.rows(&sql).await.map(drop)
    }

    pub async fn loaded_positions(&self) -> Result<BTreeMap<Lane, i64>, Error> {
        let rows = self.rows("select topic, partition::varchar, max(last_offset)::varchar from raw._loads group by topic, partition").await?;
        Ok(rows.iter().filter_map(|row| Some((Lane { topic: Arc::from(row.first()?.as_deref()?), partition: parsed(row, 1)? }, parsed(row, 2)?))).collect())
    }

    pub async fn loaded_since(&self, topics: &Topics, positions: &[Position]) -> Result<BTreeMap<String, Loaded>, Error> {
        let mut seen = String::from("true");
        for it in positions {
            // Nothing fails in a String.
            let _ = write!(seen, " and not (topic = {} and partition = {} and last_offset <= {})", text(&it.topic), it.partition, it.last_offset);
        }
        let loads = self.loads(&seen).await?;
        Ok(loads.into_iter().filter_map(|(topic, loaded)| Some((topics.lake_name(&topic)?, loaded))).collect())
    }

    async fn loads(&self, which: &str) -> Result<Vec<(String, Loaded)>, Error> {
        let sql = format!(
            "select topic, count(*)::varchar, cast(sum(\"ROWS\") as number(38, 0))::varchar, cast(sum(rejected) as number(38, 0))::varchar from raw._loads where {which} group by topic"
        );
        let rows = self.rows(&sql).await?;
        let loaded = |row: &Row| Some((row.first()?.clone()?, Loaded { files: parsed(row, 1)?, rows: parsed(row, 2)?, rejected: parsed(row, 3)? }));
        Ok(rows.iter().filter_map(loaded).collect())
    }

    pub async fn stats(&self, topics: &Topics) -> Result<Stats, Error> {
        let mut stats = Stats::default();
        for (topic, loaded) in self.loads("true").await? {
            let Some(table) = topics.lake_name(&topic) else { continue };
            stats.files_loaded.insert(table.clone(), loaded.files);
            stats.rows_loaded.insert(table.clone(), loaded.rows);
            stats.rows_rejected.insert(table, loaded.rejected);
        }
        Ok(stats)
    }

    pub async fn set_snapshot_ends(&self, ends: &SnapshotEnds) -> Result<(), Error> {
        let lsn = ends.lsn.map_or_else(|| "null".to_owned(), |it| it.0.to_string());
        let lanes: Vec<String> = ends.lanes.iter().map(|(topic, partition, end)| format!("({}, {partition}, {end}, {lsn})", text(topic))).collect();
        let session = self.session()?;
        session.run("begin").await?;
        session.run("delete from raw._snapshot_ends").await?;
        if !lanes.is_empty() {
            session.run(&format!("insert into raw._snapshot_ends(topic, partition, end_offset, lsn) values {}", lanes.join(", "))).await?;
        }
        session.run("commit").await
    }

    pub async fn cut(&self) -> Result<Option<Cut>, Error> {
        if !self.exists("staging.cut").await? {
            return Ok(None);
        }
        self.cut_where("lsn is not null").await
    }

    /// The newest cut that fulfils a condition.
    pub(crate) async fn cut_where(&self, which: &str) -> Result<Option<Cut>, Error> {
        let sql = format!("select lsn::varchar, to_char(committed_at, 'YYYY-MM-DD HH24:MI:SS.FF6') from staging.cut where {which} order by lsn desc limit 1");
        let rows = self.rows(&sql).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let at = row.get(1).and_then(|it| chrono::NaiveDateTime::parse_from_str(it.as_deref()?, "%Y-%m-%d %H:%M:%S%.f").ok());
        match (parsed::<i64>(row, 0), at) {
            (Some(lsn), Some(at)) => Ok(Some(Cut { lsn: Lsn(lsn.cast_unsigned()), committed_at: at.and_utc() })),
            _ => Err(Error::Answer("staging.cut is not as dbt writes it".to_owned())),
        }
    }

    /// Whether dbt has made a table yet: `staging.cut`.
    pub(crate) async fn exists(&self, table: &str) -> Result<bool, Error> {
        let (schema, name) = table.split_once('.').unwrap_or(("public", table));
        let sql = format!(
            "select count(*)::varchar from information_schema.tables where upper(table_schema) = {} and upper(table_name) = {}",
            text(&schema.to_uppercase()),
            text(&name.to_uppercase())
        );
        Ok(number(&self.rows(&sql).await?, 0) > 0)
    }
}

/// A raw table by its name in the lake, as dbt's unquoted `raw.customers` finds it: folded to upper case, and safe whatever it is.
pub(crate) fn raw_table(lake_name: &str) -> String {
    let name = if lake_name.starts_with('_') { format!("public.{lake_name}") } else { lake_name.replace('\0', "") };
    format!("raw.\"{}\"", name.to_uppercase().replace('"', "\"\""))
}

/// A text as a literal. Backslashes mean something in Snowflake's.
pub(crate) fn text(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

pub(crate) fn parsed<T: std::str::FromStr>(row: &Row, place: usize) -> Option<T> {
    row.get(place)?.as_deref()?.parse().ok()
}

/// The one number of an answer of one row; 0 where there is none.
pub(crate) fn number(rows: &[Row], place: usize) -> i64 {
    rows.first().and_then(|row| parsed(row, place)).unwrap_or_default()
}

/// `ROWS` is a reserved word; `offset` is quoted because dbt quotes it. Keys are declared for readers: nobody enforces them.
const OURS: [&str; 6] = [
    "create table if not exists raw._loads(topic varchar not null, partition number(10, 0) not null, first_offset number(19, 0) not null, \
     last_offset number(19, 0) not null, object varchar not null, \"ROWS\" number(19, 0) not null, rejected number(19, 0) not null default 0, \
     loaded_at timestamp_ntz not null default sysdate())",
    "create table if not exists raw._positions(topic varchar not null, partition number(10, 0) not null, last_offset number(19, 0) not null)",
    "create table if not exists raw._rejected(topic varchar not null, partition number(10, 0) not null, \"offset\" number(19, 0) not null, \
     reason varchar not null, object varchar not null, tx_id number(38, 0), lsn number(38, 0), op varchar, key varchar, landed boolean not null default true, \
     rejected_at timestamp_ntz not null default sysdate())",
    "create table if not exists raw._snapshot_ends(topic varchar not null, partition number(10, 0) not null, end_offset number(19, 0) not null, lsn number(38, 0))",
    "create table if not exists raw._shown(lsn number(38, 0) not null, shown_at timestamp_ntz not null)",
    "create stage if not exists raw.ledgerline_stage encryption = (type = 'SNOWFLAKE_SSE')",
];

#[cfg(test)]
mod tests;

#[cfg(test)]
mod name_tests {
    use super::*;

    #[test]
    fn names_and_texts_are_safe_in_sql() {
        assert_eq!(raw_table("customers"), "raw.\"CUSTOMERS\"");
        assert_eq!(raw_table("_loads"), "raw.\"PUBLIC._LOADS\"");
        assert_eq!(raw_table("a\"; drop table x"), "raw.\"A\"\"; DROP TABLE X\"");
        assert_eq!(text("it's a \\"), "'it''s a \\\\'");
    }
}
