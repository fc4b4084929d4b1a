//! How we speak Kafka. No stage lives here: `cdc` owns a producer, `lake` owns a consumer.

use std::{fmt, num::NonZeroU32, path::PathBuf, sync::Arc};

use bytes::Bytes;

mod access;
pub mod consumer;
pub mod follow;
pub mod producer;
pub mod range;
pub mod records;
pub mod topics;

pub use access::{Access, Hearing, Mechanism, Protocol, Refusal, Unusable};

/// Settings of the stream, `[stream]` in `config.toml`. The password comes from `LEDGERLINE__STREAM__SASL_PASSWORD`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `"embedded"` starts our own broker; anything else is a list of `host:port`.
    pub bootstrap_servers: String,
    /// Partitions of each table's topic when we create it. The transaction topic always has one: its order is the order of commits.
    pub partitions: NonZeroU32,
    /// Replicas of each topic when we create it; 0 is what the brokers' `default.replication.factor` says.
    pub replication_factor: u16,
    /// How clients reach the brokers' listener, as Kafka calls it.
    pub security_protocol: Protocol,
    /// How they sign in, where the protocol is one with SASL.
    pub sasl_mechanism: Mechanism,
    pub sasl_username: String,
    /// The authorities whose signature a broker's certificate must have, as PEM; empty are the system's.
    pub ca_file: PathBuf,
    /// Our own certificate and its key, as PEM, for brokers that ask for one; empty shows them none.
    pub certificate_file: PathBuf,
    pub key_file: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            bootstrap_servers: "embedded".to_owned(),
            partitions: NonZeroU32::MIN,
            replication_factor: 0,
            security_protocol: Protocol::default(),
            sasl_mechanism: Mechanism::default(),
            sasl_username: String::new(),
            ca_file: PathBuf::new(),
            certificate_file: PathBuf::new(),
            key_file: PathBuf::new(),
        }
    }
}

/// A topic and one of its partitions: the unit of order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lane {
    pub topic: Arc<str>,
    pub partition: i32,
}

impl fmt::Display for Lane {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}[{}]", self.topic, self.partition)
    }
}

/// One Kafka message as it lies in the log. `value` is None for a tombstone.
#[derive(Debug, Clone)]
pub struct Record {
    pub lane: Lane,
    pub offset: i64,
    /// Kafka's timestamp, milliseconds since 1970 UTC.
    pub timestamp_ms: i64,
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
}
