//! Channels that are taken away (docs/spec/vmbus.md, section 3.2).
#![forbid(unsafe_code)]

use super::opening::works;
use super::{alive, fresh, offered, open_of, post, ring_gpadl, two_offers};
use crate::check::{Check, Context, Verdict, equal, holds};
use crate::host::BusSetup;
use crate::model::kernel::{Kernel, status};
use crate::model::vmbus::{Contact, Offer, VERSIONS, VmBus, message};
use crate::model::vpci::Bus;
use crate::model::wire::{Bytes, u32_at};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vmbus.rescind.before-open",
        "A channel that was never opened is rescinded with one message of 12 bytes.",
        &["VB-1.1-02", "VB-3.2-01", "VB-5.1-01"],
        before_open,
    ),
    Check::new(
        "vmbus.rescind.while-open",
        "An open channel is closed before it is rescinded: its rings are left alone.",
        &["VB-3.2-01", "VB-5.1-03", "VB-6-05", "VB-8-16"],
        while_open,
    ),
    Check::new(
        "vmbus.rescind.after-close",
        "A channel that was closed is rescinded, and its GPADLs need no teardown.",
        &["VB-3.2-01"],
        after_close,
    ),
    Check::new(
        "vmbus.rescind.before-offer",
        "A channel that was not offered yet goes silently, and is not offered.",
        &["VB-5.1-06", "VB-3.2-01"],
        before_offer,
    ),
    Check::new(
        "vmbus.rescind.gpadl-in-progress",
        "A list in progress is answered with a failure before the channel is rescinded.",
        &["VB-3.2-01", "VB-4-08"],
        gpadl_in_progress,
    ),
    Check::new(
        "vmbus.rescind.teardown-in-flight",
        "A teardown that waits for the close is answered before the channel is rescinded.",
        &["VB-3.2-01", "VB-4-12"],
        teardown_in_flight,
    ),
    Check::new(
        "vmbus.rescind.messages-meanwhile",
        "Between RESCIND and RELID_RELEASED each message has the answer that a guest waits for.",
        &["VB-3.2-02", "VB-5.1-05"],
        messages_meanwhile,
    ),
    Check::new(
        "vmbus.rescind.never-released",
        "A guest that never releases the channel is served as before, and can connect anew.",
        &["VB-3.2-04", "VB-5.1-05"],
        never_released,
    ),
    Check::new(
        "vmbus.rescind.only-its-channel",
        "The other bus works on while one is taken away.",
        &["VB-3.2-01"],
        only_its_channel,
    ),
    Check::new(
        "vmbus.rescind.ended-by-unload",
        "UNLOAD stands for the release of all rescinded channels.",
        &["VB-5.1-05", "VB-3.1-17", "VB-3.1-21"],
        ended_by_unload,
    ),
    Check::new(
        "vmbus.rescind.gpadls-freed",
        "RELID_RELEASED frees the GPADLs that were not torn down.",
        &["VB-3.2-02", "VB-8-14"],
        gpadls_freed,
    ),
];

/// Takes the bus away and waits for the word of it.
fn rescind(vmbus: &VmBus, offer: &Offer) -> Verdict {
    vmbus.vm().remove(offer.instance)?;
    equal("rescinded relid", vmbus.expect_rescind()?, offer.relid)
}

/// The channel is gone and released, and a bus of the same instance works.
fn released_and_back(vmbus: &VmBus, offer: &Offer) -> Verdict {
    vmbus.release(offer.relid)?;
    alive(vmbus)?;
    vmbus.vm().plug(&BusSetup::testdev(1))?;
    let again = vmbus.expect_offer()?;
    equal("instance that is offered", again.instance, offer.instance)?;
    works(vmbus.open(&again)?)
}

fn before_open(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    vmbus.vm().remove(offer.instance)?;
    let rescind = vmbus.expect(message::RESCIND, 12)?;
    equal("length of RESCIND_CHANNEL_OFFER", rescind.len(), 12)?;
    equal("relid", u32_at(&rescind, 8), offer.relid)?;
    vmbus.expect_silence()?;
    released_and_back(&vmbus, &offer)
}

fn while_open(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let bus = Bus::probe(&vmbus, &offer, 0x1_0004)?;
    let channel = bus.channel();
    rescind(&vmbus, &offer)?;
    channel.interrupted()?;
    let before = (channel.to_host.load(0)?, channel.to_guest.load(0)?);
    bus.vm()
        .ram()
        .fill(channel.to_guest.control(), 4096, 0x5a)?;
    equal(
        "status of a signal",
        channel.signal()?,
        status::INVALID_CONNECTION_ID,
    )?;
    vmbus.expect_silence()?;
    let page = bus.vm().read(channel.to_guest.control(), 4096)?;
    holds(
        "the ring is untouched",
        page.iter().all(|byte| *byte == 0x5a),
    )?;
    equal(
        "write index of the other",
        channel.to_host.load(0)?,
        before.0,
    )?;
    equal("event flag", channel.interrupted()?, false)?;
    vmbus.send_close(offer.relid)?;
    released_and_back(&vmbus, &offer)
}

fn after_close(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let channel = vmbus.open(&offer)?;
    vmbus.send_close(offer.relid)?;
    rescind(&vmbus, &offer)?;
    equal(
        "status of a signal",
        channel.signal()?,
        status::INVALID_CONNECTION_ID,
    )?;
    vmbus.expect_silence()?;
    released_and_back(&vmbus, &offer)
}

