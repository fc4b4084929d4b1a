//! dbt's tasks, reconciliation, and the KPIs.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{
    House,
    stats::{KpiStats, ReconcileStats},
};
use crate::{
    dag::{TaskContext, TaskError, TaskOutcome},
    dbt::{Command, Invocation, Kind, RunResults, Status, TestCounts},
    fault::{Fault, chain},
    kpi,
    notify::letter::FailedTest,
    units::{Money, grouped},
    warehouse::{
        self,
        reconcile::{self, Check, Mark, Report},
    },
};

/// Node events in flight; more are dropped, and the results hold all of them.
const EVENTS_WAITING_MAX: usize = 256;

/// Failed tests described in a mail, and rows of each.
const FAILED_TESTS_MAX: usize = 10;

/// Reconciliation reads all of history. It rests so many times as long as it worked, so it never takes more than a tenth of the
/// time; a small bank is reconciled in every run.
const RESTS_TIMES: u32 = 9;

/// What a dbt task leaves for the reports.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct DbtNote {
    pub(super) seconds: f64,
    pub(super) models: u64,
    pub(super) snapshots: u64,
    pub(super) tests: TestCounts,
    #[serde(default)]
    pub(super) failed: Vec<FailedTest>,
}

/// What reconciliation leaves for the report.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct ReconcileNote {
    pub(super) seconds: f64,
    pub(super) checks: Vec<Check>,
}

/// What the KPIs leave for the report: those that are one number.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct KpiNote {
    pub(super) as_of: Option<DateTime<Utc>>,
    pub(super) figures: Vec<(String, String)>,
}

/// Runs one dbt invocation and shows each node as it goes.
pub(super) async fn invoke(house: &House, context: &TaskContext, invocation: Invocation) -> Result<TaskOutcome, TaskError> {
    let rooms = &house.rooms;
    let command = invocation.command;
    let invocation = invocation.with_var("topic_prefix", rooms.topics.prefix()).with_var("snapshot", rooms.snapshot.clone()).with_tag(super::tag_of(context));
    house.board.lay_out(&context.run_id, &rooms.dbt.nodes());
    let (events_in, mut events) = mpsc::channel(EVENTS_WAITING_MAX);
    let listen = async {
        while let Some(event) = events.recv().await {
            house.board.lay_out(&context.run_id, &rooms.dbt.nodes());
            house.board.node(&event);
        }
    };
    let (results, ()) = tokio::join!(rooms.dbt.invoke(invocation, events_in, context.cancel.clone()), listen);
    let results = results.map_err(|error| TaskError::from(&error))?;
    house.board.lay_out(&context.run_id, &rooms.dbt.nodes());
    house.board.results(&results);
    for result in &results.nodes {
        let node = &result.node;
        let seconds = node.seconds.unwrap_or_default();
        context.log.line(format!("{} {:?} in {seconds:.2} s", node.name, node.status).to_lowercase());
    }
    judge(command, &results)
}

/// Green only if every node did its work and, where tests were asked for, there were some.
fn judge(command: Command, results: &RunResults) -> Result<TaskOutcome, TaskError> {
    let note = DbtNote {
        seconds: results.took.as_secs_f64(),
        models: results.succeeded(Kind::Model),
        snapshots: results.succeeded(Kind::Snapshot),
        tests: results.tests(),
        failed: failed_tests(results),
    };
    if command == Command::Test && !results.nodes.iter().any(|it| it.node.kind == Kind::Test) {
        let remedy = "put the tests back, with the layer's tag: a layer without tests is never green";
        return Err(TaskError::permanent("dbt found no test to run", Fault::Operator(remedy.to_owned())));
    }
    if results.ok() {
        return Ok(TaskOutcome::with_note(&note));
    }
    let names: Vec<&str> = results.failed().map(|it| it.node.name.as_str()).collect();
    let text = format!("{} of {} failed: {}\n{}", names.len(), results.nodes.len(), names.join(", "), results.explain().unwrap_or_default());
    let broken_data = results.failed().all(|it| it.node.status == Status::Fail) && !names.is_empty();
    let error = match broken_data {
        true => TaskError::permanent(text, Fault::Data("look at the rows: mend the data or the model, then retry the task".to_owned())),
        // SQL that fails may be a broken model or a warehouse that went away: a second try tells.
        false => TaskError::transient(text),
    };
    Err(error.with_note(&note))
}

