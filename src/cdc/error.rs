//! What can go wrong between the WAL and the stream, and what the operator should do about it.

use pgwire_replication::PgWireError;

use super::{pgoutput, values};
use crate::{
    change::Lsn,
    fault::{Diagnose, Fault, sqlstate},
    stream::{producer, topics},
};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("source.url is not an address of PostgreSQL: {reason}")]
    Address { reason: &'static str },
    #[error("could not {what}")]
    Sql {
        what: &'static str,
        #[source]
        source: sqlx::Error,
    },
    #[error("could not {what}")]
    Replication {
        what: &'static str,
        #[source]
        source: PgWireError,
    },
    #[error("{parameter} of the address names {path}, which cannot be read: {reason}")]
    Certificate { parameter: &'static str, path: String, reason: std::io::ErrorKind },
    #[error("the server is PostgreSQL {found}, logical decoding as we need it starts with 15")]
    OldServer { found: i32 },
    #[error("wal_level is {found}, not logical")]
    WalLevel { found: String },
    #[error("table {table} of cdc.tables does not exist")]
    NoSuchTable { table: String },
    #[error("table {table} is not among those that are captured")]
    NotCaptured { table: String, captured: Vec<String> },
    #[error("table {table} has no primary key, so it cannot be read in chunks")]
    NoKey { table: String },
    #[error("the connector reads tables again by signals of Debezium's own")]
    EngineCannot,
    #[error(
        "the source is a standby, which only follows another server: it is waited for until it takes over, or the address of the source leads to \
         the primary"
    )]
    Standby,
    #[error("no table matches cdc.tables")]
    NoTables,
    #[error("the user of source.url may not read table {table}")]
    Unreadable { table: String },
    #[error("publication {publication} is missing")]
    PublicationMissing { publication: String },
    #[error("publication {publication} leaves out inserts, updates or deletes, or renames partitions")]
    PublicationPartial { publication: String },
    #[error("table {table} has rows that were never captured, because publication {publication} did not hold it")]
    Uncaptured { table: String, publication: String },
    #[error("replication slot {slot} is lost: {reason}")]
    SlotLost { slot: String, reason: String },
    #[error("replication slot {slot} is missing, though its snapshot was taken")]
    SlotMissing { slot: String },
    #[error("replication slot {slot} exists, but the state database knows nothing of it")]
    SlotUnknown { slot: String },
    #[error("replication slot {slot} is not ours: {reason}")]
    SlotForeign { slot: String, reason: String },
    #[error("replication slot {slot} stands at {found}, but we never got further than {expected}")]
    SlotMoved { slot: String, expected: Lsn, found: Lsn },
    #[error("the source's WAL ends at {found}, but we captured it up to {expected}")]
    Restored { expected: Lsn, found: Lsn },
    #[error("the source is another server than the one that was captured: its system identifier is {found}, not {expected}")]
    OtherServer { expected: u64, found: u64 },
    #[error("replication slot {slot} is not on this server: it is on timeline {now}, and what was captured last was on timeline {before}")]
    SlotLeftBehind { slot: String, before: u32, now: u32 },
    #[error("the source took over where timeline {before} had come to {found}, but we captured that timeline up to {expected}")]
    LateHeir { before: u32, expected: Lsn, found: Lsn },
    #[error("the source is on timeline {now}, and timeline {before}, which was captured last, is no part of its history")]
    OtherTimeline { before: u32, now: u32 },
    #[error("the source has been silent for {} s, and the network did not say that it is gone", .0.as_secs())]
    Silent(std::time::Duration),
    #[error("replication slot {slot} does not belong to our connection any more, and the network did not say so")]
    Deserted { slot: String },
    #[error("replication slot {slot} is held by {holder}")]
    SlotBusy { slot: String, holder: String },
    #[error("the state database has a progress we cannot read: {reason}")]
    Progress { reason: &'static str },
    #[error("the replication stream ended")]
    Ended,
    #[error("a message of the replication stream at {lsn} cannot be read, and the rows behind it cannot be read without it")]
    Decode {
        lsn: Lsn,
        #[source]
        source: pgoutput::Malformed,
    },
    #[error("the snapshot of the slot is gone, as the connection that exported it was cut")]
    SnapshotGone,
    #[error("table {table} was dropped while its snapshot was about to be read")]
    Dropped { table: String },
    #[error("table {table} was rewritten or truncated after the snapshot had begun, and shows it nothing")]
    Rewritten { table: String },
    #[error("table {table} cannot be read for the snapshot while {holder} has it locked; end that transaction, or wait for it")]
    Locked { table: String, holder: String },
    #[error("could not read table {table} for the snapshot")]
    Unread {
        table: String,
        #[source]
        source: sqlx::Error,
    },
    #[error("a row of the snapshot of {table} cannot be written")]
    Row {
        table: String,
        #[source]
        source: Poison,
    },
    #[error("a row of table {table} at {lsn} cannot become an event")]
    Poison {
        table: String,
        lsn: Lsn,
        #[source]
        source: Poison,
    },
    #[error("table {table} was taken out of publication {publication} while it was captured")]
    Unpublished { table: String, publication: String },
    #[error("cdc.connect_url is not an address of Kafka Connect: {reason}")]
    ConnectAddress { reason: String },
    #[error("cdc.database_address is not host:port: {found}")]
    DatabaseAddress { found: String },
    #[error("Kafka Connect at {address} does not answer: {reason}")]
    ConnectAway { address: String, reason: String },
    #[error("Kafka Connect refuses ({status}): {reason}")]
    ConnectAnswer { status: u16, reason: String },
    #[error("Kafka Connect at {address} has no Debezium connector for PostgreSQL")]
    PluginMissing { address: String },
    #[error("the Debezium connector of Kafka Connect is {found}, and versions before 3.7.0 lose rows of a COPY when they are stopped in the middle")]
    PluginOld { found: String },
    #[error("Kafka Connect rejects the settings of connector {connector}: {}", fields.iter().map(|(name, why)| format!("{name}: {why}")).collect::<Vec<_>>().join(" · "))]
    Rejected { connector: String, fields: Vec<(String, String)> },
    #[error("connector {connector} is not ours: {reason}")]
    ConnectorForeign { connector: String, reason: String },
    #[error("connector {connector} exists, but the state database knows nothing of it")]
    ConnectorUnknown { connector: String },
    #[error("connector {connector} has no offsets, though its snapshot was taken")]
    OffsetsMissing { connector: String },
    #[error("connector {connector} is gone")]
    ConnectorGone { connector: String },
    #[error("connector {connector} is not as Kafka Connect was asked to make it, a minute later")]
    NotStopped { connector: String },
    #[error("connector {connector} failed: {trace}")]
    TaskFailed { connector: String, trace: String, remedy: String },
    #[error("could not start the capture's thread")]
    Thread(#[source] std::io::Error),
    #[error("the capture's thread panicked")]
    Panicked,
    #[error(transparent)]
    Stream(#[from] producer::Error),
    #[error(transparent)]
    Topics(#[from] topics::Error),
}

/// Why one row cannot become an event. It goes to the dead letters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Poison {
    #[error(transparent)]
    Malformed(#[from] pgoutput::Malformed),
    #[error("column {column}: {source}")]
    Value { column: String, source: values::NotA },
    #[error("a row of {found} values, its table has {expected} columns")]
    Columns { found: usize, expected: usize },
    #[error("a row of a table the stream has not described (relation {relation})")]
    UnknownRelation { relation: u32 },
    #[error("a row of the snapshot that COPY did not write")]
    CopyText,
}

const NEW_SNAPSHOT: &str = "the changes since then are gone, so the tables must be read anew: `ledgerline reset` starts embedded services over; \
                            on others set a new cdc.topic_prefix, and a warehouse.url whose database is empty";

const FORMER_PRIMARY: &str = "If the former primary is whole, lead the address of the source back to it";

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        let operator = |text: String| Fault::Operator(text);
        match self {
            Self::Address { .. } => operator("write source.url as postgres://user@host:port/database".to_owned()),
            Self::Certificate { parameter, .. } => operator(format!("correct {parameter} in the address of the source, or make that file readable for us")),
            Self::Sql { source, .. } => sql_fault(source),
            Self::Replication { source, .. } => replication_fault(source),
            Self::OldServer { .. } => operator("use a server of PostgreSQL 15 or newer".to_owned()),
            Self::WalLevel { .. } => operator("set wal_level = logical on the source and restart it".to_owned()),
            Self::NoSuchTable { table } => operator(format!("create {table}, or take it out of cdc.tables")),
            Self::NotCaptured { captured, .. } => operator(captured_remedy(captured)),
            Self::NoKey { table } => operator(format!("give {table} a primary key, or start over with a new cdc.topic_prefix and slot")),
            Self::EngineCannot => operator("send the connector an execute-snapshot signal, or use cdc.engine = \"native\"".to_owned()),
            Self::NoTables => operator("name existing tables in cdc.tables".to_owned()),
            Self::Unreadable { table } => operator(format!("grant select on {table} to that user, or leave it out (cdc.tables_exclude)")),
            Self::PublicationMissing { publication } => operator(format!("somebody dropped publication {publication}; {NEW_SNAPSHOT}")),
            Self::PublicationPartial { publication } => {
                operator(format!("alter publication {publication} set (publish = 'insert, update, delete, truncate', publish_via_partition_root = false)"))
            }
            Self::Uncaptured { table, .. } => {
                operator(format!("`ledgerline cdc resnapshot {table}` reads them while the stream goes on; or name it in cdc.tables_exclude"))
            }
            Self::SlotLost { slot, reason } => {
                operator(format!("drop slot {slot} (select pg_drop_replication_slot('{slot}')) and {}; {NEW_SNAPSHOT}", keep_it(reason)))
            }
            Self::SlotMissing { .. } => operator(format!("somebody dropped the slot, or source.url leads to a server that never had it; {NEW_SNAPSHOT}")),
            Self::SlotUnknown { slot } => {
                operator(format!("name another cdc.slot, or drop this one if nobody needs it: select pg_drop_replication_slot('{slot}')"))
            }
            Self::SlotForeign { .. } => operator("name another cdc.slot".to_owned()),
            Self::SlotMoved { slot, .. } => operator(format!("somebody else consumed slot {slot}; {NEW_SNAPSHOT}")),
            Self::Restored { .. } => {
                operator(format!("the source is a backup that was brought back: what it holds since then is not what the topics hold; {NEW_SNAPSHOT}"))
            }
            Self::OtherServer { .. } => operator(format!("correct source.url; or if that server is meant: {NEW_SNAPSHOT}")),
            Self::SlotLeftBehind { .. } => operator(format!(
                "a standby took over without the slot. {FORMER_PRIMARY}; otherwise {NEW_SNAPSHOT}. So that the next standby keeps it (PostgreSQL 17 and \
                 newer): there sync_replication_slots = on, hot_standby_feedback = on, primary_slot_name, and a dbname in primary_conninfo; on its \
                 primary synchronized_standby_slots"
            )),
            Self::LateHeir { .. } => operator(format!(
                "the standby that took over had not all commits that the topics hold, so what it wrote since is another history. {FORMER_PRIMARY}; \
                 otherwise {NEW_SNAPSHOT}. synchronized_standby_slots on a primary (PostgreSQL 17 and newer) keeps changes from us until its standbys \
                 have them"
            )),
            Self::OtherTimeline { .. } => operator(format!(
                "this is a former primary that was replaced, or a restore to an earlier time: lead the address of the source to the server that took \
                 over; or if this one is meant: {NEW_SNAPSHOT}"
            )),
            Self::SlotBusy { .. } => operator("stop the other process, or name another cdc.slot here".to_owned()),
            Self::Progress { .. } => operator("repair the row in ledgerline.cdc_snapshot of the state database".to_owned()),
            Self::Unread { table, source } => unread_fault(table, source),
            Self::Row { .. } => operator("exclude the table in cdc.tables_exclude, and report the value as a bug".to_owned()),
            Self::Poison { .. } => operator(
                "cdc.errors_tolerance = \"all\" sets such rows aside, with their bytes, in the topic of the dead letters; or leave the table out \
                 (cdc.tables_exclude)"
                    .to_owned(),
            ),
            Self::Unpublished { table, publication } => operator(format!(
                "its changes since then are missing: `ledgerline cdc resnapshot {table}` takes it into {publication} again and reads what it holds; \
                 or leave it out (cdc.tables_exclude)"
            )),
            Self::ConnectAddress { .. } => operator("write cdc.connect_url as http://host:8083, with https:// and a user where it asks for them".to_owned()),
            Self::DatabaseAddress { .. } => operator("write cdc.database_address as Kafka Connect reaches the source, or leave it empty".to_owned()),
            Self::ConnectAnswer { status, .. } => connect_fault(*status),
            Self::PluginMissing { .. } => operator("put debezium-connector-postgres 3.7.0 or newer into the plugin.path of Kafka Connect".to_owned()),
            Self::PluginOld { .. } => operator("install debezium-connector-postgres 3.7.0 or newer in Kafka Connect".to_owned()),
            Self::Rejected { fields, .. } => operator(rejected_remedy(fields)),
            Self::ConnectorForeign { .. } => operator("choose another cdc.topic_prefix, or delete that connector if nobody needs it".to_owned()),
            Self::ConnectorUnknown { .. } => {
                operator("choose another cdc.topic_prefix, or remove connector, offsets, slot and publication with `ledgerline cdc remove`".to_owned())
            }
            Self::OffsetsMissing { .. } => operator(format!("somebody deleted the offsets, or another engine began this capture; {NEW_SNAPSHOT}")),
            Self::TaskFailed { remedy, .. } => operator(remedy.clone()),
            // The next try sees the tables as they are then.
            Self::SnapshotGone | Self::Dropped { .. } | Self::Rewritten { .. } | Self::Locked { .. } => Fault::Transient,
            Self::Silent(_) | Self::Deserted { .. } | Self::Standby => Fault::Transient,
            Self::ConnectAway { .. } | Self::ConnectorGone { .. } | Self::NotStopped { .. } | Self::Ended | Self::Thread(_) => Fault::Transient,
            Self::Decode { .. } => operator(
                "start the capture again: the slot still has the message, and it is read again. If it stops at the same place, nothing damaged it on \
                 its way: report it as a bug, with the version of the server"
                    .to_owned(),
            ),
            Self::Panicked => Fault::Bug,
            Self::Stream(error) => error.fault(),
            Self::Topics(error) => error.fault(),
        }
    }
}

/// The names that may be meant, the likeliest first.
fn captured_remedy(captured: &[String]) -> String {
    const NAMED_MAX: usize = 10;
    let named = captured[..captured.len().min(NAMED_MAX)].join(", ");
    let more = captured.len().saturating_sub(NAMED_MAX);
    format!("name one of them: {named}{}", if more > 0 { format!(" and {more} more") } else { String::new() })
}

/// What keeps a slot from being lost again, by PostgreSQL's `invalidation_reason`.
fn keep_it(reason: &str) -> &'static str {
    match reason {
        "idle_timeout" => "raise idle_replication_slot_timeout",
        "wal_level_insufficient" => "leave wal_level = logical",
        "rows_removed" => "set hot_standby_feedback = on on the standby",
        _ => "raise max_slot_wal_keep_size",
    }
}

