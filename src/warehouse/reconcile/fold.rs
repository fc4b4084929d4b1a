//! What each place holds at the mark: its events folded to the latest state of each key, by one SQL for all of them.
//!
//! The order of a key's changes is that of the commits (the END's LSN, found by transaction number), then of the WAL. A read
//! of the initial snapshot stands at the position it was read at, and only the attempt that came to an end counts; one of an
//! incremental snapshot repeats what is known, and counts where nothing else is; nor does it speak of the mark where the row was
//! created under the capture, which may have been later. Repeats are the same change and fold to one; staging has none to offer,
//! so a doubled row there counts twice.

use std::{collections::BTreeMap, ops::RangeInclusive};

use sqlx::{AssertSqlSafe, PgConnection, Row};

use super::{
    Amount, BANK_AND_BOUNDARIES, BankTable, Check, Mark, TABLES,
    compare::{Keys, Ranges},
    lake_events::{Changes, Ends, READ_AGAIN},
    source::held,
};
use crate::{
    change::{BOUNDARIES, Topics},
    lake::{self, Store},
    stream::Lane,
    warehouse::{
        Error, While,
        postgres::{self, RawTable},
        pour::{Encode, Pour, Room},
    },
};

/// Where the money can be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Source,
    Lake,
    Raw,
    /// Staging at the mark.
    Staging,
    /// Staging where analytics stands.
    StagingAtCut,
    Analytics,
}

impl std::fmt::Display for Place {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Source => "the source",
            Self::Lake => "the lake",
            Self::Raw => "raw",
            Self::Staging | Self::StagingAtCut => "staging",
            Self::Analytics => "analytics",
        })
    }
}

const DOING: &str = "reconcile";

/// Commit records read at once.
const PAGE: usize = 1_000;

/// Records of one table as the lake's commit records count them, by object.
pub(super) type Promised = BTreeMap<String, i64>;

/// The warehouse within one snapshot of it, with what the lake says beside it in temporary tables.
pub(super) struct Folded<'a> {
    connection: &'a mut PgConnection,
    room: Room,
    lsn: i64,
    /// Where the initial snapshot was read. An attempt at it that died is no state of the bank.
    snapshot_lsn: i64,
    promised: BTreeMap<&'static str, Promised>,
}

impl<'a> Folded<'a> {
    /// Reads the lake as far as it is loaded.
    pub(super) async fn open(connection: &'a mut PgConnection, room: &Room, mark: &Mark, store: &Store, topics: &Topics) -> Result<Self, Error> {
        let mut this = Self { connection, room: room.clone(), lsn: mark.lsn.0.cast_signed(), snapshot_lsn: -1, promised: BTreeMap::new() };
        this.run("create temp table lake_ends(xid bigint, lsn bigint) on commit drop".to_owned()).await?;
        for table in &TABLES {
            this.run(format!("create temp table {}(key bigint, op text, xid bigint, lsn bigint, cents bigint) on commit drop", lake_table(table.name))).await?;
        }
        let loaded = this.loaded().await?;
        for table in BANK_AND_BOUNDARIES {
            let lanes = loaded.iter().filter(|(lane, _)| topics.lake_name(&lane.topic).as_deref() == Some(table));
            let mut promised = Promised::new();
            for (lane, upto) in lanes {
                if table == BOUNDARIES {
                    this.pour(store, lane, *upto, "lake_ends", Ends, &mut promised).await?;
                } else {
                    this.pour(store, lane, *upto, &lake_table(table), Changes, &mut promised).await?;
                }
            }
            this.promised.insert(table, promised);
        }
        for table in &TABLES {
            let lake = lake_table(table.name);
            this.run(format!("create temp table {lake}_created on commit drop as {}; analyze {lake}_created", created(&lake))).await?;
        }
        this.run("create temp view raw_ends as select split_part(v ->> 'id', ':', 1)::bigint as xid, split_part(v ->> 'id', ':', 2)::bigint as lsn from raw.boundaries where v ->> 'status' = 'END'".to_owned()).await?;
        for place in ["lake", "raw"] {
            this.run(commits(place, mark)).await?;
        }
        this.find_snapshot(mark).await?;
        Ok(this)
    }

