//! PostgreSQL's programs: run as the right user, in a process group of their own, and never two on one cluster.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio_util::sync::CancellationToken;

use super::{Error, home::Home};

/// An orphan that does not end by then is killed.
const ORPHAN_GRACE: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// The log is begun anew once it is larger; what was in it is kept beside it until the next time.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// A command of this cluster's binaries, as this cluster's user.
fn program(home: &Home, name: &str) -> Command {
    let mut command = Command::new(home.bin.join(name));
    // What a user's shell says about PostgreSQL is about another one.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
        command.env_remove(name);
    }
    command.env("LC_ALL", "C").env("TZ", "UTC").current_dir("/").stdin(Stdio::null()).process_group(0);
    if let Some(user) = home.user {
        command.uid(user.uid).gid(user.gid);
    }
    command
}

/// The major version of the binaries: what `PG_VERSION` holds.
pub(super) fn major(home: &Home) -> Result<String, Error> {
    let output = program(home, "postgres").arg("--version").output().map_err(|source| Error::Binaries { bin: home.bin.clone(), source })?;
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.split_whitespace().last().and_then(|it| it.split('.').next());
    version.map(str::to_owned).ok_or_else(|| Error::Failed { what: "postgres --version", said: last_words(&output.stderr) })
}

pub(super) fn initdb(home: &Home, cluster: &Path, password_file: &Path, stop: &CancellationToken) -> Result<(), Error> {
    let mut command = program(home, "initdb");
    // The builtin locale sorts and folds the same on every machine.
    command.args(["--username", super::cluster::SUPERUSER, "--auth=scram-sha-256", "--encoding=UTF8", "--no-instructions"]);
    command.args(["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]);
    command.arg("--pwfile").arg(password_file).arg("--pgdata").arg(cluster);
    let output = output_unless(&mut command, stop).map_err(|source| Error::Binaries { bin: home.bin.clone(), source })?;
    let output = output.ok_or(Error::Stopped)?;
    if output.status.success() {
        return Ok(());
    }
    let said = last_words(&output.stderr);
    Err(if said.contains("No space left on device") { Error::DiskFull { dir: cluster.to_owned() } } else { Error::Failed { what: "initdb", said } })
}

/// Runs a program that says little to its end. None: told to stop, and its whole group is gone.
fn output_unless(command: &mut Command, stop: &CancellationToken) -> io::Result<Option<Output>> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    while child.try_wait()?.is_none() {
        if stop.is_cancelled() {
            let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    child.wait_with_output().map(Some)
}

/// Starts the server; it is not ready yet.
pub(super) fn spawn(home: &Home) -> Result<tokio::process::Child, Error> {
    let path = log(home);
    let on_log = |source| Error::Dir { dir: home.dir.clone(), source };
    let log = OpenOptions::new().create(true).append(true).open(&path).map_err(on_log)?;
    let mut command = program(home, "postgres");
    command.arg("-D").arg(&home.cluster).stdout(log.try_clone().map_err(on_log)?).stderr(log);
    tokio::process::Command::from(command).spawn().map_err(|source| Error::Binaries { bin: home.bin.clone(), source })
}

/// Begins the log anew where it has grown too long. PostgreSQL only appends to it, so it goes on at the new beginning.
pub(super) fn trim_log(home: &Home) {
    let path = log(home);
    if log_size(home) <= LOG_BYTES_MAX {
        return;
    }
    let trimmed = fs::copy(&path, path.with_extension("log.old")).and_then(|_| OpenOptions::new().write(true).open(&path)?.set_len(0));
    if let Err(error) = trimmed {
        tracing::warn!(%error, log = %path.display(), "could not begin PostgreSQL's log anew");
    }
}

pub(super) fn log(home: &Home) -> PathBuf {
    home.dir.join("postgresql.log")
}

/// What the log has got since it had `from` bytes.
pub(super) fn logged_since(home: &Home, from: u64) -> String {
    let mut text = Vec::new();
    if let Ok(mut file) = fs::File::open(log(home)) {
        // A log begun anew is shorter: read it whole.
        let from = if file.metadata().is_ok_and(|it| it.len() >= from) { from } else { 0 };
        let _ = file.seek(SeekFrom::Start(from)).and_then(|_| file.take(1 << 20).read_to_end(&mut text));
    }
    String::from_utf8_lossy(&text).into_owned()
}

pub(super) fn log_size(home: &Home) -> u64 {
    fs::metadata(log(home)).map_or(0, |it| it.len())
}

/// Ends whatever of an earlier run still holds this cluster: its postmaster, and children that outlived one. Blocks.
///
/// Immediate shutdown: the WAL has everything that was acknowledged, and nobody waits for the rest.
pub(super) fn end_strays(cluster: &Path) -> Result<usize, Error> {
    let found = strays(cluster);
    let started = Instant::now();
    let mut signal = Signal::QUIT;
    let mut left = found.clone();
    while !left.is_empty() {
        for pid in &left {
            // Gone already is as good; a process of another user is reported below.
            let _ = kill_process(*pid, signal);
        }
        while !left.is_empty() && started.elapsed() < if signal == Signal::QUIT { ORPHAN_GRACE } else { 2 * ORPHAN_GRACE } {
            std::thread::sleep(LOOK_EVERY);
            left = strays(cluster);
        }
        if !left.is_empty() && signal == Signal::KILL {
            return Err(Error::Orphan { pid: left[0].as_raw_nonzero().get(), cluster: cluster.to_owned() });
        }
        signal = Signal::KILL;
    }
    if postmaster(cluster).is_some_and(is_dead_unburied) {
        // PostgreSQL would take it for alive: its number is still in use until whoever inherited it asks for its end.
        let lock = cluster.join("postmaster.pid");
        fs::remove_file(&lock).map_err(|source| Error::Dir { dir: lock, source })?;
    }
    Ok(found.len())
}

/// A process that has ended but still has its number (a zombie). It holds no memory, no file and no port any more.
fn is_dead_unburied(pid: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    // The state stands behind the name, which may hold anything.
    status.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
}

/// Processes that work in this cluster: every process of PostgreSQL stands in its data directory.
///
/// The number in `postmaster.pid` alone proves nothing: it may be another program's by now.
pub(super) fn strays(cluster: &Path) -> Vec<Pid> {
    let Ok(cluster) = fs::canonicalize(cluster) else { return Vec::new() };
    match fs::read_dir("/proc") {
        Ok(processes) if Path::new("/proc/self/cwd").exists() => {
            let numbers = processes.flatten().filter_map(|it| it.file_name().to_str()?.parse().ok());
            numbers
                .filter(|number| fs::read_link(format!("/proc/{number}/cwd")).is_ok_and(|cwd| cwd == cluster))
                .filter_map(|it| named_postgres(it).then(|| Pid::from_raw(it)).flatten())
                .collect()
        }
        // Without /proc (macOS): the postmaster, if the system says it was started on this cluster.
        _ => postmaster(&cluster).into_iter().filter(|pid| command_line(*pid).contains(&*cluster.to_string_lossy())).collect(),
    }
}

/// Not a shell somebody left standing in the directory.
fn named_postgres(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "postgres")
}

fn postmaster(cluster: &Path) -> Option<Pid> {
    let text = fs::read_to_string(cluster.join("postmaster.pid")).ok()?;
    Pid::from_raw(text.lines().next()?.trim().parse().ok()?)
}

fn command_line(pid: Pid) -> String {
    let output = Command::new("ps").args(["-o", "command=", "-p", &pid.as_raw_nonzero().to_string()]).output();
    output.map(|it| String::from_utf8_lossy(&it.stdout).into_owned()).unwrap_or_default()
}

pub(super) fn last_words(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|it| !it.is_empty()).collect();
    lines[lines.len().saturating_sub(4)..].join("; ")
}

/// What a server that did not start means for the operator (pure).
pub(super) fn verdict(said: &str, home: &Home, port: u16) -> Error {
    if said.contains("Address already in use") {
        Error::Port { port, source: io::ErrorKind::AddrInUse.into() }
    } else if said.contains("No space left on device") {
        Error::DiskFull { dir: home.cluster.clone() }
    } else {
        Error::Failed { what: "postgres", said: last_words(said.as_bytes()) }
    }
}
