//! Records → Parquet and back. The envelope goes through as the exact text it was; nothing here parses it.

use std::sync::Arc;

use arrow_array::{
    Array as _, ArrayRef, Int32Array, Int64Array, RecordBatch, StringArray, TimestampMillisecondArray,
    builder::OffsetBufferBuilder,
    cast::AsArray as _,
    types::{Int32Type, Int64Type, TimestampMillisecondType},
};
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef, TimeUnit};
use bytes::Bytes;
use parquet::{
    arrow::{ArrowWriter, arrow_reader::ParquetRecordBatchReaderBuilder},
    basic::{Compression, Encoding, ZstdLevel},
    errors::ParquetError,
    file::properties::{EnabledStatistics, WriterProperties},
    schema::types::ColumnPath,
};

use super::{
    batch::Sealed,
    dead::{Dead, DeadLetter},
};
use crate::stream::records::{Column, Records};

/// A data object's bytes, and what did not fit into it.
#[derive(Debug)]
pub struct Encoded {
    pub parquet: Bytes,
    pub rows: u64,
    pub dead: Vec<DeadLetter>,
}

/// One row of a data object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row<'a> {
    pub offset: i64,
    pub timestamp_ms: i64,
    pub key: Option<&'a str>,
    /// The envelope as Kafka had it; None is a tombstone.
    pub value: Option<&'a str>,
}

/// `_topic, _partition, _offset, _timestamp, key, value`.
fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("_topic", DataType::Utf8, false),
        Field::new("_partition", DataType::Int32, false),
        Field::new("_offset", DataType::Int64, false),
        Field::new("_timestamp", DataType::Timestamp(TimeUnit::Millisecond, Some("UTC".into())), false),
        Field::new("key", DataType::Utf8, true),
        Field::new("value", DataType::Utf8, true),
    ]))
}

/// Level 3 was bigger and slower; a dictionary on values that never repeat costs time and wins nothing.
fn properties() -> WriterProperties {
    let mut properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1).expect("level 1 exists")))
        .set_created_by(concat!("ledgerline ", env!("CARGO_PKG_VERSION")).to_owned());
    for column in ["_offset", "_timestamp"] {
        let path = ColumnPath::from(column);
        properties = properties.set_column_dictionary_enabled(path.clone(), false).set_column_encoding(path, Encoding::DELTA_BINARY_PACKED);
    }
    for column in ["key", "value"] {
        let path = ColumnPath::from(column);
        properties = properties.set_column_dictionary_enabled(path.clone(), false).set_column_statistics_enabled(path, EnabledStatistics::None);
    }
    properties.build()
}

/// Encodes a batch and frees its records on the way. Burns a core for a while: call it off the runtime threads.
pub fn encode(batch: Sealed) -> Result<Encoded, ParquetError> {
    let (schema, mut dead) = (schema(), Vec::new());
    let mut writer = ArrowWriter::try_new(Vec::new(), Arc::clone(&schema), Some(properties()))?;
    let mut rows = 0;
    for run in batch.runs {
        let run = if is_text(&run.keys) && is_text(&run.values) { run } else { without_dead_letters(&run, &mut dead) };
        let clean = arrays(&schema, &batch.lane.topic, batch.lane.partition, run)?;
        rows += clean.num_rows() as u64;
        writer.write(&clean)?;
    }
    if !dead.is_empty() {
        writer.append_key_value_metadata(Dead::footer(&dead));
    }
    Ok(Encoded { parquet: writer.into_inner()?.into(), rows, dead })
}

/// The run's own buffers as Arrow arrays; its texts were found to be text.
fn arrays(schema: &SchemaRef, topic: &str, partition: i32, mut run: Records) -> Result<RecordBatch, ParquetError> {
    let n_rows = run.len();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::new_repeated(topic, n_rows)),
        Arc::new(Int32Array::from(vec![partition; n_rows])),
        Arc::new(Int64Array::from(std::mem::take(&mut run.offsets))),
        Arc::new(TimestampMillisecondArray::from(std::mem::take(&mut run.timestamps_ms)).with_timezone("UTC")),
        Arc::new(texts(&mut run.keys)),
        Arc::new(texts(&mut run.values)),
    ];
    Ok(RecordBatch::try_new(Arc::clone(schema), columns)?)
}

