//! Buses that go away and come back: by unbind and bind of their driver, or by the VMM.

use crate::bounded::bounded;
use crate::disk::{Disk, Latency};
use crate::pci::{self, Found};
use crate::system::{ask, step, wait_for, write_text};
use anyhow::{Context, Result, bail};
use guest_images::report::RebindReport;
use guest_images::scenario::{Expected, Kind, Mode};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Control files of the guest's vPCI driver.
const DRIVER: &str = "/sys/bus/vmbus/drivers/hv_pci";
/// Event by which L1 is asked to unbind a device.
pub(crate) const HOST_UNBIND: &str = "host-unbind";
/// Limit of an unbind or a bind.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// One cycle over every bus that has one of the functions: it is taken away, they go, it is given
/// back, they come back, and their disks are read, which hold `generation`.
pub(crate) fn cycle(
    mode: Mode,
    number: u32,
    functions: &[Found],
    swap: &[Expected],
    generation: u64,
) -> Result<Vec<RebindReport>> {
    let cycled = |function: &&Found| match mode {
        Mode::Surprise => function.kind == Kind::Testdev,
        Mode::ReuseId => swap.iter().any(|item| item.address == function.address),
        _ => true,
    };
    let functions: Vec<&Found> = functions.iter().filter(cycled).collect();
    let buses: BTreeSet<String> = functions.iter().filter_map(|f| f.vmbus_device()).collect();
    if buses.is_empty() {
        bail!("rebind: no PCI function sits on a VMBus device");
    }
    let mut reports = Vec::new();
    for bus in buses {
        let on_bus: Vec<Expected> = functions
            .iter()
            .filter(|function| function.vmbus_device().as_ref() == Some(&bus))
            .map(|function| Expected {
                address: function.address,
                kind: function.kind,
            })
            .collect();
        let report = match mode {
            Mode::ReuseId => reuse(number, &bus, &on_bus, swap)?,
            _ => one(mode, number, &bus, &on_bus, generation)?,
        };
        reports.push(report);
    }
    Ok(reports)
}

fn one(
    mode: Mode,
    number: u32,
    bus: &str,
    on_bus: &[Expected],
    generation: u64,
) -> Result<RebindReport> {
    let (take, give) = match mode {
        Mode::Eject | Mode::EjectFunction => ("eject", "plug"),
        Mode::Surprise => ("remove", "plug"),
        Mode::HostUnbind => (HOST_UNBIND, "plug"),
        _ => ("unbind", "bind"),
    };
    let verified_before = match mode {
        Mode::EjectFunction => without_last(number, bus, on_bus, generation)?,
        _ => 0,
    };
    if mode == Mode::HostUnbind {
        unbound_by_host(number, bus, on_bus)?;
    } else if mode.is_controlled() {
        self::take(number, take, bus, on_bus)?;
    } else {
        step(format!("cycle {number}: {take} {bus}"));
        driver(take, bus)?;
        wait_gone(bus, on_bus)?;
    }
    step(format!("cycle {number}: {give} {bus}"));
    let start = Instant::now();
    match mode.is_controlled() {
        true => ask(&format!("{give} {bus}")),
        false => driver(give, bus)?,
    }
    let back =
        pci::wait_expected(on_bus, LIMIT).with_context(|| format!("after {give} of {bus}"))?;
    let millis = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let verified = verified_before + verify(&back, generation, give)?;
    Ok(RebindReport {
        cycle: number,
        vmbus_device: bus.to_owned(),
        gone: true,
        back: true,
        millis,
        verified,
    })
}

/// Has the VMM eject the last function of a bus, and reads the disks among the others, which stay; gives the
/// number of bytes.
fn without_last(number: u32, bus: &str, on_bus: &[Expected], generation: u64) -> Result<u64> {
    let last = on_bus.iter().max_by_key(|item| item.address.function);
    let last = last.filter(|_| on_bus.len() > 1);
    let last = last.context("no function of the bus stays when one is ejected")?;
    let others: Vec<Expected> = on_bus
        .iter()
        .filter(|item| item.address != last.address)
        .copied()
        .collect();
    let verb = "eject-function";
    step(format!("cycle {number}: {verb} {}", last.address));
    ask(&format!("{verb} {bus} {}", last.address.function));
    wait_gone(bus, std::slice::from_ref(last))?;
    let stay =
        pci::wait_expected(&others, LIMIT).with_context(|| format!("after {verb} of {bus}"))?;
    verify(&stay, generation, verb)
}

/// Has L1 take the first function of a bus from the VMM, and waits until all are gone.
fn unbound_by_host(number: u32, bus: &str, on_bus: &[Expected]) -> Result<()> {
    let first = on_bus.first().context("a bus without functions")?.address;
    step(format!("cycle {number}: {HOST_UNBIND} {first}"));
    ask(&format!("{HOST_UNBIND} {first}"));
    wait_gone(bus, on_bus)
}

/// One cycle in which other functions come under the bus's name in between.
fn reuse(number: u32, bus: &str, on_bus: &[Expected], swap: &[Expected]) -> Result<RebindReport> {
    let domain = on_bus.first().map(|item| item.address.domain);
    let others: Vec<Expected> = swap
        .iter()
        .filter(|item| Some(item.address.domain) == domain)
        .copied()
        .collect();
    take(number, "eject", bus, on_bus)?;
    step(format!("cycle {number}: swap {bus}"));
    let start = Instant::now();
    ask(&format!("swap {bus}"));
    let back =
        pci::wait_expected(&others, LIMIT).with_context(|| format!("after swap of {bus}"))?;
    let millis = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let verified = verify(&back, 0, "swap")?;
    take(number, "eject", bus, &others)?;
    step(format!("cycle {number}: plug {bus}"));
    ask(&format!("plug {bus}"));
    pci::wait_expected(on_bus, LIMIT).with_context(|| format!("after plug of {bus}"))?;
    Ok(RebindReport {
        cycle: number,
        vmbus_device: bus.to_owned(),
        gone: true,
        back: true,
        millis,
        verified,
    })
}

/// Has the VMM take a bus away, and waits until its functions are gone.
pub(crate) fn take(number: u32, verb: &str, bus: &str, on_bus: &[Expected]) -> Result<()> {
    step(format!("cycle {number}: {verb} {bus}"));
    ask(&format!("{verb} {bus}"));
    wait_gone(bus, on_bus)
}

fn wait_gone(bus: &str, on_bus: &[Expected]) -> Result<()> {
    wait_for(&format!("removal of the functions of {bus}"), LIMIT, || {
        let gone = on_bus.iter().all(|function| !pci::exists(function.address));
        Ok(gone.then_some(()))
    })
}

/// Reads the disks among `functions`, which hold `generation`; gives the number of bytes.
pub(crate) fn verify(functions: &[Found], generation: u64, when: &str) -> Result<u64> {
    let mut verified = 0;
    for function in functions
        .iter()
        .filter(|function| matches!(function.kind, Kind::Blk | Kind::Nvme))
    {
        let disk = Disk::open(function)?;
        let what = format!("data check of {} after {when}", disk.name);
        verified += bounded(&what, LIMIT, move || {
            let size = disk.size()?;
            Ok(disk.verify(generation, 0..size, &mut Latency::default())?.0)
        })
        .context(what)?;
    }
    Ok(verified)
}

/// Has the guest's own driver do something to a bus.
fn driver(verb: &'static str, bus: &str) -> Result<()> {
    let name = bus.to_owned();
    bounded(&format!("{verb} of {bus}"), LIMIT, move || {
        write_text(format!("{DRIVER}/{verb}"), &name)
    })
}
