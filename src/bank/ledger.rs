//! Carries events out: one business event is one database transaction, many of them one round trip.
//!
//! Each writer has a connection of its own and takes one batch at a time. A batch whose answer was lost is sent again, marked
//! as such; the database knows by ids and numbers what it has done. So an event happens once, whatever dies in between.

use std::time::Duration;

use sqlx::{Connection, PgConnection, types::Json};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Error, event::Event, schema};
use crate::{
    fault::{Backoff, Fault, chain},
    secret::Secret,
};

/// After the order to end, a batch under way has this long; then its fate is left to the next start, which finds out.
pub(super) const GRACE: Duration = Duration::from_secs(10);

/// A connection attempt that takes longer has failed: a machine that is gone does not answer at all.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// What a writer tells the desk. After `Waiting` it goes on trying; every batch ends in one of the others.
#[derive(Debug)]
pub(super) enum Report {
    Done {
        lane: usize,
        batch: Vec<Event>,
        took: Duration,
    },
    /// The database is away or busy.
    Waiting {
        lane: usize,
        reason: String,
    },
    /// The first `done` events of the batch have happened; the next one the database refused, and the rest was not tried.
    Refused {
        lane: usize,
        batch: Vec<Event>,
        done: usize,
        reason: String,
    },
    /// Nothing a repetition would change.
    Failed(Error),
}

pub(super) struct Writer {
    url: Secret,
    lane: usize,
    connection: Option<PgConnection>,
    stop: CancellationToken,
}

/// Why a statement did not succeed.
enum Trouble {
    Away(String),
    Refused(String),
    Failed(Error),
}

impl Writer {
    /// Lane 0 is handed the connection that owns the bank; the others connect when they have work.
    pub(super) fn new(url: Secret, lane: usize, connection: Option<PgConnection>, stop: CancellationToken) -> Self {
        Self { url, lane, connection, stop }
    }

    /// Works until the desk closes `orders`.
    pub(super) async fn run(mut self, mut orders: mpsc::Receiver<Vec<Event>>, reports: mpsc::Sender<Report>) {
        while let Some(batch) = orders.recv().await {
            let Some(report) = self.carry_out(batch, &reports).await else { break };
            // The desk listens until every writer has ended.
            if reports.send(report).await.is_err() {
                break;
            }
        }
        if let Some(connection) = self.connection.take() {
            // A polite goodbye frees the locks at once; a dead connection frees them anyway.
            let _ = timeout(Duration::from_secs(1), connection.close()).await;
        }
    }

    /// None: told to end while the database was away, or too slow to wait for.
    async fn carry_out(&mut self, batch: Vec<Event>, reports: &mpsc::Sender<Report>) -> Option<Report> {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(3));
        let (mut again, mut since) = (false, Instant::now());
        loop {
            match self.send(&batch, again).await? {
                Ok(()) => return Some(Report::Done { lane: self.lane, batch, took: since.elapsed() }),
                Err(Trouble::Failed(error)) => return Some(Report::Failed(error)),
                // An id that exists may be our own work of a moment ago: only a second look tells.
                Err(Trouble::Refused(_)) if !again => {}
                Err(Trouble::Refused(reason)) => match self.carry_out_singly(&batch).await? {
                    Ok(()) => return Some(Report::Done { lane: self.lane, batch, took: since.elapsed() }),
                    Err((done, Trouble::Refused(_))) => return Some(Report::Refused { lane: self.lane, batch, done, reason }),
                    Err((_, Trouble::Failed(error))) => return Some(Report::Failed(error)),
                    Err((_, Trouble::Away(reason))) => self.wait(reason, &mut backoff, reports).await?,
                },
                Err(Trouble::Away(reason)) => self.wait(reason, &mut backoff, reports).await?,
            }
            (again, since) = (true, Instant::now());
        }
    }

    /// Finds out where in a batch the refusal lies.
    async fn carry_out_singly(&mut self, batch: &[Event]) -> Option<Result<(), (usize, Trouble)>> {
        for place in 0..batch.len() {
            if let Err(trouble) = self.send(&batch[place..=place], true).await? {
                return Some(Err((place, trouble)));
            }
        }
        Some(Ok(()))
    }

    async fn wait(&mut self, reason: String, backoff: &mut Backoff, reports: &mpsc::Sender<Report>) -> Option<()> {
        reports.send(Report::Waiting { lane: self.lane, reason }).await.ok()?;
        tokio::select! {
            () = self.stop.cancelled() => None,
            () = tokio::time::sleep(backoff.delay()) => Some(()),
        }
    }

    /// One round trip. None: told to end, and the answer did not come within the grace.
    async fn send(&mut self, events: &[Event], again: bool) -> Option<Result<(), Trouble>> {
        let stop = self.stop.clone();
        let answer = tokio::select! { biased;
            answer = self.try_send(events, again) => answer,
            () = async { stop.cancelled().await; tokio::time::sleep(GRACE).await } => return None,
        };
        if answer.is_err() {
            // Nothing of a session in doubt is kept, not even its prepared statements.
            self.connection = None;
        }
        Some(answer)
    }

    async fn try_send(&mut self, events: &[Event], again: bool) -> Result<(), Trouble> {
        let lane = i16::try_from(self.lane).expect("there are at most 16 lanes");
        if self.connection.is_none() {
            self.connection = Some(timeout(CONNECT_MAX, self.connect()).await.map_err(|_| Trouble::Away("no answer to a new connection".to_owned()))??);
        }
        let Some(connection) = self.connection.as_mut() else { return Err(Trouble::Away("no connection".to_owned())) };
        sqlx::query("call bank.work($1, $2, $3)").bind(lane).bind(Json(events)).bind(again).execute(connection).await.map(drop).map_err(Trouble::from)
    }

    async fn connect(&self) -> Result<PgConnection, Trouble> {
        let mut connection = schema::connect(&self.url).await.map_err(|error| match error {
            Error::Connect(error) => Trouble::from(error),
            other => Trouble::Failed(other),
        })?;
        if !schema::try_write(&mut connection).await? {
            return Err(Trouble::Away("another generator is starting on this bank".to_owned()));
        }
        if self.lane == 0 && !schema::try_own_again(&mut connection).await? {
            return Err(Trouble::Away("the former session still holds the bank, or another generator does".to_owned()));
        }
        schema::share_flushes(&mut connection).await;
        Ok(connection)
    }
}

impl From<sqlx::Error> for Trouble {
    fn from(error: sqlx::Error) -> Self {
        if is_away(&error) {
            return Self::Away(chain(&error));
        }
        let refused = error.as_database_error().and_then(|it| it.code()).is_some_and(|code| {
            // A constraint said no, or one of the bank's own functions did.
            code.starts_with("23") || code.starts_with("LB")
        });
        if refused { Self::Refused(chain(&error)) } else { Self::Failed(Error::Work(error)) }
    }
}

/// Whether waiting may help: no connection, a server that starts, stops, is full, read-only or short of resources, and rows
/// that somebody else holds.
pub(super) fn is_away(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| ["08", "40", "53", "57", "58"].iter().any(|class| code.starts_with(class)) || ["55P03", "25006"].contains(&&*code))
        }
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        _ => false,
    }
}

/// For errors of SQL that only read or create: transient, or what the operator can do.
pub(super) fn fault_of(error: &sqlx::Error, remedy: &str) -> Fault {
    if is_away(error) { Fault::Transient } else { Fault::Operator(remedy.to_owned()) }
}
