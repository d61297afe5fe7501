//! OPEN_CHANNEL (docs/spec/vmbus.md, section 5).
#![forbid(unsafe_code)]

use super::{alive, fresh, offered, open_of, refused, ring_gpadl, two_offers};
use crate::check::{Check, Context, Failure, SIM, Verdict, equal};
use crate::model::kernel::{VMBUS_SINT, status};
use crate::model::ring::{Packet, Ring};
use crate::model::vm::PAGE;
use crate::model::vmbus::{Channel, Offer, Open, VmBus, message};
use crate::model::vpci::{Bus, message as vpci};
use crate::model::wire::{Bytes, u32_at};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vmbus.open.result",
        "The result of an open has 20 bytes and echoes relid and open id.",
        &["VB-1.1-05", "VB-1.1-06", "VB-5-01", "VB-5-02", "VB-5.1-01"],
        result,
    ),
    Check::new(
        "vmbus.open.padded",
        "An OPEN_CHANNEL of 156 or 240 bytes counts as one of 148.",
        &["VB-1-03", "VB-1.1-05", "VB-5-01"],
        padded,
    ),
    Check::new(
        "vmbus.open.twice",
        "An open of an open channel is not answered and leaves it open.",
        &["VB-5-07", "VB-5.1-03"],
        twice,
    ),
    Check::new(
        "vmbus.open.ring-sizes",
        "Rings of one page are refused, wherever the GPADL is cut; the channel stays closed.",
        &["VB-5-03", "VB-5-02"],
        ring_sizes,
    ),
    Check::new(
        "vmbus.open.ring-gpadl",
        "A GPADL with an offset, a broken page, two ranges, or of no or another channel is refused.",
        &["VB-5-03", "VB-8-13"],
        ring_gpadl_kinds,
    ),
    Check::new(
        "vmbus.open.gpadl-asked-back",
        "A GPADL that the guest has taken back cannot be opened.",
        &["VB-5-03", "VB-4-12"],
        gpadl_asked_back,
    ),
    Check::new(
        "vmbus.open.target-vp",
        "Interrupts go to the VP that the open names; one that does not exist is refused.",
        &["VB-5-05", "VB-6-01", "VB-8-13"],
        target_vp,
    ),
    Check::new(
        "vmbus.open.no-interrupts",
        "With target VP all ones the channel works without interrupts.",
        &["VB-5-05", "HV-7-03"],
        no_interrupts,
    ),
    Check::new(
        "vmbus.open.ring-read-at-open",
        "What the control pages held when the GPADL was made does not matter.",
        &["VB-5-04"],
        ring_read_at_open,
    ),
    Check::new(
        "vmbus.open.live-at-result",
        "Once the guest has the result the connection takes signals and packets are answered.",
        &["VB-5-05", "VB-5-06"],
        live_at_result,
    ),
    Check::new(
        "vmbus.open.packet-before-open",
        "A packet that lay in the ring before the open is answered without a signal.",
        &["VB-5-06", "VB-6-04"],
        packet_before_open,
    ),
    Check::new(
        "vmbus.open.signal-after-result",
        "What the host sent before the result is signalled once more after it.",
        &["VB-5-06"],
        signal_after_result,
    )
    .on(SIM),
    Check::new(
        "vmbus.open.while-closing",
        "CLOSE and OPEN on end open the channel anew.",
        &["VB-5-07", "VB-5.1-04"],
        while_closing,
    ),
    Check::new(
        "vmbus.open.again",
        "A closed channel opens again on its old rings or on new ones.",
        &["VB-5-10", "VB-8-09"],
        again,
    ),
];

/// The channel that a successful `open` of ten pages makes.
pub(super) fn channel(vmbus: &VmBus, offer: &Offer, open: &Open, pfns: &[u64]) -> Channel {
    let (to_host, to_guest) = pfns.split_at(open.downstream as usize);
    Channel::new(vmbus, offer, open, [to_host, to_guest])
}

/// Asks a bus on a channel for its version: it works.
pub(super) fn works(channel: Channel) -> Verdict {
    let status = Bus::new(channel, 0).negotiate(0x1_0004)?;
    equal("status of QUERY_PROTOCOL_VERSION", status, 0)
}

