//! `reset`: deletes the data dir, after a question.

use std::{fs, path::Path};

use serde::Serialize;

use crate::{
    cli,
    config::Loaded,
    embedded::postgres,
    exit::{Exit, Failure},
    pipeline::data_dir::DataDir,
    units::bytes_for_people,
};

#[derive(Serialize)]
struct Report {
    schema: u32,
    data_dir: String,
    bytes: u64,
    deleted: bool,
}

pub(super) async fn reset(loaded: &Loaded, flags: &cli::Reset) -> Result<Exit, Failure> {
    let root = loaded.data_dir();
    if !root.exists() {
        let report = Report { schema: 1, data_dir: root.display().to_string(), bytes: 0, deleted: false };
        return finish(&report, flags, "there is no data dir");
    }
    // Holding it proves that nothing runs on it, and that it is ours to delete.
    let data_dir = super::held(DataDir::hold(&root))?;
    let bytes = size_of(&root);
    let report = Report { schema: 1, data_dir: root.display().to_string(), bytes, deleted: false };
    if flags.dry_run {
        return finish(&report, flags, "would be deleted");
    }
    let question = format!("Delete {} ({}): cluster, topics, lake, mails and logs?", root.display(), bytes_for_people(bytes));
    if !flags.yes && !super::confirmed(&question) {
        return Err(Failure::new(Exit::Usage, "nothing was deleted").with_remedy("answer y, or give --yes where there is no terminal"));
    }
    // The cluster may lie elsewhere, and a server of it may have outlived a crash.
    let cluster = root.join("postgres");
    let removed = tokio::task::spawn_blocking(move || postgres::remove(&cluster)).await;
    removed.map_err(|error| Failure::new(Exit::Bug, error.to_string()))?.map_err(|error| Failure::from_error(&error))?;
    drop(data_dir);
    fs::remove_dir_all(&root).map_err(|error| Failure::new(Exit::Away, format!("could not delete {}: {error}", root.display())))?;
    finish(&Report { deleted: true, ..report }, flags, "deleted")
}

fn finish(report: &Report, flags: &cli::Reset, what: &str) -> Result<Exit, Failure> {
    if flags.output.json {
        super::print_json(report)?;
    } else {
        super::print(&format!("{}: {what} ({})\n", report.data_dir, bytes_for_people(report.bytes)))?;
    }
    Ok(Exit::Right)
}

fn size_of(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => size_of(&entry.path()),
        Ok(_) => entry.metadata().map_or(0, |it| it.len()),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}
