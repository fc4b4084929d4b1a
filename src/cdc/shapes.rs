//! PostgreSQL's text of geometric types → Debezium's structures: coordinates, and beside them the well-known binary form. Pure.

use super::{json, values::NotA};

/// How a shape is laid down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Point,
    Line,
    Segment,
    Box,
    Path,
    Polygon,
    Circle,
}

const LINE_STRING: u32 = 2;
const POLYGON: u32 = 3;

impl Shape {
    /// What stands for one that is not told, and must not be null.
    pub(super) fn write_absent(self, out: &mut Vec<u8>) {
        match self {
            Self::Point => point(out, 0.0, 0.0),
            Self::Line => out.extend_from_slice(b"{\"a\":0.0,\"b\":1.0,\"c\":0.0}"),
            Self::Circle => {
                out.extend_from_slice(b"{\"center\":");
                point(out, 0.0, 0.0);
                out.extend_from_slice(b",\"radius\":0.0}");
            }
            Self::Segment => geometry(out, LINE_STRING, &[0.0, 0.0, 1.0, 0.0], "\"lseg\""),
            Self::Path => geometry(out, LINE_STRING, &[0.0, 0.0, 1.0, 0.0], "\"path\""),
            Self::Box => geometry(out, POLYGON, &[0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0], "\"box\""),
            // Debezium's constant is three bytes out of step, and so no polygon.
            Self::Polygon => {
                out.extend_from_slice(
                    b"{\"wkb\":\"AQMAAAABAAAABAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAADwPwAAAAAAAAAAAAAAAAAAAAAAAAAAAADwPwAAAAAAAAAAAAAAAAAAAAA=\"",
                );
                out.extend_from_slice(b",\"srid\":null,\"extensions\":{\"type\":\"polygon\"}}");
            }
        }
    }

    pub(super) fn write(self, out: &mut Vec<u8>, text: &str) -> Result<(), NotA> {
        let numbers = numbers(text)?;
        match (self, numbers.as_slice()) {
            (Self::Point, [x, y]) => point(out, *x, *y),
            (Self::Line, [a, b, c]) => {
                for (head, number) in [(&b"{\"a\":"[..], a), (b",\"b\":", b), (b",\"c\":", c)] {
                    out.extend_from_slice(head);
                    json::double(out, *number);
                }
                out.push(b'}');
            }
            (Self::Segment, [_, _, _, _]) => geometry(out, LINE_STRING, &numbers, "\"lseg\""),
            // From its upper right corner down, around and back.
            (Self::Box, [x1, y1, x0, y0]) => geometry(out, POLYGON, &[*x1, *y1, *x1, *y0, *x0, *y0, *x0, *y1, *x1, *y1], "\"box\""),
            (Self::Path, [_, _, ..]) => {
                let closed = text.starts_with('(');
                geometry(out, LINE_STRING, &numbers, if closed { "\"path\",\"closed\":\"true\"" } else { "\"path\",\"closed\":\"false\"" });
            }
            (Self::Polygon, [x, y, ..]) => {
                let ring: Vec<f64> = numbers.iter().chain([x, y]).copied().collect();
                geometry(out, POLYGON, &ring, "\"polygon\"");
            }
            (Self::Circle, [x, y, radius]) => {
                out.extend_from_slice(b"{\"center\":");
                point(out, *x, *y);
                out.extend_from_slice(b",\"radius\":");
                json::double(out, *radius);
                out.push(b'}');
            }
            _ => return Err(NotA("a shape")),
        }
        Ok(())
    }
}

/// All numbers of a text, whatever brackets stand around them.
fn numbers(text: &str) -> Result<Vec<f64>, NotA> {
    let is_bracket = |it: char| matches!(it, '(' | ')' | '[' | ']' | '{' | '}' | '<' | '>');
    let numbers: Result<Vec<f64>, _> = text.split(',').map(|it| it.trim_matches(is_bracket).parse::<f64>()).collect();
    numbers.ok().filter(|it| it.len() % 2 == 0 || it.len() == 3).ok_or(NotA("a shape"))
}

fn point(out: &mut Vec<u8>, x: f64, y: f64) {
    out.extend_from_slice(b"{\"x\":");
    json::double(out, x);
    out.extend_from_slice(b",\"y\":");
    json::double(out, y);
    out.extend_from_slice(b",\"wkb\":");
    json::base64(out, [1, 1, 0, 0, 0].into_iter().chain(x.to_le_bytes()).chain(y.to_le_bytes()));
    out.extend_from_slice(b",\"srid\":null}");
}

