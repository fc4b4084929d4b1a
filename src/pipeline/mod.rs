//! The control room: the only place that knows all rooms.
//!
//! It starts the stages in flow order and stops them in flow order, so that each drains what the former produced. It
//! supervises them by what their errors mean, publishes one snapshot ten times a second, and carries an operator's commands
//! to the stage they are for. It holds no logic of theirs.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

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
    dag,
    exit::{Exit, Failure},
    fault::chain,
    lake, notify, refresh,
    stage::{self, Phase},
};

pub mod command;
pub mod data_dir;
pub mod goal;
mod look;
mod obey;
pub mod reach;
pub mod services;
pub mod snapshot;
pub mod socket;
mod starts;
pub mod summary;
pub mod supervise;
pub mod verdict;

use command::{Command, Reply, StageName};
use data_dir::{DataDir, LOG};
use look::Eyes;
use obey::obey;
use services::Services;
use snapshot::{Sampler, Snapshot, Sources};
use starts::{Ends, Start};
use supervise::{Delays, Health, supervise};

/// Commands that wait to be carried out; whoever asks beyond that waits himself.
const COMMANDS_MAX: usize = 32;

/// Stats travel from a task to the sampler within this time; it is far longer than a wake-up takes.
const FRESH_AFTER: chrono::TimeDelta = chrono::TimeDelta::milliseconds(50);

/// How long a stage may take to end before it is cut off: everything it has acknowledged is durable anyway.
const STAGE_END_MAX: Duration = Duration::from_secs(10);

/// Which stages this invocation hosts.
#[derive(Debug, Clone, Copy)]
pub struct Parts {
    pub bank: bool,
    pub cdc: bool,
    pub lake: bool,
    /// The DAGs, and the letters they write.
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
            StageName::Scheduler | StageName::Mail => self.scheduler,
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
    /// Asks a pipeline in another process. Orders keep their order; a look has a line of its own and holds up nobody.
    pub fn remote(mut client: socket::Client, path: PathBuf) -> Self {
        let (asks, mut asked) = mpsc::channel::<(Command, oneshot::Sender<Reply>)>(COMMANDS_MAX);
        tokio::spawn(async move {
            let away = |error: std::io::Error| Reply::refused(format!("the pipeline does not answer: {error}"));
            while let Some((command, reply)) = asked.recv().await {
                if matches!(command, Command::Look { .. }) {
                    let path = path.clone();
                    tokio::spawn(async move {
                        let answer = match socket::Client::connect(&path).await {
                            Some(mut looking) => looking.ask(command).await.unwrap_or_else(away),
                            None => Reply::refused("the pipeline has ended"),
                        };
                        let _ = reply.send(answer);
                    });
                    continue;
                }
                // Whoever asked may have left.
                let _ = reply.send(client.ask(command).await.unwrap_or_else(away));
            }
        });
        Self(asks)
    }

    /// A commander and the end at which its commands arrive.
    #[cfg(test)]
    pub(crate) fn pair() -> (Self, mpsc::Receiver<(Command, oneshot::Sender<Reply>)>) {
        let (asks, asked) = mpsc::channel(COMMANDS_MAX);
        (Self(asks), asked)
    }

    /// Hands a command in, at once and in the order of the calls; the answer comes later. Never waits.
    pub fn post(&self, command: Command) -> oneshot::Receiver<Reply> {
        let (reply, answer) = oneshot::channel();
        if let Err(refused) = self.0.try_send((command, reply)) {
            let (why, (_, reply)) = match refused {
                mpsc::error::TrySendError::Full(asked) => ("too many commands wait already; ask again in a moment", asked),
                mpsc::error::TrySendError::Closed(asked) => ("the pipeline is ending", asked),
            };
            let _ = reply.send(Reply::refused(why));
        }
        answer
    }

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
    wishes: Wishes,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    commander: Commander,
    topics: Topics,
    /// Whether the bank stands still and everything it wrote has landed.
    drained: watch::Sender<bool>,
    /// How far the end has come, once the bank is done.
    ending: watch::Sender<Option<verdict::Ending>>,
    /// Ends the helpers (sampler, socket, commands); stages have tokens of their own.
    helpers: CancellationToken,
    /// Cancelled when an operator asks the pipeline to end.
    shutdown: CancellationToken,
}

/// Where an operator's wishes go.
#[derive(Clone)]
struct Wishes {
    bank: watch::Sender<bank::Wish>,
    cdc: watch::Sender<Phase>,
    lake: watch::Sender<Phase>,
    scheduler: watch::Sender<Phase>,
    /// Replaced when the engine is started again.
    dags: watch::Receiver<dag::Handle>,
}

