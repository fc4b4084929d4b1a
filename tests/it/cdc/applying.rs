//! What a capture needs, made without starting it.

use std::num::NonZeroU32;

use ledgerline::{
    cdc::{self, Applied, Config, SlotStep, SnapshotMode, Step},
    embedded::kafka,
    fault::{Diagnose as _, Fault},
    stream::{self, range, topics::Topics},
};

use super::{
    days::PAYMENTS,
    house::{Capture, Database, config},
};

struct House {
    database: Database,
    broker: kafka::Broker,
    _dir: tempfile::TempDir,
}

impl House {
    async fn new(test: &str) -> Self {
        let database = Database::create(test).await;
        database.run(PAYMENTS).await;
        let dir = tempfile::tempdir().expect("a directory");
        let broker = kafka::Broker::start(kafka::Config { dir: dir.path().to_owned(), ..kafka::Config::default() }).await.expect("a broker");
        Self { database, broker, _dir: dir }
    }

    async fn apply(&self, config: &Config, dry_run: bool) -> Result<Applied, cdc::Error> {
        let stream = stream::Config { partitions: NonZeroU32::new(2).expect("not zero"), ..stream::Config::default() };
        cdc::apply(&self.database.url, &self.database.url, &self.broker.address(), &stream, config, dry_run).await
    }

    async fn n_topics(&self) -> usize {
        Topics::connect(self.broker.address()).expect("a client").partitions().await.expect("the broker answers").len()
    }

    async fn rows(&self) -> usize {
        range::newest(&self.broker.address(), "bank.public.payments", 100).await.expect("the broker answers").len()
    }
}

/// Into the topics of this test's own broker.
fn of_bank(database: &Database) -> Config {
    Config { topic_prefix: "bank".to_owned(), ..config(database) }
}

fn what(applied: &Applied) -> (bool, &[String], &[String], bool) {
    (applied.publication_created, &applied.tables_added, &applied.topics_created, matches!(applied.slot_step, SlotStep::Made { .. }))
}

#[tokio::test]
async fn what_apply_makes_a_start_takes_over_and_a_second_apply_changes_nothing() {
    let house = House::new("apply").await;
    house.database.run("insert into payments values (1, 1.00, 'x');").await;
    let config = of_bank(&house.database);

    let would = house.apply(&config, true).await.expect("said");
    let standing = cdc::standing(&house.database.url, &house.database.url, &config).await.expect("the source answers");
    assert!(standing.health.is_none() && !standing.publication_exists, "a rehearsal makes nothing: {standing:?}");
    assert_eq!(house.n_topics().await, 0);
    let schema = "select exists (select from pg_namespace where nspname = 'ledgerline')";
    assert!(!sqlx::query_scalar::<_, bool>(schema).fetch_one(&mut house.database.connect().await).await.expect("answers"));

    let made = house.apply(&config, false).await.expect("made");
    assert_eq!(what(&made), what(&would));
    assert!(made.publication_created && made.snapshot_comes && !made.is_unchanged());
    assert!(made.topics_created.len() == 5 && made.topics_created.contains(&"bank.public.payments".to_owned()), "{made:?}");
    let standing = cdc::standing(&house.database.url, &house.database.url, &config).await.expect("the source answers");
    assert!(standing.health.is_some_and(|it| !it.active) && standing.publication_exists);
    assert!(house.apply(&config, false).await.expect("said").is_unchanged());

    // The rows from before, and those between apply and start, come exactly once.
    house.database.run("insert into payments values (2, 1.00, 'x');").await;
    let capture = Capture::start(&house.database, house.broker.address(), config.clone());
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    house.database.run("insert into payments values (3, 1.00, 'x');").await;
    capture.drain(&house.database).await;
    let running = house.apply(&config, false).await.expect("said");
    assert!(running.is_unchanged() && matches!(running.slot_step, SlotStep::Kept { active: true, .. }) && !running.snapshot_comes, "{running:?}");
    capture.stop().await;
    assert_eq!(house.rows().await, 3);
    house.broker.stop().await;
}

#[tokio::test]
async fn without_a_snapshot_the_changes_from_apply_on_are_kept() {
    let house = House::new("apply_never").await;
    house.database.run("insert into payments values (1, 1.00, 'x');").await;
    let config = Config { snapshot: SnapshotMode::Never, ..of_bank(&house.database) };
    let made = house.apply(&config, false).await.expect("made");
    assert!(matches!(made.slot_step, SlotStep::Made { lsn: Some(_) }) && !made.snapshot_comes, "{made:?}");
    house.database.run("insert into payments values (2, 1.00, 'x');").await;
    let capture = Capture::start(&house.database, house.broker.address(), config);
    capture.until("streaming", |it| it.step == Step::Streaming).await;
    capture.drain(&house.database).await;
    capture.stop().await;
    assert_eq!(house.rows().await, 1);
    house.broker.stop().await;
}

#[tokio::test]
async fn apply_refuses_what_a_start_refuses_with_the_same_remedy() {
    let house = House::new("apply_refused").await;
    let config = of_bank(&house.database);
    let refused = async |config: &Config, told: &str| {
        for dry_run in [true, false] {
            let error = house.apply(config, dry_run).await.expect_err("refused");
            assert!(error.to_string().contains(told) && matches!(error.fault(), Fault::Operator(_)), "{error}");
        }
    };
    refused(&Config { tables: vec!["public.nothing".to_owned()], ..config.clone() }, "public.nothing").await;
    house.database.run(&format!("select pg_create_logical_replication_slot('{}', 'test_decoding');", config.slot)).await;
    refused(&config, "test_decoding").await;
    house
        .database
        .run(&format!(
            "select pg_drop_replication_slot('{}'); create publication {} for table payments with (publish = 'insert');",
            config.slot, config.publication
        ))
        .await;
    refused(&config, "leaves out").await;
    house.broker.stop().await;
}
