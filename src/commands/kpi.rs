//! `kpi` and `reconcile`: the numbers, and the proof that they are the source's.

use std::{fmt::Write as _, time::Duration};

use serde::Serialize;

use crate::{
    change::Topics,
    cli::Output,
    config::Loaded,
    exit::{Exit, Failure},
    kpi::{self, Kpis},
    lake,
    pipeline::{data_dir, services::Needs, socket::Client},
    units::{Money, grouped},
    warehouse::{
        Cut, Warehouse,
        reconcile::{self, Report},
    },
};

/// How long a reconciliation waits for the cut to pass its mark: a few scheduled runs.
const COVERED_WITHIN: Duration = Duration::from_secs(120);
/// Looked at so often meanwhile, whether or not it has.
const SETTLE_EVERY: Duration = Duration::from_secs(10);

#[derive(Serialize)]
struct Document<'a> {
    schema: u32,
    cut: Option<Cut>,
    kpis: &'a Kpis,
}

pub(super) async fn kpi(loaded: &Loaded, output: Output) -> Result<Exit, Failure> {
    let interrupted = super::interrupts();
    let reach = super::Reach::take(loaded, Needs::POSTGRES, &interrupted).await?;
    let reading = async {
        let warehouse = Warehouse::connect(&reach.addresses.warehouse).await.map_err(|error| Failure::from_error(&error))?;
        kpi::read_as_of(&warehouse).await.map_err(|error| Failure::from_error(&error))
    };
    let reading = super::unless_interrupted(&interrupted, reading).await;
    reach.release().await;
    let reading = reading?;
    if output.json {
        super::print_json(&Document { schema: 1, cut: reading.cut, kpis: &reading.kpis })?;
    } else {
        let as_of = reading.cut.map_or_else(|| "no run yet".to_owned(), |cut| format!("as of {}", cut.committed_at.format("%F %T%.3f UTC")));
        super::print(&format!("{as_of}\n{}", table_of(&reading.kpis)))?;
    }
    Ok(Exit::Right)
}

pub(super) async fn reconcile(loaded: &Loaded, output: Output) -> Result<Exit, Failure> {
    let interrupted = super::interrupts();
    let reach = super::Reach::take(loaded, Needs::RECONCILE, &interrupted).await?;
    let report = super::unless_interrupted(&interrupted, Box::pin(compare(loaded, &reach))).await;
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

/// Whether somebody's stages may still bring what the source holds; services alone stand still.
async fn stages_run(loaded: &Loaded) -> bool {
    let Some(owner) = Client::connect(&data_dir::socket_path(&loaded.data_dir())).await else { return false };
    owner.watch().await.is_ok_and(|(snapshots, _reading)| !snapshots.borrow().stages.is_empty())
}

/// Marks the source now and compares until all is equal, or the warehouse has come that far; with nothing running, as far as it is.
async fn compare(loaded: &Loaded, reach: &super::Reach) -> Result<Report, Failure> {
    let failure = |error: crate::warehouse::Error| Failure::from_error(&error);
    let addresses = &reach.addresses;
    let topics = Topics::new(loaded.config.cdc.topic_prefix.clone());
    let warehouse = Warehouse::connect(&addresses.warehouse).await.map_err(failure)?;
    let store = lake::Store::open(&addresses.lake).await.map_err(|error| Failure::from_error(&error))?;
    let mark = reconcile::mark(&addresses.source).await.map_err(failure)?;
    let runs = stages_run(loaded).await;
    let settle = async || reconcile::settle(&mark, &addresses.source, &store, &warehouse, &topics, !runs).await.map_err(failure);
    let deadline = tokio::time::Instant::now() + COVERED_WITHIN;
    // A bank that stands still brings no cut to the mark, but then all is equal at once.
    let mut report = settle().await?;
    while !report.ok && !report.covered && tokio::time::Instant::now() < deadline {
        let next = tokio::time::Instant::now() + SETTLE_EVERY;
        while !reconcile::is_covered(&mark, &warehouse).await.map_err(failure)? && tokio::time::Instant::now() < next {
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        report = settle().await?;
    }
    Ok(report)
}

/// The ten KPIs for people.
pub(super) fn table_of(kpis: &Kpis) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<42} {value:>18}");
    };
    let money = |it: Option<Money>| it.map_or_else(|| "–".to_owned(), Money::grouped);
    line("total_balance", kpis.total_balance.grouped());
    line("total_transactions", grouped(kpis.total_transactions));
    line("average_balance_per_account", money(kpis.average_balance_per_account));
    line("total_accounts", grouped(kpis.total_accounts));
    line("total_customers", grouped(kpis.total_customers));
    line("average_balance_per_account_type", money(kpis.average_balance_per_account_type));
    for it in &kpis.transaction_amount_by_type {
        line(&format!("transaction_amount_by_type {}", it.txn_type), it.amount.grouped());
    }
    for it in &kpis.average_balance_by_account_type {
        line(&format!("average_balance_by_account_type {}", it.account_type), it.average.grouped());
    }
    for it in &kpis.total_customers_balance {
        line(&format!("customer {} {}", it.customer_id, it.customer), it.balance.grouped());
    }
    for it in &kpis.transaction_amount_over_time {
        line(&format!("transaction_amount {}", it.date), it.amount.grouped());
    }
    text
}
