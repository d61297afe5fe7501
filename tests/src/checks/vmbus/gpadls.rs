//! Lists of guest pages (docs/spec/vmbus.md, section 4).
#![forbid(unsafe_code)]

use super::{alive, fresh, gpadl_refused, offered, post, two_offers};
use crate::check::{Check, Context, Verdict, equal, holds};
use crate::host::Setup;
use crate::model::kernel::Kernel;
use crate::model::vm::PAGE;
use crate::model::vmbus::{VmBus, message};
use crate::model::wire::{Bytes, u32_at};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vmbus.gpadl.header-alone",
        "A list of 1 to 26 pages in the header alone is accepted with one answer of 20 bytes.",
        &[
            "VB-4-01",
            "VB-4-03",
            "VB-4-04",
            "VB-4-07",
            "VB-4-08",
            "VB-1.1-08",
            "VB-1.1-10",
        ],
        header_alone,
    ),
    Check::new(
        "vmbus.gpadl.bodies",
        "Longer lists are accepted when the last body has come, and not before.",
        &["VB-4-02", "VB-4-07", "VB-4-08", "VB-1.1-09"],
        bodies,
    ),
    Check::new(
        "vmbus.gpadl.uneven-pieces",
        "The list may be cut anywhere between two words, also before its first.",
        &["VB-4-07", "VB-1-03"],
        uneven_pieces,
    ),
    Check::new(
        "vmbus.gpadl.padded",
        "Bytes behind the announced ones are padding, in the header and in the last body.",
        &["VB-4-07", "VB-1-03"],
        padded,
    ),
    Check::new(
        "vmbus.gpadl.several-ranges",
        "A list of ranges with offsets of their own is accepted.",
        &["VB-4-03", "VB-4-10"],
        several_ranges,
    ),
    Check::new(
        "vmbus.gpadl.largest",
        "The largest list that a header can announce is accepted.",
        &["VB-4-10", "VB-4-07", "VB-4-11"],
        largest,
    ),
    Check::new(
        "vmbus.gpadl.interleaved",
        "The bodies of two lists may alternate.",
        &["VB-4-07", "VB-4-09"],
        interleaved,
    ),
    Check::new(
        "vmbus.gpadl.shared-pages",
        "Pages may repeat, lie in any order, and be in several lists.",
        &["VB-4-11"],
        shared_pages,
    ),
    Check::new(
        "vmbus.gpadl.malformed",
        "Each malformed list is refused with one answer, and the next one is accepted.",
        &["VB-4-08", "VB-4-10", "VB-8-08"],
        malformed,
    ),
    Check::new(
        "vmbus.gpadl.outside-ram",
        "A page that is not RAM is refused, wherever in the list it is; the last one of RAM is not.",
        &["VB-4-10", "VB-8-08", "VB-8-10", "VB-4-08"],
        outside_ram,
    ),
    Check::new(
        "vmbus.gpadl.duplicate",
        "A second list of an id is refused, and the first one stays as it is.",
        &["VB-4-09", "VB-4-08"],
        duplicate,
    ),
    Check::new(
        "vmbus.gpadl.duplicate-in-progress",
        "A header with the id of a list in progress is refused, whatever its channel.",
        &["VB-4-09", "VB-4-08"],
        duplicate_in_progress,
    ),
    Check::new(
        "vmbus.gpadl.same-id-on-two-channels",
        "Two channels may have lists of the same id, each on its own.",
        &["VB-4-09"],
        same_id,
    ),
    Check::new(
        "vmbus.gpadl.unknown-channel",
        "A list for a channel that does not exist is refused with an answer.",
        &["VB-4-08", "VB-8-13"],
        unknown_channel,
    ),
    Check::new(
        "vmbus.gpadl.body-without-header",
        "A body of no list, or of one that is complete, is without effect.",
        &["VB-4-08", "VB-4-02"],
        body_without_header,
    ),
    Check::new(
        "vmbus.gpadl.teardown",
        "A list that is not in use is given back at once, and its id is free again.",
        &["VB-4-05", "VB-4-06", "VB-1.1-11", "VB-1.1-12"],
        teardown,
    ),
    Check::new(
        "vmbus.gpadl.teardown-of-nothing",
        "A teardown of an unknown list, one in progress or another channel's is not answered.",
        &["VB-4-12", "VB-8-13"],
        teardown_of_nothing,
    ),
    Check::new(
        "vmbus.gpadl.teardown-while-open",
        "A list that rings use is given back when the channel is closed, once, and not before.",
        &["VB-4-12", "VB-5-09", "VB-8-16"],
        teardown_while_open,
    ),
    Check::new(
        "vmbus.gpadl.limits",
        "Lists, those in progress and their bytes are bounded; refusals and teardowns leave room.",
        &["VB-4-10", "VB-8-14", "VB-8-13"],
        limits,
    ),
];

