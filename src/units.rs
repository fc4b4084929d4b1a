//! Amounts as people write them: money in cents, durations, sizes, counts.

use std::{fmt, iter::Sum, ops, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Money in whole cents. Exact: no floats, and arithmetic that overflows panics instead of wrapping.
///
/// On the wire and in JSON it is a decimal string with two digits: `"-5000.00"`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Money(i64);

/// Not an amount of money: more than two decimals, not a number, or beyond ±92 quadrillion.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not an amount of money in cents: {0:?}")]
pub struct NotMoney(String);

impl Money {
    pub const ZERO: Self = Self(0);

    pub const fn from_cents(cents: i64) -> Self {
        Self(cents)
    }

    pub const fn cents(self) -> i64 {
        self.0
    }

    /// With thousands separators, for people: `640,930.12`.
    pub fn grouped(self) -> String {
        let sign = if self.0 < 0 { "-" } else { "" };
        format!("{sign}{}.{:02}", grouped(self.0.unsigned_abs() / 100), self.0.unsigned_abs() % 100)
    }
}

impl fmt::Display for Money {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.0 < 0 { "-" } else { "" };
        let text = format!("{sign}{}.{:02}", self.0.unsigned_abs() / 100, self.0.unsigned_abs() % 100);
        formatter.pad(&text)
    }
}

impl FromStr for Money {
    type Err = NotMoney;

    /// Accepts what PostgreSQL's `numeric(18,2)` prints, and shorter forms of it: `12`, `12.5`, `-12.50`.
    fn from_str(text: &str) -> Result<Self, NotMoney> {
        let refuse = || NotMoney(text.chars().take(40).collect());
        let (negative, digits) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (whole, cents) = digits.split_once('.').unwrap_or((digits, ""));
        let all_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || cents.len() > 2 || !all_digits(whole) || !all_digits(cents) {
            return Err(refuse());
        }
        let magnitude: i64 = format!("{whole}{cents:0<2}").parse().map_err(|_| refuse())?;
        Ok(Self(if negative { -magnitude } else { magnitude }))
    }
}

impl ops::Add for Money {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.checked_add(other.0).expect("a sum of money beyond 92 quadrillion is a bug"))
    }
}

impl ops::Sub for Money {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0.checked_sub(other.0).expect("a difference of money beyond 92 quadrillion is a bug"))
    }
}

impl ops::Neg for Money {
    type Output = Self;
    fn neg(self) -> Self {
        Self::ZERO - self
    }
}

impl ops::AddAssign for Money {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Money {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::ZERO, ops::Add::add)
    }
}

impl Serialize for Money {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Money {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A duration in config and on the command line: `"30s"`, `"2m"`, `"500ms"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl Span {
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    pub const fn from_millis(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }
}

impl ops::Deref for Span {
    type Target = Duration;
    fn deref(&self) -> &Duration {
        &self.0
    }
}

impl fmt::Display for Span {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text: String = humantime::format_duration(self.0).to_string().split(' ').collect();
        // humantime says 30days; the config says 30d.
        formatter.write_str(&text.replace("days", "d").replace("day", "d"))
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text).map(Self).map_err(|_| format!("{text:?} is not a duration: write a number and a unit, like 500ms, 30s, 2m, 1h or 30d"))
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A number of bytes in config: `"64MiB"`, `"500kB"`, `"1048576B"`. Binary units are powers of 1,024, decimal ones of 1,000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

const SIZE_UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("{text:?} is not a size: write a whole number and a unit, like 64MiB, 500kB or 1048576B");
        let (unit, bytes) = SIZE_UNITS.iter().find(|(unit, _)| text.ends_with(unit)).ok_or_else(refuse)?;
        let number = text[..text.len() - unit.len()].trim();
        let number: u64 = number.parse().map_err(|_| refuse())?;
        number.checked_mul(*bytes).map(Self).ok_or_else(refuse)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, bytes) = SIZE_UNITS.iter().find(|(_, bytes)| self.0 >= *bytes && self.0.is_multiple_of(*bytes)).unwrap_or(&("B", 1));
        write!(formatter, "{}{unit}", self.0 / bytes)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A count for people: `44,059`.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes for people, at most four digits: `61 KiB`, `4.1 MiB`.
pub fn bytes_for_people(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut whole, mut rest, mut unit) = (bytes, 0, 0);
    while whole >= 1024 && unit + 1 < UNITS.len() {
        (whole, rest, unit) = (whole / 1024, whole % 1024, unit + 1);
    }
    if unit > 0 && whole < 10 { format!("{whole}.{} {}", rest * 10 / 1024, UNITS[unit]) } else { format!("{whole} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn money_reads_what_it_writes(cents in any::<i64>().prop_filter("its negation exists", |it| *it != i64::MIN)) {
            let money = Money::from_cents(cents);
            prop_assert_eq!(money.to_string().parse::<Money>(), Ok(money));
        }

        #[test]
        fn a_size_reads_what_it_writes(bytes in any::<u64>()) {
            prop_assert_eq!(Size(bytes).to_string().parse::<Size>(), Ok(Size(bytes)));
        }

        #[test]
        fn a_span_reads_what_it_writes(milliseconds in 0_u64..10_000_000_000) {
            let span = Span::from_millis(milliseconds);
            prop_assert_eq!(span.to_string().parse::<Span>(), Ok(span));
        }
    }

    #[test]
    fn money_refuses_what_is_not_whole_cents() {
        for text in ["", "-", ".5", "1.234", "1e3", "NaN", "1,000.00", "92233720368547758.08"] {
            assert!(text.parse::<Money>().is_err(), "{text:?}");
        }
        assert_eq!("-0.5".parse(), Ok(Money::from_cents(-50)));
    }

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(999), "999");
        assert_eq!(Money::from_cents(-50_000_005).grouped(), "-500,000.05");
        assert_eq!(bytes_for_people(61 * 1024), "61 KiB");
        assert_eq!(bytes_for_people(4_300_000), "4.1 MiB");
        assert_eq!(Span::from_secs(30 * 86_400).to_string(), "30d");
    }
}
