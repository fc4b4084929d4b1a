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
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Relation<'a> {
    pub(super) id: u32,
    pub(super) schema: &'a str,
    pub(super) table: &'a str,
    /// `d`efault, `n`othing, `f`ull, `i`ndex.
    pub(super) replica_identity: u8,
    pub(super) columns: Columns<'a>,
}

/// The columns of a relation, in order. Walked when the message was decoded, and read again from its bytes: a description
/// takes no memory of its own, whatever it claims.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Columns<'a> {
    count: u16,
    bytes: &'a [u8],
}

#[derive(Debug, Clone, Copy, PartialEq)]
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

impl<'a> Columns<'a> {
    pub(super) fn iter(&self) -> impl Iterator<Item = RelationColumn<'a>> + use<'a> {
        let mut cursor = Cursor(self.bytes);
        (0..self.count).map_while(move |_| cursor.column().ok())
    }

    pub(super) fn len(&self) -> usize {
        usize::from(self.count)
    }
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
        let id = self.u32("relation id")?;
        let schema = self.text("schema")?;
        let table = self.text("table")?;
        let replica_identity = self.u8("replica identity")?;
        let count = self.u16("number of columns")?;
        let bytes = self.0;
        for _ in 0..count {
            self.column()?;
        }
        let columns = Columns { count, bytes: &bytes[..bytes.len() - self.0.len()] };
        // pg_catalog travels as an empty name.
        Ok(Relation { id, schema: if schema.is_empty() { "pg_catalog" } else { schema }, table, replica_identity, columns })
    }

    fn column(&mut self) -> Result<RelationColumn<'a>, Malformed> {
        Ok(RelationColumn {
            identity: self.u8("column")? & 1 == 1,
            name: self.text("column name")?,
            type_oid: self.u32("column type")?,
            type_modifier: self.array("column type modifier").map(i32::from_be_bytes)?,
        })
    }

    fn truncated(&mut self) -> Result<Vec<u32>, Malformed> {
        let count = usize::try_from(self.u32("number of relations")?).unwrap_or(usize::MAX);
        self.u8("truncate options")?;
        // The count is the sender's claim; the bytes at hand bound what is believed.
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
        assert_eq!(relation.columns.iter().nth(1), Some(balance));
        assert_eq!(relation.columns.iter().count(), relation.columns.len());
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

    /// Reads all there is. What was allocated for the message, in bytes, and how many columns or values were readable.
    fn read(bytes: &[u8]) -> (usize, usize) {
        let readable = |row: Tuple<'_>| row.values().filter(Result::is_ok).count();
        match decode(bytes) {
            Ok(Message::Insert { new, .. }) => (0, readable(new)),
            Ok(Message::Update { old, new, .. }) => (0, old.map_or(0, |it| readable(it.row)) + readable(new)),
            Ok(Message::Delete { old, .. }) => (0, readable(old.row)),
            Ok(Message::Relation(relation)) => (0, relation.columns.iter().count()),
            // The only message that is kept in memory of its own; all others borrow from the bytes they came in.
            Ok(Message::Truncate { relations }) => (relations.capacity() * size_of::<u32>(), relations.len()),
            Ok(Message::Other) | Err(_) => (0, 0),
        }
    }

    /// A message as a server writes it: of every kind, with names and values of any length.
    fn message() -> impl Strategy<Value = Vec<u8>> {
        let value = prop_oneof![
            Just(b"n".to_vec()),
            Just(b"u".to_vec()),
            ".{0,20}".prop_map(|text| {
                let length = u32::try_from(text.len()).expect("short").to_be_bytes();
                [b"t", &length[..], text.as_bytes()].concat()
            })
        ];
        let tuple =
            prop::collection::vec(value, 0..8).prop_map(|values| [&u16::try_from(values.len()).expect("few").to_be_bytes()[..], &values.concat()].concat());
        let insert = tuple.clone().prop_map(|new| [b"I\0\0\0\x07N", &new[..]].concat());
        let update = (prop::sample::select(b"KO".to_vec()), tuple.clone(), tuple.clone())
            .prop_map(|(tag, old, new)| [b"U\0\0\0\x07", &[tag][..], &old, b"N", &new].concat());
        let delete = (prop::sample::select(b"KO".to_vec()), tuple).prop_map(|(tag, old)| [b"D\0\0\0\x07", &[tag][..], &old].concat());
        let column = ("[^\0]{0,12}", any::<u64>()).prop_map(|(name, rest)| [b"\x01", name.as_bytes(), b"\0", &rest.to_be_bytes()].concat());
        let relation = ("[^\0]{0,8}", "[^\0]{0,8}", prop::collection::vec(column, 0..8)).prop_map(|(schema, table, columns)| {
            let count = u16::try_from(columns.len()).expect("few").to_be_bytes();
            [b"R\0\0\0\x07", schema.as_bytes(), b"\0", table.as_bytes(), b"\0f", &count, &columns.concat()].concat()
        });
        let truncate = prop::collection::vec(any::<u32>(), 0..8).prop_map(|relations| {
            let count = u32::try_from(relations.len()).expect("few").to_be_bytes();
            [b"T", &count[..], b"\0", &relations.iter().flat_map(|it| it.to_be_bytes()).collect::<Vec<u8>>()].concat()
        });
        prop_oneof![insert, update, delete, relation, truncate]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn garbage_never_panics_and_takes_no_more_memory_than_it_came_in(
            tag in prop::sample::select(b"IUDRTYOBCMx".to_vec()),
            rest in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let bytes = [&[tag][..], &rest].concat();
            let (allocated, readable) = read(&bytes);
            prop_assert!(allocated <= bytes.len() && readable <= bytes.len());
        }

        #[test]
        fn what_a_server_writes_is_read_and_what_is_left_of_it_after_an_accident_is_an_error_or_a_message(
            message in message(),
            damages in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in any::<prop::sample::Index>(),
        ) {
            prop_assert!(decode(&message).is_ok());
            prop_assert!(decode(&message[..cut.index(message.len())]).is_err());
            let mut damaged = message.clone();
            for (at, byte) in damages {
                let at = at.index(damaged.len());
                damaged[at] = byte;
            }
            let (allocated, readable) = read(&damaged);
            prop_assert!(allocated <= damaged.len() && readable <= damaged.len());
        }
    }
}
