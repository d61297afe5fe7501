//! BARs: sizing, placement, decode, and what happens where one cannot be
//! (docs/spec/vpci.md, sections 6 and 11).
#![forbid(unsafe_code)]

use super::{ONES, bus_with, in_d0};
use crate::check::{Check, Context, Failure, Verdict, equal};
use crate::devices::Plain;
use crate::host::{BusSetup, FunctionSetup, HIGH_MMIO, LOW_MMIO, Setup};
use crate::model::kernel::Kernel;
use crate::model::testdev::{BAR_SIZE, MAGIC, TestDev};
use crate::model::vmbus::VmBus;
use crate::model::vpci::{Bus, VERSIONS, slot};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vpci.bar.sizing",
        "A store of all ones reads back the size of each BAR and its flags.",
        &["VP-6-11", "VP-6-18", "VP-5-03"],
        sizing,
    ),
    Check::new(
        "vpci.bar.read-back",
        "BARs and memory decode read back what was written.",
        &["VP-6-19", "VP-6-11"],
        read_back,
    ),
    Check::new(
        "vpci.bar.decode",
        "A BAR answers while memory decode is on, and reads all ones else.",
        &["VP-6-18"],
        decode,
    ),
    Check::new(
        "vpci.bar.each",
        "Each BAR of a function answers at its own place, up to its last byte and no further.",
        &["VP-6-18", "VP-6-20"],
        each,
    ),
    Check::new(
        "vpci.bar.written-with-decode-on",
        "While memory decode is on stores to BARs do nothing.",
        &["VP-6-18"],
        written_with_decode_on,
    ),
    Check::new(
        "vpci.bar.moved",
        "A BAR that was moved with decode off answers at the new place alone.",
        &["VP-6-18", "VP-6-20"],
        moved,
    ),
    Check::new(
        "vpci.bar.bad-place",
        "A BAR in RAM, outside vPCI MMIO or across its end is not mapped; RAM stays RAM.",
        &["VP-11-06", "VP-6-21"],
        bad_place,
    ),
    Check::new(
        "vpci.bar.over-the-window",
        "A BAR over the config window is not mapped, and the window goes on.",
        &["VP-11-06", "VP-6-21"],
        over_the_window,
    ),
    Check::new(
        "vpci.bar.over-another",
        "A BAR over another of the function, the bus or another bus is not mapped.",
        &["VP-11-06", "VP-6-21"],
        over_another,
    ),
    Check::new(
        "vpci.bar.validated-each-time",
        "Whether a BAR can be where it is is found anew each time decode is switched on.",
        &["VP-11-06", "VP-6-21"],
        validated_each_time,
    ),
    Check::new(
        "vpci.bar.above-and-below",
        "A 64-bit BAR works below 4 GiB as well as above.",
        &["VP-6-21"],
        above_and_below,
    ),
    Check::new(
        "vpci.bar.widths",
        "Accesses that a register or the MSI-X table does not take change nothing.",
        &["VP-6-21", "VP-11-15"],
        widths,
    ),
];

fn wide(context: &Context) -> Result<Bus, Failure> {
    bus_with(context, vec![Plain::wide().function(0)])
}

fn sizing(context: &Context) -> Verdict {
    let bus = wide(context)?;
    let sizes = [
        0xffff_0000,
        0xffff_c00c,
        0xffff_ffff,
        0xc000_0004,
        0xffff_ffff,
        0xffff_f000,
    ];
    for (offset, size) in (0x10..).step_by(4).zip(sizes) {
        let before = bus.config(0, offset, 4)?;
        bus.set_config(0, offset, 4, 0xffff_ffff)?;
        equal(
            format!("register {offset:#x}"),
            bus.config(0, offset, 4)?,
            size,
        )?;
        bus.set_config(0, offset, 4, before)?;
        let what = format!("register {offset:#x} put back");
        equal(what, bus.config(0, offset, 4)?, before)?;
    }
    let testdev = in_d0(context)?;
    for offset in [0x18, 0x1c, 0x20, 0x24] {
        testdev.set_config(0, offset, 4, 0xffff_ffff)?;
        let what = format!("register {offset:#x} of no BAR");
        equal(what, testdev.config(0, offset, 4)?, 0)?;
    }
    Ok(())
}

