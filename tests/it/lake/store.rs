//! The store at its start and under bad weather: what is refused with which words, and what is tried again.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use ledgerline::{
    fault::{Diagnose as _, Fault},
    lake::{Access, Error, Put, Store},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use url::Url;

use super::house::*;

/// What a store that stands between does with the bytes of a request's first read.
enum Answer {
    Pass,
    Say(String),
}

/// Stands before a store and has a word in every request; connections are for one request each.
async fn before(store: Url, word: impl Fn(&str) -> Answer + Send + Sync + 'static) -> Url {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = Url::parse(&format!("http://{}", listener.local_addr().expect("an address"))).expect("a URL");
    let (port, word) = (store.port().expect("a port"), Arc::new(word));
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let word = Arc::clone(&word);
            tokio::spawn(async move {
                let mut buffer = vec![0; 64 * 1024];
                let n_bytes = client.read(&mut buffer).await.unwrap_or(0);
                buffer.truncate(n_bytes);
                let first = match word(&String::from_utf8_lossy(&buffer)) {
                    Answer::Pass => buffer,
                    Answer::Say(answer) => {
                        let _ = client.write_all(answer.as_bytes()).await;
                        return;
                    }
                };
                let mut server = TcpStream::connect(("127.0.0.1", port)).await.expect("the store listens");
                if server.write_all(&first).await.is_ok() {
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                }
            });
        }
    });
    endpoint
}

/// The house's own store, to stand before.
fn store_of(house: &House) -> Url {
    house.lake.access.endpoint.clone().expect("it has an address")
}

fn at(house: &House, endpoint: Url) -> Access {
    Access { endpoint: Some(endpoint), ..house.access() }
}

fn answer(status: &str, header: &str, code: &str) -> Answer {
    let body = if code.is_empty() { String::new() } else { format!("<Error><Code>{code}</Code><Message>as a store says it</Message></Error>") };
    Answer::Say(format!("HTTP/1.1 {status}\r\n{header}content-type: application/xml\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len()))
}

fn slow_down() -> Answer {
    answer("503 Slow Down", "", "SlowDown")
}

async fn checks(store: &Store) -> usize {
    store.list("_check/", None, 10).await.expect("the store answers").objects.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_honours_conditions_is_taken_and_nothing_of_the_check_stays() {
    let house = House::own().await;
    let (one, other) = tokio::join!(house.store(), house.store());
    assert_eq!((checks(&one).await, checks(&other).await), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_ignores_conditions_is_refused_with_the_reason_and_the_check_cleans_up_behind_it() {
    let house = House::own().await;
    house.store().await;
    let deletions = Arc::new(AtomicUsize::new(0));
    let deleted = Arc::clone(&deletions);
    let deaf = before(store_of(&house), move |request| {
        deleted.fetch_add(usize::from(request.starts_with("DELETE /lake/_check/")), Ordering::SeqCst);
        // It closes after each answer, so that it hears each request.
        answer("200 OK", "etag: \"0\"\r\n", "")
    });
    let error = Store::connect(&at(&house, deaf.await)).await.expect_err("refused");
    let Fault::Operator(remedy) = error.fault() else { panic!("{error:?}") };
    assert!(matches!(error, Error::NotWriteOnce(_)) && error.to_string().contains("If-None-Match") && remedy.contains("conditional writes"), "{error:?}");
    assert_eq!(deletions.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_is_created_where_that_is_allowed_and_told_where_not() {
    let house = House::own().await;
    let made = Access { bucket: "another-lake".to_owned(), ..house.access() };
    Store::connect(&made).await.expect("created");
    assert!(Store::open(&made).await.expect("a client").list("", None, 1).await.expect("it is there").objects.is_empty());

    let told = async |answer: fn(&str) -> Answer| {
        let error = Store::connect(&at(&house, before(store_of(&house), answer).await)).await.expect_err("refused");
        let Fault::Operator(remedy) = error.fault() else { panic!("{error:?}") };
        format!("{error} {remedy}")
    };
    let absent = told(|request| match request.starts_with("HEAD") {
        true => answer("404 Not Found", "", ""),
        false => answer("403 Forbidden", "", "AccessDenied"),
    })
    .await;
    assert!(absent.contains("bucket lake does not exist") && absent.contains("aws s3 mb s3://lake"), "{absent}");
    let elsewhere = told(|_| answer("301 Moved Permanently", "x-amz-bucket-region: eu-central-1\r\n", "")).await;
    assert!(elsewhere.contains("eu-central-1") && elsewhere.contains("lake.region"), "{elsewhere}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_asks_to_slow_down_is_asked_again_later() {
    let house = House::own().await;
    house.store().await;
    let (refused, asked) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (refusals, requests) = (Arc::clone(&refused), Arc::clone(&asked));
    let busy = before(store_of(&house), move |request| {
        if !request.starts_with("PUT /lake/slow") {
            return Answer::Pass;
        }
        requests.fetch_add(1, Ordering::SeqCst);
        match refusals.fetch_add(1, Ordering::SeqCst) {
            0 => slow_down(),
            1 => answer("429 Too Many Requests", "retry-after: 10\r\n", "TooManyRequests"),
            _ => Answer::Pass,
        }
    });
    let store = Store::open(&at(&house, busy.await)).await.expect("a client");
    assert_eq!(store.put_if_absent("slow", Bytes::from_static(b"written")).await.expect("in the end"), Put::Written);
    assert_eq!(asked.load(Ordering::SeqCst), 3);
    // One that keeps saying so is away, which stages wait out.
    let always = before(store_of(&house), |_| slow_down()).await;
    let error = Store::open(&at(&house, always)).await.expect("a client").put("slow", Bytes::new()).await.expect_err("away");
    assert!(matches!(error.fault(), Fault::Transient) && format!("{error:?}").contains("SlowDown"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_object_goes_up_in_parts_and_is_the_same() {
    const BYTES: usize = 40 << 20;
    let house = House::own().await;
    house.store().await;
    let parts = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&parts);
    let watched = before(store_of(&house), move |request| {
        seen.fetch_add(usize::from(request.contains("partNumber=")), Ordering::SeqCst);
        Answer::Pass
    });
    let store = Store::open(&at(&house, watched.await)).await.expect("a client");
    let body: Bytes = (0_u32..).flat_map(|it| it.wrapping_mul(2_654_435_761).to_be_bytes()).take(BYTES).collect();
    store.put("large", body.clone()).await.expect("put");
    assert!(house.store().await.get("large").await.expect("answers").is_some_and(|it| it == body));
    // Connections are kept, so of the three parts some are seen as the first request of theirs.
    assert!((1..=3).contains(&parts.load(Ordering::SeqCst)));
    assert_eq!(store.list("large", None, 1).await.expect("answers").objects[0].bytes, BYTES as u64);
}
