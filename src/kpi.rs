//! The ten KPIs: from analytics, as of the cut, and the same ten straight from the source, as their proof.
//!
//! One SQL text serves both; only the lines that say where a customer, an account and a payment are found differ. The
//! database adds up, exactly; every division happens here, in whole cents and fractions, and is rounded once, at the end.
//!
//! *Half up* is what PostgreSQL's `round`, Excel, DAX, Java and Python mean by it: a tie goes away from zero, so −0.125
//! is −0.13. A bank without accounts has no averages (`null`); its sums are `0.00`, its counts 0, its lists empty.
//! `total_customers_balance` ranks customers who have an account.
//!
//! Owns nothing; reads in one statement, so that no KPI is of another moment than its neighbour.

use std::{collections::BTreeMap, time::Duration};

use chrono::{DateTime, NaiveDate, NaiveDateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, postgres::PgRow};

use crate::{
    change::Lsn,
    fault::{Diagnose, Fault, sqlstate},
    latency::Histogram,
    secret::{Secret, without_password},
    units::Money,
    warehouse::{
        self, Cut, Warehouse, While,
        postgres::{self, Postgres},
    },
};

#[cfg(feature = "snowflake")]
mod on_snowflake;

/// As many customers as `total_customers_balance` lists.
const TOP_CUSTOMERS: usize = 10;

/// The models the KPIs are read from: whole only when all of them stand at the same cut.
const MODELS: [&str; 3] = ["dim_customers", "dim_accounts", "fct_transactions"];

/// The ten, in the order in which they are shown. Field names and shapes are the contract of `kpi --json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kpis {
    pub total_balance: Money,
    pub total_transactions: u64,
    pub average_balance_per_account: Option<Money>,
    pub total_accounts: u64,
    pub total_customers: u64,
    pub transaction_amount_over_time: Vec<DayAmount>,
    pub average_balance_per_account_type: Option<Money>,
    pub transaction_amount_by_type: Vec<TypeAmount>,
    pub average_balance_by_account_type: Vec<TypeAverage>,
    pub total_customers_balance: Vec<CustomerBalance>,
}

/// What was moved on one UTC day.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DayAmount {
    pub date: NaiveDate,
    pub amount: Money,
}

/// What was moved by deposits, by transfers, by withdrawals.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TypeAmount {
    pub txn_type: String,
    pub amount: Money,
}

/// What an account of one type holds on average.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TypeAverage {
    pub account_type: String,
    pub average: Money,
}

/// What one customer's accounts hold together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CustomerBalance {
    pub customer_id: i64,
    /// First and last name.
    pub customer: String,
    pub balance: Money,
}

/// The KPIs and the moment they are true for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// The cut analytics stands at; None where dbt keeps no record of it.
    pub cut: Option<Cut>,
    pub kpis: Kpis,
}

/// Why there are no KPIs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not ask the warehouse")]
    Warehouse(#[from] warehouse::Error),
    #[error("could not compute the KPIs on {address}")]
    Source {
        address: String,
        #[source]
        source: sqlx::Error,
    },
    #[error("there is no analytics yet")]
    NotYet,
    #[error("analytics is being written: its models stand at different cuts")]
    Torn,
    #[error("a sum is beyond what an amount of money can hold")]
    TooLarge,
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::Warehouse(error) => error.fault(),
            Self::Source { source, .. } if sqlstate(source).is_none() => Fault::Transient,
            Self::Source { address, .. } => Fault::Operator(format!("check that {address} is the bank's database and that its tables may be read")),
            Self::NotYet => Fault::Operator("run both DAGs once: `ledgerline dag trigger MinIO_S3_to_Snowflake`".to_owned()),
            Self::Torn => Fault::Transient,
            Self::TooLarge => Fault::Data("look for an impossible amount in analytics.fct_transactions and analytics.dim_accounts".to_owned()),
        }
    }
}

/// The KPIs of analytics.
///
/// Fails with [`Error::Torn`] while dbt stands between its models (or has failed there): better no KPI than one that mixes
/// two cuts.
pub async fn read(warehouse: &Warehouse) -> Result<Kpis, Error> {
    Ok(read_as_of(warehouse).await?.kpis)
}

