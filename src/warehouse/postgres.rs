//! The warehouse on PostgreSQL: schemas, the raw tables, and what is known about them.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc, time::Duration};

use chrono::NaiveDateTime;
use sha2::{Digest, Sha256};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, PgConnection, PgPool, Row,
    postgres::{PgConnectOptions, PgPoolOptions, PgRow},
};

use super::{Cut, Error, Position, SnapshotEnds, Stats, While, load::Loaded, pour::Room};
use crate::{
    change::{BANK_TABLES, BOUNDARIES, Lsn, Topics},
    secret::{Secret, without_password},
    stream::Lane,
};

/// Short questions share these; loads and reconciliations open a connection of their own.
const CONNECTIONS_MAX: u32 = 4;

/// A server that does not answer for so long is away: the caller decides when to try again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// PostgreSQL cuts longer names off without a word, and two tables would become one.
const NAME_BYTES_MAX: usize = 63;

/// Held while schemas and tables are made: `create … if not exists` by two sessions at once fails for one of them.
const PREPARE_LOCK: i64 = 0x6C65_6467_6572_7261;

/// A raw table by the name its topic has in the lake: `customers`, `boundaries`, `audit.events`.
///
/// Prints as it is written in SQL, schema and quotes included: `raw."audit.events"`. Any name is safe. Ours begin with `_`,
/// so a captured table that does is written with its schema; a name too long is shortened and kept apart by its hash.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RawTable(String);

impl RawTable {
    pub fn new(lake_name: &str) -> Self {
        let name = if lake_name.starts_with('_') { format!("public.{lake_name}") } else { lake_name.replace('\0', "") };
        if name.len() <= NAME_BYTES_MAX {
            return Self(name);
        }
        let hash = hex::encode(&Sha256::digest(name.as_bytes())[..8]);
        let mut end = NAME_BYTES_MAX - 1 - hash.len();
        while !name.is_char_boundary(end) {
            end -= 1;
        }
        Self(format!("{}_{hash}", &name[..end]))
    }
}

impl fmt::Display for RawTable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "raw.\"{}\"", self.0.replace('"', "\"\""))
    }
}

/// A warehouse in a PostgreSQL database. Clones share its connections.
#[derive(Debug, Clone)]
pub struct Postgres {
    pool: PgPool,
    options: PgConnectOptions,
    address: String,
    room: Room,
}

impl Postgres {
    /// Connects and asks one question, so that a wrong address is known at once.
    pub async fn connect(url: &Secret) -> Result<Self, Error> {
        let address = without_password(url.reveal());
        let refuse = |source| Error::Connect { address: address.clone(), source };
        let options = options(url).map_err(refuse)?;
        let pool =
            PgPoolOptions::new().max_connections(CONNECTIONS_MAX).acquire_timeout(CONNECT_TIMEOUT).connect_with(options.clone()).await.map_err(refuse)?;
        Ok(Self { pool, options, address, room: Room::new() })
    }

    /// Makes the schemas, the raw tables of the bank, and our own; harmless where they exist, also when two do it at once.
    pub async fn prepare(&self) -> Result<(), Error> {
        let mut sql = String::from(SCHEMAS);
        for table in BANK_TABLES.into_iter().chain([BOUNDARIES]) {
            sql.push_str(&table_ddl(&RawTable::new(table)));
        }
        self.change_schema(sql).await.during("prepare the warehouse's schemas")
    }

    /// Makes the raw table of any captured table.
    pub async fn prepare_table(&self, table: &RawTable) -> Result<(), Error> {
        self.change_schema(table_ddl(table)).await.during(format!("create {table}"))
    }

