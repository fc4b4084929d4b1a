//! The outbox in the state database, and the stage that empties it.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use lettre::{
    Message,
    address::Envelope,
    message::{Mailboxes, MultiPart},
};
use serde::{Deserialize, Serialize};
use sqlx::{
    Connection, Executor as _, PgConnection, Postgres, Row, Transaction,
    postgres::{PgConnectOptions, PgRow},
};
use tokio::sync::Notify;
use tracing::{info, warn};

use super::{
    Config, Error, Stats,
    alarm::{self, Alarm, Word},
    letter::Letter,
    transport::{Carrier, Handover, Parcel},
};
use crate::{
    fault::{self, Backoff, Diagnose, Fault},
    secret::Secret,
    stage::{Control, Phase},
    units::Span,
};

/// How often the outbox is looked at without being told; another process may have recorded something.
const LOOKS_EVERY: Duration = Duration::from_secs(2);

/// Waiting time after the first failed delivery, and the longest one.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(1);
const TRY_AGAIN_AFTER_MAX: Duration = Duration::from_secs(300);

/// Mails listed for the console.
const SHOWN: i64 = 20;

const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// The outbox's tables, version by version.
const MIGRATIONS: [&str; 2] = [include_str!("schema.sql"), include_str!("schema_2.sql")];

/// What a letter is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    LoadReport,
    TransformationReport,
    Failure,
    Recovery,
}

/// Which letter: the Message-ID follows from it, so the same letter is recorded once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    pub dag_id: String,
    pub run_id: String,
    pub kind: Kind,
    /// For letters about one task: which, and after how many tries.
    pub task: Option<(String, u32)>,
}

/// Where a letter stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MailState {
    Waiting,
    Sent,
    Refused,
}

/// A recorded letter, as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mail {
    pub message_id: String,
    pub dag_id: String,
    pub run_id: String,
    pub subject: String,
    pub to: Vec<String>,
    pub state: MailState,
    pub recorded_at: DateTime<Utc>,
    pub sent_at: Option<DateTime<Utc>>,
    pub tries: u32,
    pub error: Option<String>,
}

/// Records letters. Cheap to clone; every call opens a connection of its own.
#[derive(Debug, Clone)]
pub struct Outbox {
    state: Secret,
    config: Arc<Config>,
    recorded: Arc<Notify>,
}

impl Kind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::LoadReport => "load_report",
            Self::TransformationReport => "transformation_report",
            Self::Failure => "failure",
            Self::Recovery => "recovery",
        }
    }
}

impl About {
    /// `failure.demo.scheduled__2026-11-22T12-00-00-00-00.dbt_staging.3@example.org`.
    fn message_id(&self, domain: &str) -> String {
        let task = self.task.as_ref().map(|(task_id, tries)| format!(".{task_id}.{tries}")).unwrap_or_default();
        let whole = format!("{}.{}.{}{task}", self.kind.as_str(), self.dag_id, self.run_id);
        let atoms: String = whole.chars().map(|it| if it.is_ascii_alphanumeric() || "_-.".contains(it) { it } else { '-' }).collect();
        format!("{atoms}@{domain}")
    }
}

/// The name of a letter's file: by time, then by what it is about.
fn file_name(message_id: &str, recorded_at: DateTime<Utc>) -> String {
    let local = message_id.rsplit_once('@').map_or(message_id, |(local, _)| local);
    // 255 bytes is what file systems take; the time keeps shortened names apart.
    let local = &local[..local.floor_char_boundary(200)];
    format!("{}-{local}.eml", recorded_at.format("%Y%m%dT%H%M%S%.6fZ"))
}

impl Outbox {
    pub fn new(state: &Secret, config: &Config) -> Self {
        Self { state: state.clone(), config: Arc::new(config.clone()), recorded: Arc::new(Notify::new()) }
    }

    /// The shortest time between two letters about one failing task.
    pub fn repeat_after(&self) -> Span {
        self.config.repeat_after
    }

