//! What a domain does to a device's addresses, and what goes wrong.
#![forbid(unsafe_code)]

use std::fmt;
use std::ops::Range;

use crate::hv::pviommu::{DOMAIN_DEFAULT, INTERRUPT_RANGE, entry};
use crate::mem::PAGE_SIZE;

/// Direction of a DMA access, seen from the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// The device reads guest memory.
    Read,
    /// The device writes guest memory.
    Write,
}

impl Access {
    /// True for [`Access::Write`].
    #[inline]
    pub(crate) fn writes(self) -> bool {
        self == Self::Write
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// Levels of a first-stage table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Levels {
    /// 4 levels: addresses of 48 bits.
    Four,
    /// 5 levels: addresses of 57 bits.
    Five,
}

impl Levels {
    /// Number of levels.
    pub const fn count(self) -> u8 {
        match self {
            Self::Four => 4,
            Self::Five => 5,
        }
    }

    /// Bits of an address that tables of this height translate.
    pub const fn width(self) -> u8 {
        12 + entry::INDEX_BITS as u8 * self.count()
    }
}

/// A guest's first-stage table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct PageTable {
    /// GPA of the root: a page of guest RAM.
    pub root: u64,
    /// Height.
    pub levels: Levels,
}

/// What happens to a device's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Translation {
    /// An I/O virtual address is a guest physical address.
    Identity,
    /// Every access is a fault.
    Blocked,
    /// Addresses are looked up in the guest's table.
    Paged(PageTable),
}

/// A device's domain, as the back end of the device needs to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attachment {
    /// Number of the domain; 0 is the default domain.
    pub domain: u32,
    /// Where faults are counted for the domain.
    pub(crate) fault_slot: u32,
    /// What the domain does.
    pub translation: Translation,
}

impl Attachment {
    /// The default domain, which is the identity.
    pub const DEFAULT: Self = Self {
        domain: DOMAIN_DEFAULT,
        fault_slot: 0,
        translation: Translation::Identity,
    };
}

/// Pages whose translations are to be forgotten: `1 << shift` of them from `first` on, a multiple of
/// their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlushRange {
    /// Number of the first 4 KiB page.
    pub first: u64,
    /// Binary logarithm of the number of pages, 0 to 52.
    pub shift: u8,
}

/// Why an access does not translate. `level` is that of the table whose entry stands in the way:
/// 1 for the one that maps 4 KiB pages, 4 or 5 for the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum FaultCause {
    /// The domain blocks, or has not been configured yet.
    #[error("the domain blocks")]
    Blocked,
    /// The address has more bits than the domain translates.
    #[error("the address is too wide")]
    Width,
    /// An entry is not present.
    #[error("entry of level {level} is not present")]
    NotPresent {
        /// Level of the entry.
        level: u8,
    },
    /// An entry does not let user accesses pass.
    #[error("entry of level {level} is for supervisors")]
    Supervisor {
        /// Level of the entry.
        level: u8,
    },
    /// An entry does not let writes pass.
    #[error("entry of level {level} is read-only")]
    ReadOnly {
        /// Level of the entry.
        level: u8,
    },
    /// A reserved bit of an entry is set.
    #[error("entry of level {level} has a reserved bit set")]
    Reserved {
        /// Level of the entry.
        level: u8,
    },
    /// A table is not in guest RAM, or in a read-only region of it with an entry that is not marked as
    /// accessed or dirty, and so cannot be.
    #[error("table of level {level} is not in RAM")]
    TableNotRam {
        /// Level of the table.
        level: u8,
    },
    /// The guest kept changing an entry while its accessed or dirty bit was to be set.
    #[error("entry of level {level} does not hold still")]
    Unstable {
        /// Level of the entry.
        level: u8,
    },
    /// The address, or what it translates to, is not guest RAM, or for a write not RAM that can be
    /// written.
    #[error("not guest RAM")]
    NotRam,
    /// The access touches the interrupt range and is not a message.
    #[error("interrupt range")]
    InterruptRange,
}

/// An access that did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaFault {
    /// Number of the domain that the device was in.
    pub domain: u32,
    /// First I/O virtual address of the access that does not translate.
    pub iova: u64,
    /// Bytes of the access from there on.
    pub len: u64,
    /// Its direction.
    pub access: Access,
    /// What was wrong.
    pub cause: FaultCause,
}

impl fmt::Display for DmaFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            iova,
            len,
            access,
            cause,
        } = self;
        write!(
            f,
            "{access} of {len} bytes at {iova:#x} in domain {domain}: {cause}"
        )
    }
}

/// True if any byte of `iova..iova + len` is in the interrupt range. The sum must not wrap.
pub(crate) fn touches_interrupts(iova: u64, len: u64) -> bool {
    let Range { start, end } = INTERRUPT_RANGE;
    iova < end && iova + len > start && !mutant!("interrupts-translated")
}

/// Bytes of a leaf page of `level` (1 to 3).
pub(crate) const fn leaf_size(level: u8) -> u64 {
    PAGE_SIZE << (entry::INDEX_BITS * (level as u32 - 1))
}
