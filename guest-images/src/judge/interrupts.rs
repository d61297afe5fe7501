//! Rules about interrupts: all arrive, on the vector and the CPU they are for.

#![forbid(unsafe_code)]

use super::devices::addresses;
use super::{Counted, Evidence, queues_used};
use crate::host::HostReport;
use crate::report::{GuestReport, Phase, Work};
use crate::scenario::{Function, Kind, Mode, PciAddress, Run};
use std::collections::BTreeSet;

/// Every queue vector interrupted, and the configuration vector of a disk that grew.
pub(super) fn vectors(run: &Run, guest: &GuestReport, failures: &mut Vec<String>) {
    for function in &run.functions {
        let address = function.address();
        let in_use = match function {
            Function::Blk {
                queues, grow_mib, ..
            } => {
                let grows = *grow_mib > 0 && run.mode == Mode::Full;
                u32::from(!grows)..queues_used(*queues, run.cpus) + 1
            }
            Function::Rng { .. } => 1..2,
            Function::Testdev { .. } => 0..u32::from(run.mode == Mode::Dma),
            Function::Vfio { guest, .. } => match guest {
                Kind::Nvme => 0..run.cpus + 1,
                Kind::E1000e => 0..3,
                Kind::Rng => 1..2,
                _ => 0..0,
            },
        };
        for index in in_use {
            let seen = guest
                .vectors
                .iter()
                .find(|vector| vector.address == address && vector.index == index);
            match seen {
                None => failures.push(format!("{address}: vector {index} is not in use")),
                Some(vector) if vector.total() == 0 => {
                    failures.push(format!("{address}: no interrupt on vector {index}"));
                }
                Some(_) => {}
            }
        }
    }
}

/// Every function went through the phases that its kind and mode call for.
pub(super) fn phases(run: &Run, guest: &GuestReport, failures: &mut Vec<String>) {
    let has = |address: PciAddress, work: Work, cpu: Option<u32>| {
        guest
            .phases
            .iter()
            .any(|phase| phase.address == address && phase.work == work && phase.cpu == cpu)
    };
    for address in addresses(run, Kind::Blk).chain(addresses(run, Kind::Nvme)) {
        for cpu in 0..run.cpus {
            if !has(address, Work::OneOutstanding, Some(cpu)) {
                failures.push(format!("{address}: no counted requests from CPU {cpu}"));
            }
        }
    }
    let moved = [Kind::Rng, Kind::E1000e, Kind::Edu].map(|kind| addresses(run, kind));
    for address in moved.into_iter().flatten() {
        if !has(address, Work::Moves, None) {
            failures.push(format!("{address}: no counted moves"));
        }
    }
    for function in &run.functions {
        let address = function.address();
        let grows = matches!(function, Function::Blk { grow_mib: 1.., .. });
        if grows && run.mode == Mode::Full && !has(address, Work::Grow, None) {
            failures.push(format!("{address}: no counted growth"));
        }
    }
    for phase in &guest.phases {
        one_phase(run, phase, failures);
    }
}

fn one_phase(run: &Run, phase: &Phase, failures: &mut Vec<String>) {
    let mut fail = |what: String| failures.push(format!("{}: {what}", phase.name));
    if phase.requests == 0 {
        fail("no requests".into());
    }
    let on = |wanted: fn(u32) -> bool| -> u64 {
        let vectors = phase.vectors.iter().filter(|vector| wanted(vector.index));
        vectors.map(|vector| vector.total()).sum()
    };
    let (config, queue) = (on(|index| index == 0), on(|index| index > 0));
    match phase.work {
        Work::Grow if config == 0 => fail("no interrupt on the configuration vector".into()),
        Work::OneOutstanding if queue < phase.requests => {
            fail(format!(
                "{queue} interrupts for {} requests",
                phase.requests
            ));
        }
        Work::Moves if config + queue == 0 => fail("no interrupts".into()),
        Work::Grow | Work::OneOutstanding | Work::Moves => {}
    }
    // With a queue for each CPU, requests of a CPU complete on that CPU.
    let queue_per_cpu = run.functions.iter().any(|function| {
        let per_cpu = match function {
            Function::Blk { queues, .. } => u32::from(*queues) >= run.cpus,
            Function::Vfio { guest, .. } => *guest == Kind::Nvme,
            _ => false,
        };
        function.address() == phase.address && per_cpu
    });
    let Some(cpu) = phase.cpu.filter(|_| queue_per_cpu) else {
        return;
    };
    for vector in phase.vectors.iter().filter(|vector| vector.index > 0) {
        for (&other, count) in vector.per_cpu.iter().filter(|&(&other, _)| other != cpu) {
            let name = &vector.name;
            fail(format!(
                "{count} interrupts of {name} on CPU {other}, none belong there"
            ));
        }
    }
}

