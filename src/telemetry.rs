//! Logs: always to a file in the data dir, and either to the console's log pane or to stderr. stdout carries results only.

use std::{
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use file_rotate::{ContentLimit, FileRotate, compression::Compression, suffix::AppendCount};
use tracing::{Event, Subscriber, field::Visit};
use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, layer::Context, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _};

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

/// Where an operator's own filter is.
const FILTER: &str = "LEDGERLINE_LOG";

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{FILTER} is no filter: {why}")]
    Filter { why: String },
    #[error("could not open the log {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("could not start the log pane: {0}")]
    Pane(String),
}

impl crate::fault::Diagnose for Error {
    fn fault(&self) -> crate::fault::Fault {
        crate::fault::Fault::Operator(match self {
            Self::Filter { .. } => format!("write it as `{FILTER}=warn,ledgerline=debug,ledgerline::lake=trace`, or leave it away"),
            Self::File { .. } => "choose a folder that you may write with --data-dir".to_owned(),
            Self::Pane(_) => "run with --no-tui".to_owned(),
        })
    }
}

/// The filter of this process as it was started, and the way to another one.
static TURNED: OnceLock<(String, reload::Handle<EnvFilter, Registry>)> = OnceLock::new();

/// Starts logging. The guard flushes the file when it is dropped; keep it until the end.
///
/// `file`: None for commands that own no data dir; then only stderr is written. Older ones lie beside it, as `ledgerline.log.1`.
pub fn start(front: Front, file: Option<&Path>) -> Result<Option<WorkerGuard>, Error> {
    let asked = std::env::var(FILTER).ok().filter(|it| !it.trim().is_empty());
    let text = asked.unwrap_or_else(|| if file.is_some() { DEFAULT_FILTER } else { QUIET_FILTER }.to_owned());
    // One filter for all layers: filters of their own made events vanish from both.
    let (filter, handle) = reload::Layer::new(filter(&text)?);
    let (file, guard) = match file {
        Some(path) => {
            std::fs::create_dir_all(path.parent().unwrap_or(path)).map_err(|source| Error::File { path: path.to_owned(), source })?;
            let file = FileRotate::new(path, AppendCount::new(FILES_KEPT), ContentLimit::BytesSurpassed(FILE_BYTES), Compression::None, None);
            let (writer, guard) = tracing_appender::non_blocking(file);
            (Some(fmt::layer().with_ansi(false).with_writer(writer)), Some(guard))
        }
        None => (None, None),
    };
    let registry = Registry::default().with(filter).with(file);
    match front {
        Front::Console => {
            tui_logger::init_logger(tui_logger::LevelFilter::Debug).map_err(|error| Error::Pane(error.to_string()))?;
            tui_logger::set_default_level(tui_logger::LevelFilter::Debug);
            registry.with(Pane(tui_logger::Drain::new())).init();
        }
        // A stderr that is gone must not be complained about on stderr: that would panic in whichever stage speaks next.
        Front::Stderr(LogFormat::Text) => registry.with(fmt::layer().with_writer(io::stderr).with_ansi(false).log_internal_errors(false)).init(),
        Front::Stderr(LogFormat::Json) => registry.with(fmt::layer().json().with_writer(io::stderr).log_internal_errors(false)).init(),
    }
    let _ = TURNED.set((text, handle));
    Ok(guard)
}

/// From here on the rooms named speak at `debug` as well (`all`: every room of ours), in the file too; the others as at the start.
pub fn hear(rooms: &[&str]) {
    let Some((text, handle)) = TURNED.get() else { return };
    match filter(&louder(text, rooms)) {
        Ok(filter) => drop(handle.reload(filter)),
        Err(error) => tracing::warn!(%error, "the log stays as it is"),
    }
}

fn louder(text: &str, rooms: &[&str]) -> String {
    let of = |room: &&str| if *room == "all" { ",ledgerline=debug".to_owned() } else { format!(",ledgerline::{room}=debug") };
    text.to_owned() + &rooms.iter().map(of).collect::<String>()
}

