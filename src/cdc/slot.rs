//! The replication slot: what it looks like, what to do about it at a start, and how it is made.

use std::{
    ops::{Deref, DerefMut},
    time::Duration,
};

use pgwire_replication::{PgWireError, ReplicationClient, ReplicationConfig};
use sqlx::{PgConnection, Row as _};

use super::{
    error::{Error, sql_state},
    heartbeat::{self, Server},
    progress::Progress,
    source::{Source, by_the_certificates_name, parse_lsn},
    stats::SlotHealth,
};
use crate::change::Lsn;

/// How long a slot may stay with another process: after our own kill -9 the server notices within a moment, and a
/// network that died takes `wal_sender_timeout`.
const BUSY_MAX: Duration = Duration::from_secs(70);
const BUSY_POLL: Duration = Duration::from_millis(250);
/// How long the server may take to answer a replication connection; the transport itself would wait for ever.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// A slot as the server shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) plugin: String,
    pub(super) database: String,
    pub(super) active_pid: Option<i32>,
    pub(super) health: SlotHealth,
    /// Why the server gave it up.
    pub(super) invalidation: Option<String>,
}

/// How to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Start {
    /// Make the slot, take the snapshot.
    Fresh,
    /// A snapshot was cut short: drop the slot, begin anew.
    Over,
    /// Stream on from the slot's position. The slot began at `snapshot`.
    Resume { snapshot: Lsn, confirmed: Lsn },
}

/// What slot and progress say together. Anything that would be a silent gap is an error.
pub(super) fn decide(name: &str, database: &str, slot: Option<&Slot>, progress: Option<&Progress>) -> Result<Start, Error> {
    let slot_name = || name.to_owned();
    if let Some(found) = slot {
        require_ours(name, database, found)?;
    }
    let finished = progress.is_some_and(|it| it.finished_at.is_some());
    match (slot, progress) {
        (None, Some(progress)) if finished => Err(Error::SlotMissing { slot: progress.slot.clone() }),
        (None, _) => Ok(Start::Fresh),
        (Some(_), None) => Err(Error::SlotUnknown { slot: slot_name() }),
        (Some(_), Some(progress)) if progress.slot != name => {
            if finished {
                return Err(Error::SlotForeign { slot: slot_name(), reason: format!("this capture belongs to slot {}", progress.slot) });
            }
            Err(Error::SlotUnknown { slot: slot_name() })
        }
        (Some(_), Some(_)) if !finished => Ok(Start::Over),
        (Some(slot), Some(progress)) => {
            require_alive(name, slot)?;
            let snapshot = progress.lsn.ok_or(Error::Progress { reason: "a finished snapshot has no LSN" })?;
            Ok(Start::Resume { snapshot, confirmed: slot.health.confirmed_flush_lsn })
        }
    }
}

/// Refuses a slot that is not for this database, or speaks another language.
pub(super) fn require_ours(name: &str, database: &str, slot: &Slot) -> Result<(), Error> {
    if slot.plugin == "pgoutput" && slot.database == database {
        return Ok(());
    }
    let reason = format!("it decodes database {:?} with {:?}", slot.database, slot.plugin);
    Err(Error::SlotForeign { slot: name.to_owned(), reason })
}

/// Refuses a slot that somebody reads, and tells who.
pub(super) async fn require_unread(connection: &mut PgConnection, name: &str, slot: &Slot) -> Result<(), Error> {
    let Some(pid) = slot.active_pid else { return Ok(()) };
    Err(Error::SlotBusy { slot: name.to_owned(), holder: holder(connection, pid).await? })
}

/// Refuses a slot whose WAL is gone.
pub(super) fn require_alive(name: &str, slot: &Slot) -> Result<(), Error> {
    if slot.health.wal_status == "lost" || slot.invalidation.is_some() {
        let reason = slot.invalidation.clone().unwrap_or_else(|| "its WAL was removed".to_owned());
        return Err(Error::SlotLost { slot: name.to_owned(), reason });
    }
    Ok(())
}

