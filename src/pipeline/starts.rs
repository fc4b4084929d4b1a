//! How each stage is begun, as often as it must be: what it is given of configuration and addresses.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use chrono::Utc;
use tokio::sync::{mpsc, watch};

use crate::{
    bank, cdc,
    change::Topics,
    config::{EMBEDDED, Loaded},
    dag, dbt, lake, notify, refresh,
    secret::Secret,
    stage,
    warehouse::{self, SnapshotEnds, Warehouse},
};

use super::{
    data_dir::DataDir,
    services::{self, Services},
    supervise,
};

/// How a stage is begun, as often as it must be.
pub(super) type Start = Box<dyn FnMut() -> Life + Send>;
type Life = Pin<Box<dyn Future<Output = Result<(), supervise::Failed>> + Send>>;

/// `capture`: of the same process, if it hosts one. A new bank opens its doors when the capture's slot is there, so all it does is
/// a change; otherwise it would depend on the moment which rows are read as a state.
pub(super) fn bank(
    loaded: &Loaded,
    services: &Services,
    goal: bank::Goal,
    capture: Option<watch::Receiver<cdc::Stats>>,
    control: stage::Control<bank::Stats, bank::Wish>,
) -> Start {
    let (url, config, captured) = (services.addresses.source.clone(), loaded.config.bank.clone(), loaded.config.cdc.clone());
    let ground = ground(loaded);
    Box::new(move || {
        let (url, config, control) = (url.clone(), config.clone(), control.clone());
        let (captured, capture) = (captured.clone(), capture.clone());
        // What was posted before a failure counts towards the goal.
        let goal = match goal {
            bank::Goal::Transactions(wished) => bank::Goal::Transactions(wished.saturating_sub(control.stats.borrow().transactions)),
            bank::Goal::Forever => bank::Goal::Forever,
        };
        Box::pin(async move {
            if !config.enabled {
                return Ok(());
            }
            bank::prepare(&url, ground).await?;
            if let Some(capture) = capture
                && !cdc::has_slot(&url, &captured).await?
            {
                tokio::select! {
                    () = control.stop.cancelled() => return Ok(()),
                    () = slot_is_made(capture, &control) => {}
                }
            }
            Ok(bank::run(url, config, goal, Utc::now(), control).await?)
        })
    })
}

async fn slot_is_made(mut capture: watch::Receiver<cdc::Stats>, control: &stage::Control<bank::Stats, bank::Wish>) {
    let made = |it: &cdc::Stats| it.step == cdc::Step::Streaming || (it.step == cdc::Step::Snapshot && it.waiting_for.is_none());
    // Who waits goes on reporting, or would be taken for dead.
    let mut pulse = tokio::time::interval(Duration::from_millis(500));
    loop {
        tokio::select! {
            _ = capture.wait_for(made) => break,
            _ = pulse.tick() => control.stats.send_modify(|it| it.waiting = Some("for the capture's replication slot".to_owned())),
        }
    }
    control.stats.send_modify(|it| it.waiting = None);
}

fn ground(loaded: &Loaded) -> bank::Ground {
    match (loaded.config.source.url == EMBEDDED, loaded.bank_enabled_explicitly) {
        (true, _) => bank::Ground::Ours,
        (false, true) => bank::Ground::Permitted,
        (false, false) => bank::Ground::Foreign,
    }
}

pub(super) fn cdc(loaded: &Loaded, services: &Services, control: stage::Control<cdc::Stats>) -> Start {
    let addresses = services.addresses.clone();
    let (stream, config) = (loaded.config.stream.clone(), loaded.cdc());
    // The tables to capture must be there before the publication is made; where the bank runs we know who makes them.
    let ground = loaded.config.bank.enabled.then(|| ground(loaded)).filter(|it| *it != bank::Ground::Foreign);
    Box::new(move || {
        let (source, state, kafka) = (addresses.source.clone(), addresses.state.clone(), addresses.kafka.clone());
        let (stream, config, control) = (stream.clone(), config.clone(), control.clone());
        Box::pin(async move {
            match ground {
                Some(bank::Ground::Ours) => bank::prepare(&source, bank::Ground::Ours).await?,
                // The user of the capture need not be one who may make tables; where they are missing, the capture says so.
                Some(ground) => drop(bank::prepare(&source, ground).await),
                None => {}
            }
            Ok(cdc::run(source, state, kafka, stream, config, control).await?)
        })
    })
}

pub(super) fn lake(loaded: &Loaded, services: &Services, topics: &Topics, control: stage::Control<lake::Stats>) -> Start {
    let (access, kafka) = (services.addresses.lake.clone(), services.addresses.kafka.clone());
    let (config, topics) = (loaded.config.lake.clone(), topics.clone());
    Box::new(move || {
        let (access, kafka, topics, config, control) = (access.clone(), kafka.clone(), topics.clone(), config.clone(), control.clone());
        Box::pin(async move {
            let store = lake::Store::connect(&access).await?;
            Ok(lake::run(store, kafka, topics, config, control).await?)
        })
    })
}

/// Where the scheduler's ends are held by the control room, across restarts of the stage.
pub(super) struct Ends {
    pub(super) dags: watch::Sender<dag::Handle>,
    pub(super) refreshed: watch::Sender<refresh::Stats>,
    pub(super) drained: watch::Receiver<bool>,
}

