//! Records that are no text. Their bytes go to the dead-letter topic; the object whose range they belong to says in its footer
//! which they were, so that whoever counts what has arrived can count them too.

use parquet::file::metadata::KeyValue;
use serde::{Deserialize, Serialize};

/// A record on its way to the dead-letter topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    pub offset: i64,
    pub timestamp_ms: i64,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub reason: &'static str,
}

/// What an object says of a record of its range that it does not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dead {
    pub offset: i64,
    pub reason: String,
    #[serde(flatten)]
    pub identity: Identity,
}

/// What a record that cannot be taken still says about itself: enough to count it as arrived. All unknown where it is not even
/// JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Identity {
    pub tx_id: Option<i64>,
    pub lsn: Option<i64>,
    pub op: Option<String>,
    pub key: Option<String>,
}

impl Identity {
    /// Bytes that are no text stand for themselves in strings, where they do no harm; elsewhere they make it no JSON.
    pub fn of(value: &[u8]) -> Self {
        // What cannot be text in a database is exactly what may have been refused.
        let text = |value: &serde_json::Value| match value {
            serde_json::Value::String(text) => Some(text.replace('\0', "")),
            serde_json::Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        let Ok(envelope) = serde_json::from_str::<serde_json::Value>(&String::from_utf8_lossy(value)) else { return Self::default() };
        let op = text(&envelope["op"]);
        let image = if op.as_deref() == Some("d") { "before" } else { "after" };
        Self { tx_id: envelope["source"]["txId"].as_i64(), lsn: envelope["source"]["lsn"].as_i64(), key: text(&envelope[image]["id"]), op }
    }
}

/// The footer's entry.
const FOOTER: &str = "ledgerline.dead_letters";

impl Dead {
    pub(super) fn of(letter: &DeadLetter) -> Self {
        let identity = letter.value.as_deref().map(Identity::of).unwrap_or_default();
        Self { offset: letter.offset, reason: letter.reason.to_owned(), identity }
    }

    pub(super) fn footer(letters: &[DeadLetter]) -> KeyValue {
        let dead: Vec<Self> = letters.iter().map(Self::of).collect();
        KeyValue::new(FOOTER.to_owned(), serde_json::to_string(&dead).expect("plain values always serialise"))
    }

    /// Those of an object; none where its footer names none.
    pub(super) fn read(footer: Option<&Vec<KeyValue>>) -> Result<Vec<Self>, serde_json::Error> {
        let entry = footer.into_iter().flatten().find(|it| it.key == FOOTER).and_then(|it| it.value.as_deref());
        entry.map_or_else(|| Ok(Vec::new()), serde_json::from_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_record_says_what_it_can() {
        let delete = Identity::of(br#"{"op":"d","before":{"id":7},"after":null,"source":{"txId":5,"lsn":9}}"#);
        assert_eq!(delete, Identity { tx_id: Some(5), lsn: Some(9), op: Some("d".to_owned()), key: Some("7".to_owned()) });
        assert_eq!(Identity::of(b"{]"), Identity::default());
        let latin = Identity::of(b"{\"op\":\"c\",\"after\":{\"id\":8,\"name\":\"Ru\xDF\"},\"source\":{\"txId\":6,\"lsn\":10}}");
        assert_eq!((latin.tx_id, latin.key.as_deref()), (Some(6), Some("8")));
        assert_eq!(Identity::of(b"\xDF"), Identity::default());
    }
}
