//! Where an account is and who signs in: `snowflake://ACCOUNT/DATABASE?warehouse=…&role=…&user=…`.

use std::{fmt, path::Path};

use url::Url;

use super::Error;
use crate::{
    secret::Secret,
    warehouse::{Access, snowflake_host},
};

/// An account, taken apart and checked; nothing has been asked yet.
#[derive(Clone)]
pub struct Settings {
    /// As it is written in the address, with its region where it has one.
    pub account: String,
    pub database: String,
    pub warehouse: String,
    pub role: String,
    pub user: String,
    /// Where requests go: the account's own host, or what `warehouse.endpoint` names.
    pub(super) base: Url,
    /// PKCS#8 PEM.
    pub private_key: Secret,
    /// The external stage over the lake's bucket, with its schema.
    pub(super) stage: Option<String>,
}

impl fmt::Debug for Settings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.shown())
    }
}

impl Settings {
    pub fn new(access: &Access) -> Result<Self, Error> {
        let refuse = |why: &str| Error::Address(why.to_owned());
        let url = Url::parse(access.url.reveal()).map_err(|error| Error::Address(error.to_string()))?;
        if url.scheme() != "snowflake" {
            return Err(refuse("its scheme is not snowflake"));
        }
        let account =
            url.host_str().filter(|it| it.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))).ok_or_else(|| refuse("it names no account"))?;
        let (mut warehouse, mut role, mut user) = (None, None, None);
        for (key, value) in url.query_pairs() {
            let place = match key.as_ref() {
                "warehouse" => &mut warehouse,
                "role" => &mut role,
                "user" => &mut user,
                other => return Err(Error::Address(format!("it may say warehouse, role and user, not {other}"))),
            };
            *place = Some(name("a name in it", &value)?);
        }
        Ok(Self {
            base: base(account, access.endpoint.as_ref())?,
            account: account.to_owned(),
            database: name("its database", url.path().trim_matches('/'))?,
            warehouse: warehouse.ok_or_else(|| refuse("it names no warehouse"))?,
            role: role.ok_or_else(|| refuse("it names no role"))?,
            user: user.ok_or_else(|| refuse("it names no user"))?,
            private_key: private_key(access.private_key.as_ref())?,
            stage: access.stage.as_deref().map(stage).transpose()?,
        })
    }

    /// The account without its region: what a key pair is issued for.
    pub(super) fn locator(&self) -> &str {
        self.account.split('.').next().unwrap_or_default()
    }

    /// Fit for logs and errors.
    pub(super) fn shown(&self) -> String {
        format!("snowflake://{}/{} (user {}, role {}, warehouse {})", self.account, self.database, self.user, self.role, self.warehouse)
    }

    /// Where requests go, for those who speak to the account themselves (dbt).
    pub fn endpoint(&self) -> &Url {
        &self.base
    }
}

/// Names are written into SQL and into the profile of dbt as they are: unquoted, so Snowflake folds their case.
fn name(what: &str, text: &str) -> Result<String, Error> {
    let mut letters = text.chars();
    let begins = letters.next().is_some_and(|it| it.is_ascii_alphabetic() || it == '_');
    if begins && letters.all(|it| it.is_ascii_alphanumeric() || it == '_' || it == '$') {
        Ok(text.to_uppercase())
    } else {
        Err(Error::Address(format!("{what} must be letters, digits and _ (no quotes)")))
    }
}

/// `LAKE`, `RAW.LAKE` or `BANK.RAW.LAKE`.
fn stage(text: &str) -> Result<String, Error> {
    let refused = |_| Error::StageName(text.to_owned());
    let names = text.trim_start_matches('@').split('.').map(|it| name("", it)).collect::<Result<Vec<_>, _>>().map_err(refused)?;
    match names.len() {
        1 => Ok(format!("RAW.{}", names[0])),
        2 | 3 => Ok(names.join(".")),
        _ => Err(Error::StageName(text.to_owned())),
    }
}

