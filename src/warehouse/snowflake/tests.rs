//! What no double shows: slow statements, sessions that end, cancellation, refusals. Against a server that speaks so much of the
//! protocol, over a real socket.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::Notify,
};
use url::Url;

use super::*;
use crate::{
    fault::{Diagnose, Fault},
    secret::Secret,
};

/// Made for these tests; it opens nothing.
const KEY: &str = include_str!("throwaway_key.pem");

/// However slow the machine is.
const SOON: Duration = Duration::from_secs(60);

/// What the server says next to a statement.
enum Say {
    Rows(&'static str),
    /// "Still running", and then this at the other address; nothing there for `NEVER`.
    Later(&'static str),
    Refuse(&'static str, &'static str),
    /// Nothing, ever.
    Nothing,
}

const NEVER: &str = "never";

/// A sign-in that gets no answer.
const SILENT: (u16, &str) = (0, "");

/// An account that follows a script.
struct Account {
    url: Url,
    heard: Arc<Mutex<Vec<(String, Value)>>>,
    news: Arc<Notify>,
}

impl Account {
    async fn start(sign_in: Option<(u16, &'static str)>, script: Vec<Say>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = Url::parse(&format!("http://{}", listener.local_addr().expect("it is bound"))).expect("an address");
        let this = Self { url, heard: Arc::default(), news: Arc::default() };
        let (heard, news, script) = (Arc::clone(&this.heard), Arc::clone(&this.news), Arc::new(Mutex::new(VecDeque::from(script))));
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                tokio::spawn(serve(connection, sign_in, Arc::clone(&script), Arc::clone(&heard), Arc::clone(&news)));
            }
        });
        this
    }

    fn access(&self) -> Access {
        Access {
            url: Secret::new("snowflake://acc/bank?warehouse=w&role=r&user=u"),
            endpoint: Some(self.url.clone()),
            private_key: Some(Secret::new(KEY)),
            stage: None,
        }
    }

    async fn connect(&self) -> Result<Snowflake, Error> {
        Snowflake::connect(&self.access()).await
    }

    fn heard(&self, path: &str) -> Vec<Value> {
        self.heard.lock().expect("whole").iter().filter(|it| it.0 == path).map(|it| it.1.clone()).collect()
    }

    async fn hears(&self, path: &str) -> Value {
        let waiting = async {
            loop {
                let news = self.news.notified();
                if let Some(body) = self.heard(path).pop() {
                    return body;
                }
                news.await;
            }
        };
        tokio::time::timeout(SOON, waiting).await.unwrap_or_else(|_| panic!("{path} was never asked"))
    }
}

type Script = Arc<Mutex<VecDeque<Say>>>;

async fn serve(connection: TcpStream, sign_in: Option<(u16, &'static str)>, script: Script, heard: Arc<Mutex<Vec<(String, Value)>>>, news: Arc<Notify>) {
    let mut connection = BufReader::new(connection);
    let (mut line, mut length) = (String::new(), 0);
    connection.read_line(&mut line).await.expect("a request");
    let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let path = target.split('?').next().unwrap_or_default().to_owned();
    loop {
        line.clear();
        if connection.read_line(&mut line).await.unwrap_or(0) < 3 {
            break;
        }
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a number");
        }
    }
    let mut body = vec![0; length];
    connection.read_exact(&mut body).await.expect("the body");
    heard.lock().expect("whole").push((path.clone(), serde_json::from_slice(&body).unwrap_or_default()));
    news.notify_waiters();
    let (status, answer) = match path.as_str() {
        "/session/v1/login-request" => match sign_in {
            Some(SILENT) => std::future::pending().await,
            Some(refused) => (refused.0, refused.1.to_owned()),
            None => (200, signed_in().to_string()),
        },
        "/queries/v1/query-request" => {
            let said = script.lock().expect("whole").pop_front();
            match said {
                Some(Say::Rows(rows)) => (200, rows_of(rows).to_string()),
                Some(Say::Later(rows)) => {
                    (200, json!({"success": true, "code": "333334", "message": null, "data": {"getResultUrl": format!("/later/{rows}")}}).to_string())
                }
                Some(Say::Refuse(code, message)) => (200, json!({"success": false, "code": code, "message": message, "data": null}).to_string()),
                Some(Say::Nothing) => std::future::pending().await,
                None => (200, rows_of("0").to_string()),
            }
        }
        later if later.ends_with(NEVER) => std::future::pending().await,
        later if later.starts_with("/later/") => (200, rows_of(later.trim_start_matches("/later/")).to_string()),
        _ => (200, json!({"success": true, "code": null, "message": null, "data": null}).to_string()),
    };
    let head = format!("HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", answer.len());
    let _ = connection.write_all(format!("{head}{answer}").as_bytes()).await;
}