/// The KPIs of analytics and the cut they are true for, both of one moment.
pub async fn read_as_of(warehouse: &Warehouse) -> Result<Reading, Error> {
    match warehouse {
        Warehouse::Postgres(postgres) => read_postgres(postgres).await,
        #[cfg(feature = "snowflake")]
        Warehouse::Snowflake(snowflake) => Box::pin(on_snowflake::read_as_of(snowflake)).await,
    }
}

async fn read_postgres(warehouse: &Postgres) -> Result<Reading, Error> {
    let doing = "compute the KPIs";
    let mut transaction = warehouse.pool().begin_with("begin isolation level repeatable read read only").await.during(doing)?;
    for model in MODELS {
        if !postgres::exists(&mut transaction, &format!("analytics.{model}")).await.during(doing)? {
            return Err(Error::NotYet);
        }
    }
    let cut = standing(&mut transaction).await?;
    let rows = sqlx::query(AssertSqlSafe(format!("{ANALYTICS}{TEN}"))).fetch_all(&mut *transaction).await.during(doing)?;
    transaction.commit().await.during(doing)?;
    Ok(Reading { cut, kpis: Sums::new(rows.iter().map(Added::of))?.kpis()? })
}

/// The same ten on the source, as it is now.
pub async fn on_source(source: &Secret) -> Result<Kpis, Error> {
    let refuse = |error| Error::Source { address: without_password(source.reveal()), source: error };
    let mut connection = PgConnection::connect_with(&postgres::options(source).map_err(refuse)?).await.map_err(refuse)?;
    let rows = sqlx::query(AssertSqlSafe(format!("{SOURCE}{TEN}"))).fetch_all(&mut connection).await.map_err(refuse)?;
    connection.close().await.map_err(refuse)?;
    Sums::new(rows.iter().map(Added::of))?.kpis()
}

/// How long the transactions that the KPIs show since `shown_at` took from their commit until then; each is measured once.
///
/// Up to where the KPIs had shown them before is kept in the warehouse, so that what was committed before a crash, a night
/// without us or a failed run is measured too: those are the slowest. Nothing is measured where nothing is new.
pub async fn measure(warehouse: &Warehouse, upto: Lsn, shown_at: DateTime<Utc>) -> Result<Histogram, Error> {
    match warehouse {
        Warehouse::Postgres(postgres) => measure_postgres(postgres, upto, shown_at).await,
        #[cfg(feature = "snowflake")]
        Warehouse::Snowflake(snowflake) => Box::pin(on_snowflake::measure(snowflake, upto, shown_at)).await,
    }
}

async fn measure_postgres(warehouse: &Postgres, upto: Lsn, shown_at: DateTime<Utc>) -> Result<Histogram, Error> {
    let doing = "measure the way from commit to KPI";
    let mut transaction = warehouse.pool().begin().await.during(doing)?;
    if !postgres::exists(&mut transaction, "staging.commits").await.during(doing)? {
        return Ok(Histogram::default());
    }
    let upto = upto.0.cast_signed();
    sqlx::query("lock table raw._shown in share row exclusive mode").execute(&mut *transaction).await.during(doing)?;
    let after: i64 = sqlx::query_scalar("select coalesce(max(lsn), -1) from raw._shown").fetch_one(&mut *transaction).await.during(doing)?;
    // xid ≤ 0 is the initial snapshot: its rows were committed long before we came. Three digits are finer than the histogram.
    let rows = sqlx::query(
        "select round(ms, 2 - floor(log(greatest(ms, 1)))::integer)::bigint, count(*)
         from (select greatest($3 - committed_micros / 1000, 0)::numeric as ms from staging.commits where xid > 0 and lsn > $1 and lsn <= $2) waited
         group by 1",
    )
    .bind(after)
    .bind(upto)
    .bind(shown_at.timestamp_millis())
    .fetch_all(&mut *transaction)
    .await
    .during(doing)?;
    sqlx::query("delete from raw._shown where lsn < $1").bind(upto).execute(&mut *transaction).await.during(doing)?;
    sqlx::query("insert into raw._shown(lsn, shown_at) values ($1, $2) on conflict do nothing")
        .bind(upto)
        .bind(shown_at)
        .execute(&mut *transaction)
        .await
        .during(doing)?;
    transaction.commit().await.during(doing)?;
    let mut took = Histogram::default();
    for row in rows {
        took.record_many(Duration::from_millis(row.get::<i64, _>(0).unsigned_abs()), row.get::<i64, _>(1).unsigned_abs());
    }
    Ok(took)
}

