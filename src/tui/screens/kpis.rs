//! The ten numbers: what they are, how they moved with the last refreshes, as of when.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    text::{Line, Span},
};

use crate::{
    kpi::{DayAmount, Kpis},
    refresh::{Earlier, KpiStats},
    tui::{
        keys::Pane,
        parts::{frame, number, row, spark},
        theme::State,
    },
    units::{Money, grouped},
    warehouse::Cut,
};

use super::Scene;

const NAME: usize = 20;
const VALUE: usize = 15;
const CHANGE: usize = 13;

pub(super) fn pane(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Kpis, note(scene, area.width));
    // Without a cut there is nothing that the numbers are of: zeros would be a claim.
    let Some(kpis) = kpis(scene).filter(|_| cut(scene).is_some()) else {
        return super::teach(frame, inside, scene, &nothing_yet(scene));
    };
    let width = usize::from(inside.width);
    let mut lines = numbers(scene, width);
    if usize::from(inside.height) < 10 {
        // Accounts and customers share a line where lines are few.
        lines.truncate(3);
        lines.push(row::ends(
            " Accounts / customers",
            format!("{} / {} ", grouped(kpis.total_accounts), grouped(kpis.total_customers)),
            width.min(NAME + VALUE + 2),
        ));
    }
    let moved = pairs(scene, " moved", kpis.transaction_amount_by_type.iter().map(|it| (it.txn_type.as_str(), it.amount)), width);
    let averages = pairs(scene, " average", kpis.average_balance_by_account_type.iter().map(|it| (it.account_type.as_str(), it.average)), width);
    // A line for each and one for the days; what is free beyond that goes to them in turn.
    let free = usize::from(inside.height).saturating_sub(lines.len() + 3);
    let more = (moved.len() - 1).min(free);
    lines.extend(first(scene, moved, 1 + more));
    lines.extend(first(scene, averages, 1 + free - more));
    lines.push(days(scene, kpis, width));
    if usize::from(inside.height) > lines.len() + 4 {
        lines.push(Line::default());
        lines.extend(customers(scene, kpis, width));
    }
    let height = inside.height.into();
    frame::lines(frame, inside, first(scene, lines, height));
}

fn kpis(scene: Scene<'_>) -> Option<&Kpis> {
    shown(scene).map(|it| &it.reading.kpis)
}

/// Those of this process, until there are some those that it found.
fn shown(scene: Scene<'_>) -> Option<&KpiStats> {
    let refresh = &scene.now.refresh;
    refresh.kpis.as_ref().or_else(|| refresh.earlier.as_ref()?.kpis.as_ref())
}

fn cut(scene: Scene) -> Option<Cut> {
    shown(scene)?.reading.cut
}

/// Only who has looked may say that there is nothing.
fn nothing_yet(scene: Scene) -> String {
    match &scene.now.refresh.earlier {
        None => "Not read yet: the warehouse is being asked for the KPIs it has.".to_owned(),
        Some(Earlier { unread: Some(why), .. }) => format!("The KPIs could not be read: {why}. The next run of both DAGs makes new ones; t starts it now."),
        Some(_) => "No KPIs yet. The first run of both DAGs makes them; t starts it now.".to_owned(),
    }
}

/// What moment the numbers are true for.
fn note(scene: Scene, width: u16) -> Line<'static> {
    let Some(cut) = cut(scene) else { return Line::default() };
    // Another day's time of day would mislead.
    let same_day = cut.committed_at.date_naive() == scene.now.at.date_naive();
    let at = cut.committed_at.format(if same_day { "%H:%M:%S%.3f" } else { "%F %H:%M:%S" });
    match &scene.now.refresh.kpis {
        Some(_) => Line::from(scene.dim(format!(" as of {at} "))),
        // The pane's name has the first claim on its line.
        None => {
            let short = cut.committed_at.format(if same_day { "%H:%M:%S" } else { "%F" });
            let words = if width < 60 { format!("earlier, {short}") } else { format!("before this start, as of {at}") };
            Line::from(vec![Span::raw(" "), scene.mark(State::Stale, &words), Span::raw(" ")])
        }
    }
}

/// The single numbers with their line and their change since the refresh before.
fn numbers(scene: Scene, width: usize) -> Vec<Line> {
    let count = |it: u64| Some(i64::try_from(it).unwrap_or(i64::MAX));
    let cents = |it: Option<Money>| it.map(Money::cents);
    vec![
        number_row(scene, "Total balance", true, width, |it| Some(it.total_balance.cents())),
        number_row(scene, "Transactions", false, width, |it| count(it.total_transactions)),
        number_row(scene, "Average per account", true, width, |it| cents(it.average_balance_per_account)),
        number_row(scene, "Average of the types", true, width, |it| cents(it.average_balance_per_account_type)),
        number_row(scene, "Accounts", false, width, |it| count(it.total_accounts)),
        number_row(scene, "Customers", false, width, |it| count(it.total_customers)),
    ]
}

