//! Why messages of the guest had no effect, counted.
#![forbid(unsafe_code)]

/// Why a message of the guest had no effect and no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drop {
    Short,
    Unknown,
    HostOnly,
    NotOffered,
    NotConnected,
    BadTarget,
    UnknownChannel,
    UnknownGpadl,
    WrongState,
    Rescinded,
}

/// Counts since the server was made. Messages are counted under one drop reason, if any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct VmBusCounters {
    /// Messages handled, those dropped included.
    pub messages: u64,
    /// Connections made.
    pub connections: u64,
    /// INITIATE_CONTACT answered with "not supported".
    pub contacts_refused: u64,
    /// GPADL_HEADER or GPADL_BODY answered with a failure.
    pub gpadls_refused: u64,
    /// OPEN_CHANNEL answered with a failure.
    pub opens_refused: u64,
    /// MODIFY_CHANNEL refused.
    pub modifies_refused: u64,
    /// Dropped: shorter than its structure.
    pub dropped_short: u64,
    /// Dropped: no message has this number.
    pub dropped_unknown: u64,
    /// Dropped: only a host sends it.
    pub dropped_host_only: u64,
    /// Dropped: belongs to a feature or a version that was not negotiated.
    pub dropped_not_offered: u64,
    /// Dropped: the guest is not connected.
    pub dropped_not_connected: u64,
    /// Dropped: INITIATE_CONTACT for a VP, SINT or VTL that does not exist.
    pub dropped_bad_target: u64,
    /// Dropped: no channel with this relid is offered.
    pub dropped_unknown_channel: u64,
    /// Dropped: no such GPADL.
    pub dropped_unknown_gpadl: u64,
    /// Dropped: not possible in the present state (docs/spec/vmbus.md#vmbus-5-1).
    pub dropped_wrong_state: u64,
    /// Dropped: the channel is rescinded; normal during a removal.
    pub dropped_rescinded: u64,
    /// Refused with HV_STATUS_INSUFFICIENT_BUFFERS; the guest retries.
    pub inbox_full: u64,
    /// Messages not yet handled that a new INITIATE_CONTACT or UNLOAD made void.
    pub superseded: u64,
}

impl VmBusCounters {
    pub(crate) fn count_drop(&mut self, reason: Drop) {
        let counter = match reason {
            Drop::Short => &mut self.dropped_short,
            Drop::Unknown => &mut self.dropped_unknown,
            Drop::HostOnly => &mut self.dropped_host_only,
            Drop::NotOffered => &mut self.dropped_not_offered,
            Drop::NotConnected => &mut self.dropped_not_connected,
            Drop::BadTarget => &mut self.dropped_bad_target,
            Drop::UnknownChannel => &mut self.dropped_unknown_channel,
            Drop::UnknownGpadl => &mut self.dropped_unknown_gpadl,
            Drop::WrongState => &mut self.dropped_wrong_state,
            Drop::Rescinded => &mut self.dropped_rescinded,
        };
        *counter += 1;
    }
}
