//! Orderly removal: the guest is asked to let go of a bus before it is taken away
//! (docs/spec/vpci.md, section 8).
#![forbid(unsafe_code)]

use super::{Scene, TARGET, contact, is_silent, removal};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::devices::Plain;
use crate::host::{BusSetup, FunctionSetup, Setup};
use crate::model::kernel::Kernel;
use crate::model::ring::{COMPLETION, COMPLETION_REQUESTED, IN_BAND, Packet, WRITE_INDEX};
use crate::model::testdev::{MAGIC, TestDev};
use crate::model::vm::{PAGE, Told, Vm};
use crate::model::vmbus::VmBus;
use crate::model::vpci::{Bus, VERSIONS, message, nt, slot};
use crate::model::wire::{Bytes, u32_at};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "life.eject.each-function",
        "A guest that is asked for a bus receives one EJECT of 8 bytes for each function.",
        &["VP-8-01", "VP-8-07", "VP-4-19", "VP-3.1-09", "VP-3.2-01"],
        each_function,
    ),
    Check::new(
        "life.eject.orderly",
        "The host hears of it when all functions are let go; the bus goes when it is removed.",
        &["VP-8-01", "VP-8-07", "VB-3.2-01"],
        orderly,
    ),
    Check::new(
        "life.eject.nothing-after",
        "Each function that was asked for stops at its own EJECTION_COMPLETE.",
        &["VP-8-01", "VP-8-04", "VP-8-07", "VP-11-17"],
        nothing_after,
    ),
    Check::new(
        "life.eject.never-answered",
        "Without an answer the bus works on, and can be taken away at any time.",
        &["VP-8-05", "VP-8-02", "VP-11-14", "VP-11-16"],
        never_answered,
    ),
    Check::new(
        "life.eject.wrong-answers",
        "What is no EJECTION_COMPLETE of a function of the bus is refused, and does not count.",
        &["VP-11-14", "VP-3-02", "VP-8-04"],
        wrong_answers,
    ),
    Check::new(
        "life.eject.repeated",
        "A function that is let go of twice does not stand for two.",
        &["VP-11-14", "VP-8-07"],
        repeated,
    ),
    Check::new(
        "life.eject.before-asked",
        "EJECTION_COMPLETE from before the question does not answer it.",
        &["VP-11-14"],
        before_asked,
    ),
    Check::new(
        "life.eject.release-is-no-answer",
        "RESOURCES_RELEASED and D0 exit are no answers; the close after them is one.",
        &["VP-8-01", "VP-8-03", "VP-5-08"],
        |context| {
            ended(context, |scene, told| {
                for function in [1, 0] {
                    scene.bus.released(slot(function))?;
                }
                equal("status of D0 exit", scene.bus.d0_exit()?, nt::SUCCESS)?;
                is_told(told, 0)?;
                scene.bus.channel().close()
            })
        },
    ),
    Check::new(
        "life.eject.unload",
        "An unload answers for all functions.",
        &["VP-9-03", "VP-8-01"],
        |context| ended(context, |scene, _| scene.bus.vmbus().unload()),
    ),
    Check::new(
        "life.eject.contact",
        "So does a new contact without an unload.",
        &["VP-9-03", "VP-8-01"],
        |context| ended(context, |scene, _| contact(scene)),
    ),
    Check::new(
        "life.eject.reset",
        "So does a reset of the machine, after which nobody is asked.",
        &["HV-10-04", "VP-8-01"],
        |context| ended(context, |scene, _| scene.vm().reset()),
    ),
    Check::new(
        "life.eject.full-ring",
        "EJECT reaches a guest whose ring is full of answers, and no answer is lost.",
        &["VP-8-01", "VP-11-16"],
        full_ring,
    ),
    Check::new(
        "life.eject.broken-ring",
        "A guest that breaks its ring while it is asked has not let go, and loses the bus.",
        &["VP-8-05", "VB-8-09"],
        broken_ring,
    ),
    Check::new(
        "life.eject.not-open",
        "A guest that does not have the channel open need not be asked.",
        &["VP-8-01", "VP-8-02"],
        not_open,
    ),
    Check::new(
        "life.eject.during-probe",
        "EJECT in the course of a probe does not disturb it, and is answered after it.",
        &["VP-8-04", "VP-5-02"],
        during_probe,
    ),
    Check::new(
        "life.eject.replug",
        "A bus that was ejected can be plugged in again once its channel is released.",
        &["VP-8-01", "VB-5.1-05"],
        replug,
    ),
    Check::new(
        "life.eject.other-bus",
        "What is asked and answered on one bus does not concern another.",
        &["VP-8-07", "VP-11-16"],
        other_bus,
    ),
];

