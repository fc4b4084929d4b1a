//! The log as it comes in, one line an event; on its own screen with levels and a filter.

use std::{
    str::FromStr as _,
    sync::atomic::{AtomicBool, Ordering},
};

use ratatui::{
    Frame,
    buffer::Buffer,
    layout::{Constraint, Layout, Rect},
    style::Style,
    text::{Line, Span},
    widgets::Widget as _,
};
use tui_logger::{ExtLogRecord, LevelFilter, LogFormatter, TuiLoggerWidget, TuiWidgetState};

use crate::tui::{
    app::App,
    keys::Pane,
    logs::{Logs, ROOMS},
    parts::{frame, number, row},
    rows,
    theme::{State, Theme},
};

use super::Scene;

/// Stands where the widget insists on a line.
const NOTHING: &str = "·";

pub(super) fn pane(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Log, frozen(scene));
    // Another state than the screen's: the overview follows, however far the screen was scrolled.
    draw(frame, inside, scene, &TuiWidgetState::new());
}

pub(super) fn screen(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Log, frozen(scene));
    let [head, list] = Layout::vertical([Constraint::Length(1), Constraint::Min(1)]).areas(inside);
    frame::lines(frame, head, vec![levels(scene, head.width.into())]);
    draw(frame, list, scene, scene.log);
}

fn frozen(scene: Scene) -> Line<'static> {
    match scene.app.logs.frozen_at {
        Some(at) => Line::from(vec![Span::raw(" "), scene.mark(State::Waiting, &format!("frozen at {}", number::clock(at))), Span::raw(" ")]),
        None => Line::default(),
    }
}

/// Every room with its level; the one that the keys change is marked. Those without one of their own follow the first.
fn levels(scene: Scene, width: usize) -> Line<'static> {
    let logs = &scene.app.logs;
    let shown = |room: &'static str| {
        let (level, own) = logs.level_of(room);
        let text = if own || room == ROOMS[0] { format!("{room} {}", level.as_str().to_lowercase()) } else { room.to_owned() };
        match (room == logs.room(), own) {
            (true, _) => Span::styled(text, scene.theme.selected()),
            (false, true) => scene.strong(text),
            (false, false) => scene.dim(text),
        }
    };
    let mut line = Line::from(" ");
    for span in ROOMS.into_iter().map(shown) {
        if line.width() + span.width() + 2 > width {
            break;
        }
        line.push_span(span);
        line.push_span(Span::raw("  "));
    }
    line
}

fn draw(frame: &mut Frame, area: Rect, scene: Scene, state: &TuiWidgetState) {
    let nothing = match scene.app.owned {
        true => " Stages say here what they do.",
        false => " The pipeline logs in its own process: 6 Enter reads that here, and follows it.",
    };
    // Plain: what lies on top takes over the style of the cells that it does not set.
    frame::lines(frame, area, row::wrap(nothing, area.width.into()).into_iter().map(Line::from).collect());
    let formatter = OneLine { view: LogView::of(scene.app, scene.theme), is_first: AtomicBool::new(true) };
    frame.render_widget(TuiLoggerWidget::default().formatter(Box::new(formatter)).style(Style::new()).state(state), area);
}

/// Which lines are seen, and how.
#[derive(Debug, Clone)]
pub(in crate::tui) struct LogView {
    theme: Theme,
    filter: String,
    logs: Logs,
}

/// Lines that a copy of the log holds at most, and their width; longer ones end in `…`.
const SAVED: (u16, u16) = (400, 2_000);

impl LogView {
    pub(in crate::tui) fn of(app: &App, theme: Theme) -> Self {
        let filter = if app.zoomed { app.filter(Pane::Log) } else { "" };
        Self { theme, filter: filter.to_owned(), logs: app.logs.clone() }
    }