/// What an answer of Connect's REST asks for. 409 is a rebalance, 5xx a worker in trouble: both pass.
fn connect_fault(status: u16) -> Fault {
    match status {
        401 | 403 => Fault::Operator("name a user in cdc.connect_url and set LEDGERLINE__CDC__CONNECT_PASSWORD".to_owned()),
        409 | 500.. => Fault::Transient,
        _ => Fault::Operator("correct what Kafka Connect names; its worker's log has the whole story".to_owned()),
    }
}

/// The fields tell what is wrong; some of them are not told where to mend it.
fn rejected_remedy(fields: &[(String, String)]) -> String {
    let about = |prefix: &str| fields.iter().any(|(name, _)| name.starts_with(prefix));
    if fields.iter().any(|(_, why)| why.contains("password")) {
        return "Kafka Connect must know the source's password: give its worker the config provider and the value that cdc.database_password names".to_owned();
    }
    if about("database.") {
        return "Kafka Connect must reach the source: cdc.database_address is where, if it is not the address of source.url".to_owned();
    }
    if about("producer.override.") {
        return "set connector.client.config.override.policy = All on the worker of Kafka Connect".to_owned();
    }
    "correct the keys of [cdc] these settings come from; the worker's log has the whole story".to_owned()
}

const FIT_TLS: &str = "make sslmode in the address fit the server (disable, prefer, require, verify-ca, verify-full); to verify, \
                       sslrootcert names the file with its authority's certificate, and with verify-full the host must be one the server's certificate names";

