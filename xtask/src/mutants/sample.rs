//! A sample of all mutants that cargo-mutants makes of the modules that guests speak to: do the
//! library's own unit tests notice (docs/mutants-sampled.md)?
//!
//! There are far more of them than a run has time for. They are tried in an order of which every
//! beginning covers the modules evenly, until the time is over. What was tried is kept in the
//! target folder and counts as long as the mutated file is the same, so that runs add up.
#![forbid(unsafe_code)]

use super::report;
use super::report::Reasons;
use super::tool::Tool;
use crate::cache;
use crate::failure::Failure;
use anyhow::Context;
use anyhow::Result;
use serde::Deserialize;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

/// Mutants a run of cargo-mutants: it takes seconds to begin.
const BATCH: usize = 4;

/// A mutant of the list that cargo-mutants makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mutant {
    /// Name without line and column: other lines of the file may come and go.
    pub(super) id: String,
    /// Name with line and column, as cargo-mutants knows it.
    pub(super) name: String,
    /// The mutated file, from the root of the workspace.
    pub(super) file: String,
}

/// How a mutant ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Outcome {
    /// A test failed.
    Caught,
    /// The tests did not end.
    Timeout,
    /// It does not compile: no mutant at all.
    Unviable,
    /// All tests passed.
    Missed,
}

/// A mutant that was tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Tried {
    /// Key of the contents of its file.
    file: String,
    outcome: Outcome,
}

/// What was tried so far, by id.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
struct Record(BTreeMap<String, Tried>);

/// Tries mutants for `minutes` and writes docs/mutants-sampled.md; [`Failure::Failed`] if one
/// survives for which no reason is stated.
pub(super) fn run(minutes: u32) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(u64::from(minutes) * 60);
    let reasons = Reasons::read()?;
    let tool = Tool::prepare()?;
    let all = mutants(&tool.list()?);
    let path = tool.folder().join("record.json");
    let mut record = Record::read(&path)?;
    let keys = file_keys(tool.tree(), &all)?;
    record.forget_stale(&all, &keys);
    let queue = record.queue(&in_order(&all), &reasons);
    try_until(end, &tool, &queue, |name, outcome| {
        let mutant = all.iter().find(|mutant| mutant.name == name);
        let mutant = mutant.with_context(|| format!("cargo-mutants made up {name}"))?;
        if outcome == Outcome::Missed {
            println!("missed: {name}");
        }
        let file = keys[&mutant.file].clone();
        record.0.insert(mutant.id.clone(), Tried { file, outcome });
        record.write(&path)
    })?;
    let outcomes: Vec<_> = all
        .iter()
        .map(|mutant| (mutant, record.of(mutant)))
        .collect();
    let summary = report::write(&outcomes, &reasons)?;
    println!("{}", summary.counts);
    match summary.complaint {
        None => Ok(()),
        Some(complaint) => Err(Failure::Failed(complaint).into()),
    }
}

/// Runs batches of `queue` until `end`: none is begun that would not be over by then if it took
/// as long as the one before it.
fn try_until(
    end: Instant,
    tool: &Tool,
    queue: &[&Mutant],
    mut done: impl FnMut(&str, Outcome) -> Result<()>,
) -> Result<()> {
    let mut limit = None;
    let mut last = Duration::ZERO;
    for (index, batch) in queue.chunks(BATCH).enumerate() {
        let start = Instant::now();
        if start + last > end {
            break;
        }
        let names = batch.iter().map(|one| (&one.name[..], &one.file[..]));
        let results = tool.try_these(&names.collect::<Vec<_>>(), limit)?;
        limit = limit.or(results.limit);
        for (name, outcome) in &results.outcomes {
            done(name, *outcome)?;
        }
        last = start.elapsed();
        let tried = index * BATCH + batch.len();
        eprintln!(
            "{tried} tried, {} s a mutant",
            last.as_secs() / batch.len() as u64
        );
    }
    Ok(())
}

/// The mutants of these names and files. What differs by line and column only gets a number.
fn mutants(listed: &[(String, String)]) -> Vec<Mutant> {
    let mut seen = BTreeMap::new();
    let mutant = |(name, file): &(String, String)| {
        // FILE:LINE:COLUMN: WHAT
        let what = name.split_once(": ").map_or(&name[..], |(_, what)| what);
        let mut id = format!("{file}: {what}");
        let count: &mut u32 = seen.entry(id.clone()).or_default();
        *count += 1;
        if *count > 1 {
            id += &format!(" #{count}");
        }
        Mutant {
            id,
            name: name.clone(),
            file: file.clone(),
        }
    };
    listed.iter().map(mutant).collect()
}

/// All mutants in an order of which every beginning is spread evenly over the list: each step goes
/// on by the golden ratio of its length.
fn in_order(all: &[Mutant]) -> Vec<&Mutant> {
    let count = all.len();
    let mut step = (count * 618 / 1000).max(1);
    while common_divisor(step, count) > 1 {
        step += 1;
    }
    (0..count).map(|index| &all[index * step % count]).collect()
}

fn common_divisor(a: usize, b: usize) -> usize {
    match b {
        0 => a,
        _ => common_divisor(b, a % b),
    }
}

