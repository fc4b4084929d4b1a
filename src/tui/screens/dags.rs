//! Runs × tasks: the newest run at the right, each cell a state; on its own screen the chosen run with its times and errors.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    text::{Line, Span},
};

use crate::{
    dag::{DagStats, RunRef, RunStats, TaskState, TaskStats},
    pipeline::command::StageName,
    refresh,
    stage::Phase,
    tui::{
        keys::Pane,
        parts::{frame, number, row},
        rows,
        theme::{self, State},
    },
};

use super::Scene;

/// From here on the grid and the chosen run stand side by side.
const SIDE_BY_SIDE: u16 = 110;

const SECONDS: usize = 9;

pub(super) fn pane(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Dags, super::stage_note(scene, StageName::Scheduler));
    let (width, height) = (usize::from(inside.width), usize::from(inside.height));
    if let Some(lines) = instead(scene) {
        return frame::lines(frame, inside, lines);
    }
    let dags = &scene.now.dag.dags;
    let room = height.saturating_sub(dags.len());
    let shares = shares(dags, room);
    let mut lines = Vec::new();
    for (dag, share) in dags.iter().zip(shares) {
        lines.push(head(scene, dag, width));
        if dag.runs.is_empty() {
            lines.push(Line::from(scene.dim(no_run(scene, dag))));
            continue;
        }
        let grid = Grid::new(width, dags);
        lines.extend(most_urgent(dag, share).into_iter().map(|task| grid.row(scene, dag, task, None)));
    }
    frame::lines(frame, inside, lines);
    super::age(frame, inside, scene, StageName::Scheduler);
}

/// What is said where there is no DAG to draw, or none may start.
fn instead(scene: Scene) -> Option<Vec<Line>> {
    let stats = &scene.now.dag;
    match (&stats.away, stats.dags.is_empty()) {
        (Some(why), true) => Some(vec![Line::from(vec![Span::raw(" "), scene.mark(State::Late, &format!("the state database is away: {why}"))])]),
        (None, true) => Some(vec![Line::from(scene.dim(" No DAG yet. They come with the scheduler's database."))]),
        _ => None,
    }
}

/// Lines for each DAG's tasks: all where there is room, else in proportion.
fn shares(dags: &[DagStats], room: usize) -> Vec<usize> {
    let wanted: usize = dags.iter().map(|it| it.tasks.len()).sum();
    if wanted <= room {
        return dags.iter().map(|it| it.tasks.len()).collect();
    }
    let mut left = room;
    let last = dags.len().saturating_sub(1);
    let share = |(place, dag): (usize, &DagStats)| {
        let part = if place == last { left } else { (room * dag.tasks.len()).div_euclid(wanted.max(1)).clamp(usize::from(room > 1), left) };
        left -= part;
        part
    };
    dags.iter().enumerate().map(share).collect()
}

/// The tasks worth their line, in the order of the plan: what failed or runs first, then the last ones, which say most.
fn most_urgent(dag: &DagStats, room: usize) -> Vec<&str> {
    let newest = dag.runs.first();
    let urgency = |task_id: &str| match newest.and_then(|run| run.tasks.iter().find(|it| it.task_id == task_id)).map(|it| it.state) {
        Some(TaskState::Failed) => 0,
        Some(TaskState::UpForRetry) => 1,
        Some(TaskState::Running) => 2,
        Some(TaskState::Queued | TaskState::Scheduled) => 3,
        Some(TaskState::UpstreamFailed) => 4,
        _ => 5,
    };
    let mut tasks: Vec<(usize, &str)> = dag.tasks.iter().map(|it| it.0.as_str()).enumerate().collect();
    tasks.sort_by_key(|(_, task)| urgency(task));
    tasks.truncate(room);
    tasks.sort_by_key(|(place, _)| *place);
    tasks.into_iter().map(|(_, task)| task).collect()
}

