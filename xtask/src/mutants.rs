//! The mutation check of the conformance suite: breaks the library in one place at a time, and
//! demands that a check notices (docs/mutants.md).
//!
//! The suite is built once, with `--cfg vpci_mutants`, and run once a mutant on the `sim` bed.
//! With `--sample` it is the unit tests that must notice, and cargo-mutants that breaks the library.
#![forbid(unsafe_code)]

use crate::command;
use crate::failure::Failure;
use crate::workspace;
use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use serde::Deserialize;
use std::fs;
use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;
use std::time::Instant;

mod report;
mod sample;
mod tool;

// The list itself, from the library: there it exists only in builds of the mutation check.
#[path = "../../src/mutants.rs"]
#[allow(dead_code, unreachable_pub)]
mod list;

/// Options of `cargo xtask mutants`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only these; the table in docs/mutants.md is left alone then.
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// List the mutants instead of running them.
    #[arg(long)]
    list: bool,
    /// For this many minutes, let cargo-mutants break the modules that guests speak to, and demand
    /// that a unit test notices or a reason is stated (docs/mutants-sampled.md).
    #[arg(long, value_name = "MINUTES", conflicts_with_all = ["names", "list"])]
    sample: Option<u32>,
}

/// Checks of a caught mutant that the table names.
const NAMED: usize = 4;
/// What the generated part of docs/mutants.md begins with.
const MARK: &str = "<!-- From here on written by `cargo xtask mutants`. -->\n";
/// Time that a run has beyond a multiple of what a sound library takes.
const GRACE: Duration = Duration::from_secs(30);
/// That multiple.
const SLOWER: u32 = 5;

/// A mutant: its name, and what the library does while it is selected.
type Mutant = (&'static str, &'static str);

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    /// Checks that failed, in their order.
    failed: Vec<String>,
    /// How the run ended if not by a report: the library hung, or took the process with it.
    end: Option<String>,
}

impl Verdict {
    fn caught(&self) -> bool {
        self.end.is_some() || !self.failed.is_empty()
    }

    /// What caught the mutant, for the table.
    fn text(&self) -> String {
        let named = self.failed.iter().take(NAMED);
        let mut parts: Vec<_> = named.map(|name| format!("`{name}`")).collect();
        if self.failed.len() > NAMED {
            parts.push(format!("{} more", self.failed.len() - NAMED));
        }
        parts.extend(self.end.clone());
        match parts.is_empty() {
            true => "**none**".into(),
            false => parts.join(", "),
        }
    }
}

/// A report of the suite, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Report {
    checks: Vec<ReportedCheck>,
}

#[derive(Debug, Deserialize)]
struct ReportedCheck {
    name: String,
    outcome: String,
}

/// Runs or lists the mutants; [`Failure::Failed`] if one survives.
pub(crate) fn run(options: &Options) -> Result<()> {
    if let Some(minutes) = options.sample {
        return sample::run(minutes);
    }
    let chosen = chosen(&options.names)?;
    if options.list {
        let lines = chosen
            .iter()
            .map(|(name, what)| format!("{name}\n    {what}\n"));
        return command::print(&lines.collect::<String>());
    }
    let suite = Suite::build()?;
    let verdicts = suite.run_all(&chosen)?;
    let results: Vec<_> = chosen.into_iter().zip(verdicts).collect();
    if options.names.is_empty() {
        write_table(&results)?;
    }
    let survivors: Vec<_> = results
        .iter()
        .filter(|(_, verdict)| !verdict.caught())
        .map(|((name, _), _)| *name)
        .collect();
    let total = results.len();
    println!("mutants: {} of {total} caught", total - survivors.len());
    if !survivors.is_empty() {
        return Err(Failure::Failed(format!("no check caught {}", survivors.join(", "))).into());
    }
    Ok(())
}

/// Runs all of them.
pub(crate) fn run_all() -> Result<()> {
    run(&Options {
        names: Vec::new(),
        list: false,
        sample: None,
    })
}

/// The mutants of these names, or all.
fn chosen(names: &[String]) -> Result<Vec<Mutant>> {
    if names.is_empty() {
        return Ok(list::ALL.to_vec());
    }
    let find = |name: &String| {
        let found = list::ALL.iter().find(|(known, _)| known == name);
        found.copied().ok_or_else(|| {
            let text = format!("there is no mutant {name} (see cargo xtask mutants --list)");
            Failure::Usage(text).into()
        })
    };
    names.iter().map(find).collect()
}

