//! From configured addresses to real ones: starts what is `"embedded"`, passes on what is not.
//!
//! No room beyond this one knows which of the two it speaks to.

use std::{path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::{
    change::Topics,
    config::{EMBEDDED, Loaded},
    embedded::{self, Progress, kafka, postgres, python, s3},
    fault::{Diagnose, Fault},
    lake,
    secret::Secret,
    stream, warehouse,
};

use super::{
    data_dir::{self, DataDir},
    reach,
};

/// Which parts an invocation needs; embedded ones that nobody needs are not started.
#[derive(Debug, Clone, Copy)]
pub struct Needs {
    pub postgres: bool,
    pub stream: bool,
    pub lake: bool,
    pub dbt: bool,
}

impl Needs {
    pub const ALL: Self = Self { postgres: true, stream: true, lake: true, dbt: true };
    pub const POSTGRES: Self = Self { postgres: true, stream: false, lake: false, dbt: false };
    pub const LAKE: Self = Self { postgres: false, stream: false, lake: true, dbt: false };
    pub const RECONCILE: Self = Self { postgres: true, stream: false, lake: true, dbt: false };
}

/// Where everything is, for rooms. Plain values; what carries a credential does not print.
#[derive(Debug, Clone)]
pub struct Addresses {
    pub source: Secret,
    pub warehouse: warehouse::Access,
    pub state: Secret,
    pub kafka: stream::Access,
    pub lake: lake::Access,
    /// The interpreter of the private environment that dbt runs in.
    pub python: Option<PathBuf>,
}

/// What `services --json` prints: one line, for psql, kcat, aws, DuckDB or a notebook. It carries credentials on purpose.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Printed {
    pub schema: u32,
    pub source: String,
    pub warehouse: String,
    pub state: String,
    pub kafka: String,
    pub s3: PrintedS3,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PrintedS3 {
    pub endpoint: String,
    pub region: String,
    pub bucket: String,
    pub access_key_id: String,
    pub secret_access_key: String,
    #[serde(default, skip_serializing_if = "is_auto")]
    pub addressing: lake::Addressing,
}

/// What everybody guesses is not told.
fn is_auto(addressing: &lake::Addressing) -> bool {
    *addressing == lake::Addressing::Auto
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    DataDir(#[from] data_dir::Error),
    #[error(transparent)]
    Kafka(#[from] kafka::Error),
    #[error(transparent)]
    S3(#[from] s3::Error),
    #[error(transparent)]
    Python(#[from] python::Error),
    #[cfg(feature = "snowflake")]
    #[error(transparent)]
    Snowflake(#[from] warehouse::snowflake::Error),
    #[error(transparent)]
    Stream(#[from] stream::Unusable),
    #[error(transparent)]
    Postgres(#[from] postgres::Error),
    #[error("{key} is not an address: {why}")]
    Address { key: &'static str, why: String },
    #[error("cdc.transaction_metadata is false, and without it nobody can tell whole payments from halves")]
    NoBoundaries,
    #[error("no credentials for the lake at {endpoint}")]
    NoLakeCredentials { endpoint: String },
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::DataDir(error) => error.fault(),
            Self::Kafka(error) => error.fault(),
            Self::S3(error) => error.fault(),
            Self::Python(error) => error.fault(),
            #[cfg(feature = "snowflake")]
            Self::Snowflake(error) => error.fault(),
            Self::Stream(error) => error.fault(),
            Self::Postgres(error) => error.fault(),
            Self::Address { key, .. } => Fault::Operator(format!("correct {key}: \"embedded\", or an address with a scheme and a host")),
            Self::NoBoundaries => Fault::Operator("set cdc.transaction_metadata = true, or run `ledgerline cdc` and `ledgerline sink` without dbt".to_owned()),
            Self::NoLakeCredentials { .. } => {
                Fault::Operator("set LEDGERLINE__LAKE__ACCESS_KEY_ID and LEDGERLINE__LAKE__SECRET_ACCESS_KEY in the environment".to_owned())
            }
        }
    }
}

/// Names of the databases in the embedded cluster.
const SOURCE_DATABASE: &str = "bank";
const WAREHOUSE_DATABASE: &str = "warehouse";
const STATE_DATABASE: &str = "ledgerline";

/// As `lake.endpoint`: AWS itself, wherever the region is.
pub(super) const AWS: &str = "aws";

impl Printed {
    /// What a client of the owning pipeline needs; it has no Python of its own.
    pub fn into_addresses(self, loaded: &Loaded) -> Result<Addresses, Error> {
        let endpoint = match self.s3.endpoint.as_str() {
            "" => None,
            endpoint => Some(Url::parse(endpoint).map_err(|error| Error::Address { key: "lake.endpoint", why: error.to_string() })?),
        };
        let lake = lake::Access {
            endpoint,
            region: self.s3.region,
            bucket: self.s3.bucket,
            addressing: self.s3.addressing,
            access_key_id: self.s3.access_key_id,
            secret_access_key: Secret::new(self.s3.secret_access_key),
        };
        Ok(Addresses {
            source: Secret::new(self.source),
            warehouse: Secret::new(self.warehouse).into(),
            state: Secret::new(self.state),
            // How to sign in is for each to know by itself.
            kafka: external_kafka(loaded)?.map_or_else(|| self.kafka.as_str().into(), |it| it.at(&self.kafka)),
            lake,
            python: None,
        })
    }
}

/// The embedded services of this invocation, and where everything is.
pub struct Services {
    pub addresses: Addresses,
    /// PostgreSQL on its way: whoever no longer waits for it must still see it end.
    starting: Option<JoinHandle<Result<postgres::Server, postgres::Error>>>,
    stopping: CancellationToken,
    postgres: Option<postgres::Server>,
    kafka: Option<Arc<kafka::Broker>>,
    /// Tells the broker what the lake holds.
    holding: Option<JoinHandle<()>>,
    s3: Option<s3::Server>,
}

impl Services {
    /// Nothing started yet: addresses of what is external, none of what is embedded.
    pub fn new(loaded: &Loaded) -> Self {
        let config = &loaded.config;
        let lake = lake::Access {
            endpoint: None,
            region: config.lake.region.clone(),
            bucket: config.lake.bucket.clone(),
            addressing: config.lake.addressing,
            access_key_id: String::new(),
            secret_access_key: Secret::default(),
        };
        let addresses = Addresses {
            source: Secret::default(),
            warehouse: warehouse::Access::default(),
            state: Secret::default(),
            kafka: config.stream.bootstrap_servers.as_str().into(),
            lake,
            python: None,
        };
        Self { addresses, starting: None, stopping: CancellationToken::new(), postgres: None, kafka: None, holding: None, s3: None }
    }

    /// Whether what is not embedded has addresses that can be used: asked before anything is started.
    pub fn check(loaded: &Loaded, needs: Needs) -> Result<(), Error> {
        let config = &loaded.config;
        if needs.postgres {
            for (key, url) in [("source.url", &config.source.url), ("warehouse.url", &config.warehouse.url), ("state.url", &config.state.url)] {
                if key == "warehouse.url" && warehouse::is_snowflake(url) {
                    external_snowflake(loaded)?;
                } else if url != EMBEDDED {
                    external_database(key, url, None)?;
                }
            }
        }
        if needs.stream {
            external_kafka(loaded)?;
        }
        if needs.lake && config.lake.endpoint != EMBEDDED {
            external_lake(loaded)?;
        }
        if needs.dbt && !config.cdc.transaction_metadata {
            return Err(Error::NoBoundaries);
        }
        match reach::external(config, needs).iter().find(|it| it.hosts.is_empty()) {
            Some(place) => Err(Error::Address { key: place.key, why: "it names no host".to_owned() }),
            None => Ok(()),
        }
    }

    /// Starts what is embedded and needed.
    ///
    /// After an error, or when this future is dropped half way, [`Services::stop`] ends what had started.
    pub async fn start(&mut self, loaded: &Loaded, data_dir: &DataDir, needs: Needs, progress: &Progress) -> Result<(), Error> {
        self.start_stream_and_lake(loaded, data_dir, needs).await?;
        self.start_python_and_postgres(loaded, data_dir, needs, progress).await
    }

    async fn start_stream_and_lake(&mut self, loaded: &Loaded, data_dir: &DataDir, needs: Needs) -> Result<(), Error> {
        let config = &loaded.config;
        // Broker and store are ready at once; PostgreSQL may first have to be installed.
        let external = if needs.stream { external_kafka(loaded)? } else { None };
        if let Some(external) = external {
            self.addresses.kafka = external;
        } else if needs.stream {
            let topics = Topics::new(config.cdc.topic_prefix.clone());
            // What lands stays until the lake says how far it is, also if the lake has not started for a week.
            let lands = move |topic: &str| topics.lake_name(topic).is_some();
            let broker = kafka::Config { dir: data_dir.join("kafka"), port: config.embedded.kafka_port, ..kafka::Config::default() };
            let broker = kafka::Broker::start_holding(broker, lands).await?;
            self.addresses.kafka = broker.address().into();
            self.kafka = Some(Arc::new(broker));
        }
        if needs.lake {
            if config.lake.endpoint == EMBEDDED {
                let key = data_dir.s3_key()?;
                let server = s3::Server::start(s3::Config {
                    dir: data_dir.join("s3"),
                    port: config.embedded.s3_port,
                    access_key_id: key.id.clone(),
                    secret_access_key: key.secret.clone(),
                    region: config.lake.region.clone(),
                    buckets: vec![config.lake.bucket.clone()],
                    ..s3::Config::default()
                })
                .await?;
                self.addresses.lake =
                    lake::Access { endpoint: Some(server.endpoint()), access_key_id: key.id, secret_access_key: key.secret, ..self.addresses.lake.clone() };
                self.s3 = Some(server);
            } else {
                self.addresses.lake = external_lake(loaded)?;
            }
        }
        Ok(())
    }

    async fn start_python_and_postgres(&mut self, loaded: &Loaded, data_dir: &DataDir, needs: Needs, progress: &Progress) -> Result<(), Error> {
        let config = &loaded.config;
        let postgres_embedded = needs.postgres && [&config.source.url, &config.warehouse.url, &config.state.url].into_iter().any(|it| it == EMBEDDED);
        if postgres_embedded || needs.dbt {
            let venv = python::Venv::ensure(progress).await?;
            self.addresses.python = Some(venv.python().to_owned());
            if postgres_embedded {
                let config = postgres::Config {
                    bin: venv.postgres_bin().to_owned(),
                    dir: data_dir.join("postgres"),
                    port: config.embedded.postgres_port,
                    ..postgres::Config::default()
                };
                let (progress, stop) = (progress.clone(), self.stopping.clone());
                let starting = self.starting.insert(tokio::spawn(async move { postgres::Server::start_unless(config, &progress, stop).await }));
                let started = starting.await;
                self.starting = None;
                self.postgres = Some(started.unwrap_or(Err(postgres::Error::Panicked))?);
            }
        }
        if needs.postgres {
            let secrets = &loaded.secrets;
            self.addresses.source = self.database("source.url", &config.source.url, secrets.source_password.as_ref(), SOURCE_DATABASE)?;
            self.addresses.warehouse = if warehouse::is_snowflake(&config.warehouse.url) {
                external_snowflake(loaded)?
            } else {
                self.database("warehouse.url", &config.warehouse.url, secrets.warehouse_password.as_ref(), WAREHOUSE_DATABASE)?.into()
            };
            self.addresses.state = self.database("state.url", &config.state.url, secrets.state_password.as_ref(), STATE_DATABASE)?;
        }
        Ok(())
    }

    fn database(&self, key: &'static str, configured: &str, password: Option<&Secret>, name: &str) -> Result<Secret, Error> {
        if configured == EMBEDDED {
            let server = self.postgres.as_ref().expect("an embedded database is needed, so its server was started");
            return Ok(server.url(name));
        }
        external_database(key, configured, password)
    }

    /// From now on the embedded broker forgets only what the lake holds.
    pub fn hold_retention(&mut self, mut lake: watch::Receiver<lake::Stats>) {
        let Some(broker) = self.kafka.clone() else { return };
        self.holding = Some(tokio::spawn(async move {
            loop {
                for lane in &lake.borrow_and_update().lanes {
                    // A lane whose position is not found yet holds everything.
                    broker.hold_retention(&lane.topic, lane.partition, lane.landed_offset.unwrap_or_default());
                }
                if lake.changed().await.is_err() {
                    return;
                }
            }
        }));
    }

    /// Health of the embedded services, each under its name; empty where nothing is embedded.
    pub fn health(&self) -> Vec<(&'static str, watch::Receiver<embedded::Health>)> {
        let mut health = Vec::new();
        if let Some(server) = &self.postgres {
            health.push(("postgres", server.health()));
        }
        if let Some(broker) = &self.kafka {
            health.push(("kafka", broker.health()));
        }
        if let Some(server) = &self.s3 {
            health.push(("s3", server.health()));
        }
        health
    }

    pub fn printed(&self) -> Printed {
        let lake = &self.addresses.lake;
        Printed {
            schema: 1,
            source: self.addresses.source.reveal().to_owned(),
            warehouse: self.addresses.warehouse.url.reveal().to_owned(),
            state: self.addresses.state.reveal().to_owned(),
            kafka: self.addresses.kafka.to_string(),
            s3: PrintedS3 {
                endpoint: lake.endpoint.as_ref().map(|it| it.as_str().trim_end_matches('/').to_owned()).unwrap_or_default(),
                region: lake.region.clone(),
                bucket: lake.bucket.clone(),
                access_key_id: lake.access_key_id.clone(),
                secret_access_key: lake.secret_access_key.reveal().to_owned(),
                addressing: lake.addressing,
            },
        }
    }

    /// Stops in the order in which data flows, so that each can still write down what it was given.
    pub async fn stop(&mut self) {
        self.stopping.cancel();
        if let Some(starting) = self.starting.take()
            && let Ok(Ok(server)) = starting.await
        {
            self.postgres = Some(server);
        }
        if let Some(server) = self.postgres.take() {
            server.stop().await;
        }
        if let Some(holding) = self.holding.take() {
            holding.abort();
            // It ends with a cancellation; what matters is that it has let go of the broker.
            let _ = holding.await;
        }
        if let Some(broker) = self.kafka.take().and_then(Arc::into_inner) {
            broker.stop().await;
        }
        if let Some(server) = self.s3.take() {
            server.stop().await;
        }
    }
}

fn external_database(key: &'static str, configured: &str, password: Option<&Secret>) -> Result<Secret, Error> {
    let refuse = |why: &str| Error::Address { key, why: why.to_owned() };
    let mut url = Url::parse(configured).map_err(|error| refuse(&error.to_string()))?;
    if !matches!(url.scheme(), "postgres" | "postgresql") {
        return Err(refuse(&format!("scheme {} is not postgres", url.scheme())));
    }
    if let Some(password) = password {
        url.set_password(Some(password.reveal())).map_err(|()| refuse("it has no place for a password"))?;
    }
    Ok(Secret::new(url))
}

/// Refuses what only another build can do.
pub fn check_build(loaded: &Loaded) -> Result<(), Error> {
    let stream = &loaded.config.stream;
    if stream.bootstrap_servers != EMBEDDED {
        stream::Access::check_build(stream)?;
    }
    Ok(())
}

/// Brokers that are not ours. What cannot be used is told before anything is started.
pub(super) fn external_kafka(loaded: &Loaded) -> Result<Option<stream::Access>, stream::Unusable> {
    let stream = &loaded.config.stream;
    let access = || stream::Access::new(stream, loaded.secrets.sasl_password.as_ref(), &loaded.base);
    (stream.bootstrap_servers != EMBEDDED).then(access).transpose()
}

/// An account of Snowflake's: what can be wrong with its address and key is told before anything is started.
#[cfg(feature = "snowflake")]
fn external_snowflake(loaded: &Loaded) -> Result<warehouse::Access, Error> {
    let config = &loaded.config.warehouse;
    let endpoint = match config.endpoint.as_str() {
        "" => None,
        endpoint => Some(Url::parse(endpoint).map_err(|error| Error::Address { key: "warehouse.endpoint", why: error.to_string() })?),
    };
    let stage = Some(config.stage.clone()).filter(|it| !it.is_empty());
    let access = warehouse::Access { url: Secret::new(&config.url), endpoint, private_key: loaded.secrets.warehouse_private_key.clone(), stage };
    warehouse::snowflake::Settings::new(&access)?;
    Ok(access)
}

#[cfg(not(feature = "snowflake"))]
fn external_snowflake(_: &Loaded) -> Result<warehouse::Access, Error> {
    Err(Error::Address {
        key: "warehouse.url",
        why: "this ledgerline was built without Snowflake (`cargo build --release --features snowflake` has it)".to_owned(),
    })
}

fn external_lake(loaded: &Loaded) -> Result<lake::Access, Error> {
    let config = &loaded.config.lake;
    let endpoint = match config.endpoint.as_str() {
        AWS => None,
        endpoint => Some(Url::parse(endpoint).map_err(|error| Error::Address { key: "lake.endpoint", why: error.to_string() })?),
    };
    let secrets = &loaded.secrets;
    let (id, secret) = match (&secrets.lake_access_key_id, &secrets.lake_secret_access_key) {
        (Some(id), Some(secret)) => (id.reveal().to_owned(), secret.clone()),
        // The SDK looks where AWS keeps credentials: environment, profile, role.
        (None, None) if endpoint.is_none() => (String::new(), Secret::default()),
        _ => return Err(Error::NoLakeCredentials { endpoint: config.endpoint.clone() }),
    };
    Ok(lake::Access {
        endpoint,
        region: config.region.clone(),
        bucket: config.bucket.clone(),
        addressing: config.addressing,
        access_key_id: id,
        secret_access_key: secret,
    })
}
