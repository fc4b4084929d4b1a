//! Two sides of a table, range by range and key by key, and words for how they differ. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
};

use serde::{Deserialize, Serialize};

use super::fold::Place;
use crate::units::Money;

/// Ranges that are looked at key by key, and findings that are told; the rest is counted.
pub(super) const RANGES_SHOWN: usize = 4;
const FINDINGS_SHOWN: usize = 5;

/// What is held in a range, or under a key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub rows: i64,
    pub cents: i128,
}

/// Range → what it holds. Range `n` are the keys from `n × width` on; an absent one is empty.
pub(super) type Ranges = BTreeMap<i64, Held>;

/// Key → what it holds; more than one row is a doubled row.
pub(super) type Keys = BTreeMap<i64, Held>;

/// The keys of a range, as SQL's division cuts them (it truncates, so range 0 is twice as wide).
pub(super) fn keys(range: i64, width: i64) -> RangeInclusive<i64> {
    let first = range.saturating_mul(width);
    match range {
        0 => 1 - width..=width - 1,
        1.. => first..=first.saturating_add(width - 1),
        _ => first.saturating_sub(width - 1)..=first,
    }
}

/// The ranges in which the two sides do not hold the same.
pub(super) fn differing(expected: &Ranges, actual: &Ranges) -> Vec<i64> {
    let all: BTreeSet<i64> = expected.keys().chain(actual.keys()).copied().collect();
    let held = |side: &Ranges, range| side.get(&range).copied().unwrap_or_default();
    all.into_iter().filter(|range| held(expected, *range) != held(actual, *range)).collect()
}

/// How the lower side differs under one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Difference {
    Missing,
    Extra,
    Doubled(i64),
    Off(i128),
}

/// Every key under which the two sides differ.
pub(super) fn differences(expected: &Keys, actual: &Keys) -> Vec<(i64, Difference)> {
    let all: BTreeSet<i64> = expected.keys().chain(actual.keys()).copied().collect();
    let differs = |key| match (expected.get(&key), actual.get(&key)) {
        (Some(_), None) => Some(Difference::Missing),
        (None, Some(_)) => Some(Difference::Extra),
        (Some(up), Some(down)) if down.rows > up.rows => Some(Difference::Doubled(down.rows)),
        (Some(up), Some(down)) if up.rows > down.rows => Some(Difference::Missing),
        (Some(up), Some(down)) if up.cents != down.cents => Some(Difference::Off(down.cents - up.cents)),
        _ => None,
    };
    all.into_iter().filter_map(|key| differs(key).map(|it| (key, it))).collect()
}

/// The same where the upper side is the source as it is now: `moved` keys have changed since the mark and prove nothing, and a
/// key that is gone was deleted since, unless the lower side holds more than the mark saw.
pub(super) fn differences_of_settled(
    now: &Keys,
    moved: &BTreeSet<i64>,
    actual: &Keys,
    at_mark: Option<&Held>,
    in_range: Option<&Held>,
) -> Vec<(i64, Difference)> {
    let rows = |held: Option<&Held>| held.map_or(0, |it| it.rows);
    let more = rows(in_range) > rows(at_mark);
    let all = differences(now, actual).into_iter();
    all.filter(|(key, difference)| !moved.contains(key) && (*difference != Difference::Extra || more)).collect()
}

/// `id 17 is missing in raw; ids 40 to 43 are in raw only; id 9 is off by 0.01 in raw`.
pub(super) fn detail(found: &[(i64, Difference)], differing: &[i64], width: i64, down: Place) -> String {
    let mut sentences: Vec<String> = runs(found).map(|run| sentence(run, down)).collect();
    if sentences.len() > FINDINGS_SHOWN {
        sentences.truncate(FINDINGS_SHOWN);
        sentences.push("and more".to_owned());
    }
    let shown = if found.is_empty() { 0 } else { RANGES_SHOWN };
    if let (Some(first), Some(last)) = (differing.get(shown), differing.last()) {
        let (first, last) = (keys(*first, width), keys(*last, width));
        let rows_moved = if found.is_empty() { ", in rows that have changed since the mark" } else { "" };
        sentences.push(format!("{down} differs between ids {} and {}{rows_moved}", first.start().max(&0), last.end()));
    }
    sentences.join("; ")
}

