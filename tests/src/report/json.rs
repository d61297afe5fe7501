//! JSON for scripts.
#![forbid(unsafe_code)]

use serde::Serialize;

use crate::runner::{Outcome, Run};

#[derive(Debug, Serialize)]
struct Document<'a> {
    /// Version of this form.
    version: u32,
    bed: &'a str,
    seconds: f64,
    passed: usize,
    failed: usize,
    skipped: usize,
    checks: Vec<Entry<'a>>,
}

#[derive(Debug, Serialize)]
struct Entry<'a> {
    name: &'a str,
    statement: &'a str,
    rows: &'a [&'a str],
    outcome: &'a str,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    exchanges: &'a [String],
}

/// The report.
///
/// # Errors
///
/// Does not fail in practice: every value has a form in JSON.
pub fn json(run: &Run) -> serde_json::Result<String> {
    let (passed, failed, skipped) = run.counts();
    let checks = run.records.iter().map(|record| {
        let (outcome, reason, exchanges) = match &record.outcome {
            Outcome::Passed => ("passed", None, &[][..]),
            Outcome::Failed { reason, exchanges } => ("failed", Some(reason), &exchanges[..]),
            Outcome::Skipped { reason } => ("skipped", Some(reason), &[][..]),
        };
        Entry {
            name: record.check.name,
            statement: record.check.statement,
            rows: record.check.rows,
            outcome,
            seconds: record.time.as_secs_f64(),
            reason: reason.map(String::as_str),
            exchanges,
        }
    });
    let document = Document {
        version: 1,
        bed: run.bed.name(),
        seconds: run.time.as_secs_f64(),
        passed,
        failed,
        skipped,
        checks: checks.collect(),
    };
    Ok(serde_json::to_string_pretty(&document)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::sample;

    #[test]
    fn the_document_has_every_check_with_its_outcome() {
        let text = json(&sample()).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["bed"], "sim");
        assert_eq!(value["failed"], 1);
        assert_eq!(value["checks"][1]["name"], "a.failed");
        assert_eq!(value["checks"][1]["exchanges"][0], "vp 0: CPUID");
        assert_eq!(value["checks"][2]["reason"], "no such bed");
        assert!(value["checks"][0].get("reason").is_none());
    }
}
