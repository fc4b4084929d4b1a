//! How far one run has come (pure): what starts next, what a result changes, what a repeat would touch.

use std::{collections::BTreeMap, fmt, str::FromStr};

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    plan::{Plan, TaskState},
    task::{ERROR_BYTES_MAX, TaskError, TaskOutcome, bounded, bounded_note},
};
use crate::fault::Fault;

/// A try that a crash or a stop of ours cut short is repeated without using up a retry, but not for ever:
/// a task that takes the process down with it must come to an end.
pub(super) const INTERRUPTIONS_MAX: u32 = 20;

/// The error of a try that a crash or a stop cut short.
pub const INTERRUPTED: &str = "interrupted";

/// How the error of a try begins that an operator cut short.
pub(super) const CANCELLED: &str = "cancelled by an operator";

/// Where a run stands; Airflow's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    #[default]
    Queued,
    Running,
    Success,
    Failed,
}

impl RunState {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Success => "success",
            Self::Failed => "failed",
        }
    }

    pub const fn is_final(self) -> bool {
        matches!(self, Self::Success | Self::Failed)
    }
}

/// Why a run exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunType {
    #[default]
    Scheduled,
    Manual,
    Triggered,
}

impl RunType {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Manual => "manual",
            Self::Triggered => "triggered",
        }
    }

    /// `scheduled__2026-11-22T12:00:00+00:00`, as Airflow names runs.
    pub fn run_id(self, logical_date: DateTime<Utc>) -> String {
        format!("{}__{}", self.as_str(), logical_date.to_rfc3339_opts(SecondsFormat::AutoSi, false))
    }
}

/// Whose matter a failure is: [`Fault`] without its words, for lists and exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Matter {
    Transient,
    Operator,
    Data,
    Bug,
}

impl From<&Fault> for Matter {
    fn from(fault: &Fault) -> Self {
        match fault {
            Fault::Transient => Self::Transient,
            Fault::Operator(_) => Self::Operator,
            Fault::Data(_) => Self::Data,
            Fault::Bug => Self::Bug,
        }
    }
}

macro_rules! reads_as_it_is_written {
    ($($name:ty: $($state:expr),+;)+) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.pad(self.as_str())
            }
        }
        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                [$($state),+].into_iter().find(|it| it.as_str() == text).ok_or_else(|| format!("not a {}: {text:?}", stringify!($name)))
            }
        }
    )+};
}

reads_as_it_is_written! {
    RunState: RunState::Queued, RunState::Running, RunState::Success, RunState::Failed;
    RunType: RunType::Scheduled, RunType::Manual, RunType::Triggered;
}

/// A run, named.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RunRef {
    pub dag_id: String,
    pub run_id: String,
}

impl fmt::Display for RunRef {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.dag_id, self.run_id)
    }
}

/// One run of a DAG. The first tasks are the plan's, in its order; behind them those the plan no longer has.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    pub dag_id: String,
    pub run_id: String,
    pub run_type: RunType,
    pub logical_date: DateTime<Utc>,
    pub state: RunState,
    pub queued_at: DateTime<Utc>,
    pub started_at: Option<DateTime<Utc>>,
    pub finished_at: Option<DateTime<Utc>>,
    /// The run whose task triggered this one.
    pub triggered_by: Option<RunRef>,
    pub cancelled: bool,
    /// Its end was told to whoever writes the mails.
    pub reported: bool,
    pub tasks: Vec<TaskInstance>,
}

/// One task of one run; the fields are the columns of `ledgerline.task_instance`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TaskInstance {
    pub task_id: String,
    pub state: TaskState,
    /// The current or last try; 0 before the first.
    pub try_number: u32,
    /// Retries are allowed while `try_number` has not passed it (so tries in all are one more), as in Airflow.
    pub max_tries: u32,
    pub interruptions: u32,
    #[serde(rename = "start_date")]
    pub started_at: Option<DateTime<Utc>>,
    #[serde(rename = "end_date")]
    pub finished_at: Option<DateTime<Utc>>,
    pub retry_at: Option<DateTime<Utc>>,
    pub error: Option<String>,
    /// Whose matter the error is.
    pub fault: Option<Matter>,
    pub note: Value,
}

