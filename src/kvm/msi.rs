//! Interrupts by KVM_SIGNAL_MSI.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;

use crate::vmm::{Msi, MsiSink};

/// Delivers messages with one ioctl each, so that no routing table has to be rewritten when the
/// guest moves an interrupt (docs/spec/kvm.md, section 8).
pub struct KvmMsiSink {
    vm: Arc<VmFd>,
    undelivered: AtomicU64,
}

impl fmt::Debug for KvmMsiSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmMsiSink")
            .field("undelivered", &self.undelivered)
            .finish_non_exhaustive()
    }
}

impl KvmMsiSink {
    /// For the VM behind `vm`.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            undelivered: AtomicU64::new(0),
        }
    }

    /// Messages that KVM refused or that no local APIC took, because it was not enabled or no vCPU
    /// has the id.
    pub fn undelivered(&self) -> u64 {
        self.undelivered.load(Ordering::Relaxed)
    }
}

impl MsiSink for KvmMsiSink {
    fn raise_msi(&self, msi: Msi) {
        // 1: delivered or already pending. 0: no such destination, as on a real bus.
        let delivered = self.vm.signal_msi(to_kvm(msi));
        if !matches!(delivered, Ok(1..)) {
            self.undelivered.fetch_add(1, Ordering::Relaxed);
            log::debug!("interrupt {msi:x?} is not delivered: {delivered:?}");
        }
    }
}

pub(super) fn to_kvm(msi: Msi) -> kvm_msi {
    kvm_msi {
        address_lo: msi.address as u32,
        address_hi: (msi.address >> 32) as u32,
        data: msi.data,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_high_half_of_a_wide_apic_id_goes_to_address_hi() {
        let msi = to_kvm(Msi::fixed(300, 0x51));
        assert_eq!(
            (msi.address_lo, msi.address_hi, msi.data, msi.flags),
            (0xfee2_c000, 0x100, 0x51, 0)
        );
    }
}
