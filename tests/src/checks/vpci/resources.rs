//! Resources of a function: asked for, assigned, told, released (docs/spec/vpci.md, section 5).
#![forbid(unsafe_code)]

use super::{bus_with, in_d0, negotiated, versions};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::devices::Plain;
use crate::host::{FunctionSetup, HIGH_MMIO, LOW_MMIO};
use crate::model::kernel::{Kernel, status};
use crate::model::testdev::{MAGIC, TestDev};
use crate::model::vmbus::VmBus;
use crate::model::vpci::{Bus, Create, message, nt, slot};
use crate::model::wire::{Bytes, u16_at, u32_at, u64_at};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vpci.requirements.probed-bars",
        "Before D0 the requirements tell what each BAR reads after a store of all ones.",
        &["VP-5-03", "VP-4-06", "VP-4-07", "VP-3.1-05"],
        probed_bars,
    ),
    Check::new(
        "vpci.requirements.unknown-slot",
        "A slot that names no function, or has reserved bits set, is malformed everywhere.",
        &["VP-11-04", "VP-3-07", "VP-3.2-01"],
        unknown_slot,
    ),
    Check::new(
        "vpci.resources.assigned-empty",
        "The empty list of Linux is taken at every version and echoed; BARs are then 0.",
        &[
            "VP-5-07",
            "VP-4-10",
            "VP-4-11",
            "VP-4-12",
            "VP-3.1-12",
            "VP-3.1-16",
        ],
        assigned_empty,
    ),
    Check::new(
        "vpci.resources.assigned-bars",
        "Memory of a list is where the BARs are once decode is on, and GET_RESOURCES tells it.",
        &["VP-5-07", "VP-4-22", "VP-4-23", "VP-4-33", "VP-3.1-06"],
        assigned_bars,
    ),
    Check::new(
        "vpci.resources.assigned-interrupts",
        "Interrupts of a list come back as live messages, in each of its three forms.",
        &["VP-5-07", "VP-4-10", "VP-4-11", "VP-4-12", "VP-3.1-19"],
        assigned_interrupts,
    ),
    Check::new(
        "vpci.resources.bad-memory",
        "Memory that is not the size of its BAR, or not aligned, is refused; nothing changes.",
        &["VP-4-33", "VP-5-07"],
        bad_memory,
    ),
    Check::new(
        "vpci.resources.bad-counts",
        "More interrupts than the payload holds, or than 494, are malformed.",
        &["VP-11-02", "VP-5-07"],
        bad_counts,
    ),
    Check::new(
        "vpci.resources.all-or-nothing",
        "One impossible interrupt in a list leaves none of the list mapped.",
        &["VP-5-07", "VP-11-07"],
        all_or_nothing,
    ),
    Check::new(
        "vpci.resources.released",
        "Released, a function decodes nothing, its BARs are 0 and its messages unmapped; again too.",
        &["VP-5-08", "VP-4-13", "VP-3.1-12"],
        released,
    ),
    Check::new(
        "vpci.resources.released-one",
        "Releasing one function leaves the others alone.",
        &["VP-5-08"],
        released_one,
    ),
    Check::new(
        "vpci.resources.before-d0",
        "Resources, power and interrupts are refused before D0 and after it.",
        &["VP-11-01"],
        before_d0,
    ),
    Check::new(
        "vpci.resources.nothing-placed",
        "GET_RESOURCES tells of no memory while nothing is placed.",
        &["VP-4-23", "VP-4-33"],
        nothing_placed,
    ),
];

