//! A disk without room, for PostgreSQL, the broker and the lake each: it stops taking, says so, goes on by itself, loses nothing.
//!
//! Each has a small file system of its own, mounted over its folder where only the test and what it starts can see it:
//! the test runs once more in a mount namespace, which root may make and most systems let every user make.

use std::{
    ffi::OsString,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use sqlx::{Connection as _, PgConnection};

use super::{Bank, Running, proof, until_flowing};

/// In a test's second life: the folder whose bank has a small disk.
const FOLDER: &str = "LEDGERLINE_TEST_SMALL_DISK";

/// Mounts a small file system on `$2`, then goes on as the user who asked. `$1` is its size.
const AS_ROOT: &str = r#"mount -t tmpfs -o size="$1",mode=0711 small "$2" && shift 2 && exec "$@""#;
/// The same where the caller is no root: root in a world of his own, for as long as the mount takes.
const AS_USER: &str = r#"mount -t tmpfs -o size="$1",mode=0711 small "$2" && shift 2 && exec unshare --user --map-user="$ME" --map-group="$MINE" "$@""#;

/// Runs `body` on a bank whose `part` has a file system of `size`.
fn on_a_small_disk(test: &str, part: &str, size: &str, body: fn(&Bank, &Path)) {
    if let Some(folder) = std::env::var_os(FOLDER) {
        let bank = Bank::at(Path::new(&folder));
        return body(&bank, &bank.path(".ledgerline").join(part));
    }
    let bank = Bank::new();
    let place = bank.path(".ledgerline").join(part);
    std::fs::create_dir_all(&place).expect("made");
    // As after a first start that was cut short: the folder is ours.
    std::fs::write(bank.path(".ledgerline/lock"), "").expect("written");
    let mut command = Command::new("unshare");
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    if user.is_root() {
        command.args(["--mount", "sh", "-c", AS_ROOT]);
    } else {
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", AS_USER]);
    }
    command.env("ME", user.to_string()).env("MINE", group.to_string());
    let test: OsString = format!("bad_days::disk::{test}").into();
    command.args(["sh", size]).arg(&place).arg(std::env::current_exe().expect("this program")).arg("--exact").arg(test).arg("--nocapture");
    let output = command.env(FOLDER, bank.path("")).output().expect("unshare, of util-linux");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        !said.contains("unshare failed"),
        "a small disk takes root, or a system that lets users make namespaces; leave these tests out with `--skip disk::`: {said}"
    );
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 passed"), "the test was not found in its second life: {said}");
}

/// A file that takes all the room there is.
struct Filler(PathBuf);

impl Filler {
    fn fill(place: &Path) -> Self {
        let path = place.join("filler");
        let mut file = std::fs::File::create(&path).expect("made");
        let block = vec![0_u8; 64 << 10];
        while file.write_all(&block).is_ok() {}
        Self(path)
    }

    fn make_room(self) {
        std::fs::remove_file(self.0).expect("removed");
    }
}

/// Fills the disk under a running pipeline, waits until it says so with the remedy, makes room, and wants everything back.
fn fill_and_make_room(bank: &Bank, place: &Path, name: &str, while_full: impl FnOnce(&mut Running)) {
    let mut pipeline = Running::start(bank, &["run", "--no-tui", "--rate", "50"]);
    until_flowing(&mut pipeline);
    let filler = Filler::fill(place);
    let verdict = format!(" {name}: ");
    // PostgreSQL may have died of it by itself before it could say more than that.
    pipeline.until_said(&[&verdict, "is full", " free "]);
    while_full(&mut pipeline);
    filler.make_room();
    until_flowing(&mut pipeline);
    pipeline.end();

    bank.succeeds(&["run", "--no-tui", "--for", "1s", "--rate", "50", "--summary", "summary.json"]);
    assert_eq!(bank.summary()["reconcile"]["ok"], true, "{}", bank.summary()["reconcile"]);
    bank.succeeds(&["lake", "verify"]);
    tokio::runtime::Runtime::new().expect("a runtime").block_on(proof(bank));
}

#[test]
fn a_full_disk_under_the_broker_is_told_and_waited_out() {
    on_a_small_disk("a_full_disk_under_the_broker_is_told_and_waited_out", "kafka", "200m", |bank, place| fill_and_make_room(bank, place, "kafka", |_| ()));
}

#[test]
fn a_full_disk_under_the_lake_is_told_and_waited_out() {
    on_a_small_disk("a_full_disk_under_the_lake_is_told_and_waited_out", "s3", "200m", |bank, place| fill_and_make_room(bank, place, "s3", |_| ()));
}

/// PostgreSQL refuses what grows its tables, but it dies where its log cannot grow; then it cannot start either.
#[test]
fn a_full_disk_that_postgresql_dies_of_is_told_and_waited_out() {
    on_a_small_disk("a_full_disk_that_postgresql_dies_of_is_told_and_waited_out", "postgres", "600m", |bank, place| {
        fill_and_make_room(bank, place, "postgres", |pipeline| {
            let services = bank.json(&["services", "--json"]);
            tokio::runtime::Runtime::new().expect("a runtime").block_on(want_log(services["source"].as_str().expect("an address")));
            pipeline.until_said(&["PostgreSQL does not start", "disk is full", "free disk space"]);
        });
    });
}

/// Takes one piece of log after the other, until PostgreSQL is gone.
async fn want_log(address: &str) {
    const PIECES_MAX: usize = 200;
    for _ in 0..PIECES_MAX {
        let Ok(mut connection) = PgConnection::connect(address).await else { return };
        let switched = sqlx::query("select pg_switch_wal() from pg_logical_emit_message(true, 'test', 'a word, so that there is something to switch behind')");
        if switched.execute(&mut connection).await.is_err() {
            return;
        }
    }
    panic!("its log still finds room");
}
