//! One table: where, which key, what it does. Keys are looked up in it, and the footer and the help are printed from it.

use crossterm::event::{
    KeyCode::{self, BackTab, Backspace, Char, Down, End, Enter, Esc, Home, Left, PageDown, PageUp, Right, Tab, Up},
    KeyEvent, KeyModifiers,
};

/// Everything a key can mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Quit,
    /// ^C: asks like `q`; a second one does not ask.
    Interrupt,
    Suspend,
    Redraw,
    Help,
    Palette,
    Filter,
    Zoom(Pane),
    Enter,
    Back,
    NextPane,
    PreviousPane,
    Up,
    Down,
    Left,
    Right,
    PageUp,
    PageDown,
    First,
    Last,
    TogglePause,
    Step,
    Faster,
    Slower,
    Trigger,
    Retry,
    Clear,
    Cancel,
    Restart,
    /// More or fewer levels in the log.
    Louder,
    Quieter,
    /// Nothing newer in the log while one reads.
    Freeze,
    SaveLog,
    /// The chosen run over time instead of the grid, and back.
    Gantt,
    /// Proves the whole lake.
    Verify,
    /// Masked messages unmasked, and back.
    Reveal,
    Mails,
    Yes,
    No,
    /// A key that means nothing to the question that is open.
    Insist,
    /// While a line is being typed.
    Type(char),
    Erase,
    Complete,
    Accept,
    Dismiss,
}

/// The six panes of the overview; each has a screen of its own behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pane {
    Stream,
    Lake,
    Dags,
    Dbt,
    Kpis,
    Log,
}

impl Pane {
    pub(super) const ALL: [Self; 6] = [Self::Stream, Self::Lake, Self::Dags, Self::Dbt, Self::Kpis, Self::Log];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Stream => "stream",
            Self::Lake => "lake",
            Self::Dags => "DAGs",
            Self::Dbt => "dbt",
            Self::Kpis => "KPIs",
            Self::Log => "log",
        }
    }

    pub(super) fn place(self) -> usize {
        Self::ALL.iter().position(|it| *it == self).unwrap_or_default()
    }

    pub(super) fn step(self, by: isize) -> Self {
        let count = Self::ALL.len();
        Self::ALL[self.place().saturating_add(count).saturating_add_signed(by) % count]
    }
}

/// What the keys are for right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Overview,
    Screen(Pane),
    /// Something is explained on top; any way out leads back.
    Sheet,
    /// A question waits for yes or no.
    Question,
    /// A line is being typed.
    Typing,
}

/// Which places a binding is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum In {
    /// Overview and all screens.
    All,
    Overview,
    Screens,
    Only(Pane),
    Sheet,
    Question,
    Typing,
}

