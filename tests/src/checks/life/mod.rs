//! How a guest and its host part from a bus: after each way nothing of the functions goes on
//! (docs/spec/vpci.md, sections 5, 8 and 9).
#![forbid(unsafe_code)]

mod ejection;
mod function;

use std::ops::Range;
use std::sync::Arc;
use std::thread;

use crate::bed::BedKind;
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::devices::Plain;
use crate::host::{BusSetup, FunctionSetup, LOW_MMIO, Setup};
use crate::model::kernel::{Kernel, VMBUS_VECTOR, status};
use crate::model::ring::Packet;
use crate::model::testdev::{CAP_MSI, Job, MAGIC, NO_VECTOR, TestDev, register};
use crate::model::vm::{GLANCE, PAGE, Vm};
use crate::model::vmbus::{Contact, VERSIONS, VmBus};
use crate::model::vpci::{self, Bus, Create, message, nt, slot};
use crate::model::wire::Bytes;

const ENDS: &[Check] = &[
    Check::new(
        "life.close.nothing-after",
        "Once the rings are given back after a close, the functions do nothing any more.",
        &["VP-11-01", "VP-11-17"],
        |context| nothing_after(context, |scene| scene.bus.channel().close()),
    ),
    Check::new(
        "life.unbind.nothing-after",
        "The same for D0 exit and close, as Linux's driver leaves.",
        &["VP-5-06", "VP-8-03", "VP-11-17"],
        |context| nothing_after(context, |scene| scene.bus.unbind()),
    ),
    Check::new(
        "life.d0-exit.nothing-after",
        "D0 exit alone stops the functions.",
        &["VP-5-06", "VP-11-17"],
        |context| {
            nothing_after(context, |scene| {
                equal("status of D0 exit", scene.bus.d0_exit()?, nt::SUCCESS)
            })
        },
    ),
    Check::new(
        "life.release.nothing-after",
        "Releasing the functions' resources stops them.",
        &["VP-5-08", "VP-11-17"],
        |context| {
            nothing_after(context, |scene| {
                released(scene, message::RESOURCES_RELEASED)
            })
        },
    ),
    Check::new(
        "life.eject-complete.nothing-after",
        "EJECTION_COMPLETE stops the functions.",
        &["VP-8-04", "VP-11-17"],
        |context| nothing_after(context, |scene| released(scene, message::EJECTION_COMPLETE)),
    ),
    Check::new(
        "life.unload.nothing-after",
        "An unload with the channel open stops the functions before its response.",
        &["VP-9-03", "VP-11-17"],
        |context| nothing_after(context, |scene| scene.bus.vmbus().unload()),
    ),
    Check::new(
        "life.contact.nothing-after",
        "A new contact without an unload, as at a crash, stops the functions before its answer.",
        &["VP-9-03", "VP-11-17"],
        |context| nothing_after(context, contact),
    ),
    Check::new(
        "life.reset.nothing-after",
        "After a reset of the machine the functions do nothing any more.",
        &["VP-11-17", "HV-10-04"],
        |context| nothing_after(context, |scene| scene.bus.vm().reset()),
    ),
    Check::new(
        "life.removal.nothing-after",
        "A bus that is taken away is silent at once.",
        &["VP-8-02", "VP-8-06", "VP-11-17"],
        |context| nothing_after(context, removal),
    ),
];

const BEGINNINGS: &[Check] = &[
    Check::new(
        "life.anew.after-close",
        "A bus that is opened again is as at first: no BARs, no messages, masks set.",
        &["VP-5-06", "VP-11-01"],
        |context| anew(context, |scene| scene.bus.channel().close()),
    ),
    Check::new(
        "life.anew.after-unload",
        "So is one that an unload closed.",
        &["VP-9-03"],
        |context| anew(context, |scene| scene.bus.vmbus().unload()),
    ),
    Check::new(
        "life.anew.after-reset",
        "So is one after a reset of the machine.",
        &["HV-10-04"],
        |context| anew(context, |scene| scene.bus.vm().reset()),
    ),
    Check::new(
        "life.anew.many-times",
        "Opening, using and closing leaves nothing behind, however often.",
        &["VP-8-03", "VP-11-12"],
        many_times,
    ),
];

