//! Another server behind the same address: a standby that took over with the slot and all commits, or without; a former primary
//! that comes back; a server that was never ours. Real ones, and a name that leads from one to the next.

use std::{fs, path::Path, time::Duration};

use ledgerline::{
    cdc::{Config, Step},
    embedded::{Progress, postgres},
};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection as _, PgConnection};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::{
    crashes::{own_server, server_config, write_on},
    days::{PAYMENTS, held, replayed},
    house::{Capture, Database, PATIENCE, Reader, config},
    network::Network,
    stops::{copy, stops},
};
use crate::lane::Stream;

/// What a standby is told so that it keeps slots of its primary.
const KEEPS_SLOTS: &str = "sync_replication_slots = on\nhot_standby_feedback = on\nprimary_slot_name = 'standby'\n";

/// A primary, a standby that follows it, and an address that leads to one of them. The capture's state lies elsewhere.
struct Pair {
    dirs: [TempDir; 2],
    primary: Option<postgres::Server>,
    standby: Option<postgres::Server>,
    network: Network,
    /// By the address that moves.
    database: Database,
    state: Database,
    stream: Stream,
    config: Config,
}

impl Pair {
    async fn new(test: &str, standby_settings: &str) -> Self {
        let (dir, primary) = own_server().await;
        let database = Database::create_on(primary.url("postgres").reveal(), test).await;
        database.run(PAYMENTS).await;
        database.run("select pg_create_physical_replication_slot('standby', true);").await;
        primary.stop().await;
        // The copy of a server at rest is a backup of it.
        let beside = tempfile::tempdir_in(dir.path().parent().expect("a place")).expect("a directory");
        fs::set_permissions(beside.path(), fs::metadata(dir.path()).expect("ours").permissions()).expect("ours");
        copy(&dir.path().join("postgres"), beside.path());
        let primary = started(dir.path()).await;
        follow(beside.path(), &primary, &database.name, standby_settings);
        let standby = started(beside.path()).await;
        let network = Network::to(primary.port()).await;
        let moving = network.url(&database.url);
        let (state, stream) = (Database::create(&format!("{test}_state")).await, Stream::own().await);
        let config = Config { topic_prefix: stream.prefix.clone(), ..config(&database) };
        let database = database.known_as(moving);
        Self { dirs: [dir, beside], primary: Some(primary), standby: Some(standby), network, database, state, stream, config }
    }

    fn capture(&self) -> Capture {
        Capture::start_as(&self.database.url, &self.state, self.stream.address.clone(), self.config.clone())
    }

    async fn streaming(&self) -> Capture {
        let capture = self.capture();
        capture.until("streaming", |it| it.step == Step::Streaming).await;
        capture
    }

    async fn on(server: Option<&postgres::Server>) -> PgConnection {
        PgConnection::connect(server.expect("it runs").url("postgres").reveal()).await.expect("the server answers")
    }

