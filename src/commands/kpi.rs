//! `kpi` and `reconcile`: the numbers, and the proof that they are the source's.

use std::time::Duration;

use serde::Serialize;

use crate::{
    change::Topics,
    cli::Output,
    config::Loaded,
    exit::{Exit, Failure},
    headless, kpi, lake,
    pipeline::services::Needs,
    warehouse::{
        Cut, Warehouse,
        reconcile::{self, Report},
    },
};

/// How long a reconciliation waits for the cut to pass its mark: a few scheduled runs.
const COVERED_WITHIN: Duration = Duration::from_secs(120);

#[derive(Serialize)]
struct Document<'a> {
    schema: u32,
    cut: Option<Cut>,
    kpis: &'a kpi::Kpis,
}

pub(super) async fn kpi(loaded: &Loaded, output: Output) -> Result<Exit, Failure> {
    let interrupted = super::interrupts();
    let reach = super::Reach::take(loaded, Needs::POSTGRES, &interrupted).await?;
    let reading = async {
        let warehouse = Warehouse::connect(&reach.addresses.warehouse).await.map_err(|error| Failure::from_error(&error))?;
        kpi::read_as_of(&warehouse).await.map_err(|error| Failure::from_error(&error))
    };
    let reading = reading.await;
    reach.release().await;
    let reading = reading?;
    if output.json {
        super::print_json(&Document { schema: 1, cut: reading.cut, kpis: &reading.kpis })?;
    } else {
        let as_of = reading.cut.map_or_else(|| "no run yet".to_owned(), |cut| format!("as of {}", cut.committed_at.format("%F %T%.3f UTC")));
        super::print(&format!("{as_of}\n{}", headless::table_of(&reading.kpis)))?;
    }
    Ok(Exit::Right)
}

pub(super) async fn reconcile(loaded: &Loaded, output: Output) -> Result<Exit, Failure> {
    let interrupted = super::interrupts();
    let reach = super::Reach::take(loaded, Needs::RECONCILE, &interrupted).await?;
    let report = tokio::select! {
        report = compare(loaded, &reach) => report,
        () = interrupted.cancelled() => Err(Failure::new(Exit::Interrupted, "interrupted")),
    };
    reach.release().await;
    let report = report?;
    if output.json {
        super::print_json(&report)?;
    } else {
        let mut text = String::new();
        for check in &report.checks {
            let mark = if check.ok { "ok  " } else { "FAIL" };
            text += &format!("{mark}  {:<44} {:>20} {:>20}\n", check.name, check.expected.to_string(), check.actual.to_string());
            if let Some(detail) = check.detail.as_ref().filter(|_| !check.ok) {
                text += &format!("      {detail}\n");
            }
        }
        text += if report.ok { "books balance\n" } else { "books differ\n" };
        super::print(&text)?;
    }
    Ok(if report.ok { Exit::Right } else { Exit::Data })
}

/// Marks the source now and compares once the warehouse has come that far; with nothing running, as far as it is.
async fn compare(loaded: &Loaded, reach: &super::Reach) -> Result<Report, Failure> {
    let failure = |error: crate::warehouse::Error| Failure::from_error(&error);
    let addresses = &reach.addresses;
    let topics = Topics::new(loaded.config.cdc.topic_prefix.clone());
    let warehouse = Warehouse::connect(&addresses.warehouse).await.map_err(failure)?;
    let store = lake::Store::connect(&addresses.lake).await.map_err(|error| Failure::from_error(&error))?;
    let mark = reconcile::mark(&addresses.source).await.map_err(failure)?;
    let runs = reach.owner.is_some();
    let deadline = tokio::time::Instant::now() + COVERED_WITHIN;
    while runs && !reconcile::is_covered(&mark, &warehouse).await.map_err(failure)? && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    reconcile::settle(&mark, &addresses.source, &store, &warehouse, &topics, !runs).await.map_err(failure)
}
