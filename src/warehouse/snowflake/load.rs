//! Objects of the lake → one file → one COPY, behind the lane's position row. Where Snowflake can read the lake's bucket by an
//! external stage, COPY takes the objects from there; one that holds what is no text or no JSON is read here all the same,
//! because only then can its records be told apart.
//!
//! A transaction begins with `update raw._positions … where last_offset = <seen>`. Snowflake lets one writer at a time change
//! that row: the other waits, finds it moved, changes nothing and rolls back. The file is uploaded before the transaction, so
//! the row is held for as long as COPY takes and not for the upload.

use std::sync::Arc;

use arrow_array::{ArrayRef, Int32Array, Int64Array, RecordBatch, StringArray};

use super::{
    Row, Session, Snowflake,
    error::Error as Refusal,
    number, parsed, raw_table,
    stage::{File, Staged, copy_objects},
    text,
};
use crate::{
    lake::{self, Dead, Identity, Store, log::CommitRecord},
    stream::Lane,
    warehouse::{
        Error,
        load::{LaneLoader, Loaded},
    },
};

/// Rows of `_rejected` and `_loads` written by one statement.
const ROWS_AT_ONCE: usize = 500;

/// Loads one table's lanes over a session of its own.
pub(in crate::warehouse) struct Loader<'a> {
    warehouse: &'a Snowflake,
    session: Session,
    store: &'a Store,
    into: String,
}

/// Where COPY finds the rows of a group.
enum Source<'a> {
    /// Every record was kept out.
    Nowhere,
    Ours(&'a Staged),
    /// The external stage over the lake's bucket.
    Lake(&'a str),
}

/// What a record says that is kept out of the table, and whether its bytes are in the object.
struct Rejected<'a> {
    record: &'a CommitRecord,
    dead: Dead,
    landed: bool,
}

impl<'a> Loader<'a> {
    pub(in crate::warehouse) async fn new(warehouse: &'a Snowflake, store: &'a Store, table: &str) -> Result<Self, Refusal> {
        warehouse.prepare_table(table).await?;
        let session = warehouse.session()?;
        // COPY looks for its stage in a current schema even where both have their full names.
        session.run("use schema raw").await?;
        Ok(Self { warehouse, session, store, into: raw_table(table) })
    }

