//! A broker in a process of its own: killed without warning, and with a disk that is full for a while.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
};

use kafka_protocol::messages::InitProducerIdRequest;
use ledgerline::{
    embedded::kafka::{Broker, Config},
    units::Size,
};
use rdkafka::{
    Message, Offset,
    producer::{FutureProducer, FutureRecord},
};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio::signal::unix::{SignalKind, signal};

use super::{
    by_librdkafka::{client, numbered, reader, take},
    raw::{Client, batch},
    small,
};

const DIR: &str = "LEDGERLINE_TEST_BROKER_DIR";
const PORT: &str = "LEDGERLINE_TEST_BROKER_PORT";
const READY: &str = "broker ready on ";
const STORAGE: i16 = 56;
/// Sent to a process that writes beyond its file size limit; ends it unless handled.
const SIGXFSZ: i32 = 25;

/// Not a test by itself: this very binary, started once more by [`Process::start`], is the broker.
#[test]
fn a_broker_in_a_process_of_its_own() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let port = std::env::var(PORT).unwrap().parse().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let _too_large = signal(SignalKind::from_raw(SIGXFSZ)).unwrap();
        let config = Config { port, segment_bytes: Size(256 << 10), ..small(Path::new(&dir)) };
        let broker = Broker::start(config).await.unwrap();
        println!("\n{READY}{}", broker.address());
        // Until the test that started us lets go, or is gone itself.
        tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await.unwrap().unwrap();
        broker.stop().await;
    });
}

struct Process {
    child: Child,
    address: String,
}

impl Process {
    fn start(dir: &Path, port: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "kafka::crash::a_broker_in_a_process_of_its_own", "--nocapture"]).env(DIR, dir).env(PORT, port);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.find_map(|line| line.unwrap().strip_prefix(READY).map(str::to_owned)).expect("the broker starts");
        Self { child, address: ready }
    }

    fn port(&self) -> String {
        self.address.rsplit(':').next().unwrap().to_owned()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn limit_files(&self, bytes: Option<u64>) {
        let pid = Pid::from_child(&self.child);
        prlimit(Some(pid), Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_killed_broker_has_every_record_it_acknowledged_once_and_in_place() {
    let rounds = std::env::var("LEDGERLINE_TEST_CRASHES").ok().and_then(|it| it.parse().ok()).unwrap_or(4);
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::start(dir.path(), "0");
    Client::connect(&process.address).create("t", 2);
    let mut config = client(&process.address);
    config.set("enable.idempotence", "true").set("linger.ms", "1").set("compression.type", "lz4").set("batch.num.messages", "100");
    let producer: FutureProducer = config.set("reconnect.backoff.max.ms", "200").create().unwrap();
    let values = numbered(0..1_500);
    let mut acknowledged: BTreeMap<(i32, i64), String> = BTreeMap::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for round in 0..rounds {
        let sent: Vec<String> = values.iter().map(|it| format!("{round} {it}")).collect();
        let queued = sent.iter().enumerate().map(|(n, it)| {
            let partition = i32::from(n % 2 == 1);
            producer.send_result(FutureRecord::to("t").payload(it).key("k").partition(partition)).unwrap()
        });
        let mut queued = queued.collect::<Vec<_>>().into_iter().zip(sent.clone());
        // Killed after some acknowledgements, a different number each time, with more records on their way.
        let before = 37 + round * 211 % 1_200;
        let note = |(delivery, value): (rdkafka::producer::DeliveryFuture, String)| {
            let delivered = runtime.block_on(delivery).unwrap().unwrap();
            ((delivered.partition, delivered.offset), value)
        };
        acknowledged.extend(queued.by_ref().take(before).map(note));
        process.kill();
        process = Process::start(dir.path(), &process.port());
        acknowledged.extend(queued.map(note));
    }
    let total = rounds * values.len();
    assert_eq!(acknowledged.len(), total, "every record has an offset of its own");
    for partition in [0, 1] {
        let expected: Vec<&String> = acknowledged.iter().filter(|(lane, _)| lane.0 == partition).map(|(_, value)| value).collect();
        let read = take(&reader(&process.address, "t", partition, Offset::Beginning), expected.len());
        assert_eq!(read.iter().map(Message::offset).collect::<Vec<_>>(), (0..).take(expected.len()).collect::<Vec<_>>());
        assert!(read.iter().zip(expected).all(|(read, value)| read.payload() == Some(value.as_bytes())));
    }
}

#[test]
fn a_full_disk_refuses_what_does_not_fit_and_takes_it_once_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::start(dir.path(), "0");
    let mut client = Client::connect(&process.address);
    client.create("t", 1);
    let producer = client.ask(4, &InitProducerIdRequest::default().with_transactional_id(None)).producer_id.0;
    let value = vec![b'x'; 30_000];
    let nth = |n: i32| batch(&[&value, b"tail"], 0, (producer, 0, n * 2));
    process.limit_files(Some(100_000));
    let mut n = 0;
    let refused = loop {
        match client.produce("t", 0, nth(n)) {
            (0, base_offset) => assert_eq!(base_offset, i64::from(n) * 2),
            (error, _) => break error,
        }
        n += 1;
    };
    assert_eq!((refused, n), (STORAGE, 3), "three batches fit; of the fourth a part was written and is cut again");
    assert_eq!(client.produce("t", 0, nth(n)).0, STORAGE);
    assert_eq!(client.fetch("t", 0, 4).1, 6, "what is there is served");
    let size = std::fs::read_dir(dir.path().join("logs/1-t/0")).unwrap().map(|it| it.unwrap()).find(|it| it.path().extension() == Some("log".as_ref()));
    assert!(size.unwrap().metadata().unwrap().len() < 91_000);

    process.limit_files(None);
    for n in 3..20 {
        assert_eq!(client.produce("t", 0, nth(n)), (0, i64::from(n) * 2), "the producer's next try goes on where it was refused");
    }
    process.kill();
    process = Process::start(dir.path(), &process.port());
    let mut client = Client::connect(&process.address);
    assert_eq!(client.fetch("t", 0, 39).1, 40);
    assert_eq!(client.produce("t", 0, nth(19)), (0, 38));
    drop(process);
}

#[test]
fn a_copy_taken_of_a_running_broker_opens_with_what_was_acknowledged_before() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path(), "0");
    let mut client = Client::connect(&process.address);
    client.create("t", 1);
    for _ in 0..200 {
        client.produce("t", 0, batch(&[b"before".as_slice(); 50], 0, super::raw::ANYBODY));
    }
    let address = process.address.clone();
    let writing = std::thread::spawn(move || {
        let mut client = Client::connect(&address);
        for _ in 0..100 {
            client.produce("t", 0, batch(&[b"during".as_slice(); 50], 0, super::raw::ANYBODY));
        }
    });
    let copy = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-r").arg(dir.path().join(".")).arg(copy.path()).status().unwrap();
    assert!(copied.success());
    writing.join().unwrap();
    let second = Process::start(copy.path(), "0");
    let (error, high_watermark, _) = Client::connect(&second.address).fetch("t", 0, 9_999);
    assert_eq!(error, 0);
    assert!((10_000..=15_000).contains(&high_watermark), "{high_watermark}");
}
