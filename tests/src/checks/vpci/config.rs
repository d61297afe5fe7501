//! Configuration space behind the window (docs/spec/vpci.md, section 6).
#![forbid(unsafe_code)]

use super::{bus_with, in_d0};
use crate::check::{Check, Context, Verdict, equal, holds};
use crate::devices::Plain;
use crate::host::FunctionSetup;
use crate::model::testdev::{CAP_MSI, CAP_MSIX};
use crate::model::vpci::slot;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vpci.config.every-access",
        "Each aligned access of 1, 2 and 4 bytes to all 4096 bytes is answered, and alike.",
        &["VP-6-02", "VP-6-05"],
        every_access,
    ),
    Check::new(
        "vpci.config.end-of-space",
        "The last dword of the space can be accessed in each width.",
        &["VP-6-05"],
        end_of_space,
    ),
    Check::new(
        "vpci.config.crossing",
        "An access that crosses a dword, or of eight bytes, reads all ones and stores nothing.",
        &["VP-6-05", "VP-6-02"],
        crossing,
    ),
    Check::new(
        "vpci.config.identity",
        "Identity, class and subsystem are what the device says, and cannot be written.",
        &["VP-6-07", "VP-6-09", "VP-6-13", "VP-11-15"],
        identity,
    ),
    Check::new(
        "vpci.config.header-type",
        "The header type is 0; bit 7 is set in function 0 of a bus of several functions alone.",
        &["VP-6-10"],
        header_type,
    ),
    Check::new(
        "vpci.config.command",
        "Of the command register the guest has memory decode and bus mastering; no I/O space.",
        &["VP-6-08", "VP-6-19", "VP-11-15"],
        command,
    ),
    Check::new(
        "vpci.config.not-there",
        "CardBus pointer, expansion ROM, interrupt line and pin are 0 and stay 0.",
        &["VP-6-12", "VP-6-14", "VP-6-16", "VP-7.1-13"],
        not_there,
    ),
    Check::new(
        "vpci.config.capability-list",
        "The capability list ends, and holds MSI and MSI-X as the device has them.",
        &["VP-6-15", "VP-6-17"],
        capability_list,
    ),
    Check::new(
        "vpci.config.read-only-capabilities",
        "Structure and sizes of capabilities cannot be written.",
        &["VP-11-15", "VP-6-15"],
        read_only_capabilities,
    ),
    Check::new(
        "vpci.config.writable-bits",
        "Of a capability of the device's own exactly the writable bits can be written.",
        &["VP-11-15", "VP-6-17"],
        writable_bits,
    ),
    Check::new(
        "vpci.config.partial-stores",
        "A store of one or two bytes changes those bytes only.",
        &["VP-6-02", "VP-6-11"],
        partial_stores,
    ),
    Check::new(
        "vpci.config.no-extended-capabilities",
        "Behind the first 256 bytes a device without extended capabilities reads 0.",
        &["VP-6-17"],
        no_extended,
    ),
];

fn every_access(context: &Context) -> Verdict {
    let bus = bus_with(context, vec![Plain::wide().function(0)])?;
    let (vm, page) = (bus.vm(), bus.window() + 0x1000);
    vm.store(0, bus.window(), 4, 0)?;
    for at in (0..0x1000).step_by(4) {
        let whole = vm.load(0, page + at, 4)?;
        // Single bytes of the header and the capabilities; of the zeros behind, samples.
        if at >= 0x100 && at % 0x80 != 0 {
            continue;
        }
        for (width, step) in [(1, 8), (2, 16)] {
            for part in (0..4).step_by(width) {
                let want = whole >> (8 * part) & ((1 << step) - 1);
                let what = format!("{width} bytes at {:#x}", at + part as u64);
                equal(what, vm.load(0, page + at + part as u64, width)?, want)?;
            }
        }
    }
    Ok(())
}

fn end_of_space(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for (offset, width) in [(0xffc, 4), (0xffc, 2), (0xffe, 2), (0xffd, 1), (0xfff, 1)] {
        let what = format!("{width} bytes at {offset:#x}");
        equal(what, bus.config(0, offset, width)?, 0)?;
        bus.set_config(0, offset, width, u64::MAX >> (64 - 8 * width))?;
        let what = format!("{width} bytes at {offset:#x} after a store");
        equal(what, bus.config(0, offset, width)?, 0)?;
    }
    Ok(())
}

