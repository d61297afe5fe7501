//! The puppet's memory as it is before the first instruction, and what the host changes in it
//! later.
#![forbid(unsafe_code)]

use zerocopy::IntoBytes;

use crate::layout::{
    BASE, CODE, CommandPage, GDT, IDT, KERNEL_CODE, PAGE, RFLAGS_FIXED, Stack, TABLE_PAGES, TABLES,
    TSS_OFFSET, WAKE_VECTOR, size, vp_block,
};
use crate::stub::{Entry, VECTOR_SIZE, code};

/// Null, null, code and data at CPL 0, data and code at CPL 3.
const GDT_ENTRIES: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];
/// Limit of the descriptor table.
pub(crate) const GDT_LIMIT: u16 = (GDT_ENTRIES.len() * 8 - 1) as u16;

/// Present interrupt gate for CPL 0.
const GATE: u64 = 0x8e;
/// Stacks of the interrupt stack table.
const IST_EXCEPTION: u64 = 1;
const IST_INTERRUPT: u64 = 2;

/// Offsets in a 64-bit task state segment.
const TSS_RSP0: u64 = 4;
const TSS_IST1: u64 = 0x24;
const TSS_IST2: u64 = 0x2c;
const TSS_IO_MAP_BASE: u64 = 0x66;
const TSS_SIZE: u64 = 0x68;
/// Ports that the I/O permission map covers; those above are denied.
const IO_MAP_PORTS: u64 = 256;
/// Limit of the task state segment: with the map and the byte of ones after it.
pub(crate) const TSS_LIMIT: u32 = (TSS_SIZE + IO_MAP_PORTS / 8) as u32;

/// Page table entry: present, writable, accessible at CPL 3; dirty and accessed, so that no CPU
/// has to write to it.
const ENTRY: u64 = 0x67;
/// Page directory entry: a page of 2 MiB.
const LARGE: u64 = 1 << 7;
/// Size covered by one page directory.
const DIRECTORY_SPAN: u64 = 1 << 30;
/// First address that no table of four levels maps to itself.
const CANONICAL_END: u64 = 1 << 47;

/// The memory from [`BASE`] on for a puppet with `vps` VPs, [`size`] bytes. It maps
/// no address yet but its own: see [`PageTables`].
pub fn image(vps: u32) -> Vec<u8> {
    let mut memory = vec![0; size(vps) as usize];
    let mut put = |address: u64, bytes: &[u8]| {
        let at = (address - BASE) as usize;
        memory[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(CODE, code());
    put(GDT, GDT_ENTRIES.as_bytes());
    for vector in 0..=255 {
        put(IDT + u64::from(vector) * 16, gate(vector).as_bytes());
    }
    for vp in 0..vps {
        let tss = vp_block(vp) + TSS_OFFSET;
        put(tss + TSS_RSP0, Stack::Kernel.top(vp).as_bytes());
        put(tss + TSS_IST1, Stack::Exception.top(vp).as_bytes());
        put(tss + TSS_IST2, Stack::Interrupt.top(vp).as_bytes());
        put(tss + TSS_IO_MAP_BASE, (TSS_SIZE as u16).as_bytes());
        put(tss + TSS_SIZE, &[0xff; IO_MAP_PORTS as usize / 8 + 1]);
        let page = CommandPage {
            kernel_stack: Stack::Kernel.top(vp),
            user_stack: Stack::User.top(vp),
            user_rflags: RFLAGS_FIXED,
            ..CommandPage::default()
        };
        put(vp_block(vp), page.as_bytes());
    }
    memory
}

fn gate(vector: u8) -> [u64; 2] {
    let address = Entry::Vectors.address() + u64::from(vector) * VECTOR_SIZE;
    let stack = match vector {
        0..WAKE_VECTOR => IST_EXCEPTION,
        _ => IST_INTERRUPT,
    };
    let low = (address & 0xffff)
        | u64::from(KERNEL_CODE) << 16
        | stack << 32
        | GATE << 40
        | (address >> 16 & 0xffff) << 48;
    [low, address >> 32]
}

/// Where the I/O permission map of VP `vp` has the bit of `port`, as the address and the mask of a
/// byte: clear allows the port at CPL 3. None for a port that is always denied.
pub fn io_permission(vp: u32, port: u16) -> Option<(u64, u8)> {
    let port = u64::from(port);
    let map = vp_block(vp) + TSS_OFFSET + TSS_SIZE;
    (port < IO_MAP_PORTS).then_some((map + port / 8, 1 << (port % 8)))
}

/// Why an address cannot be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressError {
    /// It is beyond what tables of four levels map to itself.
    TooHigh,
    /// The pages for tables are used up.
    NoTable,
}

impl std::fmt::Display for AddressError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::TooHigh => "the address is beyond what the puppet can map",
            Self::NoTable => "the puppet has no room for more page tables",
        })
    }
}

impl std::error::Error for AddressError {}

/// The puppet's page tables: they map addresses to themselves, a GiB at a time, when the host
/// first asks for one. An entry only ever becomes present, so no VP has to flush anything.
#[derive(Debug, Clone)]
pub struct PageTables {
    /// Pages in use; the first is the top level.
    pages: u64,
    /// What lies where: (address of an entry, value).
    entries: Vec<(u64, u64)>,
}

