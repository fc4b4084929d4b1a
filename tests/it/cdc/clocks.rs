//! The capture in a process whose clock jumps: by years, ahead and back, while it runs.

use std::{fs, os::unix::fs::FileExt as _, path::PathBuf, process::Command, time::Duration};

use ledgerline::cdc::{self, Config};
use tempfile::TempDir;

use super::{
    crashes::Process,
    days::{PAYMENTS, finish, holds_each_change_once, parsed, write_payments},
    house::{Database, PATIENCE, Reader, config},
};
use crate::lane::Stream;

const YEAR: i64 = 365 * 24 * 3600;

/// A clock for one process, made of what libc asks the system for.
struct Clock {
    dir: TempDir,
    offset: fs::File,
}

impl Clock {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/cdc/clock.c");
        let compiled = Command::new("cc").args(["-shared", "-fPIC", "-O1", source, "-o"]).arg(Self::library(&dir)).status().expect("a C compiler");
        assert!(compiled.success());
        let offset = fs::File::create_new(dir.path().join("offset")).expect("a file");
        let clock = Self { dir, offset };
        clock.is_off_by(0);
        clock
    }

    fn library(dir: &TempDir) -> PathBuf {
        dir.path().join("clock.so")
    }

    fn is_off_by(&self, seconds: i64) {
        self.offset.write_all_at(&seconds.to_ne_bytes(), 0).expect("written");
    }

    fn environment(&self) -> [(&'static str, String); 2] {
        let path = |path: PathBuf| path.to_str().expect("text").to_owned();
        [("LD_PRELOAD", path(Self::library(&self.dir))), ("LEDGERLINE_TEST_CLOCK", path(self.dir.path().join("offset")))]
    }
}

/// A capture of a table, with a clock of its own.
struct Scene {
    database: Database,
    stream: Stream,
    config: Config,
    clock: Clock,
    process: Process,
    topic: String,
}

impl Scene {
    async fn new(test: &str, stream: Stream) -> Self {
        let database = Database::create(test).await;
        database.run(PAYMENTS).await;
        let config = Config { topic_prefix: stream.prefix.clone(), ..config(&database) };
        let clock = Clock::new();
        let process = Process::start_with(&database, &stream.address, &config, &clock.environment());
        let topic = format!("{}.public.payments", stream.prefix);
        Self { database, stream, config, clock, process, topic }
    }

    /// Waits until the broker has everything, and the slot knows.
    async fn drained(&self) {
        let end = self.database.wal_position().await;
        let confirmed = async {
            loop {
                let standing = cdc::standing(&self.database.url, &self.database.url, &self.config).await.expect("a standing");
                if standing.health.is_some_and(|it| it.confirmed_flush_lsn >= end) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(PATIENCE, confirmed).await.expect("all is confirmed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_by_years_ahead_and_back_changes_the_times_of_events_and_nothing_else() {
    let scene = Scene::new("jumps", Stream::own().await).await;
    let writer = write_payments(scene.database.url.clone(), 1..5_000);
    for (id, years) in [(10_001, 0), (10_002, 3), (10_003, -5), (10_004, 0)] {
        scene.clock.is_off_by(years * YEAR);
        // The writer may be done by now: this row is written, and so captured, by that clock in any case.
        scene.database.run(&format!("insert into payments values ({id}, 1.00, 'by that clock');")).await;
        scene.drained().await;
    }
    finish(writer).await;
    scene.drained().await;
    let records = Reader::start(&scene.stream.address).read(&scene.topic);
    scene.process.kill();

    holds_each_change_once(&records, &scene.database).await;
    let now = chrono::Utc::now().timestamp();
    let years_off: Vec<i64> =
        records.iter().filter_map(parsed).filter_map(|it| Some((it["ts_ms"].as_i64()? / 1000 - now + YEAR / 2).div_euclid(YEAR))).collect();
    assert!([0, 3, -5].iter().all(|it| years_off.contains(it)), "the clock did jump");
    // What PostgreSQL's clock said stays as it was.
    let committed = records.iter().filter_map(parsed).filter_map(|it| it["source"]["ts_ms"].as_i64());
    assert!(committed.map(|it| it / 1000).all(|it| (it - now).abs() < YEAR / 2));
}

/// Our own broker takes any time; Kafka's takes none from more than an hour ahead.
#[cfg(feature = "stack")]
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_far_ahead_of_the_brokers_is_told_and_once_it_is_right_everything_arrives() {
    use super::days::{held, replayed};

    let scene = Scene::new("ahead", Stream::open().await).await;
    scene.database.run("insert into payments values (1, 1.00, 'before');").await;
    scene.drained().await;
    scene.clock.is_off_by(3 * YEAR);
    scene.database.run("insert into payments values (2, 1.00, 'ahead');").await;
    let told = scene.process.until_told("this machine's clock says");
    assert!(["message.timestamp.after.max.ms", "Set the clock"].iter().all(|it| told.contains(it)), "{told}");
    scene.database.run("insert into payments values (3, 1.00, 'ahead');").await;
    scene.clock.is_off_by(0);
    scene.drained().await;
    let (rows, _) = replayed(&Reader::start(&scene.stream.address).read(&scene.topic));
    assert_eq!(rows, held(&scene.database).await);
    scene.process.kill();
}
