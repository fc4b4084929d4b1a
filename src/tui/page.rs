//! What is read on demand and lies on top of the screen: asked for, being read, read, and read again while it moves.

use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::{
    dag::RunRef,
    pipeline::{
        command::{Command, Look, Reply},
        snapshot::Snapshot,
    },
};

use super::{
    app::{App, Effect, Message, OnTop, Purpose},
    keys::Pane,
    rows,
};

/// What moves is read again after this.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Scrolled to the end, wherever that will be.
const END: usize = usize::MAX;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) look: Look,
    pub(super) scroll: usize,
    /// What was found; None while the first answer is on its way.
    pub(super) found: Option<Found>,
    /// When it was last asked for.
    pub(super) asked_at: DateTime<Utc>,
    /// A question is on its way.
    waits: bool,
    /// What is looked at stood still when the last question was asked.
    settled: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) ok: bool,
    pub(super) said: String,
    pub(super) lines: Vec<String>,
}

impl Page {
    pub(super) fn asking(look: Look, now: &Snapshot) -> Self {
        Self { look, scroll: 0, found: None, asked_at: now.at, waits: false, settled: false }
    }

    /// All there is to know is known already.
    fn known(look: Look, now: &Snapshot) -> Self {
        let nothing = Found { ok: true, said: String::new(), lines: Vec::new() };
        Self { found: Some(nothing), settled: true, ..Self::asking(look, now) }
    }

    /// Whoever stands at the end of what grows stays at the end.
    pub(super) fn scroll_to(&mut self, line: usize, end: usize) {
        self.scroll = if self.look.moves() && line >= end { END } else { line };
    }
}

impl App {
    /// Puts a page on top; its question goes out with the next frame.
    pub(super) fn open(&mut self, mut page: Page) -> Effect {
        if page.look.moves() {
            page.scroll = END;
        }
        let effect = if page.settled { Effect::None } else { ask(&mut page) };
        self.on_top = Some(OnTop::Details(page));
        effect
    }

    /// The page of what is selected on this screen.
    pub(super) fn page_here(&self, now: &Snapshot) -> Option<Page> {
        match self.focus {
            Pane::Stream => {
                let topics = rows::topics(now, self.filter(Pane::Stream));
                let (table, _) = topics.get(self.selected(Pane::Stream).min(topics.len().checked_sub(1)?))?;
                Some(Page::asking(Look::Messages { table: (*table).to_owned(), revealed: false }, now))
            }
            Pane::Lake => {
                let objects = rows::objects(now, self.filter(Pane::Lake));
                let object = objects.get(self.object_of(&objects))?;
                Some(Page::asking(Look::CommitRecord { data: object.key.clone() }, now))
            }
            Pane::Dags => {
                let (dag, task_id) = self.task(now)?;
                let run_id = dag.runs.get(self.run_of(dag))?.run_id.clone();
                Some(Page::asking(Look::TaskLog { dag_id: dag.dag_id.clone(), run_id, task_id: task_id.to_owned() }, now))
            }
            Pane::Dbt => {
                let nodes = rows::nodes(now, self.filter(Pane::Dbt));
                let node = nodes.get(self.selected(Pane::Dbt).min(nodes.len().checked_sub(1)?))?;
                let look = Look::Sql { unique_id: node.unique_id.clone() };
                Some(if node.compiled.is_some() { Page::asking(look, now) } else { Page::known(look, now) })
            }
            // In the process of the pipeline the pane itself has its log.
            Pane::Log => (!self.owned).then(|| Page::asking(Look::Log, now)),
            Pane::Kpis => None,
        }
    }

    /// Masked or not: the messages are read again the other way.
    pub(super) fn reveal(&mut self, now: &Snapshot) -> Effect {
        match &self.on_top {
            Some(OnTop::Details(Page { look: Look::Messages { table, revealed }, .. })) => {
                let look = Look::Messages { table: table.clone(), revealed: !revealed };
                self.open(Page::asking(look, now))
            }
            _ => Effect::None,
        }
    }

    /// What the page on top has to ask by itself: a log that grows.
    pub(super) fn follow(&mut self, now: &Snapshot) -> Effect {
        let Some(OnTop::Details(page)) = &mut self.on_top else { return Effect::None };
        let asked_long_ago = (now.at - page.asked_at).to_std().is_ok_and(|it| it >= AGAIN_AFTER);
        if page.waits || page.settled || !page.look.moves() || !asked_long_ago {
            return Effect::None;
        }
        page.asked_at = now.at;
        // Once more after the end: the last lines come with it.
        page.settled = is_over(&page.look, now);
        ask(page)
    }

    pub(super) fn read(&mut self, look: &Look, reply: Reply, now: &Snapshot) {
        if *look == Look::Proof {
            self.proof = Some(Message { ok: reply.ok, text: reply.text.clone(), at: now.at });
        }
        match &mut self.on_top {
            Some(OnTop::Details(page)) if page.look == *look => {
                page.waits = false;
                page.found = Some(Found { ok: reply.ok, said: reply.text, lines: reply.page });
            }
            // Whoever closed the page still wants to know what became of the proof.
            _ if *look == Look::Proof => self.say(reply.ok, reply.text, now),
            _ => {}
        }
    }
}

fn ask(page: &mut Page) -> Effect {
    page.waits = true;
    Effect::Send(Command::Look { at: page.look.clone() }, Purpose::Read)
}

fn is_over(look: &Look, now: &Snapshot) -> bool {
    match look {
        Look::TaskLog { dag_id, run_id, .. } => {
            let run = now.dag.run(&RunRef { dag_id: dag_id.clone(), run_id: run_id.clone() });
            run.is_none_or(|it| it.state.is_final())
        }
        Look::Log => false,
        _ => true,
    }
}
