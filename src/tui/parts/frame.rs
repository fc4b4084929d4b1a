//! The box around a pane or a dialog.

use ratatui::{
    Frame,
    layout::{Constraint, Flex, Layout, Rect},
    style::Style,
    text::Line,
    widgets::{Block, BorderType, Clear, Paragraph},
};

/// Draws the box and returns what is inside. The one in focus is told by its heavier line as well.
pub(crate) fn pane<'a>(frame: &mut Frame, area: Rect, title: impl Into<Line<'a>>, note: impl Into<Line<'a>>, in_focus: bool, style: Style) -> Rect {
    let kind = if in_focus { BorderType::Thick } else { BorderType::Rounded };
    let block = Block::bordered().border_type(kind).border_style(style).title(title).title(note.into().right_aligned());
    let inside = block.inner(area);
    frame.render_widget(block, area);
    inside
}

/// Lines from the top; what has no room is left out.
pub(crate) fn lines(frame: &mut Frame, area: Rect, lines: Vec<Line<'_>>) {
    frame.render_widget(Paragraph::new(lines), area);
}

/// Lines of the frame that nothing lies on: title and verdict above, the keys that work below.
pub(crate) const KEPT: (u16, u16) = (3, 1);

/// A box in the middle, as large as its lines, with everything behind it wiped.
pub(crate) fn popup(frame: &mut Frame, title: &str, lines: Vec<Line<'_>>, style: Style) {
    popup_in(frame, Flex::Center, title, lines, style);
}

/// The same at the lower left.
pub(crate) fn popup_above_footer(frame: &mut Frame, title: &str, lines: Vec<Line<'_>>, style: Style) {
    popup_in(frame, Flex::End, title, lines, style);
}

fn popup_in(frame: &mut Frame, down: Flex, title: &str, lines: Vec<Line<'_>>, style: Style) {
    let whole = frame.area();
    let whole = Rect { y: whole.y + KEPT.0.min(whole.height), height: whole.height.saturating_sub(KEPT.0 + KEPT.1), ..whole };
    let widest = lines.iter().map(Line::width).chain([title.chars().count() + 2]).max().unwrap_or_default();
    let width = u16::try_from(widest + 4).unwrap_or(u16::MAX).min(whole.width);
    let height = u16::try_from(lines.len() + 2).unwrap_or(u16::MAX).min(whole.height);
    let [row] = Layout::vertical([Constraint::Length(height)]).flex(down).areas(whole);
    let [area] = Layout::horizontal([Constraint::Length(width)]).flex(if down == Flex::End { Flex::Start } else { down }).areas(row);
    frame.render_widget(Clear, area);
    let block =
        Block::bordered().border_type(BorderType::Thick).border_style(style).title(format!(" {title} ")).padding(ratatui::widgets::Padding::horizontal(1));
    frame.render_widget(Paragraph::new(lines).block(block), area);
}