impl TaskInstance {
    fn new(task_id: &str, retries: u32) -> Self {
        Self { task_id: task_id.to_owned(), max_tries: retries, ..Self::default() }
    }

    /// Back to the beginning, with a fresh number of retries.
    fn clear(&mut self, retries: u32) {
        *self = Self { try_number: self.try_number, max_tries: self.try_number + retries, ..Self::new(&self.task_id, 0) };
    }

    /// Whole tries only: what `finished - started` says, in seconds.
    pub fn seconds(&self) -> Option<f64> {
        seconds_between(self.started_at, self.finished_at)
    }
}

pub(super) fn seconds_between(started_at: Option<DateTime<Utc>>, finished_at: Option<DateTime<Utc>>) -> Option<f64> {
    let passed = finished_at? - started_at?;
    Some(passed.to_std().unwrap_or_default().as_secs_f64())
}

impl Run {
    pub fn new(plan: &Plan, run_type: RunType, logical_date: DateTime<Utc>, now: DateTime<Utc>, triggered_by: Option<RunRef>) -> Self {
        Self {
            dag_id: plan.dag_id().to_owned(),
            run_id: run_type.run_id(logical_date),
            run_type,
            logical_date,
            state: RunState::Queued,
            queued_at: now,
            started_at: None,
            finished_at: None,
            triggered_by,
            cancelled: false,
            reported: false,
            tasks: plan.tasks().iter().map(|task| TaskInstance::new(&task.task_id, task.retries)).collect(),
        }
    }

    pub fn reference(&self) -> RunRef {
        RunRef { dag_id: self.dag_id.clone(), run_id: self.run_id.clone() }
    }

    /// Makes a run read from history fit today's plan: new tasks are added, vanished ones are `removed`.
    pub fn align(&mut self, plan: &Plan) {
        let mut known: BTreeMap<String, TaskInstance> = self.tasks.drain(..).map(|it| (it.task_id.clone(), it)).collect();
        self.tasks = plan.tasks().iter().map(|task| known.remove(&task.task_id).unwrap_or_else(|| TaskInstance::new(&task.task_id, task.retries))).collect();
        for mut gone in known.into_values() {
            if !gone.state.is_final() {
                gone.state = TaskState::Removed;
            }
            self.tasks.push(gone);
        }
        for (task, instance) in plan.tasks().iter().zip(&mut self.tasks) {
            if instance.state == TaskState::Removed {
                instance.clear(task.retries);
            }
        }
    }

    pub fn begin(&mut self, now: DateTime<Utc>) {
        self.state = RunState::Running;
        self.started_at.get_or_insert(now);
        self.finished_at = None;
    }

    /// Settles what follows from the results so far, then starts up to `slots` tasks. Returns the places of those it started.
    pub fn start_ready(&mut self, plan: &Plan, now: DateTime<Utc>, slots: usize) -> Vec<usize> {
        if self.state != RunState::Running {
            return Vec::new();
        }
        self.settle(plan);
        let mut started = Vec::new();
        for place in 0..plan.tasks().len() {
            let task = &mut self.tasks[place];
            let due = match task.state {
                TaskState::Scheduled | TaskState::Queued => true,
                TaskState::UpForRetry => task.retry_at.is_none_or(|at| at <= now),
                _ => false,
            };
            if due && started.len() < slots {
                task.state = TaskState::Running;
                task.try_number += 1;
                task.started_at = Some(now);
                (task.finished_at, task.retry_at, task.error, task.fault) = (None, None, None, None);
                started.push(place);
            } else if due && task.state == TaskState::Scheduled {
                task.state = TaskState::Queued;
            }
        }
        started
    }

    fn settle(&mut self, plan: &Plan) {
        let mut states: Vec<TaskState> = self.tasks.iter().take(plan.tasks().len()).map(|it| it.state).collect();
        plan.settle(&mut states);
        for (task, state) in self.tasks.iter_mut().zip(states) {
            task.state = state;
        }
    }

