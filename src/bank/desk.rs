//! Where plan, pace and writers meet: which event goes to which writer, and when.
//!
//! Owns the planner, one short queue a writer, and the stage's `Stats`. Does no I/O; batches come out of [`Desk::hand_out`],
//! reports go in by [`Desk::take`].

use std::{collections::VecDeque, time::Duration};

use chrono::{DateTime, Utc};
use tokio::time::Instant;

use super::{
    Goal, Stats, Wish,
    event::{Deed, Event, TxnType},
    ledger::Report,
    pace::Pace,
    plan::{Planner, Wanted},
};
use crate::stage::Phase;

/// Events a round trip at most.
const BATCH_MAX: usize = 64;

/// Events planned ahead for one writer at most; one full queue holds the plan back.
const QUEUE_MAX: usize = 2 * BATCH_MAX;

/// Events planned in one go, so that the runtime's thread is not kept for long.
const PLAN_MAX: u32 = 64;

/// A batch should take no longer.
const BATCH_TIME: Duration = Duration::from_millis(25);

/// Batches a writer has at once: one under way, one at hand, so that its session never waits for us. A pause waits for both.
pub(super) const BATCHES_AT_ONCE: usize = 2;

/// A bank that is changed from elsewhere is read again; if it refuses so often without a single payment between, it is not ours to use.
const REFUSALS_MAX: u32 = 20;

pub(super) struct Desk {
    pub(super) stats: Stats,
    planner: Planner,
    pace: Pace,
    wish: Wish,
    lanes: Vec<Lane>,
    /// Payments still to be planned; None: for ever.
    left: Option<u64>,
    steps_done: u64,
    /// The database knows the bank otherwise than we do: stop, then read it again.
    confused: bool,
    refusals_in_a_row: u32,
}

#[derive(Debug)]
struct Lane {
    queue: VecDeque<Event>,
    /// Batches given and not reported yet.
    batches: usize,
    batch_max: usize,
    waiting: Option<String>,
}

impl Desk {
    pub(super) fn new(planner: Planner, goal: Goal, wish: Wish, lanes: usize, now: Instant) -> Self {
        let stats = Stats { wished: wish.rate, clock: Some(planner.clock().at()), ..Stats::default() };
        let left = match goal {
            Goal::Forever => None,
            Goal::Transactions(count) => Some(count),
        };
        let lanes = (0..lanes).map(|_| Lane { queue: VecDeque::new(), batches: 0, batch_max: BATCH_MAX / 8, waiting: None }).collect();
        let (pace, steps_done) = (Pace::new(wish.rate, now), wish.steps);
        Self { stats, planner, pace, wish, lanes, left, steps_done, confused: false, refusals_in_a_row: 0 }
    }

    pub(super) fn obey(&mut self, wish: Wish, now: Instant) {
        let resumed = self.wish.phase == Phase::Paused && wish.phase == Phase::Running;
        if wish.rate != self.wish.rate || resumed {
            self.pace.change(wish.rate, now);
        }
        if wish.phase == Phase::Running {
            // Steps are for a bank that stands still.
            self.steps_done = wish.steps;
        }
        self.stats.wished = wish.rate;
        self.wish = wish;
    }

    /// Whether all that was to be posted is posted.
    pub(super) fn is_finished(&self) -> bool {
        self.left == Some(0) && !self.confused && self.is_idle() && self.lanes.iter().all(|lane| lane.queue.is_empty())
    }

    pub(super) fn is_idle(&self) -> bool {
        self.lanes.iter().all(|lane| lane.batches == 0)
    }

    /// Nothing is under way any more, and the bank has to be read again.
    pub(super) fn must_read_again(&self) -> bool {
        self.confused && self.is_idle()
    }

    /// Goes on with a planner that has read the bank again; whatever was planned and not done is forgotten.
    pub(super) fn start_over(&mut self, planner: Planner) {
        for lane in &mut self.lanes {
            let forgotten = lane.queue.drain(..).filter(|event| event.deed.is_payment()).count();
            self.left = self.left.map(|left| left + u64::try_from(forgotten).unwrap_or(0));
        }
        self.planner = planner;
        self.confused = false;
    }

