//! MSI-X: table, masks, pending bits, and messages that are not the host's
//! (docs/spec/vpci.md, sections 7.1 and 11).
#![forbid(unsafe_code)]

use super::{arrive, device};
use crate::check::{Check, Context, Verdict, equal};
use crate::host::{BusSetup, FunctionSetup, Setup};
use crate::model::testdev::{CAP_MSIX, Interrupt, MSIX_PENDING, MSIX_TABLE, TestDev, VECTORS};
use crate::model::vpci::{Bus, Create};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "interrupts.msix.at-first",
        "At first MSI-X is off, and its entries are empty and masked.",
        &["VP-11-15", "VP-7.1-13"],
        at_first,
    ),
    Check::new(
        "interrupts.msix.each-vector",
        "Each entry raises its own message.",
        &["VP-7.1-01"],
        each_vector,
    ),
    Check::new(
        "interrupts.msix.disabled",
        "With MSI-X off nothing is raised, then or when it is on again.",
        &["VP-7.1-08", "VP-7.1-13"],
        disabled,
    ),
    Check::new(
        "interrupts.msix.masked-entry",
        "An event of a masked entry is pending, and is raised once when it is unmasked.",
        &["VP-7.1-08"],
        masked_entry,
    ),
    Check::new(
        "interrupts.msix.function-mask",
        "The function mask holds back all entries and loses none of their events.",
        &["VP-7.1-08"],
        function_mask,
    ),
    Check::new(
        "interrupts.msix.pending-bits",
        "Pending bits show the events that wait, and cannot be written.",
        &["VP-7.1-08", "VP-11-15"],
        pending_bits,
    ),
    Check::new(
        "interrupts.msix.pending-across-retarget",
        "An event that waited behind a mask goes where its message goes at the unmasking.",
        &["VP-7.1-08", "VP-7.2-17"],
        pending_across_retarget,
    ),
    Check::new(
        "interrupts.msix.pending-across-rewrite",
        "An event that waited behind a mask takes the message that the entry holds by then.",
        &["VP-7.1-08"],
        pending_across_rewrite,
    ),
    Check::new(
        "interrupts.msix.zeroed-entry",
        "An entry of address 0 and data 0, as Linux leaves it, raises nothing.",
        &["VP-7.1-09", "VP-7.1-11"],
        zeroed_entry,
    ),
    Check::new(
        "interrupts.msix.foreign-messages",
        "An entry raises live messages of its function alone, whatever is written to it.",
        &["VP-11-09", "VP-7.1-01"],
        foreign,
    ),
    Check::new(
        "interrupts.msix.other-functions-message",
        "A function cannot raise another function's message.",
        &["VP-11-09"],
        other_functions,
    ),
    Check::new(
        "interrupts.msix.shared-message",
        "Two entries with one message both raise it.",
        &["VP-7.1-01"],
        shared,
    ),
];

fn at_first(context: &Context) -> Verdict {
    let device = device(context)?;
    let bus = device.bus();
    let Some(at) = bus.capability(0, CAP_MSIX)? else {
        return equal("MSI-X capability", None::<u64>, Some(0));
    };
    equal("message control", bus.config(0, at + 2, 2)?, 7)?;
    for entry in 0..u64::from(VECTORS) {
        let at = MSIX_TABLE + 16 * entry;
        let what = format!("address and data of entry {entry}");
        equal(what, (device.load(at, 8)?, device.load(at + 8, 4)?), (0, 0))?;
        equal(
            format!("control of entry {entry}"),
            device.load(at + 12, 4)?,
            1,
        )?;
    }
    equal(
        "entry behind the last",
        device.load(MSIX_TABLE + 16 * 8, 8)?,
        0,
    )?;
    equal("pending bits", device.load(MSIX_PENDING, 8)?, 0)?;
    device.raise(0)?;
    arrive("an event without MSI-X", device.vm(), &[])
}

