//! Reads a bank that exists back into a planner: its people, open accounts and balances, highest ids, and business time.

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::TryStreamExt;
use sqlx::{PgConnection, Row};

use super::{
    Config, Error, Goal,
    book::State,
    clock::Clock,
    event::{AccountType, CustomerStatus},
    plan::{Highest, Planner},
};
use crate::units::Money;

/// A planner that knows the whole bank. Rows are streamed: memory holds what the planner keeps, not what the database sends.
pub(super) async fn read(connection: &mut PgConnection, config: &Config, goal: Goal, now: DateTime<Utc>) -> Result<Planner, Error> {
    let (highest, newest) = highest(connection).await.map_err(Error::Read)?;
    let history = TimeDelta::from_std(*config.history).map_err(|_| Error::History)?;
    let clock = match newest {
        None => Clock::of_a_new_bank(goal, history, now),
        Some(newest) => Clock::of_an_old_bank(goal, history, newest, now),
    };
    let mut planner = Planner::new(config.seed, highest, clock);
    read_customers(connection, &mut planner).await.map_err(Error::Read)?;
    read_accounts(connection, &mut planner).await.map_err(Error::Read)?;
    Ok(planner)
}

/// Highest ids of the plan (rows entered by hand have theirs beyond one trillion), and the newest business time, if any.
async fn highest(connection: &mut PgConnection) -> Result<(Highest, Option<DateTime<Utc>>), sqlx::Error> {
    let row = sqlx::query(
        "select
            (select coalesce(max(id), 0) from public.customers where id < 1000000000000),
            (select coalesce(max(id), 0) from public.accounts where id < 1000000000000),
            greatest(
                (select coalesce(max(id), 0) from public.transactions where id < 1000000000000),
                (select coalesce((max(id) + 1) / 2, 0) from public.ledger_entries where id < 2000000000000)
            ),
            (select coalesce(max(last_event), 0) from bank.lanes),
            greatest(
                (select max(created_at) from (select created_at from public.transactions order by id desc limit 1000) as recent),
                (select max(created_at) from (select created_at from public.customers order by id desc limit 1000) as recent)
            )",
    )
    .fetch_one(connection)
    .await?;
    let highest = Highest { customer: row.get(0), account: row.get(1), transaction: row.get(2), event: row.get(3) };
    Ok((highest, row.get(4)))
}

async fn read_customers(connection: &mut PgConnection, planner: &mut Planner) -> Result<(), sqlx::Error> {
    let mut rows = sqlx::query(
        "select customer.id, customer.status, coalesce(account.rows, 0)
         from public.customers as customer
         left join (select customer_id, count(*) as rows from public.accounts group by customer_id) as account
            on account.customer_id = customer.id
         order by customer.id",
    )
    .fetch(connection);
    while let Some(row) = rows.try_next().await? {
        let status = match row.get::<&str, _>(1) {
            "ACTIVE" => CustomerStatus::Active,
            "SUSPENDED" => CustomerStatus::Suspended,
            _ => CustomerStatus::Inactive,
        };
        planner.know_customer(row.get(0), status, u32::try_from(row.get::<i64, _>(2)).unwrap_or(u32::MAX));
    }
    Ok(())
}

async fn read_accounts(connection: &mut PgConnection, planner: &mut Planner) -> Result<(), sqlx::Error> {
    let mut rows = sqlx::query(
        "select id, customer_id, account_type, status, (balance * 100)::bigint,
            balance = 0 and not exists (select from public.ledger_entries as entry where entry.account_id = account.id)
         from public.accounts as account
         where status <> 'CLOSED' and currency = $1
         order by id",
    )
    .bind(super::people::CURRENCY)
    .fetch(connection);
    while let Some(row) = rows.try_next().await? {
        let state = match (row.get::<bool, _>(5), row.get::<&str, _>(3)) {
            (true, _) => State::Unused,
            (false, "ACTIVE") => State::Active,
            (false, _) => State::Inactive,
        };
        // A type that a later version has added: not ours to use.
        let Some(account_type) = AccountType::parse(row.get(2)) else { continue };
        planner.know_account(row.get(0), row.get(1), account_type, state, Money::from_cents(row.get(4)));
    }
    Ok(())
}
