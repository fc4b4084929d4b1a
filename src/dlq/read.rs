//! Lists letters, newest first, and finds one.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

use super::{
    Error,
    letter::{Filter, Letter, Shown},
};
use crate::{
    change::Topics,
    stream::{
        Access,
        range::{From, Range},
    },
};

/// Letters looked at by one listing, in each partition: the newest. What it holds back in time and memory is bounded by it.
const LOOKED_AT_MAX: i64 = 100_000;
/// Reasons counted one by one; reasons name columns, so there are as many as a schema has ways to go wrong.
const REASONS_MAX: usize = 100;

/// The newest letters, and how many there are for each reason.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Listing {
    pub topic: String,
    /// Letters the topic holds now.
    pub held: u64,
    /// Letters looked at: the newest, where there are very many.
    pub looked_at: u64,
    /// Of those, the ones that were asked for.
    pub wanted: u64,
    /// Most frequent first.
    pub reasons: Vec<ReasonCount>,
    /// Newest first.
    pub letters: Vec<Shown>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReasonCount {
    pub written_by: &'static str,
    pub reason: String,
    pub letters: u64,
}

/// Reads the newest letters. A topic that does not exist yet has none.
pub async fn list(kafka: impl Into<Access>, topics: &Topics, filter: &Filter, limit: usize, reveal: bool) -> Result<Listing, Error> {
    let topic = topics.dead_letters();
    let (mut range, marks) = Range::open(kafka, &topic, From::Last(LOOKED_AT_MAX)).await?;
    let held = marks.iter().map(|(_, it)| it.end.saturating_sub(it.first).unsigned_abs()).sum();
    let mut listing = Listing { topic, held, looked_at: 0, wanted: 0, reasons: Vec::new(), letters: Vec::new() };
    let mut counts = BTreeMap::new();
    let mut newest: BTreeMap<i32, VecDeque<Letter>> = BTreeMap::new();
    while let Some(record) = range.next().await {
        let letter = Letter::read(&record?);
        listing.looked_at += 1;
        if !letter.is_wanted(filter, topics) {
            continue;
        }
        listing.wanted += 1;
        let reason = (letter.written_by(), letter.reason.clone());
        let reason = if counts.len() < REASONS_MAX || counts.contains_key(&reason) { reason } else { ("", "other reasons".to_owned()) };
        *counts.entry(reason).or_insert(0_u64) += 1;
        let lane = newest.entry(letter.partition).or_default();
        lane.push_back(letter);
        if lane.len() > limit {
            lane.pop_front();
        }
    }
    let mut letters: Vec<Letter> = newest.into_values().flatten().collect();
    letters.sort_by_key(|it| std::cmp::Reverse((it.at, it.offset)));
    listing.letters = letters.iter().take(limit).map(|it| it.shown(topics, reveal)).collect();
    listing.reasons = counts.into_iter().map(|((written_by, reason), letters)| ReasonCount { written_by, reason, letters }).collect();
    listing.reasons.sort_by_key(|it| std::cmp::Reverse(it.letters));
    Ok(listing)
}

/// The letter at an offset.
pub async fn find(kafka: impl Into<Access>, topics: &Topics, partition: i32, offset: i64) -> Result<Letter, Error> {
    let topic = topics.dead_letters();
    let (mut range, _) = Range::open(kafka, &topic, From::At { partition, offset }).await?;
    match range.next().await.transpose()? {
        Some(record) if record.offset == offset => Ok(Letter::read(&record)),
        _ => Err(Error::NoLetter { topic, partition, offset }),
    }
}
