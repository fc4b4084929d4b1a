//! The same money in every place: source = lake = raw = staging = analytics, by number and by sum, table by table.
//!
//! [`mark`] notes what the source holds in one snapshot of it, and which transactions that snapshot sees. [`settle`] folds what
//! the lake, raw and staging say about exactly those transactions to the latest state of each key and compares; analytics,
//! which knows only its own cut, is compared with staging as of that cut. So the bank may move as it likes.
//!
//! Rows are compared in ranges of keys ([`RANGES`] a table), so two errors that cancel out in the total do not hide each other;
//! a range that differs is looked at key by key, and the report names the keys.
//!
//! Equal is equal, however little has arrived. A difference means something only once everything the mark sees has passed
//! through: when the cut has reached the mark, or the caller knows the pipeline to be drained. [`Report::covered`] says so.
//!
//! Cost: every run reads the whole history, once, in the lake (all objects) and in raw, and scans the source's tables.
//! Memory does not grow with it: what is folded lies in temporary tables of the warehouse. Owns nothing; a run that dies leaves
//! nothing behind.

use std::fmt;

use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection};

use super::{Error, Warehouse, While, postgres, postgres::Postgres};
use crate::{
    change::{BOUNDARIES, Topics},
    lake::Store,
    secret::Secret,
    units::Money,
};

mod compare;
mod fold;
mod lake_events;
#[cfg(feature = "snowflake")]
mod on_snowflake;
mod source;

use compare::{Held, Ranges};
use fold::{Folded, Place};
pub use source::{Mark, Marked, mark};

/// Ranges of keys a table is compared in. More find a difference in fewer steps; each is a row to carry and to keep.
pub const RANGES: i64 = 2_048;

/// What a reconciliation found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Every check holds.
    pub ok: bool,
    /// Everything the mark sees has had its way through, so a difference is one. While this is false and `ok` is too, settle
    /// the same mark again after the next run.
    pub covered: bool,
    pub checks: Vec<Check>,
}

/// One equality: `accounts.balance.lake_raw` is the sum of balances in the lake and in raw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    pub name: String,
    pub ok: bool,
    /// What the place further up says.
    pub expected: Amount,
    /// What the place further down says.
    pub actual: Amount,
    /// Where they differ: keys, or a range of them.
    pub detail: Option<String>,
}

/// A number of rows, or a sum of money (a string in JSON).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Amount {
    Rows(i64),
    Money(Money),
}

impl fmt::Display for Amount {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rows(rows) => rows.fmt(formatter),
            Self::Money(money) => money.fmt(formatter),
        }
    }
}

/// One of the bank's tables, and what it is called along the way.
#[derive(Debug, PartialEq, Eq)]
struct BankTable {
    name: &'static str,
    /// What is summed up; customers carry no money.
    money: Option<&'static str>,
    staging: &'static str,
    model: &'static str,
    key: &'static str,
    alive: &'static str,
}

const TABLES: [BankTable; 4] = [
    BankTable { name: "customers", money: None, staging: "staging.stg_bank__customers", model: "dim_customers", key: "customer_id", alive: "is_current" },
    BankTable {
        name: "accounts",
        money: Some("balance"),
        staging: "staging.stg_bank__accounts",
        model: "dim_accounts",
        key: "account_id",
        alive: "is_current",
    },
    BankTable {
        name: "transactions",
        money: Some("amount"),
        staging: "staging.stg_bank__transactions",
        model: "fct_transactions",
        key: "transaction_id",
        alive: "deleted_at is null",
    },
    BankTable {
        name: "ledger_entries",
        money: Some("amount"),
        staging: "staging.stg_bank__ledger_entries",
        model: "fct_ledger_entries",
        key: "ledger_entry_id",
        alive: "deleted_at is null",
    },
];