fn each_vector(context: &Context) -> Verdict {
    let device = device(context)?;
    for entry in 0..VECTORS {
        device.interrupt(entry, 0x60 + entry as u8, entry % 2)?;
    }
    for entry in (0..VECTORS).rev() {
        device.raise(entry)?;
        let expected = [(entry % 2, 0x60 + entry as u8)];
        arrive(&format!("entry {entry}"), device.vm(), &expected)?;
    }
    // There is no vector 8.
    device.raise(VECTORS)?;
    arrive("a vector that is not there", device.vm(), &[])
}

fn disabled(context: &Context) -> Verdict {
    let device = device(context)?;
    device.interrupt(0, 0x41, 1)?;
    device.enable_msix(false)?;
    device.raise(0)?;
    arrive("with MSI-X off", device.vm(), &[])?;
    device.enable_msix(true)?;
    arrive("when it is on again", device.vm(), &[])?;
    device.raise(0)?;
    arrive("with MSI-X on", device.vm(), &[(1, 0x41)])
}

/// Masks or unmasks an entry alone.
fn mask(device: &TestDev, entry: u32, masked: bool) -> Verdict {
    let at = MSIX_TABLE + 16 * u64::from(entry) + 12;
    Ok(device.store(at, 4, masked.into())?)
}

fn masked_entry(context: &Context) -> Verdict {
    let device = device(context)?;
    device.interrupt(0, 0x41, 1)?;
    device.interrupt(1, 0x42, 1)?;
    mask(&device, 0, true)?;
    for _ in 0..3 {
        device.raise(0)?;
    }
    device.raise(1)?;
    arrive("with entry 0 masked", device.vm(), &[(1, 0x42)])?;
    equal("pending bits", device.load(MSIX_PENDING, 8)?, 1)?;
    mask(&device, 0, false)?;
    arrive("after the unmasking", device.vm(), &[(1, 0x41)])?;
    equal("pending bits", device.load(MSIX_PENDING, 8)?, 0)?;
    mask(&device, 0, true)?;
    mask(&device, 0, false)?;
    arrive("after a mask without an event", device.vm(), &[])
}

/// Writes enable and function mask of MSI-X.
fn control(device: &TestDev, bits: u64) -> Verdict {
    let Some(at) = device.bus().capability(0, CAP_MSIX)? else {
        return equal("MSI-X capability", None::<u64>, Some(0));
    };
    Ok(device.bus().set_config(0, at + 2, 2, bits << 14)?)
}

fn function_mask(context: &Context) -> Verdict {
    let device = device(context)?;
    for entry in 0..3 {
        device.interrupt(entry, 0x41 + entry as u8, 1)?;
    }
    mask(&device, 2, true)?;
    control(&device, 3)?;
    for entry in 0..3 {
        device.raise(entry)?;
    }
    arrive("with the function mask", device.vm(), &[])?;
    equal("pending bits", device.load(MSIX_PENDING, 8)?, 7)?;
    // Unmasking an entry does not get past the function mask.
    mask(&device, 0, true)?;
    mask(&device, 0, false)?;
    arrive("with the function mask still", device.vm(), &[])?;
    control(&device, 2)?;
    arrive("without it", device.vm(), &[(1, 0x41), (1, 0x42)])?;
    equal("pending bits", device.load(MSIX_PENDING, 8)?, 4)?;
    mask(&device, 2, false)?;
    arrive("without its own mask", device.vm(), &[(1, 0x43)])
}

fn pending_bits(context: &Context) -> Verdict {
    let device = device(context)?;
    for entry in [0, 5, 7] {
        device.interrupt(entry, 0x41 + entry as u8, 0)?;
        mask(&device, entry, true)?;
        device.raise(entry)?;
    }
    for written in [0, 0xff, u64::MAX] {
        device.store(MSIX_PENDING, 8, written)?;
        device.store(MSIX_PENDING, 4, written & 0xffff_ffff)?;
        equal("pending bits", device.load(MSIX_PENDING, 8)?, 0xa1)?;
        equal("their low half", device.load(MSIX_PENDING, 4)?, 0xa1)?;
        equal("their high half", device.load(MSIX_PENDING + 4, 4)?, 0)?;
    }
    for entry in [0, 5, 7] {
        mask(&device, entry, false)?;
        arrive(
            "after the unmasking",
            device.vm(),
            &[(0, 0x41 + entry as u8)],
        )?;
    }
    Ok(())
}