/// The suite with the mutants in it.
struct Suite {
    program: PathBuf,
    /// Where reports and logs go.
    folder: PathBuf,
}

impl Suite {
    fn build() -> Result<Self> {
        let target = workspace::target().join("mutants");
        let mut build = workspace::cargo();
        build.args(["build", "-p", "vpci-vmm", "--target-dir"]);
        build.arg(&target).env("RUSTFLAGS", "--cfg vpci_mutants");
        command::run_on_stderr(&mut build)?;
        let folder = target.join("reports");
        fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
        Ok(Self {
            program: target.join("debug/vpci-vmm"),
            folder,
        })
    }

    /// Runs the suite on the sound library, which must pass, then on each mutant, as many at a
    /// time as there are processors.
    fn run_all(&self, mutants: &[Mutant]) -> Result<Vec<Verdict>> {
        let start = Instant::now();
        let sound = self.run("", Duration::MAX)?;
        if sound.caught() {
            bail!("the suite does not pass without a mutant: {}", sound.text());
        }
        let limit = GRACE + start.elapsed() * SLOWER;
        let next = AtomicUsize::new(0);
        let verdicts: Mutex<Vec<Option<Result<Verdict>>>> =
            Mutex::new(mutants.iter().map(|_| None).collect());
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some((name, _)) = mutants.get(index) else {
                    return;
                };
                let verdict = self.run(name, limit);
                if let Ok(verdict) = &verdict {
                    println!("{name}: {}", verdict.text());
                }
                verdicts.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(verdict);
            }
        };
        thread::scope(|scope| {
            let count = thread::available_parallelism().map_or(1, usize::from);
            for _ in 0..count {
                scope.spawn(work);
            }
        });
        let verdicts = verdicts
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        verdicts
            .into_iter()
            .map(|verdict| verdict.context("a mutant was not run")?)
            .collect()
    }

    /// One run; the sound library has an empty name.
    fn run(&self, mutant: &str, limit: Duration) -> Result<Verdict> {
        let name = if mutant.is_empty() { "sound" } else { mutant };
        let report = self.folder.join(format!("{name}.json"));
        let log = self.folder.join(format!("{name}.log"));
        if report.exists() {
            fs::remove_file(&report)?;
        }
        let arguments = ["conformance", "--bed", "sim", "--format", "json"];
        let mut run = Command::new(&self.program);
        run.args(arguments).arg("--output").arg(&report);
        run.env("VPCI_MUTANT", mutant).env_remove("RUST_LOG");
        run.stdin(Stdio::null()).stdout(Stdio::null());
        run.stderr(File::create(&log).with_context(|| format!("{}", log.display()))?);
        let mut child = run
            .spawn()
            .with_context(|| format!("cannot start `{}`", command::display(&run)))?;
        let end = wait(&mut child, limit)?;
        if let Ok(text) = fs::read(&report) {
            let report: Report = serde_json::from_slice(&text)?;
            let failed = report.checks.into_iter();
            let failed = failed.filter(|check| check.outcome == "failed");
            return Ok(Verdict {
                failed: failed.map(|check| check.name).collect(),
                end: None,
            });
        }
        Ok(Verdict {
            failed: failed_so_far(&log)?,
            end: Some(end.unwrap_or_else(|| "the suite ended without a report".into())),
        })
    }
}

