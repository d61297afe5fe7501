//! The walk through a guest's first-stage table (docs/spec/pviommu.md#pviommu-5).
//!
//! The guest's CPUs change the table while it is read: each entry is loaded once, as one 64-bit
//! word, and judged by that value alone. The depth is that of the table, so a table that leads to
//! itself is merely a table.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::translation::{Access, FaultCause, PageTable, leaf_size};
use crate::hv::pviommu::entry;
use crate::mem::{PAGE_SIZE, Snapshot};

/// Highest level that may have leaves: 1 GiB pages.
const MAX_LEAF_LEVEL: u8 = 3;

/// Attempts to set accessed and dirty bits while somebody else changes the entry. Other walkers
/// need two at most: one for each bit.
const MAX_ATTEMPTS: u32 = 8;

/// A translation of the page that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// GPA of the first byte of the page.
    pub(crate) gpa: u64,
    /// 1 for 4 KiB, 2 for 2 MiB, 3 for 1 GiB.
    pub(crate) level: u8,
    /// Writes need no other walk: they pass, and the dirty bit is set.
    pub(crate) writable: bool,
}

impl Leaf {
    /// Bytes of the page.
    pub(crate) fn size(&self) -> u64 {
        leaf_size(self.level)
    }
}

/// Translates the page of `iova`, setting accessed bits, and for a write the dirty bit. Entries
/// above `physical_bits` address bits are malformed.
///
/// # Errors
///
/// [`FaultCause`]; accessed bits on the way may be set.
pub(crate) fn walk(
    ram: &Snapshot,
    table: &PageTable,
    physical_bits: u8,
    iova: u64,
    access: Access,
) -> Result<Leaf, FaultCause> {
    let unusable = entry::ADDRESS & !((1 << physical_bits) - 1);
    let mut level = table.levels.count();
    if iova >> table.levels.width() != 0 {
        return Err(FaultCause::Width);
    }
    let mut gpa = table.root;
    let mut writable = true;
    loop {
        let shift = PAGE_SIZE.trailing_zeros() + entry::INDEX_BITS * u32::from(level - 1);
        let at = gpa + (iova >> shift) % entry::COUNT * 8;
        let word = ram.u64(at).map_err(|_| FaultCause::TableNotRam { level })?;
        let mut value = word.load(Ordering::Acquire);
        for attempt in 0.. {
            let is_leaf = judge(value, level, unusable, access)?;
            let mut bits = mutant!("walk-sets-no-accessed", 0, entry::ACCESSED);
            let writes = access == Access::Write || mutant!("walk-dirties-on-read");
            if is_leaf && writes && !mutant!("walk-sets-no-dirty") {
                bits |= entry::DIRTY;
            }
            if value & bits == bits {
                break;
            }
            if attempt == MAX_ATTEMPTS {
                return Err(FaultCause::Unstable { level });
            }
            // In a table that nobody can write the bit can never be set.
            let word = word.writable();
            let word = word.map_err(|_| FaultCause::TableNotRam { level })?;
            let (order, failed) = (Ordering::AcqRel, Ordering::Acquire);
            match word.compare_exchange(value, value | bits, order, failed) {
                Ok(_) => value |= bits,
                Err(now) => value = now,
            }
        }
        writable &= value & entry::WRITABLE != 0;
        gpa = value & entry::ADDRESS;
        if is_leaf(value, level) {
            return Ok(Leaf {
                gpa,
                level,
                writable: writable && value & entry::DIRTY != 0,
            });
        }
        level -= 1;
    }
}

fn is_leaf(value: u64, level: u8) -> bool {
    level == 1 || value & entry::PAGE_SIZE != 0
}

/// Checks one entry. True for a leaf.
pub(crate) fn judge(
    value: u64,
    level: u8,
    unusable: u64,
    access: Access,
) -> Result<bool, FaultCause> {
    if value & entry::PRESENT == 0 {
        return Err(FaultCause::NotPresent { level });
    }
    let leaf = is_leaf(value, level);
    let mut reserved = unusable;
    if leaf && level > MAX_LEAF_LEVEL && !mutant!("walk-leaf-anywhere") {
        return Err(FaultCause::Reserved { level });
    }
    if leaf {
        // Address bits below the size of the page.
        reserved |= entry::ADDRESS & (leaf_size(level) - 1);
    }
    if value & reserved != 0 && !mutant!("walk-reserved-bits") {
        return Err(FaultCause::Reserved { level });
    }
    if value & entry::USER == 0 && !mutant!("walk-user-ignored") {
        return Err(FaultCause::Supervisor { level });
    }
    let writable = value & entry::WRITABLE != 0 || mutant!("walk-writable-ignored");
    if access == Access::Write && !writable {
        return Err(FaultCause::ReadOnly { level });
    }
    Ok(leaf)
}

#[cfg(test)]
mod tests {
    use super::super::translation::Levels;
    use super::*;
    use crate::mem::RamMap;
    use vm_memory::{Bytes, GuestAddress};