fn sql_fault(error: &sqlx::Error) -> Fault {
    match error {
        sqlx::Error::Database(database) => database.code().map_or(Fault::Bug, |code| state_fault(&code)),
        sqlx::Error::Tls(_) => Fault::Operator(FIT_TLS.to_owned()),
        // What the handshake itself says comes as broken data.
        sqlx::Error::Io(broken) if broken.kind() == std::io::ErrorKind::InvalidData => Fault::Operator(FIT_TLS.to_owned()),
        sqlx::Error::Configuration(_) => Fault::Operator("correct the address of the database".to_owned()),
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => Fault::Transient,
        _ => Fault::Bug,
    }
}

/// What stands in the way of a table's rows.
fn unread_fault(table: &str, error: &sqlx::Error) -> Fault {
    match sqlstate(error).as_deref() {
        Some("42501") => Fault::Operator(format!(
            "grant select on {table} to the user of source.url, and bypassrls where the table has row security: its policies would hide rows; \
             or leave it out (cdc.tables_exclude)"
        )),
        Some("XX001" | "XX002") => Fault::Operator(format!("table {table} is damaged on the source: repair it there, or leave it out (cdc.tables_exclude)")),
        _ => sql_fault(error),
    }
}

fn replication_fault(error: &PgWireError) -> Fault {
    match error {
        PgWireError::Auth(_) => state_fault("28P01"),
        PgWireError::Tls(_) => Fault::Operator(FIT_TLS.to_owned()),
        PgWireError::MessageTooLarge { .. } => Fault::Operator("a row is larger than we carry: leave its table out (cdc.tables_exclude)".to_owned()),
        PgWireError::Server(text) => match sql_state(text) {
            // The walsender's words for these two are clearer than their code.
            Some("53300") => Fault::Operator("raise max_wal_senders (or max_connections) on the source".to_owned()),
            Some("53400") => Fault::Operator("raise max_replication_slots on the source, or drop a slot nobody needs".to_owned()),
            Some("42501") => Fault::Operator("give the user of source.url the right: alter role … replication".to_owned()),
            Some(code) => state_fault(code),
            None => Fault::Transient,
        },
        _ => Fault::Transient,
    }
}

