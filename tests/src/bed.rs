//! Where a guest runs.
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::sync::Arc;

use crate::guest::Guest;
use crate::host::{Host, Setup};

/// The kind of a bed, as checks name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BedKind {
    /// Calls straight into the library; deterministic, no CPU involved.
    Sim,
    /// A virtual CPU of KVM.
    Kvm,
}

impl BedKind {
    /// All kinds.
    pub const ALL: &[Self] = &[Self::Sim, Self::Kvm];

    /// The name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sim => "sim",
            Self::Kvm => "kvm",
        }
    }
}

/// Why there is no VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// The bed cannot run such a VM; the check is skipped.
    #[error("{0}")]
    Unsupported(String),
    /// The VM could not be made; the check fails.
    #[error("the VM could not be made: {0}")]
    Failed(String),
}

/// A VM on a bed. It is gone when both parts are dropped.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The guest's side.
    pub guest: Arc<dyn Guest>,
    /// The operator's side.
    pub host: Arc<dyn Host>,
}

/// A place where guests run.
pub trait Bed: Send + Sync + Debug {
    /// What it is.
    fn kind(&self) -> BedKind;

    /// True in hybrid mode: the host's kernel answers the calls that flush TLBs, send IPIs and tell of
    /// a long wait, and recommends them. Nothing else may look different to a guest.
    fn is_hybrid(&self) -> bool {
        false
    }

    /// Whether VMs can be made here, and if not, what is missing.
    ///
    /// # Errors
    ///
    /// What is missing, in one line.
    fn available(&self) -> Result<(), String>;

    /// Makes a VM whose VPs wait for what the test has them do, registers as after reset.
    ///
    /// # Errors
    ///
    /// [`BootError`].
    fn boot(&self, setup: &Setup) -> Result<Machine, BootError>;
}
