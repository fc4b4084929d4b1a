//! Bytes of a logical replication stream → messages. Pure; malformed input is an `Err`, never a panic, and nothing is
//! allocated that is larger than the message it came in.
//!
//! Only row-bearing messages are decoded here: BEGIN, COMMIT and logical messages are taken apart by the transport.

/// Bytes that are not a message of protocol version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("message ends in the middle of {0}")]
    Truncated(&'static str),
    #[error("{0} is not UTF-8")]
    NotUtf8(&'static str),
    #[error("unknown tag {tag:#04x} in {place}")]
    UnknownTag { place: &'static str, tag: u8 },
    #[error("a binary value, though text was asked for")]
    BinaryValue,
    #[error("bytes behind the end of the message")]
    TrailingBytes,
}

/// One message; text is borrowed from the bytes it was read from.
#[derive(Debug, PartialEq)]
pub(super) enum Message<'a> {
    Relation(Relation<'a>),
    Insert {
        relation: u32,
        new: Tuple<'a>,
    },
    Update {
        relation: u32,
        old: Option<Old<'a>>,
        new: Tuple<'a>,
    },
    Delete {
        relation: u32,
        old: Old<'a>,
    },
    Truncate {
        relations: Vec<u32>,
    },
    /// TYPE and ORIGIN: known, and of no use to us.
    Other,
}

/// The shape of a table, as it was when the following rows were written.
#[derive(Debug, PartialEq)]
pub(super) struct Relation<'a> {
    pub(super) id: u32,
    pub(super) schema: &'a str,
    pub(super) table: &'a str,
    /// `d`efault, `n`othing, `f`ull, `i`ndex.
    pub(super) replica_identity: u8,
    pub(super) columns: Vec<RelationColumn<'a>>,
}

#[derive(Debug, PartialEq)]
pub(super) struct RelationColumn<'a> {
    /// Part of the replica identity; under FULL every column is.
    pub(super) identity: bool,
    pub(super) name: &'a str,
    pub(super) type_oid: u32,
    pub(super) type_modifier: i32,
}

/// What the stream tells of a row before the change.
#[derive(Debug, PartialEq)]
pub(super) struct Old<'a> {
    /// The whole row (REPLICA IDENTITY FULL), or only the columns of its identity.
    pub(super) full: bool,
    pub(super) row: Tuple<'a>,
}

/// A row: as many values as the relation has columns.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Tuple<'a> {
    columns: u16,
    bytes: &'a [u8],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Null,
    /// A TOASTed value the change did not touch: the stream leaves it out.
    Unchanged,
    Text(&'a str),
}

/// Reads one message.
pub(super) fn decode(bytes: &[u8]) -> Result<Message<'_>, Malformed> {
    let mut cursor = Cursor(bytes);
    let message = match cursor.u8("tag")? {
        b'I' => {
            let relation = cursor.u32("relation id")?;
            cursor.expect(b'N', "insert")?;
            Message::Insert { relation, new: cursor.tuple()? }
        }
        b'U' => {
            let relation = cursor.u32("relation id")?;
            let old = match cursor.u8("update")? {
                b'N' => None,
                tag => {
                    let old = cursor.old(tag, "update")?;
                    cursor.expect(b'N', "update")?;
                    Some(old)
                }
            };
            Message::Update { relation, old, new: cursor.tuple()? }
        }
        b'D' => {
            let relation = cursor.u32("relation id")?;
            let tag = cursor.u8("delete")?;
            Message::Delete { relation, old: cursor.old(tag, "delete")? }
        }
        b'R' => Message::Relation(cursor.relation()?),
        b'T' => Message::Truncate { relations: cursor.truncated()? },
        b'Y' | b'O' => return Ok(Message::Other),
        tag => return Err(Malformed::UnknownTag { place: "message", tag }),
    };
    if cursor.0.is_empty() { Ok(message) } else { Err(Malformed::TrailingBytes) }
}

/// The table a row message belongs to, readable even where the rest is not: for the dead letter.
pub(super) fn relation_of(bytes: &[u8]) -> Option<u32> {
    let mut cursor = Cursor(bytes);
    matches!(cursor.u8("tag"), Ok(b'I' | b'U' | b'D')).then(|| cursor.u32("relation id").ok()).flatten()
}

