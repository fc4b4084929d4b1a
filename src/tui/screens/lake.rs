//! The lake: files, rows and bytes per table, what has not landed yet; on its own screen the newest objects.

use chrono::DateTime;
use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    text::{Line, Span},
};

use crate::{
    lake::{NewObject, TableStats},
    pipeline::command::StageName,
    tui::{
        keys::Pane,
        parts::{frame, number, row},
        rows,
        theme::State,
    },
    units::{bytes_for_people, grouped},
};

use super::{Scene, stream::joined};

const NAME: usize = 14;

/// A record that has waited longer than this to land is late.
const LATE_MS: i64 = 30_000;

pub(super) fn pane(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Lake, super::stage_note(scene, StageName::Lake));
    let (width, height) = (usize::from(inside.width), usize::from(inside.height));
    let tables = tables(scene);
    if tables.is_empty() {
        return super::teach(frame, inside, scene, "No object yet. The first lands a moment after the first payment.");
    }
    let with_head = height > tables.len();
    let with_foot = height > tables.len() + 1;
    let wide = width >= 50;
    let mut lines = Vec::new();
    if with_head {
        lines.push(head(scene, wide, width));
    }
    let room = height - usize::from(with_head) - usize::from(with_foot);
    lines.extend(tables.into_iter().take(room).map(|(name, stats)| table_row(scene, name, stats, wide, width)));
    lines.resize(height - usize::from(with_foot), Line::default());
    if with_foot {
        lines.push(landing(scene, width));
    }
    frame::lines(frame, inside, lines);
    super::age(frame, inside, scene, StageName::Lake);
}

fn tables(scene: Scene<'_>) -> Vec<(&str, &TableStats)> {
    let mut tables: Vec<_> = scene.now.lake.tables.iter().map(|(name, stats)| (name.as_str(), stats)).collect();
    tables.sort_by_key(|it| rows::rank(it.0));
    tables
}

fn head(scene: Scene<'_>, wide: bool, width: usize) -> Line<'_> {
    // Beside the stream's totals, which are of all times.
    let left = format!(" {:<NAME$}{:>6}{:>10}", "since start", "files", "rows");
    let left = if wide { format!("{left}{:>12}", "bytes") } else { left };
    row::ends(Line::from(scene.dim(left)), Line::from(scene.dim(if wide { "unlanded " } else { "waits " })), width)
}

fn table_row<'a>(scene: Scene<'a>, name: &str, stats: &TableStats, wide: bool, width: usize) -> Line<'a> {
    let text = format!(" {}{}{}", row::fit(name, NAME), number::cell(stats.objects, 6), number::cell(stats.records, 10));
    let text = if wide { format!("{text}{}", number::bytes(stats.bytes, 12)) } else { text };
    row::ends(text, Line::from(vec![unlanded(scene, stats, wide), Span::raw(" ")]), width)
}

/// How long the oldest record has waited to land.
fn unlanded(scene: Scene, stats: &TableStats, with_glyph: bool) -> Span<'static> {
    match stats.oldest_unlanded_ms {
        None => scene.dim("–"),
        Some(since) => {
            let waits = scene.now.at.timestamp_millis() - since;
            match (waits > LATE_MS, with_glyph) {
                (false, _) => Span::raw(number::age(waits)),
                (true, true) => scene.mark(State::Late, &number::age(waits)),
                (true, false) => scene.state(State::Late, number::age(waits)),
            }
        }
    }
}

/// How fast records land, and what is in the way.
fn landing(scene: Scene, width: usize) -> Line {
    let lake = &scene.now.lake;
    let mut parts = Vec::new();
    if let Some(trouble) = lake.store_trouble.as_ref().or(lake.kafka_trouble.as_ref()) {
        parts.push(scene.mark(State::Late, &row::clip(trouble, width.saturating_sub(8))));
    }
    match (lake.landing.percentile_ms(50), lake.landing.percentile_ms(99)) {
        (Some(p50), Some(p99)) => parts.push(Span::raw(format!("landed p50 {} p99 {}", milliseconds(p50), milliseconds(p99)))),
        _ => parts.push(scene.dim("nothing landed yet")),
    }
    let letters: u64 = lake.tables.values().map(|it| it.dead_letters).sum();
    if letters > 0 {
        parts.push(scene.mark(State::Failed, &format!("dead letters {}", grouped(letters))));
    }
    if let Some(proof) = &scene.app.proof {
        let at = number::clock(proof.at);
        parts.push(if proof.ok { Span::raw(format!("verified {at}")) } else { scene.mark(State::Failed, "proof broken, v") });
    }
    parts.push(Span::raw(format!("lag {}", lake.lag().map_or_else(|| "–".to_owned(), grouped))));
    joined(scene, parts, width)
}

fn milliseconds(value: u64) -> String {
    number::age(i64::try_from(value).unwrap_or(i64::MAX))
}

