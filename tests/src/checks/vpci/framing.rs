//! Packets: what is answered, how often, in which order (docs/spec/vpci.md, section 3), and what
//! is malformed (section 11).
#![forbid(unsafe_code)]

use super::{in_d0, versions};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::host::{BusSetup, Setup};
use crate::model::kernel::Kernel;
use crate::model::ring::{COMPLETION, COMPLETION_REQUESTED, IN_BAND, Packet};
use crate::model::vmbus::VmBus;
use crate::model::vpci::{Bus, Create, VERSIONS, message, nt};
use crate::model::wire::{Bytes, u32_at};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vpci.framing.one-completion",
        "Any message that asks for a completion gets exactly one, never an empty one.",
        &["VP-3-01", "VP-3-02", "VP-3-03"],
        one_completion,
    ),
    Check::new(
        "vpci.framing.no-completion",
        "A message that asks for no completion gets none.",
        &["VP-3-02", "VP-3-01"],
        no_completion,
    ),
    Check::new(
        "vpci.framing.order",
        "64 requests sent at once are answered in their order.",
        &["VP-3-06", "VP-1-05"],
        order,
    ),
    Check::new(
        "vpci.framing.transaction-ids",
        "A completion has its request's transaction id, whatever that is.",
        &["VP-11-13", "VP-3-01"],
        transaction_ids,
    ),
    Check::new(
        "vpci.framing.longer-payloads",
        "A payload that is longer than its message is good.",
        &["VP-3-05"],
        longer,
    ),
    Check::new(
        "vpci.framing.truncated",
        "A payload that is shorter than its message is malformed and does nothing.",
        &["VP-11-02", "VP-3-07", "VP-3-08"],
        truncated,
    ),
    Check::new(
        "vpci.framing.oversized",
        "A packet longer than any message is answered with a failure; the channel goes on.",
        &["VP-11-02"],
        oversized,
    ),
    Check::new(
        "vpci.framing.unknown-messages",
        "Messages that do not exist, and those of the host, are malformed.",
        &["VP-3-07", "VP-3.1-01", "VP-3.1-18"],
        unknown_messages,
    ),
    Check::new(
        "vpci.framing.other-packet-types",
        "A packet of another type is answered with a failure, and a completion not at all.",
        &["VP-3-01", "VP-3-02"],
        other_types,
    ),
    Check::new(
        "vpci.framing.reply-sizes",
        "Replies whose size a guest checks first have that size.",
        &["VP-3-04", "VP-4-07", "VP-4-18"],
        reply_sizes,
    ),
    Check::new(
        "vpci.framing.guest-does-not-read",
        "Requests of a guest that reads no answer wait; once it reads, each is answered.",
        &["VP-11-16"],
        guest_does_not_read,
    ),
    Check::new(
        "vpci.framing.stall-of-one-bus",
        "A bus whose guest reads no answer does not hold up another bus.",
        &["VP-11-16"],
        stall_of_one_bus,
    ),
];

/// Every message that there is, one that is not, and payloads of zeros behind them.
fn anything() -> impl Iterator<Item = Vec<u8>> {
    // A D0 entry of the window 0 is refused, the exit goes last.
    let numbers = (0..=0x1e).filter(|number| *number != 8).chain([8]);
    numbers.map(|number| Bytes::words(&[message::BASE + number]).up_to(256).0)
}

fn one_completion(context: &Context) -> Verdict {
    for version in versions() {
        let vm = context.usual()?;
        let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
        let bus = Bus::probe(&vmbus, &vmbus.only_offer()?, version)?;
        for request in anything() {
            let number = u32_at(&request, 0) & 0xff;
            // This counts completions, compares ids and flags, and looks for empty packets.
            let reply = bus.request(&request);
            let reply = reply.map_err(|failure| {
                failure.during(format!("version {version:#x}, message {number:#x}"))
            })?;
            let beside = usize::from(number == 1);
            let what = format!("packets beside the completion of message {number:#x}");
            equal(what, reply.unsolicited.len(), beside)?;
        }
    }
    Ok(())
}

fn no_completion(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for request in anything() {
        let number = u32_at(&request, 0) & 0xff;
        bus.send(&request)?;
        let kinds: Vec<u16> = bus.channel().receive()?.iter().map(|p| p.kind).collect();
        let relations = if number == 1 { vec![IN_BAND] } else { vec![] };
        equal(format!("packets for message {number:#x}"), kinds, relations)?;
    }
    Ok(())
}

