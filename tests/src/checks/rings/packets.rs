//! Packets in both directions.
#![forbid(unsafe_code)]

use super::{answered, negotiated, put, ready, request, works};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::host::{BusSetup, FunctionSetup, Setup};
use crate::model::kernel::Kernel;
use crate::model::ring::{COMPLETION, COMPLETION_REQUESTED, IN_BAND, Packet};
use crate::model::vmbus::VmBus;
use crate::model::vpci::{message, nt};
use crate::model::wire::{Bytes, u32_at};

/// Packet type: transfer pages.
const TRANSFER_PAGES: u16 = 7;
/// Packet type: GPA-direct.
const GPA_DIRECT: u16 = 9;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "rings.packet.wrap",
        "Packets wrap at every place in the smallest rings, in both directions.",
        &["VB-7.2-08", "VB-7.2-03", "VB-7.2-07", "VB-7.1-07"],
        wrap,
    ),
    Check::new(
        "rings.packet.completion",
        "A completion has type 0xB, no flags, the request's id, zero padding and its offset.",
        &[
            "VB-7.2-01",
            "VB-7.2-02",
            "VB-7.2-03",
            "VB-7.2-04",
            "VB-7.2-05",
            "VB-7.2-06",
            "VB-7.2-07",
            "VB-7.2-10",
            "VB-7.2-14",
        ],
        completion,
    ),
    Check::new(
        "rings.packet.unsolicited",
        "A packet that the host sends by itself is in-band, with id 0 and no flags.",
        &["VB-7.2-11", "VB-7.2-04", "VB-7.2-12"],
        unsolicited,
    ),
    Check::new(
        "rings.packet.transaction-ids",
        "Any transaction id comes back, also one that is outstanding twice.",
        &["VB-7.2-05", "VB-7.2-10", "VB-7.2-11"],
        transaction_ids,
    ),
    Check::new(
        "rings.packet.completion-when-asked",
        "Requests with the flag get one completion, those without it none.",
        &["VB-7.2-04", "VB-7.2-10"],
        completion_when_asked,
    ),
    Check::new(
        "rings.packet.payload-offset",
        "The payload begins where the descriptor says.",
        &["VB-7.2-02", "VB-8-03"],
        payload_offset,
    ),
    Check::new(
        "rings.packet.padding",
        "A payload longer than its message counts as the message.",
        &["VB-7.2-09"],
        padding,
    ),
    Check::new(
        "rings.packet.longest",
        "A packet as long as the ring takes is read whole; one too long for the device is refused.",
        &["VB-8-06", "VB-7.1-08", "VB-7.2-08"],
        longest,
    ),
    Check::new(
        "rings.packet.full-ring",
        "A ring that the guest has filled up to 8 bytes is answered whole.",
        &["VB-7.1-08", "VB-7.3-10"],
        full_ring,
    ),
    Check::new(
        "rings.packet.other-types",
        "Well-formed packets of types that vPCI does not use are refused, and the ring goes on.",
        &["VB-7.2-01", "VB-7.2-13"],
        other_types,
    ),
    Check::new(
        "rings.packet.guest-completions",
        "A completion for which the host did not ask is read and not answered.",
        &["VB-7.2-10", "VB-7.2-01"],
        guest_completions,
    ),
    Check::new(
        "rings.packet.host-packet-size",
        "The host's longest message has at most 4096 bytes and fits the smallest ring.",
        &["VB-7.2-12", "VB-8-05"],
        host_packet_size,
    ),
];

fn wrap(context: &Context) -> Verdict {
    let channel = ready(context, 2)?;
    let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0];
    for id in 1..=700u64 {
        // 32 to 112 bytes, so that packets begin and end everywhere.
        let len = 8 + 8 * (id as usize % 11);
        let payload = Bytes::words(&words).up_to(len);
        channel.send(&Packet::request(id, &payload.0))?;
        answered(&channel, [id])?;
    }
    Ok(())
}

fn completion(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    // What lay in the ring before must not show.
    let ring = &channel.to_guest;
    let index = ring.load(0)?;
    ring.put(index, &vec![0xee; 4096])?;
    // Refused: the status is all there is, and four bytes of padding.
    let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0xffff];
    channel.send(&Packet::request(
        0x1122_3344_5566_7788,
        &Bytes::words(&words).0,
    ))?;
    channel.vmbus().vm().settle();
    let raw = ring.get(index, 32)?;
    let expected = Bytes::new()
        .u16(COMPLETION)
        .u16(2)
        .u16(3)
        .u16(0)
        .u64(0x1122_3344_5566_7788)
        .u32(nt::BAD_DATA)
        .u32(0)
        .u32(0)
        .u32(index);
    equal("bytes in the ring", &raw, &expected.0)?;
    equal("write index", ring.load(0)?, index + 32)?;
    equal("packets", channel.receive()?.len(), 1)
}

fn unsolicited(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    let ring = &channel.to_guest;
    ring.put(ring.load(0)?, &vec![0xee; 4096])?;
    let request = Bytes::words(&[message::QUERY_BUS_RELATIONS]);
    channel.send(&Packet::new(IN_BAND, 0, 5, &request.0))?;
    let packets = channel.receive()?;
    equal("packets", packets.len(), 1)?;
    let packet = &packets[0];
    let fields = (packet.kind, packet.offset8, packet.flags, packet.id);
    equal("type, offset8, flags and id", fields, (IN_BAND, 2, 0, 0))?;
    // 36 bytes: one function of 28 behind the head.
    equal("payload", packet.payload.len(), 40)?;
    equal("padding", u32_at(&packet.payload, 36), 0)
}

