"""dbt, kept warm: one process that has imported dbt and parsed the project, and runs what it is asked for.

stdin   one JSON object a line:
        {"id": 1, "command": "run", "select": ["tag:staging"], "exclude": [], "args": [], "vars": {...}, "tag": null | "..."}
        {"cancel": 1}
stdout  one JSON object a line; dbt's own words go to stderr and never in between:
        {"kind": "ready", "nodes": [...]}               the project was parsed, now or again
        {"kind": "node", "id": 1, "node": {...}}        a node started or ended
        {"kind": "done", "id": 1, "ok": true, "nodes": [...], "error": null | {"kind": "project" | "warehouse" | "dbt" | "cancelled", "message": "..."}}

The process ends when stdin closes: what runs then is interrupted, so that dbt cancels its queries first.
The project is parsed again when a file of it has changed since, and what cannot be parsed is an error of that request only.
"""

import datetime
import decimal
import json
import os
import queue
import signal
import sys
import threading
import time

# Failing rows that travel with a test's result. A mail shows them all, a screen the first.
FAILING_ROWS_MAX = 10
# A cell is for recognising a row, not for reading it.
CELL_CHARS_MAX = 200
# How long dbt may take to cancel its queries once nobody listens any more.
LAST_WORDS_SECONDS = 10.0
# An interruption is lost where Python may not raise, in a destructor for one. dbt is told again if it has not ended by then.
TELL_AGAIN_SECONDS = 4.0

# Who is started in the background of a script inherits that interruptions are ignored, and Python then leaves it so.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The channel is ours alone: whatever prints to stdout from here on prints to stderr.
channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
channel_lock = threading.Lock()


def tell(message):
    line = json.dumps(message, ensure_ascii=False, default=str)
    with channel_lock:
        try:
            channel.write(line + "\n")
            channel.flush()
        except OSError:  # The other side is gone; stdin will say so too.
            pass


class Requests(threading.Thread):
    """Reads stdin, so that a cancellation and the end of the parent are noticed while dbt runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.waiting = queue.Queue()
        self.lock = threading.Lock()
        self.running = None
        self.cancelled = set()

    def run(self):
        for line in sys.stdin.buffer:
            request = json.loads(line)
            if "cancel" in request:
                with self.lock:
                    if self.running == request["cancel"]:
                        threading.Thread(target=self.interrupt, args=[self.running], daemon=True).start()
                    else:
                        self.cancelled.add(request["cancel"])
            else:
                self.waiting.put(request)
        threading.Thread(target=self.interrupt, args=[self.running], daemon=True).start()
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while self.running is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        os._exit(0)

    def interrupt(self, request):
        while True:
            with self.lock:
                if request is None or self.running != request:
                    return
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(TELL_AGAIN_SECONDS)

    def begin(self, request):
        with self.lock:
            if request["id"] in self.cancelled:
                raise KeyboardInterrupt
            self.running = request["id"]
            self.cancelled.clear()

    def end(self):
        with self.lock:
            self.running = None


class Project:
    """The parsed project, and the files it was parsed from."""

    SUFFIXES = (".sql", ".yml", ".yaml", ".csv", ".py", ".md")
    NOT_OURS = {"target", "logs", "dbt_packages", ".git"}

    def __init__(self, project_dir, work_dir):
        self.dir = project_dir
        # No log: whatever matters is in the events and the results, and writing lines that nobody reads is a tenth of an invocation.
        self.quiet = ["--no-version-check", "--no-use-colors", "--no-print", "--no-write-json", "--log-level", "none", "--log-level-file", "none"]
        self.places = ["--project-dir", project_dir, "--profiles-dir", project_dir, "--target-path", work_dir, "--log-path", work_dir]
        self.manifest = None
        self.parsed_from = None

    def fingerprint(self):
        files = []
        for folder, folders, names in os.walk(self.dir):
            folders[:] = sorted(set(folders) - self.NOT_OURS)
            for name in sorted(names):
                if name.endswith(self.SUFFIXES):
                    path = os.path.join(folder, name)
                    status = os.stat(path)
                    files.append((path, status.st_mtime_ns, status.st_size))
        return files

    def parse(self):
        """Parses if it must. → None, or why the project cannot be parsed.

        Always with the project's own variables: dbt throws its cache away when they change, and ours only matter when a model runs.
        """
        files = self.fingerprint()
        if self.manifest is not None and files == self.parsed_from:
            return None
        outcome = dbtRunner().invoke([*self.quiet, "parse", *self.places])
        if isinstance(outcome.exception, KeyboardInterrupt):
            raise outcome.exception
        if not outcome.success:
            self.manifest = None
            return str(outcome.exception or "dbt could not parse the project")
        self.manifest, self.parsed_from = outcome.result, files
        tell({"kind": "ready", "nodes": in_lineage_order(self.manifest)})
        return None

    def invoke(self, request, watch):
        arguments = [*self.quiet, request["command"]]
        for flag in ("select", "exclude"):
            if request.get(flag):
                arguments += [f"--{flag}", *request[flag]]
        arguments += [*request.get("args", []), "--vars", json.dumps(request.get("vars") or {}), *self.places]
        # The profile reads it: whose the queries are. Not while parsing, or dbt would throw its cache away.
        if request.get("tag"):
            os.environ["LEDGERLINE_DBT_QUERY_TAG"] = request["tag"]
        try:
            return dbtRunner(manifest=self.manifest, callbacks=[watch]).invoke(arguments)
        finally:
            os.environ.pop("LEDGERLINE_DBT_QUERY_TAG", None)


def in_lineage_order(manifest):
    """Every model, snapshot and test, each after what it depends on; within one depth by name."""
    nodes = {id: node for id, node in manifest.nodes.items() if node.resource_type in ("model", "snapshot", "test")}
    depths = {}

    def depth(id):
        if id not in depths:
            depths[id] = 1 + max((depth(parent) for parent in nodes[id].depends_on.nodes if parent in nodes), default=-1)
        return depths[id]

    return [
        {
            "unique_id": id,
            "name": nodes[id].name,
            "kind": str(nodes[id].resource_type),
            "schema": nodes[id].schema,
            "tags": sorted(set(nodes[id].tags)),
            "depends_on": [parent for parent in nodes[id].depends_on.nodes if parent in nodes],
            "path": nodes[id].original_file_path,
        }
        for id in sorted(nodes, key=lambda id: (depth(id), nodes[id].name))
    ]


def announce(request_id):
    """A callback for dbt's events that tells when a node starts and ends."""

    def watch(event):
        if event.info.name == "NodeStart":
            about, result = event.data.node_info, None
        elif event.info.name == "NodeFinished":
            about, result = event.data.node_info, event.data.run_result
        else:
            return
        node = {"unique_id": about.unique_id, "name": about.node_name, "kind": about.resource_type, "status": "running"}
        if result is not None:
            rows = result.adapter_response.fields.get("rows_affected")
            node.update(
                status=result.status,
                seconds=result.execution_time,
                rows=int(rows.number_value) if rows is not None and about.resource_type != "test" else None,
                message=told(result.message),
                failures=result.num_failures if about.resource_type == "test" else None,
            )
        tell({"kind": "node", "id": request_id, "node": node})

    return watch


