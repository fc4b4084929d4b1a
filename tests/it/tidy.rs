//! The house stays as it was drawn: which room may know which, how long a file may be, and what never stands in it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Every room may know these: what a failure means, how long things took, what a stage is, what must not print, how amounts
/// are written.
const GROUND: [&str; 5] = ["fault", "latency", "secret", "stage", "units"];

/// Room → the rooms it may know beyond the ground and itself, in the order in which data flows.
const ARROWS: [(&str, &[&str]); 27] = [
    ("fault", &[]),
    ("latency", &[]),
    ("secret", &[]),
    ("stage", &[]),
    ("units", &[]),
    ("change", &[]),
    ("bank", &["change"]),
    ("stream", &["change"]),
    ("cdc", &["change", "stream"]),
    ("lake", &["change", "stream"]),
    ("dlq", &["change", "stream", "lake"]),
    ("warehouse", &["change", "stream", "lake"]),
    ("kpi", &["change", "warehouse"]),
    ("dbt", &[]),
    ("dag", &[]),
    ("notify", &["kpi", "warehouse", "dbt"]),
    ("refresh", &["change", "lake", "warehouse", "dbt", "kpi", "dag", "notify"]),
    ("embedded", &[]),
    ("config", &["bank", "cdc", "dag", "dbt", "lake", "notify", "stream", "warehouse"]),
    ("cli", &["config"]),
    ("exit", &[]),
    ("interrupt", &[]),
    ("telemetry", &["cli"]),
    ("pipeline", &["bank", "cdc", "change", "config", "dag", "dbt", "embedded", "exit", "kpi", "lake", "notify", "refresh", "stream", "warehouse"]),
    ("headless", &["bank", "exit", "kpi", "pipeline"]),
    ("tui", &["bank", "cdc", "change", "cli", "dag", "dbt", "embedded", "kpi", "lake", "notify", "pipeline", "refresh", "warehouse"]),
    (
        "commands",
        &[
            "bank",
            "cdc",
            "change",
            "cli",
            "config",
            "dag",
            "dlq",
            "embedded",
            "exit",
            "headless",
            "interrupt",
            "kpi",
            "lake",
            "pipeline",
            "refresh",
            "telemetry",
            "tui",
            "warehouse",
        ],
    ),
];

#[test]
fn every_arrow_between_rooms_is_one_that_was_drawn() {
    let drawn: BTreeMap<&str, &[&str]> = ARROWS.into_iter().collect();
    let mut wrong = BTreeSet::new();
    for (path, text) in sources() {
        let room = room_of(&path);
        if room == "lib" || room == "main" {
            continue;
        }
        let Some(allowed) = drawn.get(room.as_str()) else { panic!("{} stands in a room that is not in the plan", path.display()) };
        for known in rooms_named(&text) {
            if known != room && !GROUND.contains(&known.as_str()) && !allowed.contains(&known.as_str()) {
                wrong.insert(format!("{room} → {known} in {}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn no_file_is_two_things() {
    /// Code and its tests beside it; a little more than a person reads in one go.
    const LINES_MAX: usize = 620;
    let long: Vec<String> = sources().filter(|(_, text)| text.lines().count() > LINES_MAX).map(|(path, _)| path.display().to_string()).collect();
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn each_room_says_what_it_is() {
    let silent: Vec<String> =
        sources().filter(|(path, text)| !path.ends_with("tests.rs") && !text.starts_with("//!")).map(|(path, _)| path.display().to_string()).collect();
    assert!(silent.is_empty(), "{silent:#?}");
}

/// Every Rust file of the crate, with its text.
fn sources() -> impl Iterator<Item = (PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("readable").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == "rs") {
                files.push(path);
            }
        }
    }
    files.into_iter().map(move |path| {
        let text = fs::read_to_string(&path).expect("readable");
        (path.strip_prefix(&root).expect("below it").to_owned(), text)
    })
}

fn room_of(path: &Path) -> String {
    let first = path.components().next().expect("not empty").as_os_str().to_string_lossy().into_owned();
    first.strip_suffix(".rs").map_or(first.clone(), str::to_owned)
}

/// The rooms named after `crate::`, alone or in braces.
fn rooms_named(text: &str) -> BTreeSet<String> {
    let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut rooms = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if let Some(list) = rest.strip_prefix('{') {
            let (mut depth, mut name) = (0, String::new());
            for letter in list.chars() {
                match letter {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => rooms.extend(first_word(&std::mem::take(&mut name))),
                    _ if depth == 0 => name.push(letter),
                    _ => {}
                }
            }
            rooms.extend(first_word(&name));
        } else {
            rooms.extend(first_word(rest));
        }
    }
    rooms
}

/// A room's name is lower case; what is not names an item of the crate's root.
fn first_word(path: &str) -> Option<String> {
    let word: String = path.trim().chars().take_while(|it| it.is_alphanumeric() || *it == '_').collect();
    word.chars().next().is_some_and(char::is_lowercase).then_some(word)
}