    async fn change_schema(&self, sql: String) -> Result<(), sqlx::Error> {
        let mut transaction = self.pool.begin().await?;
        sqlx::query("select pg_advisory_xact_lock($1)").bind(PREPARE_LOCK).execute(&mut *transaction).await?;
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *transaction).await?;
        transaction.commit().await
    }

    /// The last offset that is loaded, by lane.
    pub async fn loaded_positions(&self) -> Result<BTreeMap<Lane, i64>, Error> {
        let rows = sqlx::query("select topic, partition, max(last_offset) from raw._loads group by topic, partition").fetch_all(&self.pool).await;
        Ok(rows
            .during("read raw._loads")?
            .into_iter()
            .map(|row| (Lane { topic: Arc::from(row.get::<&str, _>(0)), partition: row.get(1) }, row.get(2)))
            .collect())
    }

    /// What has been loaded behind these positions, by table: the truth about a run, however often its loads were interrupted.
    pub async fn loaded_since(&self, topics: &Topics, positions: &[Position]) -> Result<BTreeMap<String, Loaded>, Error> {
        let sql = "select l.topic, count(*), sum(l.rows)::bigint, sum(l.rejected)::bigint from raw._loads l
             left join unnest($1::text[], $2::int[], $3::bigint[]) as before(topic, partition, last_offset) on before.topic = l.topic and before.partition = l.partition
             where before.topic is null or l.last_offset > before.last_offset group by l.topic";
        let rows = sqlx::query(sql)
            .bind(positions.iter().map(|it| it.topic.as_str()).collect::<Vec<_>>())
            .bind(positions.iter().map(|it| it.partition).collect::<Vec<_>>())
            .bind(positions.iter().map(|it| it.last_offset).collect::<Vec<_>>())
            .fetch_all(&self.pool)
            .await
            .during("read raw._loads")?;
        let loaded = |row: &PgRow| Loaded {
            files: row.get::<i64, _>(1).unsigned_abs(),
            rows: row.get::<i64, _>(2).unsigned_abs(),
            rejected: row.get::<i64, _>(3).unsigned_abs(),
        };
        Ok(rows.iter().filter_map(|row| Some((topics.lake_name(row.get(0))?, loaded(row)))).collect())
    }

    /// What has been loaded so far, by table.
    pub async fn stats(&self, topics: &Topics) -> Result<Stats, Error> {
        let mut stats = Stats::default();
        let rows = sqlx::query("select topic, count(*), sum(rows)::bigint, sum(rejected)::bigint from raw._loads group by topic").fetch_all(&self.pool).await;
        for row in rows.during("read raw._loads")? {
            let Some(table) = topics.lake_name(row.get(0)) else { continue };
            stats.files_loaded.insert(table.clone(), row.get::<i64, _>(1).unsigned_abs());
            stats.rows_loaded.insert(table.clone(), row.get::<i64, _>(2).unsigned_abs());
            stats.rows_rejected.insert(table, row.get::<i64, _>(3).unsigned_abs());
        }
        Ok(stats)
    }

    /// Says where the initial snapshot ended in each lane; the cut waits until all of them are loaded.
    ///
    /// Replaces what was said before in one transaction; saying it again is harmless. An empty list means the source had
    /// nothing to read and is not the same as never having been called, so it is refused: name every lane, with offset 0.
    pub async fn set_snapshot_ends(&self, ends: &SnapshotEnds) -> Result<(), Error> {
        let (topics, rest): (Vec<&str>, Vec<(i32, i64)>) = ends.lanes.iter().map(|(topic, partition, end)| (topic.as_str(), (*partition, *end))).unzip();
        let (partitions, offsets): (Vec<i32>, Vec<i64>) = rest.into_iter().unzip();
        let write = async {
            let mut transaction = self.pool.begin().await?;
            sqlx::query("lock table raw._snapshot_ends in share row exclusive mode").execute(&mut *transaction).await?;
            sqlx::query("delete from raw._snapshot_ends").execute(&mut *transaction).await?;
            sqlx::query("insert into raw._snapshot_ends(topic, partition, end_offset, lsn) select *, $4 from unnest($1::text[], $2::int[], $3::bigint[])")
                .bind(topics)
                .bind(partitions)
                .bind(offsets)
                .bind(ends.lsn.map(|it| it.0.cast_signed()))
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await
        };
        write.await.during("write raw._snapshot_ends")
    }

    /// The newest cut; None before dbt has found one.
    pub async fn cut(&self) -> Result<Option<Cut>, Error> {
        let mut connection = self.pool.acquire().await.during("read the cut")?;
        cut(&mut connection).await.during("read the cut")
    }

    /// A connection of its own: dropped in the middle of anything, it takes its transaction with it.
    pub(crate) async fn session(&self) -> Result<PgConnection, Error> {
        let connecting = tokio::time::timeout(CONNECT_TIMEOUT, PgConnection::connect_with(&self.options)).await;
        let connected = connecting.unwrap_or_else(|_| Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())));
        connected.map_err(|source| Error::Connect { address: self.address.clone(), source })
    }

    pub(super) fn room(&self) -> &Room {
        &self.room
    }

    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }
}

