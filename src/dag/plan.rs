//! Tasks and the edges between them (pure): what is refused, what is ready, what follows from a failure.

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use super::schedule::Schedule;

/// Where a task of a run stands; Airflow's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    /// Waits for the tasks before it.
    #[default]
    None,
    /// Its turn has come.
    Scheduled,
    /// Its turn has come, but `concurrency` tasks of this DAG run already.
    Queued,
    Running,
    Success,
    /// Out of tries.
    Failed,
    /// A try failed; the next one waits for its backoff.
    UpForRetry,
    /// Never ran, because a task before it failed.
    UpstreamFailed,
    /// Chose to do nothing, or a task before it did.
    Skipped,
    /// The plan no longer has it.
    Removed,
}

impl TaskState {
    pub const ALL: [Self; 10] = [
        Self::None,
        Self::Scheduled,
        Self::Queued,
        Self::Running,
        Self::Success,
        Self::Failed,
        Self::UpForRetry,
        Self::UpstreamFailed,
        Self::Skipped,
        Self::Removed,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Scheduled => "scheduled",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Success => "success",
            Self::Failed => "failed",
            Self::UpForRetry => "up_for_retry",
            Self::UpstreamFailed => "upstream_failed",
            Self::Skipped => "skipped",
            Self::Removed => "removed",
        }
    }

    /// Nothing more happens to it by itself.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Success | Self::Failed | Self::UpstreamFailed | Self::Skipped | Self::Removed)
    }

    pub const fn is_bad(self) -> bool {
        matches!(self, Self::Failed | Self::UpstreamFailed)
    }
}

impl fmt::Display for TaskState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.as_str())
    }
}

impl FromStr for TaskState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|state| state.as_str() == text).ok_or_else(|| format!("not a task state: {text:?}"))
    }
}

/// When a task's turn comes, once the tasks before it are done; Airflow's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TriggerRule {
    /// All of them succeeded. One failure makes this task `upstream_failed` at once, one skip skips it.
    #[default]
    AllSuccess,
    /// All of them ended, however they ended: for what must be said in any case.
    AllDone,
}

/// One task of a DAG.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    pub task_id: String,
    pub upstream: Vec<String>,
    pub trigger_rule: TriggerRule,
    /// The engine starts a run of this DAG instead of calling the executor, and does not wait for it.
    pub triggers: Option<String>,
    /// Tries after the first one.
    pub retries: u32,
    /// Waiting time before the second try; doubles up to `backoff_max`.
    pub backoff: Duration,
    pub backoff_max: Duration,
    /// A try that takes longer is cancelled and counts as failed.
    pub timeout: Duration,
}

impl Task {
    /// A task without a word on tries: two retries after 2 s and 4 s, ten minutes each.
    pub fn new(task_id: impl Into<String>) -> Self {
        Self {
            task_id: task_id.into(),
            upstream: Vec::new(),
            trigger_rule: TriggerRule::AllSuccess,
            triggers: None,
            retries: 2,
            backoff: Duration::from_secs(2),
            backoff_max: Duration::from_secs(60),
            timeout: Duration::from_secs(600),
        }
    }

    #[must_use]
    pub fn after<T: Into<String>>(mut self, upstream: impl IntoIterator<Item = T>) -> Self {
        self.upstream.extend(upstream.into_iter().map(Into::into));
        self
    }

    #[must_use]
    pub fn triggering(mut self, dag_id: impl Into<String>) -> Self {
        self.triggers = Some(dag_id.into());
        self
    }

    #[must_use]
    pub fn when(mut self, rule: TriggerRule) -> Self {
        self.trigger_rule = rule;
        self
    }

    /// How long to wait after the given number of failed tries (1 = the first failed).
    pub fn backoff_after(&self, failures: u32) -> Duration {
        self.backoff.saturating_mul(1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX)).min(self.backoff_max)
    }
}

/// A DAG that can be run: no cycle, no duplicate, no edge to nowhere. Tasks stand in an order in which they could run.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    dag_id: String,
    schedule: Schedule,
    tasks: Vec<Task>,
    upstream: Vec<Vec<usize>>,
}

/// Why tasks and edges are not a DAG.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadPlan {
    #[error("{0:?} cannot name a DAG or a task: use letters, digits, _, - and .")]
    Name(String),
    #[error("DAG {0} has no tasks")]
    Empty(String),
    #[error("DAG {dag_id} has task {task_id} twice")]
    Duplicate { dag_id: String, task_id: String },
    #[error("task {task_id} of DAG {dag_id} comes after {upstream}, which does not exist")]
    UnknownUpstream { dag_id: String, task_id: String, upstream: String },
    #[error("tasks of DAG {dag_id} wait for each other: {}", tasks.join(", "))]
    Cycle { dag_id: String, tasks: Vec<String> },
    #[error("there are two DAGs {0}")]
    DuplicateDag(String),
    #[error("task {task_id} of DAG {dag_id} triggers {target}, which does not exist")]
    UnknownTarget { dag_id: String, task_id: String, target: String },
}

