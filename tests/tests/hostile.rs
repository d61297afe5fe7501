//! A guest that means harm, for a few rounds on every bed; `vpci-vmm hostile` goes on for as long as
//! one likes. One test: what the process holds is compared, and tests of a program run at once.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use vpci_conformance::bed::{Bed, BedKind};
use vpci_conformance::beds;
use vpci_conformance::storm::{self, Storm};

fn storm(bed: &Arc<dyn Bed>, seed: u64, time: Duration) -> Storm {
    let storm = storm::run(bed, seed, time, |round| eprintln!("{round:?}"));
    let (failed, exchanges) = (&storm.failed, storm.exchanges.join("\n"));
    assert!(failed.is_none(), "{failed:?}\n{exchanges}");
    storm
}

fn kvm() -> Option<Arc<dyn Bed>> {
    let reason = match beds::bed(BedKind::Kvm).map(|bed| (bed.available(), bed)) {
        Some((Ok(()), bed)) => return Some(bed),
        Some((Err(reason), _)) => reason,
        None => "this build has no such bed".to_owned(),
    };
    let required = std::env::var("VPCI_REQUIRE").unwrap_or_default();
    let required = required.split(',').any(|name| name.trim() == "kvm");
    assert!(!required, "the bed kvm is required: {reason}");
    eprintln!("SKIPPED a hostile guest on kvm: {reason}");
    None
}

#[test]
fn a_guest_that_means_harm_does_none() {
    let sim: Arc<dyn Bed> = Arc::new(beds::sim::Sim);
    // The same seed is the same storm.
    let storms = [1, 2].map(|_| storm(&sim, 7, Duration::ZERO));
    let rounds = storms.map(|storm| (storm.rounds[0].acts, storm.rounds[0].calls));
    assert_eq!(rounds[0], rounds[1]);
    let (acts, calls) = rounds[0];
    assert!(acts.iter().all(|count| *count > 0), "{acts:?}");
    assert!(calls[0] > 1000 && calls[1] > 1000, "{calls:?}");
    storm(&sim, 8, Duration::from_secs(3));
    if let Some(kvm) = kvm() {
        storm(&kvm, 1, Duration::from_secs(1));
    }
}
