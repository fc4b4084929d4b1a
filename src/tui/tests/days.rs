//! The days an operator meets: what the first line says, and that every number stands whole at every size.

use std::sync::Arc;

use chrono::TimeDelta;

use crate::{
    bank, cdc,
    dag::{RunState, RunStats, TaskState},
    dbt::TestCounts,
    pipeline::{
        command::StageName,
        snapshot::Snapshot,
        supervise::Health,
        verdict::{Ending, Level, verdict},
    },
    refresh::{Earlier, EarlierDbt},
    stage::Phase,
    tui::{
        app::App,
        keys::{Action, Pane},
    },
    warehouse::Cut,
};

use super::{
    bank_day::{busy, empty, failing, judged, noon, paused, service_away, stage, stale, task_failed},
    pictures::{on_screen, picture},
};

fn days() -> [(&'static str, Snapshot, &'static str); 6] {
    [
        ("well", busy(), "✓ All well · 157 msg/s · KPIs as of 12:03:04, 9 s old · books balance"),
        ("failed", task_failed(), "✗ dbt_test_staging failed 2 s ago: assert_ledger_balances, 3 rows"),
        ("away", service_away(), "▲ lake waits for 40 s: connection refused at 127.0.0.1:9000 · 7 records wait"),
        ("paused", paused(), "‖ Bank paused by you 3 min ago · p resumes bank"),
        ("stale", stale(), "▲ cdc has said nothing for 9 s"),
        ("first", empty(), "‖ Starting · 0 msg/s · no KPIs yet, the next dbt run makes them"),
    ]
}

/// No number ends in `…`, and what the bank counts stands there with all its digits.
fn assert_whole(text: &str, now: &Snapshot, what: &str) {
    let cut = text.lines().find(|line| {
        let letters: Vec<char> = line.chars().collect();
        letters.windows(2).any(|it| it[1] == '…' && (it[0].is_ascii_digit() || it[0] == ','))
    });
    assert!(cut.is_none(), "{what}: {cut:?} in\n{text}");
    for (name, flow) in &now.flow {
        let whole = crate::units::grouped(flow.total);
        assert!(text.contains(&whole), "{what}: {name} {whole} in\n{text}");
    }
}

#[test]
fn each_day_says_its_truth_first_and_cuts_no_number() {
    for (name, now, said) in days() {
        for size in [(80, 24), (120, 36)] {
            let text = picture(&now, &mut App::new(true), size);
            let second = text.lines().nth(1).unwrap_or_default().to_owned() + text.lines().nth(2).unwrap_or_default();
            let first_words = said.chars().take(60).collect::<String>();
            assert!(second.trim_start().starts_with(first_words.trim_end()), "{name} {size:?}: {second:?}");
            if size.0 == 120 {
                assert!(second.contains(said), "{name}: {second:?}");
            }
            assert_eq!(text.contains("All well"), name == "well", "{name} {size:?}");
            assert_whole(&text, &now, &format!("{name} {size:?}"));
        }
    }
}

#[test]
fn no_size_cuts_a_number() {
    let now = busy();
    for width in (60..=210).step_by(3) {
        for height in [15, 18, 21, 24, 30, 36, 50, 60] {
            let text = picture(&now, &mut App::new(true), (width, height));
            assert_whole(&text, &now, &format!("{width}x{height}"));
        }
    }
}

#[test]
fn no_size_and_no_screen_breaks_the_drawing() {
    for now in [empty(), failing()] {
        for pane in Pane::ALL.into_iter().filter(|it| *it != Pane::Log) {
            for size in [(1, 1), (20, 5), (40, 10), (60, 15), (61, 16), (80, 15), (80, 24), (109, 20), (240, 70)] {
                picture(&now, &mut on_screen(pane, &now), size);
            }
        }
    }
}

#[test]
fn of_two_that_are_equally_bad_the_cause_is_said() {
    let mut now = failing();
    stage(&mut now, StageName::Cdc, |it| {
        it.health = Health::Held { reason: "the slot is lost".into(), remedy: "ledgerline cdc remove".into(), since: noon() };
    });
    assert_eq!(verdict(&now).text, "cdc stopped: the slot is lost · ledgerline cdc remove");
    let text = picture(&judged(now), &mut on_screen(Pane::Stream, &failing()), (120, 36));
    assert!(text.contains("nobody reads the slot") && !text.contains("slot active"), "what was seen before it stopped is not shown as seen now: {text}");
    // What waits for a service explains why something else is late.
    let mut now = service_away();
    now.cdc.lag_bytes = 1 << 40;
    assert!(verdict(&now).text.contains("connection refused"), "{}", verdict(&now).text);
}

