//! The log as it comes in, one line an event; on its own screen each event to its end, with levels and a filter.

use std::{
    str::FromStr as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
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

pub(super) fn pane(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Log, frozen(scene));
    // Another state than the screen's: the overview follows, however far the screen was scrolled.
    draw(frame, inside, scene, &TuiWidgetState::new(), Lines::Clipped);
}

pub(super) fn screen(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Log, frozen(scene));
    let [head, list] = Layout::vertical([Constraint::Length(1), Constraint::Min(1)]).areas(inside);
    frame::lines(frame, head, vec![levels(scene, head.width.into())]);
    draw(frame, list, scene, scene.log, Lines::Whole);
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

/// How an event that is longer than the pane is wide is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lines {
    /// One line an event: many are seen.
    Clipped,
    /// As many as it takes: all of it is read.
    Whole,
}

fn draw(frame: &mut Frame, area: Rect, scene: Scene, state: &TuiWidgetState, lines: Lines) {
    let formatter = Formatter::new(LogView::of(scene.app, scene.theme), lines);
    let any = Arc::clone(&formatter.any);
    frame.render_widget(TuiLoggerWidget::default().formatter(Box::new(formatter)).style(Style::new()).state(state), area);
    if any.load(Ordering::Relaxed) {
        return;
    }
    let filter = scene.filter(Pane::Log);
    let nothing = match scene.app.owned {
        _ if !filter.is_empty() => format!(" Nothing in the log contains \"{filter}\" at the levels above. Esc shows all."),
        true => " Stages say here what they do.".to_owned(),
        false => " The pipeline logs in its own process: 6 Enter reads that here, and follows it.".to_owned(),
    };
    // Plain: what lies on top takes over the style of the cells that it does not set.
    frame::lines(frame, area, row::wrap(&nothing, area.width.into()).into_iter().map(Line::from).collect());
}

/// Which lines are seen, and how.
#[derive(Debug, Clone)]
pub(in crate::tui) struct LogView {
    theme: Theme,
    filter: String,
    logs: Logs,
}

/// Lines that a copy of the log holds at most, and their width; longer ones go on in the next.
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
        let formatter = Formatter::new(self, Lines::Whole);
        TuiLoggerWidget::default().formatter(Box::new(formatter)).style(Style::new()).state(&TuiWidgetState::new()).render(area, &mut buffer);
        let rows = buffer.content.chunks(SAVED.0.into()).map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>().trim_end().to_owned());
        rows.filter(|it| !it.is_empty()).collect()
    }
}

/// `12:03:04 INFO  lake: object put rows=44059`. What the filter does not hold takes no line.
struct Formatter {
    view: LogView,
    lines: Lines,
    /// Whether any event was shown.
    any: Arc<AtomicBool>,
    /// The widget cannot start from an event without a line, so the first one always has one, if need be an empty one.
    is_first: AtomicBool,
}

impl Formatter {
    fn new(view: LogView, lines: Lines) -> Self {
        Self { view, lines, any: Arc::default(), is_first: AtomicBool::new(true) }
    }
}

impl LogFormatter for Formatter {
    fn min_width(&self) -> u16 {
        10
    }

    fn format(&self, width: usize, event: &ExtLogRecord) -> Vec<Line<'_>> {
        let is_first = self.is_first.swap(false, Ordering::Relaxed);
        let (room, text) = (room_of(event.target()), event.msg().trim());
        if !self.view.shows(event, room, text) {
            return if is_first { vec![Line::default()] } else { Vec::new() };
        }
        self.any.store(true, Ordering::Relaxed);
        let style = match event.level.as_str() {
            "ERROR" => self.view.theme.state(State::Failed),
            "WARN" => self.view.theme.state(State::Late),
            "DEBUG" | "TRACE" => self.view.theme.dim(),
            _ => Style::new(),
        };
        let at = event.timestamp.timestamp().strftime("%H:%M:%S");
        let head = format!(" {at} {:<5} ", event.level.as_str());
        laid_out(&head, &format!("{room}: {text}"), width, self.lines).into_iter().map(|it| Line::styled(it, style)).collect()
    }
}

/// An event's lines; those after the first stand under its words.
fn laid_out(head: &str, words: &str, width: usize, lines: Lines) -> Vec<String> {
    match lines {
        Lines::Clipped => vec![row::fit(&format!("{head}{}", words.replace('\n', " ")), width)],
        Lines::Whole => {
            let under = " ".repeat(head.len());
            let wrapped = row::wrap(words, width.saturating_sub(head.len()).max(1));
            wrapped.into_iter().enumerate().map(|(n, it)| format!("{}{it}", if n == 0 { head } else { &under })).collect()
        }
    }
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
    fn a_long_event_is_read_to_its_end_on_the_screen_and_clipped_in_the_pane() {
        let (head, words) = (" 12:03:04 WARN  ", "dag: try failed task_id=dbt_analytics error=\"relation does not exist\"");
        let whole = laid_out(head, words, 44, Lines::Whole);
        assert_eq!(whole[0], " 12:03:04 WARN  dag: try failed");
        assert_eq!(whole[1], "                 task_id=dbt_analytics".replacen(' ', "", 1));
        assert!(whole.last().is_some_and(|it| it.ends_with("exist\"")), "{whole:?}");
        let clipped = laid_out(head, words, 44, Lines::Clipped);
        assert!(clipped.len() == 1 && clipped[0].ends_with('…'), "{clipped:?}");
    }

    #[test]
    fn a_line_names_the_room_that_speaks() {
        assert_eq!(room_of("ledgerline::lake::ship"), "lake");
        assert_eq!(room_of("sqlx::query"), "sqlx");
        assert_eq!(room_of("ledgerline"), "ledgerline");
    }
}
