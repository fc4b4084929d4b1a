use proptest::prelude::*;

use super::*;

type Ids = Group<u32, u32>;

fn join(member_id: &str, protocols: &[&str]) -> Join {
    Join {
        member_id: member_id.to_owned(),
        instance_id: None,
        client_id: "c".to_owned(),
        session: Duration::from_secs(10),
        rebalance: Duration::from_secs(30),
        protocol_type: "consumer".to_owned(),
        protocols: protocols.iter().map(|it| ((*it).to_owned(), Bytes::from_static(b"m"))).collect(),
        id_required: false,
    }
}

fn speaker(member_id: &str, generation: i32) -> Speaker<'_> {
    Speaker { member_id, instance_id: None, generation }
}

fn joins(group: &mut Ids) -> Vec<(u32, Joined)> {
    let replies = group.take_replies().into_iter();
    replies.filter_map(|it| if let Reply::Joined(waiter, joined) = it { Some((waiter, joined)) } else { None }).collect()
}

fn syncs(group: &mut Ids) -> Vec<(u32, Synced)> {
    let replies = group.take_replies().into_iter();
    replies.filter_map(|it| if let Reply::Synced(waiter, synced) = it { Some((waiter, synced)) } else { None }).collect()
}

/// A stable group of `a` (the leader) and `b`.
fn pair(now: Instant) -> Ids {
    let mut group = Ids::new();
    group.join(join("", &["range", "sticky"]), "a".to_owned(), 1, now);
    group.join(join("", &["sticky", "range"]), "b".to_owned(), 2, now);
    group.tick(now + INITIAL_DELAY);
    let joined = joins(&mut group);
    assert_eq!(joined.iter().map(|it| (it.0, it.1.generation, it.1.members.len())).collect::<Vec<_>>(), [(1, 1, 2), (2, 1, 0)]);
    assert_eq!(joined[1].1.protocol, "range", "the leader's first that both know");
    group.sync(speaker("b", 1), vec![], 4, now);
    assert!(group.take_replies().is_empty(), "b waits for the leader");
    group.sync(speaker("a", 1), vec![("a".to_owned(), Bytes::from_static(b"A")), ("b".to_owned(), Bytes::from_static(b"B"))], 3, now);
    let synced = syncs(&mut group);
    assert_eq!(synced.iter().map(|it| (it.0, &it.1.assignment[..])).collect::<Vec<_>>(), [(3, &b"A"[..]), (4, &b"B"[..])]);
    group
}

#[test]
fn members_that_start_together_share_the_first_generation() {
    assert_eq!(pair(Instant::now()).state, State::Stable);
}

#[test]
fn a_silent_member_is_let_go_and_the_others_are_told_to_join_again() {
    let now = Instant::now();
    let mut group = pair(now);
    let later = now + Duration::from_secs(9);
    group.heartbeat(speaker("a", 1), later).unwrap();
    assert_eq!(group.next_deadline(), Some(now + Duration::from_secs(10)), "b has not been heard since");
    group.tick(now + Duration::from_secs(12));
    assert_eq!(group.members.keys().collect::<Vec<_>>(), ["a"]);
    assert_eq!(group.heartbeat(speaker("a", 1), later), Err(ResponseError::RebalanceInProgress));
    assert_eq!(group.heartbeat(speaker("b", 1), later), Err(ResponseError::UnknownMemberId));
    group.join(join("a", &["range"]), String::new(), 9, later);
    assert_eq!(joins(&mut group)[0].1.generation, 2);
}

#[test]
fn a_rebalance_goes_on_without_those_who_do_not_come_back() {
    let now = Instant::now();
    let mut group = pair(now);
    group.join(join("", &["range"]), "c".to_owned(), 5, now);
    assert!(group.take_replies().is_empty(), "c waits for a and b");
    group.join(join("a", &["range"]), String::new(), 6, now);
    let mut beat = now;
    while group.state == State::PreparingRebalance {
        beat += Duration::from_secs(5);
        // b is alive, but does not join again.
        let _ = group.heartbeat(speaker("b", 1), beat);
        group.tick(beat);
    }
    assert!(beat <= now + Duration::from_secs(35));
    assert_eq!(group.members.keys().collect::<Vec<_>>(), ["a", "c"]);
    assert_eq!(joins(&mut group).len(), 2);
}

#[test]
fn a_leader_that_never_assigns_is_let_go() {
    let now = Instant::now();
    let mut group = pair(now);
    group.join(join("a", &["range"]), String::new(), 5, now);
    group.join(join("b", &["range"]), String::new(), 6, now);
    assert_eq!(joins(&mut group).len(), 2);
    group.sync(speaker("b", 2), vec![], 7, now);
    let mut beat = now;
    while beat < now + Duration::from_secs(40) {
        beat += Duration::from_secs(5);
        let _ = group.heartbeat(speaker("a", 2), beat);
        group.tick(beat);
    }
    assert_eq!(syncs(&mut group)[0].1.error, Some(ResponseError::RebalanceInProgress));
    assert!(!group.members.contains_key("a"));
}

#[test]
fn an_id_must_be_fetched_first_where_the_version_says_so() {
    let (now, mut group) = (Instant::now(), Ids::new());
    group.join(Join { id_required: true, ..join("", &["range"]) }, "a".to_owned(), 1, now);
    let (_, joined) = joins(&mut group).remove(0);
    assert_eq!((joined.error, joined.member_id.as_str()), (Some(ResponseError::MemberIdRequired), "a"));
    group.join(join("stranger", &["range"]), String::new(), 2, now);
    assert_eq!(joins(&mut group)[0].1.error, Some(ResponseError::UnknownMemberId));
    group.join(join("a", &["range"]), String::new(), 3, now);
    group.tick(now + INITIAL_DELAY);
    assert_eq!(joins(&mut group)[0].1.error, None);
    group.join(Join { id_required: true, ..join("", &["range"]) }, "never comes back".to_owned(), 4, now);
    group.tick(now + Duration::from_secs(11));
    assert!(group.expected.is_empty());
}

