//! Answers of the kernel that carry a chain of capabilities: of a region, and of a type1 IOMMU.
#![forbid(unsafe_code)]

use std::ops::{Range, RangeInclusive};

use vfio_bindings::bindings::vfio;

/// Most capabilities of an answer that are looked at.
const MAX_CAPABILITIES: usize = 64;
/// Length of the head of a capability in bytes: id, version, place of the next.
const HEAD: usize = size_of::<vfio::vfio_info_cap_header>();

/// The 32-bit word at `offset`, as this machine stores it.
pub(super) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let word = bytes.get(offset..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*word))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    let word = bytes.get(offset..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*word))
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    let word = bytes.get(offset..)?.first_chunk()?;
    Some(u16::from_ne_bytes(*word))
}

/// What follows the head of the capability `id`, if the chain that begins at `first` has it.
fn capability(bytes: &[u8], first: u32, id: u32) -> Option<&[u8]> {
    let mut at = first as usize;
    for _ in 0..MAX_CAPABILITIES {
        // The answer's own head is in front of all of them.
        if at < HEAD {
            return None;
        }
        if u32::from(u16_at(bytes, at)?) == id {
            return bytes.get(at + HEAD..);
        }
        at = u32_at(bytes, at + 4)? as usize;
    }
    None
}

/// A list of pairs of numbers behind its count and 4 reserved bytes.
fn pairs(bytes: &[u8]) -> Option<Vec<(u64, u64)>> {
    let count = u32_at(bytes, 0)? as usize;
    let list = bytes.get(8..)?;
    // Fewer than promised is no list at all.
    if count > list.len() / 16 {
        return None;
    }
    let pair = |i| Some((u64_at(list, 16 * i)?, u64_at(list, 16 * i + 8)?));
    (0..count).map(pair).collect()
}

/// A part of a VFIO device: a BAR, its ROM, its configuration space.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Region {
    /// Bytes; 0 if the device has no such region.
    pub size: u64,
    /// It can be read.
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
    /// Parts that can be mapped into this process, by offset in bytes: disjoint, in order, inside the
    /// region, not empty.
    pub mappable: Vec<Range<u64>>,
    /// Where it begins in the device's file.
    pub(super) offset: u64,
}

impl Region {
    /// Reads the answer of VFIO_DEVICE_GET_REGION_INFO; `None` if it is cut off.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let flags = u32_at(bytes, 4)?;
        let cap_offset = u32_at(bytes, 12)?;
        let size = u64_at(bytes, 16)?;
        let offset = u64_at(bytes, 24)?;
        let has = |flag| flags & flag != 0;
        let mut region = Self {
            size,
            readable: has(vfio::VFIO_REGION_INFO_FLAG_READ),
            writable: has(vfio::VFIO_REGION_INFO_FLAG_WRITE),
            mappable: Vec::new(),
            offset,
        };
        // The file's addresses are those of pread(2).
        let end = offset.checked_add(size)?;
        if i64::try_from(end).is_err() {
            return None;
        }
        if !has(vfio::VFIO_REGION_INFO_FLAG_MMAP) || size == 0 {
            return Some(region);
        }
        let sparse = has(vfio::VFIO_REGION_INFO_FLAG_CAPS)
            .then(|| capability(bytes, cap_offset, vfio::VFIO_REGION_INFO_CAP_SPARSE_MMAP))
            .flatten();
        match sparse {
            None => region.mappable.push(0..size),
            Some(sparse) => region.mappable = Self::areas(sparse, size)?,
        }
        Some(region)
    }

    fn areas(sparse: &[u8], size: u64) -> Option<Vec<Range<u64>>> {
        let mut areas: Vec<_> = pairs(sparse)?
            .into_iter()
            .filter(|(_, len)| *len != 0)
            .map(|(offset, len)| Some(offset..offset.checked_add(len)?))
            .collect::<Option<_>>()?;
        areas.sort_by_key(|area| area.start);
        let disjoint = areas.windows(2).all(|pair| pair[0].end <= pair[1].start);
        let inside = areas.last().is_none_or(|area| area.end <= size);
        (disjoint && inside).then_some(areas)
    }
}

/// What a type1 IOMMU can do: the answer of VFIO_IOMMU_GET_INFO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Type1Info {
    /// Page sizes: a bit for each. A mapping is a multiple of the least.
    pub page_sizes: u64,
    /// Addresses that can be mapped; all of them on a kernel that does not tell.
    pub ranges: Vec<RangeInclusive<u64>>,
    /// Mappings that there is room for now, if the kernel tells.
    pub available: Option<u32>,
}

