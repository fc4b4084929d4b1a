"""What analytics must hold at a cut, from the bank's own transactions, the slow way; and how it is compared."""

import json
from collections import defaultdict

from bank import TABLES

KEYS = {"customers": "customer_id", "accounts": "account_id", "transactions": "transaction_id", "ledger_entries": "ledger_entry_id"}
COLUMNS = {
    "customers": "first_name last_name email phone date_of_birth address status created_at updated_at".split(),
    "accounts": ("account_number customer_id account_type status currency balance interest_rate opened_at closed_at created_at updated_at".split()),
    "transactions": ("account_id related_account_id txn_type direction amount balance_after status reference description created_at posted_at".split()),
    "ledger_entries": "transaction_id account_id entry_type amount created_at".split(),
}
DIMENSIONS = ("customers", "accounts")


class Truth:
    """The transactions up to a cut, replayed. `snapshot` is (lsn, micros, {table: {id: text}}) or None; `dead` are the lsns of changes
    that no warehouse takes."""

    def __init__(self, snapshot, transactions, dead=()):
        self.snapshot, self.replayed = snapshot, 0
        self.transactions = [it._replace(events=[event for event in it.events if event.lsn not in dead]) for it in transactions]
        self.facts = {table: {} for table in TABLES}  # id: [row, deleted at]
        self.versions = {table: defaultdict(list) for table in DIMENSIONS}  # id: [[row, from, to, deleted at]]
        self.clock, self.snapshot_seen = 0, False

    def leave_behind(self, table, key, row, micros):
        versions = self.versions[table][key]
        if versions and versions[-1][2] is None:
            versions[-1][2:] = [micros, micros if row is None else None]
        if row is not None:
            versions.append([row, micros, None, None])

    def advance(self, cut, snapshot_micros):
        """`snapshot_micros`: the moment the warehouse gave the snapshot, never later than it was taken."""
        if self.snapshot and not self.snapshot_seen and cut >= self.snapshot[0]:
            _, micros, tables = self.snapshot
            assert snapshot_micros is None or snapshot_micros <= micros
            self.snapshot_seen, self.clock = True, micros if snapshot_micros is None else snapshot_micros
            for table, rows in tables.items():
                for key, text in rows.items():
                    self.facts[table][key] = [json.loads(text), None]
                    if table in DIMENSIONS:
                        self.leave_behind(table, key, json.loads(text), self.clock)
        while self.replayed < len(self.transactions) and self.transactions[self.replayed].lsn <= cut:
            transaction = self.transactions[self.replayed]
            self.replayed += 1
            self.clock = max(self.clock + 1, transaction.micros // 1000 * 1000)
            last = {}
            for event in transaction.events:
                last[event.table, event.key] = event.after
                row = json.loads(event.after or event.before)
                self.facts[event.table][event.key] = [row, None if event.after else self.clock]
            for (table, key), after in last.items():
                if table in DIMENSIONS:
                    self.leave_behind(table, key, after and json.loads(after), self.clock)


def longest_prefix(cdc, landed, without=()):
    """The cut, counted anew from everything that has landed, dead or not, but for these lsns."""
    arrived = defaultdict(set)
    for lane, count in landed.items():
        if lane[0] != "boundaries":
            for fact in cdc.facts[lane][:count]:
                if fact and fact[1] not in without:
                    arrived[fact[0], lane[0]].add(fact[1:])
    best, ended = -1, defaultdict(int)  # The last END of each xid: xids come again.
    for fact in cdc.facts["boundaries", 0][: landed["boundaries", 0]]:
        if fact and fact[2] > best:
            _, xid, end, owed = fact
            if any(sum(ended[xid] < change[0] < end for change in arrived[xid, table]) < count for table, count in owed.items()):
                break
            best = ended[xid] = end
    return best


def as_on_the_wire(column):
    if column.endswith("_at"):
        return f'to_char({column}, \'YYYY-MM-DD"T"HH24:MI:SS.US"Z"\')'
    if column == "date_of_birth":
        return f"({column} - date '1970-01-01')"
    return f"{column}::text" if column in ("amount", "balance", "balance_after", "interest_rate") else column


def micros_of(column):
    return f"(extract(epoch from {column}) * 1000000)::bigint"


def differences(cursor, truth):
    """Where staging, analytics or the snapshots differ from the truth."""
    found = []

    def same(what, query, want):
        cursor.execute(query)
        got, want = sorted(cursor.fetchall(), key=repr), sorted(want, key=repr)
        if got != want:
            extra, missing = list(set(got) - set(want))[:2], list(set(want) - set(got))[:2]
            found.append(f"{what}: {len(got)} rows, want {len(want)}; too many: {extra}; missing: {missing}")

    for table, key in KEYS.items():
        columns = ", ".join(map(as_on_the_wire, COLUMNS[table]))
        reads = [(-truth.snapshot[0], truth.snapshot[0], id, "r") for id in truth.snapshot[2][table]] if truth.snapshot_seen else []
        changes = [(it.xid, event.lsn, event.key, event.op) for it in truth.transactions[: truth.replayed] for event in it.events if event.table == table]
        same(f"stg_bank__{table}", f"select tx_id, lsn, {key}, op from staging.stg_bank__{table}", reads + changes)
        if table not in DIMENSIONS:
            want = [(id, *(row[column] for column in COLUMNS[table]), deleted) for id, (row, deleted) in truth.facts[table].items()]
            same(f"fct_{table}", f"select {key}, {columns}, {micros_of('deleted_at')} from analytics.fct_{table}", want)
            continue
        want = [
            (id, *(row[column] for column in COLUMNS[table]), begin, end, deleted, end is None)
            for id, versions in truth.versions[table].items()
            for row, begin, end, deleted in versions
        ]
        times = ", ".join(map(micros_of, ("valid_from", "valid_to", "deleted_at")))
        same(f"dim_{table}", f"select {key}, {columns}, {times}, is_current from analytics.dim_{table}", want)
        current = [version[: len(COLUMNS[table]) + 1] for version in want if version[-1]]
        where = "dbt_valid_to is null and deleted_at is null"
        same(f"snap_{table}", f"select {key}, {columns} from snapshots.snap_{table} where {where}", current)
    return found
