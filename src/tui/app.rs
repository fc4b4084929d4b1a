//! What the console remembers: where one looks, what is selected, typed and asked. Action in, effect out; nothing here
//! waits, and nothing here pretends: what the pipeline does is only ever read from a snapshot.

use std::{collections::VecDeque, num::NonZeroU32, time::Duration};

use chrono::{DateTime, Utc};
use tui_logger::{LevelFilter, TuiWidgetEvent};

use crate::{
    bank::Rate,
    dag::{RunRef, RunState, TaskState},
    pipeline::{
        command::{Command, Reply, StageName},
        snapshot::Snapshot,
        supervise::Health,
    },
    refresh::{self, KpiStats},
    stage::Phase,
};

use super::{
    keys::{Action, Pane, Place},
    palette::{self, Asked},
    rows,
};

/// How long an answer stays in the footer.
const MESSAGE_SECONDS: i64 = 6;

/// A wish that was asked counts as the base of the next one so long, while the snapshot is still on its way.
const WISH_FRESH_SECONDS: i64 = 2;

/// Refreshes of the KPIs that are remembered for the lines beside the numbers.
const TREND_KEPT: usize = 120;

/// Rows that PgUp and PgDn move.
const PAGE: usize = 10;

/// Levels of the log, fewest lines first.
pub(super) const LEVELS: [LevelFilter; 4] = [LevelFilter::Error, LevelFilter::Warn, LevelFilter::Info, LevelFilter::Debug];

/// What must happen outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    Send(Command, Purpose),
    Log(TuiWidgetEvent),
    LogLevel(LevelFilter),
    Suspend,
    Redraw,
    Quit,
}

/// What the answer to a command is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To be done; the answer is shown.
    Do,
    /// Only to learn what it would touch; then the operator is asked.
    Rehearse,
}

/// What lies on top of the screen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum OnTop {
    Help { scroll: usize },
    Details { scroll: usize },
    Question(Question),
    Filter { text: String },
    Palette { text: String },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Question {
    Quit,
    /// A command that changes something, with what it will touch.
    Order {
        command: Command,
        said: String,
        tasks: Vec<String>,
    },
}

/// An answer for the footer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) ok: bool,
    pub(super) text: String,
    pub(super) at: DateTime<Utc>,
}

#[derive(Debug)]
pub(super) struct App {
    pub(super) focus: Pane,
    pub(super) zoomed: bool,
    pub(super) on_top: Option<OnTop>,
    pub(super) message: Option<Message>,
    pub(super) owned: bool,
    /// How long no snapshot has come, where that is worth a word.
    pub(super) silent: Option<Duration>,
    /// Panes side by side in the overview, for moving between them.
    pub(super) columns: usize,
    /// The KPIs of earlier refreshes, oldest first.
    pub(super) trend: VecDeque<KpiStats>,
    selected: [usize; 6],
    filters: [String; 6],
    /// The run chosen in the grid; None is the newest, whichever that is.
    run: Option<RunRef>,
    loudness: usize,
    rate_asked: Option<(NonZeroU32, DateTime<Utc>)>,
}

impl App {
    pub(super) fn new(owned: bool) -> Self {
        Self {
            focus: Pane::Stream,
            zoomed: false,
            on_top: None,
            message: None,
            owned,
            silent: None,
            columns: 2,
            trend: VecDeque::new(),
            selected: [0; 6],
            filters: Default::default(),
            run: None,
            loudness: 2,
            rate_asked: None,
        }
    }

    pub(super) fn place(&self) -> Place {
        match &self.on_top {
            Some(OnTop::Help { .. } | OnTop::Details { .. }) => Place::Sheet,
            Some(OnTop::Question(_)) => Place::Question,
            Some(OnTop::Filter { .. } | OnTop::Palette { .. }) => Place::Typing,
            None if self.zoomed => Place::Screen(self.focus),
            None => Place::Overview,
        }
    }

