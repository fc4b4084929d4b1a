//! Kafka Connect's REST by a stand-in: answers that the worker of `tests/stack` cannot be brought to.

use std::{
    io::{self, Read, Write},
    net::TcpListener,
    sync::Arc,
};

use ledgerline::{
    cdc::{self, Config, Engine},
    fault::{Diagnose as _, Fault},
    secret::Secret,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{ServerConfig, ServerConnection, StreamOwned, crypto::aws_lc_rs, pki_types::PrivateKeyDer};

use super::house::{Capture, Database, config};
use crate::binary::{Bank, said_with};

const OLD: &str = r#"[{"class":"io.debezium.connector.postgresql.PostgresConnector","type":"source","version":"3.6.3.Final"}]"#;
const NONE: &str = r#"[{"class":"org.apache.kafka.connect.mirror.MirrorSourceConnector","type":"source","version":"4.3.1"}]"#;
const FAILED: &str = r#"{"name":"bank","connector":{"state":"RUNNING","worker_id":"connect:8083"},"tasks":[{"id":0,"state":"FAILED","worker_id":"connect:8083","trace":"org.apache.kafka.connect.errors.ConnectException: it broke\n\tat io.debezium.X\nCaused by: org.postgresql.util.PSQLException: ERROR: permission denied\n\t... 8 more"}],"type":"source"}"#;

/// Answers every request, head and body, one at a time; returns the port. It ends with the process.
pub(super) fn serve(tls: Option<Arc<ServerConfig>>, answer: impl Fn(&[u8]) -> Vec<u8> + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answered = match &tls {
                None => reply(stream, &answer),
                Some(config) => reply(StreamOwned::new(ServerConnection::new(Arc::clone(config)).expect("a session"), stream), &answer),
            };
            // A client that does not trust us hangs up.
            drop(answered);
        }
    });
    port
}

fn reply(mut stream: impl Read + Write, answer: impl Fn(&[u8]) -> Vec<u8>) -> io::Result<()> {
    let mut request = Vec::new();
    let mut part = [0; 4096];
    while !is_whole(&request) {
        match stream.read(&mut part)? {
            0 => return Ok(()),
            n => request.extend_from_slice(&part[..n]),
        }
    }
    stream.write_all(&answer(&request))?;
    stream.flush()
}

fn is_whole(request: &[u8]) -> bool {
    let Some(head) = request.windows(4).position(|it| it == b"\r\n\r\n") else { return false };
    let text = String::from_utf8_lossy(&request[..head]).to_lowercase();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |it| it.trim().parse().expect("a length"));
    request.len() >= head + 4 + length
}

fn json(status: u16, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status} Told\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len()).into_bytes()
}

/// How a capture ends that meets this Connect.
async fn ends_with(database: &Database, connect_url: String, password: Option<&str>) -> (cdc::Error, String) {
    let config = Config { engine: Engine::Debezium, connect_url, connect_password: password.map(Secret::new), ..config(database) };
    let error = Capture::start(database, "127.0.0.1:1".to_owned(), config).ended().await.expect_err("it refuses");
    let Fault::Operator(remedy) = error.fault() else { panic!("no remedy for: {error}") };
    (error, remedy)
}

#[tokio::test]
async fn an_older_debezium_and_a_connect_without_it_are_refused_with_the_reason() {
    let database = Database::create("plugin").await;
    let port = serve(None, |_| json(200, OLD));
    let (error, remedy) = ends_with(&database, format!("http://127.0.0.1:{port}"), None).await;
    assert!(matches!(&error, cdc::Error::PluginOld { found } if found == "3.6.3.Final"), "{error}");
    assert!(error.to_string().contains("lose rows of a COPY") && remedy.contains("3.7.0 or newer"), "{error}: {remedy}");

    let port = serve(None, |_| json(200, NONE));
    let (error, remedy) = ends_with(&database, format!("http://127.0.0.1:{port}"), None).await;
    assert!(matches!(error, cdc::Error::PluginMissing { .. }) && remedy.contains("plugin.path"), "{error}: {remedy}");
}

#[tokio::test]
async fn connect_is_signed_in_to_and_a_refused_sign_in_is_told_without_the_password() {
    let database = Database::create("sign_in").await;
    let port = serve(None, |request| {
        let text = String::from_utf8_lossy(request);
        // ops:hunter2
        if text.contains("Basic b3BzOmh1bnRlcjI=") { json(200, OLD) } else { json(401, r#"{"error_code":401,"message":"User cannot access the resource."}"#) }
    });
    for (url, password) in [(format!("http://127.0.0.1:{port}"), None), (format!("http://ops@127.0.0.1:{port}"), Some("hunter3"))] {
        let (error, remedy) = ends_with(&database, url, password).await;
        assert!(error.to_string().contains("(401)") && remedy.contains("LEDGERLINE__CDC__CONNECT_PASSWORD"), "{error}: {remedy}");
        assert!(!format!("{error:?}").contains("hunter"), "{error:?}");
    }
    // With the right one it is let in, as far as the plugin.
    let (error, _) = ends_with(&database, format!("http://ops@127.0.0.1:{port}"), Some("hunter2")).await;
    assert!(matches!(error, cdc::Error::PluginOld { .. }), "{error}");
}

#[tokio::test]
async fn connect_behind_tls_is_asked_where_its_authority_is_trusted() {
    let database = Database::create("tls").await;
    let bank = Bank::new();
    let config = certified(&bank);
    let port = serve(Some(config), |request| if request.starts_with(b"GET /connectors/bank/status ") { json(200, FAILED) } else { json(404, "{}") });
    let status = |trusted: bool| {
        let mut command = bank.command(&["cdc", "status"]);
        command.env("LEDGERLINE__SOURCE__URL", database.url.reveal()).env("LEDGERLINE__STATE__URL", database.url.reveal());
        command.env("LEDGERLINE__CDC__ENGINE", "debezium").env("LEDGERLINE__CDC__CONNECT_URL", format!("https://127.0.0.1:{port}"));
        if trusted {
            command.env("SSL_CERT_FILE", bank.path("ca.pem"));
        }
        let output = command.output().expect("the binary runs");
        said_with(&output, 0, &["cdc", "status"]);
        String::from_utf8(output.stdout).expect("text")
    };
    let told = status(true);
    let line = "task 0 FAILED on connect:8083: org.apache.kafka.connect.errors.ConnectException: it broke ← org.postgresql.util.PSQLException: ERROR: permission denied\n";
    assert!(told.contains("connector    bank · RUNNING · ") && told.contains(line), "{told}");
    let told = status(false);
    assert!(told.contains("connector    not known: ") && told.contains("certificate"), "{told}");
}

/// A certificate for this machine by an authority of its own, whose certificate is `ca.pem` in the folder.
fn certified(bank: &Bank) -> Arc<ServerConfig> {
    let mut parameters = CertificateParams::new(Vec::new()).expect("no names");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    std::fs::write(bank.path("ca.pem"), parameters.self_signed(&key).expect("a certificate").pem()).expect("written");
    let issuer = Issuer::new(parameters, key);
    let key = KeyPair::generate().expect("a key");
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name").signed_by(&key, &issuer).expect("a certificate");
    let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider())).with_safe_default_protocol_versions().expect("versions");
    Arc::new(config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).expect("a pair"))
}
