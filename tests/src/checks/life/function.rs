//! One function of a bus leaves, and the others stay (docs/spec/vpci.md, sections 5 and 8).
#![forbid(unsafe_code)]

use std::thread;

use super::ejection::{complete, ejected, is_told, let_go, machine};
use super::{Scene, TARGET, function_1_is_cut_off};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::model::kernel::{Kernel, VMBUS_VECTOR, status};
use crate::model::ring::IN_BAND;
use crate::model::testdev::{MAGIC, TestDev};
use crate::model::vm::{GLANCE, Told};
use crate::model::vmbus::VmBus;
use crate::model::vpci::{Bus, VERSIONS, message, nt, slot};
use crate::model::wire::Bytes;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "life.eject-function.orderly",
        "A guest that is asked for one function lets go of it; new relations are without it.",
        &["VP-8-01", "VP-8-07", "VP-5-02", "VP-3.2-01"],
        orderly,
    ),
    Check::new(
        "life.eject-function.never-answered",
        "Without an answer the function works on, until it is taken away; the others do so ever after.",
        &["VP-8-05", "VP-8-07", "VP-11-14", "VP-11-17"],
        never_answered,
    ),
    Check::new(
        "life.eject-function.wrong-answers",
        "An EJECTION_COMPLETE of another function is no answer, and a second one none either.",
        &["VP-11-14", "VP-8-04", "VP-8-07"],
        wrong_answers,
    ),
    Check::new(
        "life.eject-function.refused",
        "Function 0, one that there is not, or a second at a time: the guest is not asked.",
        &["VP-8-07"],
        refused,
    ),
    Check::new(
        "life.eject-function.torn-out",
        "A function that is taken away unasked is silent before the guest is told of it.",
        &["VP-8-02", "VP-8-06", "VP-8-07", "VP-11-17"],
        torn_out,
    ),
    Check::new(
        "life.eject-function.anew",
        "A guest that opens the bus anew finds those that are left, and these work.",
        &["VP-5-01", "VP-5-04", "VP-8-07"],
        anew,
    ),
];

/// The host asks for a function; the guest finds one EJECT for it and nothing else.
fn asked(bus: &Bus, function: u8) -> Result<Told, Failure> {
    let instance = bus.channel().offer.instance;
    let told = bus.vm().eject_function(instance, function)?;
    let packets = bus.channel().receive()?;
    let slots = packets.iter().map(ejected).collect::<Result<Vec<_>, _>>()?;
    equal("slots of the EJECTs", slots, vec![slot(function)])?;
    is_told(&told, 0)?;
    Ok(told)
}

/// The host takes a function away; the guest is told of those that are left.
fn taken(bus: &Bus, function: u8, left: &[u8]) -> Verdict {
    let instance = bus.channel().offer.instance;
    bus.vm().remove_function(instance, function)?;
    let packets = bus.channel().receive()?;
    equal("packets for it", packets.len(), 1)?;
    equal("type of the packet", packets[0].kind, IN_BAND)?;
    equal("flags of the packet", packets[0].flags, 0)?;
    equal("transaction id of the packet", packets[0].id, 0)?;
    let relations = bus.decode_relations(&packets[0].payload)?;
    are(
        &relations.iter().map(|it| it.slot).collect::<Vec<_>>(),
        left,
    )
}

fn are(slots: &[u32], functions: &[u8]) -> Verdict {
    let wanted: Vec<u32> = functions.iter().map(|number| slot(*number)).collect();
    equal("slots of the bus", slots.to_vec(), wanted)
}

/// No request and no call finds the function.
fn is_unknown(bus: &Bus, function: u8) -> Verdict {
    let slot = slot(function);
    equal("the vendor id", bus.config(slot, 0, 2)?, 0xffff)?;
    bus.set_config(slot, 4, 2, 6)?;
    equal("the command register", bus.config(slot, 4, 2)?, 0xffff)?;
    for number in [
        message::QUERY_RESOURCE_REQUIREMENTS,
        message::RESOURCES_RELEASED,
        message::EJECTION_COMPLETE,
    ] {
        let reply = bus.request(&Bytes::words(&[number, slot, 0]).0)?;
        equal(format!("status of {number:#x}"), reply.status, nt::BAD_DATA)?;
        equal("other packets", reply.unsolicited.len(), 0)?;
    }
    Ok(())
}

