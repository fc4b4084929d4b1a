//! The settings of the connector we register: the one place where they are written, with the reason of each.
//!
//! They make Debezium write what the native engine writes (topics, envelope, decimals, tombstones, boundaries), so that nothing
//! downstream knows which engine runs.

use std::collections::BTreeSet;

use serde_json::Value;

use super::rest::{Rest, Settings};
use crate::{
    cdc::{CLEAR_PASSWORD, Config, SnapshotMode, error::Error, source::Source},
    change::TableId,
    stream::producer::MESSAGE_BYTES_MAX,
};

pub(in crate::cdc) const CLASS: &str = "io.debezium.connector.postgresql.PostgresConnector";

/// 3.6 loses rows of a COPY when it is stopped in the middle (dbz#1554).
const VERSION_MIN: (u32, u32, u32) = (3, 7, 0);

/// The prefix of the logical message that moves the slot while the captured tables are quiet. It never reaches a topic.
pub(super) const HEARTBEAT_MESSAGE: &str = "ledgerline.heartbeat";

/// What may not differ in a connector that is to be ours: it would be somebody else's stream.
const IDENTITY: [&str; 4] = ["connector.class", "topic.prefix", "slot.name", "database.dbname"];

/// The connector's name: offsets are kept under it and the topic prefix, and one Kafka cluster has one of each.
pub(in crate::cdc) fn connector_name(config: &Config) -> &str {
    &config.topic_prefix
}

/// A transaction of its own with nothing for any table in it: its COMMIT is a position that can be confirmed.
pub(super) fn heartbeat_statement() -> String {
    format!("select pg_logical_emit_message(true, '{HEARTBEAT_MESSAGE}', '')")
}

/// What Connect is to be told. `tables` is exactly what the publication holds of `cdc.tables`.
pub(super) fn wanted(config: &Config, source: &Source, tables: &BTreeSet<TableId>) -> Result<Settings, Error> {
    const JSON: &str = "org.apache.kafka.connect.json.JsonConverter";
    let (host, port) = address(config, source)?;
    let heartbeat_ms = config.heartbeat.as_millis().to_string();
    let include = tables.iter().map(|it| format!("{}\\.{}", quoted(&it.schema), quoted(&it.table))).collect::<Vec<_>>().join(",");
    let (snapshot, metadata) = (snapshot_mode(config.snapshot), config.transaction_metadata.to_string());
    let extended_headers = config.extended_headers.to_string();
    let (request_bytes, action) = (MESSAGE_BYTES_MAX.to_string(), heartbeat_statement());
    let mut settings: Settings = [
        ("connector.class", CLASS),
        ("tasks.max", "1"),
        ("database.hostname", &host),
        ("database.port", &port),
        ("database.user", source.user()),
        ("database.dbname", &source.database),
        ("topic.prefix", &config.topic_prefix),
        ("table.include.list", &include),
        ("plugin.name", "pgoutput"),
        ("slot.name", &config.slot),
        // A walsender that lost its client is noticed late; then the slot is busy for a while.
        ("slot.max.retries", "60"),
        ("slot.retry.delay.ms", "2000"),
        ("publication.name", &config.publication),
        // We make it, for exactly the captured tables; Debezium's own is extended only when its task starts.
        ("publication.autocreate.mode", "disabled"),
        ("snapshot.mode", snapshot),
        // A slot that is further than the offsets was moved or made anew by somebody: that is a gap, not a detail.
        ("offset.mismatch.strategy", "trust_offset"),
        ("decimal.handling.mode", "string"),
        ("tombstones.on.delete", "true"),
        ("provide.transaction.metadata", &metadata),
        ("skipped.operations", config.skipped_operations.as_str()),
        ("extended.headers.enabled", &extended_headers),
        ("heartbeat.interval.ms", &heartbeat_ms),
        // Without a commit in its own database the slot would hold back the WAL of all others.
        ("heartbeat.action.query", &action),
        ("message.prefix.exclude.list", "ledgerline\\.heartbeat"),
        ("poll.interval.ms", "50"),
        ("retriable.restart.connector.wait.ms", "2000"),
        ("key.converter", JSON),
        ("key.converter.schemas.enable", "false"),
        ("value.converter", JSON),
        ("value.converter.schemas.enable", "false"),
        // Otherwise a NULL comes out as the column's default.
        ("value.converter.replace.null.with.default", "false"),
        // The topics are ours; these are for one that somebody deleted meanwhile.
        ("topic.creation.default.partitions", "1"),
        ("topic.creation.default.replication.factor", "-1"),
        ("producer.override.compression.type", "lz4"),
        // Connect's own limit of 1 MiB fails the task at the first larger row.
        ("producer.override.max.request.size", &request_bytes),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), Value::from(value)))
    .collect();
    // What is Debezium's default is left out.
    if source.sslmode() != "prefer" {
        settings.insert("database.sslmode".to_owned(), source.sslmode().into());
    }
    // The worker looks for the file at the same place.
    if let Some(authority) = source.authority() {
        settings.insert("database.sslrootcert".to_owned(), authority.display().to_string().into());
    }
    // Connect keeps its settings in a topic and shows them to whoever asks, so it gets a reference; in clear only where that is
    // written out.
    if source.has_password() {
        let password = if config.database_password == CLEAR_PASSWORD { source.password().reveal() } else { &config.database_password };
        settings.insert("database.password".to_owned(), password.into());
    }
    Ok(settings)
}

