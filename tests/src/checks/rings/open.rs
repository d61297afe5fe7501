//! What makes a ring, and what the host makes of its control page.
#![forbid(unsafe_code)]

use super::{answered, negotiated, offered, put, request, works};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::host::{BusSetup, Setup};
use crate::model::kernel::Kernel;
use crate::model::ring::{
    FEATURES, INTERRUPT_MASK, PENDING_SEND_SIZE, READ_INDEX, Ring, WRITE_INDEX,
};
use crate::model::vm::PAGE;
use crate::model::vmbus::{Channel, Offer, Open, VmBus};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "rings.open.indices-as-found",
        "The host goes on at the indices that it finds at the open.",
        &["VB-7.1-01", "VB-7.1-02", "VB-7.1-07"],
        indices_as_found,
    ),
    Check::new(
        "rings.open.bad-indices",
        "An open with an index outside the data area, or not a multiple of 8, is refused.",
        &["VB-7.1-06", "VB-7.1-07", "VB-8-02"],
        bad_indices,
    ),
    Check::new(
        "rings.open.control-words",
        "After the open the host asks for signals, waits for no room, and offers the feature.",
        &["VB-7.1-03", "VB-7.1-04", "VB-7.1-05", "VB-7.3-09"],
        control_words,
    ),
    Check::new(
        "rings.open.sizes",
        "Rings of 2 to 300 pages work, also where the two differ.",
        &["VB-7.1-06"],
        sizes,
    ),
    Check::new(
        "rings.open.scattered-pages",
        "The pages of a ring may lie in any order: it wraps through them as listed.",
        &["VB-7.1-06", "VB-7.2-08"],
        scattered_pages,
    ),
    Check::new(
        "rings.open.aliased-pages",
        "Rings over each other or over the guest's SynIC pages harm nobody but their guest.",
        &["VB-8-11"],
        aliased_pages,
    ),
];

/// Opens the channel on these pages as they are, cut at `downstream`.
fn open_on(
    vmbus: &VmBus,
    offer: &Offer,
    pfns: &[u64],
    downstream: u32,
) -> Result<(u32, Channel), Failure> {
    let gpadl = vmbus.gpadl_id();
    let created = vmbus.create_gpadl(offer.relid, gpadl, pfns)?;
    equal("status of GPADL_CREATED", created, 0)?;
    let open = Open {
        relid: offer.relid,
        id: 1,
        gpadl,
        vp: 0,
        downstream,
    };
    let status = vmbus.send_open(&open)?;
    let (to_host, to_guest) = pfns.split_at(downstream as usize);
    Ok((
        status,
        Channel::new(vmbus, offer, &open, [to_host, to_guest]),
    ))
}

/// Ten fresh pages with control pages as Linux leaves them.
fn prepared(vmbus: &VmBus) -> Result<(Vec<u64>, [Ring; 2]), Failure> {
    let first = vmbus.vm().pages(10)? / PAGE;
    let pfns: Vec<u64> = (first..first + 10).collect();
    let rings = [
        Ring::new(vmbus.vm(), &pfns[..5]),
        Ring::new(vmbus.vm(), &pfns[5..]),
    ];
    for ring in &rings {
        ring.reset()?;
    }
    Ok((pfns, rings))
}

fn indices_as_found(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    for (to_host, to_guest) in [(8, 16), (0x3ff8, 0x1000), (0x2008, 0x3ff8)] {
        let (pfns, rings) = prepared(&vmbus)?;
        for (ring, index) in rings.iter().zip([to_host, to_guest]) {
            ring.store(WRITE_INDEX, index)?;
            ring.store(READ_INDEX, index)?;
        }
        let (status, channel) = open_on(&vmbus, &offer, &pfns, 5)?;
        equal("status of OPEN_CHANNEL_RESULT", status, 0)?;
        let channel = negotiated(channel)?;
        works(&channel)?;
        channel.close()?;
    }
    Ok(())
}

fn bad_indices(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let (pfns, rings) = prepared(&vmbus)?;
    for (which, ring) in rings.iter().enumerate() {
        for word in [WRITE_INDEX, READ_INDEX] {
            for bad in [
                4,
                1,
                0x4000,
                0x4008,
                0x3ffc,
                0x8000_0000,
                0xffff_fff8,
                u32::MAX,
            ] {
                ring.store(word, bad)?;
                let (status, channel) = open_on(&vmbus, &offer, &pfns, 5)?;
                let what = format!("ring {which}, index at {word} {bad:#x}: status {status:#x}");
                holds(what, status != 0)?;
                vmbus.tear_down(offer.relid, channel.gpadl)?;
                ring.store(word, 0)?;
            }
        }
    }
    let (status, channel) = open_on(&vmbus, &offer, &pfns, 5)?;
    equal("status of OPEN_CHANNEL_RESULT", status, 0)?;
    works(&negotiated(channel)?)
}

