//! What the console remembers: where one looks, what is selected, typed and asked. Action in, effect out; nothing here
//! waits, and nothing here pretends: what the pipeline does is only ever read from a snapshot.

use std::{cell::Cell, collections::VecDeque, num::NonZeroU32, time::Duration};

use chrono::{DateTime, Utc};
use tui_logger::TuiWidgetEvent;

use crate::{
    bank::Rate,
    dag::{DagStats, RunRef, TaskState},
    pipeline::{
        command::{Command, Look, Reply},
        snapshot::Snapshot,
    },
    refresh::KpiStats,
};

use super::{
    Left,
    keys::{Action, Pane, Place},
    logs::Logs,
    orders::for_real,
    page::Page,
    palette::{self, Asked},
    pulse::Pulse,
    rows,
};

/// How long an answer stays in the footer.
const MESSAGE_SECONDS: i64 = 6;

/// A rate that was asked for and that no snapshot shows after this is not on its way any more.
const WISH_SECONDS_MAX: i64 = 5;

/// Refreshes of the KPIs that are remembered for the lines beside the numbers.
const TREND_KEPT: usize = 120;

/// Rows that PgUp and PgDn move.
const PAGE: usize = 10;

/// What must happen outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    Send(Command, Purpose),
    Log(TuiWidgetEvent),
    /// Write what the log shows into a file.
    SaveLog,
    Suspend,
    Redraw,
    /// Rooms are to speak louder, or not any more.
    Hear,
    Leave(Left),
}

/// What the answer to a command is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To be done; the answer is shown.
    Do,
    /// Only to learn what it would touch; then the operator is asked.
    Rehearse,
    /// To be read: the answer goes on the page that asked.
    Read,
}

