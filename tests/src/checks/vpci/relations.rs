//! The functions of a bus, as it describes them (docs/spec/vpci.md, sections 4 and 5).
#![forbid(unsafe_code)]

use super::{bus_with, negotiated, versions};
use crate::check::{Check, Context, Verdict, equal};
use crate::devices::Plain;
use crate::host::FunctionSetup;
use crate::model::vpci::{Bus, message, nt, slot};
use crate::model::wire::{Bytes, u16_at, u32_at};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vpci.relations.before-d0",
        "QUERY_BUS_RELATIONS is answered before D0 by a packet of the host's own.",
        &["VP-5-01", "VP-4-03", "VP-3.1-02"],
        before_d0,
    ),
    Check::new(
        "vpci.relations.first-form",
        "Below 1.3 a description has 20 bytes.",
        &["VP-4-04", "VP-4-30", "VP-3.1-01"],
        first_form,
    ),
    Check::new(
        "vpci.relations.second-form",
        "From 1.3 on a description has 28 bytes; no NUMA node is claimed where there is none.",
        &["VP-4-05", "VP-4-31", "VP-3.1-18", "VP-2-04"],
        second_form,
    ),
    Check::new(
        "vpci.relations.repeated",
        "The list is complete and the same each time it is asked for, in any state.",
        &["VP-5-02"],
        repeated,
    ),
    Check::new(
        "vpci.relations.at-d0-entry",
        "BUS_D0ENTRY sends the list again, ahead of its completion.",
        &["VP-5-04", "VP-5-02"],
        at_d0_entry,
    ),
    Check::new(
        "vpci.relations.eight-functions",
        "A bus of eight functions lists each with its slot and serial number.",
        &["VP-3.2-01", "VP-5-02", "VP-4-05"],
        eight_functions,
    ),
    Check::new(
        "vpci.relations.like-config-space",
        "A description says what the function's configuration space says.",
        &["VP-6-07", "VP-6-09", "VP-6-13", "VP-4-30"],
        like_config_space,
    ),
];

/// The packet that answers QUERY_BUS_RELATIONS.
fn query(bus: &Bus) -> Result<Vec<u8>, crate::check::Failure> {
    bus.send(&Bytes::words(&[message::QUERY_BUS_RELATIONS]).0)?;
    let mut packets = bus.channel().receive()?;
    equal("packets that answer", packets.len(), 1)?;
    let packet = packets.remove(0);
    equal("flags of the packet", packet.flags, 0)?;
    equal("transaction id of the packet", packet.id, 0)?;
    Ok(packet.payload)
}

fn before_d0(context: &Context) -> Verdict {
    for version in versions() {
        let bus = negotiated(context, version)?;
        let payload = query(&bus)?;
        equal("functions", u32_at(&payload, 4), 1)?;
        // It stays so with a completion asked for, which is then sent too.
        let request = Bytes::words(&[message::QUERY_BUS_RELATIONS]);
        let reply = bus.request(&request.0)?;
        equal("status", reply.status, nt::SUCCESS)?;
        equal(
            "the list beside the completion",
            reply.unsolicited,
            vec![payload],
        )?;
    }
    Ok(())
}

/// The 20 bytes that `testdev` is described by.
fn testdev(slot: u32, serial: u32) -> Vec<u8> {
    Bytes::new()
        .u16(0x1234)
        .u16(0x5650)
        .bytes(&[1, 0, 0, 0xff])
        .u16(0x1234)
        .u16(0x5650)
        .u32(slot)
        .u32(serial)
        .0
}

fn first_form(context: &Context) -> Verdict {
    for version in [0x1_0001, 0x1_0002] {
        let payload = query(&negotiated(context, version)?)?;
        equal("message", u32_at(&payload, 0), message::BUS_RELATIONS)?;
        equal("functions", u32_at(&payload, 4), 1)?;
        equal("description", &payload[8..28], &testdev(0, 0))?;
        equal("padding", &payload[28..], &[0; 4])?;
    }
    Ok(())
}

fn second_form(context: &Context) -> Verdict {
    for version in [0x1_0003, 0x1_0004] {
        let payload = query(&negotiated(context, version)?)?;
        equal("message", u32_at(&payload, 0), message::BUS_RELATIONS2)?;
        equal("functions", u32_at(&payload, 4), 1)?;
        equal("description", &payload[8..28], &testdev(0, 0))?;
        equal("flags, node and reserved bytes", &payload[28..36], &[0; 8])?;
        equal("padding", &payload[36..], &[0; 4])?;
    }
    Ok(())
}

fn repeated(context: &Context) -> Verdict {
    let bus = negotiated(context, 0x1_0004)?;
    let first = query(&bus)?;
    equal("the list again", query(&bus)?, first.clone())?;
    equal("status of D0", bus.d0_entry(bus.window())?, nt::SUCCESS)?;
    equal("the list in D0", query(&bus)?, first.clone())?;
    equal("status", bus.assigned(0)?, nt::SUCCESS)?;
    equal(
        "the list with resources assigned",
        query(&bus)?,
        first.clone(),
    )?;
    bus.released(0)?;
    equal(
        "the list with resources released",
        query(&bus)?,
        first.clone(),
    )?;
    equal("status of D0 exit", bus.d0_exit()?, nt::SUCCESS)?;
    equal("the list after D0", query(&bus)?, first)
}

fn at_d0_entry(context: &Context) -> Verdict {
    let bus = negotiated(context, 0x1_0004)?;
    let list = query(&bus)?;
    let request = Bytes::words(&[message::BUS_D0ENTRY, 0]).u64(bus.window());
    bus.channel()
        .send(&crate::model::ring::Packet::request(9, &request.0))?;
    let packets = bus.channel().receive()?;
    let ids: Vec<u64> = packets.iter().map(|packet| packet.id).collect();
    equal("transaction ids of what came, in order", ids, vec![0, 9])?;
    equal("the list", packets[0].payload.clone(), list)?;
    equal("status", u32_at(&packets[1].payload, 0), nt::SUCCESS)
}

fn eight_functions(context: &Context) -> Verdict {
    let bus = bus_with(context, (0..8).map(FunctionSetup::testdev).collect())?;
    let found = bus.relations()?;
    equal("number of functions", found.len(), 8)?;
    for (number, function) in (0..8).zip(found) {
        let raw = testdev(slot(number), number.into());
        equal(format!("description {number}"), &function.raw[..20], &raw)?;
    }
    Ok(())
}

fn like_config_space(context: &Context) -> Verdict {
    let device = Plain::wide();
    let bus = bus_with(context, vec![device.function(0)])?;
    let raw = bus.relations()?.remove(0).raw;
    for (at, offset, width) in [(0, 0, 2), (2, 2, 2), (8, 0x2c, 2), (10, 0x2e, 2)] {
        let what = format!("word {offset:#x} of configuration space");
        equal(what, bus.config(0, offset, width)?, u16_at(&raw, at).into())?;
    }
    equal(
        "revision and class",
        bus.config(0, 8, 4)?,
        u32_at(&raw, 4).into(),
    )?;
    equal("revision and class", u32_at(&raw, 4), 0xff22_335a)?;
    equal("serial number", u32_at(&raw, 16), 0xc0ff_ee01)
}
