//! Numbers of a fixed width: right-aligned, whole or in a larger unit, never cut in the middle.

use chrono::{DateTime, Utc};

use crate::units::{Money, bytes_for_people, grouped};

/// A count in `width` cells: `44,059`; where that is too wide, `1.2M`.
pub(crate) fn count(value: u64, width: usize) -> String {
    let whole = grouped(value);
    if whole.len() <= width {
        return format!("{whole:>width$}");
    }
    const UNITS: [(u64, char); 4] = [(1_000, 'k'), (1_000_000, 'M'), (1_000_000_000, 'G'), (1_000_000_000_000, 'T')];
    let (unit, name) = UNITS.iter().find(|(unit, _)| value / unit < 1_000).unwrap_or(&UNITS[3]);
    let (head, tenth) = (value / unit, value % unit * 10 / unit);
    let fitting = [format!("{head}.{tenth}{name}"), format!("{head}{name}")].into_iter().find(|it| it.len() <= width);
    format!("{:>width$}", fitting.unwrap_or_else(|| "#".repeat(width)))
}

/// A count as a table's cell: right-aligned in `width`, with a blank before it whatever it is.
pub(crate) fn cell(value: u64, width: usize) -> String {
    format!(" {}", count(value, width - 1))
}

pub(crate) fn bytes(value: u64, width: usize) -> String {
    format!("{:>width$}", bytes_for_people(value))
}

/// Money in `width` cells; where the cents do not fit, whole units, then `1.2M`.
pub(crate) fn money(value: Money, width: usize) -> String {
    let exact = value.grouped();
    if exact.len() <= width {
        return format!("{exact:>width$}");
    }
    let sign = if value.cents() < 0 { "-" } else { "" };
    format!("{:>width$}", format!("{sign}{}", count(value.cents().unsigned_abs() / 100, width - sign.len()).trim_start()))
}

/// How long something took: `0.02 s`, `12.3 s`, `4:05 min`.
pub(crate) fn seconds(value: f64) -> String {
    match value {
        it if it < 9.995 => format!("{it:.2} s"),
        it if it < 99.95 => format!("{it:.1} s"),
        it => {
            let whole = std::time::Duration::try_from_secs_f64(it).unwrap_or_default().as_secs();
            format!("{}:{:02} min", whole / 60, whole % 60)
        }
    }
}

/// An age in milliseconds, in steps a person can read: `0.4 s`, `119 s`, `2 min`.
pub(crate) fn age(milliseconds: i64) -> String {
    match milliseconds.max(0) {
        it @ 0..10_000 => format!("{}.{} s", it / 1000, it % 1000 / 100),
        it @ 10_000..120_000 => format!("{} s", it / 1000),
        it @ 120_000..7_200_000 => format!("{} min", it / 60_000),
        it => format!("{} h", it / 3_600_000),
    }
}

/// `00:12:41`.
pub(crate) fn uptime(from: DateTime<Utc>, now: DateTime<Utc>) -> String {
    let seconds = (now - from).num_seconds().max(0);
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

pub(crate) fn clock(at: DateTime<Utc>) -> String {
    at.format("%H:%M:%S").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_count_that_does_not_fit_takes_a_larger_unit() {
        assert_eq!(count(44_059, 9), "   44,059");
        assert_eq!(count(1_234_567, 6), "  1.2M");
        assert_eq!(count(12_345, 5), "12.3k");
        assert_eq!(count(999_999_999, 5), " 999M");
        assert_eq!(money(Money::from_cents(-123_456_789), 10), "-1,234,567");
        assert_eq!(money(Money::from_cents(-123_456_789), 6), " -1.2M");
    }

    proptest! {
        #[test]
        fn a_count_is_as_wide_as_its_column(value in 0_u64..1_000_000_000_000_000, width in 5_usize..20) {
            prop_assert_eq!(count(value, width).len(), width);
        }
    }

    #[test]
    fn durations_read_like_speech() {
        assert_eq!(seconds(0.018), "0.02 s");
        assert_eq!(seconds(245.0), "4:05 min");
        assert_eq!(age(430), "0.4 s");
        // A larger unit never says less than the one before.
        assert_eq!([age(119_999), age(120_000), age(7_199_999), age(7_200_000)], ["119 s", "2 min", "119 min", "2 h"]);
    }
}
