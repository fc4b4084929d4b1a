//! The services every test shares: one private PostgreSQL, started once per run on a free port, and the Python that has dbt.
//!
//! With `--features stack` it is the real servers' (`lane`). `LEDGERLINE_TEST_POSTGRES` names another server (a superuser on
//! PostgreSQL 15 or newer with `wal_level = logical`).

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{OnceLock, mpsc},
};

use ledgerline::{
    embedded::{
        Progress,
        postgres::{Config, Server},
        python::Venv,
    },
    secret::Secret,
};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};

struct House {
    postgres: String,
    python: PathBuf,
    /// Ends the server when this process ends, in whatever way; a static is never dropped.
    _caretaker: Option<Child>,
}

static HOUSE: OnceLock<House> = OnceLock::new();

/// The address of a superuser's database, to make databases from.
pub(crate) fn postgres() -> String {
    house().postgres.clone()
}

/// An interpreter with dbt.
pub(crate) fn python() -> PathBuf {
    house().python.clone()
}

/// The seeds of a test that takes as many as it is given: `LEDGERLINE_TEST_SEEDS=200` takes the first 200, `LEDGERLINE_TEST_SEEDS=17,4`
/// these two, and `LEDGERLINE_TEST_SEEDS=17,` just one.
pub(crate) fn seeds(by_default: &str) -> Vec<u64> {
    let asked = std::env::var("LEDGERLINE_TEST_SEEDS").unwrap_or_else(|_| by_default.to_owned());
    let number = |text: &str| text.trim().parse::<u64>().expect("LEDGERLINE_TEST_SEEDS is a number, or numbers with commas");
    match asked.contains(',') {
        true => asked.split(',').filter(|it| !it.trim().is_empty()).map(number).collect(),
        false => (0..number(&asked)).collect(),
    }
}

/// A database of one test's own, empty at first. A test that fails leaves it for a look; the server's end takes it along.
pub(crate) struct Database {
    pub(crate) name: String,
    pub(crate) url: Secret,
}

impl Database {
    /// Each test gives a name of its own; other processes may be at work on the same server.
    pub(crate) async fn create(name: &str) -> Self {
        let name = format!("{name}_{}", std::process::id());
        on_server(&format!("drop database if exists {name} with (force)")).await;
        on_server(&format!("create database {name}")).await;
        let mut url: url::Url = postgres().parse().expect("an address");
        url.set_path(&name);
        Self { name, url: Secret::new(url.as_str()) }
    }

    pub(crate) async fn connect(&self) -> PgConnection {
        PgConnection::connect(self.url.reveal()).await.expect("the test's database answers")
    }

    pub(crate) async fn drop(self) {
        on_server(&format!("drop database {} with (force)", self.name)).await;
    }
}

/// One statement, as a superuser, beside all databases of tests.
pub(crate) async fn on_server(sql: &str) {
    let mut server = PgConnection::connect(&postgres()).await.expect("a PostgreSQL to test on");
    server.execute(AssertSqlSafe(sql.to_owned())).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

fn house() -> &'static House {
    HOUSE.get_or_init(|| {
        let (opened, waits) = mpsc::channel();
        // Its own runtime: the server outlives the test that was first to ask for it.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let progress = Progress::to(|line| eprintln!("{line}"));
                let venv = Venv::ensure(&progress).await.unwrap_or_else(|error| panic!("{}", ledgerline::fault::chain(&error)));
                let python = venv.python().to_owned();
                if let Some(postgres) = std::env::var("LEDGERLINE_TEST_POSTGRES").ok().or_else(|| Some(crate::lane::stack()?.postgres())) {
                    opened.send(House { postgres, python, _caretaker: None }).expect("somebody waits");
                    return;
                }
                let dir = tempfile::Builder::new().prefix("ledgerline-tests-").tempdir().expect("a folder").keep();
                let config = Config { bin: venv.postgres_bin().to_owned(), dir: dir.clone(), databases: Vec::new(), ..Config::default() };
                let server = Server::start(config, &progress).await.unwrap_or_else(|error| panic!("{}", ledgerline::fault::chain(&error)));
                let house = House { postgres: server.url("postgres").reveal().to_owned(), python, _caretaker: Some(caretaker(server.pid(), &dir)) };
                opened.send(house).expect("somebody waits");
                std::future::pending::<()>().await;
            });
        });
        waits.recv().expect("the house opens")
    })
}

/// Waits for the end of its standard input, which is the end of this process; then ends the server and sweeps its folder.
fn caretaker(server: u32, dir: &std::path::Path) -> Child {
    const WORK: &str = r#"read _; kill -INT "$1"; for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$1" 2>/dev/null || break; sleep 0.5; done; kill -KILL "$1" 2>/dev/null; rm -rf "$2""#;
    let mut command = Command::new("sh");
    command.args(["-c", WORK, "sh", &server.to_string()]).arg(dir);
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("a shell")
}
