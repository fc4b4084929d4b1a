//! The one owner of everything on disk: a thread that takes jobs, carries out as many as are waiting, flushes once for
//! all of them, and then answers.
//!
//! That flush is the group commit: while the disk works for one round, the next one gathers in the queue. Nothing is
//! answered, and nothing becomes readable, before the disk has it.

mod admin;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use kafka_protocol::ResponseError;
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    Config, Error, Health, Stats,
    batch::Batch,
    catalog::{self, Catalog, topic_dir},
    offsets::{Offsets, Position, Positions, ProducerIds},
    partition::{Limits, Partition, Refusal, View},
    segment::{replace, sync_dir, wide},
    tell,
};
use crate::units::bytes_for_people;

/// Jobs that may wait; beyond it a client's next request waits in its socket.
const JOBS_MAX: usize = 1_024;
/// A round ends when it has taken this much, so that the first in it does not wait for ever.
const ROUND_BYTES_MAX: u64 = 16 << 20;

/// What readers see: every topic by name.
pub(super) type Topics = BTreeMap<String, TopicView>;
/// Offsets that retention must not pass, by topic and partition.
pub(super) type Holds = BTreeMap<String, BTreeMap<i32, i64>>;
/// Whether a topic has a reader that may not have come yet.
pub(super) type Awaited = Box<dyn Fn(&str) -> bool + Send>;

#[derive(Debug)]
pub(super) struct TopicView {
    pub(super) partitions: Vec<watch::Receiver<View>>,
    pub(super) configs: BTreeMap<String, String>,
    pub(super) limits: Limits,
}

/// One batch for one partition.
#[derive(Debug)]
pub(super) struct Append {
    pub(super) topic: String,
    pub(super) partition: i32,
    pub(super) batch: Batch,
}

/// Where an acknowledged batch begins, and where its log does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Appended {
    pub(super) base_offset: i64,
    pub(super) log_start: i64,
}

pub(super) type Appends = Vec<Result<Appended, ResponseError>>;
type After = Box<dyn FnOnce(&Flushed) + Send>;

enum Job {
    Append(Vec<Append>, oneshot::Sender<Appends>),
    /// Do this, and after the flush that.
    Ask(Box<dyn FnOnce(&mut Store) -> After + Send>),
    Upkeep,
}

/// The store has ended: the broker is stopping.
#[derive(Debug)]
pub(super) struct Closed;

/// How others reach the store.
#[derive(Clone)]
pub(super) struct Handle {
    jobs: mpsc::Sender<Job>,
    pub(super) topics: watch::Receiver<Arc<Topics>>,
}

impl Handle {
    /// Puts batches into the queue; the answer comes once they are durable. Two calls, one after the other, keep their order.
    pub(super) async fn append(&self, appends: Vec<Append>) -> Result<oneshot::Receiver<Appends>, Closed> {
        let (answer, answered) = oneshot::channel();
        self.jobs.send(Job::Append(appends, answer)).await.map_err(|_| Closed)?;
        Ok(answered)
    }

    /// Lets the store do something and answer after the next flush.
    pub(super) async fn ask<R: Send + 'static>(&self, work: impl FnOnce(&mut Store) -> R + Send + 'static) -> Result<R, Closed> {
        let (answer, answered) = oneshot::channel();
        let job = Job::Ask(Box::new(move |store| {
            let said = work(store);
            Box::new(move |_| tell(answer, said))
        }));
        self.jobs.send(job).await.map_err(|_| Closed)?;
        answered.await.map_err(|_| Closed)
    }

    /// Puts a group's positions into the queue; answers whether they are durable.
    pub(super) async fn commit(&self, group: String, positions: Vec<((String, i32), Position)>, answer: oneshot::Sender<bool>) -> Result<(), Closed> {
        let job = Job::Ask(Box::new(move |store| {
            let written = store.offsets.commit(&group, &positions);
            let written = written.inspect_err(|error| store.trouble(error)).is_ok();
            Box::new(move |flushed| tell(answer, written && flushed.offsets))
        }));
        self.jobs.send(job).await.map_err(|_| Closed)
    }

    /// Reminds the store to delete what is old and to look whether the disk is well again.
    pub(super) async fn upkeep(&self) -> Result<(), Closed> {
        self.jobs.send(Job::Upkeep).await.map_err(|_| Closed)
    }
}

