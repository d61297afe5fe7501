//! What happens when a guest, or the host, goes too far.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::*;

/// The domain is blocked: nothing is mapped, tracked or followed, and flushes succeed.
fn assert_blocked(bed: &Bed, space: &FakeSpace, domain: &dyn PagedDomain) {
    assert!(space.ranges().is_empty());
    assert_eq!(bed.shadow.counters().blocked, 1);
    domain.flush_all();
    domain.flush(&range(IOVA, 0));
    bed.set(0x4000, 4, 0x8000 | PAGE);
    assert!(space.ranges().is_empty());
    let counters = bed.shadow.counters();
    assert_eq!(
        (counters.tables, counters.mappings, counters.blocked),
        (0, 0, 1)
    );
}

#[test]
fn a_table_that_leads_to_itself_is_a_table_at_each_level() {
    let bed = Bed::new(config());
    let space = FakeSpace::new(None);
    let domain = bed.follow(0x1000, &space).unwrap();
    bed.set(0x1000, 0, 0x1000 | PAGE);
    assert_eq!(bed.shadow.counters().tables, 4);
    assert_eq!(bed.shadow.counters().tracked_pages, 1);
    assert_eq!(space.find(0), Some((0x1000, true)));
    // At its four places: a leaf, and a table that is three tables and a leaf, and so on.
    bed.set(0x1000, 1, 0x1000 | PAGE);
    assert_eq!(bed.shadow.counters().tables, 1 + 2 + 4 + 8);
    assert_eq!(space.ranges().len(), 16);
    bed.set(0x1000, 0, 0);
    domain.flush_all();
    assert_eq!(bed.shadow.counters().tables, 4);
    assert_eq!(space.ranges().len(), 1);
}

#[test]
fn absurd_tables_block_the_domain_in_little_time() {
    let bed = Bed::new(config());
    let space = FakeSpace::new(None);
    let domain = bed.follow(0x1000, &space).unwrap();
    let other = FakeSpace::new(None);
    bed.set(0x9000, 0, 0xa000 | LINK);
    let _other = bed.follow(0x9000, &other).unwrap();
    let start = Instant::now();
    let mut blocked_at = None;
    for index in 0..512 {
        bed.set(0x1000, index, 0x1000 | PAGE);
        if bed.shadow.counters().blocked != 0 {
            blocked_at = blocked_at.or(Some(index));
        }
    }
    assert!(blocked_at.is_some_and(|index| index < 32), "{blocked_at:?}");
    // 512^4 leaves: what is attached anew is refused at once.
    assert!(bed.follow(0x1000, &FakeSpace::new(None)).is_err());
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
    assert!(space.ranges().is_empty());
    domain.flush_all();
    // Another domain does not notice.
    bed.set(0xa000, 0, 0xb000 | LINK);
    bed.set(0xb000, 0, 0xc000 | LINK);
    bed.set(0xc000, 0, 0xd000 | PAGE);
    assert_eq!(other.find(0), Some((0xd000, true)));
}

#[test]
fn a_page_that_is_a_table_again_counts_as_one() {
    let config = ShadowConfig {
        max_pages: 1,
        ..config()
    };
    let mut pages = Pages::new(Bed::new(config).tracker, config);
    let place = Place {
        domain: 0,
        level: 1,
        base: 0,
    };
    pages.add(0x1000, place).unwrap();
    pages.commit().unwrap();
    pages.remove(0x1000, place);
    pages.add(0x2000, place).unwrap();
    let again = pages.add(0x1000, place);
    assert!(matches!(again, Err(Trouble::Pages { max: 1 })));
}

#[test]
fn each_limit_blocks() {
    let configs = [
        ShadowConfig {
            max_pages: 4,
            ..config()
        },
        ShadowConfig {
            max_tables: 4,
            ..config()
        },
        ShadowConfig {
            max_places: 1,
            ..config()
        },
        ShadowConfig {
            max_mappings: 1,
            ..config()
        },
        ShadowConfig {
            max_bytes: Some(0x1fff),
            ..config()
        },
    ];
    for (config, way) in configs.into_iter().zip(0..) {
        let bed = Bed::new(config);
        let space = FakeSpace::new(None);
        mapped(&bed);
        let domain = bed.follow(0x1000, &space).unwrap();
        assert_eq!(space.ranges().len(), 1, "{config:?}");
        match way {
            // A fifth page, at a fifth place.
            0 | 1 => bed.set(0x3000, 4, 0x5000 | LINK),
            2 => bed.set(0x3000, 4, 0x4000 | LINK),
            _ => bed.set(0x4000, 5, 0x9000 | PAGE),
        }
        assert_blocked(&bed, &space, &*domain);
    }
    // The host's own limit, met by a table that is linked as a whole.
    let bed = Bed::new(config());
    let space = FakeSpace::new(Some(2));
    mapped(&bed);
    let domain = bed.follow(0x1000, &space).unwrap();
    bed.set(0x5000, 0, 0x9000 | PAGE);
    bed.set(0x5000, 1, 0xa000 | PAGE);
    bed.set(0x3000, 4, 0x5000 | LINK);
    assert_blocked(&bed, &space, &*domain);
}

