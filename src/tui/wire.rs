//! The way to the terminal: frames are built in memory and leave on a thread of their own, one at a time.
//!
//! A connection that hangs holds up that thread and nothing else: keys, signals and the pipeline go on. While a frame is on
//! its way no other is drawn, so that what the terminal shows and what we believe it shows never part.

use std::{
    io::{self, Write},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

/// A full 200×60 screen with colours has its place.
const FRAME_BYTES: usize = 64 * 1024;

/// What is written gathers until it is shipped. Clones share the frame: one writes, the other ships.
#[derive(Debug, Clone)]
pub(super) struct Wire {
    frames: mpsc::Sender<Vec<u8>>,
    way: Arc<Way>,
}

#[derive(Debug, Default)]
struct Way {
    /// Both ends are held by the console's own thread; nobody ever waits here.
    frame: Mutex<Vec<u8>>,
    is_busy: AtomicBool,
    failure: Mutex<Option<io::Error>>,
}

impl Wire {
    pub(super) fn to(mut terminal: impl Write + Send + 'static) -> Self {
        let (frames, shipped) = mpsc::channel::<Vec<u8>>();
        let way = Arc::new(Way::default());
        let seen = Arc::clone(&way);
        thread::spawn(move || {
            for frame in shipped {
                if let Err(error) = terminal.write_all(&frame).and_then(|()| terminal.flush()) {
                    *open(&seen.failure) = Some(error);
                }
                seen.is_busy.store(false, Ordering::Release);
            }
        });
        Self { frames, way }
    }

    /// Whether the last frame has left.
    pub(super) fn is_free(&self) -> bool {
        !self.way.is_busy.load(Ordering::Acquire)
    }

    /// Sends what was written as one piece. Fails as the frame before failed.
    pub(super) fn ship(&self) -> io::Result<()> {
        if let Some(error) = open(&self.way.failure).take() {
            return Err(error);
        }
        self.way.is_busy.store(true, Ordering::Release);
        let frame = std::mem::replace(&mut *open(&self.way.frame), Vec::with_capacity(FRAME_BYTES));
        self.frames.send(frame).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

fn open<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        open(&self.way.frame).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    /// A frame leaves whole, by [`Wire::ship`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes each piece only when it is let go.
    struct Slow(mpsc::Receiver<()>, mpsc::Sender<Vec<u8>>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
            let _ = self.1.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_terminal_that_hangs_holds_up_nobody_and_gets_whole_frames() {
        let (go, waits) = mpsc::channel();
        let (seen_in, seen) = mpsc::channel();
        let mut wire = Wire::to(Slow(waits, seen_in));
        write!(wire, "one").unwrap();
        write!(wire, " frame").unwrap();
        wire.flush().unwrap();
        wire.ship().unwrap();
        assert!(!wire.is_free());
        go.send(()).unwrap();
        assert_eq!(seen.recv().unwrap(), b"one frame");
        drop(go);
        wire.write_all(b"lost").unwrap();
        wire.ship().unwrap();
        while !wire.is_free() {
            thread::yield_now();
        }
        assert!(wire.ship().is_err());
    }
}
