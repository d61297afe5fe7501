//! Moves of a unit, with the kernel failing at every step.

use std::sync::Arc;

use super::fake::{Fake, Paging, Reach, all_ram, ram, reach_by, table};
use crate::backend::Permissions;
use crate::backend::shadow::{Shadow, ShadowBackend, ShadowConfig};
use crate::hv::pviommu::entry;
use crate::pviommu::Translation;
use crate::vfio::moves::{AttachMover, Left, Mover, SpaceMover};
use crate::vmm::TrackedPages;

const PLACES: [fn() -> Translation; 4] = [
    || Translation::Blocked,
    || Translation::Identity,
    || Translation::Paged(table(1)),
    || Translation::Paged(table(2)),
];

pub(super) fn reach_of(translation: Translation) -> Reach {
    match translation {
        Translation::Blocked => Reach::new(),
        Translation::Identity => all_ram(),
        Translation::Paged(table) => reach_by(table),
    }
}

fn is_part(part: &Reach, whole: &Reach) -> bool {
    part.iter()
        .all(|(page, target)| whole.get(page) == Some(target))
}

fn type1(fake: &Fake) -> Box<dyn Mover> {
    let paging = Arc::new(Paging(fake.clone()));
    Box::new(SpaceMover::new(fake.container(), Some(paging)))
}

fn iommufd(fake: &Fake) -> Box<dyn Mover> {
    let paging = Arc::new(Paging(fake.clone()));
    let mut mover = AttachMover::new(fake.iommufd(), Some(paging));
    mover.join(7).unwrap();
    mover.join(9).unwrap();
    Box::new(mover)
}

type Make = fn(&Fake) -> Box<dyn Mover>;
const MOVERS: [Make; 2] = [type1, iommufd];

/// Runs `f` with each interface and each pair of places.
fn each(mut f: impl FnMut(fn(&Fake) -> Box<dyn Mover>, Translation, Translation)) {
    for new in MOVERS {
        for from in PLACES {
            for to in PLACES {
                f(new, from(), to());
            }
        }
    }
}

#[test]
fn a_move_gives_what_it_says_and_never_more_on_the_way() {
    each(|new, from, to| {
        let fake = Fake::default();
        let mut mover = new(&fake);
        mover.go(from).unwrap();
        assert_eq!(fake.reach(), reach_of(from));
        fake.state().history.clear();
        mover.go(to).unwrap();
        assert_eq!(fake.reach(), reach_of(to));
        for reach in &fake.state().history {
            let either = is_part(reach, &reach_of(from)) || is_part(reach, &reach_of(to));
            assert!(either, "{from:?} to {to:?}: {reach:?}");
        }
        let follows = matches!(to, Translation::Paged(_));
        assert_eq!(fake.state().domains, usize::from(follows));
    });
}

/// With iommufd no step lies between two places.
#[test]
fn a_move_by_iommufd_is_one_step() {
    each(|_, from, to| {
        let fake = Fake::default();
        let mut mover = iommufd(&fake);
        mover.go(from).unwrap();
        fake.state().history.clear();
        mover.go(to).unwrap();
        let state = fake.state();
        let between = |reach: &&Reach| **reach != reach_of(from) && **reach != reach_of(to);
        assert_eq!(
            state.history.iter().find(between),
            None,
            "{from:?} to {to:?}"
        );
    });
}

#[test]
fn a_move_that_fails_at_any_step_says_where_the_devices_are() {
    each(|new, from, to| {
        for failing in [1, 2, 3, usize::MAX] {
            for healthy in 0..40 {
                let fake = Fake::default();
                let mut mover = new(&fake);
                mover.go(from).unwrap();
                fake.state().history.clear();
                let before = fake.state().calls;
                fake.break_after(healthy, failing);
                let result = mover.go(to);
                let calls = fake.state().calls - before;
                let reach = fake.reach();
                let (old, new) = (reach_of(from), reach_of(to));
                match &result {
                    Ok(()) => assert_eq!(reach, new),
                    Err(error) => match error.left {
                        Left::Unchanged => assert_eq!(reach, old, "{error}"),
                        Left::Blocked => assert!(reach.is_empty(), "{error}"),
                        Left::Unknown => {
                            assert!(is_part(&reach, &old) || is_part(&reach, &new), "{error}");
                        }
                    },
                }
                for reach in &fake.state().history {
                    let either = is_part(reach, &old) || is_part(reach, &new);
                    assert!(either, "{from:?} to {to:?}: {reach:?}");
                }
                // Once the kernel works again, so does everything.
                fake.repair();
                mover.go(to).unwrap();
                assert_eq!(fake.reach(), reach_of(to));
                mover.go(Translation::Blocked).unwrap();
                assert!(fake.reach().is_empty());
                assert_eq!(fake.state().domains, 0);
                if calls <= healthy {
                    break;
                }
            }
        }
    });
}

/// One failure of the kernel alone leaves devices where they were, or blocked.
#[test]
fn a_single_failure_never_leaves_devices_in_doubt() {
    each(|new, from, to| {
        for healthy in 0..40 {
            let fake = Fake::default();
            let mut mover = new(&fake);
            mover.go(from).unwrap();
            fake.break_after(healthy, 1);
            if let Err(error) = mover.go(to)
                && error.left == Left::Unknown
            {
                // The kernel refused to take away what it had mapped or attached: what devices reach
                // is then what they did, or nothing.
                let reach = fake.reach();
                assert!(
                    is_part(&reach, &reach_of(from)),
                    "{from:?} to {to:?}: {error}"
                );
            }
        }
    });
}

