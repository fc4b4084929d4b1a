//! One row change → key and value as Debezium's JSON converter writes them, into reused buffers. Pure.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{
    error::Poison,
    json,
    pgoutput::{Malformed, Old, Tuple, Value},
    values::Kind,
};
use crate::change::TableId;

/// A captured table, ready to be written: names are already JSON.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Table {
    pub(super) id: TableId,
    pub(super) topic: String,
    columns: Vec<Column>,
    /// Indexes of the primary key's columns, in the key's order. Empty: messages have no key.
    key: Vec<usize>,
    /// `,"schema":"public","table":"accounts","txId":`
    source_names: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq)]
struct Column {
    name: String,
    /// `"balance":`
    head: Vec<u8>,
    kind: Kind,
    /// What stands for a value that the stream does not tell.
    absent: Vec<u8>,
}

/// What the catalog tells of a column.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ColumnSpec {
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) not_null: bool,
    /// What its default makes of a value that is not told.
    pub(super) default: Option<Vec<u8>>,
    /// Place in the primary key, from 1.
    pub(super) key_place: Option<i16>,
}

impl Table {
    pub(super) fn new(id: TableId, topic: String, specs: Vec<ColumnSpec>) -> Self {
        let written = specs.iter().enumerate().filter(|(_, spec)| spec.kind != Kind::Omitted);
        let mut key: Vec<(i16, usize)> = written.filter_map(|(at, spec)| Some((spec.key_place?, at))).collect();
        key.sort_unstable();
        let mut source_names = b",\"schema\":".to_vec();
        json::string(&mut source_names, &id.schema);
        source_names.extend_from_slice(b",\"table\":");
        json::string(&mut source_names, &id.table);
        source_names.extend_from_slice(b",\"txId\":");
        let columns = specs.into_iter().map(Column::new).collect();
        Self { id, topic, columns, key: key.into_iter().map(|(_, at)| at).collect(), source_names }
    }

    pub(super) fn has_key(&self) -> bool {
        !self.key.is_empty()
    }

    pub(super) fn column_names(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(|column| column.name.as_str())
    }

    pub(super) fn n_columns(&self) -> usize {
        self.columns.len()
    }
}

impl Column {
    fn new(spec: ColumnSpec) -> Self {
        let mut head = Vec::new();
        json::string(&mut head, &spec.name);
        head.push(b':');
        let mut absent = Vec::new();
        match spec.default.filter(|_| spec.not_null) {
            Some(default) => absent = default,
            None if spec.not_null => spec.kind.write_absent(&mut absent),
            None => absent.extend_from_slice(b"null"),
        }
        Self { name: spec.name, head, kind: spec.kind, absent }
    }
}

/// Where and when an event happened: its `source` and `transaction` blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) lsn: u64,
    /// Microseconds since 1970: of the commit, or of the snapshot.
    pub(super) at_us: i64,
    pub(super) xid: Option<u32>,
    /// The end of the commit before this transaction's.
    pub(super) previous_commit: Option<u64>,
    /// `first`, `true`, `last` and so on for reads; None for changes. [`INCREMENTAL`] reads tell neither LSN nor transaction.
    pub(super) snapshot: Option<&'static str>,
    /// Its place in the transaction, and among its table's events there. None leaves the block null.
    pub(super) order: Option<(u64, u64)>,
}

/// The marker of a row that is read again while the stream goes on.
pub(super) const INCREMENTAL: &str = "incremental";

/// What an update turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Update {
    /// The event is written.
    Same,
    /// The primary key changed: Debezium tells it as a delete and a create.
    Moved,
}

