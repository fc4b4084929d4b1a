//! A line of `COPY … TO STDOUT` → the values of a row. Pure; one buffer is reused for all rows.

use super::{
    error::Poison,
    pgoutput::{Malformed, Value},
};

/// No table of PostgreSQL's has more columns; a line that claims more is none of its.
const COLUMNS_MAX: usize = 1_600;

/// The values of one line, unescaped.
#[derive(Debug, Default)]
pub(super) struct CopyRow {
    text: String,
    /// Where each value lies in `text`; None is NULL.
    values: Vec<Option<(usize, usize)>>,
}

impl CopyRow {
    /// Reads a line, with or without its newline.
    pub(super) fn read(&mut self, line: &[u8]) -> Result<(), Poison> {
        let mut text = std::mem::take(&mut self.text).into_bytes();
        text.clear();
        self.values.clear();
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        // Most lines hold neither an escape nor NULL, and stay as they are.
        let is_plain = !line.contains(&b'\\');
        if is_plain {
            text.extend_from_slice(line);
        }
        let mut start = 0;
        for field in line.split(|byte| *byte == b'\t') {
            if self.values.len() == COLUMNS_MAX {
                return Err(Poison::CopyText);
            }
            if field == b"\\N" {
                self.values.push(None);
                continue;
            }
            if is_plain {
                self.values.push(Some((start, start + field.len())));
                start += field.len() + 1;
            } else {
                unescape(&mut text, field)?;
                self.values.push(Some((start, text.len())));
                start = text.len();
            }
        }
        self.text = String::from_utf8(text).map_err(|_| Malformed::NotUtf8("value"))?;
        Ok(())
    }

    pub(super) fn values(&self) -> impl ExactSizeIterator<Item = Result<Value<'_>, Malformed>> {
        self.values.iter().map(|span| match span {
            None => Ok(Value::Null),
            // Bytes that only together are characters were torn by a tab that none of them is.
            Some((start, end)) => self.text.get(*start..*end).map(Value::Text).ok_or(Malformed::NotUtf8("value")),
        })
    }
}

fn unescape(text: &mut Vec<u8>, field: &[u8]) -> Result<(), Poison> {
    let mut rest = field;
    while let Some(at) = rest.iter().position(|byte| *byte == b'\\') {
        text.extend_from_slice(&rest[..at]);
        let escaped = rest.get(at + 1).ok_or(Poison::CopyText)?;
        text.push(match escaped {
            b'b' => 0x08,
            b'f' => 0x0C,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'v' => 0x0B,
            b'\\' => b'\\',
            _ => return Err(Poison::CopyText),
        });
        rest = &rest[at + 2..];
    }
    text.extend_from_slice(rest);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(line: &[u8]) -> Result<Vec<Option<String>>, Poison> {
        let mut row = CopyRow::default();
        row.read(line)?;
        row.values()
            .map(|value| match value? {
                Value::Text(text) => Ok(Some(text.to_owned())),
                _ => Ok(None),
            })
            .collect()
    }

    #[test]
    fn a_line_is_split_and_unescaped() {
        let values = read(b"1\t\\N\t\tb\\\\s tab\\t nl\\n \\b\\f\\r\\v\t\\\\N\n").expect("valid");
        assert_eq!(values, [Some("1".into()), None, Some(String::new()), Some("b\\s tab\t nl\n \u{8}\u{c}\r\u{b}".into()), Some("\\N".into())]);
    }

    #[test]
    fn what_copy_never_writes_is_an_error() {
        for line in [&b"a\\"[..], b"\\x41", b"\xff", b"\xc3\t\xa9", b"\\N\t\xc3\t\xa9", &[b'\t'; COLUMNS_MAX]] {
            assert!(read(line).is_err(), "{line:?}");
        }
        assert_eq!(read(&[b'\t'; COLUMNS_MAX - 1]).map(|it| it.len()), Ok(COLUMNS_MAX));
    }

    fn written(values: &[Option<String>]) -> Vec<u8> {
        let escapes = [('\\', "\\\\"), ('\u{8}', "\\b"), ('\u{c}', "\\f"), ('\n', "\\n"), ('\r', "\\r"), ('\t', "\\t"), ('\u{b}', "\\v")];
        let escape = |text: &String| escapes.iter().fold(text.clone(), |text, (character, escaped)| text.replace(*character, escaped));
        let fields: Vec<String> = values.iter().map(|it| it.as_ref().map_or_else(|| "\\N".to_owned(), escape)).collect();
        fields.join("\t").into_bytes()
    }

    proptest! {
        #[test]
        fn whatever_text_copy_writes_is_read_back(values in prop::collection::vec(prop::option::of("(?s).{0,20}|[\\\\\n\r\t]{0,8}"), 1..8)) {
            prop_assert_eq!(read(&written(&values)), Ok(values));
        }

        #[test]
        fn garbage_never_panics_and_its_text_takes_no_more_memory_than_it_came_in(line in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(b"\\\t\nN".to_vec())], 0..200)) {
            let mut row = CopyRow { text: String::with_capacity(line.len()), values: Vec::new() };
            let before = row.text.capacity();
            let taken = row.read(&line);
            prop_assert!(row.text.capacity() <= before);
            prop_assert!(row.values().count() <= line.len() + 1);
            drop(taken);
        }
    }
}
