//! HvPostMessage and HvSignalEvent (docs/spec/hyperv-guest-interface.md, section 5).
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::sync::Arc;

use crate::hv::HvStatus;
use crate::hv::hypercall::{POST_MESSAGE, PostMessageInput, SIGNAL_EVENT, SignalEventInput};
use crate::hv::synic::EVENT_FLAGS;

use super::{Call, CallFormat, CallGroup};

/// A message from the guest, with its fields checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PostMessage<'a> {
    /// Connection id as the guest gave it. Bits 31:24 are reserved: no connection has them set.
    pub connection_id: u32,
    /// Message type: not 0, bit 31 clear.
    pub message_type: u32,
    /// At most 240 bytes.
    pub payload: &'a [u8],
}

/// Connections towards the host. Called on VP threads: bounded work, no waiting.
pub trait MessageCalls: Send + Sync + Debug {
    /// Takes a message.
    ///
    /// # Errors
    ///
    /// [`HvStatus::INVALID_CONNECTION_ID`], [`HvStatus::INVALID_PORT_ID`], or
    /// [`HvStatus::INSUFFICIENT_BUFFERS`] when the guest is to try again; never drop silently.
    fn post_message(&self, message: &PostMessage<'_>) -> Result<(), HvStatus>;

    /// Signals event `flag` (0 to 2047) of a connection.
    ///
    /// # Errors
    ///
    /// [`HvStatus::INVALID_CONNECTION_ID`], [`HvStatus::INVALID_PARAMETER`] or
    /// [`HvStatus::INVALID_SYNIC_STATE`].
    fn signal_event(&self, connection_id: u32, flag: u16) -> Result<(), HvStatus>;
}

/// The [`CallGroup`] of [`MessageCalls`].
#[derive(Debug)]
pub struct MessageGroup {
    calls: Arc<dyn MessageCalls>,
}

impl MessageGroup {
    /// Serves the calls with `calls`.
    pub fn new(calls: Arc<dyn MessageCalls>) -> Self {
        Self { calls }
    }

    fn post_message(&self, call: &Call<'_>) -> Result<(), HvStatus> {
        let input: PostMessageInput = call.header()?;
        let reserved = input.reserved != 0;
        let bad_type = input.message_type == 0 || input.message_type >> 31 != 0;
        let most = mutant!("post-payload-cut", input.payload.len(), usize::MAX);
        let payload = input.payload.get(..most.min(input.payload_size as usize));
        match payload {
            Some(payload) if !reserved && !bad_type => self.calls.post_message(&PostMessage {
                connection_id: input.connection_id,
                message_type: input.message_type,
                payload,
            }),
            _ => Err(HvStatus::INVALID_PARAMETER),
        }
    }

    fn signal_event(&self, call: &Call<'_>) -> Result<(), HvStatus> {
        let input: SignalEventInput = call.header()?;
        if input.reserved != 0 || input.flag >= EVENT_FLAGS {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        self.calls.signal_event(input.connection_id, input.flag)
    }
}

impl CallGroup for MessageGroup {
    fn format(&self, code: u16) -> Option<CallFormat> {
        const POST: CallFormat = CallFormat::simple(size_of::<PostMessageInput>() as u16);
        const SIGNAL: CallFormat = CallFormat::simple(size_of::<SignalEventInput>() as u16);
        match code {
            POST_MESSAGE => Some(POST),
            SIGNAL_EVENT => Some(SIGNAL),
            _ => None,
        }
    }

    fn execute(&self, call: &Call<'_>, _output: &mut [u8]) -> Result<(), HvStatus> {
        match call.code {
            POST_MESSAGE => self.post_message(call),
            SIGNAL_EVENT => self.signal_event(call),
            _ => Err(HvStatus::INVALID_HYPERCALL_CODE),
        }
    }
}
