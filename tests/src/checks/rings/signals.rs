//! When who signals whom, and what happens without room.
#![forbid(unsafe_code)]

use super::{REQUEST, answered, put, ready, request, take_event, works};
use crate::check::{Check, Context, Failure, SIM, Verdict, equal, holds};
use crate::model::ring::{INTERRUPT_MASK, PENDING_SEND_SIZE, READ_INDEX, WRITE_INDEX};
use crate::model::vmbus::Channel;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "rings.signal.empty-ring",
        "The host signals for a packet in an empty ring, and not for one behind another.",
        &["VB-7.3-01"],
        empty_ring,
    ),
    Check::new(
        "rings.signal.masked",
        "While the guest's mask is not 0 the host does not signal; the packet is there.",
        &["VB-7.3-01", "VB-7.3-02", "VB-7.1-03", "VB-8-12"],
        masked,
    ),
    Check::new(
        "rings.signal.many-packets",
        "One signal is enough for all packets behind the first, and for those added meanwhile.",
        &["VB-7.3-07"],
        many_packets,
    ),
    Check::new(
        "rings.signal.mask-at-rest",
        "A host that has read everything asks for signals.",
        &["VB-7.3-05", "VB-7.3-06", "VB-7.1-03"],
        mask_at_rest,
    ),
    Check::new(
        "rings.signal.at-every-step",
        "A packet that comes between any two steps of the host is not forgotten.",
        &["VB-7.3-05", "VB-7.3-07"],
        at_every_step,
    )
    .on(SIM),
    Check::new(
        "rings.room.signalled",
        "A guest that waits for room is signalled when there is more than it asked for, once.",
        &["VB-7.3-03", "VB-7.3-09", "VB-7.1-04"],
        room_signalled,
    ),
    Check::new(
        "rings.room.not-asked-for",
        "A guest that does not wait for room is not signalled for it.",
        &["VB-7.3-03"],
        room_not_asked_for,
    ),
    Check::new(
        "rings.room.exact",
        "The signal for room comes at the packet that makes it, whatever the size's low bits.",
        &["VB-7.3-03", "VB-7.3-04"],
        room_exact,
    )
    .on(SIM),
    Check::new(
        "rings.room.any-size",
        "Any pending send size leaves the ring at work.",
        &["VB-8-12", "VB-7.3-04"],
        any_size,
    ),
    Check::new(
        "rings.pressure.nothing-lost",
        "A guest that does not read gets all its completions in the end, in order.",
        &["VB-7.3-08", "VB-7.3-10"],
        nothing_lost,
    ),
    Check::new(
        "rings.pressure.requests-wait",
        "Without room for an answer a request stays in the ring, and the host says what it needs.",
        &["VB-7.3-08", "VB-7.3-10", "VB-7.1-04", "VB-7.1-08"],
        requests_wait,
    ),
    Check::new(
        "rings.pressure.closed-while-waiting",
        "A channel whose host waits for room can be closed and opened again.",
        &["VB-7.3-08", "VB-5-10"],
        closed_while_waiting,
    ),
];

fn empty_ring(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    for _ in 0..5 {
        channel.send(&request(1))?;
        equal(
            "event flag for the first packet",
            channel.interrupted()?,
            true,
        )?;
        channel.send(&request(2))?;
        channel.send(&request(3))?;
        equal(
            "event flag for those behind it",
            channel.interrupted()?,
            false,
        )?;
        answered(&channel, [1, 2, 3])?;
    }
    Ok(())
}

fn masked(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    for mask in [1, 2, 0x8000_0000, u32::MAX] {
        channel.to_guest.store(INTERRUPT_MASK, mask)?;
        channel.send(&request(1))?;
        equal(
            format!("event flag with mask {mask:#x}"),
            channel.interrupted()?,
            false,
        )?;
        // As Linux: unmask, then look once more.
        channel.to_guest.store(INTERRUPT_MASK, 0)?;
        answered(&channel, [1])?;
        equal("event flag afterwards", channel.interrupted()?, false)?;
        channel.send(&request(2))?;
        equal("event flag without a mask", channel.interrupted()?, true)?;
        answered(&channel, [2])?;
    }
    Ok(())
}

fn many_packets(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    for round in 0..5 {
        let wanted = put(&channel, &request(round * 100))?;
        equal("signal wanted for the first packet", wanted, true)?;
        for id in 1..100 {
            put(&channel, &request(round * 100 + id))?;
        }
        channel.signal()?;
        answered(&channel, round * 100..round * 100 + 100)?;
    }
    Ok(())
}

fn mask_at_rest(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    for id in 0..20 {
        channel.send(&request(id))?;
        answered(&channel, [id])?;
        equal(
            "interrupt mask of the host",
            channel.to_host.load(INTERRUPT_MASK)?,
            0,
        )?;
        let indices = (
            channel.to_host.load(WRITE_INDEX)?,
            channel.to_host.load(READ_INDEX)?,
        );
        equal("read index", indices.1, indices.0)?;
    }
    Ok(())
}

fn at_every_step(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    let vm = channel.vmbus().vm();
    for first in 0..6 {
        for second in 0..6 {
            for (id, steps) in [(1, first), (2, second), (3, 0)] {
                // Signals only where the ring's rule says so.
                channel.send(&request(id))?;
                for _ in 0..steps {
                    vm.step();
                }
            }
            let done = answered(&channel, [1, 2, 3]);
            let course = format!("{first} and {second} steps between");
            done.map_err(|failure| failure.during(course))?;
        }
    }
    Ok(())
}

