//! OUR two DAGs: what lands in the lake becomes numbers in the preview, and letters about it.
//!
//! `MinIO_S3_to_Snowflake` loads what is new, table by table, writes the load report, and triggers
//! `DBT_Bank_Data_Transformation_Pipeline`: staging, snapshots, analytics, their tests, reconciliation, KPIs, and its report.
//! This room binds the workflow engine, which knows no bank, to the rooms that know no workflow; it holds no logic of theirs.
//!
//! Every task is harmless to repeat: a load starts behind what is loaded, dbt's models remember how far they have come,
//! letters are recorded once per run. So after a crash the engine simply runs the interrupted task again. What is kept in
//! memory (the state of dbt's nodes, the last KPIs, the open mark of a reconciliation) is for the console, or is taken anew.

use std::sync::Arc;

use futures_util::{FutureExt, future::BoxFuture};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, watch};

mod mails;
mod recall;
mod stats;
mod transform;

pub use recall::{Earlier, EarlierDbt, recall};
pub use stats::{DbtStats, KpiStats, LoadStats, NodeStats, ReconcileStats, Stats};

use crate::{
    change::{BANK_TABLES, BOUNDARIES, Topics},
    dag::{BadPlan, Config, Deal, Plan, Schedule, Task, TaskContext, TaskError, TaskOutcome},
    dbt,
    lake::Store,
    notify::Outbox,
    secret::Secret,
    warehouse::{self, Position, SnapshotEnds, Warehouse, load::Pending, reconcile::Mark},
};
use stats::Board;

/// Loads what is new in the lake.
pub const LOADING: &str = "MinIO_S3_to_Snowflake";

/// Turns what was loaded into numbers.
pub const TRANSFORMATION: &str = "DBT_Bank_Data_Transformation_Pipeline";

/// Both, in the order in which one triggers the other.
pub const DAG_IDS: [&str; 2] = [LOADING, TRANSFORMATION];

/// The table a task loads, if it does.
fn table_of(task_id: &str) -> Option<&str> {
    task_id.strip_prefix("load_").filter(|table| BANK_TABLES.contains(table) || *table == BOUNDARIES)
}

/// Asks whoever captures the changes where the initial snapshot ended; None until it has.
pub type AskSnapshotEnds = Arc<dyn Fn() -> BoxFuture<'static, Result<Option<SnapshotEnds>, TaskError>> + Send + Sync>;

/// What the tasks work with.
#[derive(Clone)]
pub struct Rooms {
    pub store: Store,
    pub warehouse: Warehouse,
    pub topics: Topics,
    pub dbt: dbt::Worker,
    pub outbox: Outbox,
    /// The bank's own database, for reconciliation.
    pub source: Secret,
    /// `initial` or `never`: whether the cut has a snapshot to wait for.
    pub snapshot: String,
    pub snapshot_ends: AskSnapshotEnds,
    /// True while the bank stands still and everything it wrote has landed: then a reconciliation decides at once.
    pub drained: watch::Receiver<bool>,
}

/// The rooms, and what the tasks of consecutive runs hand to each other.
struct House {
    rooms: Rooms,
    board: Board,
    loading: Mutex<Loading>,
    transforming: Mutex<Transforming>,
}

/// Of a DAG one run is in progress at a time, and it holds this; nothing of it outlives the process.
#[derive(Default)]
struct Loading {
    prepared: bool,
    snapshot_ends: Option<SnapshotEnds>,
}

/// The same for the other DAG.
#[derive(Default)]
struct Transforming {
    /// Taken in an earlier run, to be compared once the cut has reached it.
    mark: Option<Mark>,
    reconcile_not_before: Option<std::time::Instant>,
}

