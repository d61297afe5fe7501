//! Which row of docs/spec has which checks, and why a row has none.
//!
//! A row is one fact or rule, named by an anchor (docs/spec/README.md). Not every row is a host's
//! duty; a row without a check has its reason in `tests/rows-without-checks.txt`.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::LazyLock;

use regex::Regex;

use crate::check::Check;

/// Files whose rows need a check or a reason: prefix of the row ids, path, text.
const FILES: [(&str, &str, &str); 4] = [
    (
        "HV-",
        "docs/spec/hyperv-guest-interface.md",
        include_str!("../../docs/spec/hyperv-guest-interface.md"),
    ),
    (
        "VB-",
        "docs/spec/vmbus.md",
        include_str!("../../docs/spec/vmbus.md"),
    ),
    (
        "VP-",
        "docs/spec/vpci.md",
        include_str!("../../docs/spec/vpci.md"),
    ),
    (
        "IO-",
        "docs/spec/pviommu.md",
        include_str!("../../docs/spec/pviommu.md"),
    ),
];

/// Lines of `row or section.*, colon, reason`; `#` begins a comment.
const REASONS: &str = include_str!("../rows-without-checks.txt");

static ANCHOR: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r#"<a id="((?:HV|VB|VP|IO)-[0-9.]+-[0-9]+)">"#).ok());

/// The file of a row, by its prefix.
pub fn file_of(row: &str) -> Option<&'static str> {
    let file = FILES.iter().find(|(prefix, ..)| row.starts_with(prefix))?;
    Some(file.1)
}

/// The rows of a file, in its order.
fn rows(text: &'static str) -> Vec<&'static str> {
    let Some(anchor) = &*ANCHOR else {
        return Vec::new();
    };
    let found = anchor.captures_iter(text);
    found
        .filter_map(|captures| captures.get(1))
        .map(|row| row.as_str())
        .collect()
}

/// What is wrong with the table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Problem {
    /// A row has neither a check nor a reason.
    #[error("row {0} has neither a check nor a reason in tests/rows-without-checks.txt")]
    Uncovered(String),
    /// A check names a row that docs/spec does not have.
    #[error("check {check} names the row {row}, which docs/spec does not have")]
    UnknownRow {
        /// The check.
        check: String,
        /// The row.
        row: String,
    },
    /// A reason is given for no row.
    #[error("tests/rows-without-checks.txt: {0} names no row")]
    UselessReason(String),
    /// A reason is given for a single row that has checks.
    #[error("tests/rows-without-checks.txt: {0} has a check by now")]
    NeedlessReason(String),
    /// A line of the reasons is malformed.
    #[error("tests/rows-without-checks.txt: line {0:?} is not `row: reason`")]
    Line(String),
}

/// The table.
#[derive(Debug, Clone)]
pub struct Table {
    /// Each file with its rows: checks, or the reason why there is none.
    files: Vec<(&'static str, Vec<Row>)>,
    problems: BTreeSet<Problem>,
}

#[derive(Debug, Clone)]
struct Row {
    id: &'static str,
    checks: Vec<&'static str>,
    reason: Option<&'static str>,
}

impl Table {
    /// The table for these checks.
    pub fn new(checks: impl Iterator<Item = &'static Check>) -> Self {
        let mut problems = BTreeSet::new();
        let reasons = reasons(&mut problems);
        let mut covered: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for check in checks {
            for row in check.rows {
                covered.entry(row).or_default().push(check.name);
            }
        }
        let mut known = BTreeSet::new();
        let mut used = BTreeSet::new();
        let mut files = Vec::new();
        for (_, path, text) in FILES {
            let mut table = Vec::new();
            for id in rows(text) {
                known.insert(id);
                let checks = covered.get(id).cloned().unwrap_or_default();
                let (key, reason) = match reason(&reasons, id) {
                    Some((key, reason)) => (Some(key), Some(reason)),
                    None => (None, None),
                };
                used.extend(key);
                if checks.is_empty() && reason.is_none() {
                    problems.insert(Problem::Uncovered(id.into()));
                }
                if !checks.is_empty() && key == Some(id) {
                    problems.insert(Problem::NeedlessReason(id.into()));
                }
                table.push(Row { id, checks, reason });
            }
            files.push((path, table));
        }
        for (row, checks) in covered {
            if !known.contains(row) {
                for check in checks {
                    problems.insert(Problem::UnknownRow {
                        check: check.into(),
                        row: row.into(),
                    });
                }
            }
        }
        for key in reasons.keys().filter(|key| !used.contains(*key)) {
            problems.insert(Problem::UselessReason((*key).into()));
        }
        Self { files, problems }
    }