fn crossing(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let before = bus.config(0, 0x10, 4)?;
    for (offset, width) in [
        (0x0f, 2),
        (0x11, 4),
        (0x12, 4),
        (0x13, 2),
        (0x13, 4),
        (0x10, 8),
        (0x0c, 8),
        (0x01, 4),
    ] {
        let ones = u64::MAX >> (64 - 8 * width);
        let what = format!("{width} bytes at {offset:#x}");
        equal(what, bus.config(0, offset, width)?, ones)?;
        bus.set_config(0, offset, width, 0x5a5a_5a5a_5a5a_5a5a & ones)?;
        equal("BAR 0 after a store", bus.config(0, 0x10, 4)?, before)?;
    }
    Ok(())
}

fn identity(context: &Context) -> Verdict {
    let bus = bus_with(context, vec![Plain::wide().function(0)])?;
    let fixed = [
        (0x00, 0x5651_1234),
        (0x08, 0xff22_335a),
        (0x2c, 0x0042_1af4),
    ];
    for (offset, value) in fixed {
        equal(
            format!("dword {offset:#x}"),
            bus.config(0, offset, 4)?,
            value,
        )?;
        for written in [0xffff_ffff, 0, 0x1234_5678] {
            bus.set_config(0, offset, 4, written)?;
            bus.set_config(0, offset + 1, 1, written & 0xff)?;
            let what = format!("dword {offset:#x} after a store");
            equal(what, bus.config(0, offset, 4)?, value)?;
        }
    }
    Ok(())
}

fn header_type(context: &Context) -> Verdict {
    let one = in_d0(context)?;
    equal(
        "header type of a single function",
        one.config(0, 0xe, 1)?,
        0,
    )?;
    let functions = vec![FunctionSetup::testdev(0), FunctionSetup::testdev(5)];
    let two = bus_with(context, functions)?;
    equal("header type of function 0", two.config(0, 0xe, 1)?, 0x80)?;
    equal("header type of function 5", two.config(slot(5), 0xe, 1)?, 0)?;
    for function in [0, 5] {
        let before = two.config(slot(function), 0xc, 4)?;
        two.set_config(slot(function), 0xc, 4, 0xffff_ff00)?;
        let what = format!("dword 0xc of function {function} after a store");
        equal(
            what,
            two.config(slot(function), 0xc, 4)? & !0xff,
            before & !0xff,
        )?;
    }
    Ok(())
}

fn command(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let status = bus.config(0, 6, 2)?;
    equal("status: a capability list", status & 0x10, 0x10)?;
    bus.set_config(0, 4, 4, 0xffff_ffff)?;
    let all = bus.config(0, 4, 2)?;
    equal("I/O decode and mastering, memory decode", all & 7, 6)?;
    equal("special cycles, MWI, VGA snoop", all & 0x38, 0)?;
    equal(
        "status after a store of all ones",
        bus.config(0, 6, 2)?,
        status,
    )?;
    for value in [0, 2, 4, 6, 0] {
        bus.set_config(0, 4, 2, value)?;
        equal("command register", bus.config(0, 4, 2)?, value)?;
    }
    Ok(())
}

fn not_there(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for offset in [0x28, 0x30, 0x38, 0x3c] {
        equal(format!("dword {offset:#x}"), bus.config(0, offset, 4)?, 0)?;
        bus.set_config(0, offset, 4, 0xffff_ffff)?;
        let what = format!("dword {offset:#x} after a store");
        equal(what, bus.config(0, offset, 4)? & 0xffff_ff00, 0)?;
        equal("the interrupt pin", bus.config(0, 0x3d, 1)?, 0)?;
    }
    equal("the ROM's register", bus.config(0, 0x30, 4)?, 0)
}

fn capability_list(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let pointer = bus.config(0, 0x34, 4)?;
    holds(
        "the pointer is aligned",
        pointer & !0xfc == 0 && pointer >= 0x40,
    )?;
    let msix = bus.capability(0, CAP_MSIX)?.unwrap_or(0);
    holds("there is MSI-X", msix >= 0x40)?;
    equal("MSI-X control: 8 vectors", bus.config(0, msix + 2, 2)?, 7)?;
    equal("MSI-X table", bus.config(0, msix + 4, 4)?, 0x1000)?;
    equal("MSI-X pending bits", bus.config(0, msix + 8, 4)?, 0x2000)?;
    let msi = bus.capability(0, CAP_MSI)?.unwrap_or(0);
    holds("there is MSI", msi >= 0x40)?;
    // 8 messages, 64-bit, masks.
    equal("MSI control", bus.config(0, msi + 2, 2)?, 0x0186)
}

