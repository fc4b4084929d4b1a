//! One run of both engines over many cases: a database, a schema for each case, two captures, and what each of them wrote.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use ledgerline::{
    cdc::{self, Config, SkippedOperations, Step},
    change::Lsn,
    fault::{Diagnose as _, Fault},
    secret::Secret,
    units::Span,
};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    message::Headers as _,
};
use sqlx::{AssertSqlSafe, PgConnection};

use super::{
    case::{Case, Said, Statement, WRITERS},
    compare::{Difference, differences},
    types::PREAMBLE,
};
use crate::{
    binary::PATIENCE,
    cdc::{
        debezium::WORKER,
        house::{Capture, Database, config, on_connect},
    },
    lane,
};

/// A message as its bytes are, but for the prefix, in which alone the settings of the two differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) key: Option<String>,
    pub(super) value: Option<String>,
    pub(super) headers: Vec<(String, String)>,
}

/// What an engine wrote, by topic without its prefix.
pub(super) type Topics = BTreeMap<String, Vec<Written>>;

struct Outcome {
    ours: Topics,
    theirs: Topics,
    /// How many statements of each case were done, and how many PostgreSQL refused.
    done: Vec<(usize, usize)>,
}

/// Its topics are gone when dropped.
struct Engine {
    capture: Option<Capture>,
    config: Config,
    kafka: String,
    source: Secret,
    removed: bool,
}

pub(super) fn schema(place: usize) -> String {
    format!("case{place}")
}

const SENTINEL: &str = "cases.sentinel";

/// Debezium itself gave up on what was done, and why: what its task's trace begins with, and its innermost cause.
#[derive(Debug)]
pub(super) struct TaskFailed(String);

/// What became of one case.
pub(super) struct Done {
    pub(super) differences: Vec<Difference>,
    pub(super) statements: usize,
    pub(super) refused: usize,
}

/// All cases at once; where Debezium's task fails over some, by halves until it is known over which.
pub(super) struct Run {
    /// In the order of the cases.
    pub(super) done: Vec<Option<Done>>,
    /// On topics of no case.
    pub(super) shared: Vec<Difference>,
    pub(super) messages: usize,
}

pub(super) async fn each(cases: &[Case]) -> Run {
    let mut run = Run { done: cases.iter().map(|_| None).collect(), shared: Vec::new(), messages: 0 };
    let of = |skips: bool| (0..cases.len()).filter(|it| cases[*it].skips_truncate == skips).collect::<Vec<usize>>();
    // Places of cases; the next are the last.
    let mut left = vec![of(true), of(false)];
    while let Some(places) = left.pop() {
        let batch: Vec<Case> = places.iter().map(|it| cases[*it].clone()).collect();
        if batch.is_empty() {
            continue;
        }
        match (both(&batch).await, places.as_slice()) {
            (Ok(outcome), places) => run.take(places, &outcome),
            (Err(TaskFailed(why)), [place]) => {
                run.done[*place] = Some(Done { differences: vec![Difference::failure(&why)], statements: 0, refused: 0 });
            }
            (Err(TaskFailed(why)), places) => {
                eprintln!("Debezium's task fails over one of {} cases, which is looked for: {why}", places.len());
                let (first, second) = places.split_at(places.len() / 2);
                left.extend([second.to_vec(), first.to_vec()]);
            }
        }
    }
    run
}

impl Run {
    fn take(&mut self, places: &[usize], outcome: &Outcome) {
        let differences = differences(&outcome.ours, &outcome.theirs);
        for (place, (statements, refused)) in outcome.done.iter().copied().enumerate() {
            let differences = differences.iter().filter(|it| it.concerns(place)).cloned().collect();
            self.done[places[place]] = Some(Done { differences, statements, refused });
        }
        let of_none = differences.into_iter().filter(|it| (0..outcome.done.len()).all(|place| !it.concerns(place)));
        self.shared.extend(of_none);
        self.messages += outcome.theirs.values().map(Vec::len).sum::<usize>();
    }
}

async fn both(cases: &[Case]) -> Result<Outcome, TaskFailed> {
    let _worker = WORKER.read().await;
    let kafka = lane::stack().expect("the lane of the real servers").kafka();
    let database = Database::create("differential").await;
    database.run(&format!("{PREAMBLE} create schema cases; create table {SENTINEL} (phase serial primary key);")).await;
    let mut connection = database.connect().await;
    let mut done = vec![(0, 0); cases.len()];
    for (place, case) in cases.iter().enumerate() {
        let schema = schema(place);
        let setup = [format!("create schema {schema}"), format!("set search_path to {schema}, public")].into_iter().chain(case.setup());
        for sql in setup {
            sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(&mut connection).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        }
    }
    let mut writers = Vec::new();
    for _ in 0..WRITERS {
        let mut writer = database.connect().await;
        // One writer never goes on while the other waits for it: a lock that is not free is an error, the same in each run.
        sqlx::raw_sql("set lock_timeout to '10ms'").execute(&mut writer).await.expect("a setting");
        writers.push(writer);
    }
    phase(&mut writers, cases, 0, &mut done).await;

    let skipped_operations = if cases[0].skips_truncate { SkippedOperations::T } else { SkippedOperations::None };
    let settings = |config: Config| Config { skipped_operations, ..config };
    let mut native = Engine::start(&database, &kafka, settings(config(&database)), "n");
    native.streaming(&database).await;
    // Only now: what helps its slot on are transactions that both have to see.
    let mut debezium = Engine::start(&database, &kafka, settings(on_connect(&database)), "d");
    let captured = capture(&database, (&mut connection, &mut writers), cases, (&native, &mut debezium), &mut done).await;
    let written = captured.map(|()| (native.written(), debezium.written()));
    native.stop(&database).await;
    debezium.stop(&database).await;
    written.map(|(ours, theirs)| Outcome { ours, theirs, done })
}

