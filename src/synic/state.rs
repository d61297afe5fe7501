//! Saved state of the user-space SynIC.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use crate::hv::msr;
use crate::hv::synic::{SINT_COUNT, Sint};
use crate::mem::GuestRam;

use super::vp::{Message, VpSynic, page_is_valid, sint_is_valid};

/// State of a [`super::UserSynic`]. The pages themselves are guest RAM, which the VMM saves.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct SynicState {
    /// Version of this layout: [`SynicState::VERSION`].
    pub version: u32,
    /// One entry for each VP, by index.
    pub vps: Vec<VpSynicState>,
}

impl SynicState {
    /// The one version of this layout.
    pub const VERSION: u32 = 1;
}

/// State of one VP.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct VpSynicState {
    /// SCONTROL.
    pub scontrol: u64,
    /// SIEFP.
    pub siefp: u64,
    /// SIMP.
    pub simp: u64,
    /// SINT0 to SINT15.
    pub sints: [u64; SINT_COUNT],
    /// Messages that wait for a slot, oldest first.
    pub queue: Vec<MessageState>,
    /// A message was refused, so that the drain trigger is due when the queue has room again.
    pub refused: bool,
}

/// A message that waits for a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct MessageState {
    /// SINT, 0 to 15.
    pub sint: u8,
    /// Message type, not 0.
    pub message_type: u32,
    /// At most 240 bytes.
    pub payload: Vec<u8>,
}

/// Why a state was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SynicStateError {
    /// The state is of another version.
    #[error("SynIC state version {version} is not supported")]
    Version {
        /// Version found.
        version: u32,
    },
    /// The state is for another number of VPs.
    #[error("SynIC state of {found} VPs does not fit a partition of {expected}")]
    VpCount {
        /// VPs of this partition.
        expected: usize,
        /// VPs of the state.
        found: usize,
    },
    /// A saved register holds a value that no guest can have put there.
    #[error("MSR {msr:#x} of VP {vp} cannot hold {value:#x}")]
    Value {
        /// VP index.
        vp: usize,
        /// MSR number.
        msr: u32,
        /// Value of the state.
        value: u64,
    },
    /// A saved queue is longer than the limit, or was refusing messages while it had room.
    #[error("message queue of VP {vp} cannot hold {len} messages")]
    Queue {
        /// VP index.
        vp: usize,
        /// Messages of the state.
        len: usize,
    },
    /// A queued message is malformed.
    #[error("queued message {index} of VP {vp} is malformed")]
    Message {
        /// VP index.
        vp: usize,
        /// Place in the queue.
        index: usize,
    },
}

impl From<&VpSynic> for VpSynicState {
    fn from(vp: &VpSynic) -> Self {
        Self {
            scontrol: vp.scontrol,
            siefp: vp.siefp,
            simp: vp.simp,
            sints: vp.sints.map(|sint| sint.0),
            queue: vp.queue.iter().map(MessageState::from).collect(),
            refused: vp.refused,
        }
    }
}

impl From<&Message> for MessageState {
    fn from(message: &Message) -> Self {
        Self {
            sint: message.sint,
            message_type: message.message_type,
            payload: message.payload().to_vec(),
        }
    }
}

impl VpSynicState {
    /// The VP `vp` with this state, if a guest can have brought it there.
    pub(super) fn check(
        &self,
        vp: usize,
        apic_id: u32,
        queue_limit: usize,
        ram: &GuestRam,
    ) -> Result<VpSynic, SynicStateError> {
        for (msr, value) in [(msr::SIEFP, self.siefp), (msr::SIMP, self.simp)] {
            if !page_is_valid(value, ram) {
                return Err(SynicStateError::Value { vp, msr, value });
            }
        }
        let sints = self.sints.map(Sint);
        for (msr, sint) in (msr::SINT0..).zip(sints) {
            if !sint_is_valid(sint) {
                let value = sint.0;
                return Err(SynicStateError::Value { vp, msr, value });
            }
        }
        let len = self.queue.len();
        if len > queue_limit || (self.refused && len < queue_limit) {
            return Err(SynicStateError::Queue { vp, len });
        }
        let messages = self.queue.iter().enumerate().map(|(index, message)| {
            Message::new(message.sint, message.message_type, &message.payload)
                .ok_or(SynicStateError::Message { vp, index })
        });
        let mut restored = VpSynic::new(apic_id);
        restored.queue = messages.collect::<Result<VecDeque<_>, _>>()?;
        restored.scontrol = self.scontrol;
        restored.siefp = self.siefp;
        restored.simp = self.simp;
        restored.sints = sints;
        restored.refused = self.refused;
        Ok(restored)
    }
}
