//! Which servers the tests are on: our own, or with `--features stack` the real ones of `tests/stack`.
//!
//! The only place that tells them apart. What is exchanged: PostgreSQL (`house`), the stores and brokers that are opened here,
//! and the banks that `Bank::on_servers` opens. Tests that stop a server, or are about our own, open their own by name
//! (`Lake::own`, `Broker::start`, `Bank::new`). On shared servers each test has its own database, topic prefix and bucket,
//! and removes them.

use std::{
    collections::HashMap,
    process::{Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use ledgerline::{
    embedded::{kafka, s3},
    lake::{Access, Addressing},
    secret::Secret,
    units::Size,
};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
};
use tempfile::TempDir;

use crate::{binary::PATIENCE, house::on_server};

/// The real servers' addresses, as the product's environment variables say them.
pub(crate) struct Stack(HashMap<String, String>);

/// None: the tests are on our own servers. The first to ask brings the real ones up.
pub(crate) fn stack() -> Option<&'static Stack> {
    static STACK: OnceLock<Stack> = OnceLock::new();
    cfg!(feature = "stack").then(|| STACK.get_or_init(|| Stack::of(&[])))
}

impl Stack {
    /// Some of the servers, up; what runs already is left alone.
    pub(crate) fn of(parts: &[&str]) -> Self {
        let up = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stack/up");
        let output = Command::new(up).args(parts).stdin(Stdio::null()).stderr(Stdio::inherit()).output().expect("tests/stack/up runs");
        assert!(output.status.success(), "tests/stack/up ended with {}", output.status);
        let printed = String::from_utf8(output.stdout).expect("text");
        let export = |line: &str| {
            line.strip_prefix("export ").and_then(|it| it.split_once('=')).map(|(name, value)| (name.to_owned(), value.trim_matches('\'').to_owned()))
        };
        Self(printed.lines().map(|line| export(line).unwrap_or_else(|| panic!("no export: {line}"))).collect())
    }

    pub(crate) fn value(&self, name: &str) -> String {
        self.0.get(&format!("LEDGERLINE__{name}")).unwrap_or_else(|| panic!("tests/stack/up says nothing about {name}")).clone()
    }

    /// What no key of the product names.
    #[cfg(feature = "stack")]
    pub(crate) fn address(&self, name: &str) -> String {
        let dir = std::env::var_os("LEDGERLINE_STACK_DIR").map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/.stack").into(), std::path::PathBuf::from);
        let addresses = std::fs::read_to_string(dir.join("addresses")).expect("tests/stack/up wrote it");
        let value = addresses.lines().find_map(|it| it.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or_else(|| panic!("tests/stack/up says nothing about {name}")).to_owned()
    }

    /// A superuser's database.
    pub(crate) fn postgres(&self) -> String {
        let mut url: url::Url = self.value("STATE__URL").parse().expect("an address");
        url.set_password(Some(&self.value("STATE__PASSWORD"))).expect("it has a place for one");
        url.set_path("postgres");
        url.into()
    }

    /// A database of that server as the product's variables name it: without its password.
    fn database(&self, name: &str) -> String {
        let mut url: url::Url = self.value("STATE__URL").parse().expect("an address");
        url.set_path(name);
        url.into()
    }

    pub(crate) fn kafka(&self) -> String {
        self.value("STREAM__BOOTSTRAP_SERVERS")
    }

    /// The program, for a server of a test's own.
    #[cfg(feature = "stack")]
    pub(crate) fn minio(&self) -> String {
        self.address("MINIO")
    }

    fn bucket(&self, bucket: String) -> Access {
        Access {
            endpoint: Some(self.value("LAKE__ENDPOINT").parse().expect("an address")),
            bucket,
            access_key_id: self.value("LAKE__ACCESS_KEY_ID"),
            secret_access_key: Secret::new(self.value("LAKE__SECRET_ACCESS_KEY")),
            ..access(None)
        }
    }
}

/// A name nobody else has, here or in another process.
pub(crate) fn unique(what: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{what}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn access(endpoint: Option<url::Url>) -> Access {
    Access {
        endpoint,
        region: "us-east-1".into(),
        bucket: "lake".into(),
        addressing: Addressing::Auto,
        access_key_id: "lake-test".into(),
        secret_access_key: Secret::new("lake-test-secret"),
    }
}

/// A bucket of one test's own.
pub(crate) struct Lake {
    pub(crate) access: Access,
    /// Our own server, where the test is on one.
    pub(crate) server: Option<s3::Server>,
    pub(crate) dir: TempDir,
}

impl Lake {
    /// On the servers of this run.
    pub(crate) async fn open() -> Self {
        match stack() {
            Some(stack) => Self { access: stack.bucket(unique("lake")), server: None, dir: tempfile::tempdir().expect("a directory") },
            None => Self::own().await,
        }
    }

    /// On a server of this test's own, which it may stop.
    pub(crate) async fn own() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let server = Self::serve(&dir, 0).await;
        Self { access: access(Some(server.endpoint())), server: Some(server), dir }
    }

    async fn serve(dir: &TempDir, port: u16) -> s3::Server {
        let access = access(None);
        let config = s3::Config {
            dir: dir.path().join("s3"),
            port,
            access_key_id: access.access_key_id,
            secret_access_key: access.secret_access_key,
            buckets: vec![],
            reserve: Size(1 << 20),
            ..s3::Config::default()
        };
        s3::Server::start(config).await.expect("the store starts")
    }

    /// Stops our own server.
    pub(crate) async fn leave(&mut self) {
        self.server.take().expect("a server of its own").stop().await;
    }

    /// Starts it again, at the same address.
    pub(crate) async fn come_back(&mut self) {
        let port = self.access.endpoint.as_ref().and_then(url::Url::port).expect("a port");
        self.server = Some(Self::serve(&self.dir, port).await);
    }
}

impl Drop for Lake {
    fn drop(&mut self) {
        if self.server.is_none() && stack().is_some_and(|it| it.value("LAKE__ACCESS_KEY_ID") == self.access.access_key_id) {
            remove_bucket(&self.access);
        }
    }
}

/// A broker, and a prefix of one test's own for topics on it.
pub(crate) struct Stream {
    pub(crate) address: String,
    pub(crate) prefix: String,
    /// Our own broker, where the test is on one.
    pub(crate) broker: Option<kafka::Broker>,
    _dir: Option<TempDir>,
}

impl Stream {
    /// On the servers of this run.
    pub(crate) async fn open() -> Self {
        match stack() {
            Some(stack) => Self { address: stack.kafka(), prefix: unique("bank"), broker: None, _dir: None },
            None => Self::own().await,
        }
    }

