//! What was sent and is not yet acknowledged, in the order of the WAL. Pure but for the receipts, which the delivery
//! thread counts down.

use std::{collections::VecDeque, sync::Arc};

use crate::{change::Lsn, stream::producer::Receipt};

/// Batches in flight at most. Should one lane stand still while others move, this bounds what has to be remembered.
const PENDING_MAX: usize = 65_536;

/// What an acknowledged batch means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// A whole transaction is with the broker.
    Commit { committed_at_us: i64 },
    /// The position is written down: now the slot may be told.
    Position(Lsn),
    /// All rows of a chunk that was read again are with the broker.
    Chunk(u64),
    /// A message outside of transactions.
    Other,
}

/// Batches in the order they were sent; they leave in the same order.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    pending: VecDeque<(Arc<Receipt>, Meaning)>,
}

impl Ledger {
    pub(super) fn push(&mut self, receipt: Arc<Receipt>, meaning: Meaning) {
        self.pending.push_back((receipt, meaning));
    }

    /// What the oldest batch means, if every message of it is acknowledged.
    pub(super) fn pop_acked(&mut self) -> Option<Meaning> {
        let (_, meaning) = self.pending.pop_front_if(|(receipt, _)| receipt.is_acked())?;
        Some(meaning)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.pending.len() >= PENDING_MAX
    }
}
