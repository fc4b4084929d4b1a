//! What the worker says → typed results. Pure.

use std::{fmt, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Model,
    Snapshot,
    Test,
    /// A hook of the project, such as the one that remembers which tests have passed.
    Operation,
    #[serde(other)]
    Other,
}

/// dbt's words: a model or snapshot succeeds, a test passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Running,
    #[serde(alias = "no-op")]
    Success,
    Pass,
    Warn,
    Fail,
    #[serde(alias = "runtime error", alias = "partial success")]
    Error,
    Skipped,
}

impl Status {
    /// Nothing that an operator must look at.
    pub fn is_good(self) -> bool {
        matches!(self, Self::Running | Self::Success | Self::Pass | Self::Warn)
    }
}

/// A node of the project: a model, a snapshot or a test.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    pub unique_id: String,
    pub name: String,
    pub kind: Kind,
    pub schema: String,
    pub tags: Vec<String>,
    /// Unique ids of the nodes it reads.
    pub depends_on: Vec<String>,
    /// Its file, within the project.
    pub path: String,
}

/// A node's state at one moment of an invocation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeEvent {
    pub unique_id: String,
    pub name: String,
    pub kind: Kind,
    pub status: Status,
    /// How long it took; None while it runs.
    #[serde(default)]
    pub seconds: Option<f64>,
    /// Rows written by a model or snapshot.
    #[serde(default)]
    pub rows: Option<u64>,
    /// dbt's words where it failed.
    #[serde(default)]
    pub message: Option<String>,
    /// Rows that a test found.
    #[serde(default)]
    pub failures: Option<u64>,
}

/// How a node ended, with what helps to repair it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeResult {
    #[serde(flatten)]
    pub node: NodeEvent,
    /// The SQL that ran, where it failed.
    #[serde(default)]
    pub compiled: Option<PathBuf>,
    /// The first rows that a test found. They hold keys and amounts of customers: fit for the operator's mail, not for a log.
    #[serde(default)]
    pub failing: Option<FailingRows>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FailingRows {
    pub columns: Vec<String>,
    /// At most ten; None is a null.
    pub rows: Vec<Vec<Option<String>>>,
}

/// How an invocation ended: every node it selected, in the order they ended.
#[derive(Debug, Clone, PartialEq)]
pub struct RunResults {
    pub nodes: Vec<NodeResult>,
    /// Wall-clock time, the wait for other invocations left out.
    pub took: Duration,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestCounts {
    pub pass: u64,
    pub warn: u64,
    pub fail: u64,
    pub error: u64,
    pub skip: u64,
}

impl RunResults {
    /// Every node did its work and every test passed.
    pub fn ok(&self) -> bool {
        self.nodes.iter().all(|it| it.node.status.is_good())
    }

    /// Nodes that failed themselves, not those skipped because of them.
    pub fn failed(&self) -> impl Iterator<Item = &NodeResult> {
        self.nodes.iter().filter(|it| matches!(it.node.status, Status::Fail | Status::Error))
    }

    /// How many of a kind ended well.
    pub fn succeeded(&self, kind: Kind) -> u64 {
        count(self.nodes.iter().filter(|it| it.node.kind == kind && it.node.status.is_good()))
    }

    pub fn tests(&self) -> TestCounts {
        let with = |status| count(self.nodes.iter().filter(|it| it.node.kind == Kind::Test && it.node.status == status));
        TestCounts { pass: with(Status::Pass), warn: with(Status::Warn), fail: with(Status::Fail), error: with(Status::Error), skip: with(Status::Skipped) }
    }

    /// What went wrong, for a task's error text and a mail; None where nothing did.
    pub fn explain(&self) -> Option<String> {
        let texts: Vec<String> = self.failed().map(NodeResult::to_string).collect();
        (!texts.is_empty()).then(|| texts.join("\n\n"))
    }
}

fn count(nodes: impl Iterator) -> u64 {
    u64::try_from(nodes.count()).unwrap_or(u64::MAX)
}

impl fmt::Display for NodeResult {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.node.kind {
            Kind::Model => "model",
            Kind::Snapshot => "snapshot",
            Kind::Test => "test",
            Kind::Operation => "hook",
            Kind::Other => "node",
        };
        write!(formatter, "{kind} {} ", self.node.name)?;
        match (self.node.status, self.node.failures) {
            (Status::Fail, Some(1)) => write!(formatter, "found 1 row that breaks it")?,
            (Status::Fail, Some(rows)) => write!(formatter, "found {rows} rows that break it")?,
            _ => write!(formatter, "failed")?,
        }
        if let (Status::Error, Some(message)) = (self.node.status, &self.node.message) {
            write!(formatter, ": {}", message.trim())?;
        }
        if let Some(failing) = &self.failing {
            write!(formatter, "\n{failing}")?;
        }
        if let Some(compiled) = &self.compiled {
            write!(formatter, "\nits SQL: {}", compiled.display())?;
        }
        Ok(())
    }
}

