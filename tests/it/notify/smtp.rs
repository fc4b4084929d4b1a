//! Letters to a real mail server (aiosmtpd), by STARTTLS and by TLS, signed in, and what it refuses.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{OnceLock, mpsc},
};

use ledgerline::{
    notify::{Carrier, Config, Kind, MailState, Outbox},
    secret::Secret,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::Value;

use super::{House, PATIENCE, Postman, about, letter, noon};

const LOCK: &str = include_str!("requirements.lock");
const SERVER: &str = include_str!("server.py");

/// Where aiosmtpd lies: installed once into the user's cache, by the interpreter that has dbt.
fn packages() -> &'static Path {
    static PACKAGES: OnceLock<PathBuf> = OnceLock::new();
    PACKAGES.get_or_init(|| {
        let python = crate::house::python();
        let mark: u64 = LOCK.bytes().chain(python.display().to_string().bytes()).fold(5381, |hash, byte| hash.wrapping_mul(33) ^ u64::from(byte));
        let cache = dirs::cache_dir().expect("a cache directory").join("ledgerline-tests");
        let whole = cache.join(format!("mail-{mark:016x}"));
        if whole.is_dir() {
            return whole;
        }
        std::fs::create_dir_all(&cache).expect("the cache can be written");
        let half = tempfile::Builder::new().prefix("mail-").tempdir_in(&cache).expect("a folder");
        std::fs::write(half.path().join("requirements.lock"), LOCK).expect("written");
        let mut pip = Command::new(python);
        pip.args(["-I", "-m", "pip", "install", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "-r"]);
        let installed = pip.arg(half.path().join("requirements.lock")).arg("--target").arg(half.path().join("packages")).output().expect("pip runs");
        assert!(installed.status.success(), "{}", String::from_utf8_lossy(&installed.stderr));
        // Another process of the tests may have been quicker; then its folder is as good.
        let _ = std::fs::rename(half.path(), &whole);
        whole
    })
}

/// A mail server of this test's own, and what it says.
struct Server {
    process: Child,
    port: u16,
    says: mpsc::Receiver<Value>,
}

impl Server {
    fn start(arguments: &[&str], port: u16) -> Self {
        let mut command = Command::new(crate::house::python());
        command.args(["-c", SERVER, "--port", &port.to_string()]).args(arguments).env("PYTHONPATH", packages().join("packages"));
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("Python runs");
        let lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        let (tell, says) = mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = tell.send(serde_json::from_str(&line).expect("a line of JSON"));
            }
        });
        let mut server = Self { process, port: 0, says };
        server.port = u16::try_from(server.next()["port"].as_u64().expect("a port")).expect("a port");
        server
    }

    /// What it says next.
    fn next(&self) -> Value {
        self.says.recv_timeout(PATIENCE).expect("the mail server says something")
    }

    /// The next letter, whatever it says between.
    fn letter(&self) -> Value {
        std::iter::repeat_with(|| self.next()).find(|it| it["message_id"].is_string()).expect("endless")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A certificate for this machine, by an authority nobody else knows.
struct Authority {
    folder: tempfile::TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut parameters = CertificateParams::new(Vec::new()).expect("no names");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = parameters.self_signed(&key).expect("a certificate");
        let issuer = Issuer::new(parameters, key);
        let server_key = KeyPair::generate().expect("a key");
        let server = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).expect("names").signed_by(&server_key, &issuer);
        let folder = tempfile::tempdir().expect("a folder");
        for (name, pem) in [("ca.pem", certificate.pem()), ("server.pem", server.expect("a certificate").pem()), ("server.key", server_key.serialize_pem())] {
            std::fs::write(folder.path().join(name), pem).expect("written");
        }
        Self { folder }
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn serve(&self, tls: &str, port: u16) -> Server {
        let (certificate, key) = (self.file("server.pem"), self.file("server.key"));
        Server::start(&["--tls", tls, "--certificate", &certificate, "--key", &key, "--user", "night@shift", "--password", "hunter2"], port)
    }

    fn config(&self, transport: &str) -> Config {
        Config {
            transport: transport.parse().expect("a way to send"),
            ca_file: self.file("ca.pem").into(),
            password: Some(Secret::new("hunter2")),
            ..Config::default()
        }
    }
}

