//! A SynIC in user space: every write of its MSRs is trapped, messages and event flags are written
//! straight into guest RAM, and SINTs are raised as MSIs (docs/spec/kvm.md, section 7.1).
//!
//! In hybrid mode the host's kernel has a SynIC too (docs/spec/kvm.md, section 7.2). It gets a copy of
//! each register that the guest writes, answers the reads, and raises SINTs, by [`SintLines`]; slots,
//! flags, queues and the rules about them stay here, so that a guest sees the same in both modes.
//!
//! What user space cannot see is the EOI of a SINT at its local APIC. It is not needed: a guest
//! that leaves a slot occupied writes EOM when it frees it, because the message-pending flag tells
//! it to. For the same reason AutoEOI is accepted and without effect; CPUID advises against it.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard};

use crate::hv::msr;
use crate::hv::synic::{EVENT_FLAGS, SINT_COUNT};
use crate::mem::GuestRam;
use crate::msr::{ForwardMsr, GpFault};
use crate::vmm::{MsiSink, Trigger};

use super::vp::{Fabric, Message, VpSynic};
use super::{SintLines, SynicError, SynicPort, SynicState, SynicStateError, VpSynicState};

/// Default of [`SynicConfig::queue_limit`]: an offer for each of 2047 channels, and some more.
pub const DEFAULT_QUEUE_LIMIT: usize = 2304;

/// What a [`UserSynic`] needs to know.
#[derive(Debug, Clone)]
pub struct SynicConfig {
    /// Local APIC id of each VP, by VP index.
    pub apic_ids: Arc<[u32]>,
    /// Messages that may wait for a slot, on each VP. Memory is taken as they come, about 250 bytes
    /// each.
    pub queue_limit: usize,
}

/// Counts since the partition was created, over all VPs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SynicCounters {
    /// Messages queued.
    pub posted: u64,
    /// Messages written to their slot.
    pub delivered: u64,
    /// Messages refused because the queue was full.
    pub queue_full: u64,
    /// Messages dropped from the queue for a guest that disconnected.
    pub discarded: u64,
    /// Event flags set.
    pub events: u64,
    /// Events whose flag was set already.
    pub events_merged: u64,
    /// Events refused because the VP took none.
    pub events_refused: u64,
    /// Interrupts raised.
    pub interrupts: u64,
}

impl SynicCounters {
    fn add(&mut self, other: &Self) {
        self.posted += other.posted;
        self.delivered += other.delivered;
        self.queue_full += other.queue_full;
        self.discarded += other.discarded;
        self.events += other.events;
        self.events_merged += other.events_merged;
        self.events_refused += other.events_refused;
        self.interrupts += other.interrupts;
    }
}

/// The SynICs of all VPs.
///
/// One lock a VP. It is a leaf of the lock order but for [`MsiSink::raise_msi`], and the drain
/// trigger fires without it.
#[derive(Debug)]
pub struct UserSynic {
    queue_limit: usize,
    ram: GuestRam,
    sink: Arc<dyn MsiSink>,
    lines: Option<Arc<dyn SintLines>>,
    vps: Box<[Mutex<VpSynic>]>,
    drain: Mutex<Option<Arc<dyn Trigger>>>,
}

impl UserSynic {
    /// All VPs at their reset values.
    pub fn new(config: &SynicConfig, ram: GuestRam, sink: Arc<dyn MsiSink>) -> Self {
        let vps = config.apic_ids.iter().copied().map(VpSynic::new);
        Self {
            queue_limit: config.queue_limit,
            ram,
            sink,
            lines: None,
            vps: vps.map(Mutex::new).collect(),
            drain: Mutex::new(None),
        }
    }

    /// The same, with SINTs raised by the SynIC of the host's kernel. Every write of an MSR must
    /// come by [`UserSynic::write_msr_forwarding`] then.
    #[must_use]
    pub fn with_lines(mut self, lines: Arc<dyn SintLines>) -> Self {
        self.lines = Some(lines);
        self
    }

    /// True if `msr` is one of the SynIC's.
    pub fn owns_msr(msr: u32) -> bool {
        matches!(msr, msr::SCONTROL..=msr::EOM | msr::SINT0..=msr::SINT15)
    }

    /// Reads an MSR on a VP.
    ///
    /// # Errors
    ///
    /// [`GpFault`] for an MSR that is not the SynIC's, and for a VP that does not exist.
    pub fn read_msr(&self, vp: u32, msr: u32) -> Result<u64, GpFault> {
        self.vp(vp).ok_or(GpFault)?.read_msr(msr)
    }

    /// Writes an MSR on a VP.
    ///
    /// # Errors
    ///
    /// [`GpFault`] for an MSR that is not the SynIC's or read-only, for a page outside RAM, for an
    /// unmasked SINT with a vector below 16, and for a VP that does not exist. Nothing has changed
    /// then.
    pub fn write_msr(&self, vp: u32, msr: u32, value: u64) -> Result<(), GpFault> {
        self.write_msr_forwarding(vp, msr, value, &mut |_, _| {})
    }

