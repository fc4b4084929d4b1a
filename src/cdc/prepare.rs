//! What a capture needs before its first byte, whichever engine reads: the checks of the source, the publication, the topics; for
//! our own engine the slot, for Debezium the connector. It is prepared at every start; `cdc apply` prepares without starting. What is there already is left as it is.

use std::{collections::BTreeSet, num::NonZeroU32};

use sqlx::{Connection as _, PgConnection};

use super::{
    Config, Engine, SnapshotMode,
    admin::{Applied, SlotStep},
    catalog,
    debezium::registration::{self, Registrar},
    error::Error,
    progress::{Progress, Store},
    slot::{self, Made, Start},
    source::Source,
};
use crate::{
    change::{TableId, Topics},
    secret::Secret,
    stream::{
        self,
        topics::{self, Wanted},
    },
};

/// The publication as it is, or with a rehearsal would be.
#[derive(Debug, Default)]
pub(super) struct Published {
    pub(super) captured: BTreeSet<TableId>,
    /// Tables of a pattern that have rows from before they could be captured: left out and told.
    pub(super) uncaptured: Vec<String>,
    pub(super) created: bool,
    pub(super) added: Vec<String>,
}

/// Makes or completes the publication. `resuming`: the slot is there. With `rehearse` only says how it would be.
pub(super) async fn publish(
    connection: &mut PgConnection,
    config: &Config,
    wanted: &BTreeSet<TableId>,
    resuming: bool,
    rehearse: bool,
) -> Result<Published, Error> {
    let publication = &config.publication;
    let Some(published) = catalog::published(connection, publication).await? else {
        if resuming {
            return Err(Error::PublicationMissing { publication: publication.clone() });
        }
        if !rehearse {
            catalog::create_publication(connection, publication, wanted).await?;
        }
        return Ok(Published { captured: wanted.clone(), created: true, added: wanted.iter().map(ToString::to_string).collect(), ..Published::default() });
    };
    let mut all = Published { captured: wanted.clone(), ..Published::default() };
    for table in wanted.difference(&published) {
        // Before the slot exists no change is missed; afterwards only a table without rows can join.
        let rows_are_missed = resuming && config.snapshot == SnapshotMode::Initial;
        let can_join = match rehearse {
            true => !rows_are_missed || !catalog::has_rows(connection, table).await?,
            false => catalog::publish(connection, publication, table, rows_are_missed).await?,
        };
        if can_join {
            all.added.push(table.to_string());
            continue;
        }
        if config.tables.contains(&table.to_string()) {
            return Err(Error::Uncaptured { table: table.to_string(), publication: publication.clone() });
        }
        tracing::warn!(%table, "left out: it has rows from before it was captured");
        all.captured.remove(table);
        all.uncaptured.push(table.to_string());
    }
    Ok(all)
}

/// The topics of a capture of these tables; those whose order counts have one partition.
pub(super) fn wanted_topics(topics: &Topics, tables: &BTreeSet<TableId>, stream: &stream::Config) -> Vec<Wanted> {
    let single = [topics.boundaries(), topics.heartbeat(), topics.dead_letters(), format!("{}.message", topics.prefix())];
    let single = single.into_iter().map(|topic| (topic, NonZeroU32::MIN));
    let by_table = tables.iter().map(|it| (topics.table(it), stream.partitions));
    single.chain(by_table).map(|(topic, partitions)| Wanted { topic, partitions, replication_factor: stream.replication_factor }).collect()
}

/// Creates the missing topics, and refuses a transaction topic that would lose its order. The largest batch that all take, in bytes.
pub(super) async fn ensure_topics(asking: &topics::Topics, topics: &Topics, tables: &BTreeSet<TableId>, stream: &stream::Config) -> Result<usize, Error> {
    let wanted = wanted_topics(topics, tables, stream);
    let names: Vec<String> = wanted.iter().map(|it| it.topic.clone()).collect();
    asking.ensure(wanted).await?;
    asking.require_single(&topics.boundaries()).await?;
    Ok(asking.bytes_max(&names).await?)
}

/// Makes the slot; each step is written down before the next, so that a slot of ours is known as ours.
pub(super) async fn make_slot(store: &mut Store, source: &Source, config: &Config) -> Result<Made, Error> {
    store.begin(&config.slot).await?;
    let made = slot::create(source, &config.slot, &config.publication).await?;
    store.made(made.consistent_point).await?;
    Ok(made)
}