fn orderly(context: &Context) -> Verdict {
    for version in VERSIONS {
        let vm = machine(context, [0, 1, 5])?;
        let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
        let bus = Bus::probe(&vmbus, &vmbus.only_offer()?, version)?;
        let devices = [0, 1, 5].map(|function| TestDev::start(&bus, function));
        let [first, second, third] = devices;
        let (first, second, third) = (first?, second?, third?);
        first.interrupt(0, 0x41, 0)?;
        let leaving = second.interrupt(0, 0x42, 0)?;
        third.interrupt(0, 0x43, 1)?;
        let retarget = bus.retarget(slot(1), leaving.message, 0x44, 1);
        let told = asked(&bus, 1)?;
        // Asked is not stopped.
        equal("MAGIC of function 1", second.load(0, 4)?, MAGIC)?;
        second.set_command(0)?;
        bus.delete(slot(1), leaving.message)?;
        let_go(&bus, 1)?;
        is_told(&told, 1)?;
        taken(&bus, 1, &[0, 5])?;
        is_told(&told, 1)?;
        is_unknown(&bus, 1)?;
        let got = bus.kernel().retarget(0, &retarget)?;
        let what = "status of HvRetargetDeviceInterrupt";
        equal(what, got, status::INVALID_DEVICE_ID)?;
        // The others have not noticed.
        for (device, vector, vp) in [(&first, 0x41, 0), (&third, 0x43, 1)] {
            equal("MAGIC", device.load(0, 4)?, MAGIC)?;
            device.raise(0)?;
            vm.expect_interrupt(vp, vector)?;
        }
        let relations = bus.relations()?;
        are(
            &relations.iter().map(|it| it.slot).collect::<Vec<_>>(),
            &[0, 5],
        )?;
        bus.vmbus().expect_silence()?;
        // The next one.
        let told = asked(&bus, 5)?;
        let_go(&bus, 5)?;
        is_told(&told, 1)?;
        taken(&bus, 5, &[0])?;
        equal("MAGIC of function 0", first.load(0, 4)?, MAGIC)?;
    }
    Ok(())
}

/// Nothing comes from function 1 any more, and function 0 goes on.
fn only_0_is_alive(scene: &Scene) -> Verdict {
    let vm = scene.vm();
    function_1_is_cut_off(scene)?;
    equal("BAR of function 1", vm.load(0, scene.bar, 4)?, 0xffff_ffff)?;
    thread::sleep(GLANCE);
    for vp in 0..vm.vps() {
        let mut vectors = vm.take_interrupts(vp)?;
        vectors.retain(|vector| *vector != VMBUS_VECTOR);
        equal(format!("interrupts of VP {vp}"), vectors, vec![])?;
    }
    equal("MAGIC of function 0", scene.device.load(0, 4)?, MAGIC)?;
    scene.device.raise(0)?;
    vm.expect_interrupt(1, 0x41)
}

fn never_answered(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let bus = &scene.bus;
    let told = asked(bus, 1)?;
    for _ in 0..3 {
        scene.is_alive()?;
        bus.requirements(slot(1))?;
        is_told(&told, 0)?;
    }
    let resets = scene.plain.resets();
    // Its time is over.
    taken(bus, 1, &[0])?;
    is_told(&told, 1)?;
    equal("resets of function 1", scene.plain.resets(), resets + 1)?;
    only_0_is_alive(&scene)?;
    // Too late.
    is_unknown(bus, 1)?;
    is_told(&told, 1)?;
    only_0_is_alive(&scene)
}

