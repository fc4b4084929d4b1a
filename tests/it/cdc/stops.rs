//! What would be a gap stops the capture, with a remedy: a slot, a publication or a server that changed behind us. Each on a
//! server of its own where it has to be brought into that state.

use std::{path::Path, process::Stdio, time::Duration};

use ledgerline::{
    cdc::{self, Config, ErrorsTolerance, Step},
    embedded::{Progress, postgres},
    fault::{Diagnose as _, Fault, chain},
};
use tokio::process::Command;

use super::{
    crashes::{own_server, server_config},
    days::{PAYMENTS, parsed},
    house::{Broker, Capture, Database, Reader, config},
    refusals::{captured, refuses},
};
use crate::lane::Stream;

/// Ends with instructions for the operator, who reads the error and the remedy.
pub(super) async fn stops(capture: Capture, told: &[&str]) {
    let error = capture.ended().await.expect_err("it stops");
    let Fault::Operator(remedy) = error.fault() else { panic!("no remedy for: {}", chain(&error)) };
    let read = format!("{}: {remedy}", chain(&error));
    assert!(told.iter().all(|it| read.contains(it)), "{read}");
}

async fn streaming(database: &Database, broker: &Broker, config: &Config) -> Capture {
    let capture = Capture::start(database, broker.address(), config.clone());
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    capture
}

