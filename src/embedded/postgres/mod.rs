//! A private PostgreSQL cluster: the source, the warehouse and the state of a one-machine pipeline.
//!
//! Turns binaries and a directory into an address with a generated password, on loopback only. One task owns the postmaster:
//! it starts it, starts it again when it dies, and ends it. PostgreSQL runs in a process group of its own, so a ^C or a
//! kill -9 of ours leaves it running for a moment; the next start holds the lock of the directory, ends what still works
//! in this cluster, and goes on with everything that was committed.

mod cluster;
mod home;
mod process;

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, postgres::PgConnectOptions};
use tokio::{process::Child, sync::watch, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use self::home::Home;
use super::{Health, Progress};
use crate::{
    fault::{Backoff, Diagnose, Fault},
    secret::Secret,
    units::bytes_for_people,
};

/// For clients to be sent away and the last checkpoint to be written.
const FAST_GRACE: Duration = Duration::from_secs(20);
/// For what does without a checkpoint.
const IMMEDIATE_GRACE: Duration = Duration::from_secs(5);
const READY_EVERY: Duration = Duration::from_millis(20);
/// Whoever else listens there may accept and say nothing.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const STILL_EVERY: Duration = Duration::from_secs(10);
/// One that lived longer than this died of something new: it is started again at once.
const LIVED: Duration = Duration::from_secs(30);
const DISK_EVERY: Duration = Duration::from_secs(5);
/// Below this PostgreSQL soon finds no room for another piece of its log; somebody should know before.
const DISK_BYTES_MIN: u64 = 64 << 20;
/// For the children of a killed postmaster to notice.
const MEMORY_GRACE: Duration = Duration::from_secs(10);
/// Another program may take the port between our look and PostgreSQL's.
const PORT_TRIES: usize = 3;

/// What a server is started with. No section of `config.toml`: the control room fills it in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where `initdb` and `postgres` are.
    pub bin: PathBuf,
    /// Everything lies below it, or a note that says where.
    pub dir: PathBuf,
    /// 0 chooses a free one at the first start and keeps it.
    pub port: u16,
    /// Created when absent.
    pub databases: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self { bin: PathBuf::new(), dir: PathBuf::new(), port: 0, databases: ["bank", "warehouse", "ledgerline"].map(str::to_owned).into() }
    }
}

/// Why PostgreSQL does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not use PostgreSQL's directory {}", dir.display())]
    Dir { dir: PathBuf, source: io::Error },
    #[error("another process uses PostgreSQL's directory {}", dir.display())]
    InUse { dir: PathBuf },
    #[error("could not run PostgreSQL's binaries in {}", bin.display())]
    Binaries { bin: PathBuf, source: io::Error },
    #[error("running as root, and there is no user nobody to run PostgreSQL as")]
    NoUser,
    #[error("{} is a cluster of PostgreSQL {found}, the binaries are of {wanted}", cluster.display())]
    OtherMajor { cluster: PathBuf, found: String, wanted: String },
    #[error("{} exists and is not a PostgreSQL cluster", cluster.display())]
    NotACluster { cluster: PathBuf },
    #[error("could not read PostgreSQL's password from {}", file.display())]
    Password { file: PathBuf, source: io::Error },
    #[error("could not listen on port {port} for PostgreSQL")]
    Port { port: u16, source: io::Error },
    #[error("the disk is full below {}", dir.display())]
    DiskFull { dir: PathBuf },
    #[error("process {pid} works in {} and cannot be ended", cluster.display())]
    Orphan { pid: i32, cluster: PathBuf },
    #[error("{what} failed: {said}")]
    Failed { what: &'static str, said: String },
    #[error("could not create database {database}")]
    Database { database: String, source: sqlx::Error },
    #[error("told to stop while PostgreSQL was starting")]
    Stopped,
    #[error("could not prepare PostgreSQL: a step panicked")]
    Panicked,
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        Fault::Operator(match self {
            Self::Dir { dir, source } if super::is_disk_full(source) => format!("free disk space below {}", dir.display()),
            Self::Dir { dir, .. } => format!("make {} writable for this user, or choose another data_dir", dir.display()),
            Self::InUse { .. } => "stop the other ledgerline on this data_dir, or choose another data_dir".to_owned(),
            Self::Binaries { bin, .. } => format!("remove the Python environment that {} lies in; the next start makes a new one", bin.display()),
            Self::NoUser => "run as an ordinary user, or create the user nobody".to_owned(),
            Self::OtherMajor { .. } => "use the ledgerline version that made this data_dir, or start anew with `ledgerline reset`".to_owned(),
            Self::NotACluster { cluster } => format!("move {} away, or choose another data_dir", cluster.display()),
            Self::Password { file, .. } => format!("bring {} back, or start anew with `ledgerline reset`", file.display()),
            Self::Port { port, source } if source.kind() == io::ErrorKind::AddrInUse => {
                format!("stop the program that listens on 127.0.0.1:{port}, or choose another embedded.postgres_port")
            }
            Self::Port { port, .. } => format!("choose an embedded.postgres_port this user may listen on, instead of {port}"),
            Self::DiskFull { dir } => format!("free disk space below {}", dir.display()),
            Self::Orphan { pid, .. } => format!("end process {pid}"),
            Self::Failed { .. } => "see what it said, and postgresql.log in the data dir".to_owned(),
            Self::Database { .. } | Self::Stopped => return Fault::Transient,
            Self::Panicked => return Fault::Bug,
        })
    }
}

