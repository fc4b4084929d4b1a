//! The capture on a real PostgreSQL, into a broker.

mod accidents;
mod applying;
mod bytes;
mod clocks;
mod connect;
mod contract;
mod crashes;
mod days;
#[cfg(feature = "stack")]
mod debezium;
#[cfg(feature = "stack")]
mod differential;
pub(crate) mod encrypted;
mod failover;
mod house;
mod malformed;
mod network;
mod networks;
mod refusals;
mod rereading;
mod snapshots;
mod stops;