    /// Writes an MSR on a VP, and the copy of it in the host's kernel by `forward`, unless it
    /// faults. What the write makes deliverable is delivered after that.
    ///
    /// # Errors
    ///
    /// As [`UserSynic::write_msr`].
    pub fn write_msr_forwarding(
        &self,
        vp: u32,
        msr: u32,
        value: u64,
        forward: ForwardMsr<'_>,
    ) -> Result<(), GpFault> {
        let mut guard = self.vp(vp).ok_or(GpFault)?;
        guard.write_msr(msr, value, self.fabric(vp), forward)?;
        self.after_drain(guard);
        Ok(())
    }

    /// The MSRs of a VP, of which the host's kernel has a copy, with their values, in an order in
    /// which they can be written: for the start, a reset and a restore. Empty for a VP that does not
    /// exist.
    pub fn forwarded_msrs(&self, vp: u32) -> Vec<(u32, u64)> {
        self.vp(vp)
            .map_or_else(Vec::new, |vp| vp.forwarded().collect())
    }

    /// All VPs back to their reset values; queued messages are gone. Guest RAM is left alone.
    pub fn reset(&self) {
        for vp in self.vps.iter().filter(|_| !mutant!("reset-keeps-synic")) {
            lock(vp).reset();
        }
    }

    /// The present state. The VPs must be stopped.
    pub fn save(&self) -> SynicState {
        SynicState {
            version: SynicState::VERSION,
            vps: self
                .vps
                .iter()
                .map(|vp| VpSynicState::from(&*lock(vp)))
                .collect(),
        }
    }

    /// Takes over a saved state, after guest RAM was restored. Counters start anew.
    ///
    /// # Errors
    ///
    /// [`SynicStateError`]; nothing has changed then.
    pub fn restore(&self, state: &SynicState) -> Result<(), SynicStateError> {
        if state.version != SynicState::VERSION {
            let version = state.version;
            return Err(SynicStateError::Version { version });
        }
        if state.vps.len() != self.vps.len() {
            return Err(SynicStateError::VpCount {
                expected: self.vps.len(),
                found: state.vps.len(),
            });
        }
        let mut restored = Vec::with_capacity(self.vps.len());
        for (index, (saved, vp)) in state.vps.iter().zip(&self.vps).enumerate() {
            let apic_id = lock(vp).apic_id;
            restored.push(saved.check(index, apic_id, self.queue_limit, &self.ram)?);
        }
        for (vp, new) in self.vps.iter().zip(restored) {
            *lock(vp) = new;
        }
        Ok(())
    }

    /// Counts over all VPs.
    pub fn counters(&self) -> SynicCounters {
        let mut sum = SynicCounters::default();
        for vp in &self.vps {
            sum.add(&lock(vp).counters);
        }
        sum
    }

    fn vp(&self, index: u32) -> Option<MutexGuard<'_, VpSynic>> {
        self.vps.get(index as usize).map(lock)
    }

    fn fabric(&self, vp: u32) -> Fabric<'_> {
        Fabric {
            ram: &self.ram,
            sink: &*self.sink,
            lines: self.lines.as_deref(),
            vp,
        }
    }

    /// Fires the drain trigger, without the VP's lock, if a full queue has room again.
    fn after_drain(&self, mut vp: MutexGuard<'_, VpSynic>) {
        let drained = vp.take_drained(self.queue_limit);
        drop(vp);
        if drained {
            let trigger = lock(&self.drain).clone();
            if let Some(trigger) = trigger {
                trigger.trigger();
            }
        }
    }
}

impl SynicPort for UserSynic {
    fn vp_count(&self) -> u32 {
        self.vps.len() as u32
    }

    fn post_message(
        &self,
        vp: u32,
        sint: u8,
        message_type: u32,
        payload: &[u8],
    ) -> Result<(), SynicError> {
        let message =
            Message::new(sint, message_type, payload).ok_or(SynicError::OutOfRange { sint })?;
        let mut guard = self.vp(vp).ok_or(SynicError::NoVp { vp })?;
        guard.post(self.queue_limit, message, self.fabric(vp))?;
        self.after_drain(guard);
        Ok(())
    }

    fn signal_event(&self, vp: u32, sint: u8, flag: u16) -> Result<(), SynicError> {
        if usize::from(sint) >= SINT_COUNT || flag >= EVENT_FLAGS {
            return Err(SynicError::OutOfRange { sint });
        }
        let mut guard = self.vp(vp).ok_or(SynicError::NoVp { vp })?;
        match guard.signal(sint, flag, self.fabric(vp)) {
            true => Ok(()),
            false => Err(SynicError::Disabled { vp }),
        }
    }

    fn discard_messages(&self, sint: u8) {
        for (index, vp) in (0..).zip(&self.vps) {
            let mut guard = lock(vp);
            guard.discard(sint, self.fabric(index));
            self.after_drain(guard);
        }
    }

    fn set_drain_trigger(&self, trigger: Arc<dyn Trigger>) {
        *lock(&self.drain) = Some(trigger);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests;
