//! Commit records − what is loaded = what to load; each object once, in the order of its lane.
//!
//! A transaction takes a lane's next objects: it locks the lane, finds that `_loads` still ends where it was seen to end,
//! copies the rows, writes a row in `_loads` for each object, commits. Of two loaders one waits, finds the lane moved, and
//! goes on behind it. Whatever breaks in the middle takes its whole transaction with it.
//!
//! A record that PostgreSQL refuses as `jsonb` is kept out of the table and written to `raw._rejected` with its position and
//! the reason, in the same transaction; `_loads.rows` counts it, because it has arrived. So is a record that the lake could not
//! take (it is no text, and lies in the dead-letter topic): the object says which it was. Nobody waits for either.

use std::collections::BTreeMap;

use arrow_array::RecordBatch;
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection, Transaction};

use super::{
    Error, Warehouse, While,
    postgres::RawTable,
    pour::{Encode, Pour, Room, Rows},
};
use crate::{
    change::Topics,
    fault::sqlstate,
    lake::{self, Dead, Decoded, Identity, Store, log::CommitRecord},
    stream::Lane,
};

/// Commit records asked for at once.
const PAGE: usize = 1_000;

/// A transaction ends after so many rows or compressed bytes: what a crash repeats, and what a reader of `raw` waits for.
const TRANSACTION_ROWS: u64 = 250_000;
const TRANSACTION_BYTES: u64 = 64 * 1024 * 1024;

/// What one table has in the lake and not yet in the warehouse.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    pub table: String,
    pub files: u64,
    pub rows: u64,
    pub bytes: u64,
    /// Kafka timestamp of the oldest record that waits, milliseconds since 1970 UTC.
    pub oldest_ms: Option<i64>,
}

/// What a load did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    pub files: u64,
    /// Records of those files, those that were refused included.
    pub rows: u64,
    /// Records that were refused, and those that the lake could not take.
    pub rejected: u64,
}

impl Loaded {
    fn add(&mut self, other: Self) {
        self.files += other.files;
        self.rows += other.rows;
        self.rejected += other.rejected;
    }
}

/// What waits to be loaded, by table, in the order of their names; tables with nothing to load are listed with zeros.
///
/// Reads each commit record that waits, and no other. Refuses a warehouse that another capture was loaded into: `raw` knows a row
/// by partition and offset, and those of another prefix are the same.
pub async fn discover(store: &Store, warehouse: &Warehouse, topics: &Topics) -> Result<Vec<Pending>, Error> {
    let loaded = warehouse.loaded_positions().await?;
    if let Some(other) = loaded.keys().find(|lane| topics.lake_name(&lane.topic).is_none()) {
        return Err(Error::OtherCapture { found: other.topic.to_string(), prefix: topics.prefix().to_owned() });
    }
    let mut tables: BTreeMap<String, Pending> = BTreeMap::new();
    for lane in lake::log::lanes(store).await.map_err(Error::Lake)? {
        let Some(table) = topics.lake_name(&lane.topic) else { continue };
        let pending = tables.entry(table.clone()).or_insert_with(|| Pending { table, ..Pending::default() });
        let mut position = loaded.get(&lane).copied();
        loop {
            let page = lake::log::after(store, &lane.topic, lane.partition, position, PAGE).await.map_err(Error::Lake)?;
            let Some(last) = page.last() else { break };
            position = Some(last.last_offset);
            for record in &page {
                pending.files += 1;
                pending.rows += record.rows;
                pending.bytes += record.bytes;
                pending.oldest_ms = Some(pending.oldest_ms.map_or(record.timestamp_min, |oldest| oldest.min(record.timestamp_min)));
            }
            if page.len() < PAGE {
                break;
            }
        }
    }
    Ok(tables.into_values().collect())
}

/// Loads what one table has in the lake, up to what was there when this began, and tells `progress` after each transaction.
///
/// Safe to drop at any point: it works on a connection of its own. Safe to run twice at once.
pub async fn load(store: &Store, warehouse: &Warehouse, topics: &Topics, table: &str, progress: impl FnMut(Loaded) + Send) -> Result<Loaded, Error> {
    let lanes = lake::log::lanes(store).await.map_err(Error::Lake)?;
    let lanes: Vec<Lane> = lanes.into_iter().filter(|lane| topics.lake_name(&lane.topic).as_deref() == Some(table)).collect();
    if lanes.is_empty() {
        return Ok(Loaded::default());
    }
    match warehouse {
        Warehouse::Postgres(postgres) => {
            let into = RawTable::new(table);
            postgres.prepare_table(&into).await?;
            let loader = Copying { connection: postgres.session().await?, store, room: postgres.room(), into: &into };
            follow(loader, store, lanes, progress).await
        }
        #[cfg(feature = "snowflake")]
        Warehouse::Snowflake(snowflake) => {
            let loader = Box::pin(super::snowflake::Loader::new(snowflake, store, table)).await?;
            Box::pin(follow(loader, store, lanes, progress)).await
        }
    }
}

