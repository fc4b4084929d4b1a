//! The ten KPIs against brute force, on the source and on analytics.

use std::collections::BTreeMap;

use ledgerline::{
    change::Lsn,
    kpi::{self, CustomerBalance, DayAmount, Kpis, TypeAmount, TypeAverage},
    units::Money,
};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, TestRunner},
};

use super::{bank::Bank, ground::Ground};

#[derive(Debug, Clone)]
struct Account {
    customer: usize,
    kind: &'static str,
    cents: i64,
}

#[derive(Debug, Clone)]
struct Payment {
    kind: &'static str,
    status: &'static str,
    cents: i64,
    /// Minutes since 2026-11-01 00:00 UTC.
    minute: i64,
}

#[derive(Debug, Clone)]
struct Books {
    customers: usize,
    accounts: Vec<Account>,
    payments: Vec<Payment>,
}

fn books() -> impl Strategy<Value = Books> {
    let account = (0..25_usize, prop::sample::select(vec!["SAVINGS", "CHECKING", "CREDIT", "LOAN"]), prop_oneof![-5_i64..5, -5_000_000_i64..90_000_000_000]);
    let status = prop::sample::select(vec!["COMPLETED", "COMPLETED", "COMPLETED", "PENDING", "FAILED", "REVERSED"]);
    let payment = (prop::sample::select(vec!["DEPOSIT", "WITHDRAWAL", "TRANSFER"]), status, 1_i64..5_000_000, 0_i64..6 * 24 * 60);
    (0..25_usize, prop::collection::vec(account, 0..40), prop::collection::vec(payment, 0..60)).prop_map(|(customers, accounts, payments)| Books {
        customers,
        accounts: accounts.into_iter().map(|(customer, kind, cents)| Account { customer, kind, cents }).filter(|it| it.customer < customers).collect(),
        payments: payments.into_iter().map(|(kind, status, cents, minute)| Payment { kind, status, cents, minute }).collect(),
    })
}

/// Divides and rounds half away from zero, the schoolbook way.
fn rounded(over: i128, under: i128) -> Money {
    let magnitude = (over.abs() * 2 + under) / (under * 2);
    Money::from_cents(i64::try_from(magnitude * over.signum()).expect("small"))
}

fn brute_force(books: &Books) -> Kpis {
    let cents = Money::from_cents;
    let mut types: BTreeMap<&str, (i128, i128)> = BTreeMap::new();
    let mut customers: BTreeMap<usize, i64> = BTreeMap::new();
    for account in &books.accounts {
        let sum = types.entry(account.kind).or_default();
        (sum.0, sum.1) = (sum.0 + i128::from(account.cents), sum.1 + 1);
        *customers.entry(account.customer).or_default() += account.cents;
    }
    let (mut days, mut kinds): (BTreeMap<i64, i64>, BTreeMap<&str, i64>) = Default::default();
    let completed: Vec<&Payment> = books.payments.iter().filter(|it| it.status == "COMPLETED").collect();
    for payment in &completed {
        *days.entry(payment.minute / (24 * 60)).or_default() += payment.cents;
        *kinds.entry(payment.kind).or_default() += payment.cents;
    }
    let (total, accounts) = (books.accounts.iter().map(|it| it.cents).sum::<i64>(), books.accounts.len());
    let under: i128 = types.values().map(|it| it.1).product();
    let over: i128 = types.values().map(|it| it.0 * under / it.1).sum();
    let mut top: Vec<(usize, i64)> = customers.into_iter().collect();
    top.sort_by_key(|(id, balance)| (-balance, *id));
    Kpis {
        total_balance: cents(total),
        total_transactions: completed.len() as u64,
        average_balance_per_account: (accounts > 0).then(|| rounded(total.into(), accounts as i128)),
        total_accounts: accounts as u64,
        total_customers: books.customers as u64,
        transaction_amount_over_time: days
            .into_iter()
            .map(|(day, sum)| DayAmount { date: format!("2026-11-{:02}", day + 1).parse().expect("a date"), amount: cents(sum) })
            .collect(),
        average_balance_per_account_type: (accounts > 0).then(|| rounded(over, under * types.len() as i128)),
        transaction_amount_by_type: kinds.into_iter().map(|(kind, sum)| TypeAmount { txn_type: kind.to_owned(), amount: cents(sum) }).collect(),
        average_balance_by_account_type: types
            .into_iter()
            .map(|(kind, it)| TypeAverage { account_type: kind.to_owned(), average: rounded(it.0, it.1) })
            .collect(),
        total_customers_balance: top
            .into_iter()
            .take(10)
            .map(|(id, balance)| CustomerBalance { customer_id: id as i64, customer: format!("First{id} O'Last"), balance: cents(balance) })
            .collect(),
    }
}

fn inserts(books: &Books) -> String {
    let mut sql = String::from("truncate customers, accounts, transactions, ledger_entries;");
    for id in 0..books.customers {
        sql += &format!("insert into customers values ({id}, 'First{id}', 'O''Last');");
    }
    for (id, it) in books.accounts.iter().enumerate() {
        sql += &format!("insert into accounts values ({id}, {}, '{}', {});", it.customer, it.kind, Money::from_cents(it.cents));
    }
    for (id, it) in books.payments.iter().enumerate() {
        // Written as a clock far from UTC shows it: the day must still be UTC's.
        let at = format!("timestamptz '2026-11-01 00:00+00' + interval '{} minutes'", it.minute);
        sql += &format!("insert into transactions values ({id}, 1, '{}', {}, '{}', {at});", it.kind, Money::from_cents(it.cents), it.status);
    }
    sql
}