impl Pipeline {
    /// Starts the stages in flow order on services that are ready.
    pub async fn start(loaded: &Loaded, data_dir: DataDir, mut services: Services, parts: Parts, mode: Mode) -> Result<Self, Error> {
        let topics = Topics::new(loaded.config.cdc.topic_prefix.clone());
        let (helpers, shutdown) = (CancellationToken::new(), CancellationToken::new());

        let apart = CancellationToken::new();
        let (bank, bank_control) = stage::control(bank::Stats::default(), bank::Wish { rate: mode.rate, ..bank::Wish::default() }, &apart);
        let (cdc, cdc_control) = stage::control(cdc::Stats::default(), Phase::Running, &apart);
        let (lake, lake_control) = stage::control(lake::Stats::default(), Phase::Running, &apart);
        let (scheduler, scheduler_control) = stage::control(dag::Stats::default(), Phase::Running, &apart);
        let (mail, mail_control) = stage::control(notify::Stats::default(), Phase::Running, &apart);
        let (refreshed, refresh) = watch::channel(refresh::Stats::default());
        let (drained, ending) = (watch::Sender::new(false), watch::Sender::new(None));
        let (dags_in, dags) = watch::channel(dag::Handle::new(dag::orders().0, scheduler.stats.clone()));

        let mut stages = BTreeMap::new();
        let mut launch = |name: StageName, stop: &CancellationToken, start: Start| {
            if parts.has(name) {
                stages.insert(name, Running::launch(name, stop.clone(), start));
            }
        };
        launch(StageName::Bank, &bank.stop, starts::bank(loaded, &services, mode.goal, parts.cdc.then(|| cdc.stats.clone()), bank_control));
        launch(StageName::Cdc, &cdc.stop, starts::cdc(loaded, &services, cdc_control));
        launch(StageName::Lake, &lake.stop, starts::lake(loaded, &services, &topics, lake_control));
        launch(
            StageName::Scheduler,
            &scheduler.stop,
            starts::scheduler(loaded, &data_dir, &services, mode.schedule, Ends { dags: dags_in, refreshed, drained: drained.subscribe() }, scheduler_control),
        );
        launch(StageName::Mail, &mail.stop, starts::mail(loaded, &data_dir, &services, mail_control));

        let sources = Sources {
            profile: loaded.config.profile.clone(),
            seed: loaded.config.bank.seed,
            health: stages.iter().map(|(name, stage): (&StageName, &Running)| (*name, stage.health.clone())).collect(),
            wanted: BTreeMap::from([
                (StageName::Cdc, cdc.wanted.subscribe()),
                (StageName::Lake, lake.wanted.subscribe()),
                (StageName::Scheduler, scheduler.wanted.subscribe()),
            ]),
            wish: bank.wanted.subscribe(),
            bank: bank.stats.clone(),
            cdc: cdc.stats.clone(),
            lake: lake.stats.clone(),
            dag: scheduler.stats.clone(),
            refresh,
            mail: mail.stats.clone(),
            ending: ending.subscribe(),
            services: services.health(),
        };
        let mut sampler = Sampler::new(sources, Utc::now());
        let (snapshots_in, snapshots) = watch::channel(Arc::new(sampler.sample(Utc::now(), std::time::Instant::now())));
        tokio::spawn(sampler.run(snapshots_in, helpers.clone()));
        services.hold_retention(lake.stats.clone());

        let wishes = Wishes { bank: bank.wanted, cdc: cdc.wanted, lake: lake.wanted, scheduler: scheduler.wanted, dags };
        let (asks, asked) = mpsc::channel(COMMANDS_MAX);
        let commander = Commander(asks);
        let again = stages.iter().map(|(name, stage)| (*name, Arc::clone(&stage.again))).collect();
        let eyes = Eyes::new(&services.addresses, &topics, &data_dir.join(LOG), helpers.clone());
        tokio::spawn(obey(wishes.clone(), again, snapshots.clone(), asked, shutdown.clone(), eyes));

        let path = data_dir::socket_path(&loaded.data_dir());
        let listening = socket::serve(&path, commander.clone(), snapshots.clone(), services.printed(), helpers.clone());
        let pipeline = Self { services, _data_dir: data_dir, stages, wishes, snapshots, commander, topics, drained, ending, helpers, shutdown };
        if let Err(source) = listening {
            pipeline.stop().await;
            return Err(Error::Socket { path: path.display().to_string(), source });
        }
        Ok(pipeline)
    }

    pub fn snapshots(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.clone()
    }

    pub fn commander(&self) -> Commander {
        self.commander.clone()
    }

    pub fn services(&self) -> &Services {
        &self.services
    }

