//! Continuous integration: everything that must hold before a change lands.
//!
//! Parts are independent: all of them run even if one fails, and a table at the end shows each
//! with its result and time.
#![forbid(unsafe_code)]

use crate::command;
use crate::failure::Failure;
use crate::fuzz;
use crate::mutants;
use crate::rig;
use crate::rig::Limits;
use crate::rig::scenarios;
use crate::workspace::cargo;
use anyhow::Result;
use anyhow::bail;
use std::fs::File;
use std::time::Duration;
use std::time::Instant;

/// Options of `cargo xtask ci`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run every rig scenario, not only those that each change must pass, and the mutants of the
    /// conformance suite.
    #[arg(long)]
    full: bool,
    #[command(flatten)]
    limits: Limits,
}

/// Crates, by prefix of their names, that the portable core must not depend on.
const NOT_PORTABLE: &[&str] = &[
    "kvm-",
    "vfio-",
    "iommufd-",
    "vmm-sys-util",
    "virtio-queue",
    "event-manager",
];

type FixedPart = fn() -> Result<()>;

/// One part: its name in the table, and what it does.
type Part<'a> = (String, Box<dyn Fn() -> Result<()> + 'a>);

fn parts(options: &Options) -> Vec<Part<'_>> {
    let fixed: [(&str, FixedPart); 9] = [
        ("formatting", formatting),
        ("clippy", clippy),
        ("clippy, portable core", clippy_portable),
        ("documentation", documentation),
        ("tests", tests),
        ("models of lock-free code", loom_models),
        ("portable core", portable_core),
        ("fuzzing", fuzz::run_short),
        ("kernels and images", rig::prepare_all),
    ];
    let mut parts: Vec<Part<'_>> = Vec::new();
    for (name, part) in fixed {
        parts.push((name.into(), Box::new(part)));
    }
    if options.full {
        parts.push(("mutants".into(), Box::new(mutants::run_all)));
    }
    let limits = options.limits;
    let entries = scenarios::all().into_iter();
    let selected: Vec<_> = entries
        .filter(|entry| entry.required || options.full)
        .map(|entry| entry.scenario)
        .collect();
    if !selected.is_empty() {
        let run = move || rig::run_scenarios(&selected, limits);
        parts.push(("rig: scenarios".into(), Box::new(run)));
    }
    parts
}

struct Outcome {
    name: String,
    error: Option<anyhow::Error>,
    time: Duration,
}

/// Runs all parts; [`Failure::Failed`] when one of them does not hold.
pub(crate) fn run(options: &Options) -> Result<()> {
    let start = Instant::now();
    let mut outcomes = Vec::new();
    for (name, part) in parts(options) {
        println!("== {name}");
        let begin = Instant::now();
        let error = part().err();
        if let Some(error) = &error {
            println!("== {name}: FAILED: {error:#}");
        }
        outcomes.push(Outcome {
            name,
            error,
            time: begin.elapsed(),
        });
    }
    print!("{}", table(&outcomes, start.elapsed()));
    let failed = outcomes
        .iter()
        .filter(|outcome| outcome.error.is_some())
        .count();
    if failed > 0 {
        let total = outcomes.len();
        return Err(Failure::Failed(format!("{failed} of {total} parts failed")).into());
    }
    Ok(())
}

fn table(outcomes: &[Outcome], total: Duration) -> String {
    let mut text = String::from("\n");
    for Outcome { name, error, time } in outcomes {
        let result = if error.is_some() { "FAILED" } else { "ok" };
        text += &format!("{name:<24}{result:<8}{:>7.1} s\n", time.as_secs_f64());
    }
    text += &format!("{:<32}{:>7.1} s\n", "total", total.as_secs_f64());
    let failed = outcomes
        .iter()
        .filter(|outcome| outcome.error.is_some())
        .count();
    text += &format!("ci: {} passed, {failed} failed\n", outcomes.len() - failed);
    text
}

