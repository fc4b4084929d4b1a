//! How a recorded letter leaves: as a file, or by SMTP, recipient by recipient where the server tells them apart.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use lettre::{
    Address, AsyncSmtpTransport, AsyncTransport as _, Tokio1Executor,
    address::Envelope,
    transport::smtp::{
        authentication::Credentials,
        client::{Certificate, Tls, TlsParameters},
    },
};

use super::{Config, Encryption, Error, Transport};

/// A server that says nothing for this long is away.
const SMTP_ANSWERS_WITHIN: Duration = Duration::from_secs(20);

/// Brings letters out of the house.
pub enum Carrier {
    /// Into this directory, which is created when the first letter leaves.
    Files {
        directory: PathBuf,
        kept: usize,
    },
    Smtp {
        server: String,
        transport: Box<AsyncSmtpTransport<Tokio1Executor>>,
    },
}

/// A letter ready to go to those who do not have it yet.
pub(super) struct Parcel {
    pub(super) file_name: String,
    pub(super) envelope: Envelope,
    pub(super) message: Vec<u8>,
}

/// What became of a letter, recipient by recipient. Who is named nowhere waits.
#[derive(Debug, Default)]
pub(super) struct Handover {
    pub(super) reached: Vec<Address>,
    /// The server will never take it for them, and why.
    pub(super) refused: Vec<(Address, Error)>,
    /// Why the others wait.
    pub(super) away: Option<Error>,
}

impl Carrier {
    /// The carrier `config` asks for; `directory` is where files go.
    pub fn new(config: &Config, directory: &Path) -> Result<Self, Error> {
        match &config.transport {
            Transport::File => Ok(Self::Files { directory: directory.to_owned(), kept: config.kept.get() as usize }),
            Transport::Smtp { user, host, port, encryption } => {
                let tls = tls(config, host, *encryption)?;
                let mut builder = AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(host).port(*port).timeout(Some(SMTP_ANSWERS_WITHIN)).tls(tls);
                if let Some(user) = user {
                    let may_be_plain = matches!(encryption, Encryption::None | Encryption::Opportunistic);
                    if may_be_plain && !is_loopback(host) && !config.allow_plain_sign_in {
                        return Err(Error::PlainSignIn { host: host.clone() });
                    }
                    let password = config.password.as_ref().ok_or_else(|| Error::NoPassword { user: user.clone() })?;
                    builder = builder.credentials(Credentials::new(user.clone(), password.reveal().to_owned()));
                }
                Ok(Self::Smtp { server: format!("{host}:{port}"), transport: Box::new(builder.build()) })
            }
        }
    }

    /// Delivers one letter. A file that is there already was written by an earlier try.
    pub(super) async fn deliver(&self, parcel: Parcel) -> Handover {
        let everybody = parcel.envelope.to().to_vec();
        match self {
            Self::Files { directory, kept } => match write(directory, *kept, parcel).await {
                Ok(()) => Handover { reached: everybody, ..Handover::default() },
                Err(error) => Handover { away: Some(error), ..Handover::default() },
            },
            Self::Smtp { server, transport } => {
                let session = Session { server, transport, parcel: &parcel };
                match session.send(everybody.clone()).await {
                    Ok(()) => Handover { reached: everybody, ..Handover::default() },
                    // One that the server does not take must not keep the letter from the others.
                    Err(error) if everybody.len() > 1 && is_about_the_letter(&error) => session.send_one_by_one(everybody).await,
                    Err(error) => Handover::default().with(everybody, error),
                }
            }
        }
    }
}

/// A letter on its way to a server.
struct Session<'a> {
    server: &'a str,
    transport: &'a AsyncSmtpTransport<Tokio1Executor>,
    parcel: &'a Parcel,
}

impl Session<'_> {
    async fn send(&self, to: Vec<Address>) -> Result<(), Error> {
        // A letter without recipients is not recorded.
        let envelope = Envelope::new(self.parcel.envelope.from().cloned(), to).map_err(Error::Compose)?;
        let sent = self.transport.send_raw(&envelope, &self.parcel.message).await;
        sent.map(drop).map_err(|source| Error::Smtp { server: self.server.to_owned(), source })
    }

    /// Each alone; a server that goes away meanwhile leaves the rest waiting.
    async fn send_one_by_one(&self, everybody: Vec<Address>) -> Handover {
        let mut handover = Handover::default();
        for to in everybody {
            match self.send(vec![to.clone()]).await {
                Ok(()) => handover.reached.push(to),
                Err(error) => {
                    let is_away = !is_about_the_letter(&error);
                    handover = handover.with(vec![to], error);
                    if is_away {
                        break;
                    }
                }
            }
        }
        handover
    }
}

impl Handover {
    fn with(mut self, to: Vec<Address>, error: Error) -> Self {
        match (is_refusal(&error), to.as_slice()) {
            (true, [one]) => self.refused.push((one.clone(), error)),
            _ => self.away = Some(error),
        }
        self
    }
}

fn tls(config: &Config, host: &str, encryption: Encryption) -> Result<Tls, Error> {
    if encryption == Encryption::None {
        return Ok(Tls::None);
    }
    let failed = |source| Error::Tls { host: host.to_owned(), source };
    let mut parameters = TlsParameters::builder(host.to_owned());
    if !config.ca_file.as_os_str().is_empty() {
        let path = || config.ca_file.display().to_string();
        let pem = fs::read(&config.ca_file).map_err(|source| Error::CaFile { path: path(), source })?;
        if !pem.windows(CERTIFICATE.len()).any(|it| it == CERTIFICATE) {
            return Err(Error::CaFile { path: path(), source: io::Error::new(io::ErrorKind::InvalidData, "it holds no certificate in PEM") });
        }
        parameters = parameters.add_root_certificate(Certificate::from_pem(&pem).map_err(failed)?);
    }
    let parameters = parameters.build_rustls().map_err(failed)?;
    Ok(match encryption {
        Encryption::None => Tls::None,
        Encryption::Opportunistic => Tls::Opportunistic(parameters),
        Encryption::StartTls => Tls::Required(parameters),
        Encryption::Tls => Tls::Wrapper(parameters),
    })
}

