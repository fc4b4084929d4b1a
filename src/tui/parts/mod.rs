//! What screens are made of. These know ratatui, not the bank.

pub(super) mod frame;
pub(super) mod number;
pub(super) mod row;
pub(super) mod spark;
