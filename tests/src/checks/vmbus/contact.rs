//! INITIATE_CONTACT and its answer (docs/spec/vmbus.md, section 2).
#![forbid(unsafe_code)]

use super::{alive, all_silent, connected, drain, no_offers, ring_gpadl};
use crate::check::{Check, Context, SIM, Verdict, equal, holds};
use crate::model::kernel::{Kernel, VMBUS_SINT, status};
use crate::model::testdev::TestDev;
use crate::model::vm::PAGE;
use crate::model::vmbus::{Contact, V5_0, VERSIONS, VmBus, message};
use crate::model::wire::{u16_at, u32_at};

/// Versions that no host knows.
const NO_VERSIONS: [u32; 8] = [
    0,
    0x4_0002,
    0x5_0004,
    0x5_ffff,
    0x6_0001,
    0x7_0000,
    0x8000_0000,
    0xffff_ffff,
];
/// Versions that a host may have given up.
const OLD_VERSIONS: [u32; 4] = [0xd, 0x1_0001, 0x2_0004, 0x3_0000];
/// Feature flags that exist.
const FEATURES: u32 = 0xff;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vmbus.contact.every-version",
        "Each version from 4.0 to 6.0 is accepted, with an answer of the documented form.",
        &[
            "VB-2-01",
            "VB-2-02",
            "VB-2-04",
            "VB-2.2-10",
            "VB-1.1-14",
            "VB-1.1-15",
            "VB-2.1-01",
            "VB-2.1-02",
            "VB-2.2-01",
            "VB-2.2-02",
            "VB-2.2-03",
            "VB-2.2-04",
            "VB-2.2-05",
            "VB-2.1-08",
            "HV-3.5-01",
            "HV-3.4-01",
        ],
        every_version,
    ),
    Check::new(
        "vmbus.contact.unknown-version",
        "A version that does not exist is refused with one message of 16 bytes, all fields 0.",
        &["VB-2.2-07", "VB-2.2-01", "VB-2.2-02", "VB-2.2-08"],
        unknown_version,
    ),
    Check::new(
        "vmbus.contact.old-version",
        "A version before 4.0 is accepted or refused, with one answer on VP 0.",
        &["VB-2.2-07", "VB-2.1-03", "VB-2-02"],
        old_version,
    ),
    Check::new(
        "vmbus.contact.fallback",
        "A guest that goes down from a version of the future connects with the first known one.",
        &["VB-2-03", "VB-2.2-07", "VB-2.1-08"],
        fallback,
    ),
    Check::new(
        "vmbus.contact.longer-message",
        "A contact with a client id, or padded to 240 bytes, counts as one without.",
        &["VB-1-03", "VB-2.1-07", "VB-1.1-14"],
        longer_message,
    ),
    Check::new(
        "vmbus.contact.features",
        "The answer names no feature that was not asked for, and the offers use none.",
        &[
            "VB-2.1-04",
            "VB-2.1-12",
            "VB-2.2-05",
            "VB-3.1-16",
            "VB-2.2-06",
        ],
        features,
    ),
    Check::new(
        "vmbus.contact.flags-before-6-0",
        "Before 6.0 the bytes of the feature flags mean nothing.",
        &["VB-2.1-04", "VB-2.1-12"],
        flags_before_6_0,
    ),
    Check::new(
        "vmbus.contact.message-vp",
        "All messages go to the VP that the contact names, whichever VP posts.",
        &["VB-2.1-03", "VB-1-02", "VB-2.2-07"],
        message_vp,
    ),
    Check::new(
        "vmbus.contact.unknown-vp",
        "A contact for a VP that does not exist is without effect.",
        &["VB-2.1-03", "VB-8-13"],
        unknown_vp,
    ),
    Check::new(
        "vmbus.contact.other-sint",
        "A contact for another SINT is refused there and leaves the connection alone.",
        &["VB-2.1-04", "VB-2.1-09", "VB-2.2-07"],
        other_sint,
    ),
    Check::new(
        "vmbus.contact.impossible-sint",
        "A contact for SINT 0 or one that does not exist is without effect.",
        &["VB-2.1-09", "VB-8-13"],
        impossible_sint,
    ),
    Check::new(
        "vmbus.contact.other-vtl",
        "From 5.1 on a contact for another VTL is not answered.",
        &["VB-2.1-04", "VB-2.1-09"],
        other_vtl,
    ),
    Check::new(
        "vmbus.contact.sint-on-connection-1",
        "On connection 1 the SINT and VTL of a contact mean nothing.",
        &["VB-2.1-09", "VB-2.1-08"],
        sint_on_connection_1,
    ),
    Check::new(
        "vmbus.contact.monitor-pages",
        "One monitor page alone is refused; none or two are not.",
        &["VB-2.1-05", "VB-2.1-06", "VB-2.1-10"],
        monitor_pages,
    ),
    Check::new(
        "vmbus.contact.interrupt-page",
        "Before 5.0 the interrupt page is not touched while every channel is dedicated.",
        &["VB-2.1-04", "VB-2.1-11", "VB-3.1-19", "VB-6-03"],
        interrupt_page,
    ),
    Check::new(
        "vmbus.contact.while-connected",
        "A contact while connected closes the channels, forgets relids and GPADLs, and connects.",
        &["VB-2.2-09", "VB-5.1-03", "VB-8-14"],
        while_connected,
    ),
    Check::new(
        "vmbus.contact.unknown-version-while-connected",
        "A contact that is refused ends the connection before it as well.",
        &["VB-2.2-09", "VB-2.2-07"],
        unknown_version_while_connected,
    ),
    Check::new(
        "vmbus.contact.two-at-once",
        "Of two contacts on end the second one counts, and its answer comes last.",
        &["VB-2.2-09", "VB-2.2-07"],
        two_at_once,
    ),
    Check::new(
        "vmbus.contact.crash-kernel",
        "A crash kernel connects on another VP over unread messages and open channels.",
        &["VB-2.2-09", "HV-10-07", "HV-10-02"],
        crash_kernel,
    ),
    Check::new(
        "vmbus.contact.full-queue",
        "A contact is taken and answered however many messages wait before it.",
        &["VB-2.2-09", "VB-8-14", "VB-8-15"],
        full_queue,
    )
    .on(SIM),
];

