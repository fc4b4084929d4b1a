//! One line of a table: columns of fixed width, the text column takes what is left.

use ratatui::{
    style::Style,
    text::{Line, Span},
};

/// Terminal cells that a text takes.
pub(crate) fn width_of(text: &str) -> usize {
    Span::raw(text).width()
}

/// Text in exactly `width` cells; what does not fit ends in `…`.
pub(crate) fn fit(text: &str, width: usize) -> String {
    let clipped = clip(text, width);
    let missing = width.saturating_sub(width_of(&clipped));
    clipped + &" ".repeat(missing)
}

/// Text in at most `width` cells, on one line.
pub(crate) fn clip(text: &str, width: usize) -> String {
    let text = text.lines().next().unwrap_or_default();
    if width_of(text) <= width {
        return text.to_owned();
    }
    let mut short = String::new();
    for letter in text.chars() {
        let mut wider = short.clone();
        wider.push(letter);
        if width_of(&wider) + 1 > width {
            break;
        }
        short = wider;
    }
    if width > 0 {
        short.push('…');
    }
    short
}

/// Left and right on one line of `width`; the right side stays whole, the left gives way.
pub(crate) fn ends<'a>(left: impl Into<Line<'a>>, right: impl Into<Line<'a>>, width: usize) -> Line<'a> {
    let (left, right) = (left.into(), right.into());
    let room = width.saturating_sub(right.width());
    let mut spans = Vec::new();
    let mut used = 0;
    for span in left.spans {
        let left_room = room.saturating_sub(used + usize::from(right.width() > 0));
        if left_room == 0 {
            break;
        }
        let text = clip(&span.content, left_room);
        used += width_of(&text);
        spans.push(Span::styled(text, span.style));
    }
    spans.push(Span::raw(" ".repeat(room.saturating_sub(used))));
    spans.extend(right.spans);
    Line::from(spans)
}

/// Words broken into lines of at most `width` cells; a longer word is broken inside. What begins indented stays so.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.lines() {
        let words = paragraph.trim_start_matches(' ');
        let indent = " ".repeat((paragraph.len() - words.len()).min(width / 2));
        let mut line = indent.clone();
        for word in words.split(' ') {
            let gap = usize::from(line.len() > indent.len());
            if width_of(&line) + gap + width_of(word) <= width {
                line.push_str(&" "[..gap]);
                line.push_str(word);
                continue;
            }
            if line.len() > indent.len() {
                lines.push(std::mem::replace(&mut line, indent.clone()));
            }
            for letter in word.chars() {
                if width_of(&line) + 1 > width {
                    lines.push(std::mem::replace(&mut line, indent.clone()));
                }
                line.push(letter);
            }
        }
        lines.push(line);
    }
    lines
}

/// Styles a whole line, as for the selected row.
pub(crate) fn styled(line: Line<'_>, style: Style) -> Line<'_> {
    Line::from(line.spans.into_iter().map(|span| Span::styled(span.content, span.style.patch(style))).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_says_so() {
        assert_eq!(fit("ledger_entries", 8), "ledger_…");
        assert_eq!(fit("bank", 6), "bank  ");
        assert_eq!(clip("anything", 0), "");
    }

    #[test]
    fn the_right_end_stays_whole() {
        let line = ends("a long name on the left", "1,234", 12);
        assert_eq!(line.to_string(), "a lon… 1,234");
    }

    #[test]
    fn words_wrap_and_long_ones_break() {
        assert_eq!(wrap("books differ: accounts", 10), ["books", "differ:", "accounts"]);
        assert_eq!(wrap("abcdefgh", 3), ["abc", "def", "gh"]);
        assert_eq!(wrap("one\ntwo", 10), ["one", "two"]);
        assert_eq!(wrap("  \"op\": \"c\"", 10), ["  \"op\":", "  \"c\""]);
        assert_eq!(wrap("", 10), Vec::<String>::new());
    }
}