fn read_back(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for gpa in [
        HIGH_MMIO,
        HIGH_MMIO + 0x7654_4000,
        LOW_MMIO + 0x10_0000,
        0xffff_ffff_ffff_c000,
    ] {
        bus.place_bar(0, 0, gpa)?;
        let low = bus.config(0, 0x10, 4)?;
        equal("low half of BAR 0", low, gpa & 0xffff_ffff | 4)?;
        equal("high half of BAR 0", bus.config(0, 0x14, 4)?, gpa >> 32)?;
        bus.set_config(0, 4, 2, 2)?;
        equal("command register", bus.config(0, 4, 2)?, 2)?;
        equal("low half with decode on", bus.config(0, 0x10, 4)?, low)?;
        bus.set_config(0, 4, 2, 0)?;
    }
    Ok(())
}

fn decode(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    for _ in 0..3 {
        device.set_command(4)?;
        for (width, ones) in ONES {
            equal("a load with decode off", device.load(0, width)?, ones)?;
        }
        device.store(0x10, 4, 0x55)?;
        device.set_command(6)?;
        equal("a load with decode on", device.load(0, 4)?, MAGIC)?;
        equal("what was stored with decode off", device.load(0x10, 4)?, 0)?;
    }
    Ok(())
}

/// Places of the BARs of [`Plain::wide`]: BAR, address, bytes.
const PLACES: [(u8, u64, u64); 4] = [
    (0, LOW_MMIO + 0x20_0000, 0x1_0000),
    (1, HIGH_MMIO + 0x4_0000, 0x4000),
    (3, HIGH_MMIO + (1 << 30), 1 << 30),
    (5, LOW_MMIO + 0x21_0000, 0x1000),
];

/// Stores an address to a BAR as Linux does: the low half without its low byte, then the high one.
fn place(bus: &Bus, slot: u32, bar: u8, gpa: u64) -> Verdict {
    let register = 0x10 + 4 * u64::from(bar);
    bus.set_config(slot, register, 4, gpa & 0xffff_ff00)?;
    if matches!(bar, 1 | 3) {
        bus.set_config(slot, register + 4, 4, gpa >> 32)?;
    }
    Ok(())
}

fn place_all(bus: &Bus, slot: u32) -> Verdict {
    for (bar, gpa, _) in PLACES {
        place(bus, slot, bar, gpa)?;
    }
    Ok(())
}

/// Whether a BAR of [`Plain::wide`] answers.
fn answers(bus: &Bus, bar: u8, gpa: u64) -> Result<bool, Failure> {
    Ok(bus.vm().load(0, gpa + 0x10, 4)? == Plain::value(bar, 0x10))
}

fn each(context: &Context) -> Verdict {
    let bus = wide(context)?;
    place_all(&bus, 0)?;
    bus.set_config(0, 4, 2, 2)?;
    for (bar, gpa, size) in PLACES {
        for offset in [0, 0x10, size / 2, size - 4] {
            let what = format!("offset {offset:#x} of BAR {bar}");
            equal(
                what,
                bus.vm().load(0, gpa + offset, 4)?,
                Plain::value(bar, offset),
            )?;
        }
        let before = bus.vm().load(0, gpa - 4, 4)?;
        equal(
            format!("a load in front of BAR {bar}"),
            before >> 24 == 0xb0 + u64::from(bar),
            false,
        )?;
        let behind = bus.vm().load(0, gpa + size, 4)?;
        equal(
            format!("a load behind BAR {bar}"),
            behind >> 24 == 0xb0 + u64::from(bar),
            false,
        )?;
    }
    Ok(())
}

fn written_with_decode_on(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    let bus = device.bus();
    let (low, high) = (bus.config(0, 0x10, 4)?, bus.config(0, 0x14, 4)?);
    for value in [0xffff_ffff, 0, low + 0x8000] {
        bus.set_config(0, 0x10, 4, value)?;
        bus.set_config(0, 0x14, 4, value)?;
        equal("low half of BAR 0", bus.config(0, 0x10, 4)?, low)?;
        equal("high half of BAR 0", bus.config(0, 0x14, 4)?, high)?;
        equal("a load from the BAR", device.load(0, 4)?, MAGIC)?;
    }
    Ok(())
}

