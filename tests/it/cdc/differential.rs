//! The native engine and the real Debezium on one database, whatever is done to it: what they write is equal, byte by byte.
//!
//! A seed makes tables of any types and statements on them (`generate`); both engines capture many seeds at once (`run`), and what
//! they wrote is laid side by side (`compare`). A seed on which they differ is told with the fewest statements that still do (`shrink`).
//!
//! `LEDGERLINE_TEST_SEEDS=200` takes the first 200 seeds, `LEDGERLINE_TEST_SEEDS=17,` just that one.

mod case;
mod compare;
mod dice;
mod generate;
mod run;
mod shrink;
mod types;

use std::fmt::Write as _;

use self::{case::Case, compare::Difference};

/// Seeds of one run of both engines: each is some topics, and a start of the engines takes seconds.
const BATCH: usize = 20;
const SEEDS_BY_DEFAULT: u64 = 20;
/// So many are shrunk; the others are only named.
const SHRUNK_MAX: usize = 6;

fn seeds() -> Vec<u64> {
    let asked = std::env::var("LEDGERLINE_TEST_SEEDS").unwrap_or_else(|_| SEEDS_BY_DEFAULT.to_string());
    let number = |text: &str| text.trim().parse::<u64>().expect("LEDGERLINE_TEST_SEEDS is a number, or numbers with commas");
    match asked.contains(',') {
        true => asked.split(',').filter(|it| !it.trim().is_empty()).map(number).collect(),
        false => (0..number(&asked)).collect(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_engines_write_the_same_whatever_is_done_to_a_database() {
    let (mut done, mut refused, mut events) = (0, 0, 0);
    let mut failing = Vec::new();
    for seeds in seeds().chunks(BATCH) {
        let cases: Vec<Case> = seeds.iter().map(|seed| generate::case(*seed)).collect();
        let outcome = run::both(&cases).await;
        done += outcome.done.iter().map(|it| it.0).sum::<usize>();
        refused += outcome.done.iter().map(|it| it.1).sum::<usize>();
        events += outcome.theirs.values().map(Vec::len).sum::<usize>();
        let differences = outcome.differences();
        failing.extend(cases.into_iter().enumerate().filter_map(|(place, case)| {
            let own: Vec<Difference> = differences.iter().filter(|it| it.concerns(place)).cloned().collect();
            (!own.is_empty()).then_some((case, own))
        }));
        let shared: Vec<&Difference> = differences.iter().filter(|it| (0..seeds.len()).all(|place| !it.concerns(place))).collect();
        assert!(!failing.is_empty() || shared.is_empty(), "{shared:#?}");
    }
    eprintln!("{done} statements done, {refused} refused by PostgreSQL, {events} messages");
    if !failing.is_empty() {
        panic!("{}", shown(failing).await);
    }
    assert!(done > 3 * refused && events > done / 2, "most of what was thought of is done: {done} statements, {refused} refused, {events} messages");
}

async fn shown(failing: Vec<(Case, Vec<Difference>)>) -> String {
    let seeds: Vec<String> = failing.iter().map(|(case, _)| case.seed.to_string()).collect();
    let mut text = format!("the engines differ on {} seeds: {}\n", seeds.len(), seeds.join(","));
    let shrunk = match std::env::var_os("LEDGERLINE_TEST_UNSHRUNK") {
        Some(_) => failing,
        None => shrink::all(failing.into_iter().take(SHRUNK_MAX).collect()).await,
    };
    for (case, differences) in shrunk {
        let written = write!(text, "\n== seed {}\n{}", case.seed, case.script());
        written.expect("memory");
        for Difference { topic, what } in differences {
            text += &format!("-- {topic}: {what}\n");
        }
    }
    text
}
