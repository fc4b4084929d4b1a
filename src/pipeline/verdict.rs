//! The one sentence an operator needs now: a pure function of the snapshot, said by console, lines and socket alike.
//!
//! The most urgent truth wins. It never says well when something is stale, waits or failed.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::{
    bank, cdc,
    dag::{DagStats, RunState, Schedule, TaskState},
    embedded,
    notify::MailState,
    refresh,
    stage::Phase,
    units::{bytes_for_people, grouped},
    warehouse::Cut,
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
    /// What an operator may do about it. Each front end says it in its own words: keys, or a command.
    #[serde(default)]
    pub way: Option<Way>,
}

/// A way out that an operator has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "way", rename_all = "snake_case")]
pub enum Way {
    /// Try the failed task again.
    Retry { dag_id: String, run_id: String, task_id: String },
    /// Let go what an operator holds.
    Resume { stages: Vec<StageName> },
    /// Start a run.
    Trigger { dag_id: String },
    /// Read what keeps the mails.
    Mails,
}

impl Verdict {
    fn new(level: Level, text: String) -> Self {
        Self { level, text, way: None }
    }

    fn with_way(self, way: Way) -> Self {
        Self { way: Some(way), ..self }
    }

    /// The sentence for where there are lines and no keys: the way out is a command.
    pub fn line(&self) -> String {
        let command = self.way.as_ref().map(|way| match way {
            Way::Retry { dag_id, run_id, task_id } => format!("`ledgerline dag retry {dag_id} {task_id} --run-id {run_id}`"),
            Way::Resume { .. } => "`ledgerline attach` resumes with p".to_owned(),
            Way::Trigger { dag_id } => format!("`ledgerline dag trigger {dag_id}`"),
            Way::Mails => "`ledgerline attach` lists them with :mail".to_owned(),
        });
        command.map_or_else(|| self.text.clone(), |command| format!("{} · {command}", self.text))
    }
}

/// How far an invocation with a goal has come that is ending: the bank is done, the rest follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// What the bank wrote is on its way to the lake.
    Draining,
    /// All of it lies there; the last runs of both DAGs take it in.
    LastRuns,
    Letters,
}

/// A cut older than this while money moves is late, whatever the schedule.
const CUT_LATE_SECONDS: i64 = 120;

/// And older than so many intervals of the schedule: a load and a transformation that end in time stay far below.
const CUT_LATE_INTERVALS: i64 = 3;

/// At a wished rate from here on, seconds without a message are no chance.
const RATE_WITHOUT_GAPS: u32 = 5;

/// So many seconds; the lake asks for the ends of its lanes once a second, and may miss a beat.
const STILL_SECONDS: usize = 3;

/// What an earlier process left is read first; money that does not come within this time after the start is missing.
const START_SECONDS: i64 = 15;

/// WAL kept back for the slot beyond this is worth a word.
const WAL_LATE_BYTES: u64 = 256 << 20;

/// A mail that has waited for longer than this is worth a word.
const MAIL_LATE_SECONDS: i64 = 60;

pub fn verdict(now: &Snapshot) -> Verdict {
    // Causes stand before what follows from them: of two that are as urgent, the first is said.
    let truths = [
        stopped_stage,
        stopped_lane,
        endangered_slot,
        wrong_books,
        failed_task,
        ailing_service,
        waiting_stage,
        stale_stage,
        still,
        late,
        waiting_mail,
        ending,
        paused,
        reading,
        repeated,
        fresh,
    ];
    let urgent = truths.iter().rev().filter_map(|truth| truth(now)).max_by_key(|verdict| verdict.level);
    urgent.unwrap_or_else(|| all_well(now))
}

fn failed(text: String) -> Option<Verdict> {
    Some(Verdict::new(Level::Failed, text))
}

fn late_because(text: String) -> Option<Verdict> {
    Some(Verdict::new(Level::Late, text))
}