const CERTIFICATE: &[u8] = b"-----BEGIN CERTIFICATE-----";

/// What is sent to it never leaves this machine.
fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || host.trim_matches(['[', ']']).parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

/// True where the server will say no for ever: it understood, and refused this letter (not us).
pub(super) fn is_refusal(error: &Error) -> bool {
    let Error::Smtp { source, .. } = error else { return false };
    source.is_permanent() && is_about_the_letter(error)
}

/// The server answered, and its answer is not about itself or about us: another recipient may fare better.
fn is_about_the_letter(error: &Error) -> bool {
    let Error::Smtp { source, .. } = error else { return false };
    source.status().is_some_and(|code| !speaks_of_us(&code.to_string()))
}

/// Answers about the server's own day (it closes, it is out of space) and to who we are (authentication, TLS, access): these
/// pass, or are mended by a change of the settings, so the letter waits.
fn speaks_of_us(code: &str) -> bool {
    ["421", "452", "454", "530", "534", "535", "538", "554"].contains(&code)
}

/// The letter waits while a person changes the settings: which ones, is said with the server's answer.
pub(super) fn what_helps(error: &lettre::transport::smtp::Error) -> &'static str {
    match error.status().map(|code| code.to_string()).as_deref() {
        Some("534" | "535") => " (check the user in mail.transport and LEDGERLINE__MAIL__PASSWORD)",
        Some("530" | "538") => " (it wants a sign-in or encryption: name a user and ?tls=required in mail.transport)",
        _ => "",
    }
}

async fn write(directory: &Path, kept: usize, parcel: Parcel) -> Result<(), Error> {
    let path = directory.join(&parcel.file_name);
    let (directory, shown) = (directory.to_owned(), path.display().to_string());
    let written = tokio::task::spawn_blocking(move || {
        write_once(&path, &parcel.message)?;
        forget_oldest(&directory, kept)
    });
    written.await.unwrap_or_else(|panic| Err(io::Error::other(panic))).map_err(|source| Error::File { path: shown, source })
}

/// The name appears only with the whole text behind it, and is never written twice.
fn write_once(path: &Path, message: &[u8]) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    let temporary = path.with_extension("eml.tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(message)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
}

/// Names begin with the time, so the oldest sort first.
fn forget_oldest(directory: &Path, kept: usize) -> io::Result<()> {
    let mut letters: Vec<PathBuf> =
        fs::read_dir(directory)?.filter_map(|entry| entry.ok().map(|it| it.path())).filter(|it| it.extension().is_some_and(|it| it == "eml")).collect();
    if letters.len() > kept {
        letters.sort_unstable();
        for path in &letters[..letters.len() - kept] {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_is_written_once_and_the_oldest_are_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join("mail").join(name);
        write_once(&path("1.eml"), b"first").unwrap();
        write_once(&path("1.eml"), b"again").unwrap();
        assert_eq!(fs::read(path("1.eml")).unwrap(), b"first");
        write_once(&path("2.eml"), b"second").unwrap();
        write_once(&path("3.eml"), b"third").unwrap();
        forget_oldest(&directory.path().join("mail"), 2).unwrap();
        let mut left: Vec<String> = fs::read_dir(directory.path().join("mail")).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["2.eml", "3.eml"]);
    }

    #[test]
    fn a_password_does_not_leave_this_machine_in_the_clear_unless_told_to() {
        let carrier = |transport: &str, allowed: bool, password: Option<&str>| {
            let config = Config {
                transport: transport.parse().unwrap(),
                password: password.map(crate::secret::Secret::new),
                allow_plain_sign_in: allowed,
                ..Config::default()
            };
            Carrier::new(&config, Path::new("."))
        };
        for exposed in ["smtp://me@mail.example.org", "smtp://me@10.1.2.3:2525", "smtp://me@mail.example.org?tls=opportunistic"] {
            assert!(matches!(carrier(exposed, false, Some("hunter2")), Err(Error::PlainSignIn { .. })), "{exposed}");
            assert!(carrier(exposed, true, Some("hunter2")).is_ok(), "{exposed}");
        }
        for safe in ["smtp://me@localhost:1025", "smtp://me@127.0.0.1", "smtps://me@mail.example.org", "smtp://me@mail.example.org?tls=required"] {
            assert!(carrier(safe, false, Some("hunter2")).is_ok(), "{safe}");
            assert!(matches!(carrier(safe, false, None), Err(Error::NoPassword { .. })), "{safe}");
        }
        assert!(carrier("smtp://mail.example.org", false, None).is_ok(), "who signs in nowhere exposes nothing");
    }

    #[test]
    fn a_file_of_certificates_that_holds_none_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.pem");
        let config = |path: &Path| Config { transport: "smtps://relay".parse().unwrap(), ca_file: path.to_owned(), ..Config::default() };
        assert!(matches!(Carrier::new(&config(&path), directory.path()), Err(Error::CaFile { .. })), "it is missing");
        fs::write(&path, "-----BEGIN PRIVATE KEY-----\n").unwrap();
        assert!(matches!(Carrier::new(&config(&path), directory.path()), Err(Error::CaFile { .. })), "it holds a key");
    }
}
