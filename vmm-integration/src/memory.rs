//! Guest RAM: host mappings and KVM memory slots.
#![allow(unsafe_code)]

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout::Layout;

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
    #[error("KVM refuses guest RAM at {gpa:#x}: {source}")]
    Slot {
        /// Guest physical address of the slot.
        gpa: u64,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
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

/// RAM that is plugged into a VM. Holding both keeps the mappings alive as long as KVM uses them.
#[derive(Debug)]
pub(crate) struct PluggedRam {
    ram: Ram,
}

impl PluggedRam {
    /// Gives `ram` to the VM, one slot a region.
    ///
    /// The caller keeps the result for as long as any vCPU of the VM runs.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Slot`].
    pub(crate) fn plug(vm: &VmFd, ram: Ram) -> Result<Self, MemoryError> {
        for (slot, region) in ram.iter().enumerate() {
            let gpa = region.start_addr().0;
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the slot covers exactly one mapping of `ram`, which `PluggedRam` and all
            // clones of the map keep in place; regions of one map do not overlap.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(|errno| MemoryError::Slot { gpa, source: errno })?;
        }
        Ok(Self { ram })
    }

    /// The memory map.
    pub(crate) fn map(&self) -> &Ram {
        &self.ram
    }
}
