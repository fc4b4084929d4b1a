//! What one invocation did, as `--summary` writes it. The schema is a contract: fields are added, never changed.

use std::{collections::BTreeMap, io, path::Path};

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::{
    bank::Census,
    change::Lsn,
    dag::{Run, RunState, TaskInstance, TaskState},
    dbt::{Kind, TestCounts},
    kpi::Kpis,
    latency::Histogram,
    notify,
    warehouse::reconcile,
};

use super::snapshot::Snapshot;

#[derive(Debug, Serialize)]
pub struct Summary {
    pub schema: u32,
    pub profile: String,
    pub seed: u64,
    pub started_at: DateTime<Utc>,
    pub finished_at: DateTime<Utc>,
    pub outcome: &'static str,
    /// Why it did not end well; null where it did.
    pub error: Option<String>,
    pub bank: Bank,
    pub cdc: Cdc,
    pub lake: Lake,
    pub warehouse: Warehouse,
    pub dags: Vec<DagRun>,
    pub dbt: Dbt,
    pub kpis: Option<Kpis>,
    pub reconcile: Option<reconcile::Report>,
    pub mails: Vec<Mail>,
    pub cut: Option<Cut>,
    pub latency_ms: Latencies,
    pub peak_rss_mb: u64,
}

/// Rows the source holds; changes this invocation made.
#[derive(Debug, Serialize)]
pub struct Bank {
    #[serde(flatten)]
    pub rows: Census,
    pub updates: u64,
    pub deletes: u64,
}

#[derive(Debug, Serialize)]
pub struct Cdc {
    pub events: BTreeMap<String, u64>,
    pub lag_bytes: u64,
}

#[derive(Debug, Serialize)]
pub struct Lake {
    pub objects: BTreeMap<String, u64>,
    pub records: BTreeMap<String, u64>,
    pub bytes: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
pub struct Warehouse {
    pub files_loaded: BTreeMap<String, u64>,
    pub rows_loaded: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
pub struct DagRun {
    pub dag_id: String,
    pub run_id: String,
    pub state: RunState,
    pub tasks: Vec<Task>,
}

#[derive(Debug, Serialize)]
pub struct Task {
    pub task_id: String,
    pub state: TaskState,
    pub tries: u32,
    pub seconds: Option<f64>,
}

/// Nodes that were built in this invocation, and the outcomes of all its tests.
#[derive(Debug, Serialize)]
pub struct Dbt {
    pub models: u64,
    pub snapshots: u64,
    pub tests: TestCounts,
}

#[derive(Debug, Serialize)]
pub struct Mail {
    pub subject: String,
    pub to: String,
}

#[derive(Debug, Serialize)]
pub struct Cut {
    pub lsn: Lsn,
    pub committed_at: DateTime<Utc>,
    pub age_ms: i64,
}

/// From the commit on the source: of records until they exist in the lake (sampled), of transactions until the KPIs show them.
#[derive(Debug, Serialize)]
pub struct Latencies {
    pub commit_to_landed: Percentiles,
    pub commit_to_kpi: Percentiles,
}

#[derive(Debug, Default, Serialize)]
pub struct Percentiles {
    pub p50: Option<u64>,
    pub p99: Option<u64>,
}

impl Summary {
    pub fn new(now: &Snapshot, runs: &[Run], mails: Vec<Mail>, rows: Census, outcome: &'static str, error: Option<String>) -> Self {
        let refresh = &now.refresh;
        let since = now.started_at;
        let of_lake = |number: fn(&crate::lake::TableStats) -> u64| now.lake.tables.iter().map(|(table, stats)| (table.clone(), number(stats))).collect();
        Self {
            schema: 1,
            profile: now.profile.clone(),
            seed: now.seed,
            started_at: since,
            finished_at: now.at,
            outcome,
            error,
            bank: Bank { rows, updates: now.bank.updates, deletes: now.bank.deletes },
            cdc: Cdc { events: now.cdc.tables.iter().map(|(table, stats)| (short(table), stats.n_events())).collect(), lag_bytes: now.cdc.lag_bytes },
            lake: Lake { objects: of_lake(|it| it.objects), records: of_lake(|it| it.records), bytes: of_lake(|it| it.bytes) },
            warehouse: Warehouse {
                files_loaded: refresh.loads.iter().map(|(table, load)| (table.clone(), load.files)).collect(),
                rows_loaded: refresh.loads.iter().map(|(table, load)| (table.clone(), load.rows)).collect(),
            },
            dags: runs.iter().map(DagRun::from).collect(),
            dbt: Dbt { models: refresh.dbt.succeeded(Kind::Model), snapshots: refresh.dbt.succeeded(Kind::Snapshot), tests: refresh.dbt.tests_in_all },
            kpis: refresh.kpis.as_ref().map(|it| it.reading.kpis.clone()),
            reconcile: refresh.reconcile.as_ref().map(|it| it.report.clone()),
            mails,
            cut: now.cut().map(|cut| Cut { lsn: cut.lsn, committed_at: cut.committed_at, age_ms: (now.at - cut.committed_at).num_milliseconds() }),
            latency_ms: Latencies { commit_to_landed: (&now.lake.commit_to_landed).into(), commit_to_kpi: (&refresh.commit_to_kpi).into() },
            peak_rss_mb: now.rss_peak_bytes.div_ceil(1 << 20),
        }
    }

    /// Writes it whole or not at all: a reader never sees half a summary.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let part = path.with_extension("part");
        std::fs::write(&part, serde_json::to_vec_pretty(self).map_err(io::Error::other)?)?;
        std::fs::rename(&part, path)
    }
}

impl From<&Run> for DagRun {
    fn from(run: &Run) -> Self {
        let task = |it: &TaskInstance| Task { task_id: it.task_id.clone(), state: it.state, tries: it.try_number, seconds: it.seconds() };
        Self { dag_id: run.dag_id.clone(), run_id: run.run_id.clone(), state: run.state, tasks: run.tasks.iter().map(task).collect() }
    }
}

impl From<&notify::Mail> for Mail {
    fn from(mail: &notify::Mail) -> Self {
        Self { subject: mail.subject.clone(), to: mail.to.join(", ") }
    }
}

/// `customers` for `public.customers`, as the lake names it.
fn short(table: &str) -> String {
    table.strip_prefix("public.").unwrap_or(table).to_owned()
}

impl From<&Histogram> for Percentiles {
    fn from(took: &Histogram) -> Self {
        Self { p50: took.percentile_ms(50), p99: took.percentile_ms(99) }
    }
}