    async fn run(&mut self, sql: String) -> Result<(), Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *self.connection).await.during(DOING)?;
        Ok(())
    }

    async fn loaded(&mut self) -> Result<Vec<(Lane, i64)>, Error> {
        let rows = sqlx::query("select topic, partition, max(last_offset) from raw._loads group by topic, partition")
            .fetch_all(&mut *self.connection)
            .await
            .during(DOING)?;
        Ok(rows.iter().map(|row| (Lane { topic: row.get::<&str, _>(0).into(), partition: row.get(1) }, row.get(2))).collect())
    }

    /// Pours a lane's objects, up to an offset, into a temporary table.
    async fn pour(&mut self, store: &Store, lane: &Lane, upto: i64, into: &str, encode: impl Encode, promised: &mut Promised) -> Result<(), Error> {
        let mut position = None;
        let mut pour = Pour::begin(self.connection, into).await.during(DOING)?;
        while position.is_none_or(|it| it < upto) {
            let mut page = lake::log::after(store, &lane.topic, lane.partition, position, PAGE).await.map_err(Error::Lake)?;
            page.retain(|it| it.last_offset <= upto);
            let Some(last) = page.last() else { break };
            position = Some(last.last_offset);
            promised.extend(page.iter().map(|it| (it.data.clone(), it.rows.cast_signed())));
            pour.objects(store, &self.room, &page, encode.clone()).await?;
        }
        pour.finish().await.during(DOING)?;
        Ok(())
    }

    /// The attempt that came to an end; while none has, or nobody knows which it was, the newest. A state that was read after
    /// the mark says nothing about the mark.
    async fn find_snapshot(&mut self, mark: &Mark) -> Result<(), Error> {
        let reads: Vec<String> = TABLES.iter().map(|table| format!("select lsn from {} where op = 'r'", lake_table(table.name))).collect();
        let sql = format!("select coalesce((select max(lsn) from raw._snapshot_ends), (select max(lsn) from ({}) reads), -1)", reads.join(" union all "));
        self.snapshot_lsn = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut *self.connection).await.during(DOING)?;
        if self.snapshot_lsn > self.lsn { Err(Error::StaleMark { taken_at: mark.taken_at }) } else { Ok(()) }
    }

    /// All records of the lake's objects, as far as loaded, are in raw or were refused by it.
    pub(super) async fn records(&mut self, table: &str) -> Result<Check, Error> {
        let raw = RawTable::new(table);
        let sql = format!("select (select count(*) from {raw}) + (select count(*) from raw._rejected where landed and object like $1)");
        let objects = format!("raw/{}/%", table.replace('_', "\\_"));
        let actual: i64 = sqlx::query_scalar(AssertSqlSafe(sql)).bind(&objects).fetch_one(&mut *self.connection).await.during(DOING)?;
        let promised = self.promised.remove(table).unwrap_or_default();
        let expected = promised.values().sum();
        let detail = if expected == actual { None } else { Some(self.misloaded(&raw, &objects, promised).await?) };
        let name = format!("{table}.records.lake_raw");
        Ok(Check { name, ok: expected == actual, expected: Amount::Rows(expected), actual: Amount::Rows(actual), detail })
    }

    /// The objects whose rows are not what their commit record promised.
    async fn misloaded(&mut self, raw: &RawTable, objects: &str, promised: Promised) -> Result<String, Error> {
        let sql = format!(
            "select _object, count(*) from (select _object from {raw} union all select object from raw._rejected where landed and object like $1) held group by _object"
        );
        let rows = sqlx::query(AssertSqlSafe(sql)).bind(objects).fetch_all(&mut *self.connection).await.during(DOING)?;
        Ok(misloaded(promised, rows.iter().map(|row| (row.get(0), row.get(1)))))
    }

    /// What a place holds, by ranges of `width` keys.
    pub(super) async fn ranges(&mut self, table: &BankTable, place: Place, width: i64) -> Result<Ranges, Error> {
        let Some(state) = self.state(table, place).await? else { return Ok(Ranges::new()) };
        let sql = format!("select key / {width}, sum(n)::bigint, coalesce(sum(cents), 0)::numeric(60, 0)::text from ({state}) state group by 1");
        held(&sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut *self.connection).await.during(DOING)?)
    }

    /// What a place holds under these keys.
    pub(super) async fn keys(&mut self, table: &BankTable, place: Place, keys: RangeInclusive<i64>) -> Result<Keys, Error> {
        let Some(state) = self.state(table, place).await? else { return Ok(Keys::new()) };
        let sql = format!(
            "select key, sum(n)::bigint, coalesce(sum(cents), 0)::numeric(60, 0)::text from ({state}) state where key between {} and {} group by key",
            keys.start(),
            keys.end()
        );
        held(&sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut *self.connection).await.during(DOING)?)
    }

    /// SQL for `(key, n, cents)` of what is alive; None where dbt has not made the table yet.
    async fn state(&mut self, table: &BankTable, place: Place) -> Result<Option<String>, Error> {
        let needs = match place {
            Place::Source | Place::Lake | Place::Raw => None,
            Place::Staging | Place::StagingAtCut => Some(table.staging.to_owned()),
            Place::Analytics => Some(format!("analytics.{}", table.model)),
        };
        if let Some(needs) = needs
            && !postgres::exists(self.connection, &needs).await.during(DOING)?
        {
            return Ok(None);
        }
        Ok(match place {
            Place::Source => None,
            Place::Lake => Some(fold(table, &lake_table(table.name), "lake_commits", self.snapshot_lsn)),
            Place::Raw => Some(fold(table, &format!("({})", raw_events(table)), "raw_commits", self.snapshot_lsn)),
            Place::Staging => Some(staged(table, &staged_at(self.lsn))),
            Place::StagingAtCut => Some(staged(table, &format!("tx_lsn <= {}", self.position(table.model).await?))),
            Place::Analytics => {
                Some(format!("select {} as key, 1 as n, {} as cents from analytics.{} where {}", table.key, cents(table), table.model, table.alive))
            }
        })
    }

    /// How far a model of analytics has come: dbt's own note of it, or the cut.
    async fn position(&mut self, model: &str) -> Result<i64, Error> {
        if postgres::exists(self.connection, "staging.positions").await.during(DOING)? {
            let noted: Option<i64> = sqlx::query_scalar("select max(lsn)::bigint from staging.positions where name = $1")
                .bind(model)
                .fetch_one(&mut *self.connection)
                .await
                .during(DOING)?;
            if let Some(position) = noted {
                return Ok(position);
            }
        }
        Ok(postgres::cut(self.connection).await.during(DOING)?.map_or(-1, |cut| cut.lsn.0.cast_signed()))
    }
}