/// A machine whose only bus has a `testdev` at each of these numbers.
pub(super) fn machine(
    context: &Context,
    numbers: impl IntoIterator<Item = u8>,
) -> Result<Vm, Failure> {
    context.machine(&Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: numbers.into_iter().map(FunctionSetup::testdev).collect(),
        }],
        ..Setup::default()
    })
}

/// The slot that an EJECT names.
pub(super) fn ejected(packet: &Packet) -> Result<u32, Failure> {
    equal("type of the packet", packet.kind, IN_BAND)?;
    equal("flags of the packet", packet.flags, 0)?;
    equal("transaction id of the packet", packet.id, 0)?;
    equal("bytes of EJECT", packet.payload.len(), 8)?;
    equal("message", u32_at(&packet.payload, 0), message::EJECT)?;
    Ok(u32_at(&packet.payload, 4))
}

/// The host asks for a bus; the guest finds EJECTs for these functions and nothing else.
fn asked(bus: &Bus, functions: &[u8]) -> Result<Told, Failure> {
    let told = bus.vm().eject(bus.channel().offer.instance)?;
    let packets = bus.channel().receive()?;
    let slots = packets.iter().map(ejected).collect::<Result<Vec<_>, _>>()?;
    let wanted: Vec<u32> = functions.iter().map(|number| slot(*number)).collect();
    equal("slots of the EJECTs", slots, wanted)?;
    is_told(&told, 0)?;
    Ok(told)
}

pub(super) fn is_told(told: &Told, times: u32) -> Verdict {
    let what = "how often the host heard that the guest has let go";
    equal(what, told.times(), times)
}

pub(super) fn complete(slot: u32) -> Vec<u8> {
    Bytes::words(&[message::EJECTION_COMPLETE, slot, 0]).0
}

/// EJECTION_COMPLETE as Linux sends it, which has no answer.
pub(super) fn let_go(bus: &Bus, function: u8) -> Verdict {
    bus.send(&complete(slot(function)))?;
    equal("packets for it", bus.channel().receive()?.len(), 0)
}

/// The guest gives the bus back that was taken away.
fn give_back(bus: &Bus) -> Verdict {
    let relid = bus.channel().offer.relid;
    let rescinded = bus.vmbus().expect_rescind()?;
    equal("channel that is rescinded", rescinded, relid)?;
    bus.channel().close()?;
    bus.vmbus().release(relid)?;
    bus.vm().settle();
    bus.vmbus().expect_silence()
}

fn each_function(context: &Context) -> Verdict {
    let functions = [0, 3, 7];
    for version in VERSIONS {
        let vm = machine(context, functions)?;
        let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
        let bus = Bus::probe(&vmbus, &vmbus.only_offer()?, version)?;
        bus.channel().interrupted()?;
        let told = asked(&bus, &functions)?;
        holds("the guest is interrupted", bus.channel().interrupted()?)?;
        // Nobody asks again.
        bus.requirements(0)?;
        equal("further packets", bus.channel().receive()?.len(), 0)?;
        is_told(&told, 0)?;
    }
    Ok(())
}

fn orderly(context: &Context) -> Verdict {
    let vm = machine(context, [0, 1])?;
    let bus = Bus::bring_up(&vm)?;
    let devices = [TestDev::start(&bus, 0)?, TestDev::start(&bus, 1)?];
    let interrupts = [
        devices[0].interrupt(0, 0x41, 0)?,
        devices[1].interrupt(0, 0x42, 1)?,
    ];
    let told = asked(&bus, &[0, 1])?;
    for function in [1u8, 0] {
        is_told(&told, 0)?;
        // As Linux's driver does, from the highest slot down.
        let index = usize::from(function);
        devices[index].set_command(0)?;
        bus.delete(slot(function), interrupts[index].message)?;
        let_go(&bus, function)?;
    }
    is_told(&told, 1)?;
    // The bus is there until it is taken away.
    bus.vmbus().expect_silence()?;
    bus.requirements(slot(1))?;
    equal("the vendor id", bus.config(slot(1), 0, 2)?, 0x1234)?;
    vm.remove(bus.channel().offer.instance)?;
    equal(
        "the vendor id after that",
        bus.config(slot(1), 0, 2)?,
        0xffff,
    )?;
    give_back(&bus)?;
    is_told(&told, 1)
}