fn boot(context: &Context) -> Result<(Kernel, VmBus), crate::check::Failure> {
    let kernel = Kernel::boot(&context.usual()?)?;
    let vmbus = VmBus::new(&kernel, 0);
    Ok((kernel, vmbus))
}

fn every_version(context: &Context) -> Verdict {
    let (kernel, vmbus) = boot(context)?;
    for version in VERSIONS {
        let course = |failure: crate::check::Failure| failure.during(format!("{version:#x}"));
        let contact = Contact::linux(kernel.vm(), version, 0)?;
        let answer = vmbus.contact(&contact).map_err(course)?;
        let raw = &answer.raw;
        equal(
            "length",
            raw.len(),
            if version >= 0x6_0000 { 20 } else { 16 },
        )
        .map_err(course)?;
        equal("padding of the header", u32_at(raw, 4), 0).map_err(course)?;
        equal("version_supported", raw[8], 1).map_err(course)?;
        equal("connection state", raw[9], 0).map_err(course)?;
        equal("reserved bytes", u16_at(raw, 10), 0).map_err(course)?;
        if version < V5_0 {
            equal("selected version", u32_at(raw, 12), version).map_err(course)?;
        } else {
            let connection = u32_at(raw, 12);
            holds("a message connection is named", connection != 0).map_err(course)?;
        }
        if version >= 0x6_0000 {
            equal("feature flags", u32_at(raw, 16), 0).map_err(course)?;
        }
        vmbus.expect_silence().map_err(course)?;
        vmbus.only_offer().map_err(course)?;
        vmbus.unload().map_err(course)?;
    }
    Ok(())
}

fn unknown_version(context: &Context) -> Verdict {
    let (kernel, vmbus) = boot(context)?;
    for version in NO_VERSIONS {
        let contact = Contact::linux(kernel.vm(), version, 0)?;
        let answer = vmbus.contact(&contact)?;
        let mut expected = vec![0; 16];
        expected[0] = message::VERSION_RESPONSE as u8;
        equal(
            format!("answer to version {version:#x}"),
            answer.raw,
            expected,
        )?;
        vmbus.expect_silence()?;
        no_offers(&vmbus)?;
    }
    Ok(())
}

fn old_version(context: &Context) -> Verdict {
    for version in OLD_VERSIONS {
        let (kernel, vmbus) = boot(context)?;
        // The field for a VP is newer than all but the last of these.
        let vp = if version < 0x3_0000 { 1 } else { 0 };
        let contact = Contact::linux(kernel.vm(), version, vp)?;
        let answer = vmbus.contact(&contact);
        let answer = answer.map_err(|failure| failure.during(format!("version {version:#x}")))?;
        equal("length of the answer", answer.raw.len(), 16)?;
        let selected = if answer.supported { version } else { 0 };
        equal("selected version", answer.connection, selected)?;
        all_silent(kernel.vm(), &kernel)?;
    }
    Ok(())
}

