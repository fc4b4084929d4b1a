//! The title and the verdict: is money flowing, is it right, does anything need me?

use ratatui::text::{Line, Span};

use crate::{
    pipeline::{command::StageName, supervise::Health},
    tui::{
        parts::{number, row},
        theme::{self, State},
    },
};

use super::Scene;

/// What runs here, how its stages are, since when. What has no room gives way from the left.
pub(super) fn title(scene: Scene<'_>, width: u16) -> Line<'_> {
    let now = scene.now;
    let width = usize::from(width);
    let mut right = stages(scene);
    right.extend([scene.dim(" · "), Span::raw(number::uptime(now.started_at, now.at)), scene.dim(" · "), scene.strong("?"), Span::raw(" help ")]);
    let right = Line::from(right);
    let name = [Span::raw(" "), scene.strong("ledgerline")];
    let seed = if scene.app.owned { format!("seed {}", now.seed) } else { format!("seed {} · attached to {}", now.seed, now.pid) };
    let about = [scene.dim(" · "), Span::raw(now.profile.as_str()), scene.dim(" · "), Span::raw(seed)];
    let full: Line = name.iter().chain(&about).cloned().collect();
    if full.width() + right.width() < width { row::ends(full, right, width) } else { row::ends(name.to_vec(), right, width) }
}

/// One word where all is as it should be, else the stages that are not.
fn stages(scene: Scene) -> Vec<Span<'static>> {
    let hosted = || scene.now.stages.iter().filter(|(_, it)| it.health != Health::Off);
    let odd: Vec<(StageName, (State, &str))> =
        hosted().map(|(name, it)| (*name, theme::of_stage(*name, it, scene.now.at))).filter(|(_, (state, _))| *state != State::Running).collect();
    if hosted().next().is_none() {
        return vec![scene.mark(State::Idle, "no stage yet")];
    }
    if odd.is_empty() {
        return vec![scene.mark(State::Running, "all stages running")];
    }
    let mut spans = Vec::new();
    for (name, (state, word)) in odd {
        if !spans.is_empty() {
            spans.push(scene.dim(" · "));
        }
        spans.push(scene.mark(state, &format!("{name} {word}")));
    }
    spans
}

/// The sentence of the verdict; where no snapshot comes any more, that.
pub(super) fn sentence(scene: Scene) -> (State, String) {
    match scene.app.silent {
        Some(silent) => {
            let way_out = if scene.app.owned { "" } else { " · q leaves the console" };
            (State::Stale, format!("The pipeline has said nothing for {} s: all below is old{way_out}", silent.as_secs()))
        }
        None => {
            let verdict = &scene.now.verdict;
            (theme::of_level(verdict.level).0, verdict.text.clone())
        }
    }
}

pub(super) fn verdict(scene: Scene, width: u16, lines_max: usize) -> Vec<Line<'static>> {
    let (state, text) = sentence(scene);
    let style = scene.theme.state(state);
    let width = usize::from(width).saturating_sub(4);
    let mut lines = row::wrap(&text, width);
    if lines.len() > lines_max {
        let rest = lines.split_off(lines_max - 1).join(" ");
        lines.push(row::clip(&rest, width));
    }
    let marks = std::iter::once(state.glyph()).chain(std::iter::repeat(" "));
    lines.into_iter().zip(marks).map(|(line, mark)| Line::styled(format!(" {mark} {line}"), style)).collect()
}
