//! Which row of the snapshot has which of Debezium's markers, whatever order its readers end in. Pure.
//!
//! They are those of one reader that takes table after table: `first` on the first row of the first table, `last` on the last row of
//! the last table that has any, and the first and the last row of each table told as such. What tells such a row from others is that
//! none came before it or follows it, so the last row of a unit is kept here until that is known; all others pass by.

/// A row that may go, and how it is marked.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Released<R> {
    pub(super) table: usize,
    pub(super) row: R,
    pub(super) marker: &'static str,
}

impl<R> Released<R> {
    /// Whether nothing of its table goes before it.
    pub(super) fn is_first(&self) -> bool {
        matches!(self.marker, "first" | "first_in_data_collection")
    }

    /// Whether nothing of its table comes behind it.
    pub(super) fn is_last(&self) -> bool {
        matches!(self.marker, "last" | "last_in_data_collection")
    }
}

/// The marker of a row between others.
pub(super) const BETWEEN: &str = "true";

#[derive(Debug)]
pub(super) struct Markers<R> {
    tables: Vec<Marked<R>>,
    /// The last row of the highest table that has ended.
    last: Option<Last<R>>,
}

#[derive(Debug)]
struct Marked<R> {
    units_left: usize,
    /// Its first row has gone.
    begun: bool,
    /// It may turn out to be its last.
    kept: Option<R>,
}

#[derive(Debug)]
struct Last<R> {
    table: usize,
    row: R,
    is_first: bool,
}

impl<R> Last<R> {
    fn released(self) -> Released<R> {
        Released { table: self.table, row: self.row, marker: marker(self.table, self.is_first, true) }
    }
}

/// Of a row that is not the very last one.
const fn marker(table: usize, is_first: bool, is_last: bool) -> &'static str {
    match (is_first, is_last) {
        (true, _) if table == 0 => "first",
        (_, true) => "last_in_data_collection",
        (true, _) => "first_in_data_collection",
        _ => BETWEEN,
    }
}

impl<R> Markers<R> {
    /// Of tables, in their order, by the number of units that each is read in.
    pub(super) fn new(units: impl IntoIterator<Item = usize>) -> Self {
        Self { tables: units.into_iter().map(|units_left| Marked { units_left, begun: false, kept: None }).collect(), last: None }
    }

    /// Whether rows of other tables than the first may go: `first` is before them.
    pub(super) fn is_open(&self) -> bool {
        self.tables.first().is_none_or(|it| it.begun || it.units_left == 0)
    }

    /// Whether every row of a table has gone.
    pub(super) fn is_over(&self, table: usize) -> bool {
        self.tables[table].units_left == 0 && self.last.as_ref().is_none_or(|it| it.table != table)
    }

    /// Tables that have no unit left to read.
    pub(super) fn n_ended(&self) -> usize {
        self.tables.iter().filter(|it| it.units_left == 0).count()
    }

    /// A unit's first row, which another one follows.
    pub(super) fn begins(&mut self, table: usize, row: R) -> Vec<Released<R>> {
        let mut released: Vec<_> = self.last.take_if(|it| it.table < table).map(Last::released).into_iter().collect();
        let marked = &mut self.tables[table];
        for row in marked.kept.take().into_iter().chain([row]) {
            released.push(marked.pass(table, row));
        }
        released
    }

    /// A unit's end, with the last of its rows if it had any.
    pub(super) fn ends(&mut self, table: usize, row: Option<R>) -> Vec<Released<R>> {
        let mut released = Vec::new();
        let marked = &mut self.tables[table];
        marked.units_left -= 1;
        if let Some(row) = row
            && let Some(before) = marked.kept.replace(row)
        {
            // It may be `first`, which nothing goes before.
            released.extend(self.last.take_if(|it| it.table < table).map(Last::released));
            released.push(marked.pass(table, before));
        }
        if marked.units_left > 0 {
            return released;
        }
        let Some(row) = marked.kept.take() else { return released };
        let ended = Last { table, row, is_first: !std::mem::replace(&mut marked.begun, true) };
        if self.last.as_ref().is_some_and(|it| it.table > table) {
            released.push(ended.released());
        } else {
            released.extend(self.last.replace(ended).map(Last::released));
        }
        released
    }

    /// The very last row, once all units have ended.
    pub(super) fn finish(&mut self) -> Option<Released<R>> {
        self.last.take().map(|it| Released { table: it.table, row: it.row, marker: "last" })
    }
}

