//! `cdc status`, `cdc apply`, `cdc resnapshot` and `cdc remove`.

use serde::Serialize;

use crate::{
    cdc::{self, Applied, ConnectorStep, Removal, Request, SlotStep, SnapshotState, Standing, Stats},
    cli::{self, CdcCommand, Output},
    config::Loaded,
    exit::{Exit, Failure},
    pipeline::services::Needs,
    stage::Phase,
    units::{bytes_for_people, grouped},
};

#[derive(Serialize)]
struct Status {
    schema: u32,
    #[serde(flatten)]
    standing: Standing,
    /// What the running pipeline tells of its capture; null where none runs on this data dir.
    running: Option<Stats>,
}

#[derive(Serialize)]
struct Report {
    schema: u32,
    #[serde(flatten)]
    removal: Removal,
    removed: bool,
}

pub(super) async fn cdc(loaded: &Loaded, command: CdcCommand) -> Result<Exit, Failure> {
    match command {
        CdcCommand::Status(output) => status(loaded, &output).await,
        CdcCommand::Apply(flags) => apply(loaded, &flags).await,
        CdcCommand::Resnapshot(flags) => resnapshot(loaded, &flags).await,
        CdcCommand::Remove(flags) => remove(loaded, &flags).await,
    }
}

async fn status(loaded: &Loaded, output: &Output) -> Result<Exit, Failure> {
    let interrupted = super::interrupts();
    let mut reach = super::Reach::take(loaded, Needs::POSTGRES, &interrupted).await?;
    let asked = async {
        let standing = cdc::standing(&reach.addresses.source, &reach.addresses.state, &loaded.cdc()).await;
        let standing = standing.map_err(|error| Failure::from_error(&error))?;
        let running = match reach.owner.take() {
            Some(owner) => {
                let (snapshots, _reading) = owner.watch().await.map_err(|error| Failure::new(Exit::Away, error.to_string()))?;
                Some(snapshots.borrow().cdc.clone())
            }
            None => None,
        };
        Ok(Status { schema: 1, standing, running })
    };
    let asked = super::unless_interrupted(&interrupted, asked).await;
    reach.release().await;
    let status = asked?;
    if output.json {
        super::print_json(&status)?
    } else {
        super::print(&shown(&status))?
    }
    Ok(Exit::Right)
}

fn shown(status: &Status) -> String {
    let Standing { slot, publication, health, source_lsn, .. } = &status.standing;
    let mut text = format!("engine       {}\n", status.standing.engine.as_str());
    if let Some(connector) = &status.standing.connector {
        text += &format!("connector    {} · {}\n", connector.name, connector.shown());
    }
    if let Some(trouble) = &status.standing.connect_trouble {
        text += &format!("connector    not known: {trouble}\n");
    }
    text += &match &status.running {
        Some(stats) => format!("capture      {}{}\n", stats.step.as_str(), if stats.phase == Phase::Paused { " · paused" } else { "" }),
        None if status.standing.connector.is_some() => "capture      not looked after on this data dir; the connector goes on without us\n".to_owned(),
        None => "capture      not running on this data dir\n".to_owned(),
    };
    match health {
        None => text += &format!("slot         {slot} does not exist\n"),
        Some(health) => {
            let read = if health.active { "being read" } else { "not read" };
            text += &format!("slot         {slot} · {read} · WAL {}\n", health.wal_status);
            text += &format!("             restart {} · confirmed {} · source {source_lsn}\n", health.restart_lsn, health.confirmed_flush_lsn);
        }
    }
    if let Some(reason) = &status.standing.invalidation {
        text += &format!("             given up by the server: {reason}\n");
    }
    if let (Some(kept), Some(lag)) = (status.standing.wal_kept_bytes, status.standing.lag_bytes) {
        text += &format!("WAL          {} kept for it · {} not confirmed", bytes_for_people(kept), bytes_for_people(lag));
        let safe = health.as_ref().and_then(|it| it.safe_wal_bytes).and_then(|it| u64::try_from(it).ok());
        text += &safe.map_or_else(String::new, |safe| format!(" · {} until it is in danger", bytes_for_people(safe)));
        text.push('\n');
    }
    text += &format!("publication  {publication}{}\n", if status.standing.publication_exists { "" } else { " does not exist" });
    text += &match &status.standing.snapshot {
        SnapshotState::NeverBegun => "snapshot     never begun\n".to_owned(),
        SnapshotState::Unfinished => "snapshot     not finished\n".to_owned(),
        SnapshotState::Finished { lsn, at } => format!("snapshot     finished {} at {lsn}\n", at.format("%F %T UTC")),
    };
    for request in &status.standing.incremental_snapshots {
        text += &match &request.failure {
            Some(why) => format!("             {} was not read again: {why}\n", request.table),
            None => format!("             {} is read again: {} rows so far\n", request.table, grouped(request.rows)),
        };
    }
    text
}

