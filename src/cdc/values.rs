//! PostgreSQL's text of a value → Debezium's JSON of it. One table says which type is written how; pure.
//!
//! The text is what a session with `TimeZone=UTC DateStyle=ISO IntervalStyle=postgres extra_float_digits=3
//! bytea_output=hex` prints: both the walsender and the snapshot's COPY run with these, so a row reads the same from either.

use super::{json, moments};

/// A text its type cannot have. The row that holds it goes to the dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a value is not {0}")]
pub struct NotA(pub &'static str);

/// How a single value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scalar {
    /// As it stands: PostgreSQL's integers are JSON's.
    Integer,
    Boolean,
    Float,
    Double,
    /// A string of PostgreSQL's own text: text, numeric (`decimal.handling.mode=string`), uuid, json, enums, ranges, addresses.
    Text,
    Money,
    /// `bytea`, base64.
    Bytes,
    /// `bit(1)`: a boolean.
    Bit,
    /// Other bit strings: base64 of the bits, lowest byte first.
    Bits,
    /// Days since 1970.
    Date,
    TimeMillis,
    TimeMicros,
    TimeWithZone,
    TimestampMillis,
    TimestampMicros,
    TimestampWithZone,
    /// Microseconds; a month counts 30.4375 days.
    Interval,
    Point,
    Hstore,
}

/// How a column is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    One(Scalar),
    Array(Scalar),
}

/// Type, its array type, how it is written where the type modifier does not matter. Everything not listed is text.
const TYPES: &[(u32, u32, Scalar)] = &[
    (16, 1000, Scalar::Boolean),
    (17, 1001, Scalar::Bytes),
    (20, 1016, Scalar::Integer),
    (21, 1005, Scalar::Integer),
    (23, 1007, Scalar::Integer),
    (26, 1028, Scalar::Integer),
    (700, 1021, Scalar::Float),
    (701, 1022, Scalar::Double),
    (790, 791, Scalar::Money),
    (600, 1017, Scalar::Point),
    (1082, 1182, Scalar::Date),
    (1083, 1183, Scalar::TimeMicros),
    (1266, 1270, Scalar::TimeWithZone),
    (1114, 1115, Scalar::TimestampMicros),
    (1184, 1185, Scalar::TimestampWithZone),
    (1186, 1187, Scalar::Interval),
    (1560, 1561, Scalar::Bits),
    (1562, 1563, Scalar::Bits),
    // Text, listed because their arrays must be known as arrays.
    (18, 1002, Scalar::Text),
    (19, 1003, Scalar::Text),
    (25, 1009, Scalar::Text),
    (114, 199, Scalar::Text),
    (142, 143, Scalar::Text),
    (650, 651, Scalar::Text),
    (774, 775, Scalar::Text),
    (829, 1040, Scalar::Text),
    (869, 1041, Scalar::Text),
    (1042, 1014, Scalar::Text),
    (1043, 1015, Scalar::Text),
    (1700, 1231, Scalar::Text),
    (2950, 2951, Scalar::Text),
    (3614, 3643, Scalar::Text),
    (3802, 3807, Scalar::Text),
    (3904, 3905, Scalar::Text),
    (3906, 3907, Scalar::Text),
    (3908, 3909, Scalar::Text),
    (3910, 3911, Scalar::Text),
    (3912, 3913, Scalar::Text),
    (3926, 3927, Scalar::Text),
];

/// How a built-in type is written; None for types made by `CREATE TYPE` or an extension.
pub(super) fn built_in(type_oid: u32, modifier: i32) -> Option<Kind> {
    TYPES.iter().find_map(|(one, array, scalar)| {
        let scalar = by_modifier(type_oid == *one || type_oid == *array, *one, *scalar, modifier)?;
        Some(if type_oid == *one { Kind::One(scalar) } else { Kind::Array(scalar) })
    })
}

/// Debezium's adaptive precision: up to milliseconds a time is in milliseconds; a single bit is a boolean.
fn by_modifier(wanted: bool, type_oid: u32, scalar: Scalar, modifier: i32) -> Option<Scalar> {
    wanted.then_some(match (scalar, modifier) {
        (Scalar::TimeMicros, 0..=3) => Scalar::TimeMillis,
        (Scalar::TimestampMicros, 0..=3) => Scalar::TimestampMillis,
        (Scalar::Bits, 1) if type_oid == 1560 => Scalar::Bit,
        _ => scalar,
    })
}

