//! Carries an operator's commands to the stage they are for. Asked in vain, it says why not.

use std::{collections::BTreeMap, sync::Arc};

use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc, oneshot, watch},
};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{bank, dag, stage::Phase};

use super::{
    Wishes,
    command::{Command, Reply, StageName},
    look::Eyes,
    snapshot::Snapshot,
    supervise::Health,
};

type Asked = mpsc::Receiver<(Command, oneshot::Sender<Reply>)>;

/// Obeys until nobody can ask any more.
pub(super) async fn obey(
    wishes: Wishes,
    again: BTreeMap<StageName, Arc<Notify>>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    mut asked: Asked,
    shutdown: CancellationToken,
    eyes: Eyes,
) {
    let room = Room { wishes, again, snapshots, shutdown };
    while let Some((command, reply)) = asked.recv().await {
        // A look takes as long as what it looks at; nobody else waits for it.
        if let Command::Look { at } = command {
            let (eyes, now, runtime) = (eyes.clone(), Arc::clone(&room.snapshots.borrow()), Handle::current());
            // On a thread that may wait: hashing a lake takes its time.
            tokio::task::spawn_blocking(move || drop(reply.send(runtime.block_on(eyes.look(at, &now)))));
            continue;
        }
        info!(?command, "asked by an operator");
        match room.order(&command) {
            Some(_) if !room.again.contains_key(&StageName::Scheduler) => drop(reply.send(not_hosted(StageName::Scheduler))),
            // Orders to the DAG engine may wait for its database; other commands must not wait for them.
            Some((order, dry_run)) => {
                let dags = room.wishes.dags.borrow().clone();
                tokio::spawn(async move {
                    let answer = dags.order(order, dry_run).await;
                    // Whoever asked may have left.
                    let _ = reply.send(answered(answer, dry_run));
                });
            }
            None => {
                let _ = reply.send(room.carry_out(command));
            }
        }
    }
}

struct Room {
    wishes: Wishes,
    again: BTreeMap<StageName, Arc<Notify>>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    shutdown: CancellationToken,
}

impl Room {
    /// The order to the DAG engine that a command is, if it is one.
    fn order(&self, command: &Command) -> Option<(dag::Order, bool)> {
        let newest = |dag_id: &str, run_id: &Option<String>| {
            let newest_run = || Some(self.snapshots.borrow().dag.dag(dag_id)?.runs.first()?.run_id.clone());
            run_id.clone().or_else(newest_run).unwrap_or_default()
        };
        Some(match command {
            Command::Trigger { dag_id, dry_run } => (dag::Order::Trigger { dag_id: dag_id.clone() }, *dry_run),
            Command::Retry { dag_id, run_id, task_id, dry_run } => {
                (dag::Order::Retry { dag_id: dag_id.clone(), run_id: newest(dag_id, run_id), task_id: task_id.clone() }, *dry_run)
            }
            Command::Clear { dag_id, run_id, task_id, dry_run } => {
                (dag::Order::Clear { dag_id: dag_id.clone(), run_id: newest(dag_id, run_id), task_id: task_id.clone() }, *dry_run)
            }
            Command::Cancel { dag_id, dry_run } => (dag::Order::Cancel { dag_id: dag_id.clone(), run_id: newest(dag_id, &None) }, *dry_run),
            Command::Pause { .. } | Command::Resume { .. } | Command::Rate { .. } | Command::Step | Command::Restart { .. } => return None,
            Command::Look { .. } | Command::Shutdown => return None,
        })
    }

    fn carry_out(&self, command: Command) -> Reply {
        match command {
            Command::Pause { stage } => self.wish(stage, Phase::Paused),
            Command::Resume { stage } => self.wish(stage, Phase::Running),
            Command::Rate { per_second } => {
                self.wishes.bank.send_modify(|wish| wish.rate = bank::Rate::PerSecond(per_second));
                self.here(StageName::Bank, format!("{per_second} transactions a second are wished"))
            }
            Command::Step => {
                if self.wishes.bank.borrow().phase == Phase::Running {
                    return Reply::refused("the bank runs; pause it first, then step");
                }
                self.wishes.bank.send_modify(|wish| wish.steps += 1);
                self.here(StageName::Bank, "one step".to_owned())
            }
            Command::Restart { stage } => self.restart(stage),
            Command::Shutdown => {
                self.shutdown.cancel();
                Reply::done("the pipeline ends")
            }
            Command::Trigger { .. } | Command::Retry { .. } | Command::Clear { .. } | Command::Cancel { .. } | Command::Look { .. } => {
                Reply::refused("this is not for a stage")
            }
        }
    }

    /// Only a stage that waits can be tried again. Nothing is left behind for one that does not: it would cut its next wait short.
    fn restart(&self, stage: StageName) -> Reply {
        let Some(again) = self.again.get(&stage) else { return not_hosted(stage) };
        let health = self.snapshots.borrow().stage(stage).map(|it| it.health.clone()).unwrap_or_default();
        match health {
            Health::Waiting { .. } | Health::Held { .. } | Health::Failed { .. } => {
                again.notify_waiters();
                Reply::done(format!("{stage} is tried again"))
            }
            Health::Working => Reply::refused(format!("{stage} works; there is nothing to try again")),
            Health::Off | Health::Ended => Reply::refused(format!("{stage} has ended")),
        }
    }

    fn wish(&self, stage: StageName, phase: Phase) -> Reply {
        match stage {
            StageName::Bank => self.wishes.bank.send_modify(|wish| wish.phase = phase),
            StageName::Cdc => drop(self.wishes.cdc.send_replace(phase)),
            StageName::Lake => drop(self.wishes.lake.send_replace(phase)),
            StageName::Scheduler => drop(self.wishes.scheduler.send_replace(phase)),
            StageName::Mail => return Reply::refused("letters wait by themselves while the server is away; there is nothing to pause"),
        }
        let done = match phase {
            Phase::Paused => format!("{stage} is asked to pause"),
            Phase::Running => format!("{stage} is asked to go on"),
        };
        self.here(stage, done)
    }

    fn here(&self, stage: StageName, done: String) -> Reply {
        if self.again.contains_key(&stage) { Reply::done(done) } else { not_hosted(stage) }
    }
}

fn not_hosted(stage: StageName) -> Reply {
    Reply::refused(format!("{stage} is not hosted by this process"))
}

fn answered(answer: Result<dag::Answer, dag::Refusal>, dry_run: bool) -> Reply {
    match answer {
        Ok(answer) => {
            let text = if dry_run { format!("would: {}", answer.said) } else { answer.said };
            Reply { tasks: answer.tasks, run_id: answer.run_id, ..Reply::done(text) }
        }
        Err(refusal) => Reply::refused(refusal.to_string()),
    }
}
