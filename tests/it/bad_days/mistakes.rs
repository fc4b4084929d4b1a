//! Asked for the impossible: what is wrong, where it stands, and what to do, with the exit code that says whose turn it is.

use std::{os::unix::fs::PermissionsExt as _, process::Stdio};

use super::{Bank, Running, taken_port};
use crate::binary::said_with;

#[test]
fn a_mistake_in_flags_or_arguments_is_told_with_its_remedy() {
    let bank = Bank::new();
    let mistakes: [(&[&str], i32, &[&str]); 13] = [
        (&["run", "--frobnicate"], 2, &["unexpected argument '--frobnicate'"]),
        (&["run", "--sed", "1"], 2, &["unexpected argument '--sed'", "'--seed'"]),
        (&["reconsile"], 2, &["unrecognized subcommand", "'reconcile'"]),
        (&["run", "--rate", "fast"], 2, &["'fast'", "--rate"]),
        (&["run", "--rate", "0"], 2, &["--rate", "bank.rate"]),
        (&["run", "--for", "10"], 2, &["--for", "30s, 2m"]),
        (&["run", "--once", "--for", "1m"], 2, &["cannot be used with"]),
        (&["dag", "runs", "nightly"], 2, &["MinIO_S3_to_Snowflake"]),
        (&["dag", "retry", "nightly", "load_accounts"], 2, &["MinIO_S3_to_Snowflake"]),
        (&["--config", "missing.toml", "kpi"], 2, &["missing.toml", "--config"]),
        (&["--profile", "moon", "kpi"], 2, &["moon", "known: "]),
        (&["attach"], 2, &["needs a terminal", "ledgerline dag runs"]),
        (&["run", "--no-tui", "--once", "--summary", "no/such/folder/s.json", "--transactions", "1"], 2, &["--summary"]),
    ];
    for (arguments, code, words) in mistakes {
        let said = bank.refusal(arguments, code);
        for word in words {
            assert!(said.contains(word), "{arguments:?}: {word:?} is missing in: {said}");
        }
    }
}

#[test]
fn a_mistake_in_the_configuration_names_its_key_its_place_and_the_nearest_known_one() {
    let bank = Bank::new();
    let files: [(&str, &[&str]); 11] = [
        ("[bank]\nsed = 1", &["config.toml", "unknown key bank.sed", "did you mean bank.seed?"]),
        ("[bnak]\nseed = 1", &["unknown key bnak", "did you mean bank"]),
        ("[bank]\nrate = \"fast\"", &["config.toml", "bank.rate cannot be \"fast\""]),
        ("[bank]\nrate = 0", &["bank.rate cannot be 0"]),
        ("[bank]\nhistory = \"30\"", &["bank.history", "is not a duration", "30d"]),
        ("startup_grace = 30", &["startup_grace cannot be 30"]),
        ("[lake]\nbytes_max = \"16 potatoes\"", &["lake.bytes_max", "64MiB"]),
        ("[embedded]\nkafka_port = 70000", &["embedded.kafka_port cannot be 70000"]),
        ("[dag.tasks.dbt_stagign]\nretries = 5", &["dag.tasks.dbt_stagign", "did you mean dag.tasks.dbt_staging?"]),
        ("[bank", &["config.toml", "is not valid TOML"]),
        ("[source]\nurl = \"postgres://bank:hunter2@db/bank\"", &["source.url carries a password", "LEDGERLINE__SOURCE__PASSWORD"]),
    ];
    for (text, words) in files {
        std::fs::write(bank.path("config.toml"), text).expect("written");
        for arguments in [&["config", "show"] as &[&str], &["run", "--no-tui", "--once"]] {
            let said = bank.refusal(arguments, 2);
            for word in words {
                assert!(said.contains(word), "{text:?}: {word:?} is missing in: {said}");
            }
            assert!(!said.contains("hunter2"), "{said}");
        }
    }
    assert!(!bank.path(".ledgerline").exists(), "nothing was begun");
}

#[test]
fn a_mistake_in_the_environment_names_its_variable() {
    let bank = Bank::new();
    let variables: [(&str, &str, &[&str]); 5] = [
        ("LEDGERLINE__BANK__RATE", "fast", &["environment variable LEDGERLINE__BANK__RATE", "bank.rate cannot be \"fast\""]),
        ("LEDGERLINE__BANK__SED", "1", &["LEDGERLINE__BANK__SED", "did you mean bank.seed?"]),
        ("LEDGERLINE__LAKE__AGE_MAX", "2", &["LEDGERLINE__LAKE__AGE_MAX", "is not a duration"]),
        ("LEDGERLINE__EMBEDDED__S3_PORT", "many", &["LEDGERLINE__EMBEDDED__S3_PORT", "embedded.s3_port"]),
        ("LEDGERLINE__DAG__TASKS__RECONSILE__RETRIES", "5", &["dag.tasks.reconsile", "did you mean dag.tasks.reconcile?"]),
    ];
    for (name, value, words) in variables {
        let output = bank.command(&["config", "show"]).env(name, value).output().expect("the binary runs");
        let said = said_with(&output, 2, &[name, value]);
        for word in words {
            assert!(said.contains(word), "{name}={value}: {word:?} is missing in: {said}");
        }
    }
    let mut right = bank.command(&["config", "show"]);
    let shown = right.env("LEDGERLINE__DAG__TASKS__RECONCILE__RETRIES", "5").stderr(Stdio::inherit()).output().expect("the binary runs");
    assert!(String::from_utf8_lossy(&shown.stdout).contains("retries = 5"), "a known task takes its number from the environment");
}