    /// Payments of the goal that are not posted yet.
    pub(super) fn left(&self) -> Option<u64> {
        let queued = self.lanes.iter().flat_map(|lane| &lane.queue).filter(|event| event.deed.is_payment()).count();
        self.left.map(|left| left + u64::try_from(queued).unwrap_or(0))
    }

    /// The database has refused again and again, and nothing else happened.
    pub(super) fn is_hopeless(&self) -> bool {
        self.refusals_in_a_row >= REFUSALS_MAX
    }

    /// When there is something to do without any report; None: only a report or a wish brings it.
    pub(super) fn next_due(&self) -> Option<Instant> {
        if self.confused || self.wish.phase == Phase::Paused || self.left == Some(0) || self.is_held_up() {
            return None;
        }
        Some(self.pace.next().unwrap_or_else(Instant::now))
    }

    /// One full queue holds all up, so that no branch runs ahead; and for a database that is away nothing is planned at all:
    /// what was not paid meanwhile is not paid afterwards in one flood.
    fn is_held_up(&self) -> bool {
        self.lanes.iter().any(|lane| lane.queue.len() >= QUEUE_MAX || lane.waiting.is_some())
    }

    /// Plans what is due, and says which writer gets which batch.
    pub(super) fn hand_out(&mut self, now: Instant, real_time: DateTime<Utc>) -> Vec<(usize, Vec<Event>)> {
        let mut batches = Vec::new();
        if self.confused {
            // Nothing new until everything under way has ended.
        } else if self.wish.phase == Phase::Paused {
            if self.is_idle() && self.steps_done < self.wish.steps {
                batches.extend(self.step(real_time));
            }
        } else {
            self.plan_what_is_due(now, real_time);
            for (place, lane) in self.lanes.iter_mut().enumerate() {
                for _ in lane.batches..BATCHES_AT_ONCE {
                    // What is there goes at once to a writer who has nothing to do; one who has gets a full batch or waits for more.
                    let is_worth_it = if lane.batches == 0 { !lane.queue.is_empty() } else { lane.queue.len() >= lane.batch_max };
                    if is_worth_it {
                        batches.push((place, lane.queue.drain(..lane.queue.len().min(lane.batch_max)).collect()));
                        lane.batches += 1;
                    }
                }
            }
        }
        self.tell(real_time);
        batches
    }

    fn plan_what_is_due(&mut self, now: Instant, real_time: DateTime<Utc>) {
        let due = self.pace.due(now);
        let mut payments = 0;
        for _ in 0..PLAN_MAX {
            if payments >= due || self.left == Some(0) || self.is_held_up() {
                break;
            }
            if self.plan(real_time, Wanted::Anything) {
                self.pace.spend();
                payments += 1;
            }
        }
    }

    /// Puts one more event into its queue; whether it was a payment.
    fn plan(&mut self, real_time: DateTime<Utc>, wanted: Wanted) -> bool {
        let event = self.planner.next(real_time, wanted);
        let is_payment = event.deed.is_payment();
        if is_payment {
            self.left = self.left.map(|left| left - 1);
        }
        let lane = event.branch % self.lanes.len();
        self.lanes[lane].queue.push_back(event);
        is_payment
    }

    /// One payment, with what must come before it, while the bank is paused.
    fn step(&mut self, real_time: DateTime<Utc>) -> Option<(usize, Vec<Event>)> {
        let is_planned = self.lanes.iter().any(|lane| lane.queue.iter().any(|event| event.deed.is_payment()));
        if !is_planned {
            if self.left == Some(0) {
                self.steps_done = self.wish.steps;
                return None;
            }
            // Founding a bank takes two events before the first payment; a bound, should the plan ever find none.
            (0..PLAN_MAX).find(|_| self.plan(real_time, Wanted::Payment))?;
        }
        let (place, lane) = self.lanes.iter_mut().enumerate().find(|(_, lane)| lane.queue.iter().any(|event| event.deed.is_payment()))?;
        let upto = lane.queue.iter().position(|event| event.deed.is_payment())?;
        self.steps_done += 1;
        lane.batches += 1;
        Some((place, lane.queue.drain(..=upto).collect()))
    }

