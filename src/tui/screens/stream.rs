//! Topics: what flows, how fast, how far the lake is behind; on its own screen partitions, a minute's curve, the slot.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    symbols::Marker,
    text::{Line, Span},
    widgets::{Axis, Chart, Dataset, GraphType},
};

use crate::{
    cdc::{SlotHealth, Step},
    pipeline::{
        command::StageName,
        snapshot::{Flow, HISTORY_SECONDS},
        supervise::Health,
    },
    tui::{
        keys::Pane,
        parts::{frame, number, row, spark},
        rows,
        theme::State,
    },
    units::{bytes_for_people, grouped},
};

use super::Scene;

const NAME: usize = 15;

pub(super) fn pane(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Stream, super::stage_note(scene, StageName::Cdc));
    let topics = rows::topics(scene.now, "");
    let (width, height) = (usize::from(inside.width), usize::from(inside.height));
    if topics.is_empty() {
        return super::teach(frame, inside, scene, &nothing_yet(scene));
    }
    let with_head = height > topics.len();
    let with_slot = height > topics.len() + 1;
    let columns = Columns::new(width);
    let mut lines = Vec::new();
    if with_head {
        lines.push(columns.head(scene));
    }
    let room = height - usize::from(with_head) - usize::from(with_slot);
    lines.extend(topics.iter().take(room).map(|(name, flow)| columns.row(scene, name, flow)));
    lines.resize(height - usize::from(with_slot), Line::default());
    if with_slot {
        lines.push(slot_line(scene, width));
    }
    frame::lines(frame, inside, lines);
    // Capture fills the topics, the lake tells how far they are.
    super::age(frame, inside, scene, StageName::Cdc);
    super::age(frame, inside, scene, StageName::Lake);
}

/// Widths of the table's columns; the curve takes what is left.
struct Columns {
    name: usize,
    rate: usize,
    curve: usize,
    lag: usize,
    total: usize,
}

impl Columns {
    fn new(width: usize) -> Self {
        let (rate, lag, total) = if width < 50 { (6, 6, 10) } else { (8, 9, 12) };
        // A blank before the border, where there is room for one.
        let width = if width < 50 { width } else { width - 1 };
        let left = width.saturating_sub(NAME + rate + lag + total + 1);
        // A curve of fewer cells says nothing.
        let curve = if left < 8 { 0 } else { (left - 2).min(HISTORY_SECONDS / 2) };
        Self { name: NAME, rate, curve, lag, total: total + left.min(if curve == 0 { left } else { left - curve - 2 }) }
    }

    fn head(&self, scene: Scene) -> Line<'static> {
        let curve = if self.curve > 0 { format!("  {}", row::fit(if self.curve < 9 { "60 s" } else { "last 60 s" }, self.curve)) } else { String::new() };
        let (name, rate, lag, total) = (self.name, self.rate, self.lag, self.total);
        Line::from(scene.dim(format!(" {:<name$}{:>rate$}{curve}{:>lag$}{:>total$}", "topic", "msg/s", "lag", "total")))
    }

    fn row(&self, scene: Scene, name: &str, flow: &Flow) -> Line<'static> {
        let rate = if flow.per_second > 0 { State::Running } else { State::Idle };
        let mut spans = vec![Span::raw(format!(" {}", row::fit(name, self.name))), Span::raw(number::cell(flow.per_second, self.rate))];
        if self.curve > 0 {
            spans.push(scene.state(rate, format!("  {}", spark::bars(flow.history.iter().copied(), self.curve))));
        }
        spans.push(Span::raw(format!("{}{}", number::cell(flow.lag, self.lag), number::cell(flow.total, self.total))));
        Line::from(spans)
    }
}

fn nothing_yet(scene: Scene) -> String {
    let cdc = &scene.now.cdc;
    match (&cdc.waiting_for, cdc.step, &cdc.snapshot) {
        (Some(what), _, _) => format!("No message yet: capture waits for {what}."),
        (None, Step::Snapshot, Some(progress)) => {
            format!("Reading what the bank holds: {} of {} tables done, {} rows.", progress.tables_done, progress.tables, grouped(progress.rows))
        }
        _ => "No topic yet. Capture makes them when the bank is there.".to_owned(),
    }
}

