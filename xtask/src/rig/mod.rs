//! The nested test rig: scenarios in which a Debian kernel under QEMU (L1) runs the reference VMM,
//! whose guests (L2) are other unmodified Debian kernels.
//!
//! Everything of a scenario is below `target/rig/NAME`: the folder shared with L1, `serial.log`
//! with both kernels' consoles, and `qemu.log`.
#![forbid(unsafe_code)]

mod devices;
mod machine;
mod outcome;
pub(crate) mod scenarios;
mod shell;

use crate::binaries;
use crate::binaries::Binaries;
use crate::cache::Cache;
use crate::command;
use crate::emulator::Emulator;
use crate::failure::Failure;
use crate::images;
use crate::images::Image;
use crate::images::Init;
use crate::kernel;
use crate::kernel::FAMILIES;
use crate::kernel::Kernel;
use crate::kernel::Role;
use crate::workspace;
use anyhow::Context;
use anyhow::Result;
use guest_images::scenario::L1;
use guest_images::scenario::Scenario;
use guest_images::verdict::Verdict;
use machine::End;
use machine::Machine;
use machine::Setup;
use outcome::Outcome;
use std::fs;
use std::fs::File;
use std::num::NonZeroUsize;
use std::panic;
use std::path::Path;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

/// Time that L1 gets to boot; it takes about 10 s on two idle cores.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// Times that an L1 is started before its boot counts as failed.
const BOOTS: u32 = 3;
/// Time that L1 gets to power off after its verdict.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(30);
/// A sign of life is printed after this much time without progress.
const SIGN_OF_LIFE: Duration = Duration::from_secs(20);

/// Kernel command line of L1.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 vpci.role=rig";

/// Options of `cargo xtask rig`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Scenarios to run, in this order.
    #[arg(value_name = "SCENARIO")]
    scenarios: Vec<String>,
    /// Run all scenarios.
    #[arg(long, conflicts_with = "scenarios")]
    all: bool,
    /// List the scenarios.
    #[arg(long, conflicts_with_all = ["scenarios", "all"])]
    list: bool,
    /// Print the results as one JSON object instead of a table.
    #[arg(long)]
    json: bool,
    /// Show the serial console.
    #[arg(long, short)]
    verbose: bool,
    /// Record what KVM does in L1, and show the last of it on the console if a run fails. Slower.
    #[arg(long, conflicts_with_all = ["list", "shell_command"])]
    trace: bool,
    /// Run CMD in L1 with busybox' shell instead of a scenario, and print its output. L1 has
    /// /dev/kvm, and in /host the static vpci-vmm with FAMILY.vmlinuz and FAMILY.initramfs of
    /// every kernel family.
    #[arg(long, value_name = "CMD", conflicts_with_all = ["scenarios", "all", "list", "json"])]
    shell_command: Option<String>,
    /// A file that --shell-command finds in /host; may be given several times.
    #[arg(long, value_name = "FILE", requires = "shell_command")]
    file: Vec<PathBuf>,
    /// Put the rig's QEMU into /host/emulator for --shell-command, to measure beside it.
    #[arg(long, requires = "shell_command")]
    emulator: bool,
    /// Devices that --shell-command finds bound to vfio-pci, behind an IOMMU: all, or some of
    /// edu, nvme, rng, e1000e, nvme-2, shared-edu-1, shared-edu-2 and shared-rng, with commas.
    #[arg(long, value_name = "LIST", requires = "shell_command")]
    devices: Option<String>,
    /// Kernel family of L1 for --shell-command.
    #[arg(long, value_name = "FAMILY", requires = "shell_command")]
    l1_kernel: Option<String>,
    /// Scenarios that run at the same time. Each takes two cores and 3 GiB of memory.
    #[arg(long, value_name = "N", default_value_t = default_jobs())]
    jobs: NonZeroUsize,
    #[command(flatten)]
    limits: Limits,
}

/// As many scenarios at once as there are pairs of cores, and two at most: more want too much
/// memory.
fn default_jobs() -> NonZeroUsize {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    NonZeroUsize::MIN.saturating_add(usize::from(cores >= 4))
}

/// How long things may take.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Limits {
    /// Factor for every time limit, for slow or busy machines.
    #[arg(
        long,
        value_name = "FACTOR",
        env = "VPCI_RIG_TIMEOUT_SCALE",
        default_value_t = 1.0,
        value_parser = factor
    )]
    timeout_scale: f64,
}

fn factor(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(factor) if (0.1..=100.0).contains(&factor) => Ok(factor),
        _ => Err("not a number from 0.1 to 100".into()),
    }
}

