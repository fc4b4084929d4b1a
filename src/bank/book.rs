//! What the planner knows of one branch: who may pay, and how much. A few bytes an account, however long its history.
//!
//! Struct of arrays with stable slots: a closed or deleted account frees its slot, the next one takes it.

use std::collections::VecDeque;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::event::{AccountStatus, AccountType, CustomerStatus, TxnType};
use crate::units::Money;

/// Lists of candidates for rare events are no longer than this; who falls off is merely no candidate any more.
const CANDIDATES_MAX: usize = 64;

/// How often a random pick is repeated until it meets somebody fit; then the event is another one.
const PICKS_MAX: usize = 24;

#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Branch {
    pub(super) accounts: Accounts,
    pub(super) customers: Customers,
    /// Payments that may still be reversed, newest last.
    recent: VecDeque<Recent>,
    /// Accounts opened by mistake.
    unused: VecDeque<u32>,
    /// Customers without accounts.
    strangers: VecDeque<u32>,
}

/// An account's state in the plan. `Unused` waits to be deleted and takes no part in payments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Gone,
    Active,
    Inactive,
    Unused,
}

#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Accounts {
    pub(super) ids: Vec<i64>,
    pub(super) owners: Vec<u32>,
    pub(super) balances: Vec<Money>,
    pub(super) types: Vec<AccountType>,
    pub(super) states: Vec<State>,
    free: Vec<u32>,
}

#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Customers {
    pub(super) ids: Vec<i64>,
    /// None: gone.
    pub(super) statuses: Vec<Option<CustomerStatus>>,
    /// Rows in `accounts`, closed ones too: they keep their customer from being deleted.
    pub(super) account_rows: Vec<u32>,
    free: Vec<u32>,
}

/// A payment as its reversal needs it. Slots are valid only while they still hold these ids.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Recent {
    pub(super) id: i64,
    pub(super) txn_type: TxnType,
    pub(super) account: (u32, i64),
    pub(super) related: Option<(u32, i64)>,
    pub(super) amount: Money,
}

/// A slot as an index. Slots come from lengths of vectors that never reach 2³².
pub(super) fn at(slot: u32) -> usize {
    usize::try_from(slot).expect("a usize holds 32 bits")
}

fn slot_of(index: usize) -> u32 {
    u32::try_from(index).expect("a branch has fewer than 2³² accounts")
}

impl Accounts {
    pub(super) fn add(&mut self, id: i64, owner: u32, account_type: AccountType, state: State, balance: Money) -> u32 {
        if let Some(slot) = self.free.pop() {
            let index = at(slot);
            (self.ids[index], self.owners[index], self.types[index], self.states[index], self.balances[index]) = (id, owner, account_type, state, balance);
            return slot;
        }
        self.ids.push(id);
        self.owners.push(owner);
        self.types.push(account_type);
        self.states.push(state);
        self.balances.push(balance);
        slot_of(self.ids.len() - 1)
    }

    pub(super) fn remove(&mut self, slot: u32) {
        self.states[at(slot)] = State::Gone;
        self.free.push(slot);
    }

    /// How many are open.
    pub(super) fn len(&self) -> usize {
        self.ids.len() - self.free.len()
    }

    /// What may still be taken from the account.
    pub(super) fn funds(&self, slot: u32) -> Money {
        self.balances[at(slot)] - self.types[at(slot)].floor()
    }
}

impl Customers {
    pub(super) fn add(&mut self, id: i64, status: CustomerStatus, account_rows: u32) -> u32 {
        if let Some(slot) = self.free.pop() {
            let index = at(slot);
            (self.ids[index], self.statuses[index], self.account_rows[index]) = (id, Some(status), account_rows);
            return slot;
        }
        self.ids.push(id);
        self.statuses.push(Some(status));
        self.account_rows.push(account_rows);
        slot_of(self.ids.len() - 1)
    }

    fn remove(&mut self, slot: u32) {
        self.statuses[at(slot)] = None;
        self.free.push(slot);
    }

    /// While a bank is read in the order of its ids: the slot of a customer.
    pub(super) fn slot_by_id(&self, id: i64) -> Option<u32> {
        self.ids.binary_search(&id).ok().map(slot_of)
    }

    pub(super) fn pick(&self, rng: &mut ChaCha8Rng) -> Option<u32> {
        pick(rng, self.ids.len(), |slot| self.statuses[at(slot)].is_some())
    }
}

impl Branch {
    /// Whether the account may pay and be paid: active, and its customer too.
    pub(super) fn can_pay(&self, slot: u32) -> bool {
        let accounts = &self.accounts;
        accounts.states[at(slot)] == State::Active && self.customers.statuses[at(accounts.owners[at(slot)])] == Some(CustomerStatus::Active)
    }

    /// Some account that can pay: the older ones far more often, as in life a few accounts do most of the business.
    pub(super) fn pick_payer(&self, rng: &mut ChaCha8Rng) -> Option<u32> {
        pick_skewed(rng, self.accounts.ids.len(), |slot| self.can_pay(slot))
    }

