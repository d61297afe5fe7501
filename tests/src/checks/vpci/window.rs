//! D0 and the config window: where it is, how it is used (docs/spec/vpci.md, sections 5 and 6).
#![forbid(unsafe_code)]

use std::thread;

use super::{ONES, bus_with, in_d0, negotiated};
use crate::check::{Check, Context, Failure, SIM, Verdict, equal, holds};
use crate::devices::{self, Plain};
use crate::host::{BusSetup, FunctionSetup, HIGH_MMIO, LOW_MMIO, Setup};
use crate::model::kernel::{Kernel, status};
use crate::model::ring::Packet;
use crate::model::testdev::TestDev;
use crate::model::vmbus::VmBus;
use crate::model::vpci::{Bus, Create, VERSIONS, WINDOW_SIZE, message, nt, slot};
use crate::model::wire::Bytes;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vpci.d0.window",
        "The config window answers from D0 entry to D0 exit, and reads all ones else.",
        &[
            "VP-5-04",
            "VP-5-06",
            "VP-4-08",
            "VP-4-09",
            "VP-3.1-07",
            "VP-6-04",
        ],
        window,
    ),
    Check::new(
        "vpci.d0.bad-window",
        "A window that is not two free, aligned pages of vPCI MMIO fails D0 entry.",
        &["VP-11-05", "VP-5-04"],
        bad_window,
    ),
    Check::new(
        "vpci.d0.window-of-another-bus",
        "A window that overlaps another bus's window or BAR fails D0 entry.",
        &["VP-11-05", "VP-5-04"],
        window_of_another,
    ),
    Check::new(
        "vpci.d0.retry",
        "After a failed D0 entry a guest's release, D0 exit and second entry succeed.",
        &["VP-5-05"],
        retry,
    ),
    Check::new(
        "vpci.d0.moved",
        "A second D0 entry moves the window; one that fails leaves it where it is.",
        &["VP-11-05", "VP-5-05"],
        moved,
    ),
    Check::new(
        "vpci.d0.exit-releases",
        "D0 exit releases every function although the guest releases none.",
        &["VP-5-06"],
        exit_releases,
    ),
    Check::new(
        "vpci.d0.exit-at-any-time",
        "D0 exit succeeds without D0 entry, and again.",
        &["VP-11-01", "VP-5-05"],
        exit_at_any_time,
    ),
    Check::new(
        "vpci.d0.resume",
        "After freeze and restore on a new channel the same window, slots and BARs work again.",
        &["VP-9-01"],
        resume,
    ),
    Check::new(
        "vpci.window.slot-register",
        "Only four bytes at offset 0 select a slot; the rest of the first page reads all ones.",
        &["VP-6-01", "VP-6-03"],
        slot_register,
    ),
    Check::new(
        "vpci.window.slot-is-the-buss",
        "A slot stays selected until another is, whichever VP selects and accesses.",
        &["VP-6-01", "VP-6-03"],
        slot_of_the_bus,
    ),
    Check::new(
        "vpci.window.unknown-slot",
        "Behind a slot without a function loads read all ones and stores go nowhere.",
        &["VP-6-04", "VP-11-04"],
        unknown_slot,
    ),
    Check::new(
        "vpci.window.answered-while-worker-busy",
        "Config loads and retargets are answered while the bus's worker is held up in a request.",
        &["VP-6-06", "VP-7.1-10", "VP-7.2-17"],
        worker_busy,
    ),
    Check::new(
        "vpci.window.polled-during-create",
        "A guest that polls the vendor id during CREATE_INTERRUPT reads it at each step.",
        &["VP-7.1-10", "VP-6-06"],
        polled_during_create,
    )
    .on(SIM),
];

fn all_ones(bus: &Bus, gpa: u64) -> Verdict {
    for (width, ones) in ONES {
        let what = format!("a load of {width} bytes from the window");
        equal(what, bus.vm().load(0, gpa + 0x1000, width)?, ones)?;
    }
    Ok(())
}

fn window(context: &Context) -> Verdict {
    let bus = negotiated(context, 0x1_0004)?;
    all_ones(&bus, bus.window())?;
    equal("status", bus.d0_entry(bus.window())?, nt::SUCCESS)?;
    equal("vendor and device id", bus.config(0, 0, 4)?, 0x5650_1234)?;
    bus.set_config(0, 4, 2, 4)?;
    equal("status of D0 exit", bus.d0_exit()?, nt::SUCCESS)?;
    all_ones(&bus, bus.window())?;
    bus.set_config(0, 4, 2, 6)?;
    equal("status", bus.d0_entry(bus.window())?, nt::SUCCESS)?;
    equal("command register", bus.config(0, 4, 2)?, 0)
}

