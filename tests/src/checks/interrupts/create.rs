//! CREATE_INTERRUPT in its three forms (docs/spec/vpci.md, section 7.1).
#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use super::{arrive, bus, device, with_vps};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::host::BusSetup;
use crate::host::{FunctionSetup, Setup};
use crate::model::kernel::Kernel;
use crate::model::testdev::TestDev;
use crate::model::vmbus::VmBus;
use crate::model::vpci::{Bus, Create, Message, VERSIONS, message, nt, slot};
use crate::model::wire::Bytes;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "interrupts.create.each-form",
        "Each version's CREATE_INTERRUPT gives a message that goes to its vector and VP.",
        &[
            "VP-4-15",
            "VP-4-16",
            "VP-4-17",
            "VP-4-18",
            "VP-4-32",
            "VP-7.1-01",
            "VP-3.1-15",
            "VP-3.1-17",
            "VP-3.1-19",
        ],
        each_form,
    ),
    Check::new(
        "interrupts.create.count",
        "The reply's message count is that of the request, for every count.",
        &["VP-7.1-03", "VP-7.1-04"],
        count,
    ),
    Check::new(
        "interrupts.create.handle",
        "Messages have an address below 4 GiB that MSI can hold, and differ from each other.",
        &["VP-7.1-02", "VP-7.1-01"],
        handle,
    ),
    Check::new(
        "interrupts.create.aligned",
        "A block's data is aligned to its count rounded up to a power of two; blocks never meet.",
        &["VP-7.1-04"],
        aligned,
    ),
    Check::new(
        "interrupts.create.lowest-first",
        "The same requests in the same order get the same messages again.",
        &["VP-7.1-12"],
        lowest_first,
    ),
    Check::new(
        "interrupts.create.bad-count",
        "A count of 0, or of more than 32, is refused and maps nothing.",
        &["VP-7.1-04", "VP-11-02"],
        bad_count,
    ),
    Check::new(
        "interrupts.create.bad-vector",
        "Vectors outside 0x10 to 0xff are refused, also as the last of a block.",
        &["VP-11-07"],
        bad_vector,
    ),
    Check::new(
        "interrupts.create.bad-mode",
        "Delivery modes 0 and 1 are taken, every other one is refused.",
        &["VP-4-34"],
        bad_mode,
    ),
    Check::new(
        "interrupts.create.vp-list",
        "A list of 1 to 32 existing VPs is taken; one that is empty, longer or names others is not.",
        &["VP-7.1-06", "VP-11-08", "VP-11-02"],
        vp_list,
    ),
    Check::new(
        "interrupts.create.vp-mask",
        "Version 1.1's mask of all ones means any VP; a mask without an existing VP is refused.",
        &["VP-7.1-05", "VP-11-08"],
        vp_mask,
    ),
    Check::new(
        "interrupts.create.limit",
        "A function has 494 live messages and no more; one deleted makes room for one.",
        &["VP-11-12"],
        limit,
    ),
    Check::new(
        "interrupts.create.limit-is-the-functions",
        "A function that has all its messages takes none from another.",
        &["VP-11-12"],
        limit_of_one,
    ),
    Check::new(
        "interrupts.create.completion-interrupt",
        "The completion raises the channel's interrupt although Linux polls for it.",
        &["VP-7.1-10"],
        completion_interrupt,
    ),
    Check::new(
        "interrupts.create.any-state-of-the-device",
        "An interrupt can be created with decode, bus mastering and MSI-X off.",
        &["VP-7.1-11"],
        any_state,
    ),
];

/// The usual device at a protocol version.
fn device_at(context: &Context, version: u32) -> Result<TestDev, Failure> {
    let vm = context.usual()?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let bus = Bus::probe(&vmbus, &vmbus.only_offer()?, version)?;
    TestDev::start(&bus, 0)
}

fn each_form(context: &Context) -> Verdict {
    for version in VERSIONS {
        let device = device_at(context, version)?;
        let bus = device.bus();
        device.enable_msix(true)?;
        for (entry, vp) in [(0, 0), (1, 1)] {
            let vector = 0x61 + entry as u8;
            let mut create = Create::one(0, vector, vp as u16).encode(version);
            if version == 0x1_0001 {
                // Linux sends all ones; here one VP is named.
                create.0[16..24].copy_from_slice(&(1u64 << vp).to_le_bytes());
            }
            let reply = bus.request(&create.0)?;
            equal("status", reply.status, nt::SUCCESS)?;
            equal("reserved dword", &reply.payload[4..8], &[0; 4])?;
            equal("reserved word", &reply.payload[8..10], &[0; 2])?;
            let word = |at: usize| crate::model::wire::u32_at(&reply.payload, at);
            device.set_entry(entry, word(16).into(), word(12), false)?;
            device.raise(entry)?;
            let what = format!("version {version:#x}");
            arrive(&what, bus.vm(), &[(vp, vector)])?;
        }
    }
    Ok(())
}