fn wrong_answers(context: &Context) -> Verdict {
    let bus = Bus::bring_up(&machine(context, [0, 1, 2])?)?;
    let device = TestDev::start(&bus, 1)?;
    let told = asked(&bus, 1)?;
    for wrong in [slot(3), slot(1) | 0x1f, 1, 0x100, u32::MAX] {
        let status = bus.request(&complete(wrong))?.status;
        equal(format!("status for slot {wrong:#x}"), status, nt::BAD_DATA)?;
    }
    for other in [0, 2, 2] {
        let_go(&bus, other)?;
    }
    is_told(&told, 0)?;
    equal("MAGIC of function 1", device.load(0, 4)?, MAGIC)?;
    let_go(&bus, 1)?;
    let_go(&bus, 1)?;
    is_told(&told, 1)?;
    taken(&bus, 1, &[0, 2])?;
    is_unknown(&bus, 1)?;
    is_told(&told, 1)?;
    // What was said of function 2 before is no answer for it now.
    let told = asked(&bus, 2)?;
    is_unknown(&bus, 1)?;
    is_told(&told, 0)?;
    let_go(&bus, 2)?;
    is_told(&told, 1)
}

fn refused(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (bus, vm) = (&scene.bus, scene.vm());
    let instance = bus.channel().offer.instance;
    for function in [0, 2, 7, 8, 0xff] {
        let question = vm.eject_function(instance, function);
        let what = format!("the host is refused function {function}");
        holds(what, matches!(question, Err(Failure::Host(_))))?;
        holds(
            "nor takes it away",
            vm.remove_function(instance, function).is_err(),
        )?;
        equal("packets", bus.channel().receive()?.len(), 0)?;
        scene.is_alive()?;
    }
    let told = asked(bus, 1)?;
    holds("one at a time", vm.eject_function(instance, 1).is_err())?;
    holds("nor the bus", vm.eject(instance).is_err())?;
    equal("packets", bus.channel().receive()?.len(), 0)?;
    let_go(bus, 1)?;
    is_told(&told, 1)
}

fn torn_out(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (bus, vm) = (&scene.bus, scene.vm());
    let resets = scene.plain.resets();
    let instance = bus.channel().offer.instance;
    vm.remove_function(instance, 1)?;
    // Before the guest has seen a word of it.
    equal("resets of function 1", scene.plain.resets(), resets + 1)?;
    holds(
        "function 1 has no DMA",
        !scene.plain.write(TARGET.start, &[1; 8]),
    )?;
    equal("the vendor id", bus.config(slot(1), 0, 2)?, 0xffff)?;
    only_0_is_alive(&scene)?;
    let packets = bus.channel().receive()?;
    equal("packets for it", packets.len(), 1)?;
    let relations = bus.decode_relations(&packets[0].payload)?;
    are(
        &relations.iter().map(|it| it.slot).collect::<Vec<_>>(),
        &[0],
    )?;
    is_unknown(bus, 1)?;
    let again = vm.remove_function(instance, 1);
    holds("it cannot be taken away twice", again.is_err())?;
    // Nobody waits for it when the bus is asked for.
    let told = vm.eject(instance)?;
    let packets = bus.channel().receive()?;
    let slots = packets.iter().map(ejected).collect::<Result<Vec<_>, _>>()?;
    equal("slots of the EJECTs", slots, vec![slot(0)])?;
    let_go(bus, 0)?;
    is_told(&told, 1)
}

fn anew(context: &Context) -> Verdict {
    let vm = machine(context, [0, 1, 2])?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let offer = vmbus.only_offer()?;
    // While nobody has the bus open, and while it is open without a version.
    vm.remove_function(offer.instance, 1)?;
    let bus = Bus::new(vmbus.open(&offer)?, 0);
    vm.remove_function(offer.instance, 2)?;
    equal("packets", bus.channel().receive()?.len(), 0)?;
    bus.channel().close()?;
    let bus = Bus::probe(&vmbus, &offer, VERSIONS[0])?;
    equal("packets", bus.channel().receive()?.len(), 0)?;
    let relations = bus.relations()?;
    are(
        &relations.iter().map(|it| it.slot).collect::<Vec<_>>(),
        &[0],
    )?;
    let device = TestDev::start(&bus, 0)?;
    device.interrupt(0, 0x41, 1)?;
    device.raise(0)?;
    vm.expect_interrupt(1, 0x41)?;
    for function in [1, 2] {
        is_unknown(&bus, function)?;
    }
    Ok(())
}
