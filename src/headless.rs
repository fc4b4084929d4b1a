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

/// Runs until the goal, the deadline or a signal; then stops the pipeline. Prints the KPIs of a reached goal on stdout.
pub async fn run(pipeline: Pipeline, ends: Ends, summary: Option<&Path>, interrupted: CancellationToken) -> Result<Exit, Failure> {
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

/// Writes the summary, stops everything and prints the result.
pub async fn conclude(pipeline: Pipeline, outcome: Result<(), Failure>, has_goal: bool, summary: Option<&Path>) -> Result<Exit, Failure> {
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
    match kpis {
        Some(kpis) if has_goal => crate::commands::print(&table_of(&kpis))?,
        _ => {}
    }
    Ok(Exit::Right)
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

/// The ten KPIs for people.
pub fn table_of(kpis: &Kpis) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<42} {value:>18}");
    };
    let money = |it: Option<crate::units::Money>| it.map_or_else(|| "–".to_owned(), crate::units::Money::grouped);
    line("total_balance", kpis.total_balance.grouped());
    line("total_transactions", crate::units::grouped(kpis.total_transactions));
    line("average_balance_per_account", money(kpis.average_balance_per_account));
    line("total_accounts", crate::units::grouped(kpis.total_accounts));
    line("total_customers", crate::units::grouped(kpis.total_customers));
    line("average_balance_per_account_type", money(kpis.average_balance_per_account_type));
    for it in &kpis.transaction_amount_by_type {
        line(&format!("transaction_amount_by_type {}", it.txn_type), it.amount.grouped());
    }
    for it in &kpis.average_balance_by_account_type {
        line(&format!("average_balance_by_account_type {}", it.account_type), it.average.grouped());
    }
    for it in &kpis.total_customers_balance {
        line(&format!("customer {} {}", it.customer_id, it.customer), it.balance.grouped());
    }
    for it in &kpis.transaction_amount_over_time {
        line(&format!("transaction_amount {}", it.date), it.amount.grouped());
    }
    text
}
