//! The integration tests: one binary, real services, every test with its own database, topic prefix and bucket prefix.
mod lake;
mod embedded_postgres;
mod s3;

mod bank;


mod dag;

mod cdc;
#[cfg(test)]
mod notify;

mod dbt;

mod kafka;

mod dbt;
mod kafka;
mod lake;
#[cfg(test)]
mod notify;
#[cfg(test)]
mod refresh;
mod s3;
mod warehouse;
mod cdc;
mod kafka;