impl In {
    fn has(self, place: Place) -> bool {
        match (self, place) {
            (Self::All, Place::Overview | Place::Screen(_))
            | (Self::Overview, Place::Overview)
            | (Self::Screens, Place::Screen(_))
            | (Self::Sheet, Place::Sheet)
            | (Self::Question, Place::Question)
            | (Self::Typing, Place::Typing) => true,
            (Self::Only(pane), Place::Screen(here)) => pane == here,
            _ => false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key(KeyCode, KeyModifiers);

impl Key {
    const fn plain(code: KeyCode) -> Self {
        Self(code, KeyModifiers::NONE)
    }

    const fn letter(letter: char) -> Self {
        Self::plain(Char(letter))
    }

    const fn control(letter: char) -> Self {
        Self(Char(letter), KeyModifiers::CONTROL)
    }

    /// Shift is part of the letter already.
    fn is(self, event: KeyEvent) -> bool {
        self.0 == event.code && self.1 == event.modifiers & (KeyModifiers::CONTROL | KeyModifiers::ALT)
    }
}

/// One row of the table.
#[derive(Debug)]
pub(super) struct Binding {
    place: In,
    keys: &'static [Key],
    pub(super) action: Action,
    /// The keys as they are written for people.
    pub(super) shown: &'static str,
    /// What it does, in the help.
    pub(super) does: &'static str,
    /// Whether the footer has it; the order of the table is the order there.
    in_footer: bool,
}

const fn bind(place: In, keys: &'static [Key], shown: &'static str, action: Action, does: &'static str) -> Binding {
    Binding { place, keys, action, shown, does, in_footer: true }
}

const fn quiet(place: In, keys: &'static [Key], shown: &'static str, action: Action, does: &'static str) -> Binding {
    Binding { in_footer: false, ..bind(place, keys, shown, action, does) }
}

const BINDINGS: &[Binding] = &[
    bind(In::Only(Pane::Dags), &[Key::plain(Enter)], "Enter", Action::Enter, "tries, times and log of the task; follows while it runs"),
    bind(In::Only(Pane::Dags), &[Key::letter('r')], "r", Action::Retry, "retry the selected failed task, else the newest; asks first"),
    bind(In::Only(Pane::Dags), &[Key::letter(' ')], "Space", Action::Gantt, "the chosen run over time instead of the grid, and back"),
    bind(In::Only(Pane::Dags), &[Key::letter('c')], "c", Action::Clear, "clear the task and what follows: run them again"),
    bind(In::Only(Pane::Dags), &[Key::letter('x')], "x", Action::Cancel, "cancel the run in progress"),
    bind(In::Only(Pane::Dbt), &[Key::plain(Enter)], "Enter", Action::Enter, "message, failing rows and SQL of the node"),
    bind(In::Only(Pane::Stream), &[Key::plain(Enter)], "Enter", Action::Enter, "newest messages of the topic, customers masked"),
    bind(In::Only(Pane::Lake), &[Key::plain(Enter)], "Enter", Action::Enter, "commit record of the object, and its proof"),
    bind(In::Only(Pane::Lake), &[Key::letter('v')], "v", Action::Verify, "verify the lake: every chain, every hash"),
    bind(In::Only(Pane::Log), &[Key::letter('+'), Key::letter('=')], "+", Action::Louder, "show more levels of the chosen room"),
    bind(In::Only(Pane::Log), &[Key::letter('-')], "-", Action::Quieter, "show fewer levels of it"),
    quiet(In::Only(Pane::Log), &[Key::plain(Left), Key::letter('h')], "h ←", Action::Left, "choose the room before"),
    bind(In::Only(Pane::Log), &[Key::plain(Enter)], "Enter", Action::Enter, "where attached: the pipeline's log, followed"),
    bind(In::Only(Pane::Log), &[Key::plain(Right), Key::letter('l')], "l →", Action::Right, "choose the next room"),
    bind(In::Only(Pane::Log), &[Key::letter(' ')], "Space", Action::Freeze, "freeze: nothing newer is shown; again goes on"),
    bind(In::Only(Pane::Log), &[Key::letter('f')], "f", Action::Last, "follow the newest line"),
    bind(In::Only(Pane::Log), &[Key::letter('w')], "w", Action::SaveLog, "write what is shown into a file"),
    bind(In::All, &[Key::letter('p')], "p", Action::TogglePause, "pause or resume the bank; on screens 1 to 3 that stage"),
    quiet(In::All, &[Key::letter('s')], "s", Action::Step, "one payment while the bank is paused"),
    bind(In::All, &[Key::letter('+'), Key::letter('=')], "+", Action::Faster, "a tenth more payments a second"),
    bind(In::All, &[Key::letter('-')], "-", Action::Slower, "a tenth fewer payments a second"),
    bind(In::All, &[Key::letter('t')], "t", Action::Trigger, "start a run of the DAG now"),
    bind(In::All, &[Key::letter('r')], "r", Action::Retry, "retry the failed task; asks first"),
    quiet(In::All, &[Key::letter('c')], "c", Action::Clear, "clear the newest failed task and what follows"),
    quiet(In::All, &[Key::letter('x')], "x", Action::Cancel, "cancel the run in progress"),
    quiet(In::All, &[Key::letter('R')], "R", Action::Restart, "try a stage that stopped again, now"),
    bind(In::Overview, &[Key::plain(Tab)], "Tab", Action::NextPane, "next pane"),
    quiet(In::All, &[Key::plain(BackTab)], "Shift-Tab", Action::PreviousPane, "previous pane"),
    bind(In::Overview, &[Key::plain(Enter)], "Enter", Action::Enter, "open the pane"),
    bind(In::Screens, &[Key::plain(Esc)], "Esc", Action::Back, "back"),
    bind(In::Screens, &[Key::letter('/')], "/", Action::Filter, "show only what contains a text"),
    quiet(In::Overview, &[Key::letter('/')], "/", Action::Filter, "open the pane and filter it"),
    bind(In::All, &[Key::letter(':')], ":", Action::Palette, "type a command by name"),
    quiet(In::All, &[Key::letter('?')], "?", Action::Help, "this help"),
    bind(In::All, &[Key::letter('q')], "q", Action::Quit, "quit; asks first"),
    quiet(In::Screens, &[Key::plain(Tab)], "Tab", Action::NextPane, "next screen"),
    quiet(In::All, &[Key::letter('1')], "1", Action::Zoom(Pane::Stream), "stream: topics, lag, slot"),
    quiet(In::All, &[Key::letter('2')], "2", Action::Zoom(Pane::Lake), "lake: tables and objects"),
    quiet(In::All, &[Key::letter('3')], "3", Action::Zoom(Pane::Dags), "DAGs: runs and tasks"),
    quiet(In::All, &[Key::letter('4')], "4", Action::Zoom(Pane::Dbt), "dbt: models, snapshots, tests"),
    quiet(In::All, &[Key::letter('5')], "5", Action::Zoom(Pane::Kpis), "KPIs: all ten"),
    quiet(In::All, &[Key::letter('6')], "6", Action::Zoom(Pane::Log), "log"),
    quiet(In::All, &[Key::letter('0')], "0", Action::Back, "overview"),
    quiet(In::All, &[Key::plain(Up), Key::letter('k')], "k ↑", Action::Up, "up"),
    quiet(In::All, &[Key::plain(Down), Key::letter('j')], "j ↓", Action::Down, "down"),
    quiet(In::All, &[Key::plain(Left), Key::letter('h')], "h ←", Action::Left, "left; in the grid: the run before"),
    quiet(In::All, &[Key::plain(Right), Key::letter('l')], "l →", Action::Right, "right; in the grid: the run after"),
    quiet(In::Screens, &[Key::plain(PageUp)], "PgUp", Action::PageUp, "a page up"),
    quiet(In::Screens, &[Key::plain(PageDown)], "PgDn", Action::PageDown, "a page down"),
    quiet(In::Screens, &[Key::plain(Home), Key::letter('g')], "g Home", Action::First, "to the first"),
    quiet(In::Screens, &[Key::plain(End), Key::letter('G')], "G End", Action::Last, "to the last"),
    quiet(In::All, &[Key::control('l')], "^L", Action::Redraw, "draw everything anew"),
    quiet(In::All, &[Key::control('z')], "^Z", Action::Suspend, "suspend; fg comes back"),
    quiet(In::All, &[Key::control('c')], "^C", Action::Interrupt, "quit; a second ^C does not ask"),
    bind(In::Sheet, &[Key::plain(Esc), Key::letter('q'), Key::plain(Enter), Key::letter('?')], "Esc", Action::Dismiss, "close"),
    quiet(In::Sheet, &[Key::plain(Up), Key::letter('k')], "k ↑", Action::Up, "up"),
    bind(In::Sheet, &[Key::letter('m')], "m", Action::Reveal, "unmask customers, or mask them again"),
    quiet(In::Sheet, &[Key::plain(Home), Key::letter('g')], "g Home", Action::First, "to the top"),
    quiet(In::Sheet, &[Key::plain(End), Key::letter('G')], "G End", Action::Last, "to the end"),
    bind(In::Sheet, &[Key::plain(Down), Key::letter('j')], "j", Action::Down, "down"),
    quiet(In::Sheet, &[Key::plain(PageUp)], "PgUp", Action::PageUp, "a page up"),
    quiet(In::Sheet, &[Key::plain(PageDown), Key::letter(' ')], "PgDn", Action::PageDown, "a page down"),
    quiet(In::Sheet, &[Key::control('c')], "^C", Action::Interrupt, "quit"),
    quiet(In::Sheet, &[Key::control('z')], "^Z", Action::Suspend, "suspend"),
    bind(In::Question, &[Key::letter('y')], "y", Action::Yes, "yes"),
    bind(In::Question, &[Key::letter('n'), Key::plain(Esc), Key::letter('q')], "n", Action::No, "no"),
    quiet(In::Question, &[Key::control('c')], "^C", Action::Interrupt, "quit"),
    quiet(In::Question, &[Key::control('z')], "^Z", Action::Suspend, "suspend"),
    bind(In::Typing, &[Key::plain(Enter)], "Enter", Action::Accept, "do it"),
    bind(In::Typing, &[Key::plain(Esc)], "Esc", Action::Dismiss, "leave it"),
    bind(In::Typing, &[Key::plain(Tab)], "Tab", Action::Complete, "complete the word"),
    quiet(In::Typing, &[Key::plain(Backspace), Key::control('h')], "Backspace", Action::Erase, "erase a letter"),
    quiet(In::Typing, &[Key::control('c')], "^C", Action::Interrupt, "quit"),
    quiet(In::Typing, &[Key::control('z')], "^Z", Action::Suspend, "suspend"),
];

/// What a key means here.
pub(super) fn action(place: Place, event: KeyEvent) -> Option<Action> {
    let bound = BINDINGS.iter().find(|it| it.place.has(place) && it.keys.iter().any(|key| key.is(event)));
    match (bound, event.code) {
        (Some(binding), _) => Some(binding.action),
        (None, _) if place == Place::Question => Some(Action::Insist),
        (None, Char(letter)) if place == Place::Typing && !event.modifiers.intersects(KeyModifiers::CONTROL | KeyModifiers::ALT) => Some(Action::Type(letter)),
        _ => None,
    }
}

/// The bindings that work here, each key once.
pub(super) fn bindings(place: Place) -> impl Iterator<Item = &'static Binding> {
    let here: Vec<&Binding> = BINDINGS.iter().filter(|it| it.place.has(place)).collect();
    let mut taken: Vec<&Key> = Vec::new();
    here.into_iter().filter(move |it| {
        let is_new = !it.keys.iter().any(|key| taken.contains(&key));
        taken.extend(it.keys);
        is_new
    })
}

/// Those of them that the footer names.
pub(super) fn footer(place: Place) -> impl Iterator<Item = &'static Binding> {
    bindings(place).filter(|it| it.in_footer)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACES: [Place; 10] = [
        Place::Overview,
        Place::Screen(Pane::Stream),
        Place::Screen(Pane::Lake),
        Place::Screen(Pane::Dags),
        Place::Screen(Pane::Dbt),
        Place::Screen(Pane::Kpis),
        Place::Screen(Pane::Log),
        Place::Sheet,
        Place::Question,
        Place::Typing,
    ];

    #[test]
    fn every_key_that_footer_and_help_name_does_what_they_say() {
        for place in PLACES {
            for binding in bindings(place) {
                for key in binding.keys {
                    assert_eq!(action(place, KeyEvent::new(key.0, key.1)), Some(binding.action), "{} in {place:?}", binding.shown);
                }
            }
        }
    }

    #[test]
    fn every_place_has_a_way_out_and_tells_it() {
        for place in PLACES {
            let out = |it: &Binding| matches!(it.action, Action::Quit | Action::Back | Action::Dismiss | Action::No);
            assert!(footer(place).any(out), "{place:?}");
            assert!(action(place, KeyEvent::new(Char('c'), KeyModifiers::CONTROL)) == Some(Action::Interrupt), "{place:?}");
        }
    }

    #[test]
    fn letters_are_text_only_while_typing() {
        let p = KeyEvent::new(Char('p'), KeyModifiers::NONE);
        assert_eq!(action(Place::Typing, p), Some(Action::Type('p')));
        assert_eq!(action(Place::Overview, p), Some(Action::TogglePause));
        assert_eq!(action(Place::Question, p), Some(Action::Insist));
        assert_eq!(action(Place::Question, KeyEvent::new(Enter, KeyModifiers::NONE)), Some(Action::Insist));
        assert_eq!(action(Place::Screen(Pane::Stream), KeyEvent::new(Char('R'), KeyModifiers::SHIFT)), Some(Action::Restart));
    }
}
