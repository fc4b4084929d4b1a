//! A store and a broker per test, sinks to start and kill, and what lies in the lake afterwards.

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ledgerline::{
    change::Topics,
    lake::{self, Access, Config, Error, Options, Proof, Stats, Store},
    stage::{self, Handle, Phase},
    units::Span,
};
use rdkafka::{
    ClientConfig,
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::lane::{Lake, Stream};

pub(crate) const WAIT: Duration = Duration::from_secs(60);

/// A bucket and topics of this test's own.
pub(crate) struct House {
    pub(crate) lake: Lake,
    pub(crate) stream: Stream,
    /// The topic of the bank's customers.
    pub(crate) customers: String,
}

impl House {
    /// On the servers of this run.
    pub(crate) async fn open() -> Self {
        Self::of(Lake::open().await, Stream::open().await)
    }

    /// On servers of this test's own, which it may stop.
    pub(crate) async fn own() -> Self {
        Self::of(Lake::own().await, Stream::own().await)
    }

    fn of(lake: Lake, stream: Stream) -> Self {
        Self { customers: format!("{}.public.customers", stream.prefix), lake, stream }
    }

    pub(crate) fn kafka(&self) -> String {
        self.stream.address.clone()
    }

    pub(crate) fn topics(&self) -> Topics {
        Topics::new(self.stream.prefix.clone())
    }

    /// A topic of this test's.
    pub(crate) fn topic(&self, name: &str) -> String {
        format!("{}.{name}", self.stream.prefix)
    }

    /// Nobody else is in this group.
    pub(crate) fn group(&self, name: &str) -> String {
        format!("{}-{name}", self.stream.prefix)
    }

    pub(crate) fn config(&self) -> Config {
        Config { age_max: Span::from_millis(100), group: self.group("lake"), ..Config::default() }
    }

    pub(crate) fn cut(&self, rows_max: usize) -> Config {
        Config { rows_max: NonZeroUsize::new(rows_max).expect("not zero"), ..self.config() }
    }

    /// The same store, another broker that knows nothing.
    pub(crate) async fn renew_broker(&mut self) {
        let mut other = Stream::own().await;
        other.prefix.clone_from(&self.stream.prefix);
        self.stream = other;
    }

    pub(crate) async fn create(&self, topic: &str, partitions: i32) {
        self.stream.create(topic, partitions, &[]).await;
    }

    pub(crate) fn access(&self) -> Access {
        self.lake.access.clone()
    }

    pub(crate) async fn store(&self) -> Store {
        Store::connect(&self.access()).await.expect("the store answers")
    }

    pub(crate) async fn sink(&self, config: Config) -> Sink {
        Sink::start(self.store().await, self, config)
    }

    pub(crate) async fn proof(&self) -> Proof {
        lake::verify(&self.store().await, &self.topics(), Options::default()).await.expect("the store answers")
    }

    /// Every value in the lake by lane and offset; a value that lies there twice fails the test.
    pub(crate) async fn landed(&self) -> BTreeMap<(String, i32, i64), Option<String>> {
        let (store, mut all) = (self.store().await, BTreeMap::new());
        for lane in lake::log::lanes(&store).await.expect("lanes") {
            for record in lake::log::after(&store, &lane.topic, lane.partition, None, usize::MAX).await.expect("records") {
                for batch in lake::read(&store, &record).await.expect("an object").batches {
                    for row in lake::rows(&batch) {
                        let before = all.insert((lane.topic.to_string(), lane.partition, row.offset), row.value.map(str::to_owned));
                        assert_eq!(before, None, "{lane} offset {} lies there twice", row.offset);
                    }
                }
            }
        }
        all
    }
}

pub(crate) struct Sink {
    pub(crate) handle: Handle<Stats>,
    pub(crate) task: JoinHandle<Result<(), Error>>,
}

impl Sink {
    pub(crate) fn start(store: Store, house: &House, config: Config) -> Self {
        let (handle, control) = stage::control(Stats::default(), Phase::Running, &CancellationToken::new());
        Self { handle, task: tokio::spawn(lake::run(store, house.kafka(), house.topics(), config, control)) }
    }

    pub(crate) async fn until(&mut self, what: &str, reached: impl FnMut(&Stats) -> bool) -> Stats {
        let waited = tokio::time::timeout(WAIT, self.handle.stats.wait_for(reached)).await;
        let reached = waited.map(|it| it.expect("the stage runs").clone());
        reached.unwrap_or_else(|_| panic!("never {what}: {:#?}", *self.handle.stats.borrow()))
    }

    pub(crate) async fn landed(&mut self, topic: &str, partition: i32, offset: i64) -> Stats {
        let reached = |it: &Stats| it.lanes.iter().any(|it| it.topic == topic && it.partition == partition && it.landed_offset >= Some(offset));
        self.until(&format!("landed {topic}[{partition}] up to {offset}"), reached).await
    }

    pub(crate) async fn stop(self) -> Result<(), Error> {
        self.handle.stop.cancel();
        tokio::time::timeout(WAIT, self.task).await.expect("it stops").expect("it does not panic")
    }

    /// Nothing is drained, committed or said: the nearest to kill -9 inside one process.
    pub(crate) async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

pub(crate) fn producer(kafka: &str) -> FutureProducer {
    ClientConfig::new().set("bootstrap.servers", kafka).set("acks", "all").set("linger.ms", "1").create().expect("a producer")
}

pub(crate) fn value(n: i64) -> String {
    format!("{{\"before\":null,\"after\":{{\"id\":{n},\"name\":\"Zoë 🦀\"}},\"op\":\"c\"}}")
}

/// Produces numbered values and waits for the broker to have them.
pub(crate) async fn produce(kafka: &str, topic: &str, partition: i32, numbers: std::ops::Range<i64>) {
    let producer = producer(kafka);
    let sent = numbers.map(|n| {
        let (producer, topic) = (producer.clone(), topic.to_owned());
        tokio::spawn(async move {
            let (key, value) = (format!("{{\"id\":{n}}}"), value(n));
            producer.send(FutureRecord::to(&topic).partition(partition).key(&key).payload(&value), WAIT).await.expect("the broker takes it");
        })
    });
    for sent in sent.collect::<Vec<_>>() {
        sent.await.expect("sent");
    }
}

pub(crate) fn values_of(landed: &BTreeMap<(String, i32, i64), Option<String>>) -> Vec<String> {
    let mut values: Vec<String> = landed.values().map(|it| it.clone().expect("no tombstones here")).collect();
    values.sort();
    values
}

pub(crate) fn expected(numbers: std::ops::Range<i64>) -> Vec<String> {
    let mut values: Vec<String> = numbers.map(value).collect();
    values.sort();
    values
}

pub(crate) async fn committed(kafka: &str, group: &str, topic: &str, partition: i32) -> Option<i64> {
    use rdkafka::{
        Offset, TopicPartitionList,
        consumer::{BaseConsumer, Consumer as _},
    };
    let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", kafka).set("group.id", group).create().expect("a consumer");
    let mut list = TopicPartitionList::new();
    list.add_partition(topic, partition);
    let ask = tokio::task::spawn_blocking(move || consumer.committed_offsets(list, WAIT).expect("the broker answers"));
    match ask.await.expect("asked").elements()[0].offset() {
        Offset::Offset(offset) => Some(offset),
        _ => None,
    }
}

/// The headers without the time, and the payload.
pub(crate) async fn first_message(kafka: &str, topic: &str) -> (Option<Vec<u8>>, Vec<(String, String)>) {
    use rdkafka::{
        Message as _, Offset, TopicPartitionList,
        consumer::{BaseConsumer, Consumer as _},
        message::Headers as _,
    };
    let (kafka, topic) = (kafka.to_owned(), topic.to_owned());
    let read = tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", &kafka).set("group.id", "reader").create().expect("a consumer");
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&topic, 0, Offset::Beginning).expect("a lane");
        consumer.assign(&list).expect("assigned");
        let message = consumer.poll(WAIT).expect("a message").expect("no error");
        let text = |bytes: Option<&[u8]>| String::from_utf8(bytes.expect("a value").to_vec()).expect("text");
        let headers = message.headers().expect("headers").iter().filter(|it| it.key != "timestamp_ms").map(|it| (it.key.to_owned(), text(it.value))).collect();
        (message.payload().map(Into::into), headers)
    });
    read.await.expect("read")
}

