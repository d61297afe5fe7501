//! Rings that break the rules (docs/spec/vmbus.md, section 8).
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{negotiated, offered, put, ready, reopened, request, works};
use crate::check::{Check, Context, Failure, Verdict, equal};
use crate::host::{BusSetup, Setup};
use crate::model::kernel::Kernel;
use crate::model::ring::{
    COMPLETION_REQUESTED, IN_BAND, INTERRUPT_MASK, PENDING_SEND_SIZE, Packet, READ_INDEX,
    WRITE_INDEX,
};
use crate::model::vmbus::{Channel, Contact, VERSIONS, VmBus};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "rings.corrupt.descriptor",
        "Each impossible descriptor stops the ring: nothing is answered until it is opened anew.",
        &["VB-8-03", "VB-8-07", "VB-8-09", "VB-7.2-13"],
        descriptor,
    ),
    Check::new(
        "rings.corrupt.truncated",
        "A packet or a descriptor that ends behind the write index stops the ring.",
        &["VB-8-03", "VB-8-04", "VB-8-09"],
        truncated,
    ),
    Check::new(
        "rings.corrupt.write-index",
        "A write index outside the data area, or not a multiple of 8, stops the ring.",
        &["VB-8-02", "VB-8-09", "VB-7.1-07"],
        write_index,
    ),
    Check::new(
        "rings.corrupt.write-index-backwards",
        "A write index that goes back behind what was read stops the ring.",
        &["VB-8-02", "VB-8-09"],
        write_index_backwards,
    ),
    Check::new(
        "rings.corrupt.read-index",
        "A read index that is no place of the host's packets stops the ring.",
        &["VB-8-02", "VB-8-09"],
        read_index,
    ),
    Check::new(
        "rings.corrupt.host-indices",
        "What the guest stores over the host's own indices does not matter to the host.",
        &["VB-8-02", "VB-7.1-01", "VB-7.1-02"],
        host_indices,
    ),
    Check::new(
        "rings.corrupt.packets-before",
        "Packets before the one that is malformed are answered.",
        &["VB-8-09"],
        packets_before,
    ),
    Check::new(
        "rings.corrupt.only-its-channel",
        "A corrupt ring leaves the other channels and the control messages alone.",
        &["VB-8-09"],
        only_its_channel,
    ),
    Check::new(
        "rings.corrupt.unload-and-contact",
        "A corrupt ring does not hold up UNLOAD or a new contact.",
        &["VB-8-09", "VB-8-14"],
        unload_and_contact,
    ),
    Check::new(
        "rings.corrupt.removed",
        "A bus with a corrupt ring can be taken away.",
        &["VB-8-09"],
        removed,
    ),
    Check::new(
        "rings.corrupt.words-changing-under-the-reader",
        "Words of a ring that change while the host reads harm nobody.",
        &["VB-8-01", "VB-8-02", "VB-8-12", "VB-8-17"],
        changing,
    ),
];

/// Signals, and demands that the host answers nothing, now or to requests that follow.
fn stopped(channel: &Channel) -> Verdict {
    let (vm, ring) = (channel.vmbus().vm(), &channel.to_guest);
    channel.signal()?;
    vm.settle();
    let before = ring.load(WRITE_INDEX)?;
    // The rest of the ring is as a guest without malice would fill it.
    let write = channel.to_host.load(READ_INDEX)?;
    channel
        .to_host
        .put(write, &request(1).encode().u64(u64::from(write) << 32).0)?;
    channel
        .to_host
        .store(WRITE_INDEX, (write + 32) % channel.to_host.size())?;
    for _ in 0..20 {
        channel.signal()?;
    }
    vm.settle();
    equal("write index of the host", ring.load(WRITE_INDEX)?, before)?;
    equal("packets of the host", ring.receive()?, None)
}

/// Does harm to a fresh channel, demands that it is stopped, and goes on with one opened anew.
fn each(context: &Context, cases: impl IntoIterator<Item = (String, Harm)>) -> Verdict {
    let mut channel = ready(context, 5)?;
    for (what, harm) in cases {
        let course = |failure: Failure| failure.during(&what);
        harm(&channel).map_err(course)?;
        stopped(&channel).map_err(course)?;
        channel = reopened(&channel).map_err(course)?;
        works(&channel).map_err(course)?;
    }
    Ok(())
}

type Harm = Box<dyn Fn(&Channel) -> Verdict>;

