//! Looks at slot, publication and WAL from outside, on its own connection, every two seconds.

use std::time::Duration;

use sqlx::PgConnection;
use tokio::sync::watch;

use super::{
    admin,
    error::Error,
    slot::{self, Slot},
    source::{self, Source},
};
use crate::change::Lsn;

const INTERVAL: Duration = Duration::from_secs(2);
/// A server that does not answer is not waited for: the stream itself will notice.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// What was seen last.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Health {
    pub(super) slot: Option<Slot>,
    pub(super) source_lsn: Lsn,
    pub(super) publication_exists: bool,
}

/// Samples until the receiver is gone; a failed sample is left out.
pub(super) async fn watch(source: Source, slot: String, publication: String, seen: watch::Sender<Option<Health>>) {
    let mut connection = None;
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = seen.closed() => return,
            _ = ticks.tick() => {}
        }
        let sampled = tokio::time::timeout(ANSWER_MAX, sample(&source, &slot, &publication, connection.take())).await;
        match sampled {
            Ok(Ok((health, open))) => {
                connection = Some(open);
                seen.send_replace(Some(health));
            }
            Ok(Err(error)) => tracing::debug!(%error, "the slot's health is not known"),
            Err(_) => tracing::debug!("the slot's health is not known: no answer"),
        }
    }
}

async fn sample(source: &Source, slot: &str, publication: &str, open: Option<PgConnection>) -> Result<(Health, PgConnection), Error> {
    let mut connection = match open {
        Some(open) => open,
        None => source.connect().await?,
    };
    let slot = slot::find(&mut connection, slot).await?;
    let source_lsn = source::flushed_wal(&mut connection).await?;
    let publication_exists = admin::publication_exists(&mut connection, publication).await?;
    Ok((Health { slot, source_lsn, publication_exists }, connection))
}
