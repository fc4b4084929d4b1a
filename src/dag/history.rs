//! Runs, tries and task logs in PostgreSQL: schema `ledgerline` of the state database.
//!
//! [`History`] reads, for screens and the command line; any number of them. [`Session`] writes: it is the one connection of
//! the engine, and it holds the advisory lock of every DAG the engine runs. What is written through it was therefore written
//! while no other engine could run the DAG, and when the connection goes, the right to write goes with it.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::{
    Connection, Executor as _, PgConnection, Row,
    postgres::{PgConnectOptions, PgRow},
    types::Json,
};

use super::{
    Error,
    plan::TaskState,
    progress::{Run, RunRef, TaskInstance},
    task::LogLine,
};
use crate::{
    fault::{Diagnose, Fault},
    secret::Secret,
};

/// A statement that takes longer means the database is away.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// Migrations in order; the n-th brings the history to version n.
const MIGRATIONS: [&str; 1] = [include_str!("schema.sql")];

/// Where the history lives. Cheap to clone; every call opens a connection of its own, so nothing idles.
#[derive(Debug, Clone)]
pub struct History {
    url: Secret,
}

/// One try of a task, as it is shown.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Try {
    pub task_id: String,
    pub try_number: u32,
    /// `running`, `success`, `failed` or `skipped`.
    pub state: TaskState,
    pub started_at: DateTime<Utc>,
    pub finished_at: Option<DateTime<Utc>>,
    pub error: Option<String>,
}

/// One line a task logged.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Line {
    pub try_number: u32,
    /// Ascending within a try; ask for the lines after the last one you have.
    pub line_number: u32,
    pub at: DateTime<Utc>,
    pub line: String,
}

impl History {
    pub fn new(state: &Secret) -> Self {
        Self { url: state.clone() }
    }

    /// The newest runs of a DAG, newest first.
    pub async fn runs(&self, dag_id: &str, limit: u32) -> Result<Vec<Run>, Error> {
        let mut session = self.open().await?;
        session.recent(dag_id, limit).await
    }

    pub async fn run(&self, run: &RunRef) -> Result<Option<Run>, Error> {
        let mut session = self.open().await?;
        session.run(run).await
    }

    /// All tries of a run, in the order in which they started.
    pub async fn tries(&self, run: &RunRef) -> Result<Vec<Try>, Error> {
        let mut session = self.open().await?;
        let rows = answer("read tries", sqlx::query(SELECT_TRIES).bind(&run.dag_id).bind(&run.run_id).fetch_all(&mut session.connection)).await?;
        rows.iter().map(|row| try_from(row).map_err(Error::failed("read tries"))).collect()
    }

    /// Log lines of a task's try, from `line_number` on.
    pub async fn log(&self, run: &RunRef, task_id: &str, try_number: u32, line_number: u32, limit: u32) -> Result<Vec<Line>, Error> {
        let mut session = self.open().await?;
        let select = sqlx::query(SELECT_LINES)
            .bind(&run.dag_id)
            .bind(&run.run_id)
            .bind(task_id)
            .bind(i64::from(try_number))
            .bind(i64::from(line_number))
            .bind(i64::from(limit));
        let rows = answer("read log", select.fetch_all(&mut session.connection)).await?;
        rows.iter().map(|row| line_from(row).map_err(Error::failed("read log"))).collect()
    }

    /// Opens a session; the schema is created or brought up to date first.
    pub(super) async fn open(&self) -> Result<Session, Error> {
        let options: PgConnectOptions = self.url.reveal().parse().map_err(Error::failed("read the state database's address"))?;
        let options = options.application_name("ledgerline dag");
        let connection = answer("connect to the state database", PgConnection::connect_with(&options)).await?;
        let mut session = Session { connection };
        session.migrate().await?;
        Ok(session)
    }
}

/// The engine's connection.
pub(super) struct Session {
    connection: PgConnection,
}

