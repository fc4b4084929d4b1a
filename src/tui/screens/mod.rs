//! What is drawn: two lines that answer the three questions of a night, the panes or one screen, and the keys that work.

mod dags;
mod dbt;
mod footer;
mod header;
mod kpis;
mod lake;
mod log;
mod sheets;
mod stream;

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::Style,
    text::{Line, Span},
};
use tui_logger::TuiWidgetState;

use crate::pipeline::{command::StageName, snapshot::Snapshot};

pub(super) use log::LogView;

use super::{
    app::App,
    keys::Pane,
    parts::{frame, row},
    theme::{self, State, Theme},
};

/// Below this only the verdict is shown.
const SMALLEST: (u16, u16) = (60, 15);

/// From here on the verdict has two lines.
const ROOMY: u16 = 24;

/// From here on two panes have room side by side; below it a number would be cut.
const TWO_COLUMNS: (u16, u16) = (80, 21);

/// From here on three.
const THREE_COLUMNS: (u16, u16) = (180, 30);

/// Everything a frame is drawn from.
#[derive(Clone, Copy)]
pub(super) struct Scene<'a> {
    pub(super) now: &'a Snapshot,
    pub(super) app: &'a App,
    pub(super) theme: Theme,
    pub(super) log: &'a TuiWidgetState,
}

impl<'a> Scene<'a> {
    fn filter(self, pane: Pane) -> &'a str {
        // A filter is of the screen; the overview always shows everything.
        if self.app.zoomed { self.app.filter(pane) } else { "" }
    }

    fn dim<'b>(self, text: impl Into<std::borrow::Cow<'b, str>>) -> Span<'b> {
        Span::styled(text, self.theme.dim())
    }

    fn strong<'b>(self, text: impl Into<std::borrow::Cow<'b, str>>) -> Span<'b> {
        Span::styled(text, self.theme.strong())
    }

    fn state<'b>(self, state: State, text: impl Into<std::borrow::Cow<'b, str>>) -> Span<'b> {
        Span::styled(text, self.theme.state(state))
    }

    /// Glyph and word in the state's colour.
    fn mark(self, state: State, word: &str) -> Span<'static> {
        Span::styled(format!("{} {word}", state.glyph()), self.theme.state(state))
    }

    fn stage(self, name: StageName) -> (State, &'static str) {
        self.now.stage(name).map_or((State::Idle, "off"), |it| theme::of_stage(name, it, self.now.at))
    }
}

/// How many panes stand side by side.
pub(super) fn columns(area: Rect) -> usize {
    match (area.width, area.height) {
        (width, height) if width >= THREE_COLUMNS.0 && height >= THREE_COLUMNS.1 => 3,
        (width, height) if width >= TWO_COLUMNS.0 && height >= TWO_COLUMNS.1 => 2,
        _ => 1,
    }
}

pub(super) fn draw(frame: &mut Frame, scene: Scene) {
    let area = frame.area();
    if area.width < SMALLEST.0 || area.height < SMALLEST.1 {
        tiny(frame, area, scene);
    } else {
        let verdict = header::verdict(scene, area.width, if area.height >= ROOMY { 2 } else { 1 });
        let lines = u16::try_from(verdict.len()).unwrap_or(1);
        let [title, said, body, foot] =
            Layout::vertical([Constraint::Length(1), Constraint::Length(lines), Constraint::Min(0), Constraint::Length(1)]).areas(area);
        frame.render_widget(header::title(scene, title.width), title);
        frame::lines(frame, said, verdict);
        if scene.app.zoomed {
            screen(frame, body, scene);
        } else {
            overview(frame, body, scene);
        }
        frame.render_widget(footer::line(scene, foot.width), foot);
        sheets::draw(frame, scene);
    }
    scene.theme.finish(frame.buffer_mut());
}

/// One sentence, and what would help.
fn tiny(frame: &mut Frame, area: Rect, scene: Scene) {
    let (state, text) = header::sentence(scene);
    let said = format!("{} {text}", state.glyph());
    let mut lines: Vec<Line> = row::wrap(&said, area.width.into()).into_iter().map(|it| Line::styled(it, scene.theme.state(state))).collect();
    lines.truncate(area.height.saturating_sub(1).into());
    lines.push(Line::from(scene.dim(row::clip("enlarge the terminal", area.width.into()))));
    frame::lines(frame, area, lines);
}