pub(super) fn scheduler(
    loaded: &Loaded,
    data_dir: &DataDir,
    services: &Services,
    schedule: dag::Schedule,
    ends: Ends,
    control: stage::Control<dag::Stats>,
) -> Start {
    let hands = Arc::new(Hands {
        addresses: services.addresses.clone(),
        topics: Topics::new(loaded.config.cdc.topic_prefix.clone()),
        dag: dag::Config { schedule, ..loaded.config.dag.clone() },
        dbt: dbt::Config { project_dir: loaded.dbt_project_dir(), ..loaded.config.dbt.clone() },
        dbt_work: data_dir.join("dbt"),
        mail: mail_config(loaded),
        snapshot: loaded.config.cdc.snapshot,
        refreshed: ends.refreshed,
        drained: ends.drained,
    });
    Box::new(move || {
        let (orders, requests) = dag::orders();
        ends.dags.send_replace(dag::Handle::new(orders, control.stats.subscribe()));
        Box::pin(schedule_runs(Arc::clone(&hands), requests, control.clone()))
    })
}

/// What the scheduler needs to connect its rooms, as often as it is started.
struct Hands {
    addresses: services::Addresses,
    topics: Topics,
    dag: dag::Config,
    dbt: dbt::Config,
    dbt_work: std::path::PathBuf,
    mail: notify::Config,
    snapshot: cdc::SnapshotMode,
    refreshed: watch::Sender<refresh::Stats>,
    drained: watch::Receiver<bool>,
}

async fn schedule_runs(hands: Arc<Hands>, requests: mpsc::Receiver<dag::Request>, control: stage::Control<dag::Stats>) -> Result<(), supervise::Failed> {
    let addresses = &hands.addresses;
    let python = addresses.python.as_deref().expect("whoever hosts the scheduler needs dbt, so its environment is there");
    let worker = dbt::Worker::start(python, &hands.dbt, dbt_target(&addresses.warehouse)?, &hands.dbt_work).await?;
    let (state, prefix) = (addresses.state.clone(), hands.topics.prefix().to_owned());
    let rooms = refresh::Rooms {
        store: lake::Store::connect(&addresses.lake).await?,
        warehouse: Warehouse::connect(&addresses.warehouse).await?,
        topics: hands.topics.clone(),
        dbt: worker.clone(),
        outbox: notify::Outbox::new(&addresses.state, &hands.mail),
        source: addresses.source.clone(),
        snapshot: hands.snapshot.as_str().to_owned(),
        snapshot_ends: Arc::new(move || Box::pin(snapshot_ends(state.clone(), prefix.clone()))),
        drained: hands.drained.clone(),
    };
    let recalling = tokio::spawn(recall(rooms.warehouse.clone(), dag::History::new(&addresses.state), hands.refreshed.clone()));
    let (deal, mut stats) = refresh::deal(rooms, &hands.dag).map_err(dag::Error::from)?;
    let refreshed = hands.refreshed.clone();
    let copying = tokio::spawn(async move {
        while stats.changed().await.is_ok() {
            let now = stats.borrow_and_update().clone();
            refreshed.send_modify(|it| *it = refresh::Stats { earlier: it.earlier.take(), ..now });
        }
    });
    let outcome = dag::run(deal, dag::History::new(&addresses.state), requests, control).await;
    worker.stop().await;
    copying.abort();
    recalling.abort();
    Ok(outcome?)
}

/// What earlier processes left is told once, as soon as it is read.
async fn recall(warehouse: Warehouse, history: dag::History, refreshed: watch::Sender<refresh::Stats>) {
    let earlier = refresh::recall(&warehouse, &history).await;
    refreshed.send_modify(|it| it.earlier = Some(earlier));
}

/// Where dbt finds the warehouse that we load.
fn dbt_target(warehouse: &warehouse::Access) -> Result<dbt::Target, supervise::Failed> {
    #[cfg(feature = "snowflake")]
    if warehouse::is_snowflake(warehouse.url.reveal()) {
        let settings = warehouse::snowflake::Settings::new(warehouse).map_err(warehouse::Error::from)?;
        let host = settings.endpoint().clone();
        return Ok(dbt::Target::Snowflake(dbt::Account {
            host: host.host_str().unwrap_or_default().to_owned(),
            port: host.port_or_known_default().unwrap_or(443),
            protocol: host.scheme().to_owned(),
            account: settings.account,
            user: settings.user,
            private_key: settings.private_key,
            database: settings.database,
            role: settings.role,
            warehouse: settings.warehouse,
        }));
    }
    Ok(dbt::Target::from_url(&warehouse.url)?)
}

async fn snapshot_ends(state: Secret, topic_prefix: String) -> Result<Option<SnapshotEnds>, dag::TaskError> {
    let ends = cdc::snapshot_ends(&state, &topic_prefix).await.map_err(|error| dag::TaskError::from(&error))?;
    let lanes = |ends: Vec<cdc::LaneEnd>| ends.into_iter().map(|lane| (lane.topic, lane.partition, lane.end_offset)).collect();
    Ok(ends.map(|it| SnapshotEnds { lsn: Some(it.lsn), lanes: lanes(it.ends) }))
}

pub(super) fn mail(loaded: &Loaded, data_dir: &DataDir, services: &Services, control: stage::Control<notify::Stats>) -> Start {
    let (config, folder, state) = (mail_config(loaded), data_dir.join("mail"), services.addresses.state.clone());
    Box::new(move || {
        let outbox = notify::Outbox::new(&state, &config);
        let (carrier, control) = (notify::Carrier::new(&config, &folder), control.clone());
        Box::pin(async move { Ok(notify::run(outbox, carrier?, control).await?) })
    })
}

fn mail_config(loaded: &Loaded) -> notify::Config {
    let mut config = notify::Config { password: loaded.secrets.mail_password.clone(), ..loaded.config.mail.clone() };
    // Empty stays empty: the system's authorities alone.
    if !config.ca_file.as_os_str().is_empty() {
        config.ca_file = loaded.base.join(&config.ca_file);
    }
    config
}
