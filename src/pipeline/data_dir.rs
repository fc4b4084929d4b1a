//! The data dir: one owner at a time, of one version, with the credentials made at its first start.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use crate::{
    embedded::{is_disk_full, random_hex, write_private},
    fault::{Diagnose, Fault},
    secret::Secret,
};

/// Raised when the layout of the data dir changes so that older programs must not touch it.
const VERSION: u32 = 1;

/// Unix socket addresses hold 108 bytes; a longer path gets a short one under the temporary folder.
const SOCKET_PATH_MAX: usize = 100;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("data dir {} cannot be used", path.display())]
    Unusable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("data dir {} belongs to version {found} of its layout, this program writes version {VERSION}", path.display())]
    OtherVersion { path: PathBuf, found: String },
    #[error("data dir {} is in use by process {owner}", path.display())]
    InUse { path: PathBuf, owner: String },
    #[error("{} is not a ledgerline data dir", path.display())]
    NotOurs { path: PathBuf },
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        Fault::Operator(match self {
            Self::Unusable { path, source } if is_disk_full(source) => {
                format!("free disk space below {}, or choose another folder with --data-dir", path.display())
            }
            Self::Unusable { .. } => "make it a folder that you may write, or choose another with --data-dir".to_owned(),
            Self::OtherVersion { .. } => {
                "use the program that wrote it, or choose another folder with --data-dir, or delete it with `ledgerline reset`".to_owned()
            }
            Self::InUse { .. } => "look at it with `ledgerline attach`, end that process, or choose another folder with --data-dir".to_owned(),
            Self::NotOurs { .. } => "choose an empty or a new folder with --data-dir".to_owned(),
        })
    }
}

/// The data dir while this process owns it. Dropping it gives it up.
#[derive(Debug)]
pub struct DataDir {
    root: PathBuf,
    /// Held for its lock, which the system takes back whatever way this process ends.
    _lock: File,
}

/// What clients of the embedded S3 server sign with.
#[derive(Debug, Clone)]
pub struct S3Key {
    pub id: String,
    pub secret: Secret,
}

/// What lies in it and is nobody else's to read: customers, money, letters. PostgreSQL guards its own folder.
const PRIVATE: [&str; 5] = ["kafka", "s3", "mail", "logs", "dbt"];

impl DataDir {
    /// Creates it where it is absent, and takes it. Refused where another process holds it, or another version wrote it.
    pub fn take(root: &Path) -> Result<Self, Error> {
        let this = Self::hold(root)?;
        let unusable = |source| Error::Unusable { path: root.to_owned(), source };
        match fs::read_to_string(root.join("version")) {
            Ok(found) if found.trim() == VERSION.to_string() => {}
            Ok(found) => return Err(Error::OtherVersion { path: root.to_owned(), found: found.trim().to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => fs::write(root.join("version"), VERSION.to_string()).map_err(unusable)?,
            Err(source) => return Err(unusable(source)),
        }
        for part in PRIVATE {
            let path = root.join(part);
            let made = fs::create_dir_all(&path).and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o700)));
            made.map_err(|source| Error::Unusable { path, source })?;
        }
        Ok(this)
    }

    /// Takes it whatever version wrote it: to delete it.
    pub fn hold(root: &Path) -> Result<Self, Error> {
        let unusable = |source| Error::Unusable { path: root.to_owned(), source };
        let known = root.join("version").exists();
        if !known && root.is_dir() && fs::read_dir(root).map_err(unusable)?.next().is_some() && !root.join("lock").exists() {
            return Err(Error::NotOurs { path: root.to_owned() });
        }
        // PostgreSQL may run as another user below it, so others may pass through but not look around.
        fs::DirBuilder::new().recursive(true).mode(0o711).create(root).map_err(unusable)?;
        let mut lock = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(root.join("lock")).map_err(unusable)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                // The pid is for the message only; without it the refusal stands all the same.
                let _ = lock.read_to_string(&mut owner);
                let owner = if owner.trim().is_empty() { "(unknown)".to_owned() } else { owner.trim().to_owned() };
                return Err(Error::InUse { path: root.to_owned(), owner });
            }
            Err(TryLockError::Error(source)) => return Err(unusable(source)),
        }
        lock.set_len(0).and_then(|()| lock.rewind()).and_then(|()| write!(lock, "{}", std::process::id())).and_then(|()| lock.sync_data()).map_err(unusable)?;
        Ok(Self { root: root.to_owned(), _lock: lock })
    }

    pub fn join(&self, part: &str) -> PathBuf {
        self.root.join(part)
    }

    /// The key of the embedded S3 server, made at the first start: clients have written it down.
    pub fn s3_key(&self) -> Result<S3Key, Error> {
        let path = self.join("s3-key");
        let unusable = |source| Error::Unusable { path: path.clone(), source };
        match fs::read_to_string(&path) {
            Ok(text) => {
                let (id, secret) = text.trim().split_once(':').ok_or_else(|| unusable(io::ErrorKind::InvalidData.into()))?;
                Ok(S3Key { id: id.to_owned(), secret: Secret::new(secret) })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let (id, secret) = (random_hex(10).map_err(unusable)?, random_hex(20).map_err(unusable)?);
                write_private(&path, &format!("{id}:{secret}\n")).map_err(unusable)?;
                Ok(S3Key { id, secret: Secret::new(secret) })
            }
            Err(source) => Err(unusable(source)),
        }
    }
}

