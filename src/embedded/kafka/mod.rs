//! The embedded broker: Kafka's protocol in front of a durable log on this machine's disk.
//!
//! ```text
//!  socket ─► wire (frames, versions) ─► store: one thread, one flush for all who wait ─► segments
//!                │  └─► coordinator: one task, the consumer groups                          │
//!                └────────────◄──────────── read: batches as they lie on disk ◄─────────────┘
//! ```
//! It turns record batches into files, verbatim, and files into answers to fetches. It is for one machine: bound to
//! loopback, one broker, no replication, no transactions. Who outgrows it changes an address and runs Kafka.
//!
//! # Who owns what
//! The [`store`] thread owns everything on disk: topics, logs, committed offsets, producer ids. The [`coordinator`] task
//! owns the groups and their members. A connection owns its socket and its order of answers. Readers get views by
//! `watch`; nobody shares anything else.
//!
//! # After a crash
//! Every acknowledged record is there, with the offset it was acknowledged with: the acknowledgement comes after
//! `fdatasync`, and so does the moment a record can be read. What was not acknowledged may be there or not; an
//! idempotent producer that sends it again hears where it lies. A torn tail is cut at start. Committed offsets and
//! producer ids survive alike; members of groups join again.

mod batch;
mod catalog;
mod coordinator;
mod group;
mod offsets;
mod partition;
mod producers;
mod read;
mod segment;
mod store;
mod wire;

use std::{io, net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use super::Health;
use crate::{
    fault::{Diagnose, Fault},
    units::{Size, Span},
};

/// How often old segments are looked for, and a full disk is asked again.
const UPKEEP_EVERY: Duration = Duration::from_secs(1);

/// Settings of the embedded broker.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the logs lie; one broker at a time.
    pub dir: PathBuf,
    /// The loopback port; 0 chooses a free one at the first start and keeps it, because two data dirs may run side by side.
    pub port: u16,
    /// When a partition's oldest records may go.
    pub retention: Retention,
    /// A segment is finished at this size: the grain of retention, and the most a start reads again per partition.
    pub segment_bytes: Size,
    /// The largest batch a producer may send; larger ones are refused rather than held in memory.
    pub batch_bytes_max: Size,
    /// Records are refused while the disk has less free than this, so that PostgreSQL beside us can still write its WAL.
    pub free_min: Size,
    /// Connections at a time; the next one is closed again.
    pub connections_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            dir: PathBuf::from(".ledgerline/kafka"),
            port: 0,
            retention: Retention::default(),
            segment_bytes: Size(64 << 20),
            batch_bytes_max: Size(16 << 20),
            free_min: Size(64 << 20),
            connections_max: 500,
        }
    }
}

impl Config {
    fn limits(&self) -> partition::Limits {
        partition::Limits {
            segment_bytes: self.segment_bytes.0,
            retention_bytes: Some(self.retention.bytes.0),
            retention_ms: Some(i64::try_from(self.retention.age.as_millis()).unwrap_or(i64::MAX)),
        }
    }
}

/// When a partition's oldest segments may go; whichever comes first. What a reader still needs is held
/// ([`Broker::hold_retention`]) and stays, however old or big.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// Bytes per partition: the lake has every record for good, the log is only the way there and a past to look into.
    pub bytes: Size,
    /// Age of the newest record of a segment: Kafka's own week, long enough to look into what happened over a weekend.
    pub age: Span,
}

impl Default for Retention {
    fn default() -> Self {
        Self { bytes: Size(1 << 30), age: Span::from_secs(7 * 24 * 3_600) }
    }
}

/// What the broker has done since it started, and what it holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Stats {
    pub topics: usize,
    pub partitions: usize,
    /// On disk, all partitions together.
    pub log_bytes: u64,
    /// Acknowledged.
    pub batches_in: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub connections: usize,
}