#[test]
fn a_domain_that_was_blocked_can_be_followed_anew() {
    let bed = Bed::new(ShadowConfig {
        max_mappings: 1,
        ..config()
    });
    let space = FakeSpace::new(None);
    mapped(&bed);
    let domain = bed.follow(0x1000, &space).unwrap();
    bed.set(0x4000, 5, 0x9000 | PAGE);
    assert!(space.ranges().is_empty());
    let again = FakeSpace::new(None);
    assert!(bed.follow(0x1000, &again).is_err());
    assert!(again.ranges().is_empty());
    bed.set(0x4000, 5, 0);
    let again_domain = bed.follow(0x1000, &again).unwrap();
    assert_eq!(again.find(IOVA), Some((0x8000, true)));
    drop((domain, again_domain));
    assert!(bed.tracker.tracked.lock().unwrap().is_empty());
}

#[test]
fn a_host_that_fails_costs_the_domain_and_nothing_else() {
    // Tracking.
    let bed = Bed::new(config());
    let space = FakeSpace::new(None);
    mapped(&bed);
    let domain = bed.follow(0x1000, &space).unwrap();
    *bed.tracker.broken.lock().unwrap() = true;
    bed.set(0x3000, 4, 0x5000 | LINK);
    assert_eq!(
        bed.get(0x3000, 4),
        0x5000 | LINK,
        "the guest's store is done"
    );
    *bed.tracker.broken.lock().unwrap() = false;
    // Another domain that has the page is not misled by the attempt.
    let other = FakeSpace::new(None);
    let other_domain = bed.follow(0x5000, &other).unwrap();
    assert!(bed.is_tracked(0x5000));
    assert_eq!(bed.shadow.counters().tracked_pages, 1);
    bed.set(0xb000, 0, 0x20_0000 | LARGE);
    bed.set(0x5000, 0, 0xb000 | LINK);
    assert_eq!(other.find(0), None);
    bed.set(0xc000, 0, 0x20_0000 | LARGE);
    bed.set(0xb000, 0, 0xc000 | LINK);
    assert_eq!(other.find(0), Some((0x20_0000, true)));
    drop(other_domain);
    assert_blocked(&bed, &space, &*domain);
    assert!(bed.tracker.tracked.lock().unwrap().is_empty());
    // Maps, and unmaps in a flush.
    for unmap in [false, true] {
        let bed = Bed::new(config());
        let space = FakeSpace::new(None);
        mapped(&bed);
        let domain = bed.follow(0x1000, &space).unwrap();
        bed.set(0x4000, 4, 0);
        *space.fails_in.lock().unwrap() = Some(0);
        match unmap {
            true => domain.flush(&range(IOVA, 0)),
            false => bed.set(0x4000, 5, 0x9000 | PAGE),
        }
        assert_blocked(&bed, &space, &*domain);
    }
}

const GIB: u64 = 1 << 30;

/// A VM with 1 GiB of RAM and the default limits, and a space of it.
fn large() -> (Bed, Arc<FakeSpace>) {
    let ram = Range { start: 0, end: GIB };
    let ram = std::slice::from_ref(&ram);
    let config = ShadowConfig {
        physical_bits: 50,
        ..ShadowConfig::default()
    };
    (Bed::with_ram(ram, config), FakeSpace::with_ram(ram, None))
}

