//! Test Anything Protocol, version 14.
#![forbid(unsafe_code)]

use std::fmt::Write as _;

use super::failure;
use crate::runner::{Outcome, Run};

/// The report. Details of a failure are comment lines.
pub fn tap(run: &Run) -> String {
    let mut text = format!("TAP version 14\n1..{}\n", run.records.len());
    for (index, record) in run.records.iter().enumerate() {
        let number = index + 1;
        let name = record.check.name;
        // Writing to a string cannot fail.
        let _ = match &record.outcome {
            Outcome::Passed => writeln!(text, "ok {number} - {name}"),
            Outcome::Skipped { reason } => {
                writeln!(text, "ok {number} - {name} # SKIP {}", one_line(reason))
            }
            Outcome::Failed { .. } => {
                let details = failure(record);
                let details = details.trim_end().replace('\n', "\n# ");
                writeln!(text, "not ok {number} - {name}\n# {details}")
            }
        };
    }
    text
}

fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::sample;

    #[test]
    fn every_check_has_one_result_line_and_the_rest_is_comment() {
        let text = tap(&sample());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..4],
            [
                "TAP version 14",
                "1..3",
                "ok 1 - a.passed",
                "not ok 2 - a.failed"
            ]
        );
        assert_eq!(lines.last(), Some(&"ok 3 - b.skipped # SKIP no such bed"));
        assert!(
            lines[4..lines.len() - 1]
                .iter()
                .all(|line| line.starts_with("# ")),
            "{text}"
        );
    }
}