fn signed_in() -> Value {
    json!({"success": true, "code": null, "message": null, "data": {
        "sessionId": 1, "token": "session", "masterToken": "master", "serverVersion": "1", "parameters": [],
        "sessionInfo": {"databaseName": "BANK", "schemaName": null, "warehouseName": "W", "roleName": "R"},
        "masterValidityInSeconds": 14400, "validityInSeconds": 3600}})
}

fn rows_of(value: &str) -> Value {
    json!({"success": true, "code": null, "message": null, "data": {
        "parameters": [], "rowtype": [], "rowset": [[value]], "total": 1, "returned": 1, "queryId": "q", "finalRoleName": "R", "statementTypeId": 4096, "version": 1}})
}

const LOGIN: &str = "/session/v1/login-request";

#[tokio::test]
async fn a_sign_in_carries_a_token_of_the_key_and_the_sessions_parameters() {
    let account = Account::start(None, vec![]).await;
    let warehouse = account.connect().await.expect("connects");
    warehouse.tagged("ledgerline/dag/run/task").rows("select 1").await.expect("answers");
    let data = account.hears(LOGIN).await["data"].clone();
    assert_eq!((data["AUTHENTICATOR"].as_str(), data["ACCOUNT_NAME"].as_str(), data["LOGIN_NAME"].as_str()), (Some("SNOWFLAKE_JWT"), Some("ACC"), Some("U")));
    assert_eq!(data["TOKEN"].as_str().map(|it| it.split('.').count()), Some(3));
    assert_eq!(data["SESSION_PARAMETERS"]["TIMEZONE"], "UTC");
    assert_eq!(data["SESSION_PARAMETERS"]["QUERY_TAG"], "ledgerline/dag/run/task");
    assert_eq!(data["CLIENT_ENVIRONMENT"]["APPLICATION"], "ledgerline");
}

#[tokio::test]
async fn a_statement_that_takes_long_is_asked_for_until_it_has_an_answer() {
    let account = Account::start(None, vec![Say::Rows("0"), Say::Later("42")]).await;
    let warehouse = account.connect().await.expect("connects");
    assert_eq!(warehouse.rows("call slow()").await.expect("answers"), [[Some("42".to_owned())]]);
    assert_eq!(account.heard("/queries/v1/abort-request").len(), 0, "what was answered is not cancelled");
}

#[tokio::test]
async fn a_statement_nobody_waits_for_is_cancelled() {
    let account = Account::start(None, vec![Say::Rows("0"), Say::Nothing]).await;
    let warehouse = account.connect().await.expect("connects");
    let asking = tokio::spawn(async move { warehouse.rows("call endless()").await });
    while account.heard("/queries/v1/query-request").len() < 2 {
        tokio::task::yield_now().await;
    }
    asking.abort();
    let cancelled = account.hears("/queries/v1/abort-request").await;
    assert_eq!(cancelled["sqlText"], "call endless()");
    assert_eq!(cancelled["requestId"].as_str().map(str::len), Some(36));
}

#[tokio::test]
async fn a_session_that_has_ended_is_renewed_and_the_question_asked_again() {
    let account = Account::start(None, vec![Say::Rows("0"), Say::Refuse("390112", "Your session has expired. Please login again."), Say::Rows("7")]).await;
    let warehouse = account.connect().await.expect("connects");
    assert_eq!(warehouse.rows("select 7").await.expect("answers"), [[Some("7".to_owned())]]);
    assert_eq!(account.heard(LOGIN).len(), 2);
}

