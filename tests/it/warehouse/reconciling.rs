//! Reconciliation: silent when all is well, also while the bank moves; exact when something is not.

use ledgerline::{
    fault::{Diagnose, Fault},
    warehouse::{
        Error,
        reconcile::{self, Amount, Check, Mark, Report},
    },
};

use super::{bank::Bank, ground::Ground};

async fn settle(mark: &Mark, bank: &Bank, ground: &Ground) -> Report {
    reconcile::settle(mark, &bank.source.url, &ground.store, &ground.warehouse, &ground.topics, false).await.expect("settles")
}

async fn mark(bank: &Bank) -> Mark {
    reconcile::mark(&bank.source.url).await.expect("marks")
}

fn failed(report: &Report) -> Vec<&str> {
    report.checks.iter().filter(|it| !it.ok).map(|it| it.name.as_str()).collect()
}

fn detail<'a>(report: &'a Report, name: &str) -> &'a str {
    report.checks.iter().find(|it| it.name == name).and_then(|it| it.detail.as_deref()).unwrap_or_else(|| panic!("{name} has nothing to say: {report:?}"))
}

/// A bank with a past, a snapshot of it, and changes of every kind after that.
async fn lively() -> (Bank, Ground) {
    let (mut bank, ground) = (Bank::new().await, Ground::new().await);
    bank.source.run("insert into customers select n, 'A', 'B' from generate_series(1, 300) n; insert into accounts select n, n, 'CHECKING', 0 from generate_series(1, 300) n; truncate notebook").await;
    // An attempt that died: what it read of a customer who was deleted before the next one must not haunt us.
    bank.source.run("insert into customers values (9999, 'Gone', 'Since'); insert into accounts values (9999, 9999, 'LOAN', 77)").await;
    bank.snapshot().await;
    bank.source.run("delete from accounts where id = 9999; delete from customers where id = 9999; truncate notebook").await;
    bank.snapshot().await;
    for n in 1..=40 {
        bank.pay(&format!(
            "insert into transactions values ({n}, {n}, 'DEPOSIT', {n}.07, 'COMPLETED', now()); insert into ledger_entries values ({n}0, {n}, {n}, 'DEBIT', {n}.07), ({n}1, {n}, null, 'CREDIT', {n}.07);
             update accounts set balance = balance + {n}.07 where id = {n}"
        ))
        .await;
    }
    bank.pay("delete from accounts where id = 300; delete from customers where id = 300").await;
    bank.pay("insert into customers values (301, 'Born', 'Dead'); delete from customers where id = 301").await;
    bank.pay("update customers set last_name = 'C' where id = 5; update customers set last_name = 'D' where id = 5").await;
    bank.repeat("bank.public.accounts", 9);
    bank.repeat("bank.transaction", 6);
    bank.arrive(&ground).await;
    (bank, ground)
}

async fn end(bank: Bank, ground: Ground) {
    bank.source.drop().await;
    ground.end().await;
}

#[tokio::test]
async fn an_honest_pipeline_reconciles_and_says_what_it_compared() {
    let (bank, ground) = lively().await;
    let mark: Mark = serde_json::from_str(&serde_json::to_string(&mark(&bank).await).expect("writes")).expect("a mark can be kept");

    let report = settle(&mark, &bank, &ground).await;

    assert!(report.ok, "{report:?}");
    let of = |name: &str| report.checks.iter().find(|it| it.name == name).cloned();
    let money = Amount::Money("822.80".parse().expect("money"));
    let holds = |name: &str, amount| Some(Check { name: name.to_owned(), ok: true, expected: amount, actual: amount, detail: None });
    for hop in ["source_lake", "lake_raw", "raw_staging", "staging_analytics"] {
        assert_eq!(of(&format!("accounts.balance.{hop}")), holds(&format!("accounts.balance.{hop}"), money));
        assert_eq!(of(&format!("ledger_entries.count.{hop}")), holds(&format!("ledger_entries.count.{hop}"), Amount::Rows(80)));
        assert_eq!(of(&format!("customers.count.{hop}")), holds(&format!("customers.count.{hop}"), Amount::Rows(299)));
    }
    assert_eq!(of("boundaries.records.lake_raw"), holds("boundaries.records.lake_raw", Amount::Rows(92)));
    assert_eq!(report.checks.len(), 5 + 4 * 4 + 3 * 4);
    let json = serde_json::to_value(&report.checks[5]).expect("writes");
    assert_eq!(json, serde_json::json!({"name": "customers.count.source_lake", "ok": true, "expected": 299, "actual": 299, "detail": null}));
    end(bank, ground).await;
}

