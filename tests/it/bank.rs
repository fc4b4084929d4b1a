//! The bank on a real PostgreSQL: each test has a database of its own.

use std::{num::NonZeroU8, num::NonZeroU32, time::Duration};

use chrono::{DateTime, Utc};
use ledgerline::{
    bank::{self, Census, Config, Error, Goal, Ground, Rate, Stats, Wish},
    stage::{self, Handle, Phase},
};
use sqlx::{AssertSqlSafe, PgConnection, Row};
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::house::Database;

/// Much more than any of these tests needs on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A database of one test.
async fn empty(name: &str) -> Database {
    Database::create(&format!("bank_{name}")).await
}

async fn with_a_bank(name: &str) -> Database {
    let database = empty(name).await;
    bank::prepare(&database.url, Ground::Ours).await.expect("an empty database");
    database
}

async fn run(connection: &mut PgConnection, statement: &str) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(connection).await.map(drop)
}

async fn number(connection: &mut PgConnection, query: &str) -> i64 {
    sqlx::query(AssertSqlSafe(query.to_owned())).fetch_one(connection).await.expect("a query that works").get(0)
}

fn today() -> DateTime<Utc> {
    "2026-11-22T15:50:00Z".parse().expect("a time")
}

fn config(seed: u64, connections: u8) -> Config {
    Config { seed, connections: NonZeroU8::new(connections).expect("not zero"), ..Config::default() }
}

const FLAT_OUT: Wish = Wish { phase: Phase::Running, rate: Rate::Unlimited, steps: 0 };

fn per_second(rate: u32) -> Rate {
    Rate::PerSecond(NonZeroU32::new(rate).expect("not zero"))
}

type Run = (Handle<Stats, Wish>, JoinHandle<Result<(), Error>>);

fn start(database: &Database, config: Config, goal: Goal, wish: Wish) -> Run {
    let (handle, control) = stage::control(Stats::default(), wish, &CancellationToken::new());
    let task = tokio::spawn(bank::run(database.url.clone(), config, goal, today(), control));
    (handle, task)
}

async fn end((handle, task): Run) -> Stats {
    handle.stop.cancel();
    timeout(PATIENCE, task).await.expect("it ends").expect("no panic").expect("no error");
    handle.stats.borrow().clone()
}

async fn post(database: &Database, config: Config, count: u64) -> Stats {
    let (handle, task) = start(database, config, Goal::Transactions(count), FLAT_OUT);
    timeout(PATIENCE, task).await.expect("it ends").expect("no panic").expect("no error");
    handle.stats.borrow().clone()
}

async fn until(handle: &mut Handle<Stats, Wish>, what: impl FnMut(&Stats) -> bool) -> Stats {
    timeout(PATIENCE, handle.stats.wait_for(what)).await.expect("in time").expect("the bank runs").clone()
}

/// Every row of the four tables but `updated_at`, which is the database's own.
async fn dump(database: &Database) -> String {
    let mut connection = database.connect().await;
    let mut text = String::new();
    for table in ledgerline::change::BANK_TABLES {
        let query = format!("select coalesce(string_agg((to_jsonb(it) - 'updated_at')::text, E'\\n' order by id), '') from {table} it");
        text.push_str(&sqlx::query_scalar::<_, String>(AssertSqlSafe(query)).fetch_one(&mut connection).await.expect("a dump"));
    }
    text
}

/// Names the first row that differs: a whole bank is no message to read.
fn assert_same_rows(one: &str, other: &str) {
    let differs = one.lines().zip(other.lines()).find(|(one, other)| one != other);
    assert_eq!((differs, one.lines().count()), (None, other.lines().count()));
}

