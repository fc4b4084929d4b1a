//! What the lake says, told to the warehouse: each change of an object as one narrow row, parsed here and not by PostgreSQL,
//! so that the lake and raw are two witnesses.

use std::borrow::Cow;

use arrow_array::RecordBatch;
use serde::Deserialize;

use crate::{
    lake::{self, log::CommitRecord},
    units::Money,
    warehouse::pour::{Encode, Rows},
};

/// The part of a change that counts here.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    op: Cow<'a, str>,
    before: Option<Image>,
    after: Option<Image>,
    source: Origin,
}

#[derive(Deserialize)]
struct Image {
    id: i64,
    balance: Option<Money>,
    amount: Option<Money>,
}

#[derive(Deserialize)]
struct Origin {
    #[serde(rename = "txId")]
    tx_id: Option<i64>,
    lsn: Option<i64>,
}

/// As `op`: read again by an incremental snapshot, which tells neither LSN nor transaction. It stands before all else that is known.
pub(super) const READ_AGAIN: &str = "again";

/// What a record says that counts here.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) key: i64,
    pub(super) op: String,
    pub(super) xid: Option<i64>,
    pub(super) lsn: i64,
    pub(super) cents: i64,
}

/// A change; None where the record is none.
pub(super) fn change(value: &str) -> Option<Told> {
    let envelope = serde_json::from_str::<Envelope<'_>>(value).ok()?;
    let image = (if envelope.op == "d" { envelope.before } else { envelope.after })?;
    let cents = image.balance.or(image.amount).unwrap_or_default().cents();
    let (op, lsn) = match (&*envelope.op, envelope.source.lsn) {
        ("r", None) => (READ_AGAIN.to_owned(), 0),
        (op, lsn) => (op.to_owned(), lsn?),
    };
    Some(Told { key: image.id, op, xid: envelope.source.tx_id, lsn, cents })
}

/// The end of a transaction; its number is the key.
pub(super) fn end(value: &str) -> Option<Told> {
    let boundary = serde_json::from_str::<Boundary<'_>>(value).ok()?;
    let (xid, lsn) = boundary.id.split_once(':').filter(|_| boundary.status == "END")?;
    let (xid, lsn) = (xid.parse().ok()?, lsn.parse().ok()?);
    Some(Told { key: xid, op: String::new(), xid: Some(xid), lsn, cents: 0 })
}

/// Changes as rows `(key, op, xid, lsn, cents)`. Tombstones and what is no change are left out; [`Encode`] of raw refuses or
/// keeps the latter by its own rules, and then the two differ.
#[derive(Debug, Clone, Copy)]
pub(super) struct Changes;

impl Encode for Changes {
    fn encode(&self, _: &CommitRecord, batch: &RecordBatch, rows: &mut Rows) {
        for told in lake::rows(batch).filter_map(|it| it.value).filter_map(change) {
            rows.begin(5);
            rows.bigint(told.key);
            rows.text(told.op.as_bytes());
            match told.xid {
                Some(xid) => rows.bigint(xid),
                None => rows.null(),
            }
            rows.bigint(told.lsn);
            rows.bigint(told.cents);
        }
    }
}

/// BEGIN or END of a transaction.
#[derive(Deserialize)]
struct Boundary<'a> {
    #[serde(borrow)]
    status: Cow<'a, str>,
    #[serde(borrow)]
    id: Cow<'a, str>,
}

/// Ends of transactions as rows `(xid, lsn)`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends;

impl Encode for Ends {
    fn encode(&self, _: &CommitRecord, batch: &RecordBatch, rows: &mut Rows) {
        for told in lake::rows(batch).filter_map(|it| it.value).filter_map(end) {
            rows.begin(2);
            rows.bigint(told.key);
            rows.bigint(told.lsn);
        }
    }
}
