//! Rules about the guest's kernel log.

#![forbid(unsafe_code)]

use crate::allow::AllowList;
use crate::report::GuestReport;

/// Words of which a line needs an entry of its own in the allow-list, whatever its level.
const TELLTALES: [&str; 6] = [
    "WARNING",
    "BUG",
    "Call Trace",
    "Oops",
    "general protection fault",
    "Kernel panic",
];

/// Level up to which a line needs an entry in the allow-list.
const NOTEWORTHY: u8 = 4;

/// The word in `text` that marks a fault of the kernel, at word boundaries: `DEBUG` is none.
pub fn telltale(text: &str) -> Option<&'static str> {
    let wordy = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    TELLTALES.into_iter().find(|word| {
        text.match_indices(word).any(|(start, _)| {
            let before = start.checked_sub(1).and_then(|at| text.as_bytes().get(at));
            !wordy(before) && !wordy(text.as_bytes().get(start + word.len()))
        })
    })
}

/// The log is whole, and every noteworthy line is allowed.
pub(super) fn clean(guest: &GuestReport, allow: &AllowList, failures: &mut Vec<String>) {
    let log = &guest.kmsg;
    if log.records == 0 {
        failures.push("kernel log: empty".into());
    }
    if log.lost > 0 {
        failures.push(format!("kernel log: {} records lost", log.lost));
    }
    if log.noteworthy != log.lines.len() as u64 {
        let (all, kept) = (log.noteworthy, log.lines.len());
        failures.push(format!(
            "kernel log: {all} noteworthy lines, {kept} in the report"
        ));
    }
    for line in &log.lines {
        let fault = telltale(&line.text).is_some();
        if (fault || line.level <= NOTEWORTHY) && !allow.allows(&guest.kernel, line) {
            failures.push(format!("kernel log: <{}> {}", line.level, line.text));
        }
    }
}
