//! One consumer group: who is in it, which generation it is in, and who waits for the others (pure; time is an argument).
//!
//! The classic protocol: members join, the group waits until all have, the leader assigns, everyone fetches what it was
//! given. Who is silent for longer than its session leaves. Cooperative assignors need nothing more: they rejoin twice.
//!
//! `J` and `S` are whatever the answers to a join and a sync are sent through later; each is answered exactly once.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use bytes::Bytes;
use kafka_protocol::ResponseError;

/// An empty group waits this long for more members, so that consumers started together share one first rebalance.
const INITIAL_DELAY: Duration = Duration::from_millis(100);
/// Kafka's upper limit; below it any session is allowed.
const SESSION_MAX: Duration = Duration::from_secs(30 * 60);
const MEMBERS_MAX: usize = 1_000;

/// Kafka's names for the states of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Empty,
    PreparingRebalance,
    CompletingRebalance,
    Stable,
}

impl State {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Empty => "Empty",
            Self::PreparingRebalance => "PreparingRebalance",
            Self::CompletingRebalance => "CompletingRebalance",
            Self::Stable => "Stable",
        }
    }
}

/// What a member says when it joins.
#[derive(Debug, Clone)]
pub(super) struct Join {
    /// Empty at first.
    pub(super) member_id: String,
    pub(super) instance_id: Option<String>,
    pub(super) client_id: String,
    pub(super) session: Duration,
    pub(super) rebalance: Duration,
    pub(super) protocol_type: String,
    /// Assignors it knows with its metadata for each, the preferred first.
    pub(super) protocols: Vec<(String, Bytes)>,
    /// The request's version wants members to come back with the id they are given.
    pub(super) id_required: bool,
}

/// What a member hears when all have joined.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Joined {
    pub(super) error: Option<ResponseError>,
    pub(super) generation: i32,
    pub(super) protocol_type: String,
    pub(super) protocol: String,
    pub(super) leader: String,
    pub(super) member_id: String,
    /// For the leader only: id, instance id, metadata.
    pub(super) members: Vec<(String, Option<String>, Bytes)>,
}

/// What a member hears when the leader has assigned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Synced {
    pub(super) error: Option<ResponseError>,
    pub(super) protocol_type: String,
    pub(super) protocol: String,
    pub(super) assignment: Bytes,
}

/// An answer that is due.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply<J, S> {
    Joined(J, Joined),
    Synced(S, Synced),
}

/// Who speaks: a member's id, its instance id if it has one, and the generation it believes in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Speaker<'a> {
    pub(super) member_id: &'a str,
    pub(super) instance_id: Option<&'a str>,
    pub(super) generation: i32,
}

#[derive(Debug)]
pub(super) struct Member<J, S> {
    pub(super) client_id: String,
    pub(super) instance_id: Option<String>,
    pub(super) protocols: Vec<(String, Bytes)>,
    pub(super) assignment: Bytes,
    session: Duration,
    rebalance: Duration,
    heard: Instant,
    joining: Option<J>,
    syncing: Option<S>,
}

#[derive(Debug)]
pub(super) struct Group<J, S> {
    pub(super) state: State,
    pub(super) protocol_type: String,
    pub(super) protocol: String,
    pub(super) members: BTreeMap<String, Member<J, S>>,
    generation: i32,
    leader: String,
    /// Ids given out to members that have not come back with them yet, and when they lapse.
    expected: BTreeMap<String, Instant>,
    /// The rebalance goes on without those who have not joined (or synced) by then.
    deadline: Option<Instant>,
    not_before: Option<Instant>,
    replies: Vec<Reply<J, S>>,
}

impl<J, S> Group<J, S> {
    pub(super) fn new() -> Self {
        Self {
            state: State::Empty,
            protocol_type: String::new(),
            protocol: String::new(),
            members: BTreeMap::new(),
            generation: 0,
            leader: String::new(),
            expected: BTreeMap::new(),
            deadline: None,
            not_before: None,
            replies: Vec::new(),
        }
    }

    /// Nobody is in it and nobody is expected: it may be forgotten.
    pub(super) fn is_over(&self) -> bool {
        self.members.is_empty() && self.expected.is_empty()
    }

    /// The answers that have become due.
    pub(super) fn take_replies(&mut self) -> Vec<Reply<J, S>> {
        std::mem::take(&mut self.replies)
    }

