//! Outcomes → subject and body (pure). Plain text first, for a terminal; the HTML says the same.

use std::fmt::Write as _;

use chrono::{DateTime, SecondsFormat, Utc};

use crate::units::{Span, grouped};

/// What is sent: the same words twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Letter {
    pub subject: String,
    pub text: String,
    pub html: String,
}

/// The run a letter is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    pub dag_id: String,
    pub run_id: String,
    pub started_at: DateTime<Utc>,
    /// When the letter was written.
    pub now: DateTime<Utc>,
}

/// What a loading run brought in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableLoad {
    pub table: String,
    pub files: u64,
    pub rows: u64,
}

/// Outcomes of dbt's tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct TestCounts {
    pub pass: u64,
    pub warn: u64,
    pub fail: u64,
    pub error: u64,
    pub skip: u64,
}

/// What a transformation run built.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Transformation {
    /// Task and seconds, in order.
    pub tasks: Vec<(String, f64)>,
    pub models: u64,
    pub snapshots: u64,
    pub tests: TestCounts,
    /// Name and value, ready to be read.
    pub kpis: Vec<(String, String)>,
    /// The commit time up to which the numbers hold.
    pub as_of: Option<DateTime<Utc>>,
    /// Name, whether it holds, expected, actual.
    pub checks: Vec<(String, bool, String, String)>,
}

/// A task that failed for good.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Failure {
    pub task_id: String,
    pub tries: u32,
    pub error: String,
    pub tests: Vec<FailedTest>,
    /// Tasks that did not run because of it.
    pub held_up: Vec<String>,
    /// Earlier failures of this task since the last letter about it.
    pub held_letters: u32,
    /// The shortest time between two letters about it.
    pub repeat_after: Option<Span>,
}

/// A dbt test that failed, with some of the rows it found.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct FailedTest {
    pub name: String,
    pub message: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
    /// Where the compiled SQL is, to run it by hand.
    pub compiled: Option<String>,
}

/// Files and rows per table.
pub fn load_report(run: &Subject, tables: &[TableLoad]) -> Letter {
    let (files, rows): (u64, u64) = tables.iter().fold((0, 0), |sum, it| (sum.0 + it.files, sum.1 + it.rows));
    let subject = format!("Loaded {} rows from {} files · {}", grouped(rows), grouped(files), run.dag_id);
    let mut page = Page::new(&subject);
    page.run(run);
    let mut lines: Vec<Vec<String>> = tables.iter().map(|it| vec![it.table.clone(), grouped(it.files), grouped(it.rows)]).collect();
    lines.push(vec!["all tables".to_owned(), grouped(files), grouped(rows)]);
    page.table(&["table", "files", "rows"], &lines);
    if rows == 0 {
        page.say("Nothing new had landed in the lake since the last load.");
    }
    page.letter()
}

/// Run status, tests, reconciliation and the numbers.
pub fn transformation_report(run: &Subject, done: &Transformation) -> Letter {
    let tests = done.tests;
    let whole = tests.fail == 0 && tests.error == 0 && done.checks.iter().all(|it| it.1);
    let status = if whole { "succeeded" } else { "FAILED" };
    let subject = format!("Transformation {status}: {} tests passed, {} failed · {}", grouped(tests.pass), grouped(tests.fail + tests.error), run.dag_id);
    let mut page = Page::new(&subject);
    page.run(run);
    page.say(&format!("{} models and {} snapshots built.", grouped(done.models), grouped(done.snapshots)));
    let counts = [tests.pass, tests.warn, tests.fail, tests.error, tests.skip].map(grouped);
    page.table(&["tests passed", "warned", "failed", "in error", "skipped"], &[counts.to_vec()]);
    if !done.checks.is_empty() {
        page.heading("Reconciliation");
        let line = |it: &(String, bool, String, String)| vec![it.0.clone(), if it.1 { "equal" } else { "DIFFERS" }.to_owned(), it.2.clone(), it.3.clone()];
        page.table(&["check", "", "expected", "actual"], &done.checks.iter().map(line).collect::<Vec<_>>());
    }
    if !done.kpis.is_empty() {
        page.heading(&done.as_of.map_or("Key figures".to_owned(), |at| format!("Key figures as of {}", clock(at))));
        page.table(&["figure", "value"], &done.kpis.iter().map(|it| vec![it.0.clone(), it.1.clone()]).collect::<Vec<_>>());
    }
    page.heading("Tasks");
    page.table(&["task", "seconds"], &done.tasks.iter().map(|it| vec![it.0.clone(), format!("{:.2}", it.1)]).collect::<Vec<_>>());
    page.letter()
}

