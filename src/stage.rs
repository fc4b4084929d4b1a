//! What the control room hands to every stage, and what a stage tells back.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Whether a stage works or holds still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    #[default]
    Running,
    Paused,
}

/// What the control room hands to a stage: where to report, what is wished of it, when to end.
///
/// `S` is the stage's own `Stats` (plain data), `W` what an operator may wish of it.
/// A stage publishes its stats per batch or per 100 ms, never per record.
pub struct Control<S, W = Phase> {
    pub stats: watch::Sender<S>,
    pub wanted: watch::Receiver<W>,
    pub stop: CancellationToken,
}

/// A stage that is started again after a failure gets the same channels.
impl<S, W> Clone for Control<S, W> {
    fn clone(&self) -> Self {
        Self { stats: self.stats.clone(), wanted: self.wanted.clone(), stop: self.stop.clone() }
    }
}

impl<S, W: Clone> Control<S, W> {
    /// The next wish of the operator. Cancel-safe; pending for ever once the control room is gone.
    pub async fn next_wish(&mut self) -> W {
        if self.wanted.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.wanted.borrow_and_update().clone()
    }
}

/// The other end of a [`Control`]: kept by the control room (or a test).
pub struct Handle<S, W = Phase> {
    pub stats: watch::Receiver<S>,
    pub wanted: watch::Sender<W>,
    pub stop: CancellationToken,
}

/// Both ends for one stage; `stop` is a child of the given token.
pub fn control<S, W>(stats: S, wish: W, stop: &CancellationToken) -> (Handle<S, W>, Control<S, W>) {
    let (stats_in, stats_out) = watch::channel(stats);
    let (wanted_in, wanted_out) = watch::channel(wish);
    let stop = stop.child_token();
    (Handle { stats: stats_out, wanted: wanted_in, stop: stop.clone() }, Control { stats: stats_in, wanted: wanted_out, stop })
}
