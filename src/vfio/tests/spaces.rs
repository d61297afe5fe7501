//! Address spaces with their books, over either interface.

use proptest::prelude::*;

use super::fake::{Fake, Flavour, all_ram, limits};
use crate::backend::{AddressSpace, Permissions, SpaceError};

const BOTH: [Flavour; 2] = [Flavour::Type1, Flavour::Iommufd];
const RW: Permissions = Permissions::READ.union(Permissions::WRITE);

#[test]
fn a_map_across_regions_is_one_mapping_for_its_user() {
    for flavour in BOTH {
        let fake = Fake::default();
        let (id, space) = fake.space(flavour);
        space.map(0x40000, 0x1000, 0x2000, RW).unwrap();
        assert_eq!(fake.mappings(id), [(0x40000, 0x1000), (0x41000, 0x1000)]);
        // Each half is a mapping of the kernel, but not of its user.
        for half in [0x40000, 0x41000] {
            let cut = space.unmap(half, 0x1000);
            assert!(
                matches!(cut, Err(SpaceError::PartlyInside { .. })),
                "{cut:?}"
            );
        }
        assert_eq!(fake.mappings(id).len(), 2);
        space.unmap(0x3f000, 0x4000).unwrap();
        assert_eq!(fake.mappings(id), []);
    }
}

#[test]
fn holes_are_fine_on_both_interfaces() {
    for flavour in BOTH {
        let fake = Fake::default();
        let (id, space) = fake.space(flavour);
        space.unmap(0x40000, 0x1000).unwrap();
        space.clear().unwrap();
        space.map(0x40000, 0, 0x1000, RW).unwrap();
        space.map(0x50000, 0, 0x1000, RW).unwrap();
        space.unmap(0, 0x100000).unwrap();
        assert_eq!(fake.mappings(id), []);
    }
}

#[test]
fn what_is_not_writable_ram_or_usable_address_is_refused() {
    for flavour in BOTH {
        let fake = Fake::default();
        let (id, space) = fake.space(flavour);
        let refused = |iova, gpa, len, access| space.map(iova, gpa, len, access).unwrap_err();
        for (gpa, len) in [
            (0x2000, 0x2000),
            (0x8000, 0x1000),
            (u64::MAX - 0xfff, 0x1000),
        ] {
            let error = refused(0, gpa, len, RW);
            assert!(matches!(error, SpaceError::NotRam { .. }), "{error:?}");
        }
        assert!(matches!(
            refused(0, 0, 0x1000, Permissions::empty()),
            SpaceError::NotRam { .. }
        ));
        let unusable = [
            (0x10_0000, 0x1000),
            (0xf_f000, 0x2000),
            (0x800, 0x1000),
            (0, 0),
        ];
        for (iova, len) in unusable {
            let error = refused(iova, 0, len, RW);
            assert!(matches!(error, SpaceError::OutOfRange { .. }), "{error:?}");
        }
        assert!(matches!(
            refused(0, 0x800, 0x1000, RW),
            SpaceError::OutOfRange { .. }
        ));
        assert_eq!(fake.mappings(id), []);
        assert_eq!(fake.state().calls, 0, "the kernel was not asked");
    }
}

#[test]
fn a_full_space_refuses_before_the_kernel_does() {
    let fake = Fake::default();
    let (id, space) = fake.space(Flavour::Type1);
    let max = limits().max_mappings.unwrap() as u64;
    for i in 0..max - 1 {
        space.map(i << 13, 0, 0x1000, RW).unwrap();
    }
    let error = space.map(0x40000, 0x1000, 0x2000, RW).unwrap_err();
    assert!(matches!(error, SpaceError::Full { max: 8 }), "{error:?}");
    space.map(0x40000, 0x2000, 0x1000, RW).unwrap();
    assert_eq!(fake.mappings(id).len() as u64, max);
    space.unmap(0, 0x1000).unwrap();
    space.map(0x1000, 0, 0x1000, RW).unwrap();
}

#[test]
fn all_ram_is_mapped_as_it_may_be_accessed_or_not_at_all() {
    for flavour in BOTH {
        let fake = Fake::default();
        let (id, space) = fake.space(flavour);
        space.map_all().unwrap();
        assert_eq!(fake.mappings(id).len(), 3);
        space.clear().unwrap();
        for healthy in 0..3 {
            fake.break_after(healthy, 1);
            assert!(space.map_all().is_err());
            assert_eq!(fake.mappings(id), [], "after {healthy} mappings");
        }
        fake.repair();
        space.map_all().unwrap();
        assert_eq!(fake.mappings(id).len() + 2, all_ram().len());
    }
}

