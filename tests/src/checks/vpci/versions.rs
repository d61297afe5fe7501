//! Versions and what each brings (docs/spec/vpci.md, section 2).
#![forbid(unsafe_code)]

use super::{negotiated, opened, versions};
use crate::check::{Check, Context, Verdict, equal, holds};
use crate::model::vpci::{Bus, Create, VERSIONS, message, nt};
use crate::model::wire::{Bytes, u32_at};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vpci.version.unknown",
        "Versions that the host does not know get REVISION_MISMATCH, and another can be tried.",
        &["VP-2-01", "VP-2-06", "VP-2-07", "VP-2-09", "VP-3-07"],
        unknown,
    ),
    Check::new(
        "vpci.version.fallback",
        "Each known version is taken at once or after others were refused.",
        &["VP-2-08", "VP-2-09"],
        fallback,
    ),
    Check::new(
        "vpci.version.reply",
        "The answer to an accepted version is success and that version.",
        &["VP-4-01", "VP-4-02", "VP-3.1-14"],
        reply,
    ),
    Check::new(
        "vpci.version.needed-first",
        "Before a version is agreed on every other message fails and does nothing.",
        &["VP-2-10", "VP-11-01"],
        needed_first,
    ),
    Check::new(
        "vpci.version.only-once",
        "Once a version is agreed on it stays, whatever is asked for.",
        &["VP-2-10"],
        only_once,
    ),
    Check::new(
        "vpci.version.truncated",
        "A query without a version is malformed and agrees on nothing.",
        &["VP-11-02", "VP-3-07"],
        truncated,
    ),
    Check::new(
        "vpci.version.anew-after-close",
        "A channel that was closed and opened again starts with no version.",
        &["VP-9-01", "VP-11-01"],
        anew,
    ),
    Check::new(
        "vpci.version.newer-messages",
        "Messages that a later version brought are refused under an earlier one.",
        &["VP-2-02", "VP-2-03", "VP-2-05"],
        newer_messages,
    ),
    Check::new(
        "vpci.version.older-messages",
        "Under a later version the messages of an earlier one still work.",
        &["VP-3.1-12", "VP-3.1-15", "VP-3.1-16", "VP-3.1-17"],
        older_messages,
    ),
];

fn unknown(context: &Context) -> Verdict {
    let bus = opened(context)?;
    for version in [
        0x1_0000,
        0x1_0005,
        0x1_0006,
        0,
        1,
        0x1_0007,
        0x2_0001,
        0x8001_0004,
        u32::MAX,
    ] {
        let what = format!("status of version {version:#x}");
        equal(what, bus.negotiate(version)?, nt::REVISION_MISMATCH)?;
    }
    equal("status of 1.4", bus.negotiate(0x1_0004)?, nt::SUCCESS)
}

fn fallback(context: &Context) -> Verdict {
    for version in VERSIONS {
        let bus = opened(context)?;
        // As if this were a host that knows none of the versions before it.
        for _ in VERSIONS.iter().take_while(|other| **other != version) {
            equal("status", bus.negotiate(0x1_7fff)?, nt::REVISION_MISMATCH)?;
        }
        let what = format!("status of version {version:#x}");
        equal(what, bus.negotiate(version)?, nt::SUCCESS)?;
        equal("number of functions", bus.relations()?.len(), 1)?;
    }
    Ok(())
}

fn reply(context: &Context) -> Verdict {
    for version in versions() {
        let bus = opened(context)?;
        let request = Bytes::words(&[message::QUERY_PROTOCOL_VERSION, version]);
        let reply = bus.request(&request.0)?;
        equal("status", reply.status, nt::SUCCESS)?;
        equal("payload of the reply", reply.payload.len(), 8)?;
        equal("version in the reply", u32_at(&reply.payload, 4), version)?;
        equal("packets beside it", reply.unsolicited, Vec::new())?;
    }
    Ok(())
}

fn failed(what: impl std::fmt::Display, status: u32) -> Verdict {
    holds(
        format!("{what} gets a failure, not {status:#x}"),
        status & 1 << 31 != 0,
    )
}