fn control_words(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let (pfns, [to_host, to_guest]) = prepared(&vmbus)?;
    to_host.store(INTERRUPT_MASK, 1)?;
    to_guest.store(PENDING_SEND_SIZE, 64)?;
    to_guest.store(FEATURES, 0)?;
    let (status, channel) = open_on(&vmbus, &offer, &pfns, 5)?;
    equal("status of OPEN_CHANNEL_RESULT", status, 0)?;
    equal(
        "interrupt mask of the host",
        to_host.load(INTERRUPT_MASK)?,
        0,
    )?;
    equal(
        "pending send size of the host",
        to_guest.load(PENDING_SEND_SIZE)?,
        0,
    )?;
    equal("feature bit of the host", to_guest.load(FEATURES)? & 1, 1)?;
    works(&negotiated(channel)?)
}

fn sizes(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    for (pages, downstream) in [(4, 2), (5, 2), (5, 3), (64, 2), (64, 62), (600, 300)] {
        let first = vmbus.vm().pages(pages)? / PAGE;
        let pfns: Vec<u64> = (first..first + pages).collect();
        for control in [0, downstream as usize] {
            Ring::new(vmbus.vm(), &pfns[control..]).reset()?;
        }
        let (status, channel) = open_on(&vmbus, &offer, &pfns, downstream)?;
        equal(
            format!("status with {pages} pages cut at {downstream}"),
            status,
            0,
        )?;
        let channel = negotiated(channel)?;
        for _ in 0..3 {
            works(&channel)?;
        }
        channel.close()?;
    }
    Ok(())
}

fn scattered_pages(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let first = vmbus.vm().pages(20)? / PAGE;
    // Backwards, with gaps; and pairs that are next to each other but the wrong way round.
    let gaps: Vec<u64> = (0..10).map(|page| first + 18 - 2 * page).collect();
    let pairs = [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]
        .map(|page| first + page)
        .to_vec();
    for pfns in [gaps, pairs] {
        for control in [0, 5] {
            Ring::new(vmbus.vm(), &pfns[control..]).reset()?;
        }
        let (status, channel) = open_on(&vmbus, &offer, &pfns, 5)?;
        equal("status of OPEN_CHANNEL_RESULT", status, 0)?;
        let channel = negotiated(channel)?;
        // Twice round either ring.
        for round in 0..20 {
            let ids = round * 60 + 1..round * 60 + 61;
            for id in ids.clone() {
                put(&channel, &request(id))?;
            }
            channel.signal()?;
            answered(&channel, ids)?;
        }
        channel.close()?;
    }
    Ok(())
}

fn aliased_pages(context: &Context) -> Verdict {
    let setup = Setup {
        buses: vec![BusSetup::testdev(1), BusSetup::testdev(2)],
        ..Setup::default()
    };
    let vmbus = VmBus::connect(&Kernel::boot(&context.machine(&setup)?)?)?;
    let offers = vmbus.offers()?;
    let other = negotiated(vmbus.open(&offers[1])?)?;
    let own = vmbus.vm().pages(4)? / PAGE;
    // VP 1 takes no messages: its pages may hold what they like.
    let synic = vmbus.kernel().synic(1);
    let (messages, flags) = (synic.slot(0) / PAGE, synic.flags(0) / PAGE);
    let sets = [
        [own, own + 1, own, own + 1],
        [own, own, own, own],
        [own, own + 1, own + 1, own],
        [messages, own, flags, own + 1],
        [own, messages, own + 1, flags],
        [other.to_host.control() / PAGE, own, own + 1, own + 2],
    ];
    for (number, pfns) in sets.into_iter().enumerate() {
        if number < 5 {
            vmbus.vm().ram().fill(own * PAGE, 4 * PAGE, 0)?;
        }
        let (status, channel) = open_on(&vmbus, &offers[0], &pfns, 2)?;
        if status == 0 {
            channel.to_host.send(&request(1))?;
            channel.signal()?;
            vmbus.vm().settle();
            channel.vmbus().send_close(offers[0].relid)?;
        }
        vmbus.tear_down(offers[0].relid, channel.gpadl)?;
    }
    works(&negotiated(vmbus.open(&offers[0])?)?)
}