/// GPADL_HEADER, every field free.
fn header(relid: u32, id: u32, len: u16, count: u16, ranges: &[u8]) -> Bytes {
    Bytes::words(&[message::GPADL_HEADER, 0, relid, id])
        .u16(len)
        .u16(count)
        .bytes(ranges)
}

/// GPADL_BODY.
fn body(id: u32, ranges: &[u8]) -> Bytes {
    Bytes::words(&[message::GPADL_BODY, 0, 0, id]).bytes(ranges)
}

/// A range as it lies in a list.
fn range(count: u32, offset: u32, pfns: &[u64]) -> Bytes {
    let head = Bytes::words(&[count, offset]);
    pfns.iter().fold(head, |bytes, pfn| bytes.u64(*pfn))
}

/// A range of whole pages.
fn pages(pfns: &[u64]) -> Bytes {
    range(pfns.len() as u32 * PAGE as u32, 0, pfns)
}

/// The next message says that the list was accepted.
fn accepted(vmbus: &VmBus, relid: u32, id: u32, what: &str) -> Verdict {
    let status = vmbus.gpadl_created(relid, id);
    let status = status.map_err(|failure| failure.during(what))?;
    equal(format!("{what}: status of GPADL_CREATED"), status, 0)
}

fn header_alone(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let pfns = fresh(vmbus.vm(), 26)?;
    for count in [1, 2, 25, 26] {
        let id = vmbus.gpadl_id();
        vmbus.send_gpadl(offer.relid, id, &pfns[..count])?;
        let created = vmbus.expect(message::GPADL_CREATED, 20)?;
        equal("length of GPADL_CREATED", created.len(), 20)?;
        let words = [8, 12, 16].map(|at| u32_at(&created, at));
        equal("relid, GPADL and status", words, [offer.relid, id, 0])?;
        vmbus.expect_silence()?;
    }
    Ok(())
}

fn bodies(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let pfns = fresh(vmbus.vm(), 300)?;
    for count in [27, 28, 54, 55, 82, 300] {
        let id = vmbus.gpadl_id();
        let list = pages(&pfns[..count]).0;
        let (first, rest) = list.split_at(8 * 27);
        vmbus.send(&header(offer.relid, id, list.len() as u16, 1, first).0)?;
        // The number of a body is of no use to anyone.
        for (number, piece) in rest.chunks(8 * 28).enumerate() {
            vmbus.expect_silence()?;
            let head = Bytes::words(&[message::GPADL_BODY, 0, number as u32 * 7, id]);
            vmbus.send(&head.bytes(piece).0)?;
        }
        accepted(&vmbus, offer.relid, id, &format!("{count} pages"))?;
    }
    alive(&vmbus)
}

fn uneven_pieces(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let list = pages(&fresh(vmbus.vm(), 40)?).0;
    for (first, step) in [(0, 8), (0, 224), (8, 16), (16, 200), (216, 8)] {
        let id = vmbus.gpadl_id();
        let (head, rest) = list.split_at(first);
        vmbus.send(&header(offer.relid, id, list.len() as u16, 1, head).0)?;
        for piece in rest.chunks(step) {
            vmbus.expect_silence()?;
            vmbus.send(&body(id, piece).0)?;
        }
        accepted(
            &vmbus,
            offer.relid,
            id,
            &format!("{first} bytes, then {step}"),
        )?;
    }
    alive(&vmbus)
}

