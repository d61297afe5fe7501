//! A function's interrupts: MSI-X table, MSI capability, and the handles behind both.
//!
//! A device raises a vector by number. Under the vector's guard (the lock of its MSI-X entry, or
//! of the MSI capability) the event either becomes pending, because the guest masked the vector,
//! or becomes the message that the guest programmed. The message is only compared with the
//! function's live handles ([`handles`]): one that matches is delivered along the handle's route,
//! any other (such as address 0 and data 0, which a guest writes for a vector it gave up) raises
//! nothing.
//!
//! Whoever masks a vector, moves or unmaps its message takes the same lock, so that when he is
//! done nothing is delivered the old way, and each event goes the old way, the new way, or stays
//! pending, but is never lost (docs/spec/vpci.md#VP-7.1-08).
//!
//! Lock order: an MSI-X entry or the MSI state, then a route. No allocation when raising.
#![forbid(unsafe_code)]

pub mod handles;
mod hosted;
mod state;

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::config::{MsiRegisters, MsixControl};
use super::function::{FunctionLayout, HostVectors, InterruptLines};
use crate::dma::MessageTarget;
use crate::vmm::MsiSink;

use super::lock;
use handles::HandleTable;
pub use state::{InterruptsState, MessageState, MsixEntryState, RouteState, StateError};

const MSIX_ENABLED: u8 = 1;
const MSIX_MASKED: u8 = 2;
/// Bytes of an MSI-X table entry.
const ENTRY: u64 = 16;

/// What became of a vector's events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct VectorCounters {
    /// Messages delivered.
    pub raised: u64,
    /// Events dropped, because interrupts were off or the message matched no live handle.
    pub suppressed: u64,
}

#[derive(Debug, Default)]
struct Counters {
    raised: AtomicU64,
    suppressed: AtomicU64,
}

/// One entry of the MSI-X table. Its pending bit is in [`Interrupts::pending`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    address: u64,
    data: u32,
    masked: bool,
}

impl Entry {
    /// After reset an entry is masked.
    const RESET: Self = Self {
        address: 0,
        data: 0,
        masked: true,
    };
}

/// A function's interrupts.
#[derive(Debug)]
pub(crate) struct Interrupts {
    pub(crate) handles: HandleTable,
    sink: Arc<dyn MsiSink>,
    /// Who delivers the device's events, if not the device by [`InterruptLines::raise`].
    host: Option<Arc<dyn HostVectors>>,
    entries: Box<[Mutex<Entry>]>,
    /// MSI-X pending bits; a bit changes only under the lock of its entry.
    pending: Box<[AtomicU64]>,
    /// [`MSIX_ENABLED`], [`MSIX_MASKED`]; read under the lock of an entry.
    msix_control: AtomicU8,
    /// The MSI capability, if there is one.
    msi: Option<Mutex<MsiRegisters>>,
    /// MSI pending bits; changes only under the lock of the capability.
    msi_pending: AtomicU32,
    counters: Box<[Counters]>,
}

impl Interrupts {
    /// The interrupts of a function with `layout`, all off. `host` delivers them if the device does
    /// not raise them itself.
    pub(crate) fn new(
        layout: &FunctionLayout,
        apic_ids: Arc<[u32]>,
        sink: Arc<dyn MsiSink>,
        host: Option<Arc<dyn HostVectors>>,
    ) -> Self {
        let vectors = layout.msix.map_or(0, |msix| usize::from(msix.vectors));
        let messages = layout.msi.map_or(0, |msi| usize::from(msi.messages));
        Self {
            handles: HandleTable::new(apic_ids),
            sink,
            host,
            entries: (0..vectors).map(|_| Mutex::new(Entry::RESET)).collect(),
            pending: (0..vectors.div_ceil(64)).map(|_| 0.into()).collect(),
            msix_control: AtomicU8::new(0),
            msi: layout.msi.map(|_| Mutex::default()),
            msi_pending: AtomicU32::new(0),
            counters: (0..vectors.max(messages))
                .map(|_| Counters::default())
                .collect(),
        }
    }