/// Sends packets at once, and returns what came: types, ids, first words.
fn batch(bus: &Bus, packets: &[Packet]) -> Result<Vec<(u16, u64, u32)>, Failure> {
    for packet in packets {
        bus.channel().send(packet)?;
    }
    let came = bus.channel().receive()?;
    Ok(came
        .iter()
        .map(|packet| (packet.kind, packet.id, u32_at(&packet.payload, 0)))
        .collect())
}

fn order(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let packets: Vec<_> = (1..=64)
        .map(|id| {
            let slot = if id % 3 == 0 { 0x40 } else { 0 };
            let words = [message::QUERY_RESOURCE_REQUIREMENTS, slot];
            Packet::request(id, &Bytes::words(&words).0)
        })
        .collect();
    let status = |id| {
        if id % 3 == 0 {
            nt::BAD_DATA
        } else {
            nt::SUCCESS
        }
    };
    let expected: Vec<_> = (1..=64).map(|id| (COMPLETION, id, status(id))).collect();
    equal("what answers 64 requests", batch(&bus, &packets)?, expected)
}

fn transaction_ids(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let ids = [0, 7, 7, u64::MAX, 1 << 63, 0, 65, 0xdead_beef_0000_0001];
    let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0];
    let packets = ids.map(|id| Packet::request(id, &Bytes::words(&words).0));
    let expected: Vec<_> = ids.map(|id| (COMPLETION, id, nt::SUCCESS)).into();
    equal("what answers", batch(&bus, &packets)?, expected)
}

/// A good request of each kind, and its length.
fn good(bus: &Bus) -> Vec<(&'static str, Vec<u8>)> {
    let words = |words: &[u32]| Bytes::words(words).0;
    let window = Bytes::words(&[message::BUS_D0ENTRY, 0]).u64(bus.window());
    let delete = Bytes::words(&[message::DELETE_INTERRUPT, 0]).u16(0).u16(1);
    vec![
        (
            "QUERY_RESOURCE_REQUIREMENTS",
            words(&[message::QUERY_RESOURCE_REQUIREMENTS, 0]),
        ),
        (
            "GET_RESOURCES",
            words(&[message::GET_RESOURCES, 0, 0, 0, 0, 0, 0, 0]),
        ),
        ("BUS_D0ENTRY", window.0),
        (
            "POWER_STATE_CHANGE",
            words(&[message::POWER_STATE_CHANGE, 0, 1, 0]),
        ),
        (
            "RESOURCES_ASSIGNED",
            Bytes::words(&[message::RESOURCES_ASSIGNED, 0]).up_to(136).0,
        ),
        (
            "RESOURCES_ASSIGNED2",
            Bytes::words(&[message::RESOURCES_ASSIGNED2, 0])
                .up_to(136)
                .0,
        ),
        (
            "RESOURCES_ASSIGNED3",
            Bytes::words(&[message::RESOURCES_ASSIGNED3, 0])
                .up_to(136)
                .0,
        ),
        (
            "RESOURCES_RELEASED",
            words(&[message::RESOURCES_RELEASED, 0]),
        ),
        ("EJECTION_COMPLETE", words(&[message::EJECTION_COMPLETE, 0])),
        (
            "CREATE_INTERRUPT",
            Create::one(0, 0x60, 0).encode(0x1_0001).0,
        ),
        (
            "CREATE_INTERRUPT2",
            Create::one(0, 0x60, 0).encode(0x1_0002).0,
        ),
        (
            "CREATE_INTERRUPT3",
            Create::one(0, 0x60, 0).encode(0x1_0004).0,
        ),
        ("DELETE_INTERRUPT", delete.u32(0x99).u64(0xfee0_0000).0),
    ]
}

fn longer(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for (name, request) in good(&bus) {
        for extra in [0, 8, 64, 1024] {
            let longer = Bytes(request.clone()).up_to(request.len() + extra);
            let what = format!("status of {name} with {extra} bytes more");
            let expected = match name {
                // Its reply begins with version and revision instead of a status.
                "GET_RESOURCES" => 0x1_0001,
                _ => nt::SUCCESS,
            };
            equal(what, bus.request(&longer.0)?.status, expected)?;
        }
    }
    Ok(())
}

fn truncated(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    bus.must_create(&Create::one(0, 0x60, 0))?;
    for (name, request) in good(&bus) {
        for len in (0..request.len()).step_by(8) {
            let reply = bus.request(&request[..len])?;
            let what = format!("status of {name} cut to {len} bytes");
            equal(what, reply.status, nt::BAD_DATA)?;
        }
    }
    let next = bus.must_create(&Create::one(0, 0x60, 0))?;
    equal("data of the next message", next.data, 1)?;
    equal("the vendor id", bus.config(0, 0, 2)?, 0x1234)
}