    pub(super) fn selected(&self, pane: Pane) -> usize {
        self.selected[pane.place()]
    }

    pub(super) fn filter(&self, pane: Pane) -> &str {
        &self.filters[pane.place()]
    }

    pub(super) fn level(&self) -> LevelFilter {
        LEVELS[self.loudness]
    }

    /// The place of the chosen run among those of a DAG, newest first.
    pub(super) fn run_of(&self, dag: &crate::dag::DagStats) -> usize {
        let chosen = self.run.as_ref().filter(|it| it.dag_id == dag.dag_id);
        chosen.and_then(|it| dag.runs.iter().position(|run| run.run_id == it.run_id)).unwrap_or_default()
    }

    /// Takes over what a new snapshot brings for the lines beside the KPIs, and forgets what is old.
    pub(super) fn observe(&mut self, now: &Snapshot) {
        if let Some(kpis) = &now.refresh.kpis
            && self.trend.back().is_none_or(|it| it.read_at < kpis.read_at)
        {
            self.trend.push_back(kpis.clone());
            while self.trend.len() > TREND_KEPT {
                self.trend.pop_front();
            }
        }
        if self.message.as_ref().is_some_and(|it| (now.at - it.at).num_seconds() >= MESSAGE_SECONDS) {
            self.message = None;
        }
    }

    pub(super) fn update(&mut self, action: Action, now: &Snapshot) -> Effect {
        self.message = None;
        match action {
            Action::Quit => self.ask(Question::Quit),
            Action::Interrupt if self.on_top == Some(OnTop::Question(Question::Quit)) => return Effect::Quit,
            Action::Interrupt => self.ask(Question::Quit),
            Action::Suspend => return Effect::Suspend,
            Action::Redraw => return Effect::Redraw,
            Action::Help => self.on_top = Some(OnTop::Help { scroll: 0 }),
            Action::Palette => self.on_top = Some(OnTop::Palette { text: String::new() }),
            Action::Filter => {
                self.zoomed = true;
                self.on_top = Some(OnTop::Filter { text: self.filter(self.focus).to_owned() });
            }
            Action::Zoom(pane) => {
                self.focus = pane;
                self.go_in(now);
            }
            Action::Enter => self.enter(now),
            Action::Back => return self.back(),
            Action::NextPane => self.focus = self.focus.step(1),
            Action::PreviousPane => self.focus = self.focus.step(-1),
            Action::Up | Action::Down | Action::Left | Action::Right | Action::PageUp | Action::PageDown | Action::First | Action::Last => {
                return self.walk(action, now);
            }
            Action::TogglePause => return self.toggle_pause(now),
            Action::Step => return Effect::Send(Command::Step, Purpose::Do),
            Action::Faster | Action::Slower => return self.change_rate(action == Action::Faster, now),
            Action::Trigger => return self.trigger(now),
            Action::Retry => return self.retry(now),
            Action::Clear => return self.clear(now),
            Action::Cancel => return self.cancel(now),
            Action::Restart => return self.restart(now),
            Action::Louder => return self.set_loudness(self.loudness + 1),
            Action::Quieter => return self.set_loudness(self.loudness.saturating_sub(1)),
            Action::Yes => return self.yes(),
            Action::No => self.on_top = None,
            Action::Type(_) | Action::Erase | Action::Complete | Action::Accept | Action::Dismiss => return self.typed(action, now),
        }
        Effect::None
    }

    /// An answer of the pipeline. What a rehearsal told becomes a question.
    pub(super) fn hear(&mut self, asked: Command, purpose: Purpose, reply: Reply, now: &Snapshot) {
        if purpose == Purpose::Do || !reply.ok {
            self.say(reply.ok, reply.text, now);
            return;
        }
        // Whoever went on to something else in the meantime is not torn out of it.
        if self.on_top.is_none() {
            self.ask(Question::Order { command: for_real(asked), said: reply.text, tasks: reply.tasks });
        }
    }

