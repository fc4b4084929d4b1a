//! The source at one point: what one snapshot of it holds, and which transactions that snapshot sees.

use std::{collections::BTreeSet, ops::RangeInclusive, str::FromStr};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, postgres::PgRow};

use super::{
    BankTable, RANGES, TABLES,
    compare::{Held, Keys, Ranges},
};
use crate::{
    change::Lsn,
    secret::{Secret, without_password},
    warehouse::{Error, While, postgres},
};

/// What the source held at one moment. Plain data: it may be kept until the pipeline has caught up with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    pub taken_at: DateTime<Utc>,
    /// A position in the WAL behind the commit of everything the snapshot sees.
    pub lsn: Lsn,
    /// `pg_current_snapshot()`: which transactions are seen.
    pub snapshot: Snapshot,
    /// The bank's tables, parents first.
    pub tables: Vec<Marked>,
}

/// One table at the mark.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marked {
    pub table: String,
    /// How many keys make a range.
    pub width: i64,
    pub ranges: Ranges,
}

/// Which transactions a snapshot sees: all below `xmin`, none from `xmax` on, and in between those that were not running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Snapshot {
    pub(super) xmin: u64,
    pub(super) xmax: u64,
    pub(super) running: BTreeSet<u64>,
}

impl Snapshot {
    /// Whether it sees a transaction, by the 32 bits that a row's header keeps of its number: the nearest number to the
    /// snapshot with these bits, which is right for two billion transactions in either direction.
    fn sees(&self, xid: u32) -> bool {
        let ahead = xid.wrapping_sub(self.xmax as u32).cast_signed();
        let whole = self.xmax.cast_signed().saturating_add(i64::from(ahead));
        u64::try_from(whole).map_or(true, |xid| xid < self.xmin || (xid < self.xmax && !self.running.contains(&xid)))
    }
}

impl FromStr for Snapshot {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut parts = text.split(':');
        let mut number = || parts.next().and_then(|it| it.parse::<u64>().ok()).ok_or(Error::NotASnapshot);
        let (xmin, xmax) = (number()?, number()?);
        let running = parts.next().unwrap_or_default().split(',').filter(|it| !it.is_empty());
        let running = running.map(|it| it.parse().map_err(|_| Error::NotASnapshot)).collect::<Result<_, _>>()?;
        Ok(Self { xmin, xmax, running })
    }
}

impl From<Snapshot> for String {
    fn from(snapshot: Snapshot) -> Self {
        let running: Vec<String> = snapshot.running.iter().map(u64::to_string).collect();
        format!("{}:{}:{}", snapshot.xmin, snapshot.xmax, running.join(","))
    }
}

impl TryFrom<String> for Snapshot {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

/// Notes what the source holds now. Reads each of the bank's tables once, in one snapshot, and blocks nobody.
pub async fn mark(source: &Secret) -> Result<Mark, Error> {
    let doing = "take a mark on the source";
    let mut connection = connect(source).await?;
    let mut transaction = connection.begin_with("begin isolation level repeatable read read only").await.during(doing)?;
    // The snapshot is taken before the functions run, so the position is behind every commit that it sees.
    let row = sqlx::query("select pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text, clock_timestamp()")
        .fetch_one(&mut *transaction)
        .await
        .during(doing)?;
    let (snapshot, lsn, taken_at) = (row.get::<&str, _>(0).parse()?, row.get::<&str, _>(1).parse().map_err(|_| Error::NotASnapshot)?, row.get(2));
    let mut tables = Vec::with_capacity(TABLES.len());
    for table in &TABLES {
        if !postgres::exists(&mut transaction, &format!("public.{}", table.name)).await.during(doing)? {
            return Err(Error::NoBank { table: table.name });
        }
        let widest: i64 = sqlx::query_scalar(AssertSqlSafe(format!("select coalesce(max(abs(id)), 0)::bigint from public.{}", table.name)))
            .fetch_one(&mut *transaction)
            .await
            .during(doing)?;
        let width = widest / RANGES + 1;
        let cents = cents(table);
        let sql = format!("select (id / {width})::bigint, count(*), coalesce(sum({cents}), 0)::numeric(60, 0)::text from public.{} group by 1", table.name);
        let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut *transaction).await.during(doing)?;
        tables.push(Marked { table: table.name.to_owned(), width, ranges: held(&rows)? });
    }
    transaction.rollback().await.during(doing)?;
    connection.close().await.during(doing)?;
    Ok(Mark { taken_at, lsn, snapshot, tables })
}

