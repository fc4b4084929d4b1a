//! `dag …`: runs and tasks, from the run history; orders go to the engine that runs, or to one started for the order.

use std::time::Duration;

use serde::Serialize;

use crate::{
    bank,
    cli::{self, Output},
    config::Loaded,
    dag::{History, Run, RunRef, RunState, Schedule, TaskInstance, Try},
    exit::{Exit, Failure},
    pipeline::{
        Mode, Parts, Pipeline,
        command::{Command, Reply},
        data_dir,
        services::Needs,
        socket::Client,
    },
    refresh,
};

pub(super) async fn dag(loaded: &Loaded, command: cli::Dag) -> Result<Exit, Failure> {
    match command {
        cli::Dag::List(output) => list(loaded, &output).await,
        cli::Dag::Runs { dag_id, limit, output } => runs(loaded, &dag_id, limit, &output).await,
        cli::Dag::Show { dag_id, run_id, output } => show(loaded, &dag_id, run_id, &output).await,
        cli::Dag::Trigger { dag_id, dry_run, output } => order(loaded, Command::Trigger { dag_id, dry_run }, &output).await,
        cli::Dag::Retry(cli::Task { dag_id, task_id, run_id, dry_run, output }) => {
            order(loaded, Command::Retry { dag_id, run_id, task_id, dry_run }, &output).await
        }
        cli::Dag::Clear(cli::Task { dag_id, task_id, run_id, dry_run, output }) => {
            order(loaded, Command::Clear { dag_id, run_id, task_id, dry_run }, &output).await
        }
        cli::Dag::Cancel { dag_id, dry_run, output } => order(loaded, Command::Cancel { dag_id, dry_run }, &output).await,
    }
}

#[derive(Serialize)]
struct Listed {
    dag_id: &'static str,
    schedule: String,
    last_run: Option<Run>,
}

async fn list(loaded: &Loaded, output: &Output) -> Result<Exit, Failure> {
    let listed = with_history(loaded, async |history| {
        let mut listed = Vec::new();
        for dag_id in refresh::DAG_IDS {
            let schedule = if dag_id == refresh::LOADING { loaded.config.dag.schedule.to_string() } else { format!("after {}", refresh::LOADING) };
            let last_run = history.runs(dag_id, 1).await.map_err(|error| Failure::from_error(&error))?.into_iter().next();
            listed.push(Listed { dag_id, schedule, last_run });
        }
        Ok(listed)
    })
    .await?;
    if output.json {
        super::print_json(&listed)?;
        return Ok(Exit::Right);
    }
    let mut text = String::new();
    for dag in &listed {
        let last = dag.last_run.as_ref().map_or_else(|| "no run yet".to_owned(), line_of);
        text += &format!("{:<40} {:<32} {last}\n", dag.dag_id, dag.schedule);
    }
    super::print(&text)?;
    Ok(Exit::Right)
}

async fn runs(loaded: &Loaded, dag_id: &str, limit: u32, output: &Output) -> Result<Exit, Failure> {
    known(dag_id)?;
    let runs = with_history(loaded, async |history| history.runs(dag_id, limit).await.map_err(|error| Failure::from_error(&error))).await?;
    if output.json {
        super::print_json(&runs)?;
        return Ok(Exit::Right);
    }
    let text: String = runs.iter().map(|run| line_of(run) + "\n").collect();
    super::print(if text.is_empty() { "no run yet\n" } else { &text })?;
    Ok(Exit::Right)
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    run: Run,
    tries: Vec<Try>,
}

async fn show(loaded: &Loaded, dag_id: &str, run_id: Option<String>, output: &Output) -> Result<Exit, Failure> {
    known(dag_id)?;
    let shown = with_history(loaded, async |history| {
        let failure = |error: crate::dag::Error| Failure::from_error(&error);
        let run_id = match run_id {
            Some(run_id) => Some(run_id),
            None => history.runs(dag_id, 1).await.map_err(failure)?.into_iter().next().map(|run| run.run_id),
        };
        let Some(run_id) = run_id else { return Ok(None) };
        let reference = RunRef { dag_id: dag_id.to_owned(), run_id };
        let Some(run) = history.run(&reference).await.map_err(failure)? else { return Ok(None) };
        let tries = history.tries(&reference).await.map_err(failure)?;
        Ok(Some(Shown { run, tries }))
    })
    .await?;
    let Some(shown) = shown else {
        return Err(Failure::new(Exit::Usage, "there is no such run").with_remedy(format!("`ledgerline dag runs {dag_id}` lists them")));
    };
    if output.json {
        super::print_json(&shown)?;
        return Ok(Exit::Right);
    }
    let mut text = line_of(&shown.run) + "\n";
    for task in &shown.run.tasks {
        text += &task_line(task);
    }
    super::print(&text)?;
    Ok(Exit::Right)
}

