//! The same on Snowflake: on the double of `tests/stack` with the feature `stack`, on the account that the environment names
//! with the feature `account` (`LEDGERLINE__WAREHOUSE__URL` and `…__PRIVATE_KEY`; its role may create databases).

use std::sync::atomic::{AtomicU32, Ordering};

use ledgerline::{
    fault::{Diagnose as _, Fault},
    secret::Secret,
    warehouse::{Access, Warehouse, snowflake::Snowflake},
};
use url::Url;

use super::{
    contract::{CUSTOMERS, counts_the_money_of_the_source, loads_each_object_once, number, what_is_read_again_counts_only_where_nothing_else_is_known},
    ground::{Database, Ground, envelopes},
};

/// What the statements of these tests are called.
const TAG: &str = "ledgerline/contract/1/test";

/// Where the server is, and a database that may be connected to.
#[cfg(feature = "account")]
fn server() -> Access {
    let variable = |name: &str| std::env::var(format!("LEDGERLINE__WAREHOUSE__{name}")).ok().filter(|it| !it.is_empty());
    let wanted = |name: &str| variable(name).unwrap_or_else(|| panic!("LEDGERLINE__WAREHOUSE__{name} says where the account is, and what opens it"));
    let endpoint = variable("ENDPOINT").map(|it| it.parse().expect("an address"));
    Access { url: Secret::new(wanted("URL")), endpoint, private_key: Some(Secret::new(wanted("PRIVATE_KEY"))), stage: None }
}

#[cfg(not(feature = "account"))]
fn server() -> Access {
    use std::sync::OnceLock;

    use crate::lane::Stack;

    static DOUBLE: OnceLock<Stack> = OnceLock::new();
    let double = DOUBLE.get_or_init(|| Stack::of(&["snowflake"]));
    Access {
        url: Secret::new(double.value("WAREHOUSE__URL")),
        endpoint: Some(double.value("WAREHOUSE__ENDPOINT").parse().expect("an address")),
        private_key: Some(Secret::new(double.value("WAREHOUSE__PRIVATE_KEY"))),
        stage: None,
    }
}

/// A database of one test's own. One that a failed test leaves behind has the same beginning of its name as the server's.
struct Place {
    access: Access,
    name: String,
}

