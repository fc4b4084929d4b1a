//! `:`: commands by name. Text → what is asked, or why it is not understood (pure).

use std::num::NonZeroU32;

use crate::pipeline::{
    command::{Command, Look, StageName},
    snapshot::Snapshot,
};

use super::keys::{Action, Pane};

/// What a typed line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// The same as a key.
    Key(Action),
    Command(Command),
    /// First say what it will touch.
    Question(Command),
    Look(Look),
}

/// Command, what follows it, what it does.
pub(super) const COMMANDS: &[(&str, &str, &str)] = &[
    ("pause", "STAGE", "hold bank, cdc, lake or scheduler"),
    ("resume", "STAGE", "let it go on"),
    ("rate", "N", "payments per second"),
    ("step", "", "one payment while the bank is paused"),
    ("trigger", "DAG", "start a run now"),
    ("retry", "DAG TASK", "run a failed task again, and what it held up"),
    ("clear", "DAG TASK", "run a task and everything after it again"),
    ("cancel", "DAG", "end the run in progress"),
    ("restart", "STAGE", "try a stage that stopped again, now"),
    ("overview", "", "all six panes"),
    ("stream", "", "topics, lag, slot"),
    ("lake", "", "tables and objects"),
    ("dags", "", "runs and tasks"),
    ("dbt", "", "models, snapshots, tests"),
    ("kpis", "", "all ten"),
    ("log", "", "the log"),
    ("mail", "", "letters: what waits and why, what left"),
    ("verify", "", "prove the lake: every chain, every hash"),
    ("messages", "TOPIC", "newest messages of a topic, customers masked"),
    ("save", "", "write what the log shows into a file"),
    ("help", "", "keys"),
    ("shutdown", "", "end the pipeline"),
    ("quit", "", "leave the console"),
];

/// As alike as a slip of the keys leaves a name; what is less alike was meant otherwise.
const NEAR: f64 = 0.8;

pub(super) fn parse(text: &str, now: &Snapshot) -> Result<Asked, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let Some((name, rest)) = words.split_first() else { return Err("type the name of a command; Tab completes it".to_owned()) };
    let screen = Pane::ALL.into_iter().find(|it| it.name().eq_ignore_ascii_case(name));
    if let Some(pane) = screen {
        return Ok(Asked::Key(Action::Zoom(pane)));
    }
    Ok(match (*name, rest) {
        ("pause", [stage]) => Asked::Command(Command::Pause { stage: stage_named(stage)? }),
        ("pause", []) => Asked::Command(Command::Pause { stage: StageName::Bank }),
        ("resume", [stage]) => Asked::Command(Command::Resume { stage: stage_named(stage)? }),
        ("resume", []) => Asked::Command(Command::Resume { stage: StageName::Bank }),
        ("restart", [stage]) => Asked::Command(Command::Restart { stage: stage_named(stage)? }),
        ("rate", [rate]) => {
            let per_second: NonZeroU32 = rate.parse().map_err(|_| format!("{rate:?} is not a rate: a whole number of payments per second, from 1"))?;
            Asked::Command(Command::Rate { per_second })
        }
        ("step", []) => Asked::Key(Action::Step),
        ("trigger", []) => Asked::Key(Action::Trigger),
        ("trigger", [dag]) => Asked::Question(Command::Trigger { dag_id: dag_named(dag, now)?, dry_run: true }),
        ("retry", []) => Asked::Key(Action::Retry),
        ("retry", [dag, task]) => {
            let dag_id = dag_named(dag, now)?;
            Asked::Question(Command::Retry { task_id: task_named(task, &dag_id, now)?, dag_id, run_id: None, dry_run: true })
        }
        ("clear", [dag, task]) => {
            let dag_id = dag_named(dag, now)?;
            Asked::Question(Command::Clear { task_id: task_named(task, &dag_id, now)?, dag_id, run_id: None, dry_run: true })
        }
        ("cancel", []) => Asked::Key(Action::Cancel),
        ("cancel", [dag]) => Asked::Question(Command::Cancel { dag_id: dag_named(dag, now)?, dry_run: true }),
        ("mail" | "mails" | "outbox", []) => Asked::Key(Action::Mails),
        ("verify", []) => Asked::Key(Action::Verify),
        ("save", []) => Asked::Key(Action::SaveLog),
        ("messages", [topic]) => {
            let known = || now.flow.keys().map(String::as_str);
            let table = known().find(|it| it == topic).ok_or_else(|| unknown("topic", topic, known()))?;
            Asked::Look(Look::Messages { table: table.to_owned(), revealed: false })
        }
        ("overview", []) => Asked::Key(Action::Back),
        ("help", []) => Asked::Key(Action::Help),
        ("shutdown", []) => Asked::Question(Command::Shutdown),
        ("quit" | "q" | "exit", []) => Asked::Key(Action::Quit),
        (name, _) => match COMMANDS.iter().find(|it| it.0 == name) {
            Some((name, "", _)) => return Err(format!("{name} takes nothing more")),
            Some((name, wants, _)) => return Err(format!("{name} takes {wants}")),
            None => return Err(unknown("command", name, COMMANDS.iter().map(|it| it.0))),
        },
    })
}

