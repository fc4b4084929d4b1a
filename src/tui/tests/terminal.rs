//! The console on a real terminal: a pty held by a few lines of Python, which the product needs anyway.
//!
//! The child is this test binary again, told by its environment which part to play; without it those tests have nothing to do.

use std::{
    io,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use clap::Parser as _;
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use crate::{
    cli::{self, Cli},
    pipeline::Commander,
    tui::{Watched, term::Screen},
};

use super::bank_day::busy;

/// Names the part that the child plays.
const PART: &str = "LEDGERLINE_TEST_PART";

/// Where the child leaves its last word: it may have no terminal to say it on.
const LAST_WORD: &str = "LEDGERLINE_TEST_LAST_WORD";

/// Holds the terminal's other end and follows the steps: size, wait, keys, storm, count, hang, close.
const TERMINAL: &str = r#"
import fcntl, json, os, pty, random, select, signal, struct, sys, termios, time
steps, argv = json.loads(sys.argv[1]), sys.argv[2:]
pid, fd = pty.fork()
if pid == 0:
    os.execvp(argv[0], argv)
out, counted, limit = bytearray(), None, time.time() + 240
def pump(until, enough=lambda: False):
    while time.time() < min(until, limit) and not enough():
        if select.select([fd], [], [], 0.1)[0]:
            try:
                chunk = os.read(fd, 65536)
            except OSError:
                return
            if not chunk:
                return
            out.extend(chunk)
def size(columns, rows):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack('HHHH', rows, columns, 0, 0))
closed = hung = False
for step in steps:
    kind, rest = step[0], step[1:]
    if kind == 'size':
        size(*rest)
    elif kind == 'wait':
        seen = len(out) if len(rest) > 1 else 0
        pump(limit, lambda: rest[0].encode() in out[seen:])
    elif kind == 'keys':
        os.write(fd, rest[0].encode())
    elif kind == 'storm':
        for _ in range(rest[0]):
            size(random.randint(1, 240), random.randint(1, 70))
            pump(time.time() + 0.005)
    elif kind == 'count':
        before = len(out)
        pump(time.time() + rest[0])
        counted = len(out) - before
    elif kind == 'hang':
        # Nobody reads any more: the line fills up, and whoever writes waits.
        for _ in range(rest[0]):
            os.write(fd, b'\x0c')
            time.sleep(0.05)
        os.kill(pid, signal.SIGHUP)
        hung = True
    elif kind == 'close':
        os.close(fd)
        closed = True
cooked = None
if not closed and not hung:
    pump(limit)
    cooked = bool(termios.tcgetattr(fd)[3] & termios.ICANON) and bool(termios.tcgetattr(fd)[3] & termios.ECHO)
status = None
while time.time() < limit:
    done, code = os.waitpid(pid, os.WNOHANG)
    if done:
        status = os.waitstatus_to_exitcode(code)
        break
    time.sleep(0.02)
else:
    os.kill(pid, 9)
print(json.dumps({'out': out.decode('utf-8', 'replace'), 'counted': counted, 'cooked': cooked, 'status': status}))
"#;

const ENTERED: &str = "\x1b[?1049h";
const LEFT: &str = "\x1b[?1049l";

/// Plays a part on a terminal and reports what came out.
fn on_a_terminal(part: &str, steps: &Value) -> (Value, String) {
    let folder = tempfile::tempdir().unwrap();
    let word = folder.path().join("last_word");
    let output = Command::new("python3")
        .args(["-c", TERMINAL, &steps.to_string()])
        .arg(std::env::current_exe().unwrap())
        .args(["tui::tests::terminal::plays_its_part", "--exact", "--nocapture", "--test-threads=1"])
        .env(PART, part)
        .env(LAST_WORD, &word)
        .env("TERM", "xterm-256color")
        .env_remove("NO_COLOR")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (serde_json::from_slice(&output.stdout).unwrap(), std::fs::read_to_string(word).unwrap_or_default())
}