#[tokio::test]
async fn an_empty_bank_reconciles() {
    let (mut bank, ground) = (Bank::new().await, Ground::new().await);
    bank.arrive(&ground).await;
    let report = settle(&mark(&bank).await, &bank, &ground).await;
    assert!(report.ok, "{report:?}");
    end(bank, ground).await;
}

#[tokio::test]
async fn a_moving_bank_is_compared_at_the_mark() {
    let (mut bank, ground) = lively().await;
    // Open at the mark, committed after it; the younger one beside it was committed before.
    let mut open = bank.begin().await;
    open.run("update accounts set balance = balance + 1000 where id = 7; insert into customers values (400, 'Not', 'Seen')").await;
    bank.pay("update accounts set balance = balance + 0.01 where id = 8; insert into customers values (401, 'Seen', 'Yes')").await;
    let mark = mark(&bank).await;
    let early = settle(&mark, &bank, &ground).await;
    bank.commit(open).await;
    bank.pay("update accounts set balance = 5 where id = 8; delete from customers where id = 401; delete from accounts where id = 200").await;

    assert!(!early.ok && !early.covered, "what has not arrived is no difference yet: {early:?}");
    assert_eq!(failed(&early), ["customers.count.source_lake", "accounts.balance.source_lake"]);

    bank.arrive(&ground).await;
    assert!(reconcile::is_covered(&mark, &ground.warehouse).await.expect("asks"));
    let report = settle(&mark, &bank, &ground).await;
    assert!(report.ok && report.covered, "{report:?}");
    let balance = report.checks.iter().find(|it| it.name == "accounts.balance.raw_staging").expect("it is checked");
    assert_eq!(balance.actual.to_string(), "822.81");

    // In the middle of a run of dbt the cut is ahead of the models.
    ground.database.run("create table staging.positions as select 'stg_bank__' || name as name, lsn from unnest(array['customers', 'accounts', 'transactions', 'ledger_entries']) name, staging.cut").await;
    assert!(reconcile::is_covered(&mark, &ground.warehouse).await.expect("asks"));
    ground.database.run("update staging.positions set lsn = 0 where name = 'stg_bank__accounts'").await;
    assert!(!reconcile::is_covered(&mark, &ground.warehouse).await.expect("asks"));
    end(bank, ground).await;
}

#[tokio::test]
async fn a_changed_cent_is_found_where_it_happened() {
    let (bank, ground) = lively().await;
    let mark = mark(&bank).await;
    let cases = [
        (
            "update raw.ledger_entries set v = jsonb_set(v, '{after,amount}', '\"17.08\"') where v #>> '{after,id}' = '171'",
            "ledger_entries.amount.lake_raw",
            "id 171 is off by 0.01 in raw",
            "ledger_entries.amount.raw_staging",
        ),
        (
            "update staging.stg_bank__accounts set balance = balance - 0.01 where account_id = 9",
            "accounts.balance.raw_staging",
            "id 9 is off by -0.01 in staging",
            "accounts.balance.staging_analytics",
        ),
        (
            "update analytics.fct_transactions set amount = amount + 0.01 where transaction_id = 33",
            "transactions.amount.staging_analytics",
            "id 33 is off by 0.01 in analytics",
            "",
        ),
    ];
    for (tamper, name, says, too) in cases {
        let mut expected = vec![name];
        expected.extend(Some(too).filter(|it| !it.is_empty()));
        tampered(&ground, tamper, async || {
            let report = settle(&mark, &bank, &ground).await;
            assert!(!report.ok);
            assert_eq!((failed(&report), detail(&report, name)), (expected, says));
        })
        .await;
    }
    // One cent here, one back there: the totals agree, the books do not.
    tampered(
        &ground,
        "update analytics.dim_accounts set balance = balance + case account_id when 11 then 0.01 when 12 then -0.01 else 0 end where is_current",
        async || {
            let report = settle(&mark, &bank, &ground).await;
            assert_eq!(failed(&report), ["accounts.balance.staging_analytics"]);
            assert_eq!(detail(&report, "accounts.balance.staging_analytics"), "id 11 is off by 0.01 in analytics; id 12 is off by -0.01 in analytics");
        },
    )
    .await;
    assert!(settle(&mark, &bank, &ground).await.ok);
    end(bank, ground).await;
}

