//! A check and its verdict.
#![forbid(unsafe_code)]

use std::fmt::{Debug, Display};
use std::sync::Arc;

use crate::bed::{Bed, BedKind, BootError};
use crate::guest::Fault;
use crate::host::{HostError, Setup};
use crate::model::vm::Vm;
use crate::trace::{Event, Trace};

/// What a check does: it succeeds, or says why not.
pub type Verdict = Result<(), Failure>;

/// Every bed.
pub const ALL_BEDS: &[BedKind] = BedKind::ALL;
/// Only the bed where nothing happens by itself.
pub const SIM: &[BedKind] = &[BedKind::Sim];
/// Only beds with a real CPU.
pub const REAL: &[BedKind] = &[BedKind::Kvm];

/// One check.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// Stable name, `area.subject.what`.
    pub name: &'static str,
    /// What holds if the check passes, in one sentence.
    pub statement: &'static str,
    /// Ids of the rows of docs/spec that it covers.
    pub rows: &'static [&'static str],
    /// Beds that it can run on.
    pub beds: &'static [BedKind],
    /// The check itself.
    pub run: fn(&Context) -> Verdict,
}

impl Check {
    /// A check that runs on every bed.
    pub const fn new(
        name: &'static str,
        statement: &'static str,
        rows: &'static [&'static str],
        run: fn(&Context) -> Verdict,
    ) -> Self {
        Self {
            name,
            statement,
            rows,
            beds: ALL_BEDS,
            run,
        }
    }

    /// The same on these beds only.
    #[must_use]
    pub const fn on(mut self, beds: &'static [BedKind]) -> Self {
        self.beds = beds;
        self
    }

    /// The part of the name before the first dot.
    pub fn area(&self) -> &'static str {
        self.name.split('.').next().unwrap_or(self.name)
    }
}

/// Why a check did not pass.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The host did something else than expected.
    #[error("{what}: expected {expected}, got {got}")]
    Unmet {
        /// What was looked at.
        what: String,
        /// What should have come.
        expected: String,
        /// What came.
        got: String,
    },
    /// The guest took an exception where none was expected, or the bed broke.
    #[error("unexpected: {0}")]
    Fault(#[from] Fault),
    /// The operator's request failed, or the check itself asked for the impossible.
    #[error("the host: {0}")]
    Host(String),
    /// The check cannot be made here; it counts as skipped.
    #[error("{0}")]
    Skip(String),
}

impl Failure {
    /// The same failure in the course of something: what was being done when it came up.
    #[must_use]
    pub fn during(self, course: impl Display) -> Self {
        match self {
            Self::Unmet {
                what,
                expected,
                got,
            } => Self::Unmet {
                what: format!("{course}: {what}"),
                expected,
                got,
            },
            Self::Fault(fault) => Self::Unmet {
                what: course.to_string(),
                expected: "no fault".into(),
                got: fault.to_string(),
            },
            Self::Host(text) => Self::Host(format!("{course}: {text}")),
            skip @ Self::Skip(_) => skip,
        }
    }
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        match error {
            HostError::Unsupported(_) => Self::Skip(error.to_string()),
            HostError::Refused(_) => Self::Host(error.to_string()),
        }
    }
}

impl From<BootError> for Failure {
    fn from(error: BootError) -> Self {
        match error {
            BootError::Unsupported(reason) => Self::Skip(reason),
            BootError::Failed(_) => Self::Host(error.to_string()),
        }
    }
}

/// Demands that `got` is `want`.
///
/// # Errors
///
/// [`Failure::Unmet`].
pub fn equal<T: PartialEq + Debug>(what: impl Display, got: T, want: T) -> Verdict {
    if got == want {
        return Ok(());
    }
    Err(Failure::Unmet {
        what: what.to_string(),
        expected: shown(&want),
        got: shown(&got),
    })
}

/// Characters of a value that are shown.
const SHOWN: usize = 400;

/// A value on one line, its numbers in hexadecimal with their prefix.
fn shown(value: &impl Debug) -> String {
    let pretty = format!("{value:#x?}");
    let mut line = String::new();
    for piece in pretty.lines().map(str::trim) {
        if line.ends_with(',') && piece.starts_with([')', ']', '}']) {
            line.pop();
        } else if line.ends_with([',', '{']) {
            line.push(' ');
        }
        line += piece;
    }
    match line.char_indices().nth(SHOWN) {
        Some((cut, _)) => format!("{} ...", &line[..cut]),
        None => line,
    }
}