fn padded(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let pfns = fresh(vmbus.vm(), 30)?;
    let junk = [0xff; 240];
    let cut = |bytes: Bytes| bytes.bytes(&junk).up_to(240);
    let id = vmbus.gpadl_id();
    let list = pages(&pfns[..10]).0;
    vmbus.send(&cut(header(offer.relid, id, list.len() as u16, 1, &list)).0)?;
    accepted(&vmbus, offer.relid, id, "padded header")?;
    let id = vmbus.gpadl_id();
    let list = pages(&pfns).0;
    let (first, rest) = list.split_at(8 * 27);
    vmbus.send(&header(offer.relid, id, list.len() as u16, 1, first).0)?;
    vmbus.send(&cut(body(id, rest)).0)?;
    accepted(&vmbus, offer.relid, id, "padded body")?;
    alive(&vmbus)
}

fn several_ranges(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let pfns = fresh(vmbus.vm(), 4)?;
    // A byte at the end of a page, two bytes across a boundary, a page and a half.
    let list = range(1, 4095, &pfns[..1])
        .bytes(&range(2, 4095, &pfns[1..3]).0)
        .bytes(&range(6144, 0, &pfns[2..4]).0);
    let id = vmbus.gpadl_id();
    vmbus.send(&header(offer.relid, id, list.0.len() as u16, 3, &list.0).0)?;
    accepted(&vmbus, offer.relid, id, "three ranges")?;
    vmbus.tear_down(offer.relid, id)
}

fn largest(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    // There is less RAM than 32 MiB: the list goes round.
    let some = fresh(vmbus.vm(), 64)?;
    let pfns: Vec<u64> = some.iter().copied().cycle().take(8190).collect();
    let id = vmbus.gpadl_id();
    vmbus.send_gpadl(offer.relid, id, &pfns)?;
    accepted(&vmbus, offer.relid, id, "8190 pages")?;
    vmbus.tear_down(offer.relid, id)
}

fn interleaved(context: &Context) -> Verdict {
    let (vmbus, first, second) = two_offers(context)?;
    let pfns = fresh(vmbus.vm(), 140)?;
    let lists = [pages(&pfns[..70]).0, pages(&pfns[70..]).0];
    let ids = [vmbus.gpadl_id(), vmbus.gpadl_id()];
    let relids = [first.relid, second.relid];
    for which in 0..2 {
        let len = lists[which].len() as u16;
        let head = &lists[which][..64];
        vmbus.send(&header(relids[which], ids[which], len, 1, head).0)?;
    }
    for at in (64..lists[0].len()).step_by(200) {
        for which in 0..2 {
            vmbus.expect_silence()?;
            let end = lists[which].len().min(at + 200);
            vmbus.send(&body(ids[which], &lists[which][at..end]).0)?;
            if end == lists[which].len() {
                accepted(&vmbus, relids[which], ids[which], "alternating bodies")?;
            }
        }
    }
    alive(&vmbus)
}

fn shared_pages(context: &Context) -> Verdict {
    let (vmbus, first, second) = two_offers(context)?;
    let pfns = fresh(vmbus.vm(), 8)?;
    let mut backwards = pfns.clone();
    backwards.reverse();
    let same = vec![pfns[3]; 20];
    for relid in [first.relid, second.relid] {
        for list in [&pfns, &backwards, &same] {
            let status = vmbus.create_gpadl(relid, vmbus.gpadl_id(), list)?;
            equal("status of GPADL_CREATED", status, 0)?;
        }
    }
    alive(&vmbus)
}

