//! Rules about functions and their data.

#![forbid(unsafe_code)]

use super::{Evidence, LATENCY_LIMIT_US, queues_used};
use crate::report::{DiskReport, EDU_FACTORIAL_OF, GuestReport, MoveReport};
use crate::scenario::{Function, Kind, Mode, PciAddress, Run};
use std::collections::BTreeSet;

const MIB: u64 = 1 << 20;

/// Low half of an educational device's identification register.
const EDU_ID: u32 = 0x00ed;

/// Each function sits where its bus GUID asks, with its drivers; and there are no others.
pub(super) fn functions(run: &Run, guest: &GuestReport, failures: &mut Vec<String>) {
    for function in &run.functions {
        let address = function.address();
        let Some(seen) = guest.functions.iter().find(|seen| seen.address == address) else {
            failures.push(format!("{address}: no such PCI function in the guest"));
            continue;
        };
        if seen.kind != function.kind() {
            failures.push(format!("{address}: is {}", seen.kind.as_str()));
        }
        let (driver, virtio_driver, vectors) = match function {
            Function::Blk { queues, .. } => {
                let vectors = queues_used(*queues, run.cpus) + 1;
                (Some("virtio-pci"), Some("virtio_blk"), vectors)
            }
            Function::Rng { .. } => (Some("virtio-pci"), Some("virtio_rng"), 2),
            Function::Testdev { .. } => (Some("vpci-testdev"), None, 1),
            Function::Vfio { guest, .. } => passed_through(*guest, run.cpus),
        };
        if seen.driver.as_deref() != driver {
            failures.push(format!("{address}: PCI driver is {:?}", seen.driver));
        }
        if seen.virtio_driver.as_deref() != virtio_driver {
            failures.push(format!(
                "{address}: virtio driver is {:?}",
                seen.virtio_driver
            ));
        }
        if seen.msix_vectors != vectors {
            let count = seen.msix_vectors;
            failures.push(format!(
                "{address}: {count} MSI-X vectors enabled, not {vectors}"
            ));
        }
        let bus = function.bus().to_string();
        if seen.vmbus_device.as_deref().map(str::to_ascii_lowercase) != Some(bus) {
            failures.push(format!(
                "{address}: on VMBus device {:?}",
                seen.vmbus_device
            ));
        }
    }
    for seen in &guest.functions {
        let expected = run
            .functions
            .iter()
            .any(|function| function.address() == seen.address);
        if seen.vmbus_device.is_some() && !expected {
            failures.push(format!("{}: nobody asked for this function", seen.address));
        }
    }
}

/// PCI driver, virtio driver and MSI vectors of a host device in a guest with `cpus` CPUs.
fn passed_through(kind: Kind, cpus: u32) -> (Option<&'static str>, Option<&'static str>, u32) {
    match kind {
        // One for the admin queue and one for each CPU's (drivers/nvme/host/pci.c, nvme_setup_irqs).
        Kind::Nvme => (Some("nvme"), None, cpus + 1),
        // Receive, transmit, everything else (drivers/net/ethernet/intel/e1000e/netdev.c,
        // e1000_configure_msix).
        Kind::E1000e => (Some("e1000e"), None, 3),
        Kind::Rng => (Some("virtio-pci"), Some("virtio_rng"), 2),
        _ => (None, None, 0),
    }
}

/// Each disk held what the rig put there, and holds what the guest wrote.
pub(super) fn disks(evidence: &Evidence<'_>, guest: &GuestReport, failures: &mut Vec<String>) {
    let run = evidence.run;
    for function in &run.functions {
        let Some((size, used, readonly)) = disk(function, run.cpus) else {
            continue;
        };
        let address = function.address();
        let mut fail = |what: String| failures.push(format!("{address}: disk: {what}"));
        let Some(disk) = guest.disks.iter().find(|disk| disk.address == address) else {
            fail("not in the report".into());
            continue;
        };
        if disk.size != size {
            fail(format!("{} bytes, not {size}", disk.size));
        }
        if disk.readonly != readonly {
            fail(format!("read-only is {}, not {readonly}", disk.readonly));
        }
        if disk.queues != used {
            fail(format!("{} queues in use, not {used}", disk.queues));
        }
        data(disk, size, &mut fail);
        if disk.max_latency_us >= LATENCY_LIMIT_US {
            fail(format!("a request took {} us", disk.max_latency_us));
        }
        if matches!(function, Function::Vfio { .. }) {
            // Its backing file is out of this kernel's reach: whoever made it checks it.
            continue;
        }
        match evidence.disks.iter().find(|after| after.address == address) {
            None => fail("backing file was not checked".into()),
            Some(after) => match &after.contents {
                Err(error) => fail(format!("backing file: {error}")),
                Ok(checksum) if *checksum != disk.checksum => {
                    fail(format!(
                        "guest read checksum {}, file has {checksum}",
                        disk.checksum
                    ));
                }
                Ok(_) => {}
            },
        }
    }
}

