use std::collections::HashMap;

use chrono::TimeDelta;
use proptest::prelude::*;

use super::*;
use crate::bank::Goal;

/// The bank as its database would hold it, with the database's rules.
#[derive(Debug, Default)]
struct Ledger {
    customers: HashMap<i64, i64>,
    accounts: HashMap<i64, Account>,
    /// Debit, credit, and whether reversed.
    transactions: HashMap<i64, (Money, Money, bool)>,
}

#[derive(Debug)]
struct Account {
    customer: i64,
    account_type: AccountType,
    balance: Money,
    active: bool,
    closed: bool,
    used: bool,
}

impl Ledger {
    fn happen(&mut self, event: &Event) {
        match &event.deed {
            Deed::OpenCustomer(person) => assert_eq!(self.customers.insert(person.id, 0), None),
            Deed::OpenAccount { id, customer, account_type, .. } => {
                *self.customers.get_mut(customer).expect("its customer") += 1;
                let account = Account { customer: *customer, account_type: *account_type, balance: Money::ZERO, active: true, closed: false, used: false };
                assert!(self.accounts.insert(*id, account).is_none());
            }
            Deed::Pay(payment) => self.pay(payment, event.branch),
            Deed::Reverse { original, payment } => {
                self.pay(payment, event.branch);
                let original = self.transactions.get_mut(original).expect("the original");
                assert_eq!((original.0, original.2), (payment.amount, false));
                original.2 = true;
            }
            Deed::MoveCustomer { customer, .. } | Deed::SetCustomerStatus { customer, .. } => assert!(self.customers.contains_key(customer)),
            Deed::SetAccountStatus { account, status } => {
                let account = self.accounts.get_mut(account).expect("the account");
                assert!(!account.closed && account.active != (*status == AccountStatus::Active));
                account.active = *status == AccountStatus::Active;
            }
            Deed::CloseAccount { account } => {
                let account = self.accounts.get_mut(account).expect("the account");
                assert!(!account.closed && account.balance == Money::ZERO);
                account.closed = true;
            }
            Deed::DeleteAccount { account } => {
                let account = self.accounts.remove(account).expect("the account");
                assert!(!account.used);
                *self.customers.get_mut(&account.customer).expect("its customer") -= 1;
            }
            Deed::DeleteCustomer { customer } => assert_eq!(self.customers.remove(customer), Some(0)),
        }
    }

    fn pay(&mut self, payment: &Payment, branch: usize) {
        assert!(payment.amount > Money::ZERO);
        assert_eq!(payment.txn_type == TxnType::Transfer, payment.related.is_some());
        assert_ne!(Some(payment.account), payment.related);
        let (debited, credited) = match payment.txn_type {
            TxnType::Deposit => (Some(payment.account), payment.related),
            TxnType::Withdrawal | TxnType::Transfer => (payment.related, Some(payment.account)),
        };
        self.enter(debited, payment.amount, branch);
        self.enter(credited, -payment.amount, branch);
        assert!(self.transactions.insert(payment.id, (payment.amount, payment.amount, false)).is_none());
    }

    fn enter(&mut self, account: Option<i64>, amount: Money, branch: usize) {
        let Some(account) = account.map(|id| self.accounts.get_mut(&id).expect("the account")) else { return };
        assert_eq!(branch_of(account.customer), branch, "an event touches one branch only");
        assert!(account.active && !account.closed);
        account.balance += amount;
        account.used = true;
        assert!(account.balance >= account.account_type.floor());
    }
}

fn noon() -> DateTime<Utc> {
    "2026-11-22T12:00:00Z".parse().expect("a time")
}

fn planner(seed: u64) -> Planner {
    Planner::new(seed, Highest::default(), Clock::of_a_new_bank(Goal::Transactions(1_000), TimeDelta::days(30), noon()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_is_planned_the_database_can_accept(seed in any::<u64>(), events in 1_usize..6_000) {
        let (mut plan, mut ledger) = (planner(seed), Ledger::default());
        for _ in 0..events {
            ledger.happen(&plan.next(noon(), Wanted::Anything));
        }
        let debit: Money = ledger.transactions.values().map(|it| it.0).sum();
        let credit: Money = ledger.transactions.values().map(|it| it.1).sum();
        prop_assert_eq!(debit, credit);
        let open = ledger.accounts.values().filter(|it| !it.closed).count();
        prop_assert_eq!(plan.branches.iter().map(|it| it.accounts.len()).sum::<usize>(), open);
    }

    #[test]
    fn the_same_seed_is_the_same_bank(seed in any::<u64>()) {
        let (mut one, mut other) = (planner(seed), planner(seed));
        for _ in 0..500 {
            prop_assert_eq!(one.next(noon(), Wanted::Anything), other.next(noon(), Wanted::Anything));
        }
    }

    #[test]
    fn a_step_finds_a_payment_at_once_or_after_founding(seed in any::<u64>(), before in 0_usize..300) {
        let mut plan = planner(seed);
        for _ in 0..before {
            plan.next(noon(), Wanted::Anything);
        }
        let events = (1..10).find(|_| plan.next(noon(), Wanted::Payment).deed.is_payment());
        prop_assert!(events.is_some());
    }
}

#[test]
fn a_thousand_payments_bring_everything_that_can_happen() {
    let (mut plan, mut ledger) = (planner(42), Ledger::default());
    let mut kinds = HashMap::new();
    let mut payments = 0;
    while payments < 1_000 {
        let event = plan.next(noon(), Wanted::Anything);
        payments += i32::from(event.deed.is_payment());
        let kind = serde_json::to_value(&event).expect("plain data")["kind"].as_str().expect("a word").to_owned();
        *kinds.entry(kind).or_insert(0) += 1;
        ledger.happen(&event);
    }
    assert_eq!(kinds.len(), 10, "{kinds:?}");
    assert!((100..300).contains(&ledger.accounts.len()), "{}", ledger.accounts.len());
    assert!(ledger.transactions.values().any(|it| it.2));
}

#[test]
fn an_account_costs_a_few_bytes_however_long_its_history() {
    let mut plan = planner(1);
    for _ in 0..50_000 {
        plan.next(noon(), Wanted::Anything);
    }
    let before: usize = plan.branches.iter().map(|it| it.accounts.ids.len()).sum();
    // Payments alone leave nothing behind.
    for _ in 0..50_000 {
        plan.next(noon(), Wanted::Payment);
    }
    assert_eq!(plan.branches.iter().map(|it| it.accounts.ids.len()).sum::<usize>(), before);
}
