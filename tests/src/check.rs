//! A check and its verdict.
#![forbid(unsafe_code)]

use std::fmt::{Debug, Display};

use crate::bed::{Bed, BedKind, BootError, Machine};
use crate::guest::Fault;
use crate::host::{HostError, Setup};

/// What a check does: it succeeds, or says why not.
pub type Verdict = Result<(), Failure>;

/// One check.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// Stable name, `area.subject.what`.
    pub name: &'static str,
    /// What holds if the check passes, in one sentence.
    pub statement: &'static str,
    /// Ids of the rows of docs/spec that it covers.
    pub rows: &'static [&'static str],
    /// Beds that it can run on.
    pub beds: &'static [BedKind],
    /// The check itself.
    pub run: fn(&Context<'_>) -> Verdict,
}

/// Why a check did not pass.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The host did something else than expected.
    #[error("{what}: expected {expected}, got {got}")]
    Unmet {
        /// What was looked at.
        what: String,
        /// What should have come.
        expected: String,
        /// What came.
        got: String,
    },
    /// The guest took an exception where none was expected, or the bed broke.
    #[error("unexpected: {0}")]
    Fault(#[from] Fault),
    /// The operator's request failed.
    #[error("the host: {0}")]
    Host(String),
    /// The check cannot be made here; it counts as skipped.
    #[error("skipped: {0}")]
    Skip(String),
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        match error {
            HostError::Unsupported(_) => Self::Skip(error.to_string()),
            HostError::Refused(_) => Self::Host(error.to_string()),
        }
    }
}

impl From<BootError> for Failure {
    fn from(error: BootError) -> Self {
        match error {
            BootError::Unsupported(reason) => Self::Skip(reason),
            BootError::Failed(_) => Self::Host(error.to_string()),
        }
    }
}

/// Demands that `got` is `want`.
///
/// # Errors
///
/// [`Failure::Unmet`].
pub fn equal<T: PartialEq + Debug>(what: impl Display, got: T, want: T) -> Verdict {
    if got == want {
        return Ok(());
    }
    Err(Failure::Unmet {
        what: what.to_string(),
        expected: format!("{want:#x?}"),
        got: format!("{got:#x?}"),
    })
}

/// What a check works with.
#[derive(Debug)]
pub struct Context<'a> {
    bed: &'a dyn Bed,
}

impl<'a> Context<'a> {
    /// A context on a bed.
    pub fn new(bed: &'a dyn Bed) -> Self {
        Self { bed }
    }

    /// Makes a VM.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn boot(&self, setup: &Setup) -> Result<Machine, Failure> {
        Ok(self.bed.boot(setup)?)
    }
}