/// Which tables a snapshot that was cut short has not read, where it can go on: the slot is kept, and they are read in chunks while the
/// stream flows. None where it must be taken anew, as one of them has no key. Asked where some table was read to its end: otherwise there
/// is nothing to go on with.
pub(super) async fn left_to_read(
    connection: &mut PgConnection,
    slot: Option<&slot::Slot>,
    progress: Option<&Progress>,
    tables: &BTreeSet<TableId>,
) -> Result<Option<(Start, Vec<String>)>, Error> {
    let Some((slot, progress)) = slot.zip(progress) else { return Ok(None) };
    let Some(snapshot) = progress.lsn else { return Ok(None) };
    if slot::require_alive(&progress.slot, slot).is_err() {
        return Ok(None);
    }
    let mut left = Vec::new();
    for table in tables.iter().filter(|it| !progress.tables_read.contains(&it.to_string())) {
        if catalog::primary_key(connection, table).await?.1.is_empty() {
            return Ok(None);
        }
        left.push(table.to_string());
    }
    Ok(Some((Start::Resume { snapshot, confirmed: slot.health.confirmed_flush_lsn }, left)))
}

/// Brings publication, topics, and slot or connector to what the configuration says, without starting to stream; the same checks as a start.
/// What is there already stays as it is, so a second call changes nothing. With `dry_run` only says what it would do.
pub async fn apply(
    source: &Secret,
    state: &Secret,
    kafka: impl Into<stream::Access>,
    stream: &stream::Config,
    config: &Config,
    dry_run: bool,
) -> Result<Applied, Error> {
    let source = Source::new(source)?;
    let registrar = match config.engine {
        Engine::Native => None,
        Engine::Debezium => Some(Registrar::new(&source, config)?),
    };
    if let Some(registrar) = &registrar {
        registrar.require_plugin().await?;
    }
    let mut connection = source.connect().await?;
    catalog::check_server(&mut connection).await?;
    let wanted = catalog::wanted_tables(&mut connection, config).await?;
    let progress = Store::look(state, &config.topic_prefix).await?;
    let found = slot::find(&mut connection, &config.slot).await?;
    // Only our own engine keeps book of the slot; the connector keeps its own.
    let start = match config.engine {
        Engine::Native => Some(slot::decide(&config.slot, &source.database, found.as_ref(), progress.as_ref())?),
        Engine::Debezium => None,
    };
    let registered = match &registrar {
        Some(registrar) => Some(registrar.look(found.clone(), progress.as_ref()).await?),
        None => None,
    };
    let resuming = match &registered {
        Some(found) => found.start != registration::Start::Fresh,
        None => matches!(start, Some(Start::Resume { .. })),
    };
    if !resuming && config.snapshot == SnapshotMode::Initial {
        catalog::require_readable(&mut connection, &wanted).await?;
    }
    let published = publish(&mut connection, config, &wanted, resuming, dry_run).await?;

    let topics = Topics::new(&config.topic_prefix);
    let asking = topics::Topics::connect(kafka)?;
    let existing = asking.partitions().await?;
    let missing = wanted_topics(&topics, &published.captured, stream).into_iter().map(|it| it.topic);
    let topics_created: Vec<String> = missing.filter(|topic| !existing.iter().any(|(name, _)| name == topic)).collect();
    asking.require_single(&topics.boundaries()).await?;
    if !dry_run {
        ensure_topics(&asking, &topics, &published.captured, stream).await?;
    }
    let slot_step = match (&start, &found) {
        (Some(Start::Fresh), _) if dry_run => SlotStep::Made { lsn: None },
        (Some(Start::Fresh), _) => {
            tracing::info!(slot = config.slot, "the slot is being made; it waits for transactions that are open on the source");
            let mut store = Store::open(state, &config.topic_prefix).await?;
            let made = make_slot(&mut store, &source, config).await?;
            if config.snapshot == SnapshotMode::Never {
                // There is nothing to read before the first change.
                store.finish(&[]).await?;
            }
            store.close().await;
            SlotStep::Made { lsn: Some(made.consistent_point) }
        }
        (_, Some(found)) => SlotStep::Kept { confirmed: found.health.confirmed_flush_lsn, active: found.health.active },
        // Nothing but a missing slot begins anew.
        (Some(_), None) => SlotStep::Made { lsn: None },
        (None, None) => SlotStep::LeftToConnector,
    };
    let connector = match registrar.as_ref().zip(registered.as_ref()) {
        Some((registrar, found)) if dry_run => Some(registrar.rehearse(found, &published.captured).await?),
        Some((registrar, found)) => {
            let mut store = Store::open(state, &config.topic_prefix).await?;
            let step = registrar.register(&mut connection, &mut store, found, &published.captured).await?;
            store.close().await;
            Some(step)
        }
        None => None,
    };
    let _ = connection.close().await;
    Ok(Applied {
        engine: config.engine,
        dry_run,
        publication: config.publication.clone(),
        publication_created: published.created,
        tables_added: published.added,
        tables_left_out: published.uncaptured,
        topics_created,
        slot: config.slot.clone(),
        slot_step,
        connector,
        snapshot_comes: !resuming && config.snapshot == SnapshotMode::Initial,
    })
}
