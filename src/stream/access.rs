//! How the brokers are reached: where they are, over what, and as whom. The one place that makes settings for Kafka's client,
//! and the one that understands why brokers refuse it.
//!
//! librdkafka goes on trying for ever, and its questions end as time-outs: what the broker said comes by a callback, which
//! [`Hearing`] listens to.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rdkafka::{
    ClientConfig, ClientContext,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext},
    error::KafkaError,
};

use super::Config;
use crate::{
    fault::{Diagnose, Fault},
    secret::Secret,
};

/// Kafka's `security.protocol`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    #[default]
    Plaintext,
    Ssl,
    SaslPlaintext,
    SaslSsl,
}

impl Protocol {
    const fn name(self) -> &'static str {
        match self {
            Self::Plaintext => "plaintext",
            Self::Ssl => "ssl",
            Self::SaslPlaintext => "sasl_plaintext",
            Self::SaslSsl => "sasl_ssl",
        }
    }

    const fn is_encrypted(self) -> bool {
        matches!(self, Self::Ssl | Self::SaslSsl)
    }

    const fn signs_in(self) -> bool {
        matches!(self, Self::SaslPlaintext | Self::SaslSsl)
    }
}

/// Kafka's `sasl.mechanism`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Mechanism {
    #[serde(rename = "PLAIN")]
    Plain,
    #[serde(rename = "SCRAM-SHA-256")]
    ScramSha256,
    #[default]
    #[serde(rename = "SCRAM-SHA-512")]
    ScramSha512,
}

impl Mechanism {
    const fn name(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::ScramSha256 => "SCRAM-SHA-256",
            Self::ScramSha512 => "SCRAM-SHA-512",
        }
    }
}

/// What `[stream]` says and cannot be.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    #[error("{key} = \"{value}\" needs OpenSSL, and this ledgerline was built without it")]
    Feature { key: &'static str, value: &'static str },
    #[error("stream.security_protocol = \"{protocol}\" signs in, and {what} is empty")]
    NobodyToSignIn { protocol: &'static str, what: &'static str },
    #[error("could not read {} of stream.{key}", path.display())]
    File {
        key: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("stream.certificate_file and stream.key_file belong together, and one of them is empty")]
    HalfACertificate,
}

impl Diagnose for Unusable {
    fn fault(&self) -> Fault {
        Fault::Operator(match self {
            Self::Feature { .. } => "take a released binary or image, or build with the feature `tls` (`cargo build --release --features tls`)".to_owned(),
            Self::NobodyToSignIn { .. } => {
                "set stream.sasl_username, and LEDGERLINE__STREAM__SASL_PASSWORD in the environment; or another stream.security_protocol".to_owned()
            }
            Self::File { key, .. } => format!("name a readable PEM file in stream.{key}, or leave it empty"),
            Self::HalfACertificate => "name both, or neither: the brokers then see no certificate of ours".to_owned(),
        })
    }
}

/// What a client of these brokers needs. Does not print its password.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Access {
    bootstrap_servers: String,
    protocol: Protocol,
    mechanism: Mechanism,
    username: String,
    password: Secret,
    /// Empty: the system's authorities.
    ca_file: PathBuf,
    /// Certificate and key of our own, where the brokers ask for one; empty paths where not.
    certificate_file: PathBuf,
    key_file: PathBuf,
}

/// Brokers that let everyone in, such as our own.
impl<T: AsRef<str>> From<T> for Access {
    fn from(bootstrap_servers: T) -> Self {
        Self { bootstrap_servers: bootstrap_servers.as_ref().to_owned(), ..Self::default() }
    }
}

impl From<&Self> for Access {
    fn from(access: &Self) -> Self {
        access.clone()
    }
}

impl fmt::Display for Access {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.bootstrap_servers)
    }
}

impl Access {
    /// As `[stream]` says; paths are relative to `base`. Refuses what this build cannot do and what can never work.
    pub fn new(config: &Config, password: Option<&Secret>, base: &Path) -> Result<Self, Unusable> {
        Self::check_build(config)?;
        let (protocol, mechanism) = (config.security_protocol, config.sasl_mechanism);
        if protocol.signs_in() {
            let nobody = |what| Unusable::NobodyToSignIn { protocol: protocol.name(), what };
            if config.sasl_username.is_empty() {
                return Err(nobody("stream.sasl_username"));
            }
            if password.is_none_or(|it| it.reveal().is_empty()) {
                return Err(nobody("LEDGERLINE__STREAM__SASL_PASSWORD"));
            }
        }
        let file = |key, path: &Path| {
            // Empty stays empty.
            let path = if path.as_os_str().is_empty() { PathBuf::new() } else { base.join(path) };
            if protocol.is_encrypted() && !path.as_os_str().is_empty() {
                std::fs::File::open(&path).map_err(|source| Unusable::File { key, path: path.clone(), source })?;
            }
            Ok(path)
        };
        let access = Self {
            bootstrap_servers: config.bootstrap_servers.clone(),
            protocol,
            mechanism,
            username: config.sasl_username.clone(),
            password: password.cloned().unwrap_or_default(),
            ca_file: file("ca_file", &config.ca_file)?,
            certificate_file: file("certificate_file", &config.certificate_file)?,
            key_file: file("key_file", &config.key_file)?,
        };
        if access.certificate_file.as_os_str().is_empty() != access.key_file.as_os_str().is_empty() {
            return Err(Unusable::HalfACertificate);
        }
        Ok(access)
    }

