//! Power, back channel, reset, ejection (docs/spec/vpci.md, sections 5 and 8).
#![forbid(unsafe_code)]

use super::{bus_with, in_d0};
use crate::check::{Check, Context, Verdict, equal, holds};
use crate::devices::Plain;
use crate::host::FunctionSetup;
use crate::model::kernel::status;
use crate::model::testdev::{MAGIC, TestDev};
use crate::model::vpci::{message, nt, slot};
use crate::model::wire::Bytes;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vpci.power.memory-decode",
        "Power state D0 switches memory decode on, D3 switches it off.",
        &["VP-5-09", "VP-4-21", "VP-3.1-04"],
        memory_decode,
    ),
    Check::new(
        "vpci.power.other-states",
        "Any other power state is malformed and changes nothing.",
        &["VP-5-09"],
        other_states,
    ),
    Check::new(
        "vpci.block.not-supported",
        "Reading and writing blocks is not supported; the block id comes before the slot.",
        &["VP-5-10", "VP-4-24", "VP-4-26", "VP-3.1-08"],
        block_not_supported,
    ),
    Check::new(
        "vpci.block.bounds",
        "A block of more than 128 bytes, or than the payload holds, is malformed.",
        &["VP-5-10", "VP-11-02"],
        block_bounds,
    ),
    Check::new(
        "vpci.reset-device.not-supported",
        "RESET_DEVICE is not supported, and resets nothing.",
        &["VP-5-11", "VP-4-28", "VP-3.1-20"],
        reset_device,
    ),
    Check::new(
        "vpci.tdisp.not-supported",
        "TDISP commands are not supported; a length beyond the payload is malformed.",
        &["VP-5-11", "VP-4-29", "VP-3.1-21"],
        tdisp,
    ),
    Check::new(
        "vpci.query-stop.refused",
        "The stop messages, whose meaning is not known, are refused.",
        &["VP-3.1-10"],
        query_stop,
    ),
    Check::new(
        "vpci.eject.complete-releases",
        "EJECTION_COMPLETE, with or without its status, releases the function.",
        &["VP-4-20", "VP-3.1-11", "VP-8-04"],
        eject_releases,
    ),
    Check::new(
        "vpci.eject.complete-unsolicited",
        "EJECTION_COMPLETE that nobody asked for, or again, does no harm.",
        &["VP-11-14", "VP-8-04"],
        eject_unsolicited,
    ),
    Check::new(
        "vpci.eject.complete-one-function",
        "EJECTION_COMPLETE of one function leaves the bus and the others alone.",
        &["VP-8-07"],
        eject_one,
    ),
];

fn memory_decode(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    let bus = device.bus();
    for (state, command, word) in [
        (4, 4, 0xffff_ffff),
        (1, 6, MAGIC),
        (1, 6, MAGIC),
        (4, 4, 0xffff_ffff),
    ] {
        let words = [message::POWER_STATE_CHANGE, 0, state];
        equal("status", bus.status(&words)?, nt::SUCCESS)?;
        equal("command register", bus.config(0, 4, 2)?, command)?;
        equal("a load from the BAR", device.load(0, 4)?, word)?;
    }
    // With the reserved dword that some guests send.
    let words = [message::POWER_STATE_CHANGE, 0, 1, 0];
    equal("status", bus.status(&words)?, nt::SUCCESS)?;
    equal("a load from the BAR", device.load(0, 4)?, MAGIC)
}

fn other_states(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    for state in [0, 2, 3, 5, 0x104, u32::MAX] {
        let words = [message::POWER_STATE_CHANGE, 0, state];
        let what = format!("status of power state {state:#x}");
        equal(what, device.bus().status(&words)?, nt::BAD_DATA)?;
        equal("a load from the BAR", device.load(0, 4)?, MAGIC)?;
    }
    Ok(())
}

/// READ_BLOCK or WRITE_BLOCK of `count` bytes with a payload of `len` bytes.
fn block(number: u32, block: u32, slot: u32, count: u32, len: usize) -> Vec<u8> {
    Bytes::words(&[number, block, slot, count]).up_to(len).0
}

fn block_not_supported(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for number in [message::READ_BLOCK, message::WRITE_BLOCK] {
        for (id, count) in [(0, 0), (0, 128), (0x77, 64), (u32::MAX, 1)] {
            let request = block(number, id, 0, count, 16 + 132);
            let what = format!("status of {count} bytes of block {id:#x}");
            equal(what, bus.request(&request)?.status, nt::NOT_SUPPORTED)?;
        }
        // With the two swapped this would be a good slot.
        let request = block(number, 0, 0x77, 16, 16 + 132);
        equal(
            "status for slot 0x77",
            bus.request(&request)?.status,
            nt::BAD_DATA,
        )?;
    }
    Ok(())
}