fn head<'a>(scene: Scene<'a>, dag: &'a DagStats, width: usize) -> Line<'a> {
    let state = dag.runs.first().map_or(State::Idle, |run| theme::of_run(run));
    let left = Line::from(vec![Span::raw(" "), scene.state(state, state.glyph()), Span::raw(" "), scene.strong(dag.dag_id.as_str())]);
    let when = when(scene, dag);
    // The name matters more than a long schedule.
    let short = when.rsplit(", ").next().unwrap_or_default().to_owned();
    let room = width.saturating_sub(left.width() + 2);
    let right = [when, short].into_iter().find(|it| row::width_of(it) <= room).unwrap_or_default();
    row::ends(left, Line::from(scene.dim(format!("{right} "))), width)
}

/// `every 30s, in 12 s`.
fn when(scene: Scene, dag: &DagStats) -> String {
    if dag.held_elsewhere {
        return "run by another process".to_owned();
    }
    if dag.paused || scene.now.dag.phase == Phase::Paused {
        return "schedule paused".to_owned();
    }
    let until = dag.next_start.map(|at| (at - scene.now.at).num_seconds());
    let due = match until {
        None => None,
        Some(..=0) => Some("due now".to_owned()),
        Some(seconds) => Some(format!("in {}", number::age(seconds * 1000).replace(".0 s", " s"))),
    };
    match (dag.schedule.as_str(), due) {
        ("never", _) if dag.dag_id == refresh::TRANSFORMATION => "after loading".to_owned(),
        ("never", _) => "when triggered".to_owned(),
        (schedule, None) => schedule_words(schedule),
        (schedule, Some(due)) => format!("{}, {due}", schedule_words(schedule)),
    }
}

fn schedule_words(schedule: &str) -> String {
    if schedule.contains(' ') { schedule.to_owned() } else { format!("every {schedule}") }
}

/// Teaches what happens next.
fn no_run(scene: Scene, dag: &DagStats) -> String {
    let until = dag.next_start.map(|at| (at - scene.now.at).num_seconds().max(0));
    match until {
        Some(seconds) => format!("   No run yet. The first starts in {seconds} s, t starts it now."),
        None => "   No run yet. It starts after loading.".to_owned(),
    }
}

/// Widths of the grid.
struct Grid {
    width: usize,
    name: usize,
    runs: usize,
}

impl Grid {
    fn new(width: usize, dags: &[DagStats]) -> Self {
        let longest = dags.iter().flat_map(|it| &it.tasks).map(|it| it.0.len()).max().unwrap_or_default();
        let name = longest.min(width.saturating_sub(SECONDS + 12));
        Self { width, name, runs: width.saturating_sub(name + SECONDS + 6).min(crate::dag::RUNS_SHOWN) }
    }

    /// One task through the newest runs; `chosen` is the run whose cell is marked.
    fn row<'a>(&self, scene: Scene<'a>, dag: &'a DagStats, task_id: &'a str, chosen: Option<usize>) -> Line<'a> {
        let mut spans = vec![Span::raw(format!("   {} ", row::fit(task_id, self.name)))];
        for place in (0..self.runs).rev() {
            let task = dag.runs.get(place).and_then(|run| Some((run, task_of(run, task_id)?)));
            let (state, cell) = task.map_or((State::Idle, " "), |(run, it)| theme::of_task_in(run, it));
            let style = scene.theme.state(state);
            spans.push(Span::styled(cell, if chosen == Some(place) { style.patch(scene.theme.selected()) } else { style }));
        }
        let newest = dag.runs.get(chosen.unwrap_or_default()).and_then(|run| task_of(run, task_id));
        let took = newest.and_then(|it| it.seconds).map(number::seconds).unwrap_or_default();
        row::ends(spans, format!("{took:>SECONDS$} "), self.width)
    }
}

fn task_of<'a>(run: &'a RunStats, task_id: &str) -> Option<&'a TaskStats> {
    run.tasks.iter().find(|it| it.task_id == task_id)
}

