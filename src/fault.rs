//! One place that decides what a failure means: for the stage that met it, for the operator, and for the exit code.

use std::{fmt::Write as _, time::Duration};

/// What to do about an error, decided once, where the error type lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The other side is away or busy; trying again will probably work.
    Transient,
    /// A person must change something first; the text says what, as an instruction: `create the bucket or fix lake.bucket`.
    Operator(String),
    /// What we were asked to carry is wrong: books that do not balance, a proof that does not hold. Repeating changes nothing.
    Data(String),
    /// Our own invariant broke; the stage stops rather than write wrong money.
    Bug,
}

/// Errors that know what they mean. Every room's error implements it.
pub trait Diagnose: std::error::Error + Send + Sync + 'static {
    fn fault(&self) -> Fault;
}

/// An error with all its causes on one line, outermost first, each said once.
///
/// Rooms' `Display` never prints the chain, so this is the one place that does.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = without_line(error.to_string());
    let mut cause = error.source();
    while let Some(inner) = cause {
        let said = without_line(inner.to_string());
        if !text.contains(&said) {
            let _ = write!(text, ": {said}");
        }
        cause = inner.source();
    }
    text
}

/// Without ` at line 325`: PostgreSQL names the line of its own source where it had none of the statement's to name.
fn without_line(text: String) -> String {
    match text.rsplit_once(" at line ") {
        Some((said, line)) if !line.is_empty() && line.bytes().all(|it| it.is_ascii_digit()) => said.to_owned(),
        _ => text,
    }
}

/// PostgreSQL's five characters for what it refuses; None where it was not asked, or did not answer.
pub(crate) fn sqlstate(error: &sqlx::Error) -> Option<String> {
    error.as_database_error()?.code().map(|code| code.into_owned())
}

/// Waiting times between tries: doubling from `first` up to `max`.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub fn new(first: Duration, max: Duration) -> Self {
        Self { first, max, next: first }
    }

    /// How long to wait before the next try.
    pub fn delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (self.next * 2).min(self.max);
        delay
    }

    /// Call after a success: the next failure starts from `first` again.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_its_maximum_and_starts_again_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(350));
        let delays: Vec<u128> = (0..4).map(|_| backoff.delay().as_millis()).collect();
        assert_eq!(delays, [100, 200, 350, 350]);

        backoff.reset();

        assert_eq!(backoff.delay().as_millis(), 100);
    }

    #[derive(Debug, thiserror::Error)]
    #[error("could not put object")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_chain_says_each_cause_once() {
        let error = Outer(std::io::Error::other("connection refused"));
        assert_eq!(chain(&error), "could not put object: connection refused");
        let error = Outer(std::io::Error::other("terminating connection due to administrator command at line 325"));
        assert_eq!(chain(&error), "could not put object: terminating connection due to administrator command");
        let error = Outer(std::io::Error::other("expected a key at line 3 column 7"));
        assert_eq!(chain(&error), "could not put object: expected a key at line 3 column 7");
    }
}
