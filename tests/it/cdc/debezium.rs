//! Debezium on the Kafka Connect of `tests/stack`: what others do to the connector, and what its worker does to us.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use ledgerline::{
    cdc::{self, Config, ConnectorStep, Stats, Step},
    fault::{Diagnose as _, Fault},
    secret::Secret,
    stream,
    units::Span,
};
use sqlx::Connection as _;
use tokio::sync::RwLock;

use super::{
    connect::serve,
    contract::holds_what_the_source_holds,
    days::PAYMENTS,
    house::{Broker, Capture, Database, Reader, on_connect},
};
use crate::{
    binary::{PATIENCE, kill},
    house::on_server,
    lane::{Stream, stack, wait_for},
};

const TOPIC: &str = "public.payments";

/// Held to write by who kills the worker that all these tests share.
pub(super) static WORKER: RwLock<()> = RwLock::const_new(());

async fn payments(test: &str) -> (Database, Broker, Config) {
    let database = Database::create(test).await;
    database.run(PAYMENTS).await;
    let broker = Broker::start(&database, &[TOPIC], 1);
    let config = on_connect(&database);
    (database, broker, config)
}

/// As the capture's own, with the patience that a worker's start takes.
async fn until(capture: &Capture, what: &str, reached: impl FnMut(&Stats) -> bool) -> Stats {
    let mut stats = capture.handle.stats.clone();
    let reached = tokio::time::timeout(PATIENCE, stats.wait_for(reached)).await.unwrap_or_else(|_| panic!("{what}: still not so"));
    reached.unwrap_or_else(|_| panic!("{what}: the capture ended")).clone()
}

async fn streaming(capture: &Capture) -> Stats {
    until(capture, "streaming", |it| it.step == Step::Streaming).await
}

async fn drained(capture: &Capture, database: &Database) -> Stats {
    let end = database.wal_position().await;
    until(capture, "drained", |it| it.confirmed_lsn >= end).await
}

