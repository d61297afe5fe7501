//! The judge: decides from what guest and host saw of a run whether it passed.
//!
//! Pure functions. Every rule adds one line for each thing that breaks it; a run without lines
//! passed. What is missing is a failure like what is wrong.

#![forbid(unsafe_code)]

mod devices;
mod interrupts;
mod iommu;
mod l1;
mod log;
mod refusal;
#[cfg(test)]
mod tests;

use crate::allow::AllowList;
use crate::host::{HOST_REPORT_VERSION, HostReport};
use crate::report::{GuestReport, REPORT_VERSION};
use crate::scenario::{Function, Kind, Mode, PciAddress, Run};
use std::collections::BTreeMap;

pub use l1::host_log;
pub use log::telltale;
pub use refusal::refusal;

/// Longest that any request may take, in microseconds.
pub const LATENCY_LIMIT_US: u64 = 5_000_000;

/// What the rig found on a disk's backing file after the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskAfter {
    /// PCI function of the disk.
    pub address: PciAddress,
    /// Checksum over the disk's first size, as the guest computes it; or what was wrong with the
    /// contents.
    pub contents: Result<String, String>,
}

/// Interrupts of a host device that L1's kernel had counted at a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Number of the mark.
    pub mark: u8,
    /// The device's address in L1.
    pub host: PciAddress,
    /// Interrupts per vector; without those that nobody listens to.
    pub vectors: BTreeMap<u32, u64>,
}

/// Everything known about a run.
#[derive(Clone, Debug)]
pub struct Evidence<'a> {
    /// What was asked for.
    pub run: &'a Run,
    /// How the VMM ended: `None` when it ended by itself with status 0, else a description.
    pub vmm: Option<String>,
    /// The guest's report, or why there is none.
    pub guest: Result<GuestReport, String>,
    /// The VMM's report, or why there is none.
    pub host: Result<HostReport, String>,
    /// Backing files after the run.
    pub disks: Vec<DiskAfter>,
    /// What L1 counted of host devices at the guest's marks, oldest first.
    pub counted: Vec<Counted>,
    /// Kernel log lines that may appear.
    pub allow: &'a AllowList,
}

/// Every rule that the run broke, one line each; empty when it passed.
pub fn failures(evidence: &Evidence<'_>) -> Vec<String> {
    let mut failures = Vec::new();
    failures.extend(evidence.vmm.clone().map(|how| format!("vmm: {how}")));
    match &evidence.host {
        Ok(host) => host_end(evidence.run, host, &mut failures),
        Err(error) => failures.push(format!("host report: {error}")),
    }
    match &evidence.guest {
        Ok(guest) => {
            guest_end(evidence.run, guest, &mut failures);
            devices::functions(evidence.run, guest, &mut failures);
            devices::disks(evidence, guest, &mut failures);
            devices::rngs(evidence.run, guest, &mut failures);
            devices::nets(evidence.run, guest, &mut failures);
            devices::edus(evidence.run, guest, &mut failures);
            devices::loads(evidence.run, guest, &mut failures);
            devices::grows(evidence.run, guest, &mut failures);
            devices::rebinds(evidence.run, guest, &mut failures);
            interrupts::vectors(evidence.run, guest, &mut failures);
            interrupts::phases(evidence.run, guest, &mut failures);
            iommu::domains(evidence.run, guest, &mut failures);
            iommu::dma(evidence.run, guest, &mut failures);
            iommu::edu_dma(evidence.run, guest, &mut failures);
            if let Ok(host) = &evidence.host {
                interrupts::exact(evidence, guest, host, &mut failures);
                iommu::faults(evidence.run, guest, host, &mut failures);
                iommu::maps(evidence.run, guest, host, &mut failures);
            }
            log::clean(guest, evidence.allow, &mut failures);
        }
        Err(error) => failures.push(format!("guest report: {error}")),
    }
    failures
}

fn host_end(run: &Run, host: &HostReport, failures: &mut Vec<String>) {
    if host.version != HOST_REPORT_VERSION {
        failures.push(format!("host report: version {}", host.version));
    }
    if host.end != "poweroff" {
        failures.push(format!(
            "host report: ended by {}, not by poweroff",
            host.end
        ));
    }
    let resets = resets(run);
    if host.resets != resets {
        failures.push(format!("host report: {} resets, not {resets}", host.resets));
    }
    let passes_through = |function: &Function| function.host_kind() == Kind::Vfio;
    if run.functions.iter().any(passes_through) {
        match host.counters.get("vfio.failures") {
            Some(0) => {}
            count => failures.push(format!("host report: vfio.failures is {count:?}")),
        }
    }
    for function in &run.functions {
        let (bus, number) = (function.bus(), function.number());
        match host
            .functions
            .iter()
            .find(|seen| seen.bus == bus && seen.function == number)
        {
            None => failures.push(format!("host report: no function {number} on bus {bus}")),
            Some(seen)
                if seen.kind != function.host_kind() || seen.domain_hint != function.domain() =>
            {
                failures.push(format!(
                    "host report: function {number} on bus {bus} is {} in domain {:04x}",
                    seen.kind.as_str(),
                    seen.domain_hint
                ));
            }
            Some(_) => {}
        }
    }
}

