//! Colours by meaning. A state is a colour, a glyph and a word; any one of them is enough to read it.

use ratatui::{
    buffer::Buffer,
    style::{Color, Modifier, Style},
};

use crate::{
    dag::{RunState, RunStats, TaskState, TaskStats},
    dbt::Status,
    pipeline::{command::StageName, snapshot::StageView, supervise::Health, verdict::Level},
    stage::Phase,
};

use super::parts::spark;

/// What a thing is like. Colour is used for nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Done and right.
    Ok,
    Running,
    /// Its turn has not come, or a person holds it.
    Waiting,
    /// Slower than it should be; mends itself.
    Late,
    /// Somebody must act.
    Failed,
    /// Old: nobody has reported for a while.
    Stale,
    /// Nothing there yet.
    Idle,
}

impl State {
    #[cfg(test)]
    pub(super) const ALL: [Self; 7] = [Self::Ok, Self::Running, Self::Waiting, Self::Late, Self::Failed, Self::Stale, Self::Idle];

    pub(super) const fn glyph(self) -> &'static str {
        match self {
            Self::Ok => "✓",
            Self::Running => "▶",
            Self::Waiting => "‖",
            Self::Late => "▲",
            Self::Failed => "✗",
            Self::Stale => "?",
            Self::Idle => "·",
        }
    }
}

/// How states look on this terminal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Theme {
    colour: bool,
    ascii: bool,
}

impl Theme {
    /// `no_color` is the value of the environment variable of that name: any text but the empty one means no colour.
    pub(super) fn new(ascii: bool, no_color: Option<&str>) -> Self {
        Self { colour: no_color.is_none_or(str::is_empty), ascii }
    }

    /// Without colour a state still differs by weight; it always differs by glyph and word.
    pub(super) fn state(self, state: State) -> Style {
        let style = Style::new();
        let (colour, weight) = match state {
            State::Ok => (Color::Green, Modifier::empty()),
            State::Running => (Color::Cyan, Modifier::empty()),
            State::Waiting => (Color::Blue, Modifier::empty()),
            State::Late => (Color::Yellow, Modifier::BOLD),
            State::Failed => (Color::Red, Modifier::BOLD),
            State::Stale => (Color::Magenta, Modifier::DIM),
            State::Idle => (Color::Reset, Modifier::DIM),
        };
        if self.colour { style.fg(colour).add_modifier(weight) } else { style.add_modifier(weight) }
    }

    pub(super) fn dim(self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }

    pub(super) fn strong(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    pub(super) fn selected(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }

    /// The last word on a frame: with `--ascii` every cell becomes plain ASCII, whoever drew it.
    pub(super) fn finish(self, buffer: &mut Buffer) {
        if !self.ascii {
            return;
        }
        for cell in &mut buffer.content {
            if !cell.symbol().is_ascii() {
                let plain = ascii(cell.symbol());
                cell.set_symbol(plain);
            }
        }
    }
}

/// The nearest ASCII character. One cell stays one cell.
fn ascii(symbol: &str) -> &'static str {
    match symbol {
        "✓" => "v",
        "✗" => "X",
        "▶" => ">",
        "‖" => "=",
        "▲" | "△" => "^",
        "■" | "█" => "#",
        "↻" => "~",
        "○" => "o",
        "·" | "…" => ".",
        "–" | "—" | "─" | "━" | "╌" => "-",
        "│" | "┃" => "|",
        "→" => ">",
        "←" => "<",
        "↑" => "^",
        "↓" => "v",
        "Σ" => "S",
        "√" => "~",
        "╭" | "╮" | "╰" | "╯" | "┌" | "┐" | "└" | "┘" | "├" | "┤" | "┬" | "┴" | "┼" | "┏" | "┓" | "┗" | "┛" => "+",
        other => other.chars().next().and_then(spark::height).map_or("?", |height| ["_", "_", ".", "-", "="][height.min(4)]),
    }
}