fn fallback(context: &Context) -> Verdict {
    let (kernel, vmbus) = boot(context)?;
    for (version, supported) in [(0x7_0000, false), (0x6_0001, false), (0x6_0000, true)] {
        let contact = Contact::linux(kernel.vm(), version, 0)?;
        let answer = vmbus.contact(&contact)?;
        equal(
            format!("version {version:#x} supported"),
            answer.supported,
            supported,
        )?;
    }
    vmbus.only_offer()?;
    alive(&vmbus)
}

fn longer_message(context: &Context) -> Verdict {
    let (kernel, vmbus) = boot(context)?;
    for len in [56, 240] {
        let contact = Contact::linux(kernel.vm(), VERSIONS[0], 0)?;
        let bytes = contact.encode().bytes(&[0xa5; 200]).up_to(len);
        let got = vmbus.post(contact.connection, &bytes.0)?;
        equal("status of HvPostMessage", got, status::SUCCESS)?;
        let answer = vmbus.expect(message::VERSION_RESPONSE, 20)?;
        equal(format!("version_supported for {len} bytes"), answer[8], 1)?;
        alive(&vmbus)?;
    }
    Ok(())
}

fn features(context: &Context) -> Verdict {
    let (kernel, vmbus) = boot(context)?;
    for asked in [0, FEATURES, 0x1, 0x10, 0x40, 0xffff_ffff] {
        let mut contact = Contact::linux(kernel.vm(), 0x6_0000, 0)?;
        contact.target |= u64::from(asked) << 32;
        let answer = vmbus.contact(&contact)?;
        equal("version_supported", answer.supported, true)?;
        let given = u32_at(&answer.raw, 16);
        let extra = given & !(asked & FEATURES);
        equal(
            format!("features beyond the {asked:#x} asked for"),
            extra,
            0,
        )?;
        let len = if given & 0x40 == 0 { 20 } else { 40 };
        equal("length of the answer", answer.raw.len(), len)?;
        let flags = u16_at(&vmbus.only_offer()?.raw, 56);
        for (flag, feature) in [(0x2, 0x10), (0x4, 0x10), (0x8, 0x80)] {
            let allowed = flags & flag == 0 || given & feature != 0;
            holds(
                format!("offer flags {flags:#x} with features {given:#x}"),
                allowed,
            )?;
        }
    }
    Ok(())
}

fn flags_before_6_0(context: &Context) -> Verdict {
    let (kernel, vmbus) = boot(context)?;
    for version in [0x5_0003, 0x5_0000] {
        let mut contact = Contact::linux(kernel.vm(), version, 0)?;
        contact.target |= u64::from(u32::MAX) << 32 | 0xabcd << 16;
        let answer = vmbus.contact(&contact)?;
        equal("version_supported", answer.supported, true)?;
        equal("length of the answer", answer.raw.len(), 16)?;
        alive(&vmbus)?;
    }
    Ok(())
}

fn message_vp(context: &Context) -> Verdict {
    let (kernel, from_0) = boot(context)?;
    let vm = kernel.vm();
    let contact = Contact::linux(vm, VERSIONS[0], 1)?;
    let got = from_0.post(contact.connection, &contact.encode().0)?;
    equal("status of HvPostMessage", got, status::SUCCESS)?;
    let answer = from_0.receive_on(1)?;
    let number = answer.map(|answer| u32_at(&answer, 0));
    equal("message on VP 1", number, Some(message::VERSION_RESPONSE))?;
    super::post(&from_0, &[message::REQUEST_OFFERS, 0])?;
    let expected = vec![message::OFFER_CHANNEL, message::ALL_OFFERS_DELIVERED];
    equal("messages on VP 1", drain(&from_0, 1)?, expected)?;
    from_0.send(&super::hvsock_request(1).0)?;
    equal(
        "messages on VP 1",
        drain(&from_0, 1)?,
        vec![super::TL_CONNECT_RESULT],
    )?;
    super::post(&from_0, &[message::UNLOAD, 0])?;
    equal(
        "messages on VP 1",
        drain(&from_0, 1)?,
        vec![message::UNLOAD_RESPONSE],
    )?;
    equal("messages on VP 0", drain(&from_0, 0)?, vec![])
}

/// Posts a contact that must not be answered.
fn unanswered(vmbus: &VmBus, contact: &Contact) -> Verdict {
    let got = vmbus.post(contact.connection, &contact.encode().0)?;
    equal("status of HvPostMessage", got, status::SUCCESS)?;
    all_silent(vmbus.vm(), vmbus.kernel())
}

