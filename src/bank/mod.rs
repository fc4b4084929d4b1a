//! The simulated bank, our source of truth: seeded people and payments in, one database transaction a business event out.
//!
//! ```text
//!  plan (pure: seed, book, clock) ──► desk (pace, one queue a writer) ──► ledger (writers) ──► PostgreSQL (schema.sql)
//! ```
//! The stage owns the random numbers, the pace and a small picture of the bank (who may pay, and how much). The money itself
//! belongs to PostgreSQL, which holds the rules too: two ledger entries a payment, balance = ledger, no money that is not there.
//!
//! After a crash the bank is read back and continued. An event whose answer was lost is sent again; the database knows by the
//! planned ids what it has done. So nothing happens twice, and nothing is skipped. Two generators never work on one bank.
//!
//! What the numbers mean. Each row of `transactions` has moved money, by exactly two ledger entries, and stays. A payment that is
//! reversed becomes `REVERSED`; the payment that takes it back is an ordinary `COMPLETED` one in the other direction. So
//! "transactions with status COMPLETED" are the payments that stand: of a reversed pair only the reversal counts. `PENDING` and
//! `FAILED` are words of the schema that the generator does not use: money that has not moved has no entries to balance.

mod book;
mod clock;
mod desk;
mod event;
mod ledger;
mod mix;
mod pace;
mod people;
mod plan;
mod schema;
mod state;

use std::{
    num::{NonZeroU8, NonZeroU32},
    time::Duration,
};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};

pub use self::schema::{Census, Ground, census, prepare};
use self::{
    desk::Desk,
    event::Event,
    ledger::{Report, Writer},
};
use crate::{
    fault::{Backoff, Diagnose, Fault, chain},
    secret::Secret,
    stage::{Control, Phase},
    units::Span,
};

/// So long a starting bank waits for the sessions of a dead one to vanish.
const OWN_MAX: Duration = Duration::from_secs(45);

/// Settings of the bank, `[bank]` in `config.toml`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Whether the bank does business. On a database that is not embedded it must be written out: nobody's tables fill by accident.
    pub enabled: bool,
    /// The same seed, number of transactions and day give the same bank, row by row.
    pub seed: u64,
    /// Payments a second; openings, corrections and deletions come along between them.
    pub rate: NonZeroU32,
    /// A new bank starts so long before today and catches up, so that charts over time have something to show.
    pub history: Span,
    /// Sessions that write at the same time, at most 16. More help at high rates only.
    pub connections: NonZeroU8,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: true,
            seed: 42,
            rate: NonZeroU32::new(50).expect("50 is not 0"),
            history: Span::from_secs(30 * 86_400),
            connections: NonZeroU8::new(4).expect("4 is not 0"),
        }
    }
}

/// How many payments a second are wished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rate {
    PerSecond(NonZeroU32),
    /// As fast as the database takes them.
    Unlimited,
}

impl Default for Rate {
    fn default() -> Self {
        Self::PerSecond(Config::default().rate)
    }
}

/// What an operator may wish of the bank. Acted on within 100 ms, unless the database itself is slower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Wish {
    pub phase: Phase,
    pub rate: Rate,
    /// Single steps asked for so far, counted up. While paused each is one payment; those asked while running are void.
    pub steps: u64,
}

/// When the bank has done enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    Forever,
    /// Exactly so many rows of `transactions`, then [`run`] returns.
    Transactions(u64),
}

/// What the bank tells of itself. All counts are of this run, counted when the database has committed.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct Stats {
    /// Paused only when no transaction is under way.
    pub phase: Phase,
    pub wished: Rate,
    pub transactions: u64,
    pub ledger_entries: u64,
    /// Rows updated, as many as the WAL tells of: balances that payments move, and corrections.
    pub updates: u64,
    /// Rows deleted.
    pub deletes: u64,
    pub events: Events,
    /// Steps taken or void, of those wished.
    pub steps: u64,
    /// Events the database refused because somebody else had changed the bank.
    pub refused: u64,
    /// Why nothing moves though it should: the database is away.
    pub waiting: Option<String>,
    pub last_error: Option<String>,
    /// The bank's own clock, at the newest committed event.
    pub clock: Option<DateTime<Utc>>,
    /// Whether business time is still on its way through the history.
    pub catching_up: bool,
}

