//! A stage's life: started, watched, started again when its error says so, held when a person must act.

use std::{future::Future, time::Duration};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::fault::{Backoff, Diagnose, Fault, chain};

use super::command::StageName;

/// When a stage that failed is tried again.
#[derive(Debug, Clone, Copy)]
pub struct Delays {
    /// The first wait after a transient failure; doubles.
    pub first: Duration,
    pub max: Duration,
    /// How often a stage that waits for a person looks whether the cause is gone.
    pub held: Duration,
}

impl Default for Delays {
    fn default() -> Self {
        Self { first: Duration::from_millis(200), max: Duration::from_secs(10), held: Duration::from_secs(15) }
    }
}

/// A stage that ran this long before it failed had recovered: its waiting times start from the first again.
const HEALTHY_AFTER: Duration = Duration::from_secs(30);

/// How a stage is, as the supervisor sees it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "health", rename_all = "snake_case")]
pub enum Health {
    /// Not part of this invocation.
    #[default]
    Off,
    Working,
    /// The other side is away; tried again by itself.
    Waiting {
        reason: String,
        since: DateTime<Utc>,
    },
    /// A person must act; looked at again from time to time all the same.
    Held {
        reason: String,
        remedy: String,
        since: DateTime<Utc>,
    },
    /// What it carries is wrong, or an invariant of ours broke; it stays stopped.
    Failed {
        reason: String,
        remedy: Option<String>,
        since: DateTime<Utc>,
    },
    /// Done: it was asked to end, or has reached its goal.
    Ended,
}

/// A stage's error without its type: what it says, and what it means.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Failed {
    text: String,
    fault: Fault,
}

impl Failed {
    pub fn fault(&self) -> Fault {
        self.fault.clone()
    }
}

/// Every room's error becomes one; itself it is no [`Diagnose`], so that this can be said for all of them.
impl<E: Diagnose> From<E> for Failed {
    fn from(error: E) -> Self {
        Self { text: chain(&error), fault: error.fault() }
    }
}

/// What a stage's failures mean for the exit code, decided where the error was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Away,
    Data,
    Bug,
}

impl Health {
    /// What a headless run must say if this stage stays so; None while it works or waits by itself.
    pub fn verdict(&self) -> Option<Verdict> {
        match self {
            Self::Held { .. } => Some(Verdict::Away),
            Self::Failed { remedy: Some(_), .. } => Some(Verdict::Data),
            Self::Failed { remedy: None, .. } => Some(Verdict::Bug),
            Self::Off | Self::Working | Self::Waiting { .. } | Self::Ended => None,
        }
    }
}

/// Runs a stage until it ends, reporting its health. `again` makes a held or failed stage try at once.
pub async fn supervise<F, Run>(name: StageName, mut start: F, health: watch::Sender<Health>, again: &Notify, stop: CancellationToken, delays: Delays)
where
    F: FnMut() -> Run,
    Run: Future<Output = Result<(), Failed>>,
{
    let mut backoff = Backoff::new(delays.first, delays.max);
    let mut since: Option<DateTime<Utc>> = None;
    loop {
        if since.is_none() {
            health.send_replace(Health::Working);
        }
        let started = tokio::time::Instant::now();
        let running = start();
        tokio::pin!(running);
        // A stage that failed before counts as recovered once it has run for a while, not when it is merely started.
        let outcome = tokio::select! {
            outcome = &mut running => outcome,
            () = tokio::time::sleep(delays.max), if since.is_some() => {
                info!(stage = %name, "works again");
                since = None;
                health.send_replace(Health::Working);
                running.await
            }
        };
        let error = match outcome {
            Ok(()) => {
                health.send_replace(Health::Ended);
                return;
            }
            Err(_) if stop.is_cancelled() => {
                health.send_replace(Health::Ended);
                return;
            }
            Err(error) => error,
        };
        if started.elapsed() >= HEALTHY_AFTER {
            backoff.reset();
            since = None;
        }
        let reason = error.to_string();
        let first = since.is_none();
        let since_when = *since.get_or_insert_with(Utc::now);
        let wait = match error.fault() {
            Fault::Transient => {
                if first {
                    warn!(stage = %name, %reason, "waits for the other side");
                }
                health.send_replace(Health::Waiting { reason, since: since_when });
                Some(backoff.delay())
            }
            Fault::Operator(remedy) => {
                if first {
                    error!(stage = %name, %reason, %remedy, "needs an operator");
                }
                health.send_replace(Health::Held { reason, remedy, since: since_when });
                Some(delays.held)
            }
            Fault::Data(remedy) => {
                error!(stage = %name, %reason, %remedy, "stopped: what it carries is wrong");
                health.send_replace(Health::Failed { reason, remedy: Some(remedy), since: since_when });
                None
            }
            Fault::Bug => {
                error!(stage = %name, %reason, "stopped: an invariant of ours broke");
                health.send_replace(Health::Failed { reason, remedy: None, since: since_when });
                None
            }
        };
        let waited = async {
            match wait {
                Some(delay) => tokio::time::sleep(delay).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = waited => {}
            () = again.notified() => {}
            () = stop.cancelled() => {
                health.send_replace(Health::Ended);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the bank is away")]
    struct Away(Fault);

    impl Diagnose for Away {
        fn fault(&self) -> Fault {
            self.0.clone()
        }
    }

    const QUICK: Delays = Delays { first: Duration::from_millis(1), max: Duration::from_millis(4), held: Duration::from_millis(1) };

    #[tokio::test]
    async fn a_transient_failure_is_tried_again_until_it_works() {
        let (health, seen) = watch::channel(Health::Off);
        let tries = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&tries);
        let start = move || {
            let tries = counted.fetch_add(1, Ordering::SeqCst);
            async move { if tries < 3 { Err(Away(Fault::Transient).into()) } else { Ok(()) } }
        };

        supervise(StageName::Bank, start, health, &Notify::new(), CancellationToken::new(), QUICK).await;

        assert_eq!(tries.load(Ordering::SeqCst), 4);
        assert_eq!(*seen.borrow(), Health::Ended);
    }

    #[tokio::test]
    async fn a_bug_is_not_tried_again_by_itself_but_when_asked() {
        let (health, mut seen) = watch::channel(Health::Off);
        let (stop, again) = (CancellationToken::new(), Arc::new(Notify::new()));
        let tries = Arc::new(AtomicU32::new(0));
        let (counted, asked, stopped) = (Arc::clone(&tries), Arc::clone(&again), stop.clone());
        let life = tokio::spawn(async move {
            let start = move || {
                counted.fetch_add(1, Ordering::SeqCst);
                std::future::ready(Err(Away(Fault::Bug).into()))
            };
            supervise(StageName::Bank, start, health, &asked, stopped, QUICK).await;
        });
        seen.wait_for(|it| it.verdict() == Some(Verdict::Bug)).await.expect("alive");
        assert_eq!(tries.load(Ordering::SeqCst), 1);

        again.notify_one();
        seen.changed().await.expect("alive");
        stop.cancel();
        life.await.expect("ends");

        assert_eq!(tries.load(Ordering::SeqCst), 2);
    }
}
