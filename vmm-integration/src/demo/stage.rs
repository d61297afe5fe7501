//! Where the steps are played: shows each as it goes, and keeps its record.
#![forbid(unsafe_code)]

use std::fmt::Display;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use vpci_conformance::check::Failure;
use vpci_conformance::trace::Trace;

/// Exchanges that are shown with a failure.
const LAST_EXCHANGES: usize = 12;

/// The steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Machine,
    Discovery,
    HypercallPage,
    Synic,
    Contact,
    Offer,
    Channel,
    Probe,
    Domain,
    Bar,
    Msix,
    Dma,
    Retarget,
    PvIommu,
    Translate,
    Unmap,
    Blocked,
    Removal,
    IdReuse,
    Unload,
    Reset,
}

impl Step {
    /// All, in their order.
    pub(super) const ALL: [Self; 21] = [
        Self::Machine,
        Self::Discovery,
        Self::HypercallPage,
        Self::Synic,
        Self::Contact,
        Self::Offer,
        Self::Channel,
        Self::Probe,
        Self::Domain,
        Self::Bar,
        Self::Msix,
        Self::Dma,
        Self::Retarget,
        Self::PvIommu,
        Self::Translate,
        Self::Unmap,
        Self::Blocked,
        Self::Removal,
        Self::IdReuse,
        Self::Unload,
        Self::Reset,
    ];

    /// Stable name.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Discovery => "discovery",
            Self::HypercallPage => "hypercall-page",
            Self::Synic => "synic",
            Self::Contact => "contact",
            Self::Offer => "offer",
            Self::Channel => "channel",
            Self::Probe => "probe",
            Self::Domain => "domain",
            Self::Bar => "bar",
            Self::Msix => "msix",
            Self::Dma => "dma",
            Self::Retarget => "retarget",
            Self::PvIommu => "pviommu",
            Self::Translate => "translate",
            Self::Unmap => "unmap",
            Self::Blocked => "blocked",
            Self::Removal => "removal",
            Self::IdReuse => "id-reuse",
            Self::Unload => "unload",
            Self::Reset => "reset",
        }
    }

    /// What is done.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Machine => "Make a machine with a virtual PCI bus",
            Self::Discovery => "Find out what the machine is",
            Self::HypercallPage => "Enable the hypercall page",
            Self::Synic => "Switch on the SynIC of each CPU",
            Self::Contact => "Connect to VMBus",
            Self::Offer => "Ask what is on it",
            Self::Channel => "Open the channel of the bus",
            Self::Probe => "Probe the virtual PCI bus",
            Self::Domain => "Find the function where its GUID says",
            Self::Bar => "Place BAR 0 and talk to the device",
            Self::Msix => "Give it an MSI-X interrupt",
            Self::Dma => "Have the device copy memory",
            Self::Retarget => "Move the interrupt between CPUs under load",
            Self::PvIommu => "Find the pvIOMMU",
            Self::Translate => "Put the device into a domain with page tables",
            Self::Unmap => "Unmap and flush, then the same DMA",
            Self::Blocked => "Move the device to a blocked domain, and back",
            Self::Removal => "Take the bus away, and plug it in again",
            Self::IdReuse => "Give the device's id to another device",
            Self::Unload => "Leave VMBus and shut down, as before kexec",
            Self::Reset => "Reset the machine",
        }
    }
}

/// Something seen, and what it means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Fact {
    seen: String,
    means: String,
}

/// A step that did not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Broken {
    /// What was expected, what came.
    pub(super) reason: String,
    /// The last exchanges, oldest first.
    pub(super) exchanges: Vec<String>,
}

/// DMA faults that the host counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct FaultCount {
    /// The function or the domain.
    pub(super) what: String,
    /// Accesses that did not translate.
    pub(super) faults: u64,
    /// The last of them, where the host keeps it.
    pub(super) last: Option<String>,
}

/// How a step went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) step: Step,
    pub(super) facts: Vec<Fact>,
    pub(super) broken: Option<Broken>,
    pub(super) time: Duration,
    /// False if an earlier step did not hold.
    pub(super) reached: bool,
}

impl Record {
    /// True if the step was done and all of it held.
    pub(super) fn held(&self) -> bool {
        self.reached && self.broken.is_none()
    }
}

/// What a step has seen so far.
pub(super) struct Facts<'a> {
    out: &'a mut dyn Write,
    facts: Vec<Fact>,
}