fn malformed(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let pfns = fresh(vmbus.vm(), 2)?;
    let good = pages(&pfns).0;
    let cases: [(&str, u16, u16, Bytes); 12] = [
        ("no range", 24, 0, pages(&pfns)),
        ("no bytes of ranges", 0, 1, pages(&pfns)),
        ("bytes that are no whole words", 23, 1, pages(&pfns)),
        ("a range without its head", 8, 2, pages(&pfns[..0])),
        ("a range of no bytes", 24, 1, range(0, 0, &pfns)),
        (
            "a range of no bytes at an offset",
            24,
            1,
            range(0, 8, &pfns),
        ),
        ("an offset of a page", 24, 1, range(4096, 4096, &pfns)),
        ("an offset of all ones", 24, 1, range(4096, u32::MAX, &pfns)),
        ("more bytes than page numbers", 24, 1, range(8193, 0, &pfns)),
        (
            "an offset beyond the page numbers",
            24,
            1,
            range(8192, 1, &pfns),
        ),
        ("bytes of all ones", 24, 1, range(u32::MAX, 0, &pfns)),
        (
            "bytes and offset that overflow",
            24,
            1,
            range(u32::MAX, 1, &pfns),
        ),
    ];
    for (what, len, count, ranges) in cases {
        let id = vmbus.gpadl_id();
        vmbus.send(&header(offer.relid, id, len, count, &ranges.0).0)?;
        gpadl_refused(&vmbus, offer.relid, id, what)?;
        vmbus.expect_silence()?;
        // The id is free after a refusal.
        vmbus.send(&header(offer.relid, id, 24, 1, &good).0)?;
        accepted(&vmbus, offer.relid, id, what)?;
    }
    let id = vmbus.gpadl_id();
    vmbus.send(&header(offer.relid, id, 24, 2, &good).0)?;
    gpadl_refused(&vmbus, offer.relid, id, "more ranges than bytes")?;
    vmbus.send(&header(offer.relid, id, 24, u16::MAX, &good).0)?;
    gpadl_refused(&vmbus, offer.relid, id, "65535 ranges")?;
    alive(&vmbus)
}

fn outside_ram(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let end = vmbus.vm().setup().ram.last().map_or(0, |range| range.end) / PAGE;
    let inside = fresh(vmbus.vm(), 40)?;
    let outside = [
        end,
        0xf_0000,
        0xf_ee00,
        1 << 40,
        1 << 52,
        u64::MAX >> 12,
        u64::MAX,
    ];
    for bad in outside {
        for at in [0, 25, 26, 39] {
            let mut pfns = inside.clone();
            pfns[at] = bad;
            let id = vmbus.gpadl_id();
            vmbus.send_gpadl(offer.relid, id, &pfns)?;
            let what = format!("page {bad:#x} at position {at}");
            gpadl_refused(&vmbus, offer.relid, id, &what)?;
            vmbus.expect_silence()?;
        }
    }
    let status = vmbus.create_gpadl(offer.relid, vmbus.gpadl_id(), &[end - 1, 0])?;
    equal("status for the last page of RAM", status, 0)
}

fn duplicate(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let (id, _) = super::ring_gpadl(&vmbus, &offer, 10)?;
    let other = fresh(vmbus.vm(), 30)?;
    for count in [1, 26] {
        vmbus.send_gpadl(offer.relid, id, &other[..count])?;
        gpadl_refused(&vmbus, offer.relid, id, "an id in use")?;
        vmbus.expect_silence()?;
    }
    // The first one still holds ten pages.
    let status = vmbus.send_open(&super::open_of(&offer, id))?;
    equal("status of OPEN_CHANNEL_RESULT", status, 0)?;
    vmbus.send_close(offer.relid)?;
    vmbus.tear_down(offer.relid, id)?;
    alive(&vmbus)
}

