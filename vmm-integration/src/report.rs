//! The report of a run (`--report FILE`): what ended it, and what every function did.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Version of the report's form.
pub(crate) const VERSION: u32 = 1;

/// Most marks that are kept; a guest that writes more only counts as having done so.
pub(crate) const MAX_MARKS: usize = 256;

/// What ended a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum End {
    /// The guest powered the machine off.
    #[serde(rename = "poweroff")]
    PowerOff,
    /// The user ended the VM through the control socket.
    Quit,
    /// The guest reset the machine too often.
    ResetLimit,
    /// A signal ended the VMM.
    Interrupted,
    /// The VM could not go on.
    Error,
}

/// Counts of one interrupt vector of a function, since the last reset of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VectorReport {
    /// MSI-X table index.
    pub(crate) index: u16,
    /// Messages sent to KVM.
    pub(crate) raised: u64,
    /// Interrupts that were masked or had no live handle.
    pub(crate) suppressed: u64,
}

/// Counts of one function's DMA since it was plugged in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct DmaReport {
    /// Accesses that did not translate.
    pub(crate) faults: u64,
    /// The last of them: direction, address, domain and cause.
    pub(crate) last_fault: Option<String>,
}

/// A domain of the guest's pvIOMMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DomainReport {
    /// Its number.
    pub(crate) number: u32,
    /// Functions in it.
    pub(crate) devices: u32,
    /// Accesses of functions in it that did not translate, since it was created.
    pub(crate) faults: u64,
}

/// What carries the first-stage domains of a device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct FirstStageReport {
    /// `nested`, `shadow`, or `none` if such a domain is refused.
    pub(crate) by: &'static str,
    /// Why it is not nested.
    pub(crate) why_not_nested: Option<String>,
}

/// Counts of one function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct FunctionReport {
    /// Instance GUID of its bus.
    pub(crate) bus: String,
    /// Function number.
    pub(crate) function: u8,
    /// `blk`, `rng`, `testdev` or `vfio`.
    pub(crate) kind: String,
    /// Logical device id.
    pub(crate) logical_id: u32,
    /// PCI domain that a Linux guest gives the bus.
    pub(crate) domain_hint: u16,
    /// Its interrupt vectors.
    pub(crate) vectors: Vec<VectorReport>,
    /// Its DMA.
    pub(crate) dma: DmaReport,
    /// Of a device of the host that is behind the pvIOMMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) first_stage: Option<FirstStageReport>,
}

/// The functions at a moment that the guest marked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Mark {
    /// Byte that the guest wrote to the mark port.
    pub(crate) id: u8,
    /// Counts at that moment.
    pub(crate) functions: Vec<FunctionReport>,
    /// Exits of vCPUs since the start.
    pub(crate) exits: u64,
    /// Flushes of device domains since the start: calls, and elements of calls with a list.
    pub(crate) flushes: u64,
    /// Calls since the start that mapped something for devices of the host, to follow tables of the
    /// guest.
    pub(crate) host_maps: u64,
    /// The same for unmapping.
    pub(crate) host_unmaps: u64,
}

/// The whole report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Report {
    /// [`VERSION`].
    pub(crate) version: u32,
    /// What ended the run.
    pub(crate) end: End,
    /// How often the guest reset the machine.
    pub(crate) resets: u32,
    /// Counts at the end.
    pub(crate) functions: Vec<FunctionReport>,
    /// Domains of the pvIOMMU at the end; empty without one.
    pub(crate) domains: Vec<DomainReport>,
    /// Counts at the guest's marks, in order.
    pub(crate) marks: Vec<Mark>,
    /// The library's own counters, by name.
    pub(crate) counters: BTreeMap<String, u64>,
}

/// Why a report could not be written.
#[derive(Debug, thiserror::Error)]
#[error("--report {path}: {source}")]
pub(crate) struct ReportError {
    path: PathBuf,
    source: io::Error,
}

