//! The rule about a VMM that must not start its guest.

#![forbid(unsafe_code)]

use crate::scenario::Refusal;

/// What is wrong with how a VMM ended that was to refuse, with this exit status (none after a
/// signal) and this on its standard error.
pub fn refusal(asked: &Refusal, status: Option<i32>, said: &str) -> Vec<String> {
    let mut failures = Vec::new();
    if status != Some(asked.status) {
        failures.push(format!("vmm: ended with {status:?}, not {}", asked.status));
    }
    let lines: Vec<_> = said
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    if lines.len() != 1 {
        failures.push(format!("vmm: said {} lines: {said:?}", lines.len()));
    }
    for word in &asked.words {
        if !said.contains(word.as_str()) {
            failures.push(format!("vmm: said nothing of {word:?}: {said:?}"));
        }
    }
    failures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_one_line_with_every_word_and_its_status() {
        let asked = Refusal {
            status: 3,
            words: vec!["group 6".into(), "0000:01:03.0".into()],
        };
        let said = "vpci-vmm: group 6 has 0000:01:03.0\n";
        assert!(refusal(&asked, Some(3), said).is_empty());
        for (status, said) in [
            (Some(0), said),
            (None, said),
            (Some(3), ""),
            (Some(3), "vpci-vmm: group 6\n"),
            (Some(3), "vpci-vmm: group 6 has\n0000:01:03.0\n"),
        ] {
            assert!(
                !refusal(&asked, status, said).is_empty(),
                "{status:?} {said}"
            );
        }
    }
}
