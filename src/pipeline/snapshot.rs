//! What an operator may see: one plain value, published ten times a second, that every front end draws from.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{bank, cdc, dag, embedded, lake, notify, refresh, stage::Phase, warehouse::Cut};

use super::{
    command::StageName,
    supervise::Health,
    verdict::{Ending, Verdict, verdict},
};

/// How often the stages' stats become a snapshot.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);

/// Rates are kept for a minute, one value a second.
pub const HISTORY_SECONDS: usize = 60;

/// Money that has not moved for this long stands still; what comes then is a new flow.
const FLOW_BREAK: TimeDelta = TimeDelta::seconds(10);

/// Everything a front end knows about the pipeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    pub at: DateTime<Utc>,
    pub started_at: DateTime<Utc>,
    pub profile: String,
    pub seed: u64,
    pub pid: u32,
    pub stages: BTreeMap<StageName, StageView>,
    /// Embedded services; empty where nothing is embedded.
    pub services: BTreeMap<String, embedded::Health>,
    /// What the operator wishes of the bank; what it does is in its stats.
    pub wish: bank::Wish,
    pub bank: bank::Stats,
    pub cdc: cdc::Stats,
    pub lake: lake::Stats,
    pub dag: dag::Stats,
    pub refresh: refresh::Stats,
    pub mail: notify::Stats,
    /// Throughput per topic, by its name in the lake.
    pub flow: BTreeMap<String, Flow>,
    /// Since when messages flow without a break; None while they do not.
    pub flowing_since: Option<DateTime<Utc>>,
    /// How far an invocation with a goal has come that is ending; None while the bank works.
    #[serde(default)]
    pub ending: Option<Ending>,
    /// Resident memory of this process in bytes, now and at its peak.
    pub rss_bytes: u64,
    pub rss_peak_bytes: u64,
    pub verdict: Verdict,
}

/// One stage, as the control room sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageView {
    pub health: Health,
    /// What the operator wishes; the stage's own stats say what it does.
    pub wanted: Phase,
    pub phase: Phase,
    /// Since when wish and phase are as they are.
    pub since: DateTime<Utc>,
    /// When the stage last reported.
    pub reported_at: DateTime<Utc>,
}

impl StageView {
    /// A stage that holds still has nothing to report; that is not silence.
    pub fn is_stale(&self, name: StageName, now: DateTime<Utc>) -> bool {
        self.health == Health::Working
            && self.phase == Phase::Running
            && now.signed_duration_since(self.reported_at).to_std().is_ok_and(|silent| silent > name.silence_max())
    }
}

/// Messages through one topic.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    pub total: u64,
    /// Over the last second.
    pub per_second: u64,
    /// Messages in each of the last seconds, oldest first, at most [`HISTORY_SECONDS`].
    pub history: VecDeque<u64>,
    /// Messages in the topic that the lake has not landed yet.
    pub lag: u64,
}

impl Snapshot {
    pub fn stage(&self, name: StageName) -> Option<&StageView> {
        self.stages.get(&name)
    }

    /// What the KPIs on show are as of.
    pub fn cut(&self) -> Option<Cut> {
        self.refresh.kpis.as_ref()?.reading.cut
    }

    /// Messages a second over all topics.
    pub fn messages_per_second(&self) -> u64 {
        self.flow.values().map(|it| it.per_second).sum()
    }
}

/// The reading ends that the sampler copies from.
pub(super) struct Sources {
    pub profile: String,
    pub seed: u64,
    pub health: BTreeMap<StageName, watch::Receiver<Health>>,
    pub wanted: BTreeMap<StageName, watch::Receiver<Phase>>,
    pub wish: watch::Receiver<bank::Wish>,
    pub bank: watch::Receiver<bank::Stats>,
    pub cdc: watch::Receiver<cdc::Stats>,
    pub lake: watch::Receiver<lake::Stats>,
    pub dag: watch::Receiver<dag::Stats>,
    pub refresh: watch::Receiver<refresh::Stats>,
    pub mail: watch::Receiver<notify::Stats>,
    pub ending: watch::Receiver<Option<Ending>>,
    pub services: Vec<(&'static str, watch::Receiver<embedded::Health>)>,
}

/// Turns stats into snapshots until `stop`.
pub(super) struct Sampler {
    sources: Sources,
    started_at: DateTime<Utc>,
    reported_at: BTreeMap<StageName, DateTime<Utc>>,
    /// Wish and phase of each stage, and since when.
    held: BTreeMap<StageName, (Phase, Phase, DateTime<Utc>)>,
    flow: BTreeMap<String, Flow>,
    /// When the flow began, and when a message last came.
    flowing: Option<(DateTime<Utc>, DateTime<Utc>)>,
    /// When the current second of the flow began, and each topic's total then.
    second: (Instant, BTreeMap<String, u64>),
}

impl Sampler {
    pub(super) fn new(sources: Sources, now: DateTime<Utc>) -> Self {
        let reported_at = StageName::ALL.into_iter().map(|name| (name, now)).collect();
        Self { sources, started_at: now, reported_at, held: BTreeMap::new(), flow: BTreeMap::new(), flowing: None, second: (Instant::now(), BTreeMap::new()) }
    }

    pub(super) async fn run(mut self, sender: watch::Sender<Arc<Snapshot>>, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(SAMPLE_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = ticks.tick() => {}
            }
            sender.send_replace(Arc::new(self.sample(Utc::now(), Instant::now())));
        }
    }

