//! The configuration: defaults < `config.toml` < its `[profiles.<name>]` < `LEDGERLINE__SECTION__KEY` < flags.
//!
//! Each room owns its own section; here they are composed, layered and checked. A key is refused where nobody knows it
//! (with the nearest known name) and where its value cannot be what the room expects (with the key's path and its layer).

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{
    bank, cdc, dag, dbt,
    fault::{Diagnose, Fault},
    lake, notify,
    secret::Secret,
    stream,
    units::Span,
    warehouse,
};

/// A section whose address is `"embedded"` is served by this process.
pub const EMBEDDED: &str = "embedded";

const ENV_PREFIX: &str = "LEDGERLINE__";

/// Everything `config.toml` may say. Every key has a default; `config.toml` holds them all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Which `[profiles.<name>]` is laid over the sections below. `embedded` needs none: it is the defaults.
    pub profile: String,
    /// Where embedded services, mails and logs live; relative to the folder of `config.toml`.
    pub data_dir: PathBuf,
    /// How long a headless start waits for services before it gives up with exit code 3.
    pub startup_grace: Span,
    pub source: Source,
    pub bank: bank::Config,
    pub cdc: cdc::Config,
    pub stream: stream::Config,
    pub lake: lake::Config,
    pub warehouse: warehouse::Config,
    pub state: State,
    pub dbt: dbt::Config,
    pub dag: dag::Config,
    pub mail: notify::Config,
    pub embedded: Embedded,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            profile: EMBEDDED.to_owned(),
            data_dir: PathBuf::from(".ledgerline"),
            startup_grace: Span::from_secs(30),
            source: Source::default(),
            bank: bank::Config::default(),
            cdc: cdc::Config::default(),
            stream: stream::Config::default(),
            lake: lake::Config::default(),
            warehouse: warehouse::Config::default(),
            state: State::default(),
            dbt: dbt::Config::default(),
            dag: dag::Config::default(),
            mail: notify::Config::default(),
            embedded: Embedded::default(),
        }
    }
}

/// The bank's database, `[source]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Source {
    /// `"embedded"`, or `postgres://user@host:port/database`; a password belongs in `LEDGERLINE__SOURCE__PASSWORD`.
    pub url: String,
}

impl Default for Source {
    fn default() -> Self {
        Self { url: EMBEDDED.to_owned() }
    }
}

/// Where run history, tries and the mail outbox are kept, `[state]`: any PostgreSQL.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct State {
    /// `"embedded"`, or `postgres://…`; a password belongs in `LEDGERLINE__STATE__PASSWORD`.
    pub url: String,
}

impl Default for State {
    fn default() -> Self {
        Self { url: EMBEDDED.to_owned() }
    }
}

/// Ports of the embedded services, `[embedded]`. 0 = a free one, chosen at the first start and kept in the data dir.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Embedded {
    pub postgres_port: u16,
    pub kafka_port: u16,
    pub s3_port: u16,
}

/// What only the environment may say.
#[derive(Debug, Clone, Default)]
pub struct Secrets {
    pub source_password: Option<Secret>,
    pub warehouse_password: Option<Secret>,
    /// Snowflake's: a PKCS#8 PEM, or the path of one.
    pub warehouse_private_key: Option<Secret>,
    pub state_password: Option<Secret>,
    pub lake_access_key_id: Option<Secret>,
    pub lake_secret_access_key: Option<Secret>,
    pub mail_password: Option<Secret>,
    pub sasl_password: Option<Secret>,
    pub connect_password: Option<Secret>,
}

/// The configuration of one invocation, and where its relative paths start.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub config: Config,
    pub secrets: Secrets,
    /// The folder of `config.toml`, or the current one where there is none.
    pub base: PathBuf,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    /// Whether `bank.enabled` was written out by a person (an external bank is never filled by accident).
    pub bank_enabled_explicitly: bool,
}

impl Loaded {
    pub fn data_dir(&self) -> PathBuf {
        self.base.join(&self.config.data_dir)
    }

