//! The steps of the pvIOMMU: the guest gives the device page tables of its own.
#![forbid(unsafe_code)]

use vm_vpci::pviommu::IommuMode;
use vpci_conformance::check::{Failure, equal, holds};
use vpci_conformance::devices::Plain;
use vpci_conformance::host::BusSetup;
use vpci_conformance::model::pviommu::{PvIommu, Tables, configure};
use vpci_conformance::model::testdev::{ERROR_FAULT, Job, NO_VECTOR, TestDev, register};
use vpci_conformance::model::vm::{PAGE, Vm};
use vpci_conformance::model::vpci::{self, Bus, slot};

use super::stage::{Facts, FaultCount};

/// Numbers of the guest's domains.
const PAGING: u32 = 1;
const BLOCKED: u32 = 2;
/// I/O virtual addresses, far from all RAM.
const SOURCE: u64 = 0x7000_0000_0000;
const DESTINATION: u64 = 0x7000_4000_0000;
/// Pages of a copy.
const PAGES: u64 = 2;

/// A device in a domain with tables.
pub(super) struct Space {
    iommu: PvIommu,
    device: TestDev,
    id: u64,
    tables: Tables,
    /// Where the copy's source and the pages of its destination are.
    source: u64,
    targets: [u64; PAGES as usize],
}

/// The copy that every step here asks of the device.
const COPY: Job = Job {
    command: 1,
    source: SOURCE,
    destination: DESTINATION,
    length: (PAGES * PAGE) as u32,
    vector: NO_VECTOR,
};

pub(super) fn find(facts: &mut Facts<'_>, device: &TestDev) -> Result<PvIommu, Failure> {
    let iommu = PvIommu::new(device.bus().kernel());
    let found = iommu
        .capabilities()?
        .map_err(|status| Failure::Host(format!("GET_IOMMU_CAPABILITIES ends with {status:#x}")))?;
    equal("capabilities present and S1", found.bits & 5, 5)?;
    facts.saw(
        format_args!(
            "GET_IOMMU_CAPABILITIES: {:#x}, {} bits, page sizes {:#x}",
            found.bits, found.width, found.page_sizes
        ),
        "the guest may give devices x86-64 page tables of its own: 4 KiB, 2 MiB and 1 GiB pages",
    );
    let id = device.bus().logical_id(device.slot());
    equal("property of the device", iommu.is_behind(id)?, Ok(1))?;
    facts.saw(
        format_args!("GET_LOGICAL_DEVICE_PROPERTY of {id:#010x}: 1"),
        "the device is behind it; until now it was in the default domain, which is the identity",
    );
    Ok(iommu)
}

pub(super) fn translate(
    facts: &mut Facts<'_>,
    iommu: PvIommu,
    device: &TestDev,
) -> Result<Space, Failure> {
    let vm = device.vm();
    let id = device.bus().logical_id(device.slot());
    let tables = Tables::new(vm, 4)?;
    equal("status of CREATE", iommu.create(PAGING)?, 0)?;
    let configured = iommu.translate(PAGING, &tables)?;
    equal("status of CONFIGURE", configured, 0)?;
    equal("status of ATTACH", iommu.attach(PAGING, id)?, 0)?;
    facts.saw(
        format_args!("domain {PAGING} created, configured, device {id:#010x} attached"),
        format_args!(
            "its tables begin at {:#x} in the guest's own RAM",
            tables.root()
        ),
    );
    let source = vm.pages(PAGES)?;
    let pages = vm.pages(4)?;
    let space = Space {
        iommu,
        device: device.clone(),
        id,
        tables,
        source,
        // Not in order, and not side by side.
        targets: [pages + 3 * PAGE, pages],
    };
    let data: Vec<u8> = (0..PAGES * PAGE)
        .map(|at| (at * 13 + at / PAGE + 5) as u8)
        .collect();
    vm.write(source, &data)?;
    for index in 0..PAGES {
        let offset = index * PAGE;
        space.tables.map(SOURCE + offset, source + offset)?;
    }
    space.map_targets()?;
    space.lands()?;
    facts.saw(
        format_args!(
            "{} bytes copied from {SOURCE:#x} to {DESTINATION:#x}",
            COPY.length
        ),
        format_args!(
            "they lie at {:#x} and {:#x}, where the tables say; a map is a plain store, no call",
            space.targets[0], space.targets[1]
        ),
    );
    let by_gpa = Job { source, ..COPY };
    equal("status and error", device.run(&by_gpa)?, (6, ERROR_FAULT))?;
    facts.saw(
        format_args!("the same from {source:#x}, its guest physical address: a DMA fault"),
        "what the guest did not map is out of the device's reach",
    );
    Ok(space)
}

