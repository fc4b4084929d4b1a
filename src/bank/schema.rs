//! Whether the database holds our bank, somebody else's tables, or nothing yet; and how many rows it holds.

use sqlx::{
    ConnectOptions, Connection, PgConnection, Row,
    postgres::{PgConnectOptions, PgRow},
};

use super::Error;
use crate::{change::BANK_TABLES, secret::Secret};

const SCHEMA: &str = include_str!("schema.sql");
const VERSION: i32 = 1;

/// Two-part keys of our advisory locks: class `LB`, then what for.
const LOCK_CLASS: i32 = 0x4C42;
const LOCK_SCHEMA: i32 = 1;
/// Held by the one generator that works on this bank.
const LOCK_OWNER: i32 = 2;
/// Shared by all sessions that write; a generator that starts waits here until the sessions of a dead one are gone.
const LOCK_WRITERS: i32 = 3;

/// What the tables must have at least: names and types. Columns that somebody has added stay his business.
const COLUMNS: [(&str, &[(&str, &str)]); 4] = [
    (
        "customers",
        &[
            ("id", "bigint"),
            ("first_name", "text"),
            ("last_name", "text"),
            ("email", "text"),
            ("phone", "text"),
            ("date_of_birth", "date"),
            ("address", "text"),
            ("status", "text"),
            ("created_at", "timestamp with time zone"),
            ("updated_at", "timestamp with time zone"),
        ],
    ),
    (
        "accounts",
        &[
            ("id", "bigint"),
            ("account_number", "text"),
            ("customer_id", "bigint"),
            ("account_type", "text"),
            ("status", "text"),
            ("currency", "text"),
            ("balance", "numeric(18,2)"),
            ("interest_rate", "numeric(5,2)"),
            ("opened_at", "timestamp with time zone"),
            ("closed_at", "timestamp with time zone"),
            ("created_at", "timestamp with time zone"),
            ("updated_at", "timestamp with time zone"),
        ],
    ),
    (
        "transactions",
        &[
            ("id", "bigint"),
            ("account_id", "bigint"),
            ("related_account_id", "bigint"),
            ("txn_type", "text"),
            ("direction", "text"),
            ("amount", "numeric(18,2)"),
            ("balance_after", "numeric(18,2)"),
            ("status", "text"),
            ("reference", "text"),
            ("description", "text"),
            ("created_at", "timestamp with time zone"),
            ("posted_at", "timestamp with time zone"),
        ],
    ),
    (
        "ledger_entries",
        &[
            ("id", "bigint"),
            ("transaction_id", "bigint"),
            ("account_id", "bigint"),
            ("entry_type", "text"),
            ("amount", "numeric(18,2)"),
            ("created_at", "timestamp with time zone"),
        ],
    ),
];

/// Whose database the bank would live in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ground {
    /// Our own embedded PostgreSQL.
    Ours,
    /// Somebody's, and `bank.enabled = true` is written out: they want a bank there.
    Permitted,
    /// Somebody's, and nobody asked for a bank.
    Foreign,
}

/// Rows the source holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Census {
    pub customers: u64,
    pub accounts: u64,
    pub transactions: u64,
    pub ledger_entries: u64,
}

/// Creates the bank's schema if nothing is there, accepts our own, refuses anything else. Safe to call at the same time twice.
pub async fn prepare(url: &Secret, ground: Ground) -> Result<(), Error> {
    if ground == Ground::Foreign {
        return Err(Error::NotPermitted);
    }
    let mut connection = connect(url).await?;
    let mut transaction = connection.begin().await.map_err(Error::Connect)?;
    sqlx::query("select pg_advisory_xact_lock($1, $2)").bind(LOCK_CLASS).bind(LOCK_SCHEMA).execute(&mut *transaction).await.map_err(Error::Create)?;
    if !holds_our_bank(&mut transaction).await? {
        sqlx::raw_sql(SCHEMA).execute(&mut *transaction).await.map_err(Error::Create)?;
        transaction.commit().await.map_err(Error::Create)?;
        tracing::info!(version = VERSION, "bank's schema created");
    }
    Ok(())
}

/// Counts the rows of the four tables, all at one moment.
pub async fn census(url: &Secret) -> Result<Census, Error> {
    let mut connection = connect(url).await?;
    let row = sqlx::query(
        "select (select count(*) from public.customers), (select count(*) from public.accounts),
                (select count(*) from public.transactions), (select count(*) from public.ledger_entries)",
    )
    .fetch_one(&mut connection)
    .await
    .map_err(Error::Read)?;
    let count = |column: usize| row.try_get::<i64, _>(column).map(i64::unsigned_abs).map_err(Error::Read);
    Ok(Census { customers: count(0)?, accounts: count(1)?, transactions: count(2)?, ledger_entries: count(3)? })
}

/// A session as the bank needs it: it notices a dead peer within half a minute, and waits no longer than `lock_timeout` for
/// rows that somebody holds in a session of his own.
pub(super) async fn connect(url: &Secret) -> Result<PgConnection, Error> {
    let options: PgConnectOptions = url.reveal().parse().map_err(Error::Connect)?;
    options
        .application_name("ledgerline bank")
        .options([("lock_timeout", "5s"), ("tcp_keepalives_idle", "15"), ("tcp_keepalives_interval", "5"), ("tcp_keepalives_count", "3")])
        // Statements carry customers' names and balances; they are not for the log.
        .disable_statement_logging()
        .connect()
        .await
        .map_err(Error::Connect)
}

