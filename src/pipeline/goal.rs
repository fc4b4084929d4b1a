//! What an invocation is to reach before it ends: drained, loaded, transformed, reconciled.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::Instant;
use tracing::info;

use crate::{
    cdc,
    change::{BANK_TABLES, TableId},
    dag::{Matter, RunState, RunStats},
    exit::{Exit, Failure},
    fault::{Diagnose, Fault, chain},
    refresh,
    stream::topics,
};

use super::{Pipeline, command::StageName, snapshot::Snapshot, supervise, verdict::Ending};

/// How often a wait looks at the snapshot again even if nothing was published.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How often something that is away is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// The bank posts its number of transactions and ends by itself; then everything follows.
    Once,
    /// The bank runs so long from its first payment; then everything follows.
    For(Duration),
}

impl Pipeline {
    /// Works until the goal is reached: the bank done, every hop drained, both DAGs run, the books reconciled.
    ///
    /// Ends early where a stage cannot go on without a person. Cancel-safe: it only watches and asks.
    pub async fn pursue(&self, goal: Goal) -> Result<(), Failure> {
        match goal {
            Goal::Once => self.wait_until("the bank's last payment", |it| has_ended(it, StageName::Bank)).await?,
            Goal::For(duration) => {
                self.wait_until("the first payment", |it| it.bank.transactions > 0).await?;
                let end = Instant::now() + duration;
                tokio::select! {
                    () = tokio::time::sleep_until(end) => {}
                    failure = self.first_failure() => return Err(failure),
                }
                self.stop_stage(StageName::Bank).await;
            }
        }
        info!("the bank is done; draining");
        self.ending.send_replace(Some(Ending::Draining));
        self.drain().await?;
        info!("drained; the last runs begin");
        self.ending.send_replace(Some(Ending::LastRuns));
        self.hold_schedule().await;
        self.wait_until("the runs in progress", |it| it.dag.is_idle()).await?;
        // Not before: a run in progress loaded what had landed then, and would be measured by what has landed now.
        self.drained.send_replace(true);
        self.run_both_dags().await?;
        self.ending.send_replace(Some(Ending::Letters));
        self.wait_until("the letters", |it| it.mail.waiting == 0 || it.mail.away.is_some()).await
    }

    /// Waits until everything the bank has committed lies in the lake: the slot has confirmed the WAL position read now, after
    /// the bank stopped, and every lane has landed up to its end offset. What remains is for the last runs to do and prove.
    async fn drain(&self) -> Result<(), Failure> {
        let addresses = &self.services.addresses;
        let position = self.patiently(|| cdc::wal_position(&addresses.source)).await?;
        self.wait_until("change capture", |it| it.cdc.confirmed_lsn >= position && it.cdc.queued == 0).await?;
        let names: BTreeSet<String> = BANK_TABLES
            .iter()
            .map(|table| self.topics.table(&TableId { schema: "public".to_owned(), table: (*table).to_owned() }))
            .chain([self.topics.boundaries()])
            .collect();
        let broker = topics::Topics::connect(&addresses.kafka).map_err(|error| Failure::from_error(&error))?;
        let ends = self.patiently(|| broker.watermarks(names.clone())).await?;
        let landed = |snapshot: &Snapshot| {
            ends.iter().filter(|(_, marks)| marks.end > marks.first).all(|(lane, marks)| {
                let found = snapshot.lake.lanes.iter().find(|it| *it.topic == *lane.topic && it.partition == lane.partition);
                found.and_then(|it| it.landed_offset).is_some_and(|landed| landed >= marks.end)
            })
        };
        self.wait_until("the lake", landed).await
    }

    /// Runs loading and, triggered by it, transformation; both must end green and the books must balance.
    async fn run_both_dags(&self) -> Result<(), Failure> {
        let dags = self.dags();
        let run = dags.trigger(refresh::LOADING).await.map_err(|refusal| Failure::new(Exit::Away, refusal.to_string()))?;
        let over = self.finished(&run).await?;
        match over.iter().find(|it| it.state == RunState::Failed) {
            Some(failed) => Err(failed_run(failed)),
            None => self.check_reconciled().await,
        }
    }