/// Plain HTTP only to this machine: a password-free sign-in is worth nothing where its token can be read on the way.
fn base(account: &str, endpoint: Option<&Url>) -> Result<Url, Error> {
    if let Some(endpoint) = endpoint {
        let here = matches!(endpoint.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
        return match endpoint.scheme() {
            "https" => Ok(endpoint.clone()),
            "http" if here => Ok(endpoint.clone()),
            _ => Err(Error::Address("warehouse.endpoint must be https://… (http:// only on this machine)".to_owned())),
        };
    }
    Url::parse(&format!("https://{}", snowflake_host(&format!("snowflake://{account}")))).map_err(|error| Error::Address(error.to_string()))
}

/// The text of the key, or of the file it names.
fn private_key(given: Option<&Secret>) -> Result<Secret, Error> {
    const BEGINS: &str = "-----BEGIN ";
    let given = given.filter(|it| !it.reveal().trim().is_empty()).ok_or(Error::NoKey)?;
    // In an environment file a PEM stands on one line.
    let text = given.reveal().replace("\\n", "\n");
    let text = if text.trim_start().starts_with(BEGINS) {
        text
    } else {
        std::fs::read_to_string(Path::new(given.reveal().trim())).map_err(|error| Error::KeyFile(error.to_string()))?
    };
    match text.trim_start() {
        pem if pem.starts_with("-----BEGIN PRIVATE KEY-----") => Ok(Secret::new(text)),
        pem if pem.starts_with("-----BEGIN ENCRYPTED PRIVATE KEY-----") || pem.contains("Proc-Type: 4,ENCRYPTED") => {
            Err(Error::KeyForm("is protected by a passphrase"))
        }
        pem if pem.starts_with("-----BEGIN RSA PRIVATE KEY-----") => Err(Error::KeyForm("is in PKCS#1 form, not PKCS#8")),
        pem if pem.starts_with("-----BEGIN PUBLIC KEY-----") => Err(Error::KeyForm("is the public half: the private one signs in")),
        pem if pem.starts_with(BEGINS) => Err(Error::KeyForm("is a PEM of another kind, not PKCS#8")),
        _ => Err(Error::KeyForm("is no PEM")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEM: &str = "-----BEGIN PRIVATE KEY-----\\nMII\\n-----END PRIVATE KEY-----\\n";

    fn settings(url: &str, endpoint: Option<&str>) -> Result<Settings, Error> {
        let endpoint = endpoint.map(|it| Url::parse(it).expect("a URL"));
        Settings::new(&Access { url: Secret::new(url), endpoint, private_key: Some(Secret::new(PEM)), stage: None })
    }

    #[test]
    fn an_address_is_taken_apart() {
        let found = settings("snowflake://xy12345.eu-central-1/bank?warehouse=load_wh&role=ledgerline&user=svc", None).expect("whole");
        assert_eq!((found.locator(), found.database.as_str(), found.warehouse.as_str()), ("xy12345", "BANK", "LOAD_WH"));
        assert_eq!((found.role.as_str(), found.user.as_str()), ("LEDGERLINE", "SVC"));
        assert_eq!(found.base.as_str(), "https://xy12345.eu-central-1.snowflakecomputing.com/");
        assert!(found.private_key.reveal().contains("KEY-----\nMII\n"));
        assert!(!format!("{found:?}").contains("MII"));
        let underscored = settings("snowflake://My_Org-acc_1/bank?warehouse=w&role=r&user=u", None).expect("whole");
        assert_eq!(underscored.base.as_str(), "https://my-org-acc-1.snowflakecomputing.com/");
    }

    #[test]
    fn what_is_missing_or_unsafe_is_refused() {
        for url in [
            "postgres://a@b/c",
            "snowflake://acc/bank",
            "snowflake://acc/bank?warehouse=w&role=r",
            "snowflake://acc/?warehouse=w&role=r&user=u",
            "snowflake://acc/ba'nk?warehouse=w&role=r&user=u",
            "snowflake://acc/bank?warehouse=w&role=r&user=u&password=x",
        ] {
            assert!(matches!(settings(url, None), Err(Error::Address(_))), "{url}");
        }
        let url = "snowflake://acc/bank?warehouse=w&role=r&user=u";
        assert!(settings(url, Some("http://127.0.0.1:8080")).is_ok());
        assert!(settings(url, Some("https://private.example.com")).is_ok());
        assert!(matches!(settings(url, Some("http://private.example.com")), Err(Error::Address(_))));
    }

    #[test]
    fn a_key_is_a_pem_or_the_path_of_one() {
        let access = |key: Option<&str>| Access {
            url: Secret::new("snowflake://acc/bank?warehouse=w&role=r&user=u"),
            endpoint: None,
            private_key: key.map(Secret::new),
            stage: None,
        };
        assert!(matches!(Settings::new(&access(None)), Err(Error::NoKey)));
        assert!(matches!(Settings::new(&access(Some(""))), Err(Error::NoKey)));
        assert!(matches!(Settings::new(&access(Some("/there/is/none"))), Err(Error::KeyFile(_))));
        let kinds = [("ENCRYPTED PRIVATE KEY", "passphrase"), ("RSA PRIVATE KEY", "PKCS#1"), ("PUBLIC KEY", "public half"), ("EC PRIVATE KEY", "another kind")];
        for (kind, says) in kinds {
            let refused = Settings::new(&access(Some(&format!("-----BEGIN {kind}-----\nMIIsecret\n")))).expect_err(kind).to_string();
            assert!(refused.contains(says) && !refused.contains("MIIsecret"), "{refused}");
        }
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("key.p8");
        std::fs::write(&file, "not a key").expect("writes");
        let path = file.display().to_string();
        assert!(matches!(Settings::new(&access(Some(&path))), Err(Error::KeyForm("is no PEM"))));
        std::fs::write(&file, PEM.replace("\\n", "\n")).expect("writes");
        assert!(Settings::new(&access(Some(&path))).is_ok());
    }

    #[test]
    fn a_stage_is_a_name_with_its_schema() {
        let staged = |name: &str| {
            let url = Secret::new("snowflake://acc/bank?warehouse=w&role=r&user=u");
            Settings::new(&Access { url, endpoint: None, private_key: Some(Secret::new(PEM)), stage: Some(name.to_owned()) }).map(|it| it.stage)
        };
        assert_eq!(staged("lake").expect("a name"), Some("RAW.LAKE".to_owned()));
        assert_eq!(staged("@shared.raw.lake").expect("a name"), Some("SHARED.RAW.LAKE".to_owned()));
        for bad in ["", "a.b.c.d", "raw.", "raw.la ke", "raw.x; drop table y"] {
            assert!(matches!(staged(bad), Err(Error::StageName(_))), "{bad}");
        }
    }
}