fn overview(frame: &mut Frame, body: Rect, scene: Scene) {
    let whole = frame.area();
    match columns(whole) {
        1 => pane(frame, body, scene, scene.app.focus),
        columns => {
            let rows = Pane::ALL.len() / columns;
            let heights = heights(body.height, rows);
            let bands = Layout::vertical(heights).split(body);
            for (place, shown) in Pane::ALL.into_iter().enumerate() {
                let cells = Layout::horizontal(vec![Constraint::Ratio(1, u32::try_from(columns).unwrap_or(1)); columns]).split(bands[place / columns]);
                pane(frame, cells[place % columns], scene, shown);
            }
        }
    }
}

/// Streams and tables need as many lines as there are tables; what is left goes to the DAGs first.
fn heights(body: u16, rows: usize) -> Vec<Constraint> {
    match (rows, body) {
        (3, 34..) => vec![Constraint::Length(9), Constraint::Fill(3), Constraint::Fill(2)],
        (3, 30..) => vec![Constraint::Length(9), Constraint::Min(12), Constraint::Length(11)],
        (3, 25..) => vec![Constraint::Length(9), Constraint::Fill(1), Constraint::Fill(1)],
        (3, _) => vec![Constraint::Length(8), Constraint::Fill(1), Constraint::Length(6)],
        // All tasks of both DAGs, and the log as long as there is room.
        (2, 36..) => vec![Constraint::Length(21), Constraint::Fill(1)],
        _ => vec![Constraint::Fill(1); rows],
    }
}

fn pane(frame: &mut Frame, area: Rect, scene: Scene, pane: Pane) {
    match pane {
        Pane::Stream => stream::pane(frame, area, scene),
        Pane::Lake => lake::pane(frame, area, scene),
        Pane::Dags => dags::pane(frame, area, scene),
        Pane::Dbt => dbt::pane(frame, area, scene),
        Pane::Kpis => kpis::pane(frame, area, scene),
        Pane::Log => log::pane(frame, area, scene),
    }
}

fn screen(frame: &mut Frame, area: Rect, scene: Scene) {
    match scene.app.focus {
        Pane::Stream => stream::screen(frame, area, scene),
        Pane::Lake => lake::screen(frame, area, scene),
        Pane::Dags => dags::screen(frame, area, scene),
        Pane::Dbt => dbt::screen(frame, area, scene),
        Pane::Kpis => kpis::screen(frame, area, scene),
        Pane::Log => log::screen(frame, area, scene),
    }
}

/// The box of a pane: its number and name, the state of its stage, its filter.
fn boxed<'a>(frame: &mut Frame, area: Rect, scene: Scene<'a>, pane: Pane, note: impl Into<Line<'a>>) -> Rect {
    let in_focus = scene.app.focus == pane && !scene.app.zoomed;
    let style = if in_focus { Style::new() } else { scene.theme.dim() };
    let mut title = vec![Span::raw(format!(" {} ", pane.place() + 1)), scene.strong(pane.name()), Span::raw(" ")];
    let filter = scene.filter(pane);
    if !filter.is_empty() {
        title.push(scene.state(State::Waiting, format!("/{filter} ")));
    }
    frame::pane(frame, area, title, note, in_focus, style)
}

/// The state of a stage, for the right end of a pane's box.
fn stage_note(scene: Scene, name: StageName) -> Line<'static> {
    let (state, word) = scene.stage(name);
    Line::from(vec![Span::raw(" "), scene.mark(state, &format!("{name} {word}")), Span::raw(" ")])
}

/// What a stage told long ago is drawn as old.
fn age(frame: &mut Frame, area: Rect, scene: Scene, name: StageName) {
    if scene.stage(name).0 == State::Stale || scene.app.silent.is_some() {
        frame.buffer_mut().set_style(area, scene.theme.state(State::Stale));
    }
}

/// What an empty place says: what comes, when, and which key brings it.
fn teach(frame: &mut Frame, area: Rect, scene: Scene, text: &str) {
    let lines = row::wrap(text, usize::from(area.width).saturating_sub(2));
    frame::lines(frame, area, lines.into_iter().map(|it| Line::from(scene.dim(format!(" {it}")))).collect());
}

/// The window of `height` rows around the selected one.
fn window(selected: usize, count: usize, height: usize) -> std::ops::Range<usize> {
    let first = selected.saturating_sub(height / 2).min(count.saturating_sub(height));
    first..(first + height).min(count)
}