/// What a crash would read again, whether the slot lives, what could not be understood. The least urgent gives way.
fn slot_line(scene: Scene, width: usize) -> Line<'static> {
    let cdc = &scene.now.cdc;
    // Who is held looks at nothing: what was seen last may have changed since, and be the very reason.
    let looking = !matches!(scene.now.stage(StageName::Cdc).map(|it| &it.health), Some(Health::Held { .. } | Health::Failed { .. }));
    let mut parts = if looking { vec![Span::raw(format!("WAL {} behind", bytes_for_people(cdc.lag_bytes)))] } else { Vec::new() };
    parts.push(match &cdc.slot {
        _ if !looking => scene.mark(State::Failed, "nobody reads the slot"),
        Some(SlotHealth { wal_status, .. }) if wal_status == "lost" => scene.mark(State::Failed, "slot lost"),
        Some(slot) if slot.in_danger() => scene.mark(State::Failed, "slot in danger"),
        Some(SlotHealth { active: true, .. }) => Span::raw("slot active"),
        Some(_) => scene.mark(State::Late, "slot idle"),
        None => scene.dim("no slot yet"),
    });
    if cdc.broker_away {
        parts.insert(0, scene.mark(State::Late, "broker away"));
    }
    let letters = format!("dead letters {}", grouped(cdc.dead_letters));
    parts.push(if cdc.dead_letters > 0 { scene.mark(State::Failed, &letters) } else { Span::raw(letters) });
    joined(scene, parts, width)
}

/// Facts side by side; those at the end that have no room are left out.
pub(super) fn joined<'a>(scene: Scene, parts: Vec<Span<'a>>, width: usize) -> Line<'a> {
    let mut line = Line::from(" ");
    for (place, part) in parts.into_iter().enumerate() {
        if line.width() + part.width() + 3 > width {
            break;
        }
        if place > 0 {
            line.push_span(scene.dim(" · "));
        }
        line.push_span(part);
    }
    line
}

pub(super) fn screen(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Stream, super::stage_note(scene, StageName::Cdc));
    let topics = rows::topics(scene.now, scene.filter(Pane::Stream));
    if topics.is_empty() {
        let why = if scene.filter(Pane::Stream).is_empty() { nothing_yet(scene) } else { "No topic holds this text. Esc shows all.".to_owned() };
        return super::teach(frame, inside, scene, &why);
    }
    let selected = scene.app.selected(Pane::Stream).min(topics.len() - 1);
    let lanes = lanes(scene, &topics, selected, inside.width.into());
    let facts = facts(scene, inside.width.into());
    let table = u16::try_from(lanes.len()).unwrap_or(u16::MAX);
    let below = u16::try_from(facts.len()).unwrap_or_default();
    let parts = [Constraint::Max(table), Constraint::Length(2), Constraint::Fill(1), Constraint::Max(below)];
    let [top, title, curve, foot] = Layout::vertical(parts).areas(inside);
    frame::lines(frame, top, lanes);
    let named = Line::from(vec![Span::raw(" "), scene.strong(topics[selected].0), scene.dim(", messages a second")]);
    frame::lines(frame, title, vec![Line::default(), named]);
    chart(frame, curve, scene, topics[selected].1);
    frame::lines(frame, foot, facts);
    super::age(frame, inside, scene, StageName::Cdc);
}

/// Topics with their partitions.
fn lanes<'a>(scene: Scene<'a>, topics: &[(&'a str, &'a Flow)], selected: usize, width: usize) -> Vec<Line<'a>> {
    let head = format!(" {:<NAME$}{:>5}{:>9}{:>13}{:>13}{:>9}", "topic", "part", "msg/s", "landed", "end", "lag");
    let mut lines = vec![Line::from(scene.dim(row::clip(&head, width)))];
    for (place, (name, flow)) in topics.iter().enumerate() {
        let lanes = scene.now.lake.lanes.iter().filter(|it| it.table == *name);
        for (n, lane) in lanes.enumerate() {
            let (shown, rate) = if n == 0 { (*name, number::cell(flow.per_second, 9)) } else { ("", " ".repeat(9)) };
            let offset = |it: Option<i64>| it.and_then(|it| u64::try_from(it).ok()).map_or_else(|| format!("{:>13}", "–"), |it| number::cell(it, 13));
            let lag = lane.lag().map_or_else(|| format!("{:>9}", "–"), |it| number::cell(it, 9));
            let text = format!(" {}{:>5}{rate}{}{}{lag}", row::fit(shown, NAME), lane.partition, offset(lane.landed_offset), offset(lane.end_offset));
            let mut spans = vec![Span::raw(text)];
            match &lane.trouble {
                Some(trouble) => spans.push(scene.mark(State::Failed, &format!(" {trouble}"))),
                None if width > 90 && n == 0 => {
                    let curve = spark::bars(flow.history.iter().copied(), (width - 70).min(HISTORY_SECONDS / 2));
                    spans.push(scene.state(State::Running, format!("  {curve}")));
                }
                None => {}
            }
            let line = Line::from(spans);
            lines.push(if place == selected && n == 0 { row::styled(line, scene.theme.selected()) } else { line });
        }
    }
    lines
}