/// False: nothing of the bank is there. An error says what is there instead.
async fn holds_our_bank(connection: &mut PgConnection) -> Result<bool, Error> {
    let found = columns(connection).await?;
    let row = sqlx::query("select to_regnamespace('bank') is not null, to_regclass('bank.version') is not null")
        .fetch_one(&mut *connection)
        .await
        .map_err(Error::Read)?;
    let (schema, version): (bool, bool) = (row.get(0), row.get(1));
    if !version {
        return match (found.is_empty(), schema) {
            (true, false) => Ok(false),
            (true, true) => Err(Error::Foreign("a schema named bank is there that ledgerline did not make".to_owned())),
            (false, _) => Err(Error::Foreign(
                difference(&found).unwrap_or_else(|| "the four tables are there, but the schema bank with their functions is not".to_owned()),
            )),
        };
    }
    let version: Option<i32> = sqlx::query_scalar("select max(version) from bank.version").fetch_one(connection).await.map_err(Error::Read)?;
    match version {
        Some(VERSION) => difference(&found).map_or(Ok(true), |reason| Err(Error::Foreign(reason))),
        other => Err(Error::Version(other.unwrap_or_default())),
    }
}

/// Table, column and type of everything in `public` that is named like a table of ours.
async fn columns(connection: &mut PgConnection) -> Result<Vec<(String, String, String)>, Error> {
    sqlx::query(
        "select class.relname::text, attribute.attname::text, format_type(attribute.atttypid, attribute.atttypmod)
         from pg_class as class join pg_attribute as attribute on attribute.attrelid = class.oid
         where class.relnamespace = to_regnamespace('public') and class.relname = any($1)
         and attribute.attnum > 0 and not attribute.attisdropped
         order by class.relname, attribute.attnum",
    )
    .bind(&BANK_TABLES[..])
    .map(|row: PgRow| (row.get(0), row.get(1), row.get(2)))
    .fetch_all(connection)
    .await
    .map_err(Error::Read)
}

/// The first thing in which tables differ from ours.
fn difference(found: &[(String, String, String)]) -> Option<String> {
    for (table, columns) in COLUMNS {
        if !found.iter().any(|(name, _, _)| name == table) {
            return Some(format!("there is no table public.{table}, though others of the bank's names are there"));
        }
        for (column, wanted) in columns {
            match found.iter().find(|(name, it, _)| name == table && it == column) {
                None => return Some(format!("table public.{table} has no column {column}")),
                Some((_, _, is)) if is != wanted => return Some(format!("column public.{table}.{column} is {is}, not {wanted}")),
                Some(_) => {}
            }
        }
    }
    None
}

/// Becomes the one generator of this bank. False: another one, or a session of a dead one, is still there.
///
/// While it returns true nobody else writes; [`let_writers_in`] ends that.
pub(super) async fn try_own(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    if !lock(connection, "select pg_try_advisory_lock($1, $2)", LOCK_OWNER).await? {
        return Ok(false);
    }
    if lock(connection, "select pg_try_advisory_lock($1, $2)", LOCK_WRITERS).await? {
        return Ok(true);
    }
    lock(connection, "select pg_advisory_unlock($1, $2)", LOCK_OWNER).await?;
    Ok(false)
}

pub(super) async fn let_writers_in(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    lock(connection, "select pg_advisory_unlock($1, $2)", LOCK_WRITERS).await.map(drop)
}

/// Takes the owner's lock again after its session was lost.
pub(super) async fn try_own_again(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    lock(connection, "select pg_try_advisory_lock($1, $2)", LOCK_OWNER).await
}

/// Marks a session as one that writes. False: a generator is just starting.
pub(super) async fn try_write(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    lock(connection, "select pg_try_advisory_lock_shared($1, $2)", LOCK_WRITERS).await
}

/// Lets commits of several writers share one flush of the WAL: as durable, and up to a third more a second where the disk is what
/// limits. Only while others are busy too, so a slow bank waits for nobody. A user who may not set it does without.
pub(super) async fn share_flushes(connection: &mut PgConnection) {
    let set = "select set_config('commit_delay', '300', false), set_config('commit_siblings', '3', false)";
    if let Err(error) = sqlx::query(set).execute(connection).await {
        tracing::debug!(error = %error, "writer commits without a delay");
    }
}

async fn lock(connection: &mut PgConnection, statement: &'static str, key: i32) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(statement).bind(LOCK_CLASS).bind(key).fetch_one(connection).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> Vec<(String, String, String)> {
        COLUMNS.iter().flat_map(|(table, columns)| columns.iter().map(|(column, kind)| (table.to_string(), column.to_string(), kind.to_string()))).collect()
    }

    #[test]
    fn the_first_difference_is_named() {
        let mut found = ours();
        assert_eq!(difference(&found), None);
        found.push(("customers".into(), "loyalty_tier".into(), "text".into()));
        assert_eq!(difference(&found), None, "an added column is somebody's own");
        found[18].2 = "money".into();
        assert_eq!(difference(&found).as_deref(), Some("column public.accounts.opened_at is money, not timestamp with time zone"));
        found.retain(|(table, column, _)| !(table == "customers" && column == "phone"));
        assert_eq!(difference(&found).as_deref(), Some("table public.customers has no column phone"));
    }
}
