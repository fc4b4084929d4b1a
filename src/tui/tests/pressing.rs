//! Keys as strings, effects as what comes out.

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use std::num::NonZeroU32;

use crate::{
    pipeline::{
        command::{Command, Reply, StageName},
        snapshot::Snapshot,
    },
    refresh::{LOADING, TRANSFORMATION},
    stage::Phase,
    tui::{
        Left,
        app::{App, Effect, OnTop, Purpose, Question},
        keys::{self, Pane},
    },
};

use super::bank_day::{busy, empty, failing};

/// Presses keys, separated by blanks, and returns what they caused.
pub(super) fn press(app: &mut App, now: &Snapshot, keys: &str) -> Vec<Effect> {
    keys.split(' ').filter_map(|key| keys::action(app.place(), event(key)).map(|action| app.update(action, now))).filter(|it| *it != Effect::None).collect()
}

fn event(key: &str) -> KeyEvent {
    let code = match key {
        "Enter" => KeyCode::Enter,
        "Esc" => KeyCode::Esc,
        "Tab" => KeyCode::Tab,
        "Space" => KeyCode::Char(' '),
        "Left" => KeyCode::Left,
        _ => match key.strip_prefix('^') {
            Some(letter) => return KeyEvent::new(KeyCode::Char(letter.chars().next().unwrap()), KeyModifiers::CONTROL),
            None => KeyCode::Char(key.chars().next().unwrap()),
        },
    };
    KeyEvent::new(code, KeyModifiers::NONE)
}

fn done(command: Command) -> Effect {
    Effect::Send(command, Purpose::Do)
}

fn rate(per_second: u32) -> Effect {
    done(Command::Rate { per_second: NonZeroU32::new(per_second).unwrap() })
}

#[test]
fn p_pauses_the_bank_and_resumes_what_is_held() {
    let mut now = busy();
    let mut app = App::new(true);
    assert_eq!(press(&mut app, &now, "p"), [done(Command::Pause { stage: StageName::Bank })]);
    // Nothing is taken for granted: until a snapshot says otherwise the same is asked again.
    assert_eq!(press(&mut app, &now, "p"), [done(Command::Pause { stage: StageName::Bank })]);
    now.stages.get_mut(&StageName::Bank).unwrap().wanted = Phase::Paused;
    assert_eq!(press(&mut app, &now, "p"), [done(Command::Resume { stage: StageName::Bank })]);
    assert_eq!(press(&mut app, &now, "1 p"), [done(Command::Pause { stage: StageName::Cdc })]);
    assert_eq!(press(&mut app, &now, "2 p"), [done(Command::Pause { stage: StageName::Lake })]);
    assert_eq!(press(&mut app, &now, "3 p"), [done(Command::Pause { stage: StageName::Scheduler })]);
    assert_eq!(press(&mut app, &now, "s"), [done(Command::Step)]);
}

#[test]
fn the_rate_moves_by_tenths_and_keys_in_a_row_add_up() {
    let mut app = App::new(true);
    assert_eq!(press(&mut app, &busy(), "+ + -"), [rate(55), rate(60), rate(54)]);
    // A snapshot that has heard of the first wish only does not take the later ones back.
    let mut heard = busy();
    heard.wish.rate = crate::bank::Rate::PerSecond(NonZeroU32::new(55).unwrap());
    app.observe(&heard);
    assert_eq!(press(&mut app, &heard, "+"), [rate(59)]);
    heard.wish.rate = crate::bank::Rate::PerSecond(NonZeroU32::new(59).unwrap());
    app.observe(&heard);
    assert_eq!((app.rate_wanted(), press(&mut app, &heard, "-")), (None, vec![rate(54)]));
    // A refused wish is not the base of the next.
    app.hear(Command::Rate { per_second: NonZeroU32::MIN }, Purpose::Do, Reply::refused("no"), &heard);
    assert_eq!(press(&mut app, &heard, "+"), [rate(64)]);
    let mut slow = busy();
    slow.wish.rate = crate::bank::Rate::PerSecond(NonZeroU32::MIN);
    assert_eq!(press(&mut App::new(true), &slow, "- +"), [rate(1), rate(2)]);
    slow.wish.rate = crate::bank::Rate::Unlimited;
    let mut app = App::new(true);
    assert_eq!(press(&mut app, &slow, "+"), []);
    assert!(app.message.is_some_and(|it| !it.ok));
}

