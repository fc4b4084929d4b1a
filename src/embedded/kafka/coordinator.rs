//! The task that owns the consumer groups: takes what members say one after the other, and wakes for those who are silent.

use std::{
    collections::BTreeMap,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use kafka_protocol::ResponseError;
use tokio::sync::{mpsc, oneshot};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    group::{Group, Join, Joined, Reply, Speaker, Synced},
    offsets::Position,
    store, tell,
};

/// Requests that may wait; they take microseconds each.
const ASKS_MAX: usize = 1_024;
/// Groups with members at a time.
const GROUPS_MAX: usize = 10_000;

/// Who speaks, owned.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    pub(super) member_id: String,
    pub(super) instance_id: Option<String>,
    pub(super) generation: i32,
}

impl Identity {
    fn speaker(&self) -> Speaker<'_> {
        Speaker { member_id: &self.member_id, instance_id: self.instance_id.as_deref(), generation: self.generation }
    }
}

/// A group as an administrator sees it.
#[derive(Debug, Clone)]
pub(super) struct Described {
    pub(super) state: &'static str,
    pub(super) protocol_type: String,
    pub(super) protocol: String,
    pub(super) members: Vec<DescribedMember>,
}

#[derive(Debug, Clone)]
pub(super) struct DescribedMember {
    pub(super) member_id: String,
    pub(super) instance_id: Option<String>,
    pub(super) client_id: String,
    pub(super) metadata: Bytes,
    pub(super) assignment: Bytes,
}

type Waiting = Group<oneshot::Sender<Joined>, oneshot::Sender<Synced>>;
type Positions = Vec<((String, i32), Position)>;
type Departures = Vec<(String, Option<String>)>;

