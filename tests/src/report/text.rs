//! For people.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::io::{self, Write};

use super::references;
use crate::check::Check;
use crate::runner::{Outcome, Record, Run};

/// What a check that failed has to say: what was expected, with its reference, what came, and the
/// last exchanges. Empty for other checks.
pub fn failure(record: &Record) -> String {
    let Outcome::Failed { reason, exchanges } = &record.outcome else {
        return String::new();
    };
    let check = record.check;
    let mut text = format!(
        "FAILED {}: {}\n  rows: {}\n  {}\n",
        check.name,
        check.statement,
        references(check),
        reason.replace('\n', "\n  "),
    );
    if !exchanges.is_empty() {
        text += "  last exchanges:\n";
    }
    for line in exchanges {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "    {line}");
    }
    text
}

/// Skips with their reasons, then the counts.
pub fn summary(run: &Run) -> String {
    let mut text = String::new();
    for record in &run.records {
        if let Outcome::Skipped { reason } = &record.outcome {
            let _ = writeln!(text, "SKIPPED {}: {reason}", record.check.name);
        }
    }
    let (passed, failed, skipped) = run.counts();
    let _ = writeln!(
        text,
        "{}: {} checks: {passed} passed, {failed} failed, {skipped} skipped in {:.1} s",
        run.bed.name(),
        run.records.len(),
        run.time.as_secs_f64(),
    );
    text
}

/// The whole report: a line for each check, failures in full, the summary.
pub fn text(run: &Run) -> String {
    let mut text = String::new();
    for record in &run.records {
        match record.outcome {
            Outcome::Passed => {
                let _ = writeln!(text, "passed  {}", record.check.name);
            }
            Outcome::Failed { .. } => text += &failure(record),
            Outcome::Skipped { .. } => {}
        }
    }
    text + &summary(run)
}

/// Shows how a run goes on: on a terminal one line that changes, else nothing; failures as soon as
/// they come.
#[derive(Debug)]
pub struct Progress<W> {
    out: W,
    terminal: bool,
    total: usize,
}

impl<W: Write> Progress<W> {
    /// Progress of a run of `total` checks, towards `out`.
    pub fn new(out: W, terminal: bool, total: usize) -> Self {
        Self {
            out,
            terminal,
            total,
        }
    }

    /// To be called by [`crate::runner::run`].
    ///
    /// # Errors
    ///
    /// What the output says.
    pub fn update(
        &mut self,
        index: usize,
        check: &Check,
        record: Option<&Record>,
    ) -> io::Result<()> {
        if self.terminal {
            write!(self.out, "\r\x1b[K")?;
        }
        match record {
            Some(record) => self.out.write_all(failure(record).as_bytes())?,
            None if self.terminal => {
                write!(self.out, "[{}/{}] {}", index + 1, self.total, check.name)?;
            }
            None => {}
        }
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::sample;

    #[test]
    fn a_failure_shows_expectation_reference_and_exchanges_and_a_skip_its_reason() {
        let text = text(&sample());
        for part in [
            "passed  a.passed\n",
            "FAILED a.failed: Two < 1 & all.\n",
            "VB-1-02 (docs/spec/vmbus.md#VB-1-02)",
            "x: expected <1>, got \"2\"\n  and more\n",
            "    vp 0: CPUID\n",
            "SKIPPED b.skipped: no such bed\n",
            "sim: 3 checks: 1 passed, 1 failed, 1 skipped in 5.0 s\n",
        ] {
            assert!(text.contains(part), "{part:?} in {text}");
        }
    }

    #[test]
    fn progress_changes_one_line_and_shows_failures() {
        let run = sample();
        let mut out = Vec::new();
        let mut progress = Progress::new(&mut out, true, 3);
        for (index, record) in run.records.iter().enumerate() {
            progress.update(index, record.check, None).unwrap();
            progress.update(index, record.check, Some(record)).unwrap();
        }
        let shown = String::from_utf8(out).unwrap();
        assert!(
            shown.contains("\r\x1b[K[2/3] a.failed\r\x1b[KFAILED a.failed"),
            "{shown:?}"
        );
    }
}