fn failed_tests(results: &RunResults) -> Vec<FailedTest> {
    let describe = |result: &crate::dbt::NodeResult| FailedTest {
        name: result.node.name.clone(),
        message: result.node.message.clone().unwrap_or_default(),
        columns: result.failing.as_ref().map(|it| it.columns.clone()).unwrap_or_default(),
        rows: result.failing.iter().flat_map(|it| &it.rows).map(|row| row.iter().map(|it| it.clone().unwrap_or_default()).collect()).collect(),
        compiled: result.compiled.as_ref().map(|it| it.display().to_string()),
    };
    results.failed().take(FAILED_TESTS_MAX).map(describe).collect()
}

/// Compares every place with the one before it, at a mark the cut has reached.
///
/// The bank moves, so a mark taken now is reached in a later run: each run settles the mark of an earlier one and takes the
/// next. Where everything is drained, the mark is taken and settled at once.
pub(super) async fn reconcile(house: &House, context: &TaskContext) -> Result<TaskOutcome, TaskError> {
    let drained = *house.rooms.drained.borrow();
    let mut kept = house.transforming.lock().await;
    if !drained && kept.reconcile_not_before.is_some_and(|at| Instant::now() < at) {
        context.log.line("rests: it reads all of history and takes at most a tenth of the time");
        return Ok(TaskOutcome::with_note(&ReconcileNote::default()));
    }
    let began = Instant::now();
    let mark = match kept.mark.take().filter(|_| !drained) {
        Some(mark) => mark,
        None => reconcile::mark(&house.rooms.source).await.map_err(|error| TaskError::from(&error))?,
    };
    let settled = settle(house, context, &mark, drained).await;
    let report = match settled {
        Ok(report) => report,
        Err(error @ warehouse::Error::StaleMark { .. }) => {
            context.log.line(format!("{error}: the next run takes a new one"));
            return Ok(TaskOutcome::with_note(&ReconcileNote::default()));
        }
        Err(error) => {
            kept.mark = Some(mark);
            return Err(TaskError::from(&error));
        }
    };
    let worked = began.elapsed();
    kept.reconcile_not_before = Some(Instant::now() + worked.saturating_mul(RESTS_TIMES).min(Duration::from_secs(24 * 3600)));
    let marked_at = mark.taken_at;
    if !report.ok && !report.covered {
        context.log.line(format!("the cut has not reached the mark of {marked_at}; it is settled in a later run"));
        // Nothing was decided, so nothing is owed a rest.
        kept.reconcile_not_before = None;
        kept.mark = Some(mark);
        return Ok(TaskOutcome::with_note(&ReconcileNote::default()));
    }
    if !drained {
        kept.mark = reconcile::mark(&house.rooms.source).await.ok();
    }
    drop(kept);
    house.board.reconciled(ReconcileStats { report: report.clone(), marked_at, settled_at: Utc::now() });
    context.log.line(format!("{} checks at the mark of {marked_at}", report.checks.len()));
    verdict(report, worked)
}

async fn settle(house: &House, context: &TaskContext, mark: &Mark, drained: bool) -> Result<Report, warehouse::Error> {
    let rooms = &house.rooms;
    let tagged = rooms.warehouse.tagged(&super::tag_of(context));
    Box::pin(reconcile::settle(mark, &rooms.source, &rooms.store, &tagged, &rooms.topics, drained)).await
}

fn verdict(report: Report, worked: Duration) -> Result<TaskOutcome, TaskError> {
    let differing: Vec<String> = report.checks.iter().filter(|it| !it.ok).map(said).collect();
    let note = ReconcileNote { seconds: worked.as_secs_f64(), checks: report.checks };
    if differing.is_empty() {
        return Ok(TaskOutcome::with_note(&note));
    }
    let text = format!("{} of {} checks differ\n{}", differing.len(), note.checks.len(), differing.join("\n"));
    let remedy = "the detail names the keys: look for them where the two places differ; `lake verify` proves the lake";
    Err(TaskError::permanent(text, Fault::Data(remedy.to_owned())).with_note(&note))
}

fn said(check: &Check) -> String {
    let detail = check.detail.as_ref().map(|it| format!(" ({it})")).unwrap_or_default();
    format!("{}: expected {}, found {}{detail}", check.name, check.expected, check.actual)
}