    /// Reads the objects and checks them against their hashes; what is no JSON is told apart.
    async fn read<'g>(&self, group: &'g [CommitRecord]) -> Result<(File, Vec<Rejected<'g>>), Error> {
        let (mut file, mut rejected) = (File::EMPTY, Vec::new());
        for record in group {
            let _place = self.warehouse.room().take(record.bytes).await?;
            let decoded = lake::read(self.store, record).await.map_err(Error::Lake)?;
            rejected.extend(decoded.dead.into_iter().map(|dead| Rejected { record, dead, landed: false }));
            let (about, batches) = (record.clone(), decoded.batches);
            // Checking and compressing burn a core for a while.
            let added = tokio::task::spawn_blocking(move || add(file, &about, &batches)).await.map_err(|_| Error::Interrupted)?;
            let refused;
            (file, refused) = added?;
            rejected.extend(refused.into_iter().map(|dead| Rejected { record, dead, landed: true }));
        }
        Ok((file, rejected))
    }

    /// Within the transaction: None where the lane is no longer where it was seen.
    async fn write(
        &self,
        lane: &Lane,
        seen: Option<i64>,
        group: &[CommitRecord],
        source: &Source<'_>,
        rejected: &[Rejected<'_>],
    ) -> Result<Option<()>, Refusal> {
        let last_offset = group.last().map_or(-1, |it| it.last_offset);
        let moved = format!("update raw._positions set last_offset = {last_offset} where {} and last_offset = {}", is_lane(lane), seen.unwrap_or(-1));
        // Two rows of one lane, should two first loads have met, move as one.
        if self.session.changed(&moved).await? == 0 {
            return Ok(None);
        }
        let into = format!("{}(v, _topic, _partition, _offset, _object)", self.into);
        match source {
            Source::Nowhere => {}
            Source::Ours(staged) => {
                let select = "parse_json($1:v::varchar), $1:topic::varchar, $1:partition::number(10, 0), $1:offset::number(19, 0), $1:object::varchar";
                staged.copy(&self.session, &into, select).await?;
            }
            Source::Lake(stage) => {
                let select = "parse_json($1:value::varchar), $1:_topic::varchar, $1:_partition::number(10, 0), $1:_offset::number(19, 0), metadata$filename";
                copy_objects(&self.session, stage, &into, select, group).await?;
            }
        }
        for some in rejected.chunks(ROWS_AT_ONCE) {
            let rows: Vec<String> = some.iter().map(rejected_row).collect();
            let columns = "topic, partition, \"offset\", reason, object, tx_id, lsn, op, key, landed";
            self.session.run(&format!("insert into raw._rejected({columns}) values {}", rows.join(", "))).await?;
        }
        for some in group.chunks(ROWS_AT_ONCE) {
            let rows: Vec<String> = some.iter().map(|record| load_row(record, rejected)).collect();
            let columns = "topic, partition, first_offset, last_offset, object, \"ROWS\", rejected";
            self.session.run(&format!("insert into raw._loads({columns}) values {}", rows.join(", "))).await?;
        }
        Ok(Some(()))
    }

    /// All of it or nothing. None where somebody else was first.
    async fn transact(
        &self,
        lane: &Lane,
        seen: Option<i64>,
        group: &[CommitRecord],
        source: &Source<'_>,
        rejected: &[Rejected<'_>],
    ) -> Result<Option<()>, Refusal> {
        self.session.run("begin").await?;
        match self.write(lane, seen, group, source, rejected).await {
            Ok(Some(())) => self.session.run("commit").await.map(Some),
            // Somebody else's commit came between.
            Err(Refusal::Refused(refused)) if refused.is_conflict() => self.session.run("rollback").await.map(|()| None),
            Ok(None) => self.session.run("rollback").await.map(|()| None),
            Err(error) => {
                // The error that counts is the first; a session that cannot roll back ends, and its transaction with it.
                let _ = self.session.run("rollback").await;
                Err(error)
            }
        }
    }

    /// The lane's position row, before its first load.
    async fn begin_lane(&self, lane: &Lane) -> Result<(), Refusal> {
        let held = self.warehouse.rows(&format!("select count(*)::varchar from raw._positions where {}", is_lane(lane))).await?;
        if number(&held, 0) == 0 {
            let (topic, partition, lane) = (text(&lane.topic), lane.partition, is_lane(lane));
            let sql = format!("insert into raw._positions select {topic}, {partition}, -1 where not exists (select 1 from raw._positions where {lane})");
            self.warehouse.rows(&sql).await?;
        }
        Ok(())
    }
}

impl LaneLoader for Loader<'_> {
    /// A file is held in memory while it grows: a quarter of what a COPY over a wire may take.
    const BYTES_MAX: u64 = 16 * 1024 * 1024;

    async fn position(&mut self, lane: &Lane) -> Result<Option<i64>, Error> {
        let rows = self.warehouse.rows(&format!("select max(last_offset)::varchar from raw._loads where {}", is_lane(lane))).await?;
        Ok(rows.first().and_then(|row: &Row| parsed(row, 0)))
    }

    async fn load(&mut self, lane: &Lane, seen: Option<i64>, group: &[CommitRecord]) -> Result<Option<Loaded>, Error> {
        if seen.is_none() {
            self.begin_lane(lane).await?;
        }
        let loaded = Loaded { files: group.len() as u64, rows: group.iter().map(|it| it.rows).sum(), rejected: 0 };
        // Where records became dead letters the range has holes, and only the object says which they were.
        if let Some(stage) = self.warehouse.stage().filter(|_| group.iter().all(|it| it.holes() == 0)) {
            match self.transact(lane, seen, group, &Source::Lake(stage), &[]).await {
                // A record is no JSON: it is told apart below.
                Err(Refusal::Refused(refused)) if refused.is_about_a_value() => {}
                done => return Ok(done?.map(|()| loaded)),
            }
        }
        let (file, rejected) = self.read(group).await?;
        let staged = file.upload(&self.session).await?;
        let source = staged.as_ref().map_or(Source::Nowhere, Source::Ours);
        let written = self.transact(lane, seen, group, &source, &rejected).await;
        if let Some(staged) = staged {
            staged.remove(&self.session).await;
        }
        let written = written.map_err(|error| about(error, group))?;
        let loaded = Loaded { rejected: rejected.len() as u64, ..loaded };
        for Rejected { record, dead, .. } in &rejected {
            tracing::warn!(topic = record.topic, partition = record.partition, offset = dead.offset, reason = dead.reason, "record kept out of the warehouse");
        }
        Ok(written.map(|()| loaded))
    }
}

