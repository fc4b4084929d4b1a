//! Bad days of a real store: a MinIO of the test's own that dies, loses its bucket, or knows other keys, under money that moves.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::Instant,
};

use crate::{
    binary::{Bank, PATIENCE, Running, said_with},
    lane::stack,
};

const KEY: &str = "ledgerline";
const SECRET: &str = "a-minio-of-its-own";

/// A MinIO of one test's own, which it may kill.
struct Minio {
    process: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl Minio {
    fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a free port").port();
        let dir = tempfile::tempdir().expect("a directory");
        let started = Self { process: Self::serve(port, dir.path()), port, dir };
        started.until_it_answers();
        started
    }

    fn serve(port: u16, dir: &Path) -> Child {
        let mut command = Command::new(stack().expect("the lane of the real servers").minio());
        command.args(["server", "--quiet", "--address", &format!("127.0.0.1:{port}")]).arg(dir);
        command.envs([("MINIO_ROOT_USER", KEY), ("MINIO_ROOT_PASSWORD", SECRET), ("MINIO_BROWSER", "off"), ("MINIO_UPDATE", "off")]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("MinIO runs")
    }

    fn until_it_answers(&self) {
        let deadline = Instant::now() + PATIENCE;
        let ready = || -> std::io::Result<bool> {
            let mut asked = TcpStream::connect(("127.0.0.1", self.port))?;
            asked.write_all(b"GET /minio/health/ready HTTP/1.0\r\nhost: minio\r\n\r\n")?;
            let mut answer = String::new();
            asked.read_to_string(&mut answer)?;
            Ok(answer.starts_with("HTTP/1.0 200"))
        };
        while !ready().unwrap_or(false) {
            assert!(Instant::now() < deadline, "MinIO does not answer");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    fn die(&mut self) {
        self.process.kill().expect("it runs");
        self.process.wait().expect("our child");
    }

    fn come_back(&mut self) {
        self.process = Self::serve(self.port, self.dir.path());
        self.until_it_answers();
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The binary at work on this store, and for the rest on the servers of this run.
    fn command(&self, bank: &Bank, arguments: &[&str]) -> Command {
        let mut command = bank.command(arguments);
        command.env("LEDGERLINE__LAKE__ENDPOINT", self.endpoint());
        command.envs([("LEDGERLINE__LAKE__ACCESS_KEY_ID", KEY), ("LEDGERLINE__LAKE__SECRET_ACCESS_KEY", SECRET)]);
        command
    }

    /// Where the bucket's objects of payments lie, once there are some.
    fn bucket_with_payments(&self) -> Option<std::path::PathBuf> {
        let buckets = std::fs::read_dir(self.dir.path()).ok()?.flatten().map(|it| it.path());
        buckets.into_iter().find(|it| it.join("raw/transactions").is_dir())
    }
}

impl Drop for Minio {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const MOVES_MONEY: [&str; 8] = ["run", "--no-tui", "--for", "25s", "--rate", "50", "--summary", "summary.json"];

#[test]
fn minio_that_dies_under_load_is_told_and_nothing_is_lost() {
    let (bank, mut minio) = (Bank::on_servers(), Minio::start());
    let mut pipeline = Running::of(&bank, minio.command(&bank, &MOVES_MONEY));
    pipeline.until("payments in the lake", |_| minio.bucket_with_payments());
    minio.die();
    let told = pipeline.until_said(&["S3 away", "no answer from", "records wait in Kafka, none lost"]);
    assert!(told.contains(&minio.endpoint()) && told.contains("Connection refused") && !told.contains("DispatchFailure"), "{told}");
    minio.come_back();
    pipeline.ends_with(0);
    assert_eq!(bank.summary()["reconcile"]["ok"], true, "{}", bank.summary()["reconcile"]);
    let verified = minio.command(&bank, &["lake", "verify"]).output().expect("the binary runs");
    said_with(&verified, 0, &["lake", "verify"]);
}

#[test]
fn a_bucket_that_is_removed_under_the_pipeline_is_named_with_what_it_means() {
    let (bank, mut minio) = (Bank::on_servers(), Minio::start());
    let mut pipeline = Running::of(&bank, minio.command(&bank, &MOVES_MONEY));
    let bucket = pipeline.until("payments in the lake", |_| minio.bucket_with_payments());
    let away = minio.dir.path().join("..").join(format!("{}-away-{}", bucket.file_name().expect("a name").display(), std::process::id()));
    // Not under a server that runs: an object on its way would make the bucket's folder anew.
    minio.die();
    std::fs::rename(&bucket, &away).expect("moved away");
    minio.come_back();
    let told = pipeline.until_said(&["WARN", "is gone, and the lake with it", "what has not landed stays in Kafka"]);
    assert!(told.contains(&minio.endpoint()) && told.contains("bring it back with what it held"), "{told}");
    // Its owner brings it back as it was.
    minio.die();
    std::fs::rename(&away, &bucket).expect("brought back");
    minio.come_back();
    pipeline.ends_with(0);
    assert_eq!(bank.summary()["reconcile"]["ok"], true, "{}", bank.summary()["reconcile"]);
}

#[test]
fn keys_that_minio_does_not_take_are_told_apart_and_end_the_start() {
    let (bank, minio) = (Bank::on_servers(), Minio::start());
    for (variable, why) in [("ACCESS_KEY_ID", "403 InvalidAccessKeyId"), ("SECRET_ACCESS_KEY", "403 SignatureDoesNotMatch")] {
        let arguments = ["run", "--no-tui", "--for", "5s"];
        let refused = minio.command(&bank, &arguments).env(format!("LEDGERLINE__LAKE__{variable}"), "somebody-elses").output().expect("the binary runs");
        let said = said_with(&refused, 3, &arguments);
        let last: Vec<&str> = said.lines().rev().take(2).collect();
        assert!(last[1].contains(why) && last[1].contains(&minio.endpoint()) && !said.contains("ErrorMetadata"), "{said}");
        assert!(last[0].contains("LEDGERLINE__LAKE__SECRET_ACCESS_KEY"), "{said}");
    }
}
