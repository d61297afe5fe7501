//! Runs checks on a bed.
#![forbid(unsafe_code)]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::bed::{Bed, BedKind};
use crate::check::{Check, Context, Failure, Verdict};
use crate::trace::Trace;

/// How long a check may take before it counts as hanging. Its thread is then left behind.
pub const TIME_LIMIT: Duration = Duration::from_secs(120);

/// How a check ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All held.
    Passed,
    /// Something did not.
    Failed {
        /// What was expected, what came.
        reason: String,
        /// The last exchanges, oldest first.
        exchanges: Vec<String>,
    },
    /// The check could not be made on this bed.
    Skipped {
        /// Why.
        reason: String,
    },
}

/// The result of one check.
#[derive(Debug, Clone)]
pub struct Record {
    /// The check.
    pub check: &'static Check,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took.
    pub time: Duration,
}

/// The results of a run on one bed.
#[derive(Debug, Clone)]
pub struct Run {
    /// The bed.
    pub bed: BedKind,
    /// In the order of the checks.
    pub records: Vec<Record>,
    /// How long all of it took.
    pub time: Duration,
}

impl Run {
    /// Number of checks that passed, failed, and were skipped.
    pub fn counts(&self) -> (usize, usize, usize) {
        let count = |wanted: fn(&Outcome) -> bool| {
            let records = self.records.iter();
            records.filter(|record| wanted(&record.outcome)).count()
        };
        (
            count(|outcome| *outcome == Outcome::Passed),
            count(|outcome| matches!(outcome, Outcome::Failed { .. })),
            count(|outcome| matches!(outcome, Outcome::Skipped { .. })),
        )
    }

    /// True if no check failed.
    pub fn passed(&self) -> bool {
        self.counts().1 == 0
    }
}

/// Runs `checks` one after the other. `progress` is told before each check, with its number from
/// 0, and after it with its record.
pub fn run(
    bed: &Arc<dyn Bed>,
    checks: &[&'static Check],
    mut progress: impl FnMut(usize, &'static Check, Option<&Record>),
) -> Run {
    let start = Instant::now();
    let mut records = Vec::new();
    for (index, check) in checks.iter().enumerate() {
        progress(index, check, None);
        let record = run_one(bed, check, TIME_LIMIT);
        progress(index, check, Some(&record));
        records.push(record);
    }
    Run {
        bed: bed.kind(),
        records,
        time: start.elapsed(),
    }
}

/// Runs one check on a thread of its own.
pub fn run_one(bed: &Arc<dyn Bed>, check: &'static Check, limit: Duration) -> Record {
    let start = Instant::now();
    let outcome = if check.beds.contains(&bed.kind()) {
        execute(bed, check, limit)
    } else {
        let beds: Vec<_> = check.beds.iter().map(|bed| bed.name()).collect();
        Outcome::Skipped {
            reason: format!("runs only on {}", beds.join(", ")),
        }
    };
    Record {
        check,
        outcome,
        time: start.elapsed(),
    }
}

fn execute(bed: &Arc<dyn Bed>, check: &'static Check, limit: Duration) -> Outcome {
    let trace = Arc::new(Trace::default());
    let context = Context::new(bed.clone(), trace.clone());
    let (done, ended) = channel();
    let body = move || {
        let verdict = catch_unwind(AssertUnwindSafe(|| (check.run)(&context)));
        // The machine is gone by now; nobody listens any more after the time limit.
        let _ = done.send(verdict);
    };
    let thread = thread::Builder::new().name(check.name.into()).spawn(body);
    let reason = match thread {
        Err(error) => format!("no thread for the check: {error}"),
        Ok(_) => match ended.recv_timeout(limit) {
            Ok(Ok(verdict)) => return conclude(verdict, &trace),
            Ok(Err(panic)) => format!("panic: {}", panic_text(&*panic)),
            Err(RecvTimeoutError::Timeout) => format!("no end within {} s", limit.as_secs()),
            Err(RecvTimeoutError::Disconnected) => "the check's thread died".to_owned(),
        },
    };
    Outcome::Failed {
        reason,
        exchanges: trace.lines(),
    }
}

fn conclude(verdict: Verdict, trace: &Trace) -> Outcome {
    match verdict {
        Ok(()) => Outcome::Passed,
        Err(Failure::Skip(reason)) => Outcome::Skipped { reason },
        Err(failure) => Outcome::Failed {
            reason: failure.to_string(),
            exchanges: trace.lines(),
        },
    }
}

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        return (*text).to_owned();
    }
    match panic.downcast_ref::<String>() {
        Some(text) => text.clone(),
        None => "without a message".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::beds::sim::Sim;
    use crate::check::{REAL, equal};

    fn outcome_within(limit: Duration, check: &'static Check) -> Outcome {
        let bed: Arc<dyn Bed> = Arc::new(Sim);
        run_one(&bed, check, limit).outcome
    }

    fn outcome(check: &'static Check) -> Outcome {
        outcome_within(TIME_LIMIT, check)
    }

    fn failed(check: &'static Check) -> (String, Vec<String>) {
        match outcome(check) {
            Outcome::Failed { reason, exchanges } => (reason, exchanges),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_failure_says_what_was_expected_what_came_and_what_was_exchanged() {
        static CHECK: Check = Check::new("t.unmet", "s", &[], |context| {
            let vm = context.usual()?;
            equal("VP index", vm.rdmsr(1, 0x4000_0002)?, 7)
        });
        let (reason, exchanges) = failed(&CHECK);
        assert_eq!(reason, "VP index: expected 0x7, got 0x1");
        assert_eq!(exchanges.last().unwrap(), "vp 1: RDMSR VP_INDEX -> 0x1");
    }

    #[test]
    fn a_panic_is_a_failure_of_its_check_alone() {
        static CHECK: Check = Check::new("t.panic", "s", &[], |_| panic!("ouch {}", 1));
        assert_eq!(failed(&CHECK).0, "panic: ouch 1");
    }

    #[test]
    fn a_check_that_does_not_end_is_a_failure() {
        static CHECK: Check = Check::new("t.hang", "s", &[], |_| {
            thread::sleep(Duration::from_secs(5));
            Ok(())
        });
        let outcome = outcome_within(Duration::from_millis(50), &CHECK);
        let Outcome::Failed { reason, .. } = outcome else {
            panic!("{outcome:?}");
        };
        assert!(reason.starts_with("no end within"), "{reason}");
    }

    #[test]
    fn what_cannot_run_here_is_skipped_with_its_reason() {
        static OTHER: Check = Check::new("t.bed", "s", &[], |_| Ok(())).on(REAL);
        static SKIP: Check = Check::new("t.skip", "s", &[], |_| {
            Err(Failure::Skip("no such thing".into()))
        });
        let skipped = |reason: &str| Outcome::Skipped {
            reason: reason.into(),
        };
        assert_eq!(outcome(&OTHER), skipped("runs only on kvm"));
        assert_eq!(outcome(&SKIP), skipped("no such thing"));
    }
}
