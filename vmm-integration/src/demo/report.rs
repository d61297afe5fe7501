//! The result of the demonstration, as a table and as JSON.
#![forbid(unsafe_code)]

use serde::Serialize;
use vpci_conformance::bed::BedKind;

use super::stage::{Broken, Fact, FaultCount, Record};

/// Version of the JSON form. Members may be added to it; a change of their names or meanings
/// makes a new version.
const VERSION: u32 = 1;

#[derive(Serialize)]
struct Document<'a> {
    version: u32,
    bed: &'a str,
    held: bool,
    steps: Vec<Entry<'a>>,
    /// DMA faults by function and by domain, before the bus was taken away.
    faults: &'a [FaultCount],
}

#[derive(Serialize)]
struct Entry<'a> {
    name: &'a str,
    title: &'a str,
    /// `held`, `failed` or `not-reached`.
    outcome: &'a str,
    seconds: f64,
    facts: &'a [Fact],
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    broken: Option<&'a Broken>,
}

fn outcome(record: &Record) -> &'static str {
    match (record.reached, &record.broken) {
        (false, _) => "not-reached",
        (true, None) => "held",
        (true, Some(_)) => "failed",
    }
}

/// JSON, for programs.
pub(super) fn json(bed: BedKind, records: &[Record], faults: &[FaultCount]) -> String {
    let document = Document {
        version: VERSION,
        bed: bed.name(),
        held: records.iter().all(Record::held),
        steps: records
            .iter()
            .map(|record| Entry {
                name: record.step.name(),
                title: record.step.title(),
                outcome: outcome(record),
                seconds: record.time.as_secs_f64(),
                facts: &record.facts,
                broken: record.broken.as_ref(),
            })
            .collect(),
        faults,
    };
    // Strings, numbers and lists always have a form in JSON.
    let mut text = serde_json::to_string_pretty(&document).unwrap_or_default();
    text.push('\n');
    text
}

/// The table at the end.
pub(super) fn table(bed: BedKind, records: &[Record], faults: &[FaultCount]) -> String {
    let mut text = String::from("\nstep            result          time\n");
    for record in records {
        let (name, outcome) = (record.step.name(), outcome(record));
        let millis = record.time.as_secs_f64() * 1e3;
        text += &format!("{name:<16}{outcome:<11}{millis:>6.1} ms\n");
    }
    if !faults.is_empty() {
        text += "\nDMA faults            count  last\n";
    }
    for count in faults {
        let last = count.last.as_deref().unwrap_or("");
        let line = format!("{:<21}{:>6}  {last}", count.what, count.faults);
        text += line.trim_end();
        text += "\n";
    }
    let held = records.iter().filter(|record| record.held()).count();
    let total = records.len();
    text += &format!(
        "demo on {}: {held} of {total} steps held{}\n",
        bed.name(),
        if held == total { "" } else { ": FAILED" }
    );
    text
}

#[cfg(test)]
mod tests {
    use super::super::stage::Step;
    use super::*;
    use std::time::Duration;

    fn records() -> Vec<Record> {
        let record = |step, broken, reached| Record {
            step,
            facts: Vec::new(),
            broken,
            time: Duration::from_millis(12),
            reached,
        };
        let broken = Broken {
            reason: "x: expected 1, got 2".into(),
            exchanges: vec!["vp 0: CPUID".into()],
        };
        vec![
            record(Step::Machine, None, true),
            record(Step::Discovery, Some(broken), true),
            record(Step::Synic, None, false),
        ]
    }

    #[test]
    fn the_table_says_what_held_and_what_did_not() {
        let faults = [FaultCount {
            what: "function 0x00010000".into(),
            faults: 3,
            last: Some("read of 8 bytes".into()),
        }];
        let text = table(BedKind::Sim, &records(), &faults);
        assert!(
            text.contains("machine         held         12.0 ms\n"),
            "{text}"
        );
        assert!(text.contains("discovery       failed "), "{text}");
        let line = "function 0x00010000       3  read of 8 bytes\n";
        assert!(text.contains(line), "{text}");
        assert!(text.contains("synic           not-reached"), "{text}");
        let last = "demo on sim: 1 of 3 steps held: FAILED\n";
        assert!(text.ends_with(last), "{text}");
        assert!(
            table(BedKind::Kvm, &records()[..1], &[]).ends_with("demo on kvm: 1 of 1 steps held\n"),
            "{text}"
        );
    }

    #[test]
    fn json_has_the_reason_of_a_failure_and_nothing_of_the_kind_elsewhere() {
        let text = json(BedKind::Sim, &records(), &[]);
        let form: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&form["held"], &form["version"]),
            (&false.into(), &1.into())
        );
        let steps = form["steps"].as_array().unwrap();
        assert_eq!(steps[1]["reason"], "x: expected 1, got 2");
        assert_eq!(steps[1]["exchanges"][0], "vp 0: CPUID");
        assert!(steps[0].get("reason").is_none());
        assert_eq!(steps[2]["outcome"], "not-reached");
    }
}
