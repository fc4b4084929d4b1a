//! What Debezium puts into a NOT NULL column with a default, where the stream does not tell its value. Pure.
//!
//! It reads the default as the catalog prints it, by patterns: a literal becomes its value, a call of a function the zero of its type,
//! and what it cannot read is as if there were no default.

use super::{
    json,
    values::{Kind, Scalar},
};

/// Types whose defaults are read, and what stands for a call of a function.
const READ: &[(u32, &str)] = &[
    (16, "false"),
    (20, "0"),
    (21, "0"),
    (23, "0"),
    (700, "0.0"),
    (701, "0.0"),
    (1700, "0.0"),
    (25, ""),
    (1042, ""),
    (1043, ""),
    (114, "{}"),
    (3802, "{}"),
    (2950, "00000000-0000-0000-0000-000000000000"),
    (1082, "1970-01-01"),
    (1083, "00:00:00"),
    (1114, "1970-01-01 00:00:00"),
    (1184, "1970-01-01 00:00:00+00"),
    (1186, "00:00:00"),
    (1560, ""),
    (1562, ""),
];

/// The JSON that stands for a value which is not told; None where it is that of a column without a default.
pub(super) fn absent(kind: Kind, type_oid: u32, is_enum: bool, expression: &str) -> Option<Vec<u8>> {
    let made = READ.iter().find(|it| it.0 == type_oid).map(|it| it.1).or(is_enum.then_some(""))?;
    let text = if is_call(expression) { made.to_owned() } else { literal(expression).unwrap_or_else(|| expression.to_owned()) };
    let mut out = Vec::new();
    match kind {
        Kind::One(Scalar::Boolean) => out.extend_from_slice(if text.eq_ignore_ascii_case("true") { b"true" } else { b"false" }),
        Kind::One(Scalar::Integer) => json::integer(&mut out, integer(type_oid, &text)?),
        Kind::One(Scalar::Numeric(scale)) => json::string(&mut out, &numeric(&text, (type_oid == 1700).then_some(scale).filter(|it| *it > 0))?),
        Kind::One(Scalar::Date | Scalar::TimestampMicros | Scalar::TimestampMillis | Scalar::TimestampWithZone(_)) if text.contains("infinity") => return None,
        Kind::One(Scalar::Bit) if text.is_empty() => return None,
        // A default keeps digits for which its column has no room.
        Kind::One(Scalar::TimestampWithZone(digits)) => {
            let behind = text.split_once('.').map_or("", |it| it.1);
            let own = behind.bytes().take_while(u8::is_ascii_digit).count();
            Kind::One(Scalar::TimestampWithZone(digits.max(u8::try_from(own).unwrap_or(6)))).write(&mut out, &text).ok()?;
        }
        kind => kind.write(&mut out, &text).ok()?,
    }
    Some(out)
}

/// `now()`, `(now() + …`, and the one function that stands without brackets and is not left alone.
fn is_call(expression: &str) -> bool {
    let name = expression.strip_prefix('(').unwrap_or(expression);
    let end = name.find(|it: char| !it.is_ascii_alphabetic() && it != '_').unwrap_or(name.len());
    (end > 0 && name[end..].starts_with('(')) || expression.starts_with("CURRENT_TIMESTAMP")
}

/// What stands between the first quotes, of which two are one.
fn literal(expression: &str) -> Option<String> {
    let mut rest = &expression[expression.find('\'')? + 1..];
    let mut text = String::new();
    loop {
        let end = rest.find('\'')?;
        text += &rest[..end];
        match rest[end + 1..].strip_prefix('\'') {
            Some(after) => {
                text.push('\'');
                rest = after;
            }
            None => return Some(text),
        }
    }
}

fn integer(type_oid: u32, text: &str) -> Option<i64> {
    match type_oid {
        21 => text.parse::<i16>().ok().map(i64::from),
        23 => text.parse::<i32>().ok().map(i64::from),
        _ => text.parse().ok(),
    }
}