/// The names of the settings that differ; both directions, so that what somebody added by hand is found too.
pub(super) fn differences(found: &Settings, wanted: &Settings) -> Vec<String> {
    let names: BTreeSet<&String> = found.keys().chain(wanted.keys()).filter(|it| *it != "name").collect();
    names.into_iter().filter(|it| found.get(*it) != wanted.get(*it)).cloned().collect()
}

/// Refuses a connector of that name which streams something else.
pub(in crate::cdc) fn require_ours(config: &Config, source: &Source, found: &Settings) -> Result<(), Error> {
    let wanted = [CLASS, &config.topic_prefix, &config.slot, &source.database];
    let foreign = IDENTITY.into_iter().zip(wanted).find(|(key, value)| found.get(*key).and_then(Value::as_str) != Some(value));
    match foreign {
        None => Ok(()),
        Some((key, value)) => {
            let has = found.get(key).and_then(Value::as_str).unwrap_or("nothing");
            Err(Error::ConnectorForeign { connector: connector_name(config).to_owned(), reason: format!("its {key} is {has}, not {value}") })
        }
    }
}

/// Refuses a plugin whose stream cannot be trusted.
pub(in crate::cdc) async fn require_plugin(rest: &Rest) -> Result<String, Error> {
    let version = rest.plugin_version().await?;
    if parsed(&version).is_some_and(|it| it >= VERSION_MIN) { Ok(version) } else { Err(Error::PluginOld { found: version }) }
}

/// `3.7.0.Final` → (3, 7, 0).
fn parsed(version: &str) -> Option<(u32, u32, u32)> {
    let mut parts = version.split(['.', '-']).map(str::parse);
    let mut next = || parts.next()?.ok();
    Some((next()?, next()?, next()?))
}

fn snapshot_mode(mode: SnapshotMode) -> &'static str {
    match mode {
        SnapshotMode::Initial => "initial",
        SnapshotMode::Never => "no_data",
    }
}

/// Where Connect finds the source: in a container that is another address than ours.
fn address(config: &Config, source: &Source) -> Result<(String, String), Error> {
    if config.database_address.is_empty() {
        return Ok((source.host().to_owned(), source.port().to_string()));
    }
    let (host, port) = config.database_address.rsplit_once(':').unwrap_or((&config.database_address, "5432"));
    match port.parse::<u16>() {
        Ok(port) if !host.is_empty() => Ok((host.to_owned(), port.to_string())),
        _ => Err(Error::DatabaseAddress { found: config.database_address.clone() }),
    }
}

