//! Guest physical address space.
//!
//! ```text
//! 0            RAM (boot data below 1 MiB, ACPI tables at 0xE0000)
//! LOW_RAM_END  hole: low vPCI window, IO-APIC, local APIC, KVM's own pages
//! 4 GiB        RAM that did not fit below
//! high window  64-bit BARs of vPCI functions
//! ```
//!
//! The two windows are what the guest's VMBus driver gives to vPCI buses
//! (docs/spec/hyperv-guest-interface.md, section 12).
#![forbid(unsafe_code)]

/// GDT of the boot processor.
pub(crate) const GDT: u64 = 0x500;
/// Zero page (`boot_params`) of the Linux boot protocol.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Top-level page table of the boot processor; five more tables follow.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub(crate) const CMDLINE: u64 = 0x20000;
/// End of the RAM that is described to the guest below 1 MiB.
pub(crate) const LOW_END: u64 = 0xa0000;
/// ACPI tables, the root pointer first: inside the area that kernels scan for it.
pub(crate) const ACPI_TABLES: u64 = 0xe0000;
/// End of the area for ACPI tables, and start of the RAM above the legacy hole.
pub(crate) const HIGH_RAM: u64 = 0x10_0000;
/// End of RAM below 4 GiB.
pub(crate) const LOW_RAM_END: u64 = 0xc000_0000;
/// End of the space below 4 GiB.
pub(crate) const FOUR_GIB: u64 = 1 << 32;
/// Low vPCI window: config windows and 32-bit BARs.
pub(crate) const LOW_WINDOW: Range = Range {
    start: 0xd000_0000,
    size: 0x2000_0000,
};
/// Registers of the IO-APIC (KVM's in-kernel one).
pub(crate) const IO_APIC: u64 = 0xfec0_0000;
/// Registers of the local APICs.
pub(crate) const LOCAL_APIC: u64 = 0xfee0_0000;
/// Page that KVM on Intel hosts needs for real mode without unrestricted guest support.
pub(crate) const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM on Intel hosts needs for its task state segment.
pub(crate) const KVM_TSS: u64 = 0xfffb_d000;

/// KVM memory slots of RAM: two for each page that may be tracked (`ShadowConfig::max_pages`), should none
/// have a tracked neighbour, and one for each block that `KvmRam` cuts RAM into.
pub(crate) const RAM_SLOTS: std::ops::Range<u32> = 0..0x4800;

/// KVM memory slots of BARs of passed-through devices.
pub(crate) const BAR_SLOTS: std::ops::Range<u32> = 0x4800..0x4c00;

/// Alignment of the high window.
const HIGH_ALIGN: u64 = 1 << 30;
/// Wanted size of the high window.
const HIGH_SIZE: u64 = 64 << 30;
/// Least size of the high window: twice the largest BARs of any function, with room for alignment.
const MIN_HIGH_SIZE: u64 = 1 << 30;

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    /// First address.
    pub(crate) start: u64,
    /// Size in bytes.
    pub(crate) size: u64,
}

impl Range {
    /// First address behind the range.
    pub(crate) const fn end(self) -> u64 {
        self.start + self.size
    }
}

/// Why RAM and windows do not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LayoutError {
    /// The CPU's physical addresses are too narrow.
    #[error(
        "--memory {memory_mib}M and the vPCI window above it do not fit in the {bits} physical \
         address bits that KVM offers a guest here: use less memory"
    )]
    TooNarrow {
        /// RAM asked for, in MiB.
        memory_mib: u64,
        /// Physical address width.
        bits: u8,
    },
}

/// Where RAM and the windows of one VM lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    /// RAM from address 0.
    pub(crate) low_ram: u64,
    /// RAM from 4 GiB on; 0 when all of it fits below.
    pub(crate) high_ram: u64,
    /// Window above RAM for 64-bit BARs.
    pub(crate) high_window: Range,
    /// Width of a guest physical address.
    pub(crate) address_bits: u8,
}

impl Layout {
    /// Lays out `memory` bytes of RAM for CPUs with `address_bits` physical address bits.
    ///
    /// # Errors
    ///
    /// [`LayoutError::TooNarrow`].
    pub(crate) fn new(memory: u64, address_bits: u8) -> Result<Self, LayoutError> {
        let low_ram = memory.min(LOW_RAM_END);
        let high_ram = memory - low_ram;
        let ram_end = FOUR_GIB + high_ram;
        let start = ram_end.next_multiple_of(HIGH_ALIGN);
        let limit = 1u64 << address_bits.min(52);
        let size = limit.saturating_sub(start).min(HIGH_SIZE);
        if size < MIN_HIGH_SIZE {
            return Err(LayoutError::TooNarrow {
                memory_mib: memory >> 20,
                bits: address_bits,
            });
        }
        Ok(Self {
            low_ram,
            high_ram,
            high_window: Range { start, size },
            address_bits: address_bits.min(52),
        })
    }