impl Plan {
    /// Checks and orders the tasks. The order is that of the declaration wherever the edges allow it.
    pub fn new(dag_id: impl Into<String>, schedule: Schedule, tasks: Vec<Task>) -> Result<Self, BadPlan> {
        let dag_id = dag_id.into();
        check_name(&dag_id)?;
        if tasks.is_empty() {
            return Err(BadPlan::Empty(dag_id));
        }
        let mut places = BTreeMap::new();
        for (place, task) in tasks.iter().enumerate() {
            check_name(&task.task_id)?;
            if places.insert(task.task_id.as_str(), place).is_some() {
                return Err(BadPlan::Duplicate { dag_id, task_id: task.task_id.clone() });
            }
        }
        for task in &tasks {
            if let Some(missing) = task.upstream.iter().find(|it| !places.contains_key(it.as_str())) {
                return Err(BadPlan::UnknownUpstream { dag_id, task_id: task.task_id.clone(), upstream: missing.clone() });
            }
        }
        let tasks = in_order(&dag_id, tasks)?;
        let place = |task_id: &String| tasks.iter().position(|it| it.task_id == *task_id).expect("every upstream was just found among the tasks");
        let upstream = tasks.iter().map(|task| task.upstream.iter().map(place).collect()).collect();
        Ok(Self { dag_id, schedule, tasks, upstream })
    }

    pub fn dag_id(&self) -> &str {
        &self.dag_id
    }

    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    pub fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    pub fn place(&self, task_id: &str) -> Option<usize> {
        self.tasks.iter().position(|task| task.task_id == task_id)
    }

    /// Everything that comes after a task, directly or not, in order; without the task itself.
    pub fn downstream(&self, place: usize) -> Vec<usize> {
        let mut follows = vec![false; self.tasks.len()];
        follows[place] = true;
        for (later, upstream) in self.upstream.iter().enumerate() {
            follows[later] |= upstream.iter().any(|it| follows[*it]);
        }
        (0..self.tasks.len()).filter(|it| follows[*it] && *it != place).collect()
    }

    /// What tasks in state `none` become, given the others. One pass is enough: tasks stand in order.
    ///
    /// `states` holds one state per task of the plan, and is changed in place.
    pub fn settle(&self, states: &mut [TaskState]) {
        for place in 0..self.tasks.len() {
            if states[place] == TaskState::None {
                states[place] = self.turn(place, states);
            }
        }
    }

    fn turn(&self, place: usize, states: &[TaskState]) -> TaskState {
        let before = || self.upstream[place].iter().map(|it| states[*it]);
        match self.tasks[place].trigger_rule {
            TriggerRule::AllDone if before().all(TaskState::is_final) => TaskState::Scheduled,
            TriggerRule::AllDone => TaskState::None,
            TriggerRule::AllSuccess if before().any(TaskState::is_bad) => TaskState::UpstreamFailed,
            TriggerRule::AllSuccess if before().any(|it| it == TaskState::Skipped) => TaskState::Skipped,
            TriggerRule::AllSuccess if before().all(|it| it == TaskState::Success) => TaskState::Scheduled,
            TriggerRule::AllSuccess => TaskState::None,
        }
    }
}