/// As a table in plain text, numbers and words alike to the left.
impl fmt::Display for FailingRows {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cell = |row: &[Option<String>], place: usize| row.get(place).cloned().flatten().unwrap_or_default();
        let width = |place: usize, name: &String| self.rows.iter().map(|row| cell(row, place).chars().count()).fold(name.chars().count(), usize::max);
        let widths: Vec<usize> = self.columns.iter().enumerate().map(|(place, name)| width(place, name)).collect();
        let line = |cells: Vec<String>| {
            let padded: Vec<String> = cells.iter().zip(&widths).map(|(text, width)| format!("{text:<width$}")).collect();
            format!("  {}", padded.join("  ").trim_end())
        };
        write!(formatter, "{}", line(self.columns.clone()))?;
        for row in &self.rows {
            write!(formatter, "\n{}", line((0..self.columns.len()).map(|place| cell(row, place)).collect()))?;
        }
        Ok(())
    }
}

/// A line of the worker's.
#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(super) enum Message {
    Ready { nodes: Vec<Node> },
    Node { id: u64, node: NodeEvent },
    Done { id: u64, nodes: Vec<NodeResult>, error: Option<Refusal> },
}

#[derive(Debug, Deserialize)]
pub(super) struct Refusal {
    pub(super) kind: RefusalKind,
    pub(super) message: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RefusalKind {
    Project,
    Warehouse,
    Dbt,
    Cancelled,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(line: &str) -> RunResults {
        match serde_json::from_str(line).unwrap() {
            Message::Done { nodes, .. } => RunResults { nodes, took: Duration::ZERO },
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_failing_test_is_explained_with_its_rows_and_its_sql() {
        let results = done(
            r#"{"kind":"done","id":1,"ok":false,"error":null,"nodes":[
            {"unique_id":"model.ledgerline.cut","name":"cut","kind":"model","status":"success","seconds":0.1,"rows":1,"message":null,"failures":null},
            {"unique_id":"test.ledgerline.x","name":"assert_ledger_balances","kind":"test","status":"fail","seconds":0.1,"rows":null,
             "message":"Got 2 results, configured to fail if != 0","failures":2,"compiled":"/srv/target/x.sql",
             "failing":{"columns":["account_id","ledger_moved","balance_moved"],"rows":[["7","10.00","9.00"],["12",null,"1.00"]]}},
            {"unique_id":"test.ledgerline.y","name":"y","kind":"test","status":"skipped","seconds":0.0,"rows":null,"message":null,"failures":null}]}"#,
        );

        assert!(!results.ok());
        assert_eq!(results.tests(), TestCounts { fail: 1, skip: 1, ..TestCounts::default() });
        assert_eq!(results.succeeded(Kind::Model), 1);
        assert_eq!(
            results.explain().unwrap(),
            "test assert_ledger_balances found 2 rows that break it\n  account_id  ledger_moved  balance_moved\n  7           10.00         9.00\n  12                        1.00\nits SQL: /srv/target/x.sql"
        );
    }

    #[test]
    fn words_of_dbt_that_we_do_not_use_are_understood() {
        let node = |kind: &str, status: &str| {
            serde_json::from_str::<NodeEvent>(&format!(r#"{{"unique_id":"a","name":"a","kind":"{kind}","status":"{status}"}}"#)).unwrap()
        };
        assert_eq!(node("seed", "no-op").kind, Kind::Other);
        assert_eq!(node("model", "no-op").status, Status::Success);
        assert_eq!(node("model", "partial success").status, Status::Error);
        assert_eq!(node("test", "runtime error").status, Status::Error);
    }

    #[test]
    fn nothing_wrong_needs_no_explanation() {
        let results = RunResults { nodes: Vec::new(), took: Duration::ZERO };
        assert!(results.ok());
        assert_eq!(results.explain(), None);
    }
}
