//! The console: snapshots and keys in, frames and commands out.
//!
//! The loop owns [`app::App`] and the terminal, nothing else; the pipeline goes on whatever happens here. Keys are answered
//! from memory: commands travel in a task of their own and their answers come back as messages, so no query, lock or file
//! lies between a key and its frame. What a key asks for shows when a snapshot says so, never before.

mod app;
mod keys;
mod logs;
mod orders;
mod page;
mod palette;
mod parts;
mod pulse;
mod rows;
mod screens;
mod term;
#[cfg(test)]
mod tests;
mod theme;
mod wire;

use std::{
    future::poll_fn,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use crossterm::event::{Event, EventStream, KeyEventKind};
use futures_util::StreamExt as _;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::debug;
use tui_logger::TuiWidgetState;

use crate::{
    cli::Look,
    pipeline::{
        Commander,
        command::{Command, Reply, STALE_AFTER},
        snapshot::Snapshot,
    },
};

pub use term::has_terminal;

use app::{App, Effect, Purpose};
use screens::Scene;
use term::Screen;
use theme::Theme;

/// New snapshots are drawn at most four times a second; keys and resizes at once.
const FRAME_EVERY: Duration = Duration::from_millis(250);

/// While nobody looks, once a second.
const FRAME_EVERY_UNSEEN: Duration = Duration::from_secs(1);

/// While a frame is on its way to a slow terminal, the next one is tried after this.
const FRAME_AGAIN: Duration = Duration::from_millis(10);

/// Without a shell that stops and continues us, ^Z ends after this.
const SUSPEND_MAX: Duration = Duration::from_millis(500);

/// Answers that wait to be shown; whoever answers beyond that waits.
const ANSWERS_MAX: usize = 16;

/// Keys taken in one go before a frame is due, however fast they come.
const KEYS_PER_FRAME: usize = 64;

/// What the console looks at, and whom it asks.
pub struct Watched {
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    pub commander: Commander,
    /// Where a copy of the log goes.
    pub folder: PathBuf,
    /// Makes the rooms named speak at `debug` in this process, and only them.
    pub hear: fn(&[&str]),
    /// Whether leaving ends the pipeline (it runs in this process) or not (`attach`).
    pub owned: bool,
}

/// How the console was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    Quit,
    /// By ^C: whoever started us is told of it.
    Interrupted,
}

/// Runs the console until the operator leaves or `stop` says so; then the terminal is as it was.
///
/// A terminal that cannot be read or written any more is an error; the pipeline has not been touched by it.
pub async fn run(watched: Watched, look: &Look, stop: &CancellationToken) -> io::Result<Left> {
    let mut continued = signal(SignalKind::from_raw(rustix::process::Signal::CONT.as_raw()))?;
    let (answers_in, mut answers) = mpsc::channel(ANSWERS_MAX);
    let mut console = Console::enter(watched, look, answers_in)?;
    let mut events = EventStream::new();
    let mut due = Instant::now();
    let mut suspended: Option<Instant> = None;
    let mut pressed = None;
    loop {
        let mut at_once = false;
        tokio::select! { biased;
            () = stop.cancelled() => return Ok(Left::Quit),
            event = events.next() => {
                let came = Instant::now();
                let mut next = Some(event);
                // A held key or a paste comes in bursts: all of it, then one frame.
                for _ in 0..KEYS_PER_FRAME {
                    let Some(event) = next.take() else { break };
                    let event = event.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the terminal is gone"))??;
                    at_once |= console.take(&event);
                    match console.settle()? {
                        Settled::Left(how) => return Ok(how),
                        Settled::Suspended => suspended = Some(Instant::now() + SUSPEND_MAX),
                        Settled::Here => next = at_hand(&mut events).await,
                    }
                }
                pressed = pressed.or(at_once.then_some(came));
            }
            Some(answer) = answers.recv() => {
                console.hear(answer);
                at_once = true;
            }
            _ = continued.recv() => (suspended, at_once) = (None, console.come_back()?),
            () = sleep_until(suspended.unwrap_or_else(Instant::now)), if suspended.is_some() => (suspended, at_once) = (None, console.come_back()?),
            () = sleep_until(due), if suspended.is_none() => at_once = true,
        }
        if at_once && suspended.is_none() {
            let drawn = console.draw()?;
            if let Some(pressed) = pressed.take_if(|_| drawn) {
                console.app.pulse.add(pressed.elapsed());
            }
            due = Instant::now()
                + match (drawn, console.seen) {
                    (false, _) => FRAME_AGAIN,
                    (true, true) => FRAME_EVERY,
                    (true, false) => FRAME_EVERY_UNSEEN,
                };
        }
    }
}