#[test]
fn a_map_that_cannot_be_taken_back_empties_the_space_or_closes_it() {
    for flavour in BOTH {
        let fake = Fake::default();
        let (id, space) = fake.space(flavour);
        space.map(0x60000, 0, 0x1000, RW).unwrap();
        // The second piece fails, and so does taking back the first.
        fake.break_after(1, 2);
        space.map(0x40000, 0x1000, 0x2000, RW).unwrap_err();
        assert_eq!(fake.mappings(id), [], "everything went");
        fake.break_after(1, 3);
        space.map(0x40000, 0x1000, 0x2000, RW).unwrap_err();
        assert_eq!(fake.mappings(id).len(), 1);
        fake.repair();
        // Nobody gets in until it is empty.
        space.map(0x60000, 0, 0x1000, RW).unwrap_err();
        space.clear().unwrap();
        assert_eq!(fake.mappings(id), []);
        space.map(0x40000, 0x1000, 0x2000, RW).unwrap();
    }
}

proptest! {
    /// Against sets of pages: what a call leaves, and that a failure leaves what was.
    #[test]
    fn a_space_is_what_its_calls_say(
        iommufd in any::<bool>(),
        steps in prop::collection::vec(
            (0u8..8, 0u64..12, 0u64..6, 0u64..5, prop::option::weighted(0.2, 0usize..4)),
            0..40,
        ),
    ) {
        let flavour = if iommufd { Flavour::Iommufd } else { Flavour::Type1 };
        let fake = Fake::default();
        let (id, space) = fake.space(flavour);
        // Mappings by first page: pages and their mappings of the kernel.
        let mut model: Vec<(u64, u64)> = Vec::new();
        for (kind, page, pages, gpa, fault) in steps {
            match fault {
                Some(healthy) => fake.break_after(healthy, 1),
                None => fake.repair(),
            }
            let (iova, len) = (page << 12, pages << 12);
            let inside = |m: &(u64, u64)| m.0 >= page && m.0 + m.1 <= page + pages;
            let overlaps = |m: &(u64, u64)| m.0 < page + pages && page < m.0 + m.1;
            match kind {
                0..=3 => {
                    let taken = model.iter().any(overlaps);
                    match space.map(iova, gpa << 12, len, RW) {
                        Ok(()) => {
                            prop_assert!(!taken && pages > 0);
                            model.push((page, pages));
                        }
                        Err(SpaceError::Exists { .. }) => prop_assert!(taken),
                        Err(SpaceError::OutOfRange { .. }) => prop_assert_eq!(pages, 0),
                        Err(SpaceError::NotRam { .. }) => prop_assert!(gpa + pages > 3),
                        Err(SpaceError::Full { .. }) => prop_assert!(fake.mappings(id).len() >= 7),
                        Err(SpaceError::Host(_)) => prop_assert!(fault.is_some()),
                        Err(error) => prop_assert!(false, "{error:?}"),
                    }
                }
                4..=6 => {
                    let cut = model.iter().any(|m| overlaps(m) && !inside(m));
                    match space.unmap(iova, len) {
                        Ok(()) => {
                            prop_assert!(!cut && pages > 0);
                            model.retain(|m| !inside(m));
                        }
                        Err(SpaceError::PartlyInside { .. }) => prop_assert!(cut),
                        Err(SpaceError::OutOfRange { .. }) => prop_assert_eq!(pages, 0),
                        Err(SpaceError::Host(_)) => prop_assert!(fault.is_some()),
                        Err(error) => prop_assert!(false, "{error:?}"),
                    }
                }
                _ => match space.clear() {
                    Ok(()) => model.clear(),
                    Err(SpaceError::Host(_)) => prop_assert!(fault.is_some()),
                    Err(error) => prop_assert!(false, "{error:?}"),
                },
            }
            let mut mapped: Vec<u64> = model.iter().flat_map(|m| m.0..m.0 + m.1).collect();
            mapped.sort_unstable();
            let kernel = fake.mappings(id).into_iter();
            let kernel: Vec<u64> = kernel
                .flat_map(|(iova, len)| iova >> 12..(iova + len) >> 12)
                .collect();
            prop_assert_eq!(kernel, mapped);
        }
    }
}