/// The child. Not a test of its own: without a part to play it has nothing to show.
#[test]
fn plays_its_part() {
    let Ok(part) = std::env::var(PART) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    match part.as_str() {
        "panic" => {
            let mut screen = Screen::enter().unwrap();
            screen.draw(|frame| frame.render_widget("about to fall", frame.area())).unwrap();
            panic!("fallen over");
        }
        _ => {
            let left = runtime.block_on(console());
            std::fs::write(std::env::var(LAST_WORD).unwrap(), left.map_or_else(|error| format!("gone: {error}"), |()| "left".to_owned())).unwrap();
            // The harness has words of its own, and maybe no terminal left that takes them.
            std::process::exit(0);
        }
    }
}

/// The whole console on a busy day, with a snapshot ten times a second.
async fn console() -> io::Result<()> {
    let (sender, snapshots) = watch::channel(Arc::new(busy()));
    let publishing = tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        loop {
            ticks.tick().await;
            sender.send_replace(Arc::new(busy()));
        }
    });
    let stop = CancellationToken::new();
    // As in the real process: a terminal that dies says so with a signal, and does not kill.
    let mut hangup = signal(SignalKind::hangup())?;
    let hung_up = stop.clone();
    tokio::spawn(async move {
        hangup.recv().await;
        hung_up.cancel();
    });
    let (commander, _asked) = Commander::pair();
    let folder = std::env::temp_dir();
    let look = match Cli::parse_from(["ledgerline", "attach"]).into_parts().1 {
        cli::Command::Attach(look) => look,
        other => unreachable!("{other:?}"),
    };
    let left = super::super::run(Watched { snapshots, commander, folder, hear: |_| {}, owned: true }, &look, &stop).await;
    publishing.abort();
    left.map(drop)
}

#[test]
fn a_panic_gives_the_terminal_back_before_it_speaks() {
    let (seen, _) = on_a_terminal("panic", &json!([["size", 80, 24]]));
    let out = seen["out"].as_str().unwrap();
    let at = |text: &str| out.find(text).unwrap_or_else(|| panic!("no {text:?} in {out:?}"));
    assert!(at(ENTERED) < at(LEFT) && at(LEFT) < at("fallen over"), "{out:?}");
    assert_eq!(out.matches(LEFT).count(), 1);
    assert_eq!(seen["cooked"], json!(true));
}

#[test]
fn a_storm_of_resizes_ends_in_a_whole_screen_and_q_leaves_it() {
    let steps =
        json!([["size", 120, 36], ["wait", "All well"], ["storm", 200], ["size", 80, 24], ["keys", "\u{c}"], ["wait", "quit", "again"], ["keys", "qy"]]);
    let (seen, word) = on_a_terminal("console", &steps);
    let out = seen["out"].as_str().unwrap();
    assert_eq!((word.as_str(), &seen["cooked"], &seen["status"]), ("left", &json!(true), &json!(0)), "{}", &out[out.len().saturating_sub(2_000)..]);
    assert_eq!(out.matches(ENTERED).count(), 1);
    assert_eq!(out.matches(LEFT).count(), 1);
}

#[test]
fn an_idle_console_is_quiet_on_the_wire() {
    let steps = json!([["size", 120, 36], ["wait", "quit"], ["count", 1], ["count", 5], ["keys", "qy"]]);
    let (seen, word) = on_a_terminal("console", &steps);
    assert_eq!(word, "left");
    let counted = seen["counted"].as_u64().unwrap();
    assert!(counted < 5 * 1024, "{counted} bytes in 5 s");
}

#[test]
fn a_terminal_that_dies_ends_the_console_and_nothing_hangs() {
    let (seen, word) = on_a_terminal("console", &json!([["size", 80, 24], ["wait", "All well"], ["close"]]));
    assert_eq!(seen["status"], json!(0), "{word}");
    assert!(word == "left" || word.starts_with("gone"), "{word:?}");
}

#[test]
fn a_connection_that_hangs_does_not_keep_the_console_from_ending() {
    let (seen, word) = on_a_terminal("console", &json!([["size", 200, 60], ["wait", "All well"], ["hang", 40]]));
    assert_eq!((&seen["status"], word.as_str()), (&json!(0), "left"));
}
