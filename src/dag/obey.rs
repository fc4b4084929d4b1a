//! What an order changes, or with `dry_run` would change.

use chrono::Utc;
use tracing::info;

use super::{
    Error,
    engine::{Dag, Engine, fresh_run},
    history::Session,
    order::{Answer, Order, Refusal},
    plan::TaskState,
    progress::{Run, RunRef, RunState, RunType},
};

type Verdict = Result<Answer, Refusal>;

impl Engine {
    /// Obeys one order. The outer error is the history's, the inner one is for whoever asked.
    pub(super) async fn obey(&mut self, session: &mut Session, order: &Order, dry_run: bool) -> Result<Verdict, Error> {
        let Some(place) = self.dags.iter().position(|it| it.plan.dag_id() == order.dag_id()) else {
            let known = self.dags.iter().map(|it| it.plan.dag_id().to_owned()).collect();
            return Ok(Err(Refusal::UnknownDag { dag_id: order.dag_id().to_owned(), known }));
        };
        if !self.dags[place].held {
            return Ok(Err(Refusal::HeldElsewhere { dag_id: order.dag_id().to_owned() }));
        }
        let verdict = match order {
            Order::Trigger { .. } => self.order_run(session, place, dry_run).await?,
            Order::Retry { run_id, task_id, .. } => self.repeat(session, place, (run_id, task_id), Repeat::Failed, dry_run).await?,
            Order::Clear { run_id, task_id, .. } => self.repeat(session, place, (run_id, task_id), Repeat::Everything, dry_run).await?,
            Order::Cancel { run_id, .. } => self.cancel(session, place, run_id, dry_run).await?,
            Order::PauseDag { .. } => self.pause(session, place, true, dry_run).await?,
            Order::ResumeDag { .. } => self.pause(session, place, false, dry_run).await?,
        };
        if !dry_run {
            match &verdict {
                Ok(answer) => info!(?order, said = answer.said, "order obeyed"),
                Err(refusal) => info!(?order, %refusal, "order refused"),
            }
        }
        Ok(verdict)
    }

    async fn order_run(&mut self, session: &mut Session, place: usize, dry_run: bool) -> Result<Verdict, Error> {
        let dag = &self.dags[place];
        let (dag_id, tasks) = (dag.plan.dag_id().to_owned(), dag.plan.tasks().iter().map(|it| it.task_id.clone()).collect());
        let busy = dag.active.is_some() || !dag.queue.is_empty();
        if let Some(waiting) = dag.waiting().map(|it| it.run_id.clone()) {
            return Ok(Ok(Answer { dag_id, said: format!("{waiting} waits already and starts next"), run_id: Some(waiting), tasks }));
        }
        let said = if busy { "starts when the run in progress is over" } else { "starts now" };
        let mut run_id = None;
        if !dry_run {
            let run = fresh_run(&dag.plan, RunType::Manual, Utc::now(), None, session).await?;
            run_id = Some(run.run_id.clone());
            self.enqueue(place, run, session).await?;
        }
        Ok(Ok(Answer { dag_id, run_id, tasks, said: said.to_owned() }))
    }

    async fn repeat(&mut self, session: &mut Session, place: usize, named: (&str, &str), what: Repeat, dry_run: bool) -> Result<Verdict, Error> {
        let (run_id, task_id) = named;
        let dag = &mut self.dags[place];
        let plan = std::sync::Arc::clone(&dag.plan);
        let Some(task) = plan.place(task_id) else {
            let known = plan.tasks().iter().map(|it| it.task_id.clone()).collect();
            return Ok(Err(Refusal::UnknownTask { dag_id: plan.dag_id().to_owned(), task_id: task_id.to_owned(), known }));
        };
        let Some(mut run) = find(dag, run_id, session).await? else { return Ok(Err(unknown_run(dag, run_id))) };
        let refusal = match what {
            Repeat::Failed => Refusal::NotFailed { task_id: task_id.to_owned(), state: run.tasks[task].state.to_string() },
            Repeat::Everything => Refusal::Busy { task_id: task_id.to_owned() },
        };
        let places = match what {
            Repeat::Failed => run.would_retry(&plan, task),
            Repeat::Everything => run.would_clear(&plan, task),
        };
        let Some(places) = places else { return Ok(Err(refusal)) };
        let tasks: Vec<String> = places.iter().map(|it| plan.tasks()[*it].task_id.clone()).collect();
        let in_progress = dag.active.as_ref().is_some_and(|it| it.run_id == run.run_id);
        let when = if in_progress || dag.active.is_none() { "now" } else { "when the run in progress is over" };
        let said = format!("{} run again {when}", counted(tasks.len()));
        if !dry_run {
            run.clear(&plan, &places);
            if !in_progress {
                run.state = RunState::Queued;
                run.queued_at = Utc::now();
                run.finished_at = None;
            }
            session.save(&[&run]).await?;
            put_back(dag, run);
        }
        Ok(Ok(Answer { dag_id: plan.dag_id().to_owned(), run_id: Some(run_id.to_owned()), tasks, said }))
    }

