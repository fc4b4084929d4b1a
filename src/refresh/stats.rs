//! What there is to see of loading and transforming, beyond the states of tasks.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::recall::Earlier;
use crate::{
    dbt::{FailingRows, Kind, Node, NodeEvent, RunResults, Status, TestCounts},
    kpi,
    latency::Histogram,
    warehouse::{
        load::{Loaded, Pending},
        reconcile::Report,
    },
};

/// Loading and transforming, as an operator may see them.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Stats {
    /// By table of the lake.
    pub loads: BTreeMap<String, LoadStats>,
    pub dbt: DbtStats,
    pub kpis: Option<KpiStats>,
    pub reconcile: Option<ReconcileStats>,
    /// What earlier processes left; None until it was looked for.
    #[serde(default)]
    pub earlier: Option<Earlier>,
    /// How long transactions took to show in the KPIs, since this process started.
    pub commit_to_kpi: Histogram,
}

/// One table on its way into the warehouse.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LoadStats {
    /// By this process.
    pub files: u64,
    pub rows: u64,
    pub rejected: u64,
    /// By the current or last run.
    pub files_last: u64,
    pub rows_last: u64,
    pub run_id: String,
    /// Waiting in the lake when it was last looked at, less what was loaded since.
    pub files_pending: u64,
    pub rows_pending: u64,
    pub loading: bool,
}

/// dbt's nodes in the current or last run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct DbtStats {
    pub run_id: String,
    /// Each after what it depends on.
    pub nodes: Vec<NodeStats>,
    /// Outcomes of all test tasks of this process.
    pub tests_in_all: TestCounts,
}

/// One model, snapshot or test.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStats {
    pub unique_id: String,
    pub name: String,
    pub kind: Kind,
    /// None: has not had its turn in this run.
    pub status: Option<Status>,
    pub seconds: Option<f64>,
    pub rows: Option<u64>,
    pub message: Option<String>,
    /// Rows that a test found.
    pub failures: Option<u64>,
    /// The first of them; they hold keys and amounts of customers.
    pub failing: Option<FailingRows>,
    /// The SQL that failed.
    pub compiled: Option<String>,
}

/// The numbers, and the moment they are true for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KpiStats {
    pub reading: kpi::Reading,
    pub read_at: DateTime<Utc>,
    pub run_id: String,
}

/// The last reconciliation that came to a verdict, or found nothing different.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReconcileStats {
    pub report: Report,
    /// When the source was read.
    pub marked_at: DateTime<Utc>,
    pub settled_at: DateTime<Utc>,
}

impl DbtStats {
    /// Outcomes of the tests of the current or last run, as far as they have ended.
    pub fn tests(&self) -> TestCounts {
        let mut counts = TestCounts::default();
        for node in self.nodes.iter().filter(|it| it.kind == Kind::Test) {
            match node.status {
                Some(Status::Pass | Status::Success) => counts.pass += 1,
                Some(Status::Warn) => counts.warn += 1,
                Some(Status::Fail) => counts.fail += 1,
                Some(Status::Error) => counts.error += 1,
                Some(Status::Skipped) => counts.skip += 1,
                Some(Status::Running) | None => {}
            }
        }
        counts
    }

    /// Nodes of a kind that ended well in the current or last run.
    pub fn succeeded(&self, kind: Kind) -> u64 {
        self.nodes.iter().filter(|it| it.kind == kind && it.status == Some(Status::Success)).count() as u64
    }

    fn node(&mut self, event: &NodeEvent) -> &mut NodeStats {
        let place = self.nodes.iter().position(|it| it.unique_id == event.unique_id).unwrap_or_else(|| {
            self.nodes.push(NodeStats::waiting(&event.unique_id, &event.name, event.kind));
            self.nodes.len() - 1
        });
        &mut self.nodes[place]
    }
}

impl NodeStats {
    fn waiting(unique_id: &str, name: &str, kind: Kind) -> Self {
        Self {
            unique_id: unique_id.to_owned(),
            name: name.to_owned(),
            kind,
            status: None,
            seconds: None,
            rows: None,
            message: None,
            failures: None,
            failing: None,
            compiled: None,
        }
    }

    fn hear(&mut self, event: &NodeEvent) {
        self.status = Some(event.status);
        self.seconds = event.seconds;
        self.rows = event.rows;
        self.message.clone_from(&event.message);
        self.failures = event.failures;
        (self.failing, self.compiled) = (None, None);
    }
}

/// Where the tasks write what they see; everybody else reads copies.
pub(super) struct Board {
    stats: watch::Sender<Stats>,
}

impl Board {
    pub(super) fn new() -> (Self, watch::Receiver<Stats>) {
        let (stats, shown) = watch::channel(Stats::default());
        (Self { stats }, shown)
    }

    pub(super) fn discovered(&self, pending: &[Pending]) {
        self.stats.send_modify(|stats| {
            for table in pending {
                let load = stats.loads.entry(table.table.clone()).or_default();
                (load.files_pending, load.rows_pending) = (table.files, table.rows);
            }
        });
    }