    pub(super) fn join(&mut self, join: Join, fresh_id: String, waiter: J, now: Instant) {
        let asked_as = join.member_id.clone();
        match self.admit(&join, fresh_id, now) {
            Ok(member_id) => self.enter(member_id, join, waiter, now),
            Err((error, member_id)) => {
                let member_id = member_id.unwrap_or(asked_as);
                self.replies.push(Reply::Joined(waiter, Joined { error: Some(error), generation: -1, member_id, ..Joined::default() }));
            }
        }
    }

    /// Which member this is, or why it may not join and the id to tell it.
    fn admit(&mut self, join: &Join, fresh_id: String, now: Instant) -> Result<String, (ResponseError, Option<String>)> {
        if join.session.is_zero() || join.session > SESSION_MAX {
            return Err((ResponseError::InvalidSessionTimeout, None));
        }
        let known = join.instance_id.as_ref().and_then(|it| self.by_instance(it));
        let others: Vec<&Member<J, S>> =
            self.members.iter().filter(|(id, _)| **id != join.member_id && known.as_ref() != Some(*id)).map(|(_, it)| it).collect();
        let shared = |name: &String| others.iter().all(|it| it.protocols.iter().any(|(other, _)| other == name));
        let same_type = others.is_empty() || self.protocol_type == join.protocol_type;
        if join.protocol_type.is_empty() || !same_type || !join.protocols.iter().any(|(name, _)| shared(name)) {
            return Err((ResponseError::InconsistentGroupProtocol, None));
        }
        if others.len() >= MEMBERS_MAX || self.expected.len() >= MEMBERS_MAX {
            return Err((ResponseError::GroupMaxSizeReached, None));
        }
        match (join.member_id.is_empty(), known) {
            (true, Some(replaced)) => {
                // A static member has started again: its place is its own, its old self is fenced.
                if let Some(mut member) = self.members.remove(&replaced) {
                    self.dismiss(&mut member, ResponseError::FencedInstanceId);
                    self.members.insert(fresh_id.clone(), member);
                }
                Ok(fresh_id)
            }
            (true, None) if join.id_required && join.instance_id.is_none() => {
                self.expected.insert(fresh_id.clone(), now + join.session);
                Err((ResponseError::MemberIdRequired, Some(fresh_id)))
            }
            (true, None) => Ok(fresh_id),
            (false, Some(other)) if other != join.member_id => Err((ResponseError::FencedInstanceId, None)),
            (false, _) if self.members.contains_key(&join.member_id) || self.expected.remove(&join.member_id).is_some() => Ok(join.member_id.clone()),
            (false, _) => Err((ResponseError::UnknownMemberId, None)),
        }
    }

    /// Takes a member in, or lets it join again.
    fn enter(&mut self, id: String, join: Join, waiter: J, now: Instant) {
        self.protocol_type = join.protocol_type;
        let leads = self.leader == id;
        let unchanged = self.members.get(&id).is_some_and(|it| it.protocols == join.protocols);
        let nothing_new = match self.state {
            State::Stable => unchanged && !leads,
            State::CompletingRebalance => unchanged,
            State::Empty | State::PreparingRebalance => false,
        };
        let mut old = self.members.remove(&id);
        if let Some(member) = &mut old {
            self.dismiss(member, ResponseError::RebalanceInProgress);
        }
        let assignment = old.map(|it| it.assignment).unwrap_or_default();
        let (client_id, instance_id, protocols) = (join.client_id, join.instance_id, join.protocols);
        let (session, rebalance) = (join.session, join.rebalance);
        let mut member = Member { client_id, instance_id, protocols, assignment, session, rebalance, heard: now, joining: None, syncing: None };
        if nothing_new {
            self.members.insert(id.clone(), member);
            let joined = self.joined(&id);
            self.replies.push(Reply::Joined(waiter, joined));
        } else {
            member.joining = Some(waiter);
            self.members.insert(id, member);
            self.prepare(now);
            self.complete_if_due(now);
        }
    }

    pub(super) fn sync(&mut self, speaker: Speaker<'_>, assignments: Vec<(String, Bytes)>, waiter: S, now: Instant) {
        if let Err(error) = self.known(speaker) {
            return self.replies.push(Reply::Synced(waiter, Synced { error: Some(error), ..Synced::default() }));
        }
        let id = speaker.member_id;
        let member = self.members.get_mut(id).expect("known was asked above");
        member.heard = now;
        match self.state {
            State::Empty | State::PreparingRebalance => {
                let error = Some(ResponseError::RebalanceInProgress);
                self.replies.push(Reply::Synced(waiter, Synced { error, ..Synced::default() }));
            }
            State::Stable => {
                let synced = self.synced(id);
                self.replies.push(Reply::Synced(waiter, synced));
            }
            State::CompletingRebalance => {
                if let Some(older) = member.syncing.replace(waiter) {
                    let error = Some(ResponseError::RebalanceInProgress);
                    self.replies.push(Reply::Synced(older, Synced { error, ..Synced::default() }));
                }
                if id == self.leader {
                    self.assign(assignments, now);
                }
            }
        }
    }