fn known(dag_id: &str) -> Result<(), Failure> {
    if refresh::DAG_IDS.contains(&dag_id) {
        return Ok(());
    }
    Err(Failure::new(Exit::Usage, format!("there is no DAG {dag_id:?}")).with_remedy(format!("the DAGs are {}", refresh::DAG_IDS.join(" and "))))
}

fn line_of(run: &Run) -> String {
    let when = run.started_at.unwrap_or(run.queued_at).format("%F %T");
    let took = match (run.started_at, run.finished_at) {
        (Some(started), Some(finished)) => format!("{:.1} s", (finished - started).as_seconds_f64()),
        _ => "–".to_owned(),
    };
    format!("{when}  {:<9} {took:>8}  {}", run.state.as_str(), run.run_id)
}

fn task_line(task: &TaskInstance) -> String {
    let took = task.seconds().map_or_else(|| "–".to_owned(), |it| format!("{it:.1} s"));
    let mut text = format!("  {:<24} {:<16} {} tries {took:>8}\n", task.task_id, task.state.as_str(), task.try_number);
    for line in task.error.iter().flat_map(|it| it.lines()) {
        text += &format!("      {line}\n");
    }
    text
}

/// Reads the run history, wherever the state database is.
async fn with_history<T>(loaded: &Loaded, read: impl AsyncFnOnce(&History) -> Result<T, Failure>) -> Result<T, Failure> {
    let interrupted = super::interrupts();
    // Whoever waits for this holds all of it: it is too much for their stacks.
    let reach = Box::pin(super::Reach::take(loaded, Needs::POSTGRES, &interrupted)).await?;
    let history = History::new(&reach.addresses.state);
    let outcome = Box::pin(super::unless_interrupted(&interrupted, read(&history))).await;
    reach.release().await;
    outcome
}

/// Gives an order to the pipeline that runs; where none does, starts the engine, waits for the run, and stops again.
async fn order(loaded: &Loaded, command: Command, output: &Output) -> Result<Exit, Failure> {
    let dag_id = match &command {
        Command::Trigger { dag_id, .. } | Command::Retry { dag_id, .. } | Command::Clear { dag_id, .. } | Command::Cancel { dag_id, .. } => dag_id.clone(),
        _ => String::new(),
    };
    known(&dag_id)?;
    if let Some(mut owner) = Client::connect(&data_dir::socket_path(&loaded.data_dir())).await {
        let reply = owner.ask(command).await.map_err(|error| Failure::new(Exit::Away, format!("the running pipeline does not answer: {error}")))?;
        return said(&reply, output);
    }
    let interrupted = super::interrupts();
    let data_dir = super::take_data_dir(&loaded.data_dir())?;
    let services = super::start_services(loaded, &data_dir, Needs { dbt: true, ..Needs::RECONCILE }, &super::Limits::of(&interrupted)).await?;
    let mode = Mode { goal: bank::Goal::Forever, rate: bank::Rate::default(), schedule: Schedule::Never };
    let pipeline =
        Pipeline::start(loaded, data_dir, services, Parts { scheduler: true, ..Parts::NONE }, mode).await.map_err(|error| Failure::from_error(&error))?;
    let grace = *loaded.config.startup_grace;
    let outcome = tokio::select! {
        outcome = carried_out(&pipeline, &dag_id, command, grace, output) => outcome,
        () = interrupted.cancelled() => Err(Failure::new(Exit::Interrupted, "interrupted; the run goes on with the next start")),
    };
    pipeline.stop().await;
    outcome
}

async fn carried_out(pipeline: &Pipeline, dag_id: &str, command: Command, grace: Duration, output: &Output) -> Result<Exit, Failure> {
    tokio::time::timeout(grace, pipeline.scheduled()).await.unwrap_or_else(|_| {
        let why = pipeline.snapshots().borrow().dag.away.clone().unwrap_or_else(|| "it does not answer".to_owned());
        Err(Failure::new(Exit::Away, format!("the state database is away: {why}")).with_remedy("see whether the server of state.url runs"))
    })?;
    let reply = pipeline.commander().ask(command).await;
    let answered = said(&reply, output)?;
    let Some(run_id) = reply.run_id else { return Ok(answered) };
    let over = pipeline.finished(&RunRef { dag_id: dag_id.to_owned(), run_id }).await?;
    let red = over.iter().any(|run| run.state == RunState::Failed);
    Ok(if red { Exit::Data } else { Exit::Right })
}

fn said(reply: &Reply, output: &Output) -> Result<Exit, Failure> {
    if output.json {
        super::print_json(reply)?;
    } else if reply.ok {
        let tasks: String = reply.tasks.iter().map(|it| format!("  {it}\n")).collect();
        super::print(&format!("{}\n{tasks}", reply.text))?;
    }
    if reply.ok { Ok(Exit::Right) } else { Err(Failure::new(Exit::Usage, reply.text.clone())) }
}