impl<R> Marked<R> {
    /// A row that others of its table follow.
    fn pass(&mut self, table: usize, row: R) -> Released<R> {
        let is_first = !std::mem::replace(&mut self.begun, true);
        Released { table, row, marker: marker(table, is_first, false) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What one reader makes of tables of so many rows.
    fn in_sequence(tables: &[usize]) -> Vec<(usize, &'static str)> {
        let mut told: Vec<(usize, &'static str)> =
            tables.iter().enumerate().flat_map(|(table, rows)| (0..*rows).map(move |row| (table, marker(table, row == 0, row + 1 == *rows)))).collect();
        if let Some(last) = told.last_mut() {
            last.1 = "last";
        }
        told
    }

    /// Units (table, rows), of which some are read at once: each step is a row or the end of one of them.
    fn read(n_tables: usize, units: &[(usize, usize)], at_once: usize, mut choose: impl FnMut(usize) -> usize) -> Vec<(usize, &'static str)> {
        let mut markers = Markers::new((0..n_tables).map(|table| units.iter().filter(|it| it.0 == table).count()));
        let mut told = Vec::new();
        let mut waiting = units.iter().copied();
        // Table, rows left, rows seen.
        let mut reading: Vec<(usize, usize, usize)> = Vec::new();
        loop {
            reading.extend(waiting.by_ref().take(at_once - reading.len()).map(|(table, rows)| (table, rows, 0)));
            let is_open = markers.is_open();
            let free: Vec<usize> = (0..reading.len()).filter(|at| reading[*at].0 == 0 || is_open).collect();
            if free.is_empty() {
                assert!(reading.is_empty(), "nobody may go on");
                told.extend(markers.finish().map(|it| (it.table, it.marker)));
                assert!((0..n_tables).all(|table| markers.is_over(table)) && markers.n_ended() == n_tables);
                return told;
            }
            let at = free[choose(free.len())];
            let (table, left, seen) = &mut reading[at];
            let released = if *left == 0 {
                let (table, _, seen) = reading.remove(at);
                markers.ends(table, (seen > 0).then_some(()))
            } else {
                (*left, *seen) = (*left - 1, *seen + 1);
                match *seen {
                    1 => Vec::new(),
                    2 => markers.begins(*table, ()),
                    _ => vec![Released { table: *table, row: (), marker: BETWEEN }],
                }
            };
            told.extend(released.iter().map(|it| (it.table, it.marker)));
        }
    }

    #[test]
    fn one_reader_marks_as_debezium_does() {
        let told = |tables: &[usize]| {
            let units: Vec<(usize, usize)> = tables.iter().copied().enumerate().collect();
            let told = read(tables.len(), &units, 1, |_| 0);
            assert_eq!(told, in_sequence(tables), "{tables:?}");
            told.into_iter().map(|it| it.1).collect::<Vec<_>>()
        };
        assert_eq!(told(&[2, 1, 3]), ["first", "last_in_data_collection", "last_in_data_collection", "first_in_data_collection", "true", "last"]);
        // Debezium's `first` is of the first table, and of none should that be empty.
        assert_eq!(told(&[0, 2, 0]), ["first_in_data_collection", "last"]);
        assert_eq!(told(&[1, 1]), ["first", "last"]);
        assert_eq!(told(&[1, 0]), ["last"]);
        assert_eq!(told(&[0, 0]), Vec::<&str>::new());
    }

    proptest! {
        #[test]
        fn many_readers_mark_as_one_does_and_first_and_last_are_where_they_say(
            tables in prop::collection::vec(prop::collection::vec(0..5_usize, 1..5), 1..6), at_once in 1..6_usize, choices in prop::collection::vec(any::<prop::sample::Index>(), 200),
        ) {
            let units: Vec<(usize, usize)> = tables.iter().enumerate().flat_map(|(table, units)| units.iter().map(move |rows| (table, *rows))).collect();
            let mut choices = choices.into_iter();
            let told = read(tables.len(), &units, at_once, |n| choices.next().map_or(0, |it| it.index(n)));
            let rows: Vec<usize> = tables.iter().map(|it| it.iter().sum()).collect();
            for table in 0..tables.len() {
                // Within a table, as in its topic, the order is that of one reader too.
                let of_table = |told: &[(usize, &'static str)]| told.iter().filter(|it| it.0 == table).map(|it| it.1).collect::<Vec<_>>();
                prop_assert_eq!(of_table(&told), of_table(&in_sequence(&rows)));
            }
            let told: Vec<&str> = told.into_iter().map(|it| it.1).collect();
            prop_assert!(told.iter().position(|it| *it == "first").is_none_or(|at| at == 0));
            prop_assert!(told.iter().position(|it| *it == "last").is_none_or(|at| at + 1 == told.len()));
        }
    }
}
