//! One page of a listing: a walk over the keys in order that jumps over what a delimiter folds together (pure but for the walk).

use redb::ReadableTable;

use super::index::{self, Broken, Object};

/// What a page is asked for. Keys are compared as bytes, which is the order of UTF-8.
#[derive(Debug, Clone, Default)]
pub(super) struct Question<'a> {
    pub(super) prefix: &'a str,
    pub(super) delimiter: Option<&'a str>,
    /// The last item the asker has seen: a key, or a common prefix.
    pub(super) after: &'a str,
    pub(super) limit: usize,
}

#[derive(Debug, Default)]
pub(super) struct Page {
    pub(super) objects: Vec<(String, Object)>,
    pub(super) prefixes: Vec<String>,
    /// The last item of this page, if there are more behind it.
    pub(super) more_after: Option<String>,
}

/// Reads one page of `bucket`. Costs what it returns, not what lies in the bucket.
pub(super) fn page(table: &impl ReadableTable<(&'static str, &'static [u8]), &'static [u8]>, bucket: &str, question: &Question<'_>) -> Result<Page, Broken> {
    let mut page = Page::default();
    if question.limit == 0 {
        return Ok(page);
    }
    let mut last = String::new();
    let mut from = start(question);
    loop {
        let mut jump = None;
        for row in table.range((bucket, from.as_slice())..)? {
            let (row_key, value) = row?;
            let (row_bucket, key) = row_key.value();
            if row_bucket != bucket || !key.starts_with(question.prefix.as_bytes()) {
                break;
            }
            let Ok(key) = std::str::from_utf8(key) else { continue };
            let folded = fold(key, question);
            if folded.is_some_and(|it| it == question.after) {
                jump = folded.and_then(|it| behind(it.as_bytes()));
                break;
            }
            if page.objects.len() + page.prefixes.len() == question.limit {
                page.more_after = Some(last);
                return Ok(page);
            }
            last = folded.unwrap_or(key).to_owned();
            if let Some(folded) = folded {
                page.prefixes.push(folded.to_owned());
                jump = behind(folded.as_bytes());
                break;
            }
            page.objects.push((key.to_owned(), index::decode("objects", value.value())?));
        }
        match jump {
            Some(next) => from = next,
            None => return Ok(page),
        }
    }
}

/// The first key that may be on the page.
fn start(question: &Question<'_>) -> Vec<u8> {
    let after = question.after.as_bytes();
    if after.is_empty() || after < question.prefix.as_bytes() {
        return question.prefix.as_bytes().to_vec();
    }
    // The smallest key above `after`.
    let mut from = after.to_vec();
    from.push(0);
    from
}

/// The common prefix that stands for this key, if a delimiter follows the prefix in it.
fn fold<'k>(key: &'k str, question: &Question<'_>) -> Option<&'k str> {
    let delimiter = question.delimiter.filter(|it| !it.is_empty())?;
    let rest = &key[question.prefix.len()..];
    rest.find(delimiter).map(|place| &key[..question.prefix.len() + place + delimiter.len()])
}

/// The smallest bytes above everything that begins with `prefix`; None where there are none.
fn behind(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut next = prefix.to_vec();
    while let Some(last) = next.pop() {
        if last < u8::MAX {
            next.push(last + 1);
            return Some(next);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use redb::{Database, ReadableDatabase as _, backends::InMemoryBackend};

    use super::{super::index::OBJECTS, *};

    fn bucket_of(keys: &BTreeSet<String>) -> Database {
        let database = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        let writing = database.begin_write().unwrap();
        {
            let mut table = writing.open_table(OBJECTS).unwrap();
            let row = index::encode(&Object::default());
            for key in keys {
                table.insert(("b", key.as_bytes()), row.as_slice()).unwrap();
            }
            table.insert(("a", &b"x"[..]), row.as_slice()).unwrap();
            table.insert(("c", &b"x"[..]), row.as_slice()).unwrap();
        }
        writing.commit().unwrap();
        database
    }

    /// What the definition says, without any cleverness.
    fn all_items(keys: &BTreeSet<String>, prefix: &str, delimiter: Option<&str>, after: &str) -> Vec<String> {
        let question = Question { prefix, delimiter, ..Question::default() };
        let items: BTreeSet<String> = keys
            .iter()
            .filter(|key| key.starts_with(prefix) && key.as_str() > after)
            .map(|key| fold(key, &question).unwrap_or(key).to_owned())
            .filter(|item| item != after)
            .collect();
        items.into_iter().collect()
    }

    proptest! {
        #[test]
        fn pages_together_are_the_whole_listing(
            keys in proptest::collection::btree_set("[ab/é]{1,5}", 0..40),
            prefix in "[ab/]{0,2}", after in "[ab/]{0,3}", with_delimiter in any::<bool>(), limit in 1_usize..7,
        ) {
            let database = bucket_of(&keys);
            let reading = database.begin_read().unwrap();
            let table = reading.open_table(OBJECTS).unwrap();
            let delimiter = with_delimiter.then_some("/");
            let (mut items, mut position) = (Vec::new(), after.clone());
            loop {
                let page = page(&table, "b", &Question { prefix: &prefix, delimiter, after: &position, limit }).unwrap();
                let mut both: Vec<String> = page.objects.into_iter().map(|it| it.0).chain(page.prefixes).collect();
                both.sort();
                prop_assert!(both.len() <= limit);
                items.extend(both);
                match page.more_after {
                    Some(last) => position = last,
                    None => break,
                }
            }
            prop_assert_eq!(items, all_items(&keys, &prefix, delimiter, &after));
        }
    }
}
