//! Runs the conformance suite on every bed of this machine.
//!
//! A bed that is missing is skipped with a line that says so; the environment variable
//! `VPCI_REQUIRE`, a list such as `kvm,rig`, turns that into a failure.
#![forbid(unsafe_code)]

use vpci_conformance::bed::BedKind;
use vpci_conformance::{beds, checks, report, runner};

fn is_required(bed: BedKind) -> bool {
    let required = std::env::var("VPCI_REQUIRE").unwrap_or_default();
    required.split(',').any(|name| name.trim() == bed.name())
}

fn suite_passes_on(kind: BedKind) {
    let name = kind.name();
    let bed = match beds::bed(kind) {
        Some(bed) => bed.available().map(|()| bed),
        None => Err("this build has no such bed".to_owned()),
    };
    let bed = match bed {
        Ok(bed) => bed,
        Err(reason) => {
            assert!(!is_required(kind), "the bed {name} is required: {reason}");
            eprintln!("SKIPPED conformance on {name}: {reason}");
            return;
        }
    };
    let checks = checks::matching(None);
    let run = runner::run(&bed, &checks, |_, _, record| {
        if let Some(record) = record {
            eprint!("{}", report::failure(record));
        }
    });
    eprint!("{}", report::summary(&run));
    assert!(run.passed(), "checks failed on {name}");
    let (passed, ..) = run.counts();
    assert!(passed > 0, "no check ran on {name}");
}

#[test]
fn the_suite_passes_on_sim() {
    suite_passes_on(BedKind::Sim);
}

#[test]
fn the_suite_passes_on_kvm() {
    suite_passes_on(BedKind::Kvm);
}