/// Size in bytes, request queues in use, and whether it is read-only, of a disk.
fn disk(function: &Function, cpus: u32) -> Option<(u64, u32, bool)> {
    match function {
        Function::Blk {
            size_mib,
            queues,
            readonly,
            ..
        } => Some((
            u64::from(*size_mib) * MIB,
            queues_used(*queues, cpus),
            *readonly,
        )),
        Function::Vfio {
            guest: Kind::Nvme,
            size_mib,
            ..
        } => Some((u64::from(*size_mib) * MIB, cpus, false)),
        _ => None,
    }
}

fn data(disk: &DiskReport, size: u64, fail: &mut impl FnMut(String)) {
    if disk.initial_ok != size {
        fail(format!(
            "{} of {size} bytes held what was put there",
            disk.initial_ok
        ));
    }
    if !disk.readonly && disk.written != size {
        fail(format!("{} of {size} bytes written", disk.written));
    }
    if !disk.readonly && !disk.flushed {
        fail("not flushed".into());
    }
    if disk.verified != size {
        fail(format!("{} of {size} bytes read back right", disk.verified));
    }
}

/// Each entropy source gave data and its interrupt followed every move.
pub(super) fn rngs(run: &Run, guest: &GuestReport, failures: &mut Vec<String>) {
    for address in addresses(run, Kind::Rng) {
        let mut fail = |what: String| failures.push(format!("{address}: rng: {what}"));
        let Some(rng) = guest.rngs.iter().find(|rng| rng.address == address) else {
            fail("not in the report".into());
            continue;
        };
        if rng.bytes == 0 {
            fail("no data".into());
        }
        if rng.max_latency_us >= LATENCY_LIMIT_US {
            fail(format!("a read took {} us", rng.max_latency_us));
        }
        followed(run, &rng.moves, &mut fail);
    }
}

/// An interrupt was moved to every CPU and followed each move.
fn followed(run: &Run, moves: &[MoveReport], fail: &mut impl FnMut(String)) {
    let visited: BTreeSet<u32> = moves.iter().map(|step| step.cpu).collect();
    for cpu in (0..run.cpus).filter(|cpu| !visited.contains(cpu)) {
        fail(format!("interrupt was never moved to CPU {cpu}"));
    }
    for (index, step) in moves.iter().enumerate() {
        if step.on_new_cpu == 0 || step.requests == 0 {
            let (cpu, requests) = (step.cpu, step.requests);
            fail(format!(
                "move {index}: no interrupt on CPU {cpu} after {requests} requests"
            ));
        }
        if step.effective != Some(step.cpu) {
            fail(format!(
                "move {index}: CPU {} is {:?}",
                step.cpu, step.effective
            ));
        }
    }
}

/// Each network controller got every answer, and its interrupts followed every move.
pub(super) fn nets(run: &Run, guest: &GuestReport, failures: &mut Vec<String>) {
    for address in addresses(run, Kind::E1000e) {
        let mut fail = |what: String| failures.push(format!("{address}: net: {what}"));
        let Some(net) = guest.nets.iter().find(|net| net.address == address) else {
            fail("not in the report".into());
            continue;
        };
        if net.max_latency_us >= LATENCY_LIMIT_US {
            fail(format!("an answer took {} us", net.max_latency_us));
        }
        for index in [0, 1] {
            let mut fail = |what: String| fail(format!("vector {index}: {what}"));
            match net.moves.iter().find(|moves| moves.index == index) {
                None => fail("not moved".into()),
                Some(moves) => followed(run, &moves.moves, &mut fail),
            }
        }
        if net.storm_moves == 0 || net.storm_answers == 0 {
            let (moves, answers) = (net.storm_moves, net.storm_answers);
            fail(format!("{answers} answers during {moves} moves"));
        }
    }
}

/// Each educational device computed, and its interrupt came and followed every move.
pub(super) fn edus(run: &Run, guest: &GuestReport, failures: &mut Vec<String>) {
    for address in addresses(run, Kind::Edu) {
        let mut fail = |what: String| failures.push(format!("{address}: edu: {what}"));
        let Some(edu) = guest.edus.iter().find(|edu| edu.address == address) else {
            fail("not in the report".into());
            continue;
        };
        // The high bytes are its version.
        if edu.id & 0xffff != EDU_ID || !edu.alive {
            fail(format!("id {:#x}, alive is {}", edu.id, edu.alive));
        }
        let factorial = (1..=EDU_FACTORIAL_OF).product::<u32>();
        if edu.factorial != factorial {
            fail(format!("computed {}, not {factorial}", edu.factorial));
        }
        if edu.jobs == 0 || edu.interrupts != edu.jobs {
            fail(format!(
                "{} interrupts of {} jobs",
                edu.interrupts, edu.jobs
            ));
        }
        if edu.max_latency_us >= LATENCY_LIMIT_US {
            fail(format!("a job took {} us", edu.max_latency_us));
        }
        followed(run, &edu.moves, &mut fail);
    }
}

