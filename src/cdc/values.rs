//! PostgreSQL's text of a value → Debezium's JSON of it. One table says which type is written how; pure.
//!
//! The text is what a session with `TimeZone=UTC DateStyle=ISO IntervalStyle=postgres extra_float_digits=3
//! bytea_output=hex` prints: both the walsender and the snapshot's COPY run with these, so a row reads the same from either.

use super::{json, moments, shapes::Shape, vectors};

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
    /// `numeric`, of which Debezium's zero has so many digits behind its point.
    Numeric(u8),
    Money,
    /// `bytea`, base64.
    Bytes,
    /// `bit(1)`: a boolean.
    Bit,
    /// Other bit strings: base64 of the bits, lowest byte first, without the zeros behind the last.
    Bits,
    /// Days since 1970.
    Date,
    TimeMillis,
    TimeMicros,
    TimeWithZone,
    TimestampMillis,
    TimestampMicros,
    /// ISO 8601, with so many digits of a second.
    TimestampWithZone(u8),
    /// Microseconds; a month counts 30.4375 days.
    Interval,
    Shape(Shape),
    Hstore,
    /// pgvector's: an array of doubles, of floats, and those that are not zero under their places.
    Vector,
    HalfVector,
    SparseVector,
}

/// How a column is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    One(Scalar),
    /// With what stands for an array that the stream left out.
    Array(Scalar, Unavailable),
    /// Debezium has a field for such a column, and reads no element of it: null, unless all elements are.
    Empty,
    /// Always null.
    Null,
    /// No field: Debezium does not know the type (`include.unknown.datatypes=false`).
    Omitted,
}

/// What stands for an array the change did not touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unavailable {
    Null,
    /// The placeholder as its one element.
    Text,
    Bytes,
    Uuid,
    /// The placeholder's bytes, each a number.
    Numbers,
}

/// Type, its array type, how it is written where the type modifier does not matter, and what stands for an unavailable array.
const TYPES: &[(u32, u32, Scalar, Unavailable)] = &[
    (16, 1000, Scalar::Boolean, Unavailable::Null),
    (17, 1001, Scalar::Bytes, Unavailable::Bytes),
    (20, 1016, Scalar::Integer, Unavailable::Numbers),
    (21, 1005, Scalar::Integer, Unavailable::Null),
    (23, 1007, Scalar::Integer, Unavailable::Numbers),
    (26, 1028, Scalar::Integer, Unavailable::Null),
    (700, 1021, Scalar::Float, Unavailable::Null),
    (701, 1022, Scalar::Double, Unavailable::Null),
    (1082, 1182, Scalar::Date, Unavailable::Numbers),
    (1083, 1183, Scalar::TimeMicros, Unavailable::Null),
    (1266, 1270, Scalar::TimeWithZone, Unavailable::Null),
    (1114, 1115, Scalar::TimestampMicros, Unavailable::Null),
    (1184, 1185, Scalar::TimestampWithZone(6), Unavailable::Null),
    (18, 1002, Scalar::Text, Unavailable::Null),
    (25, 1009, Scalar::Text, Unavailable::Text),
    (114, 199, Scalar::Text, Unavailable::Text),
    (650, 651, Scalar::Text, Unavailable::Null),
    (774, 775, Scalar::Text, Unavailable::Null),
    (829, 1040, Scalar::Text, Unavailable::Null),
    (869, 1041, Scalar::Text, Unavailable::Null),
    (1042, 1014, Scalar::Text, Unavailable::Text),
    (1043, 1015, Scalar::Text, Unavailable::Text),
    (1700, 1231, Scalar::Numeric(0), Unavailable::Null),
    (2950, 2951, Scalar::Text, Unavailable::Uuid),
    (3614, 3643, Scalar::Text, Unavailable::Null),
    (3802, 3807, Scalar::Text, Unavailable::Text),
    (3904, 3905, Scalar::Text, Unavailable::Null),
    (3906, 3907, Scalar::Text, Unavailable::Null),
    (3908, 3909, Scalar::Text, Unavailable::Null),
    (3910, 3911, Scalar::Text, Unavailable::Null),
    (3912, 3913, Scalar::Text, Unavailable::Null),
    (3926, 3927, Scalar::Text, Unavailable::Null),
];

