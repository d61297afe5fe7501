//! Messages as such: lengths, numbers, channels that do not exist, how many (docs/spec/vmbus.md,
//! sections 1 and 8).
#![forbid(unsafe_code)]

use std::thread;

use super::opening::works;
use super::{TL_CONNECT_RESULT, alive, connected, drain, hvsock_request, offered, two_offers};
use crate::check::{Check, Context, Failure, SIM, Verdict, equal, holds};
use crate::model::kernel::{Kernel, VMBUS_SINT, status};
use crate::model::vmbus::{Contact, VERSIONS, VmBus, message};
use crate::model::vpci::Bus;
use crate::model::wire::{Bytes, u32_at};

/// Messages of a guest with the bytes that each has at least.
const GUEST_MESSAGES: [(u32, usize); 11] = [
    (message::REQUEST_OFFERS, 8),
    (message::OPEN_CHANNEL, 148),
    (message::CLOSE_CHANNEL, 12),
    (message::GPADL_HEADER, 20),
    (message::GPADL_BODY, 16),
    (message::GPADL_TEARDOWN, 16),
    (message::RELID_RELEASED, 12),
    (message::INITIATE_CONTACT, 40),
    (message::UNLOAD, 8),
    (super::TL_CONNECT_REQUEST, 40),
    (message::MODIFY_CHANNEL, 16),
];
/// Messages that only a host sends.
const HOST_MESSAGES: [u32; 12] = [1, 2, 4, 6, 10, 12, 15, 17, 20, 23, 24, 26];
/// Messages of features that were not agreed on, or that this host does not offer.
const NOT_AGREED: [u32; 6] = [18, 19, 25, 27, 28, 29];

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vmbus.message.too-short",
        "Each message is without effect and answer when a byte of its structure is missing.",
        &["VB-1-01", "VB-1-03", "VB-8-14"],
        too_short,
    ),
    Check::new(
        "vmbus.message.longest",
        "Each message may be padded to 240 bytes with whatever.",
        &["VB-1-01", "VB-1-03"],
        longest,
    ),
    Check::new(
        "vmbus.message.wrong-direction",
        "A host's message from a guest is without effect and answer.",
        &["VB-1.1-02", "VB-1.1-21", "VB-8-14"],
        wrong_direction,
    ),
    Check::new(
        "vmbus.message.unknown",
        "A message with a number that does not exist is without effect and answer.",
        &["VB-1-01", "VB-8-13"],
        unknown,
    ),
    Check::new(
        "vmbus.message.not-agreed",
        "Reserved channels, MODIFY_CONNECTION, PAUSE and RESUME are not answered.",
        &["VB-1.1-18", "VB-1.1-23", "VB-1.1-24", "VB-5-17"],
        not_agreed,
    ),
    Check::new(
        "vmbus.message.unknown-channel",
        "A message for a channel that does not exist has no answer but where a guest waits.",
        &["VB-8-13", "VB-5.1-06"],
        unknown_channel,
    ),
    Check::new(
        "vmbus.message.lengths",
        "No message of the host is shorter than Linux's table says, or longer than 240 bytes.",
        &["VB-1-02", "VB-1-04"],
        lengths,
    ),
    Check::new(
        "vmbus.message.hvsock-refused",
        "TL_CONNECT_REQUEST is answered with both GUIDs and STATUS_CONNECTION_REFUSED.",
        &["VB-1.1-19", "VB-1.1-21", "VB-5-16"],
        hvsock_refused,
    ),
    Check::new(
        "vmbus.message.hvsock-with-4-0",
        "With version 4.0 TL_CONNECT_REQUEST is not answered.",
        &["VB-5-16"],
        hvsock_with_4_0,
    ),
    Check::new(
        "vmbus.message.queue-limit",
        "Messages that the host has not taken are bounded: the guest is told, and loses none.",
        &["VB-8-14", "VB-8-15", "VB-1-05"],
        queue_limit,
    )
    .on(SIM),
    Check::new(
        "vmbus.message.release-storm",
        "A thousand RELID_RELEASEDs of any channel are taken or refused, and do no harm.",
        &["VB-8-15", "VB-8-13"],
        release_storm,
    ),
    Check::new(
        "vmbus.message.every-state",
        "Every message in every state of a channel leaves a connection that can be made anew.",
        &["VB-8-14", "VB-5.1-02"],
        every_state,
    ),
    Check::new(
        "vmbus.message.random",
        "Thousands of random messages do not keep a guest from connecting and working.",
        &["VB-8-13", "VB-8-14"],
        random,
    ),
    Check::new(
        "vmbus.message.two-vps-at-once",
        "Messages that two VPs send at the same time are all handled, each VP's in order.",
        &["VB-8-17", "VB-1-05"],
        two_vps_at_once,
    ),
    Check::new(
        "vmbus.message.gpadls-of-two-vps",
        "Two VPs make and take back GPADLs of two channels at the same time.",
        &["VB-8-17", "VB-4-07"],
        gpadls_of_two_vps,
    ),
];

