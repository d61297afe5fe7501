//! Results of scenarios: judged, and shown as a table or as JSON.
#![forbid(unsafe_code)]

use super::machine::End;
use anyhow::Result;
use guest_images::scenario::Scenario;
use guest_images::verdict::Verdict;
use serde::Serialize;
use std::fs;
use std::path::Path;
use std::path::PathBuf;

/// Console lines shown when a machine ends or hangs without a verdict.
const LAST_LINES: usize = 15;

/// Result of one scenario.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) scenario: String,
    pub(crate) pass: bool,
    /// Wall-clock seconds from the start of QEMU to its end.
    pub(crate) seconds: f64,
    /// Why it failed, as far as the verdict does not say it.
    pub(crate) failures: Vec<String>,
    /// What L1 said.
    pub(crate) verdict: Option<Verdict>,
    /// The consoles.
    pub(crate) log: PathBuf,
    /// Whether it was ended from outside.
    pub(crate) interrupted: bool,
}

impl Outcome {
    pub(crate) fn new(
        scenario: &Scenario,
        end: End<Result<Verdict, serde_json::Error>>,
        seconds: f64,
        log: &Path,
    ) -> Self {
        let interrupted = matches!(end, End::Interrupted);
        let (verdict, failures) = match end {
            End::Found(Ok(verdict)) => {
                let failures = mismatches(scenario, &verdict);
                (Some(verdict), failures)
            }
            End::Found(Err(error)) => (None, vec![format!("unreadable verdict: {error}")]),
            End::Interrupted => (None, vec!["interrupted".into()]),
            End::Ended => (None, without_verdict("L1 ended without a verdict", log)),
            End::TimedOut => (None, without_verdict("time limit without a verdict", log)),
            End::Asleep => (None, without_verdict("L1 has fallen asleep", log)),
        };
        let said_pass = verdict.as_ref().is_some_and(|verdict| {
            verdict.pass && verdict.failures.is_empty() && verdict.runs.iter().all(|run| run.pass)
        });
        Self {
            scenario: scenario.name.clone(),
            pass: said_pass && failures.is_empty(),
            seconds,
            failures,
            verdict,
            log: log.into(),
            interrupted,
        }
    }

    /// Adds what was found after L1's end; any failure makes the scenario fail.
    pub(crate) fn fail(&mut self, failures: Vec<String>) {
        self.pass &= failures.is_empty();
        self.failures.extend(failures);
    }
}

/// How a verdict does not fit the scenario that was asked for.
fn mismatches(scenario: &Scenario, verdict: &Verdict) -> Vec<String> {
    let mut failures = Vec::new();
    if verdict.scenario != scenario.name {
        failures.push(format!("the verdict is on scenario {:?}", verdict.scenario));
    }
    let asked: Vec<_> = scenario.runs.iter().map(|run| &run.name).collect();
    let done: Vec<_> = verdict.runs.iter().map(|run| &run.name).collect();
    if asked != done {
        failures.push(format!("the verdict is on runs {done:?} of {asked:?}"));
    }
    failures
}

fn without_verdict(what: &str, log: &Path) -> Vec<String> {
    let console = fs::read(log).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    let lines: Vec<_> = console.lines().collect();
    let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
    let last = last.iter().map(|line| format!("| {}", line.trim_end()));
    std::iter::once(format!("{what}; the console's last lines:"))
        .chain(last)
        .collect()
}

/// One line a scenario, one a run, one a reason.
pub(crate) fn table(outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    let word = |pass| if pass { "pass" } else { "FAIL" };
    for outcome in outcomes {
        let result = word(outcome.pass);
        text += &format!(
            "{:<20}{result:<6}{:>7.1} s\n",
            outcome.scenario, outcome.seconds
        );
        let verdict = outcome.verdict.iter();
        let said = verdict.clone().flat_map(|verdict| &verdict.failures);
        for failure in outcome.failures.iter().chain(said) {
            text += &format!("  {failure}\n");
        }
        for line in verdict.clone().filter_map(|verdict| verdict.said.as_ref()) {
            text += &format!("  {line}\n");
        }
        for run in verdict.flat_map(|verdict| &verdict.runs) {
            let result = word(run.pass);
            text += &format!("  {:<18}{result:<6}{:>7.1} s\n", run.name, run.seconds);
            for line in run.notes.iter().chain(&run.failures) {
                text += &format!("    {line}\n");
            }
        }
        if !outcome.pass {
            text += &format!("  consoles: {}\n", outcome.log.display());
        }
    }
    text
}