/// The next event if there is one already. Polled with our own waker: the stream keeps only the first it is given, so that
/// a look with another one would leave the next key lying until the frame after.
async fn at_hand(events: &mut EventStream) -> Option<Option<io::Result<Event>>> {
    poll_fn(|context| match events.poll_next_unpin(context) {
        Poll::Ready(event) => Poll::Ready(Some(event)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

/// The name first: where a line ends too early, the folder gives way.
fn saved(lines: usize, path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().display();
    format!("{name} has {lines} lines · in {}", path.parent().unwrap_or(path).display())
}

struct Console {
    app: App,
    theme: Theme,
    screen: Screen,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    shown: Arc<Snapshot>,
    /// When the newest snapshot came.
    heard_at: Instant,
    commander: Commander,
    folder: PathBuf,
    hear: fn(&[&str]),
    answers: mpsc::Sender<Answer>,
    log: TuiWidgetState,
    /// The terminal has the focus, as far as it tells.
    seen: bool,
    effect: Effect,
}

/// What comes back from a task of its own.
enum Answer {
    Replied(Command, Purpose, Reply),
    Said { ok: bool, text: String },
}

/// Where the loop stands after an effect.
enum Settled {
    Here,
    Suspended,
    Left(Left),
}

impl Console {
    fn enter(mut watched: Watched, look: &Look, answers: mpsc::Sender<Answer>) -> io::Result<Self> {
        let app = App::new(watched.owned);
        let shown = Arc::clone(&watched.snapshots.borrow_and_update());
        Ok(Self {
            theme: Theme::new(look.ascii, std::env::var("NO_COLOR").ok().as_deref()),
            screen: Screen::enter()?,
            snapshots: watched.snapshots,
            shown,
            heard_at: Instant::now(),
            commander: watched.commander,
            folder: watched.folder,
            hear: watched.hear,
            answers,
            log: TuiWidgetState::new().set_default_display_level(app.logs.loudest()),
            app,
            seen: true,
            effect: Effect::None,
        })
    }

    /// Whether the event deserves a frame.
    fn take(&mut self, event: &Event) -> bool {
        match event {
            Event::Key(key) if key.kind != KeyEventKind::Release => match keys::action(self.app.place(), *key) {
                Some(action) => {
                    self.effect = self.app.update(action, &self.shown);
                    true
                }
                None => false,
            },
            Event::Resize(..) => true,
            Event::FocusGained => {
                self.seen = true;
                true
            }
            Event::FocusLost => {
                self.seen = false;
                false
            }
            _ => false,
        }
    }

    /// Carries out what an update asked for.
    fn settle(&mut self) -> io::Result<Settled> {
        match std::mem::replace(&mut self.effect, Effect::None) {
            Effect::None => {}
            Effect::Send(command, purpose) => self.send(command, purpose),
            Effect::Log(event) => self.log.transition(event),
            Effect::SaveLog => self.save_log(),
            Effect::Suspend => {
                self.screen.suspend()?;
                return Ok(Settled::Suspended);
            }
            Effect::Redraw => self.screen.forget()?,
            Effect::Leave(how) => return Ok(Settled::Left(how)),
            Effect::Hear => (self.hear)(&self.app.logs.at_debug()),
        }
        Ok(Settled::Here)
    }

    /// Handed in here and now, so that orders keep the order of their keys; only the answer is waited for elsewhere.
    fn send(&self, command: Command, purpose: Purpose) {
        let answer = self.commander.post(command.clone());
        let answers = self.answers.clone();
        tokio::spawn(async move {
            let reply = answer.await.unwrap_or_else(|_| Reply::refused("the pipeline is ending"));
            if answers.send(Answer::Replied(command, purpose, reply)).await.is_err() {
                debug!("the console was left before an answer came");
            }
        });
    }

    fn hear(&mut self, answer: Answer) {
        match answer {
            Answer::Replied(asked, purpose, reply) => self.app.hear(asked, purpose, reply, &self.shown),
            Answer::Said { ok, text } => self.app.say(ok, text, &self.shown),
        }
    }

    fn save_log(&self) {
        let view = screens::LogView::of(&self.app, self.theme);
        let (folder, answers) = (self.folder.clone(), self.answers.clone());
        tokio::task::spawn_blocking(move || {
            let lines = view.lines();
            let (ok, text) = match logs::save(&folder, &lines, chrono::Utc::now()) {
                Ok(path) => (true, saved(lines.len(), &path)),
                Err(error) => (false, format!("could not write into {}: {error}", folder.display())),
            };
            if answers.blocking_send(Answer::Said { ok, text }).is_err() {
                debug!("the console was left before the log was written");
            }
        });
    }

    fn come_back(&mut self) -> io::Result<bool> {
        self.screen.reenter()?;
        Ok(true)
    }

    /// False where the frame before is still on its way.
    fn draw(&mut self) -> io::Result<bool> {
        if self.snapshots.has_changed().unwrap_or(false) {
            self.shown = Arc::clone(&self.snapshots.borrow_and_update());
            self.heard_at = Instant::now();
        }
        let silent = self.heard_at.elapsed();
        self.app.silent = (silent > STALE_AFTER).then_some(silent);
        self.app.observe(&self.shown);
        if let Effect::Send(command, purpose) = self.app.follow(&self.shown) {
            self.send(command, purpose);
        }
        let (app, now, theme, log) = (&mut self.app, &self.shown, self.theme, &self.log);
        self.screen.draw(|frame| {
            app.columns = screens::columns(frame.area());
            screens::draw(frame, Scene { now, app, theme, log });
        })
    }
}

#[cfg(test)]
mod words {
    #[test]
    fn the_name_of_a_saved_log_stands_where_no_line_is_cut() {
        let said = super::saved(123, std::path::Path::new("/a/very/long/folder/logs/console-2026-11-22T12-03-04.000.txt"));
        assert!(said.starts_with("console-2026-11-22T12-03-04.000.txt has 123 lines"), "{said}");
    }
}
