//! The whole binary on a bad day: its database killed, its disk full, told to end at any moment, and asked for the impossible.

use std::{net::TcpListener, process::Command};

use crate::binary::{Bank, Running, kill, proof};

mod disk;
mod mistakes;
mod python;

/// A port of this machine that nobody else has while this value lives.
fn taken_port() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    (listener, port)
}

/// How often a running pipeline has said that it flows, and nothing worse.
fn times_flowing(pipeline: &Running) -> usize {
    let words = [": Starting · ", ": Catching up · ", ": All well · "];
    let flows = |line: &&str| words.iter().any(|it| line.contains(it)) && !line.contains(" · 0 msg/s");
    pipeline.said().lines().filter(flows).count()
}

/// Waits until it says once more that it flows.
fn until_flowing(pipeline: &mut Running) {
    let before = times_flowing(pipeline);
    pipeline.until("a word that it flows", |it| (times_flowing(it) > before).then_some(()));
}

/// The process that PostgreSQL of this bank was started as.
fn postmaster(bank: &Bank) -> Option<u32> {
    let text = std::fs::read_to_string(bank.path(".ledgerline/postgres/cluster/postmaster.pid")).ok()?;
    text.lines().next()?.trim().parse().ok()
}

/// A process that PostgreSQL has started for one of its clients, and that is none of these.
fn another_backend(pipeline: &Running, known: &[u32]) -> Option<u32> {
    let serves_a_client = |pid: &u32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).starts_with("postgres: ledgerline bank 127.0.0.1")
    };
    pipeline.tree().into_iter().filter(|it| !known.contains(it)).find(serves_a_client)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgresql_killed_under_the_pipeline_comes_back_by_itself_and_nothing_is_lost() {
    let bank = Bank::new();
    let mut pipeline = Running::start(&bank, &["run", "--no-tui", "--for", "20s", "--rate", "50", "--summary", "summary.json"]);
    let backend = pipeline.until("a client of PostgreSQL", |it| another_backend(it, &[]));
    let known = pipeline.tree();
    kill("-KILL", backend);
    pipeline.until("clients again", |it| another_backend(it, &known));

    let first = postmaster(&bank).expect("it runs");
    let known = pipeline.tree();
    kill("-KILL", first);
    pipeline.until("another PostgreSQL", |_| postmaster(&bank).filter(|it| *it != first));
    pipeline.until("clients of it", |it| another_backend(it, &known));

    pipeline.ends_with(0);
    assert_eq!(bank.summary()["reconcile"]["ok"], true, "{}", bank.summary()["reconcile"]);
    bank.succeeds(&["lake", "verify"]);
    bank.succeeds(&["reconcile"]);
    proof(&bank).await;
    assert_eq!(bank.left_behind(), Vec::<String>::new());
}

/// A package index that takes connections and never answers: what is asked of it takes as long as one likes.
fn silent_index() -> (TcpListener, String) {
    let (listener, port) = taken_port();
    (listener, format!("http://127.0.0.1:{port}/simple"))
}

#[test]
fn told_to_end_at_any_moment_it_ends_with_130_leaves_nothing_and_starts_again() {
    let bank = Bank::new();
    let (_listener, index) = silent_index();
    let preparing = |command: &mut Command| {
        command.env("XDG_CACHE_HOME", bank.path("cache")).env("PIP_INDEX_URL", &index).env("PIP_CONFIG_FILE", "/dev/null");
    };
    let run: &[&str] = &["run", "--no-tui", "--rate", "100"];
    let moments: [(&str, &[&str], &str); 9] = [
        ("-INT", run, "preparing the Python environment"),
        ("-TERM", run, "still installing the Python packages"),
        ("-INT", run, "creating the PostgreSQL cluster"),
        ("-TERM", run, "starting PostgreSQL"),
        ("-INT", run, "Starting · "),
        ("-TERM", run, "All well"),
        ("-INT", &["run", "--no-tui", "--for", "1s"], "the bank is done; draining"),
        ("-TERM", &["run", "--no-tui", "--for", "1s"], "drained; the last runs begin"),
        ("-INT", &["services"], "The services run until ^C"),
    ];
    for (signal, arguments, moment) in moments {
        let mut command = bank.command(arguments);
        if moment.contains("Python") {
            preparing(&mut command);
        }
        let mut running = Running::of(&bank, command);
        running.until_said(&[moment]);
        running.signal(signal);
        running.ends_with(130);
        assert_eq!(bank.left_behind(), Vec::<String>::new(), "after {signal} at {moment:?}");
    }
    let cache: Vec<String> = std::fs::read_dir(bank.path("cache/ledgerline")).expect("made").map(|it| it.unwrap().file_name().display().to_string()).collect();
    assert_eq!(cache, ["venv.lock"], "no half environment");
    assert_eq!(bank.once("20")["reconcile"]["ok"], true);
}

#[test]
fn a_deadline_that_passes_while_preparing_leaves_nothing_and_starts_again() {
    let bank = Bank::new();
    let (_listener, index) = silent_index();
    let mut command = bank.command(&["run", "--no-tui", "--once", "--deadline", "2s"]);
    command.env("XDG_CACHE_HOME", bank.path("cache")).env("PIP_INDEX_URL", index).env("PIP_CONFIG_FILE", "/dev/null");
    let mut running = Running::of(&bank, command);
    running.ends_with(5);
    assert!(running.said().contains("the deadline passed while preparing"), "{}", running.said());
    assert_eq!(bank.left_behind(), Vec::<String>::new());
}

#[test]
fn a_stage_alone_ends_by_itself_with_0_and_by_a_signal_with_130() {
    let bank = Bank::new();
    bank.succeeds(&["generate", "--for", "1s"]);
    let mut generator = Running::start(&bank, &["generate", "--for", "1h"]);
    generator.until_said(&["All well"]);
    generator.end();
}
