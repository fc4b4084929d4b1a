//! Letters about runs: what is worth one, what it says, and that it arrives once.
//!
//! A letter is written ([`letter`], pure), recorded in the outbox in the state database under a Message-ID that follows from
//! the run, and delivered from there by [`run`], the stage that owns the transport. Recording is what a task waits for: a mail
//! server that is away delays letters, never the pipeline. After a crash a recorded letter is delivered by the next start;
//! recording it again changes nothing. A file is written once (temporary name, then rename); SMTP repeats a letter only if the
//! crash fell between the server's OK and our note of it, and then under the same Message-ID. Which recipients have a letter is
//! noted: one that the server does not take neither holds up the others nor makes them get it twice.

use std::{fmt, num::NonZeroU32, path::PathBuf, str::FromStr};

use chrono::{DateTime, Utc};
use lettre::message::Mailbox;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

pub mod alarm;
pub mod letter;
mod outbox;
mod transport;

pub use outbox::{About, Kind, Mail, MailState, Outbox, run};
pub use transport::Carrier;

use crate::{
    fault::{Diagnose, Fault},
    secret::Secret,
    units::Span,
};

/// Settings of mails, `[mail]` in `config.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `"file"` writes `.eml` files into the data dir; `"smtps://user@host"` and the like send.
    pub transport: Transport,
    /// Certificates (PEM) that are trusted beside the system's: a private authority's. Empty: none.
    pub ca_file: PathBuf,
    /// Whether the password may go to another host over a connection that is not encrypted.
    pub allow_plain_sign_in: bool,
    /// Who writes; its domain also ends the Message-IDs.
    pub from: Address,
    /// Who is written to.
    pub to: Vec<Address>,
    /// The shortest time between two letters about one failing task.
    pub repeat_after: Span,
    /// Delivered letters kept in the outbox, and as files; older ones are removed.
    pub kept: NonZeroU32,
    /// The password of the SMTP user; from the environment only.
    #[serde(skip_serializing)]
    pub password: Option<Secret>,
}

impl Default for Config {
    fn default() -> Self {
        let address = |text: &str| text.parse().expect("the default is an address");
        Self {
            transport: Transport::File,
            ca_file: PathBuf::new(),
            allow_plain_sign_in: false,
            from: address("ledgerline <ledgerline@localhost>"),
            to: vec![address("operations@localhost")],
            repeat_after: Span::from_secs(3600),
            kept: NonZeroU32::new(1000).expect("not zero"),
            password: None,
        }
    }
}

/// How letters leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    File,
    /// The password comes from the environment.
    Smtp {
        user: Option<String>,
        host: String,
        port: u16,
        encryption: Encryption,
    },
}

/// How the connection to the server is protected, in the words of lettre's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encryption {
    /// `smtp://`: not at all.
    None,
    /// `smtp://…?tls=opportunistic`: STARTTLS where the server offers it.
    Opportunistic,
    /// `smtp://…?tls=required`: STARTTLS, or nothing is sent.
    StartTls,
    /// `smtps://`: TLS from the first byte.
    Tls,
}

impl Encryption {
    /// The port where none is named: between servers, submission, submission over TLS.
    const fn port(self) -> u16 {
        match self {
            Self::None => 25,
            Self::Opportunistic | Self::StartTls => 587,
            Self::Tls => 465,
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Smtp { user, host, port, encryption } = self else { return formatter.write_str("file") };
        let (scheme, query) = match encryption {
            Encryption::None => ("smtp", ""),
            Encryption::Opportunistic => ("smtp", "?tls=opportunistic"),
            Encryption::StartTls => ("smtp", "?tls=required"),
            Encryption::Tls => ("smtps", ""),
        };
        let user = user.as_ref().map(|it| format!("{it}@")).unwrap_or_default();
        write!(formatter, "{scheme}://{user}{host}:{port}{query}")
    }
}

impl FromStr for Transport {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "file" {
            return Ok(Self::File);
        }
        let refuse = || {
            let shown = crate::secret::without_password(text);
            format!("{shown:?} is not a way to send mail: write file, smtps://user@host, smtp://user@host?tls=required (STARTTLS) or smtp://host:port")
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(refuse)?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let encryption = match (scheme, query) {
            ("smtp", "") => Encryption::None,
            ("smtp", "tls=opportunistic") => Encryption::Opportunistic,
            ("smtp", "tls=required") => Encryption::StartTls,
            ("smtps", "") => Encryption::Tls,
            _ => return Err(refuse()),
        };
        let (user, place) = rest.rsplit_once('@').map_or((None, rest), |(user, place)| (Some(user), place));
        if user.is_some_and(|user| user.contains(':')) {
            return Err("a password does not belong into mail.transport: set LEDGERLINE__MAIL__PASSWORD".to_owned());
        }
        let place = place.trim_end_matches('/');
        let (host, port) = match place.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().map_err(|_| refuse())?),
            None => (place, encryption.port()),
        };
        if host.is_empty() || user == Some("") {
            return Err(refuse());
        }
        Ok(Self::Smtp { user: user.map(str::to_owned), host: host.to_owned(), port, encryption })
    }
}

/// A mail address, with or without a name: `Night shift <ops@example.org>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(Mailbox);

