//! A bank's day at a fixed moment: empty, busy, failing.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use chrono::{DateTime, NaiveDate, TimeDelta, TimeZone as _, Utc};

use crate::{
    bank, cdc,
    change::Lsn,
    dag::{DagStats, RunState, RunStats, RunType, TaskState, TaskStats},
    dbt::{FailingRows, Kind, Status},
    kpi::{CustomerBalance, DayAmount, Kpis, Reading, TypeAmount, TypeAverage},
    lake,
    pipeline::{
        command::StageName,
        snapshot::{Flow, Snapshot, StageView},
        supervise::Health,
        verdict::{Verdict, verdict},
    },
    refresh::{KpiStats, LOADING, NodeStats, ReconcileStats, TRANSFORMATION},
    stage::Phase,
    units::Money,
    warehouse::{Cut, reconcile::Report},
};

pub(super) fn noon() -> DateTime<Utc> {
    Utc.with_ymd_and_hms(2026, 11, 22, 12, 3, 14).unwrap()
}

fn seconds(ago: i64) -> DateTime<Utc> {
    noon() - TimeDelta::seconds(ago)
}

/// Just started: stages run, nothing has come through yet.
pub(super) fn empty() -> Snapshot {
    let working = |_| StageView { health: Health::Working, wanted: Phase::Running, phase: Phase::Running, since: seconds(5), reported_at: noon() };
    let mut snapshot = Snapshot {
        at: noon(),
        started_at: seconds(5),
        profile: "embedded".into(),
        seed: 42,
        pid: 4711,
        stages: StageName::ALL.map(|name| (name, working(name))).into(),
        services: BTreeMap::new(),
        wish: bank::Wish::default(),
        bank: bank::Stats::default(),
        cdc: cdc::Stats::default(),
        lake: lake::Stats::default(),
        dag: crate::dag::Stats { dags: vec![dag(LOADING, "30s", &LOADING_TASKS), dag(TRANSFORMATION, "never", &DBT_TASKS)], ..Default::default() },
        refresh: Default::default(),
        mail: Default::default(),
        flow: BTreeMap::new(),
        flowing_since: None,
        ending: None,
        rss_bytes: 120 << 20,
        rss_peak_bytes: 150 << 20,
        verdict: Verdict::default(),
    };
    snapshot.refresh.earlier = Some(Default::default());
    snapshot.dag.dags[0].next_start = Some(noon() + TimeDelta::seconds(12));
    judged(snapshot)
}

/// Twelve minutes in, money flowing, everything green.
pub(super) fn busy() -> Snapshot {
    let mut snapshot = empty();
    snapshot.started_at = seconds(761);
    snapshot.flowing_since = Some(seconds(750));
    snapshot.bank.clock = Some(noon());
    for (name, per_second, lag, total) in [
        ("customers", 1, 0, 1_204),
        ("accounts", 52, 3, 88_120),
        ("transactions", 26, 1, 44_060),
        ("ledger_entries", 52, 2, 88_118),
        ("boundaries", 26, 1, 1_044_071),
    ] {
        let history: VecDeque<u64> = (0..60).map(|second| (second * 7 + total) % (2 * per_second + 1)).collect();
        snapshot.flow.insert(name.into(), Flow { total, per_second, history, lag });
        let (landed, end) = (total - lag, total);
        snapshot.lake.lanes.push(lake::LaneStats {
            topic: format!("bank.public.{name}"),
            partition: 0,
            table: name.into(),
            landed_offset: Some(landed.cast_signed()),
            end_offset: Some(end.cast_signed()),
            end_seen_ms: Some(noon().timestamp_millis()),
            trouble: None,
        });
        let oldest_unlanded_ms = (lag > 0).then(|| noon().timestamp_millis() - 430);
        let table =
            lake::TableStats { objects: total / 1_000 + 1, records: landed, bytes: landed * 47, open_records: lag, oldest_unlanded_ms, ..Default::default() };
        snapshot.lake.tables.insert(name.into(), table);
        snapshot.lake.newest.push_front(lake::NewObject {
            table: name.into(),
            key: format!("raw/{name}/dt=2026-11-22/p=0/{:020}-{:020}-0123456789abcdef.parquet", landed - 26, landed - 1),
            rows: 26,
            bytes: 4_120,
            landed_at_ms: noon().timestamp_millis() - 900,
        });
    }
    (0..200).for_each(|n| snapshot.lake.landing.record(Duration::from_millis(300 + n * 9 / 2)));
    snapshot.cdc = cdc::Stats {
        step: cdc::Step::Streaming,
        transactions: 44_060,
        heartbeats: 76,
        lag_bytes: 12_480,
        confirmed_lsn: Lsn(0x16B_3748),
        latency: cdc::Latency { count: 44_060, p50_ms: 3.2, p99_ms: 18.0 },
        slot: Some(cdc::SlotHealth {
            active: true,
            wal_status: "reserved".into(),
            confirmed_flush_lsn: Lsn(0x16B_3748),
            restart_lsn: Lsn(0x16B_0000),
            safe_wal_bytes: None,
            seconds_left: None,
        }),
        ..Default::default()
    };
    snapshot.bank.transactions = 44_060;
    for run in 0..12 {
        let began = 14 + run * 30;
        snapshot.dag.dags[0].runs.push(run_of(LOADING, &LOADING_TASKS, began + 3));
        snapshot.dag.dags[1].runs.push(run_of(TRANSFORMATION, &DBT_TASKS, began));
    }
    snapshot.refresh.dbt.run_id = snapshot.dag.dags[1].runs[0].run_id.clone();
    snapshot.refresh.dbt.nodes = nodes();
    snapshot.refresh.kpis = Some(kpis());
    snapshot.refresh.reconcile =
        Some(ReconcileStats { report: Report { ok: true, covered: true, checks: vec![] }, marked_at: seconds(12), settled_at: seconds(10) });
    judged(snapshot)
}

