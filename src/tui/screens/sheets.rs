//! What lies on top: help, details, questions, the palette's list.

use ratatui::{Frame, text::Line, text::Span};

use crate::{
    dag::RunRef,
    notify::MailState,
    pipeline::command::{Command, Look},
    tui::{
        app::{OnTop, Question},
        keys::{self, Place},
        page::Page,
        palette,
        parts::{frame, number, row},
        theme::State,
    },
    units::grouped,
};

use super::{Scene, dags, dbt, lake};

pub(super) fn draw(frame: &mut Frame, scene: Scene) {
    match &scene.app.on_top {
        None | Some(OnTop::Filter { .. }) => {}
        Some(OnTop::Help { scroll }) => help(frame, scene, *scroll),
        Some(OnTop::Details(page)) => details(frame, scene, page),
        Some(OnTop::Outbox { scroll }) => outbox(frame, scene, *scroll),
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
    lines.extend(scene.app.pulse.words().map(|it| Line::from(scene.dim(format!("        {it}")))));
    scrolled(frame, "keys", lines, scroll, scene);
}

/// What the snapshot knows at once, then what was read for it.
fn details(frame: &mut Frame, scene: Scene, page: &Page) {
    let (title, known) = match &page.look {
        Look::Messages { table, revealed } => (format!("newest messages of {table}{}", if *revealed { ", unmasked" } else { "" }), Vec::new()),
        Look::CommitRecord { data } => lake::details(scene, data),
        Look::Proof => lake::to_prove(scene),
        Look::Log => ("the pipeline's log".to_owned(), Vec::new()),
        Look::TaskLog { dag_id, run_id, task_id } => dags::details(scene, &RunRef { dag_id: dag_id.clone(), run_id: run_id.clone() }, task_id),
        Look::Sql { unique_id } => dbt::details(scene, unique_id),
    };
    let width = usize::from(frame.area().width).saturating_sub(6);
    let wrapped = |text: &str| if text.is_empty() { vec![String::new()] } else { row::wrap(text, width) };
    let mut lines: Vec<Line> = known.iter().flat_map(|it| marked(scene, it, wrapped(it))).collect();
    match &page.found {
        None => {
            let seconds = (scene.now.at - page.asked_at).num_seconds().max(0);
            lines.extend([Line::default(), Line::from(scene.state(State::Waiting, format!("reading… {seconds} s")))]);
        }
        Some(found) => {
            if !found.said.is_empty() && !matches!(page.look, Look::Sql { .. }) {
                let state = if found.ok { State::Ok } else { State::Failed };
                lines.push(Line::default());
                lines.extend(wrapped(&found.said).into_iter().map(|it| Line::styled(it, scene.theme.state(state))));
            } else if !found.ok {
                lines.extend(wrapped(&found.said).into_iter().map(|it| Line::styled(it, scene.theme.state(State::Failed))));
            }
            lines.extend(found.lines.iter().flat_map(|it| marked(scene, it, wrapped(it))));
        }
    }
    scrolled(frame, &title, lines, page.scroll, scene);
}

/// A line that begins with the glyph of a state has its colour.
fn marked<'a>(scene: Scene, text: &str, lines: Vec<String>) -> Vec<Line<'a>> {
    let state = match text.trim_start().chars().next() {
        Some('✗') => Some(State::Failed),
        Some('✓') => Some(State::Ok),
        _ => None,
    };
    let style = state.map(|it| scene.theme.state(it)).unwrap_or_default();
    lines.into_iter().map(|it| Line::styled(it, style)).collect()
}

/// The letters: how many, what keeps them, then the newest.
fn outbox(frame: &mut Frame, scene: Scene, scroll: usize) {
    let mail = &scene.now.mail;
    let count = |it: u64, word: &str| format!("{} {word}", grouped(it));
    let mut lines = vec![Line::from(format!(
        "{} · {} since the start · {}",
        count(mail.waiting, "wait"),
        count(mail.sent, "sent"),
        count(mail.refused, "refused for good"),
    ))];
    let width = usize::from(frame.area().width).saturating_sub(6);
    if let Some(why) = &mail.away {
        lines.extend(row::wrap(&format!("They wait: {why}"), width).into_iter().map(|it| Line::styled(it, scene.theme.state(State::Late))));
    }
    if mail.newest.is_empty() {
        lines.push(Line::from(scene.dim("No letter yet. Each DAG run writes one; a failed task writes one that says why.")));
    }
    lines.push(Line::default());
    for letter in &mail.newest {
        let (state, when) = match letter.state {
            MailState::Sent => (State::Ok, letter.sent_at.map(|it| format!("sent {}", number::clock(it)))),
            MailState::Waiting => (State::Waiting, Some(format!("waits since {}, {} tries", number::clock(letter.recorded_at), letter.tries))),
            MailState::Refused => (State::Failed, Some(format!("refused, {} tries", letter.tries))),
        };
        let left = vec![scene.state(state, state.glyph()), Span::raw(format!(" {}", letter.subject))];
        lines.push(row::ends(left, scene.dim(when.unwrap_or_default()), width));
        let about = format!("  to {}", letter.to.join(", "));
        lines.push(Line::from(scene.dim(row::clip(&about, width))));
        if let Some(error) = &letter.error {
            lines.extend(row::wrap(error, width.saturating_sub(2)).into_iter().map(|it| Line::styled(format!("  {it}"), scene.theme.state(state))));
        }
    }
    scrolled(frame, "mail", lines, scroll, scene);
}

/// What is longer than the screen is read from `scroll` on; the last line stays reachable and says there is more.
fn scrolled(frame: &mut Frame, title: &str, mut lines: Vec<Line>, scroll: usize, scene: Scene) {
    let room = usize::from(room_of(frame));
    scene.app.sheet_end.set(lines.len().saturating_sub(room));
    let first = scroll.min(lines.len().saturating_sub(room));
    let more = lines.len() > first + room;
    lines.drain(..first);
    lines.truncate(room);
    if more && let Some(last) = lines.last_mut() {
        *last = Line::from(scene.dim("… j scrolls"));
    }
    frame::popup(frame, title, lines, scene.theme.strong());
}

/// Lines inside the largest box.
fn room_of(frame: &Frame) -> u16 {
    frame.area().height.saturating_sub(frame::KEPT.0 + frame::KEPT.1 + 2)
}

fn ask(frame: &mut Frame, scene: Scene, question: &Question) {
    let keys = Line::from(vec![scene.strong("y"), Span::raw(" yes   "), scene.strong("n Esc"), Span::raw(" no")]);
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
    // A blank line and the keys come below.
    let room = usize::from(room_of(frame).saturating_sub(2)).max(1);
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
    let matching = palette::matching(text);
    let words = palette::words(text, scene.now);
    let mut lines: Vec<Line> = matching.iter().take(if words.is_empty() { matching.len() } else { 1 }).map(row).collect();
    lines.extend(words.into_iter().map(|it| Line::from(format!("{:>9} {it}", ""))));
    let room = usize::from(room_of(frame)).max(1);
    if lines.len() > room {
        let hidden = lines.len() - room + 1;
        lines.truncate(room - 1);
        lines.push(Line::from(scene.dim(format!("          … {hidden} more: a letter narrows them down"))));
    }
    if lines.is_empty() {
        lines.push(Line::from(scene.dim("no such command")));
    }
    frame::popup_above_footer(frame, "commands", lines, scene.theme.strong());
}
