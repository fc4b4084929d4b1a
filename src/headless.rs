//! `--no-tui`: the pipeline as lines. Prints the verdict when it changes and now and then, ends on a goal, a deadline or a signal.

use std::{path::Path, time::Duration};

use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    bank,
    exit::{Exit, Failure},
    kpi::Kpis,
    pipeline::{Pipeline, goal::Goal, summary::Summary, verdict::Level},
};

/// How often the status line is said again although nothing changed.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// What ends a headless run.
#[derive(Debug, Clone, Default)]
pub struct Ends {
    pub goal: Option<Goal>,
    pub deadline: Option<Duration>,
}

/// Runs until the goal, the deadline or a signal; then stops the pipeline. The KPIs where a goal was reached.
pub async fn run(pipeline: Pipeline, ends: Ends, summary: Option<&Path>, interrupted: CancellationToken) -> Result<Option<Kpis>, Failure> {
    let saying = tokio::spawn(say(pipeline.snapshots()));
    let outcome = reach(&pipeline, &ends, &interrupted).await;
    saying.abort();
    conclude(pipeline, outcome, ends.goal.is_some(), summary).await
}

/// Waits for the first of goal, deadline and signal.
pub async fn reach(pipeline: &Pipeline, ends: &Ends, interrupted: &CancellationToken) -> Result<(), Failure> {
    let goal = async {
        match ends.goal {
            Some(goal) => pipeline.pursue(goal).await,
            None => std::future::pending().await,
        }
    };
    let deadline = async {
        match ends.deadline {
            Some(after) => tokio::time::sleep(after).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        reached = goal => reached,
        () = deadline => Err(Failure::new(Exit::Deadline, "the deadline passed before the goal was reached").with_remedy("state is kept: the next run goes on from here")),
        () = interrupted.cancelled() => Err(Failure::new(Exit::Interrupted, "interrupted; state is kept")),
        () = pipeline.shutdown_asked() => Ok(()),
    }
}

/// Writes the summary and stops everything. The KPIs where a goal was reached.
pub async fn conclude(pipeline: Pipeline, outcome: Result<(), Failure>, has_goal: bool, summary: Option<&Path>) -> Result<Option<Kpis>, Failure> {
    let snapshot = pipeline.fresh_snapshot().await;
    let mut written = Ok(());
    if let Some(path) = summary {
        let rows = bank::census(&pipeline.services().addresses.source).await.unwrap_or_default();
        let (word, error) = match &outcome {
            Ok(()) => (Exit::Right.outcome(), None),
            Err(failure) => (failure.exit.outcome(), Some(failure.text.clone())),
        };
        let (runs, mails) = (pipeline.runs_of_this_invocation().await, pipeline.mails_of_this_invocation().await);
        written = Summary::new(&snapshot, &runs, mails, rows, word, error).write(path).map_err(|error| {
            Failure::new(Exit::Usage, format!("could not write the summary {}: {error}", path.display()))
                .with_remedy("give --summary a path in a folder you may write")
        });
    }
    let kpis = snapshot.refresh.kpis.as_ref().map(|it| it.reading.kpis.clone());
    pipeline.stop().await;
    outcome?;
    written?;
    Ok(kpis.filter(|_| has_goal))
}

/// The status line, in the log: where a person looks at lines, the sentence is the same as the console's, and the way out is a command.
async fn say(mut snapshots: tokio::sync::watch::Receiver<std::sync::Arc<crate::pipeline::snapshot::Snapshot>>) {
    let mut said = (Level::Well, tokio::time::Instant::now() - SAY_EVERY);
    loop {
        {
            let snapshot = snapshots.borrow_and_update();
            let verdict = &snapshot.verdict;
            if verdict.level != said.0 || said.1.elapsed() >= SAY_EVERY {
                let line = verdict.line();
                match verdict.level {
                    Level::Failed => error!("{line}"),
                    Level::Late => warn!("{line}"),
                    Level::Note | Level::Well => info!("{line}"),
                }
                said = (verdict.level, tokio::time::Instant::now());
            }
        }
        if snapshots.changed().await.is_err() {
            return;
        }
    }
}
