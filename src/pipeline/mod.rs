//! The control room: the only place that knows all rooms.
//!
//! It starts the stages in flow order and stops them in flow order, so that each drains what the former produced. It
//! supervises them by what their errors mean, publishes one snapshot ten times a second, and carries an operator's commands
//! to the stage they are for. It holds no logic of theirs.

use std::{
    collections::BTreeMap,
    num::NonZeroU32,
    sync::Arc,
    time::Duration,
};

use chrono::Utc;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    bank, cdc,
    change::Topics,
    config::Loaded,
    dag, lake,
    refresh::{self, Refresh},
    stage::{self, Phase},
};

pub mod command;
pub mod data_dir;
pub mod goal;
pub mod services;
pub mod snapshot;
pub mod socket;
pub mod summary;
pub mod supervise;
pub mod verdict;

use command::{Command, Reply, StageName};
use data_dir::DataDir;
use services::Services;
use snapshot::{Sampler, Snapshot, Sources};
use supervise::{Health, supervise};

/// Commands that wait to be carried out; whoever asks beyond that waits himself.
const COMMANDS_MAX: usize = 32;

/// How long a stage may take to end before it is cut off: everything it has acknowledged is durable anyway.
const STAGE_END_MAX: Duration = Duration::from_secs(10);

/// Which stages this invocation hosts.
#[derive(Debug, Clone, Copy)]
pub struct Parts {
    pub bank: bool,
    pub cdc: bool,
    pub lake: bool,
    pub scheduler: bool,
}

impl Parts {
    pub const ALL: Self = Self { bank: true, cdc: true, lake: true, scheduler: true };
    pub const NONE: Self = Self { bank: false, cdc: false, lake: false, scheduler: false };

    fn has(self, name: StageName) -> bool {
        match name {
            StageName::Bank => self.bank,
            StageName::Cdc => self.cdc,
            StageName::Lake => self.lake,
            StageName::Scheduler => self.scheduler,
        }
    }
}

