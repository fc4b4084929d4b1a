"""The dbt project under test, run the way ledgerline runs it: through its worker, one JSON object a line."""

import json
import os
import subprocess
import sys
import time
from urllib.parse import unquote, urlsplit

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
WORKER = os.path.join(ROOT, "src", "dbt", "worker.py")
PROJECT = os.path.join(ROOT, "dbt")

# The five tasks of the DAG, as refresh names them.
TASKS = {
    "dbt_staging": ("run", ["tag:staging"], []),
    "dbt_test_staging": ("test", ["tag:staging"], ["--indirect-selection", "empty"]),
    "dbt_snapshot": ("snapshot", ["tag:snapshot"], []),
    "dbt_analytics": ("run", ["tag:analytics"], []),
    "dbt_test_analytics": ("test", ["tag:analytics"], ["--indirect-selection", "empty"]),
}


class Dbt:
    def __init__(self, database, work_dir, variables=None):
        address = urlsplit(database)
        environment = {
            **os.environ,
            "LEDGERLINE_DBT_HOST": address.hostname,
            "LEDGERLINE_DBT_PORT": str(address.port or 5432),
            "LEDGERLINE_DBT_USER": unquote(address.username or "postgres"),
            "DBT_ENV_SECRET_LEDGERLINE_PASSWORD": unquote(address.password or ""),
            "LEDGERLINE_DBT_DATABASE": address.path.lstrip("/"),
        }
        self.variables = variables or {}
        self.worker = subprocess.Popen([sys.executable, WORKER, PROJECT, work_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        self.asked = 0

    def __call__(self, command, select=(), args=(), **variables):
        """→ (what went wrong: [(node, status, message)], seconds, [node])"""
        self.asked += 1
        request = {"id": self.asked, "command": command, "select": list(select), "args": list(args), "vars": {**self.variables, **variables}}
        began = time.monotonic()
        self.worker.stdin.write(json.dumps(request) + "\n")
        self.worker.stdin.flush()
        for line in self.worker.stdout:
            message = json.loads(line)
            if message["kind"] == "done":
                wrong = [
                    (node["name"], node["status"], node["message"], node.get("failing"))
                    for node in message["nodes"]
                    if node["status"] not in ("success", "pass")
                ]
                if not message["ok"] and not wrong:
                    wrong = [("dbt", "error", message["error"])]
                return wrong, time.monotonic() - began, message["nodes"]
        raise SystemExit(f"the dbt worker ended with {self.worker.wait()}")

    def run_tasks(self):
        wrong, seconds, nodes = [], {}, []
        for task, (command, select, args) in TASKS.items():
            found, seconds[task], ran = self(command, select, args)
            wrong += found
            nodes += ran
        return wrong, seconds, nodes

    def close(self):
        self.worker.stdin.close()
        self.worker.wait(timeout=20)