/// What stands for a TOASTed value the change did not touch.
pub(super) const UNAVAILABLE: &str = "__debezium_unavailable_value";

impl Kind {
    /// Appends the JSON of a value.
    pub(super) fn write(self, out: &mut Vec<u8>, text: &str) -> Result<(), NotA> {
        match self {
            Self::One(scalar) => scalar.write(out, text),
            Self::Array(scalar) => array(out, text, scalar),
        }
    }

    /// Appends what stands for a value the stream left out.
    pub(super) fn write_unavailable(self, out: &mut Vec<u8>) {
        match self {
            Self::One(Scalar::Bytes | Scalar::Bits) => json::base64(out, UNAVAILABLE.bytes()),
            Self::One(_) => json::string(out, UNAVAILABLE),
            Self::Array(Scalar::Integer) => {
                for (place, byte) in UNAVAILABLE.bytes().enumerate() {
                    out.push(if place == 0 { b'[' } else { b',' });
                    json::integer(out, byte);
                }
                out.push(b']');
            }
            Self::Array(_) => {
                out.push(b'[');
                json::string(out, UNAVAILABLE);
                out.push(b']');
            }
        }
    }

    /// Appends what Debezium puts into a NOT NULL column of which the stream tells nothing (REPLICA IDENTITY DEFAULT).
    pub(super) fn write_absent(self, out: &mut Vec<u8>) {
        let text: &[u8] = match self {
            Self::Array(_) => b"[]",
            Self::One(Scalar::Boolean | Scalar::Bit) => b"false",
            Self::One(Scalar::Float | Scalar::Double) => b"0.0",
            Self::One(Scalar::TimestampWithZone) => b"\"1970-01-01T00:00:00.000000Z\"",
            Self::One(Scalar::TimeWithZone) => b"\"00:00:00Z\"",
            Self::One(Scalar::Text | Scalar::Money | Scalar::Bytes | Scalar::Bits | Scalar::Hstore) => b"\"\"",
            Self::One(Scalar::Point) => b"{\"x\":0.0,\"y\":0.0,\"wkb\":\"\",\"srid\":null}",
            Self::One(_) => b"0",
        };
        out.extend_from_slice(text);
    }
}

impl Scalar {
    fn write(self, out: &mut Vec<u8>, text: &str) -> Result<(), NotA> {
        match self {
            Self::Integer => whole_number(out, text)?,
            Self::Boolean | Self::Bit => out.extend_from_slice(truth(text)?),
            Self::Float => json::float(out, text.parse().map_err(|_| NotA("a number"))?),
            Self::Double => json::double(out, text.parse().map_err(|_| NotA("a number"))?),
            Self::Text => json::string(out, text),
            Self::Money => money(out, text),
            Self::Bytes => json::base64(out, hex(text)?),
            Self::Bits => json::base64(out, bits(text)?),
            Self::Date => json::integer(out, moments::days(text)?),
            Self::TimeMillis => json::integer(out, moments::time(text)?.0 / 1000),
            Self::TimeMicros => json::integer(out, moments::time(text)?.0),
            Self::TimeWithZone => moments::write_time_utc(out, text)?,
            Self::TimestampMillis => json::integer(out, moments::timestamp(text)?.div_euclid(1000)),
            Self::TimestampMicros => json::integer(out, moments::timestamp(text)?),
            Self::TimestampWithZone => moments::write_timestamp_utc(out, text)?,
            Self::Interval => json::integer(out, moments::interval(text)?),
            Self::Point => point(out, text)?,
            Self::Hstore => hstore(out, text)?,
        }
        Ok(())
    }
}

fn whole_number(out: &mut Vec<u8>, text: &str) -> Result<(), NotA> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(NotA("an integer"));
    }
    out.extend_from_slice(text.as_bytes());
    Ok(())
}

fn truth(text: &str) -> Result<&'static [u8], NotA> {
    match text {
        "t" | "1" => Ok(b"true"),
        "f" | "0" => Ok(b"false"),
        _ => Err(NotA("a boolean")),
    }
}

/// `-$1,234.56` without what the locale adds.
fn money(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    out.extend(text.bytes().filter(|byte| byte.is_ascii_digit() || matches!(byte, b'-' | b'.')));
    out.push(b'"');
}

