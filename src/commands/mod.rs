//! One module a command: each reads the configuration, reaches what it needs and prints its result on stdout.
//!
//! A command that needs embedded services asks the pipeline that owns the data dir where they are; where none runs, it
//! takes the data dir itself, starts just those services and stops them again.

use std::{
    io::{IsTerminal as _, Write as _},
    path::Path,
    time::Duration,
};

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::{
    cli::{Cli, Command, ConfigCommand, LogFormat, Output},
    config::{self, Loaded},
    embedded::Progress,
    exit::{Exit, Failure},
    interrupt,
    pipeline::{
        data_dir::{self, DataDir},
        reach,
        services::{Addresses, Needs, Services, check_build},
        socket::Client,
    },
    refresh,
    telemetry::{self, Front},
    tui,
};

mod attach;
mod cdc;
mod dag;
mod dlq;
mod doctor;
mod kpi;
mod lake;
mod reset;
mod run;
mod services;

/// Carries out one invocation.
pub async fn carry_out(cli: Cli) -> Result<Exit, Failure> {
    // Two providers are compiled in, so neither is the default by itself; who verifies a server's certificate asks for one, or panics.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let (global, command) = cli.into_parts();
    let overrides = global.overrides(&command);
    let loaded = config::load(global.config.as_deref(), std::env::vars(), &overrides).map_err(|error| Failure::usage(&error))?;
    if let Some((unknown, nearest)) = refresh::misspelt_task(&loaded.config.dag) {
        let text = format!("[dag.tasks.{unknown}] names no task, did you mean dag.tasks.{nearest}?");
        return Err(Failure::new(Exit::Usage, text).with_remedy("`ledgerline dag show` names the tasks of a DAG"));
    }
    let log_format = global.log_format;
    let owns_logs = matches!(command, Command::Run(_) | Command::Generate(_) | Command::Sink(_) | Command::Scheduler(_) | Command::Attach(_))
        || matches!(&command, Command::Cdc(cdc) if cdc.command.is_none());
    if !owns_logs {
        start_logs(Front::Stderr(log_format), None)?;
    }
    match command {
        Command::Run(flags) => run::run(&loaded, flags, log_format).await,
        Command::Generate(stage) => run::stage_alone(&loaded, run::Alone::Bank, stage.for_, log_format).await,
        Command::Cdc(alone) => match alone.command {
            None => run::stage_alone(&loaded, run::Alone::Cdc, None, log_format).await,
            Some(command) => cdc::cdc(&loaded, command).await,
        },
        Command::Sink(stage) => run::stage_alone(&loaded, run::Alone::Lake, stage.for_, log_format).await,
        Command::Scheduler(stage) => run::stage_alone(&loaded, run::Alone::Scheduler, stage.for_, log_format).await,
        Command::Attach(look) => attach::attach(&loaded, &look).await,
        Command::Services(output) => services::services(&loaded, output).await,
        Command::Dag(command) => dag::dag(&loaded, command).await,
        Command::Kpi(output) => kpi::kpi(&loaded, output).await,
        Command::Reconcile(output) => kpi::reconcile(&loaded, output).await,
        Command::Lake(command) => lake::lake(&loaded, command).await,
        Command::Dlq(command) => dlq::dlq(&loaded, command).await,
        Command::Doctor(output) => show_doctor(&loaded, output).await,
        Command::Config(ConfigCommand::Show(output)) => show_config(&loaded, output),
        Command::Reset(flags) => reset::reset(&loaded, &flags).await,
    }
}

fn start_logs(front: Front, file: Option<&Path>) -> Result<Option<tracing_appender::non_blocking::WorkerGuard>, Failure> {
    telemetry::start(front, file).map_err(|error| Failure::usage(&error))
}

async fn show_doctor(loaded: &Loaded, output: Output) -> Result<Exit, Failure> {
    let report = doctor::examine(loaded).await;
    if output.json {
        print_json(&report)?;
    } else {
        let mut text = String::new();
        for finding in &report.findings {
            let mark = if finding.ok { "ok  " } else { "FAIL" };
            text += &format!("{mark}  {:<26} {}\n", finding.name, finding.found);
            if let Some(remedy) = &finding.remedy {
                text += &format!("      {:<26} → {remedy}\n", "");
            }
        }
        print(&text)?;
    }
    Ok(if report.ok { Exit::Right } else { Exit::Away })
}

fn show_config(loaded: &Loaded, output: Output) -> Result<Exit, Failure> {
    check_build(loaded).map_err(|error| Failure::usage(&error))?;
    if output.json {
        print_json(&loaded.config)?;
    } else {
        print(&loaded.config.to_toml())?;
    }
    Ok(Exit::Right)
}

/// Addresses of what runs, or of what was started for this command; give it back with [`Reach::release`].
struct Reach {
    addresses: Addresses,
    started: Option<(Services, DataDir)>,
    /// The pipeline that owns the data dir, if one runs.
    owner: Option<Client>,
}