#[derive(Serialize)]
struct Preparation {
    schema: u32,
    #[serde(flatten)]
    applied: Applied,
    unchanged: bool,
}

async fn apply(loaded: &Loaded, flags: &cli::Apply) -> Result<Exit, Failure> {
    let config = &loaded.config;
    let interrupted = super::interrupts();
    let reach = super::Reach::take(loaded, Needs { stream: true, ..Needs::POSTGRES }, &interrupted).await?;
    let addresses = &reach.addresses;
    let applying = async {
        let applied = cdc::apply(&addresses.source, &addresses.state, &addresses.kafka, &config.stream, &config.cdc, flags.dry_run).await;
        applied.map_err(|error| Failure::from_error(&error))
    };
    let applied = super::unless_interrupted(&interrupted, applying).await;
    reach.release().await;
    let applied = applied?;
    if flags.output.json {
        super::print_json(&Preparation { schema: 1, unchanged: applied.is_unchanged(), applied })?;
    } else {
        super::print(&applied_text(&applied))?;
    }
    Ok(Exit::Right)
}

fn applied_text(applied: &Applied) -> String {
    let would = if applied.dry_run { "would be " } else { "" };
    let mut text = format!("publication  {}", applied.publication);
    text += &match (applied.publication_created, applied.tables_added.as_slice()) {
        (true, tables) => format!(" {would}created for {}\n", tables.join(", ")),
        (false, []) => " is as it should be\n".to_owned(),
        (false, tables) => format!(" {would}extended by {}\n", tables.join(", ")),
    };
    if !applied.tables_left_out.is_empty() {
        text += &format!("             left out, because they have rows from before: {}\n", applied.tables_left_out.join(", "));
    }
    text += &match applied.topics_created.as_slice() {
        [] => "topics       are all there\n".to_owned(),
        topics => format!("topics       {would}created: {}\n", topics.join(", ")),
    };
    text += &format!("slot         {}", applied.slot);
    text += &match &applied.slot_step {
        SlotStep::Made { lsn: Some(lsn) } => format!(" created at {lsn}: the source keeps WAL for it from now on\n"),
        SlotStep::Made { lsn: None } => format!(" {would}created\n"),
        SlotStep::Kept { confirmed, active } => format!(" exists, confirmed {confirmed}{}\n", if *active { ", being read" } else { "" }),
        SlotStep::LeftToConnector => " is made by the connector when it first starts\n".to_owned(),
    };
    text += &match &applied.connector {
        None => String::new(),
        Some(ConnectorStep::Registered) => format!("connector    {would}registered, and stands still until the capture starts\n"),
        Some(ConnectorStep::Updated { settings }) => format!("connector    {would}brought up to date: {}\n", settings.join(", ")),
        Some(ConnectorStep::Kept) => "connector    is as it should be\n".to_owned(),
    };
    if applied.snapshot_comes && applied.slot_step != SlotStep::LeftToConnector {
        text += "             the first start makes it anew, in one moment with the snapshot of the rows that exist\n";
    }
    text
}