/// A money test failed, the bank is about to pause, the store is away, capture is silent.
pub(super) fn failing() -> Snapshot {
    let mut snapshot = task_failed();
    away(&mut snapshot);
    stage(&mut snapshot, StageName::Bank, |it| it.wanted = Phase::Paused);
    stage(&mut snapshot, StageName::Cdc, |it| it.reported_at = seconds(9));
    judged(snapshot)
}

/// A money test found three rows.
pub(super) fn task_failed() -> Snapshot {
    let mut snapshot = busy();
    let mut run = RunStats::clone(&snapshot.dag.dags[1].runs[0]);
    (run.state, run.finished_at) = (RunState::Failed, Some(seconds(2)));
    for (place, task) in run.tasks.iter_mut().enumerate().skip(1) {
        (task.state, task.tries, task.started_at, task.seconds) = (TaskState::UpstreamFailed, 0, None, None);
        if place == 1 {
            (task.state, task.tries, task.started_at, task.seconds) = (TaskState::Failed, 2, Some(seconds(3)), Some(0.41));
            task.error = Some("assert_ledger_balances, 3 rows: debit and credit differ".into());
        }
    }
    snapshot.dag.dags[1].runs[0] = Arc::new(run);
    let node = snapshot.refresh.dbt.nodes.iter_mut().find(|it| it.name == "assert_ledger_balances").unwrap();
    (node.status, node.failures) = (Some(Status::Fail), Some(3));
    node.message = Some("Got 3 results, configured to fail if != 0".into());
    node.failing = Some(FailingRows {
        columns: vec!["transaction_id".into(), "debit".into(), "credit".into()],
        rows: (0..3).map(|n| vec![Some((4_711 + n).to_string()), Some("12.50".into()), None]).collect(),
    });
    node.compiled = Some("/home/ops/.ledgerline/dbt/compiled/tests/assert_ledger_balances.sql".into());
    judged(snapshot)
}

/// The store refuses connections.
pub(super) fn service_away() -> Snapshot {
    let mut snapshot = busy();
    away(&mut snapshot);
    judged(snapshot)
}

/// The operator holds the bank, and it stands.
pub(super) fn paused() -> Snapshot {
    let mut snapshot = busy();
    stage(&mut snapshot, StageName::Bank, |it| (it.wanted, it.phase, it.since) = (Phase::Paused, Phase::Paused, seconds(180)));
    judged(snapshot)
}

/// Capture has said nothing for nine seconds.
pub(super) fn stale() -> Snapshot {
    let mut snapshot = busy();
    stage(&mut snapshot, StageName::Cdc, |it| it.reported_at = seconds(9));
    judged(snapshot)
}

fn away(snapshot: &mut Snapshot) {
    snapshot.lake.store_trouble = Some("connection refused at 127.0.0.1:9000".into());
    stage(snapshot, StageName::Lake, |it| it.health = Health::Waiting { reason: "connection refused at 127.0.0.1:9000".into(), since: seconds(40) });
}

pub(super) fn stage(snapshot: &mut Snapshot, name: StageName, change: impl FnOnce(&mut StageView)) {
    change(snapshot.stages.get_mut(&name).unwrap());
}

pub(super) fn judged(mut snapshot: Snapshot) -> Snapshot {
    snapshot.verdict = verdict(&snapshot);
    snapshot
}

