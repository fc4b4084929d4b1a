//! What lies on top: help, details, questions, the palette's list.

use ratatui::{Frame, text::Line, text::Span};

use crate::{
    pipeline::command::Command,
    tui::{
        app::{OnTop, Question},
        keys::{self, Pane, Place},
        palette,
        parts::{frame, row},
        theme::State,
    },
};

use super::{Scene, dags, dbt, lake};

/// Suggestions shown while a command is typed.
const SUGGESTIONS: usize = 8;

pub(super) fn draw(frame: &mut Frame, scene: Scene) {
    match &scene.app.on_top {
        None | Some(OnTop::Filter { .. }) => {}
        Some(OnTop::Help { scroll }) => help(frame, scene, *scroll),
        Some(OnTop::Details { scroll }) => details(frame, scene, *scroll),
        Some(OnTop::Question(question)) => ask(frame, scene, question),
        Some(OnTop::Palette { text }) => suggest(frame, scene, text),
    }
}

/// The keys of the place one came from, out of the same table that finds them.
fn help(frame: &mut Frame, scene: Scene, scroll: usize) {
    let place = if scene.app.zoomed { Place::Screen(scene.app.focus) } else { Place::Overview };
    let mut lines: Vec<Line> =
        keys::bindings(place).map(|it| Line::from(vec![scene.strong(format!("{:>9}", it.shown)), Span::raw(format!("  {}", it.does))])).collect();
    let legend = |state: State, word: &str| vec![Span::raw("        "), scene.state(state, state.glyph()), Span::raw(format!("  {word}"))];
    lines.push(Line::default());
    for (state, word) in [
        (State::Ok, "done and right"),
        (State::Running, "running"),
        (State::Waiting, "waits, or held by you"),
        (State::Late, "late; mends itself"),
        (State::Failed, "failed: somebody must act"),
        (State::Stale, "stale: old, nobody has reported"),
    ] {
        lines.push(Line::from(legend(state, word)));
    }
    scrolled(frame, "keys", lines, scroll, scene);
}

fn details(frame: &mut Frame, scene: Scene, scroll: usize) {
    let found = match scene.app.focus {
        Pane::Lake => lake::details(scene),
        Pane::Dags => dags::details(scene),
        Pane::Dbt => dbt::details(scene),
        Pane::Stream | Pane::Kpis | Pane::Log => None,
    };
    let (title, text) = found.unwrap_or_else(|| ("details".to_owned(), vec!["Nothing more is known.".to_owned()]));
    let width = usize::from(frame.area().width).saturating_sub(6);
    let lines = text.iter().flat_map(|it| if it.is_empty() { vec![String::new()] } else { row::wrap(it, width) }).map(Line::from).collect();
    scrolled(frame, &title, lines, scroll, scene);
}

/// What is longer than the screen is read from `scroll` on; the last line stays reachable and says there is more.
fn scrolled(frame: &mut Frame, title: &str, mut lines: Vec<Line>, scroll: usize, scene: Scene) {
    let room = usize::from(frame.area().height).saturating_sub(3);
    let first = scroll.min(lines.len().saturating_sub(room));
    let more = lines.len() > first + room;
    lines.drain(..first);
    lines.truncate(room);
    if more && let Some(last) = lines.last_mut() {
        *last = Line::from(scene.dim("… j scrolls"));
    }
    frame::popup(frame, title, lines, scene.theme.strong());
}

fn ask(frame: &mut Frame, scene: Scene, question: &Question) {
    let keys = Line::from(vec![scene.strong("y"), Span::raw(" yes   "), scene.strong("n"), Span::raw(" no")]);
    let width = usize::from(frame.area().width).saturating_sub(6);
    let (title, mut lines) = match question {
        Question::Quit if scene.app.owned => (
            "Quit?",
            vec![Line::from("This ends the pipeline: stages finish what they hold, nothing is lost."), Line::from("The next start goes on from here.")],
        ),
        Question::Quit => ("Quit?", vec![Line::from("This closes the console only; the pipeline goes on.")]),
        Question::Order { command, said, tasks } => {
            // The engine's words for a rehearsal begin so; the title asks already.
            let said = said.strip_prefix("would: ").unwrap_or(said);
            let mut lines: Vec<Line> = row::wrap(said, width).into_iter().map(Line::from).collect();
            lines.extend(tasks.iter().map(|it| Line::from(format!("  {it}"))));
            (order_title(command), lines)
        }
    };
    let room = usize::from(frame.area().height).saturating_sub(4);
    if lines.len() > room {
        let hidden = lines.len() - room + 1;
        lines.truncate(room - 1);
        lines.push(Line::from(scene.dim(format!("  … and {hidden} more"))));
    }
    lines.extend([Line::default(), keys]);
    frame::popup(frame, title, lines, scene.theme.state(State::Waiting));
}

fn order_title(command: &Command) -> &'static str {
    match command {
        Command::Retry { .. } => "Retry?",
        Command::Clear { .. } => "Clear and run again?",
        Command::Cancel { .. } => "Cancel the run?",
        Command::Shutdown => "End the pipeline?",
        _ => "Do it?",
    }
}

fn suggest(frame: &mut Frame, scene: Scene, text: &str) {
    let row = |it: &&(&str, &str, &'static str)| Line::from(vec![scene.strong(format!("{:>9} ", it.0)), Span::raw(format!("{:<9}", it.1)), scene.dim(it.2)]);
    let mut lines: Vec<Line> = palette::matching(text).iter().take(SUGGESTIONS).map(row).collect();
    if lines.is_empty() {
        lines.push(Line::from(scene.dim("no such command")));
    }
    frame::popup_above_footer(frame, "commands", lines, scene.theme.strong());
}
