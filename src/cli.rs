//! The command line. Each flag overrides exactly one configuration key or says what to do; nothing is decided here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{config::Override, units::Span};

/// A realtime banking data pipeline, run and watched from a terminal.
///
/// Without a command it runs the whole pipeline and opens the console; without a terminal it reports as lines.
#[derive(Debug, Parser)]
#[command(name = "ledgerline", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Option<Command>,
    /// `ledgerline` alone is `ledgerline run`, with the same flags.
    #[command(flatten)]
    pub run: Run,
}

#[derive(Debug, Args)]
pub struct Global {
    /// Configuration file [default: ./config.toml where there is one]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Which [profiles.NAME] of the configuration to use
    #[arg(long, global = true, value_name = "NAME")]
    pub profile: Option<String>,
    /// Where embedded services, mails and logs live
    #[arg(long, global = true, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// How logs are written to stderr
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Host bank, CDC, sink and DAG runner, and open the console
    Run(Run),
    /// Run only the embedded services and print their addresses and credentials
    Services(Output),
    /// Run the bank alone
    Generate(Stage),
    /// Run change data capture alone, look at it, prepare or remove it
    Cdc(Cdc),
    /// Run the lake sink alone
    Sink(Stage),
    /// Run the DAG scheduler alone
    Scheduler(Stage),
    /// Open the console on a pipeline that runs on this data dir
    Attach(Look),
    /// List, inspect, start and repair DAG runs
    #[command(subcommand)]
    Dag(Dag),
    /// Print the ten KPIs from the analytics schema
    Kpi(Output),
    /// Compare source, lake, raw, staging and analytics by count and by sum
    Reconcile(Output),
    /// List the lake's objects, or prove that nothing is missing, doubled or damaged
    #[command(subcommand)]
    Lake(Lake),
    /// List, show and replay what could not be decoded
    #[command(subcommand)]
    Dlq(Dlq),
    /// Check what this machine and configuration need
    Doctor(Output),
    /// Show the configuration in force
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Delete the data dir: cluster, topics, lake, mails and logs
    Reset(Reset),
}

#[derive(Debug, Clone, Default, Args)]
pub struct Run {
    /// Report as lines instead of opening the console
    #[arg(long)]
    pub no_tui: bool,
    /// Post a number of transactions, drain every hop, run both DAGs, reconcile, print the KPIs and exit
    #[arg(long, conflicts_with = "for_")]
    pub once: bool,
    /// How many transactions `--once` posts
    #[arg(long, value_name = "N", requires = "once")]
    pub transactions: Option<u64>,
    /// Run this long from the first payment, then drain, run both DAGs once more and exit
    #[arg(long = "for", id = "for_", value_name = "DURATION")]
    pub for_: Option<Span>,
    /// Business transactions per second
    #[arg(long, value_name = "TPS")]
    pub rate: Option<u32>,
    /// Seed of the simulated bank
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Write what happened as JSON
    #[arg(long, value_name = "FILE")]
    pub summary: Option<PathBuf>,
    /// End the whole invocation after this long with exit code 5; state is kept
    #[arg(long, value_name = "DURATION")]
    pub deadline: Option<Span>,
    #[command(flatten)]
    pub look: Look,
}

/// How the console draws.
#[derive(Debug, Clone, Default, Args)]
pub struct Look {
    /// Draw with ASCII characters only
    #[arg(long)]
    pub ascii: bool,
}

