//! Tells a bus that is plugged in from one that has had its name before.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use uuid::Uuid;

/// One stay of a bus in the VM: no other one, of whatever name, is equal to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Incarnation(u64);

/// The present one of each bus.
#[derive(Debug, Default)]
pub(crate) struct Incarnations {
    last: u64,
    /// But for buses that have been there from the start.
    of: HashMap<Uuid, Incarnation>,
}

impl Incarnations {
    /// A bus was plugged in.
    pub(crate) fn begin(&mut self, bus: Uuid) {
        self.last += 1;
        self.of.insert(bus, Incarnation(self.last));
    }

    /// A bus was taken away.
    pub(crate) fn end(&mut self, bus: &Uuid) {
        self.of.remove(bus);
    }

    /// That of a bus that is plugged in.
    pub(crate) fn of(&self, bus: &Uuid) -> Incarnation {
        self.of.get(bus).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bus_that_comes_back_is_another_one() {
        let (bus, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let mut incarnations = Incarnations::default();
        let mut former = vec![incarnations.of(&bus)];
        for _ in 0..3 {
            incarnations.end(&bus);
            incarnations.begin(bus);
            incarnations.begin(other);
            let now = incarnations.of(&bus);
            assert!(!former.contains(&now));
            assert_eq!(incarnations.of(&bus), now);
            assert_ne!(incarnations.of(&other), now);
            former.push(now);
        }
    }
}