/// Type, its array type, how one is written, and what Debezium makes of arrays of it.
const ALONE: &[(u32, u32, Scalar, Kind)] = &[
    (19, 1003, Scalar::Text, Kind::Omitted),
    (142, 143, Scalar::Text, Kind::Omitted),
    (790, 791, Scalar::Money, Kind::Omitted),
    (1186, 1187, Scalar::Interval, Kind::Omitted),
    (1560, 1561, Scalar::Bits, Kind::Null),
    (1562, 1563, Scalar::Bits, Kind::Omitted),
    (600, 1017, Scalar::Shape(Shape::Point), Kind::Omitted),
    (628, 629, Scalar::Shape(Shape::Line), Kind::Empty),
    (601, 1018, Scalar::Shape(Shape::Segment), Kind::Empty),
    (603, 1020, Scalar::Shape(Shape::Box), Kind::Empty),
    (602, 1019, Scalar::Shape(Shape::Path), Kind::Empty),
    (604, 1027, Scalar::Shape(Shape::Polygon), Kind::Empty),
    (718, 719, Scalar::Shape(Shape::Circle), Kind::Empty),
];

/// How a built-in type is written; None for types made by `CREATE TYPE` or an extension, and those Debezium does not know.
pub(super) fn built_in(type_oid: u32, modifier: i32) -> Option<Kind> {
    let both = TYPES.iter().find_map(|(one, array, scalar, unavailable)| {
        let scalar = by_modifier(*scalar, modifier);
        (type_oid == *one).then_some(Kind::One(scalar)).or((type_oid == *array).then_some(Kind::Array(scalar, *unavailable)))
    });
    both.or_else(|| {
        ALONE.iter().find_map(|(one, array, scalar, of_arrays)| {
            (type_oid == *one).then(|| Kind::One(by_modifier(*scalar, modifier))).or((type_oid == *array).then_some(*of_arrays))
        })
    })
}

/// How a type is written that somebody made, or an extension, or an array of it. `class` as in `pg_type.typtype`.
pub(super) fn made(name: &str, class: &str, in_array: bool) -> Kind {
    let (scalar, of_arrays) = match name {
        _ if class == "e" => (Scalar::Text, Kind::Array(Scalar::Text, Unavailable::Null)),
        // Somebody's own, whatever its name.
        _ if class != "b" => return Kind::Omitted,
        "hstore" => (Scalar::Hstore, Kind::Array(Scalar::Hstore, Unavailable::Null)),
        "citext" => (Scalar::Text, Kind::Array(Scalar::Text, Unavailable::Null)),
        "ltree" => (Scalar::Text, Kind::Array(Scalar::Text, Unavailable::Null)),
        "isbn" | "isbn13" | "issn" | "issn13" | "ismn" | "ismn13" | "ean13" | "upc" => (Scalar::Text, Kind::Array(Scalar::Text, Unavailable::Null)),
        "vector" => (Scalar::Vector, Kind::Array(Scalar::Vector, Unavailable::Null)),
        "halfvec" => (Scalar::HalfVector, Kind::Array(Scalar::HalfVector, Unavailable::Null)),
        "sparsevec" => (Scalar::SparseVector, Kind::Empty),
        // PostGIS: its own text.
        "geometry" | "geography" => (Scalar::Text, Kind::Array(Scalar::Text, Unavailable::Null)),
        // Composite types, ranges of somebody's own, and of the built-in ones `xid`, `pg_lsn`, multiranges and the like.
        _ => return Kind::Omitted,
    };
    if in_array { of_arrays } else { Kind::One(scalar) }
}

/// Debezium's adaptive precision: up to milliseconds a time is in milliseconds; a single bit is a boolean.
fn by_modifier(scalar: Scalar, modifier: i32) -> Scalar {
    match (scalar, modifier) {
        (Scalar::TimeMicros, 0..=3) => Scalar::TimeMillis,
        (Scalar::TimestampMicros, 0..=3) => Scalar::TimestampMillis,
        (Scalar::TimestampWithZone(_), 0..=5) => Scalar::TimestampWithZone(u8::try_from(modifier).unwrap_or(6)),
        (Scalar::Bits, 1) => Scalar::Bit,
        // Eleven bits, the highest of them a sign; what is rounded to tens or more has no digit there.
        (Scalar::Numeric(_), 4..) => Scalar::Numeric(u8::try_from((modifier - 4) & 0x7FF).unwrap_or(0)),
        _ => scalar,
    }
}

