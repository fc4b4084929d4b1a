//! How a recorded letter leaves: as a file, or by SMTP.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use lettre::{AsyncSmtpTransport, AsyncTransport as _, Tokio1Executor, address::Envelope, transport::smtp::authentication::Credentials};

use super::{Config, Error, Transport};

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

/// A letter ready to go.
pub(super) struct Parcel {
    pub(super) file_name: String,
    pub(super) envelope: Envelope,
    pub(super) message: Vec<u8>,
}

impl Carrier {
    /// The carrier `config` asks for; `directory` is where files go.
    pub fn new(config: &Config, directory: &Path) -> Self {
        match &config.transport {
            Transport::File => Self::Files { directory: directory.to_owned(), kept: config.kept.get() as usize },
            Transport::Smtp { user, host, port } => {
                let mut builder = AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(host).port(*port).timeout(Some(SMTP_ANSWERS_WITHIN));
                if let Some(user) = user {
                    let password = config.password.as_ref().map_or("", |it| it.reveal());
                    builder = builder.credentials(Credentials::new(user.clone(), password.to_owned()));
                }
                Self::Smtp { server: format!("{host}:{port}"), transport: Box::new(builder.build()) }
            }
        }
    }

    /// Delivers one letter. A file that is there already was written by an earlier try.
    pub(super) async fn deliver(&self, parcel: Parcel) -> Result<(), Error> {
        match self {
            Self::Files { directory, kept } => {
                let (directory, kept) = (directory.clone(), *kept);
                let path = directory.join(&parcel.file_name);
                let shown = path.display().to_string();
                let written = tokio::task::spawn_blocking(move || {
                    write_once(&path, &parcel.message)?;
                    forget_oldest(&directory, kept)
                });
                written.await.unwrap_or_else(|panic| Err(io::Error::other(panic))).map_err(|source| Error::File { path: shown, source })
            }
            Self::Smtp { server, transport } => {
                let sent = transport.send_raw(&parcel.envelope, &parcel.message).await;
                sent.map(drop).map_err(|source| Error::Smtp { server: server.clone(), source })
            }
        }
    }
}

/// True where the server will say no for ever: it understood, and refused this letter (not us).
pub(super) fn is_refusal(error: &Error) -> bool {
    let Error::Smtp { source, .. } = error else { return false };
    source.is_permanent() && !source.status().is_some_and(|code| speaks_of_us(&code.to_string()))
}

/// Answers to who we are (authentication, TLS, access): mended by a change of the settings, so the letter waits.
fn speaks_of_us(code: &str) -> bool {
    ["530", "534", "535", "538", "554"].contains(&code)
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
}