impl Session {
    async fn migrate(&mut self) -> Result<(), Error> {
        let doing = "prepare the run history";
        let known: bool =
            answer(doing, sqlx::query_scalar("select to_regclass('ledgerline.dag_migration') is not null").fetch_one(&mut self.connection)).await?;
        if known && self.version().await? == MIGRATIONS.len() as i64 {
            return Ok(());
        }
        let mut transaction = answer(doing, self.connection.begin()).await?;
        answer(doing, transaction.execute("select pg_advisory_xact_lock(hashtextextended('ledgerline.migrations', 0))")).await?;
        answer(doing, transaction.execute("create schema if not exists ledgerline")).await?;
        answer(
            doing,
            transaction
                .execute("create table if not exists ledgerline.dag_migration (version bigint primary key, applied_at timestamptz not null default now())"),
        )
        .await?;
        let version: i64 =
            answer(doing, sqlx::query_scalar("select coalesce(max(version), 0) from ledgerline.dag_migration").fetch_one(&mut *transaction)).await?;
        if version > MIGRATIONS.len() as i64 {
            return Err(Error::NewerHistory { version });
        }
        for (place, migration) in MIGRATIONS.iter().enumerate().skip(usize::try_from(version).unwrap_or(0)) {
            answer(doing, sqlx::raw_sql(*migration).execute(&mut *transaction)).await?;
            answer(doing, sqlx::query("insert into ledgerline.dag_migration (version) values ($1)").bind(place as i64 + 1).execute(&mut *transaction)).await?;
        }
        answer(doing, transaction.commit()).await
    }

    async fn version(&mut self) -> Result<i64, Error> {
        let select = sqlx::query_scalar("select coalesce(max(version), 0) from ledgerline.dag_migration");
        answer("read the history's version", select.fetch_one(&mut self.connection)).await
    }

    /// True if this engine now is the only one that may run the DAG, for as long as the connection lives.
    pub(super) async fn try_lock(&mut self, dag_id: &str) -> Result<bool, Error> {
        let select = sqlx::query_scalar("select pg_try_advisory_lock(hashtextextended('ledgerline.dag.' || $1, 0))").bind(dag_id);
        answer("lock a DAG", select.fetch_one(&mut self.connection)).await
    }

    /// Whether the operator has paused the DAG's schedule.
    pub(super) async fn is_paused(&mut self, dag_id: &str) -> Result<bool, Error> {
        let select = sqlx::query_scalar("select coalesce((select is_paused from ledgerline.dag where dag_id = $1), false)").bind(dag_id);
        answer("read whether a DAG is paused", select.fetch_one(&mut self.connection)).await
    }

    pub(super) async fn set_paused(&mut self, dag_id: &str, is_paused: bool) -> Result<(), Error> {
        let upsert = "insert into ledgerline.dag (dag_id, is_paused) values ($1, $2) on conflict (dag_id) do update set is_paused = excluded.is_paused";
        answer("pause a DAG", sqlx::query(upsert).bind(dag_id).bind(is_paused).execute(&mut self.connection)).await.map(drop)
    }

    /// The newest runs, newest first.
    pub(super) async fn recent(&mut self, dag_id: &str, limit: u32) -> Result<Vec<Run>, Error> {
        let rows = answer("read runs", sqlx::query(SELECT_RECENT).bind(dag_id).bind(i64::from(limit)).fetch_all(&mut self.connection)).await?;
        rows.iter().map(|row| run_from(row).map_err(Error::failed("read runs"))).collect()
    }

    /// Runs that are queued or running, or whose end was not told yet; oldest first.
    pub(super) async fn unfinished(&mut self, dag_id: &str) -> Result<Vec<Run>, Error> {
        let rows = answer("read unfinished runs", sqlx::query(SELECT_UNFINISHED).bind(dag_id).fetch_all(&mut self.connection)).await?;
        rows.iter().map(|row| run_from(row).map_err(Error::failed("read unfinished runs"))).collect()
    }

    pub(super) async fn run(&mut self, run: &RunRef) -> Result<Option<Run>, Error> {
        let select = sqlx::query(SELECT_RUN).bind(&run.dag_id).bind(&run.run_id);
        let row = answer("read a run", select.fetch_optional(&mut self.connection)).await?;
        row.map(|row| run_from(&row).map_err(Error::failed("read a run"))).transpose()
    }

