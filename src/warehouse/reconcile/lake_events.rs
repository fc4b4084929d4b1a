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
    lsn: i64,
}

/// Changes as rows `(key, op, xid, lsn, cents)`. Tombstones and what is no change are left out; [`Encode`] of raw refuses or
/// keeps the latter by its own rules, and then the two differ.
#[derive(Debug, Clone, Copy)]
pub(super) struct Changes;

impl Encode for Changes {
    fn encode(&self, _: &CommitRecord, batch: &RecordBatch, rows: &mut Rows) {
        for value in lake::rows(batch).filter_map(|it| it.value) {
            let Ok(envelope) = serde_json::from_str::<Envelope<'_>>(value) else { continue };
            let Some(image) = (if envelope.op == "d" { envelope.before } else { envelope.after }) else { continue };
            rows.begin(5);
            rows.bigint(image.id);
            rows.text(envelope.op.as_bytes());
            match envelope.source.tx_id {
                Some(xid) => rows.bigint(xid),
                None => rows.null(),
            }
            rows.bigint(envelope.source.lsn);
            rows.bigint(image.balance.or(image.amount).unwrap_or_default().cents());
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
        for value in lake::rows(batch).filter_map(|it| it.value) {
            let Ok(boundary) = serde_json::from_str::<Boundary<'_>>(value) else { continue };
            let Some((xid, lsn)) = boundary.id.split_once(':').filter(|_| boundary.status == "END") else { continue };
            let (Ok(xid), Ok(lsn)) = (xid.parse(), lsn.parse()) else { continue };
            rows.begin(2);
            rows.bigint(xid);
            rows.bigint(lsn);
        }
    }
}
