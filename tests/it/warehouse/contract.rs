//! What every warehouse promises, asked of each: of PostgreSQL here, of Snowflake beside this.

use ledgerline::{
    change::{Lsn, Topics},
    kpi, lake,
    stream::Lane,
    warehouse::{Position, SnapshotEnds, Warehouse, load, reconcile},
};
use serde_json::json;

use super::{
    bank::{Bank, models},
    ground::{Ground, envelope, envelopes},
};

pub(super) const CUSTOMERS: &str = "bank.public.customers";

/// Runs statements on the warehouse, in its own words.
async fn run(ground: &Ground, on_postgres: &str, on_snowflake: &[String]) {
    match &ground.warehouse {
        Warehouse::Postgres(_) => ground.database.run(on_postgres).await,
        #[cfg(feature = "snowflake")]
        Warehouse::Snowflake(snowflake) => {
            for sql in on_snowflake {
                snowflake.rows(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
            }
        }
    }
    // Without the double nobody asks in its words.
    let _ = on_snowflake;
}

/// The number a question is answered with; the question is in words that both understand.
pub(super) async fn number(ground: &Ground, sql: &str) -> i64 {
    match &ground.warehouse {
        Warehouse::Postgres(_) => ground.database.number(&format!("select ({sql})::bigint")).await,
        #[cfg(feature = "snowflake")]
        Warehouse::Snowflake(snowflake) => {
            let rows = snowflake.rows(&format!("select ({sql})::varchar")).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
            rows[0][0].as_deref().and_then(|it| it.parse().ok()).unwrap_or_else(|| panic!("{sql}: {rows:?}"))
        }
    }
}

/// Objects arrive once, in order; what is no JSON is set aside; two loaders at once are as good as one.
pub(super) async fn loads_each_object_once(ground: Ground) {
    ground.warehouse.prepare().await.expect("preparing again is harmless");
    assert_eq!(ground.warehouse.cut().await.expect("asks"), None);
    let (first, second) = (Lane { topic: CUSTOMERS.into(), partition: 0 }, Lane { topic: CUSTOMERS.into(), partition: 1 });
    let records = ground.land(CUSTOMERS, 0, &[envelope(1), None, Some(b"{\"op\": \"c\", it breaks off".to_vec()), envelope(2)]).await;
    ground.land(CUSTOMERS, 1, &envelopes(3..9)).await;
    let pending = load::discover(&ground.store, &ground.warehouse, &ground.topics).await.expect("discovers");
    assert_eq!((pending.len(), pending[0].files, pending[0].rows), (1, 2, 10));

    let loaded = ground.load("customers").await;
    assert_eq!((loaded.files, loaded.rows, loaded.rejected), (2, 10, 1));
    assert_eq!(ground.load("customers").await, load::Loaded::default());
    assert_eq!(number(&ground, "select count(*) from raw.customers").await, 9);
    assert_eq!(number(&ground, "select count(*) from raw.customers where v is null").await, 1, "the tombstone");
    assert_eq!(number(&ground, "select max(\"offset\") from raw._rejected where landed").await, 2);
    let positions = ground.warehouse.loaded_positions().await.expect("asks");
    assert_eq!((positions[&first], positions[&second]), (3, 5));

    // Behind what a run has seen, the next ones count.
    let seen: Vec<Position> =
        positions.iter().map(|(lane, last_offset)| Position { topic: lane.topic.to_string(), partition: lane.partition, last_offset: *last_offset }).collect();
    assert!(ground.warehouse.loaded_since(&ground.topics, &seen).await.expect("asks").is_empty());
    let more: Vec<_> = (0..20).map(|id| envelopes(100 + id * 5..105 + id * 5)).collect();
    ground.land_on(super::ground::LANDED_MS, CUSTOMERS, 0, &more).await;
    let (one, other) = tokio::join!(load_or_lose(&ground), load_or_lose(&ground));
    let rest = ground.load("customers").await;
    assert_eq!(one + other + rest.files, 20);
    assert_eq!(number(&ground, "select count(*) from raw.customers").await, 109);
    assert_eq!(number(&ground, "select count(*) from (select distinct _partition, _offset from raw.customers) it").await, 109, "nothing is doubled");
    assert_eq!(ground.warehouse.loaded_since(&ground.topics, &seen).await.expect("asks")["customers"].rows, 100);
    let stats = ground.warehouse.stats(&ground.topics).await.expect("counts");
    assert_eq!((stats.files_loaded["customers"], stats.rows_loaded["customers"], stats.rows_rejected["customers"]), (22, 110, 1));
    assert_eq!(number(&ground, &format!("select count(*) from raw.customers where _object = '{}'", records.data)).await, 3);

    for end in [3, 7] {
        let ends = SnapshotEnds { lsn: Some(Lsn(40)), lanes: vec![(CUSTOMERS.to_owned(), 0, end), (CUSTOMERS.to_owned(), 1, 0)] };
        ground.warehouse.set_snapshot_ends(&ends).await.expect("says where");
    }
    assert_eq!(number(&ground, "select cast(sum(end_offset) * 10 + count(*) as integer) from raw._snapshot_ends").await, 72);
    lake::log::lanes(&ground.store).await.expect("the lake is as it was");
    let other = load::discover(&ground.store, &ground.warehouse, &Topics::new("bank2")).await.expect_err("another capture is not put beside this one");
    assert_eq!(other.to_string(), format!("the warehouse holds what was captured as {CUSTOMERS}, which is not of cdc.topic_prefix bank2"));
    ground.end().await;
}

/// Of two loaders one may be told that it was too late; it has done nothing then.
async fn load_or_lose(ground: &Ground) -> u64 {
    let mut files = 0;
    // What counts is what was told as done before it gave up.
    let _ = load::load(&ground.store, &ground.warehouse, &ground.topics, "customers", |done| files += done.files).await;
    files
}

/// The ten KPIs are those of the source, the books balance at a mark, and a row that is tampered with is named.
pub(super) async fn counts_the_money_of_the_source(ground: Ground) {
    let mut bank = Bank::new().await;
    bank.source.run("insert into customers select n, 'A', 'B' || n from generate_series(1, 20) n; insert into accounts select n, n, case when n % 3 = 0 then 'LOAN' else 'CHECKING' end, 0 from generate_series(1, 20) n; truncate notebook").await;
    bank.snapshot().await;
    for n in 1..=8 {
        bank.pay(&format!(
            "insert into transactions values ({n}, {n}, 'DEPOSIT', {n}.07, 'COMPLETED', timestamptz '2026-11-0{n} 12:00+00');
             insert into ledger_entries values ({n}0, {n}, {n}, 'DEBIT', {n}.07), ({n}1, {n}, null, 'CREDIT', {n}.07); update accounts set balance = balance + {n}.07 where id = {n}"
        ))
        .await;
    }
    bank.pay("delete from accounts where id = 20; delete from customers where id = 20").await;
    bank.pay("insert into customers values (21, 'Born', 'Dead'); delete from customers where id = 21").await;
    bank.repeat("bank.public.accounts", 3);
    bank.land(&ground).await;
    ground.load_all().await;
    assert!(matches!(kpi::read(&ground.warehouse).await, Err(kpi::Error::NotYet)));
    run(&ground, &models(), &models_of_snowflake()).await;

    assert_eq!(kpi::read(&ground.warehouse).await.expect("computes"), kpi::on_source(&bank.source.url).await.expect("computes"));
    let cut = kpi::read_as_of(&ground.warehouse).await.expect("computes").cut.expect("there is a cut");
    let shown_at = chrono::Utc::now();
    let took = kpi::measure(&ground.warehouse, cut.lsn, shown_at).await.expect("measures");
    assert_eq!(took.count(), 10, "each commit once");
    assert_eq!(kpi::measure(&ground.warehouse, cut.lsn, shown_at).await.expect("measures").count(), 0);

    let mark = reconcile::mark(&bank.source.url).await.expect("marks");
    let settle = || reconcile::settle(&mark, &bank.source.url, &ground.store, &ground.warehouse, &ground.topics, true);
    let report = settle().await.expect("settles");
    let failed: Vec<_> = report.checks.iter().filter(|it| !it.ok).collect();
    assert!(report.ok && report.covered, "{failed:?}");
    assert_eq!(report.checks.len(), 33);

    let sql = "update analytics.dim_accounts set balance = balance + 0.01 where account_id = 5";
    run(&ground, sql, &[sql.to_owned()]).await;
    let sql = "delete from raw.ledger_entries where _offset = 4";
    run(&ground, sql, &[sql.to_owned()]).await;
    let report = settle().await.expect("settles");
    let failed: Vec<&str> = report.checks.iter().filter(|it| !it.ok).map(|it| it.name.as_str()).collect();
    assert_eq!(
        failed,
        [
            "ledger_entries.records.lake_raw",
            "accounts.balance.staging_analytics",
            "ledger_entries.count.lake_raw",
            "ledger_entries.amount.lake_raw",
            "ledger_entries.count.raw_staging",
            "ledger_entries.amount.raw_staging"
        ]
    );
    let detail = |name: &str| report.checks.iter().find(|it| it.name == name).and_then(|it| it.detail.clone()).expect("it says where");
    assert_eq!(detail("accounts.balance.staging_analytics"), "id 5 is off by 0.01 in analytics");
    assert_eq!(detail("ledger_entries.count.lake_raw"), "id 30 is missing in raw");
    bank.source.drop().await;
    ground.end().await;
}

/// Rows of an incremental snapshot, which tell neither commit nor place: they are the state of what nothing else is known of.
pub(super) async fn what_is_read_again_counts_only_where_nothing_else_is_known(ground: Ground) {
    let mut bank = Bank::new().await;
    bank.source.run("insert into customers select n, 'A', 'B' || n from generate_series(1, 20) n; insert into accounts select n, n, 'LOAN', 0 from generate_series(1, 20) n; truncate notebook").await;
    bank.snapshot().await;
    bank.pay("update accounts set balance = balance + 3 where id = 5; delete from accounts where id = 20").await;
    bank.land(&ground).await;
    // Here before the capture: no change tells of it.
    bank.source
        .run("alter table accounts disable trigger noted; insert into accounts values (500, 1, 'LOAN', -1); alter table accounts enable trigger noted")
        .await;
    let read = |id: i64, balance: &str| {
        let source = json!({"snapshot": "incremental", "txId": null, "lsn": null, "sequence": "[\"1\",\"1\"]"});
        let row = json!({"id": id, "customer_id": 1, "account_type": "LOAN", "balance": balance});
        Some(json!({"before": null, "after": row, "source": source, "op": "r"}).to_string().into_bytes())
    };
    // 5 has moved since, and 20 is gone.
    ground.land("bank.public.accounts", 0, &[read(500, "-1.00"), read(5, "0.00"), read(20, "0.00")]).await;
    let mark = reconcile::mark(&bank.source.url).await.expect("marks");
    bank.pay("update accounts set balance = balance + 3 where id = 6; insert into accounts values (600, 1, 'LOAN', 7)").await;
    bank.land(&ground).await;
    // Behind the mark it was made and read.
    ground.land("bank.public.accounts", 0, &[read(600, "7.00")]).await;
    ground.load_all().await;
    run(&ground, &models(), &models_of_snowflake()).await;

    let report = reconcile::settle(&mark, &bank.source.url, &ground.store, &ground.warehouse, &ground.topics, true).await.expect("settles");

    assert!(report.covered);
    let failed = |of: &str| report.checks.iter().filter(|it| !it.ok && it.name.ends_with(of)).map(|it| it.name.as_str()).collect::<Vec<_>>();
    assert_eq!([failed(".source_lake"), failed(".lake_raw")], [Vec::<&str>::new(), Vec::new()], "{report:?}");
    // These models do not know what to do with it; dbt's do.
    let detail = report.checks.iter().find(|it| it.name == "accounts.count.raw_staging").and_then(|it| it.detail.clone());
    assert_eq!(detail.as_deref(), Some("id 500 is missing in staging"));
    bank.source.drop().await;
    ground.end().await;
}

/// [`models`] in Snowflake's words.
fn models_of_snowflake() -> Vec<String> {
    let tables = [
        ("customers", "customer", "dim_customers", "first_name varchar, last_name varchar"),
        ("accounts", "account", "dim_accounts", "customer_id number(38,0), account_type varchar, balance number(18,2)"),
        (
            "transactions",
            "transaction",
            "fct_transactions",
            "account_id number(38,0), txn_type varchar, amount number(18,2), status varchar, created_at timestamp_ntz",
        ),
        (
            "ledger_entries",
            "ledger_entry",
            "fct_ledger_entries",
            "transaction_id number(38,0), account_id number(38,0), entry_type varchar, amount number(18,2)",
        ),
    ];
    let newest_read = "(select max(v:source:lsn::number(38,0)) from raw.customers where v:op::varchar = 'r')";
    let mut all = vec![
        "create or replace table staging.commits as select distinct split_part(v:id::varchar, ':', 1)::number(38,0) as xid, split_part(v:id::varchar, ':', 2)::number(38,0) as lsn, v:ts_ms::number(38,0) * 1000 as committed_micros from raw.boundaries where v:status::varchar = 'END'".to_owned(),
        format!("create or replace table staging.cut as select max(lsn) as lsn, '2026-11-22 10:00:00'::timestamp_ntz as committed_at from (select lsn from staging.commits union all select {newest_read} as lsn) it"),
    ];
    for (table, one, model, columns) in tables {
        let typed: Vec<String> = columns
            .split(", ")
            .map(|column| {
                let (name, kind) = column.split_once(' ').expect("a name and a type");
                format!("image:{name}::{kind} as {name}")
            })
            .collect();
        let alive = if model.starts_with("dim") { "op <> 'd' as is_current" } else { "case when op = 'd' then current_date() end as deleted_at" };
        all.push(format!(
            "create or replace table staging.stg_bank__{table} as
               with e as (select v:op::varchar as op, v:source:txId::number(38,0) as xid, v:source:lsn::number(38,0) as lsn, get(v, iff(v:op::varchar = 'd', 'before', 'after')) as image from raw.{table} where v is not null),
               numbered as (select e.*, image:id::number(38,0) as key, row_number() over (partition by xid, lsn, image:id::number(38,0), op order by op) as repeat_no from e where op <> 'r' or lsn = {newest_read})
               select coalesce(c.lsn, n.lsn) as tx_lsn, n.xid as tx_id, n.lsn, n.op, n.key as {one}_id, {} from numbered n left join staging.commits c on c.xid = n.xid and n.op <> 'r' where n.repeat_no = 1",
            typed.join(", ")
        ));
        all.push(format!(
            "create or replace table analytics.{model} as select latest.*, {alive} from (select s.*, row_number() over (partition by {one}_id order by tx_lsn desc, lsn desc) as age from staging.stg_bank__{table} s) latest where age = 1"
        ));
    }
    all
}

#[tokio::test]
async fn postgres_loads_each_object_once() {
    Box::pin(loads_each_object_once(Ground::new().await)).await;
}

#[tokio::test]
async fn postgres_counts_the_money_of_the_source() {
    Box::pin(counts_the_money_of_the_source(Ground::new().await)).await;
}

#[tokio::test]
async fn on_postgres_what_is_read_again_counts_only_where_nothing_else_is_known() {
    Box::pin(what_is_read_again_counts_only_where_nothing_else_is_known(Ground::new().await)).await;
}
