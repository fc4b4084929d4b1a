//! One-machine services behind the protocols of the real ones. No room above knows they exist.
//!
//! Each takes a directory and turns it into an address: [`s3`] speaks S3, [`postgres`] runs a private PostgreSQL cluster,
//! [`python`] prepares what dbt and PostgreSQL need. All listen on loopback only and keep their state in the data dir;
//! what they have acknowledged survives kill -9. Who outgrows them puts another address into `config.toml`.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::Arc,
};

use rand::{TryRng as _, rngs::SysRng};
use tokio::sync::watch;

pub mod kafka;
pub mod postgres;
pub mod python;
pub mod s3;

/// Where a service tells, line by line, what it is preparing and how long that usually takes. Cheap to clone.
#[derive(Clone)]
pub struct Progress(Arc<dyn Fn(&str) + Send + Sync>);

impl Progress {
    /// Hands each line to `print`, which must not block: headless runs write it to stderr.
    pub fn to(print: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Arc::new(print))
    }

    /// Keeps only the newest line, for a screen that shows what is happening now.
    pub fn watched() -> (Self, watch::Receiver<String>) {
        let (newest, lines) = watch::channel(String::new());
        (
            Self::to(move |line| {
                newest.send_replace(line.to_owned());
            }),
            lines,
        )
    }

    pub fn silent() -> Self {
        Self::to(|_| ())
    }

    pub fn say(&self, line: impl AsRef<str>) {
        (self.0)(line.as_ref());
    }
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Progress")
    }
}

/// How a running service is. It mends itself where it can; the reason is for the operator.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase", tag = "state", content = "reason")]
pub enum Health {
    #[default]
    Well,
    /// It refuses some work for now and resumes by itself once the reason is gone.
    Ailing(String),
}

/// Whether the disk, or our share of it, is used up.
pub(crate) fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// `length` random bytes as hex: passwords, keys, names that must not be guessed.
pub(crate) fn random_hex(length: usize) -> io::Result<String> {
    let mut bytes = vec![0_u8; length];
    SysRng.try_fill_bytes(&mut bytes).map_err(io::Error::other)?;
    Ok(hex::encode(bytes))
}

/// Writes a file that only we may read, whole or not at all.
pub(crate) fn write_private(path: &Path, content: &str) -> io::Result<()> {
    let half = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&half)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&half, path)?;
    sync_parent(path)
}

/// Makes the name of a file as durable as its content.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// A lock on a directory, held until dropped and freed by the kernel however we end. None: somebody else holds it.
pub(crate) fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Takes the port a service listens on: the one `config.toml` fixes, else the one kept in `file`, else a free one.
///
/// A kept port that somebody else has taken meanwhile is replaced by a free one, which is kept from then on;
/// a fixed one is not: that error is the caller's to explain.
pub(crate) fn listen(fixed: u16, file: &Path) -> io::Result<(TcpListener, u16)> {
    if fixed != 0 {
        return Ok((TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, fixed)))?, fixed));
    }
    let kept = match std::fs::read_to_string(file) {
        Ok(text) => text.trim().parse().unwrap_or(0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let listener = match TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, kept))) {
        Err(error) if kept != 0 && error.kind() == io::ErrorKind::AddrInUse => {
            tracing::warn!(port = kept, "the port kept in the data dir is taken by another program, choosing another");
            TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?
        }
        other => other?,
    };
    let port = listener.local_addr()?.port();
    if port != kept {
        write_private(file, &format!("{port}\n"))?;
    }
    Ok((listener, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_kept_and_replaced_only_while_another_program_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("port");
        let (listener, first) = listen(0, &file).unwrap();

        let (_, second) = listen(0, &file).unwrap();
        assert_ne!(first, second);
        drop(listener);

        let (_listener, third) = listen(0, &file).unwrap();
        assert_eq!(second, third);
        assert_eq!(listen(third, &file).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn progress_shows_the_newest_line() {
        let (progress, lines) = Progress::watched();
        progress.say("unpacking");
        progress.clone().say("starting");
        assert_eq!(*lines.borrow(), "starting");
    }

    #[test]
    fn a_lock_has_one_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = try_lock(&path).unwrap();
        assert!(held.is_some());
        assert!(try_lock(&path).unwrap().is_none());
        drop(held);
        assert!(try_lock(&path).unwrap().is_some());
    }
}