/// Events by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Events {
    pub customers_opened: u64,
    pub accounts_opened: u64,
    pub deposits: u64,
    pub withdrawals: u64,
    pub transfers: u64,
    pub reversals: u64,
    pub customers_moved: u64,
    pub statuses_changed: u64,
    pub accounts_closed: u64,
    pub accounts_deleted: u64,
    pub customers_deleted: u64,
}

impl Events {
    /// All of them: database transactions committed.
    pub fn total(&self) -> u64 {
        let payments = self.deposits + self.withdrawals + self.transfers + self.reversals;
        let opened = self.customers_opened + self.accounts_opened;
        let corrected = self.customers_moved + self.statuses_changed + self.accounts_closed;
        payments + opened + corrected + self.accounts_deleted + self.customers_deleted
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this database is not ours to fill")]
    NotPermitted,
    #[error("the database holds something else under the bank's names: {0}")]
    Foreign(String),
    #[error("the bank's schema has version {0}, which this ledgerline does not know")]
    Version(i32),
    #[error("could not connect to the bank's database")]
    Connect(#[source] sqlx::Error),
    #[error("could not create the bank's schema")]
    Create(#[source] sqlx::Error),
    #[error("could not read the bank")]
    Read(#[source] sqlx::Error),
    #[error("could not write to the bank")]
    Work(#[source] sqlx::Error),
    #[error("another generator works on this bank")]
    Occupied,
    #[error("the database refuses whatever the bank does: {0}")]
    Hopeless(String),
    #[error("bank.connections is {0}, and at most {max} are useful", max = plan::BRANCHES)]
    Connections(u8),
    #[error("bank.history is longer than time itself")]
    History,
    #[error("a writer of the bank ended by itself")]
    Writer,
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        let operator = |text: &str| Fault::Operator(text.to_owned());
        match self {
            Self::NotPermitted => operator("write enabled = true into [bank] of config.toml if the simulated bank shall live in this database"),
            Self::Foreign(_) => operator("let source.url name an empty database, or set bank.enabled = false to capture what is there"),
            Self::Version(_) => operator("use the ledgerline that made it, or let source.url name an empty database"),
            Self::Connect(error) => ledger::fault_of(error, "check source.url: user, password and database"),
            Self::Create(error) => ledger::fault_of(error, "grant the user of source.url create on the database and on its schema public"),
            Self::Read(error) | Self::Work(error) => {
                ledger::fault_of(error, "let source.url name a user who owns the bank's schema, and check that nobody changed it")
            }
            Self::Occupied => operator("stop the other ledgerline that generates into this database"),
            Self::Hopeless(_) => operator("see why the database refuses: rules added to the bank's tables, or somebody else who writes the same ids"),
            Self::Connections(_) => operator("set bank.connections to 16 or less"),
            Self::History => operator("set bank.history to something like 30d"),
            Self::Writer => Fault::Bug,
        }
    }
}

/// Does business until told to stop or the goal is reached; then no transaction is under way.
///
/// [`prepare`] has made the schema. `now` is the time of the start, from which business time follows; it goes on with the
/// system's clock. Outages of a bank once reached are waited out, and said in `Stats::waiting`.
pub async fn run(url: Secret, config: Config, goal: Goal, now: DateTime<Utc>, mut control: Control<Stats, Wish>) -> Result<(), Error> {
    let lanes = usize::from(config.connections.get());
    if lanes > plan::BRANCHES {
        return Err(Error::Connections(config.connections.get()));
    }
    let ahead = now - Utc::now();
    let real_time = move || Utc::now() + ahead;
    let Some(mut owner) = own(&url, &control).await? else { return Ok(()) };
    let planner = state::read(&mut owner, &config, goal, now).await?;
    hand_over(&mut owner).await.map_err(Error::Read)?;

    let wish = *control.wanted.borrow_and_update();
    let mut desk = Desk::new(planner, goal, wish, lanes, Instant::now());
    let mut staff = Staff::hire(&url, owner, lanes, &control);
    let stop = control.stop.clone();
    loop {
        for (lane, batch) in desk.hand_out(Instant::now(), real_time()) {
            staff.give(lane, batch)?;
        }
        control.stats.send_replace(desk.stats.clone());
        if desk.is_finished() {
            break;
        }
        if desk.must_read_again() {
            if desk.is_hopeless() {
                return Err(Error::Hopeless(desk.stats.last_error.unwrap_or_default()));
            }
            let goal = desk.left().map_or(Goal::Forever, Goal::Transactions);
            let Some(planner) = read_again(&url, &config, goal, real_time(), &control).await? else { break };
            desk.start_over(planner);
            continue;
        }
        let due = desk.next_due();
        tokio::select! { biased;
            () = stop.cancelled() => break,
            wish = control.next_wish() => desk.obey(wish, Instant::now()),
            report = staff.reports.recv() => desk.take(report.ok_or(Error::Writer)?)?,
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
        }
    }
    staff.dismiss(&mut desk).await?;
    control.stats.send_replace(desk.into_stats(real_time()));
    Ok(())
}

/// The connection that owns the bank, alone. None: told to stop while waiting for it.
async fn own(url: &Secret, control: &Control<Stats, Wish>) -> Result<Option<PgConnection>, Error> {
    let deadline = Instant::now() + OWN_MAX;
    let mut connection = schema::connect(url).await?;
    while !schema::try_own(&mut connection).await.map_err(Error::Read)? {
        if Instant::now() > deadline {
            return Err(Error::Occupied);
        }
        control.stats.send_modify(|stats| stats.waiting = Some("another generator, or what is left of one, still holds the bank".to_owned()));
        tokio::select! {
            () = control.stop.cancelled() => return Ok(None),
            () = sleep(Duration::from_millis(100)) => {}
        }
    }
    Ok(Some(connection))
}

/// The owner has read the bank and becomes a writer like the others.
async fn hand_over(owner: &mut PgConnection) -> Result<(), sqlx::Error> {
    schema::try_write(owner).await?;
    schema::share_flushes(owner).await;
    schema::let_writers_in(owner).await
}

/// Reads the bank anew after somebody else has changed it. None: told to stop meanwhile.
async fn read_again(url: &Secret, config: &Config, goal: Goal, now: DateTime<Utc>, control: &Control<Stats, Wish>) -> Result<Option<plan::Planner>, Error> {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(3));
    loop {
        let attempt = async { state::read(&mut schema::connect(url).await?, config, goal, now).await };
        match attempt.await {
            Ok(planner) => return Ok(Some(planner)),
            Err(error) if error.fault() == Fault::Transient => {
                control.stats.send_modify(|stats| stats.waiting = Some(chain(&error)));
                tokio::select! {
                    () = control.stop.cancelled() => return Ok(None),
                    () = sleep(backoff.delay()) => {}
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// The writers, each a task with its own connection.
struct Staff {
    orders: Vec<mpsc::Sender<Vec<Event>>>,
    reports: mpsc::Receiver<Report>,
    writers: JoinSet<()>,
}

impl Staff {
    fn hire(url: &Secret, owner: PgConnection, lanes: usize, control: &Control<Stats, Wish>) -> Self {
        // A writer rarely has more to say than that its batches are done.
        let (says, reports) = mpsc::channel(desk::BATCHES_AT_ONCE * lanes);
        let mut writers = JoinSet::new();
        let mut owner = Some(owner);
        let orders = (0..lanes)
            .map(|lane| {
                let (order, orders) = mpsc::channel(desk::BATCHES_AT_ONCE);
                writers.spawn(Writer::new(url.clone(), lane, owner.take(), control.stop.clone()).run(orders, says.clone()));
                order
            })
            .collect();
        Self { orders, reports, writers }
    }

    /// The desk gives a writer no more than its channel holds, so there is always room.
    fn give(&self, lane: usize, batch: Vec<Event>) -> Result<(), Error> {
        self.orders[lane].try_send(batch).map_err(|_| Error::Writer)
    }

    /// Sends everybody home; what is under way is finished and counted, within the writers' grace.
    async fn dismiss(mut self, desk: &mut Desk) -> Result<(), Error> {
        self.orders.clear();
        let last_reports = async {
            while let Some(report) = self.reports.recv().await {
                desk.take(report)?;
            }
            while self.writers.join_next().await.is_some() {}
            Ok(())
        };
        // Whoever is not home by then is left to the next start, which finds out what he has done.
        timeout(ledger::GRACE + Duration::from_secs(2), last_reports).await.unwrap_or(Ok(()))
    }
}
