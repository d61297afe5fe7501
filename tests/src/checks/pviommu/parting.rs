//! What ends domains and attachments, and what does not: D0, close, kexec, reset, removal.
#![forbid(unsafe_code)]

use vm_vpci::pviommu::IommuMode;

use super::{IOVA, Mapped, Scene, setup};
use crate::check::{Check, Context, Failure, Verdict, equal, is_ud};
use crate::host::{BusSetup, FunctionSetup, Setup};
use crate::model::kernel::{Kernel, msr};
use crate::model::pviommu::{PvIommu, configure};
use crate::model::vm::Vm;
use crate::model::vmbus::VmBus;
use crate::model::vpci::{Bus, VERSIONS};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "pviommu.d0.attachment-survives",
        "A bus that leaves D0, is closed and comes back finds its devices in their domains.",
        &["IO-7-04", "IO-4-21"],
        attachment_survives,
    ),
    Check::new(
        "pviommu.d0.moved-meanwhile",
        "A device can be moved while its bus is closed, and obeys when it comes back.",
        &["IO-4-21", "IO-7-04"],
        moved_meanwhile,
    ),
    Check::new(
        "pviommu.d0.unload-keeps",
        "UNLOAD and a new contact without a kexec keep domains and attachments.",
        &["IO-7-04", "IO-4-21"],
        unload_keeps,
    ),
    Check::new(
        "pviommu.kexec.clean",
        "After an orderly kexec there are no domains, and devices are in the default domain.",
        &["IO-7-03", "IO-7-01"],
        clean_kexec,
    ),
    Check::new(
        "pviommu.kexec.crash",
        "When GUEST_OS_ID is cleared all domains are deleted, and devices blocked until D0.",
        &["IO-7-03"],
        crash,
    ),
    Check::new(
        "pviommu.kexec.default-domain",
        "Devices in the default domain are blocked until D0 as well.",
        &["IO-7-03"],
        default_domain,
    ),
    Check::new(
        "pviommu.kexec.attached-before-d0",
        "What the next kernel attaches before D0 stays blocked, and is obeyed from D0 on.",
        &["IO-7-03"],
        attached_before_d0,
    ),
    Check::new(
        "pviommu.kexec.calls-gone",
        "With GUEST_OS_ID cleared there is no way to make a call.",
        &["IO-7-03"],
        calls_gone,
    ),
    Check::new(
        "pviommu.kexec.other-write",
        "A GUEST_OS_ID other than 0 changes nothing.",
        &["IO-7-03"],
        other_write,
    ),
    Check::new(
        "pviommu.reset.nothing-left",
        "After a reset there are no domains, and devices are in the default domain.",
        &["IO-7-03", "IO-7-01"],
        reset,
    ),
    Check::new(
        "pviommu.reset.blocked-until-attached",
        "A device that was plugged in as blocked until attached is so again after a reset.",
        &["IO-7-03", "IO-7-01"],
        reset_blocked,
    ),
    Check::new(
        "pviommu.reset.after-crash",
        "A reset ends the block of a kexec.",
        &["IO-7-03"],
        reset_after_crash,
    ),
];

/// The device of `scene` on its bus, opened anew.
fn reopened(scene: &Scene) -> Result<Scene, Failure> {
    let bus = scene.device.bus();
    let bus = Bus::probe(bus.vmbus(), &bus.channel().offer, VERSIONS[0])?;
    Scene::on(&bus, 0)
}

fn attachment_survives(context: &Context) -> Verdict {
    let mut mapped = Mapped::new(context)?;
    for round in 0..4 {
        let bus = mapped.scene.device.bus();
        match round % 2 {
            0 => bus.unbind()?,
            _ => bus.channel().close()?,
        }
        mapped.scene.exists(1, true)?;
        mapped.scene.is_in(1)?;
        mapped.scene = reopened(&mapped.scene)?;
        mapped.is_intact()?;
    }
    Ok(())
}

fn moved_meanwhile(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let scene = &mapped.scene;
    let other = scene.domain(2, 4)?;
    let page = scene.vm().pages(1)?;
    other.map(IOVA, page)?;
    scene.device.bus().unbind()?;
    equal("ATTACH", scene.iommu.attach(2, scene.id)?, 0)?;
    equal("DELETE", scene.iommu.delete(1)?, 0)?;
    let scene = reopened(scene)?;
    scene.is_in(2)?;
    scene.reaches(IOVA, page)?;
    scene.device.bus().unbind()?;
    equal("DETACH", scene.iommu.detach(scene.id)?, 0)?;
    reopened(&scene)?.is_default()
}

fn unload_keeps(context: &Context) -> Verdict {
    let mut mapped = Mapped::new(context)?;
    let vmbus = mapped.scene.device.bus().vmbus().clone();
    vmbus.unload()?;
    mapped.scene.is_in(1)?;
    let vmbus = VmBus::connect(vmbus.kernel())?;
    let bus = Bus::probe(&vmbus, &vmbus.only_offer()?, VERSIONS[0])?;
    mapped.scene = Scene::on(&bus, 0)?;
    mapped.is_intact()
}

/// Nothing of the former kernel's domains is there.
fn starts_anew(scene: &Scene) -> Verdict {
    scene.exists(1, false)?;
    scene.exists(2, false)?;
    scene.is_default()?;
    scene.faults(IOVA)?;
    equal("property", scene.iommu.is_behind(scene.id)?, Ok(1))
}

