//! A source transaction while it streams by: its BEGIN and END for the transaction topic, and each event's place in it. Pure.

use super::{envelope::Table, json};

/// The transaction being received.
#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) xid: u32,
    /// Microseconds since 1970.
    pub(super) committed_at_us: i64,
    /// Events so far, logical messages included.
    events: u64,
    /// Events by relation, in order of first appearance.
    by_relation: Vec<(u32, u64)>,
    /// Whether its BEGIN is on its way.
    pub(super) begun: bool,
}

impl Transaction {
    pub(super) fn new(xid: u32, committed_at_us: i64) -> Self {
        Self { xid, committed_at_us, events: 0, by_relation: Vec::new(), begun: false }
    }

    /// Counts an event of a table; its place in the transaction and among the table's events.
    pub(super) fn count(&mut self, relation: u32) -> (u64, u64) {
        self.events += 1;
        if let Some((_, count)) = self.by_relation.iter_mut().find(|(id, _)| *id == relation) {
            *count += 1;
            return (self.events, *count);
        }
        self.by_relation.push((relation, 1));
        (self.events, 1)
    }

    /// Takes the last event of a table back: it could not be written, so nobody may wait for it, and the next one has its place.
    pub(super) fn uncount(&mut self, relation: u32) {
        if let Some(at) = self.by_relation.iter().position(|(id, _)| *id == relation) {
            self.events -= 1;
            match self.by_relation[at].1 {
                1 => drop(self.by_relation.remove(at)),
                count => self.by_relation[at].1 = count - 1,
            }
        }
    }
}

/// Writes `{"id":"201088:629722832"}`, the key of both boundaries.
pub(super) fn write_key(out: &mut Vec<u8>, transaction: &Transaction, lsn: u64) {
    out.clear();
    out.extend_from_slice(b"{\"id\":\"");
    write_id(out, transaction, lsn);
    out.extend_from_slice(b"\"}");
}

/// Writes the BEGIN; `lsn` is that of the first event.
pub(super) fn write_begin(out: &mut Vec<u8>, transaction: &Transaction, lsn: u64) {
    out.clear();
    out.extend_from_slice(b"{\"status\":\"BEGIN\",\"id\":\"");
    write_id(out, transaction, lsn);
    out.extend_from_slice(b"\",\"event_count\":null,\"data_collections\":null,\"ts_ms\":");
    json::integer(out, transaction.committed_at_us.div_euclid(1000));
    out.push(b'}');
}

/// Writes the END; `lsn` is the end of the commit. It says how many events each table owes.
///
/// Logical messages are in `event_count` but in no collection: Debezium names their "collection" by an object's address.
pub(super) fn write_end<'t>(out: &mut Vec<u8>, transaction: &Transaction, lsn: u64, table: impl Fn(u32) -> Option<&'t Table>) {
    out.clear();
    out.extend_from_slice(b"{\"status\":\"END\",\"id\":\"");
    write_id(out, transaction, lsn);
    out.extend_from_slice(b"\",\"event_count\":");
    json::integer(out, transaction.events);
    out.extend_from_slice(b",\"data_collections\":[");
    let mut first = true;
    for (relation, count) in &transaction.by_relation {
        let Some(table) = table(*relation) else { continue };
        if !first {
            out.push(b',');
        }
        first = false;
        out.extend_from_slice(b"{\"data_collection\":\"");
        json::escaped(out, &table.id.schema);
        out.push(b'.');
        json::escaped(out, &table.id.table);
        out.extend_from_slice(b"\",\"event_count\":");
        json::integer(out, *count);
        out.push(b'}');
    }
    out.extend_from_slice(b"],\"ts_ms\":");
    json::integer(out, transaction.committed_at_us.div_euclid(1000));
    out.push(b'}');
}

fn write_id(out: &mut Vec<u8>, transaction: &Transaction, lsn: u64) {
    json::integer(out, transaction.xid);
    out.push(b':');
    json::integer(out, lsn);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::TableId;

    #[test]
    fn the_end_says_what_each_table_owes() {
        let tables =
            ["transactions", "ledger_entries"].map(|table| Table::new(TableId { schema: "public".into(), table: table.into() }, String::new(), Vec::new()));
        let mut transaction = Transaction::new(201_151, 1_795_332_275_176_341);
        assert_eq!([0, 1, 1].map(|relation| transaction.count(relation)), [(1, 1), (2, 1), (3, 2)]);
        // One that could not be written leaves no trace.
        transaction.count(1);
        transaction.uncount(1);
        transaction.count(2);
        transaction.uncount(2);
        let mut out = Vec::new();
        write_end(&mut out, &transaction, 629_787_328, |relation| tables.get(usize::try_from(relation).ok()?));
        assert_eq!(
            String::from_utf8_lossy(&out),
            concat!(
                r#"{"status":"END","id":"201151:629787328","event_count":3,"data_collections":[{"data_collection":"public.transactions","event_count":1},"#,
                r#"{"data_collection":"public.ledger_entries","event_count":2}],"ts_ms":1795332275176}"#
            )
        );
        write_begin(&mut out, &transaction, 629_786_640);
        assert_eq!(
            String::from_utf8_lossy(&out),
            r#"{"status":"BEGIN","id":"201151:629786640","event_count":null,"data_collections":null,"ts_ms":1795332275176}"#
        );
        write_key(&mut out, &transaction, 629_786_640);
        assert_eq!(String::from_utf8_lossy(&out), r#"{"id":"201151:629786640"}"#);
    }
}