/// Reads a slot; None if there is none of that name.
pub(super) async fn find(connection: &mut PgConnection, name: &str) -> Result<Option<Slot>, Error> {
    // invalidation_reason came with version 17, so it is asked for by way of JSON.
    const FIND: &str =
        "select coalesce(plugin::text, '') plugin, coalesce(database::text, '') database, active, active_pid, coalesce(wal_status, '') wal_status,
            coalesce(confirmed_flush_lsn, '0/0')::text confirmed, coalesce(restart_lsn, '0/0')::text restart, safe_wal_size,
            to_jsonb(s) ->> 'invalidation_reason' invalidation
        from pg_replication_slots s where slot_name = $1";
    let row = sqlx::query(FIND).bind(name).fetch_optional(connection).await.map_err(failed)?;
    let Some(row) = row else { return Ok(None) };
    let lsn = |column| row.try_get::<String, _>(column).map_err(failed).and_then(|it| parse_lsn(&it));
    Ok(Some(Slot {
        plugin: row.try_get("plugin").map_err(failed)?,
        database: row.try_get("database").map_err(failed)?,
        active_pid: row.try_get("active_pid").map_err(failed)?,
        health: SlotHealth {
            active: row.try_get("active").map_err(failed)?,
            wal_status: row.try_get("wal_status").map_err(failed)?,
            confirmed_flush_lsn: lsn("confirmed")?,
            restart_lsn: lsn("restart")?,
            safe_wal_bytes: row.try_get("safe_wal_size").map_err(failed)?,
            seconds_left: None,
        },
        invalidation: row.try_get("invalidation").map_err(failed)?,
    }))
}

/// Waits while somebody else holds the slot, telling who; a while later it is an error. Returns the slot as it is then.
pub(super) async fn wait_until_free(connection: &mut PgConnection, name: &str, mut tell: impl FnMut(String)) -> Result<Option<Slot>, Error> {
    let deadline = tokio::time::Instant::now() + BUSY_MAX;
    loop {
        let slot = find(connection, name).await?;
        let Some(pid) = slot.as_ref().and_then(|it| it.active_pid) else { return Ok(slot) };
        let holder = holder(connection, pid).await?;
        if tokio::time::Instant::now() >= deadline {
            return Err(Error::SlotBusy { slot: name.to_owned(), holder });
        }
        tell(format!("slot {name} is held by {holder}"));
        tokio::time::sleep(BUSY_POLL).await;
    }
}

/// Ends a connection of ours that the server has not noticed to be gone: with a long `wal_sender_timeout`, or none, it would keep
/// the slot for as long.
pub(super) async fn let_go(connection: &mut PgConnection, name: &str, pid: i32) -> Result<(), Error> {
    const END: &str = "select pg_terminate_backend(active_pid, 5000) from pg_replication_slots where slot_name = $1 and active_pid = $2";
    let ended: Option<bool> = sqlx::query_scalar(END).bind(name).bind(pid).fetch_optional(connection).await.map_err(failed)?;
    if ended.is_some() {
        tracing::info!(slot = name, pid, "the server still served our last connection; it was told to end it");
    }
    Ok(())
}

/// Who a process of the server works for.
pub(super) async fn holder(connection: &mut PgConnection, pid: i32) -> Result<String, Error> {
    const WHO: &str = "select coalesce(nullif(application_name, ''), 'an unnamed program') || ' at ' || coalesce(host(client_addr), 'the same host') from pg_stat_activity where pid = $1";
    let who: Option<String> = sqlx::query_scalar(WHO).bind(pid).fetch_optional(connection).await.map_err(failed)?;
    Ok(format!("pid {pid} ({})", who.as_deref().unwrap_or("already gone")))
}

pub(super) async fn drop_slot(connection: &mut PgConnection, name: &str) -> Result<(), Error> {
    sqlx::query("select pg_drop_replication_slot($1)").bind(name).execute(connection).await.map_err(|source| Error::Sql { what: "drop the slot", source })?;
    Ok(())
}