/// Places where no window can be.
fn bad_places() -> Vec<(&'static str, u64)> {
    vec![
        ("an unaligned address", LOW_MMIO + 0x800),
        ("an address off by four", LOW_MMIO + 4),
        ("RAM", 0x10_0000),
        ("address 0", 0),
        ("an address below the MMIO range", LOW_MMIO - 0x2000),
        ("half below the MMIO range", LOW_MMIO - 0x1000),
        ("half above the MMIO range", LOW_MMIO + (16 << 20) - 0x1000),
        ("an address between the ranges", 0xfee0_0000),
        ("the end of the address space", u64::MAX - 0xfff),
        ("beyond the high range", HIGH_MMIO + (4 << 30)),
    ]
}

fn fails(bus: &Bus, what: &str, gpa: u64) -> Verdict {
    let got = bus.d0_entry(gpa)?;
    let what = format!("D0 entry with the window at {what} fails, status {got:#x}");
    holds(what, got & 1 << 31 != 0)
}

fn bad_window(context: &Context) -> Verdict {
    let bus = negotiated(context, 0x1_0004)?;
    for (what, gpa) in bad_places() {
        fails(&bus, what, gpa)?;
        all_ones(&bus, bus.window())?;
    }
    let before = bus.vm().read(0x10_0000, 0x2000)?;
    bus.vm().write(0x10_1000, &[0xab; 4])?;
    holds(
        "RAM is still RAM",
        before != bus.vm().read(0x10_0000, 0x2000)?,
    )?;
    // The high range is as good as the low one, up to its last two pages.
    for gpa in [HIGH_MMIO, HIGH_MMIO + (4 << 30) - WINDOW_SIZE] {
        equal("status", bus.d0_entry(gpa)?, nt::SUCCESS)?;
        equal("the vendor id", bus.vm().load(0, gpa + 0x1000, 2)?, 0x1234)?;
    }
    Ok(())
}

/// Two usual buses in D0.
fn two(context: &Context) -> Result<[Bus; 2], Failure> {
    let vm = context.machine(&Setup {
        buses: vec![BusSetup::testdev(1), BusSetup::testdev(2)],
        ..Setup::default()
    })?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let mut offers = vmbus.offers()?;
    equal("number of offers", offers.len(), 2)?;
    let second = Bus::probe(&vmbus, &offers.remove(1), VERSIONS[0])?;
    Ok([Bus::probe(&vmbus, &offers.remove(0), VERSIONS[0])?, second])
}

fn window_of_another(context: &Context) -> Verdict {
    let [first, second] = two(context)?;
    let device = TestDev::start(&first, 0)?;
    equal("status of D0 exit", second.d0_exit()?, nt::SUCCESS)?;
    for (what, gpa) in [
        ("another bus's window", first.window()),
        (
            "the second page of another bus's window",
            first.window() + 0x1000,
        ),
        ("another bus's BAR", device.bar()),
        ("the end of another bus's BAR", device.bar() + 0x3000),
        ("the page before another bus's BAR", device.bar() - 0x1000),
    ] {
        fails(&second, what, gpa)?;
    }
    equal("the first bus's vendor id", first.config(0, 0, 2)?, 0x1234)?;
    equal(
        "status",
        second.d0_entry(device.bar() + 0x4000)?,
        nt::SUCCESS,
    )
}

fn retry(context: &Context) -> Verdict {
    let bus = negotiated(context, 0x1_0004)?;
    bus.relations()?;
    fails(&bus, "RAM", 0x10_0000)?;
    // Linux releases every slot that it knows, from the highest down, and then leaves D0.
    bus.released(slot(0))?;
    equal("status of D0 exit", bus.d0_exit()?, nt::SUCCESS)?;
    equal("status", bus.d0_entry(bus.window())?, nt::SUCCESS)?;
    equal("status of resources", bus.assigned(0)?, nt::SUCCESS)?;
    TestDev::start(&bus, 0).map(drop)
}

fn moved(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    let bus = device.bus();
    let (old, new) = (bus.window(), bus.window() + 0x10_0000);
    equal("status", bus.d0_entry(new)?, nt::SUCCESS)?;
    equal(
        "the vendor id there",
        bus.vm().load(0, new + 0x1000, 2)?,
        0x1234,
    )?;
    all_ones(bus, old)?;
    for (what, gpa) in bad_places() {
        fails(bus, what, gpa)?;
        equal(
            "the vendor id there",
            bus.vm().load(0, new + 0x1000, 2)?,
            0x1234,
        )?;
    }
    fails(bus, "the function's own BAR", device.bar())?;
    equal(
        "the vendor id there",
        bus.vm().load(0, new + 0x1000, 2)?,
        0x1234,
    )?;
    // The very place where it is, is free for it.
    equal("status", bus.d0_entry(new)?, nt::SUCCESS)?;
    equal("status", bus.d0_entry(old)?, nt::SUCCESS)?;
    all_ones(bus, new)?;
    equal("the vendor id", bus.config(0, 0, 2)?, 0x1234)
}