/// Refuses a set of DAGs in which two have one name or one triggers a stranger.
pub(super) fn check_together(plans: &[Plan]) -> Result<(), BadPlan> {
    for (place, plan) in plans.iter().enumerate() {
        if plans[..place].iter().any(|it| it.dag_id == plan.dag_id) {
            return Err(BadPlan::DuplicateDag(plan.dag_id.clone()));
        }
        for task in &plan.tasks {
            if let Some(target) = task.triggers.as_ref().filter(|target| !plans.iter().any(|it| it.dag_id == **target)) {
                return Err(BadPlan::UnknownTarget { dag_id: plan.dag_id.clone(), task_id: task.task_id.clone(), target: target.clone() });
            }
        }
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), BadPlan> {
    let fine = !name.is_empty() && name.len() <= 200 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
    if fine { Ok(()) } else { Err(BadPlan::Name(name.chars().take(80).collect())) }
}

/// Kahn's algorithm; among tasks that could come next, the one declared first.
fn in_order(dag_id: &str, tasks: Vec<Task>) -> Result<Vec<Task>, BadPlan> {
    let mut waiting = tasks;
    let mut ordered: Vec<Task> = Vec::with_capacity(waiting.len());
    while !waiting.is_empty() {
        let next = waiting.iter().position(|task| task.upstream.iter().all(|it| ordered.iter().any(|done| done.task_id == *it)));
        match next {
            Some(next) => ordered.push(waiting.remove(next)),
            None => return Err(BadPlan::Cycle { dag_id: dag_id.to_owned(), tasks: waiting.into_iter().map(|it| it.task_id).collect() }),
        }
    }
    Ok(ordered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plan(tasks: Vec<Task>) -> Result<Plan, BadPlan> {
        Plan::new("demo", Schedule::Never, tasks)
    }

    #[test]
    fn cycles_duplicates_and_edges_to_nowhere_are_refused() {
        let cycle = plan(vec![Task::new("a").after(["b"]), Task::new("b").after(["a"]), Task::new("c")]);
        assert_eq!(cycle, Err(BadPlan::Cycle { dag_id: "demo".into(), tasks: vec!["a".into(), "b".into()] }));
        assert!(matches!(plan(vec![Task::new("a").after(["a"])]), Err(BadPlan::Cycle { .. })));
        assert!(matches!(plan(vec![Task::new("a"), Task::new("a")]), Err(BadPlan::Duplicate { .. })));
        assert!(matches!(plan(vec![Task::new("a").after(["z"])]), Err(BadPlan::UnknownUpstream { .. })));
        assert!(matches!(plan(vec![Task::new("a b")]), Err(BadPlan::Name(_))));
        assert!(matches!(plan(vec![]), Err(BadPlan::Empty(_))));
        let lonely = plan(vec![Task::new("a").triggering("other")]).expect("a DAG");
        assert!(matches!(check_together(std::slice::from_ref(&lonely)), Err(BadPlan::UnknownTarget { .. })));
        assert!(matches!(check_together(&[lonely.clone(), lonely]), Err(BadPlan::DuplicateDag(_) | BadPlan::UnknownTarget { .. })));
    }

    #[test]
    fn tasks_keep_the_order_of_their_declaration_where_edges_allow() {
        let plan =
            plan(vec![Task::new("mail").after(["x", "y"]), Task::new("y").after(["find"]), Task::new("find"), Task::new("x").after(["find"])]).expect("a DAG");
        let order: Vec<&str> = plan.tasks().iter().map(|it| it.task_id.as_str()).collect();
        assert_eq!(order, ["find", "y", "x", "mail"]);
        assert_eq!(plan.downstream(1), [3]);
        assert_eq!(plan.downstream(0), [1, 2, 3]);
    }

    #[test]
    fn a_mail_for_any_case_waits_until_all_are_done() {
        let plan = plan(vec![Task::new("x"), Task::new("y"), Task::new("mail").after(["x", "y"]).when(TriggerRule::AllDone)]).expect("a DAG");
        let mut states = [TaskState::Failed, TaskState::Running, TaskState::None];
        plan.settle(&mut states);
        assert_eq!(states[2], TaskState::None);
        states[1] = TaskState::Success;
        plan.settle(&mut states);
        assert_eq!(states[2], TaskState::Scheduled);
    }

    #[test]
    fn backoff_doubles_up_to_its_maximum() {
        let task = Task { backoff: Duration::from_secs(2), backoff_max: Duration::from_secs(60), ..Task::new("a") };
        let seconds: Vec<u64> = [1, 2, 3, 4, 5, 6, 40, u32::MAX].into_iter().map(|failures| task.backoff_after(failures).as_secs()).collect();
        assert_eq!(seconds, [2, 4, 8, 16, 32, 60, 60, 60]);
    }

    #[test]
    fn states_read_as_they_are_written() {
        for state in TaskState::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
    }

    /// Any acyclic plan: each task comes after a random choice of the tasks declared before it, declared in random order.
    fn any_plan() -> impl Strategy<Value = Plan> {
        let edges = proptest::collection::vec(proptest::collection::vec(any::<bool>(), 12), 1..12);
        (edges, any::<u64>()).prop_map(|(edges, turn)| {
            let mut tasks: Vec<Task> = edges
                .iter()
                .enumerate()
                .map(|(place, row)| Task::new(format!("t{place}")).after((0..place).filter(|it| row[*it]).map(|it| format!("t{it}"))))
                .collect();
            let turn = turn % tasks.len() as u64;
            tasks.rotate_left(turn as usize);
            Plan::new("any", Schedule::Never, tasks).expect("edges only lead back")
        })
    }

    proptest! {
        #[test]
        fn every_task_runs_once_after_those_before_it_or_is_ruled_out_by_a_failure(plan in any_plan(), fails in proptest::collection::vec(any::<bool>(), 12)) {
            let mut states = vec![TaskState::None; plan.tasks().len()];
            let mut ran = Vec::new();
            loop {
                plan.settle(&mut states);
                let Some(next) = states.iter().position(|it| *it == TaskState::Scheduled) else { break };
                for before in &plan.upstream[next] {
                    prop_assert_eq!(states[*before], TaskState::Success);
                }
                states[next] = if fails[next] { TaskState::Failed } else { TaskState::Success };
                ran.push(next);
            }
            prop_assert!(states.iter().all(|it| it.is_final()));
            for (place, state) in states.iter().enumerate() {
                let ruled_out = plan.upstream[place].iter().any(|it| states[*it].is_bad());
                prop_assert_eq!(*state == TaskState::UpstreamFailed, ruled_out);
                prop_assert_eq!(ran.iter().filter(|it| **it == place).count(), usize::from(!ruled_out));
            }
        }
    }
}