impl Place {
    async fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let mut access = server();
        let mut url = Url::parse(access.url.reveal()).expect("an address");
        let now = chrono::Utc::now().timestamp_millis();
        let name = format!("{}_{}_{now}_{}", url.path().trim_start_matches('/'), std::process::id(), MADE.fetch_add(1, Ordering::Relaxed)).to_uppercase();
        // The double makes a database for who signs in to it.
        if cfg!(feature = "account") {
            Self::administrate(&format!("create database {name} data_retention_time_in_days = 0")).await;
        }
        url.set_path(&name);
        access.url = Secret::new(url);
        Self { access, name }
    }

    async fn administrate(sql: &str) {
        let administrator = Snowflake::connect(&server()).await.expect("the account lets us in");
        administrator.rows(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    async fn ground(&self) -> Ground {
        let warehouse = Warehouse::connect(&self.access).await.expect("it lets us in");
        Ground::of(Database::create().await, warehouse.tagged(TAG)).await
    }

    async fn end(self) {
        if cfg!(feature = "account") {
            Self::administrate(&format!("drop database {}", self.name)).await;
        }
    }
}

fn remedy(fault: Fault) -> String {
    match fault {
        Fault::Operator(remedy) => remedy,
        other => panic!("an operator is needed, not {other:?}"),
    }
}

async fn rows(ground: &Ground, sql: &str) -> Vec<Vec<Option<String>>> {
    let Warehouse::Snowflake(snowflake) = &ground.warehouse else { panic!("this is Snowflake's") };
    snowflake.rows(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"))
}

#[tokio::test]
async fn snowflake_loads_each_object_once() {
    let place = Place::new().await;
    Box::pin(loads_each_object_once(Box::pin(place.ground()).await)).await;
    place.end().await;
}

#[tokio::test]
async fn snowflake_counts_the_money_of_the_source() {
    let place = Place::new().await;
    Box::pin(counts_the_money_of_the_source(Box::pin(place.ground()).await)).await;
    place.end().await;
}

#[tokio::test]
async fn on_snowflake_what_is_read_again_counts_only_where_nothing_else_is_known() {
    let place = Place::new().await;
    Box::pin(what_is_read_again_counts_only_where_nothing_else_is_known(Box::pin(place.ground()).await)).await;
    place.end().await;
}

/// What only the double lets itself be asked: it reads this machine's bucket, and refuses what it is told to.
#[cfg(not(feature = "account"))]
mod double {
    use ledgerline::warehouse::load;
    use serde_json::{Value, json};

    use super::*;

    async fn bucket_as_a_stage(ground: &Ground, bucket: &str) {
        let lake = &ground.lake.access;
        let endpoint = lake.endpoint.as_ref().map(|it| it.as_str().trim_start_matches("http://").trim_end_matches('/').to_owned()).expect("it has an address");
        let (id, secret) = (&lake.access_key_id, lake.secret_access_key.reveal());
        let sql = format!(
            "create or replace stage raw.lake url = 's3compat://{bucket}/' endpoint = '{endpoint}' credentials = (aws_key_id = '{id}' aws_secret_key = '{secret}')"
        );
        rows(ground, &sql).await;
    }

    async fn tell(place: &Place, refusal: Value) {
        let url = format!("{}double/refusal?database={}", place.access.endpoint.as_ref().expect("it has one"), place.name);
        reqwest::Client::new().put(url).json(&refusal).send().await.and_then(reqwest::Response::error_for_status).expect("the double is told");
    }

    #[tokio::test]
    async fn snowflake_copies_objects_from_the_lakes_own_bucket() {
        let mut place = Place::new().await;
        place.access.stage = Some("lake".to_owned());
        let ground = Box::pin(place.ground()).await;
        bucket_as_a_stage(&ground, &ground.lake.access.bucket).await;
        let copied = ground.land(CUSTOMERS, 0, &envelopes(1..6)).await;
        assert_eq!(ground.load("customers").await.rows, 5);
        assert_eq!(number(&ground, &format!("select count(*) from raw.customers where _object = '{}' and _offset < 5", copied.data)).await, 5);
        assert_eq!(number(&ground, "select max(_partition) from raw.customers").await, 0);
        // From there, and from nowhere else.
        ground.land(CUSTOMERS, 0, &envelopes(6..8)).await;
        bucket_as_a_stage(&ground, "another").await;
        let loading = load::load(&ground.store, &ground.warehouse, &ground.topics, "customers", |_| {});
        assert!(Box::pin(loading).await.is_err(), "there is no such object");
        assert_eq!(number(&ground, "select count(*) from raw.customers").await, 5, "and nothing of it is loaded");
        bucket_as_a_stage(&ground, &ground.lake.access.bucket).await;
        assert_eq!(ground.load("customers").await.rows, 2);
        ground.end().await;
    }

    /// What is no JSON is told apart, whichever way the objects come.
    #[tokio::test]
    async fn snowflake_loads_each_object_once_from_the_lakes_own_bucket() {
        let mut place = Place::new().await;
        place.access.stage = Some("lake".to_owned());
        let ground = Box::pin(place.ground()).await;
        bucket_as_a_stage(&ground, &ground.lake.access.bucket).await;
        Box::pin(loads_each_object_once(ground)).await;
    }

    #[tokio::test]
    async fn a_role_that_is_revoked_is_told_with_its_grant_and_nothing_is_doubled_when_it_is_back() {
        let place = Place::new().await;
        let ground = Box::pin(place.ground()).await;
        ground.land(CUSTOMERS, 0, &envelopes(1..6)).await;
        let says = "Role 'LEDGERLINE' specified in the connect string does not exist or not authorized.";
        tell(&place, json!({"sign_in": true, "code": "390189", "message": says})).await;
        let error = Box::pin(load::load(&ground.store, &ground.warehouse, &ground.topics, "customers", |_| {})).await.expect_err("no session for this role");
        assert!(remedy(error.fault()).contains("grant role LEDGERLINE to user LEDGERLINE"), "{error:?}");
        let error = Box::pin(Warehouse::connect(&place.access)).await.expect_err("nor for who comes anew");
        assert!(remedy(error.fault()).contains("grant role LEDGERLINE to user LEDGERLINE"), "{error:?}");

        // In the middle of a transaction: the lane's position has moved in it, and moves back.
        tell(&place, json!({"sql": r"^\s*copy", "code": "000606", "message": "No active warehouse selected in the current session."})).await;
        let error = Box::pin(load::load(&ground.store, &ground.warehouse, &ground.topics, "customers", |_| {})).await.expect_err("no warehouse");
        assert!(remedy(error.fault()).contains("grant usage on warehouse WH to role LEDGERLINE"), "{error:?}");
        tell(&place, json!({})).await;
        assert_eq!(number(&ground, "select count(*) from raw.customers").await, 0);
        assert_eq!(number(&ground, "select max(last_offset) from raw._positions").await, -1);
        assert_eq!(ground.load("customers").await.rows, 5);
        assert_eq!(number(&ground, "select count(*) from raw.customers").await, 5);
        ground.end().await;
    }

    #[tokio::test]
    async fn every_session_says_whose_it_is() {
        let place = Place::new().await;
        let ground = Box::pin(place.ground()).await;
        ground.land(CUSTOMERS, 0, &envelopes(1..3)).await;
        ground.load("customers").await;
        let url = format!("{}double/sign-ins?database={}", place.access.endpoint.as_ref().expect("it has one"), place.name);
        let said: Vec<Value> = reqwest::get(url).await.expect("the double answers").json().await.expect("a list");
        // The question of the connection, then the tagged one's questions and the load's transaction.
        assert_eq!(said[0], json!({"user": "LEDGERLINE", "role": "LEDGERLINE", "warehouse": "WH", "query_tag": "ledgerline"}));
        assert!(said.len() > 2 && said[1..].iter().all(|it| it["query_tag"] == TAG), "{said:?}");
        ground.end().await;
    }
}

/// What no double shows.
#[cfg(feature = "account")]
mod account {
    use super::*;

    /// Opens nothing: it belongs to the tests of the protocol.
    const OTHER_KEY: &str = include_str!("../../../src/warehouse/snowflake/throwaway_key.pem");

    #[tokio::test]
    async fn a_statement_that_takes_over_a_minute_is_waited_for() {
        let snowflake = Snowflake::connect(&server()).await.expect("the account lets us in");
        let answer = snowflake.rows("call system$wait(70)").await.expect("it ends");
        assert!(answer[0][0].as_deref().is_some_and(|it| it.contains("70")), "{answer:?}");
    }

    #[tokio::test]
    async fn a_key_that_is_not_the_users_and_a_role_that_is_not_granted_are_told_with_their_remedy() {
        let access = Access { private_key: Some(Secret::new(OTHER_KEY)), ..server() };
        let error = Snowflake::connect(&access).await.expect_err("the key is not registered");
        assert!(remedy(error.fault()).contains("set rsa_public_key"), "{error:?}");

        let url = Url::parse(server().url.reveal()).expect("an address");
        let kept: Vec<(String, String)> =
            url.query_pairs().filter(|(key, _)| key != "role").map(|(key, value)| (key.into_owned(), value.into_owned())).collect();
        let mut other = url.clone();
        other.query_pairs_mut().clear().extend_pairs(kept).append_pair("role", "LEDGERLINE_NOBODY_HAS_THIS");
        let error = Snowflake::connect(&Access { url: Secret::new(other), ..server() }).await.expect_err("the role is not granted");
        assert!(remedy(error.fault()).contains("grant role LEDGERLINE_NOBODY_HAS_THIS"), "{error:?}");
    }

    #[tokio::test]
    async fn what_is_uploaded_is_removed_again_and_sessions_are_as_asked_for() {
        let place = Place::new().await;
        let ground = Box::pin(place.ground()).await;
        ground.land(CUSTOMERS, 0, &envelopes(1..40)).await;
        assert_eq!(ground.load("customers").await.rows, 39);
        assert!(rows(&ground, "list @raw.ledgerline_stage").await.is_empty(), "nothing stays in the stage");
        let parameter = async |name: &str| rows(&ground, &format!("show parameters like '{name}' in session")).await[0][1].clone();
        assert_eq!(parameter("TIMEZONE").await.as_deref(), Some("UTC"));
        assert_eq!(parameter("QUERY_TAG").await.as_deref(), Some(TAG));
        assert_eq!(number(&ground, "select max(_offset) from raw.customers").await, 38);
        ground.end().await;
        place.end().await;
    }
}
