//! Blob files: bytes under a number, written once, never changed. Names never derive from keys.
//!
//! A file is written and made durable first and referred to afterwards; whatever nothing refers to is an orphan of a crash
//! and is removed at the next start. Numbers are `session << 40 | count`, so a session never meets a name of an earlier one.

use std::{
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Files of one directory: consecutive, so that one sync of one directory covers a whole group of puts.
const FILES_PER_DIR: u64 = 4096;
const COUNT_BITS: u32 = 40;

pub(super) struct Blobs {
    root: PathBuf,
    session: u64,
    count: AtomicU64,
    /// The newest directory that certainly exists.
    made: Mutex<Option<PathBuf>>,
}

/// A file nothing refers to yet. Dropped before [`Draft::keep`], it is removed.
pub(super) struct Draft {
    pub(super) id: u64,
    path: PathBuf,
    kept: bool,
}

impl Blobs {
    pub(super) fn open(root: PathBuf, session: u64) -> io::Result<Self> {
        std::fs::create_dir_all(&root)?;
        crate::embedded::sync_parent(&root)?;
        Ok(Self { root, session, count: AtomicU64::new(0), made: Mutex::new(None) })
    }

    /// A number nobody has; also for small bodies, which have no file.
    pub(super) fn next_id(&self) -> u64 {
        (self.session << COUNT_BITS) | self.count.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn path(&self, id: u64) -> PathBuf {
        self.directory(id).join(format!("{id:016x}"))
    }

    pub(super) fn directory(&self, id: u64) -> PathBuf {
        self.root.join(format!("{:013x}", id / FILES_PER_DIR))
    }

    /// Creates an empty file under a new number. Blocks.
    pub(super) fn create(&self) -> io::Result<(Draft, File)> {
        let (draft, path) = self.draft()?;
        let file = OpenOptions::new().write(true).create_new(true).open(path)?;
        Ok((draft, file))
    }

    /// The same bytes under a second number, without copying them. Blocks.
    pub(super) fn link(&self, id: u64) -> io::Result<Draft> {
        let (draft, path) = self.draft()?;
        std::fs::hard_link(self.path(id), path)?;
        Ok(draft)
    }

    pub(super) fn remove(&self, id: u64) {
        if let Err(error) = std::fs::remove_file(self.path(id)) {
            tracing::debug!(%error, "a blob that nothing refers to could not be removed; the next start tries again");
        }
    }

    /// Removes the files of earlier sessions that nothing refers to, and directories left empty. Blocks for long.
    ///
    /// Costs one look into the index per file; runs beside the service, so a start does not wait for it.
    pub(super) fn sweep(&self, index: &super::index::Index, stopped: &dyn Fn() -> bool) -> Result<u64, super::Error> {
        let mut removed = 0;
        for directory in std::fs::read_dir(&self.root).map_err(super::Error::Files)? {
            let directory = directory.map_err(super::Error::Files)?.path();
            for file in std::fs::read_dir(&directory).map_err(super::Error::Files)? {
                if stopped() {
                    return Ok(removed);
                }
                let path = file.map_err(super::Error::Files)?.path();
                let Some(id) = id_of(&path) else { continue };
                if id >> COUNT_BITS >= self.session || index.refers_to(id)? {
                    continue;
                }
                match std::fs::remove_file(&path) {
                    Ok(()) => removed += 1,
                    // Deleted by its object's last request meanwhile.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(super::Error::Files(error)),
                }
            }
            if !self.is_current(&directory) {
                // Refused by the system while a file is in it, which is all we need to know.
                let _ = std::fs::remove_dir(&directory);
            }
        }
        Ok(removed)
    }

    fn is_current(&self, directory: &Path) -> bool {
        let first_of_session = (self.session << COUNT_BITS) / FILES_PER_DIR;
        directory.file_name().and_then(|it| u64::from_str_radix(it.to_str()?, 16).ok()).is_none_or(|it| it >= first_of_session)
    }

    fn draft(&self) -> io::Result<(Draft, PathBuf)> {
        let id = self.next_id();
        let directory = self.directory(id);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.as_ref() != Some(&directory) {
            std::fs::create_dir_all(&directory)?;
            File::open(&self.root)?.sync_all()?;
            *made = Some(directory);
        }
        drop(made);
        let path = self.path(id);
        Ok((Draft { id, path: path.clone(), kept: false }, path))
    }
}

impl Draft {
    /// Something refers to the file now.
    pub(super) fn keep(mut self) {
        self.kept = true;
    }

    pub(super) fn directory(&self) -> &Path {
        self.path.parent().expect("every blob lies in a directory of the store")
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.kept {
            // What cannot be removed now is an orphan for the next start.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn id_of(path: &Path) -> Option<u64> {
    u64::from_str_radix(path.file_name()?.to_str()?, 16).ok()
}
