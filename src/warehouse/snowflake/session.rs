//! One session with Snowflake: statements in, rows of text out.
//!
//! Every column is asked for as text (`::varchar`): what a number looks like in Arrow depends on its size, and a text does not.

use std::{sync::Arc, time::Duration};

use arrow_array::{Array, cast::AsArray};
use bytes::Bytes;
use reqwest::Client;
use serde_json::{Map, Value, json};
use snowflake_api::{AuthArgs, AuthType, CertificateArgs, QueryResult, SnowflakeApi, SnowflakeApiBuilder, SnowflakeApiError};

use super::{
    address::Settings,
    error::{Asker, Error},
    wire::{Failed, Outgoing, Wire},
};

/// No statement of ours is worth more; whoever waits for a task has limits of their own.
const STATEMENT_MAX: Duration = Duration::from_secs(3600);
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// Nobody waits for a session to be closed.
const FAREWELL_MAX: Duration = Duration::from_secs(10);

/// A row as text; None is NULL.
pub type Row = Vec<Option<String>>;

/// The HTTP client that all sessions of an account share.
pub(super) fn http(request_max: Duration) -> Result<Client, Error> {
    let client = Client::builder().connect_timeout(CONNECT_MAX).timeout(request_max).gzip(true).user_agent(concat!("ledgerline/", env!("CARGO_PKG_VERSION")));
    client.build().map_err(|error| Error::Answer(error.to_string()))
}

/// A session: its transaction and its temporary tables are its own. It signs in with its first statement, and again with the
/// next where the token has run out.
///
/// Dropped, it signs out: a transaction that was open must not hold its lane until Snowflake misses the client.
pub(crate) struct Session {
    /// None only while it is being dropped.
    api: Option<SnowflakeApi>,
    outgoing: Outgoing,
    failed_sign_in: Failed,
    /// A PUT is a statement and what it sends; one at a time.
    putting: tokio::sync::Mutex<()>,
}

impl Session {
    pub(super) fn new(settings: &Settings, http: &Client, tag: &str) -> Result<Self, Error> {
        let (outgoing, failed_sign_in) = (Outgoing::default(), Failed::default());
        let parameters = Map::from_iter([
            ("TIMEZONE".to_owned(), json!("UTC")),
            ("QUERY_TAG".to_owned(), json!(tag)),
            ("STATEMENT_TIMEOUT_IN_SECONDS".to_owned(), json!(STATEMENT_MAX.as_secs())),
            // A session that is gone must not hold a lane: its open transaction is rolled back.
            ("ABORT_DETACHED_QUERY".to_owned(), Value::Bool(true)),
        ]);
        let wire = Wire {
            base: settings.endpoint().clone(),
            asker: Asker {
                user: settings.user.clone(),
                role: settings.role.clone(),
                warehouse: settings.warehouse.clone(),
                database: settings.database.clone(),
            },
            parameters,
            outgoing: Arc::clone(&outgoing),
            failed_sign_in: Arc::clone(&failed_sign_in),
            http: http.clone(),
        };
        let auth = AuthArgs {
            account_identifier: settings.locator().to_owned(),
            warehouse: Some(settings.warehouse.clone()),
            database: Some(settings.database.clone()),
            schema: None,
            username: settings.user.clone(),
            role: Some(settings.role.clone()),
            auth_type: AuthType::Certificate(CertificateArgs { private_key_pem: settings.private_key.reveal().to_owned() }),
        };
        let client = reqwest_middleware::ClientBuilder::new(http.clone()).with(wire).build();
        let api = SnowflakeApiBuilder::new(auth).with_client(client).build().map_err(|error| told(error, &failed_sign_in))?;
        Ok(Self { api: Some(api), outgoing, failed_sign_in, putting: tokio::sync::Mutex::new(()) })
    }

    /// Runs one statement. Dropped in the middle, it cancels it.
    pub(crate) async fn run(&self, sql: &str) -> Result<(), Error> {
        self.rows(sql).await.map(drop)
    }

