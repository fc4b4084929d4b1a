//! Up to the registered connector: everything that must be so is asked or made first, each step so that a crash behind it is seen.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::{
    Capture,
    admin::{set_going, stand_still},
    reading::{self, Told},
    registration::{Registrar, Start},
    watching::{self, Seen},
};
use crate::{
    cdc::{
        catalog,
        error::Error,
        health::{self, Health},
        prepare,
        progress::Store,
        slot,
        stats::Stats,
    },
    change::{Lsn, TableId},
    stage::{Control, Phase},
    stream::{Lane, follow::Follower, topics},
};

/// Everything that is watched: ended by being dropped.
pub(super) struct Open {
    pub(super) follower: Follower<Told>,
    pub(super) health: watch::Receiver<Option<Health>>,
    pub(super) seen: watch::Receiver<Option<Seen>>,
    pub(super) asking: topics::Topics,
    pub(super) tables: BTreeSet<TableId>,
    /// The snapshot while it is not finished.
    pub(super) snapshot: Option<Reading>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

/// A snapshot on its way.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// Rows by where the snapshot that read them stood: more than one means that one was cut short.
    pub(super) attempts: BTreeMap<Lsn, BTreeMap<Lane, u64>>,
    /// How far each lane was read along.
    pub(super) read: BTreeMap<Lane, i64>,
    /// Where the lanes ended when Connect first had an offset behind the snapshot.
    pub(super) ends: Option<Vec<(Lane, i64)>>,
    /// Attempts up to here were given up, with their slot.
    pub(super) given_up: Lsn,
    /// Where the slot began, if it was seen before anything moved it.
    pub(super) slot_began: Option<Lsn>,
}

impl Capture {
    pub(super) async fn open(&mut self, control: &Control<Stats>) -> Result<Open, Error> {
        // The connector works while nobody looks, and others are writing already: what it tells from this moment on is counted.
        let asking = topics::Topics::connect(&self.kafka)?;
        let sampling = self.boundaries_from.is_none().then(|| {
            let (asking, boundaries) = (asking.clone(), BTreeSet::from([self.topics.boundaries()]));
            AbortOnDropHandle::new(tokio::spawn(async move { asking.watermarks(boundaries).await }))
        });
        let registrar = Registrar { rest: self.rest.clone(), source: &self.source, config: &self.config };
        registrar.require_plugin().await?;
        let mut connection = self.source.connect().await?;
        catalog::check_server(&mut connection).await?;
        let mut store = Store::open(&self.state, &self.config.topic_prefix).await?;
        let wanted = catalog::wanted_tables(&mut connection, &self.config).await?;
        let progress = store.read().await?;
        let slot = slot::find(&mut connection, &self.config.slot).await?;
        let found = registrar.look(slot, progress.as_ref()).await?;
        if let Some(sampling) = sampling {
            let marks = sampling.await.map_err(|_| Error::Panicked)??;
            self.boundaries_from = marks.first().map(|(_, marks)| marks.end);
        }
        let start = found.start;
        if start != Start::Resume && self.takes_snapshot() {
            // Debezium would try for ever, and Connect call that RUNNING.
            catalog::require_readable(&mut connection, &wanted).await?;
        }
        let published = prepare::publish(&mut connection, &self.config, &wanted, start != Start::Fresh, false).await?;
        self.stats.uncaptured = published.uncaptured;
        let tables = published.captured;
        prepare::ensure_topics(&asking, &self.topics, &tables, &self.stream).await?;
        // Before the connector writes: what it does now is counted from its first record on.
        let follower = self.follow(&asking, &tables, start != Start::Resume).await?;
        registrar.register(&mut connection, &mut store, &found, &tables).await?;
        store.close().await;
        // The offsets outlive a connector that somebody deleted; without them Debezium would read everything again.
        if start == Start::Resume && self.rest.offset(self.name()).await?.is_none() {
            return Err(Error::OffsetsMissing { connector: self.name().to_owned() });
        }
        if *control.wanted.borrow() == Phase::Running {
            set_going(&self.rest, self.name()).await?;
        }
        tracing::info!(connector = self.name(), tables = tables.len(), ?start, "the connector is looked after");
        Ok(self.watch(follower, asking, tables, (start != Start::Resume).then(Reading::default)))
    }

    fn watch(&self, follower: Follower<Told>, asking: topics::Topics, tables: BTreeSet<TableId>, snapshot: Option<Reading>) -> Open {
        let (health_in, health) = watch::channel(None);
        let (seen_in, seen) = watch::channel(None);
        let looking =
            AbortOnDropHandle::new(tokio::spawn(health::watch(self.source.clone(), self.config.slot.clone(), self.config.publication.clone(), health_in)));
        let asking_connect = AbortOnDropHandle::new(tokio::spawn(watching::watch(self.rest.clone(), self.name().to_owned(), seen_in)));
        Open { follower, health, seen, asking, tables, snapshot, _tasks: [looking, asking_connect] }
    }

    /// Reads along: the transaction topic from where it was left, the heartbeats from now on, the tables from their beginning while the snapshot is read.
    async fn follow(&self, asking: &topics::Topics, tables: &BTreeSet<TableId>, with_tables: bool) -> Result<Follower<Told>, Error> {
        let boundaries = self.topics.boundaries();
        let signs = BTreeSet::from([boundaries.clone(), self.topics.heartbeat()]);
        let from = |lane: &Lane, marks: &topics::Watermarks| match self.boundaries_from {
            Some(from) if *lane.topic == *boundaries => from.clamp(marks.first, marks.end),
            _ => marks.end,
        };
        let mut lanes: Vec<(Lane, i64)> = asking.watermarks(signs).await?.into_iter().map(|(lane, marks)| (lane.clone(), from(&lane, &marks))).collect();
        if with_tables {
            let topics = tables.iter().map(|it| self.topics.table(it)).collect();
            lanes.extend(asking.watermarks(topics).await?.into_iter().map(|(lane, marks)| (lane, marks.first)));
        }
        let topics = self.topics.clone();
        Ok(Follower::start(&self.kafka, &lanes, move |message| reading::told(&topics, message))?)
    }

    /// Takes the snapshot anew, from a new slot on: what was read without the snapshot that the slot exported may miss changes.
    pub(super) async fn begin_over(&mut self) -> Result<(), Error> {
        tracing::warn!(connector = self.name(), "the snapshot was cut short and read again beside its slot; starting over");
        let name = self.name().to_owned();
        stand_still(&self.rest, &name).await?;
        let mut connection = self.source.connect().await?;
        if slot::wait_until_free(&mut connection, &self.config.slot, drop).await?.is_some() {
            slot::drop_slot(&mut connection, &self.config.slot).await?;
        }
        let mut store = Store::open(&self.state, &self.config.topic_prefix).await?;
        store.begin(&self.config.slot).await?;
        store.close().await;
        self.rest.forget_offsets(&name).await?;
        self.rest.resume(&name).await
    }
}