/// Runs what the options ask for.
pub(crate) fn run(options: &Options) -> Result<()> {
    if options.list {
        return command::print(&list());
    }
    let scale = options.limits.timeout_scale;
    if let Some(command) = &options.shell_command {
        let l1 = L1 {
            kernel: options.l1_kernel.clone(),
            devices: match &options.devices {
                Some(list) => devices::parse(list)?,
                None => Vec::new(),
            },
            trace: false,
        };
        let mut families: Vec<_> = FAMILIES.iter().map(|family| family.name).collect();
        // A kernel that is there anyway may be a guest's as well.
        let own: Vec<_> = l1.kernel.as_deref().into_iter().collect();
        families.extend(own.iter().filter(|name| **name == kernel::BUILT.name));
        let prepared = Prepared::new(&families, &own)?;
        let emulator = options.emulator;
        return shell::run(&prepared, command, &options.file, emulator, &l1, scale);
    }
    let mut selected = if options.all {
        scenarios::all()
            .into_iter()
            .map(|entry| entry.scenario)
            .collect()
    } else {
        scenarios::select(&options.scenarios)?
    };
    if selected.is_empty() {
        print!("{}", list());
        return Err(Failure::Usage("no scenario given: name some, or --all".into()).into());
    }
    for scenario in &mut selected {
        scenario.l1.trace = options.trace;
    }
    let prepared = Prepared::for_scenarios(&selected)?;
    let interrupted = machine::interruption()?;
    let watch = Watch {
        scale,
        echo: options.verbose,
        interrupted: &interrupted,
    };
    let outcomes = prepared.run_all(&selected, options.jobs, &watch)?;
    if options.json {
        println!("{}", outcome::json(&outcomes)?);
    } else {
        print!("{}", outcome::table(&outcomes));
    }
    all_passed(&outcomes, selected.len())
}

fn all_passed(outcomes: &[Outcome], selected: usize) -> Result<()> {
    let passed = outcomes.iter().filter(|outcome| outcome.pass).count();
    if passed < selected {
        let text = format!("{} of {selected} scenarios failed", selected - passed);
        return Err(Failure::Failed(text).into());
    }
    Ok(())
}

fn list() -> String {
    let entries = scenarios::all().into_iter();
    let line = |entry: scenarios::Entry| {
        format!(
            "{:<20}{}\n",
            entry.scenario.name, entry.scenario.description
        )
    };
    entries.map(line).collect()
}

/// Times that continuous integration starts a scenario before it counts as failed. The emulated
/// machine below can break a guest (docs/testing.md, "What the emulator can break"); a defect in
/// what is tested shows each time.
const ATTEMPTS: u32 = 3;

/// Runs scenarios for continuous integration; prints a table for each round.
pub(crate) fn run_scenarios(selected: &[Scenario], limits: Limits) -> Result<()> {
    let prepared = Prepared::for_scenarios(selected)?;
    let watch = Watch {
        scale: limits.timeout_scale,
        echo: false,
        // Ctrl-C then ends this program, and with it the machines.
        interrupted: &AtomicBool::new(false),
    };
    let mut left = selected.to_vec();
    let mut attempt = 1;
    loop {
        let outcomes = prepared.run_all(&left, default_jobs(), &watch)?;
        print!("{}", outcome::table(&outcomes));
        let passed = outcomes.iter().map(|outcome| outcome.pass);
        let pairs = left.iter().cloned().zip(passed);
        left = pairs
            .filter_map(|(scenario, pass)| (!pass).then_some(scenario))
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        if attempt == ATTEMPTS {
            let text = format!("{} scenarios failed {ATTEMPTS} times", left.len());
            return Err(Failure::Failed(text).into());
        }
        attempt += 1;
        println!("round {attempt}: what failed runs again");
    }
}

/// Installs, builds and fetches everything that the scenarios need.
pub(crate) fn prepare_all() -> Result<()> {
    let families: Vec<_> = FAMILIES.iter().map(|family| family.name).collect();
    Prepared::new(&families, &[]).map(drop)
}

/// How a scenario is watched.
struct Watch<'a> {
    scale: f64,
    echo: bool,
    interrupted: &'a AtomicBool,
}

/// What scenarios share: static binaries, and kernels with their archives.
struct Prepared {
    cache: Cache,
    emulator: Emulator,
    binaries: Binaries,
    /// Kernels of L1; the usual one is the first.
    rigs: Vec<Kernel>,
    guests: Vec<(&'static str, Image)>,
}

/// A scenario's folder, this program's alone.
struct WorkFolder {
    folder: PathBuf,
    _lock: File,
}

impl Prepared {
    fn for_scenarios(scenarios: &[Scenario]) -> Result<Self> {
        let mut names: Vec<_> = scenarios.iter().flat_map(scenarios::families).collect();
        names.sort_unstable();
        names.dedup();
        let own = scenarios.iter();
        let own: Vec<_> = own
            .filter_map(|scenario| scenario.l1.kernel.as_deref())
            .collect();
        Self::new(&names, &own)
    }

