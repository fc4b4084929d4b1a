"""Holds two summaries of `run --once` on one data dir against what they must say: usage: check_summary.py [--debezium] FIRST SECOND"""

import json
import sys

DEBEZIUM = "--debezium" in sys.argv
FIRST, SECOND = sys.argv[-2:]
KPIS = {
    "total_balance", "total_transactions", "average_balance_per_account", "total_accounts", "total_customers",
    "transaction_amount_over_time", "average_balance_per_account_type", "transaction_amount_by_type",
    "average_balance_by_account_type", "total_customers_balance",
}


def check(path, posted):
    with open(path, encoding="utf-8") as file:
        summary = json.load(file)
    assert summary["schema"] == 1, summary["schema"]
    assert summary["outcome"] == "success", summary["outcome"]
    assert summary["reconcile"]["ok"] is True, [it for it in summary["reconcile"]["checks"] if not it["ok"]]
    tests = summary["dbt"]["tests"]
    assert tests["pass"] > 0 and tests["fail"] == tests["error"] == tests["skip"] == 0, tests
    assert set(summary["kpis"]) == KPIS, sorted(set(summary["kpis"]) ^ KPIS)
    assert summary["bank"]["transactions"] == posted, summary["bank"]
    bank, events = summary["bank"], summary["cdc"]["events"]
    if not DEBEZIUM:
        # Our own capture opens the bank when its slot is there, so every row it wrote is an event; and it counts what it sends.
        if path == FIRST:
            rows = sum(bank[table] for table in ("customers", "accounts", "transactions", "ledger_entries"))
            assert sum(events.values()) == rows + bank["updates"] + 2 * bank["deletes"], (bank, events)
        assert events["transactions"] == summary["lake"]["records"]["transactions"], (events, summary["lake"])
    assert summary["lake"]["records"]["transactions"] >= 1000, summary["lake"]
    assert summary["warehouse"]["rows_loaded"]["transactions"] > 0, summary["warehouse"]
    assert all(dag["state"] == "success" for dag in summary["dags"]), summary["dags"]
    assert {dag["dag_id"] for dag in summary["dags"]} == {"MinIO_S3_to_Snowflake", "DBT_Bank_Data_Transformation_Pipeline"}
    assert len(summary["mails"]) >= 2, summary["mails"]
    assert summary["peak_rss_mb"] <= 400, summary["peak_rss_mb"]
    return summary


first, second = check(FIRST, 1000), check(SECOND, 2000)
days = len(first["kpis"]["transaction_amount_over_time"])
assert 30 <= days <= 31, days
assert second["kpis"]["total_transactions"] > first["kpis"]["total_transactions"]
print(f"both runs reconcile; {days} days; {first['dbt']['tests']['pass']} tests pass; peak {first['peak_rss_mb']} MB")
