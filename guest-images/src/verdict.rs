//! The rig's answer: the JSON behind its `VPCI-VERDICT` line.

#![forbid(unsafe_code)]

use crate::report::VERDICT_PREFIX;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Verdict on a whole scenario.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Name of the scenario.
    pub scenario: String,
    /// True when every run passed and nothing outside the runs failed.
    pub pass: bool,
    /// What failed outside the runs, for example while the rig was set up.
    pub failures: Vec<String>,
    /// Last line on standard output of the scenario's command, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said: Option<String>,
    /// The runs, in order; shorter than the scenario's list when the rig gave up.
    pub runs: Vec<RunVerdict>,
}

/// Verdict on one run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunVerdict {
    /// Name of the run.
    pub name: String,
    /// True when nothing failed.
    pub pass: bool,
    /// Each rule that was broken, one line each.
    pub failures: Vec<String>,
    /// Wall-clock seconds from the start of the VMM to its exit.
    pub seconds: f64,
    /// Measurements worth a glance, by name.
    pub metrics: BTreeMap<String, f64>,
    /// Measurements worth a line in the table.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl Verdict {
    /// The line for the serial console, without a line end.
    pub fn line(&self) -> String {
        let json = serde_json::to_string(self).unwrap_or_else(|error| error.to_string());
        format!("{VERDICT_PREFIX}{json}")
    }

    /// The verdict in a console line; `None` where the line holds none, an error where it holds
    /// one that does not parse.
    pub fn from_line(line: &str) -> Option<Result<Self, serde_json::Error>> {
        json_after(VERDICT_PREFIX, line)
    }
}

/// The JSON value behind `prefix` in a console line.
///
/// Kernel output may stand before the prefix and carriage returns after the value; both are
/// ignored. `None` where the line has no prefix.
pub fn json_after<T: DeserializeOwned>(
    prefix: &str,
    line: &str,
) -> Option<Result<T, serde_json::Error>> {
    let (_, text) = line.split_once(prefix)?;
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<T>();
    Some(values.next().unwrap_or_else(|| serde_json::from_str("")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_mangled_line_gives_a_verdict_an_error_or_nothing(at in 0usize..200, byte: u8, cut in 0usize..200) {
            let mut bytes = verdict().line().into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(bytes.len() - cut % bytes.len());
            let _ = Verdict::from_line(&String::from_utf8_lossy(&bytes));
        }
    }

    fn verdict() -> Verdict {
        Verdict {
            scenario: "linux-7".into(),
            pass: false,
            failures: vec![],
            said: Some("65 checks".into()),
            runs: vec![RunVerdict {
                name: "1-cpu".into(),
                pass: false,
                failures: vec!["no report".into()],
                seconds: 12.5,
                metrics: BTreeMap::from([("interrupts".into(), 4.0)]),
                notes: vec![],
            }],
        }
    }

    #[test]
    fn a_verdict_survives_a_console_line() {
        let line = format!("[    1.0] noise{}\r\n", verdict().line());
        assert_eq!(Verdict::from_line(&line).unwrap().unwrap(), verdict());
    }

    #[test]
    fn a_cut_verdict_is_an_error_and_other_lines_are_none() {
        let line = verdict().line();
        assert!(
            Verdict::from_line(&line[..line.len() - 9])
                .unwrap()
                .is_err()
        );
        assert!(Verdict::from_line("VPCI-VERDICT ").unwrap().is_err());
        assert!(Verdict::from_line("VPCI-REPORT {}").is_none());
    }
}