/// A running server. [`Server::stop`] ends it in order; dropped, it is told to end and nobody waits.
pub struct Server {
    port: u16,
    password: Secret,
    pid: watch::Receiver<u32>,
    health: watch::Receiver<Health>,
    stop: CancellationToken,
    supervising: Option<JoinHandle<()>>,
}

impl Server {
    /// Makes the cluster if there is none, ends what an earlier run left, and returns once PostgreSQL answers.
    pub async fn start(config: Config, progress: &Progress) -> Result<Self, Error> {
        Self::start_unless(config, progress, CancellationToken::new()).await
    }

    /// The same, until told to stop: then what has begun is ended before this returns, and nothing half made is left.
    /// Dropped instead, it leaves that to the next start.
    pub async fn start_unless(config: Config, progress: &Progress, stop: CancellationToken) -> Result<Self, Error> {
        let (prepare, lines, until) = (config.clone(), progress.clone(), stop.clone());
        let prepared = tokio::task::spawn_blocking(move || prepare_files(&prepare, &lines, &until)).await;
        let Prepared { lock, home, mut port, password } = prepared.map_err(|_| Error::Panicked)??;
        progress.say("starting PostgreSQL (usually 1 s; longer after a crash)");
        let (mut tries, began) = (1, Instant::now());
        let (cluster, postmaster) = loop {
            let cluster = Cluster { home: home.clone(), port, password: password.clone(), progress: progress.clone(), stop: stop.clone() };
            match cluster.launch().await {
                Ok(postmaster) => break (cluster, postmaster),
                Err(Error::Port { source, .. }) if config.port == 0 && tries < PORT_TRIES && source.kind() == io::ErrorKind::AddrInUse => {
                    tries += 1;
                    port = choose_port(&home, 0)?;
                }
                // Where the system does not tell who works in a directory, only the attempt shows that its memory is still held.
                Err(Error::Failed { said, .. }) if said.contains("shared memory block") && began.elapsed() < MEMORY_GRACE => {
                    tokio::time::sleep(READY_EVERY).await
                }
                Err(error) => return Err(error),
            }
        };
        cluster.create_databases(&config.databases).await?;
        let (pid_in, pid) = watch::channel(postmaster.pid);
        let (health_in, health) = watch::channel(Health::Well);
        let supervising = tokio::spawn(supervise(cluster, postmaster, pid_in, health_in, lock));
        Ok(Self { port, password, pid, health, stop, supervising: Some(supervising) })
    }

