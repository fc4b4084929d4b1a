//! What the tests stand on: a database of their own, a lake of their own.

use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use ledgerline::{
    change::Topics,
    lake::{
        self, Store,
        batch::Sealed,
        encode::encode,
        log::{Appended, CommitRecord, SCHEMA, append, sha256_hex},
        object::{DataKey, date_of},
    },
    secret::Secret,
    stream::{Lane, records::Records},
    warehouse::{Warehouse, load},
};
use sqlx::{AssertSqlSafe, PgPool};

use crate::{house, lane::Lake};

/// When everything landed: 2026-11-22.
pub(super) const LANDED_MS: i64 = 1_795_386_400_000;

/// A database that is dropped at the end of a test that passes.
pub(super) struct Database {
    database: house::Database,
    pub(super) url: Secret,
    pub(super) pool: PgPool,
}

impl Database {
    pub(super) async fn create() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let database = house::Database::create(&format!("warehouse_{}", MADE.fetch_add(1, Ordering::Relaxed))).await;
        // What a test commits need not survive the server.
        house::on_server(&format!("alter database {} set synchronous_commit = off", database.name)).await;
        let pool = PgPool::connect(database.url.reveal()).await.expect("the new database answers");
        Self { url: database.url.clone(), database, pool }
    }

    pub(super) async fn drop(self) {
        self.pool.close().await;
        self.database.drop().await;
    }

    pub(super) async fn run(&self, sql: &str) {
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&self.pool).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    pub(super) async fn number(&self, sql: &str) -> i64 {
        sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).fetch_one(&self.pool).await.unwrap_or_else(|error| panic!("{sql}: {error}"))
    }
}

/// A warehouse and the lake it is loaded from.
pub(super) struct Ground {
    pub(super) database: Database,
    pub(super) warehouse: Warehouse,
    pub(super) store: Store,
    pub(super) topics: Topics,
    pub(super) lake: Lake,
}

impl Ground {
    pub(super) async fn new() -> Self {
        let database = Database::create().await;
        let warehouse = Warehouse::connect(&database.url.clone().into()).await.expect("connects");
        Self::of(database, warehouse).await
    }

    /// The same lake before another warehouse; the database is the bank's.
    pub(super) async fn of(database: Database, warehouse: Warehouse) -> Self {
        warehouse.prepare().await.expect("prepares");
        let lake = Lake::open().await;
        let store = Store::connect(&lake.access).await.expect("the lake answers");
        Self { database, warehouse, store, topics: Topics::new("bank"), lake }
    }

    pub(super) async fn end(self) {
        self.database.drop().await;
        drop(self.lake);
    }

    pub(super) async fn load(&self, table: &str) -> load::Loaded {
        load::load(&self.store, &self.warehouse, &self.topics, table, |_| {}).await.expect("loads")
    }

    pub(super) async fn load_all(&self) {
        for table in ["customers", "accounts", "transactions", "ledger_entries", "boundaries"] {
            self.load(table).await;
        }
    }

    /// Lands values behind what the lane already has, as one object; None is a tombstone.
    pub(super) async fn land(&self, topic: &str, partition: i32, values: &[Option<Vec<u8>>]) -> CommitRecord {
        self.land_on(LANDED_MS, topic, partition, &[values.to_vec()]).await.remove(0)
    }

    /// Lands objects that were written at a given time, the data of all and then the commit records of all.
    pub(super) async fn land_on(&self, timestamp_ms: i64, topic: &str, partition: i32, objects: &[Vec<Option<Vec<u8>>>]) -> Vec<CommitRecord> {
        const AT_ONCE: usize = 64;
        let newest = lake::log::newest(&self.store, topic, partition, None).await.expect("the lake answers");
        let (mut next_offset, mut previous) = newest.map_or((0, None), |it| (it.record.last_offset + 1, Some(it.sha256)));
        let (mut records, mut bodies) = (Vec::new(), Vec::new());
        for values in objects {
            let (record, parquet) = self.object(timestamp_ms, topic, partition, next_offset, previous, values);
            (next_offset, previous) = (record.last_offset + 1, Some(sha256_hex(&record.to_bytes())));
            bodies.push((record.data.clone(), parquet));
            records.push(record);
        }
        let puts = stream::iter(bodies).map(|(key, body)| async move { self.store.put(&key, body).await });
        puts.buffer_unordered(AT_ONCE).try_collect::<Vec<()>>().await.expect("puts");
        let appends = stream::iter(&records).map(|record| append(&self.store, record));
        let appended: Vec<Appended> = appends.buffer_unordered(AT_ONCE).try_collect().await.expect("appends");
        assert!(appended.iter().all(|it| matches!(it, Appended::Ours(_))), "nobody else writes here");
        records
    }

    fn object(
        &self,
        timestamp_ms: i64,
        topic: &str,
        partition: i32,
        first_offset: i64,
        previous: Option<String>,
        values: &[Option<Vec<u8>>],
    ) -> (CommitRecord, Bytes) {
        let last_offset = first_offset + values.len() as i64 - 1;
        let mut run = Records::default();
        for (offset, value) in (first_offset..).zip(values) {
            run.push(offset, timestamp_ms, Some(b"{}"), value.as_deref());
        }
        let (lane, date) = (Lane { topic: topic.into(), partition }, date_of(timestamp_ms));
        let encoded = encode(Sealed { lane, first_offset, last_offset, date, rows: values.len(), runs: vec![run] }).expect("encodes");
        assert_eq!(encoded.dead, []);
        let sha256 = sha256_hex(&encoded.parquet);
        let table = self.topics.lake_name(topic).expect("a topic that lands");
        let record = CommitRecord {
            schema: SCHEMA,
            topic: topic.to_owned(),
            partition,
            first_offset,
            last_offset,
            rows: encoded.rows,
            data: DataKey { table, date, partition, first_offset, last_offset, hash: DataKey::hash_of(&sha256) }.to_string(),
            bytes: encoded.parquet.len() as u64,
            sha256,
            timestamp_min: timestamp_ms,
            timestamp_max: timestamp_ms,
            previous,
            written_at: chrono::Utc::now(),
        };
        (record, encoded.parquet)
    }

    /// The bucket loses a commit record.
    pub(super) async fn lose(&self, record: &CommitRecord) {
        self.store.delete(&record.key()).await.expect("deletes");
    }
}

/// A change of a customer that says its own number; enough for the loader.
pub(super) fn envelope(id: i64) -> Option<Vec<u8>> {
    let source = format!(r#"{{"version":"x","txId":{},"lsn":{},"ts_us":1790000000000000}}"#, 700 + id, 10_000 + id);
    Some(format!(r#"{{"before":null,"after":{{"id":{id},"first_name":"Zoë \"Ada\" \\"}},"source":{source},"op":"c","ts_ms":1}}"#).into_bytes())
}

pub(super) fn envelopes(ids: std::ops::Range<i64>) -> Vec<Option<Vec<u8>>> {
    ids.map(envelope).collect()
}
