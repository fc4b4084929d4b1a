//! What lies in the lake: by table, and object by object with its hash checked.

use std::collections::BTreeMap;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::{
    encode::{self, Decoded},
    error::Error,
    log::{self, CommitRecord, READ_AHEAD},
    store::Store,
};
use crate::{change::Topics, fault::chain};

/// A table's committed objects.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct TableListing {
    pub table: String,
    pub objects: u64,
    pub records: u64,
    pub bytes: u64,
    pub lanes: Vec<LaneListing>,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct LaneListing {
    pub topic: String,
    pub partition: i32,
    pub objects: u64,
    pub records: u64,
    pub bytes: u64,
    pub first_offset: i64,
    pub last_offset: i64,
    /// The newest commit records, oldest first.
    pub newest: Vec<CommitRecord>,
}

/// Adds up all commit records, table by table, and shows the `newest` ones of each lane. One small request per object.
pub async fn list(store: &Store, topics: &Topics, newest: usize) -> Result<Vec<TableListing>, Error> {
    let mut tables: BTreeMap<String, TableListing> = BTreeMap::new();
    for lane in log::lanes(store).await? {
        let Some(name) = topics.lake_name(&lane.topic) else { continue };
        let Some(listed) = list_lane(store, &lane.topic, lane.partition, newest).await? else { continue };
        let table = tables.entry(name.clone()).or_insert_with(|| TableListing { table: name, ..TableListing::default() });
        table.objects += listed.objects;
        table.records += listed.records;
        table.bytes += listed.bytes;
        table.lanes.push(listed);
    }
    Ok(tables.into_values().collect())
}

async fn list_lane(store: &Store, topic: &str, partition: i32, newest: usize) -> Result<Option<LaneListing>, Error> {
    let mut lane: Option<LaneListing> = None;
    let mut first_offset = 0;
    loop {
        let keys = log::keys_from(store, topic, partition, first_offset, 1_000).await?;
        let mut records = stream::iter(&keys).map(|it| log::fetch(store, &it.key)).buffered(READ_AHEAD);
        while let Some(stored) = records.try_next().await? {
            let record = stored.record;
            let lane = lane.get_or_insert_with(|| LaneListing {
                topic: topic.to_owned(),
                partition,
                objects: 0,
                records: 0,
                bytes: 0,
                first_offset: record.first_offset,
                last_offset: record.last_offset,
                newest: Vec::new(),
            });
            lane.objects += 1;
            lane.records += record.rows;
            lane.bytes += record.bytes;
            lane.last_offset = record.last_offset;
            first_offset = record.first_offset + 1;
            lane.newest.push(record);
            if lane.newest.len() > newest {
                lane.newest.remove(0);
            }
        }
        drop(records);
        if keys.len() < 1_000 {
            return Ok(lane);
        }
    }
}

/// The records of a committed object, in order, after its size and SHA-256 were checked.
pub async fn read(store: &Store, record: &CommitRecord) -> Result<Decoded, Error> {
    let key = record.data.clone();
    let parquet = store.get(&key).await?.ok_or_else(|| Error::Missing(key.clone()))?;
    let expected = record.clone();
    let decoded = tokio::task::spawn_blocking(move || {
        let found = log::sha256_hex(&parquet);
        if found != expected.sha256 || parquet.len() as u64 != expected.bytes {
            return Err(format!("its SHA-256 is {found} over {} bytes, not {} over {}", parquet.len(), expected.sha256, expected.bytes));
        }
        let decoded = encode::decode(parquet).map_err(|error| chain(&error))?;
        let rows: u64 = decoded.batches.iter().map(|it| it.num_rows() as u64).sum();
        if rows == expected.rows { Ok(decoded) } else { Err(format!("it has {rows} rows, not {}", expected.rows)) }
    });
    decoded.await?.map_err(|what| Error::Damaged { key, what })
}
