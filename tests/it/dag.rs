//! The workflow engine on a real PostgreSQL, with tasks that are plain closures.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use ledgerline::{
    dag::{
        self, Answer, Config, Deal, Handle, History, Order, Plan, Refusal, Run, RunRef, RunState, Schedule, Stats, Task, TaskContext, TaskError, TaskOutcome,
        TaskState,
    },
    fault::Fault,
    secret::Secret,
    stage::{self, Phase},
};
use tokio::{
    sync::{Barrier, Notify, mpsc, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::house::{Database, on_server};

/// A test that waits longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(30);

type Result_ = Result<TaskOutcome, TaskError>;

/// A database of the test's own.
struct House {
    database: Database,
}

impl House {
    async fn new(name: &str) -> Self {
        Self { database: Database::create(&format!("dag_{name}")).await }
    }

    fn url(&self) -> Secret {
        self.database.url.clone()
    }

    /// Cuts the engine's connection, as a restart of the server does.
    async fn cut(&self) {
        let kill = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'ledgerline dag' and datname";
        on_server(&format!("{kill} = '{}'", self.database.name)).await;
    }

    async fn clean_up(self) {
        self.database.drop().await;
    }
}

struct Engine {
    handle: Handle,
    stats: watch::Receiver<Stats>,
    wanted: watch::Sender<Phase>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), dag::Error>>,
    told: Arc<Mutex<Vec<(String, RunState)>>>,
}

impl Engine {
    fn start(house: &House, plans: Vec<Plan>, work: impl Fn(TaskContext) -> BoxFuture<'static, Result_> + Send + Sync + 'static) -> Self {
        Self::start_with(house, plans, Config::default(), work)
    }

    fn start_with(house: &House, plans: Vec<Plan>, config: Config, work: impl Fn(TaskContext) -> BoxFuture<'static, Result_> + Send + Sync + 'static) -> Self {
        let told = Arc::new(Mutex::new(Vec::new()));
        let listener = Arc::clone(&told);
        let report: dag::Report = Arc::new(move |run: Run| {
            listener.lock().unwrap().push((run.run_id, run.state));
            async { Ok(()) }.boxed()
        });
        let (orders, inbox) = dag::orders();
        let (ours, theirs) = stage::control(Stats::default(), Phase::Running, &CancellationToken::new());
        let deal = Deal { plans, executor: Arc::new(work), report, config };
        let task = tokio::spawn(dag::run(deal, History::new(&house.url()), inbox, theirs));
        let handle = Handle::new(orders, ours.stats.clone());
        Self { handle, stats: ours.stats, wanted: ours.wanted, stop: ours.stop, task, told }
    }

    /// The process dies: nothing is said, nothing is written.
    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    async fn stop(self) {
        self.stop.cancel();
        timeout(PATIENCE, self.task).await.expect("stops").unwrap().expect("stops well");
    }

    async fn until(&self, what: impl Fn(&Stats) -> bool) -> Stats {
        let mut stats = self.stats.clone();
        let found = timeout(PATIENCE, stats.wait_for(|it| what(it))).await;
        found.unwrap_or_else(|_| panic!("waited in vain: {:#?}", self.stats.borrow())).unwrap().clone()
    }

    async fn ready(&self) {
        self.until(|it| !it.dags.is_empty() && it.dags.iter().all(|dag| !dag.held_elsewhere)).await;
    }

    async fn trigger(&self, dag_id: &str) -> RunRef {
        loop {
            match self.handle.trigger(dag_id).await {
                Err(Refusal::Away { .. }) => self.ready().await,
                other => return other.unwrap(),
            }
        }
    }

    async fn finished(&self, run: &RunRef) -> Vec<Arc<dag::RunStats>> {
        timeout(PATIENCE, self.handle.finished(run)).await.unwrap_or_else(|_| panic!("not over: {:#?}", self.stats.borrow())).unwrap()
    }

    async fn order(&self, order: Order, dry_run: bool) -> Result<Answer, Refusal> {
        self.handle.order(order, dry_run).await
    }
}

fn plan(dag_id: &str, tasks: Vec<Task>) -> Plan {
    Plan::new(dag_id, Schedule::Never, tasks).unwrap()
}

fn task(task_id: &str) -> Task {
    Task { backoff: Duration::from_millis(20), ..Task::new(task_id) }
}

fn states(run: &dag::RunStats) -> Vec<(&str, TaskState, u32)> {
    run.tasks.iter().map(|it| (it.task_id.as_str(), it.state, it.tries)).collect()
}

/// Five loads side by side, then a mail, then another DAG.
fn loading() -> Vec<Plan> {
    let loads = ["a", "b", "c", "d", "e"];
    let mut tasks = vec![task("find")];
    tasks.extend(loads.iter().map(|it| task(it).after(["find"])));
    tasks.push(task("mail").after(loads));
    tasks.push(task("start_models").after(["mail"]).triggering("models"));
    vec![plan("loading", tasks), plan("models", vec![task("build"), task("test").after(["build"])])]
}

#[tokio::test]
async fn tasks_run_in_order_loads_side_by_side_and_the_triggered_dag_follows() {
    let house = House::new("order").await;
    let together = Arc::new(Barrier::new(5));
    let order = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&order);
    let engine = Engine::start(&house, loading(), move |context| {
        let (together, seen) = (Arc::clone(&together), Arc::clone(&seen));
        async move {
            if context.task_id.len() == 1 {
                together.wait().await;
            }
            seen.lock().unwrap().push(context.task_id.clone());
            context.log.line(format!("{} at work", context.task_id));
            match context.task_id.as_str() {
                "find" => Ok(TaskOutcome::with_note(&serde_json::json!({ "files": 7 }))),
                "mail" => Ok(TaskOutcome::with_note(&context.notes["find"]["files"])),
                _ => Ok(TaskOutcome::done()),
            }
        }
        .boxed()
    });
    let run = engine.trigger("loading").await;
    let over = engine.finished(&run).await;

    assert_eq!(over.iter().map(|it| (it.dag_id.as_str(), it.state)).collect::<Vec<_>>(), [("loading", RunState::Success), ("models", RunState::Success)]);
    assert!(over[1].run_id.starts_with("triggered__"), "{}", over[1].run_id);
    assert_eq!(over[1].triggered_by.as_ref(), Some(&run));
    let order = order.lock().unwrap().clone();
    assert_eq!((order[0].as_str(), &order[6..]), ("find", ["mail", "build", "test"].map(str::to_owned).as_slice()));

    let history = History::new(&house.url());
    let kept = history.run(&run).await.unwrap().unwrap();
    assert_eq!(kept.tasks[6].note, serde_json::json!(7));
    let tries = history.tries(&run).await.unwrap();
    assert!(tries.len() == 8 && tries.iter().all(|it| it.state == TaskState::Success && it.try_number == 1), "{tries:?}");
    let log = history.log(&run, "a", 1, 0, 100).await.unwrap();
    assert_eq!(log.iter().map(|it| it.line.as_str()).collect::<Vec<_>>(), ["a at work"]);
    assert_eq!(history.runs("loading", 5).await.unwrap().len(), 1);
    engine.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn a_failing_task_is_tried_again_after_its_backoff_and_every_try_is_kept() {
    let house = House::new("retry").await;
    let engine = Engine::start(&house, vec![plan("demo", vec![task("flaky"), task("next").after(["flaky"])])], |context| {
        async move {
            match (context.task_id.as_str(), context.try_number) {
                ("flaky", 1) => Err(TaskError::transient("away\nfor a while")),
                ("flaky", 2) => panic!("out of cheese"),
                _ => Ok(TaskOutcome::done()),
            }
        }
        .boxed()
    });
    // A panic is a bug and not tried again, so the operator retries it.
    let run = engine.trigger("demo").await;
    let over = engine.finished(&run).await;
    assert_eq!(states(&over[0]), [("flaky", TaskState::Failed, 2), ("next", TaskState::UpstreamFailed, 0)]);
    assert_eq!(over[0].tasks[0].error.as_deref(), Some("the task panicked: out of cheese"));
    let retry = Order::Retry { dag_id: "demo".into(), run_id: run.run_id.clone(), task_id: "flaky".into() };
    assert_eq!(engine.order(retry, false).await.unwrap().tasks, ["flaky", "next"]);
    let over = engine.finished(&run).await;
    assert_eq!(states(&over[0]), [("flaky", TaskState::Success, 3), ("next", TaskState::Success, 1)]);

    let tries = History::new(&house.url()).tries(&run).await.unwrap();
    let flaky: Vec<_> = tries.iter().filter(|it| it.task_id == "flaky").collect();
    assert_eq!(flaky.iter().map(|it| it.state).collect::<Vec<_>>(), [TaskState::Failed, TaskState::Failed, TaskState::Success]);
    assert_eq!(flaky[0].error.as_deref(), Some("away\nfor a while"));
    assert!(flaky[1].started_at - flaky[0].finished_at.unwrap() >= chrono::TimeDelta::milliseconds(20));
    assert_eq!(*engine.told.lock().unwrap(), [(run.run_id.clone(), RunState::Failed), (run.run_id, RunState::Success)]);
    engine.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn a_try_that_takes_too_long_is_cancelled_and_counts_as_failed() {
    let house = House::new("timeout").await;
    let slow = Task { timeout: Duration::from_millis(50), retries: 1, ..task("slow") };
    let engine = Engine::start(&house, vec![plan("demo", vec![slow])], |context| {
        async move {
            context.cancel.cancelled().await;
            Err(TaskError::transient("was still waiting"))
        }
        .boxed()
    });
    let over = engine.finished(&engine.trigger("demo").await).await;
    assert_eq!(states(&over[0]), [("slow", TaskState::Failed, 2)]);
    assert_eq!(over[0].tasks[0].error.as_deref(), Some("timed out after 50ms"));
    engine.stop().await;
    house.clean_up().await;
}

/// Tasks named `wait…` say that they have started and then wait for a release or their cancellation.
struct Gate {
    started: mpsc::UnboundedReceiver<(String, u32)>,
    release: Arc<Notify>,
}

fn gated() -> (Gate, impl Fn(TaskContext) -> BoxFuture<'static, Result_> + Send + Sync + 'static) {
    let (said, started) = mpsc::unbounded_channel();
    let release = Arc::new(Notify::new());
    let gate = Gate { started, release: Arc::clone(&release) };
    let work = move |context: TaskContext| {
        let (said, release) = (said.clone(), Arc::clone(&release));
        async move {
            let _ = said.send((context.task_id.clone(), context.try_number));
            if !context.task_id.starts_with("wait") {
                return Ok(TaskOutcome::done());
            }
            tokio::select! {
                () = release.notified() => Ok(TaskOutcome::done()),
                () = context.cancel.cancelled() => Err(TaskError::transient("was cancelled")),
            }
        }
        .boxed()
    };
    (gate, work)
}

impl Gate {
    async fn started(&mut self, task_id: &str) -> u32 {
        loop {
            let (name, try_number) = timeout(PATIENCE, self.started.recv()).await.expect("a task starts").unwrap();
            if name == task_id {
                return try_number;
            }
        }
    }
}

fn waiting() -> Vec<Plan> {
    vec![plan("demo", vec![task("first"), task("wait").after(["first"]), task("last").after(["wait"])])]
}

#[tokio::test]
async fn a_cancelled_run_stops_what_runs_starts_nothing_and_can_be_taken_up_again() {
    let house = House::new("cancel").await;
    let (mut gate, work) = gated();
    let engine = Engine::start(&house, waiting(), work);
    let run = engine.trigger("demo").await;
    gate.started("wait").await;
    let cancel = Order::Cancel { dag_id: "demo".into(), run_id: run.run_id.clone() };
    assert_eq!(engine.order(cancel.clone(), true).await.unwrap().tasks, ["wait", "last"]);
    assert_eq!(engine.stats.borrow().run(&run).unwrap().state, RunState::Running);
    engine.order(cancel.clone(), false).await.unwrap();
    let over = engine.finished(&run).await;
    assert_eq!((over[0].state, states(&over[0])[1..].to_vec()), (RunState::Failed, vec![("wait", TaskState::Failed, 1), ("last", TaskState::Skipped, 0)]));
    assert_eq!(over[0].tasks[1].error.as_deref(), Some("cancelled by an operator"));
    assert_eq!(engine.order(cancel, false).await, Err(Refusal::Over { state: "failed".into() }));

    engine.order(Order::Retry { dag_id: "demo".into(), run_id: run.run_id.clone(), task_id: "wait".into() }, false).await.unwrap();
    gate.started("wait").await;
    gate.release.notify_one();
    let over = engine.finished(&run).await;
    assert_eq!((over[0].state, over[0].tasks[0].tries), (RunState::Success, 1));
    engine.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn after_a_kill_finished_tasks_are_kept_and_the_running_try_counts_as_interrupted() {
    let house = House::new("kill").await;
    let (mut gate, work) = gated();
    let engine = Engine::start(&house, waiting(), work);
    let run = engine.trigger("demo").await;
    gate.started("wait").await;
    engine.kill().await;

    let (mut gate, work) = gated();
    let engine = Engine::start(&house, waiting(), work);
    assert_eq!(gate.started("wait").await, 2);
    gate.release.notify_one();
    let over = engine.finished(&run).await;
    assert_eq!(states(&over[0]), [("first", TaskState::Success, 1), ("wait", TaskState::Success, 2), ("last", TaskState::Success, 1)]);
    let tries = History::new(&house.url()).tries(&run).await.unwrap();
    assert_eq!((tries[1].state, tries[1].error.as_deref()), (TaskState::Failed, Some(dag::INTERRUPTED)));
    engine.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn a_graceful_stop_books_what_was_done_and_the_next_start_goes_on() {
    let house = House::new("stop").await;
    let (mut gate, work) = gated();
    let engine = Engine::start(&house, waiting(), work);
    let run = engine.trigger("demo").await;
    gate.started("wait").await;
    engine.stop().await;
    let kept = History::new(&house.url()).run(&run).await.unwrap().unwrap();
    assert_eq!((kept.state, kept.tasks[1].state), (RunState::Running, TaskState::UpForRetry));

    let (mut gate, work) = gated();
    let engine = Engine::start(&house, waiting(), work);
    gate.started("wait").await;
    gate.release.notify_one();
    assert_eq!(engine.finished(&run).await[0].state, RunState::Success);
    engine.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn of_two_engines_one_runs_the_dag_and_the_other_takes_over_when_it_dies() {
    let house = House::new("two").await;
    let (mut gate, work) = gated();
    let first = Engine::start(&house, waiting(), work);
    let run = first.trigger("demo").await;
    gate.started("wait").await;

    let (mut gate, work) = gated();
    let second = Engine::start(&house, waiting(), work);
    let seen = second.until(|it| it.run(&run).is_some()).await;
    assert!(seen.dags[0].held_elsewhere);
    assert_eq!(second.handle.trigger("demo").await, Err(Refusal::HeldElsewhere { dag_id: "demo".into() }));
    assert!(gate.started.try_recv().is_err());

    first.kill().await;
    assert_eq!(gate.started("wait").await, 2);
    gate.release.notify_one();
    assert_eq!(second.finished(&run).await[0].state, RunState::Success);
    second.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn with_the_connection_the_lock_goes_tasks_stop_and_the_run_is_taken_up_again() {
    let house = House::new("cut").await;
    let (mut gate, work) = gated();
    let engine = Engine::start(&house, waiting(), work);
    let run = engine.trigger("demo").await;
    assert_eq!(gate.started("wait").await, 1);
    house.cut().await;
    assert_eq!(gate.started("wait").await, 2);
    gate.release.notify_one();
    let over = engine.finished(&run).await;
    assert_eq!(states(&over[0]), [("first", TaskState::Success, 1), ("wait", TaskState::Success, 2), ("last", TaskState::Success, 1)]);
    engine.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn a_result_reached_while_the_history_was_away_is_booked_once_it_is_back() {
    let house = House::new("kept").await;
    let (started, mut starts) = mpsc::unbounded_channel();
    let engine = Engine::start(&house, vec![plan("demo", vec![task("thorough"), task("last").after(["thorough"])])], move |context| {
        let started = started.clone();
        async move {
            if context.task_id == "thorough" {
                let _ = started.send(context.try_number);
                // It is past the point of return: told to stop, it finishes.
                context.cancel.cancelled().await;
            }
            Ok(TaskOutcome::with_note(&"done"))
        }
        .boxed()
    });
    let run = engine.trigger("demo").await;
    assert_eq!(timeout(PATIENCE, starts.recv()).await.unwrap(), Some(1));
    house.cut().await;
    let over = engine.finished(&run).await;
    assert_eq!(states(&over[0]), [("thorough", TaskState::Success, 1), ("last", TaskState::Success, 1)]);
    assert!(starts.try_recv().is_err());
    engine.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn a_clear_lists_what_it_would_run_and_then_runs_it() {
    let house = House::new("clear").await;
    let (mut gate, work) = gated();
    let engine = Engine::start(&house, waiting(), work);
    let run = engine.trigger("demo").await;
    gate.started("wait").await;
    let clear = |task_id: &str| Order::Clear { dag_id: "demo".into(), run_id: run.run_id.clone(), task_id: task_id.into() };
    assert_eq!(engine.order(clear("first"), true).await, Err(Refusal::Busy { task_id: "first".into() }));
    gate.release.notify_one();
    engine.finished(&run).await;

    let would = engine.order(clear("wait"), true).await.unwrap();
    assert_eq!(would.tasks, ["wait", "last"]);
    assert_eq!(engine.stats.borrow().run(&run).unwrap().state, RunState::Success);
    assert_eq!(engine.order(clear("wait"), false).await.unwrap().tasks, would.tasks);
    gate.started("wait").await;
    gate.release.notify_one();
    let over = engine.finished(&run).await;
    assert_eq!(states(&over[0]), [("first", TaskState::Success, 1), ("wait", TaskState::Success, 2), ("last", TaskState::Success, 2)]);

    let unknown = engine.order(clear("nonsense"), false).await.expect_err("no such task").to_string();
    assert!(unknown.contains("first, wait, last"), "{unknown}");
    assert!(matches!(engine.handle.trigger("nonsense").await, Err(Refusal::UnknownDag { .. })));
    engine.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn triggers_coalesce_into_the_one_run_that_waits() {
    let house = House::new("coalesce").await;
    let (mut gate, work) = gated();
    let engine = Engine::start(&house, waiting(), work);
    let running = engine.trigger("demo").await;
    gate.started("wait").await;
    let next = engine.trigger("demo").await;
    assert_ne!(next, running);
    assert_eq!(engine.trigger("demo").await, next);
    gate.release.notify_one();
    engine.finished(&running).await;
    gate.started("wait").await;
    assert_ne!(engine.trigger("demo").await, next);
    engine.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn a_schedule_does_not_pile_up_holds_when_paused_and_old_runs_are_forgotten() {
    let house = House::new("schedule").await;
    let count = Arc::new(AtomicU32::new(0));
    let (counter, release) = (Arc::clone(&count), Arc::new(Notify::new()));
    let gate = Arc::clone(&release);
    let plan = Plan::new("demo", "20ms".parse().unwrap(), vec![task("only")]).unwrap();
    let config = Config { runs_kept: 3.try_into().unwrap(), ..Config::default() };
    let engine = Engine::start_with(&house, vec![plan], config, move |_| {
        let (counter, gate) = (Arc::clone(&counter), Arc::clone(&gate));
        async move {
            if counter.fetch_add(1, Ordering::SeqCst) == 0 {
                gate.notified().await;
            }
            Ok(TaskOutcome::done())
        }
        .boxed()
    });
    // The first run holds while many starts are missed: none of them is queued.
    let missed_some = |dag: &dag::DagStats| {
        let first = dag.runs.first()?.logical_date;
        Some(dag.next_start? > first + chrono::TimeDelta::milliseconds(1500))
    };
    let seen = engine.until(|it| it.dags.first().and_then(missed_some) == Some(true)).await;
    assert_eq!((seen.dags[0].runs.len(), count.load(Ordering::SeqCst)), (1, 1));
    release.notify_one();
    engine.until(|it| it.dags[0].runs.iter().filter(|run| run.state == RunState::Success).count() >= 6).await;

    engine.order(Order::PauseDag { dag_id: "demo".into() }, false).await.unwrap();
    let held = engine.until(|it| it.dags[0].paused && it.is_idle()).await;
    assert_eq!(held.dags[0].next_start, None);
    let ordered = engine.trigger("demo").await;
    assert_eq!(engine.finished(&ordered).await[0].state, RunState::Success);
    assert_eq!(History::new(&house.url()).runs("demo", 50).await.unwrap().len(), 3);

    engine.wanted.send(Phase::Paused).unwrap();
    engine.until(|it| it.phase == Phase::Paused).await;
    engine.stop().await;
    house.clean_up().await;
}

#[tokio::test]
async fn a_failure_that_cannot_mend_itself_shows_its_remedy_and_the_mail_in_any_case_runs() {
    let house = House::new("remedy").await;
    let mail = task("mail").after(["check"]).when(dag::TriggerRule::AllDone);
    let engine = Engine::start(&house, vec![plan("demo", vec![task("check"), mail])], |context| {
        async move {
            match context.task_id.as_str() {
                "check" => Err(TaskError::permanent("books differ", Fault::Data("look at table accounts".into())).with_note(&HashMap::from([("rows", 3)]))),
                _ => Ok(TaskOutcome::done()),
            }
        }
        .boxed()
    });
    let run = engine.trigger("demo").await;
    let over = engine.finished(&run).await;
    assert_eq!((over[0].state, states(&over[0])), (RunState::Failed, vec![("check", TaskState::Failed, 1), ("mail", TaskState::Success, 1)]));
    let kept = History::new(&house.url()).run(&run).await.unwrap().unwrap();
    assert_eq!(kept.tasks[0].error.as_deref(), Some("books differ\nlook at table accounts"));
    assert_eq!(kept.tasks[0].note, serde_json::json!({ "rows": 3 }));
    engine.stop().await;
    house.clean_up().await;
}
