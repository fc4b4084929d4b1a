//! PostgreSQL's text of dates, times and intervals → numbers and ISO strings. Pure.

use std::io::Write as _;

use super::values::NotA;

const MICROS: i64 = 1_000_000;
const DAY_MICROS: i64 = 86_400 * MICROS;
/// What PostgreSQL's JDBC driver, and so Debezium, makes of `infinity` where it counts milliseconds.
const INFINITY_MILLIS: i64 = 9_223_372_036_825_200_000;
const MINUS_INFINITY_MILLIS: i64 = -9_223_372_036_832_400_000;

/// Days since 1970 of `2026-02-28` or `0044-03-15 BC`. Infinities are the ends of the range.
pub(super) fn days(text: &str) -> Result<i64, NotA> {
    match text {
        "infinity" => Ok(i64::from(i32::MAX)),
        "-infinity" => Ok(i64::from(i32::MIN)),
        _ => {
            let (date, rest) = Date::split(text)?;
            date.before_christ(rest)?.days()
        }
    }
}

/// Microseconds of the day of `23:59:59.123456`, and what follows the digits.
pub(super) fn time(text: &str) -> Result<(i64, &str), NotA> {
    const NOT: NotA = NotA("a time");
    let bytes = text.as_bytes();
    let two = |at: usize| match (bytes.get(at), bytes.get(at + 1)) {
        (Some(tens @ b'0'..=b'9'), Some(ones @ b'0'..=b'9')) => Ok(i64::from(tens - b'0') * 10 + i64::from(ones - b'0')),
        _ => Err(NOT),
    };
    if bytes.get(2) != Some(&b':') || bytes.get(5) != Some(&b':') {
        return Err(NOT);
    }
    let mut micros = ((two(0)? * 60 + two(3)?) * 60 + two(6)?) * MICROS;
    let mut end = 8;
    if bytes.get(8) == Some(&b'.') {
        let mut unit = MICROS;
        end = 9;
        while let Some(digit @ b'0'..=b'9') = bytes.get(end) {
            unit /= 10;
            micros += i64::from(digit - b'0') * unit;
            end += 1;
        }
    }
    Ok((micros, text.get(end..).ok_or(NOT)?))
}

/// Microseconds since 1970 of a timestamp without time zone. The last 29 years that PostgreSQL knows do not fit: they are its largest.
pub(super) fn timestamp(text: &str) -> Result<i64, NotA> {
    match text {
        "infinity" => Ok(i64::MAX),
        "-infinity" => Ok(i64::MIN),
        _ => {
            let (days, micros) = day_and_time(text)?;
            Ok(days.saturating_mul(DAY_MICROS).saturating_add(micros))
        }
    }
}

/// The same in milliseconds.
pub(super) fn timestamp_millis(text: &str) -> Result<i64, NotA> {
    match text {
        "infinity" => Ok(INFINITY_MILLIS),
        "-infinity" => Ok(MINUS_INFINITY_MILLIS),
        _ => {
            let (days, micros) = day_and_time(text)?;
            Ok(days * (DAY_MICROS / 1000) + micros / 1000)
        }
    }
}

/// Days since 1970, and microseconds of the day.
fn day_and_time(text: &str) -> Result<(i64, i64), NotA> {
    let (date, rest) = Date::split(text)?;
    let (micros, rest) = time(rest.strip_prefix(' ').ok_or(NotA("a timestamp"))?)?;
    Ok((date.before_christ(rest)?.days()?, micros))
}

/// `2026-03-01 12:34:56.5+00` → `"2026-03-01T12:34:56.500000Z"`: always as many digits as the type has.
pub(super) fn write_timestamp_utc(out: &mut Vec<u8>, text: &str, digits: u8) -> Result<(), NotA> {
    const NOT: NotA = NotA("a timestamp with time zone");
    if let Some((day, clock, fraction)) = usual_utc(text.as_bytes()) {
        out.push(b'"');
        out.extend_from_slice(day);
        out.push(b'T');
        out.extend_from_slice(clock);
        write_fraction(out, fraction, digits);
        return Ok(());
    }
    if text == "infinity" || text == "-infinity" {
        super::json::string(out, text);
        return Ok(());
    }
    let (mut date, rest) = Date::split(text)?;
    let clock = rest.strip_prefix(' ').ok_or(NOT)?;
    let (_, zone) = time(clock)?;
    let after = zone.strip_prefix("+00").ok_or(NOT)?;
    date = date.before_christ(after)?;
    out.push(b'"');
    date.write(out);
    out.push(b'T');
    let (seconds, fraction) = clock.strip_suffix(zone).and_then(|it| it.split_at_checked(8)).ok_or(NOT)?;
    out.extend_from_slice(seconds.as_bytes());
    write_fraction(out, fraction.trim_start_matches('.').as_bytes(), digits);
    Ok(())
}

/// `.500000Z"`: PostgreSQL leaves zeros at the end out, Java does not.
fn write_fraction(out: &mut Vec<u8>, fraction: &[u8], digits: u8) {
    if digits > 0 {
        out.push(b'.');
        out.extend((0..usize::from(digits)).map(|at| fraction.get(at).copied().unwrap_or(b'0')));
    }
    out.extend_from_slice(b"Z\"");
}