/// Nothing in it, whatever the history: the books of a bank that is right.
async fn assert_books_balance(database: &Database) {
    let mut connection = database.connect().await;
    let broken = number(
        &mut connection,
        "select (select count(*) from (select transaction_id from ledger_entries group by transaction_id having count(*) <> 2
                 or sum(amount) filter (where entry_type = 'DEBIT') is distinct from sum(amount) filter (where entry_type = 'CREDIT')) as it)
            + (select count(*) from transactions as t where (select count(*) from ledger_entries where transaction_id = t.id) <> 2)
            + (select count(*) from accounts as a where balance <> (
                 select coalesce(sum(case entry_type when 'DEBIT' then amount else -amount end), 0) from ledger_entries where account_id = a.id))
            + (select count(*) from transactions where created_at > now() or posted_at < created_at)",
    )
    .await;
    assert_eq!(broken, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_seed_count_and_day_are_the_same_bank_whatever_the_connections() {
    let (one, other) = (with_a_bank("same_one").await, with_a_bank("same_other").await);
    let (first, second) = tokio::join!(post(&one, config(7, 1), 1_500), post(&other, config(7, 6), 1_500));
    assert_eq!((first.events, first.transactions), (second.events, 1_500));
    assert!(first.updates > 0 && first.deletes > 0 && first.events.reversals > 0, "{first:?}");

    let rows = dump(&one).await;
    assert_same_rows(&rows, &dump(&other).await);
    assert_books_balance(&one).await;
    let census = bank::census(&one.url).await.expect("a census");
    assert_eq!((census.transactions, census.ledger_entries), (1_500, 3_000));
    assert_eq!(census.accounts, first.events.accounts_opened - first.events.accounts_deleted);
    assert_eq!(census.customers, first.events.customers_opened - first.events.customers_deleted);
    let mut connection = one.connect().await;
    let dates = "select count(distinct (created_at at time zone 'UTC')::date) from transactions where status = 'COMPLETED'";
    assert_eq!(number(&mut connection, dates).await, 30);
    assert_eq!(number(&mut connection, "select count(*) from transactions where status = 'REVERSED'").await, first.events.reversals.cast_signed());
    one.drop().await;
    other.drop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bank_that_is_not_empty_is_continued_with_any_seed() {
    let database = with_a_bank("continued").await;
    let mut posted = 0;
    for (seed, count) in [(1, 300), (1, 200), (2, 500), (3, 1)] {
        posted += post(&database, config(seed, 3), count).await.transactions;
    }
    assert_eq!(posted, 1_001);
    assert_eq!(bank::census(&database.url).await.expect("a census").transactions, 1_001);
    assert_books_balance(&database).await;
    database.drop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pause_really_stops_steps_pay_once_each_and_resume_goes_on() {
    let database = with_a_bank("paused").await;
    let mut connection = database.connect().await;
    let (mut handle, task) = start(&database, config(5, 4), Goal::Forever, FLAT_OUT);
    until(&mut handle, |stats| stats.transactions > 200).await;

    handle.wanted.send_modify(|wish| wish.phase = Phase::Paused);
    let paused = until(&mut handle, |stats| stats.phase == Phase::Paused).await;
    let posted = number(&mut connection, "select count(*) from transactions").await;
    assert_eq!(posted.unsigned_abs(), paused.transactions, "what it says is what is committed");
    assert_eq!(number(&mut connection, "select count(*) from pg_stat_activity where datname = current_database() and state = 'active'").await, 1);

    for step in 1..=5 {
        handle.wanted.send_modify(|wish| wish.steps += 1);
        let stats = until(&mut handle, |stats| stats.phase == Phase::Paused && stats.steps == step).await;
        assert_eq!(stats.transactions, paused.transactions + step);
        assert_eq!(number(&mut connection, "select count(*) from transactions").await.unsigned_abs(), stats.transactions);
    }

    handle.wanted.send_modify(|wish| wish.phase = Phase::Running);
    until(&mut handle, |stats| stats.transactions > paused.transactions + 200).await;
    end((handle, task)).await;
    assert_books_balance(&database).await;
    database.drop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_bank_that_is_paused_can_be_stepped() {
    let database = with_a_bank("stepped").await;
    let (mut handle, task) = start(&database, config(5, 4), Goal::Forever, Wish { phase: Phase::Paused, ..Wish::default() });
    until(&mut handle, |stats| stats.phase == Phase::Paused && stats.clock.is_some()).await;
    handle.wanted.send_modify(|wish| wish.steps = 1);
    let stats = until(&mut handle, |stats| stats.phase == Phase::Paused && stats.steps == 1).await;
    assert_eq!(stats.transactions, 1);
    end((handle, task)).await;
    database.drop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_rate_is_felt_at_once() {
    let database = with_a_bank("rate").await;
    let (mut handle, task) = start(&database, config(5, 2), Goal::Forever, Wish { rate: per_second(1), ..Wish::default() });
    let before = until(&mut handle, |stats| stats.transactions >= 1).await;
    let asked = std::time::Instant::now();
    handle.wanted.send_modify(|wish| wish.rate = per_second(200));
    until(&mut handle, |stats| stats.transactions > before.transactions + 100).await;
    // At the old rate it would take 100 seconds, at the new one half a second.
    let took = asked.elapsed();
    assert!((Duration::from_millis(450)..Duration::from_secs(20)).contains(&took), "{took:?}");
    end((handle, task)).await;
    database.drop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_killed_in_the_middle_leave_every_event_done_exactly_once() {
    let quiet = with_a_bank("quiet").await;
    let database = with_a_bank("killed").await;
    let mut connection = database.connect().await;
    let (mut handle, task) = start(&database, config(11, 4), Goal::Transactions(4_000), FLAT_OUT);
    for round in 1..=8 {
        until(&mut handle, |stats| stats.transactions >= round * 400).await;
        let kill = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                    where datname = current_database() and application_name = 'ledgerline bank'";
        assert!(number(&mut connection, kill).await > 0);
    }
    timeout(PATIENCE, task).await.expect("it ends").expect("no panic").expect("no error");
    let stats = handle.stats.borrow().clone();
    assert_eq!((stats.transactions, stats.refused, stats.waiting), (4_000, 0, None));

    // Not merely a bank in balance: the very bank that nobody disturbed, corrections and all.
    post(&quiet, config(11, 4), 4_000).await;
    assert_same_rows(&dump(&database).await, &dump(&quiet).await);
    assert_books_balance(&database).await;
    quiet.drop().await;
    database.drop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bank_changed_from_elsewhere_is_read_again_and_the_count_is_kept() {
    let database = with_a_bank("changed").await;
    post(&database, config(3, 2), 400).await;
    let mut connection = database.connect().await;
    let (mut handle, task) = start(&database, config(3, 2), Goal::Transactions(2_000), FLAT_OUT);
    until(&mut handle, |stats| stats.transactions > 100).await;
    // The plan believes that these accounts are active, and that this id is free.
    run(&mut connection, "update accounts set status = 'INACTIVE' where status = 'ACTIVE' and id % 3 = 0").await.expect("allowed");
    let next = number(&mut connection, "select max(id) + 300 from customers").await;
    run(&mut connection, &format!("insert into customers (id, first_name, last_name, email) values ({next}, 'A', 'B', 'a.b@example.com')"))
        .await
        .expect("allowed");
    timeout(PATIENCE, task).await.expect("it ends").expect("no panic").expect("no error");
    let stats = handle.stats.borrow().clone();
    assert!(stats.refused > 0, "{stats:?}");
    assert_eq!(bank::census(&database.url).await.expect("a census").transactions, 2_400);
    assert_books_balance(&database).await;
    database.drop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_generator_waits_until_the_first_has_gone() {
    let database = with_a_bank("second").await;
    let (mut first, first_task) = start(&database, config(1, 2), Goal::Forever, FLAT_OUT);
    until(&mut first, |stats| stats.transactions > 10).await;
    let (mut second, second_task) = start(&database, config(2, 2), Goal::Forever, FLAT_OUT);
    let stats = until(&mut second, |stats| stats.waiting.is_some()).await;
    assert_eq!(stats.transactions, 0);
    end((first, first_task)).await;
    until(&mut second, |stats| stats.transactions > 10).await;
    end((second, second_task)).await;
    assert_books_balance(&database).await;
    database.drop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_refuses_what_would_break_the_books() {
    let database = with_a_bank("refuses").await;
    let mut connection = database.connect().await;
    run(
        &mut connection,
        "insert into customers (id, first_name, last_name, email) values (1, 'A', 'B', 'a@example.com');
         insert into accounts (id, account_number, customer_id, account_type)
         values (1, 'N1', 1, 'SAVINGS'), (2, 'N2', 1, 'CREDIT'), (3, 'N3', 1, 'LOAN'), (4, 'N4', 1, 'CHECKING');
         select bank.post(1, 'DEPOSIT', 1, null, 100.00, 'D1', 'cash', now());
         select bank.post(2, 'TRANSFER', 1, 4, 40.00, 'T2', 'rent', now());
         select bank.post(3, 'WITHDRAWAL', 2, null, 5000.00, 'W3', 'all the credit there is', now());",
    )
    .await
    .expect("ordinary business");

    let header = "insert into transactions (id, account_id, txn_type, direction, amount, balance_after, posted_at)";
    for (why, statement) in [
        ("overdrawn savings", "select bank.post(9, 'WITHDRAWAL', 1, null, 60.01, 'W', 'x', now())".to_owned()),
        ("overdrawn by transfer", "select bank.post(9, 'TRANSFER', 4, 1, 40.01, 'T', 'x', now())".to_owned()),
        ("credit beyond its line", "select bank.post(9, 'WITHDRAWAL', 2, null, 0.01, 'W', 'x', now())".to_owned()),
        ("loan beyond its line", "select bank.post(9, 'WITHDRAWAL', 3, null, 50000.01, 'W', 'x', now())".to_owned()),
        ("no account", "select bank.post(9, 'DEPOSIT', 77, null, 1, 'D', 'x', now())".to_owned()),
        ("a transfer to itself", "select bank.post(9, 'TRANSFER', 1, 1, 1, 'T', 'x', now())".to_owned()),
        ("nothing", "select bank.post(9, 'DEPOSIT', 1, null, 0, 'D', 'x', now())".to_owned()),
        ("the same id", "select bank.post(1, 'DEPOSIT', 1, null, 1, 'D', 'x', now())".to_owned()),
        ("no entries", format!("{header} values (9, 1, 'DEPOSIT', 'CREDIT', 1, 61, now())")),
        (
            "one entry",
            format!(
                "{header} values (9, 1, 'DEPOSIT', 'CREDIT', 1, 61, now()); insert into ledger_entries (transaction_id, account_id, entry_type, amount) values (9, 1, 'DEBIT', 1)"
            ),
        ),
        (
            "two amounts",
            format!(
                "{header} values (9, 1, 'DEPOSIT', 'CREDIT', 1, 61, now()); insert into ledger_entries (transaction_id, account_id, entry_type, amount) values (9, 1, 'DEBIT', 1), (9, null, 'CREDIT', 2)"
            ),
        ),
        (
            "another account",
            format!(
                "{header} values (9, 1, 'DEPOSIT', 'CREDIT', 1, 61, now()); insert into ledger_entries (transaction_id, account_id, entry_type, amount) values (9, 4, 'DEBIT', 1), (9, null, 'CREDIT', 1)"
            ),
        ),
        ("a third entry", "insert into ledger_entries (transaction_id, account_id, entry_type, amount) values (1, 1, 'DEBIT', 100)".to_owned()),
        ("a balance by hand", "update accounts set balance = balance + 1 where id = 1".to_owned()),
        ("a present", "insert into accounts (account_number, customer_id, account_type, balance) values ('N5', 1, 'SAVINGS', 5)".to_owned()),
        ("a changed amount", "update transactions set amount = 1 where id = 1".to_owned()),
        ("a changed entry", "update ledger_entries set amount = 1 where id = 1".to_owned()),
        ("a deleted entry", "delete from ledger_entries where id = 1".to_owned()),
        ("a deleted payment", "delete from transactions where id = 1".to_owned()),
        ("a truncated ledger", "truncate customers cascade".to_owned()),
        ("closed with money in it", "update accounts set status = 'CLOSED', closed_at = now() where id = 1".to_owned()),
        ("a customer with accounts", "delete from customers where id = 1".to_owned()),
        ("an account that was used", "delete from accounts where id = 1".to_owned()),
        ("reversed with another amount", "select bank.reverse(9, 1, 'WITHDRAWAL', 1, null, 50, 'R', 'x', now())".to_owned()),
    ] {
        assert!(run(&mut connection, &statement).await.is_err(), "{why} was accepted");
    }

    run(&mut connection, "select bank.reverse(4, 2, 'TRANSFER', 4, 1, 40.00, 'T4', 'reversal', now())").await.expect("a reversal");
    assert!(run(&mut connection, "select bank.reverse(5, 2, 'TRANSFER', 1, 4, 40.00, 'T5', 'again', now())").await.is_err());
    assert_eq!(number(&mut connection, "select (balance * 100)::bigint from accounts where id = 1").await, 10_000);
    let touched = "select count(*) from accounts where updated_at > created_at and id in (1, 4)";
    assert_eq!(number(&mut connection, touched).await, 2);
    assert_books_balance(&database).await;
    let full = "select count(*) from pg_class where relreplident = 'f' and relname in ('customers', 'accounts', 'transactions', 'ledger_entries')";
    assert_eq!(number(&mut connection, full).await, 4);
    database.drop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_is_made_once_and_a_foreign_one_is_refused_with_the_reason() {
    let database = empty("schema").await;
    assert!(matches!(bank::prepare(&database.url, Ground::Foreign).await, Err(Error::NotPermitted)));
    let mut connection = database.connect().await;
    run(&mut connection, "create table customers (id bigint primary key, name text)").await.expect("allowed");
    let refused = bank::prepare(&database.url, Ground::Permitted).await.expect_err("somebody's table");
    assert!(refused.to_string().contains("there is no table public.accounts") || refused.to_string().contains("first_name"), "{refused}");
    assert_eq!(number(&mut connection, "select count(*) from pg_tables where schemaname in ('public', 'bank')").await, 1, "nothing was made");

    run(&mut connection, "drop table customers").await.expect("allowed");
    let (one, other) = tokio::join!(bank::prepare(&database.url, Ground::Ours), bank::prepare(&database.url, Ground::Permitted));
    one.and(other).expect("made once");
    assert_eq!(bank::census(&database.url).await.expect("a census"), Census::default());
    run(&mut connection, "alter table customers add column tier text").await.expect("allowed");
    bank::prepare(&database.url, Ground::Ours).await.expect("an added column is somebody's own");
    run(&mut connection, "update bank.version set version = 2").await.expect("allowed");
    assert!(matches!(bank::prepare(&database.url, Ground::Ours).await, Err(Error::Version(2))));
    database.drop().await;
}
