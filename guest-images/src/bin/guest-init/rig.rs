//! The role in the host kernel of the rig: run a scenario and print its verdict.

use crate::bounded::bounded;
use crate::system::{self, put, say, step};
use crate::vmm::{self, Files};
use crate::{End, kexec, kmsg, passthrough, trace};
use anyhow::{Context, Result};
use guest_images::allow::AllowList;
use guest_images::host::HostReport;
use guest_images::judge::{self, DiskAfter, Evidence};
use guest_images::pattern::{self, Pattern};
use guest_images::report::GuestReport;
use guest_images::scenario::{Function, Mode, Refusal, Run, Scenario};
use guest_images::verdict::{RunVerdict, Verdict};
use kvm_ioctls::{Kvm, VmFd};
use rustix::mount::MountFlags;
use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Where the shared directory is mounted.
const SHARE: &str = "/host";
/// Directory for disks and reports; in memory.
const SCRATCH: &str = "/tmp";
/// Limit of everything before the scenario's own limit is known.
const SETUP_LIMIT: Duration = Duration::from_secs(120);
/// What this kernel keeps time by.
const CLOCK_SOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
/// Switch of L1's second CPU.
const SECOND_CPU: &str = "/sys/devices/system/cpu/cpu1/online";
/// Bytes at the end of a command's output in which its last line is looked for.
const LAST_LINE_MAX: usize = 1024;

/// Runs the role to its verdict.
pub(crate) fn run() -> Result<End> {
    let verdict = match set_up() {
        Ok(scenario) => judge_all(&scenario),
        Err(error) => Verdict {
            scenario: String::new(),
            pass: false,
            failures: vec![format!("{error:#}")],
            said: None,
            runs: Vec::new(),
        },
    };
    // Kernel messages stay off the console so that none comes inside the line.
    let _ = system::write_text("/proc/sys/kernel/printk", "1");
    say(&format!("\n{}", verdict.line()));
    Ok(End::PowerOff)
}

/// Mounts the share and reads the scenario, within a limit: a share that does not answer hangs.
fn set_up() -> Result<Scenario> {
    bounded("set-up of the rig", SETUP_LIMIT, || {
        step("load modules");
        let loaded = system::load_modules(|_| true)?;
        step(format!(
            "{loaded} modules loaded; mount the shared directory"
        ));
        let options = "trans=virtio,version=9p2000.L,msize=262144,cache=loose";
        system::mount_at("host", "9p", SHARE, MountFlags::RDONLY, Some(options))?;
        let path = Path::new(SHARE).join("scenario.json");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        serde_json::from_str(&text).with_context(|| path.display().to_string())
    })
}

/// An empty VM, to be kept for the time of the scenario. The first VM of a machine and the last one
/// make the kernel patch its scheduler (the static key of the preemption notifiers), and under
/// multi-threaded TCG another CPU may run a breakpoint of that patch when it is long gone: L1 dies.
/// So there is no other CPU while this first VM is made.
fn keep_vm() -> Result<VmFd> {
    system::write_text(SECOND_CPU, "0")?;
    let kvm = Kvm::new().context("/dev/kvm")?;
    let vm = kvm.create_vm().context("KVM_CREATE_VM");
    system::write_text(SECOND_CPU, "1")?;
    vm
}