/// Under load nothing was lost, wrong or late while interrupts moved.
pub(super) fn loads(run: &Run, guest: &GuestReport, failures: &mut Vec<String>) {
    let under_load = match run.mode {
        Mode::Full => usize::MAX,
        Mode::Hotplug => 1,
        _ => 0,
    };
    let disks = run.functions.iter().filter(|f| disk(f, run.cpus).is_some());
    for address in disks.map(Function::address).take(under_load) {
        let mut fail = |what: String| failures.push(format!("{address}: load: {what}"));
        let Some(load) = guest.loads.iter().find(|load| load.address == address) else {
            fail("not in the report".into());
            continue;
        };
        if load.threads < 2 || load.requests == 0 {
            fail(format!(
                "{} requests of {} threads",
                load.requests, load.threads
            ));
        }
        if load.bad != 0 {
            fail(format!(
                "{} requests failed or returned wrong data",
                load.bad
            ));
        }
        if load.max_latency_us >= LATENCY_LIMIT_US {
            fail(format!("a request took {} us", load.max_latency_us));
        }
        if run.mode != Mode::Full {
            continue;
        }
        // CPU 0 keeps the VMBus connection and stays online.
        for cpu in (1..run.cpus).filter(|cpu| !load.cpu_cycles.contains(cpu)) {
            fail(format!("CPU {cpu} was never offline"));
        }
        if load.moves == 0 && addresses(run, Kind::Rng).next().is_some() {
            fail("no interrupt was moved".into());
        }
    }
}

/// Each capacity change arrived, and the new end can be used.
pub(super) fn grows(run: &Run, guest: &GuestReport, failures: &mut Vec<String>) {
    for function in &run.functions {
        let Function::Blk {
            size_mib,
            grow_mib: grow_mib @ 1..,
            ..
        } = function
        else {
            continue;
        };
        if run.mode != Mode::Full {
            continue;
        }
        let address = function.address();
        let mut fail = |what: String| failures.push(format!("{address}: growth: {what}"));
        let Some(grow) = guest.grows.iter().find(|grow| grow.address == address) else {
            fail("not in the report".into());
            continue;
        };
        let before = u64::from(*size_mib) * MIB;
        let added = u64::from(*grow_mib) * MIB;
        if (grow.before, grow.after) != (before, before + added) {
            let after = before + added;
            fail(format!(
                "{} to {}, not {before} to {after}",
                grow.before, grow.after
            ));
        }
        if grow.verified != added {
            fail(format!(
                "{} of {added} new bytes read back right",
                grow.verified
            ));
        }
    }
}

/// Each bus was unbound and bound as often as asked, and its disks kept their data.
pub(super) fn rebinds(run: &Run, guest: &GuestReport, failures: &mut Vec<String>) {
    if !run.mode.cycles_buses() {
        return;
    }
    // Those that come and go, and the functions whose data is read in between.
    let swapped = |function: &Function| {
        let mut others = run.substitutes.iter();
        others.any(|other| other.bus() == function.bus())
    };
    let at_boot: BTreeSet<_> = run.at_boot().map(Function::bus).collect();
    let cycled = |function: &&Function| match run.mode {
        Mode::Surprise => function.kind() == Kind::Testdev,
        Mode::ReuseId => swapped(function),
        Mode::Hotplug => !at_boot.contains(&function.bus()),
        _ => true,
    };
    let read = match run.mode {
        Mode::ReuseId => &run.substitutes,
        _ => &run.functions,
    };
    let buses: BTreeSet<String> = run
        .functions
        .iter()
        .filter(cycled)
        .map(|function| function.bus().to_string())
        .collect();
    if buses.is_empty() {
        failures.push("no bus comes and goes".into());
    }
    for bus in &buses {
        let data: u64 = read
            .iter()
            .filter(|function| function.bus().to_string() == *bus)
            .map(|function| match function {
                Function::Blk { size_mib, .. } => u64::from(*size_mib) * MIB,
                Function::Vfio { size_mib, .. } => u64::from(*size_mib) * MIB,
                Function::Rng { .. } | Function::Testdev { .. } => 0,
            })
            .sum();
        let data = match run.mode {
            // Read without the last function as well, which is no disk in this mode.
            Mode::EjectFunction => data * 2,
            _ => data,
        };
        for cycle in 1..=run.repeat {
            let mut fail = |what: String| failures.push(format!("{bus}: cycle {cycle}: {what}"));
            let seen = guest
                .rebinds
                .iter()
                .find(|seen| seen.cycle == cycle && seen.vmbus_device.eq_ignore_ascii_case(bus));
            match seen {
                None => fail("not in the report".into()),
                Some(seen) if !seen.gone => fail("functions stayed".into()),
                Some(seen) if !seen.back => fail("functions did not come back".into()),
                Some(seen) if seen.verified != data => {
                    fail(format!("{} of {data} bytes right", seen.verified));
                }
                Some(_) => {}
            }
        }
    }
}

/// Addresses of all functions of a kind.
pub(super) fn addresses(run: &Run, kind: Kind) -> impl Iterator<Item = PciAddress> {
    run.functions
        .iter()
        .filter(move |function| function.kind() == kind)
        .map(Function::address)
}
