//! From a case on which the engines differ to the fewest parts of it on which they still do.
//!
//! A start of both engines takes seconds and a schema nothing, so each round tries many smaller cases at once, of all that fail.

use super::{
    case::{Case, Part},
    compare::Difference,
    run,
};

type Failing = (Case, Vec<Difference>);

const CASES_BY_ROUND: usize = 20;
const ROUNDS_MAX: usize = 14;

struct Shrinking {
    smallest: Failing,
    /// Into how many pieces its parts are cut, one of which is left out.
    pieces: usize,
    finished: bool,
}

pub(super) async fn all(failing: Vec<Failing>) -> Vec<Failing> {
    let mut all: Vec<Shrinking> = failing.into_iter().map(|smallest| Shrinking { smallest, pieces: 4, finished: false }).collect();
    for _ in 0..ROUNDS_MAX {
        let share = CASES_BY_ROUND / all.iter().filter(|it| !it.finished).count().max(1);
        let mut cases = Vec::new();
        for (place, shrinking) in all.iter().enumerate().filter(|(_, it)| !it.finished) {
            cases.extend(shrinking.smaller(share.max(2)).into_iter().map(|case| (place, case)));
        }
        if cases.is_empty() {
            break;
        }
        let only: Vec<Case> = cases.iter().map(|(_, case)| case.clone()).collect();
        let differences = run::both(&only).await.differences();
        for (place, shrinking) in all.iter_mut().enumerate().filter(|(_, it)| !it.finished) {
            let mut found: Vec<Failing> = Vec::new();
            for (at, (_, case)) in cases.iter().enumerate().filter(|(_, it)| it.0 == place) {
                let own: Vec<Difference> = differences.iter().filter(|it| it.concerns(at)).cloned().collect();
                if !own.is_empty() {
                    found.push((case.clone(), own));
                }
            }
            shrinking.go_on(found.into_iter().min_by_key(|(case, _)| case.parts().len()));
        }
    }
    all.into_iter().map(|it| it.smallest).collect()
}

impl Shrinking {
    /// The case without one piece, and with one piece alone.
    fn smaller(&self, cases_max: usize) -> Vec<Case> {
        let (case, _) = &self.smallest;
        let parts = case.parts();
        let pieces = self.pieces.min(parts.len()).max(1);
        let piece = |at: usize| &parts[at * parts.len() / pieces..(at + 1) * parts.len() / pieces];
        let mut smaller = Vec::new();
        for at in 0..pieces {
            let without: Vec<Part> = parts.iter().copied().filter(|it| !piece(at).contains(it)).collect();
            smaller.push(case.with_only(&without));
        }
        // Fair to all pieces where they are too many for one round.
        let step = smaller.len().div_ceil(cases_max).max(1);
        let first = self.pieces % step;
        smaller.into_iter().skip(first).step_by(step).collect()
    }

    fn go_on(&mut self, smaller: Option<Failing>) {
        let n_parts = self.smallest.0.parts().len();
        match smaller.filter(|(case, _)| case.parts().len() < n_parts) {
            Some(found) => {
                self.smallest = found;
                self.pieces = (self.pieces - 1).max(4);
            }
            None if self.pieces >= n_parts => self.finished = true,
            None => self.pieces = (self.pieces * 2).min(n_parts),
        }
    }
}