fn clean_kexec(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let scene = &mapped.scene;
    scene.domain(2, 4)?;
    scene.device.bus().vmbus().unload()?;
    scene.iommu.kernel().shut_down()?;
    let next = Scene::boot(scene.vm())?;
    starts_anew(&next)?;
    Mapped::of(next).map(drop)
}

/// A kernel in place of one that crashed, which has not made contact yet.
fn next_kernel(vm: &Vm) -> Result<Kernel, Failure> {
    vm.wrmsr(0, msr::GUEST_OS_ID, 0)?;
    Kernel::boot(vm)
}

/// The device after the next kernel has brought its bus to D0.
fn probed(kernel: &Kernel) -> Result<Scene, Failure> {
    let vmbus = VmBus::connect(kernel)?;
    let bus = Bus::probe(&vmbus, &vmbus.only_offer()?, VERSIONS[0])?;
    Scene::on(&bus, 0)
}

fn crash(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let old = &mapped.scene;
    old.domain(2, 4)?;
    old.vm().wrmsr(0, msr::GUEST_OS_ID, 0)?;
    // The old kernel's driver has not stopped the device.
    old.faults(IOVA)?;
    old.faults(mapped.page)?;
    let kernel = Kernel::boot(old.vm())?;
    old.faults(IOVA)?;
    old.faults(mapped.page)?;
    let iommu = PvIommu::new(&kernel);
    for number in [1, 2] {
        equal("status of FLUSH", iommu.flush(number)?, 5)?;
    }
    let next = probed(&kernel)?;
    starts_anew(&next)?;
    Mapped::of(next).map(drop)
}

fn default_domain(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    scene.is_default()?;
    let kernel = next_kernel(scene.vm())?;
    scene.faults(scene.vm().pages(1)?)?;
    // Neither a call nor a detach lifts it.
    let iommu = PvIommu::new(&kernel);
    equal("status of DETACH", iommu.detach(scene.id)?, 0)?;
    scene.faults(scene.vm().pages(1)?)?;
    probed(&kernel)?.is_default()
}

fn attached_before_d0(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let old = &mapped.scene;
    let kernel = next_kernel(old.vm())?;
    // The old device with the new kernel's calls.
    let held = Scene {
        iommu: PvIommu::new(&kernel),
        ..old.clone()
    };
    let tables = held.paged(7, 4)?;
    let page = held.vm().pages(1)?;
    tables.map(IOVA, page)?;
    held.faults(IOVA)?;
    held.is_in(7)?;
    equal("identity", held.iommu.configure(7, 0, 0)?, 0)?;
    held.faults(page)?;
    let blocked = configure::ENABLED | configure::BLOCKED;
    equal("blocked", held.iommu.configure(7, blocked, 0)?, 0)?;
    held.faults(page)?;
    equal("paging", held.iommu.translate(7, &tables)?, 0)?;
    equal("status of FLUSH", held.iommu.flush(7)?, 0)?;
    held.faults(IOVA)?;
    let next = probed(&kernel)?;
    next.is_in(7)?;
    next.reaches(IOVA, page)?;
    next.faults(page)
}

fn calls_gone(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let scene = &mapped.scene;
    let kernel = scene.iommu.kernel();
    scene.vm().wrmsr(0, msr::GUEST_OS_ID, 0)?;
    for (code, _) in crate::model::pviommu::code::ALL {
        let call = kernel.call(0, code, kernel.input(0), kernel.output(0));
        is_ud(format!("call {code:#x}"), call)?;
    }
    Ok(())
}

fn other_write(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let vm = mapped.scene.vm();
    let id = vm.rdmsr(0, msr::GUEST_OS_ID)?;
    for value in [id, id + 1, 1, u64::MAX, id] {
        vm.wrmsr(0, msr::GUEST_OS_ID, value)?;
        mapped.is_intact()?;
    }
    Ok(())
}

fn reset(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let vm = mapped.scene.vm();
    mapped.scene.domain(2, 4)?;
    for _ in 0..3 {
        vm.reset()?;
        let scene = Scene::boot(vm)?;
        starts_anew(&scene)?;
        Mapped::of(scene)?;
    }
    Ok(())
}

fn reset_blocked(context: &Context) -> Verdict {
    let waiting = FunctionSetup::testdev(0).with_iommu(IommuMode::BlockedUntilAttached);
    let vm = context.machine(&Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: vec![waiting],
        }],
        ..setup()
    })?;
    for _ in 0..3 {
        let scene = Scene::boot(&vm)?;
        scene.faults(vm.pages(1)?)?;
        Mapped::of(scene)?;
        vm.reset()?;
    }
    // The same for a kexec, once the bus is in D0.
    let scene = Scene::boot(&vm)?;
    let mapped = Mapped::of(scene)?;
    let next = probed(&next_kernel(&vm)?)?;
    next.faults(mapped.page)?;
    Mapped::of(next).map(drop)
}

fn reset_after_crash(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let vm = mapped.scene.vm();
    vm.wrmsr(0, msr::GUEST_OS_ID, 0)?;
    mapped.scene.faults(mapped.page)?;
    vm.reset()?;
    starts_anew(&Scene::boot(vm)?)
}