fn unknown_vp(context: &Context) -> Verdict {
    let (kernel, vmbus) = boot(context)?;
    let vps = kernel.vm().vps();
    for vp in [vps, 64, 0x1_0000, u32::MAX] {
        unanswered(&vmbus, &Contact::linux(kernel.vm(), VERSIONS[0], vp)?)?;
    }
    alive(&VmBus::connect(&kernel)?)
}

fn other_sint(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let synic = vmbus.kernel().synic(1);
    for sint in [1, 3, 15] {
        let mut contact = Contact::linux(vmbus.vm(), VERSIONS[0], 1)?;
        contact.target = sint;
        let got = vmbus.post(contact.connection, &contact.encode().0)?;
        equal("status of HvPostMessage", got, status::SUCCESS)?;
        vmbus.vm().settle();
        let payload = synic.take(sint as u8)?.map(|message| message.payload);
        let mut expected = vec![0; 16];
        expected[0] = message::VERSION_RESPONSE as u8;
        equal(
            format!("message in the slot of SINT{sint}"),
            payload,
            Some(expected),
        )?;
        alive(&vmbus)?;
    }
    Ok(())
}

fn impossible_sint(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    for sint in [0, 16, 0xff] {
        let mut contact = Contact::linux(vmbus.vm(), VERSIONS[0], 0)?;
        contact.target = sint;
        let before = vmbus.kernel().synic(0).message_page()?;
        unanswered(&vmbus, &contact)?;
        equal(
            "message page",
            vmbus.kernel().synic(0).message_page()?,
            before,
        )?;
        alive(&vmbus)?;
    }
    Ok(())
}

fn other_vtl(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    for version in VERSIONS.into_iter().filter(|version| *version > V5_0) {
        for vtl in [1, 2, 0xff] {
            let mut contact = Contact::linux(vmbus.vm(), version, 0)?;
            contact.target |= vtl << 8;
            unanswered(&vmbus, &contact)?;
        }
    }
    alive(&vmbus)
}

fn sint_on_connection_1(context: &Context) -> Verdict {
    let (kernel, vmbus) = boot(context)?;
    for version in [0x5_0003, 0x6_0000] {
        let mut contact = Contact::linux(kernel.vm(), version, 0)?;
        contact.connection = 1;
        contact.target = 0x0107;
        let answer = vmbus.contact(&contact)?;
        equal("version_supported", answer.supported, true)?;
        equal("slot of SINT7", kernel.synic(0).pending(7)?, 0)?;
        alive(&vmbus)?;
    }
    Ok(())
}

fn monitor_pages(context: &Context) -> Verdict {
    let (kernel, vmbus) = boot(context)?;
    for version in VERSIONS {
        let pages = Contact::linux(kernel.vm(), version, 0)?.monitor;
        let cases = [
            ([pages[0], 0], false),
            ([0, pages[1]], false),
            ([0, 0], true),
            (pages, true),
        ];
        for (monitor, supported) in cases {
            let contact = Contact {
                monitor,
                ..Contact::linux(kernel.vm(), version, 0)?
            };
            let answer = vmbus.contact(&contact)?;
            let what = format!("version {version:#x} with monitor pages {monitor:x?} supported");
            equal(what, answer.supported, supported)?;
            vmbus.expect_silence()?;
        }
    }
    Ok(())
}

fn interrupt_page(context: &Context) -> Verdict {
    let kernel = Kernel::boot(&context.usual()?)?;
    let vm = kernel.vm();
    let contact = Contact::linux(vm, 0x4_0001, 0)?;
    let pages = contact.target;
    vm.ram().fill(pages, 3 * PAGE, 0x5a)?;
    let vmbus = VmBus::new(&kernel, 0);
    equal(
        "version_supported",
        vmbus.contact(&contact)?.supported,
        true,
    )?;
    let bus = crate::model::vpci::Bus::probe(&vmbus, &vmbus.only_offer()?, 0x1_0004)?;
    TestDev::start(&bus, 0)?;
    equal(
        "the channel's event flag",
        bus.channel().interrupted()?,
        true,
    )?;
    let bytes = vm.read(pages, 3 * PAGE as usize)?;
    holds(
        "interrupt page and monitor pages are untouched",
        bytes.iter().all(|byte| *byte == 0x5a),
    )
}

