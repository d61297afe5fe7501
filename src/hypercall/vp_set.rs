//! Sets of VPs.
#![forbid(unsafe_code)]

use crate::hv::hypercall::VP_SET_BANKS;

/// A set of VP indices below [`VpSet::LIMIT`], of fixed size: 64 banks of 64 VPs, as in the
/// sparse-4K format (docs/spec/vpci.md, section 7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VpSet {
    banks: [u64; VP_SET_BANKS],
}

impl VpSet {
    /// First VP index that no set can hold.
    pub const LIMIT: u32 = VP_SET_BANKS as u32 * 64;

    /// The empty set.
    pub const fn new() -> Self {
        Self {
            banks: [0; VP_SET_BANKS],
        }
    }

    /// The set of a mask of VPs 0 to 63.
    pub const fn from_mask(mask: u64) -> Self {
        let mut set = Self::new();
        set.banks[0] = mask;
        set
    }

    /// The set of a sparse-4K list: one bank for each bit of `valid`, lowest first. `None` if the
    /// number of banks differs from the number of bits.
    pub fn from_sparse(valid: u64, banks: impl ExactSizeIterator<Item = u64>) -> Option<Self> {
        if banks.len() != valid.count_ones() as usize && !mutant!("sparse-set-banks-missing") {
            return None;
        }
        let mut set = Self::new();
        let mut rest = valid;
        for bits in banks {
            *set.banks.get_mut(rest.trailing_zeros() as usize)? = bits;
            rest &= rest - 1;
        }
        Some(set)
    }

    /// Adds a VP. False, without effect, if `vp` is not below [`VpSet::LIMIT`].
    pub fn insert(&mut self, vp: u32) -> bool {
        match self.banks.get_mut(vp as usize / 64) {
            Some(bank) => {
                *bank |= 1 << (vp % 64);
                true
            }
            None => false,
        }
    }

    /// True if `vp` is in the set.
    pub fn contains(&self, vp: u32) -> bool {
        self.banks
            .get(vp as usize / 64)
            .is_some_and(|bank| bank >> (vp % 64) & 1 != 0)
    }

    /// True if no VP is in the set.
    pub fn is_empty(&self) -> bool {
        self.banks.iter().all(|bank| *bank == 0)
    }

    /// Number of VPs in the set.
    pub fn len(&self) -> u32 {
        self.banks.iter().map(|bank| bank.count_ones()).sum()
    }

    /// Lowest VP of the set.
    pub fn first(&self) -> Option<u32> {
        self.iter().next()
    }

    /// Highest VP of the set.
    pub fn last(&self) -> Option<u32> {
        let found = (0..VP_SET_BANKS as u32)
            .zip(self.banks)
            .rfind(|(_, bits)| *bits != 0);
        found.map(|(bank, bits)| bank * 64 + 63 - bits.leading_zeros())
    }

    /// The VPs of the set, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0u32..).zip(self.banks).flat_map(|(bank, bits)| {
            let mut rest = bits;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros())?;
                rest &= rest - 1;
                Some(bank * 64 + bit)
            })
        })
    }
}

impl Default for VpSet {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_sparse_list_names_its_banks_lowest_first() {
        let banks = [1u64 << 5, 0, 1 << 63];
        let valid = 1 << 0 | 1 << 7 | 1 << 63;
        let set = VpSet::from_sparse(valid, banks.into_iter()).unwrap();
        assert_eq!(set.iter().collect::<Vec<_>>(), [5, 4095]);
        assert_eq!((set.first(), set.last()), (Some(5), Some(4095)));
        assert!(VpSet::from_sparse(valid, [1u64, 2].into_iter()).is_none());
        assert!(VpSet::from_sparse(0, [1u64].into_iter()).is_none());
    }

    #[test]
    fn the_last_index_fits_and_the_next_does_not() {
        let mut set = VpSet::new();
        assert!(set.is_empty() && set.first().is_none() && set.last().is_none());
        assert!(set.insert(VpSet::LIMIT - 1));
        assert!(!set.insert(VpSet::LIMIT));
        assert!(!set.contains(VpSet::LIMIT));
        assert_eq!(set.len(), 1);
    }

    proptest! {
        #[test]
        fn the_set_behaves_like_a_set_of_integers(
            vps in proptest::collection::btree_set(0u32..VpSet::LIMIT, 0..200),
            probe in any::<u32>(),
        ) {
            let mut set = VpSet::new();
            for vp in &vps {
                prop_assert!(set.insert(*vp));
            }
            prop_assert_eq!(set.iter().collect::<BTreeSet<_>>(), vps.clone());
            prop_assert_eq!(set.len() as usize, vps.len());
            prop_assert_eq!(set.first(), vps.first().copied());
            prop_assert_eq!(set.last(), vps.last().copied());
            prop_assert_eq!(set.contains(probe), vps.contains(&probe));
        }
    }
}
