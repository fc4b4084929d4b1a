//! Puts the record of a letter back into its lane, where that helps.

use std::{collections::HashSet, sync::Arc, time::Duration};

use chrono::Utc;
use serde::Serialize;

use super::{
    Error,
    letter::{Filter, Letter, Origin},
    read,
};
use crate::{
    change::{TableId, Topics},
    lake,
    stream::{
        Access,
        producer::{self, Headers, Outgoing, Producer, Receipt},
        range::{From, Range},
        topics,
    },
};

/// On a replayed record: the letter it came from, as `topic[partition]@offset`.
pub const HEADER: &str = "ledgerline.replayed_from";

/// Records sent before their acknowledgements are waited for.
const TOGETHER: usize = 500;
/// How long the broker may take to acknowledge them.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(30);
/// Records remembered to see repeats of letters; one that is forgotten is replayed twice, and taken once.
const REMEMBERED_MAX: usize = 100_000;
/// Letters named one by one in a report; the counts cover all.
const NAMED_MAX: usize = 200;

/// Which letters are replayed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    Offsets { partition: i32, offsets: Vec<i64> },
    All(Filter),
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    pub which: Which,
    /// Also what the sink still would not take.
    pub force: bool,
    pub dry_run: bool,
}

/// What became of one letter, or would become of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    Replayed {
        topic: String,
        partition: i32,
        /// It was forced: the sink will write another letter.
        again_a_letter: bool,
    },
    /// The sink would write another letter, so the record stayed where it is.
    StillUndecodable { why: &'static str },
    /// The same record as an earlier letter of this replay.
    Repeat,
    /// There is nothing that could be put back; what to do instead.
    NotReplayable { why: String, remedy: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Handled {
    pub partition: i32,
    pub offset: i64,
    #[serde(flatten)]
    pub outcome: Outcome,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    pub topic: String,
    pub dry_run: bool,
    pub letters: u64,
    /// Records put back; with `dry_run`, that would be.
    pub replayed: u64,
    pub still_undecodable: u64,
    pub repeats: u64,
    pub not_replayable: u64,
    /// The first ones, in the order of the topic.
    pub handled: Vec<Handled>,
}

/// Replays letters in the order of the topic. Cut short, some are back and some are not: replaying again is harmless.
pub async fn replay(kafka: impl Into<Access>, topics: &Topics, asked: &Replay) -> Result<Report, Error> {
    let kafka: &Access = &kafka.into();
    let mut back = Back::new(kafka, topics, asked).await?;
    match &asked.which {
        Which::Offsets { partition, offsets } => {
            // All are found before the first is sent: a wrong offset changes nothing.
            let mut letters = Vec::new();
            for offset in offsets {
                letters.push(read::find(kafka, topics, *partition, *offset).await?);
            }
            for letter in &letters {
                back.take(letter).await?;
            }
        }
        Which::All(filter) => {
            let (mut range, _) = Range::open(kafka, &topics.dead_letters(), From::Last(i64::MAX)).await?;
            while let Some(record) = range.next().await {
                let letter = Letter::read(&record?);
                if letter.is_wanted(filter, topics) {
                    back.take(&letter).await?;
                }
            }
        }
    }
    back.settle().await?;
    Ok(back.report)
}

/// A replay under way.
struct Back<'a> {
    kafka: &'a Access,
    topics: &'a Topics,
    asked: &'a Replay,
    /// Topics that exist, with their partitions: sending must not create one.
    existing: Vec<(String, usize)>,
    producer: Producer,
    receipt: Arc<Receipt>,
    unsettled: usize,
    seen: HashSet<(String, i32, i64)>,
    report: Report,
}

impl<'a> Back<'a> {
    async fn new(kafka: &'a Access, topics: &'a Topics, asked: &'a Replay) -> Result<Self, Error> {
        let asking = topics::Topics::connect(kafka)?;
        let existing = asking.partitions().await?;
        let ours: Vec<String> = existing.iter().map(|it| it.0.clone()).filter(|it| topics.lake_name(it).is_some()).collect();
        let bytes_max = asking.bytes_max(&ours).await?;
        Ok(Self {
            kafka,
            topics,
            asked,
            existing,
            producer: Producer::new(kafka, bytes_max)?,
            receipt: Receipt::open(),
            unsettled: 0,
            seen: HashSet::new(),
            report: Report { topic: topics.dead_letters(), dry_run: asked.dry_run, ..Report::default() },
        })
    }

    async fn take(&mut self, letter: &Letter) -> Result<(), Error> {
        let outcome = self.judge(letter);
        if let (Outcome::Replayed { topic, partition, .. }, Origin::Sink { key, value, .. }, false) = (&outcome, &letter.origin, self.asked.dry_run) {
            let from = format!("{}[{}]@{}", self.report.topic, letter.partition, letter.offset);
            let headers = Headers::of(HEADER, from.as_bytes());
            let outgoing = Outgoing {
                topic,
                partition: Some(*partition),
                key: key.as_deref(),
                value: value.as_deref(),
                headers: Some(&headers),
                // Its own time would let the topic's retention take it at once.
                timestamp_ms: Utc::now().timestamp_millis(),
            };
            self.in_time(self.producer.send(outgoing, &self.receipt)).await?;
            self.unsettled += 1;
            if self.unsettled >= TOGETHER {
                self.settle().await?;
            }
        }
        let count = match &outcome {
            Outcome::Replayed { .. } => &mut self.report.replayed,
            Outcome::StillUndecodable { .. } => &mut self.report.still_undecodable,
            Outcome::Repeat => &mut self.report.repeats,
            Outcome::NotReplayable { .. } => &mut self.report.not_replayable,
        };
        *count += 1;
        self.report.letters += 1;
        if self.report.handled.len() < NAMED_MAX {
            self.report.handled.push(Handled { partition: letter.partition, offset: letter.offset, outcome });
        }
        Ok(())
    }

    fn judge(&mut self, letter: &Letter) -> Outcome {
        let refuse = |why: String, remedy: String| Outcome::NotReplayable { why, remedy };
        match &letter.origin {
            Origin::Capture { table, op, .. } => refuse("a letter of the capture holds no event, there never was one".to_owned(), instead(table.as_ref(), op)),
            Origin::Foreign { .. } => refuse("neither capture nor sink wrote it".to_owned(), "ask whoever writes into this topic".to_owned()),
            Origin::Sink { topic, partition, offset, key, value, .. } => {
                if self.topics.lake_name(topic).is_none() {
                    return refuse(format!("{topic} is no topic of this pipeline"), "look at cdc.topic_prefix".to_owned());
                }
                let partitions = self.existing.iter().find(|(name, _)| name == topic).map_or(0, |it| it.1);
                if usize::try_from(*partition).is_ok_and(|it| it >= partitions) {
                    return refuse(format!("there is no {topic}[{partition}] any more"), "create the topic with as many partitions as it had".to_owned());
                }
                if self.seen.len() >= REMEMBERED_MAX {
                    self.seen.clear();
                }
                if !self.seen.insert((topic.clone(), *partition, *offset)) {
                    return Outcome::Repeat;
                }
                let refused = lake::refusal(key.as_deref(), value.as_deref());
                match refused {
                    Some(why) if !self.asked.force => Outcome::StillUndecodable { why },
                    refused => Outcome::Replayed { topic: topic.clone(), partition: *partition, again_a_letter: refused.is_some() },
                }
            }
        }
    }

    /// Waits until the broker has all that was sent.
    async fn settle(&mut self) -> Result<(), Error> {
        if self.unsettled > 0 {
            let receipt = std::mem::replace(&mut self.receipt, Receipt::open());
            self.producer.seal(&receipt);
            self.in_time(self.producer.acked(&receipt)).await?;
            self.unsettled = 0;
        }
        Ok(())
    }

    async fn in_time(&self, work: impl Future<Output = Result<(), producer::Error>>) -> Result<(), Error> {
        let away = |_| Error::Unacknowledged { bootstrap_servers: self.kafka.to_string() };
        Ok(tokio::time::timeout(ACKNOWLEDGED_WITHIN, work).await.map_err(away)??)
    }
}

/// How a row comes after all that the capture could not read.
fn instead(table: Option<&TableId>, op: &str) -> String {
    let Some(table) = table else {
        return "mend what the reason names; then read the tables anew, with a new cdc.topic_prefix".to_owned();
    };
    match op {
        "d" => format!(
            "mend what the reason names; a deletion comes only once, so the row stays in the warehouse until {table} is read anew, with a new cdc.topic_prefix"
        ),
        _ => format!("mend what the reason names, then touch the row on the source (update {table} set id = id where …): its next event carries the whole row"),
    }
}
