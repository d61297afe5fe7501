//! Message slots, event flags and the registers that govern them
//! (docs/spec/hyperv-guest-interface.md, section 6).
//!
//! Messages are made with TL_CONNECT_REQUEST: each is answered by one message that carries its
//! GUIDs (docs/spec/vmbus.md, section 5).
#![forbid(unsafe_code)]

use crate::check::{Check, Context, Failure, Verdict, equal, holds, is_gp};
use crate::model::kernel::{Kernel, VMBUS_SINT, VMBUS_VECTOR, msr, status};
use crate::model::synic::{MASKED, Synic};
use crate::model::vm::PAGE;
use crate::model::vmbus::VmBus;
use crate::model::vpci::{Bus, message};
use crate::model::wire::{Bytes, u32_at};

/// SINT bit: the guest polls.
const POLLING: u64 = 1 << 18;
/// Most messages that a host may be expected to keep for a guest that takes none.
const MANY: u32 = 100_000;

/// Checks of messages.
pub const MESSAGES: &[Check] = &[
    Check::new(
        "synic.message.slot",
        "A message lies in its SINT's slot as documented, and the other slots stay free.",
        &[
            "HV-6.1-01",
            "HV-6.1-02",
            "HV-6.1-03",
            "HV-6.1-04",
            "HV-6.1-05",
            "HV-6.1-06",
            "HV-6.1-07",
            "VB-1-02",
        ],
        slot,
    ),
    Check::new(
        "synic.message.interrupt",
        "A message raises its SINT's vector, once, and on the VP of its slot alone.",
        &["HV-6.1-08"],
        interrupt,
    ),
    Check::new(
        "synic.message.pending",
        "A message for an occupied slot sets the pending flag, and comes after EOM.",
        &["HV-6.1-09", "HV-6.1-11", "HV-6.1-12"],
        pending,
    ),
    Check::new(
        "synic.message.eom-with-occupied-slot",
        "EOM with the slot still occupied changes nothing in it.",
        &["HV-6.1-09", "HV-6.1-11", "HV-2-15"],
        eom_while_occupied,
    ),
    Check::new(
        "synic.message.next-message-without-eom",
        "A slot that was freed without EOM takes the waiting message when the next one comes.",
        &["HV-6.1-11"],
        next_without_eom,
    ),
    Check::new(
        "synic.message.order",
        "Messages of a VP come in the order in which they were caused, each once.",
        &["HV-6.1-13", "VB-1-05"],
        order,
    ),
    Check::new(
        "synic.message.masked",
        "With the SINT masked the message comes, its interrupt does not, then or later.",
        &["HV-6.1-15", "HV-6-01"],
        masked,
    ),
    Check::new(
        "synic.message.polling",
        "With the SINT's polling bit the message comes without an interrupt.",
        &["HV-6-01"],
        polling,
    ),
    Check::new(
        "synic.message.disabled-page",
        "Without a message page a message waits until there is one.",
        &["HV-2-14", "HV-6.1-11"],
        disabled_page,
    ),
    Check::new(
        "synic.message.disabled-synic",
        "With SCONTROL off a message waits until it is on.",
        &["HV-2-11", "HV-6-03"],
        disabled_synic,
    ),
    Check::new(
        "synic.message.no-store-after-disable",
        "The host leaves a message page alone once it is disabled.",
        &["HV-2-14", "HV-6-03"],
        no_store_after_disable,
    ),
    Check::new(
        "synic.message.back-pressure",
        "A guest that takes no message is told to retry at some point, and loses none.",
        &["HV-5.3-03", "HV-3.4-14", "VB-8-14"],
        back_pressure,
    ),
];

/// Checks of registers.
pub const REGISTERS: &[Check] = &[
    Check::new(
        "synic.page.zeroed",
        "A message or event flags page reads zero when it is enabled or moved, and not else.",
        &["HV-6.1-16"],
        page_zeroed,
    ),
    Check::new(
        "synic.page.outside-ram",
        "A message or event flags page outside RAM is #GP and changes nothing.",
        &["HV-2-26"],
        page_outside_ram,
    ),
    Check::new(
        "synic.sint.low-vector",
        "An unmasked SINT with a vector below 16 is #GP; a masked one is not.",
        &["HV-2-25", "HV-2-16"],
        low_vector,
    ),
    Check::new(
        "synic.sint.vector",
        "A SINT's interrupt has the vector that the SINT holds at that moment.",
        &["HV-6-01"],
        vector,
    ),
];