fn duplicate_in_progress(context: &Context) -> Verdict {
    let (vmbus, first, second) = two_offers(context)?;
    let pfns = fresh(vmbus.vm(), 30)?;
    let (id, list) = (vmbus.gpadl_id(), pages(&pfns).0);
    let (head, rest) = list.split_at(8 * 20);
    vmbus.send(&header(first.relid, id, list.len() as u16, 1, head).0)?;
    for relid in [first.relid, second.relid] {
        vmbus.send(&header(relid, id, list.len() as u16, 1, head).0)?;
        gpadl_refused(&vmbus, relid, id, "an id in progress")?;
        vmbus.expect_silence()?;
    }
    vmbus.send(&body(id, rest).0)?;
    accepted(&vmbus, first.relid, id, "the list in progress")?;
    alive(&vmbus)
}

fn same_id(context: &Context) -> Verdict {
    let (vmbus, first, second) = two_offers(context)?;
    let pfns = fresh(vmbus.vm(), 20)?;
    for (relid, pfns) in [(first.relid, &pfns[..10]), (second.relid, &pfns[10..])] {
        equal("status", vmbus.create_gpadl(relid, 7, pfns)?, 0)?;
    }
    vmbus.tear_down(first.relid, 7)?;
    let status = vmbus.send_open(&super::open_of(&first, 7))?;
    super::refused("an open with a list that was torn down", status)?;
    let status = vmbus.send_open(&super::open_of(&second, 7))?;
    equal("status of the other channel's open", status, 0)
}

fn unknown_channel(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let pfns = fresh(vmbus.vm(), 2)?;
    for relid in [
        0,
        offer.relid + 1,
        2047,
        2048,
        0x1_0000 + offer.relid,
        u32::MAX,
    ] {
        let id = vmbus.gpadl_id();
        vmbus.send_gpadl(relid, id, &pfns)?;
        gpadl_refused(&vmbus, relid, id, &format!("channel {relid:#x}"))?;
        vmbus.expect_silence()?;
    }
    alive(&vmbus)
}

fn body_without_header(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let pfns = fresh(vmbus.vm(), 10)?;
    vmbus.send(&body(99, &pages(&pfns).0).0)?;
    alive(&vmbus)?;
    let (id, _) = super::ring_gpadl(&vmbus, &offer, 10)?;
    vmbus.send(&body(id, &[0xff; 16]).0)?;
    alive(&vmbus)?;
    let status = vmbus.send_open(&super::open_of(&offer, id))?;
    equal("status of OPEN_CHANNEL_RESULT", status, 0)
}

fn teardown(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    for _ in 0..3 {
        let pfns = fresh(vmbus.vm(), 40)?;
        equal("status", vmbus.create_gpadl(offer.relid, 5, &pfns)?, 0)?;
        post(&vmbus, &[message::GPADL_TEARDOWN, 0, offer.relid, 5])?;
        let torndown = vmbus.expect(message::GPADL_TORNDOWN, 12)?;
        equal("length of GPADL_TORNDOWN", torndown.len(), 12)?;
        equal("GPADL of GPADL_TORNDOWN", u32_at(&torndown, 8), 5)?;
        vmbus.expect_silence()?;
    }
    Ok(())
}

fn teardown_of_nothing(context: &Context) -> Verdict {
    let (vmbus, first, second) = two_offers(context)?;
    let teardown = |relid, id| post(&vmbus, &[message::GPADL_TEARDOWN, 0, relid, id]);
    let (id, _) = super::ring_gpadl(&vmbus, &first, 10)?;
    teardown(first.relid, id + 1000)?;
    teardown(second.relid, id)?;
    teardown(0, id)?;
    teardown(0x1_0000 + first.relid, id)?;
    teardown(u32::MAX, id)?;
    alive(&vmbus)?;
    let pfns = fresh(vmbus.vm(), 30)?;
    let (id, list) = (vmbus.gpadl_id(), pages(&pfns).0);
    let (head, rest) = list.split_at(8 * 20);
    vmbus.send(&header(first.relid, id, list.len() as u16, 1, head).0)?;
    teardown(first.relid, id)?;
    vmbus.expect_silence()?;
    vmbus.send(&body(id, rest).0)?;
    accepted(&vmbus, first.relid, id, "the list in progress")?;
    vmbus.tear_down(first.relid, id)?;
    teardown(first.relid, id)?;
    alive(&vmbus)
}

