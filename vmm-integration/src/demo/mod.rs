//! `vpci-vmm demo`: the main job, step by step, with what was seen and what it means.
//!
//! The guest is the model of the conformance suite, so the demonstration needs no guest kernel; it
//! runs on the best bed of this machine.
#![forbid(unsafe_code)]

mod iommu;
mod journey;
mod report;
mod stage;

use std::io::{self, Write};
use std::sync::Arc;

use vpci_conformance::bed::BedKind;
use vpci_conformance::check::Context;
use vpci_conformance::trace::Trace;

use crate::cli::{DemoArgs, HypervMode};
use crate::conformance;
use crate::print::print;
use stage::Stage;

/// Every step held.
const HELD: u8 = 0;
/// A step did not hold, or its result could not be printed.
const FAILED: u8 = 1;
/// The bed is missing.
const NO_BED: u8 = 3;

/// Runs the demonstration; returns the exit status.
pub(crate) fn demo(args: &DemoArgs) -> u8 {
    let bed = match conformance::bed(args.bed, HypervMode::User) {
        Ok(bed) => bed,
        Err(reason) => {
            eprintln!("vpci-vmm: {reason}");
            return NO_BED;
        }
    };
    let kind = bed.kind();
    let trace = Arc::new(Trace::default());
    let context = Context::new(bed, trace.clone());
    let out: Box<dyn Write> = match args.json {
        true => Box::new(io::sink()),
        false => Box::new(io::stdout()),
    };
    let mut stage = Stage::new(out, trace);
    stage.say(introduction(kind));
    // A step that failed ended the journey; its record says why.
    let _end = journey::run(&mut stage, &context);
    let faults = stage.take_faults();
    let records = stage.into_records();
    let text = match args.json {
        true => report::json(kind, &records, &faults),
        false => report::table(kind, &records, &faults),
    };
    if let Err(error) = print(&text) {
        eprintln!("vpci-vmm: the result cannot be written: {error}");
        return FAILED;
    }
    match records.iter().all(stage::Record::held) {
        true => HELD,
        false => FAILED,
    }
}

fn introduction(bed: BedKind) -> &'static str {
    match bed {
        BedKind::Kvm => {
            "A guest on virtual CPUs of this machine's KVM: each access below is an instruction that a \
             CPU\nexecuted. The guest was written from docs/spec alone and shares no code with the host."
        }
        BedKind::Sim => {
            "A guest without a CPU: what its instructions would make exit goes straight into the \
             library.\nThe guest was written from docs/spec alone and shares no code with the host."
        }
    }
}
