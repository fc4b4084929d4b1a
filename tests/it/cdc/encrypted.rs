//! A source that wants TLS, by every `sslmode`. The embedded PostgreSQL was built without it, so somebody stands before it who asks for it.

use std::{
    io::Write as _,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use ledgerline::{
    cdc::Step,
    fault::{Diagnose as _, Fault, chain},
    secret::Secret,
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::{ServerConfig, crypto::aws_lc_rs, pki_types::PrivateKeyDer};
use tempfile::NamedTempFile;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    task::AbortHandle,
};
use tokio_rustls::TlsAcceptor;

use super::{
    days::PAYMENTS,
    house::{Broker, Capture, Database, config},
};
use crate::binary::Bank;

/// An authority, as the file that names it, and what it has signed for some names.
fn certified(names: &[&str]) -> (NamedTempFile, Arc<ServerConfig>) {
    // As the program does first of all.
    let _ = aws_lc_rs::default_provider().install_default();
    let mut parameters = CertificateParams::new(Vec::new()).expect("no names");
    // Not the name that what it signs has by default: OpenSSL takes that for signed by itself.
    parameters.distinguished_name.push(DnType::CommonName, "an authority");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    let mut authority = NamedTempFile::new().expect("a file");
    authority.write_all(parameters.self_signed(&key).expect("a certificate").pem().as_bytes()).expect("written");
    let issuer = Issuer::new(parameters, key);
    let key = KeyPair::generate().expect("a key");
    let names = names.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
    let certificate = CertificateParams::new(names).expect("names").signed_by(&key, &issuer).expect("a certificate");
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider())).with_safe_default_protocol_versions().expect("versions");
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let config = config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).expect("they fit");
    (authority, Arc::new(config))
}

/// A PostgreSQL that refuses whoever does not come encrypted.
pub(crate) struct Guarded {
    address: SocketAddr,
    /// Whose certificate it shows.
    authority: NamedTempFile,
    sessions: Arc<AtomicUsize>,
    serving: AbortHandle,
}

