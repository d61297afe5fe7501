//! The beds.
#![forbid(unsafe_code)]

pub mod sim;
pub mod workers;

use std::sync::Arc;

use crate::bed::{Bed, BedKind};

/// The bed of a kind.
pub fn bed(kind: BedKind) -> Option<Arc<dyn Bed>> {
    match kind {
        BedKind::Sim => Some(Arc::new(sim::Sim)),
        BedKind::Kvm => None,
    }
}
