//! The embedded broker, asked by librdkafka and by hand.
mod bad_days;
mod by_librdkafka;
mod crash;
mod raw;
mod versions;

use std::path::Path;

use ledgerline::{
    embedded::kafka::{Broker, Config, Error, Retention},
    units::{Size, Span},
};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// A broker of one test's own, with the runtime it lives on.
pub(crate) struct House {
    runtime: Runtime,
    broker: Option<Broker>,
    pub(crate) config: Config,
    /// Topics whose reader the broker waits for.
    pub(crate) awaited: fn(&str) -> bool,
    _dir: TempDir,
}

impl House {
    pub(crate) fn new() -> Self {
        Self::with(|config| config)
    }

    pub(crate) fn with(change: impl FnOnce(Config) -> Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = change(small(dir.path()));
        let mut house = Self { runtime: Runtime::new().unwrap(), broker: None, config, awaited: |_| false, _dir: dir };
        house.start();
        house
    }

    pub(crate) fn start(&mut self) {
        self.broker = Some(self.runtime.block_on(async {
            // Meanwhile a connection of another test may have been given our port; it is over soon.
            for _ in 0..200 {
                match Broker::start_holding(self.config.clone(), self.awaited).await {
                    Err(Error::Listen { .. }) => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
                    started => return started.unwrap(),
                }
            }
            panic!("port {} stays taken", self.config.port);
        }));
        // A client that was connected finds it again.
        self.config.port = self.broker().port();
    }

    pub(crate) fn stop(&mut self) {
        self.runtime.block_on(self.broker.take().unwrap().stop());
    }

    pub(crate) fn broker(&self) -> &Broker {
        self.broker.as_ref().unwrap()
    }

    pub(crate) fn address(&self) -> String {
        self.broker().address()
    }

    pub(crate) fn client(&self) -> raw::Client {
        raw::Client::connect(&self.address())
    }
}

/// Settings under which neither a disk nearly full of something else matters, nor that records made by hand are of 1970.
pub(crate) fn small(dir: &Path) -> Config {
    let retention = Retention { age: Span::from_secs(1_000 * 365 * 24 * 3_600), ..Retention::default() };
    Config { dir: dir.to_owned(), free_min: Size(1 << 20), retention, ..Config::default() }
}

#[test]
fn a_second_broker_in_the_same_directory_and_a_taken_port_are_refused_with_what_to_do() {
    let house = House::new();
    let again = house.runtime.block_on(Broker::start(Config { port: 0, ..house.config.clone() }));
    assert!(matches!(again, Err(Error::InUse { .. })));

    let elsewhere = tempfile::tempdir().unwrap();
    let taken = house.runtime.block_on(Broker::start(Config { dir: elsewhere.path().to_owned(), ..house.config.clone() }));
    assert!(matches!(taken, Err(Error::Listen { .. })));
}

#[test]
fn stopping_releases_port_and_directory_while_clients_are_connected() {
    let mut house = House::new();
    let mut client = house.client();
    client.create("t", 1);
    client.send(11, &raw::fetch_request("t", 0, 0).with_max_wait_ms(60_000).with_min_bytes(1));
    for _ in 0..3 {
        house.stop();
        house.start();
    }
    assert!(client.read_frame().is_none(), "the old connection is closed");
    assert_eq!(house.client().fetch("t", 0, 0).0, 0);
}