/// The writer. After a call its `key` and `value` are the message.
#[derive(Debug)]
pub(super) struct Envelope {
    pub(super) key: Vec<u8>,
    pub(super) value: Vec<u8>,
    /// The key before an update.
    pub(super) old_key: Vec<u8>,
    /// Where in `value` each column of the row written last begins and ends.
    spans: Vec<(usize, usize)>,
    /// `,"source":{"version":…,"name":"bank","ts_ms":`
    source_head: Vec<u8>,
    /// `,"db":"bank","sequence":"[`
    database: Vec<u8>,
    /// What the events of a transaction have in common, and those of a moment.
    shared: Shared,
    times: Times,
    tail: Tail,
}

/// All that follows a row that was read: rows of a snapshot have it in common as long as the clock stands.
#[derive(Debug, Default)]
struct Tail {
    of: Option<(Origin, SystemTime)>,
    source_names: Vec<u8>,
    written: Vec<u8>,
}

/// The parts of `source` that do not change within a transaction, written once.
#[derive(Debug, Default)]
struct Shared {
    of: Option<(i64, Option<&'static str>, Option<u64>)>,
    /// From `,"source":` to the first half of the sequence.
    front: Vec<u8>,
    /// From the end of the sequence to `ts_ns`.
    middle: Vec<u8>,
}

/// `","ts_ms":…,"ts_us":…,"ts_ns":…}` of the last event: many come in one moment.
#[derive(Debug, Default)]
struct Times {
    of: Option<SystemTime>,
    written: Vec<u8>,
}

impl Envelope {
    pub(super) fn new(topic_prefix: &str, database: &str) -> Self {
        let mut source_head = b",\"source\":{\"version\":".to_vec();
        json::string(&mut source_head, env!("CARGO_PKG_VERSION"));
        source_head.extend_from_slice(b",\"connector\":\"postgresql\",\"name\":");
        json::string(&mut source_head, topic_prefix);
        source_head.extend_from_slice(b",\"ts_ms\":");
        let mut names = b",\"db\":".to_vec();
        json::string(&mut names, database);
        names.extend_from_slice(b",\"sequence\":\"[");
        Self {
            key: Vec::new(),
            value: Vec::new(),
            old_key: Vec::new(),
            spans: Vec::new(),
            source_head,
            database: names,
            shared: Shared::default(),
            times: Times::default(),
            tail: Tail::default(),
        }
    }

    /// A row that came to be (`c`) or was read (`r`).
    pub(super) fn write_new<'v>(
        &mut self,
        table: &Table,
        op: u8,
        row: impl ExactSizeIterator<Item = Result<Value<'v>, Malformed>>,
        origin: &Origin,
        now: SystemTime,
    ) -> Result<(), Poison> {
        self.value.clear();
        self.value.extend_from_slice(b"{\"before\":null,\"after\":");
        self.row(table, row, None, true)?;
        self.key_of_row(table);
        match op {
            b'r' => self.rest_of_read(table, origin, now),
            _ => self.rest(table, op, origin, now),
        }
        Ok(())
    }

    /// A row that is no more (`d`). Its tombstone is the caller's.
    pub(super) fn write_delete(&mut self, table: &Table, old: &Old<'_>, origin: &Origin, now: SystemTime) -> Result<(), Poison> {
        self.value.clear();
        self.value.extend_from_slice(b"{\"before\":");
        if self.row(table, old.row.values(), None, old.full)? {
            self.key_of_row(table);
        } else {
            // Debezium makes a key of zeros here, which is another row's; none is more honest.
            self.key.clear();
        }
        self.value.extend_from_slice(b",\"after\":null");
        self.rest(table, b'd', origin, now);
        Ok(())
    }

