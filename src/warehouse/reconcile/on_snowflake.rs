//! The same fold on Snowflake, in its words. [`super::fold`] says what is folded and why; here is what differs.
//!
//! There is no snapshot over several statements, and none is needed: raw and the lake are read up to the offsets that were
//! loaded at the beginning, and both only grow behind them. Staging and analytics move when dbt runs; where they did so
//! meanwhile, [`Folded::stood_still`] says it and the comparison is made again.

use std::{collections::BTreeMap, ops::RangeInclusive, sync::Arc};

use arrow_array::{ArrayRef, Int64Array, StringArray};

use super::{
    Amount, BANK_AND_BOUNDARIES, BankTable, Check, Mark, TABLES,
    compare::{Held, Keys, Ranges},
    fold::{Place, created, misloaded, staged_at},
    lake_events::{self, READ_AGAIN, Told},
};
use crate::{
    change::{BOUNDARIES, Topics},
    lake::{self, Store},
    stream::Lane,
    warehouse::{
        Error,
        snowflake::{File, Row, Session, Snowflake, number, parsed, raw_table, text},
    },
};

/// Commit records read at once.
const PAGE: usize = 1_000;

/// Rows in one file on its way to a temporary table.
const FILE_ROWS: usize = 1_000_000;

/// The warehouse up to where it was loaded, with what the lake says beside it in temporary tables.
pub(super) struct Folded<'a> {
    warehouse: &'a Snowflake,
    session: Session,
    lsn: i64,
    snapshot_lsn: i64,
    /// By table: what of it was loaded, as a condition on the rows of raw.
    loaded: BTreeMap<&'static str, String>,
    promised: BTreeMap<&'static str, BTreeMap<String, i64>>,
    stood: Vec<Row>,
}

impl<'a> Folded<'a> {
    pub(super) async fn open(warehouse: &'a Snowflake, mark: &Mark, store: &Store, topics: &Topics) -> Result<Self, Error> {
        let stood = standing(warehouse).await?;
        let (loaded, promised) = (BTreeMap::new(), BTreeMap::new());
        let session = warehouse.session()?;
        let mut this = Self { warehouse, session, lsn: mark.lsn.0.cast_signed(), snapshot_lsn: -1, loaded, promised, stood };
        this.session.run("use schema raw").await?;
        this.session.run("create temporary table lake_ends(xid number(38, 0), lsn number(38, 0))").await?;
        for table in &TABLES {
            let columns = "key number(38, 0), op varchar, xid number(38, 0), lsn number(38, 0), cents number(38, 0)";
            this.session.run(&format!("create temporary table lake_{}({columns})", table.name)).await?;
        }
        let positions = warehouse.loaded_positions().await?;
        for table in BANK_AND_BOUNDARIES {
            let lanes: Vec<(&Lane, i64)> =
                positions.iter().filter(|(lane, _)| topics.lake_name(&lane.topic).as_deref() == Some(table)).map(|(lane, upto)| (lane, *upto)).collect();
            let upto: Vec<String> = lanes.iter().map(|(lane, upto)| format!("(_partition = {} and _offset <= {upto})", lane.partition)).collect();
            this.loaded.insert(table, if upto.is_empty() { "false".to_owned() } else { format!("({})", upto.join(" or ")) });
            let mut promised = BTreeMap::new();
            for (lane, upto) in lanes {
                this.pour(store, lane, upto, table, &mut promised).await?;
            }
            this.promised.insert(table, promised);
        }
        for BankTable { name, .. } in &TABLES {
            let created = created(&format!("lake_{name}"));
            this.session.run(&format!("create temporary table lake_{name}_created as {created}")).await?;
        }
        let ends = format!(
            "create temporary table raw_ends as select split_part(v:id::varchar, ':', 1)::number(38, 0) as xid, split_part(v:id::varchar, ':', 2)::number(38, 0) as lsn
             from {} where v:status::varchar = 'END' and {}",
            raw_table(BOUNDARIES),
            this.loaded[BOUNDARIES]
        );
        this.session.run(&ends).await?;
        for place in ["lake", "raw"] {
            for sql in commits(place, mark) {
                this.session.run(&sql).await?;
            }
        }
        this.find_snapshot(mark).await?;
        Ok(this)
    }

