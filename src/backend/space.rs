//! The host's I/O address space of some devices, as its users see it.
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::io;
use std::ops::RangeInclusive;

bitflags::bitflags! {
    /// What devices may do to memory.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Permissions: u8 {
        /// Read it.
        const READ = 1;
        /// Write it.
        const WRITE = 2;
    }
}

/// What an address space can hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpaceLimits {
    /// I/O virtual addresses that can be mapped, by address: disjoint, first and last byte of each.
    pub ranges: Vec<RangeInclusive<u64>>,
    /// Least length and alignment of a mapping, in bytes: a power of two. Hosts of 4 KiB pages have
    /// 4096.
    pub granule: u64,
    /// Most mappings of the kernel. One [`AddressSpace::map`] takes one for each region of guest RAM
    /// that it covers a part of. `None` if only memory limits them.
    pub max_mappings: Option<usize>,
}

impl SpaceLimits {
    /// True if `iova..iova + len` lies in one of the usable ranges, is not empty and fits the granule.
    pub fn allow(&self, iova: u64, len: u64) -> bool {
        let aligned = (iova | len).is_multiple_of(self.granule);
        let Some(last) = len.checked_sub(1).and_then(|rest| iova.checked_add(rest)) else {
            return false;
        };
        let mut ranges = self.ranges.iter();
        aligned && ranges.any(|range| range.contains(&iova) && range.contains(&last))
    }
}

/// Why an address space is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SpaceError {
    /// A part of the range is mapped already.
    #[error("a part of {iova:#x}+{len:#x} is mapped already")]
    Exists {
        /// First address of the range.
        iova: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The range is empty, unaligned, wraps, or touches addresses that the IOMMU does not translate:
    /// those above its width, and reserved ones such as the interrupt range.
    #[error("{iova:#x}+{len:#x} cannot be mapped by the host's IOMMU")]
    OutOfRange {
        /// First address of the range.
        iova: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The kernel has no room for more mappings.
    #[error("the address space has its {max} mappings already")]
    Full {
        /// Most mappings.
        max: usize,
    },
    /// The limit on locked memory would be exceeded.
    #[error("the limit on locked memory (RLIMIT_MEMLOCK) is reached")]
    Memlock,
    /// A part of the target is not guest RAM, or may not be accessed so.
    #[error("guest memory {gpa:#x}+{len:#x} is not RAM that devices may access so")]
    NotRam {
        /// First guest physical address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A mapping is only partly in the range.
    #[error("a mapping is only partly in {iova:#x}+{len:#x}")]
    PartlyInside {
        /// First address of the range.
        iova: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The host's kernel failed otherwise.
    #[error("the host's kernel refused")]
    Host(#[source] io::Error),
}

/// The I/O address space of one attach unit: what the DMA of its devices reaches.
///
/// Calls may come from any thread; an implementation serialises them. A call that fails leaves the
/// space as it was, but for [`SpaceError::Host`] of [`unmap`](Self::unmap) and
/// [`clear`](Self::clear): after that less may be mapped, never more.
pub trait AddressSpace: Send + Sync + Debug {
    /// Lets devices reach `len` bytes of guest RAM from `gpa` on at `iova`. No part of the range may
    /// be mapped yet. The memory may span several regions of RAM. `access` must not be empty, and
    /// where RAM is read-only it must not ask for more.
    ///
    /// # Errors
    ///
    /// [`SpaceError`]; nothing of the range is mapped then.
    fn map(&self, iova: u64, gpa: u64, len: u64, access: Permissions) -> Result<(), SpaceError>;

    /// Removes the mappings that lie in the range, each as it was made by one call of
    /// [`map`](Self::map); holes are fine. When this returns, no DMA through them is under way or can
    /// start.
    ///
    /// # Errors
    ///
    /// [`SpaceError::PartlyInside`] if a mapping is only partly in the range: neither of the
    /// kernel's interfaces splits mappings. [`SpaceError::OutOfRange`] for an empty range or one that
    /// wraps.
    fn unmap(&self, iova: u64, len: u64) -> Result<(), SpaceError>;

    /// Removes all mappings. When this returns, no DMA is under way or can start.
    ///
    /// # Errors
    ///
    /// [`SpaceError::Host`].
    fn clear(&self) -> Result<(), SpaceError>;

    /// What the space can hold. Does not change while the space lives.
    fn limits(&self) -> &SpaceLimits;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_allowed_inside_one_usable_range_only() {
        let limits = SpaceLimits {
            ranges: vec![0..=0xfedf_ffff, 0xfef0_0000..=0xffff_ffff_ffff],
            granule: 4096,
            max_mappings: None,
        };
        assert!(limits.allow(0, 0xfee0_0000));
        assert!(!limits.allow(0, 0xfee0_1000), "interrupt range");
        assert!(!limits.allow(0xfedf_f000, 0x10_2000), "across the hole");
        assert!(limits.allow(0xffff_ffff_f000, 0x1000), "the last page");
        assert!(!limits.allow(0xffff_ffff_f000, 0x2000));
        assert!(!limits.allow(0x1000, 0) && !limits.allow(0x1800, 0x1000));
        assert!(!limits.allow(0x1000, 0x800));
        assert!(!limits.allow(u64::MAX - 0xfff, 0x2000), "wraps");
    }
}
