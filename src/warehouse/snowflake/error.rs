//! What Snowflake refuses, and what the operator does about it. No secret and no value of a row is in any of it.

use std::fmt;

use crate::fault::{Diagnose, Fault};

/// Why Snowflake did not do what it was asked. Clones, because it travels through a crate that hands out references.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("the address of the Snowflake warehouse cannot be used: {0}")]
    Address(String),
    #[error("there is no private key to sign in to Snowflake with")]
    NoKey,
    #[error("could not read the file that LEDGERLINE__WAREHOUSE__PRIVATE_KEY names: {0}")]
    KeyFile(String),
    #[error("the private key {0}")]
    KeyForm(&'static str),
    #[error("warehouse.stage cannot be used: {0:?} is not the name of a stage")]
    StageName(String),
    #[error("no account answers at {host}")]
    NoAccount { host: String },
    #[error("Snowflake at {host} was not reached: {why}")]
    Away { host: String, why: String },
    #[error("Snowflake gave no answer within {seconds} s; the statement was cancelled")]
    TimedOut { seconds: u64 },
    #[error(transparent)]
    Refused(Box<Refused>),
    #[error("could not upload to the stage: {0}")]
    Upload(String),
    #[error("Snowflake's answer could not be read: {0}")]
    Answer(String),
    #[error("COPY loaded {loaded} of {expected} rows of {files} ({errors} errors{})", first_error.as_ref().map(|it| format!(", the first: {it}")).unwrap_or_default())]
    Copy { files: String, loaded: u64, expected: u64, errors: u64, first_error: Option<String> },
}

/// Snowflake's own word: `success: false`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub code: String,
    pub message: String,
    /// Who asked, for the remedy: `role R, warehouse W, database D, user U`.
    pub asker: Asker,
}

/// Who asks, as an administrator needs to name it in a GRANT.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asker {
    pub user: String,
    pub role: String,
    pub warehouse: String,
    pub database: String,
}

impl std::error::Error for Refused {}

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Snowflake says {}: {}", self.code, without_values(&self.code, &self.message))
    }
}

impl Refused {
    /// The session has ended and a new sign-in goes on.
    pub(super) fn is_session_gone(&self) -> bool {
        matches!(self.code.as_str(), "390104" | "390111" | "390112" | "390113" | "390114" | "390115" | "390195" | "390318")
    }

    /// A value in a file is not what the statement takes it for.
    pub(super) fn is_about_a_value(&self) -> bool {
        self.code.trim_start_matches('0').starts_with("100")
    }

    /// Two writers met: the other one was first.
    pub(super) fn is_conflict(&self) -> bool {
        self.code == "000625" || self.message.contains("Conflict on") || self.message.contains("write-write conflict")
    }

    fn fault(&self) -> Fault {
        let Asker { user, role, warehouse, database } = &self.asker;
        let said = self.message.to_lowercase();
        let code = self.code.trim_start_matches('0');
        if self.is_session_gone() || self.is_conflict() {
            return Fault::Transient;
        }
        Fault::Operator(match code {
            "390100" | "390144" | "394300" | "394301" | "394302" | "394303" | "394304" => format!(
                "register the public half of the key: `alter user {user} set rsa_public_key = '…'`, and see that the clock is right; assets/snowflake-setup.sql makes the user"
            ),
            "390189" | "390186" => format!("let an administrator run `grant role {role} to user {user}`; assets/snowflake-setup.sql does it"),
            "390422" | "390420" => format!("let an administrator add this machine to the network policy of {user}"),
            "606" | "607" if !said.contains("suspend") => {
                format!("let an administrator run `grant usage on warehouse {warehouse} to role {role}`, or name another warehouse")
            }
            _ if said.contains("suspend") || said.contains("resource monitor") || said.contains("cannot be resumed") => {
                format!(
                    "let an administrator run `grant operate on warehouse {warehouse} to role {role}` and turn AUTO_RESUME on, or raise its resource monitor"
                )
            }
            "390201" | "2003" | "2043" | "90105" | "90106" => format!(
                "create what is missing, or let an administrator run `grant usage on database {database} to role {role}`; assets/snowflake-setup.sql does all of it"
            ),
            "3001" | "3041" => format!("let an administrator run assets/snowflake-setup.sql: role {role} lacks a right in {database}"),
            // Cancelled, timed out, busy, or an incident of theirs.
            "604" | "630" | "370001" | "390190" => return Fault::Transient,
            _ if self.is_about_a_value() => return Fault::Data("look at the object's records: Snowflake takes them for no JSON".to_owned()),
            _ => return Fault::Bug,
        })
    }
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        match self {
            Self::Address(_) => Fault::Operator("write it as snowflake://ACCOUNT/DATABASE?warehouse=…&role=…&user=…".to_owned()),
            Self::NoKey => Fault::Operator("set LEDGERLINE__WAREHOUSE__PRIVATE_KEY to a PKCS#8 PEM, or to the path of one".to_owned()),
            Self::KeyFile(_) => Fault::Operator("check the path, and that this user may read the file".to_owned()),
            Self::KeyForm(_) => Fault::Operator(
                "give an unencrypted PKCS#8 PEM: `(umask 077; openssl pkcs8 -topk8 -nocrypt -in KEY -out KEY.p8)` writes one, and asks for the passphrase where there is one".to_owned(),
            ),
            Self::StageName(_) => Fault::Operator("name an external stage over the lake's bucket as SCHEMA.STAGE, or leave warehouse.stage empty".to_owned()),
            Self::NoAccount { .. } => {
                Fault::Operator("check the account in warehouse.url (ORGANISATION-ACCOUNT, or LOCATOR.REGION), or warehouse.endpoint".to_owned())
            }
            Self::Away { .. } | Self::TimedOut { .. } | Self::Upload(_) => Fault::Transient,
            Self::Refused(refused) => refused.fault(),
            Self::Answer(_) => Fault::Bug,
            Self::Copy { .. } => Fault::Data("look at the object's records: Snowflake did not take all of them".to_owned()),
        }
    }
}