    /// Prepares guests of `families`, and L1s with the usual kernel and with those of `rigs`.
    fn new(families: &[&str], rigs: &[&str]) -> Result<Self> {
        let cache = Cache::open()?;
        let emulator = Emulator::fetch(&cache)?;
        eprintln!("emulator: QEMU {}", emulator.version());
        let binaries = binaries::build()?;
        let mut kernels = vec![kernel::fetch(&cache, &FAMILIES[0])?];
        for name in rigs {
            let family = kernel::family(name)?;
            if !kernels
                .iter()
                .any(|kernel| kernel.family.name == family.name)
            {
                kernels.push(kernel::fetch(&cache, family)?);
            }
        }
        let mut guests = Vec::new();
        for name in families {
            let family = kernel::family(name)?;
            let kernel = kernel::fetch(&cache, family)?;
            eprintln!("{name}: kernel {}", kernel.release);
            let init = Init::Program(&binaries.init);
            let image = images::pack(&cache, &kernel, Role::Guest, init)?;
            guests.push((family.name, image));
        }
        Ok(Self {
            cache,
            emulator,
            binaries,
            rigs: kernels,
            guests,
        })
    }

    /// The kernel that an L1 asks for.
    fn l1_kernel(&self, l1: &L1) -> Result<&Kernel> {
        let name = l1.kernel.as_deref().unwrap_or(FAMILIES[0].name);
        let mut kernels = self.rigs.iter();
        kernels
            .find(|kernel| kernel.family.name == name)
            .with_context(|| format!("kernel {name} was not prepared for L1"))
    }

    fn work_folder(&self, name: &str) -> Result<WorkFolder> {
        let parent = workspace::target().join("rig");
        fs::create_dir_all(&parent)?;
        let lock = File::create(parent.join(format!("{name}.lock")))?;
        if lock.try_lock().is_err() {
            eprintln!("{name}: waiting for another run of it");
            lock.lock()?;
        }
        let folder = parent.join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        fs::create_dir(&folder)?;
        Ok(WorkFolder {
            folder,
            _lock: lock,
        })
    }

    /// Makes the folder that L1 mounts.
    fn fill_share(&self, share: &Path) -> Result<()> {
        fs::create_dir(share)?;
        fs::copy(&self.binaries.vmm, share.join("vpci-vmm"))?;
        fs::copy(&self.binaries.nested_mock, share.join("nested-mock"))?;
        fs::copy(&self.binaries.vfio_host, share.join("vfio-host"))?;
        for (family, image) in &self.guests {
            link(&image.kernel, &share.join(scenarios::kernel_file(family)))?;
            link(&image.initrd, &share.join(scenarios::initrd_file(family)))?;
        }
        Ok(())
    }

    /// Runs scenarios, `jobs` at a time, and returns their outcomes in the order of the list. An
    /// interruption ends those that run, and the others do not start.
    fn run_all(
        &self,
        scenarios: &[Scenario],
        jobs: NonZeroUsize,
        watch: &Watch<'_>,
    ) -> Result<Vec<Outcome>> {
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let work = || {
            let mut done = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(scenario) = scenarios.get(index) else {
                    break;
                };
                let outcome = self.run(scenario, watch);
                if !matches!(&outcome, Ok(outcome) if !outcome.interrupted) {
                    stop.store(true, Ordering::Relaxed);
                }
                done.push((index, outcome));
            }
            done
        };
        let mut outcomes = thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs.get()).map(|_| scope.spawn(work)).collect();
            let joined = workers.into_iter().map(|worker| worker.join());
            joined
                .flat_map(|done| done.unwrap_or_else(|panic| panic::resume_unwind(panic)))
                .collect::<Vec<_>>()
        });
        outcomes.sort_by_key(|(index, _)| *index);
        outcomes.into_iter().map(|(_, outcome)| outcome).collect()
    }

    fn run(&self, scenario: &Scenario, watch: &Watch<'_>) -> Result<Outcome> {
        let mut scenario = scenario.clone();
        scenarios::scale(&mut scenario, watch.scale);
        let work = self.work_folder(&scenario.name)?;
        let share = work.folder.join("share");
        self.fill_share(&share)?;
        let json = serde_json::to_vec_pretty(&scenario)?;
        fs::write(share.join("scenario.json"), json)?;
        let init = Init::Program(&self.binaries.init);
        let kernel = self.l1_kernel(&scenario.l1)?;
        let image = images::pack(&self.cache, kernel, Role::Rig, init)?;
        let name = &scenario.name;
        eprintln!("{name}: booting L1 ({})", kernel.release);
        devices::make_backing_files(&work.folder, &scenario.l1.devices, &scenario.runs)?;
        let setup = Setup {
            emulator: &self.emulator,
            image: &image,
            cmdline: CMDLINE,
            share: &share,
            logs: &work.folder,
            devices: &scenario.l1.devices,
            echo: watch.echo,
        };
        let mut progress = Progress::new(name, watch.echo);
        let (mut machine, early) = boot(&setup, watch, &mut progress)?;
        let own_limit = Duration::from_secs(scenario.time_limit_s);
        let end = match early {
            Some(end) => end,
            None => machine.watch(machine.elapsed() + own_limit, watch.interrupted, |line| {
                progress.look(machine.elapsed(), line);
                line.and_then(Verdict::from_line)
            }),
        };
        if matches!(end, End::Found(_)) {
            machine.wait(POWER_OFF_LIMIT);
        }
        let seconds = machine.elapsed().as_secs_f64();
        drop(machine);
        let log = work.folder.join("serial.log");
        let mut outcome = Outcome::new(&scenario, end, seconds, &log);
        if outcome.pass {
            let (devices, runs) = (&scenario.l1.devices, &scenario.runs);
            let failures = devices::check_backing_files(&work.folder, devices, runs);
            outcome.fail(failures);
        }
        Ok(outcome)
    }
}