    /// Refuses what this build cannot do.
    pub fn check_build(config: &Config) -> Result<(), Unusable> {
        let (protocol, mechanism) = (config.security_protocol, config.sasl_mechanism);
        if cfg!(feature = "tls") {
            return Ok(());
        }
        if protocol.is_encrypted() {
            return Err(Unusable::Feature { key: "stream.security_protocol", value: protocol.name() });
        }
        // PLAIN is librdkafka's own; SCRAM computes with OpenSSL.
        if protocol.signs_in() && mechanism != Mechanism::Plain {
            return Err(Unusable::Feature { key: "stream.sasl_mechanism", value: mechanism.name() });
        }
        Ok(())
    }

    /// The same brokers, known by other addresses.
    pub fn at(&self, bootstrap_servers: &str) -> Self {
        Self { bootstrap_servers: bootstrap_servers.to_owned(), ..self.clone() }
    }

    pub fn bootstrap_servers(&self) -> &str {
        &self.bootstrap_servers
    }

    /// Settings of a client that reaches these brokers and calls itself `client_id`. The start of every client we make.
    pub fn client(&self, client_id: &str) -> ClientConfig {
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", &self.bootstrap_servers).set("client.id", client_id);
        // What a broker that hangs up is about is only logged, and must be heard whatever our own log shows.
        client.set_log_level(RDKafkaLogLevel::Info);
        if self.protocol != Protocol::Plaintext {
            client.set("security.protocol", self.protocol.name());
        }
        if self.protocol.signs_in() {
            client.set("sasl.mechanism", self.mechanism.name()).set("sasl.username", &self.username).set("sasl.password", self.password.reveal());
        }
        if self.protocol.is_encrypted() {
            // Our own OpenSSL does not know where this system keeps its authorities; librdkafka knows the usual places.
            let authorities = if self.ca_file.as_os_str().is_empty() { Path::new("probe") } else { &self.ca_file };
            client.set("ssl.ca.location", authorities.to_string_lossy());
            if !self.certificate_file.as_os_str().is_empty() {
                client.set("ssl.certificate.location", self.certificate_file.to_string_lossy()).set("ssl.key.location", self.key_file.to_string_lossy());
            }
        }
        client
    }
}

/// Why the brokers do not let us in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}{}", if *is_certain { String::new() } else { format!(" ({remedy})") })]
pub struct Refusal {
    pub why: String,
    pub remedy: String,
    /// A broker said so. Otherwise it hung up where it should have spoken, which a broker that is being stopped does as well.
    pub is_certain: bool,
}

impl Diagnose for Refusal {
    fn fault(&self) -> Fault {
        if self.is_certain { Fault::Operator(self.remedy.clone()) } else { Fault::Transient }
    }
}

impl Refusal {
    /// What Kafka's client says about our sign-in, as an error or in its log; None where it is about something else.
    pub fn of(told: &str) -> Option<Self> {
        let has = |text: &str| told.contains(text);
        let hung_up = has("Disconnected") && (has("state APIVERSION_QUERY") || has("state UP"));
        let (remedy, is_certain) = if has("mechanism handshake failed") {
            ("set stream.sasl_mechanism to one that the broker supports", true)
        } else if has("SASL") && has("uthentication failed") {
            ("correct stream.sasl_username, and LEDGERLINE__STREAM__SASL_PASSWORD in the environment", true)
        } else if has("certificate verify failed") {
            ("name the authority that signed the broker's certificate in stream.ca_file, and the broker by a name that its certificate has", true)
        } else if has("alert bad certificate") || has("alert unknown ca") || has("certificate required") {
            ("the broker wants a certificate of ours that it trusts: set stream.certificate_file and stream.key_file", true)
        } else if has("SSL handshake failed") || hung_up {
            ("if it stays so, stream.security_protocol is not what this listener speaks", false)
        } else {
            return None;
        };
        Some(Self { why: as_a_person(told), remedy: remedy.to_owned(), is_certain })
    }
}

/// `[thrd:…]: sasl_ssl://host:9093/bootstrap: SASL authentication error: … (after 12ms in state AUTH_REQ)`, as a person says it.
fn as_a_person(told: &str) -> String {
    let told = told.strip_prefix("[thrd:").and_then(|it| it.split_once("]: ")).map_or(told, |it| it.1);
    let (broker, said) = told.split_once(": ").unwrap_or(("", told));
    let address = broker.split_once("://").map_or(broker, |it| it.1).split('/').next().unwrap_or_default();
    let said = said.rsplit_once(" (after ").map_or(said, |it| it.0);
    format!("the broker at {address} refuses us: {said}")
}

/// Listens to what Kafka's client reports about brokers that do not let it in.
#[derive(Debug, Clone, Default)]
pub struct Hearing(Arc<Mutex<Option<Refusal>>>);

