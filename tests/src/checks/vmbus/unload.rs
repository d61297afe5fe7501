//! UNLOAD and the time without a connection (docs/spec/vmbus.md, sections 2.4 and 10).
#![forbid(unsafe_code)]

use super::opening::works;
use super::{alive, all_silent, drain, fresh, offered, post, ring_gpadl};
use crate::check::{Check, Context, SIM, Verdict, equal, holds};
use crate::model::kernel::{Kernel, VMBUS_SINT, VMBUS_VECTOR, status};
use crate::model::testdev::{Job, TestDev};
use crate::model::vm::PAGE;
use crate::model::vmbus::{Contact, VERSIONS, VmBus, message};
use crate::model::wire::{Bytes, u32_at};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vmbus.unload.response",
        "UNLOAD is answered with one message of 8 bytes, at every version.",
        &["VB-1.1-16", "VB-1.1-17", "VB-2.4-02"],
        response,
    ),
    Check::new(
        "vmbus.unload.no-access-afterwards",
        "After UNLOAD_RESPONSE no ring, message, event flags or DMA page is written.",
        &["VB-2.4-01", "VB-2.4-02", "VB-8-16", "HV-10-06"],
        no_access_afterwards,
    ),
    Check::new(
        "vmbus.unload.last-message",
        "UNLOAD_RESPONSE is the last message, whatever the guest has not taken before.",
        &["VB-2.4-02", "VB-1-05"],
        last_message,
    ),
    Check::new(
        "vmbus.unload.vp-of-the-contact",
        "UNLOAD_RESPONSE goes to the VP of the contact, whichever VP sends UNLOAD.",
        &["VB-2.4-02", "HV-10-08", "HV-10-02"],
        vp_of_the_contact,
    ),
    Check::new(
        "vmbus.unload.forgets",
        "UNLOAD ends GPADLs and lists in progress: the next connection has its ids and room.",
        &["VB-2.4-02", "VB-8-14"],
        forgets,
    ),
    Check::new(
        "vmbus.unload.disconnected",
        "Without a connection no message but INITIATE_CONTACT has an answer or an effect.",
        &["VB-2.4-04", "VB-8-14"],
        disconnected,
    ),
    Check::new(
        "vmbus.unload.twice",
        "Of two UNLOADs on end one is answered, and a contact connects afterwards.",
        &["VB-2.4-04", "VB-8-14"],
        twice,
    ),
    Check::new(
        "vmbus.unload.hibernate",
        "A guest that closes, unloads and connects at the same version finds its instances.",
        &["VB-10-01", "HV-10-03", "VB-2-04"],
        hibernate,
    ),
    Check::new(
        "vmbus.unload.full-queue",
        "UNLOAD is taken and answered however many messages wait before it.",
        &["VB-2.4-02", "VB-8-14", "VB-8-15"],
        full_queue,
    )
    .on(SIM),
];

fn response(context: &Context) -> Verdict {
    let kernel = Kernel::boot(&context.usual()?)?;
    for version in VERSIONS {
        let vmbus = VmBus::connect_at(&kernel, version)?;
        vmbus.only_offer()?;
        post(&vmbus, &[message::UNLOAD, 0])?;
        let response = vmbus.expect(message::UNLOAD_RESPONSE, 8)?;
        equal("length of UNLOAD_RESPONSE", response.len(), 8)?;
        vmbus.expect_silence()?;
    }
    Ok(())
}

fn no_access_afterwards(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let device = TestDev::bring_up(&vm)?;
    device.interrupt(0, 0x41, 1)?;
    let (bus, vmbus, kernel) = (device.bus(), device.bus().vmbus(), device.bus().kernel());
    let target = vm.pages(256)?;
    let job = Job {
        command: 1,
        source: 0,
        destination: target,
        length: 256 * PAGE as u32,
        vector: 0,
    };
    device.begin(&job)?;
    let channel = bus.channel();
    for _ in 0..10 {
        let packet = crate::model::ring::Packet::request(3, &[0; 16]);
        channel.to_host.send(&packet)?;
    }
    channel.signal()?;
    vmbus.unload()?;
    for vp in 0..vm.vps() {
        vm.take_interrupts(vp)?;
    }
    // Every page that the host once knew gets a pattern.
    let mut pages = vec![
        channel.to_host.control(),
        channel.to_guest.control(),
        target,
    ];
    for vp in 0..vm.vps() {
        pages.extend([kernel.synic(vp).slot(0), kernel.synic(vp).flags(0)]);
    }
    for page in &pages {
        vm.ram().fill(*page, PAGE, 0)?;
    }
    equal(
        "status of a signal",
        channel.signal()?,
        status::INVALID_CONNECTION_ID,
    )?;
    device.raise(0)?;
    device.begin(&job)?;
    for vp in 0..vm.vps() {
        kernel.synic(vp).eom()?;
    }
    vm.settle();
    for page in &pages {
        let zero = vm.read(*page, PAGE as usize)?.iter().all(|byte| *byte == 0);
        holds(format!("the page at {page:#x} is untouched"), zero)?;
    }
    for vp in 0..vm.vps() {
        equal(
            format!("interrupts of VP {vp}"),
            vm.take_interrupts(vp)?,
            vec![],
        )?;
    }
    Ok(())
}