async fn capture(
    database: &Database,
    (connection, writers): (&mut PgConnection, &mut [PgConnection]),
    cases: &[Case],
    (native, debezium): (&Engine, &mut Engine),
    done: &mut [(usize, usize)],
) -> Result<(), TaskFailed> {
    // Debezium tells no position behind its snapshot before something happened there, with heartbeats as rare as these.
    debezium.began(database, connection).await?;
    let begin = sentinel(connection).await;
    confirmed(connection, debezium, begin).await?;
    let n_phases = cases.iter().map(|it| it.phases.len()).max().unwrap_or(0);
    for at in 1..n_phases {
        phase(writers, cases, at, done).await;
        let end = sentinel(connection).await;
        for engine in [native, &*debezium] {
            confirmed(connection, engine, end).await?;
        }
    }
    Ok(())
}

/// Waits until the engine has told its slot that the broker has all before that place.
async fn confirmed(connection: &mut PgConnection, engine: &Engine, end: Lsn) -> Result<(), TaskFailed> {
    const CONFIRMED: &str = "select coalesce((confirmed_flush_lsn - '0/0')::bigint, 0) from pg_replication_slots where slot_name = $1";
    let deadline = Instant::now() + PATIENCE;
    let end = i64::try_from(end.0).expect("a position");
    while sqlx::query_scalar::<_, i64>(CONFIRMED).bind(&engine.config.slot).fetch_one(&mut *connection).await.expect("an answer") <= end {
        engine.alive()?;
        let stats = engine.running().handle.stats.borrow().clone();
        assert!(Instant::now() < deadline, "{} does not get on: {stats:?}", engine.config.engine.as_str());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// A place in the WAL which only a commit behind everything so far lies behind.
async fn sentinel(connection: &mut PgConnection) -> Lsn {
    let insert = format!("insert into {SENTINEL} default values");
    sqlx::raw_sql("begin").execute(&mut *connection).await.expect("a transaction");
    sqlx::raw_sql(AssertSqlSafe(insert)).execute(&mut *connection).await.expect("a row");
    let at: i64 = sqlx::query_scalar("select (pg_current_wal_insert_lsn() - '0/0')::bigint").fetch_one(&mut *connection).await.expect("a position");
    sqlx::raw_sql("commit").execute(&mut *connection).await.expect("a commit");
    Lsn(u64::try_from(at).expect("a position"))
}

async fn phase(writers: &mut [PgConnection], cases: &[Case], at: usize, done: &mut [(usize, usize)]) {
    for (place, case) in cases.iter().enumerate() {
        let Some(statements) = case.phases.get(at) else { continue };
        for writer in &mut *writers {
            let path = format!("set search_path to {}, public", schema(place));
            sqlx::raw_sql(AssertSqlSafe(path)).execute(writer).await.expect("a search path");
        }
        for Said { by, statement } in statements {
            let is_done = execute(&mut writers[*by], statement).await;
            if is_done { done[place].0 += 1 } else { done[place].1 += 1 }
        }
        // What shrinking left open; outside of a transaction a warning.
        for writer in &mut *writers {
            sqlx::raw_sql("commit").execute(writer).await.expect("an end");
        }
    }
}

/// False where PostgreSQL refuses: the same for both engines.
async fn execute(connection: &mut PgConnection, statement: &Statement) -> bool {
    let sent = statement.sent();
    let result = match sent.copied {
        None => sqlx::raw_sql(AssertSqlSafe(sent.sql.clone())).execute(connection).await.map(drop),
        Some(lines) => match connection.copy_in_raw(&sent.sql).await {
            Ok(mut copy) => {
                let all = copy.send(lines.as_bytes()).await.map(drop);
                match all {
                    Ok(()) => copy.finish().await.map(drop),
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        },
    };
    if std::env::var_os("LEDGERLINE_TEST_REFUSED").is_some()
        && let Err(error) = &result
    {
        eprintln!("refused: {error}: {}", sent.sql.chars().take(300).collect::<String>());
    }
    match result {
        Ok(()) => true,
        Err(sqlx::Error::Database(_)) => false,
        Err(error) => panic!("{}: {error}", sent.sql),
    }
}

impl Engine {
    fn start(database: &Database, kafka: &str, config: Config, suffix: &str) -> Self {
        let name = format!("{}_{suffix}", database.name);
        // No heartbeat's message between the transactions that are compared.
        let heartbeat = Span::from_secs(86_400);
        let tables = vec!["case*.*".to_owned()];
        let config = Config { topic_prefix: name.clone(), slot: name.clone(), publication: name, tables, heartbeat, ..config };
        let capture = Some(Capture::start(database, kafka.to_owned(), config.clone()));
        Self { capture, config, kafka: kafka.to_owned(), source: database.url.clone(), removed: false }
    }

    /// What is written from now on it will see as a change.
    async fn began(&mut self, database: &Database, connection: &mut PgConnection) -> Result<(), TaskFailed> {
        const BEGAN: &str = "select exists (select from pg_replication_slots where slot_name = $1 and confirmed_flush_lsn is not null)";
        let deadline = Instant::now() + PATIENCE;
        while !sqlx::query_scalar::<_, bool>(BEGAN).bind(&self.config.slot).fetch_one(&mut *connection).await.expect("an answer") {
            assert!(Instant::now() < deadline, "{} has no slot yet", self.config.engine.as_str());
            tokio::time::sleep(Duration::from_millis(50)).await;
            self.alive()?;
            if self.running().handle.stats.has_changed().is_err() {
                self.start_again(database).await;
            }
        }
        Ok(())
    }

    /// Whether its task goes on. It is restarted some times, in vain where what it reads is what it fails over.
    fn alive(&self) -> Result<(), TaskFailed> {
        let stats = self.running().handle.stats.borrow();
        let tasks = stats.connector.iter().flat_map(|it| &it.tasks);
        let failed = tasks.filter(|it| it.state == "FAILED").find_map(|it| it.trace.clone());
        failed.map_or(Ok(()), |trace| Err(TaskFailed(trace)))
    }

    async fn streaming(&mut self, database: &Database) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut stats = self.running().handle.stats.clone();
            let waiting = tokio::time::timeout_at(deadline.into(), stats.wait_for(|it| it.step == Step::Streaming)).await;
            if waiting.unwrap_or_else(|_| panic!("{} does not stream yet: {:?}", self.config.engine.as_str(), *self.running().handle.stats.borrow())).is_ok() {
                return;
            }
            self.start_again(database).await;
        }
    }

    fn running(&self) -> &Capture {
        self.capture.as_ref().expect("it runs")
    }

    /// A broker that has just been given hundreds of topics may not know yet who leads them: as for the pipeline, that is a start again.
    async fn start_again(&mut self, database: &Database) {
        let error = self.capture.take().expect("it ran").ended().await.expect_err("it was not told to end");
        assert!(matches!(error.fault(), Fault::Transient), "{}", ledgerline::fault::chain(&error));
        self.capture = Some(Capture::start(database, self.kafka.clone(), self.config.clone()));
    }

    async fn stop(&mut self, database: &Database) {
        if let Some(capture) = self.capture.take() {
            capture.stop().await;
        }
        cdc::remove(&database.url, &self.config, false).await.expect("removed");
        self.removed = true;
    }

    /// Everything on its topics. What was acknowledged before the call is in it.
    fn written(&self) -> Topics {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &self.kafka)
            .set("group.id", "tests")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "10")
            .create()
            .expect("a consumer");
        let metadata = consumer.fetch_metadata(None, PATIENCE).expect("metadata");
        let head = format!("{}.", self.config.topic_prefix);
        let mut topics = Topics::new();
        let mut assignment = TopicPartitionList::new();
        let mut left: HashMap<String, i64> = HashMap::new();
        for topic in metadata.topics().iter().filter(|it| it.name().starts_with(&head)) {
            topics.insert(topic.name()[head.len()..].to_owned(), Vec::new());
            let (first, end) = consumer.fetch_watermarks(topic.name(), 0, PATIENCE).expect("watermarks");
            if end > first {
                assignment.add_partition_offset(topic.name(), 0, Offset::Offset(first)).expect("an offset");
                left.insert(topic.name().to_owned(), end);
            }
        }
        consumer.assign(&assignment).expect("assigned");
        while !left.is_empty() {
            let Some(Ok(message)) = consumer.poll(Duration::from_secs(1)) else { continue };
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8").replace(&self.config.topic_prefix, "prefix");
            let headers = message.headers().into_iter().flat_map(|it| it.iter());
            let written = Written {
                key: message.key().map(text),
                value: message.payload().map(text),
                headers: headers.map(|it| (it.key.to_owned(), text(it.value.unwrap_or_default()))).collect(),
            };
            topics.get_mut(&message.topic()[head.len()..]).expect("it was asked for").push(written);
            if left.get(message.topic()).is_some_and(|end| message.offset() + 1 >= *end) {
                left.remove(message.topic());
            }
        }
        topics
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // A connector that a failed test leaves behind would look for its database for ever.
        if !self.removed
            && let Err(error) = lane::wait_for(cdc::remove(&self.source, &self.config, false))
        {
            eprintln!("{} stays behind: {error}", self.config.topic_prefix);
        }
        lane::remove_topics(&self.kafka, &self.config.topic_prefix);
    }
}