/// Posts messages that want an answer, while the host does nothing, until it has no room; returns
/// the status of the refusal.
pub(super) fn fill(vmbus: &VmBus) -> Result<u16, Failure> {
    for _ in 0..100_000 {
        let got = vmbus.post(vmbus.connection(), &hvsock_request(1).0)?;
        if got != status::SUCCESS {
            return Ok(got);
        }
    }
    Ok(status::SUCCESS)
}

fn too_short(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let bus = Bus::probe(&vmbus, &offer, 0x1_0004)?;
    for (number, size) in GUEST_MESSAGES {
        let whole = Bytes::words(&[number, 0, offer.relid, 0]).up_to(size).0;
        for len in [0, 1, 4, 7, size - 4, size - 1] {
            // The header alone is all that these two have.
            if len < size {
                vmbus.send(&whole[..len])?;
            }
        }
        let alive = alive(&vmbus);
        alive.map_err(|failure| failure.during(format!("short message {number}")))?;
    }
    equal("functions of the bus", bus.relations()?.len(), 1)
}

fn longest(context: &Context) -> Verdict {
    let kernel = Kernel::boot(&context.usual()?)?;
    let vmbus = VmBus::new(&kernel, 0);
    let send = |words: &[u32]| {
        let bytes = Bytes::words(words).bytes(&[0xee; 240]).up_to(240);
        vmbus.send(&bytes.0)
    };
    vmbus.contact(&Contact::linux(kernel.vm(), VERSIONS[0], 0)?)?;
    send(&[message::REQUEST_OFFERS, 0])?;
    let relid = u32_at(&vmbus.expect(message::OFFER_CHANNEL, 196)?, 184);
    vmbus.expect(message::ALL_OFFERS_DELIVERED, 8)?;
    let pfns = super::fresh(kernel.vm(), 10)?;
    equal("status", vmbus.create_gpadl(relid, 1, &pfns)?, 0)?;
    send(&[message::OPEN_CHANNEL, 0, relid, 9, 1, 0, 5])?;
    let result = vmbus.expect(message::OPEN_CHANNEL_RESULT, 20)?;
    equal("status of OPEN_CHANNEL_RESULT", u32_at(&result, 16), 0)?;
    send(&[message::MODIFY_CHANNEL, 0, relid, 1])?;
    let response = vmbus.expect(message::MODIFY_CHANNEL_RESPONSE, 16)?;
    equal(
        "status of MODIFY_CHANNEL_RESPONSE",
        u32_at(&response, 12),
        0,
    )?;
    send(&[message::CLOSE_CHANNEL, 0, relid])?;
    send(&[message::GPADL_TEARDOWN, 0, relid, 1])?;
    vmbus.expect(message::GPADL_TORNDOWN, 12)?;
    send(&[super::TL_CONNECT_REQUEST, 0])?;
    vmbus.expect(TL_CONNECT_RESULT, 44)?;
    send(&[message::RELID_RELEASED, 0, relid])?;
    vmbus.expect_silence()?;
    send(&[message::UNLOAD, 0])?;
    vmbus.expect(message::UNLOAD_RESPONSE, 8)?;
    vmbus.expect_silence()
}

