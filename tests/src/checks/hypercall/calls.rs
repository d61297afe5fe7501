//! Control words, parameter lists and statuses (docs/spec/hyperv-guest-interface.md, sections 3
//! and 5).
#![forbid(unsafe_code)]

use vm_vpci::cpuid::Features;

use super::kernel;
use crate::check::{Check, Context, Failure, Verdict, equal, holds, is_ud};
use crate::guest::{Call, Cpl};
use crate::host::Setup;
use crate::model::kernel::{
    FAST, Kernel, POST_MESSAGE, RETARGET_INTERRUPT, SIGNAL_EVENT, post_input, status,
};
use crate::model::vm::PAGE;
use crate::model::wire::Bytes;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "hypercall.code.unknown",
        "Every call code that is not offered gets INVALID_HYPERCALL_CODE.",
        &[
            "HV-3.4-02",
            "HV-3.1-01",
            "HV-3.5-04",
            "HV-3.5-05",
            "HV-3.5-06",
            "HV-3.5-07",
        ],
        unknown_codes,
    ),
    Check::new(
        "hypercall.control.reserved-bits",
        "A reserved bit of the control word gets INVALID_HYPERCALL_INPUT.",
        &[
            "HV-3.1-04",
            "HV-3.1-05",
            "HV-3.1-07",
            "HV-3.1-09",
            "HV-3.4-03",
        ],
        reserved_bits,
    ),
    Check::new(
        "hypercall.control.rep-on-simple-call",
        "A rep count or start index on a simple call gets INVALID_HYPERCALL_INPUT.",
        &["HV-3.1-06", "HV-3.1-08", "HV-3.4-03"],
        rep_on_simple,
    ),
    Check::new(
        "hypercall.control.variable-header-on-call-without",
        "A variable header on a call without one gets INVALID_HYPERCALL_INPUT.",
        &["HV-3.1-03", "HV-3.4-03"],
        variable_header,
    ),
    Check::new(
        "hypercall.result.upper-bits",
        "The result of a simple call is its status, with no element counted.",
        &["HV-3.1-10", "HV-3.2-06"],
        result_word,
    ),
    Check::new(
        "hypercall.registers.preserved",
        "Nothing but RAX changes, XMM registers included, whatever the call's end.",
        &[
            "HV-3.2-03",
            "HV-3.2-04",
            "HV-3.2-05",
            "HV-3.2-10",
            "HV-4-05",
        ],
        registers_preserved,
    ),
    Check::new(
        "hypercall.privilege.user-mode",
        "A call from CPL 3 is #UD and has no effect.",
        &["HV-3.2-01"],
        user_mode,
    ),
    Check::new(
        "hypercall.input.misaligned",
        "Input that is not 8-byte aligned gets INVALID_ALIGNMENT.",
        &["HV-3.4-04"],
        misaligned,
    ),
    Check::new(
        "hypercall.input.crosses-a-page",
        "An input list that crosses a page gets INVALID_ALIGNMENT, one that ends at it does not.",
        &["HV-3.4-04", "HV-3.4-22", "HV-5.1-06"],
        crosses_a_page,
    ),
    Check::new(
        "hypercall.input.outside-ram",
        "Input outside RAM gets INVALID_ALIGNMENT.",
        &["HV-3.4-04", "HV-3.4-22"],
        outside_ram,
    ),
    Check::new(
        "hypercall.output.ignored-without",
        "The output address of a call without output is ignored.",
        &["HV-3.4-23"],
        output_ignored,
    ),
    Check::new(
        "hypercall.fast.both-forms",
        "HvSignalEvent works in its fast and in its memory form.",
        &["HV-3.1-02", "HV-3.2-07", "HV-5.2-01", "HV-5.2-02"],
        both_forms,
    ),
    Check::new(
        "hypercall.fast.too-much-input",
        "A fast call with more input than registers can hold gets INVALID_HYPERCALL_INPUT.",
        &["HV-3.4-03"],
        fast_too_large,
    ),
    Check::new(
        "hypercall.fast.xmm-not-offered",
        "A fast call that needs XMM registers is #UD while they are not offered.",
        &["HV-3.2-07", "HV-1.2-07"],
        xmm_not_offered,
    ),
    Check::new(
        "hypercall.fast.xmm-retarget",
        "With XMM input offered, a fast call takes up to 112 bytes and keeps the registers.",
        &["HV-3.2-07", "HV-1.2-07"],
        xmm_retarget,
    ),
    Check::new(
        "hypercall.post.fields",
        "HvPostMessage refuses type 0, type bit 31 and more than 240 bytes.",
        &[
            "HV-5.1-01",
            "HV-5.1-02",
            "HV-5.1-03",
            "HV-5.1-04",
            "HV-5.1-05",
            "HV-5.3-01",
            "HV-3.4-05",
        ],
        post_fields,
    ),
    Check::new(
        "hypercall.post.unknown-connection",
        "HvPostMessage to a connection that does not exist gets INVALID_CONNECTION_ID.",
        &["HV-5.3-01", "HV-5.3-05", "HV-3.4-13"],
        post_unknown_connection,
    ),
    Check::new(
        "hypercall.post.event-connection",
        "HvPostMessage to a connection for events is refused.",
        &["HV-5.3-01", "HV-3.4-12"],
        post_event_connection,
    ),
    Check::new(
        "hypercall.signal.unknown-connection",
        "HvSignalEvent to a connection that does not exist gets INVALID_CONNECTION_ID.",
        &["HV-5.3-04", "HV-3.4-13"],
        signal_unknown_connection,
    ),
];

