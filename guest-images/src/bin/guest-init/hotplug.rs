//! Buses that are plugged in and ejected while a disk is under load.

use crate::disk::Disk;
use crate::load::Load;
use crate::pci;
use crate::rebind;
use crate::system::{ask, step};
use anyhow::{Context, Result, bail};
use guest_images::report::{LoadReport, RebindReport};
use guest_images::scenario::Expected;
use std::collections::BTreeMap;
use std::time::Instant;

/// Threads of the load for each CPU.
const THREADS_PER_CPU: u64 = 2;

/// `disk` is there and holds `generation`. The buses of the other functions of `expect` come and go
/// `repeat` times and are there at the end; their disks hold generation 0.
pub(crate) fn run(
    disk: &Disk,
    generation: u64,
    expect: &[Expected],
    repeat: u32,
    cpus: usize,
) -> Result<(LoadReport, Vec<RebindReport>)> {
    let mut buses: BTreeMap<u32, Vec<Expected>> = BTreeMap::new();
    for item in expect {
        if item.address.domain != disk.address().domain {
            buses.entry(item.address.domain).or_default().push(*item);
        }
    }
    let threads = cpus as u64 * THREADS_PER_CPU;
    let load = Load::start(disk, generation, threads, true);
    let mut reports = Vec::new();
    for cycle in 1..=repeat {
        for on_bus in buses.values() {
            let before = load.requests();
            reports.push(one(cycle, on_bus, cycle < repeat)?);
            if load.requests() == before {
                bail!("{}: no request while a bus came and went", disk.name);
            }
        }
    }
    Ok((load.finish(Vec::new(), 0)?, reports))
}

fn one(cycle: u32, on_bus: &[Expected], eject: bool) -> Result<RebindReport> {
    let first = on_bus.first().context("a bus without functions")?.address;
    let gone = on_bus.iter().all(|item| !pci::exists(item.address));
    step(format!("cycle {cycle}: plug {first}"));
    let start = Instant::now();
    ask(&format!("plug {first}"));
    let back = pci::wait_expected(on_bus, rebind::LIMIT)
        .with_context(|| format!("after plug of {first}"))?;
    let millis = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let verified = rebind::verify(&back, 0, "plug")?;
    let bus = back.iter().find_map(pci::Found::vmbus_device);
    let bus = bus.context("not on a VMBus device")?;
    if eject {
        rebind::take(cycle, "eject", &bus, on_bus)?;
    }
    Ok(RebindReport {
        cycle,
        vmbus_device: bus,
        gone,
        back: true,
        millis,
        verified,
    })
}
