//! Decides what happens next in the bank. Pure: seed, state, and time in; events out.
//!
//! All ids, amounts and times are chosen here, and everything that happens is possible: the planner knows every balance, so the
//! database refuses an event only when somebody else has changed the bank.
//!
//! The bank is cut into branches by customer; no event touches two of them. That is what lets several connections write at
//! once and the same seed still be the same bank: within a branch the order is the plan's, between branches it does not matter.

use std::collections::VecDeque;

use chrono::{DateTime, Utc};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    book::{Branch, Recent, State, at},
    clock::Clock,
    event::{AccountStatus, AccountType, CustomerStatus, Deed, Event, Payment, TxnType},
    mix::{self, Kind},
    people,
};
use crate::units::Money;

/// Fixed, so that the plan does not depend on how many connections carry it out; at most so many are useful.
pub(super) const BRANCHES: usize = 16;

/// Less than this in an account, and it is topped up rather than drawn from.
const TOO_LITTLE: Money = Money::from_cents(5_00);

/// A branch keeps at least so many accounts: a transfer needs two.
const ACCOUNTS_KEPT: usize = 4;

/// The highest ids in use; the next ones follow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Highest {
    pub(super) customer: i64,
    pub(super) account: i64,
    pub(super) transaction: i64,
    pub(super) event: i64,
}

/// Which events are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Anything,
    /// A payment as soon as possible; what must come before (an account) comes before.
    Payment,
}

pub(super) struct Planner {
    rng: ChaCha8Rng,
    clock: Clock,
    branches: Vec<Branch>,
    highest: Highest,
    /// What follows from the event before. Holds a customer's first account and its opening payment at most.
    agenda: VecDeque<(usize, Todo)>,
    /// Planned so far, by branch.
    events: [u64; BRANCHES],
}

#[derive(Debug, Clone, Copy)]
enum Todo {
    OpenAccount { owner: u32 },
    OpeningPayment { account: u32 },
    Close { account: u32 },
}

impl Planner {
    /// For an empty bank the seed alone decides; a bank that exists is continued from its ids, so that it does not repeat itself.
    pub(super) fn new(seed: u64, highest: Highest, clock: Clock) -> Self {
        let entropy = seed ^ highest.event.unsigned_abs().rotate_left(32) ^ highest.transaction.unsigned_abs().rotate_left(17);
        Self {
            rng: ChaCha8Rng::seed_from_u64(entropy),
            clock,
            branches: vec![Branch::default(); BRANCHES],
            highest,
            agenda: VecDeque::new(),
            events: [0; BRANCHES],
        }
    }

    /// Tells the planner of a customer that exists. Customers come in the order of their ids, before all accounts.
    pub(super) fn know_customer(&mut self, id: i64, status: CustomerStatus, account_rows: u32) {
        let branch = &mut self.branches[branch_of(id)];
        let slot = branch.customers.add(id, status, account_rows);
        if account_rows == 0 {
            branch.note_stranger(slot);
        }
    }

