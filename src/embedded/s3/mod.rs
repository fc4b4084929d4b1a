//! An S3 server in the process: the protocol by `s3s`, the store by us.
//!
//! Turns requests into blob files and rows of an index. One thread owns the writing of the index ([`commit`]); requests
//! stream bodies to files of their own, order a change, and answer once it is durable. After a crash every object that was
//! acknowledged is there whole, and nothing is half visible: bytes lie on the disk before the index names them, and the
//! index is transactional. Files nobody names are swept beside the next start.
//!
//! ```text
//! body ──► blob file, hashed, synced ──► order ──► group of orders ──► one index commit ──► answers
//! ```

mod blob;
mod body;
mod change;
mod commit;
mod convert;
mod index;
mod list;
mod multipart;
mod read;
mod service;

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::{conn::auto, graceful::GracefulShutdown},
};
use s3s::{
    auth::SimpleAuth,
    service::{S3Service, S3ServiceBuilder},
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc, watch},
};
use tokio_util::sync::CancellationToken;
use url::Url;

use self::{
    blob::Blobs,
    change::{Change, Refusal},
    commit::Base,
    index::{Broken, Index},
    service::Service,
};
use super::Health;
use crate::{
    fault::{Diagnose, Fault},
    secret::Secret,
    units::{Size, Span},
};

/// Connections served at once; more wait to be accepted.
const CONNECTIONS_MAX: usize = 512;
/// Orders waiting for the committer; more wait in their requests.
const ORDERS_MAX: usize = 1024;
/// How long requests under way may take once we are asked to stop.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// How often a store that refuses writes tries whether it can take them again.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// What a server is started with. No section of `config.toml`: the control room fills it in.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Everything lies below it; one server at a time.
    pub dir: PathBuf,
    /// 0 chooses a free one at the first start and keeps it.
    pub port: u16,
    pub access_key_id: String,
    pub secret_access_key: Secret,
    /// Created when absent.
    pub buckets: Vec<String>,
    /// What `GetBucketLocation` says.
    pub region: String,
    /// Nothing that grows is taken while the disk has less than this left, so that the index and deletes always have room.
    pub reserve: Size,
    /// Multipart uploads nobody finished for this long are dropped at start.
    pub upload_age_max: Span,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            dir: PathBuf::new(),
            port: 0,
            access_key_id: String::new(),
            secret_access_key: Secret::default(),
            buckets: vec!["lake".to_owned()],
            region: "us-east-1".to_owned(),
            reserve: Size(64 << 20),
            upload_age_max: Span::from_secs(24 * 3600),
        }
    }
}

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not use the object store's directory {}", dir.display())]
    Dir { dir: PathBuf, source: io::Error },
    #[error("could not read or remove the object store's files")]
    Files(#[source] io::Error),
    #[error("another process uses the object store in {}", dir.display())]
    InUse { dir: PathBuf },
    #[error("could not listen on port {port} for S3")]
    Port { port: u16, source: io::Error },
    #[error("could not use the object store's index")]
    Index(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the object store's index is of format {found}, which this version does not know")]
    Format { found: u64 },
    #[error("could not create bucket {bucket}: {reason}")]
    Bucket { bucket: String, reason: String },
    #[error("could not start the object store's thread")]
    Thread(#[source] io::Error),
}

impl From<Broken> for Error {
    fn from(error: Broken) -> Self {
        match error {
            Broken::Format { found } => Self::Format { found },
            other => Self::Index(Box::new(other)),
        }
    }
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::Dir { source, .. } | Self::Files(source) if super::is_disk_full(source) => {
                Fault::Operator("free disk space, or point data_dir to a disk that has some".to_owned())
            }
            Self::Dir { dir, .. } => Fault::Operator(format!("make {} writable for this user, or choose another data_dir", dir.display())),
            Self::InUse { .. } => Fault::Operator("stop the other ledgerline on this data_dir, or choose another data_dir".to_owned()),
            Self::Port { port, source } if source.kind() == io::ErrorKind::AddrInUse => {
                Fault::Operator(format!("stop the program that listens on 127.0.0.1:{port}, or choose another embedded.s3_port"))
            }
            Self::Port { port, .. } => Fault::Operator(format!("choose an embedded.s3_port this user may listen on, instead of {port}")),
            Self::Index(_) | Self::Files(_) => {
                Fault::Operator("the store's files are damaged or unreadable: check the disk, or start anew with `ledgerline reset`".to_owned())
            }
            Self::Format { .. } => Fault::Operator("use the ledgerline version that wrote this data_dir, or start anew with `ledgerline reset`".to_owned()),
            Self::Bucket { .. } => Fault::Operator("see the reason; free disk space if the disk is full".to_owned()),
            Self::Thread(_) => Fault::Transient,
        }
    }
}