    /// A repeated try of the same run goes on counting.
    pub(super) fn load_begins(&self, table: &str, run_id: &str) {
        self.stats.send_modify(|stats| {
            let load = stats.loads.entry(table.to_owned()).or_default();
            load.loading = true;
            if load.run_id != run_id {
                (load.files_last, load.rows_last) = (0, 0);
                run_id.clone_into(&mut load.run_id);
            }
        });
    }

    pub(super) fn loaded(&self, table: &str, part: Loaded) {
        self.stats.send_modify(|stats| {
            let load = stats.loads.entry(table.to_owned()).or_default();
            load.files += part.files;
            load.rows += part.rows;
            load.rejected += part.rejected;
            load.files_last += part.files;
            load.rows_last += part.rows;
            load.files_pending = load.files_pending.saturating_sub(part.files);
            load.rows_pending = load.rows_pending.saturating_sub(part.rows);
        });
    }

    pub(super) fn load_ends(&self, table: &str) {
        self.stats.send_modify(|stats| stats.loads.entry(table.to_owned()).or_default().loading = false);
    }

    /// All nodes of the project wait, where the run is a new one. Harmless to repeat within a run.
    pub(super) fn lay_out(&self, run_id: &str, nodes: &[Node]) {
        self.stats.send_if_modified(|stats| {
            let fresh = stats.dbt.run_id != run_id;
            if fresh {
                run_id.clone_into(&mut stats.dbt.run_id);
                stats.dbt.nodes.clear();
            }
            let known = stats.dbt.nodes.len();
            let seen: Vec<NodeStats> = std::mem::take(&mut stats.dbt.nodes);
            let mut laid_out: Vec<NodeStats> = nodes.iter().map(|it| NodeStats::waiting(&it.unique_id, &it.name, it.kind)).collect();
            for node in seen {
                match laid_out.iter_mut().find(|it| it.unique_id == node.unique_id) {
                    Some(place) => *place = node,
                    None => laid_out.push(node),
                }
            }
            stats.dbt.nodes = laid_out;
            fresh || stats.dbt.nodes.len() != known
        });
    }

    pub(super) fn node(&self, event: &NodeEvent) {
        self.stats.send_modify(|stats| stats.dbt.node(event).hear(event));
    }

    /// The results are complete where events may have been lost.
    pub(super) fn results(&self, results: &RunResults) {
        self.stats.send_modify(|stats| {
            for result in &results.nodes {
                let node = stats.dbt.node(&result.node);
                node.hear(&result.node);
                node.failing.clone_from(&result.failing);
                node.compiled = result.compiled.as_ref().map(|it| it.display().to_string());
            }
            let (all, tests) = (&mut stats.dbt.tests_in_all, results.tests());
            all.pass += tests.pass;
            all.warn += tests.warn;
            all.fail += tests.fail;
            all.error += tests.error;
            all.skip += tests.skip;
        });
    }

    pub(super) fn reconciled(&self, reconcile: ReconcileStats) {
        self.stats.send_modify(|stats| stats.reconcile = Some(reconcile));
    }

    pub(super) fn kpis(&self, kpis: KpiStats) {
        self.stats.send_modify(|stats| stats.kpis = Some(kpis));
    }

    pub(super) fn shown(&self, took: &Histogram) {
        self.stats.send_modify(|stats| stats.commit_to_kpi.merge(took));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> Node {
        Node { unique_id: name.into(), name: name.into(), kind: Kind::Test, schema: String::new(), tags: vec![], depends_on: vec![], path: String::new() }
    }

    fn event(name: &str, status: Status) -> NodeEvent {
        NodeEvent { unique_id: name.into(), name: name.into(), kind: Kind::Test, status, seconds: None, rows: None, message: None, failures: None }
    }

    #[test]
    fn a_new_run_begins_with_waiting_nodes_in_the_order_of_the_project() {
        let (board, stats) = Board::new();
        board.lay_out("run_1", &[]);
        board.node(&event("b", Status::Pass));
        // The project was still being parsed when the run began.
        board.lay_out("run_1", &[node("a"), node("b")]);
        let seen = stats.borrow().dbt.clone();
        assert_eq!(seen.nodes.iter().map(|it| (it.name.as_str(), it.status)).collect::<Vec<_>>(), [("a", None), ("b", Some(Status::Pass))]);
        assert_eq!(seen.tests().pass, 1);

        board.lay_out("run_2", &[node("a"), node("b")]);
        assert!(stats.borrow().dbt.nodes.iter().all(|it| it.status.is_none()));
    }

    #[test]
    fn a_repeated_try_goes_on_counting_and_a_new_run_starts_at_zero() {
        let (board, stats) = Board::new();
        let part = Loaded { files: 2, rows: 10, rejected: 0 };
        board.load_begins("accounts", "run_1");
        board.loaded("accounts", part);
        board.load_begins("accounts", "run_1");
        board.loaded("accounts", part);
        assert_eq!(stats.borrow().loads["accounts"].rows_last, 20);
        board.load_begins("accounts", "run_2");
        board.loaded("accounts", part);
        board.load_ends("accounts");
        let load = stats.borrow().loads["accounts"].clone();
        assert_eq!((load.rows, load.rows_last, load.loading), (30, 10, false));
    }
}
