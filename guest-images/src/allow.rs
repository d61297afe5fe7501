//! The committed list of kernel log lines that may appear at level 4 or below, with reasons.

#![forbid(unsafe_code)]

use crate::report::KmsgLine;
use serde::Deserialize;

/// The list as committed.
const COMMITTED: &str = include_str!("../kmsg-allow.json");

/// One kind of line that may appear.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Allowed {
    /// Kernel releases it is allowed on; `*` stands for any characters.
    pub kernels: String,
    /// The whole line; `*` stands for any characters.
    pub text: String,
    /// Why it is no fault.
    pub reason: String,
}

/// Lines that may appear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowList(Vec<Allowed>);

impl AllowList {
    /// The list as committed.
    ///
    /// # Errors
    /// When the file is malformed; a test keeps it from being so.
    pub fn committed() -> Result<Self, serde_json::Error> {
        Self::parse(COMMITTED)
    }

    /// Parses a JSON array of [`Allowed`].
    ///
    /// # Errors
    /// When the text is no such array.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text).map(Self)
    }

    /// Whether `line` may appear on a kernel of this release. A line with a word that marks a
    /// fault of the kernel needs an entry that spells it out, with no `*` in it.
    pub fn allows(&self, kernel: &str, line: &KmsgLine) -> bool {
        let fault = crate::judge::telltale(&line.text).is_some();
        self.0
            .iter()
            .filter(|entry| matches(&entry.kernels, kernel))
            .any(|entry| match fault {
                true => entry.text == line.text,
                false => matches(&entry.text, &line.text),
            })
    }
}

/// Whether the whole of `text` matches `pattern`, in which `*` stands for any characters.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        let Some(at) = rest.find(part) else {
            return false;
        };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The same, by trying every way to cut the text.
    fn matches_slowly(pattern: &[u8], text: &[u8]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some((b'*', rest)) => (0..=text.len()).any(|at| matches_slowly(rest, &text[at..])),
            Some((byte, rest)) => text.first() == Some(byte) && matches_slowly(rest, &text[1..]),
        }
    }

    proptest! {
        #[test]
        fn matching_agrees_with_trying_everything(pattern in "[ab*]{0,7}", text in "[ab]{0,9}") {
            let slow = matches_slowly(pattern.as_bytes(), text.as_bytes());
            prop_assert_eq!(matches(&pattern, &text), slow);
        }
    }

    #[test]
    fn a_star_stands_for_any_characters_and_the_whole_text_must_match() {
        for (pattern, text) in [
            ("*", ""),
            ("*", "anything"),
            ("6.1.*", "6.1.0-56-amd64"),
            ("a*c*e", "abcde"),
            ("a*c*e", "ace"),
            ("*end", "the end"),
            ("same", "same"),
        ] {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("", "x"),
            ("6.1.*", "6.12.3"),
            ("same", "the same"),
            ("same", "same thing"),
            ("a*c*e", "aec"),
            ("ab*ba", "aba"),
        ] {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
    }

    #[test]
    fn an_entry_counts_only_for_its_kernels() {
        let list =
            AllowList::parse(r#"[{"kernels":"6.1.*","text":"odd: *","reason":"known"}]"#).unwrap();
        let line = |text: &str| KmsgLine {
            level: 4,
            time_us: 0,
            text: text.into(),
        };
        assert!(list.allows("6.1.0-56-amd64", &line("odd: 3")));
        assert!(!list.allows("7.3.4-amd64", &line("odd: 3")));
        assert!(!list.allows("6.1.0-56-amd64", &line("very odd: 3")));
    }

    #[test]
    fn a_line_that_sounds_like_a_fault_needs_an_entry_that_spells_it_out() {
        let list = AllowList::parse(
            r#"[{"kernels":"*","text":"odd: *","reason":"known"},
                {"kernels":"*","text":"old: WARNING: see there","reason":"known"}]"#,
        )
        .unwrap();
        let line = |text: &str| KmsgLine {
            level: 4,
            time_us: 0,
            text: text.into(),
        };
        assert!(list.allows("6.1", &line("old: WARNING: see there")));
        assert!(!list.allows("6.1", &line("old: WARNING: see here")));
        assert!(!list.allows("6.1", &line("odd: BUG: 3")));
    }

    #[test]
    fn the_committed_list_parses_and_every_entry_is_narrow_and_has_a_reason() {
        for entry in AllowList::committed().unwrap().0 {
            let fixed = entry.text.replace('*', "");
            assert!(fixed.trim().len() >= 12, "{} is too wide", entry.text);
            assert!(entry.reason.len() >= 20, "{} needs a reason", entry.text);
            let fault = crate::judge::telltale(&entry.text).is_some();
            let wide = entry.text.contains('*') || entry.kernels == "*";
            assert!(!(fault && wide), "{}", entry.text);
        }
    }
}
