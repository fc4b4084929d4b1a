//! One record of the dead-letter topic → what is known about it (pure).

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::{
    change::{Lsn, TableId, Topics},
    lake::Identity,
    stream::range::Kept,
};

/// A letter, and who wrote it.
#[derive(Debug, Clone, PartialEq)]
pub struct Letter {
    pub partition: i32,
    pub offset: i64,
    pub at: Option<DateTime<Utc>>,
    pub reason: String,
    pub origin: Origin,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Origin {
    /// A row that could not become an event.
    Capture { table: Option<TableId>, op: String, tx_id: Option<u32>, lsn: Lsn, bytes: Vec<u8> },
    /// A record that the lake could not take, with its place in the stream.
    Sink { topic: String, partition: i32, offset: i64, at: Option<DateTime<Utc>>, key: Option<Bytes>, value: Option<Bytes> },
    /// Neither: somebody else writes into the topic.
    Foreign { bytes: Bytes },
}

/// Which letters are wanted; all that is None wants all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// As the lake names it (`customers`), or with its schema.
    pub table: Option<String>,
    pub topic: Option<String>,
}

/// A letter as it is printed. Without `revealed` nothing in it is a customer's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shown {
    pub partition: i32,
    pub offset: i64,
    pub at: Option<DateTime<Utc>>,
    /// `capture`, `sink` or `foreign`.
    pub written_by: &'static str,
    pub reason: String,
    pub table: Option<String>,
    pub topic: Option<String>,
    /// Where the record lay; null for a letter of the capture.
    pub source_partition: Option<i32>,
    pub source_offset: Option<i64>,
    pub source_at: Option<DateTime<Utc>>,
    pub op: Option<String>,
    pub tx_id: Option<i64>,
    pub lsn: Option<i64>,
    /// The primary key, where the record still says it.
    pub key: Option<String>,
    pub key_bytes: u64,
    pub value_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revealed: Option<Revealed>,
}

/// The bytes themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Revealed {
    pub key: Option<Content>,
    pub value: Option<Content>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Content {
    pub hex: String,
    /// What is no text is shown by the replacement character.
    pub utf8: String,
    /// Whether the text is the bytes exactly.
    pub is_utf8: bool,
}

/// As the capture writes it.
#[derive(Deserialize)]
struct ByCapture {
    reason: String,
    schema: Option<String>,
    table: Option<String>,
    op: String,
    #[serde(rename = "txId")]
    tx_id: Option<u32>,
    lsn: u64,
    bytes: String,
}

impl Letter {
    pub fn read(record: &Kept) -> Self {
        let (reason, origin) = by_sink(record).or_else(|| by_capture(record)).unwrap_or_else(|| {
            let bytes = record.value.clone().unwrap_or_default();
            ("written by neither capture nor sink".to_owned(), Origin::Foreign { bytes })
        });
        Self { partition: record.partition, offset: record.offset, at: record.timestamp_ms.and_then(DateTime::from_timestamp_millis), reason, origin }
    }