/// The status of a call without any input in memory.
fn status_of(kernel: &Kernel, control: u64) -> Result<u16, Failure> {
    let input = kernel.input(0);
    Ok(kernel.call(0, control, input, kernel.output(0))?.rax as u16)
}

fn unknown_codes(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    let known = [POST_MESSAGE, SIGNAL_EVENT, RETARGET_INTERRUPT];
    // Of the pvIOMMU calls none is offered while no CPUID bit says so.
    let codes = (0..0x110).chain([0x8000, 0x8001, 0xfffe, 0xffff]);
    // Flushing TLBs, a long wait, and sending IPIs.
    let of_the_kernel = [0x02, 0x03, 0x13, 0x14, 0x08, 0x0b, 0x15];
    let offered =
        |code: &u64| known.contains(code) || (context.is_hybrid() && of_the_kernel.contains(code));
    for code in codes.filter(|code| !offered(code)) {
        for flags in [0, FAST] {
            let got = status_of(&kernel, code | flags)?;
            let what = format!("status of call {code:#x}");
            equal(what, got, status::INVALID_HYPERCALL_CODE)?;
        }
    }
    Ok(())
}

/// A HvPostMessage that would succeed but for the connection.
fn harmless(kernel: &Kernel) -> Result<(), Failure> {
    let input = post_input(0x77_7777, 1, &[0; 8]);
    kernel.vm().write(kernel.input(0), &input.0)
}

fn reserved_bits(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    harmless(&kernel)?;
    for bit in (27..=31).chain(44..=47).chain(60..=63) {
        let got = status_of(&kernel, POST_MESSAGE | 1 << bit)?;
        let what = format!("status with bit {bit} of the control word");
        equal(what, got, status::INVALID_HYPERCALL_INPUT)?;
    }
    Ok(())
}

fn rep_on_simple(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    harmless(&kernel)?;
    for (count, start) in [(1, 0), (0, 1), (2, 1), (0xfff, 0xfff)] {
        let control = POST_MESSAGE | count << 32 | start << 48;
        let what = format!("status with rep count {count} and start {start}");
        equal(
            what,
            status_of(&kernel, control)?,
            status::INVALID_HYPERCALL_INPUT,
        )?;
    }
    Ok(())
}

fn variable_header(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    harmless(&kernel)?;
    for size in [1, 2, 0x3ff] {
        for code in [POST_MESSAGE, SIGNAL_EVENT] {
            let what = format!("status of call {code:#x} with a variable header of {size}");
            let got = status_of(&kernel, code | size << 17)?;
            equal(what, got, status::INVALID_HYPERCALL_INPUT)?;
        }
    }
    Ok(())
}

fn result_word(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    harmless(&kernel)?;
    for (control, expected) in [
        (POST_MESSAGE, status::INVALID_CONNECTION_ID),
        (0x1234, status::INVALID_HYPERCALL_CODE),
    ] {
        let rax = kernel.call(0, control, kernel.input(0), 0)?.rax;
        let what = "status and completed elements of RAX";
        equal(what, (rax as u16, rax >> 32 & 0xfff), (expected, 0))?;
    }
    Ok(())
}