fn block(count: u16) -> Create {
    Create {
        count,
        ..Create::one(0, 0x40, 0)
    }
}

fn count(context: &Context) -> Verdict {
    for version in VERSIONS {
        let device = device_at(context, version)?;
        for count in 1..=32 {
            let message = device.bus().must_create(&block(count))?;
            equal("messages of the reply", message.count, count)?;
            device.bus().delete(0, message)?;
        }
    }
    Ok(())
}

fn handle(context: &Context) -> Verdict {
    let bus = bus(context)?;
    let mut seen = BTreeSet::new();
    for count in [1, 1, 4, 1, 32, 2, 3, 1] {
        let message = bus.must_create(&block(count))?;
        equal("upper half of the address", message.address >> 32, 0)?;
        equal("low bits of the address", message.address & 3, 0)?;
        holds("the address is not 0", message.address != 0)?;
        holds(
            "MSI can hold the data",
            message.data + u32::from(count) <= 0x1_0000,
        )?;
        for index in 0..u32::from(count) {
            let fresh = seen.insert((message.address, message.data + index));
            holds("no other message is the same", fresh)?;
        }
    }
    Ok(())
}

fn aligned(context: &Context) -> Verdict {
    let bus = bus(context)?;
    let mut taken: Vec<(u32, u32)> = Vec::new();
    for count in [1, 3, 2, 5, 1, 32, 7, 17, 4, 1] {
        let data = bus.must_create(&block(count))?.data;
        let len = u32::from(count).next_power_of_two();
        equal(
            format!("low bits of the data of {count} messages"),
            data % len,
            0,
        )?;
        let apart = |(start, end): &(u32, u32)| data + len <= *start || *end <= data;
        holds("blocks do not meet", taken.iter().all(apart))?;
        taken.push((data, data + len));
    }
    Ok(())
}

fn lowest_first(context: &Context) -> Verdict {
    let bus = bus(context)?;
    let create = |bus: &Bus| -> Result<Vec<Message>, Failure> {
        let counts = [1, 1, 4, 1, 8];
        counts
            .map(|count| bus.must_create(&block(count)))
            .into_iter()
            .collect()
    };
    let first = create(&bus)?;
    bus.delete(0, first[1])?;
    equal(
        "the message of a gap",
        bus.must_create(&block(1))?,
        first[1],
    )?;
    bus.released(0)?;
    equal("messages after a release", create(&bus)?, first.clone())?;
    equal("status of D0 exit", bus.d0_exit()?, nt::SUCCESS)?;
    equal(
        "status of D0 entry",
        bus.d0_entry(bus.window())?,
        nt::SUCCESS,
    )?;
    equal("messages after D0", create(&bus)?, first)
}

/// Demands that each request fails at each version that can carry it, and maps nothing.
fn refused(context: &Context, cases: &[(&str, Create)]) -> Verdict {
    for version in VERSIONS {
        let device = device_at(context, version)?;
        let bus = device.bus();
        for (what, create) in cases {
            if create.vector > 0xff && version != VERSIONS[0] {
                continue;
            }
            let (status, _) = bus.create(create)?;
            let what = format!("version {version:#x}: {what} is refused, not {status:#x}");
            holds(what, status & 1 << 31 != 0)?;
        }
        let next = bus.must_create(&Create::one(0, 0x60, 0))?;
        equal("data of the first message", next.data, 0)?;
    }
    Ok(())
}

fn bad_count(context: &Context) -> Verdict {
    let cases = [0, 33, 64, 0x100, 0xffff].map(|count| ("the count", block(count)));
    refused(context, &cases)
}

fn bad_vector(context: &Context) -> Verdict {
    let create = |vector, count| Create {
        vector,
        count,
        ..Create::one(0, 0, 0)
    };
    let cases = [
        ("vector 0", create(0, 1)),
        ("vector 15", create(15, 1)),
        ("vector 0x100", create(0x100, 1)),
        ("vector 0x141", create(0x141, 1)),
        ("vector 0xffffffff", create(u32::MAX, 1)),
        ("the last of 16 from 0xf1", create(0xf1, 16)),
        ("the last of 2 from 0xff", create(0xff, 2)),
    ];
    refused(context, &cases)?;
    let bus = bus(context)?;
    for (vector, count) in [(0x10, 1), (0xff, 1), (0xf0, 16), (0xe0, 32)] {
        bus.must_create(&create(vector, count))?;
    }
    Ok(())
}