/// How every session of ours is opened: UTC, so that a date is the same everywhere; no statement in any log of ours.
pub(crate) fn options(url: &Secret) -> Result<PgConnectOptions, sqlx::Error> {
    let options = PgConnectOptions::from_str(url.reveal())?;
    Ok(options.application_name("ledgerline").options([("TimeZone", "UTC"), ("DateStyle", "ISO")]).disable_statement_logging())
}

pub(crate) async fn cut(connection: &mut PgConnection) -> Result<Option<Cut>, sqlx::Error> {
    if !exists(connection, "staging.cut").await? {
        return Ok(None);
    }
    let row = sqlx::query("select lsn::bigint, committed_at::timestamp from staging.cut where lsn is not null order by lsn desc limit 1")
        .fetch_optional(connection)
        .await?;
    Ok(row.map(|row| Cut { lsn: Lsn(row.get::<i64, _>(0).cast_unsigned()), committed_at: row.get::<NaiveDateTime, _>(1).and_utc() }))
}

/// Whether dbt has made a table yet.
pub(crate) async fn exists(connection: &mut PgConnection, table: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select to_regclass($1) is not null").bind(table).fetch_one(connection).await
}

/// The key makes a repeat impossible should all else fail, and dbt reads by it. Rows arrive in its order, so its index only
/// ever grows at the right edge: see `benches/loader.rs` for what it costs.
fn table_ddl(table: &RawTable) -> String {
    format!(
        "create table if not exists {table}(v jsonb, _topic text not null, _partition integer not null, _offset bigint not null, _object text not null, \
         _loaded_at timestamptz not null default now(), primary key (_partition, _offset));"
    )
}

/// `_loads` has two keys: a lane's objects neither begin nor end at the same offset, so of two loaders one fails.
/// `_shown` has one row, the cut that the KPIs have shown.
/// `_rejected` holds what a record still said about itself, so that the cut can count it as arrived; its bytes are in the
/// lake (`landed`) or in the dead-letter topic.
const SCHEMAS: &str = "
create schema if not exists raw;
create schema if not exists staging;
create schema if not exists analytics;
create schema if not exists snapshots;
create table if not exists raw._loads(
    topic text not null, partition integer not null, first_offset bigint not null, last_offset bigint not null, object text not null,
    rows bigint not null, rejected bigint not null default 0, loaded_at timestamptz not null default now(),
    primary key (topic, partition, last_offset), unique (topic, partition, first_offset));
create table if not exists raw._rejected(
    topic text not null, partition integer not null, \"offset\" bigint not null, reason text not null, object text not null,
    tx_id bigint, lsn bigint, op text, key text, landed boolean not null default true, rejected_at timestamptz not null default now(),
    primary key (topic, partition, \"offset\"));
alter table raw._rejected add column if not exists landed boolean not null default true;
create table if not exists raw._snapshot_ends(topic text not null, partition integer not null, end_offset bigint not null, lsn bigint, primary key (topic, partition));
alter table raw._snapshot_ends add column if not exists lsn bigint;
create table if not exists raw._shown(lsn bigint primary key, shown_at timestamptz not null);
";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_raw_table_is_quoted_and_never_one_of_ours() {
        assert_eq!(RawTable::new("customers").to_string(), "raw.\"customers\"");
        assert_eq!(RawTable::new("audit.events").to_string(), "raw.\"audit.events\"");
        assert_eq!(RawTable::new("a\"; drop table x").to_string(), "raw.\"a\"\"; drop table x\"");
        assert_eq!(RawTable::new("_loads").to_string(), "raw.\"public._loads\"");
    }

    proptest! {
        #[test]
        fn long_names_fit_and_stay_apart(common in "[a-zä]{60,90}", left in "[a-z]{1,9}", right in "[a-z]{1,9}") {
            prop_assume!(left != right);
            let (left, right) = (RawTable::new(&format!("{common}{left}")), RawTable::new(&format!("{common}{right}")));
            prop_assert!(left.0.len() <= NAME_BYTES_MAX && right.0.len() <= NAME_BYTES_MAX);
            prop_assert_ne!(left, right);
        }
    }
}