    /// The start of the newest scheduled run.
    pub(super) async fn last_scheduled(&mut self, dag_id: &str) -> Result<Option<DateTime<Utc>>, Error> {
        let select = sqlx::query_scalar("select max(logical_date) from ledgerline.dag_run where dag_id = $1 and run_type = 'scheduled'").bind(dag_id);
        answer("read the last scheduled run", select.fetch_one(&mut self.connection)).await
    }

    /// Run ids that wait to be run, whoever queued them; also the sign that the connection and its locks still live.
    pub(super) async fn queued(&mut self) -> Result<Vec<RunRef>, Error> {
        let select = sqlx::query("select dag_id, run_id from ledgerline.dag_run where state = 'queued' order by run_number");
        let rows = answer("look for queued runs", select.fetch_all(&mut self.connection)).await?;
        let read = |row: &PgRow| Ok(RunRef { dag_id: row.try_get(0)?, run_id: row.try_get(1)? });
        rows.iter().map(|row| read(row).map_err(Error::failed("look for queued runs"))).collect()
    }

    /// Writes runs with their tasks and current tries as they stand, in one transaction.
    pub(super) async fn save(&mut self, runs: &[&Run]) -> Result<(), Error> {
        let doing = "write a run";
        let mut transaction = answer(doing, self.connection.begin()).await?;
        for run in runs {
            let (triggering_dag, triggering_run) = run.triggered_by.as_ref().map(|it| (&it.dag_id, &it.run_id)).unzip();
            let upsert = sqlx::query(UPSERT_RUN)
                .bind(&run.dag_id)
                .bind(&run.run_id)
                .bind(run.run_type.as_str())
                .bind(run.logical_date)
                .bind(run.state.as_str())
                .bind(run.queued_at)
                .bind(run.started_at)
                .bind(run.finished_at)
                .bind(triggering_dag)
                .bind(triggering_run)
                .bind(run.cancelled)
                .bind(run.reported);
            answer(doing, upsert.execute(&mut *transaction)).await?;
            for statement in [UPSERT_TASKS, UPSERT_TRIES] {
                let upsert = sqlx::query(statement).bind(&run.dag_id).bind(&run.run_id).bind(Json(&run.tasks));
                answer(doing, upsert.execute(&mut *transaction)).await?;
            }
        }
        answer(doing, transaction.commit()).await
    }

    pub(super) async fn mark_reported(&mut self, run: &RunRef) -> Result<(), Error> {
        let update = sqlx::query("update ledgerline.dag_run set reported = true where dag_id = $1 and run_id = $2 and state in ('success', 'failed')");
        answer("note that a run's end was told", update.bind(&run.dag_id).bind(&run.run_id).execute(&mut self.connection)).await.map(drop)
    }

    /// Adds log lines. Lines of runs that are gone by now are dropped with them.
    pub(super) async fn add_lines(&mut self, lines: &[LogLine]) -> Result<(), Error> {
        let texts = |of: fn(&LogLine) -> &str| lines.iter().map(|it| of(it).to_owned()).collect::<Vec<String>>();
        let numbers = |of: fn(&LogLine) -> u32| lines.iter().map(|it| i64::from(of(it))).collect::<Vec<i64>>();
        let insert = sqlx::query(INSERT_LINES)
            .bind(texts(|it| &it.dag_id))
            .bind(texts(|it| &it.run_id))
            .bind(texts(|it| &it.task_id))
            .bind(numbers(|it| it.try_number))
            .bind(numbers(|it| it.line_number))
            .bind(lines.iter().map(|it| it.at).collect::<Vec<_>>())
            .bind(texts(|it| &it.line));
        answer("write log lines", insert.execute(&mut self.connection)).await.map(drop)
    }

    /// Forgets the oldest finished runs of a DAG beyond `kept`.
    pub(super) async fn prune(&mut self, dag_id: &str, kept: u32) -> Result<(), Error> {
        let delete = sqlx::query(PRUNE).bind(dag_id).bind(i64::from(kept));
        answer("forget old runs", delete.execute(&mut self.connection)).await.map(drop)
    }
}

