//! The days an operator meets: what the first line says, and that every number stands whole at every size.

use chrono::TimeDelta;

use crate::{
    pipeline::{
        command::StageName,
        snapshot::Snapshot,
        supervise::Health,
        verdict::{Level, verdict},
    },
    stage::Phase,
    tui::{app::App, keys::Pane},
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
        ("paused", paused(), "‖ Bank paused by you 3 min ago · p resumes"),
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
    // What waits for a service explains why something else is late.
    let mut now = service_away();
    now.cdc.lag_bytes = 1 << 40;
    assert!(verdict(&now).text.contains("connection refused"), "{}", verdict(&now).text);
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
    assert_eq!(verdict(&now).level, Level::Well);
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
