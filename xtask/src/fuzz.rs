//! Fuzzing: builds the targets of `fuzz/` with cargo-fuzz, and lets libFuzzer run each for a while.
//!
//! What a run finds is kept in `target/fuzz`, so that the next goes on from there; `fuzz/corpus`
//! holds the inputs to begin with.
#![forbid(unsafe_code)]

use crate::apt;
use crate::cargo_tool::CargoTool;
use crate::command;
use crate::failure::Failure;
use crate::workspace;
use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use std::fs;
use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

const TOOL: CargoTool = CargoTool {
    name: "cargo-fuzz",
    version: "0.13.2",
};
/// libFuzzer is C++.
const COMPILER: (&str, &str) = ("c++", "g++");
/// Seconds for each target that `cargo xtask ci` takes.
const SHORT: u32 = 6;
/// Longest input in bytes: a few hundred steps.
const MAX_LEN: u32 = 2048;
/// Most memory in MB, and the most time of one input in seconds: above is a failure.
const MEMORY: u32 = 1024;
const PATIENCE: u32 = 30;
/// Lines of a log that are shown after a failure.
const TAIL: usize = 40;

/// Options of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Time for each target.
    #[arg(long, value_name = "N", default_value_t = 60, conflicts_with_all = ["replay", "input"],
          value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Only this target; repeatable. All without.
    #[arg(long = "target", value_name = "NAME")]
    targets: Vec<String>,
    /// Run the committed corpus and what earlier runs found, once, instead of fuzzing.
    #[arg(long)]
    replay: bool,
    /// Run this input, such as one that failed, on the one target given.
    #[arg(long, value_name = "FILE", conflicts_with = "replay")]
    input: Option<PathBuf>,
    /// Which mistakes are looked for besides panics.
    #[arg(long, value_enum, value_name = "WHICH", default_value_t = Sanitizer::Address)]
    sanitizer: Sanitizer,
}

/// Sanitizers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Sanitizer {
    /// Bad accesses to memory, and memory that is lost.
    Address,
    /// None: several times as fast.
    None,
}

impl Sanitizer {
    fn name(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::None => "none",
        }
    }
}

/// What libFuzzer does.
#[derive(Debug, Clone, Copy)]
enum Job<'a> {
    Fuzz(u32),
    Replay,
    One(&'a Path),
}

/// What a run of a target came to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Figures {
    executions: u64,
    /// Edges of the program's control flow that were reached, and how many there are.
    edges: (u64, u64),
}

/// The programs, built.
struct Programs {
    folder: PathBuf,
    work: PathBuf,
}

/// Fuzzes, or replays.
pub(crate) fn run(options: &Options) -> Result<()> {
    let targets = chosen(&options.targets)?;
    let job = match (&options.input, options.replay) {
        (Some(_), _) if options.targets.len() != 1 => {
            let text = "--input: say which target it is for, with one --target";
            return Err(Failure::Usage(text.into()).into());
        }
        (Some(input), _) if !input.is_file() => {
            let text = format!("--input {}: there is no such file", input.display());
            return Err(Failure::Usage(text).into());
        }
        (Some(input), _) => Job::One(input),
        (None, true) => Job::Replay,
        (None, false) => Job::Fuzz(options.seconds),
    };
    let programs = Programs::build(options.sanitizer)?;
    programs.run_all(&targets, job)
}

/// The part of `cargo xtask ci`: replays what is known, and fuzzes each target for some seconds.
pub(crate) fn run_short() -> Result<()> {
    let targets = chosen(&[])?;
    let programs = Programs::build(Sanitizer::Address)?;
    programs.run_all(&targets, Job::Fuzz(SHORT))
}

/// The targets asked for; all if none was.
fn chosen(asked: &[String]) -> Result<Vec<String>> {
    let folder = workspace::root().join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut all = Vec::new();
    for entry in entries {
        let path = entry?.path();
        all.extend(
            path.file_stem()
                .map(|stem| stem.to_string_lossy().into_owned()),
        );
    }
    all.sort();
    if let Some(unknown) = asked.iter().find(|name| !all.contains(name)) {
        let text = format!("--target {unknown}: there are {}", all.join(", "));
        return Err(Failure::Usage(text).into());
    }
    all.retain(|name| asked.is_empty() || asked.contains(name));
    Ok(all)
}

