//! One case: tables, and what is done to them, as SQL; and the same with parts left out.

use std::fmt::Write as _;

/// What one seed makes. It has a schema of its own, which is the search path of all its statements.
#[derive(Debug, Clone)]
pub(super) struct Case {
    pub(super) seed: u64,
    pub(super) tables: Vec<Table>,
    /// The first is done before anybody captures. Between two all that was written has been read: an engine asks the catalog, which
    /// is always of now, so what one makes of two changes of a table that come at once is a race.
    pub(super) phases: Vec<Vec<Said>>,
    /// `skipped.operations` of both engines.
    pub(super) skips_truncate: bool,
}

/// A statement, and which of the writers says it. Each has a connection of its own, and so transactions that overlap the others'.
#[derive(Debug, Clone)]
pub(super) struct Said {
    pub(super) by: usize,
    pub(super) statement: Statement,
}

/// So many at once.
pub(super) const WRITERS: usize = 2;

#[derive(Debug, Clone)]
pub(super) struct Table {
    pub(super) name: String,
    pub(super) columns: Vec<Column>,
    pub(super) key: Vec<String>,
    pub(super) partitioned: bool,
    /// Of this table, in the words of `ALTER TABLE … REPLICA IDENTITY`.
    pub(super) identity: &'static str,
}

#[derive(Debug, Clone)]
pub(super) struct Column {
    pub(super) name: String,
    /// Type and constraints.
    pub(super) definition: String,
}

/// The column that every table has and no shrinking takes: rows are found by it.
pub(super) const NUMBER: &str = "n";

#[derive(Debug, Clone)]
pub(super) enum Value {
    Null,
    Default,
    Text(String),
}

type Assignments = Vec<(String, Value)>;

#[derive(Debug, Clone)]
pub(super) enum Statement {
    Insert { table: String, rows: Vec<Assignments>, form: Form },
    Update { table: String, set: Assignments, condition: String },
    Other { tables: Vec<String>, column: Option<String>, sql: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Values,
    Copy,
    OrNothing,
    OrUpdate,
}

/// A statement as it is sent, with the lines of a COPY.
pub(super) struct Sent {
    pub(super) sql: String,
    pub(super) copied: Option<String>,
}

/// Something of a case that can be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Table(usize),
    Statement(usize, usize),
    Row(usize, usize, usize),
    Column(usize, usize),
}

pub(super) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The name of a table's primary key, as SQL has it.
pub(super) fn key_name(table: &str) -> String {
    identifier(&format!("{table} key"))
}

/// An enum of each case's own.
pub(super) const OWN_TYPE: &str = "own";
/// The last is none of it yet.
pub(super) const OWN_VALUES: [&str; 3] = ["one", "two", "three"];

pub(super) fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

impl Case {
    pub(super) fn parts(&self) -> Vec<Part> {
        let mut parts: Vec<Part> = (0..self.tables.len()).map(Part::Table).collect();
        for (phase, statements) in self.phases.iter().enumerate() {
            parts.extend((0..statements.len()).map(|at| Part::Statement(phase, at)));
        }
        for (at, table) in self.tables.iter().enumerate() {
            parts.extend((0..table.columns.len()).filter(|it| table.columns[*it].name != NUMBER).map(|column| Part::Column(at, column)));
        }
        for (phase, statements) in self.phases.iter().enumerate() {
            for (at, statement) in statements.iter().enumerate() {
                if let Statement::Insert { rows, .. } = &statement.statement {
                    parts.extend((0..rows.len()).filter(|_| rows.len() > 1).map(|row| Part::Row(phase, at, row)));
                }
            }
        }
        parts
    }

    /// The same with only these parts, and what they need.
    pub(super) fn with_only(&self, kept: &[Part]) -> Self {
        let all = self.parts();
        let is_out = |part: Part| all.contains(&part) && !kept.contains(&part);
        let mut tables = Vec::new();
        let mut gone: Vec<(&str, Option<&str>)> = Vec::new();
        for (at, table) in self.tables.iter().enumerate() {
            if is_out(Part::Table(at)) {
                gone.push((&table.name, None));
                continue;
            }
            let mut left = table.clone();
            for (place, column) in table.columns.iter().enumerate() {
                if is_out(Part::Column(at, place)) {
                    left.columns.retain(|it| it.name != column.name);
                    left.key.retain(|it| *it != column.name);
                    gone.push((&table.name, Some(&column.name)));
                }
            }
            tables.push(left);
        }
        let is_gone = |table: &str, column: Option<&str>| gone.iter().any(|it| it.0 == table && (it.1.is_none() || (column.is_some() && it.1 == column)));
        let mut phases = Vec::new();
        for (phase, statements) in self.phases.iter().enumerate() {
            let mut left = Vec::new();
            for (at, statement) in statements.iter().enumerate() {
                if is_out(Part::Statement(phase, at)) {
                    continue;
                }
                let mut said = statement.clone();
                let stays = match &mut said.statement {
                    Statement::Insert { table, rows, .. } => {
                        let mut place = 0..;
                        rows.retain(|_| place.next().is_some_and(|row| !is_out(Part::Row(phase, at, row))));
                        rows.iter_mut().for_each(|row| row.retain(|(column, _)| !is_gone(table, Some(column))));
                        !is_gone(table, None) && !rows.is_empty()
                    }
                    Statement::Update { table, set, .. } => {
                        set.retain(|(column, _)| !is_gone(table, Some(column)));
                        !is_gone(table, None) && !set.is_empty()
                    }
                    Statement::Other { tables, column, .. } => !tables.iter().any(|it| is_gone(it, column.as_deref())),
                };
                if stays {
                    left.push(said);
                }
            }
            phases.push(left);
        }
        Self { tables, phases, ..*self }
    }

