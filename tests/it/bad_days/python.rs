//! The first start without a Python that will do, or without a network: what was tried, and what to install.

use std::{os::unix::fs::PermissionsExt as _, path::PathBuf, process::Command};

use super::{Bank, taken_port};
use crate::binary::said_with;

/// A PATH with nothing but a `python3` that does this.
fn path_with(bank: &Bank, script: Option<&str>) -> PathBuf {
    let folder = bank.path("bin");
    std::fs::create_dir_all(&folder).expect("made");
    let python = folder.join("python3");
    match script {
        Some(script) => {
            std::fs::write(&python, format!("#!/bin/sh\n{script}\n")).expect("written");
            std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).expect("ours");
        }
        None => {
            let _ = std::fs::remove_file(python);
        }
    }
    folder
}

#[test]
fn without_a_python_that_will_do_it_says_what_it_tried_and_what_to_install() {
    let bank = Bank::new();
    // What python3 does, and what is said about it.
    let pythons: [(Option<&str>, &[&str]); 5] = [
        (None, &["found no Python on the PATH", "python3.14, python3.13"]),
        (Some("exit 127"), &["found no Python on the PATH", "bin/python3 is there and does not run"]),
        (Some("echo 3.9"), &["bin/python3 is 3.9", "3.10 to 3.14"]),
        (Some("echo 3.15"), &["bin/python3 is 3.15", "3.10 to 3.14"]),
        (Some("echo 3.12; exit 1"), &["bin/python3 is 3.12 without venv", "apt install python3.12-venv"]),
    ];
    for (script, words) in pythons {
        let mut command = bank.command(&["run", "--no-tui", "--once"]);
        command.env("PATH", path_with(&bank, script)).env("XDG_CACHE_HOME", bank.path("cache"));
        let said = said_with(&command.output().expect("the binary runs"), 3, &["python3 that does", script.unwrap_or("not exist")]);
        for word in words.iter().chain(&["apt install python3 python3-venv", "dnf install python3", "brew install python"]) {
            assert!(said.contains(word), "{word:?} is missing in: {said}");
        }
    }
    assert_eq!(bank.left_behind(), Vec::<String>::new());
}

#[test]
fn a_first_start_without_a_network_says_where_it_looked_and_what_helps() {
    let bank = Bank::new();
    let (listener, port) = taken_port();
    drop(listener);
    let offline = |command: &mut Command| {
        command.env("XDG_CACHE_HOME", bank.path("cache")).env("PIP_CONFIG_FILE", "/dev/null");
        command.env("PIP_INDEX_URL", format!("http://127.0.0.1:{port}/simple"));
        for other in ["PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
            command.env_remove(other);
        }
    };
    let mut command = bank.command(&["run", "--no-tui", "--once"]);
    offline(&mut command);
    let said = said_with(&command.output().expect("the binary runs"), 3, &["run", "without a network"]);
    for word in ["could not reach the Python package index", "Connection refused", "connect to the network once", "PIP_INDEX_URL"] {
        assert!(said.contains(word), "{word:?} is missing in: {said}");
    }
    assert_eq!(bank.left_behind(), Vec::<String>::new());
}
