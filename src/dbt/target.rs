//! Where the warehouse is, in the words dbt's profile reads from its environment.

use std::time::Duration;

use sha2::{Digest as _, Sha256};
use sqlx::{ConnectOptions as _, Connection as _, postgres::PgConnectOptions};
use url::Url;

use super::Error;
use crate::secret::Secret;

/// How long a query that is told to end may take to let go of its locks.
const SWEEP_MAX: Duration = Duration::from_secs(10);

/// The warehouse dbt works in.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    Postgres(Server),
    Snowflake(Account),
}

/// A PostgreSQL warehouse.
#[derive(Debug, Clone, PartialEq)]
pub struct Server {
    pub host: String,
    pub port: u16,
    pub user: String,
    pub password: Secret,
    pub database: String,
    /// As libpq means it; dbt speaks through libpq.
    pub sslmode: String,
    /// A file with the certificate of the server's authority; empty: none is named.
    pub sslrootcert: String,
}

/// A warehouse in a Snowflake account.
#[derive(Debug, Clone, PartialEq)]
pub struct Account {
    pub account: String,
    /// The account's own host, or another one that leads there.
    pub host: String,
    pub port: u16,
    /// `https`, but for a double on this machine.
    pub protocol: String,
    pub user: String,
    /// PKCS#8 PEM.
    pub private_key: Secret,
    pub database: String,
    pub role: String,
    pub warehouse: String,
}

impl Target {
    /// From `postgres://user:password@host:port/database`.
    pub fn from_url(url: &Secret) -> Result<Self, Error> {
        Server::from_url(url).map(Self::Postgres)
    }

    /// What `profiles.yml` reads.
    pub(super) fn environment(&self, application: &str, threads: usize) -> Vec<(&'static str, String)> {
        let mut variables = match self {
            Self::Postgres(server) => server.environment(),
            Self::Snowflake(account) => account.environment(),
        };
        variables.extend([("LEDGERLINE_DBT_APPLICATION", application.to_owned()), ("LEDGERLINE_DBT_THREADS", threads.to_string())]);
        variables
    }

    /// Ends whatever a worker by this name has left running, and waits until it is gone.
    ///
    /// On Snowflake there is nothing to wait for: dbt writes in transactions, and that of a client that is gone never commits;
    /// what it locked is let go within five minutes.
    pub(super) async fn end_queries_of(&self, application: &str) -> Result<(), sqlx::Error> {
        match self {
            Self::Postgres(server) => server.end_queries_of(application).await,
            Self::Snowflake(_) => Ok(()),
        }
    }
}

impl Account {
    fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("LEDGERLINE_DBT_TARGET", "snowflake".to_owned()),
            ("LEDGERLINE_DBT_ACCOUNT", self.account.clone()),
            ("LEDGERLINE_DBT_HOST", self.host.clone()),
            ("LEDGERLINE_DBT_PORT", self.port.to_string()),
            ("LEDGERLINE_DBT_PROTOCOL", self.protocol.clone()),
            ("LEDGERLINE_DBT_USER", self.user.clone()),
            ("DBT_ENV_SECRET_LEDGERLINE_PRIVATE_KEY", self.private_key.reveal().to_owned()),
            ("LEDGERLINE_DBT_DATABASE", self.database.clone()),
            ("LEDGERLINE_DBT_ROLE", self.role.clone()),
            ("LEDGERLINE_DBT_WAREHOUSE", self.warehouse.clone()),
            // dbt renders the other output of the profile too.
            ("DBT_ENV_SECRET_LEDGERLINE_PASSWORD", String::new()),
        ]
    }
}