/// Reads the ten numbers, and how long the newest transactions took to get into them.
pub(super) async fn refresh_kpis(house: &House, context: &TaskContext) -> Result<TaskOutcome, TaskError> {
    let tagged = house.rooms.warehouse.tagged(&super::tag_of(context));
    let reading = kpi::read_as_of(&tagged).await.map_err(|error| TaskError::from(&error))?;
    let read_at = Utc::now();
    if let Some(cut) = reading.cut {
        context.log.line(format!("as of {}, {} ms ago", cut.committed_at, (read_at - cut.committed_at).num_milliseconds()));
    }
    let note = KpiNote { as_of: reading.cut.map(|it| it.committed_at), figures: figures(&reading.kpis) };
    let outcome = TaskOutcome::with_note(&note);
    let cut = reading.cut;
    house.board.kpis(KpiStats { reading, read_at, run_id: context.run_id.clone() });
    // Behind the moment at which they can be seen, not before it.
    if let Some(cut) = cut {
        match kpi::measure(&tagged, cut.lsn, Utc::now()).await {
            Ok(took) => house.board.shown(&took),
            Err(error) => context.log.line(format!("the way from commit to KPI was not measured: {}", chain(&error))),
        }
    }
    Ok(outcome)
}

/// The KPIs that are one number.
fn figures(kpis: &kpi::Kpis) -> Vec<(String, String)> {
    let money = |it: Option<Money>| it.map_or_else(|| "–".to_owned(), Money::grouped);
    let figures = [
        ("total_balance", kpis.total_balance.grouped()),
        ("total_transactions", grouped(kpis.total_transactions)),
        ("average_balance_per_account", money(kpis.average_balance_per_account)),
        ("total_accounts", grouped(kpis.total_accounts)),
        ("total_customers", grouped(kpis.total_customers)),
        ("average_balance_per_account_type", money(kpis.average_balance_per_account_type)),
    ];
    figures.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dbt::{FailingRows, NodeEvent, NodeResult},
        warehouse::reconcile::Amount,
    };

    fn test(name: &str, status: Status) -> NodeResult {
        let node = NodeEvent {
            unique_id: format!("test.{name}"),
            name: name.into(),
            kind: Kind::Test,
            status,
            seconds: Some(0.1),
            rows: None,
            message: None,
            failures: (status == Status::Fail).then_some(1),
        };
        let failing = (status == Status::Fail).then(|| FailingRows { columns: vec!["id".into()], rows: vec![vec![Some("7".into())], vec![None]] });
        NodeResult { node, compiled: None, failing }
    }

    fn results(nodes: Vec<NodeResult>) -> RunResults {
        RunResults { nodes, took: Duration::from_millis(250) }
    }

    #[test]
    fn tests_that_find_rows_fail_for_good_and_carry_the_rows() {
        let error = judge(Command::Test, &results(vec![test("keys", Status::Pass), test("balances", Status::Fail)])).expect_err("a test failed");
        assert!(error.text.starts_with("1 of 2 failed: balances\n"), "{}", error.text);
        assert!(matches!(error.fault, Fault::Data(_)));
        let note: DbtNote = serde_json::from_value(error.note).unwrap();
        assert_eq!((note.tests.pass, note.tests.fail), (1, 1));
        assert_eq!(note.failed[0].rows, [vec!["7".to_owned()], vec![String::new()]]);
    }

    #[test]
    fn sql_that_breaks_is_tried_again_and_a_layer_without_tests_is_not_green() {
        let error = judge(Command::Test, &results(vec![test("keys", Status::Error)])).expect_err("an error");
        assert_eq!(error.fault, Fault::Transient);
        assert!(judge(Command::Test, &results(vec![])).is_err());
        assert!(judge(Command::Run, &results(vec![])).is_ok());
        assert!(judge(Command::Test, &results(vec![test("keys", Status::Skipped)])).is_err());
    }

    #[test]
    fn a_difference_names_the_check_and_the_keys() {
        let check = |ok, detail: Option<&str>| Check {
            name: "accounts.balance.lake_raw".into(),
            ok,
            expected: Amount::Rows(3),
            actual: Amount::Rows(2),
            detail: detail.map(str::to_owned),
        };
        let report = |ok| Report { ok, covered: true, checks: vec![check(ok, Some("key 17"))] };
        assert!(verdict(report(true), Duration::ZERO).is_ok());
        let error = verdict(report(false), Duration::ZERO).expect_err("they differ");
        assert_eq!(error.text, "1 of 1 checks differ\naccounts.balance.lake_raw: expected 3, found 2 (key 17)");
        assert!(matches!(error.fault, Fault::Data(_)));
    }
}