const LOADING_TASKS: [&str; 8] =
    ["discover_files", "load_customers", "load_accounts", "load_transactions", "load_ledger_entries", "load_boundaries", "loading_report_email", "trigger_dbt"];

const DBT_TASKS: [&str; 8] =
    ["dbt_staging", "dbt_test_staging", "dbt_snapshot", "dbt_analytics", "dbt_test_analytics", "reconcile", "refresh_kpis", "dbt_report_email"];

fn dag(dag_id: &str, schedule: &str, tasks: &[&str]) -> DagStats {
    let tasks = tasks.iter().map(|it| ((*it).to_owned(), Vec::new())).collect();
    DagStats { dag_id: dag_id.into(), schedule: schedule.into(), tasks, ..Default::default() }
}

fn run_of(dag_id: &str, tasks: &[&str], began: i64) -> Arc<RunStats> {
    let start = seconds(began);
    let task = |(place, task_id): (usize, &&str)| {
        let from = start + TimeDelta::milliseconds(200 * i64::try_from(place).unwrap());
        TaskStats {
            task_id: (*task_id).into(),
            state: TaskState::Success,
            tries: 1,
            started_at: Some(from),
            finished_at: Some(from + TimeDelta::milliseconds(180)),
            seconds: Some(0.18),
            retry_at: None,
            error: None,
            fault: None,
        }
    };
    Arc::new(RunStats {
        dag_id: dag_id.into(),
        run_id: RunType::Scheduled.run_id(start),
        run_type: RunType::Scheduled,
        state: RunState::Success,
        logical_date: start,
        queued_at: start,
        started_at: Some(start),
        finished_at: Some(start + TimeDelta::milliseconds(1_600)),
        seconds: Some(1.6),
        triggered_by: None,
        triggered: Vec::new(),
        cancelled: false,
        tasks: tasks.iter().enumerate().map(task).collect(),
    })
}

fn nodes() -> Vec<NodeStats> {
    let node = |name: &str, kind, milliseconds: u32, rows| NodeStats {
        unique_id: format!("ledgerline.{name}"),
        name: name.into(),
        kind,
        status: Some(if kind == Kind::Test { Status::Pass } else { Status::Success }),
        seconds: Some(f64::from(milliseconds) / 1000.0),
        rows,
        message: None,
        failures: None,
        failing: None,
        compiled: None,
    };
    let mut nodes = vec![node("stg_bank__customers", Kind::Model, 91, Some(26)), node("stg_bank__transactions", Kind::Model, 140, Some(780))];
    nodes.extend(
        ["unique_stg_bank__transactions_change_id", "not_null_stg_bank__accounts_account_id", "assert_ledger_balances"]
            .map(|it| node(it, Kind::Test, 21, None)),
    );
    nodes.extend([node("snap_accounts", Kind::Snapshot, 85, Some(12)), node("fct_transactions", Kind::Model, 203, Some(44_059))]);
    nodes.push(node("relationships_fct_transactions_account_id__account_id__ref_dim_accounts_", Kind::Test, 33, None));
    nodes
}

fn kpis() -> KpiStats {
    let cents = Money::from_cents;
    let kpis = Kpis {
        total_balance: cents(64_093_012),
        total_transactions: 44_059,
        average_balance_per_account: Some(cents(112_701)),
        total_accounts: 569,
        total_customers: 230,
        transaction_amount_over_time: (0..30)
            .map(|day| DayAmount {
                date: NaiveDate::from_ymd_opt(2026, 10, 24).unwrap() + TimeDelta::days(day),
                amount: cents(9_000_000 + day * 333_333 % 2_000_000),
            })
            .collect(),
        average_balance_per_account_type: Some(cents(105_530)),
        transaction_amount_by_type: [("DEPOSIT", 120_301_220), ("TRANSFER", 88_100_417), ("WITHDRAWAL", 61_440_010)]
            .map(|(name, amount)| TypeAmount { txn_type: name.into(), amount: cents(amount) })
            .into(),
        average_balance_by_account_type: [("CHECKING", 131_020), ("CREDIT", -40_012), ("LOAN", -1_200_055), ("SAVINGS", 99_001)]
            .map(|(name, amount)| TypeAverage { account_type: name.into(), average: cents(amount) })
            .into(),
        total_customers_balance: (1..=10)
            .map(|place| CustomerBalance { customer_id: place * 17, customer: "Ada Lovelace".into(), balance: cents(9_000_000 - place * 111_111) })
            .collect(),
    };
    let cut = Some(Cut { lsn: Lsn(0x16B_3000), committed_at: noon() - TimeDelta::milliseconds(9_887) });
    KpiStats { reading: Reading { cut, kpis }, read_at: seconds(9), run_id: "triggered__2026-11-22T12:03:00+00:00".into() }
}