/// What the flush at the end of a round achieved.
struct Flushed {
    /// Partitions whose appends of this round do not exist.
    failed: BTreeSet<(String, i32)>,
    offsets: bool,
}

/// Answers that wait for the flush.
#[derive(Default)]
struct Round {
    bytes: u64,
    appends: Vec<Carried>,
    afters: Vec<After>,
    room: Option<bool>,
}

struct Topic {
    limits: Limits,
    partitions: Vec<Partition>,
}

/// A produce request that has been carried out.
struct Carried {
    /// Each batch's topic, partition and length.
    lanes: Vec<(String, i32, u64)>,
    results: Appends,
    answer: oneshot::Sender<Appends>,
}

/// Everything the broker keeps.
pub(super) struct Store {
    dir: PathBuf,
    free_min: u64,
    limits: Limits,
    catalog: Catalog,
    topics: BTreeMap<String, Topic>,
    offsets: Offsets,
    producer_ids: ProducerIds,
    holds: Arc<watch::Sender<Holds>>,
    saved_holds: Holds,
    awaited: Awaited,
    views: watch::Sender<Arc<Topics>>,
    health: watch::Sender<Health>,
    stats: Arc<watch::Sender<Stats>>,
    /// Held for as long as we live: two brokers in one directory would tear each other's logs.
    _lock: File,
}

/// The store's ends that others hold.
pub(super) struct Opened {
    pub(super) store: Store,
    pub(super) cluster_id: String,
    pub(super) holds: Arc<watch::Sender<Holds>>,
    pub(super) health: watch::Receiver<Health>,
}