    /// Records a letter; false where it was recorded before. On Ok it will be delivered.
    pub async fn post(&self, about: &About, letter: &Letter, now: DateTime<Utc>) -> Result<bool, Error> {
        let mut connection = self.open().await?;
        let mut transaction = answer("record a letter", connection.begin()).await?;
        let new = self.record(&mut transaction, about, letter, now).await?;
        answer("record a letter", transaction.commit()).await?;
        self.recorded.notify_one();
        Ok(new)
    }

    /// Hears that a task failed for good, and records the letter it deserves, if it does. `letter` is told how many
    /// failures went unmentioned. Hearing the same failure again changes nothing.
    pub async fn failed(&self, about: &About, letter: impl FnOnce(u32) -> Letter + Send, now: DateTime<Utc>) -> Result<Word, Error> {
        let (task_id, tries) = about.task.clone().unwrap_or_default();
        let doing = "record an alarm";
        let mut connection = self.open().await?;
        let mut transaction = answer(doing, connection.begin()).await?;
        let before = alarm_of(&mut transaction, &about.dag_id, &task_id).await?;
        let (after, word) = alarm::failed(before, &format!("{}.{tries}", about.run_id), now, *self.config.repeat_after);
        let upsert = sqlx::query(UPSERT_ALARM)
            .bind(&about.dag_id)
            .bind(&task_id)
            .bind(after.failing_since)
            .bind(after.last_mail_at)
            .bind(i64::from(after.failures))
            .bind(i64::from(after.held))
            .bind(&after.last_heard);
        answer(doing, upsert.execute(&mut *transaction)).await?;
        if let Word::Failure { held } = word {
            self.record(&mut transaction, about, &letter(held), now).await?;
        }
        answer(doing, transaction.commit()).await?;
        self.recorded.notify_one();
        Ok(word)
    }

    /// Hears that tasks of a DAG succeeded. For those with an alarm, `letter` is recorded and the alarm is over.
    pub async fn succeeded(
        &self,
        dag_id: &str,
        run_id: &str,
        task_ids: &[String],
        letter: impl Fn(&str, DateTime<Utc>, u32) -> Letter + Send + Sync,
        now: DateTime<Utc>,
    ) -> Result<(), Error> {
        let doing = "record a recovery";
        let mut connection = self.open().await?;
        let select = sqlx::query_scalar("select task_id from ledgerline.mail_alarm where dag_id = $1 and task_id = any($2) order by task_id");
        let alarmed: Vec<String> = answer(doing, select.bind(dag_id).bind(task_ids).fetch_all(&mut connection)).await?;
        for task_id in alarmed {
            let mut transaction = answer(doing, connection.begin()).await?;
            let alarm = alarm_of(&mut transaction, dag_id, &task_id).await?;
            if let Word::Recovery { failing_since, failures } = alarm::succeeded(alarm.as_ref()) {
                let about = About { dag_id: dag_id.to_owned(), run_id: run_id.to_owned(), kind: Kind::Recovery, task: Some((task_id.clone(), failures)) };
                self.record(&mut transaction, &about, &letter(&task_id, failing_since, failures), now).await?;
                let delete = sqlx::query("delete from ledgerline.mail_alarm where dag_id = $1 and task_id = $2").bind(dag_id).bind(&task_id);
                answer(doing, delete.execute(&mut *transaction)).await?;
            }
            answer(doing, transaction.commit()).await?;
            self.recorded.notify_one();
        }
        Ok(())
    }

    /// Letters recorded since then, oldest first.
    pub async fn since(&self, then: DateTime<Utc>) -> Result<Vec<Mail>, Error> {
        let mut connection = self.open().await?;
        let rows = answer("list letters", sqlx::query(SELECT_SINCE).bind(then).fetch_all(&mut connection)).await?;
        rows.iter().map(|row| mail_from(row).map_err(Error::failed("list letters"))).collect()
    }