/// Commands that begin with what is typed, or whose words hold it.
pub(super) fn matching(text: &str) -> Vec<&'static (&'static str, &'static str, &'static str)> {
    let word = text.split_whitespace().next().unwrap_or_default();
    let begins = COMMANDS.iter().filter(|it| it.0.starts_with(word));
    let holds = COMMANDS.iter().filter(|it| !it.0.starts_with(word) && (it.0.contains(word) || it.2.contains(word)));
    begins.chain(holds).collect()
}

/// What the word being typed may be, once the command stands.
pub(super) fn words(text: &str, now: &Snapshot) -> Vec<String> {
    let words: Vec<&str> = text.split(' ').collect();
    let Some((last, before)) = words.split_last().filter(|(_, before)| !before.is_empty()) else { return Vec::new() };
    candidates(before, now).into_iter().filter(|it| it.to_lowercase().starts_with(&last.to_lowercase())).collect()
}

/// The line with its last word completed as far as it is certain.
pub(super) fn complete(text: &str, now: &Snapshot) -> String {
    let words: Vec<&str> = text.split(' ').collect();
    let (last, before) = words.split_last().unwrap_or((&"", &[]));
    let known = candidates(before, now);
    let fitting: Vec<&String> = known.iter().filter(|it| it.to_lowercase().starts_with(&last.to_lowercase())).collect();
    let Some(first) = fitting.first() else { return text.to_owned() };
    let common = fitting.iter().fold(first.as_str(), |common, it| {
        let same = common.chars().zip(it.chars()).take_while(|(left, right)| left == right).map(|(left, _)| left.len_utf8()).sum();
        &common[..same]
    });
    let end = if fitting.len() == 1 { " " } else { "" };
    let begin = before.iter().map(|it| format!("{it} ")).collect::<String>();
    format!("{begin}{common}{end}")
}

fn candidates(before: &[&str], now: &Snapshot) -> Vec<String> {
    match before {
        [] => COMMANDS.iter().map(|it| it.0.to_owned()).collect(),
        ["pause" | "resume" | "restart"] => StageName::ALL.iter().map(|it| it.as_str().to_owned()).collect(),
        ["messages"] => now.flow.keys().cloned().collect(),
        ["trigger" | "retry" | "clear" | "cancel"] => now.dag.dags.iter().map(|it| it.dag_id.clone()).collect(),
        ["retry" | "clear", dag] => now.dag.dag(dag).map(|it| it.tasks.iter().map(|task| task.0.clone()).collect()).unwrap_or_default(),
        _ => Vec::new(),
    }
}

fn stage_named(name: &str) -> Result<StageName, String> {
    StageName::ALL.into_iter().find(|it| it.as_str() == name).ok_or_else(|| unknown("stage", name, StageName::ALL.iter().map(|it| it.as_str())))
}

fn dag_named(name: &str, now: &Snapshot) -> Result<String, String> {
    let known = || now.dag.dags.iter().map(|it| it.dag_id.as_str());
    known().find(|it| it.eq_ignore_ascii_case(name)).map(str::to_owned).ok_or_else(|| unknown("DAG", name, known()))
}

fn task_named(name: &str, dag_id: &str, now: &Snapshot) -> Result<String, String> {
    let known = || now.dag.dag(dag_id).into_iter().flat_map(|it| it.tasks.iter().map(|task| task.0.as_str()));
    known().find(|it| *it == name).map(str::to_owned).ok_or_else(|| unknown("task", name, known()))
}

fn unknown<'a>(kind: &str, name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let near = known.map(|it| (strsim::jaro_winkler(name, it), it)).filter(|it| it.0 >= NEAR).max_by(|left, right| left.0.total_cmp(&right.0));
    let instead = if kind == "command" { "; : lists them" } else { "; Tab lists them" };
    near.map_or_else(|| format!("there is no {kind} {name:?}{instead}"), |(_, near)| format!("there is no {kind} {name:?}; did you mean {near}?"))
}
