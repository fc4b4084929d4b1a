//! Trouble that passes is waited out, whichever engine captures.

use std::time::{Duration, Instant};

use super::error::Error;
use crate::fault::{Backoff, Diagnose as _, Fault};

/// Between the sessions of a capture.
pub(super) struct Patience {
    backoff: Backoff,
    /// How long a session has to flow before the next one is tried as soon as the first.
    max: Duration,
    /// Whether any session has flowed since the start.
    flowed: bool,
    /// When the session that is being tried began, about.
    since: Instant,
}

impl Patience {
    pub(super) fn new(first: Duration, max: Duration) -> Self {
        Self { backoff: Backoff::new(first, max), max, flowed: false, since: Instant::now() }
    }

    /// How long to wait after a session that broke; `flowed`: it had come so far. None where `error` is the end: it does not pass,
    /// or nothing has flowed yet, so that a wrong address is told at the start.
    pub(super) fn after(&mut self, flowed: bool, error: &Error) -> Option<Duration> {
        // One that breaks as soon as it flows would be tried, and told, several times a second.
        if flowed && self.since.elapsed() > self.max {
            self.backoff.reset();
        }
        self.flowed |= flowed;
        let delay = (self.flowed && error.fault() == Fault::Transient).then(|| self.backoff.delay())?;
        self.since = Instant::now() + delay;
        Some(delay)
    }
}