/// One answer of the database, within bounds.
async fn answer<T>(doing: &'static str, work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, Error> {
    match tokio::time::timeout(ANSWER_WITHIN, work).await {
        Ok(result) => result.map_err(Error::failed(doing)),
        Err(_) => Err(Error::Silent { doing }),
    }
}

/// What a failure of the state database means.
pub(super) fn fault_of(error: &sqlx::Error) -> Fault {
    let sqlx::Error::Database(refusal) = error else {
        return match error {
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::ColumnNotFound(_) | sqlx::Error::Encode(_) => Fault::Bug,
            sqlx::Error::Configuration(_) => Fault::Operator("correct state.url: it must be postgres://user@host:port/database".to_owned()),
            _ => Fault::Transient,
        };
    };
    let code = refusal.code().unwrap_or_default();
    match code.get(..2).unwrap_or_default() {
        "28" => Fault::Operator("check user and password of state.url".to_owned()),
        "3D" => Fault::Operator("create the database that state.url names".to_owned()),
        "42" if code == "42501" => Fault::Operator("grant the user of state.url the right to create schema ledgerline".to_owned()),
        // Two engines create the schema at the same moment: the second finds it at its next try.
        "23" if code == "23505" => Fault::Transient,
        "22" | "23" | "42" => Fault::Bug,
        _ => Fault::Transient,
    }
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::Database { source, .. } => fault_of(source),
            Self::Silent { .. } => Fault::Transient,
            Self::NewerHistory { .. } => Fault::Operator("use the version of ledgerline that wrote this history, or another state database".to_owned()),
            Self::BadPlan(_) => Fault::Bug,
        }
    }
}

/// Columns as `run_from` reads them: the run, then its tasks as JSON in the order of the plan.
macro_rules! select_runs {
    ($rest:literal) => {
        concat!(
            "select r.dag_id, r.run_id, r.run_type, r.logical_date, r.state, r.queued_at, r.start_date, r.end_date, ",
            "r.triggering_dag_id, r.triggering_run_id, r.cancelled, r.reported, ",
            "coalesce((select jsonb_agg(to_jsonb(t) order by t.place) from ledgerline.task_instance t where t.dag_id = r.dag_id and t.run_id = r.run_id), '[]') ",
            "from ledgerline.dag_run r where r.dag_id = $1 ",
            $rest
        )
    };
}

const SELECT_RECENT: &str = select_runs!("order by r.run_number desc limit $2");
const SELECT_UNFINISHED: &str = select_runs!("and (r.state in ('queued', 'running') or not r.reported) order by r.run_number");
const SELECT_RUN: &str = select_runs!("and r.run_id = $2");

const SELECT_TRIES: &str = "select task_id, try_number, state, start_date, end_date, error from ledgerline.task_try \
     where dag_id = $1 and run_id = $2 order by start_date, task_id";

const SELECT_LINES: &str = "select try_number, line_number, at, line from ledgerline.task_log \
     where dag_id = $1 and run_id = $2 and task_id = $3 and try_number = $4 and line_number >= $5 order by line_number limit $6";

const UPSERT_RUN: &str = "insert into ledgerline.dag_run (dag_id, run_id, run_type, logical_date, state, queued_at, start_date, end_date, \
         triggering_dag_id, triggering_run_id, cancelled, reported) \
     values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) \
     on conflict (dag_id, run_id) do update set state = excluded.state, queued_at = excluded.queued_at, start_date = excluded.start_date, \
         end_date = excluded.end_date, cancelled = excluded.cancelled, reported = excluded.reported";

