//! PostgreSQL's text of pgvector's types → Debezium's JSON of them. Pure.

use std::str::FromStr;

use super::{json, values::NotA};

/// `[1,2.5]`, each written as a number of that size.
pub(super) fn write<N: FromStr>(out: &mut Vec<u8>, text: &str, number: impl Fn(&mut Vec<u8>, N)) -> Result<(), NotA> {
    let numbers = text.strip_prefix('[').and_then(|it| it.strip_suffix(']')).ok_or(NotA("a vector"))?;
    for (place, text) in numbers.split(',').enumerate() {
        out.push(if place == 0 { b'[' } else { b',' });
        number(out, text.parse().map_err(|_| NotA("a vector"))?);
    }
    out.push(b']');
    Ok(())
}

/// `{1:1.5,3:2}/5`: places from 1, and how many there are.
pub(super) fn write_sparse(out: &mut Vec<u8>, text: &str) -> Result<(), NotA> {
    const NOT: NotA = NotA("a sparse vector");
    let (numbers, dimensions) = text.strip_prefix('{').and_then(|it| it.split_once("}/")).ok_or(NOT)?;
    out.extend_from_slice(b"{\"dimensions\":");
    json::integer(out, dimensions.parse::<u32>().map_err(|_| NOT)?);
    out.extend_from_slice(b",\"vector\":[");
    for (at, number) in numbers.split(',').filter(|it| !it.is_empty()).enumerate() {
        let (place, number) = number.split_once(':').ok_or(NOT)?;
        out.extend_from_slice(if at == 0 { b"[" } else { b",[" });
        json::integer(out, place.parse::<u32>().map_err(|_| NOT)?);
        out.push(b',');
        json::double(out, number.parse().map_err(|_| NOT)?);
        out.push(b']');
    }
    out.extend_from_slice(b"]}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_arrays_and_sparse_ones_tell_their_places() {
        let shown = |write: &dyn Fn(&mut Vec<u8>) -> Result<(), NotA>| {
            let mut out = Vec::new();
            write(&mut out).map(|()| String::from_utf8(out).expect("JSON is UTF-8"))
        };
        assert_eq!(shown(&|out| write(out, "[1,2.5,1e-20]", json::double)).as_deref(), Ok("[1.0,2.5,1.0E-20]"));
        assert_eq!(shown(&|out| write(out, "[0.099975586,65504]", json::float)).as_deref(), Ok("[0.099975586,65504.0]"));
        assert_eq!(shown(&|out| write_sparse(out, "{1:1.5,3:-2}/5")).as_deref(), Ok("{\"dimensions\":5,\"vector\":[[1,1.5],[3,-2.0]]}"));
        assert_eq!(shown(&|out| write_sparse(out, "{}/3")).as_deref(), Ok("{\"dimensions\":3,\"vector\":[]}"));
        for text in ["1,2", "[1,a]", "[]"] {
            assert!(shown(&|out| write(out, text, json::double)).is_err(), "{text}");
        }
        for text in ["{1:2}", "{1}/2", "{a:1}/2", "[1]"] {
            assert!(shown(&|out| write_sparse(out, text)).is_err(), "{text}");
        }
    }
}
