//! JSON as Debezium's converter writes it, straight into a reused buffer: same escapes, same numbers.

use std::io::Write as _;

/// A quoted string. Non-ASCII stays as it is, except beyond the basic plane, where Java writes two surrogates.
pub(super) fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    escaped(out, text);
    out.push(b'"');
}

/// What [`string`] writes, without the quotes.
pub(super) fn escaped(out: &mut Vec<u8>, text: &str) {
    let bytes = text.as_bytes();
    let (mut at, mut copied) = (0, 0);
    while let Some(byte) = bytes.get(at) {
        if bytes[at..].first_chunk().is_some_and(are_plain) {
            at += 8;
            continue;
        }
        at += 1;
        // 0xF0 and above open a four-byte sequence, the only ones that become surrogates.
        if *byte >= 0x20 && *byte != b'"' && *byte != b'\\' && *byte < 0xF0 {
            continue;
        }
        out.extend_from_slice(&bytes[copied..at - 1]);
        copied = at;
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0x08 => out.extend_from_slice(b"\\b"),
            0x0C => out.extend_from_slice(b"\\f"),
            0xF0.. => {
                let character = text[at - 1..].chars().next().expect("a lead byte opens a character");
                character.encode_utf16(&mut [0; 2]).iter().for_each(|unit| unicode(out, *unit));
                at += 3;
                copied = at;
            }
            control => unicode(out, u16::from(*control)),
        }
    }
    out.extend_from_slice(&bytes[copied..]);
}

/// Whether none of eight bytes has to be escaped, all looked at in one word. A false no only costs time.
fn are_plain(bytes: &[u8; 8]) -> bool {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGH: u64 = ONES << 7;
    let word = u64::from_ne_bytes(*bytes);
    let below = |word: u64, limit: u64| word.wrapping_sub(ONES * limit) & !word & HIGH;
    let equal = |byte: u8| below(word ^ (ONES * u64::from(byte)), 1);
    // The four highest bits of a byte, brought to its highest.
    let four_byte_lead = word & word << 1 & word << 2 & word << 3 & HIGH;
    below(word, 0x20) | equal(b'"') | equal(b'\\') | four_byte_lead == 0
}

/// A quoted string of a JSON text that is a string itself: what lies beyond the basic plane is escaped there.
pub(super) fn string_within(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    for part in text.split_inclusive(|it| it > '\u{ffff}') {
        let basic = part.trim_end_matches(|it| it > '\u{ffff}');
        escaped(out, basic);
        out.extend_from_slice(&part.as_bytes()[basic.len()..]);
    }
    out.push(b'"');
}

/// JSON as Kafka Connect's `SimpleHeaderConverter` writes it: only quotes and backslashes are escaped.
pub(super) fn as_header(json: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.iter().position(|it| *it == b'\\') {
        out.extend_from_slice(&rest[..at]);
        let hex = |from: usize| {
            let digits = rest.get(from..from + 4).and_then(|it| std::str::from_utf8(it).ok());
            digits.and_then(|it| u16::from_str_radix(it, 16).ok()).unwrap_or_default()
        };
        let mut length = 2;
        match rest.get(at + 1) {
            Some(b'n') => out.push(b'\n'),
            Some(b'r') => out.push(b'\r'),
            Some(b't') => out.push(b'\t'),
            Some(b'b') => out.push(0x08),
            Some(b'f') => out.push(0x0C),
            Some(b'u') => {
                let units = [hex(at + 2), hex(at + 8)];
                let is_pair = (0xD800..0xDC00).contains(&units[0]);
                length = if is_pair { 12 } else { 6 };
                out.extend_from_slice(String::from_utf16_lossy(&units[..length / 6]).as_bytes());
            }
            _ => out.extend_from_slice(&rest[at..(at + 2).min(rest.len())]),
        }
        rest = rest.get(at + length..).unwrap_or_default();
    }
    out.extend_from_slice(rest);
    out
}

fn unicode(out: &mut Vec<u8>, unit: u16) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    out.extend_from_slice(b"\\u");
    for shift in [12, 8, 4, 0] {
        out.push(HEX[usize::from(unit >> shift & 0xF)]);
    }
}

pub(super) fn integer(out: &mut Vec<u8>, number: impl itoa::Integer) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// As Java's `Double.toString`: `1.0E10`, `1.0E-5`, `100.0`; not-a-number and infinities are strings.
///
/// Java never writes less than two digits, and of those with two takes the nearest: `4.9E-324`, where the shortest would be `5E-324`.
pub(super) fn double(out: &mut Vec<u8>, number: f64) {
    let is_tiny = number != 0.0 && number.abs() < 1e-322;
    floating(out, number, |out| if is_tiny { write!(out, "{number:.1e}") } else { write!(out, "{number:e}") }.is_ok());
}

/// As Java's `Float.toString`: the shortest digits that tell this `f32` from its neighbours.
pub(super) fn float(out: &mut Vec<u8>, number: f32) {
    let is_tiny = number != 0.0 && number.abs() < 1e-44;
    floating(out, f64::from(number), |out| if is_tiny { write!(out, "{number:.1e}") } else { write!(out, "{number:e}") }.is_ok());
}

