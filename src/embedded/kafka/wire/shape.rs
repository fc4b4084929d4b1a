//! The shapes of the requests we serve, walked before the codec reads them (pure).
//!
//! The codec reserves memory for as many elements as an array says it has. A broken or hostile client that says two
//! billion would end the whole process, so every length is checked here first against the bytes that are really there.
//!
//! A shape is a line of: a digit (so many bytes), `s` (a string), `b` (bytes), `[…]` (an array of structs),
//! `<…>` (an array of plain values), `(n+ …)` and `(n- …)` (fields from or up to a version).

/// Elements of all arrays of one request together; the largest honest requests have some hundreds.
const ELEMENTS_MAX: usize = 100_000;

/// Whether `body` has this shape, in the encoding of that version.
pub(super) fn fits(shape: &str, body: &[u8], version: i16, flexible: bool) -> bool {
    let mut walk = Walk { rest: body, version, flexible, elements: 0 };
    walk.a_struct(shape.as_bytes()).is_some()
}

struct Walk<'a> {
    rest: &'a [u8],
    version: i16,
    flexible: bool,
    elements: usize,
}

impl Walk<'_> {
    fn a_struct(&mut self, shape: &[u8]) -> Option<()> {
        self.fields(shape)?;
        if self.flexible {
            for _ in 0..self.varint()? {
                self.varint()?;
                let length = self.varint()?;
                self.skip(length)?;
            }
        }
        Some(())
    }

    fn fields(&mut self, mut shape: &[u8]) -> Option<()> {
        while let Some((kind, rest)) = shape.split_first() {
            shape = rest;
            match kind {
                b' ' => {}
                b'1'..=b'9' => self.skip(usize::from(kind - b'0'))?,
                b's' => self.a_string()?,
                b'b' => self.some_bytes()?,
                b'[' | b'<' => {
                    let (inner, after) = enclosed(shape)?;
                    self.an_array(inner, *kind == b'[')?;
                    shape = after;
                }
                b'(' => {
                    let (inner, after) = enclosed(shape)?;
                    let bound = i16::from(inner.first()? - b'0');
                    let holds = if *inner.get(1)? == b'+' { self.version >= bound } else { self.version <= bound };
                    if holds {
                        self.fields(inner.get(2..)?)?;
                    }
                    shape = after;
                }
                _ => return None,
            }
        }
        Some(())
    }

    fn an_array(&mut self, shape: &[u8], of_structs: bool) -> Option<()> {
        let length = if self.flexible { self.varint()?.saturating_sub(1) } else { self.length_of_four()? };
        self.elements = self.elements.checked_add(length).filter(|it| *it <= ELEMENTS_MAX)?;
        for _ in 0..length {
            if of_structs { self.a_struct(shape)? } else { self.fields(shape)? }
        }
        Some(())
    }

    fn a_string(&mut self) -> Option<()> {
        let length = if self.flexible { self.varint()?.saturating_sub(1) } else { usize::try_from(i16::from_be_bytes(self.take()?).max(0)).ok()? };
        self.skip(length)
    }

    fn some_bytes(&mut self) -> Option<()> {
        let length = if self.flexible { self.varint()?.saturating_sub(1) } else { self.length_of_four()? };
        self.skip(length)
    }

    /// -1 stands for null, which takes no room.
    fn length_of_four(&mut self) -> Option<usize> {
        usize::try_from(i32::from_be_bytes(self.take()?).max(0)).ok()
    }

    fn varint(&mut self) -> Option<usize> {
        let mut value = 0_usize;
        for shift in (0..35).step_by(7) {
            let [byte] = self.take()?;
            value |= usize::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(*taken)
    }

    fn skip(&mut self, length: usize) -> Option<()> {
        self.rest = self.rest.get(length..)?;
        Some(())
    }
}

/// What stands up to the bracket that closes, and what comes after it.
fn enclosed(shape: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut depth = 1;
    for (at, byte) in shape.iter().enumerate() {
        match byte {
            b'[' | b'<' | b'(' => depth += 1,
            b']' | b'>' | b')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some((&shape[..at], &shape[at + 1..]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_that_promises_more_than_there_is_does_not_fit() {
        let metadata = "[s] (4+ 1)";
        assert!(fits(metadata, &[0, 0, 0, 1, 0, 1, b'a', 1], 4, false));
        assert!(fits(metadata, &[255, 255, 255, 255, 1], 4, false));
        assert!(!fits(metadata, &[0x7F, 255, 255, 255, 0, 1, b'a', 1], 4, false));
        assert!(!fits(metadata, &[0, 0, 0, 1, 0, 9, b'a', 1], 4, false));
        assert!(!fits("<s>", &[0xFF, 0xFF, 0xFF, 0xFF, 0x0F], 9, true));
    }

    #[test]
    fn every_prefix_of_a_request_is_refused() {
        let join = "s 4 (1+ 4) s (5+ s) s [s b]";
        let body = [2, b'g', 0, 0, 0, 1, 0, 0, 0, 2, 1, 0, 2, b'c', 2, 2, b'r', 3, 7, 7, 0, 0];
        assert!(fits(join, &body, 6, true));
        for end in 0..body.len() {
            assert!(!fits(join, &body[..end], 6, true), "cut at {end}");
        }
    }
}
