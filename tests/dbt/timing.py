"""What a run of the five tasks costs, warm: on so many transactions of history, with 2,000 new ones, and with nothing new.

Seconds on the clock, and processor seconds of the worker and of the server (where it runs on this machine), which a busy machine
does not stretch.

python timing.py --database postgres://…/an_empty_database --work-dir DIR [--sizes 10000,100000] [--rounds 5]
"""

import argparse
import os
import statistics
import time

import psycopg2
from bank import Bank
from cdc import Cdc, Landing
from project import Dbt

NEW_TRANSACTIONS = 2_000


class Nothing(list):
    """Facts and moments are for a checker."""

    def append(self, _):
        pass


def fill(bank, cdc, landing, transactions):
    while transactions > 0:
        for transaction in bank.commits(bank.plan() for _ in range(min(10_000, transactions))):
            cdc.send(transaction)
        landing.land_all()
        landing.forget()
        transactions -= 10_000


def stat(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as text:
        return text.read().rpartition(")")[2].split()


def processor_seconds(pid, with_dead_children=False):
    fields = stat(pid)
    return sum(map(int, fields[11 : 15 if with_dead_children else 13])) / os.sysconf("SC_CLK_TCK")


def server_seconds(connection):
    """Of all processes of the server; 0 where it is not on this machine."""
    try:
        server = stat(connection.info.backend_pid)[1]
        seconds = processor_seconds(server, with_dead_children=True)
    except FileNotFoundError:
        return 0.0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if stat(pid)[1] == server:
                seconds += processor_seconds(pid)
        except FileNotFoundError:
            pass  # It ended while we looked; the server has its seconds now.
    return seconds


def measure(label, dbt, connection, rounds, before):
    totals, cpu, server, tasks, nodes = [], [], [], [], {}
    for _ in range(rounds):
        before()
        began, server_began = processor_seconds(dbt.worker.pid), server_seconds(connection)
        wrong, seconds, ran = dbt.run_tasks()
        assert not wrong, wrong
        cpu.append(processor_seconds(dbt.worker.pid) - began)
        server.append(server_seconds(connection) - server_began)
        totals.append(sum(seconds.values()))
        tasks.append(seconds)
        for node in ran:
            nodes.setdefault(node["name"], []).append(node["seconds"])
    middle = {task: statistics.median(it[task] for it in tasks) for task in tasks[0]}
    slowest = sorted(((statistics.median(it), name) for name, it in nodes.items()), reverse=True)[:5]
    print(
        f"{label}: {statistics.median(totals):.2f} s (best {min(totals):.2f}); processor time: worker {statistics.median(cpu):.2f},"
        f" server {statistics.median(server):.2f} (best {min(server):.2f})"
    )
    print("    " + ", ".join(f"{task} {seconds:.2f}" for task, seconds in middle.items()))
    print("    slowest nodes: " + ", ".join(f"{name} {1000 * seconds:.0f} ms" for seconds, name in slowest), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", required=True)
    parser.add_argument("--work-dir", required=True)
    parser.add_argument("--sizes", default="10000,100000")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.makedirs(options.work_dir, exist_ok=True)
    began = time.monotonic()
    dbt = Dbt(options.database, options.work_dir, {"snapshot": "never"})
    for size in map(int, options.sizes.split(",")):
        connection = psycopg2.connect(options.database)
        bank, cdc = Bank(42, odd=False), Cdc(42)
        for record in (cdc.facts, cdc.moments):
            record.update((lane, Nothing()) for lane in record)
        landing = Landing(connection, cdc)
        if began:
            _, seconds, _ = dbt("run", ["arrivals"])
            print(f"start, parse and a first model: {time.monotonic() - began:.1f} s (of which the model {seconds:.1f})")
            began = None
        fill(bank, cdc, landing, size)
        wrong, seconds, _ = dbt.run_tasks()
        assert not wrong, wrong
        print(f"{size} transactions, first run: {sum(seconds.values()):.1f} s")
        connection.autocommit = True
        connection.cursor().execute("vacuum analyze")
        connection.autocommit = False
        measure(f"{size} transactions, {NEW_TRANSACTIONS} new", dbt, connection, options.rounds, lambda: fill(bank, cdc, landing, NEW_TRANSACTIONS))
        measure(f"{size} transactions, nothing new", dbt, connection, options.rounds, lambda: None)
        connection.close()
    dbt.close()


if __name__ == "__main__":
    main()