    /// Tells the planner of an open account that exists. An account of an unknown customer is left alone.
    pub(super) fn know_account(&mut self, id: i64, customer: i64, account_type: AccountType, state: State, balance: Money) {
        let branch = &mut self.branches[branch_of(customer)];
        let Some(owner) = branch.customers.slot_by_id(customer) else { return };
        let slot = branch.accounts.add(id, owner, account_type, state, balance);
        if state == State::Unused {
            branch.note_unused(slot);
        }
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The next event. `now` is the real time, which business time never passes.
    pub(super) fn next(&mut self, now: DateTime<Utc>, wanted: Wanted) -> Event {
        let (branch, deed) = match self.agenda.pop_front() {
            Some((branch, todo)) => (branch, self.follow(branch, todo)),
            None => self.draw(wanted),
        };
        let at = if deed.is_payment() { self.clock.advance(now, self.rng.random()) } else { self.clock.at() };
        self.highest.event += 1;
        self.events[branch] += 1;
        Event { number: self.highest.event, branch, at, deed }
    }

    fn draw(&mut self, wanted: Wanted) -> (usize, Deed) {
        let accounts: usize = self.branches.iter().map(|branch| branch.accounts.len()).sum();
        let kind = match wanted {
            Wanted::Payment => Kind::Pay,
            Wanted::Anything if accounts < mix::FOUNDING_ACCOUNTS && self.rng.random() => Kind::OpenCustomer,
            Wanted::Anything => mix::kind(self.rng.random_range(0..1_000)),
        };
        if kind == Kind::OpenCustomer {
            return self.open_customer();
        }
        let branch = self.pick_branch();
        // What few branches can offer is looked for in all of them. Then a payment, possible nearly always; a new customer is always.
        let rare = matches!(kind, Kind::Reverse | Kind::DeleteAccount | Kind::DeleteCustomer);
        for (kind, branches) in [(kind, if rare { BRANCHES } else { 1 }), (Kind::Pay, BRANCHES)] {
            for step in 0..branches {
                let branch = (branch + step) % BRANCHES;
                if let Some(deed) = self.try_kind(kind, branch) {
                    return (branch, deed);
                }
            }
        }
        self.open_customer()
    }

    /// Of two at random the one where less has happened: so all stay even, and no writer runs dry while another is flooded.
    fn pick_branch(&mut self) -> usize {
        let (one, other) = (self.rng.random_range(0..BRANCHES), self.rng.random_range(0..BRANCHES));
        if self.events[one] <= self.events[other] { one } else { other }
    }

    fn try_kind(&mut self, kind: Kind, branch: usize) -> Option<Deed> {
        match kind {
            Kind::Pay => self.pay(branch),
            Kind::Reverse => self.reverse(branch),
            // Its branch follows from its id.
            Kind::OpenCustomer => None,
            Kind::OpenAccount => {
                let owner = self.branches[branch].customers.pick(&mut self.rng)?;
                (self.branches[branch].customers.statuses[at(owner)] == Some(CustomerStatus::Active)).then(|| self.open_account(branch, owner))
            }
            Kind::MoveCustomer => {
                let slot = self.branches[branch].customers.pick(&mut self.rng)?;
                let customer = self.branches[branch].customers.ids[at(slot)];
                Some(Deed::MoveCustomer { customer, address: people::address(&mut self.rng), phone: people::phone(&mut self.rng) })
            }
            Kind::SetCustomerStatus => self.set_customer_status(branch),
            Kind::SetAccountStatus => self.set_account_status(branch),
            Kind::CloseAccount => self.close(branch),
            Kind::DeleteAccount => Some(Deed::DeleteAccount { account: self.branches[branch].delete_unused()? }),
            Kind::DeleteCustomer => Some(Deed::DeleteCustomer { customer: self.branches[branch].delete_stranger()? }),
        }
    }

    fn follow(&mut self, branch: usize, todo: Todo) -> Deed {
        match todo {
            Todo::OpenAccount { owner } => self.open_account(branch, owner),
            Todo::OpeningPayment { account } => {
                let (txn_type, median) = mix::opening(self.branches[branch].accounts.types[at(account)]);
                let wish = people::amount(&mut self.rng, median);
                let amount = if txn_type == TxnType::Deposit { wish } else { wish.min(self.branches[branch].accounts.funds(account)) };
                self.book(branch, txn_type, account, None, amount, "opening payment")
            }
            Todo::Close { account } => self.shut(branch, account),
        }
    }

    fn open_customer(&mut self) -> (usize, Deed) {
        self.highest.customer += 1;
        let id = self.highest.customer;
        let branch = branch_of(id);
        let person = people::person(&mut self.rng, id, self.clock.at().date_naive());
        let owner = self.branches[branch].customers.add(id, CustomerStatus::Active, 0);
        if self.percent(mix::WITHOUT_ACCOUNT_PERCENT) {
            self.branches[branch].note_stranger(owner);
        } else {
            self.agenda.push_back((branch, Todo::OpenAccount { owner }));
        }
        (branch, Deed::OpenCustomer(person))
    }

    fn open_account(&mut self, branch: usize, owner: u32) -> Deed {
        self.highest.account += 1;
        let id = self.highest.account;
        let account_type = mix::account_type(self.rng.random_range(0..100));
        let by_mistake = self.percent(mix::BY_MISTAKE_PERCENT);
        let interest_rate = people::interest_rate(&mut self.rng, account_type);

        let state = if by_mistake { State::Unused } else { State::Active };
        let book = &mut self.branches[branch];
        let account = book.accounts.add(id, owner, account_type, state, Money::ZERO);
        book.customers.account_rows[at(owner)] += 1;
        if by_mistake {
            book.note_unused(account);
        } else {
            self.agenda.push_back((branch, Todo::OpeningPayment { account }));
        }
        let customer = self.branches[branch].customers.ids[at(owner)];
        Deed::OpenAccount { id, account_number: people::account_number(id), customer, account_type, currency: people::CURRENCY, interest_rate }
    }

    fn pay(&mut self, branch: usize) -> Option<Deed> {
        let book = &self.branches[branch];
        let payer = book.pick_payer(&mut self.rng)?;
        let (balance, account_type, funds) = (book.accounts.balances[at(payer)], book.accounts.types[at(payer)], book.accounts.funds(payer));
        let (mut txn_type, median) = mix::habit(account_type, self.rng.random_range(0..100));
        let mut amount = people::amount(&mut self.rng, median);
        let mut receiver = None;

        let borrows = account_type.floor() < Money::ZERO;
        if funds < TOO_LITTLE {
            txn_type = TxnType::Deposit;
        } else if txn_type == TxnType::Deposit && borrows && balance >= Money::ZERO {
            // Nothing to pay back: it borrows again.
            txn_type = TxnType::Withdrawal;
        }
        if txn_type == TxnType::Transfer {
            receiver = book.pick_receiver(&mut self.rng, payer);
            let owes = receiver.is_some_and(|it| book.accounts.types[at(it)].floor() < Money::ZERO);
            let debt = receiver.map_or(Money::ZERO, |it| -book.accounts.balances[at(it)]);
            if receiver.is_none() || (owes && debt <= Money::ZERO) {
                (txn_type, receiver) = (TxnType::Withdrawal, None);
            } else if owes {
                amount = amount.min(debt);
            }
        }
        amount = match txn_type {
            TxnType::Deposit if borrows => amount.min(-balance),
            TxnType::Deposit => amount,
            TxnType::Withdrawal | TxnType::Transfer => amount.min(funds),
        };
        let words = mix::descriptions(txn_type);
        let description = words[self.rng.random_range(0..words.len())];
        Some(self.book(branch, txn_type, payer, receiver, amount, description))
    }

    /// Writes a payment into the book and the plan. The funds suffice.
    fn book(&mut self, branch: usize, txn_type: TxnType, account: u32, receiver: Option<u32>, amount: Money, description: &'static str) -> Deed {
        let payment = self.payment(branch, txn_type, account, receiver, amount, description);
        let named = |slot: u32| (slot, self.branches[branch].accounts.ids[at(slot)]);
        let recent = Recent { id: payment.id, txn_type, account: named(account), related: receiver.map(named), amount };
        self.branches[branch].remember(recent);
        Deed::Pay(payment)
    }

    fn payment(&mut self, branch: usize, txn_type: TxnType, account: u32, receiver: Option<u32>, amount: Money, description: &'static str) -> Payment {
        self.highest.transaction += 1;
        let id = self.highest.transaction;
        let book = &mut self.branches[branch];
        book.move_money(txn_type, account, receiver, amount);
        let letter = match txn_type {
            TxnType::Deposit => 'D',
            TxnType::Withdrawal => 'W',
            TxnType::Transfer => 'T',
        };
        let ids = &book.accounts.ids;
        Payment {
            id,
            txn_type,
            account: ids[at(account)],
            related: receiver.map(|slot| ids[at(slot)]),
            amount,
            reference: format!("{letter}{id:012}"),
            description,
        }
    }

    /// Takes a recent payment back by one in the other direction. A reversal is not reversed again.
    fn reverse(&mut self, branch: usize) -> Option<Deed> {
        let original = self.branches[branch].take_reversible(&mut self.rng)?;
        let (txn_type, account, receiver) = match (original.txn_type, original.related) {
            (TxnType::Transfer, Some((receiver, _))) => (TxnType::Transfer, receiver, Some(original.account.0)),
            (TxnType::Withdrawal, _) => (TxnType::Deposit, original.account.0, None),
            (TxnType::Deposit | TxnType::Transfer, _) => (TxnType::Withdrawal, original.account.0, None),
        };
        let payment = self.payment(branch, txn_type, account, receiver, original.amount, "reversal");
        Some(Deed::Reverse { original: original.id, payment })
    }

    fn set_customer_status(&mut self, branch: usize) -> Option<Deed> {
        let slot = self.branches[branch].customers.pick(&mut self.rng)?;
        let active = self.branches[branch].customers.statuses[at(slot)] == Some(CustomerStatus::Active);
        if active && !self.percent(mix::SET_ASIDE_PERCENT) {
            return None;
        }
        let status = match (active, self.rng.random()) {
            (false, _) => CustomerStatus::Active,
            (true, false) => CustomerStatus::Inactive,
            (true, true) => CustomerStatus::Suspended,
        };
        let customers = &mut self.branches[branch].customers;
        customers.statuses[at(slot)] = Some(status);
        Some(Deed::SetCustomerStatus { customer: customers.ids[at(slot)], status })
    }

    fn set_account_status(&mut self, branch: usize) -> Option<Deed> {
        let slot = self.branches[branch].pick_in_use(&mut self.rng)?;
        let active = self.branches[branch].status_of(slot) == AccountStatus::Active;
        if active && !self.percent(mix::SET_ASIDE_PERCENT) {
            return None;
        }
        let (state, status) = if active { (State::Inactive, AccountStatus::Inactive) } else { (State::Active, AccountStatus::Active) };
        let accounts = &mut self.branches[branch].accounts;
        accounts.states[at(slot)] = state;
        Some(Deed::SetAccountStatus { account: accounts.ids[at(slot)], status })
    }

    /// Closes an account: what is left is paid out, what is owed is paid back, and then it goes.
    fn close(&mut self, branch: usize) -> Option<Deed> {
        let book = &self.branches[branch];
        if book.accounts.len() <= ACCOUNTS_KEPT {
            return None;
        }
        let slot = book.pick_in_use(&mut self.rng).filter(|slot| book.can_pay(*slot))?;
        let balance = book.accounts.balances[at(slot)];
        if balance == Money::ZERO {
            return Some(self.shut(branch, slot));
        }
        self.agenda.push_back((branch, Todo::Close { account: slot }));
        let (txn_type, amount) = if balance > Money::ZERO { (TxnType::Withdrawal, balance) } else { (TxnType::Deposit, -balance) };
        Some(Deed::Pay(self.payment(branch, txn_type, slot, None, amount, "account closed")))
    }

    fn shut(&mut self, branch: usize, slot: u32) -> Deed {
        let accounts = &mut self.branches[branch].accounts;
        accounts.remove(slot);
        Deed::CloseAccount { account: accounts.ids[at(slot)] }
    }

    fn percent(&mut self, chance: u32) -> bool {
        self.rng.random_range(0..100) < chance
    }
}

/// All that a customer owns and pays lies in one branch.
pub(super) fn branch_of(customer: i64) -> usize {
    usize::try_from(customer.rem_euclid(16)).expect("0 to 15: BRANCHES is 16")
}

#[cfg(test)]
mod tests;