fn probed_bars(context: &Context) -> Verdict {
    let device = Plain::wide();
    let vm = context.machine(&super::with(vec![device.function(0)]))?;
    let bus = super::open(&vm)?;
    equal("status", bus.negotiate(0x1_0004)?, nt::SUCCESS)?;
    let expected = [
        0xffff_0000,
        0xffff_c00c,
        0xffff_ffff,
        0xc000_0004,
        0xffff_ffff,
        0xffff_f000,
    ];
    equal("probed BARs", bus.requirements(0)?, expected)?;
    // Nor do they depend on where the BARs are.
    equal("status of D0", bus.d0_entry(bus.window())?, nt::SUCCESS)?;
    bus.set_config(0, 0x10, 4, LOW_MMIO + 0x10_0000)?;
    bus.place_bar(0, 1, HIGH_MMIO)?;
    equal("probed BARs once placed", bus.requirements(0)?, expected)?;
    let low = bus.config(0, 0x10, 4)?;
    equal("BAR 0 after that", low, LOW_MMIO + 0x10_0000)
}

fn unknown_slot(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let bad_slots = [1, 0x1f, 0x20, 0xe0, 0x100, 0x8000_0000, u32::MAX];
    for slot in bad_slots {
        let by_slot = [
            Bytes::words(&[message::QUERY_RESOURCE_REQUIREMENTS, slot]),
            Bytes::words(&[message::GET_RESOURCES, slot]),
            Bytes::words(&[message::POWER_STATE_CHANGE, slot, 1]),
            Bytes::words(&[message::RESOURCES_ASSIGNED, slot]),
            Bytes::words(&[message::RESOURCES_ASSIGNED2, slot]),
            Bytes::words(&[message::RESOURCES_ASSIGNED3, slot]),
            Bytes::words(&[message::RESOURCES_RELEASED, slot]),
            Bytes::words(&[message::EJECTION_COMPLETE, slot]),
            Bytes::words(&[message::DELETE_INTERRUPT, slot]),
            Bytes::words(&[message::DELETE_INTERRUPT2, slot]),
            Bytes::words(&[message::READ_BLOCK, 0, slot]),
            Bytes::words(&[message::WRITE_BLOCK, 0, slot]),
            Bytes::words(&[message::RESET_DEVICE, slot]),
            Bytes::words(&[message::TDISP, slot]),
            Create::one(slot, 0x60, 0).encode(0x1_0001),
            Create::one(slot, 0x60, 0).encode(0x1_0002),
            Create::one(slot, 0x60, 0).encode(0x1_0004),
        ];
        for request in by_slot {
            let number = u32_at(&request.0, 0) & 0xff;
            let request = match number {
                0x14 | 0x17 | 0x1b => request.0,
                _ => request.up_to(256).0,
            };
            let what = format!("status of message {number:#x} for slot {slot:#x}");
            equal(what, bus.request(&request)?.status, nt::BAD_DATA)?;
        }
    }
    Ok(())
}

fn assigned_empty(context: &Context) -> Verdict {
    for version in versions() {
        let vm = context.usual()?;
        let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
        let bus = Bus::probe(&vmbus, &vmbus.only_offer()?, version)?;
        bus.place_bar(0, 0, HIGH_MMIO)?;
        let forms: &[(u32, usize)] = match version {
            0x1_0001 => &[(message::RESOURCES_ASSIGNED, 148)],
            0x1_0004 => &[
                (message::RESOURCES_ASSIGNED2, 202),
                (message::RESOURCES_ASSIGNED3, 216),
            ],
            _ => &[(message::RESOURCES_ASSIGNED2, 202)],
        };
        for (number, len) in forms {
            let reply = bus.request(&Bytes::words(&[*number, 0]).up_to(*len).0)?;
            equal("status", reply.status, nt::SUCCESS)?;
            equal("reply behind the status", reply.payload, vec![0; 136])?;
            equal("BAR 0", bus.config(0, 0x10, 4)?, 4)?;
            equal("upper half of BAR 0", bus.config(0, 0x14, 4)?, 0)?;
        }
    }
    Ok(())
}

/// A descriptor of 20 bytes.
fn memory(kind: u8, flags: u16, address: u64, length: u32) -> Bytes {
    Bytes::new()
        .u8(kind)
        .u8(0)
        .u16(flags)
        .u64(address)
        .u32(length)
        .u32(0)
}

