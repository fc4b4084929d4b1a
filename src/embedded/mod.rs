//! One-machine services behind the same protocols; no room above knows they exist.

pub mod kafka;