/// What stands for a TOASTed value the change did not touch.
pub(super) const UNAVAILABLE: &str = "__debezium_unavailable_value";

impl Kind {
    /// Appends the JSON of a value.
    pub(super) fn write(self, out: &mut Vec<u8>, text: &str) -> Result<(), NotA> {
        match self {
            Self::One(scalar) => scalar.write(out, text),
            Self::Array(scalar, _) => array(out, text, scalar),
            // Boxes have semicolons between them.
            Self::Empty if text.split(['{', '}', ',', ';']).all(|it| matches!(it, "" | "NULL")) => array(out, &text.replace(';', ","), Scalar::Text),
            Self::Empty | Self::Null | Self::Omitted => {
                out.extend_from_slice(b"null");
                Ok(())
            }
        }
    }

    /// Appends what stands for a value the stream left out.
    pub(super) fn write_unavailable(self, out: &mut Vec<u8>) {
        /// Java's UUID of the placeholder's bytes.
        const UUID: &[u8] = b"[\"b68a35a7-17ad-35b3-af2a-ae46edb4545a\"]";
        match self {
            Self::One(Scalar::Bytes) => json::base64(out, UNAVAILABLE.bytes()),
            Self::One(Scalar::Bits | Scalar::Shape(_) | Scalar::Vector | Scalar::HalfVector | Scalar::SparseVector)
            | Self::Array(_, Unavailable::Null)
            | Self::Empty
            | Self::Null
            | Self::Omitted => out.extend_from_slice(b"null"),
            Self::One(Scalar::Hstore) => json::string(out, &format!("{{\"{UNAVAILABLE}\":\"{UNAVAILABLE}\"}}")),
            Self::One(_) => json::string(out, UNAVAILABLE),
            Self::Array(_, Unavailable::Uuid) => out.extend_from_slice(UUID),
            Self::Array(_, Unavailable::Numbers) => {
                for (place, byte) in UNAVAILABLE.bytes().enumerate() {
                    out.push(if place == 0 { b'[' } else { b',' });
                    json::integer(out, byte);
                }
                out.push(b']');
            }
            Self::Array(_, unavailable) => {
                out.push(b'[');
                match unavailable {
                    Unavailable::Bytes => json::base64(out, UNAVAILABLE.bytes()),
                    _ => json::string(out, UNAVAILABLE),
                }
                out.push(b']');
            }
        }
    }

    /// Appends what Debezium puts into a NOT NULL column of which the stream tells nothing (REPLICA IDENTITY DEFAULT).
    pub(super) fn write_absent(self, out: &mut Vec<u8>) {
        match self {
            Self::Null | Self::Omitted => out.extend_from_slice(b"null"),
            Self::Array(..) | Self::Empty => out.extend_from_slice(b"[]"),
            Self::One(scalar) => scalar.write_absent(out),
        }
    }
}

impl Scalar {
    fn write_absent(self, out: &mut Vec<u8>) {
        let text: &[u8] = match self {
            Self::Boolean | Self::Bit => b"false",
            Self::Float | Self::Double => b"0.0",
            Self::TimestampWithZone(_) => b"\"1970-01-01T00:00:00Z\"",
            Self::TimeWithZone => b"\"00:00:00Z\"",
            Self::Text | Self::Bytes | Self::Bits => b"\"\"",
            Self::Money => b"\"0.00\"",
            Self::Numeric(scale) => {
                out.extend_from_slice(if scale == 0 { b"\"0" } else { b"\"0." });
                out.resize(out.len() + usize::from(scale), b'0');
                b"\""
            }
            Self::Hstore => b"\"{}\"",
            Self::Shape(shape) => return shape.write_absent(out),
            Self::Vector | Self::HalfVector => b"[]",
            // Debezium has none, and fails.
            Self::SparseVector => b"{\"dimensions\":0,\"vector\":[]}",
            _ => b"0",
        };
        out.extend_from_slice(text);
    }

