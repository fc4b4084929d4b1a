//! What is read on demand: asked once, said while it is read, shown, followed while it moves.

use chrono::TimeDelta;

use crate::{
    notify::{Mail, MailState},
    pipeline::{
        command::{Command, Look, Reply},
        snapshot::Snapshot,
    },
    refresh::LOADING,
    tui::app::{App, Effect, OnTop, Purpose},
};

use super::{
    bank_day::{busy, failing, noon},
    pictures::picture,
    pressing::press,
};

fn read(look: &Look) -> Effect {
    Effect::Send(Command::Look { at: look.clone() }, Purpose::Read)
}

fn answer(app: &mut App, look: &Look, lines: &[&str], now: &Snapshot) {
    let reply = Reply { page: lines.iter().map(|it| (*it).to_owned()).collect(), ..Reply::done("said") };
    app.hear(Command::Look { at: look.clone() }, Purpose::Read, reply, now);
}

#[test]
fn messages_are_asked_for_masked_and_unmasked_by_a_key() {
    let now = busy();
    let mut app = App::new(true);
    let look = |revealed| Look::Messages { table: "accounts".into(), revealed };
    assert_eq!(press(&mut app, &now, "1 j Enter"), [read(&look(false))]);
    assert!(picture(&now, &mut app, (80, 24)).contains("reading…"));
    answer(&mut app, &look(false), &["p=0 offset 7", "  { \"op\": \"c\" }"], &now);
    let text = picture(&now, &mut app, (80, 24));
    assert!(text.contains("offset 7") && text.contains("newest messages of accounts") && text.contains("unmask customers"), "{text}");
    assert_eq!(press(&mut app, &now, "m"), [read(&look(true))]);
    // An answer to the question before does not unmask, and does not mask.
    answer(&mut app, &look(false), &["old"], &now);
    assert!(picture(&now, &mut app, (80, 24)).contains("reading…"));
    assert_eq!(press(&mut app, &now, "Esc"), []);
    assert_eq!(app.on_top, None);
}

#[test]
fn a_running_tasks_log_is_followed_until_it_is_over() {
    let mut now = busy();
    let mut run = crate::dag::RunStats::clone(&now.dag.dags[0].runs[0]);
    run.state = crate::dag::RunState::Running;
    let (run_id, over) = (run.run_id.clone(), std::sync::Arc::clone(&now.dag.dags[0].runs[0]));
    now.dag.dags[0].runs[0] = run.into();
    let look = Look::TaskLog { dag_id: LOADING.into(), run_id, task_id: "discover_files".into() };
    let mut app = App::new(true);
    assert_eq!(press(&mut app, &now, "3 Enter"), [read(&look)]);
    now.at += TimeDelta::seconds(5);
    assert_eq!(app.follow(&now), Effect::None, "one question at a time");
    let lines: Vec<String> = (0..100).map(|it| format!("line {it}.")).collect();
    answer(&mut app, &look, &lines.iter().map(String::as_str).collect::<Vec<_>>(), &now);
    assert!(picture(&now, &mut app, (80, 24)).contains("line 99."), "the end is followed");
    press(&mut app, &now, "k");
    picture(&now, &mut app, (80, 24));
    now.at += TimeDelta::seconds(5);
    assert_eq!(app.follow(&now), read(&look));
    let more: Vec<String> = (0..200).map(|it| format!("line {it}.")).collect();
    answer(&mut app, &look, &more.iter().map(String::as_str).collect::<Vec<_>>(), &now);
    let text = picture(&now, &mut app, (80, 24));
    assert!(text.contains("line 97.") && !text.contains("line 199."), "whoever scrolled up is left there\n{text}");
    now.dag.dags[0].runs[0] = over;
    now.at += TimeDelta::seconds(5);
    assert_eq!(app.follow(&now), read(&look), "the last lines come after the end");
    answer(&mut app, &look, &["the end"], &now);
    now.at += TimeDelta::seconds(5);
    assert_eq!(app.follow(&now), Effect::None);
}

#[test]
fn verifying_says_what_it_walks_and_what_it_found_even_to_whoever_left() {
    let now = busy();
    let mut app = App::new(true);
    assert_eq!(press(&mut app, &now, "2 v"), [read(&Look::Proof)]);
    let text = picture(&now, &mut app, (80, 24));
    assert!(text.contains("objects") && text.contains("reading…"), "{text}");
    press(&mut app, &now, "Esc 0");
    let reply = Reply { ok: false, text: "the proof is broken: 1 findings".into(), ..Reply::done("") };
    app.hear(Command::Look { at: Look::Proof }, Purpose::Read, reply, &now);
    assert_eq!(app.message.as_ref().map(|it| it.ok), Some(false));
    app.message = None;
    assert!(picture(&now, &mut app, (120, 36)).contains("proof broken"));
}

