//! The bus's side of a function's DMA: grants, revokes, and the domain that the function obeys.
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{
    Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};

use super::view::DmaView;
use super::{DmaCounters, DmaError};
use crate::mem::{GuestRam, PinnedRam, Snapshot};
use crate::pviommu::{
    Access, Attachment, BackendError, BackendReport, DeviceBackend, DmaFault, FaultCause,
    FlushRange, Iotlb, Levels, PageTable, PortSettings, Translation, walk,
};

/// Takes the messages that a device writes to the interrupt range.
pub trait MessageTarget: Send + Sync + Debug {
    /// Delivers a message; false if it is none of the function's. Called under the DMA guard: a
    /// leaf.
    fn message(&self, address: u64, data: u32) -> bool;
}

/// What the guard guards.
#[derive(Debug)]
pub(super) struct Gate {
    /// The function may master the bus.
    pub(super) master: bool,
    pub(super) attachment: Attachment,
    /// The memory map that accesses use.
    pub(super) ram: PinnedRam,
    /// Absent for a function that is not behind a pvIOMMU, which never leaves the default domain.
    unit: Option<Unit>,
}

/// What translating takes.
#[derive(Debug)]
struct Unit {
    settings: PortSettings,
    iotlb: Iotlb,
}

impl Gate {
    /// Translates one page of a table. The address and the bytes from there to the page's end.
    #[inline(always)]
    pub(super) fn translate(
        &self,
        table: &PageTable,
        iova: u64,
        access: Access,
    ) -> Result<(u64, u64), FaultCause> {
        let Some(unit) = &self.unit else {
            return Err(FaultCause::Blocked);
        };
        // A tag of the cache holds as many bits. What is too wide for the table is never in it.
        if iova >> Levels::Five.width() != 0 {
            return Err(FaultCause::Width);
        }
        match unit.iotlb.lookup(iova, access == Access::Write) {
            Some(found) => Ok(found),
            None => unit.miss(table, &self.ram, iova, access),
        }
    }
}

impl Unit {
    #[cold]
    #[inline(never)]
    fn miss(
        &self,
        table: &PageTable,
        ram: &Snapshot,
        iova: u64,
        access: Access,
    ) -> Result<(u64, u64), FaultCause> {
        if iova >> self.settings.iova_width != 0 {
            return Err(FaultCause::Width);
        }
        let leaf = walk(ram, table, self.settings.physical_bits, iova, access)?;
        self.iotlb.fill(iova, &leaf);
        let offset = iova & (leaf.size() - 1);
        Ok((leaf.gpa + offset, leaf.size() - offset))
    }
}

/// The bus's side of a function's DMA: grants and revokes.
///
/// Lock order: the guard is a leaf towards the library. Inside it only a message of the function is
/// delivered, and the last fault kept.
#[derive(Debug)]
pub struct DmaPort {
    ram: GuestRam,
    /// The guard: held shared by accesses under way, exclusively by whoever changes their rights.
    gate: RwLock<Gate>,
    messages_to: OnceLock<Weak<dyn MessageTarget>>,
    not_master: AtomicU64,
    faults: AtomicU64,
    messages: AtomicU64,
    last_fault: Mutex<Option<DmaFault>>,
}

impl DmaPort {
    /// A port over all guest RAM that is behind no pvIOMMU, with bus mastering off.
    pub fn new(ram: GuestRam) -> Arc<Self> {
        Self::with_unit(ram, None)
    }

    /// A port behind a pvIOMMU, in the default domain, with bus mastering off.
    pub fn behind_iommu(ram: GuestRam, settings: PortSettings) -> Arc<Self> {
        let iotlb = Iotlb::new(settings.iotlb_entries);
        Self::with_unit(ram, Some(Unit { settings, iotlb }))
    }

    fn with_unit(ram: GuestRam, unit: Option<Unit>) -> Arc<Self> {
        let gate = Gate {
            master: false,
            attachment: Attachment::DEFAULT,
            ram: ram.pin(),
            unit,
        };
        Arc::new(Self {
            ram,
            gate: RwLock::new(gate),
            messages_to: OnceLock::new(),
            not_master: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            messages: AtomicU64::new(0),
            last_fault: Mutex::new(None),
        })
    }

    /// Has writes to the interrupt range delivered by `target`. Once; without it they are faults.
    pub fn set_message_target(&self, target: Weak<dyn MessageTarget>) {
        let _ = self.messages_to.set(target);
    }

