//! Connections to the source: for SQL, and for replication, with one set of session settings for both.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use pgwire_replication::{ReplicationConfig, SslMode, TlsConfig};
use sqlx::{
    Connection as _,
    postgres::{PgConnectOptions, PgConnection, PgSslMode},
};

use super::error::Error;
use crate::{change::Lsn, fault::sqlstate, secret::Secret};

/// How values are printed: the same on the walsender and in the snapshot, so that a row reads the same from both.
const SETTINGS: [(&str, &str); 5] =
    [("TimeZone", "UTC"), ("DateStyle", "ISO"), ("IntervalStyle", "postgres"), ("extra_float_digits", "3"), ("bytea_output", "hex")];

/// How soon an acknowledged position reaches the slot.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);
/// Messages between the socket and the decoder.
const BUFFERED_EVENTS: usize = 1024;
/// The largest row change we take: before and after in PostgreSQL's text. The stream's own limit is below that.
const MESSAGE_BYTES_MAX: usize = 256 * 1024 * 1024;
/// How long the server may take to answer a connection.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// The source's address, taken apart once. Not `Debug`: sqlx's options would print the password.
#[derive(Clone)]
pub(super) struct Source {
    options: PgConnectOptions,
    host: String,
    port: u16,
    user: String,
    password: Secret,
    tls: TlsConfig,
    pub(super) database: String,
}

impl Source {
    pub(super) fn new(url: &Secret) -> Result<Self, Error> {
        let options = options(url)?;
        let parsed = url::Url::parse(url.reveal()).map_err(|_| Error::Address { reason: "it is not a URL" })?;
        if !matches!(parsed.scheme(), "postgres" | "postgresql") {
            return Err(Error::Address { reason: "it does not begin with postgres://" });
        }
        require_files(&parsed)?;
        let password = parsed.password().map(percent_decoded).unwrap_or_default();
        let host = options.get_socket().map_or_else(|| options.get_host().to_owned(), |path| path.display().to_string());
        Ok(Self {
            host,
            port: options.get_port(),
            user: options.get_username().to_owned(),
            password: Secret::new(password),
            tls: tls(&options, &parsed),
            database: options.get_database().unwrap_or(options.get_username()).to_owned(),
            options,
        })
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) const fn port(&self) -> u16 {
        self.port
    }

    pub(super) fn user(&self) -> &str {
        &self.user
    }

    pub(super) fn has_password(&self) -> bool {
        !self.password.reveal().is_empty()
    }

    pub(super) const fn password(&self) -> &Secret {
        &self.password
    }

    /// As libpq writes it.
    pub(super) const fn sslmode(&self) -> &'static str {
        match self.tls.mode {
            SslMode::Disable => "disable",
            SslMode::Prefer => "prefer",
            SslMode::Require => "require",
            SslMode::VerifyCa => "verify-ca",
            SslMode::VerifyFull => "verify-full",
        }
    }

    /// The file with the certificate of the authority that the server's is to be from.
    pub(super) fn authority(&self) -> Option<&Path> {
        self.tls.ca_pem_path.as_deref()
    }

    /// A connection for SQL.
    pub(super) async fn connect(&self) -> Result<PgConnection, Error> {
        connect(&self.options, "connect to the source").await
    }

    /// What the replication connection needs.
    pub(super) fn replication(&self, slot: &str, publication: &str) -> ReplicationConfig {
        let settings: Vec<String> = SETTINGS.iter().map(|(name, value)| format!("-c {name}={value}")).collect();
        ReplicationConfig::new(&self.host, &self.user, self.password.reveal(), &self.database, slot, publication)
            .with_port(self.port)
            .with_tls(self.tls.clone())
            .with_options(settings.join(" "))
            .with_application_name("ledgerline-cdc")
            .with_status_interval(STATUS_INTERVAL)
            .with_buffer_size(BUFFERED_EVENTS)
            .with_max_message_size(MESSAGE_BYTES_MAX)
    }
}

/// How long the state database may take for one of our statements: none of them takes a second, and a network that was cut
/// without a word would be waited for for ever.
const STATE_ANSWER_MAX: Duration = Duration::from_secs(30);

/// What the state database answers. Without an answer the connection is of no use any more.
pub(super) fn answer<T>(asking: impl Future<Output = Result<T, sqlx::Error>>) -> impl Future<Output = Result<T, sqlx::Error>> {
    within(STATE_ANSWER_MAX, asking)
}