const RINGS: &[Check] = &[
    Check::new(
        "life.close.requests-under-way",
        "Requests still in the ring at a close are dropped; nothing is stored once it is back.",
        &["VP-11-01", "VP-3-06"],
        requests_under_way,
    ),
    Check::new(
        "life.close.requests-after",
        "What is put into the ring after the close is not read.",
        &["VP-11-01"],
        requests_after,
    ),
    Check::new(
        "life.close.other-bus",
        "A bus goes on while another one is closed, opened and taken away.",
        &["VP-8-07", "VP-11-16"],
        other_bus,
    ),
    Check::new(
        "life.removal.requests-under-way",
        "A bus that is taken away answers no request any more.",
        &["VP-8-02"],
        removal_with_requests,
    ),
    Check::new(
        "life.removal.reads-all-ones",
        "Window and BARs of a bus that was taken away read all ones until it is released.",
        &["VP-8-06", "VP-8-02"],
        reads_all_ones,
    ),
    Check::new(
        "life.removal.while-worker-busy",
        "A removal waits for the request under way, and nothing comes of it afterwards.",
        &["VP-8-02"],
        removal_while_busy,
    ),
    Check::new(
        "life.removal.before-use",
        "A bus that was never opened, or is closed, can be taken away.",
        &["VP-8-02"],
        removal_before_use,
    ),
];

/// All checks of this area.
pub const CHECKS: [&[Check]; 5] = [ENDS, BEGINNINGS, RINGS, ejection::CHECKS, function::CHECKS];

/// A bus with two functions in full use: 0 is `testdev` with a long fill under way, 1 acts at the
/// check's word.
struct Scene {
    bus: Bus,
    device: TestDev,
    plain: Arc<Plain>,
    /// Where the second function's BAR 0 is.
    bar: u64,
}

/// Range that the fill goes over.
const TARGET: Range<u64> = 32 << 20..48 << 20;

impl Scene {
    fn new(context: &Context) -> Result<Self, Failure> {
        let plain = Plain::wide();
        let vm = context.machine(&Setup {
            ram: vec![
                Range {
                    start: 0,
                    end: 16 << 20,
                },
                TARGET,
            ],
            buses: vec![BusSetup {
                instance: BusSetup::instance(1),
                functions: vec![FunctionSetup::testdev(0), plain.function(1)],
            }],
            ..Setup::default()
        })?;
        let bus = Bus::bring_up(&vm)?;
        Self::on(bus, plain)
    }

    /// Brings both functions into use.
    fn on(bus: Bus, plain: Arc<Plain>) -> Result<Self, Failure> {
        let device = TestDev::start(&bus, 0)?;
        device.interrupt(0, 0x41, 1)?;
        let one = slot(1);
        let message = bus.must_create(&Create::one(one, 0x51, 0))?;
        let Some(msi) = bus.capability(one, CAP_MSI)? else {
            return Err(Failure::Host("the device has no MSI".into()));
        };
        bus.set_config(one, msi + 4, 4, message.address)?;
        bus.set_config(one, msi + 12, 2, message.data.into())?;
        bus.set_config(one, msi + 2, 2, 1)?;
        let bar = LOW_MMIO + 0x20_0000;
        bus.set_config(one, 0x10, 4, bar)?;
        bus.set_config(one, 4, 2, 6)?;
        let scene = Self {
            bus,
            device,
            plain,
            bar,
        };
        scene.is_alive()?;
        Ok(scene)
    }

    fn vm(&self) -> &Vm {
        self.bus.vm()
    }

