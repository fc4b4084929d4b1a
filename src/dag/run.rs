//! The stage: keeps a session, lets the engine work on it, and stands by while the state database is away.

use std::{pin::pin, sync::Arc, time::Duration};

use chrono::Utc;
use futures_util::future::BoxFuture;
use tokio::{sync::mpsc, task::JoinSet};
use tracing::{info, warn};

use super::{
    Config, Error,
    attempt::Ended,
    engine::{Dag, Engine},
    history::{History, Session},
    order::{Refusal, Request},
    plan::{self, Plan},
    progress::Run,
    stats::Stats,
    task::{Executor, TaskError},
};
use crate::{
    fault::{self, Backoff, Diagnose, Fault},
    stage::Control,
};

/// Log lines between tasks and history; beyond that tasks lose lines rather than wait.
const LINES_WAITING_MAX: usize = 4096;

/// How often the engine makes sure that its locks still hold, and looks for runs queued by others.
pub(super) const PULSE: Duration = Duration::from_secs(1);

/// Told once per end of a run; repeated until it answers Ok, also after a crash, so it must be harmless to repeat.
pub type Report = Arc<dyn Fn(Run) -> BoxFuture<'static, Result<(), TaskError>> + Send + Sync>;

/// What an engine runs.
pub struct Deal {
    pub plans: Vec<Plan>,
    pub executor: Executor,
    pub report: Report,
    pub config: Config,
}

/// What happened, for the engine to act on.
enum Event {
    Stop,
    Ended(Ended),
    Told(super::engine::Told),
    Asked(Request),
    Wished(crate::stage::Phase),
    Lines(Vec<super::task::LogLine>),
    Pulse,
    Wake,
}

/// Runs the DAGs until stopped.
///
/// Owns every run in progress. Running tries are cancelled at the end and booked as interrupted: the next engine repeats
/// them. Outages of the state database are waited out; only what a person must mend, or a bug of ours, ends it early.
pub async fn run(deal: Deal, history: History, orders: mpsc::Receiver<Request>, control: Control<Stats>) -> Result<(), Error> {
    plan::check_together(&deal.plans)?;
    let (line_sink, lines) = mpsc::channel(LINES_WAITING_MAX);
    let dags = deal.plans.into_iter().map(Dag::new).collect();
    let engine = Engine {
        dags,
        executor: deal.executor,
        report: deal.report,
        config: deal.config,
        working: JoinSet::new(),
        telling: JoinSet::new(),
        kept: Vec::new(),
        line_sink,
        phase: *control.wanted.borrow(),
        away: None,
    };
    let mut stage = Stage { engine, orders, lines, control };
    let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(10));
    loop {
        let Err(error) = stage.serve(&history, &mut backoff).await else { return Ok(()) };
        let why = fault::chain(&error);
        stage.engine.stand_down(None).await;
        if error.fault() != Fault::Transient {
            return Err(error);
        }
        let delay = backoff.delay();
        warn!(error = %why, ?delay, "the run history is away; nothing starts until it is back");
        stage.engine.away = Some(why);
        stage.publish();
        if stage.wait_out(tokio::time::sleep(delay)).await.is_none() {
            return Ok(());
        }
    }
}

struct Stage {
    engine: Engine,
    orders: mpsc::Receiver<Request>,
    lines: mpsc::Receiver<super::task::LogLine>,
    control: Control<Stats>,
}

impl Stage {
    /// Works on one session until told to stop, or until it breaks.
    async fn serve(&mut self, history: &History, backoff: &mut Backoff) -> Result<(), Error> {
        let Some(session) = self.wait_out(history.open()).await else { return Ok(()) };
        let mut session = session?;
        self.engine.take_over(&mut session).await?;
        backoff.reset();
        if self.engine.away.take().is_some() {
            info!("the run history is back");
        }
        let mut next_pulse = tokio::time::Instant::now() + PULSE;
        loop {
            self.engine.advance(&mut session).await?;
            self.publish();
            match self.next_event(next_pulse).await {
                Event::Stop => return self.stop(&mut session).await,
                Event::Ended(ended) => {
                    self.write_waiting_lines(&mut session).await?;
                    self.engine.book(&mut session, ended).await?;
                }
                Event::Told(told) => self.engine.told(&mut session, told).await?,
                Event::Asked(request) => {
                    let answer = self.engine.obey(&mut session, &request.order, request.dry_run).await?;
                    // The answer must not be ahead of the stats: who asks looks there next.
                    self.publish();
                    let _ = request.reply.send(answer);
                }
                Event::Wished(phase) => {
                    info!(?phase, "schedules");
                    self.engine.phase = phase;
                }
                Event::Lines(lines) => session.add_lines(&lines).await?,
                Event::Pulse => {
                    self.engine.pulse(&mut session).await?;
                    next_pulse = tokio::time::Instant::now() + PULSE;
                }
                Event::Wake => {}
            }
        }
    }

    /// Cancel-safe in every arm.
    async fn next_event(&mut self, next_pulse: tokio::time::Instant) -> Event {
        const LINES_AT_ONCE: usize = 512;
        let stop = self.control.stop.clone();
        let wake = tokio::time::sleep(self.engine.next_wake(Utc::now()).unwrap_or(PULSE));
        let mut lines = Vec::new();
        tokio::select! { biased;
            () = stop.cancelled() => Event::Stop,
            Some(ended) = self.engine.working.join_next() => Event::Ended(ended.expect("a try catches its panics and is never aborted")),
            Some(told) = self.engine.telling.join_next() => told.map_or(Event::Wake, Event::Told),
            Some(request) = self.orders.recv() => Event::Asked(request),
            phase = self.control.next_wish() => Event::Wished(phase),
            _ = self.lines.recv_many(&mut lines, LINES_AT_ONCE) => Event::Lines(lines),
            () = tokio::time::sleep_until(next_pulse) => Event::Pulse,
            () = wake => Event::Wake,
        }
    }

    /// A try's lines stand in the history before its end does.
    async fn write_waiting_lines(&mut self, session: &mut Session) -> Result<(), Error> {
        let lines: Vec<_> = std::iter::from_fn(|| self.lines.try_recv().ok()).take(LINES_WAITING_MAX).collect();
        if lines.is_empty() { Ok(()) } else { session.add_lines(&lines).await }
    }

    /// A graceful stop: tries come down, what they achieved is booked, the rest is repeated by the next engine.
    async fn stop(&mut self, session: &mut Session) -> Result<(), Error> {
        self.engine.stand_down(Some(session)).await;
        let written = self.write_waiting_lines(session).await;
        self.publish();
        if let Err(error) = written {
            warn!(error = %fault::chain(&error), "the last log lines were not kept");
        }
        Ok(())
    }

    /// Waits while there is no session. Before the first one orders wait too; once the database is known to be away, they are refused
    /// with the reason. None when told to stop.
    async fn wait_out<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let stop = self.control.stop.clone();
        let mut work = pin!(work);
        loop {
            tokio::select! { biased;
                () = stop.cancelled() => return None,
                result = &mut work => return Some(result),
                Some(request) = self.orders.recv(), if self.engine.away.is_some() => {
                    let why = self.engine.away.clone().unwrap_or_default();
                    let _ = request.reply.send(Err(Refusal::Away { why }));
                }
                phase = self.control.next_wish() => self.engine.phase = phase,
            }
        }
    }

    fn publish(&self) {
        // Also when nothing has changed: each pulse says that the engine still turns.
        self.control.stats.send_replace(self.engine.stats(Utc::now()));
    }
}
