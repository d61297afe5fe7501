//! Keeps vCPUs out of the guest while something changes under it.
//!
//! Each vCPU thread passes the gate around KVM_RUN ([`RunGate::enter`]). Whoever closes it
//! ([`RunGate::close`]) waits until no vCPU is inside. A vCPU that handles an exit is outside, whatever
//! lock it holds or waits for, so closing never waits for a lock: a vCPU may close the gate while
//! others wait for it.
//!
//! # Lock order
//!
//! The gate is a leaf: who closed it may take no lock under which somebody closes it, and a thread
//! that is about to enter holds none.
#![forbid(unsafe_code)]

#[cfg(all(test, loom))]
mod loom_tests;

use std::fmt::Debug;
use std::sync::{LockResult, PoisonError};
use std::time::Duration;

#[cfg(all(test, loom))]
use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(all(test, loom))]
use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(all(test, loom)))]
use std::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(not(all(test, loom)))]
use std::sync::{Condvar, Mutex, MutexGuard};

/// Time after which vCPUs that have not left are kicked again: a kick that arrives just before
/// a thread enters the guest may have no effect.
const KICK_AGAIN: Duration = Duration::from_micros(200);

/// Takes vCPUs out of the guest.
pub trait Kick: Send + Sync + Debug {
    /// Makes the vCPU leave the guest if it is inside. May be without effect on one that is just
    /// entering: it is asked again.
    fn kick(&self, vcpu: usize);
}

/// Whether one vCPU is inside. In a cache line of its own: it is written at each exit.
#[derive(Debug)]
#[repr(align(64))]
struct Inside(AtomicBool);

/// The gate of a VM.
#[derive(Debug)]
pub struct RunGate {
    inside: Box<[Inside]>,
    closed: AtomicBool,
    /// Held by whoever has the gate closed.
    closing: Mutex<()>,
    waiting: Mutex<()>,
    changed: Condvar,
}

impl RunGate {
    /// An open gate for the vCPUs 0 to `vcpus - 1`.
    pub fn new(vcpus: usize) -> Self {
        Self {
            inside: (0..vcpus).map(|_| Inside(AtomicBool::new(false))).collect(),
            closed: AtomicBool::new(false),
            closing: Mutex::new(()),
            waiting: Mutex::new(()),
            changed: Condvar::new(),
        }
    }

    /// Before a vCPU runs guest code: waits while the gate is closed. The vCPU is inside until the
    /// result is dropped.
    pub fn enter(&self, vcpu: usize) -> Entered<'_> {
        let inside = &self.inside[vcpu].0;
        loop {
            inside.store(true, Ordering::Relaxed);
            // Either this sees that the gate is closed, or whoever closes it sees who is inside.
            fence(Ordering::SeqCst);
            if !self.closed.load(Ordering::Acquire) {
                return Entered { gate: self, vcpu };
            }
            self.leave(vcpu);
            let mut waiting = unpoisoned(self.waiting.lock());
            while self.closed.load(Ordering::Relaxed) {
                waiting = unpoisoned(self.changed.wait(waiting));
            }
        }
    }

    fn leave(&self, vcpu: usize) {
        self.inside[vcpu].0.store(false, Ordering::Release);
        // Either this sees that somebody waits, or that one sees that nobody is inside.
        fence(Ordering::SeqCst);
        if self.closed.load(Ordering::Relaxed) {
            drop(unpoisoned(self.waiting.lock()));
            self.changed.notify_all();
        }
    }

    /// Closes the gate, and takes out who is inside. When this returns no vCPU is, and none enters
    /// until the result is dropped. Waits for others that have the gate closed. Not for a thread that
    /// is inside itself.
    pub fn close(&self, kick: &dyn Kick) -> Closed<'_> {
        let closing = unpoisoned(self.closing.lock());
        self.closed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let mut waiting = unpoisoned(self.waiting.lock());
        loop {
            let mut left = false;
            for (vcpu, inside) in self.inside.iter().enumerate() {
                if inside.0.load(Ordering::Acquire) {
                    kick.kick(vcpu);
                    left = true;
                }
            }
            if !left {
                break;
            }
            let result = self.changed.wait_timeout(waiting, KICK_AGAIN);
            waiting = unpoisoned(result).0;
        }
        drop(waiting);
        Closed {
            gate: self,
            _closing: closing,
        }
    }
}

fn unpoisoned<T>(result: LockResult<T>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}

/// A vCPU is inside.
#[derive(Debug)]
pub struct Entered<'a> {
    gate: &'a RunGate,
    vcpu: usize,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.gate.leave(self.vcpu);
    }
}

/// The gate is closed.
#[derive(Debug)]
pub struct Closed<'a> {
    gate: &'a RunGate,
    _closing: MutexGuard<'a, ()>,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        let waiting = unpoisoned(self.gate.waiting.lock());
        self.gate.closed.store(false, Ordering::Release);
        drop(waiting);
        self.gate.changed.notify_all();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::thread;

    /// Threads that are inside until they are kicked.
    #[derive(Debug, Default)]
    struct Kicks([AtomicBool; 3]);

    impl Kick for Kicks {
        fn kick(&self, vcpu: usize) {
            self.0[vcpu].store(true, Ordering::Release);
        }
    }

    #[test]
    fn nobody_is_inside_while_the_gate_is_closed_and_all_get_on_afterwards() {
        const ENTRIES: u32 = 200;
        let gate = RunGate::new(3);
        let kicks = Kicks::default();
        let inside = AtomicU32::new(0);
        let is_closed = AtomicBool::new(false);
        let close = || {
            let closed = gate.close(&kicks);
            is_closed.store(true, Ordering::SeqCst);
            assert_eq!(inside.load(Ordering::SeqCst), 0);
            is_closed.store(false, Ordering::SeqCst);
            drop(closed);
        };
        let run = |vcpu: usize| {
            for entry in 1..=ENTRIES {
                let entered = gate.enter(vcpu);
                inside.fetch_add(1, Ordering::SeqCst);
                for _ in 0..20 {
                    assert!(!is_closed.load(Ordering::SeqCst));
                    if kicks.0[vcpu].swap(false, Ordering::AcqRel) {
                        break;
                    }
                    thread::yield_now();
                }
                inside.fetch_sub(1, Ordering::SeqCst);
                drop(entered);
                // A vCPU that handles an exit closes the gate for the others.
                if entry % 3 == 0 {
                    close();
                }
            }
        };
        thread::scope(|scope| {
            let run = &run;
            let vcpus = [0, 1, 2].map(|vcpu| scope.spawn(move || run(vcpu)));
            while vcpus.iter().any(|vcpu| !vcpu.is_finished()) {
                close();
                thread::yield_now();
            }
        });
    }
}
