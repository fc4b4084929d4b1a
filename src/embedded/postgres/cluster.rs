//! A cluster's files: made once by `initdb`, its settings written at every start.

use std::{
    fmt::Write as _,
    fs, io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use tokio_util::sync::CancellationToken;

use super::{Error, home::Home, process};
use crate::{
    embedded::{Progress, random_hex, sync_parent, write_private},
    secret::Secret,
};

/// The superuser: a notebook may do anything.
pub(super) const SUPERUSER: &str = "ledgerline";

/// Settings and why.
const SETTINGS: [(&str, &str, &str); 19] = [
    ("listen_addresses", "'127.0.0.1'", "this machine only"),
    ("unix_socket_directories", "''", "paths of sockets are too short for some data dirs; everybody uses TCP with a password"),
    ("password_encryption", "'scram-sha-256'", "no weaker one is ever stored"),
    ("wal_level", "'logical'", "change data capture decodes the WAL"),
    ("max_wal_senders", "10", "ours, and a handful of tools that look on"),
    ("max_replication_slots", "10", "as many"),
    ("max_slot_wal_keep_size", "'4GB'", "a slot nobody reads must not fill the disk; losing it is noticed and told"),
    ("max_wal_size", "'1GB'", "fewer checkpoints while history is written"),
    ("wal_compression", "'pglz'", "half the WAL of full pages, and no library is needed"),
    ("max_connections", "100", "bank, loader, dbt, tools"),
    ("shared_buffers", "'128MB'", "one machine, and memory belongs to everyone on it"),
    ("fsync", "on", "what is committed survives"),
    ("synchronous_commit", "on", "the same"),
    ("full_page_writes", "on", "the same, when the power fails"),
    ("timezone", "'UTC'", "the bank keeps its books in UTC"),
    ("log_timezone", "'UTC'", "logs too"),
    ("log_checkpoints", "off", "not worth a line"),
    ("log_line_prefix", "'%m [%p] %d '", "when, who, where"),
    ("jit", "off", "compiling costs more than our queries take"),
];

/// Makes the cluster if there is none. Blocks for the length of `initdb`, or until told to stop.
pub(super) fn ensure(home: &Home, progress: &Progress, stop: &CancellationToken) -> Result<(), Error> {
    let on_cluster = |source| Error::Dir { dir: home.cluster.clone(), source };
    let wanted = process::major(home)?;
    match fs::read_to_string(home.cluster.join("PG_VERSION")) {
        Ok(found) if found.trim() == wanted => return Ok(()),
        Ok(found) => return Err(Error::OtherMajor { cluster: home.cluster.clone(), found: found.trim().to_owned(), wanted }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(on_cluster(error)),
    }
    if home.cluster.exists() {
        return Err(Error::NotACluster { cluster: home.cluster.clone() });
    }
    progress.say("creating the PostgreSQL cluster (once, usually 1 to 3 s)");
    // Built beside its place and renamed when complete: half a cluster is never found. Under a name of its own, since the
    // `initdb` of a start that was killed may still be writing.
    sweep(home);
    let half = home.cluster.with_extension(format!("new-{}", random_hex(4).map_err(on_cluster)?));
    fs::create_dir(&half).map_err(on_cluster)?;
    fs::set_permissions(&half, fs::Permissions::from_mode(0o700)).map_err(on_cluster)?;
    home.give(&half).map_err(on_cluster)?;
    let password = new_password(home)?;
    // Passwords in arguments are seen by every user of the machine; a file is not.
    let file = half.with_extension("pw");
    let written = write_for(home, &file, password.reveal()).map_err(on_cluster).and_then(|()| process::initdb(home, &half, &file, stop));
    fs::remove_file(&file).map_err(on_cluster)?;
    if let Err(error) = written {
        // What stays is swept by the next start.
        let _ = fs::remove_dir_all(&half);
        return Err(error);
    }
    append(&half.join("postgresql.conf"), "include 'ledgerline.conf'\n").map_err(on_cluster)?;
    fs::rename(&half, &home.cluster).and_then(|()| sync_parent(&home.cluster)).map_err(on_cluster)
}

/// Removes what starts that were killed left half made. What cannot be removed yet is somebody's for a moment longer.
fn sweep(home: &Home) {
    let beside = home.cluster.parent().and_then(|it| fs::read_dir(it).ok());
    for path in beside.into_iter().flatten().flatten().map(|it| it.path()) {
        let left = path.file_name().is_some_and(|it| it.to_string_lossy().starts_with("cluster.new-") || it == "cluster.pw");
        if left {
            let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
        }
    }
}

/// Writes the settings, which follow this program's version and the port.
pub(super) fn configure(home: &Home, port: u16) -> io::Result<()> {
    let mut text = String::from("# Written at every start.\n");
    for (name, value, why) in SETTINGS {
        let _ = writeln!(text, "{name} = {value}  # {why}");
    }
    let _ = writeln!(text, "port = {port}");
    write_for(home, &home.cluster.join("ledgerline.conf"), &text)
}

/// The superuser's password, written when the cluster was made.
pub(super) fn password(home: &Home) -> Result<Secret, Error> {
    let file = home.dir.join("password");
    let text = fs::read_to_string(&file).map_err(|source| Error::Password { file, source })?;
    Ok(Secret::new(text.trim()))
}

fn new_password(home: &Home) -> Result<Secret, Error> {
    let on_dir = |source| Error::Dir { dir: home.dir.clone(), source };
    let password = random_hex(16).map_err(on_dir)?;
    write_private(&home.dir.join("password"), &format!("{password}\n")).map_err(on_dir)?;
    Ok(Secret::new(password))
}

/// A file that only PostgreSQL's user may read.
fn write_for(home: &Home, path: &Path, text: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    io::Write::write_all(&mut file, text.as_bytes())?;
    file.sync_all()?;
    home.give(path)
}

fn append(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().append(true).open(path)?;
    io::Write::write_all(&mut file, text.as_bytes())?;
    file.sync_all()
}