/// Prepares both rings of ten pages for an open.
fn prepare(vmbus: &VmBus, pfns: &[u64]) -> Result<(Ring, Ring), Failure> {
    let (to_host, to_guest) = pfns.split_at(5);
    let rings = (
        Ring::new(vmbus.vm(), to_host),
        Ring::new(vmbus.vm(), to_guest),
    );
    rings.0.reset()?;
    rings.1.reset()?;
    Ok(rings)
}

fn result(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let (gpadl, pfns) = ring_gpadl(&vmbus, &offer, 10)?;
    for id in [0, 0xdead_beef, u32::MAX] {
        let open = Open {
            id,
            ..open_of(&offer, gpadl)
        };
        prepare(&vmbus, &pfns)?;
        vmbus.send(&open.encode().0)?;
        let result = vmbus.expect(message::OPEN_CHANNEL_RESULT, 20)?;
        equal("length of OPEN_CHANNEL_RESULT", result.len(), 20)?;
        let words = [8, 12, 16].map(|at| u32_at(&result, at));
        equal("relid, open id and status", words, [offer.relid, id, 0])?;
        vmbus.send_close(offer.relid)?;
        vmbus.expect_silence()?;
    }
    Ok(())
}

fn padded(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let (gpadl, pfns) = ring_gpadl(&vmbus, &offer, 10)?;
    for len in [156, 240] {
        prepare(&vmbus, &pfns)?;
        let open = open_of(&offer, gpadl);
        // No feature was agreed on: what lies behind is padding.
        let bytes = open.encode().bytes(&[0x33; 100]).up_to(len);
        vmbus.send(&bytes.0)?;
        let result = vmbus.expect(message::OPEN_CHANNEL_RESULT, 20)?;
        equal("status", u32_at(&result, 16), 0)?;
        works(channel(&vmbus, &offer, &open, &pfns))?;
        vmbus.send_close(offer.relid)?;
    }
    alive(&vmbus)
}

fn twice(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let bus = Bus::probe(&vmbus, &offer, 0x1_0004)?;
    let (other, _) = ring_gpadl(&vmbus, &offer, 10)?;
    for gpadl in [bus.channel().gpadl, other, 0] {
        vmbus.send(&open_of(&offer, gpadl).encode().0)?;
        alive(&vmbus)?;
    }
    equal("functions of the bus", bus.relations()?.len(), 1)?;
    bus.unbind()
}

fn ring_sizes(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    for pages in [1, 2, 3, 4, 10] {
        let (gpadl, pfns) = ring_gpadl(&vmbus, &offer, pages)?;
        let most = pages as u32;
        let cuts = [0, 1, most - 1, most, most + 1, 0x8000_0000, u32::MAX];
        for downstream in cuts {
            let open = Open {
                downstream,
                ..open_of(&offer, gpadl)
            };
            let what = format!("{pages} pages, cut at {downstream:#x}");
            refused(&what, vmbus.send_open(&open)?)?;
            let signal = vmbus.kernel().signal(0, offer.connection, 0)?;
            equal("status of a signal", signal, status::INVALID_CONNECTION_ID)?;
        }
        if pages >= 4 {
            for downstream in [2, most - 2] {
                let open = Open {
                    downstream,
                    ..open_of(&offer, gpadl)
                };
                equal("status", vmbus.send_open(&open)?, 0)?;
                works(channel(&vmbus, &offer, &open, &pfns))?;
                vmbus.send_close(offer.relid)?;
                vmbus.vm().ram().fill(pfns[0] * PAGE, pages * PAGE, 0)?;
            }
        }
    }
    alive(&vmbus)
}