    /// Everything works.
    fn is_alive(&self) -> Verdict {
        equal("MAGIC", self.device.load(0, 4)?, MAGIC)?;
        equal(
            "BAR of function 1",
            self.vm().load(0, self.bar, 4)?,
            Plain::value(0, 0),
        )?;
        holds(
            "function 1 has DMA",
            self.plain.write(TARGET.start, &[1; 8]),
        )?;
        self.plain.raise(0);
        self.vm().expect_interrupt(0, 0x51)?;
        self.device.raise(0)?;
        self.vm().expect_interrupt(1, 0x41)
    }

    /// Has `testdev` fill the target, with an interrupt at the end.
    fn fill(&self) -> Verdict {
        self.vm()
            .ram()
            .fill(TARGET.start, TARGET.end - TARGET.start, 0)?;
        self.device.store(register::PATTERN, 8, u64::MAX)?;
        let fill = Job {
            command: 2,
            source: 0,
            destination: TARGET.start,
            length: (TARGET.end - TARGET.start) as u32,
            vector: 0,
        };
        self.device.begin(&fill)?;
        let busy = self.device.load(register::STATUS, 4)?;
        if self.vm().bed() == BedKind::Sim {
            equal("STATUS", busy, 1)?;
        }
        self.vm().step();
        Ok(())
    }
}

/// Function 1 has no DMA any more. It raises what it can; who calls this looks for what came of it, and of
/// nothing before it.
fn function_1_is_cut_off(scene: &Scene) -> Verdict {
    let vm = scene.vm();
    for vp in 0..vm.vps() {
        vm.take_interrupts(vp)?;
    }
    holds(
        "function 1 has no DMA",
        !scene.plain.write(TARGET.start, &[1; 8]),
    )?;
    for vector in 0..32 {
        scene.plain.raise(vector);
    }
    Ok(())
}

/// Nothing of the functions is there, and nothing comes from them.
fn is_silent(scene: &Scene) -> Verdict {
    let vm = scene.vm();
    let len = TARGET.end - TARGET.start;
    if vm.bed() == BedKind::Sim {
        // Here the fill cannot have been over.
        equal("end of the target", vm.read(TARGET.end - 8, 8)?, vec![0; 8])?;
    }
    vm.ram().fill(TARGET.start, len, 0x11)?;
    function_1_is_cut_off(scene)?;
    scene.device.raise(0)?;
    equal("BAR of function 0", scene.device.load(0, 4)?, 0xffff_ffff)?;
    equal("BAR of function 1", vm.load(0, scene.bar, 4)?, 0xffff_ffff)?;
    vm.settle();
    thread::sleep(GLANCE);
    let target = vm.read(TARGET.start, len as usize)?;
    holds(
        "nothing was stored",
        target.iter().all(|byte| *byte == 0x11),
    )?;
    for vp in 0..vm.vps() {
        let mut vectors = vm.take_interrupts(vp)?;
        vectors.retain(|vector| *vector != VMBUS_VECTOR);
        equal(format!("interrupts of VP {vp}"), vectors, vec![])?;
    }
    Ok(())
}

fn nothing_after(context: &Context, end: impl Fn(&Scene) -> Verdict) -> Verdict {
    let scene = Scene::new(context)?;
    let resets = scene.plain.resets();
    scene.fill()?;
    end(&scene)?;
    equal("resets of function 1", scene.plain.resets(), resets + 1)?;
    is_silent(&scene)
}

/// Sends a message about both slots, as Linux does from the highest slot down.
fn released(scene: &Scene, number: u32) -> Verdict {
    for function in [1, 0] {
        let words = [number, slot(function), 0];
        scene.bus.send(&Bytes::words(&words).0)?;
    }
    scene.vm().settle();
    Ok(())
}

fn contact(scene: &Scene) -> Verdict {
    let vmbus = VmBus::new(scene.bus.kernel(), 0);
    let contact = Contact::linux(scene.vm(), VERSIONS[0], 0)?;
    let response = vmbus.contact(&contact)?;
    equal("version_supported", response.supported, true)
}