impl Default for PageTables {
    /// Tables that map nothing.
    fn default() -> Self {
        Self {
            pages: 1,
            entries: Vec::new(),
        }
    }
}

impl PageTables {
    /// Maps the GiB around `address` to itself; `store` writes a table entry into the puppet's
    /// memory. Does nothing where it is mapped already.
    ///
    /// # Errors
    ///
    /// [`AddressError`]; nothing has changed then.
    pub fn map(
        &mut self,
        address: u64,
        mut store: impl FnMut(u64, u64),
    ) -> Result<(), AddressError> {
        if address >= CANONICAL_END {
            return Err(AddressError::TooHigh);
        }
        let top = TABLES + (address >> 39) * 8;
        let pointers = self.entry(top);
        if let Some(table) = pointers
            && self.entry(table_slot(table, address)).is_some()
        {
            return Ok(());
        }
        let needed = if pointers.is_some() { 1 } else { 2 };
        if self.pages + needed > TABLE_PAGES {
            return Err(AddressError::NoTable);
        }
        // Children before the entries that lead to them.
        let directory = self.take_page();
        let start = address & !(DIRECTORY_SPAN - 1);
        for index in 0..512 {
            store(
                directory + index * 8,
                (start + (index << 21)) | ENTRY | LARGE,
            );
        }
        let table = pointers.unwrap_or_else(|| self.take_page());
        self.put(table_slot(table, address), directory, &mut store);
        if pointers.is_none() {
            self.put(top, table, &mut store);
        }
        Ok(())
    }

    fn take_page(&mut self) -> u64 {
        self.pages += 1;
        TABLES + (self.pages - 1) * PAGE
    }

    /// The table that the entry at `at` leads to.
    fn entry(&self, at: u64) -> Option<u64> {
        let found = self.entries.iter().find(|(address, _)| *address == at)?;
        Some(found.1)
    }

    fn put(&mut self, at: u64, table: u64, store: &mut impl FnMut(u64, u64)) {
        self.entries.push((at, table));
        store(at, table | ENTRY);
    }
}

/// Address of the page directory pointer for `address` in the table at `table`.
fn table_slot(table: u64, address: u64) -> u64 {
    table + (address >> 30 & 0x1ff) * 8
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Walks the tables as a processor would.
    fn translate(memory: &HashMap<u64, u64>, address: u64) -> Option<u64> {
        let mut table = TABLES;
        for shift in [39, 30, 21] {
            let entry = memory.get(&(table + (address >> shift & 0x1ff) * 8))?;
            assert_eq!(entry & 7, 7);
            if entry & LARGE != 0 {
                return Some((entry & !0x1f_ffff) | (address & 0x1f_ffff));
            }
            table = entry & !0xfff;
        }
        None
    }

    #[test]
    fn addresses_are_mapped_to_themselves_when_they_are_asked_for() {
        let (mut tables, mut memory) = (PageTables::default(), HashMap::new());
        let addresses = [0, 0xff00_1234, 0x10_0000_0008, 0x7fff_ffff_fff8];
        for address in addresses {
            assert_eq!(translate(&memory, address), None);
            let mut map = |address| {
                tables.map(address, |at, entry| {
                    memory.insert(at, entry);
                })
            };
            map(address).unwrap();
            map(address).unwrap();
            assert_eq!(translate(&memory, address), Some(address));
        }
        assert_eq!(translate(&memory, 0x4000_0000), None);
        // The first GiB, the fourth and another in one table; the last in another.
        assert_eq!(tables.pages, 1 + 1 + 3 + 2);
        assert_eq!(tables.map(1 << 47, |_, _| ()), Err(AddressError::TooHigh));
    }

    #[test]
    fn tables_end_where_their_pages_do() {
        let mut tables = PageTables::default();
        let mut highest = 0;
        let mut map = |gib: u64| tables.map(gib << 30, |at, _| highest = highest.max(at));
        for gib in 0..TABLE_PAGES - 2 {
            map(gib).unwrap();
        }
        assert_eq!(map(TABLE_PAGES - 2), Err(AddressError::NoTable));
        map(0).unwrap();
        assert_eq!(highest, vp_block(0) - 8);
    }

    #[test]
    fn the_image_has_each_part_at_its_place() {
        let memory = image(2);
        let at = |address: u64| &memory[(address - BASE) as usize..];
        assert!(at(CODE).starts_with(code()));
        assert!(code().len() as u64 <= IDT - CODE);
        let gate = |vector: u64| {
            let (parts, _) = at(IDT + vector * 16).as_chunks::<8>();
            let [low, high] = [parts[0], parts[1]].map(u64::from_le_bytes);
            let address = (low & 0xffff) | (low >> 48) << 16 | high << 32;
            (address, low >> 32 & 7)
        };
        assert_eq!(gate(13), (Entry::Vectors.address() + 13 * 16, 1));
        assert_eq!(gate(31).1, 1);
        assert_eq!(gate(WAKE_VECTOR.into()).1, 2);
        assert_eq!(gate(255), (Entry::Vectors.address() + 255 * 16, 2));
        let (byte, mask) = io_permission(1, 0x8d).unwrap();
        assert_eq!(at(byte)[0] & mask, 0x20);
        assert_eq!(io_permission(1, 256), None);
        let end = vp_block(1) + TSS_OFFSET + u64::from(TSS_LIMIT);
        assert_eq!(at(end)[..2], [0xff, 0]);
    }
}