    fn write(self, out: &mut Vec<u8>, text: &str) -> Result<(), NotA> {
        match self {
            Self::Integer => whole_number(out, text)?,
            Self::Boolean | Self::Bit => out.extend_from_slice(truth(text)?),
            Self::Float => json::float(out, text.parse().map_err(|_| NotA("a number"))?),
            Self::Double => json::double(out, text.parse().map_err(|_| NotA("a number"))?),
            Self::Text | Self::Numeric(_) => json::string(out, text),
            Self::Money => money(out, text),
            Self::Bytes => json::base64(out, hex(text)?),
            Self::Bits => json::base64(out, bits(text)?),
            Self::Date => json::integer(out, moments::days(text)?),
            Self::TimeMillis => json::integer(out, moments::time(text)?.0 / 1000),
            Self::TimeMicros => json::integer(out, moments::time(text)?.0),
            Self::TimeWithZone => moments::write_time_utc(out, text)?,
            Self::TimestampMillis => json::integer(out, moments::timestamp_millis(text)?),
            Self::TimestampMicros => json::integer(out, moments::timestamp(text)?),
            Self::TimestampWithZone(digits) => moments::write_timestamp_utc(out, text, digits)?,
            Self::Interval => json::integer(out, moments::interval(text)?),
            Self::Shape(shape) => shape.write(out, text)?,
            Self::Hstore => hstore(out, text)?,
            Self::Vector => vectors::write(out, text, json::double)?,
            Self::HalfVector => vectors::write(out, text, json::float)?,
            Self::SparseVector => vectors::write_sparse(out, text)?,
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
        // A `bit varying(1)` may have none.
        "" => Ok(b"null"),
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
    Ok(text.trim_start_matches('0').as_bytes().rchunks(8).map(|eight| eight.iter().fold(0, |byte, bit| byte << 1 | (bit - b'0'))))
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
        json::string_within(&mut object, &key);
        object.push(b':');
        let after = match after.strip_prefix("NULL") {
            Some(after) => {
                object.extend_from_slice(b"null");
                after
            }
            None => {
                let (value, after) = quoted(after).ok_or(NotA("an hstore"))?;
                json::string_within(&mut object, &value);
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
            (1560, 11, "00000000001", "\"AQ==\""),
            (1562, 1, "", "null"),
            (1561, 3, "{101}", "null"),
            (1020, -1, "{NULL;NULL}", "[null,null]"),
            (1020, -1, "{(1,1),(0,0);NULL}", "null"),
            (3643, -1, "{'a',NULL}", "[\"'a'\",null]"),
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

    /// Type as the table names it, its id, and the modifier its text stands for.
    const DOCUMENTED: [(&str, u32, i32); 48] = [
        ("smallint", 21, -1),
        ("integer", 23, -1),
        ("bigint", 20, -1),
        ("oid", 26, -1),
        ("boolean", 16, -1),
        ("real", 700, -1),
        ("double precision", 701, -1),
        ("numeric", 1700, -1),
        ("money", 790, -1),
        ("text", 25, -1),
        ("varchar", 1043, -1),
        ("char(4)", 1042, 8),
        ("\"char\"", 18, -1),
        ("name", 19, -1),
        ("bytea", 17, -1),
        ("uuid", 2950, -1),
        ("date", 1082, -1),
        ("time", 1083, -1),
        ("time(3)", 1083, 3),
        ("timetz", 1266, -1),
        ("timestamp", 1114, -1),
        ("timestamp(3)", 1114, 3),
        ("timestamptz", 1184, -1),
        ("timestamptz(2)", 1184, 2),
        ("interval", 1186, -1),
        ("bit(1)", 1560, 1),
        ("bit(8)", 1560, 8),
        ("bit varying", 1562, -1),
        ("json", 114, -1),
        ("jsonb", 3802, -1),
        ("xml", 142, -1),
        ("inet", 869, -1),
        ("cidr", 650, -1),
        ("macaddr", 829, -1),
        ("macaddr8", 774, -1),
        ("tsvector", 3614, -1),
        ("int4range", 3904, -1),
        ("numrange", 3906, -1),
        ("daterange", 3912, -1),
        ("point", 600, -1),
        ("line", 628, -1),
        ("lseg", 601, -1),
        ("circle", 718, -1),
        ("integer[]", 1007, -1),
        ("text[]", 1009, -1),
        ("timestamptz[]", 1185, -1),
        ("circle[]", 719, -1),
        ("bit(3)[]", 1561, 3),
    ];

    #[test]
    fn the_table_of_types_shows_what_is_written() {
        let table = include_str!("../../assets/cdc-types.md");
        let code = |cell: &'static str| cell.strip_prefix('`').and_then(|it| it.strip_suffix('`')).expect("code");
        let rows: Vec<Vec<&str>> =
            table.lines().filter(|it| it.starts_with("| `")).map(|it| it.trim_matches('|').split('|').map(str::trim).collect()).collect();
        let mut shown_types = 0;
        for row in rows.iter().filter(|it| it.len() == 5) {
            let (name, text, json) = (row[0].split("`, `").next().unwrap_or_default().trim_matches('`'), code(row[3]), code(row[4]));
            let (_, type_oid, modifier) = DOCUMENTED.iter().find(|it| it.0 == name).unwrap_or_else(|| panic!("{name} is not among those that are checked"));
            assert_eq!(shown(*type_oid, *modifier, text), json, "{name}");
            shown_types += 1;
        }
        assert_eq!(shown_types, DOCUMENTED.len(), "each is in the table");
    }

    #[test]
    fn what_must_not_be_null_and_is_not_told_is_a_zero_of_its_type() {
        for (type_oid, modifier, json) in [
            (1700, -1, "\"0\""),
            (1700, (10 << 16) + 6, "\"0.00\""),
            (1700, (38 << 16) + 24, "\"0.00000000000000000000\""),
            (790, -1, "\"0.00\""),
            (1184, -1, "\"1970-01-01T00:00:00Z\""),
            (1184, 2, "\"1970-01-01T00:00:00Z\""),
            (1007, -1, "[]"),
        ] {
            let mut out = Vec::new();
            built_in(type_oid, modifier).expect("built in").write_absent(&mut out);
            assert_eq!(String::from_utf8_lossy(&out), json, "type {type_oid}");
        }
    }

    #[test]
    fn types_of_extensions_are_known_by_their_names() {
        let shown = |name: &str, in_array: bool, text: &str| {
            let mut out = Vec::new();
            made(name, "b", in_array).write(&mut out, text).expect("valid");
            String::from_utf8(out).expect("JSON is UTF-8")
        };
        assert_eq!(shown("vector", true, "{\"[1,2]\"}"), "[[1.0,2.0]]");
        assert_eq!([shown("sparsevec", true, "{\"{1:1}/3\"}"), shown("sparsevec", true, "{}")], ["null", "[]"]);
        assert_eq!(shown("isbn", true, "{0-393-04002-X,NULL}"), "[\"0-393-04002-X\",null]");
        assert_eq!(made("vector", "c", false), Kind::Omitted);
    }

    #[test]
    fn an_hstore_becomes_a_string_of_json() {
        let mut out = Vec::new();
        Kind::One(Scalar::Hstore).write(&mut out, r#""a"=>"1", "b"=>NULL"#).expect("valid");
        assert_eq!(String::from_utf8(out).expect("JSON is UTF-8"), r#""{\"a\":\"1\",\"b\":null}""#);
    }

    const KINDS: [Kind; 24] = [
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
        Kind::One(Scalar::TimestampWithZone(6)),
        Kind::One(Scalar::Interval),
        Kind::One(Scalar::Shape(Shape::Circle)),
        Kind::One(Scalar::Hstore),
        Kind::One(Scalar::Vector),
        Kind::One(Scalar::SparseVector),
        Kind::Empty,
        Kind::Array(Scalar::Integer, Unavailable::Numbers),
        Kind::Array(Scalar::Text, Unavailable::Text),
        Kind::Array(Scalar::TimestampWithZone(0), Unavailable::Null),
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