    /// Whether staging and analytics are still where they were when this was opened.
    pub(super) async fn stood_still(&self) -> Result<bool, Error> {
        Ok(standing(self.warehouse).await? == self.stood)
    }

    /// Pours a lane's objects, up to an offset, into the temporary table of the lake's side.
    async fn pour(&self, store: &Store, lane: &Lane, upto: i64, table: &'static str, promised: &mut BTreeMap<String, i64>) -> Result<(), Error> {
        let mut position = None;
        let mut told = Vec::new();
        while position.is_none_or(|it| it < upto) {
            let mut page = lake::log::after(store, &lane.topic, lane.partition, position, PAGE).await.map_err(Error::Lake)?;
            page.retain(|it| it.last_offset <= upto);
            let Some(last) = page.last() else { break };
            position = Some(last.last_offset);
            for record in &page {
                promised.insert(record.data.clone(), record.rows.cast_signed());
                let _place = self.warehouse.room().take(record.bytes).await?;
                let decoded = lake::read(store, record).await.map_err(Error::Lake)?;
                let parsing = tokio::task::spawn_blocking(move || {
                    let values = decoded.batches.iter().flat_map(lake::rows).filter_map(|it| it.value);
                    values.filter_map(if table == BOUNDARIES { lake_events::end } else { lake_events::change }).collect::<Vec<Told>>()
                });
                told.extend(parsing.await.map_err(|_| Error::Interrupted)?);
                if told.len() >= FILE_ROWS {
                    self.send(table, std::mem::take(&mut told)).await?;
                }
            }
        }
        self.send(table, told).await
    }

    async fn send(&self, table: &str, told: Vec<Told>) -> Result<(), Error> {
        let number = |of: fn(&Told) -> Option<i64>| -> ArrayRef { Arc::new(told.iter().map(of).collect::<Int64Array>()) };
        let mut file = File::EMPTY;
        let ops: ArrayRef = Arc::new(told.iter().map(|it| Some(it.op.as_str())).collect::<StringArray>());
        let columns = [
            ("key", number(|it| Some(it.key))),
            ("op", ops),
            ("xid", number(|it| it.xid)),
            ("lsn", number(|it| Some(it.lsn))),
            ("cents", number(|it| Some(it.cents))),
        ];
        file.add(columns)?;
        let Some(staged) = file.upload(&self.session).await? else { return Ok(()) };
        let wide = "number(38, 0)";
        let (into, select) = match table {
            BOUNDARIES => ("lake_ends(xid, lsn)".to_owned(), format!("$1:xid::{wide}, $1:lsn::{wide}")),
            table => {
                (format!("lake_{table}(key, op, xid, lsn, cents)"), format!("$1:key::{wide}, $1:op::varchar, $1:xid::{wide}, $1:lsn::{wide}, $1:cents::{wide}"))
            }
        };
        let copied = staged.copy(&self.session, &into, &select).await;
        staged.remove(&self.session).await;
        Ok(copied?)
    }

    async fn find_snapshot(&mut self, mark: &Mark) -> Result<(), Error> {
        let reads: Vec<String> = TABLES.iter().map(|table| format!("select lsn from lake_{} where op = 'r'", table.name)).collect();
        let sql = format!(
            "select coalesce((select max(lsn) from raw._snapshot_ends), (select max(lsn) from ({}) reads), -1)::number(38, 0)::varchar",
            reads.join(" union all ")
        );
        self.snapshot_lsn = number(&self.session.rows(&sql).await?, 0);
        if self.snapshot_lsn > self.lsn { Err(Error::StaleMark { taken_at: mark.taken_at }) } else { Ok(()) }
    }

    pub(super) async fn records(&mut self, table: &'static str) -> Result<Check, Error> {
        let promised = self.promised.remove(table).unwrap_or_default();
        let upto = self.loaded[table].replace("_partition", "partition").replace("_offset", "\"offset\"");
        let held = format!(
            "select _object as object from {} where {} union all select object from raw._rejected where landed and startswith(object, {}) and {upto}",
            raw_table(table),
            self.loaded[table],
            text(&format!("raw/{table}/"))
        );
        let actual = number(&self.session.rows(&format!("select count(*)::varchar from ({held}) held")).await?, 0);
        let expected = promised.values().sum();
        let mut detail = None;
        if expected != actual {
            let rows = self.session.rows(&format!("select object, count(*)::varchar from ({held}) held group by object")).await?;
            detail = Some(misloaded(promised, rows.iter().filter_map(|row| Some((row.first()?.clone()?, parsed(row, 1)?)))));
        }
        Ok(Check { name: format!("{table}.records.lake_raw"), ok: expected == actual, expected: Amount::Rows(expected), actual: Amount::Rows(actual), detail })
    }