fn transaction_ids(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    let ids = [0, 1, 64, 7, 7, 1 << 32, u64::MAX, u64::MAX - 1, 7];
    for id in ids {
        channel.send(&request(id))?;
    }
    answered(&channel, ids)
}

fn completion_when_asked(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0];
    for id in 1..=40 {
        let flags = if id % 3 == 0 { COMPLETION_REQUESTED } else { 0 };
        put(
            &channel,
            &Packet::new(IN_BAND, flags, id, &Bytes::words(&words).0),
        )?;
    }
    channel.signal()?;
    answered(&channel, (1..=40).filter(|id| id % 3 == 0))
}

fn payload_offset(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    for offset8 in [2, 3, 4, 10, 200] {
        let junk = vec![0x77; (offset8 - 2) * 8];
        let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0];
        let payload = Bytes::new().bytes(&junk).bytes(&Bytes::words(&words).0);
        let packet = Packet {
            offset8: offset8 as u16,
            ..Packet::request(offset8 as u64, &payload.0)
        };
        channel.send(&packet)?;
        let done = answered(&channel, [offset8 as u64]);
        done.map_err(|failure| failure.during(format!("offset8 {offset8}")))?;
    }
    Ok(())
}

fn padding(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    for len in [8, 16, 24, 1000, 4000] {
        let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0];
        let payload = Bytes::words(&words).bytes(&vec![0xcc; 4000]).up_to(len);
        channel.send(&Packet::request(len as u64, &payload.0))?;
        answered(&channel, [len as u64])?;
    }
    Ok(())
}

/// Sends a request of this many bytes of payload; returns the status of its completion.
fn status_of(channel: &crate::model::vmbus::Channel, len: usize) -> Result<u32, Failure> {
    let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0];
    channel.send(&Packet::request(9, &Bytes::words(&words).up_to(len).0))?;
    let packets = channel.receive()?;
    equal(format!("completions for {len} bytes"), packets.len(), 1)?;
    equal("id of the completion", packets[0].id, 9)?;
    Ok(u32_at(&packets[0].payload, 0))
}

fn longest(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    equal(
        "status of 4080 bytes",
        status_of(&channel, 4080)?,
        nt::SUCCESS,
    )?;
    let most = channel.to_host.size() as usize - 8 - 24;
    for len in [4088, 8192, most] {
        let status = status_of(&channel, len)?;
        equal(format!("status of {len} bytes"), status, nt::BAD_DATA)?;
        works(&channel)?;
    }
    Ok(())
}

fn full_ring(context: &Context) -> Verdict {
    let channel = ready(context, 2)?;
    for round in 0..3 {
        let mut count = 0;
        while channel.to_host.free()? > super::REQUEST {
            put(&channel, &request(round * 1000 + count))?;
            count += 1;
        }
        channel.signal()?;
        answered(&channel, round * 1000..round * 1000 + count)?;
    }
    Ok(())
}

fn other_types(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    for kind in [TRANSFER_PAGES, GPA_DIRECT] {
        let ranges = Bytes::words(&[0xdead_beef, 1, 4096, 0]).u64(0x100);
        let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0];
        let payload = ranges.bytes(&Bytes::words(&words).0);
        let packet = Packet {
            offset8: 5,
            ..Packet::new(kind, COMPLETION_REQUESTED, kind.into(), &payload.0)
        };
        channel.send(&packet)?;
        let packets = channel.receive()?;
        let ids: Vec<u64> = packets.iter().map(|packet| packet.id).collect();
        equal(
            format!("completions of type {kind}"),
            ids,
            vec![kind.into()],
        )?;
        let status = u32_at(&packets[0].payload, 0);
        holds(
            format!("status {status:#x} is a failure"),
            status >> 30 == 3,
        )?;
        works(&channel)?;
    }
    Ok(())
}

fn guest_completions(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    for flags in [0, COMPLETION_REQUESTED] {
        let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0];
        let packet = Packet::new(COMPLETION, flags, 1, &Bytes::words(&words).0);
        channel.send(&packet)?;
        equal("packets of the host", channel.receive()?.len(), 0)?;
        works(&channel)?;
    }
    Ok(())
}

fn host_packet_size(context: &Context) -> Verdict {
    let setup = Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: (0..8).map(FunctionSetup::testdev).collect(),
        }],
        ..Setup::default()
    };
    let vmbus = VmBus::connect(&Kernel::boot(&context.machine(&setup)?)?)?;
    let offer = vmbus.only_offer()?;
    let channel = negotiated(vmbus.open_sized(&offer, 2, 0)?)?;
    // The model refuses packets of more than 4096 bytes.
    for _ in 0..30 {
        let request = Bytes::words(&[message::QUERY_BUS_RELATIONS]);
        channel.send(&Packet::new(IN_BAND, 0, 0, &request.0))?;
        let packets = channel.receive()?;
        equal("packets", packets.len(), 1)?;
        equal("functions", u32_at(&packets[0].payload, 4), 8)?;
        equal("payload", packets[0].payload.len(), 232)?;
    }
    Ok(())
}