    /// A changed row (`u`). Where its key changed nothing is written but both keys: the caller tells a delete and a create.
    pub(super) fn write_update(&mut self, table: &Table, old: Option<&Old<'_>>, new: Tuple<'_>, origin: &Origin, now: SystemTime) -> Result<Update, Poison> {
        self.value.clear();
        self.old_key.clear();
        self.value.extend_from_slice(b"{\"before\":");
        let start = self.value.len();
        if let Some(old) = old {
            // A key that the old row does not tell (REPLICA IDENTITY USING INDEX) did not change.
            if self.row(table, old.row.values(), None, old.full)? {
                self.key_of_row(table);
                std::mem::swap(&mut self.key, &mut self.old_key);
            }
        }
        if !old.is_some_and(|it| it.full) {
            self.value.truncate(start);
            self.value.extend_from_slice(b"null");
        }
        self.value.extend_from_slice(b",\"after\":");
        self.row(table, new.values(), old.filter(|it| it.full).map(|it| it.row), true)?;
        self.key_of_row(table);
        if !self.old_key.is_empty() && self.old_key != self.key {
            return Ok(Update::Moved);
        }
        self.rest(table, b'u', origin, now);
        Ok(Update::Same)
    }

    /// A row after a change, where unchanged TOASTed values come from the row before it, as the new half of a moved key.
    pub(super) fn write_moved(&mut self, table: &Table, old: &Old<'_>, new: Tuple<'_>, origin: &Origin, now: SystemTime) -> Result<(), Poison> {
        self.value.clear();
        self.value.extend_from_slice(b"{\"before\":null,\"after\":");
        self.row(table, new.values(), Some(old.row).filter(|_| old.full), true)?;
        self.key_of_row(table);
        self.rest(table, b'c', origin, now);
        Ok(())
    }

    /// A table of which no row is left (`t`). It has no key: it is about all of them.
    pub(super) fn write_truncate(&mut self, table: &Table, origin: &Origin, now: SystemTime) {
        self.key.clear();
        self.value.clear();
        self.value.extend_from_slice(b"{\"before\":null,\"after\":null");
        self.rest(table, b't', origin, now);
    }

    /// `pg_logical_emit_message`. The content may be anything, so it travels as base64.
    pub(super) fn write_message(&mut self, prefix: &str, content: &[u8], origin: &Origin, now: SystemTime) {
        self.key.clear();
        self.key.extend_from_slice(b"{\"prefix\":");
        json::string(&mut self.key, prefix);
        self.key.push(b'}');
        self.value.clear();
        self.value.extend_from_slice(b"{\"op\":\"m\",\"ts_ms\":");
        json::integer(&mut self.value, since_1970(now).as_millis());
        self.source(b",\"schema\":\"\",\"table\":\"\",\"txId\":", origin);
        self.transaction(origin);
        self.value.extend_from_slice(b",\"message\":{\"prefix\":");
        json::string(&mut self.value, prefix);
        self.value.extend_from_slice(b",\"content\":");
        json::base64(&mut self.value, content.iter().copied());
        self.value.extend_from_slice(b"}}");
    }