/// Which task, why, which rows, and what to do now.
pub fn failure(run: &Subject, failed: &Failure) -> Letter {
    let first_line = failed.error.lines().next().unwrap_or_default();
    let subject = format!("FAILED {}: {} · {}", failed.task_id, shortened(first_line, 120), run.dag_id);
    let mut page = Page::new(&format!("{} failed after {}", failed.task_id, tries(failed.tries)));
    page.run(run);
    page.verbatim(&failed.error);
    for test in &failed.tests {
        page.heading(&test.name);
        if !test.message.is_empty() {
            page.say(&test.message);
        }
        if !test.rows.is_empty() {
            let columns: Vec<&str> = test.columns.iter().map(String::as_str).collect();
            page.table(&columns, &test.rows);
        }
        if let Some(path) = &test.compiled {
            page.say(&format!("Its SQL: {path}"));
        }
    }
    if !failed.held_up.is_empty() {
        page.say(&format!("Did not run because of it: {}.", failed.held_up.join(", ")));
    }
    page.heading("What to do");
    page.say("Mend the cause, then run the task again. In the console: 3 for the DAGs, choose the task, r. Or on the command line:");
    page.verbatim(&format!("ledgerline dag retry {} {} --run-id '{}'", run.dag_id, failed.task_id, run.run_id));
    if failed.held_letters > 0 {
        page.say(&format!("It failed {} more times since the last letter about it.", grouped(failed.held_letters.into())));
    }
    if let Some(limit) = failed.repeat_after {
        page.say(&format!("While it keeps failing you hear of it at most every {limit}, and once when it has recovered."));
    }
    page.letter_with(subject)
}

/// A task that failed before works again.
pub fn recovery(run: &Subject, task_id: &str, failing_since: DateTime<Utc>, failures: u32) -> Letter {
    let subject = format!("Recovered {task_id} · {}", run.dag_id);
    let mut page = Page::new(&format!("{task_id} works again"));
    page.run(run);
    page.say(&format!("It had failed since {}, {} times. Nothing needs to be done.", clock(failing_since), grouped(failures.into())));
    page.letter_with(subject)
}

fn tries(tries: u32) -> String {
    if tries == 1 { "1 try".to_owned() } else { format!("{tries} tries") }
}