fn while_connected(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let device = TestDev::bring_up(&vm)?;
    let (bus, vmbus) = (device.bus(), device.bus().vmbus());
    let offer = &bus.channel().offer;
    let gpadl = bus.channel().gpadl;
    let answer = vmbus.contact(&Contact::linux(&vm, VERSIONS[1], 0)?)?;
    equal("version_supported", answer.supported, true)?;
    vmbus.expect_silence()?;
    equal("a load from the BAR", device.load(0, 4)?, 0xffff_ffff)?;
    let signal = bus.channel().signal()?;
    equal("status of a signal", signal, status::INVALID_CONNECTION_ID)?;
    // The relid is gone until the guest asks for offers.
    super::post(vmbus, &[message::GPADL_TEARDOWN, 0, offer.relid, gpadl])?;
    vmbus.send(&super::open_of(offer, gpadl).encode().0)?;
    alive(vmbus)?;
    let offer = vmbus.only_offer()?;
    // The GPADL is gone: the same id is free.
    let pfns = super::fresh(&vm, 10)?;
    equal(
        "status of GPADL_CREATED",
        vmbus.create_gpadl(offer.relid, gpadl, &pfns)?,
        0,
    )?;
    vmbus.tear_down(offer.relid, gpadl)?;
    let bus = crate::model::vpci::Bus::probe(vmbus, &offer, 0x1_0004)?;
    TestDev::start(&bus, 0)?;
    Ok(())
}

fn unknown_version_while_connected(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let device = TestDev::bring_up(&vm)?;
    let vmbus = device.bus().vmbus();
    let answer = vmbus.contact(&Contact::linux(&vm, 0x7_0000, 0)?)?;
    equal("version_supported", answer.supported, false)?;
    equal("a load from the BAR", device.load(0, 4)?, 0xffff_ffff)?;
    let signal = device.bus().channel().signal()?;
    equal("status of a signal", signal, status::INVALID_CONNECTION_ID)?;
    no_offers(vmbus)?;
    TestDev::bring_up(&vm).map(drop)
}

fn two_at_once(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let vmbus = TestDev::bring_up(&vm)?.bus().vmbus().clone();
    let first = Contact::linux(&vm, 0x4_0001, 0)?;
    let second = Contact::linux(&vm, 0x6_0000, 1)?;
    for contact in [first, second] {
        let got = vmbus.post(contact.connection, &contact.encode().0)?;
        equal("status of HvPostMessage", got, status::SUCCESS)?;
    }
    let answers = drain(&vmbus, 0)?;
    holds(
        format!("messages {answers:?} on VP 0 are at most one answer"),
        answers.is_empty() || answers == [message::VERSION_RESPONSE],
    )?;
    let answer = vmbus.receive_on(1)?.unwrap_or_default();
    equal("bytes of the answer on VP 1", answer.len(), 20)?;
    equal("version_supported", answer[8], 1)?;
    vmbus.send(&super::hvsock_request(1).0)?;
    equal(
        "messages on VP 1",
        drain(&vmbus, 1)?,
        vec![super::TL_CONNECT_RESULT],
    )?;
    equal("messages on VP 0", drain(&vmbus, 0)?, vec![])
}

fn crash_kernel(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let device = TestDev::bring_up(&vm)?;
    let vmbus = device.bus().vmbus();
    for tag in 0..20 {
        vmbus.send(&super::hvsock_request(tag).0)?;
    }
    vm.settle();
    // VP 0 takes no message any more; the new kernel runs on VP 1.
    let crash = VmBus::new(vmbus.kernel(), 1);
    let answer = crash.contact(&Contact::linux(&vm, VERSIONS[0], 1)?)?;
    equal("version_supported", answer.supported, true)?;
    equal("a load from the BAR", device.load(0, 4)?, 0xffff_ffff)?;
    let offer = crash.only_offer()?;
    ring_gpadl(&crash, &offer, 10)?;
    // One message of before may lie in the slot of VP 0, but nothing follows it.
    drain(&crash, 0)?;
    alive(&crash)?;
    equal("messages on VP 0", drain(&crash, 0)?, vec![])
}

fn full_queue(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let refusal = super::messages::fill(&vmbus)?;
    equal(
        "status of HvPostMessage",
        refusal,
        status::INSUFFICIENT_BUFFERS,
    )?;
    let contact = Contact::linux(vmbus.vm(), 0x5_0003, 1)?;
    let got = vmbus.post(contact.connection, &contact.encode().0)?;
    equal(
        "status of HvPostMessage with a contact",
        got,
        status::SUCCESS,
    )?;
    equal(
        "messages on VP 1",
        drain(&vmbus, 1)?,
        vec![message::VERSION_RESPONSE],
    )?;
    let slot = vmbus.kernel().synic(0).pending(VMBUS_SINT)?;
    holds(format!("VP 0 has {slot} in its slot"), slot <= 1)
}
