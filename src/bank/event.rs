//! What can happen in the bank, as the plan says it and the database hears it.

use chrono::{DateTime, NaiveDate, Utc};
use serde::Serialize;

use crate::units::Money;

/// One business event: one database transaction.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Event {
    /// Grows by one with each event; by it the database knows a correction that it has already made.
    pub(super) number: i64,
    /// The part of the bank it happens in. Events of one branch are done in order; those of different branches share no row.
    #[serde(skip)]
    pub(super) branch: usize,
    /// Business time.
    pub(super) at: DateTime<Utc>,
    #[serde(flatten)]
    pub(super) deed: Deed,
}

/// The names of variants and fields are those of `bank.event` in `schema.sql`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(super) enum Deed {
    OpenCustomer(Person),
    OpenAccount {
        id: i64,
        account_number: String,
        customer: i64,
        account_type: AccountType,
        currency: &'static str,
        interest_rate: Money,
    },
    Pay(Payment),
    Reverse {
        original: i64,
        #[serde(flatten)]
        payment: Payment,
    },
    MoveCustomer {
        customer: i64,
        address: String,
        phone: String,
    },
    SetCustomerStatus {
        customer: i64,
        status: CustomerStatus,
    },
    SetAccountStatus {
        account: i64,
        status: AccountStatus,
    },
    CloseAccount {
        account: i64,
    },
    DeleteAccount {
        account: i64,
    },
    DeleteCustomer {
        customer: i64,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Person {
    pub(super) id: i64,
    pub(super) first_name: String,
    pub(super) last_name: String,
    pub(super) email: String,
    pub(super) phone: String,
    pub(super) date_of_birth: NaiveDate,
    pub(super) address: String,
}

/// Money from `account` (withdrawal, transfer) or to it (deposit); `related` is the receiver of a transfer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Payment {
    pub(super) id: i64,
    pub(super) txn_type: TxnType,
    pub(super) account: i64,
    pub(super) related: Option<i64>,
    pub(super) amount: Money,
    pub(super) reference: String,
    pub(super) description: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum TxnType {
    Deposit,
    Withdrawal,
    Transfer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum AccountType {
    Savings,
    Checking,
    Credit,
    Loan,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum AccountStatus {
    Active,
    Inactive,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum CustomerStatus {
    Active,
    Inactive,
    Suspended,
}

impl AccountType {
    /// As low as the balance may go; `accounts_funds` in `schema.sql` says the same.
    pub(super) fn floor(self) -> Money {
        match self {
            Self::Savings | Self::Checking => Money::ZERO,
            Self::Credit => Money::from_cents(-500_000),
            Self::Loan => Money::from_cents(-5_000_000),
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "SAVINGS" => Self::Savings,
            "CHECKING" => Self::Checking,
            "CREDIT" => Self::Credit,
            "LOAN" => Self::Loan,
            _ => return None,
        })
    }
}

impl Deed {
    /// Whether it posts a row of `transactions`.
    pub(super) fn is_payment(&self) -> bool {
        matches!(self, Self::Pay(_) | Self::Reverse { .. })
    }

    /// Rows it updates: the balances it moves, the original it marks, what it corrects.
    pub(super) fn rows_updated(&self) -> u64 {
        let balances = |payment: &Payment| 1 + u64::from(payment.related.is_some());
        match self {
            Self::Pay(payment) => balances(payment),
            Self::Reverse { payment, .. } => 1 + balances(payment),
            Self::MoveCustomer { .. } | Self::SetCustomerStatus { .. } | Self::SetAccountStatus { .. } | Self::CloseAccount { .. } => 1,
            Self::OpenCustomer(_) | Self::OpenAccount { .. } | Self::DeleteAccount { .. } | Self::DeleteCustomer { .. } => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_written_with_the_fields_the_database_reads() {
        let payment = Payment {
            id: 7,
            txn_type: TxnType::Transfer,
            account: 1,
            related: Some(2),
            amount: Money::from_cents(1250),
            reference: "T7".into(),
            description: "rent",
        };
        let event = Event { number: 9, branch: 3, at: DateTime::UNIX_EPOCH, deed: Deed::Reverse { original: 5, payment } };
        assert_eq!(
            serde_json::to_string(&event).expect("plain data"),
            r#"{"number":9,"at":"1970-01-01T00:00:00Z","kind":"reverse","original":5,"id":7,"txn_type":"TRANSFER","account":1,"related":2,"amount":"12.50","reference":"T7","description":"rent"}"#
        );
    }
}