impl Address {
    pub(crate) fn mailbox(&self) -> &Mailbox {
        &self.0
    }

    pub fn domain(&self) -> &str {
        self.0.email.domain()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|_| format!("{text:?} is not a mail address: write name@host or Name <name@host>"))
    }
}

/// Text in config, checked when it is read.
macro_rules! as_text {
    ($($name:ty),+) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }
    )+};
}

as_text!(Transport, Address);

/// The outbox, as an operator may see it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stats {
    /// Recorded, not delivered yet.
    pub waiting: u64,
    /// Delivered by this process.
    pub sent: u64,
    /// The server will never take them; why is in the list.
    pub refused: u64,
    /// Why letters wait: in words. None while they leave.
    pub away: Option<String>,
    /// When the outbox was last looked at.
    pub looked_at: Option<DateTime<Utc>>,
    /// Newest first.
    pub newest: Vec<Mail>,
}

/// What keeps a letter from being recorded or delivered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not {doing}")]
    Database {
        doing: &'static str,
        #[source]
        source: sqlx::Error,
    },
    #[error("could not {doing}: the state database does not answer")]
    Silent { doing: &'static str },
    #[error("the outbox is of a later version ({version})")]
    NewerOutbox { version: i64 },
    #[error("could not compose the letter")]
    Compose(#[source] lettre::error::Error),
    #[error("could not write the mail to {path}")]
    File {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("could not send the mail to {server}{}", transport::what_helps(source))]
    Smtp {
        server: String,
        #[source]
        source: lettre::transport::smtp::Error,
    },
    #[error("could not prepare TLS to the mail server {host}")]
    Tls {
        host: String,
        #[source]
        source: lettre::transport::smtp::Error,
    },
    #[error("could not read the certificates of mail.ca_file {path}")]
    CaFile {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the password for {host} would go there without encryption")]
    PlainSignIn { host: String },
    #[error("mail.transport names user {user}, and there is no password")]
    NoPassword { user: String },
}

impl Error {
    fn failed(doing: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |source| Self::Database { doing, source }
    }
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::Database { source: sqlx::Error::Database(refusal), .. } if refusal.code().is_some_and(|code| ["28", "3D"].contains(&&code[..2])) => {
                Fault::Operator("check user, password and database of state.url".to_owned())
            }
            Self::Database { source: sqlx::Error::Database(refusal), .. } if refusal.code().is_some_and(|code| ["22", "42"].contains(&&code[..2])) => {
                Fault::Bug
            }
            Self::Database { .. } | Self::Silent { .. } | Self::Smtp { .. } => Fault::Transient,
            Self::NewerOutbox { .. } => Fault::Operator("use the version of ledgerline that wrote this outbox, or another state database".to_owned()),
            Self::Compose(_) => Fault::Bug,
            Self::Tls { .. } => Fault::Operator("check mail.ca_file, and that the system's certificates can be read".to_owned()),
            Self::CaFile { .. } => Fault::Operator("name a readable file of certificates in PEM in mail.ca_file, or leave it empty".to_owned()),
            Self::PlainSignIn { host } => Fault::Operator(format!(
                "write mail.transport as smtps://user@{host} or smtp://user@{host}?tls=required; mail.allow_plain_sign_in = true sends it all the same"
            )),
            Self::NoPassword { .. } => Fault::Operator("set LEDGERLINE__MAIL__PASSWORD in the environment, or take the user out of mail.transport".to_owned()),
            Self::File { path, .. } => Fault::Operator(format!("make {path} writable, or free space there")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transport_reads_as_it_is_written_and_takes_no_password() {
        for text in [
            "file",
            "smtp://mail.example.org:2525",
            "smtp://ledgerline@mail.example.org:587?tls=required",
            "smtp://mail.example.org:587?tls=opportunistic",
            "smtps://night@shift@mail.example.org:465",
        ] {
            assert_eq!(text.parse::<Transport>().expect("valid").to_string(), text);
        }
        assert_eq!("smtp://relay".parse::<Transport>().expect("valid").to_string(), "smtp://relay:25");
        assert_eq!("smtps://relay".parse::<Transport>().expect("valid").to_string(), "smtps://relay:465");
        assert_eq!("smtp://relay?tls=required".parse::<Transport>().expect("valid").to_string(), "smtp://relay:587?tls=required");
        let starttls = "smtp+starttls://me@relay".parse::<Transport>().expect_err("another spelling");
        assert!(starttls.contains("?tls=required"), "{starttls}");
        let refusal = "smtp://me:hunter2@relay".parse::<Transport>().expect_err("a password");
        assert!(refusal.contains("LEDGERLINE__MAIL__PASSWORD") && !refusal.contains("hunter2"), "{refusal}");
        assert!("pigeon".parse::<Transport>().is_err());
        assert!("smtp://:25".parse::<Transport>().is_err() && "smtp://relay?tls=maybe".parse::<Transport>().is_err());
    }

    #[test]
    fn the_config_reads_what_it_writes() {
        let text = toml::to_string(&Config::default()).expect("TOML");
        assert_eq!(toml::from_str::<Config>(&text).expect("valid"), Config::default());
        assert!(toml::from_str::<Config>("to = [\"nobody\"]").is_err());
    }
}