/// Compares every place with the one before it, at the mark.
///
/// `drained`: the caller knows that everything committed before the mark has landed, is loaded and transformed (the bank stands
/// still, and the cut covers its last transaction). Without it a difference counts once the cut has reached the mark.
/// `source` is asked again only where the lake differs from the mark, to name the keys.
///
/// Fails with [`Error::StaleMark`] where the mark is older than the initial snapshot: nobody knows that state; take a new one.
pub async fn settle(mark: &Mark, source: &Secret, store: &Store, warehouse: &Warehouse, topics: &Topics, drained: bool) -> Result<Report, Error> {
    match warehouse {
        Warehouse::Postgres(postgres) => {
            let mut session = postgres.session().await?;
            // One snapshot of the warehouse for everything that follows; temporary tables end with it.
            let mut transaction = session.begin_with("begin isolation level repeatable read").await.during("begin a reconciliation")?;
            let covered = drained || reached(&mut transaction, mark).await?;
            let places = Folded::open(&mut transaction, postgres.room(), mark, store, topics).await?;
            let (checks, _) = compare_all(Places::Postgres(places), source, mark).await?;
            Ok(Report { ok: checks.iter().all(|it| it.ok), covered, checks })
        }
        #[cfg(feature = "snowflake")]
        Warehouse::Snowflake(snowflake) => Box::pin(settle_snowflake(mark, source, store, snowflake, topics, drained)).await,
    }
}

/// Times a comparison is made again because dbt wrote meanwhile.
#[cfg(feature = "snowflake")]
const AGAIN: usize = 3;

#[cfg(feature = "snowflake")]
async fn settle_snowflake(
    mark: &Mark,
    source: &Secret,
    store: &Store,
    warehouse: &super::snowflake::Snowflake,
    topics: &Topics,
    drained: bool,
) -> Result<Report, Error> {
    for _ in 0..AGAIN {
        let covered = drained || on_snowflake::reached(warehouse, mark).await?;
        let places = on_snowflake::Folded::open(warehouse, mark, store, topics).await?;
        let (checks, places) = compare_all(Places::Snowflake(Box::new(places)), source, mark).await?;
        let Places::Snowflake(places) = places else { break };
        if places.stood_still().await? {
            return Ok(Report { ok: checks.iter().all(|it| it.ok), covered, checks });
        }
    }
    Err(Error::Moved)
}

/// A warehouse that can be looked at place by place.
enum Places<'a> {
    Postgres(Folded<'a>),
    #[cfg(feature = "snowflake")]
    Snowflake(Box<on_snowflake::Folded<'a>>),
}

impl Places<'_> {
    /// All records of the lake's objects, as far as loaded, are in raw or were refused by it.
    async fn records(&mut self, table: &'static str) -> Result<Check, Error> {
        match self {
            Self::Postgres(folded) => folded.records(table).await,
            #[cfg(feature = "snowflake")]
            Self::Snowflake(folded) => folded.records(table).await,
        }
    }

    /// What a place holds, by ranges of `width` keys.
    async fn ranges(&mut self, table: &BankTable, place: Place, width: i64) -> Result<Ranges, Error> {
        match self {
            Self::Postgres(folded) => folded.ranges(table, place, width).await,
            #[cfg(feature = "snowflake")]
            Self::Snowflake(folded) => folded.ranges(table, place, width).await,
        }
    }

    /// What a place holds under these keys.
    async fn keys(&mut self, table: &BankTable, place: Place, keys: std::ops::RangeInclusive<i64>) -> Result<compare::Keys, Error> {
        match self {
            Self::Postgres(folded) => folded.keys(table, place, keys).await,
            #[cfg(feature = "snowflake")]
            Self::Snowflake(folded) => folded.keys(table, place, keys).await,
        }
    }
}

async fn compare_all<'a>(mut places: Places<'a>, source: &Secret, mark: &Mark) -> Result<(Vec<Check>, Places<'a>), Error> {
    let mut checks = Vec::new();
    for table in BANK_AND_BOUNDARIES {
        checks.push(places.records(table).await?);
    }
    for (table, marked) in TABLES.iter().zip(&mark.tables) {
        checks.extend(compare_table(&mut places, table, marked, source, mark).await?);
    }
    Ok((checks, places))
}

/// Whether the cut, and every staging model behind it, has reached the mark: all that its snapshot sees was committed before its
/// position in the WAL.
pub async fn is_covered(mark: &Mark, warehouse: &Warehouse) -> Result<bool, Error> {
    match warehouse {
        Warehouse::Postgres(postgres) => reached_in(postgres, mark).await,
        #[cfg(feature = "snowflake")]
        Warehouse::Snowflake(snowflake) => Box::pin(on_snowflake::reached(snowflake, mark)).await,
    }
}

async fn reached_in(postgres: &Postgres, mark: &Mark) -> Result<bool, Error> {
    let mut connection = postgres.pool().acquire().await.during("read the cut")?;
    reached(&mut connection, mark).await
}