/// The cut at which all models the KPIs need stand.
async fn standing(connection: &mut PgConnection) -> Result<Option<Cut>, Error> {
    let doing = "read where analytics stands";
    if !postgres::exists(connection, "staging.positions").await.during(doing)? {
        return Ok(postgres::cut(connection).await.during(doing)?);
    }
    let positions: Vec<i64> = sqlx::query_scalar("select distinct lsn::bigint from staging.positions where name = any($1)")
        .bind(MODELS.as_slice())
        .fetch_all(&mut *connection)
        .await
        .during(doing)?;
    match positions[..] {
        [] => Ok(postgres::cut(connection).await.during(doing)?),
        [position] => {
            let committed_at: Option<NaiveDateTime> = sqlx::query_scalar("select committed_at::timestamp from staging.cut where lsn = $1")
                .bind(position)
                .fetch_optional(connection)
                .await
                .during(doing)?;
            Ok(committed_at.map(|at| Cut { lsn: Lsn(position.cast_unsigned()), committed_at: at.and_utc() }))
        }
        _ => Err(Error::Torn),
    }
}

/// Where analytics keeps what the source holds at the cut.
const ANALYTICS: &str = "
with customer as (select customer_id, first_name || ' ' || last_name as name from analytics.dim_customers where is_current),
account as (select customer_id, account_type, balance from analytics.dim_accounts where is_current),
payment as (select txn_type, amount, created_at from analytics.fct_transactions where deleted_at is null and status = 'COMPLETED')";

/// Where the source keeps it.
const SOURCE: &str = "
with customer as (select id as customer_id, first_name || ' ' || last_name as name from public.customers),
account as (select customer_id, account_type, balance from public.accounts),
payment as (select txn_type, amount, created_at from public.transactions where status = 'COMPLETED')";

/// All the sums the ten KPIs need, in whole cents, in words that PostgreSQL and Snowflake share. The session's time zone is UTC,
/// so a date is a UTC date everywhere.
const TEN: &str = "
select 'customers' as what, null::varchar as name, null::date as day, null::bigint as id, null::varchar as cents, count(*) as n from customer
union all
select 'accounts', account_type::varchar, null, null, (sum(balance) * 100)::numeric(38, 0)::varchar, count(*) from account group by account_type
union all
select 'payments', txn_type::varchar, created_at::date, null, (sum(amount) * 100)::numeric(38, 0)::varchar, count(*) from payment group by txn_type, created_at::date
union all
(select 'top', name, null, customer_id, (sum(balance) * 100)::numeric(38, 0)::varchar, count(*) from customer join account using (customer_id)
 group by customer_id, name order by sum(balance) desc, customer_id limit 10)";

/// One line of what the database added up.
#[derive(Debug)]
struct Added {
    what: String,
    name: Option<String>,
    day: Option<NaiveDate>,
    id: Option<i64>,
    cents: Option<String>,
    n: i64,
}

impl Added {
    fn of(row: &PgRow) -> Self {
        Self { what: row.get("what"), name: row.get("name"), day: row.get("day"), id: row.get("id"), cents: row.get("cents"), n: row.get("n") }
    }
}

/// Whole cents and the number of rows they were added up from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sum {
    cents: i128,
    rows: u64,
}

impl Sum {
    fn add(&mut self, other: Self) -> Result<(), Error> {
        self.cents = self.cents.checked_add(other.cents).ok_or(Error::TooLarge)?;
        self.rows += other.rows;
        Ok(())
    }
}

/// What the database added up.
#[derive(Debug, Default)]
struct Sums {
    customers: u64,
    accounts: BTreeMap<String, Sum>,
    payments_by_type: BTreeMap<String, Sum>,
    payments_by_day: BTreeMap<NaiveDate, Sum>,
    top: Vec<(i64, String, i128)>,
}