/// A file of ours is gone when somebody looks for it: the objects it was made of are not.
fn about(error: Refusal, group: &[CommitRecord]) -> Refusal {
    match (error, group) {
        (Refusal::Copy { files, loaded, expected, errors, first_error }, [first, .., last]) => {
            let files = format!("{files} ({} to {})", first.data, last.data);
            Refusal::Copy { files, loaded, expected, errors, first_error }
        }
        (Refusal::Copy { files, loaded, expected, errors, first_error }, [only]) => {
            Refusal::Copy { files: format!("{files} ({})", only.data), loaded, expected, errors, first_error }
        }
        (other, _) => other,
    }
}

/// Adds an object's records to the file, but for those that are no JSON.
fn add(mut file: File, record: &CommitRecord, batches: &[RecordBatch]) -> Result<(File, Vec<Dead>), Refusal> {
    let mut refused = Vec::new();
    for batch in batches {
        let (mut offsets, mut values) = (Vec::with_capacity(batch.num_rows()), Vec::with_capacity(batch.num_rows()));
        for row in lake::rows(batch) {
            if let Some(value) = row.value
                && let Err(error) = serde_json::from_str::<serde::de::IgnoredAny>(value)
            {
                // Line and column; the text itself is not in it.
                let reason = format!("the value is not JSON: {error}");
                refused.push(Dead { offset: row.offset, reason, identity: Identity::of(value.as_bytes()) });
                continue;
            }
            offsets.push(row.offset);
            values.push(row.value);
        }
        let rows = offsets.len();
        let columns: [(&str, ArrayRef); 5] = [
            ("v", Arc::new(StringArray::from(values))),
            ("topic", Arc::new(StringArray::from(vec![record.topic.as_str(); rows]))),
            ("partition", Arc::new(Int32Array::from(vec![record.partition; rows]))),
            ("offset", Arc::new(Int64Array::from(offsets))),
            ("object", Arc::new(StringArray::from(vec![record.data.as_str(); rows]))),
        ];
        file.add(columns)?;
    }
    Ok((file, refused))
}

fn is_lane(lane: &Lane) -> String {
    format!("topic = {} and partition = {}", text(&lane.topic), lane.partition)
}

fn rejected_row(Rejected { record, dead, landed }: &Rejected<'_>) -> String {
    let integer = |it: Option<i64>| it.map_or_else(|| "null".to_owned(), |it| it.to_string());
    let words = |it: &Option<String>| it.as_deref().map_or_else(|| "null".to_owned(), text);
    let known = &dead.identity;
    format!(
        "({}, {}, {}, {}, {}, {}, {}, {}, {}, {landed})",
        text(&record.topic),
        record.partition,
        dead.offset,
        text(&dead.reason),
        text(&record.data),
        integer(known.tx_id),
        integer(known.lsn),
        words(&known.op),
        words(&known.key)
    )
}

fn load_row(record: &CommitRecord, rejected: &[Rejected<'_>]) -> String {
    let refused = rejected.iter().filter(|it| it.record.first_offset == record.first_offset).count();
    format!(
        "({}, {}, {}, {}, {}, {}, {refused})",
        text(&record.topic),
        record.partition,
        record.first_offset,
        record.last_offset,
        text(&record.data),
        record.rows
    )
}
