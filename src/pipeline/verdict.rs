//! The one sentence an operator needs now: a pure function of the snapshot, said by console, lines and socket alike.
//!
//! The most urgent truth wins. It never says well when something is stale, waits or failed.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::{
    dag::{RunState, TaskState},
    embedded,
    notify::MailState,
    stage::Phase,
    units::grouped,
};

use super::{command::StageName, snapshot::Snapshot, supervise::Health};

/// How bad it is. Colour means state only, and so does the word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    #[default]
    Well,
    /// As an operator wished, or still on its way.
    Note,
    /// Late or waiting; mends itself.
    Late,
    /// Somebody must act.
    Failed,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Verdict {
    pub level: Level,
    pub text: String,
}

/// A cut older than this while money moves is late: three loads' worth at the default schedule.
const CUT_LATE_SECONDS: i64 = 120;

/// WAL kept back for the slot beyond this is worth a word.
const WAL_LATE_BYTES: u64 = 256 << 20;

/// A mail that has waited for longer than this is worth a word.
const MAIL_LATE_SECONDS: i64 = 60;

pub fn verdict(now: &Snapshot) -> Verdict {
    // Causes stand before what follows from them: of two that are as urgent, the first is said.
    let truths = [stopped_stage, stopped_lane, wrong_books, failed_task, ailing_service, waiting_stage, stale_stage, late, waiting_mail, paused, preparing];
    let urgent = truths.iter().rev().filter_map(|truth| truth(now)).max_by_key(|verdict| verdict.level);
    urgent.unwrap_or_else(|| all_well(now))
}

fn failed(text: String) -> Option<Verdict> {
    Some(Verdict { level: Level::Failed, text })
}

fn late_because(text: String) -> Option<Verdict> {
    Some(Verdict { level: Level::Late, text })
}

fn stopped_stage(now: &Snapshot) -> Option<Verdict> {
    let (name, stage) = now.stages.iter().find(|(_, stage)| stage.health.verdict().is_some())?;
    match &stage.health {
        Health::Held { reason, remedy, .. } => failed(format!("{name} stopped: {reason} · {remedy}")),
        Health::Failed { reason, remedy: Some(remedy), .. } => failed(format!("{name} stopped: {reason} · {remedy}")),
        Health::Failed { reason, remedy: None, .. } => failed(format!("{name} stopped, a bug of ours: {reason}")),
        _ => None,
    }
}

fn wrong_books(now: &Snapshot) -> Option<Verdict> {
    let report = &now.refresh.reconcile.as_ref()?.report;
    let wrong = report.checks.iter().find(|it| !it.ok)?;
    let detail = wrong.detail.as_deref().unwrap_or("no detail");
    failed(format!("books differ: {} · {detail}", wrong.name))
}

/// The newest finished or running run of each DAG is the one that counts: an older red run has been followed by a green one.
///
/// While a service of ours ails, tasks fail because of it; the schedule tries again.
fn failed_task(now: &Snapshot) -> Option<Verdict> {
    if ailing_service(now).is_some() {
        return None;
    }
    let newest = |dag: &'_ crate::dag::DagStats| dag.runs.iter().find(|run| run.state != RunState::Queued && run.state != RunState::Running).cloned();
    let run = now.dag.dags.iter().filter_map(newest).find(|run| run.state == RunState::Failed)?;
    let task = run.tasks.iter().find(|it| it.state == TaskState::Failed);
    let (name, error) = task.map_or((run.dag_id.as_str(), "cancelled"), |it| (it.task_id.as_str(), it.error.as_deref().unwrap_or("failed")));
    let when = run.finished_at.map(|at| format!(" {} ago", ago(now.at, at))).unwrap_or_default();
    failed(format!("{name} failed{when}: {error} · 3 Enter log · r retry"))
}

fn waiting_stage(now: &Snapshot) -> Option<Verdict> {
    let said = now.stages.iter().find_map(|(name, stage)| match &stage.health {
        // What waits is safe where it waits; that is the first thing to know at night.
        Health::Waiting { reason, since } if *name == StageName::Lake => {
            Some(format!("{name} waits for {}: {reason} · {}", ago(now.at, *since), in_kafka(now)))
        }
        Health::Waiting { reason, since } => Some(format!("{name} waits for {}: {reason}", ago(now.at, *since))),
        _ => None,
    });
    let within = || {
        let lake = now.lake.store_trouble.as_ref().map(|why| format!("S3 away: {why} · {}", in_kafka(now)));
        let kafka = now.lake.kafka_trouble.as_ref().map(|why| format!("lake: Kafka away: {why}"));
        let bank = now.bank.waiting.as_ref().map(|why| format!("bank waits: {why}"));
        let dag = now.dag.away.as_ref().map(|why| format!("scheduler waits: {why}"));
        let waiting = if now.cdc.connector.is_some() { "its connector waits".to_owned() } else { format!("{} messages wait", grouped(now.cdc.queued)) };
        let broker = now.cdc.broker_away.then(|| format!("cdc: Kafka away · {waiting}"));
        // Who reads the WAL elsewhere does not fail here; what it waits for is all there is to say.
        let connector = now.cdc.connector.as_ref().and(now.cdc.waiting_for.as_ref()).map(|what| format!("cdc waits for {what}"));
        lake.or(kafka).or(connector).or(broker).or(bank).or(dag)
    };
    late_because(said.or_else(within)?)
}

