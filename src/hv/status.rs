//! Hypercall statuses (docs/spec/hyperv-guest-interface.md, section 3.4; TLFS, "HV_STATUS").
#![forbid(unsafe_code)]

use std::fmt;

/// A failing hypercall status: bits 15:0 of the hypercall result. Success is not one of them, so
/// that `Result<_, HvStatus>` says what happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HvStatus(u16);

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $value:literal;)*) => {
        impl HvStatus {
            $($(#[$doc])* pub const $name: Self = Self($value);)*

            /// The TLFS name without its `HV_STATUS_` prefix, or `None` for a value that this
            /// library never returns.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    /// The call code is unknown or not offered.
    INVALID_HYPERCALL_CODE = 0x0002;
    /// The control word is malformed.
    INVALID_HYPERCALL_INPUT = 0x0003;
    /// A parameter list is misaligned, crosses a page, or is outside guest memory.
    INVALID_ALIGNMENT = 0x0004;
    /// A field has a bad value, or a reserved field is not zero.
    INVALID_PARAMETER = 0x0005;
    /// The partition lacks the privilege.
    ACCESS_DENIED = 0x0006;
    /// The operation is not possible in the present state.
    OPERATION_DENIED = 0x0008;
    /// GET_LOGICAL_DEVICE_PROPERTY was asked for an unknown property.
    UNKNOWN_PROPERTY = 0x0009;
    /// No memory; a Linux guest retries HvPostMessage.
    INSUFFICIENT_MEMORY = 0x000b;
    /// The partition id is not "self".
    INVALID_PARTITION_ID = 0x000d;
    /// No such VP.
    INVALID_VP_INDEX = 0x000e;
    /// The port is gone or of another kind.
    INVALID_PORT_ID = 0x0011;
    /// No such connection.
    INVALID_CONNECTION_ID = 0x0012;
    /// A queue is full; the guest is to retry.
    INSUFFICIENT_BUFFERS = 0x0013;
    /// The SynIC or its event flags page is off.
    INVALID_SYNIC_STATE = 0x0018;
    /// The object is in use.
    OBJECT_IN_USE = 0x0019;
    /// The limit on device domains is reached.
    INSUFFICIENT_DEVICE_DOMAINS = 0x0038;
    /// No logical device has this id.
    INVALID_DEVICE_ID = 0x0057;
    /// The logical device is not behind the pvIOMMU, or is being removed.
    INVALID_DEVICE_STATE = 0x0058;
    /// The number of a new object is in use.
    KEY_ALREADY_EXISTS = 0x0065;
    /// The logical device is in that domain already.
    DEVICE_ALREADY_IN_DOMAIN = 0x0066;
    /// The host could not do it.
    OPERATION_FAILED = 0x0071;
}

impl HvStatus {
    /// The status as it stands in the hypercall result.
    pub const fn code(self) -> u16 {
        self.0
    }
}

impl fmt::Display for HvStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "HV_STATUS_{name} ({:#06x})", self.0),
            None => write!(f, "HV_STATUS {:#06x}", self.0),
        }
    }
}

impl std::error::Error for HvStatus {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_print_their_tlfs_name_and_value() {
        let text = HvStatus::INVALID_CONNECTION_ID.to_string();
        assert_eq!(text, "HV_STATUS_INVALID_CONNECTION_ID (0x0012)");
    }
}
