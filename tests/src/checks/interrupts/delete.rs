//! DELETE_INTERRUPT, and Linux's ways with both (docs/spec/vpci.md, section 7.1).
#![forbid(unsafe_code)]

use super::{arrive, bus, device, vectors};
use crate::check::{Check, Context, Verdict, equal};
use crate::host::{BusSetup, FunctionSetup, Setup};
use crate::model::kernel::status;
use crate::model::ring::Packet;
use crate::model::testdev::TestDev;
use crate::model::vpci::{Bus, Create, Message, message, nt, slot};
use crate::model::wire::Bytes;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "interrupts.delete.unmaps",
        "A message that was deleted raises nothing, and cannot be retargeted.",
        &["VP-4-14", "VP-11-10", "VP-7.1-01", "VP-3.1-15"],
        unmaps,
    ),
    Check::new(
        "interrupts.delete.second-form",
        "DELETE_INTERRUPT2 does the same; either is completed if that is asked for.",
        &["VP-4-14", "VP-3.1-17"],
        second_form,
    ),
    Check::new(
        "interrupts.delete.block",
        "One delete of its first message frees a whole block.",
        &["VP-7.1-04"],
        block,
    ),
    Check::new(
        "interrupts.delete.unknown",
        "Deleting what is not the first message of a live block succeeds and does nothing.",
        &["VP-7.1-12", "VP-11-10"],
        unknown,
    ),
    Check::new(
        "interrupts.delete.others",
        "A function cannot delete another function's message.",
        &["VP-11-10", "VP-11-09"],
        others,
    ),
    Check::new(
        "interrupts.delete.before-create",
        "A delete ahead of a create in the ring is done first: the message comes back.",
        &["VP-7.1-07", "VP-3-06"],
        before_create,
    ),
    Check::new(
        "interrupts.delete.linux-sequence",
        "Placeholder, delete, create, retarget at start and on: the last target counts.",
        &["VP-7.1-07"],
        linux_sequence,
    ),
];

/// A delete of a message with either number.
fn delete(number: u32, slot: u32, message: Message) -> Bytes {
    Bytes::words(&[number, slot])
        .u16(0)
        .u16(message.count)
        .u32(message.data)
        .u64(message.address)
}

fn unmaps(context: &Context) -> Verdict {
    let device = device(context)?;
    let interrupt = device.interrupt(0, 0x41, 1)?;
    device.raise(0)?;
    arrive("before the delete", device.vm(), &[(1, 0x41)])?;
    device.bus().delete(0, interrupt.message)?;
    device.raise(0)?;
    arrive("after the delete", device.vm(), &[])?;
    let retarget = device.bus().retarget(0, interrupt.message, 0x42, 1);
    let got = device.bus().kernel().retarget(0, &retarget)?;
    equal("status of a retarget", got, status::INVALID_PARAMETER)?;
    device.raise(0)?;
    arrive("after the retarget", device.vm(), &[])
}

fn second_form(context: &Context) -> Verdict {
    for number in [message::DELETE_INTERRUPT, message::DELETE_INTERRUPT2] {
        let device = device(context)?;
        let interrupt = device.interrupt(0, 0x41, 1)?;
        for round in ["live", "deleted"] {
            let request = delete(number, 0, interrupt.message);
            let got = device.bus().request(&request.0)?.status;
            equal(
                format!("status for a message that is {round}"),
                got,
                nt::SUCCESS,
            )?;
        }
        device.raise(0)?;
        arrive("after the delete", device.vm(), &[])?;
    }
    Ok(())
}

fn four() -> Create {
    Create {
        count: 4,
        ..Create::one(0, 0x60, 0)
    }
}

fn block(context: &Context) -> Verdict {
    let device = device(context)?;
    let bus = device.bus();
    let message = bus.must_create(&four())?;
    for entry in 0..4 {
        device.set_entry(entry, message.address, message.data + entry, false)?;
    }
    device.enable_msix(true)?;
    for entry in 0..4 {
        device.raise(entry)?;
        arrive("before the delete", bus.vm(), &[(0, 0x60 + entry as u8)])?;
    }
    bus.delete(0, message)?;
    for entry in 0..4 {
        device.raise(entry)?;
    }
    arrive("after the delete", bus.vm(), &[])?;
    equal(
        "the block that is free again",
        bus.must_create(&four())?,
        message,
    )
}

fn unknown(context: &Context) -> Verdict {
    let device = device(context)?;
    let bus = device.bus();
    let block = bus.must_create(&four())?;
    for entry in 0..4 {
        device.set_entry(entry, block.address, block.data + entry, false)?;
    }
    device.enable_msix(true)?;
    let with = |address, data| Message {
        count: 4,
        address,
        data,
    };
    for message in [
        with(block.address, block.data + 1),
        with(block.address, block.data + 3),
        with(block.address, block.data + 4),
        with(block.address, 1024),
        with(block.address, u32::MAX),
        with(block.address | 1 << 32, block.data),
        with(block.address + 4, block.data),
        with(0, 0),
        with(u64::MAX, u32::MAX),
    ] {
        let request = delete(message::DELETE_INTERRUPT, 0, message);
        let what = format!(
            "status of deleting {:#x}, {:#x}",
            message.address, message.data
        );
        equal(what, bus.request(&request.0)?.status, nt::SUCCESS)?;
    }
    for entry in 0..4 {
        device.raise(entry)?;
        arrive("after the deletes", bus.vm(), &[(0, 0x60 + entry as u8)])?;
    }
    Ok(())
}

fn others(context: &Context) -> Verdict {
    let vm = context.machine(&Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: vec![FunctionSetup::testdev(0), FunctionSetup::testdev(1)],
        }],
        ..Setup::default()
    })?;
    let bus = Bus::bring_up(&vm)?;
    let device = TestDev::start(&bus, 1)?;
    let interrupt = device.interrupt(0, 0x41, 1)?;
    bus.delete(slot(0), interrupt.message)?;
    device.raise(0)?;
    arrive("after the other function's delete", &vm, &[(1, 0x41)])
}

fn before_create(context: &Context) -> Verdict {
    let bus = bus(context)?;
    let old = bus.must_create(&Create::one(0, 0xef, 0))?;
    let request = delete(message::DELETE_INTERRUPT, 0, old);
    bus.channel().send(&Packet::new(6, 0, 0, &request.0))?;
    let new = bus.must_create(&Create::one(0, 0x60, 1))?;
    equal("the message of the create", new, old)
}

fn linux_sequence(context: &Context) -> Verdict {
    let device = device(context)?;
    let bus = device.bus();
    device.enable_msix(true)?;
    for entry in 0..3 {
        let placeholder = bus.must_create(&Create::one(0, 0xef, 0))?;
        device.set_entry(entry, placeholder.address, placeholder.data, true)?;
        bus.delete(0, placeholder)?;
        let vector = 0x51 + entry as u8;
        let real = bus.must_create(&Create::one(0, vector, 1))?;
        device.set_entry(entry, real.address, real.data, true)?;
        let retarget = bus.retarget(0, real, vector, 0);
        bus.kernel().must_retarget(1, &retarget)?;
        device.set_entry(entry, real.address, real.data, false)?;
        device.raise(entry)?;
        arrive("after startup", bus.vm(), &[(0, vector)])?;
        let retarget = bus.retarget(0, real, vector + 0x10, 1);
        bus.kernel().must_retarget(0, &retarget)?;
        device.raise(entry)?;
        arrive("after an affinity change", bus.vm(), &[(1, vector + 0x10)])?;
    }
    equal("interrupts of VP 0", vectors(bus.vm(), 0)?, vec![])
}