    /// The leader has spoken: everyone who waits hears its part.
    fn assign(&mut self, assignments: Vec<(String, Bytes)>, now: Instant) {
        let mut assignments: BTreeMap<String, Bytes> = assignments.into_iter().collect();
        (self.state, self.deadline) = (State::Stable, None);
        let ids: Vec<String> = self.members.keys().cloned().collect();
        for id in ids {
            let member = self.members.get_mut(&id).expect("nobody left in between");
            member.assignment = assignments.remove(&id).unwrap_or_default();
            if let Some(waiter) = member.syncing.take() {
                member.heard = now;
                let synced = self.synced(&id);
                self.replies.push(Reply::Synced(waiter, synced));
            }
        }
    }

    /// A sign of life. The error says what the member has to do.
    pub(super) fn heartbeat(&mut self, speaker: Speaker<'_>, now: Instant) -> Result<(), ResponseError> {
        self.known(speaker)?;
        if let Some(member) = self.members.get_mut(speaker.member_id) {
            member.heard = now;
        }
        if self.state == State::PreparingRebalance { Err(ResponseError::RebalanceInProgress) } else { Ok(()) }
    }

    pub(super) fn leave(&mut self, member_id: &str, instance_id: Option<&str>, now: Instant) -> Result<(), ResponseError> {
        let id = match instance_id {
            Some(instance) => self.by_instance(instance).ok_or(ResponseError::UnknownMemberId)?,
            None => member_id.to_owned(),
        };
        if instance_id.is_some() && !member_id.is_empty() && member_id != id {
            return Err(ResponseError::FencedInstanceId);
        }
        if self.expected.remove(&id).is_some() {
            return Ok(());
        }
        let mut member = self.members.remove(&id).ok_or(ResponseError::UnknownMemberId)?;
        self.dismiss(&mut member, ResponseError::UnknownMemberId);
        self.after_departure(now);
        Ok(())
    }

    /// Whether this speaker may commit offsets now.
    pub(super) fn may_commit(&self, speaker: Speaker<'_>) -> Result<(), ResponseError> {
        if speaker.generation < 0 && self.members.is_empty() {
            return Ok(());
        }
        self.known(speaker)?;
        // Between join and sync nobody owns anything.
        if self.state == State::CompletingRebalance { Err(ResponseError::RebalanceInProgress) } else { Ok(()) }
    }

    fn known(&self, speaker: Speaker<'_>) -> Result<(), ResponseError> {
        let holder = speaker.instance_id.and_then(|it| self.by_instance(it));
        if holder.is_some_and(|it| it != speaker.member_id) {
            return Err(ResponseError::FencedInstanceId);
        }
        if !self.members.contains_key(speaker.member_id) {
            return Err(ResponseError::UnknownMemberId);
        }
        if speaker.generation == self.generation { Ok(()) } else { Err(ResponseError::IllegalGeneration) }
    }

    /// Lets go who has been silent for too long, and ends a rebalance that has waited long enough.
    pub(super) fn tick(&mut self, now: Instant) {
        self.expected.retain(|_, lapses| *lapses > now);
        let late = self.deadline.is_some_and(|it| it <= now);
        let state = self.state;
        let stays = |member: &Member<J, S>| match state {
            State::PreparingRebalance if late => member.joining.is_some(),
            State::CompletingRebalance if late => member.syncing.is_some(),
            _ => member.joining.is_some() || member.syncing.is_some() || member.heard + member.session > now,
        };
        let gone: BTreeSet<String> = self.members.iter().filter(|(_, it)| !stays(it)).map(|(id, _)| id.clone()).collect();
        for id in &gone {
            if let Some(mut member) = self.members.remove(id) {
                self.dismiss(&mut member, ResponseError::UnknownMemberId);
            }
        }
        if !gone.is_empty() || (late && state == State::CompletingRebalance) {
            self.after_departure(now);
        }
        self.complete_if_due(now);
    }

