//! Logical device ids: which function each call means, and for how long.
#![forbid(unsafe_code)]

use std::thread;

use uuid::Uuid;
use vm_vpci::pviommu::IommuMode;

use super::{IOVA, Mapped, Scene, behind, setup};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::devices::Plain;
use crate::host::{BusSetup, FunctionSetup, Setup};
use crate::model::kernel::{Kernel, status};
use crate::model::pviommu::PvIommu;
use crate::model::testdev::TestDev;
use crate::model::vm::Vm;
use crate::model::vmbus::VmBus;
use crate::model::vpci::{Bus, VERSIONS, slot};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "pviommu.id.made-of-guid",
        "An id is data2, data3 without its low bits, and the function; no neighbour is known.",
        &["IO-1-02", "IO-1-03", "IO-1-04", "IO-4-07"],
        made_of_guid,
    ),
    Check::new(
        "pviommu.id.upper-half",
        "The upper half is 0, or all ones when bit 31 is set; anything else is no device.",
        &["IO-1-04", "IO-4-07"],
        upper_half,
    ),
    Check::new(
        "pviommu.id.retarget",
        "A retarget compares the low 32 bits, whatever the upper half.",
        &["IO-1-05"],
        retarget,
    ),
    Check::new(
        "pviommu.id.eight-functions",
        "Eight functions of a bus are eight devices, each in a domain of its own.",
        &["IO-1-01", "IO-1-04", "IO-6-02"],
        eight_functions,
    ),
    Check::new(
        "pviommu.id.same-prefix",
        "A GUID that differs only in what an id does not have makes the same ids, and is refused.",
        &["IO-1-08", "IO-1-03"],
        same_prefix,
    ),
    Check::new(
        "pviommu.id.twice",
        "A bus that would make two live functions share an id is refused, and not offered.",
        &["IO-1-08", "IO-1-07"],
        twice,
    ),
    Check::new(
        "pviommu.id.plug-to-unplug",
        "An id is valid from plug to unplug, whatever the state of the channel.",
        &["IO-4-21", "IO-4-07"],
        plug_to_unplug,
    ),
    Check::new(
        "pviommu.id.forgotten",
        "After its removal nothing of a device is known, and its domain can be deleted.",
        &["IO-1-07", "IO-4-07", "IO-4-08"],
        forgotten,
    ),
    Check::new(
        "pviommu.id.being-removed",
        "While a removal is under way no call does anything with the device any more.",
        &["IO-4-08", "IO-1-07", "IO-6-02"],
        being_removed,
    ),
    Check::new(
        "pviommu.id.reused",
        "A device of another class under the same id starts in the default state.",
        &["IO-1-07", "IO-7-01"],
        reused,
    ),
    Check::new(
        "pviommu.id.reused-not-behind",
        "A device that is not behind the pvIOMMU may follow one that was, and the other way.",
        &["IO-1-07", "IO-4-08", "IO-2-17"],
        reused_not_behind,
    ),
];

/// A GUID with this data2 and data3.
fn guid(data2: u16, data3: u16) -> Uuid {
    Uuid::from_fields(u32::from(data2) << 16 | 0x1f, data2, data3, &[0x9f; 8])
}

fn made_of_guid(context: &Context) -> Verdict {
    let cases = [
        (0x0001, 0xab78, 0x0001_ab78),
        (0x1234, 0x000f, 0x1234_0008),
        (0x7fff, 0xffff, 0x7fff_fff8),
        (0x00ff, 0x0007, 0x00ff_0000),
    ];
    let buses = cases.map(|(data2, data3, _)| BusSetup {
        instance: guid(data2, data3),
        functions: vec![behind(0), behind(5)],
    });
    let vm = context.machine(&Setup {
        buses: buses.to_vec(),
        ..setup()
    })?;
    let iommu = PvIommu::new(&Kernel::boot(&vm)?);
    for (data2, data3, prefix) in cases {
        // From the bytes of the GUID, as the rows say.
        let b = guid(data2, data3).to_bytes_le();
        let made = u64::from(b[5]) << 24
            | u64::from(b[4]) << 16
            | u64::from(b[7]) << 8
            | u64::from(b[6] & 0xf8);
        equal("prefix", made, prefix)?;
        for function in 0..8 {
            let want = match function {
                0 | 5 => Ok(1),
                _ => Err(status::INVALID_DEVICE_ID),
            };
            let id = prefix | function;
            equal(format!("property of {id:#x}"), iommu.is_behind(id)?, want)?;
        }
        for other in [3, 8, 15, 16, 31].map(|bit| prefix ^ 1 << bit) {
            let what = format!("property of {other:#x}");
            equal(
                what,
                iommu.is_behind(other)?,
                Err(status::INVALID_DEVICE_ID),
            )?;
        }
    }
    Ok(())
}

