//! Faults: what the device sees, what the host counts; and the interrupt range.
#![forbid(unsafe_code)]

use vm_vpci::pviommu::{Access, DmaFault, FaultCause};

use super::{IOVA, Mapped, Scene, behind, setup};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::host::{BusSetup, Setup};
use crate::model::kernel::VMBUS_VECTOR;
use crate::model::pviommu::{bit, configure};
use crate::model::testdev::{ERROR_FAULT, Job, NO_VECTOR, register};
use crate::model::vm::PAGE;
use crate::model::vpci::Bus;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "pviommu.fault.whole-access",
        "An access of which one page does not translate moves no byte, and the device says where.",
        &["IO-5-06"],
        whole_access,
    ),
    Check::new(
        "pviommu.fault.goes-on",
        "After a fault the device works on, and the guest hears of it from the device only.",
        &["IO-5-06"],
        goes_on,
    ),
    Check::new(
        "pviommu.fault.last",
        "The host keeps the last fault of a function: domain, address, direction, cause, level.",
        &["IO-5-06"],
        last,
    ),
    Check::new(
        "pviommu.fault.counted",
        "Faults are counted by function and by domain, each by itself; a new domain starts at 0.",
        &["IO-5-06"],
        counted,
    ),
    Check::new(
        "pviommu.msi.not-translated",
        "The interrupt range is never translated: what the tables say of it is nothing.",
        &["IO-5-05"],
        not_translated,
    ),
    Check::new(
        "pviommu.msi.edges",
        "The interrupt range begins and ends where it does; an access that touches it is a fault.",
        &["IO-5-05"],
        edges,
    ),
    Check::new(
        "pviommu.msi.message",
        "A DMA write of the function's own message raises its interrupt, in every kind of domain.",
        &["IO-5-05"],
        message,
    ),
    Check::new(
        "pviommu.msi.not-a-message",
        "A DMA write of anything else there raises nothing, and is a fault.",
        &["IO-5-05"],
        not_a_message,
    ),
];

fn whole_access(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (vm, tables) = (scene.vm(), scene.paged(1, 4)?);
    let pages = vm.pages(4)?;
    for bad in 0..4 {
        for index in 0..4 {
            tables.map(IOVA + index * PAGE, pages + index * PAGE)?;
        }
        tables.unmap(IOVA + bad * PAGE)?;
        equal("status of FLUSH", scene.iommu.flush(1)?, 0)?;
        vm.ram().fill(pages, 4 * PAGE, 0x11)?;
        let filled = scene.fill(IOVA + 8, 4 * PAGE as u32 - 16, 0)?;
        holds("a fill fails", !filled)?;
        let after = vm.read(pages, 4 * PAGE as usize)?;
        holds("no byte was moved", after.iter().all(|byte| *byte == 0x11))?;
        equal("MOVED", scene.device.load(register::MOVED, 8)?, 0)?;
        equal("FAULT", scene.device.load(register::FAULT, 8)?, IOVA + 8)?;
        let fault = scene.vm().host().buses()[0].functions[0].last_fault;
        let first = (IOVA + bad * PAGE).max(IOVA + 8);
        equal("first address", fault.map(|fault| fault.iova), Some(first))?;
    }
    Ok(())
}

/// Vectors that came to a VP, besides that of VMBus.
fn arrived(scene: &Scene, vp: u32) -> Result<Vec<u8>, Failure> {
    let mut vectors = scene.vm().take_interrupts(vp)?;
    vectors.retain(|vector| *vector != VMBUS_VECTOR);
    Ok(vectors)
}

fn goes_on(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let scene = &mapped.scene;
    scene.device.interrupt(0, 0x41, 1)?;
    for _ in 0..50 {
        let job = Job {
            command: 3,
            source: IOVA + PAGE,
            destination: 0,
            length: 64,
            vector: 0,
        };
        let ended = scene.device.run(&job)?;
        equal("status and error", ended, (6, ERROR_FAULT))?;
        scene.vm().expect_interrupt(1, 0x41)?;
    }
    for vp in 0..scene.vm().vps() {
        equal(
            format!("interrupts of VP {vp}"),
            arrived(scene, vp)?,
            vec![],
        )?;
    }
    mapped.is_intact()
}

/// The last fault of function 0 of the first bus.
fn last_fault(scene: &Scene) -> Option<DmaFault> {
    scene.vm().host().buses()[0].functions[0].last_fault
}

