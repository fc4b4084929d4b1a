//! How the log is looked at: levels by room, a held moment, and a copy of what is seen in a file.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use chrono::{DateTime, Utc};
use tui_logger::LevelFilter;

/// Levels, fewest lines first.
const LEVELS: [LevelFilter; 4] = [LevelFilter::Error, LevelFilter::Warn, LevelFilter::Info, LevelFilter::Debug];

/// Who speaks in the log; the first stands for whoever has no level of its own.
pub(super) const ROOMS: [&str; 11] = ["all", "bank", "cdc", "lake", "warehouse", "dbt", "dag", "refresh", "notify", "pipeline", "embedded"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Logs {
    /// The room whose level the keys change.
    room: usize,
    /// Places in [`LEVELS`]; a room that is not in here follows the first.
    levels: BTreeMap<&'static str, usize>,
    /// Nothing newer is shown while one reads.
    pub(super) frozen_at: Option<DateTime<Utc>>,
}

impl Default for Logs {
    fn default() -> Self {
        Self { room: 0, levels: BTreeMap::from([(ROOMS[0], 2)]), frozen_at: None }
    }
}

impl Logs {
    pub(super) fn room(&self) -> &'static str {
        ROOMS[self.room]
    }

    pub(super) fn step(&mut self, right: bool) {
        self.room = if right { (self.room + 1) % ROOMS.len() } else { (self.room + ROOMS.len() - 1) % ROOMS.len() };
    }

    /// The level of a room, and whether it is its own.
    pub(super) fn level_of(&self, room: &str) -> (LevelFilter, bool) {
        let own = self.levels.get(room).filter(|_| room != ROOMS[0]);
        let place = own.or(self.levels.get(ROOMS[0])).copied().unwrap_or(2);
        (LEVELS[place.min(LEVELS.len() - 1)], own.is_some())
    }

    /// The loudest level of any room: what the widget must be given at all.
    pub(super) fn loudest(&self) -> LevelFilter {
        LEVELS[self.levels.values().copied().max().unwrap_or(2).min(LEVELS.len() - 1)]
    }

    /// The rooms that are shown down to `debug`: they must speak at it.
    pub(super) fn at_debug(&self) -> Vec<&'static str> {
        let is_debug = |(room, place): (&&'static str, &usize)| (LEVELS.get(*place) == Some(&LevelFilter::Debug)).then_some(*room);
        self.levels.iter().filter_map(is_debug).collect()
    }

    pub(super) fn louder(&mut self) {
        self.set(self.place() + 1);
    }

    pub(super) fn quieter(&mut self) {
        self.set(self.place().saturating_sub(1));
    }

    fn place(&self) -> usize {
        let level = self.level_of(self.room()).0;
        LEVELS.iter().position(|it| *it == level).unwrap_or(2)
    }

    fn set(&mut self, to: usize) {
        let (room, to) = (self.room(), to.min(LEVELS.len() - 1));
        // A room that is as loud as all has no level of its own: it follows again.
        if self.room > 0 && self.levels.get(ROOMS[0]) == Some(&to) {
            self.levels.remove(room);
        } else {
            self.levels.insert(room, to);
        }
    }

    pub(super) fn freeze(&mut self) {
        self.frozen_at = if self.frozen_at.is_some() { None } else { Some(Utc::now()) };
    }
}

/// Writes lines into a new file of the folder and says which.
pub(super) fn save(folder: &Path, lines: &[String], now: DateTime<Utc>) -> io::Result<PathBuf> {
    fs::create_dir_all(folder)?;
    let path = folder.join(format!("console-{}.txt", now.format("%Y-%m-%dT%H-%M-%S%.3f")));
    fs::write(&path, lines.join("\n") + "\n")?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_has_its_own_level_until_it_is_as_loud_as_all() {
        let mut logs = Logs::default();
        assert_eq!(logs.level_of("lake"), (LevelFilter::Info, false));
        (0..3).for_each(|_| logs.step(true));
        assert_eq!(logs.room(), "lake");
        logs.louder();
        logs.louder();
        assert_eq!((logs.level_of("lake"), logs.level_of("dbt")), ((LevelFilter::Debug, true), (LevelFilter::Info, false)));
        assert_eq!((logs.loudest(), logs.at_debug()), (LevelFilter::Debug, vec!["lake"]));
        logs.quieter();
        assert_eq!((logs.level_of("lake"), logs.loudest(), logs.at_debug()), ((LevelFilter::Info, false), LevelFilter::Info, vec![]));
        (0..3).for_each(|_| logs.step(false));
        logs.quieter();
        logs.quieter();
        logs.quieter();
        assert_eq!(logs.level_of("lake"), (LevelFilter::Error, false));
    }

    #[test]
    fn what_is_saved_says_where() {
        let folder = tempfile::tempdir().unwrap();
        let path = save(&folder.path().join("logs"), &["one".into(), "two".into()], DateTime::UNIX_EPOCH).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        assert!(path.display().to_string().ends_with("logs/console-1970-01-01T00-00-00.000.txt"));
    }
}