fn bad_mode(context: &Context) -> Verdict {
    let create = |mode| Create {
        mode,
        ..Create::one(0, 0x60, 0)
    };
    let cases = [2, 3, 4, 5, 7, 0x10, 0xff].map(|mode| ("the mode", create(mode)));
    refused(context, &cases)?;
    let bus = bus(context)?;
    bus.must_create(&create(0))?;
    bus.must_create(&create(1)).map(drop)
}

fn vp_list(context: &Context) -> Verdict {
    let list = |vp_count, vps: &[u16]| Create {
        vp_count,
        vps: vps.to_vec(),
        ..Create::one(0, 0x60, 0)
    };
    for version in &VERSIONS[..3] {
        let device = device_at(context, *version)?;
        let bus = device.bus();
        let many: Vec<u16> = (0..32).map(|index| index % 2).collect();
        for vps in [&[1][..], &[0, 1], &many] {
            bus.must_create(&list(vps.len() as u16, vps))?;
        }
        let mut last = many.clone();
        last[31] = 2;
        let bad = [
            list(0, &[0]),
            list(33, &many),
            list(0xffff, &many),
            list(1, &[2]),
            list(1, &[0xffff]),
            list(2, &[0, 2]),
            list(32, &last),
        ];
        for create in bad {
            let (status, _) = bus.create(&create)?;
            let what = format!("{} of {:?} is refused", create.vp_count, create.vps);
            holds(what, status & 1 << 31 != 0)?;
        }
        // What lies behind the count says nothing.
        bus.must_create(&list(31, &last))?;
    }
    Ok(())
}

fn vp_mask(context: &Context) -> Verdict {
    let device = device_at(context, 0x1_0001)?;
    let bus = device.bus();
    let create = |mask: u64| {
        let head = Bytes::words(&[message::CREATE_INTERRUPT, 0]).u8(0x60).u8(0);
        bus.request(&head.u16(1).u32(0).u64(mask).0)
    };
    for mask in [u64::MAX, 1, 2, 3] {
        equal(
            format!("status of mask {mask:#x}"),
            create(mask)?.status,
            nt::SUCCESS,
        )?;
    }
    for mask in [0, 4, 1 << 63, 0xffff_fffc] {
        let status = create(mask)?.status;
        holds(format!("mask {mask:#x} is refused"), status & 1 << 31 != 0)?;
    }
    Ok(())
}

fn limit(context: &Context) -> Verdict {
    let bus = bus(context)?;
    let mut messages = Vec::new();
    for _ in 0..15 {
        messages.push(bus.must_create(&block(32))?);
    }
    for _ in 0..14 {
        messages.push(bus.must_create(&block(1))?);
    }
    for count in [1, 2, 32] {
        let (status, _) = bus.create(&block(count))?;
        let what = format!("status of {count} messages too many");
        equal(what, status, nt::INSUFFICIENT_RESOURCES)?;
    }
    bus.delete(0, messages[20])?;
    equal(
        "status of two",
        bus.create(&block(2))?.0,
        nt::INSUFFICIENT_RESOURCES,
    )?;
    equal(
        "the message of the gap",
        bus.must_create(&block(1))?,
        messages[20],
    )?;
    equal(
        "status of one",
        bus.create(&block(1))?.0,
        nt::INSUFFICIENT_RESOURCES,
    )?;
    bus.released(0)?;
    bus.must_create(&block(32)).map(drop)
}

fn limit_of_one(context: &Context) -> Verdict {
    let vm = context.machine(&Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: vec![FunctionSetup::testdev(0), FunctionSetup::testdev(1)],
        }],
        ..with_vps(2)
    })?;
    let bus = Bus::bring_up(&vm)?;
    while let (_, Some(_)) = bus.create(&block(32))? {}
    while let (_, Some(_)) = bus.create(&block(1))? {}
    let message = bus.must_create(&Create::one(slot(1), 0x60, 0))?;
    equal("data of the other function's message", message.data, 0)
}

fn completion_interrupt(context: &Context) -> Verdict {
    let bus = bus(context)?;
    bus.channel().interrupted()?;
    bus.must_create(&Create::one(0, 0xef, 0))?;
    holds(
        "the channel's event flag is set",
        bus.channel().interrupted()?,
    )
}

fn any_state(context: &Context) -> Verdict {
    let device = device(context)?;
    device.set_command(0)?;
    let message = device.bus().must_create(&Create::one(0, 0x61, 1))?;
    device.set_command(6)?;
    device.set_entry(2, message.address, message.data, false)?;
    device.enable_msix(true)?;
    device.raise(2)?;
    arrive("a message made with all off", device.vm(), &[(1, 0x61)])
}