    const TABLE: u64 = entry::PRESENT | entry::WRITABLE | entry::USER | entry::ACCESSED;
    const PAGE: u64 = TABLE | entry::DIRTY;
    const ROOT: u64 = 0x1000;

    /// RAM in two regions with a hole from 1 MiB to 2 MiB.
    fn ram() -> RamMap {
        let ranges = [
            (GuestAddress(0), 0x10_0000),
            (GuestAddress(0x20_0000), 0x10_0000),
        ];
        RamMap::from_ranges(&ranges).expect("test RAM")
    }

    fn set(ram: &RamMap, table: u64, index: u64, value: u64) {
        ram.write_obj(value, GuestAddress(table + index * 8))
            .unwrap();
    }

    fn get(ram: &RamMap, table: u64, index: u64) -> u64 {
        ram.read_obj(GuestAddress(table + index * 8)).unwrap()
    }

    fn four() -> PageTable {
        PageTable {
            root: ROOT,
            levels: Levels::Four,
        }
    }

    /// Tables at 0x1000 (level 4) to 0x4000 (level 1); IOVA 0x8080604000 + 8 * index.
    const IOVA: u64 = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12;

    fn mapped(leaf: u64) -> RamMap {
        let ram = ram();
        set(&ram, 0x1000, 1, 0x2000 | TABLE);
        set(&ram, 0x2000, 2, 0x3000 | TABLE);
        // The level 1 table lies in the other region.
        set(&ram, 0x3000, 3, 0x20_4000 | TABLE);
        set(&ram, 0x20_4000, 4, leaf);
        ram
    }

    fn go(ram: &RamMap, iova: u64, access: Access) -> Result<Leaf, FaultCause> {
        walk(&Snapshot::new(ram), &four(), 52, iova, access)
    }

    #[test]
    fn each_level_picks_its_index() {
        let ram = mapped(0x5000 | PAGE);
        let leaf = Leaf {
            gpa: 0x5000,
            level: 1,
            writable: true,
        };
        assert_eq!(go(&ram, IOVA, Access::Write), Ok(leaf));
        assert_eq!(go(&ram, IOVA | 0xfff, Access::Read), Ok(leaf));
        for (bit, level) in [(12, 1), (21, 2), (30, 3), (39, 4)] {
            let fault = FaultCause::NotPresent { level };
            assert_eq!(go(&ram, IOVA ^ 1 << bit, Access::Read), Err(fault));
        }
    }

    #[test]
    fn five_levels_reach_57_bits_and_four_only_48() {
        let ram = mapped(0x5000 | PAGE);
        set(&ram, 0x6000, 0x1ff, ROOT | TABLE);
        let five = PageTable {
            root: 0x6000,
            levels: Levels::Five,
        };
        let iova = 0x1ff << 48 | IOVA;
        let leaf = walk(&Snapshot::new(&ram), &five, 52, iova, Access::Read).unwrap();
        assert_eq!(leaf.gpa, 0x5000);
        let too_wide = Err(FaultCause::Width);
        assert_eq!(
            walk(
                &Snapshot::new(&ram),
                &five,
                52,
                1 << 57 | iova,
                Access::Read
            ),
            too_wide
        );
        assert_eq!(go(&ram, 1 << 48 | IOVA, Access::Read), too_wide);
        assert_eq!(go(&ram, u64::MAX, Access::Read), too_wide);
    }

    #[test]
    fn large_leaves_end_the_walk_and_must_be_aligned() {
        let ram = mapped(0);
        set(&ram, 0x3000, 3, 0x4020_0000 | PAGE | entry::PAGE_SIZE);
        let leaf = go(&ram, IOVA, Access::Write).unwrap();
        assert_eq!((leaf.gpa, leaf.level), (0x4020_0000, 2));
        set(&ram, 0x2000, 2, 0x8000_0000 | PAGE | entry::PAGE_SIZE);
        let leaf = go(&ram, IOVA, Access::Write).unwrap();
        assert_eq!((leaf.gpa, leaf.level), (0x8000_0000, 3));
        for bit in [12, 13, 20, 21, 29] {
            let value = 0x8000_0000 | 1 << bit | PAGE | entry::PAGE_SIZE;
            set(&ram, 0x2000, 2, value);
            let fault = FaultCause::Reserved { level: 3 };
            assert_eq!(go(&ram, IOVA, Access::Read), Err(fault), "bit {bit}");
        }
        set(&ram, 0x2000, 2, 0x3000 | TABLE);
        for bit in [12, 20] {
            let value = 0x4020_0000 | 1 << bit | PAGE | entry::PAGE_SIZE;
            set(&ram, 0x3000, 3, value);
            let fault = FaultCause::Reserved { level: 2 };
            assert_eq!(go(&ram, IOVA, Access::Read), Err(fault), "bit {bit}");
        }
        set(&ram, 0x1000, 1, 0x2000 | TABLE | entry::PAGE_SIZE);
        let fault = FaultCause::Reserved { level: 4 };
        assert_eq!(go(&ram, IOVA, Access::Read), Err(fault));
    }

