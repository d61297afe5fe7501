//! Ranges of addresses that are taken. The kernel's interfaces differ on holes and on parts of a
//! mapping (docs/spec/vfio-rig.md#vfio-rig-5), so whoever maps keeps books.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::Range;

/// Why a range was not taken or given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IntervalError {
    /// It is empty or wraps around.
    Invalid,
    /// A part of it is taken.
    Taken,
    /// A taken range is only partly in it.
    PartlyInside,
}

/// Disjoint, non-empty ranges of 64-bit addresses, each with a value. Two that adjoin stay two. The
/// very last byte of the address space belongs to none.
#[derive(Debug, Clone)]
pub struct Intervals<T> {
    /// By first address: the address behind the last, and the value.
    map: BTreeMap<u64, (u64, T)>,
}

impl<T> Default for Intervals<T> {
    fn default() -> Self {
        Self {
            map: BTreeMap::new(),
        }
    }
}

impl<T> Intervals<T> {
    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Ranges with their values, by address.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (Range<u64>, &T)> {
        self.map
            .iter()
            .map(|(start, (end, value))| (*start..*end, value))
    }

    /// The range that holds `address`.
    pub fn find(&self, address: u64) -> Option<(Range<u64>, &T)> {
        let (start, (end, value)) = self.map.range(..=address).next_back()?;
        (address < *end).then_some((*start..*end, value))
    }

    /// Ranges that have at least a byte in `range`, by address.
    pub fn overlapping(
        &self,
        range: Range<u64>,
    ) -> impl DoubleEndedIterator<Item = (Range<u64>, &T)> {
        let first = self.find(range.start).map_or(range.start, |(r, _)| r.start);
        // An empty range overlaps nothing.
        let last = if range.is_empty() { first } else { range.end };
        self.map
            .range(first..last)
            .map(|(start, (end, value))| (*start..*end, value))
    }

    /// Checks that nothing of a range is taken.
    ///
    /// # Errors
    ///
    /// [`IntervalError::Invalid`] or [`IntervalError::Taken`].
    pub fn check_free(&self, start: u64, len: u64) -> Result<(), IntervalError> {
        let range = range(start, len)?;
        match self.overlapping(range).next() {
            Some(_) => Err(IntervalError::Taken),
            None => Ok(()),
        }
    }

    /// Takes a range.
    ///
    /// # Errors
    ///
    /// As [`check_free`](Self::check_free); nothing has changed then.
    pub fn insert(&mut self, start: u64, len: u64, value: T) -> Result<(), IntervalError> {
        self.check_free(start, len)?;
        self.map.insert(start, (start + len, value));
        Ok(())
    }

    /// The ranges that lie in a range.
    ///
    /// # Errors
    ///
    /// [`IntervalError::Invalid`], or [`IntervalError::PartlyInside`] if one is only partly in it.
    pub fn inside(
        &self,
        start: u64,
        len: u64,
    ) -> Result<impl DoubleEndedIterator<Item = (Range<u64>, &T)>, IntervalError> {
        let range = range(start, len)?;
        let is_inside = |found: &Range<u64>| found.start >= range.start && found.end <= range.end;
        let mut found = self.overlapping(range.clone());
        let ends = (found.next(), found.next_back());
        let mut ends = [ends.0, ends.1].into_iter().flatten();
        if !ends.all(|(end, _)| is_inside(&end)) {
            return Err(IntervalError::PartlyInside);
        }
        Ok(self.overlapping(range))
    }

    /// Gives back the range that begins at `start`.
    pub fn remove(&mut self, start: u64) -> Option<(Range<u64>, T)> {
        let (end, value) = self.map.remove(&start)?;
        Some((start..end, value))
    }

    /// Gives back all.
    pub fn clear(&mut self) {
        self.map.clear();
    }
}

fn range(start: u64, len: u64) -> Result<Range<u64>, IntervalError> {
    match start.checked_add(len) {
        Some(end) if end > start => Ok(start..end),
        _ => Err(IntervalError::Invalid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_that_adjoin_stay_two() {
        let mut map = Intervals::default();
        map.insert(10, 5, 'a').unwrap();
        map.insert(15, 5, 'b').unwrap();
        assert_eq!(map.insert(14, 2, 'c'), Err(IntervalError::Taken));
        assert_eq!(map.insert(30, 0, 'c'), Err(IntervalError::Invalid));
        assert_eq!(map.insert(u64::MAX, 1, 'c'), Err(IntervalError::Invalid));
        assert_eq!(map.inside(12, 8).err(), Some(IntervalError::PartlyInside));
        assert_eq!(map.inside(10, 7).err(), Some(IntervalError::PartlyInside));
        assert_eq!(map.inside(11, 2).err(), Some(IntervalError::PartlyInside));
        assert_eq!(map.inside(0, 100).unwrap().count(), 2);
        assert_eq!(map.inside(0, 10).unwrap().count(), 0);
        assert_eq!(map.find(14), Some((10..15, &'a')));
        assert_eq!(map.find(20), None);
        assert_eq!(map.remove(11), None);
        assert_eq!(map.remove(10), Some((10..15, 'a')));
        assert_eq!(map.len(), 1);
    }

    proptest! {
        /// Against one cell for each address.
        #[test]
        fn a_map_is_what_its_cells_say(
            steps in prop::collection::vec((0u8..3, 0u64..24, 0u64..8), 0..60),
        ) {
            let mut map = Intervals::default();
            let mut cells = [None::<usize>; 32];
            for (step, (kind, start, len)) in steps.into_iter().enumerate() {
                let span = start as usize..(start + len) as usize;
                let taken = cells[span.clone()].iter().any(Option::is_some);
                match kind {
                    0 => {
                        let expected = match (len, taken) {
                            (0, _) => Err(IntervalError::Invalid),
                            (_, true) => Err(IntervalError::Taken),
                            _ => Ok(()),
                        };
                        prop_assert_eq!(map.insert(start, len, step), expected);
                        if expected.is_ok() {
                            cells[span].fill(Some(step));
                        }
                    }
                    1 => {
                        let inside = &cells[span.clone()];
                        let whole = |owner: usize| {
                            cells.iter().filter(|cell| **cell == Some(owner)).count()
                                == inside.iter().filter(|cell| **cell == Some(owner)).count()
                        };
                        let mut owners: Vec<_> = inside.iter().flatten().copied().collect();
                        owners.dedup();
                        let found = map.inside(start, len);
                        if len == 0 {
                            prop_assert_eq!(found.err(), Some(IntervalError::Invalid));
                        } else if owners.iter().all(|owner| whole(*owner)) {
                            let found: Vec<_> = found.unwrap().map(|(_, v)| *v).collect();
                            prop_assert_eq!(found, owners);
                        } else {
                            prop_assert_eq!(found.err(), Some(IntervalError::PartlyInside));
                        }
                    }
                    _ => {
                        let owner = cells[start as usize];
                        let is_start = start == 0 || cells[start as usize - 1] != owner;
                        let removed = map.remove(start).map(|(_, value)| value);
                        prop_assert_eq!(removed, owner.filter(|_| is_start));
                        if let Some(owner) = removed {
                            for cell in cells.iter_mut().filter(|cell| **cell == Some(owner)) {
                                *cell = None;
                            }
                        }
                    }
                }
                for (address, owner) in cells.iter().enumerate() {
                    let found = map.find(address as u64).map(|(_, value)| *value);
                    prop_assert_eq!(found, *owner);
                }
            }
        }
    }
}