impl Sums {
    fn new(rows: impl IntoIterator<Item = Added>) -> Result<Self, Error> {
        let mut sums = Self::default();
        for Added { what, name, day, id, cents, n } in rows {
            let name = name.unwrap_or_default();
            let cents = cents.map_or(Ok(0), |text| text.parse().map_err(|_| Error::TooLarge))?;
            let sum = Sum { cents, rows: n.unsigned_abs() };
            match what.as_str() {
                "customers" => sums.customers = sum.rows,
                "accounts" => sums.accounts.entry(name).or_default().add(sum)?,
                "payments" => {
                    sums.payments_by_type.entry(name).or_default().add(sum)?;
                    sums.payments_by_day.entry(day.unwrap_or_default()).or_default().add(sum)?;
                }
                _ => sums.top.push((id.unwrap_or_default(), name, cents)),
            }
        }
        Ok(sums)
    }

    fn kpis(mut self) -> Result<Kpis, Error> {
        let (mut accounts, mut payments) = (Sum::default(), Sum::default());
        self.accounts.values().try_for_each(|it| accounts.add(*it))?;
        self.payments_by_type.values().try_for_each(|it| payments.add(*it))?;
        self.top.sort_by_key(|(id, _, cents)| (-cents, *id));
        self.top.truncate(TOP_CUSTOMERS);
        let types: Vec<Fraction> = self.accounts.values().map(|it| Fraction::new(it.cents, it.rows)).collect();
        Ok(Kpis {
            total_balance: money(accounts.cents)?,
            total_transactions: payments.rows,
            average_balance_per_account: average(accounts)?,
            total_accounts: accounts.rows,
            total_customers: self.customers,
            transaction_amount_over_time: collect(self.payments_by_day, |date, it| Ok(DayAmount { date, amount: money(it.cents)? }))?,
            average_balance_per_account_type: Fraction::mean(&types)?.map(Fraction::half_up).map(money).transpose()?,
            transaction_amount_by_type: collect(self.payments_by_type, |txn_type, it| Ok(TypeAmount { txn_type, amount: money(it.cents)? }))?,
            average_balance_by_account_type: collect(self.accounts, |account_type, it| {
                Ok(TypeAverage { account_type, average: money(Fraction::new(it.cents, it.rows).half_up())? })
            })?,
            total_customers_balance: self
                .top
                .into_iter()
                .map(|(customer_id, customer, cents)| Ok(CustomerBalance { customer_id, customer, balance: money(cents)? }))
                .collect::<Result<_, Error>>()?,
        })
    }
}

fn collect<K, T>(sums: BTreeMap<K, Sum>, make: impl Fn(K, Sum) -> Result<T, Error>) -> Result<Vec<T>, Error> {
    sums.into_iter().map(|(key, sum)| make(key, sum)).collect()
}

fn money(cents: i128) -> Result<Money, Error> {
    i64::try_from(cents).map(Money::from_cents).map_err(|_| Error::TooLarge)
}

fn average(sum: Sum) -> Result<Option<Money>, Error> {
    if sum.rows == 0 {
        return Ok(None);
    }
    money(Fraction::new(sum.cents, sum.rows).half_up()).map(Some)
}

/// An exact fraction, in lowest terms; the denominator is positive.
///
/// A decimal of any fixed length would turn some ties into near misses: 1/3 + 1/3 + 1/3 must be 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fraction {
    over: i128,
    under: i128,
}

impl Fraction {
    fn new(over: i128, under: u64) -> Self {
        Self::reduced(over, i128::from(under))
    }

    fn reduced(over: i128, under: i128) -> Self {
        let (mut divisor, mut rest) = (over.abs(), under);
        while rest != 0 {
            (divisor, rest) = (rest, divisor % rest);
        }
        Self { over: over / divisor, under: under / divisor }
    }

    /// None of nothing. Fails only beyond a billion accounts in each of four types.
    fn mean(all: &[Self]) -> Result<Option<Self>, Error> {
        if all.is_empty() {
            return Ok(None);
        }
        let sum = all.iter().try_fold(Self { over: 0, under: 1 }, |sum, it| sum.plus(*it)).ok_or(Error::TooLarge)?;
        let under = i128::try_from(all.len()).ok().and_then(|count| sum.under.checked_mul(count)).ok_or(Error::TooLarge)?;
        Ok(Some(Self::reduced(sum.over, under)))
    }

    fn plus(self, other: Self) -> Option<Self> {
        let left = self.over.checked_mul(other.under)?;
        let right = other.over.checked_mul(self.under)?;
        Some(Self::reduced(left.checked_add(right)?, self.under.checked_mul(other.under)?))
    }

