//! Random stores, links, unlinks and flushes.
#![forbid(unsafe_code)]

use proptest::prelude::*;

use super::*;

/// Pages that may be tables: so few that they are shared, and lead to themselves.
const TABLES: [u64; 6] = [0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x20_0000];
/// Entries that are used. 503 at level 2, under 3 at level 3, is where the interrupt range lies.
const INDICES: [u64; 4] = [0, 3, 503, 511];

#[derive(Debug, Clone)]
enum Step {
    /// By a vCPU: an entry, or one half of it.
    Store {
        table: usize,
        index: usize,
        value: u64,
        half: Option<bool>,
    },
    /// By nobody that is watched.
    Past {
        table: usize,
        index: usize,
        value: u64,
    },
    /// By a vCPU at the moment at which the page is tracked.
    Last {
        table: usize,
        index: usize,
        value: u64,
    },
    Flush {
        domain: usize,
        iova: usize,
        shift: u8,
    },
    FlushAll {
        domain: usize,
    },
    /// Follows a root, or stops to.
    Attach {
        domain: usize,
        root: Option<usize>,
    },
}

fn value() -> impl Strategy<Value = u64> {
    let table = prop::sample::select(&TABLES[..]);
    let flags = prop_oneof![
        6 => Just(LINK),
        1 => Just(LINK & !entry::WRITABLE),
        1 => Just(LINK & !entry::USER),
        1 => Just(LINK & !entry::PRESENT),
        1 => Just(LINK & !entry::ACCESSED),
    ];
    let page = prop::sample::select(&[0x8000, 0xf_f000, 0x10_0000, 0x20_0000, 0x1_0000][..]);
    let large = prop::sample::select(&[0, 0x20_0000, 0x40_0000, 0x20_1000, 1 << 30, 1 << 50][..]);
    prop_oneof![
        4 => (table, flags).prop_map(|(table, flags)| table | flags),
        3 => page.clone().prop_map(|page| page | PAGE),
        1 => page.prop_map(|page| page | PAGE & !entry::WRITABLE),
        2 => large.prop_map(|large| large | LARGE),
        3 => Just(0),
        1 => any::<u64>(),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..TABLES.len(), 0..INDICES.len(), value());
    let iova = 0..INDICES.len().pow(4);
    let shift = prop_oneof![4 => Just(0), 1 => Just(1), 1 => Just(9), 1 => Just(18), 1 => Just(27), 1 => 0u8..=52];
    prop_oneof![
        24 => (place(), prop::option::weighted(0.1, any::<bool>())).prop_map(
            |((table, index, value), half)| Step::Store { table, index, value, half }),
        1 => place().prop_map(|(table, index, value)| Step::Past { table, index, value }),
        2 => place().prop_map(|(table, index, value)| Step::Last { table, index, value }),
        8 => (0..2usize, iova, shift).prop_map(
            |(domain, iova, shift)| Step::Flush { domain, iova, shift }),
        2 => (0..2usize).prop_map(|domain| Step::FlushAll { domain }),
        2 => (0..2usize, prop::option::weighted(0.8, 0..TABLES.len())).prop_map(
            |(domain, root)| Step::Attach { domain, root }),
    ]
}

/// The addresses whose indices are all used: the only ones that can be mapped.
fn candidate(number: usize) -> u64 {
    let count = INDICES.len();
    let index = |place: usize| INDICES[number / count.pow(place as u32) % count];
    index(0) << 39 | index(1) << 30 | index(2) << 21 | index(3) << 12
}

fn candidates() -> impl Iterator<Item = u64> {
    (0..INDICES.len().pow(4)).map(candidate)
}

struct Followed {
    root: u64,
    space: Arc<FakeSpace>,
    domain: Arc<dyn PagedDomain>,
    /// Since the last flush of everything somebody stored past the tracker.
    past: bool,
}

fn check(bed: &Bed, followed: &Followed, flushed: &Range<u64>) -> Result<(), TestCaseError> {
    for iova in candidates() {
        let expected = bed.look_up(followed.root, iova);
        let found = followed.space.find(iova);
        if flushed.contains(&iova) || expected.is_some() && !followed.past {
            prop_assert_eq!(found, expected, "{:#x}", iova);
        }
    }
    if flushed.contains(&0) && flushed.end == 1 << 48 {
        for range in followed.space.ranges() {
            for iova in [range.start, range.end - 0x1000] {
                let found = followed.space.find(iova);
                prop_assert_eq!(found, bed.look_up(followed.root, iova), "{:#x}", iova);
            }
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn spaces_are_what_the_tables_say(steps in prop::collection::vec(step(), 1..120)) {
        let bed = Bed::new(config());
        let mut domains: [Option<Followed>; 2] = [None, None];
        for step in steps {
            let mut flushed = [0..0, 0..0];
            match step {
                Step::Store { table, index, value, half } => {
                    let at = TABLES[table] + INDICES[index] * 8;
                    let bytes = value.to_le_bytes();
                    match half {
                        None => bed.store(at, &bytes),
                        Some(false) => bed.store(at, &bytes[..4]),
                        Some(true) => bed.store(at + 4, &bytes[4..]),
                    }
                }
                Step::Past { table, index, value } => {
                    let at = TABLES[table] + INDICES[index] * 8;
                    bed.ram.write(at, &value.to_le_bytes()).unwrap();
                    for followed in domains.iter_mut().flatten() {
                        followed.past = true;
                    }
                }
                Step::Last { table, index, value } => {
                    let at = TABLES[table] + INDICES[index] * 8;
                    bed.tracker.last_stores.lock().unwrap().push((at, value));
                }
                Step::Flush { domain, iova, shift } => {
                    if let Some(followed) = &domains[domain] {
                        let ranges = range(candidate(iova), shift);
                        followed.domain.flush(&ranges);
                        let start = ranges[0].first << 12;
                        let size = 1u64.checked_shl(u32::from(shift) + 12).unwrap_or(u64::MAX);
                        flushed[domain] = start..start.saturating_add(size);
                    }
                }
                Step::FlushAll { domain } => {
                    if let Some(followed) = &mut domains[domain] {
                        followed.domain.flush_all();
                        followed.past = false;
                        flushed[domain] = 0..1 << 48;
                    }
                }
                Step::Attach { domain, root } => {
                    domains[domain] = None;
                    if let Some(root) = root {
                        let root = TABLES[root];
                        let space = FakeSpace::new(None);
                        let followed = bed.follow(root, &space).unwrap();
                        domains[domain] = Some(Followed { root, space, domain: followed, past: false });
                        flushed[domain] = 0..1 << 48;
                    }
                }
            }
            for (followed, flushed) in domains.iter().zip(&flushed) {
                if let Some(followed) = followed {
                    check(&bed, followed, flushed)?;
                }
            }
        }
        drop(domains);
        prop_assert!(bed.tracker.tracked.lock().unwrap().is_empty());
        let counters = bed.shadow.counters();
        prop_assert_eq!((counters.tables, counters.mappings, counters.blocked), (0, 0, 0));
    }
}