/// Why the broker could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not open the broker's log at {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("another broker runs in {}", path.display())]
    InUse { path: PathBuf },
    #[error("could not listen on 127.0.0.1:{port}")]
    Listen { port: u16, source: io::Error },
    #[error("could not start the broker's thread")]
    Thread(#[source] io::Error),
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::Open { path, source } if source.kind() == io::ErrorKind::InvalidData => {
                Fault::Operator(format!("restore {} from a copy, or run `ledgerline reset` to begin anew", path.display()))
            }
            Self::Open { path, source } if source.kind() == io::ErrorKind::StorageFull => {
                Fault::Operator(format!("free space on the disk of {}", path.display()))
            }
            Self::Open { path, .. } => Fault::Operator(format!("make {} readable and writable for this user, or choose another data_dir", path.display())),
            Self::InUse { path } => Fault::Operator(format!("stop the broker that runs in {}, or choose another data_dir", path.display())),
            Self::Listen { port, source } if source.kind() == io::ErrorKind::AddrInUse => {
                Fault::Operator(format!("stop what listens on port {port}, or choose another embedded.kafka_port"))
            }
            Self::Listen { .. } => Fault::Operator("choose another embedded.kafka_port".to_owned()),
            Self::Thread(_) => Fault::Transient,
        }
    }
}

/// A running broker. Dropping it ends it as well, but only [`stop`](Self::stop) waits.
pub struct Broker {
    port: u16,
    holds: Arc<watch::Sender<store::Holds>>,
    health: watch::Receiver<Health>,
    stats: watch::Receiver<Stats>,
    tasks: TaskTracker,
    store_ended: oneshot::Receiver<()>,
    stop: DropGuard,
}

impl Broker {
    /// Opens the logs (cutting what a crash tore), binds the port, serves. Nothing is held but what it is told to hold.
    pub async fn start(config: Config) -> Result<Self, Error> {
        Self::start_holding(config, |_| false).await
    }

    /// As [`start`](Self::start), and retention keeps all of a topic that `awaited` says yes to, from its creation until
    /// [`hold_retention`](Self::hold_retention) tells how far its reader is: a reader that comes late finds everything.
    pub async fn start_holding(config: Config, awaited: impl Fn(&str) -> bool + Send + 'static) -> Result<Self, Error> {
        let (stats, stats_seen) = watch::channel(Stats::default());
        let stats = Arc::new(stats);
        let opening = (config.clone(), Arc::clone(&stats));
        let opened = tokio::task::spawn_blocking(move || store::Store::open(&opening.0, opening.1, Box::new(awaited))).await;
        let opened = opened.map_err(|error| Error::Thread(io::Error::other(error)))??;
        let listen = |source| Error::Listen { port: config.port, source };
        let (listener, port) = super::listen(config.port, &config.dir.join("port")).map_err(listen)?;
        let listener = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener)).map_err(listen)?;
        let (store, store_ended) = opened.store.spawn().map_err(Error::Thread)?;

        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let groups = coordinator::spawn(store.clone(), &tasks, stop.clone());
        tasks.spawn(upkeep(store.clone(), stop.clone()));
        let server = wire::Server { port, cluster_id: opened.cluster_id, batch_bytes_max: config.batch_bytes_max, store, groups, stats };
        tasks.spawn(wire::serve(listener, Arc::new(server), config.connections_max, tasks.clone(), stop.clone()));
        tasks.close();
        Ok(Self { port, holds: opened.holds, health: opened.health, stats: stats_seen, tasks, store_ended, stop: stop.drop_guard() })
    }

    /// `127.0.0.1:port`.
    pub fn address(&self) -> String {
        format!("{}:{}", Ipv4Addr::LOCALHOST, self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on retention keeps every record of this partition from `offset` on. Remembered across restarts, so that
    /// nothing is lost before the reader has started again; a deleted topic's holds go with it. An administrator who
    /// deletes records is obeyed all the same.
    pub fn hold_retention(&self, topic: &str, partition: i32, offset: i64) {
        self.holds.send_if_modified(|it| it.entry(topic.to_owned()).or_default().insert(partition, offset) != Some(offset));
    }

    /// How the broker is. The channel closes when it has ended.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    pub fn stats(&self) -> watch::Receiver<Stats> {
        self.stats.clone()
    }

    /// Answers what is being written, closes all connections, releases the port and the directory.
    pub async fn stop(self) {
        drop(self.stop);
        self.tasks.wait().await;
        // An error here says that the thread is gone, which is what we wait for.
        let _ = self.store_ended.await;
    }
}

async fn upkeep(store: store::Handle, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(UPKEEP_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let work = async {
        loop {
            ticks.tick().await;
            if store.upkeep().await.is_err() {
                return;
            }
        }
    };
    stop.run_until_cancelled(work).await;
}

/// Answers, unless the connection that asked is gone: then nobody waits any more.
fn tell<T>(answer: oneshot::Sender<T>, said: T) {
    let _ = answer.send(said);
}