/// A running server. [`Server::stop`] ends it in order; dropped, it ends at once (which loses nothing acknowledged).
pub struct Server {
    port: u16,
    health: watch::Receiver<Health>,
    stop: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
    /// None once it is being waited for.
    committing: Option<JoinHandle<()>>,
}

impl Server {
    pub async fn start(config: Config) -> Result<Self, Error> {
        let (lock, listener, port, base) = {
            let config = config.clone();
            // A task that panics here has found a bug in us or in redb; there is nothing to start then.
            tokio::task::spawn_blocking(move || open(&config)).await.expect("opening the store does not panic")?
        };
        let listener = TcpListener::from_std(listener).map_err(|source| Error::Port { port, source })?;
        let health = base.health.subscribe();
        let (orders, waiting) = mpsc::channel(ORDERS_MAX);
        let committing = std::thread::Builder::new()
            .name("s3-commit".to_owned())
            .spawn({
                let base = Arc::clone(&base);
                move || {
                    commit::run(&base, waiting);
                    // The last who may write gives the directory free.
                    drop((base, lock));
                }
            })
            .map_err(Error::Thread)?;
        let service = Service { base, orders, region: config.region.clone() };
        prepare(&service, &config).await?;

        let stop = CancellationToken::new();
        tokio::spawn(mend(service.clone(), stop.clone()));
        sweep(&service, stop.clone());
        let mut builder = S3ServiceBuilder::new(service);
        builder.set_auth(SimpleAuth::from_single(config.access_key_id, config.secret_access_key.reveal()));
        let serving = tokio::spawn(serve(listener, builder.build(), stop.clone()));
        Ok(Self { port, health, stop, serving, committing: Some(committing) })
    }

