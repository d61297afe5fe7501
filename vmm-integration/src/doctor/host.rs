//! The machine: cores, memory, limits, and what the tests in an emulated computer need.
#![forbid(unsafe_code)]

use std::env;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde::Serialize;

use super::finding::{Finding, Status, Topic};
use super::root::Root;
use crate::size::human;

/// RAM of a guest, unless `run` is told otherwise, in bytes.
const GUEST_RAM: u64 = 512 << 20;
/// Memory that one scenario of the rig takes, in bytes.
const RIG_RAM: u64 = 3 << 30;
/// Emulator of the rig.
const QEMU: &str = "qemu-system-x86_64";

/// What the machine is like.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct HostFacts {
    /// Kernel release.
    pub(crate) kernel: Option<String>,
    /// Cores that this program may use.
    pub(crate) cores: usize,
    /// Memory in bytes.
    pub(crate) memory: u64,
    /// Memory that can be had now, in bytes.
    pub(crate) memory_available: u64,
    /// The machine is itself a guest.
    pub(crate) is_guest: bool,
    /// Memory that may be locked, in bytes; null without a limit.
    pub(crate) memlock: Option<u64>,
    /// Version of the rig's emulator.
    pub(crate) qemu: Option<String>,
}

/// Looks at the machine; `path` is the list of directories to look for programs in.
pub(super) fn examine(root: &Root, path: &OsStr, findings: &mut Vec<Finding>) -> HostFacts {
    let facts = HostFacts {
        kernel: root.text("proc/sys/kernel/osrelease"),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        memory: memory(root, "MemTotal"),
        memory_available: memory(root, "MemAvailable"),
        is_guest: root.has_cpu_flag("hypervisor"),
        memlock: vm_vpci::vfio::memlock_limit(&root.path("")),
        qemu: qemu(path),
    };
    findings.push(kernel_finding(&facts));
    findings.push(cores_finding(facts.cores));
    findings.push(memory_finding(&facts));
    findings.push(memlock_finding(facts.memlock));
    findings.push(qemu_finding(facts.qemu.as_deref()));
    facts
}

/// A line of `/proc/meminfo` in bytes.
fn memory(root: &Root, key: &str) -> u64 {
    let value = root.field("proc/meminfo", key).unwrap_or_default();
    let kib = value.trim_end_matches("kB").trim().parse::<u64>();
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Version of the emulator, of the first one on the path.
fn qemu(path: &OsStr) -> Option<String> {
    let program: PathBuf = env::split_paths(path)
        .map(|directory| directory.join(QEMU))
        .find(|program| program.is_file())?;
    let mut command = Command::new(program);
    command
        .arg("--version")
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    let output = command.output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split("version ").nth(1)?;
    version.split_whitespace().next().map(str::to_owned)
}

fn kernel_finding(facts: &HostFacts) -> Finding {
    let release = facts.kernel.as_deref().unwrap_or("not told");
    let finding = Finding::new(Topic::Machine, "kernel", Status::Ok).found(release);
    if facts.is_guest {
        return finding.follows("this machine is a guest itself: times are not those of hardware");
    }
    finding.follows("on hardware of its own")
}

fn cores_finding(cores: usize) -> Finding {
    let finding = Finding::new(Topic::Machine, "cores", Status::Ok).found(cores.to_string());
    match cores {
        0 | 1 => finding
            .status(Status::Limited)
            .follows("vCPUs and workers take turns; the rig is slow")
            .advise("use a machine with two or more"),
        _ => finding.follows("vCPUs and workers run side by side"),
    }
}

fn memory_finding(facts: &HostFacts) -> Finding {
    let available = facts.memory_available;
    let found = format!("{} of {}", human(available), human(facts.memory));
    let finding = Finding::new(Topic::Machine, "memory available", Status::Ok).found(found);
    if available < GUEST_RAM {
        return finding
            .status(Status::Limited)
            .follows("less than a guest's RAM of 512M")
            .advise("give guests less: run --memory SIZE");
    }
    if available < RIG_RAM {
        return finding
            .status(Status::Limited)
            .follows("enough for guests, but not for the rig's 3 GiB")
            .advise("free some, for the rig");
    }
    finding.follows("enough for guests and for the rig")
}

fn memlock_finding(memlock: Option<u64>) -> Finding {
    let finding = Finding::new(Topic::PassThrough, "locked memory", Status::Ok);
    match memlock {
        None => finding
            .found("no limit")
            .follows("a guest's RAM can be pinned for DMA"),
        Some(limit) if limit >= GUEST_RAM => finding
            .found(human(limit))
            .follows("guests up to that size can be pinned for DMA"),
        Some(limit) => finding
            .status(Status::Limited)
            .found(human(limit))
            .follows("less than a guest's RAM of 512M: mapping it for DMA fails (ENOMEM)")
            .advise("ulimit -l unlimited, or CAP_IPC_LOCK"),
    }
}

fn qemu_finding(version: Option<&str>) -> Finding {
    let finding = Finding::new(Topic::Machine, "QEMU for the rig", Status::Ok);
    match version {
        Some(version) => finding
            .found(version)
            .follows("not used: cargo xtask rig fetches a QEMU of its own"),
        None => finding
            .status(Status::Note)
            .found("not there")
            .follows("not needed: cargo xtask rig fetches a QEMU of its own")
            .advise("nothing to do"),
    }
}
