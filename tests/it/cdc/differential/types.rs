//! The types that tables are made of, and values of each: ordinary ones, and those at their edges.

use super::{
    case::{OWN_TYPE, OWN_VALUES},
    dice::Dice,
};

/// What every case may use, made once for all of them.
pub(super) const PREAMBLE: &str = "
create extension hstore;
create extension citext;
create extension ltree;
create extension isn;
create extension cube;
create extension seg;
create extension vector;
create type mood as enum ('sad', 'ok', 'so so', 'Happy', 'a,b', 'it''s');
create domain positive as integer check (value > 0);
create domain label as varchar(20);
create domain cents as numeric(12,2);
create domain tight as label check (value <> 'x');
create domain feeling as mood;
create domain numbers as integer[];
create type pair as (a integer, b text);
create type textrange as range (subtype = text);
";

#[derive(Debug)]
pub(super) struct Type {
    pub(super) name: &'static str,
    /// As text, without quotes.
    pub(super) values: &'static [&'static str],
    /// Whether it can be in a primary key.
    pub(super) keyable: bool,
}

const fn plain(name: &'static str, values: &'static [&'static str]) -> Type {
    Type { name, values, keyable: false }
}

const fn keyable(name: &'static str, values: &'static [&'static str]) -> Type {
    Type { name, values, keyable: true }
}

const WORDS: &[&str] = &[
    "",
    "plain",
    "O'Brien",
    "a\\b",
    "\\N",
    "NULL",
    "tab\there",
    "new\nline\r",
    "\u{1}\u{1f}\u{7f}\u{b}\u{c}\u{8}",
    "é ü ☃ \u{2028} \u{feff}",
    "😀 beyond",
    "\"quoted\"",
    "{braces}",
    "a,b",
    " spaced ",
    "</script>&<>",
];
const TIMESTAMPS: &[&str] = &[
    "2026-02-28 23:59:59.123456",
    "1970-01-01 00:00:00",
    "1969-12-31 23:59:59.999999",
    "0001-01-01 00:00:00",
    "1582-10-10 12:00:00.5",
    "1900-01-01 00:00:01.000001",
    "9999-12-31 23:59:59.999999",
    "0044-03-15 12:00:00 BC",
    "4713-01-01 00:00:00 BC",
    "294246-12-31 23:59:59.999999",
    "12345-06-07 08:09:10.11",
    "2024-02-29 24:00:00",
    "infinity",
    "-infinity",
];
const TIMES: &[&str] = &["00:00:00", "23:59:59.999999", "24:00:00", "12:34:56.5", "01:02:03.000001"];
const NUMBERS: &[&str] = &["0", "-0", "1", "-1.5", "0.000001", "1e-30", "1e20", "123456789012345678901234567890.123456789", "0.10", "100", "-99999.99999"];

/// All that PostgreSQL has built in, but for what no table of a bank can hold; and what the preamble makes.
pub(super) const TYPES: &[Type] = &[
    keyable("smallint", &["0", "1", "-32768", "32767"]),
    keyable("integer", &["0", "1", "-2147483648", "2147483647"]),
    keyable("bigint", &["0", "1", "-9223372036854775808", "9223372036854775807"]),
    plain("real", &["0", "-0", "1.5", "0.1", "1e-45", "3.4028235e38", "1e7", "0.001", "0.00099", "16777216", "NaN", "Infinity", "-Infinity"]),
    plain(
        "double precision",
        &["0", "-0", "1.5", "0.1", "5e-324", "1.7976931348623157e308", "1e7", "9999999", "0.001", "2e-3", "NaN", "Infinity", "-Infinity", "123456789.123"],
    ),
    keyable("numeric", NUMBERS),
    plain("numeric", &["NaN", "Infinity", "-Infinity", "12"]),
    keyable("numeric(10,2)", &["0", "1", "-1.5", "99999999.99", "0.01", "NaN"]),
    plain("numeric(5,0)", &["0", "12345", "-1"]),
    plain("numeric(38,20)", &["0", "0.00000000000000000001", "-123456789012345678.5"]),
    plain("money", &["0", "-1234.56", "92233720368547758.07", "-92233720368547758.08", "0.01"]),
    keyable("boolean", &["t", "f"]),
    keyable("text", WORDS),
    keyable("varchar", WORDS),
    keyable("varchar(40)", WORDS),
    plain("char(8)", &["", "a", "12345678", "é"]),
    plain("char", &["", "a", "é"]),
    plain("\"char\"", &["", "a", "\\377"]),
    keyable("uuid", &["00000000-0000-0000-0000-000000000000", "6F9619FF-8B86-D011-B42D-00C04FC964FF", "ffffffff-ffff-ffff-ffff-ffffffffffff"]),
    plain("bytea", &["", "\\x00", "\\xdeadbeef00ff", "\\x7f80", "plain"]),
    keyable("date", &["2026-02-28", "1970-01-01", "1969-12-31", "1582-10-16", "9999-12-31", "5874897-12-31"]),
    keyable("time", TIMES),
    plain("time(0)", TIMES),
    plain("time(3)", TIMES),
    plain("time(6)", TIMES),
    plain("timetz", &["00:00:00+00", "23:59:59.999999-12", "24:00:00+00", "12:34:56.789+05:30", "01:02:03+15:59", "12:00:00.5-08"]),
    plain("timetz(2)", &["12:34:56.789+05:30", "23:59:59.999-01"]),
    keyable("timestamp", TIMESTAMPS),
    plain("timestamp(0)", TIMESTAMPS),
    plain("timestamp(3)", TIMESTAMPS),
    plain("timestamp(4)", TIMESTAMPS),
    keyable("timestamptz", TIMESTAMPS),
    plain("timestamptz(0)", TIMESTAMPS),
    plain("timestamptz(2)", TIMESTAMPS),
    plain(
        "interval",
        &["0", "1 year 2 mons 3 days 04:05:06.789", "-1 days +02:03:00", "100:00:00", "-00:00:00.000001", "1 mon", "-1 year", "178000000 years", "36500 days"],
    ),
    plain("interval day to second(2)", &["3 days 04:05:06.789", "-1 day"]),
    plain("bit", &["0", "1"]),
    plain("bit(8)", &["00000000", "11111111", "10101010"]),
    plain("bit(11)", &["00000000001", "11111111111"]),
    plain("bit varying", &["", "1", "1100000001"]),
    plain("bit varying(1)", &["", "1", "0"]),
    plain("bit varying(70)", &["1", "1000000000000000000000000000000000000000000000000000000000000000000001"]),
    plain("json", &["{}", "null", " {\"a\" : 1,  \"a\":2}", "[1,\"é😀\",null]", "\"text\"", "1.50"]),
    plain("jsonb", &["{}", "null", "{\"b\":1,\"a\":[1.50,{}]}", "[1,\"é😀\",null]", "\"te\\\"xt\"", "1e3"]),
    plain("xml", &[]),
    plain("inet", &["192.168.0.1", "10.0.0.0/8", "::1", "2001:db8::ff00:42:8329/64", "192.168.0.1/32"]),
    plain("cidr", &["10.0.0.0/8", "192.168.100.128/25", "::/0", "2001:db8::/32"]),
    plain("macaddr", &["08:00:2b:01:02:03", "ff-ff-ff-ff-ff-ff"]),
    plain("macaddr8", &["08:00:2b:01:02:03:04:05", "08:00:2b:01:02:03"]),
    plain("point", &["(0,0)", "(1.5,-2.5)", "(1e300,1e-300)", "(NaN,Infinity)", "(0.1,100)"]),
    plain("line", &["{1,2,3}", "{1.5,-2,0}"]),
    plain("lseg", &["[(0,0),(1,1)]", "[(1.5,2),(3,4)]"]),
    plain("box", &["(1,1),(0,0)", "(1.5,2),(-3,4)"]),
    plain("path", &["[(0,0),(1,1),(2,0)]", "((0,0),(1,1),(2,0))"]),
    plain("polygon", &["((0,0),(1,1),(2,0))"]),
    plain("circle", &["<(0,0),1>", "<(1.5,2),0.5>"]),
    plain("oid", &["0", "1", "4294967295", "2147483648"]),
    plain("regclass", &["pg_class", "0"]),
    plain("regtype", &["integer", "text"]),
    plain("xid", &["0", "4294967295"]),
    plain("xid8", &["0", "18446744073709551615"]),
    plain("cid", &["0", "7"]),
    plain("tid", &["(0,1)", "(4294967295,65535)"]),
    plain("pg_lsn", &["0/0", "16/B374D848"]),
    plain("txid_snapshot", &["10:20:10,14,15"]),
    plain("pg_snapshot", &["10:20:10,14,15"]),
    plain("tsvector", &["", "'a':1A,3 'fat':2B,4C 'it''s'", "a b c"]),
    plain("tsquery", &["", "'fat' & ( 'rat' | !'cat' )"]),
    plain("jsonpath", &["$.a[*] ? (@ > 1)"]),
    plain("int4range", &["empty", "[1,5)", "(,)", "[3,3]"]),
    plain("int8range", &["empty", "[1,5)", "(,7]"]),
    plain("numrange", &["empty", "[1.5,5)", "(,7.10]"]),
    plain("tsrange", &["empty", "[2026-01-01 00:00:00,2026-01-02 12:34:56.5)", "(,)", "[infinity,]"]),
    plain("tstzrange", &["empty", "[2026-01-01 00:00:00+00,2026-01-02 12:34:56.5+01)", "(,2026-01-01 00:00:00+05:30]"]),
    plain("daterange", &["empty", "[2026-01-01,2026-01-05)", "(,2026-01-01]"]),
    plain("int4multirange", &["{}", "{[1,5),[7,9)}"]),
    plain("tstzmultirange", &["{}", "{[2026-01-01 00:00:00+00,2026-01-02 00:00:00+00)}"]),
    plain("hstore", &["", "a=>1", "a=>NULL", "\"b c\"=>\"d\\\"e\"", "é=>😀", "x=>\"\""]),
    plain("citext", WORDS),
    plain("ltree", &["", "Top.Science.Astronomy"]),
    plain("cube", &["(1, 2),(3, 4)"]),
    plain("seg", &["1.5 .. 2"]),
    plain("vector", &["[1,2,3]", "[0.1,-0,1e-20]", "[0]"]),
    plain("vector(2)", &["[1.5,-2]"]),
    plain("halfvec", &["[1,2,3]", "[0.1,-0,65504]"]),
    plain("sparsevec", &["{1:1.5,3:-2}/5", "{}/3"]),
    keyable(OWN_TYPE, &[OWN_VALUES[0], OWN_VALUES[1]]),
    plain("isbn", &["978-0-393-04002-9"]),
    keyable("mood", &["sad", "ok", "so so", "Happy", "a,b", "it's"]),
    plain("positive", &["1", "2147483647"]),
    plain("label", &["", "a label", "é😀"]),
    plain("cents", &["0", "1.5", "-1"]),
    plain("tight", &["", "tight"]),
    plain("feeling", &["sad", "so so"]),
    plain("numbers", &["{}", "{1,NULL,3}"]),
    plain("pair", &["(1,a)", "(,)", "(5,\"x y\")"]),
    plain("textrange", &["empty", "[a,b)"]),
];

/// Types of values that may be so long that they leave their row.
const LONG: &[&str] = &["text", "varchar", "jsonb", "json", "bytea", "citext", "hstore"];
const LONG_ARRAYS: &[&str] =
    &["text[]", "varchar[]", "integer[]", "bigint[]", "smallint[]", "uuid[]", "double precision[]", "timestamptz[]", "boolean[]", "date[]"];

/// Of these Debezium has an array of its own where the stream leaves one out.
const LONG_ARRAYS_REQUIRED: &[&str] = &["text", "varchar", "char(8)", "integer", "bigint", "date", "uuid", "json", "jsonb", "bytea"];

/// A column's type as the generator has it: one of the list, or an array of one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chosen {
    pub(super) of: &'static Type,
    pub(super) array: bool,
}

impl Chosen {
    pub(super) fn any(dice: &mut Dice) -> Self {
        Self { of: dice.one_of(TYPES), array: dice.in_hundred(18) }
    }

    pub(super) fn text() -> Self {
        Self::named("text", false)
    }

    fn named(name: &str, array: bool) -> Self {
        Self { of: TYPES.iter().find(|it| it.name == name).expect("it is listed"), array }
    }

    pub(super) fn of_a_key(dice: &mut Dice) -> Self {
        loop {
            let of = dice.one_of(TYPES);
            if of.keyable {
                return Self { of, array: false };
            }
        }
    }

    /// One whose values may be long.
    pub(super) fn long(dice: &mut Dice) -> Self {
        let array = dice.in_hundred(40);
        let name = if array { dice.one_of(LONG_ARRAYS).trim_end_matches("[]") } else { dice.one_of(LONG) };
        Self::named(name, array)
    }

    /// Whether such a column can be NOT NULL. At a value that the stream left out, or that it cannot read, Debezium has a null, and
    /// for a null in such a column no more than a task that fails (`assets/cdc-types.md`).
    pub(super) fn may_be_required(self) -> bool {
        if self.array {
            return LONG_ARRAYS_REQUIRED.contains(&self.of.name);
        }
        !matches!(self.of.name, "bit varying(1)" | "sparsevec")
    }

    pub(super) fn name(self) -> String {
        if self.array { format!("{}[]", self.of.name) } else { self.of.name.to_owned() }
    }

    /// Values that an array holds and Debezium loses there, by way of Java's `Timestamp` and `BigDecimal` (`assets/cdc-types.md`).
    fn lost_in_arrays(self, value: &str) -> bool {
        let is_old = || ["BC", "0001-", "1582-", "infinity"].iter().any(|it| value.contains(it));
        match self.of.name.split('(').next().unwrap_or_default() {
            "time" => value.contains('.') || value.starts_with("24"),
            "date" | "timestamp" | "timestamptz" => is_old(),
            "numeric" => matches!(value, "NaN" | "Infinity" | "-Infinity"),
            _ => false,
        }
    }

    /// Of an array of these with a NULL in it Debezium makes null.
    fn has_no_nulls_in_arrays(self) -> bool {
        ["ltree", "tsvector", "isbn", "vector", "vector(2)", "halfvec", "sparsevec", "mood", "feeling", OWN_TYPE].contains(&self.of.name)
    }

    /// The others are null or objects one by one.
    fn is_lost_in_arrays_of_arrays(self) -> bool {
        matches!(self.of.name, "timetz" | "timetz(2)" | "line" | "lseg" | "box" | "path" | "polygon" | "circle")
    }

    fn element(self, dice: &mut Dice) -> &'static str {
        loop {
            let value = dice.one_of(self.of.values);
            if !self.lost_in_arrays(value) {
                return value;
            }
        }
    }

    pub(super) fn value(self, dice: &mut Dice) -> Option<String> {
        match (self.of.values, self.array) {
            ([], _) => None,
            (values, false) => Some((*dice.one_of(values)).to_owned()),
            (_, true) => {
                let n_elements = dice.below(4);
                let nulls = if self.has_no_nulls_in_arrays() { 0 } else { 20 };
                let one = |dice: &mut Dice| self.array_of((0..n_elements).map(|_| (!dice.in_hundred(nulls)).then(|| self.element(dice))));
                let first = one(dice);
                Some(match dice.below(12) {
                    0 if n_elements > 0 && nulls > 0 && !self.is_lost_in_arrays_of_arrays() => format!("{{{first}{}{}}}", self.of.delimiter(), one(dice)),
                    1 if n_elements == 3 => format!("[-1:1]={first}"),
                    _ => first,
                })
            }
        }
    }

    /// Of some kilobytes that do not compress.
    pub(super) fn long_value(self, dice: &mut Dice) -> Option<String> {
        if self.of.values.is_empty() {
            return None;
        }
        if self.array {
            let values: Vec<&str> = (0..1500).map(|_| self.element(dice)).collect();
            return Some(self.array_of(values.into_iter().map(Some)));
        }
        let length = 2500 + dice.below(5000);
        let text = dice.hexadecimal(length);
        Some(match self.of.name {
            "json" | "jsonb" => format!("{{\"long\": \"{text}\"}}"),
            "bytea" => format!("\\x{}", &text[..text.len() / 2 * 2]),
            "hstore" => format!("long=>{text}"),
            "text" | "varchar" | "citext" => text,
            _ => return self.value(dice),
        })
    }

    /// PostgreSQL's text of an array; every element in quotes.
    fn array_of<'a>(self, elements: impl Iterator<Item = Option<&'a str>>) -> String {
        let quoted = |it: Option<&str>| match it {
            None => "NULL".to_owned(),
            Some(text) => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
        };
        format!("{{{}}}", elements.map(quoted).collect::<Vec<_>>().join(self.of.delimiter()))
    }
}

impl Type {
    /// What stands between the elements of its arrays.
    fn delimiter(&self) -> &'static str {
        if self.name == "box" { ";" } else { "," }
    }
}
