//! The outbox on a real PostgreSQL, with files and with a small SMTP server; with a whole one in `smtp`.

mod smtp;

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use chrono::{DateTime, TimeDelta, Utc};
use ledgerline::{
    notify::{self, About, Carrier, Config, Kind, Mail, MailState, Outbox, Stats, alarm::Word, letter::Letter},
    stage::{self, Phase},
};
use sqlx::Executor as _;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::house::Database;

const PATIENCE: Duration = Duration::from_secs(30);

/// A database and a directory of the test's own.
struct House {
    database: Database,
    mails: tempfile::TempDir,
}

impl House {
    async fn new(name: &str) -> Self {
        Self { database: Database::create(&format!("notify_{name}")).await, mails: tempfile::tempdir().unwrap() }
    }

    async fn on_database(&self, statement: &'static str) {
        self.database.connect().await.execute(statement).await.unwrap();
    }

    fn outbox(&self, config: &Config) -> Outbox {
        Outbox::new(&self.database.url, config)
    }

    fn files(&self) -> Vec<(String, String)> {
        files_in(self.mails.path())
    }

    async fn clean_up(self) {
        self.database.drop().await;
    }
}

fn files_in(directory: &Path) -> Vec<(String, String)> {
    let mut files: Vec<(String, String)> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read_to_string(&path).unwrap())
        })
        .collect();
    files.sort();
    files
}

struct Postman {
    stats: watch::Receiver<Stats>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), notify::Error>>,
}

impl Postman {
    fn start(house: &House, outbox: &Outbox, config: &Config) -> Self {
        let (ours, theirs) = stage::control(Stats::default(), Phase::Running, &CancellationToken::new());
        let task = tokio::spawn(notify::run(outbox.clone(), Carrier::new(config, house.mails.path()).unwrap(), theirs));
        Self { stats: ours.stats, stop: ours.stop, task }
    }

    async fn until(&self, what: impl Fn(&Stats) -> bool) -> Stats {
        let mut stats = self.stats.clone();
        let found = timeout(PATIENCE, stats.wait_for(|it| what(it))).await;
        found.unwrap_or_else(|_| panic!("waited in vain: {:#?}", self.stats.borrow())).unwrap().clone()
    }

    async fn stop(self) {
        self.stop.cancel();
        timeout(PATIENCE, self.task).await.expect("stops").unwrap().expect("stops well");
    }
}

fn letter(subject: &str) -> Letter {
    Letter { subject: subject.to_owned(), text: format!("{subject}, plain"), html: format!("<p>{subject}</p>") }
}

fn about(run_id: &str, kind: Kind, task: Option<(&str, u32)>) -> About {
    About { dag_id: "demo".into(), run_id: run_id.into(), kind, task: task.map(|it| (it.0.to_owned(), it.1)) }
}

fn noon() -> DateTime<Utc> {
    "2026-11-22T12:00:00Z".parse().unwrap()
}

#[tokio::test]
async fn a_letter_recorded_twice_is_one_file() {
    let house = House::new("once").await;
    let config = Config::default();
    let outbox = house.outbox(&config);
    let report = about("run_1", Kind::LoadReport, None);
    assert!(outbox.post(&report, &letter("loaded"), noon()).await.unwrap());
    assert!(!outbox.post(&report, &letter("loaded again"), noon() + TimeDelta::seconds(1)).await.unwrap());
    let postman = Postman::start(&house, &outbox, &config);
    postman.until(|it| it.sent == 1).await;
    // What is recorded while the postman is there leaves at once, what is recorded before a stop leaves too.
    outbox.post(&about("run_2", Kind::LoadReport, None), &letter("loaded"), noon()).await.unwrap();
    postman.stop().await;

    let files = house.files();
    assert_eq!(
        files.iter().map(|it| it.0.as_str()).collect::<Vec<_>>(),
        ["20261122T120000.000000Z-load_report.demo.run_1.eml", "20261122T120000.000000Z-load_report.demo.run_2.eml"]
    );
    assert!(files[0].1.contains("Message-ID: <load_report.demo.run_1@localhost>") && files[0].1.contains("loaded, plain"), "{}", files[0].1);
    let listed: Vec<Mail> = outbox.since(noon()).await.unwrap();
    assert!(listed.len() == 2 && listed.iter().all(|it| it.state == MailState::Sent && it.to == ["operations@localhost"]), "{listed:?}");
    house.clean_up().await;
}

#[tokio::test]
async fn a_crash_between_writing_the_file_and_noting_it_leaves_one_file() {
    let house = House::new("crash").await;
    let config = Config::default();
    let outbox = house.outbox(&config);
    outbox.post(&about("run_1", Kind::TransformationReport, None), &letter("built"), noon()).await.unwrap();
    let postman = Postman::start(&house, &outbox, &config);
    postman.until(|it| it.sent == 1).await;
    postman.stop().await;
    let before = house.files();

    // What a kill at that moment leaves behind: the file, and a row that still waits.
    house.on_database("update ledgerline.mail_outbox set state = 'waiting', sent_at = null, tries = 0").await;
    let postman = Postman::start(&house, &outbox, &config);
    postman.until(|it| it.sent == 1 && it.waiting == 0).await;
    postman.stop().await;
    assert_eq!(house.files(), before);
    house.clean_up().await;
}