impl Server {
    fn from_url(url: &Secret) -> Result<Self, Error> {
        let parsed = Url::parse(url.reveal()).map_err(|_| Error::Address)?;
        let database = decoded(parsed.path().trim_start_matches('/'))?;
        let host = parsed.host_str().ok_or(Error::Address)?.trim_matches(['[', ']']).to_owned();
        let user = decoded(parsed.username())?;
        if !matches!(parsed.scheme(), "postgres" | "postgresql") || database.is_empty() || user.is_empty() {
            return Err(Error::Address);
        }
        let password = Secret::new(decoded(parsed.password().unwrap_or_default())?);
        let parameter = |wanted: &str| parsed.query_pairs().find(|(name, _)| name == wanted).map(|(_, value)| value.into_owned());
        let sslmode = parameter("sslmode").unwrap_or_else(|| "prefer".to_owned());
        let sslrootcert = parameter("sslrootcert").unwrap_or_default();
        Ok(Self { host, port: parsed.port().unwrap_or(5432), user, password, database, sslmode, sslrootcert })
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("LEDGERLINE_DBT_TARGET", "postgres".to_owned()),
            ("LEDGERLINE_DBT_HOST", self.host.clone()),
            ("LEDGERLINE_DBT_PORT", self.port.to_string()),
            ("LEDGERLINE_DBT_USER", self.user.clone()),
            ("DBT_ENV_SECRET_LEDGERLINE_PASSWORD", self.password.reveal().to_owned()),
            ("LEDGERLINE_DBT_DATABASE", self.database.clone()),
            ("LEDGERLINE_DBT_SSLMODE", self.sslmode.clone()),
            ("LEDGERLINE_DBT_SSLROOTCERT", self.sslrootcert.clone()),
        ]
    }

    /// A client that is killed is missed by its server only when it next speaks; until then its statement runs on and holds its locks.
    async fn end_queries_of(&self, application: &str) -> Result<(), sqlx::Error> {
        let mut options = PgConnectOptions::new_without_pgpass()
            .host(&self.host)
            .port(self.port)
            .username(&self.user)
            .password(self.password.reveal())
            .database(&self.database)
            .ssl_mode(self.sslmode.parse()?);
        if !self.sslrootcert.is_empty() {
            options = options.ssl_root_cert(&self.sslrootcert);
        }
        let sweep = async {
            let mut connection = options.connect().await?;
            sqlx::query("select pg_terminate_backend(pid, $2) from pg_stat_activity where application_name = $1 and pid <> pg_backend_pid()")
                .bind(application)
                .bind(i64::try_from(SWEEP_MAX.as_millis()).expect("ten seconds fit"))
                .execute(&mut connection)
                .await?;
            connection.close().await
        };
        tokio::time::timeout(SWEEP_MAX * 2, sweep).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
    }
}

/// The name under which a worker's sessions are found: one per work dir, so that two pipelines on one warehouse never meet.
pub(super) fn application_name(work_dir: &std::path::Path) -> String {
    let digest = Sha256::digest(work_dir.as_os_str().as_encoded_bytes());
    format!("ledgerline dbt {}", hex::encode(&digest[..6]))
}

/// Undoes `%41` in parts of an address.
fn decoded(text: &str) -> Result<String, Error> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first == b'%' {
            let digits = tail.get(..2).ok_or(Error::Address)?;
            bytes.extend(hex::decode(digits).map_err(|_| Error::Address)?);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).map_err(|_| Error::Address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_apart() {
        let target = Server::from_url(&Secret::new("postgres://led%40ger:p%2Fw+d@127.0.0.1:5432/ware%20house")).unwrap();
        assert_eq!((target.host.as_str(), target.port, target.user.as_str()), ("127.0.0.1", 5432, "led@ger"));
        assert_eq!((target.password.reveal(), target.database.as_str()), ("p/w+d", "ware house"));
        assert_eq!((target.sslmode.as_str(), target.sslrootcert.as_str()), ("prefer", ""));
        assert_eq!(Server::from_url(&Secret::new("postgres://bank@[::1]/warehouse")).unwrap().host, "::1");
        let verified = Server::from_url(&Secret::new("postgres://bank@db/warehouse?sslmode=verify-full&sslrootcert=%2Fetc%2Fca.pem")).unwrap();
        assert_eq!((verified.sslmode.as_str(), verified.sslrootcert.as_str()), ("verify-full", "/etc/ca.pem"));
    }

    #[test]
    fn what_is_not_a_postgres_address_is_refused() {
        for address in ["", "warehouse", "mysql://a@b/c", "postgres://host/db", "postgres://user@host", "postgres://user@host/%zz", "postgres://user@host/a%4"]
        {
            assert!(matches!(Target::from_url(&Secret::new(address)), Err(Error::Address)), "{address}");
        }
    }
}
