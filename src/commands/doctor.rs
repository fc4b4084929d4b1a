//! `doctor`: what this machine and this configuration need, each checked by trying it.

use std::{fs, path::Path};

use serde::Serialize;

use crate::{
    config::Loaded,
    embedded::python,
    pipeline::{
        data_dir::{self, DataDir},
        reach,
        services::Needs,
    },
    units::bytes_for_people,
};

/// Less free space than this and the first start may fail: the Python environment and a cluster take about 500 MB.
const FREE_BYTES_MIN: u64 = 2 << 30;

#[derive(Debug, Serialize)]
pub(super) struct Finding {
    pub name: &'static str,
    pub ok: bool,
    /// What was found, in one sentence.
    pub found: String,
    /// What to do, where it is not ok.
    pub remedy: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub schema: u32,
    pub ok: bool,
    pub findings: Vec<Finding>,
}

pub(super) async fn examine(loaded: &Loaded) -> Report {
    let data_dir = loaded.data_dir();
    let findings = vec![configuration(loaded), python_found().await, data_dir_usable(&data_dir), space(&data_dir), dbt_project(loaded), terminal()];
    let external = external_addresses(loaded).await;
    let findings: Vec<Finding> = findings.into_iter().chain(external).collect();
    Report { schema: 1, ok: findings.iter().all(|it| it.ok), findings }
}

fn configuration(loaded: &Loaded) -> Finding {
    let found = match &loaded.file {
        Some(file) => format!("{} is valid, profile {}", file.display(), loaded.config.profile),
        None => "no config.toml here: every key has its default".to_owned(),
    };
    Finding { name: "configuration", ok: true, found, remedy: None }
}

async fn python_found() -> Finding {
    match python::find().await {
        Ok(found) => Finding { name: "python", ok: true, found: format!("{} is Python 3.{}", found.python.display(), found.minor), remedy: None },
        Err(error) => failed("python", &error),
    }
}

fn failed(name: &'static str, error: &impl crate::fault::Diagnose) -> Finding {
    let remedy = match error.fault() {
        crate::fault::Fault::Operator(remedy) | crate::fault::Fault::Data(remedy) => Some(remedy),
        crate::fault::Fault::Transient | crate::fault::Fault::Bug => None,
    };
    Finding { name, ok: false, found: crate::fault::chain(error), remedy }
}

fn data_dir_usable(data_dir: &Path) -> Finding {
    let name = "data dir";
    if data_dir.exists() {
        // Only by taking it one sees whose it is and which version wrote it.
        return match DataDir::take(data_dir) {
            Ok(_) => Finding { name, ok: true, found: format!("{} can be used", data_dir.display()), remedy: None },
            Err(error @ data_dir::Error::InUse { .. }) => Finding { name, ok: true, found: error.to_string(), remedy: None },
            Err(error) => failed(name, &error),
        };
    }
    let probe = data_dir.ancestors().find(|it| it.exists()).unwrap_or(data_dir).join(".ledgerline-doctor");
    match fs::write(&probe, b"x").and_then(|()| fs::remove_file(&probe)) {
        Ok(()) => Finding { name, ok: true, found: format!("{} can be written", data_dir.display()), remedy: None },
        Err(error) => Finding {
            name,
            ok: false,
            found: format!("{} cannot be written: {error}", data_dir.display()),
            remedy: Some("choose another folder with --data-dir, or change its permissions".to_owned()),
        },
    }
}

fn space(data_dir: &Path) -> Finding {
    let name = "free space";
    let existing = data_dir.ancestors().find(|it| it.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(existing) {
        Ok(found) => {
            let free = found.f_bavail.saturating_mul(found.f_frsize);
            Finding {
                name,
                ok: free >= FREE_BYTES_MIN,
                found: format!("{} free at {}", bytes_for_people(free), existing.display()),
                remedy: (free < FREE_BYTES_MIN).then(|| format!("free some space: a pipeline wants at least {}", bytes_for_people(FREE_BYTES_MIN))),
            }
        }
        Err(error) => Finding { name, ok: false, found: format!("could not be asked: {error}"), remedy: None },
    }
}

fn dbt_project(loaded: &Loaded) -> Finding {
    let folder = loaded.dbt_project_dir();
    let ok = folder.join("dbt_project.yml").is_file();
    Finding {
        name: "dbt project",
        ok,
        found: format!("{} {}", folder.display(), if ok { "is there" } else { "holds no dbt_project.yml" }),
        remedy: (!ok).then(|| "run from the repository, or set dbt.project_dir".to_owned()),
    }
}

fn terminal() -> Finding {
    use std::io::IsTerminal as _;
    let found = if std::io::stdout().is_terminal() {
        let (columns, rows) = crossterm::terminal::size().unwrap_or_default();
        format!("{columns}×{rows}: the console fits from 80×24")
    } else {
        "none: `run` reports as lines".to_owned()
    };
    Finding { name: "terminal", ok: true, found, remedy: None }
}

async fn sign_in(loaded: &Loaded) -> Finding {
    let name = "stream.security_protocol";
    match reach::sign_in(loaded).await {
        Ok(()) => Finding { name, ok: true, found: "Kafka lets us in".to_owned(), remedy: None },
        Err(error) => failed(name, &error),
    }
}

/// Tries to connect to what is not embedded.
async fn external_addresses(loaded: &Loaded) -> Vec<Finding> {
    let mut findings = Vec::new();
    for place in reach::external(&loaded.config, Needs::ALL) {
        let tried = place.try_once().await;
        let found = format!(
            "{} at {} {}",
            place.service,
            place.address(),
            tried.as_ref().map_or_else(|why| format!("does not answer: {why}"), |()| "answers".to_owned())
        );
        findings.push(Finding { name: place.key, ok: tried.is_ok(), found, remedy: tried.is_err().then(|| format!("start it, or correct {}", place.key)) });
        if place.key == "stream.bootstrap_servers" && tried.is_ok() {
            findings.push(sign_in(loaded).await);
        }
    }
    findings
}
