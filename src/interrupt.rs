//! ^C, SIGTERM and SIGHUP, as a token that every wait can listen to.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Cancelled by the first signal that asks this process to end.
///
/// In the console ^C is a key; SIGTERM and SIGHUP (a dead SSH connection) come here all the same.
pub fn token() -> CancellationToken {
    let token = CancellationToken::new();
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        match signal(kind) {
            Ok(mut signals) => {
                let token = token.clone();
                tokio::spawn(async move {
                    // Later signals are read and ignored: ending takes a moment, and half an end is worse.
                    while signals.recv().await.is_some() {
                        token.cancel();
                    }
                });
            }
            Err(error) => warn!(%error, ?kind, "cannot listen for a signal"),
        }
    }
    token
}
