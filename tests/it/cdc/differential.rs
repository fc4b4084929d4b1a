//! The native engine and the real Debezium on one database, whatever is done to it: what they write is equal, byte by byte.
//!
//! A seed makes tables of any types and statements on them (`generate`); both engines capture many seeds at once (`run`), and what
//! they wrote is laid side by side (`compare`). A seed on which they differ is told with the fewest statements that still do (`shrink`).
//!
//! `LEDGERLINE_TEST_SEEDS=200` takes the first 200 seeds, `LEDGERLINE_TEST_SEEDS=17,` just that one. What else is asked for when
//! somebody looks into it: `LEDGERLINE_TEST_UNSHRUNK=1` (tell the cases as they are), `LEDGERLINE_TEST_REFUSED=1` (tell what PostgreSQL refuses).

mod case;
mod compare;
mod dice;
mod generate;
mod run;
mod shrink;
mod types;

use std::fmt::Write as _;

use self::{case::Case, compare::Difference};
use crate::house;

/// Seeds of one run of both engines: each is some topics, and a start of the engines takes seconds.
const BATCH: usize = 20;
const SEEDS_BY_DEFAULT: &str = "20";
/// So many are shrunk; the others are only named.
const SHRUNK_MAX: usize = 3;

#[tokio::test(flavor = "multi_thread")]
async fn both_engines_write_the_same_whatever_is_done_to_a_database() {
    let (mut done, mut refused, mut messages) = (0, 0, 0);
    let mut failing = Vec::new();
    for seeds in house::seeds(SEEDS_BY_DEFAULT).chunks(BATCH) {
        let cases: Vec<Case> = seeds.iter().map(|seed| generate::case(*seed)).collect();
        let run = run::each(&cases).await;
        messages += run.messages;
        for (case, it) in cases.into_iter().zip(run.done) {
            let it = it.expect("each was judged");
            done += it.statements;
            refused += it.refused;
            if !it.differences.is_empty() {
                failing.push((case, it.differences));
            }
        }
        assert!(!failing.is_empty() || run.shared.is_empty(), "{:#?}", run.shared);
    }
    eprintln!("{done} statements done, {refused} refused by PostgreSQL, {messages} messages");
    if !failing.is_empty() {
        panic!("{}", shown(failing).await);
    }
    assert!(done > 3 * refused && messages > done / 2, "most of what was thought of is done: {done} statements, {refused} refused, {messages} messages");
}

async fn shown(failing: Vec<shrink::Failing>) -> String {
    let seeds: Vec<String> = failing.iter().map(|(case, _)| case.seed.to_string()).collect();
    let mut text = format!("the engines differ on {} seeds: {}\n", seeds.len(), seeds.join(","));
    // Where Debezium's task fails, each smaller case would take a start of its own.
    let (whole, differing): (Vec<_>, Vec<_>) = failing.into_iter().partition(|(_, it)| it.iter().any(Difference::is_failure));
    let judge = async |cases: &[Case]| run::each(cases).await.done.into_iter().map(|it| it.expect("each was judged").differences).collect();
    let shrunk = match std::env::var_os("LEDGERLINE_TEST_UNSHRUNK") {
        Some(_) => differing,
        None => shrink::all(differing.into_iter().take(SHRUNK_MAX).collect(), judge).await,
    };
    for (case, differences) in shrunk.into_iter().chain(whole) {
        let written = write!(text, "\n== seed {}\n{}", case.seed, case.script());
        written.expect("memory");
        for Difference { topic, what } in differences {
            text += &format!("-- {topic}: {what}\n");
        }
    }
    text
}
