//! The capture on a real PostgreSQL, into a broker.

mod accidents;
mod applying;
mod bytes;
mod connect;
mod contract;
mod crashes;
mod days;
#[cfg(feature = "stack")]
mod debezium;
#[cfg(feature = "stack")]
mod differential;
mod encrypted;
mod house;
mod network;
mod networks;
mod refusals;
mod rereading;
mod stops;
