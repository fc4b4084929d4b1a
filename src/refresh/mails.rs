//! Which runs and tasks deserve which letter; the words are notify's.

use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;

use super::{
    Discovered, Rooms,
    transform::{DbtNote, KpiNote, ReconcileNote},
};
use crate::{
    change::{BANK_TABLES, BOUNDARIES},
    dag::{Run, TaskContext, TaskError, TaskInstance, TaskOutcome, TaskState},
    dbt,
    notify::{
        About, Kind, Outbox,
        letter::{self, Failure, Subject, TableLoad, TestCounts, Transformation},
    },
};

/// Records the load report; sending it is the outbox's business.
///
/// It counts what the warehouse has got since the run began, not what the last try of each task remembers.
pub(super) async fn loading_report(rooms: &Rooms, context: &TaskContext) -> Result<TaskOutcome, TaskError> {
    let began: Discovered = note(context, "discover_files");
    let loaded = rooms.warehouse.loaded_since(&rooms.topics, &began.loaded).await.map_err(|error| TaskError::from(&error))?;
    let tables = BANK_TABLES.into_iter().chain([BOUNDARIES]).map(|table| {
        let loaded = loaded.get(table).copied().unwrap_or_default();
        TableLoad { table: table.to_owned(), files: loaded.files, rows: loaded.rows }
    });
    let letter = letter::load_report(&subject(context), &tables.collect::<Vec<_>>());
    post(&rooms.outbox, context, Kind::LoadReport, &letter).await
}

/// Records the transformation report.
pub(super) async fn transformation_report(outbox: &Outbox, context: &TaskContext) -> Result<TaskOutcome, TaskError> {
    let letter = letter::transformation_report(&subject(context), &transformation(context));
    post(outbox, context, Kind::TransformationReport, &letter).await
}

fn transformation(context: &TaskContext) -> Transformation {
    let mut done = Transformation::default();
    for (task_id, ..) in dbt::TASKS {
        let left: DbtNote = note(context, task_id);
        done.tasks.push((task_id.to_owned(), left.seconds));
        done.models += left.models;
        done.snapshots += left.snapshots;
        add(&mut done.tests, left.tests);
    }
    let reconciled: ReconcileNote = note(context, "reconcile");
    done.tasks.push(("reconcile".to_owned(), reconciled.seconds));
    done.checks = reconciled.checks.iter().map(|it| (it.name.clone(), it.ok, it.expected.to_string(), it.actual.to_string())).collect();
    let numbers: KpiNote = note(context, "refresh_kpis");
    (done.as_of, done.kpis) = (numbers.as_of, numbers.figures);
    done
}

fn add(all: &mut TestCounts, some: dbt::TestCounts) {
    all.pass += some.pass;
    all.warn += some.warn;
    all.fail += some.fail;
    all.error += some.error;
    all.skip += some.skip;
}

/// After each end of a run: a letter for each task that failed (not too often), and one for each that works again.
///
/// What an operator cancelled needs no letter. Harmless to repeat.
pub(super) async fn after_run(outbox: &Outbox, run: &Run) -> Result<(), TaskError> {
    if run.cancelled {
        return Ok(());
    }
    let subject = Subject { dag_id: run.dag_id.clone(), run_id: run.run_id.clone(), started_at: run.started_at.unwrap_or(run.queued_at), now: ended(run) };
    let held_up: Vec<String> = run.tasks.iter().filter(|it| it.state == TaskState::UpstreamFailed).map(|it| it.task_id.clone()).collect();
    for task in run.tasks.iter().filter(|it| it.state == TaskState::Failed) {
        let task_named = Some((task.task_id.clone(), task.try_number));
        let about = About { dag_id: run.dag_id.clone(), run_id: run.run_id.clone(), kind: Kind::Failure, task: task_named };
        let mut failure = failure(task, &held_up);
        failure.repeat_after = Some(outbox.repeat_after());
        let write = |held_letters| letter::failure(&subject, &Failure { held_letters, ..failure });
        outbox.failed(&about, write, Utc::now()).await.map_err(|error| TaskError::from(&error))?;
    }
    let succeeded: Vec<String> = run.tasks.iter().filter(|it| it.state == TaskState::Success).map(|it| it.task_id.clone()).collect();
    let write = |task_id: &str, since: DateTime<Utc>, failures| letter::recovery(&subject, task_id, since, failures);
    outbox.succeeded(&run.dag_id, &run.run_id, &succeeded, write, Utc::now()).await.map_err(|error| TaskError::from(&error))
}

fn ended(run: &Run) -> DateTime<Utc> {
    run.finished_at.unwrap_or(run.queued_at)
}

/// Where tests failed, their rows follow as tables and need not stand in the text as well.
fn failure(task: &TaskInstance, held_up: &[String]) -> Failure {
    let left: DbtNote = serde_json::from_value(task.note.clone()).unwrap_or_default();
    let error = task.error.clone().unwrap_or_default();
    let told_by_tests = left.failed.iter().any(|it| !it.rows.is_empty());
    let lines: Vec<&str> = error.lines().collect();
    let error = match (told_by_tests, lines.as_slice()) {
        (true, [first, .., last]) => format!("{first}\n{last}"),
        _ => error,
    };
    Failure { task_id: task.task_id.clone(), tries: task.try_number, error, tests: left.failed, held_up: held_up.to_vec(), ..Failure::default() }
}

fn subject(context: &TaskContext) -> Subject {
    Subject { dag_id: context.dag_id.clone(), run_id: context.run_id.clone(), started_at: context.run_started_at, now: Utc::now() }
}

async fn post(outbox: &Outbox, context: &TaskContext, kind: Kind, letter: &letter::Letter) -> Result<TaskOutcome, TaskError> {
    let about = About { dag_id: context.dag_id.clone(), run_id: context.run_id.clone(), kind, task: None };
    let new = outbox.post(&about, letter, Utc::now()).await.map_err(|error| TaskError::from(&error))?;
    context.log.line(if new { letter.subject.as_str() } else { "this run's letter was recorded before" });
    Ok(TaskOutcome::done())
}

/// What a task before this one left; nothing where it left nothing.
fn note<T: DeserializeOwned + Default>(context: &TaskContext, task_id: &str) -> T {
    context.notes.get(task_id).and_then(|it| serde_json::from_value(it.clone()).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notify::letter::FailedTest;

    #[test]
    fn rows_of_failed_tests_stand_in_the_letter_once() {
        let failed = FailedTest { name: "balances".into(), columns: vec!["id".into()], rows: vec![vec!["7".into()]], ..FailedTest::default() };
        let task = TaskInstance {
            task_id: "dbt_test_analytics".into(),
            error: Some("1 of 2 failed: balances\ntest balances found 1 row\n  id\n  7\nlook at the rows".into()),
            note: serde_json::to_value(DbtNote { failed: vec![failed], ..DbtNote::default() }).unwrap(),
            ..TaskInstance::default()
        };
        let described = failure(&task, &["reconcile".into()]);
        assert_eq!(described.error, "1 of 2 failed: balances\nlook at the rows");
        assert_eq!((described.tests.len(), described.held_up.len()), (1, 1));
    }
}