    /// `capture`, `sink` or `foreign`.
    pub fn written_by(&self) -> &'static str {
        match self.origin {
            Origin::Capture { .. } => "capture",
            Origin::Sink { .. } => "sink",
            Origin::Foreign { .. } => "foreign",
        }
    }

    /// The topic the record lay in, or would have.
    pub fn topic(&self, topics: &Topics) -> Option<String> {
        match &self.origin {
            Origin::Capture { table, .. } => table.as_ref().map(|it| topics.table(it)),
            Origin::Sink { topic, .. } => Some(topic.clone()),
            Origin::Foreign { .. } => None,
        }
    }

    pub fn is_wanted(&self, filter: &Filter, topics: &Topics) -> bool {
        let topic = self.topic(topics);
        let table = topic.as_deref().and_then(|it| topics.lake_name(it));
        let is_table = |wanted: &String| table.as_deref().is_some_and(|it| it == wanted || wanted.strip_prefix("public.") == Some(it));
        filter.table.as_ref().is_none_or(is_table) && filter.topic.as_ref().is_none_or(|wanted| topic.as_ref() == Some(wanted))
    }

    /// What is printed. `reveal` adds the bytes, which may hold a customer's data.
    pub fn shown(&self, topics: &Topics, reveal: bool) -> Shown {
        let topic = self.topic(topics);
        let mut shown = Shown {
            partition: self.partition,
            offset: self.offset,
            at: self.at,
            written_by: self.written_by(),
            reason: self.reason.clone(),
            table: topic.as_deref().and_then(|it| topics.lake_name(it)),
            topic,
            source_partition: None,
            source_offset: None,
            source_at: None,
            op: None,
            tx_id: None,
            lsn: None,
            key: None,
            key_bytes: 0,
            value_bytes: 0,
            revealed: None,
        };
        let (key, value) = match &self.origin {
            Origin::Capture { op, tx_id, lsn, bytes, .. } => {
                shown.op = Some(op.clone());
                shown.tx_id = tx_id.map(i64::from);
                shown.lsn = i64::try_from(lsn.0).ok();
                (None, Some(bytes.as_slice()))
            }
            Origin::Sink { partition, offset, at, key, value, .. } => {
                let identity = value.as_deref().map(Identity::of).unwrap_or_default();
                (shown.source_partition, shown.source_offset, shown.source_at) = (Some(*partition), Some(*offset), *at);
                (shown.op, shown.tx_id, shown.lsn, shown.key) = (identity.op, identity.tx_id, identity.lsn, identity.key);
                (key.as_deref(), value.as_deref())
            }
            Origin::Foreign { bytes } => (None, Some(bytes.as_ref())),
        };
        shown.key_bytes = key.map_or(0, |it| it.len() as u64);
        shown.value_bytes = value.map_or(0, |it| it.len() as u64);
        shown.revealed = reveal.then(|| Revealed { key: key.map(Content::of), value: value.map(Content::of) });
        shown
    }
}

impl Content {
    fn of(bytes: &[u8]) -> Self {
        Self { hex: hex::encode(bytes), utf8: String::from_utf8_lossy(bytes).into_owned(), is_utf8: std::str::from_utf8(bytes).is_ok() }
    }
}

fn by_sink(record: &Kept) -> Option<(String, Origin)> {
    let text = |name: &str| record.headers.iter().find(|(key, _)| key == name).and_then(|(_, value)| std::str::from_utf8(value).ok());
    let origin = Origin::Sink {
        topic: text("topic")?.to_owned(),
        partition: text("partition")?.parse().ok()?,
        offset: text("offset")?.parse().ok()?,
        at: text("timestamp_ms").and_then(|it| it.parse().ok()).and_then(DateTime::from_timestamp_millis),
        key: record.key.clone(),
        value: record.value.clone(),
    };
    Some((text("reason")?.to_owned(), origin))
}

fn by_capture(record: &Kept) -> Option<(String, Origin)> {
    let letter: ByCapture = serde_json::from_slice(record.value.as_deref()?).ok()?;
    let table = letter.schema.zip(letter.table).map(|(schema, table)| TableId { schema, table });
    let bytes = from_base64(&letter.bytes)?;
    Some((letter.reason, Origin::Capture { table, op: letter.op, tx_id: letter.tx_id, lsn: Lsn(letter.lsn), bytes }))
}