/// Which objects' rows are not what their commit record promised, by what raw holds of each.
pub(super) fn misloaded(promised: Promised, held: impl Iterator<Item = (String, i64)>) -> String {
    const SHOWN: usize = 5;
    let mut wrong: BTreeMap<String, (i64, i64)> = promised.into_iter().map(|(object, rows)| (object, (rows, 0))).collect();
    for (object, rows) in held {
        wrong.entry(object).or_default().1 = rows;
    }
    wrong.retain(|_, (promised, held)| promised != held);
    let more = wrong.len().saturating_sub(SHOWN);
    let mut sentences: Vec<String> =
        wrong.into_iter().take(SHOWN).map(|(object, (promised, held))| format!("raw holds {held} of the {promised} records of {object}")).collect();
    if more > 0 {
        sentences.push(format!("and {more} more objects"));
    }
    sentences.join("; ")
}

fn lake_table(name: &str) -> String {
    format!("lake_{name}")
}

fn cents(table: &BankTable) -> String {
    table.money.map_or_else(|| "0".to_owned(), |money| format!("{money} * 100"))
}

fn raw_events(table: &BankTable) -> String {
    let cents = table.money.map_or_else(|| "0".to_owned(), |money| format!("(image ->> '{money}')::numeric * 100"));
    let raw = RawTable::new(table.name);
    format!(
        "select (image ->> 'id')::bigint as key, case when op = 'r' and origin ->> 'lsn' is null then '{READ_AGAIN}' else op end as op,
           (origin ->> 'txId')::bigint as xid, coalesce((origin ->> 'lsn')::bigint, 0) as lsn, {cents} as cents
         from (select v ->> 'op' as op, v -> 'source' as origin, v -> case when v ->> 'op' = 'd' then 'before' else 'after' end as image from {raw} where v is not null) change"
    )
}