/// Waits for the end, at most as long as `limit`; a process that takes longer is killed. `None` if
/// it exited by itself.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<String>> {
    let start = Instant::now();
    loop {
        match child.try_wait()? {
            Some(status) if status.code().is_some() => return Ok(None),
            Some(status) => return Ok(Some(format!("the suite ended with {status}"))),
            None if start.elapsed() > limit => {
                child.kill()?;
                child.wait()?;
                return Ok(Some("the suite does not end".into()));
            }
            None => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Checks that failed in a run without a report: failures are shown as soon as they come.
fn failed_so_far(log: &Path) -> Result<Vec<String>> {
    let text = String::from_utf8_lossy(&fs::read(log)?).into_owned();
    let failures = text.lines().filter_map(|line| line.strip_prefix("FAILED "));
    let names = failures.filter_map(|line| Some(line.split_once(':')?.0.to_owned()));
    Ok(names.collect())
}

fn document() -> PathBuf {
    workspace::root().join("docs/mutants.md")
}

fn write_table(results: &[(Mutant, Verdict)]) -> Result<()> {
    let path = document();
    let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    let Some((head, _)) = text.split_once(MARK) else {
        bail!("{}: the line {MARK:?} is missing", path.display());
    };
    fs::write(&path, format!("{head}{MARK}{}", table(results)))?;
    Ok(())
}

fn table(results: &[(Mutant, Verdict)]) -> String {
    let mut text = format!("\n{} mutants.\n\n", results.len());
    text += "| mutant | while it is selected | caught by |\n|---|---|---|\n";
    for ((name, what), verdict) in results {
        text += &format!("| `{name}` | {what} | {} |\n", verdict.text());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Names in the `mutant!` of a file, with their number.
    fn used(text: &str, names: &mut BTreeMap<String, u32>) {
        for rest in text.split("mutant!(").skip(1) {
            let name = rest.trim_start().strip_prefix('"');
            if let Some((name, _)) = name.and_then(|rest| rest.split_once('"')) {
                *names.entry(name.to_owned()).or_default() += 1;
            }
        }
    }

    fn scan(folder: &Path, names: &mut BTreeMap<String, u32>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                scan(&path, names);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                used(&fs::read_to_string(&path).unwrap(), names);
            }
        }
    }

    #[test]
    fn every_mutant_of_the_list_is_in_the_code_once_and_the_other_way_round() {
        let mut names = BTreeMap::new();
        scan(&workspace::root().join("src"), &mut names);
        let listed: BTreeMap<_, _> = list::ALL
            .iter()
            .map(|(name, _)| ((*name).to_owned(), 1))
            .collect();
        assert_eq!(names, listed);
        assert_eq!(listed.len(), list::ALL.len(), "a name is listed twice");
    }

    #[test]
    fn the_table_in_the_docs_has_every_mutant_of_the_list_and_each_is_caught() {
        let text = fs::read_to_string(document()).unwrap();
        let (_, generated) = text.split_once(MARK).expect("the mark");
        let rows: Vec<Vec<_>> = generated
            .lines()
            .filter(|line| line.starts_with("| `"))
            .map(|line| line.split(" | ").collect())
            .collect();
        let found: Vec<_> = rows.iter().map(|row| (row[0], row[1])).collect();
        let listed: Vec<_> = list::ALL
            .iter()
            .map(|(name, what)| (format!("| `{name}`"), *what))
            .collect();
        let listed: Vec<_> = listed
            .iter()
            .map(|(name, what)| (&name[..], *what))
            .collect();
        assert_eq!(
            found, listed,
            "docs/mutants.md is stale: cargo xtask mutants"
        );
        assert!(!generated.contains("**none**"), "a mutant survives");
    }

    #[test]
    fn a_verdict_names_some_checks_and_how_the_run_ended() {
        let verdict = |count: usize, end: Option<&str>| Verdict {
            failed: (0..count).map(|index| format!("c{index}")).collect(),
            end: end.map(str::to_owned),
        };
        assert_eq!(verdict(0, None).text(), "**none**");
        assert!(!verdict(0, None).caught());
        assert_eq!(verdict(6, None).text(), "`c0`, `c1`, `c2`, `c3`, 2 more");
        let hung = verdict(1, Some("the suite does not end"));
        assert_eq!(hung.text(), "`c0`, the suite does not end");
        assert!(verdict(0, Some("x")).caught());
    }

    #[test]
    fn an_unknown_name_is_a_usage_error() {
        let error = chosen(&["no-such".into()]).unwrap_err();
        let failure = error.downcast_ref::<Failure>().expect("a failure");
        assert!(matches!(failure, Failure::Usage(_)), "{failure}");
        assert_eq!(chosen(&[]).unwrap().len(), list::ALL.len());
    }

    #[test]
    fn a_run_that_does_not_end_is_killed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let end = wait(&mut child, Duration::from_millis(30)).unwrap();
        assert_eq!(end.as_deref(), Some("the suite does not end"));
        let mut child = Command::new("true").spawn().unwrap();
        assert_eq!(wait(&mut child, Duration::MAX).unwrap(), None);
    }
}
