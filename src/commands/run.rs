//! `run`, and one stage alone: services, then the pipeline, then a front end until it ends.

use std::io::IsTerminal as _;

use crate::{
    bank,
    cli::{LogFormat, Run},
    config::Loaded,
    dag,
    exit::{Exit, Failure},
    headless::{self, Ends},
    kpi::Kpis,
    pipeline::{Mode, Parts, Pipeline, data_dir::LOG, goal::Goal, services::Needs},
    telemetry::{self, Front},
    tui,
    units::Span,
};

use super::{Limits, kpi};

/// How many transactions `--once` posts where nobody says.
const TRANSACTIONS_ONCE: u64 = 1_000;

#[derive(Debug, Clone, Copy)]
pub(super) enum Alone {
    Bank,
    Cdc,
    Lake,
    Scheduler,
}

pub(super) async fn run(loaded: &Loaded, flags: Run, log_format: LogFormat) -> Result<Exit, Failure> {
    let interrupted = super::interrupts();
    let console = !flags.no_tui && std::io::stdout().is_terminal() && std::io::stdin().is_terminal();
    let rate = bank::Rate::PerSecond(loaded.config.bank.rate);
    let mode = if flags.once {
        let rate = if flags.rate.is_some() { rate } else { bank::Rate::Unlimited };
        // The two runs at the end are the ones that count; others would only take time before them.
        Mode { goal: bank::Goal::Transactions(flags.transactions.unwrap_or(TRANSACTIONS_ONCE)), rate, schedule: dag::Schedule::Never }
    } else {
        Mode { goal: bank::Goal::Forever, rate, schedule: loaded.config.dag.schedule.clone() }
    };
    let goal = match (flags.once, flags.for_) {
        (true, _) => Some(Goal::Once),
        (false, Some(duration)) => Some(Goal::For(*duration)),
        (false, None) => None,
    };
    if let Some(path) = &flags.summary {
        // Better now than when all the work is done.
        std::fs::File::options().create(true).append(true).open(path).map_err(|error| {
            Failure::new(Exit::Usage, format!("could not write the summary {}: {error}", path.display()))
                .with_remedy("name a file that you may write with --summary")
        })?;
    }
    let ends = Ends { goal, deadline: flags.deadline.map(|it| *it) };
    let started = std::time::Instant::now();
    let limits = Limits { interrupted: &interrupted, deadline: ends.deadline, strict: !console };
    let (pipeline, _logs) = launch(loaded, Parts::ALL, Needs::ALL, mode, super::log_front(console, log_format), &limits).await?;
    let ends = Ends { deadline: ends.deadline.map(|it| it.saturating_sub(started.elapsed())), ..ends };
    if !console {
        return done(headless::run(pipeline, ends, flags.summary.as_deref(), interrupted).await);
    }
    let watched = tui::Watched {
        snapshots: pipeline.snapshots(),
        commander: pipeline.commander(),
        folder: loaded.data_dir().join("logs"),
        hear: telemetry::hear,
        owned: true,
    };
    let outcome = tokio::select! {
        left = tui::run(watched, &flags.look, &interrupted) => match left {
            Ok(tui::Left::Quit) => Ok(()),
            Ok(tui::Left::Interrupted) => Err(Failure::new(Exit::Interrupted, "interrupted; state is kept")),
            Err(error) => Err(super::terminal_gone(error)),
        },
        reached = headless::reach(&pipeline, &ends, &interrupted) => reached,
    };
    // The console leaves at a signal as well; whichever was seen first, the shell is told of the signal.
    let outcome = if interrupted.is_cancelled() && outcome.is_ok() { Err(Failure::new(Exit::Interrupted, "interrupted; state is kept")) } else { outcome };
    done(headless::conclude(pipeline, outcome, ends.goal.is_some(), flags.summary.as_deref()).await)
}

/// Prints the KPIs of a goal that was reached.
fn done(concluded: Result<Option<Kpis>, Failure>) -> Result<Exit, Failure> {
    if let Some(kpis) = concluded? {
        super::print(&kpi::table_of(&kpis))?;
    }
    Ok(Exit::Right)
}

/// One stage alone, for running on several hosts: always as lines.
pub(super) async fn stage_alone(loaded: &Loaded, alone: Alone, for_: Option<Span>, log_format: LogFormat) -> Result<Exit, Failure> {
    let interrupted = super::interrupts();
    let (parts, needs) = match alone {
        Alone::Bank => (Parts { bank: true, ..Parts::NONE }, Needs::POSTGRES),
        Alone::Cdc => (Parts { cdc: true, ..Parts::NONE }, Needs { stream: true, ..Needs::POSTGRES }),
        Alone::Lake => (Parts { lake: true, ..Parts::NONE }, Needs { stream: true, ..Needs::LAKE }),
        Alone::Scheduler => (Parts { scheduler: true, ..Parts::NONE }, Needs { dbt: true, ..Needs::RECONCILE }),
    };
    let mode = Mode { goal: bank::Goal::Forever, rate: bank::Rate::PerSecond(loaded.config.bank.rate), schedule: loaded.config.dag.schedule.clone() };
    let limits = Limits { interrupted: &interrupted, deadline: None, strict: true };
    let (pipeline, _logs) = launch(loaded, parts, needs, mode, super::log_front(false, log_format), &limits).await?;
    let over = interrupted.child_token();
    if let Some(duration) = for_ {
        let over = over.clone();
        tokio::spawn(async move {
            tokio::time::sleep(*duration).await;
            over.cancel();
        });
    }
    match done(headless::run(pipeline, Ends::default(), None, over).await) {
        Err(failure) if failure.exit == Exit::Interrupted && !interrupted.is_cancelled() => Ok(Exit::Right),
        other => other,
    }
}

/// Data dir, logs, services, stages; cut short at any moment, it leaves nothing behind.
async fn launch(
    loaded: &Loaded,
    parts: Parts,
    needs: Needs,
    mode: Mode,
    front: Front,
    limits: &Limits<'_>,
) -> Result<(Pipeline, Option<tracing_appender::non_blocking::WorkerGuard>), Failure> {
    let data_dir = super::take_data_dir(&loaded.data_dir())?;
    let logs = super::start_logs(front, Some(&data_dir.join(LOG)))?;
    let services = super::start_services(loaded, &data_dir, needs, limits).await?;
    let pipeline = Pipeline::start(loaded, data_dir, services, parts, mode).await.map_err(|error| Failure::from_error(&error))?;
    Ok((pipeline, logs))
}
