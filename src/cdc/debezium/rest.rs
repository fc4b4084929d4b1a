//! Kafka Connect's REST, as far as one connector needs it. Every call is bounded in time, and no answer is trusted with more than
//! one line of an error text.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::Deserialize;
use serde_json::{Map, Value};
use url::Url;

use super::settings::CLASS;
use crate::{cdc::error::Error, fault::chain, secret::Secret};

/// Validation connects to the source; everything else is quick.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// What Connect says while its workers share out their work, and how long that is waited for; it takes seconds.
const REBALANCE: &[u8] = b"rebalance";
const REBALANCE_MAX: Duration = Duration::from_secs(20);
const REBALANCE_POLL: Duration = Duration::from_millis(300);
/// The validation of a connector is some 200 kB.
const ANSWER_BYTES_MAX: usize = 8 << 20;
/// What of a foreign error text is repeated.
const TOLD_CHARS_MAX: usize = 400;

/// A connector's settings as Connect keeps them: all values are texts.
pub(in crate::cdc) type Settings = Map<String, Value>;

/// A client of one Connect cluster. Not `Debug`: it holds the sign-in.
#[derive(Clone)]
pub(in crate::cdc) struct Rest {
    /// Without user and password, with a trailing slash.
    base: Url,
    authorization: Option<HeaderValue>,
    http: Http,
    /// Never repeated, should an answer quote it.
    hidden: Secret,
}

#[derive(Clone)]
enum Http {
    Plain(Client<HttpConnector, Full<Bytes>>),
    Tls(Client<HttpsConnector<HttpConnector>, Full<Bytes>>),
}

#[derive(Debug, Clone, Deserialize)]
pub(in crate::cdc) struct Status {
    pub(in crate::cdc) connector: Part,
    #[serde(default)]
    pub(in crate::cdc) tasks: Vec<Part>,
}

/// The connector itself, or one of its tasks.
#[derive(Debug, Clone, Deserialize)]
pub(in crate::cdc) struct Part {
    #[serde(default)]
    pub(in crate::cdc) id: u32,
    /// RUNNING, PAUSED, STOPPED, FAILED, UNASSIGNED, RESTARTING.
    pub(in crate::cdc) state: String,
    #[serde(default)]
    pub(in crate::cdc) worker_id: String,
    pub(in crate::cdc) trace: Option<String>,
}

impl Status {
    /// Whether somebody paused or stopped it.
    pub(in crate::cdc) fn stands_still(&self) -> bool {
        matches!(self.connector.state.as_str(), "PAUSED" | "STOPPED")
    }

    /// The part that failed, the connector itself before its tasks.
    pub(in crate::cdc) fn failed(&self) -> Option<&Part> {
        std::iter::once(&self.connector).chain(&self.tasks).find(|it| it.state == "FAILED")
    }
}

/// The newest source offset that Connect has written down: everything before it is with the broker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(in crate::cdc) struct Offset {
    pub(in crate::cdc) lsn: Option<u64>,
    /// False while the initial snapshot is read; absent afterwards.
    snapshot_completed: Option<bool>,
}

impl Offset {
    /// Whether the snapshot's last row is with the broker. Connect writes an offset only when all records before it are.
    pub(in crate::cdc) fn is_past_snapshot(self) -> bool {
        self.snapshot_completed != Some(false)
    }
}

#[derive(Deserialize)]
struct Offsets {
    offsets: Vec<PartitionOffset>,
}

#[derive(Deserialize)]
struct PartitionOffset {
    offset: Option<Offset>,
}

#[derive(Deserialize)]
struct Plugin {
    class: String,
    version: Option<String>,
}

#[derive(Deserialize)]
struct Validation {
    configs: Vec<ValidatedField>,
}

#[derive(Deserialize)]
struct ValidatedField {
    value: FieldValue,
}

#[derive(Deserialize)]
struct FieldValue {
    name: String,
    errors: Vec<String>,
}