/// Errors about data quote the value they stumbled over; those about names quote what an administrator has to look for. The
/// file is named in any case: `File 'raw/…', line 3`.
pub(super) fn without_values(code: &str, message: &str) -> String {
    let first_line = message.lines().next().unwrap_or_default();
    if !code.trim_start_matches('0').starts_with("100") {
        return first_line.to_owned();
    }
    let file = message.rsplit_once("File '").and_then(|(_, rest)| rest.split('\'').next());
    // A value may stand on the line of its file, and hold anything.
    let about = first_line.rsplit_once("File '").map_or(first_line, |(before, _)| before);
    let mut shown = String::new();
    for (place, part) in about.split('\'').enumerate() {
        match place % 2 {
            0 => shown.push_str(part),
            _ => shown.push('…'),
        }
    }
    match file {
        Some(file) => format!("{}, in file {file}", shown.trim_end()),
        None => shown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: &str, message: &str) -> Error {
        let asker = Asker { user: "SVC".into(), role: "LEDGERLINE".into(), warehouse: "LOAD_WH".into(), database: "BANK".into() };
        Error::Refused(Box::new(Refused { code: code.into(), message: message.into(), asker }))
    }

    fn remedy(error: &Error) -> String {
        match error.fault() {
            Fault::Operator(text) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_refusal_names_what_to_grant() {
        assert!(remedy(&refused("394304", "JWT token is invalid. [0ce9eb56]")).contains("alter user SVC set rsa_public_key"));
        assert!(
            remedy(&refused("390189", "Role 'LEDGERLINE' specified in the connect string does not exist or not authorized."))
                .contains("grant role LEDGERLINE to user SVC")
        );
        assert!(
            remedy(&refused("000606", "No active warehouse selected in the current session.")).contains("grant usage on warehouse LOAD_WH to role LEDGERLINE")
        );
        assert!(
            remedy(&refused("002003", "SQL compilation error:\nDatabase 'BANK' does not exist or not authorized.")).contains("grant usage on database BANK")
        );
        assert!(remedy(&refused("000606", "Warehouse 'LOAD_WH' is suspended")).contains("AUTO_RESUME"));
        assert_eq!(refused("390112", "Your session has expired.").fault(), Fault::Transient);
    }

    #[test]
    fn values_of_rows_do_not_show() {
        let error = refused("0100069", "Error parsing JSON: 'Ada Lovelace' at line 3");
        assert_eq!(error.to_string(), "Snowflake says 0100069: Error parsing JSON: … at line 3");
        let message = "Error parsing JSON: 'Ada Lovelace'\n  File 'raw/customers/1.parquet', line 3, character 1\n  Row 3, column \"CUSTOMERS\"[\"V\":1]";
        assert_eq!(refused("100069", message).to_string(), "Snowflake says 100069: Error parsing JSON: …, in file raw/customers/1.parquet");
        assert!(matches!(error.fault(), Fault::Data(_)));
        assert_eq!(refused("002003", "Object 'BANK' does not exist").to_string(), "Snowflake says 002003: Object 'BANK' does not exist");
    }
}