#[test]
fn a_slot_that_will_be_lost_within_the_hour_is_told_with_the_time_left() {
    let mut now = busy();
    let slot = |now: &mut Snapshot, seconds| now.cdc.slot.as_mut().unwrap().seconds_left = Some(seconds);
    slot(&mut now, 4_000);
    assert_eq!(verdict(&now).level, Level::Well);
    slot(&mut now, 840);
    assert_eq!(verdict(&now).level, Level::Failed);
    assert!(said(&now).starts_with("the replication slot is lost in 14 min"), "{}", said(&now));
    now.cdc.slot.as_mut().unwrap().safe_wal_bytes = Some(64 << 20);
    let text = picture(&judged(now), &mut on_screen(Pane::Stream, &busy()), (120, 36));
    assert!(text.contains("slot in danger") && text.contains("safe for 64") && text.contains("14 min"), "{text}");
}

#[test]
fn a_capture_that_waits_for_its_source_or_a_clock_says_so() {
    let mut now = busy();
    (now.cdc.step, now.cdc.waiting_for) = (cdc::Step::Connecting, Some("the source is a standby, which only follows another server".into()));
    assert_eq!((verdict(&now).level, said(&now).as_str()), (Level::Late, "cdc waits: the source is a standby, which only follows another server"));
    // What it says while it streams is over.
    now.cdc.step = cdc::Step::Streaming;
    assert_eq!(verdict(&now).level, Level::Well);
}

#[test]
fn rows_from_before_are_told_with_their_share_and_the_time_left() {
    let mut now = busy();
    let progress =
        cdc::SnapshotProgress { tables: 5, tables_done: 1, rows: 1_200_000, rows_estimated: 5_000_000, seconds_left: Some(190), ..Default::default() };
    (now.cdc.snapshot, now.cdc.step) = (Some(progress), cdc::Step::Snapshot);
    assert_eq!(verdict(&now).text, "cdc reads what the source holds: table 2 of 5, 1,200,000 of about 5,000,000 rows, 24 %, 3 min left");
    now.cdc.snapshot.as_mut().unwrap().reading = vec!["public.accounts".into(), "public.payments".into()];
    assert_eq!(
        verdict(&now).text,
        "cdc reads what the source holds: public.accounts and 1 more at once, 1 of 5 tables done, 1,200,000 of about 5,000,000 rows, 24 %, 3 min left"
    );
    now.cdc.step = cdc::Step::Streaming;
    assert_eq!(verdict(&now).level, Level::Well);
    now.cdc.incremental_snapshot = Some(cdc::IncrementalSnapshot { table: "public.accounts".into(), rows: 512, ..Default::default() });
    assert_eq!(verdict(&now).text, "cdc reads public.accounts again: 512 rows");
}

#[test]
fn kpis_stand_still_only_while_money_moves_and_we_run() {
    let mut now = busy();
    let cut = |now: &mut Snapshot, ago: i64| {
        let committed_at = noon() - TimeDelta::seconds(ago);
        now.refresh.kpis.as_mut().unwrap().reading.cut.as_mut().unwrap().committed_at = committed_at;
    };
    cut(&mut now, 500);
    assert_eq!(verdict(&now).level, Level::Late);
    assert!(verdict(&now).text.starts_with("KPIs stand still"), "{}", verdict(&now).text);
    // We were away, or the bank was held: the time between is nobody's delay.
    now.flowing_since = Some(noon() - TimeDelta::seconds(20));
    assert_eq!(verdict(&now).level, Level::Note);
    now.flowing_since = None;
    assert_eq!(verdict(&now).level, Level::Well);
}

#[test]
fn an_idle_mail_stage_is_not_stale_before_its_time() {
    let mut now = busy();
    stage(&mut now, StageName::Mail, |it| it.reported_at = noon() - TimeDelta::seconds(9));
    assert_eq!(verdict(&now).level, Level::Well);
    stage(&mut now, StageName::Mail, |it| it.reported_at = noon() - TimeDelta::seconds(31));
    assert_eq!(verdict(&now).text, "mail has said nothing for 31 s");
}