    /// Appends a row as JSON. False where the stream told only another index (REPLICA IDENTITY USING INDEX), not the key.
    fn row<'v>(
        &mut self,
        table: &Table,
        row: impl ExactSizeIterator<Item = Result<Value<'v>, Malformed>>,
        before: Option<Tuple<'_>>,
        whole: bool,
    ) -> Result<bool, Poison> {
        if row.len() != table.columns.len() {
            return Err(Poison::Columns { found: row.len(), expected: table.columns.len() });
        }
        let out = &mut self.value;
        let mut before = before.map(|it| it.values());
        let mut key_told = true;
        self.spans.clear();
        out.push(b'{');
        for (place, (column, value)) in table.columns.iter().zip(row).enumerate() {
            let value_before = before.as_mut().and_then(Iterator::next).transpose()?;
            let value = value?;
            if column.kind == Kind::Omitted {
                self.spans.push((out.len(), out.len()));
                continue;
            }
            if out.last() != Some(&b'{') {
                out.push(b',');
            }
            out.extend_from_slice(&column.head);
            let start = out.len();
            match (value, value_before) {
                (Value::Text(text), _) | (Value::Unchanged, Some(Value::Text(text))) => {
                    column.kind.write(out, text).map_err(|source| Poison::Value { column: column.name.clone(), source })?;
                }
                (Value::Unchanged, Some(Value::Null)) => out.extend_from_slice(b"null"),
                (Value::Unchanged, _) => column.kind.write_unavailable(out),
                (Value::Null, _) => {
                    key_told &= whole || !table.key.contains(&place);
                    out.extend_from_slice(if whole { b"null" } else { &column.absent });
                }
            }
            self.spans.push((start, out.len()));
        }
        out.push(b'}');
        Ok(key_told)
    }

    /// The key of the row written last.
    fn key_of_row(&mut self, table: &Table) {
        self.key.clear();
        for (place, at) in table.key.iter().enumerate() {
            self.key.push(if place == 0 { b'{' } else { b',' });
            self.key.extend_from_slice(&table.columns[*at].head);
            let (start, end) = self.spans[*at];
            self.key.extend_from_slice(&self.value[start..end]);
        }
        if !table.key.is_empty() {
            self.key.push(b'}');
        }
    }

    /// All that follows the rows.
    fn rest(&mut self, table: &Table, op: u8, origin: &Origin, now: SystemTime) {
        self.source(&table.source_names, origin);
        self.transaction(origin);
        let out = &mut self.value;
        out.extend_from_slice(b",\"op\":\"");
        out.push(op);
        out.extend_from_slice(self.times.at(now));
    }

    fn rest_of_read(&mut self, table: &Table, origin: &Origin, now: SystemTime) {
        if self.tail.of == Some((*origin, now)) && self.tail.source_names == table.source_names {
            return self.value.extend_from_slice(&self.tail.written);
        }
        let start = self.value.len();
        self.rest(table, b'r', origin, now);
        let Tail { of, source_names, written } = &mut self.tail;
        *of = Some((*origin, now));
        source_names.clone_from(&table.source_names);
        written.clear();
        written.extend_from_slice(&self.value[start..]);
    }

    fn source(&mut self, names: &[u8], origin: &Origin) {
        let of = (origin.at_us, origin.snapshot, origin.previous_commit);
        if self.shared.of != Some(of) {
            self.shared.write(&self.source_head, &self.database, origin);
            self.shared.of = Some(of);
        }
        let out = &mut self.value;
        out.extend_from_slice(&self.shared.front);
        json::integer(out, origin.lsn);
        out.extend_from_slice(&self.shared.middle);
        out.extend_from_slice(names);
        match origin.xid {
            Some(xid) => json::integer(out, xid),
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b",\"lsn\":");
        match origin.snapshot {
            Some(INCREMENTAL) => out.extend_from_slice(b"null"),
            _ => json::integer(out, origin.lsn),
        }
        out.extend_from_slice(b",\"xmin\":null,\"origin\":null,\"origin_lsn\":null}");
    }

    fn transaction(&mut self, origin: &Origin) {
        let out = &mut self.value;
        out.extend_from_slice(b",\"transaction\":");
        let (Some((total_order, table_order)), Some(xid)) = (origin.order, origin.xid) else {
            return out.extend_from_slice(b"null");
        };
        out.extend_from_slice(b"{\"id\":\"");
        json::integer(out, xid);
        out.push(b':');
        json::integer(out, origin.lsn);
        out.extend_from_slice(b"\",\"total_order\":");
        json::integer(out, total_order);
        out.extend_from_slice(b",\"data_collection_order\":");
        json::integer(out, table_order);
        out.push(b'}');
    }
}