/// The last minute of one topic, with an axis.
fn chart(frame: &mut Frame, area: Rect, scene: Scene, flow: &Flow) {
    let from = HISTORY_SECONDS.saturating_sub(flow.history.len());
    let points: Vec<(f64, f64)> = flow
        .history
        .iter()
        .enumerate()
        .map(|(second, count)| (f64::from(small(second + from)), f64::from(u32::try_from(*count).unwrap_or(u32::MAX))))
        .collect();
    let most = flow.history.iter().copied().max().unwrap_or_default().max(1);
    let style = scene.theme.state(State::Running);
    let data = Dataset::default().marker(Marker::Braille).graph_type(GraphType::Line).style(style).data(&points);
    let top = f64::from(u32::try_from(most).unwrap_or(u32::MAX));
    let chart = Chart::new(vec![data])
        .x_axis(Axis::default().style(scene.theme.dim()).bounds([0.0, f64::from(small(HISTORY_SECONDS - 1))]).labels(["60 s ago", "30 s", "now"]))
        .y_axis(Axis::default().style(scene.theme.dim()).bounds([0.0, top]).labels(["0".to_owned(), grouped(most)]));
    frame.render_widget(chart, area);
}

/// What waited while we were away took minutes; that is not said in milliseconds.
fn milliseconds(value: f64) -> String {
    if value < 10_000.0 { format!("{value:.0} ms") } else { number::seconds(value / 1000.0) }
}

fn small(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Capture and its slot in words and numbers.
fn facts(scene: Scene, width: usize) -> Vec<Line> {
    let cdc = &scene.now.cdc;
    let mut lines = vec![slot_line(scene, width)];
    let lsn = |name: &str, lsn: crate::change::Lsn| Span::raw(format!("{name} {lsn}"));
    if let Some(slot) = &cdc.slot {
        let safe = slot.safe_wal_bytes.and_then(|it| u64::try_from(it).ok()).map_or("no limit set".to_owned(), bytes_for_people);
        let parts = vec![
            Span::raw(format!("slot WAL {}", slot.wal_status)),
            lsn("confirmed", slot.confirmed_flush_lsn),
            lsn("restart", slot.restart_lsn),
            match slot.seconds_left {
                Some(left) => scene.mark(
                    if slot.in_danger() { State::Failed } else { State::Late },
                    &format!("safe for {safe}, {}", number::age(i64::try_from(left.saturating_mul(1000)).unwrap_or(i64::MAX))),
                ),
                None => Span::raw(format!("safe for {safe}")),
            },
        ];
        lines.push(joined(scene, parts, width));
    }
    let latency = format!("commit → broker p50 {}, p99 {}", milliseconds(cdc.latency.p50_ms), milliseconds(cdc.latency.p99_ms));
    let parts = vec![
        Span::raw(latency),
        Span::raw(format!("{} transactions", grouped(cdc.transactions))),
        Span::raw(format!("{} heartbeats", grouped(cdc.heartbeats))),
        Span::raw(format!("{} reconnects", grouped(cdc.reconnects))),
    ];
    lines.push(joined(scene, parts, width));
    if let Some(connector) = &cdc.connector {
        let told = format!("connector {} {}", connector.name, connector.shown());
        let failed = connector.state == "FAILED" || connector.tasks.iter().any(|it| it.state == "FAILED");
        let span = if failed { scene.mark(State::Failed, &told) } else { Span::raw(told) };
        lines.push(Line::from(vec![Span::raw(" "), span]));
    }
    if let Some(reading) = &cdc.incremental_snapshot {
        let told = format!(" reading {} again: {} of about {} rows", reading.table, grouped(reading.rows), grouped(reading.rows_estimated));
        lines.push(Line::from(scene.state(State::Running, told)));
    }
    if !cdc.uncaptured.is_empty() {
        lines.push(Line::from(vec![Span::raw(" "), scene.mark(State::Late, &format!("not captured, they were here before: {}", cdc.uncaptured.join(", ")))]));
    }
    if let Some(what) = &cdc.waiting_for {
        lines.push(Line::from(vec![Span::raw(" "), scene.mark(State::Late, &format!("waits for {what}"))]));
    }
    lines
}