    /// On a broker of this test's own, which it may stop.
    pub(crate) async fn own() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let broker = kafka::Broker::start(kafka::Config { dir: dir.path().join("kafka"), ..kafka::Config::default() }).await.expect("the broker starts");
        Self { address: broker.address(), prefix: unique("bank"), broker: Some(broker), _dir: Some(dir) }
    }

    pub(crate) async fn create(&self, topic: &str, partitions: i32, settings: &[(&str, &str)]) {
        let admin: AdminClient<DefaultClientContext> = ClientConfig::new().set("bootstrap.servers", &self.address).create().expect("a client");
        let topic = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
        let topic = settings.iter().fold(topic, |topic, (key, value)| topic.set(key, value));
        let created = admin.create_topics([&topic], &AdminOptions::new()).await.expect("the broker answers");
        assert!(created.iter().all(Result::is_ok), "{created:?}");
    }

    /// Stops our own broker.
    pub(crate) async fn leave(&mut self) {
        self.broker.take().expect("a broker of its own").stop().await;
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.broker.is_none() && stack().is_some_and(|it| it.kafka() == self.address) {
            remove_topics(&self.address, &self.prefix);
        }
    }
}

/// Databases, a bucket, topics, a slot and a consumer group of one bank's own on the real servers.
pub(crate) struct Ground {
    name: String,
    stack: &'static Stack,
    kafka: String,
    lake: Access,
    /// Keys of the product (without the prefix of their variables) and their values.
    pub(crate) environment: Vec<(&'static str, String)>,
}

const DATABASES: [&str; 3] = ["SOURCE", "WAREHOUSE", "STATE"];

impl Ground {
    /// With our own capture, PostgreSQL as the warehouse, and mails as files.
    pub(crate) fn open(stack: &'static Stack) -> Self {
        let name = unique("bank").replace('-', "_");
        let (kafka, lake) = (stack.kafka(), stack.bucket(unique("lake")));
        let mut environment = vec![
            ("BANK__ENABLED", "true".to_owned()),
            ("CDC__TOPIC_PREFIX", name.clone()),
            ("CDC__SLOT", name.clone()),
            ("STREAM__BOOTSTRAP_SERVERS", kafka.clone()),
            ("LAKE__BUCKET", lake.bucket.clone()),
            ("LAKE__GROUP", name.clone()),
            ("WAREHOUSE__PASSWORD", stack.value("STATE__PASSWORD")),
        ];
        let as_they_are = ["LAKE__ENDPOINT", "LAKE__ACCESS_KEY_ID", "LAKE__SECRET_ACCESS_KEY", "SOURCE__PASSWORD", "STATE__PASSWORD"];
        environment.extend(as_they_are.map(|key| (key, stack.value(key))));
        for (key, part) in ["SOURCE__URL", "WAREHOUSE__URL", "STATE__URL"].into_iter().zip(DATABASES) {
            environment.push((key, stack.database(&Self::database(&name, part))));
        }
        wait_for(async {
            for part in DATABASES {
                on_server(&format!("create database {}", Self::database(&name, part))).await;
            }
        });
        Self { name, stack, kafka, lake, environment }
    }