fn last_message(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    ring_gpadl(&vmbus, &offer, 10)?;
    for tag in 0..30 {
        vmbus.send(&super::hvsock_request(tag).0)?;
    }
    vmbus.vm().settle();
    post(&vmbus, &[message::UNLOAD, 0])?;
    let numbers = drain(&vmbus, 0)?;
    equal(
        "last message",
        numbers.last(),
        Some(&message::UNLOAD_RESPONSE),
    )?;
    let unloads = numbers
        .iter()
        .filter(|number| **number == message::UNLOAD_RESPONSE);
    equal("number of UNLOAD_RESPONSEs", unloads.count(), 1)?;
    vmbus.expect_silence()
}

fn vp_of_the_contact(context: &Context) -> Verdict {
    let kernel = Kernel::boot(&context.usual()?)?;
    let vm = kernel.vm();
    for vp in [1, 0] {
        let vmbus = VmBus::new(&kernel, vp);
        vmbus.contact(&Contact::linux(vm, VERSIONS[0], vp)?)?;
        vmbus.only_offer()?;
        let other = VmBus::new(&kernel, 1 - vp);
        vm.take_interrupts(vp)?;
        post(&other, &[message::UNLOAD, 0])?;
        vm.expect_interrupt(vp, VMBUS_VECTOR)?;
        equal(
            "messages of the contact's VP",
            drain(&vmbus, vp)?,
            vec![message::UNLOAD_RESPONSE],
        )?;
        equal("messages of the sender", drain(&vmbus, 1 - vp)?, vec![])?;
    }
    Ok(())
}

fn forgets(context: &Context) -> Verdict {
    let mut setup = crate::host::Setup::default();
    setup.vmbus.limits.gpadls = 4;
    setup.vmbus.limits.gpadls_in_progress = 2;
    let kernel = Kernel::boot(&context.machine(&setup)?)?;
    for _ in 0..3 {
        let vmbus = VmBus::connect(&kernel)?;
        let offer = vmbus.only_offer()?;
        let pfns = fresh(kernel.vm(), 2)?;
        for id in 1..=2 {
            let status = vmbus.create_gpadl(offer.relid, id, &pfns)?;
            equal("status of GPADL_CREATED", status, 0)?;
        }
        for id in 3..=4 {
            let header = Bytes::words(&[message::GPADL_HEADER, 0, offer.relid, id]);
            vmbus.send(&header.u16(88).u16(1).u32(40960).u32(0).0)?;
        }
        vmbus.unload()?;
    }
    Ok(())
}

fn disconnected(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let kernel = Kernel::boot(&vm)?;
    let vmbus = VmBus::new(&kernel, 0);
    let pfns = fresh(&vm, 10)?;
    for round in 0..2 {
        for number in 0..40 {
            if number == message::INITIATE_CONTACT {
                continue;
            }
            let bytes = Bytes::words(&[number, 0, 1, 1, 1, 0, 5]).up_to(240);
            vmbus.send(&bytes.0)?;
        }
        vmbus.send_gpadl(1, 5, &pfns)?;
        vmbus.send(&super::hvsock_request(1).0)?;
        all_silent(&vm, &kernel)?;
        let signal = kernel.signal(0, 0x2001, 0)?;
        equal("status of a signal", signal, status::INVALID_CONNECTION_ID)?;
        equal("event flags", kernel.synic(0).events(VMBUS_SINT)?, vec![])?;
        if round == 0 {
            let vmbus = VmBus::connect(&kernel)?;
            vmbus.only_offer()?;
            vmbus.unload()?;
        }
    }
    let vmbus = VmBus::connect(&kernel)?;
    let offer = vmbus.only_offer()?;
    equal("status", vmbus.create_gpadl(offer.relid, 5, &pfns)?, 0)
}

fn twice(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    works(vmbus.open(&offer)?)?;
    post(&vmbus, &[message::UNLOAD, 0])?;
    post(&vmbus, &[message::UNLOAD, 0])?;
    equal(
        "messages",
        drain(&vmbus, 0)?,
        vec![message::UNLOAD_RESPONSE],
    )?;
    post(&vmbus, &[message::UNLOAD, 0])?;
    vmbus.expect_silence()?;
    alive(&VmBus::connect(vmbus.kernel())?)
}

fn hibernate(context: &Context) -> Verdict {
    let kernel = Kernel::boot(&context.usual()?)?;
    for version in VERSIONS {
        let vmbus = VmBus::connect_at(&kernel, version)?;
        let offer = vmbus.only_offer()?;
        let channel = vmbus.open(&offer)?;
        works(channel.clone())?;
        channel.close()?;
        vmbus.unload()?;
        let resumed = VmBus::connect_at(&kernel, version)?;
        let again = resumed.only_offer()?;
        equal("instance", again.instance, offer.instance)?;
        works(resumed.open(&again)?)?;
        resumed.unload()?;
    }
    Ok(())
}

fn full_queue(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let channel = vmbus.open(&offer)?;
    let refusal = super::messages::fill(&vmbus)?;
    equal(
        "status of HvPostMessage",
        refusal,
        status::INSUFFICIENT_BUFFERS,
    )?;
    let got = vmbus.post(vmbus.connection(), &Bytes::words(&[message::UNLOAD, 0]).0)?;
    equal("status of HvPostMessage with UNLOAD", got, status::SUCCESS)?;
    let mut last = 0;
    while let Some(message) = vmbus.receive()? {
        last = u32_at(&message, 0);
    }
    equal("last message", last, message::UNLOAD_RESPONSE)?;
    equal(
        "status of a signal",
        channel.signal()?,
        status::INVALID_CONNECTION_ID,
    )
}
