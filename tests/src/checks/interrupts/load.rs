//! Nothing is lost while another VP moves and masks interrupts (docs/spec/vpci.md, section 7.1).
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::with_vps;
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::model::testdev::{Interrupt, MSIX_TABLE, TestDev};
use crate::model::vm::{PATIENCE, Vm};
use crate::model::vpci::{Create, slot};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "interrupts.load.retargets",
        "Each event arrives exactly once while another VP retargets without pause.",
        &["VP-7.1-08", "VP-7.2-17"],
        retargets,
    ),
    Check::new(
        "interrupts.load.masks",
        "Each event arrives exactly once while another VP masks and unmasks without pause.",
        &["VP-7.1-08"],
        masks,
    ),
    Check::new(
        "interrupts.load.creates",
        "Each event arrives exactly once while another VP creates and deletes other messages.",
        &["VP-7.1-07", "VP-7.1-10"],
        creates,
    ),
];

/// Events of a run.
const EVENTS: u64 = 300;

/// Which of these interrupts arrives first.
fn first_of(vm: &Vm, expected: &[(u32, u8)]) -> Result<(u32, u8), Failure> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        for (vp, vector) in expected {
            if vm.wait_interrupt(*vp, *vector, Duration::ZERO)? {
                return Ok((*vp, *vector));
            }
        }
    }
    Err(Failure::Unmet {
        what: "interrupts of VP 0 and VP 1".into(),
        expected: format!("one of {expected:x?}"),
        got: "none".into(),
    })
}

/// Raises events on VP 0, one at a time, while VP 2 does something over and over. Each must arrive
/// at one of the places, once.
fn under(
    device: &TestDev,
    places: &[(u32, u8)],
    disturb: impl Fn(u64) -> Verdict + Sync,
) -> Verdict {
    let done = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);
    thread::scope(|scope| {
        let other = scope.spawn(|| -> Verdict {
            while !done.load(Ordering::Relaxed) {
                disturb(rounds.fetch_add(1, Ordering::Relaxed))?;
            }
            Ok(())
        });
        let events = || -> Verdict {
            for event in 0..EVENTS {
                device.raise(0)?;
                let arrived = first_of(device.vm(), places);
                arrived.map_err(|failure| failure.during(format!("event {event}")))?;
            }
            Ok(())
        };
        let result = events();
        // At least one disturbance, however the threads were scheduled.
        let deadline = Instant::now() + PATIENCE;
        while rounds.load(Ordering::Relaxed) < 2
            && Instant::now() < deadline
            && !other.is_finished()
        {
            thread::yield_now();
        }
        done.store(true, Ordering::Relaxed);
        match other.join() {
            Ok(disturbed) => result.and(disturbed),
            Err(_) => Err(Failure::Host("the other VP's thread panicked".into())),
        }
    })?;
    holds(
        "the other VP had its turns",
        rounds.load(Ordering::Relaxed) >= 2,
    )?;
    for vp in 0..2 {
        let what = format!("further interrupts of VP {vp}");
        equal(what, super::vectors(device.vm(), vp)?, vec![])?;
    }
    Ok(())
}

fn device(context: &Context) -> Result<(TestDev, Interrupt), Failure> {
    let device = TestDev::bring_up(&context.machine(&with_vps(3))?)?;
    let interrupt = device.interrupt(0, 0x41, 0)?;
    Ok((device, interrupt))
}

fn retargets(context: &Context) -> Verdict {
    let (device, interrupt) = device(context)?;
    let places = [(0, 0x41), (1, 0x42), (0, 0x43), (1, 0x41)];
    let bus = device.bus();
    under(&device, &places, |round| {
        let (vp, vector) = places[round as usize % places.len()];
        let moved = bus.retarget(slot(0), interrupt.message, vector, vp);
        bus.kernel().must_retarget(2, &moved)
    })
}

fn masks(context: &Context) -> Verdict {
    let (device, _) = device(context)?;
    let control = device.bar() + MSIX_TABLE + 12;
    under(&device, &[(0, 0x41)], |_| {
        device.vm().store(2, control, 4, 1)?;
        Ok(device.vm().store(2, control, 4, 0)?)
    })
}

fn creates(context: &Context) -> Verdict {
    let (device, _) = device(context)?;
    let bus = device.bus();
    under(&device, &[(0, 0x41)], |_| {
        // The driver's own thread: it alone uses the ring.
        let message = bus.must_create(&Create::one(0, 0x55, 0))?;
        equal("data of the message", message.data, 1)?;
        bus.delete(0, message)
    })
}