    async fn check_reconciled(&self) -> Result<(), Failure> {
        match &self.fresh_snapshot().await.refresh.reconcile {
            Some(reconcile) if reconcile.report.ok => Ok(()),
            Some(_) => Err(Failure::new(Exit::Data, "reconciliation differs").with_remedy("`ledgerline reconcile` names table and keys")),
            None => Err(Failure::new(Exit::Bug, "the transformation ended without a reconciliation")),
        }
    }

    /// Waits for a state of the pipeline, or for the first stage that cannot go on.
    async fn wait_until(&self, what: &str, reached: impl Fn(&Snapshot) -> bool) -> Result<(), Failure> {
        let mut snapshots = self.snapshots();
        loop {
            {
                let snapshot = snapshots.borrow_and_update();
                if reached(&snapshot) {
                    return Ok(());
                }
                if let Some(failure) = failure_of(&snapshot) {
                    return Err(failure);
                }
            }
            if let Ok(Err(_)) = tokio::time::timeout(LOOK_EVERY, snapshots.changed()).await {
                return Err(Failure::new(Exit::Bug, format!("the pipeline ended while waiting for {what}")));
            }
        }
    }

    /// The first stage that cannot go on without a person; pending while all can.
    pub async fn first_failure(&self) -> Failure {
        let mut snapshots = self.snapshots();
        loop {
            if let Some(failure) = failure_of(&snapshots.borrow_and_update()) {
                return failure;
            }
            if snapshots.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Asks again while the other side is away.
    async fn patiently<T, E: Diagnose, Run: Future<Output = Result<T, E>>>(&self, ask: impl Fn() -> Run) -> Result<T, Failure> {
        loop {
            match ask().await {
                Ok(answer) => return Ok(answer),
                Err(error) if error.fault() == Fault::Transient => {
                    tracing::debug!(error = %chain(&error), "asking again");
                    tokio::select! {
                        () = tokio::time::sleep(ASK_AGAIN) => {}
                        failure = self.first_failure() => return Err(failure),
                    }
                }
                Err(error) => return Err(Failure::from_error(&error)),
            }
        }
    }
}

fn has_ended(snapshot: &Snapshot, name: StageName) -> bool {
    snapshot.stage(name).is_some_and(|it| it.health == supervise::Health::Ended)
}

/// What a headless run must end with, if a stage cannot go on.
fn failure_of(snapshot: &Snapshot) -> Option<Failure> {
    // A lane that is stopped never lands what it owes; the other lanes of the stage go on.
    if let Some(lane) = snapshot.lake.lanes.iter().find(|it| it.trouble.is_some()) {
        let trouble = lane.trouble.as_deref().unwrap_or_default();
        return Some(Failure::new(Exit::Away, format!("lake lane {}[{}] stopped: {trouble}", lane.topic, lane.partition)));
    }
    let (name, stage) = snapshot.stages.iter().find(|(_, stage)| stage.health.verdict().is_some())?;
    let exit = match stage.health.verdict()? {
        supervise::Verdict::Away => Exit::Away,
        supervise::Verdict::Data => Exit::Data,
        supervise::Verdict::Bug => Exit::Bug,
    };
    let (reason, remedy) = match &stage.health {
        supervise::Health::Held { reason, remedy, .. } => (reason, Some(remedy)),
        supervise::Health::Failed { reason, remedy, .. } => (reason, remedy.as_ref()),
        _ => return None,
    };
    let failure = Failure::new(exit, format!("{name}: {reason}"));
    Some(match remedy {
        Some(remedy) => failure.with_remedy(remedy.clone()),
        None => failure,
    })
}

/// A red run: which task, and its first line. Wrong data is exit 4, a service that stayed away is 3.
fn failed_run(run: &RunStats) -> Failure {
    let failed = run.tasks.iter().find(|it| it.error.is_some());
    let text = match failed {
        Some(task) => format!("{} {}: {}", run.dag_id, task.task_id, task.error.as_deref().unwrap_or("failed")),
        None => format!("{} failed", run.dag_id),
    };
    let exit = match failed.and_then(|it| it.fault) {
        Some(Matter::Data) => Exit::Data,
        Some(Matter::Bug) => Exit::Bug,
        Some(Matter::Transient | Matter::Operator) | None => Exit::Away,
    };
    Failure::new(exit, text).with_remedy(format!("`ledgerline dag show {} {}` has the whole story", run.dag_id, run.run_id))
}
