//! The synthetic interrupt controller (SynIC): messages and event flags towards the guest.
#![forbid(unsafe_code)]

mod state;
mod user;
mod vp;

use std::fmt::Debug;
use std::sync::Arc;

use crate::vmm::Trigger;

pub use state::{MessageState, SynicState, SynicStateError, VpSynicState};
pub use user::{DEFAULT_QUEUE_LIMIT, SynicConfig, SynicCounters, UserSynic};

/// Why a message or event did not reach a VP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SynicError {
    /// No VP has this index.
    #[error("no VP {vp}")]
    NoVp {
        /// VP index asked for.
        vp: u32,
    },
    /// The VP's message queue is full; the drain trigger fires when it has room again.
    #[error("message queue of VP {vp} is full")]
    QueueFull {
        /// VP index of the full queue.
        vp: u32,
    },
    /// SCONTROL, the event flags page or the SINT is off, so the event went nowhere.
    #[error("the SynIC of VP {vp} takes no events")]
    Disabled {
        /// VP index whose SynIC is off.
        vp: u32,
    },
    /// The SINT, event flag, message type or payload length is out of range.
    #[error("SINT {sint} takes no such message or event")]
    OutOfRange {
        /// SINT asked for.
        sint: u8,
    },
}

/// Lines into a SynIC that the host's kernel keeps beside this one, in hybrid mode: it holds a copy
/// of every SINT register ([`UserSynic::write_msr_forwarding`]) and raises their vectors itself.
///
/// A leaf, like [`MsiSink::raise_msi`](crate::vmm::MsiSink::raise_msi): called under the lock of a
/// VP, must not block or call back.
pub trait SintLines: Send + Sync + Debug {
    /// Raises a SINT of a VP that is neither masked nor polled, as an edge. False if it has no
    /// line: it is raised as an MSI then.
    fn raise(&self, vp: u32, sint: u8) -> bool;
}

/// What the VMBus server and its channels use towards the guest. [`UserSynic`] implements it, with
/// and without a SynIC in the host's kernel beside it.
pub trait SynicPort: Send + Sync + Debug {
    /// Number of VPs; VP indices are `0..vp_count`.
    fn vp_count(&self) -> u32;

    /// Queues a message for a SINT of a VP, in order behind earlier ones of that VP. `payload` is
    /// at most 240 bytes, and `message_type` is not 0.
    ///
    /// # Errors
    ///
    /// [`SynicError::NoVp`], [`SynicError::OutOfRange`] or [`SynicError::QueueFull`].
    fn post_message(
        &self,
        vp: u32,
        sint: u8,
        message_type: u32,
        payload: &[u8],
    ) -> Result<(), SynicError>;

    /// Sets an event flag (0 to 2047) of a SINT of a VP, and raises the SINT if the flag was clear.
    /// Allocation-free; takes no lock but the VP's own.
    ///
    /// # Errors
    ///
    /// [`SynicError::NoVp`], [`SynicError::OutOfRange`] or [`SynicError::Disabled`].
    fn signal_event(&self, vp: u32, sint: u8, flag: u16) -> Result<(), SynicError>;

    /// Drops the messages that are queued for `sint` but not yet in a slot, on all VPs: what is
    /// owed to a guest that disconnected.
    fn discard_messages(&self, sint: u8);

    /// What to trigger when a queue that refused a message has room again.
    fn set_drain_trigger(&self, trigger: Arc<dyn Trigger>);
}