/// What a kind of warehouse does for one lane.
pub(super) trait LaneLoader {
    /// A transaction ends after so many compressed bytes.
    const BYTES_MAX: u64;

    /// The last offset that is loaded.
    fn position(&mut self, lane: &Lane) -> impl Future<Output = Result<Option<i64>, Error>> + Send;

    /// Loads consecutive objects in one transaction. None where the lane is no longer where it was seen: then nothing is done.
    fn load(&mut self, lane: &Lane, seen: Option<i64>, group: &[CommitRecord]) -> impl Future<Output = Result<Option<Loaded>, Error>> + Send;
}

/// Follows each lane to where it ended when this began.
async fn follow<L: LaneLoader + Send>(mut loader: L, store: &Store, lanes: Vec<Lane>, mut progress: impl FnMut(Loaded) + Send) -> Result<Loaded, Error> {
    let mut total = Loaded::default();
    for lane in lanes {
        let seen = loader.position(&lane).await?;
        let Some(newest) = lake::log::newest(store, &lane.topic, lane.partition, seen).await.map_err(Error::Lake)? else { continue };
        loop {
            let mut position = loader.position(&lane).await?;
            if position.is_some_and(|it| it >= newest.record.last_offset) {
                break;
            }
            let page = lake::log::after(store, &lane.topic, lane.partition, position, PAGE).await.map_err(Error::Lake)?;
            if page.is_empty() {
                // The lane goes on, and no commit record says how.
                return Err(Error::Gap { lane: lane.to_string(), loaded: position.unwrap_or(-1), found: newest.record.first_offset });
            }
            for group in transactions(&page, L::BYTES_MAX) {
                // None: somebody else was first, so look again where the lane ends.
                let Some(done) = loader.load(&lane, position, group).await? else { break };
                total.add(done);
                progress(done);
                position = group.last().map(|it| it.last_offset);
            }
        }
    }
    Ok(total)
}

/// Loads by COPY over a PostgreSQL connection.
struct Copying<'a> {
    connection: PgConnection,
    store: &'a Store,
    room: &'a Room,
    into: &'a RawTable,
}

impl LaneLoader for Copying<'_> {
    const BYTES_MAX: u64 = TRANSACTION_BYTES;

    async fn position(&mut self, lane: &Lane) -> Result<Option<i64>, Error> {
        position(&mut self.connection, lane).await.during("read raw._loads")
    }

    async fn load(&mut self, lane: &Lane, seen: Option<i64>, group: &[CommitRecord]) -> Result<Option<Loaded>, Error> {
        let Self { connection, store, room, into } = self;
        let target = Target { store, room, into, lane };
        match target.in_one_copy(connection, seen, group).await {
            Err(error) if is_refusal(&error) => target.one_by_one(connection, seen, group).await,
            done => done,
        }
    }
}

/// One lane on its way into its table.
struct Target<'a> {
    store: &'a Store,
    room: &'a Room,
    into: &'a RawTable,
    lane: &'a Lane,
}

