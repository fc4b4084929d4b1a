//! A failed task: what its stack trace says in one line, and what it asks for.

use super::rest::Rest;
use crate::cdc::error::Error;

/// What to do about a failed task.
#[derive(Debug)]
pub(super) enum Verdict {
    /// It may pass: restart the task.
    Restart,
    /// A person must act; restarting changes nothing.
    Told(Error),
}

/// The first line of a stack trace, and the innermost cause, which is the one that says something.
pub(super) fn summary(rest: &Rest, trace: &str) -> String {
    let first = rest.told(trace);
    let cause = trace.lines().rev().find_map(|line| line.trim().strip_prefix("Caused by: "));
    match cause.map(|it| rest.told(it)) {
        Some(cause) if !first.contains(&cause) => format!("{first} ← {cause}"),
        _ => first,
    }
}

pub(super) fn verdict(rest: &Rest, connector: &str, slot: &str, trace: &str) -> Verdict {
    let told = |remedy: &str| Verdict::Told(Error::TaskFailed { connector: connector.to_owned(), trace: summary(rest, trace), remedy: remedy.to_owned() });
    let says = |text: &str| trace.contains(text);
    if says("no longer available on the server") || says("can no longer get changes from replication slot") {
        return Verdict::Told(Error::SlotLost { slot: slot.to_owned(), reason: summary(rest, trace) });
    }
    if says("permission denied") || says("must be superuser or replication role") || says("REPLICATION attribute") {
        return told(
            "give the user the connector signs in with the rights: alter role … replication, select on the tables, usage on their schemas; it is tried again from time to time",
        );
    }
    if says("password authentication failed") {
        return told("Kafka Connect must know the source's password: give its worker the value that cdc.database_password names");
    }
    if says("RecordTooLargeException") {
        return told("a row is larger than the broker takes: raise message.max.bytes there, or leave its table out (cdc.tables_exclude)");
    }
    Verdict::Restart
}

/// What is said once restarts did not help.
pub(super) fn gave_up(rest: &Rest, connector: &str, trace: &str) -> Error {
    let remedy = "restarting it did not help: the log of that worker has the whole trace; it is tried again from time to time".to_owned();
    Error::TaskFailed { connector: connector.to_owned(), trace: summary(rest, trace), remedy }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fault::{Diagnose as _, Fault},
        secret::Secret,
    };

    fn rest() -> Rest {
        Rest::new("http://connect:8083", None, Secret::new("hunter2")).expect("an address")
    }

    const TRACE: &str = "org.apache.kafka.connect.errors.ConnectException: An exception occurred in the change event producer.\n\tat io.debezium.X\nCaused by: io.debezium.DebeziumException: outer\n\tat y\nCaused by: org.postgresql.util.PSQLException: ERROR: permission denied for table a hunter2\n\t... 8 more";

    #[test]
    fn a_trace_is_its_first_line_and_its_innermost_cause() {
        let told = summary(&rest(), TRACE);
        assert!(told.starts_with("org.apache.kafka.connect.errors.ConnectException: An exception"), "{told}");
        assert!(told.ends_with("permission denied for table a ***"), "{told}");
    }

    #[test]
    fn what_a_restart_cannot_mend_is_told_with_its_remedy() {
        for (trace, remedy) in [
            (TRACE, "select on the tables"),
            (
                "io.debezium.DebeziumException: The connector is trying to read change stream starting at X, but this is no longer available on the server.",
                "read anew",
            ),
        ] {
            let Verdict::Told(error) = verdict(&rest(), "bank", "ledgerline", trace) else { panic!("told") };
            assert!(matches!(error.fault(), Fault::Operator(told) if told.contains(remedy)), "{error}");
        }
        assert!(matches!(verdict(&rest(), "bank", "ledgerline", "java.net.SocketException: Connection reset"), Verdict::Restart));
    }
}