    /// RAM as memory regions.
    pub(crate) fn ram(&self) -> Vec<Range> {
        let low = Range {
            start: 0,
            size: self.low_ram,
        };
        let high = Range {
            start: FOUR_GIB,
            size: self.high_ram,
        };
        [low, high].into_iter().filter(|r| r.size > 0).collect()
    }

    /// RAM as the guest's firmware map (e820 type 1); everything else is a hole.
    pub(crate) fn usable(&self) -> Vec<Range> {
        let conventional = Range {
            start: 0,
            size: LOW_END,
        };
        let above = Range {
            start: HIGH_RAM,
            size: self.low_ram - HIGH_RAM,
        };
        let mut usable = vec![conventional, above];
        usable.extend(self.ram().into_iter().skip(1));
        usable
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::{MAX_MEMORY, MIN_MEMORY};
    use proptest::prelude::*;

    fn overlap(a: Range, b: Range) -> bool {
        a.start < b.end() && b.start < a.end()
    }

    #[test]
    fn ram_has_slots_for_all_pages_that_may_be_tracked() {
        let pages = vm_vpci::backend::shadow::ShadowConfig::default().max_pages;
        // `KvmRam` makes 1024 blocks, and one more for each region that ends within one.
        let blocks = 1024 + 2;
        assert!(RAM_SLOTS.len() >= 2 * pages + blocks);
        const { assert!(RAM_SLOTS.end <= BAR_SLOTS.start) };
        // What KVM has.
        const { assert!(BAR_SLOTS.end < 32764) };
    }

    #[test]
    fn small_memory_lies_below_the_hole() {
        let layout = Layout::new(512 << 20, 40).unwrap();
        assert_eq!((layout.low_ram, layout.high_ram), (512 << 20, 0));
        assert_eq!(layout.ram().len(), 1);
        assert_eq!(layout.high_window.start, FOUR_GIB);
        assert_eq!(layout.high_window.size, 64 << 30);
    }

    #[test]
    fn large_memory_goes_on_above_four_gib() {
        let layout = Layout::new(5 << 30, 40).unwrap();
        assert_eq!((layout.low_ram, layout.high_ram), (3 << 30, 2 << 30));
        assert_eq!(layout.high_window.start, 6 << 30);
    }

    #[test]
    fn the_high_window_shrinks_to_the_address_width_and_no_further() {
        let layout = Layout::new(1 << 30, 36).unwrap();
        assert_eq!(layout.high_window.end(), 1 << 36);
        assert_eq!(Layout::new(62 << 30, 36).unwrap().high_window.size, 1 << 30);
        assert_eq!(
            Layout::new((62 << 30) + (1 << 20), 36),
            Err(LayoutError::TooNarrow {
                memory_mib: (62 << 10) + 1,
                bits: 36
            })
        );
        assert!(Layout::new(1 << 30, 32).is_err());
    }

    proptest! {
        #[test]
        fn nothing_overlaps(mib in (MIN_MEMORY >> 20)..=(MAX_MEMORY >> 20), bits in 36u8..=52) {
            let Ok(layout) = Layout::new(mib << 20, bits) else {
                return Ok(());
            };
            let page = |start| Range { start, size: 0x4000 };
            let mut all = layout.ram();
            prop_assert_eq!(all.iter().map(|r| r.size).sum::<u64>(), mib << 20);
            all.extend([LOW_WINDOW, layout.high_window, page(IO_APIC), page(LOCAL_APIC)]);
            all.push(page(IDENTITY_MAP));
            for (i, a) in all.iter().enumerate() {
                for b in &all[i + 1..] {
                    prop_assert!(!overlap(*a, *b), "{:?} {:?}", a, b);
                }
                prop_assert!(a.end() <= 1 << bits);
            }
            for usable in layout.usable() {
                prop_assert!(layout.ram().iter().any(|r| r.start <= usable.start && usable.end() <= r.end()));
                prop_assert!(usable.end() <= ACPI_TABLES || usable.start >= HIGH_RAM);
            }
        }
    }
}
