//! A row that cannot become an event, as JSON: with all that is needed to see what it was. Pure.

use super::{error::Poison, json};
use crate::{
    change::{Lsn, TableId},
    fault::chain,
};

/// What a message of the stream did.
pub(super) fn op_of(data: &[u8]) -> &'static str {
    match data.first() {
        Some(b'I') => "c",
        Some(b'U') => "u",
        _ => "d",
    }
}

/// Writes the dead letter of `data` (a message of the stream, or a line of COPY), which stood at `lsn`.
pub(super) fn write(out: &mut Vec<u8>, poison: &Poison, table: Option<&TableId>, op: &str, data: &[u8], xid: Option<u32>, lsn: Lsn) {
    out.clear();
    out.extend_from_slice(b"{\"reason\":");
    json::string(out, &chain(poison));
    match table {
        Some(table) => {
            out.extend_from_slice(b",\"schema\":");
            json::string(out, &table.schema);
            out.extend_from_slice(b",\"table\":");
            json::string(out, &table.table);
        }
        None => out.extend_from_slice(b",\"schema\":null,\"table\":null"),
    }
    out.extend_from_slice(b",\"op\":");
    json::string(out, op);
    out.extend_from_slice(b",\"txId\":");
    match xid {
        Some(xid) => json::integer(out, xid),
        None => out.extend_from_slice(b"null"),
    }
    out.extend_from_slice(b",\"lsn\":");
    json::integer(out, lsn.0);
    out.extend_from_slice(b",\"bytes\":");
    json::base64(out, data.iter().copied());
    out.push(b'}');
}
