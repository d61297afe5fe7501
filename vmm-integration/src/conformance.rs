//! `vpci-vmm conformance`: runs the conformance suite and reports.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::Arc;

use vpci_conformance::bed::{Bed, BedKind};
use vpci_conformance::check::Check;
use vpci_conformance::report::Progress;
use vpci_conformance::runner::Run;
use vpci_conformance::{beds, checks, report, runner};

use crate::cli::{BedChoice, ConformanceArgs, HypervMode, ReportFormat};
use crate::print::print;

/// All checks passed, but for those that were skipped.
const PASSED: u8 = 0;
/// A check failed, or the report could not be written.
const FAILED: u8 = 1;
/// The filter matches nothing.
const USAGE: u8 = 2;
/// The bed is missing.
const NO_BED: u8 = 3;

/// Runs or lists the checks; returns the exit status.
pub(crate) fn conformance(args: &ConformanceArgs) -> u8 {
    let checks = checks::matching(args.filter.as_ref());
    if checks.is_empty() {
        eprintln!("vpci-vmm: --filter: no check has such a name (see conformance --list)");
        return USAGE;
    }
    if args.list {
        return finish(write(args.output.as_deref(), &list(&checks)), PASSED);
    }
    let bed = match bed(args.bed, args.hyperv) {
        Ok(bed) => bed,
        Err(reason) => {
            eprintln!("vpci-vmm: {reason}");
            return NO_BED;
        }
    };
    let terminal = io::stderr().is_terminal();
    let mut progress = Progress::new(io::stderr(), terminal, checks.len());
    let run = runner::run(&bed, &checks, |index, check, record| {
        // A run goes on when nobody can see how.
        let _ = progress.update(index, check, record);
    });
    let status = if run.passed() { PASSED } else { FAILED };
    let text = match render(args.format, args.output.is_some(), &run) {
        Ok(text) => text,
        Err(error) => return finish(Err(error), status),
    };
    finish(write(args.output.as_deref(), &text), status)
}

/// The bed that was asked for, if it is there.
pub(crate) fn bed(choice: BedChoice, mode: HypervMode) -> Result<Arc<dyn Bed>, String> {
    let kvm = || match mode {
        HypervMode::User => one_bed(BedKind::Kvm),
        HypervMode::Kernel => available(beds::hybrid(), "--bed kvm --hyperv kernel"),
        HypervMode::Auto => available(beds::hybrid(), "--hyperv kernel").or_else(|reason| {
            eprintln!("{reason}; running with --hyperv user instead");
            one_bed(BedKind::Kvm)
        }),
    };
    match choice {
        BedChoice::Sim => one_bed(BedKind::Sim),
        BedChoice::Kvm => kvm(),
        // Asked for by name: nothing else will do.
        BedChoice::Auto if mode == HypervMode::Kernel => kvm(),
        BedChoice::Auto => kvm().or_else(|reason| {
            eprintln!("{reason}; running on sim instead");
            one_bed(BedKind::Sim)
        }),
    }
}

fn one_bed(kind: BedKind) -> Result<Arc<dyn Bed>, String> {
    available(beds::bed(kind), &format!("--bed {}", kind.name()))
}

fn available(bed: Option<Arc<dyn Bed>>, option: &str) -> Result<Arc<dyn Bed>, String> {
    let bed = bed.ok_or(format!("{option}: this build has no such bed"))?;
    match bed.available() {
        Ok(()) => Ok(bed),
        Err(reason) => Err(format!("{option}: {reason}")),
    }
}

fn list(checks: &[&Check]) -> String {
    checks
        .iter()
        .map(|check| {
            let beds: Vec<_> = check.beds.iter().map(|bed| bed.name()).collect();
            let (name, statement) = (check.name, check.statement);
            let (beds, rows) = (beds.join(", "), check.rows.join(" "));
            format!("{name}\n    {statement}\n    {beds}: {rows}\n")
        })
        .collect()
}

/// The report. Failures were shown on standard error as they came: a text report on standard
/// output does not repeat them.
fn render(format: ReportFormat, to_file: bool, run: &Run) -> io::Result<String> {
    match format {
        ReportFormat::Text if to_file => Ok(report::text(run)),
        ReportFormat::Text => Ok(report::summary(run)),
        ReportFormat::Tap => Ok(report::tap(run)),
        ReportFormat::Junit => report::junit(run),
        ReportFormat::Json => Ok(report::json(run)?),
    }
}

fn write(output: Option<&Path>, text: &str) -> io::Result<()> {
    match output {
        Some(path) => fs::write(path, text)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        None => print(text),
    }
}

fn finish(written: io::Result<()>, status: u8) -> u8 {
    match written {
        Ok(()) => status,
        Err(error) => {
            eprintln!("vpci-vmm: the report cannot be written: {error}");
            FAILED
        }
    }
}