/// A name as a regular expression that matches nothing else; the list is split at commas.
fn quoted(name: &str) -> String {
    name.chars().map(|it| if it.is_alphanumeric() || it == '_' { it.to_string() } else { format!("\\x{{{:x}}}", u32::from(it)) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    fn tables() -> BTreeSet<TableId> {
        ["accounts", "odd,na.me"].into_iter().map(|table| TableId { schema: "public".to_owned(), table: table.to_owned() }).collect()
    }

    fn source() -> Source {
        Source::new(&Secret::new("postgres://bank:hunter2@db:6543/ledger")).expect("an address")
    }

    #[test]
    fn connect_is_told_a_reference_and_not_the_password() {
        let config = Config { database_password: "${file:/run/secrets/bank:password}".to_owned(), ..Config::default() };
        let settings = wanted(&config, &source(), &tables()).expect("settings");
        assert!(!Value::from(settings.clone()).to_string().contains("hunter2"));
        assert_eq!(settings["database.password"], "${file:/run/secrets/bank:password}");

        let clear = Config { database_password: CLEAR_PASSWORD.to_owned(), ..Config::default() };
        assert_eq!(wanted(&clear, &source(), &tables()).expect("settings")["database.password"], "hunter2");
    }

    #[test]
    fn every_table_is_named_exactly() {
        let settings = wanted(&Config::default(), &source(), &tables()).expect("settings");
        assert_eq!(settings["table.include.list"], "public\\.accounts,public\\.odd\\x{2c}na\\x{2e}me");
        assert_eq!((&settings["database.hostname"], &settings["database.port"]), (&"db".into(), &"6543".into()));
    }

    #[test]
    fn connect_comes_to_the_source_as_encrypted_as_we_do() {
        let of = |query: &str| {
            let source = Source::new(&Secret::new(format!("postgres://bank@db/ledger{query}"))).expect("an address");
            wanted(&Config::default(), &source, &tables()).expect("settings")
        };
        let plain = of("");
        assert!(!plain.contains_key("database.sslmode") && !plain.contains_key("database.sslrootcert"));
        assert_eq!(of("?sslmode=require")["database.sslmode"], "require");
        let file = tempfile::NamedTempFile::new().expect("a file");
        let path = file.path().display().to_string();
        let verified = of(&format!("?sslmode=verify-full&sslrootcert={path}"));
        assert_eq!((&verified["database.sslmode"], &verified["database.sslrootcert"]), (&"verify-full".into(), &path.into()));
    }

    #[test]
    fn connect_may_see_the_source_elsewhere() {
        let config = Config { database_address: "postgres:5433".to_owned(), ..Config::default() };
        let settings = wanted(&config, &source(), &tables()).expect("settings");
        assert_eq!((&settings["database.hostname"], &settings["database.port"]), (&"postgres".into(), &"5433".into()));
        let wrong = Config { database_address: "postgres:x".to_owned(), ..Config::default() };
        assert!(wanted(&wrong, &source(), &tables()).is_err());
    }

    #[test]
    fn only_what_differs_is_an_update() {
        let config = Config::default();
        let wanted = wanted(&config, &source(), &tables()).expect("settings");
        let mut found = wanted.clone();
        found.insert("name".to_owned(), "bank".into());
        assert!(differences(&found, &wanted).is_empty());
        found.insert("poll.interval.ms".to_owned(), "500".into());
        found.insert("transforms".to_owned(), "x".into());
        assert_eq!(differences(&found, &wanted), ["poll.interval.ms", "transforms"]);
        require_ours(&config, &source(), &found).expect("ours");
        found.insert("slot.name".to_owned(), "other".into());
        assert!(require_ours(&config, &source(), &found).is_err());
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        for (version, good) in [("3.6.3.Final", false), ("3.7.0.Final", true), ("3.10.0.Final", true), ("4.0.0-SNAPSHOT", true), ("unknown", false)] {
            assert_eq!(parsed(version).is_some_and(|it| it >= VERSION_MIN), good, "{version}");
        }
    }
}