/// Checks that a report can be written to `path`, so that a run does not fail at its end.
///
/// # Errors
///
/// [`ReportError`]: its directory is missing or not writable, or it is a directory itself.
pub(crate) fn check_path(path: &Path) -> Result<(), ReportError> {
    let probe = temporary(path);
    let result = if path.is_dir() {
        Err(io::ErrorKind::IsADirectory.into())
    } else {
        fs::File::create(&probe).and_then(|_| fs::remove_file(&probe))
    };
    result.map_err(|source| ReportError {
        path: path.to_owned(),
        source,
    })
}

impl Report {
    /// Writes the report, whole or not at all.
    ///
    /// # Errors
    ///
    /// [`ReportError`].
    pub(crate) fn write(&self, path: &Path) -> Result<(), ReportError> {
        let temporary = temporary(path);
        self.write_through(&temporary, path).map_err(|source| {
            // Best effort: the first error is the one that matters.
            let _ = fs::remove_file(&temporary);
            ReportError {
                path: path.to_owned(),
                source,
            }
        })
    }

    fn write_through(&self, temporary: &Path, path: &Path) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        let mut file = fs::File::create(temporary)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(temporary, path)
    }
}

/// A neighbour of `path`, so that it can be renamed onto it.
fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let function = FunctionReport {
            bus: "56504349-1234-4000-8000-766d2d767063".into(),
            function: 0,
            kind: "blk".into(),
            logical_id: 0x1234_4000,
            domain_hint: 0x1234,
            vectors: vec![VectorReport {
                index: 0,
                raised: 12,
                suppressed: 1,
            }],
            dma: DmaReport {
                faults: 2,
                last_fault: Some("read of 8 bytes".into()),
            },
            first_stage: None,
        };
        Report {
            version: VERSION,
            end: End::PowerOff,
            resets: 2,
            functions: vec![function.clone()],
            domains: vec![DomainReport {
                number: 3,
                devices: 1,
                faults: 2,
            }],
            marks: vec![Mark {
                id: 7,
                functions: vec![function],
                exits: 40,
                flushes: 5,
                host_maps: 6,
                host_unmaps: 4,
            }],
            counters: [("hypercalls".to_owned(), 3)].into(),
        }
    }

    #[test]
    fn the_form_is_the_documented_one() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["version"], 1);
        assert_eq!(json["end"], "poweroff");
        assert_eq!(json["resets"], 2);
        assert_eq!(json["functions"][0]["logical_id"], 0x1234_4000);
        assert_eq!(json["functions"][0]["domain_hint"], 0x1234);
        assert_eq!(json["functions"][0]["vectors"][0]["raised"], 12);
        assert_eq!(json["functions"][0]["dma"]["faults"], 2);
        let last = &json["functions"][0]["dma"]["last_fault"];
        assert_eq!(last, "read of 8 bytes");
        assert_eq!(json["domains"][0]["number"], 3);
        assert_eq!(json["domains"][0]["faults"], 2);
        assert_eq!(json["marks"][0]["id"], 7);
        assert_eq!(json["marks"][0]["exits"], 40);
        assert_eq!(json["marks"][0]["flushes"], 5);
        assert_eq!(json["marks"][0]["host_maps"], 6);
        assert_eq!(json["marks"][0]["host_unmaps"], 4);
        assert_eq!(
            json["marks"][0]["functions"][0]["vectors"][0]["suppressed"],
            1
        );
        assert_eq!(json["counters"]["hypercalls"], 3);
        for (end, name) in [
            (End::Quit, "quit"),
            (End::ResetLimit, "reset-limit"),
            (End::Interrupted, "interrupted"),
            (End::Error, "error"),
        ] {
            assert_eq!(serde_json::to_value(end).unwrap(), name);
        }
    }

    #[test]
    fn writing_replaces_the_file_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        check_path(&path).unwrap();
        assert!(!path.exists());
        fs::write(&path, "old").unwrap();
        report().write(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with('{') && text.ends_with("}\n"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_path_that_cannot_be_written_is_found_before_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let error = check_path(&dir.path().join("none/r.json")).unwrap_err();
        assert!(error.to_string().contains("none/r.json"), "{error}");
        assert!(check_path(dir.path()).is_err());
    }
}