/// Checks of event flags.
pub const EVENTS: &[Check] = &[
    Check::new(
        "synic.event.flag-and-interrupt",
        "An event sets the channel's flag in the SINT's part, and raises the SINT.",
        &["HV-6.2-01", "HV-6.2-02", "HV-2-13", "VB-6-01"],
        event,
    ),
    Check::new(
        "synic.event.merged",
        "An event whose flag is still set raises nothing; after it was cleared the next one does.",
        &["HV-6.2-02"],
        event_merged,
    ),
    Check::new(
        "synic.event.refused",
        "With the page, the SynIC or the SINT off no flag is set and nothing is raised.",
        &["HV-6.2-04"],
        event_refused,
    ),
];

/// All checks of this area.
pub const CHECKS: [&[Check]; 3] = [MESSAGES, REGISTERS, EVENTS];

/// A guest in contact, with nothing pending.
fn connected(context: &Context) -> Result<VmBus, Failure> {
    let vmbus = VmBus::connect(&Kernel::boot(&context.usual()?)?)?;
    vmbus.vm().take_interrupts(0)?;
    Ok(vmbus)
}

/// Causes a message that carries `tag`; returns the status of the hypercall.
fn ask(vmbus: &VmBus, tag: u32) -> Result<u16, Failure> {
    let request = Bytes::words(&[21, 0]).bytes(&tag.to_le_bytes().repeat(8));
    let got = vmbus.post(vmbus.connection(), &request.0)?;
    vmbus.vm().settle();
    Ok(got)
}

/// The same, which must be taken.
fn must_ask(vmbus: &VmBus, tag: u32) -> Verdict {
    equal("status of HvPostMessage", ask(vmbus, tag)?, status::SUCCESS)
}

/// The tag that an answer carries.
fn tag(payload: &[u8]) -> Result<u32, Failure> {
    let head = payload.get(..12).map(|head| u32_at(head, 0));
    equal("number of the message", head, Some(23))?;
    Ok(u32_at(payload, 8))
}

/// The tag of the message in the slot, taken without EOM.
fn take_tag(synic: &Synic) -> Result<Option<u32>, Failure> {
    match synic.take_without_eom(VMBUS_SINT)? {
        Some(message) => Ok(Some(tag(&message.payload)?)),
        None => Ok(None),
    }
}

fn slot(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let (vm, synic) = (vmbus.vm(), vmbus.kernel().synic(0));
    must_ask(&vmbus, 0x1234_5678)?;
    let bytes = vm.read(synic.slot(VMBUS_SINT), 256)?;
    equal("message type", u32_at(&bytes, 0), 1)?;
    equal("payload size", bytes[4], 44)?;
    equal("flags and reserved bytes", &bytes[5..8], &[0, 0, 0])?;
    equal("tag in the payload", tag(&bytes[16..])?, 0x1234_5678)?;
    let page = synic.message_page()?;
    let mut others = (0..1024).filter(|word| word / 64 != usize::from(VMBUS_SINT));
    holds(
        "the other slots are free",
        others.all(|word| page[word] == 0),
    )
}

fn interrupt(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    must_ask(&vmbus, 1)?;
    vmbus.vm().expect_interrupt(0, VMBUS_VECTOR)?;
    equal(
        "further interrupts of VP 0",
        vmbus.vm().take_interrupts(0)?,
        vec![],
    )?;
    equal("interrupts of VP 1", vmbus.vm().take_interrupts(1)?, vec![])
}

