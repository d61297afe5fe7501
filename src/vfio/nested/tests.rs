//! The bytes that VT-d's driver gets, against the structures of iommufd-bindings and the kernel's
//! header (`include/uapi/linux/iommufd.h`).
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::mem::offset_of;

use iommufd_bindings::{iommu_hwpt_vtd_s1, iommu_hwpt_vtd_s1_invalidate};

use super::*;
use crate::backend::nested::{NestedCapabilities, NestedUnit, Place};
use crate::pviommu::{FlushRange, Levels, Translation};

/// The header's layouts: changes of the bindings would show here.
#[test]
fn the_structures_are_those_of_the_header() {
    assert_eq!(size_of::<iommu_hwpt_vtd_s1>(), 24);
    assert_eq!(offset_of!(iommu_hwpt_vtd_s1, flags), 0);
    assert_eq!(offset_of!(iommu_hwpt_vtd_s1, pgtbl_addr), 8);
    assert_eq!(offset_of!(iommu_hwpt_vtd_s1, addr_width), 16);
    assert_eq!(size_of::<iommu_hwpt_vtd_s1_invalidate>(), 24);
    assert_eq!(offset_of!(iommu_hwpt_vtd_s1_invalidate, addr), 0);
    assert_eq!(offset_of!(iommu_hwpt_vtd_s1_invalidate, npages), 8);
    assert_eq!(offset_of!(iommu_hwpt_vtd_s1_invalidate, flags), 16);
    assert_eq!(NEST_PARENT, 1);
}

/// Operations as the driver would get them.
#[derive(Debug)]
struct Wire {
    driver: Vtd,
    next: Cell<u32>,
    calls: RefCell<Vec<Call>>,
}

#[derive(Debug, PartialEq, Eq)]
enum Call {
    Alloc(u32, Vec<u8>),
    Invalidate(u32, u32, u32, Vec<u8>),
    Other(&'static str, u32),
}

impl Host for Wire {
    fn execute(&self, operation: &Operation) -> io::Result<Answer> {
        let made = || {
            let id = self.next.replace(self.next.get() + 1);
            Ok(Answer::Object(ObjectId(id)))
        };
        let (call, answer) = match operation {
            Operation::AllocateParent => (Call::Alloc(0, vec![]), made()),
            Operation::AllocateNested { table, .. } => {
                let TableData { data_type, data } = self.driver.table(table);
                (Call::Alloc(data_type, data), made())
            }
            Operation::Invalidate { entries, .. } => {
                let data = self.driver.invalidations(entries);
                let call = Call::Invalidate(data.data_type, data.entry_len, data.count, data.data);
                (call, Ok(Answer::Done))
            }
            Operation::Attach { to } => (Call::Other("attach", to.0), Ok(Answer::Done)),
            Operation::Detach => (Call::Other("detach", 0), Ok(Answer::Done)),
            Operation::Destroy { object } => (Call::Other("destroy", object.0), Ok(Answer::Done)),
        };
        self.calls.borrow_mut().push(call);
        answer
    }
}

/// Bytes from 64-bit words, as a little-endian machine stores them.
fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn the_calls_of_a_life_have_these_bytes() {
    let wire = Wire {
        driver: Vtd,
        next: Cell::new(10),
        calls: RefCell::default(),
    };
    let capabilities = NestedCapabilities {
        five_levels: true,
        gigabyte_pages: true,
        max_shift: 18,
    };
    let opened = NestedUnit::open(
        wire,
        capabilities,
        ObjectId(1),
        Place::Default,
        Levels::Five,
    );
    let mut unit = opened.map_err(|(_, error)| error).unwrap();
    let table = |root, levels| Translation::Paged(PageTable { root, levels });
    unit.attach(&table(0x1_2345_6000, Levels::Four)).unwrap();
    let ranges = [(0x7_ffff_ffff, 0), (0x4_0000, 18)];
    let ranges = ranges.map(|(first, shift)| FlushRange { first, shift });
    unit.flush(&ranges).unwrap();
    unit.flush_all().unwrap();
    unit.attach(&table(0x7000, Levels::Five)).unwrap();
    unit.attach(&Translation::Identity).unwrap();
    unit.attach(&Translation::Blocked).unwrap();
    unit.close().unwrap();
    let calls = unit.host().calls.take();
    assert_eq!(
        calls,
        [
            // The parent, IOMMU_HWPT_DATA_NONE.
            Call::Alloc(0, vec![]),
            // A trial, IOMMU_HWPT_DATA_VTD_S1: flags, root, width.
            Call::Alloc(1, words(&[0, 0, 57])),
            Call::Invalidate(0, 24, 0, vec![]),
            Call::Other("destroy", 11),
            Call::Alloc(1, words(&[0, 0x1_2345_6000, 48])),
            Call::Other("attach", 12),
            // One array: address, pages, flags.
            Call::Invalidate(
                0,
                24,
                2,
                words(&[0x7fff_ffff_f000, 1, 0, 0x4000_0000, 0x4_0000, 0])
            ),
            // Everything.
            Call::Invalidate(0, 24, 1, words(&[0, u64::MAX, 0])),
            Call::Alloc(1, words(&[0, 0x7000, 57])),
            Call::Other("attach", 13),
            Call::Other("destroy", 12),
            Call::Other("attach", 1),
            Call::Other("destroy", 13),
            Call::Other("detach", 0),
            Call::Other("destroy", 10),
        ]
    );
}