    /// The capture's settings with the sign-in for Kafka Connect.
    pub fn cdc(&self) -> cdc::Config {
        cdc::Config { connect_password: self.secrets.connect_password.clone(), ..self.config.cdc.clone() }
    }

    pub fn dbt_project_dir(&self) -> PathBuf {
        self.base.join(&self.config.dbt.project_dir)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is not valid TOML", path.display())]
    Syntax {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("{layer}: unknown key {key}{}", nearest.as_ref().map(|it| format!(", did you mean {it}?")).unwrap_or_default())]
    UnknownKey { layer: Layer, key: String, nearest: Option<String> },
    #[error("{layer}: {key} cannot be {value}: {why}")]
    WrongValue { layer: Layer, key: String, value: String, why: String },
    #[error("{layer}: {key} carries a password")]
    PasswordInFile { layer: Layer, key: String },
    #[error("environment variable {name} is nobody's, did you mean {nearest}?")]
    Environment { name: String, nearest: String },
    #[error("profile {name} is not in config.toml; known: {known}")]
    UnknownProfile { name: String, known: String },
}

impl Diagnose for Error {
    fn fault(&self) -> Fault {
        Fault::Operator(match self {
            Self::Read { .. } => "check the path given with --config and its permissions".to_owned(),
            Self::Syntax { .. } => "correct the file; `ledgerline config show` prints a valid one".to_owned(),
            Self::UnknownKey { .. } => "`ledgerline config show` lists every key".to_owned(),
            Self::WrongValue { key, .. } => format!("correct {key}; config.toml in the repository says what each key takes"),
            Self::PasswordInFile { key, .. } => {
                let section = key.split('.').next().unwrap_or("source").to_uppercase();
                format!("take it out of the file and set {ENV_PREFIX}{section}__PASSWORD in the environment")
            }
            Self::Environment { .. } => "two underscores stand between section and key, and behind LEDGERLINE; rename it or unset it".to_owned(),
            Self::UnknownProfile { .. } => "name one of the known profiles, or add the section [profiles.NAME]".to_owned(),
        })
    }
}

/// Where a value came from; part of every message about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layer {
    File(PathBuf),
    Profile(String),
    Env(String),
    Flag(String),
}

impl fmt::Display for Layer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(formatter, "{}", path.display()),
            Self::Profile(name) => write!(formatter, "[profiles.{name}]"),
            Self::Env(name) => write!(formatter, "environment variable {name}"),
            Self::Flag(name) => write!(formatter, "{name}"),
        }
    }
}

/// A flag that overrides exactly one key: `("bank.rate", "300", "--rate")`.
#[derive(Debug, Clone)]
pub struct Override {
    pub key: &'static str,
    pub value: String,
    pub flag: &'static str,
}