/// A replication connection. Dropped, it lets go of the slot at once; the transport alone would notice seconds later.
pub(super) struct Replication {
    client: ReplicationClient,
    /// The server's process that serves it: whoever else holds the slot is not us.
    pub(super) pid: i32,
    pub(super) server: Server,
    /// The end of the server's flushed WAL when it was made.
    pub(super) wal_end: Lsn,
    /// Whether a standby of the server can keep the slot, and go on with it when it takes over: PostgreSQL 17 and newer.
    failover: bool,
}

impl Deref for Replication {
    type Target = ReplicationClient;
    fn deref(&self) -> &ReplicationClient {
        &self.client
    }
}

impl DerefMut for Replication {
    fn deref_mut(&mut self) -> &mut ReplicationClient {
        &mut self.client
    }
}

impl Drop for Replication {
    fn drop(&mut self) {
        self.client.abort();
    }
}

/// A slot just made, on the connection that will stream from it, with the snapshot it exported.
pub(super) struct Made {
    pub(super) client: Replication,
    pub(super) consistent_point: Lsn,
    /// For `set transaction snapshot`; valid until the client starts.
    pub(super) snapshot: String,
}

/// Makes the slot. Waits for transactions that are open on the server at this moment.
pub(super) async fn create(source: &Source, name: &str, publication: &str) -> Result<Made, Error> {
    let failed = |source| Error::Replication { what: "make the replication slot", source };
    let mut client = connect(source, name, publication).await?;
    // Where no standby synchronizes slots it means nothing.
    let failover = if client.failover { ", FAILOVER true" } else { "" };
    let create = format!("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput (SNAPSHOT 'export'{failover})", super::source::quoted(name));
    let rows = client.simple_query(&create).await.map_err(failed)?;
    let column = |at: usize| rows.first().and_then(|row| row.get(at)?.as_ref()).map(|it| String::from_utf8_lossy(it).into_owned());
    let (Some(consistent_point), Some(snapshot)) = (column(1), column(2)) else {
        return Err(failed(PgWireError::Protocol("CREATE_REPLICATION_SLOT answered without a snapshot".to_owned())));
    };
    Ok(Made { client, consistent_point: parse_lsn(&consistent_point)?, snapshot })
}

/// Starts streaming from the slot's own position. Tells who holds the slot where somebody does.
pub(super) async fn start(mut client: Replication, name: &str) -> Result<Replication, Error> {
    let failed = |source| start_failed(name, source);
    client.start().await.map_err(failed)?;
    client.wait_started().await.map_err(failed)?;
    Ok(client)
}

/// A connection that has not started.
pub(super) async fn connect(source: &Source, name: &str, publication: &str) -> Result<Replication, Error> {
    let failed = |source| Error::Replication { what: "open a replication connection", source };
    let config = source.replication(name, publication);
    match introduced(config.clone()).await {
        Err(PgWireError::Tls(refusal)) if source.sslmode() == "verify-ca" => match by_the_certificates_name(config, &refusal) {
            Some(config) => introduced(config).await.map_err(failed),
            None => Err(failed(PgWireError::Tls(refusal))),
        },
        answer => answer.map_err(failed),
    }
}

