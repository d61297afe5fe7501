//! The messages that a function's interrupts were mapped to, and where each goes.
//!
//! A guest asks for messages with CREATE_INTERRUPT and gets an (address, data) pair, which is
//! opaque to it: a handle. The address is always [`HANDLE_ADDRESS`] and the data is an index into
//! this table, so nothing that a guest writes reaches the interrupt fabric.
//!
//! Handles are given out lowest first, so that a guest which creates its interrupts anew in the
//! same order gets the same ones (docs/spec/vpci.md#VP-7.1-12).
//!
//! Lock order: the allocator, then a route. [`MsiSink::raise_msi`] runs inside the route's lock;
//! whoever replaces or removes the route thereby waits for the interrupt under way.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex};

use crate::hv::vpci::MAX_MESSAGES;
use crate::vmm::{Msi, MsiSink};
use crate::vpci::lock;

/// Address of every handle: the start of the local APIC's message window, below 4 GiB because a
/// guest passes on the low half alone (docs/spec/vpci.md#VP-7.1-02).
pub const HANDLE_ADDRESS: u32 = 0xfee0_0000;

/// Data values that handles can have. More than messages can be live, to leave room for the
/// alignment of blocks.
pub(crate) const HANDLES: usize = 1024;

/// Messages that one handle can stand for.
pub(crate) const MAX_BLOCK: u16 = 32;

/// Lowest vector that a device's interrupt can have: those below belong to exceptions.
pub(crate) const FIRST_VECTOR: u8 = 0x10;

/// Why interrupts were not mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandleError {
    /// The number of messages is 0 or more than 32.
    #[error("{count} messages; 1 to 32 are possible")]
    Count {
        /// Number asked for.
        count: u16,
    },
    /// A vector lies outside 0x10 to 0xFF.
    #[error("vector {vector:#x} with {count} messages is not a range of device vectors")]
    Vector {
        /// First vector.
        vector: u32,
        /// Number of messages.
        count: u16,
    },
    /// No VP was named, or one that does not exist.
    #[error("the target is not a set of existing VPs")]
    Target,
    /// The function has its share of live messages.
    #[error("no more messages for this function")]
    Full,
    /// No such message is live.
    #[error("no message {data:#x} is live")]
    Unknown {
        /// Data of the message.
        data: u32,
    },
}

/// Who takes an interrupt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// One VP.
    One(u32),
    /// Every VP of the list.
    All(Arc<[u32]>),
}

/// Where a message goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) vector: u8,
    pub(crate) target: Target,
}

#[derive(Debug)]
struct Allocator {
    /// Length of the block that starts at each data value, 0 for none.
    blocks: [u8; HANDLES],
    /// Live messages.
    live: usize,
}

impl Allocator {
    fn is_free(&self, base: usize, len: usize) -> bool {
        // Blocks are at most 32 long and aligned to their rounded length.
        let from = base / usize::from(MAX_BLOCK) * usize::from(MAX_BLOCK);
        (from..base + len)
            .all(|at| self.blocks[at] == 0 || at + reserved(u16::from(self.blocks[at])) <= base)
    }
}

/// Data values that a block of `count` messages takes.
fn reserved(count: u16) -> usize {
    usize::from(count.next_power_of_two())
}

/// A function's handles.
#[derive(Debug)]
pub(crate) struct HandleTable {
    apic_ids: Arc<[u32]>,
    allocator: Mutex<Allocator>,
    routes: Box<[Mutex<Option<Route>>]>,
}

impl HandleTable {
    /// An empty table for a VM whose VP `i` has the APIC id `apic_ids[i]`.
    pub(crate) fn new(apic_ids: Arc<[u32]>) -> Self {
        Self {
            apic_ids,
            allocator: Mutex::new(Allocator {
                blocks: [0; HANDLES],
                live: 0,
            }),
            routes: (0..HANDLES).map(|_| Mutex::new(None)).collect(),
        }
    }

    /// Number of VPs of the VM.
    pub(crate) fn vp_count(&self) -> u32 {
        self.apic_ids.len() as u32
    }

