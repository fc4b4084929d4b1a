//! What the source's catalog says: which tables to capture, the publication that holds them, and the shape of each.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Row as _};

use super::{
    Config, defaults,
    envelope::{ColumnSpec, Table},
    error::Error,
    pgoutput::Relation,
    source::quoted,
    values::{self, Kind, Scalar},
};
use crate::change::{TableId, Topics};

/// Domains over domains are followed this far.
const TYPE_DEPTH_MAX: usize = 8;

/// How long a transaction may be in the WAL and not be seen, and how often that is looked at.
const SEEN_MAX: Duration = Duration::from_secs(5);
const SEEN_INTERVAL: Duration = Duration::from_millis(2);

/// Refuses a server that cannot do what we need.
pub(super) async fn check_server(connection: &mut PgConnection) -> Result<(), Error> {
    let sql = |source| Error::Sql { what: "ask the source for its version", source };
    const ASK: &str = "select current_setting('server_version_num'), current_setting('wal_level'), pg_is_in_recovery()";
    let (version, wal_level, is_standby): (String, String, bool) = sqlx::query_as(ASK).fetch_one(connection).await.map_err(sql)?;
    let version: i32 = version.parse().unwrap_or_default();
    if version < 150_000 {
        return Err(Error::OldServer { found: version / 10_000 });
    }
    if wal_level != "logical" {
        return Err(Error::WalLevel { found: wal_level });
    }
    if is_standby {
        return Err(Error::Standby);
    }
    Ok(())
}

/// The tables that `cdc.tables` names, by schema and name in byte order, as Debezium snapshots them.
pub(super) async fn wanted_tables(connection: &mut PgConnection, config: &Config) -> Result<BTreeSet<TableId>, Error> {
    // A partitioned table has no changes of its own, those are its partitions'; its snapshot is read as Debezium reads it.
    // Our own state is never captured.
    const TABLES: &str = "select n.nspname, c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.relkind in ('r', 'p') and c.relpersistence = 'p' and n.nspname not in ('pg_catalog', 'information_schema', 'ledgerline')";
    let sql = |source| Error::Sql { what: "list the source's tables", source };
    let all: Vec<(String, String)> = sqlx::query_as(TABLES).fetch_all(connection).await.map_err(sql)?;
    let all: BTreeSet<TableId> = all.into_iter().map(|(schema, table)| TableId { schema, table }).collect();
    choose(&all, &config.tables, &config.tables_exclude)
}

fn choose(all: &BTreeSet<TableId>, tables: &[String], exclude: &[String]) -> Result<BTreeSet<TableId>, Error> {
    if let Some(missing) = tables.iter().find(|it| !it.contains('*') && !all.iter().any(|table| table.to_string() == **it)) {
        return Err(Error::NoSuchTable { table: missing.clone() });
    }
    let chosen: BTreeSet<TableId> = all.iter().filter(|it| is_wanted(tables, exclude, it)).cloned().collect();
    if chosen.is_empty() { Err(Error::NoTables) } else { Ok(chosen) }
}

/// Whether `cdc.tables` and `cdc.tables_exclude` name the table.
pub(super) fn is_wanted(tables: &[String], exclude: &[String], table: &TableId) -> bool {
    let name = table.to_string();
    let named = |patterns: &[String]| patterns.iter().any(|pattern| matches(pattern, &name));
    named(tables) && !named(exclude)
}

/// Whether `*` in the pattern, standing for any text, makes it the name.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => {
            name.strip_prefix(start).is_some_and(|tail| tail.char_indices().map(|(at, _)| at).chain([tail.len()]).any(|at| matches(rest, &tail[at..])))
        }
    }
}

