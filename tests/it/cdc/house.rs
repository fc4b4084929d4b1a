//! What the capture's tests stand on: a database and a broker of their own, and a capture between the two.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use ledgerline::{
    cdc::{self, Config, Stats},
    change::Lsn,
    secret::Secret,
    stage::{self, Handle, Phase},
    stream,
};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    message::Headers as _,
    mocking::MockCluster,
    producer::DefaultProducerContext,
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::{runtime::Runtime, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::lane::{self, Stream};

/// Far longer than anything here takes: a test that waits longer fails.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

fn server() -> String {
    crate::house::postgres()
}

/// A database of one test; gone with its slots when dropped.
pub(super) struct Database {
    pub(super) name: String,
    pub(super) url: Secret,
    /// The server it lies on, by another database of it.
    server: String,
}

impl Database {
    pub(super) async fn create(test: &str) -> Self {
        Self::create_on(&server(), test).await
    }

    /// On another server, of a superuser.
    pub(super) async fn create_on(server: &str, test: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("cdc_{test}_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mut admin = PgConnection::connect(server).await.expect("the test server runs");
        sqlx::raw_sql(AssertSqlSafe(format!("create database {name} template template0"))).execute(&mut admin).await.expect("a new database");
        let mut url = url::Url::parse(server).expect("an address");
        url.set_path(&name);
        Self { name, url: Secret::new(url), server: server.to_owned() }
    }

    /// The same by another address.
    pub(super) fn known_as(self, url: Secret) -> Self {
        let mut known = self;
        known.url = url;
        known
    }

    pub(super) async fn connect(&self) -> PgConnection {
        PgConnection::connect(self.url.reveal()).await.expect("the test's database")
    }

    /// Runs statements one by one as psql would: each is its own transaction unless they say otherwise, COPY data inline.
    pub(super) async fn run(&self, script: &str) {
        let mut connection = self.connect().await;
        let script: String = script.lines().filter(|line| !line.starts_with("--")).flat_map(|line| [line, "\n"]).collect();
        let mut rest = script.as_str();
        while let Some(at) = rest.find(" FROM stdin;\n") {
            let start = rest[..at].rfind(';').map_or(0, |it| it + 1);
            run_each(&mut connection, &rest[..start]).await;
            let after = &rest[at + " FROM stdin;\n".len()..];
            let (data, following) = after.split_once("\\.\n").expect("COPY data ends");
            let mut copy = connection.copy_in_raw(&format!("{} FROM stdin", rest[start..at].trim())).await.expect("COPY");
            copy.send(data.as_bytes()).await.expect("COPY data");
            copy.finish().await.expect("COPY");
            rest = following;
        }
        run_each(&mut connection, rest).await;
    }

    pub(super) async fn wal_position(&self) -> Lsn {
        cdc::wal_position(&self.url).await.expect("a position")
    }
}

async fn run_each(connection: &mut PgConnection, script: &str) {
    let mut quoted = false;
    let ends = |it: char| {
        quoted ^= it == '\'';
        it == ';' && !quoted
    };
    for statement in script.split(ends).map(str::trim).filter(|it| !it.is_empty()) {
        sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut *connection).await.unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let (name, server) = (self.name.clone(), self.server.clone());
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let Ok(mut admin) = PgConnection::connect(&server).await else { return };
                for statement in [
                    format!("select pg_terminate_backend(active_pid, 5000) from pg_replication_slots where database = '{name}' and active"),
                    format!("select pg_drop_replication_slot(slot_name) from pg_replication_slots where database = '{name}'"),
                    format!("drop database if exists {name} with (force)"),
                ] {
                    if let Err(error) = sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut admin).await {
                        eprintln!("{name} stays behind: {error}");
                    }
                }
            });
        });
        let _ = dropping.join();
    }
}

/// A record as it was read back.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Read {
    pub(super) topic: String,
    pub(super) partition: i32,
    pub(super) key: Option<String>,
    pub(super) value: Option<String>,
    pub(super) headers: Vec<(String, String)>,
}

/// As a topic: the capture's heartbeat, which has its name before the prefix.
pub(super) const HEARTBEAT: &str = "__debezium-heartbeat";

