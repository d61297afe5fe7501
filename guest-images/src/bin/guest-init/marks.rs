//! Marks: a byte written to the mark port makes the VMM store its interrupt counters, and the
//! guest stores its own at the same moment, with nothing in flight.

use crate::interrupts;
use crate::pci::Found;
use crate::system::ask;
use anyhow::{Context, Result, bail};
use guest_images::report::{COUNT_EVENT, Phase, VectorCounts, Work};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// The I/O port.
const PORT: u64 = 0xf4;
/// How long counts must stand still before and after a mark.
const SETTLE: Duration = Duration::from_millis(50);
/// How long the rig may take to count interrupts on its side of a mark. A count that it takes
/// later is of another moment, and does not agree with the guest's.
const COUNTED: Duration = Duration::from_millis(500);
/// How often a mark is tried again because counts moved around it.
const ATTEMPTS: u32 = 20;

/// Writes marks with consecutive ids.
#[derive(Debug)]
pub(crate) struct Marker {
    port: Option<File>,
    /// Whether the rig counts as well.
    counted: bool,
    next: u8,
}

/// A mark and the guest's counts at it.
#[derive(Debug)]
pub(crate) struct Mark {
    id: u8,
    counts: Vec<VectorCounts>,
}

impl Mark {
    /// The byte that was written.
    pub(crate) fn id(&self) -> u8 {
        self.id
    }
}

impl Marker {
    /// Opens the port; with `enabled` off, marks are numbered but no VMM hears of them. With
    /// `counted`, the rig is asked to count the interrupts of host devices at each.
    pub(crate) fn open(enabled: bool, counted: bool) -> Result<Self> {
        let port = enabled
            .then(|| {
                OpenOptions::new()
                    .write(true)
                    .open("/dev/port")
                    .context("/dev/port")
            })
            .transpose()?;
        Ok(Self {
            port,
            counted,
            next: 1,
        })
    }

    /// Marks a moment at which no interrupt of `function` is under way: counts are the same some
    /// time before, and right after the mark.
    pub(crate) fn mark(&mut self, function: &Found) -> Result<Mark> {
        let mut before = interrupts::vectors(function)?;
        for _ in 0..ATTEMPTS {
            std::thread::sleep(SETTLE);
            let settled = interrupts::vectors(function)?;
            if settled != before {
                before = settled;
                continue;
            }
            let id = self.write()?;
            if self.counted {
                ask(&format!("{COUNT_EVENT} {id}"));
                std::thread::sleep(COUNTED);
            }
            std::thread::sleep(SETTLE);
            let after = interrupts::vectors(function)?;
            if after == settled {
                return Ok(Mark { id, counts: after });
            }
            before = after;
        }
        bail!(
            "{}: its interrupt counts do not come to rest",
            function.address
        )
    }

    fn write(&mut self) -> Result<u8> {
        let id = self.next;
        self.next = id.checked_add(1).context("no mark ids left")?;
        if let Some(port) = &self.port {
            port.write_all_at(&[id], PORT).context("/dev/port")?;
        }
        Ok(id)
    }

    /// Runs `work`, which gives its number of requests, between two marks.
    pub(crate) fn phase(
        &mut self,
        span: Span,
        function: &Found,
        work: impl FnOnce() -> Result<u64>,
    ) -> Result<Phase> {
        let Span { name, kind, cpu } = span;
        crate::system::step(name.clone());
        let begin = self.mark(function).context(name.clone())?;
        let requests = work().context(name.clone())?;
        let end = self.mark(function).context(name.clone())?;
        Ok(Phase {
            name,
            work: kind,
            address: function.address,
            cpu,
            begin: begin.id,
            end: end.id,
            requests,
            vectors: interrupts::delta(&begin.counts, &end.counts),
        })
    }
}

/// What a phase is about.
#[derive(Debug)]
pub(crate) struct Span {
    pub(crate) name: String,
    pub(crate) kind: Work,
    pub(crate) cpu: Option<u32>,
}
