//! The beds.

#[cfg(feature = "kvm")]
pub mod kvm;
pub mod sim;
pub mod workers;

use std::sync::Arc;

use crate::bed::{Bed, BedKind};

/// The bed on KVM in hybrid mode, unless it was left out of this build.
pub fn hybrid() -> Option<Arc<dyn Bed>> {
    #[cfg(feature = "kvm")]
    let bed: Option<Arc<dyn Bed>> = Some(Arc::new(kvm::KvmBed::hybrid()));
    #[cfg(not(feature = "kvm"))]
    let bed = None;
    bed
}

/// The bed of a kind, unless it was left out of this build.
pub fn bed(kind: BedKind) -> Option<Arc<dyn Bed>> {
    match kind {
        BedKind::Sim => Some(Arc::new(sim::Sim)),
        #[cfg(feature = "kvm")]
        BedKind::Kvm => Some(Arc::new(kvm::KvmBed::default())),
        #[cfg(not(feature = "kvm"))]
        BedKind::Kvm => None,
    }
}