impl Rest {
    /// `hidden` is the source's password.
    pub(in crate::cdc) fn new(url: &str, password: Option<&Secret>, hidden: Secret) -> Result<Self, Error> {
        let refuse = |reason: &str| Error::ConnectAddress { reason: reason.to_owned() };
        let mut base = Url::parse(url).map_err(|error| refuse(&error.to_string()))?;
        if base.host_str().is_none() {
            return Err(refuse("it names no host"));
        }
        let http = match base.scheme() {
            "http" => Http::Plain(Client::builder(TokioExecutor::new()).build_http()),
            "https" => Http::Tls(Client::builder(TokioExecutor::new()).build(tls().map_err(|error| refuse(&error.to_string()))?)),
            _ => return Err(refuse("it begins with neither http:// nor https://")),
        };
        let user = base.username().to_owned();
        let password = password.map(|it| it.reveal().to_owned()).or_else(|| base.password().map(str::to_owned)).unwrap_or_default();
        let authorization = (!user.is_empty()).then(|| basic(&user, &password));
        // Both can be set on a URL that has a host.
        let _ = (base.set_username(""), base.set_password(None));
        if !base.path().ends_with('/') {
            base.set_path(&format!("{}/", base.path()));
        }
        Ok(Self { base, authorization, http, hidden })
    }

    pub(in crate::cdc) fn address(&self) -> &str {
        self.base.as_str()
    }

    /// The version of Debezium's connector for PostgreSQL.
    pub(in crate::cdc) async fn plugin_version(&self) -> Result<String, Error> {
        let plugins: Vec<Plugin> = self.read(self.ask(Method::GET, "connector-plugins", None).await?)?;
        let found = plugins.into_iter().find(|it| it.class == CLASS);
        found.and_then(|it| it.version).ok_or_else(|| Error::PluginMissing { address: self.address().to_owned() })
    }

    /// The connector's settings; None if there is no such connector.
    pub(in crate::cdc) async fn settings(&self, name: &str) -> Result<Option<Settings>, Error> {
        self.found(self.ask(Method::GET, &path(name, "config"), None).await?)
    }

    /// None if there is none, and for a moment after it was made.
    pub(in crate::cdc) async fn status(&self, name: &str) -> Result<Option<Status>, Error> {
        self.found(self.ask(Method::GET, &path(name, "status"), None).await?)
    }

    pub(in crate::cdc) async fn offset(&self, name: &str) -> Result<Option<Offset>, Error> {
        let offsets: Option<Offsets> = self.found(self.ask(Method::GET, &path(name, "offsets"), None).await?)?;
        Ok(offsets.and_then(|it| it.offsets.into_iter().find_map(|it| it.offset)))
    }

    /// What the plugin finds wrong with the settings, field by field.
    pub(in crate::cdc) async fn validate(&self, name: &str, settings: &Settings) -> Result<(), Error> {
        let mut settings = settings.clone();
        settings.insert("name".to_owned(), name.into());
        let path = format!("connector-plugins/{CLASS}/config/validate");
        let found: Validation = self.read(self.ask(Method::PUT, &path, Some(&settings.into())).await?)?;
        let wrong = found.configs.into_iter().filter(|it| !it.value.errors.is_empty());
        let fields: Vec<(String, String)> = wrong.map(|it| (it.value.name, self.told(&it.value.errors.join("; ")))).collect();
        if fields.is_empty() { Ok(()) } else { Err(Error::Rejected { connector: name.to_owned(), fields }) }
    }

    /// Makes a connector that stands still: offsets of an earlier life can be forgotten before it reads them.
    pub(in crate::cdc) async fn create_stopped(&self, name: &str, settings: &Settings) -> Result<(), Error> {
        let body = serde_json::json!({ "name": name, "config": settings, "initial_state": "STOPPED" });
        self.done(self.ask(Method::POST, "connectors", Some(&body)).await?)
    }

    pub(in crate::cdc) async fn update(&self, name: &str, settings: &Settings) -> Result<(), Error> {
        self.done(self.ask(Method::PUT, &path(name, "config"), Some(&settings.clone().into())).await?)
    }