/// Demands that something holds.
///
/// # Errors
///
/// [`Failure::Unmet`].
pub fn holds(what: impl Display, condition: bool) -> Verdict {
    if condition {
        return Ok(());
    }
    Err(Failure::Unmet {
        what: what.to_string(),
        expected: "that this holds".into(),
        got: "that it does not".into(),
    })
}

/// Demands a #GP.
///
/// # Errors
///
/// [`Failure::Unmet`].
pub fn is_gp<T: Debug>(what: impl Display, result: Result<T, Fault>) -> Verdict {
    faulted(what, result, "#GP(0)", Fault::is_gp)
}

/// Demands a #UD.
///
/// # Errors
///
/// [`Failure::Unmet`].
pub fn is_ud<T: Debug>(what: impl Display, result: Result<T, Fault>) -> Verdict {
    faulted(what, result, "#UD", Fault::is_ud)
}

fn faulted<T: Debug>(
    what: impl Display,
    result: Result<T, Fault>,
    expected: &str,
    is_it: impl Fn(&Fault) -> bool,
) -> Verdict {
    let got = match result {
        Err(fault) if is_it(&fault) => return Ok(()),
        Err(fault) => fault.to_string(),
        Ok(value) => format!("no fault: {value:#x?}"),
    };
    Err(Failure::Unmet {
        what: what.to_string(),
        expected: expected.into(),
        got,
    })
}

/// What a check works with.
#[derive(Debug)]
pub struct Context {
    bed: Arc<dyn Bed>,
    trace: Arc<Trace>,
}

impl Context {
    /// A context on a bed.
    pub fn new(bed: Arc<dyn Bed>, trace: Arc<Trace>) -> Self {
        Self { bed, trace }
    }

    /// The bed's kind.
    pub fn bed(&self) -> BedKind {
        self.bed.kind()
    }

    /// Whether the bed is in hybrid mode ([`Bed::is_hybrid`]).
    pub fn is_hybrid(&self) -> bool {
        self.bed.is_hybrid()
    }

    /// Makes a machine.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn machine(&self, setup: &Setup) -> Result<Vm, Failure> {
        let note = format!("a machine with {} VPs", setup.vps);
        self.trace.add(&Event::Note(note));
        let machine = self.bed.boot(setup)?;
        let (kind, trace) = (self.bed.kind(), self.trace.clone());
        Ok(Vm::new(kind, machine, setup.clone(), trace))
    }

    /// Makes the usual machine: two VPs, one bus with one `testdev`.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn usual(&self) -> Result<Vm, Failure> {
        self.machine(&Setup::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unmet(verdict: Verdict) -> String {
        verdict.unwrap_err().to_string()
    }

    #[test]
    fn values_are_shown_on_one_line_and_cut() {
        let text = unmet(equal("x", Some((1, vec![16, 17])), None));
        assert_eq!(text, "x: expected None, got Some((0x1, [0x10, 0x11]))");
        let text = unmet(equal("x", vec![0; 4096], vec![]));
        assert!(text.len() < 450 && text.ends_with(" ..."), "{text}");
    }

    #[test]
    fn a_course_is_named_and_a_skip_stays_one() {
        let failure = equal("x", 1, 2).unwrap_err().during("version 3");
        assert_eq!(failure.to_string(), "version 3: x: expected 0x2, got 0x1");
        let skip = Failure::Skip("no".into());
        assert_eq!(skip.clone().during("y"), skip);
    }

    #[test]
    fn only_the_right_exception_is_the_expected_one() {
        let gp = Fault::Exception {
            vector: 13,
            error_code: Some(0),
            address: 1,
        };
        assert_eq!(is_gp::<()>("x", Err(gp.clone())), Ok(()));
        assert!(unmet(is_ud::<()>("x", Err(gp))).contains("expected #UD, got exception #GP"));
        assert!(unmet(is_gp("x", Ok(5))).contains("no fault: 0x5"));
        let host = Fault::Host("gone".into());
        assert!(is_gp::<()>("x", Err(host)).is_err());
    }
}