    /// Takes over a changed MSI-X message control. When this returns, nothing is delivered that
    /// the new setting forbids.
    pub(crate) fn set_msix_control(&self, control: MsixControl) {
        let bit = |on: bool, bit: u8| if on { bit } else { 0 };
        let bits = bit(control.enabled, MSIX_ENABLED) | bit(control.masked, MSIX_MASKED);
        self.msix_control.store(bits, Ordering::Release);
        if let Some(msi) = &self.msi {
            let msi = lock(msi);
            self.tell_mode(&msi);
            self.tell_msi(&msi);
        } else {
            self.tell_mode(&MsiRegisters::default());
        }
        for (vector, entry) in self.entries.iter().enumerate() {
            let entry = lock(entry);
            self.tell_msix(vector, &entry);
            if control.enabled {
                self.deliver_pending(vector, &entry);
            } else {
                self.take_pending(vector);
            }
        }
    }

    /// Takes over a changed MSI capability. When this returns, nothing is delivered that the new
    /// setting forbids.
    pub(crate) fn set_msi(&self, registers: MsiRegisters) {
        let Some(msi) = &self.msi else { return };
        let mut current = lock(msi);
        *current = registers;
        self.tell_mode(&registers);
        self.tell_msi(&registers);
        if !registers.enabled {
            self.msi_pending.store(0, Ordering::Relaxed);
            return;
        }
        let ready = self
            .msi_pending
            .fetch_and(registers.mask, Ordering::Relaxed)
            & !registers.mask;
        for message in (0..32)
            .filter(|message| ready & 1 << message != 0 && !mutant!("msi-unmask-loses-pending"))
        {
            self.send_msi(&registers, message);
        }
    }

    /// Unmaps all messages, masks all entries, drops all that is pending.
    pub(crate) fn reset(&self) {
        self.set_msix_control(MsixControl::default());
        self.set_msi(MsiRegisters::default());
        for entry in &self.entries {
            *lock(entry) = Entry::RESET;
        }
        self.handles.clear();
    }

    /// Pending bits as the MSI capability shows them.
    pub(crate) fn msi_pending(&self) -> u32 {
        let own = || self.msi_pending.load(Ordering::Relaxed);
        self.hosted_msi_pending().unwrap_or_else(own)
    }

    /// A load from the MSI-X table: 4 or 8 bytes, aligned; anything else reads all ones.
    pub(crate) fn table_read(&self, offset: u64, data: &mut [u8]) {
        let dword = |offset: u64| {
            let Some(entry) = self.entries.get((offset / ENTRY) as usize) else {
                return 0;
            };
            let entry = *lock(entry);
            match offset % ENTRY / 4 {
                0 => entry.address as u32,
                1 => (entry.address >> 32) as u32,
                2 => entry.data,
                _ => u32::from(entry.masked),
            }
        };
        read_dwords(offset, data, dword);
    }

    /// A store to the MSI-X table: 4 or 8 bytes, aligned; anything else is dropped.
    pub(crate) fn table_write(&self, offset: u64, data: &[u8]) {
        let (dwords, rest) = data.as_chunks::<4>();
        if !rest.is_empty() || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let vector = (offset / ENTRY) as usize;
        let Some(entry) = self.entries.get(vector) else {
            return;
        };
        // Eight bytes aligned to eight stay inside one entry and are taken over at once.
        let mut entry = lock(entry);
        for (dword, bytes) in (offset % ENTRY / 4..).zip(dwords) {
            let value = u32::from_le_bytes(*bytes);
            match dword {
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
                1 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
                2 => entry.data = value,
                _ => entry.masked = value & 1 != 0,
            }
        }
        if self.msix_control.load(Ordering::Acquire) & MSIX_ENABLED != 0 {
            self.tell_msix(vector, &entry);
            self.deliver_pending(vector, &entry);
        }
    }

    /// A load from the pending bit array; rules as for the table.
    pub(crate) fn pba_read(&self, offset: u64, data: &mut [u8]) {
        read_dwords(offset, data, |offset| {
            let index = (offset / 8) as usize;
            let own = || {
                let word = self.pending.get(index);
                word.map_or(0, |word| word.load(Ordering::Relaxed))
            };
            let all = self.hosted_pending(index * 64).unwrap_or_else(own);
            let bits = mutant!("pending-bits-hidden", 0, all);
            (bits >> (offset % 8 * 8)) as u32
        });
    }

