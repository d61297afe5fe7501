//! Units of a group: who is where, and who may go where.

use std::sync::Arc;

use proptest::prelude::*;

use super::fake::{Fake, Paging, Reach, reach_by, table};
use super::moves::reach_of;
use crate::pviommu::{Attachment, FlushRange, Translation};
use crate::vfio::moves::{AttachMover, Mover, SpaceMover};
use crate::vfio::unit::{Unit, UnitError};

pub(super) const A: u32 = 1;
pub(super) const B: u32 = 2;

pub(super) fn unit(fake: &Fake, iommufd: bool) -> Unit<Box<dyn Mover>> {
    let paging = Arc::new(Paging(fake.clone()));
    let mover: Box<dyn Mover> = if iommufd {
        Box::new(AttachMover::new(fake.iommufd(), Some(paging)))
    } else {
        Box::new(SpaceMover::new(fake.container(), Some(paging)))
    };
    Unit::new(5, mover)
}

fn to(domain: u32, translation: Translation) -> Attachment {
    Attachment {
        domain,
        translation,
        ..Attachment::DEFAULT
    }
}

fn paged(domain: u32, n: u64) -> Attachment {
    to(domain, Translation::Paged(table(n)))
}

const BLOCKED: Attachment = Attachment {
    translation: Translation::Blocked,
    ..Attachment::DEFAULT
};

#[test]
fn a_differing_domain_is_refused_by_the_name_of_group_and_member() {
    for iommufd in [false, true] {
        let fake = Fake::default();
        let mut unit = unit(&fake, iommufd);
        unit.join(A, "0000:02:01.0").unwrap();
        unit.join(B, "0000:02:02.0").unwrap();
        let before = fake.reach();
        let error = unit.attach(A, &paged(5, 1)).unwrap_err();
        assert!(matches!(error, UnitError::OtherDomain(_)));
        assert_eq!(
            error.to_string(),
            "0000:02:01.0: its IOMMU group 5 is in another domain, with 0000:02:02.0; devices of one \
             group share a domain"
        );
        assert_eq!(fake.reach(), before);
        // A third one cannot come in where the others are not in the default domain.
        unit.attach(A, &BLOCKED).unwrap();
        unit.attach(B, &paged(5, 1)).unwrap();
        assert!(unit.join(3, "0000:02:03.0").is_err());
        assert!(fake.reach().is_empty(), "the first is still blocked");
        unit.attach(A, &paged(5, 1)).unwrap();
        assert_eq!(fake.reach(), reach_by(table(1)));
    }
}

#[test]
fn all_are_blocked_as_long_as_one_is() {
    for iommufd in [false, true] {
        let fake = Fake::default();
        let mut unit = unit(&fake, iommufd);
        unit.join(A, "a").unwrap();
        unit.join(B, "b").unwrap();
        unit.attach(A, &BLOCKED).unwrap();
        assert!(fake.reach().is_empty());
        // B was in the default domain and may say so again; that lets A in nowhere.
        unit.attach(B, &Attachment::DEFAULT).unwrap();
        assert!(fake.reach().is_empty());
        unit.attach(A, &Attachment::DEFAULT).unwrap();
        assert_eq!(fake.reach(), reach_of(Translation::Identity));
        unit.attach(B, &BLOCKED).unwrap();
        unit.leave(B);
        assert_eq!(fake.reach(), reach_of(Translation::Identity));
        unit.leave(A);
        assert!(fake.reach().is_empty() && unit.is_empty());
    }
}

#[test]
fn a_domain_that_is_configured_anew_takes_all_along() {
    for iommufd in [false, true] {
        let fake = Fake::default();
        let mut unit = unit(&fake, iommufd);
        unit.join(A, "a").unwrap();
        unit.join(B, "b").unwrap();
        for id in [A, B] {
            unit.attach(id, &BLOCKED).unwrap();
        }
        for n in [1, 2] {
            for id in [A, B] {
                unit.attach(id, &paged(5, n)).unwrap();
            }
            assert_eq!(fake.reach(), reach_by(table(n)));
        }
        // The same effect in another domain is the same.
        unit.attach(A, &paged(6, 2)).unwrap();
        assert_eq!(fake.reach(), reach_by(table(2)));
        assert!(unit.attach(A, &paged(6, 1)).is_err());
    }
}

#[test]
fn a_move_that_the_kernel_refuses_changes_no_mind() {
    for iommufd in [false, true] {
        let fake = Fake::default();
        let mut unit = unit(&fake, iommufd);
        unit.join(A, "a").unwrap();
        // The mapping of the first page, or the first attachment.
        fake.break_after(1, 1);
        let error = unit.attach(A, &paged(5, 1)).unwrap_err().to_string();
        assert!(
            error.starts_with("a: ") && error.contains("Input/output"),
            "{error}"
        );
        fake.repair();
        assert_eq!(fake.reach(), reach_of(Translation::Identity));
        unit.attach(A, &paged(5, 1)).unwrap();
        assert_eq!(fake.reach(), reach_by(table(1)));
    }
}