fn oversized(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    for len in [4096, 4104, 8192, 12_000] {
        let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0];
        let request = Bytes::words(&words).up_to(len);
        let status = bus.request(&request.0)?.status;
        holds(
            format!("{len} bytes get a failure, not {status:#x}"),
            status & 1 << 31 != 0,
        )?;
        bus.requirements(0)?;
    }
    // The longest that there can be: a packet of 4096 bytes.
    let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0];
    let longest = Bytes::words(&words).up_to(4096 - 16);
    equal(
        "status of a packet of 4096 bytes",
        bus.request(&longest.0)?.status,
        nt::SUCCESS,
    )
}

fn unknown_messages(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let hosts = [0x00, 0x02, 0x03, 0x0b, 0x12, 0x19].map(|number| message::BASE + number);
    let unknown = [
        0,
        1,
        0x4248_ffff,
        0x4249_001e,
        0x4249_00ff,
        0x424a_0001,
        u32::MAX,
    ];
    for number in hosts.into_iter().chain(unknown) {
        let request = Bytes::words(&[number, 0]).up_to(128);
        let what = format!("status of message {number:#x}");
        equal(what, bus.request(&request.0)?.status, nt::BAD_DATA)?;
    }
    equal("the vendor id", bus.config(0, 0, 2)?, 0x1234)
}

fn other_types(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0];
    let payload = Bytes::words(&words).0;
    // Transfer pages, GPADL, GPA direct: what follows the descriptor in them is skipped.
    for (kind, offset8) in [(7, 3), (8, 2), (9, 3)] {
        for (flags, expected) in [
            (COMPLETION_REQUESTED, vec![(COMPLETION, 5, nt::BAD_DATA)]),
            (0, vec![]),
        ] {
            let packet = Packet {
                offset8,
                ..Packet::new(kind, flags, 5, &payload.repeat(2))
            };
            let what = format!("what answers a packet of type {kind:#x}, flags {flags}");
            equal(what, batch(&bus, &[packet])?, expected)?;
        }
    }
    for flags in [0, COMPLETION_REQUESTED] {
        let packet = Packet::new(COMPLETION, flags, 5, &payload);
        equal("what answers a completion", batch(&bus, &[packet])?, vec![])?;
    }
    bus.requirements(0)?;
    Ok(())
}

fn reply_sizes(context: &Context) -> Verdict {
    for version in VERSIONS {
        let vm = context.usual()?;
        let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
        let bus = Bus::probe(&vmbus, &vmbus.only_offer()?, version)?;
        // Both look at the size: 28 bytes and 24.
        bus.requirements(0)?;
        bus.must_create(&Create::one(0, 0x60, 0))?;
    }
    Ok(())
}

/// Sends requests until there is no room for one, and returns how many that were.
fn fill(bus: &Bus) -> Result<u64, Failure> {
    let words = [message::GET_RESOURCES, 0, 0, 0, 0, 0, 0, 0];
    let payload = Bytes::words(&words).0;
    let mut sent = 0;
    loop {
        let Some(signal) = bus
            .channel()
            .to_host
            .send(&Packet::request(sent, &payload))?
        else {
            return Ok(sent);
        };
        sent += 1;
        if signal {
            equal("status of HvSignalEvent", bus.channel().signal()?, 0)?;
        }
        if sent % 16 == 0 {
            bus.vm().settle();
        }
    }
}

fn all_answered(bus: &Bus, sent: u64) -> Verdict {
    let mut ids = Vec::new();
    for packet in bus.channel().receive()? {
        equal("type of an answer", packet.kind, COMPLETION)?;
        ids.push(packet.id);
    }
    equal("answers", ids, (0..sent).collect())
}

fn guest_does_not_read(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let sent = fill(&bus)?;
    bus.vm().settle();
    let free = bus.channel().to_guest.free()?;
    holds(
        format!("the ring to the guest has less than a page left, not {free:#x}"),
        free < 0x1800,
    )?;
    all_answered(&bus, sent)?;
    bus.requirements(0)?;
    Ok(())
}

fn stall_of_one_bus(context: &Context) -> Verdict {
    let vm = context.machine(&Setup {
        buses: vec![BusSetup::testdev(1), BusSetup::testdev(2)],
        ..Setup::default()
    })?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let mut buses = Vec::new();
    for offer in vmbus.offers()? {
        buses.push(Bus::probe(&vmbus, &offer, VERSIONS[0])?);
    }
    let sent = fill(&buses[0])?;
    for _ in 0..20 {
        buses[1].requirements(0)?;
    }
    // Nor does it hold up its own configuration space.
    equal("the vendor id", buses[0].config(0, 0, 2)?, 0x1234)?;
    all_answered(&buses[0], sent)
}