    /// Runs one statement and returns its rows.
    pub(crate) async fn rows(&self, sql: &str) -> Result<Vec<Row>, Error> {
        let api = self.api.as_ref().expect("it is there until it is dropped");
        let result = tokio::time::timeout(STATEMENT_MAX, api.exec(sql)).await;
        match result.map_err(|_| Error::TimedOut { seconds: STATEMENT_MAX.as_secs() })?.map_err(|error| told(error, &self.failed_sign_in))? {
            QueryResult::Empty => Ok(Vec::new()),
            QueryResult::Json(json) => {
                Ok(json.value.as_array().into_iter().flatten().map(|row| row.as_array().into_iter().flatten().map(cell).collect()).collect())
            }
            QueryResult::Arrow(batches) => {
                let mut rows = Vec::new();
                for batch in batches {
                    for row in 0..batch.num_rows() {
                        rows.push(batch.columns().iter().map(|column| shown(column.as_ref(), row)).collect::<Result<Row, Error>>()?);
                    }
                }
                Ok(rows)
            }
        }
    }

    /// How many rows an INSERT, UPDATE or DELETE changed.
    pub(crate) async fn changed(&self, sql: &str) -> Result<u64, Error> {
        let rows = self.rows(sql).await?;
        let number = rows.first().and_then(|row| row.first()?.as_deref()?.parse().ok());
        number.ok_or_else(|| Error::Answer("it does not say how many rows were changed".to_owned()))
    }

    /// Writes a file into a stage: `to` is `raw.ledgerline/<folder>`.
    pub(crate) async fn put(&self, to: &str, name: &str, body: Bytes) -> Result<(), Error> {
        let _alone = self.putting.lock().await;
        if let Ok(mut outgoing) = self.outgoing.lock() {
            *outgoing = Some((name.to_owned(), body));
        }
        // The line break keeps the crate from uploading by itself: it reads files, and knows one cloud.
        self.run(&format!("\nput file:///{name} @{to} auto_compress = false source_compression = none overwrite = true")).await
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let (Some(mut api), Ok(runtime)) = (self.api.take(), tokio::runtime::Handle::try_current()) else { return };
        runtime.spawn(async move {
            // One that never signed in sends nothing. An error means that Snowflake ends it by itself, later.
            if let Ok(Err(error)) = tokio::time::timeout(FAREWELL_MAX, api.close_session()).await {
                tracing::debug!(%error, "a session on Snowflake was not closed");
            }
        });
    }
}

/// What the wire said, out of the crate's wrapping; else the crate's own words.
fn told(error: SnowflakeApiError, failed_sign_in: &Failed) -> Error {
    use reqwest_middleware::Error::Middleware;
    use snowflake_api::connection::ConnectionError::RequestMiddlewareError;
    match error {
        SnowflakeApiError::RequestError(RequestMiddlewareError(Middleware(ours))) => {
            ours.downcast::<Error>().unwrap_or_else(|other| Error::Answer(other.to_string()))
        }
        // The crate keeps the type of these to itself, so the wire has put its own word aside. Without one, nothing was sent:
        // what is left of a sign-in is the token, which is signed here.
        SnowflakeApiError::AuthError(_) => failed_sign_in.lock().ok().and_then(|mut it| it.take()).unwrap_or(Error::KeyForm("cannot be read as PKCS#8")),
        other => Error::Answer(other.to_string()),
    }
}

fn cell(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

/// Text, and the small numbers of statements that are no SELECT.
fn shown(column: &dyn Array, row: usize) -> Result<Option<String>, Error> {
    use arrow_schema::DataType;
    if column.is_null(row) {
        return Ok(None);
    }
    Ok(Some(match column.data_type() {
        DataType::Utf8 => column.as_string::<i32>().value(row).to_owned(),
        DataType::LargeUtf8 => column.as_string::<i64>().value(row).to_owned(),
        DataType::Int8 => column.as_primitive::<arrow_array::types::Int8Type>().value(row).to_string(),
        DataType::Int16 => column.as_primitive::<arrow_array::types::Int16Type>().value(row).to_string(),
        DataType::Int32 => column.as_primitive::<arrow_array::types::Int32Type>().value(row).to_string(),
        DataType::Int64 => column.as_primitive::<arrow_array::types::Int64Type>().value(row).to_string(),
        DataType::Boolean => column.as_boolean().value(row).to_string(),
        other => return Err(Error::Answer(format!("a column of type {other} was not asked for as text"))),
    }))
}