#[test]
fn going_where_one_is_flushes() {
    for new in MOVERS {
        let fake = Fake::default();
        let mut mover = new(&fake);
        let to = Translation::Paged(table(1));
        mover.go(to).unwrap();
        let calls = fake.state().calls;
        mover.go(to).unwrap();
        mover.flush(&[]).unwrap();
        mover.flush_all().unwrap();
        assert_eq!(fake.state().flushes, 3);
        assert_eq!(fake.state().calls, calls);
        mover.go(Translation::Identity).unwrap();
        mover.flush_all().unwrap();
        assert_eq!(fake.state().flushes, 3, "nothing to flush");
    }
}

#[test]
fn without_paging_a_table_is_refused_and_nothing_happens() {
    let fakes = [Fake::default(), Fake::default()];
    let movers: [Box<dyn Mover>; 2] = [
        Box::new(SpaceMover::new(fakes[0].container(), None)),
        Box::new(AttachMover::new(fakes[1].iommufd(), None)),
    ];
    for (fake, mut mover) in fakes.iter().zip(movers) {
        mover.join(1).unwrap();
        mover.go(Translation::Identity).unwrap();
        let calls = fake.state().calls;
        let error = mover.go(Translation::Paged(table(1))).unwrap_err();
        assert_eq!(error.left, Left::Unchanged);
        assert!(error.to_string().contains("nested nor shadowed"), "{error}");
        assert_eq!(fake.state().calls, calls);
    }
}

#[test]
fn nothing_stays_behind_in_iommufd() {
    let fake = Fake::default();
    let mut mover = iommufd(&fake);
    for to in [1, 2, 1, 3] {
        mover.go(Translation::Paged(table(to))).unwrap();
        assert_eq!(fake.spaces(), 2, "the identity and the table's");
    }
    mover.leave(7);
    assert_eq!(fake.reach(), reach_by(table(3)), "the other one stays");
    mover.leave(9);
    assert_eq!((fake.reach(), fake.spaces()), (Reach::new(), 1));
}

/// All stores come to the shadow by themselves.
#[derive(Debug)]
struct AllTracked;

impl TrackedPages for AllTracked {
    fn change(&self, _track: &[u64], _untrack: &[u64]) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_domain_that_met_a_limit_is_followed_anew_when_its_table_is_configured_again() {
    const LEAF: u64 = entry::PRESENT | entry::WRITABLE | entry::USER;
    let config = ShadowConfig {
        max_mappings: 1,
        ..ShadowConfig::default()
    };
    type Make = fn(&Fake, ShadowBackend) -> Box<dyn Mover>;
    let movers: [Make; 2] = [
        |fake, backend| Box::new(SpaceMover::new(fake.container(), Some(Arc::new(backend)))),
        |fake, backend| {
            let mut mover = AttachMover::new(fake.iommufd(), Some(Arc::new(backend)));
            mover.join(7).unwrap();
            Box::new(mover)
        },
    ];
    let reached = Reach::from([(0x1000, (0x11000, Permissions::READ | Permissions::WRITE))]);
    for new in movers {
        let fake = Fake::default();
        let shadow = Arc::new(Shadow::new(config, ram(), Arc::new(AllTracked)));
        let set = |table: u64, index: u64, value: u64| {
            let stored = shadow.store(table + index * 8, &value.to_le_bytes());
            stored.unwrap();
        };
        for (table, next) in [(0, 0x1000), (0x1000, 0x2000), (0x2000, 0x10000)] {
            set(table, 0, next | LEAF);
        }
        set(0x10000, 1, 0x11000 | LEAF);
        let mut mover = new(&fake, ShadowBackend(shadow.clone()));
        let to = Translation::Paged(table(0));
        // Right away, or after it was refused because it was too much still; directly, or elsewhere first.
        let ways = [
            (false, &[to][..]),
            (true, &[to]),
            (false, &[Translation::Blocked, to]),
            (false, &[Translation::Identity, to]),
        ];
        for (is_tried, way) in ways {
            mover.go(to).unwrap();
            assert_eq!(fake.reach(), reached);
            let blocked = shadow.counters().blocked;
            set(0x10000, 2, 0x11000 | LEAF);
            assert!(fake.reach().is_empty());
            assert_eq!(shadow.counters().blocked, blocked + 1);
            if is_tried {
                let error = mover.go(to).unwrap_err();
                assert_eq!(error.left, Left::Unchanged, "{error}");
                assert!(fake.reach().is_empty());
            }
            set(0x10000, 2, 0);
            for place in way {
                mover.go(*place).unwrap();
            }
            assert_eq!(fake.reach(), reached, "{way:?}");
        }
        // A flush does not bring it back: the guest asked for no more.
        set(0x10000, 2, 0x11000 | LEAF);
        set(0x10000, 2, 0);
        mover.flush_all().unwrap();
        assert!(fake.reach().is_empty());
        mover.go(Translation::Blocked).unwrap();
        assert!(fake.reach().is_empty());
    }
}
