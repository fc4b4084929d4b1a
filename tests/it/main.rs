//! The integration tests: one binary, real services, every test with its own database, topic prefix and bucket prefix.

#[cfg(test)]
mod dag;
mod dbt;
mod kafka;
mod lake;
#[cfg(test)]
mod notify;
#[cfg(test)]
mod refresh;
mod s3;
mod warehouse;