/// What the source holds now under these keys, and which of them have changed since the mark.
pub(super) async fn keys(source: &Secret, mark: &Mark, table: &BankTable, keys: RangeInclusive<i64>) -> Result<(Keys, BTreeSet<i64>), Error> {
    let doing = "look for a difference on the source";
    let mut connection = connect(source).await?;
    let cents = cents(table);
    let sql =
        format!("select id::bigint, 1::bigint, ({cents})::numeric(60, 0)::text, xmin::text::bigint from public.{} where id between $1 and $2", table.name);
    let rows = sqlx::query(AssertSqlSafe(sql)).bind(keys.start()).bind(keys.end()).fetch_all(&mut connection).await.during(doing)?;
    connection.close().await.during(doing)?;
    let moved = rows.iter().filter(|row| u32::try_from(row.get::<i64, _>(3)).is_ok_and(|xid| !mark.snapshot.sees(xid)));
    Ok((held(&rows)?, moved.map(|row| row.get(0)).collect()))
}

async fn connect(source: &Secret) -> Result<PgConnection, Error> {
    let refuse = |error| Error::Connect { address: without_password(source.reveal()), source: error };
    PgConnection::connect_with(&postgres::options(source).map_err(refuse)?).await.map_err(refuse)
}

fn cents(table: &BankTable) -> String {
    table.money.map_or_else(|| "0".to_owned(), |money| format!("{money} * 100"))
}

/// Rows of (range or key, number, cents).
pub(super) fn held(rows: &[PgRow]) -> Result<Ranges, Error> {
    rows.iter().map(|row| Ok((row.get(0), Held { rows: row.get(1), cents: row.get::<&str, _>(2).parse().map_err(|_| Error::TooLarge)? }))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_snapshot_sees_what_had_ended() {
        let snapshot: Snapshot = "100:105:100,103".parse().expect("a snapshot");
        let seen: Vec<u32> = (98..108).filter(|xid| snapshot.sees(*xid)).collect();
        assert_eq!(seen, [98, 99, 101, 102, 104]);
        assert_eq!(String::from(snapshot), "100:105:100,103");
        assert!("100:x:".parse::<Snapshot>().is_err());
    }

    #[test]
    fn transaction_numbers_go_round() {
        let round = 1_u64 << 32;
        let snapshot: Snapshot = format!("{}:{}:", round + 5, round + 5).parse().expect("a snapshot");
        assert!(snapshot.sees(4) && !snapshot.sees(5) && snapshot.sees(u32::MAX));
        // Before the first round there is nothing below: the frozen and the ancient are seen.
        let snapshot: Snapshot = "700:700:".parse().expect("a snapshot");
        assert!(snapshot.sees(2) && snapshot.sees(3_000_000_000));
    }

    proptest! {
        #[test]
        fn the_near_are_judged_by_their_whole_number(xmax in 3_000_000_000_u64..1 << 40, behind in 0_u64..1 << 30, running in prop::collection::btree_set(1_u64..50, 0..9)) {
            let running: BTreeSet<u64> = running.into_iter().map(|it| xmax - it).collect();
            let snapshot = Snapshot { xmin: running.first().copied().unwrap_or(xmax), xmax, running: running.clone() };
            let xid = xmax - behind;
            prop_assert_eq!(snapshot.sees(xid as u32), behind > 0 && !running.contains(&xid));
            prop_assert!(!snapshot.sees((xmax + behind) as u32));
        }
    }
}