impl Target<'_> {
    /// The happy path: one COPY for the whole group.
    async fn in_one_copy(&self, connection: &mut PgConnection, position: Option<i64>, group: &[CommitRecord]) -> Result<Option<Loaded>, Error> {
        let Some(mut transaction) = self.begin(connection, position).await? else { return Ok(None) };
        let into = self.into;
        let mut pour = Pour::begin(&mut transaction, &format!("{into}{COLUMNS}")).await.during(format!("copy into {into}"))?;
        let poured = pour.objects(self.store, self.room, group, RawRow).await;
        // Ends the COPY in both cases, so that the connection stays in step with the server.
        let copied = pour.finish().await;
        let dead = poured?;
        copied.during(format!("load {into}"))?;
        self.commit(transaction, group, dead, &vec![0; group.len()]).await.map(Some)
    }

    /// The path of a group that holds a record `jsonb` refuses: object by object, halves of halves, until the record stands
    /// alone. Slow, and rare.
    async fn one_by_one(&self, connection: &mut PgConnection, position: Option<i64>, group: &[CommitRecord]) -> Result<Option<Loaded>, Error> {
        let Some(mut transaction) = self.begin(connection, position).await? else { return Ok(None) };
        let (mut rejected, mut all_dead) = (Vec::with_capacity(group.len()), Vec::with_capacity(group.len()));
        for record in group {
            let Decoded { batches, dead } = lake::read(self.store, record).await.map_err(Error::Lake)?;
            all_dead.push(dead);
            let mut refused = 0;
            let mut halves: Vec<RecordBatch> = batches.into_iter().rev().collect();
            while let Some(rows) = halves.pop() {
                let Some(reason) = self.copy_or_refuse(&mut transaction, record, &rows).await.during(format!("load {}", self.into))? else { continue };
                if rows.num_rows() > 1 {
                    let half = rows.num_rows() / 2;
                    halves.push(rows.slice(half, rows.num_rows() - half));
                    halves.push(rows.slice(0, half));
                } else {
                    for row in lake::rows(&rows) {
                        let identity = Identity::of(row.value.unwrap_or_default().as_bytes());
                        let dead = Dead { offset: row.offset, reason: reason.clone(), identity };
                        reject(&mut transaction, record, dead, true).await.during("write raw._rejected")?;
                    }
                    refused += 1;
                }
            }
            rejected.push(refused);
        }
        self.commit(transaction, group, all_dead, &rejected).await.map(Some)
    }

    /// Copies these rows, or leaves nothing behind and says why `jsonb` refused one of them.
    async fn copy_or_refuse(&self, connection: &mut PgConnection, record: &CommitRecord, rows: &RecordBatch) -> Result<Option<String>, sqlx::Error> {
        let mut savepoint = connection.begin().await?;
        let mut pour = Pour::begin(&mut savepoint, &format!("{}{COLUMNS}", self.into)).await?;
        pour.batch(&RawRow, record, rows).await?;
        match pour.finish().await {
            Ok(_) => savepoint.commit().await.map(|()| None),
            Err(error) if refuses(&error) => {
                savepoint.rollback().await?;
                // The message names the rule that is broken; the values would be in the detail.
                Ok(Some(error.as_database_error().map_or_else(String::new, |it| it.message().to_owned())))
            }
            Err(error) => Err(error),
        }
    }

    /// A transaction that holds the lane; None where the lane is no longer where it was seen.
    async fn begin<'c>(&self, connection: &'c mut PgConnection, seen: Option<i64>) -> Result<Option<Transaction<'c, sqlx::Postgres>>, Error> {
        let doing = || format!("lock {}", self.lane);
        let mut transaction = connection.begin().await.during(doing())?;
        let name = format!("ledgerline load {}", self.lane);
        sqlx::query("select pg_advisory_xact_lock(hashtextextended($1, 0))").bind(name).execute(&mut *transaction).await.during(doing())?;
        if position(&mut transaction, self.lane).await.during(doing())? == seen {
            return Ok(Some(transaction));
        }
        transaction.rollback().await.during(doing())?;
        Ok(None)
    }

    async fn commit(
        &self,
        mut transaction: Transaction<'_, sqlx::Postgres>,
        group: &[CommitRecord],
        all_dead: Vec<Vec<Dead>>,
        refused: &[i64],
    ) -> Result<Loaded, Error> {
        let rejected: Vec<i64> = refused.iter().zip(&all_dead).map(|(refused, dead)| refused + dead.len() as i64).collect();
        for (record, all_dead) in group.iter().zip(all_dead) {
            for dead in all_dead {
                reject(&mut transaction, record, dead, false).await.during("write raw._rejected")?;
            }
        }
        note(&mut transaction, group, &rejected).await.during("write raw._loads")?;
        transaction.commit().await.during(format!("commit a load of {}", self.into))?;
        Ok(Loaded { files: group.len() as u64, rows: group.iter().map(|it| it.rows).sum(), rejected: rejected.iter().sum::<i64>().unsigned_abs() })
    }
}

/// `landed`: the record lies in the object; otherwise in the dead-letter topic.
async fn reject(connection: &mut PgConnection, record: &CommitRecord, dead: Dead, landed: bool) -> Result<(), sqlx::Error> {
    let Dead { offset, reason, identity: known } = dead;
    tracing::warn!(topic = record.topic, partition = record.partition, offset, reason, "record kept out of the warehouse");
    let sql = "insert into raw._rejected(topic, partition, \"offset\", reason, object, tx_id, lsn, op, key, landed)
               values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)";
    let row = sqlx::query(sql).bind(&record.topic).bind(record.partition).bind(offset).bind(&reason).bind(&record.data);
    row.bind(known.tx_id).bind(known.lsn).bind(known.op).bind(known.key).bind(landed).execute(connection).await?;
    Ok(())
}

async fn position(connection: &mut PgConnection, lane: &Lane) -> Result<Option<i64>, sqlx::Error> {
    let sql = "select max(last_offset) from raw._loads where topic = $1 and partition = $2";
    sqlx::query_scalar(sql).bind(&*lane.topic).bind(lane.partition).fetch_one(connection).await
}