    pub fn endpoint(&self) -> Url {
        Url::parse(&format!("http://127.0.0.1:{}", self.port)).expect("a loopback address with a port is a URL")
    }

    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    /// Lets requests under way finish, then releases the port and the directory.
    pub async fn stop(mut self) {
        self.stop.cancel();
        // Its only failure is a panic, which is logged where it happens; the port is free either way.
        let _ = (&mut self.serving).await;
        if let Some(committing) = self.committing.take() {
            let _ = tokio::task::spawn_blocking(move || committing.join()).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// The credentials of the store in `dir`: generated at the first call, kept in a file only we may read. Blocks.
pub fn credentials(dir: &Path) -> Result<(String, Secret), Error> {
    let on_dir = |source| Error::Dir { dir: dir.to_owned(), source };
    let file = dir.join("credentials");
    match std::fs::read_to_string(&file) {
        Ok(text) => {
            let (id, key) = text.trim().split_once(':').ok_or_else(|| on_dir(io::Error::other("the file credentials is damaged")))?;
            Ok((id.to_owned(), Secret::new(key)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let (id, key) = (super::random_hex(10).map_err(on_dir)?.to_uppercase(), super::random_hex(20).map_err(on_dir)?);
            std::fs::create_dir_all(dir).map_err(on_dir)?;
            super::write_private(&file, &format!("{id}:{key}\n")).map_err(on_dir)?;
            Ok((id, Secret::new(key)))
        }
        Err(error) => Err(on_dir(error)),
    }
}

/// Opens everything that blocks.
fn open(config: &Config) -> Result<(File, std::net::TcpListener, u16, Arc<Base>), Error> {
    let dir = &config.dir;
    let on_dir = |source| Error::Dir { dir: dir.clone(), source };
    std::fs::create_dir_all(dir).map_err(on_dir)?;
    let lock = super::try_lock(&dir.join("lock")).map_err(on_dir)?.ok_or_else(|| Error::InUse { dir: dir.clone() })?;
    let (listener, port) = super::listen(config.port, &dir.join("port")).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied if config.port != 0 => Error::Port { port: config.port, source },
        _ => on_dir(source),
    })?;
    listener.set_nonblocking(true).map_err(|source| Error::Port { port, source })?;
    let (index, session) = Index::open(&dir.join("index.redb"))?;
    let blobs = Blobs::open(dir.join("blobs"), session).map_err(on_dir)?;
    let (health, _) = watch::channel(Health::Well);
    let base = Base { dir: dir.clone(), index, blobs, health, reserve_bytes: config.reserve.0 };
    Ok((lock, listener, port, Arc::new(base)))
}

/// Buckets there must be, and uploads there must no longer be.
async fn prepare(service: &Service, config: &Config) -> Result<(), Error> {
    let now_ms = convert::now_ms();
    for bucket in &config.buckets {
        match service.order(Change::CreateBucket { bucket: bucket.clone(), now_ms }).await {
            Ok(_) | Err(Refusal::BucketExists) => {}
            // A full disk must not keep anyone from reading what is there.
            Err(Refusal::Full) if service.base.index.has_bucket(bucket)? => {}
            Err(refusal) => return Err(Error::Bucket { bucket: bucket.clone(), reason: format!("{refusal:?}") }),
        }
    }
    let oldest_ms = now_ms.saturating_sub(i64::try_from(config.upload_age_max.as_millis()).unwrap_or(i64::MAX));
    for (id, upload) in service.base.index.uploads()? {
        if upload.started_ms < oldest_ms {
            let _ = service.order(Change::AbortUpload { id }).await;
        }
    }
    Ok(())
}

/// Tries to write again while the store refuses to, so that it resumes without being asked.
async fn mend(service: Service, stop: CancellationToken) {
    let mut health = service.base.health.subscribe();
    let work = async {
        while health.wait_for(|it| *it != Health::Well).await.is_ok() {
            tokio::time::sleep(PROBE_EVERY).await;
            let _ = service.order(Change::Probe).await;
        }
    };
    stop.run_until_cancelled(work).await;
}

/// Removes orphans of earlier sessions, beside the service.
fn sweep(service: &Service, stop: CancellationToken) {
    let base = Arc::clone(&service.base);
    tokio::task::spawn_blocking(move || match base.blobs.sweep(&base.index, &|| stop.is_cancelled()) {
        Ok(0) => {}
        Ok(removed) => tracing::info!(removed, "removed files that a crash left behind"),
        Err(error) => tracing::warn!(error = %crate::fault::chain(&error), "could not look for files that a crash left behind"),
    });
}

/// Accepts until stopped, then lets connections finish what they are at.
async fn serve(listener: TcpListener, service: S3Service, stop: CancellationToken) {
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http1().keep_alive(true);
    let graceful = GracefulShutdown::new();
    let abort = CancellationToken::new();
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! { biased;
            () = stop.cancelled() => break,
            accepted = async {
                let permit = Arc::clone(&room).acquire_owned().await;
                (permit, listener.accept().await)
            } => accepted,
        };
        let (Ok(permit), Ok((stream, _))) = accepted else {
            // Out of file descriptors, most likely: connections that end give some back.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        // Only costs latency where it fails.
        let _ = stream.set_nodelay(true);
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service.clone()).into_owned());
        let abort = abort.clone();
        tokio::spawn(async move {
            if let Some(Err(error)) = abort.run_until_cancelled(connection).await {
                tracing::debug!(error, "a connection to the object store ended badly");
            }
            drop(permit);
        });
    }
    drop(listener);
    if tokio::time::timeout(STOP_GRACE, graceful.shutdown()).await.is_err() {
        tracing::warn!("requests to the object store took longer than the time they had to finish");
    }
    abort.cancel();
}