/// What lies on top of the screen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum OnTop {
    Help {
        scroll: usize,
    },
    Details(Page),
    /// The letters: what waits and why, what left.
    Outbox {
        scroll: usize,
    },
    Question(Question),
    Filter {
        text: String,
    },
    Palette {
        text: String,
    },
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
    /// How far what lies on top can be scrolled, as it was drawn last.
    pub(super) sheet_end: Cell<usize>,
    pub(super) logs: Logs,
    /// The DAGs' screen shows the chosen run over time, not the grid.
    pub(super) over_time: bool,
    pub(super) pulse: Pulse,
    /// What the last walk through the whole lake came to.
    pub(super) proof: Option<Message>,
    /// The KPIs of earlier refreshes, oldest first.
    pub(super) trend: VecDeque<KpiStats>,
    selected: [usize; 6],
    filters: [String; 6],
    /// The run chosen in the grid; None is the newest, whichever that is.
    run: Option<RunRef>,
    /// The object chosen in the lake by its key; None is the newest.
    object: Option<String>,
    pub(super) rate_asked: Option<(NonZeroU32, DateTime<Utc>)>,
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
            sheet_end: Cell::new(0),
            logs: Logs::default(),
            over_time: false,
            pulse: Pulse::default(),
            proof: None,
            trend: VecDeque::new(),
            selected: [0; 6],
            filters: Default::default(),
            run: None,
            object: None,
            rate_asked: None,
        }
    }

    pub(super) fn place(&self) -> Place {
        match &self.on_top {
            Some(OnTop::Help { .. } | OnTop::Details(_) | OnTop::Outbox { .. }) => Place::Sheet,
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

    /// The place of the chosen object among the newest; one that has fallen out of them is the last.
    pub(super) fn object_of(&self, objects: &[&crate::lake::NewObject]) -> usize {
        let chosen = self.object.as_ref().map(|key| objects.iter().position(|it| it.key == *key));
        chosen.map_or(0, |it| it.unwrap_or(objects.len().saturating_sub(1)))
    }

    /// The place of the chosen run among those of a DAG, newest first.
    pub(super) fn run_of(&self, dag: &DagStats) -> usize {
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
        let shown = |rate| now.wish.rate == Rate::PerSecond(rate);
        if self.rate_asked.is_some_and(|(rate, at)| shown(rate) || (now.at - at).num_seconds() > WISH_SECONDS_MAX) {
            self.rate_asked = None;
        }
        if self.message.as_ref().is_some_and(|it| (now.at - it.at).num_seconds() >= MESSAGE_SECONDS) {
            self.message = None;
        }
    }

    pub(super) fn update(&mut self, action: Action, now: &Snapshot) -> Effect {
        self.message = None;
        match action {
            Action::Quit => self.ask(Question::Quit),
            Action::Interrupt if self.on_top == Some(OnTop::Question(Question::Quit)) => return Effect::Leave(Left::Interrupted),
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
            Action::Enter => return self.enter(now),
            Action::Verify => return self.open(Page::asking(Look::Proof, now)),
            Action::Reveal => return self.reveal(now),
            Action::Mails => self.on_top = Some(OnTop::Outbox { scroll: 0 }),
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
            Action::Louder | Action::Quieter => return self.tune(action == Action::Louder),
            Action::Freeze => self.logs.freeze(),
            Action::Gantt => self.over_time = !self.over_time,
            Action::SaveLog => return Effect::SaveLog,
            Action::Yes => return self.yes(),
            Action::No => self.on_top = None,
            Action::Insist => return self.refuse("a question is open: y says yes, n or Esc says no", now),
            Action::Type(_) | Action::Erase | Action::Complete | Action::Accept | Action::Dismiss => return self.typed(action, now),
        }
        Effect::None
    }

    /// The level of the chosen room. What is not spoken cannot be shown, so the room itself is told where it changes.
    fn tune(&mut self, louder: bool) -> Effect {
        let before = self.logs.at_debug();
        if louder {
            self.logs.louder()
        } else {
            self.logs.quieter()
        };
        if self.logs.at_debug() == before { Effect::None } else { Effect::Hear }
    }

    /// An answer of the pipeline. What a rehearsal told becomes a question.
    pub(super) fn hear(&mut self, asked: Command, purpose: Purpose, reply: Reply, now: &Snapshot) {
        if let Command::Look { at } = asked {
            self.read(&at, reply, now);
            return;
        }
        if matches!(asked, Command::Rate { .. }) && !reply.ok {
            self.rate_asked = None;
        }
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

    pub(super) fn refuse(&mut self, text: impl Into<String>, now: &Snapshot) -> Effect {
        self.say(false, text, now);
        Effect::None
    }

    fn ask(&mut self, question: Question) {
        self.on_top = Some(OnTop::Question(question));
    }

    fn yes(&mut self) -> Effect {
        match self.on_top.take() {
            Some(OnTop::Question(Question::Quit)) => Effect::Leave(Left::Quit),
            Some(OnTop::Question(Question::Order { command, .. })) => Effect::Send(command, Purpose::Do),
            _ => Effect::None,
        }
    }

    fn enter(&mut self, now: &Snapshot) -> Effect {
        if !self.zoomed {
            self.go_in(now);
            return Effect::None;
        }
        match self.page_here(now) {
            Some(page) => self.open(page),
            None => self.refuse("nothing is selected here that has more to tell", now),
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
                let newest = |it: &DagStats, task: &str| {
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
        self.object = None;
        // A scrolled log holds on to a line that the new filter may hide.
        if self.focus == Pane::Log { Effect::Log(TuiWidgetEvent::EscapeKey) } else { Effect::None }
    }

    fn walk(&mut self, action: Action, now: &Snapshot) -> Effect {
        let end = self.sheet_end.get();
        match &mut self.on_top {
            Some(OnTop::Help { scroll } | OnTop::Outbox { scroll }) => {
                *scroll = moved((*scroll).min(end), action, end);
                return Effect::None;
            }
            Some(OnTop::Details(page)) => {
                page.scroll_to(moved(page.scroll.min(end), action, end), end);
                return Effect::None;
            }
            _ => {}
        }
        if !self.zoomed {
            self.walk_panes(action);
            return Effect::None;
        }
        match (self.focus, action) {
            (Pane::Log, Action::Up | Action::PageUp | Action::First) => return Effect::Log(TuiWidgetEvent::PrevPageKey),
            (Pane::Log, Action::Down | Action::PageDown) => return Effect::Log(TuiWidgetEvent::NextPageKey),
            (Pane::Log, Action::Last) => return Effect::Log(TuiWidgetEvent::EscapeKey),
            (Pane::Log, Action::Left | Action::Right) => self.logs.step(action == Action::Right),
            (Pane::Dags, Action::Left | Action::Right) => self.walk_runs(action == Action::Left, now),
            (Pane::Lake, _) => {
                let objects = rows::objects(now, self.filter(Pane::Lake));
                let to = moved(self.object_of(&objects), action, objects.len().saturating_sub(1));
                // The newest is not held, as with runs.
                self.object = objects.get(to).filter(|_| to > 0).map(|it| it.key.clone());
            }
            // Nothing is selected there: what is walked through is what was drawn.
            (Pane::Kpis, _) => {
                let place = &mut self.selected[Pane::Kpis.place()];
                *place = moved((*place).min(end), action, end);
            }
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
    pub(super) fn task<'a>(&self, now: &'a Snapshot) -> Option<(&'a DagStats, &'a str)> {
        let tasks = rows::tasks(now, self.filter(Pane::Dags));
        tasks.get(self.selected(Pane::Dags).min(tasks.len().saturating_sub(1))).copied()
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
            Ok(Asked::Look(look)) => self.open(Page::asking(look, now)),
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