/// Stands before a store and, once shut, lets no commit record through: the request is taken and never answered.
pub(crate) struct Gate {
    pub(crate) endpoint: Url,
    pub(crate) shut: Arc<AtomicBool>,
    pub(crate) knocked: Arc<Notify>,
}

impl Gate {
    pub(crate) async fn open(house: &House) -> Self {
        let store = house.access().endpoint.expect("an address");
        let commit_records = format!("PUT /{}/_log/", house.access().bucket);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = Url::parse(&format!("http://{}", listener.local_addr().expect("an address"))).expect("a URL");
        let (shut, knocked) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
        let (is_shut, knocks) = (Arc::clone(&shut), Arc::clone(&knocked));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(("127.0.0.1", store.port().expect("a port"))).await.expect("the store listens");
                tokio::spawn(pass(client, server, commit_records.clone(), Arc::clone(&is_shut), Arc::clone(&knocks)));
            }
        });
        Self { endpoint, shut, knocked }
    }
}

async fn pass(client: TcpStream, server: TcpStream, held: String, shut: Arc<AtomicBool>, knocks: Arc<Notify>) {
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) = (client.into_split(), server.into_split());
    let answers = tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(n_bytes @ 1..) = from_client.read(&mut buffer).await {
        if shut.load(Ordering::SeqCst) && buffer.starts_with(held.as_bytes()) {
            knocks.notify_one();
            std::future::pending::<()>().await;
        }
        if to_server.write_all(&buffer[..n_bytes]).await.is_err() {
            break;
        }
    }
    answers.abort();
}
