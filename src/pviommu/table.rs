//! A table of bounded size whose entries have a key and a slot that never moves.
#![forbid(unsafe_code)]

/// Why an entry was not added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InsertError {
    /// The key is there already.
    Exists,
    /// All slots are taken.
    Full,
}

/// Entries by key, in slots. All memory is taken when the table is made, because entries come and
/// go in hypercalls.
#[derive(Debug)]
pub(super) struct Table<K, V> {
    /// Sorted by key.
    index: Vec<(K, u32)>,
    slots: Box<[Option<V>]>,
    free: Vec<u32>,
}

impl<K: Ord + Copy, V> Table<K, V> {
    /// An empty table of at most `capacity` entries.
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            index: Vec::with_capacity(capacity as usize),
            slots: (0..capacity).map(|_| None).collect(),
            free: (0..capacity).rev().collect(),
        }
    }

    /// Adds an entry and returns its slot.
    pub(super) fn insert(&mut self, key: K, value: V) -> Result<u32, InsertError> {
        let Err(place) = self.index.binary_search_by_key(&key, |entry| entry.0) else {
            return Err(InsertError::Exists);
        };
        let slot = self.free.pop().ok_or(InsertError::Full)?;
        self.index.insert(place, (key, slot));
        self.slots[slot as usize] = Some(value);
        Ok(slot)
    }

    pub(super) fn remove(&mut self, key: K) -> Option<V> {
        let place = self
            .index
            .binary_search_by_key(&key, |entry| entry.0)
            .ok()?;
        let (_, slot) = self.index.remove(place);
        self.free.push(slot);
        self.slots[slot as usize].take()
    }

    /// The slot of the entry with `key`.
    pub(super) fn find(&self, key: K) -> Option<u32> {
        let place = self
            .index
            .binary_search_by_key(&key, |entry| entry.0)
            .ok()?;
        Some(self.index[place].1)
    }

    pub(super) fn get(&self, slot: u32) -> Option<&V> {
        self.slots.get(slot as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> Option<&mut V> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    /// Entries with their slots, in the order of keys.
    pub(super) fn iter(&self) -> impl Iterator<Item = (K, u32, &V)> {
        self.index
            .iter()
            .filter_map(|(key, slot)| Some((*key, *slot, self.get(*slot)?)))
    }

    /// Entries, in the order of slots.
    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.slots.iter_mut().flatten()
    }

    /// Removes all entries.
    pub(super) fn clear(&mut self) {
        for (_, slot) in self.index.drain(..) {
            self.slots[slot as usize] = None;
            self.free.push(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_full_table_refuses_and_a_removal_makes_room() {
        let mut table = Table::new(2);
        let a = table.insert(7, 'a').unwrap();
        table.insert(3, 'b').unwrap();
        assert_eq!(table.insert(7, 'c'), Err(InsertError::Exists));
        assert_eq!(table.insert(9, 'c'), Err(InsertError::Full));
        assert_eq!(table.remove(7), Some('a'));
        assert_eq!(table.get(a), None);
        table.insert(9, 'c').unwrap();
        let all: Vec<_> = table.iter().map(|(key, _, value)| (key, *value)).collect();
        assert_eq!(all, [(3, 'b'), (9, 'c')]);
    }

    proptest! {
        #[test]
        fn a_table_is_a_bounded_map(
            steps in prop::collection::vec((any::<bool>(), 0u8..12), 0..80),
        ) {
            let mut table = Table::new(8);
            let mut model = BTreeMap::new();
            for (step, (insert, key)) in steps.into_iter().enumerate() {
                if insert {
                    let expected = match (model.contains_key(&key), model.len()) {
                        (true, _) => Err(InsertError::Exists),
                        (false, 8) => Err(InsertError::Full),
                        _ => {
                            model.insert(key, step);
                            Ok(())
                        }
                    };
                    prop_assert_eq!(table.insert(key, step).map(|_| ()), expected);
                } else {
                    prop_assert_eq!(table.remove(key), model.remove(&key));
                }
                let found: Vec<_> = table.iter().map(|(key, _, value)| (key, *value)).collect();
                let expected: Vec<_> = model.iter().map(|(key, value)| (*key, *value)).collect();
                prop_assert_eq!(found, expected);
                prop_assert_eq!(table.iter().count(), model.len());
            }
        }
    }
}
