//! Logs: always to a file in the data dir, and either to the console's log pane or to stderr. stdout carries results only.

use std::{io, path::Path};

use file_rotate::{ContentLimit, FileRotate, compression::Compression, suffix::AppendCount};
use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::{EnvFilter, Registry, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::cli::LogFormat;

/// Where people read the logs of this invocation; the file is written as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    /// The console's log pane.
    Console,
    /// stderr, for lines and for single commands.
    Stderr(LogFormat),
}

/// A file is set aside when it has grown to this.
const FILE_BYTES: usize = 32 << 20;
/// How many are kept beside the one that is written: with them a day of noise cannot fill the disk.
const FILES_KEPT: usize = 7;

/// Our own words at `info`, libraries only where they warn; the transport of replication and the S3 protocol say our errors
/// a second time, at every try.
/// `LEDGERLINE_LOG` replaces it, in `tracing`'s filter syntax.
const DEFAULT_FILTER: &str = "warn,ledgerline=info,pgwire_replication=off,s3s=off";

/// Single commands print results; their progress matters only when something is odd.
const QUIET_FILTER: &str = "error,ledgerline=warn,pgwire_replication=off,s3s=off";

/// Starts logging. The guard flushes the file when it is dropped; keep it until the end.
///
/// `file`: None for commands that own no data dir; then only stderr is written. Older ones lie beside it, as `ledgerline.log.1`.
pub fn start(front: Front, file: Option<&Path>) -> io::Result<Option<WorkerGuard>> {
    let default = if file.is_some() { DEFAULT_FILTER } else { QUIET_FILTER };
    // One filter for all layers: filters of their own made events vanish from both.
    let filter = EnvFilter::try_from_env("LEDGERLINE_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let (file, guard) = match file {
        Some(file) => {
            std::fs::create_dir_all(file.parent().unwrap_or(file))?;
            let file = FileRotate::new(file, AppendCount::new(FILES_KEPT), ContentLimit::BytesSurpassed(FILE_BYTES), Compression::None, None);
            let (writer, guard) = tracing_appender::non_blocking(file);
            (Some(fmt::layer().with_ansi(false).with_writer(writer)), Some(guard))
        }
        None => (None, None),
    };
    let registry = Registry::default().with(filter).with(file);
    match front {
        Front::Console => {
            tui_logger::init_logger(tui_logger::LevelFilter::Debug).map_err(io::Error::other)?;
            tui_logger::set_default_level(tui_logger::LevelFilter::Debug);
            registry.with(tui_logger::TuiTracingSubscriberLayer).init();
        }
        // A stderr that is gone must not be complained about on stderr: that would panic in whichever stage speaks next.
        Front::Stderr(LogFormat::Text) => registry.with(fmt::layer().with_writer(io::stderr).with_ansi(false).log_internal_errors(false)).init(),
        Front::Stderr(LogFormat::Json) => registry.with(fmt::layer().json().with_writer(io::stderr).log_internal_errors(false)).init(),
    }
    Ok(guard)
}