#[test]
fn the_chosen_object_stays_chosen_while_new_ones_land() {
    let mut now = busy();
    let mut app = App::new(true);
    press(&mut app, &now, "2 j j");
    let chosen = now.lake.newest[2].key.clone();
    let mut newer = now.lake.newest[0].clone();
    newer.key = newer.key.replace("p=0", "p=1");
    now.lake.newest.push_front(newer);
    assert_eq!(press(&mut app, &now, "Enter"), [read(&Look::CommitRecord { data: chosen })]);
}

#[test]
fn a_failed_test_reads_its_sql_and_a_good_one_needs_none() {
    let now = failing();
    let mut app = App::new(true);
    let unique_id = "ledgerline.assert_ledger_balances".to_owned();
    assert_eq!(press(&mut app, &now, "4 Enter"), [read(&Look::Sql { unique_id: unique_id.clone() })]);
    answer(&mut app, &Look::Sql { unique_id }, &["select transaction_id"], &now);
    let text = picture(&now, &mut app, (100, 30));
    for part in ["Got 3 results", "3 failing rows", "12.50", "compiled/tests/assert_ledger_balances.sql", "select transaction_id"] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    let mut app = App::new(true);
    assert_eq!(press(&mut app, &busy(), "4 Enter"), []);
    assert!(picture(&busy(), &mut app, (100, 30)).contains("success"));
}

#[test]
fn the_outbox_says_what_waits_and_why() {
    let mut now = busy();
    let letter = |state, error: Option<&str>| Mail {
        message_id: "m".into(),
        dag_id: LOADING.into(),
        run_id: "r".into(),
        subject: "loaded 26 rows".into(),
        to: vec!["operations@localhost".into()],
        state,
        recorded_at: noon(),
        sent_at: (state == MailState::Sent).then(noon),
        tries: 3,
        error: error.map(str::to_owned),
    };
    now.mail.waiting = 1;
    now.mail.away = Some("connection refused at 127.0.0.1:25".into());
    now.mail.newest = vec![letter(MailState::Waiting, Some("connection refused")), letter(MailState::Sent, None)];
    let mut app = App::new(true);
    press(&mut app, &now, ": m a i l Enter");
    assert_eq!(app.on_top, Some(OnTop::Outbox { scroll: 0 }));
    let text = picture(&now, &mut app, (80, 24));
    for part in ["1 wait", "They wait: connection refused at 127.0.0.1:25", "waits since 12:03:14, 3 tries", "sent 12:03:14"] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
}

#[test]
fn the_log_is_tuned_by_room_frozen_and_saved() {
    let now = busy();
    let mut app = App::new(true);
    assert_eq!(press(&mut app, &now, "6 Space"), []);
    assert!(app.logs.frozen_at.is_some());
    assert_eq!(press(&mut app, &now, "Space l + w"), [Effect::Hear, Effect::SaveLog]);
    assert_eq!(app.logs.frozen_at, None);
    assert_eq!(app.logs.level_of("bank"), (tui_logger::LevelFilter::Debug, true));
    let text = picture(&now, &mut app, (120, 36));
    assert!(text.contains("all info  bank debug  cdc  lake"), "{text}");
}

#[test]
fn an_attached_console_reads_the_pipelines_log_and_the_owner_has_it_already() {
    let now = busy();
    let mut app = App::new(false);
    assert_eq!(press(&mut app, &now, "6 Enter"), [read(&Look::Log)]);
    answer(&mut app, &Look::Log, &["12:03:04 INFO  lake: object put"], &now);
    assert!(picture(&now, &mut app, (80, 24)).contains("lake: object put"));
    let mut app = App::new(true);
    assert_eq!(press(&mut app, &now, "6 Enter"), []);
    assert_eq!(app.on_top, None);
}

#[test]
fn a_run_is_seen_over_time_in_the_smallest_window() {
    let now = failing();
    let mut app = App::new(true);
    press(&mut app, &now, "3");
    press(&mut app, &now, "Space");
    let text = picture(&now, &mut app, (80, 24));
    for part in ["dbt_report_email", "0.41 s", "━", "✗ failed  2 tries", "Space grid", "r retry"] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    press(&mut app, &now, "Space");
    assert!(picture(&now, &mut app, (80, 24)).contains("Space time"));
}