fn ring_gpadl_kinds(context: &Context) -> Verdict {
    let (vmbus, first, second) = two_offers(context)?;
    let pfns = fresh(vmbus.vm(), 11)?;
    let list = |count: u32, offset: u32, pfns: &[u64]| {
        let head = Bytes::words(&[count, offset]);
        pfns.iter().fold(head, |bytes, pfn| bytes.u64(*pfn))
    };
    let two = list(20480, 0, &pfns[..5]).bytes(&list(20480, 0, &pfns[5..10]).0);
    let cases = [
        ("an offset", 1, list(40960, 8, &pfns)),
        ("a broken last page", 1, list(40959, 0, &pfns[..10])),
        ("a broken last page of one byte", 1, list(40961, 0, &pfns)),
        ("two ranges", 2, two),
    ];
    for (what, count, ranges) in cases {
        let id = vmbus.gpadl_id();
        let header = Bytes::words(&[message::GPADL_HEADER, 0, first.relid, id])
            .u16(ranges.0.len() as u16)
            .u16(count)
            .bytes(&ranges.0);
        vmbus.send(&header.0)?;
        equal(
            "status of GPADL_CREATED",
            vmbus.gpadl_created(first.relid, id)?,
            0,
        )?;
        refused(what, vmbus.send_open(&open_of(&first, id))?)?;
    }
    refused("no GPADL", vmbus.send_open(&open_of(&first, 12))?)?;
    let (others, _) = ring_gpadl(&vmbus, &second, 10)?;
    let status = vmbus.send_open(&open_of(&first, others))?;
    refused("another channel's GPADL", status)?;
    let progress = vmbus.gpadl_id();
    let header = Bytes::words(&[message::GPADL_HEADER, 0, first.relid, progress]);
    vmbus.send(&header.u16(88).u16(1).u32(40960).u32(0).0)?;
    let status = vmbus.send_open(&open_of(&first, progress))?;
    refused("a GPADL in progress", status)?;
    let (gpadl, _) = ring_gpadl(&vmbus, &first, 10)?;
    let status = vmbus.send_open(&open_of(&first, gpadl))?;
    equal("status of an open after all", status, 0)
}

fn gpadl_asked_back(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let (gpadl, _) = ring_gpadl(&vmbus, &offer, 10)?;
    equal("status", vmbus.send_open(&open_of(&offer, gpadl))?, 0)?;
    super::post(&vmbus, &[message::GPADL_TEARDOWN, 0, offer.relid, gpadl])?;
    vmbus.send_close(offer.relid)?;
    vmbus.send(&open_of(&offer, gpadl).encode().0)?;
    // Whichever comes first: the pages are the guest's, and the open has failed.
    let mut numbers = Vec::new();
    while let Some(message) = vmbus.receive()? {
        let number = u32_at(&message, 0);
        if number == message::OPEN_CHANNEL_RESULT {
            refused(
                "an open on pages that were taken back",
                u32_at(&message, 16),
            )?;
        }
        numbers.push(number);
    }
    numbers.sort_unstable();
    let expected = vec![message::OPEN_CHANNEL_RESULT, message::GPADL_TORNDOWN];
    equal("messages", numbers, expected)?;
    alive(&vmbus)
}

fn target_vp(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let vps = vmbus.vm().vps();
    let (gpadl, _) = ring_gpadl(&vmbus, &offer, 10)?;
    for vp in [vps, 64, 0x1_0000, 0xffff_fffe] {
        let open = Open {
            vp,
            ..open_of(&offer, gpadl)
        };
        refused(&format!("VP {vp:#x}"), vmbus.send_open(&open)?)?;
    }
    for vp in 0..vps {
        let channel = vmbus.open_sized(&offer, 5, vp)?;
        for other in 0..vps {
            let synic = vmbus.kernel().synic(other);
            synic.take_event(VMBUS_SINT, offer.relid as u16)?;
        }
        works(channel.clone())?;
        for other in 0..vps {
            let events = vmbus.kernel().synic(other).events(VMBUS_SINT)?;
            let expected = if other == vp {
                vec![offer.relid as u16]
            } else {
                vec![]
            };
            equal(format!("event flags of VP {other}"), events, expected)?;
        }
        channel.close()?;
    }
    Ok(())
}

fn no_interrupts(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let (gpadl, pfns) = ring_gpadl(&vmbus, &offer, 10)?;
    prepare(&vmbus, &pfns)?;
    let open = Open {
        vp: u32::MAX,
        ..open_of(&offer, gpadl)
    };
    equal("status", vmbus.send_open(&open)?, 0)?;
    let here = Open { vp: 0, ..open };
    works(channel(&vmbus, &offer, &here, &pfns))?;
    for vp in 0..vmbus.vm().vps() {
        let events = vmbus.kernel().synic(vp).events(VMBUS_SINT)?;
        equal(format!("event flags of VP {vp}"), events, vec![])?;
    }
    Ok(())
}

