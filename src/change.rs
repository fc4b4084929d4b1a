//! The words all data rooms share: where a change lies in the WAL, which table it belongs to, which topic carries it.
//!
//! Only words live here, never I/O.

use std::{fmt, str::FromStr};

/// A position in PostgreSQL's WAL. Orders as the server orders; prints as PostgreSQL prints it: `0/16B3748`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// Not an LSN as PostgreSQL prints it.
#[derive(Debug, thiserror::Error)]
#[error("not an LSN: {0:?}")]
pub struct NotAnLsn(String);

impl FromStr for Lsn {
    type Err = NotAnLsn;

    fn from_str(text: &str) -> Result<Self, NotAnLsn> {
        let refuse = || NotAnLsn(text.chars().take(40).collect());
        let (high, low) = text.split_once('/').ok_or_else(refuse)?;
        let part = |hex: &str| u32::from_str_radix(hex, 16).map_err(|_| refuse());
        Ok(Self(u64::from(part(high)?) << 32 | u64::from(part(low)?)))
    }
}

/// A captured table, with its schema: `public.customers`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId {
    pub schema: String,
    pub table: String,
}

impl fmt::Display for TableId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.schema, self.table)
    }
}

/// The bank's four tables, in the order in which rows refer to each other: parents first.
pub const BANK_TABLES: [&str; 4] = ["customers", "accounts", "transactions", "ledger_entries"];

/// The name under which the transaction topic lands in the lake and in `raw`.
pub const BOUNDARIES: &str = "boundaries";

/// How topics are named from the prefix (`cdc.topic_prefix`), and back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topics {
    prefix: String,
}

impl Topics {
    pub fn new(prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into() }
    }

    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// `bank.public.customers`. What Kafka does not allow in a name becomes `_`, as Debezium does it.
    pub fn table(&self, table: &TableId) -> String {
        let allowed = |it: char| it.is_ascii_alphanumeric() || matches!(it, '.' | '_' | '-');
        format!("{}.{}.{}", self.prefix, table.schema, table.table).replace(|it| !allowed(it), "_")
    }

    /// `bank.transaction`: BEGIN and END of each commit, in commit order; always one partition.
    pub fn boundaries(&self) -> String {
        format!("{}.transaction", self.prefix)
    }

    /// `__debezium-heartbeat.bank`.
    pub fn heartbeat(&self) -> String {
        format!("__debezium-heartbeat.{}", self.prefix)
    }

    /// `bank.dead_letters`: what could not be decoded, with reason and position.
    pub fn dead_letters(&self) -> String {
        format!("{}.dead_letters", self.prefix)
    }

    /// The name of a topic in the lake and in `raw`: `customers`, `boundaries`, `other_schema.table`.
    /// None for topics that do not land (heartbeats, dead letters, somebody else's).
    pub fn lake_name(&self, topic: &str) -> Option<String> {
        let rest = topic.strip_prefix(&self.prefix)?.strip_prefix('.')?;
        match rest.split_once('.') {
            None => (rest == "transaction").then(|| BOUNDARIES.to_owned()),
            Some(("public", table)) => Some(table.to_owned()),
            Some(_) => Some(rest.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lsn_reads_as_postgresql_prints_it() {
        let lsn: Lsn = "16/B374D848".parse().expect("valid");
        assert_eq!(lsn, Lsn(0x16_B374_D848));
        assert_eq!(lsn.to_string(), "16/B374D848");
        assert!("16".parse::<Lsn>().is_err());
    }

    #[test]
    fn topics_name_their_tables_and_back() {
        let topics = Topics::new("bank");
        let customers = TableId { schema: "public".into(), table: "customers".into() };
        assert_eq!(topics.table(&customers), "bank.public.customers");
        assert_eq!(topics.table(&TableId { schema: "public".into(), table: "Mixed Case".into() }), "bank.public.Mixed_Case");
        assert_eq!(topics.lake_name("bank.public.customers").as_deref(), Some("customers"));
        assert_eq!(topics.lake_name("bank.audit.events").as_deref(), Some("audit.events"));
        assert_eq!(topics.lake_name("bank.transaction").as_deref(), Some("boundaries"));
        assert_eq!(topics.lake_name("bank.dead_letters"), None);
        assert_eq!(topics.lake_name("__debezium-heartbeat.bank"), None);
    }
}