    /// A division is exact only without its rest: Snowflake's quotients have six decimals.
    pub(super) async fn ranges(&mut self, table: &BankTable, place: Place, width: i64) -> Result<Ranges, Error> {
        let Some(state) = self.state(table, place).await? else { return Ok(Ranges::new()) };
        let range = format!("((key - mod(key, {width})) / {width})::number(38, 0)");
        let sql = format!(
            "select {range}::varchar, sum(n)::number(38, 0)::varchar, coalesce(sum(cents), 0)::number(38, 0)::varchar from ({state}) state group by {range}"
        );
        held(&self.session.rows(&sql).await?)
    }

    pub(super) async fn keys(&mut self, table: &BankTable, place: Place, keys: RangeInclusive<i64>) -> Result<Keys, Error> {
        let Some(state) = self.state(table, place).await? else { return Ok(Keys::new()) };
        let sql = format!(
            "select key::number(38, 0)::varchar, sum(n)::number(38, 0)::varchar, coalesce(sum(cents), 0)::number(38, 0)::varchar from ({state}) state where key between {} and {} group by key",
            keys.start(),
            keys.end()
        );
        held(&self.session.rows(&sql).await?)
    }

    async fn state(&self, table: &BankTable, place: Place) -> Result<Option<String>, Error> {
        let needs = match place {
            Place::Source | Place::Lake | Place::Raw => None,
            Place::Staging | Place::StagingAtCut => Some(table.staging.to_owned()),
            Place::Analytics => Some(format!("analytics.{}", table.model)),
        };
        if let Some(needs) = needs
            && !self.warehouse.exists(&needs).await?
        {
            return Ok(None);
        }
        let cents = table.money.map_or_else(|| "0".to_owned(), |money| format!("{money} * 100"));
        Ok(match place {
            Place::Source => None,
            Place::Lake => Some(fold(table, &format!("lake_{}", table.name), "lake_commits", self.snapshot_lsn)),
            Place::Raw => Some(fold(table, &format!("({})", raw_events(table, &self.loaded[table.name])), "raw_commits", self.snapshot_lsn)),
            Place::Staging => Some(staged(table, &cents, &staged_at(self.lsn))),
            Place::StagingAtCut => Some(staged(table, &cents, &format!("tx_lsn <= {}", self.position(table.model).await?))),
            Place::Analytics => Some(format!("select {} as key, 1 as n, {cents} as cents from analytics.{} where {}", table.key, table.model, table.alive)),
        })
    }

    async fn position(&self, model: &str) -> Result<i64, Error> {
        if self.warehouse.exists("staging.positions").await? {
            let rows = self.session.rows(&format!("select max(lsn)::varchar from staging.positions where name = {}", text(model))).await?;
            if let Some(position) = rows.first().and_then(|row| parsed(row, 0)) {
                return Ok(position);
            }
        }
        Ok(self.warehouse.cut().await?.map_or(-1, |cut| cut.lsn.0.cast_signed()))
    }
}

/// Where every model stands.
async fn standing(warehouse: &Snowflake) -> Result<Vec<Row>, Error> {
    if !warehouse.exists("staging.positions").await? {
        return Ok(Vec::new());
    }
    Ok(warehouse.rows("select name, lsn::varchar from staging.positions where name not like 'passed:%' order by name").await?)
}

/// Whether the cut, and every staging model behind it, has reached the mark.
pub(super) async fn reached(warehouse: &Snowflake, mark: &Mark) -> Result<bool, Error> {
    if warehouse.cut().await?.is_none_or(|cut| cut.lsn < mark.lsn) {
        return Ok(false);
    }
    if !warehouse.exists("staging.positions").await? {
        return Ok(true);
    }
    let models: Vec<String> = TABLES.iter().map(|table| text(&format!("stg_bank__{}", table.name))).collect();
    let sql = format!("select count(*)::varchar from staging.positions where name in ({}) and lsn >= {}", models.join(", "), mark.lsn.0.cast_signed());
    Ok(usize::try_from(number(&warehouse.rows(&sql).await?, 0)).is_ok_and(|it| it == TABLES.len()))
}