/// Little-endian; a polygon is a list of rings, of which it has one.
fn geometry(out: &mut Vec<u8>, kind: u32, coordinates: &[f64], extensions: &str) {
    let n_points = u32::try_from(coordinates.len() / 2).unwrap_or(u32::MAX);
    let rings = (kind == POLYGON).then(|| 1_u32.to_le_bytes()).into_iter().flatten();
    let head = [1].into_iter().chain(kind.to_le_bytes()).chain(rings).chain(n_points.to_le_bytes());
    out.extend_from_slice(b"{\"wkb\":");
    json::base64(out, head.chain(coordinates.iter().flat_map(|it| it.to_le_bytes())));
    out.extend_from_slice(b",\"srid\":null,\"extensions\":{\"type\":");
    out.extend_from_slice(extensions.as_bytes());
    out.extend_from_slice(b"}}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_that_is_not_told_is_the_smallest() {
        let shown = |shape: Shape| {
            let mut out = Vec::new();
            shape.write_absent(&mut out);
            String::from_utf8(out).expect("JSON is UTF-8")
        };
        assert_eq!(shown(Shape::Point), "{\"x\":0.0,\"y\":0.0,\"wkb\":\"AQEAAAAAAAAAAAAAAAAAAAAAAAAA\",\"srid\":null}");
        assert_eq!(shown(Shape::Line), "{\"a\":0.0,\"b\":1.0,\"c\":0.0}");
        let segment = "{\"wkb\":\"AQIAAAACAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAPA/AAAAAAAAAAA=\",\"srid\":null,\"extensions\":{\"type\":\"lseg\"}}";
        assert_eq!(shown(Shape::Segment), segment);
        assert_eq!(shown(Shape::Path), segment.replace("lseg", "path"));
        assert_eq!(
            shown(Shape::Box),
            concat!(
                "{\"wkb\":\"AQMAAAABAAAABQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAPA/AAAAAAAA8D8AAAAAAADwPwAAAAAAAPA/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\",",
                "\"srid\":null,\"extensions\":{\"type\":\"box\"}}"
            )
        );
    }

    #[test]
    fn shapes_are_structures_with_their_well_known_binary_form() {
        let shown = |shape: Shape, text| {
            let mut out = Vec::new();
            shape.write(&mut out, text).expect("a shape");
            String::from_utf8(out).expect("JSON is UTF-8")
        };
        assert_eq!(shown(Shape::Point, "(1.5,2.5)"), "{\"x\":1.5,\"y\":2.5,\"wkb\":\"AQEAAAAAAAAAAAD4PwAAAAAAAARA\",\"srid\":null}");
        assert_eq!(shown(Shape::Line, "{1.5,-2,0}"), "{\"a\":1.5,\"b\":-2.0,\"c\":0.0}");
        assert_eq!(
            shown(Shape::Segment, "[(1.5,2),(3,4)]"),
            "{\"wkb\":\"AQIAAAACAAAAAAAAAAAA+D8AAAAAAAAAQAAAAAAAAAhAAAAAAAAAEEA=\",\"srid\":null,\"extensions\":{\"type\":\"lseg\"}}"
        );
        assert_eq!(
            shown(Shape::Box, "(1,1),(0,0)"),
            concat!(
                "{\"wkb\":\"AQMAAAABAAAABQAAAAAAAAAAAPA/AAAAAAAA8D8AAAAAAADwPwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA8D8AAAAAAADwPwAAAAAAAPA/\",",
                "\"srid\":null,\"extensions\":{\"type\":\"box\"}}"
            )
        );
        assert!(shown(Shape::Path, "[(0,0),(1,1),(2,0)]").ends_with("\"srid\":null,\"extensions\":{\"type\":\"path\",\"closed\":\"false\"}}"));
        assert_eq!(
            shown(Shape::Polygon, "((0,0),(1,1),(2,0))"),
            concat!(
                "{\"wkb\":\"AQMAAAABAAAABAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAADwPwAAAAAAAPA/AAAAAAAAAEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\",",
                "\"srid\":null,\"extensions\":{\"type\":\"polygon\"}}"
            )
        );
        assert!(shown(Shape::Circle, "<(1.5,2),0.5>").ends_with("\"srid\":null},\"radius\":0.5}"));
        assert!(Shape::Circle.write(&mut Vec::new(), "<(1,2)>").is_err());
    }
}