pub(super) fn screen(frame: &mut Frame, area: Rect, scene: Scene) {
    let inside = super::boxed(frame, area, scene, Pane::Lake, super::stage_note(scene, StageName::Lake));
    let width = usize::from(inside.width);
    let tables: Vec<Line> = std::iter::once(Line::from(scene.dim(row::clip(&wide_head(), width))))
        .chain(tables(scene).into_iter().map(|(name, stats)| wide_row(scene, name, stats, width)))
        .chain([landing(scene, width), Line::default()])
        .collect();
    let [top, below] = Layout::vertical([Constraint::Length(u16::try_from(tables.len()).unwrap_or(u16::MAX)), Constraint::Min(3)]).areas(inside);
    frame::lines(frame, top, tables);
    frame::lines(frame, below, objects(scene, below));
    super::age(frame, inside, scene, StageName::Lake);
}

fn wide_head() -> String {
    format!(" {:<NAME$}{:>7}{:>11}{:>10}{:>8}{:>10}{:>12}", "since start", "files", "rows", "bytes", "open", "unlanded", "to load")
}

/// Everything about a table, the warehouse's backlog included.
fn wide_row<'a>(scene: Scene<'a>, name: &str, stats: &TableStats, width: usize) -> Line<'a> {
    let load = scene.now.refresh.loads.get(name);
    let (files, counted) = (number::cell(stats.objects, 7), number::cell(stats.records, 11));
    let text = format!(" {}{files}{counted}{}{}", row::fit(name, NAME), number::bytes(stats.bytes, 10), number::cell(stats.open_records, 8));
    let waits = unlanded(scene, stats, true);
    let mut spans = vec![Span::raw(text), Span::raw(" ".repeat(10_usize.saturating_sub(waits.width()))), waits];
    if width >= 74 {
        spans.push(match load {
            Some(load) if load.loading => scene.state(State::Running, format!("{:>12}", "loading")),
            Some(load) => Span::raw(number::cell(load.rows_pending, 12)),
            None => scene.dim(format!("{:>12}", "–")),
        });
    }
    Line::from(spans)
}

fn objects(scene: Scene, area: Rect) -> Vec<Line> {
    let objects = rows::objects(scene.now, scene.filter(Pane::Lake));
    let (width, height) = (usize::from(area.width), usize::from(area.height));
    let mut lines = vec![Line::from(vec![scene.strong(" newest objects"), scene.dim("   landed, table, offsets")])];
    if objects.is_empty() {
        let why = if scene.filter(Pane::Lake).is_empty() { " None yet." } else { " None of the newest holds this text. Esc shows all." };
        lines.push(Line::from(scene.dim(why)));
        return lines;
    }
    let selected = scene.app.object_of(&objects);
    let shown = super::window(selected, objects.len(), height.saturating_sub(1));
    for place in shown {
        let line = object_row(scene, objects[place], width);
        lines.push(if place == selected { row::styled(line, scene.theme.selected()) } else { line });
    }
    lines
}

fn object_row<'a>(scene: Scene, object: &NewObject, width: usize) -> Line<'a> {
    let landed = DateTime::from_timestamp_millis(object.landed_at_ms).map_or_else(|| "–".to_owned(), number::clock);
    let ago = number::age(scene.now.at.timestamp_millis() - object.landed_at_ms);
    let right = format!("{}{}{ago:>8} ago ", number::cell(object.rows, 9), number::bytes(object.bytes, 9));
    // The end of a key tells more than its beginning: offsets and hash.
    row::ends(format!(" {landed} {} {}", row::fit(&object.table, NAME), offsets(&object.key)), right, width)
}

/// `0–1,203` out of `raw/…/p=0/0…0-0…1203-hash.parquet`.
fn offsets(key: &str) -> String {
    let file = key.rsplit('/').next().unwrap_or(key);
    let mut parts = file.split('-').map(|it| it.parse::<u64>().map(grouped));
    match (parts.next(), parts.next()) {
        (Some(Ok(first)), Some(Ok(last))) => format!("{first}–{last}"),
        _ => file.to_owned(),
    }
}

/// What is known about an object before its commit record is read.
pub(super) fn details(scene: Scene, key: &str) -> (String, Vec<String>) {
    let title = format!("offsets {}", offsets(key));
    let mut lines = vec![key.to_owned()];
    if let Some(object) = scene.now.lake.newest.iter().find(|it| it.key == key) {
        let landed = DateTime::from_timestamp_millis(object.landed_at_ms).map_or_else(|| "–".to_owned(), number::clock);
        lines.push(format!("{} rows, {}, landed {landed}", grouped(object.rows), bytes_for_people(object.bytes)));
    }
    (title, lines)
}

/// What a walk through the lake has before it.
pub(super) fn to_prove(scene: Scene) -> (String, Vec<String>) {
    let lake = &scene.now.lake;
    let (objects, bytes) = lake.tables.values().fold((0, 0), |sum, it| (sum.0 + it.objects, sum.1 + it.bytes));
    let landed = format!("{} objects, {}", grouped(objects), bytes_for_people(bytes));
    let said = format!("Every commit record of every lane, every object's hash and rows: {landed} since the start, and all before.");
    ("proof of the lake".to_owned(), vec![said])
}