/// A broker: our own, or with `--features stack` the real one.
pub(super) struct Broker {
    pub(super) address: String,
    /// The topics of the capture begin with it.
    pub(super) prefix: String,
    kind: Kind,
    reader: Reader,
}

enum Kind {
    Served(#[expect(dead_code, reason = "held until the test ends")] Served),
    /// Cannot create topics on request, so tests make theirs first. Nor does it say what its topics take, and a capture waits for
    /// the answer: only for tests that want it away or slow.
    Mock(MockCluster<'static, DefaultProducerContext>),
}

/// The broker of this run on a runtime of its own: it serves while a test blocks.
struct Served(Option<(Stream, Runtime)>);

impl Served {
    fn start(prefix: String) -> Self {
        let start = move || {
            let runtime = Runtime::new().expect("a runtime");
            let mut stream = runtime.block_on(Stream::open());
            stream.prefix = prefix;
            (stream, runtime)
        };
        Self(Some(std::thread::spawn(start).join().expect("the broker starts")))
    }

    fn address(&self) -> String {
        self.0.as_ref().expect("it runs").0.address.clone()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let Some((mut stream, runtime)) = self.0.take() else { return };
        let end = move || {
            if stream.broker.is_some() {
                runtime.block_on(stream.leave());
            }
        };
        let _ = std::thread::spawn(end).join();
    }
}

/// Reads topics of a broker, wherever it is.
pub(super) struct Reader {
    consumer: BaseConsumer,
    /// Where reading goes on, by topic and partition.
    next: HashMap<(String, i32), i64>,
}

impl Broker {
    /// Of this run. The prefix is one of the database's own, as topics outlive a test that fails.
    pub(super) fn start(database: &Database, tables: &[&str], partitions: i32) -> Self {
        Self::with_prefix(&database.name, tables, partitions)
    }

    pub(super) fn with_prefix(prefix: &str, tables: &[&str], partitions: i32) -> Self {
        let served = Served::start(prefix.to_owned());
        let broker = Self::at(served.address(), prefix, Kind::Served(served));
        broker.create(tables, partitions);
        broker
    }

    /// In memory, where it can be away or slow at will.
    pub(super) fn in_memory(database: &Database, tables: &[&str], partitions: i32) -> Self {
        let mock = MockCluster::new(1).expect("a broker in memory");
        let broker = Self::at(mock.bootstrap_servers(), &database.name, Kind::Mock(mock));
        for (topic, partitions) in broker.topics(tables, partitions) {
            broker.mock().create_topic(&topic, partitions, 1).expect("a topic");
        }
        broker
    }

    pub(super) fn mock(&self) -> &MockCluster<'static, DefaultProducerContext> {
        let Kind::Mock(mock) = &self.kind else { panic!("it is not in memory") };
        mock
    }

    fn topics(&self, tables: &[&str], partitions: i32) -> Vec<(String, i32)> {
        let prefix = &self.prefix;
        let by_table = tables.iter().map(|table| (format!("{prefix}.{table}"), partitions));
        let single = ["transaction", "message", "dead_letters", HEARTBEAT].map(|topic| (self.name(topic), 1));
        by_table.chain(single).collect()
    }

    fn name(&self, topic: &str) -> String {
        if topic == HEARTBEAT { format!("{HEARTBEAT}.{}", self.prefix) } else { format!("{}.{topic}", self.prefix) }
    }

    /// With the broker's own limits: not every topic is one that the capture has made.
    fn create(&self, tables: &[&str], partitions: i32) {
        let topics = self.topics(tables, partitions);
        let admin: AdminClient<DefaultClientContext> = ClientConfig::new().set("bootstrap.servers", &self.address).create().expect("a client");
        let topics: Vec<NewTopic<'_>> = topics.iter().map(|(topic, partitions)| NewTopic::new(topic, *partitions, TopicReplication::Fixed(1))).collect();
        let created = lane::wait_for(async { admin.create_topics(&topics, &AdminOptions::new()).await }).expect("the broker answers");
        assert!(created.iter().all(Result::is_ok), "{created:?}");
    }

    fn at(address: String, prefix: &str, kind: Kind) -> Self {
        Self { reader: Reader::start(&address), address, prefix: prefix.to_owned(), kind }
    }

    pub(super) fn address(&self) -> String {
        self.address.clone()
    }

    #[cfg(feature = "stack")]
    pub(super) fn reader(&mut self) -> &mut Reader {
        &mut self.reader
    }

    /// As [`Reader::read_on`], by the topic's name behind the prefix.
    pub(super) fn read_on(&mut self, topic: &str) -> Vec<Read> {
        let topic = self.name(topic);
        self.reader.read_on(&topic)
    }

    /// Everything a topic (its name behind the prefix) holds.
    pub(super) fn read(&mut self, topic: &str) -> Vec<Read> {
        let topic = self.name(topic);
        self.reader.read(&topic)
    }
}

impl Reader {
    pub(super) fn start(bootstrap_servers: &str) -> Self {
        let consumer = ClientConfig::new()
            .set("bootstrap.servers", bootstrap_servers)
            .set("group.id", "tests")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "10")
            .create()
            .expect("a consumer");
        Self { consumer, next: HashMap::new() }
    }

