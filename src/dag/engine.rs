//! The engine between two events: what it holds, what it starts, what it writes.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use tokio::{sync::mpsc, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{
    Config, Error,
    attempt::{Ended, attempt},
    history::Session,
    plan::{Plan, TaskState},
    progress::{CANCELLED, Run, RunRef, RunType},
    run::Report,
    schedule::{self, Schedule},
    stats::{DagStats, RUNS_SHOWN, RunStats, Stats, TRIGGERED, edges},
    task::{Executor, LogLine, TaskContext, TaskError, TaskLog, TaskOutcome},
};
use crate::{fault::Fault, stage::Phase};

/// A report that failed is told again after this long.
const TOLD_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// Runs whose end waits to be told, per DAG. Older ones are dropped with a warning: their state is in the history.
const UNTOLD_MAX: usize = 32;

/// Everything the stage owns besides its channels.
pub(super) struct Engine {
    pub(super) dags: Vec<Dag>,
    pub(super) executor: Executor,
    pub(super) report: Report,
    pub(super) config: Config,
    pub(super) working: JoinSet<Ended>,
    pub(super) telling: JoinSet<Told>,
    /// Results that are not in the history yet.
    pub(super) kept: Vec<Ended>,
    pub(super) line_sink: mpsc::Sender<LogLine>,
    pub(super) phase: Phase,
    pub(super) away: Option<String>,
}

/// One DAG: its lock, its run in progress, and the runs that wait.
pub(super) struct Dag {
    pub(super) plan: Arc<Plan>,
    pub(super) held: bool,
    pub(super) paused: bool,
    /// The start by schedule before the next one; None: an interval is due at once.
    last_start: Option<DateTime<Utc>>,
    pub(super) active: Option<Run>,
    /// The run in progress has changed since it was written.
    unsaved: bool,
    pub(super) queue: VecDeque<Run>,
    untold: VecDeque<Untold>,
    shown: VecDeque<Arc<RunStats>>,
    pub(super) cancels: BTreeMap<String, CancellationToken>,
}

struct Untold {
    run: Run,
    /// None while it is being told.
    tell_at: Option<Instant>,
}

/// Whether somebody took note of a run's end.
pub(super) struct Told {
    run: RunRef,
    result: Result<(), TaskError>,
}

impl Dag {
    pub(super) fn new(plan: Plan) -> Self {
        Self {
            plan: Arc::new(plan),
            held: false,
            paused: false,
            last_start: None,
            active: None,
            unsaved: false,
            queue: VecDeque::new(),
            untold: VecDeque::new(),
            shown: VecDeque::new(),
            cancels: BTreeMap::new(),
        }
    }

    /// Puts a run's present state among those shown.
    pub(super) fn show(&mut self, run: &Run) {
        let stats = Arc::new(RunStats::from(run));
        match self.shown.iter_mut().find(|it| it.run_id == run.run_id) {
            Some(shown) => *shown = stats,
            None => self.shown.push_front(stats),
        }
        self.shown.truncate(RUNS_SHOWN);
    }

    fn is_idle(&self) -> bool {
        self.active.is_none() && self.queue.is_empty()
    }

    fn knows(&self, run_id: &str) -> bool {
        self.active.iter().chain(&self.queue).any(|it| it.run_id == run_id)
    }

    /// The run that waits for its first start, if one does: triggers coalesce into it.
    pub(super) fn waiting(&self) -> Option<&Run> {
        self.queue.iter().find(|it| it.started_at.is_none())
    }

    fn tell(&mut self, run: Run) {
        self.untold.retain(|it| it.run.run_id != run.run_id);
        self.untold.push_back(Untold { run, tell_at: Some(Instant::now()) });
        if self.untold.len() > UNTOLD_MAX {
            warn!(dag_id = self.plan.dag_id(), "too many ends of runs wait to be told; the oldest is dropped");
            self.untold.pop_front();
        }
    }
}

impl Engine {
    pub(super) fn dag(&mut self, dag_id: &str) -> Option<&mut Dag> {
        self.dags.iter_mut().find(|it| it.plan.dag_id() == dag_id)
    }

    /// On a fresh session: locks what is free and takes up what the history says.
    pub(super) async fn take_over(&mut self, session: &mut Session) -> Result<(), Error> {
        for dag in &mut self.dags {
            dag.held = false;
        }
        self.lock_free_ones(session).await
    }

    async fn lock_free_ones(&mut self, session: &mut Session) -> Result<(), Error> {
        for dag in self.dags.iter_mut().filter(|it| !it.held) {
            let dag_id = dag.plan.dag_id().to_owned();
            dag.held = session.try_lock(&dag_id).await?;
            dag.paused = session.is_paused(&dag_id).await?;
            dag.shown = session.recent(&dag_id, RUNS_SHOWN as u32).await?.iter().map(|run| Arc::new(RunStats::from(run))).collect();
            if dag.held {
                take_up(dag, &self.kept, session).await?;
                self.kept.retain(|it| it.dag_id != dag_id);
            }
        }
        Ok(())
    }