async fn post(outbox: &Outbox, run_id: &str) {
    outbox.post(&about(run_id, Kind::LoadReport, None), &letter(run_id), noon()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_leave_by_starttls_and_by_tls_signed_in_and_encrypted() {
    let house = House::new("tls").await;
    let authority = Authority::new();
    for (tls, scheme, query) in [("starttls", "smtp", "?tls=required"), ("tls", "smtps", "")] {
        let server = authority.serve(tls, 0);
        let config = authority.config(&format!("{scheme}://night@shift@127.0.0.1:{}{query}", server.port));
        let outbox = house.outbox(&config);
        post(&outbox, tls).await;
        let postman = Postman::start(&house, &outbox, &config);
        postman.until(|it| it.sent == 1 && it.waiting == 0).await;
        postman.stop().await;
        let kept = server.letter();
        assert_eq!((kept["message_id"].as_str(), kept["user"].as_str()), (Some(format!("<load_report.demo.{tls}@localhost>").as_str()), Some("night@shift")));
        assert_eq!(kept["encrypted"], true, "{kept}");
    }
    house.clean_up().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_whose_certificate_nobody_vouches_for_gets_neither_letter_nor_password() {
    let house = House::new("stranger").await;
    let authority = Authority::new();
    let server = authority.serve("starttls", 0);
    let known = authority.config(&format!("smtp://night@shift@127.0.0.1:{}?tls=required", server.port));
    let config = Config { ca_file: PathBuf::new(), ..known };
    let outbox = house.outbox(&config);
    post(&outbox, "stranger").await;
    let postman = Postman::start(&house, &outbox, &config);
    let seen = postman.until(|it| it.away.is_some()).await;
    assert!(seen.waiting == 1 && seen.away.as_ref().is_some_and(|it| it.contains("certificate")), "{seen:?}");
    postman.stop().await;
    assert!(server.says.try_recv().is_err(), "it heard no sign-in");
    house.clean_up().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_keeps_the_letters_waiting_with_the_reason() {
    let house = House::new("password").await;
    let authority = Authority::new();
    let server = authority.serve("starttls", 0);
    let right = authority.config(&format!("smtp://night@shift@127.0.0.1:{}?tls=required", server.port));
    let outbox = house.outbox(&right);
    post(&outbox, "wrong").await;
    let wrong = Config { password: Some(Secret::new("hunter3")), ..right.clone() };
    let postman = Postman::start(&house, &outbox, &wrong);
    let seen = postman.until(|it| it.away.is_some()).await;
    assert!(
        (seen.waiting, seen.refused) == (1, 0)
            && seen.away.as_ref().is_some_and(|it| it.contains("535") && it.contains("LEDGERLINE__MAIL__PASSWORD") && !it.contains("hunter")),
        "{seen:?}"
    );
    postman.stop().await;
    // With the right one the next start brings it there.
    let postman = Postman::start(&house, &outbox, &right);
    postman.until(|it| it.sent == 1 && it.waiting == 0).await;
    postman.stop().await;
    assert_eq!(server.letter()["message_id"], "<load_report.demo.wrong@localhost>");
    house.clean_up().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_waits_for_a_server_that_is_away_and_goes_later_under_its_message_id() {
    let house = House::new("away").await;
    let authority = Authority::new();
    let server = authority.serve("tls", 0);
    let port = server.port;
    drop(server);
    let config = authority.config(&format!("smtps://night@shift@127.0.0.1:{port}"));
    let outbox = house.outbox(&config);
    post(&outbox, "later").await;
    let postman = Postman::start(&house, &outbox, &config);
    let seen = postman.until(|it| it.away.is_some()).await;
    let waiting = &seen.newest[0];
    assert!(waiting.state == MailState::Waiting && waiting.error.as_ref().is_some_and(|it| it.contains(&port.to_string())), "{seen:?}");
    let server = authority.serve("tls", port);
    postman.until(|it| it.sent == 1 && it.waiting == 0 && it.away.is_none()).await;
    postman.stop().await;
    assert_eq!(server.letter()["message_id"], format!("<{}>", waiting.message_id));
    house.clean_up().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recipient_that_is_refused_for_good_or_for_now_holds_up_no_other_and_none_gets_it_twice() {
    let house = House::new("recipients").await;
    let server = Server::start(&[], 0);
    let to = ["nobody@example.org", "day@example.org", "later@example.org", "night@example.org"].map(|it| it.parse().expect("an address"));
    let config = Config { transport: format!("smtp://127.0.0.1:{}", server.port).parse().expect("valid"), to: to.into(), ..Config::default() };
    let outbox = house.outbox(&config);
    post(&outbox, "many").await;
    let postman = Postman::start(&house, &outbox, &config);
    let sent = postman.until(|it| it.sent == 1 && it.waiting == 0).await;
    postman.stop().await;
    let mail = &sent.newest[0];
    assert!(mail.state == MailState::Sent && mail.tries == 2, "{mail:?}");
    assert!(mail.error.as_ref().is_some_and(|it| it.contains("nobody@example.org: ") && it.contains("550") && !it.contains("451")), "{mail:?}");
    let reached: Vec<String> = (0..3).map(|_| server.letter()["to"].to_string()).collect();
    assert_eq!(reached, [r#"["day@example.org"]"#, r#"["night@example.org"]"#, r#"["later@example.org"]"#]);
    assert!(server.says.try_recv().is_err(), "nobody got it twice");
    house.clean_up().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_starttls_gets_no_letter_that_requires_it() {
    let house = House::new("plain").await;
    let server = Server::start(&[], 0);
    let config = Config { transport: format!("smtp://127.0.0.1:{}?tls=required", server.port).parse().expect("valid"), ..Config::default() };
    assert!(Carrier::new(&config, house.mails.path()).is_ok());
    let outbox = house.outbox(&config);
    post(&outbox, "plain").await;
    let postman = Postman::start(&house, &outbox, &config);
    let seen = postman.until(|it| it.away.is_some()).await;
    assert_eq!((seen.waiting, seen.sent), (1, 0), "{seen:?}");
    postman.stop().await;
    assert!(server.says.try_recv().is_err());
    house.clean_up().await;
}
