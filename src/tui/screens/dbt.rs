//! dbt's nodes: failed ones first in the overview; on the screen all of them in the order of their lineage.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    text::{Line, Span},
};

use crate::{
    dbt::{Kind, Status},
    refresh::NodeStats,
    tui::{
        keys::Pane,
        parts::{frame, number, row},
        rows,
        theme::{self, State},
    },
    units::grouped,
};

use super::Scene;

pub(super) fn pane(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Dbt, note(scene));
    let (width, height) = (usize::from(inside.width), usize::from(inside.height));
    let mut nodes = rows::nodes(scene.now, "");
    if nodes.is_empty() {
        return not_run(frame, inside, scene);
    }
    // Failed, running, warned, then the slowest. Ties keep the lineage.
    let slow = |it: &NodeStats| std::cmp::Reverse(it.seconds.map_or(0, milliseconds));
    nodes.sort_by_key(|it| (urgency(it), slow(it)));
    let mut lines = vec![counts(scene, width)];
    lines.extend(nodes.into_iter().take(height.saturating_sub(1)).map(|it| short_row(scene, it, width)));
    frame::lines(frame, inside, lines);
}

fn milliseconds(seconds: f64) -> u128 {
    std::time::Duration::try_from_secs_f64(seconds).unwrap_or_default().as_millis()
}

/// What is known before dbt's first run in this process: how the last one before it ended.
fn not_run(frame: &mut Frame, area: Rect, scene: Scene) {
    let next = "It follows the first load; t starts it now.";
    let Some(earlier) = &scene.now.refresh.earlier else {
        return super::teach(frame, area, scene, "Not read yet: the run history is being asked for dbt's last run.");
    };
    let Some(last) = &earlier.dbt else { return super::teach(frame, area, scene, &format!("No dbt run yet. {next}")) };
    let width = usize::from(area.width);
    let tests = last.tests;
    let bad = tests.fail + tests.error;
    let at = last.finished_at.map(|it| format!(" of {}", it.format("%F %H:%M:%S"))).unwrap_or_default();
    let parts = vec![
        if last.failed.is_empty() { Span::raw("0 fail") } else { scene.mark(State::Failed, &format!("{} fail", bad.max(last.failed.len() as u64))) },
        Span::raw(format!("{} pass", tests.pass)),
        Span::raw(format!("{} models", last.models)),
        Span::raw(format!("{} warn", tests.warn)),
        Span::raw(format!("{} skip", tests.skip)),
    ];
    let mut lines =
        vec![Line::from(vec![Span::raw(" "), scene.mark(State::Stale, &row::clip(&format!("last run{at}, before this start"), width.saturating_sub(4)))])];
    lines.push(super::stream::joined(scene, parts, width));
    lines.extend(last.failed.iter().map(|it| Line::from(scene.state(State::Failed, row::clip(&format!(" ✗ {it}"), width)))));
    lines.truncate(usize::from(area.height).saturating_sub(2).max(1));
    lines.extend(
        row::wrap(&format!("Not run yet since the start. {next}"), width.saturating_sub(2)).into_iter().map(|it| Line::from(scene.dim(format!(" {it}")))),
    );
    frame::lines(frame, area, lines);
}

fn urgency(node: &NodeStats) -> u8 {
    match node.status {
        Some(Status::Error | Status::Fail) => 0,
        Some(Status::Running) => 1,
        Some(Status::Warn) => 2,
        Some(Status::Skipped) => 3,
        Some(Status::Success | Status::Pass) => 4,
        None => 5,
    }
}

/// Which run is shown.
fn note(scene: Scene) -> Line<'static> {
    let run = &scene.now.refresh.dbt.run_id;
    let at = run.split('T').nth(1).and_then(|it| it.get(..8));
    at.map_or_else(Line::default, |at| Line::from(scene.dim(format!(" run of {at} "))))
}

/// `46 pass · 0 warn · 0 fail · 0 skip`.
fn counts(scene: Scene, width: usize) -> Line<'static> {
    let dbt = &scene.now.refresh.dbt;
    let tests = dbt.tests();
    // A model that broke counts as much as a test that did.
    let bad = dbt.nodes.iter().filter(|it| matches!(it.status, Some(Status::Fail | Status::Error))).count();
    let models = dbt.nodes.iter().filter(|it| matches!(it.kind, Kind::Model | Kind::Snapshot) && it.status == Some(Status::Success)).count();
    let all = dbt.nodes.iter().filter(|it| matches!(it.kind, Kind::Model | Kind::Snapshot)).count();
    let failed = if bad > 0 { scene.mark(State::Failed, &format!("{bad} fail")) } else { Span::raw("0 fail") };
    let warned = if tests.warn > 0 { scene.mark(State::Late, &format!("{} warn", tests.warn)) } else { Span::raw("0 warn") };
    let passed = Span::raw(format!("{} pass", tests.pass));
    let parts = vec![failed, passed, warned, Span::raw(format!("{} skip", tests.skip)), Span::raw(format!("{models}/{all} models"))];
    super::stream::joined(scene, parts, width)
}