fn needed_first(context: &Context) -> Verdict {
    let bus = opened(context)?;
    for number in (0..=0x20).filter(|number| *number != 0x13) {
        let mut request = Bytes::words(&[message::BASE + number, 0]).u64(bus.window());
        request = request.up_to(256);
        let reply = bus.request(&request.0)?;
        failed(format!("message {number:#x}"), reply.status)?;
        equal("packets beside it", reply.unsolicited, Vec::new())?;
        bus.send(&request.0)?;
        let packets = bus.channel().receive()?;
        equal("packets for no request", packets.len(), 0)?;
    }
    equal("the vendor id", bus.config(0, 0, 2)?, 0xffff)?;
    equal("status of 1.4", bus.negotiate(0x1_0004)?, nt::SUCCESS)?;
    let create = Create::one(0, 0x60, 0).encode(0x1_0004);
    failed("an interrupt before D0", bus.request(&create.0)?.status)
}

fn only_once(context: &Context) -> Verdict {
    let bus = negotiated(context, 0x1_0002)?;
    for version in [0x1_0004, 0x1_0002, 0x1_0001, 0x1_0009] {
        let words = [message::QUERY_PROTOCOL_VERSION, version];
        failed(
            format!("a second query of {version:#x}"),
            bus.status(&words)?,
        )?;
    }
    // Still in the form of 1.2.
    equal("number of functions", bus.relations()?.len(), 1)
}

fn truncated(context: &Context) -> Verdict {
    let bus = opened(context)?;
    // A packet's payload is a multiple of 8 bytes: the shortest query is padded with a zero.
    let status = bus.status(&[message::QUERY_PROTOCOL_VERSION])?;
    equal("status", status, nt::REVISION_MISMATCH)?;
    equal(
        "status of no message",
        bus.request(&[])?.status & 1 << 31,
        1 << 31,
    )?;
    equal("status of 1.3", bus.negotiate(0x1_0003)?, nt::SUCCESS)
}

fn anew(context: &Context) -> Verdict {
    let bus = negotiated(context, 0x1_0004)?;
    bus.channel().close()?;
    let again = Bus::new(bus.vmbus().open(&bus.channel().offer)?, 0);
    failed(
        "a request before the query",
        again.status(&[message::BUS_D0EXIT])?,
    )?;
    // After hibernation a guest asks for the old version alone.
    equal("status of 1.1", again.negotiate(0x1_0001)?, nt::SUCCESS)?;
    equal("number of functions", again.relations()?.len(), 1)
}

/// The messages with a version's number in their name, as that version has them.
fn forms() -> [(u32, Vec<u8>); 6] {
    let create = Create::one(0, 0x60, 0);
    let assigned = |number, len| Bytes::words(&[number, 0]).up_to(len).0;
    [
        (0x1_0001, create.encode(0x1_0001).0),
        (0x1_0002, create.encode(0x1_0002).0),
        (0x1_0004, create.encode(0x1_0004).0),
        (0x1_0001, assigned(message::RESOURCES_ASSIGNED, 148)),
        (0x1_0002, assigned(message::RESOURCES_ASSIGNED2, 202)),
        (0x1_0004, assigned(message::RESOURCES_ASSIGNED3, 216)),
    ]
}

fn each_form(context: &Context, version: u32) -> Verdict {
    let bus = negotiated(context, version)?;
    equal(
        "status of BUS_D0ENTRY",
        bus.d0_entry(bus.window())?,
        nt::SUCCESS,
    )?;
    for (since, request) in forms() {
        let status = bus.request(&request)?.status;
        let what = format!("version {version:#x}: message {:#x}", u32_at(&request, 0));
        match since <= version {
            true => equal(what, status, nt::SUCCESS)?,
            false => failed(what, status)?,
        }
    }
    Ok(())
}

fn newer_messages(context: &Context) -> Verdict {
    each_form(context, 0x1_0001)?;
    each_form(context, 0x1_0002)?;
    each_form(context, 0x1_0003)
}

fn older_messages(context: &Context) -> Verdict {
    each_form(context, 0x1_0004)
}