#[test]
fn what_the_kernel_did_not_take_away_goes_with_the_next_try() {
    let fake = Fake::default();
    let mut unit = unit(&fake, false);
    for (id, name) in [(A, "a"), (B, "b")] {
        unit.join(id, name).unwrap();
        unit.attach(id, &BLOCKED).unwrap();
    }
    unit.attach(B, &paged(5, 2)).unwrap();
    // The first page is mapped, the second is not, and the first cannot be taken away again.
    unit.attach(B, &BLOCKED).unwrap();
    unit.attach(A, &paged(5, 2)).unwrap();
    fake.break_after(1, 2);
    assert!(unit.attach(B, &paged(5, 1)).is_err());
    assert!(!fake.reach().is_empty(), "the fault of this test");
    fake.repair();
    assert!(unit.attach(B, &paged(6, 1)).is_err(), "another domain");
    assert!(fake.reach().is_empty(), "B is blocked");
}

#[test]
fn a_flush_takes_away_what_a_failed_move_left() {
    for all in [false, true] {
        let fake = Fake::default();
        let mut unit = unit(&fake, false);
        unit.join(A, "a").unwrap();
        unit.attach(A, &paged(5, 1)).unwrap();
        // The space cannot be emptied: what was mapped stays, and nothing follows the table.
        fake.break_after(0, 1);
        assert!(unit.attach(A, &paged(6, 2)).is_err());
        assert_eq!(fake.state().domains, 0);
        assert_eq!(fake.reach(), reach_by(table(1)), "the fault of this test");
        fake.repair();
        // The guest has stayed in its domain, and flushes it.
        let history = fake.state().history.len();
        match all {
            true => unit.flush_all(),
            false => unit.flush(&[FlushRange { first: 0, shift: 0 }]),
        }
        let emptied = fake.state().history[history..].contains(&Reach::new());
        assert!(emptied, "nothing stale is left");
        assert_eq!(fake.reach(), reach_by(table(1)));
        assert_eq!(fake.state().domains, 1, "the table is followed again");
    }
}

proptest! {
    /// Random moves of three devices with a kernel that fails now and then. What the devices reach
    /// is at all times what one of them may have, and what all may have if all went well.
    #[test]
    fn a_group_reaches_what_all_its_devices_may(
        iommufd in any::<bool>(),
        steps in prop::collection::vec(
            (0u32..3, 0u8..9, 1u32..3, 1u64..3, prop::option::weighted(0.3, (0usize..6, 1usize..3))),
            0..40,
        ),
    ) {
        let fake = Fake::default();
        let mut unit = unit(&fake, iommufd);
        let mut wanted: [Option<Attachment>; 3] = [None; 3];
        // Those that were put out count no more than those that are not there.
        let mut out = [false; 3];
        for (id, kind, domain, n, fault) in steps {
            match fault {
                Some((healthy, failing)) => fake.break_after(healthy, failing),
                None => fake.repair(),
            }
            let target = match kind {
                0..=2 => paged(domain, n),
                3 => to(domain, Translation::Identity),
                4 => Attachment::DEFAULT,
                5 | 6 => BLOCKED,
                7 => {
                    unit.leave(id);
                    fake.close(id);
                    wanted[id as usize] = None;
                    out[id as usize] = false;
                    continue;
                }
                _ => {
                    unit.put_out(id);
                    // One that is not detached goes on to count.
                    out[id as usize] = unit.is_out(id);
                    if wanted[id as usize].is_some() {
                        wanted[id as usize] = Some(BLOCKED);
                    }
                    continue;
                }
            };
            if wanted[id as usize].is_none() {
                if unit.join(id, "x").is_ok() {
                    wanted[id as usize] = Some(Attachment::DEFAULT);
                }
                continue;
            }
            let result = unit.attach(id, &target);
            let blocks = target.translation == Translation::Blocked;
            if result.is_ok() {
                out[id as usize] = false;
                for (other, attachment) in wanted.iter_mut().enumerate() {
                    let Some(attachment) = attachment else { continue };
                    if other == id as usize {
                        *attachment = target;
                    } else if !blocks
                        && !out[other]
                        && attachment.translation != Translation::Blocked
                        && attachment.domain == target.domain
                    {
                        attachment.translation = target.translation;
                    }
                }
                let counting = wanted.iter().zip(out).filter(|(_, out)| !out);
                let all: Vec<_> = counting
                    .filter_map(|(wanted, _)| Some(wanted.as_ref()?.translation))
                    .collect();
                let common = match all.windows(2).all(|pair| pair[0] == pair[1]) {
                    true => all[0],
                    false => Translation::Blocked,
                };
                prop_assert_eq!(fake.reach(), reach_of(common));
            } else {
                prop_assert!(fault.is_some() || !blocks, "blocking is never refused");
                if blocks {
                    wanted[id as usize] = Some(target);
                }
                out[id as usize] = unit.is_out(id);
                // Where they were, or nowhere, or what the kernel could not take away.
                let reach = fake.reach();
                let known = wanted.iter().flatten().any(|a| reach == reach_of(a.translation));
                prop_assert!(known || reach.is_empty() || fault.is_some());
            }
        }
        fake.repair();
        for id in 0..3 {
            unit.leave(id);
        }
        prop_assert_eq!(fake.reach(), Reach::new());
        prop_assert_eq!(fake.state().domains, 0);
    }
}
