//! What stands before anything is read, whichever engine reads: the publication of exactly the captured tables, and their topics.

use std::{collections::BTreeSet, num::NonZeroU32};

use sqlx::PgConnection;

use super::{Config, SnapshotMode, catalog, error::Error};
use crate::{
    change::{TableId, Topics},
    stream::{
        self,
        topics::{self, Wanted},
    },
};

/// What is captured, and what matches a pattern but cannot be.
#[derive(Debug, Default)]
pub(super) struct Published {
    pub(super) captured: BTreeSet<TableId>,
    pub(super) uncaptured: Vec<String>,
}

/// Makes or completes the publication. A pattern's table that cannot be captured is left out and told; `resuming`: the slot is there.
pub(super) async fn publish(connection: &mut PgConnection, config: &Config, wanted: &BTreeSet<TableId>, resuming: bool) -> Result<Published, Error> {
    let publication = &config.publication;
    let Some(published) = catalog::published(connection, publication).await? else {
        if resuming {
            return Err(Error::PublicationMissing { publication: publication.clone() });
        }
        catalog::create_publication(connection, publication, wanted).await?;
        return Ok(Published { captured: wanted.clone(), uncaptured: Vec::new() });
    };
    let mut captured = wanted.clone();
    let mut uncaptured = Vec::new();
    for table in wanted.difference(&published) {
        // Before the slot exists no change is missed; afterwards only a table without rows can join.
        let rows_are_missed = resuming && config.snapshot == SnapshotMode::Initial;
        if !catalog::publish(connection, publication, table, rows_are_missed).await? {
            if config.tables.contains(&table.to_string()) {
                return Err(Error::Uncaptured { table: table.to_string(), publication: publication.clone() });
            }
            tracing::warn!(%table, "left out: it has rows from before it was captured");
            captured.remove(table);
            uncaptured.push(table.to_string());
        }
    }
    Ok(Published { captured, uncaptured })
}

/// Makes the topics that are missing; the one whose order counts has one partition. The largest batch that all of them take, in bytes.
pub(super) async fn ensure_topics(asking: &topics::Topics, names: &Topics, tables: &BTreeSet<TableId>, stream: &stream::Config) -> Result<usize, Error> {
    let single = [names.boundaries(), names.heartbeat(), names.dead_letters(), format!("{}.message", names.prefix())];
    let single = single.into_iter().map(|topic| (topic, NonZeroU32::MIN));
    let by_table = tables.iter().map(|it| (names.table(it), stream.partitions));
    let wanted = single.chain(by_table).map(|(topic, partitions)| Wanted { topic, partitions, replication_factor: stream.replication_factor });
    let wanted: Vec<Wanted> = wanted.collect();
    let topics: Vec<String> = wanted.iter().map(|it| it.topic.clone()).collect();
    asking.ensure(wanted).await?;
    asking.require_single(&names.boundaries()).await?;
    Ok(asking.bytes_max(&topics).await?)
}