fn in_kafka(now: &Snapshot) -> String {
    format!("{} records wait in Kafka, none lost", grouped(now.lake.lag().unwrap_or_default()))
}

fn ailing_service(now: &Snapshot) -> Option<Verdict> {
    now.services.iter().find_map(|(name, health)| match health {
        embedded::Health::Ailing(reason) => late_because(format!("{name}: {reason}")),
        embedded::Health::Well => None,
    })
}

fn stopped_lane(now: &Snapshot) -> Option<Verdict> {
    let lane = now.lake.lanes.iter().find(|it| it.trouble.is_some())?;
    failed(format!("lake lane {}[{}] stopped: {}", lane.topic, lane.partition, lane.trouble.as_deref().unwrap_or_default()))
}

fn stale_stage(now: &Snapshot) -> Option<Verdict> {
    let (name, stage) = now.stages.iter().find(|(name, stage)| stage.is_stale(**name, now.at))?;
    late_because(format!("{name} has said nothing for {}", ago(now.at, stage.reported_at)))
}

fn paused(now: &Snapshot) -> Option<Verdict> {
    let (name, stage) = now.stages.iter().find(|(_, stage)| stage.wanted == Phase::Paused || stage.phase == Phase::Paused)?;
    if *name == StageName::Scheduler {
        return Some(Verdict { level: Level::Note, text: "The schedule is held · runs in progress and ordered ones go on".to_owned() });
    }
    let word = match (stage.wanted, stage.phase) {
        (Phase::Paused, Phase::Running) => "pausing…".to_owned(),
        (Phase::Running, Phase::Paused) => "resuming…".to_owned(),
        _ => format!("paused by you {} ago · p resumes", ago(now.at, stage.since)),
    };
    Some(Verdict { level: Level::Note, text: format!("{} {word}", capitalised(name.as_str())) })
}

fn late(now: &Snapshot) -> Option<Verdict> {
    if now.cdc.lag_bytes > WAL_LATE_BYTES {
        return late_because(format!("cdc is {} behind", crate::units::bytes_for_people(now.cdc.lag_bytes)));
    }
    let (cut, flowing_since) = (now.cut()?, now.flowing_since?);
    let money_moves = now.bank.phase == Phase::Running && now.bank.clock.is_some_and(|clock| clock > cut.committed_at);
    // Neither the time between two invocations nor a pause of the bank is anybody's delay.
    let standing = (now.at - cut.committed_at.max(flowing_since)).num_seconds();
    if money_moves && standing > CUT_LATE_SECONDS {
        return late_because(format!("KPIs stand still: as of {}, {} old, and money moves", clock(cut.committed_at), ago(now.at, cut.committed_at)));
    }
    None
}

/// A server that is busy for a moment is nobody's business.
fn waiting_mail(now: &Snapshot) -> Option<Verdict> {
    let oldest = now.mail.newest.iter().filter(|it| it.state == MailState::Waiting).map(|it| it.recorded_at).min()?;
    let why = now.mail.away.as_ref().filter(|_| (now.at - oldest).num_seconds() > MAIL_LATE_SECONDS)?;
    let letters = if now.mail.waiting == 1 { "1 mail waits".to_owned() } else { format!("{} mails wait", grouped(now.mail.waiting)) };
    late_because(format!("{letters} for {}: {why} · :mail", ago(now.at, oldest)))
}

fn preparing(now: &Snapshot) -> Option<Verdict> {
    if now.cut().is_some() || now.stages.get(&StageName::Scheduler).is_none_or(|it| it.health == Health::Off) {
        return None;
    }
    let flowing = grouped(now.messages_per_second());
    Some(Verdict { level: Level::Note, text: format!("Starting · {flowing} msg/s · no KPIs yet, the next dbt run makes them") })
}

fn all_well(now: &Snapshot) -> Verdict {
    let mut parts = vec!["All well".to_owned(), format!("{} msg/s", grouped(now.messages_per_second()))];
    if let Some(cut) = now.cut() {
        parts.push(format!("KPIs as of {}, {} old", clock(cut.committed_at), ago(now.at, cut.committed_at)));
    }
    if now.refresh.reconcile.as_ref().is_some_and(|it| it.report.ok) {
        parts.push("books balance".to_owned());
    }
    Verdict { level: Level::Well, text: parts.join(" · ") }
}

fn clock(at: DateTime<Utc>) -> String {
    at.format("%H:%M:%S").to_string()
}

/// How long ago, in the largest unit that says something: `9 s`, `2 min`, `3 h`.
fn ago(now: DateTime<Utc>, then: DateTime<Utc>) -> String {
    match (now - then).num_seconds().max(0) {
        seconds @ 0..100 => format!("{seconds} s"),
        seconds @ 100..6000 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}

fn capitalised(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}
