//! Unbind and bind of the vPCI bus driver.

use crate::bounded::bounded;
use crate::disk::{Disk, Latency};
use crate::pci::{self, Found};
use crate::system::{step, wait_for, write_text};
use anyhow::{Context, Result, bail};
use guest_images::report::RebindReport;
use guest_images::scenario::{Expected, Kind};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Control files of the guest's vPCI driver.
const DRIVER: &str = "/sys/bus/vmbus/drivers/hv_pci";
/// Limit of an unbind or a bind.
const LIMIT: Duration = Duration::from_secs(60);

/// One cycle over every bus that has one of the functions: unbind, see them go, bind, see them
/// come back, and read their disks, which hold `generation`.
pub(crate) fn cycle(
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
        reports.push(one(number, &bus, &on_bus, generation)?);
    }
    Ok(reports)
}

fn one(number: u32, bus: &str, on_bus: &[Expected], generation: u64) -> Result<RebindReport> {
    step(format!("rebind {number}: unbind {bus}"));
    control("unbind", bus)?;
    wait_for(&format!("removal of the functions of {bus}"), LIMIT, || {
        let gone = on_bus.iter().all(|function| !pci::exists(function.address));
        Ok(gone.then_some(()))
    })?;
    step(format!("rebind {number}: bind {bus}"));
    let start = Instant::now();
    control("bind", bus)?;
    let back = pci::wait_expected(on_bus, LIMIT).with_context(|| format!("after bind of {bus}"))?;
    let millis = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut verified = 0;
    for function in back.iter().filter(|function| function.kind == Kind::Blk) {
        let disk = Disk::open(function)?;
        let what = format!("data check of {} after bind", disk.name);
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

fn control(verb: &'static str, bus: &str) -> Result<()> {
    let name = bus.to_owned();
    bounded(&format!("{verb} of {bus}"), LIMIT, move || {
        write_text(format!("{DRIVER}/{verb}"), &name)
    })
}