fn pending(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let synic = vmbus.kernel().synic(0);
    must_ask(&vmbus, 1)?;
    vmbus.vm().take_interrupts(0)?;
    must_ask(&vmbus, 2)?;
    let message = synic.peek(VMBUS_SINT)?;
    let flags = message.as_ref().map(|message| message.flags);
    equal("flags of the message in the slot", flags, Some(1))?;
    let held = tag(&message.map(|message| message.payload).unwrap_or_default())?;
    equal("tag of the message in the slot", held, 1)?;
    equal(
        "interrupts meanwhile",
        vmbus.vm().take_interrupts(0)?,
        vec![],
    )?;
    let first = synic.take_without_eom(VMBUS_SINT)?;
    let flags = first.map(|message| message.flags);
    equal("flags after the slot was freed", flags, Some(1))?;
    synic.eom()?;
    vmbus.vm().expect_interrupt(0, VMBUS_VECTOR)?;
    let second = synic.peek(VMBUS_SINT)?.map(|message| message.flags);
    equal("flags of the second message", second, Some(0))?;
    equal("tag of the second message", take_tag(synic)?, Some(2))
}

fn eom_while_occupied(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let synic = vmbus.kernel().synic(0);
    must_ask(&vmbus, 1)?;
    must_ask(&vmbus, 2)?;
    vmbus.vm().take_interrupts(0)?;
    let before = synic.message_page()?;
    for _ in 0..3 {
        synic.eom()?;
        vmbus.vm().settle();
    }
    equal("message page after EOM", synic.message_page()?, before)?;
    equal("interrupts of EOM", vmbus.vm().take_interrupts(0)?, vec![])?;
    equal("tag of the first message", take_tag(synic)?, Some(1))?;
    synic.eom()?;
    equal("tag of the second message", take_tag(synic)?, Some(2))?;
    // Nothing waits: EOM is without effect.
    synic.eom()?;
    equal("further messages", take_tag(synic)?, None)
}

fn next_without_eom(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let synic = vmbus.kernel().synic(0);
    must_ask(&vmbus, 1)?;
    must_ask(&vmbus, 2)?;
    equal("tag of the first message", take_tag(synic)?, Some(1))?;
    must_ask(&vmbus, 3)?;
    equal("tag of the second message", take_tag(synic)?, Some(2))?;
    synic.eom()?;
    equal("tag of the third message", take_tag(synic)?, Some(3))
}

fn order(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let synic = vmbus.kernel().synic(0);
    for tag in 0..200 {
        must_ask(&vmbus, tag)?;
    }
    for expected in 0..200 {
        equal("tag of a message", take_tag(synic)?, Some(expected))?;
        synic.eom()?;
    }
    equal("further messages", take_tag(synic)?, None)
}

fn without_interrupt(context: &Context, bits: u64) -> Verdict {
    let vmbus = connected(context)?;
    let synic = vmbus.kernel().synic(0);
    synic.set_sint(VMBUS_SINT, u64::from(VMBUS_VECTOR) | bits)?;
    must_ask(&vmbus, 7)?;
    equal("interrupts", vmbus.vm().take_interrupts(0)?, vec![])?;
    synic.set_sint(VMBUS_SINT, VMBUS_VECTOR.into())?;
    equal(
        "interrupts afterwards",
        vmbus.vm().take_interrupts(0)?,
        vec![],
    )?;
    equal("tag of the message", take_tag(synic)?, Some(7))?;
    must_ask(&vmbus, 8)?;
    vmbus.vm().expect_interrupt(0, VMBUS_VECTOR)
}

fn masked(context: &Context) -> Verdict {
    without_interrupt(context, MASKED)
}

fn polling(context: &Context) -> Verdict {
    without_interrupt(context, POLLING)
}

fn disabled_page(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let (vm, synic) = (vmbus.vm(), vmbus.kernel().synic(0));
    let simp = vm.rdmsr(0, msr::SIMP)?;
    vm.wrmsr(0, msr::SIMP, simp & !1)?;
    must_ask(&vmbus, 7)?;
    equal("message type in the slot", synic.pending(VMBUS_SINT)?, 0)?;
    equal("interrupts meanwhile", vm.take_interrupts(0)?, vec![])?;
    vm.wrmsr(0, msr::SIMP, simp)?;
    vm.expect_interrupt(0, VMBUS_VECTOR)?;
    equal("tag of the message", take_tag(synic)?, Some(7))
}

