//! The terminal: taken on entry and given back whole, whatever ends the console.
//!
//! Raw mode and the alternate screen are left on drop, before a panic of the console is printed, on ^Z, and when a signal
//! ends the process. Every frame is one piece between "begin" and "end synchronized update", so that a slow line never
//! shows half of it; a line that hangs altogether holds up neither keys nor the end.

use std::{
    io::{self, Write as _},
    mem::ManuallyDrop,
    panic,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
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

use super::wire::Wire;

/// A terminal that does not take its last words in this time does not get them.
const GIVE_BACK_MAX: Duration = Duration::from_millis(500);

/// Whether the terminal is in our hands. A process has one; the panic hook and a drop may both want to give it back, and
/// leaving the alternate screen twice would put the cursor over what was printed in between.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Whoever writes to the terminal now writes over the console.
pub fn has_terminal() -> bool {
    TAKEN.load(Ordering::SeqCst)
}

type Hook = Arc<dyn Fn(&panic::PanicHookInfo<'_>) + Sync + Send + 'static>;

/// The terminal in our hands.
pub(super) struct Screen {
    /// Never dropped: it would show the cursor once more, and panic where there is no terminal left to complain on.
    terminal: ManuallyDrop<Terminal<CrosstermBackend<Wire>>>,
    wire: Wire,
    /// The panic hook that was there before ours.
    hook: Hook,
}

impl Screen {
    pub(super) fn enter() -> io::Result<Self> {
        let hook = take_over_panics();
        take()?;
        let wire = Wire::to(io::stdout());
        let backend = CrosstermBackend::new(wire.clone());
        let terminal = Terminal::new(backend).inspect_err(|_| give_back())?;
        Ok(Self { terminal: ManuallyDrop::new(terminal), wire, hook })
    }

    /// Draws unless the frame before is still on its way; false where that is so.
    pub(super) fn draw(&mut self, paint: impl FnOnce(&mut Frame)) -> io::Result<bool> {
        if !self.wire.is_free() {
            return Ok(false);
        }
        queue!(self.terminal.backend_mut(), BeginSynchronizedUpdate)?;
        self.terminal.draw(paint)?;
        queue!(self.terminal.backend_mut(), EndSynchronizedUpdate)?;
        self.wire.ship()?;
        Ok(true)
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
        self.forget()
    }

    /// The next frame is drawn in full. Not by `Terminal::clear`: that asks the terminal where its cursor is and waits for
    /// the answer, before which no key is read, and without which it fails.
    pub(super) fn forget(&mut self) -> io::Result<()> {
        queue!(self.terminal.backend_mut(), Clear(ClearType::All))?;
        self.terminal.swap_buffers();
        Ok(())
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
    let _ = disable_raw_mode();
    let (done, ended) = mpsc::channel();
    // On a thread of its own: the end of the pipeline must not wait for a connection that hangs.
    thread::spawn(move || {
        let mut out = io::stdout();
        // Wiped first: a multiplexer that was resized meanwhile may carry lines of it over to the main screen.
        let _ = execute!(out, EndSynchronizedUpdate, Clear(ClearType::All), cursor::MoveTo(0, 0));
        let _ = execute!(out, DisableFocusChange, LeaveAlternateScreen, cursor::Show);
        let _ = out.flush();
        let _ = done.send(());
    });
    let _ = ended.recv_timeout(GIVE_BACK_MAX);
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