/// A bus whose id has bit 31 set.
fn negative() -> Setup {
    Setup {
        buses: vec![BusSetup {
            instance: guid(0x9234, 0xab78),
            functions: vec![behind(0)],
        }],
        ..setup()
    }
}

const EXTENDED: u64 = 0xffff_ffff << 32;

fn upper_half(context: &Context) -> Verdict {
    for (setup, also) in [(setup(), None), (negative(), Some(EXTENDED))] {
        let scene = Scene::of(context, &setup)?;
        let (iommu, id) = (&scene.iommu, scene.id);
        scene.domain(1, 4)?;
        for upper in [0].into_iter().chain(also) {
            equal("property", iommu.is_behind(upper | id)?, Ok(1))?;
            equal("status of ATTACH", iommu.attach(1, upper | id)?, 0)?;
            scene.is_in(1)?;
            equal("status of DETACH", iommu.detach(upper | id)?, 0)?;
        }
        let wrong = [
            1,
            0x8000_0000,
            0xffff_fffe,
            0x7fff_ffff,
            // Device types: PCI, IOAPIC, ACPI.
            0x4000_0000,
            0xc000_0000,
        ];
        let sign = (also.is_none()).then_some(EXTENDED);
        for upper in wrong.map(|upper| upper << 32).into_iter().chain(sign) {
            let bad = upper | id;
            let want = status::INVALID_DEVICE_ID;
            equal(
                format!("property of {bad:#x}"),
                iommu.is_behind(bad)?,
                Err(want),
            )?;
            equal(format!("ATTACH of {bad:#x}"), iommu.attach(1, bad)?, want)?;
            equal(format!("DETACH of {bad:#x}"), iommu.detach(bad)?, want)?;
        }
        scene.is_default()?;
    }
    Ok(())
}

fn retarget(context: &Context) -> Verdict {
    for setup in [setup(), negative()] {
        let scene = Scene::of(context, &setup)?;
        let device = &scene.device;
        let mut interrupt = device.interrupt(0, 0x41, 0)?;
        for (vector, upper) in (0x42..).zip([0, EXTENDED, 1 << 32, 0xdead_beef << 32]) {
            interrupt.vector = vector;
            let mut retarget = device
                .bus()
                .retarget(device.slot(), interrupt.message, vector, 1);
            retarget.device |= upper;
            scene.iommu.kernel().must_retarget(0, &retarget)?;
            device.raise(0)?;
            scene.vm().expect_interrupt(1, vector)?;
        }
    }
    Ok(())
}

fn eight_functions(context: &Context) -> Verdict {
    let vm = context.machine(&Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: (0..8).map(behind).collect(),
        }],
        ..setup()
    })?;
    let bus = Bus::bring_up(&vm)?;
    let mut scenes = Vec::new();
    for function in 0..8 {
        let scene = Scene::on(&bus, function)?;
        let tables = scene.paged(u32::from(function) + 1, 4)?;
        let page = vm.pages(1)?;
        tables.map(IOVA, page)?;
        scenes.push((scene, tables, page));
    }
    for (scene, _, page) in &scenes {
        scene.reaches(IOVA, *page)?;
    }
    // What happens to one is nothing to the others.
    equal("DETACH", scenes[3].0.iommu.detach(scenes[3].0.id)?, 0)?;
    scenes[4].1.unmap(IOVA)?;
    scenes[4].0.iommu.flush_range(5, IOVA, 0)?;
    for (index, (scene, _, page)) in scenes.iter().enumerate() {
        match index {
            3 => scene.is_default()?,
            4 => scene.faults(IOVA)?,
            _ => scene.reaches(IOVA, *page)?,
        }
    }
    Ok(())
}

/// Two buses with the same prefix.
fn twins(first: Vec<FunctionSetup>, second: Vec<FunctionSetup>) -> [BusSetup; 2] {
    let instance = |first| Uuid::from_fields(first, 0x21, 0x4568, &[7; 8]);
    [(1, first), (2, second)].map(|(number, functions)| BusSetup {
        instance: instance(number),
        functions,
    })
}

