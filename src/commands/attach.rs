//! `attach`: the console on a pipeline that runs elsewhere on this host. Closing it stops nothing.

use std::io::IsTerminal as _;

use crate::{
    cli::Look,
    config::Loaded,
    exit::{Exit, Failure},
    pipeline::{Commander, data_dir, socket::Client},
    telemetry, tui,
};

pub(super) async fn attach(loaded: &Loaded, look: &Look) -> Result<Exit, Failure> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        return Err(Failure::new(Exit::Usage, "attach draws a console and needs a terminal for it")
            .with_remedy("run it in one; without one the single commands tell the same: `ledgerline dag runs`, `kpi`, `lake list`, each with --json"));
    }
    let root = loaded.data_dir();
    let path = data_dir::socket_path(&root);
    let (Some(watching), Some(asking)) = (Client::connect(&path).await, Client::connect(&path).await) else {
        return Err(Failure::new(Exit::Away, format!("no pipeline runs on {}", root.display()))
            .with_remedy("start one with `ledgerline run`, or name its data dir with --data-dir"));
    };
    let interrupted = super::interrupts();
    // Its own log lines go to the pane; the pipeline's are in its file.
    let _logs = super::start_logs(super::log_front(true, crate::cli::LogFormat::Text), None)?;
    let (snapshots, reading) = watching.watch().await.map_err(|error| Failure::new(Exit::Away, error.to_string()))?;
    let watched = tui::Watched { snapshots, commander: Commander::remote(asking, path), folder: root.join("logs"), hear: telemetry::hear, owned: false };
    let outcome = tui::run(watched, look, &interrupted).await;
    reading.abort();
    match outcome.map_err(super::terminal_gone)? {
        tui::Left::Quit => Ok(Exit::Right),
        tui::Left::Interrupted => Err(Failure::new(Exit::Interrupted, "interrupted; the pipeline goes on")),
    }
}