    /// Maps `count` messages to consecutive vectors and returns the data of the first; message `i`
    /// has the data `+ i`.
    pub(crate) fn create(&self, vector: u32, count: u16, vp: u32) -> Result<u32, HandleError> {
        if !(1..=MAX_BLOCK).contains(&count) && !mutant!("create-no-message") {
            return Err(HandleError::Count { count });
        }
        if vector < u32::from(FIRST_VECTOR) || vector > 0x100 - u32::from(count) {
            return Err(HandleError::Vector { vector, count });
        }
        if vp >= self.vp_count() {
            return Err(HandleError::Target);
        }
        let routes = (0..count).map(|i| Route {
            vector: vector as u8 + i as u8,
            target: Target::One(vp),
        });
        let mut allocator = lock(&self.allocator);
        let step = mutant!("multi-msi-misaligned", 1, reserved(count));
        if allocator.live + usize::from(count) > MAX_MESSAGES && !mutant!("create-unlimited") {
            return Err(HandleError::Full);
        }
        let base = (0..HANDLES)
            .step_by(step)
            .find(|&base| allocator.is_free(base, step))
            .ok_or(HandleError::Full)?;
        self.insert(&mut allocator, base, routes);
        Ok(base as u32)
    }

    fn insert(
        &self,
        allocator: &mut Allocator,
        base: usize,
        routes: impl ExactSizeIterator<Item = Route>,
    ) {
        allocator.blocks[base] = routes.len() as u8;
        allocator.live += routes.len();
        for (slot, route) in self.routes[base..].iter().zip(routes) {
            *lock(slot) = Some(route);
        }
    }

    /// Unmaps the block whose first message is (`address`, `data`). When this returns nothing is
    /// delivered to its vectors any more. The number of messages: 0 if there is no such block.
    pub(crate) fn delete(&self, address: u64, data: u32) -> u16 {
        let Some(base) = index(address, data) else {
            return 0;
        };
        let mut allocator = lock(&self.allocator);
        let count = usize::from(std::mem::take(&mut allocator.blocks[base]));
        allocator.live -= count;
        let routes = self.routes[base..base + count].iter();
        for slot in routes.filter(|_| !mutant!("deleted-handle-lives")) {
            *lock(slot) = None;
        }
        count as u16
    }

    /// What a message becomes, if it is live and goes to one VP.
    pub(crate) fn message(&self, address: u64, data: u32) -> Option<Msi> {
        let guard = lock(&self.routes[index(address, data)?]);
        let route = guard.as_ref()?;
        let Target::One(vp) = route.target else {
            return None;
        };
        let apic_id = *self.apic_ids.get(vp as usize)?;
        Some(Msi::fixed(apic_id, route.vector))
    }

    /// Unmaps everything.
    pub(crate) fn clear(&self) {
        let mut allocator = lock(&self.allocator);
        allocator.blocks.fill(0);
        allocator.live = 0;
        for slot in &self.routes {
            *lock(slot) = None;
        }
    }

    /// Moves one message to a new vector and target. When this returns nothing is delivered to the
    /// old ones any more.
    pub(crate) fn retarget(&self, address: u64, data: u32, to: Route) -> Result<(), HandleError> {
        let index = index(address, data).ok_or(HandleError::Unknown { data })?;
        if to.vector < FIRST_VECTOR {
            return Err(HandleError::Vector {
                vector: u32::from(to.vector),
                count: 1,
            });
        }
        let exists = |vp: &u32| *vp < self.vp_count();
        let good = match &to.target {
            Target::One(vp) => exists(vp),
            Target::All(vps) => !vps.is_empty() && vps.iter().all(exists),
        };
        if !good {
            return Err(HandleError::Target);
        }
        match &mut *lock(&self.routes[index]) {
            Some(route) => {
                // The old list of a multicast route is freed here; one of a single VP holds none.
                *route = mutant!("retarget-without-effect", route.clone(), to);
                Ok(())
            }
            None => Err(HandleError::Unknown { data }),
        }
    }

    /// Delivers a message; false if it is not live.
    pub(crate) fn raise(&self, address: u64, data: u32, sink: &dyn MsiSink) -> bool {
        let Some(index) = index(address, data) else {
            return false;
        };
        let guard = lock(&self.routes[index]);
        let Some(route) = &*guard else {
            return false;
        };
        // Routes are checked when they are made: every VP has an APIC id.
        let send = |vp: &u32| {
            if let Some(&apic_id) = self.apic_ids.get(*vp as usize) {
                sink.raise_msi(Msi::fixed(apic_id, route.vector));
            }
        };
        match &route.target {
            Target::One(vp) => send(vp),
            Target::All(vps) => vps.iter().for_each(send),
        }
        true
    }

