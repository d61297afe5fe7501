//! From boot to data and interrupts, and back: what a guest is there for, at every version.
#![forbid(unsafe_code)]

use crate::check::{Check, Context, Failure, Verdict, equal, is_ud};
use crate::host::BusSetup;
use crate::model::kernel::{Kernel, VMBUS_VECTOR, status};
use crate::model::testdev::TestDev;
use crate::model::vm::Vm;
use crate::model::vmbus::{self, VmBus};
use crate::model::vpci::{self, Bus};

const WHOLE: &[Check] = &[
    Check::new(
        "journey.every-vmbus-version",
        "A guest gets from boot to DMA and an interrupt with every VMBus version.",
        &["VB-2-01", "VB-2-03", "VB-2.2-10", "VP-3.1-14"],
        every_vmbus_version,
    ),
    Check::new(
        "journey.every-vpci-version",
        "A guest gets from boot to DMA and an interrupt with every vPCI version.",
        &["VP-2-02", "VP-2-03", "VP-2-04", "VP-2-05", "VP-2-08"],
        every_vpci_version,
    ),
    Check::new(
        "journey.unbind-and-bind",
        "A bus that was let go does nothing any more, and can be taken again.",
        &["VP-8-03", "VP-5-06", "VB-5-10"],
        unbind_and_bind,
    ),
    Check::new(
        "journey.kexec",
        "A kernel that only unloads leaves nothing behind for the next one.",
        &["HV-10-01", "VP-9-03", "VB-2.4-01", "VB-2.4-02"],
        kexec,
    ),
    Check::new(
        "journey.surprise-removal",
        "A bus that is taken away is silent, rescinded, and back once the guest has let it go.",
        &["VP-8-02", "VP-8-06", "VP-7.2-18", "VB-3.2-01", "VB-3.1-21"],
        surprise_removal,
    ),
    Check::new(
        "journey.hot-add",
        "A bus that is plugged in while the guest runs is offered by itself, and works.",
        &["VB-2.3-03", "VP-1-03"],
        hot_add,
    ),
    Check::new(
        "journey.reset",
        "After a reset of the machine a guest starts from nothing and gets as far as before.",
        &["HV-10-04", "HV-10-09", "VB-10-03"],
        reset,
    ),
];

/// All checks of this area.
pub const CHECKS: [&[Check]; 1] = [WHOLE];

/// Boots and brings the device up, at these versions.
fn bring_up(vm: &Vm, vmbus: u32, protocol: u32) -> Result<TestDev, Failure> {
    let kernel = Kernel::boot(vm)?;
    let vmbus = VmBus::connect_at(&kernel, vmbus)?;
    let bus = Bus::probe(&vmbus, &vmbus.only_offer()?, protocol)?;
    TestDev::start(&bus, 0)
}

/// DMA, with an interrupt on VP 1.
fn job(device: &TestDev) -> Verdict {
    let vm = device.vm();
    let pages = vm.pages(2)?;
    let data: Vec<u8> = (0..4096u32).map(|byte| (byte * 7) as u8).collect();
    vm.write(pages, &data)?;
    device.interrupt(0, 0x41, 1)?;
    vm.take_interrupts(1)?;
    device.copy(pages, pages + 4096, 4096, 0)?;
    equal(
        "bytes that the device copied",
        vm.read(pages + 4096, 4096)?,
        data,
    )?;
    vm.expect_interrupt(1, 0x41)?;
    equal("further interrupts of VP 1", vm.take_interrupts(1)?, vec![])
}

fn every_vmbus_version(context: &Context) -> Verdict {
    for version in vmbus::VERSIONS {
        let course = format!("VMBus version {version:#x}");
        let device = bring_up(&context.usual()?, version, vpci::VERSIONS[0]);
        let done = device.and_then(|device| job(&device));
        done.map_err(|failure| failure.during(course))?;
    }
    Ok(())
}

fn every_vpci_version(context: &Context) -> Verdict {
    for version in vpci::VERSIONS {
        let course = format!("vPCI version {version:#x}");
        let device = bring_up(&context.usual()?, vmbus::VERSIONS[0], version);
        let done = device.and_then(|device| job(&device));
        done.map_err(|failure| failure.during(course))?;
    }
    Ok(())
}

fn unbind_and_bind(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    job(&device)?;
    let bus = device.bus();
    bus.unbind()?;
    equal("a load from the BAR", device.load(0, 4)?, 0xffff_ffff)?;
    equal("the vendor id", bus.config(0, 0, 2)?, 0xffff)?;
    let bus = Bus::probe(bus.vmbus(), &bus.channel().offer, vpci::VERSIONS[0])?;
    job(&TestDev::start(&bus, 0)?)
}

fn kexec(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let device = TestDev::bring_up(&vm)?;
    job(&device)?;
    let bus = device.bus();
    bus.vmbus().unload()?;
    equal("a load from the BAR", device.load(0, 4)?, 0xffff_ffff)?;
    bus.kernel().shut_down()?;
    is_ud(
        "a hypercall of the old kernel",
        bus.kernel().call(0, 0x5c, 0, 0),
    )?;
    job(&TestDev::bring_up(&vm)?)
}

fn surprise_removal(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let device = TestDev::bring_up(&vm)?;
    let interrupt = device.interrupt(1, 0x51, 0)?;
    job(&device)?;
    let (bus, instance) = (device.bus(), device.bus().channel().offer.instance);
    vm.remove(instance)?;
    equal("a load from the BAR", device.load(0, 4)?, 0xffff_ffff)?;
    equal("the vendor id", bus.config(0, 0, 2)?, 0xffff)?;
    device.raise(1)?;
    let retarget = bus.retarget(device.slot(), interrupt.message, 0x52, 1);
    let refused = bus.kernel().retarget(0, &retarget)?;
    equal("status of a retarget", refused, status::INVALID_DEVICE_ID)?;
    let relid = bus.channel().offer.relid;
    equal(
        "channel that is rescinded",
        bus.vmbus().expect_rescind()?,
        relid,
    )?;
    for vp in 0..vm.vps() {
        let mut vectors = vm.take_interrupts(vp)?;
        vectors.retain(|vector| *vector != VMBUS_VECTOR);
        equal(format!("device interrupts of VP {vp}"), vectors, vec![])?;
    }
    // Linux closes, does not tear the ring's GPADL down, and releases the channel.
    bus.vmbus().send_close(relid)?;
    bus.vmbus().expect_silence()?;
    bus.vmbus().release(relid)?;
    bus.vmbus().expect_silence()?;
    vm.plug(&BusSetup::testdev(1))?;
    let offer = bus.vmbus().expect_offer()?;
    equal("instance that is offered", offer.instance, instance)?;
    let bus = Bus::probe(bus.vmbus(), &offer, vpci::VERSIONS[0])?;
    job(&TestDev::start(&bus, 0)?)
}

fn hot_add(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let first = TestDev::bring_up(&vm)?;
    let added = BusSetup::testdev(2);
    vm.plug(&added)?;
    let vmbus = first.bus().vmbus();
    let offer = vmbus.expect_offer()?;
    equal("instance that is offered", offer.instance, added.instance)?;
    let bus = Bus::probe(vmbus, &offer, vpci::VERSIONS[0])?;
    job(&TestDev::start(&bus, 0)?)?;
    job(&first)
}

fn reset(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let device = TestDev::bring_up(&vm)?;
    job(&device)?;
    vm.reset()?;
    equal("a load from the BAR", device.load(0, 4)?, 0xffff_ffff)?;
    job(&TestDev::bring_up(&vm)?)
}
