//! The listeners of the real Kafka that encrypt, and that ask who comes: what is sent arrives and lands, and who is refused
//! is told why and what to set.

use ledgerline::{
    dlq::{self, Filter},
    fault::{Diagnose as _, Fault},
    lake::{self, Config as Lake},
    secret::Secret,
    stage::{self, Phase},
    stream::{
        Access, Config, Mechanism, Protocol,
        producer::{Outgoing, Producer, Receipt},
        range, topics,
    },
};
use tokio_util::sync::CancellationToken;

use super::house::{House, WAIT};
use crate::lane::Stack;

fn access(stack: &Stack, listener: &str, config: Config, password: &str) -> Access {
    let config = Config { bootstrap_servers: stack.address(listener), ..config };
    Access::new(&config, Some(&Secret::new(password)), "/".as_ref()).expect("this build can do it")
}

fn signed_in(stack: &Stack, mechanism: Mechanism) -> Config {
    Config {
        security_protocol: Protocol::SaslSsl,
        sasl_mechanism: mechanism,
        sasl_username: "ledgerline".to_owned(),
        ca_file: stack.address("KAFKA_CA").into(),
        ..Config::default()
    }
}

fn stack() -> &'static Stack {
    crate::lane::stack().expect("these tests are of the real servers' lane")
}

/// What a client that may not come in is told: why, and the remedy.
async fn refusal(access: Access) -> (String, String) {
    let error = topics::Topics::connect(access).expect("a client").partitions().await.expect_err("refused");
    let Fault::Operator(remedy) = error.fault() else { panic!("no remedy: {error}") };
    (error.to_string(), remedy)
}

async fn send(access: &Access, topic: &str) {
    let producer = Producer::new(access, 1 << 20).expect("a producer");
    let receipt = Receipt::open();
    let value = Some(&br#"{"op":"c"}"#[..]);
    let outgoing = Outgoing { topic, partition: Some(0), key: None, value, headers: None, timestamp_ms: chrono::Utc::now().timestamp_millis() };
    producer.send(outgoing, &receipt).await.expect("queued");
    producer.seal(&receipt);
    tokio::time::timeout(WAIT, producer.acked(&receipt)).await.expect("in time").expect("acknowledged");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_in_carries_records_to_the_lake() {
    let (stack, house) = (stack(), House::open().await);
    let password = stack.address("KAFKA_PASSWORD");
    house.create(&house.customers, 1).await;
    let with_certificate = Config {
        security_protocol: Protocol::Ssl,
        certificate_file: stack.address("KAFKA_CLIENT").into(),
        key_file: stack.address("KAFKA_CLIENT").into(),
        ..signed_in(stack, Mechanism::Plain)
    };
    let plain = Config { security_protocol: Protocol::SaslPlaintext, ..signed_in(stack, Mechanism::Plain) };
    let ways = [
        access(stack, "KAFKA_SASL_SSL", signed_in(stack, Mechanism::Plain), &password),
        access(stack, "KAFKA_SASL_SSL", signed_in(stack, Mechanism::ScramSha256), &password),
        access(stack, "KAFKA_SASL_SSL", signed_in(stack, Mechanism::ScramSha512), &password),
        access(stack, "KAFKA_SSL", with_certificate, ""),
        access(stack, "KAFKA_SASL_PLAINTEXT", plain, &password),
    ];
    for (offset, way) in (0_i64..).zip(&ways) {
        send(way, &house.customers).await;
        assert_eq!(range::newest(way, &house.customers, 1).await.expect("read")[0].offset, offset);
        let (handle, control) = stage::control(lake::Stats::default(), Phase::Running, &CancellationToken::new());
        let config = Lake { group: house.group(&offset.to_string()), ..house.config() };
        let sink = tokio::spawn(lake::run(house.store().await, way.clone(), house.topics(), config, control));
        let mut stats = handle.stats.clone();
        let landed = stats.wait_for(|it| it.lanes.iter().any(|it| it.landed_offset == Some(offset + 1)));
        drop(tokio::time::timeout(WAIT, landed).await.expect("it lands in time").expect("the sink runs"));
        handle.stop.cancel();
        sink.await.expect("no panic").expect("a clean stop");
    }
    assert_eq!(house.proof().await.findings, []);
    assert_eq!(house.landed().await.len(), ways.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_refused_is_told_why_and_what_to_set() {
    let stack = stack();
    let password = stack.address("KAFKA_PASSWORD");

    let (why, remedy) = refusal(access(stack, "KAFKA_SASL_SSL", signed_in(stack, Mechanism::ScramSha512), "hunter2")).await;
    assert!(why.contains("invalid credentials") && !why.contains("hunter2"), "{why}");
    assert!(remedy.contains("stream.sasl_username") && remedy.contains("LEDGERLINE__STREAM__SASL_PASSWORD"), "{remedy}");

    let untrusted = Config { ca_file: "".into(), ..signed_in(stack, Mechanism::ScramSha512) };
    let (why, remedy) = refusal(access(stack, "KAFKA_SASL_SSL", untrusted, &password)).await;
    assert!(why.contains("certificate verify failed") && remedy.contains("stream.ca_file"), "{why} {remedy}");

    let unknown = Config { security_protocol: Protocol::SaslPlaintext, ..signed_in(stack, Mechanism::ScramSha512) };
    let (why, remedy) = refusal(access(stack, "KAFKA_SASL_PLAINTEXT", unknown, &password)).await;
    assert!(why.contains("supported mechanisms: PLAIN") && remedy.contains("stream.sasl_mechanism"), "{why} {remedy}");

    let nobody = Config { security_protocol: Protocol::Ssl, ..signed_in(stack, Mechanism::Plain) };
    let (why, remedy) = refusal(access(stack, "KAFKA_SSL", nobody, "")).await;
    assert!(why.contains("certificate") && remedy.contains("stream.certificate_file"), "{why} {remedy}");

    let plain = Config { security_protocol: Protocol::Plaintext, ..signed_in(stack, Mechanism::Plain) };
    let wrong = topics::Topics::connect(access(stack, "KAFKA_SASL_SSL", plain, "")).expect("a client").partitions().await.expect_err("refused");
    assert!(wrong.to_string().contains("stream.security_protocol"), "{wrong}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_may_sign_in_and_no_more_is_told_what_is_missing() {
    let (stack, house) = (stack(), House::open().await);
    house.create(&house.topic("dead_letters"), 1).await;
    let guest = Config { sasl_username: "guest".to_owned(), ..signed_in(stack, Mechanism::ScramSha256) };
    let guest = access(stack, "KAFKA_SASL_SSL", guest, &stack.address("KAFKA_PASSWORD"));

    let error = dlq::list(&guest, &house.topics(), &Filter::default(), 1, false).await.expect_err("not allowed");

    assert!(matches!(error.fault(), Fault::Operator(remedy) if remedy.contains("allow this user")), "{error}");
}