    /// Number of live messages.
    pub(crate) fn live(&self) -> usize {
        lock(&self.allocator).live
    }

    /// Live blocks: data of the first message, and the routes.
    pub(crate) fn save(&self) -> Vec<(u32, Vec<Route>)> {
        let allocator = lock(&self.allocator);
        let blocks = allocator.blocks.iter().enumerate();
        blocks
            .filter(|(_, len)| **len != 0)
            .map(|(base, len)| {
                let slots = &self.routes[base..base + usize::from(*len)];
                let routes = slots.iter().filter_map(|slot| lock(slot).clone());
                (base as u32, routes.collect())
            })
            .collect()
    }

    /// Takes a saved block over into the table, which has been emptied.
    pub(crate) fn restore(&self, base: u32, routes: &[Route]) -> Result<(), HandleError> {
        let count = routes.len() as u16;
        if routes.is_empty() || routes.len() > usize::from(MAX_BLOCK) {
            return Err(HandleError::Count { count });
        }
        // Each VP once: a set has no more members than the VM has VPs.
        let is_set = |route: &Route| match &route.target {
            Target::One(_) => true,
            Target::All(vps) => vps.is_sorted_by(|a, b| a < b),
        };
        if !routes.iter().all(is_set) {
            return Err(HandleError::Target);
        }
        let start = base as usize;
        let step = reserved(count);
        let mut allocator = lock(&self.allocator);
        if start >= HANDLES
            || !start.is_multiple_of(step)
            || !allocator.is_free(start, step)
            || allocator.live + routes.len() > MAX_MESSAGES
        {
            return Err(HandleError::Unknown { data: base });
        }
        self.insert(&mut allocator, start, routes.iter().cloned());
        drop(allocator);
        for (offset, route) in routes.iter().enumerate() {
            let data = base + offset as u32;
            self.retarget(u64::from(HANDLE_ADDRESS), data, route.clone())?;
        }
        Ok(())
    }
}

