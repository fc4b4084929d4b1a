//! Looks at the connector from outside, every second, so that the stage never waits for Connect.

use std::time::Duration;

use tokio::sync::watch;

use super::rest::{Offset, Rest, Status};
use crate::{cdc::error::Error, fault::chain};

const INTERVAL: Duration = Duration::from_secs(1);

/// What was seen last.
#[derive(Debug, Clone)]
pub(super) enum Seen {
    /// Connect answered. No status: there is no such connector, or it was made a moment ago.
    Answered { status: Option<Status>, offset: Option<Offset> },
    /// It did not, and why.
    Away(String),
}

/// Samples until the receiver is gone.
pub(super) async fn watch(rest: Rest, name: String, seen: watch::Sender<Option<Seen>>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = seen.closed() => return,
            _ = ticks.tick() => {}
        }
        let asked = async { Ok::<_, Error>(Seen::Answered { status: rest.status(&name).await?, offset: rest.offset(&name).await? }) };
        seen.send_replace(Some(asked.await.unwrap_or_else(|error| Seen::Away(chain(&error)))));
    }
}
