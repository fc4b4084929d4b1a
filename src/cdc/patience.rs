//! Trouble that passes is waited out, whichever engine captures.

use std::time::Duration;

use super::error::Error;
use crate::fault::{Backoff, Diagnose as _, Fault};

/// Between the sessions of a capture.
pub(super) struct Patience {
    backoff: Backoff,
    /// Whether any session has flowed since the start.
    flowed: bool,
}

impl Patience {
    pub(super) fn new(first: Duration, max: Duration) -> Self {
        Self { backoff: Backoff::new(first, max), flowed: false }
    }

    /// How long to wait after a session that broke; `flowed`: it had come so far. None where `error` is the end: it does not pass,
    /// or nothing has flowed yet, so that a wrong address is told at the start.
    pub(super) fn after(&mut self, flowed: bool, error: &Error) -> Option<Duration> {
        if flowed {
            self.backoff.reset();
        }
        self.flowed |= flowed;
        (self.flowed && error.fault() == Fault::Transient).then(|| self.backoff.delay())
    }
}