    /// What a topic holds behind the last read of it, by partition and offset. What was acknowledged before the call is in it.
    pub(super) fn read_on(&mut self, topic: &str) -> Vec<Read> {
        let metadata = self.consumer.fetch_metadata(Some(topic), PATIENCE).expect("metadata");
        let n_partitions = i32::try_from(metadata.topics()[0].partitions().len()).expect("few");
        let mut records = Vec::new();
        for partition in 0..n_partitions {
            let (first, end) = self.consumer.fetch_watermarks(topic, partition, PATIENCE).expect("watermarks");
            let next = self.next.entry((topic.to_owned(), partition)).or_insert(first);
            if *next >= end {
                continue;
            }
            let mut assignment = TopicPartitionList::new();
            assignment.add_partition_offset(topic, partition, Offset::Offset(*next)).expect("an offset");
            self.consumer.assign(&assignment).expect("assigned");
            while *next < end {
                let Some(Ok(message)) = self.consumer.poll(PATIENCE) else { continue };
                *next = message.offset() + 1;
                records.push(into_read(&message));
            }
        }
        records
    }

    /// Everything a topic holds.
    pub(super) fn read(&mut self, topic: &str) -> Vec<Read> {
        self.next.retain(|(name, _), _| name != topic);
        self.read_on(topic)
    }
}

fn into_read(message: &rdkafka::message::BorrowedMessage<'_>) -> Read {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    let headers = message.headers().into_iter().flat_map(|it| it.iter());
    Read {
        topic: message.topic().to_owned(),
        partition: message.partition(),
        key: message.key().map(text),
        value: message.payload().map(text),
        headers: headers.map(|it| (it.key.to_owned(), text(it.value.unwrap_or_default()))).collect(),
    }
}

/// A capture that runs.
pub(super) struct Capture {
    pub(super) handle: Handle<Stats>,
    task: JoinHandle<Result<(), cdc::Error>>,
}

impl Capture {
    pub(super) fn start(database: &Database, bootstrap_servers: String, config: Config) -> Self {
        Self::start_as(&database.url, database, bootstrap_servers, config)
    }

    /// Into topics of that many partitions, where it has to make them.
    pub(super) fn start_with(partitions: NonZeroU32, database: &Database, bootstrap_servers: String, config: Config) -> Self {
        let stream = stream::Config { partitions, ..stream::Config::default() };
        Self::spawn(&database.url, database, bootstrap_servers, stream, config)
    }

    /// With another address of the source.
    pub(super) fn start_as(source: &Secret, database: &Database, bootstrap_servers: String, config: Config) -> Self {
        Self::spawn(source, database, bootstrap_servers, stream::Config::default(), config)
    }

    fn spawn(source: &Secret, database: &Database, bootstrap_servers: String, stream: stream::Config, config: Config) -> Self {
        let (handle, control) = stage::control(Stats::default(), Phase::Running, &CancellationToken::new());
        let (source, state) = (source.clone(), database.url.clone());
        let task = tokio::spawn(async move {
            let ended = cdc::run(source, state, bootstrap_servers, stream, config, control).await;
            // A test that waits for something else shows why it waits in vain.
            ended.inspect_err(|error| eprintln!("the capture ended: {}", ledgerline::fault::chain(error)))
        });
        Self { handle, task }
    }

