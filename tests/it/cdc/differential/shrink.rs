//! From a case on which the engines differ to the fewest parts of it on which they still do.
//!
//! A start of both engines takes seconds and a schema nothing, so each round tries many smaller cases at once, of all that fail.

use super::{
    case::{Case, Part},
    compare::Difference,
};

pub(super) type Failing = (Case, Vec<Difference>);

const CASES_BY_ROUND: usize = 32;
const ROUNDS_MAX: usize = 20;
const PIECES_AT_FIRST: usize = 10;

struct Shrinking {
    smallest: Failing,
    /// Into how many pieces its parts are cut, one of which is left out.
    pieces: usize,
    /// The pieces before it cannot be left out.
    next: usize,
    /// The case without all the pieces that could be left out one by one: it may have become too small.
    hopeful: Option<Case>,
    finished: bool,
}

/// A smaller case, and which piece it is without.
type Smaller = (Option<usize>, Case);

/// `judge` says of each case how the engines differ on it.
pub(super) async fn all(failing: Vec<Failing>, judge: impl AsyncFn(&[Case]) -> Vec<Vec<Difference>>) -> Vec<Failing> {
    let mut all: Vec<Shrinking> = failing.into_iter().map(Shrinking::new).collect();
    for _ in 0..ROUNDS_MAX {
        let n_unfinished = all.iter().filter(|it| !it.finished).count();
        if n_unfinished == 0 {
            break;
        }
        let smaller: Vec<Vec<Smaller>> = all.iter().map(|it| it.smaller((CASES_BY_ROUND / n_unfinished).max(2))).collect();
        let cases: Vec<Case> = smaller.iter().flatten().map(|(_, case)| case.clone()).collect();
        let mut judged = judge(&cases).await.into_iter();
        for (shrinking, smaller) in all.iter_mut().zip(smaller) {
            let judged = judged.by_ref().take(smaller.len()).collect();
            shrinking.go_on(smaller, judged);
        }
    }
    all.into_iter().map(|it| it.smallest).collect()
}

impl Shrinking {
    fn new(smallest: Failing) -> Self {
        let pieces = PIECES_AT_FIRST.min(smallest.0.parts().len());
        Self { smallest, pieces, next: 0, hopeful: None, finished: pieces == 0 }
    }

    fn without(&self, pieces: &[usize]) -> Case {
        let (case, _) = &self.smallest;
        let parts = case.parts();
        let piece = |at: usize| &parts[at * parts.len() / self.pieces..(at + 1) * parts.len() / self.pieces];
        let left: Vec<Part> = parts.iter().copied().filter(|part| !pieces.iter().any(|at| piece(*at).contains(part))).collect();
        case.with_only(&left)
    }

    fn smaller(&self, cases_max: usize) -> Vec<Smaller> {
        if self.finished {
            return Vec::new();
        }
        let pieces = (self.next..self.pieces).map(|at| (Some(at), self.without(&[at])));
        self.hopeful.iter().map(|case| (None, case.clone())).chain(pieces).take(cases_max).collect()
    }

    fn go_on(&mut self, tried: Vec<Smaller>, judged: Vec<Vec<Difference>>) {
        let n_parts = self.smallest.0.parts().len();
        let n_pieces = tried.iter().filter(|(piece, _)| piece.is_some()).count();
        let failing: Vec<(Option<usize>, Failing)> = tried
            .into_iter()
            .zip(judged)
            .filter(|((_, case), differences)| !differences.is_empty() && case.parts().len() < n_parts)
            .map(|((piece, case), differences)| (piece, (case, differences)))
            .collect();
        let not_needed: Vec<usize> = failing.iter().filter_map(|(piece, _)| *piece).collect();
        self.hopeful = (not_needed.len() > 1).then(|| self.without(&not_needed));
        let smallest = failing.into_iter().map(|(_, it)| it).min_by_key(|(case, _)| case.parts().len());
        match smallest {
            Some(found) => {
                self.smallest = found;
                self.next = 0;
                self.pieces = self.pieces.min(self.smallest.0.parts().len());
                self.finished = self.pieces == 0;
            }
            None if self.next + n_pieces < self.pieces => self.next += n_pieces,
            None if self.pieces >= n_parts => self.finished = true,
            None => (self.next, self.pieces) = (0, (self.pieces * 2).min(n_parts)),
        }
    }
}

/// What the engines would differ on: a column of a certain name that is set to a certain value by a COPY, once something was deleted.
#[tokio::test]
async fn a_case_shrinks_to_the_few_statements_that_it_takes() {
    let told = |script: &str| {
        let table =
            script.lines().find(|it| it.starts_with("create table") && it.contains("serial")).map(|it| it.split('"').nth(1).unwrap_or_default().to_owned());
        let name = table.unwrap_or_default();
        let copies = script.find(&format!("copy \"{name}\""));
        let deletes = script.find("delete from");
        !name.is_empty() && copies.zip(deletes).is_some_and(|(copies, deletes)| deletes < copies)
    };
    let judge = async |cases: &[Case]| -> Vec<Vec<Difference>> {
        let difference = Difference { topic: "t".to_owned(), what: "different".to_owned() };
        cases.iter().map(|case| if told(&case.script()) { vec![difference.clone()] } else { Vec::new() }).collect()
    };
    let all_cases: Vec<Case> = (0..400).map(super::generate::case).collect();
    let failing: Vec<Failing> = all_cases.iter().cloned().zip(judge(&all_cases).await).filter(|(_, it)| !it.is_empty()).take(3).collect();
    assert_eq!(failing.len(), 3, "some seeds do all that");
    let before: Vec<usize> = failing.iter().map(|(case, _)| case.parts().len()).collect();
    for ((case, differences), before) in all(failing, judge).await.into_iter().zip(before) {
        let script = case.script();
        assert!(told(&script) && !differences.is_empty(), "it is still one that fails: {script}");
        let n_statements: usize = case.phases.iter().map(Vec::len).sum();
        assert!(before > 20 && n_statements == 2 && case.tables.len() <= 2, "{before} parts became:\n{script}");
    }
}