/// The standard alphabet, with padding, as the capture writes it.
fn from_base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=');
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    let (mut held, mut n_bits) = (0_u32, 0);
    for digit in digits.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        held = (held << 6 | u32::from(value)) & 0xFF_FFFF;
        n_bits += 6;
        if n_bits >= 8 {
            n_bits -= 8;
            bytes.push(u8::try_from(held >> n_bits & 0xFF).ok()?);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topics() -> Topics {
        Topics::new("bank")
    }

    fn record(headers: &[(&str, &str)], key: Option<&[u8]>, value: Option<&[u8]>) -> Kept {
        let bytes = |it: &[u8]| Bytes::copy_from_slice(it);
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), bytes(value.as_bytes()))).collect();
        Kept { partition: 0, offset: 7, timestamp_ms: Some(1_800_000_000_000), key: key.map(bytes), value: value.map(bytes), headers }
    }

    const HEADERS: [(&str, &str); 5] =
        [("reason", "the value is not UTF-8"), ("topic", "bank.public.customers"), ("partition", "2"), ("offset", "41"), ("timestamp_ms", "1799999999000")];

    #[test]
    fn a_letter_of_the_sink_says_whose_it_was_and_hides_the_customer() {
        let value = b"{\"op\":\"c\",\"after\":{\"id\":8,\"last_name\":\"Ru\xDF\"},\"source\":{\"txId\":6,\"lsn\":10}}";
        let letter = Letter::read(&record(&HEADERS, Some(b"{\"id\":8}"), Some(value)));
        let shown = letter.shown(&topics(), false);
        assert_eq!((shown.written_by, shown.table.as_deref(), shown.topic.as_deref()), ("sink", Some("customers"), Some("bank.public.customers")));
        assert_eq!((shown.source_partition, shown.source_offset, shown.key_bytes, shown.value_bytes), (Some(2), Some(41), 8, value.len() as u64));
        assert_eq!((shown.op.as_deref(), shown.tx_id, shown.lsn, shown.key.as_deref()), (Some("c"), Some(6), Some(10), Some("8")));
        assert!(!serde_json::to_string(&shown).unwrap().contains("Ru"), "{shown:?}");
        let revealed = letter.shown(&topics(), true).revealed.unwrap().value.unwrap();
        assert!(revealed.utf8.contains("Ru\u{FFFD}") && !revealed.is_utf8 && revealed.hex.contains("5275df"), "{revealed:?}");
    }

    #[test]
    fn a_letter_of_the_capture_says_where_it_stood() {
        let json = br#"{"reason":"column x: not a number","schema":"public","table":"accounts","op":"u","txId":99,"lsn":4660,"bytes":"VQAB/w=="}"#;
        let letter = Letter::read(&record(&[], None, Some(json)));
        let Origin::Capture { bytes, .. } = &letter.origin else { panic!("{letter:?}") };
        assert_eq!(bytes, &[b'U', 0, 1, 0xFF]);
        let shown = letter.shown(&topics(), false);
        assert_eq!(
            (shown.written_by, shown.table.as_deref(), shown.tx_id, shown.lsn, shown.value_bytes),
            ("capture", Some("accounts"), Some(99), Some(4660), 4)
        );
        assert_eq!(Letter::read(&record(&[], None, Some(b"hello"))).written_by(), "foreign");
    }

    #[test]
    fn letters_are_chosen_by_table_and_by_topic() {
        let letter = Letter::read(&record(&HEADERS, None, None));
        let wanted = |table: Option<&str>, topic: Option<&str>| {
            letter.is_wanted(&Filter { table: table.map(str::to_owned), topic: topic.map(str::to_owned) }, &topics())
        };
        assert!(wanted(None, None) && wanted(Some("customers"), None) && wanted(Some("public.customers"), Some("bank.public.customers")));
        assert!(!wanted(Some("accounts"), None) && !wanted(None, Some("bank.transaction")));
    }

    proptest::proptest! {
        #[test]
        fn what_the_capture_encodes_is_read_back(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..40)) {
            use std::fmt::Write as _;
            // By the definition: bits in a row, six a digit.
            let bits = bytes.iter().fold(String::new(), |mut bits, byte| { let _ = write!(bits, "{byte:08b}"); bits });
            let digits: Vec<char> = ('A'..='Z').chain('a'..='z').chain('0'..='9').chain(['+', '/']).collect();
            let groups: Vec<String> = bits.as_bytes().chunks(6).map(|it| format!("{:0<6}", String::from_utf8_lossy(it))).collect();
            let mut text: String = groups.iter().map(|it| digits[usize::from_str_radix(it, 2).unwrap()]).collect();
            while !text.len().is_multiple_of(4) { text.push('='); }
            proptest::prop_assert_eq!(from_base64(&text), Some(bytes));
        }
    }
}