pub(super) fn screen(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Dags, super::stage_note(scene, StageName::Scheduler));
    if let Some(lines) = instead(scene) {
        return frame::lines(frame, inside, lines);
    }
    if scene.app.over_time {
        draw_run(frame, inside, scene);
        return super::age(frame, inside, scene, StageName::Scheduler);
    }
    let (grid, run) = if inside.width >= SIDE_BY_SIDE {
        let [grid, run] = Layout::horizontal([Constraint::Length(54), Constraint::Fill(1)]).areas(inside);
        (grid, run)
    } else {
        let rows = u16::try_from(scene.now.dag.dags.iter().map(|it| it.tasks.len() + 1).sum::<usize>()).unwrap_or(u16::MAX);
        let [grid, run] = Layout::vertical([Constraint::Max(rows), Constraint::Min(4)]).areas(inside);
        (grid, run)
    };
    draw_grid(frame, grid, scene);
    draw_run(frame, run, scene);
    super::age(frame, inside, scene, StageName::Scheduler);
}

fn draw_grid(frame: &mut Frame, area: Rect, scene: Scene) {
    let tasks = rows::tasks(scene.now, scene.filter(Pane::Dags));
    let width = usize::from(area.width);
    let selected = scene.app.selected(Pane::Dags).min(tasks.len().saturating_sub(1));
    let (mut lines, mut selected_line) = (Vec::new(), 0);
    let mut above = "";
    for (place, (dag, task_id)) in tasks.iter().enumerate() {
        if above != dag.dag_id {
            above = &dag.dag_id;
            lines.push(head(scene, dag, width));
        }
        let chosen = (place == selected || scene.app.task(scene.now).is_some_and(|it| it.0.dag_id == dag.dag_id)).then(|| scene.app.run_of(dag));
        let mut line = Grid::new(width, &scene.now.dag.dags).row(scene, dag, task_id, chosen);
        if place == selected {
            selected_line = lines.len();
            line.spans[0] = std::mem::take(&mut line.spans[0]).style(scene.theme.selected());
        }
        lines.push(line);
    }
    if tasks.is_empty() {
        lines.push(Line::from(scene.dim(" No task holds this text. Esc shows all.")));
    }
    let shown = super::window(selected_line, lines.len(), area.height.into());
    frame::lines(frame, area, lines.drain(shown).collect());
}

/// The chosen run: its tasks on a common time line, then what the selected one says.
fn draw_run(frame: &mut Frame, area: Rect, scene: Scene) {
    let Some((dag, task_id)) = scene.app.task(scene.now) else { return };
    let width = usize::from(area.width);
    let Some(run) = dag.runs.get(scene.app.run_of(dag)) else {
        return frame::lines(frame, area, vec![Line::from(scene.dim(no_run(scene, dag)))]);
    };
    let state = theme::of_run(run);
    let word = if run.cancelled { "cancelled by an operator" } else { run.state.as_str() };
    let took = run.seconds.map(|it| format!(" · {}", number::seconds(it))).unwrap_or_default();
    let mut lines = vec![Line::from(vec![
        Span::raw(" "),
        scene.mark(state, word),
        Span::raw(row::clip(&format!("{took} · {}", run.run_id), width.saturating_sub(word.len() + 5))),
    ])];
    let about = task_of(run, task_id).map(|task| about(scene, run, task, width)).unwrap_or_default();
    let gantt = gantt(scene, run, task_id, width);
    if lines.len() + gantt.len() + about.len() <= area.height.into() {
        lines.extend(gantt);
        lines.push(Line::default());
    }
    lines.extend(about);
    frame::lines(frame, area, lines);
}

