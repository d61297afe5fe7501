//! JUnit XML as continuous-integration systems read it.
#![forbid(unsafe_code)]

use std::io;

use quick_xml::Writer;
use quick_xml::events::{BytesDecl, BytesText, Event};

use super::failure;
use crate::runner::{Outcome, Record, Run};

/// The report.
///
/// # Errors
///
/// Does not fail in practice: the document is made in memory.
pub fn junit(run: &Run) -> io::Result<String> {
    let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
    writer.write_event(Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None)))?;
    let (_, failed, skipped) = run.counts();
    let time = format!("{:.3}", run.time.as_secs_f64());
    let suite = format!("vpci-conformance.{}", run.bed.name());
    writer
        .create_element("testsuite")
        .with_attribute(("name", suite.as_str()))
        .with_attribute(("tests", run.records.len().to_string().as_str()))
        .with_attribute(("failures", failed.to_string().as_str()))
        .with_attribute(("errors", "0"))
        .with_attribute(("skipped", skipped.to_string().as_str()))
        .with_attribute(("time", time.as_str()))
        .write_inner_content(|writer| {
            for record in &run.records {
                case(writer, record, &suite)?;
            }
            Ok(())
        })?;
    let mut text = String::from_utf8(writer.into_inner()).map_err(io::Error::other)?;
    text.push('\n');
    Ok(text)
}

fn case(writer: &mut Writer<Vec<u8>>, record: &Record, suite: &str) -> io::Result<()> {
    let class = format!("{suite}.{}", record.check.area());
    let time = format!("{:.3}", record.time.as_secs_f64());
    let element = writer
        .create_element("testcase")
        .with_attribute(("classname", class.as_str()))
        .with_attribute(("name", record.check.name))
        .with_attribute(("time", time.as_str()));
    match &record.outcome {
        Outcome::Passed => element.write_empty()?,
        Outcome::Skipped { reason } => element.write_inner_content(|writer| {
            let message = printable(reason);
            let skipped = writer.create_element("skipped");
            skipped
                .with_attribute(("message", message.as_str()))
                .write_empty()?;
            Ok(())
        })?,
        Outcome::Failed { reason, .. } => element.write_inner_content(|writer| {
            let (message, details) = (printable(reason), printable(&failure(record)));
            writer
                .create_element("failure")
                .with_attribute(("message", message.as_str()))
                .write_text_content(BytesText::new(&details))?;
            Ok(())
        })?,
    };
    Ok(())
}

/// Without the control characters that XML 1.0 has no form for.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && c != '\n' { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::sample;
    use quick_xml::Reader;

    #[test]
    fn the_document_is_well_formed_and_escapes_what_checks_say() {
        let text = junit(&sample()).unwrap();
        let mut reader = Reader::from_str(&text);
        reader.config_mut().check_end_names = true;
        let mut names = Vec::new();
        loop {
            match reader.read_event().unwrap() {
                Event::Start(tag) | Event::Empty(tag) => {
                    names.push(tag.name().as_ref().to_string());
                }
                Event::Eof => break,
                _ => {}
            }
        }
        let expected = [
            "testsuite",
            "testcase",
            "testcase",
            "failure",
            "testcase",
            "skipped",
        ];
        assert_eq!(names, expected);
        assert!(
            text.contains(r#"tests="3" failures="1" errors="0" skipped="1""#),
            "{text}"
        );
        assert!(text.contains("Two &lt; 1 &amp; all."), "{text}");
        assert!(!text.contains('\u{7}'));
    }
}