/// A table that somebody has locked against everything, and by which process: whoever asks for its shape waits for that.
pub(super) async fn locked(connection: &mut PgConnection, tables: &BTreeSet<TableId>) -> Result<Option<(String, i32)>, Error> {
    const LOCKED: &str = "select n.nspname || '.' || c.relname, l.pid from pg_locks l join pg_class c on c.oid = l.relation
            join pg_namespace n on n.oid = c.relnamespace join unnest($1::text[], $2::text[]) t(schema, name) on n.nspname = t.schema and c.relname = t.name
        where l.granted and l.mode = 'AccessExclusiveLock' and l.database = (select oid from pg_database where datname = current_database()) limit 1";
    let (schemas, names): (Vec<&str>, Vec<&str>) = tables.iter().map(|it| (it.schema.as_str(), it.table.as_str())).unzip();
    let asked = sqlx::query_as(LOCKED).bind(schemas).bind(names).fetch_optional(connection).await;
    asked.map_err(|source| Error::Sql { what: "look for locked tables", source })
}

/// What the publication holds; None if there is none.
pub(super) async fn published(connection: &mut PgConnection, publication: &str) -> Result<Option<BTreeSet<TableId>>, Error> {
    let sql = |source| Error::Sql { what: "read the publication", source };
    let found = sqlx::query("select pubinsert and pubupdate and pubdelete and not pubviaroot from pg_publication where pubname = $1")
        .bind(publication)
        .fetch_optional(&mut *connection)
        .await
        .map_err(sql)?;
    let Some(found) = found else { return Ok(None) };
    if !found.try_get::<bool, _>(0).map_err(sql)? {
        return Err(Error::PublicationPartial { publication: publication.to_owned() });
    }
    // A published partitioned table is shown as its partitions.
    const TABLES: &str = "select schemaname::text, tablename::text from pg_publication_tables where pubname = $1
        union select n.nspname::text, c.relname::text
        from pg_publication p join pg_class c on c.relkind = 'p' join pg_namespace n on n.oid = c.relnamespace
        where p.pubname = $1 and (p.puballtables
            or exists (select from pg_publication_rel r where r.prpubid = p.oid and r.prrelid = c.oid)
            or exists (select from pg_publication_namespace s where s.pnpubid = p.oid and s.pnnspid = n.oid))";
    let tables: Vec<(String, String)> = sqlx::query_as(TABLES).bind(publication).fetch_all(connection).await.map_err(sql)?;
    Ok(Some(tables.into_iter().map(|(schema, table)| TableId { schema, table }).collect()))
}

pub(super) async fn create_publication(connection: &mut PgConnection, publication: &str, tables: &BTreeSet<TableId>) -> Result<(), Error> {
    // Heirs are tables of their own, chosen or not by their own names.
    let tables: Vec<String> = tables.iter().map(|it| format!("only {}", full_name(it))).collect();
    let statement = format!("create publication {} for table {}", quoted(publication), tables.join(", "));
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(connection).await.map_err(|source| Error::Sql { what: "create the publication", source })?;
    tracing::info!(publication, tables = tables.len(), "publication created");
    Ok(())
}

/// Adds a table to the publication. With `only_empty`, a table that already has rows is left alone, and false returned:
/// under the lock no row can slip in between the look and the change.
pub(super) async fn publish(connection: &mut PgConnection, publication: &str, table: &TableId, only_empty: bool) -> Result<bool, Error> {
    let sql = |source| Error::Sql { what: "add a table to the publication", source };
    let name = full_name(table);
    let mut transaction = connection.begin().await.map_err(sql)?;
    sqlx::raw_sql(AssertSqlSafe(format!("lock table only {name} in share row exclusive mode"))).execute(&mut *transaction).await.map_err(sql)?;
    if only_empty && has_rows(&mut transaction, table).await? {
        return Ok(false);
    }
    sqlx::raw_sql(AssertSqlSafe(format!("alter publication {} add table only {name}", quoted(publication)))).execute(&mut *transaction).await.map_err(sql)?;
    transaction.commit().await.map_err(sql)?;
    tracing::info!(publication, table = %table, "table added to the publication");
    Ok(true)
}

/// Refuses a table whose rows the user of the connection may not read.
pub(super) async fn require_readable(connection: &mut PgConnection, tables: &BTreeSet<TableId>) -> Result<(), Error> {
    for table in tables {
        let asked = sqlx::query_scalar("select has_table_privilege($1, 'select')").bind(full_name(table)).fetch_one(&mut *connection).await;
        if !asked.map_err(|source| Error::Sql { what: "ask for the right to read a table", source })? {
            return Err(Error::Unreadable { table: table.to_string() });
        }
    }
    Ok(())
}