fn pending_across_retarget(context: &Context) -> Verdict {
    let device = device(context)?;
    let interrupt = device.interrupt(0, 0x41, 0)?;
    mask(&device, 0, true)?;
    device.raise(0)?;
    device.retarget(&Interrupt {
        vector: 0x42,
        vp: 1,
        ..interrupt
    })?;
    arrive("while masked", device.vm(), &[])?;
    mask(&device, 0, false)?;
    arrive("after the unmasking", device.vm(), &[(1, 0x42)])
}

fn pending_across_rewrite(context: &Context) -> Verdict {
    let device = device(context)?;
    device.interrupt(0, 0x41, 0)?;
    let other = device.bus().must_create(&Create::one(0, 0x42, 1))?;
    mask(&device, 0, true)?;
    device.raise(0)?;
    device.set_entry(0, other.address, other.data, true)?;
    arrive("while masked", device.vm(), &[])?;
    mask(&device, 0, false)?;
    arrive("after the unmasking", device.vm(), &[(1, 0x42)])
}

fn zeroed_entry(context: &Context) -> Verdict {
    let device = device(context)?;
    // The message has data 0, so that only its address tells it from an empty entry.
    let interrupt = device.interrupt(0, 0x41, 1)?;
    equal("data of the message", interrupt.message.data, 0)?;
    device.set_entry(0, 0, 0, false)?;
    device.raise(0)?;
    arrive("with an empty entry", device.vm(), &[])?;
    equal("pending bits", device.load(MSIX_PENDING, 8)?, 0)?;
    device.set_entry(0, interrupt.message.address, 0, false)?;
    arrive("with the message again", device.vm(), &[])?;
    device.raise(0)?;
    arrive("after another event", device.vm(), &[(1, 0x41)])
}

fn foreign(context: &Context) -> Verdict {
    let device = device(context)?;
    let live = device.interrupt(0, 0x41, 1)?.message;
    for (address, data) in [
        (live.address, live.data + 1),
        (live.address, 0x41),
        (live.address, 0x4041),
        (live.address, live.data | 0x1_0000),
        (live.address, u32::MAX),
        (live.address + 4, live.data),
        (live.address | 1 << 32, live.data),
        (0xfee0_1000, live.data),
        (0xfee0_100c, 0x41),
        (0xfee0_0018, 0x541),
        (0x10_0000, 1),
        (!3, live.data),
    ] {
        device.set_entry(0, address, data, false)?;
        device.raise(0)?;
        let what = format!("the message {address:#x}, {data:#x}");
        arrive(&what, device.vm(), &[])?;
    }
    device.set_entry(0, live.address, live.data, false)?;
    device.raise(0)?;
    arrive("its own message", device.vm(), &[(1, 0x41)])
}

fn other_functions(context: &Context) -> Verdict {
    let vm = context.machine(&Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: vec![FunctionSetup::testdev(0), FunctionSetup::testdev(1)],
        }],
        ..Setup::default()
    })?;
    let bus = Bus::bring_up(&vm)?;
    let (first, second) = (TestDev::start(&bus, 0)?, TestDev::start(&bus, 1)?);
    first.interrupt(0, 0x41, 1)?;
    let target = first.interrupt(1, 0x42, 1)?.message;
    second.set_entry(0, target.address, target.data, false)?;
    second.enable_msix(true)?;
    second.raise(0)?;
    arrive("another function's message", &vm, &[])?;
    first.raise(1)?;
    arrive("the function's own", &vm, &[(1, 0x42)])
}

fn shared(context: &Context) -> Verdict {
    let device = device(context)?;
    let message = device.interrupt(0, 0x41, 1)?.message;
    device.set_entry(3, message.address, message.data, false)?;
    for entry in [0, 3, 0] {
        device.raise(entry)?;
        arrive(&format!("entry {entry}"), device.vm(), &[(1, 0x41)])?;
    }
    Ok(())
}
