//! The loader against a bare COPY of the same rows into the same table, in one run on one server.
//!
//! `cargo bench --bench loader`, on `LEDGERLINE_TEST_POSTGRES` and the embedded S3 server. `LEDGERLINE_BENCH_ROWS` (200,000) is how
//! many. Prints rows/s of both, large objects and small, and the ratio of the medians; rounds take turns, so that a busy
//! machine is unfair to neither.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ledgerline::{
    change::Topics,
    embedded::s3,
    lake::{
        self, Access, Addressing, Store,
        batch::Sealed,
        encode::encode,
        log::{CommitRecord, SCHEMA, sha256_hex},
        object::{DataKey, date_of},
    },
    secret::Secret,
    stream::{Lane, records::Records},
    units::{Size, grouped},
    warehouse::{Warehouse, load},
};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

const ROUNDS: usize = 3;
const TOPIC: &str = "bank.public.accounts";
const NOON_MS: i64 = 1_795_348_800_000;
const CHUNK_BYTES: usize = 512 * 1024;

#[tokio::main]
#[allow(clippy::print_stdout, reason = "a benchmark's result is what it prints")]
async fn main() -> Result<()> {
    let rows: i64 = std::env::var("LEDGERLINE_BENCH_ROWS").map_or(Ok(200_000), |it| it.parse()).context("LEDGERLINE_BENCH_ROWS is a number")?;
    let mut url: url::Url = std::env::var("LEDGERLINE_TEST_POSTGRES").unwrap_or_else(|_| "postgres://postgres@127.0.0.1:5432/postgres".to_owned()).parse()?;
    let mut admin = PgConnection::connect(url.as_str()).await?;
    let database = format!("warehouse_bench_{}", std::process::id());
    admin.execute(AssertSqlSafe(format!("create database {database}"))).await?;
    url.set_path(&database);
    let outcome = compare(&Secret::new(url.as_str()), rows).await;
    admin.execute(AssertSqlSafe(format!("drop database {database} with (force)"))).await?;
    outcome
}

#[allow(clippy::print_stdout, reason = "a benchmark's result is what it prints")]
async fn compare(url: &Secret, rows: i64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let secret = Secret::new("something");
    let config = s3::Config {
        dir: dir.path().to_owned(),
        access_key_id: "someone".to_owned(),
        secret_access_key: secret.clone(),
        buckets: vec!["large".to_owned(), "small".to_owned()],
        reserve: Size(1 << 20),
        ..s3::Config::default()
    };
    let server = s3::Server::start(config).await?;
    let warehouse = Warehouse::connect(&url.clone().into()).await?;
    warehouse.prepare().await?;
    let values: Vec<Vec<u8>> = (0..rows).map(envelope).collect();
    let bytes: usize = values.iter().map(Vec::len).sum();
    println!("{} rows of {} bytes", grouped(rows.unsigned_abs()), bytes / values.len().max(1));
    for (bucket, rows_per_object) in [("large", 50_000), ("small", 1_000)] {
        let access = Access {
            endpoint: Some(server.endpoint()),
            region: "us-east-1".to_owned(),
            bucket: bucket.to_owned(),
            addressing: Addressing::Auto,
            access_key_id: "someone".to_owned(),
            secret_access_key: secret.clone(),
        };
        let store = Store::connect(&access).await?;
        let objects = land(&store, &values, rows_per_object).await?;
        let (mut bare, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            bare.push(bare_copy(url, &values, &objects).await?);
            ours.push(loader(url, &store, &warehouse, rows).await?);
        }
        let (bare, ours) = (median(bare), median(ours));
        let per_second = |took: Duration| grouped((values.len() as f64 / took.as_secs_f64()) as u64);
        println!(
            "{} objects: bare COPY {} rows/s, loader {} rows/s, ratio {:.2}",
            objects.len(),
            per_second(bare),
            per_second(ours),
            bare.as_secs_f64() / ours.as_secs_f64()
        );
    }
    server.stop().await;
    Ok(())
}

fn median(mut all: Vec<Duration>) -> Duration {
    all.sort();
    all[all.len() / 2]
}