fn floating(out: &mut Vec<u8>, number: f64, shortest: impl FnOnce(&mut Vec<u8>) -> bool) {
    if number.is_nan() {
        return out.extend_from_slice(b"\"NaN\"");
    }
    if number.is_infinite() {
        return out.extend_from_slice(if number > 0.0 { b"\"Infinity\"" } else { b"\"-Infinity\"" });
    }
    // Rust writes `-1.2345e-7`: all significant digits, then the exponent.
    let start = out.len();
    let written = shortest(out);
    debug_assert!(written, "writing to memory cannot fail");
    let mut digits = [0_u8; 24];
    let mut count = 0;
    let mut exponent = 0_i32;
    let mut at = start;
    if out.get(at) == Some(&b'-') {
        at += 1;
    }
    let first = at;
    while at < out.len() {
        match out[at] {
            b'e' => {
                exponent = std::str::from_utf8(&out[at + 1..]).ok().and_then(|it| it.parse().ok()).unwrap_or(0);
                break;
            }
            b'.' => {}
            digit => {
                digits[count] = digit;
                count += 1;
            }
        }
        at += 1;
    }
    out.truncate(first);
    let digits = &digits[..count];
    let plain = number == 0.0 || (1e-3..1e7).contains(&number.abs());
    let point = if plain { exponent + 1 } else { 1 };
    match usize::try_from(point) {
        Ok(whole) if whole > 0 => {
            (0..whole).for_each(|place| out.push(digits.get(place).copied().unwrap_or(b'0')));
            out.push(b'.');
            out.extend_from_slice(digits.get(whole..).filter(|it| !it.is_empty()).unwrap_or(b"0"));
        }
        _ => {
            out.extend_from_slice(b"0.");
            (point..0).for_each(|_| out.push(b'0'));
            out.extend_from_slice(digits);
        }
    }
    if !plain {
        out.push(b'E');
        integer(out, exponent);
    }
}

/// A quoted base64 string, the standard alphabet with padding.
pub(super) fn base64(out: &mut Vec<u8>, bytes: impl Iterator<Item = u8>) {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    out.push(b'"');
    let mut held = 0_u32;
    let mut count = 0_u32;
    for byte in bytes {
        held = held << 8 | u32::from(byte);
        count += 1;
        if count == 3 {
            [18, 12, 6, 0].iter().for_each(|shift| out.push(ALPHABET[(held >> shift & 63) as usize]));
            (held, count) = (0, 0);
        }
    }
    if count > 0 {
        held <<= 8 * (3 - count);
        for place in 0..4 {
            out.push(if place <= count { ALPHABET[(held >> (18 - 6 * place) & 63) as usize] } else { b'=' });
        }
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).expect("JSON is UTF-8")
    }

    #[test]
    fn strings_are_escaped_as_java_does() {
        assert_eq!(written(|out| string(out, "a\"b\\c/\n\r\t\u{8}\u{c}\u{1}\u{7f}é☃\u{2028}")), "\"a\\\"b\\\\c/\\n\\r\\t\\b\\f\\u0001\u{7f}é☃\u{2028}\"");
        assert_eq!(written(|out| string(out, "x😀y")), "\"x\\uD83D\\uDE00y\"");
        // At every place of a word, and across two.
        for at in 0..17 {
            for (special, escaped) in [("\"", "\\\""), ("\\", "\\\\"), ("\u{1f}", "\\u001F"), ("😀", "\\uD83D\\uDE00"), ("\u{7f}é", "\u{7f}é")] {
                let (before, after) = ("abcdefghijklmnopq".split_at(at).0, " ÿ![]^~ and more");
                assert_eq!(written(|out| string(out, &format!("{before}{special}{after}"))), format!("\"{before}{escaped}{after}\""));
            }
        }
    }

    #[test]
    fn headers_escape_quotes_and_backslashes_only() {
        let key = written(|out| string(out, "a\"b\\c\n\u{1}é😀"));
        assert_eq!(String::from_utf8(as_header(key.as_bytes())).expect("UTF-8"), "\"a\\\"b\\\\c\n\u{1}é😀\"");
        assert_eq!(written(|out| string_within(out, "x😀\"y😀")), "\"x😀\\\"y😀\"");
    }

    #[test]
    fn floats_look_as_in_java() {
        let shown = |number| written(|out| double(out, number));
        assert_eq!([1e10, 1e-10, 0.1, 100.0, 0.0, -0.0, 123_456_789.123].map(shown), ["1.0E10", "1.0E-10", "0.1", "100.0", "0.0", "-0.0", "1.23456789123E8"]);
        assert_eq!([f64::MAX, 0.001, 0.000_99, 9_999_999.0, 1e7].map(shown), ["1.7976931348623157E308", "0.001", "9.9E-4", "9999999.0", "1.0E7"]);
        assert_eq!([f64::NAN, f64::NEG_INFINITY].map(shown), ["\"NaN\"", "\"-Infinity\""]);
        assert_eq!([f64::from_bits(1), f64::from_bits(2), -f64::from_bits(3)].map(shown), ["4.9E-324", "9.9E-324", "-1.5E-323"]);
        assert_eq!([f32::from_bits(1), f32::from_bits(3)].map(|it: f32| written(|out| float(out, it))), ["1.4E-45", "4.2E-45"]);
        assert_eq!([3.402_823_5e38, 16_777_216.0, -0.1].map(|it: f32| written(|out| float(out, it))), ["3.4028235E38", "1.6777216E7", "-0.1"]);
    }

    #[test]
    fn base64_is_padded() {
        let shown = |bytes: &'static [u8]| written(|out| base64(out, bytes.iter().copied()));
        assert_eq!([&b""[..], b"f", b"fo", b"foo", b"foob"].map(shown), ["\"\"", "\"Zg==\"", "\"Zm8=\"", "\"Zm9v\"", "\"Zm9vYg==\""]);
    }
}