/// RESOURCES_ASSIGNED2 for slot 0 with these descriptors, the rest none, and `count` interrupts.
fn assigned(number: u32, bars: &[(usize, Bytes)], count: u32) -> Bytes {
    let mut request = Bytes::words(&[number, 0]);
    for bar in 0..6 {
        let found = bars.iter().find(|(index, _)| *index == bar);
        let none = Bytes::new().up_to(20);
        request = request.bytes(&found.map_or(none, |(_, memory)| memory.clone()).0);
    }
    request.u32(count).u32(0)
}

fn assigned_bars(context: &Context) -> Verdict {
    let device = Plain::wide();
    let bus = bus_with(context, vec![device.function(0)])?;
    let (a, b) = (LOW_MMIO + 0x20_0000, HIGH_MMIO + 0x4_0000);
    let (c, d) = (HIGH_MMIO + (1 << 30), LOW_MMIO + 0x30_0000);
    let bars = [
        (0, memory(3, 0, a, 0x1_0000)),
        (1, memory(3, 0, b, 0x4000)),
        // A large one, in units of 2^16.
        (3, memory(7, 1 << 10, c, 1 << 14)),
        (5, memory(3, 0, d, 0x1000)),
    ];
    let request = assigned(message::RESOURCES_ASSIGNED2, &bars, 0);
    let reply = bus.request(&request.0)?;
    equal("status", reply.status, nt::SUCCESS)?;
    equal(
        "list in the reply",
        &reply.payload[8..128],
        &request.0[8..128],
    )?;
    equal(
        "a load before decode is on",
        bus.vm().load(0, a, 4)?,
        0xffff_ffff,
    )?;
    bus.set_config(0, 4, 2, 2)?;
    for (bar, gpa) in [(0, a), (1, b), (3, c), (5, d)] {
        let what = format!("a load from BAR {bar}");
        equal(what, bus.vm().load(0, gpa + 8, 4)?, Plain::value(bar, 8))?;
    }
    let words = [message::GET_RESOURCES, 0, 0, 0, 0, 0, 0, 0];
    let reply = bus.request(&Bytes::words(&words).0)?.payload;
    equal("bytes of the resources", reply.len(), 128)?;
    equal(
        "version and revision",
        (u16_at(&reply, 0), u16_at(&reply, 2)),
        (1, 1),
    )?;
    equal("number of resources", u32_at(&reply, 4), 6)?;
    let places = [
        (a, 0x1_0000),
        (b, 0x4000),
        (0, 0),
        (c, 1 << 30),
        (0, 0),
        (d, 0x1000u32),
    ];
    for (bar, (address, length)) in places.into_iter().enumerate() {
        let at = 8 + 20 * bar;
        let kind = if length == 0 { 0 } else { 3 };
        equal(format!("type of resource {bar}"), reply[at], kind)?;
        let place = (u64_at(&reply, at + 4), u32_at(&reply, at + 12));
        equal(format!("place of resource {bar}"), place, (address, length))?;
    }
    Ok(())
}

/// An interrupt in a list, in the form of its message.
fn entry(number: u32, vector: u8, count: u16, vp: u16) -> Bytes {
    let bytes = Bytes::new();
    match number {
        message::RESOURCES_ASSIGNED => bytes.u8(vector).u8(0).u16(count).u32(0).u64(1 << vp),
        message::RESOURCES_ASSIGNED2 => bytes.u8(vector).u8(0).u16(count).u16(1).u16(vp).up_to(72),
        _ => {
            let bytes = bytes.u32(vector.into()).u8(0).u8(0).u16(count);
            bytes.u16(1).u16(vp).up_to(80)
        }
    }
}