    /// The nearest whole number, ties away from zero.
    fn half_up(self) -> i128 {
        let (whole, rest) = (self.over / self.under, self.over % self.under);
        if rest.unsigned_abs() >= (self.under - rest.abs()).unsigned_abs() { whole + self.over.signum() } else { whole }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ties_go_away_from_zero() {
        let rounded = |over, under| Fraction::new(over, under).half_up();
        assert_eq!([rounded(5, 10), rounded(-5, 10), rounded(4, 10), rounded(-4, 10), rounded(15, 10), rounded(0, 7)], [1, -1, 0, 0, 2, 0]);
    }

    #[test]
    fn thirds_add_up_to_whole_cents() {
        // (1/3 + 2/3 + 1/2) / 1 is a tie that no fixed number of decimals keeps: 0.333… + 0.666… + 0.5.
        let parts = [Fraction::new(1, 3), Fraction::new(2, 3), Fraction::new(1, 2)];
        assert_eq!(Fraction::mean(&parts).expect("small"), Some(Fraction { over: 1, under: 2 }));
        assert_eq!(Fraction::mean(&parts).expect("small").map(Fraction::half_up), Some(1));
    }

    #[test]
    fn an_empty_bank_has_zeros_and_no_averages() {
        let kpis = Sums::default().kpis().expect("nothing is too large");
        assert_eq!(kpis, Kpis::default());
        let json = serde_json::to_value(&kpis).expect("serializes");
        assert_eq!(json["total_balance"], "0.00");
        assert_eq!(json["average_balance_per_account"], serde_json::Value::Null);
        assert_eq!(json["transaction_amount_over_time"], serde_json::json!([]));
    }

    #[test]
    fn the_shapes_are_those_of_the_contract() {
        let date = NaiveDate::from_ymd_opt(2026, 11, 2).expect("a date");
        let sums = Sums {
            customers: 2,
            accounts: BTreeMap::from([("CHECKING".into(), Sum { cents: 1_001, rows: 2 }), ("LOAN".into(), Sum { cents: -301, rows: 2 })]),
            payments_by_type: BTreeMap::from([("DEPOSIT".into(), Sum { cents: 700, rows: 3 })]),
            payments_by_day: BTreeMap::from([(date, Sum { cents: 700, rows: 3 })]),
            top: vec![(9, "Ada Lovelace".into(), 5), (2, "Grace Hopper".into(), 5), (7, "Zoë Ruß".into(), 700)],
        };
        let json = serde_json::to_value(sums.kpis().expect("small")).expect("serializes");
        assert_eq!(
            json,
            serde_json::json!({
                "total_balance": "7.00", "total_transactions": 3, "average_balance_per_account": "1.75", "total_accounts": 4, "total_customers": 2,
                "transaction_amount_over_time": [{"date": "2026-11-02", "amount": "7.00"}],
                "average_balance_per_account_type": "1.75",
                "transaction_amount_by_type": [{"txn_type": "DEPOSIT", "amount": "7.00"}],
                "average_balance_by_account_type": [{"account_type": "CHECKING", "average": "5.01"}, {"account_type": "LOAN", "average": "-1.51"}],
                "total_customers_balance": [
                    {"customer_id": 7, "customer": "Zoë Ruß", "balance": "7.00"},
                    {"customer_id": 2, "customer": "Grace Hopper", "balance": "0.05"},
                    {"customer_id": 9, "customer": "Ada Lovelace", "balance": "0.05"}],
            })
        );
    }

    proptest! {
        #[test]
        fn rounding_moves_by_at_most_half(over in -1_000_000_000_i128..1_000_000_000, under in 1_u64..10_000) {
            let (rounded, under_wide) = (Fraction::new(over, under).half_up(), i128::from(under));
            let off = (rounded * under_wide - over).abs() * 2;
            prop_assert!(off <= under_wide);
            prop_assert!(off < under_wide || rounded.abs() * under_wide > over.abs());
        }

        #[test]
        fn a_mean_does_not_depend_on_order(mut parts in prop::collection::vec((-1_000_000_i128..1_000_000, 1_u64..100_000), 1..6)) {
            let mean = |parts: &[(i128, u64)]| Fraction::mean(&parts.iter().map(|(over, under)| Fraction::new(*over, *under)).collect::<Vec<_>>()).expect("small");
            let forward = mean(&parts);
            parts.reverse();
            prop_assert_eq!(forward, mean(&parts));
        }
    }
}