fn removal(scene: &Scene) -> Verdict {
    let offer = &scene.bus.channel().offer;
    scene.vm().remove(offer.instance)?;
    // No worker has had a turn since.
    equal("the vendor id", scene.bus.config(0, 0, 2)?, 0xffff)?;
    let vmbus = scene.bus.vmbus();
    equal(
        "channel that is rescinded",
        vmbus.expect_rescind()?,
        offer.relid,
    )
}

fn anew(context: &Context, end: impl Fn(&Scene) -> Verdict) -> Verdict {
    let scene = Scene::new(context)?;
    scene.fill()?;
    end(&scene)?;
    let kernel = Kernel::boot(scene.vm())?;
    let vmbus = VmBus::connect(&kernel)?;
    let bus = Bus::new(vmbus.open(&vmbus.only_offer()?)?, 0);
    equal(
        "status of the version",
        bus.negotiate(0x1_0004)?,
        nt::SUCCESS,
    )?;
    equal("the vendor id before D0", bus.config(0, 0, 2)?, 0xffff)?;
    equal(
        "status of D0 entry",
        bus.d0_entry(bus.window())?,
        nt::SUCCESS,
    )?;
    for function in [0, 1] {
        let slot = slot(function);
        let command = bus.config(slot, 4, 2)?;
        equal(
            format!("command register of function {function}"),
            command,
            0,
        )?;
        for bar in 0..6 {
            let register = bus.config(slot, 0x10 + 4 * bar, 4)? & !0xf;
            equal(format!("BAR {bar} of function {function}"), register, 0)?;
        }
        let first = bus.must_create(&Create::one(slot, 0x61, 0))?;
        equal("data of the first message", first.data, 0)?;
        bus.delete(slot, first)?;
    }
    let msi = bus.capability(slot(1), CAP_MSI)?.unwrap_or(0);
    equal("MSI control", bus.config(slot(1), msi + 2, 2)? & 0x71, 0)?;
    for (register, what) in [(4, "address"), (12, "data"), (16, "mask")] {
        equal(
            format!("MSI {what}"),
            bus.config(slot(1), msi + register, 4)?,
            0,
        )?;
    }
    let device = TestDev::start(&bus, 0)?;
    let entry = (device.load(0x1000, 8)?, device.load(0x1008, 8)?);
    equal("MSI-X entry 0", entry, (0, 1 << 32))?;
    equal(
        "SOURCE to COMPLETIONS",
        device.load(register::COMPLETIONS, 8)?,
        0,
    )?;
    equal("STATUS", device.load(register::STATUS, 4)?, 0)?;
    Scene::on(bus, scene.plain).map(drop)
}

fn many_times(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let offer = vmbus.only_offer()?;
    let page = vm.pages(2)?;
    for round in 0..20u8 {
        let version = vpci::VERSIONS[usize::from(round) % 4];
        let bus = Bus::probe(&vmbus, &offer, version)?;
        let device = TestDev::start(&bus, 0)?;
        for entry in 0..8 {
            let interrupt = device.interrupt(entry, 0x41 + entry as u8, 1)?;
            equal("data of the message", interrupt.message.data, entry)?;
        }
        vm.write(page, &[round; 64])?;
        device.copy(page, page + PAGE, 64, 7)?;
        vm.expect_interrupt(1, 0x48)?;
        equal(
            "what was copied",
            vm.read(page + PAGE, 64)?,
            vec![round; 64],
        )?;
        match round % 2 {
            0 => bus.unbind()?,
            _ => bus.channel().close()?,
        }
    }
    Ok(())
}

/// Puts requests into the ring without a signal that would have them read at once.
fn put(bus: &Bus, count: u64) -> Verdict {
    let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0];
    for id in 0..count {
        let packet = Packet::request(id, &Bytes::words(&words).0);
        bus.channel().to_host.send(&packet)?;
    }
    Ok(())
}