#[test]
fn only_a_member_of_this_generation_may_commit_and_anybody_while_it_is_empty() {
    let now = Instant::now();
    assert_eq!(Ids::new().may_commit(speaker("", -1)), Ok(()));
    let group = pair(now);
    assert_eq!(group.may_commit(speaker("a", 1)), Ok(()));
    assert_eq!(group.may_commit(speaker("a", 0)), Err(ResponseError::IllegalGeneration));
    assert_eq!(group.may_commit(speaker("x", 1)), Err(ResponseError::UnknownMemberId));
    assert_eq!(group.may_commit(speaker("", -1)), Err(ResponseError::UnknownMemberId));
}

#[test]
fn a_member_without_a_common_assignor_is_refused() {
    let now = Instant::now();
    let mut group = pair(now);
    group.join(join("", &["other"]), "c".to_owned(), 9, now);
    group.join(Join { protocol_type: "connect".to_owned(), ..join("", &["range"]) }, "d".to_owned(), 10, now);
    assert!(joins(&mut group).iter().all(|it| it.1.error == Some(ResponseError::InconsistentGroupProtocol)));
    assert_eq!(group.state, State::Stable);
}

#[test]
fn a_static_member_that_starts_again_takes_its_place_and_fences_its_old_self() {
    let (now, mut group) = (Instant::now(), Ids::new());
    let fixed = || Join { instance_id: Some("one".to_owned()), id_required: true, ..join("", &["range"]) };
    group.join(fixed(), "old".to_owned(), 1, now);
    group.tick(now + INITIAL_DELAY);
    group.join(fixed(), "new".to_owned(), 2, now);
    group.tick(now + INITIAL_DELAY);
    assert_eq!(group.members.keys().collect::<Vec<_>>(), ["new"]);
    let old = Speaker { member_id: "old", instance_id: Some("one"), generation: 1 };
    assert_eq!(group.heartbeat(old, now), Err(ResponseError::FencedInstanceId));
    assert_eq!(group.leave("", Some("one"), now), Ok(()));
    assert!(group.is_over());
}

#[derive(Debug, Clone)]
enum Deed {
    Join(usize),
    Sync(usize),
    Beat(usize),
    Leave(usize),
    Wait(u64),
}

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let one = prop_oneof![
        4 => (0_usize..4).prop_map(Deed::Join),
        4 => (0_usize..4).prop_map(Deed::Sync),
        2 => (0_usize..4).prop_map(Deed::Beat),
        1 => (0_usize..4).prop_map(Deed::Leave),
        2 => (1_u64..15).prop_map(Deed::Wait),
    ];
    prop::collection::vec(one, 1..80)
}

proptest! {
    /// Whatever members do, in any order: everyone who asks is answered exactly once, generations only grow, and
    /// all who join one generation hear of the same leader.
    #[test]
    fn everyone_is_answered_once_and_generations_only_grow(deeds in deeds()) {
        let (mut now, mut group, mut n_asked) = (Instant::now(), Ids::new(), 0_u32);
        let mut members: Vec<(String, i32)> = vec![(String::new(), -1); 4];
        let mut waits: BTreeMap<u32, usize> = BTreeMap::new();
        let mut leaders: BTreeMap<i32, String> = BTreeMap::new();
        let mut newest = 0;
        let settle = deeds.iter().cloned().chain([Deed::Wait(100), Deed::Wait(100), Deed::Wait(100)]);
        for deed in settle {
            match deed {
                Deed::Join(n) | Deed::Sync(n) if waits.values().any(|it| *it == n) => {}
                Deed::Join(n) => {
                    n_asked += 1;
                    waits.insert(n_asked, n);
                    group.join(join(&members[n].0, &["range"]), format!("m{n_asked}"), n_asked, now);
                }
                Deed::Sync(n) => {
                    n_asked += 1;
                    waits.insert(n_asked, n);
                    group.sync(speaker(&members[n].0.clone(), members[n].1), vec![], n_asked, now);
                }
                Deed::Beat(n) => drop(group.heartbeat(speaker(&members[n].0, members[n].1), now)),
                Deed::Leave(n) => drop(group.leave(&members[n].0.clone(), None, now)),
                Deed::Wait(seconds) => now += Duration::from_secs(seconds),
            }
            group.tick(now);
            for reply in group.take_replies() {
                let (waiter, joined) = match reply {
                    Reply::Joined(waiter, joined) => (waiter, Some(joined)),
                    Reply::Synced(waiter, _) => (waiter, None),
                };
                let n = waits.remove(&waiter);
                prop_assert!(n.is_some(), "answered twice");
                match joined.map(|it| (it.error, it)) {
                    Some((None, it)) => {
                        prop_assert!(it.generation >= newest);
                        newest = it.generation;
                        prop_assert_eq!(leaders.entry(it.generation).or_insert(it.leader.clone()), &it.leader);
                        members[n.unwrap()] = (it.member_id, it.generation);
                    }
                    Some((Some(_), _)) => members[n.unwrap()] = (String::new(), -1),
                    None => {}
                }
            }
        }
        prop_assert!(waits.is_empty(), "never answered: {waits:?}");
    }
}
