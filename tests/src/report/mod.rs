//! The formats of a report.
#![forbid(unsafe_code)]

mod json;
mod junit;
mod tap;
mod text;

pub use json::json;
pub use junit::junit;
pub use tap::tap;
pub use text::{Progress, failure, summary, text};

use crate::check::Check;
use crate::rows;

/// Where the rows of a check stand, for people: `HV-1-04 (docs/spec/hyperv-guest-interface.md)`.
pub fn references(check: &Check) -> String {
    let mut parts = Vec::new();
    for row in check.rows {
        let file = rows::file_of(row).unwrap_or("docs/spec");
        parts.push(format!("{row} ({file}#{row})"));
    }
    parts.join(", ")
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use crate::bed::BedKind;
    use crate::check::Check;
    use crate::runner::{Outcome, Record, Run};

    static PASSED: Check = Check::new("a.passed", "One is one.", &["HV-1-01"], |_| Ok(()));
    static FAILED: Check = Check::new("a.failed", "Two < 1 & all.", &["VB-1-02"], |_| Ok(()));
    static SKIPPED: Check = Check::new("b.skipped", "Three.", &["VP-1-03"], |_| Ok(()));

    /// A run with one check of each outcome.
    pub(crate) fn sample() -> Run {
        let record = |check, outcome| Record {
            check,
            outcome,
            time: Duration::from_millis(1500),
        };
        Run {
            bed: BedKind::Sim,
            records: vec![
                record(&PASSED, Outcome::Passed),
                record(
                    &FAILED,
                    Outcome::Failed {
                        reason: "x: expected <1>, got \"2\"\nand more".into(),
                        exchanges: vec!["vp 0: CPUID".into(), "bell \u{7} ]]> end".into()],
                    },
                ),
                record(
                    &SKIPPED,
                    Outcome::Skipped {
                        reason: "no such bed".into(),
                    },
                ),
            ],
            time: Duration::from_secs(5),
        }
    }
}