def told(message):
    """dbt's message where it says more than the status does."""
    return message if message and "rror" in message or message and message.startswith("Got ") else None


def summary(result):
    node = result.node
    rows = (result.adapter_response or {}).get("rows_affected")
    is_test = str(node.resource_type) == "test"
    found = {
        "unique_id": node.unique_id,
        "name": node.name,
        "kind": str(node.resource_type),
        "status": str(result.status),
        "seconds": result.execution_time,
        "rows": rows if not is_test and isinstance(rows, int) else None,
        "message": told(result.message),
        "failures": result.failures if is_test else None,
    }
    if found["status"] in ("fail", "warn", "error") and getattr(node, "compiled_path", None):
        found["compiled"] = os.path.abspath(node.compiled_path)
    if found["status"] in ("fail", "warn") and getattr(node, "compiled_code", None):
        found["failing"] = failing_rows(node)
    return found


def failing_rows(node):
    """The first rows that a test found. Read by its compiled SQL, so nothing is stored for it in the warehouse."""
    from dbt.adapters.factory import FACTORY

    try:
        adapter = next(iter(FACTORY.adapters.values()))
        with adapter.connection_named("failing rows"):
            _, table = adapter.execute(f"select * from (\n{node.compiled_code}\n) as failing limit {FAILING_ROWS_MAX}", fetch=True)
        return {"columns": list(table.column_names), "rows": [[cell(value) for value in row] for row in table.rows]}
    except Exception as error:  # The test's own verdict must arrive, with or without its rows.
        print(f"failing rows of {node.name} could not be read: {error}", file=sys.stderr, flush=True)
        return None


def cell(value):
    if value is None:
        return None
    if isinstance(value, decimal.Decimal):
        text = format(value, "f")
    elif isinstance(value, (datetime.date, datetime.datetime)):
        text = value.isoformat()
    else:
        text = str(value)
    return text if len(text) <= CELL_CHARS_MAX else text[: CELL_CHARS_MAX - 1] + "…"


def answer(project, request):
    broken = project.parse()
    if broken is not None:
        return {"ok": False, "nodes": [], "error": {"kind": "project", "message": broken}}
    outcome = project.invoke(request, announce(request["id"]))
    if isinstance(outcome.exception, KeyboardInterrupt):
        raise outcome.exception
    results = getattr(outcome.result, "results", None) or []
    error = None
    if outcome.exception is not None:
        away = isinstance(outcome.exception, (DbtDatabaseError, FailedToConnectError))
        error = {"kind": "warehouse" if away else "dbt", "message": str(outcome.exception)}
    return {"ok": bool(outcome.success), "nodes": [summary(it) for it in results], "error": error}


def spare_stack_walks():
    """dbt looks up who defines each of its behaviour flags by walking the whole stack, 21 times an invocation and only for a line of its
    log: half of what a warm invocation costs. Where a later dbt has no such function, nothing is lost."""
    flag = getattr(behavior_flags, "BehaviorFlagRendered", None)
    if hasattr(flag, "_default_source"):
        flag._default_source = staticmethod(lambda: "dbt")


def main():
    spare_stack_walks()
    project_dir, work_dir = sys.argv[1:3]
    requests = Requests()
    requests.start()
    project = Project(project_dir, work_dir)
    broken = project.parse()
    if broken is not None:
        print(broken, file=sys.stderr, flush=True)
    while True:
        request = requests.waiting.get()
        try:
            requests.begin(request)
            told_at_the_end = answer(project, request)
            requests.end()
        except KeyboardInterrupt:
            requests.end()
            told_at_the_end = {"ok": False, "nodes": [], "error": {"kind": "cancelled", "message": "cancelled"}}
        tell({"kind": "done", "id": request["id"], **told_at_the_end})


if __name__ == "__main__":
    from dbt.adapters.exceptions import FailedToConnectError
    from dbt.cli.main import dbtRunner
    from dbt_common import behavior_flags
    from dbt_common.exceptions import DbtDatabaseError

    main()