fn last(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let (scene, tables) = (&mapped.scene, &mapped.tables);
    let at = |access, cause, iova| DmaFault {
        domain: 1,
        iova,
        len: 8,
        access,
        cause,
    };
    let entry = mapped.page | bit::PAGE;
    let cases = [
        (0, FaultCause::NotPresent { level: 1 }, true),
        (entry & !bit::US, FaultCause::Supervisor { level: 1 }, true),
        (entry & !bit::RW, FaultCause::ReadOnly { level: 1 }, false),
        (0xf000_0000 | bit::PAGE, FaultCause::NotRam, true),
    ];
    for (value, cause, also_reads) in cases {
        tables.set(IOVA, 1, value)?;
        scene.iommu.flush_range(1, IOVA, 0)?;
        if also_reads {
            equal("what is read", scene.read(IOVA + 8)?, None)?;
            let want = at(Access::Read, cause, IOVA + 8);
            equal("last fault", last_fault(scene), Some(want))?;
        }
        holds("a write fails", !scene.write(IOVA + 16, 1)?)?;
        let want = at(Access::Write, cause, IOVA + 16);
        equal("last fault", last_fault(scene), Some(want))?;
    }
    let level = |level| FaultCause::NotPresent { level };
    for (iova, cause) in [
        (IOVA ^ 1 << 12, level(1)),
        (IOVA ^ 1 << 21, level(2)),
        (IOVA ^ 1 << 30, level(3)),
        (IOVA ^ 1 << 39, level(4)),
        (IOVA | 1 << 48, FaultCause::Width),
    ] {
        equal("what is read", scene.read(iova)?, None)?;
        let want = at(Access::Read, cause, iova);
        equal("last fault", last_fault(scene), Some(want))?;
    }
    let blocked = configure::ENABLED | configure::BLOCKED;
    equal("CONFIGURE", scene.iommu.configure(1, blocked, 0)?, 0)?;
    equal("what is read", scene.read(IOVA)?, None)?;
    let want = at(Access::Read, FaultCause::Blocked, IOVA);
    equal("last fault", last_fault(scene), Some(want))
}

fn counted(context: &Context) -> Verdict {
    let vm = context.machine(&Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: vec![behind(0), behind(1)],
        }],
        ..setup()
    })?;
    let bus = Bus::bring_up(&vm)?;
    let (one, two) = (Scene::on(&bus, 0)?, Scene::on(&bus, 1)?);
    let counts = || -> Result<_, Failure> {
        let Some(report) = vm.host().iommu() else {
            return Err(Failure::Host("there is no pvIOMMU".into()));
        };
        let domains: Vec<_> = report
            .domains
            .iter()
            .map(|d| (d.number, d.faults))
            .collect();
        let devices: Vec<_> = report.devices.iter().map(|d| d.backend.faults).collect();
        let functions = vm.host().buses()[0].functions.clone();
        let ports: Vec<_> = functions.iter().map(|f| f.dma.faults).collect();
        equal("faults of functions, told twice", &ports, &devices)?;
        Ok((devices, domains, report.counters.default_domain_faults))
    };
    equal("faults", counts()?, (vec![0, 0], vec![], 0))?;
    one.faults(IOVA)?;
    equal("faults", counts()?, (vec![2, 0], vec![], 2))?;
    one.paged(5, 4)?;
    two.paged(7, 4)?;
    one.faults(IOVA)?;
    two.faults(IOVA)?;
    two.faults(IOVA)?;
    equal("faults", counts()?, (vec![4, 4], vec![(5, 2), (7, 4)], 2))?;
    equal("ATTACH", one.iommu.attach(7, one.id)?, 0)?;
    one.faults(IOVA)?;
    equal("faults", counts()?, (vec![6, 4], vec![(5, 2), (7, 6)], 2))?;
    equal("DELETE", one.iommu.delete(5)?, 0)?;
    equal("CREATE", one.iommu.create(5)?, 0)?;
    equal("faults", counts()?, (vec![6, 4], vec![(5, 0), (7, 6)], 2))
}

const RANGE: u64 = 0xfee0_0000;
const RANGE_END: u64 = 0xfef0_0000;

fn not_translated(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (vm, tables) = (scene.vm(), scene.paged(1, 4)?);
    let page = vm.pages(1)?;
    for at in [RANGE, RANGE + PAGE, RANGE + 0x8_0000, RANGE_END - PAGE] {
        tables.map(at, page)?;
        vm.ram().fill(page, PAGE, 0x11)?;
        scene.faults(at)?;
        scene.faults(at + 8)?;
        for length in [1, 2, 4, 8, 4096] {
            holds("a fill fails", !scene.fill(at, length, 0x99)?)?;
        }
        let after = vm.read(page, PAGE as usize)?;
        holds("RAM is untouched", after.iter().all(|byte| *byte == 0x11))?;
        let leaf = tables.entry(at, 1)?;
        equal("the leaf", leaf, page | bit::PAGE)?;
    }
    Ok(())
}