/// All results as one JSON object.
pub(crate) fn json(outcomes: &[Outcome]) -> Result<String> {
    #[derive(Serialize)]
    struct All<'a> {
        pass: bool,
        scenarios: &'a [Outcome],
    }
    Ok(serde_json::to_string(&All {
        pass: outcomes.iter().all(|outcome| outcome.pass),
        scenarios: outcomes,
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rig::scenarios;
    use guest_images::verdict::RunVerdict;

    fn scenario() -> Scenario {
        scenarios::select(&["linux-7".into()]).unwrap().remove(0)
    }

    fn verdict(runs: &[(&str, bool)]) -> Verdict {
        let run = |(name, pass): &(&str, bool)| RunVerdict {
            name: name.to_string(),
            pass: *pass,
            failures: if *pass {
                vec![]
            } else {
                vec!["lost an interrupt".into()]
            },
            seconds: 10.0,
            metrics: Default::default(),
            notes: vec![],
        };
        Verdict {
            scenario: "linux-7".into(),
            pass: runs.iter().all(|(_, pass)| *pass),
            failures: vec![],
            said: None,
            runs: runs.iter().map(run).collect(),
        }
    }

    fn outcome(end: End<Result<Verdict, serde_json::Error>>) -> Outcome {
        Outcome::new(&scenario(), end, 30.0, Path::new("/no/such/log"))
    }

    #[test]
    fn a_verdict_on_all_runs_passes() {
        let outcome = outcome(End::Found(Ok(verdict(&[("1-cpu", true), ("2-cpu", true)]))));
        assert!(outcome.pass);
        assert!(table(&[outcome]).starts_with("linux-7             pass     30.0 s\n"));
    }

    #[test]
    fn what_is_found_after_the_end_fails_a_scenario_that_passed() {
        let mut outcome = outcome(End::Found(Ok(verdict(&[("1-cpu", true), ("2-cpu", true)]))));
        outcome.fail(Vec::new());
        assert!(outcome.pass);
        outcome.fail(vec!["wrong contents".into()]);
        assert!(!outcome.pass);
        assert!(table(&[outcome]).contains("wrong contents"));
    }

    #[test]
    fn a_failed_or_missing_or_foreign_run_fails() {
        for runs in [
            &[("1-cpu", true), ("2-cpu", false)][..],
            &[("1-cpu", true)],
            &[],
            &[("1-cpu", true), ("3-cpu", true)],
        ] {
            let outcome = outcome(End::Found(Ok(verdict(runs))));
            assert!(!outcome.pass, "{runs:?}");
        }
        let mut other = verdict(&[("1-cpu", true), ("2-cpu", true)]);
        other.scenario = "reboot".into();
        assert!(!outcome(End::Found(Ok(other))).pass);
    }

    #[test]
    fn a_verdict_that_contradicts_its_runs_fails() {
        let mut lie = verdict(&[("1-cpu", true), ("2-cpu", false)]);
        lie.pass = true;
        assert!(!outcome(End::Found(Ok(lie))).pass);
    }

    #[test]
    fn no_verdict_fails_and_shows_the_end_of_the_console() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("serial.log");
        fs::write(&log, "Kernel panic\r\n").unwrap();
        let outcome = Outcome::new(&scenario(), End::Ended, 1.0, &log);
        assert!(!outcome.pass);
        assert!(table(&[outcome]).contains("| Kernel panic\n"));
        for end in [End::TimedOut, End::Interrupted] {
            assert!(!self::outcome(end).pass);
        }
        let error = serde_json::from_str::<Verdict>("{").unwrap_err();
        assert!(!self::outcome(End::Found(Err(error))).pass);
    }

    #[test]
    fn the_json_says_what_the_table_says() {
        let outcomes = [
            outcome(End::Found(Ok(verdict(&[("1-cpu", true), ("2-cpu", true)])))),
            outcome(End::TimedOut),
        ];
        let json: serde_json::Value = serde_json::from_str(&json(&outcomes).unwrap()).unwrap();
        assert_eq!(json["pass"], false);
        assert_eq!(json["scenarios"][0]["pass"], true);
        assert_eq!(json["scenarios"][0]["verdict"]["runs"][1]["name"], "2-cpu");
        assert_eq!(json["scenarios"][1]["verdict"], serde_json::Value::Null);
    }
}