/// A filter in `tracing`'s syntax. A lone word that is no level would silently be a target that nobody has: refused.
fn filter(text: &str) -> Result<EnvFilter, Error> {
    let refuse = |why: String| Error::Filter { why };
    let words = text.split(',').map(str::trim);
    if let Some(word) = words.clone().find(|it| !it.is_empty() && !it.contains(['=', '[']) && it.parse::<tracing::level_filters::LevelFilter>().is_err()) {
        return Err(refuse(format!("{word:?} is no level (error, warn, info, debug, trace, off); for a room it is ledgerline::ROOM=LEVEL")));
    }
    EnvFilter::builder().parse(text).map_err(|error| refuse(format!("{text:?}: {error}")))
}

/// Hands events to the log pane, the message first, then its fields as they were given.
///
/// tui-logger's own layer sorts the message among its fields.
struct Pane(tui_logger::Drain);

impl<S: Subscriber> Layer<S> for Pane {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let meta = event.metadata();
        let level = match *meta.level() {
            tracing::Level::ERROR => log::Level::Error,
            tracing::Level::WARN => log::Level::Warn,
            tracing::Level::INFO => log::Level::Info,
            tracing::Level::DEBUG => log::Level::Debug,
            tracing::Level::TRACE => log::Level::Trace,
        };
        let mut words = Words::default();
        event.record(&mut words);
        self.0.log(&log::Record::builder().args(format_args!("{}{}", words.message, words.fields)).level(level).target(meta.target()).build());
    }
}

/// `object put rows=44059 key="raw/…"`.
#[derive(Default)]
struct Words {
    message: String,
    fields: String,
}

impl Visit for Words {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        // Writing into a String never fails.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }

    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        let plain = !value.is_empty() && !value.contains([' ', '"', '=']);
        match field.name() {
            "message" => self.message.push_str(value),
            name if plain => drop(write!(self.fields, " {name}={value}")),
            name => drop(write!(self.fields, " {name}={value:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// What the pane would be handed.
    #[derive(Clone, Default)]
    struct Heard(Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Heard {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let mut words = Words::default();
            event.record(&mut words);
            self.0.lock().unwrap().push(words.message + &words.fields);
        }
    }

    #[test]
    fn the_message_comes_first_and_its_fields_in_their_order() {
        let heard = Heard::default();
        tracing::subscriber::with_default(Registry::default().with(heard.clone()), || {
            tracing::warn!(dag_id = "D", task_id = "t", try_number = 2, error = "connection refused", "try failed");
            tracing::info!(command = ?Some(1), "asked by an operator");
        });
        let heard = heard.0.lock().unwrap().clone();
        assert_eq!(heard, ["try failed dag_id=D task_id=t try_number=2 error=\"connection refused\"", "asked by an operator command=Some(1)"]);
    }

    #[test]
    fn a_room_that_is_asked_for_debug_speaks_at_debug_and_no_other() {
        let heard = Heard::default();
        let (turned, handle) = reload::Layer::new(filter(DEFAULT_FILTER).unwrap());
        tracing::subscriber::with_default(Registry::default().with(turned).with(heard.clone()), || {
            let say = || {
                tracing::debug!(target: "ledgerline::lake::ship", "put");
                tracing::debug!(target: "ledgerline::cdc", "sent");
            };
            say();
            handle.reload(filter(&louder(DEFAULT_FILTER, &["lake"])).unwrap()).unwrap();
            say();
            handle.reload(filter(&louder(DEFAULT_FILTER, &[])).unwrap()).unwrap();
            say();
        });
        assert_eq!(*heard.0.lock().unwrap(), ["put"]);
    }

    #[test]
    fn a_filter_that_says_nothing_is_refused() {
        for right in [DEFAULT_FILTER, QUIET_FILTER, "debug", "off", "warn,ledgerline::lake=trace"] {
            assert!(filter(right).is_ok(), "{right}");
        }
        for wrong in ["debg", "ledgerline=lod", "ledgerline", "=,="] {
            assert!(filter(wrong).is_err(), "{wrong}");
        }
    }
}