fn guest_end(run: &Run, guest: &GuestReport, failures: &mut Vec<String>) {
    if guest.version != REPORT_VERSION {
        failures.push(format!("guest report: version {}", guest.version));
    }
    failures.extend(
        guest
            .failures
            .iter()
            .map(|failure| format!("guest: {failure}")),
    );
    if !guest.complete {
        failures.push("guest: not every step was reached".into());
    }
    if guest.kernel.is_empty() {
        failures.push("guest report: no kernel release".into());
    }
    if guest.mode != run.mode {
        let (seen, asked) = (guest.mode.as_str(), run.mode.as_str());
        failures.push(format!("guest: ran mode {seen}, not {asked}"));
    }
    if guest.cpus != run.cpus {
        failures.push(format!(
            "guest: {} CPUs online, not {}",
            guest.cpus, run.cpus
        ));
    }
    let boot = match run.mode {
        Mode::Kexec => run.repeat + 1,
        _ => resets(run) + 1,
    };
    // Boots are counted on a disk that can be written.
    if writable_disks(run) > 0 && guest.boot != boot {
        failures.push(format!("guest: boot {}, not {boot}", guest.boot));
    }
}

fn resets(run: &Run) -> u32 {
    if run.mode == Mode::Reboot {
        run.repeat
    } else {
        0
    }
}

fn writable_disks(run: &Run) -> usize {
    run.functions
        .iter()
        .filter(|function| match function {
            Function::Blk { readonly, .. } => !readonly,
            Function::Vfio { guest, .. } => *guest == Kind::Nvme,
            Function::Rng { .. } | Function::Testdev { .. } => false,
        })
        .count()
}

/// Request queues that the guest's driver must use: never more than it has CPUs
/// (`drivers/block/virtio_blk.c`, init_vq).
fn queues_used(queues: u16, cpus: u32) -> u32 {
    u32::from(queues).min(cpus)
}

/// Lines on benchmarks, for people.
pub fn notes(evidence: &Evidence<'_>) -> Vec<String> {
    match (&evidence.guest, &evidence.host) {
        (Ok(guest), Ok(host)) => iommu::notes(guest, host),
        _ => Vec::new(),
    }
}

/// Measurements worth a glance, by name.
pub fn metrics(evidence: &Evidence<'_>) -> BTreeMap<String, f64> {
    let mut metrics = BTreeMap::new();
    let mut put = |name: &str, value: f64| metrics.insert(name.to_owned(), value);
    if let Ok(guest) = &evidence.guest {
        let latencies = (guest.disks.iter().map(|disk| disk.max_latency_us))
            .chain(guest.rngs.iter().map(|rng| rng.max_latency_us))
            .chain(guest.nets.iter().map(|net| net.max_latency_us))
            .chain(guest.edus.iter().map(|edu| edu.max_latency_us))
            .chain(guest.loads.iter().map(|load| load.max_latency_us));
        put("boot", f64::from(guest.boot));
        put("guest_uptime_s", guest.uptime_s);
        put("max_latency_us", latencies.max().unwrap_or(0) as f64);
        let interrupts = guest
            .vectors
            .iter()
            .map(|vector| vector.total())
            .sum::<u64>();
        put("interrupts", interrupts as f64);
        put(
            "load_requests",
            guest.loads.iter().map(|load| load.requests).sum::<u64>() as f64,
        );
        put("kmsg_noteworthy", guest.kmsg.noteworthy as f64);
        let moves = guest.rngs.iter().map(|rng| rng.moves.len()).sum::<usize>();
        let moves_under_load = guest
            .loads
            .iter()
            .map(|load| u64::from(load.moves))
            .sum::<u64>();
        put("moves", moves as f64 + moves_under_load as f64);
    }
    if let Ok(host) = &evidence.host {
        let vectors = host.functions.iter().flat_map(|function| &function.vectors);
        put(
            "host_raised",
            vectors.map(|vector| vector.raised).sum::<u64>() as f64,
        );
        put("host_marks", host.marks.len() as f64);
        let faults = host.functions.iter().map(|function| function.dma.faults);
        put("dma_faults", faults.sum::<u64>() as f64);
    }
    metrics
}