/// Overwrites the rings and demands that the host leaves them so.
fn rings_are_back(bus: &Bus) -> Verdict {
    let vm = bus.vm();
    let rings = [&bus.channel().to_host, &bus.channel().to_guest];
    for ring in rings {
        vm.ram().fill(ring.control(), PAGE, 0x77)?;
        ring.put(0, &vec![0x77; ring.size() as usize])?;
    }
    bus.channel().signal()?;
    vm.settle();
    thread::sleep(GLANCE);
    for ring in rings {
        let control = vm.read(ring.control(), PAGE as usize)?;
        holds(
            "the control page is left alone",
            control.iter().all(|byte| *byte == 0x77),
        )?;
        let data = ring.get(0, ring.size())?;
        holds(
            "the ring's data is left alone",
            data.iter().all(|byte| *byte == 0x77),
        )?;
    }
    Ok(())
}

fn requests_under_way(context: &Context) -> Verdict {
    let bus = Bus::bring_up(&context.usual()?)?;
    put(&bus, 40)?;
    bus.channel().signal()?;
    bus.channel().close()?;
    rings_are_back(&bus)?;
    let bus = Bus::probe(bus.vmbus(), &bus.channel().offer, vpci::VERSIONS[0])?;
    TestDev::start(&bus, 0).map(drop)
}

fn requests_after(context: &Context) -> Verdict {
    let bus = Bus::bring_up(&context.usual()?)?;
    bus.channel().close()?;
    let read = bus.channel().to_host.load(4)?;
    put(&bus, 3)?;
    bus.channel().signal()?;
    bus.vm().settle();
    equal(
        "read index of the ring",
        bus.channel().to_host.load(4)?,
        read,
    )?;
    equal("packets of the host", bus.channel().receive()?.len(), 0)?;
    rings_are_back(&bus)
}

fn other_bus(context: &Context) -> Verdict {
    let vm = context.machine(&Setup {
        buses: vec![BusSetup::testdev(1), BusSetup::testdev(2)],
        ..Setup::default()
    })?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let offers = vmbus.offers()?;
    let first = Bus::probe(&vmbus, &offers[0], vpci::VERSIONS[0])?;
    let second = Bus::probe(&vmbus, &offers[1], vpci::VERSIONS[0])?;
    let device = TestDev::start(&second, 0)?;
    let interrupt = device.interrupt(0, 0x41, 1)?;
    let page = vm.pages(2)?;
    let works = || -> Verdict {
        second.requirements(0)?;
        device.retarget(&interrupt)?;
        device.copy(page, page + PAGE, 64, 0)?;
        vm.expect_interrupt(1, 0x41)
    };
    TestDev::start(&first, 0)?.interrupt(0, 0x51, 1)?;
    works()?;
    first.unbind()?;
    works()?;
    let first = Bus::probe(&vmbus, &offers[0], vpci::VERSIONS[0])?;
    TestDev::start(&first, 0)?;
    works()?;
    vm.remove(first.channel().offer.instance)?;
    vmbus.expect_rescind()?;
    works()?;
    vmbus.send_close(offers[0].relid)?;
    vmbus.release(offers[0].relid)?;
    works()
}

fn removal_with_requests(context: &Context) -> Verdict {
    let bus = Bus::bring_up(&context.usual()?)?;
    let vm = bus.vm();
    let offer = &bus.channel().offer;
    vm.remove(offer.instance)?;
    let before = bus.channel().to_guest.load(0)?;
    put(&bus, 10)?;
    let got = bus.channel().signal()?;
    let known = [
        status::SUCCESS,
        status::INVALID_CONNECTION_ID,
        status::INVALID_PORT_ID,
    ];
    holds(
        format!("the signal's status {got:#x} is one of {known:x?}"),
        known.contains(&got),
    )?;
    vm.settle();
    equal(
        "write index of the host",
        bus.channel().to_guest.load(0)?,
        before,
    )?;
    equal(
        "channel that is rescinded",
        bus.vmbus().expect_rescind()?,
        offer.relid,
    )?;
    // The guest may still take its rings back.
    bus.channel().close()?;
    bus.vmbus().release(offer.relid)?;
    rings_are_back(&bus)
}