fn block_bounds(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for count in [129, 132, 4096, u32::MAX] {
        for number in [message::READ_BLOCK, message::WRITE_BLOCK] {
            let request = block(number, 0, 0, count, 16 + 4000);
            let what = format!("status of {count} bytes");
            equal(what, bus.request(&request)?.status, nt::BAD_DATA)?;
        }
    }
    for (count, len) in [(1, 16), (128, 16 + 120), (9, 24)] {
        let request = block(message::WRITE_BLOCK, 0, 0, count, len);
        let what = format!("status of a write of {count} bytes in {len}");
        equal(what, bus.request(&request)?.status, nt::BAD_DATA)?;
    }
    Ok(())
}

fn reset_device(context: &Context) -> Verdict {
    let device = Plain::wide();
    let bus = bus_with(context, vec![device.function(0)])?;
    bus.set_config(0, 4, 2, 6)?;
    let resets = device.resets();
    let words = [message::RESET_DEVICE, 0];
    equal("status", bus.status(&words)?, nt::NOT_SUPPORTED)?;
    equal("command register", bus.config(0, 4, 2)?, 6)?;
    equal("resets of the device", device.resets(), resets)
}

fn tdisp(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let command = |length: u64, data: usize| {
        let request = Bytes::words(&[message::TDISP, 0]).u64(length);
        bus.request(&request.up_to(16 + data).0)
    };
    for (length, data) in [(0, 0), (64, 64), (4064, 4064)] {
        let what = format!("status of {length} bytes in {data}");
        equal(what, command(length, data)?.status, nt::NOT_SUPPORTED)?;
    }
    for (length, data) in [(1, 0), (65, 64), (4096, 64), (u64::MAX, 64)] {
        let what = format!("status of {length:#x} bytes in {data}");
        equal(what, command(length, data)?.status, nt::BAD_DATA)?;
    }
    Ok(())
}

fn query_stop(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for number in 0x0c..=0x0e {
        let request = Bytes::words(&[message::BASE + number, 0]).up_to(64);
        let got = bus.request(&request.0)?.status;
        holds(
            format!("message {number:#x} is refused"),
            got & 1 << 31 != 0,
        )?;
    }
    equal("the vendor id", bus.config(0, 0, 2)?, 0x1234)
}

fn eject_releases(context: &Context) -> Verdict {
    for words in [
        &[message::EJECTION_COMPLETE, 0, 0][..],
        &[message::EJECTION_COMPLETE, 0],
    ] {
        let device = TestDev::bring_up(&context.usual()?)?;
        let interrupt = device.interrupt(0, 0x41, 1)?;
        let bus = device.bus();
        bus.send(&Bytes::words(words).0)?;
        equal("packets for it", bus.channel().receive()?.len(), 0)?;
        equal("a load from the BAR", device.load(0, 4)?, 0xffff_ffff)?;
        equal("command register", bus.config(0, 4, 2)?, 0)?;
        let retarget = bus.retarget(0, interrupt.message, 0x42, 1);
        let got = bus.kernel().retarget(0, &retarget)?;
        equal("status of a retarget", got, status::INVALID_PARAMETER)?;
    }
    Ok(())
}

fn eject_unsolicited(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for _ in 0..3 {
        let words = [message::EJECTION_COMPLETE, 0, 0];
        equal("status", bus.status(&words)?, nt::SUCCESS)?;
    }
    equal("status of resources", bus.assigned(0)?, nt::SUCCESS)?;
    let device = TestDev::start(&bus, 0)?;
    device.interrupt(0, 0x41, 1)?;
    device.raise(0)?;
    bus.vm().expect_interrupt(1, 0x41)
}

fn eject_one(context: &Context) -> Verdict {
    let functions = vec![FunctionSetup::testdev(0), FunctionSetup::testdev(2)];
    let bus = bus_with(context, functions)?;
    let first = TestDev::start(&bus, 0)?;
    let second = TestDev::start(&bus, 2)?;
    let words = [message::EJECTION_COMPLETE, slot(2), 0];
    bus.send(&Bytes::words(&words).0)?;
    bus.vm().settle();
    equal("a load from its BAR", second.load(0, 4)?, 0xffff_ffff)?;
    equal("a load from the other BAR", first.load(0, 4)?, MAGIC)?;
    bus.requirements(slot(0))?;
    bus.vmbus().expect_silence()
}