    /// Once a second: proves that the session lives, finds runs queued by others, tries for locks held elsewhere.
    pub(super) async fn pulse(&mut self, session: &mut Session) -> Result<(), Error> {
        for queued in session.queued().await? {
            let Some(dag) = self.dag(&queued.dag_id).filter(|it| it.held && !it.knows(&queued.run_id)) else { continue };
            if let Some(mut run) = session.run(&queued).await? {
                run.align(&dag.plan);
                dag.show(&run);
                dag.queue.push_back(run);
            }
        }
        self.lock_free_ones(session).await
    }

    /// Starts all that is due, and writes it first.
    pub(super) async fn advance(&mut self, session: &mut Session) -> Result<(), Error> {
        for place in 0..self.dags.len() {
            if self.dags[place].held {
                self.start_by_schedule(place, session).await?;
            }
        }
        // A task that triggers another DAG ends within the step and may let a task of an earlier DAG start.
        let mut moved = true;
        while moved {
            moved = false;
            for place in 0..self.dags.len() {
                if self.dags[place].held {
                    moved |= self.step(place, session).await?;
                }
            }
        }
        self.tell_due();
        Ok(())
    }

    async fn start_by_schedule(&mut self, place: usize, session: &mut Session) -> Result<(), Error> {
        let now = Utc::now();
        let dag = &mut self.dags[place];
        if self.phase == Phase::Paused || dag.paused || !dag.is_idle() {
            return Ok(());
        }
        let Some(due) = dag.plan.schedule().due(dag.last_start, now) else { return Ok(()) };
        let date = if dag.last_start.is_none() { schedule::tidy(due, session.last_scheduled(dag.plan.dag_id()).await?) } else { due };
        let run = fresh_run(&dag.plan, RunType::Scheduled, date, None, session).await?;
        dag.last_start = Some(run.logical_date);
        self.enqueue(place, run, session).await
    }

    /// Writes a fresh run and lets it wait for its turn.
    pub(super) async fn enqueue(&mut self, place: usize, run: Run, session: &mut Session) -> Result<(), Error> {
        session.save(&[&run]).await?;
        info!(dag_id = run.dag_id, run_id = run.run_id, "run queued");
        let dag = &mut self.dags[place];
        dag.show(&run);
        dag.queue.push_back(run);
        Ok(())
    }

    /// Moves one DAG as far as it goes without waiting. True where a task triggered something.
    async fn step(&mut self, place: usize, session: &mut Session) -> Result<bool, Error> {
        let now = Utc::now();
        let slots = self.config.concurrency.get() as usize;
        let dag = &mut self.dags[place];
        let Some(mut run) = dag.active.take().or_else(|| dag.queue.pop_front()) else { return Ok(false) };
        let before = run.clone();
        if !run.state.is_final() && run.state != super::RunState::Running {
            run.begin(now);
            info!(dag_id = run.dag_id, run_id = run.run_id, "run started");
        }
        let started = run.start_ready(&dag.plan, now, slots.saturating_sub(run.running()));
        let finished = run.finish(&dag.plan, now);
        if std::mem::take(&mut dag.unsaved) || run != before {
            session.save(&[&run]).await?;
            dag.show(&run);
        }
        if finished {
            match run.state {
                super::RunState::Success => info!(dag_id = run.dag_id, run_id = run.run_id, "run succeeded"),
                _ if run.cancelled => info!(dag_id = run.dag_id, run_id = run.run_id, "run cancelled by an operator"),
                _ => error!(dag_id = run.dag_id, run_id = run.run_id, "run failed"),
            }
            session.prune(dag.plan.dag_id(), self.config.runs_kept.get()).await?;
            dag.tell(run);
            return Ok(!self.dags[place].queue.is_empty());
        }
        dag.active = Some(run);
        let mut triggered = false;
        for task in started {
            match self.dags[place].plan.tasks()[task].triggers.clone() {
                Some(target) => {
                    self.trigger(place, task, &target, session).await?;
                    triggered = true;
                }
                None => self.start_try(place, task),
            }
        }
        Ok(triggered)
    }