    /// Waits until the standby has the slot, and would keep it.
    async fn until_the_standby_has_the_slot(&self) {
        const HAS: &str = "select count(*) from pg_replication_slots where slot_name = $1 and synced and not temporary";
        let (mut primary, mut standby) = (Self::on(self.primary.as_ref()).await, Self::on(self.standby.as_ref()).await);
        let synced = async {
            while sqlx::query_scalar::<_, i64>(HAS).bind(&self.config.slot).fetch_one(&mut standby).await.expect("asked") == 0 {
                // What the primary does every 15 s by itself: it lets slots move on.
                sqlx::query("select pg_log_standby_snapshot()").execute(&mut primary).await.expect("logged");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(PATIENCE, synced).await.expect("the slot is synchronized");
    }

    /// No change is captured that the standby has not.
    async fn the_standby_comes_first(&self) {
        for statement in ["alter system set synchronized_standby_slots = 'standby'", "select pg_reload_conf()"] {
            sqlx::query(statement).execute(&mut Self::on(self.primary.as_ref()).await).await.expect("set");
        }
    }

    async fn the_standby_hears_nothing_more(&self) {
        let mut standby = Self::on(self.standby.as_ref()).await;
        for statement in ["alter system set primary_conninfo = ''", "select pg_reload_conf()"] {
            sqlx::query(statement).execute(&mut standby).await.expect("set");
        }
        let deaf = async {
            while sqlx::query_scalar::<_, i64>("select count(*) from pg_stat_wal_receiver").fetch_one(&mut standby).await.expect("asked") > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, deaf).await.expect("it lets go");
    }

    /// As a power cut would: no goodbye to anybody.
    async fn the_primary_dies(&mut self) {
        let primary = self.primary.take().expect("it runs");
        kill_process(Pid::from_raw(primary.pid().cast_signed()).expect("a process"), Signal::KILL).expect("killed");
        primary.stop().await;
    }

    /// The address leads to the standby.
    fn the_address_moves(&self) {
        self.network.lead_to(self.standby.as_ref().expect("it runs").port());
    }

    async fn the_standby_takes_over(&self) {
        let took_over: bool = sqlx::query_scalar("select pg_promote()").fetch_one(&mut Self::on(self.standby.as_ref()).await).await.expect("promoted");
        assert!(took_over);
    }

    async fn end(mut self) {
        for server in [self.primary.take(), self.standby.take()].into_iter().flatten() {
            server.stop().await;
        }
    }
}

async fn started(dir: &Path) -> postgres::Server {
    postgres::Server::start(server_config(dir).await, &Progress::silent()).await.expect("a server")
}

/// Makes a copy of a primary's files those of a standby.
fn follow(dir: &Path, primary: &postgres::Server, database: &str, settings: &str) {
    let postgres = dir.join("postgres");
    fs::remove_file(postgres.join("port")).expect("the primary's own");
    let cluster = postgres.join("cluster");
    fs::remove_dir_all(cluster.join("pg_replslot/standby")).expect("the primary's own");
    let url = primary.url(database);
    let conninfo = format!("primary_conninfo = '{}'\nwal_retrieve_retry_interval = '100ms'\n", url.reveal());
    let file = cluster.join("postgresql.auto.conf");
    let before = fs::read_to_string(&file).expect("its settings");
    fs::write(&file, format!("{before}{conninfo}{settings}")).expect("its settings");
    fs::write(cluster.join("standby.signal"), "").expect("ours");
}

async fn until_more(capture: &Capture, n_transactions: u64) {
    let before = capture.handle.stats.borrow().transactions;
    capture.until("transactions", |it| it.step == Step::Streaming && it.transactions > before + n_transactions).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_keeps_the_slot_takes_over_without_a_gap_and_the_former_primary_is_refused() {
    let mut pair = Pair::new("heir", KEEPS_SLOTS).await;
    let capture = pair.streaming().await;
    pair.until_the_standby_has_the_slot().await;
    pair.the_standby_comes_first().await;
    let stop = CancellationToken::new();
    let writing = tokio::spawn(write_on(pair.database.url.clone(), stop.clone()));
    until_more(&capture, 20).await;

    pair.the_primary_dies().await;
    pair.the_address_moves();
    let waits = |said: &Option<String>| said.as_ref().is_some_and(|it| it.contains("the source is a standby"));
    capture.until("it waits for the standby to take over", |it| waits(&it.waiting_for)).await;
    pair.the_standby_takes_over().await;
    capture.until("streaming again", |it| it.step == Step::Streaming).await;
    until_more(&capture, 20).await;
    stop.cancel();
    writing.await.expect("the writer ends well");
    capture.drain(&pair.database).await;
    let (rows, _) = replayed(&Reader::start(&pair.stream.address).read(&format!("{}.public.payments", pair.stream.prefix)));
    assert_eq!(rows, held(&pair.database).await);
    capture.stop().await;

    // Nobody told the former primary, which still has the slot.
    let former = started(pair.dirs[0].path()).await;
    pair.network.lead_to(former.port());
    pair.primary = Some(former);
    stops(pair.capture(), &["the source is on timeline 1, and timeline 2, which was captured last", "former primary", "read anew"]).await;
    pair.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_takes_over_without_the_slot_stops_the_capture_and_what_would_have_kept_it_is_told() {
    let mut pair = Pair::new("slotless", "").await;
    let capture = pair.streaming().await;
    pair.database.run("insert into payments values (1, 1.00, 'x');").await;
    capture.drain(&pair.database).await;
    pair.the_primary_dies().await;
    pair.the_standby_takes_over().await;
    pair.the_address_moves();
    let told = ["is not on this server: it is on timeline 2", "was on timeline 1", "sync_replication_slots = on", "read anew"];
    stops(capture, &told).await;
    // And so does whoever starts it again.
    stops(pair.capture(), &told).await;
    pair.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_takes_over_without_commits_that_were_captured_stops_the_capture() {
    let mut pair = Pair::new("late", KEEPS_SLOTS).await;
    let capture = pair.streaming().await;
    pair.until_the_standby_has_the_slot().await;
    pair.the_standby_hears_nothing_more().await;
    pair.database.run("insert into payments values (1, 1.00, 'lost with the primary');").await;
    capture.drain(&pair.database).await;
    pair.the_primary_dies().await;
    pair.the_standby_takes_over().await;
    pair.the_address_moves();
    pair.database.run("insert into payments values (1, 2.00, 'another history');").await;
    let told = ["the source took over where timeline 1 had come to", "synchronized_standby_slots", "read anew"];
    stops(capture, &told).await;
    stops(pair.capture(), &told).await;
    pair.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_cluster_behind_the_same_address_stops_the_capture_with_a_slot_of_that_name_or_without() {
    let (_dir, server) = own_server().await;
    let (_other_dir, other) = own_server().await;
    let database = Database::create_on(server.url("postgres").reveal(), "replaced").await;
    database.run(PAYMENTS).await;
    let network = Network::to(server.port()).await;
    let moving = network.url(&database.url);
    let database = database.known_as(moving);
    let (state, stream) = (Database::create("replaced_state").await, Stream::own().await);
    let config = Config { topic_prefix: stream.prefix.clone(), ..config(&database) };
    let start = || Capture::start_as(&database.url, &state, stream.address.clone(), config.clone());
    let capture = start();
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    capture.drain(&database).await;

    let password = url::Url::parse(server.url("postgres").reveal()).expect("an address").password().expect("one").to_owned();
    let mut there = PgConnection::connect(other.url("postgres").reveal()).await.expect("the server answers");
    for statement in [format!("create database {}", database.name), format!("alter role current_user password '{password}'")] {
        sqlx::query(sqlx::AssertSqlSafe(statement)).execute(&mut there).await.expect("done");
    }
    network.lead_to(other.port());
    // It has the first one's connections still: what is looked at beside them is another server's.
    network.hang_up_on_clients();
    let told = ["another server than the one that was captured", "system identifier", "correct source.url"];
    stops(capture, &told).await;
    database.run(PAYMENTS).await;
    database.run(&format!("create publication {} for table payments;", config.publication)).await;
    database.run(&format!("select pg_create_logical_replication_slot('{}', 'pgoutput');", config.slot)).await;
    stops(start(), &told).await;
    drop(there);
    server.stop().await;
    other.stop().await;
}