    /// Switches bus mastering. When this returns, no access that began under the former setting is
    /// still under way. Bounded: accesses are bounded copies.
    pub fn set_master(&self, on: bool) {
        self.close().master = on;
    }

    /// True while the function may master the bus.
    pub fn is_master(&self) -> bool {
        self.guard().master
    }

    /// Counts since the function was plugged in.
    pub fn counters(&self) -> DmaCounters {
        DmaCounters {
            not_master: self.not_master.load(Ordering::Relaxed),
            faults: self.faults.load(Ordering::Relaxed),
            messages: self.messages.load(Ordering::Relaxed),
        }
    }

    /// The last access that did not translate.
    pub fn last_fault(&self) -> Option<DmaFault> {
        *self
            .last_fault
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn guard(&self) -> RwLockReadGuard<'_, Gate> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the guard exclusively: no access is under way, and none starts.
    fn close(&self) -> RwLockWriteGuard<'_, Gate> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guard, if the function may master the bus.
    fn enter(&self) -> Result<RwLockReadGuard<'_, Gate>, DmaError> {
        let gate = self.guard();
        if !gate.master && !mutant!("dma-without-master") {
            self.not_master.fetch_add(1, Ordering::Relaxed);
            return Err(DmaError::NotMaster);
        }
        Ok(gate)
    }

    /// Starts an access.
    pub(super) fn open(&self) -> Result<DmaView<'_>, DmaError> {
        let gate = self.enter()?;
        if gate.ram.is_current(&self.ram) {
            return Ok(DmaView::new(self, gate));
        }
        drop(gate);
        self.close().ram = self.ram.pin();
        // The VMM may have replaced the map again: this access began before that.
        Ok(DmaView::new(self, self.enter()?))
    }

    /// A write of `data` to the interrupt range.
    pub(super) fn message(&self, address: u64, data: u32) -> Result<(), DmaError> {
        let gate = self.enter()?;
        let target = self.messages_to.get().and_then(Weak::upgrade);
        let aligned = address.is_multiple_of(4);
        if aligned && target.is_some_and(|target| target.message(address, data)) {
            self.messages.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        let fault = DmaFault {
            domain: gate.attachment.domain,
            iova: address,
            len: 4,
            access: Access::Write,
            cause: FaultCause::InterruptRange,
        };
        self.record(&gate, fault);
        Err(DmaError::Fault {
            iova: address,
            len: 4,
        })
    }

    /// Counts and keeps a fault.
    #[cold]
    pub(super) fn record(&self, gate: &Gate, fault: DmaFault) {
        let faults = self.faults.fetch_add(1, Ordering::Relaxed) + 1;
        *self
            .last_fault
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(fault);
        let Some(unit) = &gate.unit else {
            return;
        };
        let settings = &unit.settings;
        let slot = gate.attachment.fault_slot as usize;
        if let Some(counter) = settings.domain_faults.get(slot)
            && !mutant!("faults-not-by-domain")
        {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        // A guest can cause these as often as it likes: log at powers of two.
        if faults.is_power_of_two() {
            log::warn!(
                "DMA fault of device {}, {faults} so far: {fault}",
                settings.id
            );
        }
    }
}

impl DeviceBackend for DmaPort {
    fn attach(&self, to: &Attachment) -> Result<(), BackendError> {
        let mut gate = self.close();
        let gate = &mut *gate;
        gate.attachment = *to;
        match &mut gate.unit {
            Some(_) if mutant!("attach-keeps-cache") => {}
            Some(unit) => unit.iotlb.flush_all(),
            // Nobody attaches a port without a unit; if somebody does, nothing passes.
            _ => gate.attachment.translation = Translation::Blocked,
        }
        Ok(())
    }

    fn flush(&self, ranges: &[FlushRange]) {
        let mut gate = self.close();
        if let Some(unit) = &mut gate.unit {
            for range in ranges {
                unit.iotlb.flush(*range);
            }
        }
    }

    fn flush_all(&self) {
        let mut gate = self.close();
        if let Some(unit) = &mut gate.unit {
            unit.iotlb.flush_all();
        }
    }

    fn report(&self) -> BackendReport {
        BackendReport {
            faults: self.faults.load(Ordering::Relaxed),
            last_fault: self.last_fault(),
            iotlb: match &self.guard().unit {
                Some(unit) => unit.iotlb.counters(),
                None => Default::default(),
            },
        }
    }
}