impl Guarded {
    pub(crate) async fn before(database: &Secret, names: &[&str]) -> Self {
        let server = url::Url::parse(database.reveal()).expect("an address");
        let server = format!("{}:{}", server.host_str().expect("a host"), server.port().unwrap_or(5432));
        let (authority, config) = certified(names);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let sessions = Arc::new(AtomicUsize::new(0));
        let (acceptor, counted) = (TlsAcceptor::from(config), Arc::clone(&sessions));
        let serving = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(guard(client, acceptor.clone(), server.clone(), Arc::clone(&counted)));
            }
        });
        Self { address, authority, sessions, serving: serving.abort_handle() }
    }

    /// The database by way of it.
    pub(crate) fn url(&self, database: &Secret, host: &str, query: &str) -> Secret {
        let mut url = url::Url::parse(database.reveal()).expect("an address");
        url.set_host(Some(host)).expect("a host");
        url.set_port(Some(self.address.port())).expect("a port");
        url.set_query(Some(query));
        Secret::new(url)
    }

    pub(crate) fn authority(&self) -> String {
        format!("sslrootcert={}", self.authority.path().display())
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn guard(mut client: TcpStream, acceptor: TlsAcceptor, server: String, sessions: Arc<AtomicUsize>) -> std::io::Result<()> {
    const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
    // As PostgreSQL says it where pg_hba.conf has `hostssl` only.
    const REFUSAL: &[u8] = b"SFATAL\0VFATAL\0C28000\0Mno pg_hba.conf entry for host \"127.0.0.1\", user \"bank\", no encryption\0\0";
    let mut first = [0; 8];
    client.read_exact(&mut first).await?;
    if first != SSL_REQUEST {
        client.write_all(b"E").await?;
        client.write_u32(u32::try_from(REFUSAL.len() + 4).expect("short")).await?;
        return client.write_all(REFUSAL).await;
    }
    client.write_all(b"S").await?;
    let mut client = acceptor.accept(client).await?;
    sessions.fetch_add(1, Ordering::Relaxed);
    let mut server = TcpStream::connect(server).await?;
    copy_bidirectional(&mut client, &mut server).await.map(drop)
}

/// What an operator is told who comes by this address.
async fn refused(database: &Database, broker: &Broker, source: &Secret) -> (String, String) {
    let error = Capture::start_as(source, database, broker.address(), config(database)).ended().await.expect_err("it refuses");
    let Fault::Operator(remedy) = error.fault() else { panic!("no remedy for: {}", chain(&error)) };
    (chain(&error), remedy)
}

#[tokio::test]
async fn a_source_that_wants_tls_is_captured_by_every_mode_that_brings_it() {
    let database = Database::create("encrypted").await;
    database.run(PAYMENTS).await;
    let mut broker = Broker::start(&database, &["public.payments"], 1);
    let guarded = Guarded::before(&database.url, &["localhost"]).await;
    let verified = |mode: &str| format!("sslmode={mode}&{}", guarded.authority());
    // With verify-ca whatever name the server has; `require` with an authority asks it, as libpq does.
    let ways = [
        ("127.0.0.1", "sslmode=prefer".to_owned()),
        ("127.0.0.1", "sslmode=require".to_owned()),
        ("127.0.0.1", verified("require")),
        ("127.0.0.1", verified("verify-ca")),
        ("localhost", verified("verify-full")),
    ];
    for (n, (host, query)) in (1_i64..).zip(&ways) {
        let before = guarded.sessions.load(Ordering::Relaxed);
        let source = guarded.url(&database.url, host, query);
        let capture = Capture::start_as(&source, &database, broker.address(), config(&database));
        capture.until(query, |it| it.step == Step::Streaming).await;
        database.run(&format!("insert into payments values ({n}, 1.00, 'x');")).await;
        capture.drain(&database).await;
        capture.stop().await;
        assert!(guarded.sessions.load(Ordering::Relaxed) >= before + 2, "{query}: the replication connection comes encrypted too");
    }
    assert_eq!(broker.read("public.payments").len(), ways.len());
}

#[tokio::test]
async fn what_keeps_tls_from_coming_about_is_told_with_the_remedy() {
    let database = Database::create("unencrypted").await;
    database.run(PAYMENTS).await;
    let broker = Broker::start(&database, &["public.payments"], 1);
    let guarded = Guarded::before(&database.url, &["db.bank.example"]).await;
    let (other, _) = certified(&["db.bank.example"]);
    let other = format!("sslrootcert={}", other.path().display());
    let authority = guarded.authority();
    for (query, why, remedy) in [
        ("sslmode=disable".to_owned(), "no encryption", "sslmode"),
        (format!("sslmode=verify-ca&{other}"), "invalid peer certificate", "sslrootcert"),
        (format!("sslmode=verify-full&{authority}"), "not valid for name", "verify-full the host must be one"),
        // Nobody known signed it.
        ("sslmode=verify-full".to_owned(), "UnknownIssuer", "sslrootcert"),
        ("sslmode=verify-ca&sslrootcert=/nowhere/ca.pem".to_owned(), "/nowhere/ca.pem", "sslrootcert"),
    ] {
        let (told, mended) = refused(&database, &broker, &guarded.url(&database.url, "127.0.0.1", &query)).await;
        assert!(told.contains(why) && mended.contains(remedy), "{query}: {told}: {mended}");
    }
    // A server that has none, asked for it.
    let mut plain = url::Url::parse(database.url.reveal()).expect("an address");
    plain.set_query(Some("sslmode=require"));
    let (told, mended) = refused(&database, &broker, &Secret::new(plain)).await;
    assert!(told.contains("does not support TLS") && mended.contains("sslmode"), "{told}: {mended}");
}

/// Nothing in this process prepares it.
#[tokio::test(flavor = "multi_thread")]
async fn the_program_itself_comes_encrypted_and_asks_for_the_authority() {
    let database = Database::create("program").await;
    database.run(PAYMENTS).await;
    let broker = Broker::start(&database, &["public.payments"], 1);
    let guarded = Guarded::before(&database.url, &["db.bank.example"]).await;
    let (other, _) = certified(&["db.bank.example"]);
    let apply = async |authority: &str| {
        // Its password is none of the address's.
        let mut source: url::Url = guarded.url(&database.url, "127.0.0.1", &format!("sslmode=verify-ca&{authority}")).reveal().parse().expect("an address");
        let password = source.password().expect("one").to_owned();
        source.set_password(None).expect("it has a place for one");
        let mut state: url::Url = database.url.reveal().parse().expect("an address");
        state.set_password(None).expect("it has a place for one");
        let bank = Bank::new();
        let name = &database.name;
        bank.configure(&format!("[cdc]\ntables = [\"public.payments\"]\ntopic_prefix = \"{name}\"\nslot = \"{name}\"\npublication = \"{name}\"\n"));
        let mut command = bank.command(&["cdc", "apply", "--json"]);
        command.env("LEDGERLINE__STREAM__BOOTSTRAP_SERVERS", broker.address());
        command.env("LEDGERLINE__SOURCE__URL", source.as_str()).env("LEDGERLINE__SOURCE__PASSWORD", &password);
        command.env("LEDGERLINE__STATE__URL", state.as_str()).env("LEDGERLINE__STATE__PASSWORD", &password);
        let output = tokio::task::spawn_blocking(move || command.output()).await.expect("it does not panic").expect("the program runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned() + &said)
    };
    let (code, said) = apply(&format!("sslrootcert={}", other.path().display())).await;
    assert!(code != Some(0) && said.contains("sslrootcert"), "{code:?}: {said}");
    let before = guarded.sessions.load(Ordering::Relaxed);
    let (code, said) = apply(&guarded.authority()).await;
    assert!(code == Some(0) && said.contains("\"slot_step\":\"made\""), "{code:?}: {said}");
    assert!(guarded.sessions.load(Ordering::Relaxed) >= before + 2, "the connection that made the slot, too");
}
