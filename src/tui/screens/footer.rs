//! The last line: the answer to the last command for a moment, else the keys that work here and what they do now.

use ratatui::text::{Line, Span};

use crate::{
    bank::Rate,
    pipeline::command::Look,
    stage::Phase,
    tui::{
        app::OnTop,
        keys::{self, Action, Pane},
        page::Page,
        parts::row,
        theme::State,
    },
    units::grouped,
};

use super::Scene;

pub(super) fn line(scene: Scene, width: u16) -> Line<'static> {
    let width = usize::from(width);
    match &scene.app.on_top {
        Some(OnTop::Filter { text }) => return typing(scene, "/", text, width),
        Some(OnTop::Palette { text }) => return typing(scene, ":", text, width),
        _ => {}
    }
    if let Some(message) = &scene.app.message {
        let state = if message.ok { State::Ok } else { State::Late };
        return Line::styled(row::clip(&format!(" {} {}", state.glyph(), message.text), width), scene.theme.state(state));
    }
    Line::from(
        std::iter::once(Span::raw(" "))
            .chain(
                fitting(scene, width)
                    .into_iter()
                    .flat_map(|(key, words)| [scene.strong(key), Span::raw(if words.is_empty() { "  ".to_owned() } else { format!(" {words}  ") })]),
            )
            .collect::<Vec<_>>(),
    )
}

/// The hints that have room, in the order of the table; in short words where they would not all fit. The way out
/// comes first when room is given away, then what a failure at night asks for.
fn fitting(scene: Scene, width: usize) -> Vec<(String, String)> {
    let mut hints = hints(scene);
    let wide = |it: &(Action, String, String)| row::width_of(&it.1) + row::width_of(&it.2) + if it.2.is_empty() { 2 } else { 3 };
    for action in SHORTENED {
        if hints.iter().map(wide).sum::<usize>() < width {
            break;
        }
        for (_, _, words) in hints.iter_mut().filter(|it| it.0 == action) {
            if let Some(short) = shorter(action, words) {
                *words = short;
            }
        }
    }
    let worth = |it: &Action| match it {
        Action::Quit | Action::Back | Action::Dismiss | Action::No => 0,
        Action::Retry | Action::Trigger | Action::Cancel | Action::Filter | Action::Palette => 1,
        _ => 2,
    };
    // A blank stands before the first.
    let mut room = width.saturating_sub(1);
    let mut taken = vec![false; hints.len()];
    for turn in 0..=2 {
        for (place, hint) in hints.iter().enumerate().filter(|it| worth(&it.1.0) == turn) {
            // A later, shorter one may still fit.
            if wide(hint) <= room {
                (room, taken[place]) = (room - wide(hint), true);
            }
        }
    }
    hints.into_iter().zip(taken).filter(|it| it.1).map(|((_, key, words), _)| (key, words)).collect()
}

/// What loses words first: the keys that every tool has. Which stage is paused is said as long as it can be.
const SHORTENED: [Action; 8] =
    [Action::Filter, Action::Palette, Action::Back, Action::Enter, Action::Gantt, Action::Trigger, Action::Cancel, Action::TogglePause];

/// The same in fewer letters, where the key alone says most of it.
fn shorter(action: Action, words: &str) -> Option<String> {
    Some(match action {
        Action::TogglePause => words.split(' ').next()?.to_owned(),
        Action::Gantt => words.trim_start_matches("over ").to_owned(),
        Action::Cancel => "cancel".to_owned(),
        Action::Trigger if words == "trigger" => "run".to_owned(),
        Action::Filter | Action::Palette | Action::Back => String::new(),
        Action::Enter if words == "commit record" => "record".to_owned(),
        _ => return None,
    })
}

fn typing(scene: Scene, mark: &'static str, text: &str, width: usize) -> Line<'static> {
    let hints = " Enter does it  Esc leaves it ";
    let left = Line::from(vec![scene.strong(format!(" {mark}{text}")), Span::styled(" ", scene.theme.selected())]);
    if left.width() + hints.len() <= width { row::ends(left, Line::from(scene.dim(hints)), width) } else { left }
}

/// Keys of the table that do something now, each with what that is.
fn hints(scene: Scene) -> Vec<(Action, String, String)> {
    keys::footer(scene.app.place()).filter_map(|it| words(scene, it.action).map(|words| (it.action, shown(it.action, it.shown), words))).collect()
}

/// Faster and slower share a place.
fn shown(action: Action, key: &str) -> String {
    match action {
        Action::Faster | Action::Louder => "+/-".to_owned(),
        _ => key.to_owned(),
    }
}

fn words(scene: Scene, action: Action) -> Option<String> {
    let (app, now) = (scene.app, scene.now);
    Some(match action {
        // Where one reads, the help has it.
        Action::TogglePause if app.zoomed && app.focus == Pane::Log => return None,
        Action::TogglePause => {
            let stage = app.pause_target(now);
            let verb = now.stage(stage).map_or("pause", |it| if it.wanted == Phase::Paused { "resume" } else { "pause" });
            format!("{verb} {stage}")
        }
        // Where one looks at something else, the help has it.
        Action::Faster if app.zoomed && app.focus != Pane::Stream => return None,
        Action::Faster => match now.wish.rate {
            Rate::PerSecond(rate) => match app.rate_wanted() {
                Some(wanted) if wanted != rate => format!("{} tx/s, {} asked", grouped(rate.get().into()), grouped(wanted.get().into())),
                _ => format!("{} tx/s", grouped(rate.get().into())),
            },
            Rate::Unlimited => return None,
        },
        Action::Louder => format!("{} {}", app.logs.room(), app.logs.level_of(app.logs.room()).0.as_str().to_lowercase()),
        Action::Right if app.focus == Pane::Log => "room".to_owned(),
        Action::Freeze => if app.logs.frozen_at.is_some() { "go on" } else { "freeze" }.to_owned(),
        Action::Last if app.focus == Pane::Log => "follow".to_owned(),
        Action::SaveLog => "save".to_owned(),
        Action::Gantt => if app.over_time { "grid" } else { "over time" }.to_owned(),
        Action::Verify => "verify".to_owned(),
        Action::Reveal => match &app.on_top {
            Some(OnTop::Details(Page { look: Look::Messages { revealed, .. }, .. })) => if *revealed { "mask" } else { "unmask customers" }.to_owned(),
            _ => return None,
        },
        Action::Slower | Action::Quieter => return None,
        Action::Trigger => match app.focus {
            Pane::Dbt => "run dbt".to_owned(),
            _ => "trigger".to_owned(),
        },
        Action::Retry => {
            app.retry_target(now)?;
            "retry".to_owned()
        }
        Action::Clear => "clear".to_owned(),
        Action::Cancel => {
            app.cancel_target(now)?;
            "cancel run".to_owned()
        }
        Action::NextPane => "pane".to_owned(),
        Action::Enter if app.zoomed => match app.focus {
            Pane::Stream => "messages",
            Pane::Lake => "commit record",
            Pane::Dags => "log",
            Pane::Log if app.owned => return None,
            Pane::Log => "pipeline's log",
            Pane::Kpis => return None,
            _ => "details",
        }
        .to_owned(),
        Action::Enter => "open".to_owned(),
        Action::Back => "back".to_owned(),
        Action::Filter => "filter".to_owned(),
        Action::Palette => "command".to_owned(),
        Action::Quit => "quit".to_owned(),
        Action::Dismiss => "close".to_owned(),
        Action::Down | Action::PageDown => "scroll".to_owned(),
        Action::Yes => "yes".to_owned(),
        Action::No => "no".to_owned(),
        _ => return None,
    })
}