impl Store {
    /// Opens all logs. Blocking; as long as the newest segment of each partition takes to read.
    pub(super) fn open(config: &Config, stats: Arc<watch::Sender<Stats>>, awaited: Awaited) -> Result<Opened, Error> {
        let dir = &config.dir;
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Open { path, source }
        };
        fs::create_dir_all(dir.join("logs")).map_err(at(dir))?;
        let lock = File::create(dir.join("broker.lock")).map_err(at(dir))?;
        lock.try_lock().map_err(|_| Error::InUse { path: dir.clone() })?;
        let catalog = Catalog::open(dir, format!("{:016x}", now_ms())).map_err(at(&dir.join("topics.json")))?;
        let limits = config.limits();
        let mut topics = BTreeMap::new();
        for (name, entry) in &catalog.topics {
            let path = topic_dir(dir, name, entry.incarnation);
            let limits = catalog::limits(&entry.configs, &limits).unwrap_or(limits);
            topics.insert(name.clone(), Topic { limits, partitions: open_partitions(&path, 0..entry.partitions).map_err(at(&path))? });
        }
        sweep(dir, &catalog).map_err(at(dir))?;
        let offsets = Offsets::open(dir, now_ms()).map_err(at(&dir.join("offsets.log")))?;
        let producer_ids = ProducerIds::open(dir).map_err(at(&dir.join("producer-ids")))?;
        let saved_holds = read_holds(dir).map_err(at(&dir.join("holds.json")))?;
        let holds = Arc::new(watch::channel(saved_holds.clone()).0);
        let (health, health_seen) = watch::channel(Health::Well);
        let cluster_id = catalog.cluster_id.clone();
        let store = Self {
            dir: dir.clone(),
            free_min: config.free_min.0,
            limits,
            catalog,
            topics,
            offsets,
            producer_ids,
            holds: Arc::clone(&holds),
            saved_holds,
            awaited,
            views: watch::channel(Arc::default()).0,
            health,
            stats,
            _lock: lock,
        };
        store.publish();
        store.count_logs();
        Ok(Opened { store, cluster_id, holds, health: health_seen })
    }

    /// Starts the thread. It ends when the last handle is gone; `ended` then resolves.
    pub(super) fn spawn(self) -> io::Result<(Handle, oneshot::Receiver<()>)> {
        let (jobs, queue) = mpsc::channel(JOBS_MAX);
        let (end, ended) = oneshot::channel();
        let topics = self.views.subscribe();
        std::thread::Builder::new().name("kafka-store".to_owned()).spawn(move || {
            self.run(queue);
            tell(end, ());
        })?;
        Ok((Handle { jobs, topics }, ended))
    }

    fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        while let Some(first) = queue.blocking_recv() {
            let mut round = Round::default();
            self.take(first, &mut round);
            while round.bytes < ROUND_BYTES_MAX
                && let Ok(job) = queue.try_recv()
            {
                self.take(job, &mut round);
            }
            let flushed = self.flush();
            self.answer(round, &flushed);
        }
        self.save_holds();
    }

    fn take(&mut self, job: Job, round: &mut Round) {
        match job {
            Job::Append(appends, answer) => {
                let room = *round.room.get_or_insert_with(|| self.has_room());
                let now_ms = now_ms();
                let results = appends.iter().map(|it| if room { self.append(it, now_ms) } else { Err(ResponseError::KafkaStorageError) }).collect();
                let lanes: Vec<_> = appends.into_iter().map(|it| (it.topic, it.partition, wide(it.batch.header.length))).collect();
                round.bytes += lanes.iter().map(|it| it.2).sum::<u64>();
                round.appends.push(Carried { lanes, results, answer });
            }
            Job::Ask(work) => round.afters.push(work(self)),
            Job::Upkeep => self.upkeep(),
        }
    }

    fn append(&mut self, append: &Append, now_ms: i64) -> Result<Appended, ResponseError> {
        let topic = self.topics.get_mut(&append.topic).ok_or(ResponseError::UnknownTopicOrPartition)?;
        let partition = usize::try_from(append.partition).ok().and_then(|it| topic.partitions.get_mut(it));
        let partition = partition.ok_or(ResponseError::UnknownTopicOrPartition)?;
        match partition.append(&append.batch, &topic.limits, now_ms) {
            Ok(base_offset) => Ok(Appended { base_offset, log_start: partition.start() }),
            Err(Refusal::Protocol(error)) => Err(error),
            Err(Refusal::Storage(error)) => {
                self.trouble(&error);
                Err(ResponseError::KafkaStorageError)
            }
        }
    }

    fn flush(&mut self) -> Flushed {
        let mut flushed = Flushed { failed: BTreeSet::new(), offsets: true };
        let mut errors = Vec::new();
        for (name, topic) in &mut self.topics {
            for (n, partition) in (0..).zip(&mut topic.partitions) {
                if let Err(error) = partition.settle() {
                    flushed.failed.insert((name.clone(), n));
                    errors.push(error);
                }
            }
        }
        if let Err(error) = self.offsets.flush() {
            flushed.offsets = false;
            errors.push(error);
        }
        errors.iter().for_each(|error| self.trouble(error));
        flushed
    }

    fn answer(&self, round: Round, flushed: &Flushed) {
        let (mut batches, mut bytes) = (0, 0);
        for Carried { lanes, mut results, answer } in round.appends {
            for ((topic, partition, length), result) in lanes.into_iter().zip(&mut results) {
                if flushed.failed.contains(&(topic, partition)) {
                    *result = Err(ResponseError::KafkaStorageError);
                }
                if result.is_ok() {
                    batches += 1;
                    bytes += length;
                }
            }
            tell(answer, results);
        }
        round.afters.into_iter().for_each(|after| after(flushed));
        if batches > 0 {
            self.stats.send_modify(|it| {
                it.batches_in += batches;
                it.bytes_in += bytes;
            });
        }
    }

    fn upkeep(&mut self) {
        let now_ms = now_ms();
        self.save_holds();
        let mut errors = Vec::new();
        for (name, topic) in &mut self.topics {
            let holds = self.saved_holds.get(name);
            let unheard = (self.awaited)(name).then_some(0);
            for (n, partition) in (0..).zip(&mut topic.partitions) {
                let hold = holds.and_then(|it| it.get(&n)).copied().or(unheard);
                errors.extend(partition.retain(&topic.limits, hold, now_ms).err());
            }
        }
        errors.extend(self.offsets.upkeep(now_ms).err());
        errors.iter().for_each(|error| self.trouble(error));
        if errors.is_empty() && *self.health.borrow() != Health::Well && self.has_room() && self.can_write() {
            tracing::info!(dir = %self.dir.display(), "the broker's disk takes records again");
            self.health.send_replace(Health::Well);
        }
        self.count_logs();
    }

    fn count_logs(&self) {
        let bytes = self.topics.values().flat_map(|it| &it.partitions).map(|it| it.view().borrow().bytes()).sum();
        let partitions = self.topics.values().map(|it| it.partitions.len()).sum();
        self.stats.send_modify(|it| (it.log_bytes, it.topics, it.partitions) = (bytes, self.topics.len(), partitions));
    }

    /// Whether the disk has more free space than we must leave to others.
    fn has_room(&mut self) -> bool {
        // A file system that cannot say is asked by writing.
        let free_bytes = rustix::fs::statvfs(&self.dir).map_or(u64::MAX, |it| it.f_bavail.saturating_mul(it.f_frsize));
        let room = free_bytes >= self.free_min;
        if !room {
            self.report_full(free_bytes);
        }
        room
    }

    fn can_write(&self) -> bool {
        let probe = self.dir.join("probe");
        let written = fs::write(&probe, [0; 4096]).and_then(|()| File::open(&probe)?.sync_all());
        written.is_ok() & fs::remove_file(&probe).is_ok()
    }

    fn trouble(&self, error: &io::Error) {
        let full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge);
        let free_bytes = || rustix::fs::statvfs(&self.dir).map_or(0, |it| it.f_bavail.saturating_mul(it.f_frsize));
        if full {
            self.report_full(free_bytes());
        } else {
            self.report(format!("the disk of {} fails ({error}): records are refused until it works again", self.dir.display()));
        }
    }

    fn report_full(&self, free_bytes: u64) {
        let (dir, free) = (self.dir.display(), bytes_for_people(free_bytes));
        self.report(format!("the disk of {dir} is full ({free} free): records are refused until you free space, none are lost"));
    }

    /// Said once, however the reason goes on: how much is free changes all the time.
    fn report(&self, reason: String) {
        self.health.send_if_modified(|it| {
            let new = *it == Health::Well;
            if new {
                tracing::error!(reason, "the embedded broker refuses records");
                *it = Health::Ailing(reason);
            }
            new
        });
    }

    fn save_holds(&mut self) {
        let holds = self.holds.borrow().clone();
        if holds == self.saved_holds {
            return;
        }
        let saved = serde_json::to_vec(&holds).map_err(io::Error::other).and_then(|text| replace(&self.dir.join("holds.json"), &text));
        match saved {
            Ok(()) => self.saved_holds = holds,
            // Retention goes by the saved ones, which are never further.
            Err(error) => self.trouble(&error),
        }
    }

    fn publish(&self) {
        let view = |name: &String, topic: &Topic| TopicView {
            partitions: topic.partitions.iter().map(Partition::view).collect(),
            configs: self.catalog.topics.get(name).map(|it| it.configs.clone()).unwrap_or_default(),
            limits: topic.limits,
        };
        let topics = self.topics.iter().map(|(name, topic)| (name.clone(), view(name, topic))).collect();
        self.views.send_replace(Arc::new(topics));
    }
}

fn open_partitions(topic_dir: &Path, which: std::ops::Range<i32>) -> io::Result<Vec<Partition>> {
    let partitions: Vec<Partition> = which.map(|n| Partition::open(&topic_dir.join(n.to_string()), now_ms())).collect::<Result<_, _>>()?;
    sync_dir(topic_dir)?;
    Ok(partitions)
}

/// Removes what a crash left of topics that were being created or deleted.
fn sweep(dir: &Path, catalog: &Catalog) -> io::Result<()> {
    let known: BTreeSet<PathBuf> = catalog.topics.iter().map(|(name, entry)| topic_dir(dir, name, entry.incarnation)).collect();
    for entry in fs::read_dir(dir.join("logs"))? {
        let path = entry?.path();
        if !known.contains(&path) {
            tracing::info!(path = %path.display(), "removing what is left of a deleted topic");
            fs::remove_dir_all(path)?;
        }
    }
    Ok(())
}

fn read_holds(dir: &Path) -> io::Result<Holds> {
    match fs::read(dir.join("holds.json")) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Holds::default()),
        Err(error) => Err(error),
    }
}

pub(super) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
