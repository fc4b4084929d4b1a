"""A simulated bank against the dbt project: at every landing state dbt is green, and analytics is the bank as it was at the cut.

    python landing_states.py --database postgres://…/an_empty_database --work-dir DIR [--seeds 1,2,3,4] [--states 110] [--transactions 1800]

A state: every lane has landed some way, some stand still, the order among them is anyone's. After each, perhaps a run that dies on the
way, then the five tasks; then staging, facts, dimensions and snapshots are compared with the truth at the cut, and the cut with the
longest prefix of whole transactions, counted anew. At the end everything has landed, and a full audit reads all of history once more.

The seed decides what kind of bank it is: without an initial snapshot (every third), with an attempt at one that died (even seeds), an
empty one (5, 11, …), with xids that wrap round (odd seeds), with a loader that goes on while dbt runs (every fourth), with changes
that cannot be taken (3, 7, …).
"""

import argparse
import os
import random
import sys
import threading
import time
from bisect import bisect_right

import psycopg2
from bank import Bank
from cdc import Cdc, Landing
from project import Dbt
from truth import Truth, differences, longest_prefix

# Runs that got no further: models ahead of the others, which still owe their windows.
TORN_RUNS = (
    ["arrivals"],
    ["arrivals", "commits"],
    ["arrivals", "commits", "cut", "stg_bank__accounts"],
    ["tag:staging"],
    ["dim_accounts", "fct_transactions"],
    ["arrivals", "commits", "cut", "stg_bank__ledger_entries", "tag:analytics"],
)