/// Reads all layers. `file`: the path given by `--config`; without it `config.toml` of the current folder, if there is one.
pub fn load(file: Option<&Path>, env: impl Iterator<Item = (String, String)>, flags: &[Override]) -> Result<Loaded, Error> {
    let found = file.map(Path::to_owned).or_else(|| Path::new("config.toml").is_file().then(|| PathBuf::from("config.toml")));
    let mut layers: Vec<(Layer, Table)> = Vec::new();
    let mut profiles = Table::new();
    if let Some(path) = &found {
        let text = fs::read_to_string(path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let mut table: Table = text.parse().map_err(|source| Error::Syntax { path: path.clone(), source: Box::new(source) })?;
        if let Some(Value::Table(found)) = table.remove("profiles") {
            profiles = found;
        }
        layers.push((Layer::File(path.clone()), table));
    }
    let (secrets, env_layers) = from_env(env)?;
    let flag_layers = flags.iter().map(|it| (Layer::Flag(it.flag.to_owned()), nested(it.key, scalar(it.key, &it.value))));
    let later: Vec<(Layer, Table)> = env_layers.into_iter().chain(flag_layers).collect();

    let profile = chosen_profile(layers.iter().chain(&later));
    if profile != EMBEDDED {
        let Some(Value::Table(overlay)) = profiles.get(&profile) else {
            let mut known: Vec<&str> = profiles.keys().map(String::as_str).collect();
            known.push(EMBEDDED);
            return Err(Error::UnknownProfile { name: profile, known: known.join(", ") });
        };
        layers.push((Layer::Profile(profile), overlay.clone()));
    }
    layers.extend(later);

    let mut merged = Config::as_table();
    for (layer, table) in &layers {
        check(layer, table)?;
        lay_over(&mut merged, table);
    }
    let config: Config = Value::Table(merged).try_into().expect("each layer was checked key by key");
    let bank_enabled_explicitly = layers.iter().any(|(_, table)| table.get("bank").and_then(|it| it.get("enabled")) == Some(&Value::Boolean(true)));
    let base = found.as_deref().and_then(Path::parent).map(Path::to_owned).unwrap_or_default();
    let base = std::path::absolute(if base.as_os_str().is_empty() { Path::new(".") } else { &base }).unwrap_or(base);
    Ok(Loaded { config, secrets, base, file: found, bank_enabled_explicitly })
}

impl Config {
    /// Every key with its default: what a layer is checked against.
    fn as_table() -> Table {
        Table::try_from(Self::default()).expect("the defaults are plain values")
    }

    /// The configuration as TOML, as `config show` prints it. It holds no secrets: those have no place in it.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("the configuration is plain values")
    }
}

fn chosen_profile<'a>(layers: impl Iterator<Item = &'a (Layer, Table)>) -> String {
    layers.filter_map(|(_, table)| table.get("profile")?.as_str()).last().unwrap_or(EMBEDDED).to_owned()
}

/// Splits the environment into secrets and one layer a variable. `LEDGERLINE__LAKE__ROWS_MAX=1000` is `lake.rows_max`.
fn from_env(env: impl Iterator<Item = (String, String)>) -> Result<(Secrets, Vec<(Layer, Table)>), Error> {
    let mut secrets = Secrets::default();
    let mut layers = Vec::new();
    let (mut variables, others): (Vec<_>, Vec<_>) = env.partition(|(name, _)| name.starts_with(ENV_PREFIX));
    if let Some(error) = others.iter().find_map(|(name, _)| misspelt(name)) {
        return Err(error);
    }
    variables.sort();
    for (name, value) in variables {
        let rest = &name[ENV_PREFIX.len()..];
        let secret = match rest {
            "SOURCE__PASSWORD" => &mut secrets.source_password,
            "WAREHOUSE__PASSWORD" => &mut secrets.warehouse_password,
            "WAREHOUSE__PRIVATE_KEY" => &mut secrets.warehouse_private_key,
            "STATE__PASSWORD" => &mut secrets.state_password,
            "LAKE__ACCESS_KEY_ID" => &mut secrets.lake_access_key_id,
            "LAKE__SECRET_ACCESS_KEY" => &mut secrets.lake_secret_access_key,
            "MAIL__PASSWORD" => &mut secrets.mail_password,
            "STREAM__SASL_PASSWORD" => &mut secrets.sasl_password,
            "CDC__CONNECT_PASSWORD" => &mut secrets.connect_password,
            _ => {
                let key = rest.to_lowercase().replace("__", ".");
                let layer = Layer::Env(name.clone());
                layers.push((layer, nested(&key, scalar(&key, &value))));
                continue;
            }
        };
        *secret = Some(Secret::new(value));
    }
    Ok((secrets, layers))
}

/// `LEDGERLINE_BANK_RATE`, which would change nothing and say nothing.
fn misspelt(name: &str) -> Option<Error> {
    let rest = name.strip_prefix("LEDGERLINE_")?.to_lowercase();
    let (section, key) = rest.split_once('_')?;
    let known = lookup(&Config::as_table(), &format!("{section}.{}", key.trim_start_matches('_')))?;
    let nearest = format!("{ENV_PREFIX}{}__{}", section.to_uppercase(), key.trim_start_matches('_').to_uppercase());
    (!known.is_table()).then(|| Error::Environment { name: name.to_owned(), nearest })
}

