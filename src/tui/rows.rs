//! What the lists on the screens hold, in the order in which they are drawn and walked through (pure).

use crate::{
    change::{BANK_TABLES, BOUNDARIES},
    dag::DagStats,
    lake::NewObject,
    pipeline::snapshot::{Flow, Snapshot},
    refresh::NodeStats,
};

use super::keys::Pane;

pub(super) fn count(pane: Pane, now: &Snapshot, filter: &str) -> usize {
    match pane {
        Pane::Stream => topics(now, filter).len(),
        Pane::Lake => objects(now, filter).len(),
        Pane::Dags => tasks(now, filter).len(),
        Pane::Dbt => nodes(now, filter).len(),
        Pane::Kpis | Pane::Log => 0,
    }
}

/// The bank's tables as money flows through them, then the boundaries, then what else there is.
pub(super) fn rank(table: &str) -> usize {
    BANK_TABLES.iter().position(|it| *it == table).unwrap_or(BANK_TABLES.len() + usize::from(table != BOUNDARIES))
}

pub(super) fn topics<'a>(now: &'a Snapshot, filter: &str) -> Vec<(&'a str, &'a Flow)> {
    let mut topics: Vec<_> = now.flow.iter().map(|(name, flow)| (name.as_str(), flow)).filter(|it| holds(it.0, filter)).collect();
    topics.sort_by_key(|it| rank(it.0));
    topics
}

/// Newest first.
pub(super) fn objects<'a>(now: &'a Snapshot, filter: &str) -> Vec<&'a NewObject> {
    now.lake.newest.iter().filter(|it| holds(&it.key, filter)).collect()
}

/// The tasks of all DAGs, in the order of their plans.
pub(super) fn tasks<'a>(now: &'a Snapshot, filter: &str) -> Vec<(&'a DagStats, &'a str)> {
    let all = now.dag.dags.iter().flat_map(|dag| dag.tasks.iter().map(move |task| (dag, task.0.as_str())));
    all.filter(|(_, task)| holds(task, filter)).collect()
}

/// In the order in which dbt may run them.
pub(super) fn nodes<'a>(now: &'a Snapshot, filter: &str) -> Vec<&'a NodeStats> {
    now.refresh.dbt.nodes.iter().filter(|it| holds(&it.name, filter)).collect()
}

pub(super) fn holds(text: &str, filter: &str) -> bool {
    filter.is_empty() || text.to_lowercase().contains(&filter.to_lowercase())
}