/// Sends messages that must be without effect on a connection with an open channel.
fn without_effect(context: &Context, numbers: impl IntoIterator<Item = u32>) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let bus = Bus::probe(&vmbus, &offer, 0x1_0004)?;
    for number in numbers {
        for len in [8, 240] {
            let words = [number, 0, offer.relid, bus.channel().gpadl, 0];
            vmbus.send(&Bytes::words(&words).up_to(len).0)?;
        }
        let alive = alive(&vmbus);
        alive.map_err(|failure| failure.during(format!("message {number:#x}")))?;
    }
    equal("functions of the bus", bus.relations()?.len(), 1)
}

fn wrong_direction(context: &Context) -> Verdict {
    without_effect(context, HOST_MESSAGES)
}

fn unknown(context: &Context) -> Verdict {
    let bits = (5..32).map(|bit| 1 << bit | message::UNLOAD);
    without_effect(context, [0, 30, 31, 100, u32::MAX].into_iter().chain(bits))
}

fn not_agreed(context: &Context) -> Verdict {
    without_effect(context, NOT_AGREED)
}

fn unknown_channel(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let bus = Bus::probe(&vmbus, &offer, 0x1_0004)?;
    for relid in [0, 2, 2047, 2048, 0x1_0001, 0x8000_0001, u32::MAX] {
        for number in [
            message::OPEN_CHANNEL,
            message::CLOSE_CHANNEL,
            message::GPADL_TEARDOWN,
            message::RELID_RELEASED,
        ] {
            let words = [number, 0, relid, bus.channel().gpadl, bus.channel().gpadl];
            vmbus.send(&Bytes::words(&words).up_to(148).0)?;
        }
        let alive = alive(&vmbus);
        alive.map_err(|failure| failure.during(format!("channel {relid:#x}")))?;
    }
    equal("functions of the bus", bus.relations()?.len(), 1)
}

fn lengths(context: &Context) -> Verdict {
    // Linux's table, `channel_message_table` of channel_mgmt.c.
    let least = |number: u32| match number {
        message::OFFER_CHANNEL => 196,
        message::RESCIND | message::GPADL_TORNDOWN => 12,
        message::ALL_OFFERS_DELIVERED | message::UNLOAD_RESPONSE => 8,
        message::OPEN_CHANNEL_RESULT | message::GPADL_CREATED => 20,
        message::VERSION_RESPONSE | message::MODIFY_CHANNEL_RESPONSE => 16,
        TL_CONNECT_RESULT => 44,
        _ => usize::MAX,
    };
    let (vmbus, offer) = offered(context)?;
    let channel = vmbus.open(&offer)?;
    super::post(&vmbus, &[message::MODIFY_CHANNEL, 0, offer.relid, 1])?;
    vmbus.send(&hvsock_request(1).0)?;
    vmbus.send_gpadl(offer.relid, 1, &super::fresh(vmbus.vm(), 3)?)?;
    super::post(&vmbus, &[message::GPADL_TEARDOWN, 0, offer.relid, 1])?;
    vmbus.send_close(offer.relid)?;
    super::post(
        &vmbus,
        &[message::GPADL_TEARDOWN, 0, offer.relid, channel.gpadl],
    )?;
    vmbus.vm().settle();
    vmbus.vm().remove(offer.instance)?;
    let mut seen = Vec::new();
    while let Some(bytes) = vmbus.receive()? {
        let number = u32_at(&bytes, 0);
        let what = format!("message {number} has {} bytes", bytes.len());
        holds(what, (least(number)..=240).contains(&bytes.len()))?;
        seen.push(number);
    }
    equal("messages", seen, vec![24, 23, 10, 12, 12, 2])
}

