//! The same on Snowflake, which has no snapshot over several statements: where analytics stands is read before and after.

use std::time::Duration;

use chrono::{DateTime, NaiveDate, Utc};

use super::{ANALYTICS, Added, Error, MODELS, Reading, Sums, TEN};
use crate::{
    change::Lsn,
    latency::Histogram,
    warehouse::{
        self, Cut,
        snowflake::{Row, Snowflake, parsed, text},
    },
};

pub(super) async fn read_as_of(warehouse: &Snowflake) -> Result<Reading, Error> {
    for model in MODELS {
        if !warehouse.exists(&format!("analytics.{model}")).await.map_err(warehouse::Error::from)? {
            return Err(Error::NotYet);
        }
    }
    let cut = standing(warehouse).await?;
    // Sums have the scale of what they add up, times one hundred: whole.
    let sql = format!("select what::varchar, name::varchar, to_char(day, 'YYYY-MM-DD'), id::varchar, cents::varchar, n::varchar from ({ANALYTICS}{TEN}) ten");
    let rows = warehouse.rows(&sql).await.map_err(warehouse::Error::from)?;
    if standing(warehouse).await? != cut {
        return Err(Error::Torn);
    }
    Ok(Reading { cut, kpis: Sums::new(rows.iter().map(added))?.kpis()? })
}

fn added(row: &Row) -> Added {
    let word = |place: usize| row.get(place).cloned().flatten();
    Added {
        what: word(0).unwrap_or_default(),
        name: word(1),
        day: word(2).and_then(|it| NaiveDate::parse_from_str(&it, "%Y-%m-%d").ok()),
        id: parsed(row, 3),
        cents: word(4),
        n: parsed(row, 5).unwrap_or_default(),
    }
}

/// The cut at which all models the KPIs need stand.
async fn standing(warehouse: &Snowflake) -> Result<Option<Cut>, Error> {
    let failed = warehouse::Error::from;
    if !warehouse.exists("staging.positions").await.map_err(failed)? {
        return Ok(warehouse.cut().await.map_err(failed)?);
    }
    let names: Vec<String> = MODELS.iter().map(|it| text(it)).collect();
    let sql = format!("select distinct lsn::varchar from staging.positions where name in ({})", names.join(", "));
    let positions: Vec<i64> = warehouse.rows(&sql).await.map_err(failed)?.iter().filter_map(|row| parsed(row, 0)).collect();
    match positions[..] {
        [] => Ok(warehouse.cut().await.map_err(failed)?),
        [position] => Ok(warehouse.cut_where(&format!("lsn = {position}")).await.map_err(failed)?),
        _ => Err(Error::Torn),
    }
}

/// One measurer at a time: the row of `raw._shown` is moved by a conditional UPDATE, and who moves nothing measures nothing.
pub(super) async fn measure(warehouse: &Snowflake, upto: Lsn, shown_at: DateTime<Utc>) -> Result<Histogram, Error> {
    let failed = warehouse::Error::from;
    let mut took = Histogram::default();
    if !warehouse.exists("staging.commits").await.map_err(failed)? {
        return Ok(took);
    }
    let (upto, at) = (upto.0.cast_signed(), text(&shown_at.format("%F %T%.3f").to_string()));
    let shown = warehouse.rows("select max(lsn)::varchar from raw._shown").await.map_err(failed)?;
    let after: Option<i64> = shown.first().and_then(|row| parsed(row, 0));
    if after.is_some_and(|it| it >= upto) {
        return Ok(took);
    }
    let moving = match after {
        Some(after) => format!("update raw._shown set lsn = {upto}, shown_at = {at}::timestamp_ntz where lsn = {after}"),
        None => format!("insert into raw._shown(lsn, shown_at) select {upto}, {at}::timestamp_ntz where not exists (select 1 from raw._shown)"),
    };
    let moved = warehouse.rows(&moving).await.map_err(failed)?;
    if moved.first().and_then(|row| parsed::<u64>(row, 0)) == Some(0) {
        return Ok(took);
    }
    // xid ≤ 0 is the initial snapshot: its rows were committed long before we came.
    let sql = format!(
        "select ms::varchar, count(*)::varchar from (select greatest({} - floor(committed_micros / 1000), 0)::number(38, 0) as ms
         from staging.commits where xid > 0 and lsn > {} and lsn <= {upto}) waited group by ms",
        shown_at.timestamp_millis(),
        after.unwrap_or(-1)
    );
    for row in warehouse.rows(&sql).await.map_err(failed)? {
        if let (Some(ms), Some(commits)) = (parsed(&row, 0), parsed(&row, 1)) {
            took.record_many(Duration::from_millis(ms), commits);
        }
    }
    Ok(took)
}