fn index(address: u64, data: u32) -> Option<usize> {
    let index = data as usize;
    ((address == u64::from(HANDLE_ADDRESS) || mutant!("handle-address-ignored")) && index < HANDLES)
        .then_some(index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const ADDRESS: u64 = HANDLE_ADDRESS as u64;

    #[derive(Debug, Default)]
    struct Log(Mutex<Vec<Msi>>);

    impl MsiSink for Log {
        fn raise_msi(&self, msi: Msi) {
            lock(&self.0).push(msi);
        }
    }

    fn table() -> HandleTable {
        HandleTable::new(Arc::from([0, 2, 4]))
    }

    #[test]
    fn handles_are_given_out_lowest_first_and_aligned_to_their_block() {
        let table = table();
        assert_eq!(table.create(0x20, 1, 0), Ok(0));
        assert_eq!(table.create(0x20, 3, 0), Ok(4));
        assert_eq!(table.create(0x20, 1, 0), Ok(1));
        assert_eq!(table.create(0x20, 32, 0), Ok(32));
        assert_eq!(table.create(0x20, 2, 0), Ok(2));
        // The fourth data value of the block of three stays unused.
        assert_eq!(table.create(0x20, 1, 0), Ok(8));
        assert_eq!(table.delete(ADDRESS, 0), 1);
        assert_eq!(table.create(0x20, 1, 0), Ok(0));
        assert_eq!(table.live(), 40);
    }

    #[test]
    fn deleting_something_else_than_a_live_block_does_nothing() {
        let table = table();
        table.create(0x20, 4, 0).unwrap();
        for (address, data) in [
            (ADDRESS, 1),
            (ADDRESS, 4),
            (ADDRESS, 1024),
            (ADDRESS, u32::MAX),
            (ADDRESS + 4, 0),
            (ADDRESS | 1 << 32, 0),
            (0, 0),
        ] {
            assert_eq!(table.delete(address, data), 0);
        }
        assert_eq!(table.live(), 4);
        assert_eq!(table.delete(ADDRESS, 0), 4);
        assert_eq!(table.delete(ADDRESS, 0), 0);
        assert_eq!(table.live(), 0);
    }

    #[test]
    fn a_function_has_494_live_messages_and_no_more() {
        let table = table();
        for data in 0..MAX_MESSAGES as u32 {
            assert_eq!(table.create(0x20, 1, 0), Ok(data));
        }
        assert_eq!(table.create(0x20, 1, 0), Err(HandleError::Full));
        table.delete(ADDRESS, 17);
        assert_eq!(table.create(0x20, 2, 0), Err(HandleError::Full));
        assert_eq!(table.create(0x20, 1, 0), Ok(17));
    }

    #[test]
    fn bad_requests_map_nothing() {
        let table = table();
        assert_eq!(
            table.create(0x20, 0, 0),
            Err(HandleError::Count { count: 0 })
        );
        assert_eq!(
            table.create(0x20, 33, 0),
            Err(HandleError::Count { count: 33 })
        );
        for (vector, count) in [(0xf, 1), (0x100, 1), (u32::MAX, 1), (0xf1, 16)] {
            assert_eq!(
                table.create(vector, count, 0),
                Err(HandleError::Vector { vector, count })
            );
        }
        assert_eq!(table.create(0x20, 1, 3), Err(HandleError::Target));
        assert_eq!(table.live(), 0);
        assert_eq!(table.create(0xf0, 16, 0), Ok(0));
    }

    #[test]
    fn a_message_goes_where_it_was_last_sent() {
        let table = table();
        let log = Log::default();
        table.create(0x30, 2, 1).unwrap();
        assert!(table.raise(ADDRESS, 1, &log));
        let to = Route {
            vector: 0x80,
            target: Target::All(Arc::from([0, 2])),
        };
        table.retarget(ADDRESS, 1, to).unwrap();
        assert!(table.raise(ADDRESS, 1, &log));
        assert!(table.raise(ADDRESS, 0, &log));
        assert!(!table.raise(ADDRESS, 2, &log));
        assert!(!table.raise(0, 0, &log));
        assert_eq!(
            *lock(&log.0),
            [
                Msi::fixed(2, 0x31),
                Msi::fixed(0, 0x80),
                Msi::fixed(4, 0x80),
                Msi::fixed(2, 0x30),
            ]
        );
    }

    #[test]
    fn a_refused_retarget_leaves_the_route_alone() {
        let table = table();
        let log = Log::default();
        table.create(0x30, 1, 1).unwrap();
        let retarget =
            |data, vector, target| table.retarget(ADDRESS, data, Route { vector, target });
        assert_eq!(
            retarget(1, 0x40, Target::One(0)),
            Err(HandleError::Unknown { data: 1 })
        );
        assert_eq!(
            retarget(5000, 0x40, Target::One(0)),
            Err(HandleError::Unknown { data: 5000 })
        );
        assert!(retarget(0, 0xf, Target::One(0)).is_err());
        assert_eq!(retarget(0, 0x40, Target::One(3)), Err(HandleError::Target));
        assert_eq!(
            retarget(0, 0x40, Target::All(Arc::from([0, 3]))),
            Err(HandleError::Target)
        );
        assert_eq!(
            retarget(0, 0x40, Target::All(Arc::from([]))),
            Err(HandleError::Target)
        );
        table.raise(ADDRESS, 0, &log);
        assert_eq!(*lock(&log.0), [Msi::fixed(2, 0x30)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn blocks_never_overlap_and_saving_keeps_the_next_handles(
            steps in proptest::collection::vec((1u16..=32, any::<u16>(), any::<bool>()), 1..120)
        ) {
            let table = table();
            let mut model: BTreeMap<u32, u16> = BTreeMap::new();
            for (count, pick, create) in steps {
                if create || model.is_empty() {
                    if let Ok(base) = table.create(0x20, count, 0) {
                        let len = reserved(count) as u32;
                        prop_assert!(base.is_multiple_of(len));
                        for (other, size) in &model {
                            let other_len = reserved(*size) as u32;
                            prop_assert!(base + len <= *other || other + other_len <= base);
                        }
                        model.insert(base, count);
                    }
                } else {
                    let base = *model.keys().nth(pick as usize % model.len()).unwrap();
                    prop_assert_ne!(table.delete(ADDRESS, base), 0);
                    model.remove(&base);
                }
                let live: usize = model.values().map(|count| usize::from(*count)).sum();
                prop_assert_eq!(table.live(), live);
                let twin = self::table();
                for (base, routes) in table.save() {
                    twin.restore(base, &routes).unwrap();
                }
                prop_assert_eq!(twin.save(), table.save());
                let next = twin.create(0x40, count, 0);
                prop_assert_eq!(&next, &table.create(0x40, count, 0));
                if let Ok(base) = next {
                    prop_assert_ne!(table.delete(ADDRESS, base), 0);
                }
            }
        }
    }
}