fn clock(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

fn shortened(text: &str, characters_max: usize) -> String {
    if text.chars().count() <= characters_max { text.to_owned() } else { text.chars().take(characters_max).chain(['…']).collect() }
}

/// A letter in the making, in both forms.
struct Page {
    title: String,
    text: String,
    html: String,
}

impl Page {
    fn new(title: &str) -> Self {
        Self { title: title.to_owned(), text: format!("{title}\n"), html: format!("<h2>{}</h2>\n", escaped(title)) }
    }

    fn run(&mut self, run: &Subject) {
        let seconds = (run.now - run.started_at).to_std().unwrap_or_default().as_secs_f64();
        self.say(&format!("{}\n{}\nstarted {}, {seconds:.1} s ago", run.dag_id, run.run_id, clock(run.started_at)));
    }

    fn heading(&mut self, heading: &str) {
        let _ = write!(self.text, "\n{heading}\n{}\n", "-".repeat(heading.chars().count()));
        let _ = writeln!(self.html, "<h3>{}</h3>", escaped(heading));
    }

    fn say(&mut self, sentence: &str) {
        let _ = write!(self.text, "\n{sentence}\n");
        let _ = writeln!(self.html, "<p>{}</p>", escaped(sentence).replace('\n', "<br>"));
    }

    fn verbatim(&mut self, block: &str) {
        self.text.push('\n');
        for line in block.lines() {
            let _ = writeln!(self.text, "    {line}");
        }
        let _ = writeln!(self.html, "<pre>{}</pre>", escaped(block));
    }

    /// Columns of numbers are right-aligned.
    fn table(&mut self, heads: &[&str], rows: &[Vec<String>]) {
        let columns = heads.len();
        let cells = |column: usize| rows.iter().filter_map(move |row| row.get(column));
        let widths: Vec<usize> =
            (0..columns).map(|it| cells(it).map(|cell| cell.chars().count()).chain([heads[it].chars().count()]).max().unwrap_or(0)).collect();
        let right: Vec<bool> = (0..columns).map(|it| cells(it).next().is_some() && cells(it).all(|cell| is_number(cell))).collect();
        self.text.push('\n');
        let head: Vec<String> = heads.iter().map(|it| (*it).to_owned()).collect();
        for row in std::iter::once(&head).chain(rows) {
            let mut line = String::from(" ");
            for (column, cell) in row.iter().enumerate().take(columns) {
                let width = widths[column];
                let _ = if right[column] { write!(line, " {cell:>width$} ") } else { write!(line, " {cell:<width$} ") };
            }
            let _ = writeln!(self.text, "{}", line.trim_end());
        }
        self.html.push_str("<table border=\"1\" cellpadding=\"4\" style=\"border-collapse:collapse\">\n");
        for (place, row) in std::iter::once(&head).chain(rows).enumerate() {
            let tag = if place == 0 { "th" } else { "td" };
            self.html.push_str("<tr>");
            for (column, cell) in row.iter().enumerate().take(columns) {
                let side = if right[column] { " align=\"right\"" } else { " align=\"left\"" };
                let _ = write!(self.html, "<{tag}{side}>{}</{tag}>", escaped(cell));
            }
            self.html.push_str("</tr>\n");
        }
        self.html.push_str("</table>\n");
    }

    fn letter(self) -> Letter {
        let subject = self.title.clone();
        self.letter_with(subject)
    }

    fn letter_with(self, subject: String) -> Letter {
        let subject = subject.replace(['\r', '\n'], " ");
        Letter { subject, text: self.text, html: format!("<!doctype html>\n<html><body>\n{}</body></html>\n", self.html) }
    }
}

fn is_number(cell: &str) -> bool {
    cell.bytes().any(|byte| byte.is_ascii_digit()) && cell.bytes().all(|byte| byte.is_ascii_digit() || b".,-".contains(&byte))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> Subject {
        let at = |text: &str| text.parse().expect("a time");
        Subject {
            dag_id: "demo".into(),
            run_id: "scheduled__2026-11-22T12:00:00+00:00".into(),
            started_at: at("2026-11-22T12:00:00Z"),
            now: at("2026-11-22T12:00:01.250Z"),
        }
    }

    #[test]
    fn a_load_report_lists_files_and_rows_per_table_and_their_sum() {
        let tables = [TableLoad { table: "customers".into(), files: 2, rows: 230 }, TableLoad { table: "ledger_entries".into(), files: 10, rows: 1_304_059 }];
        let letter = load_report(&run(), &tables);
        assert_eq!(letter.subject, "Loaded 1,304,289 rows from 12 files · demo");
        let expected = "\
Loaded 1,304,289 rows from 12 files · demo

demo
scheduled__2026-11-22T12:00:00+00:00
started 2026-11-22T12:00:00Z, 1.2 s ago

  table           files       rows
  customers           2        230
  ledger_entries     10  1,304,059
  all tables         12  1,304,289
";
        assert_eq!(letter.text, expected);
        assert!(letter.html.contains("<td align=\"right\">1,304,059</td>"));
    }

    #[test]
    fn a_failure_says_which_task_why_which_rows_and_what_to_do() {
        let test = FailedTest {
            name: "assert_ledger_balances".into(),
            message: "Got 1 result, configured to fail if != 0".into(),
            columns: vec!["transaction_id".into(), "difference".into()],
            rows: vec![vec!["77".into(), "0.01".into()]],
            compiled: Some("target/compiled/assert_ledger_balances.sql".into()),
        };
        let failed = Failure {
            task_id: "dbt_test_analytics".into(),
            tries: 1,
            error: "1 of 46 tests failed: <assert_ledger_balances>\nlook at the rows".into(),
            tests: vec![test],
            held_up: vec!["reconcile".into(), "refresh_kpis".into()],
            held_letters: 119,
            repeat_after: Some(Span::from_secs(3600)),
        };
        let letter = failure(&run(), &failed);
        assert_eq!(letter.subject, "FAILED dbt_test_analytics: 1 of 46 tests failed: <assert_ledger_balances> · demo");
        for part in [
            "dbt_test_analytics failed after 1 try",
            "    look at the rows",
            "  transaction_id  difference\n              77        0.01\n",
            "target/compiled/assert_ledger_balances.sql",
            "reconcile, refresh_kpis",
            "ledgerline dag retry demo dbt_test_analytics --run-id 'scheduled__2026-11-22T12:00:00+00:00'",
            "119 more times",
            "at most every 1h",
        ] {
            assert!(letter.text.contains(part), "{part:?} in\n{}", letter.text);
        }
        assert!(letter.html.contains("&lt;assert_ledger_balances&gt;") && !letter.html.contains("<assert"));
    }

    #[test]
    fn a_transformation_report_is_green_only_if_tests_and_reconciliation_are() {
        let mut done = Transformation {
            tasks: vec![("dbt_staging".into(), 0.314)],
            models: 9,
            snapshots: 2,
            tests: TestCounts { pass: 46, ..TestCounts::default() },
            kpis: vec![("total_balance".into(), "640,930.12".into())],
            as_of: Some(run().started_at),
            checks: vec![("accounts rows".into(), true, "569".into(), "569".into())],
        };
        let letter = transformation_report(&run(), &done);
        assert_eq!(letter.subject, "Transformation succeeded: 46 tests passed, 0 failed · demo");
        assert!(letter.text.contains("as of 2026-11-22T12:00:00Z") && letter.text.contains("640,930.12") && letter.text.contains("equal"), "{}", letter.text);
        done.checks[0].1 = false;
        assert!(transformation_report(&run(), &done).subject.starts_with("Transformation FAILED"));
    }

    #[test]
    fn a_recovery_says_since_when_it_had_failed() {
        let letter = recovery(&run(), "load_customers", run().started_at, 1200);
        assert!(letter.text.contains("since 2026-11-22T12:00:00Z, 1,200 times"), "{}", letter.text);
    }
}
