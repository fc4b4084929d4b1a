"""How a bank's commits reach `raw`: as Debezium's envelopes, in lanes that land each at its own pace.

Cdc      sends each commit (BEGIN, rows in the order of lsn, END); dies at times, and sends again from an earlier commit on.
Landing  is the lake and the loader: a prefix of every lane lies in raw.*, END long before its rows, or long after. What is dead
         lies in raw._rejected instead.
"""

import io
import random

from bank import FIRST_XID, TABLES, to_json


class Cdc:
    """`lanes[(table, partition)]` are message values (text; None is a tombstone). `facts` says of each what a checker needs:
    (xid, lsn, key, op), ("END", xid, lsn, owed) or None. `moments` counts messages over all lanes."""

    def __init__(self, seed, partitions=3):
        self.random, self.partitions = random.Random(seed * 7 + 1), partitions
        self.lanes = {(table, partition): [] for table in TABLES for partition in range(partitions)} | {("boundaries", 0): []}
        self.facts = {lane: [] for lane in self.lanes}
        self.moments = {lane: [] for lane in self.lanes}
        self.previous_end, self.said = None, 0
        # Changes that no warehouse takes, each time they are sent: {lsn: whether they still say whose they are}.
        self.dead = {}

    def say(self, lane, value, fact):
        self.said += 1
        self.lanes[lane].append(value)
        self.moments[lane].append(self.said)
        self.facts[lane].append(fact)

    def source(self, table, xid, lsn, micros, snapshot="null"):
        sequence = f"[{'null' if self.previous_end is None else to_json(str(self.previous_end))},{to_json(str(lsn))}]"
        return (
            f'{{"version":"ours","connector":"postgresql","name":"bank","ts_ms":{micros // 1000},"snapshot":{snapshot},"db":"bank",'
            f'"sequence":{to_json(sequence)},"ts_us":{micros},"ts_ns":{micros}000,"schema":"public","table":"{table}",'
            f'"txId":{xid},"lsn":{lsn},"xmin":null,"origin":null,"origin_lsn":null}}'
        )

    def now(self, micros):
        now = micros + self.random.randint(5_000, 90_000)
        return f'"ts_ms":{now // 1000},"ts_us":{now},"ts_ns":{now}{self.random.randint(0, 999):03}'

    def read(self, rows, lsn, micros, share=1.0):
        """One attempt at the initial snapshot; with a share below 1 it dies on the way."""
        flat = [(table, key, text) for table in TABLES for key, text in rows[table].items()]
        for table, key, text in flat[: int(len(flat) * share)]:
            source = self.source(table, FIRST_XID - 1, lsn, micros, '"true"')
            value = f'{{"before":null,"after":{text},"source":{source},"transaction":null,"op":"r",{self.now(micros)}}}'
            self.say((table, key % self.partitions), value, (-lsn, lsn, key, "r"))

    def send(self, transaction, rows=None):
        """One commit; with `rows` given it dies after so many of them."""
        xid, end, micros, events = transaction
        status = '{{"status":"{}","id":"{}:{}","event_count":{},"data_collections":{},"ts_ms":{}}}'
        self.say(("boundaries", 0), status.format("BEGIN", xid, events[0].lsn, "null", "null", micros // 1000), None)
        owed = {}
        for order, event in enumerate(events[:rows], 1):
            owed[event.table] = owed.get(event.table, 0) + 1
            lane = (event.table, event.key % self.partitions)
            value = (
                f'{{"before":{event.before or "null"},"after":{event.after or "null"},'
                f'"source":{self.source(event.table, xid, event.lsn, micros)},'
                f'"transaction":{{"id":"{xid}:{event.lsn}","total_order":{order},"data_collection_order":{owed[event.table]}}},'
                f'"op":"{event.op}",{self.now(micros)}}}'
            )
            self.say(lane, value, (xid, event.lsn, event.key, event.op))
            if event.op == "d":
                self.say(lane, None, None)
        if rows is not None:
            return
        counts = list(owed.items()) + ([("other_table", 3)] if xid % 50 == 0 else [])  # A table that is not ours to follow.
        self.random.shuffle(counts)
        total = sum(count for _, count in counts) + xid % 2  # Logical messages count here, and nowhere else.
        collections = ",".join(f'{{"data_collection":"public.{table}","event_count":{count}}}' for table, count in counts)
        self.say(("boundaries", 0), status.format("END", xid, end, total, f"[{collections}]", micros // 1000), ("END", xid, end, owed))
        self.previous_end = end

    def stream(self, transactions, restarts=0.0, back=30):
        place = 0
        while place < len(transactions):
            if restarts and self.random.random() < restarts:
                events = transactions[place].events
                if self.random.random() < 0.5 and len(events) > 1:
                    self.send(transactions[place], self.random.randint(1, len(events) - 1))
                self.previous_end = None
                place = max(0, place - self.random.randint(0, back))
            self.send(transactions[place])
            place += 1


def copy_text(value):
    return "\\N" if value is None else value.replace("\\", "\\\\")


class Landing:
    SCHEMA = (
        """
        drop schema if exists raw, staging, analytics, snapshots cascade;
        create schema raw;
        create table raw._loads (
            topic text, partition integer, first_offset bigint, last_offset bigint, object text, rows bigint,
            loaded_at timestamptz default now(), primary key (topic, partition, last_offset)
        );
        create table raw._snapshot_ends (topic text, partition integer, end_offset bigint, lsn bigint);
        create table raw._rejected (topic text, partition integer, "offset" bigint, reason text, tx_id bigint, lsn bigint, op text, key text);
        """
    ) + "".join(
        f"""
        create table raw.{table} (
            v jsonb, _topic text not null, _partition integer not null, _offset bigint not null, _object text,
            _loaded_at timestamptz default now(), primary key (_partition, _offset)
        );
        """
        for table in (*TABLES, "boundaries")
    )

    def __init__(self, connection, cdc):
        self.connection, self.cdc, self.landed = connection, cdc, dict.fromkeys(cdc.lanes, 0)
        connection.cursor().execute(self.SCHEMA)
        connection.commit()

    def land(self, lane, count):
        """The next records of a lane, and the row of `_loads` that covers them."""
        table, partition = lane
        first = self.landed[lane]
        end = min(first + count, len(self.cdc.lanes[lane]))
        if first == end:
            return
        cursor = self.connection.cursor()
        topic = "bank.transaction" if table == "boundaries" else f"bank.public.{table}"
        path = f"raw/{table}/p={partition}/{first:020}-{end - 1:020}.parquet"
        dead = [(offset, fact) for offset, fact in enumerate(self.cdc.facts[lane][first:end], first) if fact and fact[1] in self.cdc.dead]
        for offset, (xid, lsn, key, op) in dead:
            known = (xid, lsn, op, key) if self.cdc.dead[lsn] else (None,) * 4
            insert = "insert into raw._rejected (topic, partition, \"offset\", reason, tx_id, lsn, op, key) values (%s, %s, %s, 'dead', %s, %s, %s, %s)"
            cursor.execute(insert, (topic, partition, offset, *known))
        dead = dict(dead)
        values = enumerate(self.cdc.lanes[lane][first:end], first)
        lines = "".join(f"{copy_text(value)}\t{topic}\t{partition}\t{offset}\t{path}\n" for offset, value in values if offset not in dead)
        cursor.copy_expert(f"copy raw.{table} (v, _topic, _partition, _offset, _object) from stdin", io.StringIO(lines))
        cursor.execute(
            "insert into raw._loads (topic, partition, first_offset, last_offset, object, rows) values (%s, %s, %s, %s, %s, %s)",
            (topic, partition, first, end - 1, path, end - first),
        )
        self.connection.commit()
        self.landed[lane] = end

    def land_all(self):
        for lane in self.cdc.lanes:
            self.land(lane, 1 << 60)

    def tell_snapshot_ends(self, ends, lsn):
        rows = [(f"bank.public.{table}", partition, end, lsn) for (table, partition), end in ends.items()]
        self.connection.cursor().executemany("insert into raw._snapshot_ends values (%s, %s, %s, %s)", rows)
        self.connection.commit()

    def forget(self):
        """Keeps memory flat in timings: what has landed is dropped, offsets go on."""
        for lane, values in self.cdc.lanes.items():
            values[: self.landed[lane]] = [None] * self.landed[lane]