fn hvsock_refused(context: &Context) -> Verdict {
    let kernel = Kernel::boot(&context.usual()?)?;
    for version in VERSIONS.into_iter().filter(|version| *version > 0x4_0000) {
        let vmbus = VmBus::connect_at(&kernel, version)?;
        // With a silo's GUID, from 5.2 on, and without.
        for len in [40, 56] {
            let guids: Vec<u8> = (1..=48).collect();
            let request = Bytes::words(&[super::TL_CONNECT_REQUEST, 0]).bytes(&guids);
            vmbus.send(&request.up_to(len).0)?;
            let result = vmbus.expect(TL_CONNECT_RESULT, 44)?;
            equal("length of TL_CONNECT_RESULT", result.len(), 44)?;
            equal("GUIDs", &result[8..40], &guids[..32])?;
            equal("status", u32_at(&result, 40), 0xc000_0236)?;
            vmbus.expect_silence()?;
        }
    }
    Ok(())
}

fn hvsock_with_4_0(context: &Context) -> Verdict {
    let vmbus = VmBus::connect_at(&Kernel::boot(&context.usual()?)?, 0x4_0000)?;
    vmbus.send(&hvsock_request(1).0)?;
    vmbus.expect_silence()?;
    works(vmbus.open(&vmbus.only_offer()?)?)
}

fn queue_limit(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let mut taken = 0u32;
    let refusal = loop {
        if taken == 100_000 {
            break status::SUCCESS;
        }
        let request = Bytes::words(&[super::TL_CONNECT_REQUEST, 0]);
        let request = request.bytes(&taken.to_le_bytes().repeat(8));
        match vmbus.post(vmbus.connection(), &request.0)? {
            status::SUCCESS => taken += 1,
            refusal => break refusal,
        }
    };
    let what = format!("status after {taken} messages that the host has not taken");
    equal(what, refusal, status::INSUFFICIENT_BUFFERS)?;
    for expected in 0..taken {
        let result = vmbus.expect(TL_CONNECT_RESULT, 44)?;
        equal("tag of an answer", u32_at(&result, 8), expected)?;
    }
    alive(&vmbus)
}

fn release_storm(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let bus = Bus::probe(&vmbus, &offer, 0x1_0004)?;
    for relid in 0..1000 {
        vmbus.release(relid % 3)?;
    }
    alive(&vmbus)?;
    equal("functions of the bus", bus.relations()?.len(), 1)
}

fn every_state(context: &Context) -> Verdict {
    let kernel = Kernel::boot(&context.usual()?)?;
    for state in 0..5 {
        for (number, size) in GUEST_MESSAGES {
            let vmbus = VmBus::connect(&kernel)?;
            let course = |failure: Failure| failure.during(format!("{number} in state {state}"));
            let mut words = [number, 0, 1, 1, 1, 0, 5];
            if state > 0 {
                let offer = vmbus.only_offer().map_err(course)?;
                words[2] = offer.relid;
                if state > 1 {
                    let channel = vmbus.open(&offer).map_err(course)?;
                    words[3] = channel.gpadl;
                    if state > 2 {
                        vmbus.send_close(offer.relid)?;
                    }
                    if state > 3 {
                        vmbus
                            .tear_down(offer.relid, channel.gpadl)
                            .map_err(course)?;
                    }
                }
            }
            for _ in 0..3 {
                vmbus.send(&Bytes::words(&words).up_to(size).0)?;
            }
            drain(&vmbus, 0).map_err(course)?;
            kernel.vm().take_interrupts(0)?;
        }
    }
    let vmbus = VmBus::connect(&kernel)?;
    works(vmbus.open(&vmbus.only_offer()?)?)
}

/// Numbers that are the same in each run (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) as u32
    }

    fn below(&mut self, limit: u32) -> u32 {
        self.next() % limit
    }
}

