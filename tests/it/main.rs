//! The integration tests: one binary, real services, every test with its own database, topic prefix and bucket prefix.

mod cdc;
mod kafka;