fn registers_preserved(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    harmless(&kernel)?;
    let aligned = kernel.input(0);
    let (secret_rdx, secret_r8) = (0x1122_3344_5566_7788, 0x99aa_bbcc_ddee_ff00);
    for (control, rdx, r8) in [
        (POST_MESSAGE, aligned, secret_r8),
        (POST_MESSAGE, secret_rdx, secret_r8),
        (SIGNAL_EVENT | FAST, secret_rdx, secret_r8),
        (0x1234, secret_rdx, secret_r8),
        (u64::MAX, secret_rdx, secret_r8),
    ] {
        let returned = kernel.call(1, control, rdx, r8)?;
        let got = (returned.rcx, returned.rdx, returned.r8);
        equal("RCX, RDX, R8 after the call", got, (control, rdx, r8))?;
        equal("all other registers preserved", returned.preserved, true)?;
    }
    Ok(())
}

fn user_mode(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    // Would make contact if it were taken.
    let mut contact = Bytes::words(&[14, 0, 0x5_0003, 0, 2, 0]).up_to(40);
    contact = post_input(4, 1, &contact.0);
    kernel.vm().write(kernel.input(0), &contact.0)?;
    let call = Call {
        entry: kernel.page(),
        control: POST_MESSAGE,
        rdx: kernel.input(0),
        cpl: Cpl::User,
        ..Call::default()
    };
    is_ud("a hypercall at CPL 3", kernel.vm().hypercall(0, &call))?;
    kernel.vm().settle();
    equal("messages of the host", kernel.synic(0).peek(2)?, None)
}

fn misaligned(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    for offset in 1..8 {
        let input = kernel.input(0) + offset;
        kernel.vm().write(input, &post_input(0x77, 1, &[0; 8]).0)?;
        let got = kernel.call(0, POST_MESSAGE, input, 0)?.rax as u16;
        equal(
            format!("status at offset {offset}"),
            got,
            status::INVALID_ALIGNMENT,
        )?;
    }
    Ok(())
}

fn crosses_a_page(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    let pages = kernel.vm().pages(2)?;
    for (offset, expected) in [
        (PAGE - 256, status::INVALID_CONNECTION_ID),
        (PAGE - 248, status::INVALID_ALIGNMENT),
        (PAGE - 8, status::INVALID_ALIGNMENT),
    ] {
        let message = post_input(0x77, 1, &[0; 8]);
        kernel.vm().write(pages + offset, &message.0)?;
        let got = kernel.call(0, POST_MESSAGE, pages + offset, 0)?.rax as u16;
        equal(format!("status at offset {offset:#x}"), got, expected)?;
    }
    Ok(())
}

fn outside_ram(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    let end = kernel.vm().setup().ram.last().map_or(0, |range| range.end);
    for gpa in [
        end,
        0xf000_0000,
        1 << 51,
        1 << 63,
        u64::MAX - 0xfff,
        u64::MAX - 7,
    ] {
        for code in [POST_MESSAGE, SIGNAL_EVENT, RETARGET_INTERRUPT] {
            let got = kernel.call(0, code, gpa, 0)?.rax as u16;
            let what = format!("status of call {code:#x} with input at {gpa:#x}");
            equal(what, got, status::INVALID_ALIGNMENT)?;
        }
    }
    Ok(())
}

fn output_ignored(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    harmless(&kernel)?;
    let page = kernel.output(0);
    for output in [page, page + 1, 1 << 62, u64::MAX] {
        let got = kernel.call(0, POST_MESSAGE, kernel.input(0), output)?.rax as u16;
        let what = format!("status with output at {output:#x}");
        equal(what, got, status::INVALID_CONNECTION_ID)?;
    }
    let written = kernel.vm().read(page, PAGE as usize)?;
    holds(
        "the output page is untouched",
        written.iter().all(|byte| *byte == 0),
    )
}

