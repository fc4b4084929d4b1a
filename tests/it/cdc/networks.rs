//! Networks on their bad days, to PostgreSQL and to the broker: noticed, waited out, and nothing is lost.

use std::{collections::BTreeSet, time::Duration};

use ledgerline::{
    cdc::{self, Config, SnapshotEnds, Step},
    fault::{Diagnose as _, Fault},
    stream::producer::QUEUE_MESSAGES,
};

use super::{
    days::{PAYMENTS, finish, held, parsed, replayed, write_payments},
    house::{Capture, Database, PATIENCE, Read, Reader, config},
    network::Network,
};
use crate::lane::Stream;

/// A database whose server gives up a silent client soon; the capture reads the same limit from it.
async fn brisk_database(test: &str, limit: &str) -> Database {
    let database = Database::create(test).await;
    database.run(PAYMENTS).await;
    database.run(&format!("alter database {} set wal_sender_timeout = '{limit}';", database.name)).await;
    database
}

/// A capture that streams, with a network on one side of it.
struct Scene {
    database: Database,
    stream: Stream,
    config: Config,
    network: Network,
    capture: Capture,
}

impl Scene {
    /// The network is between the capture and its database.
    async fn streaming(test: &str, limit: &str) -> Self {
        let database = brisk_database(test, limit).await;
        let (stream, config) = own_broker(&database).await;
        let network = Network::to(port(&database)).await;
        let capture = Capture::start_as(&network.url(&database.url), &database, stream.address.clone(), config.clone());
        capture.until("streaming", |it| it.step == Step::Streaming).await;
        Self { database, stream, config, network, capture }
    }

    /// The network is between the capture and its broker.
    async fn far_from_its_broker(database: Database) -> Self {
        let (stream, config) = own_broker(&database).await;
        let network = Network::to_broker(&stream.address).await;
        let capture = Capture::start(&database, network.address(), config.clone());
        capture.until("streaming", |it| it.step == Step::Streaming).await;
        Self { database, stream, config, network, capture }
    }

    async fn until_streaming_again(&self) {
        self.capture.until("streaming again", |it| it.step == Step::Streaming && it.reconnects > 0).await;
    }

