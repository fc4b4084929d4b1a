//! Flags → configuration → command → exit code; nothing else.

use std::process::ExitCode;

use clap::Parser as _;
use ledgerline::{cli::Cli, commands, exit::Exit};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            commands::tell(&format!("error: could not start the runtime: {error}"));
            return Exit::Bug.into();
        }
    };
    let outcome = runtime.block_on(commands::carry_out(cli));
    // What still blocks a thread (a name look-up, say) must not hold the shell.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match outcome {
        Ok(exit) => exit.into(),
        Err(failure) => {
            commands::tell(&failure.to_string());
            failure.exit.into()
        }
    }
}