fn exit_releases(context: &Context) -> Verdict {
    let device = Plain::wide();
    let functions = vec![FunctionSetup::testdev(0), device.function(1)];
    let bus = bus_with(context, functions)?;
    let first = TestDev::start(&bus, 0)?;
    let interrupt = first.interrupt(0, 0x41, 1)?;
    bus.set_config(slot(1), 0x10, 4, LOW_MMIO + 0x20_0000)?;
    bus.set_config(slot(1), 4, 2, 6)?;
    let resets = device.resets();
    equal("status of D0 exit", bus.d0_exit()?, nt::SUCCESS)?;
    equal("resets of the second function", device.resets(), resets + 1)?;
    equal("a load from the first BAR", first.load(0, 4)?, 0xffff_ffff)?;
    let second = bus.vm().load(0, LOW_MMIO + 0x20_0000, 4)?;
    equal("a load from the second BAR", second, 0xffff_ffff)?;
    holds(
        "the second function has no DMA",
        !device.write(0x10_0000, &[1; 4]),
    )?;
    let retarget = bus.retarget(0, interrupt.message, 0x42, 1);
    let got = bus.kernel().retarget(0, &retarget)?;
    equal("status of a retarget", got, status::INVALID_PARAMETER)?;
    equal("status", bus.d0_entry(bus.window())?, nt::SUCCESS)?;
    for function in [0, 1] {
        equal("command register", bus.config(slot(function), 4, 2)?, 0)?;
        equal("BAR 0", bus.config(slot(function), 0x10, 4)? & !0xf, 0)?;
    }
    Ok(())
}

fn exit_at_any_time(context: &Context) -> Verdict {
    let bus = negotiated(context, 0x1_0004)?;
    equal("status before D0 entry", bus.d0_exit()?, nt::SUCCESS)?;
    equal("status", bus.d0_entry(bus.window())?, nt::SUCCESS)?;
    equal("status after D0 entry", bus.d0_exit()?, nt::SUCCESS)?;
    equal("status after D0 exit", bus.d0_exit()?, nt::SUCCESS)?;
    equal("status", bus.d0_entry(bus.window())?, nt::SUCCESS)?;
    equal("the vendor id", bus.config(0, 0, 2)?, 0x1234)
}

fn resume(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    let before = [
        device.interrupt(0, 0x41, 0)?.message,
        device.interrupt(1, 0x42, 1)?.message,
    ];
    let bus = device.bus();
    let described = bus.relations()?;
    let bars = bus.requirements(0)?;
    bus.released(0)?;
    bus.unbind()?;
    bus.vmbus().unload()?;
    let vmbus = VmBus::connect(bus.kernel())?;
    let again = Bus::new(vmbus.open(&vmbus.only_offer()?)?, 0);
    equal(
        "status of the old version",
        again.negotiate(bus.version())?,
        nt::SUCCESS,
    )?;
    equal("functions", again.relations()?, described)?;
    equal(
        "status of D0 entry",
        again.d0_entry(bus.window())?,
        nt::SUCCESS,
    )?;
    equal("status of resources", again.assigned(0)?, nt::SUCCESS)?;
    equal("probed BARs", again.requirements(0)?, bars)?;
    let device = TestDev::start(&again, 0)?;
    for (entry, old) in (0..).zip(before) {
        again.delete(0, old)?;
        let new = again.must_create(&Create::one(0, 0x50 + entry as u8, 1))?;
        equal("the message that the guest gets", new, old)?;
        device.set_entry(entry, new.address, new.data, false)?;
    }
    device.enable_msix(true)?;
    device.raise(1)?;
    again.vm().expect_interrupt(1, 0x51)
}

/// A bus with `testdev` as function 0 and another device as function 1.
fn two_functions(context: &Context) -> Result<Bus, Failure> {
    let functions = vec![FunctionSetup::testdev(0), Plain::wide().function(1)];
    bus_with(context, functions)
}

fn device_id(bus: &Bus, vp: u32) -> Result<u64, Failure> {
    Ok(bus.vm().load(vp, bus.window() + 0x1002, 2)?)
}