/// Neighbours that differ in the same way, as one. (Keys have holes; a neighbour is the next key that differs, one further.)
fn runs(found: &[(i64, Difference)]) -> impl Iterator<Item = &[(i64, Difference)]> {
    found.chunk_by(|left, right| left.1 == right.1 && right.0 == left.0 + 1)
}

fn sentence(run: &[(i64, Difference)], down: Place) -> String {
    let (first, difference) = run[0];
    let last = run[run.len() - 1].0;
    let (ids, are) = if first == last { (format!("id {first}"), "is") } else { (format!("ids {first} to {last}"), "are") };
    match difference {
        Difference::Missing => format!("{ids} {are} missing in {down}"),
        Difference::Extra => format!("{ids} {are} only in {down}"),
        Difference::Doubled(rows) => format!("{ids} {are} {rows} times in {down}"),
        Difference::Off(cents) => match i64::try_from(cents) {
            Ok(cents) => format!("{ids} {are} off by {} in {down}", Money::from_cents(cents)),
            Err(_) => format!("{ids} {are} off by more than money can be in {down}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn side(rows: &[(i64, i64, i128)]) -> Keys {
        rows.iter().map(|(key, rows, cents)| (*key, Held { rows: *rows, cents: *cents })).collect()
    }

    fn ranges(keys: &Keys, width: i64) -> Ranges {
        let mut ranges = Ranges::new();
        for (key, held) in keys {
            let range = ranges.entry(key / width).or_default();
            range.rows += held.rows;
            range.cents += held.cents;
        }
        ranges
    }

    #[test]
    fn neighbours_are_told_together() {
        let expected = side(&[(1, 1, 5), (2, 1, 5), (3, 1, 5), (7, 1, 5), (8, 1, 5)]);
        let actual = side(&[(3, 1, 4), (7, 2, 10), (8, 1, 5), (9, 1, 5)]);
        let found = differences(&expected, &actual);
        assert_eq!(
            detail(&found, &[0], 10, Place::Raw),
            "ids 1 to 2 are missing in raw; id 3 is off by -0.01 in raw; id 7 is 2 times in raw; id 9 is only in raw"
        );
    }

    #[test]
    fn what_moved_since_the_mark_proves_nothing() {
        let now = side(&[(1, 1, 5), (2, 1, 9)]);
        let actual = side(&[(2, 1, 5), (3, 1, 5)]);
        let (at_mark, in_range) = (Held { rows: 3, cents: 15 }, Held { rows: 2, cents: 10 });
        let found = differences_of_settled(&now, &BTreeSet::from([2]), &actual, Some(&at_mark), Some(&in_range));
        assert_eq!(found, [(1, Difference::Missing)]);
        assert_eq!(detail(&[], &[4], 10, Place::Lake), "the lake differs between ids 40 and 49, in rows that have changed since the mark");
    }

    proptest! {
        #[test]
        fn one_change_is_found_in_its_range_and_under_its_key(
            rows in prop::collection::btree_map(-500_i64..500, 0_i128..1_000, 1..80), width in 1_i64..90, which in any::<prop::sample::Index>(), kind in 0..3
        ) {
            let expected: Keys = rows.iter().map(|(key, cents)| (*key, Held { rows: 1, cents: *cents })).collect();
            let key = *which.get(&rows.keys().copied().collect::<Vec<_>>());
            let mut actual = expected.clone();
            match kind {
                0 => { actual.remove(&key); }
                1 => actual.entry(key).or_default().cents += 1,
                _ => actual.entry(key).or_default().rows += 1,
            }
            let differing = differing(&ranges(&expected, width), &ranges(&actual, width));
            prop_assert_eq!(differing.len(), 1);
            let within = keys(differing[0], width);
            prop_assert!(within.contains(&key));
            let cut = |side: &Keys| side.range(within.clone()).map(|(key, held)| (*key, *held)).collect::<Keys>();
            let found = differences(&cut(&expected), &cut(&actual));
            prop_assert_eq!(found.iter().map(|it| it.0).collect::<Vec<_>>(), [key]);
        }
    }
}