impl Space {
    fn vm(&self) -> &Vm {
        self.device.vm()
    }

    fn map_targets(&self) -> Result<(), Failure> {
        for (iova, page) in (DESTINATION..).step_by(PAGE as usize).zip(self.targets) {
            self.tables.map(iova, page)?;
        }
        Ok(())
    }

    fn wipe(&self) -> Result<(), Failure> {
        for page in self.targets {
            self.vm().ram().fill(page, PAGE, 0)?;
        }
        Ok(())
    }

    /// The copy, which must land.
    fn lands(&self) -> Result<(), Failure> {
        self.wipe()?;
        equal("status and error", self.device.run(&COPY)?, (2, 0))?;
        for (offset, page) in (0..).step_by(PAGE as usize).zip(self.targets) {
            let want = self.vm().read(self.source + offset, PAGE as usize)?;
            let got = self.vm().read(page, PAGE as usize)?;
            holds(format!("the page at {page:#x} is right"), got == want)?;
        }
        Ok(())
    }

    /// The copy, which must fault at `place` and move nothing.
    fn faults(&self, place: u64) -> Result<(), Failure> {
        self.wipe()?;
        let ended = self.device.run(&COPY)?;
        equal("status and error", ended, (6, ERROR_FAULT))?;
        equal("FAULT", self.device.load(register::FAULT, 8)?, place)?;
        for page in self.targets {
            let got = self.vm().read(page, PAGE as usize)?;
            holds("no byte was moved", got.iter().all(|byte| *byte == 0))?;
        }
        Ok(())
    }

    /// The host's counts, for the table at the end.
    fn counts(&self) -> Result<Vec<FaultCount>, Failure> {
        let Some(report) = self.vm().host().iommu() else {
            return Err(Failure::Host("there is no pvIOMMU".into()));
        };
        let devices = report.devices.iter().map(|device| FaultCount {
            what: format!("function {}", device.id),
            faults: device.backend.faults,
            last: device.backend.last_fault.map(|fault| fault.to_string()),
        });
        let domains = report.domains.iter().map(|domain| FaultCount {
            what: format!("domain {}", domain.number),
            faults: domain.faults,
            last: None,
        });
        Ok(devices.chain(domains).collect())
    }
}

pub(super) fn unmap(facts: &mut Facts<'_>, space: &Space) -> Result<(), Failure> {
    let second = DESTINATION + PAGE;
    space.tables.unmap(second)?;
    space.iommu.flush_range(PAGING, second, 0)?;
    facts.saw(
        format_args!("entry of {second:#x} cleared; FLUSH_LIST of one page succeeds"),
        "the page is the guest's again: no access through the old entry is under way or can start",
    );
    space.faults(DESTINATION)?;
    facts.saw(
        "the same copy: a DMA fault",
        "not even the page that is still mapped was touched: a transfer is translated as a whole",
    );
    space.map_targets()?;
    space.lands()?;
    facts.saw("mapped again: the copy lands", "a map needs no call");
    Ok(())
}

