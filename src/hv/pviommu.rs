//! Device domain hypercalls and first-stage page tables (docs/spec/pviommu.md).
#![forbid(unsafe_code)]

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// HvCallCreateDeviceDomain (docs/spec/pviommu.md#IO-2-01, as the codes below).
pub const CREATE_DEVICE_DOMAIN: u16 = 0x00b1;
/// HvCallAttachDeviceDomain.
pub const ATTACH_DEVICE_DOMAIN: u16 = 0x00b2;
/// HvCallDetachDeviceDomain.
pub const DETACH_DEVICE_DOMAIN: u16 = 0x00c4;
/// HvCallDeleteDeviceDomain.
pub const DELETE_DEVICE_DOMAIN: u16 = 0x00c5;
/// HvCallConfigureDeviceDomain.
pub const CONFIGURE_DEVICE_DOMAIN: u16 = 0x00ce;
/// HvCallFlushDeviceDomain.
pub const FLUSH_DEVICE_DOMAIN: u16 = 0x00d0;
/// HvCallFlushDeviceDomainVirtualAddressList, a rep call.
pub const FLUSH_DEVICE_DOMAIN_LIST: u16 = 0x00d1;
/// HvCallGetIommuCapabilities.
pub const GET_IOMMU_CAPABILITIES: u16 = 0x0125;
/// HvCallGetLogicalDeviceProperty.
pub const GET_LOGICAL_DEVICE_PROPERTY: u16 = 0x0127;

/// [`DeviceDomain::owner_vtl`]: the virtual trust level, of which only 0 exists here.
pub const VTL_MASK: u8 = 0x0f;
/// [`DeviceDomain::owner_vtl`]: the level is given.
pub const VTL_USE: u8 = 1 << 4;

/// [`DeviceDomain::domain_id`], bits 3:0: a second-stage domain.
pub const DOMAIN_TYPE_S2: u64 = 0;
/// [`DeviceDomain::domain_id`], bits 3:0: a first-stage domain.
pub const DOMAIN_TYPE_S1: u64 = 1;
/// Number of the default domain (docs/spec/pviommu.md#IO-2-08).
pub const DOMAIN_DEFAULT: u32 = 0;
/// Number of the null domain.
pub const DOMAIN_NULL: u32 = u32::MAX;

/// Names a domain; first in most inputs (docs/spec/pviommu.md#pviommu-2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceDomain {
    /// Offset 0: [`PARTITION_SELF`](crate::hv::hypercall::PARTITION_SELF).
    pub partition_id: u64,
    /// Offset 8: bits 3:0 level, bit 4 use, bits 7:5 zero.
    pub owner_vtl: u8,
    /// Offset 9: zero.
    pub reserved: [u8; 7],
    /// Offset 16: bits 3:0 type, bits 31:4 zero, bits 63:32 number.
    pub domain_id: u64,
}

bitflags! {
    /// Flags of [`CreateInput`] (docs/spec/pviommu.md#IO-2-09).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct CreateFlags: u32 {
        /// Forward progress is required.
        const FORWARD_PROGRESS = 1 << 0;
        /// The domain belongs to the caller's level.
        const INHERIT_OWNING_VTL = 1 << 1;
    }
}

/// Input of HvCallCreateDeviceDomain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed(4))]
pub struct CreateInput {
    /// Offset 0.
    pub domain: DeviceDomain,
    /// Offset 24: [`CreateFlags`].
    pub flags: u32,
}

/// Input of HvCallDeleteDeviceDomain.
pub type DeleteInput = DeviceDomain;

/// Input of HvCallAttachDeviceDomain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AttachInput {
    /// Offset 0.
    pub domain: DeviceDomain,
    /// Offset 24: logical device id.
    pub device_id: u64,
}

/// Input of HvCallDetachDeviceDomain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DetachInput {
    /// Offset 0: self.
    pub partition_id: u64,
    /// Offset 8: logical device id.
    pub device_id: u64,
}