/// A text from the environment or a flag as the type that its key has: `"1000"` is a number where a number is expected.
fn scalar(key: &str, text: &str) -> Value {
    let as_text = || Value::String(text.to_owned());
    match lookup(&Config::as_table(), key) {
        Some(Value::Integer(_)) => text.parse().map_or_else(|_| as_text(), Value::Integer),
        Some(Value::Float(_)) => text.parse().map_or_else(|_| as_text(), Value::Float),
        Some(Value::Boolean(_)) => text.parse().map_or_else(|_| as_text(), Value::Boolean),
        // A key below an open table: its room knows its type, a number is the only one that looks like another.
        None => text.parse().map_or_else(|_| as_text(), Value::Integer),
        Some(Value::Array(_)) => Value::Array(text.split(',').map(str::trim).filter(|it| !it.is_empty()).map(|it| Value::String(it.to_owned())).collect()),
        _ => as_text(),
    }
}

fn lookup(table: &Table, key: &str) -> Option<Value> {
    let mut parts = key.split('.');
    let mut value = table.get(parts.next()?)?;
    for part in parts {
        value = value.get(part)?;
    }
    Some(value.clone())
}

fn nested(key: &str, value: Value) -> Table {
    let (first, rest) = key.split_once('.').map_or((key, None), |(first, rest)| (first, Some(rest)));
    let value = rest.map_or_else(|| value.clone(), |rest| Value::Table(nested(rest, value.clone())));
    Table::from_iter([(first.to_owned(), value)])
}