fn held(rows: &[Row]) -> Result<BTreeMap<i64, Held>, Error> {
    rows.iter()
        .map(|row| match (parsed(row, 0), parsed(row, 1), parsed(row, 2)) {
            (Some(range), Some(rows), Some(cents)) => Ok((range, Held { rows, cents })),
            _ => Err(Error::TooLarge),
        })
        .collect()
}

fn raw_events(table: &BankTable, loaded: &str) -> String {
    let cents = table.money.map_or_else(|| "0".to_owned(), |money| format!("image:{money}::number(18, 2) * 100"));
    format!(
        "select image:id::number(38, 0) as key, iff(op = 'r' and origin:lsn::number(38, 0) is null, '{READ_AGAIN}', op) as op,
           origin:txId::number(38, 0) as xid, coalesce(origin:lsn::number(38, 0), 0) as lsn, {cents} as cents
         from (select v:op::varchar as op, v:source as origin, get(v, iff(v:op::varchar = 'd', 'before', 'after')) as image from {} where v is not null and {loaded}) change",
        raw_table(table.name)
    )
}

fn fold(table: &BankTable, events: &str, commits: &str, snapshot_lsn: i64) -> String {
    let name = table.name;
    format!(
        "select key, 1 as n, cents from (
           select e.key, e.op, e.cents, row_number() over (partition by e.key order by coalesce(c.lsn, e.lsn) desc, e.lsn desc) as age from {events} e
           left join {commits} c on e.op <> 'r' and c.xid = e.xid and e.lsn > c.after_lsn and e.lsn <= c.lsn
           left join lake_{name}_created m on e.op = '{READ_AGAIN}' and m.key = e.key
           where (e.op = 'r' and e.lsn = {snapshot_lsn}) or (e.op = '{READ_AGAIN}' and m.key is null) or (e.op <> 'r' and c.lsn is not null)) latest
         where age = 1 and op <> 'd'"
    )
}

fn staged(table: &BankTable, cents: &str, seen: &str) -> String {
    let (key, staging) = (table.key, table.staging);
    format!(
        "select key, 1 as n, cents from (
           select {key} as key, op, {cents} as cents, rank() over (partition by {key} order by tx_lsn desc, lsn desc) as age from {staging} where {seen}) latest
         where age = 1 and op <> 'd'"
    )
}

/// The commits the mark sees, and those before its position that it does not. `whole turns` by the rest of a division, which
/// is exact.
fn commits(place: &str, mark: &Mark) -> [String; 3] {
    const CIRCLE: i64 = 1 << 32;
    let lsn = mark.lsn.0;
    let (xmin, xmax) = (mark.snapshot.xmin, mark.snapshot.xmax);
    let running: Vec<String> = std::iter::once("-1".to_owned()).chain(mark.snapshot.running.iter().map(u64::to_string)).collect();
    let ahead = format!("({xmax} - xid + 2147483648)");
    [
        format!(
            "create temporary table {place}_all as
             with ends as (select distinct xid, lsn from {place}_ends),
             steps as (select xid, lsn, coalesce(lag(lsn) over (partition by xid order by lsn), 0) as after_lsn, xid - coalesce(lag(xid) over (order by lsn), xid) as step from ends),
             turns as (select xid, lsn, after_lsn, sum(case when step < -2147483648 then 1 when step > 2147483648 then -1 else 0 end) over (order by lsn rows between unbounded preceding and current row) as turn from steps),
             anchor as (select turn, ({ahead} - mod(mod({ahead}, {CIRCLE}) + {CIRCLE}, {CIRCLE})) / {CIRCLE} as circles from turns where lsn <= {lsn} order by lsn desc limit 1),
             numbered as (select turns.xid, turns.lsn, turns.after_lsn, (turns.xid + (anchor.circles + turns.turn - anchor.turn) * {CIRCLE})::number(38, 0) as number
               from turns cross join anchor where turns.lsn <= {lsn})
             select xid, lsn, after_lsn, number < {xmin} or (number < {xmax} and number not in ({})) as seen from numbered",
            running.join(", ")
        ),
        format!("create temporary table {place}_commits as select xid, lsn, after_lsn from {place}_all where seen"),
        format!("create temporary table {place}_unseen as select lsn from {place}_all where not seen"),
    ]
}