    /// A snapshot that was sampled after this was asked for: what has just happened is in it.
    pub async fn fresh_snapshot(&self) -> Arc<Snapshot> {
        let asked_at = Utc::now() + FRESH_AFTER;
        let mut snapshots = self.snapshots.clone();
        let fresh = snapshots.wait_for(|it| it.at > asked_at).await.map(|it| Arc::clone(&it));
        // The sampler lives as long as the pipeline.
        fresh.unwrap_or_else(|_| Arc::clone(&self.snapshots.borrow()))
    }

    /// Waits until the scheduler has taken its DAGs over from the run history: from then on it knows its runs.
    pub async fn scheduled(&self) -> Result<(), Failure> {
        let mut snapshots = self.snapshots.clone();
        tokio::select! {
            // The sampler lives as long as the pipeline.
            _ = snapshots.wait_for(|it| it.dag.away.is_none() && !it.dag.dags.is_empty()) => Ok(()),
            failure = self.first_failure() => Err(failure),
        }
    }

    /// Waits until a run is over, and those it triggered.
    pub async fn finished(&self, run: &dag::RunRef) -> Result<Vec<Arc<dag::RunStats>>, Failure> {
        let dags = self.dags();
        tokio::select! {
            over = dags.finished(run) => over.map_err(|gone| Failure::new(Exit::Bug, gone.to_string())),
            failure = self.first_failure() => Err(failure),
        }
    }

    /// Runs that ended in or after the start of this invocation, oldest first; from the history, which keeps more than a screen.
    pub async fn runs_of_this_invocation(&self) -> Vec<dag::Run> {
        let since = self.snapshots.borrow().started_at;
        let history = dag::History::new(&self.services.addresses.state);
        let mut runs = Vec::new();
        for dag_id in refresh::DAG_IDS {
            match history.runs(dag_id, u32::MAX >> 1).await {
                Ok(found) => runs.extend(found.into_iter().rev().filter(|run| run.finished_at.is_none_or(|at| at >= since))),
                Err(error) => warn!(error = %chain(&error), dag_id, "its runs are missing from the summary"),
            }
        }
        runs
    }

    /// Letters recorded since the start of this invocation.
    pub async fn mails_of_this_invocation(&self) -> Vec<summary::Mail> {
        let since = self.snapshots.borrow().started_at;
        let mails = notify::Outbox::new(&self.services.addresses.state, &notify::Config::default()).since(since).await;
        mails
            .unwrap_or_else(|error| {
                warn!(error = %chain(&error), "the letters are missing from the summary");
                Vec::new()
            })
            .iter()
            .map(summary::Mail::from)
            .collect()
    }

    /// No scheduled runs from here on; those in progress go on.
    async fn hold_schedule(&self) {
        self.wishes.scheduler.send_replace(Phase::Paused);
        let mut stats = self.snapshots();
        // The engine answers within a pulse; without one there is no schedule to hold.
        let held = stats.wait_for(|it| it.dag.phase == Phase::Paused);
        if tokio::time::timeout(STAGE_END_MAX, held).await.is_err() {
            warn!("the scheduler did not pause in time");
        }
    }

    /// Fires when an operator asked the pipeline to end.
    pub async fn shutdown_asked(&self) {
        self.shutdown.cancelled().await;
    }

    fn dags(&self) -> dag::Handle {
        self.wishes.dags.borrow().clone()
    }

    /// Ends one stage and waits for it, at most [`STAGE_END_MAX`].
    async fn stop_stage(&self, name: StageName) {
        let Some(stage) = self.stages.get(&name) else { return };
        stage.stop.cancel();
        let mut health = stage.health.clone();
        let ended = health.wait_for(|it| *it == Health::Ended);
        if tokio::time::timeout(STAGE_END_MAX, ended).await.is_err() {
            warn!(stage = %name, "did not end in time and was cut off; what it had acknowledged is durable");
            stage.life.abort();
        }
    }

    /// Stops the stages in flow order, then the services. Afterwards nothing is left running and the data dir is free.
    pub async fn stop(mut self) {
        for name in StageName::ALL {
            self.stop_stage(name).await;
        }
        self.helpers.cancel();
        self.services.stop().await;
        info!("stopped");
    }
}

impl Running {
    fn launch(name: StageName, stop: CancellationToken, start: Start) -> Self {
        let (health_in, health) = watch::channel(Health::Working);
        let again = Arc::new(Notify::new());
        let (asked, stopped) = (Arc::clone(&again), stop.clone());
        let life = tokio::spawn(async move { supervise(name, start, health_in, &asked, stopped, Delays::default()).await });
        Self { health, again, stop, life }
    }
}