#[derive(Serialize)]
struct Asked {
    schema: u32,
    table: String,
    dry_run: bool,
    request: Option<Request>,
}

async fn resnapshot(loaded: &Loaded, flags: &cli::Resnapshot) -> Result<Exit, Failure> {
    let interrupted = super::interrupts();
    let reach = super::Reach::take(loaded, Needs::POSTGRES, &interrupted).await?;
    let asking = async {
        let asked = cdc::resnapshot(&reach.addresses.source, &reach.addresses.state, &loaded.cdc(), &flags.table, flags.dry_run).await;
        asked.map_err(|error| match error {
            cdc::Error::NotCaptured { .. } => Failure::usage(&error),
            error => Failure::from_error(&error),
        })
    };
    let asked = super::unless_interrupted(&interrupted, asking).await;
    reach.release().await;
    let request = asked?;
    if flags.output.json {
        super::print_json(&Asked { schema: 1, table: flags.table.clone(), dry_run: flags.dry_run, request })?;
    } else if request.is_some() {
        super::print(&format!("{} is read again as soon as the capture runs; `ledgerline cdc status` shows how far it came\n", flags.table))?;
    } else {
        super::print(&format!("{} would be read again\n", flags.table))?;
    }
    Ok(Exit::Right)
}

async fn remove(loaded: &Loaded, flags: &cli::Remove) -> Result<Exit, Failure> {
    let config = &loaded.cdc();
    let interrupted = super::interrupts();
    // A pipeline that runs on it is told here, with its pid.
    let data_dir = super::take_data_dir(&loaded.data_dir())?;
    let mut services = super::start_services(loaded, &data_dir, Needs::POSTGRES, &super::Limits::of(&interrupted)).await?;
    let removing = async {
        let source = &services.addresses.source;
        let found = cdc::remove(source, config, true).await.map_err(|error| Failure::from_error(&error))?;
        let nothing = found.slot.is_none() && found.publication.is_none() && found.connector.is_none();
        if flags.dry_run || nothing {
            return Ok(Report { schema: 1, removal: found, removed: false });
        }
        let question = format!("Drop {}? Changes from now on are not captured any more.", named(&found));
        if !flags.yes && !super::confirmed(&question) {
            return Err(Failure::new(Exit::Usage, "nothing was dropped").with_remedy("answer y, or give --yes where there is no terminal"));
        }
        let removal = cdc::remove(source, config, false).await.map_err(|error| Failure::from_error(&error))?;
        Ok(Report { schema: 1, removal, removed: true })
    };
    let report = super::unless_interrupted(&interrupted, removing).await;
    services.stop().await;
    let report = report?;
    if flags.output.json {
        super::print_json(&report)?;
    } else {
        super::print(&told(&report))?;
    }
    Ok(Exit::Right)
}

fn named(removal: &Removal) -> String {
    let slot = removal.slot.as_ref().map(|it| format!("slot {it} (it keeps {} of WAL)", bytes_for_people(removal.wal_freed_bytes)));
    let publication = removal.publication.as_ref().map(|it| format!("publication {it}"));
    let connector = removal.connector.as_ref().map(|it| format!("connector {it} with its offsets"));
    connector.into_iter().chain(slot).chain(publication).collect::<Vec<_>>().join(" and ")
}

fn told(report: &Report) -> String {
    let what = named(&report.removal);
    match (what.is_empty(), report.removed) {
        (true, _) => "there is nothing to remove\n".to_owned(),
        (false, false) => format!("would drop {what}\n"),
        (false, true) => format!(
            "dropped {what}\nChanges from now on are missing in the topics: to capture again set a new cdc.topic_prefix and a warehouse.url\nwhose database is empty, or begin anew with `ledgerline reset` where the services are embedded.\n"
        ),
    }
}
