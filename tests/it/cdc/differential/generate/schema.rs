//! What is done to tables that have rows: DDL between the changes.

use super::{Known, KnownColumn, other};
use crate::cdc::differential::{
    case::{NUMBER, OWN_TYPE, OWN_VALUES, Statement, identifier, key_name},
    dice::Dice,
    types::Chosen,
};

/// At most one change of each table, followed by rows in its new shape.
pub(super) fn changes(dice: &mut Dice, all: &mut [Known]) -> Vec<Statement> {
    if dice.in_hundred(12) && all.len() > 1 && all.iter().all(|it| !it.table.partitioned) {
        return exchange(dice, all);
    }
    let mut statements = Vec::new();
    for known in all {
        if dice.in_hundred(60) {
            statements.extend(known.change_of_schema(dice));
        }
    }
    statements
}

/// Two tables take each other's name, as when a table was made anew beside the old one. A name that is on no list of tables would be
/// no longer captured by Debezium.
fn exchange(dice: &mut Dice, all: &mut [Known]) -> Vec<Statement> {
    let tables = vec![all[0].table.name.clone(), all[1].table.name.clone()];
    let (one, two) = (identifier(&tables[0]), identifier(&tables[1]));
    let sql = format!("begin; alter table {one} rename to aside; alter table {two} rename to {one}; alter table aside rename to {two}; commit");
    let statement = Statement::Other { tables: tables.clone(), column: None, sql };
    (all[0].table.name, all[1].table.name) = (tables[1].clone(), tables[0].clone());
    vec![statement, all[0].insert(dice), all[1].insert(dice)]
}

impl Known {
    fn ddl(&self, column: Option<&str>, sql: &str) -> Statement {
        let sql = format!("alter table {} {sql}", identifier(&self.table.name));
        Statement::Other { tables: vec![self.table.name.clone()], column: column.map(str::to_owned), sql }
    }

    /// One change, followed by rows in its new shape; sometimes all in one transaction.
    ///
    /// No rows come before it there: the server describes their table once more or not, as it happens, and what an engine then asks
    /// of the catalog is of after the change (`assets/cdc-types.md`).
    fn change_of_schema(&mut self, dice: &mut Dice) -> Vec<Statement> {
        let mut statements = Vec::new();
        let in_one = dice.in_hundred(30);
        if in_one {
            statements.push(other("begin"));
        }
        let plain: Vec<usize> = (0..self.columns.len()).filter(|it| !self.table.key.contains(&self.columns[*it].name)).collect();
        let column = (!plain.is_empty()).then(|| *dice.one_of(&plain));
        statements.extend(match (dice.below(16), column) {
            (0, Some(at)) => self.drop_column(dice, at),
            (1 | 2, Some(at)) => self.rename_column(at),
            (3 | 4, Some(at)) => self.change_type(at),
            (5, _) => self.change_identity(dice),
            (6, Some(at)) => self.change_null(dice, at),
            (7 | 8, _) => self.change_key(dice),
            (9, _) if !in_one => self.more_values(),
            (10, _) if !self.table.key.is_empty() => self.rename_key(dice),
            (11, _) => self.add_made_column(dice),
            _ => self.add_column(dice),
        });
        statements.push(self.insert(dice));
        if in_one {
            statements.push(other("commit"));
        }
        statements
    }

    fn drop_column(&mut self, dice: &mut Dice, at: usize) -> Vec<Statement> {
        let KnownColumn { name, .. } = self.columns.remove(at);
        let mut statements = vec![self.ddl(Some(&name), &format!("drop column {}", identifier(&name)))];
        // Another one under the same name.
        if dice.in_hundred(30) {
            let chosen = Chosen::any(dice);
            statements.push(self.ddl(Some(&name), &format!("add column {} {}", identifier(&name), chosen.name())));
            self.columns.push(KnownColumn { name, chosen, not_null: false, has_default: false });
        }
        statements
    }

    fn rename_column(&mut self, at: usize) -> Vec<Statement> {
        let before = self.columns[at].name.clone();
        self.columns[at].name = format!("{before} now");
        vec![self.ddl(Some(&before), &format!("rename column {} to {}", identifier(&before), identifier(&self.columns[at].name)))]
    }