#[test]
fn a_data_dir_that_cannot_be_used_is_named_with_what_to_do() {
    let bank = Bank::new();
    std::fs::write(bank.path("file"), "").expect("written");
    let made = |name: &str, file: &str, text: &str| {
        std::fs::create_dir(bank.path(name)).expect("made");
        std::fs::write(bank.path(name).join(file), text).expect("written");
    };
    made("thesis", "thesis.txt", "years of work");
    made("future", "version", "99");
    std::fs::create_dir(bank.path("locked")).expect("made");
    std::fs::set_permissions(bank.path("locked"), std::fs::Permissions::from_mode(0o555)).expect("ours");
    let mut folders: Vec<(&str, &[&str])> = vec![
        ("/proc/nowhere", &["/proc/nowhere", "--data-dir"]),
        ("file", &["file cannot be used", "--data-dir"]),
        ("file/below", &["cannot be used", "--data-dir"]),
        ("thesis", &["is not a ledgerline data dir"]),
        ("future", &["belongs to version 99", "ledgerline reset"]),
    ];
    // Root may write anywhere.
    if !rustix::process::geteuid().is_root() {
        folders.push(("locked", &["locked cannot be used", "--data-dir"]));
    }
    for (folder, words) in folders {
        for command in [&["run", "--no-tui", "--once"] as &[&str], &["kpi"], &["services"]] {
            let arguments = [command, &["--data-dir", folder]].concat();
            let said = bank.refusal(&arguments, 2);
            for word in words {
                assert!(said.contains(word), "{arguments:?}: {word:?} is missing in: {said}");
            }
        }
    }
    assert_eq!(std::fs::read_dir(bank.path("thesis")).expect("there").count(), 1, "it was left alone");
}

#[test]
fn a_port_that_is_taken_is_named_with_its_key_and_the_start_leaves_nothing() {
    let bank = Bank::new();
    let (_listener, port) = taken_port();
    for (key, command) in [("kafka_port", &["run", "--no-tui", "--once"] as &[&str]), ("s3_port", &["lake", "list"]), ("postgres_port", &["kpi"])] {
        bank.configure(&format!("[embedded]\n{key} = {port}"));
        let said = bank.refusal(command, 3);
        for word in [&format!("port {port}"), &format!("127.0.0.1:{port}"), &format!("embedded.{key}")] {
            assert!(said.contains(word), "{word:?} is missing in: {said}");
        }
        assert_eq!(bank.left_behind(), Vec::<String>::new());
    }
}

#[test]
fn ports_are_chosen_once_and_kept() {
    let bank = Bank::new();
    let printed = || {
        let mut services = Running::start(&bank, &["services", "--json"]);
        let line = services.first_line();
        services.end();
        line
    };
    let first = printed();
    assert_eq!(first, printed(), "addresses and credentials stay");
}

#[test]
fn a_service_of_others_that_stays_away_ends_a_headless_start_by_name() {
    let bank = Bank::new();
    let (listener, port) = taken_port();
    drop(listener);
    let places: [(&str, String, &str); 5] = [
        ("SOURCE__URL", format!("postgres://bank@127.0.0.1:{port}/bank"), "the bank's database"),
        ("WAREHOUSE__URL", format!("postgres://bank@127.0.0.1:{port}/warehouse"), "the warehouse"),
        ("STATE__URL", format!("postgres://bank@127.0.0.1:{port}/ledgerline"), "the state database"),
        ("STREAM__BOOTSTRAP_SERVERS", format!("127.0.0.1:{port}"), "Kafka"),
        ("LAKE__ENDPOINT", format!("http://127.0.0.1:{port}"), "the lake's S3"),
    ];
    for (variable, address, service) in places {
        let mut command = bank.command(&["run", "--no-tui"]);
        command.env(format!("LEDGERLINE__{variable}"), &address).env("LEDGERLINE__STARTUP_GRACE", "1s");
        command.env("LEDGERLINE__LAKE__ACCESS_KEY_ID", "someone").env("LEDGERLINE__LAKE__SECRET_ACCESS_KEY", "something");
        let said = said_with(&command.output().expect("the binary runs"), 3, &[variable, &address]);
        let key = variable.to_lowercase().replace("__", ".");
        for word in [service, &format!("127.0.0.1:{port}"), "within 1s", "refused", &format!("correct {key}")] {
            assert!(said.contains(word), "{word:?} is missing in: {said}");
        }
    }
    assert_eq!(bank.left_behind(), Vec::<String>::new());
}

#[test]
fn an_address_that_is_none_is_a_mistake_of_the_configuration() {
    let bank = Bank::new();
    for (variable, address) in
        [("SOURCE__URL", "db.example.com"), ("SOURCE__URL", "mysql://db/bank"), ("LAKE__ENDPOINT", "minio"), ("STREAM__BOOTSTRAP_SERVERS", "")]
    {
        let mut command = bank.command(&["run", "--no-tui"]);
        command.env(format!("LEDGERLINE__{variable}"), address).env("LEDGERLINE__STARTUP_GRACE", "1s");
        let said = said_with(&command.output().expect("the binary runs"), 2, &[variable, address]);
        let key = variable.to_lowercase().replace("__", ".");
        assert!(said.contains(&format!("correct {key}")), "{said}");
    }
}
