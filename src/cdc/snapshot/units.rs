//! What one reader takes at a time: a table, or a range of a large one's blocks.
//!
//! Ranges are of block numbers (`ctid`), not of keys. PostgreSQL reads such a range as it would read that part of the table, one block
//! after another, which needs neither a key nor an index nor a knowledge of how the values are spread; ranges of a key cost a probe of
//! its index for each row, and are as uneven as the key. The last range is open: whatever the table's size was when it was asked for, no
//! block lies outside. A row that the snapshot sees lies in one block only, and stays there while the table is locked against rewriting.
//!
//! A partitioned table is read by itself, the range being the blocks of so many numbers in each partition: so the rights and policies
//! that count are its own, as they are for whoever reads it whole.

use std::fmt::Write as _;

use sqlx::PgConnection;

use crate::{
    cdc::{catalog, envelope::Table, error::Error, source::quoted},
    change::TableId,
};

/// Bytes of a table that are one unit, with what is stored beside it (TOAST): a fraction of a second of reading, so that readers end
/// together, and yet thousands of rows for each statement.
const UNIT_BYTES: u64 = 16 * 1024 * 1024;

/// Blocks from a number on, up to but without another.
pub(super) type Blocks = (u64, Option<u64>);

#[derive(Debug, Clone, Copy)]
pub(super) struct Unit {
    /// Its place among the tables.
    pub(super) table: usize,
    /// None: the whole table.
    pub(super) blocks: Option<Blocks>,
}

/// How much there is of a table.
#[derive(Debug, Default)]
pub(super) struct Size {
    /// Blocks of the table, or of each of its partitions. Empty where not all of it lies in blocks: foreign tables, other storage.
    blocks: Vec<u64>,
    bytes: u64,
}

/// What the server knows of a table's size.
pub(super) async fn size_of(connection: &mut PgConnection, table: &TableId) -> Result<Size, Error> {
    // pg_class is as the snapshot sees it, and pg_relation_filenode as it is now.
    const SIZES: &str = "select leaf.relkind = 'r' and coalesce(am.amname = 'heap', false),
            coalesce(pg_relation_size(leaf.oid), 0) / current_setting('block_size')::bigint, coalesce(pg_table_size(leaf.oid), 0),
            coalesce(pg_relation_filenode(leaf.oid), 0) <> leaf.relfilenode
        from pg_class c left join lateral pg_partition_tree(c.oid) tree on c.relkind = 'p'
            join pg_class leaf on leaf.oid = coalesce(tree.relid, c.oid) and leaf.relkind <> 'p'
            left join pg_am am on am.oid = leaf.relam
        where c.oid = $1::regclass";
    let sizes: Vec<(bool, i64, i64, bool)> = sqlx::query_as(SIZES)
        .bind(catalog::full_name(table))
        .fetch_all(connection)
        .await
        .map_err(|source| Error::Sql { what: "ask for the size of a table", source })?;
    // ALTER TABLE and TRUNCATE leave nothing that an older snapshot could see: it would read an empty table, and nobody would know.
    if sizes.iter().any(|it| it.3) {
        return Err(Error::Rewritten { table: table.to_string() });
    }
    let number = |it: i64| u64::try_from(it).unwrap_or(0);
    Ok(Size {
        blocks: if sizes.iter().all(|it| it.0) { sizes.iter().map(|it| number(it.1)).collect() } else { Vec::new() },
        bytes: sizes.iter().map(|it| number(it.2)).sum(),
    })
}

/// The units of a table, where several readers share the work.
pub(super) fn of(table: usize, size: &Size) -> Vec<Unit> {
    let all: u64 = size.blocks.iter().sum();
    if all == 0 || size.bytes <= UNIT_BYTES {
        return vec![Unit { table, blocks: None }];
    }
    // 128 bits: bytes times blocks may be more than 64 hold.
    let wanted = u128::from(UNIT_BYTES) * u128::from(all) / u128::from(size.bytes);
    let wanted = u64::try_from(wanted).unwrap_or(u64::MAX).max(1);
    ranges(&size.blocks, wanted).into_iter().map(|blocks| Unit { table, blocks: Some(blocks) }).collect()
}

/// Ranges of about `wanted` blocks over all parts together.
fn ranges(parts: &[u64], wanted: u64) -> Vec<Blocks> {
    let mut ranges = Vec::new();
    let mut from = 0;
    loop {
        let left: Vec<u64> = parts.iter().filter(|it| **it > from).map(|it| it - from).collect();
        if left.iter().sum::<u64>() <= wanted {
            ranges.push((from, None));
            return ranges;
        }
        let step = (wanted / u64::try_from(left.len()).unwrap_or(u64::MAX)).max(1);
        ranges.push((from, Some(from + step)));
        from += step;
    }
}

/// The COPY of a unit; `rows` is what the table's rows are selected from.
pub(super) fn statement(table: &Table, rows: &str, blocks: Option<Blocks>) -> String {
    let columns: Vec<String> = table.column_names().map(quoted).collect();
    let mut statement = format!("copy (select {} from {rows}", columns.join(", "));
    if let Some((from, to)) = blocks {
        let _ = write!(statement, " where ctid >= '({from},0)'");
        if let Some(to) = to {
            let _ = write!(statement, " and ctid < '({to},0)'");
        }
    }
    statement + ") to stdout"
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn small_tables_are_one_unit_and_large_ones_ranges_of_blocks() {
        let units = |blocks: &[u64], bytes| of(3, &Size { blocks: blocks.to_vec(), bytes });
        let blocks = |units: Vec<Unit>| units.into_iter().map(|it| it.blocks).collect::<Vec<_>>();
        assert_eq!(blocks(units(&[2048], UNIT_BYTES)), [None]);
        assert_eq!(blocks(units(&[], u64::MAX)), [None], "not in blocks");
        assert_eq!(blocks(units(&[4096], 2 * UNIT_BYTES)), [Some((0, Some(2048))), Some((2048, None))]);
        // What lies beside it makes a few blocks much.
        assert_eq!(blocks(units(&[4], 2 * UNIT_BYTES)), [Some((0, Some(2))), Some((2, None))]);
        assert_eq!(units(&[1, 1], 1)[0].table, 3);
    }

    proptest! {
        #[test]
        fn no_block_is_outside_or_in_two_ranges(parts in prop::collection::vec(0..5_000_u64, 1..6), wanted in 1..2_000_u64) {
            let ranges = ranges(&parts, wanted);
            prop_assert_eq!(ranges.first().map(|it| it.0), Some(0));
            prop_assert!(ranges.windows(2).all(|it| it[0].1 == Some(it[1].0) && it[0].0 < it[1].0));
            prop_assert_eq!(ranges.last().map(|it| it.1), Some(None));
            let within = |(from, to): &Blocks| parts.iter().map(|part| (*part).min(to.unwrap_or(u64::MAX)).saturating_sub(*from)).sum::<u64>();
            let parts_max = wanted.max(u64::try_from(parts.len()).unwrap_or(0));
            prop_assert!(ranges.iter().all(|it| within(it) <= parts_max));
        }
    }
}
