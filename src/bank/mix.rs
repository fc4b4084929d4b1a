//! What happens how often, and for how much: the habits of the bank's customers.

use super::event::{AccountType, TxnType};
use crate::units::Money;

/// Below this many accounts every second event founds: customers come before payments.
pub(super) const FOUNDING_ACCOUNTS: usize = 100;

/// Of a hundred new customers, so many leave without an account; they are the ones who can be deleted.
pub(super) const WITHOUT_ACCOUNT_PERCENT: u32 = 10;

/// Of a hundred new accounts, so many are opened by mistake, never used, and deleted again.
pub(super) const BY_MISTAKE_PERCENT: u32 = 8;

/// An active account or customer that an event of status meets is set aside with this chance; one set aside always comes back.
/// So most are active at any time, however long the bank runs.
pub(super) const SET_ASIDE_PERCENT: u32 = 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Pay,
    Reverse,
    OpenCustomer,
    OpenAccount,
    MoveCustomer,
    SetCustomerStatus,
    SetAccountStatus,
    CloseAccount,
    DeleteAccount,
    DeleteCustomer,
}

/// Of a thousand draws; one that finds nobody fit is a payment after all. A customer who opens brings an account and its opening payment along, a closure its last payment.
const WEIGHTS: [(Kind, u32); 10] = [
    (Kind::Pay, 850),
    (Kind::Reverse, 12),
    (Kind::OpenCustomer, 22),
    (Kind::OpenAccount, 12),
    (Kind::MoveCustomer, 24),
    (Kind::SetCustomerStatus, 20),
    (Kind::SetAccountStatus, 20),
    (Kind::CloseAccount, 10),
    (Kind::DeleteAccount, 16),
    (Kind::DeleteCustomer, 14),
];

/// The kind at a place between 0 and 999.
pub(super) fn kind(mut place: u32) -> Kind {
    for (kind, weight) in WEIGHTS {
        if place < weight {
            return kind;
        }
        place -= weight;
    }
    Kind::Pay
}

/// The type of a new account, at a place between 0 and 99.
pub(super) fn account_type(place: u32) -> AccountType {
    match place {
        0..50 => AccountType::Checking,
        50..80 => AccountType::Savings,
        80..93 => AccountType::Credit,
        _ => AccountType::Loan,
    }
}

/// What an account of this type is used for, at a place between 0 and 99, and for how much in the median.
pub(super) fn habit(account_type: AccountType, place: u32) -> (TxnType, Money) {
    let (txn_type, dollars) = match (account_type, place) {
        (AccountType::Checking, 0..24) => (TxnType::Deposit, 900),
        (AccountType::Checking, 24..66) => (TxnType::Withdrawal, 60),
        (AccountType::Checking, _) => (TxnType::Transfer, 140),
        (AccountType::Savings, 0..50) => (TxnType::Deposit, 300),
        (AccountType::Savings, 50..65) => (TxnType::Withdrawal, 200),
        (AccountType::Savings, _) => (TxnType::Transfer, 250),
        (AccountType::Credit, 0..30) => (TxnType::Deposit, 220),
        (AccountType::Credit, 30..95) => (TxnType::Withdrawal, 85),
        (AccountType::Credit, _) => (TxnType::Transfer, 300),
        (AccountType::Loan, 0..90) => (TxnType::Deposit, 350),
        (AccountType::Loan, _) => (TxnType::Withdrawal, 2_500),
    };
    (txn_type, Money::from_cents(dollars * 100))
}

/// The opening payment: what savers bring, and what borrowers take.
pub(super) fn opening(account_type: AccountType) -> (TxnType, Money) {
    let (txn_type, dollars) = match account_type {
        AccountType::Checking => (TxnType::Deposit, 800),
        AccountType::Savings => (TxnType::Deposit, 2_000),
        AccountType::Credit => (TxnType::Withdrawal, 120),
        AccountType::Loan => (TxnType::Withdrawal, 9_000),
    };
    (txn_type, Money::from_cents(dollars * 100))
}

/// What stands on the statement.
pub(super) fn descriptions(txn_type: TxnType) -> &'static [&'static str] {
    match txn_type {
        TxnType::Deposit => &["salary", "cash deposit", "cheque", "refund", "pension", "tax return"],
        TxnType::Withdrawal => &["cash machine", "groceries", "fuel", "restaurant", "pharmacy", "travel", "insurance", "online shop"],
        TxnType::Transfer => &["rent", "standing order", "shared bill", "family", "savings plan", "invoice"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weights_add_up_to_a_thousand() {
        assert_eq!(WEIGHTS.iter().map(|(_, weight)| weight).sum::<u32>(), 1_000);
        assert_eq!((kind(0), kind(849), kind(850), kind(999)), (Kind::Pay, Kind::Pay, Kind::Reverse, Kind::DeleteCustomer));
    }
}