fn nothing_after(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let vm = scene.vm();
    let told = asked(&scene.bus, &[0, 1])?;
    // Asked is not stopped.
    scene.is_alive()?;
    let resets = scene.plain.resets();
    let_go(&scene.bus, 1)?;
    equal("resets of function 1", scene.plain.resets(), resets + 1)?;
    holds(
        "function 1 has no DMA",
        !scene.plain.write(TARGET.start, &[1; 8]),
    )?;
    equal("BAR of function 1", vm.load(0, scene.bar, 4)?, 0xffff_ffff)?;
    scene.plain.raise(0);
    scene.device.raise(0)?;
    vm.expect_interrupt(1, 0x41)?;
    let mut vectors = vm.take_interrupts(0)?;
    vectors.retain(|vector| *vector == 0x51);
    equal("interrupts of function 1", vectors, vec![])?;
    equal("MAGIC of function 0", scene.device.load(0, 4)?, MAGIC)?;
    is_told(&told, 0)?;
    scene.fill()?;
    scene.bus.send(&complete(0))?;
    vm.settle();
    is_told(&told, 1)?;
    is_silent(&scene)
}

fn never_answered(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (bus, vm) = (&scene.bus, scene.vm());
    let told = asked(bus, &[0, 1])?;
    for _ in 0..3 {
        scene.is_alive()?;
        bus.requirements(slot(1))?;
        let again = vm.eject(bus.channel().offer.instance);
        holds("the host is refused a second question", again.is_err())?;
    }
    is_told(&told, 0)?;
    scene.fill()?;
    removal(&scene)?;
    is_told(&told, 1)?;
    is_silent(&scene)?;
    // Too late.
    bus.channel()
        .to_host
        .send(&Packet::new(IN_BAND, 0, 0, &complete(0)))?;
    bus.channel().signal()?;
    vm.settle();
    is_told(&told, 1)
}

fn wrong_answers(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let bus = &scene.bus;
    let channel = bus.channel();
    let told = asked(bus, &[0, 1])?;
    let no_effect = |what: &str| -> Verdict {
        let course = |failure: Failure| failure.during(what);
        equal("packets of the host", channel.receive()?.len(), 0).map_err(course)?;
        is_told(&told, 0).map_err(course)?;
        scene.is_alive().map_err(course)
    };
    // Not on the bus: other functions, another device, more than a slot has.
    let slots = [slot(2), slot(7), 1, slot(1) | 0x1f, 0x100, 0xffff_ffff];
    let mut refused: Vec<Vec<u8>> = slots.map(complete).to_vec();
    refused.push(Vec::new());
    refused.push(Bytes::words(&[message::EJECT, 0, 0]).0);
    for payload in &refused {
        let what = format!("{payload:02x?}");
        let status = bus.request(payload)?.status;
        equal(format!("status of {what}"), status, nt::BAD_DATA)?;
        no_effect(&what)?;
        bus.send(payload)?;
        no_effect(&what)?;
    }
    // Not in such packets.
    channel.send(&Packet::new(COMPLETION, 0, 0, &complete(0)))?;
    no_effect("as a completion")?;
    let ranges = Bytes::words(&[0, 1, 4096, 0]).u64(0x100);
    let direct = Packet {
        offset8: 5,
        ..Packet::new(9, COMPLETION_REQUESTED, 77, &ranges.bytes(&complete(0)).0)
    };
    channel.send(&direct)?;
    let packets = channel.receive()?;
    equal("packets for a GPA direct packet", packets.len(), 1)?;
    equal("its status", u32_at(&packets[0].payload, 0), nt::BAD_DATA)?;
    no_effect("in a GPA direct packet")?;
    let_go(bus, 0)?;
    let_go(bus, 1)?;
    is_told(&told, 1)
}

fn repeated(context: &Context) -> Verdict {
    let bus = Bus::bring_up(&machine(context, [0, 1, 2])?)?;
    let told = asked(&bus, &[0, 1, 2])?;
    let device = TestDev::start(&bus, 0)?;
    for _ in 0..3 {
        for function in [2, 1] {
            let reply = bus.request(&complete(slot(function)))?;
            equal("status of EJECTION_COMPLETE", reply.status, nt::SUCCESS)?;
            equal("other packets", reply.unsolicited.len(), 0)?;
        }
        is_told(&told, 0)?;
        equal("MAGIC of function 0", device.load(0, 4)?, MAGIC)?;
    }
    let_go(&bus, 0)?;
    for function in [0, 1, 2] {
        is_told(&told, 1)?;
        let_go(&bus, function)?;
    }
    is_told(&told, 1)?;
    bus.vmbus().expect_silence()
}