#[tokio::test]
async fn the_ten_are_what_brute_force_says_on_the_source_and_on_analytics() {
    let (ground, bank) = (Ground::new().await, Bank::new().await);
    // The servers' own time zone must not matter.
    for database in [&bank.source, &ground.database] {
        database.run("do $$ begin execute format('alter database %I set timezone to ''Asia/Tokyo''', current_database()); end $$").await;
    }
    bank.source.run("drop trigger noted on customers; drop trigger noted on accounts; drop trigger noted on transactions").await;
    ground.database.run("create table customers(id bigint, first_name text, last_name text); create table accounts(id bigint, customer_id bigint, account_type text, balance numeric(18,2)); create table transactions(id bigint, account_id bigint, txn_type text, amount numeric(18,2), status text, created_at timestamptz); create table ledger_entries(id bigint)").await;
    let mut runner = TestRunner::new(Config::default());
    for _ in 0..25 {
        let books = books().new_tree(&mut runner).expect("a bank").current();
        let expected = brute_force(&books);
        bank.source.run(&inserts(&books)).await;
        assert_eq!(kpi::on_source(&bank.source.url).await.expect("computes"), expected, "{books:?}");
        ground.database.run(&inserts(&books)).await;
        ground.database.run(ANALYTICS).await;
        assert_eq!(kpi::read(&ground.warehouse).await.expect("computes"), expected, "{books:?}");
    }
    bank.source.drop().await;
    ground.end().await;
}

/// The same bank in the shape of analytics, among rows that no longer count: closed versions, deleted rows.
const ANALYTICS: &str = "
drop table if exists analytics.dim_customers, analytics.dim_accounts, analytics.fct_transactions;
create table analytics.dim_customers as select id as customer_id, first_name, last_name, true as is_current from customers union all select id, 'Old', 'Name', false from customers union all select 999, 'Gone', 'Away', false;
create table analytics.dim_accounts as select id as account_id, customer_id, account_type, balance, true as is_current from accounts union all select id, customer_id, 'OTHER', 1, false from accounts;
create table analytics.fct_transactions as select id as transaction_id, txn_type, amount, status, created_at at time zone 'UTC' as created_at, null::timestamp as deleted_at from transactions
  union all select 999, 'DEPOSIT', 5, 'COMPLETED', '2020-01-01', '2026-11-01';";

#[tokio::test]
async fn kpis_are_refused_before_analytics_exists_and_while_it_is_written() {
    let ground = Ground::new().await;
    assert!(matches!(kpi::read(&ground.warehouse).await, Err(kpi::Error::NotYet)));

    ground.database.run("create table customers(id bigint, first_name text, last_name text); create table accounts(id bigint, customer_id bigint, account_type text, balance numeric(18,2)); create table transactions(id bigint, txn_type text, amount numeric(18,2), status text, created_at timestamptz)").await;
    ground.database.run(ANALYTICS).await;
    ground.database.run("create table staging.cut(lsn bigint, committed_at timestamp); insert into staging.cut values (5, '2026-11-01 00:00:05'), (9, '2026-11-01 00:00:09');
        create table staging.positions(name varchar, lsn bigint); insert into staging.positions values ('dim_customers', 9), ('dim_accounts', 5), ('fct_transactions', 5), ('stg_bank__accounts', 9)").await;
    assert!(matches!(kpi::read_as_of(&ground.warehouse).await, Err(kpi::Error::Torn)));

    ground.database.run("update staging.positions set lsn = 5 where name like 'dim%'").await;
    let reading = kpi::read_as_of(&ground.warehouse).await.expect("whole");
    assert_eq!(reading.cut.map(|it| it.lsn), Some(Lsn(5)));
    assert_eq!(reading.kpis.total_customers, 0);
    assert_eq!(reading.kpis.average_balance_per_account, None);
    ground.end().await;
}

#[tokio::test]
async fn the_way_from_commit_to_kpi_is_measured_once_for_each_transaction() {
    let ground = Ground::new().await;
    let seen_at = "2026-11-22T10:00:10Z".parse().expect("a time");
    assert_eq!(kpi::measure(&ground.warehouse, Lsn(9), seen_at).await.expect("asks").count(), 0);
    ground.database.run("create table staging.commits as select n as xid, n as lsn, (extract(epoch from timestamptz '2026-11-22 10:00:10+00') * 1000000)::bigint - n * 1000000 as committed_micros from generate_series(-1, 200) n").await;
    assert_eq!(kpi::measure(&ground.warehouse, Lsn(100), seen_at).await.expect("asks").count(), 100, "the snapshot took no time");

    // Another process, after the first: it goes on where the KPIs were, and measures nobody twice.
    let took = kpi::measure(&ground.warehouse, Lsn(200), seen_at).await.expect("asks");
    let near = |shown: Option<u64>, truth: u64| shown.is_some_and(|it| it >= truth && it <= truth + truth / 16);
    assert!(took.count() == 100 && near(took.percentile_ms(50), 150_000) && near(took.percentile_ms(99), 199_000), "{took:?}");
    assert_eq!(kpi::measure(&ground.warehouse, Lsn(200), seen_at).await.expect("asks").count(), 0);
    ground.end().await;
}
