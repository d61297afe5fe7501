use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

fn small(gpa: u64) -> Leaf {
    Leaf {
        gpa,
        level: 1,
        writable: true,
    }
}

fn one(iova: u64) -> FlushRange {
    FlushRange {
        first: iova >> 12,
        shift: 0,
    }
}

#[test]
fn a_hit_tells_the_address_and_the_bytes_left_in_the_page() {
    let tlb = Iotlb::new(64);
    assert_eq!(tlb.lookup(0x7123, false), None);
    tlb.fill(0x7123, &small(0x9000));
    assert_eq!(tlb.lookup(0x7123, true), Some((0x9123, 0xedd)));
    let large = Leaf {
        gpa: 0x4000_0000,
        level: 3,
        writable: true,
    };
    tlb.fill(0xffff_8000_0001, &large);
    assert_eq!(
        tlb.lookup(0xffff_8000_1234, true),
        Some((0x4000_1234, 0x3fff_edcc))
    );
    assert_eq!(tlb.counters().misses, 1);
}

#[test]
fn a_write_does_not_pass_an_entry_that_was_read() {
    let tlb = Iotlb::new(64);
    let clean = Leaf {
        writable: false,
        ..small(0x9000)
    };
    tlb.fill(0x7000, &clean);
    assert_eq!(tlb.lookup(0x7000, false), Some((0x9000, 0x1000)));
    assert_eq!(tlb.lookup(0x7000, true), None);
    tlb.fill(0x7000, &small(0x9000));
    assert_eq!(tlb.lookup(0x7000, true), Some((0x9000, 0x1000)));
}

#[test]
fn a_flush_of_one_page_leaves_its_neighbours_and_takes_the_large_page_around_it() {
    let mut tlb = Iotlb::new(64);
    for page in 0..8 {
        tlb.fill(page << 12, &small(0x10_0000 + (page << 12)));
    }
    let large = Leaf {
        gpa: 0x20_0000,
        level: 2,
        writable: true,
    };
    tlb.fill(0x60_0000, &large);
    tlb.flush(one(0x3000));
    for page in 0..8 {
        let found = tlb.lookup(page << 12, false).is_some();
        assert_eq!(found, page != 3, "page {page}");
    }
    assert!(tlb.lookup(0x60_0000, false).is_some());
    tlb.flush(one(0x7f_f000));
    assert_eq!(tlb.lookup(0x60_0000, false), None);
    assert_eq!(tlb.counters().full_flushes, 0);
}

#[test]
fn a_long_flush_empties_the_cache_and_every_flush_is_bounded() {
    let mut tlb = Iotlb::new(64);
    tlb.fill(0x1000, &small(0x9000));
    let all = FlushRange {
        first: 0,
        shift: 52,
    };
    tlb.flush(all);
    assert_eq!(tlb.lookup(0x1000, false), None);
    assert_eq!(tlb.counters().full_flushes, 1);
    // 2 MiB pages only: 64 MiB are few enough of them.
    let large = Leaf {
        gpa: 0,
        level: 2,
        writable: true,
    };
    tlb.fill(0x20_0000, &large);
    tlb.fill(0x800_0000, &large);
    let range = FlushRange {
        first: 0,
        shift: 14,
    };
    tlb.flush(range);
    assert_eq!(tlb.lookup(0x20_0000, false), None);
    assert!(tlb.lookup(0x800_0000, false).is_some());
    assert_eq!(tlb.counters().full_flushes, 1);
}

#[test]
fn old_generations_never_come_back() {
    let mut tlb = Iotlb::new(16);
    tlb.fill(0x1000, &small(0x9000));
    for _ in 0..GENERATIONS {
        tlb.flush_all();
        // The size is in use, so the tag alone decides.
        tlb.sizes.store(0xe, Ordering::Relaxed);
        assert_eq!(tlb.lookup(0x1000, false), None);
    }
}

#[test]
fn evictions_are_counted_at_the_limit() {
    let tlb = Iotlb::new(16);
    for page in 0..16 {
        tlb.fill(page << 12, &small(page << 12));
    }
    assert_eq!(tlb.counters().evictions, 0);
    tlb.fill(16 << 12, &small(0));
    assert_eq!(tlb.counters().evictions, 1);
    assert!(tlb.lookup(16 << 12, false).is_some());
}

#[derive(Debug, Clone)]
enum Step {
    Fill { iova: u64, level: u8, gpa: u64 },
    Flush { first: u64, shift: u8 },
    FlushAll,
    Lookup { iova: u64 },
}

fn steps() -> impl Strategy<Value = Step> {
    // Few addresses, far apart and next to each other, so that steps meet.
    let iova = (0u64..6, 0u64..4, 0u64..6)
        .prop_map(|(giga, mega, page)| giga << 30 | mega << 21 | page << 12);
    prop_oneof![
        4 => (iova.clone(), 1u8..4, 0u64..1 << 20).prop_map(|(iova, level, gpa)| Step::Fill {
            iova,
            level,
            gpa: (gpa << 12) & !(leaf_size(level) - 1),
        }),
        2 => (iova.clone(), 0u8..=52).prop_map(|(iova, shift)| Step::Flush {
            first: (iova >> 12) & !((1 << shift) - 1),
            shift,
        }),
        1 => Just(Step::FlushAll),
        4 => iova.prop_map(|iova| Step::Lookup { iova }),
    ]
}

proptest! {
    /// Whatever is found was filled last for that page and size, and not flushed since.
    #[test]
    fn the_cache_never_tells_more_than_it_was_told(steps in prop::collection::vec(steps(), 1..200)) {
        let mut tlb = Iotlb::new(16);
        let mut told: HashMap<(u8, u64), u64> = HashMap::new();
        for step in steps {
            match step {
                Step::Fill { iova, level, gpa } => {
                    tlb.fill(iova, &Leaf { gpa, level, writable: true });
                    told.insert((level, page(iova, level)), gpa);
                    // Nothing has come between: it must be there, unless a smaller page hides it.
                    prop_assert!(tlb.lookup(iova, true).is_some());
                }
                Step::Flush { first, shift } => {
                    tlb.flush(FlushRange { first, shift });
                    let last = first + ((1u64 << shift) - 1);
                    told.retain(|(level, page), _| {
                        let start = page << fold(*level);
                        let end = start + (1 << fold(*level)) - 1;
                        end < first || start > last
                    });
                }
                Step::FlushAll => {
                    tlb.flush_all();
                    told.clear();
                }
                Step::Lookup { iova } => {
                    if let Some((gpa, len)) = tlb.lookup(iova, true) {
                        let known = LEVELS.into_iter().filter_map(|level| {
                            let base = told.get(&(level, page(iova, level)))?;
                            let offset = iova & (leaf_size(level) - 1);
                            Some((base + offset, leaf_size(level) - offset))
                        });
                        prop_assert!(known.into_iter().any(|known| known == (gpa, len)));
                    }
                }
            }
        }
    }
}