/// Answers as a mail server does; the first connections are turned away.
struct Server {
    port: u16,
    received: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Server {
    async fn start(turned_away: usize, answer_to_data: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let received = Arc::new(Mutex::new(Vec::new()));
        let inbox = Arc::clone(&received);
        let task = tokio::spawn(async move {
            let mut connections = 0;
            while let Ok((stream, _)) = listener.accept().await {
                connections += 1;
                let _ = if connections <= turned_away { turn_away(stream).await } else { serve(stream, &inbox, answer_to_data).await };
            }
        });
        Self { port, received, task }
    }
}

async fn turn_away(mut stream: TcpStream) -> std::io::Result<()> {
    stream.write_all(b"421 too busy\r\n").await
}

async fn serve(stream: TcpStream, inbox: &Mutex<Vec<String>>, answer_to_data: &str) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    write.write_all(b"220 here\r\n").await?;
    while let Some(line) = lines.next_line().await? {
        let answer = match line.get(..4).unwrap_or_default().to_ascii_uppercase().as_str() {
            "DATA" => {
                write.write_all(b"354 go on\r\n").await?;
                let mut message = String::new();
                while let Some(line) = lines.next_line().await?.filter(|line| line != ".") {
                    message.push_str(&line);
                    message.push('\n');
                }
                if answer_to_data.starts_with("250") {
                    inbox.lock().unwrap().push(message);
                }
                answer_to_data
            }
            "QUIT" => "221 bye",
            _ => "250 fine",
        };
        write.write_all(format!("{answer}\r\n").as_bytes()).await?;
    }
    Ok(())
}

fn by_smtp(port: u16) -> Config {
    Config { transport: format!("smtp://127.0.0.1:{port}").parse().unwrap(), ..Config::default() }
}

#[tokio::test]
async fn letters_wait_for_a_server_that_is_away_and_leave_in_order_once_it_is_back() {
    let house = House::new("smtp").await;
    let server = Server::start(1, "250 kept").await;
    let config = by_smtp(server.port);
    let outbox = house.outbox(&config);
    for (place, name) in ["first", "second"].into_iter().enumerate() {
        outbox.post(&about(name, Kind::LoadReport, None), &letter(name), noon() + TimeDelta::seconds(place as i64)).await.unwrap();
    }
    let postman = Postman::start(&house, &outbox, &config);
    let away = postman.until(|it| it.waiting == 2 && it.away.is_some()).await;
    assert!(away.away.as_ref().is_some_and(|it| it.contains("too busy")), "{away:?}");
    postman.until(|it| it.sent == 2 && it.waiting == 0 && it.away.is_none()).await;
    postman.stop().await;
    let mut subjects: Vec<String> = server
        .received
        .lock()
        .unwrap()
        .iter()
        .flat_map(|it| it.lines().filter(|line| line.starts_with("Subject: ")).map(str::to_owned).collect::<Vec<_>>())
        .collect();
    subjects.sort();
    assert_eq!(subjects, ["Subject: first", "Subject: second"]);
    server.task.abort();
    house.clean_up().await;
}

#[tokio::test]
async fn a_letter_the_server_refuses_for_good_is_kept_as_refused_and_holds_up_nothing() {
    let house = House::new("refused").await;
    let server = Server::start(0, "550 no such mailbox").await;
    let config = by_smtp(server.port);
    let outbox = house.outbox(&config);
    outbox.post(&about("run_1", Kind::LoadReport, None), &letter("loaded"), noon()).await.unwrap();
    let postman = Postman::start(&house, &outbox, &config);
    let seen = postman.until(|it| it.refused == 1).await;
    assert!(seen.waiting == 0 && seen.newest[0].error.as_ref().is_some_and(|it| it.contains("no such mailbox")), "{seen:?}");
    postman.stop().await;
    server.task.abort();
    house.clean_up().await;
}

#[tokio::test]
async fn a_task_that_keeps_failing_is_written_about_once_an_hour_and_once_when_it_recovers() {
    let house = House::new("alarm").await;
    let outbox = house.outbox(&Config::default());
    let mut words = Vec::new();
    for (run, minutes) in [("run_1", 0), ("run_1", 0), ("run_2", 1), ("run_3", 59), ("run_4", 61)] {
        let failure = about(run, Kind::Failure, Some(("load_customers", 3)));
        words.push(outbox.failed(&failure, |held| letter(&format!("failed, {held} unmentioned")), noon() + TimeDelta::minutes(minutes)).await.unwrap());
    }
    assert_eq!(words, [Word::Failure { held: 0 }, Word::Nothing, Word::Hold, Word::Hold, Word::Failure { held: 2 }]);

    let over = ["load_customers".to_owned(), "load_accounts".to_owned()];
    for _ in 0..2 {
        let recovered = |task_id: &str, _, failures| letter(&format!("{task_id} recovered after {failures}"));
        outbox.succeeded("demo", "run_5", &over, recovered, noon() + TimeDelta::minutes(90)).await.unwrap();
    }
    let subjects: Vec<String> = outbox.since(noon()).await.unwrap().into_iter().map(|it| it.subject).collect();
    assert_eq!(subjects, ["failed, 0 unmentioned", "failed, 2 unmentioned", "load_customers recovered after 4"]);
    house.clean_up().await;
}