/// Day, clock and up to six digits of a timestamp in UTC with a year of four digits: those of nearly every row, which
/// already stand there as ISO 8601 wants them.
fn usual_utc(text: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (day, rest) = text.strip_suffix(b"+00")?.split_at_checked(10)?;
    let (clock, rest) = rest.strip_prefix(b" ")?.split_at_checked(8)?;
    let fraction = if rest.is_empty() { rest } else { rest.strip_prefix(b".")? };
    let is = |text: &[u8], form: &[u8]| text.iter().zip(form).all(|(byte, wanted)| if *wanted == b'0' { byte.is_ascii_digit() } else { byte == wanted });
    let usual = is(day, b"0000-00-00") && is(clock, b"00:00:00") && fraction.len() <= 6 && fraction.iter().all(u8::is_ascii_digit);
    usual.then_some((day, clock, fraction))
}

/// `12:34:56.789+05:30` → `"07:04:56.789Z"`: in UTC, no more digits than needed. Midnight as the end of a day stays its end in UTC.
pub(super) fn write_time_utc(out: &mut Vec<u8>, text: &str) -> Result<(), NotA> {
    let (micros, zone) = time(text)?;
    let (sign, offset) = zone.split_at_checked(1).ok_or(NotA("a time with time zone"))?;
    let mut seconds = 0;
    for (part, unit) in offset.split(':').zip([3600, 60, 1]) {
        seconds += part.parse::<i64>().map_err(|_| NotA("a time with time zone"))?.checked_mul(unit).ok_or(NotA("a time with time zone"))?;
    }
    let east = if sign == "-" { -seconds } else { seconds };
    let micros = match micros - east.checked_mul(MICROS).ok_or(NotA("a time with time zone"))? {
        DAY_MICROS if east == 0 => DAY_MICROS,
        micros => micros.rem_euclid(DAY_MICROS),
    };
    let (seconds, fraction) = (micros / MICROS, micros % MICROS);
    let written = write!(out, "\"{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
    debug_assert!(written.is_ok(), "writing to memory cannot fail");
    if fraction != 0 {
        let written = write!(out, ".{fraction:06}");
        debug_assert!(written.is_ok(), "writing to memory cannot fail");
        while out.last() == Some(&b'0') {
            out.pop();
        }
    }
    out.extend_from_slice(b"Z\"");
    Ok(())
}

/// Microseconds of `1 year 2 mons 3 days 04:05:06.789`, in floating point as Debezium reckons them: far from zero the last digits are
/// those of a double, and what is too long is the longest.
pub(super) fn interval(text: &str) -> Result<i64, NotA> {
    const NOT: NotA = NotA("an interval");
    /// 365.25 days a year.
    const MONTH_DAYS: f64 = 30.4375;
    let whole = |text: &str| text.parse::<i32>().map(f64::from).map_err(|_| NOT);
    let (mut months, mut days, mut hours, mut minutes, mut seconds) = (0.0, 0.0, 0.0, 0.0, 0.0);
    let mut words = text.split(' ');
    while let Some(word) = words.next() {
        if word.contains(':') {
            let (sign, clock) = match word.strip_prefix('-') {
                Some(clock) => (-1.0, clock),
                None => (1.0, word.strip_prefix('+').unwrap_or(word)),
            };
            let mut parts = clock.splitn(3, ':');
            let mut part = || parts.next().filter(|it| it.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')).ok_or(NOT);
            hours = sign * whole(part()?)?;
            minutes = sign * whole(part()?)?;
            seconds = sign * part()?.parse::<f64>().map_err(|_| NOT)?;
            continue;
        }
        let count = whole(word)?;
        match words.next().ok_or(NOT)?.trim_end_matches('s') {
            "year" => months += count * 12.0,
            "mon" => months += count,
            "day" => days += count,
            _ => return Err(NOT),
        }
    }
    days += months * MONTH_DAYS;
    // What does not fit is the largest number that does, here and in Java.
    Ok(((((days * 24.0 + hours) * 60.0 + minutes) * 60.0 + seconds) * 1e6) as i64)
}

/// A day of the proleptic Gregorian calendar; the year before 1 is 0.
#[derive(Clone, Copy)]
struct Date {
    year: i64,
    month: i64,
    day: i64,
}

impl Date {
    /// The date a text begins with, and the rest.
    fn split(text: &str) -> Result<(Self, &str), NotA> {
        const NOT: NotA = NotA("a date");
        let bytes = text.as_bytes();
        let mut numbers = [0_i64; 3];
        let mut at = 0;
        for (place, number) in numbers.iter_mut().enumerate() {
            let start = at;
            while let Some(digit @ b'0'..=b'9') = bytes.get(at) {
                if at - start == 7 {
                    return Err(NOT);
                }
                *number = *number * 10 + i64::from(digit - b'0');
                at += 1;
            }
            if at == start || (place < 2 && bytes.get(at) != Some(&b'-')) {
                return Err(NOT);
            }
            at += usize::from(place < 2);
        }
        let [year, month, day] = numbers;
        if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
            return Err(NOT);
        }
        Ok((Self { year, month, day }, text.get(at..).ok_or(NOT)?))
    }

    /// The same day, told what stands behind it: nothing, or ` BC`.
    fn before_christ(self, rest: &str) -> Result<Self, NotA> {
        match rest {
            "" => Ok(self),
            " BC" => Ok(Self { year: 1 - self.year, ..self }),
            _ => Err(NotA("a date")),
        }
    }

    fn days(self) -> Result<i64, NotA> {
        // Howard Hinnant's days_from_civil: years begin in March, so the leap day is the last.
        let year = if self.month <= 2 { self.year - 1 } else { self.year };
        let era = year.div_euclid(400);
        let year_of_era = year - era * 400;
        let day_of_year = (153 * (self.month + if self.month > 2 { -3 } else { 9 }) + 2) / 5 + self.day - 1;
        Ok(era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468)
    }

    /// ISO 8601 as Java writes it: a sign where the year is negative or has more than four digits.
    fn write(self, out: &mut Vec<u8>) {
        let sign = match self.year {
            ..0 => "-",
            10_000.. => "+",
            _ => "",
        };
        let written = write!(out, "{sign}{:04}-{:02}-{:02}", self.year.abs(), self.month, self.day);
        debug_assert!(written.is_ok(), "writing to memory cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Vec<u8>) -> Result<(), NotA>) -> String {
        let mut out = Vec::new();
        write(&mut out).expect("valid");
        String::from_utf8(out).expect("JSON is UTF-8")
    }

    #[test]
    fn dates_count_from_1970() {
        assert_eq!(
            ["1970-01-01", "1969-12-31", "2026-02-28", "9999-12-31", "0001-01-01", "1582-10-10"].map(days),
            [0, -1, 20_512, 2_932_896, -719_162, -141_432].map(Ok)
        );
        assert_eq!(days("0044-03-15 BC"), Ok(-735_160));
        for text in ["", "2026", "2026-13-01", "2026-01-01x", "2026-01-", "99999999-01-01"] {
            assert!(days(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn timestamps_are_microseconds() {
        assert_eq!(timestamp("2026-03-01 12:34:56.123456"), Ok(1_772_368_496_123_456));
        assert_eq!(timestamp("1969-12-31 23:59:59.999999"), Ok(-1));
        assert_eq!(timestamp("0044-03-15 12:00:00 BC"), Ok(-63_517_780_800_000_000));
        assert_eq!(timestamp("9999-12-31 23:59:59.999999"), Ok(253_402_300_799_999_999));
        assert_eq!([timestamp("infinity"), timestamp("294276-12-31 23:59:59.999999")], [Ok(i64::MAX), Ok(i64::MAX)]);
        assert_eq!(timestamp_millis("294276-12-31 23:59:59.999"), Ok(9_224_318_015_999_999));
        assert_eq!(timestamp_millis("1969-12-31 23:59:59.999"), Ok(-1));
    }

    #[test]
    fn instants_are_iso_strings_with_six_digits() {
        let shown = |text| written(|out| write_timestamp_utc(out, text, 6));
        assert_eq!(shown("2026-01-03 10:00:00.5+00"), "\"2026-01-03T10:00:00.500000Z\"");
        assert_eq!(shown("1900-01-01 00:00:00+00"), "\"1900-01-01T00:00:00.000000Z\"");
        assert_eq!(shown("0044-03-15 12:00:00+00 BC"), "\"-0043-03-15T12:00:00.000000Z\"");
        assert_eq!(shown("-infinity"), "\"-infinity\"");
        let short = |text, digits| written(|out| write_timestamp_utc(out, text, digits));
        assert_eq!(short("2026-01-03 10:00:00.5+00", 2), "\"2026-01-03T10:00:00.50Z\"");
        assert_eq!(short("12026-01-03 10:00:00.5+00", 1), "\"+12026-01-03T10:00:00.5Z\"");
        assert!(write_timestamp_utc(&mut Vec::new(), "2026-01-03 10:00:00+01", 6).is_err());
    }

    #[test]
    fn times_of_day_are_moved_to_utc() {
        let shown = |text| written(|out| write_time_utc(out, text));
        assert_eq!(["12:34:56.789+05:30", "24:00:00+00", "23:59:59.9999-08"].map(shown), ["\"07:04:56.789Z\"", "\"24:00:00Z\"", "\"07:59:59.9999Z\""]);
    }

    #[test]
    fn intervals_count_a_month_as_a_twelfth_of_a_year() {
        assert_eq!(interval("1 year 2 mons 3 days 04:05:06.789"), Ok(37_091_106_789_000));
        assert_eq!(interval("-1 days +02:03:00"), Ok(-79_020_000_000));
        assert_eq!(interval("100:00:00"), Ok(360_000_000_000));
        // 273906.79 s are a little less in a double.
        assert_eq!(interval("3 days 04:05:06.79"), Ok(273_906_789_999));
        assert_eq!([interval("178000000 years"), interval("-00:00:00.000001")], [Ok(i64::MAX), Ok(-1)]);
    }
}