    /// Counts of each vector since the function was plugged in or the VM was reset.
    pub(crate) fn counters(&self) -> Vec<VectorCounters> {
        self.counters
            .iter()
            .map(|counters| VectorCounters {
                raised: counters.raised.load(Ordering::Relaxed),
                suppressed: counters.suppressed.load(Ordering::Relaxed),
            })
            .collect()
    }

    /// Sets all counts to zero: the VM was reset.
    pub(crate) fn reset_counters(&self) {
        for counters in &self.counters {
            counters.raised.store(0, Ordering::Relaxed);
            counters.suppressed.store(0, Ordering::Relaxed);
        }
    }

    /// Delivers what is pending if nothing masks it. The caller holds the entry's lock.
    fn deliver_pending(&self, vector: usize, entry: &Entry) {
        let masked = self.msix_control.load(Ordering::Acquire) & MSIX_MASKED != 0;
        if !entry.masked && !masked && self.take_pending(vector) && !mutant!("unmask-loses-pending")
        {
            self.send(vector, entry.address, entry.data);
        }
    }

    fn take_pending(&self, vector: usize) -> bool {
        let bit = 1 << (vector % 64);
        self.pending[vector / 64].fetch_and(!bit, Ordering::Relaxed) & bit != 0
    }

    /// True if MSI-X is on, so that the event is taken care of.
    fn raise_msix(&self, vector: usize) -> bool {
        let Some(entry) = self.entries.get(vector) else {
            return false;
        };
        let entry = lock(entry);
        let control = self.msix_control.load(Ordering::Acquire);
        if control & MSIX_ENABLED == 0 && !mutant!("msix-delivers-disabled") {
            return false;
        }
        if entry.masked || (control & MSIX_MASKED != 0 && !mutant!("function-mask-ignored")) {
            let bit = mutant!("masked-interrupt-lost", 0, 1 << (vector % 64));
            self.pending[vector / 64].fetch_or(bit, Ordering::Relaxed);
        } else {
            self.send(vector, entry.address, entry.data);
        }
        true
    }

    /// True if MSI is on, so that the event is taken care of.
    fn raise_msi(&self, vector: usize) -> bool {
        let Some(msi) = &self.msi else { return false };
        let registers = lock(msi);
        if !registers.enabled {
            return false;
        }
        // A function with fewer messages than vectors shares them out.
        let message = vector as u32 % u32::from(registers.messages.max(1));
        if registers.mask & 1 << message != 0 {
            self.msi_pending.fetch_or(1 << message, Ordering::Relaxed);
        } else {
            self.send_msi(&registers, message);
        }
        true
    }

    fn send_msi(&self, registers: &MsiRegisters, message: u32) {
        let data = registers.data_of(message);
        self.send(message as usize, registers.address, data);
    }

    fn send(&self, vector: usize, address: u64, data: u32) {
        let raised = self.handles.raise(address, data, &*self.sink);
        let Some(counters) = self.counters.get(vector) else {
            return;
        };
        let count = if raised {
            &counters.raised
        } else {
            &counters.suppressed
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// A device that writes its messages itself, instead of raising vectors, reaches the same handles.
impl MessageTarget for Interrupts {
    fn message(&self, address: u64, data: u32) -> bool {
        self.handles.raise(address, data, &*self.sink)
    }
}

impl InterruptLines for Interrupts {
    fn raise(&self, vector: u16) {
        let vector = usize::from(vector);
        if self.raise_msix(vector) || self.raise_msi(vector) {
            return;
        }
        if let Some(counters) = self.counters.get(vector) {
            counters.suppressed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Answers a load of 4 or 8 aligned bytes from double words; others keep what is in `data`.
fn read_dwords(offset: u64, data: &mut [u8], dword: impl Fn(u64) -> u32) {
    if !offset.is_multiple_of(data.len() as u64) {
        return;
    }
    let (dwords, rest) = data.as_chunks_mut::<4>();
    if !rest.is_empty() {
        return;
    }
    for (at, bytes) in (offset..).step_by(4).zip(dwords) {
        *bytes = dword(at).to_le_bytes();
    }
}

#[cfg(test)]
mod tests;