fn descriptor(context: &Context) -> Verdict {
    let good = request(5);
    let with = |change: fn(&mut Packet)| {
        let mut packet = good.clone();
        change(&mut packet);
        packet
    };
    let mut bad = vec![
        with(|packet| packet.offset8 = 0),
        with(|packet| packet.offset8 = 1),
        with(|packet| packet.len8 = 0),
        with(|packet| packet.len8 = 1),
        with(|packet| packet.offset8 = 4),
        with(|packet| packet.offset8 = u16::MAX),
        with(|packet| packet.len8 = 4),
        with(|packet| packet.len8 = 0x7ff),
        with(|packet| packet.len8 = 0x800),
        with(|packet| packet.len8 = u16::MAX),
        with(|packet| (packet.offset8, packet.len8) = (u16::MAX, u16::MAX)),
        with(|packet| packet.flags = 2),
        with(|packet| packet.flags = 0x8001),
        with(|packet| packet.flags = u16::MAX),
    ];
    for kind in [0, 1, 2, 3, 4, 5, 10, 12, 13, 0x106, 0xff, u16::MAX] {
        bad.push(Packet::new(kind, COMPLETION_REQUESTED, 5, &good.payload));
    }
    // Ranges are part of the descriptor of these.
    for kind in [7, 9] {
        bad.push(Packet::new(kind, COMPLETION_REQUESTED, 5, &good.payload));
    }
    each(
        context,
        bad.into_iter().map(|packet| {
            let Packet {
                kind,
                offset8,
                len8,
                flags,
                ..
            } = packet;
            let what = format!("type {kind}, offset8 {offset8}, len8 {len8}, flags {flags:#x}");
            let harm: Harm = Box::new(move |channel| put(channel, &packet).map(drop));
            (what, harm)
        }),
    )
}

fn truncated(context: &Context) -> Verdict {
    let cases = [8u32, 16, 24].map(|bytes| {
        let harm: Harm = Box::new(move |channel| {
            let start = channel.to_host.load(WRITE_INDEX)?;
            channel
                .to_host
                .put(start, &request(5).encode().up_to(32).0)?;
            channel.to_host.store(WRITE_INDEX, start + bytes)
        });
        (format!("{bytes} of 32 bytes"), harm)
    });
    each(context, cases)
}

fn write_index(context: &Context) -> Verdict {
    let bad = [
        1,
        4,
        0x24,
        0x4000,
        0x4008,
        0x7fff_fff8,
        0x8000_0000,
        0xffff_fff8,
        u32::MAX,
    ];
    let cases = bad.map(|index| {
        let harm: Harm = Box::new(move |channel| {
            put(channel, &request(5))?;
            channel.to_host.store(WRITE_INDEX, index)
        });
        (format!("write index {index:#x}"), harm)
    });
    each(context, cases)
}

fn write_index_backwards(context: &Context) -> Verdict {
    let cases = [8u32, 32, 64].map(|back| {
        let harm: Harm = Box::new(move |channel| {
            for _ in 0..3 {
                works(channel)?;
            }
            let write = channel.to_host.load(WRITE_INDEX)?;
            channel.to_host.store(WRITE_INDEX, write - back)
        });
        (format!("{back} bytes back"), harm)
    });
    each(context, cases)
}

fn read_index(context: &Context) -> Verdict {
    let mut channel = ready(context, 5)?;
    // Four bytes off, beyond the ring, and ahead of the host's packets.
    for bad in [4, 1, 0x4000, 0xffff_fff8, u32::MAX, 0x2000] {
        let course = |failure: Failure| failure.during(format!("read index {bad:#x}"));
        channel.to_guest.store(READ_INDEX, bad)?;
        put(&channel, &request(1))?;
        channel.signal()?;
        let vm = channel.vmbus().vm();
        vm.settle();
        // The answer may have been on its way; the host has seen the index by now.
        let before = channel.to_guest.load(WRITE_INDEX)?;
        for id in 2..6 {
            put(&channel, &request(id))?;
        }
        channel.signal()?;
        vm.settle();
        let after = channel.to_guest.load(WRITE_INDEX)?;
        equal("write index of the host", after, before).map_err(course)?;
        channel = reopened(&channel).map_err(course)?;
        works(&channel).map_err(course)?;
    }
    Ok(())
}

fn host_indices(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    for bad in [0, 8, 0x3ff8, 4, 0x4000, u32::MAX] {
        let (to_host, to_guest) = (&channel.to_host, &channel.to_guest);
        let start = to_host.load(WRITE_INDEX)?;
        let next = to_guest.load(WRITE_INDEX)?;
        to_host.put(start, &request(3).encode().u64(u64::from(start) << 32).0)?;
        to_host.store(WRITE_INDEX, start + 32)?;
        to_host.store(READ_INDEX, bad)?;
        to_guest.store(WRITE_INDEX, bad)?;
        channel.signal()?;
        channel.vmbus().vm().settle();
        let what = format!("read index of the host, over {bad:#x}");
        equal(what, to_host.load(READ_INDEX)?, start + 32)?;
        let what = format!("write index of the host, over {bad:#x}");
        equal(what, to_guest.load(WRITE_INDEX)?, next + 56)?;
        super::answered(&channel, [3])?;
    }
    Ok(())
}

