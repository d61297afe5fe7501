//! From the guest's flushes to the host's.
#![forbid(unsafe_code)]

use super::NestedCapabilities;
use crate::pviommu::FlushRange;

/// Translations that the host is to forget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Invalidation {
    /// All of the table.
    All,
    /// Those of `1 << shift` pages from `first` on, a multiple of their number.
    Pages {
        /// Number of the first 4 KiB page.
        first: u64,
        /// Binary logarithm of the number of pages.
        shift: u8,
    },
}

/// The invalidations for a guest's flush, in its order; all of them in one when a range is larger
/// than the host takes.
pub(super) fn invalidations(
    ranges: &[FlushRange],
    capabilities: &NestedCapabilities,
) -> Vec<Invalidation> {
    if ranges
        .iter()
        .any(|range| range.shift > capabilities.max_shift)
    {
        return vec![Invalidation::All];
    }
    let entry = |range: &FlushRange| Invalidation::Pages {
        first: range.first,
        shift: range.shift,
    };
    ranges.iter().map(entry).collect()
}