    /// The stored bytes of the letter are what every try sends: Date, boundaries and all.
    async fn record(&self, transaction: &mut Transaction<'_, Postgres>, about: &About, letter: &Letter, now: DateTime<Utc>) -> Result<bool, Error> {
        let message_id = about.message_id(self.config.from.domain());
        let message = compose(&self.config, &message_id, letter, now)?;
        let insert = sqlx::query(INSERT_MAIL)
            .bind(&message_id)
            .bind(&about.dag_id)
            .bind(&about.run_id)
            .bind(about.kind.as_str())
            .bind(self.config.from.mailbox().email.to_string())
            .bind(self.config.to.iter().map(|it| it.mailbox().email.to_string()).collect::<Vec<_>>())
            .bind(&letter.subject)
            .bind(message)
            .bind(now);
        Ok(answer("record a letter", insert.execute(&mut **transaction)).await?.rows_affected() == 1)
    }

    async fn open(&self) -> Result<PgConnection, Error> {
        let options: PgConnectOptions = self.state.reveal().parse().map_err(Error::failed("read the state database's address"))?;
        let options = options.application_name("ledgerline outbox");
        let mut connection = answer("connect to the state database", PgConnection::connect_with(&options)).await?;
        migrate(&mut connection).await?;
        Ok(connection)
    }
}

fn compose(config: &Config, message_id: &str, letter: &Letter, now: DateTime<Utc>) -> Result<Vec<u8>, Error> {
    let to: Mailboxes = config.to.iter().map(|it| it.mailbox().clone()).collect();
    let message = Message::builder()
        .from(config.from.mailbox().clone())
        .mailbox(lettre::message::header::To::from(to))
        .subject(letter.subject.clone())
        .message_id(Some(format!("<{message_id}>")))
        .date(now.into())
        .multipart(MultiPart::alternative_plain_html(letter.text.clone(), letter.html.clone()));
    message.map(|it| it.formatted()).map_err(Error::Compose)
}

