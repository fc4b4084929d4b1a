//! Tables made while the stream flows: one that a pattern of `cdc.tables` names joins the publication while it is empty.
//!
//! PostgreSQL 15 and newer tell nobody that a table was made, so the catalog is asked, on a connection of its own.

use std::{collections::BTreeSet, time::Duration};

use sqlx::PgConnection;
use tokio::sync::watch;

use super::{Config, catalog, error::Error, prepare, source::Source};
use crate::{change::TableId, fault::chain};

const INTERVAL: Duration = Duration::from_secs(2);
/// A server that does not answer is not waited for: the stream itself will notice.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// The tables that are wanted, and those of them that have rows from before they could be captured.
#[derive(Debug, Default)]
pub(super) struct Joined {
    pub(super) tables: BTreeSet<TableId>,
    pub(super) uncaptured: Vec<String>,
}

/// Looks until the receiver is gone; where every table is named by itself there is nothing to look for.
pub(super) async fn watch(source: Source, config: Config, joined: watch::Sender<Joined>) {
    if !config.tables.iter().any(|it| it.contains('*')) {
        return joined.closed().await;
    }
    let mut connection = None;
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = joined.closed() => return,
            _ = ticks.tick() => {}
        }
        match tokio::time::timeout(ANSWER_MAX, look(&source, &config, &joined, connection.take())).await {
            Ok(Ok(open)) => connection = Some(open),
            Ok(Err(error)) => tracing::debug!(error = chain(&error), "new tables are not known"),
            Err(_) => tracing::debug!("new tables are not known: no answer"),
        }
    }
}

async fn look(source: &Source, config: &Config, joined: &watch::Sender<Joined>, open: Option<PgConnection>) -> Result<PgConnection, Error> {
    let mut connection = match open {
        Some(open) => open,
        None => source.connect().await?,
    };
    let tables = catalog::wanted_tables(&mut connection, config).await?;
    if tables != joined.borrow().tables {
        let uncaptured = prepare::publish(&mut connection, config, &tables, true, false).await?.uncaptured;
        joined.send_replace(Joined { tables, uncaptured });
        return Ok(connection);
    }
    let mut uncaptured = joined.borrow().uncaptured.clone();
    if !uncaptured.is_empty() {
        // One that is to be read again has joined the publication since.
        let published = catalog::published(&mut connection, &config.publication).await?.unwrap_or_default();
        uncaptured.retain(|name| !published.iter().any(|it| it.to_string() == *name));
        joined.send_if_modified(|it| {
            let changed = it.uncaptured != uncaptured;
            it.uncaptured = uncaptured;
            changed
        });
    }
    Ok(connection)
}