    /// The topic tells what the table holds.
    async fn ends_whole(self) {
        self.capture.drain(&self.database).await;
        assert_eq!(replayed(&payments(&self.stream, &self.config)).0, held(&self.database).await);
        self.capture.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_a_firewall_forgets_are_given_up_though_both_ends_look_open() {
    let scene = Scene::streaming("forgotten", "5s").await;
    let Scene { database, network, capture, .. } = &scene;
    let writer = write_payments(database.url.clone(), 1..2_000);
    capture.until("transactions", |it| it.transactions > 20).await;

    network.forget();
    let waiting = capture.until("the loss is noticed", |it| it.reconnects > 0).await;
    let said = waiting.waiting_for.unwrap_or_default();
    assert!(said.contains("the network did not say"), "{said}");
    scene.until_streaming_again().await;

    finish(writer).await;
    scene.ends_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_walsender_that_does_not_know_we_are_gone_is_told_so_and_the_slot_is_ours_again() {
    // For so long the server would keep the slot for the connection that is dead.
    let scene = Scene::streaming("held", "1h").await;
    let Scene { database, network, .. } = &scene;
    network.hang_up_on_clients();
    database.run("insert into payments values (1, 1.00, 'x');").await;
    scene.until_streaming_again().await;
    scene.ends_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_to_postgresql_that_is_cut_without_a_word_is_noticed_and_nothing_is_lost() {
    let scene = Scene::streaming("silent", "5s").await;
    let Scene { database, network, capture, .. } = &scene;
    let writer = write_payments(database.url.clone(), 1..2_000);
    // So it has heard, too, how long the server bears silence.
    capture.until("transactions", |it| it.transactions > 20 && it.slot.is_some()).await;

    network.still();
    capture.until("the silence is noticed", |it| it.waiting_for.as_ref().is_some_and(|it| it.contains("silent for"))).await;
    network.forget();
    network.flow();
    scene.until_streaming_again().await;

    finish(writer).await;
    scene.ends_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_a_cut_network_leaves_hanging_is_given_up_and_begun_again() {
    let database = brisk_database("hanging", "5s").await;
    database.run("insert into payments select id, 7.00, repeat('x', 100) from generate_series(1, 30000) id;").await;
    let (stream, config) = own_broker(&database).await;
    let network = Network::to(port(&database)).await;
    let source = network.url(&database.url);
    network.slow(Some(1_000_000));
    let capture = Capture::start_as(&source, &database, stream.address.clone(), config.clone());
    capture.until("rows are read", |it| it.step == Step::Snapshot && it.snapshot.as_ref().is_some_and(|it| it.rows > 0)).await;

    network.still();
    let error = capture.ended().await.expect_err("it gives up");
    assert!(error.fault() == Fault::Transient && error.to_string().contains("silent"), "{error}");
    network.forget();
    network.flow();
    network.slow(None);

    let capture = Capture::start_as(&source, &database, stream.address.clone(), config.clone());
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    until_read(&database, &config).await;
    let ids: BTreeSet<u64> = of_payments(&stream, &config).into_iter().collect();
    assert_eq!(ids, (1..=30_000).collect());
    capture.stop().await;
}

/// Waits until all rows from before are with the broker.
pub(super) async fn until_read(database: &Database, config: &Config) -> SnapshotEnds {
    let read = async {
        loop {
            match cdc::snapshot_ends(&database.url, &config.topic_prefix).await.expect("asked") {
                Some(ends) => return ends,
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect("the snapshot is finished")
}

/// Longer than the server bears silence, by the server's own clock: `LEDGERLINE_TEST_OUTAGE` for so many seconds.
async fn outage(database: &Database) {
    const ALIVE: &str =
        "select count(*) from pg_stat_replication r join pg_replication_slots s on s.active_pid = r.pid where s.slot_name = $1 and r.reply_time > $2";
    let seconds: f64 = std::env::var("LEDGERLINE_TEST_OUTAGE").ok().and_then(|it| it.parse().ok()).unwrap_or(5.0);
    let mut connection = database.connect().await;
    let until: chrono::DateTime<chrono::Utc> =
        sqlx::query_scalar("select clock_timestamp() + make_interval(secs => $1)").bind(seconds).fetch_one(&mut connection).await.expect("a time");
    // The walsender hears of us even then, or it would have left.
    while sqlx::query_scalar::<_, i64>(ALIVE).bind(&database.name).bind(until).fetch_one(&mut connection).await.expect("the server answers") == 0 {
        let now: chrono::DateTime<chrono::Utc> = sqlx::query_scalar("select clock_timestamp()").fetch_one(&mut connection).await.expect("a time");
        assert!(now < until + chrono::TimeDelta::seconds(30), "the walsender hears nothing from us");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_behind_a_cut_network_is_waited_for_with_the_slot_alive_a_bounded_queue_and_the_order_kept() {
    const ROWS: u64 = 80_000;
    let Scene { database, stream, config, network, capture } = Scene::far_from_its_broker(brisk_database("distant", "2s").await).await;
    database.run("insert into payments values (1, 1.00, 'before');").await;
    capture.drain(&database).await;

    network.still();
    database.run(&format!("insert into payments select id, 1.00, 'x' from generate_series(2, {ROWS}) id;")).await;
    let full = capture.until("a full queue", |it| it.queued >= QUEUE_MESSAGES * 4 / 5).await;
    outage(&database).await;
    let later = capture.handle.stats.borrow().clone();
    assert!(later.queued <= QUEUE_MESSAGES && later.reconnects == 0 && later.confirmed_lsn < database.wal_position().await, "{later:?}");
    assert!(later.n_events() <= full.n_events() + QUEUE_MESSAGES, "it reads on though nobody takes it: {} {}", full.n_events(), later.n_events());
    network.flow();

    let stats = capture.drain(&database).await;
    assert_eq!(stats.reconnects, 0, "the walsender did not give us up");
    let ids: Vec<u64> = of_payments(&stream, &config);
    assert_eq!(ids, (1..=ROWS).collect::<Vec<_>>(), "each once, in order");
    capture.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_the_broker_that_a_firewall_forgets_are_told_and_given_up_and_the_stream_goes_on() {
    let database = Database::create("forgetful").await;
    database.run(PAYMENTS).await;
    let Scene { database, stream, config, network, capture } = Scene::far_from_its_broker(database).await;
    database.run("insert into payments values (1, 1.00, 'before');").await;
    capture.drain(&database).await;

    network.forget();
    database.run("insert into payments select id, 1.00, 'behind' from generate_series(2, 500) id;").await;
    capture.until("the silence is told", |it| it.broker_away && it.queued > 0).await;
    let stats = capture.drain(&database).await;
    assert_eq!((stats.reconnects, stats.dead_letters), (0, 0), "the source has nothing to do with it");
    capture.until("it is there again", |it| !it.broker_away).await;
    assert_eq!(of_payments(&stream, &config), (1..=500).collect::<Vec<_>>(), "each once, in order");
    capture.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_broker_makes_the_capture_slow_and_nothing_else() {
    const ROWS: u64 = 20_000;
    let Scene { database, stream, config, network, capture } = Scene::far_from_its_broker(brisk_database("slow", "2s").await).await;
    network.slow(Some(400_000));
    // Text that lz4 makes little of.
    database.run(&format!("insert into payments select id, 1.00, md5(id::text) || md5((id + 1)::text) from generate_series(1, {ROWS}) id;")).await;
    let stats = capture.drain(&database).await;
    assert_eq!((stats.reconnects, stats.dead_letters), (0, 0));
    assert_eq!(of_payments(&stream, &config), (1..=ROWS).collect::<Vec<_>>(), "each once, in order");
    capture.stop().await;
}

async fn own_broker(database: &Database) -> (Stream, Config) {
    let stream = Stream::own().await;
    let config = Config { topic_prefix: stream.prefix.clone(), ..config(database) };
    (stream, config)
}

fn payments(stream: &Stream, config: &Config) -> Vec<Read> {
    Reader::start(&stream.address).read(&format!("{}.public.payments", config.topic_prefix))
}

fn of_payments(stream: &Stream, config: &Config) -> Vec<u64> {
    payments(stream, config).iter().filter_map(parsed).filter_map(|it| it["after"]["id"].as_u64()).collect()
}

pub(super) fn port(database: &Database) -> u16 {
    url::Url::parse(database.url.reveal()).expect("an address").port().unwrap_or(5432)
}