fn lay_over(below: &mut Table, above: &Table) {
    for (key, value) in above {
        match (below.get_mut(key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => lay_over(below, above),
            _ => {
                below.insert(key.clone(), value.clone());
            }
        }
    }
}

/// Refuses the first key that is unknown or holds what its room cannot take.
fn check(layer: &Layer, table: &Table) -> Result<(), Error> {
    let defaults = Config::as_table();
    let mut leaves = Vec::new();
    leaves_of("", table, &defaults, &mut leaves);
    for (key, value) in leaves {
        let Some(default) = lookup(&defaults, &key) else {
            return Err(Error::UnknownKey { layer: layer.clone(), nearest: nearest(&key, &defaults), key });
        };
        let mut alone = defaults.clone();
        lay_over(&mut alone, &nested(&key, value.clone()));
        if let Err(why) = Value::Table(alone).try_into::<Config>() {
            let why = why.message().lines().next().unwrap_or("its form is wrong").to_owned();
            return Err(Error::WrongValue { layer: layer.clone(), key, value: value.to_string(), why });
        }
        let carries_password = || value.as_str().and_then(|it| url::Url::parse(it).ok()).is_some_and(|url| url.password().is_some());
        if matches!(layer, Layer::File(_) | Layer::Profile(_)) && matches!(default, Value::String(_)) && carries_password() {
            return Err(Error::PasswordInFile { layer: layer.clone(), key });
        }
    }
    Ok(())
}

/// The keys of a table with their paths, as deep as the defaults have tables.
fn leaves_of(path: &str, table: &Table, defaults: &Table, leaves: &mut Vec<(String, Value)>) {
    for (key, value) in table {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (value, defaults.get(key)) {
            // A table that is empty by default is open: its room says what may stand in it.
            (Value::Table(inner), Some(Value::Table(known))) if !known.is_empty() => leaves_of(&path, inner, known, leaves),
            _ => leaves.push((path, value.clone())),
        }
    }
}

/// The known key that looks most like an unknown one.
fn nearest(unknown: &str, defaults: &Table) -> Option<String> {
    let mut known = Vec::new();
    leaves_of("", defaults, defaults, &mut known);
    let names = known.into_iter().map(|(key, _)| key).chain(defaults.keys().cloned());
    names.map(|key| (strsim::jaro_winkler(&key, unknown), key)).filter(|(likeness, _)| *likeness > 0.75).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, key)| key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_text(text: &str, env: &[(&str, &str)], flags: &[Override]) -> Result<Loaded, Error> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("config.toml");
        fs::write(&path, text).expect("written");
        load(Some(&path), env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())), flags)
    }

    #[test]
    fn the_file_in_the_repository_holds_every_default() {
        let text = include_str!("../config.toml");
        let mut table: Table = text.parse().expect("valid TOML");
        table.remove("profiles");
        assert_eq!(Value::Table(table), Value::Table(Config::as_table()));
    }

    #[test]
    fn the_profiles_in_the_repository_are_known_keys() {
        for profile in ["embedded", "stack"] {
            load_text(include_str!("../config.toml"), &[("LEDGERLINE__PROFILE", profile)], &[]).expect("a valid profile");
        }
    }

    #[test]
    fn flags_beat_the_environment_which_beats_the_file() {
        let flag = Override { key: "bank.seed", value: "3".into(), flag: "--seed" };
        let seed = |env: &[(&str, &str)], flags: &[Override]| load_text("[bank]\nseed = 1", env, flags).expect("valid").config.bank.seed;
        assert_eq!(seed(&[], &[]), 1);
        assert_eq!(seed(&[("LEDGERLINE__BANK__SEED", "2")], &[]), 2);
        assert_eq!(seed(&[("LEDGERLINE__BANK__SEED", "2")], &[flag]), 3);
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_known_one() {
        let error = load_text("[bank]\nsed = 1", &[], &[]).expect_err("unknown").to_string();
        assert!(error.ends_with("unknown key bank.sed, did you mean bank.seed?"), "{error}");
    }

    #[test]
    fn an_environment_variable_that_lacks_an_underscore_is_refused() {
        for wrong in ["LEDGERLINE_BANK_RATE", "LEDGERLINE_BANK__RATE"] {
            let error = load_text("", &[(wrong, "3")], &[]).expect_err("misspelt").to_string();
            assert!(error.ends_with("did you mean LEDGERLINE__BANK__RATE?"), "{error}");
        }
        load_text("", &[("LEDGERLINE_LOG", "debug"), ("LEDGERLINE_TEST_KILLS", "3"), ("HOME", "/")], &[]).expect("others are left alone");
    }

    #[test]
    fn a_number_of_readers_that_cannot_be_is_refused_with_those_that_can() {
        for wrong in ["33", "-1"] {
            let error = load_text(&format!("[cdc]\nsnapshot_max_threads = {wrong}"), &[], &[]).expect_err("out of range").to_string();
            let told = format!("cdc.snapshot_max_threads cannot be {wrong}: a snapshot has 1 to 32 readers, or 0");
            assert!(error.contains(&told), "{error}");
        }
        assert_eq!(load_text("[cdc]\nsnapshot_max_threads = 32", &[], &[]).map(|it| i64::from(it.config.cdc.snapshot_max_threads)).ok(), Some(32));
    }

    #[test]
    fn a_wrong_value_names_its_key_and_its_layer() {
        let error = load_text("", &[("LEDGERLINE__BANK__SEED", "many")], &[]).expect_err("wrong").to_string();
        assert!(error.starts_with("environment variable LEDGERLINE__BANK__SEED: bank.seed cannot be \"many\""), "{error}");
    }

    #[test]
    fn a_password_in_the_file_is_refused_and_not_repeated() {
        let error = load_text("[source]\nurl = \"postgres://bank:hunter2@db/bank\"", &[], &[]).expect_err("refused");
        assert!(!crate::fault::chain(&error).contains("hunter2"));
        assert!(matches!(error, Error::PasswordInFile { .. }));
    }

    #[test]
    fn secrets_come_from_the_environment_and_do_not_print() {
        let loaded = load_text("", &[("LEDGERLINE__LAKE__SECRET_ACCESS_KEY", "hunter2")], &[]).expect("valid");
        assert!(!format!("{loaded:?}").contains("hunter2"));
        assert_eq!(loaded.secrets.lake_secret_access_key.expect("set").reveal(), "hunter2");
    }
}