bitflags! {
    /// Flags of [`ConfigureInput`] (docs/spec/pviommu.md#IO-2-13).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct ConfigureFlags: u64 {
        /// Addresses are translated; identity otherwise.
        const TRANSLATION_ENABLED = 1 << 0;
        /// Nothing passes.
        const BLOCKED = 1 << 1;
        /// The tables have 5 levels instead of 4.
        const FIVE_LEVELS = 1 << 2;
    }
}

/// Input of HvCallConfigureDeviceDomain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigureInput {
    /// Offset 0.
    pub domain: DeviceDomain,
    /// Offset 24: [`ConfigureFlags`].
    pub flags: u64,
    /// Offset 32: GPA of the page-table root.
    pub root: u64,
}

/// Input of HvCallFlushDeviceDomain, and fixed header of
/// HvCallFlushDeviceDomainVirtualAddressList.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlushInput {
    /// Offset 0.
    pub domain: DeviceDomain,
    /// Offset 24: zero, or for a list [`FLUSH_IOMMU_FORMAT`].
    pub flags: u32,
    /// Offset 28: zero.
    pub reserved: u32,
}

/// [`FlushInput::flags`] of a list: elements have the IOMMU format. Always set.
pub const FLUSH_IOMMU_FORMAT: u32 = 1 << 0;

/// An element of a flush list (docs/spec/pviommu.md#IO-2-15).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct FlushElement(pub u64);

impl FlushElement {
    /// Largest shift: all bits of the page number.
    pub const MAX_SHIFT: u16 = 52;

    /// The element of `1 << shift` pages from page `page` on.
    pub const fn new(page: u64, shift: u16) -> Self {
        Self(page << 12 | (shift as u64 & 0xfff))
    }

    /// Bits 11:0: low bits of the page number that do not count.
    pub const fn shift(self) -> u16 {
        (self.0 & 0xfff) as u16
    }

    /// Bits 63:12: page number.
    pub const fn page(self) -> u64 {
        self.0 >> 12
    }
}

/// Input of HvCallGetIommuCapabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CapabilitiesInput {
    /// Offset 0: self.
    pub partition_id: u64,
    /// Offset 8: zero.
    pub reserved: u64,
}

bitflags! {
    /// [`CapabilitiesOutput::capabilities`] (docs/spec/pviommu.md#IO-2-18).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Capabilities: u64 {
        /// There is a pvIOMMU.
        const PRESENT = 1 << 0;
        /// Second-stage domains.
        const S2 = 1 << 1;
        /// First-stage domains.
        const S1 = 1 << 2;
        /// First-stage tables of 5 levels.
        const S1_5_LEVEL = 1 << 3;
        /// Process address spaces.
        const PASID = 1 << 4;
        /// Address translation service.
        const ATS = 1 << 5;
        /// Page request interface.
        const PRI = 1 << 6;
    }
}

/// Output of HvCallGetIommuCapabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CapabilitiesOutput {
    /// Offset 0: size of this structure.
    pub size: u32,
    /// Offset 4: zero.
    pub reserved: u16,
    /// Offset 6: bits of an I/O virtual address.
    pub max_iova_width: u8,
    /// Offset 7: bits of a PASID.
    pub max_pasid_width: u8,
    /// Offset 8: [`Capabilities`].
    pub capabilities: u64,
    /// Offset 16: bit n for pages of `1 << n` bytes.
    pub page_sizes: u64,
}

/// [`PropertyInput::code`]: whether the device is behind the pvIOMMU.
pub const PROPERTY_PVIOMMU: u32 = 10;

/// Input of HvCallGetLogicalDeviceProperty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PropertyInput {
    /// Offset 0: self.
    pub partition_id: u64,
    /// Offset 8: logical device id.
    pub device_id: u64,
    /// Offset 16: [`PROPERTY_PVIOMMU`].
    pub code: u32,
    /// Offset 20: zero.
    pub reserved: u32,
}

/// Output of HvCallGetLogicalDeviceProperty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PropertyOutput {
    /// Offset 0: for [`PROPERTY_PVIOMMU`], bit 0 says that the device is behind it.
    pub value: u64,
    /// Offset 8: zero.
    pub reserved: u64,
}