impl Shared {
    fn write(&mut self, source_head: &[u8], database: &[u8], origin: &Origin) {
        let out = &mut self.front;
        out.clear();
        out.extend_from_slice(source_head);
        json::integer(out, origin.at_us.div_euclid(1000));
        out.extend_from_slice(b",\"snapshot\":");
        match origin.snapshot {
            Some(marker) => {
                out.push(b'"');
                out.extend_from_slice(marker.as_bytes());
                out.push(b'"');
            }
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(database);
        match origin.previous_commit {
            Some(lsn) => {
                out.extend_from_slice(b"\\\"");
                json::integer(out, lsn);
                out.extend_from_slice(b"\\\"");
            }
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b",\\\"");
        let out = &mut self.middle;
        out.clear();
        out.extend_from_slice(b"\\\"]\",\"ts_us\":");
        json::integer(out, origin.at_us);
        out.extend_from_slice(b",\"ts_ns\":");
        json::integer(out, i128::from(origin.at_us) * 1000);
    }
}

impl Times {
    fn at(&mut self, now: SystemTime) -> &[u8] {
        if self.of != Some(now) {
            self.of = Some(now);
            let out = &mut self.written;
            let now = since_1970(now);
            out.clear();
            out.extend_from_slice(b"\",\"ts_ms\":");
            json::integer(out, u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
            out.extend_from_slice(b",\"ts_us\":");
            json::integer(out, u64::try_from(now.as_micros()).unwrap_or(u64::MAX));
            out.extend_from_slice(b",\"ts_ns\":");
            json::integer(out, u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
            out.push(b'}');
        }
        &self.written
    }
}

pub(super) fn since_1970(now: SystemTime) -> Duration {
    now.duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cdc::{pgoutput, values};

    fn ledger_entries() -> Table {
        let column = |name: &str, type_oid, not_null, key_place| ColumnSpec {
            name: name.to_owned(),
            kind: values::built_in(type_oid, -1).expect("built in"),
            not_null,
            default: None,
            key_place,
        };
        let id = TableId { schema: "public".into(), table: "ledger_entries".into() };
        let columns = vec![
            column("line_no", 21, true, Some(2)),
            column("transaction_id", 20, true, Some(1)),
            column("debit", 1700, false, None),
            column("note", 25, true, None),
        ];
        Table::new(id, "bank.public.ledger_entries".into(), columns)
    }

    const ORIGIN: Origin =
        Origin { lsn: 629_786_824, at_us: 1_795_332_275_176_341, xid: Some(201_151), previous_commit: Some(629_786_448), snapshot: None, order: Some((2, 1)) };

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(1_795_332_275_298_413_561)
    }

    fn values<'v>(row: &'v [Option<&'v str>]) -> impl ExactSizeIterator<Item = Result<Value<'v>, Malformed>> {
        row.iter().map(|it| Ok(it.map_or(Value::Null, Value::Text)))
    }

    /// Two text values each; `-` is one the stream left out.
    fn update(old: (u8, [&str; 4]), new: [&str; 4]) -> Vec<u8> {
        let row = |row: [&str; 4]| {
            let mut bytes = vec![0, 4];
            for value in row {
                match value {
                    "-" => bytes.push(b'u'),
                    "" => bytes.push(b'n'),
                    text => {
                        bytes.push(b't');
                        bytes.extend(u32::try_from(text.len()).expect("short").to_be_bytes());
                        bytes.extend(text.bytes());
                    }
                }
            }
            bytes
        };
        [b"U\0\0\0\x01".as_slice(), &[old.0], &row(old.1), b"N", &row(new)].concat()
    }

    #[test]
    fn a_created_row_has_debeziums_fields_in_debeziums_order() {
        let mut envelope = Envelope::new("bank", "bank");
        envelope.write_new(&ledger_entries(), b'c', values(&[Some("1"), Some("100"), None, Some("x")]), &ORIGIN, now()).expect("valid");
        assert_eq!(String::from_utf8_lossy(&envelope.key), r#"{"transaction_id":100,"line_no":1}"#);
        let expected = concat!(
            r#"{"before":null,"after":{"line_no":1,"transaction_id":100,"debit":null,"note":"x"},"source":{"version":""#,
            env!("CARGO_PKG_VERSION"),
            r#"","connector":"postgresql","name":"bank","ts_ms":1795332275176,"snapshot":null,"db":"bank","sequence":"[\"629786448\",\"629786824\"]","#,
            r#""ts_us":1795332275176341,"ts_ns":1795332275176341000,"schema":"public","table":"ledger_entries","txId":201151,"lsn":629786824,"#,
            r#""xmin":null,"origin":null,"origin_lsn":null},"transaction":{"id":"201151:629786824","total_order":2,"data_collection_order":1},"#,
            r#""op":"c","ts_ms":1795332275298,"ts_us":1795332275298413,"ts_ns":1795332275298413561}"#
        );
        assert_eq!(String::from_utf8_lossy(&envelope.value), expected);
    }

    #[test]
    fn a_clock_that_jumps_moves_the_times_at_the_end_and_nothing_else() {
        let clocks = [now(), UNIX_EPOCH, UNIX_EPOCH - Duration::from_secs(1), now() + Duration::from_secs(100 * 365 * 86_400)];
        let mut envelope = Envelope::new("bank", "bank");
        let written = clocks.map(|clock| {
            envelope.write_new(&ledger_entries(), b'c', values(&[Some("1"), Some("100"), None, Some("x")]), &ORIGIN, clock).expect("valid");
            let value = String::from_utf8(envelope.value.clone()).expect("JSON");
            let times = value.rfind(",\"ts_ms\":").expect("the times at the end");
            (value[..times].to_owned(), envelope.key.clone())
        });
        assert!(written.iter().all(|it| *it == written[0]), "{written:?}");
    }

    #[test]
    fn an_update_that_moves_the_key_is_told_as_moved() {
        let mut envelope = Envelope::new("bank", "bank");
        let bytes = update((b'O', ["1", "100", "5.00", "long"]), ["9", "100", "5.00", "-"]);
        let Ok(pgoutput::Message::Update { old: Some(old), new, .. }) = pgoutput::decode(&bytes) else { panic!("not an update") };
        let table = ledger_entries();
        assert_eq!(envelope.write_update(&table, Some(&old), new, &ORIGIN, now()), Ok(Update::Moved));
        assert_eq!(String::from_utf8_lossy(&envelope.old_key), r#"{"transaction_id":100,"line_no":1}"#);

        envelope.write_moved(&table, &old, new, &ORIGIN, now()).expect("valid");

        assert_eq!(String::from_utf8_lossy(&envelope.key), r#"{"transaction_id":100,"line_no":9}"#);
        assert!(String::from_utf8_lossy(&envelope.value).contains(r#""note":"long"}"#));
    }

    #[test]
    fn a_value_the_stream_left_out_is_said_to_be_unavailable() {
        let mut envelope = Envelope::new("bank", "bank");
        let bytes = update((b'K', ["1", "100", "", ""]), ["1", "100", "", "-"]);
        let Ok(pgoutput::Message::Update { old: Some(old), new, .. }) = pgoutput::decode(&bytes) else { panic!("not an update") };
        assert_eq!(envelope.write_update(&ledger_entries(), Some(&old), new, &ORIGIN, now()), Ok(Update::Same));
        let value = String::from_utf8_lossy(&envelope.value);
        assert!(
            value.starts_with(r#"{"before":null,"after":{"line_no":1,"transaction_id":100,"debit":null,"note":"__debezium_unavailable_value"}"#),
            "{value}"
        );
    }

    #[test]
    fn a_row_that_is_not_of_its_table_is_poison() {
        let mut envelope = Envelope::new("bank", "bank");
        let short = envelope.write_new(&ledger_entries(), b'c', values(&[Some("1")]), &ORIGIN, now());
        assert_eq!(short, Err(Poison::Columns { found: 1, expected: 4 }));
        let wrong = envelope.write_new(&ledger_entries(), b'c', values(&[Some("one"), Some("1"), None, None]), &ORIGIN, now());
        assert!(matches!(wrong, Err(Poison::Value { column, .. }) if column == "line_no"));
    }
}
