//! The embedded S3 server, spoken to by the real client.
#![allow(clippy::unwrap_used, reason = "a panic in a test is its message")]

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use aws_sdk_s3::{
    Client,
    config::{BehaviorVersion, Credentials, Region, retry::RetryConfig},
    error::SdkError,
    primitives::ByteStream,
    types::{ChecksumMode, CompletedMultipartUpload, CompletedPart, Delete, ObjectIdentifier},
};
use ledgerline::{
    embedded::{
        Health,
        s3::{Config, Error, Server, credentials},
    },
    secret::Secret,
    units::{Size, Span},
};

const PART: usize = 5 << 20;

fn config(dir: &Path) -> Config {
    Config {
        dir: dir.to_owned(),
        access_key_id: "someone".to_owned(),
        secret_access_key: Secret::new("something"),
        reserve: Size(1 << 20),
        ..Config::default()
    }
}

fn client_with(server: &Server, key: &str, secret: &str) -> Client {
    client_of(server.endpoint().as_str(), key, secret)
}

fn client_of(endpoint: &str, key: &str, secret: &str) -> Client {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .endpoint_url(endpoint)
        .credentials_provider(Credentials::new(key, secret, None, None, "test"))
        .force_path_style(true)
        .retry_config(RetryConfig::disabled());
    Client::from_conf(config.build())
}

async fn start(dir: &Path) -> (Server, Client) {
    let server = Server::start(config(dir)).await.unwrap();
    let client = client_with(&server, "someone", "something");
    (server, client)
}

fn status<T, E>(answer: &Result<T, SdkError<E>>) -> u16 {
    match answer {
        Ok(_) => 200,
        Err(error) => error.raw_response().map_or(0, |it| it.status().as_u16()),
    }
}

async fn put(client: &Client, key: &str, body: impl Into<Vec<u8>>) -> u16 {
    status(&client.put_object().bucket("lake").key(key).body(ByteStream::from(body.into())).send().await)
}

async fn get(client: &Client, key: &str) -> Option<Vec<u8>> {
    let answer = client.get_object().bucket("lake").key(key).checksum_mode(ChecksumMode::Enabled).send().await.ok()?;
    Some(answer.body.collect().await.unwrap().to_vec())
}

async fn keys(client: &Client, prefix: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut pages = client.list_objects_v2().bucket("lake").prefix(prefix).into_paginator().send();
    while let Some(page) = pages.next().await {
        keys.extend(page.unwrap().contents().iter().map(|it| it.key().unwrap().to_owned()));
    }
    keys
}