    /// Takes a writer's report. An error ends the stage.
    pub(super) fn take(&mut self, report: Report) -> Result<(), super::Error> {
        match report {
            Report::Waiting { lane, reason } => {
                tracing::warn!(lane, reason, "bank waits for its database");
                self.lanes[lane].waiting = Some(reason);
            }
            Report::Done { lane, batch, took } => {
                self.lanes[lane].finish(batch.len(), took);
                batch.iter().for_each(|event| self.count(event));
            }
            Report::Refused { lane, batch, done, reason } => {
                self.lanes[lane].finish(batch.len(), Duration::ZERO);
                batch[..done].iter().for_each(|event| self.count(event));
                tracing::warn!(reason, "the database refused an event: the bank was changed from elsewhere and is read again");
                self.stats.refused += 1;
                self.stats.last_error = Some(reason);
                // Several writers may meet the same confusion.
                self.refusals_in_a_row += u32::from(!self.confused);
                self.confused = true;
                let not_posted = batch[done..].iter().filter(|event| event.deed.is_payment()).count();
                self.left = self.left.map(|left| left + u64::try_from(not_posted).unwrap_or(0));
            }
            Report::Failed(error) => return Err(error),
        }
        Ok(())
    }

    fn count(&mut self, event: &Event) {
        let stats = &mut self.stats;
        let it = &mut stats.events;
        match &event.deed {
            Deed::OpenCustomer(_) => it.customers_opened += 1,
            Deed::OpenAccount { .. } => it.accounts_opened += 1,
            Deed::Pay(payment) => match payment.txn_type {
                TxnType::Deposit => it.deposits += 1,
                TxnType::Withdrawal => it.withdrawals += 1,
                TxnType::Transfer => it.transfers += 1,
            },
            Deed::Reverse { .. } => it.reversals += 1,
            Deed::MoveCustomer { .. } => it.customers_moved += 1,
            Deed::SetCustomerStatus { .. } | Deed::SetAccountStatus { .. } => it.statuses_changed += 1,
            Deed::CloseAccount { .. } => it.accounts_closed += 1,
            Deed::DeleteAccount { .. } => it.accounts_deleted += 1,
            Deed::DeleteCustomer { .. } => it.customers_deleted += 1,
        }
        if event.deed.is_payment() {
            stats.transactions += 1;
            stats.ledger_entries += 2;
            self.refusals_in_a_row = 0;
        }
        stats.updates += event.deed.rows_updated();
        stats.deletes = it.accounts_deleted + it.customers_deleted;
        stats.clock = stats.clock.max(Some(event.at));
    }

    /// The last word, when all writers have gone home.
    pub(super) fn into_stats(mut self, real_time: DateTime<Utc>) -> Stats {
        self.tell(real_time);
        // Whoever waited has gone home, too.
        self.stats.waiting = None;
        self.stats
    }

    fn tell(&mut self, real_time: DateTime<Utc>) {
        let still = self.wish.phase == Phase::Paused && self.is_idle();
        self.stats.phase = if still { Phase::Paused } else { Phase::Running };
        self.stats.steps = self.steps_done;
        self.stats.catching_up = self.planner.clock().is_catching_up(real_time);
        self.stats.waiting = self.lanes.iter().find_map(|lane| lane.waiting.clone());
    }
}

impl Lane {
    /// A batch has ended: the next one is sized so that it takes about [`BATCH_TIME`].
    fn finish(&mut self, events: usize, took: Duration) {
        self.batches -= 1;
        self.waiting = None;
        if took > BATCH_TIME {
            self.batch_max = (self.batch_max / 2).max(1);
        } else if events == self.batch_max && took < BATCH_TIME * 2 / 3 {
            self.batch_max = (self.batch_max + 1).min(BATCH_MAX);
        }
    }
}