    pub(super) fn pick_receiver(&self, rng: &mut ChaCha8Rng, payer: u32) -> Option<u32> {
        pick_skewed(rng, self.accounts.ids.len(), |slot| slot != payer && self.can_pay(slot))
    }

    /// Any open account that is in use, with the same chance for each.
    pub(super) fn pick_in_use(&self, rng: &mut ChaCha8Rng) -> Option<u32> {
        pick(rng, self.accounts.ids.len(), |slot| matches!(self.accounts.states[at(slot)], State::Active | State::Inactive))
    }

    pub(super) fn status_of(&self, slot: u32) -> AccountStatus {
        if self.accounts.states[at(slot)] == State::Inactive { AccountStatus::Inactive } else { AccountStatus::Active }
    }

    /// Books a payment. The planner has seen to it that the funds suffice.
    pub(super) fn move_money(&mut self, txn_type: TxnType, account: u32, related: Option<u32>, amount: Money) {
        let balances = &mut self.accounts.balances;
        balances[at(account)] += if txn_type == TxnType::Deposit { amount } else { -amount };
        if let Some(receiver) = related {
            balances[at(receiver)] += amount;
        }
    }

    pub(super) fn remember(&mut self, payment: Recent) {
        push_capped(&mut self.recent, payment);
    }

    /// A payment that can be reversed now: both accounts still there and active, and the money still on the side it went to.
    pub(super) fn take_reversible(&mut self, rng: &mut ChaCha8Rng) -> Option<Recent> {
        if self.recent.is_empty() {
            return None;
        }
        let payment = self.recent.remove(rng.random_range(0..self.recent.len()))?;
        let holds = |(slot, id): (u32, i64)| self.accounts.ids[at(slot)] == id && self.can_pay(slot);
        let giver = match payment.txn_type {
            TxnType::Deposit => Some(payment.account.0),
            TxnType::Withdrawal => None,
            TxnType::Transfer => payment.related.map(|(slot, _)| slot),
        };
        let possible = holds(payment.account) && payment.related.is_none_or(holds) && giver.is_none_or(|slot| self.accounts.funds(slot) >= payment.amount);
        possible.then_some(payment)
    }

    pub(super) fn note_unused(&mut self, slot: u32) {
        push_capped(&mut self.unused, slot);
    }

    /// Takes an account opened by mistake out of the book; its id.
    pub(super) fn delete_unused(&mut self) -> Option<i64> {
        let slot = self.unused.pop_front()?;
        let owner = self.accounts.owners[at(slot)];
        self.accounts.remove(slot);
        self.customers.account_rows[at(owner)] -= 1;
        if self.customers.account_rows[at(owner)] == 0 {
            self.note_stranger(owner);
        }
        Some(self.accounts.ids[at(slot)])
    }

    pub(super) fn note_stranger(&mut self, slot: u32) {
        push_capped(&mut self.strangers, slot);
    }

    /// Takes a customer without accounts out of the book; the id.
    pub(super) fn delete_stranger(&mut self) -> Option<i64> {
        let customers = &mut self.customers;
        while let Some(slot) = self.strangers.pop_front() {
            // Somebody may have opened an account since.
            if customers.statuses[at(slot)].is_some() && customers.account_rows[at(slot)] == 0 {
                customers.remove(slot);
                // A customer can stand in the list twice; the slot must not be freed twice.
                self.strangers.retain(|it| *it != slot);
                return Some(customers.ids[at(slot)]);
            }
        }
        None
    }
}

fn push_capped<T>(list: &mut VecDeque<T>, item: T) {
    if list.len() == CANDIDATES_MAX {
        list.pop_front();
    }
    list.push_back(item);
}

fn pick(rng: &mut ChaCha8Rng, slots: usize, fit: impl Fn(u32) -> bool) -> Option<u32> {
    let slots = u64::try_from(slots).unwrap_or(u64::MAX);
    (0..PICKS_MAX).map(|_| scaled(u64::from(rng.random::<u32>()), slots)).find(|slot| slots > 0 && fit(*slot))
}

/// As [`pick`], by the cube of a random number: of a hundred accounts the first has 21 payments in a hundred.
fn pick_skewed(rng: &mut ChaCha8Rng, slots: usize, fit: impl Fn(u32) -> bool) -> Option<u32> {
    let slots = u64::try_from(slots).unwrap_or(u64::MAX);
    (0..PICKS_MAX)
        .map(|_| {
            let lot = u64::from(rng.random::<u32>());
            scaled((((lot * lot) >> 32) * lot) >> 32, slots)
        })
        .find(|slot| slots > 0 && fit(*slot))
}

/// A fraction of 2³², of so many slots.
fn scaled(fraction: u64, slots: u64) -> u32 {
    u32::try_from((fraction * slots) >> 32).expect("less than the number of slots, which is below 2³²")
}