enum Ask {
    Join(String, Box<Join>, oneshot::Sender<Joined>),
    Sync(String, Identity, Vec<(String, Bytes)>, oneshot::Sender<Synced>),
    Heartbeat(String, Identity, oneshot::Sender<Result<(), ResponseError>>),
    Leave(String, Departures, oneshot::Sender<Vec<Result<(), ResponseError>>>),
    Commit(String, Identity, Positions, oneshot::Sender<Result<(), ResponseError>>),
    List(oneshot::Sender<Vec<(String, String, &'static str)>>),
    Describe(String, oneshot::Sender<Option<Described>>),
}

/// How connections reach the coordinator. Every answer is an error once the broker stops.
#[derive(Clone)]
pub(super) struct Handle(mpsc::Sender<Ask>);

impl Handle {
    pub(super) async fn join(&self, group: String, join: Join) -> Option<Joined> {
        self.ask(|answer| Ask::Join(group, Box::new(join), answer)).await
    }

    pub(super) async fn sync(&self, group: String, who: Identity, assignments: Vec<(String, Bytes)>) -> Option<Synced> {
        self.ask(|answer| Ask::Sync(group, who, assignments, answer)).await
    }

    pub(super) async fn heartbeat(&self, group: String, who: Identity) -> Option<Result<(), ResponseError>> {
        self.ask(|answer| Ask::Heartbeat(group, who, answer)).await
    }

    /// One answer per departure: member id, instance id.
    pub(super) async fn leave(&self, group: String, departures: Departures) -> Option<Vec<Result<(), ResponseError>>> {
        self.ask(|answer| Ask::Leave(group, departures, answer)).await
    }

    /// Resolves once the positions are durable.
    pub(super) async fn commit(&self, group: String, who: Identity, positions: Positions) -> Option<Result<(), ResponseError>> {
        self.ask(|answer| Ask::Commit(group, who, positions, answer)).await
    }

    /// Groups with members: name, protocol type, state.
    pub(super) async fn list(&self) -> Option<Vec<(String, String, &'static str)>> {
        self.ask(Ask::List).await
    }

    pub(super) async fn describe(&self, group: String) -> Option<Option<Described>> {
        self.ask(|answer| Ask::Describe(group, answer)).await
    }

    async fn ask<R>(&self, ask: impl FnOnce(oneshot::Sender<R>) -> Ask) -> Option<R> {
        let (answer, answered) = oneshot::channel();
        self.0.send(ask(answer)).await.ok()?;
        answered.await.ok()
    }
}

/// Starts the coordinator; it ends with `stop`.
pub(super) fn spawn(store: store::Handle, tasks: &TaskTracker, stop: CancellationToken) -> Handle {
    let (asks, queue) = mpsc::channel(ASKS_MAX);
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let coordinator = Coordinator { store, tasks: tasks.clone(), groups: BTreeMap::new(), started, n_ids: 0 };
    tasks.spawn(async move { stop.run_until_cancelled_owned(coordinator.run(queue)).await });
    Handle(asks)
}

struct Coordinator {
    store: store::Handle,
    tasks: TaskTracker,
    groups: BTreeMap<String, Waiting>,
    /// Makes member ids differ from those of an earlier broker.
    started: u128,
    n_ids: u64,
}

impl Coordinator {
    async fn run(mut self, mut queue: mpsc::Receiver<Ask>) {
        loop {
            let next = self.groups.values().filter_map(Group::next_deadline).min();
            let wake = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            // Both arms are cancel-safe: a queue's recv, and a sleep.
            tokio::select! {
                ask = queue.recv() => match ask {
                    Some(ask) => self.carry_out(ask).await,
                    None => return,
                },
                () = wake => {}
            }
            self.tick();
        }
    }

    async fn carry_out(&mut self, ask: Ask) {
        let now = Instant::now();
        match ask {
            Ask::Join(name, join, answer) => self.join(name, *join, answer, now),
            Ask::Sync(name, who, assignments, answer) => match self.groups.get_mut(&name) {
                Some(group) => group.sync(who.speaker(), assignments, answer, now),
                None => tell(answer, Synced { error: Some(ResponseError::UnknownMemberId), ..Synced::default() }),
            },
            Ask::Heartbeat(name, who, answer) => {
                let group = self.groups.get_mut(&name).ok_or(ResponseError::UnknownMemberId);
                tell(answer, group.and_then(|it| it.heartbeat(who.speaker(), now)));
            }
            Ask::Leave(name, departures, answer) => {
                let mut leave = |(member_id, instance_id): (String, Option<String>)| {
                    let group = self.groups.get_mut(&name).ok_or(ResponseError::UnknownMemberId);
                    group.and_then(|it| it.leave(&member_id, instance_id.as_deref(), now))
                };
                tell(answer, departures.into_iter().map(&mut leave).collect());
            }
            Ask::Commit(name, who, positions, answer) => self.commit(name, &who, positions, answer).await,
            Ask::List(answer) => {
                let groups = self.groups.iter().map(|(name, it)| (name.clone(), it.protocol_type.clone(), it.state.name()));
                tell(answer, groups.collect());
            }
            Ask::Describe(name, answer) => tell(answer, self.groups.get(&name).map(describe)),
        }
    }

    fn join(&mut self, name: String, join: Join, answer: oneshot::Sender<Joined>, now: Instant) {
        if self.groups.len() >= GROUPS_MAX && !self.groups.contains_key(&name) {
            let refused = Joined { error: Some(ResponseError::CoordinatorNotAvailable), generation: -1, ..Joined::default() };
            return tell(answer, refused);
        }
        self.n_ids += 1;
        let fresh_id = format!("{}-{:x}-{}", join.client_id, self.started, self.n_ids);
        self.groups.entry(name).or_insert_with(Group::new).join(join, fresh_id, answer, now);
    }

    /// Checked here and handed on in order, so that a commit of an old generation never lands behind one of a newer.
    async fn commit(&mut self, name: String, who: &Identity, positions: Positions, answer: oneshot::Sender<Result<(), ResponseError>>) {
        let allowed = match self.groups.get(&name) {
            Some(group) => group.may_commit(who.speaker()),
            None if who.generation < 0 => Ok(()),
            None => Err(ResponseError::IllegalGeneration),
        };
        if let Err(error) = allowed {
            return tell(answer, Err(error));
        }
        let (durable, is_durable) = oneshot::channel();
        let queued = self.store.commit(name, positions, durable).await;
        self.tasks.spawn(async move {
            let committed = queued.is_ok() && is_durable.await.unwrap_or(false);
            tell(answer, if committed { Ok(()) } else { Err(ResponseError::CoordinatorNotAvailable) });
        });
    }

    fn tick(&mut self) {
        let now = Instant::now();
        self.groups.retain(|_, group| {
            group.tick(now);
            for reply in group.take_replies() {
                match reply {
                    Reply::Joined(answer, joined) => tell(answer, joined),
                    Reply::Synced(answer, synced) => tell(answer, synced),
                }
            }
            !group.is_over()
        });
    }
}

fn describe(group: &Waiting) -> Described {
    let members = group.members.iter().map(|(id, it)| DescribedMember {
        member_id: id.clone(),
        instance_id: it.instance_id.clone(),
        client_id: it.client_id.clone(),
        metadata: it.protocols.iter().find(|(name, _)| *name == group.protocol).map(|(_, it)| it.clone()).unwrap_or_default(),
        assignment: it.assignment.clone(),
    });
    let (protocol_type, protocol) = (group.protocol_type.clone(), group.protocol.clone());
    Described { state: group.state.name(), protocol_type, protocol, members: members.collect() }
}
