//! The terminal: taken on entry and given back whole, whatever ends the console.
//!
//! Raw mode and the alternate screen are left on drop, before a panic of the console is printed, on ^Z, and when a signal
//! ends the process. Every frame is one write between "begin" and "end synchronized update", so that a slow line never
//! shows half of it.

use std::{
    io::{self, BufWriter, Stdout, Write as _},
    panic,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use crossterm::{
    cursor,
    event::{DisableFocusChange, EnableFocusChange},
    execute, queue,
    terminal::{
        BeginSynchronizedUpdate, Clear, ClearType, EndSynchronizedUpdate, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
    },
};
use ratatui::{Frame, Terminal, backend::CrosstermBackend};
use rustix::process::{Signal, kill_current_process_group};

/// A frame is built here and leaves in one piece: a full 200×60 screen with colours has its place.
const FRAME_BYTES: usize = 64 * 1024;

/// Whether the terminal is in our hands. A process has one; the panic hook and a drop may both want to give it back, and
/// leaving the alternate screen twice would put the cursor over what was printed in between.
static TAKEN: AtomicBool = AtomicBool::new(false);

type Hook = Arc<dyn Fn(&panic::PanicHookInfo<'_>) + Sync + Send + 'static>;

/// The terminal in our hands.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<BufWriter<Stdout>>>,
    /// The panic hook that was there before ours.
    hook: Hook,
}

impl Screen {
    pub(super) fn enter() -> io::Result<Self> {
        let hook = take_over_panics();
        take()?;
        let backend = CrosstermBackend::new(BufWriter::with_capacity(FRAME_BYTES, io::stdout()));
        let terminal = Terminal::new(backend).inspect_err(|_| give_back())?;
        Ok(Self { terminal, hook })
    }

    pub(super) fn draw(&mut self, paint: impl FnOnce(&mut Frame)) -> io::Result<()> {
        queue!(self.terminal.backend_mut(), BeginSynchronizedUpdate)?;
        self.terminal.draw(paint)?;
        execute!(self.terminal.backend_mut(), EndSynchronizedUpdate)
    }

    /// Stops the process group as the terminal's own ^Z would, so that the shell takes over. What follows is the
    /// continue signal, upon which [`Screen::reenter`] is due; or nothing, where no shell is there to continue us.
    pub(super) fn suspend(&mut self) -> io::Result<()> {
        give_back();
        kill_current_process_group(Signal::TSTP)?;
        Ok(())
    }

    /// Takes the terminal again and forgets what was on it.
    pub(super) fn reenter(&mut self) -> io::Result<()> {
        take()?;
        self.terminal.clear()
    }

    pub(super) fn forget(&mut self) -> io::Result<()> {
        self.terminal.clear()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
        // A hook cannot be exchanged while the thread unwinds.
        if !thread::panicking() {
            let before = Arc::clone(&self.hook);
            panic::set_hook(Box::new(move |info| before(info)));
        }
    }
}

fn take() -> io::Result<()> {
    enable_raw_mode()?;
    TAKEN.store(true, Ordering::SeqCst);
    execute!(io::stdout(), EnterAlternateScreen, EnableFocusChange, cursor::Hide).inspect_err(|_| give_back())
}

/// Each step for itself: a terminal that refuses one may still take the others. There is nobody left to tell.
fn give_back() {
    if !TAKEN.swap(false, Ordering::SeqCst) {
        return;
    }
    let mut out = io::stdout();
    // Wiped first: a multiplexer that was resized meanwhile may carry lines of it over to the main screen.
    let _ = execute!(out, EndSynchronizedUpdate, Clear(ClearType::All), cursor::MoveTo(0, 0));
    let _ = execute!(out, DisableFocusChange, LeaveAlternateScreen, cursor::Show);
    let _ = disable_raw_mode();
    let _ = out.flush();
}

/// A panic of the console gives the terminal back first, so that its words can be read. One of another thread, a
/// stage's, must not scribble over the screen: it goes to the log, and its supervisor sees it end.
fn take_over_panics() -> Hook {
    let before: Hook = Arc::from(panic::take_hook());
    let console = thread::current().id();
    let then = Arc::clone(&before);
    panic::set_hook(Box::new(move |info| {
        if thread::current().id() == console {
            give_back();
            then(info);
        } else {
            tracing::error!(panic = %info, "a thread panicked");
        }
    }));
    before
}