    pub(in crate::cdc) async fn pause(&self, name: &str) -> Result<(), Error> {
        self.done(self.ask(Method::PUT, &path(name, "pause"), None).await?)
    }

    pub(in crate::cdc) async fn resume(&self, name: &str) -> Result<(), Error> {
        self.done(self.ask(Method::PUT, &path(name, "resume"), None).await?)
    }

    pub(in crate::cdc) async fn stop(&self, name: &str) -> Result<(), Error> {
        self.done(self.ask(Method::PUT, &path(name, "stop"), None).await?)
    }

    /// Restarts what failed and leaves alone what runs.
    pub(in crate::cdc) async fn restart_failed(&self, name: &str) -> Result<(), Error> {
        self.done(self.ask(Method::POST, &path(name, "restart?includeTasks=true&onlyFailed=true"), None).await?)
    }

    /// Only a stopped connector lets its offsets go.
    pub(in crate::cdc) async fn forget_offsets(&self, name: &str) -> Result<(), Error> {
        self.done(self.ask(Method::DELETE, &path(name, "offsets"), None).await?)
    }

    pub(in crate::cdc) async fn delete(&self, name: &str) -> Result<(), Error> {
        self.done(self.ask(Method::DELETE, &path(name, ""), None).await?)
    }

    /// One line of somebody else's text, without the source's password.
    pub(in crate::cdc) fn told(&self, text: &str) -> String {
        let line = text.lines().next().unwrap_or_default().trim();
        let hidden = self.hidden.reveal();
        let line = if hidden.is_empty() { line.to_owned() } else { line.replace(hidden, "***") };
        line.chars().take(TOLD_CHARS_MAX).collect()
    }

    /// Asks again while the workers share out their work: Connect then refuses without having done anything.
    async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<(StatusCode, Bytes), Error> {
        let deadline = Instant::now() + REBALANCE_MAX;
        loop {
            let (status, answer) = self.ask_once(method.clone(), path, body).await?;
            let refused_meanwhile = !status.is_success() && answer.windows(REBALANCE.len()).any(|it| it == REBALANCE);
            if !refused_meanwhile || Instant::now() >= deadline {
                return Ok((status, answer));
            }
            tokio::time::sleep(REBALANCE_POLL).await;
        }
    }

    async fn ask_once(&self, method: Method, path: &str, body: Option<&Value>) -> Result<(StatusCode, Bytes), Error> {
        let away = |reason: String| Error::ConnectAway { address: self.address().to_owned(), reason };
        let address = self.base.join(path).map_err(|error| Error::ConnectAddress { reason: error.to_string() })?;
        let mut request = Request::builder().method(method).uri(address.as_str()).header(header::ACCEPT, "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization.clone());
        }
        let bytes = body.map(|it| Bytes::from(it.to_string()));
        if bytes.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(bytes.unwrap_or_default())).map_err(|error| Error::ConnectAddress { reason: error.to_string() })?;
        let answered = async {
            let answer = match &self.http {
                Http::Plain(http) => http.request(request).await,
                Http::Tls(http) => http.request(request).await,
            };
            let answer = answer.map_err(|error| away(chain(&error)))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await.map_err(|error| away(error.to_string()))?;
            Ok((status, body.to_bytes()))
        };
        tokio::time::timeout(ANSWER_MAX, answered).await.map_err(|_| away(format!("no answer within {} s", ANSWER_MAX.as_secs())))?
    }

    /// None for 404.
    fn found<T: for<'a> Deserialize<'a>>(&self, answer: (StatusCode, Bytes)) -> Result<Option<T>, Error> {
        if answer.0 == StatusCode::NOT_FOUND { Ok(None) } else { self.read(answer).map(Some) }
    }

    fn read<T: for<'a> Deserialize<'a>>(&self, (status, body): (StatusCode, Bytes)) -> Result<T, Error> {
        if !status.is_success() {
            return Err(self.refused(status, &body));
        }
        serde_json::from_slice(&body).map_err(|error| Error::ConnectAnswer { reason: format!("its answer cannot be read: {error}"), status: status.as_u16() })
    }

    fn done(&self, (status, body): (StatusCode, Bytes)) -> Result<(), Error> {
        if status.is_success() { Ok(()) } else { Err(self.refused(status, &body)) }
    }

    fn refused(&self, status: StatusCode, body: &[u8]) -> Error {
        // A worker opens its port before it knows its resources: until then nothing is there.
        if status == StatusCode::NOT_FOUND {
            return Error::ConnectAway { address: self.address().to_owned(), reason: "it has no such resource (404), or not yet".to_owned() };
        }
        let message = serde_json::from_slice::<Value>(body).ok().and_then(|it| Some(it.get("message")?.as_str()?.to_owned()));
        // Its validation text begins with a line that says nothing.
        let message = message.unwrap_or_default();
        let line = message.lines().map(str::trim).filter(|it| !it.is_empty()).take(3).collect::<Vec<_>>().join(" ");
        Error::ConnectAnswer { reason: self.told(&line), status: status.as_u16() }
    }
}