/// Both DAGs with the settings of `[dag]`.
pub fn plans(config: &Config) -> Result<Vec<Plan>, BadPlan> {
    let loads: Vec<String> = BANK_TABLES.iter().chain([&BOUNDARIES]).map(|table| format!("load_{table}")).collect();
    let mut tasks = vec![config.task("discover_files")];
    tasks.extend(loads.iter().map(|load| config.task(load).after(["discover_files"])));
    tasks.push(config.task("loading_report_email").after(loads));
    tasks.push(config.task("trigger_dbt").after(["loading_report_email"]).triggering(TRANSFORMATION));
    let chain = dbt::TASKS.iter().map(|it| it.0).chain(["reconcile", "refresh_kpis", "dbt_report_email"]);
    let mut chained: Vec<Task> = Vec::new();
    for task_id in chain {
        let before = chained.last().map(|it| it.task_id.clone());
        chained.push(config.task(task_id).after(before));
    }
    Ok(vec![Plan::new(LOADING, config.schedule.clone(), tasks)?, Plan::new(TRANSFORMATION, Schedule::Never, chained)?])
}

/// The name in `[dag.tasks]` that no task has, with the nearest that one has.
pub fn misspelt_task(config: &Config) -> Option<(String, String)> {
    let plans = plans(config).ok()?;
    let known: Vec<&str> = plans.iter().flat_map(Plan::tasks).map(|it| it.task_id.as_str()).collect();
    let unknown = config.tasks.keys().find(|name| !known.contains(&name.as_str()))?;
    let nearest = known.iter().min_by_key(|it| strsim::damerau_levenshtein(it, unknown))?;
    Some((unknown.clone(), (*nearest).to_owned()))
}

/// What the engine is to run, and what there is to see of it.
pub fn deal(rooms: Rooms, config: &Config) -> Result<(Deal, watch::Receiver<Stats>), BadPlan> {
    let (board, stats) = Board::new();
    let house = Arc::new(House { rooms, board, loading: Mutex::default(), transforming: Mutex::default() });
    let reporter = Arc::clone(&house);
    let deal = Deal {
        plans: plans(config)?,
        executor: Arc::new(move |context| perform(Arc::clone(&house), context).boxed()),
        report: Arc::new(move |run| {
            let house = Arc::clone(&reporter);
            async move { mails::after_run(&house.rooms.outbox, &run).await }.boxed()
        }),
        config: config.clone(),
    };
    Ok((deal, stats))
}

/// Does one task. Every arm is safe to drop, so cancelling is dropping.
async fn perform(house: Arc<House>, context: TaskContext) -> Result<TaskOutcome, TaskError> {
    let cancel = context.cancel.clone();
    let work = async {
        match context.task_id.as_str() {
            "discover_files" => discover(&house, &context).await,
            "loading_report_email" => mails::loading_report(&house.rooms, &context).await,
            "reconcile" => transform::reconcile(&house, &context).await,
            "refresh_kpis" => transform::refresh_kpis(&house, &context).await,
            "dbt_report_email" => mails::transformation_report(&house.rooms.outbox, &context).await,
            other => match (table_of(other), dbt::Invocation::of_task(other)) {
                (Some(table), _) => load(&house, &context, table).await,
                (None, Some(invocation)) => transform::invoke(&house, &context, invocation).await,
                (None, None) => Err(TaskError::permanent(format!("nobody knows how to do {other}"), crate::fault::Fault::Bug)),
            },
        }
    };
    tokio::select! { biased;
        result = Box::pin(work) => result,
        () = cancel.cancelled() => Err(TaskError::transient("stopped before it was done")),
    }
}

/// What the discovery leaves for the load report.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Discovered {
    pending: Vec<Pending>,
    /// Where each lane was when the run began.
    loaded: Vec<Position>,
}

/// Prepares the warehouse once, passes on where the initial snapshot ended, and counts what waits in the lake.
async fn discover(house: &House, context: &TaskContext) -> Result<TaskOutcome, TaskError> {
    let rooms = &house.rooms;
    let mut kept = house.loading.lock().await;
    let warehouse = rooms.warehouse.tagged(&tag_of(context));
    if !kept.prepared {
        warehouse.prepare().await.map_err(|error| TaskError::from(&error))?;
        kept.prepared = true;
    }
    let ends = (rooms.snapshot_ends)().await?;
    if let Some(ends) = ends.filter(|it| kept.snapshot_ends.as_ref() != Some(it)) {
        warehouse.set_snapshot_ends(&ends).await.map_err(|error| TaskError::from(&error))?;
        context.log.line(format!("the initial snapshot ended; {} lanes are complete once they are loaded up to there", ends.lanes.len()));
        kept.snapshot_ends = Some(ends);
    }
    drop(kept);
    // Before any load of this run begins: a try that is killed leaves its part loaded, and the report must count it.
    let loaded = warehouse.loaded_positions().await.map_err(|error| TaskError::from(&error))?;
    let loaded = loaded.into_iter().map(|(lane, last_offset)| Position { topic: lane.topic.to_string(), partition: lane.partition, last_offset }).collect();
    let pending = warehouse::load::discover(&rooms.store, &warehouse, &rooms.topics).await.map_err(|error| TaskError::from(&error))?;
    for table in pending.iter().filter(|it| it.files > 0) {
        context.log.line(format!("{}: {} files with {} rows wait", table.table, table.files, table.rows));
    }
    house.board.discovered(&pending);
    Ok(TaskOutcome::with_note(&Discovered { pending, loaded }))
}

