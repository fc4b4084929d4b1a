//! Which tables of the stream become events: a publication of somebody's own may hold more.

use crate::{
    cdc::{Config, catalog},
    change::TableId,
};

#[derive(Debug)]
pub(in crate::cdc) struct Filter {
    tables: Vec<String>,
    exclude: Vec<String>,
    left_out: Vec<String>,
    /// Those that were left out until their rows from before were read.
    admitted: Vec<String>,
}

impl Filter {
    /// Those that the configuration names, but for those that are left out.
    pub(in crate::cdc) fn new(config: &Config, left_out: &[String]) -> Self {
        Self { tables: config.tables.clone(), exclude: config.tables_exclude.clone(), left_out: left_out.to_vec(), admitted: Vec::new() }
    }

    pub(super) fn names(&self, table: &TableId) -> bool {
        catalog::is_wanted(&self.tables, &self.exclude, table)
    }

    pub(super) fn leaves_out(&self, table: &TableId) -> bool {
        let name = table.to_string();
        self.left_out.contains(&name) && !self.admitted.contains(&name)
    }

    /// These turned out to have rows from before they could be captured.
    pub(super) fn leave_out(&mut self, tables: &[String]) {
        self.left_out = tables.to_vec();
    }

    pub(super) fn admit(&mut self, table: &str) {
        if self.left_out.iter().any(|it| it == table) && !self.admitted.iter().any(|it| it == table) {
            self.admitted.push(table.to_owned());
        }
    }
}