#[test]
fn few_tables_of_large_leaves_do_not_map_ram_thousands_of_times() {
    let (bed, space) = large();
    for index in 0..512 {
        bed.set(0x2000, index, LARGE);
    }
    // 65,024 leaves: tens of TiB, below every limit of a number.
    for index in 0..127 {
        bed.set(0x1000, index, 0x2000 | LINK);
    }
    let error = bed.follow(0x1000, &space).unwrap_err();
    assert!(
        error.0.to_string().contains("4294967296 bytes"),
        "{error:?}"
    );
    // The interrupt range is not mapped.
    assert_eq!(space.most_bytes(), 4 * GIB - 0x10_0000);
    assert!(space.ranges().is_empty());
    assert_eq!(bed.shadow.counters().blocked, 1);
    assert!(bed.tracker.tracked.lock().unwrap().is_empty());
}

#[test]
fn bytes_that_are_unmapped_can_be_mapped_again() {
    let (bed, space) = large();
    bed.set(0x1000, 0, 0x2000 | LINK);
    let domain = bed.follow(0x1000, &space).unwrap();
    for round in 0..3 {
        // Not at 3 GiB, of which the interrupt range is a part.
        for index in [0, 1, 2, 4] {
            bed.set(0x2000, index + 8 * round, LARGE);
        }
        assert_eq!(space.ranges().len(), 4, "four times all RAM");
        for index in [0, 1, 2, 4] {
            bed.set(0x2000, index + 8 * round, 0);
        }
        domain.flush_all();
        assert!(space.ranges().is_empty());
    }
    for index in [0, 1, 2, 4] {
        bed.set(0x2000, index, LARGE);
    }
    // Two smaller ones in place of one.
    bed.set(0x3000, 0, 0x20_0000 | LARGE);
    bed.set(0x3000, 1, 0x40_0000 | LARGE);
    bed.set(0x2000, 4, 0x3000 | LINK);
    domain.flush_all();
    assert_eq!(space.find(4 * GIB), Some((0x20_0000, true)));
    assert_eq!(bed.shadow.counters().blocked, 0);
    bed.set(0x2000, 5, LARGE);
    assert_eq!(bed.shadow.counters().blocked, 1);
    assert!(space.ranges().is_empty());
    assert_eq!(space.most_bytes(), 4 * GIB);
}

#[test]
fn a_store_that_kvm_cannot_report_costs_the_domains_if_too_many_pages_are_tracked() {
    let bed = Bed::new(ShadowConfig {
        max_stepped_pages: 5,
        ..config()
    });
    let spaces = [(); 2].map(|()| FakeSpace::new(None));
    mapped(&bed);
    let domain = bed.follow(0x1000, &spaces[0]).unwrap();
    let _other = bed.follow(0x9000, &spaces[1]).unwrap();
    // At the limit, with each page written past the tracker.
    let link = (0x5000 | LINK).to_le_bytes();
    let done = bed
        .shadow
        .with_pages_writable(false, || bed.ram.write(0x3000 + 4 * 8, &link));
    assert!(matches!(done, Ok(Ok(()))));
    assert_eq!(bed.shadow.counters().tracked_pages, 6);
    // A page that is a table no more may be what the guest wants, so it goes first.
    bed.set(0x3000, 4, 0);
    assert!(bed.is_tracked(0x5000));
    bed.set(0x3000, 5, 0x6000 | LINK);
    bed.set(0x3000, 6, 0x7000 | LINK);
    let never = || unreachable!("too many pages");
    let let_go = |writable| Err::<(), _>(LetGo { writable });
    bed.set(0x3000, 6, 0);
    assert!(bed.is_tracked(0x7000));
    *bed.tracker.broken.lock().unwrap() = true;
    let attempt = |again| bed.shadow.with_pages_writable(again, never);
    assert_eq!(attempt(false), let_go(false));
    *bed.tracker.broken.lock().unwrap() = false;
    assert_eq!(attempt(false), let_go(true));
    assert!(!bed.is_tracked(0x7000) && bed.is_tracked(0x6000));
    // Another vCPU may have wanted the same, so that there is none left for this one.
    assert_eq!(attempt(false), let_go(false));
    assert_eq!(bed.shadow.counters().blocked, 0);
    assert_eq!(spaces[0].find(IOVA), Some((0x8000, true)));
    assert_eq!(attempt(true), let_go(true));
    assert!(bed.tracker.tracked.lock().unwrap().is_empty());
    assert_eq!(bed.shadow.counters().blocked, 2);
    assert!(spaces[0].ranges().is_empty());
    domain.flush_all();
    assert!(spaces[0].ranges().is_empty() && domain.is_blocked());
    // There is nothing in the way any more.
    assert_eq!(bed.shadow.with_pages_writable(true, || 7), Ok(7));
}
