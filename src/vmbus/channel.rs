//! What a device behind a VMBus channel implements, and what it is given.
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

use uuid::Uuid;

use super::ring::{RingError, RingReader, RingWriter};
use crate::synic::SynicPort;

/// What the guest finds a channel by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct ChannelIdentity {
    /// Interface (class) GUID: which driver binds.
    pub class: Uuid,
    /// Instance GUID: unique over all classes, because Linux matches offers by it alone.
    pub instance: Uuid,
}

/// Why a device does not open its channel. The guest sees one failure status for all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The device is going away or not ready.
    #[error("the device is not ready")]
    NotReady,
    /// The rings are unusable.
    #[error("unusable rings")]
    Ring(#[from] RingError),
}

/// Rings and interrupt of an open channel.
#[derive(Debug)]
pub struct OpenedChannel {
    /// Guest-to-host ring.
    pub reader: RingReader,
    /// Host-to-guest ring.
    pub writer: RingWriter,
    /// The channel's interrupt towards the guest.
    pub signal: ChannelSignal,
}

/// A device behind a channel.
///
/// [`open`](Self::open) and [`close`](Self::close) come from the VMBus worker, or from a thread that
/// resets, saves, restores or removes, one at a time and in turn. VMBus' `step` is held, which makes
/// them so, and no other lock of it; they may take the lock of the device's own worker, whose steps
/// are bounded.
pub trait ChannelDevice: Send + Sync + Debug {
    /// The channel's identity; constant.
    fn identity(&self) -> ChannelIdentity;

    /// The guest opened the channel. Signals may arrive before this returns. The device must look
    /// at the guest-to-host ring once by itself: the guest may have written before.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: the guest is told that the open failed. The rings must be dropped then.
    fn open(&self, channel: OpenedChannel) -> Result<(), OpenError>;

    /// The channel is closed, by the guest or because the connection or the offer ended. Returns
    /// only when nothing of the device touches a ring or GPADL page any more, and none of its work
    /// for the guest, such as DMA, is under way.
    fn close(&self);

    /// The guest signalled the channel. Called on a VP's thread, for each signal: only triggers a
    /// worker. May come at any time, also for a closed channel, and proves nothing.
    fn signalled(&self);

    /// An eventfd whose signal does the same as [`signalled`](Self::signalled), so that the host's
    /// kernel can pass signals on by itself. Without one they all come that way.
    fn eventfd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A channel's interrupt towards the guest: its event flag at its target VP. Clones share the
/// target.
#[derive(Debug, Clone)]
pub struct ChannelSignal {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    synic: Arc<dyn SynicPort>,
    sint: u8,
    flag: u16,
    /// Target VP, none while interrupts are off. Held during delivery, so that nothing is
    /// delivered to a former target once it has been replaced.
    target: Mutex<Option<u32>>,
}

impl ChannelSignal {
    /// Event flag `flag` (0 to 2047) of `sint`, delivered to `target`, or nowhere if there is none.
    pub fn new(synic: Arc<dyn SynicPort>, sint: u8, flag: u16, target: Option<u32>) -> Self {
        let target = Mutex::new(target);
        Self {
            shared: Arc::new(Shared {
                synic,
                sint,
                flag,
                target,
            }),
        }
    }

    /// Signals the guest. Nothing happens while the target is none or its SynIC is off.
    pub fn signal(&self) {
        let Shared {
            synic,
            sint,
            flag,
            target,
        } = &*self.shared;
        let target = target.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(vp) = *target {
            // A VP with its SynIC off has told us that it takes no interrupt.
            let _ = synic.signal_event(vp, *sint, *flag);
        }
    }

    /// Replaces the target VP. When this returns no signal reaches the former one any more.
    pub(crate) fn set_target(&self, target: Option<u32>) {
        *self
            .shared
            .target
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = target;
    }
}
