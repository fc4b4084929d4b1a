//! One try of one task: its work, its timeout, its cancellation, its panic.

use std::{panic::AssertUnwindSafe, time::Duration};

use chrono::{DateTime, Utc};
use futures_util::FutureExt;

use super::task::{Executor, TaskContext, TaskError, TaskOutcome};
use crate::{fault::Fault, units::Span};

/// How long a cancelled try may take to come down before it is dropped.
const COMES_DOWN_WITHIN: Duration = Duration::from_secs(5);

/// How a try ended, and of which task it was.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    pub(super) dag_id: String,
    pub(super) run_id: String,
    pub(super) task_id: String,
    pub(super) try_number: u32,
    pub(super) at: DateTime<Utc>,
    /// It failed because we cancelled it; whether that is a stop or an operator's cancel, the engine knows.
    pub(super) cut_short: bool,
    pub(super) result: Result<TaskOutcome, TaskError>,
}

/// Does a try to its end. Never panics, and never takes much longer than the timeout.
pub(super) async fn attempt(executor: Executor, context: TaskContext, timeout: Duration) -> Ended {
    let (cancel, log) = (context.cancel.clone(), context.log.clone());
    let named = (context.dag_id.clone(), context.run_id.clone(), context.task_id.clone(), context.try_number);
    // The call itself may panic as well as the future it returns.
    let work = AssertUnwindSafe(async move { executor(context).await }).catch_unwind();
    tokio::pin!(work);
    let mut timed_out = false;
    let mut ended = tokio::select! { biased;
        result = &mut work => Some(result),
        () = cancel.cancelled() => None,
        () = tokio::time::sleep(timeout) => { timed_out = true; None }
    };
    // Work that hears its cancellation may end before we do.
    let cut_short = cancel.is_cancelled();
    if ended.is_none() {
        cancel.cancel();
        ended = tokio::time::timeout(COMES_DOWN_WITHIN, &mut work).await.ok();
    }
    let mut result = match ended {
        Some(Ok(result)) => result,
        Some(Err(panic)) => Err(TaskError::permanent(format!("the task panicked: {}", said_by(&*panic)), Fault::Bug)),
        None => Err(TaskError::transient("did not come down when cancelled, and was dropped")),
    };
    if let Err(error) = &mut result
        && timed_out
    {
        let text = format!("timed out after {}\n{}", Span(timeout), error.text);
        *error = TaskError { text, fault: Fault::Transient, ..error.clone() };
    }
    if let Err(error) = &result {
        log.line(&error.text);
    }
    log.close();
    let (dag_id, run_id, task_id, try_number) = named;
    let cut_short = cut_short && result.is_err();
    Ended { dag_id, run_id, task_id, try_number, at: Utc::now(), cut_short, result }
}

fn said_by(panic: &(dyn std::any::Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no text)")
}
