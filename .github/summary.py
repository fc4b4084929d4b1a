"""Summaries of `ledgerline run --summary` as Markdown, for a job's page: usage: summary.py FILE…"""

import json
import sys
from pathlib import Path


def table(head, rows):
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(str(it).replace("|", "\\|") for it in row) + " |"


def lines(name, summary):
    bank, tests, reconcile = summary["bank"], summary["dbt"]["tests"], summary["reconcile"]
    yield f"## {name}: {summary['outcome']}"
    yield ""
    yield (
        f"{bank['customers']:,} customers, {bank['accounts']:,} accounts, {bank['transactions']:,} transactions; "
        f"dbt: {tests['pass']} tests pass, {tests['fail'] + tests['error']} fail, {tests['warn']} warn, {tests['skip']} skipped; "
        f"reconciliation {'agrees' if reconcile['ok'] else 'DIFFERS'} in {len(reconcile['checks'])} checks; peak {summary['peak_rss_mb']} MB."
    )
    yield ""
    differing = [it for it in reconcile["checks"] if not it["ok"]]
    if differing:
        yield from table(["differs", "expected", "actual"], ([it["name"], it["expected"], it["actual"]] for it in differing))
        yield ""
    landed, loaded = summary["lake"], summary["warehouse"]
    rows = ([it, landed["objects"].get(it, 0), landed["records"].get(it, 0), loaded["rows_loaded"].get(it, 0)] for it in sorted(landed["objects"]))
    yield from table(["table", "objects in the lake", "records", "rows loaded"], rows)
    yield ""
    yield from table(
        ["DAG", "run", "state", "task", "tries", "seconds"],
        (
            [dag["dag_id"], dag["run_id"], dag["state"], f"{task['task_id']}: {task['state']}", task["tries"], f"{task['seconds']:.1f}" if task["seconds"] else ""]
            for dag in summary["dags"]
            for task in dag["tasks"]
        ),
    )
    yield ""
    kpis = summary["kpis"] or {}
    yield from table(["KPI", "value"], ([key, value] for key, value in kpis.items() if not isinstance(value, list)))
    yield ""


for path in map(Path, sys.argv[1:]):
    if path.is_file():
        print("\n".join(lines(path.stem, json.loads(path.read_text(encoding="utf-8")))))
    else:
        print(f"## {path.stem}: no summary was written\n")