impl Programs {
    fn build(sanitizer: Sanitizer) -> Result<Self> {
        if command::output(Command::new(COMPILER.0).arg("--version")).is_err() {
            apt::install(&[COMPILER.1])?;
        }
        let program = TOOL.program(&["fuzz", "--version"])?;
        let work = workspace::target().join("fuzz");
        let build = work.join(sanitizer.name());
        let mut command = Command::new(program);
        command.current_dir(workspace::root());
        command.args(["fuzz", "build", "--features", "libfuzzer"]);
        command.args(["--sanitizer", sanitizer.name(), "--target-dir"]);
        command.arg(&build);
        // What instruments code is not stable, but it is in the stable compiler.
        command.env("RUSTC_BOOTSTRAP", "1").env_remove("RUSTFLAGS");
        command::run_on_stderr(&mut command)?;
        Ok(Self {
            folder: find_programs(&build)?,
            work,
        })
    }

    fn run_all(&self, targets: &[String], job: Job<'_>) -> Result<()> {
        println!(
            "{:<12}{:>12}{:>16}{:>9}",
            "target", "executions", "edges", "time"
        );
        let (mut failed, mut total) = (Vec::new(), 0);
        for target in targets {
            let begin = Instant::now();
            match self.run(target, job) {
                Ok(figures) => {
                    total += figures.executions;
                    println!("{}", row(target, &figures, begin.elapsed()));
                }
                Err(error) => {
                    println!("{target:<12}FAILED: {error:#}");
                    failed.push(target.as_str());
                }
            }
        }
        println!("{:<12}{total:>12}", "all");
        if failed.is_empty() {
            return Ok(());
        }
        Err(Failure::Failed(format!("fuzzing failed: {}", failed.join(", "))).into())
    }

    /// Runs one target; its output is kept in a file.
    fn run(&self, target: &str, job: Job<'_>) -> Result<Figures> {
        let artifacts = self.work.join("failed").join(target);
        let found = self.work.join("corpus").join(target);
        fs::create_dir_all(&artifacts)?;
        fs::create_dir_all(&found)?;
        let log = self.work.join(format!("{target}.log"));
        let file = File::create(&log).with_context(|| log.display().to_string())?;
        let mut command = Command::new(self.folder.join(target));
        command.current_dir(workspace::root());
        command.arg(format!("-artifact_prefix={}/", artifacts.display()));
        command.arg(format!("-max_len={MAX_LEN}"));
        command.arg(format!("-rss_limit_mb={MEMORY}"));
        command.arg(format!("-timeout={PATIENCE}"));
        command.arg("-print_final_stats=1");
        match job {
            Job::Fuzz(seconds) => command.arg(format!("-max_total_time={seconds}")),
            Job::Replay => command.arg("-runs=0"),
            Job::One(input) => command.arg(fs::canonicalize(input)?),
        };
        if !matches!(job, Job::One(_)) {
            // New inputs go to the first.
            command.arg(&found);
            command.arg(workspace::root().join("fuzz/corpus").join(target));
        }
        command.stdin(Stdio::null()).stdout(file.try_clone()?);
        let status = command.stderr(file).status();
        let status = status.with_context(|| format!("cannot start {target}"))?;
        let bytes = fs::read(&log).with_context(|| log.display().to_string())?;
        let text = String::from_utf8_lossy(&bytes);
        if status.success() {
            return Ok(figures(&text));
        }
        for line in tail(&text) {
            println!("  {line}");
        }
        match (job, failing_input(&text)) {
            (Job::One(_), _) => bail!("the input fails; {}", log.display()),
            (_, Some(input)) => {
                bail!("{status}; again with `cargo xtask fuzz --target {target} --input {input}`")
            }
            (_, None) => bail!("{status}; {}", log.display()),
        }
    }
}

