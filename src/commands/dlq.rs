//! `dlq list`, `dlq show` and `dlq replay`: the dead letters.

use serde::Serialize;

use crate::{
    change::{Lsn, Topics},
    cli,
    config::Loaded,
    dlq::{self, Filter, Listing, Outcome, Replay, Report, Shown, Which},
    exit::{Exit, Failure},
    pipeline::services::Needs,
    units::grouped,
};

#[derive(Serialize)]
struct Document<'a, T> {
    schema: u32,
    #[serde(flatten)]
    document: &'a T,
}

pub(super) async fn dlq(loaded: &Loaded, command: cli::Dlq) -> Result<Exit, Failure> {
    if let cli::Dlq::Replay(cli::DlqReplay { all: false, which, .. }) = &command
        && (which.table.is_some() || which.topic.is_some())
    {
        return Err(Failure::new(Exit::Usage, "a table or topic says which of all letters").with_remedy("add --all, or leave --table and --topic out"));
    }
    let interrupted = super::interrupts();
    let needs = Needs { postgres: false, stream: true, lake: false, dbt: false };
    let reach = super::Reach::take(loaded, needs, &interrupted).await?;
    let topics = Topics::new(loaded.config.cdc.topic_prefix.clone());
    let work = async {
        let kafka = &reach.addresses.kafka;
        match command {
            cli::Dlq::List { which, limit, reveal, output } => {
                let listing = dlq::list(kafka, &topics, &filter(which), limit, reveal).await.map_err(|error| Failure::from_error(&error))?;
                say(&listing, &output, list_text)
            }
            cli::Dlq::Show { offset, partition, reveal, output } => {
                let letter = dlq::find(kafka, &topics, partition, offset).await.map_err(|error| asked_in_vain(&error))?;
                say(&letter.shown(&topics, reveal), &output, shown_text)
            }
            cli::Dlq::Replay(asked) => {
                let which = if asked.all { Which::All(filter(asked.which)) } else { Which::Offsets { partition: asked.partition, offsets: asked.offsets } };
                let replay = Replay { which, force: asked.force, dry_run: asked.dry_run };
                let report = dlq::replay(kafka, &topics, &replay).await.map_err(|error| asked_in_vain(&error))?;
                say(&report, &asked.output, report_text)?;
                // Whoever scripts it must not take a letter that stays for one that went.
                let stays = report.still_undecodable + report.not_replayable > 0;
                Ok(if stays && !report.dry_run { Exit::Data } else { Exit::Right })
            }
        }
    };
    let outcome = super::unless_interrupted(&interrupted, work).await;
    reach.release().await;
    outcome
}

fn filter(which: cli::Letters) -> Filter {
    Filter { table: which.table, topic: which.topic }
}

/// An offset that is none is a mistake of whoever typed it.
fn asked_in_vain(error: &dlq::Error) -> Failure {
    match error {
        dlq::Error::NoLetter { .. } => Failure::usage(error),
        _ => Failure::from_error(error),
    }
}

fn say<T: Serialize>(document: &T, output: &cli::Output, text: fn(&T) -> String) -> Result<Exit, Failure> {
    if output.json {
        super::print_json(&Document { schema: 1, document })?;
    } else {
        super::print(&text(document))?;
    }
    Ok(Exit::Right)
}

fn list_text(listing: &Listing) -> String {
    if listing.held == 0 {
        return format!("no dead letters in {}\n", listing.topic);
    }
    let mut text = format!("{}: {} letters", listing.topic, grouped(listing.held));
    if listing.looked_at < listing.held {
        text += &format!(", the newest {} looked at", grouped(listing.looked_at));
    }
    if listing.wanted < listing.looked_at {
        text += &format!(", {} of them as asked", grouped(listing.wanted));
    }
    text.push('\n');
    for it in &listing.reasons {
        text += &format!("{:>10}  {:<8} {}\n", grouped(it.letters), it.written_by, it.reason);
    }
    if listing.letters.is_empty() {
        return text;
    }
    text.push('\n');
    for it in &listing.letters {
        let at = it.at.map_or_else(|| "no time".to_owned(), |at| at.format("%F %T").to_string());
        let whence = match (it.source_partition, it.source_offset) {
            (Some(partition), Some(offset)) => format!("[{partition}]@{offset}"),
            _ => String::new(),
        };
        let from = it.topic.as_deref().unwrap_or("unknown table");
        text += &format!("{:>10}  {at}  {:<8} {from}{whence} · {}\n", place(it), it.written_by, it.reason);
        if it.revealed.is_some() {
            text += &bytes_text(it);
        }
    }
    text
}