/// Bytes that differ everywhere and between seeds.
fn bytes(seed: usize, size: usize) -> Vec<u8> {
    (0..size).map(|place| (place.wrapping_mul(31).wrapping_add(place >> 8).wrapping_add(seed)) as u8).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_hundred_racing_conditional_puts_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    for size in [10, 100_000] {
        let key = format!("_log/topic/0/{size}.json");
        let racers: Vec<_> = (0..100)
            .map(|racer| {
                let request = client.put_object().bucket("lake").key(&key).if_none_match("*").body(ByteStream::from(bytes(racer, size)));
                tokio::spawn(async move { status(&request.send().await) })
            })
            .collect();
        let mut winner = None;
        for (racer, outcome) in racers.into_iter().enumerate() {
            match outcome.await.unwrap() {
                200 => assert_eq!(winner.replace(racer), None, "two winners"),
                other => assert_eq!(other, 412),
            }
        }
        assert_eq!(get(&client, &key).await, Some(bytes(winner.unwrap(), size)));
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_replacements_of_one_version_have_one_winner() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    let etag = client.put_object().bucket("lake").key("k").body(ByteStream::from_static(b"first")).send().await.unwrap().e_tag.unwrap();

    let racers: Vec<_> = (0..20)
        .map(|racer| {
            let request = client.put_object().bucket("lake").key("k").if_match(&etag).body(ByteStream::from(bytes(racer, 50)));
            tokio::spawn(async move { status(&request.send().await) })
        })
        .collect();
    let mut statuses = Vec::new();
    for racer in racers {
        statuses.push(racer.await.unwrap());
    }
    statuses.sort_unstable();

    assert_eq!(statuses[0], 200);
    assert!(statuses[1..].iter().all(|it| *it == 412), "{statuses:?}");
    assert_eq!(status(&client.put_object().bucket("lake").key("absent").if_match(&etag).send().await), 404);
    assert_eq!(status(&client.get_object().bucket("lake").key("k").if_none_match(&etag).send().await), 200);
    assert_eq!(status(&client.get_object().bucket("lake").key("k").if_match(&etag).send().await), 412);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_goes_on_from_page_to_page_and_from_any_key() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    let all: Vec<String> = (0..25).map(|it| format!("raw/accounts/dt=2026-11-{:02}/{it:020}.parquet", it / 10 + 1)).collect();
    for key in &all {
        assert_eq!(put(&client, key, "x").await, 200);
    }
    assert_eq!(put(&client, "other", "x").await, 200);

    let mut found = Vec::new();
    let mut pages = client.list_objects_v2().bucket("lake").prefix("raw/").into_paginator().page_size(4).send();
    while let Some(page) = pages.next().await {
        found.extend(page.unwrap().contents().iter().map(|it| it.key().unwrap().to_owned()));
    }
    assert_eq!(found, all);

    let behind = client.list_objects_v2().bucket("lake").prefix("raw/").start_after(&all[22]).send().await.unwrap();
    let behind: Vec<&str> = behind.contents().iter().filter_map(|it| it.key()).collect();
    assert_eq!(behind, [all[23].as_str(), all[24].as_str()]);

    let folded = client.list_objects_v2().bucket("lake").prefix("raw/accounts/").delimiter("/").max_keys(2).send().await.unwrap();
    let days: Vec<&str> = folded.common_prefixes().iter().filter_map(|it| it.prefix()).collect();
    assert_eq!(days, ["raw/accounts/dt=2026-11-01/", "raw/accounts/dt=2026-11-02/"]);
    let rest = client.list_objects_v2().bucket("lake").prefix("raw/accounts/").delimiter("/").continuation_token(folded.next_continuation_token().unwrap());
    let rest = rest.send().await.unwrap();
    assert_eq!(rest.common_prefixes()[0].prefix(), Some("raw/accounts/dt=2026-11-03/"));
    assert_eq!(rest.is_truncated(), Some(false));

    let old = client.list_objects().bucket("lake").delimiter("/").max_keys(1).send().await.unwrap();
    assert_eq!(old.next_marker(), Some("other"));
    let old = client.list_objects().bucket("lake").delimiter("/").marker("other").send().await.unwrap();
    assert_eq!(old.common_prefixes()[0].prefix(), Some("raw/"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_in_parts_survives_a_restart_and_becomes_one_object() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    let upload = client.create_multipart_upload().bucket("lake").key("big").metadata("k", "v").send().await.unwrap();
    let id = upload.upload_id().unwrap();
    let mut parts = Vec::new();
    for number in 1..=2 {
        let body = ByteStream::from(bytes(number, PART));
        let part = client.upload_part().bucket("lake").key("big").upload_id(id).part_number(number as i32).body(body).send().await.unwrap();
        parts.push(CompletedPart::builder().part_number(number as i32).set_e_tag(part.e_tag).build());
    }
    server.stop().await;

    let (server, client) = start(dir.path()).await;
    let listed = client.list_parts().bucket("lake").key("big").upload_id(id).send().await.unwrap();
    assert_eq!(listed.parts().iter().map(|it| it.size().unwrap()).collect::<Vec<_>>(), [PART as i64; 2]);
    assert_eq!(client.list_multipart_uploads().bucket("lake").send().await.unwrap().uploads().len(), 1);
    let last = client.upload_part().bucket("lake").key("big").upload_id(id).part_number(3).body(ByteStream::from_static(b"end")).send().await.unwrap();
    parts.push(CompletedPart::builder().part_number(3).set_e_tag(last.e_tag).build());
    assert_eq!(get(&client, "big").await, None, "visible before it is complete");
    let whole = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
    let done = client.complete_multipart_upload().bucket("lake").key("big").upload_id(id).multipart_upload(whole.clone()).send().await.unwrap();
    assert!(done.e_tag().unwrap().ends_with("-3\""));

    let expected = [bytes(1, PART), bytes(2, PART), b"end".to_vec()].concat();
    assert_eq!(get(&client, "big").await.as_deref(), Some(&expected[..]));
    let across = client.get_object().bucket("lake").key("big").range(format!("bytes={}-{}", PART - 3, PART + 2)).send().await.unwrap();
    assert_eq!(&across.body.collect().await.unwrap().to_vec()[..], &expected[PART - 3..PART + 3]);
    assert_eq!(client.head_object().bucket("lake").key("big").send().await.unwrap().metadata().unwrap()["k"], "v");
    let again = client.complete_multipart_upload().bucket("lake").key("big").upload_id(id).multipart_upload(whole).send().await;
    assert_eq!(status(&again), 404);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_nobody_finishes_is_dropped_at_a_later_start_and_an_aborted_one_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    let mut ids = Vec::new();
    for _ in 0..2 {
        let id = client.create_multipart_upload().bucket("lake").key("left").send().await.unwrap().upload_id.unwrap();
        let part = client.upload_part().bucket("lake").key("left").upload_id(&id).part_number(1).body(ByteStream::from(bytes(1, 9000)));
        part.send().await.unwrap();
        ids.push(id);
    }
    client.abort_multipart_upload().bucket("lake").key("left").upload_id(&ids[0]).send().await.unwrap();
    assert_eq!(status(&client.list_parts().bucket("lake").key("left").upload_id(&ids[0]).send().await), 404);
    server.stop().await;

    let server = Server::start(Config { upload_age_max: Span::from_millis(0), ..config(dir.path()) }).await.unwrap();
    let client = client_with(&server, "someone", "something");
    assert!(client.list_multipart_uploads().bucket("lake").send().await.unwrap().uploads().is_empty());
    server.stop().await;
    assert_eq!(files_below(&dir.path().join("blobs")), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_are_cut_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    for (key, size) in [("small", 5_000), ("large", 3_000_000)] {
        let whole = bytes(7, size);
        assert_eq!(put(&client, key, whole.clone()).await, 200);
        for (range, from, to) in [("bytes=10-19", 10, 20), ("bytes=4990-", 4990, size), ("bytes=-10", size - 10, size), ("bytes=0-99999999", 0, size)] {
            let part = client.get_object().bucket("lake").key(key).range(range).send().await.unwrap();
            assert_eq!(part.content_range(), Some(format!("bytes {from}-{}/{size}", to - 1).as_str()));
            assert!(part.body.collect().await.unwrap().to_vec() == whole[from..to], "{key} {range}");
        }
        assert_eq!(status(&client.get_object().bucket("lake").key(key).range(format!("bytes={size}-")).send().await), 416);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_not_what_was_meant_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    for size in [10, 2_000_000] {
        let request = || client.put_object().bucket("lake").key("bad").body(ByteStream::from(bytes(1, size)));
        assert_eq!(status(&request().checksum_crc32("AAAAAA==").send().await), 400);
        assert_eq!(status(&request().checksum_crc32_c("AAAAAA==").send().await), 400);
        assert_eq!(status(&request().checksum_sha256("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=").send().await), 400);
        assert_eq!(status(&request().content_md5("AAAAAAAAAAAAAAAAAAAAAA==").send().await), 400);
        assert_eq!(get(&client, "bad").await, None);
    }
    let good = client.put_object().bucket("lake").key("good").body(ByteStream::from(bytes(1, 2_000_000))).send().await.unwrap();
    let head = client.head_object().bucket("lake").key("good").checksum_mode(ChecksumMode::Enabled).send().await.unwrap();
    assert!(good.checksum_crc32().is_some());
    assert_eq!(good.checksum_crc32(), head.checksum_crc32());
    server.stop().await;
    assert_eq!(files_below(&dir.path().join("blobs")), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_key_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    let mut odd: Vec<String> = ["a b+c", "../../etc/passwd", "äöü/日本/🦀", "x//y", "q?a=b&c#d", "%2F%00", "<&>\"'", "dt=2026/", "."].map(str::to_owned).into();
    odd.push("long/".repeat(200));
    for (seed, key) in odd.iter().enumerate() {
        assert_eq!(put(&client, key, bytes(seed, 20)).await, 200, "{key:?}");
    }
    for (seed, key) in odd.iter().enumerate() {
        assert_eq!(get(&client, key).await, Some(bytes(seed, 20)), "{key:?}");
    }
    odd.sort();
    assert_eq!(keys(&client, "").await, odd);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_are_replaced_copied_and_deleted_without_leaving_files() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    for round in 0..3 {
        assert_eq!(put(&client, "a", bytes(round, 50_000)).await, 200);
    }
    client.copy_object().bucket("lake").key("b").copy_source("lake/a").send().await.unwrap();
    assert_eq!(status(&client.delete_object().bucket("lake").key("a").send().await), 200);
    assert_eq!(status(&client.delete_object().bucket("lake").key("a").send().await), 200);
    assert_eq!(get(&client, "b").await, Some(bytes(2, 50_000)));
    assert_eq!(put(&client, "c", "small").await, 200);
    client.copy_object().bucket("lake").key("d").copy_source("lake/c").send().await.unwrap();
    assert_eq!(get(&client, "d").await.unwrap(), b"small");

    let names = ["b", "c", "d", "never"].map(|key| ObjectIdentifier::builder().key(key).build().unwrap());
    let deleted = client.delete_objects().bucket("lake").delete(Delete::builder().set_objects(Some(names.into())).build().unwrap()).send().await.unwrap();
    assert_eq!((deleted.deleted().len(), deleted.errors().len()), (4, 0));
    assert!(keys(&client, "").await.is_empty());
    assert_eq!(status(&client.delete_bucket().bucket("lake").send().await), 200);
    assert_eq!(status(&client.head_bucket().bucket("lake").send().await), 404);
    server.stop().await;
    assert_eq!(files_below(&dir.path().join("blobs")), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_given_credentials_open_it() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    assert_eq!(status(&client.list_buckets().send().await), 200);
    assert_eq!(status(&client_with(&server, "someone", "wrong").list_buckets().send().await), 403);
    let stranger = client_with(&server, "stranger", "something");
    assert_eq!(status(&stranger.put_object().bucket("lake").key("k").body(ByteStream::from_static(b"x")).send().await), 403);
    assert_eq!(status(&client.get_object().bucket("lake").key("k").send().await), 404);
    assert_eq!(status(&client.list_objects_v2().bucket("none").send().await), 404);
    assert_eq!(status(&client.create_bucket().bucket("lake").send().await), 409);
    let location = client.get_bucket_location().bucket("lake").send().await.unwrap();
    assert_eq!(location.location_constraint().map_or("", |it| it.as_str()), "");
    server.stop().await;
}

#[test]
fn credentials_are_made_once_and_only_ours_to_read() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("s3");
    let (id, key) = credentials(&place).unwrap();
    assert!(id.len() == 20 && key.reveal().len() == 40);
    assert_eq!(credentials(&place).unwrap(), (id.clone(), key));
    assert_ne!(credentials(&dir.path().join("other")).unwrap().0, id);
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(place.join("credentials")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_server_at_a_time_owns_a_directory_and_its_port() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    let port = server.endpoint().port().unwrap();
    assert_eq!(put(&client, "k", bytes(1, 20_000)).await, 200);
    assert!(matches!(Server::start(config(dir.path())).await, Err(Error::InUse { .. })));
    let other = tempfile::tempdir().unwrap();
    assert!(matches!(Server::start(Config { port, ..config(other.path()) }).await, Err(Error::Port { .. })));
    server.stop().await;

    let (server, client) = start(dir.path()).await;

    assert_eq!(server.endpoint().port(), Some(port));
    assert_eq!(get(&client, "k").await, Some(bytes(1, 20_000)));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_room_refuses_what_grows_and_lets_space_be_freed() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    assert_eq!(put(&client, "k", bytes(1, 20_000)).await, 200);
    server.stop().await;

    let server = Server::start(Config { reserve: Size(u64::MAX), ..config(dir.path()) }).await.unwrap();
    let client = client_with(&server, "someone", "something");
    assert_eq!(put(&client, "small", "x").await, 503);
    assert_eq!(put(&client, "large", bytes(1, 20_000)).await, 503);
    assert!(matches!(&*server.health().borrow(), Health::Ailing(reason) if reason.contains("full")));
    assert_eq!(get(&client, "k").await, Some(bytes(1, 20_000)));
    assert_eq!(status(&client.delete_object().bucket("lake").key("k").send().await), 200);
    server.stop().await;
    assert_eq!(files_below(&dir.path().join("blobs")), 0);
}

/// The same test in two roles: as a child it serves until it is killed.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_before_a_kill_is_whole_afterwards() {
    const CHILD: &str = "LEDGERLINE_TEST_S3_CHILD";
    if let Some(dir) = std::env::var_os(CHILD) {
        let server = Server::start(config(Path::new(&dir))).await.unwrap();
        std::fs::write(Path::new(&dir).join("ready"), server.endpoint().as_str()).unwrap();
        std::future::pending::<()>().await;
    }
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    let mut acknowledged = Vec::new();
    for round in 0..4 {
        let _ = std::fs::remove_file(&ready);
        let this = "s3::what_was_acknowledged_before_a_kill_is_whole_afterwards";
        let child = Command::new(std::env::current_exe().unwrap()).args([this, "--exact"]).env(CHILD, dir.path()).stdout(Stdio::null()).spawn();
        let mut child = child.unwrap();
        let endpoint = tokio::time::timeout(Duration::from_secs(60), async {
            loop {
                match std::fs::read_to_string(&ready) {
                    Ok(text) if !text.is_empty() => break text,
                    _ => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        });
        let client = client_of(&endpoint.await.unwrap(), "someone", "something");
        let writers: Vec<_> = (0..8)
            .map(|writer| {
                let client = client.clone();
                tokio::spawn(async move {
                    let mut done = Vec::new();
                    for count in 0.. {
                        let (key, size) = (format!("{round}/{writer}/{count}"), [30, 9_000, 300_000][count % 3]);
                        if put(&client, &key, bytes(count, size)).await != 200 {
                            return done;
                        }
                        done.push((key, count, size));
                    }
                    done
                })
            })
            .collect();
        while keys(&client, &format!("{round}/")).await.len() < 40 + 25 * round {}
        child.kill().unwrap();
        child.wait().unwrap();
        for writer in writers {
            acknowledged.extend(writer.await.unwrap());
        }
    }

    let (server, client) = start(dir.path()).await;
    for (key, seed, size) in &acknowledged {
        assert!(get(&client, key).await.as_ref() == Some(&bytes(*seed, *size)), "{key} is not as it was acknowledged");
    }
    let all = keys(&client, "").await;
    assert!(all.len() >= acknowledged.len());
    for key in &all {
        let count: usize = key.rsplit('/').next().unwrap().parse().unwrap();
        assert!(get(&client, key).await == Some(bytes(count, [30, 9_000, 300_000][count % 3])), "{key} is half visible");
    }
    server.stop().await;

    let in_files = all.iter().filter(|key| !key.rsplit('/').next().unwrap().parse::<usize>().unwrap().is_multiple_of(3)).count();
    // The sweep runs beside the service: a stop may have cut it short, so look until it has been through once.
    tokio::time::timeout(Duration::from_secs(30), async {
        while files_below(&dir.path().join("blobs")) != in_files {
            start(dir.path()).await.0.stop().await;
        }
    })
    .await
    .expect("files that a crash left behind are removed");
}

fn files_below(dir: &Path) -> usize {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            if path.is_dir() { files_below(&path) } else { 1 }
        })
        .sum()
}
