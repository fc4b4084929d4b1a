//! The integration tests: one binary, real services, every test with its own database, topic prefix and bucket prefix.

#[cfg(test)]
mod dag;
#[cfg(test)]
mod notify;
mod kafka;
mod lake;
mod s3;
mod dbt;