fn disabled_synic(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let (vm, synic) = (vmbus.vm(), vmbus.kernel().synic(0));
    vm.wrmsr(0, msr::SCONTROL, 0)?;
    must_ask(&vmbus, 7)?;
    equal("message type in the slot", synic.pending(VMBUS_SINT)?, 0)?;
    equal("interrupts meanwhile", vm.take_interrupts(0)?, vec![])?;
    vm.wrmsr(0, msr::SCONTROL, 1)?;
    vm.expect_interrupt(0, VMBUS_VECTOR)?;
    equal("tag of the message", take_tag(synic)?, Some(7))
}

fn no_store_after_disable(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let synic = vmbus.kernel().synic(0);
    must_ask(&vmbus, 1)?;
    must_ask(&vmbus, 2)?;
    synic.disable(VMBUS_SINT)?;
    let page = synic.slot(0);
    vmbus.vm().ram().fill(page, PAGE, 0x5a)?;
    vmbus.vm().ram().fill(page, PAGE, 0)?;
    must_ask(&vmbus, 3)?;
    synic.eom()?;
    vmbus.vm().settle();
    let page = synic.message_page()?;
    holds(
        "the page that was disabled is untouched",
        page.iter().all(|word| *word == 0),
    )
}

fn back_pressure(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let synic = vmbus.kernel().synic(0);
    let mut taken = 0;
    let refusal = loop {
        if taken == MANY {
            break status::SUCCESS;
        }
        match ask(&vmbus, taken)? {
            status::SUCCESS => taken += 1,
            refusal => break refusal,
        }
    };
    let what = format!("status of HvPostMessage after {taken} messages that nobody takes");
    equal(what, refusal, status::INSUFFICIENT_BUFFERS)?;
    for expected in 0..taken {
        equal("tag of a message", take_tag(synic)?, Some(expected))?;
        synic.eom()?;
        vmbus.vm().settle();
    }
    equal("further messages", take_tag(synic)?, None)?;
    must_ask(&vmbus, 1)?;
    equal("tag of a message afterwards", take_tag(synic)?, Some(1))
}

fn page_zeroed(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let pages = vm.pages(2)?;
    for number in [msr::SIMP, msr::SIEFP] {
        let is_zero = |gpa, expected: bool, what: &str| {
            let zero = vm.read(gpa, PAGE as usize)?.iter().all(|byte| *byte == 0);
            equal(
                format!("MSR {number:#x}: page is zero {what}"),
                zero,
                expected,
            )
        };
        vm.ram().fill(pages, 2 * PAGE, 0x5a)?;
        vm.wrmsr(0, number, pages)?;
        is_zero(pages, false, "while it is not enabled")?;
        vm.wrmsr(0, number, pages | 1)?;
        is_zero(pages, true, "when it is enabled")?;
        vm.ram().fill(pages, PAGE, 0x5a)?;
        vm.wrmsr(0, number, pages | 1)?;
        is_zero(pages, false, "when the same value is written again")?;
        vm.wrmsr(0, number, (pages + PAGE) | 1)?;
        is_zero(pages + PAGE, true, "when it has moved")?;
        is_zero(pages, false, "where it was before")?;
    }
    Ok(())
}

fn page_outside_ram(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let page = vm.pages(1)?;
    let end = vm.setup().ram.last().map_or(0, |range| range.end);
    for number in [msr::SIMP, msr::SIEFP] {
        vm.wrmsr(0, number, page | 1)?;
        for gpa in [end, 0xf000_0000, 1 << 51, 0xffff_ffff_ffff_f000] {
            let what = format!("MSR {number:#x} <- {gpa:#x} | 1");
            is_gp(what, vm.wrmsr(0, number, gpa | 1))?;
        }
        equal("the MSR after that", vm.rdmsr(0, number)?, page | 1)?;
    }
    Ok(())
}

