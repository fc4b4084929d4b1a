//! The embedded PostgreSQL server, killed and restarted for real.
use std::{
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use ledgerline::{
    embedded::{
        Health, Progress,
        postgres::{Config, Error, Server, remove},
        python::Venv,
    },
    secret::Secret,
};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use sqlx::{Connection as _, PgConnection};
use tempfile::TempDir;

/// A directory others may pass through, as a data dir usually is.
fn open_dir() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

async fn config(dir: &Path) -> Config {
    let venv = Venv::ensure(&Progress::silent()).await.unwrap();
    Config { bin: venv.postgres_bin().to_owned(), dir: dir.join("postgres"), ..Config::default() }
}

async fn start(dir: &Path) -> Server {
    Server::start(config(dir).await, &Progress::silent()).await.unwrap()
}

async fn connect(url: &Secret) -> Result<PgConnection, sqlx::Error> {
    PgConnection::connect(url.reveal()).await
}

async fn answer(url: &Secret, question: &'static str) -> String {
    let mut connection = connect(url).await.unwrap();
    sqlx::query_scalar(question).fetch_one(&mut connection).await.unwrap()
}

async fn execute(url: &Secret, statement: &'static str) {
    sqlx::raw_sql(statement).execute(&mut connect(url).await.unwrap()).await.unwrap();
}

/// One that has ended but was not asked for yet, by whoever inherited it, is dead.
fn alive(pid: u32) -> bool {
    let unburied = std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|it| it.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')));
    !unburied && test_kill_process(Pid::from_raw(pid.cast_signed()).unwrap()).is_ok()
}

fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn it_answers_with_a_password_and_keeps_everything_over_a_restart() {
    let dir = open_dir();
    let server = start(dir.path()).await;
    let (url, pid) = (server.url("bank"), server.pid());
    for database in ["bank", "warehouse", "ledgerline"] {
        assert_eq!(answer(&server.url(database), "select current_database()::text").await, database);
    }
    assert_eq!(answer(&url, "show wal_level").await, "logical");
    assert_eq!(answer(&url, "show fsync").await, "on");
    assert_eq!(answer(&url, "select (rolpassword like 'SCRAM-SHA-256%' and rolsuper)::text from pg_authid where rolname = current_user::text").await, "true");
    execute(&url, "create table kept as select 42 as it").await;
    assert!(connect(&Secret::new(format!("postgres://ledgerline:wrong@127.0.0.1:{}/bank", server.port()))).await.is_err());
    assert!(connect(&Secret::new(format!("postgres://ledgerline@127.0.0.1:{}/bank", server.port()))).await.is_err());
    let password = url::Url::parse(url.reveal()).unwrap().password().unwrap().to_owned();
    let arguments = Command::new("ps").args(["-eo", "args"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&arguments.stdout).contains(&password));
    let kept = std::fs::metadata(dir.path().join("postgres/password")).unwrap();
    assert_eq!(kept.permissions().mode() & 0o777, 0o600);
    assert!(matches!(Server::start(config(dir.path()).await, &Progress::silent()).await, Err(Error::InUse { .. })));

    server.stop().await;
    assert!(!alive(pid));

    let server = start(dir.path()).await;
    assert_eq!(server.url("bank"), url);
    assert_eq!(answer(&url, "select it::text from kept").await, "42");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_postmaster_comes_back_by_itself_with_what_was_committed() {
    let dir = open_dir();
    let server = start(dir.path()).await;
    let (url, mut health) = (server.url("bank"), server.health());
    execute(&url, "create table kept as select 42 as it").await;
    let mut looking_on = connect(&url).await.unwrap();
    for _ in 0..2 {
        let before = server.pid();
        health.mark_unchanged();
        kill(before);
        tokio::time::timeout(Duration::from_secs(30), async {
            health.wait_for(|it| *it != Health::Well).await.unwrap();
            health.wait_for(|it| *it == Health::Well).await.unwrap();
        })
        .await
        .unwrap();
        assert_ne!(server.pid(), before);
        assert_eq!(answer(&url, "select it::text from kept").await, "42");
    }
    assert!(looking_on.ping().await.is_err());
    server.stop().await;
}

/// The same test in two roles: as a child it serves until it is killed, and leaves an orphan.
#[tokio::test(flavor = "multi_thread")]
async fn the_orphan_of_a_killed_process_is_ended_and_its_data_taken_over() {
    const CHILD: &str = "LEDGERLINE_TEST_POSTGRES_CHILD";
    if let Some(dir) = std::env::var_os(CHILD) {
        let server = start(Path::new(&dir)).await;
        let told = Path::new(&dir).join("ready");
        std::fs::write(told.with_extension("new"), format!("{} {}", server.pid(), server.url("bank").reveal())).unwrap();
        std::fs::rename(told.with_extension("new"), told).unwrap();
        std::future::pending::<()>().await;
    }
    let dir = open_dir();
    let this = "embedded_postgres::the_orphan_of_a_killed_process_is_ended_and_its_data_taken_over";
    let child = Command::new(std::env::current_exe().unwrap()).args([this, "--exact"]).env(CHILD, dir.path()).stdout(Stdio::null()).spawn();
    let mut child = child.unwrap();
    let ready = tokio::time::timeout(Duration::from_secs(180), async {
        loop {
            match std::fs::read_to_string(dir.path().join("ready")) {
                Ok(text) => break text,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    });
    let ready = ready.await.unwrap();
    let (orphan, url) = ready.split_once(' ').unwrap();
    let (orphan, url): (u32, _) = (orphan.parse().unwrap(), Secret::new(url));
    execute(&url, "create table kept as select 42 as it").await;
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(alive(orphan), "PostgreSQL has a process group of its own");

    let server = start(dir.path()).await;

    assert!(!alive(orphan));
    assert_eq!(server.url("bank"), url);
    assert_eq!(answer(&url, "select it::text from kept").await, "42");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_start_says_why() {
    let dir = open_dir();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let fixed = Config { port, ..config(dir.path()).await };
    let error = Server::start(fixed, &Progress::silent()).await.err().unwrap();
    assert!(matches!(error, Error::Port { port: said, .. } if said == port), "{error}");

    let server = start(dir.path()).await;
    server.stop().await;
    std::fs::write(dir.path().join("postgres/cluster/PG_VERSION"), "9\n").unwrap();
    let error = Server::start(config(dir.path()).await, &Progress::silent()).await.err().unwrap();
    assert!(matches!(&error, Error::OtherMajor { found, wanted, .. } if found == "9" && wanted == "18"), "{error}");

    let error = Server::start(Config { bin: PathBuf::from("/nowhere"), ..config(dir.path()).await }, &Progress::silent()).await.err().unwrap();
    assert!(matches!(error, Error::Binaries { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_dir_nobody_can_reach_is_served_all_the_same_and_removed_whole() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let server = start(dir.path()).await;
    let cluster = PathBuf::from(answer(&server.url("bank"), "show data_directory").await);
    server.stop().await;
    // An ordinary user reaches his own directory; root's server is not root.
    let root = rustix::process::geteuid().is_root();
    assert_eq!(cluster.starts_with("/var/lib/ledgerline"), root, "{}", cluster.display());

    remove(&dir.path().join("postgres")).unwrap();

    assert!(!cluster.exists());
    assert!(!dir.path().join("postgres").exists());
}