fn assigned_interrupts(context: &Context) -> Verdict {
    let forms = [
        (message::RESOURCES_ASSIGNED, 16),
        (message::RESOURCES_ASSIGNED2, 72),
        (message::RESOURCES_ASSIGNED3, 72),
    ];
    for (number, step) in forms {
        let device = TestDev::bring_up(&context.usual()?)?;
        let bus = device.bus();
        let request = assigned(number, &[], 2)
            .bytes(&entry(number, 0x71, 1, 0).0)
            .bytes(&entry(number, 0x80, 4, 1).0);
        let reply = bus.request(&request.0)?;
        equal("status", reply.status, nt::SUCCESS)?;
        equal("interrupts in the reply", u32_at(&reply.payload, 128), 2)?;
        let len = (136 + 2 * step as usize).next_multiple_of(8);
        equal("bytes of the reply", reply.payload.len(), len)?;
        // It also placed the BAR nowhere.
        bus.place_bar(0, 0, device.bar())?;
        device.set_command(6)?;
        device.enable_msix(true)?;
        let messages = [(0, 0, 0x71, 0, 1), (1, 0, 0x80, 1, 4), (1, 3, 0x83, 1, 4)];
        for (index, offset, vector, vp, count) in messages {
            let at = 136 + index * step as usize;
            equal(
                "messages of an interrupt",
                u16_at(&reply.payload, at + 2),
                count,
            )?;
            let data = u32_at(&reply.payload, at + 4) + offset;
            device.set_entry(0, u64_at(&reply.payload, at + 8), data, false)?;
            bus.vm().take_interrupts(vp)?;
            device.raise(0)?;
            bus.vm().expect_interrupt(vp, vector)?;
        }
    }
    Ok(())
}

fn bad_memory(context: &Context) -> Verdict {
    let device = Plain::wide();
    let bus = bus_with(context, vec![device.function(0)])?;
    let good = LOW_MMIO + 0x20_0000;
    bus.set_config(0, 0x10, 4, good)?;
    let bad = [
        ("half the size", 0, memory(3, 0, good, 0x8000)),
        ("twice the size", 0, memory(3, 0, good, 0x2_0000)),
        ("no size", 0, memory(3, 0, good, 0)),
        ("unaligned", 0, memory(3, 0, good + 0x1000, 0x1_0000)),
        (
            "above 4 GiB in a 32-bit BAR",
            0,
            memory(3, 0, HIGH_MMIO, 0x1_0000),
        ),
        (
            "memory for the upper half of a BAR",
            2,
            memory(3, 0, HIGH_MMIO, 0x4000),
        ),
        ("a port", 0, memory(1, 0, good, 0x1_0000)),
        (
            "a large one of the wrong scale",
            3,
            memory(7, 1 << 9, HIGH_MMIO, 1 << 14),
        ),
        ("an unknown type", 0, memory(0x77, 0, good, 0x1_0000)),
    ];
    for (what, bar, descriptor) in bad {
        let request = assigned(message::RESOURCES_ASSIGNED2, &[(bar, descriptor)], 0);
        let got = bus.request(&request.0)?.status;
        holds(format!("{what} gets a failure"), got & 1 << 31 != 0)?;
        equal("BAR 0 after that", bus.config(0, 0x10, 4)?, good)?;
    }
    Ok(())
}

fn bad_counts(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let number = message::RESOURCES_ASSIGNED;
    for (count, entries) in [
        (1, 0),
        (2, 1),
        (494, 240),
        (495, 0),
        (u32::MAX, 1),
        (0x1000_0000, 4),
    ] {
        let mut request = assigned(number, &[], count);
        for _ in 0..entries {
            request = request.bytes(&entry(number, 0x60, 1, 0).0);
        }
        let what = format!("status of {count:#x} interrupts with room for {entries}");
        equal(what, bus.request(&request.0)?.status, nt::BAD_DATA)?;
    }
    let next = bus.must_create(&Create::one(0, 0x60, 0))?;
    equal("data of the next message", next.data, 0)
}

fn all_or_nothing(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for number in [
        message::RESOURCES_ASSIGNED,
        message::RESOURCES_ASSIGNED2,
        message::RESOURCES_ASSIGNED3,
    ] {
        for bad in [
            entry(number, 5, 1, 0),
            entry(number, 0x60, 0, 0),
            entry(number, 0x60, 1, 9),
        ] {
            let request = assigned(number, &[], 3)
                .bytes(&entry(number, 0x60, 1, 0).0)
                .bytes(&entry(number, 0x70, 8, 1).0)
                .bytes(&bad.0);
            let got = bus.request(&request.0)?.status;
            holds("a failure", got & 1 << 31 != 0)?;
        }
    }
    for data in 0..3 {
        let next = bus.must_create(&Create::one(0, 0x60, 0))?;
        equal("data of the next message", next.data, data)?;
    }
    Ok(())
}