    fn rename_key(&mut self, dice: &mut Dice) -> Vec<Statement> {
        let place = dice.below(self.table.key.len());
        let before = self.table.key[place].clone();
        if before == NUMBER {
            return Vec::new();
        }
        self.table.key[place] = format!("{before} now");
        if let Some(column) = self.columns.iter_mut().find(|it| it.name == before) {
            column.name.clone_from(&self.table.key[place]);
        }
        vec![self.ddl(Some(&before), &format!("rename column {} to {}", identifier(&before), identifier(&self.table.key[place])))]
    }

    fn change_type(&mut self, at: usize) -> Vec<Statement> {
        let column = &mut self.columns[at];
        column.chosen = Chosen::text();
        column.has_default = false;
        let name = column.name.clone();
        let quoted = identifier(&name);
        vec![self.ddl(Some(&name), &format!("alter column {quoted} drop default, alter column {quoted} type text using {quoted}::text"))]
    }

    fn change_identity(&mut self, dice: &mut Dice) -> Vec<Statement> {
        let identity = dice.one_of(&["full", "nothing", "default", "default"]);
        self.table.identity = identity;
        vec![self.ddl(None, &format!("replica identity {identity}"))]
    }

    fn change_null(&mut self, dice: &mut Dice, at: usize) -> Vec<Statement> {
        let column = &mut self.columns[at];
        column.not_null = column.chosen.may_be_required() && dice.in_hundred(50);
        let (name, how) = (column.name.clone(), if column.not_null { "set" } else { "drop" });
        vec![self.ddl(Some(&name), &format!("alter column {} {how} not null", identifier(&name)))]
    }

    /// None, one of numbers alone, or one more column in it.
    fn change_key(&mut self, dice: &mut Dice) -> Vec<Statement> {
        if self.table.partitioned || self.table.identity == "index" {
            return Vec::new();
        }
        let keyable: Vec<String> = self.columns.iter().filter(|it| it.chosen.of.keyable && !it.chosen.array).map(|it| it.name.clone()).collect();
        let before = std::mem::take(&mut self.table.key);
        self.table.key = match (dice.below(3), keyable.as_slice()) {
            (0, _) if !before.is_empty() => Vec::new(),
            (1, [_, ..]) => vec![dice.one_of(&keyable).clone(), NUMBER.to_owned()],
            _ => vec![NUMBER.to_owned()],
        };
        for column in &mut self.columns {
            column.not_null |= self.table.key.contains(&column.name);
        }
        let name = key_name(&self.table.name);
        let columns: Vec<String> = self.table.key.iter().map(|it| identifier(it)).collect();
        let gone = (!before.is_empty()).then(|| format!("drop constraint {name}"));
        let made = (!columns.is_empty()).then(|| format!("add constraint {name} primary key ({})", columns.join(", ")));
        let changes: Vec<String> = gone.into_iter().chain(made).collect();
        vec![self.ddl(None, &changes.join(", "))]
    }

    /// Of the type that each case has for itself.
    fn more_values(&mut self) -> Vec<Statement> {
        let Some(column) = self.columns.iter().find(|it| it.chosen.of.name == OWN_TYPE && !it.chosen.array) else { return Vec::new() };
        let value = OWN_VALUES[2];
        let (name, table) = (column.name.clone(), identifier(&self.table.name));
        let sql = format!("update {table} set {} = '{value}' where {NUMBER} % 2 = 0", identifier(&name));
        vec![
            other(&format!("alter type {OWN_TYPE} add value if not exists '{value}' before '{}'", OWN_VALUES[1])),
            Statement::Other { tables: vec![self.table.name.clone()], column: Some(name), sql },
        ]
    }

    /// One that PostgreSQL fills.
    fn add_made_column(&mut self, dice: &mut Dice) -> Vec<Statement> {
        self.n_columns += 1;
        let name = format!("made {}", self.n_columns);
        let definition = dice.one_of(&[
            "integer generated always as (n + 1) stored",
            "integer generated always as (n + 1) virtual",
            "bigint generated always as identity",
            "timestamptz default '2026-01-01 00:00:00+00'",
        ]);
        vec![self.ddl(Some(&name), &format!("add column {} {definition}", identifier(&name)))]
    }

    fn add_column(&mut self, dice: &mut Dice) -> Vec<Statement> {
        let chosen = Chosen::any(dice);
        let name = format!("added {}", self.n_columns);
        let (mut column, mut definition) = self.new_column(dice, &name, chosen);
        // Rows that are there already have to have a value.
        if column.not_null && !column.has_default {
            definition.truncate(chosen.name().len());
            column.not_null = false;
        }
        self.columns.push(column);
        vec![self.ddl(Some(&name), &format!("add column {} {definition}", identifier(&name)))]
    }
}
