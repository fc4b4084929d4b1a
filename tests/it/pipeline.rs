//! The whole binary, as a user runs it: from the first payment to the last KPI, under kill -9, and asked wrongly.

use std::{collections::BTreeSet, time::Duration};

use crate::binary::{Bank, Running, proof};

#[test]
fn one_payment_goes_all_the_way_and_the_next_run_continues() {
    let bank = Bank::on_servers();
    let [first, second] = goes_all_the_way(&bank);
    // The bank opens when the slot is there: each of its rows, and each change of one, is an event of its own.
    let rows: u64 = ["customers", "accounts", "transactions", "ledger_entries"].iter().filter_map(|table| first["bank"][table].as_u64()).sum();
    let changes = first["bank"]["updates"].as_u64().zip(first["bank"]["deletes"].as_u64()).map(|(updates, deletes)| updates + 2 * deletes);
    let events: u64 = first["cdc"]["events"].as_object().expect("tables").values().filter_map(serde_json::Value::as_u64).sum();
    assert_eq!(Some(events - rows), changes, "{}", first["cdc"]);
    assert_eq!(second["cdc"]["events"]["transactions"], second["lake"]["records"]["transactions"], "{}", second["cdc"]);
}

#[cfg(feature = "stack")]
#[test]
fn one_payment_goes_all_the_way_through_debezium_and_snowflake() {
    let bank = Bank::on_the_whole_stack();
    goes_all_the_way(&bank);
    bank.succeeds(&["cdc", "remove", "--yes"]);
}

/// Two runs on one data dir, and their summaries.
fn goes_all_the_way(bank: &Bank) -> [serde_json::Value; 2] {
    let first = bank.once("150");
    assert_eq!(first["outcome"], "success");
    assert_eq!(first["reconcile"]["ok"], true, "{}", first["reconcile"]);
    assert_eq!(first["bank"]["transactions"], 150);
    assert_eq!(first["dbt"]["tests"]["fail"], 0);
    assert!(first["dbt"]["tests"]["pass"].as_u64() > Some(0));
    assert!(first["dags"].as_array().expect("runs").iter().all(|run| run["state"] == "success"), "{}", first["dags"]);
    assert_eq!(first["mails"].as_array().map(Vec::len), Some(2), "{}", first["mails"]);
    let days = first["kpis"]["transaction_amount_over_time"].as_array().map(Vec::len);
    assert!(matches!(days, Some(30 | 31)), "{days:?} days");

    let second = bank.once("50");
    assert!(second["lake"]["records"]["transactions"].as_u64() >= Some(50), "{}", second["lake"]);
    assert_eq!(second["bank"]["transactions"], 200);
    assert_eq!(second["reconcile"]["ok"], true);
    assert_eq!(bank.json(&["kpi", "--json"])["kpis"], second["kpis"], "the command reads what the run printed");
    assert_eq!(bank.left_behind(), Vec::<String>::new());
    [first, second]
}

#[test]
fn the_same_seed_makes_the_same_numbers() {
    let (one, two) = (Bank::on_servers(), Bank::on_servers());
    let (first, second) = (one.once("120"), two.once("120"));
    assert_eq!(first["kpis"], second["kpis"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_at_any_moment_loses_nothing_and_doubles_nothing() {
    let rounds: u32 = std::env::var("LEDGERLINE_TEST_KILLS").ok().and_then(|it| it.parse().ok()).unwrap_or(3);
    let bank = Bank::on_servers();
    // A different moment in each round, the same in each run of the test: from the preparation into the third DAG run.
    let moments = (0..rounds).map(|round| Duration::from_millis(1_500 + u64::from(round) * 7_919 % 11_000));
    for moment in moments {
        let mut pipeline = Running::start(&bank, &["run", "--no-tui", "--rate", "200"]);
        std::thread::sleep(moment);
        pipeline.kill_tree();
    }
    bank.succeeds(&["run", "--no-tui", "--for", "2s", "--rate", "200", "--summary", "summary.json"]);
    assert_eq!(bank.summary()["reconcile"]["ok"], true, "{}", bank.summary()["reconcile"]);
    bank.succeeds(&["reconcile"]);
    bank.succeeds(&["lake", "verify"]);
    proof(&bank).await;

    let mails: Vec<String> = std::fs::read_dir(bank.path(".ledgerline/mail"))
        .expect("mails were written")
        .flatten()
        .filter_map(|file| std::fs::read_to_string(file.path()).ok()?.lines().find(|line| line.starts_with("Message-ID:")).map(str::to_owned))
        .collect();
    assert_eq!(mails.iter().collect::<BTreeSet<_>>().len(), mails.len(), "no mail twice");
    assert_eq!(bank.left_behind(), Vec::<String>::new());
}

#[test]
fn an_order_where_nothing_runs_starts_the_engine_for_itself() {
    let bank = Bank::new();
    bank.once("40");
    let reply = bank.json(&["dag", "trigger", "MinIO_S3_to_Snowflake", "--json"]);
    let runs = bank.json(&["dag", "runs", "MinIO_S3_to_Snowflake", "--json"]);
    assert_eq!((&runs[0]["run_id"], &runs[0]["state"]), (&reply["run_id"], &"success".into()), "{runs}");
    let refused = bank.refusal(&["dag", "retry", "MinIO_S3_to_Snowflake", "load_customers"], 2);
    assert!(refused.contains("load_customers has not failed, it is success"), "{refused}");
    assert_eq!(bank.left_behind(), Vec::<String>::new());
}

#[test]
fn single_commands_find_the_services_that_somebody_else_holds() {
    let bank = Bank::new();
    let kpis = bank.once("40")["kpis"].clone();
    let mut services = Running::start(&bank, &["services", "--json"]);
    let printed: serde_json::Value = serde_json::from_str(&services.first_line()).expect("one line of JSON");
    assert_eq!(bank.json(&["services", "--json"]), printed);
    assert_eq!(bank.json(&["kpi", "--json"])["kpis"], kpis);
    bank.succeeds(&["reconcile"]);
    bank.succeeds(&["lake", "verify"]);
    let applied = bank.json(&["cdc", "apply", "--json"]);
    assert!(applied["unchanged"] == true && applied["slot_step"] == "kept", "{applied}");
    assert_eq!(bank.json(&["dlq", "list", "--json"])["held"], 0);
    assert!(bank.refusal(&["dlq", "replay", "7", "--dry-run"], 2).contains("no letter at offset 7"));
    let refused = bank.refusal(&["dag", "trigger", "MinIO_S3_to_Snowflake"], 2);
    assert!(refused.contains("scheduler is not hosted by this process"), "{refused}");
    services.end();
}

#[test]
fn a_data_dir_in_use_is_refused_with_its_owners_pid() {
    let bank = Bank::new();
    let mut services = Running::start(&bank, &["services", "--json"]);
    let printed = services.first_line();
    assert!(printed.starts_with("{\"schema\":1,"), "{printed}");
    let refused = bank.run(&["run", "--no-tui", "--once"]);
    assert_eq!(refused.status.code(), Some(3));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains(&format!("is in use by process {}", services.pid())), "{said}");
    services.end();
}
