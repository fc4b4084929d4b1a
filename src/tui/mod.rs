//! The console.

use std::{io, sync::Arc};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    cli::Look,
    pipeline::{Commander, snapshot::Snapshot},
};

/// What the console looks at, and whom it asks.
pub struct Watched {
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    pub commander: Commander,
    /// Whether leaving ends the pipeline (it runs in this process) or not (`attach`).
    pub owned: bool,
}

pub async fn run(_watched: Watched, _look: &Look, stop: &CancellationToken) -> io::Result<()> {
    stop.cancelled().await;
    Ok(())
}
