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
/// Limit of an unbind or a bind.
const LIMIT: Duration = Duration::from_secs(60);

/// One cycle over every bus that has one of the functions: it is taken away, they go, it is given
/// back, they come back, and their disks are read, which hold `generation`.
pub(crate) fn cycle(
    mode: Mode,
    number: u32,
    functions: &[Found],
    generation: u64,
) -> Result<Vec<RebindReport>> {
    let buses: BTreeSet<String> = functions.iter().filter_map(Found::vmbus_device).collect();
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
        reports.push(one(mode, number, &bus, &on_bus, generation)?);
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
        Mode::Eject => ("eject", "plug"),
        Mode::Surprise => ("remove", "plug"),
        _ => ("unbind", "bind"),
    };
    step(format!("cycle {number}: {take} {bus}"));
    control(mode, take, bus)?;
    wait_for(&format!("removal of the functions of {bus}"), LIMIT, || {
        let gone = on_bus.iter().all(|function| !pci::exists(function.address));
        Ok(gone.then_some(()))
    })?;
    step(format!("cycle {number}: {give} {bus}"));
    let start = Instant::now();
    control(mode, give, bus)?;
    let back =
        pci::wait_expected(on_bus, LIMIT).with_context(|| format!("after {give} of {bus}"))?;
    let millis = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut verified = 0;
    for function in back.iter().filter(|function| function.kind == Kind::Blk) {
        let disk = Disk::open(function)?;
        let what = format!("data check of {} after {give}", disk.name);
        verified += bounded(&what, LIMIT, move || {
            let size = disk.size()?;
            Ok(disk.verify(generation, 0..size, &mut Latency::default())?.0)
        })
        .context(what)?;
    }
    Ok(RebindReport {
        cycle: number,
        vmbus_device: bus.to_owned(),
        gone: true,
        back: true,
        millis,
        verified,
    })
}

/// Has the driver or the VMM do something to a bus.
fn control(mode: Mode, verb: &'static str, bus: &str) -> Result<()> {
    if mode.is_controlled() {
        ask(&format!("{verb} {bus}"));
        return Ok(());
    }
    let name = bus.to_owned();
    bounded(&format!("{verb} of {bus}"), LIMIT, move || {
        write_text(format!("{DRIVER}/{verb}"), &name)
    })
}
