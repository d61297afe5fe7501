//! First-stage tables, and the DMA that goes through them.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use arbitrary::{Arbitrary, Result, Unstructured};

use super::Step;
use crate::guest::{Guest, TABLES};
use crate::values::{Gpa, Iova, Small};

/// Tables that there are.
const COUNT: u64 = 16;

/// GPA of a table.
fn table(number: u8) -> u64 {
    TABLES + u64::from(number) % COUNT * 4096
}

/// A change of a table.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct TableChange {
    table: u8,
    index: Index,
    entry: Entry,
}

/// Index of an entry: mostly one that the addresses in use reach.
#[derive(Debug, Clone, Copy)]
struct Index(u64);

impl<'a> Arbitrary<'a> for Index {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let byte = u64::from(u.arbitrary::<u8>()?);
        Ok(Self(match byte {
            0..=223 => byte % 8,
            224..=239 => 508 + byte % 4,
            _ => u64::from(u.arbitrary::<u16>()?) % 512,
        }))
    }
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Entry {
    /// Leads to a table.
    Table(u8),
    /// A leaf, or a large one.
    Leaf {
        to: Gpa,
        flags: u8,
    },
    None,
    Any(u64),
}

impl TableChange {
    /// Stores the entry.
    pub fn change(self, ram: &vm_vpci::mem::GuestRam) {
        let entry = match self.entry {
            Entry::Table(number) => table(number) | 0x27,
            Entry::Leaf { to, flags } => {
                // Present, for the most part; the bits between are writable, user, large and others.
                let flags = u64::from(flags);
                to.0 & !0xfff | flags | u64::from(flags & 0x18 != 0x18)
            }
            Entry::None => 0,
            Entry::Any(entry) => entry,
        };
        let at = table(self.table) + self.index.0 * 8;
        ram.store_u64(at, entry, Ordering::SeqCst).expect("RAM");
    }
}

impl Step for TableChange {
    fn apply(&self, guest: &mut Guest) {
        self.change(guest.ram());
    }
}

/// A job of a `testdev`, or an interrupt from it.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Job {
    bus: bool,
    function: u8,
    source: Iova,
    destination: Iova,
    len: u16,
    vector: Small,
    command: u8,
}

impl Step for Job {
    fn apply(&self, guest: &mut Guest) {
        let bar = Guest::bar(self.bus.into(), self.function % 3);
        let partition = &guest.machine.partition;
        // Nobody claims them unless the guest has the BAR there.
        let _ = partition.mmio_write(bar + 0x10, &self.source.0.to_le_bytes());
        let _ = partition.mmio_write(bar + 0x18, &self.destination.0.to_le_bytes());
        let _ = partition.mmio_write(bar + 0x20, &u32::from(self.len).to_le_bytes());
        let _ = partition.mmio_write(bar + 0x24, &self.vector.0.to_le_bytes());
        let start = match self.command % 4 {
            0 => (0x60, self.vector.0),
            command => (0x30, command.into()),
        };
        let _ = partition.mmio_write(bar + start.0, &start.1.to_le_bytes());
    }
}