#[tokio::test]
async fn a_missing_row_and_a_doubled_row_are_named() {
    let (bank, ground) = lively().await;
    let mark = mark(&bank).await;
    tampered(&ground, "delete from raw.transactions where (v #>> '{after,id}')::int between 12 and 14", async || {
        let report = settle(&mark, &bank, &ground).await;
        assert_eq!(
            failed(&report),
            [
                "transactions.records.lake_raw",
                "transactions.count.lake_raw",
                "transactions.amount.lake_raw",
                "transactions.count.raw_staging",
                "transactions.amount.raw_staging"
            ]
        );
        assert_eq!(detail(&report, "transactions.count.lake_raw"), "ids 12 to 14 are missing in raw");
        assert!(detail(&report, "transactions.records.lake_raw").starts_with("raw holds 37 of the 40 records of raw/transactions/"));
    })
    .await;
    tampered(&ground, "insert into staging.stg_bank__ledger_entries select * from staging.stg_bank__ledger_entries where ledger_entry_id = 50", async || {
        let report = settle(&mark, &bank, &ground).await;
        assert_eq!(detail(&report, "ledger_entries.count.raw_staging"), "id 50 is 2 times in staging");
    })
    .await;
    tampered(&ground, "insert into analytics.dim_customers select * from analytics.dim_customers where customer_id = 299", async || {
        let report = settle(&mark, &bank, &ground).await;
        assert_eq!(
            (failed(&report), detail(&report, "customers.count.staging_analytics")),
            (vec!["customers.count.staging_analytics"], "id 299 is 2 times in analytics")
        );
    })
    .await;
    tampered(&ground, "insert into raw.customers select v, _topic, 7, _offset, 'from nowhere' from raw.customers where _offset = 3", async || {
        let report = settle(&mark, &bank, &ground).await;
        assert_eq!(
            (failed(&report), detail(&report, "customers.records.lake_raw")),
            (vec!["customers.records.lake_raw"], "raw holds 1 of the 0 records of from nowhere")
        );
    })
    .await;
    end(bank, ground).await;
}

#[tokio::test]
async fn what_the_stream_lost_or_made_up_is_named_against_the_source_also_while_it_moves() {
    let (mut bank, ground) = lively().await;
    // Written past the capture: the lake cannot know.
    bank.source.run("alter table accounts disable trigger noted; update accounts set balance = balance + 0.01 where id = 21; delete from accounts where id in (30, 31); insert into accounts values (500, 1, 'LOAN', -1); alter table accounts enable trigger noted").await;
    let mark = mark(&bank).await;
    bank.pay("update accounts set balance = balance + 3 where id = 22; delete from accounts where id = 40").await;
    bank.arrive(&ground).await;

    let report = settle(&mark, &bank, &ground).await;

    assert!(report.covered);
    assert_eq!(failed(&report), ["accounts.count.source_lake", "accounts.balance.source_lake"]);
    let says = "id 21 is off by -0.01 in the lake; ids 30 to 31 are only in the lake; id 500 is missing in the lake";
    assert_eq!(detail(&report, "accounts.count.source_lake"), says);
    end(bank, ground).await;
}