#[test]
fn t_asks_before_it_starts_the_dag_in_focus() {
    let trigger = |dag: &str| Effect::Send(Command::Trigger { dag_id: dag.into(), dry_run: true }, Purpose::Rehearse);
    let now = busy();
    let mut app = App::new(true);
    assert_eq!(press(&mut app, &now, "t"), [trigger(LOADING)]);
    assert_eq!(press(&mut app, &now, "4 t"), [trigger(TRANSFORMATION)]);
    assert_eq!(press(&mut app, &now, "3 t G t"), [trigger(LOADING), trigger(TRANSFORMATION)]);
    let dry = Command::Trigger { dag_id: LOADING.into(), dry_run: true };
    app.hear(dry, Purpose::Rehearse, Reply::done("would: start a run"), &now);
    assert_eq!(press(&mut app, &now, "y"), [done(Command::Trigger { dag_id: LOADING.into(), dry_run: false })]);
}

#[test]
fn r_asks_what_it_would_run_then_asks_the_operator_then_runs_it() {
    let now = failing();
    let mut app = App::new(true);
    let run_id = Some(now.dag.dags[1].runs[0].run_id.clone());
    let retry = |dry_run| Command::Retry { dag_id: TRANSFORMATION.into(), run_id: run_id.clone(), task_id: "dbt_test_staging".into(), dry_run };
    assert_eq!(press(&mut app, &now, "r"), [Effect::Send(retry(true), Purpose::Rehearse)]);
    let reply = Reply { ok: true, text: "would: run 7 tasks".into(), tasks: vec!["dbt_test_staging".into()], ..Reply::done("") };
    app.hear(retry(true), Purpose::Rehearse, reply.clone(), &now);
    let asked = OnTop::Question(Question::Order { command: retry(false), said: reply.text.clone(), tasks: reply.tasks.clone() });
    assert_eq!(app.on_top, Some(asked));
    assert_eq!(press(&mut app, &now, "n"), []);
    assert_eq!(app.on_top, None);
    app.hear(retry(true), Purpose::Rehearse, reply, &now);
    assert_eq!(press(&mut app, &now, "y"), [done(retry(false))]);
    assert_eq!(app.on_top, None);
}

#[test]
fn only_y_says_yes_and_a_key_that_means_nothing_to_a_question_says_so() {
    let now = busy();
    let mut app = App::new(true);
    press(&mut app, &now, "q");
    for key in ["4", "Enter", "Tab"] {
        assert_eq!(press(&mut app, &now, key), [], "{key}");
        assert_eq!(app.on_top, Some(OnTop::Question(Question::Quit)), "{key}");
        assert!(app.message.take().is_some_and(|it| it.text.contains("y says yes")), "{key}");
    }
    assert_eq!(press(&mut app, &now, "Esc"), []);
    assert_eq!(app.on_top, None);
}

#[test]
fn what_is_asked_in_vain_says_why() {
    let now = busy();
    let mut app = App::new(true);
    for key in ["r", "x", "c", "R"] {
        assert_eq!(press(&mut app, &now, key), [], "{key}");
        assert!(app.message.as_ref().is_some_and(|it| !it.ok && !it.text.is_empty()), "{key}");
    }
    app.hear(Command::Step, Purpose::Do, Reply::refused("the bank runs; pause it first, then step"), &now);
    assert_eq!(app.message.as_ref().map(|it| it.text.as_str()), Some("the bank runs; pause it first, then step"));
    let mut later = now.clone();
    later.at += chrono::TimeDelta::seconds(7);
    app.observe(&later);
    assert_eq!(app.message, None);
}

#[test]
fn focus_walks_the_panes_and_enter_goes_in() {
    let now = busy();
    let mut app = App::new(true);
    press(&mut app, &now, "j j");
    assert_eq!(app.focus, Pane::Kpis);
    press(&mut app, &now, "l k");
    assert_eq!((app.focus, app.zoomed), (Pane::Dbt, false));
    press(&mut app, &now, "Enter");
    assert!(app.zoomed);
    press(&mut app, &now, "Enter j Esc Esc");
    assert_eq!((app.on_top.clone(), app.zoomed), (None, false));
    press(&mut app, &now, "Tab Tab Tab Tab");
    assert_eq!(app.focus, Pane::Lake);
}

