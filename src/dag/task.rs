//! What a task is given and what it gives back: the seam between the engine and whoever does the work.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use chrono::{DateTime, Utc};
use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::fault::{self, Diagnose, Fault};

/// Does a task's work. Called once per try, on a task of its own; a panic is a failed try.
///
/// The future must end soon after `cancel` fires; after five seconds it is dropped.
pub type Executor = Arc<dyn Fn(TaskContext) -> BoxFuture<'static, Result<TaskOutcome, TaskError>> + Send + Sync>;

/// The largest note a task may leave, as JSON text. Notes are for counts and names; data goes to the warehouse.
pub const NOTE_BYTES_MAX: usize = 64 * 1024;

/// The longest error text that is kept of a try.
pub(super) const ERROR_BYTES_MAX: usize = 16 * 1024;

/// The longest log line that is kept.
const LINE_BYTES_MAX: usize = 2 * 1024;

/// One try of one task.
#[derive(Debug, Clone)]
pub struct TaskContext {
    pub dag_id: String,
    pub run_id: String,
    pub task_id: String,
    /// 1 for the first try.
    pub try_number: u32,
    pub logical_date: DateTime<Utc>,
    /// When the run started, for reports on it.
    pub run_started_at: DateTime<Utc>,
    /// What the finished tasks of this run left, by task id.
    pub notes: Arc<BTreeMap<String, Value>>,
    /// Fires when the operator cancels, the timeout passes, or the engine must stop.
    pub cancel: CancellationToken,
    pub log: TaskLog,
}

/// How a try ended well.
#[derive(Debug, Clone, PartialEq)]
pub enum TaskOutcome {
    /// Done; the note (null = none) is kept and readable by the tasks after it.
    Success(Value),
    /// There was nothing to do; tasks after it are skipped too. The text says why.
    Skipped(String),
}

impl TaskOutcome {
    pub const fn done() -> Self {
        Self::Success(Value::Null)
    }

    /// Done, with something for the tasks after it. A value that is no JSON is a bug of the task and becomes null.
    pub fn with_note(note: &impl serde::Serialize) -> Self {
        Self::Success(serde_json::to_value(note).unwrap_or(Value::Null))
    }
}

/// How a try failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{text}")]
pub struct TaskError {
    /// What failed and why, for people; its first line is shown in lists.
    pub text: String,
    /// Only `Transient` failures are tried again: the others would fail the same way.
    pub fault: Fault,
    /// Facts for the failure mail, kept like the note of a success.
    pub note: Value,
}

impl TaskError {
    pub fn transient(text: impl Into<String>) -> Self {
        Self { text: text.into(), fault: Fault::Transient, note: Value::Null }
    }

    /// A failure that trying again cannot mend.
    pub fn permanent(text: impl Into<String>, fault: Fault) -> Self {
        Self { text: text.into(), fault, note: Value::Null }
    }

    #[must_use]
    pub fn with_note(mut self, note: &impl serde::Serialize) -> Self {
        self.note = serde_json::to_value(note).unwrap_or(Value::Null);
        self
    }

    /// The remedy, where a person must act.
    pub fn remedy(&self) -> Option<&str> {
        match &self.fault {
            Fault::Operator(text) | Fault::Data(text) => Some(text),
            Fault::Transient | Fault::Bug => None,
        }
    }
}

impl<E: Diagnose> From<&E> for TaskError {
    fn from(error: &E) -> Self {
        Self { text: fault::chain(error), fault: error.fault(), note: Value::Null }
    }
}

/// The log of one try: lines are kept with the run's history, the first `lines_max` of them.
///
/// Never waits: a task that logs faster than the history takes lines loses some, and the log says how many.
#[derive(Debug, Clone)]
pub struct TaskLog {
    sink: mpsc::Sender<LogLine>,
    origin: Arc<Origin>,
}

#[derive(Debug)]
struct Origin {
    dag_id: String,
    run_id: String,
    task_id: String,
    try_number: u32,
    lines_max: u32,
    written: AtomicU32,
    lost: AtomicU32,
}

/// A line on its way into the history.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct LogLine {
    pub(super) dag_id: String,
    pub(super) run_id: String,
    pub(super) task_id: String,
    pub(super) try_number: u32,
    pub(super) line_number: u32,
    pub(super) at: DateTime<Utc>,
    pub(super) line: String,
}

impl TaskLog {
    pub(super) fn new(sink: mpsc::Sender<LogLine>, run: (&str, &str), task: (&str, u32), lines_max: u32) -> Self {
        let ((dag_id, run_id), (task_id, try_number)) = (run, task);
        let origin = Origin {
            dag_id: dag_id.to_owned(),
            run_id: run_id.to_owned(),
            task_id: task_id.to_owned(),
            try_number,
            lines_max,
            written: AtomicU32::new(0),
            lost: AtomicU32::new(0),
        };
        Self { sink, origin: Arc::new(origin) }
    }

    /// Keeps a line; several where the text has line breaks.
    pub fn line(&self, text: impl AsRef<str>) {
        for line in text.as_ref().lines() {
            let line_number = self.origin.written.fetch_add(1, Ordering::Relaxed);
            if line_number >= self.origin.lines_max || !self.send(line_number, bounded(line, LINE_BYTES_MAX)) {
                self.origin.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Says what was lost; the engine calls it when the try has ended.
    pub(super) fn close(&self) {
        let lost = self.origin.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            self.send(u32::MAX >> 1, format!("({lost} more lines were not kept: at most {} a try)", self.origin.lines_max));
        }
    }

    fn send(&self, line_number: u32, line: String) -> bool {
        let origin = &self.origin;
        let line = LogLine {
            dag_id: origin.dag_id.clone(),
            run_id: origin.run_id.clone(),
            task_id: origin.task_id.clone(),
            try_number: origin.try_number,
            line_number,
            at: Utc::now(),
            line,
        };
        self.sink.try_send(line).is_ok()
    }
}

/// The beginning of a text, cut between characters; without NUL, which PostgreSQL refuses.
pub(super) fn bounded(text: &str, bytes_max: usize) -> String {
    let mut kept = text[..text.floor_char_boundary(bytes_max)].replace('\0', "\u{FFFD}");
    if kept.len() < text.len() && text.len() > bytes_max {
        kept.push('…');
    }
    kept
}

/// A note that fits. One that does not is replaced by its size: the work behind it is done and must not be lost with it.
pub(super) fn bounded_note(note: Value) -> Value {
    let text = note.to_string();
    if text.len() > NOTE_BYTES_MAX || text.contains("\\u0000") { serde_json::json!({ "note_not_kept_bytes": text.len() }) } else { note }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_keeps_the_first_lines_and_says_how_many_it_lost() {
        let (sink, mut lines) = mpsc::channel(64);
        let log = TaskLog::new(sink, ("dag", "run"), ("task", 1), 2);
        log.line("one\ntwo");
        log.line("three");
        log.line("four");
        log.close();
        let kept: Vec<String> = std::iter::from_fn(|| lines.try_recv().ok()).map(|it| it.line).collect();
        assert_eq!(kept, ["one", "two", "(2 more lines were not kept: at most 2 a try)"]);
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(bounded("äöü", 3), "ä…");
        assert_eq!(bounded("a\0b", 10), "a\u{FFFD}b");
        assert_eq!(bounded_note(serde_json::json!("x".repeat(NOTE_BYTES_MAX))), serde_json::json!({ "note_not_kept_bytes": NOTE_BYTES_MAX + 2 }));
    }
}