fn teardown_while_open(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let bus = crate::model::vpci::Bus::probe(&vmbus, &offer, 0x1_0004)?;
    let gpadl = bus.channel().gpadl;
    for _ in 0..2 {
        post(&vmbus, &[message::GPADL_TEARDOWN, 0, offer.relid, gpadl])?;
        alive(&vmbus)?;
    }
    equal("functions of the bus", bus.relations()?.len(), 1)?;
    vmbus.send_close(offer.relid)?;
    let torndown = vmbus.expect(message::GPADL_TORNDOWN, 12)?;
    equal("GPADL of GPADL_TORNDOWN", u32_at(&torndown, 8), gpadl)?;
    alive(&vmbus)
}

/// Creates lists of two pages until one is refused; returns the ids of those accepted.
fn until_refused(
    vmbus: &VmBus,
    relid: u32,
    most: usize,
) -> Result<Vec<u32>, crate::check::Failure> {
    let pfns = fresh(vmbus.vm(), 2)?;
    let mut ids = Vec::new();
    while ids.len() <= most {
        let id = vmbus.gpadl_id();
        if vmbus.create_gpadl(relid, id, &pfns)? != 0 {
            break;
        }
        ids.push(id);
    }
    Ok(ids)
}

fn limits(context: &Context) -> Verdict {
    let mut setup = Setup::default();
    setup.vmbus.limits.gpadls = 12;
    setup.vmbus.limits.gpadls_in_progress = 3;
    setup.vmbus.limits.gpadl_bytes = 1024;
    let vmbus = VmBus::connect(&Kernel::boot(&context.machine(&setup)?)?)?;
    let relid = vmbus.only_offer()?.relid;
    let ids = until_refused(&vmbus, relid, 12)?;
    equal("lists up to the limit", ids.len(), 12)?;
    for id in &ids {
        vmbus.tear_down(relid, *id)?;
    }
    // What is refused takes no room, be it malformed or outside RAM.
    for _ in 0..40 {
        let id = vmbus.gpadl_id();
        vmbus.send(&header(relid, id, 64, 1, &[0; 64]).0)?;
        gpadl_refused(&vmbus, relid, id, "a range of no bytes")?;
        vmbus.send_gpadl(relid, id, &[u64::MAX; 30])?;
        gpadl_refused(&vmbus, relid, id, "pages outside RAM")?;
    }
    // 1024 bytes are a list of 127 pages.
    let pfns = fresh(vmbus.vm(), 128)?;
    super::refused("128 pages", {
        let id = vmbus.gpadl_id();
        vmbus.send(&header(relid, id, 8 * 129, 1, &[]).0)?;
        vmbus.gpadl_created(relid, id)?
    })?;
    let id = vmbus.gpadl_id();
    equal(
        "status of 127 pages",
        vmbus.create_gpadl(relid, id, &pfns[..127])?,
        0,
    )?;
    equal("lists beside it", until_refused(&vmbus, relid, 1)?.len(), 0)?;
    vmbus.tear_down(relid, id)?;
    let started: Vec<u32> = (0..3).map(|_| vmbus.gpadl_id()).collect();
    let list = pages(&pfns[..2]).0;
    for id in &started {
        vmbus.send(&header(relid, *id, 24, 1, &list[..8]).0)?;
    }
    vmbus.expect_silence()?;
    let late = vmbus.gpadl_id();
    vmbus.send(&header(relid, late, 24, 1, &list[..8]).0)?;
    gpadl_refused(&vmbus, relid, late, "one more in progress")?;
    for id in &started {
        vmbus.send(&body(*id, &list[8..]).0)?;
        accepted(&vmbus, relid, *id, "a list in progress")?;
    }
    let status = vmbus.create_gpadl(relid, late, &pfns[..2])?;
    holds("there is room afterwards", status == 0)
}