#[derive(Debug, Clone, Default, Args)]
pub struct Output {
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Default, Args)]
pub struct Stage {
    /// End after this long [default: run until told to end]
    #[arg(long = "for", id = "for_", value_name = "DURATION")]
    pub for_: Option<Span>,
    /// Business transactions per second
    #[arg(long, value_name = "TPS")]
    pub rate: Option<u32>,
    /// Seed of the simulated bank
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

#[derive(Debug, Args)]
pub struct Cdc {
    #[command(subcommand)]
    pub command: Option<CdcCommand>,
}

#[derive(Debug, Subcommand)]
pub enum CdcCommand {
    /// Show the replication slot, how far it is read and what it holds back
    Status(Output),
    /// Bring publication, topics, and slot or connector to what the configuration says, without starting to stream
    Apply(Apply),
    /// Read a table again while the stream goes on: its rows arrive as read events, none hides a newer change
    Resnapshot(Resnapshot),
    /// Drop the replication slot and the publication, so that the source keeps no WAL for us any more
    Remove(Remove),
}

#[derive(Debug, Args)]
pub struct Apply {
    /// Say what would be made, make nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct Resnapshot {
    /// As schema.table
    pub table: String,
    /// Say whether it can be read, ask for nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct Remove {
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// Say what would be dropped, drop nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Subcommand)]
pub enum Dag {
    /// Both DAGs with their schedule and last run
    List(Output),
    /// The runs of a DAG, newest first
    Runs {
        dag_id: String,
        /// How many runs
        #[arg(long, default_value_t = 20)]
        limit: u32,
        #[command(flatten)]
        output: Output,
    },
    /// The tasks of one run, with tries, times and errors
    Show {
        dag_id: String,
        /// Run id [default: the newest run]
        run_id: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Start a run now
    Trigger {
        dag_id: String,
        /// Say what would run, change nothing
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Retry a failed task and what it held up
    Retry(Task),
    /// Clear a task and everything behind it, so that they run again
    Clear(Task),
    /// Cancel the run in progress
    Cancel {
        dag_id: String,
        /// Say what would be cancelled, change nothing
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        output: Output,
    },
}

/// A task of a run, to run again.
#[derive(Debug, Args)]
pub struct Task {
    pub dag_id: String,
    pub task_id: String,
    /// Run id [default: the newest run]
    #[arg(long)]
    pub run_id: Option<String>,
    /// Say what would run, change nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Subcommand)]
pub enum Lake {
    /// Objects, newest first
    List {
        /// Only this table
        #[arg(long)]
        table: Option<String>,
        /// How many objects a table
        #[arg(long, default_value_t = 20)]
        limit: usize,
        #[command(flatten)]
        output: Output,
    },
    /// Walk every chain of commit records: no gap, no overlap, rows and hashes right
    Verify {
        /// Delete data objects that no commit record names
        #[arg(long)]
        sweep: bool,
        /// Say what would be swept, delete nothing
        #[arg(long, requires = "sweep")]
        dry_run: bool,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Debug, Subcommand)]
pub enum Dlq {
    /// Letters, newest first, and how many there are for each reason
    List {
        #[command(flatten)]
        which: Letters,
        /// How many letters
        #[arg(long, default_value_t = 20)]
        limit: usize,
        /// Show the bytes, which may hold customers' data
        #[arg(long)]
        reveal: bool,
        #[command(flatten)]
        output: Output,
    },
    /// All that is known about one letter
    Show {
        offset: i64,
        /// Partition of the dead-letter topic
        #[arg(long, default_value_t = 0)]
        partition: i32,
        /// Show the bytes, which may hold customers' data
        #[arg(long)]
        reveal: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Put the records of letters back to where they came from
    Replay(DlqReplay),
}

#[derive(Debug, Args)]
pub struct DlqReplay {
    /// Offsets of letters
    #[arg(value_name = "OFFSET", required_unless_present = "all")]
    pub offsets: Vec<i64>,
    /// Partition of the dead-letter topic
    #[arg(long, default_value_t = 0)]
    pub partition: i32,
    /// Every letter, or every letter of a table or topic
    #[arg(long, conflicts_with = "offsets")]
    pub all: bool,
    #[command(flatten)]
    pub which: Letters,
    /// Put back also what still cannot be decoded: each becomes a letter again, and counts once more as a row that never comes
    #[arg(long)]
    pub force: bool,
    /// Say what would be put back, change nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub output: Output,
}

/// Which letters.
#[derive(Debug, Clone, Default, Args)]
pub struct Letters {
    /// Only of this table, as the lake names it
    #[arg(long)]
    pub table: Option<String>,
    /// Only of this topic
    #[arg(long)]
    pub topic: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print every key with the value in force; secrets are not part of it
    Show(Output),
}

#[derive(Debug, Args)]
pub struct Reset {
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// Say what would be deleted, delete nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub output: Output,
}

impl Cli {
    /// The command to carry out: `ledgerline` alone is `run`.
    pub fn into_parts(self) -> (Global, Command) {
        let command = self.command.unwrap_or(Command::Run(self.run));
        (self.global, command)
    }
}

impl Global {
    /// The configuration keys that the flags of this invocation override.
    pub fn overrides(&self, command: &Command) -> Vec<Override> {
        let mut overrides = Vec::new();
        let mut add = |key, flag, value: Option<String>| {
            if let Some(value) = value {
                overrides.push(Override { key, value, flag });
            }
        };
        add("profile", "--profile", self.profile.clone());
        // A path on the command line starts where the command line stands, not where config.toml lies.
        add("data_dir", "--data-dir", self.data_dir.as_ref().map(|it| std::path::absolute(it).unwrap_or_else(|_| it.clone()).display().to_string()));
        let (rate, seed) = match command {
            Command::Run(run) => (run.rate, run.seed),
            Command::Generate(stage) => (stage.rate, stage.seed),
            _ => (None, None),
        };
        add("bank.rate", "--rate", rate.map(|it| it.to_string()));
        add("bank.seed", "--seed", seed.map(|it| it.to_string()));
        overrides
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_command_is_run_with_its_flags() {
        let (_, command) = Cli::parse_from(["ledgerline", "--once", "--transactions", "7", "--no-tui"]).into_parts();
        assert!(matches!(command, Command::Run(Run { once: true, transactions: Some(7), no_tui: true, .. })));
    }

    #[test]
    fn global_flags_stand_before_or_after_the_command() {
        for arguments in [["ledgerline", "--profile", "stack", "kpi"], ["ledgerline", "kpi", "--profile", "stack"]] {
            let (global, _) = Cli::parse_from(arguments).into_parts();
            assert_eq!(global.profile.as_deref(), Some("stack"));
        }
    }

    #[test]
    fn a_flag_overrides_its_key() {
        let (global, command) = Cli::parse_from(["ledgerline", "run", "--rate", "300", "--seed", "7"]).into_parts();
        let keys: Vec<(&str, String)> = global.overrides(&command).into_iter().map(|it| (it.key, it.value)).collect();
        assert_eq!(keys, [("bank.rate", "300".to_owned()), ("bank.seed", "7".to_owned())]);
    }
}