/// Delivers what the outbox holds until stopped; then once more, so that nothing that can leave stays behind.
///
/// Owns the transport. Never ends because a server is away: letters wait and go later, oldest first.
pub async fn run(outbox: Outbox, carrier: Carrier, mut control: Control<Stats>) -> Result<(), Error> {
    let stop = control.stop.clone();
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));
    let mut phase = *control.wanted.borrow();
    loop {
        let last = stop.is_cancelled();
        let wait = match empty(&outbox, &carrier, phase, &control).await {
            Ok(()) => {
                backoff.reset();
                LOOKS_EVERY
            }
            Err(error) if matches!(error.fault(), Fault::Transient) => {
                let why = fault::chain(&error);
                warn!(error = %why, "the outbox is away");
                control.stats.send_modify(|it| it.away = Some(why));
                backoff.delay()
            }
            Err(error) => return Err(error),
        };
        if last {
            return Ok(());
        }
        tokio::select! { biased;
            () = stop.cancelled() => {}
            wish = control.next_wish() => phase = wish,
            () = outbox.recorded.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Delivers all that is due, one transaction each; stops at the first that finds the server away, to keep the order.
async fn empty(outbox: &Outbox, carrier: &Carrier, phase: Phase, control: &Control<Stats>) -> Result<(), Error> {
    let mut connection = outbox.open().await?;
    let mut sent = 0;
    let mut away = None;
    while phase == Phase::Running && away.is_none() {
        match deliver_one(&mut connection, carrier).await? {
            Delivery::Sent => sent += 1,
            Delivery::Refused => {}
            Delivery::Away(why) => away = Some(why),
            Delivery::NothingDue => break,
        }
    }
    if sent > 0 {
        let kept = i64::from(outbox.config.kept.get());
        answer("forget old letters", sqlx::query(PRUNE).bind(kept).execute(&mut connection)).await?;
    }
    let counts = answer("count letters", sqlx::query(COUNT).fetch_one(&mut connection)).await?;
    let rows = answer("list letters", sqlx::query(SELECT_NEWEST).bind(SHOWN).fetch_all(&mut connection)).await?;
    let newest: Result<Vec<Mail>, sqlx::Error> = rows.iter().map(mail_from).collect();
    let newest = newest.map_err(Error::failed("list letters"))?;
    let count = |column: usize| counts.try_get::<i64, _>(column).map(i64::unsigned_abs).map_err(Error::failed("count letters"));
    let (waiting, refused) = (count(0)?, count(1)?);
    // While letters wait for their next try, the reason of the last one stands.
    let away = away.or_else(|| newest.iter().rev().find(|it| it.state == MailState::Waiting).and_then(|it| it.error.clone()));
    control.stats.send_modify(|it| {
        *it = Stats { waiting, refused, sent: it.sent + sent, away, looked_at: Some(Utc::now()), newest };
    });
    Ok(())
}

enum Delivery {
    Sent,
    Refused,
    Away(String),
    NothingDue,
}

/// The row stays locked while the letter leaves, so of several processes one delivers it.
async fn deliver_one(connection: &mut PgConnection, carrier: &Carrier) -> Result<Delivery, Error> {
    let doing = "take a letter from the outbox";
    let mut transaction = answer(doing, connection.begin()).await?;
    let row = answer(doing, sqlx::query(TAKE_ONE).bind(Utc::now()).fetch_optional(&mut *transaction)).await?;
    let Some(row) = row else { return Ok(Delivery::NothingDue) };
    let (message_id, tries, mut seen, parcel) = parcel_from(&row).map_err(Error::failed(doing))?;
    let handover = carrier.deliver(parcel).await;
    let away = seen.note(handover);
    let state = match (&away, seen.reached.is_empty()) {
        (Some(_), _) => MailState::Waiting,
        (None, false) => MailState::Sent,
        (None, true) => MailState::Refused,
    };
    let told: Vec<String> = seen.refusals.iter().cloned().chain(away.clone()).collect();
    let error = (!told.is_empty()).then(|| told.join("; "));
    let now = Utc::now();
    let next_try_at = now + TimeDelta::from_std(try_again_after(tries)).unwrap_or_default();
    let update = sqlx::query(UPDATE_MAIL).bind(&message_id).bind(state.to_string()).bind(now).bind(next_try_at).bind(&error);
    answer("note a delivery", update.bind(&seen.reached).bind(&seen.refusals).execute(&mut *transaction)).await?;
    answer("note a delivery", transaction.commit()).await?;
    Ok(match state {
        MailState::Sent => {
            info!(message_id, "mail sent");
            if let Some(error) = error {
                warn!(message_id, error, "mail refused for good for some of its recipients");
            }
            Delivery::Sent
        }
        MailState::Refused => {
            warn!(message_id, error, "mail refused for good");
            Delivery::Refused
        }
        MailState::Waiting => {
            warn!(message_id, error, "mail waits");
            Delivery::Away(error.unwrap_or_default())
        }
    })
}

/// What was noted of a letter's recipients by earlier tries, and is added to by this one.
struct Seen {
    reached: Vec<String>,
    /// `address: why`.
    refusals: Vec<String>,
}

impl Seen {
    /// Whether it still has to go to this address.
    fn is_open(&self, address: &str) -> bool {
        let is_refused = |it: &String| it.strip_prefix(address).is_some_and(|rest| rest.starts_with(": "));
        !self.reached.iter().any(|it| it == address) && !self.refusals.iter().any(is_refused)
    }

    /// Why the rest waits, if some do.
    fn note(&mut self, handover: Handover) -> Option<String> {
        self.reached.extend(handover.reached.iter().map(ToString::to_string));
        self.refusals.extend(handover.refused.iter().map(|(address, error)| format!("{address}: {}", fault::chain(error))));
        handover.away.map(|error| fault::chain(&error))
    }
}

/// After so many failed tries before this one.
fn try_again_after(tries: u32) -> Duration {
    TRY_AGAIN_AFTER.saturating_mul(1_u32.checked_shl(tries).unwrap_or(u32::MAX)).min(TRY_AGAIN_AFTER_MAX)
}

async fn migrate(connection: &mut PgConnection) -> Result<(), Error> {
    let doing = "prepare the outbox";
    let known: bool = answer(doing, sqlx::query_scalar("select to_regclass('ledgerline.mail_migration') is not null").fetch_one(&mut *connection)).await?;
    if known && answer(doing, sqlx::query_scalar::<_, i64>(VERSION).fetch_one(&mut *connection)).await? == MIGRATIONS.len() as i64 {
        return Ok(());
    }
    let mut transaction = answer(doing, connection.begin()).await?;
    answer(doing, transaction.execute("select pg_advisory_xact_lock(hashtextextended('ledgerline.migrations', 0))")).await?;
    answer(doing, transaction.execute("create schema if not exists ledgerline")).await?;
    let create = "create table if not exists ledgerline.mail_migration (version bigint primary key, applied_at timestamptz not null default now())";
    answer(doing, transaction.execute(create)).await?;
    let version: i64 = answer(doing, sqlx::query_scalar(VERSION).fetch_one(&mut *transaction)).await?;
    if version > MIGRATIONS.len() as i64 {
        return Err(Error::NewerOutbox { version });
    }
    for (place, migration) in MIGRATIONS.iter().enumerate().skip(usize::try_from(version).unwrap_or(0)) {
        answer(doing, sqlx::raw_sql(*migration).execute(&mut *transaction)).await?;
        answer(doing, sqlx::query("insert into ledgerline.mail_migration (version) values ($1)").bind(place as i64 + 1).execute(&mut *transaction)).await?;
    }
    answer(doing, transaction.commit()).await
}

async fn answer<T>(doing: &'static str, work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, Error> {
    match tokio::time::timeout(ANSWER_WITHIN, work).await {
        Ok(result) => result.map_err(Error::failed(doing)),
        Err(_) => Err(Error::Silent { doing }),
    }
}

const VERSION: &str = "select coalesce(max(version), 0) from ledgerline.mail_migration";

const UPSERT_ALARM: &str = "insert into ledgerline.mail_alarm (dag_id, task_id, failing_since, last_mail_at, failures, held, last_heard) \
     values ($1, $2, $3, $4, $5, $6, $7) on conflict (dag_id, task_id) do update set last_mail_at = excluded.last_mail_at, \
     failures = excluded.failures, held = excluded.held, last_heard = excluded.last_heard";

const INSERT_MAIL: &str = "insert into ledgerline.mail_outbox (message_id, dag_id, run_id, kind, sender, recipients, subject, message, recorded_at, next_try_at) \
     values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $9) on conflict (message_id) do nothing";

const TAKE_ONE: &str = "select message_id, tries, recorded_at, sender, recipients, message, reached, refusals from ledgerline.mail_outbox \
     where state = 'waiting' and next_try_at <= $1 order by recorded_at limit 1 for update skip locked";

const UPDATE_MAIL: &str = "update ledgerline.mail_outbox set state = $2, sent_at = case $2 when 'sent' then $3 end, tries = tries + 1, next_try_at = $4, error = $5, \
     reached = $6, refusals = $7 where message_id = $1";

const PRUNE: &str = "delete from ledgerline.mail_outbox where state <> 'waiting' and recorded_at < \
     (select recorded_at from ledgerline.mail_outbox order by recorded_at desc offset $1 limit 1)";

const COUNT: &str = "select count(*) filter (where state = 'waiting'), count(*) filter (where state = 'refused') from ledgerline.mail_outbox";

const SELECT_NEWEST: &str = "select message_id, dag_id, run_id, subject, recipients, state, recorded_at, sent_at, tries, error from ledgerline.mail_outbox \
     order by recorded_at desc limit $1";

const SELECT_SINCE: &str = "select message_id, dag_id, run_id, subject, recipients, state, recorded_at, sent_at, tries, error from ledgerline.mail_outbox \
     where recorded_at >= $1 order by recorded_at";

async fn alarm_of(transaction: &mut Transaction<'_, Postgres>, dag_id: &str, task_id: &str) -> Result<Option<Alarm>, Error> {
    let doing = "read an alarm";
    let select = "select failing_since, last_mail_at, failures, held, last_heard from ledgerline.mail_alarm where dag_id = $1 and task_id = $2 for update";
    let row = answer(doing, sqlx::query(select).bind(dag_id).bind(task_id).fetch_optional(&mut **transaction)).await?;
    let read = |row: PgRow| {
        Ok(Alarm {
            failing_since: row.try_get(0)?,
            last_mail_at: row.try_get(1)?,
            failures: row.try_get::<i32, _>(2)?.unsigned_abs(),
            held: row.try_get::<i32, _>(3)?.unsigned_abs(),
            last_heard: row.try_get(4)?,
        })
    };
    row.map(read).transpose().map_err(Error::failed(doing))
}

fn parcel_from(row: &PgRow) -> Result<(String, u32, Seen, Parcel), sqlx::Error> {
    let address = |text: String| text.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)));
    let message_id: String = row.try_get(0)?;
    let mut seen = Seen { reached: row.try_get(6)?, refusals: row.try_get(7)? };
    let everybody: Vec<String> = row.try_get(4)?;
    if !everybody.iter().any(|it| seen.is_open(it)) {
        // It waits though everybody is settled: a person has put it back, for all.
        seen = Seen { reached: Vec::new(), refusals: Vec::new() };
    }
    let recipients: Result<Vec<lettre::Address>, sqlx::Error> = everybody.into_iter().filter(|it| seen.is_open(it)).map(address).collect();
    let envelope = Envelope::new(Some(address(row.try_get(3)?)?), recipients?).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
    let parcel = Parcel { file_name: file_name(&message_id, row.try_get(2)?), envelope, message: row.try_get(5)? };
    Ok((message_id, row.try_get::<i32, _>(1)?.unsigned_abs(), seen, parcel))
}