#[tokio::test]
async fn a_slot_that_is_dropped_under_a_running_capture_stops_it() {
    let (database, broker, config) = captured("dropping").await;
    let capture = streaming(&database, &broker, &config).await;
    let name = &database.name;
    let drop = format!(
        "do $$ begin
            perform pg_terminate_backend(active_pid, 5000) from pg_replication_slots where slot_name = '{name}';
            perform pg_drop_replication_slot('{name}');
        end $$"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(drop)).execute(&mut database.connect().await).await.expect("dropped");
    stops(capture, &["missing", name, "somebody dropped the slot", "read anew"]).await;
}

#[tokio::test]
async fn a_slot_that_was_made_again_behind_us_stops_the_capture_as_what_lies_between_is_lost() {
    let (database, broker, config) = captured("remade").await;
    let name = &database.name;
    database.run(&format!("select pg_drop_replication_slot('{name}'); insert into payments values (2, 1.00, 'between');")).await;
    database.run(&format!("select pg_create_logical_replication_slot('{name}', 'pgoutput');")).await;
    refuses(&database, &broker, config, "never got further than").await;
}

#[tokio::test]
async fn a_table_that_is_taken_out_of_the_publication_stops_the_capture_and_another_that_is_dropped_does_not() {
    let database = Database::create("taken").await;
    database.run(PAYMENTS).await;
    database.run("create table public.fees (id int primary key);").await;
    let (broker, config) = (Broker::start(&database, &["public.payments", "public.fees"], 1), config(&database));
    let capture = streaming(&database, &broker, &config).await;
    capture.until("the publication was looked at", |it| it.slot.is_some()).await;
    database.run("drop table public.fees; insert into payments values (2, 1.00, 'x');").await;
    let end = database.wal_position().await;
    capture.until("it was looked at after fees had gone", |it| it.source_lsn >= end).await;
    capture.drain(&database).await;

    database.run(&format!("alter publication {} drop table payments;", database.name)).await;
    stops(capture, &["public.payments", "taken out of publication", "cdc resnapshot public.payments"]).await;
}

#[tokio::test]
async fn with_no_tolerance_a_value_that_cannot_be_written_stops_the_capture_in_front_of_it() {
    let database = Database::create("intolerant").await;
    database.run("create table terms (id int primary key, lasts interval);").await;
    let mut broker = Broker::start(&database, &["public.terms"], 1);
    let config = Config { errors_tolerance: ErrorsTolerance::None, ..config(&database) };
    let capture = streaming(&database, &broker, &config).await;
    database.run("insert into terms values (1, '1 day'); insert into terms values (2, 'infinity'); insert into terms values (3, '2 days');").await;
    stops(capture, &["public.terms", "column lasts", "errors_tolerance"]).await;
    refuses(&database, &broker, config.clone(), "errors_tolerance").await;
    assert_eq!(broker.read("dead_letters"), []);

    let capture = streaming(&database, &broker, &Config { errors_tolerance: ErrorsTolerance::All, ..config }).await;
    let stats = capture.drain(&database).await;
    assert_eq!((stats.dead_letters, broker.read("dead_letters").len()), (1, 1));
    let mut arrived: Vec<i64> = broker.read("public.terms").iter().filter_map(parsed).filter_map(|it| it["after"]["id"].as_i64()).collect();
    arrived.dedup();
    assert_eq!(arrived, [1, 3]);
    capture.stop().await;
}

#[tokio::test]
async fn the_slot_is_one_that_a_standby_can_keep() {
    let (database, _broker, _config) = captured("failover").await;
    const FAILOVER: &str = "select coalesce((to_jsonb(s) ->> 'failover')::bool, current_setting('server_version_num')::int < 170000)
        from pg_replication_slots s where slot_name = $1";
    let failover: bool = sqlx::query_scalar(FAILOVER).bind(&database.name).fetch_one(&mut database.connect().await).await.expect("the slot");
    assert!(failover);
}

/// A server of the test's own, with a database, a stream and a capture of its own.
struct Own {
    dir: tempfile::TempDir,
    server: Option<postgres::Server>,
    database: Database,
    stream: Stream,
    config: Config,
}

impl Own {
    async fn new(test: &str) -> Self {
        let (dir, server) = own_server().await;
        let database = Database::create_on(server.url("postgres").reveal(), test).await;
        database.run(PAYMENTS).await;
        let stream = Stream::own().await;
        let config = Config { topic_prefix: stream.prefix.clone(), ..config(&database) };
        Self { dir, server: Some(server), database, stream, config }
    }

    fn capture(&self) -> Capture {
        Capture::start(&self.database, self.stream.address.clone(), self.config.clone())
    }

    /// Captures all there is, and stops in good order.
    async fn capture_once(&self) {
        let capture = self.capture();
        capture.until("streaming", |it| it.step == Step::Streaming).await;
        capture.drain(&self.database).await;
        capture.stop().await;
    }

    async fn leave(&mut self) {
        self.server.take().expect("it runs").stop().await;
    }

    async fn come_back(&mut self) {
        self.server = Some(postgres::Server::start(server_config(self.dir.path()).await, &Progress::silent()).await.expect("a server"));
    }

    async fn with_settings(&mut self, settings: &[&str]) {
        for setting in settings {
            self.database.run(&format!("alter system {setting};")).await;
        }
        self.leave().await;
        self.come_back().await;
    }

    async fn end(mut self) {
        drop(self.database);
        if let Some(server) = self.server.take() {
            server.stop().await;
        }
    }
}

pub(super) fn copy(from: &Path, to: &Path) {
    let copied = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp");
    assert!(copied.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_was_restored_from_a_backup_is_not_taken_for_the_one_that_was_captured() {
    let mut own = Own::new("restored").await;
    own.database.run("insert into payments values (1, 1.00, 'before');").await;
    own.capture_once().await;
    own.leave().await;
    let (cluster, backup) = (own.dir.path().join("postgres"), own.dir.path().join("backup"));
    copy(&cluster, &backup);
    own.come_back().await;
    own.database.run("insert into payments select id, 1.00, repeat('x', 500) from generate_series(2, 3000) id;").await;
    own.capture_once().await;
    let captured = Reader::start(&own.stream.address).read(&format!("{}.public.payments", own.stream.prefix)).len();
    assert_eq!(captured, 3_000);
    own.leave().await;

    std::fs::remove_dir_all(&cluster).expect("ours");
    copy(&backup, &cluster);
    own.come_back().await;
    own.database.run("insert into payments values (2, 9.00, 'another history');").await;
    stops(own.capture(), &["WAL ends at", "a backup that was brought back", "read anew"]).await;
    own.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_lacks_what_it_takes_says_what_to_change() {
    let mut own = Own::new("lacking").await;
    own.with_settings(&["set wal_level = 'replica'"]).await;
    stops(own.capture(), &["wal_level is replica", "wal_level = logical"]).await;

    own.with_settings(&["reset wal_level", "set max_wal_senders = 1", "set max_replication_slots = 1"]).await;
    own.database.run("select pg_create_physical_replication_slot('other');").await;
    stops(own.capture(), &["max_replication_slots"]).await;
    own.database.run("select pg_drop_replication_slot('other');").await;

    // A replication connection of somebody else's.
    let mut url = url::Url::parse(own.database.url.reveal()).expect("an address");
    url.query_pairs_mut().append_pair("replication", "database");
    let psql = server_config(own.dir.path()).await.bin.join("psql");
    let mut other = Command::new(psql);
    let mut other = other.arg(url.as_str()).stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true).spawn().expect("psql");
    let mut connection = own.database.connect().await;
    while sqlx::query_scalar::<_, i64>("select count(*) from pg_stat_activity where backend_type = 'walsender'")
        .fetch_one(&mut connection)
        .await
        .expect("asked")
        == 0
    {
        assert!(other.try_wait().expect("a child of ours").is_none(), "psql ended");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stops(own.capture(), &["max_wal_senders"]).await;
    other.kill().await.expect("killed");

    own.database.run("create role outsider login password 'outsider';").await;
    let rules = own.dir.path().join("postgres/cluster/pg_hba.conf");
    let before = std::fs::read_to_string(&rules).expect("rules");
    std::fs::write(&rules, format!("host all outsider all reject\n{before}")).expect("ours");
    own.database.run("select pg_reload_conf();").await;
    let mut url = url::Url::parse(own.database.url.reveal()).expect("an address");
    url.set_username("outsider").expect("a name");
    url.set_password(Some("outsider")).expect("a password");
    let outsider = ledgerline::secret::Secret::new(url);
    stops(Capture::start_as(&outsider, &own.database, own.stream.address.clone(), own.config.clone()), &["pg_hba.conf", "outsider"]).await;
    own.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wal_that_the_server_removed_is_told_with_what_would_have_kept_it() {
    let mut own = Own::new("removed_wal").await;
    own.with_settings(&["set max_slot_wal_keep_size = '16MB'", "set max_wal_size = '32MB'", "set min_wal_size = '32MB'"]).await;
    own.capture_once().await;
    own.database.run("create table noise (t text);").await;
    let switch = "insert into noise values ('x'); select pg_switch_wal();";
    own.database.run(&switch.repeat(5)).await;
    own.database.run("checkpoint;").await;
    let standing = cdc::standing(&own.database.url, &own.database.url, &own.config).await.expect("a standing");
    assert_eq!((standing.health.expect("a slot").wal_status.as_str(), standing.invalidation.as_deref()), ("lost", Some("wal_removed")));
    stops(own.capture(), &["is lost: wal_removed", "pg_drop_replication_slot", "max_slot_wal_keep_size", "read anew"]).await;
    own.end().await;
}