    pub(super) fn say(&mut self, ok: bool, text: impl Into<String>, now: &Snapshot) {
        self.message = Some(Message { ok, text: text.into(), at: now.at });
    }

    fn refuse(&mut self, text: impl Into<String>, now: &Snapshot) -> Effect {
        self.say(false, text, now);
        Effect::None
    }

    fn ask(&mut self, question: Question) {
        self.on_top = Some(OnTop::Question(question));
    }

    fn yes(&mut self) -> Effect {
        match self.on_top.take() {
            Some(OnTop::Question(Question::Quit)) => Effect::Quit,
            Some(OnTop::Question(Question::Order { command, .. })) => Effect::Send(command, Purpose::Do),
            _ => Effect::None,
        }
    }

    fn enter(&mut self, now: &Snapshot) {
        if !self.zoomed {
            self.go_in(now);
        } else if rows::count(self.focus, now, self.filter(self.focus)) > 0 {
            self.on_top = Some(OnTop::Details { scroll: 0 });
        }
    }

    /// Opens the screen of the pane in focus; what failed is selected already.
    fn go_in(&mut self, now: &Snapshot) {
        self.zoomed = true;
        if !self.filter(self.focus).is_empty() {
            return;
        }
        let failed = match self.focus {
            Pane::Dags => {
                let newest = |it: &crate::dag::DagStats, task: &str| {
                    it.runs
                        .first()
                        .is_some_and(|run| run.tasks.iter().any(|it| it.task_id == task && matches!(it.state, TaskState::Failed | TaskState::UpForRetry)))
                };
                rows::tasks(now, "").iter().position(|(dag, task)| newest(dag, task))
            }
            Pane::Dbt => rows::nodes(now, "").iter().position(|it| it.status.is_some_and(|status| !status.is_good() && status != crate::dbt::Status::Skipped)),
            _ => None,
        };
        if let Some(place) = failed {
            self.selected[self.focus.place()] = place;
            self.run = None;
        }
    }

    fn back(&mut self) -> Effect {
        if self.zoomed && !self.filter(self.focus).is_empty() {
            return self.set_filter(String::new());
        }
        self.zoomed = false;
        Effect::None
    }

    fn set_filter(&mut self, text: String) -> Effect {
        self.filters[self.focus.place()] = text;
        self.selected[self.focus.place()] = 0;
        // A scrolled log holds on to a line that the new filter may hide.
        if self.focus == Pane::Log { Effect::Log(TuiWidgetEvent::EscapeKey) } else { Effect::None }
    }

    fn walk(&mut self, action: Action, now: &Snapshot) -> Effect {
        if let Some(OnTop::Help { scroll } | OnTop::Details { scroll }) = &mut self.on_top {
            *scroll = moved(*scroll, action, usize::MAX);
            return Effect::None;
        }
        if !self.zoomed {
            self.walk_panes(action);
            return Effect::None;
        }
        match (self.focus, action) {
            (Pane::Log, Action::Up | Action::PageUp | Action::First) => return Effect::Log(TuiWidgetEvent::PrevPageKey),
            (Pane::Log, Action::Down | Action::PageDown) => return Effect::Log(TuiWidgetEvent::NextPageKey),
            (Pane::Log, Action::Last) => return Effect::Log(TuiWidgetEvent::EscapeKey),
            (Pane::Dags, Action::Left | Action::Right) => self.walk_runs(action == Action::Left, now),
            (pane, _) => {
                let last = rows::count(pane, now, self.filter(pane)).saturating_sub(1);
                let place = &mut self.selected[pane.place()];
                *place = moved((*place).min(last), action, last);
            }
        }
        Effect::None
    }