fn low_vector(context: &Context) -> Verdict {
    let vm = context.usual()?;
    for sint in 0..16 {
        let number = msr::SINT0 + sint;
        for vector in [0, 1, 15] {
            let what = format!("SINT{sint} <- {vector:#x}");
            is_gp(what, vm.wrmsr(0, number, vector))?;
            equal("SINT after that", vm.rdmsr(0, number)?, MASKED)?;
        }
        vm.wrmsr(0, number, MASKED | 15)?;
        vm.wrmsr(0, number, MASKED)?;
        vm.wrmsr(0, number, 16)?;
        equal("SINT with vector 16", vm.rdmsr(0, number)?, 16)?;
        vm.wrmsr(0, number, MASKED)?;
    }
    Ok(())
}

fn vector(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let synic = vmbus.kernel().synic(0);
    for vector in [0x30, 0xfe, VMBUS_VECTOR] {
        synic.set_sint(VMBUS_SINT, vector.into())?;
        must_ask(&vmbus, vector.into())?;
        vmbus.vm().expect_interrupt(0, vector)?;
        equal("tag of the message", take_tag(synic)?, Some(vector.into()))?;
    }
    Ok(())
}

/// A bus, its channel quiet.
fn quiet_bus(context: &Context) -> Result<Bus, Failure> {
    let bus = Bus::bring_up(&context.usual()?)?;
    bus.channel().interrupted()?;
    bus.vm().take_interrupts(0)?;
    Ok(bus)
}

/// Makes the host send one packet into the empty ring, and takes it.
fn cause_event(bus: &Bus) -> Verdict {
    bus.send(&Bytes::words(&[message::QUERY_BUS_RELATIONS]).0)?;
    equal("packets of the host", bus.channel().receive()?.len(), 1)
}

fn event(context: &Context) -> Verdict {
    let bus = quiet_bus(context)?;
    cause_event(&bus)?;
    bus.vm().expect_interrupt(0, VMBUS_VECTOR)?;
    let synic = bus.kernel().synic(0);
    let relid = bus.channel().offer.relid as u16;
    equal(
        "event flags of SINT2",
        synic.events(VMBUS_SINT)?,
        vec![relid],
    )?;
    for sint in (0..16).filter(|sint| *sint != VMBUS_SINT) {
        equal(
            format!("event flags of SINT{sint}"),
            synic.events(sint)?,
            vec![],
        )?;
    }
    equal("further interrupts", bus.vm().take_interrupts(0)?, vec![])
}

fn event_merged(context: &Context) -> Verdict {
    let bus = quiet_bus(context)?;
    cause_event(&bus)?;
    bus.vm().expect_interrupt(0, VMBUS_VECTOR)?;
    cause_event(&bus)?;
    equal(
        "interrupts with the flag set",
        bus.vm().take_interrupts(0)?,
        vec![],
    )?;
    equal("the flag", bus.channel().interrupted()?, true)?;
    cause_event(&bus)?;
    bus.vm().expect_interrupt(0, VMBUS_VECTOR)?;
    equal("the flag", bus.channel().interrupted()?, true)
}

fn event_refused(context: &Context) -> Verdict {
    let bus = quiet_bus(context)?;
    let (vm, synic) = (bus.vm(), bus.kernel().synic(0));
    let sint = msr::SINT0 + u32::from(VMBUS_SINT);
    for (number, off) in [(msr::SCONTROL, 0), (msr::SIEFP, 0), (sint, MASKED | 0xf3)] {
        let on = vm.rdmsr(0, number)?;
        vm.wrmsr(0, number, off)?;
        cause_event(&bus)?;
        let what = format!("event flags with MSR {number:#x} off");
        equal(what, synic.events(VMBUS_SINT)?, vec![])?;
        let what = format!("interrupts with MSR {number:#x} off");
        equal(what, vm.take_interrupts(0)?, vec![])?;
        vm.wrmsr(0, number, on)?;
        vm.take_interrupts(0)?;
        bus.channel().interrupted()?;
        cause_event(&bus)?;
        vm.expect_interrupt(0, VMBUS_VECTOR)?;
        bus.channel().interrupted()?;
    }
    Ok(())
}