/// Takes the column's bytes without copying them.
fn texts(column: &mut Column) -> StringArray {
    let mut ends = OffsetBufferBuilder::new(column.lengths.len());
    column.lengths.iter().for_each(|it| ends.push_length(*it as usize));
    let present = std::mem::take(&mut column.present);
    let nulls = present.contains(&false).then(|| present.into());
    StringArray::new(ends.finish(), std::mem::take(&mut column.bytes).into(), nulls)
}

fn is_text(column: &Column) -> bool {
    match std::str::from_utf8(&column.bytes) {
        // The whole may be text where its parts are not: half a character in each of two rows.
        Ok(_) if column.bytes.is_ascii() => true,
        Ok(all) => column
            .lengths
            .iter()
            .scan(0, |end, length| {
                *end += *length as usize;
                Some(*end)
            })
            .all(|end| all.is_char_boundary(end)),
        Err(_) => false,
    }
}

/// Why the lake does not take a record; None where it does.
pub fn refusal(key: Option<&[u8]>, value: Option<&[u8]>) -> Option<&'static str> {
    let is_text = |text: Option<&[u8]>| text.is_none_or(|it| std::str::from_utf8(it).is_ok());
    match (is_text(key), is_text(value)) {
        (true, true) => None,
        (false, _) => Some("the key is not UTF-8"),
        (true, false) => Some("the value is not UTF-8"),
    }
}

/// Copies what is text; the rest is dead.
fn without_dead_letters(run: &Records, dead: &mut Vec<DeadLetter>) -> Records {
    let mut clean = Records::default();
    let clocks = run.offsets.iter().zip(&run.timestamps_ms);
    for ((offset, timestamp_ms), (key, value)) in clocks.zip(run.keys.rows().zip(run.values.rows())) {
        let Some(reason) = refusal(key, value) else {
            clean.push(*offset, *timestamp_ms, key, value);
            continue;
        };
        dead.push(DeadLetter { offset: *offset, timestamp_ms: *timestamp_ms, key: key.map(Into::into), value: value.map(Into::into), reason });
    }
    clean
}

/// Reads a data object. Burns a core for a while: call it off the runtime threads.
pub fn decode(parquet: Bytes) -> Result<Decoded, Unreadable> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(parquet)?;
    let found = reader.schema();
    if found.fields().iter().map(|it| (it.name(), it.data_type())).ne(schema().fields().iter().map(|it| (it.name(), it.data_type()))) {
        return Err(Unreadable::Columns);
    }
    let dead = Dead::read(reader.metadata().file_metadata().key_value_metadata())?;
    Ok(Decoded { batches: reader.build()?.collect::<Result<_, _>>()?, dead })
}

/// What a data object holds.
#[derive(Debug)]
pub struct Decoded {
    /// Its rows, in order of offsets; take them out with [`rows`].
    pub batches: Vec<RecordBatch>,
    /// Records of its range that are no text.
    pub dead: Vec<Dead>,
}

