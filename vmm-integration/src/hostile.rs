//! `vpci-vmm hostile`: lets a guest that means harm loose on the host.
#![forbid(unsafe_code)]

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use vpci_conformance::storm::{self, Round, Storm};

use crate::cli::HostileArgs;
use crate::conformance::bed;
use crate::print::print;

/// The host lived through it.
const HELD: u8 = 0;
/// It did not.
const FAILED: u8 = 1;
/// The bed is missing.
const NO_BED: u8 = 3;

/// Runs the guest; returns the exit status.
pub(crate) fn hostile(args: &HostileArgs) -> u8 {
    let bed = match bed(args.bed, args.hyperv) {
        Ok(bed) => bed,
        Err(reason) => {
            eprintln!("vpci-vmm: {reason}");
            return NO_BED;
        }
    };
    // The standard library's own source of chance.
    let seed = args
        .seed
        .unwrap_or_else(|| RandomState::new().build_hasher().finish());
    let mut printed = print(&format!(
        "hostile guest on {}, seed {seed}\n",
        bed.kind().name()
    ));
    let time = Duration::from_secs(args.seconds.into());
    let storm = storm::run(&bed, seed, time, |round| {
        printed = print(&format!("{}\n", line(round)));
    });
    if let Err(error) = printed.and_then(|()| print(&format!("{}\n", summary(&storm)))) {
        eprintln!("vpci-vmm: the rounds cannot be printed: {error}");
        return FAILED;
    }
    let Some((seed, failure)) = &storm.failed else {
        return HELD;
    };
    for exchange in &storm.exchanges {
        eprintln!("    {exchange}");
    }
    eprintln!("vpci-vmm: the round of seed {seed} did not hold: {failure}");
    FAILED
}

fn line(round: &Round) -> String {
    let [plugged, asked, torn, resets] = round.acts;
    let [succeeded, failed] = round.calls;
    format!(
        "seed {:>20}: {succeeded} hypercalls succeeded, {failed} failed; buses: {plugged} plugged, \
         {asked} asked for, {torn} torn out; {resets} resets; then {}",
        round.seed, round.usage
    )
}

fn summary(storm: &Storm) -> String {
    let held = storm.rounds.len();
    let seconds = storm.time.as_secs_f64();
    match (storm.rounds.first(), storm.rounds.last()) {
        (Some(first), Some(last)) => format!(
            "{held} rounds held in {seconds:.0} s; at first {}; in the end {}",
            first.usage, last.usage
        ),
        _ => format!("no round held in {seconds:.0} s"),
    }
}