    /// As `tests/stack/up` says it: Debezium captures, the Snowflake double is the warehouse, and mails leave by STARTTLS, signed in.
    #[cfg(feature = "stack")]
    pub(crate) fn whole(stack: &'static Stack) -> Self {
        let mut ground = Self::open(stack);
        ground.environment.retain(|(key, _)| !key.starts_with("WAREHOUSE__"));
        let mut warehouse: url::Url = stack.value("WAREHOUSE__URL").parse().expect("an address");
        warehouse.set_path(&ground.name);
        ground.environment.push(("WAREHOUSE__URL", warehouse.into()));
        let as_they_are =
            ["CDC__ENGINE", "CDC__CONNECT_URL", "WAREHOUSE__ENDPOINT", "WAREHOUSE__PRIVATE_KEY", "MAIL__TRANSPORT", "MAIL__PASSWORD", "MAIL__CA_FILE"];
        ground.environment.extend(as_they_are.map(|key| (key, stack.value(key))));
        ground
    }

    fn database(name: &str, part: &str) -> String {
        format!("{name}_{}", part.to_lowercase())
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // Of a test that failed before it took its connector away, if it had one.
        let connector = format!("{}/connectors/{}", self.stack.value("CDC__CONNECT_URL"), self.name);
        let _ = Command::new("curl").args(["-s", "-m", "10", "-X", "DELETE", &connector]).stdout(Stdio::null()).status();
        wait_for(async {
            on_server(&format!("select pg_terminate_backend(active_pid, 5000) from pg_replication_slots where slot_name = '{}' and active", self.name)).await;
            on_server(&format!("select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = '{}'", self.name)).await;
            for part in DATABASES {
                on_server(&format!("drop database {} with (force)", Self::database(&self.name, part))).await;
            }
        });
        remove_topics(&self.kafka, &self.name);
        remove_bucket(&self.lake);
    }
}

/// Waits for what is asynchronous, also where a runtime is at work.
pub(crate) fn wait_for<T: Send>(work: impl Future<Output = T> + Send) -> T {
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(work));
        waiting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A bucket with all that is in it. What stays behind is told and fails nothing: the next `down --wipe` takes it along.
pub(crate) fn remove_bucket(access: &Access) {
    use aws_sdk_s3::config::{BehaviorVersion, Builder, Credentials, Region};
    let credentials = Credentials::new(&access.access_key_id, access.secret_access_key.reveal(), None, None, "tests");
    let config = Builder::new()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(access.region.clone()))
        .endpoint_url(access.endpoint.as_ref().map(url::Url::as_str).unwrap_or_default())
        .force_path_style(true)
        .credentials_provider(credentials)
        .build();
    let removed = wait_for(async {
        let removing = aws_sdk_s3::Client::from_conf(config).delete_bucket().bucket(&access.bucket).customize();
        // MinIO's own header: the objects go, too.
        removing.mutate_request(|request| drop(request.headers_mut().insert("x-minio-force-delete", "true"))).send().await.map(drop)
    });
    if let Err(error) = removed {
        eprintln!("bucket {} stays behind: {error:?}", access.bucket);
    }
}

/// The topics of a prefix.
pub(crate) fn remove_topics(kafka: &str, prefix: &str) {
    let mut settings = ClientConfig::new();
    settings.set("bootstrap.servers", kafka).set("group.id", "tests");
    let removed = wait_for(async {
        let consumer: BaseConsumer = settings.create()?;
        let metadata = consumer.fetch_metadata(None, PATIENCE)?;
        // Beside a capture's own: topics with another name before it, which no lake of this prefix may take.
        let ours = |name: &&str| name.split('.').any(|part| part.strip_prefix('x').unwrap_or(part) == prefix);
        let topics: Vec<&str> = metadata.topics().iter().map(|it| it.name()).filter(ours).collect();
        if topics.is_empty() {
            return Ok(());
        }
        let admin: AdminClient<DefaultClientContext> = settings.create()?;
        admin.delete_topics(&topics, &AdminOptions::new()).await.map(drop)
    });
    if let Err::<(), rdkafka::error::KafkaError>(error) = removed {
        eprintln!("topics of {prefix} stay behind: {error}");
    }
}