#[tokio::test]
async fn a_mark_from_before_the_snapshot_is_refused() {
    let (mut bank, ground) = (Bank::new().await, Ground::new().await);
    bank.source.run("insert into customers values (1, 'A', 'B')").await;
    let mark = mark(&bank).await;
    bank.source.run("insert into customers values (2, 'A', 'B'); truncate notebook").await;
    bank.snapshot().await;
    bank.arrive(&ground).await;
    let error = reconcile::settle(&mark, &bank.source.url, &ground.store, &ground.warehouse, &ground.topics, false).await.expect_err("nobody knows that state");
    assert!(matches!(error, Error::StaleMark { .. }) && error.fault() == Fault::Transient, "{error:?}");
    end(bank, ground).await;
}

#[tokio::test]
async fn transaction_numbers_that_came_round_are_told_apart() {
    let ground = Ground::new().await;
    let change = |op: &str, xid: u32, lsn: i64, id: i64, balance: &str| {
        let value = format!(r#"{{"before":null,"after":{{"id":{id},"balance":"{balance}"}},"source":{{"txId":{xid},"lsn":{lsn}}},"op":"{op}"}}"#);
        Some(value.into_bytes())
    };
    let end = |xid: u32, lsn: i64| Some(format!(r#"{{"status":"END","id":"{xid}:{lsn}","event_count":1,"data_collections":[],"ts_ms":1}}"#).into_bytes());
    // 2 is two transactions; 5 began before the mark's position and ended unseen; 6 came after it.
    let changes = [
        change("c", 2, 5, 1, "1.00"),
        change("u", 2_000_000_000, 15, 1, "2.00"),
        change("u", 4_294_967_290, 90, 1, "3.00"),
        change("u", 5, 190, 1, "9.00"),
        change("c", 2, 290, 2, "7.00"),
        change("c", 6, 390, 3, "8.00"),
    ];
    ground.land("bank.public.accounts", 0, &changes).await;
    ground
        .land(
            "bank.transaction",
            0,
            &[end(2, 10), end(2_000_000_000, 20), end(4_000_000_000, 30), end(4_294_967_290, 100), end(5, 200), end(2, 300), end(6, 400)],
        )
        .await;
    ground.load_all().await;
    let empty = |table: &str| serde_json::json!({"table": table, "width": 1, "ranges": {}});
    let accounts = serde_json::json!({"table": "accounts", "width": 10, "ranges": {"0": {"rows": 2, "cents": 1000}}});
    let mark = serde_json::json!({
        "taken_at": "2026-11-22T10:00:00Z", "lsn": 350, "snapshot": "4294967299:4294967304:4294967299,4294967301",
        "tables": [empty("customers"), accounts, empty("transactions"), empty("ledger_entries")],
    });
    let mark: Mark = serde_json::from_value(mark).expect("a mark");

    let report = reconcile::settle(&mark, &ground.database.url, &ground.store, &ground.warehouse, &ground.topics, false).await.expect("settles");

    let balances: Vec<&Check> = report.checks.iter().filter(|it| it.name.starts_with("accounts.balance")).collect();
    assert!(balances[0].ok && balances[1].ok, "{balances:?}");
    assert_eq!((balances[0].name.as_str(), balances[1].actual.to_string()), ("accounts.balance.source_lake", "10.00".to_owned()));
    // dbt has not been here.
    assert!(!balances[2].ok && balances[2].actual.to_string() == "0.00");
    ground.end().await;
}

/// Runs `then` on a warehouse that was tampered with, and puts everything back.
async fn tampered(ground: &Ground, sql: &str, then: impl AsyncFnOnce()) {
    let keep: Vec<String> = [
        "raw.customers",
        "raw.transactions",
        "raw.ledger_entries",
        "staging.stg_bank__accounts",
        "staging.stg_bank__ledger_entries",
        "analytics.fct_transactions",
        "analytics.dim_accounts",
        "analytics.dim_customers",
    ]
    .into_iter()
    .map(str::to_owned)
    .collect();
    for table in &keep {
        ground.database.run(&format!("create table kept_{} as table {table}", table.replace('.', "_"))).await;
    }
    ground.database.run(sql).await;
    then().await;
    for table in &keep {
        let kept = format!("kept_{}", table.replace('.', "_"));
        ground.database.run(&format!("truncate {table}; insert into {table} table {kept}; drop table {kept}")).await;
    }
}