#[tokio::test]
async fn a_refused_key_names_the_user_and_shows_no_token() {
    let refused = r#"{"success": false, "code": "394304", "message": "JWT token is invalid. [0ce9eb56-821d-4ca9-a774-04ae89a0cf5a]", "data": {"authnMethod": "KEYPAIR", "errorCode": "394304"}}"#;
    let account = Account::start(Some((200, refused)), vec![]).await;
    let error = account.connect().await.expect_err("the key is refused");
    assert!(matches!(error.fault(), Fault::Operator(remedy) if remedy.contains("alter user U set rsa_public_key")));
    let token = account.hears(LOGIN).await["data"]["TOKEN"].as_str().map(str::to_owned).expect("there was one");
    let told = format!("{} {error:?}", crate::fault::chain(&error));
    assert!(!told.contains(&token) && !told.contains("PRIVATE KEY"), "{told}");
}

#[tokio::test]
async fn what_is_no_account_is_told_from_what_is_away() {
    let account = Account::start(Some((403, "<html>403 Forbidden</html>")), vec![]).await;
    let error = account.connect().await.expect_err("there is no such account");
    assert!(matches!(&error, Error::NoAccount { host } if host.starts_with("127.0.0.1:")), "{error:?}");
    assert!(matches!(error.fault(), Fault::Operator(_)));

    let account = Account::start(Some((503, "busy")), vec![]).await;
    let error = account.connect().await.expect_err("it is away");
    assert!(matches!(error.fault(), Fault::Transient), "{error:?}");

    let nobody = TcpListener::bind("127.0.0.1:0").await.expect("a free port").local_addr().expect("it was bound");
    let access = Access { endpoint: Some(Url::parse(&format!("http://{nobody}")).expect("an address")), ..account.access() };
    let error = Snowflake::connect(&access).await.expect_err("nobody listens");
    assert!(matches!(&error, Error::Away { .. }), "{error:?}");
}

#[tokio::test]
async fn a_missing_warehouse_names_the_grant() {
    let account = Account::start(None, vec![Say::Refuse("000606", "No active warehouse selected in the current session.")]).await;
    let error = account.connect().await.expect_err("there is no warehouse");
    assert!(matches!(error.fault(), Fault::Operator(remedy) if remedy.contains("grant usage on warehouse W to role R")));
}

#[tokio::test]
async fn a_statement_that_is_still_running_is_cancelled_too() {
    let account = Account::start(None, vec![Say::Rows("0"), Say::Later(NEVER)]).await;
    let warehouse = account.connect().await.expect("connects");
    let asking = tokio::spawn(async move { warehouse.rows("call endless()").await });
    account.hears(&format!("/later/{NEVER}")).await;
    asking.abort();
    assert_eq!(account.hears("/queries/v1/abort-request").await["sqlText"], "call endless()");
}

#[tokio::test]
async fn who_says_nothing_is_given_up_and_the_statement_cancelled() {
    const REQUEST_MAX: Duration = Duration::from_millis(300);
    let account = Account::start(Some(SILENT), vec![]).await;
    let error = Snowflake::connect_within(&account.access(), REQUEST_MAX).await.expect_err("nobody answers");
    assert!(matches!(&error, Error::Away { .. }) && error.fault() == Fault::Transient, "{error:?}");
    assert!(error.to_string().contains("timed out"), "{error}");

    let account = Account::start(None, vec![Say::Nothing]).await;
    let error = Snowflake::connect_within(&account.access(), REQUEST_MAX).await.expect_err("no statement is answered");
    assert!(matches!(error, Error::Away { .. }), "{error:?}");
    // A machine so busy that the sign-in took as long has asked nothing that could be cancelled.
    if !account.heard("/queries/v1/query-request").is_empty() {
        account.hears("/queries/v1/abort-request").await;
    }
}

#[tokio::test]
async fn a_session_nobody_holds_any_more_is_signed_out() {
    let account = Account::start(None, vec![]).await;
    let warehouse = account.connect().await.expect("connects");
    assert_eq!(account.heard("/session").len(), 0);
    drop(warehouse);
    account.hears("/session").await;
}

#[tokio::test]
async fn a_session_that_ends_in_a_transaction_is_tried_again_from_its_beginning() {
    let account = Account::start(None, vec![Say::Rows("0"), Say::Rows("0"), Say::Refuse("390114", "Authentication token has expired.")]).await;
    let warehouse = account.connect().await.expect("connects");
    let session = warehouse.session().expect("a session");
    session.run("begin").await.expect("begins");
    let error = session.run("update raw._positions set last_offset = 1").await.expect_err("it is gone");
    assert_eq!(error.fault(), Fault::Transient);
    assert_eq!(account.heard("/queries/v1/query-request").len(), 3, "half of a transaction is not asked again elsewhere");
}