fn number_row<'a>(scene: Scene<'a>, name: &'a str, is_money: bool, width: usize, of: impl Fn(&Kpis) -> Option<i64>) -> Line<'a> {
    let past: Vec<i64> = scene.app.trend.iter().filter_map(|it| of(&it.reading.kpis)).collect();
    let value = kpis(scene).and_then(&of);
    let cell = VALUE.min(width.saturating_sub(NAME + 2));
    let written = |it: i64| if is_money { number::money(Money::from_cents(it), cell) } else { number::count(it.unsigned_abs(), cell) };
    let text = value.map_or_else(|| format!("{:>cell$}", "–"), written);
    let mut line = Line::from(vec![Span::raw(format!(" {name:<NAME$}")), scene.strong(text)]);
    let room = width.saturating_sub(line.width() + CHANGE + 3);
    if room >= 6 {
        // The lowest seen is the ground: what matters is the movement.
        let ground = past.iter().min().copied().unwrap_or_default();
        let above = past.iter().map(|it| it.abs_diff(ground));
        line.push_span(scene.state(State::Running, format!("  {}", spark::bars(above.collect::<Vec<_>>().into_iter(), room.min(20)))));
        line.push_span(change(scene, &past, is_money));
    }
    line
}

fn change<'a>(scene: Scene<'a>, past: &[i64], is_money: bool) -> Span<'a> {
    let [.., before, last] = past else { return scene.dim(format!("{:>CHANGE$}", "–")) };
    let by = last - before;
    let sign = if by < 0 { "-" } else { "+" };
    let size = if is_money { Money::from_cents(by).grouped().trim_start_matches('-').to_owned() } else { grouped(by.unsigned_abs()) };
    if by == 0 { scene.dim(format!("{:>CHANGE$}", "=")) } else { Span::raw(format!("{:>CHANGE$}", format!("{sign}{size}"))) }
}

/// Name and amount side by side, each whole, on as many lines as it takes.
fn pairs<'a>(scene: Scene<'a>, title: &'static str, pairs: impl Iterator<Item = (&'a str, Money)>, width: usize) -> Vec<Line<'a>> {
    let mut lines = vec![Line::from(scene.dim(format!("{title:<9}")))];
    for (name, amount) in pairs {
        let pair = [Span::raw(format!(" {}", short(name))), scene.strong(format!(" {}", amount.grouped())), Span::raw(" ")];
        // A cell is left for the mark of what has no room.
        let full = lines.last().is_some_and(|it| it.spans.len() > 1 && it.width() + pair.iter().map(Span::width).sum::<usize>() >= width);
        if full {
            lines.push(Line::from(" ".repeat(9)));
        }
        if let Some(line) = lines.last_mut() {
            line.extend(pair);
        }
    }
    lines
}

/// The first lines; where there are more, the last one says so.
fn first<'a>(scene: Scene<'a>, mut lines: Vec<Line<'a>>, count: usize) -> Vec<Line<'a>> {
    if lines.len() > count {
        lines.truncate(count);
        if let Some(last) = lines.last_mut() {
            last.push_span(scene.dim("…"));
        }
    }
    lines
}

fn short(name: &str) -> String {
    name.to_lowercase()
}

/// The days as one line.
fn days<'a>(scene: Scene<'a>, kpis: &Kpis, width: usize) -> Line<'a> {
    let days = &kpis.transaction_amount_over_time;
    let Some(last) = days.last() else { return Line::from(scene.dim(" no day yet")) };
    let right = format!("{} {} ", last.date, last.amount.grouped());
    let room = width.saturating_sub(12 + right.len()).min(40);
    let bars = spark::bars(days.iter().map(root), room);
    row::ends(vec![scene.dim(" by day √ "), scene.state(State::Running, bars)], right, width)
}

/// One large day would flatten all others: bars grow with the square root.
fn root(day: &DayAmount) -> u64 {
    day.amount.cents().max(0).unsigned_abs().isqrt()
}

fn customers<'a>(scene: Scene<'a>, kpis: &'a Kpis, width: usize) -> Vec<Line<'a>> {
    let mut lines = vec![Line::from(scene.strong(" Customers with the highest balance"))];
    for it in &kpis.total_customers_balance {
        lines.push(row::ends(format!(" {:>6} {}", it.customer_id, it.customer), format!("{} ", it.balance.grouped()), width.min(60)));
    }
    lines
}