/// What a SQLSTATE asks for.
fn state_fault(code: &str) -> Fault {
    match code.get(..2) {
        // Connection failures, the server stopping or starting, deadlocks and serialization: they pass.
        Some("08" | "57" | "40" | "53" | "58" | "XX") => Fault::Transient,
        Some("28") if code == "28000" => Fault::Operator(
            "let the user in: on the server, pg_hba.conf needs a line for this user, database and address (a replication connection of ours is one to \
             the database), and the role must exist and be allowed to log in; where all lines are hostssl, the address needs sslmode=require"
                .to_owned(),
        ),
        Some("28") => Fault::Operator("correct user and password in the address, or its sslmode where the server wants TLS".to_owned()),
        Some("3D") => Fault::Operator("create the database, or correct its name in the address".to_owned()),
        Some("42") if code == "42501" => {
            Fault::Operator("give the user the rights: select on the tables, create on the database (for the publication), replication".to_owned())
        }
        Some("55") if code == "55006" => Fault::Transient,
        Some("55") => Fault::Operator(format!("the slot cannot be read any more; {NEW_SNAPSHOT}")),
        _ => Fault::Bug,
    }
}

/// The five characters in `… (SQLSTATE 55006)`.
pub(super) fn sql_state(text: &str) -> Option<&str> {
    let at = text.find("SQLSTATE ")? + "SQLSTATE ".len();
    text.get(at..at + 5)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(text: &str) -> Fault {
        Error::Replication { what: "start", source: PgWireError::Server(text.to_owned()) }.fault()
    }

    #[test]
    fn every_refusal_of_the_walsender_names_its_remedy() {
        for (text, remedy) in [
            ("all replication slots are in use (SQLSTATE 53400)", "max_replication_slots"),
            ("number of requested standby connections exceeds max_wal_senders (SQLSTATE 53300)", "max_wal_senders"),
            ("permission denied to start WAL sender (SQLSTATE 42501)", "replication"),
            ("can no longer access replication slot (SQLSTATE 55000)", "read anew"),
        ] {
            assert!(matches!(server(text), Fault::Operator(told) if told.contains(remedy)), "{text}");
        }
        assert_eq!(server("terminating connection due to administrator command (SQLSTATE 57P01)"), Fault::Transient);
    }
}
