//! The one writer of the index. Changes that arrive while a commit is being flushed form the next group.
//!
//! One commit of the index makes a whole group durable and visible; only then are its changes answered. Blob files are
//! durable before the index refers to them, and removed after it no longer does: a crash in between leaves an orphan,
//! never a hole.

use std::{fs::File, path::PathBuf, sync::Arc};

use tokio::sync::{mpsc, oneshot, watch};

use super::{
    blob::Blobs,
    change::{Aftermath, Change, Outcome, Refusal, Tables},
    index::{Broken, Index},
};
use crate::embedded::Health;

/// Changes in one group. More wait in the channel, and behind it in their connections.
const GROUP_MAX: usize = 256;

pub(super) struct Order {
    pub(super) change: Change,
    pub(super) answer: oneshot::Sender<Outcome>,
}

/// What the committer and the requests share.
pub(super) struct Base {
    pub(super) dir: PathBuf,
    pub(super) index: Index,
    pub(super) blobs: Blobs,
    pub(super) health: watch::Sender<Health>,
    /// Nothing that grows is taken while the disk has fewer bytes than this left.
    pub(super) reserve_bytes: u64,
}

impl Base {
    /// Whether there is room to grow; says so to the operator where there is not. One system call.
    pub(super) fn has_room(&self) -> bool {
        let roomy = match crate::embedded::free_bytes(&self.dir) {
            Ok(free) => free >= self.reserve_bytes,
            // A disk that does not tell is found out by writing.
            Err(_) => true,
        };
        if !roomy {
            self.ail(format!("the disk of {} is full: objects are refused until you free space, nothing is lost", self.dir.display()));
        }
        roomy
    }

    pub(super) fn ail(&self, reason: String) {
        let new = Health::Ailing(reason);
        self.health.send_if_modified(|health| {
            if *health == new {
                return false;
            }
            tracing::error!(reason = ?new, "the embedded object store refuses writes");
            *health = new;
            true
        });
    }

    fn recover(&self) {
        self.health.send_if_modified(|health| {
            if *health == Health::Well {
                return false;
            }
            tracing::info!("the embedded object store takes writes again");
            *health = Health::Well;
            true
        });
    }
}
/// Takes orders until every sender is gone. Blocks: lives on a thread of its own.
pub(super) fn run(base: &Arc<Base>, mut orders: mpsc::Receiver<Order>) {
    let mut group = Vec::with_capacity(GROUP_MAX);
    while orders.blocking_recv_many(&mut group, GROUP_MAX) > 0 {
        settle(base, group.drain(..));
    }
    base.index.close();
}

fn settle(base: &Base, group: impl Iterator<Item = Order>) {
    let mut answers = Vec::new();
    let mut after = Aftermath::default();
    match commit(base, group, &mut answers, &mut after) {
        Ok(()) => {
            for draft in after.drafts {
                draft.keep();
            }
            // Nobody waits for an answer he no longer wants.
            answers.into_iter().for_each(|(answer, outcome)| drop(answer.send(outcome)));
            for id in after.doomed {
                base.blobs.remove(id);
            }
        }
        Err(error) => {
            let refusal = match &error {
                Broken::Full(_) => Refusal::Full,
                other => Refusal::Broken(crate::fault::chain(other)),
            };
            base.ail(format!("the index in {} cannot be written: {}", base.dir.display(), crate::fault::chain(&error)));
            if let Err(error) = base.index.reopen() {
                tracing::warn!(error = %crate::fault::chain(&error), "the index of the object store could not be opened again yet");
            }
            for draft in after.drafts {
                // A commit that failed may still have reached the disk: only what is surely not referred to is removed.
                if !matches!(base.index.refers_to(draft.id), Ok(false)) {
                    draft.keep();
                }
            }
            answers.into_iter().for_each(|(answer, _)| drop(answer.send(Err(refusal.clone()))));
        }
    }
}

type Answers = Vec<(oneshot::Sender<Outcome>, Outcome)>;

fn commit(base: &Base, group: impl Iterator<Item = Order>, answers: &mut Answers, after: &mut Aftermath) -> Result<(), Broken> {
    let room = base.has_room();
    let opened = match base.index.begin_write() {
        Err(Broken::Closed) => base.index.reopen().and_then(|()| base.index.begin_write()),
        other => other,
    };
    // Every order of the group is answered, also where the first of them already met the failure.
    let mut failure = None;
    {
        let mut tables = match opened.as_ref() {
            Ok(writing) => Tables::open(writing, &base.blobs).map_err(|error| failure = Some(error)).ok(),
            Err(_) => None,
        };
        for Order { change, answer } in group {
            let outcome = match tables.as_mut().filter(|_| failure.is_none()) {
                None => Err(Refusal::Broken("the index failed earlier in this group".to_owned())),
                Some(_) if !room && change.grows() => Err(Refusal::Full),
                Some(tables) => match tables.apply(change, after) {
                    Ok(outcome) => outcome,
                    Err(error) => {
                        failure = Some(error);
                        Err(Refusal::Broken(String::new()))
                    }
                },
            };
            answers.push((answer, outcome));
        }
    }
    let writing = opened?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    for directory in &after.directories {
        File::open(directory).and_then(|it| it.sync_all()).map_err(redb::Error::Io)?;
    }
    writing.commit()?;
    if room {
        base.recover();
    }
    Ok(())
}