/// Starts L1 and waits for its init's first word. An L1 that never gets there is started again,
/// at most [`BOOTS`] times in all: what is under test has not begun by then. Returns the machine
/// and, when the scenario is over already, how it ended.
fn boot<T>(
    setup: &Setup<'_>,
    watch: &Watch<'_>,
    progress: &mut Progress<'_>,
) -> Result<(Machine, Option<End<T>>)> {
    let limit = BOOT_LIMIT.mul_f64(watch.scale);
    let mut attempt = 1;
    loop {
        let machine = Machine::start(setup)?;
        let end = machine.watch(limit, watch.interrupted, |line| {
            progress.look(machine.elapsed(), line);
            line.filter(|line| is_step(line)).map(drop)
        });
        let early = match end {
            End::Found(()) => None,
            End::TimedOut | End::Asleep if attempt < BOOTS => {
                let seconds = machine.elapsed().as_secs();
                eprintln!(
                    "{}: L1 has not booted in {seconds} s; starting it again",
                    progress.name
                );
                attempt += 1;
                progress.last = Duration::ZERO;
                continue;
            }
            End::TimedOut => Some(End::TimedOut),
            End::Asleep => Some(End::Asleep),
            End::Ended => Some(End::Ended),
            End::Interrupted => Some(End::Interrupted),
        };
        return Ok((machine, early));
    }
}

/// Puts `source` at `destination`: the same file where possible, else a copy.
fn link(source: &Path, destination: &Path) -> Result<()> {
    if fs::hard_link(source, destination).is_err() {
        fs::copy(source, destination)
            .with_context(|| format!("cannot copy {}", source.display()))?;
    }
    Ok(())
}

/// Prints the steps that both kernels' inits report on the console, and signs of life between.
struct Progress<'a> {
    name: &'a str,
    echo: bool,
    last: Duration,
}

impl<'a> Progress<'a> {
    fn new(name: &'a str, echo: bool) -> Self {
        Self {
            name,
            echo,
            last: Duration::ZERO,
        }
    }

    fn look(&mut self, elapsed: Duration, line: Option<&str>) {
        if self.echo {
            return;
        }
        let step = line.filter(|line| is_step(line));
        if step.is_some() || elapsed >= self.last + SIGN_OF_LIFE {
            self.last = elapsed;
            let seconds = elapsed.as_secs_f64();
            eprintln!("{}: {seconds:6.1} s: {}", self.name, step.unwrap_or("..."));
        }
    }
}

fn is_step(line: &str) -> bool {
    ["vpci: ", "VPCI-EVENT ", "VPCI-FAIL "]
        .iter()
        .any(|prefix| line.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_names_every_scenario() {
        let list = list();
        for entry in scenarios::all() {
            assert!(list.contains(&entry.scenario.name));
        }
        assert_eq!(list.lines().count(), scenarios::all().len());
    }

    #[test]
    fn factors_are_positive_numbers_of_a_sensible_size() {
        assert_eq!(factor("2.5"), Ok(2.5));
        for text in ["0", "-1", "nan", "inf", "1e9", "", "x"] {
            assert!(factor(text).is_err(), "{text}");
        }
    }

    #[test]
    fn steps_are_told_from_other_console_lines() {
        assert!(is_step("vpci: 3.1 s: run 1-cpu"));
        assert!(is_step("VPCI-FAIL no modules"));
        assert!(!is_step("VPCI-REPORT {}"));
        assert!(!is_step("[    0.000000] Linux version"));
    }
}