impl Facts<'_> {
    /// Shows something that was seen, and what it means.
    pub(super) fn saw(&mut self, seen: impl Display, means: impl Display) {
        let fact = Fact {
            seen: seen.to_string(),
            means: means.to_string(),
        };
        show(self.out, format_args!("      {}", fact.seen));
        show(self.out, format_args!("        -> {}", fact.means));
        self.facts.push(fact);
    }
}

/// A line for who watches. One that cannot be shown is no reason to stop: the table at the end
/// cannot be written then either, and that counts.
fn show(out: &mut dyn Write, line: impl Display) {
    let _ = writeln!(out, "{line}");
}

/// The stage.
pub(super) struct Stage {
    out: Box<dyn Write>,
    trace: Arc<Trace>,
    records: Vec<Record>,
    faults: Vec<FaultCount>,
}

impl Stage {
    /// Shows the steps on `out`.
    pub(super) fn new(out: Box<dyn Write>, trace: Arc<Trace>) -> Self {
        Self {
            out,
            trace,
            records: Vec::new(),
            faults: Vec::new(),
        }
    }

    /// Keeps counts for the table at the end.
    pub(super) fn keep_faults(&mut self, faults: Vec<FaultCount>) {
        self.faults = faults;
    }

    /// The counts that were kept.
    pub(super) fn take_faults(&mut self) -> Vec<FaultCount> {
        std::mem::take(&mut self.faults)
    }

    /// Shows a line.
    pub(super) fn say(&mut self, line: impl Display) {
        show(&mut self.out, line);
    }

    /// Plays a step. `None` if it did not hold: nothing can follow then.
    pub(super) fn step<T>(
        &mut self,
        step: Step,
        act: impl FnOnce(&mut Facts<'_>) -> Result<T, Failure>,
    ) -> Option<T> {
        let (number, total) = (self.records.len() + 1, Step::ALL.len());
        show(
            &mut self.out,
            format_args!("\n{number:>2}/{total} {}", step.title()),
        );
        let begin = Instant::now();
        let mut facts = Facts {
            out: &mut self.out,
            facts: Vec::new(),
        };
        let result = act(&mut facts);
        let facts = facts.facts;
        let time = begin.elapsed();
        let (value, broken) = match result {
            Ok(value) => (Some(value), None),
            Err(failure) => (None, Some(self.broken(&failure))),
        };
        self.records.push(Record {
            step,
            facts,
            broken,
            time,
            reached: true,
        });
        value
    }

    fn broken(&mut self, failure: &Failure) -> Broken {
        let mut exchanges = self.trace.lines();
        exchanges.drain(..exchanges.len().saturating_sub(LAST_EXCHANGES));
        let reason = failure.to_string();
        show(&mut self.out, format_args!("      FAILED: {reason}"));
        for line in &exchanges {
            show(&mut self.out, format_args!("        {line}"));
        }
        Broken { reason, exchanges }
    }

    /// A record of every step, also of those that were not reached.
    pub(super) fn into_records(mut self) -> Vec<Record> {
        for step in Step::ALL.into_iter().skip(self.records.len()) {
            self.records.push(Record {
                step,
                facts: Vec::new(),
                broken: None,
                time: Duration::ZERO,
                reached: false,
            });
        }
        self.records
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage() -> Stage {
        Stage::new(Box::new(std::io::sink()), Arc::default())
    }

    #[test]
    fn a_step_that_does_not_hold_leaves_the_rest_unreached() {
        let mut stage = stage();
        let seen = stage.step(Step::Machine, |facts| {
            facts.saw("a", "b");
            Ok(7)
        });
        assert_eq!(seen, Some(7));
        let broken: Option<()> = stage.step(Step::Discovery, |_| Err(Failure::Skip("no".into())));
        assert_eq!(broken, None);
        let records = stage.into_records();
        assert_eq!(records.len(), Step::ALL.len());
        let held: Vec<_> = records.iter().map(Record::held).collect();
        assert_eq!(held.iter().filter(|held| **held).count(), 1);
        assert!(held[0] && records[1].broken.is_some() && !records[2].reached);
    }

    #[test]
    fn names_of_steps_are_unique() {
        let mut names: Vec<_> = Step::ALL.iter().map(|step| step.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Step::ALL.len());
    }
}
