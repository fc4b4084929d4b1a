"""A seeded bank that does all that ours does, and some things that ours never would but a warehouse must survive.

Transactions come from several sessions at once, so the order of xids, of changes and of commits all differ.
"""

import json
import random
from collections import namedtuple
from datetime import datetime, timedelta, timezone

TABLES = ("customers", "accounts", "transactions", "ledger_entries")

# lsn: the end of the commit record. micros: commit time since 1970.
Transaction = namedtuple("Transaction", "xid lsn micros events")
# before, after: the row as JSON text, or None. lsn: the change's own.
Event = namedtuple("Event", "table op key before after lsn")

BEGIN_OF_TIME = 1_790_000_000_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
FIRST_XID = 60_000
to_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def iso(micros):
    return (EPOCH + timedelta(microseconds=micros)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def money(cents):
    return f"{'-' if cents < 0 else ''}{abs(cents) // 100}.{abs(cents) % 100:02}"


class Bank:
    """`rows[table][id]` and `text[table][id]` (the same as JSON) are the state after the last planned transaction."""

    def __init__(self, seed, odd=True, wrap_xids_after=0):
        self.random = random.Random(seed)
        self.odd, self.wrap_xids_after = odd, wrap_xids_after
        self.rows = {table: {} for table in TABLES}
        self.text = {table: {} for table in TABLES}
        self.cents, self.last_id = {}, dict.fromkeys(TABLES, 0)
        self.entries_of, self.drafts, self.posted, self.open = {}, [], [], []
        self.lsn, self.xid, self.clock = 500_000_000, FIRST_XID, BEGIN_OF_TIME

    # One planned transaction is a list of (table, op, key, before, after) and the set of rows it locks.

    def begin(self):
        self.events, self.locked = [], set()

    def put(self, table, row):
        key, before = row["id"], self.text[table].get(row["id"])
        after = to_json(row)
        self.events.append((table, "u" if before else "c", key, before, after))
        self.rows[table][key], self.text[table][key] = row, after
        self.locked.add((table, key))

    def drop(self, table, key):
        self.events.append((table, "d", key, self.text[table].pop(key), None))
        del self.rows[table][key]
        self.locked.add((table, key))

    def new_id(self, table):
        self.last_id[table] += 1
        return self.last_id[table]

    # What happens at a bank.

    def customer(self):
        key, now = self.new_id("customers"), iso(self.clock)
        self.put(
            "customers",
            {
                "id": key,
                "first_name": self.random.choice(("Ada", "Grace", "Zoë", "O'Neil", "Ты")),
                "last_name": f"L{key}",
                "email": f"c{key}@example.com",
                "phone": None if key % 7 == 0 else f"+49{key:09}",
                "date_of_birth": self.random.randint(-9000, 13000),
                "address": f'{key} "Main" \\ Street\nFlat {key % 9}',
                "status": "ACTIVE",
                "created_at": now,
                "updated_at": now,
            },
        )
        return key

    def account(self, customer):
        key, now = self.new_id("accounts"), iso(self.clock)
        self.put(
            "accounts",
            {
                "id": key,
                "account_number": f"DE{key:010}",
                "customer_id": customer,
                "account_type": self.random.choice(("SAVINGS", "CHECKING", "CREDIT", "LOAN")),
                "status": "ACTIVE",
                "currency": "EUR",
                "balance": "0.00",
                "interest_rate": "1.2500",
                "opened_at": now,
                "closed_at": None,
                "created_at": now,
                "updated_at": now,
            },
        )
        self.locked.add(("customers", customer))
        self.cents[key] = 0
        self.open.append(key)

    def move(self, *moves):
        for account, cents in sorted((account, cents) for account, cents in moves if account):
            self.cents[account] += cents
            row = self.rows["accounts"][account]
            self.put("accounts", {**row, "balance": money(self.cents[account]), "updated_at": iso(self.clock)})

    def covered(self, *moves):
        return all(self.cents[account] + cents >= 0 for account, cents in moves if account)

    def book(self, transaction, debit, credit, cents):
        entries = []
        for entry_type, account in (("DEBIT", debit), ("CREDIT", credit)):
            key = self.new_id("ledger_entries")
            row = {"id": key, "transaction_id": transaction, "account_id": account, "entry_type": entry_type}
            self.put("ledger_entries", {**row, "amount": money(cents), "created_at": iso(self.clock)})
            entries.append(key)
        self.entries_of[transaction] = (entries, debit, credit, cents)

    def transaction(self, txn_type, account, other, cents, status):
        key, now = self.new_id("transactions"), iso(self.clock)
        self.put(
            "transactions",
            {
                "id": key,
                "account_id": account,
                "related_account_id": other,
                "txn_type": txn_type,
                "direction": "CREDIT" if txn_type == "DEPOSIT" else "DEBIT",
                "amount": money(cents),
                "balance_after": money(self.cents[account]),
                "status": status,
                "reference": f"R{key}",
                "description": None,
                "created_at": now,
                "posted_at": now if status == "COMPLETED" else None,
            },
        )
        self.locked.add(("accounts", account))
        return key

    def pay(self, account=None):
        account = account or self.busy_account()
        txn_type = self.random.choice(("DEPOSIT", "DEPOSIT", "WITHDRAWAL", "TRANSFER"))
        cents, other = self.random.randint(1, 500_00), None
        if txn_type != "DEPOSIT" and self.cents[account] < cents:
            txn_type = "DEPOSIT"
        if txn_type == "TRANSFER":
            other = self.busy_account()
            if other == account:
                txn_type, other = "DEPOSIT", None
        transaction = self.transaction(txn_type, account, other, cents, "COMPLETED")
        debit, credit = (account, None) if txn_type == "DEPOSIT" else (other, account)
        self.book(transaction, debit, credit, cents)
        self.move((debit, cents), (credit, -cents))
        self.posted.append(transaction)

    def busy_account(self):
        """The older an account, the busier."""
        return self.open[int(len(self.open) * self.random.random() ** 2)]

    def plan(self):
        """One business event, planned: its changes, and the rows it locks."""
        self.begin()
        self.clock += int(self.random.expovariate(1 / 20_000))
        chance = self.random.random()
        if len(self.open) < 5 or chance < 0.02:
            self.account(self.customer())
        elif chance < 0.03:
            self.customer()
        elif chance < 0.04:
            self.account(self.some_customer())
        elif chance < 0.06:
            row = self.rows["customers"][self.some_customer()]
            status = self.random.choice(("ACTIVE", "INACTIVE", "SUSPENDED"))
            self.put("customers", {**row, "address": f"moved {self.clock}", "status": status, "updated_at": iso(self.clock)})
        elif chance < 0.08 and self.odd:
            self.delete_what_was_never_used()
        elif chance < 0.12 and self.odd:
            self.random.choice(self.ODDITIES)(self)
        else:
            self.pay()
        if not self.events:
            self.pay()
        return self.events, self.locked

    def some_customer(self):
        if len(self.rows["customers"]) < 5000:
            return self.random.choice(list(self.rows["customers"]))
        return self.rows["accounts"][self.busy_account()]["customer_id"]

    def delete_what_was_never_used(self):
        owners = {account["customer_id"] for account in self.rows["accounts"].values()}
        for customer in self.rows["customers"]:
            if customer not in owners:
                return self.drop("customers", customer)
        used = {row[side] for row in self.rows["transactions"].values() for side in ("account_id", "related_account_id")}
        for account in self.open[-20:]:
            if account not in used:
                self.open.remove(account)
                self.locked.add(("customers", self.rows["accounts"][account]["customer_id"]))
                return self.drop("accounts", account)

    # What a warehouse must survive.

    def draft(self):
        """A transaction without entries; it is finished, fails or is thrown away later."""
        self.drafts.append(self.transaction("DEPOSIT", self.busy_account(), None, self.random.randint(1, 9999), "PENDING"))

    def end_draft(self):
        if not self.drafts:
            return
        row = self.rows["transactions"][self.drafts.pop(self.random.randrange(len(self.drafts)))]
        fate, cents, account = self.random.choice(("COMPLETED", "FAILED", None)), int(row["amount"].replace(".", "")), row["account_id"]
        if fate is None:
            self.drop("transactions", row["id"])
        else:
            self.put("transactions", {**row, "status": fate, "posted_at": iso(self.clock)})
        if fate == "COMPLETED":
            self.book(row["id"], account, None, cents)
            self.move((account, cents))
        self.locked.add(("accounts", account))

    def recent(self):
        """A posted transaction with its entries, rather a young one."""
        if self.posted:
            transaction = self.posted[-1 - int(len(self.posted) * self.random.random() ** 3)]
            if transaction in self.entries_of and transaction in self.rows["transactions"]:
                return transaction
        return None

    def correct_amount(self):
        transaction, new = self.recent(), self.random.randint(1, 500_00)
        if transaction is None:
            return
        entries, debit, credit, cents = self.entries_of[transaction]
        if self.covered((debit, new - cents), (credit, cents - new)):
            for entry in entries:
                self.put("ledger_entries", {**self.rows["ledger_entries"][entry], "amount": money(new)})
            self.put("transactions", {**self.rows["transactions"][transaction], "amount": money(new)})
            self.move((debit, new - cents), (credit, cents - new))
            self.entries_of[transaction] = (entries, debit, credit, new)

    def throw_away(self):
        transaction = self.recent()
        if transaction is None:
            return
        entries, debit, credit, cents = self.entries_of[transaction]
        if self.covered((debit, -cents), (credit, cents)):
            del self.entries_of[transaction]
            self.posted.remove(transaction)
            for entry in entries:
                self.drop("ledger_entries", entry)
            self.drop("transactions", transaction)
            self.move((debit, -cents), (credit, cents))

    def rebook(self):
        """An entry on the wrong account moves to another."""
        transaction, new = self.recent(), self.busy_account()
        if transaction is None:
            return
        entries, debit, credit, cents = self.entries_of[transaction]
        if debit and new not in (debit, credit) and self.covered((debit, -cents)):
            self.put("ledger_entries", {**self.rows["ledger_entries"][entries[0]], "account_id": new})
            self.move((debit, -cents), (new, cents))
            self.entries_of[transaction] = (entries, new, credit, cents)

    def born_and_dead(self):
        """Within one transaction, with a payment beside it."""
        self.drop("customers", self.customer())
        self.pay()

    def several_changes_of_one_row(self):
        account = self.busy_account()
        for _ in range(3):
            self.pay(account)

    def close_or_touch(self):
        """An account closes; or an update changes nothing at all."""
        row = self.rows["accounts"][self.busy_account()]
        if row["status"] == "ACTIVE" and self.cents[row["id"]] == 0:
            row = {**row, "status": "CLOSED", "closed_at": iso(self.clock), "updated_at": iso(self.clock)}
        self.put("accounts", dict(row))

    ODDITIES = (draft, end_draft, correct_amount, throw_away, rebook, born_and_dead, several_changes_of_one_row, close_or_touch)

    def big(self, payments):
        """One transaction of four rows a payment, or more."""
        self.begin()
        for _ in range(payments):
            self.pay(self.open[self.random.randrange(min(len(self.open), 400))])
        return self.events, self.locked

    # How it commits.

    def commits(self, plans, width=6):
        """Transactions that lock nothing in common run at once."""
        group, locked = [], set()
        for events, locks in plans:
            if group and (len(group) >= width or locked & locks):
                yield from self.interleave(group)
                group, locked = [], set()
            group.append(events)
            locked |= locks
        if group:
            yield from self.interleave(group)

    def interleave(self, group):
        """Changes, commits and xids of a group in any order."""
        xids = list(range(self.xid, self.xid + len(group)))
        self.xid += len(group) + self.random.randint(0, 2)
        if self.wrap_xids_after and self.xid > FIRST_XID + self.wrap_xids_after:
            self.xid = FIRST_XID
        self.random.shuffle(xids)
        done = [[] for _ in group]
        running = list(range(len(group)))
        while running:
            place = self.random.choice(running)
            if len(done[place]) == len(group[place]):
                running.remove(place)
                self.lsn += self.random.randint(40, 200)
                shift = self.random.choice((0, 0, -3000, 2500, self.random.randint(-9000, 9000)))
                yield Transaction(xids[place], self.lsn, self.clock + shift, done[place])
            else:
                self.lsn += self.random.randint(60, 300)
                done[place].append(Event(*group[place][len(done[place])], self.lsn))
