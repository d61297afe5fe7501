//! The kernel log, read from `/dev/kmsg`.

use anyhow::{Context, Result};
use guest_images::judge::telltale;
use guest_images::report::{KMSG_LINES, KmsgLine, KmsgReport};
use rustix::fs::OFlags;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

/// Longest text of a line in the report, in bytes.
const TEXT_LIMIT: usize = 300;
/// Level up to which a record is noteworthy: KERN_WARNING.
const NOTEWORTHY: u8 = 4;

/// Reads the whole log and keeps its noteworthy records.
pub(crate) fn collect() -> Result<KmsgReport> {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open("/dev/kmsg")
        .context("/dev/kmsg")?;
    let mut report = KmsgReport {
        records: 0,
        noteworthy: 0,
        lost: 0,
        lines: Vec::new(),
    };
    // A read gives one whole record; longer ones do not exist (PRINTK_MESSAGE_MAX is 2048).
    let mut buffer = [0; 8192];
    let mut next = None;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                let record = String::from_utf8_lossy(&buffer[..length]);
                next = add(&mut report, &record, next);
            }
            // Records were overwritten before they were read; the next read goes on behind them.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("/dev/kmsg"),
        }
    }
    Ok(report)
}

/// Takes one record in and gives the sequence number of the one that must follow.
fn add(report: &mut KmsgReport, record: &str, expected: Option<u64>) -> Option<u64> {
    report.records += 1;
    let Some((level, sequence, line)) = parse(record) else {
        // A record out of its format is itself noteworthy.
        keep(
            report,
            KmsgLine {
                level: 0,
                time_us: 0,
                text: clip(record),
            },
        );
        return None;
    };
    if let Some(expected) = expected {
        report.lost += sequence.saturating_sub(expected);
    } else if report.records == 1 {
        report.lost += sequence;
    }
    if let Some(line) = line
        && (level <= NOTEWORTHY || telltale(&line.text).is_some())
    {
        keep(report, line);
    }
    sequence.checked_add(1)
}

fn keep(report: &mut KmsgReport, line: KmsgLine) {
    report.noteworthy += 1;
    if report.lines.len() < KMSG_LINES {
        report.lines.push(line);
    }
}

/// Splits `priority,sequence,microseconds,flags;text` (`Documentation/ABI/testing/dev-kmsg`). The
/// line is missing where the record was not written by the kernel itself.
fn parse(record: &str) -> Option<(u8, u64, Option<KmsgLine>)> {
    let (head, text) = record.split_once(';')?;
    let mut fields = head.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let sequence = fields.next()?.parse().ok()?;
    let time_us = fields.next()?.parse().ok()?;
    let level = (priority & 7) as u8;
    let from_kernel = priority >> 3 == 0;
    // Lines after the first are key=value pairs about the device.
    let text = text.lines().next().unwrap_or_default();
    // The kernel escapes the line ends inside of a record.
    let text = clip(&text.replace("\\x0a", " "));
    let line = from_kernel.then_some(KmsgLine {
        level,
        time_us,
        text,
    });
    Some((level, sequence, line))
}

fn clip(text: &str) -> String {
    let end = (0..=TEXT_LIMIT.min(text.len()))
        .rev()
        .find(|&end| text.is_char_boundary(end))
        .unwrap_or(0);
    text[..end].trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_record_is_counted(record in "[0-9]{0,22},?[0-9]{0,22},?[0-9-]{0,22},?;?\\PC{0,400}") {
            let report = collect_all(&[&record]);
            prop_assert_eq!(report.records, 1);
            prop_assert!(report.lines.iter().all(|line| line.text.len() <= TEXT_LIMIT));
        }
    }

    fn collect_all(records: &[&str]) -> KmsgReport {
        let mut report = KmsgReport {
            records: 0,
            noteworthy: 0,
            lost: 0,
            lines: Vec::new(),
        };
        let mut next = None;
        for record in records {
            next = add(&mut report, record, next);
        }
        report
    }

    #[test]
    fn warnings_and_telltale_words_are_kept_and_the_rest_is_counted() {
        let report = collect_all(&[
            "6,0,0,-;Linux version 7\n",
            "4,1,10,-;a warning\n SUBSYSTEM=pci\n",
            "5,2,20,-;Call Trace:\n",
            "30,3,30,-;written by user space\n",
            "28,4,40,-;a warning of user space\n",
            "6,5,50,-;two lines\\x0aBUG: in the second\n",
        ]);
        assert_eq!((report.records, report.noteworthy, report.lost), (6, 3, 0));
        assert_eq!(report.lines[2].text, "two lines BUG: in the second");
        assert_eq!(report.lines[0].text, "a warning");
        assert_eq!(report.lines[0].time_us, 10);
        assert_eq!(report.lines[1].level, 5);
    }

    #[test]
    fn lost_records_are_counted_by_their_sequence_numbers() {
        let report = collect_all(&["6,5,0,-;first\n", "6,6,0,-;next\n", "6,9,0,-;gap\n"]);
        assert_eq!(report.lost, 7);
    }

    #[test]
    fn a_malformed_record_is_noteworthy() {
        for record in ["", "4,1", "x,1,2,-;text", "4,-1,2,-;text"] {
            assert_eq!(collect_all(&[record]).noteworthy, 1, "{record:?}");
        }
    }

    #[test]
    fn the_number_and_length_of_kept_lines_is_limited() {
        let long = format!("3,0,0,-;{}", "ä".repeat(400));
        let report = collect_all(&vec![long.as_str(); KMSG_LINES + 1]);
        assert_eq!(report.lines.len(), KMSG_LINES);
        assert_eq!(report.noteworthy, KMSG_LINES as u64 + 1);
        assert_eq!(report.lines[0].text.len(), TEXT_LIMIT);
    }
}