fn both_forms(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    let fast = kernel.signal(0, 0x77_7777, 0)?;
    equal(
        "status of the fast form",
        fast,
        status::INVALID_CONNECTION_ID,
    )?;
    let input = Bytes::words(&[0x77_7777, 0]);
    let memory = kernel.call_with(0, SIGNAL_EVENT, &input.0)?;
    equal(
        "status of the memory form",
        memory,
        status::INVALID_CONNECTION_ID,
    )
}

fn fast_too_large(context: &Context) -> Verdict {
    let features = Features {
        xmm_input: true,
        ..Features::default()
    };
    let vm = context.machine(&Setup {
        features,
        ..Setup::default()
    })?;
    let kernel = Kernel::boot(&vm)?;
    let got = kernel.call(0, POST_MESSAGE | FAST, 0, 0)?.rax as u16;
    equal(
        "status of a fast HvPostMessage",
        got,
        status::INVALID_HYPERCALL_INPUT,
    )?;
    // 56 bytes fixed and 57 more.
    let got = kernel
        .call(0, RETARGET_INTERRUPT | FAST | 8 << 17, 0, 0)?
        .rax as u16;
    equal(
        "status of a fast retarget of 120 bytes",
        got,
        status::INVALID_HYPERCALL_INPUT,
    )
}

/// A retarget of a device that does not exist, as registers.
fn retarget_in_registers(kernel: &Kernel) -> Call {
    let mut xmm = [0; 6];
    // Partition and device go in RDX and R8; source MSI and the message begin XMM0.
    xmm[0] = 1 | 0xfee0_0000 << 64;
    xmm[1] = 0x41 << 64;
    xmm[2] = 1;
    Call {
        entry: kernel.page(),
        control: RETARGET_INTERRUPT | FAST,
        rdx: u64::MAX,
        r8: 0xdead_0000,
        xmm: Some(xmm),
        cpl: Cpl::Kernel,
    }
}

fn xmm_not_offered(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    let call = retarget_in_registers(&kernel);
    is_ud(
        "a fast call with 56 bytes of input",
        kernel.vm().hypercall(0, &call),
    )
}

fn xmm_retarget(context: &Context) -> Verdict {
    let features = Features {
        xmm_input: true,
        ..Features::default()
    };
    let vm = context.machine(&Setup {
        features,
        ..Setup::default()
    })?;
    let kernel = Kernel::boot(&vm)?;
    let call = retarget_in_registers(&kernel);
    let returned = vm.hypercall(0, &call)?;
    // The device id was read from the registers: everything else about the call is right.
    equal("status", returned.rax as u16, status::INVALID_DEVICE_ID)?;
    equal("XMM registers after the call", Some(returned.xmm), call.xmm)
}

fn post_fields(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    let connection = 4;
    for (message_type, size) in [
        (0, 8),
        (0x8000_0000, 8),
        (0x8000_0001, 8),
        (1, 241),
        (1, u32::MAX),
    ] {
        let input = Bytes::words(&[connection, 0, message_type, size]).up_to(256);
        let got = kernel.call_with(0, POST_MESSAGE, &input.0)?;
        let what = format!("status with type {message_type:#x} and size {size}");
        equal(what, got, status::INVALID_PARAMETER)?;
    }
    kernel.vm().settle();
    equal("messages of the host", kernel.synic(0).peek(2)?, None)
}

fn post_unknown_connection(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    for connection in [0, 5, 6, 0x80_0074, 0xff_ffff] {
        let got = kernel.post(0, connection, &[0; 8])?;
        let what = format!("status with connection {connection:#x}");
        equal(what, got, status::INVALID_CONNECTION_ID)?;
    }
    Ok(())
}

fn post_event_connection(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    // 2 and 3 are the event connections of old protocols; this host may not have them at all.
    for connection in [2, 3] {
        let got = kernel.post(0, connection, &[0; 8])?;
        holds(
            format!("status with connection {connection}: {got:#x}"),
            [status::INVALID_CONNECTION_ID, status::INVALID_PORT_ID].contains(&got),
        )?;
    }
    Ok(())
}

fn signal_unknown_connection(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    for connection in [0, 5, 0x2001, 0x2fff, 0xff_ffff] {
        let got = kernel.signal(0, connection, 0)?;
        let what = format!("status with connection {connection:#x}");
        equal(what, got, status::INVALID_CONNECTION_ID)?;
    }
    Ok(())
}