fn hex(text: &str) -> Result<impl Iterator<Item = u8>, NotA> {
    let digits = text.strip_prefix("\\x").ok_or(NotA("a byte string"))?.as_bytes();
    if digits.len() % 2 == 1 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(NotA("a byte string"));
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|it| u8::try_from(it).ok()).unwrap_or(0);
    Ok(digits.chunks_exact(2).map(move |pair| digit(pair[0]) << 4 | digit(pair[1])))
}

fn bits(text: &str) -> Result<impl Iterator<Item = u8>, NotA> {
    if !text.bytes().all(|byte| matches!(byte, b'0' | b'1')) {
        return Err(NotA("a bit string"));
    }
    Ok(text.as_bytes().rchunks(8).map(|eight| eight.iter().fold(0, |byte, bit| byte << 1 | (bit - b'0'))))
}

/// `(1.5,2.5)` with its well-known binary form beside it.
fn point(out: &mut Vec<u8>, text: &str) -> Result<(), NotA> {
    let inner = text.strip_prefix('(').and_then(|it| it.strip_suffix(')')).ok_or(NotA("a point"))?;
    let (x, y) = inner.split_once(',').ok_or(NotA("a point"))?;
    let (x, y): (f64, f64) = (x.parse().map_err(|_| NotA("a point"))?, y.parse().map_err(|_| NotA("a point"))?);
    out.extend_from_slice(b"{\"x\":");
    json::double(out, x);
    out.extend_from_slice(b",\"y\":");
    json::double(out, y);
    out.extend_from_slice(b",\"wkb\":");
    json::base64(out, [1, 1, 0, 0, 0].into_iter().chain(x.to_le_bytes()).chain(y.to_le_bytes()));
    out.extend_from_slice(b",\"srid\":null}");
    Ok(())
}

/// `"a"=>"1", "b"=>NULL` → a string of JSON.
fn hstore(out: &mut Vec<u8>, text: &str) -> Result<(), NotA> {
    let mut object = Vec::with_capacity(text.len() + 8);
    object.push(b'{');
    let mut rest = text;
    while !rest.is_empty() {
        let (key, after) = quoted(rest).ok_or(NotA("an hstore"))?;
        let after = after.strip_prefix("=>").ok_or(NotA("an hstore"))?;
        if object.len() > 1 {
            object.push(b',');
        }
        json::string(&mut object, &key);
        object.push(b':');
        let after = match after.strip_prefix("NULL") {
            Some(after) => {
                object.extend_from_slice(b"null");
                after
            }
            None => {
                let (value, after) = quoted(after).ok_or(NotA("an hstore"))?;
                json::string(&mut object, &value);
                after
            }
        };
        rest = after.strip_prefix(", ").unwrap_or(after);
        if rest.len() == after.len() && !rest.is_empty() {
            return Err(NotA("an hstore"));
        }
    }
    object.push(b'}');
    json::string(out, std::str::from_utf8(&object).map_err(|_| NotA("an hstore"))?);
    Ok(())
}