    fn start_try(&mut self, place: usize, task: usize) {
        let dag = &mut self.dags[place];
        let Some(run) = &dag.active else { return };
        let (planned, instance) = (&dag.plan.tasks()[task], &run.tasks[task]);
        let cancel = CancellationToken::new();
        dag.cancels.insert(planned.task_id.clone(), cancel.clone());
        let named = ((run.dag_id.as_str(), run.run_id.as_str()), (planned.task_id.as_str(), instance.try_number));
        let context = TaskContext {
            dag_id: run.dag_id.clone(),
            run_id: run.run_id.clone(),
            task_id: planned.task_id.clone(),
            try_number: instance.try_number,
            logical_date: run.logical_date,
            run_started_at: run.started_at.unwrap_or(run.queued_at),
            notes: Arc::new(run.notes()),
            cancel,
            log: TaskLog::new(self.line_sink.clone(), named.0, named.1, self.config.log_lines_max.get()),
        };
        info!(dag_id = run.dag_id, task_id = planned.task_id, try_number = instance.try_number, "task started");
        self.working.spawn(attempt(Arc::clone(&self.executor), context, planned.timeout));
    }

    /// Queues a run of another DAG, or finds the one that waits already; it and the task's success are one transaction.
    async fn trigger(&mut self, place: usize, task: usize, target: &str, session: &mut Session) -> Result<(), Error> {
        let target_place = self.dags.iter().position(|it| it.plan.dag_id() == target).expect("plans were checked together");
        let by = self.dags[place].active.as_ref().map(Run::reference);
        let waiting = match &self.dags[target_place] {
            held if held.held => held.waiting().map(Run::reference),
            _ => session.queued().await?.into_iter().find(|it| it.dag_id == target),
        };
        let fresh = match &waiting {
            Some(_) => None,
            None => Some(fresh_run(&self.dags[target_place].plan, RunType::Triggered, Utc::now(), by, session).await?),
        };
        let Some(reference) = waiting.or_else(|| fresh.as_ref().map(Run::reference)) else { return Ok(()) };
        let dag = &mut self.dags[place];
        let Some(run) = &mut dag.active else { return Ok(()) };
        run.end(&dag.plan, task, Ok(TaskOutcome::Success(serde_json::json!({ TRIGGERED: reference }))), Utc::now());
        session.save(&std::iter::once(&*run).chain(&fresh).collect::<Vec<_>>()).await?;
        let run = run.clone();
        dag.show(&run);
        if let Some(fresh) = fresh {
            info!(dag_id = fresh.dag_id, run_id = fresh.run_id, by = run.run_id, "run queued");
            let dag = &mut self.dags[target_place];
            dag.show(&fresh);
            // Where another process runs that DAG, it finds the run in the history.
            if dag.held {
                dag.queue.push_back(fresh);
            }
        }
        Ok(())
    }

    /// Books the end of a try, starts what follows, and only then forgets the result.
    pub(super) async fn book(&mut self, session: &mut Session, ended: Ended) -> Result<(), Error> {
        self.kept.push(ended.clone());
        if let Some(dag) = self.dag(&ended.dag_id) {
            dag.cancels.remove(&ended.task_id);
            let plan = Arc::clone(&dag.plan);
            if let Some(run) = &mut dag.active {
                apply(run, &plan, ended);
                dag.unsaved = true;
            }
        }
        self.advance(session).await?;
        self.kept.clear();
        Ok(())
    }

    fn tell_due(&mut self) {
        let now = Instant::now();
        for untold in self.dags.iter_mut().flat_map(|it| &mut it.untold).filter(|it| it.tell_at.is_some_and(|at| at <= now)) {
            untold.tell_at = None;
            let (told, run) = ((self.report)(untold.run.clone()), untold.run.reference());
            self.telling.spawn(async move { Told { run, result: told.await } });
        }
    }

    pub(super) async fn told(&mut self, session: &mut Session, told: Told) -> Result<(), Error> {
        let Some(dag) = self.dag(&told.run.dag_id) else { return Ok(()) };
        match told.result {
            Ok(()) => {
                dag.untold.retain(|it| it.run.run_id != told.run.run_id);
                session.mark_reported(&told.run).await
            }
            Err(error) => {
                warn!(%error, run = %told.run, "the end of a run was not told; it is told again");
                let again = dag.untold.iter_mut().filter(|it| it.run.run_id == told.run.run_id);
                again.for_each(|it| it.tell_at = Some(Instant::now() + TOLD_AGAIN_AFTER));
                Ok(())
            }
        }
    }

    /// Stops all tries and waits until they are down. With a session, what they achieved is booked; without, it is kept.
    pub(super) async fn stand_down(&mut self, session: Option<&mut Session>) {
        for cancel in self.dags.iter().flat_map(|it| it.cancels.values()) {
            cancel.cancel();
        }
        while let Some(ended) = self.working.join_next().await {
            self.kept.extend(ended.ok().filter(|it| !it.cut_short));
        }
        self.telling.abort_all();
        while self.telling.join_next().await.is_some() {}
        let mut session = session;
        for dag in &mut self.dags {
            dag.cancels.clear();
            if let (Some(session), Some(mut run)) = (session.as_deref_mut(), dag.active.take()) {
                book_kept(&mut run, &dag.plan, &self.kept);
                run.interrupt(Utc::now());
                if let Err(error) = session.save(&[&run]).await {
                    warn!(%error, "the end of a run in progress was not written; the next start repeats its tasks");
                }
                dag.show(&run);
            }
            (dag.active, dag.unsaved) = (None, false);
            dag.queue.clear();
            dag.untold.clear();
        }
    }

