//! The title and the verdict: is money flowing, is it right, does anything need me?

use ratatui::text::{Line, Span};

use crate::{
    embedded,
    pipeline::{command::StageName, supervise::Health, verdict::Way},
    tui::{
        keys::Pane,
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
    if hosted().next().is_none() {
        return vec![scene.mark(State::Idle, "no stage yet")];
    }
    // What stages stand on comes first: with a service down, all that run are no comfort.
    let ailing = scene.now.services.iter().filter(|(_, it)| matches!(it, embedded::Health::Ailing(_)));
    let mut marks: Vec<(State, String)> = ailing.map(|(name, _)| (State::Late, format!("{name} ailing"))).collect();
    if scene.now.ending.is_some() {
        marks.push((State::Waiting, "draining".to_owned()));
    }
    // In an end the bank has ended and the schedule is held, as they should.
    let expected = |name: StageName, state: State| scene.now.ending.is_some() && matches!(state, State::Idle | State::Waiting) && name != StageName::Mail;
    let stages = hosted().map(|(name, it)| (*name, theme::of_stage(*name, it, scene.now.at)));
    let odd = stages.filter(|(name, (state, _))| *state != State::Running && !expected(*name, *state));
    marks.extend(odd.map(|(name, (state, word))| (state, format!("{name} {word}"))));
    if marks.is_empty() {
        return vec![scene.mark(State::Running, "all stages running")];
    }
    let mut spans = Vec::new();
    for (state, words) in marks {
        if !spans.is_empty() {
            spans.push(scene.dim(" · "));
        }
        spans.push(scene.mark(state, &words));
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

/// The keys that lead out, as they work here.
fn hint(scene: Scene) -> Option<String> {
    let (app, now) = (scene.app, scene.now);
    if app.silent.is_some() {
        return None;
    }
    Some(match now.verdict.way.as_ref()? {
        Way::Retry { .. } if app.zoomed && app.focus == Pane::Dags => "Enter log · r retry".to_owned(),
        Way::Retry { .. } => "3 Enter log · r retry".to_owned(),
        Way::Resume { stages } => {
            let here = app.pause_target(now);
            // On the screen of another stage the key is for that one.
            let elsewhere = || stages.first().map(|it| format!(":resume {it}"));
            if stages.contains(&here) { format!("p resumes {here}") } else { elsewhere()? }
        }
        Way::Trigger { .. } => "t starts a run".to_owned(),
        Way::Mails => ":mail".to_owned(),
    })
}

/// Always as many lines, however much there is to say: what stands below does not move when something fails.
pub(super) fn verdict(scene: Scene, width: u16, count: usize) -> Vec<Line<'static>> {
    let (state, text) = sentence(scene);
    let style = scene.theme.state(state);
    let lines = said(&text, hint(scene).as_deref(), usize::from(width).saturating_sub(4), count);
    let marks = std::iter::once(state.glyph()).chain(std::iter::repeat(" "));
    lines.into_iter().zip(marks).map(|(line, mark)| Line::styled(format!(" {mark} {line}"), style)).collect()
}

/// The sentence and its keys on `count` lines. The keys are never broken; what gives way is the end of the sentence.
fn said(text: &str, hint: Option<&str>, width: usize, count: usize) -> Vec<String> {
    let mut lines = row::wrap(text, width);
    let whole = lines.len() <= count;
    let hint = hint.map(|it| format!(" · {it}")).filter(|it| row::width_of(it) * 2 <= width).unwrap_or_default();
    let last = lines.len().min(count).saturating_sub(1);
    let fits = lines.get(last).is_some_and(|it| row::width_of(it) + row::width_of(&hint) <= width);
    if whole && !fits && lines.len() < count {
        lines.push(hint.trim_start_matches(" · ").to_owned());
    } else if let Some(line) = lines.get(last).cloned() {
        let rest = lines.split_off(last).join(" ");
        let short = if whole && fits { line } else { row::clip(&rest, width.saturating_sub(row::width_of(&hint))) };
        lines.push(short + &hint);
    }
    lines.resize(count, String::new());
    lines
}

#[cfg(test)]
mod tests {
    use super::said;

    #[test]
    fn keys_are_never_broken_and_the_lines_are_always_as_many() {
        assert_eq!(said("all well", Some("p"), 20, 2), ["all well · p", ""]);
        assert_eq!(said("one two three four", Some("r retry"), 20, 2), ["one two three four", "r retry"]);
        assert_eq!(said("one two three four five six seven", Some("r retry"), 20, 2), ["one two three four", "five six … · r retry"]);
        assert_eq!(said("one two three four five six seven eight nine", None, 20, 2), ["one two three four", "five six seven eigh…"]);
    }
}