const UPSERT_TASKS: &str = "insert into ledgerline.task_instance (dag_id, run_id, task_id, place, state, try_number, max_tries, interruptions, \
         start_date, end_date, retry_at, error, fault, note) \
     select $1, $2, t.task_id, ordinality, t.state, t.try_number, t.max_tries, t.interruptions, t.start_date, t.end_date, t.retry_at, t.error, t.fault, t.note \
     from rows from (jsonb_to_recordset($3) as (task_id text, state text, try_number integer, max_tries integer, interruptions integer, \
         start_date timestamptz, end_date timestamptz, retry_at timestamptz, error text, fault text, note jsonb)) with ordinality as t \
     on conflict (dag_id, run_id, task_id) do update set place = excluded.place, state = excluded.state, try_number = excluded.try_number, \
         max_tries = excluded.max_tries, interruptions = excluded.interruptions, start_date = excluded.start_date, end_date = excluded.end_date, \
         retry_at = excluded.retry_at, error = excluded.error, fault = excluded.fault, note = excluded.note";

/// The current try of each task that has one; a cleared or never started task has no `start_date`.
const UPSERT_TRIES: &str = "insert into ledgerline.task_try (dag_id, run_id, task_id, try_number, state, start_date, end_date, error) \
     select $1, $2, t.task_id, t.try_number, case t.state when 'up_for_retry' then 'failed' else t.state end, t.start_date, t.end_date, t.error \
     from jsonb_to_recordset($3) as t (task_id text, state text, try_number integer, start_date timestamptz, end_date timestamptz, error text) \
     where t.start_date is not null and t.state in ('running', 'success', 'failed', 'skipped', 'up_for_retry') \
     on conflict (dag_id, run_id, task_id, try_number) do update set state = excluded.state, end_date = excluded.end_date, error = excluded.error";

const INSERT_LINES: &str = "insert into ledgerline.task_log (dag_id, run_id, task_id, try_number, line_number, at, line) \
     select l.* from unnest($1::text[], $2::text[], $3::text[], $4::integer[], $5::integer[], $6::timestamptz[], $7::text[]) \
         as l (dag_id, run_id, task_id, try_number, line_number, at, line) \
     join ledgerline.task_try using (dag_id, run_id, task_id, try_number) \
     on conflict do nothing";

const PRUNE: &str = "delete from ledgerline.dag_run where dag_id = $1 and state in ('success', 'failed') and run_number <= \
     (select run_number from ledgerline.dag_run where dag_id = $1 order by run_number desc offset $2 limit 1)";

fn run_from(row: &PgRow) -> Result<Run, sqlx::Error> {
    let read = |text: String| -> Box<dyn std::error::Error + Send + Sync> { text.into() };
    let triggering: (Option<String>, Option<String>) = (row.try_get(8)?, row.try_get(9)?);
    let Json(tasks): Json<Vec<TaskInstance>> = row.try_get(12)?;
    Ok(Run {
        dag_id: row.try_get(0)?,
        run_id: row.try_get(1)?,
        run_type: row.try_get::<String, _>(2)?.parse().map_err(|text| sqlx::Error::Decode(read(text)))?,
        logical_date: row.try_get(3)?,
        state: row.try_get::<String, _>(4)?.parse().map_err(|text| sqlx::Error::Decode(read(text)))?,
        queued_at: row.try_get(5)?,
        started_at: row.try_get(6)?,
        finished_at: row.try_get(7)?,
        triggered_by: triggering.0.zip(triggering.1).map(|(dag_id, run_id)| RunRef { dag_id, run_id }),
        cancelled: row.try_get(10)?,
        reported: row.try_get(11)?,
        tasks,
    })
}

fn try_from(row: &PgRow) -> Result<Try, sqlx::Error> {
    Ok(Try {
        task_id: row.try_get(0)?,
        try_number: row.try_get::<i32, _>(1)?.unsigned_abs(),
        state: row.try_get::<String, _>(2)?.parse().map_err(|text: String| sqlx::Error::Decode(text.into()))?,
        started_at: row.try_get(3)?,
        finished_at: row.try_get(4)?,
        error: row.try_get(5)?,
    })
}

fn line_from(row: &PgRow) -> Result<Line, sqlx::Error> {
    Ok(Line {
        try_number: row.try_get::<i32, _>(0)?.unsigned_abs(),
        line_number: row.try_get::<i32, _>(1)?.unsigned_abs(),
        at: row.try_get(2)?,
        line: row.try_get(3)?,
    })
}