#[test]
fn what_is_wished_is_not_said_as_done() {
    let mut now = busy();
    stage(&mut now, StageName::Bank, |it| it.wanted = Phase::Paused);
    assert_eq!(verdict(&now).text, "Bank pausing…");
    stage(&mut now, StageName::Bank, |it| (it.wanted, it.phase) = (Phase::Running, Phase::Paused));
    assert_eq!(verdict(&now).text, "Bank resuming…");
    let now = judged(now);
    assert!(picture(&now, &mut App::new(true), (80, 24)).contains("bank resuming…"));
}

fn said(now: &Snapshot) -> String {
    verdict(now).text
}

/// The newest run of dbt's DAG, changed.
fn newest_run(now: &mut Snapshot, change: impl FnOnce(&mut RunStats)) {
    let run = Arc::make_mut(&mut now.dag.dags[1].runs[0]);
    change(run);
}

#[test]
fn what_was_there_before_the_start_is_neither_denied_nor_well() {
    let mut now = busy();
    let kpis = now.refresh.kpis.take();
    now.refresh.earlier = None;
    assert_eq!(said(&now), "Starting · 157 msg/s · KPIs not read yet");
    for pane in [Pane::Kpis, Pane::Dbt] {
        now.refresh.dbt.nodes.clear();
        let text = picture(&now, &mut on_screen(pane, &now), (120, 36));
        assert!(text.contains("Not read yet"), "{text}");
    }
    let mut kpis = kpis.unwrap();
    kpis.reading.cut = kpis.reading.cut.map(|cut| Cut { committed_at: noon() - TimeDelta::seconds(1_729), ..cut });
    let dbt = EarlierDbt {
        finished_at: Some(noon() - TimeDelta::seconds(1_700)),
        models: 9,
        tests: TestCounts { pass: 46, ..TestCounts::default() },
        ..EarlierDbt::default()
    };
    now.refresh.earlier = Some(Earlier { kpis: Some(kpis), unread: None, dbt: Some(dbt) });
    let verdict = verdict(&now);
    assert_eq!(
        (verdict.level, verdict.text.as_str()),
        (Level::Note, "Starting · 157 msg/s · KPIs as of 11:34:25, 28 min old, the next dbt run makes new ones")
    );
    for size in [(80, 24), (120, 36)] {
        let text = picture(&judged(now.clone()), &mut App::new(true), size);
        for part in ["5 KPIs", "640,930.12", if size.0 == 80 { "? earlier, 11:34:25" } else { "before this start" }, "46 pass", "9 models"] {
            assert!(text.contains(part), "{part} {size:?} in\n{text}");
        }
        for claim in ["No KPIs yet", "No dbt run yet", "no KPIs yet", "All well"] {
            assert!(!text.contains(claim), "{claim} {size:?} in\n{text}");
        }
    }
    now.refresh.earlier = Some(Earlier::default());
    assert_eq!(said(&now), "Starting · 157 msg/s · no KPIs yet, the next dbt run makes them");
}

#[test]
fn kpis_of_before_the_money_flowed_are_not_well_and_beyond_the_schedule_they_are_late() {
    let old = |seconds: i64, schedule: &str| {
        let mut now = busy();
        now.flowing_since = Some(noon() - TimeDelta::seconds(60));
        now.dag.dags[0].schedule = schedule.into();
        let kpis = now.refresh.kpis.as_mut().unwrap();
        kpis.reading.cut = kpis.reading.cut.map(|cut| Cut { committed_at: noon() - TimeDelta::seconds(seconds), ..cut });
        now
    };
    let now = old(300, "30s");
    assert_eq!(
        (verdict(&now).level, said(&now).as_str()),
        (Level::Note, "Catching up · 157 msg/s · KPIs as of 11:58:14, 5 min old, the next dbt run makes new ones")
    );
    for (schedule, level) in [("30s", Level::Late), ("1h", Level::Well), ("never", Level::Note)] {
        let mut now = old(300, schedule);
        now.flowing_since = Some(noon() - TimeDelta::seconds(750));
        assert_eq!(verdict(&now).level, level, "{schedule}: {}", said(&now));
    }
    assert_eq!(verdict(&old(40, "30s")).level, Level::Well);
}