fn reads_all_ones(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (bus, vm) = (&scene.bus, scene.vm());
    let offer = &bus.channel().offer;
    vm.remove(offer.instance)?;
    let dead = || -> Verdict {
        for (width, ones) in [(1, 0xff), (2, 0xffff), (4, 0xffff_ffff), (8, u64::MAX)] {
            for gpa in [
                scene.device.bar(),
                scene.device.bar() + 0x1000,
                scene.bar,
                bus.window(),
            ] {
                equal(format!("a load at {gpa:#x}"), vm.load(0, gpa, width)?, ones)?;
                vm.store(0, gpa, width, 0)?;
            }
        }
        for function in [0, 1, 7] {
            equal(
                "the vendor id",
                bus.config(slot(function), 0, 4)?,
                0xffff_ffff,
            )?;
            bus.set_config(slot(function), 4, 2, 6)?;
        }
        Ok(())
    };
    dead()?;
    bus.vmbus().expect_rescind()?;
    dead()?;
    bus.vmbus().send_close(offer.relid)?;
    vm.settle();
    dead()?;
    bus.vmbus().release(offer.relid)?;
    vm.settle();
    dead()
}

fn removal_while_busy(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (bus, vm) = (&scene.bus, scene.vm());
    scene.plain.hold_resets();
    let words = Bytes::words(&[message::RESOURCES_RELEASED, slot(1)]);
    let relid = bus.channel().offer.relid;
    thread::scope(|scope| {
        let worker = scope.spawn(|| -> Verdict {
            bus.send(&words.0)?;
            vm.settle();
            Ok(())
        });
        let held = scene.plain.is_held();
        let remover = scope.spawn(|| vm.remove(bus.channel().offer.instance));
        thread::sleep(GLANCE);
        // The function whose reset takes its time is out of the guest's hands all the same.
        let bar = vm.load(1, scene.bar, 4);
        scene.plain.let_go();
        let panicked = |_| Failure::Host("a thread panicked".into());
        worker.join().map_err(panicked)??;
        remover.join().map_err(panicked)??;
        holds("the worker was held up", held)?;
        equal("BAR of function 1 meanwhile", bar?, 0xffff_ffff)
    })?;
    equal(
        "channel that is rescinded",
        bus.vmbus().expect_rescind()?,
        relid,
    )?;
    equal("BAR of function 0", scene.device.load(0, 4)?, 0xffff_ffff)?;
    holds(
        "function 1 has no DMA",
        !scene.plain.write(TARGET.start, &[1; 8]),
    )
}

fn removal_before_use(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let offer = vmbus.only_offer()?;
    vm.remove(offer.instance)?;
    equal(
        "channel that is rescinded",
        vmbus.expect_rescind()?,
        offer.relid,
    )?;
    vmbus.release(offer.relid)?;
    vmbus.expect_silence()?;
    vm.plug(&BusSetup::testdev(1))?;
    let offer = vmbus.expect_offer()?;
    let bus = Bus::probe(&vmbus, &offer, vpci::VERSIONS[0])?;
    bus.unbind()?;
    vm.remove(offer.instance)?;
    equal(
        "channel that is rescinded",
        vmbus.expect_rescind()?,
        offer.relid,
    )?;
    let again = vm.plug(&BusSetup::testdev(1));
    holds("its name is taken until it is released", again.is_err())?;
    vmbus.release(offer.relid)?;
    vm.settle();
    vm.plug(&BusSetup::testdev(1))?;
    let offer = vmbus.expect_offer()?;
    let bus = Bus::probe(&vmbus, &offer, vpci::VERSIONS[0])?;
    TestDev::start(&bus, 0)?.copy(0x20_0000, 0x20_1000, 8, NO_VECTOR)
}