    /// Waits until the stats say so.
    pub(super) async fn until(&self, what: &str, reached: impl FnMut(&Stats) -> bool) -> Stats {
        let mut stats = self.handle.stats.clone();
        let waiting = tokio::time::timeout(PATIENCE, stats.wait_for(reached)).await;
        match waiting {
            Ok(Ok(stats)) => stats.clone(),
            Ok(Err(_)) => panic!("{what}: the capture ended"),
            Err(_) => panic!("{what}: still not so: {:?}", *self.handle.stats.borrow()),
        }
    }

    /// Waits until everything written so far is with the broker and the slot knows.
    pub(super) async fn drain(&self, database: &Database) -> Stats {
        let end = database.wal_position().await;
        self.until("drained", |it| it.confirmed_lsn >= end).await
    }

    pub(super) async fn stop(self) {
        self.handle.stop.cancel();
        self.ended().await.expect("a good end");
    }

    /// As kill -9 would: nothing is confirmed any more.
    pub(super) async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    pub(super) async fn ended(self) -> Result<(), cdc::Error> {
        tokio::time::timeout(PATIENCE, self.task).await.expect("it ends").expect("it does not panic")
    }
}

/// A capture of `public.*`, under its own slot and topics.
pub(super) fn config(database: &Database) -> Config {
    Config {
        topic_prefix: database.name.clone(),
        tables: vec!["public.*".to_owned()],
        slot: database.name.clone(),
        publication: database.name.clone(),
        ..Config::default()
    }
}

/// The same by Debezium, on the Kafka Connect of `tests/stack`, which resolves the reference to the source's password.
#[cfg(feature = "stack")]
pub(super) fn on_connect(database: &Database) -> Config {
    let stack = lane::stack().expect("the lane of the real servers");
    Config { engine: cdc::Engine::Debezium, connect_url: stack.value("CDC__CONNECT_URL"), ..config(database) }
}

/// The text with everything that differs from run to run made equal: LSNs, transaction ids, times, database, version.
pub(super) fn masked(text: &str) -> String {
    let mut out = text.to_owned();
    for name in ["ts_ms", "ts_us", "ts_ns", "lsn", "txId", "sequence", "version", "db"] {
        out = masked_field(&out, &format!("\"{name}\":"));
    }
    // `201088:629722832` in transaction ids.
    masked_pairs(&out)
}

fn masked_field(text: &str, head: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(head) {
        let (before, after) = rest.split_at(at + head.len());
        out.push_str(before);
        let end = value_end(after);
        let value = &after[..end];
        // null stays null, and a sequence keeps its shape.
        match value {
            "null" => out.push_str("null"),
            _ if value.starts_with("\"[null") => out.push_str("\"[null,N]\""),
            _ => out.push('N'),
        }
        rest = &after[end..];
    }
    out + rest
}

/// Where a JSON string or number ends.
fn value_end(text: &str) -> usize {
    let mut quoted = false;
    let mut escaped = false;
    for (at, character) in text.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            ',' | '}' if !quoted => return at,
            _ => {}
        }
    }
    text.len()
}

fn masked_pairs(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("\"id\":\"") {
        let (before, after) = rest.split_at(at + "\"id\":\"".len());
        out.push_str(before);
        let end = after.find('"').unwrap_or(after.len());
        let is_pair = after[..end].split_once(':').is_some_and(|(xid, lsn)| [xid, lsn].iter().all(|it| it.bytes().all(|byte| byte.is_ascii_digit())));
        out.push_str(if is_pair { "N:N" } else { &after[..end] });
        rest = &after[end..];
    }
    out + rest
}

/// Only the top-level times: all that may differ when an event is repeated.
pub(super) fn without_times(text: &str) -> String {
    text.rfind(",\"ts_ms\":").filter(|_| text.contains("\"op\":")).map_or_else(|| text.to_owned(), |at| text[..at].to_owned())
}