/// What was read again though its creation is told: few keys, asked of the lake alone as raw holds the same.
pub(super) fn created(lake: &str) -> String {
    format!("select distinct key from {lake} where op = 'c' and key in (select key from {lake} where op = '{READ_AGAIN}')")
}

/// The latest state of each key that is alive, from events and the commits the mark sees.
fn fold(table: &BankTable, events: &str, commits: &str, snapshot_lsn: i64) -> String {
    let lake = lake_table(table.name);
    format!(
        "select key, 1 as n, cents from (
           select distinct on (e.key) e.key, e.op, e.cents from {events} e
           left join {commits} c on e.op <> 'r' and c.xid = e.xid and e.lsn > c.after_lsn and e.lsn <= c.lsn
           left join {lake}_created m on e.op = '{READ_AGAIN}' and m.key = e.key
           where case e.op when 'r' then e.lsn = {snapshot_lsn} when '{READ_AGAIN}' then m.key is null else c.lsn is not null end
           order by e.key, coalesce(c.lsn, e.lsn) desc, e.lsn desc) latest where op <> 'd'"
    )
}

/// Which rows of staging the mark sees. What was read again (lsn 1) has the place at which it became known, which says nothing.
pub(super) fn staged_at(lsn: i64) -> String {
    format!("((tx_lsn <= {lsn} and tx_lsn not in (select lsn from raw_unseen)) or (op = 'r' and lsn = 1))")
}

/// The same of staging, whose rows know their commit. Two rows that say the same change are two.
fn staged(table: &BankTable, seen: &str) -> String {
    let (key, cents, staging) = (table.key, cents(table), table.staging);
    format!(
        "select key, 1 as n, cents from (
           select {key} as key, op, {cents} as cents, rank() over (partition by {key} order by tx_lsn desc, lsn desc) as age from {staging} where {seen}) latest
         where age = 1 and op <> 'd'"
    )
}

/// The commits the mark sees, and those before its position that it does not (they were still running).
///
/// The wire carries 32 bits of a transaction's number. Walking the commits in their order, a jump of more than half the circle
/// is a turn of it; the last commit before the mark is taken for the nearest to the snapshot. The same number after a turn is
/// another transaction: it begins behind the END of the one before (`after_lsn`).
fn commits(place: &str, mark: &Mark) -> String {
    let (lsn, snapshot) = (mark.lsn.0, String::from(mark.snapshot.clone()));
    let (xmin, xmax) = (mark.snapshot.xmin, mark.snapshot.xmax);
    format!(
        "create temp table {place}_commits on commit drop as
         with ends as (select distinct xid, lsn from {place}_ends),
         steps as (select xid, lsn, lag(lsn, 1, 0::bigint) over (partition by xid order by lsn) as after_lsn, xid - lag(xid, 1, xid) over (order by lsn) as step from ends),
         turns as (select xid, lsn, after_lsn, sum(case when step < -2147483648 then 1 when step > 2147483648 then -1 else 0 end) over (order by lsn) as turn from steps),
         anchor as (select xid, turn, floor(({xmax} - xid + 2147483648)::numeric / 4294967296) as round from turns where lsn <= {lsn} order by lsn desc limit 1),
         whole as (select t.xid, t.lsn, t.after_lsn, t.xid + (a.round + t.turn - a.turn) * 4294967296 as number from turns t, anchor a where t.lsn <= {lsn})
         select xid, lsn, after_lsn, number < {xmin} or pg_visible_in_snapshot(greatest(number, 3)::bigint::text::xid8, '{snapshot}') as seen from whole;
         create temp table {place}_unseen on commit drop as select lsn from {place}_commits where not seen;
         delete from {place}_commits where not seen;
         analyze {place}_commits"
    )
}