fn formatting() -> Result<()> {
    command::run(cargo().args(["fmt", "--all", "--check"]))
}

fn clippy() -> Result<()> {
    command::run(
        cargo()
            .args(["clippy", "--workspace", "--all-targets"])
            .args(["--", "-D", "warnings"]),
    )
}

fn clippy_portable() -> Result<()> {
    command::run(
        cargo()
            .args([
                "clippy",
                "-p",
                "vm-vpci",
                "--no-default-features",
                "--all-targets",
            ])
            .args(["--", "-D", "warnings"]),
    )
}

fn documentation() -> Result<()> {
    command::run(
        cargo()
            .args(["doc", "--workspace", "--no-deps"])
            .env("RUSTDOCFLAGS", "-Dwarnings"),
    )
}

/// Test beds whose absence is a failure here: the rig always, because what it needs is installed
/// by this program; KVM where the machine has it.
fn required_beds() -> &'static str {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => "kvm,rig",
        Err(error) => {
            println!("/dev/kvm: {error}: tests on KVM itself are skipped; the rig has its own");
            "rig"
        }
    }
}

fn tests() -> Result<()> {
    command::run(
        cargo()
            .args(["test", "--workspace"])
            .env("VPCI_REQUIRE", required_beds()),
    )
}

/// Loom's models, in a target directory of their own: the flag is in every crate's fingerprint.
fn loom_models() -> Result<()> {
    command::run(
        cargo()
            .args(["test", "-p", "vm-vpci", "--no-default-features"])
            .args(["--lib", "loom_tests"])
            .env("RUSTFLAGS", "--cfg loom")
            .env("CARGO_TARGET_DIR", "target/loom"),
    )
}

fn portable_core() -> Result<()> {
    let core = ["-p", "vm-vpci", "--no-default-features"];
    command::run(cargo().arg("build").args(core))?;
    let tree = command::output(
        cargo()
            .arg("tree")
            .args(core)
            .args(["--edges", "normal", "--prefix", "none", "--format", "{p}"]),
    )?;
    let found = not_portable(&tree);
    if !found.is_empty() {
        bail!("the portable core depends on {}", found.join(", "));
    }
    Ok(())
}

/// Crates in a `cargo tree` listing (one package a line, name first) that bind the portable core
/// to Linux or to a hypervisor.
fn not_portable(tree: &str) -> Vec<&str> {
    let mut found: Vec<_> = tree
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| NOT_PORTABLE.iter().any(|prefix| name.starts_with(prefix)))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::Outcome;
    use super::not_portable;
    use super::table;
    use std::time::Duration;

    #[test]
    fn crates_that_bind_to_linux_are_found_in_the_dependency_tree() {
        let tree = "vm-vpci v0.1.0 (/src)\nkvm-ioctls v0.25.1\nlog v0.4.35\nkvm-ioctls v0.25.1 (*)\n\
                    vmm-sys-util v0.15.0\nvm-memory v0.18.0\n";
        assert_eq!(not_portable(tree), ["kvm-ioctls", "vmm-sys-util"]);
        assert!(not_portable("vm-vpci v0.1.0\nvm-memory v0.18.0\nuuid v1.0.0\n").is_empty());
    }

    #[test]
    fn the_table_counts_what_failed() {
        let part = |name: &str, error: Option<&str>| Outcome {
            name: name.into(),
            error: error.map(|text| anyhow::anyhow!("{text}")),
            time: Duration::from_millis(1500),
        };
        let text = table(
            &[part("one", None), part("two", Some("no"))],
            Duration::from_secs(3),
        );
        assert!(
            text.contains("one                     ok          1.5 s\n"),
            "{text}"
        );
        assert!(
            text.contains("two                     FAILED      1.5 s\n"),
            "{text}"
        );
        assert!(text.ends_with("ci: 1 passed, 1 failed\n"), "{text}");
    }
}