fn edges(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (vm, tables) = (scene.vm(), scene.paged(1, 4)?);
    let pages = vm.pages(2)?;
    tables.map(RANGE - PAGE, pages)?;
    tables.map(RANGE, pages + PAGE)?;
    scene.reaches(RANGE - 8, pages + PAGE - 8)?;
    let crossing = scene.fill(RANGE - 8, 16, 0x99)?;
    holds("a fill into the range fails", !crossing)?;
    equal(
        "RAM before the range",
        scene.peek(pages + PAGE - 8)?,
        super::STORED,
    )?;
    tables.map(RANGE_END - PAGE, pages)?;
    tables.map(RANGE_END, pages + PAGE)?;
    scene.reaches(RANGE_END, pages + PAGE)?;
    let crossing = scene.fill(RANGE_END - 8, 16, 0x99)?;
    holds("a fill out of the range fails", !crossing)?;
    equal(
        "RAM behind the range",
        scene.peek(pages + PAGE)?,
        super::STORED,
    )?;
    // 4 GiB further up it is an address like any other.
    tables.map(RANGE + (1 << 32), pages)?;
    scene.reaches(RANGE + (1 << 32), pages)
}

/// Has the device write 4 bytes.
fn store(scene: &Scene, address: u64, data: u32) -> Result<bool, Failure> {
    scene.fill(address, 4, data.into())
}

fn message(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (vm, iommu) = (scene.vm(), &scene.iommu);
    let interrupt = scene.device.interrupt(0, 0x41, 1)?;
    let message = interrupt.message;
    let raised = |kind: &str| -> Verdict {
        let written = store(&scene, message.address, message.data)?;
        holds(format!("the message is taken in {kind}"), written)?;
        vm.expect_interrupt(1, 0x41)?;
        equal("further interrupts", vm.take_interrupts(1)?, vec![])
    };
    raised("the default domain")?;
    let tables = scene.paged(1, 4)?;
    raised("a paging domain")?;
    // A mapping of the range changes nothing.
    let page = vm.pages(1)?;
    tables.map(message.address & !0xfff, page)?;
    raised("a paging domain with the range mapped")?;
    equal("RAM", vm.read(page, PAGE as usize)?, vec![0; PAGE as usize])?;
    equal("CONFIGURE", iommu.configure(1, 0, 0)?, 0)?;
    raised("an identity domain")?;
    let blocked = configure::ENABLED | configure::BLOCKED;
    equal("CONFIGURE", iommu.configure(1, blocked, 0)?, 0)?;
    raised("a blocked domain")
}

fn not_a_message(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let vm = scene.vm();
    let interrupt = scene.device.interrupt(0, 0x41, 1)?;
    let message = interrupt.message;
    let tables = scene.paged(1, 4)?;
    let page = vm.pages(1)?;
    tables.map(message.address & !0xfff, page)?;
    let address = message.address;
    for (address, data) in [
        (address, message.data + 1),
        (address, message.data | 0x8000_0000),
        (address + 4, message.data),
        (address ^ 0x1000, message.data),
        // What a PC's local APIC would take: vector 0x41 for CPU 0 and for all.
        (RANGE, 0x41),
        (RANGE | 0xff << 12, 0x41),
    ] {
        if (address, data) == (message.address, message.data) {
            continue;
        }
        let written = store(&scene, address, data)?;
        holds(format!("{data:#x} to {address:#x} is refused"), !written)?;
    }
    for length in [1, 2, 3, 5, 8] {
        let written = scene.fill(address, length, message.data.into())?;
        holds(format!("{length} bytes are refused"), !written)?;
    }
    let job = Job {
        command: 3,
        source: address,
        destination: 0,
        length: 4,
        vector: NO_VECTOR,
    };
    equal("a read", scene.device.run(&job)?, (6, ERROR_FAULT))?;
    for vp in 0..vm.vps() {
        equal(
            format!("interrupts of VP {vp}"),
            arrived(&scene, vp)?,
            vec![],
        )?;
    }
    equal("RAM", vm.read(page, PAGE as usize)?, vec![0; PAGE as usize])?;
    // The message is still one.
    holds("it is taken", store(&scene, address, message.data)?)?;
    vm.expect_interrupt(1, 0x41)?;
    scene.device.bus().delete(scene.device.slot(), message)?;
    let written = store(&scene, address, message.data)?;
    holds("not once it was deleted", !written)?;
    equal("interrupts of VP 1", vm.take_interrupts(1)?, vec![])
}