class Case:
    """One seed's bank, and how far it has landed."""

    def __init__(self, seed, options, dbt):
        self.seed, self.options, self.dbt, self.random = seed, options, dbt, random.Random(seed * 31)
        self.bank, self.cdc = Bank(seed, wrap_xids_after=1500 if seed % 2 else 0), Cdc(seed)
        self.snapshot = self.snapshot_ends = self.snapshot_lsn = None
        if seed % 3:
            self.take_snapshot(0 if seed % 6 == 5 else 300)
        self.transactions = list(self.bank.commits(self.plans()))
        self.cdc.stream(self.transactions, restarts=0.01)
        if self.seed % 4 == 3:
            self.cdc.dead = self.dead_letters()
        self.truth = Truth(self.snapshot, self.transactions, self.cdc.dead)
        self.connection = psycopg2.connect(options.database)
        self.landing = Landing(self.connection, self.cdc)
        self.ends_told, self.stands_still = self.snapshot_ends is None, {}
        self.dbt.variables = {"snapshot": "initial" if self.snapshot else "never"}

    def dead_letters(self):
        """Every third update of a customer: nothing else hangs on it. Of those that every lane comes to pass, every other says nothing
        about itself; the last ones must, for nothing comes behind them."""
        updates = [(event.lsn, it.lsn) for it in self.transactions for event in it.events if (event.table, event.op) == ("customers", "u")]
        dead = dict(updates[::3])
        lanes = [facts for (table, _), facts in self.cdc.facts.items() if table == "customers"]
        passed = min(max((fact[1] for fact in facts if fact and fact[1] not in dead), default=-1) for facts in lanes)
        return {lsn: place % 2 == 0 or end >= passed for place, (lsn, end) in enumerate(dead.items())}

    def take_snapshot(self, transactions):
        list(self.bank.commits(self.bank.plan() for _ in range(transactions)))
        if self.seed % 2 == 0:
            self.cdc.read(self.bank.text, self.bank.lsn, self.bank.clock, share=0.6)
            list(self.bank.commits(self.bank.plan() for _ in range(transactions // 3)))
        self.bank.lsn += 100
        # An empty bank has nothing to read: its snapshot is a unit without rows, and without a moment of its own.
        self.snapshot = (self.bank.lsn if transactions else 0, self.bank.clock, {table: dict(rows) for table, rows in self.bank.text.items()})
        self.cdc.read(self.bank.text, self.bank.lsn, self.bank.clock)
        # Not every capture says where it read.
        self.snapshot_lsn = None if self.seed % 4 == 2 else self.bank.lsn
        self.snapshot_ends = {lane: len(values) for lane, values in self.cdc.lanes.items() if lane[0] != "boundaries"}

    def plans(self):
        for place in range(self.options.transactions):
            if place == self.options.transactions // 2:
                yield self.bank.big(self.options.big)
            else:
                yield self.bank.plan()

    def land_some(self, state):
        """Each lane is some way behind the moment, or stands still for a while."""
        moment = self.cdc.said * state / self.options.states
        for lane in self.cdc.lanes:
            if self.random.random() < 0.015:
                self.stands_still[lane] = state + self.random.choice((1, 2, 4, 9))
            behind = self.random.choice((0, 0, 0, 1, 3, 30, 300)) * self.random.random()
            if self.stands_still.get(lane, 0) < state:
                self.landing.land(lane, max(0, bisect_right(self.cdc.moments[lane], moment - behind) - self.landing.landed[lane]))

    def expected_cut(self, without=()):
        if self.snapshot:
            if not self.ends_told or any(self.landing.landed[lane] < end for lane, end in self.snapshot_ends.items()):
                return -1
        best = longest_prefix(self.cdc, self.landing.landed, without)
        return max(best, self.snapshot[0] or -1) if self.snapshot else best

    def cut(self):
        cursor = self.connection.cursor()
        cursor.execute("select coalesce(max(lsn), -1) from staging.cut")
        cut = cursor.fetchone()[0]
        cursor.execute("select max(committed_micros) from staging.commits where xid <= 0 and lsn is not null")
        snapshot_micros = cursor.fetchone()[0]
        self.connection.commit()
        return cut, snapshot_micros

    def loader_goes_on(self):
        chance = random.Random(self.seed)
        lanes = list(self.cdc.lanes)

        def land():
            for _ in range(3):
                for lane in chance.sample(lanes, len(lanes)):
                    self.landing.land(lane, chance.randint(1, 25))

        thread = threading.Thread(target=land)
        thread.start()
        return thread

    def state(self, state, last):
        if last:
            self.landing.land_all()
        else:
            self.land_some(state)
        if not self.ends_told and (last or state >= 2 and self.random.random() < 0.5):
            self.landing.tell_snapshot_ends(self.snapshot_ends, self.snapshot_lsn)
            self.ends_told = True
        nameless = {lsn for lsn, known in self.cdc.dead.items() if not known}
        at_least = self.expected_cut(without=nameless)
        if self.random.random() < 0.12:
            self.dbt("run", self.random.choice(TORN_RUNS))
        loader = self.loader_goes_on() if self.seed % 4 == 0 and not last else None
        wrong, _, _ = self.dbt.run_tasks()
        if loader:
            loader.join()
        cut, snapshot_micros = self.cut()
        self.truth.advance(cut, snapshot_micros)
        wrong = [str(it) for it in wrong] + differences(self.connection.cursor(), self.truth)
        self.connection.commit()
        at_most = self.expected_cut()
        # A letter without a name is believed once its lanes have passed it; that may be later.
        if not at_least <= cut <= at_most or (loader is None and not nameless and cut != at_most):
            wrong.append(f"the cut is {cut}, expected {at_least}..{at_most}")
        if wrong:
            raise SystemExit("\n  ".join([f"seed {self.seed}, state {state} of {self.options.states}:", *wrong[:12]]))
        return cut

    def run(self):
        began = time.monotonic()
        cuts = [self.state(state, last=state == self.options.states) for state in range(1, self.options.states + 1)]
        assert cuts[-1] == self.transactions[-1].lsn and self.truth.replayed == len(self.transactions), "not everything was cut at the end"
        wrong, _, _ = self.dbt("test", full_audit=True)
        if wrong:
            raise SystemExit(f"seed {self.seed}, full audit:\n  {wrong[:5]}")
        self.connection.close()
        kind = "no snapshot" if not self.snapshot else "snapshot" if self.snapshot[0] else "empty bank"
        print(
            f"seed {self.seed} ({kind}): {len(cuts)} states green and equal to the truth, {len(set(cuts))} different cuts,"
            f" {len(self.transactions)} transactions, {self.cdc.said} messages, {time.monotonic() - began:.0f} s",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", required=True)
    parser.add_argument("--work-dir", required=True)
    parser.add_argument("--seeds", default="1,2,3,4")
    parser.add_argument("--states", type=int, default=110)
    parser.add_argument("--transactions", type=int, default=1800)
    parser.add_argument("--big", type=int, default=800, help="payments in the one big transaction in the middle")
    options = parser.parse_args()
    os.makedirs(options.work_dir, exist_ok=True)
    dbt = Dbt(options.database, options.work_dir)
    for seed in map(int, options.seeds.split(",")):
        Case(seed, options, dbt).run()
    dbt.close()


if __name__ == "__main__":
    sys.exit(main())