fn random(context: &Context) -> Verdict {
    let kernel = Kernel::boot(&context.usual()?)?;
    let mut random = Random(1);
    for _ in 0..20 {
        let vmbus = VmBus::connect(&kernel)?;
        vmbus.only_offer()?;
        for _ in 0..150 {
            let mut message = Bytes::words(&[random.below(32), 0]);
            for _ in 0..random.below(59) {
                message = message.u32(match random.below(4) {
                    0 => random.next(),
                    1 => 0,
                    _ => random.below(6),
                });
            }
            let len = match random.below(4) {
                0 => random.below(241) as usize,
                _ => message.0.len().min(240),
            };
            let got = vmbus.post(
                if random.below(8) == 0 { 4 } else { 1 },
                &message.up_to(len).0,
            )?;
            let fine = [status::SUCCESS, status::INSUFFICIENT_BUFFERS].contains(&got);
            holds(format!("status {got:#x} of HvPostMessage"), fine)?;
            if random.below(3) == 0 {
                kernel.vm().settle();
            }
        }
        // A contact may have named any SINT: their slots are freed as a new kernel does it.
        for vp in 0..kernel.vm().vps() {
            let synic = kernel.synic(vp);
            synic.disable(VMBUS_SINT)?;
            synic.enable(VMBUS_SINT, crate::model::kernel::VMBUS_VECTOR)?;
            drain(&vmbus, vp)?;
        }
    }
    let vmbus = VmBus::connect(&kernel)?;
    works(vmbus.open(&vmbus.only_offer()?)?)
}

fn two_vps_at_once(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    let kernel = vmbus.kernel();
    const EACH: u32 = 200;
    let sent: Vec<Verdict> = thread::scope(|scope| {
        let senders: Vec<_> = (0..2u32)
            .map(|vp| {
                scope.spawn(move || {
                    let sender = VmBus::new(kernel, vp);
                    for count in 0..EACH {
                        let tag = (vp << 16 | count).to_le_bytes().repeat(8);
                        let request = Bytes::words(&[super::TL_CONNECT_REQUEST, 0]);
                        sender.send(&request.bytes(&tag).0)?;
                    }
                    Ok(())
                })
            })
            .collect();
        let panicked = || Err(Failure::Host("a sender has panicked".into()));
        let results = senders.into_iter().map(|sender| sender.join());
        results
            .map(|result| result.unwrap_or_else(|_| panicked()))
            .collect()
    });
    sent.into_iter().collect::<Verdict>()?;
    let mut next = [0; 2];
    for _ in 0..2 * EACH {
        let tag = u32_at(&vmbus.expect(TL_CONNECT_RESULT, 44)?, 8);
        let vp = (tag >> 16 & 1) as usize;
        equal(format!("next answer for VP {vp}"), tag & 0xffff, next[vp])?;
        next[vp] += 1;
    }
    vmbus.expect_silence()
}

fn gpadls_of_two_vps(context: &Context) -> Verdict {
    let (vmbus, first, second) = two_offers(context)?;
    let kernel = vmbus.kernel();
    let pfns = super::fresh(vmbus.vm(), 60)?;
    let made: Vec<Verdict> = thread::scope(|scope| {
        let pfns = &pfns;
        let makers: Vec<_> = [(0, first.relid), (1, second.relid)]
            .into_iter()
            .map(|(vp, relid)| {
                scope.spawn(move || {
                    let maker = VmBus::new(kernel, vp);
                    for count in 0..20 {
                        maker.send_gpadl(relid, vp << 16 | count, pfns)?;
                    }
                    Ok(())
                })
            })
            .collect();
        let panicked = || Err(Failure::Host("a VP has panicked".into()));
        let results = makers.into_iter().map(|maker| maker.join());
        results
            .map(|result| result.unwrap_or_else(|_| panicked()))
            .collect()
    });
    made.into_iter().collect::<Verdict>()?;
    let mut next = [0; 2];
    for _ in 0..40 {
        let created = vmbus.expect(message::GPADL_CREATED, 20)?;
        let id = u32_at(&created, 12);
        let vp = (id >> 16 & 1) as usize;
        let expected = [first.relid, second.relid][vp];
        let fields = (u32_at(&created, 8), id & 0xffff, u32_at(&created, 16));
        equal("relid, number and status", fields, (expected, next[vp], 0))?;
        next[vp] += 1;
    }
    alive(&vmbus)
}