fn packets_before(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    for id in 0..10 {
        put(&channel, &request(id))?;
    }
    put(&channel, &Packet::new(3, 1, 10, &[0; 8]))?;
    for id in 11..20 {
        put(&channel, &request(id))?;
    }
    channel.signal()?;
    super::answered(&channel, 0..10)?;
    works(&reopened(&channel)?)
}

fn only_its_channel(context: &Context) -> Verdict {
    let setup = Setup {
        buses: vec![BusSetup::testdev(1), BusSetup::testdev(2)],
        ..Setup::default()
    };
    let vmbus = VmBus::connect(&Kernel::boot(&context.machine(&setup)?)?)?;
    let offers = vmbus.offers()?;
    let broken = negotiated(vmbus.open(&offers[0])?)?;
    let other = negotiated(vmbus.open(&offers[1])?)?;
    put(&broken, &Packet::new(3, 1, 1, &[0; 8]))?;
    stopped(&broken)?;
    works(&other)?;
    equal(
        "status of MODIFY_CHANNEL",
        vmbus.modify(offers[0].relid, 1)?,
        Some(0),
    )?;
    vmbus.vm().plug(&BusSetup::testdev(3))?;
    let third = negotiated(vmbus.open(&vmbus.expect_offer()?)?)?;
    works(&third)?;
    works(&other)?;
    broken.close()?;
    works(&other)
}

fn unload_and_contact(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let broken = negotiated(vmbus.open(&offer)?)?;
    put(&broken, &Packet::new(3, 1, 1, &[0; 8]))?;
    stopped(&broken)?;
    vmbus.unload()?;
    for _ in 0..2 {
        vmbus.contact(&Contact::linux(vmbus.vm(), VERSIONS[0], 0)?)?;
        let broken = negotiated(vmbus.open(&vmbus.only_offer()?)?)?;
        put(&broken, &Packet::new(3, 1, 1, &[0; 8]))?;
        stopped(&broken)?;
    }
    vmbus.unload()
}

fn removed(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let broken = negotiated(vmbus.open(&offer)?)?;
    put(&broken, &Packet::new(3, 1, 1, &[0; 8]))?;
    stopped(&broken)?;
    vmbus.vm().remove(offer.instance)?;
    equal("rescinded relid", vmbus.expect_rescind()?, offer.relid)?;
    vmbus.release(offer.relid)?;
    vmbus.expect_silence()?;
    vmbus.vm().plug(&BusSetup::testdev(1))?;
    works(&negotiated(vmbus.open(&vmbus.expect_offer()?)?)?)
}

/// Rounds of [`changing`].
const ROUNDS: u32 = 30;

fn changing(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let vm = vmbus.vm();
    for round in 0..ROUNDS {
        let channel = negotiated(vmbus.open(&offer)?)?;
        let (to_host, to_guest) = (&channel.to_host, &channel.to_guest);
        let stop = AtomicBool::new(false);
        let outcome: Verdict = thread::scope(|scope| {
            let storm = scope.spawn(|| -> Verdict {
                let mut seed = round;
                while !stop.load(Ordering::Relaxed) {
                    seed = seed.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
                    let value = match seed >> 30 {
                        0 => 0,
                        1 => seed >> 8 & 0x3ff8,
                        2 => u32::from(IN_BAND) | 2 << 16,
                        _ => seed,
                    };
                    match seed >> 4 & 7 {
                        0 => to_host.store(READ_INDEX, value)?,
                        1 => to_guest.store(WRITE_INDEX, value)?,
                        2 => to_guest.store(INTERRUPT_MASK, value)?,
                        3 => to_host.store(PENDING_SEND_SIZE, value)?,
                        at => to_host.put(seed >> 12 & 0x3ff8 | at & 4, &value.to_le_bytes())?,
                    }
                }
                Ok(())
            });
            let mut write = to_host.load(WRITE_INDEX)?;
            let mut done = Ok(());
            for _ in 0..100 {
                let bytes = request(1).encode().u64(0).0;
                write = (write + 32) % to_host.size();
                done = to_host
                    .put((write + to_host.size() - 32) % to_host.size(), &bytes)
                    .and_then(|()| to_host.store(WRITE_INDEX, write))
                    .and_then(|()| channel.signal().map(drop));
                vm.settle();
                if done.is_err() {
                    break;
                }
            }
            stop.store(true, Ordering::Relaxed);
            let panicked = || Err(Failure::Host("the storm has panicked".into()));
            storm.join().unwrap_or_else(|_| panicked()).and(done)
        });
        outcome?;
        // What came of the ring is undefined; the channel is not.
        vmbus.send_close(offer.relid)?;
        vmbus.tear_down(offer.relid, channel.gpadl)?;
        let channel = negotiated(vmbus.open(&offer)?)?;
        works(&channel)?;
        channel.close()?;
    }
    vmbus.unload()
}
