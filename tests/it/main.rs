//! The integration tests: one binary, real services, every test with its own database, topic prefix and bucket prefix.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the message, in its helpers as well")]

mod binary;
mod house;
mod lane;

mod bad_days;
mod bank;
mod cdc;
mod console;
mod dag;
mod dbt;
mod embedded_postgres;
mod kafka;
mod lake;
mod notify;
mod pipeline;
#[cfg(feature = "stack")]
mod real_days;
mod refresh;
mod s3;
mod tidy;
mod warehouse;