impl Reach {
    /// Asks the owner of the data dir, or becomes it for a moment.
    async fn take(loaded: &Loaded, needs: Needs, interrupted: &CancellationToken) -> Result<Self, Failure> {
        let root = loaded.data_dir();
        if let Some(mut owner) = Client::connect(&data_dir::socket_path(&root)).await {
            let printed = owner.services().await.map_err(|error| Failure::new(Exit::Away, format!("the running pipeline does not answer: {error}")))?;
            let addresses = printed.into_addresses(loaded).map_err(|error| Failure::from_error(&error))?;
            return Ok(Self { addresses, started: None, owner: Some(owner) });
        }
        let data_dir = take_data_dir(&root)?;
        let services = start_services(loaded, &data_dir, needs, &Limits::of(interrupted)).await?;
        Ok(Self { addresses: services.addresses.clone(), started: Some((services, data_dir)), owner: None })
    }

    async fn release(self) {
        if let Some((mut services, _data_dir)) = self.started {
            services.stop().await;
        }
    }
}

/// Does the work of a command, unless ^C comes first.
async fn unless_interrupted<T>(interrupted: &CancellationToken, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::select! {
        done = work => done,
        () = interrupted.cancelled() => Err(Failure::new(Exit::Interrupted, "interrupted")),
    }
}

fn take_data_dir(root: &Path) -> Result<DataDir, Failure> {
    held(DataDir::take(root))
}

fn held(taken: Result<DataDir, data_dir::Error>) -> Result<DataDir, Failure> {
    taken.map_err(|error| match error {
        data_dir::Error::InUse { .. } => Failure::from_error(&error),
        _ => Failure::usage(&error),
    })
}

/// What a preparation waits for, and what cuts it short.
struct Limits<'a> {
    interrupted: &'a CancellationToken,
    deadline: Option<Duration>,
    /// Services that are not ours must answer within `startup_grace`. The console opens without them, and says so.
    strict: bool,
}

impl<'a> Limits<'a> {
    fn of(interrupted: &'a CancellationToken) -> Self {
        Self { interrupted, deadline: None, strict: true }
    }

    async fn passed(&self) -> Failure {
        let deadline = async {
            match self.deadline {
                Some(after) => tokio::time::sleep(after).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.interrupted.cancelled() => Failure::new(Exit::Interrupted, "interrupted while preparing"),
            () = deadline => Failure::new(Exit::Deadline, "the deadline passed while preparing").with_remedy("the next start goes on from here"),
        }
    }
}

/// Starts embedded services with progress lines on stderr. Cut short at any moment, it leaves nothing behind.
async fn start_services(loaded: &Loaded, data_dir: &DataDir, needs: Needs, limits: &Limits<'_>) -> Result<Services, Failure> {
    Services::check(loaded, needs).map_err(|error| Failure::usage(&error))?;
    let progress = Progress::to(tell);
    let mut services = Services::new(loaded);
    let starting = async {
        if limits.strict {
            let others = reach::external(&loaded.config, needs);
            reach::wait_for(&others, loaded.config.startup_grace, &progress).await.map_err(|error| Failure::from_error(&error))?;
            if needs.stream {
                reach::sign_in(loaded).await.map_err(|error| Failure::from_error(&error))?;
            }
        }
        services.start(loaded, data_dir, needs, &progress).await.map_err(|error| Failure::from_error(&error))
    };
    let started = tokio::select! {
        started = starting => started,
        passed = limits.passed() => Err(passed),
    };
    match started {
        Ok(()) => Ok(services),
        Err(failure) => {
            services.stop().await;
            Err(failure)
        }
    }
}

fn print_json(document: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(document).map_err(|error| Failure::new(Exit::Bug, error.to_string()))?;
    print(&(text + "\n"))
}

/// Results go to stdout; a reader that has left (`| head`) is no error.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::new(Exit::Away, format!("could not write to stdout: {error}"))),
        _ => Ok(()),
    }
}

/// A terminal that cannot be written to or read any more is one that has died: as after a hangup, whichever was seen first.
fn terminal_gone(error: std::io::Error) -> Failure {
    Failure::new(Exit::Interrupted, format!("the terminal is gone: {error}"))
}

/// Says a line to the person at the terminal; where the console is drawn there, in its log. One that has died is no reason to
/// fall over: what runs is ended in order.
pub fn tell(line: &str) {
    if tui::has_terminal() {
        tracing::info!("{line}");
        return;
    }
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Asks a yes-or-no question on the terminal; without one the answer is no.
fn confirmed(question: &str) -> bool {
    if !std::io::stdin().is_terminal() {
        return false;
    }
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}

/// The default way of a command that may be interrupted.
fn interrupts() -> CancellationToken {
    interrupt::token()
}

/// Logs of a command that runs stages.
fn log_front(console: bool, format: LogFormat) -> Front {
    if console { Front::Console } else { Front::Stderr(format) }
}