impl<'a> Tuple<'a> {
    /// The values in column order. The tuple was walked when it was decoded; text is checked to be UTF-8 only here.
    pub(super) fn values(&self) -> Values<'a> {
        Values { left: self.columns, cursor: Cursor(self.bytes) }
    }
}

#[derive(Debug)]
pub(super) struct Values<'a> {
    left: u16,
    cursor: Cursor<'a>,
}

impl<'a> Iterator for Values<'a> {
    type Item = Result<Value<'a>, Malformed>;

    fn size_hint(&self) -> (usize, Option<usize>) {
        (usize::from(self.left), Some(usize::from(self.left)))
    }

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        Some(self.cursor.value().and_then(|value| match value {
            Raw::Null => Ok(Value::Null),
            Raw::Unchanged => Ok(Value::Unchanged),
            Raw::Text(bytes) => std::str::from_utf8(bytes).map(Value::Text).map_err(|_| Malformed::NotUtf8("value")),
        }))
    }
}

impl ExactSizeIterator for Values<'_> {
    fn len(&self) -> usize {
        usize::from(self.left)
    }
}

enum Raw<'a> {
    Null,
    Unchanged,
    Text(&'a [u8]),
}

#[derive(Debug, Clone, Copy)]
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Malformed::Truncated(what))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(Malformed::Truncated(what))?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, Malformed> {
        Ok(self.array::<1>(what)?[0])
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, Malformed> {
        self.array(what).map(u16::from_be_bytes)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        self.array(what).map(u32::from_be_bytes)
    }

    fn text(&mut self, what: &'static str) -> Result<&'a str, Malformed> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(Malformed::Truncated(what))?;
        let text = std::str::from_utf8(&self.0[..end]).map_err(|_| Malformed::NotUtf8(what))?;
        self.0 = &self.0[end + 1..];
        Ok(text)
    }

    fn expect(&mut self, tag: u8, place: &'static str) -> Result<(), Malformed> {
        match self.u8(place)? {
            found if found == tag => Ok(()),
            found => Err(Malformed::UnknownTag { place, tag: found }),
        }
    }

    fn value(&mut self) -> Result<Raw<'a>, Malformed> {
        match self.u8("value")? {
            b'n' => Ok(Raw::Null),
            b'u' => Ok(Raw::Unchanged),
            b't' => {
                let length = self.u32("length of a value")?;
                let length = usize::try_from(length).map_err(|_| Malformed::Truncated("value"))?;
                self.take(length, "value").map(Raw::Text)
            }
            b'b' => Err(Malformed::BinaryValue),
            tag => Err(Malformed::UnknownTag { place: "value", tag }),
        }
    }

    fn tuple(&mut self) -> Result<Tuple<'a>, Malformed> {
        let columns = self.u16("number of columns")?;
        let bytes = self.0;
        for _ in 0..columns {
            self.value()?;
        }
        Ok(Tuple { columns, bytes: &bytes[..bytes.len() - self.0.len()] })
    }

    fn old(&mut self, tag: u8, place: &'static str) -> Result<Old<'a>, Malformed> {
        match tag {
            b'O' => Ok(Old { full: true, row: self.tuple()? }),
            b'K' => Ok(Old { full: false, row: self.tuple()? }),
            tag => Err(Malformed::UnknownTag { place, tag }),
        }
    }

    fn relation(&mut self) -> Result<Relation<'a>, Malformed> {
        /// Flags, an empty name, type and modifier: what a column takes at least.
        const COLUMN_MIN: usize = 1 + 1 + 4 + 4;
        let id = self.u32("relation id")?;
        let schema = self.text("schema")?;
        let table = self.text("table")?;
        let replica_identity = self.u8("replica identity")?;
        let count = usize::from(self.u16("number of columns")?);
        // The count is the sender's claim; the bytes at hand bound what is believed.
        let mut columns = Vec::with_capacity(count.min(self.0.len() / COLUMN_MIN));
        for _ in 0..count {
            columns.push(RelationColumn {
                identity: self.u8("column")? & 1 == 1,
                name: self.text("column name")?,
                type_oid: self.u32("column type")?,
                type_modifier: self.array("column type modifier").map(i32::from_be_bytes)?,
            });
        }
        // pg_catalog travels as an empty name.
        Ok(Relation { id, schema: if schema.is_empty() { "pg_catalog" } else { schema }, table, replica_identity, columns })
    }

    fn truncated(&mut self) -> Result<Vec<u32>, Malformed> {
        let count = usize::try_from(self.u32("number of relations")?).unwrap_or(usize::MAX);
        self.u8("truncate options")?;
        let mut relations = Vec::with_capacity(count.min(self.0.len() / 4));
        for _ in 0..count {
            relations.push(self.u32("relation id")?);
        }
        Ok(relations)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An update under REPLICA IDENTITY FULL of a four-column table, as PostgreSQL 18 sent it.
    const UPDATE: &[u8] = b"U\0\0\x40\x05O\0\x04t\0\0\0\x011t\0\0\0\x0225t\0\0\0\x06posted\
n\
N\0\x04t\0\0\0\x011t\0\0\0\x0230t\0\0\0\x08reversedu";

    const RELATION: &[u8] = b"R\0\0\x40\x05public\0accounts\0f\0\x02\x01id\0\0\0\0\x14\xff\xff\xff\xff\x01balance\0\0\0\x06\xa4\0\x12\0\x06";

    fn all(tuple: Tuple<'_>) -> Vec<Value<'_>> {
        tuple.values().map(|it| it.expect("valid")).collect()
    }

    #[test]
    fn an_update_shows_the_row_before_and_after() {
        let Ok(Message::Update { relation: 0x4005, old: Some(Old { full: true, row }), new }) = decode(UPDATE) else { panic!("not an update") };
        assert_eq!(all(row), [Value::Text("1"), Value::Text("25"), Value::Text("posted"), Value::Null]);
        assert_eq!(all(new), [Value::Text("1"), Value::Text("30"), Value::Text("reversed"), Value::Unchanged]);
    }

    #[test]
    fn a_relation_names_its_columns_and_their_types() {
        let Ok(Message::Relation(relation)) = decode(RELATION) else { panic!("not a relation") };
        assert_eq!((relation.schema, relation.table, relation.replica_identity), ("public", "accounts", b'f'));
        let balance = RelationColumn { identity: true, name: "balance", type_oid: 1700, type_modifier: (18 << 16) + 6 };
        assert_eq!(relation.columns[1], balance);
    }

    #[test]
    fn every_truncation_of_a_message_is_an_error() {
        for message in [UPDATE, RELATION] {
            for length in 0..message.len() {
                assert!(decode(&message[..length]).is_err(), "{length} bytes");
            }
            assert!(decode(&[message, b"x"].concat()).is_err());
        }
    }

    #[test]
    fn a_claim_of_four_billion_relations_allocates_nothing() {
        assert_eq!(decode(b"T\xff\xff\xff\xff\0"), Err(Malformed::Truncated("relation id")));
    }

    /// Reads all there is; how many values were readable.
    fn read(bytes: &[u8]) -> usize {
        let readable = |row: Tuple<'_>| row.values().filter(Result::is_ok).count();
        match decode(bytes) {
            Ok(Message::Insert { new, .. }) => readable(new),
            Ok(Message::Update { old, new, .. }) => old.map_or(0, |it| readable(it.row)) + readable(new),
            Ok(Message::Delete { old, .. }) => readable(old.row),
            _ => 0,
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(tag in prop::sample::select(b"IUDRTYOBCMx".to_vec()), rest in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(read(&[&[tag][..], &rest].concat()) <= rest.len());
        }

        #[test]
        fn a_damaged_message_never_panics(at in 0..UPDATE.len(), byte in any::<u8>(), length in 0..UPDATE.len()) {
            for message in [UPDATE, RELATION] {
                let mut bytes = message.to_vec();
                if let Some(place) = bytes.get_mut(at) {
                    *place = byte;
                }
                prop_assert!(read(&bytes) <= 8);
                prop_assert!(read(&bytes[..length.min(bytes.len())]) <= 8);
            }
        }
    }
}