fn within<T>(max: Duration, asking: impl Future<Output = Result<T, sqlx::Error>>) -> impl Future<Output = Result<T, sqlx::Error>> {
    // On the heap: whoever waits for it would carry all of it in each future on the way.
    let asking = Box::pin(asking);
    let timed_out = move |_| sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, format!("no answer within {} s", max.as_secs())));
    async move { tokio::time::timeout(max, asking).await.map_err(timed_out).and_then(|it| it) }
}

/// A connection to the state database.
pub(super) async fn connect_state(url: &Secret) -> Result<PgConnection, Error> {
    connect(&options(url)?, "connect to the state database").await
}

/// The end of the source's flushed WAL: everything committed before the call lies before it, and the slot can reach it.
///
/// Not the insert position: that may lie behind unflushed bytes which no decoder gets to see until something commits.
pub async fn wal_position(source: &Secret) -> Result<Lsn, Error> {
    let mut connection = Source::new(source)?.connect().await?;
    let position = flushed_wal(&mut connection).await?;
    let _ = connection.close().await;
    Ok(position)
}

pub(super) async fn flushed_wal(connection: &mut PgConnection) -> Result<Lsn, Error> {
    let text: String =
        sqlx::query_scalar("select pg_current_wal_flush_lsn()::text").fetch_one(connection).await.map_err(|source| match sqlstate(&source).as_deref() {
            // The only reason PostgreSQL has not to tell it.
            Some("55000") => Error::Standby,
            _ => Error::Sql { what: "read the source's WAL position", source },
        })?;
    parse_lsn(&text)
}

pub(super) fn parse_lsn(text: &str) -> Result<Lsn, Error> {
    text.parse().map_err(|_| Error::Progress { reason: "an LSN is not one" })
}

/// `"name"`, for statements that take no parameters.
pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn options(url: &Secret) -> Result<PgConnectOptions, Error> {
    let options: PgConnectOptions = url.reveal().parse().map_err(|_| Error::Address { reason: "it cannot be read" })?;
    let names_an_authority = url::Url::parse(url.reveal()).is_ok_and(|it| parameter(&it, &ROOT_CERTIFICATE).is_some());
    let mode = match options.get_ssl_mode() {
        // As libpq has it: who names an authority wants it asked.
        PgSslMode::Require if names_an_authority => PgSslMode::VerifyCa,
        mode => mode,
    };
    Ok(options.ssl_mode(mode).application_name("ledgerline-cdc").options(SETTINGS))
}

/// libpq's names of these, and sqlx's.
const ROOT_CERTIFICATE: [&str; 3] = ["sslrootcert", "ssl-root-cert", "ssl-ca"];
const CERTIFICATE: [&str; 2] = ["sslcert", "ssl-cert"];
const KEY: [&str; 2] = ["sslkey", "ssl-key"];

fn parameter(url: &url::Url, names: &[&str]) -> Option<PathBuf> {
    url.query_pairs().find(|(name, _)| names.contains(&name.as_ref())).map(|(_, value)| PathBuf::from(value.into_owned()))
}

/// A file that is not there would only be missed by the handshake, which then says it as if the network had.
fn require_files(url: &url::Url) -> Result<(), Error> {
    for (names, label) in [(&ROOT_CERTIFICATE[..], "sslrootcert"), (&CERTIFICATE, "sslcert"), (&KEY, "sslkey")] {
        let Some(path) = parameter(url, names) else { continue };
        std::fs::File::open(&path).map_err(|error| Error::Certificate { parameter: label, path: path.display().to_string(), reason: error.kind() })?;
    }
    Ok(())
}

/// With verify-ca the server may have any name, but the transport (pgwire-replication 0.5) refuses all that are not the certificate's.
/// So it is asked once more for the name that its certificate is valid for, and checks the chain again. None: that is not the trouble.
pub(super) fn by_the_certificates_name(config: ReplicationConfig, refusal: &str) -> Option<ReplicationConfig> {
    let (_, names) = refusal.split_once("is only valid for ")?;
    let quoted = |before: &str, after: char| Some(names.split_once(before)?.1.split_once(after)?.0.to_owned());
    // Any host of a wildcard will do.
    let name = quoted("DnsName(\"", '"').map(|name| name.replace('*', "any")).or_else(|| quoted("IpAddress(", ')'))?;
    let tls = TlsConfig { sni_hostname: Some(name), ..config.tls.clone() };
    Some(config.with_tls(tls))
}

