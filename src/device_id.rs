//! Logical device ids: how hypercalls name a function of a bus.
#![forbid(unsafe_code)]

use std::fmt;

use uuid::Uuid;

/// Names a function of a partition in HVCALL_RETARGET_INTERRUPT and the device domain calls
/// (docs/spec/vpci.md#vpci-1-1). Bits 2:0 are the function number,
/// the rest comes from the bus's instance GUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LogicalDeviceId(u32);

impl LogicalDeviceId {
    /// The id of function `function` (0 to 7; higher bits are ignored) on the bus `instance`.
    pub fn new(instance: &Uuid, function: u8) -> Self {
        let (_, data2, data3, _) = instance.as_fields();
        Self(u32::from(data2) << 16 | u32::from(data3 & 0xfff8) | u32::from(function & 7))
    }

    /// The id that a retarget call means: Linux computes it in a signed 32-bit variable, so its
    /// upper half is the sign of the lower one and says nothing.
    pub fn from_retarget(device_id: u64) -> Self {
        Self(device_id as u32)
    }

    /// The id that a device domain call carries (docs/spec/pviommu.md#pviommu-1): a logical device
    /// whose upper half is zero, or all ones when bit 31 is set, as older drivers computed it in a
    /// signed variable. `None` for anything else.
    pub fn from_domain_call(device_id: u64) -> Option<Self> {
        let id = device_id as u32;
        let upper = (device_id >> 32) as u32;
        let extended = upper == u32::MAX && id >> 31 != 0 && !mutant!("id-sign-refused");
        (upper == 0 || extended || mutant!("id-any-upper-half")).then_some(Self(id))
    }

    /// The id, zero-extended.
    pub fn code(self) -> u64 {
        u64::from(self.0)
    }

    /// Function number on the bus, 0 to 7.
    pub fn function(self) -> u8 {
        (self.0 & 7) as u8
    }
}

impl fmt::Display for LogicalDeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::uuid;

    #[test]
    fn the_id_is_made_of_data2_data3_and_the_function() {
        let instance = uuid!("00000001-1234-ab78-0000-000000000000");
        let id = LogicalDeviceId::new(&instance, 1);
        assert_eq!(id.code(), 0x1234_ab79);
        assert_eq!(id.function(), 1);
        assert_eq!(id.to_string(), "0x1234ab79");
    }

    #[test]
    fn the_low_bits_of_data3_do_not_reach_the_id() {
        let a = uuid!("00000001-1234-ab7f-0000-000000000000");
        let b = uuid!("00000002-1234-ab78-ffff-ffffffffffff");
        assert_eq!(LogicalDeviceId::new(&a, 7), LogicalDeviceId::new(&b, 7));
    }

    #[test]
    fn a_sign_extended_id_is_recognised() {
        let instance = uuid!("00000001-9234-ab78-0000-000000000000");
        let id = LogicalDeviceId::new(&instance, 1);
        assert_eq!(
            LogicalDeviceId::from_retarget(0xffff_ffff_9234_ab79),
            LogicalDeviceId::from_retarget(0x9234_ab79)
        );
        assert_eq!(LogicalDeviceId::from_retarget(0x9234_ab79), id);
    }

    #[test]
    fn domain_calls_take_a_zero_upper_half_or_a_true_sign_extension() {
        let parse = |id| LogicalDeviceId::from_domain_call(id).map(LogicalDeviceId::code);
        assert_eq!(parse(0x1234_ab79), Some(0x1234_ab79));
        assert_eq!(parse(0x9234_ab79), Some(0x9234_ab79));
        assert_eq!(parse(0xffff_ffff_9234_ab79), Some(0x9234_ab79));
        // A sign that the lower half does not have.
        assert_eq!(parse(0xffff_ffff_1234_ab79), None);
        // Other device types, in bits 63:62, and ids that are too long.
        for upper in [1, 0x4000_0000, 0x8000_0000, 0xc000_0000, 0xffff_fffe_u64] {
            assert_eq!(parse(upper << 32 | 0x9234_ab79), None, "{upper:#x}");
        }
    }

    #[test]
    fn the_id_follows_the_guid_bytes_of_the_wire() {
        let instance = uuid!("00000001-8765-4321-0000-000000000000");
        let b = instance.to_bytes_le();
        let want = u32::from(b[5]) << 24
            | u32::from(b[4]) << 16
            | u32::from(b[7]) << 8
            | u32::from(b[6] & 0xf8);
        assert_eq!(LogicalDeviceId::new(&instance, 0).code(), u64::from(want));
    }
}
