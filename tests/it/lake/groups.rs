//! Several sinks, as processes, share the partitions of one consumer group.

use std::{path::Path, process::Command};

use super::house::*;
use crate::binary::{Bank, Running};

/// A sink with a folder of its own, in the group and on the servers of `house`.
fn sink(house: &House, folder: &Path) -> Running {
    std::fs::create_dir_all(folder).expect("a folder");
    let bank = Bank::at(folder);
    bank.configure("");
    let access = house.access();
    let mut command: Command = bank.command(&["sink"]);
    command.envs([
        ("LEDGERLINE__CDC__TOPIC_PREFIX", house.stream.prefix.clone()),
        ("LEDGERLINE__STREAM__BOOTSTRAP_SERVERS", house.kafka()),
        ("LEDGERLINE__LAKE__ENDPOINT", access.endpoint.as_ref().expect("an address").to_string()),
        ("LEDGERLINE__LAKE__BUCKET", access.bucket),
        ("LEDGERLINE__LAKE__ACCESS_KEY_ID", access.access_key_id),
        ("LEDGERLINE__LAKE__SECRET_ACCESS_KEY", access.secret_access_key.reveal().to_owned()),
        ("LEDGERLINE__LAKE__GROUP", house.group("shared")),
        ("LEDGERLINE__LAKE__AGE_MAX", "100ms".to_owned()),
    ]);
    Running::of(&bank, command)
}

const PARTITIONS: i64 = 8;
const PART: i64 = 400;

/// The next so many numbers into every partition.
async fn traffic(house: &House, round: i64) {
    for partition in 0..PARTITIONS {
        let first = (round * PARTITIONS + partition) * PART;
        produce(&house.kafka(), &house.customers, i32::try_from(partition).expect("small"), first..first + PART).await;
    }
}

async fn landed_so_far(house: &House, rounds: i64) {
    let wanted = u64::try_from(rounds * PARTITIONS * PART).expect("positive");
    let started = std::time::Instant::now();
    loop {
        let proof = house.proof().await;
        let landed: u64 = proof.lanes.iter().map(|it| it.rows).sum();
        if landed == wanted {
            return;
        }
        assert!(started.elapsed() < WAIT, "{landed} of {wanted} records landed");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sinks_of_one_group_share_the_partitions_and_stay_exact_when_one_is_killed_one_is_added_and_one_is_stopped() {
    let house = House::open().await;
    house.create(&house.customers, i32::try_from(PARTITIONS).expect("small")).await;
    let folders = tempfile::tempdir().expect("a folder");
    let start = |name: &str| sink(&house, &folders.path().join(name));

    let mut sinks = [start("one"), start("two"), start("three")];
    for sink in &mut sinks {
        // A member that was there first gives some of its lanes away: what it keeps is more than nothing.
        tokio::task::block_in_place(|| sink.until_said(&["lane is read"]));
    }
    traffic(&house, 0).await;
    landed_so_far(&house, 1).await;

    let [mut killed, mut stopped, mut stays] = sinks;
    tokio::join!(traffic(&house, 1), async { killed.kill_tree() });
    let mut added = start("four");
    tokio::task::block_in_place(|| added.until_said(&["lane is read"]));
    traffic(&house, 2).await;
    landed_so_far(&house, 3).await;

    let (_, ended) = tokio::join!(traffic(&house, 3), async {
        stopped.signal("-TERM");
        tokio::task::block_in_place(|| stopped.wait())
    });
    assert_eq!(ended, Some(130), "{}", stopped.said());
    landed_so_far(&house, 4).await;
    tokio::task::block_in_place(|| {
        stays.end();
        added.end();
    });

    assert_eq!(house.proof().await.findings, []);
    assert_eq!(values_of(&house.landed().await), expected(0..4 * PARTITIONS * PART));
}