    /// What makes its types and tables.
    pub(super) fn setup(&self) -> impl Iterator<Item = String> {
        let own = format!("create type {OWN_TYPE} as enum ('{}', '{}')", OWN_VALUES[0], OWN_VALUES[1]);
        [own].into_iter().chain(self.tables.iter().flat_map(Table::statements))
    }

    /// As a person would type it.
    pub(super) fn script(&self) -> String {
        let mut script = format!("-- skipped.operations={}\n", if self.skips_truncate { "t" } else { "none" });
        self.setup().for_each(|it| script += &format!("{it};\n"));
        for (place, phase) in self.phases.iter().enumerate() {
            script += if place == 0 { "-- before anybody captures\n" } else { "-- all before this was read\n" };
            for Said { by, statement } in phase {
                let Sent { sql, copied } = statement.sent();
                script += if *by == 0 { "" } else { "/* the other writer */ " };
                script += &format!("{sql};\n");
                script.extend(copied.map(|lines| format!("{lines}\\.\n")));
            }
        }
        script
    }
}

impl Table {
    /// What makes it.
    pub(super) fn statements(&self) -> Vec<String> {
        let name = identifier(&self.name);
        let mut columns: Vec<String> = self.columns.iter().map(|it| format!("{} {}", identifier(&it.name), it.definition)).collect();
        if !self.key.is_empty() {
            columns.push(format!(
                "constraint {} primary key ({})",
                key_name(&self.name),
                self.key.iter().map(|it| identifier(it)).collect::<Vec<_>>().join(", ")
            ));
        }
        let mut statements = vec![format!("create table {name} ({})", columns.join(", "))];
        let mut each = vec![name.clone()];
        if self.partitioned {
            statements[0] += &format!(" partition by range ({NUMBER})");
            for (place, bounds) in ["from (minvalue) to (10)", "from (10) to (maxvalue)"].into_iter().enumerate() {
                let partition = identifier(&format!("{} p{place}", self.name));
                statements.push(format!("create table {partition} partition of {name} for values {bounds}"));
                each.push(partition);
            }
        }
        for (place, table) in each.into_iter().enumerate() {
            match self.identity {
                "default" => {}
                "index" => {
                    let index = identifier(&format!("{} i{place}", self.name));
                    statements.push(format!("create unique index {index} on {table} ({NUMBER})"));
                    statements.push(format!("alter table {table} replica identity using index {index}"));
                }
                identity => statements.push(format!("alter table {table} replica identity {identity}")),
            }
        }
        statements
    }
}

impl Statement {
    pub(super) fn sent(&self) -> Sent {
        match self {
            Self::Insert { table, rows, form: Form::Copy } => copy(table, rows),
            Self::Insert { table, rows, form } => Sent { sql: insert(table, rows, *form), copied: None },
            Self::Update { table, set, condition } => {
                let set: Vec<String> = set.iter().map(|(column, value)| format!("{} = {}", identifier(column), value.sql())).collect();
                Sent { sql: format!("update {} set {} where {condition}", identifier(table), set.join(", ")), copied: None }
            }
            Self::Other { sql, .. } => Sent { sql: sql.clone(), copied: None },
        }
    }
}

fn columns_of(rows: &[Assignments]) -> String {
    rows[0].iter().map(|(column, _)| identifier(column)).collect::<Vec<_>>().join(", ")
}

fn insert(table: &str, rows: &[Assignments], form: Form) -> String {
    let tuple = |row: &Assignments| format!("({})", row.iter().map(|(_, value)| value.sql()).collect::<Vec<_>>().join(", "));
    let tuples: Vec<String> = rows.iter().map(tuple).collect();
    let mut sql = format!("insert into {} ({}) values {}", identifier(table), columns_of(rows), tuples.join(", "));
    match form {
        Form::OrNothing => sql += " on conflict do nothing",
        Form::OrUpdate => {
            let set = rows[0].iter().filter(|(column, _)| column != NUMBER).map(|(column, _)| format!("{0} = excluded.{0}", identifier(column)));
            let set = set.collect::<Vec<_>>().join(", ");
            let written = match set.as_str() {
                "" => write!(sql, " on conflict do nothing"),
                set => write!(sql, " on conflict ({NUMBER}) do update set {set}"),
            };
            written.expect("memory");
        }
        Form::Values | Form::Copy => {}
    }
    sql
}

fn copy(table: &str, rows: &[Assignments]) -> Sent {
    let text = |value: &Value| match value {
        Value::Null | Value::Default => "\\N".to_owned(),
        Value::Text(text) => text.replace('\\', "\\\\").replace('\t', "\\t").replace('\n', "\\n").replace('\r', "\\r"),
    };
    let line = |row: &Assignments| row.iter().map(|(_, value)| text(value)).collect::<Vec<_>>().join("\t") + "\n";
    Sent { sql: format!("copy {} ({}) from stdin", identifier(table), columns_of(rows)), copied: Some(rows.iter().map(line).collect()) }
}

impl Value {
    fn sql(&self) -> String {
        match self {
            Self::Null => "null".to_owned(),
            Self::Default => "default".to_owned(),
            Self::Text(text) => literal(text),
        }
    }
}