fn tls() -> Result<HttpsConnector<HttpConnector>, std::io::Error> {
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    Ok(HttpsConnectorBuilder::new().with_provider_and_native_roots(provider)?.https_only().enable_http1().build())
}

fn path(connector: &str, rest: &str) -> String {
    let name: String = url::form_urlencoded::byte_serialize(connector.as_bytes()).collect::<String>().replace('+', "%20");
    if rest.is_empty() { format!("connectors/{name}") } else { format!("connectors/{name}/{rest}") }
}

fn basic(user: &str, password: &str) -> HeaderValue {
    let mut value = HeaderValue::try_from(format!("Basic {}", base64(format!("{user}:{password}").as_bytes()))).expect("base64 is ASCII");
    value.set_sensitive(true);
    value
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits = u32::from(group[0]) << 16 | u32::from(*group.get(1).unwrap_or(&0)) << 8 | u32::from(*group.get(2).unwrap_or(&0));
        for place in 0..4 {
            let six = usize::try_from(bits >> (18 - 6 * place) & 63).expect("six bits");
            text.push(if place <= group.len() { char::from(LETTERS[six]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_in_is_sent_and_never_shown() {
        let rest = Rest::new("http://ops@connect:8083/kc", Some(&Secret::new("hunter2")), Secret::default()).expect("an address");
        assert_eq!(rest.address(), "http://connect:8083/kc/");
        let authorization = rest.authorization.expect("a sign-in");
        assert_eq!(authorization.to_str().expect("text"), "Basic b3BzOmh1bnRlcjI=");
        assert!(!format!("{authorization:?}").contains("b3Bz"));
    }

    #[test]
    fn what_connect_quotes_is_one_line_without_the_password() {
        let rest = Rest::new("http://connect:8083", None, Secret::new("hunter2")).expect("an address");
        assert_eq!(rest.told("bad hunter2 here\n\tat java.lang"), "bad *** here");
    }

    #[test]
    fn an_offset_tells_whether_the_snapshot_is_over() {
        let offset = |text| serde_json::from_str::<Offset>(text).expect("an offset");
        assert!(!offset(r#"{"last_snapshot_record":false,"lsn":160086376,"txId":765,"snapshot":"INITIAL","snapshot_completed":false}"#).is_past_snapshot());
        assert!(offset(r#"{"lsn":160086376,"txId":765,"ts_usec":1}"#).is_past_snapshot());
        assert_eq!(offset(r#"{"lsn_proc":166511120,"messageType":"COMMIT","lsn_commit":166511120,"lsn":166511120}"#).lsn, Some(166_511_120));
    }

    #[test]
    fn what_is_no_address_of_connect_is_refused() {
        for wrong in ["connect:8083", "ftp://connect", "not a url"] {
            assert!(matches!(Rest::new(wrong, None, Secret::default()), Err(Error::ConnectAddress { .. })), "{wrong}");
        }
    }
}
