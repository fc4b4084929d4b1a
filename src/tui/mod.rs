//! Stub.
use std::{io, sync::Arc};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use crate::{cli::Look, pipeline::{Commander, snapshot::Snapshot}};
pub struct Watched { pub snapshots: watch::Receiver<Arc<Snapshot>>, pub commander: Commander, pub owned: bool }
pub async fn run(_: Watched, _: &Look, stop: &CancellationToken) -> io::Result<()> { stop.cancelled().await; Ok(()) }