pub(super) async fn has_rows(connection: &mut PgConnection, table: &TableId) -> Result<bool, Error> {
    let statement = format!("select exists (select from only {})", full_name(table));
    let found = sqlx::query_scalar(AssertSqlSafe(statement)).fetch_one(connection).await;
    found.map_err(|source| Error::Sql { what: "look for rows of a table", source })
}

/// What a table's rows are selected from: its own alone, not its heirs'; a partitioned table has none, so its partitions'.
pub(super) async fn rows_of(connection: &mut PgConnection, table: &TableId) -> Result<String, Error> {
    let name = full_name(table);
    let asked = sqlx::query_scalar("select relkind = 'p' from pg_class where oid = $1::regclass").bind(&name).fetch_one(connection).await;
    let is_partitioned: bool = asked.map_err(|source| Error::Sql { what: "describe a table", source })?;
    Ok(if is_partitioned { name } else { format!("only {name}") })
}

pub(super) fn full_name(table: &TableId) -> String {
    format!("{}.{}", quoted(&table.schema), quoted(&table.table))
}

/// A column as the catalog has it now.
#[derive(Debug)]
struct CatalogColumn {
    name: String,
    type_oid: u32,
    type_modifier: i32,
    not_null: bool,
    key_place: Option<i16>,
    is_enum: bool,
    /// Its expression.
    default: Option<String>,
}

impl CatalogColumn {
    fn default(&self, kind: Kind) -> Option<Vec<u8>> {
        defaults::absent(kind, self.type_oid, self.is_enum, self.default.as_deref()?)
    }
}

/// The shape of a table as it is now, all columns: for the snapshot.
pub(super) async fn describe(connection: &mut PgConnection, id: &TableId, topics: &Topics) -> Result<Table, Error> {
    let sql = |source| Error::Sql { what: "describe a table", source };
    let oid: sqlx::postgres::types::Oid = sqlx::query_scalar("select $1::regclass::oid").bind(full_name(id)).fetch_one(&mut *connection).await.map_err(sql)?;
    let mut specs = Vec::new();
    for column in columns(connection, oid.0).await? {
        let kind = kind_of(connection, column.type_oid, column.type_modifier).await?;
        specs.push(ColumnSpec { default: column.default(kind), name: column.name, kind, not_null: column.not_null, key_place: column.key_place });
    }
    Ok(Table::new(id.clone(), topics.table(id), specs))
}

/// How many rows the planner expects; `rows` is what they are selected from ([`rows_of`]). It is asked, as what it noted down at the
/// last ANALYZE may be old, or not be there at all.
pub(super) async fn estimate(connection: &mut PgConnection, table: &TableId, rows: &str) -> Result<u64, Error> {
    let statement = format!("explain (format json) select 1 from {rows}");
    let asked = sqlx::query_scalar(AssertSqlSafe(statement)).fetch_one(connection).await;
    let plan: sqlx::types::Json<serde_json::Value> = asked.map_err(|source| Error::Unread { table: table.to_string(), source })?;
    Ok(plan.0[0]["Plan"]["Plan Rows"].as_f64().map_or(0, |it| it as u64))
}

/// A column of a primary key, and its type as a cast names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeyColumn {
    pub(super) name: String,
    pub(super) type_name: String,
}

/// The primary key of a table in its order, and the relation's id.
pub(super) async fn primary_key(connection: &mut PgConnection, table: &TableId) -> Result<(u32, Vec<KeyColumn>), Error> {
    const KEY: &str = "select a.attname::text, format_type(a.atttypid, a.atttypmod)
        from pg_index i, unnest(i.indkey::int2[]) with ordinality u(attnum, place) join pg_attribute a on a.attnum = u.attnum
        where i.indrelid = $1 and a.attrelid = $1 and i.indisprimary and u.place <= i.indnkeyatts order by u.place";
    let sql = |source| Error::Sql { what: "describe a table", source };
    let oid: sqlx::postgres::types::Oid =
        sqlx::query_scalar("select $1::regclass::oid").bind(full_name(table)).fetch_one(&mut *connection).await.map_err(sql)?;
    let columns: Vec<(String, String)> = sqlx::query_as(KEY).bind(oid).fetch_all(connection).await.map_err(sql)?;
    Ok((oid.0, columns.into_iter().map(|(name, type_name)| KeyColumn { name, type_name }).collect()))
}

