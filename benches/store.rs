//! The embedded S3 server against what its disk can do: puts of 4 and 64 KiB that are durable before the answer, and lists.
//!
//! `cargo bench --bench store`. Each figure stands beside the same bytes written to plain files, created and synced one by one,
//! with as many writers; only the ratio travels from machine to machine.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a bench prints its figures, and a panic is its message")]

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use aws_sdk_s3::{
    Client,
    config::{BehaviorVersion, Credentials, Region},
    primitives::ByteStream,
};
use ledgerline::{
    embedded::s3::{Config, Server},
    secret::Secret,
};

const TIME: Duration = Duration::from_secs(3);
const KEYS: usize = 20_000;

#[tokio::main]
async fn main() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let config = Config { dir: dir.path().join("s3"), access_key_id: "bench".to_owned(), secret_access_key: Secret::new("bench"), ..Config::default() };
    let server = Server::start(config).await.unwrap();
    let client = client(&server);
    println!("{:<12}{:>9}{:>14}{:>14}{:>8}", "puts", "writers", "files/s", "objects/s", "ratio");
    for size in [4 << 10, 64 << 10] {
        for writers in [1, 16] {
            let plain = files_per_second(&dir.path().join("plain"), size, writers).await;
            let puts = puts_per_second(&client, size, writers).await;
            println!("{:<12}{writers:>9}{plain:>14.0}{puts:>14.0}{:>8.2}", format!("{} KiB", size >> 10), puts / plain);
        }
    }
    list(&client).await;
    server.stop().await;
}

fn client(server: &Server) -> Client {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .endpoint_url(server.endpoint().as_str())
        .credentials_provider(Credentials::new("bench", "bench", None, None, "bench"))
        .force_path_style(true);
    Client::from_conf(config.build())
}

/// Files created, written and synced, by threads of their own.
async fn files_per_second(dir: &Path, size: usize, writers: usize) -> f64 {
    std::fs::create_dir_all(dir).unwrap();
    let started = Instant::now();
    let writing = (0..writers).map(|writer| {
        let dir = dir.to_owned();
        tokio::task::spawn_blocking(move || {
            let body = vec![7; size];
            let mut count = 0_u32;
            while started.elapsed() < TIME {
                let mut file = File::create(dir.join(format!("{size}-{writers}-{writer}-{count}"))).unwrap();
                file.write_all(&body).unwrap();
                file.sync_data().unwrap();
                count += 1;
            }
            count
        })
    });
    rate(writing.collect(), started).await
}

async fn puts_per_second(client: &Client, size: usize, writers: usize) -> f64 {
    let started = Instant::now();
    let body = bytes::Bytes::from(vec![7; size]);
    let writing = (0..writers).map(|writer| {
        let (client, body) = (client.clone(), body.clone());
        tokio::spawn(async move {
            let mut count = 0_u32;
            while started.elapsed() < TIME {
                let key = format!("puts/{size}-{writers}-{writer}-{count}");
                client.put_object().bucket("lake").key(key).body(ByteStream::from(body.clone())).send().await.unwrap();
                count += 1;
            }
            count
        })
    });
    rate(writing.collect(), started).await
}

async fn rate(writing: Vec<tokio::task::JoinHandle<u32>>, started: Instant) -> f64 {
    let mut count = 0;
    for writer in writing {
        count += writer.await.unwrap();
    }
    f64::from(count) / started.elapsed().as_secs_f64()
}

async fn list(client: &Client) {
    let room = Arc::new(tokio::sync::Semaphore::new(64));
    let mut putting = Vec::new();
    for count in 0..KEYS {
        let (client, permit) = (client.clone(), Arc::clone(&room).acquire_owned().await.unwrap());
        putting.push(tokio::spawn(async move {
            let key = format!("list/dt=2026-11-22/p=0/{count:020}.parquet");
            client.put_object().bucket("lake").key(key).body(ByteStream::from_static(b"x")).send().await.unwrap();
            drop(permit);
        }));
    }
    for put in putting {
        put.await.unwrap();
    }
    let started = Instant::now();
    let (mut keys, mut pages) = (0, client.list_objects_v2().bucket("lake").prefix("list/").into_paginator().send());
    while let Some(page) = pages.next().await {
        keys += page.unwrap().contents().len();
    }
    assert_eq!(keys, KEYS);
    println!("list        {:>9.0} keys/s, parsing by the client included", KEYS as f64 / started.elapsed().as_secs_f64());
}