    /// What is wrong with it; empty if all is well.
    pub fn problems(&self) -> Vec<Problem> {
        self.problems.iter().cloned().collect()
    }

    /// The table as a document.
    pub fn markdown(&self, checks: usize) -> String {
        let mut text = format!(
            "# Conformance\n\n\
             Which check of the conformance suite covers which row of docs/spec: {checks} checks.\n\
             Generated: `VPCI_UPDATE=1 cargo test -p vpci-conformance --test table` writes it anew.\n"
        );
        for (path, rows) in &self.files {
            let covered = rows.iter().filter(|row| !row.checks.is_empty()).count();
            let name = path.trim_start_matches("docs/");
            // Writing to a string cannot fail.
            let _ = write!(
                text,
                "\n## {path}\n\n{covered} of {} rows have a check.\n\n| row | checks |\n|---|---|\n",
                rows.len()
            );
            for row in rows {
                let id = row.id;
                let cell = if row.checks.is_empty() {
                    format!("*{}*", row.reason.unwrap_or("none"))
                } else {
                    let names: Vec<_> = row
                        .checks
                        .iter()
                        .map(|check| format!("`{check}`"))
                        .collect();
                    names.join(", ")
                };
                let _ = writeln!(text, "| [{id}]({name}#{id}) | {cell} |");
            }
        }
        text
    }
}

fn reasons(problems: &mut BTreeSet<Problem>) -> BTreeMap<&'static str, &'static str> {
    let mut reasons = BTreeMap::new();
    for line in REASONS.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        match line.split_once(": ") {
            Some((row, reason)) if !reasons.contains_key(row) => {
                reasons.insert(row, reason);
            }
            _ => {
                problems.insert(Problem::Line(line.into()));
            }
        }
    }
    reasons
}

/// The reason for a row: its own, or that of its section, or of the longest prefix that ends in
/// `*`.
fn reason(
    reasons: &BTreeMap<&'static str, &'static str>,
    row: &str,
) -> Option<(&'static str, &'static str)> {
    if let Some((key, reason)) = reasons.get_key_value(row) {
        return Some((key, reason));
    }
    let wild = reasons.iter().filter(|(key, _)| {
        let prefix = key.strip_suffix('*');
        prefix.is_some_and(|prefix| row.starts_with(prefix))
    });
    let (key, reason) = wild.max_by_key(|(key, _)| key.len())?;
    Some((key, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_in_every_file() {
        for (prefix, path, text) in FILES {
            let rows = rows(text);
            assert!(rows.len() > 70, "{path}: {}", rows.len());
            assert!(rows.iter().all(|row| row.starts_with(prefix)), "{path}");
        }
        assert_eq!(file_of("VB-1-01"), Some("docs/spec/vmbus.md"));
        assert_eq!(file_of("XX-1"), None);
    }

    #[test]
    fn a_row_takes_its_own_reason_before_that_of_its_section() {
        let reasons = BTreeMap::from([
            ("HV-3.*", "all"),
            ("HV-3.3-*", "part"),
            ("HV-3.3-01", "own"),
        ]);
        let found = |row| reason(&reasons, row).map(|(_, reason)| reason);
        assert_eq!(found("HV-3.3-01"), Some("own"));
        assert_eq!(found("HV-3.3-02"), Some("part"));
        assert_eq!(found("HV-3.1-01"), Some("all"));
        assert_eq!(found("HV-4-01"), None);
    }

    #[test]
    fn a_check_that_names_no_row_of_the_spec_is_a_problem() {
        static CHECK: Check = Check::new("x.y", "Z.", &["HV-99-01"], |_| Ok(()));
        let problems = Table::new(std::iter::once(&CHECK)).problems();
        assert!(
            problems
                .iter()
                .any(|problem| matches!(problem, Problem::UnknownRow { .. }))
        );
    }
}