    /// The superuser's address of a database.
    pub fn url(&self, database: &str) -> Secret {
        Secret::new(format!("postgres://{}:{}@127.0.0.1:{}/{database}", cluster::SUPERUSER, self.password.reveal(), self.port))
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The postmaster's; another one after it died and was started again.
    pub fn pid(&self) -> u32 {
        *self.pid.borrow()
    }

    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    /// Sends clients away, waits for the last checkpoint, and returns when no process is left.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Some(supervising) = self.supervising.take() {
            // Its only failure is a panic, which is logged where it happens.
            let _ = supervising.await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Removes a cluster for good, wherever it lies, with its password and its note. It must not run. Blocks.
pub fn remove(dir: &Path) -> Result<(), Error> {
    home::remove(dir).map_err(|source| Error::Dir { dir: dir.to_owned(), source })
}

struct Prepared {
    lock: File,
    home: Home,
    port: u16,
    password: Secret,
}

fn prepare_files(config: &Config, progress: &Progress, stop: &CancellationToken) -> Result<Prepared, Error> {
    let on_dir = |source| Error::Dir { dir: config.dir.clone(), source };
    std::fs::create_dir_all(&config.dir).map_err(on_dir)?;
    let lock = super::try_lock(&config.dir.join("lock")).map_err(on_dir)?.ok_or_else(|| Error::InUse { dir: config.dir.clone() })?;
    let home = home::settle(&config.bin, &config.dir, progress)?;
    match process::end_strays(&home.cluster)? {
        0 => {}
        ended => {
            tracing::warn!(ended, "ended the PostgreSQL that an earlier run left behind");
            progress.say("ended the PostgreSQL that an earlier run left behind");
        }
    }
    cluster::ensure(&home, progress, stop)?;
    let password = cluster::password(&home)?;
    let port = choose_port(&home, config.port)?;
    Ok(Prepared { lock, home, port, password })
}

fn choose_port(home: &Home, fixed: u16) -> Result<u16, Error> {
    let on_port = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied if fixed != 0 => Error::Port { port: fixed, source },
        _ => Error::Dir { dir: home.dir.clone(), source },
    };
    let (listener, port) = super::listen(fixed, &home.dir.join("port")).map_err(on_port)?;
    drop(listener);
    cluster::configure(home, port).map_err(on_port)?;
    Ok(port)
}

/// What it takes to start a postmaster.
struct Cluster {
    home: Home,
    port: u16,
    password: Secret,
    progress: Progress,
    stop: CancellationToken,
}

/// A postmaster that is ended with this value.
struct Postmaster {
    child: Child,
    pid: u32,
    started: Instant,
}

impl Cluster {
    /// Starts a postmaster and waits until it answers, or is told to stop. Cancel-safe: dropped, it ends what it started.
    async fn launch(&self) -> Result<Postmaster, Error> {
        let logged = process::log_size(&self.home);
        let child = process::spawn(&self.home)?;
        let mut postmaster = Postmaster { pid: child.id().unwrap_or(0), child, started: Instant::now() };
        let mut told = Instant::now();
        loop {
            if self.stop.is_cancelled() {
                postmaster.end(&self.home).await;
                return Err(Error::Stopped);
            }
            // Waiting for it also notices when it gives up.
            if timeout(READY_EVERY, postmaster.child.wait()).await.is_ok() {
                let said = process::logged_since(&self.home, logged);
                return Err(match process::verdict(&said, &self.home, self.port) {
                    // On a full disk there is no room for the log line that says so.
                    Error::Failed { .. } if self.disk() != Health::Well => Error::DiskFull { dir: self.home.cluster.clone() },
                    other => other,
                });
            }
            if let Ok(Ok(connection)) = timeout(CONNECT_TIMEOUT, PgConnection::connect_with(&self.options("postgres"))).await {
                // It answered; how we part is no matter.
                let _ = connection.close().await;
                return Ok(postmaster);
            }
            if told.elapsed() > STILL_EVERY {
                told = Instant::now();
                self.progress.say(format!("PostgreSQL is still recovering, {} s so far", postmaster.started.elapsed().as_secs()));
            }
        }
    }

    fn options(&self, database: &str) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(self.port)
            .username(cluster::SUPERUSER)
            .password(self.password.reveal())
            .database(database)
    }

    async fn create_databases(&self, databases: &[String]) -> Result<(), Error> {
        let on_database = |database: &str| {
            let database = database.to_owned();
            move |source| Error::Database { database, source }
        };
        let mut connection = PgConnection::connect_with(&self.options("postgres")).await.map_err(on_database("postgres"))?;
        for database in databases {
            let exists: bool = sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
                .bind(database)
                .fetch_one(&mut connection)
                .await
                .map_err(on_database(database))?;
            if !exists {
                // A name cannot be a parameter; quoted, it cannot be anything else.
                let statement = format!("create database \"{}\"", database.replace('"', "\"\""));
                sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await.map_err(on_database(database))?;
            }
        }
        connection.close().await.map_err(on_database("postgres"))
    }

