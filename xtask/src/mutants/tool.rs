//! cargo-mutants: gets it, and runs it on a copy of the workspace.
//!
//! The copy stays between runs, so that a mutant costs one incremental build. cargo-mutants
//! changes its files in place; what a killed run left there is mended by the next.
#![forbid(unsafe_code)]

use super::sample::Outcome;
use crate::cargo_tool::CargoTool;
use crate::command;
use crate::workspace;
use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::fs;
use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

const TOOL: CargoTool = CargoTool {
    name: "cargo-mutants",
    version: "27.1.0",
};
/// Random cases of a property test, and no search for a smaller one that fails: a mutant that only
/// the full number finds lacks a test of its own.
const PROPERTY_TESTS: [(&str, &str); 2] =
    [("PROPTEST_CASES", "32"), ("PROPTEST_MAX_SHRINK_ITERS", "0")];
/// Least time that tests have, and the multiple of what they take without a mutant.
const PATIENCE: (Duration, u32) = (Duration::from_secs(20), 5);
/// Exit statuses of cargo-mutants after which there are outcomes: all caught, some missed, some
/// timed out.
const DONE: [i32; 3] = [0, 2, 3];
/// That of a run whose tests fail without a mutant.
const UNSOUND: i32 = 4;

/// cargo-mutants, with its copy of the workspace.
#[derive(Debug)]
pub(super) struct Tool {
    program: PathBuf,
    folder: PathBuf,
    tree: PathBuf,
}

/// What a run of cargo-mutants found.
#[derive(Debug, PartialEq)]
pub(super) struct Results {
    /// Outcomes by name.
    pub(super) outcomes: Vec<(String, Outcome)>,
    /// Time limit for the tests, if the run tried them without a mutant.
    pub(super) limit: Option<Duration>,
}

/// `outcomes.json`, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Outcomes {
    outcomes: Vec<Reported>,
}

#[derive(Debug, Deserialize)]
struct Reported {
    scenario: Scenario,
    summary: String,
    phase_results: Vec<Phase>,
}

#[derive(Debug, Deserialize)]
enum Scenario {
    Baseline,
    Mutant { name: String },
}

#[derive(Debug, Deserialize)]
struct Phase {
    phase: String,
    duration: f64,
}

/// An entry of the list.
#[derive(Debug, Deserialize)]
struct Listed {
    name: String,
    file: String,
}

impl Tool {
    /// Installs cargo-mutants if need be and brings the copy up to date.
    pub(super) fn prepare() -> Result<Self> {
        let folder = workspace::target().join("sample");
        let tree = folder.join("tree");
        copy_workspace(&tree)?;
        Ok(Self {
            program: TOOL.program(&["mutants", "--version"])?,
            folder,
            tree,
        })
    }

    /// Where everything about the sample is kept.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The copy of the workspace.
    pub(super) fn tree(&self) -> &Path {
        &self.tree
    }

    /// Name and file of every mutant.
    pub(super) fn list(&self) -> Result<Vec<(String, String)>> {
        let text = command::output(self.command().args(["--list", "--json"]))?;
        let listed: Vec<Listed> = serde_json::from_str(&text)?;
        let pair = |mutant: Listed| (mutant.name, mutant.file);
        Ok(listed.into_iter().map(pair).collect())
    }

    /// Tries the mutants of these names and files. Without a `limit` for the tests, they are run without a
    /// mutant first.
    pub(super) fn try_these(
        &self,
        mutants: &[(&str, &str)],
        limit: Option<Duration>,
    ) -> Result<Results> {
        let mut run = self.command();
        run.args(["--in-place", "--no-shuffle", "--colors=never", "--output"]);
        run.arg(&self.folder);
        if let Some(limit) = limit {
            let seconds = limit.as_secs().to_string();
            run.args(["--baseline=skip", "--timeout", &seconds]);
        }
        for (name, file) in mutants {
            // Mutants that delete a field pass every filter but the one by file.
            run.args(["--file", file]);
            run.args(["--re", &format!("^{}$", escaped(name))]);
        }
        let log = self.folder.join("log");
        let file = File::create(&log).with_context(|| format!("{}", log.display()))?;
        run.stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let status = run.status().context("cannot start cargo-mutants")?;
        match status.code() {
            Some(code) if DONE.contains(&code) => {}
            Some(UNSOUND) => bail!("the tests fail without a mutant: see {}", log.display()),
            _ => bail!("cargo-mutants ended with {status}: see {}", log.display()),
        }
        let path = self.folder.join("mutants.out/outcomes.json");
        let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        results(&text)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["mutants", "-p", "vm-vpci"]);
        command.current_dir(&self.tree);
        command.env("CARGO_TARGET_DIR", self.folder.join("build"));
        command.env("CARGO_INCREMENTAL", "1");
        command.env("CARGO_PROFILE_DEV_DEBUG", "0");
        command.envs(PROPERTY_TESTS).env_remove("RUSTFLAGS");
        command
    }
}

