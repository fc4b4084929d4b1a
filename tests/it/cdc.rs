//! The capture on a real PostgreSQL, into a broker in memory.

mod applying;
mod bytes;
mod contract;
mod days;
mod house;
mod refusals;
