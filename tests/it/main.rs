//! The integration tests: one binary, real services, every test with its own database, topic prefix and bucket prefix.

mod house;

mod bank;
mod cdc;
mod dag;
mod dbt;
mod embedded_postgres;
mod kafka;
mod lake;
mod notify;
mod pipeline;
mod refresh;
mod s3;
mod warehouse;