    /// Whether the disk has room, in words if not.
    fn disk(&self) -> Health {
        match super::free_bytes(&self.home.cluster) {
            Ok(free) if free < DISK_BYTES_MIN => {
                let (place, free) = (self.home.cluster.display(), bytes_for_people(free));
                Health::Ailing(format!("the disk of {place} is full ({free} free): PostgreSQL refuses writes until you free space, nothing is lost"))
            }
            _ => Health::Well,
        }
    }
}

impl Postmaster {
    /// Fast shutdown, then immediate, then none at all; afterwards no process is left.
    async fn end(mut self, home: &Home) {
        for (signal, grace) in [(Signal::INT, FAST_GRACE), (Signal::QUIT, IMMEDIATE_GRACE), (Signal::KILL, IMMEDIATE_GRACE)] {
            self.signal(signal);
            if timeout(grace, self.child.wait()).await.is_ok() {
                break;
            }
            tracing::warn!("PostgreSQL does not end in time, insisting");
        }
        let cluster = home.cluster.clone();
        let _ = tokio::task::spawn_blocking(move || process::end_strays(&cluster)).await;
    }

    fn signal(&self, signal: Signal) {
        // Once waited for it has no number, and the number may be another's.
        if let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
            let _ = kill_process(pid, signal);
        }
    }
}

impl Drop for Postmaster {
    fn drop(&mut self) {
        self.signal(Signal::QUIT);
    }
}

/// Keeps a postmaster running until told to stop, then ends it. Holds the directory's lock as long.
async fn supervise(cluster: Cluster, first: Postmaster, pid: watch::Sender<u32>, health: watch::Sender<Health>, lock: File) {
    let mut postmaster = first;
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(10));
    let mut disk = tokio::time::interval(DISK_EVERY);
    loop {
        tokio::select! { biased;
            () = cluster.stop.cancelled() => break,
            status = postmaster.child.wait() => {
                let how = status.map_or_else(|error| error.to_string(), |it| it.to_string());
                tracing::error!(how, "PostgreSQL died, starting it again");
                health.send_replace(Health::Ailing(format!("PostgreSQL died ({how}) and is being started again")));
            }
            _ = disk.tick() => {
                process::trim_log(&cluster.home);
                report(&health, cluster.disk());
                continue;
            }
        }
        if postmaster.started.elapsed() > LIVED {
            backoff.reset();
        }
        let Some(again) = cluster.stop.run_until_cancelled(revive(&cluster, &mut backoff, &health)).await else { break };
        postmaster = again;
        pid.send_replace(postmaster.pid);
        health.send_replace(Health::Well);
        tracing::info!(pid = postmaster.pid, "PostgreSQL runs again");
    }
    postmaster.end(&cluster.home).await;
    drop(lock);
}

/// How the disk is, said once each time it changes.
fn report(health: &watch::Sender<Health>, now: Health) {
    health.send_if_modified(|it| {
        match &now {
            _ if *it == now => return false,
            Health::Ailing(reason) => tracing::error!(reason, "PostgreSQL needs room"),
            Health::Well => tracing::info!("PostgreSQL has room again"),
        }
        *it = now.clone();
        true
    });
}

/// Tries until it runs.
async fn revive(cluster: &Cluster, backoff: &mut Backoff, health: &watch::Sender<Health>) -> Postmaster {
    loop {
        tokio::time::sleep(backoff.delay()).await;
        let place = cluster.home.cluster.clone();
        // Children outlive their postmaster for a moment, and hold its memory.
        let ended = tokio::task::spawn_blocking(move || process::end_strays(&place)).await;
        let error = match ended.unwrap_or(Err(Error::Panicked)) {
            Ok(_) => match cluster.launch().await {
                Ok(postmaster) => return postmaster,
                Err(error) => error,
            },
            Err(error) => error,
        };
        let reason = match error.fault() {
            Fault::Operator(remedy) => format!("{} · {remedy}", crate::fault::chain(&error)),
            _ => crate::fault::chain(&error),
        };
        tracing::error!(error = reason, "PostgreSQL could not be started again yet");
        health.send_replace(Health::Ailing(format!("PostgreSQL does not start: {reason}")));
    }
}