/// With so many digits behind the point as the type has; None where there are more.
fn numeric(text: &str, scale: Option<u8>) -> Option<String> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let (whole, behind) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() || !digits.bytes().all(|it| it.is_ascii_digit() || it == b'.') {
        return None;
    }
    let is_zero = digits.bytes().all(|it| matches!(it, b'0' | b'.'));
    let missing = scale.map_or(Some(0), |it| usize::from(it).checked_sub(behind.len()))?;
    let point = if behind.is_empty() && missing > 0 { "." } else { "" };
    Some(format!("{}{digits}{point}{}", if is_zero || digits == text { "" } else { "-" }, "0".repeat(missing)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cdc::values::built_in;

    /// As PostgreSQL prints the default, and what the real Debezium put into `before`.
    #[test]
    fn a_default_stands_for_what_is_not_told_as_far_as_debezium_can_read_it() {
        for (type_oid, modifier, expression, json) in [
            (25, -1, "'it''s'::text", Some("\"it's\"")),
            (25, -1, "''::text", Some("\"\"")),
            (25, -1, "CURRENT_USER", Some("\"CURRENT_USER\"")),
            (25, -1, "lower('X'::text)", Some("\"\"")),
            (25, -1, "('x'::text || 'y'::text)", Some("\"x\"")),
            (1042, 8, "'ab'::bpchar", Some("\"ab\"")),
            (23, -1, "7", Some("7")),
            (20, -1, "'-5'::integer", Some("-5")),
            (23, -1, "nextval('s'::regclass)", Some("0")),
            (23, -1, "(1 + 1)", None),
            (16, -1, "true", Some("true")),
            (16, -1, "(1 > 0)", Some("false")),
            (1700, (10 << 16) + 6, "1.5", Some("\"1.50\"")),
            (1700, (10 << 16) + 6, "1.005", None),
            (1700, (10 << 16) + 6, "'-1'::numeric", Some("\"-1.00\"")),
            (1700, (10 << 16) + 6, "random()", Some("\"0.00\"")),
            (1700, -1, "0", Some("\"0\"")),
            (701, -1, "'NaN'::double precision", Some("\"NaN\"")),
            (700, -1, "1.5", Some("1.5")),
            (2950, -1, "gen_random_uuid()", Some("\"00000000-0000-0000-0000-000000000000\"")),
            (1184, -1, "now()", Some("\"1970-01-01T00:00:00.000000Z\"")),
            (1184, 3, "now()", Some("\"1970-01-01T00:00:00.000Z\"")),
            (1184, -1, "CURRENT_TIMESTAMP", Some("\"1970-01-01T00:00:00.000000Z\"")),
            (1184, -1, "(now() + '1 day'::interval)", Some("\"1970-01-01T00:00:00.000000Z\"")),
            (1184, -1, "'2026-01-01 00:00:00+00'::timestamp with time zone", Some("\"2026-01-01T00:00:00.000000Z\"")),
            (1184, 0, "'1582-10-10 12:00:00.5+00'::timestamp with time zone", Some("\"1582-10-10T12:00:00.5Z\"")),
            (1184, -1, "'infinity'::timestamp with time zone", None),
            (1082, -1, "CURRENT_DATE", None),
            (1082, -1, "'2026-01-01'::date", Some("20454")),
            (1186, -1, "'1 day'::interval", Some("86400000000")),
            (3802, -1, "'{\"a\": 1}'::jsonb", Some("\"{\\\"a\\\": 1}\"")),
            (1560, 1, "'1'::\"bit\"", Some("true")),
            (1560, 8, "'10101010'::\"bit\"", Some("\"qg==\"")),
            // Of these Debezium reads no default.
            (17, -1, "'\\x01'::bytea", None),
            (869, -1, "'10.0.0.1'::inet", None),
            (1007, -1, "'{1,2}'::integer[]", None),
        ] {
            let kind = built_in(type_oid, modifier).expect("built in");
            let written = absent(kind, type_oid, false, expression).map(|it| String::from_utf8(it).expect("JSON is UTF-8"));
            assert_eq!(written.as_deref(), json, "{expression}");
        }
        assert_eq!(absent(Kind::One(Scalar::Text), 99_999, true, "'ok'::mood").as_deref(), Some(&b"\"ok\""[..]));
    }
}