/// For the replication connection what sqlx reads out of the address for the others.
fn tls(options: &PgConnectOptions, url: &url::Url) -> TlsConfig {
    let mode = match options.get_ssl_mode() {
        // With "allow" plain comes first, and no server refuses that but one that asks for TLS.
        PgSslMode::Disable | PgSslMode::Allow => SslMode::Disable,
        PgSslMode::Prefer => SslMode::Prefer,
        PgSslMode::Require => SslMode::Require,
        PgSslMode::VerifyCa => SslMode::VerifyCa,
        PgSslMode::VerifyFull => SslMode::VerifyFull,
    };
    TlsConfig {
        mode,
        ca_pem_path: parameter(url, &ROOT_CERTIFICATE),
        // Otherwise an IP address is refused, though a certificate may well name one.
        sni_hostname: Some(options.get_host().to_owned()),
        client_cert_pem_path: parameter(url, &CERTIFICATE),
        client_key_pem_path: parameter(url, &KEY),
    }
}

async fn connect(options: &PgConnectOptions, what: &'static str) -> Result<PgConnection, Error> {
    within(CONNECT_MAX, PgConnection::connect_with(options)).await.map_err(|source| Error::Sql { what, source })
}

/// `%40` → `@`.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code =
            (*first == b'%').then(|| after.get(..2)).flatten().and_then(|it| std::str::from_utf8(it).ok()).and_then(|it| u8::from_str_radix(it, 16).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Diagnose as _, Fault, chain};

    #[test]
    fn an_address_is_taken_apart() {
        let source = Source::new(&Secret::new("postgres://bank%40x:p%25w%2Fd@db:6543/ledger?application_name=x")).expect("valid");
        assert_eq!((source.host.as_str(), source.port, source.user.as_str(), source.password.reveal()), ("db", 6543, "bank@x", "p%w/d"));
        assert_eq!(source.database, "ledger");
    }

    #[tokio::test]
    async fn a_database_that_does_not_answer_is_given_up() {
        let silent = within(Duration::from_millis(1), std::future::pending::<Result<(), sqlx::Error>>()).await.expect_err("nobody answers");
        let error = Error::Sql { what: "keep the snapshot's progress in the state database", source: silent };
        assert!(error.fault() == Fault::Transient && chain(&error).ends_with("no answer within 0 s"), "{error:?}");
        assert!(answer(std::future::ready(Ok(()))).await.is_ok());
    }

    #[test]
    fn tls_is_what_libpq_means_by_the_same_words() {
        let of = |query: &str| {
            let source = Source::new(&Secret::new(format!("postgres://bank@10.0.0.7/bank{query}"))).expect("valid");
            assert_eq!(source.tls.mode.requires_tls(), !matches!(source.options.get_ssl_mode(), PgSslMode::Disable | PgSslMode::Allow | PgSslMode::Prefer));
            source.tls
        };
        assert_eq!(["", "?sslmode=disable", "?sslmode=require"].map(|it| of(it).mode), [SslMode::Prefer, SslMode::Disable, SslMode::Require]);
        let file = tempfile::NamedTempFile::new().expect("a file");
        let path = file.path().display();
        let verified = of(&format!("?sslmode=require&sslrootcert={path}"));
        assert_eq!((verified.mode, verified.ca_pem_path), (SslMode::VerifyCa, Some(file.path().to_owned())));
        let full = of(&format!("?sslmode=verify-full&sslcert={path}&sslkey={path}"));
        assert!(full.mode == SslMode::VerifyFull && full.is_mtls() && full.sni_hostname.as_deref() == Some("10.0.0.7"));
    }

    #[test]
    fn a_certificate_tells_the_name_to_go_by() {
        let refused = |refusal: &str| {
            let source = Source::new(&Secret::new("postgres://bank@10.0.0.7/bank?sslmode=verify-ca")).expect("valid");
            by_the_certificates_name(source.replication("s", "p"), refusal).and_then(|it| it.tls.sni_hostname)
        };
        let refusal = r#"TLS handshake failed: invalid peer certificate: certificate not valid for name "10.0.0.7"; certificate is only valid for DnsName("*.bank.example") or IpAddress(10.0.0.8)"#;
        assert_eq!(refused(refusal).as_deref(), Some("any.bank.example"));
        assert_eq!(refused("certificate is only valid for IpAddress(10.0.0.8)").as_deref(), Some("10.0.0.8"));
        assert_eq!(refused("invalid peer certificate: UnknownIssuer"), None);
    }

    #[test]
    fn what_is_no_address_is_refused_without_saying_it() {
        let Err(error) = Source::new(&Secret::new("mysql://root:secret@db/x")) else { panic!("not PostgreSQL") };
        assert!(!format!("{error} {error:?}").contains("secret"));
    }

    #[test]
    fn names_are_quoted_as_identifiers() {
        assert_eq!(quoted("weird \"name\""), "\"weird \"\"name\"\"\"");
    }
}