/// An update of an account as the stream carries it.
fn envelope(id: i64) -> Vec<u8> {
    let image = |balance: &str| {
        format!(
            r#"{{"id":{id},"account_number":"DE{id:020}","customer_id":{id},"account_type":"CHECKING","status":"ACTIVE","currency":"EUR","balance":"{balance}","interest_rate":"1.2500","opened_at":"2026-11-01T10:00:00.000000Z","closed_at":null,"created_at":"2026-11-01T10:00:00.000000Z","updated_at":"2026-11-22T10:00:00.{:06}Z"}}"#,
            id % 1_000_000
        )
    };
    let source = format!(
        r#"{{"version":"0.1.0","connector":"postgresql","name":"bank","ts_ms":1795348800000,"snapshot":null,"db":"bank","sequence":"[\"{id}\",\"{id}\"]","ts_us":1795348800000000,"ts_ns":1795348800000000000,"schema":"public","table":"accounts","txId":{id},"lsn":{id},"xmin":null,"origin":null,"origin_lsn":null}}"#
    );
    format!(
        r#"{{"before":{},"after":{},"source":{source},"transaction":{{"id":"{id}:{id}","total_order":1,"data_collection_order":1}},"op":"u","ts_ms":1795348800000,"ts_us":1795348800000000,"ts_ns":1795348800000000000}}"#,
        image("1204.17"),
        image("1204.19")
    )
    .into_bytes()
}

async fn land(store: &Store, values: &[Vec<u8>], rows_per_object: usize) -> Result<Vec<String>> {
    let (mut first_offset, mut previous, mut objects) = (0, None, Vec::new());
    for values in values.chunks(rows_per_object) {
        let last_offset = first_offset + values.len() as i64 - 1;
        let mut run = Records::default();
        for (offset, value) in (first_offset..).zip(values) {
            run.push(offset, NOON_MS, Some(b"{\"id\":1}"), Some(value));
        }
        let (lane, date) = (Lane { topic: TOPIC.into(), partition: 0 }, date_of(NOON_MS));
        let encoded = encode(Sealed { lane, first_offset, last_offset, date, rows: values.len(), runs: vec![run] })?;
        let sha256 = sha256_hex(&encoded.parquet);
        let data = DataKey { table: "accounts".to_owned(), date, partition: 0, first_offset, last_offset, hash: DataKey::hash_of(&sha256) }.to_string();
        let record = CommitRecord {
            schema: SCHEMA,
            topic: TOPIC.to_owned(),
            partition: 0,
            first_offset,
            last_offset,
            rows: encoded.rows,
            data: data.clone(),
            bytes: encoded.parquet.len() as u64,
            sha256,
            timestamp_min: NOON_MS,
            timestamp_max: NOON_MS,
            previous,
            written_at: chrono::Utc::now(),
        };
        store.put(&data, encoded.parquet).await?;
        lake::log::append(store, &record).await?;
        (first_offset, previous) = (last_offset + 1, Some(sha256_hex(&record.to_bytes())));
        objects.push(data);
    }
    Ok(objects)
}

/// The same rows from memory, encoded beforehand: only the server's work and the socket.
async fn bare_copy(url: &Secret, values: &[Vec<u8>], objects: &[String]) -> Result<Duration> {
    let mut connection = PgConnection::connect(url.reveal()).await?;
    connection.execute("truncate raw.accounts, raw._loads").await?;
    let (mut chunks, mut chunk) = (Vec::new(), b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0".to_vec());
    let field = |chunk: &mut Vec<u8>, bytes: &[u8], version: &[u8]| -> Result<()> {
        chunk.extend_from_slice(&i32::try_from(bytes.len() + version.len())?.to_be_bytes());
        chunk.extend_from_slice(version);
        chunk.extend_from_slice(bytes);
        Ok(())
    };
    let rows_per_object = values.len().div_ceil(objects.len());
    for (offset, value) in values.iter().enumerate() {
        chunk.extend_from_slice(&5_i16.to_be_bytes());
        field(&mut chunk, value, &[1])?;
        field(&mut chunk, TOPIC.as_bytes(), &[])?;
        field(&mut chunk, &0_i32.to_be_bytes(), &[])?;
        field(&mut chunk, &(offset as i64).to_be_bytes(), &[])?;
        field(&mut chunk, objects[offset / rows_per_object].as_bytes(), &[])?;
        if chunk.len() >= CHUNK_BYTES {
            chunks.push(std::mem::take(&mut chunk));
        }
    }
    chunk.extend_from_slice(&(-1_i16).to_be_bytes());
    chunks.push(chunk);

    let began = Instant::now();
    let mut copy = connection.copy_in_raw("copy raw.accounts(v, _topic, _partition, _offset, _object) from stdin (format binary)").await?;
    for chunk in chunks {
        copy.send(chunk).await?;
    }
    copy.finish().await?;
    Ok(began.elapsed())
}

async fn loader(url: &Secret, store: &Store, warehouse: &Warehouse, rows: i64) -> Result<Duration> {
    let mut connection = PgConnection::connect(url.reveal()).await?;
    connection.execute("truncate raw.accounts, raw._loads").await?;
    let began = Instant::now();
    let loaded = load::load(store, warehouse, &Topics::new("bank"), "accounts", |_| {}).await?;
    let took = began.elapsed();
    if loaded.rows != rows.unsigned_abs() {
        bail!("{} rows loaded instead of {rows}", loaded.rows);
    }
    Ok(took)
}