/// Makes `tree` a copy of the files that git knows or would know. Files that are the same already
/// keep their time, by which cargo sees what to build.
fn copy_workspace(tree: &Path) -> Result<()> {
    let mut list = Command::new("git");
    list.args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]);
    let listed = command::output(list.current_dir(workspace::root()))?;
    let files: BTreeSet<_> = listed.split_terminator('\0').collect();
    let files: BTreeSet<_> = files
        .into_iter()
        .map(PathBuf::from)
        .filter(|file| workspace::root().join(file).is_file())
        .collect();
    for file in &files {
        copy_if_different(&workspace::root().join(file), &tree.join(file))?;
    }
    remove_others(tree, tree, &files)
}

fn copy_if_different(from: &Path, to: &Path) -> Result<()> {
    let contents = fs::read(from).with_context(|| format!("{}", from.display()))?;
    if fs::read(to).is_ok_and(|there| there == contents) {
        return Ok(());
    }
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(to, contents).with_context(|| format!("{}", to.display()))
}

/// Removes the files of `folder` in `tree` that are not in `files`.
fn remove_others(tree: &Path, folder: &Path, files: &BTreeSet<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_others(tree, &path, files)?;
        } else if !files.contains(path.strip_prefix(tree)?) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// A regular expression for exactly this text.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        if r"\.+*?()|[]{}^$&~#-".contains(character) {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}

/// What `outcomes.json` says.
fn results(text: &str) -> Result<Results> {
    let read: Outcomes = serde_json::from_str(text)?;
    let mut results = Results {
        outcomes: Vec::new(),
        limit: None,
    };
    for reported in read.outcomes {
        match reported.scenario {
            Scenario::Baseline => {
                let tests = reported
                    .phase_results
                    .iter()
                    .find(|one| one.phase == "Test");
                let taken = tests
                    .context("no tests were run without a mutant")?
                    .duration;
                let limit = Duration::from_secs_f64(taken) * PATIENCE.1;
                results.limit = Some(limit.max(PATIENCE.0));
            }
            Scenario::Mutant { name } => {
                let outcome = match &reported.summary[..] {
                    "CaughtMutant" => Outcome::Caught,
                    "MissedMutant" => Outcome::Missed,
                    "Timeout" => Outcome::Timeout,
                    "Unviable" => Outcome::Unviable,
                    other => bail!("{name} ended with {other}"),
                };
                results.outcomes.push((name, outcome));
            }
        }
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_and_the_time_of_sound_tests_are_read_from_a_report() {
        let text = r#"{"outcomes": [
            {"scenario": "Baseline", "summary": "Success", "phase_results": [
                {"phase": "Build", "duration": 90.0}, {"phase": "Test", "duration": 6.0}]},
            {"scenario": {"Mutant": {"name": "a"}}, "summary": "MissedMutant", "phase_results": []},
            {"scenario": {"Mutant": {"name": "b"}}, "summary": "Unviable", "phase_results": []}]}"#;
        let expected = Results {
            outcomes: vec![
                ("a".into(), Outcome::Missed),
                ("b".into(), Outcome::Unviable),
            ],
            limit: Some(Duration::from_secs(30)),
        };
        assert_eq!(results(text).unwrap(), expected);
        let text = text.replace("Unviable", "Failure");
        assert!(results(&text).is_err());
        let text = text.replace("6.0", "1.0").replace("Failure", "Timeout");
        assert_eq!(results(&text).unwrap().limit, Some(PATIENCE.0));
    }

    #[test]
    fn every_sign_of_a_name_stands_for_itself() {
        let name = "src/a.rs:1:2: replace || with && in <impl A for B>::c -> Option<[u8; 4]>";
        let expected =
            r"src/a\.rs:1:2: replace \|\| with \&\& in <impl A for B>::c \-> Option<\[u8; 4\]>";
        assert_eq!(escaped(name), expected);
    }

    #[test]
    fn a_copy_has_the_files_that_are_listed_no_others_and_keeps_the_time_of_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let (from, tree) = (folder.path().join("from"), folder.path().join("tree"));
        fs::write(&from, "sound").unwrap();
        let to = tree.join("src/a.rs");
        copy_if_different(&from, &to).unwrap();
        let long_ago = std::time::SystemTime::UNIX_EPOCH;
        File::options()
            .append(true)
            .open(&to)
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
        copy_if_different(&from, &to).unwrap();
        assert_eq!(to.metadata().unwrap().modified().unwrap(), long_ago);
        fs::write(&to, "mutated").unwrap();
        copy_if_different(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "sound");
        fs::write(tree.join("src/gone.rs"), "").unwrap();
        remove_others(&tree, &tree, &BTreeSet::from(["src/a.rs".into()])).unwrap();
        assert_eq!(fs::read_dir(tree.join("src")).unwrap().count(), 1);
    }
}
