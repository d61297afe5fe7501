//! What the sample found, as docs/mutants-sampled.md, with the reasons for its survivors.
#![forbid(unsafe_code)]

use super::sample::Mutant;
use super::sample::Outcome;
use crate::workspace;
use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

/// What the generated part of docs/mutants-sampled.md begins with.
const MARK: &str = "<!-- From here on written by `cargo xtask mutants --sample MINUTES`. -->\n";
/// What stands for a reason that is missing.
const NO_REASON: &str = "**no reason stated**";

/// Why survivors survive, by id: xtask/survivors.txt.
#[derive(Debug, Default)]
pub(super) struct Reasons(BTreeMap<String, String>);

impl Reasons {
    pub(super) fn read() -> Result<Self> {
        let path = workspace::root().join("xtask/survivors.txt");
        let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{}", path.display()))
    }

    /// A line for each mutant and an indented one below it with the reason; `#` begins a comment.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut reasons = BTreeMap::new();
        let mut lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        while let Some(id) = lines.next() {
            let reason = lines.next().and_then(|line| line.strip_prefix("    "));
            let Some(reason) = reason.filter(|_| !id.starts_with(' ')) else {
                bail!("a mutant and its reason are expected, not: {id}");
            };
            if reasons.insert(id.to_owned(), reason.to_owned()).is_some() {
                bail!("two reasons for {id}");
            }
        }
        Ok(Self(reasons))
    }

    pub(super) fn of(&self, id: &str) -> Option<&str> {
        self.0.get(id).map(|reason| &reason[..])
    }
}

/// What the command says in the end.
#[derive(Debug)]
pub(super) struct Summary {
    pub(super) counts: String,
    /// What is wrong with the survivors or their reasons.
    pub(super) complaint: Option<String>,
}

/// Numbers of mutants by how they ended.
#[derive(Debug, Default)]
struct Counts {
    made: usize,
    tried: usize,
    by_outcome: BTreeMap<Outcome, usize>,
}

impl Counts {
    fn add(&mut self, outcome: Option<Outcome>) {
        self.made += 1;
        if let Some(outcome) = outcome {
            self.tried += 1;
            *self.by_outcome.entry(outcome).or_default() += 1;
        }
    }

    fn of(&self, outcome: Outcome) -> usize {
        self.by_outcome.get(&outcome).copied().unwrap_or_default()
    }

    fn row(&self, name: &str) -> String {
        let [caught, timeout, unviable, missed] = [
            Outcome::Caught,
            Outcome::Timeout,
            Outcome::Unviable,
            Outcome::Missed,
        ]
        .map(|outcome| self.of(outcome));
        let Self { made, tried, .. } = self;
        format!("| {name} | {made} | {tried} | {caught} | {timeout} | {unviable} | {missed} |\n")
    }

    fn text(&self) -> String {
        format!(
            "{} of {} mutants tried: {} caught, {} missed, {} timed out, {} unviable",
            self.tried,
            self.made,
            self.of(Outcome::Caught),
            self.of(Outcome::Missed),
            self.of(Outcome::Timeout),
            self.of(Outcome::Unviable)
        )
    }
}

fn document() -> PathBuf {
    workspace::root().join("docs/mutants-sampled.md")
}

/// Writes the document.
pub(super) fn write(outcomes: &[(&Mutant, Option<Outcome>)], reasons: &Reasons) -> Result<Summary> {
    let path = document();
    let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    let Some((head, _)) = text.split_once(MARK) else {
        bail!("{}: the line {MARK:?} is missing", path.display());
    };
    let (generated, summary) = generate(outcomes, reasons);
    fs::write(&path, format!("{head}{MARK}{generated}"))?;
    Ok(summary)
}