/// What the warehouse's own history calls the statements of a task.
fn tag_of(context: &TaskContext) -> String {
    format!("ledgerline/{}/{}/{}", context.dag_id, context.run_id, context.task_id)
}

async fn load(house: &House, context: &TaskContext, table: &str) -> Result<TaskOutcome, TaskError> {
    let rooms = &house.rooms;
    house.board.load_begins(table, &context.run_id);
    let progress = |part| house.board.loaded(table, part);
    let tagged = rooms.warehouse.tagged(&tag_of(context));
    let loaded = warehouse::load::load(&rooms.store, &tagged, &rooms.topics, table, progress).await;
    house.board.load_ends(table);
    let loaded = loaded.map_err(|error| TaskError::from(&error))?;
    context.log.line(format!("{} files with {} rows loaded", loaded.files, loaded.rows));
    if loaded.rejected > 0 {
        context.log.line(format!("{} records were refused; raw._rejected holds them", loaded.rejected));
    }
    Ok(TaskOutcome::with_note(&loaded))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edges(plan: &Plan) -> Vec<String> {
        plan.tasks().iter().map(|it| format!("{} <- {}", it.task_id, it.upstream.join(" "))).collect()
    }

    #[test]
    fn the_dags_have_the_tasks_and_the_order_that_are_promised() {
        let plans = plans(&Config::default()).expect("two DAGs");
        assert_eq!(plans[0].dag_id(), "MinIO_S3_to_Snowflake");
        assert_eq!(
            edges(&plans[0]),
            [
                "discover_files <- ",
                "load_customers <- discover_files",
                "load_accounts <- discover_files",
                "load_transactions <- discover_files",
                "load_ledger_entries <- discover_files",
                "load_boundaries <- discover_files",
                "loading_report_email <- load_customers load_accounts load_transactions load_ledger_entries load_boundaries",
                "trigger_dbt <- loading_report_email",
            ]
        );
        assert_eq!(plans[1].dag_id(), "DBT_Bank_Data_Transformation_Pipeline");
        assert_eq!(
            edges(&plans[1]),
            [
                "dbt_staging <- ",
                "dbt_test_staging <- dbt_staging",
                "dbt_snapshot <- dbt_test_staging",
                "dbt_analytics <- dbt_snapshot",
                "dbt_test_analytics <- dbt_analytics",
                "reconcile <- dbt_test_analytics",
                "refresh_kpis <- reconcile",
                "dbt_report_email <- refresh_kpis",
            ]
        );
        assert_eq!((plans[0].schedule().to_string(), plans[1].schedule().to_string()), ("30s".to_owned(), "never".to_owned()));
    }

    #[test]
    fn a_misspelt_task_is_named_with_the_nearest_known_one() {
        let config: Config = toml::from_str("[tasks.dbt_stagign]\nretries = 1\n").expect("valid");
        assert_eq!(misspelt_task(&config), Some(("dbt_stagign".to_owned(), "dbt_staging".to_owned())));
        assert_eq!(misspelt_task(&Config::default()), None);
    }

    #[test]
    fn load_tasks_name_their_table() {
        assert_eq!(table_of("load_ledger_entries"), Some("ledger_entries"));
        assert_eq!(table_of("load_boundaries"), Some("boundaries"));
        assert_eq!(table_of("load_secrets"), None);
    }
}
