//! The two rings of a channel (docs/spec/vmbus.md, sections 7 and 8).
//!
//! What answers is a virtual PCI bus: QUERY_RESOURCE_REQUIREMENTS takes 32 bytes of the
//! guest-to-host ring, and its completion 56 bytes of the host-to-guest ring.
#![forbid(unsafe_code)]

use crate::check::{Check, Context, Failure, Verdict, equal};
use crate::model::kernel::{Kernel, VMBUS_SINT};
use crate::model::ring::{COMPLETION, Packet};
use crate::model::vmbus::{Channel, Offer, VmBus};
use crate::model::vpci::{Bus, VERSIONS, message, nt};
use crate::model::wire::{Bytes, u32_at};

mod corrupt;
mod open;
mod packets;
mod signals;

/// All checks of this area.
pub const CHECKS: [&[Check]; 4] = [
    open::CHECKS,
    packets::CHECKS,
    signals::CHECKS,
    corrupt::CHECKS,
];

/// Bytes of [`request`] in the ring.
const REQUEST: u32 = 32;

/// A request that succeeds in every state of a bus.
fn request(id: u64) -> Packet {
    let words = [message::QUERY_RESOURCE_REQUIREMENTS, 0];
    Packet::request(id, &Bytes::words(&words).0)
}

/// A guest in contact on the usual machine, and its offer.
fn offered(context: &Context) -> Result<(VmBus, Offer), Failure> {
    let vmbus = VmBus::connect(&Kernel::boot(&context.usual()?)?)?;
    let offer = vmbus.only_offer()?;
    Ok((vmbus, offer))
}

/// Agrees on a version on a channel that was just opened, and leaves it quiet.
fn negotiated(channel: Channel) -> Result<Channel, Failure> {
    let status = Bus::new(channel.clone(), 0).negotiate(VERSIONS[0])?;
    equal("status of QUERY_PROTOCOL_VERSION", status, nt::SUCCESS)?;
    channel.interrupted()?;
    Ok(channel)
}

/// A quiet channel with rings of `pages` pages each.
fn ready(context: &Context, pages: u64) -> Result<Channel, Failure> {
    let (vmbus, offer) = offered(context)?;
    negotiated(vmbus.open_sized(&offer, pages, 0)?)
}

/// Opens the channel again after it was closed.
fn reopened(channel: &Channel) -> Result<Channel, Failure> {
    channel.close()?;
    negotiated(channel.vmbus().open(&channel.offer)?)
}

/// Puts a packet into the guest-to-host ring, for which there must be room. Does not signal.
fn put(channel: &Channel, packet: &Packet) -> Result<bool, Failure> {
    match channel.to_host.send(packet)? {
        Some(wanted) => Ok(wanted),
        None => Err(Failure::Host("the ring has no room".into())),
    }
}

/// Everything that the host has sent are successful completions of these requests, in this order.
fn answered(channel: &Channel, ids: impl IntoIterator<Item = u64>) -> Verdict {
    let mut got = Vec::new();
    for packet in channel.receive()? {
        equal("type of a packet", packet.kind, COMPLETION)?;
        equal(
            "status of a completion",
            u32_at(&packet.payload, 0),
            nt::SUCCESS,
        )?;
        got.push(packet.id);
    }
    equal("ids of the completions", got, ids.into_iter().collect())
}

/// The channel works: a request is answered.
fn works(channel: &Channel) -> Verdict {
    channel.send(&request(0xabc))?;
    answered(channel, [0xabc])
}

/// Takes the channel's event flag without waiting for the host.
fn take_event(channel: &Channel) -> Result<bool, Failure> {
    let synic = channel.vmbus().kernel().synic(channel.vp);
    synic.take_event(VMBUS_SINT, channel.offer.relid as u16)
}
