//! Every screen at the sizes people have, drawn from fixed days.

use ratatui::{Terminal, backend::TestBackend, buffer::Buffer};
use tui_logger::TuiWidgetState;

use crate::{
    pipeline::{command::Command, snapshot::Snapshot},
    refresh::TRANSFORMATION,
    tui::{
        app::{App, OnTop, Question},
        keys::{Action, Pane},
        screens::{self, Scene},
        theme::Theme,
    },
};

use super::bank_day::{busy, empty, failing, noon};

pub(super) fn drawn(now: &Snapshot, app: &mut App, theme: Theme, (width, height): (u16, u16)) -> (String, Buffer) {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    app.observe(now);
    let log = TuiWidgetState::new();
    terminal.draw(|frame| screens::draw(frame, Scene { now, app, theme, log: &log })).unwrap();
    let buffer = terminal.backend().buffer().clone();
    let rows = buffer.content.chunks(width.into()).map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>());
    (rows.map(|row| row.trim_end().to_owned()).collect::<Vec<_>>().join("\n"), buffer)
}

pub(super) fn picture(now: &Snapshot, app: &mut App, size: (u16, u16)) -> String {
    drawn(now, app, Theme::new(false, None), size).0
}

pub(super) fn on_screen(pane: Pane, now: &Snapshot) -> App {
    let mut app = App::new(true);
    app.update(Action::Zoom(pane), now);
    app
}

const SIZES: [(u16, u16); 3] = [(80, 24), (120, 36), (200, 60)];

#[test]
fn the_overview_answers_the_three_questions() {
    for (day, now) in [("empty", empty()), ("busy", busy()), ("failing", failing())] {
        for size in SIZES {
            insta::assert_snapshot!(format!("overview_{day}_{}x{}", size.0, size.1), picture(&now, &mut App::new(true), size));
        }
    }
}

#[test]
fn every_screen_reads_well_while_all_is_well_and_while_it_is_not() {
    for pane in Pane::ALL.into_iter().filter(|it| *it != Pane::Log) {
        let name = pane.name().to_lowercase();
        for (day, now) in [("empty", empty()), ("busy", busy()), ("failing", failing())] {
            insta::assert_snapshot!(format!("{name}_{day}_120x36"), picture(&now, &mut on_screen(pane, &now), (120, 36)));
        }
        insta::assert_snapshot!(format!("{name}_failing_80x24"), picture(&failing(), &mut on_screen(pane, &failing()), (80, 24)));
    }
}

#[test]
fn the_keys_that_matter_stand_in_the_footer_of_the_smallest_window() {
    for now in [busy(), failing()] {
        let text = picture(&now, &mut on_screen(Pane::Dags, &now), (80, 24));
        let footer = text.lines().last().unwrap_or_default();
        for key in [" t ", " / ", " : ", " Esc ", " q "] {
            assert!(footer.contains(key), "{key:?} in {footer:?}");
        }
    }
}

#[test]
fn questions_say_what_they_touch() {
    let now = failing();
    let mut app = App::new(true);
    let command = Command::Retry { dag_id: TRANSFORMATION.into(), run_id: None, task_id: "dbt_test_staging".into(), dry_run: false };
    let tasks = ["dbt_test_staging", "dbt_snapshot", "dbt_analytics"].map(str::to_owned).into();
    app.on_top = Some(OnTop::Question(Question::Order { command, said: "would: run dbt_test_staging and what follows again".into(), tasks }));
    insta::assert_snapshot!("question_retry", picture(&now, &mut app, (80, 24)));
    for (name, owned) in [("question_quit_owned", true), ("question_quit_attached", false)] {
        let mut app = App::new(owned);
        app.update(Action::Quit, &now);
        insta::assert_snapshot!(name, picture(&now, &mut app, (80, 24)));
    }
}

#[test]
fn a_failed_test_shows_its_rows_and_its_sql() {
    let now = failing();
    let mut app = on_screen(Pane::Dbt, &now);
    app.update(Action::Enter, &now);
    insta::assert_snapshot!("dbt_details", picture(&now, &mut app, (100, 30)));
}

#[test]
fn help_fits_and_scrolls() {
    let mut app = App::new(true);
    app.update(Action::Help, &busy());
    insta::assert_snapshot!("help_80x24", picture(&busy(), &mut app, (80, 24)));
    let palette = &mut App::new(true);
    palette.update(Action::Palette, &busy());
    palette.update(Action::Type('r'), &busy());
    insta::assert_snapshot!("palette_80x24", picture(&busy(), palette, (80, 24)));
}

#[test]
fn a_tiny_terminal_still_says_the_one_sentence() {
    let said = picture(&failing(), &mut App::new(true), (40, 8));
    assert!(said.contains("dbt_test_staging failed"), "{said}");
    assert!(said.ends_with("enlarge the terminal") || said.contains("enlarge the terminal"), "{said}");
    for size in [(1, 1), (10, 2), (59, 40), (60, 15), (75, 20), (76, 21)] {
        picture(&failing(), &mut App::new(true), size);
    }
}

#[test]
fn with_ascii_every_cell_is_ascii() {
    for now in [empty(), busy(), failing()] {
        for zoom in [None, Some(Pane::Stream), Some(Pane::Lake), Some(Pane::Dags), Some(Pane::Dbt), Some(Pane::Kpis)] {
            let mut app = zoom.map_or_else(|| App::new(true), |pane| on_screen(pane, &now));
            let (text, buffer) = drawn(&now, &mut app, Theme::new(true, None), (120, 36));
            assert!(buffer.content.iter().all(|it| it.symbol().is_ascii()), "{text}");
            assert!(!buffer.content.iter().any(|it| it.symbol() == "?" && it.modifier.is_empty() && it.fg != ratatui::style::Color::Reset), "{text}");
        }
    }
}

#[test]
fn without_colour_nothing_is_coloured_and_everything_is_said() {
    let theme = Theme::new(false, Some("1"));
    let (text, buffer) = drawn(&failing(), &mut App::new(true), theme, (120, 36));
    let coloured = |it: &ratatui::buffer::Cell| it.fg != ratatui::style::Color::Reset || it.bg != ratatui::style::Color::Reset;
    assert!(!buffer.content.iter().any(coloured));
    assert_eq!(text, picture(&failing(), &mut App::new(true), (120, 36)));
    for word in ["bank pausing…", "cdc stale", "lake waiting", "✗"] {
        assert!(text.contains(word), "{word} in\n{text}");
    }
}

#[test]
fn a_silent_pipeline_is_never_well() {
    let mut app = App::new(false);
    app.silent = Some(std::time::Duration::from_secs(7));
    let text = picture(&busy(), &mut app, (120, 36));
    assert!(text.contains("The pipeline has said nothing for 7 s"), "{text}");
    assert!(!text.contains("All well"), "{text}");
}

#[test]
fn numbers_stay_where_they_are() {
    let mut later = busy();
    for flow in later.flow.values_mut() {
        flow.per_second = 9;
        flow.lag = 12_345;
    }
    let column =
        |now: &Snapshot| picture(now, &mut App::new(true), (120, 36)).lines().find(|it| it.contains("boundaries")).and_then(|it| it.find("1,044,071")).unwrap();
    assert_eq!(column(&busy()), column(&later));
    assert_eq!(noon(), busy().at);
}