/// In every phase the guest counted as many interrupts on each vector as the host raised: as the
/// VMM says of its own devices, and L1's kernel of its.
pub(super) fn exact(
    evidence: &Evidence<'_>,
    guest: &GuestReport,
    host: &HostReport,
    failures: &mut Vec<String>,
) {
    for phase in &guest.phases {
        let mut fail = |what: String| failures.push(format!("{}: {what}", phase.name));
        let function = evidence
            .run
            .functions
            .iter()
            .find(|function| function.address() == phase.address);
        let Some(function) = function else {
            fail("of a function that nobody asked for".into());
            continue;
        };
        if let Function::Vfio { host, .. } = function {
            host_device(evidence, phase, *host, &mut fail);
            continue;
        }
        let (Some(begin), Some(end)) = (host.mark(phase.begin), host.mark(phase.end)) else {
            fail(format!("host lacks mark {} or {}", phase.begin, phase.end));
            continue;
        };
        let (bus, number) = (function.bus(), function.number());
        let listed = end
            .functions
            .iter()
            .find(|entry| entry.bus == bus && entry.function == number);
        let Some(listed) = listed else {
            fail("host does not list the function".into());
            continue;
        };
        for vector in &listed.vectors {
            let index = vector.index;
            let Some(before) = begin.raised(bus, number, index) else {
                fail(format!("vector {index} is missing in mark {}", phase.begin));
                continue;
            };
            let counted = phase
                .vectors
                .iter()
                .filter(|counted| counted.index == index)
                .map(|counted| counted.total())
                .sum::<u64>();
            match vector.raised.checked_sub(before) {
                None => fail(format!(
                    "vector {index}: host count fell to {}",
                    vector.raised
                )),
                Some(raised) if raised != counted => {
                    fail(format!(
                        "vector {index}: host raised {raised}, guest counted {counted}"
                    ));
                }
                Some(_) => {}
            }
        }
        for counted in &phase.vectors {
            if !listed
                .vectors
                .iter()
                .any(|vector| vector.index == counted.index)
            {
                fail(format!("vector {}: unknown to the host", counted.index));
            }
        }
    }
}

/// As [`exact`], for a device of L1.
fn host_device(
    evidence: &Evidence<'_>,
    phase: &Phase,
    host: PciAddress,
    fail: &mut impl FnMut(String),
) {
    let at = |mark: u8| {
        let mut all = evidence.counted.iter().rev();
        all.find(|counted| counted.mark == mark && counted.host == host)
    };
    let (Some(begin), Some(end)) = (at(phase.begin), at(phase.end)) else {
        let (begin, end) = (phase.begin, phase.end);
        fail(format!("no count of {host} at mark {begin} or {end}"));
        return;
    };
    let counted = |index: u32| -> u64 {
        let vectors = phase.vectors.iter().filter(|vector| vector.index == index);
        vectors.map(|vector| vector.total()).sum()
    };
    let known = phase.vectors.iter().map(|vector| vector.index);
    // The network controller raises the next interrupt of a queue while the last one waits for the
    // guest's CPU, and two that wait are one.
    let merges = evidence
        .run
        .functions
        .iter()
        .any(|function| function.address() == phase.address && function.kind() == Kind::E1000e);
    let indices: BTreeSet<u32> = end.vectors.keys().copied().chain(known).collect();
    for index in indices {
        let raised = |counted: &Counted| counted.vectors.get(&index).copied().unwrap_or(0);
        match raised(end).checked_sub(raised(begin)) {
            None => fail(format!("vector {index}: count of {host} fell")),
            Some(raised) if merges && (1..=raised).contains(&counted(index)) => {}
            Some(raised) if raised != counted(index) => fail(format!(
                "vector {index}: {host} raised {raised}, guest counted {}",
                counted(index)
            )),
            Some(_) => {}
        }
    }
}