fn mail_from(row: &PgRow) -> Result<Mail, sqlx::Error> {
    Ok(Mail {
        message_id: row.try_get(0)?,
        dag_id: row.try_get(1)?,
        run_id: row.try_get(2)?,
        subject: row.try_get(3)?,
        to: row.try_get(4)?,
        state: row.try_get::<String, _>(5)?.parse().map_err(|text: String| sqlx::Error::Decode(text.into()))?,
        recorded_at: row.try_get(6)?,
        sent_at: row.try_get(7)?,
        tries: row.try_get::<i32, _>(8)?.unsigned_abs(),
        error: row.try_get(9)?,
    })
}

impl fmt::Display for MailState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Waiting => "waiting",
            Self::Sent => "sent",
            Self::Refused => "refused",
        })
    }
}

impl FromStr for MailState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Waiting, Self::Sent, Self::Refused].into_iter().find(|it| it.to_string() == text).ok_or_else(|| format!("not a mail's state: {text:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> About {
        About { dag_id: "demo".into(), run_id: "scheduled__2026-11-22T12:00:00+00:00".into(), kind: Kind::Failure, task: Some(("dbt_staging".into(), 3)) }
    }

    #[test]
    fn a_message_id_follows_from_the_run_and_is_made_of_atoms() {
        assert_eq!(about().message_id("example.org"), "failure.demo.scheduled__2026-11-22T12-00-00-00-00.dbt_staging.3@example.org");
        let now: DateTime<Utc> = "2026-11-22T12:00:01.5Z".parse().unwrap();
        assert_eq!(file_name("load_report.demo.x@localhost", now), "20261122T120001.500000Z-load_report.demo.x.eml");
    }

    #[test]
    fn a_letter_becomes_a_mail_with_both_forms() {
        let letter = Letter { subject: "Books balance · äöü".into(), text: "plain".into(), html: "<p>rich</p>".into() };
        let now: DateTime<Utc> = "2026-11-22T12:00:01Z".parse().unwrap();
        let mail = String::from_utf8(compose(&Config::default(), "id@localhost", &letter, now).unwrap()).unwrap();
        for part in
            ["Message-ID: <id@localhost>", "Date: Sun, 22 Nov 2026 12:00:01 +0000", "To: operations@localhost", "multipart/alternative", "plain", "<p>rich</p>"]
        {
            assert!(mail.contains(part), "{part:?} in\n{mail}");
        }
    }

    #[test]
    fn a_server_that_is_away_is_asked_less_and_less_often() {
        assert_eq!([0, 1, 4, 9, 200].map(|tries| try_again_after(tries).as_secs()), [1, 2, 16, 300, 300]);
    }
}
