//! Numbers of virtio 1.2 that the `virtio-bindings` crate lacks: PCI transport and configuration
//! layouts.
#![forbid(unsafe_code)]

/// PCI vendor id of every virtio device (virtio 1.2, 4.1.2).
pub const PCI_VENDOR: u16 = 0x1af4;
/// PCI device id of a modern device less its virtio device id (virtio 1.2, 4.1.2).
pub const PCI_DEVICE_BASE: u16 = 0x1040;
/// PCI revision id of a device without a legacy interface (virtio 1.2, 4.1.2.1: at least 1).
pub const PCI_REVISION: u8 = 1;
/// PCI capability id of the structures below (vendor specific).
pub const PCI_CAP_VENDOR: u8 = 0x09;

/// `cfg_type` of a virtio structure capability (virtio 1.2, 4.1.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum CapType {
    /// Common configuration.
    Common = 1,
    /// Notifications; the notify offset multiplier follows the capability.
    Notify = 2,
    /// ISR status.
    Isr = 3,
    /// Device-specific configuration.
    Device = 4,
    /// Configuration-space window on the BARs.
    Pci = 5,
}

/// No vector mapped, or the mapping failed (virtio 1.2, 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// ISR status: a queue was used (virtio 1.2, 4.1.4.5).
pub const ISR_QUEUE: u8 = 1;
/// ISR status: the configuration or the status changed.
pub const ISR_CONFIG: u8 = 2;

/// Offsets of the common configuration structure (virtio 1.2, 4.1.4.3).
pub mod common {
    /// Selects the word of `DEVICE_FEATURE`; 32 bits.
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    /// Offered features; 32 bits, read only.
    pub const DEVICE_FEATURE: u64 = 0x04;
    /// Selects the word of `DRIVER_FEATURE`; 32 bits.
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    /// Accepted features; 32 bits.
    pub const DRIVER_FEATURE: u64 = 0x0c;
    /// Vector of configuration changes; 16 bits.
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    /// Number of queues; 16 bits, read only.
    pub const NUM_QUEUES: u64 = 0x12;
    /// Device status; 8 bits.
    pub const DEVICE_STATUS: u64 = 0x14;
    /// Changes with the device configuration; 8 bits, read only.
    pub const CONFIG_GENERATION: u64 = 0x15;
    /// Selects the queue of the registers below; 16 bits.
    pub const QUEUE_SELECT: u64 = 0x16;
    /// Ring entries; 16 bits, 0 when the queue does not exist.
    pub const QUEUE_SIZE: u64 = 0x18;
    /// Vector of the queue; 16 bits.
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    /// 1 when the queue is enabled; 16 bits.
    pub const QUEUE_ENABLE: u64 = 0x1c;
    /// Place of the queue's doorbell in units of the multiplier; 16 bits, read only.
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    /// Descriptor table; 64 bits, accessed as two 32-bit words.
    pub const QUEUE_DESC: u64 = 0x20;
    /// Available ring; 64 bits.
    pub const QUEUE_DRIVER: u64 = 0x28;
    /// Used ring; 64 bits.
    pub const QUEUE_DEVICE: u64 = 0x30;
    /// Length of the structure without the fields of features that are not offered.
    pub const LEN: usize = 0x38;
}

/// Offsets of the block device configuration (virtio 1.2, 5.2.4).
pub mod blk {
    /// Bytes a sector, whatever the block size (virtio 1.2, 5.2.4).
    pub const SECTOR_SIZE: u64 = 512;
    /// Capacity in sectors of 512 bytes; 64 bits.
    pub const CAPACITY: usize = 0x00;
    /// Most bytes in one segment; 32 bits.
    pub const SIZE_MAX: usize = 0x08;
    /// Most data segments in one request; 32 bits.
    pub const SEG_MAX: usize = 0x0c;
    /// Block size in bytes; 32 bits.
    pub const BLK_SIZE: usize = 0x14;
    /// Number of queues; 16 bits.
    pub const NUM_QUEUES: usize = 0x22;
    /// Length of the structure up to the fields of zoned devices.
    pub const LEN: usize = 0x3c;
    /// Length of a request header: type, reserved, sector (virtio 1.2, 5.2.6).
    pub const HEADER_LEN: u64 = 16;
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_bindings::virtio_blk::virtio_blk_config as C;

    #[test]
    fn the_block_configuration_matches_the_kernel_header() {
        assert_eq!(std::mem::offset_of!(C, capacity), blk::CAPACITY);
        assert_eq!(std::mem::offset_of!(C, size_max), blk::SIZE_MAX);
        assert_eq!(std::mem::offset_of!(C, seg_max), blk::SEG_MAX);
        assert_eq!(std::mem::offset_of!(C, blk_size), blk::BLK_SIZE);
        assert_eq!(std::mem::offset_of!(C, num_queues), blk::NUM_QUEUES);
        assert_eq!(std::mem::offset_of!(C, max_secure_erase_sectors), blk::LEN);
    }
}