fn judge_all(scenario: &Scenario) -> Verdict {
    system::start_watchdog(Duration::from_secs(scenario.time_limit_s));
    let mut verdict = Verdict {
        scenario: scenario.name.clone(),
        pass: false,
        failures: Vec::new(),
        said: None,
        runs: Vec::new(),
    };
    let kept = keep_vm();
    if let Err(error) = &kept {
        verdict.failures.push(format!("{error:#}"));
    }
    if let Err(error) = passthrough::take(&scenario.l1.devices) {
        verdict.failures.push(format!("{error:#}"));
    }
    if scenario.runs.is_empty() && scenario.exec.is_none() {
        verdict.failures.push("the scenario has no runs".into());
    }
    if let Some(line) = &scenario.exec {
        step(format!("exec {line}"));
        match execute(line, Duration::from_secs(scenario.time_limit_s)) {
            Ok((status, said)) => {
                verdict.said = said;
                if !status.success() {
                    verdict.failures.push(format!("exec {line}: {status}"));
                }
            }
            Err(error) => verdict.failures.push(format!("exec {line}: {error:#}")),
        }
    }
    let allow = match AllowList::committed() {
        Ok(allow) => allow,
        Err(error) => {
            verdict.failures.push(format!("allow-list: {error}"));
            AllowList::default()
        }
    };
    for run in &scenario.runs {
        step(format!("run {}", run.name));
        if scenario.l1.trace {
            trace::start();
        }
        let judged = one_run(run, &allow).unwrap_or_else(|error| RunVerdict {
            name: run.name.clone(),
            pass: false,
            failures: vec![format!("{error:#}")],
            seconds: 0.0,
            metrics: Default::default(),
            notes: Vec::new(),
        });
        for failure in &judged.failures {
            say(&format!("vpci: run {}: FAILED: {failure}", run.name));
        }
        if scenario.l1.trace && !judged.pass {
            trace::show();
        }
        verdict.runs.push(judged);
    }
    match kmsg::collect() {
        Ok(log) => {
            let failures = judge::host_log(&log, &scenario.l1.devices);
            verdict.failures.extend(failures);
            if !(verdict.failures.is_empty() && verdict.runs.iter().all(|run| run.pass)) {
                for line in &log.lines {
                    say(&format!("vpci: host kernel log: {}", line.text));
                }
            }
        }
        Err(error) => verdict.failures.push(format!("{error:#}")),
    }
    verdict
        .failures
        .extend(lost_clock(scenario.runs.is_empty()));
    verdict.pass = verdict.failures.is_empty() && verdict.runs.iter().all(|run| run.pass);
    verdict
}

/// Says if this kernel has turned from its time stamp counter, or never took to it. KVM then keeps
/// the counters of a guest's CPUs by its own clock, each while that CPU runs: they drift apart by
/// seconds, and the guest's clocks and timers with them.
///
/// A command without guests can be over before the kernel, some seconds after its start, has gone from
/// the counter as it found it to the same counter calibrated.
fn lost_clock(no_guests: bool) -> Option<String> {
    match fs::read_to_string(CLOCK_SOURCE) {
        Ok(source) if source.trim() == "tsc" => None,
        Ok(source) if source.trim() == "tsc-early" && no_guests => None,
        Ok(source) => Some(format!(
            "the host's kernel keeps time by {} and not by its time stamp counter, so the \
             guests' own counters are not in step",
            source.trim()
        )),
        Err(error) => Some(format!("{CLOCK_SOURCE}: {error}")),
    }
}

fn one_run(run: &Run, allow: &AllowList) -> Result<RunVerdict> {
    let files = Files {
        share: Path::new(SHARE),
        scratch: Path::new(SCRATCH),
    };
    if files.report().exists() {
        fs::remove_file(files.report()).context("old report")?;
    }
    if run.mode == Mode::Kexec {
        kexec::make_initramfs(run, &files)?;
    }
    for function in run.functions.iter().chain(&run.substitutes) {
        if let Function::Blk { size_mib, .. } = function {
            let address = function.address();
            let (path, pattern) = (files.disk(address), Pattern::new(address, 0));
            pattern::make_file(&path, pattern, u64::from(*size_mib) << 20)
                .with_context(|| path.display().to_string())?;
        }
    }
    if let Some(refusal) = &run.refusal {
        return refused(run, refusal, &files);
    }
    let outcome = vmm::execute(run, &files)?;
    let evidence = Evidence {
        run,
        vmm: outcome.failure,
        host: read_host_report(&files.report()),
        disks: check_disks(run, &files, outcome.guest.as_ref().ok()),
        counted: outcome.counted,
        guest: outcome.guest,
        allow,
    };
    for function in run.functions.iter().chain(&run.substitutes) {
        if matches!(function, Function::Blk { .. }) {
            // Best effort: the next run's own disks would find no room otherwise, and say so.
            let _ = fs::remove_file(files.disk(function.address()));
        }
    }
    let failures = judge::failures(&evidence);
    if !failures.is_empty() {
        let text = fs::read_to_string(files.report()).unwrap_or_default();
        say(&format!("vpci: the VMM's report: {}", text.trim()));
    }
    Ok(RunVerdict {
        name: run.name.clone(),
        pass: failures.is_empty(),
        failures,
        seconds: outcome.took.as_secs_f64(),
        metrics: judge::metrics(&evidence),
        notes: judge::notes(&evidence),
    })
}