fn released(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    let interrupt = device.interrupt(0, 0x41, 1)?;
    let bus = device.bus();
    for round in ["released", "released again"] {
        bus.released(device.slot())?;
        equal(format!("command, {round}"), bus.config(0, 4, 2)?, 0)?;
        equal(format!("BAR 0, {round}"), bus.config(0, 0x10, 4)?, 4)?;
        equal(
            format!("its upper half, {round}"),
            bus.config(0, 0x14, 4)?,
            0,
        )?;
        equal(
            format!("a load from the BAR, {round}"),
            device.load(0, 4)?,
            0xffff_ffff,
        )?;
        let retarget = bus.retarget(device.slot(), interrupt.message, 0x42, 1);
        let got = bus.kernel().retarget(0, &retarget)?;
        equal(format!("retarget, {round}"), got, status::INVALID_PARAMETER)?;
    }
    // The function can be used again without another D0 entry.
    equal("status", bus.assigned(0)?, nt::SUCCESS)?;
    let device = TestDev::start(bus, 0)?;
    device.interrupt(0, 0x41, 1)?;
    device.raise(0)?;
    bus.vm().expect_interrupt(1, 0x41)
}

fn released_one(context: &Context) -> Verdict {
    let bus = bus_with(
        context,
        vec![FunctionSetup::testdev(0), FunctionSetup::testdev(1)],
    )?;
    let first = TestDev::start(&bus, 0)?;
    let second = TestDev::start(&bus, 1)?;
    second.interrupt(0, 0x41, 1)?;
    bus.released(slot(0))?;
    equal("a load from the first BAR", first.load(0, 4)?, 0xffff_ffff)?;
    equal("a load from the second BAR", second.load(0, 4)?, MAGIC)?;
    second.raise(0)?;
    bus.vm().expect_interrupt(1, 0x41)
}

/// Requests that need D0, each of which must be refused.
fn refused(bus: &Bus) -> Result<(), Failure> {
    let requests = [
        Bytes::words(&[message::RESOURCES_ASSIGNED2, 0]).up_to(202),
        Bytes::words(&[message::POWER_STATE_CHANGE, 0, 1, 0]),
        Create::one(0, 0x60, 0).encode(0x1_0004),
    ];
    for request in requests {
        let got = bus.request(&request.0)?.status;
        let what = format!("message {:#x} is refused", u32_at(&request.0, 0) & 0xff);
        holds(what, got & 1 << 31 != 0)?;
    }
    Ok(())
}

fn before_d0(context: &Context) -> Verdict {
    let bus = negotiated(context, 0x1_0004)?;
    refused(&bus)?;
    // Those that ask for nothing to be there are good in any state.
    bus.released(0)?;
    let words = [message::DELETE_INTERRUPT, 0, 1 << 16, 0, 0xfee0_0000, 0];
    equal("status of a delete", bus.status(&words)?, nt::SUCCESS)?;
    equal("status of D0", bus.d0_entry(bus.window())?, nt::SUCCESS)?;
    equal("command register", bus.config(0, 4, 2)?, 0)?;
    equal("status of D0 exit", bus.d0_exit()?, nt::SUCCESS)?;
    refused(&bus)
}

fn nothing_placed(context: &Context) -> Verdict {
    let bus = negotiated(context, 0x1_0004)?;
    let words = [message::GET_RESOURCES, 0, 0, 0, 0, 0, 0, 0];
    let reply = bus.request(&Bytes::words(&words).0)?.payload;
    equal("bytes of the resources", reply.len(), 128)?;
    equal("head", &reply[..8], &[1, 0, 1, 0, 6, 0, 0, 0])?;
    equal("descriptors", &reply[8..], &[0; 120])
}