fn moved(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    let bus = device.bus();
    let (old, new) = (device.bar(), device.bar() + 0x100_0000);
    for (from, to) in [(old, new), (new, old), (old, old + BAR_SIZE)] {
        bus.place_bar(0, 0, to)?;
        equal(
            "the old place with decode off",
            bus.vm().load(0, from, 4)?,
            0xffff_ffff,
        )?;
        equal(
            "the new place with decode off",
            bus.vm().load(0, to, 4)?,
            0xffff_ffff,
        )?;
        device.set_command(6)?;
        equal("the new place", bus.vm().load(0, to, 4)?, MAGIC)?;
        equal("the old place", bus.vm().load(0, from, 4)?, 0xffff_ffff)?;
    }
    Ok(())
}

fn bad_place(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let ram = bus.vm().pages(8)?.next_multiple_of(BAR_SIZE);
    bus.vm().write(ram, &[0x77; 16])?;
    let end = HIGH_MMIO + (4 << 30);
    for gpa in [
        ram,
        0,
        LOW_MMIO - BAR_SIZE,
        LOW_MMIO + (16 << 20),
        HIGH_MMIO - BAR_SIZE,
        end,
        0xfee0_0000,
        0xffff_ffff_ffff_c000,
        1 << 52,
    ] {
        bus.place_bar(0, 0, gpa)?;
        bus.set_config(0, 4, 2, 6)?;
        // Its place reads back all the same.
        equal(
            "low half of BAR 0",
            bus.config(0, 0x10, 4)?,
            gpa & 0xffff_ffff | 4,
        )?;
        equal("command register", bus.config(0, 4, 2)?, 6)?;
        let reports = bus.vm().host().buses();
        let mapped = reports.first().map(|bus| bus.functions[0].bars[0]);
        equal(
            format!("where the BAR at {gpa:#x} is mapped"),
            mapped,
            Some(None),
        )?;
    }
    equal("RAM", bus.vm().read(ram, 16)?, vec![0x77; 16])?;
    let edge = end - BAR_SIZE;
    bus.place_bar(0, 0, edge)?;
    bus.set_config(0, 4, 2, 6)?;
    equal(
        "the last place that there is",
        bus.vm().load(0, edge, 4)?,
        MAGIC,
    )
}

fn over_the_window(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let base = bus.window() / BAR_SIZE * BAR_SIZE;
    bus.place_bar(0, 0, base)?;
    bus.set_config(0, 4, 2, 6)?;
    equal("the vendor id", bus.config(0, 0, 2)?, 0x1234)?;
    for offset in [0x2000, 0x3000] {
        let what = format!("offset {offset:#x} of the BAR");
        equal(what, bus.vm().load(0, base + offset, 4)?, 0xffff_ffff)?;
    }
    bus.place_bar(0, 0, base + BAR_SIZE)?;
    bus.set_config(0, 4, 2, 6)?;
    equal(
        "the place beside it",
        bus.vm().load(0, base + BAR_SIZE, 4)?,
        MAGIC,
    )
}