/// A text in double quotes with backslash escapes, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let inner = text.strip_prefix('"')?;
    let mut value = String::new();
    let mut characters = inner.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &inner[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

/// Deeper than PostgreSQL's own limit of six dimensions no array goes.
const ARRAY_DEPTH_MAX: usize = 6;

/// `{1,NULL,"a b"}`, or with bounds `[2:3]={1,2}`, nested by dimension.
fn array(out: &mut Vec<u8>, text: &str, element: Scalar) -> Result<(), NotA> {
    let text = if text.starts_with('[') { text.split_once('=').map_or(text, |(_, it)| it) } else { text };
    let rest = dimension(out, text, element, 0)?;
    if rest.is_empty() { Ok(()) } else { Err(NotA("an array")) }
}

fn dimension<'a>(out: &mut Vec<u8>, text: &'a str, element: Scalar, depth: usize) -> Result<&'a str, NotA> {
    let mut rest = text.strip_prefix('{').filter(|_| depth < ARRAY_DEPTH_MAX).ok_or(NotA("an array"))?;
    out.push(b'[');
    if let Some(after) = rest.strip_prefix('}') {
        out.push(b']');
        return Ok(after);
    }
    loop {
        rest = if rest.starts_with('{') {
            dimension(out, rest, element, depth + 1)?
        } else if rest.starts_with('"') {
            let (value, after) = quoted(rest).ok_or(NotA("an array"))?;
            element.write(out, &value)?;
            after
        } else {
            let end = rest.find([',', '}']).ok_or(NotA("an array"))?;
            match &rest[..end] {
                "NULL" => out.extend_from_slice(b"null"),
                value => element.write(out, value)?,
            }
            &rest[end..]
        };
        if let Some(after) = rest.strip_prefix('}') {
            out.push(b']');
            return Ok(after);
        }
        rest = rest.strip_prefix(',').ok_or(NotA("an array"))?;
        out.push(b',');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(type_oid: u32, modifier: i32, text: &str) -> String {
        let mut out = Vec::new();
        built_in(type_oid, modifier).expect("built in").write(&mut out, text).expect("valid");
        String::from_utf8(out).expect("JSON is UTF-8")
    }

    #[test]
    fn types_are_written_as_debezium_writes_them() {
        for (type_oid, modifier, text, json) in [
            (20, -1, "-9223372036854775808", "-9223372036854775808"),
            (16, -1, "t", "true"),
            (701, -1, "1e-10", "1.0E-10"),
            (790, -1, "-$1,234.56", "\"-1234.56\""),
            (1700, (18 << 16) + 6, "-0.01", "\"-0.01\""),
            (17, -1, "\\xdeadbeef00ff", "\"3q2+7wD/\""),
            (1560, 1, "1", "true"),
            (1560, 5, "10101", "\"FQ==\""),
            (1562, -1, "1100000001", "\"AQM=\""),
            (1083, -1, "23:59:59.123456", "86399123456"),
            (1083, 3, "01:02:03.456", "3723456"),
            (1114, 0, "2026-02-28 23:59:59", "1772323199000"),
            (600, -1, "(1.5,2.5)", "{\"x\":1.5,\"y\":2.5,\"wkb\":\"AQEAAAAAAAAAAAD4PwAAAAAAAARA\",\"srid\":null}"),
            (1007, -1, "{1,NULL,3}", "[1,null,3]"),
            (1007, -1, "[2:3]={{1},{2}}", "[[1],[2]]"),
            (1009, -1, r#"{a,NULL,"c,d","q\"uote","NULL",""}"#, r#"["a",null,"c,d","q\"uote","NULL",""]"#),
            (1185, -1, r#"{"2026-01-01 00:00:00+00"}"#, r#"["2026-01-01T00:00:00.000000Z"]"#),
            (1009, -1, "{}", "[]"),
        ] {
            assert_eq!(shown(type_oid, modifier, text), json, "type {type_oid}");
        }
    }

    #[test]
    fn an_hstore_becomes_a_string_of_json() {
        let mut out = Vec::new();
        Kind::One(Scalar::Hstore).write(&mut out, r#""a"=>"1", "b"=>NULL"#).expect("valid");
        assert_eq!(String::from_utf8(out).expect("JSON is UTF-8"), r#""{\"a\":\"1\",\"b\":null}""#);
    }

    const KINDS: [Kind; 21] = [
        Kind::One(Scalar::Integer),
        Kind::One(Scalar::Boolean),
        Kind::One(Scalar::Float),
        Kind::One(Scalar::Double),
        Kind::One(Scalar::Text),
        Kind::One(Scalar::Money),
        Kind::One(Scalar::Bytes),
        Kind::One(Scalar::Bit),
        Kind::One(Scalar::Bits),
        Kind::One(Scalar::Date),
        Kind::One(Scalar::TimeMillis),
        Kind::One(Scalar::TimeWithZone),
        Kind::One(Scalar::TimestampMillis),
        Kind::One(Scalar::TimestampMicros),
        Kind::One(Scalar::TimestampWithZone),
        Kind::One(Scalar::Interval),
        Kind::One(Scalar::Point),
        Kind::One(Scalar::Hstore),
        Kind::Array(Scalar::Integer),
        Kind::Array(Scalar::Text),
        Kind::Array(Scalar::TimestampWithZone),
    ];

    proptest! {
        #[test]
        fn whatever_the_text_it_becomes_json_or_an_error(kind in prop::sample::select(KINDS.to_vec()), text in "[-0-9 :.+,{}()\\[\\]/$\"\\\\a-zA-Z=>☃😀]{0,40}") {
            let mut out = Vec::new();
            if kind.write(&mut out, &text).is_ok() && kind != Kind::One(Scalar::Integer) {
                prop_assert!(serde_json::from_slice::<serde_json::Value>(&out).is_ok(), "{}", String::from_utf8_lossy(&out));
            }
        }
    }
}