impl Hearing {
    /// The last refusal, once.
    pub fn take(&self) -> Option<Refusal> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub fn hear(&self, told: &str) {
        if let Some(refusal) = Refusal::of(told) {
            let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // A guess does not replace what a broker said.
            if refusal.is_certain || heard.as_ref().is_none_or(|it| !it.is_certain) {
                *heard = Some(refusal);
            }
        }
    }
}

/// What Kafka's client logs, as ours.
pub(super) fn log(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => tracing::error!(facility, "kafka client: {message}"),
        RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning => tracing::warn!(facility, "kafka client: {message}"),
        _ => tracing::debug!(facility, "kafka client: {message}"),
    }
}

impl ClientContext for Hearing {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, message: &str) {
        // A broker that hangs up is only logged.
        self.hear(message);
        // Whoever asks gets it as an error.
        tracing::debug!(facility, "kafka client: {message}");
    }

    fn error(&self, _error: KafkaError, reason: &str) {
        self.hear(reason);
    }
}

impl ConsumerContext for Hearing {}

/// A client that asks and reads, and hears why it is refused.
pub(super) type Reader = BaseConsumer<Hearing>;

/// What `reader`, which reads nothing, has heard. It hears only while it is polled.
pub(super) fn heard(reader: &Reader) -> Option<Refusal> {
    // A log line comes out as nothing, so nothing is not the end; what comes meanwhile waits for the next look.
    for _ in 0..16 {
        drop(reader.poll(Duration::ZERO));
    }
    reader.context().take()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_who_refused_why_and_what_to_set() {
        let told = "sasl_ssl://kafka:9093/bootstrap: SASL authentication error: Authentication failed during authentication due to invalid credentials with SASL mechanism SCRAM-SHA-256 (after 12ms in state AUTH_REQ)";
        let found = Refusal::of(told).unwrap();
        assert_eq!(
            found.to_string(),
            "the broker at kafka:9093 refuses us: SASL authentication error: Authentication failed during authentication due to invalid credentials with SASL mechanism SCRAM-SHA-256"
        );
        assert!(found.remedy.contains("LEDGERLINE__STREAM__SASL_PASSWORD") && found.is_certain);
    }

    #[test]
    fn a_broker_that_hangs_up_is_a_guess_and_one_that_is_away_no_refusal() {
        let told = "[thrd:kafka:9093/bootstrap]: kafka:9093/bootstrap: Disconnected: connection closed by peer: receive 0 after POLLIN (after 0ms in state APIVERSION_QUERY)";
        let found = Refusal::of(told).unwrap();
        assert_eq!(found.why, "the broker at kafka:9093 refuses us: Disconnected: connection closed by peer: receive 0 after POLLIN");
        assert_eq!(found.fault(), Fault::Transient);
        assert_eq!(Refusal::of("kafka:9093/bootstrap: Connect to ipv4#127.0.0.1:9093 failed: Connection refused (after 0ms in state CONNECT)"), None);
        assert_eq!(Refusal::of("sasl_ssl://kafka:9093/1: SASL authentication error: SaslAuthenticateRequest failed: Local: Timed out"), None);
        assert_eq!(Refusal::of("1/1 brokers are down"), None);
    }

    #[test]
    fn a_password_is_in_no_text() {
        let config =
            Config { security_protocol: Protocol::SaslPlaintext, sasl_mechanism: Mechanism::Plain, sasl_username: "bank".to_owned(), ..Config::default() };
        let access = Access::new(&config, Some(&Secret::new("hunter2")), Path::new(".")).unwrap();
        assert_eq!(access.client("test").get("sasl.password"), Some("hunter2"));
        assert!(!format!("{access} {access:?} {:?}", access.client("test")).contains("hunter2"));
    }

    #[test]
    fn a_sign_in_without_a_user_or_a_password_is_refused() {
        let config = Config { security_protocol: Protocol::SaslPlaintext, sasl_mechanism: Mechanism::Plain, ..Config::default() };
        let error = Access::new(&config, Some(&Secret::new("hunter2")), Path::new(".")).unwrap_err();
        assert!(error.to_string().contains("stream.sasl_username is empty"), "{error}");
        let error = Access::new(&Config { sasl_username: "bank".to_owned(), ..config }, None, Path::new(".")).unwrap_err();
        assert!(error.to_string().contains("LEDGERLINE__STREAM__SASL_PASSWORD is empty"), "{error}");
    }

    #[test]
    fn what_needs_openssl_is_refused_by_a_build_without_it_and_names_the_feature() {
        for config in [
            Config { security_protocol: Protocol::Ssl, ..Config::default() },
            Config { security_protocol: Protocol::SaslPlaintext, sasl_username: "bank".to_owned(), ..Config::default() },
        ] {
            let made = Access::new(&config, Some(&Secret::new("hunter2")), Path::new("."));
            assert_eq!(made.is_ok(), cfg!(feature = "tls"));
            if let Err(error) = made {
                assert!(matches!(error.fault(), Fault::Operator(remedy) if remedy.contains("--features tls")), "{error}");
            }
        }
    }
}
