//! Whether the services that are not ours answer. A headless start asks before it starts anything, as long as
//! `startup_grace` lasts; afterwards outages are waited out.

use std::time::Duration;

use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use url::Url;

use crate::{
    config::{Config, EMBEDDED, Loaded},
    embedded::Progress,
    fault::{Diagnose, Fault},
    stream::{self, topics},
    units::Span,
    warehouse,
};

use super::services::{self, AWS, Needs};

/// A host that says nothing at all is given up by then.
const TRY_MAX: Duration = Duration::from_secs(3);
const AGAIN_AFTER: Duration = Duration::from_millis(250);

/// A configured address that is not ours, and the key that names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub service: &'static str,
    pub key: &'static str,
    /// One that answers is enough: the others of a Kafka cluster are learnt from it.
    pub hosts: Vec<(String, u16)>,
}

#[derive(Debug, thiserror::Error)]
#[error("{} at {} was not reached within {grace}: {cause}", place.service, place.address())]
pub struct Away {
    place: Place,
    grace: Span,
    cause: String,
}

impl Diagnose for Away {
    fn fault(&self) -> Fault {
        Fault::Operator(format!("start it, or correct {}; startup_grace is how long a start waits", self.place.key))
    }
}

impl Place {
    pub fn address(&self) -> String {
        let hosts: Vec<String> = self.hosts.iter().map(|(host, port)| format!("{host}:{port}")).collect();
        hosts.join(", ")
    }

    /// Whether somebody listens there now; why not, if not.
    pub async fn try_once(&self) -> Result<(), String> {
        let mut why = "no host to ask".to_owned();
        for (host, port) in &self.hosts {
            match timeout(TRY_MAX, TcpStream::connect((host.as_str(), *port))).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(error)) => why = error.to_string(),
                Err(_) => why = format!("no answer within {} s", TRY_MAX.as_secs()),
            }
        }
        Err(why)
    }
}

/// What an invocation needs and does not host itself, in the order in which data flows.
pub fn external(config: &Config, needs: Needs) -> Vec<Place> {
    let host_of = |address: &str| {
        let url = Url::parse(address).ok()?;
        Some((url.host_str()?.trim_matches(['[', ']']).to_owned(), url.port_or_known_default().unwrap_or(5432)))
    };
    let brokers = || config.stream.bootstrap_servers.split(',').map(str::trim).filter(|it| !it.is_empty()).filter_map(broker);
    let named = |service, key, address: &str| Place { service, key, hosts: host_of(address).into_iter().collect() };
    // An account has no host in its address.
    let warehouse = match config.warehouse.endpoint.as_str() {
        _ if !warehouse::is_snowflake(&config.warehouse.url) => named("the warehouse", "warehouse.url", &config.warehouse.url),
        "" => named("Snowflake", "warehouse.url", &format!("https://{}", warehouse::snowflake_host(&config.warehouse.url))),
        endpoint => named("Snowflake", "warehouse.endpoint", endpoint),
    };
    let places = [
        (needs.postgres, &config.source.url, named("the bank's database", "source.url", &config.source.url)),
        (needs.stream, &config.stream.bootstrap_servers, Place { service: "Kafka", key: "stream.bootstrap_servers", hosts: brokers().collect() }),
        (needs.lake, &config.lake.endpoint, named("the lake's S3", "lake.endpoint", &config.lake.endpoint)),
        (needs.postgres, &config.warehouse.url, warehouse),
        (needs.postgres, &config.state.url, named("the state database", "state.url", &config.state.url)),
    ];
    places.into_iter().filter(|(needed, address, _)| *needed && *address != EMBEDDED && *address != AWS).map(|(_, _, place)| place).collect()
}

/// `host:port`; Kafka's own port where none is given.
fn broker(address: &str) -> Option<(String, u16)> {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, "9092"));
    Some((host.trim_matches(['[', ']']).to_owned(), port.parse().ok()?))
}

/// Waits until each of them answers, at most `grace` for all.
pub async fn wait_for(places: &[Place], grace: Span, progress: &Progress) -> Result<(), Away> {
    let deadline = Instant::now() + *grace;
    for place in places {
        let mut told = false;
        while let Err(cause) = place.try_once().await {
            if Instant::now() >= deadline {
                return Err(Away { place: place.clone(), grace, cause });
            }
            if !told {
                progress.say(format!("waiting up to {grace} for {} at {} ({}): {cause}", place.service, place.address(), place.key));
                told = true;
            }
            sleep(AGAIN_AFTER).await;
        }
    }
    Ok(())
}

/// Whether Kafka, where it is not ours, lets us in. A refusal is told at once, whatever may pass is waited for.
pub async fn sign_in(loaded: &Loaded) -> Result<(), SignIn> {
    let Some(kafka) = services::external_kafka(loaded)? else { return Ok(()) };
    let deadline = Instant::now() + *loaded.config.startup_grace;
    let asking = topics::Topics::connect(kafka)?;
    loop {
        match asking.partitions().await {
            Ok(_) => return Ok(()),
            Err(error) if error.fault() != Fault::Transient || Instant::now() >= deadline => return Err(error.into()),
            Err(_) => sleep(AGAIN_AFTER).await,
        }
    }
}

/// Why Kafka does not let us in.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub enum SignIn {
    Unusable(#[from] stream::Unusable),
    Refused(#[from] topics::Error),
}

impl Diagnose for SignIn {
    fn fault(&self) -> Fault {
        match self {
            Self::Unusable(error) => error.fault(),
            Self::Refused(error) => error.fault(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_needed_and_not_ours_is_asked() {
        let mut config = Config::default();
        assert_eq!(external(&config, Needs::ALL), []);

        config.source.url = "postgres://bank@db.example.com/bank".to_owned();
        config.stream.bootstrap_servers = "one:9092, two:9093".to_owned();
        config.lake.endpoint = "https://s3.example.com".to_owned();
        let found: Vec<(&str, String)> = external(&config, Needs::ALL).iter().map(|it| (it.key, it.address())).collect();
        assert_eq!(
            found,
            [
                ("source.url", "db.example.com:5432".to_owned()),
                ("stream.bootstrap_servers", "one:9092, two:9093".to_owned()),
                ("lake.endpoint", "s3.example.com:443".to_owned()),
            ]
        );
        config.lake.endpoint = AWS.to_owned();
        assert_eq!(external(&config, Needs::LAKE), []);
    }
}