/// A run whose guest must not start.
fn refused(run: &Run, refusal: &Refusal, files: &Files<'_>) -> Result<RunVerdict> {
    let start = Instant::now();
    let mut command = vmm::command(run, files, &BTreeSet::new());
    let limit = Duration::from_secs(run.time_limit_s);
    let output = bounded("the VMM", limit, move || Ok(command.output()?))?;
    let said = String::from_utf8_lossy(&output.stderr);
    put(&output.stderr);
    let failures = judge::refusal(refusal, output.status.code(), &said);
    Ok(RunVerdict {
        name: run.name.clone(),
        pass: failures.is_empty(),
        failures,
        seconds: start.elapsed().as_secs_f64(),
        metrics: Default::default(),
        notes: said.lines().map(str::to_owned).collect(),
    })
}

fn read_host_report(path: &Path) -> Result<HostReport, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::from_str(&text).map_err(|error| format!("malformed: {error}"))
}

/// What the backing files hold now, given what the guest says it did.
fn check_disks(run: &Run, files: &Files<'_>, guest: Option<&GuestReport>) -> Vec<DiskAfter> {
    let mut disks = Vec::new();
    for function in &run.functions {
        let Function::Blk {
            size_mib, readonly, ..
        } = function
        else {
            continue;
        };
        let address = function.address();
        let generation = match guest {
            Some(guest) if !readonly => u64::from(guest.boot),
            _ => 0,
        };
        let size = u64::from(*size_mib) << 20;
        let path = files.disk(address);
        let contents = pattern::check_file(&path, Pattern::new(address, generation), size);
        disks.push(DiskAfter {
            address,
            contents: contents.map_err(|error| format!("{}: {error}", path.display())),
        });
    }
    disks
}

/// Runs a command with its output on the console; its status and its last line.
fn execute(line: &str, limit: Duration) -> Result<(ExitStatus, Option<String>)> {
    let mut words = line.split_ascii_whitespace();
    let program = words.next().context("no command")?;
    let mut child = Command::new(program)
        .args(words)
        .current_dir(SHARE)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = child.stdout.take().context("output")?;
    let copied = bounded("output", limit, move || {
        let mut buffer = [0; 4096];
        let mut end = Vec::new();
        loop {
            match output.read(&mut buffer)? {
                0 => return Ok(last_line(&end)),
                length => {
                    put(&buffer[..length]);
                    end.extend_from_slice(&buffer[..length]);
                    end.drain(..end.len().saturating_sub(LAST_LINE_MAX));
                }
            }
        }
    });
    if copied.is_err() {
        // The command has had its time; its status follows.
        let _ = child.kill();
    }
    let status = child.wait()?;
    Ok((status, copied?))
}

/// The last line that is not blank.
fn last_line(output: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(output);
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty());
    line.map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_a_command_is_the_last_that_is_not_blank() {
        assert_eq!(last_line(b""), None);
        assert_eq!(last_line(b"\n \n"), None);
        assert_eq!(last_line(b"one\ntwo \r\n\n"), Some("two".into()));
    }
}