fn over_another(context: &Context) -> Verdict {
    let functions = vec![Plain::wide().function(0), FunctionSetup::testdev(1)];
    let instance = BusSetup::instance(1);
    let vm = context.machine(&Setup {
        buses: vec![
            BusSetup {
                instance,
                functions,
            },
            BusSetup::testdev(2),
        ],
        ..Setup::default()
    })?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let offers = vmbus.offers()?;
    let buses: Result<Vec<Bus>, Failure> = offers
        .iter()
        .map(|offer| Bus::probe(&vmbus, offer, VERSIONS[0]))
        .collect();
    let buses = buses?;
    place_all(&buses[0], 0)?;
    // BAR 5 lies inside BAR 0.
    place(&buses[0], 0, 5, PLACES[0].1 + 0x3000)?;
    buses[0].set_config(0, 4, 2, 2)?;
    let inside = vm.load(0, PLACES[0].1 + 0x3000, 4)?;
    equal("where both would be", inside, Plain::value(0, 0x3000))?;
    for (bar, gpa, _) in &PLACES[..3] {
        let what = format!("BAR {bar} answers");
        equal(what, answers(&buses[0], *bar, *gpa)?, true)?;
    }
    // Another function, and a function of another bus.
    for (bus, slot) in [(&buses[0], slot(1)), (&buses[1], 0)] {
        for gpa in [PLACES[1].1, PLACES[0].1, PLACES[2].1 + (1 << 29)] {
            bus.place_bar(slot, 0, gpa)?;
            bus.set_config(slot, 4, 2, 2)?;
            let first = vm.load(0, gpa, 4)?;
            equal("first answer at the place", first >> 28, 0xb)?;
        }
    }
    Ok(())
}

fn validated_each_time(context: &Context) -> Verdict {
    let functions = vec![FunctionSetup::testdev(0), FunctionSetup::testdev(1)];
    let bus = bus_with(context, functions)?;
    let first = TestDev::start(&bus, 0)?;
    bus.place_bar(slot(1), 0, first.bar())?;
    bus.set_config(slot(1), 4, 2, 2)?;
    first.store(0x10, 4, 0x1111)?;
    first.set_command(0)?;
    equal(
        "the place after the first left",
        first.load(0, 4)?,
        0xffff_ffff,
    )?;
    // Only an enable looks again: the second gets the place, then the first does not.
    bus.set_config(slot(1), 4, 2, 0)?;
    bus.set_config(slot(1), 4, 2, 2)?;
    equal("SOURCE of who answers", first.load(0x10, 4)?, 0)?;
    first.set_command(2)?;
    equal("SOURCE of who answers still", first.load(0x10, 4)?, 0)?;
    bus.set_config(slot(1), 4, 2, 0)?;
    first.set_command(0)?;
    first.set_command(2)?;
    equal("SOURCE of who answers again", first.load(0x10, 4)?, 0x1111)
}

fn above_and_below(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for gpa in [
        LOW_MMIO + 0x10_0000,
        HIGH_MMIO + 0x8000,
        LOW_MMIO + (16 << 20) - BAR_SIZE,
    ] {
        bus.place_bar(0, 0, gpa)?;
        bus.set_config(0, 4, 2, 2)?;
        equal(
            format!("a load at {gpa:#x}"),
            bus.vm().load(0, gpa, 4)?,
            MAGIC,
        )?;
    }
    Ok(())
}

fn widths(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    // One and two bytes are no access to a register of this device.
    for (offset, width) in [(0, 1), (0, 2), (2, 2), (7, 1)] {
        let what = format!("{width} bytes at {offset:#x}");
        equal(what, device.load(offset, width)?, 0)?;
    }
    device.store(0x10, 2, 0xffff)?;
    equal(
        "SOURCE after a store of two bytes",
        device.load(0x10, 8)?,
        0,
    )?;
    // Nor is what is not aligned.
    device.store(0x11, 4, 0xffff_ffff)?;
    equal("SOURCE after an unaligned store", device.load(0x10, 8)?, 0)?;
    // The table takes 4 and 8 bytes only, and none of its pages is the device's.
    let table = 0x1000;
    device.store(table, 8, 0x1_fee0_0000)?;
    equal(
        "eight bytes of the table",
        device.load(table, 8)?,
        0x1_fee0_0000,
    )?;
    equal("their upper half", device.load(table + 4, 4)?, 1)?;
    for (offset, width) in [(0, 1), (2, 2), (1, 4)] {
        device.store(table + offset, width, 0x55)?;
        let what = format!("the table after {width} bytes at {offset:#x}");
        equal(what, device.load(table, 8)?, 0x1_fee0_0000)?;
    }
    device.store(table + 0x800, 4, 0x1234)?;
    equal(
        "the rest of the table's page",
        device.load(table + 0x800, 4)?,
        0,
    )?;
    equal("MAGIC", device.load(0, 4)?, MAGIC)
}