    async fn cancel(&mut self, session: &mut Session, place: usize, run_id: &str, dry_run: bool) -> Result<Verdict, Error> {
        let dag = &mut self.dags[place];
        let Some(mut run) = find(dag, run_id, session).await? else { return Ok(Err(unknown_run(dag, run_id))) };
        if run.state.is_final() {
            return Ok(Err(Refusal::Over { state: run.state.to_string() }));
        }
        let open = run.tasks.iter().filter(|it| !it.state.is_final());
        let tasks: Vec<String> = open.clone().map(|it| it.task_id.clone()).collect();
        let running = open.filter(|it| it.state == TaskState::Running).count();
        let said = format!("{} stopped, {} will not start", counted(running), counted(tasks.len() - running));
        if !dry_run {
            run.cancel();
            session.save(&[&run]).await?;
            if dag.active.as_ref().is_some_and(|it| it.run_id == run.run_id) {
                dag.cancels.values().for_each(tokio_util::sync::CancellationToken::cancel);
            }
            put_back(dag, run);
        }
        Ok(Ok(Answer { dag_id: dag.plan.dag_id().to_owned(), run_id: Some(run_id.to_owned()), tasks, said }))
    }

    async fn pause(&mut self, session: &mut Session, place: usize, paused: bool, dry_run: bool) -> Result<Verdict, Error> {
        let dag = &mut self.dags[place];
        let dag_id = dag.plan.dag_id().to_owned();
        if !dry_run {
            session.set_paused(&dag_id, paused).await?;
            dag.paused = paused;
        }
        let said = if paused { "its schedule holds; triggers still work" } else { "its schedule goes on" };
        Ok(Ok(Answer { dag_id, said: said.to_owned(), ..Answer::default() }))
    }
}

#[derive(Clone, Copy)]
enum Repeat {
    Failed,
    Everything,
}

/// A copy of the run as it stands: in progress, waiting, or from the history.
async fn find(dag: &Dag, run_id: &str, session: &mut Session) -> Result<Option<Run>, Error> {
    if let Some(run) = dag.active.iter().chain(&dag.queue).find(|it| it.run_id == run_id) {
        return Ok(Some(run.clone()));
    }
    let reference = RunRef { dag_id: dag.plan.dag_id().to_owned(), run_id: run_id.to_owned() };
    let mut run = session.run(&reference).await?;
    if let Some(run) = &mut run {
        run.align(&dag.plan);
    }
    Ok(run)
}

/// The changed copy takes the place of the run it was made of, or waits for its turn.
fn put_back(dag: &mut Dag, run: Run) {
    dag.show(&run);
    match dag.active.iter_mut().chain(&mut dag.queue).find(|it| it.run_id == run.run_id) {
        Some(place) => *place = run,
        None => dag.queue.push_back(run),
    }
}

fn unknown_run(dag: &Dag, run_id: &str) -> Refusal {
    Refusal::UnknownRun { dag_id: dag.plan.dag_id().to_owned(), run_id: run_id.to_owned() }
}

fn counted(tasks: usize) -> String {
    if tasks == 1 { "1 task".to_owned() } else { format!("{tasks} tasks") }
}
