//! What `snowflake-api` leaves out, as one layer between it and HTTP.
//!
//! The crate signs in, numbers its statements, renews its token by the clock and decodes Arrow. Here every request gets its
//! host (the crate knows one) and every sign-in the session's parameters; a statement that takes longer than the 45 s
//! Snowflake holds a request open is asked for again until it has an answer, and cancelled where nobody waits for it any more;
//! what PUT answers is uploaded; a refusal becomes an error of ours, code and message, before the crate tries to read it.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use reqwest::{
    Client, Method, Request, Response,
    header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, HeaderValue},
};
use reqwest_middleware::{Middleware, Next};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use url::Url;

use super::{
    error::{Asker, Error, Refused},
    upload,
};

/// The crate's idea of every account's host; other hosts are stages and results, which have addresses of their own.
const ACCOUNTS: &str = ".snowflakecomputing.com";

const SIGN_IN: &str = "/session/v1/login-request";
const STATEMENT: &str = "/queries/v1/query-request";
const ABORT: &str = "/queries/v1/abort-request";

/// "The statement is still running: ask again."
const RUNNING: [&str; 2] = ["333333", "333334"];

/// Snowflake answers within 45 s or says that it is still running; who says nothing for twice as long is gone.
pub(super) const REQUEST_MAX: Duration = Duration::from_secs(90);

/// Nobody waits for the answer to a cancellation.
const ABORT_MAX: Duration = Duration::from_secs(10);

/// Between two questions after a statement that is still running. Each is held open for up to 45 s on the other side; this
/// only keeps a server that answers at once from being asked without a pause.
const AGAIN_AFTER: Duration = Duration::from_millis(500);

/// What a PUT is about to send: the crate hands over SQL only.
pub(super) type Outgoing = Arc<std::sync::Mutex<Option<(String, Bytes)>>>;

/// Why the last sign-in failed: the crate's error for it cannot be looked into.
pub(super) type Failed = Arc<std::sync::Mutex<Option<Error>>>;

/// One session's layer.
pub(super) struct Wire {
    pub(super) base: Url,
    pub(super) asker: Asker,
    /// Of the session, from its first statement on: time zone, query tag.
    pub(super) parameters: Map<String, Value>,
    pub(super) outgoing: Outgoing,
    pub(super) failed_sign_in: Failed,
    /// For what is asked beside the crate's own requests.
    pub(super) http: Client,
}

#[async_trait]
impl Middleware for Wire {
    async fn handle(&self, request: Request, extensions: &mut http::Extensions, next: Next<'_>) -> reqwest_middleware::Result<Response> {
        let signing_in = request.url().path().replace("//", "/") == SIGN_IN;
        let response = self.exchange(request, extensions, next).await;
        if signing_in
            && let Err(reqwest_middleware::Error::Middleware(error)) = &response
            && let Ok(mut failed) = self.failed_sign_in.lock()
        {
            *failed = error.downcast_ref::<Error>().cloned();
        }
        response
    }
}

impl Wire {
    async fn exchange(&self, mut request: Request, extensions: &mut http::Extensions, next: Next<'_>) -> reqwest_middleware::Result<Response> {
        if !request.url().host_str().is_some_and(|host| host.to_lowercase().ends_with(ACCOUNTS)) {
            return next.run(request, extensions).await;
        }
        let place = self.address(request.url_mut());
        if place == SIGN_IN {
            self.introduce(&mut request);
        }
        let mut cancel = (place == STATEMENT).then(|| Cancel::of(&self.http, &self.base, &request)).flatten();
        let (authorization, accept) = (request.headers().get(AUTHORIZATION).cloned(), request.headers().get(ACCEPT).cloned());
        let response = next.run(request, extensions).await.map_err(|error| self.away(&error))?;
        let mut answer = self.read(response, place == SIGN_IN).await?;
        while RUNNING.contains(&code(&answer)) {
            let Some(result) = answer["data"]["getResultUrl"].as_str().map(str::to_owned) else { break };
            tokio::time::sleep(AGAIN_AFTER).await;
            answer = self.ask_again(&result, authorization.as_ref(), accept.as_ref()).await?;
        }
        if let Some(cancel) = &mut cancel {
            cancel.over = true;
        }
        if answer["success"] != Value::Bool(true) {
            return Err(fail(Error::Refused(Box::new(Refused {
                code: code(&answer).to_owned(),
                message: answer["message"].as_str().unwrap_or_default().to_owned(),
                asker: self.asker.clone(),
            }))));
        }
        if answer["data"]["command"] == "UPLOAD" {
            let outgoing = self.outgoing.lock().ok().and_then(|mut it| it.take());
            let (name, body) = outgoing.ok_or_else(|| fail(Error::Upload("nothing was to be sent".to_owned())))?;
            upload::upload(&self.http, &answer["data"]["stageInfo"], &name, body).await.map_err(fail)?;
            answer = no_rows();
        }
        let body = serde_json::to_vec(&answer).map_err(|error| fail(Error::Answer(error.to_string())))?;
        Ok(Response::from(http::Response::new(body)))
    }

    /// Puts our host in the place of the crate's; returns the path.
    fn address(&self, url: &mut Url) -> String {
        // The crate writes `host//session/…`.
        let path = url.path().replace("//", "/");
        let query = url.query().map(str::to_owned);
        let mut ours = self.base.clone();
        ours.set_path(&path);
        ours.set_query(query.as_deref());
        *url = ours;
        path
    }

