//! Which moments of a run its VM is saved at, and what is kept over the VMMs that it goes through.

use crate::vmm::Files;
use anyhow::{Context, Result};
use guest_images::scenario::Run;
use serde_json::Value;
use std::fs;
use std::time::Duration;

/// Longest wait after a step that the guest has named.
const LONGEST_DELAY_MS: u32 = 250;

/// Snapshots that were taken, and the marks in the reports of the VMMs that have ended since.
#[derive(Debug, Default)]
pub(crate) struct Saves {
    count: u32,
    marks: Vec<Value>,
}

impl Saves {
    /// Whether this line of the console is a moment to save the VM at: the guest begins a step.
    pub(crate) fn is_due(&self, run: &Run, line: &str) -> bool {
        self.count < run.snapshots && is_step(line)
    }

    /// How long after that line: different for each, so that steps are met at different places.
    pub(crate) fn delay(&self) -> Duration {
        Duration::from_millis((self.count * 97 % LONGEST_DELAY_MS).into())
    }

    /// A VMM has ended after a snapshot: keeps its marks.
    pub(crate) fn taken(&mut self, files: &Files<'_>) -> Result<()> {
        self.count += 1;
        self.marks.append(marks(&mut read(files)?)?);
        Ok(())
    }

    /// The last VMM has ended: puts all marks into its report.
    pub(crate) fn finish(&mut self, files: &Files<'_>) -> Result<()> {
        if self.count == 0 {
            return Ok(());
        }
        let mut report = read(files)?;
        let last = marks(&mut report)?;
        let all = [std::mem::take(&mut self.marks), std::mem::take(last)].concat();
        *last = all;
        let path = files.report();
        fs::write(&path, report.to_string()).with_context(|| path.display().to_string())
    }
}

fn read(files: &Files<'_>) -> Result<Value> {
    let path = files.report();
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).context("report of the VMM")
}

fn marks(report: &mut Value) -> Result<&mut Vec<Value>> {
    let marks = report.get_mut("marks").and_then(Value::as_array_mut);
    marks.context("no marks in the report of the VMM")
}

/// True for the line by which a guest names its next step, such as `vpci: 5.6 s: load modules`.
fn is_step(line: &str) -> bool {
    let mut words = line.trim().splitn(4, ' ');
    let (first, time, unit) = (words.next(), words.next(), words.next());
    first == Some("vpci:")
        && unit == Some("s:")
        && time.is_some_and(|time| time.parse::<f64>().is_ok())
        && words.next() != Some("report")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_steps_of_the_guest_are_moments_to_save_at() {
        for (line, step) in [
            ("vpci: 5.6 s: load modules\r\n", true),
            ("vpci: 15.6 s: cycle 1: eject 6c3a", true),
            ("vpci: 5.6 s: report", false),
            ("vpci: reset", false),
            ("[    5.6] vpci: 5.6 s: load", false),
            ("", false),
        ] {
            assert_eq!(is_step(line), step, "{line}");
        }
    }

    #[test]
    fn marks_of_all_processes_end_up_in_the_last_report() {
        let scratch = std::env::temp_dir().join(format!("vpci-saves-{}", std::process::id()));
        fs::create_dir_all(&scratch).unwrap();
        let files = Files {
            share: &scratch,
            scratch: &scratch,
        };
        let mut saves = Saves::default();
        fs::write(files.report(), r#"{"end":"quit","marks":[1,2]}"#).unwrap();
        saves.taken(&files).unwrap();
        fs::write(files.report(), r#"{"end":"poweroff","marks":[3]}"#).unwrap();
        saves.finish(&files).unwrap();
        let report = read(&files).unwrap();
        assert_eq!(report["marks"], serde_json::json!([1, 2, 3]));
        assert_eq!(report["end"], "poweroff");
        fs::remove_dir_all(&scratch).unwrap();
    }
}