/// The log of whoever owns the data dir, within it.
pub const LOG: &str = "logs/ledgerline.log";

/// Where the owner of a data dir listens for the console and single commands.
pub fn socket_path(root: &Path) -> PathBuf {
    let path = root.join("control.sock");
    if path.as_os_str().len() <= SOCKET_PATH_MAX {
        return path;
    }
    use sha2::Digest as _;
    let name = hex::encode(&sha2::Sha256::digest(root.as_os_str().as_encoded_bytes())[..8]);
    std::env::temp_dir().join(format!("ledgerline-{name}.sock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_dir_has_one_owner_and_the_second_is_told_whose_it_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().join("data");
        let first = DataDir::take(&root).expect("free");

        let refusal = DataDir::take(&root).expect_err("taken").to_string();
        assert!(refusal.ends_with(&format!("is in use by process {}", std::process::id())), "{refusal}");

        drop(first);
        DataDir::take(&root).expect("free again");
    }

    #[test]
    fn a_data_dir_of_another_version_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        drop(DataDir::take(folder.path()).expect("free"));
        fs::write(folder.path().join("version"), "99").expect("written");
        assert!(matches!(DataDir::take(folder.path()), Err(Error::OtherVersion { found, .. }) if found == "99"));
        DataDir::hold(folder.path()).expect("it can still be deleted");
    }

    #[test]
    fn customers_and_letters_are_their_owners_only() {
        let folder = tempfile::tempdir().expect("a folder");
        drop(DataDir::take(folder.path()).expect("free"));
        // As an earlier version left it.
        fs::set_permissions(folder.path().join("mail"), fs::Permissions::from_mode(0o755)).expect("opened");
        let data_dir = DataDir::take(folder.path()).expect("free");
        for part in PRIVATE {
            assert_eq!(fs::metadata(data_dir.join(part)).expect("there").permissions().mode() & 0o777, 0o700, "{part}");
        }
    }

    #[test]
    fn somebody_elses_folder_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("thesis.txt"), "years of work").expect("written");
        assert!(matches!(DataDir::take(folder.path()), Err(Error::NotOurs { .. })));
    }

    #[test]
    fn credentials_are_made_once_and_readable_by_their_owner_only() {
        let folder = tempfile::tempdir().expect("a folder");
        let data_dir = DataDir::take(folder.path()).expect("free");
        let (first, again) = (data_dir.s3_key().expect("made"), data_dir.s3_key().expect("read"));
        assert_eq!((&first.id, first.secret.reveal()), (&again.id, again.secret.reveal()));
        assert_eq!(fs::metadata(data_dir.join("s3-key")).expect("there").permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_deep_data_dir_still_has_a_socket_that_fits() {
        let deep = PathBuf::from("/").join("x".repeat(200));
        assert!(socket_path(&deep).as_os_str().len() <= SOCKET_PATH_MAX);
    }
}