    /// The crate sends no parameters of a session, and calls itself by another's name.
    fn introduce(&self, request: &mut Request) {
        let Some(Ok(mut body)) = request.body().and_then(reqwest::Body::as_bytes).map(serde_json::from_slice::<Value>) else { return };
        let data = &mut body["data"];
        if let Some(parameters) = data["SESSION_PARAMETERS"].as_object_mut() {
            parameters.extend(self.parameters.clone());
        }
        data["CLIENT_ENVIRONMENT"]["APPLICATION"] = json!("ledgerline");
        data["CLIENT_ENVIRONMENT"]["OS"] = json!(std::env::consts::OS);
        data["CLIENT_ENVIRONMENT"]["OS_VERSION"] = json!(std::env::consts::ARCH);
        if let Ok(bytes) = serde_json::to_vec(&body) {
            request.headers_mut().remove(CONTENT_LENGTH);
            *request.body_mut() = Some(bytes.into());
        }
    }

    async fn ask_again(&self, result: &str, authorization: Option<&HeaderValue>, accept: Option<&HeaderValue>) -> reqwest_middleware::Result<Value> {
        let url = self.base.join(result).map_err(|error| fail(Error::Answer(error.to_string())))?;
        let mut request = Request::new(Method::GET, url);
        request.headers_mut().extend([(AUTHORIZATION, authorization), (ACCEPT, accept)].into_iter().filter_map(|(name, value)| Some((name, value?.clone()))));
        let response = self.http.execute(request).await.map_err(|error| self.away(&error.into()))?;
        self.read(response, false).await
    }

    async fn read(&self, response: Response, signing_in: bool) -> reqwest_middleware::Result<Value> {
        let status = response.status();
        let body = response.bytes().await.map_err(|error| self.away(&error.into()))?;
        if let Ok(answer) = serde_json::from_slice::<Value>(&body)
            && answer["success"].is_boolean()
        {
            return Ok(answer);
        }
        // A name that is no account's is answered by the front door, and not in JSON.
        if signing_in && matches!(status.as_u16(), 403 | 404) {
            return Err(fail(Error::NoAccount { host: self.host() }));
        }
        Err(fail(Error::Away { host: self.host(), why: format!("it answered {status}") }))
    }

    fn host(&self) -> String {
        let port = self.base.port().map(|it| format!(":{it}")).unwrap_or_default();
        format!("{}{port}", self.base.host_str().unwrap_or_default())
    }

    /// The chain's last cause names what happened; addresses with tokens in them stay out.
    fn away(&self, error: &reqwest_middleware::Error) -> reqwest_middleware::Error {
        let mut cause: &dyn std::error::Error = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        fail(Error::Away { host: self.host(), why: cause.to_string() })
    }
}

/// An error of ours on its way through the crate; [`super::session`] takes it out again.
fn fail(error: Error) -> reqwest_middleware::Error {
    reqwest_middleware::Error::Middleware(anyhow::Error::new(error))
}

fn code(answer: &Value) -> &str {
    answer["code"].as_str().unwrap_or_default()
}

/// An answer the crate takes for that of a statement without a result.
fn no_rows() -> Value {
    json!({"success": true, "code": null, "message": null, "data": {
        "parameters": [], "rowtype": [], "rowset": [], "total": 0, "returned": 0, "queryId": "", "finalRoleName": "", "statementTypeId": 0, "version": 1}})
}

/// A statement under way. Dropped before its answer is there, it is cancelled: Snowflake would run it to its end and bill it.
struct Cancel {
    http: Client,
    url: Url,
    authorization: HeaderValue,
    body: Value,
    over: bool,
}

impl Cancel {
    fn of(http: &Client, base: &Url, request: &Request) -> Option<Self> {
        let request_id = request.url().query_pairs().find(|(key, _)| key == "requestId")?.1.into_owned();
        let statement: Value = serde_json::from_slice(request.body()?.as_bytes()?).ok()?;
        let mut url = base.join(ABORT).ok()?;
        url.query_pairs_mut().append_pair("requestId", &name_of_its_own(&request_id));
        let body = json!({"sqlText": statement["sqlText"], "requestId": request_id});
        Some(Self { http: http.clone(), url, authorization: request.headers().get(AUTHORIZATION)?.clone(), body, over: false })
    }
}

/// A request is named by a UUID; that of a cancellation follows from the one it cancels.
fn name_of_its_own(request_id: &str) -> String {
    let digits = hex::encode(&Sha256::digest(request_id)[..16]);
    format!("{}-{}-4{}-a{}-{}", &digits[..8], &digits[8..12], &digits[13..16], &digits[17..20], &digits[20..])
}

impl Drop for Cancel {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.over {
            return;
        }
        let request = self.http.post(self.url.clone()).header(AUTHORIZATION, self.authorization.clone()).header(ACCEPT, "application/json");
        let sending = request.json(&self.body).timeout(ABORT_MAX).send();
        runtime.spawn(async move {
            if let Err(error) = sending.await {
                tracing::warn!(error = %error.without_url(), "a statement on Snowflake could not be cancelled");
            }
        });
    }
}