/// Entries of first-stage tables (docs/spec/pviommu.md#pviommu-5): x86-64, 512 of 8 bytes a table.
pub mod entry {
    /// Bit 0: the entry leads somewhere.
    pub const PRESENT: u64 = 1 << 0;
    /// Bit 1: writes pass.
    pub const WRITABLE: u64 = 1 << 1;
    /// Bit 2: user accesses pass, and DMA is one.
    pub const USER: u64 = 1 << 2;
    /// Bit 5: used.
    pub const ACCESSED: u64 = 1 << 5;
    /// Bit 6: written through; leaves only.
    pub const DIRTY: u64 = 1 << 6;
    /// Bit 7: a leaf of 2 MiB at level 2 or of 1 GiB at level 3.
    pub const PAGE_SIZE: u64 = 1 << 7;
    /// Bits 51:12: address of the table or page.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    /// Entries of a table.
    pub const COUNT: u64 = 512;
    /// Bits of the index into a table.
    pub const INDEX_BITS: u32 = 9;
}

/// First address of the interrupt range, which is never translated
/// (docs/spec/pviommu.md#IO-5-05).
pub const INTERRUPT_RANGE: std::ops::Range<u64> = 0xfee0_0000..0xfef0_0000;

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    #[test]
    fn inputs_and_outputs_have_the_documented_layout() {
        assert_eq!(size_of::<DeviceDomain>(), 24);
        assert_eq!(offset_of!(DeviceDomain, owner_vtl), 8);
        assert_eq!(offset_of!(DeviceDomain, reserved), 9);
        assert_eq!(offset_of!(DeviceDomain, domain_id), 16);
        assert_eq!(size_of::<CreateInput>(), 28);
        assert_eq!(offset_of!(CreateInput, flags), 24);
        assert_eq!(size_of::<DeleteInput>(), 24);
        assert_eq!(size_of::<AttachInput>(), 32);
        assert_eq!(offset_of!(AttachInput, device_id), 24);
        assert_eq!(size_of::<DetachInput>(), 16);
        assert_eq!(offset_of!(DetachInput, device_id), 8);
        assert_eq!(size_of::<ConfigureInput>(), 40);
        assert_eq!(offset_of!(ConfigureInput, flags), 24);
        assert_eq!(offset_of!(ConfigureInput, root), 32);
        assert_eq!(size_of::<FlushInput>(), 32);
        assert_eq!(offset_of!(FlushInput, flags), 24);
        assert_eq!(offset_of!(FlushInput, reserved), 28);
        assert_eq!(size_of::<FlushElement>(), 8);
        assert_eq!(size_of::<CapabilitiesInput>(), 16);
        assert_eq!(size_of::<CapabilitiesOutput>(), 24);
        assert_eq!(offset_of!(CapabilitiesOutput, reserved), 4);
        assert_eq!(offset_of!(CapabilitiesOutput, max_iova_width), 6);
        assert_eq!(offset_of!(CapabilitiesOutput, max_pasid_width), 7);
        assert_eq!(offset_of!(CapabilitiesOutput, capabilities), 8);
        assert_eq!(offset_of!(CapabilitiesOutput, page_sizes), 16);
        assert_eq!(size_of::<PropertyInput>(), 24);
        assert_eq!(offset_of!(PropertyInput, device_id), 8);
        assert_eq!(offset_of!(PropertyInput, code), 16);
        assert_eq!(offset_of!(PropertyInput, reserved), 20);
        assert_eq!(size_of::<PropertyOutput>(), 16);
        assert_eq!(offset_of!(PropertyOutput, reserved), 8);
    }

    #[test]
    fn a_flush_element_splits_at_bit_12() {
        let element = FlushElement(0xabcd_e123_4567_8034);
        assert_eq!(element.shift(), 0x034);
        assert_eq!(element.page(), 0xa_bcde_1234_5678);
        assert_eq!(FlushElement::new(element.page(), 0x34), element);
    }
}
