//! What earlier processes left: the KPIs as they stand in the warehouse, and how dbt's last run ended.
//!
//! Read once, beside the first runs: nothing waits for it, and nobody claims before it that there is nothing.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{TRANSFORMATION, stats::KpiStats, transform::DbtNote};
use crate::{
    dag::{History, Run, TaskState},
    dbt::{self, TestCounts},
    fault::{Backoff, Diagnose, Fault, chain},
    kpi,
    warehouse::Warehouse,
};

/// The newest runs among which one with results of dbt is looked for.
const RUNS_LOOKED_AT: u32 = 20;

/// A warehouse that is away, or half written, is asked again so often; the next run makes new numbers anyway.
const TRIES: usize = 20;

/// What was there before the first run of this process.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Earlier {
    pub kpis: Option<KpiStats>,
    /// Why they could not be read, where there are some.
    pub unread: Option<String>,
    pub dbt: Option<EarlierDbt>,
}

/// How the last run of dbt ended, in numbers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EarlierDbt {
    pub run_id: String,
    pub finished_at: Option<DateTime<Utc>>,
    /// Models and snapshots that succeeded.
    pub models: u64,
    pub tests: TestCounts,
    /// Tests that failed, and tasks that did.
    pub failed: Vec<String>,
}

/// Looks for it, patiently.
pub async fn recall(warehouse: &Warehouse, history: &History) -> Earlier {
    let runs = history.runs(TRANSFORMATION, RUNS_LOOKED_AT).await.unwrap_or_else(|error| {
        tracing::debug!(error = %chain(&error), "the last runs of dbt were not read");
        Vec::new()
    });
    let run_id = runs.iter().find(|run| run.tasks.iter().any(|it| it.task_id == "refresh_kpis" && it.state == TaskState::Success)).map(|it| it.run_id.clone());
    // One that was cut short is run again at once; its part of the results says nothing.
    let dbt = runs.iter().filter(|run| run.state.is_final()).find_map(results);
    let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(10));
    let mut tries = 0;
    loop {
        tries += 1;
        let (kpis, unread) = match kpi::read_as_of(warehouse).await {
            Ok(reading) => (Some(KpiStats { reading, read_at: Utc::now(), run_id: run_id.unwrap_or_default() }), None),
            Err(kpi::Error::NotYet) => (None, None),
            Err(error) if error.fault() == Fault::Transient && tries < TRIES => {
                tokio::time::sleep(backoff.delay()).await;
                continue;
            }
            Err(error) => (None, Some(chain(&error))),
        };
        return Earlier { kpis, unread, dbt };
    }
}

/// What the notes of dbt's tasks say together; None of a run that did not come so far.
fn results(run: &Run) -> Option<EarlierDbt> {
    let of_dbt = || run.tasks.iter().filter(|it| dbt::TASKS.iter().any(|task| task.0 == it.task_id));
    let notes: Vec<DbtNote> = of_dbt().filter(|it| !it.note.is_null()).filter_map(|it| serde_json::from_value(it.note.clone()).ok()).collect();
    if notes.is_empty() {
        return None;
    }
    let mut found = EarlierDbt { run_id: run.run_id.clone(), finished_at: run.finished_at, ..EarlierDbt::default() };
    for note in notes {
        found.models += note.models + note.snapshots;
        found.tests.pass += note.tests.pass;
        found.tests.warn += note.tests.warn;
        found.tests.fail += note.tests.fail;
        found.tests.error += note.tests.error;
        found.tests.skip += note.tests.skip;
        found.failed.extend(note.failed.into_iter().map(|it| it.name));
    }
    if found.failed.is_empty() {
        found.failed = of_dbt().filter(|it| it.state == TaskState::Failed).map(|it| it.task_id.clone()).collect();
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dag::{Config, RunType};

    #[test]
    fn the_last_results_of_dbt_are_added_up_over_its_tasks() {
        let plan = super::super::plans(&Config::default()).expect("two DAGs").pop().expect("dbt's");
        let at = DateTime::UNIX_EPOCH;
        let mut run = Run::new(&plan, RunType::Manual, at, at, None);
        assert_eq!(results(&run), None);
        let note = |models, pass| {
            serde_json::to_value(DbtNote { models, tests: TestCounts { pass, ..TestCounts::default() }, ..DbtNote::default() }).expect("serializes")
        };
        (run.tasks[0].note, run.tasks[1].note) = (note(5, 0), note(0, 7));
        run.tasks[3].state = TaskState::Failed;
        let found = results(&run).expect("there are notes");
        assert_eq!((found.models, found.tests.pass), (5, 7));
        assert_eq!(found.failed, ["dbt_analytics"]);
    }
}