/// Where cargo put the programs: in the folder of the host's target triple.
fn find_programs(build: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(build).with_context(|| build.display().to_string())?;
    for entry in entries {
        let folder = entry?.path().join("release");
        if folder.is_dir() {
            return Ok(folder);
        }
    }
    bail!("{}: no programs were built", build.display())
}

fn row(target: &str, figures: &Figures, time: Duration) -> String {
    let Figures {
        executions,
        edges: (reached, all),
    } = figures;
    let edges = format!("{reached}/{all}");
    format!(
        "{target:<12}{executions:>12}{edges:>16}{:>7.1} s",
        time.as_secs_f64()
    )
}

/// Number behind a word in a line.
fn number(line: &str, word: &str) -> Option<u64> {
    let rest = line.split_once(word)?.1.trim_start();
    let end = rest.find(|c: char| !c.is_ascii_digit());
    rest[..end.unwrap_or(rest.len())].parse().ok()
}

/// What libFuzzer prints of itself.
fn figures(log: &str) -> Figures {
    let mut figures = Figures::default();
    for line in log.lines() {
        if let Some(all) = number(line, "Loaded 1 modules   (") {
            figures.edges.1 = all;
        }
        if line.starts_with('#')
            && let Some(reached) = number(line, " cov: ")
        {
            figures.edges.0 = reached;
        }
        if let Some(executions) = number(line, "stat::number_of_executed_units:") {
            figures.executions = executions;
        }
    }
    figures
}

fn failing_input(log: &str) -> Option<&str> {
    let line = log
        .lines()
        .find(|line| line.contains("Test unit written to"))?;
    Some(line.split_once("written to")?.1.trim())
}

/// The end of a log, without what libFuzzer says on its way.
fn tail(log: &str) -> Vec<&str> {
    let lines = log.lines();
    let told: Vec<_> = lines
        .filter(|line| !line.starts_with('#') && !line.trim_start().starts_with("NEW_FUNC"))
        .collect();
    told[told.len().saturating_sub(TAIL)..].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
INFO: Seed: 2915467366
INFO: Loaded 1 modules   (18453 inline 8-bit counters): 18453 [0x55, 0x56),
#2\tINITED cov: 1205 ft: 1206 corp: 1/1b exec/s: 0 rss: 35Mb
\tNEW_FUNC[1/2]: 0x55f0 in core::fmt
#125452\tDONE   cov: 463 ft: 1896 corp: 415/30Kb lim: 467 exec/s: 13939 rss: 28Mb
Done 125452 runs in 9 second(s)
stat::number_of_executed_units: 125452
stat::average_exec_per_sec:     13939
";

    #[test]
    fn figures_are_found_in_what_the_fuzzer_prints() {
        let expected = Figures {
            executions: 125_452,
            edges: (463, 18_453),
        };
        assert_eq!(figures(LOG), expected);
        let line = row("ring", &expected, Duration::from_secs(9));
        assert_eq!(line, "ring              125452       463/18453    9.0 s");
    }

    #[test]
    fn the_input_that_failed_is_named() {
        let log = "==1== ERROR: libFuzzer: deadly signal\n\
                   artifact_prefix='x/'; Test unit written to target/fuzz/failed/ring/crash-1\n";
        assert_eq!(failing_input(log), Some("target/fuzz/failed/ring/crash-1"));
        assert_eq!(failing_input(LOG), None);
    }

    #[test]
    fn the_end_of_a_log_leaves_the_progress_out() {
        assert_eq!(tail(LOG).len(), 5);
    }

    #[test]
    fn targets_are_the_programs_and_unknown_ones_are_refused() {
        let all = chosen(&[]).unwrap();
        assert!(all.contains(&"guest".to_owned()), "{all:?}");
        assert_eq!(chosen(&["ring".into()]).unwrap(), ["ring"]);
        let error = chosen(&["moon".into()]).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("--target moon: there are config")
        );
    }
}