/// The offset; with its partition where that is not the first.
fn place(letter: &Shown) -> String {
    if letter.partition == 0 { letter.offset.to_string() } else { format!("p={} {}", letter.partition, letter.offset) }
}

fn shown_text(letter: &Shown) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            text += &format!("{name:<14} {value}\n");
        }
    };
    let time = |it: chrono::DateTime<chrono::Utc>| it.format("%F %T%.3f UTC").to_string();
    line("letter", Some(format!("p={} offset {}", letter.partition, letter.offset)));
    line("written", letter.at.map(time));
    line("written by", Some(letter.written_by.to_owned()));
    line("reason", Some(letter.reason.clone()));
    line("table", letter.table.clone());
    line("topic", letter.topic.clone());
    let source = letter.source_partition.zip(letter.source_offset);
    line("record", source.map(|(partition, offset)| format!("p={partition} offset {offset}")));
    line("record of", letter.source_at.map(time));
    line("op", letter.op.clone());
    line("txId", letter.tx_id.map(|it| it.to_string()));
    line("lsn", letter.lsn.and_then(|it| u64::try_from(it).ok()).map(|it| format!("{} ({it})", Lsn(it))));
    line("primary key", letter.key.clone());
    line("bytes", Some(format!("key {} · value {}", grouped(letter.key_bytes), grouped(letter.value_bytes))));
    if letter.revealed.is_none() {
        text += "               --reveal shows them; they may hold a customer's data\n";
    }
    text + &bytes_text(letter)
}

fn bytes_text(letter: &Shown) -> String {
    let Some(revealed) = &letter.revealed else { return String::new() };
    let mut text = String::new();
    for (name, content) in [("key", &revealed.key), ("value", &revealed.value)] {
        match content {
            None => text += &format!("{name:<14} none\n"),
            Some(content) => {
                let mark = if content.is_utf8 { "" } else { "  (not UTF-8: � stands for what is no text)" };
                text += &format!("{name:<14} {}{mark}\n{:<14} {}\n", content.utf8, format!("{name} hex"), content.hex);
            }
        }
    }
    text
}

fn report_text(report: &Report) -> String {
    if report.letters == 0 {
        return format!("no such letters in {}\n", report.topic);
    }
    let would = if report.dry_run { "would be " } else { "" };
    let mut text = String::new();
    for it in &report.handled {
        let said = match &it.outcome {
            Outcome::Replayed { topic, partition, again_a_letter: false } => format!("{would}put back to {topic}[{partition}]"),
            Outcome::Replayed { topic, partition, again_a_letter: true } => {
                format!("{would}put back to {topic}[{partition}], where it becomes a letter again: it still cannot be decoded")
            }
            Outcome::StillUndecodable { why } => format!("stays: {why}, it would become a letter again (--force puts it back all the same)"),
            Outcome::Repeat => "stays: the same record as an earlier letter".to_owned(),
            Outcome::NotReplayable { why, remedy } => format!("stays: {why}\n{:12}→ {remedy}", ""),
        };
        text += &format!("{:>10}  {said}\n", it.offset);
    }
    let stay = report.still_undecodable + report.repeats + report.not_replayable;
    text + &format!("{} letters: {} {would}put back, {} stay\n", grouped(report.letters), grouped(report.replayed), grouped(stay))
}