/// Not a data object of ours.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    #[error("it is not readable Parquet")]
    Parquet(#[from] ParquetError),
    #[error("its columns are not readable")]
    Arrow(#[from] ArrowError),
    #[error("its columns are not those of the lake")]
    Columns,
    #[error("what its footer says of dead letters is not readable")]
    Footer(#[from] serde_json::Error),
}

/// The rows of a batch that [`decode`] returned, in order of offsets.
pub fn rows(batch: &RecordBatch) -> impl Iterator<Item = Row<'_>> {
    let offsets = batch.column(2).as_primitive::<Int64Type>();
    let timestamps = batch.column(3).as_primitive::<TimestampMillisecondType>();
    let (keys, values) = (batch.column(4).as_string::<i32>(), batch.column(5).as_string::<i32>());
    let text = |column: &'_ StringArray, row: usize| column.is_valid(row).then_some(row);
    (0..batch.num_rows()).map(move |row| Row {
        offset: offsets.value(row),
        timestamp_ms: timestamps.value(row),
        key: text(keys, row).map(|it| keys.value(it)),
        value: text(values, row).map(|it| values.value(it)),
    })
}

/// Topic and partition of each row of a batch that [`decode`] returned.
pub fn origins(batch: &RecordBatch) -> impl Iterator<Item = (&str, i32)> {
    let (topics, partitions) = (batch.column(0).as_string::<i32>(), batch.column(1).as_primitive::<Int32Type>());
    (0..batch.num_rows()).map(move |row| (topics.value(row), partitions.value(row)))
}

#[cfg(test)]
mod tests {
    use chrono::NaiveDate;
    use proptest::prelude::*;

    use super::*;
    use crate::stream::Lane;

    type Text = Option<Vec<u8>>;

    fn sealed(runs: &[Vec<(Text, Text)>]) -> Sealed {
        let mut offset = 0;
        let mut to_run = |rows: &Vec<(Text, Text)>| {
            let mut run = Records::default();
            for (key, value) in rows {
                run.push(offset, 1_000 + offset, key.as_deref(), value.as_deref());
                offset += 1;
            }
            run
        };
        let runs: Vec<Records> = runs.iter().map(&mut to_run).collect();
        let rows = runs.iter().map(Records::len).sum();
        let lane = Lane { topic: "bank.public.customers".into(), partition: 3 };
        Sealed { lane, first_offset: 0, last_offset: offset - 1, date: NaiveDate::default(), rows, runs }
    }

    fn text(maybe: &Text) -> Result<Option<&str>, std::str::Utf8Error> {
        maybe.as_deref().map(std::str::from_utf8).transpose()
    }

    /// Texts, nulls, and now and then bytes that are no text, also such as are text only together.
    fn any_text() -> impl Strategy<Value = Text> {
        prop_oneof![
            8 => any::<String>().prop_map(|it| Some(it.into_bytes())),
            2 => Just(None),
            1 => Just(Some(vec![0xE2, 0x82])),
            1 => Just(Some(vec![0xAC])),
        ]
    }

    proptest! {
        #[test]
        fn an_object_holds_exactly_the_texts_and_the_rest_is_dead(
            runs in prop::collection::vec(prop::collection::vec((any_text(), any_text()), 1..12), 1..4),
        ) {
            let encoded = encode(sealed(&runs)).expect("encodes");
            let all: Vec<&(Text, Text)> = runs.iter().flatten().collect();

            let Decoded { batches, dead } = decode(encoded.parquet).expect("decodes");
            prop_assert_eq!(dead, encoded.dead.iter().map(Dead::of).collect::<Vec<_>>());
            let landed: Vec<Row<'_>> = batches.iter().flat_map(rows).collect();
            prop_assert_eq!(landed.len() as u64, encoded.rows);
            prop_assert_eq!(landed.len() + encoded.dead.len(), all.len());
            for row in landed {
                let (key, value) = all[usize::try_from(row.offset).expect("small")];
                prop_assert_eq!((Ok(row.key), Ok(row.value), row.timestamp_ms), (text(key), text(value), 1_000 + row.offset));
            }
            for letter in encoded.dead {
                let (key, value) = all[usize::try_from(letter.offset).expect("small")];
                prop_assert!(text(key).is_err() || text(value).is_err());
                prop_assert_eq!((&letter.key, &letter.value), (key, value));
            }
            prop_assert!(batches.iter().flat_map(origins).all(|it| it == ("bank.public.customers", 3)));
        }
    }

    #[test]
    fn the_same_records_give_the_same_bytes() {
        let runs = [vec![(Some(b"{\"id\":1}".to_vec()), Some(b"{\"op\":\"c\"}".to_vec())), (Some(b"{\"id\":1}".to_vec()), None)]];
        assert_eq!(encode(sealed(&runs)).expect("encodes").parquet, encode(sealed(&runs)).expect("encodes").parquet);
    }

    #[test]
    fn garbage_is_not_an_object() {
        assert!(decode(Bytes::from_static(b"PAR1 but no more")).is_err());
    }
}