    fn shows(&self, event: &ExtLogRecord, room: &str, text: &str) -> bool {
        let level = LevelFilter::from_str(event.level.as_str()).is_ok_and(|it| it <= self.logs.level_of(room).0);
        let came = event.timestamp.timestamp().as_millisecond();
        let in_time = self.logs.frozen_at.is_none_or(|at| came <= at.timestamp_millis());
        level && in_time && [text, room, event.level.as_str()].into_iter().any(|it| rows::holds(it, &self.filter))
    }

    /// All of them that are still in memory, as text.
    pub(in crate::tui) fn lines(self) -> Vec<String> {
        let area = Rect::new(0, 0, SAVED.0, SAVED.1);
        let mut buffer = Buffer::empty(area);
        let formatter = OneLine { view: self, is_first: AtomicBool::new(true) };
        TuiLoggerWidget::default().formatter(Box::new(formatter)).style(Style::new()).state(&TuiWidgetState::new()).render(area, &mut buffer);
        let rows = buffer.content.chunks(SAVED.0.into()).map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>().trim_end().to_owned());
        rows.filter(|it| !it.is_empty() && it != NOTHING).collect()
    }
}

/// `12:03:04 INFO  lake      object put rows: 44059`. What the filter does not hold takes no line.
struct OneLine {
    view: LogView,
    /// The widget cannot start from an event without a line, so the first one always has one.
    is_first: AtomicBool,
}

impl LogFormatter for OneLine {
    fn min_width(&self) -> u16 {
        10
    }

    fn format(&self, width: usize, event: &ExtLogRecord) -> Vec<Line<'_>> {
        let is_first = self.is_first.swap(false, Ordering::Relaxed);
        let room = room_of(event.target());
        let text = message_first(&event.msg().replace('\n', " "));
        if !self.view.shows(event, room, &text) {
            return if is_first { vec![Line::styled(NOTHING, self.view.theme.dim())] } else { Vec::new() };
        }
        let style = match event.level.as_str() {
            "ERROR" => self.view.theme.state(State::Failed),
            "WARN" => self.view.theme.state(State::Late),
            "DEBUG" | "TRACE" => self.view.theme.dim(),
            _ => Style::new(),
        };
        let at = event.timestamp.timestamp().strftime("%H:%M:%S");
        vec![Line::styled(row::fit(&format!(" {at} {:<5} {} {text}", event.level.as_str(), row::fit(room, 9)), width), style)]
    }
}

/// Fields come sorted by name, with the message among them as `message` would be: what stands before it goes behind it.
///
/// A value of several words hides where it ends; then the line stays as it came.
fn message_first(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let is_name = |it: &str| !it.is_empty() && it.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_.".contains(&byte));
    let mut before = "";
    let mut fields = 0;
    while let Some(name) = words.get(fields * 2).and_then(|it| it.strip_suffix(':')).filter(|it| is_name(it) && *it > before && *it < "message") {
        before = name;
        fields += 1;
    }
    let (first, rest) = words.split_at((fields * 2).min(words.len()));
    if rest.is_empty() { words.join(" ") } else { rest.iter().chain(first).copied().collect::<Vec<_>>().join(" ") }
}

/// The room that speaks: `lake` of `ledgerline::lake::ship`; of a library its name.
fn room_of(target: &str) -> &str {
    let mut parts = target.split("::");
    match (parts.next(), parts.next()) {
        (Some("ledgerline"), Some(room)) => room,
        (Some(name), _) => name,
        (None, _) => target,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_comes_before_its_fields() {
        assert_eq!(message_first(" dag_id: D run started run_id: r"), "run started run_id: r dag_id: D");
        assert_eq!(message_first(" topic created topic: bank.message"), "topic created topic: bank.message");
        assert_eq!(message_first(" first_time: true lane: l[0] lane is read position: 0"), "lane is read position: 0 first_time: true lane: l[0]");
        assert_eq!(message_first(" stage: lake"), "stage: lake");
    }

    #[test]
    fn a_line_names_the_room_that_speaks() {
        assert_eq!(room_of("ledgerline::lake::ship"), "lake");
        assert_eq!(room_of("sqlx::query"), "sqlx");
        assert_eq!(room_of("ledgerline"), "ledgerline");
    }
}