fn note(text: String) -> Option<Verdict> {
    Some(Verdict::new(Level::Note, text))
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

/// Its WAL is removed once the server's limit is reached, and with it the changes that nobody has read.
fn endangered_slot(now: &Snapshot) -> Option<Verdict> {
    let slot = now.cdc.slot.as_ref().filter(|it| it.in_danger())?;
    let left = slot.seconds_left.map_or_else(|| "any moment".to_owned(), |it| format!("in {}", span(it)));
    failed(format!("the replication slot is lost {left}, {} behind · let cdc run, or raise max_slot_wal_keep_size", bytes_for_people(now.cdc.lag_bytes)))
}

fn wrong_books(now: &Snapshot) -> Option<Verdict> {
    let report = &now.refresh.reconcile.as_ref()?.report;
    let wrong = report.checks.iter().find(|it| !it.ok)?;
    let detail = wrong.detail.as_deref().unwrap_or("no detail");
    failed(format!("books differ: {} · {detail}", wrong.name))
}

/// The last word of each DAG counts: an older red run has been followed by a green one.
///
/// While a service of ours ails, tasks fail because of it; the schedule tries again.
fn failed_task(now: &Snapshot) -> Option<Verdict> {
    if ailing_service(now).is_some() {
        return None;
    }
    let last = now.dag.dags.iter().filter_map(|dag| Some((dag, dag.last_word()?)));
    let (dag, run) = last.filter(|(_, run)| run.state == RunState::Failed).max_by_key(|(_, run)| (!run.cancelled, run.finished_at))?;
    let when = run.finished_at.map(|at| format!(" {} ago", ago(now.at, at))).unwrap_or_default();
    if run.cancelled {
        let text = format!("{} was cancelled by an operator{when}", run.dag_id);
        return Some(Verdict::new(Level::Note, text).with_way(Way::Trigger { dag_id: run.dag_id.clone() }));
    }
    let Some(task) = run.tasks.iter().find(|it| it.state == TaskState::Failed) else { return failed(format!("{} failed{when}", run.dag_id)) };
    let name = &task.task_id;
    let newer = dag.runs.first().filter(|it| it.state == RunState::Running);
    if newer.is_some_and(|run| run.tasks.iter().any(|it| it.task_id == *name && it.state == TaskState::Success)) {
        return late_because(format!("{name} failed{when} and has succeeded in the run in progress"));
    }
    let meanwhile = if newer.is_some() { " · a new run is in progress" } else { "" };
    let text = format!("{name} failed{when}: {}{meanwhile}", task.error.as_deref().unwrap_or("no reason was given"));
    let way = Way::Retry { dag_id: run.dag_id.clone(), run_id: run.run_id.clone(), task_id: name.clone() };
    Some(Verdict::new(Level::Failed, text).with_way(way))
}

/// What an operator runs again is neither failed any more nor well yet.
fn repeated(now: &Snapshot) -> Option<Verdict> {
    let run = now.dag.dags.iter().filter_map(DagStats::last_word).find(|run| run.is_repeated())?;
    let task = run.tasks.iter().find(|it| it.state == TaskState::Running).or_else(|| run.tasks.iter().find(|it| !it.state.is_final()))?;
    let to_go = run.tasks.iter().filter(|it| !it.state.is_final()).count();
    let tasks = if to_go == 1 { "1 task".to_owned() } else { format!("{to_go} tasks") };
    let how = match task.state {
        TaskState::Running => format!("is run again, try {}", task.tries),
        _ => "is to be run again".to_owned(),
    };
    note(format!("{} {how} · {tasks} to go in {}", task.task_id, run.dag_id))
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
        // Ours waits out what passes by itself, and says what that is.
        let interrupted = now.cdc.waiting_for.as_ref().filter(|_| now.cdc.connector.is_none() && now.cdc.step == cdc::Step::Connecting);
        let cdc = interrupted.map(|why| format!("cdc waits: {why}"));
        lake.or(kafka).or(connector).or(cdc).or(broker).or(bank).or(dag)
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

/// What the operator holds, all of it.
fn paused(now: &Snapshot) -> Option<Verdict> {
    // The schedule of a run that ends is held by its goal, not by anybody.
    let holds = |name: StageName| name != StageName::Scheduler || now.ending.is_none();
    let held: Vec<_> = now.stages.iter().filter(|(name, it)| holds(**name) && (it.wanted == Phase::Paused || it.phase == Phase::Paused)).collect();
    let stand = held.iter().filter(|(_, it)| it.wanted == it.phase).map(|(name, _)| word_of(**name)).collect::<Vec<_>>();
    let mut parts = Vec::new();
    if !stand.is_empty() {
        let since = held.iter().filter(|(_, it)| it.wanted == it.phase).map(|(_, it)| it.since).min().unwrap_or(now.at);
        parts.push(format!("{} paused by you {} ago", listed(&stand), ago(now.at, since)));
    }
    for (name, it) in held.iter().filter(|(_, it)| it.wanted != it.phase) {
        parts.push(format!("{} {}", word_of(**name), if it.wanted == Phase::Paused { "pausing…" } else { "resuming…" }));
    }
    if let Some(dag) = now.dag.dags.iter().find(|it| it.paused) {
        parts.push(format!("schedule of {} paused by you", dag.dag_id));
    }
    if parts.is_empty() {
        return None;
    }
    let stages: Vec<StageName> = held.iter().filter(|(_, it)| it.wanted == Phase::Paused).map(|(name, _)| **name).collect();
    let verdict = Verdict::new(Level::Note, capitalised(&parts.join(" · ")));
    Some(if stages.is_empty() { verdict } else { verdict.with_way(Way::Resume { stages }) })
}

fn word_of(name: StageName) -> &'static str {
    if name == StageName::Scheduler { "schedule" } else { name.as_str() }
}

/// `bank, cdc and lake`.
fn listed(words: &[&str]) -> String {
    match words {
        [before @ .., last] if !before.is_empty() => format!("{} and {last}", before.join(", ")),
        _ => words.concat(),
    }
}

/// An invocation that has reached its time: what is left to do.
fn ending(now: &Snapshot) -> Option<Verdict> {
    let left = match now.ending? {
        Ending::Draining => {
            let lag = now.lake.lag().map_or_else(|| "–".to_owned(), grouped);
            format!("{lag} records to land, {} of WAL to read", bytes_for_people(now.cdc.lag_bytes))
        }
        Ending::LastRuns => {
            let runs = now.dag.dags.iter().flat_map(|it| &it.runs).filter(|run| !run.state.is_final());
            let tasks = runs.flat_map(|run| &run.tasks).filter(|it| !it.state.is_final());
            let running = tasks.clone().find(|it| it.state == TaskState::Running).map(|it| format!(", {} runs", it.task_id));
            format!("last runs of both DAGs, {} tasks to go{}", tasks.count(), running.unwrap_or_default())
        }
        Ending::Letters => format!("{} letters to send", grouped(now.mail.waiting)),
    };
    note(format!("The bank is done, draining: {left}"))
}

/// Rows from before, on their way as they are.
fn reading(now: &Snapshot) -> Option<Verdict> {
    if let Some(again) = &now.cdc.incremental_snapshot {
        return note(format!("cdc reads {} again: {}", again.table, read_so_far(again.rows, again.rows_estimated, again.seconds_left)));
    }
    let read = now.cdc.snapshot.as_ref().filter(|_| now.cdc.step == cdc::Step::Snapshot && now.cdc.waiting_for.is_none())?;
    let place = match read.reading.as_slice() {
        [one, more @ ..] if !more.is_empty() => format!("{one} and {} more at once, {} of {} tables done", more.len(), read.tables_done, read.tables),
        [one] => format!("{one}, table {} of {}", (read.tables_done + 1).min(read.tables), read.tables),
        _ => format!("table {} of {}", (read.tables_done + 1).min(read.tables), read.tables),
    };
    note(format!("cdc reads what the source holds: {place}, {}", read_so_far(read.rows, read.rows_estimated, read.seconds_left)))
}

/// `1,200,000 of about 5,000,000 rows, 24 %, 3 min left`.
fn read_so_far(rows: u64, estimated: u64, seconds_left: Option<u64>) -> String {
    let mut text = grouped(rows);
    // A planner that has never looked knows nothing, and one that looked long ago too little.
    match rows.saturating_mul(100).checked_div(estimated) {
        Some(share @ 0..100) => text += &format!(" of about {} rows, {share} %", grouped(estimated)),
        _ => text += " rows",
    }
    text + &seconds_left.map_or_else(String::new, |it| format!(", {} left", span(it)))
}

fn bank_moves(now: &Snapshot) -> bool {
    now.stage(StageName::Bank).is_some_and(|it| it.health == Health::Working && it.wanted == Phase::Running && it.phase == Phase::Running)
}

/// The bank should pay and nothing arrives.
fn still(now: &Snapshot) -> Option<Verdict> {
    let held = now.stages.values().any(|it| it.wanted == Phase::Paused || it.phase == Phase::Paused);
    let wished = match now.wish.rate {
        bank::Rate::PerSecond(rate) if rate.get() < RATE_WITHOUT_GAPS => return None,
        bank::Rate::PerSecond(rate) => format!("{} tx/s are wished", grouped(rate.get().into())),
        bank::Rate::Unlimited => "the bank goes as fast as it can".to_owned(),
    };
    let is_still = |flow: &super::snapshot::Flow| flow.history.len() >= STILL_SECONDS && flow.history.iter().rev().take(STILL_SECONDS).all(|it| *it == 0);
    let nothing_comes = !now.flow.is_empty() && now.flow.values().all(is_still);
    // Before anything has come at all, it is a start.
    let starts = now.bank.transactions == 0 || (now.at - now.started_at).num_seconds() < START_SECONDS;
    if held || starts || !bank_moves(now) || !nothing_comes {
        return None;
    }
    late_because(format!("No money arrives: {wished}, 0 msg/s come"))
}

fn late(now: &Snapshot) -> Option<Verdict> {
    if now.cdc.lag_bytes > WAL_LATE_BYTES {
        return late_because(format!("cdc is {} behind", bytes_for_people(now.cdc.lag_bytes)));
    }
    let (cut, flowing_since) = (now.cut()?, now.flowing_since?);
    // Neither the time between two invocations nor a pause of the bank is anybody's delay.
    let standing = (now.at - cut.committed_at.max(flowing_since)).num_seconds();
    if money_moves(now, cut) && standing > patience(now)? {
        return late_because(format!("KPIs stand still: as of {}, {} old, and money moves", clock(cut.committed_at), ago(now.at, cut.committed_at)));
    }
    None
}

fn money_moves(now: &Snapshot, cut: Cut) -> bool {
    now.bank.phase == Phase::Running && now.bank.clock.is_some_and(|clock| clock > cut.committed_at)
}

/// How old the KPIs may become by the schedule, in seconds; None where no schedule says.
fn patience(now: &Snapshot) -> Option<i64> {
    let loading = now.dag.dag(refresh::LOADING)?;
    match loading.schedule.parse::<Schedule>() {
        Ok(Schedule::Every(interval)) => Some(i64::try_from(interval.as_secs()).unwrap_or(i64::MAX).saturating_mul(CUT_LATE_INTERVALS).max(CUT_LATE_SECONDS)),
        // By the clock: late once a start is overdue.
        Ok(Schedule::Cron { .. }) => loading.next_start.filter(|at| (now.at - *at).num_seconds() > CUT_LATE_SECONDS).map(|_| CUT_LATE_SECONDS),
        Ok(Schedule::Never) | Err(_) => None,
    }
}

/// A server that is busy for a moment is nobody's business.
fn waiting_mail(now: &Snapshot) -> Option<Verdict> {
    let oldest = now.mail.newest.iter().filter(|it| it.state == MailState::Waiting).map(|it| it.recorded_at).min()?;
    let why = now.mail.away.as_ref().filter(|_| (now.at - oldest).num_seconds() > MAIL_LATE_SECONDS)?;
    let letters = if now.mail.waiting == 1 { "1 mail waits".to_owned() } else { format!("{} mails wait", grouped(now.mail.waiting)) };
    late_because(format!("{letters} for {}: {why}", ago(now.at, oldest))).map(|it| it.with_way(Way::Mails))
}

/// Until the KPIs are of what flows now, nothing is well yet: neither right after the start nor after a pause.
fn fresh(now: &Snapshot) -> Option<Verdict> {
    if now.stages.get(&StageName::Scheduler).is_none_or(|it| it.health == Health::Off) {
        return None;
    }
    let flowing = format!("{} msg/s", grouped(now.messages_per_second()));
    let loading = now.dag.dag(refresh::LOADING);
    let by_hand = loading.is_some_and(|it| it.schedule == Schedule::Never.to_string());
    let way = Way::Trigger { dag_id: refresh::LOADING.to_owned() };
    let of = |cut: Cut| format!("KPIs as of {}, {} old", clock(cut.committed_at), ago(now.at, cut.committed_at));
    let (text, has_way) = match (now.cut(), &now.refresh.earlier) {
        (Some(cut), _) if !money_moves(now, cut) => return None,
        (Some(cut), _) if by_hand && (now.at - cut.committed_at).num_seconds() > CUT_LATE_SECONDS => (format!("No schedule · {flowing} · {}", of(cut)), true),
        (Some(cut), _) if now.flowing_since.is_some_and(|since| cut.committed_at < since) => {
            (format!("Catching up · {flowing} · {}, the next dbt run makes new ones", of(cut)), false)
        }
        (Some(_), _) => return None,
        (None, None) => (format!("Starting · {flowing} · KPIs not read yet"), false),
        (None, Some(earlier)) => match (&earlier.kpis, &earlier.unread) {
            (Some(kpis), _) => {
                let cut = kpis.reading.cut.map_or_else(|| "KPIs of an earlier run".to_owned(), of);
                (format!("Starting · {flowing} · {cut}, {}", if by_hand { "no schedule makes new ones" } else { "the next dbt run makes new ones" }), by_hand)
            }
            (None, Some(why)) => (format!("Starting · {flowing} · KPIs not read: {why}"), by_hand),
            (None, None) => {
                (format!("Starting · {flowing} · no KPIs yet, {}", if by_hand { "no schedule makes them" } else { "the next dbt run makes them" }), by_hand)
            }
        },
    };
    let verdict = Verdict::new(Level::Note, text);
    Some(if has_way { verdict.with_way(way) } else { verdict })
}

fn all_well(now: &Snapshot) -> Verdict {
    let mut parts = vec!["All well".to_owned(), format!("{} msg/s", grouped(now.messages_per_second()))];
    if let Some(cut) = now.cut() {
        parts.push(format!("KPIs as of {}, {} old", clock(cut.committed_at), ago(now.at, cut.committed_at)));
    }
    if now.refresh.reconcile.as_ref().is_some_and(|it| it.report.ok) {
        parts.push("books balance".to_owned());
    }
    Verdict::new(Level::Well, parts.join(" · "))
}

fn clock(at: DateTime<Utc>) -> String {
    at.format("%H:%M:%S").to_string()
}

/// How long ago, in a unit that never says less than the one before: `119 s`, `2 min`, `119 min`, `2 h`, `47 h`, `2 d`.
fn ago(now: DateTime<Utc>, then: DateTime<Utc>) -> String {
    span(u64::try_from((now - then).num_seconds()).unwrap_or(0))
}

fn span(seconds: u64) -> String {
    match seconds {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

fn capitalised(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}