#[test]
fn where_money_should_come_and_none_does_nothing_is_well() {
    let mut now = busy();
    now.wish.rate = bank::Rate::PerSecond(72.try_into().unwrap());
    for flow in now.flow.values_mut() {
        (flow.per_second, flow.history) = (0, vec![9, 9, 0, 0, 0].into());
    }
    assert_eq!((verdict(&now).level, said(&now).as_str()), (Level::Late, "No money arrives: 72 tx/s are wished, 0 msg/s come"));
    now.started_at = noon() - TimeDelta::seconds(5);
    assert_ne!(verdict(&now).level, Level::Late, "it starts: {}", said(&now));
    stage(&mut now, StageName::Lake, |it| (it.wanted, it.phase) = (Phase::Paused, Phase::Paused));
    assert!(said(&now).starts_with("Lake paused by you"), "{}", said(&now));
}

#[test]
fn all_that_is_held_is_named_and_the_key_that_is_named_lets_it_go() {
    let mut now = paused();
    stage(&mut now, StageName::Lake, |it| (it.wanted, it.phase, it.since) = (Phase::Paused, Phase::Paused, noon() - TimeDelta::seconds(20)));
    stage(&mut now, StageName::Cdc, |it| it.wanted = Phase::Paused);
    let now = judged(now);
    assert_eq!(now.verdict.text, "Bank and lake paused by you 3 min ago · cdc pausing…");
    for (pane, hint) in [(Pane::Kpis, "p resumes bank"), (Pane::Lake, "p resumes lake"), (Pane::Dags, ":resume bank")] {
        let mut app = on_screen(pane, &now);
        let text = picture(&now, &mut app, (120, 36));
        assert!(text.contains(hint), "{hint} in\n{text}");
        if let Some(stage) = hint.strip_prefix("p resumes ") {
            assert_eq!(app.pause_target(&now).as_str(), stage);
        }
    }
    assert!(now.verdict.line().ends_with("`ledgerline attach` resumes with p"), "{}", now.verdict.line());
}

#[test]
fn a_retry_in_progress_is_not_a_failure_any_more() {
    let mut now = task_failed();
    newest_run(&mut now, |run| {
        (run.state, run.finished_at, run.queued_at) = (RunState::Running, None, noon());
        (run.tasks[1].state, run.tasks[1].tries) = (TaskState::Running, 3);
        run.tasks.iter_mut().skip(2).for_each(|it| it.state = TaskState::None);
    });
    // The run before it is red as well: that is what the retry is for.
    let mut older = RunStats::clone(&task_failed().dag.dags[1].runs[0]);
    older.finished_at = Some(noon() - TimeDelta::seconds(33));
    now.dag.dags[1].runs.insert(1, Arc::new(older));
    let dag = "DBT_Bank_Data_Transformation_Pipeline";
    assert_eq!((verdict(&now).level, said(&now)), (Level::Note, format!("dbt_test_staging is run again, try 3 · 7 tasks to go in {dag}")));
    newest_run(&mut now, |run| {
        run.tasks[1].state = TaskState::Success;
        run.tasks[2].state = TaskState::Running;
    });
    assert_eq!((verdict(&now).level, said(&now)), (Level::Note, format!("dbt_snapshot is run again, try 0 · 6 tasks to go in {dag}")));
}

#[test]
fn a_failure_says_that_a_new_run_is_in_progress_and_when_it_got_over_it() {
    let mut now = task_failed();
    let mut run = RunStats::clone(&now.dag.dags[1].runs[1]);
    (run.state, run.finished_at) = (RunState::Running, None);
    run.tasks[1].state = TaskState::Running;
    now.dag.dags[1].runs.insert(0, Arc::new(run));
    assert!(said(&now).ends_with("debit and credit differ · a new run is in progress"), "{}", said(&now));
    newest_run(&mut now, |run| run.tasks[1].state = TaskState::Success);
    assert_eq!((verdict(&now).level, said(&now).as_str()), (Level::Late, "dbt_test_staging failed 2 s ago and has succeeded in the run in progress"));
}