#[test]
fn a_filter_narrows_what_is_walked_through() {
    let now = busy();
    let mut app = App::new(true);
    press(&mut app, &now, "4 / l e d g e r Enter");
    assert_eq!(app.filter(Pane::Dbt), "ledger");
    press(&mut app, &now, "j j j Enter");
    assert!(matches!(app.on_top, Some(OnTop::Details(_))));
    press(&mut app, &now, "Esc Esc");
    assert_eq!((app.filter(Pane::Dbt), app.zoomed), ("", true));
}

#[test]
fn the_chosen_run_stays_chosen_when_a_newer_one_comes() {
    let mut now = busy();
    let mut app = App::new(true);
    press(&mut app, &now, "3 Left");
    let chosen = now.dag.dags[0].runs[1].run_id.clone();
    let mut newer = crate::dag::RunStats::clone(&now.dag.dags[0].runs[0]);
    newer.run_id = "manual__now".into();
    now.dag.dags[0].runs.insert(0, newer.into());
    assert_eq!(now.dag.dags[0].runs[app.run_of(&now.dag.dags[0])].run_id, chosen);
    press(&mut app, &now, "l l l");
    assert_eq!(app.run_of(&now.dag.dags[0]), 0);
}

#[test]
fn commands_are_typed_by_name() {
    let now = busy();
    let typed = |line: &str| {
        let mut app = App::new(true);
        let keys: Vec<String> = line.chars().map(|it| if it == ' ' { "Space".into() } else { it.to_string() }).collect();
        let effects = press(&mut app, &now, &format!(": {} Enter", keys.join(" ")));
        (effects, app)
    };
    assert_eq!(typed("rate 300").0, [rate(300)]);
    assert_eq!(typed("pause lake").0, [done(Command::Pause { stage: StageName::Lake })]);
    assert_eq!(typed("trigger minio_s3_to_snowflake").0, [Effect::Send(Command::Trigger { dag_id: LOADING.into(), dry_run: true }, Purpose::Rehearse)]);
    assert_eq!(typed("kpis").1.focus, Pane::Kpis);
    assert_eq!(typed("quit").1.on_top, Some(OnTop::Question(Question::Quit)));
    let (effects, app) = typed("puase");
    assert_eq!(effects, []);
    assert!(app.message.unwrap().text.contains("did you mean pause?"));
    let (_, app) = typed("nope");
    assert_eq!(app.message.unwrap().text, "there is no command \"nope\"; : lists them");
    let (_, app) = typed("rate 0");
    assert!(app.message.unwrap().text.contains("is not a rate"));
    let mut app = App::new(true);
    press(&mut app, &now, ": t r i Tab D Tab");
    assert_eq!(app.on_top, Some(OnTop::Palette { text: format!("trigger {TRANSFORMATION} ") }));
}

#[test]
fn leaving_asks_and_a_second_interrupt_does_not() {
    let now = empty();
    let mut app = App::new(true);
    assert_eq!(press(&mut app, &now, "q n"), []);
    assert_eq!(press(&mut app, &now, "q y"), [Effect::Leave(Left::Quit)]);
    assert_eq!(press(&mut App::new(false), &now, "^c ^c"), [Effect::Leave(Left::Interrupted)]);
    assert_eq!(press(&mut App::new(true), &now, ": x ^c ^c"), [Effect::Leave(Left::Interrupted)]);
    assert_eq!(press(&mut App::new(true), &now, "? ^z Esc ^l"), [Effect::Suspend, Effect::Redraw]);
}

#[test]
fn an_answer_does_not_tear_one_out_of_something_else() {
    let now = failing();
    let mut app = App::new(true);
    press(&mut app, &now, "r ?");
    let dry = Command::Cancel { dag_id: LOADING.into(), dry_run: true };
    app.hear(dry, Purpose::Rehearse, Reply::done("would: cancel"), &now);
    assert_eq!(app.on_top, Some(OnTop::Help { scroll: 0 }));
}