/// Keys of the contents of the mutants' files, by file.
fn file_keys(tree: &Path, all: &[Mutant]) -> Result<BTreeMap<String, String>> {
    let mut keys = BTreeMap::new();
    for mutant in all {
        if !keys.contains_key(&mutant.file) {
            let path = tree.join(&mutant.file);
            let contents = fs::read(&path).with_context(|| format!("{}", path.display()))?;
            keys.insert(mutant.file.clone(), cache::content_key([&contents[..]]));
        }
    }
    Ok(keys)
}

impl Record {
    fn read(path: &Path) -> Result<Self> {
        match fs::read(path) {
            Ok(text) => {
                serde_json::from_slice(&text).with_context(|| format!("{}", path.display()))
            }
            Err(_) => Ok(Self::default()),
        }
    }

    fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("{}", path.display()))
    }

    fn of(&self, mutant: &Mutant) -> Option<Outcome> {
        self.0.get(&mutant.id).map(|tried| tried.outcome)
    }

    /// Forgets mutants that are gone, or whose file has changed.
    fn forget_stale(&mut self, all: &[Mutant], keys: &BTreeMap<String, String>) {
        let known: BTreeMap<_, _> = all.iter().map(|mutant| (&mutant.id, mutant)).collect();
        self.0.retain(|id, tried| {
            let mutant = known.get(id);
            mutant.is_some_and(|mutant| keys.get(&mutant.file) == Some(&tried.file))
        });
    }

    /// What to try next: survivors without a reason, since there may be a test by now, then what
    /// was not tried.
    fn queue<'a>(&self, ordered: &[&'a Mutant], reasons: &Reasons) -> Vec<&'a Mutant> {
        let again = |mutant: &&&Mutant| {
            self.of(mutant) == Some(Outcome::Missed) && reasons.of(&mutant.id).is_none()
        };
        let untried = |mutant: &&&Mutant| self.of(mutant).is_none();
        let first = ordered.iter().filter(again);
        first
            .chain(ordered.iter().filter(untried))
            .copied()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(count: usize) -> Vec<Mutant> {
        let name = |index| {
            (
                format!("src/a.rs:{index}:1: change {index}"),
                "src/a.rs".into(),
            )
        };
        mutants(&(0..count).map(name).collect::<Vec<_>>())
    }

    fn record(entries: &[(&Mutant, &str, Outcome)]) -> Record {
        let tried = |(mutant, file, outcome): &(&Mutant, &str, Outcome)| {
            let tried = Tried {
                file: (*file).into(),
                outcome: *outcome,
            };
            (mutant.id.clone(), tried)
        };
        Record(entries.iter().map(tried).collect())
    }

    #[test]
    fn a_mutant_keeps_its_id_when_its_line_moves_and_shares_it_with_no_other() {
        let name = |line| format!("src/a.rs:{line}:9: replace + with - in A::b");
        let pair = |line| (name(line), "src/a.rs".to_owned());
        let found = mutants(&[pair(3), pair(5)]);
        let ids: Vec<_> = found.iter().map(|mutant| &mutant.id[..]).collect();
        let id = "src/a.rs: replace + with - in A::b";
        assert_eq!(ids, [id, &format!("{id} #2")]);
        assert_eq!(found[1].name, name(5));
        assert_eq!(mutants(&[pair(7)])[0].id, id);
    }

    #[test]
    fn the_order_has_every_mutant_once_and_its_beginning_covers_all_parts() {
        for count in [1, 2, 3, 10, 97, 1000, 2184] {
            let all = listed(count);
            let order = in_order(&all);
            let mut names: Vec<_> = order.iter().map(|mutant| &mutant.name).collect();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), count);
        }
        assert!(in_order(&[]).is_empty());
        let all = listed(1000);
        let mut tenths = [0; 10];
        for mutant in &in_order(&all)[..50] {
            let index = all.iter().position(|other| other == *mutant).unwrap();
            tenths[index / 100] += 1;
        }
        assert!(
            tenths.iter().all(|count| (4..=6).contains(count)),
            "{tenths:?}"
        );
    }

    #[test]
    fn survivors_without_a_reason_are_tried_again_before_what_was_not_tried() {
        let all = listed(4);
        let text = format!("{}\n    no promise\n", all[1].id);
        let reasons = Reasons::parse(&text).unwrap();
        let record = record(&[
            (&all[0], "k", Outcome::Caught),
            (&all[1], "k", Outcome::Missed),
            (&all[3], "k", Outcome::Missed),
        ]);
        let ordered: Vec<_> = all.iter().collect();
        assert_eq!(record.queue(&ordered, &reasons), [&all[3], &all[2]]);
    }

    #[test]
    fn a_record_forgets_mutants_of_changed_files_and_those_that_are_gone() {
        let all = listed(3);
        let mut record = record(&[
            (&all[0], "new", Outcome::Caught),
            (&all[1], "old", Outcome::Missed),
            (&all[2], "new", Outcome::Caught),
        ]);
        let keys = BTreeMap::from([("src/a.rs".to_owned(), "new".to_owned())]);
        record.forget_stale(&all[..2], &keys);
        assert_eq!(record.0.keys().collect::<Vec<_>>(), [&all[0].id]);
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_empty_where_there_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        assert!(Record::read(&path).unwrap().0.is_empty());
        let all = listed(1);
        let written = record(&[(&all[0], "k", Outcome::Timeout)]);
        written.write(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap().0, written.0);
        fs::write(&path, "{").unwrap();
        assert!(Record::read(&path).is_err());
    }
}
