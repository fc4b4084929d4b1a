//! What the keys order: which stage, DAG, run or task a key is for here, and what it asks of it.

use std::num::NonZeroU32;

use crate::{
    bank::Rate,
    dag::{DagStats, RunRef, RunState, TaskState},
    pipeline::{
        command::{Command, StageName},
        snapshot::Snapshot,
        supervise::Health,
    },
    refresh,
    stage::Phase,
};

use super::{
    app::{App, Effect, Purpose},
    keys::Pane,
};

impl App {
    /// What `p` holds or lets go here: on a stage's own screen that stage; elsewhere whatever is held, and else the bank.
    pub(super) fn pause_target(&self, now: &Snapshot) -> StageName {
        let held = || now.stages.iter().find(|(_, stage)| stage.wanted == Phase::Paused).map(|(name, _)| *name);
        match (self.zoomed, self.focus) {
            (true, Pane::Stream) => StageName::Cdc,
            (true, Pane::Lake) => StageName::Lake,
            (true, Pane::Dags) => StageName::Scheduler,
            _ => held().unwrap_or(StageName::Bank),
        }
    }

    pub(super) fn toggle_pause(&self, now: &Snapshot) -> Effect {
        let stage = self.pause_target(now);
        let wanted = now.stage(stage).map_or(Phase::Running, |it| it.wanted);
        let command = match wanted {
            Phase::Running => Command::Pause { stage },
            Phase::Paused => Command::Resume { stage },
        };
        Effect::Send(command, Purpose::Do)
    }

    /// The next wish follows from the last one, not from what the pipeline has heard of it so far.
    pub(super) fn change_rate(&mut self, faster: bool, now: &Snapshot) -> Effect {
        let base = match (self.rate_asked, now.wish.rate) {
            (Some((rate, _)), _) | (None, Rate::PerSecond(rate)) => rate,
            (None, Rate::Unlimited) => return self.refuse("the bank goes as fast as it can; `:rate N` sets a rate", now),
        };
        let tenth = (base.get() / 10).max(1);
        let next = if faster { base.saturating_add(tenth) } else { NonZeroU32::new(base.get() - tenth.min(base.get() - 1)).unwrap_or(NonZeroU32::MIN) };
        self.rate_asked = Some((next, now.at));
        Effect::Send(Command::Rate { per_second: next }, Purpose::Do)
    }

    /// The rate that was asked for and that no snapshot shows yet.
    pub(super) fn rate_wanted(&self) -> Option<NonZeroU32> {
        self.rate_asked.map(|it| it.0)
    }

    /// The DAG that `t` starts here.
    pub(super) fn trigger_target(&self, now: &Snapshot) -> Option<String> {
        let known = |dag_id: &str| now.dag.dag(dag_id).map(|it| it.dag_id.clone());
        let first = || now.dag.dags.first().map(|it| it.dag_id.clone());
        match (self.zoomed, self.focus) {
            (true, Pane::Dags) => self.task(now).map(|it| it.0.dag_id.clone()),
            (_, Pane::Dbt) => known(refresh::TRANSFORMATION),
            _ => known(refresh::LOADING).or_else(first),
        }
    }

    pub(super) fn trigger(&mut self, now: &Snapshot) -> Effect {
        match self.trigger_target(now) {
            Some(dag_id) => Effect::Send(Command::Trigger { dag_id, dry_run: true }, Purpose::Rehearse),
            None => self.refuse("there is no DAG here: the scheduler is not up yet, or runs elsewhere", now),
        }
    }

    /// The failed task that `r` is for: the selected one in the grid, else the newest.
    pub(super) fn retry_target(&self, now: &Snapshot) -> Option<(RunRef, String)> {
        if self.zoomed && self.focus == Pane::Dags {
            let (dag, task_id) = self.task(now)?;
            let run = dag.runs.get(self.run_of(dag))?;
            let failed = run.tasks.iter().any(|it| it.task_id == task_id && it.state == TaskState::Failed);
            if failed {
                return Some((RunRef { dag_id: dag.dag_id.clone(), run_id: run.run_id.clone() }, task_id.to_owned()));
            }
        }
        let failed = now.dag.dags.iter().filter_map(DagStats::last_word).filter(|run| run.state == RunState::Failed);
        let run = failed.max_by_key(|run| (!run.cancelled, run.finished_at))?;
        let task = run.tasks.iter().find(|it| it.state == TaskState::Failed)?;
        Some((RunRef { dag_id: run.dag_id.clone(), run_id: run.run_id.clone() }, task.task_id.clone()))
    }

    pub(super) fn retry(&mut self, now: &Snapshot) -> Effect {
        match self.retry_target(now) {
            Some((run, task_id)) => Effect::Send(Command::Retry { dag_id: run.dag_id, run_id: Some(run.run_id), task_id, dry_run: true }, Purpose::Rehearse),
            None => self.refuse("no task of a newest run has failed; on the DAGs' screen c runs any task again", now),
        }
    }

    pub(super) fn clear(&mut self, now: &Snapshot) -> Effect {
        let selected = || {
            let (dag, task_id) = self.task(now)?;
            let run = dag.runs.get(self.run_of(dag))?;
            Some((RunRef { dag_id: dag.dag_id.clone(), run_id: run.run_id.clone() }, task_id.to_owned()))
        };
        let target = if self.zoomed && self.focus == Pane::Dags { selected() } else { self.retry_target(now) };
        match target {
            Some((run, task_id)) => Effect::Send(Command::Clear { dag_id: run.dag_id, run_id: Some(run.run_id), task_id, dry_run: true }, Purpose::Rehearse),
            None => self.refuse("nothing to clear here: choose a task on the DAGs' screen (3)", now),
        }
    }

    /// The DAG whose run `x` ends.
    pub(super) fn cancel_target(&self, now: &Snapshot) -> Option<String> {
        let runs = |dag: &DagStats| dag.runs.first().is_some_and(|run| !run.state.is_final());
        let selected = self.task(now).map(|it| it.0).filter(|dag| self.zoomed && self.focus == Pane::Dags && runs(dag));
        selected.or_else(|| now.dag.dags.iter().find(|dag| runs(dag))).map(|dag| dag.dag_id.clone())
    }

    pub(super) fn cancel(&mut self, now: &Snapshot) -> Effect {
        match self.cancel_target(now) {
            Some(dag_id) => Effect::Send(Command::Cancel { dag_id, dry_run: true }, Purpose::Rehearse),
            None => self.refuse("no run is in progress", now),
        }
    }

    pub(super) fn restart(&mut self, now: &Snapshot) -> Effect {
        let stopped = |health: &Health| matches!(health, Health::Held { .. } | Health::Waiting { .. } | Health::Failed { .. });
        match now.stages.iter().find(|(_, stage)| stopped(&stage.health)) {
            Some((stage, _)) => Effect::Send(Command::Restart { stage: *stage }, Purpose::Do),
            None => self.refuse("no stage has stopped", now),
        }
    }
}

/// The command whose rehearsal this was.
pub(super) fn for_real(command: Command) -> Command {
    let dry_run = false;
    match command {
        Command::Trigger { dag_id, .. } => Command::Trigger { dag_id, dry_run },
        Command::Retry { dag_id, run_id, task_id, .. } => Command::Retry { dag_id, run_id, task_id, dry_run },
        Command::Clear { dag_id, run_id, task_id, .. } => Command::Clear { dag_id, run_id, task_id, dry_run },
        Command::Cancel { dag_id, .. } => Command::Cancel { dag_id, dry_run },
        other => other,
    }
}