/// Each task as a bar from its start to its end.
fn gantt<'a>(scene: Scene, run: &'a RunStats, selected: &str, width: usize) -> Vec<Line<'a>> {
    let Some(start) = run.started_at else { return Vec::new() };
    let end = run.finished_at.unwrap_or(scene.now.at);
    let whole = (end - start).num_milliseconds().max(1);
    let name = run.tasks.iter().map(|it| it.task_id.len()).max().unwrap_or_default();
    let room = i64::try_from(width.saturating_sub(name + SECONDS + 5)).unwrap_or_default();
    let cell = |at: chrono::DateTime<chrono::Utc>| usize::try_from(((at - start).num_milliseconds().clamp(0, whole) * room) / whole).unwrap_or_default();
    let bar = |task: &'a TaskStats| {
        let (state, _) = theme::of_task_in(run, task);
        let (from, to) = match task.started_at {
            Some(began) => (cell(began), cell(task.finished_at.unwrap_or(end))),
            None => (0, 0),
        };
        let length = if task.started_at.is_some() { to.saturating_sub(from).max(1) } else { 0 };
        let took = task.seconds.map(number::seconds).unwrap_or_default();
        let line = Line::from(vec![
            Span::raw(format!(" {} {took:>SECONDS$}  {}", row::fit(&task.task_id, name), " ".repeat(from))),
            scene.state(state, "━".repeat(length)),
        ]);
        if task.task_id == selected { row::styled(line, scene.theme.strong()) } else { line }
    };
    run.tasks.iter().map(bar).collect()
}

fn about<'a>(scene: Scene, run: &RunStats, task: &'a TaskStats, width: usize) -> Vec<Line<'a>> {
    let (state, _) = theme::of_task_in(run, task);
    let word = if run.cut_short(task) { "cancelled" } else { task.state.as_str() };
    let took = task.seconds.map(|it| format!(", {}", number::seconds(it))).unwrap_or_default();
    let tries = match task.tries {
        0 => "not tried yet".to_owned(),
        1 => "1 try".to_owned(),
        tries => format!("{tries} tries"),
    };
    let mut lines = vec![Line::from(vec![
        Span::raw(" "),
        scene.strong(task.task_id.as_str()),
        Span::raw("  "),
        scene.mark(state, word),
        Span::raw(format!("  {tries}{took}")),
    ])];
    if let Some(at) = task.retry_at.filter(|_| task.state == TaskState::UpForRetry) {
        let seconds = (at - scene.now.at).num_seconds().max(0);
        lines.push(Line::from(scene.state(State::Late, format!(" next try in {seconds} s"))));
    }
    if let Some(error) = &task.error {
        lines.extend(row::wrap(error, width.saturating_sub(2)).into_iter().map(|it| Line::from(scene.state(state, format!(" {it}")))));
    }
    lines
}

/// What the snapshot knows about a cell; what the task said is read.
pub(super) fn details(scene: Scene, run: &RunRef, task_id: &str) -> (String, Vec<String>) {
    let Some((dag, found)) = scene.now.dag.dag(&run.dag_id).zip(scene.now.dag.run(run)) else {
        return (task_id.to_owned(), vec![format!("{} of {} is older than what is shown", run.run_id, run.dag_id)]);
    };
    let at = |it: Option<chrono::DateTime<chrono::Utc>>| it.map_or_else(|| "–".to_owned(), number::clock);
    let waits_for = dag.tasks.iter().find(|it| it.0 == task_id).map(|it| it.1.join(", ")).filter(|it| !it.is_empty());
    let mut lines = vec![
        format!("dag      {}", dag.dag_id),
        format!("run      {} ({}, {})", found.run_id, found.run_type.as_str(), if found.cancelled { "cancelled" } else { found.state.as_str() }),
        format!("after    {}", waits_for.unwrap_or_else(|| "nothing: it is the first".to_owned())),
    ];
    if let Some(task) = task_of(found, task_id) {
        let took = task.seconds.map(|it| format!(", took {}", number::seconds(it))).unwrap_or_default();
        let state = if found.cut_short(task) { "cancelled by an operator" } else { task.state.as_str() };
        lines.push(format!("state    {state}, tries {}", task.tries));
        lines.push(format!("started  {}, finished {}{took}", at(task.started_at), at(task.finished_at)));
        if let Some(due) = task.retry_at.filter(|_| task.state == TaskState::UpForRetry) {
            lines.push(format!("again    in {} s", (due - scene.now.at).num_seconds().max(0)));
        }
        if let Some(error) = &task.error {
            lines.push(if found.cut_short(task) { error.clone() } else { format!("✗ {error}") });
        }
    }
    (task_id.to_owned(), lines)
}