    fn walk_panes(&mut self, action: Action) {
        let (at, columns) = (self.focus.place(), self.columns.max(1));
        let to = match action {
            Action::Up => at.checked_sub(columns),
            Action::Down => Some(at + columns),
            Action::Left => (at % columns > 0).then(|| at - 1),
            Action::Right => (at % columns + 1 < columns).then_some(at + 1),
            _ => None,
        };
        if let Some(pane) = to.and_then(|it| Pane::ALL.get(it)) {
            self.focus = *pane;
        }
    }

    fn walk_runs(&mut self, older: bool, now: &Snapshot) {
        let Some((dag, _)) = self.task(now) else { return };
        let at = self.run_of(dag);
        let to = if older { (at + 1).min(dag.runs.len().saturating_sub(1)) } else { at.saturating_sub(1) };
        // The newest is not held: the choice follows when a newer one comes.
        self.run = dag.runs.get(to).filter(|_| to > 0).map(|run| RunRef { dag_id: dag.dag_id.clone(), run_id: run.run_id.clone() });
    }

    /// The task selected in the grid.
    pub(super) fn task<'a>(&self, now: &'a Snapshot) -> Option<(&'a crate::dag::DagStats, &'a str)> {
        let tasks = rows::tasks(now, self.filter(Pane::Dags));
        tasks.get(self.selected(Pane::Dags).min(tasks.len().saturating_sub(1))).copied()
    }

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

    fn toggle_pause(&self, now: &Snapshot) -> Effect {
        let stage = self.pause_target(now);
        let wanted = now.stage(stage).map_or(Phase::Running, |it| it.wanted);
        let command = match wanted {
            Phase::Running => Command::Pause { stage },
            Phase::Paused => Command::Resume { stage },
        };
        Effect::Send(command, Purpose::Do)
    }

    fn change_rate(&mut self, faster: bool, now: &Snapshot) -> Effect {
        let fresh = self.rate_asked.filter(|it| (now.at - it.1).num_seconds() < WISH_FRESH_SECONDS).map(|it| it.0);
        let base = match (fresh, now.wish.rate) {
            (Some(rate), _) | (None, Rate::PerSecond(rate)) => rate,
            (None, Rate::Unlimited) => return self.refuse("the bank goes as fast as it can; `:rate N` sets a rate", now),
        };
        let tenth = (base.get() / 10).max(1);
        let next = if faster { base.saturating_add(tenth) } else { NonZeroU32::new(base.get() - tenth.min(base.get() - 1)).unwrap_or(NonZeroU32::MIN) };
        self.rate_asked = Some((next, now.at));
        Effect::Send(Command::Rate { per_second: next }, Purpose::Do)
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

    fn trigger(&mut self, now: &Snapshot) -> Effect {
        match self.trigger_target(now) {
            Some(dag_id) => Effect::Send(Command::Trigger { dag_id, dry_run: false }, Purpose::Do),
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
        let newest = now.dag.dags.iter().filter_map(|dag| dag.runs.iter().find(|run| run.state.is_final()));
        let failed = newest.filter(|run| run.state == RunState::Failed);
        let run = failed.max_by_key(|run| run.finished_at)?;
        let task = run.tasks.iter().find(|it| it.state == TaskState::Failed)?;
        Some((RunRef { dag_id: run.dag_id.clone(), run_id: run.run_id.clone() }, task.task_id.clone()))
    }

    fn retry(&mut self, now: &Snapshot) -> Effect {
        match self.retry_target(now) {
            Some((run, task_id)) => Effect::Send(Command::Retry { dag_id: run.dag_id, run_id: Some(run.run_id), task_id, dry_run: true }, Purpose::Rehearse),
            None => self.refuse("no task of a newest run has failed; on the DAGs' screen c runs any task again", now),
        }
    }

    fn clear(&mut self, now: &Snapshot) -> Effect {
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
        let runs = |dag: &crate::dag::DagStats| dag.runs.first().is_some_and(|run| !run.state.is_final());
        let selected = self.task(now).map(|it| it.0).filter(|dag| self.zoomed && self.focus == Pane::Dags && runs(dag));
        selected.or_else(|| now.dag.dags.iter().find(|dag| runs(dag))).map(|dag| dag.dag_id.clone())
    }

    fn cancel(&mut self, now: &Snapshot) -> Effect {
        match self.cancel_target(now) {
            Some(dag_id) => Effect::Send(Command::Cancel { dag_id, dry_run: true }, Purpose::Rehearse),
            None => self.refuse("no run is in progress", now),
        }
    }

    fn restart(&mut self, now: &Snapshot) -> Effect {
        let stopped = |health: &Health| matches!(health, Health::Held { .. } | Health::Waiting { .. } | Health::Failed { .. });
        match now.stages.iter().find(|(_, stage)| stopped(&stage.health)) {
            Some((stage, _)) => Effect::Send(Command::Restart { stage: *stage }, Purpose::Do),
            None => self.refuse("no stage has stopped", now),
        }
    }

    fn set_loudness(&mut self, to: usize) -> Effect {
        self.loudness = to.min(LEVELS.len() - 1);
        Effect::LogLevel(self.level())
    }

    fn typed(&mut self, action: Action, now: &Snapshot) -> Effect {
        let palette = matches!(self.on_top, Some(OnTop::Palette { .. }));
        let Some(OnTop::Filter { text } | OnTop::Palette { text }) = &mut self.on_top else {
            self.on_top = None;
            return Effect::None;
        };
        match action {
            Action::Type(letter) => text.push(letter),
            Action::Erase => drop(text.pop()),
            Action::Complete if palette => *text = palette::complete(text, now),
            Action::Accept if palette => {
                let line = std::mem::take(text);
                self.on_top = None;
                return self.run_line(&line, now);
            }
            Action::Accept => self.on_top = None,
            Action::Dismiss => {
                self.on_top = None;
                return if palette { Effect::None } else { self.set_filter(String::new()) };
            }
            _ => {}
        }
        match &self.on_top {
            Some(OnTop::Filter { text }) => self.set_filter(text.clone()),
            _ => Effect::None,
        }
    }

    fn run_line(&mut self, line: &str, now: &Snapshot) -> Effect {
        match palette::parse(line, now) {
            Ok(Asked::Key(Action::Back)) => {
                self.zoomed = false;
                Effect::None
            }
            Ok(Asked::Key(action)) => self.update(action, now),
            Ok(Asked::Command(command)) => Effect::Send(command, Purpose::Do),
            Ok(Asked::Question(command @ Command::Shutdown)) => {
                self.ask(Question::Order { command, said: "the pipeline ends, for everybody who watches it".to_owned(), tasks: Vec::new() });
                Effect::None
            }
            Ok(Asked::Question(command)) => Effect::Send(command, Purpose::Rehearse),
            Err(why) => self.refuse(why, now),
        }
    }
}

fn moved(at: usize, action: Action, last: usize) -> usize {
    let to = match action {
        Action::Up => at.saturating_sub(1),
        Action::Down => at.saturating_add(1),
        Action::PageUp => at.saturating_sub(PAGE),
        Action::PageDown => at.saturating_add(PAGE),
        Action::First => 0,
        Action::Last => last,
        _ => at,
    };
    to.min(last)
}

/// The command whose rehearsal this was.
fn for_real(command: Command) -> Command {
    let dry_run = false;
    match command {
        Command::Trigger { dag_id, .. } => Command::Trigger { dag_id, dry_run },
        Command::Retry { dag_id, run_id, task_id, .. } => Command::Retry { dag_id, run_id, task_id, dry_run },
        Command::Clear { dag_id, run_id, task_id, .. } => Command::Clear { dag_id, run_id, task_id, dry_run },
        Command::Cancel { dag_id, .. } => Command::Cancel { dag_id, dry_run },
        other => other,
    }
}