    /// When [`tick`](Self::tick) has something to do next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let silent = self.members.values().filter(|it| it.joining.is_none() && it.syncing.is_none()).map(|it| it.heard + it.session);
        silent.chain(self.expected.values().copied()).chain(self.deadline).chain(self.not_before).min()
    }

    fn after_departure(&mut self, now: Instant) {
        if self.members.is_empty() {
            self.state = State::Empty;
            self.generation += 1;
            (self.deadline, self.not_before) = (None, None);
            self.leader.clear();
        } else {
            if self.state == State::CompletingRebalance {
                self.state = State::Stable;
            }
            self.prepare(now);
            self.complete_if_due(now);
        }
    }

    /// Begins a rebalance, if none is going on: everyone has to join again.
    fn prepare(&mut self, now: Instant) {
        if self.state == State::PreparingRebalance {
            return;
        }
        self.not_before = (self.state == State::Empty).then_some(now + INITIAL_DELAY);
        let longest = self.members.values().map(|it| it.rebalance).max().unwrap_or_default();
        self.deadline = Some(now + longest.max(INITIAL_DELAY));
        self.state = State::PreparingRebalance;
        for member in self.members.values_mut() {
            if let Some(waiter) = member.syncing.take() {
                let error = Some(ResponseError::RebalanceInProgress);
                self.replies.push(Reply::Synced(waiter, Synced { error, ..Synced::default() }));
            }
        }
    }

    /// Ends the joining once everyone is there: a new generation, and its leader hears who is in it.
    fn complete_if_due(&mut self, now: Instant) {
        let waiting = self.state != State::PreparingRebalance || self.not_before.is_some_and(|it| it > now);
        if waiting || self.members.is_empty() || self.members.values().any(|it| it.joining.is_none()) {
            return;
        }
        let longest = self.members.values().map(|it| it.rebalance).max().unwrap_or_default();
        (self.not_before, self.deadline) = (None, Some(now + longest.max(INITIAL_DELAY)));
        self.state = State::CompletingRebalance;
        self.generation += 1;
        if !self.members.contains_key(&self.leader) {
            self.leader = self.members.keys().next().cloned().unwrap_or_default();
        }
        let known_by_all = |name: &String| self.members.values().all(|it| it.protocols.iter().any(|(other, _)| other == name));
        let mut preferred = self.members[&self.leader].protocols.iter().map(|(name, _)| name);
        self.protocol = preferred.find(|name| known_by_all(name)).cloned().unwrap_or_default();
        let ids: Vec<String> = self.members.keys().cloned().collect();
        for id in ids {
            let joined = self.joined(&id);
            let member = self.members.get_mut(&id).expect("nobody left in between");
            member.heard = now;
            if let Some(waiter) = member.joining.take() {
                self.replies.push(Reply::Joined(waiter, joined));
            }
        }
    }

    /// What this member hears about the current generation.
    fn joined(&self, id: &str) -> Joined {
        let metadata = |it: &Member<J, S>| it.protocols.iter().find(|(name, _)| *name == self.protocol).map(|(_, it)| it.clone()).unwrap_or_default();
        let all = || self.members.iter().map(|(id, it)| (id.clone(), it.instance_id.clone(), metadata(it))).collect();
        Joined {
            error: None,
            generation: self.generation,
            protocol_type: self.protocol_type.clone(),
            protocol: self.protocol.clone(),
            leader: self.leader.clone(),
            member_id: id.to_owned(),
            members: if id == self.leader { all() } else { Vec::new() },
        }
    }

    fn synced(&self, id: &str) -> Synced {
        let assignment = self.members.get(id).map(|it| it.assignment.clone()).unwrap_or_default();
        Synced { error: None, protocol_type: self.protocol_type.clone(), protocol: self.protocol.clone(), assignment }
    }

    /// Answers what a departing or superseded member still waits for.
    fn dismiss(&mut self, member: &mut Member<J, S>, error: ResponseError) {
        if let Some(waiter) = member.joining.take() {
            self.replies.push(Reply::Joined(waiter, Joined { error: Some(error), generation: -1, ..Joined::default() }));
        }
        if let Some(waiter) = member.syncing.take() {
            self.replies.push(Reply::Synced(waiter, Synced { error: Some(error), ..Synced::default() }));
        }
    }

    fn by_instance(&self, instance_id: &str) -> Option<String> {
        self.members.iter().find(|(_, it)| it.instance_id.as_deref() == Some(instance_id)).map(|(id, _)| id.clone())
    }
}