fn short_row<'a>(scene: Scene<'a>, node: &'a NodeStats, width: usize) -> Line<'a> {
    let (state, word) = theme::of_node(node.status);
    let left = vec![Span::raw(" "), scene.state(state, state.glyph()), Span::raw(format!(" {}", node.name))];
    let outcome = match node.failures {
        Some(failures) if failures > 0 => scene.state(state, format!("{} rows ", grouped(failures))),
        _ if matches!(state, State::Ok) => Span::raw(""),
        _ => scene.state(state, format!("{word} ")),
    };
    let took = node.seconds.map(number::seconds).unwrap_or_default();
    row::ends(left, vec![outcome, Span::raw(format!("{took:>8} "))], width)
}

pub(super) fn screen(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Dbt, note(scene));
    let (width, height) = (usize::from(inside.width), usize::from(inside.height));
    let nodes = rows::nodes(scene.now, scene.filter(Pane::Dbt));
    if nodes.is_empty() {
        if scene.filter(Pane::Dbt).is_empty() {
            return not_run(frame, inside, scene);
        }
        return super::teach(frame, inside, scene, "No node holds this text. Esc shows all.");
    }
    let selected = scene.app.selected(Pane::Dbt).min(nodes.len() - 1);
    let message = nodes[selected].message.as_deref().filter(|_| nodes[selected].status.is_some_and(|it| !it.is_good()));
    let said: Vec<String> = message.map(|it| row::wrap(it, width.saturating_sub(2))).unwrap_or_default().into_iter().take(height / 4).collect();
    let [head, list, foot] =
        Layout::vertical([Constraint::Length(2), Constraint::Min(1), Constraint::Length(u16::try_from(said.len()).unwrap_or_default())]).areas(inside);
    let titles = row::ends(" node", Line::from(format!("{:<9}{:<10}{:>10}{:>9} ", "kind", "state", "rows", "time")), width);
    frame::lines(frame, head, vec![counts(scene, width), row::styled(titles, scene.theme.dim())]);
    let lines = super::window(selected, nodes.len(), list.height.into()).map(|place| {
        let line = full_row(scene, nodes[place], width);
        if place == selected { row::styled(line, scene.theme.selected()) } else { line }
    });
    frame::lines(frame, list, lines.collect());
    frame::lines(frame, foot, said.into_iter().map(|it| Line::from(scene.state(State::Failed, format!(" {it}")))).collect());
}

fn full_row<'a>(scene: Scene<'a>, node: &'a NodeStats, width: usize) -> Line<'a> {
    let (state, word) = theme::of_node(node.status);
    let left = vec![Span::raw(" "), scene.state(state, state.glyph()), Span::raw(format!(" {}", node.name))];
    let counted = node.failures.filter(|it| *it > 0).or(node.rows).map_or_else(|| format!("{:>10}", ""), |it| number::count(it, 10));
    let took = node.seconds.map(number::seconds).unwrap_or_default();
    let right = vec![Span::raw(format!("{:<9}", kind(node.kind))), scene.state(state, format!("{word:<10}")), Span::raw(format!("{counted}{took:>9} "))];
    row::ends(left, right, width)
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Model => "model",
        Kind::Snapshot => "snapshot",
        Kind::Test => "test",
        Kind::Operation => "hook",
        Kind::Other => "other",
    }
}

/// What a node says: message and failing rows. Its SQL is read.
pub(super) fn details(scene: Scene, unique_id: &str) -> (String, Vec<String>) {
    let Some(node) = scene.now.refresh.dbt.nodes.iter().find(|it| it.unique_id == unique_id) else {
        return (unique_id.to_owned(), vec!["It is not part of the current run.".to_owned()]);
    };
    let (_, word) = theme::of_node(node.status);
    let took = node.seconds.map(|it| format!(", {}", number::seconds(it))).unwrap_or_default();
    let mut lines = vec![node.unique_id.clone(), format!("{} · {word}{took}", kind(node.kind))];
    if let Some(count) = node.rows {
        lines.push(format!("{} rows", grouped(count)));
    }
    if let Some(message) = &node.message {
        lines.push(String::new());
        lines.extend(message.lines().map(str::to_owned));
    }
    if let Some(failing) = &node.failing {
        let found = node.failures.unwrap_or(failing.rows.len() as u64);
        lines.extend([String::new(), format!("{} failing rows, the first {}:", grouped(found), failing.rows.len())]);
        lines.extend(table(&failing.columns, &failing.rows));
    }
    if let Some(path) = &node.compiled {
        lines.extend([String::new(), format!("The SQL as it ran, {path}:")]);
    }
    (node.name.clone(), lines)
}

/// Rows under their columns, each as wide as its widest value.
fn table(columns: &[String], rows: &[Vec<Option<String>>]) -> Vec<String> {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "null".to_owned());
    let wide = |place: usize| rows.iter().filter_map(|it| it.get(place)).map(|it| row::width_of(&text(it))).chain([row::width_of(&columns[place])]).max();
    let widths: Vec<usize> = (0..columns.len()).map(|it| wide(it).unwrap_or_default()).collect();
    let line = |cells: Vec<String>| cells.iter().zip(&widths).map(|(cell, width)| row::fit(cell, *width)).collect::<Vec<_>>().join("  ");
    let head = line(columns.to_vec());
    std::iter::once(head).chain(rows.iter().map(|it| line(it.iter().map(text).collect()))).collect()
}