    /// Books how a try ended.
    pub fn end(&mut self, plan: &Plan, place: usize, result: Result<TaskOutcome, TaskError>, now: DateTime<Utc>) {
        let task = &mut self.tasks[place];
        task.finished_at = Some(now);
        match result {
            Ok(TaskOutcome::Success(note)) => (task.state, task.note) = (TaskState::Success, bounded_note(note)),
            Ok(TaskOutcome::Skipped(why)) => (task.state, task.error) = (TaskState::Skipped, Some(bounded(&why, ERROR_BYTES_MAX))),
            Err(error) => {
                let said = error.remedy().map_or_else(|| error.text.clone(), |remedy| format!("{}\n{remedy}", error.text));
                task.error = Some(bounded(&said, ERROR_BYTES_MAX));
                task.fault = Some(Matter::from(&error.fault));
                task.note = bounded_note(error.note);
                let again = error.fault == Fault::Transient && !self.cancelled && task.try_number <= task.max_tries;
                task.state = if again { TaskState::UpForRetry } else { TaskState::Failed };
                task.retry_at = again.then(|| {
                    let failures = plan.tasks()[place].retries.saturating_sub(task.max_tries - task.try_number);
                    now + TimeDelta::from_std(plan.tasks()[place].backoff_after(failures)).unwrap_or_default()
                });
            }
        }
    }

    /// Books the running tries as cut short by a crash or stop; they are repeated at once. True where there were any.
    pub fn interrupt(&mut self, now: DateTime<Utc>) -> bool {
        let mut any = false;
        for task in self.tasks.iter_mut().filter(|it| it.state == TaskState::Running) {
            any = true;
            task.interruptions += 1;
            task.max_tries += 1;
            task.finished_at = Some(now);
            task.error = Some(if self.cancelled { CANCELLED } else { INTERRUPTED }.to_owned());
            let again = !self.cancelled && task.interruptions < INTERRUPTIONS_MAX;
            (task.state, task.retry_at) = if again { (TaskState::UpForRetry, Some(now)) } else { (TaskState::Failed, None) };
        }
        any
    }

    /// The operator's cancel: nothing starts any more. Running tries are booked by [`Run::end`] once they have come down.
    pub fn cancel(&mut self) {
        self.cancelled = true;
        for task in &mut self.tasks {
            match task.state {
                TaskState::UpForRetry => (task.state, task.retry_at) = (TaskState::Failed, None),
                TaskState::None | TaskState::Scheduled | TaskState::Queued => task.state = TaskState::Skipped,
                _ => {}
            }
        }
    }

    /// What a retry of one task would run: itself and what did not run because of it. None where it has not failed.
    pub fn would_retry(&self, plan: &Plan, place: usize) -> Option<Vec<usize>> {
        if !matches!(self.tasks[place].state, TaskState::Failed | TaskState::UpForRetry) {
            return None;
        }
        let held_up = |it: &usize| matches!(self.tasks[*it].state, TaskState::UpstreamFailed | TaskState::Skipped | TaskState::None);
        Some(std::iter::once(place).chain(plan.downstream(place).into_iter().filter(held_up)).collect())
    }

    /// What a clear of one task would run: itself and all that comes after it. None where one of them runs right now.
    pub fn would_clear(&self, plan: &Plan, place: usize) -> Option<Vec<usize>> {
        let places: Vec<usize> = std::iter::once(place).chain(plan.downstream(place)).collect();
        places.iter().all(|it| self.tasks[*it].state != TaskState::Running).then_some(places)
    }

    /// Sets tasks back to the beginning. The caller queues or continues the run.
    pub fn clear(&mut self, plan: &Plan, places: &[usize]) {
        self.cancelled = false;
        self.reported = false;
        for place in places {
            self.tasks[*place].clear(plan.tasks()[*place].retries);
        }
    }

    /// Ends the run if nothing is left to do. A run is green only if every task of it is.
    pub fn finish(&mut self, plan: &Plan, now: DateTime<Utc>) -> bool {
        self.settle(plan);
        let tasks = &self.tasks[..plan.tasks().len()];
        if self.state != RunState::Running || tasks.iter().any(|it| !it.state.is_final()) {
            return false;
        }
        let cut_off = self.cancelled && tasks.iter().any(|it| it.state != TaskState::Success);
        let failed = cut_off || tasks.iter().any(|it| it.state.is_bad());
        self.state = if failed { RunState::Failed } else { RunState::Success };
        self.finished_at = Some(now);
        true
    }