/// Waits until others see what a transaction did to the catalog: its commit is in the WAL, and so with us, before they do.
///
/// A commit may wait for a synchronous standby, which may be we ourselves: then what the catalog tells by now has to do.
pub(super) async fn wait_until_seen(connection: &mut PgConnection, xid: u32) -> Result<(), Error> {
    // Held from its first change until after its end is seen.
    const OPEN: &str = "select exists (select from pg_locks where locktype = 'transactionid' and granted and transactionid = $1::text::xid)";
    let deadline = Instant::now() + SEEN_MAX;
    loop {
        let asked = sqlx::query_scalar(OPEN).bind(xid.to_string()).fetch_one(&mut *connection).await;
        let open: bool = asked.map_err(|source| Error::Sql { what: "ask whether a transaction is over", source })?;
        if !open {
            return Ok(());
        }
        if Instant::now() >= deadline {
            tracing::warn!(xid, "a transaction that changed a table is in the WAL and not over yet; its table's key is told as it was before");
            return Ok(());
        }
        tokio::time::sleep(SEEN_INTERVAL).await;
    }
}

/// The shape of a table as the stream describes it; the catalog, read anew, adds the primary key.
///
/// A table dropped since, or whose key was renamed since, is not in the catalog as the stream has it: then the key is what it
/// was before, or else the replica identity if that is an index.
pub(super) async fn describe_relation(
    connection: &mut PgConnection,
    relation: &Relation<'_>,
    before: Option<&KeyNames>,
    topics: &Topics,
) -> Result<(Table, KeyNames), Error> {
    let now = columns(connection, relation.id).await?;
    let by_name: HashMap<&str, &CatalogColumn> = now.iter().map(|it| (it.name.as_str(), it)).collect();
    let mut key: KeyNames = now.iter().filter_map(|it| Some((it.name.clone(), it.key_place?))).collect();
    if now.is_empty() || !key.keys().all(|name| relation.columns.iter().any(|it| it.name == name)) {
        key = before.cloned().unwrap_or_default();
        if key.is_empty() && relation.replica_identity != b'f' {
            key = relation.columns.iter().filter(|it| it.identity).zip(1..).map(|(column, place)| (column.name.to_owned(), place)).collect();
        }
    }
    let mut specs = Vec::with_capacity(relation.columns.len());
    for column in relation.columns.iter() {
        let kind = kind_of(connection, column.type_oid, column.type_modifier).await?;
        let (not_null, default) = by_name.get(column.name).map_or((false, None), |it| (it.not_null, it.default(kind)));
        specs.push(ColumnSpec { default, name: column.name.to_owned(), kind, not_null, key_place: key.get(column.name).copied() });
    }
    let id = TableId { schema: relation.schema.to_owned(), table: relation.table.to_owned() };
    let topic = topics.table(&id);
    Ok((Table::new(id, topic, specs), key))
}

/// The columns of a primary key and their places in it.
pub(super) type KeyNames = HashMap<String, i16>;