pub(super) fn of_level(level: Level) -> (State, &'static str) {
    match level {
        Level::Well => (State::Ok, "well"),
        Level::Note => (State::Waiting, "note"),
        Level::Late => (State::Late, "late"),
        Level::Failed => (State::Failed, "failed"),
    }
}

/// A stage's state and its word. Wishes that are not true yet are said as such.
pub(super) fn of_stage(name: StageName, stage: &StageView, now: chrono::DateTime<chrono::Utc>) -> (State, &'static str) {
    match &stage.health {
        Health::Off => (State::Idle, "off"),
        Health::Ended => (State::Idle, "ended"),
        Health::Waiting { .. } => (State::Late, "waiting"),
        Health::Held { .. } => (State::Failed, "held"),
        Health::Failed { .. } => (State::Failed, "failed"),
        Health::Working if stage.is_stale(name, now) => (State::Stale, "stale"),
        Health::Working => match (stage.wanted, stage.phase) {
            (Phase::Running, Phase::Running) => (State::Running, "running"),
            (Phase::Paused, Phase::Paused) => (State::Waiting, "paused"),
            (Phase::Paused, Phase::Running) => (State::Waiting, "pausing…"),
            (Phase::Running, Phase::Paused) => (State::Waiting, "resuming…"),
        },
    }
}

pub(super) fn of_run(run: &RunStats) -> State {
    match run.state {
        RunState::Failed if run.cancelled => State::Waiting,
        RunState::Queued => State::Waiting,
        RunState::Running => State::Running,
        RunState::Success => State::Ok,
        RunState::Failed => State::Failed,
    }
}

/// A task of a run: what an operator cut short has not failed.
pub(super) fn of_task_in(run: &RunStats, task: &TaskStats) -> (State, &'static str) {
    if run.cut_short(task) { (State::Waiting, State::Waiting.glyph()) } else { of_task(task.state) }
}

/// A task in the grid: its state and the glyph of its cell.
fn of_task(state: TaskState) -> (State, &'static str) {
    match state {
        TaskState::None => (State::Idle, "·"),
        TaskState::Scheduled | TaskState::Queued => (State::Waiting, "○"),
        TaskState::Running => (State::Running, "▶"),
        TaskState::Success => (State::Ok, "■"),
        TaskState::Failed => (State::Failed, "✗"),
        TaskState::UpForRetry => (State::Late, "↻"),
        TaskState::UpstreamFailed => (State::Late, "△"),
        TaskState::Skipped => (State::Idle, "–"),
        TaskState::Removed => (State::Idle, " "),
    }
}

pub(super) fn of_node(status: Option<Status>) -> (State, &'static str) {
    match status {
        None => (State::Idle, "waits"),
        Some(Status::Running) => (State::Running, "running"),
        Some(Status::Success) => (State::Ok, "success"),
        Some(Status::Pass) => (State::Ok, "pass"),
        Some(Status::Warn) => (State::Late, "warn"),
        Some(Status::Fail) => (State::Failed, "fail"),
        Some(Status::Error) => (State::Failed, "error"),
        Some(Status::Skipped) => (State::Idle, "skipped"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_differ_by_their_glyph_alone() {
        let mut glyphs: Vec<_> = State::ALL.iter().map(|it| it.glyph()).collect();
        glyphs.sort_unstable();
        glyphs.dedup();
        assert_eq!(glyphs.len(), State::ALL.len());
        let mut cells: Vec<_> = TaskState::ALL.iter().map(|it| of_task(*it).1).collect();
        cells.sort_unstable();
        cells.dedup();
        // Scheduled and queued share one: both wait for their turn.
        assert_eq!(cells.len(), TaskState::ALL.len() - 1);
    }

    #[test]
    fn an_empty_no_color_means_nothing() {
        assert_eq!(Theme::new(false, Some("")).state(State::Failed).fg, Some(Color::Red));
        assert_eq!(Theme::new(false, None).state(State::Failed).fg, Some(Color::Red));
        assert_eq!(Theme::new(false, Some("1")).state(State::Failed).fg, None);
    }
}
