//! State in which the boot processor enters a kernel: 64-bit mode, identity-mapped
//! (kernel: Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
#![forbid(unsafe_code)]

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::kernel::Entry;
use crate::layout::{GDT, PAGE_TABLES};
use crate::memory::Ram;

/// Selector of the code segment that the boot protocol asks for (`__BOOT_CS`).
const BOOT_CS: u16 = 0x10;
/// Selector of the data segments (`__BOOT_DS`).
const BOOT_DS: u16 = 0x18;
/// Null, null, 64-bit code, flat data.
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS with nothing set but the bit that always is.
const RFLAGS_FIXED: u64 = 2;

/// Page table entry: present, writable.
const PRESENT: u64 = 3;
/// Page directory entry: a 2 MiB page.
const LARGE: u64 = 1 << 7;
/// Number of page directories: they map 4 GiB, which covers everything a loader places.
const DIRECTORIES: u64 = 4;

/// Writes the GDT and the page tables.
///
/// # Errors
///
/// The address is not RAM, which no layout allows.
pub(crate) fn write_tables(ram: &Ram) -> Result<(), GuestMemoryError> {
    for (index, entry) in (0u64..).zip(GDT_ENTRIES) {
        ram.write_obj(entry, GuestAddress(GDT + index * 8))?;
    }
    let pdpt = PAGE_TABLES + 0x1000;
    let directory = |index: u64| pdpt + 0x1000 * (index + 1);
    // One page at a time, so that entries left by an earlier boot go too.
    let page = |entries: &dyn Fn(u64) -> u64| -> Vec<u8> {
        (0..512).flat_map(|i| entries(i).to_le_bytes()).collect()
    };
    let top = page(&|i| if i == 0 { pdpt | PRESENT } else { 0 });
    ram.write_slice(&top, GuestAddress(PAGE_TABLES))?;
    let pointers = page(&|i| {
        if i < DIRECTORIES {
            directory(i) | PRESENT
        } else {
            0
        }
    });
    ram.write_slice(&pointers, GuestAddress(pdpt))?;
    for index in 0..DIRECTORIES {
        let entries = page(&|i| (index << 30) | (i << 21) | PRESENT | LARGE);
        ram.write_slice(&entries, GuestAddress(directory(index)))?;
    }
    Ok(())
}

/// Changes the reset state of the system registers to 64-bit mode on the tables of
/// [`write_tables`].
pub(crate) fn set_system_registers(sregs: &mut kvm_sregs) {
    let data = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: BOOT_DS,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: BOOT_CS,
        type_: 11,
        db: 0,
        l: 1,
        ..data
    };
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (GDT_ENTRIES.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// General registers at the kernel's entry point.
pub(crate) fn entry_registers(entry: Entry) -> kvm_regs {
    kvm_regs {
        rip: entry.rip,
        rsi: entry.zero_page,
        rflags: RFLAGS_FIXED,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{CMDLINE, Layout};
    use crate::memory::map_ram;

    /// Walks the tables as a processor would.
    fn translate(ram: &Ram, va: u64) -> Option<u64> {
        let mut table = PAGE_TABLES;
        for shift in [39, 30, 21] {
            let at = table + ((va >> shift) & 0x1ff) * 8;
            let entry: u64 = ram.read_obj(GuestAddress(at)).unwrap();
            if entry & 1 == 0 {
                return None;
            }
            if entry & LARGE != 0 {
                return Some((entry & !0x1f_ffff) | (va & 0x1f_ffff));
            }
            table = entry & !0xfff;
        }
        None
    }

    #[test]
    fn four_gib_are_mapped_to_themselves_and_nothing_else() {
        let ram = map_ram(&Layout::new(32 << 20, 40).unwrap()).unwrap();
        ram.write_obj(u64::MAX, GuestAddress(PAGE_TABLES + 8))
            .unwrap();
        write_tables(&ram).unwrap();
        for va in [
            0,
            0x7000,
            0x10_0000,
            0x1_2345_6789 & 0xffff_ffff,
            0xffff_ffff,
        ] {
            assert_eq!(translate(&ram, va), Some(va), "{va:#x}");
        }
        for va in [1 << 32, 1 << 39, 1 << 47] {
            assert_eq!(translate(&ram, va), None, "{va:#x}");
        }
        const { assert!(PAGE_TABLES + 0x1000 * (2 + DIRECTORIES) <= CMDLINE) };
    }

    #[test]
    fn selectors_match_the_descriptors() {
        let mut sregs = kvm_sregs::default();
        set_system_registers(&mut sregs);
        let code = GDT_ENTRIES[usize::from(sregs.cs.selector / 8)];
        assert_eq!(((code >> 40) & 0xf) as u8, sregs.cs.type_);
        assert_eq!(((code >> 53) & 1) as u8, sregs.cs.l);
        let data = GDT_ENTRIES[usize::from(sregs.ds.selector / 8)];
        assert_eq!(((data >> 40) & 0xf) as u8, sregs.ds.type_);
        assert_eq!(usize::from(sregs.gdt.limit) + 1, 32);
    }

    #[test]
    fn rsi_points_to_the_zero_page() {
        let regs = entry_registers(Entry {
            rip: 0x100_0200,
            zero_page: 0x7000,
        });
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0200, 0x7000, 2));
    }
}