fn before_asked(context: &Context) -> Verdict {
    let bus = Bus::bring_up(&machine(context, [0, 1])?)?;
    let both = || -> Verdict {
        [1, 0]
            .into_iter()
            .try_for_each(|number| let_go(&bus, number))
    };
    both()?;
    let first = asked(&bus, &[0, 1])?;
    both()?;
    is_told(&first, 1)?;
    // Answers to one question are none to the next.
    both()?;
    let second = asked(&bus, &[0, 1])?;
    let_go(&bus, 1)?;
    is_told(&second, 0)?;
    let_go(&bus, 0)?;
    is_told(&second, 1)?;
    is_told(&first, 1)
}

/// Ends the connection with the bus while the guest is asked, and demands that the host hears of
/// it once and that the guest finds the bus anew without a question.
fn ended(context: &Context, end: impl Fn(&Scene, &Told) -> Verdict) -> Verdict {
    let scene = Scene::new(context)?;
    let told = asked(&scene.bus, &[0, 1])?;
    let_go(&scene.bus, 1)?;
    is_told(&told, 0)?;
    end(&scene, &told)?;
    is_told(&told, 1)?;
    let vmbus = VmBus::connect(&Kernel::boot(scene.vm())?)?;
    let bus = Bus::probe(&vmbus, &vmbus.only_offer()?, VERSIONS[0])?;
    equal("packets of the host", bus.channel().receive()?.len(), 0)?;
    let scene = Scene::on(bus, scene.plain)?;
    let_go(&scene.bus, 0)?;
    is_told(&told, 1)?;
    let again = asked(&scene.bus, &[0, 1])?;
    let_go(&scene.bus, 0)?;
    is_told(&again, 0)?;
    let_go(&scene.bus, 1)?;
    is_told(&again, 1)?;
    is_told(&told, 1)
}

fn full_ring(context: &Context) -> Verdict {
    for pages in [2, 5] {
        let vm = machine(context, 0..8)?;
        let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
        let offer = vmbus.only_offer()?;
        let bus = Bus::new(vmbus.open_sized(&offer, pages, 0)?, 0);
        let status = bus.negotiate(VERSIONS[0])?;
        equal("status of the version", status, nt::SUCCESS)?;
        let status = bus.d0_entry(bus.window())?;
        equal("status of D0 entry", status, nt::SUCCESS)?;
        // The guest takes no answer until the host takes no request.
        let channel = bus.channel();
        let query = Bytes::words(&[message::QUERY_RESOURCE_REQUIREMENTS, 0]).0;
        let mut sent = 0u64;
        while let Some(signal) = channel.to_host.send(&Packet::request(1 + sent, &query))? {
            if signal {
                channel.signal()?;
            }
            vm.settle();
            sent += 1;
        }
        let told = vm.eject(offer.instance)?;
        let (answers, ejects): (Vec<_>, Vec<_>) = channel
            .receive()?
            .into_iter()
            .partition(|packet| packet.kind == COMPLETION);
        let ids: Vec<u64> = answers.iter().map(|packet| packet.id).collect();
        equal("ids of the answers", ids, (1..=sent).collect())?;
        let slots = ejects.iter().map(ejected).collect::<Result<Vec<_>, _>>()?;
        equal("slots of the EJECTs", slots, (0..8).map(slot).collect())?;
        for function in 0..8 {
            is_told(&told, 0)?;
            let_go(&bus, function)?;
        }
        is_told(&told, 1)?;
    }
    Ok(())
}

fn broken_ring(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (bus, vm) = (&scene.bus, scene.vm());
    let told = asked(bus, &[0, 1])?;
    let_go(bus, 0)?;
    // No packet ends there.
    bus.channel().to_host.store(WRITE_INDEX, 4)?;
    bus.channel().signal()?;
    vm.settle();
    is_told(&told, 0)?;
    removal(&scene)?;
    is_told(&told, 1)?;
    holds(
        "function 1 has no DMA",
        !scene.plain.write(TARGET.start, &[1; 8]),
    )
}

