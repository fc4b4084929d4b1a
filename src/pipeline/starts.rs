//! How each stage is begun, as often as it must be: what it is given of configuration and addresses.

use std::{future::Future, pin::Pin, sync::Arc};

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

pub(super) fn bank(loaded: &Loaded, services: &Services, goal: bank::Goal, control: stage::Control<bank::Stats, bank::Wish>) -> Start {
    let (url, config) = (services.addresses.source.clone(), loaded.config.bank.clone());
    let ground = ground(loaded);
    Box::new(move || {
        let (url, config, control) = (url.clone(), config.clone(), control.clone());
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
            Ok(bank::run(url, config, goal, Utc::now(), control).await?)
        })
    })
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
    let (stream, config) = (loaded.config.stream.clone(), loaded.config.cdc.clone());
    // The tables to capture must be there before the publication is made; in our own database we know who makes them.
    let ours = loaded.config.source.url == EMBEDDED && loaded.config.bank.enabled;
    Box::new(move || {
        let (source, state, kafka) = (addresses.source.clone(), addresses.state.clone(), addresses.kafka.clone());
        let (stream, config, control) = (stream.clone(), config.clone(), control.clone());
        Box::pin(async move {
            if ours {
                bank::prepare(&source, bank::Ground::Ours).await?;
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
    let (deal, mut stats) = refresh::deal(rooms, &hands.dag).map_err(dag::Error::from)?;
    let refreshed = hands.refreshed.clone();
    let copying = tokio::spawn(async move {
        while stats.changed().await.is_ok() {
            refreshed.send_replace(stats.borrow_and_update().clone());
        }
    });
    let outcome = dag::run(deal, dag::History::new(&addresses.state), requests, control).await;
    worker.stop().await;
    copying.abort();
    Ok(outcome?)
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
        Box::pin(async move { Ok(notify::run(outbox, carrier, control).await?) })
    })
}

fn mail_config(loaded: &Loaded) -> notify::Config {
    notify::Config { password: loaded.secrets.mail_password.clone(), ..loaded.config.mail.clone() }
}
