//! What an operator may ask of a capture without running it: how slot and publication stand, to make what it needs, and to
//! drop slot and publication.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::{
    Config, Engine, catalog, debezium,
    error::Error,
    incremental::{Request, Requests},
    progress::{Progress, Store},
    slot::{self, Slot},
    source::{self, Source, quoted},
    stats::{Connector, SlotHealth},
};
use crate::{
    change::{Lsn, TableId},
    secret::Secret,
};

/// The slot is a responsibility: what it holds back on the source, and how far its reader is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Standing {
    pub engine: Engine,
    /// With Debezium; None where there is no such connector, or Connect cannot be asked.
    pub connector: Option<Connector>,
    /// Why the connector is not known.
    pub connect_trouble: Option<String>,
    pub slot: String,
    pub publication: String,
    pub publication_exists: bool,
    /// None: there is no such slot.
    pub health: Option<SlotHealth>,
    /// Why the server gave the slot up.
    pub invalidation: Option<String>,
    /// The end of the source's flushed WAL.
    pub source_lsn: Lsn,
    /// WAL the source may not remove because of the slot.
    pub wal_kept_bytes: Option<u64>,
    /// WAL the capture has not confirmed.
    pub lag_bytes: Option<u64>,
    pub snapshot: SnapshotState,
    /// Tables that wait to be read again, are being read, or were given up.
    pub incremental_snapshots: Vec<Request>,
}

/// How far the reading of the rows from before came.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum SnapshotState {
    NeverBegun,
    /// It was cut short, or runs right now.
    Unfinished,
    Finished {
        lsn: Lsn,
        at: DateTime<Utc>,
    },
}

/// What [`remove`] dropped, or would drop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Removal {
    /// With Debezium; its offsets go with it.
    pub connector: Option<String>,
    pub slot: Option<String>,
    pub publication: Option<String>,
    /// WAL the source may remove once the slot is gone.
    pub wal_freed_bytes: u64,
}

/// What [`super::apply`] made, or would make.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Applied {
    pub engine: Engine,
    pub dry_run: bool,
    pub publication: String,
    pub publication_created: bool,
    pub tables_added: Vec<String>,
    /// Tables of a pattern that have rows from before they could be captured.
    pub tables_left_out: Vec<String>,
    pub topics_created: Vec<String>,
    pub slot: String,
    #[serde(flatten)]
    pub slot_step: SlotStep,
    /// With Debezium.
    pub connector: Option<ConnectorStep>,
    /// The first start will read the rows that exist, and make the slot anew for it: both must see the same moment.
    pub snapshot_comes: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "slot_step", rename_all = "snake_case")]
pub enum SlotStep {
    /// None: it would be.
    Made {
        lsn: Option<Lsn>,
    },
    Kept {
        confirmed: Lsn,
        active: bool,
    },
    /// Debezium makes its slot itself, when the connector first starts.
    LeftToConnector,
}

/// The connector in Kafka Connect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum ConnectorStep {
    /// It is there and stands still until the capture starts.
    Registered,
    /// The names of the settings that differed.
    Updated {
        settings: Vec<String>,
    },
    Kept,
}

impl Applied {
    /// Whether everything was as the configuration says.
    pub fn is_unchanged(&self) -> bool {
        let made = matches!(self.slot_step, SlotStep::Made { .. });
        let registered = self.connector.as_ref().is_some_and(|it| *it != ConnectorStep::Kept);
        !(self.publication_created || made || registered) && self.tables_added.is_empty() && self.topics_created.is_empty()
    }
}

/// Reads how the capture stands from the source and the state database.
pub async fn standing(source: &Secret, state: &Secret, config: &Config) -> Result<Standing, Error> {
    let source = Source::new(source)?;
    let mut connection = source.connect().await?;
    let found = slot::find(&mut connection, &config.slot).await?;
    let source_lsn = source::flushed_wal(&mut connection).await?;
    let publication_exists = publication_exists(&mut connection, &config.publication).await?;
    let _ = connection.close().await;
    let progress = Store::look(state, &config.topic_prefix).await?;
    let incremental_snapshots = match Requests::look(state, &config.topic_prefix).await? {
        Some(mut requests) => requests.told().await?,
        None => Vec::new(),
    };
    let (connector, connect_trouble) = match config.engine {
        Engine::Native => (None, None),
        Engine::Debezium => debezium::admin::look(&source, config).await,
    };
    Ok(Standing {
        engine: config.engine,
        connector,
        connect_trouble,
        slot: config.slot.clone(),
        publication: config.publication.clone(),
        publication_exists,
        wal_kept_bytes: found.as_ref().map(|it| wal_kept(it, source_lsn)),
        lag_bytes: found.as_ref().map(|it| source_lsn.0.saturating_sub(it.health.confirmed_flush_lsn.0)),
        invalidation: found.as_ref().and_then(|it| it.invalidation.clone()),
        health: found.map(|it| it.health),
        source_lsn,
        snapshot: snapshot_state(progress.as_ref()),
        incremental_snapshots,
    })
}