/// Asks Connect itself, by hand as it were; returns its whole answer.
fn ask(method: &str, path: &str, body: &str) -> String {
    let address = stack().expect("the lane of the real servers").value("CDC__CONNECT_URL");
    let host = address.trim_start_matches("http://");
    let request = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    loop {
        let answer = String::from_utf8(forward(host, request.as_bytes()).expect("Connect answers")).expect("text");
        // Connect has done nothing, and will soon.
        if !answer.contains("a rebalance is expected") {
            return answer;
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// One request, on a connection of its own.
fn forward(host: &str, request: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(host)?;
    let head = request.iter().position(|it| *it == b'\n').expect("a request line") + 1;
    stream.write_all(&request[..head])?;
    stream.write_all(b"Connection: close\r\n")?;
    stream.write_all(&request[head..])?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_connect_rejects_is_told_field_by_field() {
    let _worker = WORKER.read().await;
    let (database, broker, config) = payments("rejected").await;
    for (config, field, remedy) in [
        (Config { database_address: "127.0.0.1:1".to_owned(), ..config.clone() }, "database.hostname", "cdc.database_address"),
        (Config { database_password: "${env:NOT_TOLD}".to_owned(), ..config.clone() }, "password", "cdc.database_password"),
    ] {
        let error = Capture::start(&database, broker.address(), config).ended().await.expect_err("it is rejected");
        let cdc::Error::Rejected { fields, .. } = &error else { panic!("{error}") };
        assert!(fields.iter().any(|(name, why)| name.contains(field) || why.contains(field)), "{error}");
        assert!(matches!(error.fault(), Fault::Operator(told) if told.contains(remedy)), "{error}");
    }
    // Nothing was registered, so the right settings are a first start.
    let capture = Capture::start(&database, broker.address(), config.clone());
    streaming(&capture).await;
    capture.stop().await;
    cdc::remove(&database.url, &config, false).await.expect("removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_snapshot_of_many_new_topics_comes_to_its_end() {
    const TABLES: usize = 120;
    let _worker = WORKER.read().await;
    let database = Database::create("many").await;
    let made = |n: usize| format!("create table t_{n} (id int primary key); insert into t_{n} select generate_series(1, {}); ", n % 3);
    database.run(&(1..=TABLES).map(made).collect::<String>()).await;
    // Whose topics nobody has made.
    let stream = Stream::open().await;
    let config = Config { topic_prefix: stream.prefix.clone(), ..on_connect(&database) };
    let capture = Capture::start(&database, stream.address.clone(), config.clone());
    let stats = streaming(&capture).await;
    let rows: u64 = stats.tables.values().map(|it| it.reads).sum();
    assert_eq!((stats.tables.len(), rows), (TABLES, (1..=TABLES as u64).map(|n| n % 3).sum()));
    database.run("insert into t_1 values (100); insert into t_120 values (100);").await;
    let stats = drained(&capture, &database).await;
    assert_eq!(["public.t_1", "public.t_120"].map(|it| stats.tables[it].changes), [1, 1]);
    capture.stop().await;
    cdc::remove(&database.url, &config, false).await.expect("removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_commits_while_a_capture_begins_again_is_counted() {
    let _worker = WORKER.read().await;
    let (database, broker, config) = payments("resumed").await;
    let capture = Capture::start(&database, broker.address(), config.clone());
    streaming(&capture).await;
    capture.stop().await;
    // The connector goes on meanwhile; behind a door at which a row is written, and its commit told, before anything is answered.
    let (host, address, prefix) = (config.connect_url.trim_start_matches("http://").to_owned(), broker.address(), broker.prefix.clone());
    let (source, written) = (database.url.clone(), Mutex::new(false));
    let port = serve(None, move |request| {
        if !std::mem::replace(&mut *written.lock().expect("no panic"), true) {
            wait_for(async {
                sqlx::raw_sql("insert into payments values (1, 1.00, 'at once')").execute(&mut sqlx::PgConnection::connect(source.reveal()).await?).await
            })
            .expect("written");
            let mut reader = Reader::start(&address);
            while !reader.read_on(&format!("{prefix}.transaction")).iter().any(|it| it.value.as_ref().is_some_and(|it| it.contains("public.payments"))) {}
        }
        forward(&host, request).unwrap_or_default()
    });
    let behind = Config { connect_url: format!("http://127.0.0.1:{port}"), ..config.clone() };
    let capture = Capture::start(&database, broker.address(), behind);
    streaming(&capture).await;
    let stats = drained(&capture, &database).await;
    assert_eq!(stats.tables.get("public.payments").map(|it| it.changes), Some(1));
    capture.stop().await;
    cdc::remove(&database.url, &config, false).await.expect("removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn apply_registers_the_connector_and_a_start_goes_on_from_there() {
    let _worker = WORKER.read().await;
    let (database, mut broker, config) = payments("applied").await;
    database.run("insert into payments values (1, 1.00, 'before');").await;
    let connector = format!("/connectors/{}", database.name);
    let kafka = broker.address();
    let apply = async |config: &Config, dry_run| {
        let applied = cdc::apply(&database.url, &database.url, &kafka, &stream::Config::default(), config, dry_run).await;
        applied.expect("nothing speaks against it").connector
    };
    assert_eq!(apply(&config, true).await, Some(ConnectorStep::Registered));
    assert!(ask("GET", &connector, "").contains(" 404 "), "a rehearsal registers nothing");
    assert_eq!(apply(&config, false).await, Some(ConnectorStep::Registered));
    assert!(ask("GET", &format!("{connector}/status"), "").contains("STOPPED"));
    assert_eq!(apply(&config, false).await, Some(ConnectorStep::Kept));
    let slower = Config { heartbeat: Span::from_secs(20), ..config.clone() };
    let settings = vec!["heartbeat.interval.ms".to_owned()];
    assert_eq!(apply(&slower, false).await, Some(ConnectorStep::Updated { settings }));

    database.run("insert into payments values (2, 1.00, 'meanwhile');").await;
    let capture = Capture::start(&database, kafka.clone(), config.clone());
    streaming(&capture).await;
    database.run("insert into payments values (3, 1.00, 'now');").await;
    drained(&capture, &database).await;
    holds_what_the_source_holds(broker.reader(), &database, &config).await;
    capture.stop().await;
    cdc::remove(&database.url, &config, false).await.expect("removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_failed_and_waited_goes_on_when_the_capture_begins_again() {
    let _worker = WORKER.read().await;
    let (database, mut broker, config) = payments("failed").await;
    let (role, connector) = (database.name.clone(), format!("/connectors/{}", database.name));
    let password = stack().expect("the lane of the real servers").value("SOURCE__PASSWORD");
    on_server(&format!("create role {role} superuser login password '{password}'")).await;
    let mut url: url::Url = database.url.reveal().parse().expect("an address");
    url.set_username(&role).expect("it has a place for one");
    let source = Secret::new(url);
    let capture = Capture::start_as(&source, &database, broker.address(), config.clone());
    streaming(&capture).await;
    capture.stop().await;

    database.run("insert into payments values (1, 1.00, 'while nobody looks');").await;
    on_server(&format!("alter role {role} password 'another'")).await;
    ask("POST", &format!("{connector}/restart?includeTasks=true"), "");
    let failed = async {
        while !ask("GET", &format!("{connector}/status"), "").contains("FAILED") {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(PATIENCE, failed).await.expect("its task fails");
    let standing = cdc::standing(&database.url, &database.url, &config).await.expect("the source answers");
    let told = standing.connector.expect("a connector").shown();
    assert!(told.contains("task 0 FAILED on ") && told.contains("password authentication failed"), "{told}");

    on_server(&format!("alter role {role} password '{password}'")).await;
    let capture = Capture::start_as(&source, &database, broker.address(), config.clone());
    streaming(&capture).await;
    drained(&capture, &database).await;
    holds_what_the_source_holds(broker.reader(), &database, &config).await;
    capture.stop().await;
    cdc::remove(&source, &config, false).await.expect("removed");
    on_server(&format!("drop role {role}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connector_that_is_as_it_should_be_is_left_alone_and_what_others_change_is_put_right() {
    let _worker = WORKER.read().await;
    let (database, mut broker, config) = payments("alone").await;
    let connector = format!("/connectors/{}", database.name);
    let capture = Capture::start(&database, broker.address(), config.clone());
    streaming(&capture).await;
    capture.stop().await;

    // Behind a door that notes who asks for a change.
    let changes = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&changes);
    let host = config.connect_url.trim_start_matches("http://").to_owned();
    let port = serve(None, move |request| {
        let line = String::from_utf8_lossy(request).lines().next().unwrap_or_default().to_owned();
        if !line.starts_with("GET ") {
            noted.lock().expect("no panic").push(line);
        }
        forward(&host, request).unwrap_or_default()
    });
    let behind = Config { connect_url: format!("http://127.0.0.1:{port}"), ..config.clone() };
    let capture = Capture::start(&database, broker.address(), behind.clone());
    streaming(&capture).await;
    assert_eq!(*changes.lock().expect("no panic"), Vec::<String>::new());

    // Paused behind our back: it goes on.
    ask("PUT", &format!("{connector}/pause"), "");
    until(&capture, "resumed", |_| changes.lock().expect("no panic").iter().any(|it| it.starts_with(&format!("PUT {connector}/resume ")))).await;
    streaming(&capture).await;
    capture.stop().await;

    // One setting is another: the next start puts the settings, after it has had them validated.
    changes.lock().expect("no panic").clear();
    let answer = ask("GET", &format!("{connector}/config"), "");
    let mut settings: serde_json::Value =
        serde_json::from_str(&answer[answer.find('{').expect("a body")..=answer.rfind('}').expect("a body")]).expect("settings");
    settings["poll.interval.ms"] = "999".into();
    ask("PUT", &format!("{connector}/config"), &settings.to_string());
    let capture = Capture::start(&database, broker.address(), behind.clone());
    streaming(&capture).await;
    let put = changes.lock().expect("no panic").iter().filter(|it| it.starts_with(&format!("PUT {connector}/config "))).count();
    assert_eq!(put, 1, "{:?}", changes.lock());

    // Deleted behind our back: it is made anew and goes on where it was.
    database.run("insert into payments values (1, 1.00, 'before');").await;
    ask("DELETE", &connector, "");
    database.run("insert into payments values (2, 1.00, 'meanwhile');").await;
    drained(&capture, &database).await;
    holds_what_the_source_holds(broker.reader(), &database, &config).await;
    capture.stop().await;
    cdc::remove(&database.url, &config, false).await.expect("removed");
    assert!(ask("GET", &format!("{connector}/offsets"), "").contains(" 404 "));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_arrives_whole_though_the_worker_is_killed_in_the_middle_of_it() {
    const ROWS: i64 = 100_000;
    let _worker = WORKER.write().await;
    let (database, mut broker, config) = payments("copy").await;
    let capture = Capture::start(&database, broker.address(), config.clone());
    streaming(&capture).await;

    let mut rows = String::from("COPY payments FROM stdin;\n");
    rows.extend((1..=ROWS).map(|id| format!("{id}\t1.00\tcopied\n")));
    database.run(&(rows + "\\.\n")).await;
    // Its first rows are there, and its last are not.
    let mut arrived = 0;
    while arrived == 0 {
        arrived += broker.read_on(TOPIC).len();
    }
    kill_worker();
    until(&capture, "told", |it| it.waiting_for.as_ref().is_some_and(|it| it.contains("does not answer"))).await;
    arrived += broker.read_on(TOPIC).len();
    assert!(arrived < usize::try_from(ROWS).expect("few"), "the worker was killed too late: {arrived}");
    bring_worker_back();
    database.run("insert into payments values (0, 1.00, 'behind it');").await;
    drained(&capture, &database).await;
    holds_what_the_source_holds(broker.reader(), &database, &config).await;
    capture.stop().await;
    cdc::remove(&database.url, &config, false).await.expect("removed");
}

fn kill_worker() {
    let folder = std::env::var_os("LEDGERLINE_STACK_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".stack"), PathBuf::from);
    let started = std::fs::read_to_string(folder.join("run/connect")).expect("the worker runs");
    kill("-KILL", started.lines().next().and_then(|it| it.parse().ok()).expect("a process"));
}

fn bring_worker_back() {
    let up = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stack/up");
    let status = Command::new(up).arg("connect").stdin(Stdio::null()).stdout(Stdio::null()).status().expect("tests/stack/up runs");
    assert!(status.success(), "tests/stack/up ended with {status}");
}
