//! Names in the bucket, and back: pure and reversible.

use std::{fmt, str::FromStr};

use chrono::{DateTime, NaiveDate};

/// A data object: `raw/<table>/dt=<date>/p=<partition>/<first offset>-<last offset>-<16 hex of its SHA-256>.parquet`.
///
/// Both offsets and the hash are in the name, so a writer that encodes the same range differently cannot touch this object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataKey {
    /// The table's name in the lake: `customers`, `boundaries`, `other_schema.table`.
    pub table: String,
    /// UTC date of the records' Kafka timestamps.
    pub date: NaiveDate,
    pub partition: i32,
    pub first_offset: i64,
    pub last_offset: i64,
    /// The first 16 hex digits of the object's SHA-256.
    pub hash: String,
}

/// Where all data objects are.
pub const DATA_PREFIX: &str = "raw/";
/// Where all commit records are.
pub const LOG_PREFIX: &str = "_log/";
/// How much of the hash is in a data object's name.
const HASH_DIGITS: usize = 16;

impl DataKey {
    pub fn hash_of(sha256_hex: &str) -> String {
        sha256_hex.chars().take(HASH_DIGITS).collect()
    }
}

impl fmt::Display for DataKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, date, partition, first_offset, last_offset, hash } = self;
        write!(formatter, "{DATA_PREFIX}{table}/dt={date}/p={partition}/{first_offset:020}-{last_offset:020}-{hash}.parquet")
    }
}

/// Not the name of an object of ours.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a name the lake gives: {0:?}")]
pub struct ForeignKey(pub String);

impl FromStr for DataKey {
    type Err = ForeignKey;

    fn from_str(key: &str) -> Result<Self, ForeignKey> {
        let parse = || {
            let mut parts = key.strip_prefix(DATA_PREFIX)?.strip_suffix(".parquet")?.split('/');
            let (table, date, partition, name) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
            let mut name = name.split('-');
            let (first_offset, last_offset, hash) = (name.next()?, name.next()?, name.next()?);
            Some(Self {
                table: table.to_owned(),
                date: date.strip_prefix("dt=")?.parse().ok()?,
                partition: partition.strip_prefix("p=")?.parse().ok()?,
                first_offset: first_offset.parse().ok()?,
                last_offset: last_offset.parse().ok()?,
                hash: hash.to_owned(),
            })
        };
        // Only what prints back to the same bytes is ours: one object, one name.
        parse().filter(|it| it.to_string() == key).ok_or_else(|| ForeignKey(key.to_owned()))
    }
}

/// A commit record: `_log/<topic>/<partition>/<first offset>.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogKey {
    pub topic: String,
    pub partition: i32,
    pub first_offset: i64,
}

/// `_log/<topic>/<partition>/`.
pub fn log_prefix(topic: &str, partition: i32) -> String {
    format!("{LOG_PREFIX}{topic}/{partition}/")
}

impl LogKey {
    /// Sorts before the record that starts at `offset`, and behind every record that starts earlier: for `StartAfter`.
    pub fn just_before(topic: &str, partition: i32, offset: i64) -> String {
        format!("{}{:020}", log_prefix(topic, partition), offset.max(0))
    }
}

impl fmt::Display for LogKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}{:020}.json", log_prefix(&self.topic, self.partition), self.first_offset)
    }
}

impl FromStr for LogKey {
    type Err = ForeignKey;

    fn from_str(key: &str) -> Result<Self, ForeignKey> {
        let parse = || {
            let mut parts = key.strip_prefix(LOG_PREFIX)?.strip_suffix(".json")?.split('/');
            let (topic, partition, first_offset) = (parts.next()?, parts.next()?, parts.next()?);
            Some(Self { topic: topic.to_owned(), partition: partition.parse().ok()?, first_offset: first_offset.parse().ok()? })
        };
        parse().filter(|it| it.to_string() == key).ok_or_else(|| ForeignKey(key.to_owned()))
    }
}

/// The UTC date of a Kafka timestamp. A timestamp no calendar reaches (a producer's nonsense) counts as 1970-01-01.
pub fn date_of(timestamp_ms: i64) -> NaiveDate {
    DateTime::from_timestamp_millis(timestamp_ms).unwrap_or_default().date_naive()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_data_key_names_its_range_and_back(
            table in "[a-z_]{1,12}(\\.[a-z_]{1,12})?", timestamp_ms in 0_i64..4_000_000_000_000, partition in 0..1_000,
            first_offset in 0_i64..i64::MAX / 2, n_offsets in 0_i64..1_000_000, hash in "[0-9a-f]{16}",
        ) {
            let key = DataKey { table, date: date_of(timestamp_ms), partition, first_offset, last_offset: first_offset + n_offsets, hash };
            prop_assert_eq!(key.to_string().parse(), Ok(key));
        }

        #[test]
        fn commit_records_sort_by_offset(one in 0_i64.., other in 0_i64..) {
            let key = |first_offset| LogKey { topic: "bank.public.accounts".into(), partition: 0, first_offset };
            prop_assert_eq!(key(one).to_string().cmp(&key(other).to_string()), one.cmp(&other));
            prop_assert_eq!(key(one).to_string().parse(), Ok(key(one)));
            let after = LogKey::just_before("bank.public.accounts", 0, one);
            prop_assert_eq!(after < key(other).to_string(), one <= other);
        }
    }

    #[test]
    fn names_are_as_the_contract_spells_them() {
        let key: DataKey = "raw/customers/dt=2026-11-22/p=0/00000000000000000000-00000000000000000499-0123456789abcdef.parquet".parse().expect("ours");
        assert_eq!((key.first_offset, key.last_offset), (0, 499));
        for foreign in ["raw/customers/dt=2026-11-22/p=0/0-499-0123456789abcdef.parquet", "raw/x.parquet", "other", "raw/a/dt=2026-1-2/p=0/x.parquet"] {
            assert!(foreign.parse::<DataKey>().is_err(), "{foreign}");
        }
        assert!("_log/bank.public.customers/0/12.json".parse::<LogKey>().is_err());
    }
}