/// Connects and asks who is there.
async fn introduced(config: ReplicationConfig) -> Result<Replication, PgWireError> {
    let timed_out = |_| PgWireError::from(std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer within 10 s"));
    tokio::time::timeout(CONNECT_MAX, asked(config)).await.map_err(timed_out).and_then(|it| it)
}

async fn asked(config: ReplicationConfig) -> Result<Replication, PgWireError> {
    let mut client = ReplicationClient::connect_gated(config).await?;
    let answer = client.simple_query("select pg_backend_pid(), current_setting('server_version_num')").await?;
    let number = |at: usize| answer.first().and_then(|row| std::str::from_utf8(row.get(at)?.as_ref()?).ok()?.parse::<i32>().ok());
    let unnumbered = || PgWireError::Protocol("pg_backend_pid and server_version_num are not numbers".to_owned());
    let (pid, version) = number(0).zip(number(1)).ok_or_else(unnumbered)?;
    let system = client.identify_system().await?;
    let system_id = system.system_id.parse().map_err(|_| PgWireError::Protocol("IDENTIFY_SYSTEM: the system identifier is not a number".to_owned()))?;
    let server = Server { system_id, timeline: system.timeline };
    Ok(Replication { client, pid, server, wal_end: Lsn(system.xlogpos.as_u64()), failover: version >= 170_000 })
}

/// Where the server's history left a timeline; None where that is no part of it.
pub(super) async fn left_at(client: &mut Replication, timeline: u32) -> Result<Option<Lsn>, Error> {
    let current = client.server.timeline;
    match client.timeline_history(current).await {
        Ok(history) => Ok(heartbeat::left_at(&String::from_utf8_lossy(&history.content), timeline)),
        // The first timeline has no history, so it is no heir of another.
        Err(PgWireError::Server(_)) => Ok(None),
        Err(source) => Err(Error::Replication { what: "read the source's timeline history", source }),
    }
}

/// What the walsender's refusal, at the start or later, means for the slot.
pub(super) fn start_failed(name: &str, source: PgWireError) -> Error {
    if let PgWireError::Server(text) = &source {
        let slot = name.to_owned();
        match sql_state(text) {
            // A standby keeps slots that it copies from its primary, and lets nobody read them until it takes over.
            Some("55000") if text.contains("for logical decoding") => return Error::Standby,
            Some("55000") => return Error::SlotLost { slot, reason: text.clone() },
            Some("42704") if text.contains("publication") => return Error::PublicationMissing { publication: text.clone() },
            Some("42704") => return Error::SlotMissing { slot },
            _ => {}
        }
    }
    Error::Replication { what: "stream from the replication slot", source }
}

fn failed(source: sqlx::Error) -> Error {
    Error::Sql { what: "look at the replication slot", source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Diagnose as _, Fault};

    fn slot() -> Slot {
        let health = SlotHealth { wal_status: "reserved".into(), confirmed_flush_lsn: Lsn(200), ..SlotHealth::default() };
        Slot { plugin: "pgoutput".into(), database: "bank".into(), health, ..Slot::default() }
    }

    fn progress(finished: bool) -> Progress {
        Progress { slot: "ledgerline".into(), lsn: Some(Lsn(100)), finished_at: finished.then(chrono::Utc::now), ends: Vec::new(), tables_read: Vec::new() }
    }

    fn decided(slot: Option<&Slot>, progress: Option<&Progress>) -> Result<Start, Error> {
        decide("ledgerline", "bank", slot, progress)
    }

    #[test]
    fn slot_and_progress_together_say_how_to_begin() {
        assert_eq!(decided(None, None).expect("fresh"), Start::Fresh);
        assert_eq!(decided(None, Some(&progress(false))).expect("fresh"), Start::Fresh);
        assert_eq!(decided(Some(&slot()), Some(&progress(false))).expect("over"), Start::Over);
        assert_eq!(decided(Some(&slot()), Some(&progress(true))).expect("resume"), Start::Resume { snapshot: Lsn(100), confirmed: Lsn(200) });
    }

    #[test]
    fn whatever_would_be_a_gap_asks_for_the_operator() {
        let lost = Slot { health: SlotHealth { wal_status: "lost".into(), ..slot().health }, ..slot() };
        let other = Slot { plugin: "test_decoding".into(), ..slot() };
        let renamed = Progress { slot: "before".into(), ..progress(true) };
        for (slot, progress) in [
            (None, Some(progress(true))),
            (Some(slot()), None),
            (Some(lost), Some(progress(true))),
            (Some(other), Some(progress(true))),
            (Some(slot()), Some(renamed)),
        ] {
            let error = decided(slot.as_ref(), progress.as_ref()).expect_err("a gap");
            assert!(matches!(error.fault(), Fault::Operator(_)), "{error}");
        }
    }
}
