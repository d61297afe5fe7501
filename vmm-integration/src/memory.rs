//! Guest RAM: host mappings and KVM memory slots.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vm_vpci::gate::RunGate;
use vm_vpci::kvm::KvmRam;

use crate::layout::{Layout, RAM_SLOTS};
use crate::signals::VcpuThreads;

/// The `vm-memory` type behind guest RAM.
pub(crate) type Ram = GuestMemoryMmap<()>;

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// The host does not map that much memory.
    #[error("--memory {mib}M: the host refuses to map it ({source}): use less")]
    Map {
        /// RAM asked for, in MiB.
        mib: u64,
        /// The host's error.
        source: vm_memory::mmap::FromRangesError,
    },
    /// KVM does not take a memory slot.
    #[error("KVM refuses guest RAM: {0}")]
    Slots(#[source] io::Error),
}

/// Maps RAM for `layout`. Pages are allocated when first touched.
///
/// # Errors
///
/// [`MemoryError::Map`].
pub(crate) fn map_ram(layout: &Layout) -> Result<Ram, MemoryError> {
    let ranges: Vec<(GuestAddress, usize)> = layout
        .ram()
        .iter()
        .map(|range| (GuestAddress(range.start), range.size as usize))
        .collect();
    Ram::from_ranges(&ranges).map_err(|source| MemoryError::Map {
        mib: (layout.low_ram + layout.high_ram) >> 20,
        source,
    })
}

/// RAM that is plugged into a VM.
#[derive(Debug, Clone)]
pub(crate) struct PluggedRam {
    slots: Arc<KvmRam>,
}

impl PluggedRam {
    /// Gives `ram` to the VM; in small slots if pages of it may be tracked. vCPUs pass `gate`, and
    /// `threads` are theirs.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Slots`].
    pub(crate) fn plug(
        vm: &Arc<VmFd>,
        ram: Ram,
        tracked: bool,
        gate: &Arc<RunGate>,
        threads: &Arc<VcpuThreads>,
    ) -> Result<Self, MemoryError> {
        let (gate, threads) = (gate.clone(), threads.clone());
        let slots = KvmRam::plug(vm.clone(), ram, RAM_SLOTS, tracked, gate, threads);
        let slots = Arc::new(slots.map_err(MemoryError::Slots)?);
        Ok(Self { slots })
    }

    /// The memory map.
    pub(crate) fn map(&self) -> &Ram {
        self.slots.map()
    }

    /// What makes pages of it read-only for vCPUs.
    pub(crate) fn slots(&self) -> &Arc<KvmRam> {
        &self.slots
    }
}
