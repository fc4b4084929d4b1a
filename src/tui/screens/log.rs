//! The log as it comes in, one line an event; on its own screen with levels and a filter.

use ratatui::{Frame, layout::Rect, style::Style, text::Line};
use std::sync::atomic::{AtomicBool, Ordering};
use tui_logger::{ExtLogRecord, LogFormatter, TuiLoggerWidget, TuiWidgetState};

use crate::tui::{
    keys::Pane,
    parts::row,
    rows,
    theme::{State, Theme},
};

use super::Scene;

pub(super) fn pane(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Log, Line::default());
    // Another state than the screen's: the overview follows, however far the screen was scrolled.
    let following = TuiWidgetState::new().set_default_display_level(scene.app.level());
    draw(frame, inside, scene, &following);
}

pub(super) fn screen(frame: &mut Frame, area: Rect, scene: Scene) {
    let note = format!(" level {} · PgUp scrolls · G follows ", scene.app.level().as_str().to_lowercase());
    let inside = super::boxed(frame, area, scene, Pane::Log, Line::from(scene.dim(note)));
    draw(frame, inside, scene, scene.log);
}

fn draw(frame: &mut Frame, area: Rect, scene: Scene, state: &TuiWidgetState) {
    frame::nothing(frame, area, scene);
    let formatter = OneLine { theme: scene.theme, filter: scene.filter(Pane::Log).to_owned(), is_first: AtomicBool::new(true) };
    frame.render_widget(TuiLoggerWidget::default().formatter(Box::new(formatter)).style(Style::new()).state(state), area);
}

mod frame {
    use super::*;

    /// Under the log: what is seen while there is none.
    pub(super) fn nothing(frame: &mut Frame, area: Rect, scene: Scene) {
        crate::tui::parts::frame::lines(frame, area, vec![Line::from(scene.dim(" Stages say here what they do."))]);
    }
}

/// `12:03:04 INFO  lake      object put rows: 44059`. What the filter does not hold takes no line.
struct OneLine {
    theme: Theme,
    filter: String,
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
        if !(rows::holds(&text, &self.filter) || rows::holds(room, &self.filter) || rows::holds(event.level.as_str(), &self.filter)) {
            return if is_first { vec![Line::styled("·", self.theme.dim())] } else { Vec::new() };
        }
        let style = match event.level.as_str() {
            "ERROR" => self.theme.state(State::Failed),
            "WARN" => self.theme.state(State::Late),
            "DEBUG" | "TRACE" => self.theme.dim(),
            _ => Style::new(),
        };
        let at = event.timestamp.timestamp().strftime("%H:%M:%S");
        vec![Line::styled(row::fit(&format!("{at} {:<5} {} {text}", event.level.as_str(), row::fit(room, 9)), width), style)]
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