    pub(super) fn sample(&mut self, now: DateTime<Utc>, instant: Instant) -> Snapshot {
        self.note_reports(now);
        self.measure_flow(instant);
        self.note_flow(now);
        let sources = &self.sources;
        let (bank, cdc, lake) = (sources.bank.borrow().clone(), sources.cdc.borrow().clone(), sources.lake.borrow().clone());
        let phases = BTreeMap::from([(StageName::Bank, bank.phase), (StageName::Cdc, cdc.phase), (StageName::Lake, lake.phase)]);
        let held = &mut self.held;
        let stages = StageName::ALL
            .into_iter()
            .map(|name| {
                let wished = || if name == StageName::Bank { sources.wish.borrow().phase } else { Phase::Running };
                let wanted = sources.wanted.get(&name).map_or_else(wished, |it| *it.borrow());
                let phase = phases.get(&name).copied().unwrap_or(wanted);
                let stands = held.entry(name).or_insert((wanted, phase, now));
                if (stands.0, stands.1) != (wanted, phase) {
                    *stands = (wanted, phase, now);
                }
                let view = StageView {
                    health: sources.health.get(&name).map_or(Health::Off, |it| it.borrow().clone()),
                    wanted,
                    phase,
                    since: stands.2,
                    reported_at: self.reported_at.get(&name).copied().unwrap_or(now),
                };
                (name, view)
            })
            .collect();
        let (rss_bytes, rss_peak_bytes) = resident_memory();
        let mut snapshot = Snapshot {
            at: now,
            started_at: self.started_at,
            profile: sources.profile.clone(),
            seed: sources.seed,
            pid: std::process::id(),
            stages,
            services: sources.services.iter().map(|(name, health)| ((*name).to_owned(), health.borrow().clone())).collect(),
            wish: *sources.wish.borrow(),
            bank,
            cdc,
            lake,
            dag: sources.dag.borrow().clone(),
            refresh: sources.refresh.borrow().clone(),
            mail: sources.mail.borrow().clone(),
            flow: self.flow.clone(),
            flowing_since: self.flowing.map(|it| it.0),
            ending: *sources.ending.borrow(),
            rss_bytes,
            rss_peak_bytes,
            verdict: Verdict::default(),
        };
        snapshot.verdict = verdict(&snapshot);
        snapshot
    }

    /// A stage reports by touching its stats; how long ago that was tells whether it still turns.
    fn note_reports(&mut self, now: DateTime<Utc>) {
        let sources = &mut self.sources;
        let changed = [
            (StageName::Bank, seen(&mut sources.bank)),
            (StageName::Cdc, seen(&mut sources.cdc)),
            (StageName::Lake, seen(&mut sources.lake)),
            (StageName::Scheduler, seen(&mut sources.dag)),
            (StageName::Mail, seen(&mut sources.mail)),
        ];
        for (name, _) in changed.into_iter().filter(|(_, changed)| *changed) {
            self.reported_at.insert(name, now);
        }
    }

    fn measure_flow(&mut self, now: Instant) {
        let totals = totals(&self.sources.lake.borrow());
        let (began, before) = &self.second;
        let elapsed = now.duration_since(*began);
        let second_over = elapsed >= Duration::from_secs(1);
        for (name, total) in &totals {
            let flow = self.flow.entry(name.clone()).or_default();
            flow.total = total.produced;
            flow.lag = total.lag;
            if second_over {
                // A topic seen for the first time has no second behind it: what lies in it is history, not flow.
                let came = before.get(name).map_or(0, |it| total.produced.saturating_sub(*it));
                flow.per_second = u64::try_from(u128::from(came) * 1000 / elapsed.as_millis().max(1)).unwrap_or(u64::MAX);
                flow.history.push_back(flow.per_second);
                while flow.history.len() > HISTORY_SECONDS {
                    flow.history.pop_front();
                }
            }
        }
        if second_over {
            self.second = (now, totals.into_iter().map(|(name, total)| (name, total.produced)).collect());
        }
    }
}

impl Sampler {
    /// A second without a message is a pause between two; only a longer one ends the flow.
    fn note_flow(&mut self, now: DateTime<Utc>) {
        let flows = self.flow.values().any(|it| it.per_second > 0);
        self.flowing = match (self.flowing, flows) {
            (Some((since, last)), true) if now - last < FLOW_BREAK => Some((since, now)),
            (_, true) => Some((now, now)),
            (Some((since, last)), false) if now - last < FLOW_BREAK => Some((since, last)),
            (_, false) => None,
        };
    }
}

/// One topic over all its partitions, as the broker and the lake last saw it.
#[derive(Debug, Clone, Copy, Default)]
struct Total {
    produced: u64,
    lag: u64,
}

fn totals(lake: &lake::Stats) -> BTreeMap<String, Total> {
    let mut totals: BTreeMap<String, Total> = BTreeMap::new();
    // A topic counts once all its ends have been seen: what lay in it before would look like a flood.
    let known = |table: &str| lake.lanes.iter().filter(|it| it.table == table).all(|it| it.end_offset.is_some());
    for lane in lake.lanes.iter().filter(|it| known(&it.table)) {
        let total = totals.entry(lane.table.clone()).or_default();
        let end = lane.end_offset.max(lane.landed_offset).unwrap_or_default();
        total.produced += u64::try_from(end).unwrap_or_default();
        total.lag += lane.lag().unwrap_or_default();
    }
    totals
}

fn seen<T>(receiver: &mut watch::Receiver<T>) -> bool {
    let changed = receiver.has_changed().unwrap_or(false);
    receiver.mark_unchanged();
    changed
}

/// (now, peak) of this process in bytes, as Linux accounts it; zeros elsewhere.
fn resident_memory() -> (u64, u64) {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return (0, 0) };
    let kilobytes = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()
    };
    (kilobytes("VmRSS:").unwrap_or_default() * 1024, kilobytes("VmHWM:").unwrap_or_default() * 1024)
}