fn table<'a>(scene: Scene<'a>, title: &'a str, pairs: impl Iterator<Item = (&'a str, Money)>, width: usize) -> Vec<Line<'a>> {
    let rows = pairs.map(|(name, amount)| row::ends(format!(" {}", short(name)), format!("{} ", amount.grouped()), width.min(44)));
    std::iter::once(Line::from(scene.strong(title))).chain(rows).collect()
}

pub(super) fn screen(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Kpis, note(scene, area.width));
    // Without a cut there is nothing that the numbers are of: zeros would be a claim.
    let Some(kpis) = kpis(scene).filter(|_| cut(scene).is_some()) else {
        return super::teach(frame, inside, scene, &nothing_yet(scene));
    };
    let [left, right] = Layout::horizontal([Constraint::Percentage(if inside.width < 100 { 54 } else { 50 }), Constraint::Fill(1)]).areas(inside);
    let width = usize::from(left.width);
    let by_type = kpis.transaction_amount_by_type.iter().map(|it| (it.txn_type.as_str(), it.amount));
    let averages = kpis.average_balance_by_account_type.iter().map(|it| (it.account_type.as_str(), it.average));
    let parts = [
        numbers(scene, width),
        table(scene, " Transaction amount by type", by_type, width),
        table(scene, " Average balance by account type", averages, width),
        vec![books(scene)],
    ];
    frame::lines(frame, left, apart(parts, left.height.into()));

    let width = usize::from(right.width);
    let mut lines = customers(scene, kpis, width);
    lines.push(Line::default());
    let room = usize::from(right.height).saturating_sub(lines.len() + 1);
    lines.extend(over_time(scene, kpis, width, room));
    frame::lines(frame, right, lines);
}

/// Parts with a blank line between them, as far as there is room for blank lines.
fn apart<const N: usize>(parts: [Vec<Line<'_>>; N], height: usize) -> Vec<Line<'_>> {
    let mut blanks = height.saturating_sub(parts.iter().map(Vec::len).sum());
    let mut lines = Vec::new();
    for part in parts {
        if !lines.is_empty() && blanks > 0 {
            blanks -= 1;
            lines.push(Line::default());
        }
        lines.extend(part);
    }
    lines
}

/// One bar a day, the newest at the top; those that have no room are reached by scrolling, and counted.
fn over_time<'a>(scene: Scene<'a>, kpis: &'a Kpis, width: usize, room: usize) -> Vec<Line<'a>> {
    let days = &kpis.transaction_amount_over_time;
    let most = days.iter().map(root).max().unwrap_or_default().max(1);
    let amount = days.iter().map(|it| it.amount.grouped().len()).max().unwrap_or_default();
    let bar = u64::try_from(width.saturating_sub(amount + 14).min(40)).unwrap_or_default();
    let day = |it: &'a DayAmount| {
        let length = usize::try_from(root(it).saturating_mul(bar).div_ceil(most)).unwrap_or_default();
        Line::from(vec![Span::raw(format!(" {} {:>amount$} ", it.date, it.amount.grouped())), scene.state(State::Running, "█".repeat(length))])
    };
    let all = days.len() <= room;
    // One line is for what is not seen.
    let rows = if all { room } else { room.saturating_sub(1).max(1) };
    let end = days.len().saturating_sub(rows);
    scene.app.sheet_end.set(end);
    let from = scene.app.selected(Pane::Kpis).min(end);
    let title = Line::from(vec![scene.strong(" Transaction amount by day"), scene.dim(" bars √")]);
    let mut lines: Vec<Line> = std::iter::once(title).chain(days.iter().rev().skip(from).take(rows).map(day)).collect();
    if !all {
        let hidden = |count: usize, key: &str, word: &str| (count > 0).then(|| format!("{key} {count} {word}"));
        let said = [hidden(end - from, "j", "older"), hidden(from, "k", "newer")].into_iter().flatten().collect::<Vec<_>>().join(" · ");
        lines.push(Line::from(scene.dim(format!(" … {said}"))));
    }
    lines
}

/// Whether the numbers were proven.
fn books(scene: Scene) -> Line<'static> {
    let Some(reconcile) = &scene.now.refresh.reconcile else { return Line::from(scene.dim(" not reconciled since the start")) };
    let at = number::clock(reconcile.settled_at);
    let checks = reconcile.report.checks.len();
    let wrong = reconcile.report.checks.iter().filter(|it| !it.ok).count();
    let mark = match (wrong, reconcile.report.ok) {
        (0, true) => scene.mark(State::Ok, &format!("books balance: {checks} checks at {at}")),
        (0, false) => scene.mark(State::Waiting, &format!("{checks} checks hold so far, at {at}")),
        (wrong, _) => scene.mark(State::Failed, &format!("{wrong} of {checks} checks differ, at {at}")),
    };
    Line::from(vec![Span::raw(" "), mark])
}