/// Has the host wait for room for its answers, with requests left in the guest-to-host ring; the
/// host signals for nothing that it sends. Returns how many requests there are in all.
fn blocked(channel: &Channel) -> Result<u64, Failure> {
    channel.to_guest.store(INTERRUPT_MASK, 1)?;
    let mut sent = 0;
    loop {
        while channel.to_host.free()? > REQUEST {
            put(channel, &request(sent))?;
            sent += 1;
        }
        channel.signal()?;
        channel.vmbus().vm().settle();
        // No more room than one request: nothing was read.
        if channel.to_host.free()? <= REQUEST {
            break;
        }
        if sent > 100_000 {
            return Err(Failure::Unmet {
                what: "requests that the guest does not take the answers of".into(),
                expected: "to stay in the ring at some point".into(),
                got: format!("{sent} were read"),
            });
        }
    }
    holds(
        "the host waits for room",
        channel.to_guest.load(PENDING_SEND_SIZE)? != 0,
    )?;
    take_event(channel)?;
    Ok(sent)
}

fn room_signalled(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    let sent = blocked(&channel)?;
    channel.to_host.store(PENDING_SEND_SIZE, 256)?;
    equal(
        "event flag before there is room",
        take_event(&channel)?,
        false,
    )?;
    answered(&channel, 0..sent)?;
    equal("event flag for the room", take_event(&channel)?, true)?;
    channel.vmbus().vm().take_interrupts(0)?;
    // There is more than that by now: no more signals.
    channel.send(&request(1))?;
    answered(&channel, [1])?;
    equal("event flag afterwards", take_event(&channel)?, false)
}

fn room_not_asked_for(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    let sent = blocked(&channel)?;
    answered(&channel, 0..sent)?;
    equal("event flag", take_event(&channel)?, false)?;
    // More than the ring can ever have.
    let sent = blocked(&channel)?;
    channel
        .to_host
        .store(PENDING_SEND_SIZE, channel.to_host.size())?;
    answered(&channel, 0..sent)?;
    equal("event flag", take_event(&channel)?, false)
}

fn room_exact(context: &Context) -> Verdict {
    // Exactly what ten requests free is not more than that; rounded down to the next 8, it is.
    for (less, expected) in [(0, 11), (1, 10), (4, 10), (7, 10), (8, 10)] {
        let channel = ready(context, 5)?;
        channel.to_guest.store(INTERRUPT_MASK, 1)?;
        let count = 20;
        for id in 0..count {
            put(&channel, &request(id))?;
        }
        let start = channel.to_host.load(READ_INDEX)?;
        let wanted = channel.to_host.free()? + 10 * REQUEST;
        channel.to_host.store(PENDING_SEND_SIZE, wanted - less)?;
        channel.signal()?;
        let mut signalled = None;
        while channel.vmbus().vm().step() {
            if take_event(&channel)? {
                let read = channel.to_host.load(READ_INDEX)? - start;
                equal("signals before", signalled.replace(read), None)?;
            }
        }
        let what = format!("bytes read at the signal, size less {less}");
        equal(what, signalled, Some(expected * REQUEST))?;
        answered(&channel, 0..count)?;
    }
    Ok(())
}

fn any_size(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    for size in [
        1,
        7,
        8,
        0x3ff8,
        0x4000,
        0x4001,
        0x7fff_ffff,
        0x8000_0000,
        u32::MAX,
    ] {
        channel.to_host.store(PENDING_SEND_SIZE, size)?;
        for id in 0..20 {
            put(&channel, &request(id))?;
        }
        channel.signal()?;
        let done = answered(&channel, 0..20);
        done.map_err(|failure| failure.during(format!("pending send size {size:#x}")))?;
    }
    channel.to_host.store(PENDING_SEND_SIZE, 0)?;
    works(&channel)
}

fn nothing_lost(context: &Context) -> Verdict {
    let channel = ready(context, 2)?;
    for _ in 0..3 {
        let sent = blocked(&channel)?;
        answered(&channel, 0..sent)?;
        let pending = channel.to_guest.load(PENDING_SEND_SIZE)?;
        equal("pending send size afterwards", pending, 0)?;
    }
    channel.to_guest.store(INTERRUPT_MASK, 0)?;
    works(&channel)
}

fn requests_wait(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    let sent = blocked(&channel)?;
    let (to_host, to_guest) = (&channel.to_host, &channel.to_guest);
    let unread = u64::from((to_host.size() - to_host.free()?) / REQUEST);
    let answers = u64::from((to_guest.size() - to_guest.free()?) / 56);
    equal("requests that were read", sent - unread, answers)?;
    holds(
        "the ring is not full to the last byte",
        to_guest.free()? >= 8,
    )?;
    let pending = to_guest.load(PENDING_SEND_SIZE)?;
    equal("low bits of the pending send size", pending % 8, 0)?;
    holds("it can be met", pending <= to_guest.size() - 8)?;
    holds("it is not met", to_guest.free()? <= pending)?;
    // Signals alone change nothing.
    for _ in 0..10 {
        channel.signal()?;
    }
    channel.vmbus().vm().settle();
    let again = u64::from((to_guest.size() - to_guest.free()?) / 56);
    equal("answers", again, answers)?;
    answered(&channel, 0..sent)
}

fn closed_while_waiting(context: &Context) -> Verdict {
    let channel = ready(context, 5)?;
    blocked(&channel)?;
    works(&super::reopened(&channel)?)
}