/// Asks for a table to be read again while the stream goes on; the capture begins with it within seconds, or when it next runs.
///
/// A table that was left out because it had rows from before joins the publication here. None with `dry_run`.
pub async fn resnapshot(source: &Secret, state: &Secret, config: &Config, table: &str, dry_run: bool) -> Result<Option<Request>, Error> {
    if config.engine == Engine::Debezium {
        return Err(Error::EngineCannot);
    }
    let mut connection = Source::new(source)?.connect().await?;
    let wanted = catalog::wanted_tables(&mut connection, config).await?;
    let id = match wanted.iter().find(|it| it.to_string() == table) {
        Some(id) => id.clone(),
        None => return Err(not_captured(table, &wanted)),
    };
    if catalog::primary_key(&mut connection, &id).await?.1.is_empty() {
        return Err(Error::NoKey { table: table.to_owned() });
    }
    let published = catalog::published(&mut connection, &config.publication).await?;
    let published = published.ok_or_else(|| Error::PublicationMissing { publication: config.publication.clone() })?;
    if dry_run {
        return Ok(None);
    }
    if !published.contains(&id) {
        catalog::publish(&mut connection, &config.publication, &id, false).await?;
    }
    let _ = connection.close().await;
    let mut requests = Requests::open(state, &config.topic_prefix).await?;
    let request = requests.ask(table).await?;
    requests.close().await;
    Ok(Some(request))
}

/// With the names of the captured tables, those first that look most like what was asked for.
fn not_captured(asked: &str, wanted: &BTreeSet<TableId>) -> Error {
    // A name alone is as good a hint as one with its schema.
    let likeness = |it: &TableId| strsim::jaro_winkler(&it.to_string(), asked).max(strsim::jaro_winkler(&it.table, asked));
    let mut captured: Vec<&TableId> = wanted.iter().collect();
    captured.sort_by(|a, b| likeness(b).total_cmp(&likeness(a)));
    Error::NotCaptured { table: asked.to_owned(), captured: captured.into_iter().map(ToString::to_string).collect() }
}

/// Whether the source keeps changes for the capture from now on.
pub async fn has_slot(source: &Secret, config: &Config) -> Result<bool, Error> {
    let mut connection = Source::new(source)?.connect().await?;
    let found = slot::find(&mut connection, &config.slot).await?;
    let _ = connection.close().await;
    Ok(found.is_some())
}

/// Drops slot and publication, and before them the connector with its offsets. With `dry_run` only says what there is. A slot that
/// somebody reads is refused.
///
/// The row about the snapshot stays: whoever starts a capture into the same topics again must hear that changes are missing.
pub async fn remove(source: &Secret, config: &Config, dry_run: bool) -> Result<Removal, Error> {
    let source = Source::new(source)?;
    let mut connection = source.connect().await?;
    let found = slot::find(&mut connection, &config.slot).await?;
    if let Some(found) = &found {
        slot::require_ours(&config.slot, &source.database, found)?;
    }
    let connector = match config.engine {
        Engine::Native => None,
        // It reads the slot, so it goes first; the slot is let go of a moment later.
        Engine::Debezium => debezium::admin::remove(&source, config, dry_run).await?,
    };
    let found = match connector {
        Some(_) if !dry_run => slot::wait_until_free(&mut connection, &config.slot, drop).await?,
        Some(_) => found,
        None => {
            if let Some(found) = &found {
                slot::require_unread(&mut connection, &config.slot, found).await?;
            }
            found
        }
    };
    let source_lsn = source::flushed_wal(&mut connection).await?;
    let published = publication_exists(&mut connection, &config.publication).await?;
    if !dry_run {
        if found.is_some() {
            slot::drop_slot(&mut connection, &config.slot).await?;
        }
        if published {
            let statement = format!("drop publication if exists {}", quoted(&config.publication));
            let dropped = sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await;
            dropped.map_err(|source| Error::Sql { what: "drop the publication", source })?;
        }
    }
    let _ = connection.close().await;
    Ok(Removal {
        connector,
        wal_freed_bytes: found.as_ref().map_or(0, |it| wal_kept(it, source_lsn)),
        slot: found.map(|_| config.slot.clone()),
        publication: published.then(|| config.publication.clone()),
    })
}

pub(super) async fn publication_exists(connection: &mut PgConnection, publication: &str) -> Result<bool, Error> {
    sqlx::query_scalar("select exists (select from pg_publication where pubname = $1)")
        .bind(publication)
        .fetch_one(connection)
        .await
        .map_err(|source| Error::Sql { what: "look for the publication", source })
}

/// A lost slot keeps nothing any more; its restart position is 0/0.
fn wal_kept(slot: &Slot, source_lsn: Lsn) -> u64 {
    match slot.health.restart_lsn {
        Lsn(0) => 0,
        restart => source_lsn.0.saturating_sub(restart.0),
    }
}

fn snapshot_state(progress: Option<&Progress>) -> SnapshotState {
    match progress {
        None => SnapshotState::NeverBegun,
        Some(Progress { lsn: Some(lsn), finished_at: Some(at), .. }) => SnapshotState::Finished { lsn: *lsn, at: *at },
        Some(_) => SnapshotState::Unfinished,
    }
}