    /// How long nothing can become due by itself. None: for ever.
    pub(super) fn next_wake(&self, now: DateTime<Utc>) -> Option<Duration> {
        let starts = self.dags.iter().filter(|it| it.held && it.is_idle() && !it.paused && self.phase == Phase::Running);
        let starts = starts.filter_map(|it| it.plan.schedule().next(it.last_start, now));
        let retries = self.dags.iter().filter_map(|it| it.active.as_ref()?.next_retry());
        let due = starts.chain(retries).filter(|at| *at > now).min()?;
        (due - now).to_std().ok()
    }

    pub(super) fn stats(&self, now: DateTime<Utc>) -> Stats {
        let shown = |dag: &Dag| DagStats {
            dag_id: dag.plan.dag_id().to_owned(),
            schedule: dag.plan.schedule().to_string(),
            // A paused schedule has no next start.
            next_start: if dag.paused || self.phase == Phase::Paused { None } else { dag.plan.schedule().next(dag.last_start, now) },
            paused: dag.paused,
            held_elsewhere: !dag.held && self.away.is_none(),
            tasks: edges(&dag.plan),
            runs: dag.shown.iter().map(Arc::clone).collect(),
        };
        Stats { phase: self.phase, away: self.away.clone(), dags: self.dags.iter().map(shown).collect() }
    }
}

/// The DAG's lock is ours now: what was in progress goes on.
async fn take_up(dag: &mut Dag, kept: &[Ended], session: &mut Session) -> Result<(), Error> {
    let now = Utc::now();
    (dag.active, dag.queue, dag.untold) = (None, VecDeque::new(), VecDeque::new());
    if dag.last_start.is_none() && matches!(dag.plan.schedule(), Schedule::Cron { .. }) {
        dag.last_start = Some(session.last_scheduled(dag.plan.dag_id()).await?.unwrap_or(now));
    }
    for mut run in session.unfinished(dag.plan.dag_id()).await? {
        if run.state.is_final() {
            dag.tell(run);
            continue;
        }
        run.align(&dag.plan);
        book_kept(&mut run, &dag.plan, kept);
        if run.interrupt(now) {
            info!(dag_id = run.dag_id, run_id = run.run_id, "run resumes after an interruption");
        }
        session.save(&[&run]).await?;
        dag.show(&run);
        // The one in progress goes first, whenever it was queued.
        if run.state == super::RunState::Running { dag.queue.push_front(run) } else { dag.queue.push_back(run) }
    }
    Ok(())
}

/// Books results that were reached while the history was away, where the history still waits for exactly that try.
fn book_kept(run: &mut Run, plan: &Plan, kept: &[Ended]) {
    for ended in kept.iter().filter(|it| it.dag_id == plan.dag_id()) {
        apply(run, plan, ended.clone());
    }
}

fn apply(run: &mut Run, plan: &Plan, ended: Ended) {
    let Some(place) = plan.place(&ended.task_id) else { return };
    let task = &run.tasks[place];
    if run.run_id != ended.run_id || task.state != TaskState::Running || task.try_number != ended.try_number {
        return;
    }
    match &ended.result {
        Ok(_) => info!(dag_id = run.dag_id, task_id = ended.task_id, "task succeeded"),
        Err(_) if ended.cut_short && run.cancelled => info!(dag_id = run.dag_id, task_id = ended.task_id, "try cancelled by an operator"),
        Err(error) => warn!(dag_id = run.dag_id, task_id = ended.task_id, try_number = ended.try_number, error = first_line(&error.text), "try failed"),
    }
    let result = match ended.result {
        Err(error) if ended.cut_short && run.cancelled => {
            let text = format!("{CANCELLED}\n{}", error.text);
            Err(TaskError { text, fault: Fault::Operator("retry it, or clear it, to run it again".to_owned()), ..error })
        }
        other => other,
    };
    run.end(plan, place, result, ended.at);
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// A run with a name that is free: a date moves on by microseconds until it is.
pub(super) async fn fresh_run(plan: &Plan, run_type: RunType, date: DateTime<Utc>, by: Option<RunRef>, session: &mut Session) -> Result<Run, Error> {
    let mut date = date.duration_trunc(TimeDelta::microseconds(1)).unwrap_or(date);
    loop {
        let run = Run::new(plan, run_type, date, Utc::now(), by.clone());
        if session.run(&run.reference()).await?.is_none() {
            return Ok(run);
        }
        date += TimeDelta::microseconds(1);
    }
}