fn not_open(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let instance = BusSetup::instance(1);
    let unknown = vm.eject(BusSetup::instance(2));
    holds(
        "a bus that there is not cannot be ejected",
        unknown.is_err(),
    )?;
    // Before there is a guest; offered; closed again.
    is_told(&vm.eject(instance)?, 1)?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let offer = vmbus.only_offer()?;
    is_told(&vm.eject(instance)?, 1)?;
    vmbus.expect_silence()?;
    let bus = Bus::probe(&vmbus, &offer, VERSIONS[0])?;
    bus.unbind()?;
    is_told(&vm.eject(instance)?, 1)?;
    vmbus.expect_silence()?;
    vm.remove(instance)?;
    let rescinded = vmbus.expect_rescind()?;
    equal("channel that is rescinded", rescinded, offer.relid)
}

fn during_probe(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let bus = Bus::new(vmbus.open(&vmbus.only_offer()?)?, 0);
    let told = asked(&bus, &[0])?;
    // The protocol has not begun.
    let status = bus.request(&complete(0))?.status;
    let what = "status of EJECTION_COMPLETE without a version";
    equal(what, status, nt::INVALID_DEVICE_STATE)?;
    let status = bus.negotiate(VERSIONS[0])?;
    equal("status of the version", status, nt::SUCCESS)?;
    equal("functions", bus.relations()?.len(), 1)?;
    bus.requirements(0)?;
    let status = bus.d0_entry(bus.window())?;
    equal("status of D0 entry", status, nt::SUCCESS)?;
    let status = bus.assigned(0)?;
    equal("status of RESOURCES_ASSIGNED", status, nt::SUCCESS)?;
    equal("functions in D0", bus.relations()?.len(), 1)?;
    let device = TestDev::start(&bus, 0)?;
    device.interrupt(0, 0x41, 1)?;
    device.raise(0)?;
    vm.expect_interrupt(1, 0x41)?;
    is_told(&told, 0)?;
    let_go(&bus, 0)?;
    is_told(&told, 1)
}

fn replug(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let mut offer = vmbus.only_offer()?;
    let page = vm.pages(2)?;
    let mut heard = Vec::new();
    for round in 1..=3u8 {
        let bus = Bus::probe(&vmbus, &offer, VERSIONS[0])?;
        let device = TestDev::start(&bus, 0)?;
        device.interrupt(0, 0x41, 1)?;
        vm.write(page, &[round; 64])?;
        device.copy(page, page + PAGE, 64, 0)?;
        vm.expect_interrupt(1, 0x41)?;
        let copied = vm.read(page + PAGE, 64)?;
        equal("what was copied", copied, vec![round; 64])?;
        let told = asked(&bus, &[0])?;
        let taken = |when: &str| {
            let again = vm.plug(&BusSetup::testdev(1));
            holds(format!("its name is taken {when}"), again.is_err())
        };
        taken("while the guest is asked")?;
        let_go(&bus, 0)?;
        is_told(&told, 1)?;
        taken("until the bus is removed")?;
        vm.remove(offer.instance)?;
        let gone = vm.eject(offer.instance);
        holds("a bus that is gone cannot be ejected", gone.is_err())?;
        taken("until its channel is released")?;
        give_back(&bus)?;
        vm.plug(&BusSetup::testdev(1))?;
        let next = vmbus.expect_offer()?;
        equal("instance that is offered", next.instance, offer.instance)?;
        offer = next;
        heard.push(told);
    }
    heard.iter().try_for_each(|told| is_told(told, 1))
}

fn other_bus(context: &Context) -> Verdict {
    let plain = Plain::wide();
    let vm = context.machine(&Setup {
        buses: vec![BusSetup::testdev(1), plain.bus(2)],
        ..Setup::default()
    })?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let offers = vmbus.offers()?;
    let first = Bus::probe(&vmbus, &offers[0], VERSIONS[0])?;
    let second = Bus::probe(&vmbus, &offers[1], VERSIONS[0])?;
    let device = TestDev::start(&first, 0)?;
    let told = asked(&first, &[0])?;
    let packets = second.channel().receive()?;
    equal("packets on the other bus", packets.len(), 0)?;
    let resets = plain.resets();
    let_go(&second, 0)?;
    equal("resets of the other device", plain.resets(), resets + 1)?;
    equal("MAGIC of the first", device.load(0, 4)?, MAGIC)?;
    is_told(&told, 0)?;
    // Both at once.
    let other = asked(&second, &[0])?;
    let_go(&first, 0)?;
    is_told(&told, 1)?;
    is_told(&other, 0)?;
    vm.remove(offers[0].instance)?;
    give_back(&first)?;
    second.requirements(0)?;
    is_told(&other, 0)?;
    let_go(&second, 0)?;
    is_told(&other, 1)
}