fn same_prefix(context: &Context) -> Verdict {
    let vm = context.machine(&setup())?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    equal("number of offers", vmbus.offers()?.len(), 1)?;
    let instance = BusSetup::instance(1);
    let (data1, data2, data3, data4) = instance.as_fields();
    let like = |data1, data3, data4: &[u8; 8]| Uuid::from_fields(data1, data2, data3, data4);
    // Only data2 and data3 without its low bits are in an id.
    for instance in [
        like(data1 ^ 0xffff_ffff, data3, data4),
        like(data1, data3 | 7, data4),
        like(data1, data3, &[0x55; 8]),
    ] {
        let same = BusSetup {
            instance,
            functions: vec![behind(0)],
        };
        let refused = vm.plug(&same).is_err();
        holds(format!("a bus {instance} is refused"), refused)?;
    }
    vmbus.expect_silence()?;
    let other = BusSetup {
        instance: like(data1, data3 ^ 8, data4),
        functions: vec![behind(0)],
    };
    vm.plug(&other)?;
    let offer = vmbus.expect_offer()?;
    equal("instance that is offered", offer.instance, other.instance)
}

fn twice(context: &Context) -> Verdict {
    let [first, second] = twins(
        vec![behind(0), behind(2)],
        vec![behind(0), behind(1), behind(2)],
    );
    let vm = context.machine(&Setup {
        buses: vec![first],
        ..setup()
    })?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    equal("number of offers", vmbus.offers()?.len(), 1)?;
    let refused = vm.plug(&second);
    holds("the second bus is refused", refused.is_err())?;
    vmbus.expect_silence()?;
    // Nothing of it stayed.
    let iommu = PvIommu::new(vmbus.kernel());
    for function in 0..4 {
        let want = match function {
            0 | 2 => Ok(1),
            _ => Err(status::INVALID_DEVICE_ID),
        };
        let got = iommu.is_behind(0x0021_4568 | function)?;
        equal(format!("property of function {function}"), got, want)?;
    }
    Ok(())
}

fn plug_to_unplug(context: &Context) -> Verdict {
    let vm = context.machine(&setup())?;
    let kernel = Kernel::boot(&vm)?;
    let iommu = PvIommu::new(&kernel);
    let id = 0x0001_ab78;
    // Before there is even a VMBus.
    equal("property", iommu.is_behind(id)?, Ok(1))?;
    equal("status of CREATE", iommu.create(1)?, 0)?;
    equal("status of ATTACH", iommu.attach(1, id)?, 0)?;
    let vmbus = VmBus::connect(&kernel)?;
    let offer = vmbus.only_offer()?;
    let bus = Bus::probe(&vmbus, &offer, VERSIONS[0])?;
    let scene = Scene::on(&bus, 0)?;
    equal("id", scene.id, id)?;
    scene.is_in(1)?;
    bus.unbind()?;
    equal("property after the close", iommu.is_behind(id)?, Ok(1))?;
    scene.is_in(1)?;
    equal("status of DETACH", iommu.detach(id)?, 0)?;
    vm.remove(offer.instance)?;
    let gone = status::INVALID_DEVICE_ID;
    equal(
        "property after the removal",
        iommu.is_behind(id)?,
        Err(gone),
    )?;
    equal("ATTACH after the removal", iommu.attach(1, id)?, gone)?;
    equal("DETACH after the removal", iommu.detach(id)?, gone)
}

/// Takes the device's bus away and lets the channel go.
fn take_away(scene: &Scene) -> Verdict {
    let bus = scene.device.bus();
    let offer = &bus.channel().offer;
    scene.vm().remove(offer.instance)?;
    let rescinded = bus.vmbus().expect_rescind()?;
    equal("channel that is rescinded", rescinded, offer.relid)?;
    bus.vmbus().send_close(offer.relid)?;
    bus.vmbus().release(offer.relid)?;
    scene.vm().settle();
    Ok(())
}

/// Plugs a bus in and brings it to D0.
fn plug(scene: &Scene, bus: &BusSetup) -> Result<Bus, Failure> {
    scene.vm().plug(bus)?;
    let vmbus = scene.device.bus().vmbus();
    Bus::probe(vmbus, &vmbus.expect_offer()?, VERSIONS[0])
}

fn forgotten(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let scene = &mapped.scene;
    let iommu = &scene.iommu;
    equal("DELETE", iommu.delete(1)?, status::OBJECT_IN_USE)?;
    scene.vm().remove(BusSetup::instance(1))?;
    let gone = status::INVALID_DEVICE_ID;
    equal("property", iommu.is_behind(scene.id)?, Err(gone))?;
    equal("status of ATTACH", iommu.attach(1, scene.id)?, gone)?;
    equal("status of DETACH", iommu.detach(scene.id)?, gone)?;
    scene.exists(1, true)?;
    equal("status of DELETE", iommu.delete(1)?, 0)?;
    scene.exists(1, false)
}