    #[test]
    fn permissions_count_at_every_level() {
        for (table, index, level) in [
            (0x1000, 1, 4),
            (0x2000, 2, 3),
            (0x3000, 3, 2),
            (0x20_4000, 4, 1),
        ] {
            let ram = mapped(0x5000 | PAGE);
            let value = get(&ram, table, index);
            set(&ram, table, index, value & !entry::WRITABLE);
            assert_eq!(
                go(&ram, IOVA, Access::Write),
                Err(FaultCause::ReadOnly { level })
            );
            let leaf = go(&ram, IOVA, Access::Read).unwrap();
            assert!(!leaf.writable);
            set(&ram, table, index, value & !entry::USER);
            assert_eq!(
                go(&ram, IOVA, Access::Read),
                Err(FaultCause::Supervisor { level })
            );
        }
    }

    #[test]
    fn addresses_beyond_the_physical_width_are_reserved_and_ignored_bits_are_not() {
        let ram = mapped(1 << 46 | 0x5000 | PAGE);
        assert!(walk(&Snapshot::new(&ram), &four(), 47, IOVA, Access::Read).is_ok());
        assert_eq!(
            walk(&Snapshot::new(&ram), &four(), 46, IOVA, Access::Read),
            Err(FaultCause::Reserved { level: 1 })
        );
        // Execute disable, software bits, PAT of a small page, cache bits, global.
        let ignored = 1 << 63 | 0x7ff << 52 | 1 << 7 | 3 << 3 | 0xf << 8;
        let ram = mapped(0x5000 | PAGE | ignored);
        assert_eq!(go(&ram, IOVA, Access::Write).unwrap().gpa, 0x5000);
        let ram = mapped(0x5000 | PAGE);
        set(&ram, 0x1000, 1, 1 << 46 | 0x2000 | TABLE);
        assert_eq!(
            walk(&Snapshot::new(&ram), &four(), 46, IOVA, Access::Read),
            Err(FaultCause::Reserved { level: 4 })
        );
    }

    #[test]
    fn tables_outside_ram_are_faults_and_a_loop_is_a_table() {
        let ram = mapped(0x5000 | PAGE);
        set(&ram, 0x3000, 3, 0x10_0000 | TABLE);
        let fault = FaultCause::TableNotRam { level: 1 };
        assert_eq!(go(&ram, IOVA, Access::Read), Err(fault));
        let gone = PageTable {
            root: 0x000f_ffff_ffff_f000,
            levels: Levels::Four,
        };
        assert_eq!(
            walk(&Snapshot::new(&ram), &gone, 52, IOVA, Access::Read),
            Err(FaultCause::TableNotRam { level: 4 })
        );
        // The root maps itself: the page that is reached is the root.
        set(&ram, ROOT, 0, ROOT | PAGE);
        assert_eq!(go(&ram, 0, Access::Write).unwrap().gpa, ROOT);
    }

    #[test]
    fn accessed_is_set_on_use_and_dirty_on_a_write() {
        let ram = mapped(0x5000 | PAGE & !(entry::ACCESSED | entry::DIRTY));
        set(&ram, 0x2000, 2, 0x3000 | TABLE & !entry::ACCESSED);
        let leaf = go(&ram, IOVA, Access::Read).unwrap();
        assert!(!leaf.writable, "a write must come back for the dirty bit");
        assert_eq!(get(&ram, 0x2000, 2), 0x3000 | TABLE);
        assert_eq!(get(&ram, 0x20_4000, 4), 0x5000 | PAGE & !entry::DIRTY);
        let leaf = go(&ram, IOVA, Access::Write).unwrap();
        assert!(leaf.writable);
        assert_eq!(get(&ram, 0x20_4000, 4), 0x5000 | PAGE);
    }

    #[test]
    fn a_table_that_cannot_be_written_serves_as_far_as_it_is_marked() {
        let marked = 0x5000 | PAGE;
        let unmarked = 0x5000 | PAGE & !(entry::ACCESSED | entry::DIRTY);
        let clean = 0x5000 | PAGE & !entry::DIRTY;
        let rom: Vec<u8> = [0x1_1000 | TABLE, marked, unmarked, clean]
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .chain([0; 0x1000 - 32])
            .collect();
        let ram = crate::mem::testing::with_rom(0x1_0000, &rom);
        set(&ram, 0x1000, 0, 0x2000 | TABLE);
        set(&ram, 0x2000, 0, 0x3000 | TABLE);
        set(&ram, 0x3000, 0, 0x1_0000 | TABLE);
        for access in [Access::Read, Access::Write] {
            assert!(go(&ram, 1 << 12, access).is_ok());
            let fault = Err(FaultCause::TableNotRam { level: 1 });
            assert_eq!(go(&ram, 2 << 12, access), fault);
            let written = go(&ram, 3 << 12, access);
            assert_eq!(written.is_ok(), access == Access::Read);
        }
    }
}
