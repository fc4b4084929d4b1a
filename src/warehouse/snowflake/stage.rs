//! Rows → a file in the internal stage → COPY → gone again.
//!
//! Many small objects of the lake make one file, so that a load is one upload and one COPY however finely the lake is cut. The
//! file lives in memory, compressed, and its name is used once: COPY skips a name that it has seen.

use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::{ArrayRef, RecordBatch};
use bytes::Bytes;
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, ZstdLevel},
    file::properties::WriterProperties,
};
use sha2::{Digest as _, Sha256};

use super::{
    error::{Error, without_values},
    session::{Row, Session},
    text,
};
use crate::lake::log::CommitRecord;

/// The stage of all loads.
pub(super) const STAGE: &str = "raw.ledgerline_stage";

/// Rows on their way into a file.
pub(crate) struct File {
    writer: Option<ArrowWriter<Vec<u8>>>,
    rows: u64,
}

impl File {
    pub(crate) const EMPTY: Self = Self { writer: None, rows: 0 };

    pub(crate) fn add<'a>(&mut self, columns: impl IntoIterator<Item = (&'a str, ArrayRef)>) -> Result<(), Error> {
        let unreadable = |error: parquet::errors::ParquetError| Error::Upload(error.to_string());
        // Optional, whatever a batch holds: the next may hold nothing.
        let batch = RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, column)| (name, column, true)));
        let batch = batch.map_err(|error| Error::Upload(error.to_string()))?;
        if batch.num_rows() == 0 {
            return Ok(());
        }
        if self.writer.is_none() {
            let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).set_dictionary_enabled(false).build();
            self.writer = Some(ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).map_err(unreadable)?);
        }
        let writer = self.writer.as_mut().expect("it was made above");
        self.rows += batch.num_rows() as u64;
        writer.write(&batch).map_err(unreadable)?;
        // What is not yet a row group is held uncompressed.
        const HELD_MAX: usize = 16 * 1024 * 1024;
        if writer.in_progress_size() > HELD_MAX {
            writer.flush().map_err(unreadable)?;
        }
        Ok(())
    }

    /// None where there is nothing to send.
    pub(crate) async fn upload(self, session: &Session) -> Result<Option<Staged>, Error> {
        let Some(writer) = self.writer else { return Ok(None) };
        let body = tokio::task::spawn_blocking(move || writer.into_inner()).await;
        let body = body.map_err(|error| Error::Upload(error.to_string()))?.map_err(|error| Error::Upload(error.to_string()))?;
        let (folder, name) = (format!("{STAGE}/{}", unused()), "rows.parquet");
        session.put(&folder, name, Bytes::from(body)).await?;
        Ok(Some(Staged { place: format!("@{folder}/{name}"), rows: self.rows }))
    }
}

/// A file that lies in the stage.
pub(crate) struct Staged {
    place: String,
    rows: u64,
}

impl Staged {
    /// Copies its rows into a table, in the session's transaction. `into` is `raw.x(a, b)`, `select` what of `$1` goes there.
    pub(crate) async fn copy(&self, session: &Session, into: &str, select: &str) -> Result<(), Error> {
        let sql = format!("copy into {into} from (select {select} from {}) file_format = (type = parquet)", self.place);
        taken(&session.rows(&sql).await?, self.rows, &self.place)
    }

    /// What a crash leaves is a file nobody reads; the stage's owner may remove it at any time.
    pub(crate) async fn remove(self, session: &Session) {
        if let Err(error) = session.run(&format!("remove {}", self.place)).await {
            tracing::debug!(%error, place = self.place, "a file stays in the stage");
        }
    }
}

/// Copies whole objects of the lake into a table, from where they lie.
///
/// `force`: COPY remembers for 64 days which files it has read into a table, and skips them; what is loaded is told by
/// `raw._positions` alone. What came of the files is checked by their rows, which their commit records promise.
pub(super) async fn copy_objects(session: &Session, stage: &str, into: &str, select: &str, objects: &[CommitRecord]) -> Result<(), Error> {
    let files: Vec<String> = objects.iter().map(|it| text(&it.data)).collect();
    let sql = format!("copy into {into} from (select {select} from @{stage}/) files = ({}) file_format = (type = parquet) force = true", files.join(", "));
    taken(&session.rows(&sql).await?, objects.iter().map(|it| it.rows).sum(), &format!("@{stage}"))
}

/// A folder no load has had: of this process, and of this moment.
fn unused() -> String {
    static MADE: AtomicU64 = AtomicU64::new(0);
    let now = chrono::Utc::now();
    let seed = format!("{} {:?} {}", std::process::id(), now.timestamp_nanos_opt(), MADE.fetch_add(1, Ordering::Relaxed));
    format!("{}_{}", now.format("%Y%m%d"), hex::encode(&Sha256::digest(seed)[..10]))
}

/// COPY's answer, a row a file: file, status, rows_parsed, rows_loaded, error_limit, errors_seen, first_error, …
fn taken(answer: &[Row], expected: u64, place: &str) -> Result<(), Error> {
    let (file_at, parsed_at, loaded_at, errors_at, first_at) = (0, 2, 3, 5, 6);
    let number = |row: &Row, place: usize| row.get(place).and_then(|it| it.as_deref()?.parse::<u64>().ok()).unwrap_or_default();
    let loaded = answer.iter().map(|row| number(row, loaded_at)).sum();
    let errors = answer.iter().map(|row| number(row, errors_at)).sum();
    if loaded == expected && errors == 0 {
        return Ok(());
    }
    let first_error = answer.iter().find_map(|row| row.get(first_at)?.as_deref()).map(|it| without_values("100", it));
    // The file that was not taken whole; where each was, rows are missing that no file has.
    let broken = answer.iter().find(|row| row.len() > first_at && (number(row, errors_at) > 0 || number(row, loaded_at) < number(row, parsed_at)));
    let files = broken.and_then(|row| row.get(file_at)?.clone()).unwrap_or_else(|| place.to_owned());
    Err(Error::Copy { files, loaded, expected, errors, first_error })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: [Option<&str>; 7]) -> Row {
        cells.map(|it| it.map(str::to_owned)).to_vec()
    }

    #[test]
    fn copys_answer_is_taken_at_its_word() {
        let whole = row([Some("a"), Some("LOADED"), Some("3"), Some("3"), Some("1"), Some("0"), None]);
        assert!(taken(std::slice::from_ref(&whole), 3, "@s").is_ok());
        let error = taken(std::slice::from_ref(&whole), 4, "@s/rows.parquet").expect_err("one is missing").to_string();
        assert_eq!(error, "COPY loaded 3 of 4 rows of @s/rows.parquet (0 errors)");
        // "Copy executed with 0 files processed." is one row of one column.
        assert!(matches!(taken(&[vec![Some("Copy executed with 0 files processed.".to_owned())]], 1, "@s"), Err(Error::Copy { loaded: 0, .. })));
        let part = row([Some("b"), Some("PARTIALLY_LOADED"), Some("3"), Some("2"), Some("1"), Some("1"), Some("Error parsing JSON: '{\"name\":\"Ada\"'")]);
        let error = taken(&[whole, part], 6, "@s").expect_err("one is missing").to_string();
        assert_eq!(error, "COPY loaded 5 of 6 rows of b (1 errors, the first: Error parsing JSON: …)");
    }

    #[test]
    fn no_two_loads_share_a_folder() {
        assert_ne!(unused(), unused());
    }
}