fn slot_register(context: &Context) -> Verdict {
    let bus = two_functions(context)?;
    let (vm, window) = (bus.vm(), bus.window());
    vm.store(0, window, 4, slot(1).into())?;
    equal(
        "device id behind slot 1",
        device_id(&bus, 0)?,
        devices::DEVICE.into(),
    )?;
    for (offset, width) in [
        (0, 1),
        (0, 2),
        (0, 8),
        (1, 1),
        (2, 2),
        (4, 4),
        (8, 8),
        (0xffc, 4),
    ] {
        vm.store(0, window + offset, width, 0)?;
        let what = format!("device id after a store of {width} bytes at {offset:#x}");
        equal(what, device_id(&bus, 0)?, devices::DEVICE.into())?;
    }
    for (width, ones) in ONES {
        for offset in [0, 4, 8, 0x800, 0x1000 - width as u64] {
            let what = format!("a load of {width} bytes at {offset:#x}");
            equal(what, vm.load(0, window + offset, width)?, ones)?;
        }
    }
    vm.store(0, window, 4, 0)?;
    equal("device id behind slot 0", device_id(&bus, 0)?, 0x5650)
}

fn slot_of_the_bus(context: &Context) -> Verdict {
    let bus = two_functions(context)?;
    bus.vm().store(1, bus.window(), 4, slot(1).into())?;
    for vp in [0, 1, 0, 1] {
        equal(
            "device id behind slot 1",
            device_id(&bus, vp)?,
            devices::DEVICE.into(),
        )?;
    }
    bus.requirements(0)?;
    equal(
        "device id after a request",
        device_id(&bus, 0)?,
        devices::DEVICE.into(),
    )?;
    bus.vm().store(0, bus.window(), 4, 0)?;
    equal("device id for the other VP", device_id(&bus, 1)?, 0x5650)
}

fn unknown_slot(context: &Context) -> Verdict {
    let bus = two_functions(context)?;
    let known = bus.config(0, 4, 4)?;
    for slot in [1, 0x1f, 0x40, 0xff, 0x100, 0x120, 0x8000_0000, 0xffff_ffff] {
        for (width, ones) in ONES {
            for offset in [0, 4, 0x10, 0x40, 0xffc] {
                let what = format!("{width} bytes at {offset:#x} of slot {slot:#x}");
                equal(what, bus.config(slot, offset, width)?, ones)?;
            }
        }
        bus.set_config(slot, 4, 2, 6)?;
        bus.set_config(slot, 0x10, 4, 0xffff_ffff)?;
    }
    equal("command and status of slot 0", bus.config(0, 4, 4)?, known)?;
    equal("BAR 0 of slot 0", bus.config(0, 0x10, 4)?, 4)
}

fn worker_busy(context: &Context) -> Verdict {
    let device = Plain::wide();
    let functions = vec![device.function(0), FunctionSetup::testdev(1)];
    let bus = bus_with(context, functions)?;
    let message = bus.must_create(&Create::one(slot(1), 0x60, 0))?;
    device.hold_resets();
    let release = Bytes::words(&[message::RESOURCES_RELEASED, 0]);
    thread::scope(|scope| {
        let worker = scope.spawn(|| -> Verdict {
            bus.send(&release.0)?;
            bus.vm().settle();
            Ok(())
        });
        let meanwhile = || -> Verdict {
            holds("the worker is held up", device.is_held())?;
            for _ in 0..20 {
                bus.vm().store(1, bus.window(), 4, slot(1).into())?;
                let vendor = bus.vm().load(1, bus.window() + 0x1000, 2)?;
                equal("the vendor id of the other function", vendor, 0x1234)?;
                bus.vm().store(1, bus.window(), 4, 0)?;
                let vendor = bus.vm().load(1, bus.window() + 0x1000, 2)?;
                equal("the vendor id", vendor, 0x1234)?;
                let retarget = bus.retarget(slot(1), message, 0x61, 1);
                bus.kernel().must_retarget(1, &retarget)?;
            }
            Ok(())
        };
        let result = meanwhile();
        device.let_go();
        match worker.join() {
            Ok(done) => result.and(done),
            Err(_) => Err(Failure::Host("the thread of the request panicked".into())),
        }
    })
}

fn polled_during_create(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for id in 1..=8 {
        let create = Create::one(0, 0xef, 0).encode(bus.version());
        bus.channel().send(&Packet::request(id, &create.0))?;
        let mut polls = 0;
        loop {
            equal("the vendor id", bus.config(0, 0, 2)?, 0x1234)?;
            if let Some((packet, _)) = bus.channel().to_guest.receive()? {
                equal("transaction id of the completion", packet.id, id)?;
                break;
            }
            polls += 1;
            holds("an answer comes at last", bus.vm().step() || polls < 2)?;
        }
        holds("the answer took a step of the worker", polls > 0)?;
    }
    Ok(())
}