/// What the bank does and when DAGs start by themselves.
#[derive(Debug, Clone)]
pub struct Mode {
    pub goal: bank::Goal,
    pub rate: bank::Rate,
    pub schedule: dag::Schedule,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Refresh(#[from] refresh::Error),
    #[error("could not listen for `attach` and single commands at {path}")]
    Socket {
        path: String,
        #[source]
        source: std::io::Error,
    },
}

impl crate::fault::Diagnose for Error {
    fn fault(&self) -> crate::fault::Fault {
        match self {
            Self::Refresh(error) => error.fault(),
            Self::Socket { .. } => crate::fault::Fault::Operator("make the data dir writable, or choose another with --data-dir".to_owned()),
        }
    }
}

/// A stage in the control room's hands.
struct Running {
    health: watch::Receiver<Health>,
    again: Arc<Notify>,
    stop: CancellationToken,
    life: JoinHandle<()>,
}

/// What the console and the socket ask with. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Commander(mpsc::Sender<(Command, oneshot::Sender<Reply>)>);

impl Commander {
    /// Carries a command to its stage and waits for the answer, not for the effect: that shows in a snapshot.
    pub async fn ask(&self, command: Command) -> Reply {
        let (reply, answer) = oneshot::channel();
        if self.0.send((command, reply)).await.is_err() {
            return Reply::refused("the pipeline is ending");
        }
        answer.await.unwrap_or_else(|_| Reply::refused("the pipeline is ending"))
    }
}

/// The whole pipeline while it runs.
pub struct Pipeline {
    services: Services,
    /// Held until everything has stopped: then the data dir is free for the next.
    _data_dir: DataDir,
    stages: BTreeMap<StageName, Running>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    commander: Commander,
    dags: dag::Handle,
    refresh: Option<Arc<Refresh>>,
    topics: Topics,
    /// Ends the helpers (sampler, socket, commands); stages have tokens of their own.
    helpers: CancellationToken,
    shutdown: CancellationToken,
}

impl Pipeline {
    /// Starts the stages in flow order on services that are ready.
    pub async fn start(loaded: &Loaded, data_dir: DataDir, services: Services, parts: Parts, mode: Mode) -> Result<Self, Error> {
        let config = &loaded.config;
        let addresses = services.addresses.clone();
        let topics = Topics::new(config.cdc.topic_prefix.clone());
        let helpers = CancellationToken::new();
        let wish = bank::Wish { phase: Phase::Running, rate: mode.rate, steps: 0 };
        let (bank_handle, bank_control) = stage::control(bank::Stats::default(), wish.clone(), &CancellationToken::new());
        let (cdc_handle, cdc_control) = stage::control(cdc::Stats::default(), Phase::Running, &CancellationToken::new());
        let (lake_handle, lake_control) = stage::control(lake::Stats::default(), Phase::Running, &CancellationToken::new());
        let (dag_handle, dag_control) = stage::control(dag::Stats::default(), Phase::Running, &CancellationToken::new());

        let mut stages = BTreeMap::new();
        let mut launch = |name: StageName, stop: &CancellationToken, life: Life| {
            if parts.has(name) {
                stages.insert(name, spawn_stage(name, stop, life));
            }
        };

        let (url, bank_config, external) = (addresses.source.clone(), config.bank.clone(), config.source.url != crate::config::EMBEDDED);
        let bank_allowed = config.bank.enabled && (!external || loaded.bank_enabled_explicitly);
        let goal = mode.goal;
        launch(StageName::Bank, &bank_handle.stop, lives(move |_| {
            let (url, config, control) = (url.clone(), bank_config.clone(), bank_control.clone());
            async move {
                if !bank_allowed {
                    return Ok(());
                }
                bank::run(url, config, goal, Utc::now(), control).await
            }
        }));

        let (source, state, kafka) = (addresses.source.clone(), addresses.state.clone(), addresses.kafka.clone());
        let (stream_config, cdc_config) = (config.stream.clone(), config.cdc.clone());
        launch(StageName::Cdc, &cdc_handle.stop, lives(move |_| {
            cdc::run(source.clone(), state.clone(), kafka.clone(), stream_config.clone(), cdc_config.clone(), cdc_control.clone())
        }));

        let (access, kafka, lake_config, lake_topics) = (addresses.lake.clone(), addresses.kafka.clone(), config.lake.clone(), topics.clone());
        launch(StageName::Lake, &lake_handle.stop, lives(move |_| {
            let (access, kafka, topics, config, control) = (access.clone(), kafka.clone(), lake_topics.clone(), lake_config.clone(), lake_control.clone());
            async move { lake::run(lake::Store::connect(&access).await?, kafka, topics, config, control).await }
        }));

        let (orders, requests) = dag::orders();
        let dags = dag::Handle::new(orders, dag_handle.stats.clone());
        let mut refresh = None;
        let mut refresh_stats = watch::channel(refresh::Stats::default()).1;
        if parts.scheduler {
            let room = Arc::new(Refresh::new(refresh::Rooms {
                lake: addresses.lake.clone(),
                topics: topics.clone(),
                source: addresses.source.clone(),
                state: addresses.state.clone(),
                warehouse: addresses.warehouse.clone(),
                python: addresses.python.clone(),
                dbt: config.dbt.clone(),
                dbt_project: loaded.dbt_project_dir(),
                dbt_work: data_dir.join("dbt"),
                mail: config.mail.clone(),
                mail_folder: data_dir.join("mail"),
                mail_password: loaded.secrets.mail_password.clone(),
            })?);
            refresh_stats = room.stats();
            let (plans, deal) = room.plans(&config.dag, mode.schedule)?;
            let requests = Arc::new(tokio::sync::Mutex::new(requests));
            let state = addresses.state.clone();
            launch(StageName::Scheduler, &dag_handle.stop, lives(move |_| {
                dag::run(plans.clone(), deal.clone(), state.clone(), Arc::clone(&requests), dag_control.clone())
            }));
            refresh = Some(room);
        }

        let sources = Sources {
            profile: config.profile.clone(),
            seed: config.bank.seed,
            health: stages.iter().map(|(name, stage)| (*name, stage.health.clone())).collect(),
            wanted: BTreeMap::new(),
            wish: bank_handle.wanted.subscribe(),
            bank: bank_handle.stats.clone(),
            cdc: cdc_handle.stats.clone(),
            lake: lake_handle.stats.clone(),
            dag: dag_handle.stats.clone(),
            refresh: refresh_stats,
            services: services.health(),
        };
        todo!("{sources:?}")
    }
}