fn being_removed(context: &Context) -> Verdict {
    let plain = Plain::wide();
    let vm = context.machine(&Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: vec![plain.function(0).with_iommu(IommuMode::On)],
        }],
        ..setup()
    })?;
    let bus = Bus::bring_up(&vm)?;
    bus.set_config(slot(0), 4, 2, 6)?;
    let (iommu, id) = (PvIommu::new(bus.kernel()), bus.logical_id(slot(0)));
    for number in [1, 2] {
        equal("status of CREATE", iommu.create(number)?, 0)?;
        equal("identity", iommu.configure(number, 0, 0)?, 0)?;
    }
    equal("status of ATTACH", iommu.attach(1, id)?, 0)?;
    let page = vm.pages(1)?;
    holds("the device has DMA", plain.write(page, &[7; 8]))?;
    plain.hold_resets();
    let asked = thread::scope(|scope| {
        let remover = scope.spawn(|| vm.remove(BusSetup::instance(1)));
        let held = plain.is_held();
        // Nothing here may leave before the reset goes on.
        let asked = held.then(|| -> Result<_, Failure> {
            let statuses = [
                iommu.attach(2, id)?,
                iommu.detach(id)?,
                iommu.attach(1, id)?,
            ];
            Ok((statuses, plain.write(page, &[9; 8]), iommu.delete(1)?))
        });
        plain.let_go();
        let panicked = |_| Failure::Host("a thread panicked".into());
        remover.join().map_err(panicked)??;
        asked.transpose()
    })?;
    let Some((statuses, wrote, deleted)) = asked else {
        return holds("the removal resets the device", false);
    };
    let known = [status::INVALID_DEVICE_ID, status::INVALID_DEVICE_STATE];
    holds(
        format!("statuses of ATTACH and DETACH {statuses:x?} are of {known:x?}"),
        statuses.iter().all(|status| known.contains(status)),
    )?;
    holds("the device has no DMA", !wrote)?;
    equal("DELETE of the domain that it was in", deleted, 0)?;
    equal("RAM", vm.read(page, 8)?, vec![7; 8])
}

fn reused(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let (scene, vm) = (&mapped.scene, mapped.scene.vm());
    take_away(scene)?;
    let plain = Plain::wide();
    let other = BusSetup {
        instance: BusSetup::instance(1),
        functions: vec![plain.function(0).with_iommu(IommuMode::On)],
    };
    let bus = plug(scene, &other)?;
    equal("id", bus.logical_id(slot(0)), scene.id)?;
    bus.set_config(slot(0), 4, 2, 6)?;
    equal("property", scene.iommu.is_behind(scene.id)?, Ok(1))?;
    let page = vm.pages(1)?;
    holds("its DMA is not translated", plain.write(page, &[7; 8]))?;
    equal("RAM", vm.read(page, 8)?, vec![7; 8])?;
    holds(
        "the old mapping is nothing to it",
        !plain.write(IOVA, &[7; 8]),
    )?;
    // It is not in the domain of its predecessor, but can be.
    equal("status of ATTACH", scene.iommu.attach(1, scene.id)?, 0)?;
    holds("its DMA is translated now", plain.write(IOVA, &[9; 8]))?;
    equal("RAM", vm.read(mapped.page, 8)?, vec![9; 8])
}

/// Brings the device of a bus to work, without the pvIOMMU's help.
fn works(vm: &Vm, bus: &Bus) -> Verdict {
    let page = vm.pages(1)?;
    TestDev::start(bus, 0)?.copy(page, page + 8, 8, u32::MAX)
}

fn reused_not_behind(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let (scene, vm, iommu) = (&mapped.scene, mapped.scene.vm(), &mapped.scene.iommu);
    take_away(scene)?;
    let bus = plug(scene, &BusSetup::testdev(1))?;
    works(vm, &bus)?;
    equal("property", iommu.is_behind(scene.id)?, Ok(0))?;
    let refused = status::INVALID_DEVICE_STATE;
    equal("status of ATTACH", iommu.attach(1, scene.id)?, refused)?;
    equal("status of DETACH", iommu.detach(scene.id)?, refused)?;
    works(vm, &bus)?;
    let off = Scene::on(&bus, 0)?;
    take_away(&off)?;
    let bus = plug(scene, &super::bus(1))?;
    works(vm, &bus)?;
    let again = Scene::on(&bus, 0)?;
    equal("property", iommu.is_behind(again.id)?, Ok(1))?;
    equal("status of ATTACH", iommu.attach(1, again.id)?, 0)?;
    again.reaches(IOVA, mapped.page)
}
