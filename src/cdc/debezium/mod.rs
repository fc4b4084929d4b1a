//! The capture by Debezium: a connector in Kafka Connect, registered, watched and mended over its REST.
//!
//! The rows never pass us. What the stage owns is the connector's settings, the publication and the topics; the slot and the
//! offsets are the connector's. The connector outlives this process: when the stage ends, it goes on, and the next start finds it.
//!
//! Connect says RUNNING while PostgreSQL is away, so its word alone is not health: the slot (read or not, and how far), the
//! heartbeats and the offsets are looked at as well. The snapshot is over once Connect has written an offset behind it, which it
//! does only when the broker has acknowledged every row before; a snapshot that was cut short, and that Debezium took again without
//! the snapshot its slot exported, is begun anew from the slot on.

pub(super) mod admin;
mod failure;
mod opening;
mod reading;
pub(super) mod registration;
mod rest;
mod settings;
mod supervision;
mod watching;

use std::time::Duration;

use self::rest::{Part, Rest, Status};
use super::{
    Config, SnapshotMode,
    error::Error,
    patience::Patience,
    source::Source,
    stats::{Connector, ConnectorTask, Stats, Step},
};
use crate::{
    change::{Lsn, Topics},
    fault::chain,
    latency::Histogram,
    secret::Secret,
    stage::Control,
    stream,
};

const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// Supervises the connector until stopped. The connector itself goes on.
pub(super) async fn run(
    source: Secret,
    state: Secret,
    kafka: stream::Access,
    stream: stream::Config,
    config: Config,
    mut control: Control<Stats>,
) -> Result<(), Error> {
    let source = Source::new(&source)?;
    let mut capture = Capture {
        rest: admin::client(&source, &config)?,
        source,
        state,
        kafka,
        stream,
        topics: Topics::new(&config.topic_prefix),
        config,
        watched: false,
        last_end: Lsn(0),
        latency: Histogram::default(),
        stats: control.stats.borrow().clone(),
    };
    let mut patience = Patience::new(RETRY_FIRST, RETRY_MAX);
    loop {
        let Err(error) = capture.session(&mut control).await else { return Ok(()) };
        let Some(delay) = patience.after(std::mem::take(&mut capture.watched), &error) else { return Err(error) };
        tracing::warn!(error = chain(&error), ?delay, "the connector is not looked after, trying again");
        capture.stats.reconnects += 1;
        capture.tell(&control, Step::Connecting, Some(chain(&error)));
        tokio::select! {
            () = control.stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(delay) => {}
        }
    }
}

struct Capture {
    rest: Rest,
    source: Source,
    state: Secret,
    kafka: stream::Access,
    stream: stream::Config,
    topics: Topics,
    config: Config,
    /// Whether the connector is registered and watched, or was when the session broke.
    watched: bool,
    /// Up to here commits are counted; what comes again is not.
    last_end: Lsn,
    latency: Histogram,
    stats: Stats,
}

impl Capture {
    fn name(&self) -> &str {
        settings::connector_name(&self.config)
    }

    /// One registration's life: Ok when stopped.
    async fn session(&mut self, control: &mut Control<Stats>) -> Result<(), Error> {
        self.tell(control, Step::Connecting, None);
        let stop = control.stop.clone();
        let opened = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            opened = self.open(control) => opened?,
        };
        self.watched = true;
        let ended = tokio::select! {
            () = stop.cancelled() => Ok(()),
            ended = self.supervise(opened, control) => ended,
        };
        if ended.is_ok() {
            self.tell(control, Step::Stopped, None);
        }
        ended
    }

    fn takes_snapshot(&self) -> bool {
        self.config.snapshot == SnapshotMode::Initial
    }

    fn tell(&mut self, control: &Control<Stats>, step: Step, waiting_for: Option<String>) {
        self.stats.step = step;
        self.stats.waiting_for = waiting_for;
        self.publish(control);
    }

    fn publish(&self, control: &Control<Stats>) {
        control.stats.send_replace(self.stats.clone());
    }
}

/// What an operator sees of Connect's status.
fn connector_of(rest: &Rest, name: &str, status: &Status) -> Connector {
    let trace = |part: &Part| part.trace.as_deref().map(|it| failure::summary(rest, it));
    let task = |part: &Part| ConnectorTask { id: part.id, state: part.state.clone(), worker: part.worker_id.clone(), trace: trace(part) };
    Connector { name: name.to_owned(), state: status.connector.state.clone(), trace: trace(&status.connector), tasks: status.tasks.iter().map(task).collect() }
}
