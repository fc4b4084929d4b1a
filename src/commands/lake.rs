//! `lake list` and `lake verify`.

use crate::{
    change::Topics,
    cli,
    config::Loaded,
    exit::{Exit, Failure},
    lake,
    pipeline::services::Needs,
    units::{bytes_for_people, grouped},
};

pub(super) async fn lake(loaded: &Loaded, command: cli::Lake) -> Result<Exit, Failure> {
    let interrupted = super::interrupts();
    let reach = super::Reach::take(loaded, Needs::LAKE, &interrupted).await?;
    let topics = Topics::new(loaded.config.cdc.topic_prefix.clone());
    let outcome = async {
        let store = lake::Store::open(&reach.addresses.lake).await.map_err(|error| Failure::from_error(&error))?;
        match command {
            cli::Lake::List { table, limit, output } => list(&store, &topics, table.as_deref(), limit, &output).await,
            cli::Lake::Verify { sweep, dry_run, output } => verify(&store, &topics, sweep && !dry_run, &output).await,
        }
    };
    let outcome = super::unless_interrupted(&interrupted, Box::pin(outcome)).await;
    reach.release().await;
    outcome
}

async fn list(store: &lake::Store, topics: &Topics, table: Option<&str>, limit: usize, output: &cli::Output) -> Result<Exit, Failure> {
    let mut tables = lake::list(store, topics, limit).await.map_err(|error| Failure::from_error(&error))?;
    if let Some(wanted) = table {
        tables.retain(|it| it.table == wanted);
        if tables.is_empty() {
            return Err(Failure::new(Exit::Usage, format!("the lake has no table {wanted}")).with_remedy("`ledgerline lake list` names them"));
        }
    }
    if output.json {
        super::print_json(&tables)?;
        return Ok(Exit::Right);
    }
    let mut text = String::new();
    for table in &tables {
        text += &format!(
            "{:<24} {:>8} {:<7} {:>12} records {:>10}\n",
            table.table,
            grouped(table.objects),
            if table.objects == 1 { "object" } else { "objects" },
            grouped(table.records),
            bytes_for_people(table.bytes)
        );
        for record in table.lanes.iter().flat_map(|it| &it.newest) {
            text +=
                &format!("  {} {:>10} rows {:>10}  {}\n", record.written_at.format("%F %T"), grouped(record.rows), bytes_for_people(record.bytes), record.data);
        }
    }
    super::print(&text)?;
    Ok(Exit::Right)
}

async fn verify(store: &lake::Store, topics: &Topics, sweep: bool, output: &cli::Output) -> Result<Exit, Failure> {
    let proof = lake::verify(store, topics, lake::Options { read_objects: true, sweep }).await.map_err(|error| Failure::from_error(&error))?;
    if output.json {
        super::print_json(&proof)?;
    } else {
        let mut text = String::new();
        for lane in &proof.lanes {
            text += &format!(
                "{:<36} p={} {:>6} {:<7} {:>12} rows {:>10}\n",
                lane.topic,
                lane.partition,
                grouped(lane.objects),
                if lane.objects == 1 { "object" } else { "objects" },
                grouped(lane.rows),
                bytes_for_people(lane.bytes)
            );
        }
        for finding in &proof.findings {
            text += &format!("FAIL  {}: {}\n", finding.key, finding.what);
        }
        if !proof.orphans.is_empty() {
            text += &format!("{} orphans, {} swept\n", proof.orphans.len(), proof.swept);
        }
        text += if proof.ok() { "no gap, no overlap, every hash right\n" } else { "the proof is broken\n" };
        super::print(&text)?;
    }
    Ok(if proof.ok() { Exit::Right } else { Exit::Data })
}