    /// When the next waiting try is due.
    pub fn next_retry(&self) -> Option<DateTime<Utc>> {
        self.tasks.iter().filter(|it| it.state == TaskState::UpForRetry).filter_map(|it| it.retry_at).min()
    }

    pub fn running(&self) -> usize {
        self.tasks.iter().filter(|it| it.state == TaskState::Running).count()
    }

    /// What the finished tasks left for those after them.
    pub fn notes(&self) -> BTreeMap<String, Value> {
        let left = self.tasks.iter().filter(|it| it.state == TaskState::Success && !it.note.is_null());
        left.map(|it| (it.task_id.clone(), it.note.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dag::{plan::Task, schedule::Schedule};
    use proptest::prelude::*;

    fn noon() -> DateTime<Utc> {
        "2026-11-22T12:00:00Z".parse().expect("a time")
    }

    fn plan() -> Plan {
        let load = |name: &str| Task::new(name).after(["find"]);
        let tasks = vec![Task::new("find"), load("left"), load("right"), Task::new("mail").after(["left", "right"]), Task::new("last").after(["mail"])];
        Plan::new("demo", Schedule::Never, tasks).expect("a DAG")
    }

    fn started() -> (Plan, Run) {
        let plan = plan();
        let mut run = Run::new(&plan, RunType::Manual, noon(), noon(), None);
        run.begin(noon());
        (plan, run)
    }

    fn states(run: &Run) -> String {
        run.tasks.iter().map(|it| it.state.as_str()).collect::<Vec<_>>().join(" ")
    }

    fn succeed(plan: &Plan, run: &mut Run, places: &[usize]) {
        for place in places {
            run.end(plan, *place, Ok(TaskOutcome::done()), noon());
        }
    }

    #[test]
    fn run_ids_look_like_airflows() {
        assert_eq!(RunType::Scheduled.run_id(noon()), "scheduled__2026-11-22T12:00:00+00:00");
        assert_eq!(RunType::Manual.run_id(noon() + TimeDelta::microseconds(1500)), "manual__2026-11-22T12:00:00.001500+00:00");
    }

    #[test]
    fn loads_run_side_by_side_and_the_mail_waits_for_both() {
        let (plan, mut run) = started();
        assert_eq!(run.start_ready(&plan, noon(), 5), [0]);
        succeed(&plan, &mut run, &[0]);
        assert_eq!(run.start_ready(&plan, noon(), 5), [1, 2]);
        succeed(&plan, &mut run, &[1]);
        assert_eq!(run.start_ready(&plan, noon(), 5), [] as [usize; 0]);
        succeed(&plan, &mut run, &[2]);
        assert_eq!(run.start_ready(&plan, noon(), 5), [3]);
    }

    #[test]
    fn what_finds_no_slot_is_queued() {
        let (plan, mut run) = started();
        run.start_ready(&plan, noon(), 5);
        succeed(&plan, &mut run, &[0]);
        assert_eq!(run.start_ready(&plan, noon(), 1), [1]);
        assert_eq!(states(&run), "success running queued none none");
        succeed(&plan, &mut run, &[1]);
        assert_eq!(run.start_ready(&plan, noon(), 1), [2]);
    }

    #[test]
    fn a_transient_failure_is_tried_again_with_backoff_until_the_tries_are_used_up() {
        let (plan, mut run) = started();
        let mut now = noon();
        let mut waits = Vec::new();
        for _ in 0..2 {
            run.start_ready(&plan, now, 5);
            run.end(&plan, 0, Err(TaskError::transient("away")), now);
            let retry_at = run.next_retry().expect("a retry");
            waits.push((retry_at - now).num_seconds());
            assert_eq!(run.start_ready(&plan, now, 5), [] as [usize; 0]);
            now = retry_at;
        }
        assert_eq!(waits, [2, 4]);
        run.start_ready(&plan, now, 5);
        run.end(&plan, 0, Err(TaskError::transient("away")), now);
        assert!(run.finish(&plan, now));
        assert_eq!((run.state, run.tasks[0].try_number), (RunState::Failed, 3));
        assert_eq!(states(&run), "failed upstream_failed upstream_failed upstream_failed upstream_failed");
    }

    #[test]
    fn a_failure_that_trying_again_cannot_mend_is_not_tried_again() {
        let (plan, mut run) = started();
        run.start_ready(&plan, noon(), 5);
        run.end(&plan, 0, Err(TaskError::permanent("books differ", Fault::Data("look at the rows".into()))), noon());
        assert_eq!(run.tasks[0].state, TaskState::Failed);
        assert_eq!(run.tasks[0].error.as_deref(), Some("books differ\nlook at the rows"));
    }

    #[test]
    fn a_retry_runs_the_failed_task_and_what_it_held_up() {
        let (plan, mut run) = started();
        run.start_ready(&plan, noon(), 5);
        succeed(&plan, &mut run, &[0]);
        run.start_ready(&plan, noon(), 5);
        succeed(&plan, &mut run, &[1]);
        run.end(&plan, 2, Err(TaskError::permanent("no", Fault::Bug)), noon());
        assert!(run.finish(&plan, noon()));
        assert_eq!(run.would_retry(&plan, 1), None);
        let places = run.would_retry(&plan, 2).expect("it failed");
        assert_eq!(places, [2, 3, 4]);
        run.clear(&plan, &places);
        run.begin(noon());
        assert_eq!(run.start_ready(&plan, noon(), 5), [2]);
        assert_eq!((run.tasks[2].try_number, run.tasks[2].max_tries), (2, 3));
        assert_eq!(run.tasks[1].try_number, 1);
    }

    #[test]
    fn an_interrupted_try_counts_and_uses_up_no_retry() {
        let (plan, mut run) = started();
        for interruption in 1..INTERRUPTIONS_MAX {
            assert_eq!(run.start_ready(&plan, noon(), 5), [0]);
            assert!(run.interrupt(noon()));
            assert_eq!((run.tasks[0].state, run.tasks[0].try_number), (TaskState::UpForRetry, interruption));
        }
        run.start_ready(&plan, noon(), 5);
        run.interrupt(noon());
        assert_eq!(run.tasks[0].state, TaskState::Failed);
    }

    #[test]
    fn a_cancelled_run_is_not_green_even_if_nothing_had_started() {
        let (plan, mut run) = started();
        run.cancel();
        assert!(run.finish(&plan, noon()));
        assert_eq!(run.state, RunState::Failed);
    }

    #[test]
    fn a_task_the_plan_no_longer_has_is_removed_and_a_new_one_runs() {
        let (_, mut run) = started();
        let shorter = Plan::new("demo", Schedule::Never, vec![Task::new("find"), Task::new("fresh").after(["find"])]).expect("a DAG");
        run.align(&shorter);
        assert_eq!(states(&run), "none none removed removed removed removed");
        run.start_ready(&shorter, noon(), 5);
        succeed(&shorter, &mut run, &[0]);
        assert_eq!(run.start_ready(&shorter, noon(), 5), [1]);
        succeed(&shorter, &mut run, &[1]);
        assert!(run.finish(&shorter, noon()));
        assert_eq!(run.state, RunState::Success);
    }

    proptest! {
        #[test]
        fn every_run_comes_to_an_end_whatever_its_tries_do(luck in proptest::collection::vec(0_u8..5, 200), slots in 1_usize..4) {
            let (plan, mut run) = started();
            let mut luck = luck.into_iter().chain(std::iter::repeat(0));
            let mut now = noon();
            for _ in 0..1000 {
                for place in run.start_ready(&plan, now, slots) {
                    match luck.next() {
                        Some(1) => run.end(&plan, place, Err(TaskError::transient("away")), now),
                        Some(2) => run.end(&plan, place, Err(TaskError::permanent("no", Fault::Bug)), now),
                        Some(3) => run.end(&plan, place, Ok(TaskOutcome::Skipped("nothing".into())), now),
                        Some(4) => {
                            run.interrupt(now);
                            break;
                        }
                        _ => run.end(&plan, place, Ok(TaskOutcome::done()), now),
                    }
                }
                if run.finish(&plan, now) { break }
                now = run.next_retry().unwrap_or(now).max(now);
            }
            prop_assert!(run.state.is_final(), "{}", states(&run));
            let failed = run.tasks.iter().any(|it| it.state.is_bad());
            prop_assert_eq!(run.state == RunState::Failed, failed);
        }
    }
}