fn read_only_capabilities(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let pointer = bus.config(0, 0x34, 1)?;
    let (msix, msi) = (bus.capability(0, CAP_MSIX)?, bus.capability(0, CAP_MSI)?);
    let (Some(msix), Some(msi)) = (msix, msi) else {
        return holds("MSI and MSI-X are there", false);
    };
    // Of message controls the enable, mask and multiple message enable bits are the guest's.
    let fixed = [
        (msix, 0x3fff_ffff),
        (msix + 4, 0xffff_ffff),
        (msix + 8, 0xffff_ffff),
        (msi, 0xff8e_ffff),
        (msi + 20, 0xffff_ffff),
    ];
    let before: Vec<u64> = fixed
        .iter()
        .map(|(at, _)| bus.config(0, *at, 4))
        .collect::<Result<_, _>>()?;
    for written in [0xffff_ffff, 0] {
        bus.set_config(0, 0x34, 4, written)?;
        for (at, _) in fixed {
            bus.set_config(0, at, 4, written)?;
        }
        for ((at, mask), before) in fixed.iter().zip(&before) {
            let what = format!("dword {at:#x} after a store of {written:#x}");
            equal(what, bus.config(0, *at, 4)? & mask, before & mask)?;
        }
        equal("capability pointer", bus.config(0, 0x34, 1)?, pointer)?;
    }
    // Bits of the address that a message cannot have, and reserved ones of the data.
    bus.set_config(0, msi + 4, 4, 0xffff_ffff)?;
    equal("MSI address", bus.config(0, msi + 4, 4)?, 0xffff_fffc)?;
    bus.set_config(0, msi + 12, 4, 0xffff_ffff)?;
    equal("MSI data", bus.config(0, msi + 12, 4)?, 0xffff)
}

fn writable_bits(context: &Context) -> Verdict {
    let bus = bus_with(context, vec![Plain::wide().function(0)])?;
    let Some(at) = bus.capability(0, 9)? else {
        return holds("the vendor's capability is there", false);
    };
    let head = bus.config(0, at, 4)?;
    equal("length and first byte", head >> 16, 0xa10a)?;
    equal("fixed bytes", bus.config(0, at + 4, 4)?, 0x00a4_a3a2)?;
    for written in [0xffff_ffff, 0x1234_5678, 0] {
        for offset in [0, 4, 8] {
            bus.set_config(0, at + offset, 4, written)?;
        }
        equal("head after a store", bus.config(0, at, 4)?, head)?;
        let fixed = bus.config(0, at + 4, 4)?;
        equal("fixed bytes after a store", fixed, 0x00a4_a3a2)?;
        equal("writable bytes", bus.config(0, at + 8, 4)?, written)?;
    }
    Ok(())
}

fn partial_stores(context: &Context) -> Verdict {
    let bus = bus_with(context, vec![Plain::wide().function(0)])?;
    let Some(at) = bus.capability(0, 9)? else {
        return holds("the vendor's capability is there", false);
    };
    let at = at + 8;
    bus.set_config(0, at, 4, 0x1122_3344)?;
    bus.set_config(0, at + 1, 1, 0xaa)?;
    equal(
        "after a store of a byte",
        bus.config(0, at, 4)?,
        0x1122_aa44,
    )?;
    bus.set_config(0, at + 2, 2, 0xbbcc)?;
    equal(
        "after a store of two bytes",
        bus.config(0, at, 4)?,
        0xbbcc_aa44,
    )?;
    bus.set_config(0, at, 1, 0x01)?;
    equal(
        "after a store of a byte",
        bus.config(0, at, 4)?,
        0xbbcc_aa01,
    )?;
    // A BAR too takes its bytes one by one.
    bus.set_config(0, 0x13, 1, 0xf1)?;
    equal("BAR 0", bus.config(0, 0x10, 4)?, 0xf100_0000)?;
    bus.set_config(0, 0x12, 2, 0xf23f)?;
    equal("BAR 0", bus.config(0, 0x10, 4)?, 0xf23f_0000)
}

fn no_extended(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for offset in [0x100, 0x104, 0x200, 0x800, 0xff8] {
        equal(format!("dword {offset:#x}"), bus.config(0, offset, 4)?, 0)?;
        bus.set_config(0, offset, 4, 0xffff_ffff)?;
        equal(
            format!("dword {offset:#x} after a store"),
            bus.config(0, offset, 4)?,
            0,
        )?;
    }
    Ok(())
}