async fn reached(connection: &mut PgConnection, mark: &Mark) -> Result<bool, Error> {
    let doing = "read the cut";
    if postgres::cut(connection).await.during(doing)?.is_none_or(|cut| cut.lsn < mark.lsn) {
        return Ok(false);
    }
    if !postgres::exists(connection, "staging.positions").await.during(doing)? {
        return Ok(true);
    }
    // The cut moves first; in the middle of a run the models are still on their way to it.
    let models: Vec<String> = TABLES.iter().map(|table| format!("stg_bank__{}", table.name)).collect();
    let reached: i64 = sqlx::query_scalar("select count(*) from staging.positions where name = any($1) and lsn >= $2")
        .bind(&models)
        .bind(mark.lsn.0.cast_signed())
        .fetch_one(connection)
        .await
        .during(doing)?;
    Ok(usize::try_from(reached).is_ok_and(|it| it == TABLES.len()))
}

const BANK_AND_BOUNDARIES: [&str; 5] = [TABLES[0].name, TABLES[1].name, TABLES[2].name, TABLES[3].name, BOUNDARIES];

async fn compare_table(places: &mut Places<'_>, table: &BankTable, marked: &Marked, source: &Secret, mark: &Mark) -> Result<Vec<Check>, Error> {
    let width = marked.width;
    let lake = places.ranges(table, Place::Lake, width).await?;
    let raw = places.ranges(table, Place::Raw, width).await?;
    let staging = places.ranges(table, Place::Staging, width).await?;
    let staging_at_cut = places.ranges(table, Place::StagingAtCut, width).await?;
    let analytics = places.ranges(table, Place::Analytics, width).await?;

    let mut checks = Vec::new();
    let hops = [
        ("source_lake", Place::Source, &marked.ranges, Place::Lake, &lake),
        ("lake_raw", Place::Lake, &lake, Place::Raw, &raw),
        ("raw_staging", Place::Raw, &raw, Place::Staging, &staging),
        ("staging_analytics", Place::StagingAtCut, &staging_at_cut, Place::Analytics, &analytics),
    ];
    for (hop, up, expected, down, actual) in hops {
        let differing = compare::differing(expected, actual);
        let mut found = Vec::new();
        for range in differing.iter().take(compare::RANGES_SHOWN) {
            let keys = compare::keys(*range, width);
            let there = places.keys(table, down, keys.clone()).await?;
            if up == Place::Source {
                let (here, moved) = source::keys(source, mark, table, keys).await?;
                found.extend(compare::differences_of_settled(&here, &moved, &there, marked.ranges.get(range), actual.get(range)));
            } else {
                found.extend(compare::differences(&places.keys(table, up, keys).await?, &there));
            }
        }
        let detail = compare::detail(&found, &differing, width, down);
        let (expected_sum, actual_sum) = (total(expected)?, total(actual)?);
        checks.push(check(
            table,
            "count",
            hop,
            differs(expected, actual, |it| i128::from(it.rows)),
            Amount::Rows(expected_sum.0),
            Amount::Rows(actual_sum.0),
            &detail,
        ));
        if let Some(money) = table.money {
            checks.push(check(
                table,
                money,
                hop,
                differs(expected, actual, |it| it.cents),
                Amount::Money(expected_sum.1),
                Amount::Money(actual_sum.1),
                &detail,
            ));
        }
    }
    Ok(checks)
}

fn check(table: &BankTable, measure: &str, hop: &str, differs: bool, expected: Amount, actual: Amount, detail: &str) -> Check {
    Check { name: format!("{}.{measure}.{hop}", table.name), ok: !differs, expected, actual, detail: differs.then(|| detail.to_owned()) }
}

fn differs(expected: &Ranges, actual: &Ranges, measure: fn(&Held) -> i128) -> bool {
    let of = |ranges: &Ranges, range: &i64| ranges.get(range).map_or(0, measure);
    expected.keys().chain(actual.keys()).any(|range| of(expected, range) != of(actual, range))
}

fn total(ranges: &Ranges) -> Result<(i64, Money), Error> {
    let cents: i128 = ranges.values().map(|it| it.cents).sum();
    let cents = i64::try_from(cents).map_err(|_| Error::TooLarge)?;
    Ok((ranges.values().map(|it| it.rows).sum(), Money::from_cents(cents)))
}