#[test]
fn what_an_operator_cancelled_is_no_failure() {
    let mut now = task_failed();
    newest_run(&mut now, |run| {
        run.cancelled = true;
        run.tasks[1].error = Some("cancelled by an operator".into());
    });
    let now = judged(now);
    assert_eq!((now.verdict.level, now.verdict.text.as_str()), (Level::Note, "DBT_Bank_Data_Transformation_Pipeline was cancelled by an operator 2 s ago"));
    let mut app = on_screen(Pane::Dags, &now);
    (0..9).for_each(|_| drop(app.update(Action::Down, &now)));
    let text = picture(&now, &mut app, (120, 36));
    assert!(text.contains("‖ cancelled by an operator") && !text.contains('✗'), "{text}");
}

#[test]
fn a_service_that_died_stands_in_the_title_too() {
    let mut now = busy();
    now.services.insert("postgres".into(), crate::embedded::Health::Ailing("PostgreSQL died (signal: 9) and is being started again".into()));
    let text = picture(&judged(now), &mut App::new(true), (120, 36));
    assert!(text.contains("▲ postgres ailing") && !text.contains("all stages running"), "{text}");
}

#[test]
fn an_end_says_that_it_drains_and_what_is_left() {
    let mut now = busy();
    stage(&mut now, StageName::Bank, |it| it.health = Health::Ended);
    now.ending = Some(Ending::Draining);
    assert_eq!(said(&now), "The bank is done, draining: 7 records to land, 12 KiB of WAL to read");
    stage(&mut now, StageName::Scheduler, |it| (it.wanted, it.phase) = (Phase::Paused, Phase::Paused));
    now.ending = Some(Ending::LastRuns);
    newest_run(&mut now, |run| {
        run.state = RunState::Running;
        run.tasks[7].state = TaskState::Running;
    });
    assert_eq!(said(&now), "The bank is done, draining: last runs of both DAGs, 1 tasks to go, dbt_report_email runs");
    let text = picture(&judged(now), &mut App::new(true), (120, 36));
    assert!(text.contains("‖ draining") && !text.contains("scheduler paused ·") && !text.contains("schedule is held"), "{text}");
}

#[test]
fn lines_name_the_command_where_the_console_names_keys() {
    let now = task_failed();
    let line = now.verdict.line();
    assert!(line.contains("`ledgerline dag retry DBT_Bank_Data_Transformation_Pipeline dbt_test_staging --run-id "), "{line}");
    assert!(!line.contains("Enter"), "{line}");
    let text = picture(&now, &mut App::new(true), (80, 24));
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[1].contains("dbt_test_staging failed") && lines[2].trim_end().ends_with("3 Enter log · r retry"), "{text}");
    // Nothing moves when something fails.
    let well = picture(&busy(), &mut App::new(true), (80, 24));
    let top = |text: &str| text.lines().position(|it| it.contains("1 stream"));
    assert_eq!(top(&text), top(&well));
}

#[test]
fn every_day_is_reached_in_the_smallest_window_and_none_is_flattened() {
    let mut now = busy();
    now.refresh.kpis.as_mut().unwrap().reading.kpis.transaction_amount_over_time[29].amount = crate::units::Money::from_cents(9_000_000_000);
    let mut app = on_screen(Pane::Kpis, &now);
    let mut seen = String::new();
    for _ in 0..30 {
        let text = picture(&now, &mut app, (80, 24));
        assert!(text.contains("… ") && (text.contains("older") || text.contains("newer")), "{text}");
        assert!(text.lines().filter(|it| it.contains("2026-1") && it.contains('█')).count() >= 3, "{text}");
        seen += &text;
        app.update(Action::Down, &now);
    }
    for day in 24..=31 {
        assert!(seen.contains(&format!("2026-10-{day}")), "{day}");
    }
}

#[test]
fn no_kind_is_dropped_without_a_mark() {
    let now = busy();
    let text = picture(&now, &mut App::new(true), (120, 36));
    for kind in ["deposit", "transfer", "withdrawal", "checking", "credit", "loan", "savings"] {
        assert!(text.contains(kind), "{kind} in\n{text}");
    }
    let text = picture(&now, &mut App::new(true), (80, 24));
    assert!(text.lines().any(|it| it.contains("Accounts / customers") && it.contains('…')), "{text}");
}