fn before_offer(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let instance = BusSetup::instance(1);
    vm.remove(instance)?;
    vmbus.expect_silence()?;
    vm.plug(&BusSetup::testdev(1))?;
    vm.plug(&BusSetup::testdev(2))?;
    vm.remove(instance)?;
    let offer = vmbus.only_offer()?;
    equal(
        "instance that is offered",
        offer.instance,
        BusSetup::instance(2),
    )?;
    vmbus.expect_silence()
}

fn gpadl_in_progress(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let id = vmbus.gpadl_id();
    let header = Bytes::words(&[message::GPADL_HEADER, 0, offer.relid, id]);
    vmbus.send(&header.u16(808).u16(1).u32(409_600).u32(0).0)?;
    vmbus.vm().settle();
    vmbus.vm().remove(offer.instance)?;
    super::gpadl_refused(&vmbus, offer.relid, id, "a list in progress")?;
    equal("rescinded relid", vmbus.expect_rescind()?, offer.relid)?;
    // What was still on its way is of no list.
    vmbus.send(&Bytes::words(&[message::GPADL_BODY, 0, 0, id]).up_to(240).0)?;
    alive(&vmbus)?;
    released_and_back(&vmbus, &offer)
}

fn teardown_in_flight(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let channel = vmbus.open(&offer)?;
    post(
        &vmbus,
        &[message::GPADL_TEARDOWN, 0, offer.relid, channel.gpadl],
    )?;
    vmbus.expect_silence()?;
    vmbus.vm().remove(offer.instance)?;
    let torndown = vmbus.expect(message::GPADL_TORNDOWN, 12)?;
    equal(
        "GPADL of GPADL_TORNDOWN",
        u32_at(&torndown, 8),
        channel.gpadl,
    )?;
    equal("rescinded relid", vmbus.expect_rescind()?, offer.relid)?;
    released_and_back(&vmbus, &offer)
}

fn messages_meanwhile(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let channel = vmbus.open(&offer)?;
    let relid = offer.relid;
    rescind(&vmbus, &offer)?;
    vmbus.send(&open_of(&offer, channel.gpadl).encode().0)?;
    vmbus.send_close(relid)?;
    vmbus.send_close(relid)?;
    alive(&vmbus)?;
    let status = vmbus.modify(relid, 1)?.unwrap_or(0);
    super::refused("MODIFY_CHANNEL", status)?;
    let pfns = fresh(vmbus.vm(), 20)?;
    let status = vmbus.create_gpadl(relid, vmbus.gpadl_id(), &pfns)?;
    equal("status of GPADL_CREATED", status, 0)?;
    vmbus.tear_down(relid, channel.gpadl)?;
    vmbus.tear_down(relid, 0x7777)?;
    let signal = channel.signal()?;
    equal("status of a signal", signal, status::INVALID_CONNECTION_ID)?;
    alive(&vmbus)?;
    released_and_back(&vmbus, &offer)
}

fn never_released(context: &Context) -> Verdict {
    let (vmbus, first, second) = two_offers(context)?;
    rescind(&vmbus, &first)?;
    works(vmbus.open(&second)?)?;
    for number in 3..6 {
        vmbus.vm().plug(&BusSetup::testdev(number))?;
        let offer = vmbus.expect_offer()?;
        holds(
            "the relid is not the rescinded one",
            offer.relid != first.relid,
        )?;
        rescind(&vmbus, &offer)?;
    }
    alive(&vmbus)?;
    vmbus.contact(&Contact::linux(vmbus.vm(), VERSIONS[0], 0)?)?;
    equal("instance", vmbus.only_offer()?.instance, second.instance)
}

fn only_its_channel(context: &Context) -> Verdict {
    let (vmbus, first, second) = two_offers(context)?;
    let bus = Bus::probe(&vmbus, &second, 0x1_0004)?;
    let gone = Bus::probe(&vmbus, &first, 0x1_0004)?;
    rescind(&vmbus, &first)?;
    equal("functions of the other bus", bus.relations()?.len(), 1)?;
    vmbus.release(gone.channel().offer.relid)?;
    equal("functions of the other bus", bus.relations()?.len(), 1)?;
    bus.unbind()
}

fn ended_by_unload(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    rescind(&vmbus, &offer)?;
    vmbus.unload()?;
    vmbus.vm().plug(&BusSetup::testdev(1))?;
    vmbus.expect_silence()?;
    vmbus.contact(&Contact::linux(vmbus.vm(), VERSIONS[0], 0)?)?;
    let again = vmbus.only_offer()?;
    equal("relid", again.relid, offer.relid)?;
    works(vmbus.open(&again)?)
}

fn gpadls_freed(context: &Context) -> Verdict {
    let mut setup = crate::host::Setup::default();
    setup.vmbus.limits.gpadls = 3;
    let vmbus = VmBus::connect(&Kernel::boot(&context.machine(&setup)?)?)?;
    let offer = vmbus.only_offer()?;
    for _ in 0..3 {
        ring_gpadl(&vmbus, &offer, 10)?;
    }
    rescind(&vmbus, &offer)?;
    vmbus.release(offer.relid)?;
    vmbus.expect_silence()?;
    vmbus.vm().plug(&BusSetup::testdev(1))?;
    let offer = vmbus.expect_offer()?;
    for _ in 0..3 {
        ring_gpadl(&vmbus, &offer, 10)?;
    }
    Ok(())
}