async fn note(connection: &mut PgConnection, group: &[CommitRecord], rejected: &[i64]) -> Result<(), sqlx::Error> {
    let number = |of: fn(&CommitRecord) -> i64| group.iter().map(of).collect::<Vec<i64>>();
    let text = |of: fn(&CommitRecord) -> &str| group.iter().map(of).collect::<Vec<&str>>();
    sqlx::query(
        "insert into raw._loads(topic, partition, first_offset, last_offset, object, rows, rejected)
         select * from unnest($1::text[], $2::int[], $3::bigint[], $4::bigint[], $5::text[], $6::bigint[], $7::bigint[])",
    )
    .bind(text(|it| &it.topic))
    .bind(group.iter().map(|it| it.partition).collect::<Vec<i32>>())
    .bind(number(|it| it.first_offset))
    .bind(number(|it| it.last_offset))
    .bind(text(|it| &it.data))
    .bind(number(|it| it.rows.cast_signed()))
    .bind(rejected)
    .execute(connection)
    .await?;
    Ok(())
}

/// Cuts a page into transactions: as many objects as fit, at least one.
fn transactions(page: &[CommitRecord], bytes_max: u64) -> impl Iterator<Item = &[CommitRecord]> {
    let (mut rows, mut bytes) = (0, 0);
    page.chunk_by(move |before, next| {
        rows += before.rows;
        bytes += before.bytes;
        let fits = rows + next.rows <= TRANSACTION_ROWS && bytes + next.bytes <= bytes_max;
        if !fits {
            (rows, bytes) = (0, 0);
        }
        fits
    })
}

fn is_refusal(error: &Error) -> bool {
    matches!(error, Error::Sql { source, .. } if refuses(source))
}

/// Class 22 is a value that is not what its type takes; class 54 is one beyond a limit: too deep, too long.
fn refuses(error: &sqlx::Error) -> bool {
    sqlstate(error).is_some_and(|code| code.starts_with("22") || code.starts_with("54"))
}

const COLUMNS: &str = "(v, _topic, _partition, _offset, _object)";

/// A record as a row of a raw table.
#[derive(Debug, Clone, Copy)]
pub(super) struct RawRow;

impl Encode for RawRow {
    fn encode(&self, record: &CommitRecord, batch: &RecordBatch, rows: &mut Rows) {
        /// The only version of jsonb's binary form: text behind this byte.
        const JSONB_VERSION: &[u8] = &[1];
        for row in lake::rows(batch) {
            rows.begin(5);
            match row.value {
                Some(value) => rows.field([JSONB_VERSION, value.as_bytes()]),
                None => rows.null(),
            }
            rows.text(record.topic.as_bytes());
            rows.integer(record.partition);
            rows.bigint(row.offset);
            rows.text(record.data.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(rows: u64, bytes: u64) -> CommitRecord {
        CommitRecord {
            schema: lake::log::SCHEMA,
            topic: "bank.public.customers".to_owned(),
            partition: 0,
            first_offset: 0,
            last_offset: 0,
            rows,
            data: String::new(),
            bytes,
            sha256: String::new(),
            timestamp_min: 0,
            timestamp_max: 0,
            previous: None,
            written_at: chrono::DateTime::UNIX_EPOCH,
        }
    }

    proptest! {
        #[test]
        fn every_object_is_in_one_transaction_in_order_and_none_is_too_large(sizes in prop::collection::vec((0..TRANSACTION_ROWS * 2, 0..TRANSACTION_BYTES * 2), 0..60)) {
            let page: Vec<CommitRecord> = sizes.into_iter().map(|(rows, bytes)| record(rows, bytes)).collect();
            let groups: Vec<&[CommitRecord]> = transactions(&page, TRANSACTION_BYTES).collect();
            prop_assert_eq!(&groups.concat(), &page);
            for group in &groups {
                let (rows, bytes): (u64, u64) = (group.iter().map(|it| it.rows).sum(), group.iter().map(|it| it.bytes).sum());
                prop_assert!(group.len() == 1 || (rows <= TRANSACTION_ROWS && bytes <= TRANSACTION_BYTES));
            }
            // Neighbours that would fit together are together.
            for pair in groups.windows(2) {
                let rows: u64 = pair[0].iter().chain(&pair[1][..1]).map(|it| it.rows).sum();
                let bytes: u64 = pair[0].iter().chain(&pair[1][..1]).map(|it| it.bytes).sum();
                prop_assert!(rows > TRANSACTION_ROWS || bytes > TRANSACTION_BYTES);
            }
        }
    }
}