fn ring_read_at_open(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let pfns = fresh(vmbus.vm(), 10)?;
    vmbus.vm().ram().fill(pfns[0] * PAGE, 10 * PAGE, 0xff)?;
    let gpadl = vmbus.gpadl_id();
    equal("status", vmbus.create_gpadl(offer.relid, gpadl, &pfns)?, 0)?;
    prepare(&vmbus, &pfns)?;
    let open = open_of(&offer, gpadl);
    equal("status", vmbus.send_open(&open)?, 0)?;
    works(channel(&vmbus, &offer, &open, &pfns))
}

fn live_at_result(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    for _ in 0..20 {
        let channel = vmbus.open(&offer)?;
        equal("status of a signal", channel.signal()?, status::SUCCESS)?;
        works(channel.clone())?;
        equal("interrupt of the channel", channel.interrupted()?, true)?;
        channel.close()?;
    }
    Ok(())
}

fn packet_before_open(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let (gpadl, pfns) = ring_gpadl(&vmbus, &offer, 10)?;
    let (to_host, _) = prepare(&vmbus, &pfns)?;
    let request = Bytes::words(&[vpci::QUERY_PROTOCOL_VERSION, 0x1_0004]);
    to_host.send(&Packet::request(77, &request.0))?;
    let open = open_of(&offer, gpadl);
    equal("status", vmbus.send_open(&open)?, 0)?;
    let channel = channel(&vmbus, &offer, &open, &pfns);
    let ids: Vec<u64> = channel.receive()?.iter().map(|packet| packet.id).collect();
    equal("ids of the completions", ids, vec![77])?;
    equal("interrupt of the channel", channel.interrupted()?, true)
}

fn signal_after_result(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let (gpadl, pfns) = ring_gpadl(&vmbus, &offer, 10)?;
    let (to_host, _) = prepare(&vmbus, &pfns)?;
    let request = Bytes::words(&[vpci::QUERY_PROTOCOL_VERSION, 0x1_0004]);
    to_host.send(&Packet::request(77, &request.0))?;
    vmbus.send(&open_of(&offer, gpadl).encode().0)?;
    // A guest that ignores the channel's interrupts until it knows that the channel is open.
    let synic = vmbus.kernel().synic(0);
    while synic.pending(VMBUS_SINT)? == 0 {
        synic.take_event(VMBUS_SINT, offer.relid as u16)?;
        if !vmbus.vm().step() {
            break;
        }
    }
    let result = vmbus.expect(message::OPEN_CHANNEL_RESULT, 20)?;
    equal("status", u32_at(&result, 16), 0)?;
    let event = synic.take_event(VMBUS_SINT, offer.relid as u16)?;
    equal("event flag of the channel", event, true)
}

fn while_closing(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let bus = Bus::probe(&vmbus, &offer, 0x1_0004)?;
    let (gpadl, pfns) = ring_gpadl(&vmbus, &offer, 10)?;
    prepare(&vmbus, &pfns)?;
    let open = open_of(&offer, gpadl);
    vmbus.send_close(offer.relid)?;
    vmbus.send(&open.encode().0)?;
    let result = vmbus.expect(message::OPEN_CHANNEL_RESULT, 20)?;
    equal("status", u32_at(&result, 16), 0)?;
    vmbus.tear_down(offer.relid, bus.channel().gpadl)?;
    works(channel(&vmbus, &offer, &open, &pfns))?;
    alive(&vmbus)
}

fn again(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let (gpadl, pfns) = ring_gpadl(&vmbus, &offer, 10)?;
    let open = open_of(&offer, gpadl);
    for _ in 0..5 {
        prepare(&vmbus, &pfns)?;
        equal("status", vmbus.send_open(&open)?, 0)?;
        works(channel(&vmbus, &offer, &open, &pfns))?;
        vmbus.send_close(offer.relid)?;
        let other = vmbus.open_sized(&offer, 3, 1)?;
        works(other.clone())?;
        other.close()?;
    }
    Ok(())
}