pub(super) fn block(facts: &mut Facts<'_>, space: &Space) -> Result<Vec<FaultCount>, Failure> {
    let (iommu, id) = (&space.iommu, space.id);
    equal("status of CREATE", iommu.create(BLOCKED)?, 0)?;
    let flags = configure::ENABLED | configure::BLOCKED;
    let configured = iommu.configure(BLOCKED, flags, 0)?;
    equal("status of CONFIGURE", configured, 0)?;
    equal("status of ATTACH", iommu.attach(BLOCKED, id)?, 0)?;
    space.faults(SOURCE)?;
    facts.saw(
        format_args!("moved to domain {BLOCKED}, which blocks: the same copy is a DMA fault"),
        "so Linux parks a device that nobody may use",
    );
    equal("status of ATTACH", iommu.attach(PAGING, id)?, 0)?;
    space.lands()?;
    facts.saw(
        format_args!("moved back to domain {PAGING}: the copy lands"),
        "a move is one call, and takes effect before it returns",
    );
    let counts = space.counts()?;
    for count in &counts {
        let last = count.last.as_deref().unwrap_or("counted by domain");
        facts.saw(
            format_args!("DMA faults of {}: {}", count.what, count.faults),
            last,
        );
    }
    holds(
        "faults were counted",
        counts.iter().all(|count| count.faults > 0),
    )?;
    Ok(counts)
}

/// Takes the bus away and lets its channel go, as the guest must before its name can be reused.
fn take_away(bus: &Bus) -> Result<(), Failure> {
    let (vmbus, offer) = (bus.vmbus(), &bus.channel().offer);
    bus.vm().remove(offer.instance)?;
    let rescinded = vmbus.expect_rescind()?;
    equal("channel that is rescinded", rescinded, offer.relid)?;
    vmbus.send_close(offer.relid)?;
    vmbus.release(offer.relid)?;
    vmbus.expect_silence()
}

/// `bus` carries the device that was plugged in again.
pub(super) fn reuse(
    facts: &mut Facts<'_>,
    space: &Space,
    bus: &Bus,
    usual: &BusSetup,
) -> Result<(), Failure> {
    let (vm, iommu, id) = (space.vm(), &space.iommu, space.id);
    take_away(bus)?;
    let gone = iommu.is_behind(id)?;
    equal("property of a device that is gone", gone, Err(0x57))?;
    facts.saw(
        format_args!("the bus is taken away: {id:#010x} is INVALID_DEVICE_ID"),
        "nothing of the device is known any more",
    );
    let plain = Plain::wide();
    vm.plug(&BusSetup {
        instance: usual.instance,
        functions: vec![plain.function(0).with_iommu(IommuMode::On)],
    })?;
    let offer = bus.vmbus().expect_offer()?;
    let other = Bus::probe(bus.vmbus(), &offer, vpci::VERSIONS[0])?;
    equal("id", other.logical_id(slot(0)), id)?;
    other.set_config(slot(0), 4, 2, 6)?;
    let target = space.targets[0];
    space.wipe()?;
    holds(
        "the old mapping is none of its",
        !plain.write(DESTINATION, &[7; 8]),
    )?;
    holds(
        "it reaches RAM by its address",
        plain.write(target, &[7; 8]),
    )?;
    equal("RAM", vm.read(target, 8)?, vec![7; 8])?;
    facts.saw(
        format_args!("a device of another class is plugged in, with the same id {id:#010x}"),
        "it starts in the default domain: fresh, though domain 1 and its tables are still there",
    );
    equal("status of ATTACH", iommu.attach(PAGING, id)?, 0)?;
    holds(
        "it is translated now",
        plain.write(DESTINATION + 8, &[9; 8]),
    )?;
    equal("RAM", vm.read(target + 8, 8)?, vec![9; 8])?;
    facts.saw(
        format_args!("attached to domain {PAGING}: its write to {DESTINATION:#x} lands"),
        "the domain is the guest's, whoever is in it",
    );
    take_away(&other)?;
    for number in [PAGING, BLOCKED] {
        equal("status of DELETE", iommu.delete(number)?, 0)?;
    }
    vm.plug(usual)?;
    bus.vmbus().expect_offer()?;
    facts.saw(
        "both domains deleted, the first device plugged in again",
        "a domain without devices can go",
    );
    Ok(())
}