impl Type1Info {
    /// Reads the answer; `None` if it is cut off.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let flags = u32_at(bytes, 4)?;
        let page_sizes = u64_at(bytes, 8)?;
        let cap_offset = u32_at(bytes, 16)?;
        let find = |id| {
            let has = flags & vfio::VFIO_IOMMU_INFO_CAPS != 0;
            has.then(|| capability(bytes, cap_offset, id)).flatten()
        };
        let ranges = match find(vfio::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE) {
            None => vec![0..=u64::MAX],
            Some(list) => pairs(list)?.into_iter().map(|(a, b)| a..=b).collect(),
        };
        let available = find(vfio::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL);
        Some(Self {
            page_sizes: match flags & vfio::VFIO_IOMMU_INFO_PGSIZES {
                0 => 4096,
                _ => page_sizes,
            },
            ranges,
            available: available.and_then(|bytes| u32_at(bytes, 0)),
        })
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of areas")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The bytes of 32-bit words.
    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// A 64-bit number as two words.
    fn long(value: u64) -> [u32; 2] {
        let bytes = value.to_ne_bytes();
        [0, 4].map(|at| u32_at(&bytes, at).unwrap())
    }

    fn head(id: u16, next: u32) -> [u32; 2] {
        let [a, b] = id.to_ne_bytes();
        let [c, d] = 1u16.to_ne_bytes();
        [u32::from_ne_bytes([a, b, c, d]), next]
    }

    fn region(flags: u32, cap_offset: u32, size: u64, tail: &[u32]) -> Vec<u8> {
        let mut words = vec![0, flags, 2, cap_offset];
        words.extend(long(size));
        words.extend(long(0x2_0000_0000));
        words.extend(tail);
        bytes(&words)
    }

    #[test]
    fn a_region_without_areas_is_mappable_as_a_whole() {
        let found = Region::parse(&region(7, 0, 0x4000, &[])).unwrap();
        assert_eq!(found.mappable, [0..0x4000]);
        assert_eq!(found.offset, 0x2_0000_0000);
        assert!(found.readable && found.writable);
        let none = Region::parse(&region(3, 0, 0x4000, &[])).unwrap();
        assert!(none.mappable.is_empty());
        let empty = Region::parse(&region(0, 0, 0, &[])).unwrap();
        assert_eq!((empty.size, empty.readable), (0, false));
    }

    #[test]
    fn areas_come_from_a_capability_anywhere_in_the_chain() {
        // First MSIX_MAPPABLE at 32, then the areas at 40.
        let mut tail = head(3, 40).to_vec();
        tail.extend(head(1, 0));
        tail.extend([2, 0]);
        for part in [0x3000, 0x1000, 0, 0x2000] {
            tail.extend(long(part));
        }
        let found = Region::parse(&region(0xf, 32, 0x4000, &tail)).unwrap();
        assert_eq!(found.mappable, [0..0x2000, 0x3000..0x4000]);
        // The same without the flag that there are capabilities.
        let found = Region::parse(&region(7, 32, 0x4000, &tail)).unwrap();
        assert_eq!(found.mappable, [0..0x4000]);
        // An area that is not in the region.
        assert_eq!(Region::parse(&region(0xf, 32, 0x3800, &tail)), None);
        // Fewer areas than promised.
        tail[4] = 3;
        assert_eq!(Region::parse(&region(0xf, 32, 0x4000, &tail)), None);
    }

    #[test]
    fn a_chain_that_turns_back_ends() {
        let tail = head(9, 32);
        let found = Region::parse(&region(0xf, 32, 0x4000, &tail)).unwrap();
        assert_eq!(found.mappable, [0..0x4000]);
    }

    #[test]
    fn a_type1_iommu_tells_ranges_sizes_and_room() {
        let mut words = vec![0, 3];
        words.extend(long(0x4020_1000));
        words.extend([24, 0]);
        words.extend(head(1, 24 + 16 + 32));
        words.extend([2, 0]);
        for end in [0, 0xfedf_ffff, 0xfef0_0000, 0xffff_ffff_ffff] {
            words.extend(long(end));
        }
        words.extend(head(3, 0));
        words.push(65535);
        let found = Type1Info::parse(&bytes(&words)).unwrap();
        assert_eq!(
            found,
            Type1Info {
                page_sizes: 0x4020_1000,
                ranges: vec![0..=0xfedf_ffff, 0xfef0_0000..=0xffff_ffff_ffff],
                available: Some(65535),
            }
        );
        words[1] = 0;
        let old = Type1Info::parse(&bytes(&words)).unwrap();
        assert_eq!((old.page_sizes, old.available), (4096, None));
        assert_eq!(old.ranges, [0..=u64::MAX]);
    }

    proptest! {
        #[test]
        fn no_answer_breaks_the_parsers(
            mut bytes in prop::collection::vec(any::<u8>(), 0..160),
            flags in 0u32..16,
            first in 0u32..170,
        ) {
            for (at, value) in [(4, flags), (12, first), (16, first)] {
                if let Some(place) = bytes.get_mut(at..at + 4) {
                    place.copy_from_slice(&value.to_ne_bytes());
                }
            }
            if let Some(region) = Region::parse(&bytes) {
                for area in &region.mappable {
                    prop_assert!(area.start < area.end && area.end <= region.size);
                }
                for pair in region.mappable.windows(2) {
                    prop_assert!(pair[0].end <= pair[1].start);
                }
            }
            let _ = Type1Info::parse(&bytes);
        }
    }
}