/// The generated part, and what to say about it.
fn generate(outcomes: &[(&Mutant, Option<Outcome>)], reasons: &Reasons) -> (String, Summary) {
    let mut total = Counts::default();
    let mut modules: BTreeMap<&str, Counts> = BTreeMap::new();
    for (mutant, outcome) in outcomes {
        total.add(*outcome);
        let module = mutant.file.split('/').nth(1).unwrap_or(&mutant.file);
        modules.entry(module).or_default().add(*outcome);
    }
    let mut text = format!("\n{}.\n\n", total.text());
    text += "| module | mutants | tried | caught | timed out | unviable | missed |\n";
    text += "|---|---|---|---|---|---|---|\n";
    for (name, counts) in &modules {
        text += &counts.row(&format!("`{name}`"));
    }
    text += &total.row("all");
    text += "\nSurvivors, and why:\n\n";
    let missed = outcomes
        .iter()
        .filter(|(_, outcome)| *outcome == Some(Outcome::Missed));
    let mut complaints = Vec::new();
    let mut survivors = 0;
    for (mutant, _) in missed {
        survivors += 1;
        let reason = reasons.of(&mutant.id);
        text += &format!("- `{}`: {}\n", mutant.id, reason.unwrap_or(NO_REASON));
        if reason.is_none() {
            complaints.push(format!("{} survives for no stated reason", mutant.name));
        }
    }
    if survivors == 0 {
        text += "none.\n";
    }
    for id in reasons.0.keys() {
        match outcomes.iter().find(|(mutant, _)| mutant.id == *id) {
            None => complaints.push(format!("a reason is stated for {id}, which is no mutant")),
            Some((_, Some(Outcome::Missed) | None)) => {}
            Some(_) => complaints.push(format!("a reason is stated for {id}, which is caught")),
        }
    }
    let complaint = (!complaints.is_empty()).then(|| complaints.join("; "));
    let counts = total.text();
    (text, Summary { counts, complaint })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mutant(file: &str, what: &str) -> Mutant {
        Mutant {
            id: format!("{file}: {what}"),
            name: format!("{file}:1:2: {what}"),
            file: file.into(),
        }
    }

    #[test]
    fn every_survivor_is_listed_and_one_without_a_reason_is_complained_about() {
        let [a, b, c, d] =
            ["one", "two", "three", "four"].map(|what| mutant("src/vpci/a.rs", what));
        let e = mutant("src/vmbus/ring/b.rs", "five");
        let outcomes = [
            (&a, Some(Outcome::Missed)),
            (&b, Some(Outcome::Caught)),
            (&c, None),
            (&d, Some(Outcome::Timeout)),
            (&e, Some(Outcome::Missed)),
        ];
        let reasons = Reasons::parse(&format!("# why\n{}\n    log only\n", a.id)).unwrap();
        let (text, summary) = generate(&outcomes, &reasons);
        assert!(
            text.contains("| `vpci` | 4 | 3 | 1 | 1 | 0 | 1 |\n"),
            "{text}"
        );
        assert!(text.contains("| all | 5 | 4 | 1 | 1 | 0 | 2 |\n"), "{text}");
        assert!(
            text.contains("- `src/vpci/a.rs: one`: log only\n"),
            "{text}"
        );
        assert!(text.contains(&format!("five`: {NO_REASON}\n")), "{text}");
        let complaint = summary.complaint.unwrap();
        assert_eq!(
            complaint,
            "src/vmbus/ring/b.rs:1:2: five survives for no stated reason"
        );
        let counts = "4 of 5 mutants tried: 1 caught, 2 missed, 1 timed out, 0 unviable";
        assert_eq!(summary.counts, counts);
    }

    #[test]
    fn reasons_for_mutants_that_are_gone_or_caught_are_complained_about() {
        let one = mutant("src/vpci/a.rs", "one");
        let reasons = Reasons::parse(&format!("{}\n    x\ngone\n    y\n", one.id)).unwrap();
        let complaint = |outcome| generate(&[(&one, outcome)], &reasons).1.complaint.unwrap();
        assert!(!complaint(None).contains("a.rs"));
        assert!(complaint(Some(Outcome::Missed)).contains("gone, which is no mutant"));
        assert!(complaint(Some(Outcome::Caught)).contains("one, which is caught"));
        let sound = generate(&[(&one, Some(Outcome::Caught))], &Reasons::default());
        assert!(sound.1.complaint.is_none());
        assert!(sound.0.ends_with("none.\n"));
    }

    #[test]
    fn a_list_of_reasons_that_cannot_be_read_is_refused() {
        for text in [
            "one\n",
            "one\ntwo\n",
            "    x\none\n",
            "a\n    x\na\n    y\n",
            "a\n\n#\n",
        ] {
            assert!(Reasons::parse(text).is_err(), "{text:?}");
        }
        assert!(Reasons::parse("").unwrap().of("a").is_none());
    }

    #[test]
    fn the_document_has_the_reasons_of_the_list_and_none_is_missing() {
        let text = fs::read_to_string(document()).unwrap();
        let (_, generated) = text.split_once(MARK).expect("the mark");
        assert!(generated.contains("mutants tried"), "{generated}");
        let reasons = Reasons::read().unwrap();
        for line in generated.lines().filter(|line| line.starts_with("- `")) {
            let (id, reason) = line[3..].split_once("`: ").expect("a reason");
            assert_eq!(reasons.of(id), Some(reason), "{id}");
        }
    }
}