/// The key of a table without a primary key is that of its first unique index, as JDBC lists them and Debezium takes it.
async fn columns(connection: &mut PgConnection, relation: u32) -> Result<Vec<CatalogColumn>, Error> {
    // No default names a column, so its text needs no relation: to name it would wait for whoever has locked it.
    const COLUMNS: &str = "select a.attname::text, a.atttypid, a.atttypmod, a.attnotnull, k.place::int2, t.typtype = 'e', pg_get_expr(d.adbin, 0)
        from pg_attribute a
        join pg_type t on t.oid = a.atttypid
        left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum and a.attgenerated = ''
        left join (select u.attnum, u.place
                   from (select i.* from pg_index i join pg_class c on c.oid = i.indexrelid where i.indrelid = $1 and i.indisunique and i.indisvalid
                         order by i.indisprimary desc, i.indisclustered desc, c.relname limit 1) i,
                        unnest(i.indkey::int2[]) with ordinality u(attnum, place)
                   where u.place <= i.indnkeyatts) k on k.attnum = a.attnum
        where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped order by a.attnum";
    type Found = (String, sqlx::postgres::types::Oid, i32, bool, Option<i16>, bool, Option<String>);
    let rows: Vec<Found> = sqlx::query_as(COLUMNS)
        .bind(sqlx::postgres::types::Oid(relation))
        .fetch_all(connection)
        .await
        .map_err(|source| Error::Sql { what: "describe a table", source })?;
    let column = |(name, type_oid, type_modifier, not_null, key_place, is_enum, default): Found| CatalogColumn {
        name,
        type_oid: type_oid.0,
        type_modifier,
        not_null,
        key_place,
        is_enum,
        default,
    };
    Ok(rows.into_iter().map(column).collect())
}

/// How a type is written; types made by users are followed to what they are made of.
async fn kind_of(connection: &mut PgConnection, type_oid: u32, type_modifier: i32) -> Result<Kind, Error> {
    const TYPE: &str =
        "select typname::text, typtype::text, typbasetype, typtypmod, case when typcategory = 'A' then typelem else 0::oid end from pg_type where oid = $1";
    let (mut oid, mut modifier, mut in_array) = (type_oid, type_modifier, false);
    // Within an array.
    let mut in_domain = false;
    for _ in 0..TYPE_DEPTH_MAX {
        if let Some(kind) = values::built_in(oid, modifier) {
            return Ok(kind);
        }
        let found: Option<(String, String, sqlx::postgres::types::Oid, i32, sqlx::postgres::types::Oid)> = sqlx::query_as(TYPE)
            .bind(sqlx::postgres::types::Oid(oid))
            .fetch_optional(&mut *connection)
            .await
            .map_err(|source| Error::Sql { what: "look up a type", source })?;
        match found {
            Some((_, class, base, base_modifier, _)) if class == "d" => match values::built_in(base.0, base_modifier) {
                // What an array of domains holds Debezium follows to an enum only.
                Some(_) if in_array => return Ok(Kind::Omitted),
                _ => (oid, modifier, in_domain) = (base.0, base_modifier, in_array),
            },
            Some((.., element)) if element.0 != 0 => (oid, in_array) = (element.0, true),
            Some((_, class, ..)) if in_domain && class != "e" => return Ok(Kind::Omitted),
            Some((name, class, ..)) => return Ok(values::made(&name, &class, in_array)),
            // Dropped since: its text.
            None => break,
        }
    }
    Ok(Kind::One(Scalar::Text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str) -> TableId {
        let (schema, table) = name.split_once('.').expect("schema.table");
        TableId { schema: schema.into(), table: table.into() }
    }

    #[test]
    fn patterns_name_schemas_prefixes_and_single_tables() {
        assert!(matches("public.*", "public.customers") && matches("*.audit_*", "x.audit_log") && matches("public.accounts", "public.accounts"));
        assert!(!matches("public.*", "other.customers") && !matches("public.account", "public.accounts") && !matches("public.*s", "public.data"));
    }

    #[test]
    fn tables_are_chosen_by_pattern_and_taken_out_by_pattern() {
        let all: BTreeSet<TableId> = ["public.customers", "public.Mixed Case", "public.scratch_1", "audit.log"].map(table).into();
        let chosen = choose(&all, &["public.*".into()], &["public.scratch_*".into()]).expect("some");
        assert_eq!(chosen.into_iter().map(|it| it.to_string()).collect::<Vec<_>>(), ["public.Mixed Case", "public.customers"]);
        assert!(matches!(choose(&all, &["public.payments".into()], &[]), Err(Error::NoSuchTable { .. })));
        assert!(matches!(choose(&all, &["nothing.*".into()], &[]), Err(Error::NoTables)));
    }
}
